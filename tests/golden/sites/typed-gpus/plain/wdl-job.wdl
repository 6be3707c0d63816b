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
set -- 'simpledsapp' '--threshold' '0.5' '/share/incoming' '/share/outgoing'
set -- env 'GREETING=hello' "$@"
exec "$@"
  >>>

  runtime {
    docker: "docker.io/fnndsc/pl-simpledsapp:2.1.0"
    image: "docker.io/fnndsc/pl-simpledsapp:2.1.0"
    cpu: 2
    memory: "512 MiB"
    gpu_limit: 0
    number_of_workers: 1
    incoming: "/data/store/key-chris-jid-1/incoming"
    outgoing: "/data/store/key-chris-jid-1/outgoing"
    sharedir: "/data/store/key-chris-jid-1"
    jid: "chris-jid-1"
    maxRetries: 0
  }
}
