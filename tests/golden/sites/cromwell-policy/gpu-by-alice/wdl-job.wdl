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
set -- 'fshack' '--exec' 'recon-all' '/share/incoming' '/share/outgoing'
limit_seconds=
if timeout -k 10 9 true > /dev/null 2>&1; then
limit_seconds=86400
set -- "$(command -v timeout)" -k 10 "$limit_seconds" "$@"
fi
if [ -n "$limit_seconds" ]; then
began=$(date +%s)
if command -v setsid > /dev/null; then
setsid "$@" &
pid=$!
wait "$pid"
code=$?
kill -KILL "-$pid" 2> /dev/null
else
"$@"
code=$?
fi
if [ "$code" -gt 123 ] && [ "$(expr "$(date +%s)" - "$began")" -ge "$limit_seconds" ]; then
echo 'pman: ended by the time limit of 1440 min' 1>&2
code=124
fi
exit "$code"
fi
exec "$@"
  >>>

  runtime {
    docker: "docker.io/fnndsc/pl-fshack:1.3"
    image: "docker.io/fnndsc/pl-fshack:1.3"
    cpu: 4
    memory: "16000 MiB"
    gpu_limit: 1
    number_of_workers: 1
    timelimit: 1440
    slurm_partition: "gpu"
    incoming: "/data/store/key-chris-jid-21/incoming"
    outgoing: "/data/store/key-chris-jid-21/outgoing"
    sharedir: "/data/store/key-chris-jid-21"
    jid: "chris-jid-21"
    maxRetries: 0
    slurm_account: "neuro"
  }
}
