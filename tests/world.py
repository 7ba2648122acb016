"""Short chains for tests, named in configs as ``tests.world:...``."""

from opd_jax.lab import chains
from opd_jax.tasks import Problem


def short_train() -> list[Problem]:
    return chains("train", 10, terms=(3, 5))


def short_heldout() -> list[Problem]:
    return chains("heldout", 6, terms=(3, 5))
