"""What pictures and grids say of themselves: PNG, TIFF, JPEG, zarr, and records of jobs."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import png

import inkdask
from inkdask import information, records
from inkdask.identity import Provenance
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
    files = {Path(it): read_facts(it).provenance.to_json() for it in pictures[:3]}
    for path, wanted in files.items():
        assert json.dumps(wanted).encode() in path.read_bytes()
    sources = [*files.items(), *((Path(it), None) for it in (pictures[3], stored, grid)), None]
    yield lambda rng, folder: read(rng, folder, spoil.choice(rng, sources))


def read(rng, folder, source):
    """Spoil what a copy says of itself, and describe it."""
    if source is None:
        return read_record(rng, folder)
    source, wanted = source
    place = folder / source.name
    changed = wanted
    if source.is_dir():
        shutil.copytree(source, place)
        found = sorted(place.rglob("zarr.json"), key=lambda it: len(it.parts))
        path = spoil.choice(rng, found[:2])
        if rng.integers(6):
            path.write_bytes(spoil.change_text(rng, path.read_text()))
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
    if changed is not None:
        told = read_facts(str(place)).provenance
        if json.dumps(changed) == json.dumps(wanted):
            assert told.to_json() == wanted
        elif told is not None:  # numbers may have been texts, and NaN is not itself
            assert repr(Provenance.from_json(changed, "it")) == repr(told)
    return "read"


def replaced(data, wanted, changed):
    """Exchange the text of a picture; one that is too long for a TIFF or JPEG is cut."""
    old, new = (json.dumps(it).encode() for it in (wanted, changed))
    if not data.startswith(b"\x89PNG"):
        return data.replace(old, new[: len(old)].ljust(len(old)))
    chunks = png.Reader(bytes=data).chunks()
    file = io.BytesIO()
    png.write_chunks(file, [(name, content.replace(old, new)) for name, content in chunks])
    return file.getvalue()


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
