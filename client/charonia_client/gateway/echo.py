"""What the answer to a completion tells of its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from charonia_client.gateway.context import RequestContext
from charonia_client.gateway.merge import results
from charonia_client.gateway.protocol import CompletionRequest
from charonia_client.gateway.triton_model import TritonModel


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """text: to be put in front of each choice. first_token: the text of the prompt's first token, where it is scored.

    token_ids: to be reported, if asked for.
    """

    text: str = ""
    first_token: str = ""
    token_ids: list[int] | None = None


async def prompt_echoes(
    request: CompletionRequest,
    model: TritonModel,
    prompts: Sequence[str | list[int]],
    context: RequestContext,
) -> list[PromptEcho]:
    """One for each prompt; the model is asked for what only a tokenizer knows."""

    async def one(prompt: str | list[int]) -> PromptEcho:
        return await _prompt_echo(request, model, prompt, context)

    return await results(one, prompts)


async def _prompt_echo(
    request: CompletionRequest, model: TritonModel, prompt: str | list[int], context: RequestContext
) -> PromptEcho:
    scores = request.scores_prompt
    if isinstance(prompt, str):
        text, ids = prompt if request.echo else "", None
        if not scores and not request.return_token_ids:
            return PromptEcho(text)
        values = await model.utility("tokenize", {"prompt": prompt, "return_token_texts": scores}, context)
        ids = list(values["tokens"])
    else:
        ids = prompt
        if not request.echo:
            return PromptEcho(token_ids=ids if request.return_token_ids else None)
        values = await model.utility("detokenize", {"tokens": ids, "return_token_texts": scores}, context)
        text = str(values["prompt"])
    first = str(values["token_texts"][0]) if scores and ids else ""
    return PromptEcho(text, first, ids if request.return_token_ids else None)
