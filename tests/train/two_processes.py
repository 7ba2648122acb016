"""One of two processes: a state that waits on the host and comes back, and words of the first for both.

python -m tests.train.two_processes [break]

With ``break`` the first of them fails where the second waits for it.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.errors import InputError
from opd_jax.model import make_mesh
from opd_jax.processes import end_soon, first_alone, is_first, join, wait_for_all
from opd_jax.train.residency import Pieces, moved


def refuse() -> None:
    raise InputError("no: naïve")


def there_and_back() -> None:
    mesh = make_mesh(fsdp=2)
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    places = {"split": split, "whole": whole, "scalar": whole}
    tree = {"split": np.arange(4.0), "whole": np.arange(3.0), "scalar": jnp.full((), 7)}
    tree = jax.device_put(tree, places)
    for _ in range(2):
        tree = moved(moved(tree, None), None)
        assert all(isinstance(value, Pieces) for value in tree.values())
        tree = moved(tree, places)
    assert {name: value.sharding for name, value in tree.items()} == places
    double = jax.jit(lambda x: jax.tree.map(lambda v: 2 * v, x), in_shardings=(places,), out_shardings=whole)
    print({name: np.asarray(value).tolist() for name, value in double(tree).items()})


if __name__ == "__main__":
    join(False)
    if sys.argv[1:] == ["break"]:
        wait_for_all("begun")
        if is_first():
            end_soon(1)
            raise RuntimeError("broken")
        wait_for_all("never")
    there_and_back()
    print(first_alone(lambda: ["told", is_first()]))
    try:
        first_alone(refuse)
    except InputError as error:
        print(error)
