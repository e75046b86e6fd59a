"""A real browser for tests and benchmarks: Playwright drives the Chromium on the PATH; and a folder served to it."""

import gzip
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
# It runs as root in containers, and asks nobody for anything by itself.
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()
START = 180_000  # milliseconds that a busy machine may take to start it


def find() -> str | None:
    """The path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launch(path: str) -> Iterator[Browser]:
    """A headless browser with a profile of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=START)
        yield browser
        browser.close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # of connections that a busy machine has not answered yet; five are too few for a page


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open, as website servers do
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".js": "text/javascript"}

    def log_message(self, *_):
        """Say nothing."""


class _Compressing(_Handler):
    """Sends text gzipped, as most website servers do."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if path.suffix not in (".html", ".js", ".css", ".json", ".svg") or not path.is_file():
            return super().do_GET()
        content = _gzipped(path)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@cache
def _gzipped(path: Path) -> bytes:
    return gzip.compress(path.read_bytes())


@contextmanager
def serve(folder: Path, *, compress: bool = False) -> Iterator[str]:
    """The address, ending in a slash, at which ``folder`` is served, text gzipped if ``compress``."""
    handler = partial(_Compressing if compress else _Handler, directory=str(folder))
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
