"""How close generated images are to real ones, and what generating them costs.

`features` turns images into feature vectors, `fidelity` turns feature vectors into distances.
This package is the only one that imports torch_fidelity.
"""
