"""Embeddings of decoders: transformers' hidden states, pooled, however a prompt is cut and whatever runs beside it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from charonia.outputs import FinishReason
from charonia.pooling_params import PoolingParams
from charonia.sampling_params import SamplingParams
from support.core_driver import CoreDriver
from support.tiny_models import save_tiny_model, tiny_model

LENGTHS = (1, 7, 16, 17, 33, 50)
"""Alone and together, some leave a single token for a last chunk of 16."""

SETTINGS = {"max_model_len": 64, "max_num_seqs": 8, "block_size": 8}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hidden_states(name: str) -> list[torch.Tensor]:
    model = tiny_model(name).model
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts()]


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama_states() -> list[torch.Tensor]:
    return hidden_states("llama")


@pytest.fixture
def driver(llama_dir: Path) -> Iterator[Callable[..., CoreDriver]]:
    made: list[CoreDriver] = []

    def make(**settings: object) -> CoreDriver:
        made.append(CoreDriver(llama_dir, **{**SETTINGS, **settings}))
        return made[-1]

    yield make
    for one in made:
        one.core.shutdown()


POOLED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "last": lambda states: states[-1],
    "mean": lambda states: states.mean(dim=0),
    "cls": lambda states: states[0],
}


def expected(kind: str, states: list[torch.Tensor], *, normalize: bool = False) -> torch.Tensor:
    vectors = torch.stack([POOLED[kind](item) for item in states])
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def embed(driver: CoreDriver, kind: str, *, normalize: bool = False) -> torch.Tensor:
    params = PoolingParams(pooling_type=kind, normalize=normalize)
    ids = [driver.add(prompt, 1, pooling=params) for prompt in prompts()]
    driver.drain()
    return vectors_of(driver, ids)


def vectors_of(driver: CoreDriver, ids: list[int]) -> torch.Tensor:
    for request_id in ids:
        sequel = driver.sequels[request_id]
        assert (sequel.finish_reason, sequel.token_ids) == (FinishReason.STOP, []), sequel.error
    return torch.tensor([driver.sequels[request_id].embedding for request_id in ids])


@pytest.mark.parametrize("budget", [512, 16], ids=["whole", "chunks of 16"])
def test_every_pooling_is_that_of_transformers(
    driver: Callable[..., CoreDriver], llama_states: list[torch.Tensor], budget: int
) -> None:
    one = driver(max_num_batched_tokens=budget)
    for kind in POOLED:
        torch.testing.assert_close(embed(one, kind), expected(kind, llama_states), atol=2e-5, rtol=2e-5)
    # By now the prompts are in the prefix cache; only the last token's state may use it.
    hits = one.core.stats().prefix_cache_hits
    assert hits == 0
    normed = embed(one, "last", normalize=True)
    torch.testing.assert_close(normed, expected("last", llama_states, normalize=True), atol=1e-5, rtol=1e-5)
    assert one.core.stats().prefix_cache_hits > 0
    hits = one.core.stats().prefix_cache_hits
    torch.testing.assert_close(embed(one, "mean"), expected("mean", llama_states), atol=2e-5, rtol=2e-5)
    assert one.core.stats().prefix_cache_hits == hits
    assert one.core.stats().generated_tokens == 0


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_other_decoders(name: str, tmp_path: Path) -> None:
    one = CoreDriver(save_tiny_model(name, tmp_path), **SETTINGS, max_num_batched_tokens=16)
    states = hidden_states(name)
    torch.testing.assert_close(embed(one, "last"), expected("last", states), atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(embed(one, "mean"), expected("mean", states), atol=5e-5, rtol=5e-5)
    one.core.shutdown()


def test_a_base_model_without_its_output_head(tmp_path: Path) -> None:
    """Embedding models are saved so: names without the prefix, the tied head left out."""
    model = tiny_model("llama-mha-tied")
    model.model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["LlamaForCausalLM"]}))
    one = CoreDriver(tmp_path, **SETTINGS)
    states = hidden_states("llama-mha-tied")
    torch.testing.assert_close(embed(one, "last"), expected("last", states), atol=5e-5, rtol=5e-5)
    one.core.shutdown()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_beside_generation_neither_notices_the_other(
    driver: Callable[..., CoreDriver], llama_states: list[torch.Tensor], asynchronous: bool
) -> None:
    one = driver(max_num_batched_tokens=24, async_scheduling=asynchronous)
    alone = [sequel.token_ids for sequel in one.run(prompts()[:4], 12)]
    fresh = driver(max_num_batched_tokens=24, async_scheduling=asynchronous)
    talking = [fresh.add(prompt, 12) for prompt in prompts()[:4]]
    kinds = [*POOLED, *POOLED]
    embedding = []
    for index, kind in enumerate(kinds):
        fresh.step()
        params = PoolingParams(pooling_type=kind, normalize=False)
        embedding.append(fresh.add(prompts()[index], 1, pooling=params))
    fresh.drain()
    assert [fresh.sequels[i].token_ids for i in talking] == alone
    wanted = torch.stack([POOLED[kind](state) for kind, state in zip(kinds, llama_states, strict=True)])
    torch.testing.assert_close(vectors_of(fresh, embedding), wanted, atol=2e-5, rtol=2e-5)


def test_a_preempted_prompt_is_pooled_from_the_start(
    driver: Callable[..., CoreDriver], llama_states: list[torch.Tensor]
) -> None:
    one = driver(
        max_num_batched_tokens=9, num_kv_blocks_override=9, scheduling_policy="priority", max_num_seqs=4
    )
    params = PoolingParams(pooling_type="mean", normalize=False)
    embedding = one.add(prompts()[-1], 1, pooling=params, priority=5)
    for _ in range(3):
        one.step()
    one.add(prompts()[4], 8, SamplingParams(temperature=0.0, ignore_eos=True), priority=0)
    one.drain()
    assert one.core.stats().preemptions > 0
    torch.testing.assert_close(
        vectors_of(one, [embedding])[0], POOLED["mean"](llama_states[-1]), atol=2e-5, rtol=2e-5
    )


def test_a_prompt_may_fill_the_context_and_the_cache(driver: Callable[..., CoreDriver]) -> None:
    one = driver(num_kv_blocks_override=8, max_num_batched_tokens=16)
    vector = one.add([5] * 64, 1, pooling=PoolingParams(pooling_type="last"))
    one.drain()
    assert vectors_of(one, [vector]).shape == (1, 64)


def test_dimensions_are_cut_before_the_vector_is_normalised(
    driver: Callable[..., CoreDriver], llama_states: list[torch.Tensor]
) -> None:
    one = driver()
    vector = one.add(
        prompts()[1], 1, pooling=PoolingParams(pooling_type="last", normalize=True, dimensions=5)
    )
    one.drain()
    wanted = torch.nn.functional.normalize(llama_states[1][-1][:5], dim=0)
    torch.testing.assert_close(vectors_of(one, [vector])[0], wanted, atol=1e-5, rtol=1e-5)


def test_aborts_and_deadlines(driver: Callable[..., CoreDriver]) -> None:
    one = driver(max_num_batched_tokens=8)
    params = PoolingParams(pooling_type="mean", normalize=True)
    cancelled = one.add(prompts()[-1], 1, pooling=params)
    late = one.add(prompts()[-1], 1, pooling=params, deadline=0.0)
    one.step()
    one.core.abort(cancelled)
    one.drain()
    assert one.sequels[cancelled].finish_reason is FinishReason.ABORT
    assert one.sequels[late].finish_reason is FinishReason.ABORT
    assert one.sequels[late].error == "deadline exceeded"


def test_hidden_states_that_are_not_finite_end_that_request_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[300] = torch.inf
    model.save_pretrained(tmp_path)
    one = CoreDriver(tmp_path, **SETTINGS)
    params = PoolingParams(pooling_type="last", normalize=True)
    broken = one.add([7, 300], 1, pooling=params)
    fine = one.add([7, 8], 1, pooling=params)
    one.drain()
    assert one.sequels[broken].finish_reason is FinishReason.ERROR
    assert "not finite" in (one.sequels[broken].error or "")
    vectors_of(one, [fine])
    one.core.shutdown()
