"""The JAX sampler: prefill, then one token a step over a key-value cache.

A fixed number of slots is decoded together in one compiled program. No row sees another, and a row's
random keys come from (seed, problem, sample, position), so a rollout's tokens do not depend on what
shares the slots with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from opd_jax.errors import InputError
from opd_jax.keys import rollout_keys, token_keys
from opd_jax.model.config import Qwen3Config
from opd_jax.model.forward import decode, empty_cache, logits
from opd_jax.model.sharding import constrain, everywhere
from opd_jax.rollout.engine import Generated, Request
from opd_jax.rollout.sampling import sample_token
from opd_jax.types import Params

Array = jax.Array


@struct.dataclass
class _State:
    step: Array  # scalar: response tokens drawn so far
    done: Array  # [B] bool
    logits: Array  # [B, V] of the next token
    cache: Any
    tokens: Array  # [B, R]
    logprobs: Array  # [B, R]
    lengths: Array  # [B]


# (params, prompts [B, P], prompt lengths [B], problems [B], samples [B], data of the root key [2])
#   -> tokens [B, R], logprobs [B, R], response lengths [B], ended [B]
Sampler = Callable[..., tuple[Array, Array, Array, Array]]


@functools.cache  # one program for all who ask for the same
def make_sampler(
    config: Qwen3Config,
    *,
    slots: int,
    max_prompt: int,
    max_response: int,
    temperature: float,
    top_p: float,
    usable: int,
) -> Sampler:
    """Compile-once sampler for ``slots`` rollouts at a time.

    Args:
      config: of the model.
      slots: B.
      max_prompt, max_response: P and R; the cache has P + R slots.
      temperature: 0 for greedy.
      top_p: nucleus mass.
      usable: ids from here on are vocabulary padding and never drawn.
    """

    def run(
        params: Params, prompts: Array, lengths: Array, problems: Array, samples: Array, root: Array
    ) -> _State:
        # Once, not at every step: a layer computes in this dtype anyway.
        params = jax.tree.map(lambda w: w.astype(config.compute_dtype), params)
        # As data, because a typed key remembers the mesh that it was made under, and is another program.
        keys = rollout_keys(jax.random.wrap_key_data(root), problems, samples)
        positions = jnp.broadcast_to(jnp.arange(max_prompt), prompts.shape)
        cache = empty_cache(config, slots, max_prompt + max_response - 1)
        hidden, cache = decode(params, prompts, positions, cache, config)
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        state = _State(
            step=jnp.zeros((), jnp.int32),
            done=lengths == 0,  # a slot without a prompt is empty
            logits=logits(last[:, 0], params, config),
            cache=cache,
            tokens=jnp.zeros((slots, max_response), jnp.int32),
            logprobs=jnp.zeros((slots, max_response), jnp.float32),
            lengths=jnp.zeros(slots, jnp.int32),
        )

        def going(state: _State) -> Array:
            return (state.step < max_response) & ~jnp.all(state.done)

        def step(state: _State) -> _State:
            token, logprob = sample_token(
                state.logits,
                token_keys(keys, state.step),
                temperature=temperature,
                top_p=top_p,
                usable=usable,
            )
            alive = ~state.done
            # A finished row writes at slot 0, which nothing reads any more.
            position = jnp.where(alive, lengths + state.step, 0)
            hidden, cache = decode(params, token[:, None], position[:, None], state.cache, config)
            return _State(
                step=state.step + 1,
                done=state.done | (token == config.eos_token_id),
                logits=constrain(logits(hidden[:, 0], params, config), "batch", "vocab"),
                cache=cache,
                tokens=state.tokens.at[:, state.step].set(jnp.where(alive, token, 0)),
                logprobs=state.logprobs.at[:, state.step].set(jnp.where(alive, logprob, 0.0)),
                lengths=state.lengths + alive,
            )

        return jax.lax.while_loop(going, step, state)

    def outcome(*args: Any) -> tuple[Array, Array, Array, Array]:
        state = run(*args)
        return everywhere((state.tokens, state.logprobs, state.lengths, state.done))

    return jax.jit(outcome)


def sample(
    sampler: Sampler,
    params: Params,
    requests: Sequence[Request],
    root: Array,
    *,
    slots: int,
    max_prompt: int,
) -> Iterator[Generated]:
    """Draw rollouts, ``slots`` at a time, in the order of the requests.

    Args:
      sampler: from `make_sampler`, for the same ``slots`` and ``max_prompt``.
      params: of the model that acts.
      requests: prompts with their random identity.
      root: key of the stream, see `opd_jax.keys.stream`.

    Yields:
      One `Generated` per request.

    Raises:
      InputError: a prompt is empty or longer than ``max_prompt``.
    """
    for request in requests:
        if not 1 <= len(request.prompt_ids) <= max_prompt:
            raise InputError(
                f"a prompt must have 1 to {max_prompt} tokens: one has {len(request.prompt_ids)}; "
                "raise sampling.max_prompt or drop that problem"
            )
    for start in range(0, len(requests), slots):
        chosen = requests[start : start + slots]
        prompts = np.zeros((slots, max_prompt), np.int32)
        lengths, problems, samples = (np.zeros(slots, np.int32) for _ in range(3))
        for slot, request in enumerate(chosen):
            lengths[slot] = len(request.prompt_ids)
            prompts[slot, : lengths[slot]] = request.prompt_ids
            problems[slot], samples[slot] = request.problem, request.sample
        key = np.asarray(jax.random.key_data(root))
        drawn = jax.device_get(sampler(params, prompts, lengths, problems, samples, key))
        for tokens, logprobs, length, done in list(zip(*drawn, strict=True))[: len(chosen)]:
            yield Generated(tokens[:length], logprobs[:length], truncated=not done)
