"""What a Qwen3 is: its dimensions, and the published sizes by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from opd_jax.errors import InputError

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Dimensions of a dense Qwen3, under the names of its Hugging Face ``config.json``.

    The last two fields say how the model is computed, not what it is; they are never saved with
    the weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 40_960
    eos_token_id: int = 151_645

    compute_dtype: str = "float32"  # of activations; norms, softmax and log-probs stay float32
    head_chunk: int = 512  # positions per pass through the vocabulary head

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(
                    f"{name} must be a whole number of at least 1: got {value!r}; correct config.json"
                )
        if self.head_dim % 2:
            raise InputError(
                f"head_dim must be even, for rotary embedding: got {self.head_dim}; correct config.json"
            )
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise InputError(
                f"eos_token_id must be in the vocabulary: got {self.eos_token_id} of {self.vocab_size}; "
                "correct config.json"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads must be a multiple of num_key_value_heads: got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}; correct config.json"
            )


COMPUTE_FIELDS = ("compute_dtype", "head_chunk")
ARCHITECTURE_FIELDS = tuple(
    field.name for field in dataclasses.fields(Qwen3Config) if field.name not in COMPUTE_FIELDS
)

# Published dense sizes: width, MLP width, layers, query heads, tied head. All share 8 key-value
# heads of width 128 and a vocabulary of 151,936 (config.json of each Qwen/Qwen3-* repository).
_DENSE = {
    "qwen3-0.6b": (1024, 3072, 28, 16, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, True),
    "qwen3-4b": (2560, 9728, 36, 32, True),
    "qwen3-8b": (4096, 12288, 36, 32, False),
    "qwen3-14b": (5120, 17408, 40, 40, False),
    "qwen3-32b": (5120, 25600, 64, 64, False),
}


def preset(name: str) -> Qwen3Config:
    """The configuration of a published dense Qwen3, for example ``preset("qwen3-1.7b")``.

    Raises:
      InputError: no dense Qwen3 of that name was published.
    """
    try:
        width, mlp, layers, heads, tied = _DENSE[name.lower()]
    except KeyError:
        raise InputError(
            f"a preset must be a published dense Qwen3: got {name!r}; use one of {', '.join(_DENSE)}"
        ) from None
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


def config_from_json(path: Path) -> Qwen3Config:
    """Read a Hugging Face ``config.json``, refusing what this model does not compute.

    Both spellings of the rotary base are read: ``rope_theta`` (up to transformers 4) and
    ``rope_parameters.rope_theta`` (from 5). A field that changes the computation and is not
    supported is refused by name, because ignoring it gives a silently wrong model.

    Raises:
      InputError: a field is missing, or asks for something this model does not compute.
    """
    try:
        published: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"a model folder must hold a readable config.json: {path} ({error}); "
            "name a folder in Hugging Face format"
        ) from None
    rope = dict(published.get("rope_parameters") or published.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "model_type": published.get("model_type") != "qwen3",
        "attention_bias": bool(published.get("attention_bias")),
        "use_sliding_window": bool(published.get("use_sliding_window")),
        "hidden_act": published.get("hidden_act", "silu") != "silu",
        "rope_type": rope_type != "default",
    }
    for field, refused in unsupported.items():
        if refused:
            came = rope_type if field == "rope_type" else published.get(field)
            raise InputError(
                f"only dense Qwen3 with silu, plain rotary embedding and no bias is computed here: "
                f"{path} has {field} = {came!r}; choose another checkpoint"
            )
    values = dict(published)
    for name, found in (
        ("rope_theta", published.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        ("rms_norm_eps", published.get("rms_norm_eps", 1e-6)),
    ):
        if not isinstance(found, int | float) or not found > 0:
            raise InputError(f"{name} must be a number above 0: got {found!r}; correct {path}")
        values[name] = float(found)
    eos = values.get("eos_token_id")
    values["eos_token_id"] = (eos or [None])[0] if isinstance(eos, list) else eos
    required = [
        field.name
        for field in dataclasses.fields(Qwen3Config)
        if field.default is dataclasses.MISSING or field.name == "eos_token_id"
    ]
    for name in required:
        if values.get(name) is None:
            raise InputError(
                f"config.json must say {name}: {path} does not; restore it from the original model"
            )
    return Qwen3Config(**{name: values[name] for name in ARCHITECTURE_FIELDS if name in values})


def config_to_json(config: Qwen3Config, dtype: str) -> str:
    """The ``config.json`` that transformers, vLLM and `config_from_json` read back.

    ``dtype`` is that of the stored weights.
    """
    fields = {name: getattr(config, name) for name in ARCHITECTURE_FIELDS}
    fields.update(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        attention_bias=False,
        attention_dropout=0.0,
        hidden_act="silu",
        initializer_range=0.02,
        rope_scaling=None,
        sliding_window=None,
        use_sliding_window=False,
        torch_dtype=dtype,
        use_cache=True,
    )
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
