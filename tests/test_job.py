"""What a job checks of its input: layers, mask and weights that have changed since."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inkdask
from inkdask.errors import InkdaskError
from inkdask.job import Job, changed_input
from inkdask.models.registry import known
from inkdask.plan import Plan
from inkdask.settings import Settings
from tests.files import write_segment
from tests.oracle import papyrus

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
