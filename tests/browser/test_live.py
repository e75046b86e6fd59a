"""The same modules as a notebook runs them: in the browser the one text that it loads, behind it Python and torch."""

import base64
import json

import pytest
from playwright.sync_api import expect
from website import eventually, expect_picture

from capsnb import load_pretrained
from capsnb.explorer import strip
from capsnb.movable import CHOICES
from capsnb.widgets import WEB, Draw, Explorer, Routing, Tour, Walk

# What a notebook's front end does between the widget and its kernel, with one function of Python as the connection.
NOTEBOOK = """async ([esm, values]) => {
    const bytes = (text) => new DataView(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
    const events = new EventTarget(), received = (name, value) => {
        const open = (shown) => Object.fromEntries(Object.entries(shown).map(([key, each]) => [key, bytes(each)]));
        values[name] = name === "shown" ? open(value) : name === "faces" ? bytes(value) : value;
        events.dispatchEvent(new Event(`change:${name}`));
    };
    const model = {
        get: (name) => values[name],
        set: (name, value) => received(name, value),
        on: (event, listener) => events.addEventListener(event, listener),
        off: (event, listener) => events.removeEventListener(event, listener),
        save_changes: async () => {
            const answer = await kernel(values.state);
            for (const name of ["faces", "manifest", "shown"]) received(name, answer[name]);
        },
    };
    const sent = { ...values };
    for (const name of ["manifest", "faces", "shown", "state"]) received(name, sent[name]);
    const module = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" })));
    const el = document.body.appendChild(document.createElement("div"));
    el.className = "capsnb";
    module.default.render({ model, el });
}"""


def sent(widget):
    """What a kernel sends, bytes as base64."""
    packed = {name: base64.b64encode(content).decode() for name, content in widget.shown.items()}
    faces = base64.b64encode(widget.faces).decode()
    return {"state": widget.state, "manifest": widget.manifest, "faces": faces, "shown": packed}


@pytest.fixture
def notebook(window, website):
    """Show a widget as a notebook does; returns the page."""
    pages = []

    def show(widget):
        pages.append(page := window())

        def kernel(state):
            widget.state = json.loads(json.dumps(state))
            return sent(widget)

        page.expose_function("kernel", kernel)
        page.goto(f"{website}_static/web/style.css")
        page.set_content(f"<style>{(WEB / 'style.css').read_text('utf-8')}</style>")
        page.evaluate(NOTEBOOK, [widget._esm, sent(widget)])
        return page

    yield show
    assert [page.failed for page in pages if page.failed] == []


def test_a_slider_moves_the_state_in_python_and_torchs_picture_comes_back(notebook):
    explorer = Explorer()
    page = notebook(explorer)
    page.get_by_role("slider", name="number 3", exact=True).fill("-0.6")
    eventually(page, lambda: (explorer.state["pose"][3], explorer.state["dimension"]), (-0.6, 3))
    images = strip(explorer.state, load_pretrained("mnist"))[:, 0].numpy()
    for n in (0, 10):
        expect_picture(page.locator(".capsnb-strip canvas").nth(n), images[n], 0.003)
    expect_picture(page.locator("canvas").first, images[5], 0.003)


def test_another_data_set_is_read_by_python_and_begins_with_one_of_its_images(notebook):
    explorer = Explorer()
    page = notebook(explorer)
    page.get_by_label("Data set").select_option("fashion-mnist")
    expect(page.get_by_label("ankle boot").first).to_be_visible()
    eventually(page, lambda: (explorer.state["dataset"], explorer.state["start"]), ("fashion-mnist", "real"))
    first, capsule = explorer.manifest["digits"][0], explorer.state["capsule"]
    assert explorer.state["pose"] == first["code"][16 * capsule :][:16], capsule


def test_another_system_is_read_by_python_and_begins_with_the_same_image(notebook):
    explorer = Explorer(image=4)
    page = notebook(explorer)
    page.get_by_label("System").select_option("vae")
    eventually(page, lambda: (explorer.state["system"], explorer.state["start"]), ("vae", "real"))
    assert explorer.state["image"] == 4 and len(explorer.state["pose"]) == 16
    vae = CHOICES["vae"].load("mnist")
    expect_picture(page.locator("canvas").first, strip(explorer.state, vae)[5, 0].numpy(), 0.003)
    page.get_by_role("button", name="Reset").click()
    eventually(page, lambda: explorer.state["system"], "expert-capsules")
    expect_picture(page.locator("canvas").first, strip(explorer.state, load_pretrained("mnist"))[5, 0].numpy(), 0.003)


@pytest.mark.parametrize(
    "widget, act, changed",
    [
        (Walk, lambda page: page.get_by_role("slider", name="Way").press("End"), {"share": 1}),
        (Tour, lambda page: page.get_by_role("slider", name="Time").press("End"), {"time": 16}),
        (Routing, lambda page: page.get_by_label("Rounds").press("Home"), {"rounds": 1}),
        (Draw, lambda page: page.get_by_role("button", name="Clear").click(), {"ink": "", "image": None}),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_the_other_widgets_reach_python_too(notebook, widget, act, changed):
    shown = widget()
    page = notebook(shown)
    act(page)
    eventually(page, lambda: {name: shown.state[name] for name in changed}, changed)
