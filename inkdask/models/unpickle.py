"""Tensors from a file of ``torch.save``, without executing anything in it.

``torch.load(weights_only=True)`` refuses classes that torch does not know, as hyper-parameters of
Lightning have them, and hashes and prints values, which takes years where tuples hold each other
many times. `tensors_only` is an interpreter of the pickle language that calls nothing of the file:

- Only opcodes that build plain values are known. Any other opcode ends the reading.
- No name is imported. Names of torch's storages, and of its functions that rebuild a tensor, select
  builders of this module. Any other name becomes an `Inert` value, and so does the result of
  calling it.
- State of objects is dropped.
- A harmful name, such as ``os.system``, ends the reading with a sentence that says so. The name
  could do nothing here, but the file was made to do harm.
- Work and memory grow with the size of the file: values of the file are never hashed, compared or
  printed, `MOST_READS` ends a long pickle, and nothing is unpacked.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
import zipfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from inkdask.errors import InkdaskError

# Modules and names with which a file does harm. A file that names them is refused, other names are
# ignored; neither runs anything.
_HARMFUL_MODULES = {
    "_ctypes", "_pickle", "_posixsubprocess", "cPickle", "ctypes", "imp", "importlib", "marshal",
    "nt", "os", "pdb", "pickle", "pip", "posix", "pty", "requests", "runpy", "shutil", "socket",
    "subprocess", "sys", "webbrowser",
}  # fmt: skip
_HARMFUL_NAMES = {
    "_io": {"open", "open_code", "FileIO"},
    "builtins": {"__import__", "breakpoint", "compile", "eval", "exec", "execfile", "open"},
    "code": {"interact", "InteractiveConsole", "InteractiveInterpreter"},
    "io": {"open", "open_code", "FileIO"},
    "numpy": {"load", "fromfile", "memmap"},
    "operator": {"attrgetter", "methodcaller"},
    "timeit": {"main", "repeat", "timeit"},
    "torch": {"load", "load_state_dict_from_url", "_load_from_bytes"},
    "types": {"CodeType", "FunctionType"},
    "urllib": {"urlopen", "urlretrieve"},
}

MOST_READS = 1_000_000  # from one pickle, in some seconds; a tensor takes 51
MOST_TABLE = 2**24  # bytes of the table of a zip file; a storage takes 56
MOST_PARTS = 64  # axes of a tensor, arguments of a call

_DTYPES = {
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
}


class Inert:
    """An object that does nothing, in place of an object of the file that is no plain value."""

    __slots__ = ()


INERT = Inert()
ODD = Inert()  # in place of a sparse or quantised tensor, of one of other numbers, and of its parts


def tensors_only(path: Path) -> Any:
    """Return the content of a torch file: tensors, plain values, and `Inert` for other objects.

    Parameters
    ----------
    path
        A file of ``torch.save`` in its zip format, in which tensors are views of the mapped file,
        or in the format before torch 1.6.

    Raises
    ------
    InkdaskError
        When the file names something harmful.
    Exception
        When the file is broken; of many types.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return _old_format(path)
        table = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if table and table[5] > MOST_TABLE:
            raise InkdaskError(f"{path} is no checkpoint: it lists too many files.")
    with zipfile.ZipFile(path) as archive:
        records = _Records(path, archive)
        return _Unpickler(io.BytesIO(records.read("data.pkl")), path, records).load()


def _old_format(path: Path) -> Any:
    """Return the content of a file from before torch 1.6: five pickles, and all storages."""
    storages = _Storages(path)
    with path.open("rb") as file:
        magic, version, system = (_Unpickler(file, path, storages).load() for _ in range(3))
        content = _Unpickler(file, path, storages).load()
        if (magic, version) != (MAGIC_NUMBER, PROTOCOL_VERSION) or not system["little_endian"]:
            raise ValueError("not torch's format")
        keys = [key for key in _Unpickler(file, path, storages).load() if type(key) is str]
        if sorted(keys) != sorted(storages.known):
            raise ValueError("other storages than those that are referred to")
        for numbers in (storages.known[key] for key in keys):
            length = int.from_bytes(file.read(8), "little")
            into: Any = numbers.view(torch.uint8).numpy()
            if length != len(numbers) or file.readinto(into) != into.nbytes:
                raise ValueError("a storage of another length")
    return content


class _Storages:
    """The storages of a file, each a tensor (n) of its own type of numbers."""

    def __init__(self, path: Path) -> None:
        self.size = self.left = path.stat().st_size
        self.known: dict[str, Tensor] = {}

    def storage(self, pid: Any) -> Tensor | Inert:
        """Return the storage of a reference ('storage', type, key, device, length, view)."""
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("a part of a storage")
        kind, dtype, key, _, length = pid[:5]
        if not (type(kind) is type(key) is str and type(length) is int) or kind != "storage":
            raise ValueError("a reference to something else")
        if dtype is ODD:
            return ODD
        if key not in self.known:
            # Storages lie side by side in the file, so together they are no larger.
            self.left -= length * dtype.itemsize
            if length < 0 or self.left < 0:
                raise ValueError("a storage that is no part of the file")
            self.known[key] = self._new(key, dtype, length)
        if self.known[key].dtype is not dtype:
            raise ValueError("a storage of two types")
        return self.known[key]

    def _new(self, key: str, dtype: torch.dtype, length: int) -> Tensor:
        return torch.empty(length, dtype=dtype)


class _Records(_Storages):
    """The storages of a zip file, which are mapped from the file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        super().__init__(path)
        self.path, self.archive = path, archive
        self.root = archive.namelist()[0].partition("/")[0]
        if f"{self.root}/byteorder" in archive.NameToInfo and self.read("byteorder") != b"little":
            raise ValueError("another byte order")

    def read(self, name: str) -> bytes:
        """Return a record, which torch never compresses."""
        record = self.archive.getinfo(f"{self.root}/{name}")
        if record.compress_type != zipfile.ZIP_STORED:
            raise InkdaskError(f"{self.path} is compressed, which a checkpoint is not.")
        return self.archive.read(record)

    @cached_property
    def bytes(self) -> Tensor:
        return torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)

    def _new(self, key: str, dtype: torch.dtype, length: int) -> Tensor:
        record = self.archive.getinfo(f"{self.root}/data/{key}")
        size = length * dtype.itemsize
        if record.compress_type != zipfile.ZIP_STORED or size > record.file_size:
            raise ValueError("a storage of another length")
        # The local header of a record has 30 bytes, a name and an extra field.
        header = self.bytes[record.header_offset : record.header_offset + 30].tolist()
        start = record.header_offset + 30
        start += header[26] + 256 * header[27] + header[28] + 256 * header[29]
        if start + size > len(self.bytes):
            raise ValueError("a storage that goes beyond the end of the file")
        numbers = self.bytes[start : start + size]
        if start % dtype.itemsize:
            numbers = numbers.clone()
        return numbers.view(dtype)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
    """Build a tensor as ``torch._utils._rebuild_tensor_v2`` does, but only within its storage."""
    if storage is ODD:
        return ODD
    if max(len(size), len(stride)) > MOST_PARTS:
        raise ValueError("a tensor of too many axes")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise ValueError("a tensor without a shape")
    reach = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
    if offset + reach > len(storage):
        raise ValueError("a tensor that goes beyond its storage")
    return storage.as_strided(size, stride, storage.storage_offset() + offset)


_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "collections.OrderedDict": lambda *_: {},  # which later opcodes fill
    "collections.defaultdict": lambda *_: {},
}

_PLAIN = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4, pickle.BINFLOAT,
    pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8,
    pickle.BINSTRING, pickle.SHORT_BINSTRING,
    pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8,
    pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT,
    pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE,
    pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID,
)  # fmt: skip


class _Counted:
    """A file that ends after `MOST_READS`."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path, self.readline = file, path, file.readline
        self.size, self.left = path.stat().st_size, MOST_READS

    def read(self, size: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise InkdaskError(f"{self.path} is not loaded: it holds too many values.")
        return self.file.read(min(size, self.size))  # because a file gets memory for all of it


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with opcodes of `_PLAIN`, and harmless ones in place of those that act."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes], path: Path, storages: _Storages) -> None:
        super().__init__(_Counted(file, path), encoding="bytes")
        self.path, self.storages = path, storages

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that the pickle refers to."""
        return self.storages.storage(pid)

    def find_class(self, module: str, name: str) -> Any:
        """Return the value that stands for a global name, without importing it."""
        if len(module) + len(name) > 1000:
            raise ValueError("a name without end, which may come often")
        # Translated, because protocol 2, which torch.save uses, has the names of Python 2.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        top, last = module.partition(".")[0], name.rpartition(".")[2]
        if top in _HARMFUL_MODULES or last in _HARMFUL_NAMES.get(top, ()):
            raise InkdaskError(
                f"{self.path} is not loaded: it names {module}.{name}, so opening it as a "
                "checkpoint is meant to run code on this machine; none of it was run."
            )
        if top == "torch" and last.endswith("Storage"):
            return _DTYPES.get(name, ODD)
        other = ODD if top == "torch" and last.startswith("_rebuild_") else INERT
        return _BUILDERS.get(f"{module}.{name}", other)

    def _reduce(self) -> None:  # function, arguments -> value
        arguments, function = self.stack.pop(), self.stack.pop()
        built = any(function is builder for builder in _BUILDERS.values())
        if built and len(arguments) <= MOST_PARTS:
            self.append(function(*arguments))
        else:
            self.append(ODD if function is ODD else INERT)

    def _forget(self, count: int) -> None:  # values -> object
        del self.stack[len(self.stack) - count :]
        self.append(INERT)

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        # Keys that are no names are dropped, so that no object of the file is hashed.
        if type(self.stack[-1]) is dict:
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if type(key) is str)

    # Frames are ignored, so that all reads are counted.
    dispatch: ClassVar[dict[int, Callable[..., Any]]] = {
        **{opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _PLAIN},
        pickle.FRAME[0]: lambda self: self.read(8),
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: lambda self: self._forget(2),  # class, arguments
        pickle.NEWOBJ_EX[0]: lambda self: self._forget(3),  # class, arguments, keywords
        pickle.BUILD[0]: lambda self: self.stack.pop(),  # object, state -> object
        pickle.APPEND[0]: lambda self: self._extend([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self._extend(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self._update([self.stack.pop(), self.stack.pop()][::-1]),
        pickle.SETITEMS[0]: lambda self: self._update(self.pop_mark()),
        pickle.EMPTY_SET[0]: lambda self: self._forget(0),
        pickle.ADDITEMS[0]: lambda self: self.pop_mark(),
        pickle.FROZENSET[0]: lambda self: (self.pop_mark(), self._forget(0)),
    }
