"""Every setting of a run: one frozen, typed, closed tree, and the only place that knows a default.

Defaults are the paper's where it prints one (arXiv 2606.24084) and its code base's where it does not.
Files in ``configs/`` and dotted ``--key value`` pairs override them; draccus reads both.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import draccus

from opd_jax.errors import InputError


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
    scope: Literal["none", "sequence", "microbatch", "minibatch"] = "minibatch"  # not printed


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


@draccus.decode.register(int)
def _whole_number(raw: Any, path: Sequence[str] = ()) -> int:
    """A whole number; ``true`` is none, though Python and YAML would let it pass for 1."""
    if isinstance(raw, bool) or (isinstance(raw, float) and not raw.is_integer()):
        raise draccus.utils.DecodingError(tuple(path), f"Couldn't parse {str(raw)!r} into an int")
    try:
        return int(raw)
    except (TypeError, ValueError):
        raise draccus.utils.DecodingError(tuple(path), f"Couldn't parse {str(raw)!r} into an int") from None


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply overrides, and check the result.

    Args:
      path: YAML, TOML or JSON file; defaults alone without one.
      overrides: dotted command-line pairs, ``["--gate.block", "32"]`` or ``["--gate.block=32"]``.

    Raises:
      InputError: the file cannot be read, a key is unknown (the nearest valid name is given), a value
        is of the wrong type, or the settings contradict each other.
    """
    source = "the command line" if path is None else str(path)
    try:
        if path is not None:
            _check_keys(_read(Path(path)), source)
        _check_keys(
            {name.removeprefix("--").split("=")[0]: None for name in overrides if name.startswith("--")},
            "the command line",
        )
        config = draccus.parse(Config, path, args=list(overrides), exit_on_error=False)
    except InputError:
        raise
    except Exception as error:  # draccus raises its own, argparse's and Python's kinds alike
        reason = " ".join(str(error).split())
        raise InputError(
            f"settings must have the types and choices of opd_jax.config: {reason} ({source}); "
            "correct the value"
        ) from None
    check(config)
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            settings = draccus.cfgparsing.load_config(file, file=path)
    except OSError as error:
        raise InputError(f"a config must be a readable file: {error}; check the path") from None
    except draccus.utils.ParsingError as error:
        reason = " ".join(str(error.__cause__).split())
        raise InputError(
            f"a config must be YAML, TOML or JSON: {path} is not ({reason}); correct it"
        ) from None
    if not isinstance(settings, dict):
        raise InputError(f"a config must set at least one key: {path} sets none; remove or fill it")
    return settings


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, in order of declaration."""
    return dict(_flatten(dataclasses.asdict(config), ""))


def _flatten(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _check_keys(settings: dict[str, Any], source: str) -> None:
    """Refuse keys that nothing reads, with the nearest valid name."""
    valid = list(flatten(Config()))
    groups = {name.split(".")[0] for name in valid if "." in name}
    for name, value in _flatten(settings, ""):
        if name in valid or (name in groups and value is None):
            continue
        last = name.rsplit(".", 1)[-1]
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6) or [
            full for full in valid if full.rsplit(".", 1)[-1] == last
        ]
        near = near or [
            full
            for full in valid
            for match in difflib.get_close_matches(last, [full.rsplit(".", 1)[-1]], cutoff=0.5)
        ]
        hint = f"the nearest is {near[0]}" if near else "see opd_jax/config.py for all of them"
        raise InputError(f"a setting must be one that something reads: {name!r} in {source} is not; {hint}")


def config_file(name: str) -> Path:
    """A file of ``configs/``, where it lies in a checkout or in an installed package."""
    package = Path(__file__).parent
    installed = package / "configs" / name
    return installed if installed.exists() else package.parent / "configs" / name


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back to an equal tree."""
    from opd_jax.files import write_text

    write_text(path, draccus.dump(config))


def check(config: Config) -> None:
    """Refuse settings that are out of range or contradict each other."""
    positive = [
        "model.head_chunk",
        "sampling.prompts",
        "sampling.samples",
        "sampling.max_prompt",
        "sampling.max_response",
        "sampling.slots",
        "loss.top_k",
        "gate.block",
        "gate.span_minimum",
        "gate.span_chunk",
        "schedule.rounds",
        "schedule.passes",
        "schedule.minibatches",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "evaluation.samples",
        "sampling.temperature",
        "evaluation.temperature",
        "optimizer.learning_rate",
        "optimizer.clip_norm",
    ]
    values = flatten(config)
    for name in positive:
        if not values[name] > 0:
            raise InputError(f"{name} must be above 0: got {values[name]}; raise it")
    for name in ("sampling.top_p", "evaluation.top_p"):
        if not 0 < values[name] <= 1:
            raise InputError(f"{name} must lie in (0, 1]: got {values[name]}; 1 keeps every token")
    for name in ("gate.tau", "schedule.staleness", "log.rows", "seed", "evaluation.seed"):
        if values[name] < 0:
            raise InputError(f"{name} must not be negative: got {values[name]}; use 0 or more")
    if config.gate.span_maximum < config.gate.span_minimum:
        raise InputError(
            f"gate.span_maximum must be at least gate.span_minimum: got {config.gate.span_maximum} "
            f"and {config.gate.span_minimum}; raise the one or lower the other"
        )
    rollouts = config.sampling.prompts * config.sampling.samples
    if rollouts % config.schedule.minibatches:
        raise InputError(
            f"a round's rollouts must split evenly into minibatches: {config.sampling.prompts} prompts "
            f"x {config.sampling.samples} samples = {rollouts} do not divide by "
            f"{config.schedule.minibatches}; set schedule.minibatches to a divisor of {rollouts}"
        )
    rows, ways = rollouts // config.schedule.minibatches, config.mesh.data * config.mesh.fsdp
    for name, count in (("a minibatch", rows), ("sampling.slots", config.sampling.slots)):
        if count % ways:
            raise InputError(
                f"rows must split evenly over the mesh: {name} has {count}, mesh.data x mesh.fsdp is "
                f"{ways}; use a multiple of {ways}"
            )
