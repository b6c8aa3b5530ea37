"""A picture of the page of `rac report`, taken in Debian's chromium: the one in docs/frontier.md is made by this.

python benchmarks/page_screenshot.py frontier --out docs/assets/frontier.png --choose "int3, asymmetric"
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from rac_modifier.frontier.page import page

WIDTH, HEIGHT = 1280, 2000


def take(folders: list[Path], out: Path, chosen: str | None, height: int) -> None:
    """Write the top `height` pixels of the page, with the row `chosen`."""
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if chromium is None:
        raise SystemExit(
            "needs a chromium on the PATH; on Debian and Ubuntu: apt-get install chromium"
        )
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        file = Path(temporary) / "page.html"
        file.write_text(page(folders, 300), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": WIDTH, "height": height})
        shown.goto(file.as_uri())
        if chosen is not None:
            shown.locator("#rows button", has_text=chosen).first.click()
        shown.evaluate("document.querySelector('details').open = false; scrollTo(0, 0)")
        shown.screenshot(path=out)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="that rac frontier wrote")
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    parser.add_argument("--choose", help="label of the row that is chosen")
    parser.add_argument("--height", type=int, default=HEIGHT, help="pixels")
    args = parser.parse_args()
    take(args.folders, args.out, args.choose, args.height)


if __name__ == "__main__":
    main()
