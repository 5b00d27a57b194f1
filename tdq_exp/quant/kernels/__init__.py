"""Fused kernels of fake quantization."""
