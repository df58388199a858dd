"""Reads a Hugging Face tokenizer directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from charonia.errors import ModelLoadError


class TokenizerFiles(msgspec.Struct, frozen=True):
    """What the files of one directory say."""

    backend: Backend
    special_tokens: dict[str, str]
    """Text of each named special token (`bos_token`, ...)."""
    chat_templates: dict[str, str]
    """Templates by name; a sole template is "default"."""
    eos_token_ids: frozenset[int]
    """End-of-sequence tokens of the tokenizer and of the generation configuration."""


def read_tokenizer_files(directory: str | Path) -> TokenizerFiles:
    """Read a tokenizer with everything that belongs to it. Raises `ModelLoadError` that names the file at
    fault.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ModelLoadError(f"tokenizer directory {str(path)!r} does not exist")
    config = _read_json(path / "tokenizer_config.json")
    for key, value in _read_json(path / "special_tokens_map.json").items():
        config.setdefault(key, value)
    if (path / "tokenizer.json").is_file():
        backend = _load_backend(path / "tokenizer.json")
        _add_missing_tokens(backend, config)
    else:
        backend = _convert_with_transformers(path)
    backend.no_truncation()
    backend.no_padding()
    special_tokens = {name: token.content for name, token in _named_special_tokens(config).items()}
    return TokenizerFiles(
        backend=backend,
        special_tokens=special_tokens,
        chat_templates=_chat_templates(path, config),
        eos_token_ids=_eos_token_ids(path, backend, special_tokens),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file."""
    try:
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _load_backend(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(f"{path} is not a valid tokenizer: {error}") from error


def _convert_with_transformers(path: Path) -> Backend:
    """Build the backend from older files (tokenizer.model, vocab.json + merges.txt).

    The only place that needs transformers, and so possibly torch; hence the import in here.
    """
    try:
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        backend = converted.backend_tokenizer
    except Exception as error:  # anything may go wrong inside a converter
        raise ModelLoadError(
            f"{path} has no tokenizer.json and its tokenizer cannot be converted: {error}"
        ) from error
    if not isinstance(backend, Backend):
        raise ModelLoadError(f"{path} has no tokenizer.json and its tokenizer has no fast equivalent")
    return backend


def _as_added_token(value: Any, *, special: bool) -> AddedToken | None:
    """An added token from its text or from its serialised fields; None for anything else.

    special: whether the token is special at any rate; otherwise its fields say so.
    """
    if isinstance(value, str) and value:
        return AddedToken(value, special=special)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str) and value["content"]:
        flags = {
            name: bool(value[name])
            for name in ("single_word", "lstrip", "rstrip", "normalized")
            if name in value
        }
        return AddedToken(value["content"], special=special or bool(value.get("special")), **flags)
    return None


def _add_missing_tokens(backend: Backend, config: Mapping[str, Any]) -> None:
    """Register tokens that tokenizer_config.json knows and tokenizer.json does not, in transformers' order.

    Tokens of tokenizer.json stay as they are there, special or not.
    """
    wanted: list[AddedToken | None] = []
    added = config.get("added_tokens_decoder")
    if isinstance(added, Mapping):
        by_id = sorted((int(key), value) for key, value in added.items() if str(key).isdecimal())
        wanted.extend(_as_added_token(value, special=False) for _, value in by_id)
    wanted.extend(_named_special_tokens(config).values())
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(extra := config.get(key), list):
            wanted.extend(_as_added_token(value, special=isinstance(value, str)) for value in extra)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in wanted if token is not None and token.content not in known])


def _named_special_tokens(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    named: dict[str, Any] = {key: value for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        named.update(extra)
    tokens = {key: _as_added_token(value, special=True) for key, value in named.items()}
    return {key: token for key, token in tokens.items() if token is not None}


def _chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template files win over the entries of tokenizer_config.json, as in transformers."""
    templates: dict[str, str] = {}
    match config.get("chat_template"):
        case str(template):
            templates["default"] = template
        case list(entries):
            for entry in entries:
                match entry:
                    case {"name": str(name), "template": str(template)}:
                        templates[name] = template
                    case _:
                        raise ModelLoadError(
                            f"{path / 'tokenizer_config.json'}: malformed entry in 'chat_template'"
                        )
    files = {"default": path / "chat_template.jinja"}
    files.update({file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))})
    for name, file in files.items():
        try:
            templates[name] = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"{file} cannot be read: {error}") from error
    return templates


def _eos_token_ids(path: Path, backend: Backend, special_tokens: Mapping[str, str]) -> frozenset[int]:
    """The tokenizer's own end token and those of generation_config.json, or else of config.json."""
    found: set[int] = set()
    if (eos := backend.token_to_id(special_tokens.get("eos_token", ""))) is not None:
        found.add(eos)
    ids = _read_json(path / "generation_config.json").get("eos_token_id")
    if ids is None:
        config = _read_json(path / "config.json")
        text_config = config.get("text_config")
        ids = config.get(
            "eos_token_id", text_config.get("eos_token_id") if isinstance(text_config, Mapping) else None
        )
    found.update(
        value for value in (ids if isinstance(ids, list) else [ids]) if type(value) is int and value >= 0
    )
    return frozenset(found)
