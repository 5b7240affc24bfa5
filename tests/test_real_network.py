"""The job with TimeSformer at its real size, against the reference network tile by tile."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from timesformer_pytorch import TimeSformer

import inkdask
from inkdask.models import hardware
from tests.marks import needs_vnni
from tests.oracle import naive_map, picture

FRAMES, START, HEIGHT, WIDTH = 26, 3, 80, 77  # 2 x 2 tiles


pytestmark = pytest.mark.xdist_group("real network")  # whose fixture takes long


@pytest.fixture(scope="module")
def reference():
    """A reference network with random weights whose probabilities are spread over (0, 1)."""
    torch.manual_seed(0)
    network = TimeSformer(
        dim=512, image_size=64, patch_size=16, num_frames=FRAMES, num_classes=16, channels=1,
        depth=8, heads=6, dim_head=64,
    ).eval()  # fmt: skip
    with torch.no_grad():
        network.to_out[1].weight.mul_(3)
    return network


@pytest.fixture(scope="module")
def job(reference, tmp_path_factory):
    """A segment of 32 layers, the checkpoint in Lightning's layout, and the naive picture."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "layers").mkdir()
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    volume = rng.integers(1, 256, (32, HEIGHT, WIDTH), dtype=np.uint8)
    volume[:, (y + x) < 40] = 0
    for number, layer in enumerate(volume):
        tifffile.imwrite(folder / "layers" / f"{number:02d}.tif", layer.astype(np.uint16) << 8)
    state = {f"model.backbone.{name}": value for name, value in reference.state_dict().items()}
    checkpoint = folder / "random.ckpt"
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"size": 64}}, checkpoint)

    def naive(tile):  # (1, 1, f, 64, 64)
        return reference(tile.transpose(1, 2)).reshape(1, 1, 4, 4)

    expected = naive_map(volume[START : START + FRAMES], naive)
    assert expected[expected > 0].std() > 0.05  # a picture, not a grey sheet
    return folder, checkpoint, expected


@pytest.mark.parametrize(
    ("precision", "worst"),
    [
        ("float32", 1),
        pytest.param("bfloat16", 3, marks=pytest.mark.slow),
        pytest.param("int8", 3, marks=needs_vnni),
    ],
)
def test_picture_of_the_real_network_is_the_naive_one(
    job, precision, worst, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(hardware, "has_amx", lambda: False)  # so that int8 does run
    folder, checkpoint, expected = job
    uri = inkdask.run(
        folder, model=str(checkpoint), model_type="timesformer", layers=(START, START + FRAMES),
        precision=precision, zarr_output_dir=str(tmp_path), output_path=str(tmp_path),
        result_file=tmp_path / "result.txt",
    )  # fmt: skip
    assert f"CPU, {precision}, plain, batches of" in capsys.readouterr().err
    got = np.asarray(Image.open(uri)).astype(int)
    assert np.abs(got - picture(expected)).max() <= worst


def test_float32_map_of_the_real_network_is_exact(job):
    folder, checkpoint, expected = job
    ink = inkdask.predict(
        folder, str(checkpoint), layers=(START, START + FRAMES), precision="float32"
    )
    assert np.abs(ink.map.compute() - expected).max() < 1e-4
