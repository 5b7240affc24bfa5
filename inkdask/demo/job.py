"""Demo: a synthetic segment, the real job, and a picture beside the layers and the truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from inkdask.demo import synthetic
from inkdask.errors import InkdaskError
from inkdask.storage.scratch import Scratch

LAYERS = 26


@dataclass(frozen=True)
class DemoResult:
    """Pictures of a demo, and their AUC over the pixels of the papyrus.

    An AUC is the chance that a pixel with ink scores higher than one without: 0.5 is no better than
    guessing, 1 is always right. For layers, dark ink counts like bright ink.

    Attributes
    ----------
    prediction, truth, side_by_side
        Files of the pictures.
    auc, auc_mean, auc_layer
        AUC of the prediction, of the mean over all layers, and of the best single layer.
    layer
        Number of the best single layer.
    """

    prediction: Path
    truth: Path
    side_by_side: Path
    auc: float
    auc_mean: float
    auc_layer: float
    layer: int

    def __str__(self) -> str:
        return (
            "How well ink can be told from papyrus (AUC; 0.5: not at all, 1: always):\n"
            f"  best single layer ({self.layer:02d})   {self.auc_layer:.3f}\n"
            f"  mean of all layers       {self.auc_mean:.3f}\n"
            f"  prediction               {self.auc:.3f}\n"
            f"See {self.side_by_side}. Next:\n"
            f"  inkdask info {self.prediction}\n"
            "  inkdask run SEGMENT --model timesformer-scroll5   your own segment\n"
            "  jupyter lab examples/explore.ipynb                 the same in a notebook\n"
            "README, section Your own segment, says where segments are."
        )


def run(out: Path, height: int = 640, width: int = 1664) -> DemoResult:
    """Make a segment, predict its ink with the bundled network, and show both side by side.

    Writes ``layers/``, ``truth.png``, ``predictions/`` and ``side-by-side.png`` to the folder
    ``out``, and replaces an earlier demo there. Other files of these names are refused.
    """
    out = Path(out)
    try:
        volume, truth = synthetic.write_segment(out, height=height, width=width, layers=LAYERS)
    except OSError as error:
        raise InkdaskError(f"The demo cannot write to {out}: {error.strerror or error}.") from error
    prediction = _predict(out)
    ink = np.asarray(Image.open(prediction))

    volume = (volume >> 8).astype(np.uint8)
    papyrus = volume.max(axis=0) > 0
    total = volume.sum(axis=0, dtype=np.uint16)  # ranks pixels as the mean does
    of_layers = [_either_way(auc(layer[papyrus], truth[papyrus])) for layer in volume]
    best = int(np.argmax(of_layers))
    result = DemoResult(
        prediction=prediction,
        truth=out / "truth.png",
        side_by_side=out / "side-by-side.png",
        auc=auc(ink[papyrus], truth[papyrus]),
        auc_mean=_either_way(auc(total[papyrus], truth[papyrus])),
        auc_layer=of_layers[best],
        layer=best,
    )
    panels = [
        ("Best single layer", result.auc_layer, _stretch(volume[best], papyrus)),
        ("Mean of all layers", result.auc_mean, _stretch(total, papyrus)),
        ("Prediction", result.auc, _on_papyrus(ink, papyrus)),
        ("Truth", None, _on_papyrus(truth * np.uint8(255), papyrus)),
    ]
    side_by_side(panels).save(result.side_by_side, pnginfo=synthetic.NOTE)
    return result


def auc(score: NDArray[np.integer], truth: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve of a score, whole numbers from 0; ties count half."""
    bins = int(score.max()) + 1
    ink = np.bincount(score[truth], minlength=bins).astype(float)
    bare = np.bincount(score[~truth], minlength=bins).astype(float)
    return float(ink @ (np.cumsum(bare) - bare / 2) / (ink.sum() * bare.sum()))


def _predict(out: Path) -> Path:
    """Run the whole job with default settings, whatever the environment says."""
    from inkdask.settings import Settings
    from inkdask.workflow import run as run_job

    options = {name: field.get_default() for name, field in Settings.model_fields.items()}
    del options["s3_path"]
    with Scratch() as scratch:
        options |= {
            "model": "demo",
            "start_layer": 0,
            "end_layer": LAYERS,
            "direction": "forward",
            "chunk_size": 256,  # because the progress bar moves chunk by chunk
            "batch_size": 64,  # because the network is small
            "compile": False,  # because compiling takes longer than the work
            "zarr_output_dir": str(scratch),
            "result_file": scratch / "result.txt",
        }
        return Path(run_job(out, **options))


def _either_way(value: float) -> float:
    return max(value, 1 - value)


# The picture is drawn in grey and coloured at the end, from the colour of charred papyrus to ivory.
_DARK, _IVORY = np.array([17, 15, 14]), np.array([250, 243, 229])
_PAGE, _DIM, _BRIGHT = 0, 140, 235  # shades of the page, of figures and of titles
_WIDTH, _MARGIN, _GUTTER, _CAPTION = 1600, 40, 40, 30  # pixels


def side_by_side(panels: list[tuple[str, float | None, NDArray[np.uint8]]]) -> Image.Image:
    """Draw captioned pictures in two columns, 1,600 pixels wide, with a palette.

    Parameters
    ----------
    panels
        Title, AUC or None, and picture, uint8 (y, x); all pictures have one size.
    """
    height, width = panels[0][2].shape
    wide = (_WIDTH - 2 * _MARGIN - _GUTTER) // 2
    high = round(wide * height / width)
    row = _CAPTION + 18 + high + _GUTTER
    page = Image.new("L", (_WIDTH, 2 * _MARGIN - _GUTTER + row * ((len(panels) + 1) // 2)), _PAGE)
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(_CAPTION)
    for n, (title, value, picture) in enumerate(panels):
        x, y = _MARGIN + n % 2 * (wide + _GUTTER), _MARGIN + n // 2 * row
        base = y + _CAPTION
        pen.text((x, base), title, fill=_BRIGHT, font=font, anchor="ls")
        if value is not None:
            after = x + pen.textlength(title, font) + _CAPTION / 2
            pen.text((after, base), f"AUC {value:.3f}", fill=_DIM, font=font, anchor="ls")
        small = Image.fromarray(picture).resize((wide, high), Image.Resampling.LANCZOS)
        page.paste(small, (x, base + 18))
    ramp = _DARK + np.linspace(0, 1, 256)[:, None] * (_IVORY - _DARK)
    page.putpalette(ramp.round().astype(np.uint8).tobytes())
    return page


def _stretch(picture: NDArray[np.integer], papyrus: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Stretch the greys of the papyrus to the whole range; 1 % at either end is clipped."""
    low, high = np.percentile(picture[papyrus], [1, 99])
    grey = np.clip((picture.astype(np.float32) - low) / (high - low), 0, 1)
    return _on_papyrus((255 * grey).astype(np.uint8), papyrus)


def _on_papyrus(picture: NDArray[np.uint8], papyrus: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Make the papyrus a little brighter than the page, uint8 (y, x)."""
    return np.where(papyrus, 24 + picture * np.float32(231 / 255), _PAGE).astype(np.uint8)
