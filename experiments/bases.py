"""The two kinds of experts that experiments and benchmarks begin from.

Sparse experts are plain here: one view of an image, no conscience, a random start, cosines that count once, and the
mask and the number of updates that go with these. Fewer things can matter than in the preset ``sparse``, and the
preset may change without them.
"""

from dataclasses import replace

from capsnb.settings import PRESETS

_SPARSE = PRESETS["sparse"].encoder
_PLAIN = {"sharpness": 1.0, "views": None, "start": None, "steps": 1500}
BASES = {
    "dense": PRESETS["dense"].encoder,
    "sparse": replace(_SPARSE, **_PLAIN, sparsity=replace(_SPARSE.sparsity, gamma_first=25.0, conscience=0.0)),
}
