"""A model's ``config.json``: read with what it cannot ask for refused, and written back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from opd_jax.errors import InputError
from opd_jax.model.config import ARCHITECTURE_FIELDS, EXPERT_FIELDS, Qwen3Config
from opd_jax.model.fields import check_flag, check_kind, check_number, check_whole
from opd_jax.model.rope import Yarn


def read_model_config(folder: Path) -> Qwen3Config:
    """The config of a checkpoint folder, no weights read."""
    return config_from_json(folder / "config.json")


def read_stop_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a text by a checkpoint's own files: ``config.json`` and ``generation_config.json``.

    A chat model may name two, the end of a turn and the end of text. The first is the config's.

    Raises:
      InputError: a file is unreadable or names something else than ids.
    """
    found: list[int] = []
    for file in (folder / "config.json", folder / "generation_config.json"):
        if file.name != "config.json" and not file.is_file():
            continue
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(
                f"{file.name} must be a readable JSON object: {file} ({error}); restore it"
            ) from None
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise InputError(f"eos_token_id must be one or more token ids: {file} has {named!r}; correct it")
        found += ids
    return tuple(dict.fromkeys(found))


def config_from_json(path: Path) -> Qwen3Config:
    """Read a Hugging Face ``config.json``, refusing what this model does not compute.

    Both spellings of the rotary base are read: ``rope_theta`` and ``rope_scaling`` (up to transformers
    4), and ``rope_parameters`` (from 5). A field that changes the computation and is not supported is
    refused by name, because ignoring it gives a silently wrong model.

    Raises:
      InputError: a field is missing, or asks for something this model does not compute.
    """
    try:
        published: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"a model folder must hold a readable config.json: {path} ({error}); "
            "name a folder in Hugging Face format"
        ) from None
    published = {name: value for name, value in published.items() if value is not None}
    rope = _rope(published, path)
    rope_type = rope.pop("rope_type")
    _refuse_what_is_not_computed(published, rope_type, path)
    if rope_type == "default" and (unknown := sorted(rope.keys() - {"rope_theta"})):
        raise InputError(
            f"a plain rotary embedding has a base alone: {path} has {unknown[0]} = {rope[unknown[0]]!r}; "
            "name its rope_type, or choose another checkpoint"
        )
    values = dict(published)
    for name, found in (
        ("rope_theta", rope.pop("rope_theta")),
        ("rms_norm_eps", published.get("rms_norm_eps", 1e-6)),
    ):
        check_number(name, found)
        values[name] = float(found)
    eos = values.get("eos_token_id")
    values["eos_token_id"] = (eos or [None])[0] if isinstance(eos, list) else eos
    values["rope_scaling"] = _yarn(rope, published, path) if rope_type == "yarn" else None
    values.setdefault("num_experts", values.get("num_local_experts"))  # the name that transformers 5 writes
    if published["model_type"] == "qwen3":
        values = {name: value for name, value in values.items() if name not in EXPERT_FIELDS}
    required = [
        field.name
        for field in dataclasses.fields(Qwen3Config)
        if field.default is dataclasses.MISSING or field.name == "eos_token_id"
    ]
    if published["model_type"] == "qwen3_moe":
        required += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"]
    for name in required:
        if values.get(name) is None:
            raise InputError(
                f"config.json must say {name}: {path} does not; restore it from the original model"
            )
    return Qwen3Config(**{name: values[name] for name in ARCHITECTURE_FIELDS if name in values})


def _rope(published: dict[str, Any], path: Path) -> dict[str, Any]:
    """What is said of the rotary embedding in any spelling, with its type and base.

    Raises:
      InputError: two spellings contradict each other; which one counts depends on who reads it.
    """
    spelled = {name: published[name] for name in ("rope_parameters", "rope_scaling") if name in published}
    for name, said in spelled.items():
        check_kind(name, said, dict, "an object or null")
    bases = {"rope_theta": published.get("rope_theta")}
    bases |= {f"{name}.rope_theta": said.get("rope_theta") for name, said in spelled.items()}
    base = _agreed({name: found for name, found in bases.items() if found is not None}, path)
    rest = _agreed({name: _one_spelling(said) for name, said in spelled.items() if said}, path)
    return {"rope_type": "default", **(rest or {}), "rope_theta": 10_000.0 if base is None else base}


def _one_spelling(rope: dict[str, Any]) -> dict[str, Any]:
    """Its type under one name, and neither nulls nor the base."""
    said = {name: value for name, value in rope.items() if value is not None}
    rope_type = str(said.get("rope_type") or said.get("type") or "default")
    others = {name: value for name, value in said.items() if name not in ("rope_type", "type", "rope_theta")}
    if others.get("partial_rotary_factor") == 1:  # the whole of a head, as here
        del others["partial_rotary_factor"]
    return {"rope_type": rope_type, **others}


def _agreed(found: dict[str, Any], path: Path) -> Any:
    """The one thing that all of these fields say; None where there is none."""
    (first, value), *others = [*found.items()] or [("", None)]
    for name, other in others:
        if other != value:
            raise InputError(
                f"config.json must say one thing of the rotary embedding: {path} has {first} = {value!r} "
                f"and {name} = {other!r}; remove the one that is not the model's"
            )
    return value


def _refuse_what_is_not_computed(published: dict[str, Any], rope_type: str, path: Path) -> None:
    for name in ("attention_bias", "use_sliding_window"):
        check_flag(name, published.get(name, False))
    check_whole("decoder_sparse_step", published.get("decoder_sparse_step", 1), 0)
    check_kind("mlp_only_layers", published.get("mlp_only_layers", []), list, "a list")
    check_kind("layer_types", layers := published.get("layer_types", []), list, "a list")
    unsupported = {
        "model_type": published.get("model_type") not in ("qwen3", "qwen3_moe"),
        "attention_bias": published.get("attention_bias", False),
        "use_sliding_window": published.get("use_sliding_window", False),
        "layer_types": any(kind != "full_attention" for kind in layers)
        or len(layers) not in (0, published.get("num_hidden_layers")),
        "hidden_act": published.get("hidden_act", "silu") != "silu",
        "quantization_config": "quantization_config" in published,
        # Layers that are dense among layers that are not.
        "decoder_sparse_step": published.get("decoder_sparse_step", 1) != 1,
        "mlp_only_layers": bool(published.get("mlp_only_layers")),
        "rope_type": rope_type not in ("default", "yarn"),
        "partial_rotary_factor": published.get("partial_rotary_factor", 1) != 1,
    }
    for field, refused in unsupported.items():
        if refused:
            came = rope_type if field == "rope_type" else published.get(field)
            raise InputError(
                "only Qwen3 with silu, plain or YaRN rotary embedding, full attention without bias, experts "
                f"in all layers or in none, and unquantised weights is computed here: {path} has {field} = "
                f"{came!r}; choose another checkpoint"
            )


def _yarn(rope: dict[str, Any], published: dict[str, Any], path: Path) -> Yarn:
    """What a config.json says of YaRN; the original context defaults to its ``max_position_embeddings``."""
    # The truth of a field may stand under its own name or beside the base.
    known = {field.name for field in dataclasses.fields(Yarn)}
    unknown = sorted(rope.keys() - known)
    if unknown:
        raise InputError(
            f"rope_scaling of type yarn has the fields {', '.join(sorted(known))}: {path} has {unknown[0]}; "
            "correct it"
        )
    values = dict(rope)
    # Beside the group or in it; transformers reads the former first.
    name = "original_max_position_embeddings"
    spelled = {name: published.get(name), f"rope_scaling.{name}": rope.get(name)}
    original = _agreed({where: found for where, found in spelled.items() if found is not None}, path)
    values[name] = published.get("max_position_embeddings") if original is None else original
    if "factor" not in values:
        raise InputError(f"rope_scaling of type yarn must say factor: {path} does not; add it")
    return Yarn(**values)


def config_to_json(config: Qwen3Config, dtype: str) -> str:
    """The ``config.json`` that transformers, vLLM and `config_from_json` read back.

    ``dtype`` is that of the stored weights.
    """
    moe = config.num_experts > 0
    fields = {name: getattr(config, name) for name in ARCHITECTURE_FIELDS if moe or name not in EXPERT_FIELDS}
    yarn = config.rope_scaling
    if yarn is not None:
        said = {name: value for name, value in dataclasses.asdict(yarn).items() if value is not None}
        fields["rope_scaling"] = {"rope_type": "yarn", **said}
    fields.update(
        architectures=["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        model_type="qwen3_moe" if moe else "qwen3",
        attention_bias=False,
        attention_dropout=0.0,
        hidden_act="silu",
        initializer_range=0.02,
        sliding_window=None,
        use_sliding_window=False,
        torch_dtype=dtype,
        use_cache=True,
    )
    if moe:
        fields.update(decoder_sparse_step=1, mlp_only_layers=[])
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
