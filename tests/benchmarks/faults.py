"""Random jobs under faults: pictures are compared with undisturbed ones, leftovers are counted.

    python -m tests.benchmarks.faults [--hours HOURS] [--faults COUNT] [--seed SEED]

Each job runs on a Dask cluster of three workers, with its data on an S3 server behind a proxy, or
on a disk of 16 MiB. It meets several faults, some of which end it: the same command then resumes.
The seed gives jobs, faults and their order; how far a job has come when a fault strikes depends on
the machine. A fault that comes after the end of the job does not count.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from inkdask import storage
from inkdask.storage import outputs
from inkdask.storage import scratch as storage_scratch
from tests.benchmarks._common import scratch, table
from tests.benchmarks._rig import WORKERS, Rig
from tests.oracle import papyrus

SECONDS = 0.2  # for each fault, that the network of a job takes on all workers
LONGEST = 600  # seconds for a client, before it is said to hang
STRIKES = 5  # seconds for a fault of S3 to meet a request
FAULTS_A_JOB = 3, 40
BUCKET = "s3://scrolls"
ENDINGS = re.compile(r"\.(part|partial|unfinished|test)(/|$)")  # of files that are not whole


@dataclass
class Tally:
    """What happened, over all jobs."""

    faults: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def complain(self, job: int, what: str, log: Path | None = None) -> None:
        """Note what must not happen, with the end of the job's log."""
        said = f"\n{log.read_text()[-6000:]}" if log and log.exists() else ""
        print(f"job {job}: {what}{said}", file=sys.stderr, flush=True)
        self.wrong.append(f"job {job}: {what}")


@dataclass(frozen=True)
class Job:
    """A random job: its layers and its options, and the faults that it is to meet."""

    number: int
    rng: random.Random
    options: dict[str, Any]
    kind: str
    volume: np.ndarray

    @classmethod
    def of(cls, seed: int, number: int, disk: Path) -> Job:
        """Make the job of a number."""
        rng = random.Random(f"{seed} {number}")
        shape = rng.randint(3, 5), rng.randint(200, 420), rng.randint(260, 700)
        homes = [rng.choice((BUCKET, str(disk / "data"))) for _ in range(3)]
        options: dict[str, Any] = {
            "s3_path": f"{homes[0]}/segment",
            "zarr_output_dir": f"{homes[1]}/partitions",
            "output_path": f"{homes[2]}/out",
            "result_file": f"{homes[2]}/result.txt",
            "layers": (0, shape[0]),
            "stride": rng.choice((24, 32, 48, 64)),
            "chunk_size": rng.choice((128, 160, 192)),
            "batch_size": 4,
            "blend_mode": rng.choice(("hann", "gaussian")),
            "progressive": rng.random() < 0.25,
            "force_reverse": rng.random() < 0.2,
            "overwrite": False,
        }
        if rng.random() < 0.2:
            options["roi_xyxy"] = (30, 20, shape[2] - rng.randint(0, 60), shape[1] - 10)
        kind = rng.choice(("tiles", "strips", "deflated", "png"))
        return cls(number, rng, options, kind, papyrus(shape, seed=number))

    @property
    def homes(self) -> set[str]:
        """Roots of the job's places."""
        return {str(self.options[name]).rpartition("/")[0] for name in ("s3_path", *OUTPUTS)}

    def write(self) -> None:
        """Write the layers."""
        how: dict[str, dict[str, Any]] = {
            "tiles": {"tile": (128, 128), "compression": "deflate"},
            "strips": {"rowsperstrip": 16},
            "deflated": {"rowsperstrip": self.volume.shape[1], "compression": "deflate"},
        }
        for number, layer in enumerate(self.volume):
            pixels, file = layer.astype(np.uint16) << 8, io.BytesIO()
            if self.kind == "png":
                file.write(imagecodecs.png_encode(pixels))
            else:
                tifffile.imwrite(file, pixels, **how[self.kind])
            ending = "png" if self.kind == "png" else "tif"
            place = f"{self.options['s3_path']}/layers/{number:02d}.{ending}"
            storage.write_bytes(place, file.getvalue())

    @property
    def seconds_a_tile(self) -> float:
        """Time of the network for a tile, so that all workers together take `SECONDS` a fault."""
        _, height, width = self.volume.shape
        stride = self.options["stride"]
        return SECONDS * WORKERS / max(1, (height // stride) * (width // stride))


OUTPUTS = ("zarr_output_dir", "output_path", "result_file")


# Faults. Each begins, and returns what ends it and the time until then, in seconds.
Ended = tuple[Callable[[], None], float]


def kill_worker(rig: Rig, rng: random.Random) -> Ended:
    """Kill a worker, which the cluster replaces."""
    os.kill(rng.choice(rig.workers).pid, signal.SIGKILL)
    return (lambda: None), 0


def kill_client(rig: Rig, rng: random.Random) -> Ended:
    """Kill the client; the same command is given again."""
    os.kill(rig.client.pid, signal.SIGKILL)
    return (lambda: None), 0


def start_twin(rig: Rig, rng: random.Random) -> Ended:
    """Give the same command once more, while the job runs."""
    rig.start_twin()
    return (lambda: None), 0


def freeze(pid: int, seconds: float) -> Ended:
    """Stop a process for some time."""
    os.kill(pid, signal.SIGSTOP)

    def thaw() -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    return thaw, seconds


def freeze_worker(rig: Rig, rng: random.Random) -> Ended:
    """Stop a worker, sometimes for longer than the scheduler waits."""
    return freeze(rng.choice(rig.workers).pid, 16 if rng.random() < 0.1 else rng.uniform(0.1, 1))


def freeze_client(rig: Rig, rng: random.Random) -> Ended:
    """Stop the client."""
    return freeze(rig.client.pid, rng.uniform(0.1, 1))


def answer(kind: str, rig: Rig, rng: random.Random) -> Ended:
    """Let requests of S3 fail for some time."""
    rig.proxy.inject([kind], every=rng.randint(1, 4))
    return rig.proxy.inject, rng.uniform(0.2, 0.8)


def fill_disk(rig: Rig, rng: random.Random) -> Ended:
    """Fill the disk for some time."""
    return rig.fill(), rng.uniform(0.2, 0.8)


def restart_scheduler(rig: Rig, rng: random.Random) -> Ended:
    """Kill the scheduler, with all it knows; another comes, sometimes after clients left."""
    os.kill(rig.scheduler.pid, signal.SIGKILL)
    rig.absent_until = time.monotonic() + (rng.uniform(5, 15) if rng.random() < 0.15 else 0)
    return (lambda: None), 0


OF_S3 = {
    "connections cut": "reset", "answers 500": "500", "answers 503": "503",
    "answers truncated": "truncate", "answers 403": "403",
}  # fmt: skip
FAULTS: dict[str, Callable[[Rig, random.Random], Ended]] = {
    "worker killed": kill_worker, "client killed": kill_client, "worker frozen": freeze_worker,
    "client frozen": freeze_client, "disk full": fill_disk,
    "scheduler restarted": restart_scheduler, "job given twice": start_twin,
    **{name: partial(answer, kind) for name, kind in OF_S3.items()},
}  # fmt: skip
WEIGHTS = {"worker killed": 4, "client killed": 3, "worker frozen": 3, "disk full": 2,
           "job given twice": 2}  # fmt: skip


def possible(job: Job) -> list[str]:
    """Kinds of faults that can meet a job."""
    on_s3 = BUCKET in job.homes
    is_local = job.homes != {BUCKET}
    return [
        name
        for name in FAULTS
        if (on_s3 or name not in OF_S3) and (is_local or name != "disk full")
    ]


class Campaign:
    """Jobs under faults, one after the other."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig, self.seed, self.tally = rig, seed, Tally()

    def run(self, faults: int, seconds: float, most_jobs: int = 1_000_000) -> Tally:
        """Run jobs until they have met enough faults, or the time is over."""
        end = time.monotonic() + seconds
        for number in range(most_jobs):
            if self.tally.faults.total() >= faults or time.monotonic() > end:
                break
            try:
                self.one_job(number, faults - self.tally.faults.total())
            except KeyboardInterrupt:
                break
            except Exception:  # of the campaign, whose tally until then is kept
                self.tally.complain(number, f"cannot go on\n{traceback.format_exc()}")
                break
            took, met = time.monotonic() - end + seconds, self.tally.faults.total()
            said = f"{took:.0f} s: {number + 1} jobs, {met} faults, {len(self.tally.wrong)} wrong"
            print(said, file=sys.stderr, flush=True)
        return self.tally

    def one_job(self, number: int, most: int) -> None:
        """Run one job undisturbed and once more under faults, and compare."""
        rig, job = self.rig, Job.of(self.seed, number, self.rig.disk)
        rig.forget_s3()
        storage.s3_filesystem().mkdir("scrolls")
        job.write()
        apart = rig.folder / "undisturbed"
        places = {name: str(apart / name) for name in OUTPUTS}
        rig.run_alone(rig.folder / f"{number}-alone.log", {**job.options, **places})
        expected = picture(storage.read_bytes(places["result_file"]).decode())
        log = rig.folder / f"{number}.log"
        names = possible(job)
        weights = [WEIGHTS.get(name, 1) for name in names]
        faults = job.rng.choices(names, weights, k=min(job.rng.randint(*FAULTS_A_JOB), most))
        rig.pace.write_text(str(len(faults) * job.seconds_a_tile))
        self.tally.counts["jobs"] += 1
        is_done = self.under_faults(job, faults, log)
        self.await_twins(job)
        if is_done:
            self.compare(job, expected, log)
        self.count_leftovers(job)
        shutil.rmtree(apart, ignore_errors=True)
        shutil.rmtree(rig.disk / "data", ignore_errors=True)

    def under_faults(self, job: Job, faults: list[str], log: Path) -> bool:
        """Run a job until it ends well, while faults come; return False where it does not."""
        self.rig.start(log, job.options)
        for name in faults:
            if self.wait(job, log, job.rng.uniform(0.1, 0.9)):
                return True  # before all faults came
            try:
                end, seconds = FAULTS[name](self.rig, job.rng)
            except ProcessLookupError:  # whom it would strike is dead already
                continue
            struck = self.rig.proxy.injected if name in OF_S3 else lambda: {"": 1}
            self.wait(job, log, seconds, struck)
            happened = struck()
            end()
            self.tally.faults[name] += bool(happened)
            if name in OF_S3:
                self.tally.requests.update(happened)
        for run in range(2):
            if run:  # all faults are over before it begins
                self.rig.recover()
                self.rig.start(log, job.options)
            try:
                if self.wait(job, log, LONGEST, settles=True):
                    return True
            except TimeoutError:
                os.kill(self.rig.client.pid, signal.SIGUSR1)
                time.sleep(1)
                self.tally.complain(job.number, f"hangs, {job.options}", log)
                self.rig.client.kill()
                self.rig.client.join()
                return False
        self.tally.complain(job.number, f"fails without faults, {job.options}", log)
        return False

    def wait(
        self,
        job: Job,
        log: Path,
        seconds: float,
        struck: Callable[[], Any] = lambda: True,
        settles: bool = False,
    ) -> bool:
        """Let a job go on, and give its command again when it was ended; tell whether it is done.

        Waits for some time, and for somebody to be ``struck``, unless nobody is for long.
        ``settles`` waits for the end of the client, however it is.
        """
        start = time.monotonic()
        while True:
            self.rig.heal()
            code = self.rig.client.exitcode
            if code == 0:
                return True
            if code is not None:
                self.note_end(job, code, log)
                self.tally.counts["resumed"] += 1
                if settles:
                    return False
                self.rig.start(log, job.options)
            took = time.monotonic() - start
            if settles and took > seconds * max(1, os.getloadavg()[0]):  # others compute, too
                raise TimeoutError
            if not settles and took > seconds and (took > seconds + STRIKES or struck()):
                return False
            time.sleep(0.02)

    def await_twins(self, job: Job) -> None:
        """Let all other clients of a job end, well or with a sentence."""
        end = time.monotonic() + LONGEST * max(1, os.getloadavg()[0])
        for twin, log in self.rig.twins:
            while twin.exitcode is None and time.monotonic() < end:
                self.rig.heal()
                time.sleep(0.02)
            if twin.exitcode is None:
                os.kill(twin.pid, signal.SIGUSR1)
                time.sleep(1)
                self.tally.complain(job.number, f"the second client hangs, {job.options}", log)
                twin.kill()
                twin.join()
            elif twin.exitcode:
                self.note_end(job, twin.exitcode, log)
        self.rig.twins.clear()

    def note_end(self, job: Job, code: int, log: Path) -> None:
        """Count a client that did not end well."""
        said = log.read_text() if log.exists() else ""
        log.unlink(missing_ok=True)
        if code == -signal.SIGKILL:
            return
        last = said.strip().rpartition("\n")[2]
        if last.startswith("inkdask: ") and "Traceback" not in said:
            self.tally.counts["ended with a sentence"] += 1
            self.tally.counts[f"said: {re.sub(r'(/|s3:|tcp:)[^ ]*|[0-9]+', '*', last)}"] += 1
        else:
            print(said[-6000:], file=sys.stderr)
            self.tally.complain(job.number, f"ends with {code} and {last!r}")

    def compare(self, job: Job, expected: np.ndarray, log: Path) -> None:
        """Compare the picture with that of the undisturbed job."""
        uri = storage.read_bytes(job.options["result_file"]).decode()
        got = picture(uri)
        wrong = np.count_nonzero(got != expected) if got.shape == expected.shape else got.size
        self.tally.counts["pixels"] += expected.size
        self.tally.counts["pixels wrong"] += int(wrong)
        if wrong:
            self.tally.complain(job.number, f"{wrong} pixels are wrong, {job.options}", log)

    def count_leftovers(self, job: Job) -> None:
        """Count what is left beside the layers, the tiles and the pictures.

        The next job sweeps temporary folders of killed processes, and what lies next to its
        outputs for a day.
        """
        for process in self.rig.strangers():
            self.tally.complain(job.number, f"the process {process} is left")
        at_once = self.leftovers(job)
        self.tally.counts.update(f"left, {kind}" for kind, _ in at_once)
        with mock.patch.object(outputs, "REST", 0):
            outputs.sweep(f"{job.options['output_path']}/prediction_")
        sweep_scratch(self.rig.disk / "tmp")
        for _, file in self.leftovers(job):
            self.tally.complain(job.number, f"{file} is left for good")
        for path in (self.rig.disk / "tmp").glob("inkdask-*"):
            shutil.rmtree(path)  # counted once

    def leftovers(self, job: Job) -> list[tuple[str, str]]:
        """Kinds and places of unfinished files, uploads and temporary folders."""
        folders = [path.name for path in (self.rig.disk / "tmp").iterdir()]
        found = [("temporary folder", name) for name in folders if name.startswith("inkdask-")]
        for home in job.homes:
            files = [(ENDINGS.search(file), file) for file in storage.list_files(home)]
            found += [(ending[1], storage.join(home, file)) for ending, file in files if ending]
        uploads = storage.s3_filesystem().call_s3("list_multipart_uploads", Bucket="scrolls")
        return found + [("upload", upload["Key"]) for upload in uploads.get("Uploads", ())]


def sweep_scratch(folder: Path) -> None:
    """Sweep a folder for temporary ones, as a job does."""
    with mock.patch.object(tempfile, "tempdir", str(folder)):
        storage_scratch.sweep()


def picture(uri: str) -> np.ndarray:
    """Read a picture, uint8 (y, x)."""
    with Image.open(io.BytesIO(storage.read_bytes(uri))) as image:
        return np.asarray(image)


@contextmanager
def rig_at(folder: Path) -> Iterator[Rig]:
    """Start all processes; end them with the block."""
    rig = Rig(folder)
    os.environ.update(rig.environment(rig.s3))
    try:
        yield rig
    finally:
        rig.close()


def main() -> None:
    """Print the tally."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=2, help="stop after this time")
    parser.add_argument("--faults", type=int, default=1000, help="stop after so many faults")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends with the tally so far
    with scratch() as folder, rig_at(Path(folder)) as rig:
        tally = Campaign(rig, given.seed).run(given.faults, given.hours * 3600)
    report(tally, f"Seed {given.seed}, {WORKERS} workers, {time.monotonic() - start:.0f} s.")
    if tally.wrong:
        raise SystemExit("\n".join(tally.wrong))


def report(tally: Tally, head: str) -> None:
    """Print what happened."""
    counts = tally.counts
    print(f"{head}\n")
    table(("fault", "times"), [*tally.faults.most_common(), ("all", tally.faults.total())])
    failed = ", ".join(f"{count} by {kind}" for kind, count in tally.requests.most_common())
    print(f"\nRequests of S3 that failed: {tally.requests.total()} ({failed}).\n")
    names = ("jobs", "resumed", "ended with a sentence", "pixels", "pixels wrong")
    left = [name for name in counts if name.startswith("left, ")]
    rows = [(name, f"{counts[name]:,}") for name in (*names, *sorted(left))]
    table(("of the jobs", "count"), [*rows, ("left for good, hung or failed", len(tally.wrong))])
    print()
    said = [(name.removeprefix("said: "), n) for name, n in counts.items() if name[:5] == "said:"]
    table(("sentence", "times"), sorted(said, key=lambda row: -row[1]))


if __name__ == "__main__":
    main()
