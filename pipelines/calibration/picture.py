"""The picture of a calibration: which cosines right and wrong labels have, and the weight that was fitted."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hdovd.pipelines.calibration.fit import Fit
from hdovd.pipelines.common.atomic_write import write_picture
from hdovd.pipelines.common.charts import ticks

RIGHT, WRONG, CURVE, GRID = (40, 110, 220), (230, 120, 20), (20, 20, 20), (215, 215, 215)
WIDTH, HEIGHT, LEFT, TOP, RIGHT_MARGIN, BOTTOM = 900, 520, 70, 70, 70, 60
BINS = 80


def draw_calibration(right: np.ndarray, wrong: np.ndarray, fit: Fit, file: Path) -> None:
    """Write `file`, a PNG: histograms of cosines as shares of their kind on the left axis, the weight on the right
    one."""
    low, high = _range(right, wrong)
    edges = np.linspace(low, high, BINS + 1)
    shares = [np.histogram(np.clip(cosines, low, high), edges)[0] / len(cosines) for cosines in (wrong, right)]
    top = max(share.max() for share in shares) * 1.05
    most = 1.1 * max(1.0, fit.scale)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(canvas, "RGBA"), ImageFont.load_default(14)
    bottom, across, up = HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT_MARGIN, HEIGHT - BOTTOM - TOP

    def x(cosine: float) -> float:
        return LEFT + across * (cosine - low) / (high - low)

    def y(part: float) -> float:
        return bottom - up * part

    for cosine in ticks(low, high):
        pen.line((x(cosine), TOP, x(cosine), bottom), fill=GRID)
        pen.text((x(cosine), bottom + 6), f"{cosine:.3g}", fill="black", font=font, anchor="ma")
    for share, colour in zip(shares, (WRONG, RIGHT), strict=True):
        for left, stop, value in zip(edges[:-1], edges[1:], share, strict=True):
            if value:
                pen.rectangle((x(left), y(value / top), x(stop) - 1, bottom), fill=(*colour, 130), outline=colour)
    for part in ticks(0, top):
        pen.text((LEFT - 6, y(part / top)), f"{100 * part:.3g}%", fill="black", font=font, anchor="rm")
    for weight in ticks(0, most):
        pen.text((WIDTH - RIGHT_MARGIN + 6, y(weight / most)), f"{weight:.3g}", fill="black", font=font, anchor="lm")
    along = np.linspace(low, high, 400)
    pen.line(
        [(x(c), y(w / most)) for c, w in zip(along.tolist(), fit.weights(along).tolist(), strict=True)],
        fill=CURVE,
        width=3,
    )
    if low < fit.centre < high:
        pen.line((x(fit.centre), TOP, x(fit.centre), bottom), fill=CURVE, width=1)
    pen.rectangle((LEFT, TOP, WIDTH - RIGHT_MARGIN, bottom), outline="black")
    pen.text(
        (LEFT, 10),
        f"weight = {fit.scale:.3f} * sigmoid((cosine - {fit.centre:.4f}) / {fit.width:.4f}), the black line, right "
        f"axis; AUC {fit.auc:.3f}",
        fill="black",
        font=font,
    )
    pen.text((LEFT, 30), f"{len(right):,d} right labels, share of them in each bin", fill=RIGHT, font=font)
    pen.text(
        (LEFT + across // 2, 30),
        f"{len(wrong):,d} wrong labels: the best wrong name of each box",
        fill=WRONG,
        font=font,
    )
    pen.text(
        (LEFT + across // 2, HEIGHT - 8),
        "cosine of the crop's and the label's embedding",
        fill="black",
        font=font,
        anchor="ms",
    )
    write_picture(file, canvas, "PNG")


def _range(right: np.ndarray, wrong: np.ndarray) -> tuple[float, float]:
    """What nearly all cosines lie in; the outermost are shown in the outermost bins."""
    both = np.concatenate([np.quantile(right, (0.001, 0.999)), np.quantile(wrong, (0.001, 0.999))])
    margin = 0.02 * (both.max() - both.min()) + 1e-6
    return float(both.min() - margin), float(both.max() + margin)
