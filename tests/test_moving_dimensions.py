"""The experiment on moving dimensions finds what was built into decoders whose answer is known."""

import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints
from capsnb.strokes import MEASUREMENTS
from experiments import moving_dimensions, results
from experiments.moving_dimensions import (
    SETS,
    STEPS,
    Sizes,
    Won,
    agreement,
    correlation,
    difference,
    directions,
    explore,
    main,
    move,
    of_sweeps,
    pictures_of,
    summary,
    sweep,
    won,
)

ROW, COLUMN = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
SLANT = list(MEASUREMENTS).index("slant")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def leaning(degrees):
    """An upright stroke of width 3 sheared by every one of the angles: [*, 1, 28, 28]."""
    shift = (13.5 - ROW) * (degrees.view(-1, 1, 1) * math.pi / 180).tan()
    strokes = (2 - (COLUMN - 13.5 - shift).abs()).clamp(0, 1)
    return strokes.view(*degrees.shape, 1, 28, 28)


def grey(shades):
    """Whole images of one grey: [*, 1, 28, 28]."""
    return shades[..., None, None, None].expand(*shades.shape, 1, 28, 28).clone()


def test_correlations_are_numpys_and_0_where_nothing_varies(double):
    x, y = double(101, 1), double(101, 3)
    y[:, 1] = 7
    y[:, 2] -= 2 * x[:, 0]
    expected = [np.corrcoef(x[:, 0], y[:, 0])[0, 1], 0, np.corrcoef(x[:, 0], y[:, 2])[0, 1]]
    assert_close(correlation(x, y), torch.tensor(expected).double())


def test_the_difference_is_the_mean_over_each_image_and_the_next_one():
    assert difference(grey(torch.tensor([0.0, 0.3, 1.0, 0.1]))) == pytest.approx((0.3 + 0.7 + 0.9 + 0.1) / 4)


def test_images_belong_to_the_capsule_with_the_longest_pose(rng):
    images, codes = torch.rand(11, 1, 28, 28, generator=rng), torch.randn(11, 3, 5, generator=rng)
    found = won(images, codes)
    assert sum(len(each.poses) for each in found) == 11
    for n, code in enumerate(codes):
        longest = max(range(3), key=lambda j: code[j].norm())
        (row,) = [r for r, image in enumerate(found[longest].images) if torch.equal(image, images[n])]
        assert torch.equal(found[longest].poses[row], code[longest])


def test_a_sweep_changes_the_coordinate_along_its_direction_and_nothing_else(rng):
    starts, values = 0.1 * torch.randn(3, 5, generator=rng), torch.linspace(-0.3, 0.2, 7)
    direction = torch.tensor([0.6, 0.0, 0.0, -0.8, 0.0])
    found = sweep(starts, direction, values)
    assert_close(found @ direction, values.expand(3, 7))
    across = torch.linalg.qr(torch.cat([direction[:, None], torch.randn(5, 4, generator=rng)], dim=1)).Q[:, 1:]
    assert_close(found @ across, (starts @ across).unsqueeze(1).expand(3, 7, 4))


def test_a_pose_that_a_sweep_makes_too_long_is_shortened():
    found = sweep(torch.tensor([[0.8, 0.0]]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.6, 1.5]))
    expected = torch.tensor([[0.8, 0.0], [0.8, 0.6], [0.8 / 1.7, 1.5 / 1.7]])
    assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_strokes_that_lean_more_and_more_are_said_to_do_so():
    angles = torch.stack([torch.linspace(-15, 10, 11), torch.linspace(-5, 20, 11)])
    found = of_sweeps(leaning(angles), torch.linspace(-0.1, 0.2, 11))
    first, last = leaning(angles[:, 0]), leaning(angles[:, -1])
    assert found["change"] == pytest.approx((last - first).abs().mean().item())
    assert found["sweep"][SLANT] > 0.999 and found["effect"][SLANT] == pytest.approx(25, abs=0.5)
    assert found["jump"] < 1.3
    names = list(MEASUREMENTS)
    assert abs(found["effect"][names.index("area")]) < 0.1 and found["sweep"][names.index("holes")] == 0


def test_the_correlation_along_sweeps_leaves_out_how_their_poses_differ():
    """Three sweeps in which the ink grows alike, from shades that are far apart."""
    shades = torch.tensor([[0.0], [0.7], [0.3]]) + torch.linspace(0, 0.1, 11)
    assert of_sweeps(grey(shades), torch.linspace(3, 4, 11))["sweep"][0] == pytest.approx(1, abs=1e-5)


def test_the_jump_is_1_for_even_steps_and_counts_them_all_for_a_single_one_in_the_worst_sweep():
    even, single = torch.linspace(0, 1, 11), torch.tensor([0.0] * 4 + [1.0] * 7)
    values = torch.linspace(0, 1, 11)
    assert of_sweeps(grey(even[None]), values)["jump"] == pytest.approx(1)
    assert of_sweeps(grey(torch.stack([even, single, even])), values)["jump"] == pytest.approx(10)
    assert of_sweeps(grey(torch.zeros(1, 11)), values)["jump"] == 0


def test_directions_are_axes_turned_ones_leading_ones_first_and_fits_to_the_measurements(rng):
    poses = torch.randn(503, 5, generator=rng) * torch.tensor([0.05, 0.3, 0.1, 0.02, 0.2]) + 0.3
    lean = torch.tensor([3.0, 0.0, -1.0, 0.0, 0.0])
    train = Won(leaning(30 * (poses - 0.3) @ lean), poses)
    found = directions(train, poses.T.cov(), rng=generator(1))
    assert torch.equal(found["axes"], torch.eye(5))
    for name in ("turned", "principal"):
        assert_close(found[name] @ found[name].T, torch.eye(5), atol=1e-5, rtol=0)
    assert found["turned"].abs().amax() < 0.99
    assert [abs(v).argmax().item() for v in found["principal"]] == [1, 4, 2, 0, 3]
    assert found["fitted"].shape == (6, 5)
    assert_close(found["fitted"][SLANT], lean / lean.norm(), atol=0.05, rtol=0)


@pytest.fixture
def leaning_model(small_model, monkeypatch):
    """A model whose capsule 3 leans by 100 degrees times its number 2, and is still seen up to 10 degrees."""

    def decode_alone(model, capsule, poses):
        assert capsule == 3
        return leaning(100 * poses[:, 2])

    def encode(self, images):
        codes = torch.zeros(len(images), 5, 7)
        codes[:, 1, 0], codes[:, 3, 0] = 0.5, torch.where(MEASUREMENTS["slant"](images) < 10, 0.9, 0.1)
        return codes

    monkeypatch.setattr(moving_dimensions, "decode_alone", decode_alone)
    monkeypatch.setattr(type(small_model), "encode", encode)
    return small_model


def test_moving_a_number_of_a_made_up_capsule_finds_its_range_and_what_it_does(leaning_model, rng):
    poses = 0.1 * torch.randn(211, 7, generator=rng)
    train, test = Won(leaning(100 * poses[:, 2]), poses), Won(leaning(-100 * poses[:53, 2]), poses[:53])
    axis = torch.eye(7)[2]
    found, pictures = move(leaning_model, 3, train, test, axis, poses[:5])
    low, high = np.quantile(poses[:, 2], (0.01, 0.99))
    assert_close(found["range"], torch.tensor([low, high]).float())
    assert_close(pictures, leaning(100 * torch.linspace(low, high, STEPS)), atol=1e-4, rtol=0)
    assert found["effect"][SLANT] == pytest.approx(100 * (high - low), rel=0.02)
    assert found["sweep"][SLANT] > 0.99 and found["real"][SLANT] < -0.99
    assert found["kept"] == 0.5
    still, _ = move(leaning_model, 3, train, test, torch.eye(7)[4], poses[:5])
    assert still["change"] == pytest.approx(0, abs=1e-5) and still["effect"].abs().max() < 1e-3


def test_only_capsules_in_use_are_explored_and_every_set_has_its_tables(leaning_model, rng):
    poses = 0.1 * torch.randn(61, 7, generator=rng)
    mine, none = Won(leaning(100 * poses[:, 2]), poses), Won(torch.zeros(0, 1, 28, 28), torch.zeros(0, 7))
    used, tables, strips = explore(leaning_model, [mine] * 5, [none, none, none, mine, none], Sizes(2), rng=rng)
    assert used == [3] and set(tables) == set(strips) == set(SETS)
    for name, count in {"axes": 7, "turned": 7, "principal": 7, "fitted": 6}.items():
        assert tables[name]["change"].shape == (1, count) and tables[name]["real"].shape == (1, count, 6)
        assert strips[name].shape == (1, count, STEPS, 28, 28)
    assert tables["axes"]["change"][0].argmax() == 2 and (tables["axes"]["change"] > 1e-5).sum() == 1


def made_up():
    """Two capsules, numbers 4 and 9, of three directions; correlations are zero unless set."""
    table = {
        "change": torch.tensor([[0.03, 0.02, 0.10], [0.03, 0.05, 0.04]]),
        "jump": torch.tensor([[1.0, 1.5, 3.5], [2.0, 1.0, 1.0]]),
        "kept": torch.tensor([[1.0, 1.0, 0.4], [1.0, 1.0, 1.0]]),
    }
    table |= {name: torch.zeros(2, 3, 6) for name in ("real", "sweep", "effect")}
    table["real"][0, 2, SLANT], table["sweep"][0, 2, SLANT], table["effect"][0, 2, SLANT] = -0.6, -0.9, -20
    table["real"][1, 0, 0], table["sweep"][1, 0, 0] = 0.8, -0.9  # the pictures do the opposite of real images
    table["real"][1, 1, 4], table["sweep"][1, 1, 4] = 0.45, 0.9  # too weak in real images
    return table


def test_two_correlations_agree_by_the_smaller_one_if_their_signs_are_alike():
    found = agreement(made_up())
    assert found[0, 2, SLANT] == pytest.approx(0.6) and found[1, 1, 4] == pytest.approx(0.45)
    assert (found > 0).sum() == 2


def test_the_summary_counts_what_is_visible_smooth_and_named():
    found = summary([4, 9], made_up(), torch.tensor([0.10, 0.16]))
    assert found["directions"] == 6
    assert found["visible"] == pytest.approx(4 / 6)  # at least 0.025 and 0.04
    assert found["smooth"] == pytest.approx(5 / 6) and found["visible_and_smooth"] == pytest.approx(3 / 6)
    assert found["named"] == pytest.approx(1 / 6) and found["names"]["slant"] == 1 and sum(found["names"].values()) == 1
    assert found["kept"] == pytest.approx(5.4 / 6)
    strongest, other = found["strongest"]
    assert (strongest["capsule"], strongest["direction"], strongest["measurement"]) == (4, 2, "slant")
    assert strongest["effect"] == -20 and strongest["real"] == pytest.approx(-0.6)
    assert (other["capsule"], other["direction"]) == (9, 1)
    clearest = found["clearest"]["width"]
    assert (clearest["capsule"], clearest["direction"], clearest["real"]) == (9, 1, 0.45)
    assert found["changes"][1] == pytest.approx([0.03, 0.05, 0.04])


def test_the_strips_are_those_of_the_strongest_and_the_clearest_directions():
    strips = torch.arange(6).view(2, 3, 1, 1, 1).expand(2, 3, 11, 28, 28)
    found = pictures_of(summary([4, 9], made_up(), torch.ones(2)), [4, 9], strips)
    assert found["strips"][:, 0, 0, 0].tolist() == [2, 4]
    assert found["clearest"][[SLANT, 4], 0, 0, 0].tolist() == [2, 4]


# The whole run


@pytest.fixture
def quick(monkeypatch):
    """A quick run is made quicker: one sweep of one capsule."""
    monkeypatch.setattr(moving_dimensions, "QUICK", Sizes(starts=1, capsules=1))


def test_a_run_is_written_kept_and_not_finished_with_other_weights(quick, tmp_path, monkeypatch):
    out, arguments = tmp_path / "moving.json", ["--quick", "--seed", "3", "--only", "mnist"]
    main([*arguments, "--out", str(out)])
    record = json.loads(out.read_text())["models"]["mnist"]
    arrays, _ = checkpoints.read(out.with_suffix(".safetensors"))
    assert record["fingerprint"] == results.fingerprint("mnist")
    assert len(record["capsules"]) == 1 and {f"mnist/{name}/change" for name in SETS} <= set(arrays)
    assert arrays["mnist/axes/strips"].shape == (1, STEPS, 28, 28) and arrays["mnist/axes/strips"].dtype == torch.uint8
    assert_close(arrays["mnist/axes/change"], torch.tensor(record["axes"]["changes"]), atol=1e-4, rtol=0)
    monkeypatch.setattr(moving_dimensions, "explore", None)  # whatever is computed again would fail
    main([*arguments, "--out", str(out)])
    monkeypatch.setattr(results, "fingerprint", lambda name: "of other weights")
    assert not moving_dimensions.Results(out, True, 3).holds("mnist")
