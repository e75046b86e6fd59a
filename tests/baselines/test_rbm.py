"""The RBM against brute force: every state of a tiny machine is written out."""

from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints, data
from capsnb.baselines.rbm import (
    RBM,
    DigitRBM,
    DigitRBMSettings,
    RBMSettings,
    all_states,
    ascend,
    binarise,
    cd_gradient,
    energy,
    eq2_term,
    exact_gradient,
    free_energy,
    gibbs_step,
    hidden_probability,
    load_rbm,
    log_likelihood,
    log_z,
    model_term,
    new_rbm,
    train_digit_rbm,
    train_rbm,
    visible_probability,
)

V, H, BATCH = 5, 3, 7


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(visible=V, hidden=H, seed=0):
    rng = generator(seed)
    draw = (torch.randn(*shape, generator=rng).double() for shape in ((visible, hidden), (visible,), (hidden,)))
    return RBM(*draw)


def images(seed=1):
    return torch.bernoulli(torch.full((BATCH, V), 0.4), generator=generator(seed)).double()


def flat(rbm):
    return torch.cat([part.flatten() for part in rbm])


def unflat(vector, like):
    pieces = vector.split([part.numel() for part in like])
    return RBM(*(piece.view_as(part) for piece, part in zip(pieces, like)))


def joint(rbm):
    """p(v, h) of every configuration, as a dictionary, by plain loops over eq. 1."""
    w, b, c = (part.numpy() for part in rbm)
    unnormalised = {}
    for v in product((0, 1), repeat=len(b)):
        for h in product((0, 1), repeat=len(c)):
            pairs = sum(w[i, j] * v[i] * h[j] for i in range(len(b)) for j in range(len(c)))
            unnormalised[v, h] = np.exp(pairs + sum(b[i] * v[i] for i in range(len(b))) + np.dot(c, h))
    total = sum(unnormalised.values())
    return {state: value / total for state, value in unnormalised.items()}, np.log(total)


def test_log_z_is_the_log_of_the_sum_over_every_configuration_whichever_layer_is_smaller():
    for rbm in (tiny(5, 3), tiny(3, 5)):
        assert log_z(rbm).item() == pytest.approx(joint(rbm)[1], rel=1e-12)


def test_log_z_of_a_machine_with_one_small_layer_enumerates_that_one():
    one_way = tiny(23, 3)
    other_way = RBM(one_way.w.T, one_way.c, one_way.b)
    assert_close(log_z(one_way), log_z(other_way))


def test_energy_and_log_z_give_the_probability_of_every_configuration():
    rbm = tiny()
    for (v, h), probability in joint(rbm)[0].items():
        found = (-energy(rbm, torch.tensor([v]).double(), torch.tensor([h]).double()) - log_z(rbm)).exp()
        assert found.item() == pytest.approx(probability, rel=1e-10)


def test_log_likelihood_is_the_joint_summed_over_the_hidden_units():
    rbm = tiny()
    probability = joint(rbm)[0]
    for v in all_states(V).double():
        marginal = sum(p for (state, _), p in probability.items() if state == tuple(v.int().tolist()))
        assert log_likelihood(rbm, v[None]).exp().item() == pytest.approx(marginal, rel=1e-10)


def test_the_conditionals_are_those_of_the_enumerated_joint():
    rbm = tiny()
    probability = joint(rbm)[0]
    v, h = (1, 0, 1, 1, 0), (0, 1, 1)
    given_v = {state[1]: p for state, p in probability.items() if state[0] == v}
    given_h = {state[0]: p for state, p in probability.items() if state[1] == h}
    hidden = [sum(p for s, p in given_v.items() if s[j]) / sum(given_v.values()) for j in range(H)]
    visible = [sum(p for s, p in given_h.items() if s[i]) / sum(given_h.values()) for i in range(V)]
    assert_close(hidden_probability(rbm, torch.tensor([v]).double())[0], torch.tensor(hidden).double())
    assert_close(visible_probability(rbm, torch.tensor([h]).double())[0], torch.tensor(visible).double())


def test_the_first_term_of_eq_2_is_minus_the_derivative_of_the_free_energy():
    rbm = RBM(*(part.requires_grad_() for part in tiny()))
    gradient = torch.autograd.grad(-free_energy(rbm, images()).mean(), rbm)
    assert_close(flat(eq2_term(rbm, images())), flat(gradient))


@pytest.mark.parametrize("visible, hidden", [(5, 3), (3, 5)])
def test_the_model_term_is_the_derivative_of_log_z(visible, hidden):
    rbm = RBM(*(part.requires_grad_() for part in tiny(visible, hidden)))
    assert_close(flat(model_term(rbm)), flat(torch.autograd.grad(log_z(rbm), rbm)))


def test_the_exact_gradient_agrees_with_finite_differences_of_the_exact_log_likelihood():
    rbm, v, step = tiny(), images(), 1e-6
    point = flat(rbm)
    slopes = torch.zeros_like(point)
    for k in range(len(point)):
        nudge = torch.zeros_like(point)
        nudge[k] = step
        up, down = (log_likelihood(unflat(point + sign * nudge, rbm), v).mean() for sign in (1, -1))
        slopes[k] = (up - down) / (2 * step)
    assert_close(flat(exact_gradient(rbm, v)), slopes, atol=1e-8, rtol=1e-6)


def test_the_exact_likelihood_rises_at_every_step_along_the_exact_gradient():
    rbm, v = tiny(), images()
    values = []
    for _ in range(50):
        values.append(log_likelihood(rbm, v).mean().item())
        rbm = ascend(rbm, exact_gradient(rbm, v), 0.1)
    assert all(later > earlier for earlier, later in zip(values, values[1:]))
    assert values[-1] > values[0] + 0.5


def test_the_exact_likelihood_of_the_data_rises_while_contrastive_divergence_trains():
    v = images().repeat(20, 1)
    rbm = new_rbm(v, H, rng=generator(), deviation=0.5)
    before = log_likelihood(rbm, v).mean()
    losses = [
        step.loss for step in train_rbm(rbm, v, RBMSettings(epochs=100, batch=20, learning_rate=0.5), rng=generator())
    ]
    assert log_likelihood(rbm, v).mean() > before + 0.2
    assert np.mean(losses[-20:]) < np.mean(losses[:20])


def test_long_gibbs_chains_visit_states_as_often_as_the_exact_distribution_says():
    rbm, rng = tiny(3, 2), generator(3)
    v = torch.bernoulli(torch.full((40_000, 3), 0.5), generator=rng).double()
    for _ in range(30):
        v = gibbs_step(rbm, v, rng=rng)
    numbers = (v.long() * torch.tensor([4, 2, 1])).sum(1)
    share = torch.bincount(numbers, minlength=8) / len(v)
    assert_close(share.double(), log_likelihood(rbm, all_states(3).double()).exp(), atol=0.01, rtol=0)


def test_contrastive_divergence_with_many_steps_approaches_the_exact_gradient():
    rbm, v, rng = tiny(), images(), generator(4)
    estimate = cd_gradient(rbm, v.repeat(6_000, 1), rng=rng, steps=50)
    assert_close(flat(estimate), flat(exact_gradient(rbm, v)), atol=0.01, rtol=0)


def test_persistent_chains_go_on_where_they_were_and_the_others_start_at_the_images():
    copies = RBM(*(torch.full(size, value).double() for size, value in (((1, 1), 2e3), ((1,), -1e3), ((1,), -1e3))))
    zero_then_one = torch.tensor([[0.0], [1.0]]).double()

    def moved(persistent):
        rbm = RBM(*(part.clone() for part in copies))
        settings = RBMSettings(epochs=1, batch=1, weight_decay=0.0, persistent=persistent)
        list(train_rbm(rbm, zero_then_one, settings, rng=generator()))
        return (rbm.b - copies.b).item()

    assert moved(persistent=False) == 0  # every chain is a copy of its image
    assert moved(persistent=True) > 0.01  # the chain that began at the zero is still there


def test_an_untrained_rbm_without_weights_has_every_unit_on_as_often_as_the_images():
    rbm = new_rbm(images(), H, rng=generator(), deviation=0.0)
    assert_close(model_term(rbm).b, images().mean(0).clamp(0.01, 0.99))


def test_the_same_generator_state_gives_the_same_training():
    def trained():
        rbm = new_rbm(images(), H, rng=generator(5))
        list(train_rbm(rbm, images(), RBMSettings(epochs=3, batch=2), rng=generator(6)))
        return flat(rbm)

    assert_close(trained(), trained(), atol=0, rtol=0)


def test_training_yields_every_update_the_short_last_batch_included():
    rbm = new_rbm(images(), H, rng=generator())
    steps = list(train_rbm(rbm, images(), RBMSettings(epochs=3, batch=2), rng=generator()))
    assert [step.step for step in steps] == list(range(1, 13))
    assert {step.steps for step in steps} == {12}


def test_weight_decay_shrinks_the_weights_and_leaves_the_biases_alone():
    v = images()

    def trained(decay):
        rbm = new_rbm(v, H, rng=generator(7), deviation=1.0)
        list(train_rbm(rbm, v, RBMSettings(epochs=1, batch=BATCH, weight_decay=decay), rng=generator(8)))
        return rbm

    plain, decayed, first = trained(0.0), trained(0.5), new_rbm(v, H, rng=generator(7), deviation=1.0)
    assert_close(plain.w - decayed.w, 0.05 * 0.5 * first.w)
    assert_close((plain.b, plain.c), (decayed.b, decayed.c))


def test_what_cannot_be_enumerated_or_trained_is_refused():
    with pytest.raises(ValueError, match="at most 16"):
        log_z(tiny(23, 29))
    with pytest.raises(ValueError, match="at least 1"):
        cd_gradient(tiny(), images(), rng=generator(), steps=0)
    with pytest.raises(ValueError, match="visible units"):
        next(train_rbm(tiny(), torch.zeros(2, V + 1), rng=generator()))


def test_binary_images_have_pixels_on_as_often_as_the_grey_value_says():
    grey = torch.rand(1, 1, 28, 28, generator=generator()).expand(5_003, -1, -1, -1)
    v = binarise(grey, rng=generator(1))
    assert ((v == 0) | (v == 1)).all()
    error = (v.mean(0) - grey[0].flatten()) / (grey[0].flatten() * (1 - grey[0].flatten()) / len(v)).sqrt()
    assert error.abs().max() < 4.5 and 0.8 < error.std() < 1.2  # in standard errors, of 784 pixels


@pytest.mark.parametrize("last", [2, 4, 5])
@pytest.mark.parametrize("persistent", [False, True])
def test_training_that_was_interrupted_goes_on_with_the_same_chains_and_draws(persistent, last, tmp_path, monkeypatch):
    monkeypatch.setattr("capsnb.training._SECONDS_BETWEEN_CHECKPOINTS", -1)
    settings = RBMSettings(epochs=3, batch=2, persistent=persistent)  # of 4 updates

    def train(path, updates):
        rng = generator(5)
        rbm = new_rbm(images(), H, rng=rng, deviation=1.0)
        for _, _ in zip(range(updates), train_rbm(rbm, images(), settings, rng=rng, checkpoint=path)):
            pass
        return flat(rbm)

    whole = train(tmp_path / "whole", 99)
    train(tmp_path / "parts", last)
    assert_close(train(tmp_path / "parts", 99), whole, atol=0, rtol=0)


def test_a_stored_rbm_is_read_back_and_other_files_are_refused(tmp_path):
    machine = DigitRBM(DigitRBMSettings(hidden=3))
    machine.w.normal_(generator=generator())
    checkpoints.write(tmp_path / "rbm", machine.state_dict(), settings=asdict(machine.settings))
    for found, written in zip(load_rbm(tmp_path / "rbm"), machine.rbm):
        assert_close(found, written, rtol=0, atol=0)
    checkpoints.write(tmp_path / "other", {"w": torch.ones(2, 3)}, settings=asdict(machine.settings))
    with pytest.raises(ValueError, match="other is not a whole model"):
        load_rbm(tmp_path / "other")


def test_the_module_is_trained_under_which_digits_are_likelier_than_noise(digits):
    machine = DigitRBM(DigitRBMSettings(epochs=2, hidden=101))
    steps = list(train_digit_rbm(machine, digits[0], seed=3))
    v = binarise(data.load("mnist", "test", sample=True)[0], rng=generator())
    noise = v[:, torch.randperm(784, generator=generator())]
    assert len(steps) == 20 and (free_energy(machine.rbm, noise) - free_energy(machine.rbm, v)).mean() > 100


def test_an_rbm_is_not_trained_in_several_processes(digits, monkeypatch):
    monkeypatch.setattr("capsnb.distributed.world_size", lambda: 2)
    with pytest.raises(ValueError, match="in one process; start it without torchrun"):
        next(train_digit_rbm(DigitRBM(), digits[0], seed=0))


def test_the_shipped_rbm_gives_digits_far_more_probability_than_noise_as_dense():
    rbm = load_rbm()
    digits = binarise(data.load("mnist", "test", sample=True)[0], rng=generator())
    noise = digits[:, torch.randperm(784, generator=generator())]
    assert rbm.w.shape == (784, 500)
    assert (free_energy(rbm, noise) - free_energy(rbm, digits)).mean() > 200
