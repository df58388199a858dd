#!/bin/sh
# Print a Python that can carry Charonia's environment: 3.11 or 3.12, with venv and ensurepip.
# Candidates are run, not believed: version managers leave commands on PATH that only print an error.
#
#   find_python.sh [PYTHON]    PYTHON, if given and not empty, is the only candidate.
set -u

# Exit status of a candidate: 0 fits, 3 another version, 4 no ensurepip, anything else does not run.
probe='
import sys
if not (3, 11) <= sys.version_info[:2] < (3, 13):
    sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(4)
'

fail() {
    printf 'error: %s\n  mend: %s\n' "$1" "$2" >&2
    exit 1
}

without_ensurepip=
try() {
    "$1" -I -c "$probe" >/dev/null 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        printf '%s\n' "$1"
        exit 0
    fi
    if [ $status -eq 4 ] && [ -z "$without_ensurepip" ]; then without_ensurepip=$1; fi
    return $status
}

if [ -n "${1:-}" ]; then
    try "$1"
    case $? in
    3) fail "$1 is not Python 3.11 or 3.12" "name one that is: make setup PYTHON=/path/to/python3.12" ;;
    4) ;;
    *) fail "$1 does not run as a Python" "name one that does: make setup PYTHON=/path/to/python3.12" ;;
    esac
else
    if [ -x .venv/bin/python ]; then try "$PWD/.venv/bin/python"; fi
    saved_ifs=$IFS
    IFS=:
    for directory in $PATH; do
        for name in python3.12 python3.11 python3; do
            if [ -x "$directory/$name" ]; then try "$directory/$name"; fi
        done
    done
    IFS=$saved_ifs
fi

if [ -n "$without_ensurepip" ]; then
    fail "$without_ensurepip cannot make virtual environments (no ensurepip)" \
        "install its venv module (Debian, Ubuntu: apt install python3-venv) or set PYTHON=/path/to/another"
fi
fail "no working Python 3.11 or 3.12 on PATH" \
    "install one (Debian, Ubuntu: apt install python3 python3-venv) or set PYTHON=/path/to/python3.12"
