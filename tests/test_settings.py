"""Hyperparameters and presets."""

import json
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

from capsnb import settings
from capsnb.settings import PRESETS, Settings

every_preset = pytest.mark.parametrize("name", PRESETS)


def test_the_presets_are_the_three_of_the_book_and_carry_their_names():
    assert sorted(PRESETS) == ["dense", "paper", "sparse"]
    assert all(preset.preset == name for name, preset in PRESETS.items())


@every_preset
def test_every_preset_has_the_sizes_that_the_paper_gives(name):
    chosen = PRESETS[name]
    assert (chosen.autoencoder.channels, chosen.autoencoder.capsule_dim) == (128, 8)
    assert (chosen.encoder.capsules, chosen.encoder.dim) == (20, 16)


def test_paper_is_the_literal_text():
    paper = PRESETS["paper"]
    assert paper.encoder.over == "lower" and paper.encoder.sparsity is None
    assert paper.encoder.initial_deviation == 0.1
    assert paper.encoder.optimiser == "sgd" and paper.encoder.momentum > 0 and paper.encoder.weight_decay > 0
    assert paper.decoder.rule == "literal"


def test_dense_and_sparse_sum_over_j_and_only_sparse_turns_capsules_off():
    assert PRESETS["dense"].encoder.over == PRESETS["sparse"].encoder.over == "upper"
    assert PRESETS["dense"].encoder.sparsity is None and PRESETS["sparse"].encoder.sparsity is not None


def test_all_presets_share_stage_1():
    assert len({preset.autoencoder for preset in PRESETS.values()}) == 1


def same_but(one, other, *names):
    """Whether two dataclasses differ in the named fields only."""
    return replace(one, **{name: getattr(other, name) for name in names}) == other


@every_preset
def test_quick_settings_are_the_same_with_fewer_updates(name):
    full, quick = PRESETS[name], settings.quick(PRESETS[name])
    assert same_but(full.autoencoder, quick.autoencoder, "epochs")
    assert same_but(full.encoder, quick.encoder, "steps", "start") and quick.encoder.steps < full.encoder.steps
    if full.encoder.start:
        assert same_but(full.encoder.start, quick.encoder.start, "groups", "components", "tries")
        assert quick.encoder.start.groups * quick.encoder.start.tries < full.encoder.start.groups / 10
    assert same_but(full.decoder, quick.decoder, "steps") and quick.decoder.steps < full.decoder.steps
    assert quick.preset == name
    assert quick.autoencoder.epochs * 1000 < full.autoencoder.epochs * 60_000 / 10


@every_preset
def test_settings_come_back_from_the_json_of_a_weight_file(name):
    for chosen in (PRESETS[name], settings.quick(PRESETS[name])):
        again = settings.from_dict(json.loads(json.dumps(asdict(chosen))))
        assert again == chosen and isinstance(again, Settings)
        assert hash(again) == hash(chosen)


@every_preset
def test_a_weight_file_from_before_a_setting_existed_gets_its_default(name):
    content = asdict(PRESETS[name])
    for setting in ("agreement", "sharpness", "views", "start"):
        del content["encoder"][setting]
    before = {"agreement": "cosine", "sharpness": 1.0, "views": None, "start": None}
    assert settings.from_dict(content) == replace(PRESETS[name], encoder=replace(PRESETS[name].encoder, **before))


def test_settings_cannot_be_changed_in_place():
    for part in (PRESETS["sparse"], PRESETS["sparse"].encoder, PRESETS["sparse"].encoder.sparsity):
        with pytest.raises(FrozenInstanceError):
            setattr(part, fields(part)[0].name, 7)
