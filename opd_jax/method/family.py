"""One interface to all losses and weights: by name, from named arrays, refused by name.

A member is any function of arrays. Its parameters without a default are what it *needs*; parameters
with one are options, or arrays it can use if they are there (``mask``, ``sequence_ids``). The arrays of
a batch go by these names:

    mask, segments, sequence_ids      [B, T]      which tokens, sharing what
    cur, old, tea, ref                [B, T]      log-prob of the sampled token: student, behaviour
                                                  policy, teacher, student before training
    again                             [B, T]      ``old`` read a second time by another batching
    entropy, teacher_entropy          [B, T]      of the whole distributions
    kl                                [B, T]      KL(student || teacher), or its estimate on the support
    student_logits_on_support, student_logprobs_on_support, teacher_logprobs_on_support   [B, T, K]
    cur_on_support, old_on_support, tea_on_support     [B, T, K]   on the *student's* likeliest ids
    student_ids, teacher_ids          [B, T, K]   likeliest ids of each
    reward, group, staleness          [B, T]      of the sequence
    noise                             [B, T]      uniform in [0, 1), drawn anew for every update
    step                              scalar      number of this update
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from opd_jax.method.gates import masked
from opd_jax.method.sequence_weights import f_opd, fire_opd, scope_opd
from opd_jax.method.weights import iw_opd, popd, prune, sg_opd, tip, token_is

Array = jax.Array
Member = Callable[..., Array]


# By the name in a config. What each needs is the list of its parameters without a default.
WEIGHTS: dict[str, Callable[..., Array]] = {
    "token_is": token_is,
    "tip": tip,
    "prune": prune,
    "iw_opd": iw_opd,
    "sg_opd": sg_opd,
    "popd": popd,
    "fire_opd": fire_opd,
    "scope_opd": scope_opd,
    "f_opd": f_opd,
}


def needs(member: Member) -> tuple[str, ...]:
    """Names of the arrays a loss or weight cannot do without.

    >>> from opd_jax.method import iw_opd, sampled_token_loss
    >>> needs(sampled_token_loss), needs(iw_opd)
    (('cur', 'old', 'tea'), ('old', 'tea', 'mask'))
    """
    return tuple(
        name
        for name, parameter in inspect.signature(member).parameters.items()
        if parameter.default is inspect.Parameter.empty
    )


def call(member: Member, fields: Mapping[str, Any]) -> Array:
    """Call a member with those of the ``fields`` that it takes.

    Raises:
      ValueError: it needs a field that is not there.

    >>> import jax.numpy as jnp
    >>> from opd_jax.method import cross_entropy
    >>> cur = jnp.array([[-.5, -1., -2., -3., -4., -5.], [-1., -1., -1., -1., -1., -1.]])
    >>> call(cross_entropy, {"cur": cur, "tea": None})
    Array([[0.5, 1. , 2. , 3. , 4. , 5. ],
           [1. , 1. , 1. , 1. , 1. , 1. ]], dtype=float32)
    >>> call(cross_entropy, {"tea": None})
    Traceback (most recent call last):
    ValueError: cross_entropy needs cur: not among tea
    """
    missing = [name for name in needs(member) if name not in fields]
    if missing:
        name = getattr(member, "func", member).__name__  # of what a partial binds
        raise ValueError(f"{name} needs {', '.join(missing)}: not among {', '.join(fields)}")
    # An option keeps its value, bound or default, though an array should have its name; None is no value.
    names = [
        name
        for name, parameter in inspect.signature(member).parameters.items()
        if parameter.default is inspect.Parameter.empty or parameter.default is None
    ]
    return member(**{name: fields[name] for name in names if name in fields})


def combine(members: Iterable[Member], fields: Mapping[str, Any], g: Array, mask: Array) -> Array:
    """A gate times any number of weights, ``[B, T]``, detached and not yet normalised.

    Args:
      members: weights; options are bound with `functools.partial`.
      fields: arrays by name.
      g: ``[B, T]`` the gate to start from; the mask as float32 for none.
      mask: ``[B, T]``, nonzero on response tokens.

    Raises:
      ValueError: a weight needs a field that is not there.

    >>> import functools
    >>> import jax.numpy as jnp
    >>> from opd_jax.method import iw_opd, popd
    >>> g, mask = jnp.array([[.5], [1.]]) * jnp.ones((2, 6)), jnp.ones((2, 6))
    >>> fields = {"old": jnp.zeros((2, 6)), "tea": jnp.zeros((2, 6)), "step": 0, "mask": mask}
    >>> first_four = functools.partial(popd, start=4, growth=0, every=1)
    >>> combine([iw_opd, first_four], fields, g, mask)  # 1.5 without disagreement, times 1 or 0
    Array([[0.75, 0.75, 0.75, 0.75, 0.  , 0.  ],
           [1.5 , 1.5 , 1.5 , 1.5 , 0.  , 0.  ]], dtype=float32)
    """
    for member in members:
        g = g * call(member, fields)
    return masked(jax.lax.stop_gradient(g), mask)
