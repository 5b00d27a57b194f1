"""Quantization for people with a network and a training loop of their own.

    net = tdq_exp.quantize(unet, bits="w4a4", method="lsq", tdq="temporal")
    tdq_exp.calibrate(net, batches)                              # (x_t, t) over all of time
    optimizer = torch.optim.AdamW(tdq_exp.parameter_groups(net, lr=1e-4))
    ...                                                          # loss + tdq_exp.penalty(net)
    tdq_exp.correct(net, unet, images)                           # if you like
    tdq_exp.save(tdq_exp.bake(net), "net.safetensors")
    net = tdq_exp.load("net.safetensors")

The choices are those of the command line (`configs/`), by the same names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.deploy import packed
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import own_checks
from tdq_exp.fit import correction as corrections
from tdq_exp.fit.qat import Rates, optimizer_groups
from tdq_exp.fit.quantized import required
from tdq_exp.models.pixel import architecture_of
from tdq_exp.quant import calibrating
from tdq_exp.quant import convert as conversion
from tdq_exp.quant import penalty as penalty_of
from tdq_exp.runtime import files
from tdq_exp.runtime.precision import products

Batch = Sequence[Tensor]  # (x_t, t), or (x_t, t, classes)
RELEASED_SHARE = 0.1  # of the weights' rate: that of step sizes, as released


def quantize(
    net: nn.Module,
    bits: str = "w4a4",
    method: str = "lsq",
    tdq: str | None = None,
    plan: str = "all",
    habits: str = "text",
    overrides: Sequence[str] = (),
) -> nn.Module:
    """Return a quantized copy of a float network, before calibration, in eval mode.

    It is called as the float network is, `net(x_t, t).sample`; each call sets its time step, and
    is refused before `calibrate`, since step sizes have no values then. Its generators start from
    torch's global generator, so seed that.

    Blocks may be compiled one by one, or computed again (`torch.utils.checkpoint`). With TDQ, whose
    step sizes belong to no block, torch stops where both are done at once (`CheckpointError`).

    Args:
        net: a diffusers `UNet2DModel`; it is left as it is.
        bits: of weights and activations, such as `w4a4`.
        method: `lsq`, `pact`, `nipq`, or for calibration alone `minmax`, `ptq4dm`.
        tdq: where activations' step sizes come from: `temporal` (TDQ), `none` (static), `s10`, ...
            None is TDQ for a method that is trained, and static for calibration alone, which
            starts step sizes over t but fits none of them (`python -m tdq_exp.run` does).
        plan: which layers: `all`, `edge8`, `float_attention`, `release`, `release_shortcut8`.
        habits: `text` or `release`.
        overrides: anything else, as on the command line: `tdq.interval.width=32`. The schedule
            (`model.definition.schedule.beta_end=0.03`, `.steps=4000`) belongs to the network.

    Raises:
        TypeError: for a network of another class.
        ValueError: for weights that are not finite float32, a name or a value that there is not,
            attention heads that the network's config does not say; one line.
    """
    # The configuration that a run of this network would have; a packed file holds it.
    choices = {"bits": bits, "method": method, "plan": plan, "habits": habits}
    choices |= {} if tdq is None else {"tdq": tdq}
    own_checks.require_texts(choices, overrides)
    if method == "fp":
        raise ValueError("method=fp: is the float network itself; choose another method")
    if hasattr(net, "tdq_config"):
        raise ValueError("the network is quantized already: give the float one")
    architecture = architecture_of(net)
    own_checks.require_float32(net)
    if tdq is None:
        of_method = jobs.of_network(architecture, [f"method={method}"])
        choices["tdq"] = "temporal" if of_method.fit.options.trains_on_images else "none"

    named = [f"{group}={option}" for group, option in choices.items()]
    job = jobs.of_network(architecture, [*named, *overrides])
    own_checks.require_heads(net, job.model)

    device = next(net.parameters()).device
    made: Any = copy.deepcopy(net)
    job.model.quantize(made, required(job.recipe))
    made.to(device)
    made.tdq_config = job.recorded()
    made.register_load_state_dict_post_hook(own_checks.calibrated_if_whole)
    made.register_forward_pre_hook(own_checks.require_calibrated)
    return made.eval()


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Batch]) -> None:
    """Set the start value of every step size, in place, from what the float network computes.

    Args:
        net: of `quantize`.
        batches: (x_t, t) over all of time, at least 1,000 samples for a real fit; t is `[B]`. Of
            a class-conditional network (x_t, t, classes). A warning says so if they are of one t.

    Raises:
        ValueError: if there is no batch, or one that can't be shown; the network is as it was then.
    """
    _trainable_config(net)
    own_checks.require_uncorrected(net)
    if not isinstance(batches, Iterable):
        raise ValueError(f"calibrate: wanted batches of (x_t, t), not {type(batches).__name__}")
    shown = list(batches)
    if not shown:
        raise ValueError("calibrate: there is no batch of (x_t, t)")
    for batch in shown:
        own_checks.require_batch(net, batch)
    own_checks.warn_of_one_time(net, [batch[1] for batch in shown])

    training = net.training
    net.eval()
    start = _config(net)["habits"]["habits"].get("start", "error")
    with calibrating(net, len(shown), start) as calibration, own_checks.callable_meanwhile(net):
        for number, (x_t, t, *classes) in enumerate(shown):
            calibration.batch = number
            net(x_t, t, **({"class_labels": classes[0]} if classes else {}))
    net.train(training)
    own_checks.now_calibrated(net)


def parameter_groups(
    net: nn.Module,
    lr: float,
    lr_step_size: float | None = None,
    lr_zero_point: float = 1e-3,
    lr_generator: float | None = None,
    decay: float = 0.01,
) -> list[dict[str, Any]]:
    """Return the groups of an optimiser, each with a rate and a weight decay of its own.

    Args:
        net: of `quantize`, calibrated.
        lr: of weights, biases and norms.
        lr_step_size: of static step sizes and lower bounds; a tenth of `lr` if not given.
        lr_zero_point: of zero points, in shares of the grid.
        lr_generator: of TDQ's generators; `lr` if not given.
        decay: of weights and generators; step sizes and zero points have none.

    Raises:
        ValueError: for a rate out of range, or a network that is not trainable.
    """
    _trainable_config(net)
    own_checks.require_uncorrected(net)
    own_checks.require_rates(
        lr=lr,
        lr_step_size=lr_step_size,
        lr_zero_point=lr_zero_point,
        lr_generator=lr_generator,
        decay=decay,
    )
    rates = Rates(
        weights=lr,
        decay=decay,
        step_size=RELEASED_SHARE * lr if lr_step_size is None else lr_step_size,
        zero_point=lr_zero_point,
        generator=lr if lr_generator is None else lr_generator,
        generator_decay=decay,
    )
    return optimizer_groups(net, rates)


def penalty(net: nn.Module) -> Tensor:
    """Return what the method adds to the loss of the last forward pass, 0-dim; 0 for most methods.

    It is at the time steps of that pass alone, whatever mode it was in: where a loss takes several
    passes, call this after each of them, before the next, and add up.
    """
    _config(net)
    found = penalty_of(net)
    return next(net.parameters()).new_zeros(()) if found is None else found


def correct(
    net: nn.Module,
    float_net: nn.Module,
    images: Tensor,
    classes: Tensor | None = None,
    rule: str = "rescale",
) -> dict[str, float]:
    """Correct the prediction of a trained or calibrated network by tables over t, in place.

    They are measured on the images, noised to 50 time steps by the schedule that `quantize` was
    told of. Call it once, after the training: tables of an earlier network do not fit.

    Args:
        net: of `quantize`, calibrated, and not baked; it predicts the noise.
        float_net: the network that it was made of.
        images: x_0 of the training set, `[N, C, H, W]`, float32 in [-1, 1]; some hundred will do.
        classes: of the images, `[N]`, for a class-conditional network.
        rule: `rescale`, or `ptqd`; see `fit.correction`.

    Returns:
        The mean square error of the prediction before and after, relative to that of the noise, and
        the smallest and largest k.

    Raises:
        ValueError: for what can't be corrected so; the network is as it was then.
    """
    config = _trainable_config(net)
    own_checks.require_calibrated(net)
    own_checks.require_source(net, float_net)
    own_checks.require_images(net, images, classes)
    if rule not in corrections.LEAST:
        raise ValueError(f"rule={rule!r}: choose one of {', '.join(corrections.LEAST)}")
    own_checks.require_uncorrected(net)

    # The configuration with the correction, refused as a command line would be.
    changed = {**config, "fit": {**config["fit"], "correction": rule}}
    job = jobs.rebuild(changed, Path("tdq_config"))

    # Without dropout, in both.
    device, modes = next(net.parameters()).device, (net.training, float_net.training)
    try:
        pair = corrections.Pair(net.eval(), float_net.eval(), job.model, device)
        with products("float32"):
            samples = corrections.NoisedImages(job.model, _Given(images, classes), seed=0)
            found = corrections.tables(pair, samples, rule)
    finally:
        net.train(modes[0])
        float_net.train(modes[1])

    facts = pair.correct(found)
    made: Any = net
    made.tdq_config = changed
    return facts


@dataclass(frozen=True)
class _Given:
    """Somebody's images as a training set."""

    images: Tensor
    classes: Tensor | None
    random: bool = False
    content: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor, flip: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return x_0 of some images, on the CPU; none is mirrored."""
        return self.images[index.to(self.images.device)].cpu()

    def condition(self, index: Tensor) -> Tensor | None:
        """Return their classes."""
        classes = self.classes
        return None if classes is None else classes[index.to(classes.device)].cpu()


def bake(net: nn.Module) -> nn.Module:
    """Return a copy for inference: weights as codes, step sizes and zero points as tables over t.

    It answers as the network does in eval mode, bit for bit.

    Raises:
        ValueError: for a network that was not calibrated.
    """
    _config(net)
    own_checks.require_calibrated(net)
    return conversion.bake(net)


def save(net: nn.Module, path: str | Path) -> int:
    """Write a packed file, which `tdq_exp.load` reads; return its size in bytes.

    Args:
        net: baked, or in training form, of which a baked copy is saved then.
        path: `*.safetensors`.
    """
    config, path = _config(net), own_checks.path_of(path, "path")
    own_checks.require_calibrated(net)
    own_checks.require_finite(net)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: must end in .safetensors")
    baked = net if _is_baked(net) else bake(net)
    return packed.save(baked.state_dict(), path, config, files.fingerprint(config))


def _is_baked(net: nn.Module) -> bool:
    return any(name.endswith("weight_quantizer.codes") for name in net.state_dict())


def _trainable_config(net: nn.Module) -> dict[str, Any]:
    """Return the configuration of a network that is not baked."""
    config = _config(net)
    if _is_baked(net):
        raise ValueError("the network is baked: it has codes and tables, and nothing to train")
    return config


def _config(net: nn.Module) -> dict[str, Any]:
    config = getattr(net, "tdq_config", None)
    if config is None:
        if hasattr(getattr(net, "module", None), "tdq_config"):
            raise ValueError(f"the network is wrapped in {type(net).__name__}: give its .module")
        raise ValueError("the network was not made by tdq_exp.quantize")
    return config
