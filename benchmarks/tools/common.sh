# For the scripts of this folder, which source it: settings, and a virtual environment for each tool.
# shellcheck shell=sh
set -eu

HTTP=${HTTP:-localhost:8000}       # Triton's HTTP address
GRPC=${GRPC:-localhost:8001}       # Triton's gRPC address
GATEWAY=${GATEWAY:-localhost:9000} # the OpenAI gateway's address
MODEL=${MODEL:-llm}                # the model's name in Triton
TOKENIZER=${TOKENIZER:-}           # the checkpoint's directory: tools that count tokens need its tokenizer
PYTHON=${PYTHON:-python3}
TOOLS=${TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/charonia/tools} # where the tools are installed

# venv NAME REQUIREMENT...: the environment of a tool, made when it is first used; prints its folder.
venv() {
    folder=$TOOLS/$1
    shift
    if [ ! -f "$folder/complete" ]; then
        rm -rf "$folder"
        "$PYTHON" -m venv "$folder" >&2
        "$folder/bin/pip" install --quiet --disable-pip-version-check "$@" >&2
        touch "$folder/complete"
    fi
    echo "$folder"
}

# Puts the perf_analyzer of tritonclient 2.48 on PATH: the last one in a wheel that runs with glibc 2.31. The two
# libraries that it lacks are taken from the wheel of the Triton server.
with_perf_analyzer() {
    folder=$TOOLS/perf_analyzer
    if [ ! -f "$folder/complete" ]; then
        rm -rf "$folder"
        mkdir -p "$folder/bin" "$folder/lib"
        "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" \
            --platform manylinux1_x86_64 --only-binary=:all: tritonclient==2.48.0 nvidia-pytriton==0.7.0 2>/dev/null ||
            "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" \
                tritonclient==2.48.0 nvidia-pytriton==0.7.0 >&2
        "$PYTHON" - "$folder" <<'PYTHON'
import pathlib, sys, zipfile
folder = pathlib.Path(sys.argv[1])
wanted = {"/bin/perf_analyzer": "bin/perf_analyzer", "libb64-": "lib/libb64.so.0d", "libcudart-": "lib/libcudart.so.12"}
for wheel in folder.glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            for part, target in wanted.items():
                if part in name:
                    (folder / target).write_bytes(archive.read(name))
    wheel.unlink()
(folder / "bin/perf_analyzer").chmod(0o755)
PYTHON
        touch "$folder/complete"
    fi
    PATH=$folder/bin:$PATH
    LD_LIBRARY_PATH=$folder/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export PATH LD_LIBRARY_PATH
}

need_tokenizer() {
    if [ -z "$TOKENIZER" ]; then
        echo "set TOKENIZER to the checkpoint's directory, such as \"\$(charonia fetch-model)\"" >&2
        exit 2
    fi
}
