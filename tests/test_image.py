"""The image: its recipe, and the files that the installed package must bring."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_dockerfile_is_clean():
    hadolint = Path(sys.executable).with_name("hadolint")
    lint = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")


def test_an_installed_package_brings_the_cluster(tmp_path):
    build = ["-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        spec = files.read("inkdask/clusters/dask-cluster.yaml")
    assert spec == (ROOT / "cluster/base/dask-cluster.yaml").read_bytes()
    assert {name.partition("/")[0] for name in names} == {"inkdask", "inkdask-0.1.0.dist-info"}


def test_the_build_sees_what_it_copies_and_no_more():
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
