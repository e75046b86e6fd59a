"""EM routing: against Hinton 2018's procedure written as loops, its symmetries, and numbers at their limits."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from capsnb.baselines.em_routing import coordinates, em_routing, inverse_temperature, pose_votes, receptive_fields

B, P, I, J, H, N = 2, 3, 11, 7, 5, 23  # noqa: E741
TOGETHER = torch.tensor([[*range(11)], [3, 1, 20, 19, 18, 17, 16, 15, 14, 13, 12], [*range(1, 22, 2)]])
NEARLY = {"rtol": 1e-5, "atol": 1e-6}  # the library spreads 1e-8 of a lower capsule evenly


def procedure_1(votes, activations, beta_u, beta_a, rounds, final_lambda, cost_scale, children):
    """The slides' EM routing, M-step and E-step, for one image: votes [P, I, J, H], activations [N]."""
    positions, seen, types, numbers = votes.shape
    parents = [types * np.sum(children == i) for i in range(len(activations))]
    R = np.zeros(votes.shape[:3])
    for p, i, c in np.ndindex(R.shape):
        R[p, i, c] = 1 / parents[children[p, i]]
    history = []
    for done in range(rounds):
        temperature = final_lambda * (1 - 0.95 ** (done + 1))
        mean, variance = np.zeros((2, positions, types, numbers))
        active = np.zeros((positions, types))
        for p in range(positions):
            for c in range(types):
                r = [R[p, i, c] * activations[children[p, i]] for i in range(seen)]
                cost = 0.0
                for h in range(numbers):
                    mean[p, c, h] = sum(r[i] * votes[p, i, c, h] for i in range(seen)) / sum(r)
                    squares = sum(r[i] * (votes[p, i, c, h] - mean[p, c, h]) ** 2 for i in range(seen))
                    variance[p, c, h] = squares / sum(r)
                    cost += (beta_u[c] + np.log(np.sqrt(variance[p, c, h]))) * cost_scale * sum(r)
                active[p, c] = 1 / (1 + np.exp(-temperature * (beta_a[c] - cost)))
        R, distances = e_step(votes, mean, variance, active, children), np.zeros(R.shape)
        for p, i, c in np.ndindex(R.shape):
            distances[p, i, c] = np.sqrt(np.sum((votes[p, i, c] - mean[p, c]) ** 2))
        history.append((R, distances))
    return mean, active, history


def e_step(votes, mean, variance, active, children):
    weight = np.zeros(votes.shape[:3])
    for p, i, c in np.ndindex(weight.shape):
        exponent = np.sum((votes[p, i, c] - mean[p, c]) ** 2 / (2 * variance[p, c]))
        weight[p, i, c] = active[p, c] * np.exp(-exponent) / np.sqrt(np.prod(2 * np.pi * variance[p, c]))
    R = np.zeros(weight.shape)
    for p, i, c in np.ndindex(weight.shape):
        R[p, i, c] = weight[p, i, c] / np.sum(weight[children == children[p, i]])
    return R


@pytest.fixture
def case(double, rng):
    """Votes that agree in part, activations, beta_u and beta_a."""
    votes = double(B, P, I, J, H)
    votes[:, :, : I // 2] = 0.3 * votes[:, :, : I // 2] + double(H)
    return votes, torch.rand(B, N, generator=rng, dtype=torch.float64), double(J), double(J)


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("children", ["all", "shared"])
def test_routing_is_the_procedure_of_the_slides_written_as_loops(case, rounds, children):
    votes, activations, beta_u, beta_a = case
    if children == "all":
        votes, activations, numbers = votes[:, :1], activations[:, :I], None
        expected_children = np.arange(I)[None]
    else:
        numbers, expected_children = TOGETHER, TOGETHER.numpy()
    options = {"rounds": rounds, "final_lambda": 0.3, "cost_scale": 1.7}
    found = em_routing(votes, activations, beta_u, beta_a, children=numbers, history=True, **options)
    assert len(found.history) == rounds
    for image in range(B):
        arrays = (part.numpy() for part in (votes[image], activations[image], beta_u, beta_a))
        mean, active, history = procedure_1(*arrays, **options, children=expected_children)
        assert_close(found.poses[image], torch.as_tensor(mean), **NEARLY)
        assert_close(found.activations[image], torch.as_tensor(active), **NEARLY)
        for step, (assignments, distances) in zip(found.history, history):
            assert_close(step.assignments[image], torch.as_tensor(assignments), **NEARLY)
            assert_close(step.distances[image], torch.as_tensor(distances), **NEARLY)


def test_without_history_the_result_is_the_same_and_no_round_is_kept(case):
    votes, *others = case
    told, found = (em_routing(votes, *others, children=TOGETHER, history=history) for history in (True, False))
    assert found.history == ()
    assert_close(found[:2], told[:2], rtol=0, atol=0)


def test_every_lower_capsule_is_shared_out_once_over_all_types_and_positions_that_see_it(case):
    votes, *others = case
    for step in em_routing(votes, *others, children=TOGETHER, history=True).history:
        for number in range(N):
            if (TOGETHER == number).any():
                assert_close(step.assignments[:, TOGETHER == number].sum((1, 2)), torch.ones(B).double())


def test_the_authors_lambda_rises_from_a_twentieth_of_its_last_value():
    assert [inverse_temperature(done, 0.01) for done in range(3)] == pytest.approx([0.0005, 0.000975, 0.00142625])


def test_turning_all_votes_turns_the_poses_where_variances_do_not_depend_on_the_axes(case):
    """With one round, poses are weighted means: any linear map of the votes is that map of the poses."""
    votes, *others = case
    turn = torch.linalg.qr(votes[0, 0, :, 0].T @ votes[0, 0, :, 0] + torch.eye(H).double())[0]
    before, after = (em_routing(part, *others, children=TOGETHER, rounds=1) for part in (votes, votes @ turn))
    assert_close(after.poses, before.poses @ turn)


def test_moving_all_votes_moves_the_poses_and_changes_nothing_else(case, double):
    votes, *others = case
    added = double(H)
    before, after = (em_routing(part, *others, children=TOGETHER) for part in (votes, votes + added))
    assert_close(after.poses, before.poses + added)
    assert_close(after.activations, before.activations)


def test_a_cluster_of_votes_takes_its_capsules_from_a_capsule_whose_votes_are_scattered(double):
    votes = double(1, 1, I, 2, H)
    votes[:, :, :, 0] = 0.1 * votes[:, :, :, 0] + 3
    found = em_routing(votes, torch.ones(1, I).double(), *torch.zeros(2, 2).double(), history=True, final_lambda=1.0)
    assert (found.history[-1].assignments[..., 0] > 0.99).all()
    assert found.activations[0, 0, 0] > 0.9


def test_gradients_through_all_rounds_are_those_of_finite_differences(double, rng):
    votes, activations = double(1, 2, 3, 2, 5), torch.rand(1, 5, generator=rng, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (votes, activations, double(2), double(2))]
    children = torch.tensor([[0, 1, 3], [1, 4, 3]])  # nobody sees capsule 2

    def routed(*tensors):
        return em_routing(*tensors, children=children, final_lambda=0.7)[:2]

    assert torch.autograd.gradcheck(routed, inputs)


def test_receptive_fields_are_the_windows_of_a_convolution():
    fields, numbers = receptive_fields(7, 3, 2, 5), np.arange(7 * 7 * 5).reshape(7, 7, 5)
    assert fields.shape == (9, 45)
    for p in range(9):
        row, column = 2 * (p // 3), 2 * (p % 3)
        assert fields[p].tolist() == numbers[row : row + 3, column : column + 3].flatten().tolist()


def test_votes_are_products_of_poses_and_w_written_as_loops(double):
    poses, W = double(B, P, I, 16), double(I, J, 4, 4)
    found = pose_votes(poses, W)
    for b, p, i, j in np.ndindex(B, P, I, J):
        assert_close(found[b, p, i, j].view(4, 4), poses[b, p, i].view(4, 4) @ W[i, j])


def test_coordinates_are_added_to_the_first_two_numbers_of_the_last_column():
    added = coordinates(3, 2).view(3, 3, 2, 4, 4)
    for row, column, kind in np.ndindex(3, 3, 2):
        expected = torch.zeros(4, 4)
        expected[0, 3], expected[1, 3] = (row + 0.5) / 3, (column + 0.5) / 3
        assert_close(added[row, column, kind], expected)


def test_votes_that_do_not_fit_and_no_rounds_are_refused(case):
    votes, activations, *betas = case
    with pytest.raises(ValueError, match=r"votes has shape \(2, 3, 11, 7, 5\), expected \(2, 1, 23, 7, any\)"):
        em_routing(votes, activations, *betas)
    with pytest.raises(ValueError, match="rounds is 0, expected at least 1"):
        em_routing(votes, activations, *betas, children=TOGETHER, rounds=0)


# Numbers at their limits


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e12])
@pytest.mark.parametrize("beta", [0.0, 1e6, -1e6])
@pytest.mark.parametrize("lower, upper", [(I, J), (1, J), (I, 1), (1, 1)])
@pytest.mark.parametrize("active", [0.0, 1e-30, 1.0])
def test_the_result_and_its_gradient_are_finite(double, scale, beta, lower, upper, active):
    """No votes, votes that agree, huge votes and prices, single capsules, and lower capsules that are not there."""
    votes = (scale * double(B, 1, lower, upper, H)).float().requires_grad_()
    activations = torch.full((B, lower), active).requires_grad_()
    betas = torch.full((2, upper), beta).requires_grad_()
    found = em_routing(votes, activations, betas[0], -betas[1], history=True, final_lambda=1.0)
    assert all(part.isfinite().all() for part in (*found[:2], *sum(found.history, ())))
    assert_close(found.history[-1].assignments.sum(3), torch.ones(B, 1, lower))
    loss = (found.poses / max(1.0, scale)).sum() + found.activations.sum()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (votes, activations, betas)))


def test_absent_lower_capsules_do_not_count(case):
    votes, activations, *betas = case
    votes, activations = votes[:, :1], activations[:, :I].clone()
    activations[:, [1, 3]] = 0
    present = [0, 2, 4, 5, 6, 7, 8, 9, 10]
    whole = em_routing(votes, activations, *betas)
    rest = em_routing(votes[:, :, present], activations[:, present], *betas)
    assert_close(whole[:2], rest[:2], **NEARLY)
