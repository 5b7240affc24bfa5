"""Tensors from a torch file that also holds other objects, without executing anything in it.

``torch.load(weights_only=True)`` refuses a file that names a class unknown to torch, as the
hyper-parameters of Lightning checkpoints do. `tensors_only` reads such a file with an interpreter
of the pickle language that cannot call anything that the file names:

- Only opcodes that build plain values are known. Any other opcode ends the reading.
- No name is imported. Names of torch's storages, and of its functions that rebuild a tensor, select
  builders of this module. Any other name becomes an `Inert` value, and so does the result of
  calling it.
- State of objects is dropped.
- A harmful name, such as ``os.system``, ends the reading with a sentence that says so. The name
  could do nothing here, but the file was made to do harm.
"""

from __future__ import annotations

import _compat_pickle
import pickle
import zipfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

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


def tensors_only(path: Path) -> Any:
    """Return the content of a torch file: tensors, plain values, and `Inert` for other objects.

    Parameters
    ----------
    path
        A file of ``torch.save`` in its zip format (the format since torch 1.6). Tensors are views
        of the mapped file.

    Raises
    ------
    InkdaskError
        When the file names something harmful.
    Exception
        When the file is broken; of many types.
    """
    with zipfile.ZipFile(path) as archive:
        records = _Records(path, archive)
        with archive.open(f"{records.root}/data.pkl") as file:
            return _Unpickler(file, path, records).load()


def look_for_harm(path: Path) -> None:
    """Refuse a file in torch's old format, or in plain pickle, that names something harmful."""
    with path.open("rb") as file:
        try:
            while True:
                _Unpickler(file, path).load()
        except InkdaskError:
            raise
        except Exception:  # because numbers follow the pickles
            return


class _Records:
    """The storages of a zip file, each a tensor (n) that is mapped from the file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.root = archive.namelist()[0].partition("/")[0]
        if f"{self.root}/byteorder" in archive.namelist():
            order = archive.read(f"{self.root}/byteorder")
            if order != b"little":
                raise ValueError(f"byte order {order!r}")

    @cached_property
    def bytes(self) -> Tensor:
        size = self.path.stat().st_size
        return torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)

    def storage(self, pid: Any) -> Tensor:
        """Return the storage of a reference ('storage', type, key, device, length)."""
        kind, dtype, key, _, length = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str:
            raise ValueError(f"a reference to {kind!r}")
        record = self.archive.getinfo(f"{self.root}/data/{key}")
        size = length * dtype.itemsize
        if record.compress_type != zipfile.ZIP_STORED or not 0 <= size <= record.file_size:
            raise ValueError(f"storage {key} is not {length} numbers")
        # The local header of a record has 30 bytes, a name and an extra field.
        header = self.bytes[record.header_offset : record.header_offset + 30].tolist()
        start = record.header_offset + 30
        start += header[26] + 256 * header[27] + header[28] + 256 * header[29]
        if start + size > len(self.bytes):
            raise ValueError(f"storage {key} goes beyond the end of the file")
        numbers = self.bytes[start : start + size]
        if start % dtype.itemsize:
            numbers = numbers.clone()
        return numbers.view(dtype)


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Build a tensor as ``torch._utils._rebuild_tensor_v2`` does, but only within its storage."""
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor without a shape")
    reach = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
    if offset + reach > len(storage):
        raise ValueError("a tensor that goes beyond its storage")
    return storage.as_strided(size, stride, storage.storage_offset() + offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    """Return the tensor of a parameter."""
    return data


def _mapping(*_: Any) -> dict[str, Any]:
    """Return an empty mapping, which later opcodes fill."""
    return {}


_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
}

_PLAIN = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK,
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


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with opcodes of `_PLAIN`, and harmless ones in place of those that act."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes], path: Path, records: _Records | None = None) -> None:
        super().__init__(file, encoding="bytes")
        self.path, self.records = path, records

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that the pickle refers to."""
        return self.records.storage(pid) if self.records else INERT

    def find_class(self, module: str, name: str) -> Any:
        """Return the value that stands for a global name, without importing it."""
        # Translated, because protocol 2, which torch.save uses, has the names of Python 2.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        top, last = module.partition(".")[0], name.rpartition(".")[2]
        if top in _HARMFUL_MODULES or last in _HARMFUL_NAMES.get(top, ()):
            raise InkdaskError(
                f"{self.path} is not loaded: it names {module}.{name}, so opening it as a "
                "checkpoint is meant to run code on this machine; none of it was run."
            )
        if self.records is None:
            return INERT
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _BUILDERS.get(f"{module}.{name}", INERT)

    def _reduce(self) -> None:  # function, arguments -> value
        arguments, function = self.stack.pop(), self.stack.pop()
        built = any(function is builder for builder in _BUILDERS.values())
        self.append(function(*arguments) if built else INERT)

    def _new(self) -> None:  # class, arguments -> object
        del self.stack[-2:]
        self.append(INERT)

    def _new_with_keywords(self) -> None:  # class, arguments, keywords -> object
        del self.stack[-3:]
        self.append(INERT)

    def _build(self) -> None:  # object, state -> object
        self.stack.pop()

    def _append(self) -> None:  # list, item -> list
        self._extend([self.stack.pop()])

    def _appends(self) -> None:  # list, mark, items -> list
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def _setitem(self) -> None:  # mapping, key, value -> mapping
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _setitems(self) -> None:  # mapping, mark, keys and values -> mapping
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        # Keys that are no names are dropped, so that no object of the file is hashed.
        if type(self.stack[-1]) is dict:
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if type(key) is str)

    def _additems(self) -> None:  # set, mark, items -> set
        self.pop_mark()

    def _empty_set(self) -> None:
        self.append(INERT)

    def _frozenset(self) -> None:  # mark, items -> frozenset
        self.pop_mark()
        self.append(INERT)

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **{opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _PLAIN},
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _new,
        pickle.NEWOBJ_EX[0]: _new_with_keywords,
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.EMPTY_SET[0]: _empty_set,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozenset,
    }
