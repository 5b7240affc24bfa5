"""LZW strips and tiles by libtiff, because they come from anywhere and may be damaged.

The LZW decoder of imagecodecs follows pointers that were never set when the first code after a
clear code is no literal, which ends the process; libtiff refuses such data, and is twice as fast.
It decodes files, so a piece becomes one: a BigTIFF (large pieces pass 4 GB) of a single strip.
"""

from __future__ import annotations

import struct

import imagecodecs

_HEADER = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16)
_SHORT, _LONG, _LONG8 = 3, 4, 16  # types of a tag's value


def decode(data: memoryview, rows: int, row_bytes: int) -> memoryview:
    """Decode ``rows`` rows of ``row_bytes`` bytes each.

    Raises
    ------
    ValueError
        When the data are damaged, or hold less than that.
    """
    tags = [
        (256, _LONG, row_bytes),
        (257, _LONG, rows),
        (258, _SHORT, 8),  # bits of a value: bytes are bytes, whatever they mean
        (259, _SHORT, 5),  # LZW
        (262, _SHORT, 1),
        (273, _LONG8, 0),  # where the strip begins: after the tags
        (277, _SHORT, 1),
        (278, _LONG, rows),
        (279, _LONG8, len(data)),
    ]
    start = len(_HEADER) + 8 + 20 * len(tags) + 8
    table = b"".join(
        struct.pack("<HHQQ", tag, kind, 1, start if tag == 273 else value)
        for tag, kind, value in tags
    )
    file = b"".join([_HEADER, struct.pack("<Q", len(tags)), table, bytes(8), data])
    try:
        pixels = imagecodecs.tiff_decode(file)  # uint8 (rows, row_bytes)
    except imagecodecs.TiffError as error:
        raise ValueError(f"the LZW data are damaged ({error})") from error
    return pixels.reshape(-1).data
