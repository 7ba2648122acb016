"""Blocks of a cache beyond the last position change no bit, in a program compiled as users have it."""

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.model.attention import Blocks, block_attention, cache_mask

# Heads, key-value heads, width, size of a block, and how many blocks are compared with two. A CPU adds up the
# products of real models in other ways than those of tiny ones.
CASES = [(4, 2, 6, 8, (1, 3, 4, 8)), (16, 8, 128, 256, (1, 3, 4, 8)), (16, 8, 128, 1024, (1,))]


def check(heads: int, kv_heads: int, width: int, size: int, numbers: tuple[int, ...], dtype: str) -> None:
    rng, most = np.random.default_rng(0), max(2, *numbers)
    positions = jnp.asarray([[3], [2 * size - 1], [size + 1], [size - 1]])
    query = jnp.asarray(5 * rng.normal(size=(4, 1, heads, width)), dtype)
    key, value = (jnp.asarray(rng.normal(size=(4, kv_heads, most * size, width)), dtype) for _ in range(2))
    # What lies there would outweigh all else by far.
    key, value = (x.at[:, :, 2 * size :].mul(1e4) for x in (key, value))
    read = jax.jit(block_attention, static_argnums=4)

    def up_to(number: int) -> jax.Array:
        blocks = Blocks(size, number)
        past = (x[:, :, : blocks.slots] for x in (key, value))
        return read(query, *past, cache_mask(positions, blocks.slots), blocks)

    want = up_to(2)
    for number in numbers:
        held = np.flatnonzero(positions[:, 0] < number * size)
        np.testing.assert_array_equal(up_to(number)[held], want[held], f"{heads} heads, {number} of {size}")


if __name__ == "__main__":
    for case in CASES:
        for dtype in ("float32", "bfloat16"):
            check(*case, dtype)
