"""A request in a frontend: when its outputs may be shown, and what they carry."""

from charonia.outputs import FinishReason
from charonia.request import TokenDelta, TokenLogprobs
from charonia.sampling_params import SamplingParams
from charonia.serving.live_request import LiveRequest
from charonia.serving.request import GenerationRequest


def live(*, n: int = 1, final_only: bool = False) -> LiveRequest:
    """Of a prompt of three tokens whose log-probabilities are wanted, without text."""
    params = SamplingParams(n=n, prompt_logprobs=0, detokenize=False, max_tokens=9)
    request = GenerationRequest(prompt=[5, 6, 7], params=params)
    return LiveRequest(request, None, [5, 6, 7], None, frozenset(), final_only=final_only)


def scored(token: int) -> TokenLogprobs:
    return TokenLogprobs(token_ids=[token], logprobs=[-0.5], rank=1)


def test_the_first_output_waits_for_the_scores_of_the_whole_prompt() -> None:
    request = live(n=2)
    request.push(TokenDelta(request_id=0, prompt_logprobs=[scored(6)]))
    request.push(TokenDelta(request_id=1, token_ids=[10]))
    assert request.take() is None
    request.push(TokenDelta(request_id=0, token_ids=[11], prompt_logprobs=[scored(7)]))
    output = request.take()
    assert output is not None and output.prompt_logprobs is not None
    nothing, *known = output.prompt_logprobs
    assert nothing is None
    assert [list(position or ()) for position in known] == [[6], [7]]
    assert [(each.index, each.token_ids) for each in output.outputs] == [(1, [10]), (0, [11])]
    assert not output.finished and request.take() is None


def test_a_sibling_that_ends_while_the_prompt_is_scored_still_waits() -> None:
    request = live(n=2)
    request.push(TokenDelta(request_id=1, token_ids=[10], finish_reason=FinishReason.LENGTH))
    assert request.take() is None and not request.finished


def test_a_final_answer_has_every_sequence_in_order() -> None:
    request = live(n=2, final_only=True)
    request.push(TokenDelta(request_id=1, token_ids=[10], finish_reason=FinishReason.LENGTH))
    request.push(TokenDelta(request_id=0, prompt_logprobs=[scored(6), scored(7)]))
    assert request.take() is None
    request.push(TokenDelta(request_id=0, token_ids=[11], finish_reason=FinishReason.LENGTH))
    output = request.take()
    assert output is not None and output.finished
    assert [each.token_ids for each in output.outputs] == [[11], [10]]
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 3
