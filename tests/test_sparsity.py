"""What a capsule alone explains, the rank mask, the sharing out of couplings, and the boosts behind them."""

from dataclasses import replace

import numpy as np
import paper
import pytest
import torch
from torch.testing import assert_close

from capsnb import squash
from capsnb.settings import SparsitySettings
from capsnb.sparsity import Sparsity, explanation, rank, rank_mask, share_out, support

B, I, J = 3, 11, 7  # noqa: E741
STEPS = 40
SETTINGS = SparsitySettings(
    gamma_first=5.0, gamma_last=9.0, cut=0.05, boost_step=0.3, share_low=0.6, share_high=1.5, on_after_training=2
)


@pytest.fixture
def sparsity():
    """The state of seven capsules in double precision, a quarter of the way through training."""
    sparsity = Sparsity(J, SETTINGS, STEPS).double()
    sparsity.updates.fill_(10)
    sparsity.boost.copy_(torch.linspace(1, -1, J))
    return sparsity


def test_the_explanation_is_the_cosine_with_the_model_phase_of_one_capsule_alone(double):
    d, e = 5, 13
    x, W = squash(double(B, I, e)), double(I, J, d, e)
    experts, all_on = W.numpy().swapaxes(0, 1), np.ones((I, 1))
    alone = [[paper.mixing(image, w[:, None], all_on)[0] for w in experts] for image in x.numpy()]
    for b in range(B):
        for j in range(J):
            sent_back, image = alone[b][j].ravel(), x[b].numpy().ravel()
            cosine = sent_back @ image / np.sqrt(sent_back @ sent_back) / np.sqrt(image @ image)
            assert_close(explanation(x, W)[b, j].item(), cosine)


def test_an_accelerator_finds_the_explanation_of_the_processor(double, accelerator):
    x, W = squash(double(B, I, 13)), double(I, J, 5, 13)
    assert_close(explanation(x.to(accelerator), W.to(accelerator)).cpu(), explanation(x, W))


def test_the_support_is_the_largest_coupling_at_each_position_summed_over_the_positions(double):
    coupling = double(B, 5 * 2, J).softmax(2)
    found = support(coupling, 5)
    for b in range(B):
        for j in range(J):
            expected = sum(max(coupling[b, 2 * place + k, j].item() for k in range(2)) for place in range(5))
            assert found[b, j].item() == pytest.approx(expected)


def test_the_rank_of_a_capsule_is_the_number_of_capsules_that_score_higher(double):
    score = double(B, J)
    expected = [[sum(other > own for other in row) for own in row] for row in score.tolist()]
    assert rank(score).tolist() == expected


def test_of_equal_scores_one_alone_comes_first():
    assert rank(torch.zeros(B, J)).sort(1).values.tolist() == [list(range(J))] * B


def test_the_rank_mask_is_rawlinsons_equation_3_written_as_loops(double):
    score = double(B, J)
    assert_close(rank_mask(score, 5.0, 0.05), paper.each_image(lambda s: paper.rank_mask(s, 5.0, 0.05), score))


def test_the_cut_leaves_on_only_the_best_capsules(double):
    score = double(B, J)
    mask = rank_mask(score, gamma=5.0, cut=0.05)  # exp(-5 rank/6) is 0.08 at rank 3 and 0.04 at rank 4
    assert (mask > 0).sum(1).tolist() == [4, 4, 4]
    assert_close(mask.amax(1), torch.ones(B, dtype=torch.float64))
    assert (mask.argmax(1) == score.argmax(1)).all()


def test_a_single_capsule_is_always_on(double):
    assert_close(rank_mask(double(B, 1), 40.0, 0.01), torch.ones(B, 1, dtype=torch.float64))


def test_couplings_are_shared_out_in_proportion_among_the_capsules_left_on(rng):
    coupling = torch.rand(B, I, J, generator=rng, dtype=torch.float64)
    mask = torch.tensor([[1.0, 0, 0.5, 0, 0, 0, 0.2]], dtype=torch.float64).expand(B, J)
    shared = share_out(coupling, mask)
    assert_close(shared.sum(2), torch.ones(B, I, dtype=torch.float64))
    assert_close(shared[:, :, mask[0] == 0], torch.zeros(B, I, 4, dtype=torch.float64))
    assert_close(shared[:, :, 2] / shared[:, :, 0], 0.5 * coupling[:, :, 2] / coupling[:, :, 0])


def test_couplings_to_capsules_that_are_all_off_become_zero():
    assert_close(share_out(torch.ones(B, I, J), torch.zeros(B, J)), torch.zeros(B, I, J))


def test_the_score_is_the_explanation_plus_the_boost(sparsity, double):
    explained = double(B, J)
    sparsity.share[3] = 0.4
    assert_close(sparsity.score(explained), explained + sparsity.boost)


def test_the_conscience_takes_from_those_that_win_often_and_gives_to_those_that_win_seldom(double):
    sparsity, explained = Sparsity(J, replace(SETTINGS, conscience=0.5), STEPS).double(), double(B, J)
    assert_close(sparsity.score(explained), explained)
    sparsity.share.copy_(torch.tensor([3.0, 0, 0.5, 1, 1, 1, 0.5]) / J)
    conscience = torch.tensor([-1.0, 0.5, 0.25, 0, 0, 0, 0.25], dtype=torch.float64)
    assert_close(sparsity.score(explained), explained + conscience)


def test_while_training_the_mask_is_the_rank_mask_of_the_score_sharper_from_step_to_step(sparsity, double):
    explained = double(B, J)
    assert_close(sparsity.mask(explained), rank_mask(sparsity.score(explained), 6.0, SETTINGS.cut))
    sparsity.updates.fill_(2 * STEPS)
    assert_close(sparsity.mask(explained), rank_mask(sparsity.score(explained), 9.0, SETTINGS.cut))


def test_after_training_the_capsules_that_explain_most_are_fully_on_and_the_rest_off(sparsity, double):
    explained = double(B, J)
    for score, row in zip(explained, sparsity.eval().mask(explained)):
        best = set(score.argsort(descending=True)[:2].tolist())
        assert row.tolist() == [float(j in best) for j in range(J)]


def plain_updates(batches, settings):
    """The shares and boosts after ``batches``, written as loops."""
    share, boost = np.full(J, 1 / J), np.zeros(J)
    for batch in batches:
        wins = np.zeros(J)
        for explained in batch:
            wins[np.argmax(explained + boost)] += 1 / len(batch)
        share = settings.running * share + (1 - settings.running) * wins
        for j in range(J):
            if share[j] < settings.share_low / J:
                boost[j] += settings.boost_step
            if share[j] > settings.share_high / J:
                boost[j] -= settings.boost_step
    return share, boost


def test_shares_and_boosts_are_the_same_as_in_plain_loops(rng):
    batches = torch.rand(13, 29, J, generator=rng, dtype=torch.float64)
    settings = replace(SETTINGS, share_low=0.95, share_high=1.05, boost_step=0.05)
    sparsity = Sparsity(J, settings, STEPS).double()
    for batch in batches:
        sparsity.update(batch)
    for statistic, expected in zip((sparsity.share, sparsity.boost), plain_updates(batches.numpy(), settings)):
        assert_close(statistic, torch.as_tensor(expected))
    assert sparsity.boost.min() < 0 < sparsity.boost.max()


def test_boosting_brings_a_capsule_that_never_won_into_play(rng):
    """Capsule 0 explains every image of a skewed batch worst, until its boost lifts it."""
    explained = torch.rand(101, J, generator=rng, dtype=torch.float64)
    explained[:, 0] = 1e-3 * explained[:, 1]
    sparsity = Sparsity(J, replace(SETTINGS, boost_step=0.05), 1000).double()
    shares = []
    for _ in range(100):
        sparsity.update(explained)
        shares.append(sparsity.share[0].item())
    assert min(shares) < 0.3 / J and max(shares[-20:]) > 0.5 * SETTINGS.share_low / J


def test_the_order_of_the_capsules_carries_over(sparsity, double, rng):
    explained, order = double(B, J), torch.randperm(J, generator=rng)
    permuted = Sparsity(J, SETTINGS, STEPS).double()
    permuted.load_state_dict({k: v[order] if v.ndim else v for k, v in sparsity.state_dict().items()})
    assert_close(permuted.mask(explained[:, order]), sparsity.mask(explained)[:, order])


def test_all_statistics_are_stored_with_the_weights(sparsity, double):
    sparsity.update(double(B, J))
    again = Sparsity(J, SETTINGS, STEPS).double()
    again.load_state_dict(sparsity.state_dict())
    explained = double(B, J)
    again.update(explained), sparsity.update(explained)
    assert_close(again.score(explained), sparsity.score(explained), rtol=0, atol=0)
