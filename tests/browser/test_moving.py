"""The widgets on the website: what the reader does changes state, pictures, address and words, by mouse and by keys."""

from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from website import pixels, settle, widget

from capsnb import data, load_pretrained
from capsnb.explorer import decode_alone, shorten
from capsnb.routing import route_steps
from capsnb.sparsity import explanation

NEAR = 0.015  # of a pixel: int8 weights, and two roundings to bytes


@pytest.fixture(scope="module")
def model():
    return load_pretrained("mnist")


@pytest.fixture
def page(browser, website):
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    page = context.new_page()
    page.failed = []
    page.on("pageerror", lambda error: page.failed.append(str(error)))
    page.base = website
    yield page
    assert page.failed == []
    context.close()


def show(page, chapter, kind, query=""):
    page.goto(f"{page.base}book/{chapter}.html{query}")
    return widget(page, kind)


def sliders(explorer):
    return explorer.locator(".capsnb-sliders input")


def pose(explorer):
    return [float(value) for value in sliders(explorer).evaluate_all("all => all.map(each => each.value)")]


def exact_pose(page):
    """The pose in the address; the sliders show it rounded to hundredths."""
    page.wait_for_timeout(500)
    return [float(value) for value in parse_qs(urlsplit(page.url).query)["explorer.pose"][0].split(",")]


def large(explorer):
    return pixels(explorer.locator("canvas").first)


def alone(model, capsule, values):
    return decode_alone(model, capsule, shorten(torch.tensor(values))[None])[0, 0].numpy()


def test_the_explorer_shows_what_torch_makes_of_the_sliders(page, model):
    explorer = show(page, "01-start-here", "explorer")
    capsule = int(explorer.get_by_label("Capsule", exact=True).input_value())
    for k, value in ((2, 0.4), (11, -0.7), (15, 0.05)):
        sliders(explorer).nth(k).fill(str(value))
        settle(page)
        assert sliders(explorer).nth(k).input_value() == str(value)
        assert np.abs(large(explorer) - alone(model, capsule, exact_pose(page))).max() < NEAR


def test_the_strip_is_the_picture_with_one_number_moved(page, model):
    explorer = show(page, "01-start-here", "explorer")
    explorer.get_by_role("button", name="Mean pose").click()
    explorer.get_by_label("number", exact=True).select_option("6")
    settle(page)
    capsule, start = int(explorer.get_by_label("Capsule", exact=True).input_value()), exact_pose(page)
    for n in (0, 5, 10):
        moved = [value + (n - 5) / 20 * (k == 6) for k, value in enumerate(start)]
        shown = pixels(explorer.locator(".capsnb-strip canvas").nth(n))
        assert np.abs(shown - alone(model, capsule, moved)).max() < NEAR


def test_every_slider_obeys_the_keys_and_has_a_name_and_a_visible_focus(page):
    explorer = show(page, "01-start-here", "explorer")
    for k in range(16):
        slider = explorer.get_by_role("slider", name=f"number {k}", exact=True)
        slider.focus()
        slider.press("Home")
        assert slider.input_value() == "-1"
        slider.press("ArrowRight")
        assert float(slider.input_value()) == pytest.approx(-0.99)
        slider.press("PageUp")
        assert float(slider.input_value()) > -0.9
        slider.press("End")
        assert slider.input_value() == "1"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"


def test_the_address_holds_the_view_and_brings_it_back(page):
    explorer = show(page, "01-start-here", "explorer")
    assert "?" not in page.url
    explorer.get_by_role("button", name="Random pose").click()
    explorer.get_by_text("restricted").click()
    sliders(explorer).nth(9).fill("0.33")
    page.wait_for_function("location.search.includes('explorer.dimension=9')")
    settle(page)
    before, there = large(explorer), page.url
    other = page.context.new_page()
    other.goto(there)
    again = widget(other, "explorer")
    settle(other)
    assert pose(again) == pytest.approx(pose(explorer), abs=0.011) and again.get_by_label("restricted").is_checked()
    assert np.abs(large(again) - before).max() < NEAR


@pytest.mark.parametrize("query", ["capsule=99", "pose=1,2,3", "dataset=emnist", "image=5000", "domain=half"])
def test_an_address_that_makes_no_sense_gives_the_usual_view_and_says_so(page, query):
    explorer = show(page, "01-start-here", "explorer", f"?explorer.{query}")
    assert "The address asks for something that is not here" in page.locator(".capsnb-note").inner_text()
    assert explorer.get_by_label("Data set").input_value() == "mnist" and large(explorer).max() > 0.5


def test_a_real_image_begins_with_its_own_pose_and_reset_goes_back(page, model):
    explorer = show(page, "01-start-here", "explorer")
    first = pose(explorer)
    images, _ = data.load("mnist", "test", sample=True)
    explorer.get_by_label("test image 4", exact=False).first.click(force=True)
    settle(page)
    rebuilt = model.reconstruct(images[4:5])[0, 0].numpy()
    assert np.abs(large(explorer) - rebuilt).max() < NEAR
    assert np.abs(pixels(explorer.locator("canvas").nth(1)) - images[4, 0].numpy()).max() < 0.01
    explorer.get_by_role("button", name="Reset").click()
    assert pose(explorer) == first


def test_the_restricted_domain_turns_a_pose_round_and_long_poses_are_shortened_and_both_are_said(page):
    explorer = show(page, "01-start-here", "explorer")
    explorer.get_by_role("button", name="Mean pose").click()
    for k, value in enumerate(pose(explorer)):
        sliders(explorer).nth(k).fill(str(-value))
    explorer.get_by_text("restricted").click()
    status = explorer.locator("[role=status]")
    status.filter(has_text="turned round").wait_for()
    for k in range(3):
        sliders(explorer).nth(k).fill("1")
    status.filter(has_text="shown shortened").wait_for()


def test_the_other_data_set_comes_with_its_own_capsules_and_images(page):
    explorer = show(page, "01-start-here", "explorer")
    explorer.get_by_label("Data set").select_option("fashion-mnist")
    explorer.get_by_label("ankle boot").first.wait_for(timeout=30_000)
    settle(page)
    fashion = load_pretrained("fashion-mnist")
    capsule = int(explorer.get_by_label("Capsule", exact=True).input_value())
    assert np.abs(large(explorer) - alone(fashion, capsule, exact_pose(page))).max() < NEAR


def test_the_walk_leads_from_one_reconstruction_to_the_other(page, model):
    walk = show(page, "11-move-a-capsule", "walk")
    images, _ = data.load("mnist", "test", sample=True)
    rebuilt = model.reconstruct(images[[1, 3]])[:, 0].numpy()
    for group, number in (("From", 1), ("To", 3)):
        walk.get_by_role("group", name=group).locator(f"input[value='{number}']").check(force=True)
    for share, image in (("0", rebuilt[0]), ("1", rebuilt[1])):
        walk.get_by_role("slider", name="Way").fill(share)
        settle(page)
        assert np.abs(pixels(walk.locator("canvas").nth(1)) - image).max() < NEAR
    codes = model.encode(images[[1, 3]])
    walk.get_by_role("slider", name="Way").fill("0.3")
    settle(page)
    between = model.decode((0.7 * codes[0] + 0.3 * codes[1])[None])[0, 0].numpy()
    assert np.abs(pixels(walk.locator("canvas").nth(1)) - between).max() < NEAR


def test_the_tour_plays_and_pauses(page):
    tour = show(page, "11-move-a-capsule", "tour")
    time = tour.get_by_role("slider", name="Time")
    tour.get_by_role("button", name="Play").click()
    page.wait_for_timeout(700)
    tour.get_by_role("button", name="Pause").click()
    stopped = float(time.input_value())
    assert stopped > 0.3
    page.wait_for_timeout(300)
    assert float(time.input_value()) == stopped


def test_the_tour_stands_still_where_less_motion_is_wanted(browser, website):
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.base = website
    tour = show(page, "11-move-a-capsule", "tour")
    tour.get_by_role("button", name="Next").click()
    settle(page)
    assert tour.get_by_role("slider", name="Time").input_value() == "1.25"
    before = large(tour)
    page.wait_for_timeout(500)
    assert (large(tour) == before).all()
    context.close()


def test_routing_shows_the_couplings_and_the_agreement_that_torch_computes(page, model):
    routing = show(page, "13-routing-watched", "routing")
    routing.locator(".capsnb-digits input[value='3']").check(force=True)
    routing.get_by_label("Rounds").fill("7")
    page.wait_for_function("document.querySelector('.capsnb-caption').textContent.includes('After 7 rounds')")
    page.wait_for_timeout(2000)
    x = model.lower_capsules(data.load("mnist", "test", sample=True)[0][3:4])
    state = route_steps(x, model.encoder.W, rounds=7)[-1]
    left = explanation(x, model.encoder.W).argmax().item()
    for j in (0, 13):
        routing.locator(f".capsnb-cards input[value='{j}']").check(force=True)
        words = routing.locator(".capsnb-caption").inner_text()
        held, agreed = 20 * state.coupling[0, :, j].mean().item(), state.agreement[0, j].item()
        said = [float(word.strip(";,.")) for word in words.split() if word[0].isdigit() and "." in word.strip(".")]
        assert said[:2] == pytest.approx([held, agreed], abs=0.03)
        assert f"leaves capsule {left} on" in words


def test_the_first_round_couples_everything_equally(page):
    routing = show(page, "13-routing-watched", "routing")
    routing.get_by_label("Rounds").press("Home")
    maps = routing.locator(".capsnb-card canvas:first-child")
    script = "all => all.flatMap(each => Array.from(each.getContext('2d').getImageData(0, 0, 6, 6).data))"
    assert set(maps.evaluate_all(script)) == {247, 255}
    routing.get_by_label("Rounds").press("End")
    assert len(set(maps.evaluate_all(script))) > 20


def test_routing_plays_its_rounds_unless_less_motion_is_wanted(page, browser, website):
    routing = show(page, "13-routing-watched", "routing")
    routing.get_by_role("button", name="Play the rounds").click()
    page.wait_for_function("document.querySelector('.capsnb-caption').textContent.includes('After 3 rounds')")
    context = browser.new_context(reduced_motion="reduce")
    calm = context.new_page()
    calm.base = website
    assert not show(calm, "13-routing-watched", "routing").get_by_role("button", name="Play").is_visible()
    context.close()


def test_a_test_image_in_the_drawing_area_is_encoded_as_torch_does(page, model):
    draw = show(page, "14-draw-a-digit", "draw")
    draw.locator(".capsnb-digits input[value='3']").check(force=True)
    page.wait_for_timeout(2000)
    image = data.load("mnist", "test", sample=True)[0][3:4]
    explained = explanation(model.lower_capsules(image), model.encoder.W)[0]
    words = draw.locator(".capsnb-caption").inner_text()
    assert f"Capsule {explained.argmax().item()} " in words
    assert float(words.rstrip(".").split()[-1]) == pytest.approx(explained.max().item(), abs=0.03)
    rebuilt = model.reconstruct(image)[0, 0].numpy()
    assert np.abs(pixels(draw.locator("canvas").nth(2)) - rebuilt).mean() < 0.02  # 16 greys


def stroke(page, area, points):
    box = area.bounding_box()
    place = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*place[0])
    page.mouse.down()
    for point in place[1:]:
        page.mouse.move(*point, steps=8)
    page.mouse.up()


def test_a_drawing_replaces_the_example_is_centred_and_is_answered(page):
    draw = show(page, "14-draw-a-digit", "draw")
    area = draw.locator(".capsnb-area")
    area.scroll_into_view_if_needed()
    stroke(page, area, [(0.1, 0.1), (0.12, 0.4)])  # a 1 in a corner
    page.wait_for_timeout(2000)
    seen = pixels(draw.locator("canvas").nth(1))
    rows, columns = np.nonzero(seen > 0.2)
    assert (rows.max() - rows.min() + 1) in (19, 20, 21)
    place = np.arange(28) + 0.5
    assert [place @ seen.sum(axis) / seen.sum() for axis in (0, 1)] == pytest.approx([14.5, 14.5], abs=0.4)
    assert "(mostly 1)" in draw.locator(".capsnb-caption").inner_text()
    page.wait_for_function("location.search.includes('draw.ink=')")
    draw.get_by_role("button", name="Clear").click()
    assert pixels(draw.locator("canvas").nth(1)).max() == 0


def test_a_drawing_can_be_made_by_keys(page):
    draw = show(page, "14-draw-a-digit", "draw")
    area = draw.get_by_role("application")
    area.press("Delete")
    for key in [*["ArrowUp"] * 6, " ", *["ArrowDown"] * 12]:
        area.press(key)
    page.wait_for_timeout(2000)
    assert "(mostly 1)" in draw.locator(".capsnb-caption").inner_text()


def test_the_encoder_is_fetched_when_the_reader_draws_and_not_before(page):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    draw = show(page, "14-draw-a-digit", "draw")
    page.wait_for_timeout(1000)
    assert not any("encoder.bin" in url for url in asked)
    draw.locator(".capsnb-digits input[value='3']").check(force=True)
    page.wait_for_timeout(1000)
    assert sum("encoder.bin" in url for url in asked) == 1
