"""The first stage: posterior, scale, bounded batches, its loss, and weights from every source."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from tdq_exp.data.images import Images
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.models.codec import Autoencoder, ScaledAutoencoder
from tdq_exp.models.latent import LatentDiffusionModel
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.models.weights.fill import CheckpointError, load_autoencoder, save_weights, state_hash

NETWORK = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "latent_channels": 2, "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip


def description(batch=3, **options):
    return Autoencoder(NETWORK, batch, **options)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of ours: an autoencoder whose latents are scaled by 0.25."""
    net = description().build(seed=1)
    net.scale.fill_(0.25)
    path = tmp_path_factory.mktemp("autoencoder") / "net.safetensors"
    save_weights(net, path, {})
    return path


@pytest.fixture
def attached(saved):
    made = description()
    made.attach(str(saved))
    return made


@torch.no_grad()
def test_the_posterior_and_the_images_are_those_of_diffusers(attached):
    images, kl = randn(2, 3, 8, 8), attached.net().kl
    posterior = kl.encode(images).latent_dist
    mean, deviation = attached.encode(images)
    torch.testing.assert_close(mean, 0.25 * posterior.mean)
    torch.testing.assert_close(deviation, 0.25 * posterior.std)
    z = randn(2, 2, 4, 4, seed=1)
    torch.testing.assert_close(attached.decode(0.25 * z), kl.decode(z).sample)
    assert attached.sample_shape == (2, 4, 4) and attached.input_shape == (3, 8, 8)


def test_batches_are_bounded(attached, monkeypatch):
    sizes = []
    for name in ("encode", "decode"):
        whole = getattr(ScaledAutoencoder, name)
        monkeypatch.setattr(
            ScaledAutoencoder,
            name,
            lambda net, x, whole=whole: (sizes.append(len(x)), whole(net, x))[1],
        )
    mean, deviation = attached.encode(randn(7, 3, 8, 8))
    images = attached.decode(mean)
    assert sizes == [3, 3, 1] * 2
    assert mean.shape == deviation.shape == (7, 2, 4, 4) and images.shape == (7, 3, 8, 8)
    assert not images.requires_grad


def test_a_log_variance_is_clamped_as_in_the_original(attached):
    net = description().build()
    with torch.no_grad():
        net.kl.quant_conv.bias[2:] = torch.tensor([1000.0, -1000.0])
        _, log_variance = net.posterior(randn(1, 3, 8, 8))
    assert log_variance[0, 0].unique().tolist() == [20.0] and log_variance[
        0, 1
    ].unique().tolist() == [-30.0]


def test_the_loss_is_the_error_and_a_little_of_the_divergence():
    net, images, noise = description().build().eval(), randn(4, 3, 8, 8), randn(4, 2, 4, 4, seed=2)
    posterior = net.kl.encode(images).latent_dist
    error = (images - net.kl.decode(posterior.mean + posterior.std * noise).sample).abs().mean()
    divergence = posterior.kl().mean() / (
        2 * 4 * 4
    )  # diffusers sums over a latent, ours is the mean
    for weight in (0.0, 0.5):
        loss = description(kl_weight=weight).training_loss(net, images, torch.zeros(4), noise)
        torch.testing.assert_close(loss, error + weight * divergence)


def test_training_ends_with_latents_of_unit_deviation():
    made = description()
    net = made.build(seed=3).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    images = Images(pixels, "x", "y")
    made.settle(net, images, torch.device("cpu"))
    with torch.no_grad():
        mean, deviation = net.encode(
            images.batch(torch.arange(20), torch.zeros(20, dtype=torch.bool))
        )
    drawn = mean + deviation * randn(400, *mean.shape)
    assert float(drawn.std()) == pytest.approx(1, abs=0.02)
    description(scale=0.3).settle(net, images, torch.device("cpu"))
    assert float(net.scale) == pytest.approx(0.3)


def test_weights_come_from_our_file_and_from_a_diffusers_folder_alike(saved, tmp_path):
    ours, theirs = ScaledAutoencoder(NETWORK), ScaledAutoencoder(NETWORK)
    found = load_autoencoder(ours, str(saved))
    folder = AutoencoderKL(**NETWORK, scaling_factor=0.25, force_upcast=False)
    folder.load_state_dict(ours.kl.state_dict())
    folder.save_pretrained(tmp_path / "pipeline" / "vae")
    assert (
        load_autoencoder(theirs, str(tmp_path / "pipeline"))
        == found
        == state_hash(ours.state_dict())
    )
    assert float(theirs.scale) == 0.25
    assert (
        load_autoencoder(theirs, str(saved), scale=0.5) != found
    )  # the scale is part of the weights
    assert float(theirs.scale) == 0.5


def test_weights_of_another_autoencoder_are_refused_and_named(saved, tmp_path):
    other = ScaledAutoencoder({**NETWORK, "layers_per_block": 2})
    with pytest.raises(
        CheckpointError, match=r"net\.safetensors: its keys are not the network's: .*missing"
    ):
        load_autoencoder(other, str(saved))
    AutoencoderKL(**{**NETWORK, "norm_num_groups": 2}).save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="norm_num_groups is 2, wanted 4"):
        load_autoencoder(ScaledAutoencoder(NETWORK), str(tmp_path))
    save_weights(ScaledAutoencoder(NETWORK).kl, tmp_path / "kl.safetensors", {})
    with pytest.raises(
        CheckpointError,
        match="names no scale of the latents; set model.definition.autoencoder.scale",
    ):
        load_autoencoder(ScaledAutoencoder(NETWORK), str(tmp_path / "kl.safetensors"))
    with pytest.raises(CheckpointError, match="missing.safetensors: no such file or folder"):
        load_autoencoder(ScaledAutoencoder(NETWORK), str(tmp_path / "missing.safetensors"))


@pytest.mark.parametrize("value", ["abc", None, [1], True, 10**400])
def test_a_scale_that_is_no_number_names_the_file(value, tmp_path):
    config = {"_class_name": "AutoencoderKL", "scaling_factor": value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError,
        match=r"config\.json: scaling_factor is .*, wanted a number; set model\.def",
    ):
        load_autoencoder(ScaledAutoencoder(NETWORK), str(tmp_path))

    theirs = torch.tensor(1 + 2j) if value is None else value
    torch.save({"state_dict": {"scale_factor": theirs}}, tmp_path / "kl.ckpt")
    with pytest.raises(CheckpointError, match=r"kl\.ckpt: .*scale_factor"):
        load_autoencoder(ScaledAutoencoder(NETWORK), str(tmp_path / "kl.ckpt"))


def test_an_autoencoder_without_weights_says_how_to_get_them():
    with pytest.raises(
        ValueError, match="model.autoencoder has no value.*fit=pretrain_autoencoder"
    ):
        description().encode(randn(1, 3, 8, 8))


def test_a_model_and_its_autoencoder_must_fit(saved):
    network = {
        "in_channels": 2,
        "sample_size": 4,
        "out_channels": 2,
        "block_out_channels": (8,),
        "norm_num_groups": 4,
    }
    made = LatentDiffusionModel(network, description(), Schedule())
    assert (made.image_size, made.channels, made.sample_shape) == (8, 3, (2, 4, 4))
    assert made.part("network") is made and made.part("autoencoder") is made.autoencoder
    with pytest.raises(
        ValueError, match=r"denoises \(2, 8, 8\), but the autoencoder makes \(2, 4, 4\)"
    ):
        LatentDiffusionModel({**network, "sample_size": 8}, description(), Schedule())
    plain = DiffusionModel(network, Schedule())
    with pytest.raises(ValueError, match="fit.part=autoencoder: this model has no such part"):
        plain.part("autoencoder")
    with pytest.raises(ValueError, match="this model has none"):
        plain.attach(str(saved))
    assert plain.parts() == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shift_factor", 0.1),
        ("latents_mean", [0.0, 1.0]),
        ("latents_std", [1.0, 2.0]),
        ("use_quant_conv", False),
        ("use_post_quant_conv", False),
        ("out_channels", 1),
        ("sample_size", 9),
    ],
)
def test_an_autoencoder_whose_latents_or_images_would_mean_something_else_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"autoencoder\.network\.{name}="):
        Autoencoder({**NETWORK, name: value}, 3)


def test_out_channels_of_gray_images_have_to_be_named():
    gray = {key: value for key, value in NETWORK.items() if key != "out_channels"}
    with pytest.raises(ValueError, match="out_channels=3: an image comes back with the 1 channels"):
        Autoencoder({**gray, "in_channels": 1}, 3)
