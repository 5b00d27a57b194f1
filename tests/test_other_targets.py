"""Networks that answer v or x_0 go from training to rows as those that answer the noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from tdq_exp.commands import sample
from tdq_exp.config.compose import compose
from tdq_exp.data.images import to_uint8
from tdq_exp.diffusion import Schedule
from tdq_exp.diffusion.draws import Stream, generator, starting_noise
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline
from tdq_exp.experiment.finished_run import load

QUICK = ["model=tiny", "tracker=none", "launcher=cpu", "launcher.threads=1"]


def run(out, target, *overrides):
    told = f"+model.definition.prediction_type={target}"
    made = jobs.build(compose([*QUICK, f"out={out}", told, *overrides]))
    return made, pipeline.run(made)


@pytest.mark.parametrize("target", ["v_prediction", "sample"])
def test_a_network_of_another_target_goes_from_training_to_rows(target, tmp_path):
    trained, _ = run(tmp_path, target, "method=fp", "fit=pretrain")
    weights = f"model.weights={trained.folder / 'weights.safetensors'}"

    # The float network's images are those of diffusers' sampler of the same target.
    made, (row,) = run(tmp_path, target, "method=fp", weights)
    images = np.load(made.folder / made.sample_name / "images" / "images.npy")
    _, net = load(made.folder)
    theirs = _sampled_by_diffusers(made, net, target)
    assert row["images"] == len(images) == 12
    assert np.abs(images[: len(theirs)].astype(int) - theirs).max() <= 1  # rounding

    # Trained and post-training quantization, and a run that is sampled from its folder.
    made, (row,) = run(tmp_path, target, "method=lsq", "tdq=temporal", weights)
    assert np.isfinite(row["metrics"]["fid"])
    out = tmp_path / "drawn"
    assert sample.main([str(made.folder), "--images", "12", "--out", str(out), "--cpu"]) == 0
    again, first = (
        np.load(folder / "images" / "images.npy")
        for folder in (out, made.folder / made.sample_name)
    )
    assert np.array_equal(again, first)

    _, (row,) = run(tmp_path, target, "method=ptq4dm", "tdq=none", weights)
    assert np.isfinite(row["metrics"]["fid"])


@torch.no_grad()
def _sampled_by_diffusers(made, net, target):
    """Return the first batch of a job's images by diffusers' DDIM: uint8 `[N, H, W, C]`."""
    schedule, conventions = made.model.schedule, made.config["model"]["sampling"]
    scheduler = DDIMScheduler(
        schedule.steps,
        trained_betas=schedule.betas.float().numpy(),
        prediction_type=target,
        clip_sample=conventions["clip"],
        set_alpha_to_one=conventions["final_alpha_one"],
        steps_offset=conventions["offset"],
    )
    scheduler.set_timesteps(made.sampler.steps)

    noise = [generator(0, Stream.IMAGE, i) for i in range(made.sampling.batch)]
    x = starting_noise(noise, made.model.sample_shape)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t)[0], t, x).prev_sample
    return to_uint8(x).numpy().astype(int)


@pytest.mark.parametrize("shape", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_that_are_first_asked_for_where_nothing_is_computed_are_numbers_afterwards(shape):
    schedule, plain = Schedule(shape=shape), Schedule(shape=shape)
    with torch.device("meta"):
        x = torch.empty(2, 1, 4, 4)
        root, _ = schedule.coefficients(torch.tensor([3, 5]), x)
    assert root.device.type == "meta"
    assert torch.equal(schedule.alphas_cumprod, plain.alphas_cumprod)
