"""What a trained model is worth: purity, capsules in use, linear probe, reconstruction, negatives."""

import warnings

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor

from capsnb import runs
from capsnb.model import ExpertCapsules
from capsnb.sampling import one_at_a_time, sample_poses

IN_USE = 0.01  # a capsule is in use when it wins at least this share of the images
CLASSES = 10
SVM_C = 10.0  # of ``svm_probe``


def winner(capsules: Float[Tensor, "B J d"]) -> Int[Tensor, "B"]:
    """The longest capsule of every image."""
    return torch.linalg.vector_norm(capsules, dim=2).argmax(1)


def contingency(groups: Int[Tensor, "B"], labels: Int[Tensor, "B"], count: int) -> Int[Tensor, "count 10"]:
    """How many images of every class fall in every group."""
    pairs = groups * CLASSES + labels
    return torch.bincount(pairs, minlength=count * CLASSES).view(count, CLASSES)


def purity(table: Int[Tensor, "count 10"]) -> float:
    """The share of images that belong to the commonest class of their group."""
    return (table.amax(1).sum() / table.sum()).item()


def assignment_accuracy(table: Int[Tensor, "count 10"]) -> float:
    """The share of images whose group is their class's, with one group for each class, in the best way to choose them.

    Where there are more groups than classes the images of the others count as wrong (Kuhn 1955).
    """
    groups, classes = linear_sum_assignment(table.numpy(), maximize=True)
    return (table[groups, classes].sum() / table.sum()).item()


def winner_measures(capsules: Float[Tensor, "B J d"], labels: Int[Tensor, "B"]) -> dict:
    """Purity and assignment accuracy of the winning capsules, how many are in use, their classes and their shares."""
    table = contingency(winner(capsules), labels, capsules.shape[1])
    share = table.sum(1) / table.sum()
    used = share >= IN_USE
    return {
        "purity": purity(table),
        "assignment_accuracy": assignment_accuracy(table),
        "capsules_in_use": int(used.sum()),
        "classes_covered": len(set(table[used].argmax(1).tolist())),
        "winning_share": share.tolist(),
        "commonest_class": table.argmax(1).tolist(),
    }


def activation_measures(capsules: Float[Tensor, "B J d"]) -> dict:
    """Mean length of the longest and of all capsules, and how many exceed one half per image."""
    length = torch.linalg.vector_norm(capsules, dim=2)
    return {
        "activation_longest": length.amax(1).mean().item(),
        "activation_mean": length.mean().item(),
        "capsules_on_per_image": (length > 0.5).sum(1).float().mean().item(),
    }


def ranks(score: Float[Tensor, "N J"]) -> dict[str, list]:
    """Scores in falling order over the largest one, means over images; and how often each capsule has each rank."""
    falling, order = score.sort(dim=1, descending=True)
    counts = torch.zeros(score.shape[1], score.shape[1])
    for rank, capsules in enumerate(order.T):
        counts[:, rank] = torch.bincount(capsules, minlength=score.shape[1])
    return {
        "share_of_largest": (falling / falling[:, :1]).mean(0).tolist(),
        "rank_frequency": (counts / len(score)).tolist(),
    }


def effective_rank(W: Float[Tensor, "I J d e"]) -> float:
    """exp of the entropy of the squared singular values of each capsule's [d, I·e] matrix, averaged over capsules."""
    values = torch.linalg.svdvals(W.permute(1, 2, 0, 3).flatten(2)).square()
    shares = values / values.sum(1, keepdim=True)
    return torch.special.entr(shares).sum(1).exp().mean().item()


def linear_probe(
    train: Float[Tensor, "N ..."], labels: Int[Tensor, "N"], test: Float[Tensor, "M ..."], truth: Int[Tensor, "M"]
) -> float:
    """Test accuracy of logistic regression on all numbers of a code, scaled together; at most 200 iterations."""
    scale = train.std().clamp(min=1e-6)
    probe = LogisticRegression(C=10.0, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit((train / scale).flatten(1).numpy(), labels.numpy())
    return float(probe.score((test / scale).flatten(1).numpy(), truth.numpy()))


def svm_probe(
    train: Float[Tensor, "N ..."], labels: Int[Tensor, "N"], test: Float[Tensor, "M ..."], truth: Int[Tensor, "M"]
) -> float:
    """Test accuracy of a support vector machine on all numbers of a code: Gaussian kernel, C = 10.

    The kernel's gamma is 3 over the total variance of the numbers. Takes minutes for 60,000 images.
    """
    machine = SVC(C=SVM_C, gamma=svm_gamma(train), cache_size=2000).fit(train.flatten(1).numpy(), labels.numpy())
    return float(machine.score(test.flatten(1).numpy(), truth.numpy()))


def svm_gamma(train: Float[Tensor, "N ..."]) -> float:
    """The gamma of ``svm_probe`` for these codes."""
    return 3 / (train[0].numel() * train.var().clamp(min=1e-12).item())


def kmeans_purity(
    train: Float[Tensor, "N ..."],
    test: Float[Tensor, "M ..."],
    truth: Int[Tensor, "M"],
    *,
    clusters: int = 20,
    seed: int = 0,
) -> float:
    """Purity of ``kmeans_table``."""
    return purity(kmeans_table(train, test, truth, clusters=clusters, seed=seed))


def kmeans_table(
    train: Float[Tensor, "N ..."], test: Float[Tensor, "M ..."], truth: Int[Tensor, "M"], *, clusters: int, seed: int
) -> Int[Tensor, "clusters 10"]:
    """How many test images of each class fall in each cluster of k-means, fitted to ``train``, the best of 5 starts."""
    means = KMeans(clusters, n_init=5, random_state=seed).fit(train.flatten(1).numpy())
    groups = torch.as_tensor(means.predict(test.flatten(1).numpy()), dtype=torch.long)
    return contingency(groups, truth, clusters)


def is_negative(images: Float[Tensor, "B 1 28 28"], real: Float[Tensor, "N 1 28 28"]) -> Tensor:
    """Whether each image looks more like a negative of a real image than like a real image.

    That is, whether the best correlation of its inverse with any of the ``real`` images exceeds its own best one.
    A correlation knows neither brightness nor contrast, so a faint negative counts as a full one.
    """
    correlation = _standardised(images) @ _standardised(real).T
    return (-correlation).amax(1) > correlation.amax(1)


def _standardised(images: Tensor) -> Tensor:
    flat = images.flatten(1)
    return torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def single_capsule_images(
    model: ExpertCapsules, rows: int, *, domain: str, rng: torch.Generator
) -> Float[Tensor, "rows J 1 28 28"]:
    """Decoded samples with one capsule on: ``rows`` for each capsule.  Fig. 2."""
    poses = sample_poses(rows, model.poses, domain=domain, rng=rng)
    return model.decode(one_at_a_time(poses).flatten(0, 1)).unflatten(0, poses.shape[:2])


def sample_measures(
    model: ExpertCapsules, real: Float[Tensor, "N 1 28 28"], *, rows: int = 50, rng: torch.Generator
) -> dict:
    """Per domain: the share of negatives, the mean contrast, and how much samples of one capsule differ."""
    result = {}
    for domain in ("complete", "restricted", "fitted"):
        images = single_capsule_images(model, rows, domain=domain, rng=rng)
        result[domain] = describe_samples(images, real)
    return result


def describe_samples(images: Float[Tensor, "rows J 1 28 28"], real: Float[Tensor, "N 1 28 28"]) -> dict[str, float]:
    """Of samples of single capsules: the share of negatives, the mean contrast, and how much those of one differ."""
    return {
        "negative_share": is_negative(images.flatten(0, 1), real).float().mean().item(),
        "contrast": images.flatten(2).std(2).mean().item(),
        "variation_within_capsule": images.std(0).mean().item(),
    }


def evaluate(
    model: ExpertCapsules,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    seed: int = 0,
    svm: bool = False,
) -> dict:
    """All measures of the book for ``model``: fitted on ``train``, taken on ``test``; a JSON-able dictionary.

    ``svm`` adds the accuracy of ``svm_probe``, which takes minutes.
    """
    (train_images, train_labels), (images, labels) = train, test
    capsules = model.encode(images)
    rng = torch.Generator().manual_seed(seed)
    errors = [(model.decode(c) - x).square().mean((1, 2, 3)) for c, x in zip(capsules.split(250), images.split(250))]
    codes = _encode_many(model, train_images)
    return {
        "train_images": len(train_images),
        "test_images": len(images),
        **winner_measures(capsules, labels),
        **activation_measures(capsules),
        "linear_probe": linear_probe(codes, train_labels, capsules, labels),
        **({"svm_probe": svm_probe(codes, train_labels, capsules, labels)} if svm else {}),
        "reconstruction_mse": torch.cat(errors).mean().item(),
        "autoencoder_mse": _autoencoder_error(model, images),
        "effective_rank": effective_rank(model.encoder.W.detach()),
        "samples": sample_measures(model, train_images[:1000], rng=rng),
        "kmeans_purity": kmeans_purity(train_images, images, labels, seed=seed),
    }


def _encode_many(model: ExpertCapsules, images: Tensor) -> Float[Tensor, "B J d"]:
    """As ``model.encode``, faster on many images: stage 1 in half precision where the hardware has it."""
    return runs.Encoded(model, images).upper


@torch.no_grad()
def _autoencoder_error(model: ExpertCapsules, images: Tensor) -> float:
    """Mean squared error through stage 1 alone: the floor for all three."""
    parts = images.split(250)
    total = sum((model.autoencoder.image(model.autoencoder.features(x)) - x).square().sum() for x in parts)
    return (total / images.numel()).item()
