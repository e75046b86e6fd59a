"""Every page stays at home, fits a phone and everyone, and says so when something is missing."""

import re
from urllib.parse import urlsplit

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect
from website import HTML, ROOT, WIDGETS, come_to_rest, eventually, pixels, widget, without

CHAPTERS = sorted(path.stem for path in (ROOT / "book").glob("*.ipynb"))
PAGES = [*CHAPTERS, "references"]
each_page = pytest.mark.parametrize("name", WIDGETS)


@pytest.fixture
def open_page(window, website):
    """Open a page of the website in a fresh browser window, after ``script``; options are those of a window."""

    def open(name, base=website, script="", **options):
        page = window(**options)
        page.add_init_script(script)
        page.goto(f"{base}book/{name}.html")
        return page

    return open


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_request_leaves_the_site_and_no_script_fails(window, website, name):
    page, left = window(), []

    def keep(route):
        if urlsplit(route.request.url).netloc == urlsplit(website).netloc:
            return route.continue_()
        left.append(route.request.url)
        return route.abort()

    page.route("**/*", keep)
    page.goto(f"{website}book/{name}.html", wait_until="load")
    for kind in WIDGETS.get(name, []):
        widget(page, kind)
    come_to_rest(page)
    assert (left, page.failed) == ([], [])


@pytest.mark.parametrize(
    "name, scheme", [(name, "light") for name in PAGES] + [(name, "dark") for name in WIDGETS]
)
def test_axe_finds_nothing_wrong(open_page, name, scheme):
    page = open_page(name, color_scheme=scheme)
    for kind in WIDGETS.get(name, []):
        widget(page, kind)
    come_to_rest(page)
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert [(each["id"], [node["target"] for node in each["nodes"][:3]]) for each in found] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_the_page_without_sideways_scrolling(open_page, name):
    page = open_page(name, viewport={"width": 390, "height": 844})
    widgets = [widget(page, kind) for kind in WIDGETS.get(name, [])]
    come_to_rest(page)
    for each in widgets:
        box = each.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_keyboard_can_scroll_tables_that_are_wider_than_the_page_and_skips_others(open_page):
    page = open_page("26-side-by-side", viewport={"width": 390, "height": 844})
    script = "all => all.map(each => [each.scrollWidth > each.clientWidth, each.tabIndex === 0])"
    tables = page.locator(".pst-scrollable-table-container")
    assert {wide for wide, _ in tables.evaluate_all(script)} == {True, False}
    eventually(page, lambda: all(wide == focusable for wide, focusable in tables.evaluate_all(script)))


@each_page
def test_without_javascript_the_page_shows_the_still_picture(open_page, name):
    page = open_page(name, java_script_enabled=False)
    for kind in WIDGETS[name]:
        placeholder = page.locator(f'.capsnb[data-widget="{kind}"]')
        expect(placeholder.locator("img")).to_be_visible()
        expect(placeholder.locator("img")).to_have_attribute("alt", re.compile("."))
        expect(placeholder).to_contain_text("still picture")


def assert_still(page, kind, words):
    """The still picture stands there, and under it a sentence with these words."""
    placeholder = page.locator(f'.capsnb[data-widget="{kind}"]')
    note = placeholder.locator(".capsnb-note")
    expect(note).to_contain_text("So this is a still picture.")
    expect(note).to_contain_text(words)
    expect(note).to_be_visible()
    expect(placeholder.locator("img")).to_be_visible()
    expect(placeholder.locator(".capsnb-widget")).to_be_hidden()


@pytest.mark.parametrize("missing", ["*mnist.json", "*mnist.decoder.bin"])
@each_page
def test_a_missing_weight_file_gives_a_sentence_and_the_still_picture(open_page, serve, tmp_path, name, missing):
    page = open_page(name, base=serve(without(tmp_path / "site", missing)))
    for kind in WIDGETS[name]:
        assert_still(page, kind, "could not be fetched")


@pytest.mark.parametrize("kind, name", [("routing", "13-routing-watched"), ("draw", "14-draw-a-digit")])
def test_a_missing_encoder_is_told_when_it_is_needed(open_page, serve, tmp_path, kind, name):
    page = open_page(name, base=serve(without(tmp_path / "site", "mnist.encoder.bin")))
    widget(page, kind).locator(".capsnb-digits label").nth(7).click()
    assert_still(page, kind, "could not be fetched")


def test_a_data_set_that_is_missing_leaves_a_picture_a_sentence_and_a_way_back(open_page, serve, tmp_path):
    page = open_page("01-start-here", base=serve(without(tmp_path / "site", "fashion-mnist*")))
    widget(page, "explorer").get_by_label("Data set").select_option("fashion-mnist")
    assert_still(page, "explorer", "could not be fetched")
    page.wait_for_timeout(600)  # after 300 ms the address holds what can be shown, and so not this data set
    page.get_by_role("button", name="Try again").click()
    explorer = widget(page, "explorer")
    expect(explorer).to_be_visible()
    expect(explorer.get_by_label("Data set")).to_have_value("mnist")


def test_a_missing_module_gives_a_sentence_and_the_still_picture(open_page, serve, tmp_path):
    page = open_page("01-start-here", base=serve(without(tmp_path / "site", "parts.js")))
    assert_still(page, "explorer", "could not be loaded")


def test_a_page_opened_as_a_file_says_how_to_see_it_alive(open_page):
    page = open_page("01-start-here", base=f"{HTML.as_uri()}/")
    assert_still(page, "explorer", "make serve")


def test_an_old_browser_gets_a_sentence_and_the_still_picture(open_page):
    page = open_page("01-start-here", script="delete HTMLScriptElement.prototype.noModule")
    assert_still(page, "explorer", "too old")


def test_without_webassembly_the_widget_moves_all_the_same(open_page):
    page = open_page("01-start-here", script="delete globalThis.WebAssembly")
    picture = widget(page, "explorer").locator(".capsnb-pair canvas").first
    before = pixels(picture)
    page.get_by_role("button", name="Random pose").click()
    eventually(page, lambda: np.abs(pixels(picture) - before).max() > 0.1)
