#!/bin/bash
#SBATCH --job-name=chris-jid-89
#SBATCH --comment=org.chrisproject.pman.name=chris-jid-89
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --propagate=NONE
#SBATCH --signal=B:USR2@30
#SBATCH --ntasks=1
#SBATCH --nodes=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=500M
#SBATCH --time=60
#SBATCH --partition=normal
set -u
workers=1
time_limit_s=3600
incoming=/data/store/key-chris-jid-89/incoming
outgoing=/data/store/key-chris-jid-89/outgoing
image=docker.io/fnndsc/pl-dircopy:2.1
limit_is_near=
interruptions=0 # signals that ended a wait(1) before its time
trap 'limit_is_near=yes interruptions=$((interruptions + 1))' USR2 # a scheduler's warning, which may come at once
if [ "${1-}" != worker ]; then
  # The environment is the node's. Of the one of sbatch, SLURM's variables are left and where SLURM's commands are.
  unset SLURM_JWT SLURM_CONF_SERVER SLURM_SACK_SOCKET SSH_AUTH_SOCK SLURM_TIME_FORMAT LC_ALL LD_LIBRARY_PATH
  commands=$(type -P srun)
  export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin${commands:+:${commands%/*}} LANG=C.UTF-8
  IFS=: read -r USER _ _ _ _ HOME _ < <(getent passwd "$UID")
  export HOME="${HOME:-/}" USER LOGNAME="$USER"
  umask 022

  # rename(2) is atomic, so of all SLURM jobs that carry this script exactly one goes on, and none of a former attempt.
  # NFS may say that it failed when it has just been done. SLURM may begin a job anew, also before this script ever ran.
  # 75: another one runs the job, it ran already, it was deleted, or this node does not see the state directory.
  if [[ $SLURM_JOB_NAME =~ ^.*\.([0-9a-f]{16})([^0-9a-f]|$) ]]; then
    attempt=attempt.${BASH_REMATCH[1]}
  else # a plug-in of the site took the token out of the name; but pman writes down the number that sbatch told it
    for _ in {1..300}; do [ "$(cat slurm_id 2>/dev/null)" != "$SLURM_JOB_ID" ] || break; sleep 0.2; done
    [ "$(cat slurm_id 2>/dev/null)" = "$SLURM_JOB_ID" ] || exit 75
    attempt=$(echo attempt.*)
  fi
  mv -T "$attempt" "claim.$SLURM_JOB_ID" ||
    { [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] && [ -e "claim.$SLURM_JOB_ID" ]; } || exit 75
else
  # What Environment Modules and Lmod have loaded is lost from PATH when the prologue reads /etc/profile, so that each
  # worker must load it anew. Without this they take it for loaded.
  unset -v LOADEDMODULES _LMFILES_ "${!__MODULES_@}" "${!__LMOD_@}" "${!_ModuleTable@}"
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

# IMAGE: its name without docker.io/ and library/, with a tag or a digest. Apptainer refuses both at once.
short_name() (
  case "$1" in
    /*|*://*) echo "$1" ;;
    *) echo "$1" | sed -E -e 's#^(index[.])?docker[.]io/##' -e 's#^library/##' -e 's#:[^/@]*@#@#' -e '/[:@][^/]*$/!s#$#:latest#' ;;
  esac
)
# NAME DIRECTORY: the file of an image in an image directory
file_name() ( echo "$2/$(echo "$1" | tr '/:' '%+').sif" )
# IMAGE DIRECTORY...: prints the file that holds the image, under any of its names; fails where there is none
find_image() (
  given=$1 name=$(short_name "$1")
  case "$given" in /*) echo "$given"; exit 0 ;; esac
  shift
  for directory in "$@"; do
    for alias in "$name" "docker.io/$name" "docker.io/library/$name" "$given"; do
      file=$(file_name "$alias" "$directory")
      if [ -s "$file" ]; then echo "$file"; exit 0; fi
    done
  done
  exit 1
)
# PROGRAM SECONDS IMAGE DIRECTORY...: pulls the image into the first directory that can be written, and prints the file.
# One process at a time does this in a directory, of those on all nodes: simultaneous pulls spoil each other's cache,
# also those of images that share a layer. Whoever waited finds the file. Exit code 124: it took longer than the seconds.
pull_image() (
  program=$1 seconds=$2 image=$3 file=
  shift 3
  for directory in "$@"; do
    mkdir -p "$directory" 2>/dev/null
    file=$(file_name "$(short_name "$image")" "$directory")
    if : 2>/dev/null 9>>"$directory/.lock"; then break; fi
    file=
  done
  if [ -z "$file" ]; then echo "pman: no image directory can be written: $*" >&2; exit 1; fi
  exec 9>>"$directory/.lock"
  flock -w "$seconds" 9 || exit 124
  if find_image "$image" "$@"; then exit 0; fi
  rm -f "$file".part.*
  case "$image" in *://*) source=$image ;; *) source=docker://$(short_name "$image") ;; esac
  timeout -k 10 "$seconds" "$program" --quiet pull "$file.part.$$" "$source" >&2
  code=$?
  if [ "$code" = 0 ]; then mv "$file.part.$$" "$file" && echo "$file"; exit; fi
  rm -f "$file.part.$$"
  exit "$code"
)
# FILE...: what the runtime complained of last
last_words() ( cat "$@" 2>/dev/null | sed -n -E 's/^(FATAL:|pman:) +//p' | tail -n 1 | cut -c 1-1000 )
# TEXT: as a field of CSV
csv_field() (
  case "$1" in
    *'"'*) echo "$1" | sed -e 's/"/""/g' -e '1s/^/"/' -e '$s/$/"/' ;;
    *) echo '"'"$1"'"' ;;
  esac
)
# SOURCE TARGET [ro]: the value of --mount, in which a path may hold commas and colons
mount_words() (
  mode=
  [ "$#" = 2 ] || mode=,$3
  echo "type=bind,$(csv_field "src=$1"),$(csv_field "dst=$2")$mode"
)
# PROGRAM ARGUMENTS WORD...: runs `PROGRAM exec ARGUMENTS ... WORD...` with a directory of the node's that holds /tmp and
# HOME of this worker alone, and goes when the container has ended. ARGUMENTS are split at blanks.
run_container() (
  program=$1 arguments=$2
  shift 2
  place=$(printenv TMPDIR || echo /tmp)
  if ! new=$(mktemp -d "$place/pman-new-$UID.XXXXXX"); then
    echo "pman: no directory can be made in $place on $(uname -n)" >&7
    exit 126
  fi
  work=$place/pman-$UID.$(basename "$new" | sed 's/.*[.]//')
  # locked for as long as a process of the worker lives: what a killed job leaves is nobody's
  exec 8<"$new" && flock -n 8
  mv -T "$new" "$work" || exit 126
  trap : TERM INT HUP USR1 USR2
  "$program" --quiet exec $arguments --containall --workdir "$work" --writable-tmpfs "$@" 2>&7 7>&-
  code=$?
  chmod -R u+rwX "$work"
  rm -rf "$work"
  exit "$code"
) 7>&2 2>/dev/null # where bash would say by which signal the container ended
# the directories of this user's workers on this node that have ended
remove_scratch() (
  for directory in "$(printenv TMPDIR || echo /tmp)/pman-$UID".*; do
    if [ -O "$directory" ] && [ ! -L "$directory" ]; then
      flock -n "$directory" sh -c 'chmod -R u+rwX "$0"; rm -rf "$0"' "$directory" 2>/dev/null
    fi
  done
)

# The image is pulled before the workers start and before the time limit begins. Where SLURM_IMAGE_DIR cannot be written,
# it goes into the directory .images beside the directories of the jobs.
prepare() {
  local code said seconds=1800 directories=("${PWD%/*}/.images")
  command -v apptainer >/dev/null || finish 126 "no container runtime (apptainer) in the PATH of jobs on $(uname -n)" node
  if ! PMAN_IMAGE_FILE=$(find_image "$image" "${directories[@]}"); then
    echo "$image" >pulling
    pull_image apptainer "$seconds" "$image" "${directories[@]}" </dev/null >pulled 2>stderr.0 &
    reap "$!"
    code=$?
    PMAN_IMAGE_FILE=$(<pulled)
    rm -f pulling pulled
    case "$code" in
      0) ;;
      124 | 137) finish 126 "the image $image could not be pulled within $((seconds / 60)) min and the memory of the job; \`pman images pull\` pulls it beforehand" image ;;
      *) said=$(last_words stderr.0); finish 126 "the image $image could not be pulled: ${said:-exit code $code}" image ;;
    esac
  fi
  export PMAN_IMAGE_FILE
  remove_scratch
}

# No exec: this shell removes the worker's directories afterwards. It outlives TERM, because SLURM may find processes only
# below a living parent.
run_command() { trap : TERM INT HUP USR1 USR2; "$@"; exit; }

explain() { # EXIT_CODE: 126 and 255 may be the runtime's own, which then says why
  local said
  case "$1" in 126 | 255) said=$(last_words stderr.*) ;; esac
  [ -z "${said-}" ] || echo "unknown the container could not be run: $said"
}

clean_up() { remove_scratch; }
# SLURM kills this script KillWait after TERM, and not the containers of Podman: their end must come before.
shorten_wait() {
  local seconds
  seconds=$(timeout 2 scontrol show config 2>/dev/null | sed -n 's/^KillWait *= \([0-9]*\).*/\1/p')
  [ "${seconds:-30}" -ge 13 ] || tenths_from_term_to_kill=$(((seconds - 3) * 10))
}


run_worker() {
  mkdir -p "work.$1" && cd "work.$1" || exit 126 # what the command writes where it is does not meet the files below
  export PMAN_WORKER_INDEX="$1" PMAN_WORKER_COUNT="$workers" PMAN_INCOMING="$incoming" PMAN_OUTGOING="$outgoing"
  local name handed=()
  local -A known=()
  while read -r name; do known[$name]=${!name}; done < <(compgen -e)
  while read -r name; do # what the block above exported, and what site.container.pass_environment names
    case "$name" in _ | PWD | OLDPWD | PATH | LD_LIBRARY_PATH | APPTAINER* | SINGULARITY*) continue ;; esac
    if [ "${known[$name]-not ${!name}}" != "${!name}" ]; then handed+=("$name"); continue; fi
  done < <(compgen -e)
  set --
  command -v apptainer >/dev/null || cannot_run "no container runtime ("apptainer") in the PATH of jobs on $(uname -n)"
  set -- run_container apptainer "" --mount "$(mount_words "$PWD" "$PWD")" --cwd "$PWD" \
    --mount "$(mount_words "$incoming" /share/incoming ro)" --mount "$(mount_words "$outgoing" /share/outgoing)"
  set -- "$@" "${PMAN_IMAGE_FILE-}" env PMAN_WORKER_INDEX="$PMAN_WORKER_INDEX" PMAN_WORKER_COUNT="$PMAN_WORKER_COUNT"
  for name in CUDA_VISIBLE_DEVICES SLURM_JOB_ID; do [ -z "${!name-}" ] || set -- "$@" "$name=${!name}"; done
  for name in "${handed[@]}"; do set -- "$@" "$name=${!name}"; done
  set -- "$@" dircopy /share/incoming /share/outgoing
  run_command "$@"
}

if [ "${1-}" = worker ]; then
  run_worker "$SLURM_PROCID"
fi
supervise
