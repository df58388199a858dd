#!/bin/sh
# Installs what one image runs into a new virtual environment, with the versions of constraints.txt:
#     install.sh server|gateway VENV
# Run by the Dockerfiles at build time and by the tests. Settings of pip (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) apply.
set -eu

target=$1
venv=$2
source=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-python3}

case $target in
    server) extras=engine,gateway,tracing ;; # the server itself is the base image's
    gateway) extras=gateway,tracing ;;
    *) echo "usage: install.sh server|gateway VENV" >&2; exit 2 ;;
esac

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; then
    echo "Charonia needs Python 3.11 or 3.12, and this is $("$python" --version);" \
        "tritonserver images have 3.12 since release 24.11" >&2
    exit 1
fi
"$python" -m venv "$venv"
"$venv/bin/pip" install --disable-pip-version-check -c "$source/constraints.txt" "${source}[$extras]"
"$venv/bin/pip" check --disable-pip-version-check
