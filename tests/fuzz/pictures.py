"""Layers and masks that are PNG or JPEG."""

import contextlib
import io

import imagecodecs
import numpy as np
from PIL import Image

from inkdask.segment import open_segment
from inkdask.storage import parallel
from tests.files import random_volume
from tests.fuzz import spoil

MOST = 1 << 20  # pixels that are compared


@contextlib.contextmanager
def opened(_):
    """Yield the reader of one input."""
    parallel._here.is_in_pool = True
    grey, deep = random_volume((2, 40, 50), "|u1"), random_volume((2, 40, 50), "<u2")
    colour = np.stack([grey[0], grey[1], grey[0]], axis=-1)
    layers = [(f"{ending}", data) for ending, data in bases(grey[0], deep[0], colour)]
    mask = imagecodecs.png_encode((grey[1] > 90).astype(np.uint8) * 255)
    yield lambda rng, folder: read(rng, folder, layers, mask)


def bases(grey, deep, colour):
    """Yield ending and bytes of every kind of file."""
    for pixels in (grey, deep, colour):
        yield "png", imagecodecs.png_encode(pixels)
    for pixels in (grey, colour):
        yield "jpg", imagecodecs.jpeg_encode(pixels, level=90)
    for image in (grey, colour):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[274] = 1
        Image.fromarray(image).save(file, "JPEG", exif=exif, progressive=True)
        yield "jpg", file.getvalue()


def read(rng, folder, layers, mask):
    """Write a layer and a mask, of which one is spoiled, and compare both with Pillow."""
    ending, data = spoil.choice(rng, layers)
    if rng.integers(3):
        data = spoil.change(rng, data)
    elif rng.integers(2):
        mask = spoil.change(rng, mask)
    (folder / "layers").mkdir()
    (folder / "layers" / f"00.{ending}").write_bytes(data)
    (folder / "mask.png").write_bytes(mask)
    segment = open_segment(folder)
    if segment.shape[1] * segment.shape[2] > MOST:
        segment = segment.crop(slice(0, 8), slice(0, 8))
    got = segment.volume.compute(scheduler="synchronous")[0]
    papyrus = segment.mask.compute(scheduler="synchronous")
    whole, of_mask = decode(data), decode(mask)
    if whole is None or of_mask is None:
        return "unjudged"
    if whole.dtype != np.uint8:
        whole = (whole.astype(np.uint32) >> 8).astype(np.uint8)
    whole = whole[..., 0] if whole.ndim == 3 else whole
    height, width = got.shape
    # Decoders of JPEG may differ by their inverse transform.
    np.testing.assert_allclose(got, whole[:height, :width], rtol=0, atol=4 * (ending == "jpg"))
    np.testing.assert_array_equal(papyrus, of_mask[:height, :width] > 0)
    return "read"


def decode(data):
    """Decode by Pillow, as stored; None if it refuses, or knows another mode."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size[0] * image.size[1] > MOST or image.mode not in ("L", "RGB", "I;16"):
                return None
            return np.asarray(image)
    except Exception:
        return None
