"""The description of a diffusion model: what a stage needs to train, quantize, sample and decode.

A new model is one class like `DiffusionModel`, or just one config: no stage asks for the kind of a
model. What turns images into x_0 and back is the model's `codec`; a pixel-space model has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from tdq_exp.data.images import Images
from tdq_exp.data.latents import encoded
from tdq_exp.diffusion.draws import BareSeed, Stream, generator, seed_global_bare
from tdq_exp.diffusion.objective import (
    LOSSES,
    PREDICTIONS,
    Samples,
    noise_of,
    noise_prediction_loss,
    target_of,
)
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.models.attention import quantize_attention
from tdq_exp.models.resnet_blocks import unet_chains
from tdq_exp.models.trainable import Codec, Trainable
from tdq_exp.models.unet_arguments import check_network, constructed, require_memory
from tdq_exp.models.unet_roles import unet_roles
from tdq_exp.models.weights.fill import load_weights, locate
from tdq_exp.models.weights.process import require_same_process
from tdq_exp.quant.chains import Chains
from tdq_exp.quant.convert import Recipe, quantize
from tdq_exp.quant.roles import Role
from tdq_exp.quant.time import TimeContext
from tdq_exp.runtime.processes import Processes

DEFINITION = "model.definition"


class DiffusionModel(Trainable):
    """A diffusion model with diffusers' `UNet2DModel`, in the space of pixels.

    Args:
        network: arguments of `UNet2DModel`.
        schedule: T and the betas.
        loss: `l2` or `l1`, as the model was (or is to be) trained.
        flip: whether training images are mirrored at random.
        attention_heads: number of heads of every attention, whatever its width; None takes the
            network's `attention_head_dim`, one width of a head for all of them.
        prediction_type: what the network answers: `epsilon`, `sample` (x_0) or `v_prediction`.

    Raises:
        ValueError: naming the key.
    """

    codec: Codec | None = None

    def __init__(
        self,
        network: Mapping[str, Any],
        schedule: Schedule,
        loss: str = "l2",
        flip: bool = True,
        attention_heads: int | None = None,
        prediction_type: str = "epsilon",
    ) -> None:
        if prediction_type not in PREDICTIONS:
            raise ValueError(
                f"model.definition.prediction_type={prediction_type}: choose one of"
                f" {', '.join(PREDICTIONS)}"
            )
        if loss not in LOSSES:
            raise ValueError(f"model.definition.loss={loss}: choose one of {', '.join(LOSSES)}")
        if attention_heads is not None and not (
            isinstance(attention_heads, int) and attention_heads > 0
        ):
            raise ValueError(
                f"model.definition.attention_heads={attention_heads}: must be an integer of at"
                " least 1"
            )
        if not isinstance(schedule, Schedule):
            raise ValueError(f"{DEFINITION}.schedule={schedule}: needs a _target_ and its numbers")

        check_network(network, UNet2DModel, f"{DEFINITION}.network")
        if network.get("out_channels", 3) != network["in_channels"]:
            raise ValueError(
                f"{DEFINITION}.network.out_channels={network.get('out_channels', 3)}: the noise has"
                f" the {network['in_channels']} channels of in_channels"
            )
        self.network, self.schedule, self.loss, self.flip = dict(network), schedule, loss, flip
        self.attention_heads, self.prediction_type = attention_heads, prediction_type

    @property
    def image_size(self) -> int:
        """Side of an image, pixels."""
        return self.codec.image_size if self.codec else int(self.network["sample_size"])

    @property
    def channels(self) -> int:
        """Channels of an image: 1 or 3."""
        return self.codec.channels if self.codec else int(self.network["in_channels"])

    @property
    def classes(self) -> int | None:
        """Number of classes of a class-conditional network; None for an unconditional one."""
        number = self.network.get("num_class_embeds")
        return None if number is None else int(number)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network denoises."""
        side = int(self.network["sample_size"])
        return int(self.network["in_channels"]), side, side

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_0, as `training_loss` takes it."""
        return self.sample_shape

    @property
    def steps(self) -> int:
        """Return T, the number of time steps."""
        return self.schedule.steps

    def build(self, seed: int = 0) -> nn.Module:
        """Return the network with random weights, a function of the seed alone."""
        key = f"{DEFINITION}.network"
        require_memory(self.network, UNet2DModel, key)

        with torch.random.fork_rng(devices=[]):
            seed_global_bare(BareSeed.START_WEIGHTS, seed)
            net = constructed(lambda: UNet2DModel(**self.network), key)
        if self.attention_heads is not None:
            set_heads(net, self.attention_heads)
        return net

    def require_runnable(self) -> None:
        """Refuse a network that can't denoise a sample; shapes are followed, nothing is computed.

        Raises:
            ValueError: one line that names the key.
        """
        condition = self.draw_condition(0, Stream.IMAGE, range(1))
        if condition is not None:
            condition = condition.to("meta")

        with torch.device("meta"), torch.no_grad():
            net = self.build()
            x = torch.empty(1, *self.sample_shape)
            t = torch.zeros(1, dtype=torch.long)
            eps_hat = constructed(
                lambda: self.predict(net, x, t, condition),
                f"{DEFINITION}.network, at {list(x.shape)}",
            )

        if eps_hat.shape != x.shape:
            raise ValueError(
                f"{DEFINITION}.network: predicts {list(eps_hat.shape[1:])} from"
                f" {list(x.shape[1:])}; the noise has the shape of the sample"
            )

    def load(self, net: nn.Module, weights: str, ema: bool = True) -> str:
        """Fill a network with weights and return their content hash. See `load_weights`.

        Raises:
            CheckpointError: if they do not fit, or were trained for another schedule or target.
        """
        place = locate(weights, "unet")  # what is on the hub is a local folder then
        require_same_process(str(place), self.schedule, self.prediction_type)
        if self.attention_heads is None:
            return load_weights(net, weights, ema=ema)

        # A network that was built elsewhere has the heads of its config, which can't say ours.
        set_heads(net, self.attention_heads)
        return load_weights(net, weights, ema=ema, overruled={"attention_head_dim"})

    def predict(
        self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Predict the noise in x_t, whatever the network itself answers.

        The forward pass sets the time of quantized layers, too.

        Args:
            net: the network, float or quantized.
            x_t: `[B, C, H, W]`.
            t: `[B]`, or 0-dim for a batch at one time step.
            condition: class labels `[B]` of a class-conditional network, int64.

        Returns:
            eps_hat, `[B, C, H, W]`.
        """
        answer = self.answer(net, x_t, t, condition)
        return noise_of(self.prediction_type, answer, x_t, t, self.schedule)

    def answer(
        self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Return what the network itself answers: eps, x_0 or v; arguments as `predict`."""
        options = {} if condition is None else {"class_labels": condition}
        return net(x_t, t, return_dict=False, **options)[0]

    def training_loss(
        self,
        net: nn.Module,
        x_0: Tensor,
        t: Tensor,
        eps: Tensor,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch against the network's own target; see `Trainable`."""
        x_t = self.schedule.add_noise(x_0, eps, t)
        answer = self.answer(net, x_t, t, condition)
        target = target_of(self.prediction_type, x_0, eps, t, self.schedule)
        return noise_prediction_loss(answer, target, self.loss)

    def draw_condition(self, seed: int, stream: Stream, indices: range) -> Tensor | None:
        """Return a class for each image, uniform, `[B]`; see `Trainable.draw_condition`."""
        if self.classes is None:
            return None

        generators = [generator(seed, Stream.CONDITION, int(stream), i) for i in indices]
        return torch.stack([torch.randint(self.classes, (), generator=g) for g in generators])

    def roles(self, net: nn.Module) -> dict[str, Role]:
        """Return what each convolution and linear layer is for."""
        return unet_roles(net)

    def chains(self, net: nn.Module) -> Chains:
        """Return the chains of modules of a network, float or quantized, that can be fused."""
        return unet_chains(net)

    def quantize(self, net: nn.Module, recipe: Recipe) -> TimeContext:
        """Quantize a float network of this model in place; see `tdq_exp.quant.quantize`."""
        time = quantize(net, self.roles(net), recipe, self.steps, quantize_attention)
        if hasattr(net, "save_pretrained"):
            made: Any = net
            made.save_pretrained = made.push_to_hub = refuse_folder
        return time

    def part(self, name: str) -> Trainable:
        """Return what `fit.part` names: `network` is this model itself, `autoencoder` its codec.

        Raises:
            ValueError: for a part that it does not have.
        """
        if name == "network":
            return self
        if name == "autoencoder" and isinstance(self.codec, Trainable):
            return self.codec
        raise ValueError(f"fit.part={name}: this model has no such part")

    def attach(self, autoencoder: str | None) -> None:
        """Name the source of the autoencoder's weights; None leaves it without.

        Raises:
            ValueError: if a source is named and the model has no autoencoder.
        """
        if autoencoder is None:
            return
        if self.codec is None:
            raise ValueError(f"model.autoencoder={autoencoder}: this model has none")
        self.codec.attach(autoencoder)

    def parts(self) -> dict[str, str]:
        """Return what samples and images depend on beside the network: the codec's hash, if any."""
        return {} if self.codec is None else {"autoencoder": self.codec.hash}

    def samples(
        self, images: Images, *, mirror: bool, cache: Path, processes: Processes
    ) -> Samples:
        """Return a set of images as the x_0 that the network is trained on.

        Without a codec these are the images; with one, they are distributions of x_0, encoded on
        first use (see `data.latents`). Arguments as in `Trainable`.
        """
        codec = self.codec
        if codec is None:
            return images

        processes.decide(lambda: codec.hash)  # a download, or an error, happens once
        return encoded(
            images,
            codec.encode,
            self.sample_shape,
            mirror=mirror,
            by=codec.fingerprint,
            cache=cache,
            processes=processes,
        )

    def decode(self, x_0: Tensor) -> Tensor:
        """Return images in about [-1, 1], `[B, C, H, W]`, of x_0, `[B, *sample_shape]`."""
        return x_0 if self.codec is None else self.codec.decode(x_0)


def architecture_of(net: nn.Module) -> dict[str, Any]:
    """Return the arguments of a network's constructor, plain.

    Raises:
        TypeError: if it is no `UNet2DModel`.
    """
    if not isinstance(net, UNet2DModel):
        raise TypeError(f"wanted a diffusers UNet2DModel, not {type(net).__name__}")
    if type(net).forward is not UNet2DModel.forward:
        raise TypeError(
            f"wanted a diffusers UNet2DModel, not {type(net).__name__}, whose forward is another"
        )

    known = inspect.signature(UNet2DModel.__init__).parameters
    values: Any = net.config
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if key in known
    }


def refuse_folder(*_: Any, **__: Any) -> NoReturn:
    """Refuse to write a quantized network as diffusers does, in a folder or on the hub.

    diffusers would build a float network of the folder and leave random weights in it.

    Raises:
        ValueError: saying what to call.
    """
    raise ValueError(
        "a folder of diffusers (save_pretrained) has no place for quantizers; call"
        " tdq_exp.save(net, 'net.safetensors'), and tdq_exp.load to read it"
    )


def heads_of(net: nn.Module) -> dict[str, tuple[int, float]]:
    """Return (number of heads, scale) of every attention of a network, by name."""
    return {
        name: (module.heads, module.scale)
        for name, module in net.named_modules()
        if isinstance(module, Attention)
    }


def set_heads(net: nn.Module, heads: int) -> None:
    """Divide every attention of a network into `heads` heads of width C / heads.

        scale = 1 / sqrt(C / heads)

    No parameter shows the number of heads, and diffusers' config can't say it, so saving a network
    loses it.

    Raises:
        ValueError: if a width does not divide.
    """
    for name, module in net.named_modules():
        if isinstance(module, Attention):
            width = module.inner_dim
            if width % heads:
                raise ValueError(
                    f"model.definition.attention_heads={heads}: does not divide {name}'s"
                    f" {width} channels"
                )
            module.heads = module.sliceable_head_dim = heads
            module.scale = (width // heads) ** -0.5
