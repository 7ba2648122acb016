"""A run folder: everything one run owns, opened from its config.

config.yaml     the resolved settings
identity.json   digests of the models, the tokenizer and the problems it began with
rollouts/       what the student sampled, a folder of shards a round; elsewhere if store.at says so
scored/         the same with old log-probs and the teacher's signal
checkpoints/    training states
policies.jsonl  digests of the policies that drew, or were about to be trained
metrics.jsonl   one line an update; timings.jsonl has the wall-clock times
tokens/         drift and weight of single tokens, for the report
evaluation/     graded answers to held-out problems
policy/         the student as servers last drew with it, where servers draw
student/        the trained student in Hugging Face format, once the run is done
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.keys import stream
from opd_jax.model import Qwen3Config, load_pretrained, param_shardings, parameter_table
from opd_jax.model.config_json import read_model_config, read_stop_ids
from opd_jax.model.kernels import KernelChoice
from opd_jax.model.lora import LoraConfig, init_lora, lora_table, on_top
from opd_jax.model.parameters import Parameter
from opd_jax.model.sharding import RULES, Rules
from opd_jax.rollout.store import RolloutStore
from opd_jax.tasks import Problem, load_tokenizer, newline_table, prompting_digest, tokenizer_digest
from opd_jax.tasks.vocabulary import vocabulary_end
from opd_jax.train.checkpoint import Checkpoints
from opd_jax.train.computing import adapter_of, computed, kernel_of, mesh_of, row_width, teacher_rules
from opd_jax.train.diagnose import Diagnose, make_diagnosis
from opd_jax.train.identity import model_digest, problems_digest
from opd_jax.train.metrics import read_lines
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.residency import moved
from opd_jax.train.sources import model_folder, named_problems
from opd_jax.train.step import (
    TrainState,
    TrainStep,
    abstract_state,
    init_state,
    make_train_step,
    state_shardings,
)
from opd_jax.types import Params


def store_path(folder: Path, config: Config, name: Literal["rollouts", "scored"]) -> Path | str:
    """Where a store of a run lies: in its folder, or where ``store.at`` says."""
    return f"{config.store.at.rstrip('/')}/{name}" if config.store.at else folder / name


@dataclasses.dataclass
class Run:
    """One run, opened. Parts that a stage does not need are not loaded."""

    folder: Path
    config: Config
    writing: bool = False  # inside `exclusive`

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return mesh_of(self.config)

    # Models and text

    @functools.cached_property
    def student_folder(self) -> Path:
        return model_folder(self.config.model.student, "model.student")

    @functools.cached_property
    def teacher_folder(self) -> Path:
        return model_folder(self.config.model.teacher, "model.teacher")

    @functools.cached_property
    def model(self) -> Qwen3Config:
        """Dimensions of the student."""
        return computed(read_model_config(self.student_folder), self.config, self.mesh)

    @property
    def kernel(self) -> KernelChoice:
        """Which attention kernel computes the student's rows, and why."""
        return kernel_of(self.model, self.config, self.mesh)

    @functools.cached_property
    def teacher_model(self) -> Qwen3Config:
        """Dimensions of the teacher."""
        if tokenizer_digest(load_tokenizer(self.teacher_folder)) != self.identity["tokenizer"]:
            raise InputError(
                f"student and teacher must share one tokenizer: {self.student_folder} and "
                f"{self.teacher_folder} do not; choose models of one family"
            )
        return computed(read_model_config(self.teacher_folder), self.config, self.mesh)

    @functools.cached_property
    def base(self) -> Params:
        """The student before training: where training starts, a reference, or what an adapter stands on."""
        return self._load(self.student_folder, self.compute_dtype if self.lora else jnp.float32)

    @functools.cached_property
    def teacher(self) -> Params:
        _ = self.teacher_model
        return self._load(self.teacher_folder, self.compute_dtype, teacher_rules(self.config))

    @property
    def compute_dtype(self) -> Any:
        return jnp.dtype(self.config.model.compute_dtype)

    @functools.cached_property
    def lora(self) -> LoraConfig | None:
        return adapter_of(self.config)

    def _load(self, folder: Path, dtype: Any, rules: Rules = RULES) -> Params:
        config, params = load_pretrained(folder, mesh=self.mesh, rules=rules, dtype=dtype)
        if self.usable > config.vocab_size:
            raise InputError(
                f"a model must know every id of the tokenizer: {folder} has {config.vocab_size}, the "
                f"tokenizer {self.usable}; use the tokenizer that the model was trained with"
            )
        for name, leaf in traverse_util.flatten_dict(params).items():
            if not jnp.all(jnp.isfinite(leaf)):
                raise InputError(
                    f"weights must be finite: {'.'.join(name)} of {folder} holds NaN or infinity; "
                    "restore them"
                )
        return params

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.student_folder)

    @functools.cached_property
    def usable(self) -> int:
        """Ids that mean something are below it; a model's vocabulary may be padded beyond them."""
        return vocabulary_end(self.tokenizer)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response of the student."""
        return (*read_stop_ids(self.student_folder), *self.config.sampling.stop_ids)

    @functools.cached_property
    def problems(self) -> list[Problem]:
        return named_problems(self.config.problems.train, "problems.train")

    @functools.cached_property
    def heldout(self) -> list[Problem]:
        return named_problems(self.config.problems.heldout, "problems.heldout")

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Digests of what a run is made from; it goes on only with the same."""
        return {
            "student": model_digest(self.student_folder),
            "teacher": model_digest(self.teacher_folder),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "problems.train": problems_digest(self.problems),
            "problems.heldout": problems_digest(self.heldout),
        }

    # Stores

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What this run's rollouts belong to: the weights, the text, and how both became tokens."""
        sampling = dataclasses.asdict(self.config.sampling)
        for how_many in ("prompts", "samples", "slots"):  # which change no rollout
            del sampling[how_many]
        return {
            **{name: self.identity[name] for name in ("student", "tokenizer", "problems.train")},
            "template": prompting_digest(self.tokenizer, self.config.problems),
            **sampling,
            "seed": self.config.seed,
            "engine": self.config.engine.kind,
            # A server's raw log-probs are those of temperature 1, whatever it sampled at.
            "behaviour_logprob_temperature": 1.0
            if self.config.engine.kind == "server"
            else sampling["temperature"],
        }

    @functools.cached_property
    def rollouts(self) -> RolloutStore:
        return RolloutStore(
            store_path(self.folder, self.config, "rollouts"), self.about, self.config.store.accept
        )

    @functools.cached_property
    def scored(self) -> RolloutStore:
        # Rollouts that were accepted by name keep saying what their log-probs are of.
        kept = "behaviour_logprob_temperature"
        about = {
            **self.about,
            kept: self.rollouts.about_store.get(kept, self.about[kept]),
            "compute_dtype": self.config.model.compute_dtype,
            "teacher": self.identity["teacher"],
            "top_k": self.config.loss.top_k,
        }
        return RolloutStore(store_path(self.folder, self.config, "scored"), about, self.config.store.accept)

    # Training state

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(**dataclasses.asdict(self.config.optimizer))

    @functools.cached_property
    def _table(self) -> dict[tuple[str, ...], Parameter]:
        """The parameters that are trained: the student's, or its adapter's."""
        return lora_table(self.model, self.lora) if self.lora else parameter_table(self.model)

    @functools.cached_property
    def _shardings(self) -> TrainState:
        return state_shardings(self._table, self.optimizer, self.mesh)

    @property
    def _frozen_shardings(self) -> Any:
        return param_shardings(self.model, self.mesh) if self.lora else {}

    @property
    def frozen(self) -> Params:
        """What the trained parameters are put on top of; nothing where all are trained."""
        return self.base if self.lora else {}

    @property
    def policy(self) -> Params:
        """The student as it is now."""
        return on_top(self.frozen, self.state.params)

    def make_room(self, whose: Literal["policy", "base", "teacher", "state"]) -> None:
        """Under ``model.residency: sequential``, take everything else off the devices.

        The base student and the teacher are read again from their folders when they are needed; the
        state waits on the host.
        """
        if self.config.model.residency == "together":
            return
        student = whose in ("policy", "state")
        for name in ("base", "teacher"):
            if name != whose and not (name == "base" and self.lora and student):
                vars(self).pop(name, None)
        state, place = self.state, self._shardings
        self.state = TrainState(
            state.update,
            moved(state.params, place.params if student else None),
            moved(state.opt_state, place.opt_state if whose == "state" else None),
        )

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", writing=self.writing)

    @functools.cached_property
    def state(self) -> TrainState:
        """The newest state on disk, or the base student's.

        Raises:
          InputError: there is no state though the run has trained.
        """
        if self.checkpoints.latest is not None:
            return self.checkpoints.restore(abstract_state(self._table, self.optimizer, self._shardings))
        done = len(read_lines(self.metrics_file))
        # Before the first state is saved there is at most one round of updates.
        if done > self.config.schedule.updates_per_round:
            raise InputError(
                f"a run that has trained must have its state: {self.folder} has none in checkpoints after "
                f"{done} updates; restore it, or start a new run folder"
            )
        if self.lora:
            key = stream(self.config.seed, "adapter")
            start = init_lora(self.model, self.lora, key)
        else:
            # The step donates its state, so a base student in memory is given up to it.
            start = vars(self).pop("base", None) or self._load(self.student_folder, jnp.float32)
        return jax.device_put(init_state(start, self.optimizer), self._shardings)

    @functools.cached_property
    def train_step(self) -> TrainStep:
        newline = newline_table(self.tokenizer, self.model.vocab_size)
        return make_train_step(
            self.model,
            self.config,
            self.optimizer,
            newline,
            self._shardings,
            self.mesh,
            self._frozen_shardings,
        )

    @functools.cached_property
    def diagnose(self) -> Diagnose:
        newline = newline_table(self.tokenizer, self.model.vocab_size)
        return make_diagnosis(
            self.model,
            self.config,
            newline,
            self._shardings.params,
            self.mesh,
            self._frozen_shardings,
        )

    @property
    def width(self) -> int:
        """T: positions in a row, one number for the whole run so that every program compiles once."""
        return row_width(self.config.sampling, self.mesh.devices.flat[0].platform)

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def policies_file(self) -> Path:
        """Which policy the run had at which update, a line each: those that rollouts may be of."""
        return self.folder / "policies.jsonl"

    @property
    def timings_file(self) -> Path:
        return self.folder / "timings.jsonl"
