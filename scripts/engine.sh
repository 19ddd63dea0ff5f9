#!/bin/sh
# Find the Docker Engine, or make one where we may. The only line on stdout is DOCKER_HOST=...; steps go to stderr.
#
#   scripts/engine.sh           the engine that DOCKER_HOST, the docker context or a usual socket names; where none
#                               answers, as root on Debian or Ubuntu: docker.io from the distribution's packages
#   scripts/engine.sh --newer   Docker 26 at least: as root on Debian 12 that of Debian 13, beside whatever runs here;
#                               where that cannot be, the same as above
#   scripts/engine.sh --stop    end the engines that this script started
#
# Exit code 3: no engine can be had here; the last line on stderr says why.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
started=/run/sandbox-dockerd.pid       # of the distribution's dockerd, where we started it
newer=/opt/sandbox-docker26            # Debian 13's Docker, unpacked
state=/var/lib/sandbox-docker26        # its images and containers
run=/run/sandbox-docker26              # its socket and pid files
bridge=sandbox26                       # its own, with a network from the block that is reserved for tests
network=198.18.26
log=/var/log/sandbox-dockerd.log

say() { echo "engine: $*" >&2; }

find_engine() { python3 -I -S "$here/find_engine.py" "$@"; }

answer() { # HOST VERSION
    say "Docker $2 at $1"
    echo "DOCKER_HOST=$1"
    exit 0
}

# Run one quiet step; its last line is the reason when it fails.
quietly() {
    "$@" >"$log" 2>&1 </dev/null || { say "\`$1 $2\` failed: $(tail -n 1 "$log")"; return 1; }
}

# --- dockerd by itself ---

program_of() { readlink "/proc/$1/exe"; } # nothing for a zombie

pid_of() { # PROGRAM PID_FILE: a killed program leaves its file, and the number may be another process's by now
    pid=$(cat "$2" 2>/dev/null) || return 1
    case $(program_of "$pid") in */"$1"*) echo "$pid" ;; *) return 1 ;; esac
}

start() { # HOST PID_FILE EXEC_ROOT ARGUMENT...
    host=$1 pid_file=$2 exec_root=$3
    shift 3
    if ! pid=$(pid_of dockerd "$pid_file"); then
        rm -f "$pid_file"
        # Dockerd takes whatever runs under this number for its containerd, waits for it, and then kills it.
        pid_of containerd "$exec_root/containerd/containerd.pid" >/dev/null || rm -f "$exec_root/containerd/containerd.pid"
        say "starting dockerd, which logs to $log"
        # In a session of its own: it outlives us, and no Ctrl-C reaches it.
        setsid dockerd --host "$host" --pidfile "$pid_file" --exec-root "$exec_root" "$@" </dev/null >"$log" 2>&1 &
        pid=$!
    fi
    await "$host" "$pid"
}

await() { # HOST PID
    tries=0
    until find_engine "$1" >/dev/null 2>&1; do
        tries=$((tries + 1))
        if [ $tries -gt 240 ] || ! program_of "$2" >/dev/null; then
            say "dockerd did not come up: $(tail -n 1 "$log")"
            return 1
        fi
        [ $((tries % 20)) -ne 0 ] || say "still waiting for it"
        sleep 0.25
    done
}

stop() { # PID_FILE
    pid=$(pid_of dockerd "$1") || return 0
    say "stopping dockerd, process $pid"
    kill "$pid"
    while program_of "$pid" >/dev/null; do sleep 0.1; done
}

# --- Debian 13's Docker on Debian 12, beside the system's own ---

unpack_newer() {
    # runc and tini of Debian 13 need a newer libc: the host's runc and tini-static do instead.
    "$here/unpack.sh" trixie "$newer" docker.io containerd tini || return 1
    quietly "$newer/usr/sbin/dockerd" --version && quietly "$newer/usr/bin/containerd" --version || return 1
}

# A second dockerd would empty the first one's packet filter chains. So this one is told to leave the filter alone, and
# gets from us a bridge and the three rules that its builds need. The bridge of a network that is named like ours with more
# behind it is let through as well.
rules() { # COMMAND: -I inserts them, -C checks, -D deletes
    iptables -w -t nat "$1" POSTROUTING -s "$network.0/24" ! -o "$bridge" -j MASQUERADE &&
        iptables -w "$1" FORWARD -i "$bridge+" -j ACCEPT &&
        iptables -w "$1" FORWARD -o "$bridge+" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
}

make_bridge() {
    [ -d "/sys/class/net/$bridge" ] || ip link add "$bridge" type bridge || return 1
    ip address replace "$network.1/24" dev "$bridge" && ip link set "$bridge" up || return 1
    echo 1 >/proc/sys/net/ipv4/ip_forward || return 1
    rules -C 2>/dev/null || rules -I
}

start_newer() {
    missing=
    for need in ip:iproute2 iptables:iptables runc:runc; do
        command -v "${need%:*}" >/dev/null || missing="$missing ${need#*:}"
    done
    # shellcheck disable=SC2086  # a list of words
    [ -z "$missing" ] || "$here/apt.sh" $missing || return 1
    unpack_newer && mkdir -p "$run" && make_bridge || return 1
    # Namespaces of its own in containerd: where a system-wide one runs, dockerd shares it with the other dockerd.
    PATH=$newer/usr/sbin:$newer/usr/bin:$PATH start "unix://$run/docker.sock" "$run/docker.pid" "$run/exec" \
        --config-file /dev/null --data-root "$state" --bridge "$bridge" \
        --iptables=false --ip6tables=false --ip-masq=false --init-path "$newer/usr/bin/tini-static" \
        --containerd-namespace sandbox26 --containerd-plugins-namespace sandbox26-plugins
}

# --- what was asked for ---

is_root_with_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
is_debian_12() { grep -qx 'ID=debian' /etc/os-release && grep -qx 'VERSION_ID="12"' /etc/os-release; }

case ${1-} in
'') ;;
--newer)
    if [ -z "${DOCKER_HOST-}" ] && is_root_with_apt && is_debian_12; then
        if { find_engine "unix://$run/docker.sock" >/dev/null && make_bridge; } || start_newer; then
            # shellcheck disable=SC2046  # two words
            answer $(find_engine "unix://$run/docker.sock")
        fi
        say "Docker 26 cannot be had here: taking the engine at hand"
    fi
    ;;
--stop)
    stop "$started"
    stop "$run/docker.pid"
    if [ -d "/sys/class/net/$bridge" ]; then
        ip link delete "$bridge"
        rules -D
    fi
    exit 0
    ;;
*) say "no option $1: see the head of $0"; exit 2 ;;
esac

# shellcheck disable=SC2086  # two words
if engine=$(find_engine); then answer $engine; fi
if [ -n "${DOCKER_HOST-}" ]; then
    say "DOCKER_HOST=$DOCKER_HOST does not answer: start that engine, or unset the variable"
    exit 1  # not 3: who names an engine does not want something else instead
fi
if ! is_root_with_apt; then
    say "no Docker Engine answers: start one (Docker Desktop, or \`systemctl start docker\`), or run this as root on Debian or Ubuntu"
    exit 3
fi
command -v dockerd >/dev/null || "$here/apt.sh" docker.io || exit 3
if ! find_engine >/dev/null; then  # the package may have started it
    if [ -d /run/systemd/system ]; then
        say "starting docker.service"
        quietly systemctl start docker || exit 3
    else
        start unix:///var/run/docker.sock "$started" /var/run/docker || exit 3
    fi
fi
# shellcheck disable=SC2046  # two words
answer $(find_engine)
