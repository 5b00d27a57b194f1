"""Hostile files: run folders, packed networks and weights as a stranger could send them.

Each entry spoils a whole run in one way. Whoever loads, samples, packs or exports it gets one line;
nothing that it names is called, nothing waits for ever, and nothing is written.
`tests/faults/test_hostile.py` tries them all.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tdq_exp.runtime import files, tensor_files


class Call:
    """A pickle that leaves a mark if it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


class Hostile(NamedTuple):
    """A spoilt run.

    Args:
        name: of the kind.
        spoil: (folder of the run, path that exists if anything was executed) -> None.
        words: of the answer; each of them is in it.
    """

    name: str
    spoil: Callable[[Path, Path], None]
    words: tuple[str, ...]


def _record(change: Callable[[dict[str, Any], Path], None]) -> Callable[[Path, Path], None]:
    """Return what rewrites the record of a run, as a stranger would: with a seal that is right."""

    def spoil(run: Path, mark: Path) -> None:
        content = files.read_json(run / "fit.json")
        assert content is not None
        change(content, mark)
        files.write_json(run / "fit.json", content)

    return spoil


def _config(group: str, key: str, value: Any) -> Callable[[Path, Path], None]:
    """Return what sets one node of the recorded configuration; `MARK` in it becomes the mark."""

    def change(content: dict[str, Any], mark: Path) -> None:
        content["config"][group][key] = json.loads(json.dumps(value).replace("MARK", str(mark)))

    return _record(change)


def _network(**changed: Any) -> Callable[[Path, Path], None]:
    """Return what changes arguments of the recorded network."""

    def change(content: dict[str, Any], mark: Path) -> None:
        content["config"]["model"]["definition"]["network"] |= changed

    return _record(change)


def _without(key: str) -> Callable[[Path, Path], None]:
    """Return what takes a key out of the record."""

    def change(content: dict[str, Any], mark: Path) -> None:
        del content[key]

    return _record(change)


def _text(name: str, content: bytes) -> Callable[[Path, Path], None]:
    """Return what replaces a file of the run by these bytes."""

    def spoil(run: Path, mark: Path) -> None:
        (run / name).unlink()
        (run / name).write_bytes(content)

    return spoil


def _pipe(name: str) -> Callable[[Path, Path], None]:
    """Return what replaces a file of the run by a FIFO that nobody writes to."""

    def spoil(run: Path, mark: Path) -> None:
        (run / name).unlink()
        os.mkfifo(run / name)

    return spoil


def _link(name: str, target: str) -> Callable[[Path, Path], None]:
    """Return what replaces a file of the run by a link."""

    def spoil(run: Path, mark: Path) -> None:
        (run / name).unlink()
        (run / name).symlink_to(target)

    return spoil


def _folder(name: str) -> Callable[[Path, Path], None]:
    """Return what replaces a file of the run by a folder."""

    def spoil(run: Path, mark: Path) -> None:
        (run / name).unlink()
        (run / name).mkdir()

    return spoil


def _pickle(name: str) -> Callable[[Path, Path], None]:
    """Return what replaces a file of the run by a pickle that leaves a mark."""

    def spoil(run: Path, mark: Path) -> None:
        (run / name).write_bytes(pickle.dumps(Call(mark)))

    return spoil


FOREIGN = [
    ("a process", {"_target_": "subprocess.run", "args": ["mkdir", "MARK"]}),
    ("a file", {"_target_": "builtins.open", "file": "MARK", "mode": "w"}),
    ("a folder", {"_target_": "os.mkdir", "path": "MARK"}),
    ("a pickle", {"_target_": "torch.load", "f": "MARK", "weights_only": False}),
    ("a function of ours", {"_target_": "tdq_exp.quant.quantize"}),
    ("a class of ours from elsewhere", {"_target_": "tdq_exp.data.Folder", "path": "/"}),
    ("a module", {"_target_": "tdq_exp.quant.rules.lsq.Lsq"}),
    ("a call below", {"a": [{"_target_": "os.mkdir", "path": "MARK"}]}),
]

RECORDS = [
    *(
        Hostile(f"{group} names {what}", _config(group, key, node), ("fit.json", "nothing of it"))
        for what, node in FOREIGN
        for group, key in (("plan", "plan"), ("model", "definition"))[
            : 2 if what != "a module" else 1
        ]
    ),
    Hostile(
        "a value that would be computed",
        _config("habits", "habits", "${oc.decode:'{_target_: os.mkdir, path: MARK}'}"),
        ("fit.json", "interpolations"),
    ),
    Hostile(
        "arguments by place",
        _config("plan", "plan", {"_target_": "tdq_exp.quant.Plan", "_args_": [99]}),
        ("_args_",),
    ),
    Hostile("a label that leaves", _config("model", "label", "../../x"), ("folder's name",)),
    Hostile("a network of 10^10", _network(block_out_channels=[16000, 60000]), ("GB",)),
    Hostile("a network of 10^9 layers", _network(layers_per_block=10**9), ("layers_per_block",)),
    Hostile("a network without width", _network(block_out_channels=[]), ("block_out_channels",)),
    Hostile("a misspelt network", _network(widht=3), ("widht",)),
    Hostile(
        "generators of 10^9",
        _config(
            "tdq",
            "interval",
            {"_target_": "tdq_exp.quant.TemporalIntervals", "encoding": 8, "width": 10**9},
        ),
        ("tdq.interval.width",),
    ),
    Hostile("a group that is a number", _config("model", "definition", 7), ("fit.json",)),
    Hostile("no kind of fit", _config("fit", "kind", "nope"), ("nope",)),
    Hostile("no configuration", _without("config"), ("fit.json", "config")),
    Hostile("no parts", _without("parts"), ("fit.json", "parts")),
]

FILES = [
    *(
        Hostile(f"{name} is {what}", spoil(name), (name,))
        for name in ("fit.json", "baked.safetensors")
        for what, spoil in (("a pipe", _pipe), ("a folder", _folder), ("a pickle", _pickle))
    ),
    Hostile("fit.json is a device", _link("fit.json", "/dev/zero"), ("fit.json", "device")),
    Hostile("weights are a device", _link("baked.safetensors", "/dev/zero"), ("a device",)),
    Hostile("fit.json is empty", _text("fit.json", b""), ("fit.json",)),
    Hostile("fit.json is a list", _text("fit.json", b"[]"), ("fit.json",)),
    Hostile("fit.json has no end", _text("fit.json", b"[" * 200_000), ("fit.json",)),
    Hostile("fit.json is no text", _text("fit.json", b"\xff\xfe\x00"), ("fit.json",)),
    Hostile(
        "weights with a header of 2^62 bytes",
        _text("baked.safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
        ("baked.safetensors",),
    ),
]

RUNS = [*RECORDS, *FILES]


def _state(**changed: Any) -> Callable[[Path, Path], None]:
    """Return what rewrites a training state, as a stranger would: with a checksum that is right."""

    def spoil(file: Path, mark: Path) -> None:
        state = tensor_files.read_state(file)
        assert state is not None
        tensor_files.write_state(file, {k: v for k, v in (state | changed).items() if v != GONE})

    return spoil


def _state_of_bytes(make: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    """Return what replaces a training state by bytes, which may depend on the mark's path."""

    def spoil(file: Path, mark: Path) -> None:
        file.write_bytes(make(mark))

    return spoil


def _zip_of_a_call(mark: Path) -> bytes:
    """Return a PyTorch file whose pickle leaves a mark if it is run."""
    written = io.BytesIO()
    torch.save({"fingerprint": Call(mark)}, written)
    return written.getvalue()


GONE = "gone"

# What a training goes on from. A checksum says that a state is whole, not who wrote it.
STATES = [
    Hostile("a network of other shapes", _state(net={"conv_in.weight": torch.ones(1)}), ()),
    Hostile("a network that is a text", _state(net="x"), ()),
    Hostile("averages of nothing", _state(ema={}), ()),
    Hostile("an optimiser without groups", _state(optimizer={"state": {}}), ()),
    Hostile("no optimiser", _state(optimizer=GONE), ()),
    Hostile("no random state", _state(random=GONE), ("random",)),
    Hostile("random states that are a number", _state(random=7), ()),
    Hostile("a random state of one byte", _state(random=[[torch.zeros(1, dtype=torch.uint8)]]), ()),
    Hostile("a random state of real numbers", _state(random=[[torch.zeros(5056)]]), ()),
    Hostile("an update that is a text", _state(update="x"), ()),
    Hostile("an update beyond the end", _state(update=10**9), ("update",)),
    Hostile("an update without end", _state(update=float("inf")), ("state",)),
    Hostile("an update before the beginning", _state(update=-5), ("update",)),
    Hostile("a history that is a number", _state(validation=7), ()),
    Hostile("a state of another fit", _state(fingerprint="0" * 16), ("another fit",)),
]

# Not ours at all: the training begins again, with a line.
NO_STATES = [
    Hostile("a pickle", _state_of_bytes(lambda mark: pickle.dumps(Call(mark))), ()),
    Hostile("a PyTorch file that calls", _state_of_bytes(_zip_of_a_call), ()),
    Hostile("a list", _state_of_bytes(lambda mark: b"[1]"), ()),
]


def _packed(change: Callable[[dict[str, str]], None]) -> Callable[[Path, Path], None]:
    """Return what rewrites the header of a packed network, as a stranger would: unnoticed."""

    def spoil(file: Path, mark: Path) -> None:
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        change(header["__metadata__"])
        header["__metadata__"].pop("checksum")  # files of others have none
        written = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(written)) + written + raw[8 + length :])

    return spoil


def _rule(**changed: Any) -> Callable[[Path, Path], None]:
    """Return what changes how the first packed tensor is to be undone."""

    def change(about: dict[str, str]) -> None:
        how = json.loads(about["packed"])
        key = next(key for key, rule in how.items() if "codes" in rule)
        how[key] |= changed
        about["packed"] = json.dumps(how)

    return _packed(change)


def _packed_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, Path], None]:
    """Return what changes the configuration in a packed network's header."""

    def rewrite(about: dict[str, str]) -> None:
        config = json.loads(about["config"])
        change(config)
        about["config"] = json.dumps(config)

    return _packed(rewrite)


def _foreign_plan(config: dict[str, Any]) -> None:
    config["plan"]["plan"] = {"_target_": "os.mkdir", "path": "/tmp/executed"}


def _no_header(about: dict[str, str]) -> None:
    about["packed"] = "[" * 100_000


def _other_format(about: dict[str, str]) -> None:
    about["format"] = "something else"


PACKED = [
    Hostile("names a folder", _packed_config(_foreign_plan), ("nothing of it was run",)),
    Hostile("a type that is a function", _rule(type="load"), ("packed network",)),
    Hostile("codes of 10^9 bits", _rule(codes=10**9), ("packed network",)),
    Hostile("a negative shape", _rule(shape=[-1, -8]), ("packed network",)),
    Hostile("a shape of 10^18", _rule(shape=[10**9, 10**9]), ("packed network",)),
    Hostile("codes from 10^30 on", _rule(n=10**30), ("packed network", "codes from 1000")),
    Hostile("codes from a half on", _rule(n=0.5), ("packed network", "codes from 0.5 on")),
    Hostile("codes beyond their type", _rule(n=250), ("packed network", "does not hold")),
    Hostile("a header without end", _packed(_no_header), ("packed network",)),
    Hostile("another format", _packed(_other_format), ("packed network",)),
]
