"""What requests ask of the sampler, alone and together."""

from typing import Any

import pytest
import torch
from charonia.core.step import NewRow, StepPlan
from charonia.sampling_params import SamplingParams
from charonia.worker.rows import RequestRows
from charonia.worker.sampling_mode import SamplingMode, mode_of

PLAIN, FILTERED, FULL = SamplingMode.PLAIN, SamplingMode.FILTERED, SamplingMode.FULL


def request(
    row: int = 0, *, stop: list[int] | None = None, bad_words: list[list[int]] | None = None, **sampling: Any
) -> NewRow:
    return NewRow(row, [3, 4], 2, [1], 0, SamplingParams(**sampling), 0, stop or [], bad_words or [])


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, PLAIN),
        ({"temperature": 0.0}, PLAIN),
        ({"temperature": 0.3, "seed": 7}, PLAIN),
        ({"top_k": -1}, PLAIN),
        ({"top_k": 1}, PLAIN),
        ({"prompt_logprobs": 3}, PLAIN),
        ({"stop": [5]}, PLAIN),
        ({"min_tokens": 4}, PLAIN),
        ({"top_k": 2}, FILTERED),
        ({"top_p": 0.9}, FILTERED),
        ({"min_p": 0.1}, FILTERED),
        ({"temperature": 0.0, "top_k": 2, "top_p": 0.9, "min_p": 0.1}, PLAIN),
        ({"repetition_penalty": 1.1}, FULL),
        ({"temperature": 0.0, "repetition_penalty": 0.9}, FULL),
        ({"frequency_penalty": -0.5}, FULL),
        ({"presence_penalty": 0.5}, FULL),
        ({"logit_bias": {3: 0.5}}, FULL),
        ({"allowed_token_ids": [3]}, FULL),
        ({"bad_words": [[3, 4]]}, FULL),
        ({"stop": [5], "min_tokens": 4}, FULL),
        ({"logprobs": 0}, FULL),
        ({"temperature": 0.0, "logprobs": 2}, FULL),
    ],
)  # fmt: skip
def test_of_one_request(fields: dict[str, Any], mode: SamplingMode) -> None:
    assert mode_of(request(**fields)) is mode


def test_the_most_demanding_row_decides_while_it_is_there() -> None:
    rows = RequestRows(
        max_num_seqs=4, max_model_len=8, block_size=4, vocab_size=10, device=torch.device("cpu")
    )
    assert rows.most_demanding_mode is PLAIN
    entering = [request(0), request(1, top_k=2), request(2, logprobs=1), request(3, logprobs=1)]
    rows.apply(StepPlan(0, [], new_rows=entering))
    assert rows.most_demanding_mode is FULL
    rows.apply(StepPlan(1, [], freed_rows=[2]))
    assert rows.most_demanding_mode is FULL
    rows.apply(StepPlan(2, [], freed_rows=[3]))
    assert rows.most_demanding_mode is FILTERED
    rows.apply(StepPlan(3, [], new_rows=[request(1)], freed_rows=[1]))
    assert rows.most_demanding_mode is PLAIN
