"""The noise schedule against its definition and diffusers' own."""

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from tdq_exp.diffusion.schedule import Schedule
from tests.oracles import ddim

CIFAR10 = {"steps": 1000, "shape": "linear", "beta_start": 1e-4, "beta_end": 0.02}
CHURCHES = {"steps": 1000, "shape": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0155}


@pytest.mark.parametrize("options", [CIFAR10, CHURCHES])
def test_betas_and_products_equal_diffusers_to_their_precision(options):
    schedule = Schedule(**options)
    theirs = DDIMScheduler(
        num_train_timesteps=options["steps"], beta_schedule=options["shape"], beta_start=options["beta_start"],
        beta_end=options["beta_end"],
    )  # fmt: skip
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    assert torch.allclose(schedule.betas.float(), theirs.betas, rtol=1e-5)
    assert torch.allclose(schedule.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4)


def test_products_equal_the_definition():
    schedule = Schedule(steps=50)
    betas = [1e-4 + i * (0.02 - 1e-4) / 49 for i in range(50)]
    for t in (0, 1, 25, 49):
        assert float(schedule.alphas_cumprod[t]) == pytest.approx(
            ddim.alpha_bar(betas, t), rel=1e-12
        )


def test_scaled_linear_is_linear_in_the_square_root():
    roots = Schedule(**CHURCHES).betas.sqrt()
    assert torch.allclose(roots.diff(), roots.diff()[0].expand(999), rtol=1e-6)
    assert float(roots[0]) == pytest.approx(math.sqrt(0.0015))
    assert float(roots[-1]) == pytest.approx(math.sqrt(0.0155))


@pytest.mark.parametrize("options", [CIFAR10, CHURCHES])
def test_adding_noise_equals_diffusers(options):
    schedule = Schedule(**options)
    theirs = DDIMScheduler(trained_betas=schedule.betas.float().numpy())
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(2))
    t = torch.tensor([0, 1, 500, 998, 999])
    x_t = schedule.add_noise(x_0, eps, t)
    assert x_t.dtype == torch.float32
    assert torch.allclose(x_t, theirs.add_noise(x_0, eps, t), atol=2e-6)


def test_adding_noise_gives_every_sample_its_own_time():
    schedule = Schedule()
    x_0, eps = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    t = torch.tensor([999, 0, 400])
    x_t = schedule.add_noise(x_0, eps, t)
    for b in range(3):
        assert x_t[b].flatten().tolist() == pytest.approx(
            [float(schedule.alphas_cumprod[t[b]]) ** 0.5] * 4
        )


@pytest.mark.parametrize(
    "options",
    [
        {"shape": "cosine"}, {"steps": 0}, {"beta_start": 0.0}, {"beta_start": 0.03}, {"beta_end": 1.0},
    ],
)  # fmt: skip
def test_impossible_schedules_are_errors_that_name_the_key(options):
    with pytest.raises(ValueError, match=r"model\.(definition\.)?schedule"):
        Schedule(**options)
