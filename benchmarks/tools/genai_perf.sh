#!/bin/sh
# genai-perf as users of Triton's vLLM backend run it. Arguments are added to its own.
. "$(dirname "$0")/common.sh"
need_tokenizer
with_perf_analyzer
tool=$(venv genai-perf genai-perf==0.0.16)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
COLUMNS=${COLUMNS:-120}
export COLUMNS
"$tool/bin/genai-perf" profile -m "$MODEL" -u "$GRPC" --endpoint-type kserve --backend vllm --streaming \
    --tokenizer "$TOKENIZER" --synthetic-input-tokens-mean 64 --output-tokens-mean 32 \
    --output-tokens-mean-deterministic --concurrency 2 --request-count 10 "$@"
