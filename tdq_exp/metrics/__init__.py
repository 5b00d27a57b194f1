"""Metrics: how close generated images are to real ones.

`features` turns images into feature vectors, `fidelity` turns feature vectors into distances.
This package is the only one that imports torch_fidelity.
"""

from tdq_exp.metrics.features import digits, efficientnet_lite0, inception

__all__ = ["digits", "efficientnet_lite0", "inception"]
