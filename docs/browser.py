"""Open every page of the site in headless Chromium, as a phone and a desktop, light and dark: ``make docs-browser``.

It fails where a page logs an error, a request fails or leaves the page's own host, a page is wider than the phone, a
picture is missing or in the wrong colours, or the search does not find what it should. ``--screenshots DIR`` keeps a
picture of every page, to be looked at.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, sync_playwright

SITE = Path(__file__).resolve().parents[1] / "build" / "docs"
WIDTHS = {"phone": 390, "desktop": 1280}
SCHEMES = ("light", "dark")
SEARCHES = {"patch_pool": "patch_pool", "decode ids": "Ideas", "capacity": "Layouts"}
# Returns the elements that reach beyond the right edge, except in elements that scroll by themselves. The width of the
# page does not tell, since the theme lets a whole article scroll.
TOO_WIDE = """() => [...document.querySelectorAll('article *')]
        .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1)
        .filter(e => !e.closest('pre, .table-wrapper, div.math'))
        .slice(0, 3).map(e => e.outerHTML.slice(0, 100))"""
# Pictures that are shown but did not load, or are those of the other scheme.
BAD_PICTURES = """scheme => [...document.images]
    .filter(i => getComputedStyle(i).display != 'none')
    .filter(i => !i.naturalWidth || i.classList.contains(scheme == 'dark' ? 'only-light' : 'only-dark'))
    .map(i => i.src)"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder at an address of this machine, which is yielded."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def watch(page: Page, address: str, found: list[str]) -> None:
    """Add to `found` what goes wrong while pages load."""

    def console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            found.append(f"console: {message.text}")

    def request(sent: Request) -> None:
        if urlsplit(sent.url).scheme != "data" and not sent.url.startswith(address):
            found.append(f"request to another host: {sent.url}")

    def response(got: Response) -> None:
        if got.status >= 400:
            found.append(f"status {got.status}: {got.url}")

    page.on("console", console)
    page.on("request", request)
    page.on("response", response)
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("requestfailed", lambda sent: found.append(f"request failed: {sent.url}"))


def check_pages(browser: Browser, address: str, pages: list[str], screenshots: Path | None) -> list[str]:
    """Return what is wrong with the pages, in both widths and colour schemes."""
    wrong = []
    for device, width in WIDTHS.items():
        for scheme in SCHEMES:
            context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
            page, found = context.new_page(), []
            watch(page, address, found)
            for name in pages:
                found.clear()
                page.goto(f"{address}/{name}", wait_until="load")
                if device == "phone":
                    found += [f"too wide: {element}" for element in page.evaluate(TOO_WIDE)]
                page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
                page.wait_for_load_state("networkidle")
                found += [f"picture: {source}" for source in page.evaluate(BAD_PICTURES, scheme)]
                if screenshots:
                    shot = screenshots / f"{name.removesuffix('.html').replace('/', '-')}-{device}-{scheme}.png"
                    page.screenshot(path=shot, full_page=True)
                wrong += [f"{name}, {device}, {scheme}: {what}" for what in found]
            context.close()
    return wrong


def check_search(browser: Browser, address: str) -> list[str]:
    """Return the searches that do not find their page."""
    page, wrong = browser.new_page(), []
    watch(page, address, wrong)
    for words, title in SEARCHES.items():
        page.goto(address)
        page.fill("input[name=q]", words)
        page.press("input[name=q]", "Enter")
        page.wait_for_selector("#search-results li a")
        page.wait_for_load_state("networkidle")
        titles = page.locator("#search-results li > a").all_inner_texts()
        if not any(title in found for found in titles):
            wrong.append(f"search for {words!r}: expected a page with {title!r}, got {titles[:5]}")
    page.close()
    return wrong


def main() -> None:
    """Check the site; exit with 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="*", help="names such as ops/index.html; all if not given")
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of every page")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("chromium-browser"))
    options = parser.parse_args()
    if options.chromium is None:
        raise SystemExit("docs/browser.py: no chromium found; apt install chromium, or --chromium PATH")
    pages = options.pages or sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    pages = [name for name in pages if not name.startswith(("_modules/", "_static/"))]
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    with served(SITE) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        wrong = check_pages(browser, address, pages, options.screenshots) + check_search(browser, address)
        browser.close()
    print("\n".join([*wrong, f"{len(pages)} pages in {len(WIDTHS) * len(SCHEMES)} views, {len(wrong)} problems"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
