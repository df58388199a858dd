"""What a finished step reports: tokens of the entries that sample, and the rows that failed."""

import numpy as np
import torch
from charonia.core.step import StepResult
from charonia.outputs import TokenLogprobs
from charonia.worker.batch import StepLayout
from charonia.worker.results import DeviceStep, HostTokens
from charonia.worker.sampling import KnownLogprobs
from charonia_kernels.draw_outcome import DrawOutcome

BROKEN, NONE_LEFT = int(DrawOutcome.NOT_FINITE), int(DrawOutcome.EXCLUDED)


def result_of(samples: list[int], tokens: list[int], outcomes: list[int]) -> StepResult:
    """Of entries in rows 10, 11, ..., of which those that sample first are single tokens."""
    count = len(samples)
    num_decodes = [*samples, 0].index(0)
    ones = np.ones(count, np.int32)
    rows = np.arange(10, 10 + count, dtype=np.int32)
    layout = StepLayout(rows, ones, ones, np.array(samples, np.int32), num_decodes, count)
    pending = HostTokens(torch.tensor(tokens), torch.tensor(outcomes))
    return DeviceStep(7, layout, pending, None, None).wait()


def test_decodes_report_every_token() -> None:
    assert result_of([1, 1, 1], [5, 6, 7], [0, 0, 0]) == StepResult(7, [5, 6, 7])


def test_chunks_that_do_not_sample_report_none() -> None:
    assert result_of([1, 0, 1, 0], [5, 99, 7, 99], [0, 0, 0, 0]) == StepResult(7, [5, 7])
    assert result_of([0, 0], [99, 99], [0, 0]) == StepResult(7, [])


def test_rows_that_failed_are_named() -> None:
    assert result_of([1, 1, 1], [5, 6, 7], [0, BROKEN, 0]).failed_rows == [11]
    result = result_of([1, 0, 1, 1, 1], [5, 99, 7, 8, 9], [BROKEN, 0, 0, NONE_LEFT, BROKEN])
    assert result.failed_rows == [10, 14]
    assert result.excluded_rows == [13]
    assert result.token_ids == [5, 7, 8, 9]


def test_an_entry_that_does_not_sample_cannot_fail() -> None:
    for outcome in (BROKEN, NONE_LEFT):
        assert result_of([1, 0, 1], [5, 99, 7], [0, outcome, 0]) == StepResult(7, [5, 7])


def test_logprobs_are_collected() -> None:
    by_row = {10: TokenLogprobs([5], [-0.5], 1)}
    ones = np.ones(1, np.int32)
    layout = StepLayout(ones * 10, ones, ones, ones, 1, 1)
    step = DeviceStep(
        3, layout, HostTokens(torch.tensor([5]), torch.tensor([0])), KnownLogprobs(by_row), None
    )
    result = step.wait()
    assert result.logprobs == by_row
    assert result.prompt_logprobs == {}
    assert result.device_seconds is None
