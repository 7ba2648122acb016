"""The sampler's device programs: slots that are filled with prompts, and advanced a token a step.

Three programs of fixed shapes make a sampler. `begin` lays out empty slots, `fill` reads a group of
prompts into free ones, `advance` draws a token a step in all of them until enough are free again. Slots
are at different positions, and none sees another: a row's keys come from its own identity and position.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.keys import rollout_keys, token_keys
from opd_jax.model.attention import Blocks
from opd_jax.model.config import Qwen3Config
from opd_jax.model.forward import Cache, decode, empty_cache, logits, prompt_cache
from opd_jax.model.kernels import FUSED
from opd_jax.model.sharding import can_split, constrain, everywhere, in_mesh, partition, ways_of
from opd_jax.rollout.sampling import sample_token
from opd_jax.types import Params

Array = jax.Array


@struct.dataclass
class Group:
    """Prompts to be read into slots; every shard of the batch has the same share of them."""

    prompts: Any  # [F, P] int32, padded on the right
    slots: Any  # [F] int32: which slot of its shard; one beyond them all for a prompt that is none
    lengths: Any  # [F] int32: tokens of the prompt
    limits: Any  # [F] int32: most tokens of the response
    problems: Any  # [F] int32
    samples: Any  # [F] int32
    roots: Any  # [F, 2] uint32: data of the root key. A typed key remembers the mesh it was made under


@struct.dataclass
class Rows:
    """What a slot is at."""

    key: Any  # [B, 2] uint32: data of the rollout's key
    token: Any  # [B] int32: that is read next: at first the prompt's last
    position: Any  # [B] int32: of that token
    drawn: Any  # [B] int32: response tokens so far
    limit: Any  # [B] int32
    done: Any  # [B] bool: ended, at its limit, or empty


@struct.dataclass
class State:
    """All slots."""

    rows: Rows
    cache: Cache  # slot s of a row holds that row's position s; the prompt's last is written when drawing
    tokens: Any  # [B, R] int32
    logprobs: Any  # [B, R] float32


@struct.dataclass
class Progress:
    """What the host is told after some steps; whole on every device."""

    done: Any  # [B] bool
    drawn: Any  # [B] int32
    tokens: Any  # [B, R] int32
    logprobs: Any  # [B, R] float32


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler's programs, and what they were made for."""

    slots: int  # B
    max_prompt: int  # P
    max_response: int  # R
    temperature: float
    stop_ids: tuple[int, ...]  # ids that end a response
    cache_slots: int
    block: int  # of these are attended over together, where there are more
    begin: Callable[[], State]
    fill: Callable[[Params, State, Group], State]
    # (params, state, rows [B] that are empty, most steps, rows that are done or empty to stop sooner,
    # what of the cache is attended over, static)
    advance: Callable[[Params, State, Any, Any, Any, Blocks | None], tuple[State, Progress]]

    @property
    def refill(self) -> int:
        """Free slots that are waited for before prompts are read again."""
        return max(1, self.slots // 8)

    @property
    def ways(self) -> int:
        """How many shards the mesh in context splits the slots into."""
        return ways_of(self.slots)

    @property
    def group(self) -> int:
        """F: prompts read at a time, as many in each shard."""
        return self.ways * max(1, self.refill // self.ways)

    def blocks(self, end: int) -> Blocks | None:
        """What `advance` attends over while every position is below ``end``."""
        return _covering(self.cache_slots, self.block, end)


@functools.cache  # one set of programs for all who ask for the same
def make_sampler(
    config: Qwen3Config,
    *,
    slots: int,
    max_prompt: int,
    max_response: int,
    temperature: float,
    top_p: float,
    usable: int,
    top_k: int = 0,
    stop_ids: tuple[int, ...] | None = None,
    banned: tuple[int, ...] = (),
    block: int = 1024,
) -> Sampler:
    """Compile-once sampler that decodes ``slots`` rollouts together.

    Args:
      config: of the model.
      slots: B.
      max_prompt, max_response: P and R; the cache has P + R - 1 slots, since the last token is never read,
        or the next multiple of ``block`` above it.
      temperature: 0 for greedy.
      top_p: nucleus mass.
      usable: ids from here on are vocabulary padding and never drawn.
      top_k: how many of the likeliest tokens may be drawn, 0 for all.
      stop_ids: ids that end a response and are its last token; the config's end of text by default.
      banned: ids that are never drawn: holes of the vocabulary, special tokens.
      block: a cache of more slots is attended over in blocks of so many, as far as it is filled.
    """
    cache_slots = max_prompt + max_response - 1
    if cache_slots > block:
        cache_slots += -cache_slots % block
    stops = (config.eos_token_id,) if stop_ids is None else tuple(sorted(set(stop_ids)))

    def begin() -> State:
        def zeros(dtype: Any, *last: int) -> Array:
            return jnp.zeros((slots, *last), dtype)

        empty = Rows(
            key=zeros(jnp.uint32, 2),
            token=zeros(jnp.int32),
            position=zeros(jnp.int32),
            drawn=zeros(jnp.int32),
            limit=zeros(jnp.int32),
            done=jnp.ones(slots, bool),
        )
        cache = empty_cache(config, slots, cache_slots)
        tokens, logprobs = zeros(jnp.int32, max_response), zeros(jnp.float32, max_response)
        return _pinned(State(empty, cache, tokens, logprobs))

    def fill(params: Params, state: State, group: Group) -> State:
        params = _computed(params, config)
        cache = _read_prompts(params, group, config, cache_slots, _covering(cache_slots, block, max_prompt))
        roots, last = jax.random.wrap_key_data(group.roots), group.lengths[:, None] - 1
        rows = Rows(
            key=jax.random.key_data(rollout_keys(roots, group.problems, group.samples)),
            # Read once more when the first token is drawn, so that one program has all of the head's work.
            token=jnp.take_along_axis(group.prompts, jnp.maximum(last, 0), axis=1)[:, 0],
            position=group.lengths - 1,
            drawn=jnp.zeros_like(group.lengths),
            limit=group.limits,
            done=jnp.zeros(group.lengths.shape, bool),
        )
        return _pinned(_placed(state, rows, cache, group.slots))

    def advance(
        params: Params, state: State, empty: Array, steps: Array, wanted: Array, blocks: Blocks | None
    ) -> tuple[State, Progress]:
        params = _computed(params, config)
        keys = jax.random.wrap_key_data(state.rows.key)
        rows = dataclasses.replace(state.rows, done=state.rows.done | empty)
        state = dataclasses.replace(state, rows=rows)

        def going(carry: tuple[Array, State]) -> Array:
            step, state = carry
            return (step < steps) & (jnp.sum(state.rows.done) < wanted)

        def one(carry: tuple[Array, State]) -> tuple[Array, State]:
            step, state = carry
            rows = state.rows
            at = rows.token[:, None], rows.position[:, None]
            hidden, cache = decode(params, *at, state.cache, config, blocks)
            token, logprob = sample_token(
                constrain(logits(hidden[:, 0], params, config), "batch", "vocab"),
                token_keys(keys, rows.drawn),
                temperature=temperature,
                top_p=top_p,
                usable=usable,
                top_k=top_k,
                banned=banned,
            )
            alive = ~rows.done
            # A row that is done draws on at the place it stood; what it draws falls behind its end.
            place = jnp.arange(slots), rows.drawn
            drawn = rows.drawn + alive
            ended = jnp.isin(token, jnp.asarray(stops, jnp.int32)) | (drawn >= rows.limit)
            going_on = alive & ~ended
            return step + 1, State(
                rows=dataclasses.replace(
                    rows,
                    token=token,
                    position=rows.position + going_on,
                    drawn=drawn,
                    done=rows.done | ended,
                ),
                cache=cache,
                tokens=state.tokens.at[place].set(token, mode="drop"),
                logprobs=state.logprobs.at[place].set(logprob, mode="drop"),
            )

        _, state = jax.lax.while_loop(going, one, (jnp.zeros((), jnp.int32), state))
        rows = state.rows
        progress = everywhere(Progress(rows.done, rows.drawn, state.tokens, state.logprobs))
        return _pinned(state), progress

    return Sampler(
        slots=slots,
        max_prompt=max_prompt,
        max_response=max_response,
        temperature=temperature,
        stop_ids=stops,
        cache_slots=cache_slots,
        block=block,
        begin=jax.jit(begin),
        fill=jax.jit(fill, donate_argnums=1),
        advance=jax.jit(advance, donate_argnums=1, static_argnums=5),
    )


def _covering(cache_slots: int, block: int, end: int) -> Blocks | None:
    """The blocks of a cache that hold all positions below ``end``; None where it is all one block.

    Their number doubles until it does, so that few programs are compiled.
    """
    if cache_slots <= block:
        return None
    count = 1
    while count * block < end:
        count *= 2
    return Blocks(block, min(count, cache_slots // block))


def _computed(params: Params, config: Qwen3Config) -> Params:
    # Once, not at every step: a layer computes in this dtype anyway.
    return jax.tree.map(lambda w: w.astype(config.compute_dtype), params)


def _read_prompts(
    params: Params, group: Group, config: Qwen3Config, slots: int, blocks: Blocks | None
) -> Cache:
    """Keys and values of a group's prompts, ``[L, F, M, P, H]``."""
    longest = group.prompts.shape[1]
    if config.attention == "xla":
        positions = jnp.broadcast_to(jnp.arange(longest), group.prompts.shape)
        # As long as the slots' own: a CPU sums a softmax over as many terms as there are, masked or not.
        empty = empty_cache(config, len(group.lengths), blocks.slots if blocks else slots)
        _, cache = decode(params, group.prompts, positions, empty, config, blocks)
    else:
        prompts = jnp.pad(group.prompts, [(0, 0), (0, -longest % FUSED)])
        inside = jnp.arange(prompts.shape[1]) < group.lengths[:, None]
        cache = prompt_cache(params, prompts, inside.astype(jnp.int32), config)
    return jax.tree.map(lambda x: x[:, :, :, :longest], cache)


def placement(state: State) -> State:
    """The PartitionSpec of every array of the slots, by the rules of its logical axes."""
    rows, tokens, logprobs = jax.tree.map(
        lambda x: partition("batch", *["length"] * (x.ndim - 1)),
        (state.rows, state.tokens, state.logprobs),
    )
    cache = jax.tree.map(
        lambda x: partition("layers", "batch", "kv_heads", "length", "head_dim"), state.cache
    )
    return State(rows, cache, tokens, logprobs)


def _pinned(state: State) -> State:
    """Slots where they lie between programs, so that each is compiled for one placement of them."""
    if not in_mesh():
        return state
    return jax.tree.map(jax.lax.with_sharding_constraint, state, placement(state))


def _placed(state: State, rows: Rows, cache: Cache, slots: Array) -> State:
    """A group's rows and the cache of its prompts in their slots; each shard fills its own."""

    def on_device(old: tuple[Rows, Cache], new: tuple[Rows, Cache], slots: Array) -> tuple[Rows, Cache]:
        length = new[1].key.shape[3]
        return (
            jax.tree.map(lambda a, b: a.at[slots].set(b, mode="drop"), old[0], new[0]),
            jax.tree.map(lambda a, b: a.at[:, slots, :, :length].set(b, mode="drop"), old[1], new[1]),
        )

    place: Callable[..., tuple[Rows, Cache]] = on_device
    if can_split(len(slots)):
        where = placement(state)
        lie = (where.rows, where.cache)
        place = jax.shard_map(on_device, in_specs=(lie, lie, partition("batch")), out_specs=lie)
    filled, cache = place((state.rows, state.cache), (rows, cache), slots)
    return dataclasses.replace(state, rows=filled, cache=cache)
