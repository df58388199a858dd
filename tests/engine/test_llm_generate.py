"""The offline API: what it takes, what it gives back, and what a refused, failed or interrupted call leaves behind."""

import _thread
import gc
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from charonia import LLM, SamplingParams
from charonia.errors import CharoniaError, ConfigError, EngineDeadError, InvalidRequestError, ModelLoadError
from charonia.outputs import RequestOutput

PROMPT = "The capital of France is"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def generate(llm: LLM, prompts: Any, params: Any = GREEDY, **options: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False, **options)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# ---- inputs ----


def test_every_form_of_a_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPT)
    forms: list[Any] = [PROMPT, {"prompt": PROMPT}, ids, {"prompt_token_ids": ids}, tuple(ids)]
    alone = [generate(llm, form)[0] for form in forms]
    together = generate(llm, forms)
    assert len({tuple(output.outputs[0].token_ids) for output in [*alone, *together]}) == 1
    assert [output.prompt for output in together] == [PROMPT, PROMPT, None, None, None]
    assert all(output.prompt_token_ids == ids and output.finished for output in together)


def test_arrays_of_token_ids(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPT)
    expected = tokens(generate(llm, [ids]))[0]
    for dtype in (np.int32, np.int64, np.uint16):
        array = np.array(ids, dtype)
        assert tokens(generate(llm, array)) == [expected]
        assert tokens(generate(llm, [array, {"prompt_token_ids": array}])) == [expected] * 2
    together = generate(llm, np.array([ids, ids]))
    assert tokens(together) == [expected] * 2 and together[0].prompt_token_ids == ids
    for bad in (np.array(ids, np.float32), np.zeros((1, 1, 2), np.int64), np.array([49152])):
        with pytest.raises(InvalidRequestError):
            generate(llm, [bad])


def test_tokens_are_the_same_without_text(llm: LLM) -> None:
    """Sequences that need nothing but their tokens take a shorter way."""
    prompts = [f"{i} green bottles" for i in range(20)]
    bare = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, detokenize=False, seed=5)
    shown = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=0, seed=5)
    mixed = [bare if i % 3 else shown for i in range(20)]
    outputs, expected = generate(llm, prompts, mixed), generate(llm, prompts, shown)
    assert tokens(outputs) == tokens(expected)
    for i, (output, full) in enumerate(zip(outputs, expected, strict=True)):
        sequence = output.outputs[0]
        assert sequence.text == ("" if i % 3 else full.outputs[0].text)
        assert sequence.finish_reason == "length" and output.finished
        assert 0.0 < output.timings.first_token <= output.timings.total


def test_sequences_of_one_prompt_come_in_their_order(llm: LLM) -> None:
    for detokenize in (True, False):
        params = SamplingParams(n=5, temperature=1.0, seed=3, max_tokens=20, detokenize=detokenize)
        output, again = generate(llm, ["a", "a"], params)
        assert [sequence.index for sequence in output.outputs] == [0, 1, 2, 3, 4]
        assert all(sequence.finish_reason is not None for sequence in output.outputs)
        assert [s.token_ids for s in output.outputs] == [s.token_ids for s in again.outputs]
        assert len({tuple(sequence.token_ids) for sequence in output.outputs}) > 1


def test_without_a_tokenizer(tiny_dir: Path, tmp_path: Path, llm: LLM) -> None:
    (tmp_path / "config.json").write_text((tiny_dir / "config.json").read_text())
    settings = {"max_num_seqs": 12, "max_model_len": 400, "max_num_batched_tokens": 64, "cpu_threads": 2}
    with LLM(
        str(tmp_path), skip_tokenizer_init=True, load_format="dummy", dtype="float32", **settings
    ) as bare:
        params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=1, prompt_logprobs=0)
        (output,), (expected,) = generate(bare, [[5, 6, 7]], params), generate(llm, [[5, 6, 7]], params)
        assert output.outputs[0].text == "" and expected.outputs[0].text
        assert tokens([output]) == tokens([expected])
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        assert all(found.decoded_token == "" for position in logprobs for found in position.values())
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 3
        for call in (
            lambda: generate(bare, "text"),
            lambda: generate(bare, [[5]], SamplingParams(bad_words=["x"])),
            lambda: generate(bare, [[5]], SamplingParams(stop=["x"])),
            lambda: bare.chat([{"role": "user", "content": "Hi"}], use_tqdm=False),
            bare.get_tokenizer,
        ):
            with pytest.raises(InvalidRequestError):
                call()
        assert len(tokens(generate(bare, [[5]]))[0]) == 8


def test_what_lives_while_the_model_does_is_not_collected(tiny_dir: Path) -> None:
    with LLM(str(tiny_dir), load_format="dummy", dtype="float32", max_model_len=64, cpu_threads=1):
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"{i} bottles" for i in range(30)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=1 + (7 * i) % 11, ignore_eos=True) for i in range(30)
    ]
    outputs = generate(llm, prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(found) for found in tokens(outputs)] == [p.max_tokens for p in params]
    assert [output.request_id for output in outputs] == [str(i) for i in range(30)]
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_nothing_to_do(llm: LLM) -> None:
    assert generate(llm, []) == [] and llm.chat([], use_tqdm=False) == []


def test_default_parameters(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, use_tqdm=False)
    assert len(output.outputs) == 1 and 1 <= len(output.outputs[0].token_ids) <= 16


def test_text_is_that_of_the_tokens(llm: LLM) -> None:
    (output,) = generate(llm, PROMPT)
    sequence = output.outputs[0]
    ids = output.prompt_token_ids + sequence.token_ids
    assert PROMPT + sequence.text == llm.get_tokenizer().decode(ids)
    assert sequence.cumulative_logprob == 0.0 and sequence.logprobs is None and sequence.stop_reason is None
    assert 0.0 <= output.timings.queue <= output.timings.first_token <= output.timings.total


def test_chat_applies_the_template(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt is not None
    assert output.prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert output.prompt_token_ids.count(llm.get_tokenizer().encode("<|im_start|>")[0]) == 3
    several = llm.chat([messages, messages[1:]], [GREEDY, GREEDY], use_tqdm=False)
    assert tokens(several)[0] == tokens([output])[0]
    (continued,) = llm.chat(
        [*messages, {"role": "assistant", "content": "Hello"}], GREEDY, use_tqdm=False,
        add_generation_prompt=False, continue_final_message=True,
    )  # fmt: skip
    assert continued.prompt is not None and continued.prompt.endswith("assistant\nHello")


def test_priority_orders_the_queue(tiny_dir: Path) -> None:
    with LLM(
        str(tiny_dir), load_format="dummy", dtype="float32", max_num_seqs=1, max_model_len=64,
        scheduling_policy="priority", cpu_threads=1,
    ) as llm:  # fmt: skip
        outputs = generate(llm, ["a", "b", "c"], priority=[2, 0, 1])
    first = [output.timings.first_token for output in outputs]
    assert first[1] < first[2] < first[0]


def test_no_limit_fills_the_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    (output,) = generate(llm, [[5] * 380], params)
    assert len(output.outputs[0].token_ids) == 20 and output.outputs[0].finish_reason == "length"
    (clipped,) = generate(llm, [[5] * 399], GREEDY)
    assert len(clipped.outputs[0].token_ids) == 1


def test_repeated_prompts_hit_the_prefix_cache(llm: LLM) -> None:
    prompt = [(7 * i) % 1000 for i in range(150)]
    first, again = generate(llm, [prompt])[0], generate(llm, [prompt])[0]
    assert tokens([again]) == tokens([first])
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 144)


def test_shared_prefix_is_computed_once(tiny_dir: Path) -> None:
    """200 prompts of 1,000 common tokens and a few of their own: a tenth of the work at most."""
    common = [(13 * i) % 5000 for i in range(1000)]
    prompts = [[*common, 100 + i, 200 + i, 300 + i] for i in range(200)]
    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    work, found = [], []
    for caching in (True, False):
        with LLM(
            str(tiny_dir), load_format="dummy", dtype="float32", max_model_len=1024, max_num_seqs=64,
            enable_prefix_caching=caching, cpu_threads=2,
        ) as llm:  # fmt: skip
            found.append(tokens(generate(llm, prompts, params)))
            work.append(llm.stats().scheduled_tokens)
    assert work[1] == 200 * 1003
    assert work[0] * 10 <= work[1]
    assert found[0] == found[1]


# ---- refusals ----

TOO_LONG = [3] * 400
BAD_PROMPTS: list[Any] = [
    "", [], TOO_LONG, "word " * 500, [1, -1], [1, 49152], [1, 2**40], [1, 2.5], [True], [1, None], [[1]], None, 5,
    {"text": "x"}, {}, b"bytes", {"prompt": 7}, {"prompt": b"x"}, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_PROMPTS, ids=lambda value: repr(value)[:30])
def test_bad_prompts_are_refused_before_anything_runs(llm: LLM, bad: Any) -> None:
    steps = llm.stats().steps
    with pytest.raises(InvalidRequestError):
        generate(llm, ["good", bad])
    assert llm.stats().steps == steps
    assert len(tokens(generate(llm, "good"))[0]) == 8


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"stop_token_ids": [49152]}, "stop_token_ids"),
        ({"logit_bias": {60000: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [0, 1 << 30]}, "allowed_token_ids"),
        ({"bad_words": [" "]}, "bad_words"),
    ],
)
def test_parameters_that_do_not_fit_the_model(llm: LLM, params: dict[str, Any], match: str) -> None:
    steps = llm.stats().steps
    with pytest.raises(InvalidRequestError, match=match):
        generate(llm, ["good", "bad"], [GREEDY, SamplingParams(**params)])
    assert llm.stats().steps == steps


def test_lists_that_do_not_match(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="sampling_params has 1 entries for 2 prompts"):
        generate(llm, ["a", "b"], [GREEDY])
    with pytest.raises(InvalidRequestError, match="priority has 3 entries for 2 prompts"):
        generate(llm, ["a", "b"], priority=[1, 2, 3])


def device_threads() -> int:
    return sum(thread.name.startswith("charonia-device") for thread in threading.enumerate())


def test_settings_are_checked(tiny_dir: Path, tmp_path: Path) -> None:
    before = device_threads()
    with pytest.raises(ConfigError, match="'max_modle_len'"):
        LLM(str(tiny_dir), max_modle_len=5)
    with pytest.raises(ConfigError, match="'max_model_len'"):
        LLM(str(tiny_dir), load_format="dummy", max_model_len=10**6)
    with pytest.raises(
        ConfigError, match=r"max_model_len = 64.*raise 'num_kv_blocks_override' or lower 'max_model"
    ):
        LLM(str(tiny_dir), load_format="dummy", max_model_len=64, num_kv_blocks_override=3)
    with pytest.raises(ModelLoadError, match="does not exist"):
        LLM(str(tmp_path / "nothing"))
    assert device_threads() == before


# ---- failures and interrupts ----


STUCK: dict[str, Any] = {"allowed_token_ids": [39], "bad_words": ["77"], "max_tokens": 4}
"""A seven is all that may come, and never two of them."""


def test_a_failed_request_ends_the_call_and_nothing_else(llm: LLM) -> None:
    impossible = SamplingParams(**STUCK)
    with pytest.raises(CharoniaError, match="no token can be sampled"):
        generate(llm, ["a", "b", "c"], [GREEDY, impossible, GREEDY])
    assert len(tokens(generate(llm, ["a", "b"]))) == 2


def test_a_request_left_without_a_token_keeps_its_prefix_for_others(llm: LLM) -> None:
    prompt = list(range(40, 140))
    with pytest.raises(InvalidRequestError, match=r"'bad_words'.*leaves none"):
        generate(llm, [prompt], SamplingParams(**STUCK))
    hits = llm.stats().prefix_cache_hits
    generate(llm, [prompt])
    assert llm.stats().prefix_cache_hits - hits == 96


def test_a_failed_request_with_siblings(llm: LLM) -> None:
    impossible = SamplingParams(n=3, **STUCK)
    with pytest.raises(CharoniaError, match="no token can be sampled"):
        generate(llm, ["a"], impossible)


def test_interrupt_leaves_the_engine_empty(llm: LLM) -> None:
    endless = SamplingParams(temperature=0.0, max_tokens=390, ignore_eos=True, n=4)
    timer = threading.Timer(0.2, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        generate(llm, [f"prompt {i}" for i in range(64)], endless)
    timer.join()
    assert not llm.stats().num_running and not llm.stats().kv_blocks_used
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(tokens(generate(llm, "again"))[0]) == 8


def test_generate_from_another_thread(llm: LLM) -> None:
    found: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: found.append(tokens(generate(llm, PROMPT))))
    thread.start()
    thread.join()
    assert found == [tokens(generate(llm, PROMPT))]


def test_a_device_that_fails(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(tiny_dir), load_format="dummy", dtype="float32", max_model_len=64, cpu_threads=1)
    generate(llm, PROMPT)

    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr("charonia.worker.model_runner.StepLayout.of", broken)
    with pytest.raises(RuntimeError, match="device lost"):
        generate(llm, PROMPT)
    monkeypatch.undo()
    with pytest.raises(EngineDeadError, match="make a new LLM"):
        generate(llm, PROMPT)
    llm.shutdown()
