"""Which feature networks fetch their weights where none are named, and where these lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tdq_exp.metrics.features import FeatureNetwork, inception, inception_file

FETCHED: dict[Callable[..., FeatureNetwork], Callable[[], Path]] = {inception: inception_file}


def file_to_fetch(network: Callable[..., FeatureNetwork], weights: str | None) -> Path | None:
    """Return the file that building a feature network fetches if it is not there, or None.

    Args:
        network: what `eval.features` names.
        weights: `eval.features.weights`, or None.
    """
    place = FETCHED.get(network)
    return None if weights is not None or place is None else place()
