"""What follows what in diffusers' residual U-Nets: the chains that deployment may fuse."""

from __future__ import annotations

from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from tdq_exp.quant.chains import Chains, NormChain, UpsampleChain


def unet_chains(net: nn.Module) -> Chains:
    """Return the chains of a `UNet2DModel`, whose leaves may have been replaced.

    In a residual block: norm1, SiLU, conv1, unless the block resamples between them; norm2, SiLU,
    dropout, conv2, unless the time embedding scales and shifts the norm. At the end of the network:
    norm, SiLU, last convolution.
    """
    norms: list[NormChain] = []
    upsamples: list[UpsampleChain] = []

    for name, module in net.named_modules():
        prefix = f"{name}." if name else ""

        if isinstance(module, UNet2DModel):
            norms.append(
                NormChain(f"{prefix}conv_norm_out", f"{prefix}conv_act", f"{prefix}conv_out")
            )

        elif isinstance(module, ResnetBlock2D) and module.time_embedding_norm == "default":
            silu = f"{prefix}nonlinearity"
            if module.upsample is None and module.downsample is None:
                norms.append(NormChain(f"{prefix}norm1", silu, f"{prefix}conv1"))
            norms.append(NormChain(f"{prefix}norm2", silu, f"{prefix}conv2", (f"{prefix}dropout",)))

        elif isinstance(module, Upsample2D) and module.interpolate and module.norm is None:
            upsamples.append(UpsampleChain(name, f"{prefix}conv"))

    # Some blocks only interpolate.
    upsamples = [chain for chain in upsamples if net.get_submodule(chain.module).conv is not None]

    return Chains(tuple(norms), tuple(upsamples))
