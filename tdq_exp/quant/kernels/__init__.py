"""Fused kernels of fake quantization: in C for a CPU, in Triton for a GPU, and as operators."""

from tdq_exp.quant.kernels.choice import (
    fused,
    fused_on_gpu,
    kernels_for,
    readable,
    result_type,
    used,
)
from tdq_exp.quant.kernels.cpu import dense, like
from tdq_exp.quant.kernels.operators import traced_fake_quantize
from tdq_exp.quant.kernels.switch import traced, unfused

__all__ = [
    "dense",
    "fused",
    "fused_on_gpu",
    "kernels_for",
    "like",
    "readable",
    "result_type",
    "traced",
    "traced_fake_quantize",
    "unfused",
    "used",
]
