"""Files made to do harm: whatever they try, nothing of them runs."""

from __future__ import annotations

import copy
import io
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from inkdask.errors import InkdaskError
from inkdask.models import names, unpickle, weights

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


class Call:
    """Pickles as a call of a function, which happens when a careless reader unpickles it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """Give the path of a file that a payload would create."""
    path = tmp_path / "harm"
    yield path
    assert not path.exists(), "code of the file was run"


def payloads(marker: Path) -> dict[str, Any]:
    """Return values that each create ``marker`` when they are unpickled carelessly."""
    code = f"open({str(marker)!r}, 'w').close()"
    inner = io.BytesIO()
    torch.save(Call(exec, code), inner)
    return {
        "system": Call(__import__("os").system, f"touch {marker}"),
        "popen": Call(__import__("subprocess").Popen, ["touch", str(marker)]),
        "exec": Call(exec, code),
        "eval": Call(eval, code),
        "nested call": Call(eval, Call(compile, code, "x", "eval")),
        "import": Call(getattr, Call(__import__, "os"), "system"),
        "open": Call(open, str(marker), "w"),
        "pickle in pickle": Call(pickle.loads, pickle.dumps(Call(exec, code))),
        "storage in pickle": Call(torch.storage._load_from_bytes, inner.getvalue()),
        "torch.load": Call(torch.load, str(marker.with_name("inner.pt"))),
        "run": Call(__import__("runpy").run_path, str(marker.with_name("code.py"))),
        "ctypes": Call(__import__("ctypes").CDLL, str(marker)),
    }


def shapes(payload: Any) -> dict[str, Any]:
    """Return checkpoints with a payload in different places."""
    return {
        "top": payload,
        "hyper-parameter": {"hyper_parameters": {"loss": [payload]}, "state_dict": STATE},
        "beside weights": {**STATE, "x": payload},
        "in state": {"state_dict": {**STATE, "x": (payload,)}},
        "key": {"state_dict": STATE, "hyper_parameters": {(payload, 1): 2}},
    }


def new_format(value: Any, path: Path) -> None:
    torch.save(value, path)


def newest_protocol(value: Any, path: Path) -> None:
    torch.save(value, path, pickle_protocol=5)


def old_format(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def plain_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [new_format, newest_protocol, old_format, plain_pickle])
def test_harmful_file_is_refused_by_name(
    write: Callable[[Any, Path], None], marker: Path, tmp_path: Path
) -> None:
    path = tmp_path / "evil.ckpt"
    for name, payload in payloads(marker).items():
        for place, content in shapes(payload).items():
            write(content, path)
            with pytest.raises(InkdaskError) as caught:
                weights.read(path)
            sentence = str(caught.value)
            assert f"{path} is not loaded: it names " in sentence, (name, place, sentence)
            assert sentence.endswith("none of it was run.")


@pytest.mark.parametrize("name", list(payloads(Path("x"))))
def test_payload_does_harm_when_unpickled(name: str, tmp_path: Path) -> None:
    """The payloads are real."""
    marker = tmp_path / "harm"
    marker.with_name("inner.pt").write_bytes(b"")
    marker.with_name("code.py").write_text("")
    data = pickle.dumps(payloads(marker)[name])
    if name in ("import", "torch.load", "run", "ctypes"):
        return  # these only fetch or open what would act
    result = pickle.loads(data)
    if name == "popen":
        result.wait()
    assert marker.exists()


class Tattletale(dict):
    """Leaves a mark whenever any of its methods runs."""

    marker: Path

    def _tell(self, *_: Any, **__: Any) -> Any:
        if hasattr(Tattletale, "marker"):
            Tattletale.marker.touch()

    __setstate__ = __setitem__ = update = append = extend = add = __eq__ = __init__ = _tell

    def __new__(cls, *_: Any, **__: Any) -> Tattletale:
        cls._tell(None)
        return super().__new__(cls)

    def __hash__(self) -> int:
        self._tell()
        return 1

    def __reduce__(self) -> tuple[Any, ...]:
        return Tattletale, (1,), {"state": 2}, iter([3, 4]), iter([("a", 5)])


@pytest.mark.parametrize("marked", [False, True])
def test_class_of_a_hyper_parameter_never_runs(marked: bool, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "curious.ckpt"
    told = Tattletale()
    torch.save({"hyper_parameters": {"a": told, (told,): told}, "state_dict": STATE}, path)
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([Tattletale] if marked else []):
        try:
            Tattletale.marker = marker
            tensors = weights.read(path).tensors
        finally:
            del Tattletale.marker
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)
    assert set(torch.serialization.get_safe_globals()) == before


def archive(path: Path, data: bytes, **records: bytes) -> None:
    """Write a file as ``torch.save`` does, with a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", b"little")
        file.writestr("archive/version", b"3\n")
        for name, record in records.items():
            file.writestr(f"archive/data/{name}", record)


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def test_module_named_by_a_file_is_not_imported(
    marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inkdask_trap.py").write_text(f"open({str(marker)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "trap.pt"
    archive(path, b"\x80\x02}" + text("x") + name("inkdask_trap", "Loss") + b")R" + b"s.")
    with pytest.raises(InkdaskError, match="holds no weights"):
        weights.read(path)
    assert "inkdask_trap" not in sys.modules


# Handwritten pickles: opcodes that ``pickle.dumps`` does not write for these values.
TOUCH = text("touch {marker}")
CRAFTED = {
    "obj": b"\x80\x02(" + name("os", "system") + TOUCH + b"o.",
    "inst": b"\x80\x02(" + TOUCH + b"ios\nsystem\n.",
    "python 2 name": b"\x80\x02" + name("__builtin__", "eval") + TOUCH + b"\x85R.",
    "dotted name": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93" + TOUCH + b"\x85R.",
    "attribute": b"\x80\x04\x8c\x05torch\x8c\x10os.system.__call\x93" + TOUCH + b"\x85R.",
    "attribute of ours": b"\x80\x02"
    + name("torch._utils", "_rebuild_tensor_v2.__globals__") + b".",
    "state of a function": b"\x80\x02" + name("torch._utils", "_rebuild_tensor_v2")
    + b"N}" + text("__defaults__") + b"K\x01s\x86b.",
    "state of a class": b"\x80\x02" + name("torch", "FloatStorage")
    + b"}" + text("x") + b"K\x01sb.",
    "call of a type": b"\x80\x02" + name("torch", "FloatStorage") + TOUCH + b"\x85R.",
    "call of a call": b"\x80\x02" + name("collections", "OrderedDict") + b")R)R.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent function": b"\x80\x02(" + text("storage") + name("os", "system") + TOUCH
    + text("cpu") + b"K\x01tQ.",
    "persistent path": b"\x80\x02(" + text("storage") + name("torch", "FloatStorage")
    + text("../../x") + text("cpu") + b"K\x01tQ.",
    "persistent text": b"\x80\x02P" + b"touch {marker}\n.",
    "out of band": b"\x80\x05\x97.",
    "mapping": b"\x80\x02" + name("collections", "defaultdict") + name("os", "system")
    + b"\x85R" + TOUCH + b"K\x01s.",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", CRAFTED)
def test_handwritten_pickle_does_nothing(kind: str, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "crafted.pt"
    data = CRAFTED[kind].replace(b"{marker}", str(marker).encode())
    archive(path, data)
    with pytest.raises(InkdaskError) as caught:
        weights.read(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(data)
    with pytest.raises(InkdaskError):
        weights.read(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ is None or 1 not in (
        torch._utils._rebuild_tensor_v2.__defaults__
    )


# --- files made to take long


def put(number: int) -> bytes:
    return b"r" + struct.pack("<I", number) + b"0"


def get(number: int) -> bytes:
    return b"j" + struct.pack("<I", number)


def tower() -> bytes:
    """A tuple as value 60, which holds another twice, and so on: as text it has 2**60 parts."""
    rows = (get(i) + get(i) + b"\x86" + put(i + 1) for i in range(60))
    return b"\x80\x02)" + put(0) + b"".join(rows)


def reference(key: str = "0", length: int = 1) -> bytes:
    kind = text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu")
    return b"(" + kind + b"J" + struct.pack("<i", length) + b"tQ"


def nested_in(parts: list[bytes], place: int) -> bytes:
    """A reference with the tower in place of one of its parts."""
    return b"(" + b"".join([*parts[:place], get(60), *parts[place + 1 :]]) + b"tQ."


PARTS = [text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), b"K\x01"]
BUILD = name("torch._utils", "_rebuild_tensor_v2")
MANY = b"(" + b"K\x01" * 200_000 + b"t" + put(61)  # a long tuple
LARGE = b"\x8b" + struct.pack("<i", 500_000) + b"\x01" * 500_000 + b"\x85" + put(61)
LONG = {
    **{f"part {place} of a reference": nested_in(PARTS, place) for place in range(5)},
    "key": b"}" + get(60) + b"K\x01s.",
    "key of a hyper-parameter": b"}" + text("hyper_parameters") + b"}" + get(60) + b"Nss.",
    "layers": b"}" + text("hyper_parameters") + b"}" + text("in_chans") + get(60) + b"ss.",
    "item of a set": b"\x8f(" + get(60) + b"\x90.",
    "content": get(60) + b".",
    "shape": BUILD + b"(" + reference() + b"K\x00" + get(60) * 2 + b"tR.",
    "long references": MANY + (get(61) + b"Q0") * 100_000 + b"}.",
    "one storage": reference(length=10_000)[:-1] + put(61) + (get(61) + b"Q0") * 100_000 + b"}.",
    "long arguments": MANY + name("collections", "OrderedDict") + put(62)
    + (get(62) + get(61) + b"R0") * 50_000 + b"}.",
    "long shapes": MANY + BUILD + put(62)
    + (get(62) + b"(" + reference() + b"K\x00" + get(61) * 2 + b"tR0") * 10_000 + b"}.",
    "large numbers": LARGE + BUILD + put(62)
    + (get(62) + b"(" + reference() + b"K\x00" + get(61) * 2 + b"tR0") * 10_000 + b"}.",
    "long names": text("a" * 500_000) + put(61) + (get(61) * 2 + b"\x930") * 50_000 + b"}.",
    "one mapping": b"}" + put(61) + get(61) + b"("
    + b"".join(text(str(number)) + b"N" for number in range(20_000)) + b"u0}("
    + b"".join(text(str(number)) + get(61) for number in range(20_000)) + b"u.",
    "values": b"N0" * 2_100_000 + b"}.",
    "frame": b"\x95" + struct.pack("<Q", 2**40) + b"}.",
    "text": b"\x8d" + struct.pack("<Q", 2**40) + b"}.",
}  # fmt: skip


READ = """
import pathlib, resource, sys
from inkdask.errors import InkdaskError
from inkdask.models import weights
used = lambda: resource.getrusage(resource.RUSAGE_SELF)
for path in sys.argv[1:]:
    limit = int(used().ru_utime + used().ru_stime) + 20
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))  # or SIGXCPU
    try:
        weights.read(pathlib.Path(path))
    except InkdaskError as error:
        print(error, flush=True)
# Not ru_maxrss, which begins with that of the process that started this one.
print(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])
"""


@pytest.mark.slow
def test_files_made_to_take_long_are_refused_in_seconds(tmp_path: Path) -> None:
    old = b"".join(pickle.dumps(part, 2) for part in (MAGIC_NUMBER, PROTOCOL_VERSION))
    old += pickle.dumps({"little_endian": True}, 2)
    paths = []
    for kind, pickled in LONG.items():
        paths.append(tmp_path / f"{kind}.pt")
        archive(paths[-1], tower() + pickled, **{"0": bytes(40_000)})
        if kind.startswith(("part", "key")):
            paths.append(tmp_path / f"{kind}, old.pt")
            paths[-1].write_bytes(old + tower() + pickled)
    for number, pickled in enumerate((b"N0" * 2**26, b"X\xff\xff\xff\x7f" + bytes(2**27))):
        paths.append(tmp_path / f"packed {number}.pt")
        with zipfile.ZipFile(paths[-1], "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl", b"\x80\x02" + pickled + b"}.")
    assert max(path.stat().st_size for path in paths) < 5_000_000
    done = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True)
    *said, kilobytes = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"{paths[len(said)]}: {done.stderr}"
    assert len(said) == len(paths)
    for path, sentence in zip(paths, said, strict=True):
        assert str(path) in sentence
    assert said[-1] == f"{paths[-1]} is compressed, which a checkpoint is not."
    assert int(kilobytes) < 1_500_000


def test_zip_with_too_many_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "many.pt"
    archive(path, b"\x80\x02}.", **{str(number): b"" for number in range(100)})
    monkeypatch.setattr(unpickle, "MOST_TABLE", 1000)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(InkdaskError, match=r"many\.pt is no checkpoint: it lists too many"):
        weights.read(path)


def test_storages_that_together_exceed_the_file_are_refused(tmp_path: Path) -> None:
    """Records can lie over each other, and each would be a copy where numbers are misaligned."""
    path, keys = tmp_path / "over.pt", "0123"
    items = (text(key) + reference(key, 10_000) + b"s" for key in keys)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}" + b"".join(items) + b".")
        file.writestr("archive/data/0", bytes(40_000))
        for key in keys[1:]:
            twin = copy.copy(file.getinfo("archive/data/0"))
            twin.filename = f"archive/data/{key}"
            file.filelist.append(twin)
    with pytest.raises(InkdaskError, match=r"over\.pt is cut off or damaged"):
        weights.read(path)


def test_old_file_that_lacks_a_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    old_format(STATE, path)
    data = path.read_bytes()
    assert weights.read(path).tensors.keys() == STATE.keys()
    start = data.index(b"\x80\x02]q\x00(X")  # of the list of keys
    path.write_bytes(data[:start] + pickle.dumps([], 2))
    with pytest.raises(InkdaskError, match=r"old\.pt is cut off or damaged"):
        weights.read(path)


def test_name_with_many_prefixes_is_read_in_seconds() -> None:
    started = time.process_time()
    assert names.bare("model." * 300_000 + "x") == "x"
    assert names.bare("module.model") == "model"
    assert time.process_time() - started < 5


def test_zip_in_a_zip_is_not_opened(marker: Path, tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save(payloads(marker)["system"], inner)
    path = tmp_path / "nested.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/inner.pt", inner.getvalue())
    with pytest.raises(InkdaskError, match="no checkpoint at all"):
        weights.read(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickle.dumps(STATE.keys().__len__()))
        file.writestr("b/data.pkl", pickle.dumps(payloads(marker)["exec"]))
    with pytest.raises(InkdaskError):
        weights.read(path)


def test_compiled_archive_is_not_run(marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
        file.writestr("archive/constants.pkl", pickle.dumps(payloads(marker)["exec"], 2))
        file.writestr("archive/code/__torch__.py", "raise SystemExit")
    with pytest.raises(InkdaskError):
        weights.read(path)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (7,), (1,)), (5, (2,), (1,)), (0, (2, 2), (5, 1)), (-1, (1,), (1,)), (0, (-1,), (1,))],
)
def test_tensor_beyond_its_storage_is_refused(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    storage = torch.arange(100.0)[50:56]
    with pytest.raises(ValueError, match="a tensor"):
        unpickle._tensor(storage, offset, size, stride)
    assert unpickle._tensor(storage, 2, (2, 2), (2, 1)).tolist() == [[52, 53], [54, 55]]


def checkpoints() -> list[bytes]:
    """Return small checkpoints of all kinds, to be damaged."""
    lightning = {"state_dict": STATE, "hyper_parameters": {"x": Path("a"), "n": 10**9}}
    found = [save(STATE, {"in_chans": "26"})]
    for content in (STATE, lightning):
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            found.append(buffer.getvalue())
    return found


CHECKPOINTS = checkpoints()
ZIPPED = [data for data in CHECKPOINTS if data.startswith(b"PK")]


def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Change, remove, add or repeat bytes."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        end = at + draw(st.integers(1, 32))
        other = draw(st.binary(min_size=1, max_size=8))
        change = draw(st.sampled_from(["set", "flip", "cut", "insert", "repeat", "truncate"]))
        if change == "set":
            data[at] = other[0]
        elif change == "flip":
            data[at] ^= 1 << (other[0] % 8)
        elif change == "cut":
            del data[max(at, 1) : end]
        elif change == "insert":
            data[at:at] = other
        elif change == "repeat":
            data[at:at] = data[at:end]
        else:
            del data[max(at, 1) :]
    return bytes(data)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    return damaged(draw, draw(st.sampled_from(CHECKPOINTS)))


@st.composite
def damaged_pickles(draw: st.DrawFn) -> bytes:
    """Damage only the pickle in a checkpoint, so that its checksums are right."""
    whole = zipfile.ZipFile(io.BytesIO(draw(st.sampled_from(ZIPPED))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for record in whole.namelist():
            data = whole.read(record)
            file.writestr(record, damaged(draw, data) if record.endswith("data.pkl") else data)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(damaged_files(), damaged_pickles()))
def test_damaged_file_is_loaded_or_explained(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(data)
    sentence, tensors = "", {}
    try:
        tensors = weights.read(path).tensors
    except InkdaskError as error:
        sentence = str(error)
    assert bool(sentence) != bool(tensors)
    assert "\n" not in sentence
    assert not sentence or str(path) in sentence
    for key, value in tensors.items():
        assert isinstance(key, str)
        assert isinstance(value, Tensor)
        value.clone()
