"""The page in a real browser: it answers what the library answers, and keeps to itself."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from small_chats import save_pictures, save_talkative_llava

from manifests.errors import UserError
from train.serve.generate import Chatter, Decoding, load_model
from train.serve.page import build_page, rounds_of
from train.serve.prompts import Question, Round, read_image

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SECONDS = 15  # of patience
SHOT = os.environ.get("WARREN_PAGE_SHOT")  # a file, to look at
NUM_TOKENS = 40
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_talkative_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chatter(model_dir: str) -> Chatter:
    return load_model(model_dir, decoding=Decoding(max_new_tokens=NUM_TOKENS))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


SERVER = """
import sys
from curate.media.torchvision_ops import ensure_torchvision_importable
ensure_torchvision_importable()
from manifests.errors import UserError
from train.serve.generate import Decoding, load_model
from train.serve.page import serve
port = int(sys.argv[2])
chatter = load_model(sys.argv[1], decoding=Decoding(max_new_tokens=int(sys.argv[3])))
page = serve(chatter, port=port, block=False)
try:
    serve(chatter, port=port, block=False)
except UserError as error:
    print(error.what, flush=True)
sys.stdin.read()
page.close(verbose=False)
"""


@pytest.fixture(scope="module")
def address(model_dir: str) -> Iterator[str]:
    """The page, served by a process of its own: ours has an event loop, the browser's."""
    port = free_port()
    words = [sys.executable, "-c", SERVER, model_dir, str(port), str(NUM_TOKENS)]
    with subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        second = f"The page cannot be served at 127.0.0.1:{port}.\n"
        assert server.stdout.readline() == second  # and the first one is
        yield f"http://127.0.0.1:{port}/"
        server.communicate(timeout=20)
    assert server.returncode == 0


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH; Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": 1100, "height": 720},
        )
        opened.set_default_timeout(SECONDS * 1000)
        yield opened
        opened.close()


def ask(tab: Any, text: str) -> None:
    tab.get_by_placeholder("Your question").fill(text)
    tab.get_by_role("button", name="Ask").click()


def upload(tab: Any, path: str) -> None:
    tab.locator("input[type=file]").first.set_input_files(path)
    tab.locator("[data-testid=image] img").wait_for()


def wait_for_answers(tab: Any, answers: list[str]) -> None:
    """Wait until the answers on the page are these; what differs is told by the assertion."""
    for _ in range(SECONDS * 10):
        found = [one.strip() for one in tab.get_by_test_id("bot").all_text_contents()]
        if found == answers:
            break
        tab.wait_for_timeout(100)
    assert found == answers


@pytest.mark.browser
def test_a_page_answers_as_the_library_does_and_asks_nobody_else(
    address: str, browser: Any, chatter: Chatter, pictures: list[str]
) -> None:
    image, other = (read_image(one) for one in pictures[:2])
    first = chatter.answer(Question("What is this?", [image]))
    second = chatter.answer(Question("Why?", [image], [Round("What is this?", first)]))
    alone = chatter.answer(Question("Why?", [image]))
    of_other = chatter.answer(Question("Why?", [other]))
    assert len({first, second, alone, of_other}) == 4
    asked: list[str] = []
    browser.on("request", lambda one: asked.append(one.url))
    tab = browser.new_page()
    tab.goto(address)
    upload(tab, pictures[0])
    ask(tab, "What is this?")
    wait_for_answers(tab, [first])
    ask(tab, "Why?")
    wait_for_answers(tab, [first, second])
    if SHOT:
        tab.screenshot(path=SHOT)
    tab.get_by_role("button", name="New conversation").click()
    wait_for_answers(tab, [])
    ask(tab, "Why?")
    wait_for_answers(tab, [alone])
    tab.get_by_label("Remove Image").click()
    wait_for_answers(tab, [])
    upload(tab, pictures[1])
    ask(tab, "Why?")
    wait_for_answers(tab, [of_other])
    hosts = {urlsplit(one).hostname for one in asked if not one.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}, "the page asked for something from elsewhere"
    assert len(asked) > 10


def test_a_conversation_of_gradio_s_is_rounds_whatever_its_texts_look_like() -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "never answered"},
        {"role": "user", "content": "<b>what</b>"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "last"},
    ]
    assert rounds_of(messages) == [Round("<b>what</b>", "two parts")]


def test_without_gradio_the_page_says_what_to_install(
    chatter: Chatter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as Python has what is not installed
    with pytest.raises(UserError, match=r'pip install "warren\[demo\]"'):
        build_page(chatter)
