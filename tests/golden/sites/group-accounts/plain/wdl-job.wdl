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
limit_seconds=7200
detach=
group=
if command -v setsid > /dev/null 2>&1; then
detach=setsid
group=-
fi
$detach "$@" &
pid=$!
(
trap 'kill -KILL "$!"; exit 0' TERM
sleep "$limit_seconds" &
wait "$!" || exit 0
trap 'kill -KILL "$!"; exit 124' TERM
kill -TERM "$group$pid"
sleep 10 &
wait "$!"
kill -KILL "$group$pid"
exit 124
) > /dev/null 2>&1 &
watch=$!
wait "$pid" 2> /dev/null
code=$?
[ -z "$group" ] || kill -KILL "-$pid" 2> /dev/null
kill -TERM "$watch" 2> /dev/null
wait "$watch" 2> /dev/null
if [ "$?" = 124 ]; then
echo 'pman: ended by the time limit of 120 min' 1>&2
code=124
fi
exec > /dev/null 2>&1
for try in 1 2 3 4 5 6 7 8 9 10; do
siblings=0
for stat in /proc/[0-9]*/stat; do
read -r pid name state parent rest < "$stat"
[ "$parent" != "$$" ] || [ "$state" = Z ] || siblings=$((siblings + 1))
done
[ "$siblings" -gt 1 ] || break
sleep 0.1 || sleep 1
done
exit "$code"
exec "$@"
  >>>

  runtime {
    docker: "docker.io/fnndsc/pl-simpledsapp:2.1.0"
    image: "docker.io/fnndsc/pl-simpledsapp:2.1.0"
    cpu: 2
    memory: "512 MiB"
    gpu_limit: 0
    number_of_workers: 1
    timelimit: 120
    slurm_account: "guests"
    slurm_qos: "low"
    incoming: "/data/store/key-chris-jid-1/incoming"
    outgoing: "/data/store/key-chris-jid-1/outgoing"
    sharedir: "/data/store/key-chris-jid-1"
    jid: "chris-jid-1"
    maxRetries: 0
  }
}
