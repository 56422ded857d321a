"""The server's page in a real browser: a file, a microphone, playing, saving."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
from test_serve import BASE, ROOT, Server

from fastconformer.audio import load_audio

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--autoplay-policy=no-user-gesture-required",
]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def server():
    started = Server("--name", "tiny")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """What the browser's microphone hears: 11 s of speech, and silence behind it."""
    path = tmp_path_factory.mktemp("spoken") / "spoken.wav"
    samples = load_audio(ROOT / "samples" / "jfk.flac", 48000)
    soundfile.write(path, samples, 48000, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def browser(spoken):
    fake = [
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={spoken}%noloop",
    ]
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *fake])
        yield found
        found.close()


@pytest.fixture
def page(browser, server):
    """The page; whatever it writes to the console as an error, or asks of another host, fails."""
    opened = browser.new_page(accept_downloads=True)
    wrong = []
    refused = "status of 400"  # what a browser says of an answer that the page shows
    opened.on("console", lambda m: m.type == "error" and wrong.append(m.text))
    opened.on("pageerror", lambda e: wrong.append(str(e)))
    asked = []
    opened.on("request", lambda r: asked.append(r.url))
    opened.goto(server.url)
    yield opened
    opened.close()
    assert not [text for text in wrong if refused not in text]
    own = (server.url, server.url.replace("http", "ws"), "blob:", "data:")
    assert all(url.startswith(own) for url in asked)


def saved(page, link: str, folder: Path) -> Path:
    with page.expect_download() as found:
        page.click(link)
    path = folder / found.value.suggested_filename
    found.value.save_as(path)
    return path


def test_a_file_is_shown_played_and_saved(page, tmp_path):
    page.locator("#about", has_text="tiny").wait_for()
    page.set_input_files("#file", ROOT / "samples" / "jfk.flac")
    page.wait_for_selector(".word")
    words = page.locator(".word")
    assert words.count() > 5
    command = [sys.executable, "-m", "fastconformer.transcribe", str(ROOT / "samples" / "jfk.flac")]
    for kind, link in (("srt", "#srt"), ("text", "#text")):
        done = subprocess.run(
            [*command, "--model", str(BASE), "--format", kind],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert saved(page, link, tmp_path).read_text() == done.stdout

    third = words.nth(3)
    start = float(third.get_attribute("data-start"))
    third.click()
    heard = 0.0
    for _ in range(100):
        heard = heard or page.evaluate("document.querySelector('#player').currentTime")
        page.wait_for_timeout(20)
    assert start - 0.05 <= heard < start + 3
    assert not page.evaluate("document.querySelector('#player').paused")
    assert "confidence" in third.get_attribute("title")


def test_a_keyboard_is_enough(page):
    page.keyboard.press("Tab")
    reached = set()
    for _ in range(8):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert {"microphone", "SUMMARY"} <= reached and reached & {"drop", "file"}
    for control in page.locator("button, a, input").all():
        name = control.evaluate("e => e.textContent.trim() || e.labels?.[0]?.textContent.trim()")
        assert name or not control.is_visible()
    assert page.get_attribute("#status", "aria-live") == "polite"


def test_what_is_spoken_appears_and_is_kept(page, tmp_path):
    page.click("#microphone")
    page.locator("#words", has_text=re.compile(".{10}")).wait_for(timeout=30000)
    assert page.get_attribute("#microphone", "aria-pressed") == "true"
    page.wait_for_timeout(6000)
    page.click("#microphone")
    page.wait_for_selector(".word", timeout=30000)
    assert page.locator(".word").count() > 3
    assert saved(page, "#srt", tmp_path).read_text().startswith("1\n00:00:")


def test_an_error_is_said(page, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio")
    page.set_input_files("#file", broken)
    page.wait_for_selector("#status.error")
    assert "broken.wav" in page.inner_text("#status")


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_its_window(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.set_input_files("#file", ROOT / "samples" / "jfk.flac")
    page.wait_for_selector(".word")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    folder = os.environ.get("FASTCONFORMER_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/page-{width}-{scheme}.png")
