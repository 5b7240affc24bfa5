"""Stages of the GPU benchmark: each a function that runs in a process of its own.

Nothing heavy and nothing of inkdask is imported before a stage needs it, so that a stage alone
fails where a module is missing. A stage tells its figures one by one: those told stay when it
fails later.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.benchmarks._common import (
    ROOT,
    STRIDE,
    TILE,
    gpu_memory,
    reference_network,
    save_checkpoint,
    size,
    write_noise,
)

if TYPE_CHECKING:
    from tests.benchmarks.gpu import Given

SECOND = "second job, tiles/s"
COMPILED = "reference network compiled, alone, tiles/s"
USUAL = "the usual way, tiles/s"

# A tiny TimeSformer for a CPU that interprets kernels: in the words of inkdask and of the package.
COMMON = {"dim": 64, "depth": 2, "heads": 2}
TINY = {**COMMON, "layers": 5, "tile": 16, "patch": 8, "head_dim": 16}
THEIRS = {"num_frames": 5, "image_size": 16, "patch_size": 8, "dim_head": 16, "num_classes": 4}
TINY_REFERENCE = {**COMMON, **THEIRS}


def versions(given: Given) -> None:
    """Machine, and the packages of inkdask."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, version

    import psutil
    import torch
    from packaging.requirements import Requirement

    if not given.dry:
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        given.tell("GPU", torch.cuda.get_device_name())
        given.tell("driver, memory", driver)
        given.tell("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    memory, disk = psutil.virtual_memory().total, shutil.disk_usage(given.folder).free
    given.tell("Python", sys.version.partition(" ")[0])
    given.tell("cores, memory, free disk", f"{os.cpu_count()}, {size(memory)}, {size(disk)}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    found, lacking = [], []
    for requirement in map(Requirement, [*wanted, "triton", "timesformer-pytorch", "monai"]):
        try:
            found.append(f"{requirement.name} {version(requirement.name)}")
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                lacking.append(str(requirement))
        except PackageNotFoundError:
            lacking.append(str(requirement))
    given.tell("packages", ", ".join(found))
    given.tell("not there, or older", ", ".join(lacking) or "none")


def timesformers(given: Given) -> tuple[Any, Any, Any]:
    """Return the package's network, ours with the same weights, and 64 tiles (b, 1, f, t, t)."""
    import torch

    from inkdask.models.timesformer import TimeSformer

    plain = reference_network(**given.size({}, TINY_REFERENCE)).requires_grad_(False)
    ours = TimeSformer(**given.size({}, TINY)).eval().requires_grad_(False)
    ours.load_state_dict(plain.state_dict())
    f, g, p = ours.shape
    x = torch.rand(given.size(64, 3), 1, f, g * p, g * p, device=given.device)
    return plain.to(given.device), ours.to(given.device), x


def probabilities(network: Any, x: Any) -> Any:
    """Return probabilities (b, 1, k, k) of tiles, in float32."""
    return network(x).float().sigmoid()


def exact(network: Any, x: Any) -> Any:
    """Return those without TF32, of tiles in the order of axes that the network takes."""
    import torch

    from inkdask.models.hardware import full_float32

    with full_float32():
        p = torch.cat([probabilities(network, part) for part in x.split(32)])
    k = round(p[0].numel() ** 0.5)
    return p.view(-1, 1, k, k)


def kernels(given: Given) -> None:
    """Compare the kernels with the network in float32, and gathered tiles with slices."""
    torch = given.begin()
    from inkdask.models import fast
    from inkdask.models import kernels as ours

    plain, network, x = timesformers(given)
    expected = exact(plain, x.transpose(1, 2))  # frames before channels
    fast.prepare(network, given.dtype)
    x, fused = x.to(given.dtype), ours.FusedTimeSformer(network)
    given.within(f"{len(x)} tiles, against float32", probabilities(fused, x), expected, 0.03)
    given.within("one tile", probabilities(fused, x[:1]), expected[:1], 0.03)
    with given.poisoned():
        given.within("memory full of NaN", probabilities(fused, x), expected, 0.03)

    t = x.shape[-1]
    block = torch.randint(256, (x.shape[2], t + 37, t + 5), dtype=torch.uint8, device=given.device)
    at = [(0, 0), (37, 5), (0, 5), (37, 0), (13, 3), (1, 2), (36, 4)]
    tiles = torch.stack([block[:, y : y + t, x : x + t] for y, x in at])[:, None].float()
    places = torch.tensor(at, device=given.device)
    for clip, divisor in ((200.0, 200.0), (255.0, 255.0)):
        expected = (tiles.clamp(max=clip) / divisor).to(given.dtype)
        with given.poisoned():
            found = ours.gather(block, places, t, clip, divisor, given.dtype)
        what = f"tiles gathered from an odd block, clip {clip:g}"
        given.within(what, found, expected, 2**-8)  # the last place of bfloat16


def correctness(given: Given) -> None:
    """Compare a predictor with the network in float32: edges of a block, and padded batches."""
    torch = given.begin()
    from inkdask.models import registry
    from inkdask.predictor import Predictor

    plain = reference_network().requires_grad_(False)
    checkpoint = given.folder / "correctness.pt"
    save_checkpoint(plain, checkpoint)
    predictor = Predictor(
        registry.resolve(str(checkpoint), model_type="timesformer", layers=given.layers)
    )
    count, rng = given.size(64, 5), np.random.default_rng(0)
    block = rng.integers(0, 256, (given.layers, TILE + 45, TILE + 83), np.uint8)
    edges = [(0, 0), (45, 83), (0, 83), (45, 0)]
    at = np.concatenate([edges, rng.integers(0, (46, 84), (count - len(edges), 2))])
    tiles = np.stack([block[:, y : y + TILE, x : x + TILE] for y, x in at])[:, None]
    x = torch.from_numpy(tiles).to(given.device).float().clamp_(max=200).div_(200)
    expected = exact(plain.to(given.device), x.transpose(1, 2))[:, 0].cpu().numpy()
    for some in (count, 1, count // 2 + 1):
        what = f"{some} tiles of an odd block, against float32"
        given.within(what, predictor.predict(block, at[:some], count), expected[:some], 0.03)
    with given.poisoned():
        given.within("memory full of NaN", predictor.predict(block, at, count), expected, 0.03)
    given.tell("precision", predictor.precision)
    if not given.dry and predictor.precision != "bfloat16":
        raise ValueError(f"the fast path was rejected: {predictor.precision} runs")


def ceilings(given: Given) -> None:
    """Measure what the card can do at most."""
    torch = given.begin()
    k, count = given.size((8192, 2**31), (256, 2**20))
    a, b = (torch.randn(k, k, device=given.device).to(given.dtype) for _ in range(2))
    product = given.rate(lambda: a @ b, 2 * k**3)
    given.tell(f"{given.dtype} product of {k} x {k} matrices, TFLOP/s", product / 1e12)
    source = torch.empty(count, dtype=torch.uint8, device=given.device)
    target = torch.empty_like(source)
    copy = given.rate(lambda: target.copy_(source), 2 * count)
    given.tell("copy on the device, read and written, TB/s", copy / 1e12)
    host = torch.empty(30 << 20, dtype=torch.uint8, pin_memory=not given.dry)
    place = torch.empty_like(host, device=given.device)
    upload = given.rate(lambda: place.copy_(host, non_blocking=True), len(host))
    given.tell("copy to the device, GB/s", upload / 1e9)


def speed(given: Given, network: Any, x: Any, batch: int) -> float:
    """Return tiles a second of a network in batches of tiles like some."""
    tiles = x.repeat(-(-batch // len(x)), *[1] * (x.ndim - 1))[:batch]
    return given.rate(lambda: network(tiles), batch)


def timesformer(given: Given) -> None:
    """Measure TimeSformer alone: the package's, ours, and ours with the kernels."""
    given.begin()
    from inkdask.models.fast import prepare

    plain, network, tiles = timesformers(given)
    expected, x = exact(plain, tiles.transpose(1, 2)), tiles.to(given.dtype)
    batches = given.size((256, 128, 512), (2,))
    with given.autocast("bfloat16"):
        found = speed(given, plain, tiles.transpose(1, 2), batches[0])
    given.tell(f"reference, autocast, batch {batches[0]}, tiles/s", found)
    prepare(network, given.dtype)
    found = speed(given, network, x, batches[0])
    given.tell(f"ours, eager, batch {batches[0]}, tiles/s", found)

    from inkdask.models import kernels

    with given.timed("first pass with kernels"):
        fused = kernels.FusedTimeSformer(network)
        probabilities(fused, x).sum().item()
    given.within("ours with kernels, against float32", probabilities(fused, x), expected, 0.03)
    best = 0.0
    for batch in batches:
        found = speed(given, fused, x, batch)
        given.tell(f"ours with kernels, batch {batch}, tiles/s", found)
        best = max(best, found)
    given.tell("ours with kernels, best batch, tiles/s", best, ">= 11500")


def resnet3d_50(given: Given) -> None:
    """Measure ResNet3D-50 on tiles of 26 x 64 x 64."""
    goals = {"eager": ">= 4500", "compiled": ">= 8000"}
    resnet(given, "ink_resnet3d_50", given.size((256, 26, 64), (1, 4, 32)), goals)


def resnet3d_152_decoder3d(given: Given) -> None:
    """Measure ResNet3D-152 with the decoder in space, on tiles of 62 x 256 x 256."""
    goals = {"eager": ">= 100", "compiled": ">= 150"}
    resnet(given, "ink_resnet3d_152_decoder3d", given.size((8, 62, 256), (1, 4, 32)), goals)


def resnet(given: Given, name: str, shape: tuple[int, int, int], goals: dict[str, str]) -> None:
    """Measure a ResNet3D alone in batches of a shape (b, z, t): plain, ours, and compiled."""
    torch = given.begin()
    from inkdask.models.fast import prepare
    from inkdask.models.networks import BUILDERS

    batch, layers, tile = shape
    network = BUILDERS[name](layers=layers, tile=tile).eval().requires_grad_(False)
    network = network.to(given.device)
    x = torch.rand(batch, 1, layers, tile, tile, device=given.device)
    measure_norms(network, torch.rand(4, *x.shape[1:], device=given.device))
    expected = exact(network, x)
    with given.autocast("bfloat16"):
        rounding = float((probabilities(network, x) - expected).abs().max())
        given.tell("plain, autocast, against float32", rounding)
        given.tell("plain, autocast, tiles/s", speed(given, network, x, batch))
    prepare(network, given.dtype)
    x = x.to(given.dtype)
    for way, goal in goals.items():
        forward = given.compiled(network, x) if way == "compiled" else network
        # A compiler would compile once more for it.
        with given.poisoned() if way == "eager" else nullcontext():
            found = probabilities(forward, x)
        given.tell(f"ours, {way}, tiles/s", speed(given, forward, x, batch), goal)
        # An untrained network may swing more than a trained one, but no more than the plain way.
        given.within(f"ours, {way}, against float32", found, expected, max(0.03, rounding))
    given.tell("GPU memory, GB", gpu_memory() / 1e9)


def measure_norms(network: Any, x: Any) -> None:
    """Give the batch norms of an untrained network the statistics of some tiles.

    Without them its maps would grow from block to block, and with them the errors of rounding.
    """
    import torch

    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
    network.train()(x)
    network.eval()


def segment(given: Given, name: str, side: int) -> Path:
    """Write a segment of noise with the weights of a network beside it."""
    folder = given.folder / name
    with given.timed("writing the noise"):
        write_noise(folder, side, side, given.layers)
    save_checkpoint(reference_network(), folder / "random.pt")
    (folder / "random.toml").write_text(f"layers = {given.layers}\n")
    return folder


def job(given: Given) -> None:
    """Run two jobs in one process, then the network alone, and check the picture."""
    # Empty, as in a new container: the first job builds its kernels.
    os.environ["TRITON_CACHE_DIR"] = str(given.folder / "triton")
    os.environ["CUPY_CACHE_DIR"] = str(given.folder / "cupy")
    side = given.size(8000, 112)
    folder = segment(given, "job", side)
    with given.timed("imports, which are not the job's"):
        from inkdask import predictor, workflow  # noqa: F401
        from tests.benchmarks.profile_job import run_job
    seconds = []
    for what in ("first job, tiles/s", SECOND):
        start = time.perf_counter()
        tiles = run_job(folder, "auto", layers=(0, given.layers))
        seconds.append(time.perf_counter() - start)
        given.tell(what, tiles / seconds[-1])
    given.tell(f"first of {tiles:,} tiles takes longer by s", seconds[0] - seconds[1], "<= 6")
    given.tell("GPU memory, GB", gpu_memory() / 1e9)
    alone = speed_alone(given)
    given.tell("network alone in this process, tiles/s", alone)
    share = tiles / seconds[1] / alone
    given.tell("second job, of the network alone", share, ">= 0.95")
    check_picture(given, folder, side)


def speed_alone(given: Given) -> float:
    """Return tiles a second of the fastest way to run the network of a job."""
    given.begin()
    from inkdask.models.fast import prepare

    _, network, x = timesformers(given)
    prepare(network, given.dtype)
    if not given.dry:
        from inkdask.models import kernels

        network = kernels.FusedTimeSformer(network)
    x = x.to(given.dtype)
    return max(speed(given, network, x, batch) for batch in given.size((256, 512), (4,)))


def check_picture(given: Given, folder: Path, side: int) -> None:
    """Compare the middle and the last corner of a job's picture with a plain float32 one."""
    given.begin()
    from inkdask.models.hardware import full_float32
    from tests.benchmarks.comparison import differs_from_monai

    picture, window = Path((folder / "result.txt").read_text()), min(256, side)
    corners = sorted({(side - window) // 2, side - window})
    with full_float32():
        worst = [differs_from_monai(folder, picture, corner, window) for corner in corners]
    given.within("picture, against a sliding window in float32, of 255", np.asarray(worst), 0, 3)


def usual(given: Given) -> None:
    """Measure the compiled reference network alone, and fed by a loader that cuts tiles."""
    torch = given.begin()
    import zarr

    from tests.benchmarks.comparison import Tiles

    batch, workers, side = given.size((256, 8, 2048), (2, 2, 128))
    network = reference_network().requires_grad_(False).to(given.device)
    x = torch.rand(batch, given.layers, 1, TILE, TILE, device=given.device)
    prepared, chunk = given.folder / "prepared.zarr", min(1024, side)
    array = zarr.create_array(
        prepared, shape=(side, side, given.layers), chunks=(chunk, chunk, 1), dtype=np.uint8,
        zarr_format=2, compressors=None,
    )  # fmt: skip
    noise = np.random.default_rng(0).integers(1, 256, (side, side), np.uint8)
    for z in range(given.layers):
        array[:, :, z] = np.roll(noise, 7919 * z)
    tiles = Tiles(prepared, STRIDE)
    # Two batches of each worker, so that none works for later.
    some = np.linspace(0, len(tiles) - 1, 2 * workers * batch).astype(int)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(tiles, some.tolist()), batch, num_workers=workers,
        pin_memory=not given.dry,
    )  # fmt: skip
    with given.autocast("float16"):
        network = given.compiled(network, x, mode="reduce-overhead")
        given.tell(COMPILED, speed(given, network, x, batch))
        start, done = time.perf_counter(), 0
        for x, *_ in loader:
            probabilities(network, x.to(given.device)[:, :, None]).cpu()
            done += len(x)
            given.tell(USUAL, done / (time.perf_counter() - start))


def tests(given: Given) -> None:
    """Run the tests that need a GPU."""
    files = [f for f in sorted((ROOT / "tests").glob("test_*.py")) if ".gpu" in f.read_text()]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", "-q", "-rfE", "--tb=short"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *map(str, files)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(done.stdout, flush=True)
    given.tell("pytest -m gpu", done.stdout.strip().splitlines()[-1].strip("= "))
    if done.returncode:
        raise ValueError(f"pytest ended with {done.returncode}")


def cluster(given: Given) -> None:
    """Run a small job on a cluster of a process for each GPU."""
    from tests.benchmarks.profile_job import run_job

    side, kind = given.size((1024, "cuda"), (112, "local"))
    folder = segment(given, "cluster", side)
    with given.timed(f"job of {side} x {side} px with --cluster {kind}"):
        run_job(folder, "auto", layers=(0, given.layers), cluster=kind)
    check_picture(given, folder, side)


def blending(given: Given) -> None:
    """Blend a chunk with NumPy and with CuPy."""
    from inkdask import blending as ours
    from inkdask.tiling import Tiling

    side, k, rng = given.size(2048, 256), 4, np.random.default_rng(0)
    tiling = Tiling.of((2 * side, 2 * side), TILE, STRIDE, side)
    y, x = (ours.strips(axis, 1, k, "hann", 0.0) for axis in (tiling.y, tiling.x))
    grid = rng.random((y[-1].tiles.stop, x[-1].tiles.stop, k, k), np.float32)
    arrays = grid, np.ones((side, side), bool), y, x
    expected = ours._products(np, *arrays)
    ms = 1e3 / given.rate(lambda: ours._products(np, *arrays))
    given.tell(f"chunk of {side} x {side} px by NumPy, ms", ms)
    with given.timed("first chunk by CuPy"):
        import cupy

        if given.dry:
            return  # because CuPy computes on a GPU alone
        found = ours._products(cupy, *arrays).get()
    ms = 1e3 / given.rate(lambda: ours._products(cupy, *arrays).get())
    given.tell("next chunks by CuPy, ms", ms)
    given.within("CuPy, against NumPy", found, expected, 1e-6)
