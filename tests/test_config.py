"""Settings: closed, typed, round-trip, refused with a hint."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from opd_jax.config import Config, LoraSettings, flatten
from opd_jax.errors import InputError
from opd_jax.method import WEIGHTS
from opd_jax.rollout import make_rows
from opd_jax.settings import load_config, save_config
from opd_jax.study.evaluation import evaluate_run
from opd_jax.train.choices import LOSSES, SEGMENTS, bound_members
from opd_jax.train.loop import distill
from opd_jax.train.opening import open_run
from tests.conftest import tiny_config

LAB = Path(__file__).parent.parent / "configs" / "lab.yaml"


def test_defaults_are_the_papers():
    values = flatten(Config())
    assert values["optimizer.learning_rate"] == 2e-6
    assert values["loss.top_k"] == 32
    assert (values["gate.segments"], values["gate.block"], values["gate.tau"]) == ("block", 64, 1.0)
    assert (values["sampling.prompts"], values["sampling.samples"], values["schedule.passes"]) == (4, 8, 2)


def test_a_saved_config_reads_back_equal(tmp_path):
    config = load_config(LAB, ["--gate.segments=none", "--optimizer.learning_rate", "1e-5", "--seed=3"])
    assert config.gate.segments == "none"
    assert config.optimizer.learning_rate == 1e-5
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_toml_is_read_too(tmp_path):
    (tmp_path / "c.toml").write_text("[gate]\nblock = 32\n")
    assert load_config(tmp_path / "c.toml").gate.block == 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optimizer.learning_rte=1"], "nearest is optimizer.learning_rate"),
        (["--optimizer.lr=1"], "'optimizer.lr' in the command line is not"),
        (["--learning_rate=1"], "nearest is optimizer.learning_rate"),
        (["--gate.blok", "3"], "nearest is gate.block"),
        (["--gate.block=abc"], "gate.block.*abc"),
        (["--gate.block=6.5"], "6.5"),
        (["--gate.block=true"], "[Tt]rue"),
        (["--gate.segments=blocks"], "invalid choice: 'blocks'"),
        (["stray"], "stray"),
        (["--optimizer.learning_rate=0"], "must be above 0"),
        (["--optimizer.learning_rate=nan"], "finite"),
        (["--sampling.top_p=1.5"], r"\(0, 1\]"),
        (["--gate.tau=nan"], "finite"),
        (["--optimizer.learning_rate=inf"], "finite"),
        (["--gate.tau=true"], "gate.tau.*True"),
        (["--optimizer.b1=2"], r"\[0, 1\]"),
        (["--gate.clip=[2,3]"], "enclose"),
        (["--weights.members=[prun]"], "prun"),
        (["--schedule.microbatches=3"], "do not divide by 3"),
        (["--schedule.staleness=-1"], "0 or more"),
        (["--schedule.minibatches=5"], "do not divide by 5"),
        (["--mesh.data=3"], "mesh.data x mesh.fsdp x mesh.expert is 3"),
        (["--gate.span_minimum=200"], "at least gate.span_minimum"),
        (["--seed=null"], "seed is null"),
        (
            ["--sampling.stop", "</answer>"],
            r"sampling.stop is '</answer>' in the command line; write \[</answer>\]",
        ),
        (["--weights.members=tip"], r"write \[tip\]"),
        (["--gate.clip=2"], "brackets: gate.clip is 2"),
        (["--gate.clip=None"], r"write \[\], or drop it"),
        (['--sampling={"stop": "ab"}'], r"write \[ab\]|nearest"),
        (["--store.accept=[student]"], "store.accept has 'student'; write student=VALUE"),
        (["--store.accept=[temperature=1.0,student=]"], "store.accept has 'student='"),
    ],
)
def test_bad_overrides_are_refused(overrides, message):
    with pytest.raises(InputError, match=message) as error:
        load_config(LAB, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer:\n  lrr: 1\n", "'optimizer.lrr' in .*c.yaml is not"),
        ("optimiser:\n  learning_rate: 1\n", "nearest is optimizer.learning_rate"),
        ("gate: 3\n", "'gate' is 3 in .*c.yaml; nest them"),
        ("seed: 1\nseed: 2\n", "'seed' comes twice in a group of .*c.yaml, in line 1"),
        ("gate:\n  tau: 1\n  block: 2\n  tau: 3\n", "'tau' comes twice"),
        ("sampling:\n  stop: e=\n", r"write \[e=\]"),
        ("optimizer:\n  learning_rate:\n", "optimizer.learning_rate is null"),
        ("gate: [\n", "is not"),
        ("gate.block: 3\n", "write it as a group"),
        ("", "holds NoneType"),
        ("- 1\n", "holds list"),
        ("sampling:\n  prompts: true\n", "sampling.prompts"),
        ("optimizer:\n  learning_rate: [1]\n", "learning_rate"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


def test_null_is_no_value_of_a_setting_that_has_one():
    for name, value in flatten(Config()).items():
        if value is None:
            load_config(LAB, [f"--{name}=null"])
        else:
            with pytest.raises(InputError, match=re.escape(name)):
                load_config(LAB, [f"--{name}=null"])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="check the path"):
        load_config(tmp_path / "none.yaml")


def test_every_config_of_the_repository_is_valid():
    for file in LAB.parent.iterdir():
        load_config(file)


def test_every_setting_is_read(tmp_path, monkeypatch):
    """A key that nothing reads is a trap for its user: run the road and see what it asks for."""
    read = set()
    groups = {field.name: type(getattr(Config(), field.name)) for field in dataclasses.fields(Config)}
    for group, kind in {**groups, "model.lora": LoraSettings}.items():
        if dataclasses.is_dataclass(kind):
            names = {field.name for field in dataclasses.fields(kind)}

            def recording(self, name, group=group, names=names):
                # Checks, digests and writers read every key; they are no use of it.
                if name in names and sys._getframe(1).f_code.co_filename.split("/")[-1] not in (
                    "config.py",
                    "settings.py",
                    "consistency.py",
                    "dataclasses.py",
                    "<string>",  # the comparison that dataclasses write
                ):
                    read.add(f"{group}.{name}")
                return object.__getattribute__(self, name)

            monkeypatch.setattr(kind, "__getattribute__", recording, raising=False)
    named = ("--gate.map=clipped_exp", "--gate.clip=[0.5,2]", "--gate.control=random")
    run = open_run(tmp_path / "run", tiny_config("--schedule.rounds=1", "--log.diagnose_every=3", *named))
    distill(run, lambda line: None, lambda: False)
    evaluate_run(run, "base", lambda answer: None, lambda: False)
    assert open_run(tmp_path / "adapter", tiny_config("--model.lora.rank=2")).lora
    for kind in LOSSES:
        bound_members(tiny_config(f"--loss.kind={kind}"))
    for segments in ("newline", "cusum"):
        gate = tiny_config(f"--gate.segments={segments}").gate
        SEGMENTS[segments](
            make_rows([[1]], [[2, 3, 4, 5]], 4), gate, np.zeros(48, bool), np.zeros((1, 4), np.float32)
        )
    # Handed over whole to the optimizer and to the members that are named.
    read |= {name for name in flatten(Config()) if name.startswith("optimizer.")}
    members = [f"--weights.members=[{','.join(WEIGHTS)}]", "--loss.terms=[entropy_aware,reference_kl]"]
    unset = ["sg_opd_tau", "popd_start", "popd_growth", "popd_every", "f_opd_rate", "f_opd_threshold"]
    bound_members(tiny_config(*members, "--loss.kl_weight=1", *(f"--weights.{name}=1" for name in unset)))
    assert set(flatten(Config())) - read - {"seed"} == set()
