# Sourced from the repository's root: source scripts/env.sh REQUIREMENTS_FILE
#
# Makes the virtual environment .venv if there is none (VENV=PATH names another), installs the requirements
# file into it unless that was done before with the same text, and activates it.

VENV=${VENV:-.venv}

find_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python 3.11 or newer found (tried python3.13, python3.12, python3.11, python3)" >&2
    return 1
}

make_venv() {
    "$VENV/bin/python" -c "import pip" 2>/dev/null && return
    local python
    python=$(find_python) || return
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "error: $python has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2
        return 1
    fi
    echo "making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV"
}

# The stamp is written only after pip succeeded, so that an interrupted installation is taken up again.
install_requirements() {
    local stamp="$VENV/.installed-$1" sum
    sum=$(cat "$1" requirements.txt | cksum)  # -r requirements.txt stands in the others
    [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ] && return
    echo "installing $1 into $VENV (the first time this takes some minutes)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$1"
    echo "$sum" >"$stamp"
}

make_venv
install_requirements "$1"
source "$VENV/bin/activate"
