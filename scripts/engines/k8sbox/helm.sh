# shellcheck shell=bash
# Builds Helm, which tests of deploy/helm need, and keeps nothing but that program; sourced after build.sh, never run.
# Measured with Go 1.26 on 2 busy cores: 5 minutes, a program of 68 MiB.

readonly HELM_VERSION=3.19.0
HELM="$PMAN_CACHE/helm-$HELM_VERSION"

require_helm() { build_once "$HELM" "Helm $HELM_VERSION" "2 to 5" build_helm; }

build_helm() {
    GOBIN="$BUILD" go install -trimpath -ldflags='-s -w' -gcflags='all=-dwarf=false -l' \
        "helm.sh/helm/v3/cmd/helm@v$HELM_VERSION"
    mv "$BUILD/helm" "$HELM"
}

# build_once RESULT NAME MINUTES COMMAND: COMMAND makes RESULT, a file or directory, where it is not there.
# This is a subshell, so that the build's lock, directory and environment end with it. Nothing may be tested on it (`||`,
# `if`): bash would then go on after a step that failed.
build_once() {
    [[ -e $1 ]] || (
        LOCK_WAIT_SECONDS=3600 lock_state "$BUILD"
        [[ -e $1 ]] && exit
        require_build_space
        set_go_environment
        require_go
        say "building $2 with $(go env GOVERSION): $3 minutes on 2 cores, once"
        "$4" >&2
        remove_build
    )
}
