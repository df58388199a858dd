"""Command-line flags of the engine, from the names, types, defaults and texts of `EngineConfig`."""

import argparse
import ast
import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from charonia.config import EngineConfig

_PREFIX = "engine_"
"""Of the attributes in the parsed namespace, so that no engine setting meets a flag of the command."""

_POSITIONAL = "model"


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting of the engine but the model itself, which is a positional argument."""
    group = parser.add_argument_group("engine settings", "as in 1/model.json; the engine's defaults apply")
    texts = _field_texts(EngineConfig)
    for field in msgspec.structs.fields(EngineConfig):
        options = None if field.name == _POSITIONAL else _value_options(field.type)
        if options is None:
            continue
        text = texts.get(field.name, "")
        default = "" if field.default is None else f"(default {field.default})"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=_PREFIX + field.name,
            default=argparse.SUPPRESS,
            help=f"{text} {default}".strip().replace("%", "%%") or None,
            **options,
        )


def engine_settings(namespace: argparse.Namespace) -> dict[str, object]:
    """The engine settings that were given on the command line, by their names in `EngineConfig`."""
    given: Mapping[str, object] = vars(namespace)
    return {name.removeprefix(_PREFIX): given[name] for name in given if name.startswith(_PREFIX)}


def _value_options(kind: Any) -> dict[str, Any] | None:
    """Argparse's options for one value of type `kind`; None for a setting that can only be left alone."""
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [option for option in get_args(kind) if option is not type(None)]
        return _value_options(kinds[0]) if len(kinds) == 1 else None
    if get_origin(kind) is Literal:
        return {"choices": list(get_args(kind))}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind in (int, float, str):
        return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
    return None


def _field_texts(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The string after each field of a class, which Python itself does not keep."""
    definition = ast.parse(inspect.getsource(struct)).body[0]
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, follower in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(follower, ast.Expr)
            and isinstance(follower.value, ast.Constant)
            and isinstance(follower.value.value, str)
        ):
            texts[field.target.id] = inspect.cleandoc(follower.value.value).replace("\n", " ")
    return texts
