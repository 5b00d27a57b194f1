"""Laws of kernels that this process can't run: the GPU's interpreted, and those of a CPU without VNNI.

One Python is started anew for both, as imports take seconds: triton reads TRITON_INTERPRET when it
is imported, and oneDNN reads ONEDNN_MAX_CPU_ISA when it makes its first kernel.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tdq_exp.deploy import integer, products

ROOT = Path(__file__).resolve().parents[1]
TRITON = ["tests/quant/test_kernels_triton.py", "tests/quant/test_kernels_integer.py"]
LAYERS = "tests/deploy/test_integer.py::test_every_layer_gives_what_the_simulated_one_gives"
PRODUCTS = [
    "tests/deploy/test_products.py",
    *(f"{LAYERS}[{name}]" for name in ("lsq_tdq-7", "lsq_edge8-4", "minmax-7")),
]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
HAS_VNNI = (
    integer.unavailable(torch.device("cpu")) is None
    and platform.machine() == "x86_64"
    and products.all_are_exact_here()
)
needs_vnni = pytest.mark.skipif(
    not HAS_VNNI,
    reason="the kernels of this CPU are the ones without VNNI, or none of x86-64: their own tests ran them",
)


@pytest.fixture(scope="module")
def outcomes():
    """(file, outcome) -> how many tests; and what that process printed."""
    triton = [] if importlib.util.find_spec("triton") is None else TRITON
    limited = {"TRITON_INTERPRET": "1", "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-p", "no:xdist", "-m", "not gpu",
         *triton, *(PRODUCTS if HAS_VNNI else [])],
        cwd=ROOT, env=os.environ | limited, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    lines = re.findall(
        r"^(tests/\S+\.py)::.*? ([A-Z]+)(?: \(.*\))? +\[ *\d+%\]$", done.stdout, re.M
    )
    return Counter(lines), done.stdout + done.stderr[-1000:]


@needs_triton
def test_the_gpus_kernels_obey_their_laws_under_the_interpreter(outcomes):
    count, said = outcomes
    for file in TRITON:
        found = {outcome for name, outcome in count if name == file}
        # What asks for Triton's compiler is skipped there: it runs beside this, without interpreter.
        assert found - {"SKIPPED"} == {"PASSED"}, said


@needs_vnni
def test_products_of_codes_are_exact_with_the_kernels_of_a_cpu_without_vnni(outcomes):
    """oneDNN is told to use AVX2 alone: then its products are cut off as they are on a CPU that has no more."""
    count, said = outcomes
    for file in ("tests/deploy/test_products.py", "tests/deploy/test_integer.py"):
        assert {outcome for name, outcome in count if name == file} == {"PASSED"}, said
    assert count["tests/deploy/test_integer.py", "PASSED"] == 3
    assert "test_the_probe_finds_the_kernels_of_a_limited_cpu PASSED" in said
