#!/bin/sh
# A Docker engine for tests where none answers: Debian's dockerd on a socket of its own.
#
#   eval "$(tests/containers/engine.sh start)"     # or use the engine that answers already
#   eval "$(tests/containers/engine.sh images)"    # build the stand-ins of standins/, and use them
#   tests/containers/engine.sh stop                # only what `start` started
#
# Each is safe to repeat. Needs root on Debian. Everything lies in $DARKROOM_ENGINE and is kept
# from run to run: images, build cache, plugins.
set -eu

home=${DARKROOM_ENGINE:-$HOME/.cache/darkroom-engine}
here=$(cd "$(dirname "$0")" && pwd)
socket=$home/docker.sock
pid=$home/docker.pid
# A bridge of its own: another dockerd of this machine would give docker0 another address.
bridge=darkroom0
address=10.231.1.1/24
pools=base=10.231.128.0/17,size=24

answers() { docker info >/dev/null 2>&1; }

ours() {
    DOCKER_HOST=unix://$socket
    DOCKER_CONFIG=$home/config
    export DOCKER_HOST DOCKER_CONFIG
}

# The address of Debian's packages, as apt is configured here.
mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' |
        sort -u | head -n 1 | sed 's|/$||'
}

# later_apt ARGUMENTS…: apt-get as on the next release, without changing this one.
later_apt() {
    mkdir -p "$home/trixie/lists/partial" "$home/trixie/cache/archives/partial"
    echo "deb $(mirror) trixie main" >"$home/trixie/sources.list"
    apt-get -q -o Dir::Etc::SourceList="$home/trixie/sources.list" -o Dir::Etc::SourceParts=- \
        -o Dir::State::Lists="$home/trixie/lists" -o Dir::Cache="$home/trixie/cache" \
        -o APT::Sandbox::User=root "$@"
}

install_engine() {
    if ! command -v dockerd >/dev/null || ! command -v iptables >/dev/null ||
        ! command -v mmdebstrap >/dev/null; then
        # It would start a daemon of its own, where nothing forbids it.
        forbid=/usr/sbin/policy-rc.d
        [ -e $forbid ] && forbid=$home/unused
        printf '#!/bin/sh\nexit 101\n' >"$forbid" && chmod +x "$forbid"
        apt-get -q update
        # iptables must be there: without it the names of containers are not resolved.
        DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends \
            docker.io iproute2 iptables mmdebstrap || { rm -f "$forbid"; return 1; }
        rm -f "$forbid"
    fi
    if [ ! -x "$home/config/cli-plugins/docker-compose" ]; then
        later_apt update
        rm -rf "$home/debs" && mkdir -p "$home/debs" "$home/config/cli-plugins"
        (cd "$home/debs" && later_apt download docker-compose docker-buildx)
        for deb in "$home"/debs/*.deb; do dpkg -x "$deb" "$home/debs/tree"; done
        cp "$home"/debs/tree/usr/libexec/docker/cli-plugins/* "$home/config/cli-plugins/"
        rm -rf "$home/debs"
    fi
}

start() {
    if answers; then
        echo "export DOCKER_HOST=$(docker context inspect --format '{{.Endpoints.docker.Host}}')"
        return
    fi
    ours
    mkdir -p "$home" && chmod 700 "$home"
    exec 9>"$home/lock" && flock 9
    if ! answers; then
        install_engine >"$home/install.log" 2>&1 || {
            tail -n 20 "$home/install.log" >&2
            return 1
        }
        cat /proc/sys/net/ipv4/ip_forward >"$home/ip_forward"
        ip link show $bridge >/dev/null 2>&1 || ip link add $bridge type bridge
        ip address replace $address dev $bridge
        ip link set $bridge up
        # Stands in for NVIDIA's: containers may ask for GPUs, and are told which, and have none.
        mkdir -p "$home/bin"
        printf '#!/bin/sh\ncat >/dev/null\n' >"$home/bin/nvidia-container-runtime-hook"
        chmod +x "$home/bin/nvidia-container-runtime-hook"
        PATH=$PATH:$home/bin setsid dockerd --host "$DOCKER_HOST" --data-root "$home/data" --exec-root "$home/exec" \
            --pidfile "$pid" --storage-driver overlay2 --iptables=false --ip6tables=false \
            --bridge $bridge --default-address-pool $pools \
            >"$home/dockerd.log" 2>&1 </dev/null 9>&- &
        for _ in $(seq 150); do answers && break || sleep 0.2; done
        answers || { tail -n 20 "$home/dockerd.log" >&2; return 1; }
    fi
    echo "export DOCKER_HOST=$DOCKER_HOST DOCKER_CONFIG=$DOCKER_CONFIG"
}

stop() {
    ours
    [ -f "$pid" ] || return 0
    number=$(cat "$pid")
    docker ps -q | xargs -r docker stop -t 5 >/dev/null
    # What the next run builds on stays, what it replaces does not.
    docker image prune --force >/dev/null
    docker builder prune --force --keep-storage 15GB >/dev/null
    kill "$number" 2>/dev/null || true
    while kill -0 "$number" 2>/dev/null; do sleep 0.1; done
    rm -f "$pid" "$socket"
    # What dockerd leaves behind.
    ip link delete $bridge
    cat "$home/ip_forward" >/proc/sys/net/ipv4/ip_forward
}

case ${1:-} in
start | stop) "$1" ;;
images)
    answers || ours
    exec sh "$here/standins/build.sh" "$home" "$(mirror)"
    ;;
*) echo "usage: $0 start | images | stop" >&2; exit 2 ;;
esac
