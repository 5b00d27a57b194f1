"""Metrics: how close generated images are to real ones.

`features` turns images into feature vectors, `fidelity` turns feature vectors into distances.
This package is the only one that imports torch_fidelity.
"""

from tdq_exp.metrics.features import digits, efficientnet_lite0, inception
from tdq_exp.metrics.fidelity import METRICS, VALUES

__all__ = ["METRICS", "VALUES", "digits", "efficientnet_lite0", "inception"]
