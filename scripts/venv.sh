# shellcheck shell=bash
# To be sourced. make_venv EXTRA installs pman, editable and with pinned dependencies, into .venv or into the directory
# that VENV names. It is quick when nothing has changed.

make_venv() {
    local extra=$1 python=${PYTHON:-python3} venv=${VENV:-.venv} stamp want
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "pman needs Python 3.11 or later; $("$python" --version) is here. Set PYTHON to another one." >&2
        return 1
    }
    stamp="$venv/pman-$extra"
    want=$(cat pyproject.toml constraints.txt | cksum)
    [[ $(cat "$stamp" 2>/dev/null) != "$want" ]] || return 0
    echo "installing into $venv ..." >&2
    # An environment that works keeps its Python, also if PATH has another one now, or the two would be mixed.
    "$venv/bin/python" -c 'import pip' 2>/dev/null || "$python" -m venv "$venv" || {
        echo "python3 -m venv failed; on Debian: apt-get install python3-venv" >&2
        return 1
    }
    "$venv/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".${extra:+[$extra]}"
    echo "$want" >"$stamp"
}
