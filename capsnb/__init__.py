"""Products of expert capsules, trained with mixing by dynamic routing (Hauser 2019)."""

__version__ = "0.1.0"

from capsnb.capsules import squash, unsquash
from capsnb.energy import energy, eq18_term, firing_probability, free_energy
from capsnb.mixing import mix
from capsnb.pretrained import load_pretrained
from capsnb.routing import route

__all__ = [
    "energy",
    "eq18_term",
    "firing_probability",
    "free_energy",
    "load_pretrained",
    "mix",
    "route",
    "squash",
    "unsquash",
]
