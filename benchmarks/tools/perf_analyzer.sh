#!/bin/sh
# perf_analyzer over gRPC streaming. Arguments are added to its own, such as `--concurrency-range 1:8`.
. "$(dirname "$0")/common.sh"
with_perf_analyzer

input=$(mktemp)
trap 'rm -f "$input"' EXIT
cat > "$input" <<'JSON'
{"data": [{"text_input": ["The trumpet shell is"], "stream": [true],
           "sampling_parameters": ["{\"max_tokens\": 32, \"ignore_eos\": true}"]}]}
JSON
perf_analyzer -m "$MODEL" -u "$GRPC" -i grpc --async --streaming --input-data "$input" \
    --measurement-interval 5000 --stability-percentage 999 "$@"
