"""Tables in shares, and the job scripts of a cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tdq_exp.commands import table, table_runs

SCRIPTS = Path(__file__).parents[2] / "scripts" / "cluster"


def test_shares_are_the_whole_and_cells_of_one_run_stay_together():
    names = [("fp", 0), ("fp", 0), ("a", 0), ("a", 1), ("b", 0), ("c", 0), ("fp", 0)]
    cells = [SimpleNamespace(run=run, config={"seed": seed}) for run, seed in names]
    shares = [table_runs.share_of(cells, number, 3) for number in (1, 2, 3)]

    assert sorted(map(id, sum(shares, []))) == sorted(map(id, cells))
    folders = [{(cell.run, cell.config["seed"]) for cell in share} for share in shares]
    assert folders == [{("fp", 0), ("b", 0)}, {("a", 0), ("c", 0)}, {("a", 1)}]
    assert table_runs.share_of(cells, 9, 9) == []


def test_a_share_runs_its_cells_alone(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(table_runs, "run", lambda cells, go: asked.append(cells) or [])
    words = ["table3", "--scale", "digits", "--run", "--out", str(tmp_path)]
    assert table.main(words) == table.main([*words, "--share", "2/3"]) == 0
    whole, some = asked
    assert [c.key for c in some] == [c.key for c in table_runs.share_of(whole, 2, 3)]
    assert 0 < len(some) < len(whole)


def test_a_share_of_no_run_is_refused(capsys):
    assert table.main(["table1", "--scale", "digits", "--share", "1/2"]) == 2
    assert "--share: says which runs --run starts" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "1.5/2"])
def test_what_is_no_share_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        table.main(["table1", "--run", "--share", text])
    assert "K/N with K from 1 to N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words", "command", "job"),
    [
        (
            "table.sbatch",
            ["table1", "small", "data.limit=5"],
            "python -m tdq_exp table table1 --scale small --run --share 3/8 data.limit=5",
            "77_3",
        ),
        (
            "table.sbatch",
            ["table2"],
            "python -m tdq_exp table table2 --scale paper --run --share 3/8",
            "77_3",
        ),
        ("run.sbatch", ["bits=w4a4", "label=x"], "python -m tdq_exp.run bits=w4a4 label=x", "78"),
    ],
)
@pytest.mark.parametrize("code", [0, 1, 138])
def test_a_job_is_queued_again_where_its_state_is_saved_alone(
    tmp_path, script, words, command, job, code
):
    for tool in ("srun", "scontrol"):
        fake = tmp_path / tool
        answer = code if tool == "srun" else 0
        fake.write_text(f'#!/bin/sh\necho "{tool} $*" >> "{tmp_path}/calls"\nexit {answer}\n')
        fake.chmod(0o755)

    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "8",
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_MAX": "8",
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_JOB_ID": "78",
    }
    ended = subprocess.run(["bash", str(SCRIPTS / script), *words], env=environment)
    again = [f"scontrol requeue {job}"] if code == 138 else []
    assert ended.returncode == code
    assert (tmp_path / "calls").read_text().splitlines() == [f"srun {command}", *again]


def test_an_array_whose_numbers_are_no_shares_is_refused(tmp_path):
    environment = {
        "PATH": os.environ["PATH"],
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_ARRAY_TASK_COUNT": "2",
        "SLURM_ARRAY_TASK_MIN": "2",
        "SLURM_ARRAY_TASK_MAX": "4",
    }
    command = ["bash", str(SCRIPTS / "table.sbatch"), "table1"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "--array must be 1-N" in ended.stderr
