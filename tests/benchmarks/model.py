"""How fast the networks run, without anything around them.

    python -m tests.benchmarks.model                    # TimeSformer and ResNet3D-50
    python -m tests.benchmarks.model --compile          # the same, and compiled, on a GPU
    python -m tests.benchmarks.model resnet3d-152-3d-decoder --tile 256
    python -m tests.benchmarks.model timesformer --batches 64 128 256 512 1024
    python -m tests.benchmarks.model timesformer --compile-modes reduce-overhead max-autotune

Every network is measured against its plain reference (for TimeSformer the package
`timesformer-pytorch`, for ResNet3D the network as it was trained), in float32, in bfloat16 and
where it can in int8, and against the speed of this machine's own matrix products in the same
dtype: a path whose share of that ceiling is 100 % would spend no time on anything else. Paths take
turns, and the best time of each counts, so that other work on the machine disturbs them alike.
"""

import argparse
import copy
import platform
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import torch
from timesformer_pytorch import TimeSformer
from torch.utils.flop_counter import FlopCounterMode

from inkdask.models.fast import on_cores, prepare
from inkdask.models.hardware import cores, fast_float32, has_int8, native_dtype
from inkdask.models.int8 import Int8Linear, convert
from inkdask.models.networks import BUILDERS
from inkdask.models.packed import pack_if_it_can
from inkdask.models.registry import ARCHITECTURES
from inkdask.predictor import Predictor
from inkdask.specs import ModelSpec, Network

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


@dataclass
class Path:
    """One way to run a network, and its best time so far."""

    name: str
    dtype: torch.dtype
    forward: torch.nn.Module
    batches: list[int]
    flops: float  # a tile, as this path computes it
    autocast: bool = False
    seconds: float = float("inf")  # a tile

    def measure(self, tile):
        """Time every batch size the first time, and the best of them from then on."""
        for batch in self.batches:
            x = tile.repeat(batch, 1, 1, 1, 1)
            if not self.autocast and self.dtype is not torch.int8:  # which reads float32
                x = x.to(self.dtype)
            try:
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.autocast):
                    seconds = timed(lambda x=x: self.forward(x)) / batch
            except torch.OutOfMemoryError:  # of the plain network in float32, on a small card
                torch.cuda.empty_cache()
                continue
            if seconds < self.seconds:
                self.seconds, best = seconds, batch
        if len(self.batches) > 1 and self.seconds < float("inf"):
            self.batches = [best]


def timed(function):
    """Seconds of a call: on a GPU the best of as many as fill half a second."""
    best, end = float("inf"), now() + (0.5 if DEVICE.type == "cuda" else 0)
    while True:
        start = now()
        function()
        best = min(best, now() - start)
        if now() >= end:
            return best


def now():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Ceiling:
    """Operations a second of plain matrix products: the best of the sizes, over all rounds."""

    SIZES = ((2048, 2048, 2048), (1668, 512, 4096), (4096, 2048, 512))
    LARGE = ((8192, 8192, 8192), (32768, 4096, 4096))

    def __init__(self, dtype):
        sizes = self.LARGE if DEVICE.type == "cuda" else self.SIZES
        self.products = [(2 * m * k * n, product(m, k, n, dtype)) for m, k, n in sizes]
        self.flops = 0.0

    def measure(self):
        for flops, function in self.products:
            self.flops = max(self.flops, flops / timed(function))


def product(m, k, n, dtype):
    """A call that multiplies matrices (m, k) and (k, n)."""
    if dtype is torch.int8:
        layer = Int8Linear(torch.randn(n, k), None, torch.bfloat16)
        return partial(layer, torch.randint(0, 256, (m, k), dtype=torch.uint8), 1.0)
    a, b = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((m, k), (n, k)))
    return partial(torch.nn.functional.linear, a, b)


class Reference(torch.nn.Module):
    """The package's TimeSformer behind the interface of ours."""

    def __init__(self, layers):
        super().__init__()
        self.network = TimeSformer(
            dim=512, image_size=64, patch_size=16, num_frames=layers, num_classes=16, channels=1,
            depth=8, heads=6, dim_head=64,
        )  # fmt: skip

    def forward(self, x):
        return self.network(x.transpose(1, 2)).view(-1, 1, 4, 4)


def paths(architecture, layers, tile, modes, swept):
    """All ways to run a network, all with the same weights.

    ``modes`` are those of ``torch.compile``; each of the batch sizes ``swept`` gets ways of its
    own, and without any each way finds its best one.
    """
    torch.manual_seed(0)
    ours = BUILDERS[architecture](layers=layers, tile=tile).eval().requires_grad_(False)
    plain = copy.deepcopy(ours)
    if architecture == "ink_timesformer":
        plain = Reference(layers).eval().requires_grad_(False)
        ours.load_state_dict(plain.network.state_dict())
    spec = Network(ModelSpec("", architecture, "", layers, tile), layers, tile, 0, 1, 1, "")
    best = native_dtype(DEVICE)
    batches = batch_sizes(spec)
    sweep = [[batch] for batch in swept] or [batches]
    chosen = [[batch] for batch in swept] or [batches[-2:-1]]
    work = count(plain, layers, tile)

    plain = plain.to(DEVICE)
    for some in sweep:
        yield Path("plain", torch.float32, plain, some, work)
        yield Path("plain, autocast", torch.bfloat16, plain, some, work, autocast=True)
    if modes:
        other = torch.compile(copy.deepcopy(plain), dynamic=False, mode="reduce-overhead")
        for some in chosen:
            yield Path("plain, compiled", best, other, some, work, best is torch.bfloat16)
    done = count(ours, layers, tile)
    for dtype in dict.fromkeys((torch.float32, best)):
        fast = copy.deepcopy(ours).to(DEVICE)
        prepare(fast, dtype)
        packed = copy.deepcopy(fast)
        pack_if_it_can(packed)
        eager = on_cores(packed, cores(), layers * tile * tile)
        for some in sweep:
            yield Path("inkdask", dtype, eager, some, done)
        for mode in modes:
            other = torch.compile(copy.deepcopy(fast), dynamic=False, mode=mode)
            for some in chosen:
                yield Path(f"inkdask, compiled, {mode}", dtype, other, some, done)
    if has_int8(DEVICE) and architecture == "ink_timesformer":
        convert(ours, best)
        eager = on_cores(ours, cores(), layers * tile * tile)
        for some in sweep:
            yield Path("inkdask", torch.int8, eager, some, done)


def batch_sizes(spec):
    """Batch sizes to try: the one that the predictor chooses, its double, and smaller ones."""
    chosen = Predictor(spec).batch_size
    smaller = 8 if DEVICE.type == "cpu" else 2  # the plain network is fastest in the cache
    return sorted({max(1, chosen // smaller), max(1, chosen // 2), chosen, 2 * chosen})


def count(network, layers, tile):
    """Operations of a tile: all products, of attention too, as the counter sees them."""
    x = torch.empty(1, 1, layers, tile, tile, device="meta")
    network = copy.deepcopy(network).to("meta")
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter:
        network(x)
    return counter.get_total_flops()


def machine():
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else torch.cpu.get_capabilities()
    name = name if isinstance(name, str) else name["cpu_name"]
    versions = ", ".join(f"{p} {version(p)}" for p in ("inkdask", "torch", "timesformer-pytorch"))
    return (
        f"{name}, {torch.get_num_threads()} threads; Python {platform.python_version()}, {versions}"
    )


@fast_float32(DEVICE)  # as a job computes
def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("networks", nargs="*", default=["timesformer", "resnet3d-50"])
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument(
        "--tile", type=int, help="side of a ResNet3D tile; default 64, 256 on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=4, help="turns of every path")
    parser.add_argument(
        "--compile", action="store_true", help="measure compiled networks too, on a GPU"
    )
    parser.add_argument(
        "--compile-modes", nargs="+", default=[], metavar="MODE", help="in these modes of torch"
    )
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[], metavar="TILES", help="sweep these sizes"
    )
    options = parser.parse_args()
    modes = options.compile_modes or (["reduce-overhead"] if options.compile else [])
    if unknown := set(options.networks) - set(ARCHITECTURES):
        parser.error(f"no network {', '.join(unknown)}; known are {', '.join(ARCHITECTURES)}")
    if modes and DEVICE.type == "cpu":
        parser.error("compiled networks are for a GPU, and this machine has none")
    torch.set_num_threads(cores())
    torch.set_grad_enabled(False)
    # Each batch size of each path is compiled: torch would run those after the eighth as they are.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    rows = []
    ceilings = {}
    for name in options.networks:
        tile = options.tile or (256 if DEVICE.type == "cuda" else 64)
        tile = 64 if name == "timesformer" else tile
        x = torch.rand(1, 1, options.layers, tile, tile, device=DEVICE)
        ways = list(paths(ARCHITECTURES[name], options.layers, tile, modes, options.batches))
        for dtype in {way.dtype for way in ways} - set(ceilings):
            ceilings[dtype] = Ceiling(dtype)
        for _ in range(options.rounds):
            for ceiling in ceilings.values():
                ceiling.measure()
            for way in ways:
                way.measure(x)
        rows += [(f"{name}, {options.layers} x {tile} x {tile}", way) for way in ways]
        del ways  # their memory

    print(f"{machine()}\n")
    for dtype, ceiling in ceilings.items():
        print(f"Matrix products in {NAMES[dtype]}: {ceiling.flops / 1e12:.3f} TFLOP/s.\n")
    print(TABLE)
    references = {}
    for name, way in rows:
        if way.name.startswith("plain") and "compiled" not in way.name:
            references[name] = min(way.seconds, references.get(name, float("inf")))
    for name, way in rows:
        ceiling = ceilings[way.dtype].flops
        plain = next(w.flops for n, w in rows if n == name)
        cells = (
            name, way.name, NAMES[way.dtype], way.batches[0], f"{1 / way.seconds:.2f}",
            f"{references[name] / way.seconds:.2f}", f"{way.flops / 1e9:.1f}",
            f"{plain / way.seconds / ceiling:.0%}", f"{way.flops / way.seconds / ceiling:.0%}",
        )  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |")


TABLE = """\
| network | path | dtype | batch | tiles/s | times the best plain eager | GFLOP a tile \
| of the ceiling, for the plain network's work | for the work done |
|---|---|---|---|---|---|---|---|---|"""


if __name__ == "__main__":
    main()
