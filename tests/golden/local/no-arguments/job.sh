#!/bin/bash
set -u
workers=1
time_limit_s=0
incoming=/data/store/key-chris-jid-7/incoming
outgoing=/data/store/key-chris-jid-7/outgoing
image=docker.io/fnndsc/pl-simpledsapp:2.1.0
limit_is_near=
interruptions=0 # signals that ended a wait(1) before its time
trap 'limit_is_near=yes interruptions=$((interruptions + 1))' USR2 # a scheduler's warning, which may come at once
# First stage: leave the starter, so that the job outlives it and is nobody's zombie.
if [ -z "${1-}" ]; then
  bash "$0" claim "$$" </dev/null >supervisor.log 2>&1 &
  exit 0
fi
# Second stage: link(2) is atomic, so of all processes that start this job exactly one goes on.
# (A third, `clean_up`, is for pman: what is left in a container's engine where the second one was killed.)
# The working directory is the job's state directory, held by inode. Once DELETE has moved it away, nothing starts: it
# leaves a claim of its own there, and when that is being removed with all the rest, the directory has another name.
if [ "$1" = claim ]; then
  read -r boot </proc/sys/kernel/random/boot_id
  stat=$(</proc/$$/stat)
  read -ra stat <<<"${stat##*) }" # from the third field on: proc_pid_stat(5)
  echo "$2 $$ ${stat[19]} $boot $(uname -n)" >".claim.$$" || exit 1
  ln ".claim.$$" claim 2>/dev/null || { rm -f ".claim.$$"; exit 0; }
  rm -f ".claim.$$"
  # bash takes $PWD when it starts, and never looks again
  [[ . -ef $PWD && ${PWD##*/} != .trash-* ]] || exit 0
fi
set -m # every worker is a process group of its own
workers_started=()
tenths_from_term_to_kill=100 # of a second
# What a container runtime or a scheduler puts its own in place of:
prepare() { :; }             # before the workers start
run_command() { exec "$@"; } # of a worker
explain() { # EXIT_CODE: pman's word for the reason of it, and the reason
  local said
  [ "$1" = 126 ] || return
  said=$(sed -n 's/^pman: //p' stderr.* 2>/dev/null | tail -n 1)
  case "$said" in "") ;; "a path "*) echo "refused $said" ;; *) echo "node $said" ;; esac
}
clean_up() { :; }            # after the workers have ended
shorten_wait() { :; }        # sets tenths_from_term_to_kill, if the scheduler kills this script earlier
epilogue() { :; }            # the site's, after that, in a process of its own; its exit code counts

cannot_run() { # SENTENCE: ends a worker that cannot have its container
  echo "pman: $1" >&2
  exit 126
}

start_epilogue() { # EXIT_CODE of the command
  set -m
  (set -e; epilogue "$1") </dev/null &
  set +m
  workers_started=("$!")
}

finish() { # EXIT_CODE REASON [WORD]: the result, written whole and last; WORD is one of pman's for the reason
  trap '' TERM INT HUP USR1 USR2
  echo "${3-}" >why
  printf '%s %s\n' "$1" "$2" >rc.new && mv rc.new rc
  exit "$1"
}

signal_workers() { # SIGNAL: true while any process of any worker is left
  local group left=1
  for group in "${workers_started[@]}"; do kill "-$1" -- "-$group" 2>/dev/null && left=0; done
  return "$left"
}

await_workers() { # and kill what is left after tenths_from_term_to_kill
  local left
  for ((left = tenths_from_term_to_kill; left > 0; left--)); do signal_workers 0 || break; sleep 0.1; done
  signal_workers KILL
}

stop() { # EXIT_CODE REASON WORD: TERM, later KILL
  trap '' TERM INT HUP USR1 USR2
  [ ! -e rc ] || exit "$1"
  [ ! -e pulling ] || set -- "$1" "$2 while its image was being pulled" "${3-}"
  echo "${3-}" >why
  printf '%s %s\n' "$1" "$2" >ending # in case that this script is killed before it is done
  mapfile -t workers_started < <(jobs -pr) # the number of one that has ended may be somebody else's by now
  signal_workers TERM
  shorten_wait
  await_workers
  clean_up
  start_epilogue "$1"
  await_workers
  finish "$1" "$2" "${3-}"
}

stop_by_signal() {
  [ -z "$limit_is_near" ] || stop 124 "ended by its time limit" time_limit
  stop 143 "ended by a signal" signal
}

start_workers() {
  local index
  for ((index = 0; index < workers; index++)); do
    (run_worker "$index") </dev/null >"stdout.$index" 2>"stderr.$index" &
    workers_started+=("$!")
  done
}

reap() { # PROCESS: its exit status, also when a trapped signal ends wait(1) early
  local seen code
  while seen=$interruptions; wait "$1" 2>/dev/null; code=$?; [ "$seen" != "$interruptions" ]; do :; done
  return "$code"
}

watch() { # ends the job after its time limit, in which it was not suspended; ends with this script, which holds the pipe
  local left=$time_limit_s
  while [ "$left" -gt 0 ]; do
    read -r -t 5
    [ "$?" -gt 128 ] || return # the end of the pipe, not of the 5 s
    left=$((left - 5))
  done
  kill -USR1 "$$"
}

supervise() {
  local group code worst=0 directory running said
  for directory in "$incoming" "$outgoing"; do
    [ -d "$directory" ] || finish 126 "no such directory on $(uname -n): $directory" refused
  done
  trap stop_by_signal TERM INT HUP
  trap 'stop 124 "ended by its time limit of $((time_limit_s / 60)) min" time_limit' USR1
  prepare
  true >exit_codes
  start_workers
  set +m # or else wait(1) would also end when a worker is suspended
  [ "$time_limit_s" -eq 0 ] || exec {alive}> >(watch) # after the workers: none of them holds the pipe
  for group in "${workers_started[@]}"; do
    running=$'\n'$(jobs -pr)$'\n'
    reap "$group"
    code=$?
    if [[ $running == *$'\n'"$group"$'\n'* ]]; then # else its number may be somebody else's by now
      kill -KILL -- "-$group" 2>/dev/null # what the command left behind, as the end of a container would
    fi
    [ "$code" -le "$worst" ] || worst=$code
    echo "$code" >>exit_codes # in the workers' order
  done
  # SLURM ends a job by TERM to all its processes: the command may have ended with 0 before this script hears of it.
  if [ -n "$limit_is_near" ]; then sleep 2; elif [ -n "${SLURM_JOB_ID-}" ]; then sleep 0.5; fi
  clean_up
  start_epilogue "$worst"
  reap "${workers_started[0]}" || { code=$?; [ "$worst" -ne 0 ] || finish "$code" "the site's epilogue failed with exit code $code"; }
  said=$(explain "$worst")
  finish "$worst" "${said#* }" "${said%% *}"
}


run_worker() {
  mkdir -p "work.$1" && cd "work.$1" || exit 126 # what the command writes where it is does not meet the files below
  export PMAN_WORKER_INDEX="$1" PMAN_WORKER_COUNT="$workers" PMAN_INCOMING="$incoming" PMAN_OUTGOING="$outgoing"
  set --
  set -- "$@" simpledsapp /data/store/key-chris-jid-7/outgoing
  run_command "$@"
}

[ "$1" = claim ] || { clean_up; exit 0; }
supervise
