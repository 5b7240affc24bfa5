"""Train the demo's network on synthetic segments, and write it where the package keeps it.

Takes about four minutes on two cores::

    python examples/train_demo.py

The text is random letters, so nothing that ``inkdask demo`` shows was learned by heart.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits

from inkdask.demo import letters, synthetic
from inkdask.models import depth_cnn
from inkdask.models.registry import KNOWN

DEMO = KNOWN["demo"]
SEGMENTS, BATCH = 32, 32

Segment = tuple[NDArray[np.uint8], NDArray[np.bool_]]  # volume (z, y, x) and truth (y, x)
WEIGHTS = Path(depth_cnn.__file__).with_name("demo.safetensors")


def main() -> None:
    """Make segments, train, measure on a segment that was held out, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="weights file to write")
    parser.add_argument("--steps", type=int, default=700, help="batches of 32 tiles")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    *seen, unseen = [make_segment(rng) for _ in range(SEGMENTS + 1)]
    network = train(seen, args.steps, rng)
    network.eval()
    with torch.inference_mode():
        tiles, truth = batch([unseen], 512, rng)
        loss = binary_cross_entropy_with_logits(network(tiles), truth).item()
    print(f"held-out loss {loss:.4f}")

    command = f"python examples/train_demo.py --steps {args.steps} --seed {args.seed}"
    metadata = {"trained_by": command, "seed": str(args.seed), "licence": "MIT"}
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, args.out, metadata)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


def make_segment(rng: np.random.Generator) -> Segment:
    """Return volume and truth of 3 to 6 lines of random letters."""
    lines = rng.integers(3, 7)
    text = ["".join(rng.choice(list(letters.ALPHABET), 3 * lines)) for _ in range(lines)]
    seed = int(rng.integers(1000, 1_000_000))
    volume, truth = synthetic.segment(text, 480, 960, DEMO.layers, seed)
    return (volume >> 8).astype(np.uint8), truth


def train(segments: list[Segment], steps: int, rng: np.random.Generator) -> torch.nn.Module:
    """Train from scratch with AdamW and one cycle of the learning rate."""
    network = depth_cnn.ink_depth_cnn(DEMO.layers, DEMO.tile)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        tiles, truth = batch(segments, BATCH, rng)
        loss = binary_cross_entropy_with_logits(network(tiles), truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}  loss {np.mean(losses[-50:]):.4f}  {seconds:.0f} s", flush=True)
    return network


def batch(segments: list[Segment], size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Cut random tiles, as the pipeline hands them to a network, and the ink they should show.

    Returns
    -------
    tiles
        float32 (b, 1, z, t, t).
    truth
        float32 (b, 1, k, k): the share of each square of pixels that is inked.
    """
    cut = [tile(segments[rng.integers(len(segments))], rng) for _ in range(size)]
    voxels, truth = (torch.from_numpy(np.stack(part))[:, None] for part in zip(*cut, strict=True))
    tiles = voxels.clamp(max=DEMO.clip).float() / DEMO.divisor
    return tiles, avg_pool2d(truth.float(), DEMO.pixels_per_logit)


def tile(segment: Segment, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Cut one random tile, flipped at random in the plane (never in depth: ink has a side)."""
    volume, truth = segment
    height, width = truth.shape
    y, x = rng.integers(height - DEMO.tile + 1), rng.integers(width - DEMO.tile + 1)
    window = (..., slice(y, y + DEMO.tile), slice(x, x + DEMO.tile))
    flip = (..., slice(None, None, rng.choice([-1, 1])), slice(None, None, rng.choice([-1, 1])))
    return volume[window][flip], truth[window][flip]


if __name__ == "__main__":
    main()
