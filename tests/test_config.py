"""Settings: closed, typed, round-trip, refused with a hint."""

from pathlib import Path

import pytest

from opd_jax.config import Config, flatten
from opd_jax.errors import InputError
from opd_jax.settings import load_config, save_config

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
        (["--optimizer.learning_rate=nan"], "must be above 0"),
        (["--sampling.top_p=1.5"], r"\(0, 1\]"),
        (["--schedule.staleness=-1"], "must not be negative"),
        (["--schedule.minibatches=5"], "do not divide by 5"),
        (["--mesh.data=3"], "mesh.data x mesh.fsdp is 3"),
        (["--gate.span_minimum=200"], "at least gate.span_minimum"),
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
        ("gate: 3\n", "'gate'|gate"),
        ("gate: [\n", "is not"),
        ("", "sets none"),
        ("- 1\n", "sets none|must set"),
        ("sampling:\n  prompts: true\n", "sampling.prompts"),
        ("optimizer:\n  learning_rate: [1]\n", "learning_rate"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="check the path"):
        load_config(tmp_path / "none.yaml")


def test_every_config_of_the_repository_is_valid():
    for file in LAB.parent.iterdir():
        load_config(file)


def test_every_setting_is_read_somewhere():
    """A key that nothing reads is a trap for its user."""
    package = Path(__file__).parent.parent / "opd_jax"
    code = "\n".join(
        f.read_text() for f in package.rglob("*.py") if f.name not in ("config.py", "settings.py")
    )
    # The optimizer's are handed over whole, and `passes` is read through `updates_per_round`.
    whole = ("optimizer.", "schedule.passes")
    unread = [
        name
        for name in flatten(Config())
        if not name.startswith(whole) and f".{name.rsplit('.', 1)[-1]}" not in code
    ]
    assert not unread
