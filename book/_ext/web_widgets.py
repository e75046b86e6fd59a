"""Sphinx extension: puts the widgets' modules of ``capsnb/web`` on the website and starts them there."""

import html
import json
import re
from pathlib import Path

from sphinx.util.fileutil import copy_asset

WEB = Path(__file__).parents[2] / "capsnb" / "web"
WEIGHTS = Path(__file__).parents[1] / "_static" / "weights"


def copy_modules(app):
    """Copy before the pages are written, so that their links carry checksums."""
    if app.builder.format == "html":
        copy_asset(str(WEB), str(Path(app.outdir) / "_static" / "web"), excluded=lambda path: path.endswith(".c"))


def preload(app, pagename, templatename, context, doctree):
    """Name every module that a page's widgets need in its head, so that the browser fetches them side by side."""
    kinds = re.findall(r'data-widget="(\w+)"', context.get("body", ""))
    needed = set().union(*(_imports(f"{name}.js") for name in ["page", *kinds])) if kinds else set()
    addresses = [context["pathto"](f"_static/web/{name}", 1) for name in sorted(needed)]
    links = [f'<link rel="modulepreload" href="{address}">' for address in addresses]
    links += [_fetched(context["pathto"](f"_static/weights/{file}", 1)) for file in _weights(context.get("body", ""))]
    context["metatags"] = context.get("metatags", "") + "\n".join(links)


def _fetched(address: str) -> str:
    return f'<link rel="preload" as="fetch" crossorigin href="{address}">'


def _weights(body: str) -> list[str]:
    """The files of the model that the page's first widget shows, by the addresses that the engine asks for."""
    found = re.search(r'data-widget="\w+" data-state="([^"]*)"', body)
    if found is None:
        return []
    name = f"{_model_name(**json.loads(html.unescape(found[1])))}.json"
    decoder = json.loads((WEIGHTS / name).read_text("utf-8"))["files"]["decoder"]
    return [name, f"{decoder['file']}?{decoder['digest']}"]


def _model_name(dataset: str, system: str = "expert-capsules", **rest) -> str:
    """As in ``capsnb/movable.py``, which needs torch."""
    return dataset if system == "expert-capsules" else f"{system}-{dataset}"


def _imports(name: str) -> set[str]:
    """The module and all that it imports."""
    imported = re.findall(r'from "\./(\w+\.js)"', (WEB / name).read_text("utf-8"))
    return {name}.union(*map(_imports, imported))


def drop_thebe(app, pagename, templatename, context, doctree):
    """Jupyter Book adds Thebe to every page, twice. Nothing here uses it, and it would come from another site."""
    for kind in ("script_files", "css_files"):
        context[kind] = [each for each in context.get(kind, []) if "thebe" not in _words(each).lower()]


def _words(asset) -> str:
    return f"{asset.filename} {asset.attributes.get('body', '')}"


def setup(app):
    app.connect("builder-inited", copy_modules)
    app.connect("html-page-context", preload)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.add_css_file("web/style.css")
    app.add_js_file("web/start.js", loading_method="async", fetchpriority="high")  # before MathJax keeps the page busy
    return {"version": "1", "parallel_read_safe": True}
