"""From an engine's configuration to a model ready to run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from charonia.config import EngineConfig
from charonia.model_config import ModelConfig
from charonia.models.bert import BertEncoder, bert
from charonia.models.decoder import CausalLM
from charonia.models.gemma3 import gemma3
from charonia.models.layers import WeightBuilder
from charonia.models.llama import llama
from charonia.models.qwen2 import qwen2
from charonia.models.qwen3 import qwen3
from charonia.models.weights import fill_random, load_safetensors

ARCHITECTURES: dict[str, Callable[[ModelConfig, WeightBuilder], CausalLM]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": llama,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Gemma3ForCausalLM": gemma3,
}
"""Language models. The keys are, with those of `ENCODERS`, `charonia.model_config.SUPPORTED_ARCHITECTURES`."""

ENCODERS: dict[str, Callable[[ModelConfig, WeightBuilder], BertEncoder]] = {"BertModel": bert}

ModelT = TypeVar("ModelT", CausalLM, BertEncoder)


@dataclass(frozen=True, slots=True)
class LoadedModel(Generic[ModelT]):
    """A model with its weights in place."""

    model: ModelT
    config: ModelConfig
    num_bytes: int
    """Memory of parameters and rotary tables."""


def load_model(
    engine: EngineConfig, config: ModelConfig, *, device: torch.device, dtype: torch.dtype
) -> LoadedModel[CausalLM]:
    """Build the model of `config` and fill it from `engine.model`, or randomly if the load format is `dummy`.

    Args:
        engine: directory, load format, seed; its `max_model_len` bounds the positions, else the model's own.
        config: of that directory, from `ModelConfig.from_dir`.
        device: where the weights go.
        dtype: of weights and activations.

    Raises:
        ModelLoadError: the checkpoint is missing, malformed, or not what its config.json says.
    """
    return _load(ARCHITECTURES[config.architecture], engine, config, device, dtype)


def load_encoder(
    engine: EngineConfig, config: ModelConfig, *, device: torch.device, dtype: torch.dtype
) -> LoadedModel[BertEncoder]:
    """As `load_model`, for an encoder."""
    return _load(ENCODERS[config.architecture], engine, config, device, dtype)


def _load(
    make: Callable[[ModelConfig, WeightBuilder], ModelT],
    engine: EngineConfig,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> LoadedModel[ModelT]:
    weights = WeightBuilder(
        dtype=dtype, device=device, max_positions=engine.max_model_len or config.max_position
    )
    model = make(config, weights)
    if engine.load_format == "dummy":
        fill_random(weights.slots, engine.seed)
    else:
        load_safetensors(Path(engine.model), weights.slots, weights.passed_over)
    return LoadedModel(model, config, weights.num_bytes)


def resolve_dtype(engine: EngineConfig, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations: the engine's, or the checkpoint's, fp32 if it states none.

    `auto` never picks float16 on a CPU, where bfloat16 is the quick one.
    """
    if engine.dtype != "auto":
        return _DTYPES[engine.dtype]
    name = config.dtype or "float32"
    if name == "float16" and device.type == "cpu":
        name = "bfloat16"
    return _DTYPES[name]


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
