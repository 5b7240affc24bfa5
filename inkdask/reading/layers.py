"""Find the layer files of a segment, and choose those that a job reads, by their names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from inkdask import storage
from inkdask.errors import InkdaskError

_LAYER = re.compile(r"(\d+)\.(tiff?|png|jpe?g)", re.IGNORECASE)
_FOLDERS = ("layers", "surface_volume")


@dataclass(frozen=True)
class LayerFile:
    """File whose name is that of a layer.

    Attributes
    ----------
    number
        Number in the name.
    uri
        Path or URI.
    size
        Bytes.
    mark
        ETag or modification time, which changes with the file.
    etag
        ETag on S3, elsewhere empty.
    """

    number: int
    uri: str
    size: int
    mark: str
    etag: str

    @classmethod
    def of(cls, number: int, uri: str, entry: storage.Entry) -> LayerFile:
        """Layer ``number`` from an entry of a listing."""
        return cls(number, uri, entry.size, entry.mark, entry.etag)

    @property
    def is_tiff(self) -> bool:
        """Whether the ending is that of a TIFF."""
        return self.uri.lower().endswith((".tif", ".tiff"))


def find_layers(uri: str, listing: Sequence[storage.Entry]) -> tuple[str, list[LayerFile]]:
    """Find the folder of layers in a segment, and all layers in it.

    Parameters
    ----------
    uri, listing
        The segment, and its listing.

    Returns
    -------
    str
        ``layers``, ``surface_volume`` or a folder ending in ``.tifs`` in the segment, or the
        segment itself.
    list of LayerFile
        Layers, sorted by number; may be empty.
    """
    folders = [entry.name for entry in listing if entry.is_folder]
    inner = [name for name in _FOLDERS if name in folders]
    inner += [name for name in folders if name.endswith(".tifs")]
    folder = storage.join(uri, inner[0]) if inner else uri.rstrip("/")
    files = [
        LayerFile.of(int(match[1]), storage.join(folder, entry.name), entry)
        for entry in (storage.list_folder(folder) if inner else listing)
        if not entry.is_folder and (match := _LAYER.fullmatch(entry.name))
    ]
    return folder, sorted(files, key=lambda file: (file.number, file.uri))


def choose_layers(
    numbers: Sequence[int],
    where: str,
    layers: tuple[int, int] | None,
    count: int | None,
) -> slice:
    """Choose the layers that a job reads.

    Parameters
    ----------
    numbers
        Numbers of the existing layers, ascending.
    where
        Folder or array, for messages.
    layers
        First number (inclusive) and last (exclusive).
    count
        Without ``layers``: number of layers around the middle; None for all.

    Returns
    -------
    slice
        Positions in ``numbers``.
    """
    asked = asked_for(layers)
    if not numbers:
        raise InkdaskError(f"No layers found in {where}{asked}.")
    held = f"it has {len(numbers)}, {numbers[0]:02d} to {numbers[-1]:02d}"
    if gaps := sorted(set(range(numbers[0], numbers[-1])) - set(numbers)):
        held += f" without {_some(gaps)}"
    if layers:
        inside = [i for i, number in enumerate(numbers) if layers[0] <= number < layers[1]]
        if not inside:
            raise InkdaskError(f"No layers found in {where}{asked}: {held}.")
        chosen, wanted = slice(inside[0], inside[-1] + 1), range(*layers)
    else:
        count = count or len(numbers)
        if count > len(numbers):
            raise InkdaskError(
                f"Channel mismatch: {count} layers are wanted of {where}, but {held}; "
                "MODEL_IN_CHANS sets how many a network reads."
            )
        first = (len(numbers) - count) // 2
        chosen = slice(first, first + count)
        wanted = range(numbers[first], numbers[first + count - 1] + 1)
    missing = sorted(set(wanted) - set(numbers[chosen]))
    if missing:
        raise InkdaskError(
            f"{'Layer' if len(missing) == 1 else 'Layers'} {_some(missing)} missing in "
            f"{where}{asked}."
        )
    return chosen


def asked_for(layers: tuple[int, int] | None) -> str:
    """Return the requested range as words of a message; empty without a range."""
    return f" for START_LAYER={layers[0]}, END_LAYER={layers[1]}" if layers else ""


def _some(numbers: Sequence[int]) -> str:
    names = ", ".join(f"{number:02d}" for number in numbers[:8])
    return names + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def check_unique(files: Sequence[LayerFile], layers: tuple[int, int] | None) -> None:
    """Check that no two files in the range ``layers``, or of all, have the same number."""
    for one, other in itertools.pairwise(files):
        is_read = layers is None or layers[0] <= one.number < layers[1]
        if one.number == other.number and is_read:
            raise InkdaskError(f"Layer {one.number:02d} is there twice: {one.uri} and {other.uri}.")
