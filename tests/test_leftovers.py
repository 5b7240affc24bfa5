"""Test that jobs leave nothing behind, on any machine and with any name: scratch, home, console."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import imagecodecs
import numpy as np
import pytest

import inkdask
from inkdask import storage
from inkdask.errors import InkdaskError
from inkdask.provenance import absolute, software
from inkdask.reading import images
from inkdask.storage import outputs
from tests.files import bound_by_rights, grids, random_volume, write_segment
from tests.oracle import depth_slope, papyrus
from tests.test_runs import wait_until

pytestmark = pytest.mark.usefixtures("own_environment")


def write_pngs(folder, volume):
    """Write layers that are decoded whole, uint8 (z, y, x), and open them."""
    folder.mkdir()
    for number, layer in enumerate(volume):
        (folder / f"{number:02d}.png").write_bytes(imagecodecs.png_encode(layer))
    return inkdask.open_segment(folder)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Folder of the scratch folders of this test."""
    monkeypatch.setattr(images, "_kept", {})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def segments(tmp_path, count):
    volumes = [random_volume((3, 50, 60), "u1", seed) for seed in range(count)]
    opened = [write_pngs(tmp_path / str(seed), volume) for seed, volume in enumerate(volumes)]
    return list(zip(opened, volumes, strict=True))


def test_decoded_layers_of_the_latest_segments_are_kept(tmp_path, scratch):
    made = segments(tmp_path, images.KEPT + 2)
    for segment, volume in [*made, made[0]]:  # the first is decoded again
        np.testing.assert_array_equal(segment.volume.compute(), volume)
        assert len(list(scratch.iterdir())) <= images.KEPT
    assert len(list(scratch.iterdir())) == images.KEPT


def test_decoded_layers_stay_while_they_are_read(tmp_path, scratch, monkeypatch):
    (slow, volume), *others = segments(tmp_path, images.KEPT + 1)
    begun, go_on = threading.Event(), threading.Event()
    decode = images.ImageFile.decode

    def wait(image):
        if "/0/02" in image.uri:
            begun.set()
            assert go_on.wait(60)
        return decode(image)

    monkeypatch.setattr(images.ImageFile, "decode", wait)
    result = []
    reader = threading.Thread(target=lambda: result.append(slow.volume.compute()))
    reader.start()
    assert begun.wait(60)
    for segment, pixels in others:
        np.testing.assert_array_equal(segment.volume.compute(), pixels)
    assert len(list(scratch.iterdir())) == images.KEPT + 1
    go_on.set()
    reader.join(60)
    np.testing.assert_array_equal(result[0], volume)


def test_block_whose_layers_are_removed_is_an_error(tmp_path, scratch, monkeypatch):
    """zarr reads missing chunks as zeros, and a chunk of zeros would be stored as done."""
    [(segment, _)] = segments(tmp_path, 1)
    layer = images._Layers.layer

    def remove_then_read(layers, image):
        array = layer(layers, image)
        images.forget()
        return array

    monkeypatch.setattr(images._Layers, "layer", remove_then_read)
    with pytest.raises(InkdaskError, match="interrupted"):
        segment.volume.compute(scheduler="synchronous")
    images.forget()  # waits for the threads that are still removing them
    assert list(scratch.iterdir()) == []


def test_writer_that_has_just_been_let_in_leaves_nothing(tmp_path, scratch, monkeypatch):
    [(segment, _)] = segments(tmp_path, 1)
    allowed, ends = images._Layers.check_there, []

    def allow_then_forget(layers):
        allowed(layers)
        if layers.lock.locked():  # between the question and the first byte
            ends.append(threading.Thread(target=images.forget))
            ends[-1].start()
            ends[-1].join(0.2)

    def create_when_forgotten(path, **options):
        [layers] = images._kept.values()
        wait_until(lambda: not layers.is_there)
        return create_array(path, **options)

    create_array = images.zarr.create_array
    monkeypatch.setattr(images._Layers, "check_there", allow_then_forget)
    monkeypatch.setattr(images.zarr, "create_array", create_when_forgotten)
    with pytest.raises(InkdaskError, match="interrupted"):
        segment.volume.compute(scheduler="synchronous")
    for end in ends:
        end.join(60)
    assert list(scratch.iterdir()) == []


def test_next_job_removes_temporary_folders_of_a_killed_one_alone(tmp_path, scratch):
    folder = tmp_path / "seg"
    write_pngs(folder, papyrus((3, 70, 70)))
    code = (
        "import sys, time; from inkdask.storage.scratch import Scratch\n"
        "held = Scratch(); (held.path / 'layer').touch()\n"
        "print(held.path, flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "TMPDIR": str(scratch)}
    command = [sys.executable, "-c", code]
    others = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        killed, living = (Path(other.stdout.readline().strip()) for other in others)
        others[0].kill()
        others[0].wait()
        (scratch / "inkdask-of-a-user").mkdir()
        (scratch / "inkdask-tmp-link").symlink_to(folder)
        inkdask.run(folder, model=depth_slope, stride=64)
        assert not killed.exists()
        assert (living / "layer").exists()
    finally:
        for other in others:
            other.kill()
            other.wait()
    inkdask.prepare(folder)
    images.forget()
    left = sorted(path.name for path in scratch.iterdir())
    assert left == ["inkdask-of-a-user", "inkdask-tmp-link"]
    assert len(list(folder.glob("*.png"))) == 3


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_interrupted_job_removes_its_decoded_layers(tmp_path, how):
    write_pngs(tmp_path / "seg", papyrus((26, 900, 900), holes=False))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ["run", str(tmp_path / "seg"), "--model", "demo", "--no-compile", "--stride", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "inkdask", *words],
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: any(scratch.glob("inkdask-tmp-*/*.zarr")), process)  # not one just made
        process.send_signal(how)
        assert process.wait(60) == 128 + how
    finally:
        process.kill()
    assert list(scratch.iterdir()) == []


def leave(place, age):
    """Leave a file, or a folder without files, as a process that was killed ``age`` seconds ago."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".unfinished":
        (place / "c" / "0").mkdir(parents=True)
    else:
        place.touch()
    for path in (*place.rglob("*"), place):
        os.utime(path, times=(time.time() - age,) * 2)
    return place


OF_PICTURE = "out/{picture}.zarr.0123abcd.unfinished", "out/.{picture}.png.0123abcd.part"
OF_GRID = (
    "{grid}/zarr.0123456789abcdef0123456789abcdef.partial",
    "{grid}/g1.0123abcd.unfinished",
    "{grid}/g1/grid/c/0/0.0123456789abcdef0123456789abcdef.partial",
    "{grid}.0123abcd.unfinished",
)
OF_FILES = ".result.txt.0123abcd.part", ".page.html.0123abcd.part"
OF_ARRAY = (
    "v.zarr.0123abcd.unfinished",
    "v.zarr.done.0123abcd.unfinished",
    "v.zarr/zarr.0123456789abcdef0123456789abcdef.partial",
    "v.zarr/c/0/0/.0.0123abcd.part",
)
LEFT = {
    "run": (*OF_PICTURE, *OF_GRID, *OF_FILES, "partitions/jobs/.0123.json.0123abcd.part"),
    "reduce": (*OF_PICTURE, *OF_GRID, *OF_FILES),
    "prepare": OF_ARRAY,
    "export": ("a.zarr.0123abcd.unfinished", ".b.tif.0123abcd.part"),
}


@pytest.mark.parametrize("command", LEFT)
def test_next_command_removes_what_killed_ones_left_where_it_writes(tmp_path, command, scratch):
    segment, out = write_segment(tmp_path / "seg", papyrus((3, 70, 70))), tmp_path / "out"
    words = {"output_path": str(out), "report": str(tmp_path / "page.html"), "stride": 64}
    picture = inkdask.run(segment, model=depth_slope, **words)
    [grid] = grids(str(tmp_path / "partitions"))
    names = {"picture": Path(picture).stem, "grid": Path(grid).relative_to(tmp_path)}
    jobs = {
        "run": lambda: inkdask.run(segment, model=depth_slope, **words),
        "reduce": lambda: inkdask.reduce(segment, model=depth_slope, **words),
        "prepare": lambda: inkdask.prepare(segment, surface_volume_zarr=tmp_path / "v.zarr"),
        "export": lambda: inkdask.export(
            picture.replace(".png", ".zarr"), [tmp_path / "a.zarr", tmp_path / "b.tif"]
        ),
    }
    if command == "prepare":
        jobs[command]()
    left = [leave(tmp_path / name.format(**names), 2 * outputs.REST) for name in LEFT[command]]
    held = scratch / "inkdask-tmp-killed"
    held.mkdir()
    kept = [
        leave(left[0].with_name(left[0].name.replace("0123abcd", "89abcdef")), outputs.REST / 2),
        leave(left[0].with_name("other.zarr.0123abcd.unfinished"), 2 * outputs.REST),
    ]
    jobs[command]()
    assert [place for place in left if place.exists()] == []
    assert [place for place in kept if not place.exists()] == []
    assert not held.exists()


def test_sweep_lists_a_folder_of_s3_once_and_for_pictures_alone(s3):
    storage.write_bytes(f"{s3}/out/a.png", b"ink")
    before = storage.counters().requests
    places = [f"{s3}/results/r.txt", f"{s3}/grids/g.zarr"]
    outputs.sweep(f"{s3}/out/a", f"{s3}/out/b", others=places)
    assert storage.counters().requests - before == 1


@pytest.mark.parametrize("module", ["inkdask", "inkdask.cli"])
def test_user_without_home_gets_a_private_one(tmp_path, module):
    """As a container with an unknown user id, from cron or systemd."""
    code = (
        "import pwd; pwd.getpwuid = lambda _: {}['unknown']\n"
        f"import {module}, os, pathlib, stat\n"
        "home = pathlib.Path.home(); print(home, stat.filemode(home.stat().st_mode))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment["TMPDIR"] = str(tmp_path)
    said = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    home, mode = said.split()
    assert Path(home).parent == tmp_path
    assert mode == "drwx------"
    assert not Path(home).exists()


def test_next_job_removes_the_private_home_of_a_killed_one(scratch):
    code = (
        "import os, pwd, signal; pwd.getpwuid = lambda _: {}['unknown']\n"
        "import inkdask; os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment["TMPDIR"] = str(scratch)
    killed = subprocess.run([sys.executable, "-c", code], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(scratch.iterdir())) == 1
    outputs.sweep()
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow), "utf-8"]
)
def test_any_path_is_printed_on_any_console(tmp_path, encoding):
    for name in ("\u03c4\u03cc\u03bc\u03bf\u03c2", os.fsdecode(b"bad\344")):
        folder = write_segment(tmp_path / name, papyrus((3, 70, 70)))
        said = subprocess.run(
            [sys.executable, "-m", "inkdask", "info", str(folder)],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert said.returncode == 0, said.stderr
        assert b"70 x 70" in said.stdout


def test_result_file_holds_the_bytes_of_any_path(tmp_path):
    folder = write_segment(tmp_path / os.fsdecode(b"bad\344"), papyrus((3, 70, 70)))
    uri = inkdask.run(folder, model=depth_slope, stride=64)
    assert (tmp_path / "result.txt").read_bytes() == os.fsencode(uri)
    assert b"bad\344/predictions/" in os.fsencode(uri)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("variable", ["RESULT_FILE", "ZARR_OUTPUT_DIR", "OUTPUT_PATH"])
def test_place_of_another_user_is_found_by_check(tmp_path, variable):
    """Two people of one machine share the defaults in /tmp."""
    segment = write_segment(tmp_path / "seg", papyrus((3, 70, 70)))
    shared = tmp_path / "tmp"
    places = {name: tmp_path / "own" / name for name in ("OUTPUT_PATH", "ZARR_OUTPUT_DIR")}
    places["RESULT_FILE"] = tmp_path / "own" / "result"
    places[variable] = shared / "x"
    for folder in (shared, tmp_path / "own"):
        folder.mkdir()
        folder.chmod(0o1777)
    for folder in [segment, *segment.parents]:
        if Path(tempfile.gettempdir()) in folder.parents:  # none that was there before
            folder.chmod(0o755)
    if variable == "RESULT_FILE":
        (shared / "x").write_text("of root")
    elif variable == "ZARR_OUTPUT_DIR":
        (shared / "x").mkdir()
        (shared / "x").chmod(0o777)
        (shared / "x" / "jobs").mkdir()  # of the first user
    else:
        (shared / "x").mkdir()
    options = {name.lower(): str(place) for name, place in places.items()}
    inkdask.check(segment, model=depth_slope)  # imports what only root may read
    software()
    with bound_by_rights():
        for job in (inkdask.check, inkdask.run):
            with pytest.raises(InkdaskError, match=rf": set {variable} to another place\.$") as it:
                job(segment, model=depth_slope, **options)
            assert str(shared) in str(it.value)


def test_output_that_cannot_be_made_names_its_variable(tmp_path):
    segment = write_segment(tmp_path / "seg", papyrus((3, 70, 70)))
    (segment / "predictions").touch()
    for job in (inkdask.check, inkdask.run):
        with pytest.raises(InkdaskError, match=r"cannot be written: .* set OUTPUT_PATH to another"):
            job(segment, model=depth_slope)


def test_path_with_dots_is_the_same_place(tmp_path):
    (tmp_path / "a").mkdir()
    assert absolute(f"{tmp_path}/a/../a") == storage.absolute(f"{tmp_path}/a") == f"{tmp_path}/a"
    assert absolute("timesformer-scroll5") == "timesformer-scroll5"
