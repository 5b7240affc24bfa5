"""All that concerns an NVIDIA GPU, in ten minutes: correctness, networks alone, jobs, and goals.

    python -m tests.benchmarks gpu --seconds 540 --out DIR
    python -m tests.benchmarks gpu --only kernels timesformer
    python -m tests.benchmarks gpu --dry         # every stage on a CPU, in tiny sizes

Each stage is a process of its own with its own time limit. When it ends, one line of JSON about it
goes to the standard error and to DIR/gpu.jsonl. A stage that fails, takes too long or lacks a
package says so in its line, and keeps what it measured before; the next stage runs all the same. A
stage that no longer fits into the time is skipped. The tables at the end hold every figure, and
the goals that are known for an H200. The exit status is 1 when a stage failed or took too long.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests.benchmarks import _gpu_stages as stages
from tests.benchmarks._common import LAYERS, ROOT, scratch, side_for_device, table

T = TypeVar("T")
LACKS = 3  # exit status of a stage without a package that it needs
PATIENCE = 1.6  # times the estimate that a stage may take
TAIL = 3000  # characters of a failed stage's output that its line keeps


@dataclass(frozen=True)
class Given:
    """What a stage is given: a folder to write in, and tools; tiny sizes and a CPU when dry."""

    folder: Path
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def dtype(self) -> Any:
        """Dtype of fast networks: a CPU that emulates bfloat16 would be slow in it."""
        import torch

        return torch.float32 if self.dry else torch.bfloat16

    @property
    def layers(self) -> int:
        """Number of layers of a job."""
        return 2 if self.dry else LAYERS

    def size(self, full: T, dry: T) -> T:
        """Return a size for the GPU or for a dry run."""
        return dry if self.dry else full

    def begin(self) -> Any:
        """Return torch, set up as the predictor sets it up."""
        import torch

        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        # Not `fast_float32`, because a predictor in this process gives its flags back.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
        return torch

    def tell(self, what: str, value: Any, goal: str = "") -> None:
        """Tell a figure, and the goal on a GPU: ``>= NUMBER`` or ``<= NUMBER``."""
        value = value if isinstance(value, int | str) else float(value)
        value = value if isinstance(value, str) or math.isfinite(value) else str(value)
        goal = "" if self.dry else goal
        print(json.dumps({"what": what, "value": value, "goal": goal}), flush=True)

    def within(self, what: str, found: Any, expected: Any, most: float) -> None:
        """Tell the greatest difference, and raise where it is too large or no number."""
        difference = float(abs(found - expected).max())
        self.tell(what, difference, f"<= {most}")
        if not difference <= most:
            raise ValueError(f"{what}: {difference:.4g} is more than {most}")

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Tell the seconds of a block."""
        start = time.perf_counter()
        yield
        self.tell(f"{what}, s", time.perf_counter() - start)

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Fill each new tensor with NaN, so that what a kernel does not write shows."""
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)  # which by default does that, too
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    def rate(self, function: Callable[[], Any], count: int = 1) -> float:
        """Return how much is done a second by calls that do ``count``: the median of five times."""
        import torch
        from torch.utils.benchmark import Timer  # waits for a GPU

        timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
        if self.dry:
            return count / timer.timeit(1).median
        timer.timeit(3)  # warm
        calls = max(1, round(0.3 / timer.timeit(3).median))
        return count / statistics.median(timer.timeit(calls).median for _ in range(5))

    def autocast(self, name: str) -> Any:
        """Return a context with autocast to a dtype."""
        import torch

        return torch.autocast(self.device, getattr(torch, name), enabled=not self.dry)

    def compiled(self, module: Any, x: Any, **options: Any) -> Any:
        """Return a compiled network, warm; a dry run leaves it as it is."""
        import torch

        module = torch.compile(module, dynamic=False, disable=self.dry, **options)
        with self.timed("compiling"):
            for _ in range(self.size(3, 1)):  # the second pass records a CUDA graph
                module(x).float().sum().item()
        return module


class Stage(NamedTuple):
    """A process of the benchmark, and the seconds that it takes on an H200."""

    name: str
    seconds: float
    function: Callable[[Given], None]


STAGES = (  # in order of value, because the time may not suffice for all
    Stage("versions", 10, stages.versions),
    Stage("kernels", 20, stages.kernels),
    Stage("correctness", 20, stages.correctness),
    Stage("ceilings", 15, stages.ceilings),
    Stage("timesformer", 30, stages.timesformer),
    Stage("resnet3d-50", 50, stages.resnet3d_50),
    Stage("resnet3d-152-3d-decoder", 65, stages.resnet3d_152_decoder3d),
    Stage("job", 105, stages.job),
    Stage("usual", 70, stages.usual),
    Stage("tests", 60, stages.tests),
    Stage("cluster", 45, stages.cluster),
    Stage("blending", 30, stages.blending),
)


@dataclass
class Ended:
    """How a stage ended.

    Attributes
    ----------
    said
        ``done``, ``failed``, ``took too long``, ``lacks a package`` or ``skipped``.
    seconds
        From the start of its process to its end.
    why
        The reason, unless it is done.
    facts
        Figures by name, each with the goal for it or an empty string.
    tail
        The end of what it printed, where it failed or took too long.
    """

    stage: str
    said: str
    seconds: float = 0.0
    why: str = ""
    facts: dict[str, tuple[Any, str]] = field(default_factory=dict)
    tail: str = ""

    @property
    def is_failure(self) -> bool:
        return self.said in ("failed", "took too long")


def run_stage(stage: Stage, given: Given, limit: float) -> Ended:
    """Run a stage in a process group of its own, all of which ends with it."""
    where = f"{stage.function.__module__}:{stage.function.__qualname__}"
    command = [sys.executable, "-m", __spec__.name, "--stage", where, str(given.folder)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(given.folder / "inductor")}
    if given.dry:
        command.append("--dry")
        # One thread, because two wait for each other where others use the cores, too.
        environment.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):  # the workers of a cluster or of a loader, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        return ended(stage.name, status, limit, time.perf_counter() - start, said.read())


def ended(name: str, status: int | None, limit: float, seconds: float, said: str) -> Ended:
    """Say how a process ended, by its exit status (None: it was stopped) and its output."""
    facts, others = {}, []
    for line in said.splitlines():
        try:
            told = json.loads(line)
            facts[told["what"]] = told["value"], told["goal"]
        except (ValueError, TypeError, KeyError):
            others.append(line)
    last = next((line for line in reversed(others) if line.strip()), "")
    result = Ended(name, "done", round(seconds, 1), facts=facts)
    if status == 0:
        return result
    if status == LACKS:
        result.said, result.why = "lacks a package", last
        return result
    result.tail = "\n".join(others)[-TAIL:]
    if status is None:
        result.said, result.why = "took too long", f"stopped after {limit:.0f} s"
    else:
        result.said, result.why = "failed", last or "no output"
        if status < 0:
            result.why = f"{signal.Signals(-status).name}; {result.why}"
    return result


def run_all(chosen: list[Stage], given: Given, seconds: float, out: Path | None) -> list:
    """Run stages one after the other, and tell of each as it ends."""
    end = time.perf_counter() + seconds
    results = []
    for stage in chosen:
        left = end - time.perf_counter()
        if stage.seconds > left:
            why = f"it needs {stage.seconds:.0f} s, and {max(left, 0):.0f} s are left"
            result = Ended(stage.name, "skipped", why=why)
        else:
            limit = left if given.dry else min(PATIENCE * stage.seconds, left)
            result = run_stage(stage, given, limit)
        line = json.dumps(asdict(result))
        print(line, file=sys.stderr, flush=True)
        if out:
            with (out / "gpu.jsonl").open("a") as file:
                file.write(f"{line}\n")
        results.append(result)
    return results


def ratios(results: list[Ended]) -> dict[str, tuple[Any, str]]:
    """Facts that compare the job with the usual way, where both were measured."""
    facts = {name: value for result in results for name, (value, _) in result.facts.items()}
    pairs = {
        "second job, times the compiled reference network alone": (stages.COMPILED, ">= 1.4"),
        "second job, times the usual way": (stages.USUAL, ">= 15"),
    }
    return {
        name: (facts[stages.SECOND] / facts[other], goal)
        for name, (other, goal) in pairs.items()
        if stages.SECOND in facts and other in facts
    }


def shown(value: Any) -> str:
    """Return a figure with four digits, and words as they are."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value).replace("|", r"\|")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def judged(value: Any, goal: str) -> str:
    """Return a goal in words, and whether a figure meets it."""
    if not goal:
        return ""
    least, number = goal.startswith(">="), float(goal[2:])
    is_number = not isinstance(value, str)  # not "nan"
    met = is_number and (value >= number if least else value <= number)
    return f"at {'least' if least else 'most'} {number:,g}: {'met' if met else '**missed**'}"


def markdown(results: list[Ended], dry: bool) -> None:
    """Print a table for each stage."""
    card = next((r.facts["GPU"][0] for r in results if "GPU" in r.facts), "unknown card")
    when = datetime.datetime.now(datetime.UTC)
    print(f"{'Dry run on a CPU: no figure counts' if dry else card}, {when:%Y-%m-%d}.")
    for result in results:
        print(f"\n### {result.stage}\n")
        print(f"{result.said.capitalize()}, {result.seconds:.0f} s. {result.why}".rstrip() + "\n")
        rows = [(name, shown(v), judged(v, goal)) for name, (v, goal) in result.facts.items()]
        if rows:
            table(("what", "figure", "goal"), rows)
    if compared := ratios(results):
        print("\n### job against the usual way\n")
        rows = [(name, shown(v), "" if dry else judged(v, g)) for name, (v, g) in compared.items()]
        table(("what", "figure", "goal"), rows)


def run_function(where: str, given: Given) -> None:
    """Run the function ``module:name`` of a stage in this process."""
    module, _, name = where.partition(":")
    try:
        getattr(importlib.import_module(module), name)(given)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("inkdask", "tests"):
            raise
        print(f"There is no package {error.name}.")
        sys.exit(LACKS)


def main(arguments: list[str] | None = None) -> None:
    """Run the stages, and print the tables."""
    known = {stage.name: stage for stage in STAGES}
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=540, help="for all; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for gpu.jsonl")
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage:
        where, folder = options.stage
        run_function(where, Given(Path(folder), options.dry))
        return
    if not (options.dry or side_for_device(0, 1)):
        parser.error("there is no NVIDIA GPU here; --dry runs every stage on a CPU")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage ends, too
    chosen = [known[name] for name in dict.fromkeys(options.only or known)]
    with scratch() as folder:
        given = Given(Path(folder), options.dry)
        results = run_all(chosen, given, options.seconds, options.out)
    markdown(results, options.dry)
    if failed := [result.stage for result in results if result.is_failure]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
