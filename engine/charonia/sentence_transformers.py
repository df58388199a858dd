"""What the files of a sentence-transformers checkpoint say about its embeddings. Torch-free."""

import json
from pathlib import Path
from typing import Any

import msgspec

from charonia.errors import ModelLoadError
from charonia.hf_config import read_json_object
from charonia.pooling_params import PoolingConfig, PoolingType

_MODES: dict[str, PoolingType] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


class SentenceEncoder(msgspec.Struct, frozen=True, kw_only=True):
    """How a checkpoint embeds. max_length: tokens of a prompt, where it states a limit of its own."""

    pooling: PoolingConfig
    max_length: int | None = None


def read_sentence_encoder(directory: Path, config: dict[str, Any], default: PoolingType) -> SentenceEncoder:
    """Read modules.json and what it names; without it, pooling of the `default` type, normalised.

    config: the contents of config.json, which may list Matryoshka dimensions. Raises `ModelLoadError` for a step
    between hidden states and embedding that is not computed here, rather than leave it out.
    """
    sizes = _matryoshka_dimensions(config)
    path = directory / "modules.json"
    if not path.is_file():
        return SentenceEncoder(pooling=PoolingConfig(pooling_type=default, matryoshka_dimensions=sizes))
    pooling_type, normalize = default, False
    for kind, folder in _modules(path):
        match kind:
            case "Transformer":
                continue
            case "Pooling":
                pooling_type = _pooling_type(directory / folder / "config.json")
            case "Normalize":
                normalize = True
            case _:
                raise ModelLoadError(f"modules.json: modules of type {kind!r} are not supported")
    pooling = PoolingConfig(pooling_type=pooling_type, normalize=normalize, matryoshka_dimensions=sizes)
    return SentenceEncoder(pooling=pooling, max_length=_max_length(directory / "sentence_bert_config.json"))


def _modules(path: Path) -> list[tuple[str, str]]:
    """Class name and folder of each module, in order."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{str(path)!r} is no list of modules: {error!r}") from None
    for _, folder in modules:
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ModelLoadError(f"{str(path)!r} names {folder!r}, which is not in that directory")
    return modules


def _pooling_type(path: Path) -> PoolingType:
    values = read_json_object(path)
    wanted = [name for name, value in values.items() if name.startswith("pooling_mode_") and value is True]
    if len(wanted) != 1 or wanted[0] not in _MODES:
        described = ", ".join(wanted) or "none"
        raise ModelLoadError(
            f"{str(path)!r}: pooling modes {described}: exactly one of {', '.join(_MODES)} is taken"
        )
    return _MODES[wanted[0]]


def _max_length(path: Path) -> int | None:
    if not path.is_file():
        return None
    length = read_json_object(path).get("max_seq_length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise ModelLoadError(f"{str(path)!r}: 'max_seq_length' must be a positive integer, got {length!r}")
    return length


def _matryoshka_dimensions(config: dict[str, Any]) -> tuple[int, ...]:
    sizes = config.get("matryoshka_dimensions") or []
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise ModelLoadError("config.json: 'matryoshka_dimensions' must be a list of positive integers")
    return tuple(sorted(sizes))
