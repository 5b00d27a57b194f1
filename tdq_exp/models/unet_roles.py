"""Roles of the layers of diffusers' `UNet2DModel`."""

from __future__ import annotations

from torch import nn

from tdq_exp.quant.roles import Role


def unet_roles(net: nn.Module) -> dict[str, Role]:
    """Return the roles of the leaves of a `UNet2DModel`, in the order of its modules.

    SiLU precedes both convolutions of a residual block, the block's time projection, the second
    time-embedding layer and the last convolution. q, k and v of one attention read one tensor:
    their roles share `reads`.

    Raises:
        ValueError: for a layer of no known role.
    """
    roles: dict[str, Role] = {}
    for name, leaf in net.named_modules():
        if not isinstance(leaf, nn.Conv2d | nn.Linear):
            continue

        parent, _, last = name.rpartition(".")
        if name in ("conv_in", "conv_out"):
            roles[name] = Role(
                "first" if last == "conv_in" else "last", name, after_silu=last == "conv_out"
            )

        # The embedding of t, and what each block reads of it.
        elif parent == "time_embedding":
            roles[name] = Role("time_embedding", parent, after_silu=last == "linear_2")
        elif last == "time_emb_proj":
            roles[name] = Role("time_projection", parent, after_silu=True)

        # Residual blocks, and the changes of size between them.
        elif last == "conv_shortcut":
            roles[name] = Role("shortcut", parent)
        elif last in ("conv1", "conv2"):
            roles[name] = Role("conv", parent, after_silu=True)
        elif "samplers." in name:
            roles[name] = Role("resample", parent)

        # Attention.
        elif last in ("to_q", "to_k", "to_v"):
            roles[name] = Role("attention_qkv", parent, reads=f"{parent}.input")
        elif parent.endswith(".to_out"):
            roles[name] = Role("attention_out", parent.removesuffix(".to_out"))
        else:
            raise ValueError(f"layer {name} has no known role in a UNet2DModel")

    return roles
