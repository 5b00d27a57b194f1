"""Diffusion: noise schedule, training objective, random draws, the DDIM sampler. Plain torch."""

from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.diffusion.schedule import Schedule

__all__ = ["Ddim", "Schedule"]
