"""Chains of modules that deployment may fuse: plain data that a model's description hands over.

Everything is a name of the network's `named_modules`, so nobody but the model's description needs
to know how its blocks are built.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormChain:
    """A group norm, the SiLU after it, and the one layer that reads the result.

    Args:
        norm: the norm.
        activation: the SiLU; two chains may share it.
        passed: element-wise modules between the SiLU and the layer, such as dropout.
        reader: the layer.
    """

    norm: str
    activation: str
    reader: str
    passed: tuple[str, ...] = ()


@dataclass(frozen=True)
class UpsampleChain:
    """Nearest-neighbour interpolation to twice the size, and then a convolution.

    Args:
        module: what does both.
        conv: the convolution inside.
    """

    module: str
    conv: str


@dataclass(frozen=True)
class Chains:
    """All chains of a network."""

    norms: tuple[NormChain, ...] = ()
    upsamples: tuple[UpsampleChain, ...] = ()
