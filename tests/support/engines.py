"""Small engines for tests that are about processes, not about models."""

import json
import shutil
from pathlib import Path

from charonia.entrypoints.default_model import ensure_default_model


def tiny_model_dir(path: Path) -> Path:
    """A random Llama of a few layers with SmolLM2's tokenizer, to be loaded with `load_format="dummy"`."""
    path.mkdir(parents=True, exist_ok=True)
    source = ensure_default_model()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        shutil.copy(source / name, path / name)
    config = json.loads((source / "config.json").read_text())
    config.update(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    (path / "config.json").write_text(json.dumps(config))
    return path
