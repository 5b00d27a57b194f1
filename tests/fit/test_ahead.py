"""Batches prepared ahead are the batches that would be made on demand, in their order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdq_exp.fit.ahead import batches_ahead

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(update: int) -> tuple[Tensor, Tensor]:
    """Numbers of an update."""
    generator = torch.Generator().manual_seed(update)
    return torch.randn(64, 64, generator=generator), torch.tensor([update])


@pytest.mark.parametrize("device", DEVICES)
def test_the_batches_come_in_order_with_the_same_numbers(device):
    found = list(batches_ahead(make, 3, 40, torch.device(device)))
    assert [int(number) for _, number in found] == list(range(3, 40))
    assert all(torch.equal(x.cpu(), make(u)[0]) for u, (x, _) in enumerate(found, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_comes_at_its_update(device):
    def fails(update: int) -> tuple[Tensor, ...]:
        if update == 5:
            raise ValueError("update 5")
        return make(update)

    batches = batches_ahead(fails, 0, 10, torch.device(device))
    for _ in range(5):
        next(batches)
    with pytest.raises(ValueError, match="update 5"):
        next(batches)


@pytest.mark.parametrize("device", DEVICES)
def test_the_loop_may_be_left_early(device):
    for number, _ in enumerate(batches_ahead(make, 0, 1000, torch.device(device))):
        if number == 2:
            break
