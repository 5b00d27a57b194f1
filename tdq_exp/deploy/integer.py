"""Integer execution of a baked network: products of codes, scaled by the step size at time t.

    y = s_x s_w [ sum (q_x - z_x) (q_w - shift) + (shift - z_w) sum (q_x - z_x) ] + b

q_x are bytes, quantized from the layer's float input with s_x(t), z_x(t) from the table; q_w are
signed bytes, packed once. The sum is exact in 32-bit integers, so the only rounding is the last
multiplication: the output differs from the simulated layer's by what that one's float sum rounds. A
step size that changes with t costs nothing: the kernel takes it at run time. For affine weights
(post-training quantization) the shift of a channel is its zero point, if its codes then fit into
signed bytes, which they do up to 7 bits, and else the nearest number with which they fit; only then
is there a second sum, one more channel of ones for the whole layer.

Convolutions and linear layers run so; attention products of two activations stay simulated, for
there is no kernel that multiplies two batches of codes. On a CPU without VNNI instructions, layers
whose products would not be exact there stay simulated, too (see `products`): those of 8-bit codes
with 8-bit weights. On a GPU the layers and coders are those of `gpu`, and grouped convolutions stay
simulated. A network runs on the device that it is on when its layers are chosen.

A NaN has no code. The step size of a tensor that holds one is NaN, and so is the network's answer,
for the whole batch; that of the simulated network is NaN, too, at least where the input was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.deploy import gpu
from tdq_exp.deploy.coders import (
    ByteSource,
    Coded,
    coded_input,
    coder_of,
    gives_codes,
    largest_code,
    signed_codes,
    too_wide,
)
from tdq_exp.deploy.fuse import fuse
from tdq_exp.deploy.products import Product, Window, exact_here, fits_32_bits
from tdq_exp.quant.chains import Chains
from tdq_exp.quant.convert import replace_module
from tdq_exp.quant.kernels import integer_operators as gpu_kernels
from tdq_exp.quant.layers import CodedWeight, QuantAttention, QuantConv2d, QuantLayer
from tdq_exp.quant.quantizer import Quantizer

INEXACT = (
    "8-bit by 8-bit products are cut off at 16 bits on this CPU, which has no VNNI instructions"
)
TOO_LONG = "its sums may not fit into 32 bits"


def unavailable(device: torch.device) -> str | None:
    """Return why integer layers can't run on a device, in one line, or None."""
    if device.type != "cpu":
        return gpu_kernels.unavailable(device)
    if not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return "this torch has no oneDNN kernels"
    return None


class IntegerLayer(nn.Module):
    """A quantized convolution or linear layer on codes.

    Args:
        layer: baked; see `reason_against`.
        coder: of its input; None if the input arrives as `Coded` (q, k and v share one).
    """

    def __init__(self, layer: QuantLayer, coder: ByteSource | None) -> None:
        super().__init__()
        original: Any = layer.layer
        coded = layer.weight_quantizer
        assert isinstance(coded, CodedWeight)
        self.coder, self.conv = coder, isinstance(layer, QuantConv2d)

        self.bias: Tensor | None = original.bias
        window: Window | None = None
        if self.conv:
            window = (
                list(original.stride),
                list(original.padding),
                list(original.dilation),
                original.groups,
            )

        codes, rest = signed_codes(coded)
        self.w_scale: Tensor
        self.register_buffer(
            "w_scale", coded.step_size.reshape(-1).expand(len(codes)).float().clone()
        )

        self.product = Product(codes, self.w_scale, window)

        # The second sum: what is left over of affine weights, in signed codes.
        self.affine = bool(rest.any())
        self.rest: Tensor
        if self.affine:
            self.ones = Product(torch.ones_like(codes[:1]), torch.ones(1), window)
            rest = rest * self.w_scale
            self.register_buffer("rest", rest.reshape(-1, 1, 1) if self.conv else rest)

    def _sums(self, x: Coded, product: Product, bias: Tensor | None = None) -> Tensor:
        """Return scale s_x sum (q_x - z_x) w, plus a bias."""
        if not isinstance(x.s, Tensor):
            return product(x.codes, x.s, x.z, bias)  # type: ignore[arg-type]

        # One (s, z) for each sample: the kernel has one for all, so z's part, z sum w over what is
        # not padding, is taken off afterwards.
        y = product(x.codes, 1.0, 0)
        ones = product(torch.ones_like(x.codes[:1]), 1.0, 0)
        s, z = (v.reshape(-1, *[1] * (y.dim() - 1)) for v in (x.s, torch.as_tensor(x.z)))
        y.addcmul_(ones, z, value=-1).mul_(s)
        if bias is not None:
            y.add_(bias.reshape(-1, 1, 1) if self.conv else bias)
        return y

    def forward(self, x: Tensor | Coded) -> Tensor:
        """Return the float output of a float or coded input."""
        coded = coded_input(x, self.coder)
        y = self._sums(coded, self.product, self.bias)
        if self.affine:
            y.addcmul_(self._sums(coded, self.ones), self.rest)
        return y


def reason_against(layer: QuantLayer) -> str | None:
    """Return why a layer can't run on codes, or None."""
    quantizer, coded, original = layer.input_quantizer, layer.weight_quantizer, layer.layer
    if not isinstance(coded, CodedWeight):
        return "its weights are not integers times a step"
    if coded.codes.dtype not in (torch.int8, torch.uint8):
        return "its weights are wider than 8 bits"
    if quantizer is not None and too_wide(quantizer):
        return "its input is wider than 8 bits"
    if quantizer is not None and not gives_codes(quantizer):
        return "its step size is read from the input by a rule of its own"
    if isinstance(original, nn.Conv2d):
        if original.padding_mode != "zeros" or isinstance(original.padding, str):
            return "its padding is not of zeros"
        if original.groups > 1 and coded.zero_point is not None:
            return "it has groups and affine weights"
    return None


def runs_on_gpu(net: nn.Module) -> bool:
    """Return whether a network would run on the kernels for GPUs: where its parameters are."""
    return next(net.parameters()).device.type != "cpu"


def reason_here(layer: QuantLayer, quantizer: Quantizer, on_gpu: bool) -> str | None:
    """Return why this device can't run a layer on codes, or None.

    Args:
        layer: baked, without a `reason_against` it.
        quantizer: of its input.
        on_gpu: whether to take the kernels for GPUs.
    """
    if on_gpu:
        return gpu.reason_against(layer)
    coded = layer.weight_quantizer
    assert isinstance(coded, CodedWeight)
    largest, codes = largest_code(quantizer), signed_codes(coded)[0]
    if not fits_32_bits(largest, codes):
        return TOO_LONG
    return None if exact_here(largest, codes) else INEXACT


def codable(net: nn.Module) -> dict[str, Quantizer]:
    """Return the layers of a baked network that can run on codes on some device.

    Returns:
        By name, the quantizer of the layer's input.

    q, k and v of one attention read one coded tensor, so all three of them are in it or none.
    """
    shared: dict[str, Quantizer] = {}
    for name, module in net.named_modules():
        if isinstance(module, QuantAttention) and module.input_quantizer is not None:
            shared |= dict.fromkeys(readers(net, name), module.input_quantizer)

    found: dict[str, Quantizer] = {}
    for name, module in net.named_modules():
        if isinstance(module, QuantLayer) and reason_against(module) is None:
            if module.input_quantizer is not None:
                found[name] = module.input_quantizer
            elif name in shared and not too_wide(shared[name]) and gives_codes(shared[name]):
                found[name] = shared[name]

    return _whole_attentions(net, found)


def candidates(net: nn.Module) -> dict[str, IntegerLayer | gpu.GpuLayer]:
    """Return the layers of a baked network that can run on codes, and exactly, on its device.

    Returns:
        By name, the layer in that form.

    q, k and v of one attention are candidates together or not at all.
    """
    layers: dict[str, Any] = dict(net.named_modules())
    on_gpu = runs_on_gpu(net)
    found: dict[str, IntegerLayer | gpu.GpuLayer] = {}
    kind = gpu.GpuLayer if on_gpu else IntegerLayer
    for name, quantizer in _codable_here(net).items():
        own = layers[name].input_quantizer is not None
        found[name] = kind(layers[name], byte_source(quantizer, on_gpu) if own else None)
    return found


def _codable_here(net: nn.Module) -> dict[str, Quantizer]:
    """Return which of the `codable` layers can run on the network's device."""
    layers: dict[str, Any] = dict(net.named_modules())
    on_gpu = runs_on_gpu(net)
    here = {
        name: reads
        for name, reads in codable(net).items()
        if reason_here(layers[name], reads, on_gpu) is None
    }
    return _whole_attentions(net, here)


def byte_source(quantizer: Quantizer, on_gpu: bool) -> ByteSource:
    """Return the coder of a baked quantizer on a device."""
    return gpu.gpu_coder_of(quantizer) if on_gpu else coder_of(quantizer)


def left_out(net: nn.Module) -> dict[str, str]:
    """Return why each quantized layer of a baked network that is no candidate is none, by name."""
    reads, on_gpu, found = codable(net), runs_on_gpu(net), _codable_here(net)
    reasons = {}
    for name, layer in net.named_modules():
        if isinstance(layer, QuantLayer) and name not in found:
            reason = reason_against(layer)
            if reason is None and name in reads:
                reason = reason_here(layer, reads[name], on_gpu)
            reasons[name] = reason or "what it reads can't be given in codes to all that read it"
    return reasons


def readers(net: nn.Module, name: str) -> tuple[str, ...]:
    """Return the names of q, k and v of an attention: the layers that read its coded tensor.

    They are the layers of the attention's block without an input quantizer of their own.

    Args:
        net: baked.
        name: of the `QuantAttention`.
    """
    block = name.rpartition(".")[0]
    return tuple(
        f"{block}.{child}"
        for child, module in net.get_submodule(block).named_children()
        if isinstance(module, QuantLayer) and module.input_quantizer is None
    )


def _whole_attentions(net: nn.Module, found: dict[str, Quantizer]) -> dict[str, Quantizer]:
    """Return `found` without the q, k and v of which not all three are in it."""
    for name, module in net.named_modules():
        if not isinstance(module, QuantAttention) or module.input_quantizer is None:
            continue
        leaves = readers(net, name)
        if not all(leaf in found for leaf in leaves):
            found = {leaf: reads for leaf, reads in found.items() if leaf not in leaves}
    return found


@torch.no_grad()
def integerize(
    net: nn.Module,
    chains: Chains,
    names: Iterable[str] | None = None,
    tiles: Mapping[str, Sequence[int]] | None = None,
) -> nn.Module:
    """Return a copy of a baked network whose layers run on codes, in channels-last layout.

    Its root forward sets the time as before.

    Args:
        net: baked, in eval mode, on the device that it is to run on.
        chains: what may be fused, from its model's description.
        names: which of the `candidates`; all if not given.
        tiles: of a GPU's kernel, by name, where they were measured.

    Raises:
        ValueError: for a name that is not a candidate, or one of q, k and v without the others.
        RuntimeError: where there are no integer kernels (see `unavailable`).
    """
    reason = unavailable(next(net.parameters()).device)
    if reason is not None:
        raise RuntimeError(f"sampler.engine=integer: {reason}")

    # Which layers: refused before anything is replaced.
    net = copy.deepcopy(net)

    found = candidates(net)
    chosen = set(found if names is None else names)
    if unknown := sorted(chosen - found.keys()):
        why = f" here: {left_out(net)[unknown[0]]}" if unknown[0] in codable(net) else ""
        raise ValueError(f"{unknown[0]}: can't run on codes{why}")

    # q, k and v share one coder, that of their attention.
    for name, module in list(net.named_modules()):
        if isinstance(module, QuantAttention) and module.input_quantizer is not None:
            leaves = set(readers(net, name))
            if leaves & chosen:
                if not leaves <= chosen:
                    raise ValueError(
                        f"{name}: q, k and v read one coded tensor: choose all three or none"
                    )

                coder: Any = byte_source(module.input_quantizer, runs_on_gpu(net))
                module.input_quantizer = coder

    for name in chosen:
        layer = found[name]
        if isinstance(layer, gpu.GpuLayer) and tiles is not None:
            layer.tile = tiles.get(name, ())
        replace_module(net, name, layer)
    fuse(net, chains)
    return net.to(memory_format=torch.channels_last)
