"""The loader: fused placement, shards, casts, random weights, and every way in which a checkpoint can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from charonia.config import EngineConfig
from charonia.errors import ModelLoadError
from charonia.model_config import ModelConfig
from charonia.models import CausalLM, load_model
from charonia.models.layers import WeightBuilder, WeightSlot
from charonia.models.weights import fill_random, load_safetensors
from safetensors.torch import load_file, save_file
from support.tiny_models import save_tiny_model

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def load(directory: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> CausalLM:
    engine = EngineConfig(model=str(directory), **settings)
    return load_model(engine, ModelConfig.from_dir(directory), device=CPU, dtype=dtype).model


def parameters(model: CausalLM) -> list[torch.Tensor]:
    layers = []
    for layer in model.layers:
        linears = (
            layer.attention.qkv_proj,
            layer.attention.o_proj,
            layer.mlp.gate_up_proj,
            layer.mlp.down_proj,
        )
        layers += [linear.weight for linear in linears]
        layers += [linear.bias for linear in linears if linear.bias is not None]
        layers += [layer.input_norm.weight, layer.mlp_norm.weight]
    return [model.embed_tokens.weight, *layers, model.norm.weight, model.lm_head.weight]


def assert_same(one: CausalLM, other: CausalLM) -> None:
    for a, b in zip(parameters(one), parameters(other), strict=True):
        assert torch.equal(a, b)


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors; `__` in a keyword stands for a dot."""
    path = directory / "model.safetensors"
    tensors: dict[str, torch.Tensor | None] = {
        name: tensor.clone() for name, tensor in load_file(path).items()
    }
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def error_of(directory: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(directory)
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tiny_model("llama-mqa-biases", tmp_path)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return save_tiny_model("llama-mha-tied", tmp_path)


def test_fused_parameters_hold_their_parts_in_order(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    model = load(checkpoint)
    for index, layer in enumerate(model.layers):
        for kind in ("weight", "bias"):
            attention, mlp = (f"model.layers.{index}.{block}" for block in ("self_attn", "mlp"))
            qkv = torch.cat([tensors[f"{attention}.{name}_proj.{kind}"] for name in "qkv"])
            gate_up = torch.cat([tensors[f"{mlp}.{name}_proj.{kind}"] for name in ("gate", "up")])
            assert torch.equal(getattr(layer.attention.qkv_proj, kind), qkv)
            assert torch.equal(getattr(layer.mlp.gate_up_proj, kind), gate_up)
            assert torch.equal(getattr(layer.attention.o_proj, kind), tensors[f"{attention}.o_proj.{kind}"])
            assert torch.equal(getattr(layer.mlp.down_proj, kind), tensors[f"{mlp}.down_proj.{kind}"])
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_sharded_is_single_file(tmp_path: Path) -> None:
    single = save_tiny_model("llama-mqa-biases", tmp_path / "single")
    sharded = save_tiny_model("llama-mqa-biases", tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    assert not (sharded / "model.safetensors").exists()
    assert_same(load(single), load(sharded))


def test_a_tensor_outside_the_index_is_not_read(tmp_path: Path) -> None:
    directory = save_tiny_model("llama-mqa-biases", tmp_path, max_shard_size="60KB")
    shard = next(directory.glob("model-00001*.safetensors"))
    save_file({**load_file(shard), "stray": torch.zeros(1)}, shard)
    load(directory)


def test_cast_to_the_asked_dtype(checkpoint: Path) -> None:
    exact, cast = parameters(load(checkpoint)), parameters(load(checkpoint, torch.bfloat16))
    for a, b in zip(exact, cast, strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.to(torch.bfloat16), b)


def test_gemma_norms_get_their_one_back_in_fp32(tmp_path: Path) -> None:
    directory = save_tiny_model("gemma3", tmp_path)
    stored = load_file(directory / "model.safetensors")["model.norm.weight"]
    model = load(directory, torch.bfloat16)
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.norm.weight, stored + 1.0)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_tied_head_is_the_embedding(tied: Path) -> None:
    model = load(tied)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_tied_head_may_be_repeated_but_not_differ(tied: Path) -> None:
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tied, lm_head__weight=embedding.clone())
    load(tied)
    rewrite(tied, lm_head__weight=embedding + 1)
    message = error_of(tied)
    assert "lm_head.weight" in message
    assert "tie_word_embeddings" in message


def test_derived_tensors_are_ignored(checkpoint: Path) -> None:
    before = load(checkpoint)
    rewrite(checkpoint, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    assert_same(before, load(checkpoint))


def test_missing_tensors_are_named(checkpoint: Path) -> None:
    rewrite(checkpoint, model__layers__1__mlp__up_proj__weight=None, lm_head__weight=None)
    message = error_of(checkpoint)
    assert "lacks 2 tensors: model.layers.1.mlp.up_proj.weight, lm_head.weight" in message


def test_a_few_of_many_missing_tensors_are_named(checkpoint: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(320, 64)}, checkpoint / "model.safetensors")
    message = error_of(checkpoint)
    assert "lacks 50 tensors: " in message
    assert message.endswith(" and 46 more")


def test_unexpected_tensors_are_named(checkpoint: Path) -> None:
    rewrite(checkpoint, model__layers__3__mlp__up_proj__weight=torch.zeros(96, 64))
    assert "unexpected 1 tensor: model.layers.3.mlp.up_proj.weight" in error_of(checkpoint)


def test_misshaped_tensor_is_named_with_both_shapes(checkpoint: Path) -> None:
    rewrite(checkpoint, model__layers__2__self_attn__k_proj__weight=torch.zeros(32, 64))
    message = error_of(checkpoint)
    assert "model.layers.2.self_attn.k_proj.weight" in message
    assert "[32, 64]" in message
    assert "[16, 64]" in message


def test_a_shape_that_would_broadcast_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, model__norm__weight=torch.zeros(1))
    assert "model.norm.weight" in error_of(checkpoint)


def test_integer_tensor_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, model__norm__weight=torch.zeros(64, dtype=torch.int8))
    assert "torch.int8" in error_of(checkpoint)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000])
def test_truncated_file_is_named(checkpoint: Path, kept: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = error_of(checkpoint)
    assert "model.safetensors" in message
    assert "truncated" in message


def test_no_weights_at_all(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in error_of(checkpoint)


def test_pickled_weights_are_refused_unread(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"never opened")
    message = error_of(checkpoint)
    assert "pytorch_model.bin" in message
    assert "safetensors only" in message


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ("{", "index.json"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "lacks"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
        ('{"weight_map": {"a": "../single.safetensors"}}', "../single.safetensors"),
        ('{"weight_map": {"a": 3}}', "'3'"),
    ],
)
def test_bad_index_is_refused(checkpoint: Path, index: str, named: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "single.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(index)
    assert named in error_of(checkpoint)


def test_tensor_that_the_index_misplaces_is_named(tmp_path: Path) -> None:
    directory = save_tiny_model("llama-mqa-biases", tmp_path, max_shard_size="60KB")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][name] = files[1]
    path.write_text(json.dumps(index))
    message = error_of(directory)
    assert name in message
    assert files[1] in message


def test_dummy_weights_depend_on_the_seed_alone(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    one, again, other = (load(checkpoint, load_format="dummy", seed=seed) for seed in (3, 3, 4))
    assert_same(one, again)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_dummy_weights_have_a_sensible_scale() -> None:
    """Matrices keep the scale of what they multiply; no two are alike; norms are ones and biases zeros."""
    weights = WeightBuilder(dtype=torch.bfloat16, device=CPU, max_positions=8)
    linear = weights.linear("mlp", 256, {"gate_proj": 200, "up_proj": 200}, bias=True)
    norm = weights.norm("norm", 256, 1e-6, plus_one=True)
    fill_random(weights.slots, seed=0)
    gate, up = linear.weight.float().chunk(2)
    assert gate.std() * 256**0.5 == pytest.approx(1.0, rel=0.05)
    assert not torch.equal(gate, up)
    assert torch.equal(norm.weight, torch.ones(256))
    assert linear.bias is not None
    assert not linear.bias.any()


def test_dummy_model_builds_every_slot_that_the_checkpoint_has(tmp_path: Path) -> None:
    """What `dummy` fills is what a checkpoint would: only then do benchmarks time the same model."""
    directory = save_tiny_model("qwen3-biases-yarn", tmp_path)
    model = load(directory, load_format="dummy")
    stored = load_file(directory / "model.safetensors")
    assert model.embed_tokens.weight.isfinite().all()
    assert sum(t.numel() for t in parameters(model)) + sum(
        t.numel() for name, t in stored.items() if "_norm.weight" in name
    ) == sum(t.numel() for t in stored.values())


def test_slots_are_written_in_place(tmp_path: Path) -> None:
    """The loader copies into the views that it is given: there is no second copy of a parameter."""
    fused = torch.zeros(5, 4)
    save_file({"a": torch.ones(2, 4), "b": torch.full((3, 4), 2.0)}, tmp_path / "model.safetensors")
    load_safetensors(tmp_path, [WeightSlot("a", fused[:2]), WeightSlot("b", fused[2:], offset=0.5)])
    assert fused[:, 0].tolist() == [1.0, 1.0, 2.5, 2.5, 2.5]
