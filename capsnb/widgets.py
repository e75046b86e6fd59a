"""Five things to move by hand: explorer, walk, tour, routing, drawing.

Each is one JavaScript module of ``capsnb/web`` that draws what ``shown`` holds and writes ``state``. In a notebook this
module turns one into the other with torch. On a page without a kernel the browser does it (``web/compute.js``),
beginning from the HTML that stands in the same output.
"""

import base64
import functools
import html
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anywidget
import numpy as np
import torch
import traitlets

from capsnb import live, stills
from capsnb.checks import require_choice
from capsnb.evaluation import winner
from capsnb.explorer import require_number
from capsnb.movable import CHOICES, EXPERTS, Model
from capsnb.sampling import one_at_a_time
from capsnb.web_export import manifest

WEB = Path(__file__).parent / "web"


def bundle(kind: str) -> str:
    """The ES module ``kind``.js with every module that it imports, as the one text that a notebook loads."""
    modules = {}

    def add(name: str) -> None:
        source = (WEB / name).read_text("utf-8")
        for _, needed in _IMPORT.findall(source):
            if needed not in modules:
                add(needed)
        names = ", ".join(_EXPORT.findall(source))
        body = _IMPORT.sub(r'const {\1} = modules["\2"];', source).replace("\nexport ", "\n")
        modules[name] = f'modules["{name}"] = (() => {{\n{body}\nreturn {{ {names} }};\n}})();\n'

    add(f"{kind}.js")
    return "const modules = {};\n" + "".join(modules.values()) + f'export default modules["{kind}.js"];\n'


_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w.]+)";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?:const|function\*?) (\w+)", re.MULTILINE)


class Source(NamedTuple):
    """What belongs to one data set: the model, what the browser is told of it, test images, every capsule's face."""

    model: Model
    manifest: dict
    digits: dict[int, dict]
    faces: bytes

    def won(self) -> dict[int, int]:
        """The capsule that fires for each of the test images."""
        codes = torch.tensor([digit["code"] for digit in self.digits.values()])
        return dict(zip(self.digits, winner(codes.view(-1, *self.model.poses.mean.shape)).tolist()))


@functools.cache
def _read(load: Callable[[str], Model], system: str, dataset: str) -> Source:
    """Read once for all widgets of a notebook."""
    model = load(dataset)
    known, poses = manifest(model, dataset, system), one_at_a_time(model.poses.mean[None])[0]
    digits = {digit["number"]: digit for digit in known["digits"]}
    return Source(model, known, digits, live.grey(model.decode(poses)))


class Live(anywidget.AnyWidget):
    """What the widgets share: ``state`` is what the reader chose, ``shown`` what the model makes of it.

    Further arguments begin the state. ``load`` gives another model than the shipped one for the name of a data set.
    Raises ValueError for another data set, and for a state that its model has not.
    """

    kind = ""
    _css = WEB / "style.css"
    state = traitlets.Dict().tag(sync=True)
    shown = traitlets.Dict().tag(sync=True)
    manifest = traitlets.Dict().tag(sync=True)
    faces = traitlets.Bytes().tag(sync=True)

    def __init__(self, dataset: str = "mnist", *, load: Callable[[str], Model] | None = None, **begin):
        self._start({"dataset": dataset}, load, begin)

    def _start(self, named: dict, load: Callable[[str], Model] | None, begin: dict) -> None:
        self._load = load
        source = self._source(named)
        super().__init__(manifest=source.manifest, faces=source.faces)
        self.add_class("capsnb")
        self.state = named | self._begin(source, **begin)

    @traitlets.observe("state")
    def _follow(self, change: dict) -> None:
        source, shown = self._source(self.state), {}
        if self.state.get("start") != "waiting":  # for the model, to choose a pose that it has
            shown = getattr(live, self.kind)(source.model, self.state, source.digits)
        with self.hold_sync():
            self.faces, self.manifest, self.shown = source.faces, source.manifest, shown

    def _source(self, state: dict) -> Source:
        """The model that a state names, and what belongs to it."""
        system, dataset = state.get("system", EXPERTS), state["dataset"]
        require_choice(system, CHOICES, "system")
        require_choice(dataset, CHOICES[system].datasets, "data set")
        return _read(self._load or CHOICES[system].load, system, dataset)

    def _repr_mimebundle_(self, **options) -> tuple[dict, dict]:
        """The widget for a kernel, beside it HTML and a picture for pages: Jupyter and Jupyter Book choose."""
        data, metadata = super()._repr_mimebundle_(**options)
        picture = base64.b64encode(self.still()).decode()
        return data | {"text/html": self.html(), "image/png": picture, "text/plain": type(self).__name__}, metadata

    def still(self) -> bytes:
        """A PNG of what is shown."""
        digits = self._source(self.state).digits
        return stills.png(getattr(stills, self.kind)(self.state, self.shown, digits))

    def html(self) -> str:
        """The widget as it stands, as HTML that needs no kernel: a picture, and what brings it to life on a page."""
        shown = {name: base64.b64encode(content).decode() for name, content in self.shown.items()}
        texts = {"state": json.dumps(self.state), "shown": json.dumps(shown), "alt": self.alt}
        escaped = {name: html.escape(text) for name, text in texts.items()}
        return _HTML.format(kind=self.kind, picture=base64.b64encode(self.still()).decode(), **escaped)


class Explorer(Live):
    """Sliders for the pose of one capsule, and the picture that the model makes of it.  Sabour 2017, fig. 4.

    ``system`` is one of ``capsnb.movable.CHOICES``; a VAE has its latent numbers as the pose of its only capsule.
    """

    kind = "explorer"
    _esm = bundle(kind)
    alt = "The image of one pose of one capsule, and eleven images along one of its numbers."

    def __init__(
        self, dataset: str = "mnist", *, system: str = EXPERTS, load: Callable[[str], Model] | None = None, **begin
    ):
        self._start({"system": system, "dataset": dataset}, load, begin)

    def _begin(self, source: Source, capsule: int | None = None, image: int | None = None) -> dict:
        """The mean pose of a capsule, or the pose of a test image in the capsule that fires for it.

        Without either, the image whose capsule has the lowest number: on a page, its weights arrive first.
        """
        state, mean = {"domain": "complete", "dimension": 0}, source.model.poses.mean
        if capsule is not None:
            require_number(capsule, len(mean), "capsule")
            return state | {"start": "mean", "image": None, "capsule": capsule, "pose": mean[capsule].tolist()}
        won = source.won()
        image = min(won, key=won.get) if image is None else image
        code = torch.tensor(live.digit(source.digits, image)["code"]).view_as(mean)
        return state | {"start": "real", "image": image, "capsule": won[image], "pose": code[won[image]].tolist()}


class Walk(Live):
    """A slider on the straight way between the capsule codes of two real images."""

    kind = "walk"
    _esm = bundle(kind)
    alt = "Two real images, the image in the middle between their codes, and eleven images on the way."

    def _begin(self, source: Source, first: int | None = None, last: int | None = None) -> dict:
        """From one image to another that the same capsule wins, if there is such a pair, of two classes if possible."""
        if first is None or last is None:
            won, label = source.won(), {number: digit["label"] for number, digit in source.digits.items()}
            together = [(a, b) for a, b in itertools.combinations(won, 2) if won[a] == won[b]]
            first, last = max(together or [list(won)[:2]], key=lambda ends: label[ends[0]] != label[ends[1]])
        return {"from": first, "to": last, "share": 0.5}


class Tour(Live):
    """One capsule at its mean pose, each of its numbers moved up and down in turn."""

    kind = "tour"
    _esm = bundle(kind)
    alt = "The image of a capsule's mean pose with one number moved, and eleven images along that number."

    def _begin(self, source: Source, capsule: int = 0) -> dict:
        return {"capsule": capsule, "time": 0.25}


class Routing(Live):
    """Ten rounds of routing by agreement of one real image, to step through."""

    kind = "routing"
    _esm = bundle(kind)
    alt = "A real image, and for each capsule a map of the couplings of the 6 by 6 positions to it."

    def _begin(self, source: Source, image: int | None = None, rounds: int = 3) -> dict:
        image = next(iter(source.digits)) if image is None else image
        state = {"image": image, "rounds": rounds, "over": "upper", "capsule": 0}
        shown = live.routing(source.model, state, source.digits)
        return state | {"capsule": int(np.frombuffer(shown["explanation"], np.float32).argmax())}


class Draw(Live):
    """A drawing area, which capsules explain the drawing, and what they send back."""

    kind = "draw"
    _esm = bundle(kind)
    alt = "A digit, what the model sends back of it, and how well each of the capsules explains it."

    def _begin(self, source: Source, image: int | None = None) -> dict:
        image = next(iter(source.digits)) if image is None else image
        pixels = torch.tensor(live.digit(source.digits, image)["image"]).view(1, 28, 28) / 255
        return {"ink": live.write_ink(pixels), "image": image}


_HTML = """
<div class="capsnb" data-widget="{kind}" data-state="{state}" data-shown="{shown}">
<div class="capsnb-still"><img src="data:image/png;base64,{picture}" alt="{alt}"></div>
<p class="capsnb-note" role="status">A still picture: with JavaScript, or in a notebook, it moves.</p>
</div>
"""
