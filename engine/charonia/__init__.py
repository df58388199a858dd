"""Charonia: large language models served inside NVIDIA Triton Inference Server.

The public names are loaded when first used, so that a frontend which only tokenises never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charonia.config import EngineConfig
    from charonia.entrypoints.llm import LLM
    from charonia.errors import CharoniaError
    from charonia.outputs import CompletionOutput, EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
    from charonia.pooling_params import PoolingParams
    from charonia.sampling_params import SamplingParams
    from charonia.serving.async_engine import AsyncEngine
    from charonia.serving.request import ChatInput, EmbeddingRequest, GenerationRequest
    from charonia.structured_params import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "CharoniaError",
    "ChatInput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequest",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "GenerationRequest",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]

_HOMES = {
    "LLM": "charonia.entrypoints.llm",
    "AsyncEngine": "charonia.serving.async_engine",
    "CharoniaError": "charonia.errors",
    "ChatInput": "charonia.serving.request",
    "CompletionOutput": "charonia.outputs",
    "EmbeddingOutput": "charonia.outputs",
    "EmbeddingRequest": "charonia.serving.request",
    "EmbeddingRequestOutput": "charonia.outputs",
    "EngineConfig": "charonia.config",
    "GenerationRequest": "charonia.serving.request",
    "PoolingParams": "charonia.pooling_params",
    "RequestOutput": "charonia.outputs",
    "SamplingParams": "charonia.sampling_params",
    "StructuredOutputsParams": "charonia.structured_params",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'charonia' has no attribute {name!r}")
    return getattr(import_module(home), name)
