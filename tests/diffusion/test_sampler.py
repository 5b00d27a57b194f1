"""Time steps, the DDIM update against one pixel at a time and against diffusers, and diffusers' samplers behind it."""

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from tdq_exp.diffusion.ddim import SPACINGS, Ddim, time_steps
from tdq_exp.diffusion.draws import image_generators, starting_noise
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.models.samplers import Ddpm, Pndm
from tests.oracles import ddim

SCHEDULE = Schedule()
SHAPE = (2, 3, 3)


def denoise(x_t, t):
    """A prediction that bends with x and moves with t, one element at a time."""
    return 0.8 * torch.tanh(x_t) + 0.1 * math.sin(0.01 * int(t))


def noise(images=3, seed=0):
    """(x_T, generators) of the first images of a seed, in double precision."""
    generators = image_generators(seed, range(images))
    return starting_noise(generators, SHAPE).double(), generators


# --- Which time steps


@pytest.mark.parametrize(
    ("spacing", "count", "total", "offset", "expected"),
    [
        ("leading", 50, 1000, 0, list(range(980, -1, -20))),
        ("leading", 50, 1000, 1, list(range(981, 0, -20))),
        ("leading", 3, 1000, 0, [666, 333, 0]),
        ("leading", 7, 1000, 0, [852, 710, 568, 426, 284, 142, 0]),
        ("leading", 1, 1000, 0, [0]),
        ("leading", 10, 10, 0, list(range(9, -1, -1))),
        ("trailing", 50, 1000, 0, list(range(999, 0, -20))),
        ("trailing", 3, 1000, 0, [999, 666, 332]),
        ("trailing", 1, 1000, 0, [999]),
        ("trailing", 10, 10, 0, list(range(9, -1, -1))),
        ("linspace", 5, 1000, 0, [999, 749, 500, 250, 0]),
        ("linspace", 2, 1000, 0, [999, 0]),
        ("linspace", 10, 10, 0, list(range(9, -1, -1))),
        ("quad", 5, 500, 0, [400, 225, 100, 25, 0]),
        ("quad", 11, 500, 1, [401, 325, 257, 197, 145, 101, 65, 37, 17, 5, 1]),
    ],
)
def test_known_time_steps(spacing, count, total, offset, expected):
    assert time_steps(spacing, count, total, offset) == expected


@pytest.mark.parametrize("count", [1, 2, 5, 10, 20, 25, 28, 50, 100, 200])
def test_quad_is_what_ddim_does(count):
    original = [int(s) for s in list(np.linspace(0, np.sqrt(1000 * 0.8), count) ** 2)]
    assert (len(set(original)) == count) == (
        count <= 28
    )  # beyond, DDIM's own names small steps more than once
    assert time_steps("quad", count, 1000) == sorted(set(original), reverse=True)


@pytest.mark.parametrize("count", [1, 7, 50, 100, 300, 999, 1000])
def test_uniform_is_what_ddim_does(count):
    original = list(range(0, 1000, 1000 // count))
    assert time_steps("uniform", count, 1000) == original[::-1]
    assert (time_steps("leading", count, 1000) == original[::-1]) == (1000 % count == 0)


def one_step(sampler, eps, t, t_prev, x, generators):
    """x_{t_prev} of one update."""
    values = sampler.coefficients(t, t_prev, SCHEDULE)
    z = sampler.noise(x, generators) if values.sigma > 0 else None
    return sampler.update(eps, x, values, z)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("t", [0, 3, 500])
def test_a_step_from_a_time_step_to_itself_changes_nothing(t, clip, eta):
    # So that a sequence with repeats, as DDIM's "quad" is, may be visited without them.
    x, generators = noise()
    found = one_step(Ddim(1, eta=eta, clip=clip), denoise(x, t), t, t, x, generators)
    assert torch.allclose(found, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [1, 4, 10, 25, 50, 100, 200, 500, 1000])
def test_time_steps_equal_diffusers(spacing, count):
    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(count)
    expected = theirs.timesteps.tolist() if (spacing, count) != ("linspace", 1) else [0]
    assert time_steps(spacing, count, 1000) == expected


@pytest.mark.parametrize(
    ("spacing", "count"),
    [
        (s, n)
        for s in SPACINGS
        if s != "uniform"  # may have more steps than asked for
        for n in (1, 2, 3, 7, 16, 26, 48, 61, 100, 999)
        if s != "quad" or n < 30
    ],
)
def test_time_steps_fall_and_stay_inside(spacing, count):
    steps = time_steps(spacing, count, 1000)
    assert len(steps) == count
    assert all(isinstance(t, int) and 0 <= t < 1000 for t in steps)
    assert all(later < earlier for earlier, later in zip(steps, steps[1:], strict=False))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", [0, -1, 1001])
def test_too_many_or_too_few_steps_are_errors_that_name_the_key(spacing, count):
    with pytest.raises(ValueError, match=rf"sampler\.steps={count}.*1000"):
        time_steps(spacing, count, 1000)


@pytest.mark.parametrize(
    ("spacing", "count", "total", "offset"),
    [
        ("quad", 30, 1000, 300),
        ("leading", 1000, 1000, 1),
        ("leading", 4, 1000, 250),
    ],
)
def test_repeated_steps_and_steps_outside_are_errors(spacing, count, total, offset):
    with pytest.raises(ValueError, match=rf"sampler.*{spacing}.*steps={count}.*repeats or leaves"):
        time_steps(spacing, count, total, offset)


def test_a_step_before_the_first_is_an_error():
    with pytest.raises(ValueError, match="sampler"):
        time_steps("leading", 10, 1000, -1)


def test_an_unknown_spacing_is_an_error_that_names_the_key():
    with pytest.raises(ValueError, match=r"sampler\.spacing='cosine'"):
        time_steps("cosine", 10, 1000)


@pytest.mark.parametrize("spacing", [s for s in SPACINGS if s != "uniform"])
def test_the_next_step_starts_where_the_last_one_ended(spacing):
    pairs = Ddim(27, spacing).pairs(SCHEDULE)
    assert len(pairs) == 27
    assert all(first[1] == second[0] for first, second in zip(pairs, pairs[1:], strict=False))
    assert pairs[-1][1] == -1


# --- One step, one pixel at a time


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("t", "t_prev"), [(999, 979), (500, 3), (20, 0), (0, -1)])
@pytest.mark.parametrize("final_alpha_one", [True, False])
def test_a_step_equals_the_formula(eta, clip, t, t_prev, final_alpha_one):
    betas = SCHEDULE.betas.tolist()
    sampler = Ddim(1, eta=eta, clip=clip, final_alpha_one=final_alpha_one)
    x, generators = noise(2)
    eps = denoise(x, t)
    found = one_step(sampler, eps, t, t_prev, x, generators)
    z = torch.stack([torch.randn(SHAPE, generator=g) for g in noise(2)[1]])
    abar = ddim.alpha_bar(betas, t)
    abar_prev = ddim.alpha_bar(betas, t_prev if t_prev >= 0 or final_alpha_one else 0)
    expected = [
        ddim.step(float(a), float(e), abar, abar_prev, eta, float(n), clip)
        for a, e, n in zip(x.flatten(), eps.flatten(), z.flatten(), strict=True)
    ]
    assert found.dtype == torch.float64
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_single_precision_stays_single_and_close():
    x = noise()[0]
    double = Ddim(50).sample(denoise, x, SCHEDULE)
    single = Ddim(50).sample(denoise, x.float(), SCHEDULE)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), double, rtol=1e-3, atol=1e-3 * float(double.abs().max()))


def test_a_perfect_prediction_leads_back_to_the_image():
    # If eps_hat is the noise that was added, every sequence of steps ends at x_0.
    x_0 = noise(seed=1)[0].clamp(-1, 1)
    eps = noise(seed=2)[0]
    for spacing in SPACINGS:
        sampler = Ddim(20, spacing)
        t = torch.full((3,), sampler.pairs(SCHEDULE)[0][0])
        x_t = SCHEDULE.add_noise(x_0, eps, t)
        assert torch.allclose(sampler.sample(lambda x, t: eps, x_t, SCHEDULE), x_0, atol=1e-8)


def test_clipping_keeps_the_last_image_in_range():
    x = 5 * noise()[0]
    assert float(Ddim(10).sample(denoise, x, SCHEDULE).abs().max()) > 1
    assert float(Ddim(10, clip=True).sample(denoise, x, SCHEDULE).abs().max()) <= 1


# --- Against diffusers


def diffusers_ddim(
    x, steps, spacing, eta=0.0, clip=False, offset=0, final_alpha_one=True, generators=()
):
    """The same trajectory by diffusers, in double precision, noise drawn per image as ours is."""
    scheduler = DDIMScheduler(
        trained_betas=SCHEDULE.betas.float().numpy(), timestep_spacing=spacing, steps_offset=offset,
        clip_sample=clip, set_alpha_to_one=final_alpha_one,
    )  # fmt: skip
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.final_alpha_cumprod = (
        torch.tensor(1.0) if final_alpha_one else SCHEDULE.alphas_cumprod[0]
    )
    scheduler.set_timesteps(steps)
    visited = []
    for t in scheduler.timesteps:
        visited.append(int(t))
        z = (
            torch.stack([torch.randn(SHAPE, generator=g) for g in generators]).double()
            if eta
            else None
        )
        x = scheduler.step(
            denoise(x, t),
            int(t),
            x,
            eta=eta,
            use_clipped_model_output=clip,
            variance_noise=z,
            return_dict=False,
        )[0]
    return x, visited


def our_ddim(x, steps, spacing, generators=(), **options):
    visited = []
    sampler = Ddim(steps, spacing, **options)
    x = sampler.sample(denoise, x, SCHEDULE, generators, on_step=lambda t, x: visited.append(t))
    return x, visited


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("offset", "final_alpha_one"), [(0, True), (1, False)])
def test_leading_equals_diffusers(steps, eta, clip, offset, final_alpha_one):
    options = {"eta": eta, "clip": clip, "offset": offset, "final_alpha_one": final_alpha_one}
    x, generators = noise()
    theirs, their_steps = diffusers_ddim(x, steps, "leading", generators=generators, **options)
    x, generators = noise()
    ours, our_steps = our_ddim(x, steps, "leading", generators=generators, **options)
    assert our_steps == their_steps
    assert float((ours - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())
    # The last of diffusers' steps draws noise whose variance is 0 if alpha ends at 1, ours draws none; no other differs.


@pytest.mark.parametrize("steps", [10, 20, 50, 100])
@pytest.mark.parametrize("clip", [True, False])
def test_trailing_equals_diffusers_where_the_steps_divide_evenly(steps, clip):
    x, _ = noise()
    theirs, their_steps = diffusers_ddim(x, steps, "trailing", clip=clip)
    ours, our_steps = our_ddim(x, steps, "trailing", clip=clip)
    assert our_steps == their_steps
    assert float((ours - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("spacing", "steps"), [("linspace", 20), ("linspace", 50), ("trailing", 30), ("trailing", 7)]
)
def test_diffusers_misses_the_next_step_elsewhere(spacing, steps):
    # It visits the same time steps but removes the noise of T // S of them each time, so it arrives beside the next one.
    x, _ = noise()
    theirs, their_steps = diffusers_ddim(x, steps, spacing)
    ours, our_steps = our_ddim(x, steps, spacing)
    assert our_steps == their_steps
    gaps = {a - b for a, b in zip(our_steps, our_steps[1:], strict=False)}
    assert gaps != {1000 // steps}
    assert float((ours - theirs).abs().max()) > 1e-3 * float(ours.abs().max())


# --- Which noise


@pytest.mark.parametrize(
    "sampler", [Ddim(10, eta=1.0), Ddim(10, eta=0.3, clip=True), Ddpm(10), Ddpm(10, clip=True)]
)
def test_an_image_is_the_same_in_any_batch(sampler):
    generators = image_generators(5, range(6))
    whole = sampler.sample(denoise, starting_noise(generators, SHAPE), SCHEDULE, generators)
    for indices in (range(0, 3), range(4, 6), range(5, -1, -2), range(2, 3)):
        part = image_generators(5, indices)
        found = sampler.sample(denoise, starting_noise(part, SHAPE), SCHEDULE, part)
        assert torch.equal(found, whole[list(indices)])


@pytest.mark.parametrize(
    "sampler", [Ddim(10), Pndm(10), Ddim(10, "quad", clip=True), Pndm(10, "trailing")]
)
def test_a_deterministic_sampler_needs_no_noise_but_the_first(sampler):
    x = noise()[0].float()
    torch.manual_seed(0)
    first = sampler.sample(denoise, x, SCHEDULE)
    torch.manual_seed(1)
    second = sampler.sample(denoise, x, SCHEDULE, image_generators(9, range(3)))
    assert torch.equal(first, second)
    assert torch.equal(sampler.sample(denoise, x[1:2], SCHEDULE), first[1:2])


@pytest.mark.parametrize("sampler", [Ddim(5, eta=1.0), Ddpm(5)])
@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_stochastic_sampler_refuses_to_draw_from_anything_but_a_seed_per_image(sampler, count):
    x = noise(3)[0].float()
    with pytest.raises(ValueError, match="generator"):
        sampler.sample(denoise, x, SCHEDULE, image_generators(0, range(count)))


@pytest.mark.parametrize("sampler", [Ddim(8, eta=1.0), Ddpm(8)])
def test_the_global_random_state_is_neither_read_nor_moved(sampler):
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        x, generators = noise()
        found.append(sampler.sample(denoise, x.float(), SCHEDULE, generators))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)


def test_eta_adds_noise_and_seeds_change_it():
    x, generators = noise()
    plain = Ddim(10).sample(denoise, x, SCHEDULE)
    noisy = Ddim(10, eta=1.0).sample(denoise, x, SCHEDULE, generators)
    other = Ddim(10, eta=1.0).sample(denoise, x, SCHEDULE, image_generators(1, range(3)))
    assert not torch.equal(plain, noisy) and not torch.equal(noisy, other)


# --- What a network is asked


@pytest.mark.parametrize("sampler", [Ddim(4), Ddpm(4), Pndm(4)])
def test_the_network_is_asked_at_one_time_step_for_all(sampler):
    asked, told = [], []

    def note(x_t, t):
        assert t.dim() == 0 and not t.is_floating_point()
        asked.append(int(t))
        return denoise(x_t, t).bfloat16()  # a network under autocast answers like this

    x, generators = noise()
    found = sampler.sample(
        note, x.float(), SCHEDULE, generators, on_step=lambda t, x_t: told.append(t)
    )
    assert found.dtype == torch.float32
    assert asked == told
    assert set(asked) >= {750, 500, 250, 0}


# --- diffusers' samplers


@pytest.mark.parametrize(
    ("cls", "spacing"),
    [
        (Ddpm, "leading"),
        (Ddpm, "trailing"),
        (Ddpm, "linspace"),
        (Pndm, "leading"),
        (Pndm, "trailing"),
    ],
)
@pytest.mark.parametrize("steps", [4, 10, 50])
def test_diffusers_samplers_run_and_are_functions_of_their_seeds(cls, spacing, steps):
    found = []
    for seed in (0, 0, 1):
        x, generators = noise(seed=seed)
        found.append(cls(steps, spacing).sample(denoise, x.float(), SCHEDULE, generators))
    assert found[0].shape == (3, *SHAPE)
    assert bool(torch.isfinite(found[0]).all())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("cls", [Ddpm, Pndm])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 1001])
def test_diffusers_samplers_run_or_name_the_key(cls, steps):
    x, generators = noise()
    try:
        found = cls(steps).sample(denoise, x.float(), SCHEDULE, generators)
    except ValueError as error:
        assert f"sampler.steps={steps}" in str(error)
    else:
        assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("cls", [Ddpm, Pndm])
def test_an_offset_that_leaves_the_schedule_is_an_error_that_names_the_key(cls):
    x, generators = noise()
    with pytest.raises(ValueError, match="sampler"):
        cls(1000, offset=1).sample(denoise, x.float(), Schedule(steps=1000), generators)


@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 20), ("trailing", 7), ("linspace", 9), ("leading", 100)]
)
def test_ddpm_is_ddim_with_eta_one(spacing, steps):
    # Both sample the posterior q(x_prev | x_t, x_0), here between neighbours of any spacing.
    schedule = Schedule(steps=100)
    found = []
    for sampler in (Ddpm(steps, spacing), Ddim(steps, spacing, eta=1.0)):
        x, generators = noise()
        found.append(sampler.sample(denoise, x.float(), schedule, generators))
    assert torch.allclose(*found, rtol=1e-3, atol=1e-3)


def test_pndm_is_exact_where_the_prediction_is_the_true_noise():
    x_0, eps = noise(seed=1)[0], noise(seed=2)[0]
    sampler = Pndm(20)
    first = []
    sampler.sample(lambda x, t: eps, x_0, SCHEDULE, on_step=lambda t, x: first.append(t))
    x_t = SCHEDULE.add_noise(x_0, eps, torch.full((3,), first[0]))
    assert torch.allclose(sampler.sample(lambda x, t: eps, x_t, SCHEDULE), x_0, atol=1e-4)


def test_pndm_keeps_no_history_from_one_batch_to_the_next():
    x = noise()[0].float()
    sampler = Pndm(10)
    first = sampler.sample(denoise, x, SCHEDULE)
    sampler.sample(denoise, -x, SCHEDULE)
    assert torch.equal(sampler.sample(denoise, x, SCHEDULE), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"spacing": "quad"}, r"sampler\.spacing='quad'"), ({"eta": 1.0}, r"sampler\.eta")],
)
@pytest.mark.parametrize("cls", [Ddpm, Pndm])
def test_what_diffusers_samplers_cannot_do_is_an_error_that_names_the_key(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(10, **options)


@pytest.mark.parametrize(
    ("spacing", "steps"), [("linspace", 50), ("trailing", 300), ("trailing", 600)]
)
def test_pndm_refuses_time_steps_that_its_update_does_not_lead_to(spacing, steps):
    with pytest.raises(ValueError, match=rf"sampler\.spacing={spacing}: PNDM steps by"):
        Pndm(steps, spacing).check(SCHEDULE)


@pytest.mark.parametrize("offset", [0, 1])
def test_pndm_takes_leading_steps_that_do_not_divide_the_schedule(offset):
    assert len(Pndm(300, offset=offset).check(SCHEDULE).timesteps) == 309


def test_pndm_does_not_clip():
    with pytest.raises(ValueError, match=r"sampler\.clip"):
        Pndm(10, clip=True).sample(denoise, noise()[0], SCHEDULE)
