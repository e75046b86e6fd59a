"""The widgets with torch behind them: every change of the state shows, and pages get a still picture."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from capsnb import data, live
from capsnb.evaluation import winner
from capsnb.explorer import decode_alone, shorten, strip
from capsnb.movable import CHOICES, EXPERTS, Choice
from capsnb.pretrained import load_pretrained
from capsnb.routing import route_steps
from capsnb.widgets import WEB, Draw, Explorer, Routing, Tour, Walk, bundle

J, D = 5, 7
WIDGETS = (Explorer, Walk, Tour, Routing, Draw)
each_widget = pytest.mark.parametrize("kind", WIDGETS, ids=lambda kind: kind.kind)


@pytest.fixture(autouse=True)
def long_mean_poses(small_model, rng):
    """Mean poses long enough to be seen; those of an untrained model are almost zero."""
    small_model.poses.mean.copy_(0.8 * torch.nn.functional.normalize(torch.randn(J, D, generator=rng)))


@pytest.fixture
def load(small_model):
    return lambda dataset: small_model


@pytest.fixture
def images():
    return data.load("mnist", "test", sample=True)[0]


def greys(content):
    return torch.tensor(np.frombuffer(content, np.uint8).reshape(-1, 1, 28, 28) / 255).float()


def assert_near(content, images):
    assert (greys(content) - images).abs().max() <= 0.5 / 255 + 1e-4


def floats(content, *shape):
    return torch.tensor(np.frombuffer(content, np.float32).reshape(shape))


def test_an_explorer_begins_with_the_mean_pose_of_a_capsule_that_is_asked_for(load, small_model):
    explorer = Explorer(capsule=3, load=load)
    assert explorer.state["pose"] == small_model.poses.mean[3].tolist() and explorer.state["image"] is None
    assert_near(explorer.shown["picture"], decode_alone(small_model, 3, small_model.poses.mean[3:4]))


def test_an_explorer_begins_with_a_test_image_in_the_capsule_that_fires_for_it(load, small_model, images):
    explorer = Explorer(image=4, load=load)
    assert explorer.state["capsule"] == winner(small_model.encode(images[4:5])).item()
    assert_near(explorer.shown["picture"], small_model.reconstruct(images[4:5]))
    first = Explorer(load=load)
    won = {number: winner(small_model.encode(images[[number]])).item() for number in first._source(first.state).digits}
    assert first.state["capsule"] == min(won.values()) == won[first.state["image"]]


def test_every_change_of_the_explorers_state_changes_its_pictures(load, small_model):
    explorer = Explorer(capsule=1, load=load)
    for change in (
        {"dimension": 5},
        {"pose": [-0.3] * D},
        {"domain": "restricted"},
        {"capsule": 4},
        {"pose": [0.9] * D},
    ):
        before = explorer.shown
        explorer.state = explorer.state | change
        assert explorer.shown != before
        images = strip(explorer.state, small_model)
        assert_near(explorer.shown["strip"], images)
        assert explorer.shown["picture"] == explorer.shown["strip"][5 * 784 : 6 * 784]


def test_another_data_set_brings_its_own_manifest_and_faces(small_model):
    asked = []
    explorer = Explorer(load=lambda dataset: asked.append(dataset) or small_model)
    assert explorer.manifest["name"] == "mnist"
    explorer.state = explorer.state | {"dataset": "fashion-mnist"}
    assert explorer.manifest["name"] == "fashion-mnist" and "ankle boot" in explorer.manifest["classes"]
    assert_near(
        explorer.faces, torch.cat([decode_alone(small_model, j, small_model.poses.mean[[j]]) for j in range(J)])
    )
    explorer.state = explorer.state | {"dataset": "mnist"}
    assert asked == ["mnist", "fashion-mnist"]


def test_a_walk_goes_straight_from_the_code_of_one_image_to_that_of_the_other(load, small_model, images):
    walk = Walk(first=1, last=3, load=load)
    codes = small_model.encode(images[[1, 3]])
    for share in (0.0, 0.3, 1.0):
        walk.state = walk.state | {"share": share}
        assert_near(walk.shown["picture"], small_model.decode(((1 - share) * codes[0] + share * codes[1])[None]))
    assert_near(walk.shown["strip"][-784:], small_model.reconstruct(images[3:4]))
    assert_near(walk.shown["strip"][:784], small_model.reconstruct(images[1:2]))


def test_a_walk_by_default_stays_within_one_capsule_and_leads_to_another_class_if_it_can(load):
    walk = Walk(load=load)
    source, ends = walk._source(walk.state), [walk.state["from"], walk.state["to"]]
    won, label = source.won(), {number: digit["label"] for number, digit in source.digits.items()}
    assert won[ends[0]] == won[ends[1]]
    there_are = any(won[a] == won[b] and label[a] != label[b] for a in won for b in won)
    assert (label[ends[0]] != label[ends[1]]) == there_are


@pytest.mark.parametrize("time, dimension, offset", [(0.25, 0, 0.25), (3.75, 3, -0.25), (6.5, 6, 0.0), (7, 6, 0.0)])
def test_the_tour_swings_one_number_after_the_other(load, small_model, time, dimension, offset):
    tour = Tour(capsule=2, load=load)
    tour.state = tour.state | {"time": time}
    pose = small_model.poses.mean[2].clone()
    pose[dimension] += offset
    assert_near(tour.shown["picture"], decode_alone(small_model, 2, shorten(pose[None])))
    pose = small_model.poses.mean[2].clone()
    pose[3] += 0.25
    assert_near(tour.shown["peaks"][3 * 784 : 4 * 784], decode_alone(small_model, 2, shorten(pose[None])))


@pytest.mark.parametrize("over", ["upper", "lower"])
def test_routing_shows_every_round_of_the_library(load, small_model, images, over):
    routing = Routing(image=4, load=load)
    routing.state = routing.state | {"over": over}
    W = small_model.encoder.W.detach()
    rounds = route_steps(small_model.lower_capsules(images[4:5]).detach(), W, rounds=10, over=over)
    maps = floats(routing.shown["maps"], 10, J, 6, 6)
    for number, (coupling, _, agreement) in enumerate(rounds):
        assert torch.allclose(floats(routing.shown["agreement"], 10, J)[number], agreement[0], atol=1e-5)
        unit = J if over == "upper" else len(W)
        assert torch.allclose(
            maps[number, 2, 1, 3], unit * coupling[0, 2 * (1 * 6 + 3) : 2 * (1 * 6 + 3) + 2, 2].mean(), rtol=1e-4
        )
    assert torch.allclose(maps[0], torch.ones(J, 6, 6))


def test_a_drawing_is_encoded_and_rebuilt(load, small_model, images):
    draw = Draw(image=4, load=load)
    assert draw.state["ink"] == live.write_ink(images[4]) and draw.state["image"] == 4
    seen = live.read_ink(draw.state["ink"])
    assert_near(draw.shown["picture"], small_model.reconstruct(seen))
    capsules = small_model.encode(seen)[0]
    assert torch.allclose(floats(draw.shown["firing"], J), capsules.norm(dim=1))
    draw.state = draw.state | {"ink": ""}
    assert draw.shown == {}


def test_ink_holds_16_greys_of_every_pixel_and_fits_into_an_address(images):
    for image in images[:7]:
        text = live.write_ink(image)
        assert re.fullmatch(r"[\w-]{523}", text)
        assert (live.read_ink(text)[0] - image).abs().max() <= 1 / 30 + 1e-6
        assert live.write_ink(live.read_ink(text)[0]) == text
    assert live.write_ink(torch.zeros(1, 28, 28)) == ""
    with pytest.raises(ValueError, match="holds 3 bytes, expected 392"):
        live.read_ink("AAAA")


@each_widget
def test_a_page_without_a_kernel_gets_a_picture_and_all_that_brings_it_to_life(kind, load):
    widget = kind(load=load)
    bundle, _ = widget._repr_mimebundle_()
    page = bundle["text/html"]
    attributes = {name: html.unescape(text) for name, text in re.findall(r'data-(\w+)="([^"]*)"', page)}
    assert attributes["widget"] == kind.kind and json.loads(attributes["state"]) == widget.state
    shown = {name: base64.b64decode(text) for name, text in json.loads(attributes["shown"]).items()}
    assert shown == widget.shown
    assert page.count("<img") == 1 and f'alt="{html.escape(widget.alt)}"' in page and bundle["image/png"] in page
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))))
    assert (picture[0, 0] != 255).any() and picture.max() == 255


@each_widget
def test_a_notebook_gets_one_module_without_imports_that_exports_render(kind):
    text = bundle(kind.kind)
    assert not re.search(r"^(import|export (?!default))", text, re.MULTILINE)
    for name in re.findall(r'modules\["(\w+\.js)"\] = ', text):
        source = (WEB / name).read_text("utf-8")
        assert all(needed in text for needed in re.findall(r'from "\./(\w+\.js)"', source))
    assert f'export default modules["{kind.kind}.js"];' in text
    assert re.search(r"return \{[^}]*\brender\b", text.split("modules[")[-2])


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        (Explorer, {"dataset": "minst"}, "unknown data set 'minst'; choose one of 'mnist', 'fashion-mnist'"),
        (Explorer, {"system": "vea"}, "unknown system 'vea'; choose one of 'expert-capsules'"),
        (Explorer, {"system": "vae", "dataset": "fashion-mnist"}, "unknown data set 'fashion-mnist'"),
        (Explorer, {"capsule": J}, "there is no capsule 5; choose a number from 0 to 4"),
        (Explorer, {"capsule": -1}, "there is no capsule -1; choose a number from 0 to 4"),
        (Explorer, {"image": 999}, "test image 999 is not one of the 20 to choose from"),
        (Walk, {"first": 999, "last": 1}, "test image 999 is not one of the 20 to choose from"),
        (Tour, {"capsule": J}, "there is no capsule 5; choose a number from 0 to 4"),
        (Routing, {"image": 999}, "test image 999 is not one of the 20 to choose from"),
        (Draw, {"image": 999}, "test image 999 is not one of the 20 to choose from"),
    ],
)
def test_what_the_model_does_not_have_is_refused(load, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments, load=load)


def test_a_state_that_the_model_cannot_show_is_refused(load):
    with pytest.raises(ValueError, match="there is no dimension 7"):
        explorer = Explorer(load=load)
        explorer.state = explorer.state | {"dimension": D}
    with pytest.raises(ValueError, match="unknown over 'both'"):
        routing = Routing(load=load)
        routing.state = routing.state | {"over": "both"}


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist"])
def test_the_shipped_models_can_be_explored(dataset):
    explorer = Explorer(dataset, capsule=7)
    assert len(explorer.state["pose"]) == 16 and len(explorer.manifest["digits"]) == 20
    assert_near(explorer.shown["strip"], strip(explorer.state, load_pretrained(dataset)))


@pytest.fixture
def other_systems(small_networks, small_vae, monkeypatch):
    """The small untrained models of the other systems in the table."""
    moved = {name: each for name, (_, each) in small_networks.items()} | {"vae": small_vae[1]}
    for name, each in moved.items():
        monkeypatch.setitem(CHOICES, name, Choice(name, lambda dataset, each=each: each))
    return moved


@pytest.mark.parametrize("system", ["capsnet", "sparse-capsules", "vae"])
def test_the_explorer_moves_the_capsules_of_another_system(other_systems, images, system):
    moved, explorer = other_systems[system], Explorer(system=system, image=4)
    code = moved.encode(images[4:5])
    on = winner(code).item()
    assert (explorer.state["system"], explorer.state["dataset"], explorer.state["capsule"]) == (system, "mnist", on)
    assert explorer.manifest["name"] == f"{system}-mnist" and explorer.manifest["system"] == system
    assert_near(explorer.shown["picture"], decode_alone(moved, on, code[:, on]))
    explorer.state = explorer.state | {"pose": [0.3] * moved.poses.mean.shape[1], "dimension": 2}
    assert_near(explorer.shown["strip"], strip(explorer.state, moved))
    assert Image.open(io.BytesIO(explorer.still())).size[0] > 28


def test_a_system_that_was_just_chosen_sends_its_manifest_first_and_waits_for_a_pose(other_systems, load, monkeypatch):
    monkeypatch.setitem(CHOICES, EXPERTS, CHOICES[EXPERTS]._replace(load=load))
    explorer = Explorer(capsule=4)
    explorer.state = explorer.state | {"system": "vae", "start": "waiting"}
    assert explorer.shown == {} and explorer.manifest["name"] == "vae-mnist"
    mean = other_systems["vae"].poses.mean
    assert_near(explorer.faces, other_systems["vae"].decode(mean[None]))
    explorer.state = explorer.state | {"start": "mean", "capsule": 0, "pose": mean[0].tolist()}
    assert explorer.shown["picture"] == explorer.faces


def test_the_other_widgets_show_expert_capsules_alone():
    with pytest.raises(TypeError, match="system"):
        Walk(system="vae")
