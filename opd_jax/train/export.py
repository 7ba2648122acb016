"""The student as it is now, in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

from opd_jax.model import save_pretrained
from opd_jax.model.config_json import read_stop_ids
from opd_jax.model.lora import merged_in_turn
from opd_jax.tasks import TOKENIZER_FILES
from opd_jax.train.run import Run


def write_policy(run: Run, folder: Path) -> None:
    """Write the student as it is now, an adapter merged, with its tokenizer; every process calls it."""
    run.make_room("policy")
    params = merged_in_turn(run.base, run.state.params, run.lora) if run.lora else run.state.params
    beside = [run.student_folder / name for name in (*TOKENIZER_FILES, "generation_config.json")]
    save_pretrained(folder, run.model, params, beside=beside, stop_ids=read_stop_ids(run.student_folder))
