"""Things of the user's own, named in a config as ``module:function``."""

from __future__ import annotations

import importlib
from typing import Any

from opd_jax.errors import InputError

# The embedded world goes by a short name.
ALIASES = {"lab": "opd_jax.lab"}


def is_named(source: str) -> bool:
    """True for ``module:function``, false for a path."""
    module, colon, function = source.partition(":")
    return bool(colon) and function.isidentifier() and all(p.isidentifier() for p in module.split("."))


def call_named(source: str) -> Any:
    """Import ``module`` and return ``function()``.

    Raises:
      InputError: the module cannot be imported or has no such function.
    """
    module, _, function = source.partition(":")
    try:
        found = getattr(importlib.import_module(ALIASES.get(module, module)), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"module:function must name something that can be imported: {source!r} does not ({error}); "
            "check the spelling and PYTHONPATH"
        ) from None
    return found()
