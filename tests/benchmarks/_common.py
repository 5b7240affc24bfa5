"""What the benchmarks share: the machine, tables, a real network, processes that are measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tifffile

import inkdask

LAYERS, TILE, STRIDE = 26, 64, 16
SPREAD = 3.0  # times the random weights of the last layer: probabilities from 0.1 to 0.9
ROOT = Path(__file__).parents[2]


def machine() -> str:
    """The machine and the versions that matter, in one line."""
    import torch

    memory = psutil.virtual_memory().total / 2**30
    words = [f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"]
    if torch.cuda.is_available():
        words.append(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    packages = ("torch", "dask", "zarr", "numpy")
    versions = [f"Python {platform.python_version()}", f"inkdask {inkdask.__version__}"]
    versions += [f"{package} {version(package)}" for package in packages]
    return f"{'; '.join(words)}; {', '.join(versions)}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table, row by row as they come."""
    print(f"| {' | '.join(headings)} |")
    print("|---" * len(headings) + "|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def size(count: float) -> str:
    """Bytes, with three digits that count."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count:,.0f} GB"


def stored(*places: Path) -> int:
    """Bytes of all files under some folders."""
    return sum(f.stat().st_size for place in places for f in place.rglob("*") if f.is_file())


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes when the benchmark ends."""
    return tempfile.TemporaryDirectory(prefix="inkdask-benchmark-")


def write_noise(folder: Path, height: int, width: int, layers: int = LAYERS) -> None:
    """Write uint16 layers of noise, of strips, in which no tile is empty."""
    (folder / "layers").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(256, 1 << 16, (height, width), dtype=np.uint16)

    def write(number: int) -> None:  # the same noise, moved: making it takes longer than writing
        layer = np.roll(noise, 7919 * number)
        tifffile.imwrite(folder / "layers" / f"{number:02d}.tif", layer, rowsperstrip=64)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(layers)))


def reference_network(**sizes: int) -> Any:
    """The package's TimeSformer with random weights: (b, f, 1, 64, 64) to (b, 16) logits.

    ``sizes`` are in the words of the package, and of another network than the published one.
    """
    import torch
    from timesformer_pytorch import TimeSformer

    published = {
        "dim": 512, "image_size": TILE, "patch_size": 16, "num_frames": LAYERS, "num_classes": 16,
        "depth": 8, "heads": 6, "dim_head": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    network = TimeSformer(
        **{**published, **sizes}, channels=1, attn_dropout=0.1, ff_dropout=0.1
    ).eval()
    with torch.no_grad():
        network.to_out[1].weight.mul_(SPREAD)
    return network


def save_checkpoint(network: Any, path: Path) -> None:
    """Save its weights as the published checkpoints are."""
    import torch

    torch.save({f"backbone.{name}": value for name, value in network.state_dict().items()}, path)


def bytes_received() -> int:
    """Bytes that this process and its ended children have read from files (Linux)."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def runs_int8() -> bool:
    """Whether a job of precision int8 runs in it here: with AMX, for example, it does not."""
    import torch

    from inkdask.errors import InkdaskError
    from inkdask.models.hardware import precision_for
    from inkdask.specs import ModelSpec, Network

    model = ModelSpec("TimeSformer", "ink_timesformer", "")
    network = Network(model, LAYERS, TILE, 4, 1, 1, "", precision="int8")
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return precision_for(network, device) == "int8"
    except InkdaskError:
        return False


def side_for_device(on_cpu: int, on_gpu: int) -> int:
    """Side of a segment, in pixels, that keeps this machine busy for more than its start-up."""
    import torch

    return on_gpu if torch.cuda.is_available() else on_cpu


def gpu_memory() -> int:
    """The most GPU memory that torch has held in this process, in bytes."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


@dataclass
class Measured:
    """A process that has ended.

    Attributes
    ----------
    said
        What it told of itself, with `tell`.
    seconds
        From its start to its end.
    peak
        The most memory that it held together with its children, in bytes (pages that are shared
        count once).
    """

    seconds: float
    peak: int
    said: dict[str, Any] = field(default_factory=dict)


def tell(**facts: Any) -> None:
    """Tell `measure` what this process found out."""
    print(json.dumps(facts), flush=True)


def measure(module: str, *arguments: object, env: dict[str, str] | None = None) -> Measured:
    """Run ``python -m module arguments`` in a process of its own, and watch its memory."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **(env or {})}
    )
    measured = Measured(0.0, 0)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, measured, ended), daemon=True)
    watcher.start()
    try:
        out, _ = process.communicate()
    finally:
        process.kill()
        ended.set()
        watcher.join()
    measured.seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    measured.said = json.loads(out.splitlines()[-1]) if out.strip() else {}
    return measured


def _watch(pid: int, measured: Measured, ended: threading.Event) -> None:
    highest, last = 0, 0.0
    while not ended.wait(0.1):
        try:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        # Shares are dear to find out, and halt the process meanwhile: only at a new height, and now
        # and then where the shares may be larger than they were with more processes.
        resident, now = _sum(_resident, family), time.perf_counter()
        if resident > highest or (resident > measured.peak and now > last + 1):
            highest, last = max(resident, highest), now
            measured.peak = max(measured.peak, _sum(_own_memory, family))


def _sum(of: Callable[[psutil.Process], int], family: Iterable[psutil.Process]) -> int:
    total = 0
    for process in family:
        with suppress(psutil.Error, OSError):  # it ended meanwhile
            total += of(process)
    return total


def _resident(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def _own_memory(process: psutil.Process) -> int:
    """Bytes of a process, where pages that others share count by their share."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    if not rollup.exists():
        return _resident(process)
    return int(rollup.read_text().split("\nPss:")[1].split()[0]) * 1024
