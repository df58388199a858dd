#!/bin/sh
# curl on Triton's generate extension: a whole answer, a stream, and an error.
. "$(dirname "$0")/common.sh"

ask() {
    echo "\$ curl http://$HTTP/v2/models/$MODEL/$1 -d '$2'"
    curl --silent --show-error --no-buffer "http://$HTTP/v2/models/$MODEL/$1" -d "$2"
    echo
}

ask generate '{"text_input": "The capital of France is", "max_tokens": 5, "temperature": 0}'
ask generate '{"text_input": "Hi", "parameters": {"max_tokens": "3", "exclude_input_in_output": true, "temperature": 0, "return_finish_reason": true}}'
ask generate_stream '{"text_input": "The capital of France is", "stream": true, "max_tokens": 3, "temperature": 0}'
ask generate '{"text_input": "Hi", "top_p": 7}'
