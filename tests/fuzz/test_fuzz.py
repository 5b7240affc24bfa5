"""A short run of the campaign, and some random jobs; `tests.fuzz` runs long ones."""

import subprocess
import sys

import pytest

from inkdask.errors import InkdaskError
from tests.fuzz import campaign, jobs, spoil


@pytest.mark.parametrize(
    "only", ["tiff", pytest.param("", marks=pytest.mark.slow, id="all targets")]
)
def test_spoiled_inputs_are_read_rightly_or_refused(only, tmp_path):
    count = 40 if only else 100
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", str(count), "--save", str(tmp_path)]
    command += ["--only", only] if only else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == [*([only] if only else campaign.TARGETS), "all"]
    assert all(int(row[1]) > 1 for row in rows)
    assert 0.2 < int(rows[-1][2]) / count < 0.8, "hardly anything was read, or refused"


@pytest.mark.parametrize("at", range(3))
def test_random_job_gives_the_naive_picture(at, tmp_path, own_environment):
    said = {}
    assert jobs.try_one(spoil.random(2026, at), tmp_path, said), said


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (InkdaskError("a.tif is damaged."), ""),
        (InkdaskError("a.tif is damaged"), "no short sentence"),
        (InkdaskError("Unable to allocate 3 GiB."), "too much memory"),
    ],
)
def test_refusal_is_judged(error, fault):
    assert campaign.faults(error) == fault


def test_failure_of_another_kind_is_kept(tmp_path):
    def read(rng, folder):
        raise KeyError("odd")

    outcome, fault = campaign.attempt(read, None, tmp_path)
    assert outcome == "failed"
    assert "KeyError" in fault
