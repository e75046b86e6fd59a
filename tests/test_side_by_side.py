"""The comparison measures every system alike, resumes, and counts the processor time that a training asks for."""

import json

import pytest
import torch
from torch.testing import assert_close

from capsnb import data, load_pretrained
from capsnb.baselines.matrix_capsules import load_em_routing
from capsnb.baselines.rbm import RBM
from capsnb.evaluation import winner
from capsnb.training import Step
from experiments import common, side_by_side
from experiments.common import as_vectors, in_parts
from experiments.side_by_side import ROWS, groups, longest, main, measure, minutes, parameters


def test_the_longest_capsule_is_kept_and_the_others_are_set_to_zero():
    capsules = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
    alone = longest(capsules)
    for image, j in enumerate(winner(capsules).tolist()):
        assert torch.equal(alone[image, j], capsules[image, j])
        assert alone[image].count_nonzero() == 3


def test_rows_are_taken_a_part_at_a_time_without_a_change(monkeypatch):
    monkeypatch.setattr(common, "PART", 3)
    sizes = []
    found = in_parts(lambda rows: sizes.append(len(rows)) or 2 * rows, torch.arange(11.0))
    assert_close(found, 2 * torch.arange(11.0))
    assert sizes == [3, 3, 3, 2]


def test_the_learned_numbers_of_machines_and_of_networks_are_counted():
    assert parameters(RBM(torch.zeros(7, 5), torch.zeros(7), torch.zeros(5))) == 47
    assert parameters(torch.nn.Linear(11, 3)) == 36


def test_processor_minutes_are_the_first_update_and_the_median_of_others_times_their_number(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(side_by_side.time, "process_time", lambda: clock[0])

    def stage(durations, steps):
        for number, duration in enumerate(durations):
            clock[0] += duration
            yield Step(number + 1, steps, 0.0, 0.0)

    usual = [60.0, 2.0, 3.0, 2.0, 90.0, 2.0, 2.0, 4.0, 1e9]  # the last is never waited for
    assert minutes([lambda: stage(usual, 101)]) == pytest.approx((60 + 100 * 2) / 60)
    assert minutes([lambda: stage([30.0], 1), lambda: stage([6.0, 6.0], 2)]) == pytest.approx(42 / 60)
    assert minutes([]) is None


def test_groups_are_the_longest_capsules_or_clusters_of_codes():
    labels = torch.arange(30) % 3
    capsules = torch.nn.functional.one_hot(labels, 5).unsqueeze(2) * torch.ones(2)
    found = groups(ROWS["sparse"], capsules, capsules, labels, seed=0)
    assert found == {"purity": 1.0, "assignment_accuracy": 1.0, "groups": 5}
    mixed = groups(ROWS["sparse"], capsules, capsules.roll(1, 0) + capsules, torch.zeros_like(labels), seed=0)
    assert mixed["purity"] == 1.0 and mixed["assignment_accuracy"] < 1.0
    points = torch.arange(30.0).unsqueeze(1) * 100
    assert groups(ROWS["vae"], points, points, labels, seed=0)["groups"] == side_by_side.CLUSTERS


def test_matrix_capsules_are_as_long_as_they_are_active_and_point_where_their_poses_do():
    images, network = data.load("mnist", "test", sample=True)[0][:7], load_em_routing()
    (poses, activations), found = network.encode(images), as_vectors(network, images)
    assert_close(found.norm(dim=2), activations)
    assert_close(found * poses.norm(dim=2, keepdim=True), poses * activations.unsqueeze(2))


@pytest.mark.parametrize("name", [name for name, system in ROWS.items() if system.decode and name != "paper"])
def test_a_system_that_ships_makes_of_its_codes_what_it_saw(name):
    """Matrix capsules have no decoder, and what the published reading of the paper makes is black."""
    images, _ = data.load("mnist", "test", sample=True)
    system = ROWS[name]
    trained = system.load(images)
    codes = system.encode(trained, images[:50])
    made = system.decode(trained, longest(codes) if system.labels else codes)
    assert made.shape == (50, 1, 28, 28)
    assert (made - images[:50]).square().mean() < (images[:50] - images.mean(0)).square().mean()


def test_a_row_says_what_the_codes_tell_and_what_one_capsule_shows():
    (images, labels), name = data.load("mnist", "test", sample=True), "sparse"
    split = images[:200], labels[:200]
    record, pictures = measure(ROWS[name], split, split, seed=0)
    model = load_pretrained("mnist")
    assert record["parameters"] == sum(each.numel() for each in model.parameters())
    assert record["numbers"] == 320 and record["groups"] == 20 and not record["labels"]
    assert record["linear_probe"] > 0.95 and record["read_alone"] == record["read"] > 0.9
    assert pictures[""].shape == (10, 28, 28) and torch.equal(pictures[""], pictures["/alone"])


def test_a_run_writes_every_row_once_and_only_changed_weights_make_it_anew(tmp_path, monkeypatch):
    out = tmp_path / "found.json"
    main(["--quick", "--only", "pca", "--out", str(out)])
    first = json.loads(out.read_text())["rows"]["pca"]
    assert first["training"] is None and first["numbers"] == 320
    monkeypatch.setattr(side_by_side, "measure", lambda *arguments: ({**first, "made": "again"}, {"": torch.zeros(1)}))
    main(["--quick", "--only", "pca", "--out", str(out)])
    assert "made" not in json.loads(out.read_text())["rows"]["pca"]
    monkeypatch.setattr(side_by_side.results, "fingerprint", lambda *names: "other")
    main(["--quick", "--only", "pca", "--out", str(out)])
    assert json.loads(out.read_text())["rows"]["pca"]["made"] == "again"
