"""Find the layer files of a segment, and choose those that a job reads, by their names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from inkdask import storage
from inkdask.errors import InkdaskError

_LAYER = re.compile(r"([^_]+_)?(\d+)\.(tiff?|png|(jpe?g))", re.IGNORECASE)  # 00.tif, ID_00.tif
# In a folder of layers an ID may have "_". Pictures in a segment may end in a number, too.
_OF_LAYERS = re.compile(_LAYER.pattern.replace("[^_]+", ".+"), re.IGNORECASE)
FOLDERS = ("layers", "surface_volume")
VOLUMES = "surface-volumes"  # folder of several in the open bucket

ZARR_FILES = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
_FIRST = ("00.tif", "000.tif", "00.png", "00.jpg")  # of the layers that are asked for by name
PROBED = 32  # layers that are asked for at a time


@dataclass(frozen=True)
class LayerFile:
    """File whose name is that of a layer, or a TIFF that may hold a stack of layers.

    Attributes
    ----------
    number
        Number in the name; -1 without a number.
    uri
        Path or URI.
    entry
        Size, ETag and time.
    """

    number: int
    uri: str
    entry: storage.Entry

    @property
    def is_tiff(self) -> bool:
        """Whether the ending is that of a TIFF."""
        return self.uri.lower().endswith((".tif", ".tiff"))


def list_names(uri: str) -> list[storage.Entry]:
    """List a folder; over HTTP, where nothing is listed, ask for what a segment may have."""
    if not storage.is_http(uri):
        return storage.list_folder(uri)
    found = storage.find_entries(
        uri, (*ZARR_FILES, "mask.png", f"{uri.rsplit('/', 1)[-1]}_mask.png")
    )
    if {entry.name for entry in found} & {*ZARR_FILES}:
        return found
    found += _list_layers(uri)
    inner = [name for name in FOLDERS if storage.find_entries(storage.join(uri, name), _FIRST)]
    return found + [storage.Entry(name, 0, "", "", True) for name in inner]


def _list_layers(uri: str) -> list[storage.Entry]:
    """Ask for the layers from number 0 on, until some are missing."""
    found: list[storage.Entry] = []
    for first in storage.find_entries(uri, _FIRST)[:1]:
        digits, ending = first.name.split(".")
        numbers = iter(range(10 ** len(digits)))
        while names := [
            f"{it:0{len(digits)}d}.{ending}" for it in itertools.islice(numbers, PROBED)
        ]:
            found += (batch := storage.find_entries(uri, names))
            if len(batch) < len(names):
                break
    return found


def find_layers(uri: str, listing: Sequence[storage.Entry]) -> tuple[str, list[LayerFile]]:
    """Return the folder of layers in a segment of this listing, and its layers by number.

    The folder is ``layers``, ``surface_volume``, or the segment.
    Instead of layers there may be one TIFF that may hold a stack, or nothing.
    """
    folders = [entry.name for entry in listing if entry.is_folder]
    inner = [name for name in FOLDERS if name in folders]
    folder = storage.join(uri, inner[0]) if inner else uri.rstrip("/")
    entries = list_names(folder) if inner else listing
    places = [(storage.join(folder, entry.name), entry) for entry in entries if not entry.is_folder]
    is_of_layers = bool(inner) or uri.rstrip("/").endswith((*FOLDERS, ".tifs"))
    pattern = _OF_LAYERS if is_of_layers else _LAYER
    found = [(m, place) for place in places if (m := pattern.fullmatch(place[1].name))]
    # Names without an ID come first; files of several IDs are no layers of one segment. JPEGs
    # beside another file of the same layer are previews.
    ids = {match[1] for match, _ in found}
    others = {int(match[2]) for match, _ in found if not match[4]}
    files = [
        LayerFile(int(match[2]), *place)
        for match, place in found
        if (not match[1] or len(ids) == 1) and not (match[4] and int(match[2]) in others)
    ]
    if not entries and storage.exists(uri):
        places = [(uri, storage.entry(uri))]
    tiffs = [file for place in places if (file := LayerFile(-1, *place)).is_tiff]
    files = files or (tiffs if len(tiffs) == 1 else [])
    return folder, sorted(files, key=lambda file: (file.number, file.uri))


def held_in(uri: str, listing: Sequence[storage.Entry]) -> str:
    """Say what layers a folder holds, by names alone: ``65 layers (0:65)``; empty for none."""
    if VOLUMES in {entry.name for entry in listing}:
        return f"in {VOLUMES}"
    files = find_layers(uri, listing)[1]
    if len(files) == 1 and files[0].number < 0:
        return f"one TIFF, {files[0].entry.name}"
    if not files:
        return ""
    numbers = {file.number for file in files}
    start, end = min(numbers), max(numbers) + 1
    gaps = missing_of(numbers, start, end)
    return f"{len(numbers)} layers ({start}:{end}{' without ' * bool(gaps)}{gaps})"


class NoLayersError(InkdaskError):
    """A place holds no layers at all."""


def no_layers(uri: str, folder: str, layers: tuple[int, int] | None) -> NoLayersError:
    """Say what is in a segment, or in its folder of layers, instead of layers."""
    what = "it does not exist"
    if names := [entry.name for entry in storage.list_folder(folder)]:
        names.sort(key=lambda name: name not in FOLDERS)
        for at, name in enumerate(names[:3]):
            if not storage.exists(storage.join(folder, name)):
                names[at] += " (a link to nothing)"
        some = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
        what = f"it holds {some}; name a folder of 00.tif or ID_00.tif, a TIFF stack or a zarr"
    elif storage.is_http(uri):
        what = "it is neither a zarr nor a folder of 00.tif, and the catalogue does not name it"
    elif storage.exists(uri):
        what = "it is empty" if storage.entry(folder).is_folder else "it is a file, and no stack"
    return NoLayersError(f"No layers found in {folder}{asked_for(layers)}: {what}.")


def choose_layers(
    numbers: Sequence[int],
    where: str,
    layers: tuple[int, int] | None,
    count: int | None,
    gaps: bool = False,
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
    gaps
        Whether layers of the range may be missing.

    Returns
    -------
    slice
        Positions in ``numbers``.
    """
    asked, held = asked_for(layers), set(numbers)
    has = f"it has {len(numbers)}, {numbers[0]:02d} to {numbers[-1]:02d}"
    if lacking := missing_of(held, numbers[0], numbers[-1]):
        has += f" without {lacking}"
    if layers:
        inside = [i for i, number in enumerate(numbers) if layers[0] <= number < layers[1]]
        if not inside:
            raise InkdaskError(f"No layers found in {where}{asked}: {has}.")
        chosen, (start, end) = slice(inside[0], inside[-1] + 1), layers
    else:
        count = count or len(numbers)
        if count > len(numbers):
            raise InkdaskError(
                f"Channel mismatch: {count} layers are wanted of {where}, but {has}; "
                "MODEL_IN_CHANS sets how many a network reads."
            )
        first = (len(numbers) - count) // 2
        chosen = slice(first, first + count)
        start, end = numbers[first], numbers[first + count - 1] + 1
    if (missing := missing_of(held, start, end)) and not gaps:
        raise InkdaskError(
            f"{'Layers' if ' ' in missing else 'Layer'} {missing} missing in {where}{asked}."
        )
    return chosen


def asked_for(layers: tuple[int, int] | None) -> str:
    """Return the requested range as words of a message; empty without a range."""
    return f" for START_LAYER={layers[0]}, END_LAYER={layers[1]}" if layers else ""


def missing_of(held: set[int], start: int, end: int) -> str:
    """Name the numbers of a range that are not held, without making the range; empty for none."""
    missing = end - start - sum(start <= number < end for number in held)
    first = itertools.islice((n for n in itertools.count(start) if n not in held), min(missing, 8))
    names = ", ".join(f"{number:02d}" for number in first)
    return names + (f" and {missing - 8} more" if missing > 8 else "")


def check_unique(files: Sequence[LayerFile], layers: tuple[int, int] | None) -> None:
    """Check that no two files in the range ``layers``, or of all, have the same number."""
    for one, other in itertools.pairwise(files):
        is_read = layers is None or layers[0] <= one.number < layers[1]
        if one.number == other.number and is_read:
            raise InkdaskError(
                f"Layer {one.number:02d} is there twice: {one.uri} and {other.uri}; remove one."
            )
