"""Wrong inputs of the verbs: one line, before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

MISSING = "--out=nowhere: no such folder"
NO_FOLDER = "--out=text: is no folder"

# Arguments, and words of the answer.
WRONG = [
    ("table table1 --scale digits --out nowhere", MISSING),
    ("table table1 --scale digits --out text", NO_FOLDER),
    ("table table1 --scale digits --run --out text", NO_FOLDER),
    ("claims --scale digits --out nowhere", MISSING),
    ("claims --scale digits --out text", NO_FOLDER),
    ("report --out nowhere", MISSING),
    ("report --out text", NO_FOLDER),
    ("status --scale digits --out text", NO_FOLDER),
    ("figure figure3 --scale digits --out text", NO_FOLDER),
    ("figure figure3 --scale nope", "--scale nope: choose one of paper"),
    ("figure figure3 --scale nope --run", "--scale nope: choose one of paper"),
    (
        "table table1 --scale digits --out empty model.weights=x.pt",
        "model.weights=x.pt: no such file or folder",
    ),
    (
        "table all --scale small --out empty model.autoencoder=~/x",
        "model.autoencoder=~/x: no such file",
    ),
    ("figure figure3 --scale digits model.weights=x.pt", "model.weights=x.pt: no such file"),
    ("figure figure3 --scale digits fit.lr=0.5", "may be measured without; add --measure"),
    ("measure mu.npz --model tiny --images 3", "--images=3: mu.npz holds mean and covariance"),
    ("verify ''", "name a run, a folder, a file or a table"),
    ("verify empty --scale small", "--scale small: is for tables only, and empty is not a table"),
    ("verify table10 --scale digits", "--scale digits: table10 has small"),
    ("verify empty", "empty: is empty, nothing was checked"),
    (
        "sample seeds --out new",
        "seeds holds no run (there is no fit.json); name one below it: seed0",
    ),
    ("sample pipe --out new", "pipe: is a file; wanted the folder of a run"),
    ("sample text --out new", "text: is a file; wanted the folder of a run"),
    ("export pipe --out new.onnx", "pipe: is a file; wanted the folder of a run"),
    ("pack pipe --out new.safetensors", "pipe: is a file; wanted the folder of a run"),
    ("pack empty --out new.bin", "--out=new.bin: must end in .safetensors"),
    ("measure one.npy --model tiny", "one.npy: a distance needs at least 2 images"),
    ("measure two.npy --model tiny --images 1", "two.npy: a distance needs at least 2 images"),
    ("measure two.npy --model tiny --json text/x.json", "--json=text: text is no folder"),
    ("measure two.npy --model tiny --json empty", "--json=empty: is a folder; name a file"),
    ("sample empty --out=~/full", "full: is not empty"),
    ("export empty --out=~/full/there.onnx", "there.onnx: exists"),
    ("pack empty --out=~/full/there.safetensors", "there.safetensors: exists"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A home folder with a pipe, a text file, an empty and a full folder, two sets of images."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "full").mkdir()
    for name in ("there.onnx", "there.safetensors"):
        (tmp_path / "full" / name).touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "seeds" / "seed0").mkdir(parents=True)
    (tmp_path / "seeds" / "seed0" / "fit.json").touch()
    (tmp_path / "text").write_text("no tensors")
    (tmp_path / "empty").mkdir()
    for name, count in (("one", 1), ("two", 2)):
        np.save(tmp_path / f"{name}.npy", np.zeros((count, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "mu.npz", mu=np.zeros(64), sigma=np.eye(64))
    return tmp_path


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[text for text, _ in WRONG])
def test_a_wrong_command_is_refused_in_one_line(arguments, words, place, inside):
    before = sorted(Path(place).rglob("*"))
    verb, *rest = ["" if text == "''" else text for text in arguments.split()]

    done = inside(*rest, verb=verb)
    assert done.returncode == 2, done.stdout
    assert words in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert sorted(Path(place).rglob("*")) == before
