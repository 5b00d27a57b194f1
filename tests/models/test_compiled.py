"""Blocks compiled for training: the same gradients, and a loud way back."""

from __future__ import annotations

import copy
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from tdq_exp.fit.checkpoint import FIXED, save_state, state_of_fit
from tdq_exp.models.compiled import CompiledBlocks, blocks_to_compile
from tdq_exp.quant.intervals.temporal import GeneratorBank
from tdq_exp.runtime.graphs import no_collection
from tdq_exp.runtime.options import LauncherOptions
from tests.quant.builders import inputs, load_model, make_net, make_recipe, randn, start_quickly

DEVICES = [("cpu", "aot_eager"), pytest.param(("cuda", "inductor"), marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    """A network of one level with TDQ, while training."""
    level = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    recipe = make_recipe("lsq", "temporal")
    net = make_net(recipe, calibrated=False, block_out_channels=[8], **level)
    start_quickly(net)
    return net.train()


def one_of_each_kind(net: nn.Module) -> list[nn.Module]:
    """The last residual and the last attention block."""
    blocks = {type(block).__name__: block for block in blocks_to_compile(net)}
    assert blocks.keys() == {"ResnetBlock2D", "Attention"}
    return list(blocks.values())


def gradients(net: nn.Module, device: str = "cpu", seed: int = 1) -> list[torch.Tensor]:
    """Gradients of the model's loss."""
    x, t = (tensor.to(device) for tensor in inputs(4, seed))
    net.zero_grad()
    load_model("tiny").training_loss(net, x, t, randn(*x.shape, seed=7).to(device)).backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("where", DEVICES, ids=lambda where: where[0])
def test_compiled_blocks_have_the_gradients_of_plain_ones(quantized, where, monkeypatch):
    device, backend = where
    if device == "cpu":  # one of each kind, for each takes a second
        monkeypatch.setattr("tdq_exp.models.compiled.blocks_to_compile", one_of_each_kind)
    plain, net = (copy.deepcopy(quantized).to(device) for _ in range(2))
    names = list(net.state_dict())
    compiled = CompiledBlocks(net, backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="launcher.compile")
        compiled.try_out(partial(gradients, net, device))

    assert compiled.active and list(net.state_dict()) == names
    assert all(block._compiled_call_impl is not None for block in compiled._blocks)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in (1, 2):  # other samples need nothing new
        for a, b in zip(gradients(net, device, seed), gradients(plain, device, seed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0

    # Generators were evaluated once for all blocks, and learn through them.
    bank = next(m for m in net.modules() if isinstance(m, GeneratorBank))
    assert bank.time.kept[0] is bank and all(p.grad.abs().sum() > 0 for p in bank.parameters())


def test_blocks_that_do_not_compile_run_as_they_were(quantized):
    def broken(graph, example):
        raise RuntimeError("no compiler\nand more")

    net = copy.deepcopy(quantized)
    compiled = CompiledBlocks(net, broken)
    with pytest.warns(
        UserWarning, match="launcher.compile=true: .* without compiling.*no compiler"
    ):
        compiled.try_out(partial(gradients, net))
    assert not compiled.active
    for a, b in zip(gradients(net), gradients(quantized), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    compiled.try_out(pytest.fail)  # not tried again


def test_a_pass_that_fails_to_compile_leaves_no_graph(quantized):
    """Its error holds itself, as a compiler's may; one that is alive ties leaves to its stream."""
    net, graphs = copy.deepcopy(quantized), []

    def fail() -> None:
        loss = sum(p.sum() for p in net.parameters())
        graphs.append(weakref.ref(loss))
        error = RuntimeError("no compiler")
        raise error

    compiled = CompiledBlocks(net, "aot_eager")
    with no_collection(), pytest.warns(UserWarning, match="RuntimeError: no compiler"):
        compiled.try_out(fail)
        assert graphs[0]() is None


def test_compiling_uses_no_graph_of_an_earlier_pass(quantized):
    net = copy.deepcopy(quantized)
    compiled = CompiledBlocks(net, "aot_eager")
    bank = next(m for m in net.modules() if isinstance(m, GeneratorBank))
    bank.time.set(torch.tensor([3, 5]))
    bank.time.kept = (bank, bank.step_sizes())
    graph = weakref.ref(bank.time.kept[1])
    with no_collection():
        compiled.try_out(lambda: None)
        assert graph() is None


def test_a_network_without_blocks_and_what_can_not_be_combined_are_refused():
    with pytest.raises(ValueError, match="launcher.compile=true: Linear has no such blocks"):
        CompiledBlocks(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="launcher.compile=true: not together with"):
        LauncherOptions(compile=True, recompute=True).check()


def test_a_training_keeps_its_compiler(tmp_path):
    path, usual = tmp_path / "state.pt", {"micro_batches": 1, "compile": False}
    assert usual.keys() == FIXED.keys()
    save_state(path, {"fingerprint": "a", "random": [0]})  # as it was before there was a choice
    assert state_of_fit(path, "a", 1, usual) == path
    with pytest.raises(ValueError, match="begun with launcher.compile=false, now true"):
        state_of_fit(path, "a", 1, {**usual, "compile": True})
