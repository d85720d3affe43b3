#!/bin/sh
# Makes .venv and installs everything into it: what `just setup` runs, from the repository's root.
# Nothing but Python 3.11 with pip and venv is assumed. A second run is instant unless
# pyproject.toml or constraints.txt has changed.
set -eu

stamp=$(cat pyproject.toml constraints.txt | cksum)
if [ -f .venv/stamp ] && [ "$(cat .venv/stamp)" = "$stamp" ]; then
    exit 0
fi

# quietly LOG COMMAND…: keeps the output in a file, and says now and then how far it has come.
quietly() {
    log=$1
    shift
    "$@" >"$log" 2>&1 &
    work=$!
    trap 'kill "$work" 2>/dev/null; exit 130' INT TERM  # it would ignore them otherwise
    seconds=0
    while kill -0 "$work" 2>/dev/null; do
        sleep 1
        seconds=$((seconds + 1))
        if [ $((seconds % 15)) -eq 0 ]; then
            now=$(grep -E '^ *(Collecting|Downloading|Installing)' "$log" | tail -n 1 | cut -c 1-80)
            echo "  ${seconds} s  ${now:-still at it}"
        fi
    done
    if ! wait "$work"; then
        tail -n 30 "$log" >&2
        echo "failed; all of its output is in $log" >&2
        exit 1
    fi
    trap - INT TERM
}

if [ ! -x .venv/bin/python ]; then
    found=
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    if [ -z "$found" ]; then
        echo "Python 3.11 or newer is needed; PYTHON=/path/to/python just setup says where it is" >&2
        exit 1
    fi
    echo "making .venv with $("$found" --version)"
    "$found" -m venv .venv
fi

echo "installing into .venv: some minutes the first time"
quietly .venv/install.log .venv/bin/python -m pip install \
    --disable-pip-version-check --progress-bar off \
    -c constraints.txt -e '.[gateway,service,worker,local,dev]'

# spandrel asks for torchvision, whose wheels each fit one build of torch, and needs it for nothing
# that is used here.
quietly .venv/spandrel.log .venv/bin/python -m pip install \
    --disable-pip-version-check --progress-bar off --no-deps -c constraints.txt spandrel

echo "importing rembg once, which compiles what it needs: up to two minutes the first time"
quietly .venv/warm-up.log .venv/bin/python -c 'import rembg'

echo "fetching the weights for background removal (165 MB) and verifying them"
quietly .venv/weights.log .venv/bin/python -m deploy.local.weights

echo "$stamp" >.venv/stamp
echo "everything is installed"
