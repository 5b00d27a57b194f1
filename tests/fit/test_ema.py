"""The average of a network's parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdq_exp.fit.ema import Ema


def test_the_average_is_the_recursion_and_buffers_are_copied():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = Ema(net, 0.9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    wanted = [p.detach().clone() for p in net.parameters()]

    for update in range(30):
        optimizer.zero_grad()
        net(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        ema.update(update)
        d = min(0.9, (1 + update) / (10 + update))
        wanted = [
            d * a + (1 - d) * p.detach() for a, p in zip(wanted, net.parameters(), strict=True)
        ]

    for a, b in zip(ema.net.parameters(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not ema.net.training and not any(p.requires_grad for p in ema.net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ema.net.buffers(), net.buffers(), strict=True))


def test_a_loaded_state_is_followed():
    net = nn.Linear(2, 2)
    ema = Ema(net, 0.0)
    net.load_state_dict({name: torch.ones_like(v) for name, v in net.state_dict().items()})
    ema.update(100)
    assert all(torch.equal(p, torch.ones_like(p)) for p in ema.net.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="fit.ema_decay"):
        Ema(nn.Linear(1, 1), decay)
