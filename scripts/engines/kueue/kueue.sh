# shellcheck shell=bash
# Builds Kueue, which the test of its recipe needs, and runs it beside the cluster; sourced after helm.sh, never run.
# What is built is kept: the program of 41 MiB and the definitions of Kueue's objects.

readonly KUEUE_VERSION=0.17.0
KUEUE_SOURCE="$PMAN_REPOSITORY/scripts/engines/kueue"
# Another source is another program: it must not be mistaken for the cached one.
KUEUE="$PMAN_CACHE/kueue-$KUEUE_VERSION-$(sha256sum <"$KUEUE_SOURCE/main.go" | cut -c1-8)"

require_kueue() { build_once "$KUEUE" "Kueue $KUEUE_VERSION" "1 to 2" build_kueue; }

# Kueue's own go.mod names the version of every module, and Go checks each against the public checksum database.
build_kueue() {
    local module
    rm -rf "$BUILD/kueue"
    mkdir -p "$BUILD/kueue/kept"
    cp "$KUEUE_SOURCE/main.go" "$BUILD/kueue"
    cd "$BUILD/kueue" || return
    go mod init kueue
    go get "sigs.k8s.io/kueue@v$KUEUE_VERSION"
    go build -mod=mod -trimpath -gcflags='all=-dwarf=false -l' -ldflags='-s -w' -o kept/kueue .
    module=$(go list -m -f '{{.Dir}}' sigs.k8s.io/kueue)
    cp -r "$module/config/components/crd/bases" kept/crd
    mv kept "$KUEUE"
}

KUEUE_PORT=$((PORT + 7))

# The webhook server cannot be turned off; nobody asks it.
kueue_conf() {
    cat <<YAML
apiVersion: config.kueue.x-k8s.io/v1beta2
kind: Configuration
internalCertManagement: {enable: false}
health: {healthProbeBindAddress: "0"}
metrics: {bindAddress: "0"}
leaderElection: {leaderElect: false}
webhook: {host: 127.0.0.1, port: $KUEUE_PORT, certDir: "$RUN/kueue"}
integrations: {frameworks: [batch/job]}
YAML
}

start_kueue() {
    require_kueue
    require_commands openssl=openssl
    ! runs kueue || return 0
    mkdir -p "$RUN/kueue"
    kueue_conf >"$RUN/kueue/configuration.yaml"
    (umask 077 && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
        -subj /CN=localhost -keyout "$RUN/kueue/tls.key" -out "$RUN/kueue/tls.crt" 2>/dev/null)
    kubectl apply --server-side -f "$KUEUE/crd" >/dev/null
    kubectl wait --for=condition=Established --timeout=60s -f "$KUEUE/crd" >/dev/null
    KUBECONFIG="$(kubeconfig_of admin)" launch kueue "$KUEUE/kueue" "$RUN/kueue/configuration.yaml"
    await_ready kueue 60 port_is_taken "$KUEUE_PORT"
}
