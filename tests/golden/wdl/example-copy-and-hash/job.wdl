version 1.0
workflow ChRISJob {
  call plugin_instance
}

task plugin_instance {
  command <<<
nl='
'
case "${PWD##*/}" in
worker-[0-9]*) PMAN_WORKER_INDEX=${PWD##*/worker-} ;;
*) PMAN_WORKER_INDEX=${SLURM_PROCID:-0} ;;
esac
export PMAN_WORKER_INDEX PMAN_WORKER_COUNT=1
set -- 'sh' '-c' "$(printf 'set -e\012echo "\044GREETING: copying from \0441 to \0442"\012cp -R "\0441"/. "\0442"/\012cd "\0442"\012for f in *; do sha256sum "\044f"; done | tee SHA256SUMS')" 'copy-and-hash' '/share/incoming' '/share/outgoing'
set -- env "$(printf 'GREETING=It\047s "pman" & \044HOME \176{here}')" "$@"
exec "$@"
  >>>

  runtime {
    docker: "docker.io/fnndsc/pl-simpledsapp:2.1.0"
    image: "docker.io/fnndsc/pl-simpledsapp:2.1.0"
    cpu: 1
    memory: "200 MiB"
    gpu_limit: 0
    number_of_workers: 1
    incoming: "/data/store/key-chris-jid-1/incoming"
    outgoing: "/data/store/key-chris-jid-1/outgoing"
    sharedir: "/data/store/key-chris-jid-1"
    jid: "chris-jid-1"
    maxRetries: 0
  }
}
