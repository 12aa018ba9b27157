"""app.py in a browser: headless Chromium clicks objects and looks at what is painted.

`SCREENSHOTS=docs python -m pytest -n 0 tests/test_app.py` renews the README's pictures of the page.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from children import free_port
from conftest import ROOT

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="wants Chromium")]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PATIENCE = 180_000  # milliseconds: CI may be slow


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """Of the page, with the weights that ship."""
    port = free_port()
    line = [sys.executable, ROOT / "app.py", "--port", str(port), "--weights", ROOT / "weights" / "small"]
    folder = tmp_path_factory.mktemp("app")
    with (folder / "output.txt").open("w") as output:
        server = subprocess.Popen(
            line, cwd=folder, stdout=output, stderr=output, env=os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
        )
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)
                    break
                except OSError:
                    assert server.poll() is None, (folder / "output.txt").read_text()
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """A function that opens the page for another visitor."""
    pages = []

    def opened():
        page = browser.new_context(viewport={"width": 1000, "height": 900}).new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.wait_for_selector("#board label")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.context.close()


def choose(page, *names: str):
    for name in names:
        page.get_by_label(name, exact=True).check()


def test_two_objects_are_clicked_painted_and_judged(visit):
    page = visit()
    choose(page, "red sphere", "cyan cube")
    page.evaluate(
        """() => { window.frames_seen = new Set();
        setInterval(() => { const i = document.querySelector('#picture img'); if (i) frames_seen.add(i.src) }, 10) }"""
    )
    page.click("#paint")
    page.wait_for_selector("#verdict td")
    assert page.evaluate("frames_seen.size") > 5  # it grew out of the noise
    verdict = page.inner_text("#verdict")
    assert re.search(r"Evaluator sees\s+(cyan cube, red sphere|red sphere, cyan cube)\s+right", verdict), verdict
    assert re.search(r"Second judge counts\s+1 red, 1 cyan\s+right", verdict), verdict
    page.wait_for_selector("#nearest img")
    assert "grey levels away" in page.inner_text("#caption")
    if "SCREENSHOTS" in os.environ:
        folder = Path(os.environ["SCREENSHOTS"])
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / "app.png", full_page=True)
        page.set_viewport_size({"width": 390, "height": 800})
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / "app_narrow.png", full_page=True)


def test_on_a_narrow_screen_nothing_is_wider_than_the_screen(visit):
    page = visit()
    page.set_viewport_size({"width": 360, "height": 800})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    places = [label.bounding_box() for label in page.query_selector_all("#board label")]
    assert len(places) == 24
    assert len({round(place["x"]) for place in places}) == 4


def test_a_mistake_gets_a_message_and_the_page_goes_on(visit):
    page = visit()
    page.click("#paint")
    message = page.wait_for_selector(".toast-body")
    assert "Click 1 to 5 objects" in message.inner_text()
    choose(page, "gray cube")
    page.click("#paint")
    page.wait_for_selector("#verdict td")


def test_two_visitors_paint_at_the_same_time_and_get_their_own_pictures(visit):
    one, other = visit(), visit()
    choose(one, "yellow cube")
    choose(other, "blue cylinder")
    one.click("#paint")
    other.click("#paint")
    for page, name in ((other, "blue"), (one, "yellow")):
        page.wait_for_selector("#verdict td")
        assert f"1 {name}" in page.inner_text("#verdict")


def test_an_example_fills_the_board(visit):
    page = visit()
    page.get_by_text("red cube, red sphere", exact=True).click()
    page.wait_for_function("document.querySelectorAll('#board input:checked').length == 2")
