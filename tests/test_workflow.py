"""The whole job: layers in, picture out, in the ways users start it, and every error they meet."""

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
from inkdask import storage
from inkdask.demo import synthetic
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


def test_run_gives_the_naive_picture(segment, volume, tmp_path):
    uri = inkdask.run(segment, model=depth_slope, layers=(0, 6))
    assert uri == f"{segment}/predictions/prediction_depth_slope_00_06.png"
    got = np.asarray(Image.open(uri))
    expected = naive_map(volume, depth_slope)
    assert expected[expected > 0].std() > 0.05  # a picture, not a grey sheet
    assert_same_picture(got, picture(expected), share=1e-3)
    assert not got[(volume == 0).all(axis=0)].any()
    assert (tmp_path / "result.txt").read_text() == uri
    stored = zarr.open_group(uri.replace(".png", ".zarr"), mode="r")
    assert np.array_equal(stored["0"][:], got)
    assert stored.attrs["inkdask"]["recipe"]["layers"] == [0, 1, 2, 3, 4, 5]
    with Image.open(uri) as image:
        assert json.loads(image.text["inkdask"])["recipe"]["stride"] == 16


def test_predict_is_lazy_and_gives_the_same_map(segment, volume):
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
def test_predict_takes_arrays_and_paths(segment, volume, kind):
    source = {
        "numpy uint8": volume, "numpy uint16": volume.astype(np.uint16) << 8, "path": segment,
    }[kind]  # fmt: skip
    ink = inkdask.predict(source, depth_slope)
    np.testing.assert_allclose(ink.map.compute(), naive_map(volume, depth_slope), atol=5e-6)


def test_layers_that_do_not_start_at_zero(segment, volume):
    uri = inkdask.run(segment, model=depth_slope, layers="2:5")
    assert uri.endswith("prediction_depth_slope_02_05.png")
    assert_same_picture(
        np.asarray(Image.open(uri)), picture(naive_map(volume[2:5], depth_slope)), share=1e-3
    )


def test_reverse_and_crop(segment, volume):
    ink = inkdask.predict(segment, depth_slope, force_reverse=True, model_in_chans=4)
    expected = naive_map(volume[1:5][::-1], depth_slope)
    np.testing.assert_allclose(ink.map.compute(), expected, atol=5e-6)


@pytest.mark.parametrize("roi", [(0, 0, 301, 230), (70, 33, 180, 161), (290, 220, 301, 230)])
def test_a_region_is_the_crop_of_the_whole(segment, volume, roi):
    x0, y0, x1, y1 = roi
    expected = naive_map(volume, depth_slope)[y0:y1, x0:x1]
    ink = inkdask.predict(segment, depth_slope, roi_xyxy=roi)
    np.testing.assert_allclose(ink.map.compute(), expected, atol=5e-6)
    uri = inkdask.run(segment, model=depth_slope, roi_xyxy="{},{},{},{}".format(*roi))
    assert uri.endswith("_00_06_{}-{}-{}-{}.png".format(*roi))
    assert_same_picture(np.asarray(Image.open(uri)), picture(expected), share=1e-3)


def test_tiles_without_mask_are_skipped(segment, volume, tmp_path, capsys):
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


def test_pairs_of_layers_are_averaged(segment, volume):
    pairs = (volume[0::2].astype(int) + volume[1::2] + 1) // 2
    ink = inkdask.predict(segment, depth_slope, z_downsample_mean_factor=2)
    expected = naive_map(pairs.astype(np.uint8), depth_slope)
    np.testing.assert_allclose(ink.map.compute(), expected, atol=5e-6)


@pytest.mark.parametrize("depth_first", [True, False])
def test_layers_from_a_zarr_array(segment, volume, tmp_path, depth_first):
    array = volume if depth_first else volume.transpose(1, 2, 0)
    place = str(tmp_path / "volume.zarr")
    zarr.create_array(place, data=np.ascontiguousarray(array), zarr_format=2)
    settings = {"model": depth_slope, "layers": (2, 5)}
    uri = inkdask.run(segment, surface_volume_zarr=place, **settings)
    assert uri == f"{segment}/predictions/prediction_depth_slope_02_05.png"
    assert_same_picture(
        np.asarray(Image.open(uri)), picture(naive_map(volume[2:5], depth_slope)), share=1e-3
    )


def test_the_mask_of_a_segment_holds_for_its_zarr_too(segment):
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


def test_averaging_is_another_job(segment):
    pictures = [
        np.asarray(Image.open(inkdask.run(segment, model=depth_slope, z_downsample_mean_factor=z)))
        for z in (1, 2)
    ]
    assert not np.array_equal(*pictures)


def test_layers_that_are_cropped_away_are_not_read(segment):
    before = storage.counters()
    inkdask.predict(segment, depth_slope, model_in_chans=2).map.compute()
    read = (storage.counters() - before).bytes_read
    assert read < 0.4 * sum(path.stat().st_size for path in (segment / "layers").iterdir())


def test_a_setting_that_an_open_segment_cannot_heed_is_refused(segment, volume):
    for source in (volume, inkdask.open_segment(str(segment))):
        for option in ({"layers": (0, 3)}, {"mask_path": "mask.png"}):
            with pytest.raises(SettingsError, match=next(iter(option))):
                inkdask.predict(source, depth_slope, **option)


def test_chunks_do_not_change_the_picture(segment):
    pictures = [
        np.asarray(Image.open(inkdask.run(segment, model=depth_slope, chunk_size=size)))
        for size in (128, 256, 1000)
    ]
    for other in pictures[1:]:
        assert_same_picture(other, pictures[0])


def test_a_second_run_computes_nothing_and_another_window_needs_no_network(segment, capsys):
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


def test_a_changed_layer_is_another_job(segment, volume, capsys):
    inkdask.run(segment, model=depth_slope)
    write_segment(segment, 255 - volume, replace=True)
    changed = np.asarray(Image.open(inkdask.run(segment, model=depth_slope)))
    assert "resumed" not in capsys.readouterr().err
    assert_same_picture(changed, picture(naive_map(255 - volume, depth_slope)), share=1e-3)


def test_on_a_cluster_of_processes(segment, volume):
    from distributed import Client

    with Client(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None):
        uri = inkdask.run(segment, model=depth_slope)
    assert_same_picture(
        np.asarray(Image.open(uri)), picture(naive_map(volume, depth_slope)), share=1e-3
    )


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
def test_a_missing_variable_exits_2_and_is_named(segment, missing):
    variables = {
        "MODEL": "demo", "S3_PATH": str(segment), "START_LAYER": "0", "END_LAYER": "6",
    }  # fmt: skip
    del variables[missing]
    done = command("run", **variables)
    assert done.returncode == 2
    assert missing in done.stderr
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
def test_a_bad_layer_is_named(tmp_path, volume, how):
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
        ({"roi_xyxy": "0,0,302,230"}, "ROI_XYXY.*301 x 230"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, volume, options, says):
    folder = broken_segment(tmp_path, volume, "not at all")
    with pytest.raises(InkdaskError, match=says) as caught:
        inkdask.run(folder, **{"model": depth_slope, **options})
    assert "\n" not in str(caught.value)
    assert not (folder / "predictions").exists()


def test_an_unwritable_output_is_found_before_the_work(segment, tmp_path):
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
    assert set(calls) == {1}  # the one tile that a callable is tried on


def test_a_network_of_the_wrong_output_is_refused(segment):
    with pytest.raises(InkdaskError, match="shape"):
        inkdask.run(segment, model=lambda x: x)


def test_a_network_that_returns_nan_leaves_no_picture(segment):
    """Stored, NaN says that a tile has no data, which is black."""

    def ill(x):
        logits = depth_slope(x)
        logits[0, 0, 1, 2] = torch.nan  # of one place in one tile
        return logits

    with pytest.raises(InkdaskError, match=r"network of 'ill' returned NaN for 1 of \d+ tiles"):
        inkdask.run(segment, model=ill)
    assert not list(segment.rglob("*.png"))


def test_settings_are_checked_first():
    with pytest.raises(SettingsError, match="S3_PATH"):
        inkdask.run(model=depth_slope)


def test_the_container_on_s3(s3, tmp_path, monkeypatch):
    """Driven by its environment alone, against an S3 server in a process of its own."""
    scan, _ = synthetic.segment(height=150, width=260, seed=2)
    local = write_segment(tmp_path / "scan", (scan >> 8).astype(np.uint8))
    monkeypatch.setenv("ZARR_OUTPUT_DIR", f"{s3}/partitions")
    # In bfloat16 this network is near the bound at which float32 takes over, so that the tiles
    # that happen to come first would decide.
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
    for said in ("tiles", "tiles/s", "read", "requests", "memory"):
        assert said in done.stderr


class Payload:
    """What a malicious checkpoint does when it is unpickled carelessly."""

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
def test_a_bad_checkpoint_is_named_and_nothing_runs(tmp_path, how):
    folder = write_segment(tmp_path / "seg", papyrus((26, 70, 70)))
    checkpoint = bad_checkpoint(tmp_path, how)
    with pytest.raises(InkdaskError, match=checkpoint.name) as caught:
        inkdask.run(folder, model=str(checkpoint))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()
    assert not (folder / "predictions").exists()
    assert not (tmp_path / "result.txt").exists()


def test_the_uri_of_an_earlier_job_is_no_result(segment, tmp_path):
    """A script that reads the file alone would take the picture of another job."""
    inkdask.run(segment, model=depth_slope, roi_xyxy=(0, 0, 64, 64))
    assert (tmp_path / "result.txt").exists()
    with pytest.raises(InkdaskError, match=r"nowhere: it does not exist\.$"):
        inkdask.run(tmp_path / "nowhere", model=depth_slope)
    assert not (tmp_path / "result.txt").exists()
    for step in ({"part_id": 0}, {"part_id": 1}, {"step": "reduce"}, {"part_id": 1}):
        inkdask.run(segment, model=depth_slope, num_parts=2, **step)
    assert (tmp_path / "result.txt").exists()  # a part has no result, and takes none away
    folder = tmp_path / "folder"
    (folder / "precious").mkdir(parents=True)
    with pytest.raises(InkdaskError, match="is a folder"):
        inkdask.run(segment, model=depth_slope, result_file=folder)
    assert (folder / "precious").exists()


def test_a_prediction_has_a_short_name_for_people(segment):
    ink = inkdask.predict(segment, depth_slope)
    assert repr(ink) == f"<InkMap of {segment}: {HEIGHT} x {WIDTH}, model depth_slope>"


def test_an_array_without_voxels_is_one_sentence():
    with pytest.raises(
        InkdaskError, match=r"has voxels, but the array has the shape \(26, 0, 200\)"
    ):
        inkdask.predict(np.zeros((26, 0, 200), np.uint8), depth_slope)


def test_import_is_light():
    """Neither torch nor timm, nor anything that takes its time."""
    code = "import sys, inkdask, inkdask.dask_cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "timm", "numpy", "dask.array", "zarr", "cupy"} & set(loaded)


def test_a_job_needs_no_timm(tmp_path):
    """It would cost every worker a second, and a hundred megabytes with what it imports."""
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


def test_the_graph_carries_no_weights_and_no_secret(s3):
    for number in range(26):
        file = io.BytesIO()
        tifffile.imwrite(file, np.ones((70, 70), np.uint8))
        storage.write_bytes(f"{s3}/seg/layers/{number:02d}.tif", file.getvalue())
    ink = inkdask.predict(f"{s3}/seg", "demo", hf_token="hf_very_secret")
    pickled = cloudpickle.dumps(ink.map.__dask_graph__())
    assert b"seg/layers/25.tif" in pickled
    assert b"testing" not in pickled  # neither the key nor its secret
    assert b"hf_very_secret" not in pickled
    assert len(pickled) < 100_000  # the bundled weights alone are 300 kB


def test_workers_can_unpickle_the_graph_without_torch(tmp_path):
    folder = write_segment(tmp_path / "seg", papyrus((26, 70, 70)))
    ink = inkdask.predict(folder, "demo")
    (tmp_path / "graph").write_bytes(cloudpickle.dumps(ink.map.__dask_graph__()))
    code = (
        "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')); "
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "graph")], check=True)
