"""The small sweep behind configs/lab.yaml: learning rate x reuse, with and without the gate.

    .venv/bin/python scripts/sweep_lab.py runs/sweep

Every cell is a run of the lab, one training seed, judged on the held-out problems. What is finished is
kept, so the sweep can be stopped and gone on with. Writes docs/sweep_lab.json and docs/sweep_lab.md.

The rule by which the config was chosen, fixed before the gated columns were looked at: of the settings
with at least four updates a round whose drift moves Block64's weights by a percent or more somewhere
(largest weight reduction at the last update), the one whose UNGATED arms have the best mean pass@1 over
the two losses, among those that fit the demo's five minutes (eight updates a round).
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from opd_jax.backend import sum_in_one_order

sum_in_one_order()  # as the command line does, so that a cell can be repeated with opd distill

from opd_jax.commands import judge, progress
from opd_jax.evaluate import by_problem, read_answers
from opd_jax.settings import config_file, load_config
from opd_jax.study.evaluation import answers_file
from opd_jax.study.statistics import mean_interval, paired_difference
from opd_jax.study.summary import summarise
from opd_jax.train.interrupt import stop_on_signal
from opd_jax.train.loop import distill, next_part
from opd_jax.train.run import Run, open_run

# learning rate, passes, minibatches, top-p of the rollouts
SETTINGS = (
    ("1e-4", "2", "4", "1.0"),
    ("2e-4", "2", "4", "1.0"),
    ("5e-4", "2", "4", "1.0"),
    ("1e-4", "4", "4", "1.0"),
    ("2e-4", "4", "4", "1.0"),
    ("5e-4", "4", "4", "1.0"),
    ("1e-4", "2", "4", "0.9"),
)
LOSSES = ("sampled_token", "teacher_topk")
GATES = ("none", "block")


def cell(folder: Path, loss: str, gate: str, setting: tuple[str, ...]) -> Run:
    """Open one cell's run folder."""
    rate, passes, minibatches, top_p = setting
    config = load_config(
        config_file("lab.yaml"),
        [
            f"--loss.kind={loss}",
            f"--gate.segments={gate}",
            f"--optimizer.learning_rate={rate}",
            f"--schedule.passes={passes}",
            f"--schedule.minibatches={minibatches}",
            f"--sampling.top_p={top_p}",
            "--log.rows=0",
        ],
    )
    return open_run(folder / f"{loss}-{rate}-{passes}x{minibatches}-{top_p}-{gate}", config)


def main(folder: Path) -> None:
    table = []
    with stop_on_signal() as stop:
        for setting, loss in itertools.product(SETTINGS, LOSSES):
            rate, passes, minibatches, top_p = setting
            answers = {}
            for gate in GATES:
                run = cell(folder, loss, gate, setting)
                if next_part(run) != "done":
                    with progress(run, run.folder.name) as report:
                        distill(run, report, stop)
                if not answers_file(run, "student").exists():
                    judge(run, "student", run.folder.name, stop)
                answers[gate] = read_answers(answers_file(run, "student"))
                last = summarise([run.folder]).runs[0]["within_round"][-1]
                scores = {k: mean_interval(list(by_problem(answers[gate], k).values())) for k in (1, 8)}
                table.append(
                    {
                        "loss": loss,
                        "learning_rate": rate,
                        "updates": f"{passes} x {minibatches}",
                        "top-p": top_p,
                        "gate": gate,
                        "pass@1": scores[1].percent(),
                        "pass@8": scores[8].percent(),
                        "mean |d| at the last update": f"{last['drift_abs']:.4f}",
                        "effective token ratio there": f"{last['effective_token_ratio']:.4f}",
                        "weights there": f"{last['weight_min']:.3f} to {last['weight_max']:.3f}",
                        "clipped there, %": f"{100 * last['clip_fraction']:.2f}",
                    }
                )
                run.checkpoints.close()
            difference = paired_difference(*(by_problem(answers[gate], 1) for gate in ("block", "none")))
            table[-1]["block - none, pass@1"] = difference.percent()
            write(table)


def write(table: list[dict[str, str]]) -> None:
    """Write the table so far as JSON and Markdown."""
    names = [*list(table[0]), "block - none, pass@1"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(row.get(name, "") for name in names) + " |" for row in table]
    docs = Path(__file__).parent.parent / "docs"
    (docs / "sweep_lab.json").write_text(json.dumps(table, indent=1) + "\n")
    (docs / "sweep_lab.md").write_text(
        "# Sweep of the lab\n\nMade by `scripts/sweep_lab.py`. One training seed a cell; brackets are 95%\n"
        "intervals over 200 held-out problems x 8 samples and leave out the spread between seeds.\n\n"
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
