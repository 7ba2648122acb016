"""What a Qwen3 is: its dimensions, dense or mixture of experts."""

from __future__ import annotations

import dataclasses

from opd_jax.errors import InputError
from opd_jax.model.fields import check_choice, check_flag, check_number, check_whole
from opd_jax.model.rope import Yarn

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


# How a model may be computed. "auto" is a setting of a run; `kernels.choose_kernel` makes one of these of it.
CHOICES = {
    "compute_dtype": ("float32", "bfloat16"),
    "attention": ("xla", "cudnn", "splash"),
    "remat": ("full", "attention", "dots", "none"),
}


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Dimensions of a Qwen3, under the names of its Hugging Face ``config.json``.

    The last fields say how the model is computed, not what it is; they are never saved with the
    weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rope_scaling: Yarn | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 40_960
    eos_token_id: int = 151_645
    # Mixture of experts, in every layer or (num_experts 0) in none.
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False  # whether the weights of a token's experts sum to one

    compute_dtype: str = "float32"  # of activations; norms, softmax and log-probs stay float32
    head_chunk: int = 512  # positions per pass through the vocabulary head, on each device
    attention: str = "xla"  # kernel of whole rows: see `attention.choose_kernel`
    remat: str = "full"  # what the backward pass recomputes: see `forward.REMAT`
    lora_alpha: float = 0.0  # of low-rank updates among the parameters: see `lora`

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        sizes: tuple[str, ...] = _SIZES
        if self.num_experts:
            sizes = (*_SIZES, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
        for name in sizes:
            check_whole(name, getattr(self, name))
        check_whole("head_chunk", self.head_chunk)
        check_whole("eos_token_id", self.eos_token_id, 0)
        # YaRN divides by the logarithm of the base.
        check_number("rope_theta", self.rope_theta, above=1.0 if self.rope_scaling else 0.0)
        check_number("rms_norm_eps", self.rms_norm_eps)
        check_flag("tie_word_embeddings", self.tie_word_embeddings)
        check_flag("norm_topk_prob", self.norm_topk_prob)
        if self.head_dim % 2:
            raise InputError(
                f"head_dim must be even, for rotary embedding: got {self.head_dim}; correct config.json"
            )
        if self.eos_token_id >= self.vocab_size:
            raise InputError(
                f"eos_token_id must be in the vocabulary: got {self.eos_token_id} of {self.vocab_size}; "
                "correct config.json"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads must be a multiple of num_key_value_heads: got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}; correct config.json"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"num_experts_per_tok cannot exceed num_experts: got {self.num_experts_per_tok} of "
                f"{self.num_experts}; correct config.json"
            )


COMPUTE_FIELDS = ("compute_dtype", "head_chunk", "attention", "remat", "lora_alpha")
ARCHITECTURE_FIELDS = tuple(
    field.name for field in dataclasses.fields(Qwen3Config) if field.name not in COMPUTE_FIELDS
)
EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
