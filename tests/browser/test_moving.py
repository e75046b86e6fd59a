"""The widgets on the website: what the reader does changes state, pictures, address and words, by mouse and by keys."""

import json
import re
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from playwright.sync_api import expect
from website import come_to_rest, eventually, expect_picture, pick, pixels, widget, without

from capsnb import data, load_pretrained, web_export
from capsnb.explorer import decode_alone, shorten, strip
from capsnb.movable import CHOICES, Choice
from capsnb.routing import route_steps
from capsnb.sparsity import explanation

NEAR = 0.015  # of a pixel: int8 weights, and two roundings to bytes


@pytest.fixture(scope="module")
def model():
    return load_pretrained("mnist")


@pytest.fixture(scope="module")
def vae():
    return CHOICES["vae"].load("mnist")


@pytest.fixture
def page(window, website):
    page = window(base_url=website, viewport={"width": 1200, "height": 1000})
    yield page
    assert page.failed == []


def show(page, chapter, kind, query=""):
    page.goto(f"book/{chapter}.html{query}")
    return widget(page, kind)


def sliders(explorer):
    return explorer.locator(".capsnb-sliders input")


def pose(explorer):
    return [float(value) for value in sliders(explorer).evaluate_all("all => all.map(each => each.value)")]


def exact_pose(explorer):
    """The pose in the address, as soon as it is that of the sliders, which show it rounded to hundredths."""

    def named():
        values = parse_qs(urlsplit(explorer.page.url).query).get("explorer.pose", [""])[0]
        return [float(value) for value in values.split(",") if value]

    eventually(explorer.page, lambda: named() == pytest.approx(pose(explorer), abs=0.006))
    return named()


def capsule(explorer):
    return int(explorer.get_by_label("Capsule", exact=True).input_value())


def large(explorer):
    return explorer.locator("canvas").first


def alone(model, capsule, values):
    return decode_alone(model, capsule, shorten(torch.tensor(values))[None])[0, 0].numpy()


def test_the_explorer_shows_what_torch_makes_of_the_sliders(page, model):
    explorer = show(page, "01-start-here", "explorer")
    for k, value in ((2, 0.4), (11, -0.7), (15, 0.05)):
        sliders(explorer).nth(k).fill(str(value))
        expect(sliders(explorer).nth(k)).to_have_value(str(value))
        expect_picture(large(explorer), alone(model, capsule(explorer), exact_pose(explorer)), NEAR)


def test_the_strip_is_the_picture_with_one_number_moved(page, model):
    explorer = show(page, "01-start-here", "explorer")
    explorer.get_by_role("button", name="Mean pose").click()
    explorer.get_by_label("number", exact=True).select_option("6")
    start = exact_pose(explorer)
    for n in (0, 5, 10):
        moved = [value + (n - 5) / 20 * (k == 6) for k, value in enumerate(start)]
        expect_picture(explorer.locator(".capsnb-strip canvas").nth(n), alone(model, capsule(explorer), moved), NEAR)


def test_every_slider_obeys_the_keys_and_has_a_name_and_a_visible_focus(page):
    explorer = show(page, "01-start-here", "explorer")
    for k in range(16):
        slider = explorer.get_by_role("slider", name=f"number {k}", exact=True)
        slider.focus()
        slider.press("Home")
        expect(slider).to_have_value("-1")
        slider.press("ArrowRight")
        expect(slider).to_have_value("-0.99")
        slider.press("PageUp")
        eventually(page, lambda: float(slider.input_value()) > -0.9)
        slider.press("End")
        expect(slider).to_have_value("1")
    page.keyboard.press("Shift+Tab")
    eventually(page, lambda: page.evaluate("getComputedStyle(document.activeElement).outlineWidth"), "3px")


def test_the_address_holds_the_view_and_brings_it_back(page, window, model):
    explorer = show(page, "01-start-here", "explorer")
    assert "?" not in page.url
    explorer.get_by_role("button", name="Random pose").click()
    explorer.get_by_text("restricted").click()
    sliders(explorer).nth(9).fill("0.33")
    page.wait_for_function("location.search.includes('explorer.dimension=9')")
    state = {"capsule": capsule(explorer), "pose": exact_pose(explorer), "domain": "restricted", "dimension": 9}
    other = window()
    other.goto(page.url)
    again = widget(other, "explorer")
    expect(again.get_by_label("restricted")).to_be_checked()
    eventually(other, lambda: pose(again), pytest.approx(pose(explorer), abs=0.011))
    for each in (explorer, again):
        expect_picture(large(each), strip(state, model)[5, 0].numpy(), NEAR)


@pytest.mark.parametrize("query", [
    *("capsule=99", "pose=1,2,3", "dataset=emnist", "image=5000", "domain=half", "system=vea"),
    *("system=vae&explorer.dataset=fashion-mnist", "system=vae&explorer.domain=restricted"),
])
def test_an_address_that_makes_no_sense_gives_the_usual_view_and_says_so(page, query):
    explorer = show(page, "01-start-here", "explorer", f"?explorer.{query}")
    expect(page.locator(".capsnb-note")).to_contain_text("The address asks for something that is not here")
    expect(explorer.get_by_label("Data set")).to_have_value("mnist")
    eventually(page, lambda: pixels(large(explorer)).max() > 0.5)


def test_a_real_image_begins_with_its_own_pose_and_reset_goes_back(page, model):
    explorer = show(page, "01-start-here", "explorer")
    first = pose(explorer)
    images, _ = data.load("mnist", "test", sample=True)
    pick(explorer.locator(".capsnb-digits"), 4)
    expect_picture(large(explorer), model.reconstruct(images[4:5])[0, 0].numpy(), NEAR)
    expect_picture(explorer.locator("canvas").nth(1), images[4, 0].numpy(), 0.01)
    explorer.get_by_role("button", name="Reset").click()
    eventually(page, lambda: pose(explorer), first)


def test_the_restricted_domain_turns_a_pose_round_and_long_poses_are_shortened_and_both_are_said(page):
    explorer = show(page, "01-start-here", "explorer")
    explorer.get_by_role("button", name="Mean pose").click()
    for k, value in enumerate(exact_pose(explorer)):
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
    expect(explorer.get_by_label("ankle boot").first).to_be_visible()
    fashion = load_pretrained("fashion-mnist")
    expect_picture(large(explorer), alone(fashion, capsule(explorer), exact_pose(explorer)), NEAR)


def test_another_system_begins_with_the_same_image_and_shows_what_torch_makes_of_its_sliders(page, vae):
    explorer = show(page, "01-start-here", "explorer")
    pick(explorer.locator(".capsnb-digits"), 4)
    explorer.get_by_label("System").select_option("vae")
    image = data.load("mnist", "test", sample=True)[0][4:5]
    expect_picture(large(explorer), vae.decode(vae.encode(image))[0, 0].numpy(), NEAR)
    expect_picture(explorer.locator("canvas").nth(1), image[0, 0].numpy(), 0.01)
    expect(explorer.get_by_label("Capsule", exact=True)).to_be_hidden()
    expect(explorer.get_by_role("group", name="Domain")).to_be_hidden()
    for k, value in ((2, 1.7), (11, -2.3)):
        sliders(explorer).nth(k).fill(str(value))
        expect(sliders(explorer).nth(k)).to_have_value(str(value))
        expect_picture(large(explorer), vae.decode(torch.tensor([[exact_pose(explorer)]]))[0, 0].numpy(), NEAR)
    start = exact_pose(explorer)
    for n in (0, 10):
        moved = [value + (n - 5) / 2 * (k == 11) for k, value in enumerate(start)]
        picture = explorer.locator(".capsnb-strip canvas").nth(n)
        expect_picture(picture, vae.decode(torch.tensor([[moved]]))[0, 0].numpy(), NEAR)


def test_the_address_names_the_system_and_reset_returns_to_the_first(page, window, vae):
    explorer = show(page, "01-start-here", "explorer")
    explorer.get_by_text("restricted").click()
    explorer.get_by_label("System").select_option("vae")
    explorer.get_by_role("button", name="Random pose").click()
    named = exact_pose(explorer)
    assert "explorer.system=vae" in page.url and "explorer.domain=complete" in page.url
    other = window()
    other.goto(page.url)
    again = widget(other, "explorer")
    expect(again.get_by_label("System")).to_have_value("vae")
    expect_picture(large(again), vae.decode(torch.tensor([[named]]))[0, 0].numpy(), NEAR)
    explorer.get_by_role("button", name="Reset").click()
    expect(explorer.get_by_label("System")).to_have_value("expert-capsules")
    expect(explorer.get_by_label("Capsule", exact=True)).to_be_visible()


def test_the_weights_of_another_system_are_fetched_when_it_is_chosen_and_not_before(page):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    explorer = show(page, "01-start-here", "explorer")
    come_to_rest(page)
    assert not any("vae" in url for url in asked)
    explorer.get_by_label("System").select_option("vae")
    expect(explorer.get_by_label("Capsule", exact=True)).to_be_hidden()
    come_to_rest(page)
    assert sum("vae-mnist.decoder.bin" in url for url in asked) == 1


@pytest.fixture
def page_of_small_systems(window, serve, tmp_path, small_networks, monkeypatch):
    """The first chapter on a website that also has small untrained networks."""
    for name, (_, moved) in small_networks.items():
        monkeypatch.setitem(CHOICES, name, Choice(name, lambda dataset, each=moved: each, wins="class"))
    weights = without(tmp_path / "site") / "_static" / "weights"
    for name, (_, moved) in small_networks.items():
        web_export.write(moved, "mnist", weights, system=name)
    facts = [json.loads((weights / f"{name}.json").read_text("utf-8")) for name in ("mnist", "capsnet-mnist")]
    (weights / "mnist.json").write_text(json.dumps(facts[0] | {"systems": facts[1]["systems"]}), "utf-8")
    page = window(base_url=serve(tmp_path / "site"))
    yield page
    assert page.failed == []


def test_networks_of_other_sizes_are_moved_capsule_by_capsule(page_of_small_systems, small_networks):
    page = page_of_small_systems
    explorer = show(page, "01-start-here", "explorer")
    explorer.get_by_label("number", exact=True).select_option("11")
    for name, (_, moved) in small_networks.items():
        explorer.get_by_label("System").select_option(name)
        expect(sliders(explorer)).to_have_count(5)
        explorer.get_by_label("Capsule", exact=True).select_option("6")
        expect_picture(large(explorer), alone(moved, 6, moved.poses.mean[6].tolist()), NEAR)
        sliders(explorer).nth(3).fill("0.7")
        expect(sliders(explorer).nth(3)).to_have_value("0.7")
        expect_picture(large(explorer), alone(moved, 6, exact_pose(explorer)), NEAR)
    expect(explorer.get_by_label("Capsule", exact=True).locator("option")).to_have_count(7)


def test_the_walk_leads_from_one_reconstruction_to_the_other(page, model):
    walk = show(page, "11-move-a-capsule", "walk")
    images, _ = data.load("mnist", "test", sample=True)
    rebuilt = model.reconstruct(images[[1, 3]])[:, 0].numpy()
    for group, number in (("From", 1), ("To", 3)):
        pick(walk.get_by_role("group", name=group), number)
    for share, image in (("0", rebuilt[0]), ("1", rebuilt[1])):
        walk.get_by_role("slider", name="Way").fill(share)
        expect_picture(walk.locator("canvas").nth(1), image, NEAR)
    codes = model.encode(images[[1, 3]])
    walk.get_by_role("slider", name="Way").fill("0.3")
    between = model.decode((0.7 * codes[0] + 0.3 * codes[1])[None])[0, 0].numpy()
    expect_picture(walk.locator("canvas").nth(1), between, NEAR)


def test_the_tour_plays_and_pauses(page):
    tour = show(page, "11-move-a-capsule", "tour")
    time = tour.get_by_role("slider", name="Time")
    tour.get_by_role("button", name="Play").click()
    eventually(page, lambda: float(time.input_value()) > 0.3)
    tour.get_by_role("button", name="Pause").click()
    expect(tour.get_by_role("button", name="Play")).to_be_visible()
    stopped = time.input_value()
    page.wait_for_timeout(500)
    assert time.input_value() == stopped


def test_the_tour_stands_still_where_less_motion_is_wanted(window, website, model):
    page = window(base_url=website, reduced_motion="reduce")
    tour = show(page, "11-move-a-capsule", "tour")
    tour.get_by_role("button", name="Next").click()
    expect(tour.get_by_role("slider", name="Time")).to_have_value("1.25")
    raised = model.poses.mean[capsule(tour)] + 0.25 * torch.eye(16)[1]
    expect_picture(large(tour), alone(model, capsule(tour), raised.tolist()), NEAR)
    before = pixels(large(tour))
    page.wait_for_timeout(500)
    assert (pixels(large(tour)) == before).all()
    expect(tour.get_by_role("slider", name="Time")).to_have_value("1.25")


def test_routing_shows_the_couplings_and_the_agreement_that_torch_computes(page, model):
    routing = show(page, "13-routing-watched", "routing")
    pick(routing.locator(".capsnb-digits"), 3)
    routing.get_by_label("Rounds").fill("7")
    x = model.lower_capsules(data.load("mnist", "test", sample=True)[0][3:4])
    state = route_steps(x, model.encoder.W, rounds=7)[-1]
    left = explanation(x, model.encoder.W).argmax().item()
    caption = routing.locator(".capsnb-caption")

    def said():
        words = caption.inner_text().split()
        return [float(word.strip(";,.")) for word in words if word[0].isdigit() and "." in word.strip(".")][:2]

    for j in (0, 13):
        pick(routing.locator(".capsnb-cards"), j)
        held, agreed = 20 * state.coupling[0, :, j].mean().item(), state.agreement[0, j].item()
        eventually(page, said, pytest.approx([held, agreed], abs=0.03))
        expect(caption).to_contain_text(f"After 7 rounds, capsule {j} ")
        expect(caption).to_contain_text(f"leaves capsule {left} on")


def test_the_first_round_couples_everything_equally(page):
    routing = show(page, "13-routing-watched", "routing")
    routing.get_by_label("Rounds").press("Home")
    maps = routing.locator(".capsnb-card canvas:first-child")
    script = "all => all.flatMap(each => Array.from(each.getContext('2d').getImageData(0, 0, 6, 6).data))"
    eventually(page, lambda: set(maps.evaluate_all(script)), {247, 255})
    routing.get_by_label("Rounds").press("End")
    eventually(page, lambda: len(set(maps.evaluate_all(script))) > 20)


def test_routing_plays_its_rounds_unless_less_motion_is_wanted(page, window, website):
    routing = show(page, "13-routing-watched", "routing")
    routing.get_by_label("Rounds").press("Home")
    expect(routing.locator(".capsnb-caption")).to_contain_text("After 1 round,")
    routing.get_by_role("button", name="Play the rounds").click()
    expect(routing.locator(".capsnb-caption")).to_contain_text(re.compile("After ([3-9]|10) rounds,"))
    calm = window(base_url=website, reduced_motion="reduce")
    expect(show(calm, "13-routing-watched", "routing").get_by_role("button", name="Play")).to_be_hidden()


def test_a_test_image_in_the_drawing_area_is_encoded_as_torch_does(page, model):
    draw = show(page, "14-draw-a-digit", "draw")
    pick(draw.locator(".capsnb-digits"), 3)
    image = data.load("mnist", "test", sample=True)[0][3:4]
    explained = explanation(model.lower_capsules(image), model.encoder.W)[0]
    rebuilt = model.reconstruct(image)[0, 0].numpy()
    eventually(page, lambda: np.abs(pixels(draw.locator("canvas").nth(2)) - rebuilt).mean() < 0.02)  # 16 greys
    words = draw.locator(".capsnb-caption").inner_text()  # drawn with the picture
    assert f"Capsule {explained.argmax().item()} " in words
    assert float(words.rstrip(".").split()[-1]) == pytest.approx(explained.max().item(), abs=0.03)


def stroke(page, area, points):
    come_to_rest(page)
    area.hover()  # scrolls there, and waits until it stands still
    box = area.bounding_box()
    place = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*place[0])
    page.mouse.down()
    for point in place[1:]:
        page.mouse.move(*point, steps=8)
    page.mouse.up()


def test_a_drawing_replaces_the_example_is_centred_and_is_answered(page):
    draw = show(page, "14-draw-a-digit", "draw")
    stroke(page, draw.locator(".capsnb-area"), [(0.1, 0.1), (0.12, 0.4)])  # a 1 in a corner
    expect(draw.locator(".capsnb-caption")).to_contain_text("(mostly 1)")
    page.wait_for_function("location.search.includes('draw.ink=')")  # so nothing has changed for a while
    seen = pixels(draw.locator("canvas").nth(1))
    rows, columns = np.nonzero(seen > 0.2)
    assert (rows.max() - rows.min() + 1) in (19, 20, 21)
    place = np.arange(28) + 0.5
    assert [place @ seen.sum(axis) / seen.sum() for axis in (0, 1)] == pytest.approx([14.5, 14.5], abs=0.4)
    draw.get_by_role("button", name="Clear").click()
    eventually(page, lambda: pixels(draw.locator("canvas").nth(1)).max(), 0)


def test_a_drawing_can_be_made_by_keys(page):
    draw = show(page, "14-draw-a-digit", "draw")
    area = draw.get_by_role("application")
    area.press("Delete")
    expect(draw.locator(".capsnb-caption")).to_contain_text("Draw a digit")
    for key in [*["ArrowUp"] * 6, " ", *["ArrowDown"] * 12]:
        area.press(key)
    expect(draw.locator(".capsnb-caption")).to_contain_text("(mostly 1)")


def test_the_encoder_is_fetched_when_the_reader_draws_and_not_before(page):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    draw = show(page, "14-draw-a-digit", "draw")
    come_to_rest(page)
    assert not any("encoder.bin" in url for url in asked)
    before = draw.locator(".capsnb-caption").inner_text()
    pick(draw.locator(".capsnb-digits"), 3)
    expect(draw.locator(".capsnb-caption")).not_to_have_text(before)
    assert sum("encoder.bin" in url for url in asked) == 1
