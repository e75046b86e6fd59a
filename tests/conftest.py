"""What several test files use."""

import gzip
from dataclasses import replace

import jaxtyping
import matplotlib
import pretend
import pytest
import torch
from make_samples import idx
from threadpoolctl import threadpool_limits

from capsnb import data, settings
from capsnb.baselines.capsnet import CapsNet, CapsNetSettings
from capsnb.baselines.sparse_capsules import SparseCapsules, SparseCapsulesSettings
from capsnb.baselines.vae import VAE, VAESettings
from capsnb.model import ExpertCapsules
from capsnb.movable import movable_network, movable_vae

matplotlib.use("Agg")


@pytest.fixture
def rng():
    """Every test draws the same numbers, whatever ran before."""
    return torch.Generator().manual_seed(17)


@pytest.fixture
def double(rng):
    """Normal numbers of a shape, in float64."""
    return lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)


@pytest.fixture(params=["cuda", pretend.NAME])
def accelerator(request, monkeypatch):
    """The name of a device that is not the processor: a GPU where there is one, and one that the processor plays."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield "cuda"
        return
    if not pretend.available:
        pytest.skip("this torch cannot be given a device by python")
    monkeypatch.setattr(torch, "Generator", pretend.Generator)
    with pretend.Pretending():
        yield pretend.NAME


@pytest.fixture
def as_users_run(monkeypatch):
    """Without the run-time checks of annotations, which tests have and users do not."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def small_settings():
    """A preset by its name, for a model of 72 lower capsules of 3 and 5 upper ones of 7, trained for a few updates."""

    def shrink(preset="sparse"):
        chosen = settings.PRESETS[preset]
        return replace(
            chosen,
            autoencoder=replace(chosen.autoencoder, channels=6, capsule_dim=3, epochs=2.0, batch=31),
            encoder=replace(chosen.encoder, capsules=5, dim=7, steps=5, batch=31),
            decoder=replace(chosen.decoder, steps=5, batch=31),
        )

    return shrink


@pytest.fixture
def small_model(small_settings):
    """An untrained small model in evaluation mode, with biases, an origin and poses that are not zero."""
    torch.manual_seed(23)
    model = ExpertCapsules(small_settings()).eval()
    with torch.no_grad():
        for bias in model.autoencoder.biases:
            bias.normal_(std=0.1)
    model.autoencoder.centre()
    model.poses.fit(model.encode(data.load("mnist", "train", sample=True)[0][:101]))
    return model


@pytest.fixture(scope="session")
def small_networks():
    """Small untrained networks, CapsNet and sparse capsules, each beside what the explorer moves of it."""
    torch.manual_seed(29)
    sizes = {"channels": 3, "types": 2, "primary_dim": 3, "dim": 5, "first_hidden": 12, "second_hidden": 20}
    networks = {
        "capsnet": CapsNet(CapsNetSettings(**sizes, initial_deviation=3.0)),
        "sparse-capsules": SparseCapsules(SparseCapsulesSettings(**sizes, capsules=7, initial_deviation=3.0)),
    }
    for network in networks.values():
        for layer in (1, 3, 5):
            network.decoder[layer].weight.data.mul_(4)  # or all pictures would be grey
    return {name: (network.eval(), movable_network(network, "mnist")) for name, network in networks.items()}


@pytest.fixture(scope="session")
def small_vae():
    """An untrained small VAE, beside what the explorer moves of it."""
    torch.manual_seed(31)
    vae = VAE(VAESettings(latent=3, channels=5)).eval()
    return vae, movable_vae(vae, "mnist")


@pytest.fixture(scope="session")
def digits():
    """The shipped MNIST training images and labels."""
    return data.load("mnist", "train", sample=True)


@pytest.fixture(scope="session")
def write_folder():
    """Write the four IDX files of images and labels given as bytes by split, gzipped if ``packed``."""

    def write(folder, splits, *, packed=False):
        folder.mkdir(parents=True, exist_ok=True)
        for split, (images, labels) in splits.items():
            for name, content in (("images-idx3", images), ("labels-idx1", labels)):
                path = folder / f"{'train' if split == 'train' else 't10k'}-{name}-ubyte{'.gz' if packed else ''}"
                path.write_bytes(gzip.compress(idx(content)) if packed else idx(content))
        return folder

    return write


@pytest.fixture(scope="session")
def folder(write_folder, tmp_path_factory):
    """A data set of one's own: 101 real training and 103 test images."""
    splits = {}
    for split, count in (("train", 101), ("test", 103)):
        images, labels = data.load("mnist", split, sample=True)
        splits[split] = (images[:count, 0] * 255).round().to(torch.uint8), labels[:count].to(torch.uint8)
    return write_folder(tmp_path_factory.mktemp("data") / "mine", splits)


@pytest.fixture(scope="module")
def one_thread():
    """For the linear probe: on few images and a busy machine, several threads wait for each other and little else."""
    with threadpool_limits(1, "blas"):
        yield


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the files that an experiment's test calls ``finished``, to go on with."""
    for path in finished.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / finished.name
