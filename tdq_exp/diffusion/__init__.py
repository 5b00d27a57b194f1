"""Diffusion in plain torch: noise schedule, training objective, samplers. Knows nothing of quantization."""
