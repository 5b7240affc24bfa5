"""Test whole jobs, from layers to picture, and the errors that users meet."""

import io
import json
import os
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image

import inkdask
from inkdask import cli, storage
from inkdask.demo import synthetic
from inkdask.environment import environment_kept
from inkdask.errors import InkdaskError, SettingsError
from tests.files import read_picture, write_segment
from tests.oracle import assert_same_picture, depth_slope, naive_map, papyrus, picture

pytestmark = pytest.mark.usefixtures("own_environment")

LAYERS, HEIGHT, WIDTH = 6, 230, 301


@pytest.fixture
def volume():
    return papyrus((LAYERS, HEIGHT, WIDTH))


@pytest.fixture
def segment(tmp_path, volume):
    return write_segment(tmp_path / "seg", volume)


def test_run_writes_the_naive_picture(segment, volume, tmp_path):
    uri = inkdask.run(segment, model=depth_slope, layers=(0, 6))
    assert uri == f"{segment}/predictions/prediction_depth_slope_00_06.png"
    got = np.asarray(Image.open(uri))
    expected = naive_map(volume, depth_slope)
    assert expected[expected > 0].std() > 0.05  # because a grey sheet would prove nothing
    assert_same_picture(got, picture(expected), share=1e-3)
    assert not got[(volume == 0).all(axis=0)].any()
    assert (tmp_path / "result.txt").read_text() == uri
    stored = zarr.open_group(uri.replace(".png", ".zarr"), mode="r")
    assert np.array_equal(stored["0"][:], got)
    assert stored.attrs["inkdask"]["recipe"]["layers"] == [0, 1, 2, 3, 4, 5]
    with Image.open(uri) as image:
        assert json.loads(image.text["inkdask"])["recipe"]["stride"] == 16


def test_predict_returns_the_naive_map(segment, volume):
    seg = inkdask.open_segment(str(segment), layers=(0, 6))
    ink = inkdask.predict(seg, model=depth_slope, tile=64, stride=16)
    assert ink.map.shape == (HEIGHT, WIDTH)
    assert ink.map.dtype == np.float32
    assert ink.grid.shape == (*ink.tiling.grid_shape, 4, 4)
    expected = naive_map(volume, depth_slope)
    np.testing.assert_allclose(ink.map.compute(), expected, atol=5e-6)
    window = ink.map[100:140, 200:260].compute()
    np.testing.assert_allclose(window, expected[100:140, 200:260], atol=5e-6)


@pytest.mark.parametrize("kind", ["numpy uint8", "numpy uint16", "path"])
def test_predict_accepts_arrays_and_paths(segment, volume, kind):
    source = {
        "numpy uint8": volume, "numpy uint16": volume.astype(np.uint16) << 8, "path": segment,
    }[kind]  # fmt: skip
    ink = inkdask.predict(source, depth_slope)
    np.testing.assert_allclose(ink.map.compute(), naive_map(volume, depth_slope), atol=5e-6)


def test_run_reads_a_range_of_layers_above_zero(segment, volume):
    uri = inkdask.run(segment, model=depth_slope, layers="2:5")
    assert uri.endswith("prediction_depth_slope_02_05.png")
    assert_same_picture(
        np.asarray(Image.open(uri)), picture(naive_map(volume[2:5], depth_slope)), share=1e-3
    )


def test_predict_reverses_and_crops_layers(segment, volume):
    ink = inkdask.predict(segment, depth_slope, force_reverse=True, model_in_chans=4)
    expected = naive_map(volume[1:5][::-1], depth_slope)
    np.testing.assert_allclose(ink.map.compute(), expected, atol=5e-6)


@pytest.mark.parametrize("roi", [(0, 0, 301, 230), (70, 33, 180, 161), (290, 220, 301, 230)])
def test_region_equals_the_crop_of_the_whole_map(segment, volume, roi):
    x0, y0, x1, y1 = roi
    expected = naive_map(volume, depth_slope)[y0:y1, x0:x1]
    ink = inkdask.predict(segment, depth_slope, roi_xyxy=roi)
    np.testing.assert_allclose(ink.map.compute(), expected, atol=5e-6)
    uri = inkdask.run(segment, model=depth_slope, roi_xyxy="{},{},{},{}".format(*roi))
    assert uri.endswith("_00_06_{}-{}-{}-{}.png".format(*roi))
    assert_same_picture(np.asarray(Image.open(uri)), picture(expected), share=1e-3)


def test_tiles_outside_the_mask_are_skipped(segment, volume, tmp_path, capsys):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[40:120, 150:240] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    got = np.asarray(
        Image.open(inkdask.run(segment, model=depth_slope, mask_path=str(tmp_path / "mask.png")))
    )
    whole = np.asarray(Image.open(inkdask.run(segment, model=depth_slope)))
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[40:120, 150:240] = True
    assert_same_picture(got, np.where(inside, whole, 0), share=1e-3)
    ran = [int(line.split()[1]) for line in capsys.readouterr().err.splitlines() if " run," in line]
    assert ran[0] < ran[1]


def test_predict_averages_pairs_of_layers(segment, volume):
    pairs = (volume[0::2].astype(int) + volume[1::2] + 1) // 2
    ink = inkdask.predict(segment, depth_slope, z_downsample_mean_factor=2)
    expected = naive_map(pairs.astype(np.uint8), depth_slope)
    np.testing.assert_allclose(ink.map.compute(), expected, atol=5e-6)


@pytest.mark.parametrize("depth_first", [True, False])
def test_run_reads_layers_from_a_zarr_array(segment, volume, tmp_path, depth_first):
    array = volume if depth_first else volume.transpose(1, 2, 0)
    place = str(tmp_path / "volume.zarr")
    zarr.create_array(place, data=np.ascontiguousarray(array), zarr_format=2)
    settings = {"model": depth_slope, "layers": (2, 5)}
    uri = inkdask.run(segment, surface_volume_zarr=place, **settings)
    assert uri == f"{segment}/predictions/prediction_depth_slope_02_05.png"
    assert_same_picture(
        np.asarray(Image.open(uri)), picture(naive_map(volume[2:5], depth_slope)), share=1e-3
    )


def test_mask_of_segment_applies_to_its_prepared_array(segment):
    mask = np.zeros((HEIGHT, WIDTH), np.uint16)
    mask[:, :100] = 1
    Image.fromarray(mask).save(segment / "seg_mask.png")
    place = inkdask.prepare(segment)
    pictures = [
        np.asarray(Image.open(inkdask.run(segment, model=depth_slope, **options)))
        for options in ({}, {"surface_volume_zarr": place})
    ]
    assert np.array_equal(*pictures)
    assert pictures[0][:, :100].any()
    assert not pictures[0][:, 100:].any()


def test_averaged_layers_give_another_picture(segment):
    pictures = [
        np.asarray(Image.open(inkdask.run(segment, model=depth_slope, z_downsample_mean_factor=z)))
        for z in (1, 2)
    ]
    assert not np.array_equal(*pictures)


def test_cropped_layers_are_not_read(segment):
    before = storage.counters()
    inkdask.predict(segment, depth_slope, model_in_chans=2).map.compute()
    read = (storage.counters() - before).bytes_read
    assert read < 0.4 * sum(path.stat().st_size for path in (segment / "layers").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["threads", "local"])
def test_environment_is_afterwards_as_it_was(segment, monkeypatch, cluster):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    settings = {"model": depth_slope, "hf_token": "hf_job", "cluster": cluster, "max_workers": 1}
    before = dict(os.environ)
    for function in (inkdask.run, inkdask.check, inkdask.predict, inkdask.reduce, inkdask.sweep):
        function(segment, **settings)
        assert os.environ == before
    inkdask.evidence(next((segment / "predictions").glob("*.zarr")), **settings)
    assert os.environ == before
    with pytest.raises(InkdaskError):
        inkdask.run(segment, **settings | {"layers": (0, 99)})
    assert os.environ == before


def test_jobs_side_by_side_leave_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_own")
    first, second = environment_kept(), environment_kept()
    first.__enter__()
    os.environ["HF_TOKEN"] = "hf_first"
    second.__enter__()
    os.environ["HF_TOKEN"] = "hf_second"
    first.__exit__(None, None, None)
    assert os.environ["HF_TOKEN"] == "hf_second"
    second.__exit__(None, None, None)
    assert os.environ["HF_TOKEN"] == "hf_own"


def test_predict_refuses_settings_of_reading_for_open_segment(segment, volume):
    for source in (volume, inkdask.open_segment(str(segment))):
        for option in ({"layers": (0, 3)}, {"mask_path": "mask.png"}):
            with pytest.raises(SettingsError, match=next(iter(option))):
                inkdask.predict(source, depth_slope, **option)


def test_picture_does_not_depend_on_chunk_size(segment):
    pictures = [
        np.asarray(Image.open(inkdask.run(segment, model=depth_slope, chunk_size=size)))
        for size in (128, 192, 1000)
    ]
    for other in pictures[1:]:
        assert_same_picture(other, pictures[0])


def test_second_run_computes_nothing_even_with_another_window(segment, capsys):
    first = np.asarray(Image.open(inkdask.run(segment, model=depth_slope)))
    assert "resumed" not in capsys.readouterr().err
    again = np.asarray(Image.open(inkdask.run(segment, model=depth_slope)))
    assert "0 run, 0 skipped as empty, 192 resumed" in capsys.readouterr().err
    assert np.array_equal(first, again)
    gaussian = np.asarray(
        Image.open(inkdask.run(segment, model=depth_slope, blend_mode="gaussian"))
    )
    assert "0 run, 0 skipped as empty, 192 resumed" in capsys.readouterr().err
    assert not np.array_equal(first, gaussian)


def test_changed_layer_starts_another_job(segment, volume, capsys):
    inkdask.run(segment, model=depth_slope)
    write_segment(segment, 255 - volume, replace=True)
    changed = np.asarray(Image.open(inkdask.run(segment, model=depth_slope)))
    assert "resumed" not in capsys.readouterr().err
    assert_same_picture(changed, picture(naive_map(255 - volume, depth_slope)), share=1e-3)


def command(*arguments, **environment):
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "inkdask", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("missing", ["MODEL", "S3_PATH", "START_LAYER", "END_LAYER"])
def test_command_without_a_variable_exits_2_and_names_it(segment, missing, monkeypatch, capsys):
    variables = {
        "MODEL": "demo", "S3_PATH": str(segment), "START_LAYER": "0", "END_LAYER": "6",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, "" if name == missing else value)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert missing in said
    assert len(said.strip().splitlines()) == 1


def test_process_without_variables_exits_2_without_traceback():
    done = command("run")
    assert done.returncode == 2
    assert "MODEL" in done.stderr or "S3_PATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def broken_segment(tmp_path, volume, how):
    folder = write_segment(tmp_path / "broken", volume)
    layer = folder / "layers" / "03.tif"
    if how == "gap":
        layer.unlink()
    elif how == "truncated":
        layer.write_bytes(layer.read_bytes()[:-5000])
    elif how == "size":
        tifffile.imwrite(layer, np.ones((HEIGHT, WIDTH - 1), np.uint16))
    elif how == "type":
        tifffile.imwrite(layer, np.ones((HEIGHT, WIDTH), np.float32))
    elif how == "not a TIFF":
        layer.write_text("hello")
    elif how == "duplicate":
        (folder / "layers" / "003.tif").write_bytes(layer.read_bytes())
    return folder


@pytest.mark.parametrize("how", ["gap", "truncated", "size", "type", "not a TIFF", "duplicate"])
def test_run_names_bad_layer(tmp_path, volume, how):
    folder = broken_segment(tmp_path, volume, how)
    with pytest.raises(InkdaskError, match=r"layers/0?03\.tif|Layers? 03") as caught:
        inkdask.run(folder, model=depth_slope, layers=(0, 6))
    assert "\n" not in str(caught.value)
    assert not (folder / "predictions").exists()
    assert not (tmp_path / "result.txt").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": (10, 16)}, "No layers found.*broken.*10"),
        ({"layers": (4, 4)}, "START_LAYER"),
        ({"layers": (5, 4)}, "START_LAYER"),
        ({"model": "demo", "layers": (0, 6)}, "Channel mismatch.*6.*26"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"stride": 65}, "STRIDE"),
        ({"roi_xyxy": "301,0,310,230"}, "ROI_XYXY.*301 x 230"),
    ],
)
def test_run_reports_bad_settings(tmp_path, volume, options, says):
    folder = broken_segment(tmp_path, volume, "not at all")
    with pytest.raises(InkdaskError, match=says) as caught:
        inkdask.run(folder, **{"model": depth_slope, **options})
    assert "\n" not in str(caught.value)
    assert not (folder / "predictions").exists()


def test_run_refuses_unwritable_output_before_the_work(segment, tmp_path):
    (tmp_path / "file").write_text("")
    calls = []

    def counted(x):
        calls.append(len(x))
        return depth_slope(x)

    for setting in ("output_path", "zarr_output_dir", "result_file"):
        with pytest.raises(InkdaskError, match="file"):
            inkdask.run(segment, model=counted, **{setting: tmp_path / "file" / "x"})
    with pytest.raises(InkdaskError, match="folder"):
        inkdask.run(segment, model=counted, result_file=tmp_path)
    assert set(calls) == {1}  # inkdask tries a callable on one tile


def test_run_refuses_network_with_wrong_output_shape(segment):
    with pytest.raises(InkdaskError, match="shape"):
        inkdask.run(segment, model=lambda x: x)


def test_network_that_returns_nan_leaves_no_picture(segment):
    """NaN would be stored as a tile without data, which is black."""

    def ill(x):
        logits = depth_slope(x)
        logits[0, 0, 1, 2] = torch.nan  # one value of one tile
        return logits

    with pytest.raises(InkdaskError, match=r"network of 'ill' returned NaN for 1 of \d+ tiles"):
        inkdask.run(segment, model=ill)
    assert not list(segment.rglob("*.png"))


def test_run_without_segment_names_the_setting():
    with pytest.raises(SettingsError, match="S3_PATH"):
        inkdask.run(model=depth_slope)


@pytest.mark.slow
def test_command_with_environment_alone_runs_on_s3(s3, tmp_path, monkeypatch):
    """Run the command as a container does."""
    scan, _ = synthetic.segment(height=100, width=150, seed=2)
    local = write_segment(tmp_path / "scan", (scan >> 8).astype(np.uint8))
    monkeypatch.setenv("ZARR_OUTPUT_DIR", f"{s3}/partitions")
    # Set the precision, because bfloat16 is near its error bound for this network: the first
    # tiles would decide whether float32 takes over.
    monkeypatch.setenv("PRECISION", "float32")
    for path in sorted((local / "layers").iterdir()):
        storage.put_file(path, f"{s3}/scroll/segment/layers/{path.name}")
    done = command(
        "run", MODEL="demo", S3_PATH=f"{s3}/scroll/segment", START_LAYER="0", END_LAYER="26"
    )
    assert done.returncode == 0, done.stderr
    uri = f"{s3}/scroll/segment/predictions/prediction_demo_00_26.png"
    assert done.stdout.strip() == uri
    assert (tmp_path / "result.txt").read_text() == uri
    got = read_picture(uri)
    with Image.open(inkdask.run(local, model="demo")) as image:
        assert_same_picture(got, np.asarray(image))
    stored = zarr.open_group(
        storage.zarr_store(uri.replace(".png", ".zarr"), read_only=True), mode="r"
    )
    assert np.array_equal(stored["0"][:], got)
    left = {entry.name for entry in storage.list_folder(f"{s3}/scroll/segment/predictions")}
    assert left == {"prediction_demo_00_26.png", "prediction_demo_00_26.zarr"}
    assert "testing-secret" not in done.stderr + json.dumps(dict(stored.attrs))
    for said in ("tiles", "CPU, float32, plain, batches of", "tiles/s", "read", "memory"):
        assert said in done.stderr


class Payload:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def bad_checkpoint(folder, how):
    path = folder / f"{how.replace(' ', '-')}.ckpt"
    if how == "text":
        path.write_text("these are not weights")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "malicious":
        torch.save({"state_dict": {}, "callbacks": Payload(folder / "owned")}, path)
    elif how == "another network":
        torch.save({"state_dict": {"conv.weight": torch.zeros(3, 3)}}, path)
    elif how == "cut off":
        torch.save({"state_dict": {"conv.weight": torch.zeros(300, 300)}}, path)
        path.write_bytes(path.read_bytes()[:100_000])
    return path


@pytest.mark.parametrize(
    "how", ["text", "empty", "malicious", "another network", "cut off", "absent"]
)
def test_run_names_bad_checkpoint_and_runs_nothing(tmp_path, how):
    folder = write_segment(tmp_path / "seg", papyrus((26, 70, 70)))
    checkpoint = bad_checkpoint(tmp_path, how)
    with pytest.raises(InkdaskError, match=checkpoint.name) as caught:
        inkdask.run(folder, model=str(checkpoint))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()
    assert not (folder / "predictions").exists()
    assert not (tmp_path / "result.txt").exists()


def test_failed_job_removes_the_result_of_an_earlier_one(segment, tmp_path):
    """A script that reads only the result file would take the picture of another job."""
    inkdask.run(segment, model=depth_slope, roi_xyxy=(0, 0, 64, 64))
    assert (tmp_path / "result.txt").exists()
    with pytest.raises(InkdaskError, match=r"nowhere: it does not exist\.$"):
        inkdask.run(tmp_path / "nowhere", model=depth_slope)
    assert not (tmp_path / "result.txt").exists()
    for step in ({"part_id": 0}, {"part_id": 1}, {"step": "reduce"}, {"part_id": 1}):
        inkdask.run(segment, model=depth_slope, num_parts=2, **step)
    assert (tmp_path / "result.txt").exists()  # a part writes and removes no result
    folder = tmp_path / "folder"
    (folder / "precious").mkdir(parents=True)
    with pytest.raises(InkdaskError, match="is a folder"):
        inkdask.run(segment, model=depth_slope, result_file=folder)
    assert (folder / "precious").exists()


def test_repr_of_prediction_names_segment_size_and_model(segment):
    ink = inkdask.predict(segment, depth_slope)
    assert (
        repr(ink) == f"<InkMap of {segment}: {WIDTH} x {HEIGHT} pixels (x, y), model depth_slope>"
    )


def test_predict_refuses_array_without_voxels():
    with pytest.raises(
        InkdaskError, match=r"has voxels, but the array has the shape \(26, 0, 200\)"
    ):
        inkdask.predict(np.zeros((26, 0, 200), np.uint8), depth_slope)


def test_import_loads_no_heavy_module():
    code = "import sys, inkdask, inkdask.dask_cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "timm", "numpy", "dask.array", "zarr", "cupy"} & set(loaded)


@pytest.mark.slow
def test_job_with_bundled_model_loads_no_timm(tmp_path):
    """timm and its imports cost every worker a second and a hundred megabytes."""
    write_segment(tmp_path / "seg", papyrus((26, 70, 70)))
    code = (
        "import sys, inkdask; inkdask.predict(sys.argv[1], 'demo', compile=False).map.compute(); "
        "print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "seg")],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert "inkdask.models.depth_cnn" in loaded
    assert not {"timm", "torchvision", "torch._dynamo"} & set(loaded)


def test_graph_contains_no_weights_and_no_secret(s3):
    for number in range(26):
        file = io.BytesIO()
        tifffile.imwrite(file, np.ones((70, 70), np.uint8))
        storage.write_bytes(f"{s3}/seg/layers/{number:02d}.tif", file.getvalue())
    ink = inkdask.predict(f"{s3}/seg", "demo", hf_token="hf_very_secret")
    pickled = cloudpickle.dumps(ink.map.__dask_graph__())
    assert b"seg/layers/25.tif" in pickled
    assert b"testing" not in pickled  # the key and its secret start with it
    assert b"hf_very_secret" not in pickled
    assert len(pickled) < 100_000  # the bundled weights alone are 300 kB


def test_graph_unpickles_without_torch(tmp_path):
    folder = write_segment(tmp_path / "seg", papyrus((26, 70, 70)))
    ink = inkdask.predict(folder, "demo")
    (tmp_path / "graph").write_bytes(cloudpickle.dumps(ink.map.__dask_graph__()))
    code = (
        "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')); "
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "graph")], check=True)
