"""What training needs to know of a quantized network, without knowing which quantizers it holds.

    initialize(net)             any valid start value in every slot, before a state is loaded
    parameter_groups(net)       trainable parameters, by what they are
    set_final_phase(net, ...)   tells rules that train in two phases which one it is
    penalty(net)                what the rules add to the loss

Each slot answers for itself: a module names the group of its own parameters (`parameter_group`),
a rule defines `penalty` and `set_final_phase`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tdq_exp.quant.quantizer import Quantizer

GROUPS = ("weights", "step_sizes", "zero_points", "generators")


def quantizers(net: nn.Module) -> Iterator[Quantizer]:
    """Yield every quantizer of a network, of weights and activations, in the order of modules."""
    return (module for module in net.modules() if isinstance(module, Quantizer))


def initialize(net: nn.Module) -> None:
    """Give every interval and zero point a valid start value (s = 1, z = 0).

    For a network whose values are loaded afterwards: a new one holds numbers that no calibration
    has set.

    Args:
        net: quantized, in training form; changed in place.
    """
    for quantizer in quantizers(net):
        quantizer.start(1.0, 0)


def parameter_groups(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return every trainable parameter in exactly one group, in the order of the modules.

    The module that owns a parameter names its group by the class attribute `parameter_group`; the
    parameters of all other modules are "weights".

    Args:
        net: quantized, or a list of its parts.

    Returns:
        The keys are `GROUPS`; a group may be empty.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for module in net.modules():
        name = getattr(module, "parameter_group", "weights")
        own = module.parameters(recurse=False)
        groups[name] += [parameter for parameter in own if parameter.requires_grad]
    return groups


def set_final_phase(net: nn.Module, final: bool) -> None:
    """Tell every rule whether training is in its final phase.

    There a rule computes what inference does. A fit calls this before each update. Rules with one
    phase ignore it; NIPQ adds noise until it is final.

    Args:
        net: quantized, in training form.
        final: whether the final phase has begun.
    """
    for quantizer in quantizers(net):
        quantizer.set_final_phase(final)


def penalty(net: nn.Module) -> Tensor | None:
    """Return the sum of the rules' penalties at the current time steps, or None if no rule has one.

    Args:
        net: quantized, in training form, after a forward pass: those of the last one are meant.

    Returns:
        0-dim, to be added to the loss.
    """
    asked = [quantizer.penalty() for quantizer in quantizers(net)]
    terms = [term for term in asked if term is not None]
    return torch.stack(terms).sum() if terms else None
