# Every habit of this project. `just` lists them; all but `setup` assume nothing but Python and pip.

set positional-arguments

python := ".venv/bin/python"

# list the recipes
[private]
default:
    @"{{ just_executable() }}" --list --unsorted

# make .venv and install everything; instant when nothing has changed
setup:
    #!/bin/sh
    set -eu
    stamp=$(cat pyproject.toml constraints.txt | cksum)
    if [ -f .venv/stamp ] && [ "$(cat .venv/stamp)" = "$stamp" ]; then exit 0; fi
    found=
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python3.14; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    if [ -z "$found" ]; then
        echo "Python 3.11 or newer is needed (set PYTHON to its path)" >&2
        exit 1
    fi
    [ -x {{ python }} ] || "$found" -m venv .venv
    # Runs "$@" with its output in a file, and says now and then that it still works.
    quietly() {
        log=$1; shift
        "$@" >"$log" 2>&1 &
        work=$!
        seconds=0
        while kill -0 "$work" 2>/dev/null; do
            sleep 1
            seconds=$((seconds + 1))
            if [ $((seconds % 15)) -eq 0 ]; then
                echo "  $seconds s: $(grep -E '^(Collecting|Downloading|Installing)' "$log" | tail -n 1 | cut -c 1-90)"
            fi
        done
        if ! wait "$work"; then
            tail -n 30 "$log" >&2
            echo "failed; the whole output is in $log" >&2
            exit 1
        fi
    }
    echo "installing into .venv (some minutes and about 2 GB the first time)"
    quietly .venv/install.log {{ python }} -m pip install --disable-pip-version-check --progress-bar off \
        -c constraints.txt -e '.[gateway,service,worker,local,dev]'
    echo "warming rembg, which compiles its code when it is first imported (up to two minutes)"
    quietly .venv/warm.log {{ python }} -c 'import rembg'
    echo "$stamp" >.venv/stamp
    echo "set up"

# start everything and return when it is healthy; safe to repeat
up *ARGS: setup
    @{{ python }} -m deploy.local up "$@"

# stop everything
down: setup
    @{{ python }} -m deploy.local down

# what runs, how much memory it takes and whether it is healthy
status: setup
    @{{ python }} -m deploy.local status

# the end of the logs: `just logs`, `just logs gateway -f`
logs *ARGS: setup
    @{{ python }} -m deploy.local logs "$@"

# delete all data and secrets, after asking
reset *ARGS: setup
    @{{ python }} -m deploy.local reset "$@"

# apply the migrations of all services
migrate: setup
    @{{ python }} -m deploy.local migrate

# start everything and make a picture by way of the public API
demo *ARGS: up
    @{{ python }} -m deploy.local.demo "$@"

# every test, against real servers; arguments go to pytest
test *ARGS: setup
    @{{ python }} -m pytest "$@"

# lint, format, types, and who may import whom
check: setup
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    {{ python }} -m mypy
    .venv/bin/lint-imports

# format the code
format: setup
    .venv/bin/ruff check --fix .
    .venv/bin/ruff format .

# measure; see tests/bench
bench *ARGS: setup
    @{{ python }} -m tests.bench "$@"
