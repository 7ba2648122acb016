"""The shipped models: small enough, and as good and as bad as they are said to be."""

import json

import numpy as np
import pytest

from opd_jax.lab import chains, heldout, student, teacher, train
from opd_jax.lab.chains import split_of
from opd_jax.lab.make import STUDENT, TEACHER, judge
from opd_jax.model import load_pretrained


@pytest.mark.parametrize("folder", [student(), teacher()], ids=["student", "teacher"])
def test_weights_are_small_and_in_hugging_faces_format(folder):
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).is_file()


def test_the_figures_that_the_recipe_gave():
    figures = json.loads((student().parent / "figures.json").read_text())
    assert figures["teacher"]["greedy"] >= 0.9
    assert 0.1 <= figures["student"]["pass@1"] <= 0.4
    assert figures["student"]["pass@8"] >= figures["student"]["pass@1"] + 0.2


def test_the_models_are_what_the_figures_say():
    for recipe, folder, low, high in ((TEACHER, teacher(), 0.9, 1.0), (STUDENT, student(), 0.1, 0.4)):
        config, params = load_pretrained(folder)
        assert config == recipe.config
        scores = judge(config, params, chains("heldout", 64), samples=2, greedy=False)
        assert low <= scores[1] <= high, (folder.name, scores)


def test_the_worlds_problems():
    training, held = train(), heldout()
    assert len(training) == 4096
    assert len(held) == 200
    assert {split_of(p.prompt) for p in training} == {"train"}
    assert {split_of(p.prompt) for p in held} == {"heldout"}
    assert np.ptp([p.prompt.count("+") + p.prompt.count("-") for p in held]) == 4
