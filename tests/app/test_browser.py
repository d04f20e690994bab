"""A round in a real browser: look, drop, undo, drop alike ones, reject by key, try a photo."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import encoded_image, noise_image

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE_MS = 20_000
PAGES = ("/archives", "/archives/1", "/labels", "/predictions", "/predictions/tiny/0", "/try")
REFUSED = "status of 400"  # what the browser notes of an upload that is no photo

pytest.importorskip("uvicorn", reason="the extra `app` is not installed")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright, which drives the browser, is not installed"
)
pytestmark = pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"no browser at {CHROMIUM}")


@pytest.fixture
def address(made: Any) -> Iterator[str]:
    """Where the app is served by a thread."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(made.client.app, host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    give_up = time.monotonic() + 30
    while not server.started and time.monotonic() < give_up:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Function that opens a page at a width, and at the end fails for errors of its scripts."""
    errors: list[str] = []

    def note(message: Any) -> None:
        if message.type == "error" and REFUSED not in message.text:
            errors.append(message.text)

    def go(path: str, width: int = 1440) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", note)
        page.goto(address + path)
        return page

    yield go
    assert errors == []


def said(page: Any, text: str) -> None:
    page.wait_for_function("text => document.getElementById('said').textContent === text", arg=text)


def test_a_round_of_dropping(made: Any, open_page: Callable[..., Any]) -> None:
    page = open_page("/archives")
    page.get_by_role("link", name="cat", exact=True).click()
    page.wait_for_url("**/archives/1")  # and until its script answers keys
    first, second = (page.locator("[data-tiles] .tile").nth(it) for it in (0, 1))
    keys = [it.get_attribute("data-key") for it in (first, second)]
    first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("d")
    said(page, "Dropped; u undoes")
    assert [line.split(",")[1] for line in made.review("archives")] == [keys[1]]
    assert page.locator("[data-dropped]").inner_text() == "1"
    assert "dropped" in second.get_attribute("aria-label")
    page.keyboard.press("u")
    said(page, "Undone")
    assert made.review("archives") == []
    first.get_by_role("link", name="Alike").click()
    page.wait_for_url("**/archives/1/alike*")
    page.locator("input[name=key]").nth(2).uncheck()
    number = page.locator("[data-tiles] .tile").count()
    page.wait_for_function(
        "number => document.querySelector('[data-count]').textContent === String(number)",
        arg=number,
    )
    page.get_by_role("button", name="Drop").click()
    page.wait_for_url("**/archives/1")
    assert len(made.review("archives")) == number
    assert keys[0] in {line.split(",")[1] for line in made.review("archives")}


def test_a_round_of_verdicts_by_keys(made: Any, open_page: Callable[..., Any]) -> None:
    page = open_page("/labels?verdict=all")
    frames = page.locator(".frame")
    frames.first.wait_for()
    assert frames.nth(0).get_attribute("aria-current") == "true"
    page.keyboard.press("r")
    said(page, "Rejected; u undoes")
    assert frames.nth(1).get_attribute("aria-current") == "true"
    page.keyboard.press("a")
    said(page, "Accepted; u undoes")
    page.keyboard.press("ArrowLeft")
    assert [line.split(",")[2] for line in sorted(made.review("labels"))].count("reject") == 1
    assert page.locator("[data-rejected]").inner_text() == "1"
    page.keyboard.press("u")
    said(page, "Undone")
    assert [line.split(",")[2] for line in made.review("labels")] == ["reject"]
    page.goto(page.url.replace("verdict=all", "verdict=open"))
    page.keyboard.press("u")
    page.get_by_text("Undone, on another page").wait_for()
    assert made.review("labels") == []
    page.wait_for_function(
        "() => [...document.querySelectorAll('[data-pane]')].every(it => it.naturalWidth > 0)"
    )


def test_a_photo_and_a_threshold(open_page: Callable[..., Any]) -> None:
    page = open_page("/try")
    photo = {
        "name": "p.png",
        "mimeType": "image/png",
        "buffer": encoded_image(noise_image(2, 48, 40)),
    }
    page.locator("[data-file]").set_input_files(photo)
    page.locator("[data-names]").fill("cat, dog")
    page.get_by_role("button", name="Segment").click()
    said(page, "Done")
    page.wait_for_function(
        "() => [...document.querySelectorAll('[data-side]')].every(it => it.naturalWidth > 0)"
    )
    assert page.locator("[data-confidence] option").all_inner_texts() == ["cat", "dog"]
    slider = page.locator("[data-threshold]")
    slider.focus()
    page.keyboard.press("End")
    assert "threshold=1" in page.locator('[data-save="coco.json"]').get_attribute("href")
    page.locator("[data-file]").set_input_files({**photo, "buffer": b"nothing"})
    page.get_by_role("button", name="Segment").click(no_wait_after=True)
    page.locator("[data-wrong]").wait_for()
    assert "not an image" in page.locator("[data-wrong]").inner_text()


def test_no_page_is_wider_than_a_phone(open_page: Callable[..., Any]) -> None:
    for path in PAGES:
        page = open_page(path, width=390)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
