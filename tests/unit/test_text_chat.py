"""Chat templates: as transformers render them, and what hostile or careless input meets."""

import json
from typing import Any

import pytest
from charonia.entrypoints.default_model import ensure_default_model
from charonia.errors import InvalidRequestError, ModelLoadError, UnsupportedError
from charonia.text import Tokenizer, render_chat
from support.text_tokenizers import gpt2_like, smollm2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

USER = {"role": "user", "content": "Hi"}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": " Yes "}, USER],
    [{"role": "user", "content": "<b>&amp;</b> \"'{{ 7*7 }}' {% raw %} 日本 😀\n\n"}],
    [{"role": "user", "content": ""}],
]

TEMPLATES = {
    "llama2-like": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
        "{% endfor %}"
    ),
    "loops and namespaces": (
        "{%- set ns = namespace(n=0, last='') -%}\n{%- for m in messages -%}\n    {%- set ns.n = ns.n + 1 -%}\n"
        "    {%- if loop.last -%}{%- set ns.last = m.content -%}{%- endif -%}\n"
        "    {%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}\n"
        "{{ loop.index ~ '/' ~ loop.length ~ ':' ~ m.content }}\n{% endfor -%}\n{{ ns.n }} {{ ns.last }}"
    ),
    "macros and filters": (
        "{% macro show(m, n=2) %}<{{ m.role | upper }}|{{ m.content | replace('i', 'I') | indent(n) }}>{% endmacro %}"
        "{% for m in messages if m.role != 'system' %}{{ show(m) }}{% else %}none{% endfor %}"
        "{{ messages | map(attribute='role') | unique | join(', ') }} "
        "{{ '%s-%03d' % ('x', 7) }} {{ '{:>5}'.format('y') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ '-' * 5 }}{{ 2 ** 10 }}"
    ),
    "json": (
        "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}"
        "{% if tools %}{{ tools | tojson(indent=4) }}{% endif %}{{ dict(a=1) | tojson(separators=(',', ':')) }}"
    ),
    "generation blocks": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}{{ nothing }}{{ custom }}"
    ),
    "blocks": (
        "{% set head %}{% for m in messages %}{{ m.role }},{% endfor %}{% endset %}{{ head | length }}{{ head }}"
        "{% filter upper %}abc {{ head }}{% endfilter %}"
        "{% macro twice() %}{{ caller(1) }}{{ caller(2) }}{% endmacro %}{% call(x) twice() %}<{{ x }}>{% endcall %}"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ensure_default_model())


def with_template(template: str) -> Tokenizer:
    return Tokenizer(gpt2_like(), special_tokens={"bos_token": "<s>"}, chat_templates={"default": template})


def render(template: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    return render_chat(with_template(template), messages or [USER], **options)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
def test_the_default_models_template(
    chat: list[dict[str, Any]], add_generation_prompt: bool, reference: PreTrainedTokenizerFast
) -> None:
    options = {"add_generation_prompt": add_generation_prompt}
    expected = reference.apply_chat_template(chat, tokenize=False, **options)
    assert render_chat(smollm2(), chat, **options) == expected
    ids = reference.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
    assert smollm2().encode(expected, add_special_tokens=False) == ids


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("chat", [CHATS[0], CHATS[2]])
def test_the_idioms_of_templates(
    template: str, chat: list[dict[str, Any]], reference: PreTrainedTokenizerFast
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "ü", "parameters": {}}}]
    expected = reference.apply_chat_template(
        chat,
        tools,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
        bos_token="<s>",
        custom="!",
    )
    assert render(template, chat, tools=tools, chat_template_kwargs={"custom": "!"}) == expected


@pytest.mark.parametrize("final", ["Once upon", " padded ", ""])
@pytest.mark.parametrize("trims", [False, True])
def test_continue_final_message(final: str, trims: bool, reference: PreTrainedTokenizerFast) -> None:
    shown = "m.content | trim" if trims else "m.content"
    template = "{% for m in messages %}<{{ m.role }}>{{ " + shown + " }}</{{ m.role }}>\n{% endfor %}"
    chat = [USER, {"role": "assistant", "content": final}]
    expected = reference.apply_chat_template(
        chat, chat_template=template, tokenize=False, continue_final_message=True
    )
    assert render(template, chat, continue_final_message=True, add_generation_prompt=False) == expected
    assert chat[1]["content"] == final


def test_continue_final_message_needs_one() -> None:
    options = {"continue_final_message": True, "add_generation_prompt": False}
    with pytest.raises(InvalidRequestError, match="cannot both"):
        render("", continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="leaves that message out"):
        render("nothing", **options)
    with pytest.raises(InvalidRequestError, match="with text"):
        render("{% for p in messages[0].content %}{% endfor %}", [{"role": "user", "content": []}], **options)


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def test_text_parts_are_joined_for_templates_that_expect_a_string() -> None:
    template = "{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}"
    assert render(template, [{"role": "user", "content": PARTS}]) == "a\nb!"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}{% endfor %}",
        "{% set c = messages[0].content %}{% for p in c | list %}[{{ p['text'] }}]{% endfor %}",
    ],
)  # fmt: skip
def test_text_parts_are_kept_for_templates_that_read_them(template: str) -> None:
    assert render(template, [{"role": "user", "content": PARTS}]) == "[a][b]"


def test_tool_calls_with_arguments_as_text() -> None:
    template = "{% for c in messages[0].tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    for arguments in ('{"x": [1, "é"]}', {"x": [1, "é"]}):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        assert json.loads(render(template, [{"role": "assistant", "tool_calls": [call]}])) == {"x": [1, "é"]}


def test_named_templates() -> None:
    tokenizer = Tokenizer(gpt2_like(), chat_templates={"default": "D", "tool_use": "T"})
    assert render_chat(tokenizer, [USER]) == "D"
    assert render_chat(tokenizer, [USER], tools=[{"type": "function"}]) == "T"


def test_a_model_without_a_template() -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        render_chat(Tokenizer(gpt2_like()), [USER])


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("text", "'messages' must be a list"),
        ({}, "'messages' must be a list"),
        ([], "1 to 4096"),
        ([USER] * 4097, "1 to 4096"),
        ([USER, 3], r"messages\[1\] must be an object"),
        ([{"content": "x"}], r"messages\[0\]\.role"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "r" * 65, "content": "x"}], r"messages\[0\]\.role"),
        ([USER, {"role": "user"}], r"messages\[1\]\.content .* missing"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content .* int"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\] must be an object"),
        ([{"role": "user", "content": [{"text": "x"}]}], r"messages\[0\]\.content\[0\]\.type"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]\.text"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\]\.content .*surrogate"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]\.extra must be plain JSON"),
        ([{"role": "user", "content": "x", 5: 1}], r"a key of messages\[0\]"),
        ([{"role": "assistant", "tool_calls": 5}], r"messages\[0\]\.tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [5]}], r"messages\[0\]\.tool_calls\[0\]\.function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            r"tool_calls\[0\]\.function\.arguments must be a JSON",
        ),
    ],
)
def test_malformed_messages_are_named(messages: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        render_chat(with_template("{{ messages }}"), messages)


def test_images_are_unsupported() -> None:
    part = {"type": "image_url", "image_url": {"url": "http://x"}}
    with pytest.raises(UnsupportedError, match=r"messages\[0\]\.content\[1\].*'image_url'"):
        render("", [{"role": "user", "content": [PARTS[0], part]}])


def test_nesting_and_size_of_input_are_bounded() -> None:
    deep: Any = []
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="nested more than 32"):
        render("", [{"role": "user", "content": "x", "extra": deep}])
    with pytest.raises(InvalidRequestError, match="nested more than 32"):
        render("", tools=[{"deep": deep}])
    with pytest.raises(InvalidRequestError, match="larger than 1000"):
        render("", [{"role": "user", "content": "x" * 1001}], max_chars=1000)


@pytest.mark.parametrize("tools", [5, "x", {"a": 1}, [1], [{}] * 1025])
def test_malformed_tools(tools: Any) -> None:
    with pytest.raises(InvalidRequestError, match="tools"):
        render("", tools=tools)


@pytest.mark.parametrize(
    "kwargs",
    [{"chat_template": "{{ 1 }}"}, {"messages": []}, {"bos_token": "x"}, {"add_generation_prompt": 1}, {1: 2}, 5],
)  # fmt: skip
def test_clients_bring_no_template_and_no_reserved_variable(kwargs: Any) -> None:
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs"):
        render("x", chat_template_kwargs=kwargs)


def test_what_the_template_refuses() -> None:
    with pytest.raises(InvalidRequestError, match="no system here"):
        render("{{ raise_exception('no system here') }}")
    with pytest.raises(InvalidRequestError, match="'nothing' is undefined"):
        render("{{ nothing.at.all }}")


@pytest.mark.parametrize("template", ["{% if %}", "{{ x | no_such_filter }}", "{{ " + "(" * 5000 + "1"])
def test_broken_templates(template: str) -> None:
    with pytest.raises(ModelLoadError, match="chat template is invalid"):
        render(template)


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "nested loops": LOOPS,
    "filtered loops": "{% for i in range(99999) if (range(99999) | list | length) < 0 %}{% endfor %}",
    "recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for i in [60] recursive %}{% if i %}{{ loop([i - 1, i - 1]) }}{% endif %}{% endfor %}",
    "captured block": "{% set x %}" + LOOPS + "{% endset %}",
    "filter block": "{% filter upper %}" + LOOPS + "{% endfilter %}",
}  # fmt: skip


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS.keys())
def test_endless_templates_are_cut_off(template: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"took more than 0\.2 s"):
        render(template, seconds=0.2)


HUGE = [
    "{{ 'x' * 10**9 }}",
    "{{ 10**9 * 'x' }}",
    "{{ ['x' * 100000] * 100000 }}",
    "{{ (['x' * 100000] * 100000) | join }}",
    "{{ ('x' * 100000).join(['y'] * 100000) }}",
    "{{ (['x' * 100000] * 100000) | tojson }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x' | attr('center')(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ ('{0}' * 1000).format('x' * 100000) }}",
    "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "{{ ('\n' * 100000) | indent(100000) }}",
    "{{ 'x'.expandtabs(10**9) }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ 9 ** 99999 }}",
    "{{ strftime_now('%999999999Y') }}",
    "{{ ([range(99999)] * 99999) | map('list') | list }}",
    "{% set ns = namespace(s='xx') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{% set x %}{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
]


@pytest.mark.parametrize("template", HUGE)
def test_templates_that_would_fill_the_memory_are_refused(template: str) -> None:
    with pytest.raises(InvalidRequestError):
        render(template, max_chars=1 << 20)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ messages.append(1) }}",
        "{{ render.__globals__ }}",
        "{{ namespace(__html__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ '{0.__class__.__mro__}'.format('x') }}",
        "{{ ('x' | attr('__class__')).mro }}",
        "{{ lipsum() }}",
        "{% include 'other' %}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    with pytest.raises(InvalidRequestError):
        render(template)


def test_a_long_chat_is_within_the_budget() -> None:
    chat = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 150} for i in range(4096)]
    rendered = render_chat(smollm2(), chat, seconds=60)
    assert rendered.count("<|im_start|>") == 4096 + 2
