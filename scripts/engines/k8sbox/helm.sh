# shellcheck shell=bash
# Builds Helm, which tests of deploy/helm need, and keeps nothing but that program; sourced after build.sh, never run.
# Measured with Go 1.26 on 2 busy cores: 5 minutes, a program of 68 MiB.

readonly HELM_VERSION=3.19.0
HELM="$PMAN_CACHE/helm-$HELM_VERSION"

# This is a subshell, so that the build's lock, directory and environment end with it.
require_helm() {
    [[ -x $HELM ]] || (
        LOCK_WAIT_SECONDS=3600 lock_state "$BUILD"
        [[ -x $HELM ]] && exit
        require_build_space
        set_go_environment
        require_go
        say "building Helm $HELM_VERSION with $(go env GOVERSION): 2 to 5 minutes on 2 cores, once"
        GOBIN="$BUILD" go install -trimpath -ldflags='-s -w' -gcflags='all=-dwarf=false -l' \
            "helm.sh/helm/v3/cmd/helm@v$HELM_VERSION" >&2
        mv "$BUILD/helm" "$HELM"
        remove_build
    )
}
