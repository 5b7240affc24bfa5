"""How far the probabilities of each precision are from those of the plain network.

    python -m tests.benchmarks.exactness [--tiles TILES]

TimeSformer with random weights, whose last layer is scaled until probabilities spread from 0.1 to
0.9, on tiles of noise. The plain network is that of ``timesformer-pytorch`` in float32. A blended
pixel is the mean of sixteen tiles, and nearer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from inkdask.models.fast import prepare
from inkdask.models.hardware import fast_float32, full_float32, has_int8, native_dtype
from inkdask.models.int8 import convert
from inkdask.models.packed import pack_if_it_can
from inkdask.models.timesformer import TimeSformer
from tests.benchmarks._common import LAYERS, TILE, reference_network, table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 8


def ways() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Networks from tiles (b, 1, f, 64, 64) to logits, the plain one first."""
    plain = reference_network().to(DEVICE)

    def run(x: Tensor) -> Tensor:
        with full_float32():
            return plain(x.transpose(1, 2))

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return run(x)

    yield "plain, float32", run
    yield "plain, bfloat16 autocast", autocast
    for dtype in dict.fromkeys((torch.float32, native_dtype(DEVICE))):
        yield f"inkdask, {str(dtype).removeprefix('torch.')}", prepared(plain, dtype)
    if has_int8(DEVICE):
        network = ours(plain)
        convert(network, native_dtype(DEVICE))
        yield "inkdask, int8", network


def prepared(plain: torch.nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The project's network in a dtype."""
    network = ours(plain)
    prepare(network, dtype)
    pack_if_it_can(network)
    return lambda x: network(x.to(dtype))


def ours(plain: torch.nn.Module) -> TimeSformer:
    """The same weights in the project's network."""
    network = TimeSformer(LAYERS).eval().requires_grad_(False)
    network.load_state_dict(plain.state_dict())
    return network.to(DEVICE)


@fast_float32(DEVICE)  # as a job computes
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiles", type=int, default=64)
    given = parser.parse_args()
    shape = given.tiles, 1, LAYERS, TILE, TILE
    tiles = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = {}
    with torch.inference_mode():
        for name, network in ways():
            logits = torch.cat([network(batch).flatten(1) for batch in tiles.split(BATCH)])
            found[name] = 255 * logits.double().sigmoid()
    exact, *_ = found.values()
    print(f"{len(exact)} tiles, {exact.numel()} probabilities; differences in 255ths.\n")
    errors = {name: (values - exact).abs() for name, values in found.items()}
    rows = (
        (name, *(f"{figure:.3f}" for figure in (error.square().mean().sqrt(), error.max())))
        for name, error in errors.items()
        if error is not errors["plain, float32"]
    )
    table(("way", "root mean square", "largest"), rows)


if __name__ == "__main__":
    main()
