"""The command line: python -m capsnb train | sample | evaluate | export | web."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from capsnb import checkpoints, data, distributed, movable, plots, runs, settings, systems, web_export
from capsnb.checks import require_choice
from capsnb.evaluation import evaluate, single_capsule_images
from capsnb.pretrained import WEIGHTS, load_model, save_model
from capsnb.runs import EXPERT_CAPSULES
from capsnb.sampling import DOMAINS
from capsnb.systems import SYSTEMS

PRESETS = {EXPERT_CAPSULES: settings.PRESETS} | {name: system.presets for name, system in SYSTEMS.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run the command in ``arguments`` (default: the process's); 0 when done, 2 after a message about bad input."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"capsnb: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncapsnb: interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def train(options: argparse.Namespace) -> None:
    """Train the system asked for, of expert capsules the stages asked for."""
    stages = runs.STAGES if options.stage == "all" else (int(options.stage),)
    where = options.dataset, options.out, options.seed, options.device, options.quick
    run = runs.Run(_settings(options), *where, system=options.system)
    with distributed.processes(options.device):
        split = distributed.from_rank_0(lambda: data.load(options.dataset, "train", sample=_sample(options)))
        if options.system == EXPERT_CAPSULES:
            runs.train(run, split[0], stages=stages, resume=options.resume)
            done = f"stage {options.stage} of {_preset(options)}"
        else:
            systems.train(run, *split, resume=options.resume)
            done = f"{options.system} ({_preset(options)})"
        if distributed.rank() == 0:
            print(f"{options.out} holds {done}: {len(split[0])} images of {options.dataset}")


def _preset(options: argparse.Namespace) -> str:
    """The name of the preset asked for, or of the system's first one."""
    presets = PRESETS[options.system]
    if options.preset:
        require_choice(options.preset, presets, f"preset of {options.system}")
    return options.preset or next(iter(presets))


def _settings(options: argparse.Namespace) -> Any:
    """Those of the preset, with the options that change them."""
    chosen = PRESETS[options.system][_preset(options)]
    if options.system != EXPERT_CAPSULES:
        if options.autoencoder or options.stage != "all":
            raise ValueError(f"--stage and --autoencoder are for {EXPERT_CAPSULES}, not for {options.system}")
        return replace(chosen, epochs=systems.QUICK_EPOCHS) if options.quick else chosen
    if options.autoencoder:
        chosen = replace(chosen, autoencoder=replace(chosen.autoencoder, reading=options.autoencoder))
    return settings.quick(chosen) if options.quick else chosen


def sample(options: argparse.Namespace) -> None:
    """Draw a picture in the style of Fig. 2."""
    if options.rows < 1:
        raise ValueError(f"--rows is {options.rows}, expected at least 1")
    path, rng = _weights(options.model), torch.Generator().manual_seed(options.seed)
    if (system := _system(path)) != EXPERT_CAPSULES:
        raise ValueError(f"sample is for {EXPERT_CAPSULES}, not for {system}, which {options.model} holds")
    model = load_model(path)
    images = single_capsule_images(model, options.rows, domain=options.domain, rng=rng)
    figure = plots.show_grid(images, title=f"{options.model}, {options.domain} domain")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=150)
    print(f"{options.out}: {options.rows} uncurated samples of every capsule, {options.domain} domain")


def measure(options: argparse.Namespace) -> None:
    """Print the measures of a model as a table, and write them as JSON."""
    path, facts = _weights(options.model), {"model": options.model, "dataset": options.dataset, "seed": options.seed}
    if (system := _system(path)) != EXPERT_CAPSULES and options.svm:
        raise ValueError(f"--svm is for {EXPERT_CAPSULES}, not for {system}")
    splits = [data.load(options.dataset, split, sample=_sample(options)) for split in ("train", "test")]
    if system == EXPERT_CAPSULES:
        measures = evaluate(load_model(path), *splits, seed=options.seed, svm=options.svm)
    else:
        measures = systems.measure(path, *splits, rng=torch.Generator().manual_seed(options.seed))
    _print(measures)
    if options.out:
        checkpoints.write_json(options.out, facts | {"versions": runs.versions(), "measures": measures})


def _print(measures: dict) -> None:
    for name, value in measures.items():
        if not isinstance(value, (list, dict)):
            print(f"{name:28s} {value if isinstance(value, int) else f'{value:.4g}'}")
    for domain, values in measures.get("samples", {}).items():
        print(f"{domain + ' domain':28s} " + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))


def export(options: argparse.Namespace) -> None:
    """Write a trained run's model in half precision, as the shipped weights are."""
    path = options.run / systems.MODEL
    if (system := _system(path)) != EXPERT_CAPSULES:
        if options.share_autoencoder:
            raise ValueError(f"--share-autoencoder is for {EXPERT_CAPSULES}, not for {system}")
        print(f"writing {options.out}, and measuring it on the test images", file=sys.stderr)
        _print(systems.export(options.run, options.out)["test"])
        return
    _, facts = checkpoints.read(path)
    kept = {name: facts[name] for name in ("dataset", "seed", "quick", "images", "versions")}
    save_model(load_model(path), options.out, dtype=torch.float16, autoencoder=options.share_autoencoder, **kept)
    checkpoints.write_json(
        options.out.with_suffix(".metrics.json"), checkpoints.read_json(options.run / "metrics.json")
    )


def web(options: argparse.Namespace) -> None:
    """Write what the website's widgets read: the models that can be moved, as small files for the browser."""
    for name, system, dataset in movable.models():
        web_export.write(movable.CHOICES[system].load(dataset), dataset, options.out, system=system)
        sizes = {path.name: path.stat().st_size for path in sorted(options.out.glob(f"{name}.*"))}
        print("  ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items()))


def _weights(name: str) -> Path:
    """The file of a shipped model of that name, or the file so called."""
    shipped = WEIGHTS / f"{name}.safetensors"
    return shipped if shipped.parent == WEIGHTS and shipped.exists() else Path(name)


def _system(path: Path) -> str:
    return systems.system_of(checkpoints.read_facts(path))


def _sample(options: argparse.Namespace) -> bool | None:
    """Quick runs take the shipped sample where there is one."""
    return True if options.quick and data.has_sample(options.dataset) else None


def _device(name: str) -> str:
    """``name``, under torchrun with the GPU's number, if tensors can be made there."""
    name = distributed.own_device(name)
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here ({reason}); try cpu") from error
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m capsnb", description=__doc__)
    commands = parser.add_subparsers(required=True)
    _add_train(commands.add_parser("train", help="train expert capsules, stage by stage, or another system"))
    _add_sample(commands.add_parser("sample", help="a picture in the style of Fig. 2"))
    _add_evaluate(commands.add_parser("evaluate", help="a table of measures, as text and JSON"))
    _add_export(commands.add_parser("export", help="a trained run as a half-precision weight file"))
    _add_web(commands.add_parser("web", help="what can be moved, small, for the widgets of the website"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=train)
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _list_of_systems()
    parser.add_argument("--dataset", required=True, help="mnist, fashion-mnist, kmnist or a folder of four IDX files")
    parser.add_argument("--system", choices=PRESETS, default=EXPERT_CAPSULES, help="what to train: see below")
    names = list(dict.fromkeys(name for presets in PRESETS.values() for name in presets))
    parser.add_argument("--preset", choices=names, help="default: the first that stands beside the system below")
    parser.add_argument("--autoencoder", choices=("centred", "bias-free"), help="reading of stage 1")
    parser.add_argument("--stage", choices=("1", "2", "3", "all"), default="all", help=f"of {EXPERT_CAPSULES}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoints")
    parser.add_argument("--quick", action="store_true", help="a few updates on the shipped sample: for checks only")
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)


def _list_of_systems() -> str:
    """One line a system: what it is, how long it takes, and its presets."""
    about = {EXPERT_CAPSULES: "the model of the book, in three stages"}
    about |= {name: system.about for name, system in SYSTEMS.items()}
    lines = [f"  {name:16} {text}\n{'':18} presets: {', '.join(PRESETS[name])}" for name, text in about.items()]
    return "\n".join(["systems:", *lines])


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=sample)
    parser.add_argument("--model", default="mnist", help="a shipped model's name, or a weight file")
    parser.add_argument("--domain", choices=DOMAINS, default="complete")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--seed", type=int, default=0)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=measure)
    parser.add_argument("--model", default="mnist", help="a shipped model's name, or a weight file")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--svm", action="store_true", help="also a support vector machine on the poses: takes minutes")
    parser.add_argument("--quick", action="store_true", help="measure on the shipped sample: for checks only")
    parser.add_argument("--seed", type=int, default=0)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=export)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="weight file to write")
    parser.add_argument("--share-autoencoder", metavar="FILE", help="weight file beside it that holds the same stage 1")


def _add_web(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=web)
    parser.add_argument("--out", type=Path, default=Path("book/_static/weights"), help="folder to write to")


if __name__ == "__main__":
    sys.exit(main())
