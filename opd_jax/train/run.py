"""A run folder: everything one run owns, opened from its config.

config.yaml     the resolved settings
rollouts/       what the student sampled, a shard a round
scored/         the same with old log-probs and the teacher's signal
checkpoints/    training states
metrics.jsonl   one line an update; timings.jsonl has the wall-clock times
tokens/         drift and weight of single tokens, for the report
evaluation/     graded answers to held-out problems
student/        the trained student in Hugging Face format, once the run is done
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from opd_jax.config import Config, flatten
from opd_jax.errors import InputError
from opd_jax.files import sha256
from opd_jax.model import Qwen3Config, load_pretrained, make_mesh
from opd_jax.named import call_named, is_named
from opd_jax.rollout.store import RolloutStore
from opd_jax.settings import load_config, save_config
from opd_jax.tasks import Problem, load_tokenizer, newline_table, read_problems, tokenizer_digest
from opd_jax.tasks.problems import check_problems
from opd_jax.train.checkpoint import Checkpoints, abstract
from opd_jax.train.metrics import drop_lines_from
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.step import TrainState, TrainStep, init_state, make_train_step, state_shardings
from opd_jax.types import Params


@dataclasses.dataclass
class Run:
    """One run, opened. Parts that a stage does not need are not loaded."""

    folder: Path
    config: Config

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        mesh = self.config.mesh
        return make_mesh(mesh.data, mesh.fsdp, mesh.tensor)

    # Models and text

    @functools.cached_property
    def student_folder(self) -> Path:
        return _model_folder(self.config.model.student, "model.student")

    @functools.cached_property
    def teacher_folder(self) -> Path:
        return _model_folder(self.config.model.teacher, "model.teacher")

    @functools.cached_property
    def base(self) -> tuple[Qwen3Config, Params]:
        """The student before training."""
        return self._load(self.student_folder)

    @functools.cached_property
    def teacher(self) -> tuple[Qwen3Config, Params]:
        if tokenizer_digest(load_tokenizer(self.teacher_folder)) != self.about["tokenizer"]:
            raise InputError(
                f"student and teacher must share one tokenizer: {self.student_folder} and "
                f"{self.teacher_folder} do not; choose models of one family"
            )
        return self._load(self.teacher_folder)

    def _load(self, folder: Path) -> tuple[Qwen3Config, Params]:
        config, params = load_pretrained(folder, mesh=self.mesh)
        settings = self.config.model
        config = dataclasses.replace(
            config, compute_dtype=settings.compute_dtype, head_chunk=settings.head_chunk
        )
        return config, params

    @property
    def model(self) -> Qwen3Config:
        """Dimensions of the student."""
        return self.base[0]

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.student_folder)

    @functools.cached_property
    def problems(self) -> list[Problem]:
        return _problems(self.config.problems.train, "problems.train")

    @functools.cached_property
    def heldout(self) -> list[Problem]:
        return _problems(self.config.problems.heldout, "problems.heldout")

    # Stores

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What this run's rollouts belong to."""
        sampling = self.config.sampling
        return {
            "student": model_digest(self.student_folder),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": self.config.seed,
            "engine": "jax",
        }

    @functools.cached_property
    def rollouts(self) -> RolloutStore:
        return RolloutStore(self.folder / "rollouts", self.about)

    @functools.cached_property
    def scored(self) -> RolloutStore:
        about = {
            **self.about,
            "teacher": model_digest(self.teacher_folder),
            "top_k": self.config.loss.top_k,
        }
        return RolloutStore(self.folder / "scored", about)

    # Training state

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(**dataclasses.asdict(self.config.optimizer))

    @functools.cached_property
    def _shardings(self) -> TrainState:
        return state_shardings(self.model, self.optimizer, self.base[1], self.mesh)

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints")

    @functools.cached_property
    def state(self) -> TrainState:
        """The newest state on disk, or the base student's."""
        # A copy: the step donates its state, and the base parameters are needed again.
        fresh = init_state(jax.tree.map(jax.numpy.copy, self.base[1]), self.optimizer)
        if self.checkpoints.latest is None:
            return jax.device_put(fresh, self._shardings)
        state = self.checkpoints.restore(abstract(fresh, self._shardings))
        drop_lines_from(self.metrics_file, int(state.update))
        return state

    @functools.cached_property
    def train_step(self) -> TrainStep:
        newline = newline_table(self.tokenizer, self.model.vocab_size)
        return make_train_step(self.model, self.config, self.optimizer, newline, self._shardings, self.mesh)

    @property
    def width(self) -> int:
        """T: positions in a row, one number for the whole run so that every program compiles once."""
        return self.config.sampling.max_prompt + self.config.sampling.max_response - 1

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def timings_file(self) -> Path:
        return self.folder / "timings.jsonl"


def open_run(folder: str | Path, config: Config | None = None) -> Run:
    """Open a run folder, or make one.

    Args:
      folder: the run.
      config: needed for a new run; for an old one it must equal the config saved there.

    Raises:
      InputError: a new run has no config, or an old one has another.
    """
    folder = Path(folder)
    file = folder / "config.yaml"
    if file.exists():
        saved = load_config(file)
        if config is not None and config != saved:
            here, there = flatten(config), flatten(saved)
            name = next(name for name in here if here[name] != there[name])
            raise InputError(
                f"a run keeps the config it began with: {folder} has {name} = {there[name]!r}, not "
                f"{here[name]!r}; drop the override, or name a new folder"
            )
        return Run(folder, saved)
    if config is None:
        raise InputError(
            f"a new run needs a config: {folder} has no config.yaml; add --config configs/lab.yaml"
        )
    run = Run(folder, config)
    _ = run.student_folder, run.teacher_folder  # a run that cannot begin leaves no folder behind
    _ = run.problems, run.heldout
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, file)
    return run


def _model_folder(source: str, name: str) -> Path:
    if not source:
        raise InputError(f"{name} must be set: it is empty; name a folder in Hugging Face format")
    folder = Path(call_named(source) if is_named(source) else source)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{name} must be a model folder in Hugging Face format: {folder} has no config.json; "
            "check the path, or download the checkpoint first"
        )
    return folder


def _problems(source: str, name: str) -> list[Problem]:
    if not source:
        raise InputError(f"{name} must be set: it is empty; name a JSON-lines file of problems")
    if not is_named(source):
        return read_problems(source)
    problems = call_named(source)
    check_problems(problems, source)
    return problems


def model_digest(folder: Path) -> str:
    """SHA-256 over a model's config and weights: which student, which teacher."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def params_digest(params: Params) -> str:
    """SHA-256 over parameters in memory: which policy, between which two updates."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()
