"""Fused kernels for fake quantization on a CPU: `cpu.c`, compiled once and called by ctypes.

Written out as tensor operations, as `ops` does, a quantizer takes five passes over memory forward
and up to ten back, and these passes are most of what a quantized training step costs above a float
one. Here each direction is one pass. x_hat and g_x are the same to the bit either way; sums differ
in their order (here it does not depend on the number of threads). Without a C compiler, on another
device or for another type, `ops` computes as before.

torch.compile would fuse the same passes; but its calls cost more than these kernels take (measured:
0.2 ms against 0.07 ms), and there are 136 of them in a training step of the small network.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdq_exp.quant.kernels.plain import KINDS
from tdq_exp.quant.kernels.switch import by_rows, enabled, traced
from tdq_exp.runtime import files

SOURCE = Path(__file__).with_name("cpu.c")
CHUNK = 4096  # of cpu.c
# The arithmetic of IEEE 754 as it is written: no reciprocal, no contraction, no other order but
# where a pragma says so.
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
_Pointer, _Long, _Float, _Int = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


@lru_cache
def library() -> ctypes.CDLL | str:
    """Return the compiled kernels, or why there are none."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    about = "\n".join([SOURCE.read_text(), compiler, *FLAGS, platform.machine(), _cpu_flags()])

    # Named after all that the machine code depends on.
    folder = private_folder(Path(os.path.expanduser("~/.cache/tdq_exp/kernels")))
    file = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:20]}.so"

    # Built in a folder of its own, then moved: processes that start together may all build it.
    try:
        if not file.exists():
            with files.scratch(file) as part:
                built = part / file.name
                command = [compiler, *FLAGS, "-fopenmp", str(SOURCE), "-o", str(built), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
                os.replace(built, file)

        _require_own(file)
        found = ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {(error.stderr.strip().splitlines() or ['no message'])[0]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)

    # The signatures of `cpu.c`.
    found.forward.argtypes = [*[_Pointer] * 5, *[_Long] * 4, _Float, _Float, _Int]
    found.backward.argtypes = [*[_Pointer] * 9, *[_Long] * 4, _Float, _Float, _Float, _Int, _Int]

    found.codes.argtypes = [*[_Pointer] * 4, *[_Long] * 3, *[_Float] * 3, _Int]
    found.norm_codes.argtypes = [
        *[_Pointer] * 5,
        *[_Long] * 4,
        ctypes.c_double,
        _Int,
        *[_Float] * 5,
        _Int,
    ]

    found.norm.argtypes = [*[_Pointer] * 5, *[_Long] * 4, ctypes.c_double, _Int, _Int]
    found.ranges.argtypes = [*[_Pointer] * 3, _Long, _Long, _Int]

    training = (found.forward, found.backward)
    inference = (found.codes, found.norm_codes, found.norm, found.ranges)
    for kernel in (*training, *inference):
        kernel.restype = None
    found.codes.restype = found.norm_codes.restype = _Int

    return found


def private_folder(wanted: Path) -> Path:
    """Return a folder for code that will be run: of this user, and closed to all others.

    Whoever can write to the folder, or to one above it, could put code of theirs in its place. A
    folder of ours that others may enter is closed; one that is not ours is left alone, and the code
    goes to a new folder that lasts as long as this process.

    Args:
        wanted: where it would be kept between runs.
    """
    try:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        if wanted.stat().st_uid == os.getuid():
            wanted.chmod(0o700)
        _require_own(wanted)
        for above in wanted.resolve().parents:
            _require_closed(above)
        return wanted
    except OSError:
        temporary = tempfile.mkdtemp(prefix="tdq_exp-kernels-")  # mode 0700
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)


def _require_own(path: Path) -> None:
    """Refuse a file or folder of another user, or one that others can write to.

    Raises:
        OSError: naming it.
    """
    state = path.lstat()
    if state.st_uid != os.getuid() or stat.S_ISLNK(state.st_mode) or state.st_mode & 0o022:
        raise PermissionError(f"{path}: is not this user's alone, and its code is not run")


def _require_closed(folder: Path) -> None:
    """Refuse a folder in which others can rename what is this user's.

    Raises:
        OSError: naming it.
    """
    state = folder.stat()
    open_to_others = state.st_mode & 0o022 and not state.st_mode & stat.S_ISVTX
    if open_to_others or state.st_uid not in (0, os.getuid()):
        raise PermissionError(f"{folder}: others can write to it")


def _cpu_flags() -> str:
    """Return what -march=native depends on."""
    try:
        return next(
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("flags")
        )
    except (OSError, StopIteration):
        return platform.processor()


def fit(x: Tensor, *per_row: Tensor | None) -> bool:
    """Return whether the kernels apply: float32 on a CPU, s and z one for all rows or one for each.

    They do not where somebody records operations, or replaces memory by fakes: see `switch.traced`.
    """
    if (
        not enabled()
        or traced(x)
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or not x.dim()
        or not x.numel()
    ):
        return False
    return by_rows(x, *per_row) and not isinstance(library(), str)


def dense(x: Tensor) -> Tensor:
    """Return x, or a copy, whose rows lie one after another; the layout within a row is free."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if x.is_contiguous() or channels_last else x.contiguous()


def like(x: Tensor, other: Tensor) -> Tensor:
    """Return `other` in the layout of x, and in its own type."""
    if other.stride() == x.stride():
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _step(value: Tensor | None) -> int:
    return int(value is not None and value.numel() > 1)


def forward(
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    n: int,
    p: int,
    noise: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return x_hat of a dense x; dtype is float32 on a CPU.

    s and z are as `fit` wants them, noise (u) in the layout of x.
    """
    assert dtype == torch.float32
    kernels = library()
    assert not isinstance(kernels, str)
    x_hat, rows = torch.empty_like(x), len(x)
    s, z = s.contiguous(), None if z is None else z.contiguous()

    tensors = (x.data_ptr(), _address(noise), x_hat.data_ptr(), s.data_ptr(), _address(z))
    sizes = (rows, x.numel() // rows, _step(s), _step(z))
    kernels.forward(*tensors, *sizes, n, p, torch.get_num_threads())
    return x_hat


def backward(
    g: Tensor,
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    n: int,
    p: int,
    scale: float,
    kind: str,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (g_x, g_s times scale, g_z), of the shapes of x, s and z.

    g and noise are in the layout of x.
    """
    kernels = library()
    assert not isinstance(kernels, str)
    s, z = s.contiguous(), None if z is None else z.contiguous()
    g_x, g_s = torch.empty_like(x), torch.empty_like(s)
    g_z = None if z is None else torch.empty_like(z)

    # Partial sums of each chunk: their order does not depend on the number of threads.
    rows, width = len(x), x.numel() // len(x)
    sums = torch.empty(rows * -(-width // CHUNK) * 2, dtype=torch.float64)

    inputs = (g.data_ptr(), x.data_ptr(), _address(noise))
    gradients = (g_x.data_ptr(), g_s.data_ptr(), _address(g_z))
    steps = (s.data_ptr(), _address(z), sums.data_ptr())
    sizes = (rows, width, _step(s), _step(z))
    threads = torch.get_num_threads()
    kernels.backward(*inputs, *gradients, *steps, *sizes, n, p, scale, KINDS[kind], threads)
    return g_x, g_s, g_z


def codes(x: Tensor, s: Tensor, z: Tensor, n: int, p: int, shift: int = 0) -> tuple[Tensor, bool]:
    """Return codes as bytes, plus a shift that makes signed ones fit: uint8, in the layout of x.

    And whether all of x are numbers: a NaN has no code, and becomes the smallest one.

    Args:
        x: float32.
        s, z: step size and zero point, float32: of one element for the whole tensor, or `[B]` for
            each sample its own.
        n, p: smallest and largest code, n + shift >= 0 and p + shift <= 255.
        shift: 128 for signed codes.
    """
    if not fit(x, s, z):
        s, z = (value.reshape(-1, *[1] * (x.dim() - 1)) for value in (s, z))
        v = x / s
        numbers = not bool(v.isnan().any())
        v.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
        bounded = torch.minimum(torch.maximum(v, n - z), p - z)
        return (bounded.round_() + (z + shift)).to(torch.uint8), numbers

    kernels = library()
    assert not isinstance(kernels, str)
    x, rows = dense(x), len(x)
    found = torch.empty_like(x, dtype=torch.uint8)
    tensors = (x.data_ptr(), found.data_ptr(), s.data_ptr(), z.data_ptr())
    sizes = (rows, x.numel() // rows, _step(s))

    broken = kernels.codes(*tensors, *sizes, n, p, shift, torch.get_num_threads())
    return found, not broken


def norm_codes(
    x: Tensor, norm: nn.GroupNorm, silu: bool, s: float, z: float, n: int, p: int, shift: int = 0
) -> tuple[Tensor, bool]:
    """Return codes of a group norm's output, or of SiLU of it: uint8, channels-last, of x's shape.

    And whether all of that are numbers, as `codes` does.

    Args:
        x: float32 `[B, C, H, W]`.
        norm: what is applied to it.
        silu: whether SiLU comes after the norm.
        s, z, n, p, shift: see `codes`; s and z as numbers.
    """
    if not fit(x):
        return codes(
            normalised(x, norm, silu), torch.tensor([s]), torch.tensor([float(z)]), n, p, shift
        )

    kernels = library()
    assert not isinstance(kernels, str)
    x = x.contiguous(memory_format=torch.channels_last)
    found = torch.empty_like(x, dtype=torch.uint8)
    scratch = torch.empty(2 * x.shape[0] * x.shape[1])

    broken = kernels.norm_codes(
        *_norm_arguments(x, found, scratch, norm, silu), s, z, n, p, shift, torch.get_num_threads()
    )
    return found, not broken


def normalised(x: Tensor, norm: nn.GroupNorm, silu: bool) -> Tensor:
    """Return a group norm's output, or SiLU of it, in channels-last layout.

    Arguments as `norm_codes`.
    """
    if not fit(x):
        y = norm(x)
        return (F.silu(y) if silu else y).contiguous(memory_format=torch.channels_last)
    kernels = library()
    assert not isinstance(kernels, str)
    x = x.contiguous(memory_format=torch.channels_last)
    found = torch.empty_like(x)
    scratch = torch.empty(2 * x.shape[0] * x.shape[1])
    kernels.norm(*_norm_arguments(x, found, scratch, norm, silu), torch.get_num_threads())
    return found


def _norm_arguments(
    x: Tensor, found: Tensor, scratch: Tensor, norm: nn.GroupNorm, silu: bool
) -> tuple[object, ...]:
    batch, channels, height, width = x.shape
    tensors = (x.data_ptr(), found.data_ptr(), scratch.data_ptr())
    affine = (_address(norm.weight), _address(norm.bias))
    sizes = (batch, height * width, channels, norm.num_groups)
    return (*tensors, *affine, *sizes, norm.eps, silu)


def ranges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (smallest, largest) value of each sample, `[B]`, widened to hold 0.

    Args:
        x: float32 `[B, ...]`.
    """
    if not fit(x):
        low, high = x.flatten(1).aminmax(dim=1)
        return low.clamp(max=0), high.clamp(min=0)

    kernels = library()
    assert not isinstance(kernels, str)
    x = dense(x)
    low, high = torch.empty(len(x)), torch.empty(len(x))

    kernels.ranges(
        x.data_ptr(),
        low.data_ptr(),
        high.data_ptr(),
        len(x),
        x.numel() // len(x),
        torch.get_num_threads(),
    )
    return low, high
