#!/bin/sh
# lm-evaluation-harness through the gateway's completions: choices by log-probability, a rolling one over a text, and
# generated answers. With TASKS it runs tasks of its own, which it downloads: TASKS=hellaswag benchmarks/tools/lm_eval.sh --limit 100
. "$(dirname "$0")/common.sh"
need_tokenizer
tool=$(venv lm-eval 'lm-eval[api]==0.4.13' transformers)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -n "${TASKS:-}" ] || export HF_DATASETS_CACHE="$work/cache"
cat > "$work/capitals.jsonl" <<'JSON'
{"question": "The capital of France is", "choices": ["Paris", "Berlin", "Madrid"], "answer": 0}
{"question": "The capital of Germany is", "choices": ["Rome", "Berlin", "Paris"], "answer": 1}
{"question": "The capital of Italy is", "choices": ["Lisbon", "Madrid", "Rome"], "answer": 2}
{"question": "The capital of Japan is", "choices": ["Tokyo", "Seoul", "Beijing"], "answer": 0}
JSON
task() {
    cat > "$work/$1.yaml"
    cat >> "$work/$1.yaml" <<YAML
task: $1
dataset_path: json
dataset_kwargs: {data_files: {test: $work/capitals.jsonl}}
test_split: test
YAML
}
task capitals_choice <<'YAML'
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
YAML
task capitals_text <<'YAML'
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[answer]}}."
metric_list: [{metric: word_perplexity}]
YAML
task capitals_generated <<'YAML'
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [".", "\n"], max_gen_toks: 8, temperature: 0}
metric_list: [{metric: exact_match, regexes_to_ignore: ["^ +"]}]
YAML
"$tool/bin/lm_eval" run --model local-completions --include_path "$work" \
    --model_args "model=$MODEL,base_url=http://$GATEWAY/v1/completions,tokenizer=$TOKENIZER,num_concurrent=4" \
    --tasks "${TASKS:-capitals_choice,capitals_text,capitals_generated}" "$@"
