"""Draw the pictures of the page that the README shows: `python scripts/page_pictures.py [ADAPTER ADAPTER]`.

`python scripts/page_pictures.py --report PAGE.html` draws a report page as examples/report.png instead.

A real server on a free port answers a real browser (Debian's package chromium, through Playwright). The two adapters
are by default the one that ships and that of recipes/my_data.yaml, which is trained in half a minute. The letters are
those of the machine's own fonts.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = ("adapters/imdb_small", "adapters/my_data")
TEXT = (
    "Lovely shoes and a quick delivery, but one heel came off after a week. Can I send them back?"
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
)
DESKTOP = {"viewport": {"width": 1100, "height": 800}}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 1.5}


def draw(
    browser: Any, address: str, path: Path, *, other: str | None = None, **options: Any
) -> None:
    """Ask for one text, of one adapter or two, and save a picture of the answer."""
    context = browser.new_context(reduced_motion="reduce", **options)
    page = context.new_page()
    page.goto(address)
    if other:
        page.get_by_label("Compare with").select_option(other)
    page.get_by_label("Text", exact=True).fill(TEXT)
    for _ in range(2):  # a server's first answers are slow
        with page.expect_response(
            lambda response: b'"explain":true' in (response.request.post_data_buffer or b"")
        ):
            page.get_by_role("button", name="Predict").click()
        page.wait_for_selector("#answers[aria-busy=false] .why")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    box = page.locator("#answers").bounding_box()
    area = {
        "x": 0,
        "y": 0,
        "width": options["viewport"]["width"],
        "height": box["y"] + box["height"] + 24,
    }
    page.screenshot(path=path, full_page=True, clip=area)
    context.close()


def draw_report(page_file: Path, path: Path) -> None:
    """Save a picture of a report page down to its first errors."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 800})
        page.goto(page_file.resolve().as_uri())
        top = page.get_by_role("heading", name="Errors on").bounding_box()["y"]
        area = {"x": 0, "y": 0, "width": 900, "height": top + 260}
        page.screenshot(path=path, full_page=True, clip=area)
        browser.close()


def main() -> None:
    """Serve, draw, stop."""
    if sys.argv[1:2] == ["--report"]:
        draw_report(Path(sys.argv[2]), ROOT / "examples/report.png")
        return
    adapters = sys.argv[1:] or [str(ROOT / adapter) for adapter in ADAPTERS]
    command = [sys.executable, "-m", "lora_sentiment.cli", "serve", *adapters, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            draw(
                browser,
                address,
                ROOT / "examples/page.png",
                other=Path(adapters[1]).name,
                **DESKTOP,
            )
            draw(browser, address, ROOT / "examples/page-phone.png", **PHONE)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
