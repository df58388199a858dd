#!/bin/sh
# aiperf against the gateway's chat API, or with ENDPOINT=template against Triton's /generate_stream.
# Arguments are added to its own.
. "$(dirname "$0")/common.sh"
need_tokenizer
tool=$(venv aiperf aiperf==0.13.0)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
set -- --model "$MODEL" --tokenizer "$TOKENIZER" --streaming --concurrency 2 --request-count 10 \
    --synthetic-input-tokens-mean 64 --output-tokens-mean 32 --ui simple --artifact-dir "$work" "$@"
if [ "${ENDPOINT:-chat}" = template ]; then
    # In a file, since commas in the value of --extra-inputs divide it.
    echo '{"text_input": {{ text|tojson }}, "stream": true, "max_tokens": 32, "ignore_eos": true}' > "$work/template.json"
    "$tool/bin/aiperf" profile --url "http://$HTTP" --endpoint-type template \
        --custom-endpoint "/v2/models/$MODEL/generate_stream" \
        --extra-inputs "payload_template:$work/template.json" --extra-inputs response_field:text_output "$@"
    exit
fi
"$tool/bin/aiperf" profile --url "http://$GATEWAY" --endpoint-type chat --extra-inputs ignore_eos:true "$@"
