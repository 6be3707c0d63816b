#!/usr/bin/env bash
# Smoke test on a real Swarm: brings one up, runs pman on it, submits, polls, fetches logs, deletes, and cleans up.
#
#   scripts/test_swarm.sh                 # the Swarm of scripts/engines/swarm, which reaches nothing outside
#   scripts/test_swarm.sh --existing      # the engine that DOCKER_HOST names (else the default socket)
#
# --existing is for an engine of this machine that is the only node of its Swarm, since no other node has the image and
# the store. pman runs as a stack (deploy/compose.yml). Its image is PMAN_IMAGE, or else one that is built here if the
# engine can get the base image of deploy/Dockerfile. If it cannot, pman runs beside the Swarm, from this source.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
case "$#:${1-}" in
    0: | 1:--existing) ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
make_venv test

directory=$(mktemp -d)
stack=pman-smoke-$$
beside='' deployed='' was_up=yes
scripts/engines/swarm status >/dev/null 2>&1 || was_up=

running() { docker ps --quiet --filter "label=com.docker.stack.namespace=$stack" "$@"; }

clean_up() {
    if [[ -n $beside ]]; then
        kill "$beside" 2>/dev/null || true
        wait "$beside" || true
    fi
    if [[ -n $deployed ]]; then
        docker stack rm "$stack"
        while [[ -n $(running) ]]; do sleep 0.2; done
    fi
    rm -rf "$directory"
    [[ -n $was_up ]] || scripts/engines/swarm down
}

has() { docker image inspect "$1" >/dev/null 2>&1 || docker pull --quiet "$1" >/dev/null; }

# Sets PMAN_IMAGE. Only a missing base image is a reason to do without; a build that fails is an error.
find_image() {
    if [[ -n ${PMAN_IMAGE-} ]]; then
        has "$PMAN_IMAGE" || exit 1
    else
        has "$(sed -n 's/^ARG BASE=//p' deploy/Dockerfile)" || return
        export PMAN_IMAGE=localhost/pman:7
        docker build --quiet --file deploy/Dockerfile --tag "$PMAN_IMAGE" . || exit 1
    fi
}

# The smoke test runs inside, since a port of the Swarm may not be reachable from here.
smoke_a_stack() {
    local container='' started=$SECONDS
    echo "test_swarm.sh: pman runs as a stack of $PMAN_IMAGE"
    [[ $DOCKER_HOST != unix://* ]] || export DOCKER_SOCKET=${DOCKER_HOST#unix://}
    deployed=yes
    PMAN_PORT=0 PMAN_TEMPLATES=$PWD/deploy/templates docker stack deploy --compose-file deploy/compose.yml "$stack"
    until container=$(running --filter health=healthy) && [[ -n $container ]]; do
        if ((SECONDS - started > 120)); then
            docker stack ps --no-trunc "$stack" >&2
            exit 1
        fi
        sleep 0.2
    done
    docker exec --interactive "$container" python3 - http://127.0.0.1:5010 "$PMAN_TEST_IMAGE" <scripts/smoke
}

smoke_beside() {
    local url
    echo "test_swarm.sh: pman runs beside the Swarm, since no image of it can be had"
    CONTAINER_ENV=swarm PORT=0 .venv/bin/python -m pman serve 2>"$directory/log" &
    beside=$!
    until url=$(grep -o 'http://[0-9.:]*' "$directory/log"); do
        kill -0 "$beside" 2>/dev/null || { cat "$directory/log" >&2; exit 1; }
        sleep 0.1
    done
    scripts/smoke "${url%%$'\n'*}" "$PMAN_TEST_IMAGE"
}

trap clean_up EXIT
scripts/engines/swarm up "$@"
eval "$(scripts/engines/swarm env)"
mkdir "$directory/store"
export STOREBASE="$directory/store" SECRET_KEY="only for this smoke test"
if find_image; then smoke_a_stack; else smoke_beside; fi
