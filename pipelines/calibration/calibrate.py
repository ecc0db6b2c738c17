"""`hdovd calibrate`: the reliability weight of pseudo labels, `w = scale * sigmoid((cos(v, u) - centre) / width)`,
fitted to a cache's own base boxes (METHOD section 2), drawn and written to a file. No CLIP, and nothing novel is read.

It is the weight that extract-clip fits to a set (`extraction.label_weights` says how), found again from the files of
nouns. Sets that have none, such as imports and older ones, get theirs here.
"""

from pathlib import Path
from shlex import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, log
from hdovd.data import Protocol, Split
from hdovd.pipelines.calibration.config import CalibrateConfig
from hdovd.pipelines.calibration.values import Calibration, origin_of
from hdovd.pipelines.common.atomic_write import write_picture, write_text
from hdovd.pipelines.common.pages import ticks
from hdovd.pipelines.extraction.identities import box_table, offered_input, read_synonyms
from hdovd.pipelines.extraction.label_weights import LEAST, Evidence, Fit, expectation, label_evidence, same_prompts
from hdovd.pipelines.extraction.source import extraction_of
from hdovd.pipelines.nouns.allowed import offered_nouns

RIGHT, WRONG, CURVE, GRID, BLACK = (40, 110, 220), (230, 120, 20), (20, 20, 20), (215, 215, 215), (0, 0, 0)
WIDTH, HEIGHT, LEFT, TOP, RIGHT_MARGIN, BOTTOM = 900, 520, 70, 70, 70, 60
BINS = 80


def draw_calibration(right: np.ndarray, wrong: np.ndarray, fit: Fit, file: Path) -> None:
    """Write `file`, a PNG: histograms of cosines as shares of their kind on the left axis, the weight on the right
    one."""
    low, high = _range(right, wrong)
    edges, along = np.linspace(low, high, BINS + 1), np.linspace(low, high, 400)
    shares = [np.histogram(np.clip(cosines, low, high), edges)[0] / len(cosines) for cosines in (wrong, right)]
    top, most = max(share.max() for share in shares) * 1.05, 1.1 * max(1.0, fit.scale)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(canvas, "RGBA"), ImageFont.load_default(14)
    bottom, across, up = HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT_MARGIN, HEIGHT - BOTTOM - TOP

    def x(cosine: float) -> float:
        return LEFT + across * (cosine - low) / (high - low)

    def y(part: float) -> float:
        return bottom - up * part

    for cosine in ticks(low, high):
        pen.line((x(cosine), TOP, x(cosine), bottom), fill=GRID)
    for share, colour in zip(shares, (WRONG, RIGHT), strict=True):
        for left, stop, value in zip(edges[:-1], edges[1:], share, strict=True):
            if value:
                pen.rectangle((x(left), y(value / top), x(stop) - 1, bottom), fill=(*colour, 130), outline=colour)
    pen.line(
        [(x(c), y(w / most)) for c, w in zip(along.tolist(), fit.weights(along).tolist(), strict=True)],
        fill=CURVE,
        width=3,
    )
    if low < fit.centre < high:
        pen.line((x(fit.centre), TOP, x(fit.centre), bottom), fill=CURVE, width=1)
    pen.rectangle((LEFT, TOP, WIDTH - RIGHT_MARGIN, bottom), outline="black")
    words: list[tuple[float, float, str, tuple[int, int, int], str]] = [
        *((x(cosine), bottom + 6, f"{cosine:.3g}", BLACK, "ma") for cosine in ticks(low, high)),
        *((LEFT - 6, y(part / top), f"{100 * part:.3g}%", BLACK, "rm") for part in ticks(0, top)),
        *((WIDTH - RIGHT_MARGIN + 6, y(w / most), f"{w:.3g}", BLACK, "lm") for w in ticks(0, most)),
        (
            LEFT,
            10,
            f"weight = {fit.scale:.3f} * sigmoid((cosine - {fit.centre:.4f}) / {fit.width:.4f}), the black line, right "
            f"axis; AUC {fit.auc:.3f}",
            BLACK,
            "la",
        ),
        (LEFT, 30, f"{len(right):,d} right labels, share of them in each bin", RIGHT, "la"),
        (LEFT + across // 2, 30, f"{len(wrong):,d} wrong labels", WRONG, "la"),
        (LEFT + across // 2, HEIGHT - 8, "cosine of the crop's and the label's embedding", BLACK, "ms"),
    ]
    for left, top_px, text, colour, anchor in words:
        pen.text((left, top_px), text, fill=colour, font=font, anchor=anchor)
    write_picture(file, canvas, "PNG")


def _range(right: np.ndarray, wrong: np.ndarray) -> tuple[float, float]:
    """What nearly all cosines lie in; the outermost are shown in the outermost bins."""
    both = np.concatenate([np.quantile(right, (0.001, 0.999)), np.quantile(wrong, (0.001, 0.999))])
    margin = 0.02 * (both.max() - both.min()) + 1e-6
    return float(both.min() - margin), float(both.max() + margin)


def calibrate(config: CalibrateConfig) -> Calibration:
    """Fit, write the values and the picture. Raises HdovdError if the set does not fit the data, or nothing can be
    fitted.
    """
    config.check()
    cache = FeatureCache(config.cache, config.features)
    _require_prompts(cache)
    cache.require_together()
    split, protocol = config.load_for(cache)
    cache.require(Level.BOXES, {"base_boxes": box_table(split.images, {}).inputs()["base_boxes"]})
    found = _evidence(cache, split, protocol, config)
    right, wrong = found.cosines[found.right], found.cosines[~found.right]
    if min(len(right), len(wrong)) < LEAST:
        raise HdovdError(
            f"set {config.features} of {config.cache}, {len(found.right)} base boxes of {found.classes} classes: "
            f"{len(right)} right and {len(wrong)} wrong labels are too few, expected {LEAST} or more of each"
        )
    fitted = found.fitted_to(cache)
    log(*expectation(cache, fitted))
    fit = Fit(*(fitted[name] for name in ("centre", "width", "scale", "auc")))
    result = Calibration(
        fit.centre,
        fit.width,
        fit.scale,
        fitted_on={
            "cache": cache.identity()["path"],
            "features": config.features,
            "protocol": protocol.name,
            "classes": list(protocol.base),
            "levels": {str(level): cache.key(level) for level in cache.levels()},
            "way": origin_of(cache).way(),
            "base_boxes": cache.key_inputs(Level.BOXES)["base_boxes"],
        },
        found={
            "boxes": len(found.right),
            "named_rightly": len(right),
            "auc": fit.auc,
            "right_mean": float(right.mean()),
            "wrong_mean": float(wrong.mean()),
            "weight_of_right": float(fit.weights(right).mean()),
            "weight_of_wrong": float(fit.weights(wrong).mean()),
        },
    )
    picture = config.out.with_suffix(".png")
    draw_calibration(right, wrong, fit, picture)
    write_text(config.out, result.to_toml())
    log(
        f"wrote {config.out} and {picture}; next: hdovd train --cache {quote(str(config.cache))} --calibration "
        f"{quote(str(config.out))} ..."
    )
    return result


def _evidence(cache: FeatureCache, split: Split, protocol: Protocol, config: CalibrateConfig) -> Evidence:
    """The labels of base boxes whose classes are held out, with the nouns that images offer by the files of the
    extraction; where that is not known, all of them. Raises HdovdError if the files are not there, or have changed
    since.
    """
    if not (cache.set.made_from and cache.known_nouns()):
        return label_evidence(cache, split, [(name,) for name in protocol.base], None)
    made = extraction_of(cache.set, config.cache, config.features)
    nouns = offered_nouns(made.nouns, made.vocabulary, made.captions)
    if (
        nouns is None
        or list(nouns.vocabulary) != list(cache.names(Level.NOUN))
        or offered_input(nouns, cache.image_ids().tolist()) != cache.key_inputs(Level.PSEUDO_LABEL).get("offered")
    ):
        raise HdovdError(
            f"{made.nouns or made.captions or made.vocabulary} is not what set {config.features} of {config.cache} was "
            f"made from any more: run its extract-clip command again, and then this one"
        )
    synonyms = {} if made.synonyms is None else read_synonyms(made.synonyms, protocol.names)
    return label_evidence(cache, split, [(name, *synonyms.get(name, ())) for name in protocol.base], nouns.by_image)


def _require_prompts(cache: FeatureCache) -> None:
    """Raises HdovdError if the classes' embeddings are of other prompts than the nouns', whose cosines are to be
    weighed.
    """
    if not same_prompts(cache):
        classes, nouns = cache.key_inputs(Level.CLASS), cache.key_inputs(Level.NOUN)
        raise HdovdError(
            f"{cache.url}: the nouns are of the prompts {nouns['templates']}, the classes "
            + ("of a file of embeddings" if "class_embeddings" in classes else f"of {classes.get('templates')}")
            + ": their cosines say nothing of the nouns'. Extract a set of the same prompts beside it (the same "
            "extract-clip "
            "command with --features plain and without --class-embeddings: texts alone), and calibrate with --features "
            "plain"
        )
