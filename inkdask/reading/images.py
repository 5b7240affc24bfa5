"""Layers that cannot be read in parts: PNG, JPEG, and TIFFs compressed in one piece.

Each process decodes such a layer when a task first needs it, into a scratch zarr on its local disk,
and reads all blocks from there. ``inkdask prepare`` spares later jobs the decoding.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import PIL.Image
import zarr
from tifffile.tifffile import jpeg_shape

from inkdask import storage
from inkdask.errors import InkdaskError, reason
from inkdask.failures import dask_worker
from inkdask.reading.tiff import TiffImage
from inkdask.storage.parallel import for_each
from inkdask.storage.scratch import Scratch

log = logging.getLogger(__name__)

CHUNK = 1024  # pixels: side of a chunk of the scratch zarr
DECODING_BYTES = 2 << 30  # limit of the layers that are decoded side by side
KEPT = 4  # identities whose layers stay decoded: two segments and their masks
Page = tuple[str, int]  # URI, and number of a page in it
PATIENCE = 10.0  # seconds that the end of a process waits for threads that write
PALETTE = 3  # colour type of a PNG
PLAIN = "save it upright and plain, with 1"
_HEADER_READ, _LONG_HEADER_READ = 1 << 16, 1 << 24


@dataclass(frozen=True)
class ImageFile:
    """PNG or JPEG file, or a mask that is a TIFF.

    Attributes
    ----------
    uri
        Path or URI of the file.
    shape
        Height and width in pixels.
    dtype
        uint8 or uint16.
    channels
        Number of channels, of which the first is kept.
    is_palette
        Whether the values are numbers of colours in a palette.
    is_mask
        Whether to decode to 0 where it is black, and to 1 elsewhere.
    etag
        ETag on S3, elsewhere empty.
    """

    uri: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    channels: int = 1
    is_palette: bool = False
    is_mask: bool = False
    etag: str = ""
    page = 0

    @property
    def oddity(self) -> str:
        """Unread contents, for a warning; mostly empty."""
        return f"{self.channels} channels, of which the first is read" if self.channels > 1 else ""

    @property
    def words(self) -> str:
        """Human-readable layout."""
        return "PNG" if self.uri.lower().endswith("png") else "JPEG"

    def decode(self, dtype: Any = np.uint8) -> np.ndarray:
        """Read the first channel of the whole picture (y, x): high bytes, or values as stored."""
        try:
            data = storage.read_bytes(self.uri, self.etag)
            pixels = imagecodecs.imread(data, codec=["png", "jpeg", "tiff"])
        except InkdaskError:
            raise
        except Exception as error:
            raise InkdaskError(f"{self.uri} is truncated or corrupt: {reason(error)}.") from error
        if self.is_mask:  # All colours count, however dark; alpha does not.
            if pixels.shape[:2] != self.shape:  # A TIFF may hold one colour after the other.
                pixels = np.moveaxis(pixels, 0, -1)
            colours = pixels.reshape(*pixels.shape[:2], -1)
            opaque = colours[..., :-1] if colours.shape[2] in (2, 4) else colours
            return np.asarray(opaque.any(axis=2)).view(np.uint8)
        if pixels.ndim == 3:
            pixels = pixels[:, :, 0]
        if pixels.dtype.itemsize > np.dtype(dtype).itemsize:
            pixels = pixels >> 8
        return pixels.astype(dtype, copy=False)


Image = ImageFile | TiffImage


def read_header(uri: str, size: int, etag: str = "") -> ImageFile:
    """Parse the header of a PNG or JPEG file of ``size`` bytes."""
    try:
        head = storage.read_range(uri, 0, min(size, _HEADER_READ), etag)
        return replace(_parse(uri, head), etag=etag)
    except InkdaskError:
        if size <= _HEADER_READ:
            raise
    # Read on, because previews and profiles may precede the frame header of a JPEG.
    head = storage.read_range(uri, 0, min(size, _LONG_HEADER_READ), etag)
    return replace(_parse(uri, head), etag=etag)


def _parse(uri: str, head: bytes) -> ImageFile:
    colours, is_png = 0, head[12:16] == b"IHDR"
    try:
        if is_png:
            width, height, bits, colours = struct.unpack(">IIBB", head[16:26])
            channels = {0: 1, 4: 2, 2: 3, PALETTE: 3, 6: 4}[colours]
        else:
            bits, height, width, channels = jpeg_shape(head)
    except Exception as error:
        raise InkdaskError(f"{uri} cannot be read as a PNG or JPEG: {reason(error)}.") from error
    if not height * width * channels:
        raise InkdaskError(f"{uri} has no pixels.")
    if 8 < bits < 16:
        raise InkdaskError(f"{uri} has {bits}-bit values: save it as uint8, or as a PNG of uint16.")
    exif = PIL.Image.Exif()
    with suppress(Exception):  # Damaged Exif data do not concern the pixels.
        exif.load(head.partition(b"eXIf" if is_png else b"Exif\0\0")[2])
    if exif.get(274, 1) != 1:
        raise InkdaskError(f"{uri} has Orientation {exif[274]}, and only 1 can be read: {PLAIN}.")
    dtype = np.dtype(np.uint16 if bits == 16 else np.uint8)
    return ImageFile(uri, (height, width), dtype, channels, colours == PALETTE)


def decoded_bytes(image: Image) -> int:
    """Bytes of a decoded layer with all its channels."""
    return image.shape[0] * image.shape[1] * image.channels * image.dtype.itemsize


@dataclass(frozen=True, eq=False)
class DecodedBlock:
    """Rows and columns, in pixels, of layers that are decoded as a whole; read in a task.

    ``identity`` is the digest of the files.
    """

    images: tuple[Image, ...]
    identity: str
    rows: slice
    columns: slice

    def read(self) -> np.ndarray:
        """Read the block, uint8 (z, y, x); decode layers that this process has not decoded yet."""
        layers = _decoded(self.identity, decoded_bytes(self.images[0]))

        def cut(image: Image) -> np.ndarray:
            return np.asarray(layers.layer(image)[self.rows, self.columns])

        block = np.stack(for_each(cut, self.images))
        layers.check_there()
        return block


class _Layers:
    """Decoded layers of one identity, on disk until their last reader is gone."""

    def __init__(self, folder: str | None, size: int) -> None:
        self._scratch, self.is_there = Scratch(folder), True
        self.path = str(self._scratch.path)
        self.lock, self._locks = threading.Lock(), dict[Page, tuple[int, threading.Lock]]()
        self._arrays: dict[Page, zarr.Array] = {}
        self.writers = 0
        self._turns = threading.Semaphore(max(1, DECODING_BYTES // size))

    def layer(self, image: Image) -> zarr.Array:
        """Return the decoded layer, uint8 (y, x); the first caller decodes it, others wait."""
        page = image.uri, image.page
        with self.lock:
            number, lock = self._locks.setdefault(page, (len(self._locks), threading.Lock()))
        with lock:
            if page not in self._arrays:
                self._arrays[page] = self._decode(image, f"{self.path}/{number}.zarr")
            return self._arrays[page]

    def _decode(self, image: Image, path: str) -> zarr.Array:
        with self._turns:
            pixels = image.decode()
            if pixels.shape != image.shape:
                raise InkdaskError(f"{image.uri} is corrupt: {pixels.shape} pixels decoded.")
            with self.lock:
                self.check_there()
                self.writers += 1
            try:
                array = zarr.create_array(
                    path, shape=image.shape, chunks=(CHUNK, CHUNK), dtype=np.uint8, overwrite=True
                )
                array[:] = pixels
            except OSError:
                self.check_there()
                raise
            finally:
                with self.lock:
                    self.writers -= 1
            log.debug("%s decoded into %s", image.uri, path)
            return array

    def check_there(self) -> None:
        """Refuse to go on when the layers were removed, as `forget` does."""
        if not self.is_there:
            raise InkdaskError("The job was interrupted.")


_kept: dict[tuple[int, str, str | None], _Layers] = {}
_lock = threading.Lock()


def _decoded(identity: str, size: int) -> _Layers:
    """Return the layers of an identity; call it in the task's own thread (`_local_folder`)."""
    key = os.getpid(), identity, _local_folder()
    with _lock:
        layers = _kept.pop(key) if key in _kept else _Layers(key[2], size)
        _kept[key] = layers
        for oldest in [*_kept][:-KEPT]:
            del _kept[oldest]
    return layers


def forget() -> None:
    """Remove all decoded layers, in a process that ends; a later read of them fails.

    Threads that still write are waited for, but not for longer than a person would wait.
    """
    end = time.monotonic() + PATIENCE
    for layers in [*_kept.values()]:
        with layers.lock:  # so that each writer is either counted or refused
            layers.is_there = False  # because zarr reads missing chunks as zeros
        while layers.writers or Path(layers.path).exists():
            shutil.rmtree(layers.path, ignore_errors=True)
            if time.monotonic() > end:
                break
            time.sleep(0.01)  # so that the writers go on


def _local_folder() -> str | None:
    """Return the local folder of this Dask worker, which removes it at its end; else None."""
    worker = dask_worker()
    return str(worker.local_directory) if worker else None
