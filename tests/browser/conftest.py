"""A real browser for the tests of this folder: skipped without one, unless CAPSNB_REQUIRE_BROWSER is 1."""

import os
from contextlib import ExitStack

import chromium
import pytest
from playwright.sync_api import expect
from website import HTML, PATIENCE, is_built

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    path = chromium.find()
    if path is None:
        give_up = pytest.fail if os.environ.get("CAPSNB_REQUIRE_BROWSER") == "1" else pytest.skip
        give_up(f"none of {', '.join(chromium.NAMES)} is installed")
    with chromium.launch(path) as browser:
        yield browser


@pytest.fixture
def window(browser):
    """Open a fresh browser window; returns its page, which lists the errors of its scripts as ``failed``."""
    contexts = []

    def open(**options):
        contexts.append(context := browser.new_context(**options))
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.failed = []
        page.on("pageerror", lambda error: page.failed.append(str(error)))
        return page

    yield open
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def serve():
    """Serve a folder until the tests are done; returns its address, ending in a slash."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(chromium.serve(folder))


@pytest.fixture(scope="session")
def website(serve):
    """The address of the website that `make book` built from this tree."""
    if not is_built():
        give_up = pytest.fail if os.environ.get("CAPSNB_REQUIRE_BROWSER") == "1" else pytest.skip
        give_up("_build/html is missing or older than capsnb/web; run `make book`")
    return serve(HTML)
