# shellcheck shell=bash
# The one-node cluster: etcd, API server, controller manager, scheduler, containerd and kubelet, all of them on loopback
# and each a plain process with its data, log and pid below $RUN; sourced, never run.
#
# What it is not: pods have no network but their own loopback, there are no services, no DNS, no registry and no swap of
# a node. Versions: the Kubernetes of go.mod, the machine's containerd and runc. Memory: about 0.9 GB.

# In the order in which they start; they end in the opposite one.
COMPONENTS=(containerd etcd kube-apiserver kube-controller-manager kube-scheduler kubelet)
PKI="$RUN/pki"
CONTAINERD="$RUN/containerd"
SOCKET="$CONTAINERD/containerd.sock"
# kubelet refuses a loopback address as the node's. This one is of TEST-NET-1 (RFC 5737), which nothing else uses; it is
# added to `lo`.
NODE_ADDRESS="192.0.2.$((PORT / PORTS_PER_INSTANCE % 254 + 1))"
# A cgroup of its own, so that another kubelet's /kubepods is left alone.
CGROUP="pman-dev-kubernetes-$PORT"
ETCD_PORT=$PORT
ETCD_PEER_PORT=$((PORT + 1))
API_PORT=$((PORT + 2))
CONTROLLER_MANAGER_PORT=$((PORT + 3))
SCHEDULER_PORT=$((PORT + 4))
KUBELET_PORT=$((PORT + 5))
KUBELET_HEALTH_PORT=$((PORT + 6))
# Directories outside of $RUN that kubelet and containerd write to, whatever their options say: in the cluster's mount
# namespace each is covered by one of ours, so that another kubelet's or containerd's are left alone.
COVERED=(/run/containerd /var/lib/cni /var/lib/kubelet /var/log/containers)
# What changes outside all the same (sysctls by kubelet, mount points), shared by all instances on this machine:
# recorded by the first one, put back by the last one.
MACHINE=/run/pman-dev-kubernetes
CHANGED_SYSCTLS=(kernel.panic kernel.panic_on_oops kernel.keys.root_maxbytes kernel.keys.root_maxkeys
    vm.overcommit_memory vm.panic_on_oom)

# ------------------------------------------------------------------------------------------------------- requirements

require_cluster_tools() {
    if ((EUID != 0)); then
        say "missing: root, which a kubelet and a containerd need; or an own cluster (--context NAME), or kind, or k3d"
        exit "$EXIT_MISSING"
    fi
    require_commands containerd=containerd ctr=containerd runc=runc openssl=openssl ip=iproute2 sysctl=procps \
        flock=util-linux nsenter=util-linux unshare=util-linux python3=python3 awk=mawk find=findutils
    require_static_busybox
    [[ -n $(cgroup_mounts) ]] || die "no cgroups are mounted below /sys/fs/cgroup; containers need them"
}

# kubelet's sockets have the longest path of a unix socket: $RUN/kubelet/pod-resources/kubelet.sock; 107 bytes in all.
require_short_path() {
    ((${#RUN} <= 70)) || die "the path $RUN is too long for unix sockets; set PMAN_DEV_HOME to a shorter one"
}

# ------------------------------------------------------------------------------------------------------ configuration

# This is a subshell, so that the umask ends with it. tokens.csv is written last: if it is there, all files are.
make_keys() (
    [[ ! -s $PKI/tokens.csv ]] || exit 0
    umask 077
    mkdir -p "$PKI"
    make_certificates 2>"$PKI/openssl.log" || { cat "$PKI/openssl.log" >&2 && exit 1; }
    make_tokens
)

# One certificate is the API server's towards all: as a server, and as the client of etcd and kubelet.
make_certificates() {
    local names="subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:kubernetes.default.svc"
    local new_key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
    openssl req -x509 "${new_key[@]}" -days 3650 -subj /CN=pman-dev-kubernetes -keyout "$PKI/ca.key" -out "$PKI/ca.crt" &&
        openssl req "${new_key[@]}" -subj /O=system:masters/CN=kube-apiserver -keyout "$PKI/tls.key" -out "$PKI/tls.csr" &&
        openssl x509 -req -in "$PKI/tls.csr" -CA "$PKI/ca.crt" -CAkey "$PKI/ca.key" -CAcreateserial -days 3650 \
            -extfile <(echo "$names") -out "$PKI/tls.crt" &&
        openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out "$PKI/accounts.key" &&
        openssl pkey -in "$PKI/accounts.key" -pubout -out "$PKI/accounts.pub"
}

# token,user,uid,group of https://kubernetes.io/docs/reference/access-authn-authz/authentication/#static-token-file
make_tokens() {
    local user group
    while read -r user group; do
        printf '%s,%s,%s,%s\n' "$(openssl rand -hex 16)" "$user" "$user" "$group"
    done >"$PKI/tokens.new" <<USERS
admin system:masters
job-runner
nobody
system:kube-controller-manager
system:kube-scheduler
system:node:localhost system:nodes
USERS
    mv "$PKI/tokens.new" "$PKI/tokens.csv"
}

write_cluster_kubeconfigs() {
    local cluster token user rest
    cluster=$(printf '{"server": "https://127.0.0.1:%s", "certificate-authority-data": "%s"}' \
        "$API_PORT" "$(base64 -w0 <"$PKI/ca.crt")")
    while IFS=, read -r token user rest; do
        write_kubeconfig "$(kubeconfig_of "$user")" "$cluster" "{\"token\": \"$token\"}"
    done <"$PKI/tokens.csv"
}

write_configuration() {
    mkdir -p "$CONTAINERD/registries/_default" "$RUN/cni/bin" "$RUN/cni/net.d" "$RUN/kubelet" "$RUN/bin"
    ln -sfn "$K8SBOX" "$KUBECTL"
    etcd_configuration >"$RUN/etcd.yaml"
    containerd_configuration >"$CONTAINERD/config.toml"
    registry_configuration >"$CONTAINERD/registries/_default/hosts.toml"
    kubelet_configuration >"$RUN/kubelet.yaml"
    no_network_plugin >"$RUN/cni/bin/no-network"
    loopback_plugin >"$RUN/cni/bin/loopback"
    chmod 755 "$RUN/cni/bin/no-network" "$RUN/cni/bin/loopback"
    echo '{"cniVersion":"0.4.0","name":"no-network","plugins":[{"type":"no-network"}]}' >"$RUN/cni/net.d/10-no-network.conflist"
}

# Client certificates, because whoever may write to etcd is root here. Nothing has to survive a crash of the machine.
etcd_configuration() {
    local security="{cert-file: '$PKI/tls.crt', key-file: '$PKI/tls.key', client-cert-auth: true, trusted-ca-file: '$PKI/ca.crt'}"
    cat <<YAML
name: default
data-dir: '$RUN/etcd'
listen-client-urls: https://127.0.0.1:$ETCD_PORT
advertise-client-urls: https://127.0.0.1:$ETCD_PORT
listen-peer-urls: https://127.0.0.1:$ETCD_PEER_PORT
initial-advertise-peer-urls: https://127.0.0.1:$ETCD_PEER_PORT
initial-cluster: default=https://127.0.0.1:$ETCD_PEER_PORT
client-transport-security: $security
peer-transport-security: $security
unsafe-no-fsync: true
log-level: warn
YAML
}

# An overlay cannot be mounted on an overlay. Inside a container, the slower snapshotter `native` is used, which copies.
snapshotter() { if [[ $(stat -f -c %T "$RUN") == overlayfs ]]; then echo native; else echo overlayfs; fi; }

# restrict_oom_score_adj: inside a container root may not lower an OOM score. The plugins left out look for what is
# not there or write outside of $RUN.
containerd_configuration() {
    local cri='plugins."io.containerd.grpc.v1.cri"'
    cat <<TOML
version = 2
root = "$CONTAINERD/root"
state = "$CONTAINERD/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt"]
[grpc]
  address = "$SOCKET"
[ttrpc]
  address = "$SOCKET.ttrpc"
[$cri]
  sandbox_image = "$PAUSE_IMAGE"
  restrict_oom_score_adj = true
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  netns_mounts_under_state_dir = true
  [$cri.registry]
    config_path = "$CONTAINERD/registries"
  [$cri.cni]
    bin_dir = "$RUN/cni/bin"
    conf_dir = "$RUN/cni/net.d"
  [$cri.containerd]
    snapshotter = "$(snapshotter)"
  [$cri.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [$cri.containerd.runtimes.runc.options]
      SystemdCgroup = false
      Root = "$CONTAINERD/runc"
TOML
}

# Loopback only, for pulls too: a pull of an image that is not here fails at once, at a port where nothing listens.
# A test that serves a registry adds registries/HOST_PORT_/hosts.toml; containerd reads it at the next pull.
registry_configuration() {
    cat <<'TOML'
server = "http://127.0.0.1:1"
[host."http://127.0.0.1:1"]
  capabilities = ["pull", "resolve"]
TOML
}

# A CNI plugin that makes no network; the address is of TEST-NET-2 and only there because kubelet wants one.
no_network_plugin() {
    cat <<'PLUGIN'
#!/bin/sh
case $CNI_COMMAND in
    ADD)
        last=$((0x$(printf %.4s "$CNI_CONTAINERID") % 254 + 1))
        printf '{"cniVersion":"0.4.0","interfaces":[{"name":"%s","sandbox":"%s"}],' "$CNI_IFNAME" "$CNI_NETNS"
        printf '"ips":[{"version":"4","address":"198.51.100.%s/24","interface":0}],"dns":{}}\n' "$last" ;;
    VERSION) echo '{"cniVersion":"0.4.0","supportedVersions":["0.3.0","0.3.1","0.4.0"]}' ;;
esac
PLUGIN
}

# containerd calls it for every pod; the package containernetworking-plugins would bring twenty others too.
loopback_plugin() {
    cat <<'PLUGIN'
#!/bin/sh
case $CNI_COMMAND in
    ADD)
        nsenter --net="$CNI_NETNS" ip link set lo up || exit 1
        printf '{"cniVersion":"0.4.0","interfaces":[{"name":"lo","sandbox":"%s"}],' "$CNI_NETNS"
        printf '"ips":[{"version":"4","address":"127.0.0.1/8","interface":0}],"dns":{}}\n' ;;
    VERSION) echo '{"cniVersion":"0.4.0","supportedVersions":["0.3.0","0.3.1","0.4.0"]}' ;;
esac
PLUGIN
}

# Only the API server's certificate opens kubelet's port: it can run anything as root. Evictions and image clean-up are
# off, because a developer's disk may be nearly full. Swap and cgroup v1 are as the machine has them.
kubelet_configuration() {
    cat <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
port: $KUBELET_PORT
healthzBindAddress: 127.0.0.1
healthzPort: $KUBELET_HEALTH_PORT
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}, x509: {clientCAFile: '$PKI/ca.crt'}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: 'unix://$SOCKET'
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
resolvConf: ""
podLogsDir: '$RUN/pod-logs'
volumePluginDir: '$RUN/kubelet/volume-plugins'
evictionHard: {memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%"}
imageGCHighThresholdPercent: 100
syncFrequency: 10s
fileCheckFrequency: 0s
httpCheckFrequency: 0s
registryPullQPS: 0
eventRecordQPS: 0
YAML
}

# --------------------------------------------------------------------------------------------------------- components

# A process that holds the mount namespace, so that a new containerd or kubelet finds the mounts of a killed one.
# slave: what the machine mounts later is seen in there, for hostPath volumes.
launch_mount_namespace() {
    ! runs mount-namespace || return 0
    # both must be in the same one
    stop_component kubelet
    stop_component containerd
    mkdir -p "${COVERED[@]}" "${COVERED[@]/#/$RUN/covered}"
    rm -f "$RUN/mount-namespace.ready"
    # shellcheck disable=SC2016 # expanded by the inner shell
    launch mount-namespace unshare --mount --propagation slave -- bash -c '
        set -eu
        for directory in "${@:2}"; do mount --bind "$1/covered$directory" "$directory"; done
        : >"$1/mount-namespace.ready"
        exec -a "mount-namespace $1/" sleep infinity' bash "$RUN" "${COVERED[@]}"
    await_ready mount-namespace 20 test -e "$RUN/mount-namespace.ready"
}

# set_command COMPONENT: its command line, in the array COMMAND. A component is a link to k8sbox that bears its name.
set_command() {
    COMMAND=("$RUN/bin/$1")
    [[ $1 == containerd ]] || ln -sfn "$K8SBOX" "$RUN/bin/$1"
    case $1 in
        containerd) COMMAND=(containerd --config "$CONTAINERD/config.toml") ;;
        etcd) COMMAND+=("$RUN/etcd.yaml") ;;
        kube-apiserver) add_api_server_options ;;
        kube-controller-manager) add_controller_manager_options ;;
        kube-scheduler) add_scheduler_options ;;
        kubelet) add_kubelet_options ;;
        *) die "no component $1; there are: ${COMPONENTS[*]}" ;;
    esac
    if [[ $1 == @(containerd|kubelet) ]]; then
        COMMAND=(nsenter --mount="/proc/$(pid_of mount-namespace)/ns/mnt" -- "${COMMAND[@]}")
    fi
}

# --endpoint-reconciler-type=none: nobody reaches the API server by a service.
add_api_server_options() {
    # shellcheck disable=SC2054 # the comma belongs to the option
    COMMAND+=(--bind-address=127.0.0.1 --secure-port="$API_PORT" --advertise-address="$NODE_ADDRESS"
        --endpoint-reconciler-type=none --service-cluster-ip-range=10.96.0.0/24
        --etcd-servers="https://127.0.0.1:$ETCD_PORT" --etcd-cafile="$PKI/ca.crt"
        --etcd-certfile="$PKI/tls.crt" --etcd-keyfile="$PKI/tls.key"
        --tls-cert-file="$PKI/tls.crt" --tls-private-key-file="$PKI/tls.key"
        --client-ca-file="$PKI/ca.crt" --token-auth-file="$PKI/tokens.csv" --authorization-mode=Node,RBAC
        --kubelet-client-certificate="$PKI/tls.crt" --kubelet-client-key="$PKI/tls.key"
        --kubelet-preferred-address-types=Hostname
        --service-account-issuer=https://kubernetes.default.svc --service-account-signing-key-file="$PKI/accounts.key"
        --service-account-key-file="$PKI/accounts.pub" --allow-privileged=true --profiling=false)
}

# --kube-api-qps: the default, 20 calls a second, would make tests with hundreds of Jobs wait for it.
add_controller_manager_options() {
    COMMAND+=(--bind-address=127.0.0.1 --secure-port="$CONTROLLER_MANAGER_PORT" --cert-dir="$RUN/controller-manager"
        --kubeconfig="$(kubeconfig_of system:kube-controller-manager)" --use-service-account-credentials
        --service-account-private-key-file="$PKI/accounts.key" --root-ca-file="$PKI/ca.crt"
        --cluster-signing-cert-file="$PKI/ca.crt" --cluster-signing-key-file="$PKI/ca.key"
        --flex-volume-plugin-dir="$RUN/kubelet/volume-plugins" --leader-elect=false --kube-api-qps=200 --kube-api-burst=400 --profiling=false)
}

add_scheduler_options() {
    COMMAND+=(--bind-address=127.0.0.1 --secure-port="$SCHEDULER_PORT" --cert-dir="$RUN/scheduler"
        --kubeconfig="$(kubeconfig_of system:kube-scheduler)" --leader-elect=false --profiling=false)
}

# localhost: the name by which the API server finds the kubelet, for logs.
add_kubelet_options() {
    COMMAND+=(--config="$RUN/kubelet.yaml" --kubeconfig="$(kubeconfig_of system:node:localhost)"
        --root-dir="$RUN/kubelet" --cert-dir="$RUN/kubelet/pki" --hostname-override=localhost --node-ip="$NODE_ADDRESS")
}

is_healthy() {
    case $1 in
        containerd) ctr -a "$SOCKET" version ;;
        etcd) port_is_taken "$ETCD_PORT" ;;
        kube-apiserver) kubectl get --raw /readyz ;;
        kube-controller-manager) port_is_taken "$CONTROLLER_MANAGER_PORT" ;;
        kube-scheduler) port_is_taken "$SCHEDULER_PORT" ;;
        kubelet) http_is_ok "$KUBELET_HEALTH_PORT" /healthz ;;
    esac >/dev/null 2>&1
}

http_is_ok() {
    (
        exec 3<>"/dev/tcp/127.0.0.1/$1"
        printf 'GET %s HTTP/1.0\r\n\r\n' "$2" >&3
        IFS= read -r -t 5 -u 3 line
        [[ $line == *' 200 '* ]]
    ) 2>/dev/null
}

launch_component() {
    runs "$1" || { set_command "$1" && launch "$1" "${COMMAND[@]}"; }
}

await_component() { await_ready "$1" 90 is_healthy "$1"; }

start_component() {
    launch_mount_namespace
    launch_component "$1"
    await_component "$1"
    # After an absence the node may be marked as lost: pods start only once that is over.
    if runs kube-apiserver && runs kubelet; then
        wait_for 90 "the node to be ready" node_is_ready
    fi
}

# Kills the component, as a crash would.
stop_component() { is_gone "$1" || kill_process "$1"; }

# ----------------------------------------------------------------------------------------------------------------- up

up_one_node() {
    require_short_path
    require_cluster_tools
    require_k8sbox
    forget_before_reboot
    if [[ ! -s $RUN/provider ]]; then
        require_free_ports PMAN_DEV_KUBERNETES_PORT $(seq "$PORT" "$KUBELET_HEALTH_PORT")
    fi
    mark_provider one-node
    make_keys
    write_cluster_kubeconfigs
    write_configuration
    prepare_machine
    start_components
    say "waiting for the node"
    wait_for 90 "the node to be ready" node_is_ready
}

# What a reboot leaves of containerd's and kubelet's state describes processes and mounts that are gone.
forget_before_reboot() {
    local boot
    boot=$(cat /proc/sys/kernel/random/boot_id)
    if [[ -s $RUN/boot && $(cat "$RUN/boot") != "$boot" ]]; then
        say "the machine was restarted since: starting afresh"
        down_one_node
        find "$RUN" -mindepth 1 -delete
    fi
    echo "$boot" >"$RUN/boot"
}

start_components() {
    local component
    launch_mount_namespace
    launch_component containerd
    launch_component etcd
    await_component etcd
    launch_component kube-apiserver
    await_component containerd
    import_images
    say "waiting for the API server"
    await_component kube-apiserver
    for component in kube-controller-manager kube-scheduler kubelet; do
        launch_component "$component"
    done
    for component in kube-controller-manager kube-scheduler kubelet; do
        await_component "$component"
    done
}

images_are_there() {
    local image imported
    imported=$(ctr -a "$SOCKET" -n k8s.io images ls -q)
    for image in "$PAUSE_IMAGE" "${TEST_IMAGES[@]}"; do
        grep -qxF "$image" <<<"$imported" || return 1
    done
}

# The image that holds a pod's namespaces open is the tests' one, asleep.
import_images() {
    ! images_are_there || return 0
    say "making and importing the images"
    make_test_root
    import_image "${TEST_IMAGES[@]}"
    import_image "$PAUSE_IMAGE" --command "sleep infinity"
    rm -r "$IMAGE_ROOT" "$IMAGE_ARCHIVE"
    echo "${TEST_IMAGES[0]}" >"$RUN/image"
}

import_image() {
    write_image_archive "$@"
    ctr -a "$SOCKET" -n k8s.io images import --snapshotter "$(snapshotter)" "$IMAGE_ARCHIVE" >/dev/null
}

# ------------------------------------------------------------------------------------------------------------ machine

cgroup_mounts() { awk '($3 == "cgroup" || $3 == "cgroup2") && $2 ~ "^/sys/fs/cgroup" { print $2 }' /proc/mounts | sort -u; }

prepare_machine() {
    record_machine
    if [[ -z $(ip -o address show dev lo to "$NODE_ADDRESS/32") ]]; then
        ip address add "$NODE_ADDRESS/32" dev lo
    fi
    make_cgroup
}

# It holds a lock of its own, because instances in other directories share these files.
record_machine() (
    LOCK_WAIT_SECONDS=60 lock_state "$MACHINE"
    [[ -e $MACHINE/sysctl.conf ]] || sysctl -e "${CHANGED_SYSCTLS[@]}" >"$MACHINE/sysctl.conf" 2>/dev/null
    if [[ ! -e $MACHINE/absent ]]; then
        absent_directories >"$MACHINE/absent"
    fi
    touch "$MACHINE/instance-$PORT"
)

absent_directories() {
    local directory
    for directory in "${COVERED[@]}"; do
        [[ -d $directory ]] || echo "$directory"
    done
}

restore_machine() (
    [[ -e $MACHINE/instance-$PORT ]] || exit 0
    LOCK_WAIT_SECONDS=60 lock_state "$MACHINE"
    rm "$MACHINE/instance-$PORT"
    if ! compgen -G "$MACHINE/instance-*" >/dev/null; then
        sysctl -q -e -p "$MACHINE/sysctl.conf"
        # a directory that something else uses is not empty
        xargs -r -d '\n' rmdir --ignore-fail-on-non-empty <"$MACHINE/absent"
        rm -r "$MACHINE"
    fi
)

# kubelet wants its cgroupRoot to be there, with every controller (https://kubernetes.io/docs/reference/config-api/
# kubelet-config.v1beta1/). cgroup v2 hands controllers down on request; v1's cpuset starts empty, which admits nothing.
make_cgroup() {
    local mount
    for mount in $(cgroup_mounts); do
        if [[ -e $mount/cgroup.controllers ]]; then
            [[ $mount == /sys/fs/cgroup ]] || continue
            hand_down_controllers "$mount"
        fi
        mkdir -p "$mount/$CGROUP"
        [[ ! -e $mount/cpuset.cpus || -e $mount/cgroup.controllers ]] || copy_cpuset "$mount" "$mount/$CGROUP"
    done
}

hand_down_controllers() {
    local controller controllers
    read -r -a controllers <"$1/cgroup.controllers"
    for controller in "${controllers[@]}"; do
        echo "+$controller" >"$1/cgroup.subtree_control" 2>/dev/null || say "cgroup v2 does not hand down $controller"
    done
}

copy_cpuset() {
    cat "$1/cpuset.cpus" >"$2/cpuset.cpus"
    cat "$1/cpuset.mems" >"$2/cpuset.mems"
}

# --------------------------------------------------------------------------------------------------------------- down

# Nothing here waits for a graceful end: all of it is thrown away. kubelet ends first, lest it start containers anew.
down_one_node() {
    local component
    for component in kubelet kube-scheduler kube-controller-manager kube-apiserver etcd; do
        stop_component "$component"
    done
    wait_for 30 "the pods' processes to end" remove_cgroup || die "processes are left in the cgroup $CGROUP"
    stop_component containerd
    stop_component mount-namespace
    wait_for 30 "the cluster's processes to end" kill_processes || die "processes of the cluster are left: $(our_processes)"
    remove_mounts
    ip address del "$NODE_ADDRESS/32" dev lo 2>/dev/null || true
    restore_machine
}

# Kills what is in the cgroup and removes it; succeeds once it is gone.
remove_cgroup() {
    local directory left=0 mount
    for mount in $(cgroup_mounts); do
        directory="$mount/$CGROUP"
        [[ -d $directory ]] || continue
        find "$directory" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -u | xargs -r kill -KILL 2>/dev/null || true
        find "$directory" -depth -type d -exec rmdir {} + 2>/dev/null || left=1
    done
    return "$left"
}

# Pids of containerd, its shims, k8sbox and the mount namespace's holder that were given a path below $RUN: also those
# whose pid file is lost.
our_processes() {
    local directory program
    for directory in /proc/[0-9]*; do
        program=$(readlink "$directory/exe") || continue
        [[ ${program##*/} == @(containerd|containerd-shim*|k8sbox-*|sleep) ]] || continue
        if grep -qaF -- "$RUN/" "$directory/cmdline"; then
            echo "${directory#/proc/}"
        fi
    done 2>/dev/null
}

# Kills these processes; succeeds once there are none.
kill_processes() {
    local processes
    processes=$(our_processes)
    [[ -n $processes ]] || return 0
    xargs -r kill -KILL <<<"$processes" 2>/dev/null
    return 1
}

# Prints the mounts that are left, the newest first. There should be none: they end with the last process of their
# namespace.
# Paths stand in /proc/mounts with octal escapes, which printf undoes.
our_mounts() {
    local line
    awk '{ print $2 }' /proc/mounts | tac | while read -r line; do
        printf -v line '%b' "$line"
        [[ $line != "$RUN"/* ]] || printf '%s\n' "$line"
    done
}

# A mount that stays is fatal: removing the state directory would reach through it into a pod's volumes.
remove_mounts() {
    local line
    while read -r line; do
        umount "$line" 2>/dev/null || umount --lazy "$line"
    done < <(our_mounts)
    [[ -z $(our_mounts) ]] || die "cannot unmount $(our_mounts)"
}
