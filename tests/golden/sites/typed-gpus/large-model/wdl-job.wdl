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
set -- 'fshack' '/share/incoming' '/share/outgoing'
exec "$@"
  >>>

  runtime {
    docker: "docker.io/fnndsc/pl-fshack:1.3"
    image: "docker.io/fnndsc/pl-fshack:1.3"
    cpu: 4
    memory: "16000 MiB"
    gpu_limit: 8
    number_of_workers: 1
    slurm_partition: "gpu"
    slurm_constraint: "nvlink"
    gpu_type: "a100"
    incoming: "/data/store/key-chris-jid-82/incoming"
    outgoing: "/data/store/key-chris-jid-82/outgoing"
    sharedir: "/data/store/key-chris-jid-82"
    jid: "chris-jid-82"
    maxRetries: 0
  }
}
