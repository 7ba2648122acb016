"""The manifest of a store: what it belongs to, and of each sealed round its shards with their SHA-256."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opd_jax.errors import InputError
from opd_jax.rollout.schema import SCHEMA_VERSION
from opd_jax.rollout.storage import Place, digest_of

# A dot file, so that tools which read the whole folder as parquet pass it by.
MANIFEST = ".manifest.json"
SHORTEST = 12  # characters of a digest that name it


class ManifestFile:
    """The manifest of the store at a place.

    Args:
      place: where the store lies.
      about: what a store belongs to that has no manifest yet.
    """

    def __init__(self, place: Place, about: Mapping[str, Any]) -> None:
        self._place, self._about = place, about
        self._known: tuple[Any, dict[str, Any]] | None = None  # a manifest by its version, never changed

    def read(self) -> tuple[dict[str, Any], Any]:
        """The manifest, and its version in the place; None where there is none yet.

        It grows with every round, so it is parsed once for each version.

        Raises:
          InputError: it is damaged, or of another schema.
        """
        if self._known and self._place.version(MANIFEST) == self._known[0]:
            return self._known[1], self._known[0]
        try:
            data, version = self._place.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return {"schema": SCHEMA_VERSION, "about": dict(self._about), "rounds": []}, None
        file = f"{self._place.path}/{MANIFEST}"
        try:
            manifest = json.loads(data)
            schema, digest = manifest["schema"], manifest.pop("sha256", None)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"a store's manifest must be whole JSON: {file} is not ({error}); restore it"
            ) from None
        if schema != SCHEMA_VERSION:
            raise InputError(
                f"a store must have schema {SCHEMA_VERSION}: {file} has {schema}; "
                "read it with the version that wrote it"
            )
        if digest != _digest(manifest):
            raise InputError(
                f"a store's manifest must be as it was written: {file} is not, by its own SHA-256; restore it"
            )
        self._known = version, manifest
        return manifest, version

    @property
    def about(self) -> dict[str, Any]:
        """What the store belongs to."""
        return self.read()[0]["about"]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """What is said of each sealed round, in order."""
        return self.read()[0]["rounds"]

    def write(self, manifest: dict[str, Any], version: Any) -> None:
        """Replace the manifest if it is still of a version, None where there is none yet."""
        # A line a round. An indented one takes ten times as long to write, and is written every round.
        head = json.dumps({name: value for name, value in manifest.items() if name != "rounds"})
        rounds = ",\n".join(json.dumps(entry) for entry in manifest["rounds"])
        text = f'{head[:-1]}, "sha256": "{_digest(manifest)}", "rounds": [\n{rounds}\n]}}\n'
        self._known = self._place.update(MANIFEST, text.encode(), version), manifest


def refuse_others(
    path: object, found: Mapping[str, Any], wanted: Mapping[str, Any], accept: Sequence[str]
) -> None:
    """Refuse a store that belongs to something else, but for what is accepted by name and value.

    Raises:
      InputError: it does; the message says how to accept it.
    """
    for name, expected in wanted.items():
        value = found.get(name)
        if value != expected and not is_named(accept, name, value):
            raise InputError(
                f"a store belongs to one {name}: {path} was written for {value!r}, this run has "
                f"{expected!r}; use the run folder it was made for, or accept this one by name with "
                f"--store.accept='[{name}={short(value)}]'"
            )


def _digest(manifest: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(manifest, sort_keys=True).encode())


def short(value: Any) -> str:
    """A value as it is named in a setting."""
    text = value if isinstance(value, str) else json.dumps(value)
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:SHORTEST] if is_digest else text


def is_named(accept: Sequence[str], name: str, value: Any) -> bool:
    """Whether a setting or digest is among those accepted by name and value."""
    for entry in accept:
        key, equals, text = entry.partition("=")
        if not equals:
            raise InputError(
                f"what a store may differ in is named with its value: store.accept has {entry!r}; write "
                f"{entry}=VALUE, as the refusal says it"
            )
        whole = value if isinstance(value, str) else json.dumps(value)
        if key == name and (text == whole or (len(text) >= SHORTEST and whole.startswith(text))):
            return True
    return False
