"""A recorded training step has the gradients of the eager one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdq_exp.fit.training_graph import TrainingGraph
from tests.quant.builders import inputs, load_model, make_net, make_recipe, randn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def batch(seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(x_0, t, eps) of eight samples."""
    x_0, t = inputs(8, seed)
    t = (t + 13 * seed) % 1000
    return x_0.to(device), t.to(device), randn(*x_0.shape, seed=seed + 100).to(device)


def gradients(net: nn.Module) -> list[Tensor]:
    """A copy of all there are."""
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interval", ["static", "temporal"])
@pytest.mark.parametrize("rule", ["lsq", "pact"])
def test_gradients_are_those_of_the_eager_step(rule, interval, device):
    model = load_model("tiny")
    net = make_net(make_recipe(rule, interval)).to(device).train()

    def loss(x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return model.training_loss(net, x_0, t, eps)

    def backward(*tensors: Tensor) -> Tensor:
        value = loss(*tensors)
        value.backward()
        return value.detach()

    graph = TrainingGraph(net, backward, batch(0, device))
    for seed in (1, 2, 1):
        found_loss = graph(*batch(seed, device)).clone()
        found = gradients(net)

        twin = loss(*batch(seed, device))
        wanted = torch.autograd.grad(twin, [p for p in net.parameters() if p.grad is not None])
        torch.testing.assert_close(found_loss, twin.detach())
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
