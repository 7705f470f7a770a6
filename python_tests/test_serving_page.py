"""The page at / in a real headless browser: a chat by stages, what the operator allows, the scheduler's numbers.

Skipped where no Chromium is installed, or playwright, which drives it. MOTE_SCREENSHOTS names a folder for pictures.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from servers import GatedEngine, make_model, running

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
COLOURS = ("light", "dark")
PHONE = {"width": 390, "height": 780}
DESK = {"width": 1180, "height": 820}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a server's page: (page, errors and foreign requests, which must stay empty)."""
    contexts = []

    def go(server, **options):
        context = browser.new_context(viewport=DESK, **options)
        contexts.append(context)
        page, wrong = context.new_page(), []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda asked: wrong.append(asked.url) if not asked.url.startswith((server.url, "data:")) else None,
        )
        page.goto(server.url)
        return page, wrong

    yield go
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def safe():
    with running(make_model(check_threshold=0.0), policy={"show_reasoning": "always"}) as server:
        yield server


def picture(page, name):
    if folder := os.environ.get("MOTE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def ask(page, question="How do plants drink?", path="full", check="flag", tokens=80, temperature=1):
    page.wait_for_selector("#path option", state="attached")
    page.select_option("#path", path)
    page.select_option("#check", check)
    page.fill("#tokens", str(tokens))
    page.fill("#temperature", str(temperature))
    page.fill("#question", question)
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn:last-child .about, .turn:last-child .error", timeout=30_000)


def test_the_pages_policy_lets_in_its_own_script_alone(safe):
    status, headers, data = safe.call("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    assert policy.count("'sha256-") == 2 and "frame-ancestors 'none'" in policy
    page = data.decode()
    assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\bon\w+=", page)
    assert page.count("<script>") == page.count("<style>") == 1


def test_a_chat_by_stages(safe, visit):
    page, wrong = visit(safe)
    ask(page, temperature=0)  # what is drawn may be a stage of one byte that is no letter
    labels = page.locator(".turn:last-child .label").all_text_contents()
    assert labels == ["analysis", "guidance", "response", "check"]
    texts = page.locator(".turn:last-child .stage .text").all_text_contents()
    assert all(texts) and texts[3] == "safe"
    assert "verdict safe" in page.locator(".turn:last-child .about").text_content()
    ask(page, "And trees?", path="answer", check="none", temperature=0)
    assert page.locator(".turn:last-child .label").all_text_contents() == ["response"]
    assert page.locator(".question").all_text_contents() == ["How do plants drink?", "And trees?"]
    tints = page.evaluate("[...document.querySelectorAll('.stage')].map(n => getComputedStyle(n).borderLeftColor)")
    assert len(set(tints[:4])) == 4
    assert wrong == []


def test_the_second_turn_sends_the_first(safe, visit):
    page, _ = visit(safe)
    bodies = []
    page.on("request", lambda asked: bodies.append(asked.post_data) if asked.method == "POST" else None)
    ask(page, "One", path="answer", tokens=40)
    ask(page, "Two", path="answer", tokens=40)
    sent = json.loads(bodies[1])["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert (sent[0]["content"], sent[2]["content"]) == ("One", "Two")


def test_what_is_typed_stays_text(safe, visit):
    page, wrong = visit(safe)
    typed = "<img src=x onerror=alert(1)><b>bold</b> & <|response|>"
    ask(page, typed, path="answer", tokens=40)
    assert page.locator(".question").text_content() == typed
    assert page.locator("#log img, #log b").count() == 0 and wrong == []


def test_the_schedulers_state(safe, visit):
    page, wrong = visit(safe)
    ask(page, path="full")
    page.wait_for_selector("#pages-legend b >> nth=2")
    counts = [int(text.replace(",", "")) for text in page.locator("#pages-legend b").all_text_contents()]
    assert sum(counts) == safe.loop.stats["pages_total"]
    assert re.fullmatch(r"used \d+, cached \d+, free \d+", page.get_attribute("#pages", "aria-label"))
    assert "analysis" in page.get_attribute("#mix", "aria-label")
    names = page.locator("#numbers dt").all_text_contents()
    assert names[:4] == ["running", "waiting", "prefix hits", "preemptions"] and wrong == []
    assert page.locator("#health").text_content() == "ready"
    assert not page.locator("#key").is_visible()


def test_kept_back_reasoning_comes_with_its_verdict_or_not_at_all(visit):
    for threshold, note in ((0.0, None), (1.0, "not shown: its verdict is not safe")):
        with running(make_model(check_threshold=threshold)) as server:
            page, _ = visit(server)
            ask(page, temperature=0)
            assert page.locator(".label").all_text_contents() == ["analysis", "guidance", "response", "check"]
            texts = page.locator(".stage .text").all_text_contents()
            assert all(texts[:2]) if note is None else texts[:2] == ["", ""]
            assert page.locator(".stage .note").all_text_contents() == ([] if note is None else [note, note])
            picture(page, "kept-back" if note else "shown-once-safe")


def test_only_what_the_operator_allows_can_be_chosen(visit):
    policy = {"allow_paths": ["full", "escalate"], "default_path": "escalate", "min_check": "enforce"}
    with running(make_model(check_threshold=1.0), policy=policy) as server:
        page, _ = visit(server)
        page.wait_for_selector("#path option", state="attached")
        assert page.locator("#path option").all_text_contents() == ["full", "escalate"]
        assert page.input_value("#path") == "escalate"
        assert page.locator("#check option").all_text_contents() == ["enforce"]
        ask(page, path="full", check="enforce")
        assert page.locator(".stage .text").all_text_contents() == [server.server.policy.refusal]


def test_a_key_is_asked_for(visit):
    with running(make_model(check_threshold=0.0), keys=["a-long-secret"]) as server:
        page, _ = visit(server)
        page.wait_for_selector("#key", state="visible")
        assert page.locator("#health").text_content() == "an API key is needed"
        page.fill("#key", "a-long-secret")
        page.keyboard.press("Tab")
        ask(page, path="answer", tokens=40)
        assert page.locator(".turn:last-child .label").first.text_content() == "response"


def test_errors_are_shown_and_stop_cancels(visit):
    with running(make_model(), engine_class=GatedEngine) as server:
        page, _ = visit(server)
        ask(page, "x" * 3000, path="answer", tokens=40)
        assert page.locator(".error").get_attribute("role") == "alert"
        server.engine.steps_left = 3  # it does not end by itself
        page.fill("#question", "Go on")
        page.keyboard.press("Enter")
        page.click("#stop:not([disabled])")
        page.wait_for_selector("#send:not([disabled])")
        server.engine.steps_left = None
        server.wait_until_idle()


@pytest.mark.parametrize("colour", COLOURS)
def test_light_dark_and_phone_are_legible(safe, visit, colour):
    page, _ = visit(safe, color_scheme=colour)
    ask(page, path="full")
    page.wait_for_selector("#pages-legend b >> nth=2")
    picture(page, f"desk-{colour}")
    assert all(ratio >= 4.5 for ratio in page.evaluate(CONTRASTS))
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert all(page.locator(name).bounding_box()["width"] > 40 for name in ("#send", "#path", "#question"))
    picture(page, f"phone-{colour}")


def test_everything_is_reached_by_keyboard(safe, visit):
    page, _ = visit(safe)
    page.wait_for_selector("#path option", state="attached")
    reached = set()
    for _ in range(12):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert {"question", "path", "check", "tokens", "temperature", "send", "log", "SUMMARY"} <= reached
    unnamed = "[...document.querySelectorAll('input,select,textarea')].filter(n => !n.labels.length).length"
    assert page.evaluate(unnamed) == 0


# WCAG's contrast of each visible text with the background behind it.
CONTRASTS = """() => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = colour => {
    const [r, g, b] = colour.match(/\\d+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const behind = node => {
    const colour = getComputedStyle(node).backgroundColor;
    return /, 0\\)$/.test(colour) && node.parentElement ? behind(node.parentElement) : colour;
  };
  const texts = ".label,.text,.about,.question,#model,#health,button:not(:disabled),label,dt,dd,.legend span";
  return [...document.querySelectorAll(texts)].map(node => {
    const pair = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
}"""
