"""That what a config and a model's files say of sampling reaches the sampler."""

import json
import shutil

import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.keys import stream
from opd_jax.lab import student
from opd_jax.train import engines
from opd_jax.train.opening import open_run
from tests.conftest import tiny_config


@pytest.fixture
def folder(tmp_path):
    """The lab's student with a second end of text in its generation config, as published models have."""
    shutil.copytree(student(), tmp_path / "student")
    (tmp_path / "student" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 4]}))
    return tmp_path / "student"


def engine_and_settings(tmp_path, monkeypatch, who, *overrides):
    run, told = open_run(tmp_path / "run", tiny_config(*overrides)), []
    made = engines.make_sampler
    monkeypatch.setattr(engines, "make_sampler", lambda *a, **k: told.append((a, k)) or made(*a, **k))
    drawing = run.config.sampling if who == "student" else run.config.evaluation
    engine = engines.engine_of(run, who, drawing, stream(0, "sample"))
    [((model,), settings)] = told
    return run, engine, model, settings


SET = (
    "--sampling.temperature=0.6",
    "--sampling.top_p=0.8",
    "--sampling.top_k=3",
    '--sampling.stop=["\\n"]',
    "--sampling.stop_ids=[6]",
    "--evaluation.top_k=5",
)


def test_of_the_student(folder, tmp_path, monkeypatch):
    run, engine, model, settings = engine_and_settings(
        tmp_path, monkeypatch, "student", f"--model.student={folder}", *SET
    )
    assert model is run.model
    assert settings == {
        "slots": 16,
        "max_prompt": 16,
        "max_response": 40,
        "temperature": 0.6,
        "top_p": 0.8,
        "top_k": 3,
        "usable": len(run.tokenizer),
        "stop_ids": (0, 4, 6),
        "banned": (),
    }
    assert run.stop_ids == (0, 4, 6)
    assert engine.logprob_temperature == 0.6
    ids = np.asarray(run.tokenizer("1\n2\n", add_special_tokens=False)["input_ids"])
    assert run.tokenizer.decode(ids[: engine.find_stop(ids, 0)]) == "1\n"


def test_of_the_teacher_by_its_own_files_and_the_evaluations_settings(folder, tmp_path, monkeypatch):
    run, engine, model, settings = engine_and_settings(
        tmp_path, monkeypatch, "teacher", f"--model.student={folder}", *SET
    )
    assert model is run.teacher_model
    assert (settings["temperature"], settings["top_p"], settings["top_k"]) == (1.0, 0.9, 5)
    assert settings["stop_ids"] == (0, 6)
    assert engine.find_stop is not None


def test_special_tokens_are_banned_on_request_but_for_ends(tmp_path, monkeypatch):
    # The lab's tokenizer has one special token, which ends a response.
    monkeypatch.setattr(engines, "special_ids", lambda tokenizer, ends: (9, *(20 + i for i in ends)))
    _, engine, _, settings = engine_and_settings(
        tmp_path, monkeypatch, "student", "--sampling.ban_special=true"
    )
    assert settings["banned"] == (9, 20)
    assert engine.find_stop is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--sampling.stop_ids=[999]", "stop_ids has 999"),
        ('--sampling.stop=["a",""]', "must have a character"),
        ("--sampling.top_k=-1", "top_k must be 0 or more"),
        ("--evaluation.top_k=-1", "top_k must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, monkeypatch, override, message):
    with pytest.raises(InputError, match=message):
        engine_and_settings(tmp_path, monkeypatch, "student", override)
