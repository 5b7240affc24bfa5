"""Seeded changes of bytes, texts and JSON values."""

import contextlib
import json

import numpy as np

INTEGERS = (
    0, 1, 2, 3, 7, 8, 9, 16, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**18, 10**30, -1,
    -2, -(2**31), -(2**63),
)  # fmt: skip
TEXTS = (
    "", " ", "0", "-1", "1e999", "nan", "inf", "../../x", "a/b", "/", ".", "..", "z", "y", "x",
    "none", "null", "true", "é" * 40, "\x1b[2J", "a\nb", "\0", "\ud800", "%s", "{0}", "x" * 5000,
    "<u2", "|u1", ">f8", "|O", "zstd", "blosc", "C", "uint16", "s3://b/k", "[a]*", "16,0,32,64",
)  # fmt: skip


def choice(rng, options):
    """Choose one of a sequence, as it is."""
    return options[int(rng.integers(len(options)))]


def number(rng):
    """Return an odd integer."""
    if rng.integers(4):
        return choice(rng, INTEGERS)
    return int(rng.integers(-100, 5000))


def change(rng, data, most=4):
    """Set, flip, cut, insert, repeat or drop bytes."""
    data = bytearray(data)
    for _ in range(min(rng.geometric(0.5), most)):
        if not data:
            break
        at = int(rng.integers(len(data)))
        if rng.integers(3) == 0:
            at //= 8  # headers come first
        end, how = at + int(rng.integers(1, 33)), rng.integers(8)
        if how == 0:
            data[at] = rng.integers(256)
        elif how == 1:
            data[at] ^= 1 << rng.integers(8)
        elif how == 2:
            del data[at:end]
        elif how == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif how == 4:
            data[at:at] = data[at:end]
        elif how == 5 and rng.integers(3) == 0:
            del data[at:]
        else:  # a number in the place of another
            size = int(choice(rng, (1, 2, 4, 8)))
            value = number(rng) % 256**size
            data[at : at + size] = value.to_bytes(size, choice(rng, ("little", "big")))
    return bytes(data)


def odd_value(rng, depth=0):
    """Return a JSON value of any kind."""
    kind = rng.integers(10)
    if kind < 3:
        return number(rng)
    if kind < 5:
        return choice(rng, TEXTS)
    if kind == 5:
        return choice(rng, (None, True, False, [], {}))
    if kind == 6 or (kind == 9 and depth):
        return choice(rng, (0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")))
    if depth > 2:
        return 1
    if kind == 7:
        return [odd_value(rng, depth + 1) for _ in range(rng.integers(5))]
    if kind == 8:
        return {choice(rng, TEXTS): odd_value(rng, depth + 1) for _ in range(rng.integers(4))}
    value = 1
    for _ in range(int(choice(rng, (3, 50, 500)))):
        value = [value] if rng.integers(2) else {"a": value}
    return value


def change_json(rng, value, most=3):
    """Change, remove, add or exchange values anywhere in a JSON value."""
    value = json.loads(json.dumps(value))
    for _ in range(min(rng.geometric(0.5), most)):
        places = list(_places(value))
        if not places:
            return odd_value(rng)
        holder, key = choice(rng, places)
        how = rng.integers(8)
        if how == 0:
            del holder[key]
        elif how == 1:
            holder[key] = [holder[key]]
        elif how == 2:
            holder[key] = json.dumps(holder[key])
        elif how == 3:
            other, place = choice(rng, places)
            holder[key] = json.loads(json.dumps(other.get(place) if isinstance(other, dict) else 0))
        elif how == 4 and isinstance(holder, list):
            holder.insert(key, odd_value(rng))
        elif how == 5 and isinstance(holder, dict):
            holder[choice(rng, TEXTS)] = holder.pop(key)
        else:
            holder[key] = odd_value(rng)
    return value


def _places(value):
    """Yield every place in a JSON value, as its holder and key."""
    pairs = enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(value.items() if isinstance(value, dict) else pairs):
        yield value, key
        yield from _places(inner)


def change_text(rng, text):
    """Change a JSON text by its values, or else by its bytes."""
    if rng.integers(4):
        value, is_ascii = change_json(rng, json.loads(text)), bool(rng.integers(2))
        with contextlib.suppress(RecursionError):
            return json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    return change(rng, text.encode())


def random(seed, at):
    """Return the generator of input number ``at``."""
    return np.random.default_rng([seed, at])
