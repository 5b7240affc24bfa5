"""Test the benchmarks' own code: stages of the GPU suite that fail, and what machines can do.

Nothing heavy is imported here, because the stages below run in processes of their own.
"""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import imagecodecs
import numpy as np
import psutil
import pytest

from inkdask import storage
from tests.benchmarks import faults, gpu
from tests.benchmarks.__main__ import benchmarks
from tests.benchmarks._common import measure, reference_network, save_checkpoint, write_noise


def measures(given):
    given.tell("speed, tiles/s", 12.5, ">= 10")
    given.within("difference", np.array([0.25, -0.125]), 0, 0.5)


def differs(given):
    given.within("difference", np.array([0.1, np.nan]), 0, 0.5)


def breaks(given):
    given.tell("told before", 3)
    print("words of a library")
    raise RuntimeError("the network is gone")


def hangs(given):
    """Start a process that outlives its parent, as a worker does."""
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    given.tell("worker", worker.pid)
    time.sleep(300)


def crashes(given):
    os.kill(os.getpid(), signal.SIGSEGV)


def lacks(given):
    import a_package_that_nobody_has  # noqa: F401


def is_unfinished(given):
    import inkdask.a_module_that_nobody_wrote  # noqa: F401


def run_stages(monkeypatch, tmp_path, *functions, seconds=120):
    """Exit status of a dry run of these stages, and their results by name."""
    stages = tuple(gpu.Stage(function.__name__, 5, function) for function in functions)
    monkeypatch.setattr(gpu, "STAGES", stages)
    status = 0
    try:
        gpu.main(["--dry", "--seconds", str(seconds), "--out", str(tmp_path)])
    except SystemExit as ended:
        status = ended.code
    lines = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    results = {line["stage"]: line for line in lines}
    assert list(results) == [stage.name for stage in stages]
    return status, results


@pytest.mark.slow
def test_broken_stage_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    status, results = run_stages(monkeypatch, tmp_path, breaks, differs, crashes, measures)
    assert status == "failed: breaks, differs, crashes"
    broken = results["breaks"]
    assert (broken["said"], broken["why"]) == ("failed", "RuntimeError: the network is gone")
    assert "words of a library" in broken["tail"]
    assert broken["facts"] == {"told before": [3, ""]}
    assert results["differs"]["why"] == "ValueError: difference: nan is more than 0.5"
    assert results["differs"]["facts"] == {"difference": ["nan", ""]}
    assert results["crashes"]["why"].startswith("SIGSEGV")
    assert results["measures"]["said"] == "done"
    printed, said = capsys.readouterr()
    assert [json.loads(line) for line in said.splitlines()] == list(results.values())
    assert "### breaks\n\nFailed, " in printed
    assert "| told before | 3 |" in printed
    assert "| speed, tiles/s | 12.5 |" in printed


@pytest.mark.slow
def test_missing_package_is_no_failure_but_a_missing_module_is(monkeypatch, tmp_path):
    status, results = run_stages(monkeypatch, tmp_path, lacks, is_unfinished, measures)
    assert status == "failed: is_unfinished"
    assert results["lacks"]["said"] == "lacks a package"
    assert results["lacks"]["why"] == "There is no package a_package_that_nobody_has."
    assert "a_module_that_nobody_wrote" in results["is_unfinished"]["why"]


@pytest.mark.slow
def test_stage_over_its_limit_ends_with_its_processes(tmp_path):
    ended = gpu.run_stage(gpu.Stage("hangs", 5, hangs), gpu.Given(tmp_path, dry=True), 40)
    assert (ended.said, ended.why) == ("took too long", "stopped after 40 s")
    assert ended.is_failure
    worker, _ = ended.facts["worker"]
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie"


def test_stages_without_time_are_skipped(monkeypatch, tmp_path):
    status, results = run_stages(monkeypatch, tmp_path, measures, breaks, seconds=4)
    assert status == 0
    assert {(line["said"], line["why"]) for line in results.values()} == {
        ("skipped", "it needs 5 s, and 4 s are left")
    }


def test_goals_stand_beside_figures(capsys):
    facts = {"speed": (11000.0, ">= 11500"), "share": (0.96, ">= 0.95"), "later": ("nan", "<= 6")}
    job = {gpu.stages.SECOND: (9000.0, ""), gpu.stages.COMPILED: (7500.0, "")}
    results = [gpu.Ended("one", "done", facts={"GPU": ("H200", ""), **facts})]
    gpu.markdown([*results, gpu.Ended("job", "done", facts=job)], dry=False)
    printed = capsys.readouterr().out
    assert printed.startswith("H200, 20")
    assert "| speed | 11,000 | at least 11,500: **missed** |" in printed
    assert "| share | 0.96 | at least 0.95: met |" in printed
    assert "| later | nan | at most 6: **missed** |" in printed
    assert (
        "| second job, times the compiled reference network alone | 1.2 | at least 1.4: " in printed
    )
    assert "times the usual way" not in printed


def test_stages_fit_into_nine_minutes():
    names = [stage.name for stage in gpu.STAGES]
    assert len(set(names)) == len(names)
    assert sum(stage.seconds for stage in gpu.STAGES) <= 540


def test_a_benchmark_gets_its_own_options(monkeypatch, capsys):
    from tests.benchmarks import __main__ as suite

    commands = []
    monkeypatch.setattr(suite, "run", lambda command: commands.append(command) or ("", 0.0, 0))
    words = ["gpu", "--seconds", "540", "--only", "kernels", "job", "--out", "somewhere"]
    monkeypatch.setattr(sys, "argv", ["suite", *words])
    suite.main()
    assert commands == [["python", "-m", "tests.benchmarks.gpu", *words[1:]]]
    monkeypatch.setattr(sys, "argv", ["suite", "gpu", "model", "--seconds", "540"])
    with pytest.raises(SystemExit):
        suite.main()
    assert "can be for one benchmark only" in capsys.readouterr().err


def test_profile_finds_kernels_of_a_gpu():
    from torch.autograd import DeviceType

    from tests.benchmarks.profile_job import seconds_by_operation

    def event(key, device, seconds):
        return SimpleNamespace(
            key=key, device_type=DeviceType(device.value), self_device_time_total=1e6 * seconds,
            self_cpu_time_total=7e6,
        )  # fmt: skip

    events = [event("kernel", DeviceType.CUDA, 2), event("caller", DeviceType.CPU, 2)]
    assert events[0].device_type is not DeviceType.CUDA  # as the profiler's
    assert seconds_by_operation(events, on_gpu=True) == {"kernel": 2}
    assert seconds_by_operation(events, on_gpu=False) == {"kernel": 7, "caller": 7}


@pytest.mark.parametrize(("vnni", "amx"), [(True, False), (True, True), (False, False)])
def test_int8_is_measured_where_a_job_runs_in_it(monkeypatch, vnni, amx):
    import torch

    from inkdask.models import hardware
    from tests.benchmarks import comparison

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(hardware, "has_amx", lambda: amx)
    is_measured = "inkdask, int8" not in comparison.left_out(with_weights=True)
    assert is_measured == (vnni and not amx)


@pytest.mark.slow
def test_every_benchmark_can_be_imported():
    names = ", ".join(f"tests.benchmarks.{name}" for name in benchmarks())
    subprocess.run([sys.executable, "-c", f"import {names}"], check=True, timeout=100)


@pytest.mark.slow
def test_clocks_of_a_job_see_its_steps(tmp_path):
    """They are set on methods by name, so a method of another name would go unseen."""
    write_noise(tmp_path, 64, 64)
    save_checkpoint(reference_network(), tmp_path / "random.pt")
    said = measure("tests.benchmarks.profile_job", "--job", "stopwatch", tmp_path).said
    assert said["tiles"] == 1
    assert said["tiles_alone"] == said["batch"]
    steps = ("thread", "load", "begin", "gather", "run", "alone", "fill", "store", "picture")
    assert all(said["steps"][step] > 0 for step in steps)
    assert said["steps"]["gather"] < said["steps"]["run"] < said["steps"]["thread"]


@pytest.mark.slow
def test_clocks_of_a_large_job_see_its_steps(tmp_path):
    write_noise(tmp_path, 96, 96)
    said = measure("tests.benchmarks.large", "--stride", 32, "--job", tmp_path).said
    assert said["tiles"] == 4
    assert 0 < said["thread"] < said["fill"]
    assert said["picture"] > 0


@pytest.mark.slow
def test_few_faults_are_survived_and_counted():
    command = [sys.executable, "-m", "tests.benchmarks.faults", "--faults", "3", "--seed", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "| all | 3 |" in done.stdout
    assert "| pixels wrong | 0 |" in done.stdout
    assert "| left for good, hung or failed | 0 |" in done.stdout


def test_wrong_pixels_and_leftovers_are_noticed(s3, tmp_path, monkeypatch):
    storage.s3_filesystem().mkdir("scrolls")
    (tmp_path / "tmp" / "inkdask-0123").mkdir(parents=True)
    child = SimpleNamespace(pid=0)
    campaign = faults.Campaign(SimpleNamespace(disk=tmp_path, strangers=lambda: [child]), seed=0)
    job = faults.Job.of(0, 0, tmp_path)
    job.options.update(output_path=f"{faults.BUCKET}/out", result_file=f"{faults.BUCKET}/result")
    files = storage.s3_filesystem()
    files.call_s3("create_multipart_upload", Bucket="scrolls", Key="out/a.png")
    for name in ("out/prediction_a.zarr.01234567.unfinished/0", "out/a.partial", "out/a.png"):
        storage.write_bytes(f"{faults.BUCKET}/{name}", b"x")
    campaign.count_leftovers(job)
    counts = campaign.tally.counts
    for kind in ("temporary folder", "upload", "unfinished", "partial"):
        assert counts[f"left, {kind}"] == 1
    wrong = "\n".join(campaign.tally.wrong)
    assert len(campaign.tally.wrong) == 4  # the folder that a job sweeps is none of them
    assert all(what in wrong for what in ("process", "inkdask-0123", "out/a.png", "a.partial"))

    pixels = np.zeros((4, 5), np.uint8)
    storage.write_bytes(f"{faults.BUCKET}/out/a.png", imagecodecs.png_encode(pixels))
    storage.write_bytes(f"{faults.BUCKET}/result", f"{faults.BUCKET}/out/a.png".encode())
    campaign.compare(job, pixels, tmp_path / "log")
    assert counts["pixels wrong"] == 0
    pixels[1, 2] = 1
    campaign.compare(job, pixels, tmp_path / "log")
    assert counts["pixels wrong"] == 1
    assert len(campaign.tally.wrong) == 5
