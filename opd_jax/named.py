"""Things of the user's own, named in a config as ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import traceback
from typing import Any

from opd_jax.errors import InputError

# The embedded world goes by a short name.
ALIASES = {"lab": "opd_jax.lab"}


def is_named(source: str) -> bool:
    """True for ``module:function``, false for a path."""
    module, colon, function = source.partition(":")
    return bool(colon) and function.isidentifier() and all(p.isidentifier() for p in module.split("."))


def _where(error: Exception) -> str:
    """An error of the user's own code: what it is, and in which line of which file."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())}, {last.filename}:{last.lineno}"


def call_named(source: str, kind: type | tuple[type, ...]) -> Any:
    """Import ``module`` and return ``function()``.

    Raises:
      InputError: the module cannot be imported, has no such function, or the function wants arguments,
        fails, or returns something other than ``kind``.
    """
    module, _, name = source.partition(":")
    try:
        function = getattr(importlib.import_module(ALIASES.get(module, module)), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"module:function must name something that can be imported: {source!r} does not ({error}); "
            "check the spelling and PYTHONPATH"
        ) from None
    except Exception as error:  # whatever the user's own module does
        raise InputError(
            f"a module must be imported without an error: that of {source!r} is not ({_where(error)}); "
            "correct it"
        ) from error
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InputError(
            f"module:function must be a function without arguments: {source!r} is not ({error}); wrap it"
        ) from None
    try:
        found = function()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"module:function must return without an error: {source!r} does not ({_where(error)}); correct it"
        ) from error
    if not isinstance(found, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(
            f"{source!r} must return a {wanted}: it returned a {type(found).__name__}; correct it"
        )
    return found
