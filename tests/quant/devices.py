"""Where the laws of the GPU's kernels run: on a GPU, or on a CPU in Triton's interpreter."""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1"),
)
devices = pytest.mark.parametrize("device", [CPU, GPU])
