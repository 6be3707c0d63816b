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
set -- 'sh' '-c' "$(printf 'for out; do :; done\012printf \047\074\045s\076\134n\047 "\044@" | tee "\044out/arguments.txt"')" 'hostile-arguments' "$(printf 'it\047s')" 'a "quote"' "$(printf '\044(touch /tmp/never)')" "$(printf '\176{wdl} \076\076\076 \044{x}')" '{{.Node.ID}}' "$(printf '\044(KUBERNETES)')" "$(printf 'back\134slash')" '' "$(printf 'two\012lines')" "$(printf 'na\303\257ve \360\237\247\240')" "$(printf 'SCRIPT\137EPILOGUE')" '/share/outgoing'
exec "$@"
  >>>

  runtime {
    docker: "docker.io/fnndsc/pl-simplefsapp:2.1.0"
    image: "docker.io/fnndsc/pl-simplefsapp:2.1.0"
    cpu: 1
    memory: "200 MiB"
    gpu_limit: 0
    number_of_workers: 1
    incoming: "/data/store/key-chris-jid-2/incoming"
    outgoing: "/data/store/key-chris-jid-2/outgoing"
    sharedir: "/data/store/key-chris-jid-2"
    jid: "chris-jid-2"
    maxRetries: 0
  }
}
