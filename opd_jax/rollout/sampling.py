"""Drawing one token from logits: temperature, top-k, nucleus, and the ids that must never come."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def sample_token(
    logits: Array,
    keys: Array,
    *,
    temperature: float,
    top_p: float,
    usable: int,
    top_k: int = 0,
    banned: tuple[int, ...] = (),
) -> tuple[Array, Array]:
    """Draw a token per row, and say how likely it was.

    Args:
      logits: ``[B, V]`` float32, straight from the head.
      keys: ``[B]`` typed PRNG keys, one per row.
      temperature: logits are divided by it; 0 takes the most likely token.
      top_p: smallest nucleus whose mass reaches this is kept, the most likely token always.
      usable: ids from here on are padding of the vocabulary and are never drawn.
      top_k: how many of the likeliest tokens are kept, 0 for all; the nucleus is taken of these.
      banned: ids below ``usable`` that are never drawn either.

    Returns:
      Token ids ``[B]`` int32 and their log-probabilities ``[B]`` under the *raw* distribution at the
      temperature (at 1 for greedy): before truncation, so that training can compare policies.
    """
    raw = jax.nn.log_softmax(logits / (temperature or 1.0), axis=-1)
    drawable = jnp.where(allowed(logits.shape[-1], usable, banned), raw, -jnp.inf)
    if temperature == 0:
        token = jnp.argmax(drawable, axis=-1)
    else:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, drawable.shape[-1:]))(keys)
        token = jnp.argmax(nucleus(likeliest(drawable, top_k), top_p) + noise, axis=-1)
    logprob = jnp.take_along_axis(raw, token[:, None], axis=-1)[:, 0]
    return token.astype(jnp.int32), logprob


def allowed(size: int, usable: int, banned: tuple[int, ...] = ()) -> Array:
    """Which of ``size`` ids may be drawn: those below ``usable`` that are not banned, ``[V]`` bool."""
    below = jnp.arange(size) < usable
    if not banned:
        return below
    return below & ~np.isin(np.arange(size), banned)


def likeliest(logprobs: Array, top_k: int) -> Array:
    """``-inf`` outside the ``top_k`` likeliest tokens, ``[B, V]``; ties with the last of them stay in."""
    if not 0 < top_k < logprobs.shape[-1]:
        return logprobs
    smallest = jax.lax.top_k(logprobs, top_k)[0][..., -1:]
    return jnp.where(logprobs >= smallest, logprobs, -jnp.inf)


def nucleus(logprobs: Array, top_p: float) -> Array:
    """``-inf`` outside the smallest set of likeliest tokens whose mass reaches ``top_p``, ``[B, V]``.

    Mass is that of the tokens that may be drawn at all; ties with the last member stay in.
    """
    if top_p >= 1:
        return logprobs
    mass = jax.nn.softmax(logprobs, axis=-1)
    ordered = jnp.sort(mass, axis=-1, descending=True)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(mass >= smallest, logprobs, -jnp.inf)
