"""The headline numbers of the default model with three seeds each, beside clusterings of the same images.

    python -m experiments.seeds --out capsnb/results/seeds.json
    python -m experiments.seeds --quick --out FILE      few updates on the shipped sample: only for checks
    python -m experiments.seeds --only mnist-1 --out FILE

"DATASET-0" is the model that ships with the book. Another seed is trained as ``python -m capsnb train`` trains it, all
three stages, in the folder runs/seeds/DATASET-SEED, where an interrupted training goes on when the command is given
again; its weights are then rounded to 16 bits, as the shipped ones are. Training takes the 60,000 training images, the
measures the 10,000 test images.

The JSON holds for every run all that ``python -m capsnb evaluate`` measures (for MNIST the support vector machine too);
"subspaces_purity", that of k-subspaces of the run's own lower capsules, with as many clusters as capsules;
"principal_probe", the linear probe when every image keeps its winner, whose pose is replaced by so many principal
coordinates of the lower capsules that it wins; and for MNIST under "quality" what ``experiments.sample_quality``
measures of 10,000 samples of the fitted domain. "summary" holds mean and spread (standard deviation, n - 1) over seeds.
The safetensors file beside it holds 40 samples of every run.
"""

import time
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsnb import data, load_pretrained, runs, squash
from capsnb.classifier import load_classifier
from capsnb.evaluation import contingency, evaluate, linear_probe, purity, winner
from capsnb.model import ExpertCapsules
from capsnb.sampling import sample_layers
from capsnb.settings import PRESETS, quick
from capsnb.subspaces import explained_by, k_subspaces, principal_directions
from experiments import results
from experiments.common import as_bytes
from experiments.sample_quality import QUICK_SAMPLES, SAMPLES, SHOWN, Real
from experiments.sample_quality import measure as measure_samples

SEEDS, DATASETS = 3, ("mnist", "fashion-mnist")
NAMES = [f"{dataset}-{seed}" for dataset in DATASETS for seed in range(SEEDS)]
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
    "svm_probe",
    "reconstruction_mse",
    "kmeans_purity",
    "subspaces_purity",
    "fid",
    "confident",
    "recall",
)


Split = tuple[Tensor, Tensor]  # images and labels


def trained(dataset: str, seed: int, images: Tensor, folder: Path, is_quick: bool) -> ExpertCapsules:
    """The model of one run: shipped, or trained in ``folder`` and rounded as the shipped ones are."""
    if seed == 0 and not is_quick:
        return load_pretrained(dataset)
    chosen = quick(PRESETS["sparse"]) if is_quick else PRESETS["sparse"]
    run = runs.Run(chosen, dataset, folder / f"{dataset}-{seed}", seed, quick=is_quick)
    return runs.train(run, images, resume=True).half().float()


def lower_capsules(model: ExpertCapsules, images: Tensor) -> Float[Tensor, "N D"]:
    """Stage 1's capsules after the squash, every image one vector."""
    rows = runs.Encoded(model, images)
    return torch.cat([squash(rows[part]).flatten(1) for part in torch.arange(len(images)).split(500)])


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


def headline(measures: dict) -> dict[str, float]:
    """The headline measures among all those of a run, which lacks some where the data set is not MNIST."""
    found = measures | measures.get("quality", {})
    return {key: found[key] for key in HEADLINE if key in found}


def summary(records: dict[str, dict]) -> dict[str, dict]:
    """Mean and spread over the seeds of every data set that has more than one, for all headline measures."""
    found = {}
    for dataset in DATASETS:
        rows = [headline(record["measures"]) for name, record in records.items() if name.rpartition("-")[0] == dataset]
        if len(rows) > 1:
            values = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in rows[0]}
            found[dataset] = {key: {"mean": v.mean().item(), "spread": v.std().item()} for key, v in values.items()}
    return found


class Results(results.Results):
    """As for every experiment, with a summary that is made anew whenever a run is added."""

    records = "runs"

    def add(self, name: str, record: dict, arrays: dict[str, Tensor]) -> None:
        self.content["summary"] = summary(self.content[self.records] | {name: record})
        super().add(name, record, arrays)


def of_lower_capsules(model: ExpertCapsules, train: Split, test: Split, seed: int) -> dict[str, float]:
    """What can be said of images by stage 1's capsules: the purity of k-subspaces, and the principal probes."""
    settings, splits = model.settings.encoder, (train, test)
    lower = [lower_capsules(model, images) for images, _ in splits]
    sizes = {"clusters": settings.capsules, "dim": settings.dim}
    found = {"subspaces_purity": subspaces_purity(*lower, test[1], **sizes, seed=seed)}
    won = tuple(winner(runs.Encoded(model, images).upper) for images, _ in splits)
    for dim in PRINCIPAL:
        poses = principal_poses(*lower, won, settings.capsules, dim)
        found[f"principal_probe_{dim}"] = linear_probe(poses[0], train[1], poses[1], test[1])
    return found


def measure(model: ExpertCapsules, dataset: str, seed: int, is_quick: bool) -> tuple[dict, Tensor]:
    """All measures of a run, and pictures of its samples."""
    train, test = (data.load(dataset, split, sample=is_quick) for split in ("train", "test"))
    rng = torch.Generator().manual_seed(seed)
    samples = model.decode(sample_layers(QUICK_SAMPLES if is_quick else SAMPLES, model.poses, domain="fitted", rng=rng))
    found = evaluate(model, train, test, seed=seed, svm=dataset == "mnist")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found |= of_lower_capsules(model, train, test, seed)
    if dataset == "mnist":  # the features are a digit classifier's
        found["quality"] = measure_samples(samples, Real(train[0], test[0], load_classifier()), rng=rng)[0]
    return found, as_bytes(samples[:SHOWN])


def run(found: Results, names: list[str], folder: Path) -> None:
    """Train, measure and write every run of ``names`` that ``found`` lacks; its seconds are those of measuring."""
    settings = asdict(quick(PRESETS["sparse"]) if found.quick else PRESETS["sparse"])
    for name in names:
        dataset, _, seed = name.rpartition("-")
        if not found.holds(name, settings=settings):
            images, _ = data.load(dataset, "train", sample=found.quick)
            model = trained(dataset, int(seed), images, folder, found.quick)
            started = time.monotonic()
            measures, pictures = measure(model, dataset, int(seed), found.quick)
            record = {"settings": settings, "seconds": round(time.monotonic() - started, 1), "measures": measures}
            found.add(name, record, {name: pictures})
        show(name, found.content["runs"][name]["measures"])


def show(name: str, measures: dict) -> None:
    """One line of the table."""
    print(f"{name:16s}{'  '.join(f'{key} {value:.4g}' for key, value in headline(measures).items())}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    found, names = results.command_line(__doc__, NAMES, arguments, Results)
    run(found, names, found.json.with_suffix(".runs") if found.quick else FOLDER)


if __name__ == "__main__":
    main()
