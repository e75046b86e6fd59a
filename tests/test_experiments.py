"""The experiments run, resume and measure what they say; nothing is asserted about their outcome."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import capsnb
from capsnb import checkpoints, data, squash
from capsnb.model import CapsuleEncoder
from capsnb.routing import route_with_agreement
from capsnb.sampling import one_at_a_time
from capsnb.settings import PRESETS, EncoderSettings
from capsnb.training import ridge_regression
from experiments import over_which_index
from experiments.bases import BASES
from experiments.common import (
    QUICK_STEPS,
    TABLE,
    fitted_layers,
    pictures,
    read_out_alone,
    routing_measures,
    top_direction_cosine,
    variance_left,
)
from experiments.over_which_index import VARIANTS, main
from experiments.results import Results

I, J, D, E = 13, 5, 7, 11  # noqa: E741


def test_every_variant_differs_in_one_choice_from_its_base():
    changed = {}
    for name, chosen in VARIANTS.items():
        base = asdict(BASES[name.split("-")[0]])
        changed[name] = {field for field, value in asdict(chosen).items() if value != base[field]}
    assert changed.pop("dense") == changed.pop("sparse") == set()
    assert changed.pop("dense-over-lower-paper-rate") == {"over", "learning_rate"}
    assert VARIANTS["dense-over-lower-paper-rate"] == PRESETS["paper"].encoder
    assert all(len(fields) == 1 for fields in changed.values()) and len(changed) == 10


@pytest.mark.parametrize("file", ["over-which-index.json", "over-which-index-seed-1.json"])
def test_the_shipped_results_are_those_of_the_settings_that_the_experiment_has_now(file):
    shipped = checkpoints.read_json(Path(capsnb.__file__).parent / "results" / file)["variants"]
    assert {name: record["settings"] for name, record in shipped.items()} == {
        name: asdict(VARIANTS[name]) for name in shipped
    }


def test_the_variance_left_by_the_linear_read_out_is_numpys(double):
    train, test, mix = double(101, 5), double(1009, 5), double(5, 7)
    target, wanted = train @ mix + double(101, 7), test @ mix + double(1009, 7) + 3
    found = variance_left(ridge_regression(train, target, ridge=0.3), test, wanted)
    code, y = train.numpy(), target.numpy()
    penalty = 0.3 * np.mean(np.sum(code**2, axis=0))
    read_out = np.linalg.solve(code.T @ code + penalty * np.eye(5), code.T @ y)
    error = np.sum((test.numpy() @ read_out - wanted.numpy()) ** 2)
    assert found == pytest.approx(error / np.sum((wanted.numpy() - wanted.numpy().mean(0)) ** 2))


def test_alone_every_capsule_has_the_read_out_of_its_own_pose_and_one_that_is_never_on_has_none(double):
    codes, lower = double(101, J, D), double(101, I, E)
    codes[:, 3] = 0
    found = read_out_alone(codes, lower).unflatten(0, (J, D))
    ridge = PRESETS["sparse"].decoder.ridge
    for j in (0, 1, 2, 4):
        assert_close(found[j], ridge_regression(codes[:, j], lower.flatten(1), ridge=ridge))
    assert (found[3] == 0).all()


def test_nothing_is_left_of_what_is_linear_and_all_of_what_the_mean_alone_explains(double):
    ones, code, target = torch.ones(101, 1).double(), double(101, 5), double(101, 7)
    linear = code @ double(5, 7)
    assert variance_left(ridge_regression(code, linear, ridge=1e-12), code, linear) == pytest.approx(0, abs=1e-9)
    assert variance_left(ridge_regression(ones, target, ridge=1e-12), ones, target) == pytest.approx(1)


def test_the_strongest_directions_of_experts_made_by_hand(double):
    """Capsules 0 and 1 read one direction, with opposite signs; capsule 2 reads one at 60 degrees to it."""
    a, b = torch.linalg.qr(double(I * E, 2)).Q.T
    read, out = [a, -a, 0.5 * a + 0.75**0.5 * b], torch.linalg.qr(double(D, 2)).Q.T
    weak = 0.1 * double(I * E)
    matrices = [3 * torch.outer(out[0], r) + torch.outer(out[1], weak - (weak @ r) * r) for r in read]
    W = torch.stack([matrix.view(D, I, E).transpose(0, 1) for matrix in matrices], dim=1)
    assert top_direction_cosine(W) == pytest.approx((1 + 0.5 + 0.5) / 3)


@pytest.mark.parametrize("over, axis, size", [("upper", 1, J), ("lower", 0, I)])
def test_the_measures_of_routing_are_means_over_images_capsules_and_sums(over, axis, size, double):
    settings = EncoderSettings(capsules=J, dim=D, over=over, sharpness=3.0, initial_deviation=1.0)
    encoder, lower = CapsuleEncoder(I, E, settings), double(307, I, E).half()
    found, agreement, entropy = routing_measures(encoder, lower), [], []
    for z in lower:
        state = route_with_agreement(squash(z[None].float()), encoder.W.detach(), over=over, sharpness=3.0)
        c = state.coupling[0].numpy()
        agreement.append(state.agreement.mean().item())
        entropy.append(np.mean(np.sum(-c * np.log(c), axis=axis)) / np.log(size))
    assert found["routing_agreement"] == pytest.approx(np.mean(agreement), rel=1e-4)
    assert found["coupling_entropy"] == pytest.approx(np.mean(entropy), rel=1e-4)


def test_without_a_second_round_the_couplings_have_the_largest_entropy(double):
    encoder = CapsuleEncoder(I, E, EncoderSettings(capsules=J, dim=D, rounds=1))
    assert routing_measures(encoder, double(3, I, E).half())["coupling_entropy"] == pytest.approx(1)


def test_fitted_layers_have_one_capsule_on_at_the_length_it_has_in_the_images_it_wins(rng):
    codes = squash(torch.randn(2003, 3, 5, generator=rng) + torch.tensor([1.0, 2.0, 0.0])[:, None])
    codes[:, 2] = 0
    layers = fitted_layers(codes, 7, rng=rng)
    lengths = torch.linalg.vector_norm(codes, dim=2)
    assert layers.shape == (7, 3, 3, 5)
    for on in range(2):
        expected = lengths[lengths.argmax(1) == on, on].square().mean().sqrt()
        found = torch.linalg.vector_norm(layers[:, on], dim=2)
        assert_close(found[:, on], expected.expand(7), rtol=5e-3, atol=0)
        assert found.count_nonzero() == 7
    assert layers[:, 2].count_nonzero() == 0


def test_pictures_of_single_capsules_are_those_of_the_decoder_whose_weights_read_out(small_model, digits):
    U = small_model.decoder.U.detach()
    layers = one_at_a_time(small_model.encode(digits[0][:3]).clamp(min=0.1))
    found = pictures(small_model, U.permute(0, 3, 1, 2).reshape(35, -1), layers)
    expected = 255 * small_model.decode(layers.flatten(0, 1))[:, 0].view(3, 5, 28, 28)
    assert found.dtype == torch.uint8 and (found - expected).abs().max() < 0.51


# The whole run


@pytest.fixture(scope="module")
def finished(one_thread, tmp_path_factory):
    """The results file of a quick run of two variants."""
    out = tmp_path_factory.mktemp("results") / "index.json"
    main(["--quick", "--seed", "3", "--out", str(out), "--only", "dense-inner", "sparse"])
    return out


def test_a_quick_run_writes_every_measure_and_says_that_it_was_quick(finished):
    content = json.loads(finished.read_text())
    assert content["quick"] is True and content["seed"] == 3 and "torch" in content["versions"]
    assert sorted(content["variants"]) == ["dense-inner", "sparse"]
    for name, record in content["variants"].items():
        assert record["settings"] == asdict(replace(VARIANTS[name], steps=QUICK_STEPS))
        assert record["seconds"] > 0 and len(record["measures"]["winning_share"]) == 20
        assert all(np.isfinite(record["measures"][key]) for key in TABLE)
        assert 0 < record["measures"]["variance_left"] < 1


def test_the_pictures_are_ten_test_digits_their_reconstructions_and_four_samples_of_every_capsule(finished):
    found = checkpoints.read(finished.with_suffix(".safetensors"))[0]
    names = ("dense-inner", "sparse")
    assert sorted(found) == sorted(["digits", *names, *(f"{name}/reconstruction" for name in names)])
    images, labels = data.load("mnist", "test", sample=True)
    for digit in range(10):
        assert_close(found["digits"][digit] / 255, images[labels == digit][0, 0])
    for name in names:
        assert found[name].shape == (4, 20, 28, 28) and found[f"{name}/reconstruction"].shape == (10, 28, 28)
        error = (found[f"{name}/reconstruction"].float() - found["digits"]).square().mean()
        assert error < 0.5 * found["digits"].float().square().mean()


def test_a_second_run_keeps_what_is_finished_and_adds_the_rest(out, monkeypatch):
    before, trained, train = json.loads(out.read_text())["variants"], [], over_which_index.train

    def recorded(name, *arguments):
        trained.append(name)
        return train(name, *arguments)

    monkeypatch.setattr(over_which_index, "train", recorded)
    main(["--quick", "--seed", "3", "--out", str(out), "--only", "sparse", "sparse-rounds-1", "dense-inner"])
    after = json.loads(out.read_text())["variants"]
    assert trained == ["sparse-rounds-1"]
    assert {name: after[name] for name in before} == before and sorted(after) == sorted([*before, *trained])


def test_a_variant_with_other_settings_or_without_its_pictures_is_not_finished(out):
    results, chosen = Results(out, True, 3), replace(VARIANTS["sparse"], steps=QUICK_STEPS)
    assert results.holds("sparse", settings=asdict(chosen))
    assert not results.holds("sparse", settings=asdict(VARIANTS["sparse"]))
    assert not results.holds("sparse-inner", settings=asdict(chosen))
    out.with_suffix(".safetensors").unlink()
    assert not Results(out, True, 3).holds("sparse", settings=asdict(chosen))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "dense", "dens"], "invalid choice: 'dens' (choose from"),
        (["--quick", "--seed", "4"], "was made with seed 3, not 4; choose another --out"),
        (["--seed", "3"], "was made with quick True, not False; choose another --out"),
    ],
)
def test_unknown_variants_and_results_of_another_run_are_refused(arguments, message, out, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(out)])
    assert message in capsys.readouterr().err
