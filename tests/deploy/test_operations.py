"""Bit operations: of a network that is small enough to be counted by hand."""

import pytest
import torch
from torch import nn

from tdq_exp.config.compose import compose
from tdq_exp.deploy.operations import bit_operations, products
from tdq_exp.experiment import build as jobs
from tdq_exp.quant.convert import Recipe
from tdq_exp.quant.plan import Plan
from tdq_exp.quant.roles import Role
from tdq_exp.quant.rules.lsq import Lsq


class Net(nn.Module):
    """A strided convolution, then q and k on 4 tokens of 3 channels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.q, self.k = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        tokens = self.first(x).flatten(2).transpose(1, 2)
        return self.q(tokens) + self.k(tokens)


ROLES = {
    "first": Role("first", "first"),
    "q": Role("attention_qkv", "attention"),
    "k": Role("attention_qkv", "attention"),
}
CONVOLUTION = 3 * 2 * 2 * 2 * 9  # outputs times inputs of each
LINEAR = 2 * 4 * 3 * 3
INSIDE = 2 * 4 * 4 * 3  # q k^T and its product with v


def counted(recipe):
    net = Net()
    return bit_operations(products(net, lambda: net(torch.zeros(1, 2, 4, 4))), ROLES, recipe)


def test_every_product_counts_with_the_bits_of_both_factors():
    assert counted(None) == (CONVOLUTION + LINEAR + INSIDE) * 32**2
    assert counted(Recipe(4, 8, Lsq, Lsq)) == (CONVOLUTION + LINEAR) * 32 + INSIDE * 64
    edges = Recipe(4, 4, Lsq, Lsq, plan=Plan(edge_bits=8))
    assert counted(edges) == CONVOLUTION * 64 + (LINEAR + INSIDE) * 16
    release = Recipe(4, 4, Lsq, Lsq, plan=Plan(keep_float=["first"], attention=False))
    assert counted(release) == (CONVOLUTION + INSIDE) * 1024 + LINEAR * 16


def test_shortcuts_at_eight_bits_cost_what_the_results_say():
    """3.9 % more bit operations than the authors' plan, of `ddim_small` at W4A4."""
    totals = []
    for plan in ("release", "release_shortcut8"):
        choices = ["model=ddim_small", "bits=w4a4", "method=lsq", "tdq=none", f"plan={plan}"]
        job = jobs.build(compose([*choices, "model.weights=random"]), source=False)
        net = job.model.build()
        x, t = torch.zeros(1, *job.model.sample_shape), torch.zeros(1, dtype=torch.long)
        count = products(net, lambda job=job, net=net, x=x, t=t: job.model.predict(net, x, t))
        totals.append(bit_operations(count, job.model.roles(net), job.recipe))
    assert totals[1] / totals[0] == pytest.approx(1.039, abs=5e-4)
