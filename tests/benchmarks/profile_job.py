"""Where the time of the main job goes, and how near it comes to the network running alone.

    python -m tests.benchmarks.profile_job [--side PIXELS]

TimeSformer with random weights on uint16 TIFFs without empty tiles. The forward passes have a
thread of their own, so the job can be no faster than that thread; what other threads do meanwhile
costs nothing until it makes that thread wait. One process runs the job with a stopwatch at each
step and under Dask's profiler. Every few seconds its thread runs the network alone, on a batch that
lies ready, so that both meet the same noise of the machine; that time is not the job's. Another
process runs a small job under torch's profiler, which is slow.
"""

from __future__ import annotations

import argparse
import collections
import functools
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.benchmarks._common import (
    LAYERS,
    STRIDE,
    gpu_memory,
    measure,
    reference_network,
    save_checkpoint,
    scratch,
    side_for_device,
    size,
    table,
    tell,
    write_noise,
)

TURN = 5.0  # seconds of the job between two runs of the network alone
SMALL = 256  # side in pixels of the segment for torch's profiler


class Stopwatch:
    """Seconds in functions, by name, summed over all threads; one inside another counts in both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._lock = threading.Lock()

    def on(self, owner: Any, function: str, name: str, queues: bool = False) -> None:
        """Measure a function of a module or a method of a class from now on.

        Of one that ``queues`` work on a GPU, this is the time until all of it is done.
        """
        original, wait = getattr(owner, function), wait_for_gpu if queues else int

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            wait()
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                wait()
                self.add(name, time.perf_counter() - start)

        timed.__dask_tokenize__ = lambda: ("timed", name)  # type: ignore[attr-defined]
        setattr(owner, function, timed)

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self.seconds[name] += seconds


def wait_for_gpu() -> None:
    """Wait until the GPU has done all that it was given, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_job(folder: Path, precision: str, **options: Any) -> int:
    """Run the main job; returns the tiles that this process ran."""
    import inkdask
    from inkdask import storage

    before = storage.counters().tiles
    inkdask.run(
        folder, model=str(folder / "random.pt"), model_type="timesformer",
        zarr_output_dir=folder / "work", output_path=folder / "out", overwrite=True,
        result_file=folder / "result.txt", precision=precision,
        **{"layers": (0, LAYERS), **options},
    )  # fmt: skip
    return storage.counters().tiles - before


def job_with_stopwatch(folder: Path, precision: str) -> None:
    """Measure the steps of a job, its tasks, and the network alone."""
    from dask.diagnostics import Profiler
    from dask.utils import key_split

    from inkdask import (
        blending,
        filling,
        inference,
        predictor,
        reduction,
        storage,
        store,
        workflow,
    )
    from inkdask.models import forms
    from inkdask.reading import tiff

    watch = Stopwatch()
    watch.on(workflow, "settle", "settle")
    watch.on(filling, "check_weights", "weights")
    watch.on(workflow, "fill", "fill")
    watch.on(reduction, "write", "picture")
    watch.on(storage, "read_range", "read")
    watch.on(tiff.Layout, "decode", "decode")
    watch.on(inference, "tiles_with_data", "find empty tiles")
    watch.on(store.GridStore, "write", "store")
    watch.on(blending, "blend_chunk", "blend")
    watch.on(forms, "load", "load", queues=True)
    for function, name in {
        "_queue_next": "thread", "_begin": "begin", "_cut": "gather", "_run": "run"
    }.items():  # fmt: skip
        watch.on(predictor.Predictor, function, name, queues=True)
    tiles_alone = take_turns(predictor.Predictor, watch)

    start = time.perf_counter()
    with Profiler() as tasks:
        tiles = run_job(folder, precision)
    seconds = time.perf_counter() - start
    steps = dict(watch.seconds)
    by_task: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for task in tasks.results:
        entry = by_task[key_split(task.key)]
        entry[0] += 1
        entry[1] += task.end_time - task.start_time
    [network] = predictor._predictors.values()
    tell(
        seconds=seconds, tiles=tiles, steps=steps, tasks=by_task, gpu=gpu_memory(),
        device=str(network.device), precision=network.precision, batch=network.batch_size,
        tiles_alone=sum(tiles_alone),
    )  # fmt: skip


def take_turns(owner: Any, watch: Stopwatch) -> list[int]:
    """Run the network alone after some batches of a job; returns the list of tiles it runs."""
    import torch

    original, ran, latest = owner._run, [], -TURN

    def both(self: Any, pieces: Any, b: int) -> Any:
        nonlocal latest
        out = original(self, pieces, b)
        if time.perf_counter() < latest + TURN:
            return out
        block, at = pieces[-1]
        again = torch.arange(self.batch_size, device=at.device) % len(at)
        ready = self._cut.__wrapped__(self, block, at[again])
        way, _ = self._way(len(ready))
        wait_for_gpu()
        start = time.perf_counter()
        way(ready)
        wait_for_gpu()
        watch.add("alone", time.perf_counter() - start)
        ran.append(len(ready))
        latest = time.perf_counter()
        return out

    owner._run = both
    return ran


def job_with_torch(folder: Path, precision: str) -> None:
    """Run the job under torch's profiler, and tell the operations that take its time."""
    import torch
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    from inkdask import predictor

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    found: dict[str, float] = collections.defaultdict(float)
    original = predictor.Predictor._queue_batch

    everywhere = _ExperimentalConfig(profile_all_threads=True)  # else the one that starts it

    def profiled(*args: Any) -> Any:
        with profile(activities=activities, experimental_config=everywhere) as seen:
            out = original(*args)
        for name, seconds in seconds_by_operation(seen.key_averages(), on_gpu).items():
            found[name] += seconds
        return out

    predictor.Predictor._queue_batch = profiled
    tiles = run_job(folder, precision)
    tell(tiles=tiles, operations=found)


def seconds_by_operation(events: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Seconds of the operations that torch's profiler saw: kernels of a GPU, or calls."""
    import torch

    if not on_gpu:
        return {event.key: event.self_cpu_time_total / 1e6 for event in events}
    cuda = torch.autograd.DeviceType.CUDA
    # Equal and not identical, because the profiler makes a new object for each event.
    kernels = [event for event in events if event.device_type == cuda]
    return {event.key: event.self_device_time_total / 1e6 for event in kernels}


JOBS: dict[str, Callable[[Path, str], None]] = {
    "stopwatch": job_with_stopwatch,
    "torch": job_with_torch,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--side", type=int, default=side_for_device(400, 3008),
        help="of the segment, in pixels; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--precision", default="auto", help="as of a job")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        JOBS[given.job[0]](Path(given.job[1]), given.precision)
        return
    with scratch() as home:
        folder, small = Path(home), Path(home) / "small"
        for segment, side in (folder, given.side), (small, SMALL):
            write_noise(segment, side, side)
            save_checkpoint(reference_network(), segment / "random.pt")
        options = "--precision", given.precision, "--job"
        job = measure(__spec__.name, *options, "stopwatch", folder).said
        operations = measure(__spec__.name, *options, "torch", small).said["operations"]

    steps = collections.defaultdict(float, job["steps"])
    wall, tiles = job["seconds"] - steps["alone"], job["tiles"]
    alone = job["tiles_alone"] / steps["alone"]
    forward = steps["run"] - steps["gather"]
    clock = {
        "settle: headers, digest of the weights": steps["settle"],
        "load the weights": steps["weights"],
        "take the fast path, and check it on a few tiles": steps["load"],
        "take blocks that are on the device": steps["begin"] - steps["load"],
        "gather tiles": steps["gather"],
        "**forward**": forward,
        "the network's thread waits: first read, last store": steps["fill"]
        - steps["weights"]
        - steps["thread"],
        "picture: blend, zarr, PNG": steps["picture"],
    }
    clock["the rest"] = wall - sum(clock.values())
    gpu = f"; {size(job['gpu'])} of GPU memory" if job["gpu"] else ""
    print(
        f"{given.side} x {given.side} x {LAYERS}, {tiles} tiles at stride {STRIDE}; "
        f"{job['precision']} on {job['device']}, batch {job['batch']}{gpu}.\n\n"
        "The job by the clock:\n"
    )
    rows = [(name, f"{seconds:.2f} s", f"{seconds / wall:.1%}") for name, seconds in clock.items()]
    table(("step", "time", "of the job"), [*rows, ("all", f"{wall:.2f} s", "100.0%")])

    print("\nOn other threads meanwhile, summed over them:\n")
    others = ("read", "decode", "find empty tiles", "store", "blend")
    table(
        ("step", "time", "to the time of forward"),
        ((name, f"{steps[name]:.3f} s", f"{steps[name] / forward:.2%}") for name in others),
    )
    print("\nTasks, as Dask's profiler saw them (what waits for the network's thread included):\n")
    tasks = sorted(job["tasks"].items(), key=lambda task: -task[1][1])[:10]
    table(("task", "number", "time"), ((k, int(n), f"{s:.3f} s") for k, (n, s) in tasks))

    print(f"\nOperations of the network at {SMALL} x {SMALL}, as torch's profiler saw them:\n")
    total = sum(operations.values())
    largest = sorted(operations.items(), key=lambda operation: -operation[1])[:12]
    shares = [(f"`{name}`", f"{seconds / total:.1%}") for name, seconds in largest]
    rest = 1 - sum(seconds for _, seconds in largest) / total
    table(("operation", "share"), [*shares, ("others", f"{rest:.1%}")])

    stage = steps["fill"] - steps["weights"] - steps["load"] - steps["alone"]
    print(
        f"\nAgainst the network alone, {job['tiles_alone']} tiles in between, in batches that lie "
        "ready:\n"
    )
    speeds = {
        "network alone": alone,
        "forward in the job": tiles / forward,
        "from the first read to the last store, network loaded": tiles / stage,
        "the whole job, loading and picture included": tiles / wall,
    }
    table(
        ("", "tiles/s", "of the network alone"),
        ((name, f"{speed:.2f}", f"{speed / alone:.1%}") for name, speed in speeds.items()),
    )


if __name__ == "__main__":
    main()
