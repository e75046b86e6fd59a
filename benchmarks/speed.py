"""How fast and how lean capsnb is on this machine, beside the same work written over stored votes.

    python -m benchmarks.speed --out capsnb/results/speed.json      about three minutes
    python -m benchmarks.speed --run runs/mnist ...                 adds what the training run in that folder took
    python -m benchmarks.speed --quick                              tiny sizes, only to see that it works

Prints a table and writes JSON. What is compared runs in turn, so that a busy moment slows all alike; times are medians,
and a ratio is one of medians. Peak memory is what a fresh process needs beyond its inputs (Linux and CUDA only).
"""

import argparse
import copy
import math
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import votes
from capsnb import checkpoints, load_pretrained, route, runs, squash
from capsnb.model import CapsuleEncoder
from capsnb.routing import without_votes
from experiments.bases import BASES

ROUTING = {"the paper's": (64, 576, 20), "ten times the lower": (64, 5760, 20), "ten times the upper": (64, 576, 200)}
QUICK_ROUTING = {"tiny": (3, 12, 5)}
LOWER_DIM, UPPER_DIM = 8, 16


def compare(works: dict[str, Callable], device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of every work; they take turns."""
    times = {name: [] for name in works}
    for repeat in range(repeats + 2):
        for name, work in works.items():
            started = _now(device)
            work()
            if repeat >= 2:  # the first two fill caches and memory pools
                times[name].append(1e3 * (_now(device) - started))
    return {name: statistics.median(each) for name, each in times.items()}


def _now(device: str) -> float:
    if _is_cuda(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def layer(images: int, lower: int, upper: int, device: str) -> tuple[Tensor, Tensor]:
    """Random lower capsules and weights of the sizes of the book's dimensions."""
    rng = torch.Generator().manual_seed(0)
    x = squash(torch.randn(images, lower, LOWER_DIM, generator=rng))
    return x.to(device), 0.1 * torch.randn(lower, upper, UPPER_DIM, LOWER_DIM, generator=rng).to(device)


ROUTES = {"votes": votes.route, "capsnb": route}


def routing(shapes: dict[str, tuple[int, int, int]], device: str, repeats: int) -> list[dict]:
    """Three rounds of routing at every shape."""
    rows = []
    for name, shape in shapes.items():
        x, W = layer(*shape, device)
        ms = compare({way: lambda way=way: ROUTES[way](x, W) for way in ROUTES}, device, repeats)
        peak = {way: alone(peak_of_routing, way, shape, device) for way in ROUTES}
        rows.append({"name": name, "shape": shape, "ms": ms, "peak_mb": peak})
    return rows


def peak_of_routing(way: str, shape: tuple[int, int, int], device: str) -> float | None:
    """Megabytes that one routing needs at its peak."""
    ROUTES[way](*layer(1, 2, 3, device))
    x, W = layer(*shape, device)
    return peak(lambda: ROUTES[way](x, W), device)


def alone(function: Callable, *arguments):
    """What ``function`` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak(work: Callable, device: str) -> float | None:
    """Megabytes of memory that ``work`` needs at its peak beyond what is in use; None where it cannot be read."""
    if _is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        return None
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{field}:"))


def updates(images: int, lower: int, device: str, repeats: int) -> list[dict]:
    """One update's loss and gradient in stage 2, without the optimiser, which is the same; sparse means plain here."""
    rows = []
    for name in ("sparse", "dense"):
        torch.manual_seed(0)
        ours = CapsuleEncoder(lower, LOWER_DIM, BASES[name]).to(device).train()
        theirs, (x, _) = copy.deepcopy(ours), layer(images, lower, 1, device)
        works = {
            "votes": lambda: votes.stage2_loss(x, theirs.W, theirs.sparsity).backward(),
            "capsnb": lambda: ours(x).backward(),
        }
        rows.append({"name": name, "images": images, "ms": compare(works, device, repeats)})
    return rows


def inference(batches: tuple[int, ...], device: str, repeats: int) -> list[dict]:
    """Images encoded and decoded per second by the default MNIST model."""
    model, rows = load_pretrained("mnist").to(device), []
    for batch in batches:
        images = torch.rand(batch, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(device)
        capsules = model.encode(images)
        works = {"encode": lambda: model.encode(images), "decode": lambda: model.decode(capsules)}
        per_second = {name: 1e3 * batch / ms for name, ms in compare(works, device, repeats).items()}
        rows.append({"batch": batch, "images_per_second": per_second})
    return rows


def machine(device: str, quick: bool) -> dict:
    """What was measured on, the rates of arithmetic and memory that bound everything, and the price of new memory."""
    side, length = (256, 2**16) if quick else (4096, 2**27)
    a, b, target = torch.rand(side, side).to(device), torch.rand(length).to(device), torch.empty(length, device=device)
    stored = math.prod(next(iter(_shapes(quick).values()))) * UPPER_DIM  # votes of the first shape
    kept = torch.zeros(stored, device=device)
    works = {"product": lambda: a @ a, "copy": lambda: target.copy_(b)}
    works |= {"new": lambda: torch.empty(stored, device=device).fill_(1), "kept": lambda: kept.fill_(1)}
    ms = compare(works, device, 9)
    x, W = layer(1, 2, 3, device)
    return {
        "processor": torch.cuda.get_device_name(device) if _is_cuda(device) else _processor(),
        "threads": torch.get_num_threads(),
        "versions": runs.versions(),
        "compiled": without_votes(x.device).can_route(x, W, rounds=3),
        "gflops": 2 * side**3 / ms["product"] / 1e6,
        "gigabytes_per_second": 2 * 4 * length / ms["copy"] / 1e6,
        "fill_ms": {"megabytes": 4 * stored / 1e6, "new": ms["new"], "kept": ms["kept"]},
    }


def _shapes(quick: bool) -> dict[str, tuple[int, int, int]]:
    return QUICK_ROUTING if quick else ROUTING


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def training(folder: Path) -> dict:
    """Seconds and peak memory of every stage of the finished run in ``folder``, and how good its model is.

    The folder's evaluation.json is what ``python -m capsnb evaluate --out`` wrote there for that model.
    """
    metrics, evaluation = (checkpoints.read_json(folder / f"{name}.json") for name in ("metrics", "evaluation"))
    stages = {
        stage: {name: record[name] for name in ("seconds", "peak_memory_mb")}
        for stage, record in metrics["stages"].items()
    }
    quality = {name: evaluation["measures"][name] for name in ("purity", "linear_probe", "reconstruction_mse")}
    facts = {"dataset": metrics["dataset"], "preset": metrics["settings"]["preset"]}
    return {**facts, "images": metrics["images"], "stages": stages, "measures": quality}


def measure(device: str, quick: bool) -> dict:
    """All measurements; ``quick`` makes them worthless as such."""
    repeats = 2 if quick else 15
    return {
        "quick": quick,
        "machine": machine(device, quick),
        "routing": routing(_shapes(quick), device, repeats),
        "updates": updates(*((5, 12) if quick else (128, 576)), device, repeats),
        "inference": inference((1, 3) if quick else (1, 1024), device, repeats),
    }


def show(result: dict) -> None:
    """Print ``result`` as tables."""
    facts = result["machine"]
    print(f"{facts['processor']}, {facts['threads']} threads, torch {facts['versions']['torch']}", end="")
    print(f": {facts['gflops']:.0f} GFLOP/s, {facts['gigabytes_per_second']:.0f} GB/s")
    for row in result["routing"] + result["updates"]:
        ours, theirs = row["ms"]["capsnb"], row["ms"]["votes"]
        what = f"route, {row['name']} sizes" if "shape" in row else f"update, {row['name']}"
        print(f"{what:28s} {theirs:9.1f} ms -> {ours:8.1f} ms  {theirs / ours:5.1f} times", end="")
        memory = row.get("peak_mb", {})
        print(f"  {memory['votes']:7.1f} MB -> {memory['capsnb']:6.1f} MB" if memory.get("capsnb") else "")
    for row in result["inference"]:
        rates = "  ".join(f"{name} {rate:,.0f}" for name, rate in row["images_per_second"].items())
        print(f"{'images a second, batch ' + str(row['batch']):28s} {rates}")
    for stage, record in result.get("training", {}).get("stages", {}).items():
        so_far = f"{record['seconds']:9.1f} s  peak memory so far {record['peak_memory_mb']} MB"
        print(f"{'training, stage ' + stage:28s} {so_far}")
    print("  ".join(f"{name} {value:.4f}" for name, value in result.get("training", {}).get("measures", {}).items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: for checks only")
    parser.add_argument("--run", type=Path, help="folder of a finished training run with its evaluation.json")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    result = measure(options.device, options.quick)
    if options.run:
        result["training"] = training(options.run)
    show(result)
    if options.out:
        checkpoints.write_json(options.out, result)


if __name__ == "__main__":
    main()
