"""What surrounds weights: which of two sets is taken, and the process that they were trained for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import save_file

from tdq_exp.config.compose import compose
from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.diffusion.objective import PREDICTIONS, noise_of, target_of
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.experiment.build import build
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.models.samplers import Ddpm
from tdq_exp.models.weights import fill
from tdq_exp.models.weights.fill import CheckpointError, load_weights, state_hash
from tdq_exp.models.weights.folder import which_weights
from tdq_exp.models.weights.process import require_same_process
from tests.quant.builders import load_model

SCHEDULE = Schedule()


@pytest.fixture(scope="module")
def nets():
    """Raw weights and their average."""
    model = load_model("tiny")
    return model.build(seed=1), model.build(seed=2)


# --- Two sets of weights


@pytest.fixture
def pair(nets, tmp_path):
    """A checkpoint folder as diffusers' training script writes it."""
    for net, name in zip(nets, ("unet", "unet_ema"), strict=True):
        net.save_pretrained(tmp_path / name)
    return tmp_path


def test_of_a_folder_with_averages_they_are_taken_unless_the_raw_weights_are_asked_for(nets, pair):
    raw, average = (state_hash(net.state_dict()) for net in nets)
    net = load_model("tiny").build()
    assert load_weights(net, str(pair)) == average
    assert load_weights(net, str(pair), ema=False) == raw
    assert load_weights(net, str(pair / "unet"), ema=True) == raw  # a folder that is named is meant
    assert which_weights(str(pair), True) == "unet_ema/"
    assert which_weights(str(pair), False) == "unet/"
    assert which_weights(str(pair / "unet"), True) is None


def test_which_weights_of_a_file(nets, tmp_path):
    state = nets[0].state_dict()
    torch.save([state, {}, 0, 0, state], tmp_path / "list.pth")
    torch.save(state, tmp_path / "one.pth")
    save_file(state, tmp_path / "one.safetensors")
    assert which_weights(str(tmp_path / "list.pth"), True) == "EMA"
    assert which_weights(str(tmp_path / "list.pth"), False) == "raw"
    assert which_weights(str(tmp_path / "one.pth"), True) is None
    assert which_weights(str(tmp_path / "one.safetensors"), True) is None


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"conv_in.weight_quantizer.delta": 1}, "looks like a quantized checkpoint"),
        ({"conv_in.weight_quantizer.codes": 1}, "is a packed network.*sample.*tdq_exp.load"),
    ],
)
def test_quantized_weights_are_called_so(extra, words, nets, tmp_path):
    state = nets[0].state_dict() | {k: torch.ones(v) for k, v in extra.items()}
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_weights(load_model("tiny").build(), str(tmp_path / "net.safetensors"))


# --- The scheduler beside them


def scheduler(folder, **changed):
    DDPMScheduler(**changed).save_pretrained(folder)


@pytest.mark.parametrize("inside", [".", "scheduler"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prediction_type": "v_prediction"}, r"\+model\.definition\.prediction_type=v_predict"),
        ({"beta_schedule": "squaredcos_cap_v2"}, r"schedule\.shape=squaredcos_cap_v2"),
        ({"num_train_timesteps": 4000}, r"schedule\.steps=4000"),
        ({"beta_end": 0.03}, r"schedule\.beta_end=0\.03"),
        ({"beta_start": 0.001}, r"schedule\.beta_start=0\.001"),
        ({"trained_betas": [0.1] * 1000}, "trained_betas are not the model's"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true"),
    ],
)
def test_a_scheduler_that_contradicts_names_the_key(inside, changed, words, tmp_path):
    scheduler(tmp_path / inside, **changed)
    with pytest.raises(CheckpointError, match=words) as caught:
        require_same_process(str(tmp_path), SCHEDULE, "epsilon")
    assert "\n" not in str(caught.value)


def test_a_scheduler_that_agrees_or_is_absent_is_no_obstacle(tmp_path):
    require_same_process(str(tmp_path), SCHEDULE, "epsilon")
    require_same_process("owner/name", SCHEDULE, "epsilon")
    scheduler(tmp_path / "scheduler", trained_betas=SCHEDULE.betas.numpy().astype(np.float32))
    require_same_process(str(tmp_path), SCHEDULE, "epsilon")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("[]x")
    with pytest.raises(CheckpointError, match="not a JSON config"):
        require_same_process(str(tmp_path), SCHEDULE, "epsilon")


def test_a_pipelines_scheduler_counts_where_its_unet_or_a_checkpoint_is_named(nets, tmp_path):
    nets[0].save_pretrained(tmp_path / "checkpoint-500" / "unet")
    scheduler(tmp_path / "scheduler", beta_schedule="squaredcos_cap_v2")
    model = load_model("tiny")
    for place in ("checkpoint-500", "checkpoint-500/unet"):
        with pytest.raises(CheckpointError, match="beta_schedule is squaredcos_cap_v2"):
            model.load(model.build(), str(tmp_path / place))


def test_a_pipeline_of_the_hub_is_compared_as_a_folder_is(nets, tmp_path, monkeypatch):
    nets[0].save_pretrained(tmp_path / "unet")
    scheduler(tmp_path / "scheduler", beta_schedule="squaredcos_cap_v2")
    asked = []

    def download(repository, name, subfolder=None):
        path = tmp_path / (subfolder or "") / name
        asked.append(path.name)
        if not path.exists():
            raise fill.EntryNotFoundError("no entry")
        return str(path)

    monkeypatch.setattr(fill, "hf_hub_download", download)
    model = load_model("tiny")
    with pytest.raises(CheckpointError, match="beta_schedule is squaredcos_cap_v2"):
        model.load(model.build(), "owner/name")
    assert "scheduler_config.json" in asked


@pytest.mark.parametrize("key", ["beta_start", "num_train_timesteps", "trained_betas"])
@pytest.mark.parametrize("value", ["abc", [], {"a": 1}, 10**400, [[1]]])
def test_a_schedulers_config_of_other_kinds_is_one_line(key, value, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match="scheduler_config.json") as caught:
        require_same_process(str(tmp_path), SCHEDULE, "epsilon")
    assert "\n" not in str(caught.value)


def test_a_predecessor_of_prediction_type_is_understood(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"predict_epsilon": False}))
    with pytest.raises(CheckpointError, match="prediction_type=sample"):
        require_same_process(str(tmp_path), SCHEDULE, "epsilon")


# --- Betas, and what is predicted


@pytest.mark.parametrize("steps", [1000, 4000])
def test_cosine_betas_are_diffusers(steps):
    theirs = DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2").betas
    ours = Schedule(steps, "squaredcos_cap_v2")
    assert torch.allclose(ours.betas.float(), theirs, rtol=1e-4, atol=1e-7)
    assert 0 < float(ours.alphas_cumprod[-1]) < 1e-8


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("shape", ["linear", "squaredcos_cap_v2"])
def test_the_noise_comes_back_from_every_target(kind, shape):
    schedule = Schedule(shape=shape)
    g = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(4, 1, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 9, 500, 999])
    x_t = schedule.add_noise(x_0, eps, t)

    answer = target_of(kind, x_0, eps, t, schedule)
    assert torch.allclose(noise_of(kind, answer, x_t, t, schedule), eps, atol=1e-9)
    one = noise_of(kind, answer[2:3], x_t[2:3], t[2], schedule)  # 0-dim, as a sampler calls it
    assert torch.allclose(one, eps[2:3], atol=1e-9)


@pytest.mark.parametrize("kind", PREDICTIONS[1:])
def test_sampling_with_other_targets_is_diffusers(kind):
    # The same noise through both, with a network of another target than eps.
    model = load_model("tiny")
    model.prediction_type = kind
    net = model.build(seed=1).eval()
    options = {"steps": 4, "clip": True}
    generators = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2)]
    x = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(7))

    with torch.no_grad():
        ours = Ddpm(**options).sample(Denoiser(net, model), x, model.schedule, generators[0])

        theirs = DDPMScheduler(prediction_type=kind, clip_sample=True, timestep_spacing="leading")
        theirs.set_timesteps(4)
        for t in theirs.timesteps:
            answer = net(x, t, return_dict=False)[0]
            x = theirs.step(answer, t, x, return_dict=False, generator=generators[1])[0]
    # x_0 to eps and back to x_0 costs digits where the signal is small.
    assert torch.allclose(ours, x, atol=1e-3)


def test_the_loss_is_that_of_the_networks_own_target():
    model = load_model("tiny")
    model.prediction_type = "v_prediction"
    x_0, eps = torch.randn(2, *model.sample_shape), torch.randn(2, *model.sample_shape)
    t = torch.tensor([10, 900])
    v = target_of("v_prediction", x_0, eps, t, model.schedule)

    def perfect(x_t, t, return_dict):
        return (v,)

    assert float(model.training_loss(perfect, x_0, t, eps)) == 0
    x_t = model.schedule.add_noise(x_0, eps, t)
    assert torch.allclose(model.predict(perfect, x_t, t), eps, atol=1e-5)


TINY = ("model=tiny", "launcher=cpu", "tracker=none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "+model.definition.network.class_embed_type=timestep",
            "network.class_embed_type=timestep: no stage gives",
        ),
        ("+model.definition.prediction_type=flow", "prediction_type=flow: choose one of epsilon"),
        ("model.definition.schedule.shape=sigmoid", "choose one of linear.*squaredcos_cap_v2"),
    ],
)
def test_networks_that_can_not_be_run_are_refused_before_the_run(change, words):
    with pytest.raises(ValueError, match=words):
        build(compose([*TINY, "method=fp", "fit=pretrain", change]))


def test_a_correction_of_the_noise_needs_a_network_that_predicts_it():
    with pytest.raises(ValueError, match=r"fit\.correction.*prediction_type is sample"):
        build(
            compose(
                [*TINY, "method=minmax", "model.weights=/none", "fit.correction=ptqd"]
                + ["+model.definition.prediction_type=sample"]
            )
        )


def test_ddim_takes_every_target():
    model = load_model("tiny")
    x_0 = torch.full((1, *model.sample_shape), 0.25)
    for kind in PREDICTIONS:
        model.prediction_type = kind

        def perfect(x_t, t, return_dict, kind=kind):
            signal, noise = model.schedule.coefficients(t, x_t)
            return (target_of(kind, x_0, (x_t - signal * x_0) / noise, t, model.schedule),)

        x = Ddim(5).sample(Denoiser(perfect, model), torch.randn_like(x_0), model.schedule)
        assert torch.allclose(x, x_0, atol=1e-4)
