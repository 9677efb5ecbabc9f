"""The page in a browser, with a server behind it that answers by a script."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from browser import browsing, is_installed
from scripted_page import CHOSEN, EXPERTS, LAYERS, PAGE, THOUGHTS, WORDS, Scripted, pieces
from scripted_server import serving
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

needs_browser = pytest.mark.skipif(not is_installed(), reason="no Chromium (apt-get install chromium chromium-driver)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with browsing() as driver:
        yield driver


@pytest.fixture
def server(browser: Chrome) -> Iterator[Scripted]:
    """Its page is open, with nothing kept from before."""
    scripted = Scripted()
    with serving(scripted.app()) as url:
        browser.get(url)
        until(browser, lambda: text(browser, "#model") == "tiny")
        yield scripted
        browser.get("about:blank")  # so that no connection is left open


def until(browser: Chrome, happened: Callable[[], object]) -> None:
    WebDriverWait(browser, 20, poll_frequency=0.02).until(lambda _: happened())


def all_of(browser: Chrome, selector: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def text(browser: Chrome, selector: str) -> str:
    """All of it, also what is folded."""
    (element,) = all_of(browser, selector)
    return str(element.get_property("textContent"))


def fill(browser: Chrome, name: str, value: str) -> None:
    field = browser.find_element(By.ID, name)
    field.clear()
    field.send_keys(value)


def ask(browser: Chrome, prompt: str) -> None:
    fill(browser, "prompt", prompt + Keys.ENTER)


def answer(browser: Chrome, prompt: str) -> None:
    """Ask, and wait for the whole answer."""
    before = len(all_of(browser, ".figures"))
    ask(browser, prompt)
    until(browser, lambda: len(all_of(browser, ".figures")) > before)


@needs_browser
def test_a_chat_with_settings(browser: Chrome, server: Scripted) -> None:
    for name, value in (("temperature", "0.25"), ("top_p", "0.5"), ("min_p", "0.125"), ("max_tokens", "64")):
        fill(browser, name, value)
    fill(browser, "seed", "7")
    fill(browser, "system", "Be short.")
    answer(browser, "What is a draft?")
    assert text(browser, "article.assistant > .text") == WORDS  # <b> is no markup
    assert text(browser, ".reasoning .text") == THOUGHTS
    (fold,) = all_of(browser, ".reasoning")
    assert fold.get_attribute("open") is None
    for said in ("99 tokens", "tokens/s", "32 of 40 prompt tokens from the prefix cache"):
        assert said in text(browser, ".figures")
    answer(browser, "And then?")
    first, second = server.bodies
    settings = {"temperature": 0.25, "top_p": 0.5, "min_p": 0.125, "max_tokens": 64, "seed": 7, "model": "tiny"}
    assert settings.items() <= first.items() and first["token_details"] and first["routed_experts"]
    asked = [(message["role"], message["content"]) for message in second["messages"]]
    question = ("user", "What is a draft?")
    assert asked == [("system", "Be short."), question, ("assistant", WORDS), ("user", "And then?")]


@needs_browser
def test_drafts_are_marked_and_counted(browser: Chrome, server: Scripted) -> None:
    answer(browser, "Go")
    words = pieces(WORDS)
    drafts = [element.get_property("textContent") for element in all_of(browser, "article .token.draft")]
    assert drafts == words[1::3]
    assert len(all_of(browser, "article.assistant > .text > .token")) == len(words)
    assert f"{len(drafts)} accepted drafts" in text(browser, ".figures")
    until(browser, lambda: all_of(browser, "#positions meter"))
    shares = [element.get_property("value") for element in all_of(browser, "#positions meter")]
    assert shares == [0.82, 0.6]
    assert text(browser, "#speculation") == 'speculation: 2 drafts: they "pay" here'


PIXELS = """const canvas = document.getElementById(arguments[0]), size = [canvas.width, canvas.height];
const data = canvas.getContext("2d").getImageData(0, 0, ...size).data, cell = size[0] / arguments[1];
return Array.from({length: size[1] / cell}, (_, row) => Array.from({length: arguments[1]},
    (_, column) => data[4 * ((row * cell + 1) * size[0] + column * cell + 1) + 3]));"""


@needs_browser
def test_experts_of_a_token_and_of_the_answer(browser: Chrome, server: Scripted) -> None:
    answer(browser, "Go")
    favourites = [7 * layer % EXPERTS for layer in range(LAYERS)]
    whole = browser.execute_script(PIXELS, "map", EXPERTS)
    assert len(whole) == LAYERS
    assert [row.index(max(row)) for row in whole] == favourites  # the darkest
    spans = all_of(browser, "article.assistant > .text > .token")
    spans[1].click()
    strip = browser.execute_script(PIXELS, "strip", EXPERTS)
    assert [sum(map(bool, row)) for row in strip] == [CHOSEN] * LAYERS
    assert all(row[favourite] for row, favourite in zip(strip, favourites, strict=True))
    said = text(browser, "#chosen")
    assert "accepted draft" in said and "log-probability -0.125, as sampled -0.063" in said
    assert f"MoE layer {LAYERS}: " in said
    spans[-1].click()  # three tokens made this character
    assert text(browser, "#chosen").count("id 50") == 3


@needs_browser
def test_the_keyboard_is_enough(browser: Chrome, server: Scripted) -> None:
    fill(browser, "prompt", "a" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "b" + Keys.ENTER)
    until(browser, lambda: all_of(browser, ".figures"))
    assert server.bodies[0]["messages"][-1]["content"] == "a\nb"
    (article,) = all_of(browser, "article.assistant")
    article.send_keys(Keys.ARROW_RIGHT * 2)
    (chosen,) = all_of(browser, ".token.chosen")
    assert chosen.text == pieces(THOUGHTS)[1]  # the fold has opened
    assert chosen.text in text(browser, "#chosen")
    unnamed = """return [...document.querySelectorAll("button, input, textarea, canvas, meter")].filter(
        (each) => !(each.labels?.length || each.textContent.trim() || each.getAttribute("aria-label")) && !each.hidden
    ).map((each) => each.id);"""
    assert browser.execute_script(unnamed) == []


@needs_browser
@pytest.mark.parametrize("way", ["button", "escape"])
def test_an_answer_is_stopped(browser: Chrome, server: Scripted, way: str) -> None:
    ask(browser, "slow")
    until(browser, lambda: len(all_of(browser, "article .token")) > 2)
    if way == "button":
        browser.find_element(By.ID, "stop").click()
    else:
        browser.find_element(By.ID, "prompt").send_keys(Keys.ESCAPE)
    until(browser, lambda: all_of(browser, ".figures"))
    assert "stopped" in text(browser, ".figures") and not text(browser, "#error")
    until(browser, lambda: text(browser, "#status") == "Stopped.")
    until(browser, lambda: server.stopped == 1)  # the server hears of it
    answer(browser, "go on")
    assert server.bodies[1]["messages"][1]["content"].startswith("on on ")


@needs_browser
def test_errors_are_shown(browser: Chrome, server: Scripted) -> None:
    ask(browser, "refuse this")
    until(browser, lambda: "too long by 7 tokens" in text(browser, "#error"))
    assert browser.find_element(By.ID, "prompt").get_property("value") == "refuse this"  # can be sent again
    assert not all_of(browser, "article")
    answer(browser, "break off")
    assert "The server stopped: out of memory" in text(browser, "#error")
    assert text(browser, "article.assistant > .text") == "".join(pieces(WORDS)[:3])
    server.key = "secret"
    browser.refresh()
    until(browser, lambda: "Put the server's API key into the settings" in text(browser, "#error"))
    fill(browser, "key", "secret" + Keys.TAB)
    until(browser, lambda: text(browser, "#model") == "tiny" and not text(browser, "#error"))


@needs_browser
def test_the_conversation_is_kept_until_a_new_one(browser: Chrome, server: Scripted) -> None:
    answer(browser, "Remember")
    browser.refresh()
    assert text(browser, "article.user .text") == "Remember"
    assert text(browser, "article.assistant > .text") == WORDS
    browser.find_element(By.ID, "new-chat").click()
    browser.refresh()
    assert not all_of(browser, "article")


@needs_browser
def test_a_new_chat_leaves_nothing_of_an_answer_that_was_coming(browser: Chrome, server: Scripted) -> None:
    ask(browser, "slow")
    until(browser, lambda: len(all_of(browser, "article .token")) > 2)
    browser.find_element(By.ID, "new-chat").click()
    until(browser, lambda: text(browser, "#status") == "Stopped.")
    answer(browser, "Go")
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["Go"]


@needs_browser
def test_the_browser_has_nothing_to_complain_of(browser: Chrome, server: Scripted) -> None:
    browser.get_log("browser")  # of the tests before
    browser.refresh()
    answer(browser, "Go")
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"] == []
    hosts = "return performance.getEntriesByType('resource').map((each) => new URL(each.name).host)"
    assert set(browser.execute_script(hosts)) == {browser.execute_script("return location.host")}


def contrast(one: str, other: str) -> float:
    """Of two colours such as #16191e, as WCAG has it."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_in_light_and_dark() -> None:
    style = (PAGE / "style.css").read_text("utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    for colors in (light, dark):
        for ink, paper in (
            ("ink", "paper"),
            ("ink", "card"),
            ("ink", "draft"),
            ("muted", "paper"),
            ("muted", "draft"),
            ("bad", "paper"),
            ("on-accent", "accent"),
        ):
            assert contrast(colors[ink], colors[paper]) >= 4.5, (ink, paper)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for file in PAGE.iterdir():
        content = file.read_text("utf-8")
        assert "http" not in content and "//" not in re.sub(r"(^|\s)//.*", "", content), file.name
        assert not re.search(r"innerHTML|eval\(|\bon\w+=", content), file.name
    assert sorted(file.name for file in PAGE.iterdir()) == ["app.js", "index.html", "style.css"]
