"""Models: descriptions of diffusers' networks, their weights, and samplers of diffusers."""

from tdq_exp.models.codec import Autoencoder
from tdq_exp.models.latent import LatentDiffusionModel
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.models.samplers import Ddpm, Pndm

__all__ = ["Autoencoder", "Ddpm", "DiffusionModel", "LatentDiffusionModel", "Pndm"]
