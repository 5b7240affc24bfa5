"""The image: its Dockerfile, and the files of the installed package."""

import io
import os
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import inkdask
from inkdask import storage
from tests.files import random_volume, write_layers

ROOT = Path(__file__).parents[1]


def test_dockerfile_passes_hadolint():
    hadolint = Path(sys.executable).with_name("hadolint")
    lint = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")


def test_wheel_holds_the_cluster_manifest(tmp_path):
    build = ["-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        spec = files.read("inkdask/clusters/dask-cluster.yaml")
    assert spec == (ROOT / "cluster/base/dask-cluster.yaml").read_bytes()
    assert {name.partition("/")[0] for name in names} == {"inkdask", "inkdask-0.1.0.dist-info"}


def test_build_context_holds_only_what_is_copied():
    copied = [
        line.split()[1:-1]
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY") and "--from" not in line
    ]
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in lines if line.startswith("!")]
    assert sorted(name for names in copied for name in names) == sorted(let_in)
    assert all((ROOT / name).exists() for name in let_in)
    assert "*" in lines


APT = ["apt-get update", "apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev"]
CHECK = ["gcc -fsyntax-only /include/Python.h"]


@pytest.mark.parametrize(
    ("cuda", "complete", "expected"),
    [(True, True, CHECK), (True, False, CHECK + APT + CHECK), (False, False, [])],
)
def test_image_gets_what_triton_compiles_with(cuda, complete, expected, tmp_path):
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    [command] = [line[4:] for line in text.splitlines() if line.startswith("RUN") and "gcc" in line]
    ran, installed = tmp_path / "ran", tmp_path / "installed"
    ran.touch()
    if complete:
        installed.touch()
    programs = {
        "python3": f'case "$2" in *assert*) {str(cuda).lower()} ;; *) echo /include ;; esac',
        "gcc": f'echo "gcc $*" >> {ran}; test -e {installed}',
        "apt-get": f'echo "apt-get $*" >> {ran}; test "$1" = update || : > {installed}',
        "rm": "true",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run(["/bin/sh", "-c", command], env={"PATH": str(tmp_path)}, check=True)
    assert ran.read_text().splitlines() == expected


def test_constraints_hold_for_both_versions_of_cuda():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    allowed = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for extra, of_torch in (  # what torch 2.13 requires, by the CUDA that it is built for
        ("cuda", {"cuda-bindings": "13.0.3", "cuda-toolkit": "13.0.3"}),
        ("cuda12", {"cuda-bindings": "12.9.4", "cuda-toolkit": "12.6.3"}),
    ):
        for name, version in of_torch.items():
            assert version in allowed[name], (extra, name)
        for requirement in map(Requirement, extras[extra]):
            pin = allowed[requirement.name]
            [version] = [s.version for s in pin if s.operator == "=="] or [
                of_torch[requirement.name]
            ]
            assert version in requirement.specifier, (extra, requirement.name)


@pytest.fixture
def container(s3_endpoint):
    """Run the image that the environment names, with the given options and variables alone.

    ``INKDASK_RUN_IMAGE="docker run --rm --network host"`` and ``INKDASK_IMAGE=inkdask:cpu``.
    """
    if "INKDASK_RUN_IMAGE" not in os.environ:
        pytest.skip("INKDASK_RUN_IMAGE does not say how to run the image")
    engine = shlex.split(os.environ["INKDASK_RUN_IMAGE"])
    image = os.environ.get("INKDASK_IMAGE", "inkdask")

    def run(*options, words=(), **environment):
        given = [word for item in environment.items() for word in ("-e", "=".join(item))]
        command = [*engine, "--read-only", "--cap-drop", "ALL", *options, *given, image, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=280)

    return run


AWS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


@pytest.mark.slow
def test_container_makes_the_picture_from_its_environment(container, s3, tmp_path):
    write_layers(f"{s3}/seg/layers", random_volume((26, 200, 260)))
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    tmp.chmod(0o777)
    job = {"MODEL": "demo", "S3_PATH": f"{s3}/seg", "START_LAYER": "0", "END_LAYER": "26"}
    done = container("-v", f"{tmp}:/tmp", **job, **{name: os.environ[name] for name in AWS})
    assert done.returncode == 0, done.stderr
    uri = f"{s3}/seg/predictions/prediction_demo_00_26.png"
    result = tmp / "result_s3_url.txt"
    assert (done.stdout.strip(), result.read_text()) == (uri, uri)
    assert result.stat().st_uid == 10001
    plain = inkdask.run(
        f"{s3}/seg", model="demo", layers=(0, 26), output_path=str(tmp_path / "plain"),
        zarr_output_dir=str(tmp_path / "parts"), result_file=str(tmp_path / "result"),
    )  # fmt: skip
    pictures = (np.asarray(Image.open(io.BytesIO(storage.read_bytes(u)))) for u in (uri, plain))
    np.testing.assert_array_equal(*pictures)


@pytest.mark.slow
def test_container_reports_wrong_settings(container):
    for environment, sentence in (
        ({}, "inkdask: MODEL is not set: "),
        ({"MODEL": "demo", "S3_PATH": "s3://b/s", "START_LAYER": "ten"}, "inkdask: START_LAYER: "),
    ):
        ended = container(**environment)
        assert ended.returncode == 2
        assert ended.stderr.startswith(sentence)
        assert ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_container_has_no_rights_and_no_build_tools(container):
    code = (
        "import os, shutil; tools = ['g++', 'make', 'git']; "
        "print(os.getuid(), [t for t in tools if shutil.which(t)], os.access('/opt', os.W_OK))"
    )
    said = container("--entrypoint", "python", words=["-c", code])
    assert said.stdout.split() == ["10001", "[]", "False"], said.stderr
    for words in (["scheduler", "--help"], ["worker", "--help"], ["ink", "--help"]):
        assert container("--entrypoint", "dask", words=words).returncode == 0


@pytest.mark.slow
def test_container_of_any_user_keeps_kernels(container):
    code = (
        "import os; from pathlib import Path; names = 'TRITON', 'TORCHINDUCTOR', 'CUPY'; "
        "[Path(os.environ[name + '_CACHE_DIR'], 'x').mkdir(parents=True) for name in names]; "
        "print(*sorted(os.listdir('/tmp/cache')))"
    )
    options = ("--user", "12345:0", "-v", "/tmp/cache", "--entrypoint", "python")
    said = container(*options, words=["-c", code])
    assert said.stdout.split() == ["cupy", "inductor", "triton"], said.stderr
