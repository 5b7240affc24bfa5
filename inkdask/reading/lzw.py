"""LZW strips and tiles, decoded by libtiff.

The LZW decoder of imagecodecs crashes the process on some damaged data: it follows unset pointers
when the first code after a clear code is no literal. libtiff refuses such data, and is twice as
fast. It decodes files only, so each piece is wrapped as a BigTIFF of a single strip (BigTIFF,
because pieces may pass 4 GB).
"""

from __future__ import annotations

import struct

import imagecodecs

_HEADER = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16)
_SHORT, _LONG, _LONG8 = 3, 4, 16  # types of tag values


def decode(data: memoryview, rows: int, row_bytes: int) -> memoryview:
    """Decode ``rows`` rows of ``row_bytes`` bytes each.

    Raises
    ------
    ValueError
        When the data are damaged or too short.
    """
    tags = [
        (256, _LONG, row_bytes),
        (257, _LONG, rows),
        (258, _SHORT, 8),  # bits of a value; uint16 values are decoded as pairs of bytes
        (259, _SHORT, 5),  # LZW
        (262, _SHORT, 1),
        (273, _LONG8, 0),  # start of the strip, set below
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
