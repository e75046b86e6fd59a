"""The three stages: their updates, their schedules, and going on after an interruption."""

import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import paper
import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints, squash, training, unsquash
from capsnb.model import CapsuleDecoder, CapsuleEncoder, ConvAutoencoder
from capsnb.settings import (
    AutoencoderSettings,
    DecoderSettings,
    EncoderSettings,
    SparsitySettings,
    StartSettings,
    ViewsSettings,
)

I, J, D, E = 13, 5, 7, 3  # noqa: E741
ENCODER = EncoderSettings(capsules=J, dim=D, steps=11, batch=17)


@pytest.fixture
def lower(double):
    """Lower capsules before the squash, in the half precision in which runs keep them."""
    return double(101, I, E).half()


class Groups:
    """For every row a group of three, each of them the row with noise from torch's global generator."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, chosen):
        groups = self.rows[chosen].float().repeat_interleave(3, dim=0)
        return groups + 0.1 * torch.randn(groups.shape)


@pytest.fixture
def upper(double):
    """Upper capsules, two of them on for every image."""
    capsules = squash(double(101, J, D)).float()
    capsules[:, 2:] = 0
    return capsules


@pytest.fixture
def single(double, rng):
    """Upper capsules, one of them on for every image."""
    mask = torch.nn.functional.one_hot(torch.randint(J, (101,), generator=rng), J)
    return squash(double(101, J, D)).float() * mask.unsqueeze(2)


@pytest.fixture
def stages(lower, upper, digits):
    """Every kind of training by its name: a function that makes it afresh, as a module and a function of a path."""

    def autoencoder():
        settings = AutoencoderSettings(channels=6, capsule_dim=3, dropout=0.5, epochs=1.0, batch=11)
        module = ConvAutoencoder(settings)
        return module, lambda path, seed=0: training.train_autoencoder(
            module, digits[0][:97], seed=seed, checkpoint=path
        )

    def encoder(**changes):
        module = CapsuleEncoder(I, E, replace(ENCODER, **changes))
        return module, lambda path, seed=0: training.train_encoder(module, lower, seed=seed, checkpoint=path)

    def started():
        views = ViewsSettings(count=3, learned=1)
        start = StartSettings(groups=67, components=31, tries=2, sweeps=3)
        module = CapsuleEncoder(I, E, replace(ENCODER, sparsity=SparsitySettings(), views=views, start=start))
        return module, lambda path, seed=0: training.train_encoder(module, Groups(lower), seed=seed, checkpoint=path)

    def decoder(rule, **changes):
        module = CapsuleDecoder(I, E, ENCODER, DecoderSettings(rule=rule, steps=11, batch=17, **changes))
        return module, lambda path, seed=0: training.train_decoder(module, upper, lower, seed=seed, checkpoint=path)

    return {
        "autoencoder with Adam, dropout and autocast": autoencoder,
        "encoder with orthogonal momentum and boosts": lambda: encoder(
            optimiser="orthogonal", sparsity=SparsitySettings(boost_step=0.05)
        ),
        "encoder with views from a start": started,
        "encoder with Adam": lambda: encoder(optimiser="adam"),
        "encoder with momentum": lambda: encoder(over="lower"),
        "encoder without momentum": lambda: encoder(momentum=0.0),
        "decoder by gradient": lambda: decoder("gradient"),
        "decoder by the literal rule with Adam": lambda: decoder("literal", optimiser="adam"),
    }


KINDS = (
    "autoencoder with Adam, dropout and autocast",
    "encoder with orthogonal momentum and boosts",
    "encoder with views from a start",
    "encoder with Adam",
    "encoder with momentum",
    "encoder without momentum",
    "decoder by gradient",
    "decoder by the literal rule with Adam",
)
every_kind = pytest.mark.parametrize("kind", KINDS)


def start(stages, kind, weights):
    """A module of ``kind`` with the initial weights of seed ``weights``, and its training."""
    torch.manual_seed(weights)
    return stages[kind]()


def finish(steps):
    return [step.loss for step in steps]


@pytest.fixture
def save_at_every_step(monkeypatch):
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)


def test_the_start_is_what_k_subspaces_finds_in_reduced_groups_of_length_1(double):
    """One tight cluster for every capsule: its rows of W span the cluster's subspace, at the length of the settings."""
    planes = torch.linalg.qr(double(J, I * E, 2))[0].mT.float()
    weights = torch.tensor([1.0, 0.3]) + 0.2 * double(J, 40, 2).float()
    x = 0.2 * torch.nn.functional.normalize((weights @ planes), dim=2).flatten(0, 1).unflatten(1, (I, E))
    start = StartSettings(groups=200, components=10, tries=9, sweeps=9, length=3.0)
    module = CapsuleEncoder(I, E, replace(ENCODER, dim=2, start=start))
    training.start_from_subspaces(module, unsquash(x), seed=1)
    rows = module.W.detach().permute(1, 2, 0, 3).flatten(2)
    assert_close(rows @ rows.mT, 9 * torch.eye(2).expand(J, 2, 2), rtol=0, atol=1e-4)
    same = torch.stack([torch.linalg.svdvals(rows / 3 @ plane.T).amin(1) for plane in planes])
    assert (same.amax(1) > 0.999).all() and sorted(same.argmax(1).tolist()) == list(range(J))


@every_kind
def test_a_run_that_was_interrupted_ends_with_the_same_weights(kind, stages, tmp_path, save_at_every_step):
    whole, train = start(stages, kind, weights=3)
    losses = finish(train(None))
    first, train = start(stages, kind, weights=3)
    steps = train(tmp_path / "a")
    begun = [step.loss for step in islice(steps, 4)]
    shutil.copy(tmp_path / "a", tmp_path / "checkpoint")
    finish(islice(steps, 2))  # work that is lost
    steps.close()
    second, train = start(stages, kind, weights=5)  # other weights: all must come from the file
    rest = finish(train(tmp_path / "checkpoint"))
    assert begun + rest == losses
    assert_close(dict(second.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)


@every_kind
def test_a_run_that_ended_only_loads_its_last_checkpoint(kind, stages, tmp_path):
    whole, train = start(stages, kind, weights=3)
    finish(train(tmp_path / "checkpoint"))
    again, train = start(stages, kind, weights=5)
    assert finish(train(tmp_path / "checkpoint")) == []
    assert_close(dict(again.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)


@every_kind
def test_the_same_seed_gives_the_same_weights_twice_and_another_seed_others(kind, stages):
    results = []
    for seed in (7, 7, 11):
        module, train = start(stages, kind, weights=3)
        torch.rand(seed)  # the state of the global generator is no matter
        finish(train(None, seed))
        results.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


@every_kind
def test_training_leaves_the_global_generator_alone(kind, stages):
    module, train = start(stages, kind, weights=3)
    before = torch.get_rng_state()
    finish(train(None))
    assert torch.equal(torch.get_rng_state(), before)


@every_kind
def test_training_ends_in_evaluation_mode_after_the_steps_that_it_announced(kind, stages):
    module, train = start(stages, kind, weights=3)
    steps = list(train(None))
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert {step.steps for step in steps} == {len(steps)}
    assert not module.training


def test_the_learning_rate_warms_up_and_then_falls_in_a_straight_line(lower):
    module = CapsuleEncoder(I, E, replace(ENCODER, steps=100, learning_rate=0.3))
    rates = [step.learning_rate for step in training.train_encoder(module, lower, seed=0)]
    expected = [0.3 * min(1, (step + 1) / 50) * (1 - step / 100) for step in range(100)]
    assert rates == pytest.approx(expected)
    assert max(rates) == rates[49]


def test_an_encoder_step_is_algorithm_1_with_momentum_and_weight_decay_written_as_loops(lower):
    """Two steps, in single precision as runs are."""
    settings = replace(ENCODER, learning_rate=3.0, momentum=0.7, weight_decay=0.1)
    module = CapsuleEncoder(I, E, settings)
    W, velocity = module.W.detach().double().numpy(), 0.0
    steps = training.train_encoder(module, lower, seed=19)
    for number, step in enumerate(islice(steps, 2)):
        rows = training.batch_rows(101, 17, number, 19)
        changes = []
        for z in lower[rows].double().numpy():
            x = np.array([paper.squash(capsule) for capsule in z])
            coupling, _ = paper.routing(x, W, 3, "upper")
            changes.append(paper.update(x, W, coupling))
        velocity = 0.7 * velocity + np.mean(changes, axis=0) - 0.1 * W
        W = W + step.learning_rate * velocity
    assert_close(module.W.detach().double(), torch.as_tensor(W), rtol=1e-4, atol=1e-5)


def test_a_step_of_the_literal_decoder_is_the_printed_update(lower, upper):
    module = CapsuleDecoder(I, E, ENCODER, DecoderSettings("literal", learning_rate=3.0, weight_decay=0.0, batch=17))
    U = module.U.detach().double()
    step = next(training.train_decoder(module, upper, lower, seed=19))
    rows = training.batch_rows(101, 17, 0, 19)
    coupling = CapsuleDecoder.couplings(_with(module, U), upper[rows].double())
    batch = upper[rows].double(), lower[rows].double(), coupling
    changes = paper.each_image(lambda h, z, e: paper.decoder_update(h, z, U.numpy(), e), *batch)
    assert_close(module.U.detach().double(), U + step.learning_rate * changes.mean(0), rtol=1e-4, atol=1e-5)


def _with(module, U):
    """A double-precision copy of a decoder with the weights ``U``."""
    copy = CapsuleDecoder(I, E, ENCODER, module.settings).double()
    copy.U.data.copy_(U)
    return copy


def test_the_autoencoder_learns_and_ends_centred(digits):
    module = ConvAutoencoder(AutoencoderSettings(channels=8, epochs=16.0, batch=29))
    losses = finish(training.train_autoencoder(module, digits[0][:290], seed=0))
    assert len(losses) == 160
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    assert_close(module.features(torch.zeros(1, 1, 28, 28)), torch.zeros(1, 8, 6, 6))
    assert module.origin.abs().max() > 0


def test_the_gradient_decoder_learns(upper, lower):
    module = CapsuleDecoder(I, E, ENCODER, DecoderSettings("gradient", steps=100, batch=17, learning_rate=0.1))
    losses = finish(training.train_decoder(module, upper, lower, seed=0))
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])


def test_the_closed_form_decoder_is_the_ridge_regression_of_numpy(single, lower):
    module = CapsuleDecoder(I, E, ENCODER, DecoderSettings("least-squares", ridge=0.2))
    training.solve_decoder(module, single, lower)
    for j in range(J):
        poses, targets = single[:, j].double().numpy(), lower.double().numpy().reshape(101, -1)
        ridge = 0.2 * np.mean([np.sum(single[:, k].double().numpy() ** 2, axis=0) for k in range(J)])
        solution = np.linalg.solve(poses.T @ poses + ridge * np.eye(D), poses.T @ targets)  # [d, I·e]
        expected = torch.as_tensor(solution.reshape(D, I, E)).permute(1, 2, 0)
        assert_close(module.U[j].detach().double(), expected, rtol=1e-3, atol=1e-4)


def test_the_closed_form_decoder_is_one_step_and_better_than_its_neighbours(single, lower):
    module = CapsuleDecoder(I, E, ENCODER, DecoderSettings("least-squares", ridge=1e-9))
    (step,) = training.train_decoder(module, single, lower, seed=0)
    assert (step.step, step.steps) == (1, 1)
    assert_close(module(single, lower.float()).item(), step.loss)
    for direction in torch.randn(5, *module.U.shape):
        module.U.data += 0.01 * direction
        assert module(single, lower.float()).item() > step.loss
        module.U.data -= 0.01 * direction


def test_the_closed_form_decoder_refuses_images_with_several_capsules_on(upper, lower):
    module = CapsuleDecoder(I, E, ENCODER, DecoderSettings("least-squares"))
    with pytest.raises(ValueError, match="one capsule on per image; use the 'gradient' or 'literal' rule"):
        list(training.train_decoder(module, upper, lower, seed=0))


def test_every_epoch_shows_every_image_once_in_a_new_order():
    batches = [training.batch_rows(55, 11, step, seed=3).tolist() for step in range(10)]
    epochs = [sum(batches[:5], []), sum(batches[5:], [])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(55))] * 2
    assert epochs[0] != epochs[1] != list(range(55))


def test_an_incomplete_last_batch_is_left_out_and_a_small_set_is_one_batch():
    rows = [training.batch_rows(53, 11, step, seed=3) for step in range(4)]
    assert [len(batch) for batch in rows] == [11] * 4
    assert len(set(torch.cat(rows).tolist())) == 44
    assert len(training.batch_rows(53, 11, 4, seed=3)) == 11
    assert sorted(training.batch_rows(7, 11, 5, seed=3).tolist()) == list(range(7))


@pytest.mark.parametrize("change", ["settings", "seed", "rows"])
def test_a_checkpoint_of_another_run_is_refused_and_left_as_it_was(change, lower, tmp_path):
    path = tmp_path / "checkpoint"
    finish(training.train_encoder(CapsuleEncoder(I, E, ENCODER), lower, seed=0, checkpoint=path))
    content = path.read_bytes()
    settings = replace(ENCODER, learning_rate=0.5) if change == "settings" else ENCODER
    rows, seed = lower[:-1] if change == "rows" else lower, int(change == "seed")
    with pytest.raises(ValueError, match=f"was made with {change} .*use another folder"):
        finish(training.train_encoder(CapsuleEncoder(I, E, settings), rows, seed=seed, checkpoint=path))
    assert path.read_bytes() == content


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(lower, tmp_path, save_at_every_step):
    path, module = tmp_path / "checkpoint", CapsuleEncoder(I, E, ENCODER)
    steps = training.train_encoder(module, lower, seed=0, checkpoint=path)
    finish(islice(steps, 3))
    with torch.no_grad():
        module.W.mul_(1e30)
    with pytest.raises(ValueError, match="at step 4; lower the learning rate and resume"):
        next(steps)
    tensors, facts = checkpoints.read(path)
    assert facts["step"] == 3 and tensors["W"].isfinite().all()


def test_images_with_nan_are_refused_before_anything_is_trained(digits, tmp_path):
    images = digits[0][:31].clone()
    images[5, 0, 3, 3] = float("nan")
    module = ConvAutoencoder(AutoencoderSettings(channels=8))
    with pytest.raises(ValueError, match="images holds NaN"):
        list(training.train_autoencoder(module, images, seed=0, checkpoint=tmp_path / "checkpoint"))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_optimiser_lists_the_known_ones(lower):
    module = CapsuleEncoder(I, E, replace(ENCODER, optimiser="lbfgs"))
    with pytest.raises(ValueError, match="unknown optimiser 'lbfgs'; choose one of 'sgd', 'adam', 'orthogonal'"):
        next(training.train_encoder(module, lower, seed=0))


def test_autocast_is_off_unless_wanted():
    device, wanted = torch.device("cpu"), torch.ones(2, 2)
    with training.autocast(device, wanted=False):
        assert (wanted @ wanted).dtype == torch.float32
    with training.autocast(device):
        expected = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
        assert (wanted @ wanted).dtype == expected


@every_kind
def test_a_run_on_an_accelerator_begins_with_nearly_the_loss_of_the_cpu(kind, accelerator, stages):
    losses = []
    for device in ("cpu", accelerator):
        module, train = start(stages, kind, weights=3)
        module.to(device)
        losses.append(next(train(None)).loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
