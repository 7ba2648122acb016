"""Random streams: one root seed, sub-keys by folding in named constants.

No key depends on a slot, a batch or the order of events, so that runs with one seed see the same
prompts, the same order and the same sampling noise whatever else differs between them.
"""

from __future__ import annotations

import hashlib

import jax

Array = jax.Array


def derived_seed(seed: int, *names: object) -> int:
    """32 bits that stand for a named part of a seed, for example ``derived_seed(0, "order", 3)``."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def stream(seed: int, name: str) -> Array:
    """The root key of a named stream, for example ``stream(0, "sample")``."""
    return jax.random.key(derived_seed(seed, name))


def rollout_keys(roots: Array, problems: Array, samples: Array) -> Array:
    """One key per rollout from (stream, problem, sample); ``[B]`` from three ``[B]`` arrays."""

    def one(root: Array, problem: Array, sample: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(root, problem), sample)

    return jax.vmap(one)(roots, problems, samples)


def token_keys(keys: Array, positions: Array) -> Array:
    """The keys of one response position of each rollout, ``[B]`` from two ``[B]`` arrays."""
    return jax.vmap(jax.random.fold_in)(keys, positions)
