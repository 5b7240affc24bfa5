"""What pictures and grids say of themselves: PNG, TIFF, JPEG, zarr, and records of jobs."""

import contextlib
import json
import shutil
from pathlib import Path

import inkdask
from inkdask import information, records
from inkdask.pictures.reading import read_facts
from inkdask.progress import columns
from tests.files import random_volume, write_layers
from tests.fuzz import spoil
from tests.fuzz.campaign import environment
from tests.jobs import SAID
from tests.oracle import depth_slope


@contextlib.contextmanager
def opened(home):
    """Yield the reader of one input."""
    write_layers(home / "seg" / "layers", random_volume((3, 70, 80)))
    places = {"ZARR_OUTPUT_DIR": str(home / "grids"), "RESULT_FILE": str(home / "result.txt")}
    with environment(**places, MODEL_VERSION="1"):
        uri = inkdask.run(home / "seg", model=depth_slope, stride=32, pixel_resolution_um=7.91)
    stored = uri.replace(".png", ".zarr")
    pictures = [uri, *(str(home / f"ink.{ending}") for ending in ("tif", "jpg", "zarr"))]
    inkdask.export(stored, pictures[1:])
    grid = next((home / "grids").glob("*.zarr"))
    wanted = read_facts(uri).provenance.to_json()
    sources = [*map(Path, (*pictures, stored)), grid, None]
    yield lambda rng, folder: read(rng, folder, spoil.choice(rng, sources), wanted)


def read(rng, folder, source, wanted):
    """Spoil what a copy says of itself, and describe it."""
    if source is None:
        return read_record(rng, folder)
    place = folder / source.name
    changed = wanted
    if source.is_dir():
        shutil.copytree(source, place)
        found = sorted(place.rglob("zarr.json"), key=lambda it: len(it.parts))
        path = spoil.choice(rng, found[:2])
        if rng.integers(6):
            path.write_bytes(spoil.change_text(rng, path.read_text()))
            changed = None
    else:
        data = source.read_bytes()
        if rng.integers(3) == 0:
            data, changed = spoil.change(rng, data), None
        elif rng.integers(6):
            changed = spoil.change_json(rng, wanted)
            data = replaced(data, wanted, changed)
        place.write_bytes(data)
    rows = information.describe(str(place))
    for name, text in rows.items():
        assert isinstance(text, str), (name, text)
    assert columns(rows)
    if changed is not None and not source.is_dir():
        told = read_facts(str(place)).provenance
        if told is None or changed != wanted:  # lax types may read as others
            return "unjudged" if told is not None else "read"
        assert told.to_json() == wanted
    return "read"


def replaced(data, wanted, changed):
    """Exchange the text of a picture, where it has the same length in the file."""
    old = json.dumps(wanted).encode()
    new = json.dumps(changed).encode()
    if old not in data or len(new) > len(old):
        return data
    return data.replace(old, new + b" " * (len(old) - len(new)))


def read_record(rng, folder):
    """Spoil the record of a job; a damaged one is passed over."""
    jobs = folder / "jobs"
    jobs.mkdir()
    record = {"said": SAID.to_json(), "grid": "/nowhere/a.zarr"}
    (jobs / "a.json").write_bytes(spoil.change_text(rng, json.dumps(record)))
    if rng.integers(2):
        (jobs / "b.json").write_text(json.dumps({**record, "grid": "/nowhere/b.zarr"}))
    asked = SAID.to_json()
    found = records.find(str(folder), asked, "run it first.")
    assert isinstance(found, str)
    return "read"
