"""An engine without frontends: token ids in, token ids out, with a say in when requests come and go."""

import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from charonia.config import EngineConfig
from charonia.model_config import ModelConfig
from charonia.outputs import FinishReason, TokenLogprobs
from charonia.request import EngineRequest
from charonia.sampling_params import SamplingParams
from charonia.serving.engine_builder import build_engine


@dataclass
class Sequel:
    """What has come of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int | None = None
    embedding: list[float] | None = None


class CoreDriver:
    """An `EngineCore` of fp32 on two threads, and the sequels of its requests by id."""

    def __init__(self, model_dir: Path, **settings: Any) -> None:
        config = EngineConfig(model=str(model_dir), dtype="float32", cpu_threads=2, **settings)
        self.core, _ = build_engine(config, ModelConfig.from_dir(model_dir))
        self.sequels: dict[int, Sequel] = {}

    def add(
        self, prompt: Sequence[int], max_tokens: int, sampling: SamplingParams | None = None, **fields: Any
    ) -> int:
        """Queue a request, greedy unless `sampling` says otherwise; returns its id."""
        request_id = len(self.sequels)
        self.sequels[request_id] = Sequel()
        self.core.add(
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=list(prompt),
                sampling=sampling or SamplingParams(temperature=0.0),
                max_tokens=max_tokens,
                arrival_time=time.monotonic(),
                **{"seed": 0, **fields},
            )
        )
        return request_id

    def step(self) -> None:
        for delta in self.core.step():
            sequel = self.sequels[delta.request_id]
            assert sequel.finish_reason is None, "a request ends once"
            sequel.token_ids += delta.token_ids
            sequel.logprobs += delta.logprobs or []
            sequel.prompt_logprobs += delta.prompt_logprobs or []
            sequel.finish_reason = delta.finish_reason
            sequel.error = delta.error
            if delta.embedding is not None:
                sequel.embedding = list(array("f", delta.embedding))
            if delta.num_cached_tokens is not None:
                sequel.num_cached_tokens = delta.num_cached_tokens

    def drain(self) -> None:
        """Run until nothing is left, and check that nothing is."""
        while self.core.has_work:
            self.step()
        stats = self.core.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert all(sequel.finish_reason is not None for sequel in self.sequels.values())

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Sequel]:
        """All prompts at once; their sequels in order."""
        ids = [self.add(prompt, max_tokens) for prompt in prompts]
        self.drain()
        return [self.sequels[i] for i in ids]

    def run_staggered(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, rng: random.Random, *, doomed: float = 0.0
    ) -> list[Sequel]:
        """Prompts in random order, a few a step, sequels in the order of `prompts`.

        doomed: share of further requests that come in between and are cancelled at random moments.
        """
        order = list(range(len(prompts)))
        rng.shuffle(order)
        ids: dict[int, int] = {}
        victims: list[int] = []
        while order or self.core.has_work:
            for _ in range(rng.randrange(4)):
                if order:
                    index = order.pop()
                    ids[index] = self.add(prompts[index], max_tokens)
                if order and rng.random() < doomed:
                    prompt = prompts[rng.randrange(len(prompts))]
                    victims.append(self.add(prompt[: rng.randrange(len(prompt)) + 1], max_tokens))
            self.step()
            if victims and rng.random() < 0.4:
                self.core.abort(victims.pop(rng.randrange(len(victims))))
        self.drain()
        return [self.sequels[ids[i]] for i in range(len(prompts))]
