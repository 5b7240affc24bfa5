"""What a job checks of its input, how its outputs are named, and how it is found again."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inkdask
from inkdask.errors import InkdaskError
from inkdask.job import Job, changed_input, output_stem
from inkdask.models.registry import known
from inkdask.pictures.picture import open_picture
from inkdask.plan import Plan
from inkdask.settings import Settings
from tests.files import write_segment
from tests.jobs import ORIGIN
from tests.oracle import depth_slope, papyrus

pytestmark = pytest.mark.usefixtures("own_environment")


@pytest.fixture
def weights(tmp_path):
    """The demo's weights as a file of the user's."""
    source = Path(inkdask.__file__).parent / "models" / "demo.safetensors"
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(source.read_bytes())
    assert known()["demo"].weights.endswith(source.name)
    return copy


@pytest.fixture
def segment(tmp_path):
    folder = write_segment(tmp_path / "seg", papyrus((26, 90, 100)))
    Image.fromarray(np.full((90, 100), 255, np.uint8)).save(folder / "seg_mask.png")
    return folder


def job_of(segment, weights):
    settings = Settings.of(model=str(weights))
    return Job.of(Plan.of(str(segment), settings), settings)


@pytest.mark.parametrize("what", ["layers", "mask", "weights"])
def test_changed_input_is_named(segment, weights, what):
    (weights.parent / "inkdask.toml").write_text('architecture = "ink_depth_cnn"\n')
    job = job_of(segment, weights)
    assert changed_input(job.recipe, job.origin) == ""
    job.create()
    job.check_unchanged()
    changed = {
        "layers": segment / "layers" / "03.tif", "mask": segment / "seg_mask.png",
        "weights": weights,
    }[what]  # fmt: skip
    if what == "weights":
        changed.write_bytes(changed.read_bytes() + b" ")
    else:
        os.utime(changed, ns=(0, 0))
    assert changed_input(job.recipe, job.origin).startswith(f"the {what} had another size, time")
    with pytest.raises(InkdaskError, match=f"changed while the job ran: the {what} had"):
        job.check_unchanged()
    with pytest.raises(InkdaskError, match="was started anew by another job"):
        job.check_unchanged()


def test_input_that_is_gone_is_not_compared(segment, weights, caplog):
    (weights.parent / "inkdask.toml").write_text('architecture = "ink_depth_cnn"\n')
    job = job_of(segment, weights)
    for layer in (segment / "layers").iterdir():
        layer.unlink()
    with caplog.at_level("INFO", "inkdask"):
        assert changed_input(job.recipe, job.origin) == ""
    assert "cannot be compared: No layers found" in caplog.text


def name_of_picture(model, weights):
    stem = output_stem("s3://bucket/seg/predictions", replace(ORIGIN, weights_from=weights), model)
    name = stem.removeprefix("s3://bucket/seg/predictions/prediction_").removesuffix("_00_03")
    assert len(f".prediction_{name}_00_03_preview.zarr.01234567.unfinished".encode()) <= 255
    return name


@pytest.mark.parametrize(
    ("model", "weights", "name"),
    [
        ("timesformer-scroll5", "scrollprize/timesformer_scroll5_27112024", "timesformer-scroll5"),
        ("demo", "package://inkdask.models/demo.safetensors", "demo"),
        ("owner/model", "owner/model", "owner_model"),
        ("owner/model/a/b.ckpt@v1", "owner/model", "owner_model_a_b.ckpt@v1"),
        ("depth_slope", None, "depth_slope"),
    ],
)
def test_picture_has_the_name_of_its_model(model, weights, name):
    assert name_of_picture(model, weights) == name


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("/data/runs/7/exp/last.ckpt", "exp_last"),
        ("/last.ckpt", "last"),
        ("s3://bucket/runs/m/a.safetensors", "m_a"),
        ("package://inkdask.models/demo.safetensors", "inkdask.models_demo"),
        ("/data/[old]/what? *.pt", "old__what"),
        (f"/{'a' * 200}/{'b' * 200}.pt", "b" * 128),
        (f"/data/{'ä' * 120}.pt", "ä" * 64),
    ],
)
def test_picture_has_the_last_parts_of_the_path_of_its_model(weights, name):
    got = name_of_picture(weights, weights)
    assert re.fullmatch(re.escape(name) + "-[0-9a-f]{8}", got)
    assert name_of_picture("last.ckpt", weights) == got  # as typed in another folder


def test_pictures_of_two_paths_have_two_names():
    paths = [
        "/a_b/c.pt",
        "/a/b_c.pt",
        "/x/a_b/c.pt",
        "/a_b/c.ckpt",
        "s3://a_b/c.pt",
        "s3://x/a_b/c.pt",
    ]
    paths += [f"/{letter * 150}/{'m' * 150}.pt" for letter in "xy"]
    assert len({name_of_picture(path, path) for path in paths}) == len(paths)


def test_long_name_of_a_function_or_repo_is_cut():
    names = {name_of_picture("f" * 300, None), name_of_picture("f" * 301, None)}
    names |= {name_of_picture(f"owner/model/{'d/' * 100}a{n}.pt", "owner/model") for n in "12"}
    assert len(names) == 4


@pytest.mark.parametrize(
    ("folder", "source", "name"),
    [
        (None, "/data/seg", "demo"),
        ("s3://bucket/seg/predictions", "s3://bucket/seg", "demo"),
        ("s3://bucket/results/seg/ink", "s3://bucket/seg", "demo"),
        ("s3://bucket/seg.zarr/ink", "s3://bucket/seg.zarr", "demo"),
        ("s3://bucket/segments", "s3://bucket/seg", "seg_demo"),
        ("s3://bucket", "s3://bucket/seg/layers", "seg_demo"),
        ("/out", "/data/20231210.tifs", "20231210_demo"),
    ],
)
def test_picture_in_a_shared_folder_has_the_name_of_its_segment(folder, source, name):
    origin = replace(
        ORIGIN, source=source, weights_from="package://inkdask.models/demo.safetensors"
    )
    stem = output_stem(folder, origin, "demo")
    assert stem == f"{folder or f'{source}/predictions'}/prediction_{name}_00_03"


def test_segments_with_one_output_folder_keep_their_pictures(tmp_path):
    options = {"model": depth_slope, "stride": 32, "output_path": tmp_path / "out"}
    one, two, moved = (tmp_path / place for place in ("one", "two", "away/one"))
    for seed, folder in enumerate((one, two, moved)):
        write_segment(folder, papyrus((3, 90, 100), seed=seed))
    first = inkdask.run(one, **options)
    kept = Path(first).read_bytes()
    assert inkdask.run(two, **options) != first
    for call in (inkdask.run, inkdask.check):
        with pytest.raises(InkdaskError, match=rf"picture of {one}, .* set OUTPUT_PATH to another"):
            call(moved, **options)
    assert Path(first).read_bytes() == kept
    assert inkdask.run(one, **options | {"stride": 64}) == first
    assert inkdask.reduce(one, **options | {"stride": 64}) == first


def test_job_with_long_names_and_glob_signs_makes_its_picture(tmp_path, weights):
    segment = write_segment(tmp_path / ("s" * 250), papyrus((26, 90, 100)))
    folder = tmp_path / ("r" * 120) / "[0-9] *"
    folder.mkdir(parents=True)
    model = weights.replace(folder / "m[x].safetensors")
    (folder / "inkdask.toml").write_text('model_type = "depth-cnn"\n')
    first, again = (inkdask.run(segment, model=model, progressive=True) for _ in range(2))
    assert first == again
    assert {path.name for path in (segment / "predictions").iterdir()} == {
        Path(first).name,
        Path(first).with_suffix(".zarr").name,
    }
    Path(first).unlink()
    assert inkdask.reduce(segment, model=model) == first


def test_reduce_with_precision_auto_finds_the_job_of_any_precision(segment):
    inkdask.run(segment, model="demo", num_parts=2, part_id=0)  # the demo is for float32
    inkdask.run(segment, model="demo", num_parts=2, part_id=1)
    assert inkdask.reduce(segment, model="demo", num_parts=2, precision="auto")
    with pytest.raises(InkdaskError, match="precision is float32 there and bfloat16 here"):
        inkdask.reduce(segment, model="demo", num_parts=2, precision="bfloat16")


def test_parts_without_work_say_so_and_succeed(segment, caplog):
    for number in range(5):
        caplog.clear()
        inkdask.run(segment, model=depth_slope, num_parts=5, part_id=number)
        assert [line for line in caplog.messages if "NUM_PARTS" in line] == [
            "4 of NUM_PARTS=5 parts have no work, because parts have whole chunks, and the number "
            "of chunks is 1; a smaller CHUNK_SIZE makes more."
        ]
    assert inkdask.reduce(segment, model=depth_slope, num_parts=5)
    caplog.clear()
    inkdask.run(segment, model=depth_slope, num_parts=1)
    assert not [line for line in caplog.messages if "NUM_PARTS" in line]


@pytest.mark.parametrize("text", ['{"variants": 3', "[]", "{}", "[" * 200_000 + "]" * 200_000])
def test_damaged_sweep_beside_the_picture_stops_no_job(segment, text):
    folder = segment / "predictions"
    folder.mkdir()
    (folder / "sweep.json").write_text(text)
    uri = inkdask.run(segment, model=depth_slope, stride=64)
    assert open_picture(uri.replace(".png", ".zarr")).provenance.sweeps == ()
