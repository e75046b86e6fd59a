"""What test_distributed computes in one process and, as a program that torchrun starts, in two."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import torch

from capsnb import data, distributed, runs, squash, training
from capsnb.model import CapsuleDecoder, CapsuleEncoder, ConvAutoencoder
from capsnb.settings import AutoencoderSettings, DecoderSettings, EncoderSettings, Settings, SparsitySettings

I, J, D, E = 13, 5, 7, 3  # noqa: E741
PART, ROWS = 11, 101  # rows of a batch in each of two processes, rows of all
AUTOENCODER = AutoencoderSettings(channels=6, capsule_dim=3, dropout=0.0, epochs=2.0, batch=2 * PART)
ENCODER = EncoderSettings(capsules=J, dim=D, steps=12, batch=2 * PART)
SPARSE = replace(ENCODER, sparsity=SparsitySettings(boost_step=0.05, share_low=0.9, share_high=1.1))
DECODER = DecoderSettings("gradient", steps=12, batch=2 * PART)
WHOLE = Settings("dense", AUTOENCODER, ENCODER, DECODER)


def results(folder: Path) -> dict:
    """Everything that the tests look at, of this process."""
    with patch.object(training, "autocast", lambda *_: nullcontext()):
        return {
            "part": distributed.own_part(torch.arange(2 * PART)),
            "gradients": gradients(),
            "trained": trained(),
            "losses with dropout": dropout_losses(),
            "interrupted": interrupted(folder),
            "runs": whole_runs(folder),
            "messages": messages(folder),
        }


def modules():
    """Every kind of module whose forward is a loss, and the arguments of its training."""
    literal = replace(DECODER, rule="literal")
    return {
        "autoencoder": (lambda: ConvAutoencoder(AUTOENCODER), (images(),)),
        "sparse encoder": (lambda: CapsuleEncoder(I, E, SPARSE), (lower(),)),
        "dense encoder": (lambda: CapsuleEncoder(I, E, ENCODER), (lower(),)),
        "paper's encoder": (lambda: CapsuleEncoder(I, E, replace(ENCODER, over="lower")), (lower(),)),
        "decoder by gradient": (lambda: CapsuleDecoder(I, E, ENCODER, DECODER), (upper(), lower())),
        "decoder by the literal rule": (lambda: CapsuleDecoder(I, E, ENCODER, literal), (upper(), lower())),
    }


def gradients() -> dict:
    """The gradient of every kind of loss, in double precision, from the initial weights of rank 0."""
    found = {}
    for kind, (make, rows) in modules().items():
        torch.manual_seed(distributed.rank())
        module = make().double()
        parallel = distributed.parallel(module)
        parallel(*(distributed.own_part(part[: 2 * PART].double()) for part in rows)).backward()
        found[kind] = {name: parameter.grad for name, parameter in module.named_parameters()}
    return found


def trained() -> dict:
    """The losses and the last state of every kind of training that takes steps."""
    found = {}
    for kind, (make, rows) in modules().items():
        torch.manual_seed(distributed.rank())
        module = make()
        losses = [step.loss for step in steps(module, rows)]
        found[kind] = {"losses": torch.tensor(losses), **module.state_dict()}
    return found


def steps(module, rows, **options):
    train = {
        ConvAutoencoder: training.train_autoencoder,
        CapsuleEncoder: training.train_encoder,
        CapsuleDecoder: training.train_decoder,
    }
    return train[type(module)](module, *rows, **{"seed": 3} | options)


def interrupted(folder: Path) -> dict:
    """The state of a sparse encoder that lost its weights after four steps and went on from what was saved."""
    path = folder / f"checkpoint-{distributed.rank()}"
    with patch.object(training, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0):
        torch.manual_seed(distributed.rank())
        list(islice(steps(CapsuleEncoder(I, E, SPARSE), (lower(),), checkpoint=path), 4))
        module = CapsuleEncoder(I, E, SPARSE)
        rest = [step.step for step in steps(module, (lower(),), checkpoint=path)]
    return {"steps": rest, "saved": path.exists(), **module.state_dict()}


def whole_runs(folder: Path) -> dict:
    """The models of one run at one go and of one stopped between stages, each rank naming a folder of its own."""
    found = {}
    for name, parts in {"at one go": [(1, 2, 3)], "stage by stage": [(1,), (1, 2, 3)]}.items():
        run = runs.Run(WHOLE, "mine", folder / name / str(distributed.rank()), seed=3)
        for stages in parts:
            model = runs.train(run, images(), stages=stages, resume=True)
        found[name] = {**model.state_dict()}
    return found


def dropout_losses() -> list[float]:
    """This process's own loss at every step of an autoencoder with dropout, whose images are all the same."""
    losses, mean = [], distributed.mean
    torch.manual_seed(0)
    module = ConvAutoencoder(replace(AUTOENCODER, dropout=0.5))
    with patch.object(distributed, "mean", lambda loss: losses.append(loss.item()) or mean(loss)):
        list(steps(module, (images()[:1].expand(ROWS, -1, -1, -1),)))
    return losses


def messages(folder: Path) -> dict[str, str]:
    """What the errors say that must stop all processes or none."""
    encoder, rank = CapsuleEncoder(I, E, ENCODER), distributed.rank()
    bad = lower()
    bad[training.batch_rows(ROWS, 2 * PART, 0, 3)[0]] = float("nan")  # the first row of the first batch: rank 0's
    empty, held = (runs.Run(WHOLE, "mine", folder / name / str(rank), seed=3) for name in ("empty", "at one go"))
    causes = {
        "batch": lambda: list(steps(CapsuleEncoder(I, E, replace(ENCODER, batch=17)), (lower(),))),
        "seed": lambda: list(steps(encoder, (lower(),), seed=rank)),
        "rows": lambda: list(steps(encoder, (lower()[rank:],))),
        "stages": lambda: runs.train(empty, images(), stages=(1 + rank,)),
        "loss": lambda: list(steps(CapsuleDecoder(I, E, ENCODER, DECODER), (upper(), bad))),
        "missing stage": lambda: runs.train(empty, images(), stages=(2,)),
        "held folder": lambda: runs.train(held, images()),
        "device": lambda: distributed.processes("meta").__enter__(),
    }
    return {name: message(cause) for name, cause in causes.items()}


def message(cause) -> str:
    try:
        cause()
    except (ValueError, OSError) as error:
        return str(error)
    return "none"


def images():
    return data.load("mnist", "train", sample=True)[0][:ROWS]


def lower():
    return torch.randn(ROWS, I, E, generator=torch.Generator().manual_seed(7))


def upper():
    """Squashed upper capsules, two of them on for every image."""
    capsules = squash(torch.randn(ROWS, J, D, generator=torch.Generator().manual_seed(11)))
    return capsules * (torch.arange(J) < 2)[:, None]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    with distributed.processes("cpu"):
        torch.save(results(out), out / f"rank-{distributed.rank()}.pt")
