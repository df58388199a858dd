"""Chat messages to prompt text, through the model's own Jinja template."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import msgspec
from jinja2 import nodes

from charonia.errors import InvalidRequestError, ModelLoadError
from charonia.text.chat_budget import RenderBudget, current_budget
from charonia.text.chat_messages import check_json, check_messages
from charonia.text.chat_sandbox import ChatEnvironment
from charonia.text.tokenizer import Tokenizer

RENDER_SECONDS = 2.0
MAX_RENDERED_CHARS = 4 << 20
_MAX_TEMPLATE_CHARS = 1 << 20
_MAX_TOOLS = 1024
_RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
_END_OF_FINAL_MESSAGE = "\ue000end-of-final-message\ue001"


class _CompiledTemplate(msgspec.Struct, frozen=True):
    template: jinja2.Template
    reads_parts: bool
    """Whether the template goes through lists of content parts itself, rather than taking content for a
    string.
    """


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seconds: float = RENDER_SECONDS,
    max_chars: int = MAX_RENDERED_CHARS,
) -> str:
    """The prompt for a chat, special tokens written out: encode it with `add_special_tokens=False`.

    add_generation_prompt: end with the beginning of an assistant's message. continue_final_message: end
    inside the final message instead, to have it continued. chat_template_kwargs: further variables of the
    template. seconds, max_chars: caps on the rendering; past them `InvalidRequestError` is raised, as for
    malformed messages, for a model without a template, and for what the template itself refuses.
    `UnsupportedError`: images and other media. Computes for up to `seconds`: keep it off event loops.
    """
    source = tokenizer.chat_template(with_tools=tools is not None)
    if source is None:
        raise InvalidRequestError("this model has no chat template: send text instead of messages")
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError("'continue_final_message' and 'add_generation_prompt' cannot both be true")
    compiled = _compile(source)
    variables = _check_variables(chat_template_kwargs, tokenizer.special_tokens)
    chat = check_messages(messages, keep_parts=compiled.reads_parts, max_chars=max_chars)
    if continue_final_message:
        _mark_final_message(chat)
    variables.update(
        messages=chat,
        tools=_check_tools(tools, max_chars),
        documents=None,
        add_generation_prompt=add_generation_prompt,
    )
    rendered = _render(compiled.template, variables, RenderBudget(seconds, max_chars))
    return _cut_final_message(rendered) if continue_final_message else rendered


def _check_variables(given: Mapping[str, Any] | None, special_tokens: Mapping[str, str]) -> dict[str, Any]:
    variables: dict[str, Any] = dict(special_tokens)
    if given is None:
        return variables
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"'chat_template_kwargs' must be an object, got {type(given).__name__}")
    if "chat_template" in given:
        raise InvalidRequestError(
            "'chat_template_kwargs' must not bring a chat template: the model's own is used"
        )
    for name in given:
        if not isinstance(name, str) or name in _RESERVED or name in special_tokens:
            raise InvalidRequestError(f"'chat_template_kwargs' must not set {str(name)[:40]!r}")
    variables.update(check_json(dict(given), "chat_template_kwargs"))
    return variables


def _check_tools(tools: object, max_chars: int) -> list[Any] | None:
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str) or len(tools) > _MAX_TOOLS:
        raise InvalidRequestError(f"'tools' must be a list of at most {_MAX_TOOLS} objects")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequestError(f"tools[{i}] must be an object, got {type(tool).__name__}")
    checked: list[Any] = check_json(list(tools), "tools", max_chars=max_chars)
    return checked


@lru_cache(maxsize=16)
def _compile(source: str) -> _CompiledTemplate:
    if len(source) > _MAX_TEMPLATE_CHARS:
        raise ModelLoadError(f"the model's chat template is larger than {_MAX_TEMPLATE_CHARS} characters")
    environment = ChatEnvironment()
    try:
        reads_parts = _reads_parts(environment.parse(source))
        return _CompiledTemplate(environment.compile_chat_template(source), reads_parts)
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
        raise ModelLoadError(f"the model's chat template is invalid: {str(error)[:300]}") from error


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether some loop runs over a message's content, directly or through a variable set from it."""

    def is_content(node: nodes.Node | None) -> bool:
        match node:
            case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
                return True
            case nodes.Name():
                return node.name in aliases
            case nodes.Filter():
                return is_content(node.node)
        return False

    aliases: set[str] = set()
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and is_content(assignment.node):
            aliases.add(assignment.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _render(template: jinja2.Template, variables: Mapping[str, Any], budget: RenderBudget) -> str:
    pieces: list[str] = []
    size = 0
    token = current_budget.set(budget)
    try:
        for piece in template.generate(variables):
            size += len(piece)
            budget.check_size(size)
            pieces.append(piece)
    except InvalidRequestError:
        raise
    except Exception as error:  # a template may fail in any way on messages that it does not foresee
        cause = f"{type(error).__name__}: {str(error)[:300]}"
        raise InvalidRequestError(f"the chat template fails on these messages: {cause}") from error
    finally:
        current_budget.reset(token)
    return "".join(pieces)


def _mark_final_message(chat: list[dict[str, Any]]) -> None:
    """Append a marker to the final message's last text, so that its end can be found in the rendered chat.

    The marker is followed by a space, which tells whether the template trims messages.
    """
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _END_OF_FINAL_MESSAGE + " "
    elif content:
        content[-1]["text"] += _END_OF_FINAL_MESSAGE + " "
    else:
        raise InvalidRequestError("'continue_final_message' needs a final message with text")


def _cut_final_message(rendered: str) -> str:
    end = rendered.rfind(_END_OF_FINAL_MESSAGE)
    if end < 0:
        raise InvalidRequestError("'continue_final_message': the chat template leaves that message out")
    trims = rendered[end + len(_END_OF_FINAL_MESSAGE) :][:1] != " "
    return rendered[:end].rstrip() if trims else rendered[:end]
