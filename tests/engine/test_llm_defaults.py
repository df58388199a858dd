"""`LLM.generate` without sampling parameters, and with what is none."""

import json
from pathlib import Path
from typing import Any

import pytest
from charonia import LLM, SamplingParams
from charonia.errors import InvalidRequestError, UnsupportedError
from support.engines import tiny_model_dir


def test_a_checkpoint_that_recommends_sampling_is_sampled_so(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path)
    file = directory / "generation_config.json"
    stated = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(stated | {"temperature": 0.0, "max_new_tokens": 5}))
    with LLM(str(directory), load_format="dummy", dtype="float32", max_model_len=64, cpu_threads=1) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=5)
        assert llm.get_default_sampling_params() == greedy
        told = [llm.generate("Shells", greedy, use_tqdm=False), llm.generate("Shells", use_tqdm=False)]
        assert told[0][0].outputs[0].token_ids == told[1][0].outputs[0].token_ids
        messages = [{"role": "user", "content": "Hi"}]
        answers = [llm.chat(messages, greedy, False), llm.chat(messages, None, False)]
        assert answers[0][0].outputs[0].token_ids == answers[1][0].outputs[0].token_ids


def test_what_is_no_prompt_or_no_parameters_is_told(llm: LLM) -> None:
    wrong: list[tuple[Any, Any]] = [(None, None), (3, None), ("Hi", {"max_tokens": 2}), (["Hi"], ["Hi"])]
    for prompts, params in wrong:
        with pytest.raises(InvalidRequestError, match=r"a prompt must be|sampling_params must be"):
            llm.generate(prompts, params, use_tqdm=False)


def test_what_a_prompt_cannot_bring_is_not_dropped(llm: LLM) -> None:
    picture = {"prompt": "What is this?", "multi_modal_data": {"image": object()}}
    with pytest.raises(UnsupportedError, match="'multi_modal_data' is not supported"):
        llm.generate([picture], use_tqdm=False)
    (output,) = llm.generate({"prompt": "Hi", "multi_modal_data": None}, use_tqdm=False)
    assert output.finished
