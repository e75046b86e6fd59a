"""The headline numbers of the default model with three seeds each, beside clusterings of the same images.

    python -m experiments.seeds --out capsnb/results/seeds.json
    python -m experiments.seeds --quick --out FILE      few updates on the shipped sample: only for checks
    python -m experiments.seeds --only mnist-1 --out FILE

"mnist-0" is the model that ships with the book. Another seed is trained as ``python -m capsnb train`` trains it, all
three stages, in the folder runs/seeds/mnist-SEED, where an interrupted training goes on when the command is given
again; its weights are then rounded to 16 bits, as the shipped ones are. Training takes the 60,000 training images of
MNIST, the measures the 10,000 test images.

The JSON holds for every run all that ``python -m capsnb evaluate --svm`` measures; "subspaces_purity", that of
k-subspaces of the run's own lower capsules, with as many clusters as capsules; "principal_probe", the linear probe when
every image keeps its winner, whose pose is replaced by so many principal coordinates of the lower capsules that it
wins; "all_on_probe" and "all_on_svm", the two probes when no capsule is turned off; "random_probe", the linear one of
these with a random W; and under "quality" what ``experiments.sample_quality`` measures of 10,000 samples of the fitted
domain. "summary" holds mean and spread (standard deviation, n - 1) over seeds. The safetensors file beside it holds 40
samples of every run.
"""

import time
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsnb import data, load_pretrained, runs, squash, training
from capsnb.classifier import load_classifier
from capsnb.evaluation import contingency, evaluate, linear_probe, purity, svm_probe, winner
from capsnb.model import ExpertCapsules
from capsnb.sampling import sample_layers
from capsnb.settings import PRESETS, Settings, quick
from capsnb.subspaces import explained_by, k_subspaces, principal_directions
from experiments import results
from experiments.common import as_bytes
from experiments.sample_quality import QUICK_SAMPLES, SAMPLES, SHOWN, Real
from experiments.sample_quality import measure as measure_samples

SEEDS = {f"mnist-{seed}": seed for seed in range(3)}
FOLDER = Path("runs/seeds")
COMPONENTS = 200  # principal directions of the lower capsules in which k-subspaces clusters them, as in stage 2's start
PRINCIPAL = (16, 32)  # coordinates: as many as a pose has, and twice as many
TRIES, SWEEPS = 5, 20  # of k-subspaces: tries as for k-means here, and sweeps after which few images move
HEADLINE = (
    "purity",
    "assignment_accuracy",
    "capsules_in_use",
    "linear_probe",
    "principal_probe_16",
    "principal_probe_32",
    "all_on_probe",
    "random_probe",
    "svm_probe",
    "all_on_svm",
    "reconstruction_mse",
    "kmeans_purity",
    "subspaces_purity",
    "fid",
    "confident",
    "recall",
)

Split = tuple[Tensor, Tensor]  # images and labels


def trained(name: str, images: Tensor, folder: Path, is_quick: bool) -> ExpertCapsules:
    """The model of one run: shipped, or trained in ``folder`` and rounded as the shipped one is."""
    if SEEDS[name] == 0 and not is_quick:
        return load_pretrained("mnist")
    run = runs.Run(settings(is_quick), "mnist", folder / name, SEEDS[name], quick=is_quick)
    return runs.train(run, images, resume=True).half().float()


def settings(is_quick: bool) -> Settings:
    """Those of the default preset."""
    return quick(PRESETS["sparse"]) if is_quick else PRESETS["sparse"]


def lower_capsules(model: ExpertCapsules, images: Tensor) -> Float[Tensor, "N I e"]:
    """Stage 1's capsules before the squash."""
    rows = runs.Encoded(model, images)
    return torch.cat([rows[part] for part in torch.arange(len(images)).split(500)])


def subspaces_purity(
    train: Float[Tensor, "N D"],
    test: Float[Tensor, "M D"],
    truth: Int[Tensor, "M"],
    *,
    clusters: int,
    dim: int,
    seed: int,
) -> float:
    """Purity on ``test`` of k-subspaces (Bradley 2000) fitted to ``train``, the best of 5 starts by what it explains.

    Vectors are reduced to their principal directions and brought to length 1, as for the start of stage 2.
    """
    directions = principal_directions(train[:5000], COMPONENTS)
    points, others = (F.normalize(part @ directions, dim=1).unsqueeze(1) for part in (train, test))
    fitted = k_subspaces(points, clusters=clusters, dim=dim, tries=TRIES, sweeps=SWEEPS, seed=seed)
    return purity(contingency(explained_by(others, fitted.bases).argmax(1), truth, clusters))


def principal_poses(
    train: Float[Tensor, "N D"], test: Float[Tensor, "M D"], won: tuple[Tensor, Tensor], capsules: int, dim: int
) -> list[Float[Tensor, "n J d"]]:
    """Both splits as poses: the direction of an image in the principal subspace of the training images of its winner.

    ``won`` holds the winner of every image of ``train`` and of ``test``. No subspace of that size explains them better.
    """
    poses = [split.new_zeros(len(split), capsules, dim) for split in (train, test)]
    for j in won[0].unique().tolist():
        directions = principal_directions(train[won[0] == j], dim + 8)[:, :dim]
        for pose, split, of in zip(poses, (train, test), won):
            pose[of == j, j] = F.normalize(split[of == j] @ directions, dim=1)
    return poses


def all_poses(W: Float[Tensor, "I J d e"], lower: Float[Tensor, "N D"]) -> Float[Tensor, "N J d"]:
    """The pose that each capsule would have of an image if it were the one that is on and took all couplings."""
    return squash((lower @ W.permute(0, 3, 1, 2).flatten(0, 1).flatten(1)).unflatten(1, W.shape[1:3]))


def headline(measures: dict) -> dict[str, float]:
    """The headline measures among all those of a run."""
    found = measures | measures["quality"]
    return {key: found[key] for key in HEADLINE}


def summary(records: dict[str, dict]) -> dict[str, dict]:
    """Mean and spread of all headline measures over the runs, if there are several."""
    rows = [headline(record["measures"]) for record in records.values()]
    if len(rows) < 2:
        return {}
    values = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in HEADLINE}
    return {key: {"mean": each.mean().item(), "spread": each.std().item()} for key, each in values.items()}


class Results(results.Results):
    """As for every experiment, with a summary that is made anew whenever a run is added."""

    records = "runs"

    def add(self, name: str, record: dict, arrays: dict[str, Tensor]) -> None:
        self.content["summary"] = summary(self.content[self.records] | {name: record})
        super().add(name, record, arrays)


def of_lower_capsules(model: ExpertCapsules, train: Split, test: Split, seed: int) -> dict[str, float]:
    """What stage 1's capsules can say, or all upper ones: the purity of k-subspaces, and probes of other poses."""
    chosen, splits = model.settings.encoder, (train, test)
    z = [lower_capsules(model, images) for images, _ in splits]
    won = tuple(winner(runs.upper_capsules(model.encoder, each)) for each in z)
    lower = [squash(each).flatten(1) for each in z]
    sizes = {"clusters": chosen.capsules, "dim": chosen.dim}
    found = {"subspaces_purity": subspaces_purity(*lower, test[1], **sizes, seed=seed)}
    for dim in PRINCIPAL:
        poses = principal_poses(*lower, won, chosen.capsules, dim)
        found[f"principal_probe_{dim}"] = linear_probe(poses[0], train[1], poses[1], test[1])
    W = model.encoder.W.detach()
    noise = W.std() * torch.randn(W.shape, generator=torch.Generator().manual_seed(seed))
    for name, weights, probe in (
        ("all_on_probe", W, linear_probe),
        ("all_on_svm", W, svm_probe),
        ("random_probe", noise, linear_probe),
    ):
        poses = [all_poses(weights, each) for each in lower]
        found[name] = probe(poses[0], train[1], poses[1], test[1])
    return found


def measure(model: ExpertCapsules, train: Split, test: Split, seed: int, count: int) -> tuple[dict, Tensor]:
    """All measures of a run, those of samples for ``count`` of them, and pictures of its samples."""
    rng = torch.Generator().manual_seed(seed)
    samples = model.decode(sample_layers(count, model.poses, domain="fitted", rng=rng))
    found = evaluate(model, train, test, seed=seed, svm=True)
    with training.seeded(seed, torch.device("cpu")):
        found |= of_lower_capsules(model, train, test, seed)
    found["quality"], _ = measure_samples(samples, Real(train[0], test[0], load_classifier()), rng=rng)
    return found, as_bytes(samples[:SHOWN])


def run(found: Results, names: list[str], folder: Path) -> None:
    """Train, measure and write every run of ``names`` that ``found`` lacks; its seconds are those of measuring."""
    train, test = (data.load("mnist", split, sample=found.quick) for split in ("train", "test"))
    chosen, count = asdict(settings(found.quick)), QUICK_SAMPLES if found.quick else SAMPLES
    for name in names:
        if not found.holds(name, settings=chosen):
            model = trained(name, train[0], folder, found.quick)
            started = time.monotonic()
            measures, pictures = measure(model, train, test, SEEDS[name], count)
            record = {"settings": chosen, "seconds": round(time.monotonic() - started, 1), "measures": measures}
            found.add(name, record, {name: pictures})
        show(name, found.content["runs"][name]["measures"])


def show(name: str, measures: dict) -> None:
    """One line of the table."""
    print(f"{name:10s}{'  '.join(f'{key} {value:.4g}' for key, value in headline(measures).items())}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    found, names = results.command_line(__doc__, list(SEEDS), arguments, Results)
    run(found, names, found.json.with_suffix(".runs") if found.quick else FOLDER)


if __name__ == "__main__":
    main()
