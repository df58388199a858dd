"""Greedy continuations by transformers: what the engine's output is compared with."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Golden:
    """tokens: the continuation. margin: the smallest distance between the two best logits on the way."""

    tokens: list[int]
    margin: float


def greedy_golden(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> Golden:
    """`num_tokens` tokens by `generate`, the prompt alone in its batch; end-of-sequence tokens do not end it."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.cat(output.logits).topk(2, dim=-1).values
    return Golden(output.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).min().item())


class Reference:
    """A checkpoint under transformers, fp32, with a cache on disk: loaded only for what the cache lacks."""

    def __init__(self, directory: Path, cache: Path) -> None:
        self._directory = directory
        self._cache = cache
        config = (directory / "config.json").read_bytes()
        self._key = sha256(f"{transformers.__version__} {directory.name} ".encode() + config)

    @cached_property
    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self._directory, dtype=torch.float32).eval()

    def golden(self, prompt: Sequence[int], num_tokens: int) -> Golden:
        key = self._key.copy()
        key.update(f" {num_tokens} {list(prompt)}".encode())
        entry = self._cache / f"{key.hexdigest()}.json"
        if entry.is_file():
            return Golden(**json.loads(entry.read_text()))
        found = greedy_golden(self.model, prompt, num_tokens)
        partial = entry.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(found)))
        partial.rename(entry)
        return found
