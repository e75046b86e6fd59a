"""The ablation of the sparse experts changes one part at a time, and measures what it says."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import paper
import pytest
import torch
from torch.testing import assert_close

import capsnb
from capsnb import checkpoints, load_pretrained, runs, squash, views
from capsnb.evaluation import ranks
from capsnb.model import CapsuleEncoder, ExpertCapsules
from capsnb.routing import RoutingState
from capsnb.settings import PRESETS, EncoderSettings, SparsitySettings
from capsnb.sparsity import support
from experiments import sparse_experts
from experiments.bases import BASES
from experiments.common import QUICK_STEPS, TABLE, Split
from experiments.ranking import MEMORY, POSITIONS, SCORES, AblatedEncoder, Standardised, Variant
from experiments.results import Results
from experiments.sparse_experts import (
    VARIANTS,
    Lessons,
    build,
    facts_of,
    fingerprint,
    main,
    run_shipped,
    shipped_ranks,
    shortened,
    train,
)

B, I, J, D, E = 3, 72, 5, 7, 11  # noqa: E741  I: two lower capsules at each of the 36 positions
SETTINGS = EncoderSettings(
    capsules=J,
    dim=D,
    sharpness=30.0,
    initial_deviation=1.0,
    steps=41,
    sparsity=SparsitySettings(gamma_first=5.0, gamma_last=9.0),
)


@pytest.fixture
def encoder(rng):
    """An untrained sparse encoder with boosts, a quarter of the way through its training."""
    torch.manual_seed(29)
    encoder = CapsuleEncoder(I, E, SETTINGS).double()
    encoder.sparsity.updates.fill_(10)
    encoder.sparsity.boost.copy_(torch.linspace(0.01, -0.01, J))
    return encoder


def ablated(encoder, **changes):
    """The same encoder with another score, or with couplings that are not shared out; the scores' unit is 0.3."""
    return AblatedEncoder(encoder, Variant(SETTINGS, **changes), 0.3).double()


# The variants


def differing(one, other):
    """The names of the settings that differ, those of the sparsity as "sparsity.name"."""
    one, other = (asdict(each.settings) | {"score": each.score, "shared_out": each.shared_out} for each in (one, other))
    names = {name for name in one if one[name] != other[name]}
    if "sparsity" in names and one["sparsity"] and other["sparsity"]:
        inner = {name for name, value in one["sparsity"].items() if other["sparsity"][name] != value}
        names = names - {"sparsity"} | {f"sparsity.{name}" for name in inner}
    return names


def test_every_variant_differs_in_one_part_from_its_base():
    changed = {name: differing(VARIANTS[name], VARIANTS[name.split("-")[0]]) for name in VARIANTS if "preset" in name}
    changed |= {name: differing(variant, VARIANTS["base"]) for name, variant in VARIANTS.items() if name not in changed}
    for name in ("sgd", "adam"):
        assert VARIANTS[name].settings.optimiser == name
        assert "optimiser" in changed[name]
        assert changed.pop(name) <= {"optimiser", "learning_rate", "momentum", "weight_decay"}
    for name, field in {
        "no-mask": "sparsity",
        "no-boost": "sparsity.boost_step",
        "constant-gamma": "sparsity.gamma_first",
        "conscience": "sparsity.conscience",
        "not-shared-out": "shared_out",
        "preset-no-views": "views",
        "preset-no-conscience": "sparsity.conscience",
        "preset-no-start": "start",
    }.items():
        assert changed.pop(name) == {field}
    assert changed.pop("base") == changed.pop("preset") == set()
    assert all(fields == {"score"} for fields in changed.values())
    assert {VARIANTS[name].score for name in changed} == set(SCORES) - {"explanation"}


def test_the_variants_remove_and_add_what_they_say():
    chosen = {name: variant.settings for name, variant in VARIANTS.items()}
    assert chosen["no-mask"].sparsity is None and chosen["no-boost"].sparsity.boost_step == 0
    constant = chosen["constant-gamma"].sparsity
    assert constant.gamma_first == constant.gamma_last
    assert chosen["conscience"].sparsity.conscience == chosen["preset"].sparsity.conscience > 0
    assert chosen["preset-no-conscience"].sparsity.conscience == 0
    assert chosen["preset-no-views"].views is None and chosen["preset-no-start"].start is None


def test_the_bases_are_the_preset_and_the_plain_experts_with_its_sharpness():
    assert VARIANTS["preset"] == Variant(PRESETS["sparse"].encoder)
    plain = Variant(replace(BASES["sparse"], sharpness=PRESETS["sparse"].encoder.sharpness))
    assert VARIANTS["base"] == plain and (plain.settings.views, plain.settings.start) == (None, None)


def test_the_shipped_results_are_those_of_the_settings_that_the_experiment_has_now():
    shipped = checkpoints.read_json(Path(capsnb.__file__).parent / "results" / "sparse-experts.json")["variants"]
    assert list(shipped) == list(VARIANTS)
    for name, record in shipped.items():
        expected = VARIANTS[name]._asdict() | {"settings": asdict(VARIANTS[name].settings)}
        assert {key: record[key] for key in expected} == expected


def test_what_a_variant_does_not_change_is_the_librarys_own_encoder(small_model, small_settings):
    chosen = replace(small_settings().encoder, views=None, start=None)
    for variant, kind in (
        (Variant(chosen), CapsuleEncoder),
        (Variant(chosen, shared_out=False), AblatedEncoder),
        (Variant(chosen, score="length"), AblatedEncoder),
    ):
        model = build("name", variant, small_model, 0.1, seed=31)
        assert type(model.encoder) is kind and model.autoencoder is small_model.autoencoder
        torch.manual_seed(31)
        assert_close(model.encoder.W, type(model)(replace(small_model.settings, encoder=chosen)).encoder.W)


@pytest.mark.parametrize("training", [True, False])
def test_with_no_part_replaced_the_encoder_couples_as_the_librarys(training, encoder, double):
    x = squash(double(B, I, E))
    same = ablated(encoder).train(training)
    for _ in range(3):
        assert_close(same.couplings(x), encoder.train(training).couplings(x))
    assert_close(same.sparsity.boost, encoder.sparsity.boost)


@pytest.mark.parametrize("training", [True, False])
def test_couplings_that_are_not_shared_out_are_those_of_routing_times_the_mask(training, encoder, double):
    x = squash(double(B, I, E))
    plain = ablated(encoder, shared_out=False).train(training)
    mask = plain.sparsity.mask(plain.score(x, plain.route(x)))
    expected = encoder.route(x).coupling.numpy().copy()
    for b in range(B):
        for j in range(J):
            expected[b, :, j] *= mask[b, j].item()
    assert_close(plain.couplings(x), torch.as_tensor(expected))


def test_the_preset_with_the_seed_of_the_model_that_ships_is_that_model_and_nothing_else_is(monkeypatch):
    stage1 = load_pretrained("mnist")
    monkeypatch.setattr(sparse_experts, "fit", lambda name, model, rows, seed: model)
    for name, seed, same in (("preset", 0, True), ("preset", 1, False), ("preset-no-start", 0, False)):
        model = train(name, VARIANTS[name], stage1, None, 0.1, seed)
        assert (model is stage1) is same and model.encoder.settings == VARIANTS[name].settings
        facts = facts_of(VARIANTS[name], stage1, seed)
        assert facts["autoencoder"] == fingerprint(stage1.autoencoder)
        assert facts.get("encoder") == (fingerprint(stage1.encoder) if same else None)
    assert train("preset", shortened(VARIANTS["preset"]), stage1, None, 0.1, 0) is not stage1


# What they learn from


@pytest.fixture
def split(small_model, digits):
    """A few training images with their lower capsules in 16 bits."""
    images = digits[0][:101]
    return Split(images, digits[1][:101], small_model.lower_preactivations(images).detach().half())


@pytest.mark.parametrize("name", ["base", "preset", "preset-no-views"])
def test_variants_learn_from_the_rows_that_training_gives_their_settings(name, small_model, split):
    chosen, rows = VARIANTS[name].settings, torch.tensor([7, 3, 89])
    model = ExpertCapsules(replace(small_model.settings, encoder=chosen)).eval()
    model.autoencoder = small_model.autoencoder
    found = []
    for lessons in (Lessons(small_model, split).of(chosen), runs.Encoded(model, split.images).lessons):
        torch.manual_seed(37)
        found.append(lessons[rows].float())
    assert_close(*found, rtol=1e-2, atol=1e-2)


def test_neighbours_are_searched_once_and_only_for_views(small_model, split, monkeypatch):
    searched, neighbours = [], views.neighbours
    monkeypatch.setattr(views, "neighbours", lambda *given: searched.append(given[1]) or neighbours(*given))
    lessons = Lessons(small_model, split)
    chosen = {name: lessons.of(VARIANTS[name].settings) for name in ("base", "preset-no-views")}
    assert searched == []
    assert lessons.of(VARIANTS["preset"].settings) is lessons.of(VARIANTS["preset-no-start"].settings)
    assert searched == [PRESETS["sparse"].encoder.views.neighbours]
    assert chosen["base"] is split.lower and chosen["preset-no-views"][torch.tensor([3])].dtype == torch.float32


def test_a_check_shortens_training_and_start_and_nothing_else():
    for name in ("not-shared-out", "preset"):
        assert differing(shortened(VARIANTS[name]), VARIANTS[name]) <= {"steps", "start"}
        assert shortened(VARIANTS[name]).settings.steps == QUICK_STEPS
    assert shortened(VARIANTS["preset"]).settings.start.groups < PRESETS["sparse"].encoder.start.groups


# The scores


@pytest.fixture
def routed(double, rng):
    """Routing by hand: random couplings that sum to 1 over the upper capsules, and what follows from them."""
    x, W = squash(double(B, I, E)), double(I, J, D, E)
    coupling = double(B, I, J).softmax(2)
    z = torch.einsum("bij,ijde,bie->bjd", coupling, W, x)
    agreement = [[paper.agreement(x[b].numpy(), W.numpy(), coupling[b].numpy())[j] for j in range(J)] for b in range(B)]
    return x, W, RoutingState(coupling, z, torch.tensor(agreement, dtype=torch.float64))


def test_scored_by_length_a_capsule_counts_as_long_as_it_is_before_the_squash(routed):
    x, W, state = routed
    found = SCORES["length"](*routed)
    for b in range(B):
        z = paper.forward(x[b].numpy(), W.numpy(), state.coupling[b].numpy())
        for j in range(J):
            assert found[b, j].item() == pytest.approx(np.sqrt(np.sum(z[j] ** 2)))


def test_scored_by_support_a_capsule_counts_by_the_largest_coupling_at_each_of_36_positions(routed):
    assert_close(SCORES["support"](*routed), support(routed[2].coupling, 36))


def test_the_lower_capsules_of_one_position_are_neighbours(small_model, digits):
    """Only the first position sees the first pixel."""
    image = digits[0][:1].clone()
    corner = image.clone()
    corner[..., 0, 0] = 1 - corner[..., 0, 0]
    moved = (small_model.lower_capsules(corner) != small_model.lower_capsules(image)).any(2)[0].view(36, 2)
    assert moved.any(1).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("name", ["agreement", "standardised"])
def test_scored_by_agreement_a_capsule_counts_by_the_resultant_length_of_its_votes(name, routed):
    assert_close(SCORES[name](*routed), routed[2].agreement)


def test_the_standardised_agreement_has_a_running_mean_and_deviation_for_every_capsule(double):
    standardise, batches = Standardised(J).double(), double(131, 23, J) * 3 + 7
    mean = variance = np.zeros(J)
    for count, batch in enumerate(batches, start=1):
        found, share = standardise(batch), max(1 - MEMORY, 1 / count)
        mean = (1 - share) * mean + share * np.mean(batch.numpy(), axis=0)
        variance = (1 - share) * variance + share * np.var(batch.numpy(), axis=0, ddof=1)
    assert_close(found, torch.as_tensor((batches[-1].numpy() - mean) / np.sqrt(variance)))
    assert_close(standardise.eval()(batch), found)  # and what is encoded later moves neither
    assert_close(standardise(batches[0]), (batches[0] - torch.as_tensor(mean)) / torch.as_tensor(variance).sqrt())


@pytest.mark.parametrize("name", ["length", "support", "agreement", "standardised"])
def test_another_score_is_scaled_to_deviate_from_capsule_to_capsule_as_the_explanation_does(name, encoder, double):
    x = squash(double(B, I, E))
    replaced = ablated(encoder, score=name)
    found, raw = replaced.score(x, replaced.route(x)), SCORES[name](x, encoder.W, encoder.route(x))
    if name == "standardised":
        raw = (raw - raw.mean(0)) / raw.std(0)
    deviations = [np.std(row.detach().numpy(), ddof=1) for row in raw]
    assert_close(found, raw * 0.3 / np.mean(deviations))


def test_the_capsules_that_score_best_are_the_ones_left_on(encoder, double):
    x = squash(double(B, I, E))
    replaced = ablated(encoder, score="length").eval()
    longest = torch.linalg.vector_norm(encoder.route(x).z, dim=2).argmax(1)
    assert_close(replaced.couplings(x)[:, 0].argmax(1), longest)


# The ranks


def test_the_ranks_of_a_model_are_those_of_its_supports_and_explanations(small_model, digits):
    lower = small_model.lower_preactivations(digits[0][:307]).detach()
    found = shipped_ranks(small_model, Split(digits[0][:307], digits[1][:307], lower))
    x = squash(lower)
    assert found["support"] == ranks(support(small_model.encoder.route(x).coupling, POSITIONS))
    expected = ranks(SCORES["explanation"](x, small_model.encoder.W.detach(), None))
    assert found["explanation"]["rank_frequency"] == expected["rank_frequency"]
    assert np.allclose(found["explanation"]["share_of_largest"], expected["share_of_largest"])


# The whole run


@pytest.fixture(scope="module")
def finished(one_thread, tmp_path_factory):
    """The results file of a quick run of two variants."""
    out = tmp_path_factory.mktemp("results") / "sparse.json"
    main(["--quick", "--out", str(out), "--only", "base", "by-standardised"])
    return out


@pytest.fixture
def trained(monkeypatch):
    """The names of the variants that are trained from now on."""
    names, fit = [], sparse_experts.fit

    def recorded(name, *arguments):
        names.append(name)
        return fit(name, *arguments)

    monkeypatch.setattr(sparse_experts, "fit", recorded)
    return names


def test_a_quick_run_writes_every_measure_and_the_ranks_of_the_shipped_models(finished):
    content = json.loads(finished.read_text())
    assert content["quick"] is True and sorted(content["variants"]) == ["base", "by-standardised"]
    for name, record in content["variants"].items():
        assert record["settings"] == asdict(replace(VARIANTS[name].settings, steps=QUICK_STEPS))
        assert record["score"] == VARIANTS[name].score and record["shared_out"] is True
        assert record["score_unit"] > 0 and len(record["measures"]["winning_share"]) == 20
        assert all(np.isfinite(record["measures"][key]) for key in TABLE)
    assert sorted(content["shipped"]) == ["dense", "sparse"]
    for record in content["shipped"].values():
        for name in ("support", "explanation"):
            share, frequency = (np.array(record[name][key]) for key in ("share_of_largest", "rank_frequency"))
            assert share[0] == 1 and (np.diff(share) <= 0).all()
            assert np.allclose(frequency.sum(0), 1) and np.allclose(frequency.sum(1), 1)


def test_samples_and_reconstructions_of_every_variant_are_kept(finished):
    found = checkpoints.read(finished.with_suffix(".safetensors"))[0]
    names = ("base", "by-standardised")
    assert sorted(found) == sorted(["digits", *names, *(f"{name}/reconstruction" for name in names)])
    assert all(found[name].shape == (4, 20, 28, 28) for name in names)


def test_a_second_run_keeps_what_is_finished_and_makes_what_is_of_other_weights_again(out, trained):
    before = json.loads(out.read_text())
    stale = json.loads(out.read_text())
    stale["variants"]["base"]["autoencoder"] = "another"
    stale["shipped"]["dense"] = {"weights": "another"}
    out.write_text(json.dumps(stale))
    main(["--quick", "--out", str(out), "--only", "base", "by-standardised"])
    after = json.loads(out.read_text())
    assert trained == ["base"] and after["shipped"] == before["shipped"]
    assert after["variants"]["by-standardised"] == before["variants"]["by-standardised"]
    assert after["variants"]["base"]["autoencoder"] == before["variants"]["base"]["autoencoder"]


def test_the_ranks_of_the_shipped_models_are_written_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_experts, "encoded", lambda *given: None)
    monkeypatch.setattr(sparse_experts, "shipped_ranks", lambda model, test: {"support": model.settings.preset})
    out = tmp_path / "ranks.json"
    run_shipped(Results(out, True, 3))
    found = json.loads(out.read_text())
    assert all(found["shipped"][name]["support"] == name for name in ("dense", "sparse"))
    assert found["variants"] == {} and found["seed"] == 3 and "torch" in found["versions"]


def test_every_variant_is_trained_on_its_own_lessons(tmp_path, monkeypatch):
    """With nothing trained or measured."""
    learned = {}
    monkeypatch.setattr(sparse_experts, "fit", lambda name, model, rows, seed: learned.update({name: rows}) or model)
    measures = dict.fromkeys(TABLE, 0.0)
    monkeypatch.setattr(sparse_experts, "measure", lambda *given: (measures, {"": torch.zeros(1)}))
    monkeypatch.setattr(sparse_experts, "run_shipped", lambda results: None)
    main(["--quick", "--out", str(tmp_path / "all.json")])
    assert list(learned) == list(VARIANTS)
    for name, rows in learned.items():
        chosen = VARIANTS[name].settings
        assert isinstance(rows, views.Views if chosen.views else runs.Encoded if chosen.start else torch.Tensor)


def test_a_fingerprint_changes_with_any_weight(encoder):
    before = fingerprint(encoder)
    assert fingerprint(encoder) == before and len(before) == 12
    with torch.no_grad():
        encoder.W[3, 1, 2, 5] += 1e-6
    assert fingerprint(encoder) != before
