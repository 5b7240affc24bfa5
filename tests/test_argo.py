"""The Argo templates, run step by step, make the picture of a plain run."""

import os
from itertools import count

import numpy as np
import pytest

import inkdask
from tests.argo import FailedError, Runner
from tests.files import random_volume, read_picture, write_layers
from tests.manifests import CLUSTER, only, render

pytestmark = pytest.mark.xdist_group("argo")  # whose fixture takes long


@pytest.fixture(scope="module")
def templates():
    return render(CLUSTER)


@pytest.fixture
def segment(s3):
    write_layers(f"{s3}/seg/layers", random_volume((26, 200, 260)), first=3)
    return f"{s3}/seg"


@pytest.fixture
def submit(templates, s3, tmp_path):
    """Run a template with parameters; returns the runner, after its ``run()``."""
    settings = dict(only(templates, "ConfigMap")["data"])
    settings.update(ZARR_OUTPUT_DIR=f"{s3}/partitions", CHUNK_SIZE="128")  # makes two chunks
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    configured = {("configMapRef", "inkdask"): settings, ("secretRef", "inkdask"): keys}
    folders = (tmp_path / str(number) for number in count())

    def run(name, **parameters):
        template = only(templates, "WorkflowTemplate", name)
        given = {key.replace("_", "-"): value for key, value in parameters.items()}
        runner = Runner(template, {"model": "demo", **given}, configured, next(folders))
        try:
            runner.outputs = runner.run()
        except FailedError as failure:
            runner.failure = str(failure)
        return runner

    return run


@pytest.mark.slow
def test_workflows_make_the_picture_of_a_plain_run(segment, s3, submit, tmp_path):
    job = {"s3_path": segment, "start_layer": "3", "end_layer": "29", "stride": "64"}
    write_layers(tmp_path / "seg" / "layers", random_volume((26, 200, 260)), first=3)
    plain = inkdask.run(
        tmp_path / "seg", model="demo", layers=(3, 29), stride=64,
        zarr_output_dir=str(tmp_path / "plain"), result_file=str(tmp_path / "result"),
    )  # fmt: skip
    whole = submit("inkdask", **job)
    assert [name for name, _ in whole.ran] == ["check", "infer"]
    uri = f"{segment}/predictions/prediction_demo_03_29.png"
    assert whole.outputs == {"result-s3-url": uri}
    np.testing.assert_array_equal(read_picture(uri), read_picture(plain))

    parts = submit("inkdask-parts", **job, parts="2", output_path=f"{s3}/parts")
    assert [name for name, _ in parts.ran] == ["check", "prepare", *["infer"] * 2, "reduce"]
    assert parts.outputs == {"result-s3-url": f"{s3}/parts/prediction_seg_demo_03_29.png"}
    np.testing.assert_array_equal(read_picture(parts.outputs["result-s3-url"]), read_picture(plain))


def test_workflows_end_in_their_first_step_for_a_mistake(segment, submit):
    job = {"s3_path": segment, "start_layer": "3", "end_layer": "29"}
    for wrong, code in (
        ({"start_layer": "three"}, 2),
        ({"model": "no-such-model"}, 1),
        ({"end_layer": "28"}, 1),
        ({"s3_path": "s3://no-such-bucket/seg"}, 1),
    ):
        for name in ("inkdask", "inkdask-parts"):
            runner = submit(name, **{**job, **wrong})
            assert runner.ran == [("check", code)], (name, wrong)
            assert runner.failure == f"check exited {code}"
