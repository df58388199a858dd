"""A Jinja sandbox with a time and size budget, for chat templates that come with models.

Jinja's sandbox keeps templates away from Python's internals but lets them compute for ever or fill the
memory. Here every turn of a loop and every call of a macro passes a checkpoint, and operations that can make
much out of little (`"x" * n`, `~`, `join`, `replace`, formatting, ...) are refused before they run if their
result would be too large.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sized
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from charonia.errors import InvalidRequestError
from charonia.text.chat_budget import check_format, check_join, check_replace, current_budget

_MAX_INT_BITS = 1 << 12
# fmt: off
_FILTERS = frozenset((
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list",
    "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe",
    "select", "selectattr", "sort", "string", "sum", "title", "trim", "truncate", "unique", "upper",
    "urlencode", "wordcount",
))
# fmt: on
"""Jinja's filters, less those that no chat template needs and that can be made to consume much."""
_UNSAFE_METHODS = frozenset(("encode", "expandtabs", "maketrans", "translate"))
_PADDING_METHODS = frozenset(("center", "ljust", "rjust", "zfill"))
_WIDE_DATE_FIELD = re.compile(r"%[^a-zA-Z%]*\d{3}")


@jinja2.pass_context
def _finalize(_: Context, value: Any) -> Any:
    """Account for one printed expression. With the context, Jinja cannot do so while compiling."""
    budget = current_budget.get()
    if isinstance(value, str):
        budget.output(len(value))
    elif isinstance(value, Mapping | list | tuple):
        budget.check_contents(value)
    return value


def _checkpoint(_: Any, literal_chars: int) -> bool:
    current_budget.get().output(literal_chars)
    return True


def _concat(values: list[Any]) -> str:
    budget = current_budget.get()
    budget.check_contents(values)
    return "".join(map(str, values))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escaping of HTML, with the options that chat templates use."""
    current_budget.get().check_contents((value, separators), factor=1 + min(indent or 0, 16))
    return json.dumps(
        value,
        ensure_ascii=bool(ensure_ascii),
        indent=None if indent is None else min(indent, 16),
        separators=separators,
        sort_keys=bool(sort_keys),
    )


def _raise_exception(message: object) -> NoReturn:
    raise InvalidRequestError(f"the chat template refuses these messages: {str(message)[:1000]}")


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256 or _WIDE_DATE_FIELD.search(pattern):
        raise InvalidRequestError("the chat template asks for an overlong date")
    return datetime.now().strftime(pattern)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _PublicNamespace(Namespace):
    """A namespace without underscored attributes: Python and Jinja give those a meaning of their own."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _make_namespace(*args: Any, **kwargs: Any) -> _PublicNamespace:
    attributes = dict(*args, **kwargs)
    for name in attributes:
        _check_public(name)
    return _PublicNamespace(attributes)


def _check_public(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise InvalidRequestError("the chat template sets a private attribute of a namespace")


def _check_method(method: str, text: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse a call of a string's method whose result would be too large. Returns the arguments to call it
    with.
    """
    if method in _PADDING_METHODS and args and isinstance(args[0], int):
        current_budget.get().check_size(args[0])
    elif method == "replace" and len(args) >= 2:
        check_replace(text, str(args[0]), str(args[1]))
    elif method == "join" and args:
        values = list(args[0])
        check_join(text, values)
        return (values,)
    return args


def _checked(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that passes a checkpoint and accounts for the lists that it makes."""

    @wraps(filter_)  # keeps Jinja's marks on the function
    def checked(*args: Any, **kwargs: Any) -> Any:
        budget = current_budget.get()
        budget.checkpoint()
        result = filter_(*args, **kwargs)
        if isinstance(result, list):
            budget.output(len(result))
        return result

    return checked


def _guarded_filters(available: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    def join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            raise InvalidRequestError("the chat template joins by attribute, which is not available")
        values = [str(item) for item in value]
        check_join(str(d), values)
        return str(d).join(values)

    def replace(s: str, old: str, new: str, count: int | None = None) -> str:
        check_replace(str(s), str(old), str(new))
        return str(s).replace(str(old), str(new), -1 if count is None else count)

    def indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        size = width if isinstance(width, int) else len(width)
        current_budget.get().check_size(len(s) + (s.count("\n") + 1) * size)
        return do_indent(s, width, first, blank)

    def format_(value: str, *args: Any, **kwargs: Any) -> str:
        check_format(str(value), "%", (args, kwargs))
        return str(value) % (kwargs or args)

    def sum_(iterable: Iterable[float], start: float = 0) -> float:
        if not isinstance(start, int | float):
            raise InvalidRequestError("the chat template sums something other than numbers")
        return sum(iterable, start)

    filters = {name: _checked(available[name]) for name in _FILTERS}
    filters.update(join=join, replace=replace, indent=indent, format=format_, sum=sum_, tojson=_tojson)
    filters.update({_CHECKPOINT: _checkpoint, _CONCAT: _concat})
    return filters


# Templates cannot name filters that are not identifiers, nor replace a filter.
_CHECKPOINT = "checkpoint!"
_CONCAT = "concat!"


class _Instrument(NodeTransformer):
    """Puts a checkpoint into every loop and macro and before literal text, and `~` through a filter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - named by Jinja
        self.generic_visit(node)
        node.body = self._guarded(node, node.body)
        if node.test is not None:
            node.test = nodes.And(self._checkpoint(node, 0), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body = self._guarded(node, node.body)
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body = self._guarded(node, node.body)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node | list[nodes.Node]:  # noqa: N802
        self.generic_visit(node)
        literal_chars = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        if not literal_chars:
            return node
        return [nodes.ExprStmt(self._checkpoint(node, literal_chars), lineno=node.lineno), node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        operands = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(operands, _CONCAT, [], [], None, None, lineno=node.lineno)

    def _guarded(self, node: nodes.Node, body: list[nodes.Node]) -> list[nodes.Node]:
        return [nodes.ExprStmt(self._checkpoint(node, 0), lineno=node.lineno), *body]

    @staticmethod
    def _checkpoint(node: nodes.Node, literal_chars: int) -> nodes.Filter:
        arguments: list[nodes.Expr] = [nodes.Const(literal_chars)]
        return nodes.Filter(nodes.Const(None), _CHECKPOINT, arguments, [], None, None, lineno=node.lineno)


class _GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model wrote; here it is a plain scope."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates are written for, with every expensive operation guarded."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlocks, loopcontrols],
            finalize=_finalize,
            optimized=False,  # constants are not folded: folding would compute without a budget
        )
        self.filters = _guarded_filters(self.filters)
        self.globals.pop("lipsum")
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_make_dict,
            namespace=_make_namespace,
        )

    def compile_chat_template(self, source: str) -> jinja2.Template:
        """Compile with checkpoints. Raises `jinja2.TemplateSyntaxError`."""
        tree = _Instrument().visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also keep templates from methods that make much out of little."""
        if isinstance(obj, int | float | bytes) or (isinstance(obj, str) and attr in _UNSAFE_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandboxed stand-in for `str.format`, within the budget; None for anything else."""
        sandboxed = super().wrap_str_format(value)
        if sandboxed is None:
            return None

        def format_(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, "{", (args, kwargs))
            return sandboxed(*args, **kwargs)

        return format_

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call from template code, within the budget."""
        current_budget.get().checkpoint()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = _check_method(__obj.__name__, owner, args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator, within the budget."""
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
            if bits.get(operator, 0) > _MAX_INT_BITS:
                raise InvalidRequestError("the chat template computes with numbers that are too large")
        elif operator == "*":
            count, repeated = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and isinstance(repeated, Sized):
                current_budget.get().check_size(count * len(repeated))
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            current_budget.get().check_size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            check_format(left, "%", right)
        return super().call_binop(context, operator, left, right)
