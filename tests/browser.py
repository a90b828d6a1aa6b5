"""A real browser, for the tests of pages and for the picture of one in the README:

python -m tests.browser --checkpoint=runs/flextok --generator=runs/ar --out=docs/demo.png
"""

import argparse
import contextlib
import shutil
from pathlib import Path
from urllib.parse import urlparse

from jaxtok import demo

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def executable():
    """The path of a browser of this machine, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def open_page(url, width=1100, height=900):
    """(Playwright's page at a URL, a list that fills with what goes wrong there).

    Wrong are errors on the console, among them of what does not load, exceptions, and requests that leave this machine.
    """
    from playwright.sync_api import sync_playwright

    wrong = []

    def leaves(request):
        if urlparse(request.url).hostname not in (None, "127.0.0.1", "localhost"):  # None: data: and blob:
            wrong.append(f"asks for {request.url}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=FLAGS)
        page = browser.new_page(viewport=dict(width=width, height=height))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", leaves)
        page.goto(url)
        yield page, wrong
        browser.close()


def main():
    """Takes the picture: a held-out picture whose caption holds a word, some of its tokens, samples of a class."""
    parser = argparse.ArgumentParser(prog="python -m tests.browser", description=main.__doc__)
    for name, default in dict(checkpoint="runs/flextok", generator="", out="docs/demo.png", caption="").items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--tokens", type=int, default=8)
    arguments = parser.parse_args()
    view = demo.open_tokenizer(arguments.checkpoint)
    drawer = demo.open_generator(arguments.generator) if arguments.generator else None
    found = [view.held_out() for _ in range(3000)]
    held_out = next(example for example in found if arguments.caption in example[1])
    title = f"jaxtok: {Path(arguments.checkpoint).name}"
    blocks = demo.page(view._replace(held_out=lambda: held_out), drawer, title)
    _, url, _ = demo.launch(blocks, prevent_thread_lock=True, quiet=True)
    with open_page(url) as (page, wrong):
        page.locator("#made img").wait_for(timeout=120_000)
        page.fill("#tokens input[type=number]", str(arguments.tokens))
        page.keyboard.press("Tab")
        page.locator("#numbers", has_text=f"{arguments.tokens} of").wait_for()
        if drawer:
            page.get_by_role("button", name="Sample").click()
            page.locator("#samples img").wait_for(timeout=120_000)
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        page.screenshot(path=arguments.out, full_page=True)
        print(arguments.out, held_out[1], page.locator("#numbers").inner_text(), *wrong)


if __name__ == "__main__":
    main()
