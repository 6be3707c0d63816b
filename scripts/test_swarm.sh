#!/usr/bin/env bash
# Smoke test straight to a real Swarm: brings one up (scripts/dev-swarm), runs pman beside it, submits, polls, fetches
# logs, deletes, and cleans up what it started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
make_venv test

was_up=yes
scripts/dev-swarm status >/dev/null 2>&1 || was_up=
scripts/dev-swarm up
eval "$(scripts/dev-swarm env)"
directory=$(mktemp -d)
pman=
clean_up() {
    if [[ -n $pman ]]; then
        kill "$pman" 2>/dev/null || true
        wait "$pman" || true
    fi
    rm -rf "$directory"
    [[ -n $was_up ]] || scripts/dev-swarm down
}
trap clean_up EXIT

mkdir "$directory/store"
CONTAINER_ENV=swarm STOREBASE="$directory/store" SECRET_KEY="only for this smoke test" PORT=0 \
    .venv/bin/python -m pman serve 2>"$directory/log" &
pman=$!
until url=$(grep -o 'http://[0-9.:]*' "$directory/log"); do
    kill -0 "$pman" 2>/dev/null || { cat "$directory/log" >&2; exit 1; }
    sleep 0.1
done
scripts/smoke "${url%%$'\n'*}" "$PMAN_TEST_IMAGE"
