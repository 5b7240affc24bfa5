"""Which surface volume of a published segment is read: one for each scan lies in its folder."""

from __future__ import annotations

import re
from collections.abc import Sequence

from inkdask import catalogue, storage
from inkdask.errors import InkdaskError, SettingsError
from inkdask.reading import pixel_size
from inkdask.reading.layers import FOLDERS, VOLUMES, find_layers, list_names
from inkdask.reading.volume import Source
from inkdask.reading.zarr_volume import ZarrSource, open_zarr

LABELLED = "surface-volume.zarr"  # beside the labels that networks are trained on


def choose_volume(
    uri: str, listing: Sequence[storage.Entry], wanted: str | None, root: str | None
) -> str:
    """Return the surface volume that is read of a segment, or the folder itself without any.

    Parameters
    ----------
    uri, listing
        Folder of the segment, and what is in it.
    wanted
        Name of a volume, the id of its scan, or how one of these begins. Without it there must be
        no more than one.
    root
        Root of the catalogue, which says what a folder holds where nothing is listed.
    """
    there = _find(uri, listing, wanted, root)
    if not wanted and (not there or {entry.name for entry in listing} & {*FOLDERS}):
        return uri
    last = (wanted or "").rsplit("/", 1)[-1]
    stems = {_stem(name): name for name in sorted(there)}  # of the same layers, the zarr
    if wanted and last in there:
        chosen = [last]
    elif wanted and last in stems:
        chosen = [stems[last]]
    else:
        chosen = [name for stem, name in stems.items() if not last or _begins(stem, last)]
    if len(chosen) == 1:
        return there[chosen[0]]
    said = ", ".join(_describe(there[name], root) for name in chosen or stems.values())
    if not said:
        raise SettingsError(f"VOLUME is {wanted!r}, and {uri} has no surface volumes.")
    if not chosen:
        raise SettingsError(f"{uri} has no surface volume {wanted!r}; it has {said}.")
    raise SettingsError(f"VOLUME is not set: {uri} has several surface volumes, {said}; name one.")


def _find(
    uri: str, listing: Sequence[storage.Entry], wanted: str | None, root: str | None
) -> dict[str, str]:
    """Return the surface volumes of a folder: their URIs by name."""
    if storage.is_http(uri):
        if listing:
            return {}
        try:
            there = catalogue.volumes_of(uri, root)
        except InkdaskError as error:
            raise InkdaskError(
                f"{uri} is no folder of layers and no zarr, and what else it holds is not known: "
                f"{error}"
            ) from error
        names = {volume.rsplit("/", 1)[-1]: volume for volume in there}
        if wanted and wanted.endswith(".tifs"):  # which no catalogue names
            names.setdefault(wanted, storage.join(uri, VOLUMES, wanted))
        return names
    folders = [entry.name for entry in listing if entry.is_folder]
    if VOLUMES in folders:
        uri = storage.join(uri, VOLUMES)
        folders = [entry.name for entry in storage.list_folder(uri) if entry.is_folder]
    elif uri.rsplit("/", 1)[-1] != VOLUMES:  # a folder with its layers, or with labels
        folders = [name for name in folders if name == LABELLED or name.endswith(".tifs")]
    return {name: storage.join(uri, name) for name in folders if name.endswith((".zarr", ".tifs"))}


def _stem(name: str) -> str:
    return re.sub(r"\.(zarr|tifs)$", "", name)


def _begins(stem: str, words: str) -> bool:
    """Whether a name, or the id of the scan in it, begins with these words."""
    return stem.startswith(words) or f"volume-{words}" in stem


def _describe(uri: str, root: str | None) -> str:
    """Return name, pixel size and depth of a surface volume, as far as they can be read."""
    name = uri.rsplit("/", 1)[-1]
    side = catalogue.pixel_um(uri, root) or pixel_size.of_name(name)
    try:
        files = [] if name.endswith(".zarr") else find_layers(uri, list_names(uri))[1]
        count = len(files) or open_zarr(uri).shape[0]
        depth = f"{count} layer{'s' * (count > 1)}"
    except InkdaskError:
        depth = "unreadable"
    return f"{name} ({f'{side:g} um, ' if side else ''}{depth})"


def pixel_um_of(uri: str, source: Source, root: str | None) -> float | None:
    """Return the side of a pixel: as the catalogue has it, as the name, else as the metadata."""
    told = source if isinstance(source, ZarrSource) else None
    names = uri.split("/")
    index = told.level if told else 0
    if len(names) > 1 and names[-2].endswith(".zarr") and names[-1].isdecimal():
        index, uri = int(names.pop()), "/".join(names[:-1])  # a level that was named itself
    if told and (told.made_of or told.prepared_as):  # whose name may be that of a finer level
        return told.pixel_um
    named = catalogue.pixel_um(uri, root) or pixel_size.of_path("/".join(names))
    if named:
        return named * 2**index
    return told.pixel_um if told else None
