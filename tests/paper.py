"""The paper written as plain loops over numpy arrays, one image at a time: what the library's tests compare with.

Names and shapes are the library's, without the batch axis: x [I, e], W [I, J, d, e], coupling [I, J], capsules [J, d].
"""

import numpy as np
import torch


def each_image(function, *batches):
    """``function`` of every image's arrays, stacked into tensors; several where it returns several."""
    rows = [function(*(batch.detach().numpy() for batch in image)) for image in zip(*batches)]
    if isinstance(rows[0], tuple):
        return tuple(torch.as_tensor(np.stack(part)) for part in zip(*rows))
    return torch.as_tensor(np.stack(rows))


def squash(z):
    """Eq. 4 for one capsule."""
    length = np.sqrt(np.sum(z**2))
    return np.zeros_like(z) if length == 0 else length**2 / (1 + length**2) * z / length


def unsquash(x):
    """Eq. 6 for one capsule."""
    length = np.sqrt(np.sum(x**2))
    return np.zeros_like(x) if length == 0 else np.sqrt(length / (1 - length)) * x / length


def cosine(a, b):
    """The cosine between two vectors, 0 where one of them is zero."""
    lengths = np.sqrt(np.sum(a**2)) * np.sqrt(np.sum(b**2))
    return 0.0 if lengths == 0 else np.sum(a * b) / lengths


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def forward(x, W, coupling):
    """Eq. 3."""
    lower, upper, d, e = W.shape
    z = np.zeros((upper, d))
    for j in range(upper):
        for i in range(lower):
            z[j] += coupling[i, j] * (W[i, j] @ x[i])
    return z


def reverse(capsules, W, coupling):
    """The line "reconstruct input capsules" of Algorithm 1, without its squash."""
    lower, upper, d, e = W.shape
    z = np.zeros((lower, e))
    for i in range(lower):
        for j in range(upper):
            z[i] += coupling[i, j] * (W[i, j].T @ capsules[j])
    return z


def routing(x, W, rounds, over, agreement="cosine", sharpness=1.0):
    """Section 2.2; ``over`` names the layer over which the couplings sum to 1, "inner" is Sabour 2017's agreement."""
    lower, upper, d, e = W.shape
    logits = np.zeros((lower, upper))
    for done in range(rounds):
        coupling = np.zeros((lower, upper))
        for i in range(lower):
            for j in range(upper):
                coupling[i, j] = softmax(logits[i])[j] if over == "upper" else softmax(logits[:, j])[i]
        z = forward(x, W, coupling)
        for i in range(lower):
            for j in range(upper):
                vote, capsule = W[i, j] @ x[i], squash(z[j])
                logits[i, j] += sharpness * (cosine(vote, capsule) if agreement == "cosine" else vote @ capsule)
    return coupling, z


def agreement(x, W, coupling):
    """The length of every z_j over the coupling-weighted sum of the lengths of its votes."""
    lower, upper, d, e = W.shape
    z = forward(x, W, coupling)
    result = np.zeros(upper)
    for j in range(upper):
        total = sum(coupling[i, j] * np.sqrt(np.sum((W[i, j] @ x[i]) ** 2)) for i in range(lower))
        result[j] = np.sqrt(np.sum(z[j] ** 2)) / total
    return result


def energy(x, h, W, coupling):
    """Eq. 7."""
    z = forward(x, W, coupling)
    return -sum(np.log(np.sum(z[j] ** 2)) * h[j] for j in range(len(h)))


def unnormalised_marginal(x, W, coupling):
    """Eq. 10 without 1/Z."""
    product = 1.0
    for z in forward(x, W, coupling):
        product *= 1 + np.exp(np.log(np.sum(z**2)))
    return product


def firing_probability(x, W, coupling):
    """Eq. 12."""
    return np.array([np.sum(z**2) / (1 + np.sum(z**2)) for z in forward(x, W, coupling)])


def eq18_term(x, W, coupling):
    """The first term of eq. 18."""
    lower, upper, d, e = W.shape
    z = forward(x, W, coupling)
    term = np.zeros(W.shape)
    for i in range(lower):
        for j in range(upper):
            term[i, j] = 2 * coupling[i, j] * np.outer(z[j], x[i]) / (1 + np.sum(z[j] ** 2))
    return term


def mixing(x, W, coupling):
    """The x and z that Algorithm 1 writes with a tilde."""
    capsules = np.array([squash(z) for z in forward(x, W, coupling)])
    x_model = np.array([squash(z) for z in reverse(capsules, W, coupling)])
    return x_model, forward(x_model, W, coupling)


def update(x, W, coupling):
    """The line "calculate gradient" of Algorithm 1."""
    lower, upper, d, e = W.shape
    z = forward(x, W, coupling)
    x_model, z_model = mixing(x, W, coupling)
    change = np.zeros(W.shape)
    for i in range(lower):
        for j in range(upper):
            data = np.outer(z[j], x[i]) / (1 + np.sum(z[j] ** 2))
            model = np.outer(z_model[j], x_model[i]) / (1 + np.sum(z_model[j] ** 2))
            change[i, j] = 2 * coupling[i, j] * (data - model)
    return change


def decoder_update(capsules, z, U, coupling):
    """The update of U that section 4.1 prints; U [J, I, e, d], coupling e_ji [J, I]."""
    upper, lower, e, d = U.shape
    z_model, x_model = np.zeros((lower, e)), np.zeros((upper, d))
    for i in range(lower):
        for j in range(upper):
            z_model[i] += coupling[j, i] * (U[j, i] @ capsules[j])
    for j in range(upper):
        x_model[j] = squash(sum(coupling[j, i] * (U[j, i].T @ z_model[i]) for i in range(lower)))
    change = np.zeros(U.shape)
    for i in range(lower):
        for j in range(upper):
            data = np.outer(z[i], capsules[j]) / (1 + np.sum(z[i] ** 2))
            model = np.outer(z_model[i], x_model[j]) / (1 + np.sum(z_model[i] ** 2))
            change[j, i] = 2 * coupling[j, i] * (data - model)
    return change


def rank_mask(score, gamma, cut):
    """Rawlinson 2018, eq. 3, with values below ``cut`` set to 0."""
    upper = len(score)
    mask = np.zeros(upper)
    for j in range(upper):
        rank = sum(score[k] > score[j] for k in range(upper))
        value = np.exp(-gamma * rank / (upper - 1))
        mask[j] = value if value >= cut else 0
    return mask
