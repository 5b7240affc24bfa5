"""Checkpoints: zips, pickles, safetensors, and the descriptions beside them."""

import contextlib
import functools
import io
import itertools
import json
import math
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from inkdask.models import checkpoint, registry
from tests.fuzz import spoil

STATE = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(2).half()}
SIDECAR = {"model_type": "resnet3d-50", "layers": 18, "tile": 256, "stride": 128, "divisor": 255}
OPCODES = [ord(opcode.code) for opcode in pickletools.opcodes]


@contextlib.contextmanager
def opened(_):
    """Yield the reader of one input."""
    yield read


def read(rng, folder):
    """Write a spoiled checkpoint or description, and compare with torch and safetensors."""
    if rng.integers(6) == 0:
        return read_description(rng, folder)
    data = spoil.choice(rng, files())
    if rng.integers(4):
        data = spoiled(rng, data)
    path = folder / spoil.choice(rng, ("a.ckpt", "a.pt", "a.safetensors"))
    path.write_bytes(data)
    tensors = checkpoint.read(path).tensors
    for tensor in tensors.values():
        assert tensor.untyped_storage().nbytes() <= len(data)  # it lies in the file
    if sum(math.prod(tensor.shape) for tensor in tensors.values()) > 1 << 20:
        return "unjudged"  # a view may repeat its numbers
    wanted = oracle(data)
    if wanted is None:
        return "unjudged"
    assert tensors.keys() <= wanted.keys(), (tensors.keys(), wanted.keys())
    for name, tensor in tensors.items():
        assert torch.equal(tensor.nan_to_num(), wanted[name].nan_to_num()), name
    return "read"


def oracle(data):
    """Return all tensors of a file by name, by torch or safetensors; None if they refuse."""
    try:
        if data[8:9] == b"{":
            return safetensors.torch.load(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        levels = [content, *(value for value in content.values() if isinstance(value, dict))]
        found = [level.items() for level in levels]
        return {k: v for pairs in found for k, v in pairs if isinstance(v, torch.Tensor)}
    except Exception:
        return None


def read_description(rng, folder):
    """Spoil the description beside the weights."""
    (folder / "a.safetensors").write_bytes(files()[0])
    if rng.integers(2):
        text = spoil.change_text(rng, json.dumps(SIDECAR))
        (folder / "inkdask.json").write_bytes(text)
    else:
        lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in SIDECAR.items())
        changed = {
            k: spoil.odd_value(rng) if rng.integers(3) == 0 else v for k, v in SIDECAR.items()
        }
        if rng.integers(2):
            lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in changed.items())
            data = lines.encode()
        else:
            data = spoil.change(rng, lines.encode())
        (folder / "inkdask.toml").write_bytes(data)
    network = registry.resolve(str(folder / "a.safetensors"))
    assert network.layers > 0
    assert network.tile > 0
    assert 0 < network.divisor < math.inf
    assert 0 < network.clip < math.inf
    return "read"


@functools.cache
def files():
    """Make small checkpoints of every kind."""
    lightning = {"state_dict": STATE, "hyper_parameters": {"x": Path("a"), "in_chans": 26}}
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()}
    found = [safetensors.torch.save(STATE, {"in_chans": "26"})]
    for content in (STATE, lightning, {"epoch": 3, "weights": parameters}):
        for is_zip in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
            found.append(buffer.getvalue())
    return tuple(found)


def spoiled(rng, data):
    """Change bytes anywhere, or in the pickle, the header or the table of a file."""
    how = rng.integers(6)
    if data[8:9] == b"{" and how < 4:
        length = struct.unpack("<Q", data[:8])[0]
        header = spoil.change_text(rng, data[8 : 8 + length].decode())
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    if not data.startswith(b"PK") or how == 0:
        return spoil.change(rng, data)
    if how == 1:
        return bomb(rng)
    return rezipped(rng, data)


def rezipped(rng, data):
    """Spoil one record of a zip, so that its checksums are right; most often the pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for record in old.namelist():
            content = old.read(record)
            if record.endswith("data.pkl") and rng.integers(8):
                content = spoil_pickle(rng, content)
            elif rng.integers(8) == 0:
                content = spoil.change(rng, content)
            compression = zipfile.ZIP_DEFLATED if rng.integers(40) == 0 else zipfile.ZIP_STORED
            if rng.integers(40):
                new.writestr(record, content, compression)
    return buffer.getvalue()


def spoil_pickle(rng, data):
    """Change bytes, or put whole opcodes in, out or in the place of others."""
    if rng.integers(3) == 0:
        return spoil.change(rng, data)
    steps = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(steps)]
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(parts)))
        how = rng.integers(5)
        if how == 0:
            del parts[at]
        elif how == 1:
            parts.insert(at, parts[int(rng.integers(len(parts)))])
        elif how == 2:
            parts[at] = bytes([spoil.choice(rng, OPCODES)])
        elif how == 3:
            parts[at] = pickle.dumps(spoil.odd_value(rng, 2), int(rng.integers(6)))[:-1]
        else:
            parts[at:at] = [b"2\x86"] * int(spoil.choice(rng, (1, 8, 40, 3000)))  # DUP, pairs
        if not parts:
            break
    return b"".join(parts)


def bomb(rng):
    """Make a file that means more than it holds."""
    size = int(spoil.choice(rng, (1000, 100_000, 400_000)))
    content = spoil.choice(
        rng,
        (
            b"(" * size,
            b"]" * size + b"a" * size + b".",
            b")\x85" + b"\x85" * size + b"Q.",
            b")" + b"2\x86" * (size // 2) + b"Q.",
            b"\x80\x02}(" + b"X\x01\0\0\0aK\x01" * (size // 8) + b"u.",
            b"\x80\x02" + b"B\xff\xff\xff\x7f",
            b"\x80\x04\x8e" + struct.pack("<Q", 2**40),
            b"\x80\x02]" + b"q" * size + b".",
            b"\x80\x02]" + b"r\xff\xff\xff\x7f" * (size // 5) + b".",
            b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\1" * size,
        ),
    )
    if rng.integers(3) == 0:
        return b"\x80\x02" + content
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for at in range(int(spoil.choice(rng, (0, 0, 0, 2000)))):
            file.writestr(f"archive/data/{at}", b"")
        kind = spoil.choice(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        file.writestr("archive/data.pkl", content, kind)
    return buffer.getvalue()
