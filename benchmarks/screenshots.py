"""Look at the built site in a real browser: pictures of some pages, and what overflows in all.

mkdocs build --strict --site-dir SITE && python benchmarks/screenshots.py SITE OUTPUT

Writes a picture of each page at two widths and in both colour schemes. Exits with 1 if a page is
wider than its window, if a block of code does not fit at 1280 pixels, or if the browser asked for
anything outside the site. Needs the extra `browser` and a Chromium.
"""

import argparse
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

PAGES = (
    "",
    "install/",
    "tutorials/first-run/",
    "notebooks/quickstart/",
    "how-to/train/",
    "how-to/data/",
    "reference/commands/",
    "reference/commands/train/",
    "reference/commands/evaluate/",
    "reference/settings/",
    "reference/settings/model/",
    "reference/library/",
    "reference/pods/",
    "reference/glossary/",
    "explanation/losses/",
    "explanation/sharding/",
)
WINDOWS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
}
# Whether the page scrolls sideways, and which blocks of code do.
OVERFLOW = """() => ({
  page: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  code: [...document.querySelectorAll("article pre > code")]
    .filter(x => x.scrollWidth > x.clientWidth + 1)
    .map(x => x.innerText.split("\\n").sort((a, b) => b.length - a.length)[0]),
})"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    """Serve a folder on a free port of this machine."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("site", type=Path, help="Folder of the built site.")
    parser.add_argument("output", type=Path, help="Folder for the pictures.")
    parser.add_argument("--pages", nargs="*", default=PAGES, help="Pages to draw, by their path.")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    server = serve(options.site)
    root = f"http://127.0.0.1:{server.server_address[1]}/"
    every = sorted(
        str(path.parent.relative_to(options.site)) for path in options.site.rglob("index.html")
    )
    faults: list[str] = []

    def check(request: Any) -> None:
        if not request.url.startswith((root, "data:", "blob:")):
            faults.append(f"the browser asks for {request.url}")

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-gpu"],
        )
        for window, settings in WINDOWS.items():
            page = chromium.new_context(**settings).new_page()
            page.on("request", check)
            for path in every if window != "dark" else ():
                page.goto(root + ("" if path == "." else f"{path}/"), wait_until="load")
                wide = page.evaluate(OVERFLOW)
                if wide["page"] > 0:
                    faults.append(f"{window}: /{path} is {wide['page']} pixels too wide")
                if window == "desktop":
                    faults += [f"{window}: /{path}: code too wide: {line}" for line in wide["code"]]
            for path in options.pages:
                page.goto(root + path, wait_until="networkidle")
                name = path.strip("/").replace("/", "-") or "home"
                page.screenshot(path=options.output / f"{name}-{window}.png")
        chromium.close()
    print("\n".join(faults) or f"{len(every)} pages fit; pictures are in {options.output}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
