"""Models: one file per architecture, their layers, and the loader of their weights."""

from charonia.models.attention import AttentionContext, AttentionSpec
from charonia.models.bert import BertEncoder
from charonia.models.decoder import CausalLM
from charonia.models.registry import LoadedModel, load_encoder, load_model, resolve_dtype

__all__ = [
    "AttentionContext",
    "AttentionSpec",
    "BertEncoder",
    "CausalLM",
    "LoadedModel",
    "load_encoder",
    "load_model",
    "resolve_dtype",
]
