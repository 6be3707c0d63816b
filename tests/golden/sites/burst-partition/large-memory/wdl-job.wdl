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
set -- 'dircopy' '/share/incoming' '/share/outgoing'
exec "$@"
  >>>

  runtime {
    docker: "docker.io/fnndsc/pl-dircopy:2.1"
    image: "docker.io/fnndsc/pl-dircopy:2.1"
    cpu: 1
    memory: "200000 MiB"
    gpu_limit: 0
    number_of_workers: 1
    slurm_partition: "highmem"
    incoming: "/data/store/key-chris-jid-84/incoming"
    outgoing: "/data/store/key-chris-jid-84/outgoing"
    sharedir: "/data/store/key-chris-jid-84"
    jid: "chris-jid-84"
    maxRetries: 0
  }
}
