# shellcheck shell=bash
# Builds k8sbox, the one program of the one-node cluster, and keeps nothing but that program; sourced, never run.
# Measured with Go 1.26 on 2 cores: 4 to 11 minutes, 2.5 GB of Go's build cache and 0.6 GB of modules while it builds,
# a program of 118 MiB at the end.

K8SBOX_SOURCE="$PMAN_REPOSITORY/scripts/engines/k8sbox"
readonly BUILD_SPACE_MIB=4096
readonly PROGRESS_SECONDS=20
# `go list -deps . | wc -l`, only for the progress messages.
readonly PACKAGES_IN_ALL=2757

go_mod_value() { awk -v key="$1" '$1 == key { sub(/^v/, "", $2); print $2; exit }' "$K8SBOX_SOURCE/go.mod"; }

KUBERNETES_VERSION=$(go_mod_value k8s.io/kubernetes)
# Another source or recipe is another program: it must not be mistaken for the cached one.
K8SBOX_DIGEST=$(cat "$K8SBOX_SOURCE"/{main.go,go.mod,go.sum,build.sh} | sha256sum | cut -c1-8)
PMAN_CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/pman"
K8SBOX="$PMAN_CACHE/k8sbox-$KUBERNETES_VERSION-$K8SBOX_DIGEST"
BUILD="$PMAN_CACHE/k8sbox-build"

k8sbox_works() { [[ -x $K8SBOX ]] && "$K8SBOX" kubectl version --client >/dev/null 2>&1; }

# In a subshell: the build's lock, directory and environment end with it.
require_k8sbox() {
    k8sbox_works || (
        LOCK_WAIT_SECONDS=3600 lock_state "$BUILD"
        k8sbox_works && exit
        require_build_space
        set_go_environment
        require_go
        build
        remove_build
    )
}

# remove_build: also what an interrupted build left; a build that is going on keeps its directory.
remove_build() { rm -rf "$BUILD"; }

require_build_space() {
    local free_mib
    free_mib=$(df -Pm "$BUILD" | awk 'END { print $4 }')
    if ((free_mib < BUILD_SPACE_MIB)); then
        say "missing: $BUILD_SPACE_MIB MiB of disk space to build Kubernetes; $BUILD has $free_mib MiB"
        exit "$EXIT_MISSING"
    fi
}

# Everything that Go writes goes below $BUILD. An interrupted build is continued from there.
set_go_environment() {
    unset GOOS GOARCH GOROOT GOEXPERIMENT
    export GOMODCACHE="$BUILD/mod" GOCACHE="$BUILD/cache" GOTMPDIR="$BUILD/tmp" GOFLAGS=-modcacherw
    export CGO_ENABLED=0 GOWORK=off GOTOOLCHAIN=local
    mkdir -p "$GOTMPDIR"
}

require_go() {
    local least present
    least=$(go_mod_value go)
    require_commands go=golang-go
    present=$(go env GOVERSION)
    if [[ $(printf '%s\n' "$least" "${present#go}" | sort -V | head -n 1) != "$least" ]]; then
        fetch_go "$present"
    fi
}

# Debian's Go may be older than Kubernetes asks for (1.19 in Debian 12). The Go module proxy also serves Go itself, and any
# Go since 1.13 can fetch it and check it against the public checksum database: https://go.dev/ref/mod#toolchains
fetch_go() {
    local module toolchain
    toolchain=$(go_mod_value toolchain)
    module="golang.org/toolchain@v0.0.1-$toolchain.$(go env GOOS)-$(go env GOARCH)"
    say "Go here is $1, too old: fetching $toolchain from the Go module proxy"
    if ! (cd / && go mod download "$module"); then
        say "missing: Go $(go_mod_value go) or newer; install it (https://go.dev/dl) and put it first on PATH"
        exit "$EXIT_MISSING"
    fi
    # Modules are stored without execute permissions.
    chmod -R +x "$GOMODCACHE/$module"/{bin,pkg/tool}
    export PATH="$GOMODCACHE/$module/bin:$PATH" GOROOT="$GOMODCACHE/$module"
}

build() {
    local log="$BUILD/build.log" compiler
    say "building Kubernetes $KUBERNETES_VERSION with $(go env GOVERSION): 4 to 11 minutes on 2 cores, once"
    compile >"$log" 2>&1 &
    compiler=$!
    # shellcheck disable=SC2064 # this compiler, not a later one
    trap "kill $compiler 2>/dev/null || true" EXIT
    report_progress "$compiler" "$log"
    if ! wait "$compiler"; then
        tail -n 20 "$log" >&2
        die "the build failed; the end of $log is above, running up again continues it"
    fi
    mv "$BUILD/k8sbox" "$K8SBOX"
    say "built $K8SBOX in $((SECONDS / 60)) min $((SECONDS % 60)) s"
}

# No debug information and no inlining: the quickest build, and half the size. -X: what /version answers.
compile() {
    local version=k8s.io/component-base/version minor=${KUBERNETES_VERSION#1.}
    cd "$K8SBOX_SOURCE" || return
    exec go build -v -mod=readonly -buildvcs=false -trimpath -gcflags='all=-dwarf=false -l' \
        -ldflags="-s -w -X $version.gitVersion=v$KUBERNETES_VERSION -X $version.gitTreeState=clean \
            -X $version.gitMajor=1 -X $version.gitMinor=${minor%%.*}" \
        -o "$BUILD/k8sbox" .
}

# report_progress PID LOG: a line every PROGRESS_SECONDS while PID lives.
report_progress() {
    local next=$((SECONDS + PROGRESS_SECONDS))
    while kill -0 "$1" 2>/dev/null; do
        if ((SECONDS >= next)); then
            say "$(build_progress "$2")"
            next=$((SECONDS + PROGRESS_SECONDS))
        fi
        sleep 0.5
    done
}

# build_progress LOG: `go build -v` writes the name of each package that it compiles, and "go: downloading ..." lines.
build_progress() {
    local compiled last
    last=$(tail -n 1 "$1")
    compiled=$(grep -vc '^go: ' "$1" || true)
    case $last in
        '' | 'go: '*) echo "downloading modules, $(grep -c '^go: downloading' "$1" || true) so far" ;;
        k8sbox) echo "linking" ;;
        *) echo "compiled $compiled of about $PACKAGES_IN_ALL packages, now $last" ;;
    esac
}
