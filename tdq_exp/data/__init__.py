"""Data: sources of images, decoded and encoded sets, arrays on disk that are filled by groups."""

from tdq_exp.data.sources import Digits, Folder
from tdq_exp.data.tables import Hub

__all__ = ["Digits", "Folder", "Hub"]
