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
export PMAN_WORKER_INDEX PMAN_WORKER_COUNT=4
set -- 'dircopy' '/share/incoming' '/share/outgoing'
exec "$@"
  >>>

  runtime {
    docker: "docker.io/fnndsc/pl-dircopy:2.1"
    image: "docker.io/fnndsc/pl-dircopy:2.1"
    cpu: 4
    memory: "16000 MiB"
    gpu_limit: 2
    number_of_workers: 4
    slurm_partition: "gpu"
    gpu_type: "a100"
    incoming: "/data/store/key-chris-jid-81/incoming"
    outgoing: "/data/store/key-chris-jid-81/outgoing"
    sharedir: "/data/store/key-chris-jid-81"
    jid: "chris-jid-81"
    maxRetries: 0
  }
}
