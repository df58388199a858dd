"""Sampling parameters through the offline API: how sequences end, what is reported, and that requests never mix."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from charonia import LLM, SamplingParams
from charonia.outputs import CompletionOutput, RequestOutput
from charonia.text import Tokenizer
from support.engines import tiny_model_dir
from support.tiny_models import save_tiny_model, tiny_model

PROMPT = "Once upon a time"
LENGTH = 24


def run(llm: LLM, prompts: Any = PROMPT, **params: Any) -> RequestOutput:
    """One request; seeded, so that what it draws varies along the sequence and not between runs."""
    merged = {"seed": 11, "max_tokens": LENGTH, "ignore_eos": True, **params}
    return llm.generate(prompts, SamplingParams(**merged), use_tqdm=False)[0]


def one(llm: LLM, **params: Any) -> CompletionOutput:
    return run(llm, **params).outputs[0]


@pytest.fixture
def plain(llm: LLM) -> CompletionOutput:
    """What comes without any stop condition."""
    return one(llm)


def shortest(tokenizer: Tokenizer, sequence: CompletionOutput, stop: str) -> list[int]:
    """The first tokens of `sequence` whose text holds `stop`."""
    ids = sequence.token_ids
    return next(ids[:n] for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n]))


# ---- stopping ----


def boundaries(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [len(tokenizer.decode(ids[:n])) for n in range(1, len(ids))]


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_token_boundaries(llm: LLM, plain: CompletionOutput, include: bool) -> None:
    tokenizer = llm.get_tokenizer()
    for boundary in boundaries(tokenizer, plain.token_ids)[4::5]:
        stop = plain.text[boundary - 2 : boundary + 2]
        sequence = one(llm, stop=stop, include_stop_str_in_output=include)
        end = plain.text.index(stop)
        assert sequence.text == plain.text[: end + len(stop) * include]
        assert sequence.token_ids == shortest(tokenizer, plain, stop)
        assert (sequence.finish_reason, sequence.stop_reason) == ("stop", stop)


def test_the_first_of_several_stop_strings(llm: LLM, plain: CompletionOutput) -> None:
    late, early = plain.text[60:64], plain.text[30:34]
    sequence = one(llm, stop=[late, "never comes", early])
    assert sequence.text == plain.text[: plain.text.index(early)] and sequence.stop_reason == early


def test_beginnings_of_stop_strings_are_released(llm: LLM, plain: CompletionOutput) -> None:
    sequence = one(llm, stop=[plain.text[-5:] + "?!", plain.text[20:30] + "\x00"])
    assert sequence.text == plain.text and sequence.finish_reason == "length"


@pytest.mark.parametrize("include", [False, True])
def test_stop_token_ids(llm: LLM, plain: CompletionOutput, include: bool) -> None:
    stop = plain.token_ids[9]
    first = plain.token_ids.index(stop)
    sequence = one(llm, stop_token_ids=[stop], include_stop_str_in_output=include)
    assert sequence.token_ids == plain.token_ids[: first + 1]
    shown = plain.token_ids[: first + include]
    assert sequence.text == llm.get_tokenizer().decode(shown)
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", stop)


def test_end_of_sequence(llm: LLM) -> None:
    eos = llm.get_tokenizer().eos_token_id
    assert eos is not None
    forced = {"logit_bias": {eos: 100.0}, "temperature": 0.0}
    ended = one(llm, ignore_eos=False, **forced)
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([eos], "", "stop", None)
    listed = one(llm, ignore_eos=False, stop_token_ids=[eos], **forced)
    assert listed.stop_reason == eos
    ignored = one(llm, **forced)
    assert ignored.token_ids == [eos] * LENGTH and ignored.finish_reason == "length"
    spelt = one(llm, skip_special_tokens=False, max_tokens=2, **forced)
    assert spelt.text == "<|im_end|><|im_end|>" and ignored.text == ""


def test_min_tokens(llm: LLM, plain: CompletionOutput) -> None:
    stop = plain.token_ids[2]
    sequence = one(llm, stop_token_ids=[stop], min_tokens=8)
    assert stop not in sequence.token_ids[:8]
    eos = llm.get_tokenizer().eos_token_id
    biased = one(llm, ignore_eos=False, min_tokens=5, logit_bias={eos: 100.0}, temperature=0.0)
    assert len(biased.token_ids) == 6 and biased.token_ids[-1] == eos
    late = one(llm, stop=plain.text[3:5], min_tokens=20)
    assert len(late.token_ids) > 20 or late.finish_reason == "length"


def test_one_token(llm: LLM, plain: CompletionOutput) -> None:
    assert one(llm, max_tokens=1).token_ids == plain.token_ids[:1]


# ---- what is reported ----


def test_several_sequences(llm: LLM) -> None:
    output = run(llm, n=4)
    assert [sequence.index for sequence in output.outputs] == [0, 1, 2, 3] and output.finished
    assert len({tuple(sequence.token_ids) for sequence in output.outputs}) == 4
    for i, sequence in enumerate(output.outputs):
        assert one(llm, seed=11 + i).token_ids == sequence.token_ids
    stop = output.outputs[2].text[40:43]
    stopped = run(llm, n=4, stop=stop)
    for sequence, full in zip(stopped.outputs, output.outputs, strict=True):
        assert sequence.text == full.text.split(stop)[0]


def test_unseeded_sequences_differ(llm: LLM) -> None:
    output = run(llm, n=3, seed=None)
    again = run(llm, n=3, seed=None)
    found = {tuple(sequence.token_ids) for result in (output, again) for sequence in result.outputs}
    assert len(found) == 6


def test_no_text(llm: LLM, plain: CompletionOutput) -> None:
    sequence = one(llm, detokenize=False)
    assert sequence.text == "" and sequence.token_ids == plain.token_ids


def test_bad_words_never_come(llm: LLM, plain: CompletionOutput) -> None:
    tokenizer = llm.get_tokenizer()
    pair = tokenizer.decode(plain.token_ids[3:5])
    single = tokenizer.decode(plain.token_ids[8:9])
    sequence = one(llm, bad_words=[pair.strip(), single.strip()])
    assert sequence.token_ids != plain.token_ids
    assert pair not in sequence.text and plain.token_ids[8] not in sequence.token_ids


def test_allowed_tokens(llm: LLM) -> None:
    assert set(one(llm, allowed_token_ids=[100, 200, 300]).token_ids) <= {100, 200, 300}


def test_logprobs_of_the_output(llm: LLM, plain: CompletionOutput) -> None:
    sequence = one(llm, logprobs=3, repetition_penalty=1.0)
    assert sequence.token_ids == plain.token_ids and sequence.logprobs is not None
    total = 0.0
    for token, position in zip(sequence.token_ids, sequence.logprobs, strict=True):
        own, *_ = position.values()
        assert next(iter(position)) == token and len(position) in (3, 4)
        assert own.decoded_token == llm.get_tokenizer().decode_token(token)
        assert [entry.rank for entry in position.values()].count(1) == 1
        total += own.logprob
    assert sequence.cumulative_logprob == pytest.approx(total)
    (single,) = one(llm, logprobs=0, max_tokens=1).logprobs or []
    assert len(single) == 1


# ---- against transformers ----


@pytest.fixture(scope="module")
def tiny_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path, Path]:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    return tiny_model("llama"), directory, tiny_model_dir(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("budget", "blocks", "preempted"), [(512, 200, False), (7, 200, False), (16, 13, True)]
)
def test_logprobs_are_those_of_transformers(
    tiny_reference: tuple[torch.nn.Module, Path, Path], budget: int, blocks: int, preempted: bool
) -> None:
    """Prompt and output positions alike, through chunked and preempted prefills."""
    reference, directory, tokenizer = tiny_reference
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 320) for _ in range(length)] for length in (8, 70, 12, 80, 1, 2)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=4)
    with LLM(
        str(directory), tokenizer=str(tokenizer), dtype="float32", max_num_seqs=7, max_num_batched_tokens=budget,
        max_model_len=96, block_size=8, num_kv_blocks_override=blocks, cpu_threads=2,
        long_prefill_token_threshold=128,
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert (llm.stats().preemptions > 0) == preempted
    for prompt, output in zip(prompts, outputs, strict=True):
        sequence = output.outputs[0]
        ids = prompt + sequence.token_ids
        with torch.inference_mode():
            exact = reference(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        positions = [*output.prompt_logprobs[1:], *(sequence.logprobs or [])]
        assert len(output.prompt_logprobs) == len(prompt) and len(positions) == len(ids) - 1
        for i, position in enumerate(positions):
            assert position is not None and next(iter(position)) == ids[i + 1]
            assert len(position) >= (4 if i + 1 < len(prompt) else 2)
            for token, entry in position.items():
                assert entry.logprob == pytest.approx(exact[i, token].item(), abs=2e-4)
            best = exact[i].argmax().item()
            assert position[best].rank == 1


# ---- all together ----

MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_p": 0.8},
    {"top_k": 5},
    {"min_p": 0.1, "temperature": 2.0},
    {"top_k": 800, "top_p": 0.99, "min_p": 1e-4},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "temperature": 0.0},
    {"logit_bias": {100: 9.0, 200: -50.0}},
    {"allowed_token_ids": list(range(1000, 1200))},
    {"bad_words": ["the", "of the", "a"]},
    {"stop_token_ids": list(range(0, 40000, 20))[:900], "min_tokens": 10},
    {"stop": ["e", "a"], "min_tokens": 4},
    {"stop": ["th"], "include_stop_str_in_output": True},
    {"logprobs": 5},
    {"prompt_logprobs": 2, "logprobs": 0, "temperature": 0.0},
    {"n": 3},
    {"detokenize": False},
    {"skip_special_tokens": False, "spaces_between_special_tokens": False},
    {"max_tokens": 1},
    {"max_tokens": None},
]


def strip_times(output: RequestOutput) -> tuple[Any, ...]:
    """All that must not depend on the company; logprobs to the precision of sums in another order."""
    sequences = [
        (s.index, s.text, s.token_ids, s.finish_reason, s.stop_reason, round_logprobs(s.logprobs))
        for s in output.outputs
    ]
    return output.prompt, output.prompt_token_ids, sequences, round_logprobs(output.prompt_logprobs)


def round_logprobs(positions: Any) -> Any:
    if positions is None:
        return None
    return [
        position
        and {token: (entry.rank, pytest.approx(entry.logprob, abs=1e-4)) for token, entry in position.items()}
        for position in positions
    ]


def test_mixed_parameters_in_one_batch(llm: LLM) -> None:
    """Every request gives what it gives alone."""
    params = [SamplingParams(**{"max_tokens": 16, "seed": i, **entry}) for i, entry in enumerate(MIXED)]
    prompts = [f"Story number {i}: " + "la " * (i * 5) for i in range(len(MIXED))]
    alone = [llm.generate(p, s, use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)]
    for seed in range(2):
        order = random.Random(seed).sample(range(len(MIXED)), len(MIXED))
        outputs = llm.generate([prompts[i] for i in order], [params[i] for i in order], use_tqdm=False)
        for i, output in zip(order, outputs, strict=True):
            assert strip_times(output) == strip_times(alone[i]), MIXED[i]
