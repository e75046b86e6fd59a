"""The network of matrix capsules: its sizes, its layers against loops, its loss, and its training."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints, data
from capsnb.baselines.em_routing import em_routing
from capsnb.baselines.matrix_capsules import (
    LARGE,
    SHIPPED,
    CapsuleLayer,
    EMRouting,
    EMRoutingSettings,
    load_em_routing,
    margin,
    spread_loss,
    train_em_routing,
)
from capsnb.training import batch_rows

SMALL = EMRoutingSettings(filters=7, primary=2, first=3, second=5, shift=0, epochs=1.0, batch=11, margin_updates=10)


def small(**changes):
    torch.manual_seed(5)
    return EMRouting(replace(SMALL, **changes))


def count(network):
    return sum(tensor.numel() for tensor in network.parameters())


def test_the_networks_have_the_sizes_of_the_paper():
    """68,000 and 310,000 parameters, for five classes; 14, 6 and 4 positions across for crops of 32 pixels."""
    network = EMRouting(EMRoutingSettings(size=32, classes=5))
    assert count(network) == pytest.approx(68_000, rel=0.02)
    assert count(EMRouting(replace(LARGE, size=32, classes=5))) == pytest.approx(310_000, rel=0.03)
    assert network.first.fields.shape == (6 * 6, 9 * 8) and network.first.fields.max() < 14 * 14 * 8
    assert network.second.fields.shape == (4 * 4, 9 * 16) and network.last.fields.shape == (1, 4 * 4 * 16)


def test_primary_capsules_are_ordered_by_row_column_and_type(digits):
    network, images = small().double().eval(), digits[0][:2].double()
    numbers = network.to_primary(network.convolution(images))  # 32 poses' numbers, then 2 activations
    poses, activations = network.primary_capsules(images)
    for row in range(12):
        for column in range(12):
            for kind in range(2):
                at = (row * 12 + column) * 2 + kind
                assert_close(poses[:, at], numbers[:, 16 * kind : 16 * kind + 16, row, column])
                assert_close(activations[:, at], numbers[:, 32 + kind, row, column].sigmoid())


def layer(shared):
    torch.manual_seed(7)
    kernel = 5 if shared else 3
    found = CapsuleLayer(2, 3, 5, kernel, 2, shared, replace(SMALL, final_lambda=0.3, rounds=2)).double()
    with torch.no_grad():
        found.beta_u.normal_()
        found.beta_a.normal_()
    return found


def test_a_convolutional_layer_has_one_matrix_for_every_place_of_its_kernel(double, rng):
    found, poses, activations = layer(False), double(2, 50, 16), torch.rand(2, 50, generator=rng, dtype=torch.float64)
    votes = torch.zeros(2, 4, 18, 3, 16).double()
    for p in range(4):
        for i in range(18):
            down, right, kind = i // 6, i // 2 % 3, i % 2
            lower = ((2 * (p // 2) + down) * 5 + 2 * (p % 2) + right) * 2 + kind
            for j in range(3):
                votes[:, p, i, j] = (poses[:, lower].view(2, 4, 4) @ found.W[i, j].detach()).flatten(1)
    options = {"children": found.fields, "rounds": 2, "final_lambda": 0.3, "cost_scale": 3 / 18}
    expected = em_routing(votes, activations, found.beta_u, found.beta_a, **options)
    assert_close(found(poses, activations), expected)


def test_class_capsules_share_their_matrices_and_are_told_row_and_column(double, rng):
    found, poses, activations = layer(True), double(2, 50, 16), torch.rand(2, 50, generator=rng, dtype=torch.float64)
    votes = torch.zeros(2, 1, 50, 3, 4, 4).double()
    for i in range(50):
        for j in range(3):
            votes[:, 0, i, j] = poses[:, i].view(2, 4, 4) @ found.W[i % 2, j].detach()
            votes[:, 0, i, j, 0, 3] += (i // 10 + 0.5) / 5
            votes[:, 0, i, j, 1, 3] += (i // 2 % 5 + 0.5) / 5
    options = {"rounds": 2, "final_lambda": 0.3, "cost_scale": 3 / 50}
    expected = em_routing(votes.flatten(4), activations, found.beta_u, found.beta_a, **options)
    assert_close(found(poses, activations), expected, rtol=1e-6, atol=1e-6)  # coordinates were made in single precision


def test_the_spread_loss_is_equation_3_of_the_paper_written_as_loops(rng):
    activations = torch.rand(23, 7, generator=rng, dtype=torch.float64)
    labels = torch.randint(7, (23,), generator=rng)
    found = spread_loss(activations, labels, 0.3)
    for image in range(23):
        right, total = activations[image, labels[image]].item(), 0.0
        for other in set(range(7)) - {labels[image].item()}:
            total += max(0, 0.3 - (right - activations[image, other].item())) ** 2
        assert found[image].item() == pytest.approx(total)


def test_the_margin_rises_evenly_from_0_2_to_0_9_and_stays():
    found = [margin(updates, replace(SMALL, margin_updates=7)) for updates in (0, 1, 7, 1000)]
    assert found == pytest.approx([0.2, 0.3, 0.9, 0.9])


def test_the_training_loss_is_the_spread_loss_of_class_activations_with_the_margin_of_the_update(digits):
    network, images, labels = small(), digits[0][:13], digits[1][:13]
    for updates in range(3):
        found = network(images, labels.float()).item()
        network.updates -= 1
        activations = network.class_capsules(images).activations[:, 0]
        assert found == pytest.approx(spread_loss(activations, labels, 0.2 + 0.07 * updates).mean().item(), rel=1e-5)
        network.updates += 1
    assert network.updates == 3
    network.eval()(images, labels.float())
    assert network.updates == 3


def test_images_in_parts_have_the_capsules_and_the_history_of_images_together(digits, monkeypatch):
    network, images = small().double().eval(), digits[0][:17].double()
    together, routed = network.encode(images), network.class_capsules(images, history=True)
    assert [part.shape for part in together] == [(17, 10, 16), (17, 10)]
    monkeypatch.setattr("capsnb.baselines.matrix_capsules._PART", 5)
    monkeypatch.setattr("capsnb.baselines.matrix_capsules._ROUTED", 2)
    assert_close(network.encode(images), together)
    assert_close(network.class_capsules(images, history=True), routed)


def test_the_history_of_the_class_capsules_has_a_vote_of_every_capsule_below(digits):
    history = small().eval().class_capsules(digits[0][:3], history=True).history
    assert [step.distances.shape for step in history] == [(3, 1, 45, 10)] * 3


def test_the_empty_image_has_a_finite_loss_and_gradient():
    network = small()
    loss = network(torch.zeros(2, 1, 28, 28), torch.tensor([3.0, 5.0]))
    loss.backward()
    assert loss.isfinite() and all(tensor.grad.isfinite().all() for tensor in network.parameters())


def test_training_lowers_the_loss_at_a_fixed_margin_and_ends_in_evaluation_mode(digits):
    network = small(epochs=20.0, batch=20, learning_rate=1e-2, last_margin=0.2, rounds=2)
    losses = [step.loss for step in train_em_routing(network, digits[0][:40], digits[1][:40], seed=0)]
    assert len(losses) == 40 and sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not network.training and network.updates == 40


def test_balancing_makes_half_of_the_capsules_of_a_type_active(digits):
    network, images = small(rounds=1).double(), digits[0][:101].double()
    with torch.no_grad():
        for layer in (network.first, network.second, network.last):
            layer.beta_a.normal_(3.0, 10.0)
    network.balance(images)
    capsules = network.primary_capsules(images)
    for layer in (network.first, network.second, network.last):
        activations = layer(*capsules).activations.flatten(0, 1)
        assert ((activations > 0.5).double().mean(0) - 0.5).abs().max() < 0.01
        capsules = [part.flatten(1, 2) for part in layer(*capsules)[:2]]


def test_training_begins_with_balanced_activations_and_does_not_balance_again(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("capsnb.training._SECONDS_BETWEEN_CHECKPOINTS", -1)
    balanced, network, images = [], small(), digits[0][:57]
    monkeypatch.setattr(network, "balance", balanced.append)
    for _ in range(2):
        next(iter(train_em_routing(network, images, digits[1][:57], seed=3, checkpoint=tmp_path / "run")))
    assert len(balanced) == 1
    assert torch.equal(balanced[0], images[batch_rows(57, 11, 0, 3)])


def test_training_that_was_interrupted_ends_with_the_same_weights_and_margin(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("capsnb.training._SECONDS_BETWEEN_CHECKPOINTS", -1)
    images, labels = digits[0][:57], digits[1][:57]

    def train(network, path, updates):
        for _, _ in zip(range(updates), train_em_routing(network, images, labels, seed=1, checkpoint=path)):
            pass
        return network.state_dict()

    whole = train(small(shift=2), tmp_path / "whole", 99)
    train(small(shift=2), tmp_path / "parts", 2)
    assert_close(train(small(shift=2), tmp_path / "parts", 99), whole, rtol=0, atol=0)
    assert whole["updates"] == 5


def test_a_long_training_routes_by_a_fused_path_and_gives_it_back(digits, monkeypatch):
    monkeypatch.setattr("capsnb.baselines.matrix_capsules._LONG", 5)
    fused = []
    monkeypatch.setattr("capsnb.baselines.matrix_capsules.fused", lambda *given: fused.append(given) or given[0])
    for epochs, wanted in ((0.8, 0), (1.0, 1)):  # 4 and 5 updates
        network = small(epochs=epochs)
        steps = train_em_routing(network, digits[0][:57], digits[1][:57], seed=1)
        next(steps)
        assert len(fused) == wanted == ("route" in vars(network))
        steps.close()
        assert "route" not in vars(network)
    (route, *capsules, history), = fused
    assert len(route(*capsules, history).poses) == 4


def test_the_fused_path_has_the_capsules_and_gradients_of_the_plain_one():
    script = """import torch
from capsnb.baselines.matrix_capsules import EMRouting, EMRoutingSettings
from capsnb.native import fused
torch.manual_seed(0)
network = EMRouting(EMRoutingSettings(filters=7, primary=2, first=3, second=5, rounds=2))
capsules = network.primary_capsules(torch.rand(4, 1, 28, 28))
ways = network.route, fused(network.route, *capsules, False)
assert ways[0] is not ways[1]
plain, fast = ([routed.poses, routed.logits] for routed in (way(*capsules, False) for way in ways))
for found in (plain, fast):
    loss = sum(part.square().mean() for part in found)
    found += torch.autograd.grad(loss, [network.to_primary.weight, network.first.W], retain_graph=True)
torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_images_of_another_range_or_size_are_refused(digits):
    with pytest.raises(ValueError, match="divide 8-bit images by 255"):
        small().encode(digits[0] * 255)
    with pytest.raises(ValueError, match="32, 32"):
        small(size=32).encode(digits[0])
    with pytest.raises(ValueError, match="32, 32"):
        next(train_em_routing(small(size=32), *digits, seed=0))


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="em-routing.safetensors does not exist"):
        load_em_routing(tmp_path / "em-routing.safetensors")


def test_the_shipped_network_reads_the_shipped_digits_and_its_measures_lie_beside_it():
    images, labels = data.load("mnist", "test", sample=True)
    metrics = checkpoints.read_json(SHIPPED.with_suffix(".metrics.json"))
    assert (load_em_routing().encode(images)[1].argmax(1) != labels).sum() <= 12
    assert not metrics["quick"] and metrics["images"] == 60_000 and metrics["test"]["images"] == 10_000
    assert metrics["test"]["error"] == metrics["test"]["wrong"] / 10_000 <= 0.01
    assert SHIPPED.stat().st_size < 15e6
