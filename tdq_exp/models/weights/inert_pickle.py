"""Reads the tensors of PyTorch's pickle files, and executes nothing that a file says.

A pickle is a program for a small stack machine: GLOBAL pushes the object of a given name, REDUCE
and its relatives call what lies on the stack, BUILD hands an object its state. Whoever decides what
GLOBAL yields decides what can happen. Here it yields one of five inert things:

    torch.FloatStorage, ...               the `torch.dtype` of its elements, a value
    torch._utils._rebuild_tensor[_v2]     `StoredTensor`: where a tensor lies in the file
    torch._utils._rebuild_parameter       its first argument
    collections.OrderedDict               a dict that takes items but no attributes
    any other name                        a class of its own that keeps no arguments, state or items

No name is ever imported, so a file may carry optimisers, callbacks or configurations of packages
that are not installed (NumPy's arrays included: no weight that this project reads is one).
`torch.load` would refuse such a file in its safe mode, and run it in the other.

Two containers are read. The zip format: an archive, not compressed, with the records
`<root>/data.pkl` (the object), `<root>/data/<key>` (the bytes of a storage) and `<root>/byteorder`.
The legacy format: five pickles (magic number, protocol version, system information, the object, the
list of storage keys), then for each key the number of elements as int64 and its bytes, little
endian. Bytes are read only for the tensors that are picked: a training state's optimiser, twice the
size of its network, stays on disk.

References:
    The opcodes: https://docs.python.org/3/library/pickletools.html.
    The containers: https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

import torch

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_ZIP_SIGNATURE = b"PK\x03\x04"


class CheckpointError(ValueError):
    """Weights can't be used: one line that begins with the file, folder or id."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class _Storage:
    """A flat array in the file: element type, length, and how to read its bytes."""

    __slots__ = ("_flat", "_read", "dtype", "numel")

    def __init__(self, dtype: torch.dtype, numel: int):
        self.dtype = dtype
        self.numel = numel
        self._read: Callable[[], bytes] | None = None
        self._flat: torch.Tensor | None = None

    def __setstate__(self, state: object) -> None:
        """Take no state from a file."""

    @property
    def nbytes(self) -> int:
        """Return the size of the storage, bytes."""
        return self.numel * self.dtype.itemsize

    def bind(self, read: Callable[[], bytes]) -> None:
        """Note how to get the bytes; nothing is read yet."""
        self._read = read

    def flat(self) -> torch.Tensor:
        """Return the elements as a vector, shared by all tensors that view this storage."""
        if self._flat is None:
            content = bytearray(self._read()) if self._read is not None else bytearray()
            if len(content) != self.nbytes:
                raise EOFError(f"a storage of {self.nbytes} bytes has {len(content)}")
            self._flat = (
                torch.frombuffer(content, dtype=self.dtype)
                if content
                else torch.empty(0, dtype=self.dtype)
            )
        return self._flat


class StoredTensor:
    """A tensor that is still in its file.

    Its constructor takes what `torch._utils._rebuild_tensor_v2` takes, and ignores whether it
    requires a gradient, and its hooks. Metadata, which come last, say whether the storage holds the
    negative or the conjugate of the tensor: such a one can't be read.
    """

    __slots__ = ("_metadata", "_offset", "_shape", "_storage", "_stride")

    def __init__(
        self,
        storage: object,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: object = None,
        hooks: object = None,
        metadata: object = None,
        *_: object,
    ):
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        self._metadata = metadata
        self._storage = storage
        self._offset = offset
        self._shape = shape
        self._stride = stride

    def __setstate__(self, state: object) -> None:
        """Take no state from a file."""

    def read(self) -> torch.Tensor:
        """Return the tensor; offsets and strides that leave the storage are an error."""
        if self._metadata:
            raise pickle.UnpicklingError("a tensor that is kept as its negative or its conjugate")
        return self._storage.flat().as_strided(self._shape, self._stride, self._offset).contiguous()


class _Parameter:
    """Calling this class gives back its first argument: a parameter is the tensor in it."""

    def __new__(cls, data: Any = None, *_: object) -> Any:
        return data

    def __setstate__(self, state: object) -> None:
        """Take no state from a file."""


class _Dict(dict[Any, Any]):
    """A dict without the instance attributes that a file may set, such as `items`."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Take no state from a file."""


class Placeholder:
    """An object of a class that is not in the list: takes everything, keeps and does nothing."""

    origin = ""

    def __new__(cls, *_: object, **__: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object):
        pass

    def __call__(self, *_: object, **__: object) -> "Placeholder":
        # A bound method is pickled as getattr(object, name), that is as a placeholder, and may then
        # be called.
        return Placeholder()

    def __setstate__(self, state: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Drop an item of what was a list."""

    def extend(self, items: object) -> None:
        """Drop the items of what was a list."""

    def add(self, item: object) -> None:
        """Drop a member of what was a set."""

    def update(self, items: object) -> None:
        """Drop the members of what was a set."""

    def __setitem__(self, key: object, value: object) -> None:
        """Drop an item of what was a dict."""


_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}

_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): StoredTensor,
    ("torch._utils", "_rebuild_tensor_v2"): StoredTensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("collections", "OrderedDict"): _Dict,
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{("torch", name): dtype for name, dtype in _STORAGE_DTYPES.items()},
}


class InertUnpickler(pickle.Unpickler):
    """A pickle reader in which every name is one of the five inert things (see the module).

    Args:
        stream: file at the beginning of a pickle; it is left behind its end.
    """

    def __init__(self, stream: IO[bytes]):
        # latin1 can't fail on the byte strings of Python 2.
        super().__init__(stream, encoding="latin1")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what the file means by a name; nothing is imported to find out."""
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        return type("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """Return what a reference to the outside of the pickle means: a storage, or a class."""
        kind, *rest = pid
        if kind == "module":
            return rest[0]

        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown kind of reference {kind!r}")

        # What torch.save writes of a storage, and nothing else.
        dtype, key, _, numel, *view = rest
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(
                f"unknown type of storage {getattr(dtype, 'origin', dtype)}"
            )

        if any(part is not None for part in view):
            raise pickle.UnpicklingError("a storage that is a view of another one")

        if not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError("a storage without a key or a length")

        # Tensors may share a storage, if they agree on what it is.
        storage = self.storages.setdefault(key, _Storage(dtype, numel))
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise pickle.UnpicklingError(f"storage {key} has two types or lengths")

        return storage


def _require_byte_order(order: str) -> None:
    if order != sys.byteorder:
        raise pickle.UnpicklingError(f"its numbers are {order} endian and this machine's are not")


def _zip_tree(stream: IO[bytes]) -> Any:
    """Return the object of a file in the zip format, its tensors unread."""
    archive = zipfile.ZipFile(stream)
    roots = [
        name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise pickle.UnpicklingError(
            f"a zip archive with {len(roots)} records data.pkl, not a PyTorch file"
        )

    root = roots[0]

    def read(record: str) -> bytes:
        # PyTorch never compresses, so a record can't be larger than the file that holds it.
        if archive.getinfo(record).compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"record {record} is compressed")
        return archive.read(record)

    has_order = f"{root}byteorder" in archive.namelist()
    _require_byte_order(read(f"{root}byteorder").decode() if has_order else "little")

    # The object first, then the place of each storage's bytes.
    with archive.open(f"{root}data.pkl") as pickled:
        unpickler = InertUnpickler(pickled)
        tree = unpickler.load()

    for key, storage in unpickler.storages.items():
        record = f"{root}data/{key}"
        if archive.getinfo(record).file_size != storage.nbytes:
            raise EOFError(f"storage {key} should have {storage.nbytes} bytes")
        storage.bind(partial(read, record))

    return tree


def _legacy_tree(stream: IO[bytes]) -> Any:
    """Return the object of a file in the legacy format, its tensors unread."""
    if InertUnpickler(stream).load() != _MAGIC_NUMBER:
        raise pickle.UnpicklingError("a pickle, but not PyTorch's")
    if InertUnpickler(stream).load() != _PROTOCOL_VERSION:
        raise pickle.UnpicklingError("unknown protocol version")

    # System information: the bytes are little endian whatever it says.
    InertUnpickler(stream).load()
    _require_byte_order("little")

    # The object, then the keys of its storages, then their bytes.
    unpickler = InertUnpickler(stream)
    tree = unpickler.load()

    keys = InertUnpickler(stream).load()
    if not isinstance(keys, list) or sorted(keys) != sorted(unpickler.storages):
        raise pickle.UnpicklingError("its list of storages is not that of its tensors")

    end = os.fstat(stream.fileno()).st_size

    def read(start: int, nbytes: int) -> bytes:
        stream.seek(start)
        return stream.read(nbytes)

    for key in keys:
        storage = unpickler.storages[key]
        (numel,) = struct.unpack("<q", stream.read(8))
        start = stream.tell()
        if numel != storage.numel or start + storage.nbytes > end:
            raise EOFError(f"storage {key} should have {storage.nbytes} bytes")
        storage.bind(partial(read, start, storage.nbytes))
        stream.seek(start + storage.nbytes)

    return tree


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong inside into one `CheckpointError` line that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        # A damaged pickle is a random program: it can end in nearly any exception.
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path}: truncated, corrupt or not a PyTorch file ({reason})"
        ) from error


def read_tensors(
    path: str | Path, pick: Callable[[Any], Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """Read some named tensors of a PyTorch file.

    Args:
        path: file written by `torch.save`, in the zip or the legacy format.
        pick: takes the file's object (dicts, lists and numbers as they were, tensors as
            `StoredTensor`, all else as `Placeholder`) and returns the tensors to read, by name.

    Returns:
        The picked tensors, contiguous, in the memory of the host, wherever they were when they were
        saved.

    Raises:
        CheckpointError: if the file is missing, empty, truncated or of another kind, or if
            something picked is no tensor.
    """
    path = Path(path)
    with _one_line(path):
        stream = path.open("rb")

    with stream:
        with _one_line(path):
            signature = stream.read(len(_ZIP_SIGNATURE))
            if not signature:
                raise CheckpointError(f"{path}: the file is empty")
            stream.seek(0)

            tree = _zip_tree(stream) if signature == _ZIP_SIGNATURE else _legacy_tree(stream)

        # Only what is wanted is read, and only if all of it is tensors.
        picked = pick(tree)
        others = [
            str(name) for name, value in picked.items() if not isinstance(value, StoredTensor)
        ]
        if others:
            raise CheckpointError(
                f"{path}: {len(others)} entries are no tensors: {', '.join(others[:3])}"
            )

        with _one_line(path):
            return {name: value.read() for name, value in picked.items()}
