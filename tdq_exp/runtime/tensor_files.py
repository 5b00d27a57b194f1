"""Tensors on disk: the one reader and writer of safetensors, and of training states.

Everything written here carries a checksum, which is verified whenever it is read:

    *.safetensors  `checksum` in the header's metadata: a hash of the tensors, their names, types
                   and shapes, and of the rest of the metadata
    *.pt           a line after the end of PyTorch's zip archive: CRC-32 and length of all before it

Files of others, and of earlier versions, have none; they are read without. Nothing that a file
holds is ever executed.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tdq_exp.runtime import files
from tdq_exp.runtime.hashes import tensor_hash

CHECKSUM = "checksum"
_CHECKSUM_VALUE = re.compile(r"sha256:[0-9a-f]{16}:[0-9a-f]{16}")
WHOLE = "put a whole file in its place, or remove it"
_PIECE = 1 << 22  # bytes that are read at a time

# How safetensors spells the types.
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds.

    Args:
        tensors: by name, on the CPU.
        metadata: of the header, without the checksum.
        checked: whether there was a checksum, and it was right.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    checked: bool


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    remedy: str = files.REMEDY,
) -> None:
    """Write a safetensors file with a checksum: the whole file or none.

    Equal tensors and metadata give equal files.

    Args:
        path: file to write or replace; its folder is made if need be.
        tensors: by name.
        metadata: what to say about them in the header.
        remedy: what the message of an error says to do.

    Raises:
        OSError: naming the file, if it can't be written or the disk is full.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {key: value for key, value in sorted(metadata.items()) if key != CHECKSUM}
    about[CHECKSUM] = _checksum(plain, about)

    # 1. The header: where each tensor lies. Wider types come first, so that all are aligned.
    order = sorted(plain, key=lambda name: (-plain[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(about.items()))}
    start = 0
    for name in order:
        tensor = plain[name]
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop

    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)

    # 2. The file.
    with files.replacing(path, remedy) as part, part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            file.write(plain[name].reshape(-1).view(torch.uint8).numpy().data)


def read_tensors(path: Path) -> TensorFile:
    """Return the content of a safetensors file.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is damaged, or no safetensors.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    files.require_regular(path)

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = "the file is empty" if path.stat().st_size == 0 else _first_line(error)
        raise files.damaged(path, reason, WHOLE) from error

    # A damaged name of the key does not turn the check off.
    found = metadata.pop(CHECKSUM, None)
    if found is None:
        if any(_CHECKSUM_VALUE.fullmatch(value) for value in metadata.values()):
            raise files.damaged(path, "the name of its checksum is damaged", WHOLE)
    elif found != _checksum(tensors, metadata):
        raise files.damaged(path, "its content does not match its checksum", WHOLE)
    return TensorFile(tensors, metadata, found is not None)


def require_of(path: Path, metadata: Mapping[str, str], fit: str) -> None:
    """Refuse a file that says that it belongs to another fit.

    Raises:
        ValueError: naming both fingerprints.
    """
    if metadata.get("fit", fit) != fit:
        raise ValueError(
            f"{path}: belongs to another fit ({metadata['fit']}, wanted {fit}); put the file of"
            " this run back, or remove it"
        )


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a file of tensors and plain values in one step, with a checksum at its end.

    Raises:
        OSError: if the folder can't be written or is full; the old file is untouched then.
    """
    with files.replacing(path) as part:
        try:
            torch.save(dict(state), part)
        except RuntimeError as error:  # so torch reports a full disk
            raise OSError(str(error)) from error

        with part.open("r+b") as file:
            checksum, size = _crc32(file)
            file.write(_trailer(checksum, size))


def read_state(path: Path) -> dict[str, Any] | None:
    """Return what `write_state` wrote, on the CPU, or None if there is no file.

    Raises:
        ValueError: if the file is damaged.
    """
    if not path.exists():
        return None

    check_state(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and runtime errors: not ours, or not whole
        raise files.damaged(path, "not a whole PyTorch file") from error
    if not isinstance(found, dict):
        raise files.damaged(path, f"a {type(found).__name__} in place of a state")
    return found


@contextmanager
def values_of(path: Path) -> Iterator[None]:
    """Refuse a state whose values can't be taken, within the `with` block, in one line.

    A checksum says that a file is whole, not who wrote it: keys, shapes and types may be any.

    Raises:
        ValueError: naming the file.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        reason = (
            f"it holds no state of this fit: {type(error).__name__}, {_first_line(error)[:120]}"
        )
        raise files.damaged(path, reason) from error


def check_state(path: Path) -> bool:
    """Return whether a file of `write_state` has a checksum; earlier versions wrote none.

    Raises:
        ValueError: if the file does not match it.
    """
    files.require_regular(path)
    length = len(_trailer(0, 0))
    size = path.stat().st_size - length
    with path.open("rb") as file:
        file.seek(max(size, 0))
        trailer = file.read()
        if not re.fullmatch(rb"\ntdq_exp crc32 .{8} .{16}\n", trailer, re.DOTALL):
            return False

        file.seek(0)
        if trailer != _trailer(*_crc32(file, size)):
            raise files.damaged(path, "its content does not match its checksum")
    return True


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the checksum of a safetensors file: of its tensors, and of its metadata."""
    about = {key: value for key, value in metadata.items() if key != CHECKSUM}
    return f"sha256:{tensor_hash(tensors)}:{files.fingerprint(about)}"


def _trailer(checksum: int, size: int) -> bytes:
    return f"\ntdq_exp crc32 {checksum:08x} {size:016d}\n".encode()


def _crc32(file: BinaryIO, size: int | None = None) -> tuple[int, int]:
    """Return CRC-32 and length of what follows in a file, or of its first `size` bytes."""
    checksum, done = 0, 0
    while size is None or done < size:
        piece = file.read(_PIECE if size is None else min(_PIECE, size - done))
        if not piece:
            break
        checksum, done = zlib.crc32(piece, checksum), done + len(piece)
    return checksum, done


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
