# shellcheck shell=bash
# What the scripts of this folder share. They source it; it is never run.
# A script's state lives in one directory, which is also its lock; whatever it started is known by a pid file there.

export PATH="$PATH:/usr/sbin:/sbin"
export LC_ALL=C
PMAN_DEV_HOME="${PMAN_DEV_HOME:-${XDG_CACHE_HOME:-${HOME:?set HOME or PMAN_DEV_HOME}/.cache}/pman/dev}"
PMAN_REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
readonly EXIT_MISSING=3
TRIXIE="$(dirname "${BASH_SOURCE[0]}")/trixie"
readonly TRIXIE
# Every instance owns this many ports, so that two never overlap (unless their path hashes collide: then `up` says so).
readonly PORTS_PER_INSTANCE=20

say() { printf 'scripts/engines/%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# The comment block at the top of the calling script is its help text.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# choose VALUE CHOICE...: ends the script unless VALUE is one of the choices. CHOSEN says that the caller has chosen.
choose() {
    if [[ " ${*:2} " != *" $1 "* ]]; then
        say "$1 is none of: ${*:2}"
        exit 2
    fi
    CHOSEN=1
}

# wait_for SECONDS WHAT COMMAND...: waits until COMMAND succeeds; fails after SECONDS, and says WHAT it waited for.
wait_for() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS >= deadline)); then
            say "waited in vain for: $what"
            return 1
        fi
        sleep 0.1
    done
}

# default_port DIR: the first of the ports of the instance in DIR, below the kernel's ephemeral range.
default_port() {
    local sum
    sum=$(printf '%s' "$1" | cksum | cut -d' ' -f1)
    echo $((20000 + PORTS_PER_INSTANCE * (sum % 500)))
}

port_is_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# require_free_ports VARIABLE PORT...: VARIABLE is what the user sets to choose other ones.
require_free_ports() {
    local port variable=$1
    shift
    for port in "$@"; do
        if port_is_taken "$port"; then
            die "port $port is taken by something else; set $variable to the first of $PORTS_PER_INSTANCE free ones"
        fi
    done
}

export_line() { printf 'export %s=%q\n' "$1" "$2"; }

# ---------------------------------------------------------------------------------------------- state directory, lock

# lock_state DIR: makes DIR and holds its lock until the script ends. The lock is on the directory itself, so that
# `down` can remove it; whoever waited for a directory that is gone starts over with the new one.
lock_state() {
    local waited=0
    while true; do
        mkdir -p "$1"
        exec 9<"$1"
        if ! flock -n 9; then
            say "another ${0##*/} is at work on $1, waiting"
            flock -w "${LOCK_WAIT_SECONDS:=600}" 9 || die "could not lock $1 within $LOCK_WAIT_SECONDS s"
        fi
        [[ $1 -ef /proc/self/fd/9 ]] && return
        ((++waited < 100)) || die "$1 keeps disappearing"
    done
}

remove_state() {
    rm -rf --one-file-system "$1"
    rmdir -p --ignore-fail-on-non-empty "$(dirname "$1")" 2>/dev/null || true
}

# ------------------------------------------------------------------------------------------------------------ daemons

# launch NAME COMMAND...: runs COMMAND in the background, in a session of its own and without the lock. Its pid and its
# log are in $RUN.
launch() {
    local name=$1
    shift
    mkdir -p "$RUN/log" "$RUN/pid"
    setsid "$@" </dev/null >>"$RUN/log/$name.log" 2>&1 9<&- &
    process_identity $! >"$RUN/pid/$name"
}

# The start time guards against another process that got the same pid later (proc(5), field 22 of stat).
process_identity() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # shellcheck disable=SC2086 # fields of stat after the command's name
    set -- "$1" ${stat##*) }
    [[ $2 != Z ]] && echo "$1 ${21}"
}

# pid_of NAME: the pid of the living process that `launch` started under NAME; fails when there is none.
pid_of() {
    local pid started
    read -r pid started 2>/dev/null <"$RUN/pid/$1" || return 1
    [[ $(process_identity "$pid") == "$pid $started" ]] && echo "$pid"
}

runs() { pid_of "$1" >/dev/null; }

is_gone() { ! runs "$1"; }

# stop_process NAME [SECONDS]: sends TERM, and KILL after SECONDS (20). Says nothing if the process does not run.
stop_process() {
    local pid
    if pid=$(pid_of "$1"); then
        kill -TERM "$pid" 2>/dev/null || true
        if ! wait_for "${2:-20}" "$1 (pid $pid) to end" is_gone "$1"; then
            kill -KILL "$pid" 2>/dev/null || true
            wait_for 20 "$1 (pid $pid) to be killed" is_gone "$1"
        fi
    fi
    rm -f "$RUN/pid/$1"
}

kill_process() {
    local pid
    pid=$(pid_of "$1") || die "$1 does not run"
    kill -KILL "$pid"
    wait_for 20 "$1 (pid $pid) to be killed" is_gone "$1"
    rm -f "$RUN/pid/$1"
}

# start_daemon NAME: calls the script's function start_NAME unless the daemon runs.
start_daemon() { runs "$1" || "start_$1"; }

# kill_all_of COMMAND...: sends KILL to every pid that COMMAND prints; succeeds when it prints none.
kill_all_of() {
    local left
    left=$("$@")
    # shellcheck disable=SC2086 # one argument per pid
    [[ -z $left ]] || { kill -KILL $left; return 1; }
}

# is_gone_or NAME COMMAND...
is_gone_or() { is_gone "$1" || "${@:2}"; }

# await_ready NAME SECONDS COMMAND...: waits until COMMAND succeeds. If NAME dies, fails at once and shows the end of its
# log.
await_ready() {
    local name=$1 seconds=$2
    shift 2
    if wait_for "$seconds" "$name to answer" is_gone_or "$name" "$@" && runs "$name"; then
        return
    fi
    tail -n 20 "$RUN/log/$name.log" >&2
    die "$name did not start; the end of $RUN/log/$name.log is above"
}

# --------------------------------------------------------------------------------------------------------- namespaces

# Starts a process that holds a mount and a network namespace, so that a new daemon finds what a killed one has left.
# A daemon writes to the directories of the array COVERED whatever its options say. In the mount namespace, directories of
# $RUN cover them. The covered ones are not removed by `down`, which would uncover them for every other instance.
# The network namespace has a loopback interface and nothing else.
# MOUNTS makes the mount namespace and runs the command that follows.
MOUNTS=(unshare --mount --propagation slave --)

start_namespaces() {
    local directory
    for directory in "${COVERED[@]}"; do
        mkdir -p "$RUN/covered$directory"
        mkdir -p "$directory"
    done
    rm -f "$RUN/namespaces.ready"
    # shellcheck disable=SC2016 # expanded by the inner shell
    launch namespaces unshare --net -- "${MOUNTS[@]}" bash -c '
        set -eu
        ip link set lo up
        for directory in "${@:2}"; do
            mkdir -p "$directory"
            mount --bind "$1/covered$directory" "$directory"
        done
        : >"$1/namespaces.ready"
        exec sleep infinity' bash "$RUN" "${COVERED[@]}"
    await_ready namespaces 20 test -e "$RUN/namespaces.ready"
}

enter_namespaces() { nsenter --target "$(pid_of namespaces)" --net --mount -- "$@"; }

launch_in_namespaces() {
    local name=$1
    shift
    launch "$name" nsenter --target "$(pid_of namespaces)" --net --mount -- "$@"
}

# newer_root PACKAGE...: the namespaces of this instance get the root directory of Debian 13, with these packages.
newer_root() {
    require_root "this version runs in a root directory of Debian 13"
    9<&- "$TRIXIE" root iproute2 "$@" >/dev/null
    MOUNTS=("$TRIXIE" enter "$RUN" --)
}

# A registry without TLS, inside the namespaces only, for tests of pulls.
readonly REGISTRY=127.0.0.1:5000

start_registry() {
    require_commands docker-registry=docker-registry curl=curl
    printf 'version: 0.1\nlog: {level: warn}\nstorage: {filesystem: {rootdirectory: "%s"}}\nhttp: {addr: "%s"}\n' \
        "$RUN/registry" "$REGISTRY" >"$RUN/registry.yml"
    launch_in_namespaces registry docker-registry serve "$RUN/registry.yml"
    await_ready registry 30 enter_namespaces curl -fsS --max-time 5 "http://$REGISTRY/v2/"
}

# ----------------------------------------------------------------------------------------------------------- packages

is_debian() { grep -qsE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release; }

require_root() {
    if ((EUID != 0)); then
        say "root is missing: $*"
        exit "$EXIT_MISSING"
    fi
}

require_debian_root() {
    if ! is_debian || ((EUID != 0)); then
        say "missing: $1 (Debian packages: $2)"
        say "this script installs them only on Debian as root; install them yourself, or run it there"
        exit "$EXIT_MISSING"
    fi
}

# require_commands COMMAND=PACKAGE...: installs the packages of the commands that are missing, as root on Debian;
# elsewhere says what is missing and ends the script with 3.
require_commands() {
    local pair commands=() packages=()
    for pair in "$@"; do
        if ! command -v "${pair%%=*}" >/dev/null; then
            commands+=("${pair%%=*}")
            packages+=("${pair#*=}")
        fi
    done
    ((${#commands[@]})) || return 0
    require_debian_root "${commands[*]}" "${packages[*]}"
    install_packages "${packages[@]}"
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || die "package ${pair#*=} brought no ${pair%%=*}"
    done
}

# The packages busybox and busybox-static give the command the same name; only the static one runs in an empty root.
require_static_busybox() {
    require_commands busybox=busybox-static
    if ldd "$(command -v busybox)" >/dev/null 2>&1; then
        require_debian_root "a busybox that is static" busybox-static
        install_packages busybox-static
    fi
}

apt_quietly() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -o Acquire::Retries=3 "$@" </dev/null >&2
}

# This is a subshell, so that the lock and the trap end with it.
install_packages() (
    say "installing $*"
    exec 9<&-
    exec 8>"/run/lock/pman-dev-apt.lock"
    flock -w 600 8 || die "another installation takes longer than 600 s"
    forbid_service_starts
    apt_quietly update || say "apt-get update failed; trying with the package lists that are here"
    apt_quietly install -y --no-install-recommends "$@" || die "apt-get could not install $*"
)

# Packages start their services when they are installed, unless policy-rc.d answers 101 (invoke-rc.d(8)). A policy that
# is there already is the machine's own and stays; ours goes when the installation ends.
forbid_service_starts() {
    local policy=/usr/sbin/policy-rc.d
    [[ ! -e $policy ]] || return 0
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
}

# -------------------------------------------------------------------------------------------------------------- image

# make_image_root DIR: a root directory of busybox with every mount point that ch-run, dockerd and podman need.
make_image_root() {
    local applet root=$1
    mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,etc,proc,sys,dev,root,home,mnt,run,var,share/incoming,share/outgoing}
    install -d -m 1777 "$root/tmp" "$root/var/tmp"
    install -m 755 "$(command -v busybox)" "$root/bin/busybox"
    while read -r applet; do
        [[ -e $root/$applet ]] || ln -s /bin/busybox "$root/$applet"
    done < <("$root/bin/busybox" --list-full | grep -E '^(usr/)?s?bin/')
    printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/sh\n' >"$root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
    printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
    : >"$root/etc/resolv.conf"
}
