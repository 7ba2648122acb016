"""A run asks as its settings say: in what it samples, in what it evaluates, and in what it refuses."""

import json
import sys

import pytest

from opd_jax.errors import InputError
from opd_jax.evaluate import answers
from opd_jax.study.evaluation import answers_file, evaluate_run
from opd_jax.tasks import prompt_ids, prompting_digest
from opd_jax.train.loop import do_part
from opd_jax.train.opening import open_run
from tests.conftest import tiny_config
from tests.train.conftest import ignore, never

ASKS = (
    "--problems.instruction=+",
    "--sampling.max_prompt=18",
    "--sampling.prompts=2",
    "--evaluation.samples=1",
)


def test_the_instruction_is_asked_wherever_a_problem_is(tmp_path, monkeypatch):
    run = open_run(tmp_path / "run", tiny_config(*ASKS))
    do_part(run, "sample", ignore, never)
    asked = {problem.id: problem.prompt for problem in run.problems}
    for rollout in run.rollouts.read(0):
        assert run.tokenizer.decode(rollout.prompt_ids.tolist()) == f"{asked[rollout.problem]}\n+"
    seen = []

    def spy(tokenizer, text, how):
        seen.append(how.instruction)
        return prompt_ids(tokenizer, text, how)

    monkeypatch.setattr(sys.modules[answers.__module__], "prompt_ids", spy)
    evaluate_run(run, "base", lambda answer: None, never)
    assert set(seen) == {"+"}
    told = json.loads(answers_file(run, "base").with_suffix(".json").read_text())
    assert told["prompting"] == prompting_digest(run.tokenizer, run.config.problems)


def test_prompts_are_measured_as_they_are_asked(tmp_path):
    with pytest.raises(InputError, match="raise sampling.max_prompt"):
        open_run(tmp_path / "long", tiny_config("--problems.instruction=++++++++++++"))
    with pytest.raises(InputError, match="the tokenizer has none"):
        open_run(tmp_path / "chat", tiny_config("--problems.template=chat"))
    assert not (tmp_path / "long").exists()


def test_settings_that_nothing_would_read_are_refused():
    for setting in ("--problems.thinking=false", "--problems.system=s"):
        with pytest.raises(InputError, match="are of chat templates"):
            tiny_config(setting)
