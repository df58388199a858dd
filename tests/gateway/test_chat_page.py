"""The chat page in a headless browser."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from gateway.scripted_chat import ScriptedChat, serving
from playwright.sync_api import Browser, Page, Route, ViewportSize, expect
from support.browser import launched_browser
from support.fake_triton import FakeRequest, FakeTriton, ModelError

PATIENCE_S = 15
PHONE: ViewportSize = {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE_S * 1000)
    with launched_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[ScriptedChat, str]]:
    chat = ScriptedChat()
    with serving(chat.app) as address:
        yield chat, address


@pytest.fixture
def chat(server: tuple[ScriptedChat, str]) -> ScriptedChat:
    chat, _ = server
    chat.bodies.clear()
    chat.authorizations.clear()
    chat.disconnected.clear()
    return chat


@contextmanager
def opened(browser: Browser, address: str) -> Iterator[Page]:
    """The page in a fresh profile; fails if anything in it went wrong."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_S * 1000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if "Security Policy" in line.text else None)
    page.goto(address)
    expect(page.get_by_label("Model")).to_be_enabled()
    yield page
    context.close()
    assert problems == []


@pytest.fixture
def page(browser: Browser, server: tuple[ScriptedChat, str], chat: ScriptedChat) -> Iterator[Page]:
    with opened(browser, server[1]) as page:
        yield page


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def answered(page: Page, text: str) -> None:
    ask(page, text)
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


def test_an_answer_streams_in_with_its_figures(page: Page, chat: ScriptedChat) -> None:
    ask(page, "slow")
    expect(page.locator(".assistant .text")).to_have_text("You said: slow")
    stats = page.locator(".stats")
    expect(stats).to_contain_text("21 tokens")
    expect(stats).to_contain_text("tokens/s")
    expect(stats).to_contain_text("first token after 0.")
    (body,) = chat.bodies
    assert body == {
        "model": "small",
        "messages": [{"role": "user", "content": "slow"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert chat.authorizations == [None]
    ask(page, "more")
    expect(page.locator(".assistant .text").last).to_have_text("You said: more")
    assert [message["content"] for message in chat.bodies[1]["messages"]] == [
        "slow",
        "You said: slow",
        "more",
    ]


def test_stop_aborts_the_request_and_keeps_what_came(page: Page, chat: ScriptedChat) -> None:
    ask(page, "endless")
    answer = page.locator(".assistant")
    expect(answer.locator(".text")).to_contain_text("0 1 2 3")
    expect(answer).to_have_attribute("aria-busy", "true")
    page.get_by_role("button", name="Stop").click()
    assert chat.disconnected.wait(PATIENCE_S), "the server goes on"
    expect(page.locator(".stats")).to_contain_text("stopped")
    expect(answer).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_label("Message")).to_be_focused()


def test_escape_stops_too(page: Page, chat: ScriptedChat) -> None:
    ask(page, "endless")
    expect(page.locator(".assistant .text")).to_contain_text("0 1")
    page.keyboard.press("Escape")
    assert chat.disconnected.wait(PATIENCE_S)
    expect(page.locator(".stats")).to_contain_text("stopped")


def test_settings_reach_the_request_and_outlive_a_reload(page: Page, chat: ScriptedChat) -> None:
    page.get_by_label("Model").select_option("large")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Max tokens").fill("64")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    answered(page, "hello")
    page.reload()
    expect(page.locator(".assistant .text")).to_have_text("You said: hello")
    expect(page.get_by_label("Model")).to_have_value("large")
    answered(page, "again")
    body = chat.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [body[key] for key in ("model", "temperature", "top_p", "max_tokens")] == ["large", 0.5, 0.9, 64]
    assert chat.authorizations == ["Bearer secret"] * 2
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_setting_out_of_range_is_not_sent(page: Page, chat: ScriptedChat) -> None:
    page.get_by_label("Max tokens").fill("0")
    ask(page, "hello")
    expect(page.get_by_label("Max tokens")).to_be_focused()
    assert chat.bodies == []
    expect(page.get_by_label("Message")).to_have_value("hello")


def test_what_the_model_writes_is_never_markup(page: Page) -> None:
    answered(page, "inject")
    text = page.locator(".assistant .text")
    expect(text).to_contain_text("<img src=x onerror=\"document.title='hacked'\"><script>")
    expect(text).to_contain_text("[link](javascript:alert(1))")
    expect(text.locator("pre")).to_have_text('<iframe src="/"></iframe>')
    expect(text.locator("strong")).to_have_text("bold")
    assert text.locator("img, script, iframe, b, a").count() == 0
    assert page.title() == "Charonia chat"
    page.reload()
    expect(text.locator("pre")).to_have_text('<iframe src="/"></iframe>')
    assert text.locator("img, script, iframe, b, a").count() == 0


def test_markdown(page: Page) -> None:
    answered(page, "markdown")
    text = page.locator(".assistant .text")
    expect(text.locator("h3")).to_have_text("Sea snails")
    assert text.locator("ul li").all_text_contents() == ["Charonia tritonis", "Charonia variegata"]
    assert text.locator("ol li").all_text_contents() == ["first", "second"]
    expect(text.locator("pre code")).to_contain_text("def blow(trumpet):\n    return")
    expect(text.locator("p").last).to_have_text("Call blow(1) and 2 * 3 * 4 stays.")


def test_markdown_that_streams_in_equals_markdown_at_once(page: Page) -> None:
    page.evaluate(
        """async () => {
            const { showMarkdown } = await import("/chat/markdown.js");
            const text =
                "# a\\n\\n- *b*\\n  c\\n- d\\n\\n1. e\\n\\n```js\\nf\\n\\n`g`\\n```\\n"
                + "> h\\ni **j** `k`\\n\\n***\\n** l *";
            const piecewise = document.createElement("div");
            for (let end = 0; end <= text.length; end += 1) {
                showMarkdown(piecewise, text.slice(0, end));
                const whole = document.createElement("div");
                showMarkdown(whole, text.slice(0, end));
                if (!whole.isEqualNode(piecewise)) throw new Error(`differs at ${end}`);
            }
        }"""
    )


def test_reasoning_can_be_folded_out(page: Page) -> None:
    answered(page, "think")
    reasoning = page.locator("details")
    expect(reasoning.locator("div")).not_to_be_visible()
    reasoning.locator("summary").click()
    expect(reasoning.locator("div")).to_have_text("I weigh it.")
    answered(page, "hello")
    expect(page.locator("details").last).not_to_be_visible()


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("refuse", "Error 400: max_tokens must be at most 8192"),
        ("busy", "Error 429: The queue is full\nTry again in 7 s."),
        ("break", "The engine died"),
        ("vanish", "The connection ended before the answer was complete."),
    ],
)
def test_errors_are_shown(page: Page, asked: str, shown: str) -> None:
    answered(page, asked)
    expect(page.locator(".assistant").get_by_role("alert")).to_have_text(shown)
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_a_question_without_an_answer_is_no_turn(page: Page, chat: ScriptedChat) -> None:
    """Two questions in a row are more than some chat templates take."""
    answered(page, "hello")
    answered(page, "refuse")
    answered(page, "again")
    assert [message["content"] for message in chat.bodies[-1]["messages"]] == [
        "hello",
        "You said: hello",
        "again",
    ]
    answered(page, "busy")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".assistant").last.get_by_role("alert")).to_contain_text("The queue is full")
    assert chat.bodies[-1]["messages"][-1] == {"role": "user", "content": "busy"}


def test_enter_twice_while_the_models_are_asked_for(page: Page, chat: ScriptedChat) -> None:
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.locator("#notice")).to_be_visible()
    held: list[Route] = []
    page.unroute("**/v1/models")
    page.route("**/v1/models", lambda route: held.append(route))
    for number in (1, 2):
        ask(page, "hello")
        while len(held) < number:
            page.wait_for_timeout(10)
    for route in held:
        route.continue_()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert (len(chat.bodies), page.locator("article").count()) == (1, 2)


def test_a_server_that_cannot_be_reached(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    answered(page, "hello")
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached. Is it running?")


def test_a_key_is_asked_for(page: Page) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(status=401, json={"error": {"message": "No key"}}))
    page.reload()
    expect(page.get_by_role("alert")).to_have_text(
        "Error 401: No key\nPut a valid API key into the settings."
    )
    page.unroute("**/v1/models")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#notice")).not_to_be_visible()
    expect(page.get_by_label("Model")).to_be_enabled()


def test_regenerate_copy_and_new_chat(page: Page, chat: ScriptedChat) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answered(page, "hello")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".assistant")).to_have_count(1)
    expect(page.locator(".assistant .text")).to_have_text("You said: hello")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert chat.bodies[0] == chat.bodies[1]
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "You said: hello"
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    page.reload()
    expect(page.get_by_text("Ask something.")).to_be_visible()
    expect(page.locator("article")).to_have_count(0)


def test_a_new_chat_stops_the_answer(page: Page, chat: ScriptedChat) -> None:
    ask(page, "endless")
    expect(page.locator(".assistant .text")).to_contain_text("0 1")
    page.get_by_role("button", name="New chat").click()
    assert chat.disconnected.wait(PATIENCE_S)
    answered(page, "hello")
    expect(page.locator("article")).to_have_count(2)


def test_keys(page: Page) -> None:
    message = page.get_by_label("Message")
    expect(message).to_be_focused()
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    expect(message).to_have_value("a\nb")
    page.keyboard.press("Enter")
    expect(page.locator(".user .text")).to_have_text("a\nb")


def test_a_phone_shows_it_without_scrolling_sideways(page: Page) -> None:
    page.set_viewport_size(PHONE)
    page.reload()
    expect(page.locator("#settings")).not_to_be_visible()
    answered(page, "markdown")
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    expect(page.get_by_label("Message")).to_be_in_viewport(ratio=1)


def test_every_control_has_a_name(page: Page) -> None:
    answered(page, "think")
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea")]
            .filter((e) => !(e.textContent.trim() || e.labels?.length || e.ariaLabel)).map((e) => e.outerHTML)"""
    )
    assert unnamed == []


def endless(request: FakeRequest) -> Iterator[str]:
    while not request.is_cancelled():
        yield "on and "
        request.wait(0.02)


def fails(request: FakeRequest) -> Iterator[str]:
    yield "so far "
    yield "and no "
    request.wait(0.3)
    yield "further"
    raise ModelError("the engine died")


def test_over_the_gateway(browser: Browser, gateway_url: str, fake: FakeTriton) -> None:
    with opened(browser, gateway_url) as page:
        page.get_by_label("Max tokens").fill("3")
        answered(page, "one two three four")
        expect(page.locator(".assistant .text")).to_have_text("one two three")
        expect(page.locator(".stats")).to_contain_text("cut at max tokens · 3 tokens")
        fake.script = endless
        ask(page, "go on")
        expect(page.locator(".assistant .text").last).to_contain_text("on and on")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".stats").last).to_contain_text("stopped")
        deadline = time.monotonic() + PATIENCE_S
        while fake.last.id not in fake.cancelled:
            assert time.monotonic() < deadline, "the request goes on"
            page.wait_for_timeout(20)
        fake.script = fails
        answered(page, "again")
        expect(page.locator(".assistant .text").last).to_contain_text("so far")
        expect(page.locator(".assistant").last.get_by_role("alert")).to_contain_text("the engine died")
