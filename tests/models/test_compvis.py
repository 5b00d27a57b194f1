"""CompVis' latent diffusion, from its one file: the same answers, the right set of weights, and every key accounted for.

`ldm_original.safetensors` holds what the original networks (UNetModel, and the encoder and decoder of AutoencoderKL, of
https://github.com/CompVis/latent-diffusion) answer when weights and inputs are those of `formula` and `ramp`, weights by
their keys in the whole file: eps_hat of x [3, 4, 8, 8] at t = 1, 400, 999; moments of images [2, 3, 16, 16]; images of
z [2, 4, 4, 4].
"""

from __future__ import annotations

import copy
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file

from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.models.codec import Autoencoder
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.models.weights.fill import CheckpointError, load_autoencoder, load_weights, state_hash
from tests.models.formula import formula, ramp
from tests.models.test_heads import HEADS, REDUCED

RECORDED = Path(__file__).with_name("ldm_original.safetensors")
TIMES = torch.tensor([1, 400, 999])
TOLERANCE = 1e-5
SCALE = 0.23
KL = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1, "norm_num_groups": 32,
}  # fmt: skip
BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


def layer(shapes: Shapes, name: str, *shape: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]


def unet_shapes(channels=(32, 64, 64), attention=(True, True, False), blocks=2) -> Shapes:
    """Names and shapes of the original U-Net's parameters: scale-shift norm, residual resampling."""
    shapes: Shapes = {}
    base, width = channels[0], 4 * channels[0]

    def residual(name, inputs, outputs):
        layer(shapes, f"{name}.in_layers.0", inputs)
        layer(shapes, f"{name}.in_layers.2", outputs, inputs, 3, 3)
        layer(shapes, f"{name}.emb_layers.1", 2 * outputs, width)
        layer(shapes, f"{name}.out_layers.0", outputs)
        layer(shapes, f"{name}.out_layers.3", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(shapes, f"{name}.skip_connection", outputs, inputs, 1, 1)

    def attend(name, count):
        layer(shapes, f"{name}.norm", count)
        layer(shapes, f"{name}.qkv", 3 * count, count, 1)
        layer(shapes, f"{name}.proj_out", count, count, 1)

    layer(shapes, "time_embed.0", width, base)
    layer(shapes, "time_embed.2", width, width)
    layer(shapes, "input_blocks.0.0", base, 4, 3, 3)
    current, skips, number = base, [base], 0
    for level, outputs in enumerate(channels):
        for _ in range(blocks):
            number += 1
            residual(f"input_blocks.{number}.0", current, outputs)
            current = outputs
            if attention[level]:
                attend(f"input_blocks.{number}.1", current)
            skips.append(current)
        if level < len(channels) - 1:
            number += 1
            residual(f"input_blocks.{number}.0", current, current)
            skips.append(current)
    residual("middle_block.0", current, current)
    attend("middle_block.1", current)
    residual("middle_block.2", current, current)
    number = 0
    for level in reversed(range(len(channels))):
        for index in range(blocks + 1):
            residual(f"output_blocks.{number}.0", current + skips.pop(), channels[level])
            current = channels[level]
            if attention[level]:
                attend(f"output_blocks.{number}.1", current)
            if level and index == blocks:
                residual(f"output_blocks.{number}.{1 + attention[level]}", current, current)
            number += 1
    layer(shapes, "out.0", current)
    layer(shapes, "out.2", 4, current, 3, 3)
    return shapes


def kl_shapes(channels=(32, 64, 128), blocks=1, latent=4) -> Shapes:
    """Names and shapes of the original autoencoder's parameters."""
    shapes: Shapes = {}

    def residual(name, inputs, outputs):
        layer(shapes, f"{name}.norm1", inputs)
        layer(shapes, f"{name}.conv1", outputs, inputs, 3, 3)
        layer(shapes, f"{name}.norm2", outputs)
        layer(shapes, f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(shapes, f"{name}.nin_shortcut", outputs, inputs, 1, 1)

    def middle(name, count):
        residual(f"{name}.block_1", count, count)
        layer(shapes, f"{name}.attn_1.norm", count)
        for part in ("q", "k", "v", "proj_out"):
            layer(shapes, f"{name}.attn_1.{part}", count, count, 1, 1)
        residual(f"{name}.block_2", count, count)

    last = len(channels) - 1
    layer(shapes, "encoder.conv_in", channels[0], 3, 3, 3)
    current = channels[0]
    for level, outputs in enumerate(channels):
        for index in range(blocks):
            residual(f"encoder.down.{level}.block.{index}", current, outputs)
            current = outputs
        if level < last:
            layer(shapes, f"encoder.down.{level}.downsample.conv", current, current, 3, 3)
    middle("encoder.mid", current)
    layer(shapes, "encoder.norm_out", current)
    layer(shapes, "encoder.conv_out", 2 * latent, current, 3, 3)
    layer(shapes, "decoder.conv_in", current, latent, 3, 3)
    middle("decoder.mid", current)
    for level in reversed(range(len(channels))):
        for index in range(blocks + 1):
            residual(f"decoder.up.{level}.block.{index}", current, channels[level])
            current = channels[level]
        if level:
            layer(shapes, f"decoder.up.{level}.upsample.conv", current, current, 3, 3)
    layer(shapes, "decoder.norm_out", current)
    layer(shapes, "decoder.conv_out", 3, current, 3, 3)
    layer(shapes, "quant_conv", 2 * latent, 2 * latent, 1, 1)
    layer(shapes, "post_quant_conv", latent, latent, 1, 1)
    return shapes


def weights_of(shapes: Shapes, prefix: str, salt: str = "") -> OrderedDict[str, torch.Tensor]:
    return OrderedDict(
        (prefix + key, formula(prefix + key + salt, shape)) for key, shape in shapes.items()
    )


def shadow(key: str) -> str:
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def whole_file() -> OrderedDict[str, torch.Tensor]:
    """A training file's state dict: the average is what the recording is of, the raw weights are others."""
    average = weights_of(unet_shapes(), "model.diffusion_model.")
    return OrderedDict(
        {name: torch.zeros(10) for name in BUFFERS}
        | weights_of(unet_shapes(), "model.diffusion_model.", salt="raw")
        | {
            "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(3, dtype=torch.int),
        }
        | {shadow(key): value for key, value in average.items()}
        | weights_of(kl_shapes(), "first_stage_model.")
        | {"first_stage_model.loss.logvar": torch.zeros(()), "scale_factor": torch.tensor(SCALE)}
    )


class Callback:
    """Stands for a class of a package that the reader does not have."""


@pytest.fixture(scope="module")
def state():
    return whole_file()


@pytest.fixture(scope="module")
def file(tmp_path_factory, state):
    """The file as the training wrote it: callbacks of its framework beside the weights."""
    package = types.ModuleType("framework_of_the_original")
    package.Callback, Callback.__module__ = Callback, package.__name__
    sys.modules[package.__name__] = package
    path = tmp_path_factory.mktemp("compvis") / "model.ckpt"
    torch.save(
        {
            "state_dict": state,
            "callbacks": {"best": Callback()},
            "global_step": 3,
            "lr_schedulers": [],
        },
        path,
    )
    del sys.modules[package.__name__]
    return path


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(REDUCED, Schedule(), attention_heads=HEADS)


@pytest.fixture(scope="module")
def unet(model, file):
    net = model.build(seed=5).eval()
    model.load(net, str(file))
    return net


@pytest.fixture(scope="module")
def recorded():
    return load_file(RECORDED)


@torch.no_grad()
def answer(net):
    return net(ramp("x", 3 * 4 * 64).float().reshape(3, 4, 8, 8), TIMES).sample


def spoiled(state, path, **changes):
    """A file with some keys changed, or without them (None)."""
    names = {name.replace("__", "."): value for name, value in changes.items()}
    torch.save({k: v for k, v in {**state, **names}.items() if v is not None}, path / "model.ckpt")
    return str(path / "model.ckpt")


# The original networks


def test_the_unet_answers_as_the_original(unet, recorded):
    assert sum(p.numel() for p in unet.parameters()) == 1_944_772  # as the original counts
    error = (answer(unet) - recorded["unet"]).abs().amax((1, 2, 3))
    assert error.max() < TOLERANCE, error


@torch.no_grad()
def test_encoder_and_decoder_answer_as_the_original(file, recorded):
    made = Autoencoder(KL, batch=2)
    made.attach(str(file))
    net = made.net()
    assert sum(p.numel() for p in net.parameters()) == 2_702_087 and float(
        net.scale
    ) == pytest.approx(SCALE)
    images = ramp("image", 2 * 3 * 256).float().reshape(2, 3, 16, 16)
    assert (torch.cat(net.posterior(images), 1) - recorded["moments"]).abs().max() < TOLERANCE
    z = ramp("z", 2 * 4 * 16).float().reshape(2, 4, 4, 4)
    assert (made.decode(SCALE * z) - recorded["decoded"]).abs().max() < TOLERANCE


def test_an_unpatched_network_fails_the_recording(unet, recorded):
    # Each way to say it in diffusers' config is right at one width, or at none.
    for width in (8, 16, 4, None):
        bare = UNet2DModel(**{**REDUCED, "attention_head_dim": width}).eval()
        bare.load_state_dict(unet.state_dict())
        assert (answer(bare) - recorded["unet"]).abs().max() > 20 * TOLERANCE, width


def test_rows_of_qkv_in_another_order_fail_the_recording(unet, recorded):
    net = copy.deepcopy(unet)
    for attention in [
        m for m in net.modules() if hasattr(m, "to_q")
    ]:  # as if they were all of q, all of k, all of v
        for kind in ("weight", "bias"):
            parts = [
                getattr(layer, kind).data
                for layer in (attention.to_q, attention.to_k, attention.to_v)
            ]
            rows = torch.stack([p.reshape(HEADS, -1, *p.shape[1:]) for p in parts], 1).flatten(0, 2)
            for part, value in zip(parts, rows.chunk(3), strict=True):
                part.copy_(value)
    assert (answer(net) - recorded["unet"]).abs().max() > 20 * TOLERANCE


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("norm_eps", 1e-6),
        ("flip_sin_to_cos", False),
        ("freq_shift", 1),
        ("norm_num_groups", 16),
        ("attn_norm_num_groups", 16),
    ],
)
def test_the_recording_catches_each_silent_option(unet, recorded, option, wrong):
    other = (
        DiffusionModel({**REDUCED, option: wrong}, Schedule(), attention_heads=HEADS).build().eval()
    )
    other.load_state_dict(unet.state_dict())
    assert (answer(other) - recorded["unet"]).abs().max() > 10 * TOLERANCE


# Which weights


def test_raw_weights_on_request(model, state, file, tmp_path):
    raw, average = model.build(), model.build()
    model.load(raw, str(file), ema=False)
    model.load(average, str(file))
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    assert torch.equal(raw.down_blocks[0].resnets[0].conv1.weight, state[key])
    assert torch.equal(average.down_blocks[0].resnets[0].conv1.weight, state[shadow(key)])
    only = {name: value for name, value in state.items() if not name.startswith("model_ema.")}
    torch.save(only, tmp_path / "model.ckpt")
    with pytest.raises(
        CheckpointError, match=r"without EMA weights; ask for its raw ones \(model.ema=false\)"
    ):
        model.load(average, str(tmp_path / "model.ckpt"))
    assert model.load(average, str(tmp_path / "model.ckpt"), ema=False) == state_hash(
        raw.state_dict()
    )


def test_the_first_stage_comes_from_a_file_of_its_own_too(state, file, tmp_path):
    made = Autoencoder(KL, batch=2)
    alone = {
        k.removeprefix("first_stage_model."): v
        for k, v in state.items()
        if k.startswith("first_stage_model.")
    }
    alone["loss.perceptual_loss.lin0.model.1.weight"] = torch.ones(1)
    torch.save({"state_dict": alone}, tmp_path / "kl.ckpt")
    one, other = made.build(), made.build()
    with pytest.raises(CheckpointError, match="names no scale of the latents"):
        load_autoencoder(one, str(tmp_path / "kl.ckpt"))
    expected = load_autoencoder(other, str(file))
    assert (
        load_autoencoder(one, str(tmp_path / "kl.ckpt"), float(state["scale_factor"])) == expected
    )
    for scale in (
        state["scale_factor"],
        float(state["scale_factor"]),
    ):  # beside it, a tensor or a number
        torch.save({"state_dict": alone | {"scale_factor": scale}}, tmp_path / "kl.ckpt")
        assert load_autoencoder(one, str(tmp_path / "kl.ckpt")) == expected


# Every key is accounted for

KEY = "model.diffusion_model.middle_block.1.qkv.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cond_stage_model.emb": torch.ones(1)}, ["1 keys of no known part", "cond_stage_model.emb"]),
        ({shadow(KEY): None}, ["1 EMA weights are missing", "diffusion_modelmiddle_block1qkvweight"]),
        ({"model_ema.diffusion_modelextra": torch.ones(1)}, ["1 EMA weights are of no weight", "extra"]),
        ({KEY: None}, ["1 EMA weights are of no weight", "diffusion_modelmiddle_block1qkvweight"]),
        ({KEY: None, shadow(KEY): None}, ["3 missing", "mid_block.attentions.0.to_q.weight"]),
        ({shadow(KEY): torch.zeros(192, 32, 1)}, ["3 misshapen", "to_q.weight [64, 32, 1], wanted [64, 64]"]),
        ({shadow(KEY): torch.zeros(190, 64, 1)}, ["3 missing", "1 left over", "attentions.0.qkv.weight"]),
        (
            {"model.diffusion_model.label_emb.weight": torch.ones(2), "model_ema.diffusion_modellabel_embweight": torch.ones(2)},
            ["1 left over", "label_emb.weight"],
        ),
    ],
)  # fmt: skip
def test_a_key_of_the_unet_that_does_not_fit_is_named(model, state, tmp_path, change, words):
    net = model.build()
    before = state_hash(net.state_dict())
    source = spoiled(state, tmp_path, **change)
    with pytest.raises(CheckpointError) as caught:
        model.load(net, source)
    message = str(caught.value)
    assert message.startswith(source) and "\n" not in message
    assert all(word in message for word in words), message
    assert state_hash(net.state_dict()) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first_stage_model.encoder.norm_out.bias": None}, ["1 missing", "encoder.conv_norm_out.bias"]),
        ({"first_stage_model.decoder.up.2.block.0.conv1.bias": None}, ["1 missing", "decoder.up_blocks.0.resnets.0.conv1.bias"]),
        ({"first_stage_model.colorize": torch.ones(1)}, ["1 left over", "colorize"]),
        ({"first_stage_model.quant_conv.bias": torch.ones(3)}, ["1 misshapen", "quant_conv.bias [3], wanted [8]"]),
        ({"scale_factor": None}, ["names no scale of the latents"]),
        ({"scale_factor": torch.ones(2)}, ["scale_factor holds 2 numbers, wanted one"]),
        ({"scale_factor": torch.tensor(0.0)}, ["the scale of its latents is 0.0; set model.definition.autoencoder.scale"]),
    ],
)  # fmt: skip
def test_a_key_of_the_first_stage_that_does_not_fit_is_named(state, tmp_path, change, words):
    net = Autoencoder(KL, batch=2).build()
    before = state_hash(net.state_dict())
    source = spoiled(state, tmp_path, **change)
    with pytest.raises(CheckpointError) as caught:
        load_autoencoder(net, source)
    assert all(word in str(caught.value) for word in words), caught.value
    assert state_hash(net.state_dict()) == before


def test_two_weights_with_one_shadow_are_refused(model, state, tmp_path):
    twin = "model.diffusion_model.middle_block.1.qkvweight"  # the same without its dots
    with pytest.raises(CheckpointError, match="is the average of two weights"):
        load_weights(model.build(), spoiled(state, tmp_path, **{twin: torch.ones(1)}))
