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
class LoraSettings:
    """Low-rank updates in the place of the student's own weights: `opd_jax.model.lora`."""

    rank: int = 0  # 0 trains the weights themselves
    alpha: float = 32.0  # updates count alpha / rank
    targets: tuple[Literal["query", "key", "value", "output", "gate", "up", "down"], ...] = (
        "query",
        "key",
        "value",
        "output",
        "gate",
        "up",
        "down",
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The two models, and how they are computed."""

    student: str = ""  # folder in Hugging Face format, or "module:function" that returns one
    teacher: str = ""  # the same; must read the student's tokenizer ids
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    head_chunk: int = 512  # positions per pass through the vocabulary head, on each device
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"  # kernel of whole rows
    remat: Literal["full", "attention", "dots", "none"] = "full"  # what the backward pass recomputes
    residency: Literal["together", "sequential"] = "together"  # sequential: one model at a time
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclasses.dataclass(frozen=True)
class ProblemsConfig:
    """What is asked, and how it is put to a model: `opd_jax.tasks`."""

    train: str = ""  # file, folder or hf:OWNER/NAME, or "module:function" that returns problems
    heldout: str = ""  # the same, for evaluation
    template: Literal["plain", "chat"] = (
        "plain"  # the question as it stands, or the tokenizer's chat template
    )
    thinking: bool = True  # of chat templates that can leave it out, as Qwen3's can
    system: str = ""  # a system message, of chat
    instruction: str = ""  # put behind every question, on a line of its own


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Rollouts of one round, and how each token of them is drawn."""

    prompts: int = 4  # a round
    samples: int = 8  # rollouts of each prompt
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0  # likeliest tokens that may be drawn, 0 for all; the nucleus is taken of these
    max_prompt: int = 2048  # tokens
    max_response: int = 16384  # tokens
    stop: tuple[str, ...] = ()  # strings that end a response; this and the next two hold in evaluation too
    stop_ids: tuple[int, ...] = ()  # ids that end one, beside those that the model's own files name
    ban_special: bool = False  # never draw special tokens but for those that end a response
    slots: int = 32  # rollouts decoded together; refilled as they finish


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """Where rollouts are stored and what with them, and whose rollouts are taken."""

    at: str | None = None  # another folder than the run's own, or a URL: gs://bucket/run, s3://bucket/run

    teacher_hidden: bool = False  # the teacher's last hidden states, bf16: see rollout.score.full_logprobs
    # Rollouts of another student, tokenizer, temperature, ... are refused unless what differs is named here
    # with its value, as the refusal prints it: [student=0123456789ab, temperature=0.7]. They are trained on
    # as they were scored.
    accept: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What draws rollouts: the JAX sampler, or HTTP servers (`opd_jax.rollout.server`)."""

    kind: Literal["jax", "server"] = "jax"
    urls: tuple[str, ...] = ()  # of servers of the student, http://host:8000; they must see the run folder
    model: str = ""  # the name that they serve it by; empty where they serve but one
    teacher_urls: tuple[str, ...] = ()  # of servers that score for the teacher; without any it is scored here
    teacher_model: str = ""
    concurrency: int = 64  # requests in flight, over all servers
    timeout: float = 1800.0  # seconds for a whole answer; a server that takes longer has stalled
    attempts: int = 6  # at a request, with growing pauses between them
    tolerance: float = 0.02  # nats: mean |difference| of a probe between server and trainer after a refresh


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The base loss of a token: `opd_jax.method.losses` and `mixed_losses`."""

    kind: Literal[
        "sampled_token",
        "teacher_topk",
        "teacher_topk_unrenormalised",
        "teacher_topk_tail",
        "teacher_topk_generalised",
        "student_topk",
        "sign_gated",
        "scope",
    ] = "sampled_token"
    terms: tuple[Literal["entropy_aware", "trust_region", "reference_kl"], ...] = ()  # put on top, in order
    surrogate: Literal["ppo", "is", "reinforce"] = "ppo"  # of sampled_token, student_topk, sign_gated
    advantage: Literal["old", "cur"] = "old"  # frozen at the rollout, or recomputed
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    reduction: Literal["token_mean", "seq_mean_token_mean"] = "token_mean"
    special_tokens: Literal["keep", "first_out", "all_out"] = "keep"  # out of the mask; EOS stays in it
    special_ids: tuple[int, ...] = ()  # which they are; those of the tokenizer where none are listed
    old_source: Literal["trainer", "sampler"] = "trainer"  # whose log-probs are `old`; see rollout.score
    # Teacher ids stored with every token: the support of teacher_topk, and of the forward KL of the terms,
    # whose sources take 16 (entropy_aware) and 64 (trust_region).
    top_k: int = 32
    student_k: int = 16  # student ids stored where something asks for them; the support of student_topk
    extrapolation: float = 1.8  # of sign_gated, which goes with weights.members=[sg_opd]
    conflict: float = 1.0
    alpha: float = 1.0  # of entropy_aware
    entropy_threshold: float = 0.8  # nats, of the teacher
    kl_weight: float | None = None  # of reference_kl; not printed, must be set


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """How drift becomes a weight: `opd_jax.method.gates`, `bounds` and `controls`."""

    segments: Literal["none", "token", "block", "newline", "sequence", "cusum"] = "block"
    block: int = 64  # tokens, of block
    span_minimum: int = 16  # tokens, of newline and cusum; the paper does not print these three
    span_maximum: int = 128
    span_chunk: int = 64  # of newline
    cusum_slack: float = 0.5  # root mean squares of drift
    cusum_limit: float = 4.0
    tau: float = 1.0
    # Effective token ratio that tau is chosen for, batch by batch: the gate's, without weights.members.
    target_ratio: float | None = None
    statistic: Literal["signed_mean", "mean_abs", "rms", "positive", "negative"] = "signed_mean"
    map: Literal["exp", "clipped_exp", "hard"] = "exp"
    floor: float = 0.1  # of clipped_exp
    scope: Literal["none", "sequence", "microbatch", "minibatch"] = "minibatch"  # not printed
    eps: float = 0.0  # of the normaliser; not printed
    clip: tuple[float, float] | None = None  # bounds of the weights, mean one kept
    residual: float = 1.0  # share of the gate; 0 is no gate
    control: Literal[
        "none",
        "constant",
        "inverse",
        "position_mean",
        "shuffled",
        "random",
        "noise",
        "oracle",
        "disagreement",
    ] = "none"  # another gate in the gate's place, to compare with


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
    """Weights that multiply the gate before it is normalised: `opd_jax.method.weights`."""

    members: tuple[
        Literal["token_is", "tip", "prune", "iw_opd", "sg_opd", "popd", "fire_opd", "scope_opd", "f_opd"], ...
    ] = ()
    ratio_twice: bool = False  # allow token_is with a surrogate that holds the ratio already
    token_is_low: float = 0.0
    token_is_high: float = 2.0
    tip_keep: float = 0.5
    tip_clip_quantile: float = 0.98
    prune_overlap: float = 0.7
    prune_drop: float = 0.01
    prune_base: float = 0.5
    iw_opd_largest: float = 1.5
    sg_opd_tau: float | None = None  # nats; not printed, must be set
    popd_start: int | None = None  # tokens; not printed, must be set
    popd_growth: int | None = None
    popd_every: int | None = None  # updates
    fire_opd_drop: float = 0.2
    fire_opd_teacher_share: float = 1.0
    fire_opd_student_share: float = 1.0
    scope_opd_temperature: float = 1.0
    f_opd_rate: float | None = None  # not printed, must be set
    f_opd_threshold: float | None = None


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
    microbatches: int = 1  # parts an update is computed in, to save memory; the value stays the same
    rows: Literal["padded", "packed"] = "padded"  # one rollout to a row of a minibatch, or as many as fit
    staleness: int = 0  # rounds between drawing rollouts and training on them

    @property
    def updates_per_round(self) -> int:
        return self.passes * self.minibatches


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices: rows are split over data, fsdp and expert, weights over fsdp, expert and tensor."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1  # experts of a mixture; for all else one more way of splitting rows
    spread_teacher: bool = False  # split the teacher's weights over data as well


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a model is judged on held-out problems."""

    samples: int = 8  # a problem
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    seed: int = 0  # apart from the training seed, so that arms and seeds face the same draws


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is kept for the report beyond one line per update."""

    rows: int = 4  # rollouts whose tokens are kept with drift and weight, at a round's last update
    # Updates between costly readings (a second backward pass), 0 for never. A multiple of a round's updates
    # takes them before the last update of rounds, where drift is largest.
    diagnose_every: int = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
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
