"""Weights arrive whole, in every form that they come in, and nothing in a file is executed.

`ddim_original.safetensors` holds what the original network (models/diffusion.py of https://github.com/ermongroup/ddim)
answers when its weights and inputs are those of `formula` and `ramp`: x [3, 3, H, H] at t = 1, 400, 999, for the
CIFAR-10 network and for a small one whose levels, blocks and attention differ from it.
"""

import copy
import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tdq_exp.models.weights import fill as checkpoints
from tdq_exp.models.weights.fill import CheckpointError, load_weights, save_weights, state_hash
from tdq_exp.models.weights.inert_pickle import Placeholder, StoredTensor, read_tensors
from tdq_exp.runtime import tensor_files
from tests.models.formula import formula, ramp

RECORDED = Path(__file__).with_name("ddim_original.safetensors")
TIMES = torch.tensor([1, 400, 999])
TOLERANCE = 1e-5

# The four options that no parameter shows, and the heads, which no parameter shows either.
SILENT = {
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "dropout": 0.1,
        **SILENT,
    },
    "small": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 96),
        "layers_per_block": 1,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
        "dropout": 0.1,
        **SILENT,
    },
}


def build(name: str, **changes) -> UNet2DModel:
    return UNet2DModel(**{**NETWORKS[name], **changes}).eval()


def original_shapes(
    channels: tuple[int, ...], blocks: int, attention: tuple[bool, ...]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original network's parameters, from its architecture."""
    shapes: dict[str, tuple[int, ...]] = {}
    width = 4 * channels[0]

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name, inputs, outputs):
        layer(f"{name}.norm1", inputs)
        layer(f"{name}.conv1", outputs, inputs, 3, 3)
        layer(f"{name}.temb_proj", outputs, width)
        layer(f"{name}.norm2", outputs)
        layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1)

    def attend(name, count):
        layer(f"{name}.norm", count)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", count, count, 1, 1)

    layer("temb.dense.0", width, channels[0])
    layer("temb.dense.1", width, width)
    layer("conv_in", channels[0], 3, 3, 3)
    levels = len(channels)
    current, skips = channels[0], [channels[0]]
    for level, outputs in enumerate(channels):
        for index in range(blocks):
            block(f"down.{level}.block.{index}", current, outputs)
            current = outputs
            if attention[level]:
                attend(f"down.{level}.attn.{index}", outputs)
            skips.append(outputs)
        if level < levels - 1:
            layer(f"down.{level}.downsample.conv", outputs, outputs, 3, 3)
            skips.append(outputs)
    block("mid.block_1", current, current)
    attend("mid.attn_1", current)
    block("mid.block_2", current, current)
    for level in reversed(range(levels)):
        for index in range(blocks + 1):
            block(f"up.{level}.block.{index}", current + skips.pop(), channels[level])
            current = channels[level]
            if attention[level]:
                attend(f"up.{level}.attn.{index}", current)
        if level > 0:
            layer(f"up.{level}.upsample.conv", current, current, 3, 3)
    layer("norm_out", current)
    layer("conv_out", 3, current, 3, 3)
    return shapes


def original_state(name: str, salt: str = "") -> OrderedDict[str, torch.Tensor]:
    network = NETWORKS[name]
    attention = tuple(kind.startswith("Attn") for kind in network["down_block_types"])
    shapes = original_shapes(network["block_out_channels"], network["layers_per_block"], attention)
    return OrderedDict((key, formula(key + salt, shape)) for key, shape in shapes.items())


def answer(net: UNet2DModel, samples: slice = slice(None)) -> torch.Tensor:
    """The network's output for the recorded inputs."""
    side = net.config["sample_size"]
    x = ramp("x", 9 * side * side).float().reshape(3, 3, side, side)
    with torch.no_grad():
        return net(x[samples], TIMES[samples]).sample


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(RECORDED)


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> UNet2DModel:
    """The CIFAR-10 network, filled from a file of the original."""
    path = tmp_path_factory.mktemp("original") / "model-790000.ckpt"
    torch.save(original_state("cifar10"), path)
    net = build("cifar10")
    load_weights(net, str(path))
    path.unlink()
    return net


@pytest.fixture(scope="module")
def small() -> UNet2DModel:
    """A small network to copy, with weights of its own."""
    torch.manual_seed(0)
    return build("small")


@pytest.fixture(scope="module")
def raw() -> OrderedDict[str, torch.Tensor]:
    return original_state("small")


@pytest.fixture(scope="module")
def expected(small, raw, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The small network's state in diffusers' names; `test_answers_as_the_original` says that it is the right one."""
    path = tmp_path_factory.mktemp("expected") / "net.ckpt"
    torch.save(raw, path)
    net = copy.deepcopy(small)
    load_weights(net, str(path))
    return net.state_dict()


def fails(net: torch.nn.Module, source: Path | str, **options) -> str:
    """The one line with which a load is refused; the network must be as it was."""
    before = state_hash(net.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_weights(net, str(source), **options)
    message = str(caught.value)
    assert "\n" not in message and str(source) in message
    assert state_hash(net.state_dict()) == before
    return message


# The original network


def test_the_cifar10_network_has_the_known_size(filled):
    assert sum(parameter.numel() for parameter in filled.parameters()) == 35_746_307


def test_answers_as_the_original(filled, recorded):
    error = (answer(filled) - recorded["cifar10"]).abs().amax(dim=(1, 2, 3))
    assert error.max() < TOLERANCE, error


def test_answers_as_the_original_with_other_levels(small, raw, recorded, tmp_path):
    net = copy.deepcopy(small)
    torch.save(raw, tmp_path / "net.ckpt")
    load_weights(net, str(tmp_path / "net.ckpt"))
    assert (answer(net) - recorded["small"]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("norm_eps", 1e-5),
        ("downsample_padding", 1),
        ("flip_sin_to_cos", True),
        ("freq_shift", 0),
        ("attention_head_dim", 8),
    ],
)
def test_the_recording_catches_each_silent_option(filled, recorded, option, wrong):
    with torch.device("meta"):
        net = build("cifar10", **{option: wrong})
    net.load_state_dict(filled.state_dict(), strict=True, assign=True)
    error = (answer(net, slice(1, 2)) - recorded["cifar10"][1:2]).abs().max()
    assert error > 10 * TOLERANCE


# The forms of a file


def prefixed(state):
    return OrderedDict((f"module.{key}", value) for key, value in state.items())


def training_state(raw, ema=None):
    moments = {
        "state": {0: {"step": 7, "exp_avg": torch.ones(3)}},
        "param_groups": [{"lr": 2e-4, "params": [0]}],
    }
    return [prefixed(raw), moments, 3, 790000] + ([] if ema is None else [ema])


FORMS = {
    "plain": lambda state, path: torch.save(state, path / "net.ckpt"),
    "plain dict": lambda state, path: torch.save(dict(state), path / "net.ckpt"),
    "legacy": lambda state, path: torch.save(
        state, path / "net.ckpt", _use_new_zipfile_serialization=False
    ),
    "data-parallel": lambda state, path: torch.save(prefixed(state), path / "net.ckpt"),
    "parameters": lambda state, path: torch.save(
        {key: torch.nn.Parameter(value) for key, value in state.items()}, path / "net.ckpt"
    ),
    "wrapped": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path / "net.ckpt"),
    "training": lambda state, path: torch.save(
        training_state(original_state("small", "raw"), state), path / "net.ckpt"
    ),
    "training, data-parallel": lambda state, path: torch.save(
        training_state(original_state("small", "raw"), dict(prefixed(state))), path / "net.ckpt"
    ),
    "training, legacy": lambda state, path: torch.save(
        training_state(original_state("small", "raw"), state),
        path / "net.ckpt",
        _use_new_zipfile_serialization=False,
    ),
    "unused logvar": lambda state, path: torch.save(
        {**state, "logvar": torch.zeros(1000)}, path / "net.ckpt"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_original_gives_the_same_weights(small, raw, expected, tmp_path, form):
    FORMS[form](raw, tmp_path)
    net = copy.deepcopy(small)
    assert load_weights(net, str(tmp_path / "net.ckpt")) == state_hash(expected)
    assert state_hash(net.state_dict()) == state_hash(expected)


def first_diffusers_names(state):
    names = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }
    renamed = {}
    for key, value in state.items():
        for new, old in names.items():
            key = key.replace(new, old)
        renamed[key] = value
    return renamed


def folder_of(net, path, state, binary=False, subfolder=""):
    """A diffusers folder with the network's config and the state's weights."""
    place = path / "folder" / subfolder
    net.save_config(place)
    if binary:
        torch.save(state, place / "diffusion_pytorch_model.bin")
    else:
        save_file(state, place / "diffusion_pytorch_model.safetensors")
    return path / "folder"


def file_of(path, state):
    if path.suffix == ".safetensors":
        save_weights(state, path, {})
    else:
        torch.save(state, path)
    return path


DIFFUSERS_FORMS = {
    "safetensors": lambda net, state, path: file_of(path / "net.safetensors", state),
    "PyTorch file": lambda net, state, path: file_of(path / "net.pt", state),
    "folder": lambda net, state, path: folder_of(net, path, state),
    "folder, .bin": lambda net, state, path: folder_of(net, path, state, binary=True),
    "pipeline": lambda net, state, path: folder_of(net, path, state, subfolder="unet"),
    "first names": lambda net, state, path: folder_of(
        net, path, first_diffusers_names(state), binary=True
    ),
}


@pytest.mark.parametrize("form", DIFFUSERS_FORMS)
def test_every_form_of_diffusers_gives_the_same_weights(small, expected, tmp_path, form):
    source = DIFFUSERS_FORMS[form](small, expected, tmp_path)
    net = copy.deepcopy(small)
    assert load_weights(net, str(source)) == state_hash(expected)
    assert state_hash(net.state_dict()) == state_hash(expected)


def test_diffusers_own_folder(small, tmp_path):
    small.save_pretrained(tmp_path)
    net = build("small")
    assert (
        load_weights(net, str(tmp_path))
        == state_hash(small.state_dict())
        == state_hash(net.state_dict())
    )


def test_raw_weights_on_request(small, raw, tmp_path):
    torch.save(training_state(raw, original_state("small", "ema")), tmp_path / "ckpt.pth")
    torch.save(raw, tmp_path / "raw.ckpt")
    net = copy.deepcopy(small)
    ema_hash = load_weights(net, str(tmp_path / "ckpt.pth"))
    raw_hash = load_weights(net, str(tmp_path / "ckpt.pth"), ema=False)
    assert raw_hash == load_weights(net, str(tmp_path / "raw.ckpt")) != ema_hash


def test_a_training_state_without_ema_is_not_taken_for_one(small, raw, tmp_path):
    torch.save(training_state(raw), tmp_path / "ckpt.pth")
    assert "ema=False" in fails(small, tmp_path / "ckpt.pth")
    load_weights(copy.deepcopy(small), str(tmp_path / "ckpt.pth"), ema=False)


@pytest.mark.parametrize("key", ["state_dict_ema", "ema", "average"])
def test_averages_beside_a_state_dict_are_not_passed_over(small, raw, tmp_path, key):
    averages = {"shadow": list(raw.values())} if key == "ema" else raw
    tree = {"state_dict": raw, key: averages, "ema_decay": 0.999, "optimizer": {"state": {}}}
    torch.save(tree, tmp_path / "net.ckpt")
    with pytest.raises(CheckpointError, match=rf"averages beside its state_dict \({key}\)"):
        load_weights(small, str(tmp_path / "net.ckpt"))
    load_weights(copy.deepcopy(small), str(tmp_path / "net.ckpt"), ema=False)


def test_half_precision_is_cast_to_the_networks_type(small, raw, tmp_path):
    torch.save({key: value.half() for key, value in raw.items()}, tmp_path / "net.ckpt")
    net = copy.deepcopy(small)
    assert load_weights(net, str(tmp_path / "net.ckpt")) == state_hash(net.state_dict())
    assert torch.equal(net.conv_in.weight, raw["conv_in.weight"].half().float())


def test_views_of_one_storage(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    torch.save(
        {"a": base.t(), "b": base[1], "empty": torch.empty(0), "scalar": torch.tensor(3)},
        tmp_path / "views.pt",
    )
    read = read_tensors(tmp_path / "views.pt", lambda tree: tree)
    assert torch.equal(read["a"], base.t()) and torch.equal(read["b"], base[1])
    assert read["empty"].shape == (0,) and read["scalar"].item() == 3


def test_a_tensor_that_is_kept_as_its_negative_is_refused(tmp_path):
    torch.save({"a": torch._neg_view(torch.ones(2)), "b": torch.ones(2)}, tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt", lambda tree: {"b": tree["b"]})
    assert torch.equal(found["b"], torch.ones(2))
    with pytest.raises(CheckpointError, match="is kept as its negative or its conjugate"):
        read_tensors(tmp_path / "a.pt", lambda tree: tree)


# Every key is accounted for


def changed(raw, **changes):
    state = dict(raw)
    for key, value in changes.items():
        state.pop(key.replace("__", "."), None)
        if value is not None:
            state[key.replace("__", ".")] = value
    return state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_out__weight": None}, ["1 missing", "conv_norm_out.weight"]),
        ({"up__0__block__0__conv1__bias": None}, ["1 missing", "up_blocks.2.resnets.0.conv1.bias"]),
        ({"mid__extra": torch.zeros(2)}, ["1 left over", "mid.extra"]),
        (
            {"up__0__block__9__conv1__bias": torch.zeros(2)},
            ["1 left over", "up_blocks.2.resnets.9.conv1.bias"],
        ),
        ({"conv_in__bias": torch.zeros(31)}, ["1 misshapen", "conv_in.bias [31], wanted [32]"]),
        (
            {"mid__attn_1__q__weight": torch.zeros(96, 96, 3, 3)},
            ["1 misshapen", "to_q.weight [96, 96, 3, 3]"],
        ),
        (
            {"conv_in__bias": torch.zeros(32, dtype=torch.int64)},
            ["1 mistyped", "conv_in.bias torch.int64"],
        ),
        ({"conv_in__bias": "text"}, ["no tensors", "conv_in.bias"]),
        (
            {"conv_in__bias": None, "conv_out__bias": None, "c": torch.ones(1)},
            ["2 missing", "1 left over"],
        ),
    ],
)
def test_a_key_that_does_not_fit_is_named(small, raw, tmp_path, change, words):
    torch.save(changed(raw, **change), tmp_path / "net.ckpt")
    message = fails(small, tmp_path / "net.ckpt")
    assert all(word in message for word in words), message


def test_two_names_for_one_weight(small, expected, tmp_path):
    state = {**expected, "mid_block.attentions.0.query.bias": torch.zeros(96)}
    save_weights(state, tmp_path / "net.safetensors", {})
    assert "two keys for mid_block.attentions.0.to_q.bias" in fails(
        small, tmp_path / "net.safetensors"
    )


@pytest.mark.parametrize(
    "tree", [3, [1, 2], {"state_dict": 3}, {1: torch.ones(1)}, [{}, {}, 0, 0, torch.ones(1)]]
)
def test_a_file_without_a_state_dict(small, tmp_path, tree):
    torch.save(tree, tmp_path / "net.ckpt")
    fails(small, tmp_path / "net.ckpt")


# A folder's config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_eps", 1e-5),
        ("downsample_padding", 1),
        ("flip_sin_to_cos", True),
        ("freq_shift", 0),
        ("attention_head_dim", 8),
        ("block_out_channels", [32, 64, 64]),
        ("up_block_types", ["UpBlock2D", "UpBlock2D", "UpBlock2D"]),
        ("sample_size", 64),
        ("_class_name", "UNet2DConditionModel"),
        ("new_option", "on"),
    ],
)
def test_a_config_that_disagrees_is_named(small, expected, tmp_path, key, value):
    folder = folder_of(small, tmp_path, expected)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    message = fails(small, folder)
    assert f"{key} is {value}, wanted" in message


def test_a_config_that_is_silent_means_the_default(small, expected, tmp_path):
    folder = folder_of(small, tmp_path, expected)
    config = json.loads((folder / "config.json").read_text())
    del config["freq_shift"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "freq_shift is 0, wanted 1" in fails(small, folder)


def test_a_config_may_differ_where_weights_mean_the_same(small, expected, tmp_path):
    folder = folder_of(small, tmp_path, expected)
    config = json.loads((folder / "config.json").read_text())
    blocks = [f"UNetRes{kind}" for kind in config["down_block_types"]]
    config |= {
        "dropout": 0.0,
        "sample_size": None,
        "decay": 0.9999,
        "down_block_types": blocks,
        "future": None,
    }
    del config["act_fn"]
    (folder / "config.json").write_text(json.dumps(config))
    load_weights(copy.deepcopy(small), str(folder))


def test_an_incomplete_folder(small, expected, tmp_path):
    folder = folder_of(small, tmp_path, expected)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert "diffusion_pytorch_model.bin" in fails(small, folder)
    (folder / "config.json").write_text("[1, 2")
    assert "config.json" in fails(small, folder)
    (folder / "config.json").unlink()
    assert "config.json" in fails(small, folder)


# The hub


def hub(folder, offline=False):
    """A download that knows the files of one local folder."""

    def download(repository, name, subfolder=None):
        path = Path(folder, subfolder or "", name)
        if offline or not path.exists():
            raise (
                LocalEntryNotFoundError("no connection")
                if offline
                else checkpoints.EntryNotFoundError("no entry")
            )
        return str(path)

    return download


@pytest.mark.parametrize(("binary", "subfolder"), [(False, ""), (True, ""), (True, "unet")])
def test_weights_of_the_hub(small, expected, tmp_path, monkeypatch, binary, subfolder):
    folder = folder_of(small, tmp_path, expected, binary, subfolder)
    monkeypatch.setattr(checkpoints, "hf_hub_download", hub(folder))
    assert load_weights(copy.deepcopy(small), "google/ddpm-cifar10-32") == state_hash(expected)


def test_a_hub_out_of_reach(small, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "hf_hub_download", hub(tmp_path, offline=True))
    message = fails(small, "google/ddpm-cifar10-32")
    assert "can't be reached" in message and "model.weights=PATH" in message


def test_a_connection_that_breaks(small, monkeypatch):
    def download(*_, **__):
        raise ConnectionError("broken\npipe")

    monkeypatch.setattr(checkpoints, "hf_hub_download", download)
    assert "model.weights=PATH" in fails(small, "google/ddpm-cifar10-32")


def test_an_id_without_a_network(small, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "hf_hub_download", hub(tmp_path))
    assert "no diffusers network" in fails(small, "google/ddpm-cifar10-32")


@pytest.mark.parametrize(
    "source", ["weights/net.ckpt", "/nowhere/weights", "net.safetensors", "a/b/c"]
)
def test_a_missing_path_never_asks_the_hub(small, monkeypatch, source):
    monkeypatch.setattr(checkpoints, "hf_hub_download", None)
    assert "no such file" in fails(small, source)


# Nothing executes


def payloads(path):
    """Pickles that make the folder `path` when Python reads them, by each opcode that can call."""
    name = str(path).encode()
    make = f"__import__('os').mkdir({str(path)!r})".encode()
    return {
        "reduce": b"cos\nmkdir\n(V" + name + b"\ntR.",
        "inst": b"(V" + name + b"\nios\nmkdir\n.",
        "obj": b"(cos\nmkdir\nV" + name + b"\no.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93V" + name + b"\n\x85R.",
        "dotted name": b"\x80\x04\x8c\x06shutil\x8c\x08os.mkdir\x93V" + name + b"\n\x85R.",
        "eval": b"c__builtin__\neval\n(V" + make + b"\ntR.",
        "getattr": b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(Vos\ntRVmkdir\ntR(V"
        + name
        + b"\ntR.",
        "inside a list": b"(lp0\ncos\nmkdir\n(V" + name + b"\ntRa.",
        "ran at the state": b"cfunctools\npartial\n(cos\nmkdir\ntR(cos\nmkdir\n(V"
        + name
        + b"\nt}Ntb(tR.",
    }


def zip_file(path, pickled, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, content in storages:
            archive.writestr(f"archive/data/{key}", content)


@pytest.mark.parametrize("kind", payloads(Path()))
def test_a_pickle_that_calls_is_not_obeyed(small, tmp_path, kind):
    sentinel = tmp_path / "sentinel"
    payload = payloads(sentinel)[kind]
    pickle.loads(payload)
    assert sentinel.is_dir(), "the payload must work, or the test says nothing"
    sentinel.rmdir()

    zip_file(tmp_path / "zip.ckpt", payload)
    fails(small, tmp_path / "zip.ckpt")
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
    for position in range(len(parts)):
        path = tmp_path / f"legacy{position}.ckpt"
        path.write_bytes(b"".join([*parts[:position], payload, *parts[position + 1 :]]))
        fails(small, path)
    (tmp_path / "bare.ckpt").write_bytes(payload)
    fails(small, tmp_path / "bare.ckpt")
    assert not sentinel.exists()


class Callback:
    """An object of a package that isn't there when the file is read; every way of making it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __new__(cls, path=None):
        if path is None:  # what a pickle calls
            Callback.trace.mkdir()
        return super().__new__(cls)

    def __setstate__(self, state):
        Callback.trace.mkdir(exist_ok=True)

    trace: Path


class Shell:
    """What a hostile file holds: rebuilding it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"mkdir {self.path}",)


class Items(dict):
    """A dict of a class of its own, with items and attributes."""


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("kind", ["command", "unknown class"])
def test_weights_beside_a_strange_object(small, raw, expected, tmp_path, kind, new_format):
    sentinel = tmp_path / "sentinel"
    Callback.trace = sentinel
    strange = Shell(sentinel) if kind == "command" else Callback(3)
    pickle.loads(pickle.dumps(strange))
    assert sentinel.is_dir(), "the object must work, or the test says nothing"
    sentinel.rmdir()

    items = Items(a=1)
    items.more = torch.ones(2)
    extras = {
        "callbacks": {type(strange): strange},
        "items": items,
        "set": {1, strange},
        "list": [strange] * 3,
    }
    content = {
        **extras,
        "state_dict": raw,
        "hyperparameters": torch.float32,
        "size": torch.Size([3]),
    }
    torch.save(content, tmp_path / "net.ckpt", _use_new_zipfile_serialization=new_format)
    assert load_weights(copy.deepcopy(small), str(tmp_path / "net.ckpt")) == state_hash(expected)
    assert not sentinel.exists()

    torch.save(
        {**raw, "extra": strange}, tmp_path / "net.ckpt", _use_new_zipfile_serialization=new_format
    )
    assert "extra" in fails(small, tmp_path / "net.ckpt")
    assert not sentinel.exists()


def test_what_a_file_says_becomes_of_what_kind(tmp_path):
    seen = {}

    def pick(tree):
        seen.update(tree)
        return {}

    numbers = {"epoch": 3, "rate": 2e-4, "names": ["a"], "flag": True, "none": None}
    torch.save(
        {**numbers, "weight": torch.ones(2), "callback": Callback(3), "class": Callback},
        tmp_path / "x.ckpt",
    )
    assert read_tensors(tmp_path / "x.ckpt", pick) == {}
    assert {key: seen[key] for key in numbers} == numbers
    assert isinstance(seen["weight"], StoredTensor) and isinstance(seen["callback"], Placeholder)
    assert issubclass(seen["class"], Placeholder) and seen["class"].origin.endswith(".Callback")


def test_a_file_can_not_change_what_the_reader_uses(small, raw, tmp_path):
    """State for the classes and objects of the reader: refused or dropped, and never seen by the next file."""
    hostile = {
        "class": b"ccollections\nOrderedDict\n(N}Vitems\nI3\nstb.",
        "tensor class": b"ctorch._utils\n_rebuild_tensor_v2\n(N}Vread\nI3\nstb.",
        "parameter class": b"ctorch._utils\n_rebuild_parameter\n(N}V__new__\nI3\nstb.",
        "dtype": b"ctorch\nFloatStorage\n(N}Vitemsize\nI3\nstb.",
        "dict": b"ccollections\nOrderedDict\n(tR}Vitems\nI3\nsb.",
        "empty tensor": b"\x80\x02}Vconv_in.bias\nctorch._utils\n_rebuild_tensor_v2\n)\x81s.",
    }
    for kind, payload in hostile.items():
        zip_file(tmp_path / f"{kind}.ckpt", payload)
        fails(small, tmp_path / f"{kind}.ckpt")
    torch.save(raw, tmp_path / "net.ckpt")
    load_weights(copy.deepcopy(small), str(tmp_path / "net.ckpt"))


def stored(numel, offset, shape, stride, kind=b"FloatStorage"):
    """The pickle of {"x": tensor} over a storage with key 0."""
    storage = b"(Vstorage\nctorch\n" + kind + b"\nV0\nVhere\nI%d\ntQ" % numel
    sizes = b"".join(b"(" + b"".join(b"I%d\n" % n for n in part) + b"t" for part in (shape, stride))
    return (
        b"}Vx\nctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"I%d\n" % offset
        + sizes
        + b"I00\n}tRs."
    )


def test_a_tensor_stays_inside_its_storage(tmp_path):
    content = struct.pack("<4f", 1, 2, 3, 4)
    path = tmp_path / "x.ckpt"
    zip_file(path, stored(4, 1, [3], [1]), [("0", content)])
    assert read_tensors(path, dict)["x"].tolist() == [2, 3, 4]
    for pickled in (
        stored(4, 2, [3], [1]),
        stored(4, 0, [3], [2]),
        stored(4, -1, [3], [1]),
        stored(4, 0, [2], [-1]),
        stored(5, 0, [3], [1]),
        stored(10**15, 0, [3], [1]),
        stored(-4, 0, [3], [1]),
        stored(4, 0, [3], [1], b"QInt8Storage"),
    ):
        zip_file(path, pickled, [("0", content)])
        with pytest.raises(CheckpointError, match="x.ckpt"):
            read_tensors(path, dict)


# Damaged and missing files


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("keep", [0.0, 1e-5, 0.01, 0.5, 0.9999])
def test_a_truncated_file(small, raw, expected, tmp_path, form, keep):
    path = tmp_path / ("net.safetensors" if form == "safetensors" else "net.ckpt")
    if form == "safetensors":
        save_weights(expected, path, {})
    else:
        torch.save(raw, path, _use_new_zipfile_serialization=form == "zip")
    os.truncate(path, int(keep * path.stat().st_size))
    assert "empty" in fails(small, path) or keep > 0


@pytest.mark.parametrize("name", ["net.ckpt", "net.safetensors", "net.bin"])
@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html>\n<html>404</html>\n",
        b"\0" * 64,
        b"PK\x03\x04",
        b"\x80\x02K\x01.",
        b"\x80\x02N.",
        b"{}",
        b".",
    ],
)
def test_something_else(small, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    fails(small, tmp_path / name)


def test_a_flipped_bit_in_the_weights(small, raw, tmp_path):
    path = tmp_path / "net.ckpt"
    torch.save(raw, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "CRC" in fails(small, path)


def test_a_compressed_archive_is_not_opened(small, raw, tmp_path):
    torch.save(raw, tmp_path / "net.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "net.ckpt") as archive,
        zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert "compressed" in fails(small, tmp_path / "packed.ckpt")


# Hash and save


def test_the_hash_is_its_definition():
    state = {
        "b": torch.arange(6).reshape(2, 3).t(),
        "a": torch.tensor(1.5),
        "c": torch.ones(2, dtype=torch.bfloat16),
    }
    definition = hashlib.sha256()
    definition.update(b"a torch.float32 []\n" + struct.pack("<f", 1.5))
    definition.update(b"b torch.int64 [3, 2]\n" + struct.pack("<6q", 0, 3, 1, 4, 2, 5))
    definition.update(b"c torch.bfloat16 [2]\n" + b"\x80\x3f" * 2)
    assert state_hash(state) == definition.hexdigest()[:16]
    assert state_hash(dict(reversed(state.items()))) == state_hash(state)


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(6)},
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(6).double()},
        {"a": -torch.zeros(6)},
        {},
    ],
)
def test_the_hash_sees_name_shape_type_and_bytes(other):
    assert state_hash(other) != state_hash({"a": torch.zeros(6)})


def test_saved_weights_come_back_with_their_metadata(small, tmp_path):
    path = tmp_path / "new" / "net.safetensors"
    metadata = {
        "name": "small",
        "source": 'naïve "quotes"\n',
        **{str(index): "x" for index in range(20)},
    }
    save_weights(small, path, metadata)
    net = build("small")
    assert load_weights(net, str(path)) == state_hash(small.state_dict())
    with safe_open(path, "pt") as opened:
        said = opened.metadata()
        assert said.pop("checksum").startswith("sha256:") and said == metadata
    assert os.listdir(path.parent) == ["net.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode

    first = path.read_bytes()
    save_weights(small.state_dict(), path, dict(reversed(metadata.items())))
    assert path.read_bytes() == first


def test_an_interrupted_save_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    save_weights(small, path, {})
    before = path.read_bytes()

    def interrupted(form, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_files, "struct", SimpleNamespace(pack=interrupted))
    with pytest.raises(KeyboardInterrupt):
        save_weights(small, path, {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.safetensors"]
