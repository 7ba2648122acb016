"""Every setting of a run: one frozen, typed, closed tree, and the only place that knows a default.

Defaults are the paper's where it prints one (arXiv 2606.24084) and its code base's where it does not.
`opd_jax.settings` reads what overrides them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The two models, and how they are computed."""

    student: str = ""  # folder in Hugging Face format, or "module:function" that returns one
    teacher: str = ""  # the same; must read the student's tokenizer ids
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    head_chunk: int = 512  # positions per pass through the vocabulary head


@dataclasses.dataclass(frozen=True)
class ProblemsConfig:
    """What is asked."""

    train: str = ""  # JSON-lines file, or "module:function" that returns problems
    heldout: str = ""  # the same, for evaluation


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Rollouts of one round, and how each token of them is drawn."""

    prompts: int = 4  # a round
    samples: int = 8  # rollouts of each prompt
    temperature: float = 1.0
    top_p: float = 0.9
    max_prompt: int = 2048  # tokens
    max_response: int = 16384  # tokens
    slots: int = 32  # rollouts decoded together


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The base loss of a token."""

    kind: Literal["sampled_token", "teacher_topk"] = "sampled_token"
    surrogate: Literal["ppo", "is", "reinforce"] = "ppo"  # of sampled_token
    advantage: Literal["old", "cur"] = "old"  # frozen at the rollout, or recomputed
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    reduction: Literal["token_mean", "seq_mean_token_mean"] = "token_mean"
    old_source: Literal["trainer", "sampler"] = "trainer"  # whose log-probs are `old`; see rollout.score
    top_k: int = 32  # teacher ids stored with every token; the support of teacher_topk


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """How drift becomes a weight."""

    segments: Literal["none", "token", "block", "newline", "sequence"] = "block"
    block: int = 64  # tokens, of block
    span_minimum: int = 16  # tokens, of newline; the paper does not print these three
    span_maximum: int = 128
    span_chunk: int = 64
    tau: float = 1.0
    statistic: Literal["signed_mean", "mean_abs", "rms", "positive", "negative"] = "signed_mean"
    scope: Literal["none", "sequence", "minibatch"] = "minibatch"  # not printed
    eps: float = 1e-8  # of the normaliser; not printed


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a constant learning rate."""

    learning_rate: float = 2e-6
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How often rollouts are drawn and how often each is used."""

    rounds: int = 200
    passes: int = 2  # over each round's rollouts
    minibatches: int = 1  # updates a pass
    staleness: int = 0  # rounds between drawing rollouts and training on them

    @property
    def updates_per_round(self) -> int:
        return self.passes * self.minibatches


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices: rows are split over data and fsdp, weights over fsdp and tensor."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a model is judged on held-out problems."""

    samples: int = 8  # a problem
    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0  # apart from the training seed, so that arms and seeds face the same draws


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is kept for the report beyond one line per update."""

    rows: int = 4  # rollouts whose tokens are kept with drift and weight, at a round's last update


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, in order of declaration."""
    return dict(flatten_tree(dataclasses.asdict(config)))


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by dotted name."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten_tree(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
