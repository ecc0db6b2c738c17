"""Results as text tables. AP in percent; a group without ground truth shows as -."""

from __future__ import annotations

from hdovd.evaluation.coco import GROUPS, AveragePrecision
from hdovd.evaluation.tide import ERRORS, ErrorBreakdown
from hdovd.pipelines.evaluation.evaluate import EvalResult


def result_table(result: EvalResult) -> str:
    """Novel, base and all of one evaluation, split-blind beside it."""
    protocol = result.protocol
    lines = [f"protocol {protocol.name}: {len(protocol.base)} base and {len(protocol.novel)} novel classes in one run, "
             f"{result.images} images, AP in percent",
             f"{'':34s}{'AP50':>22s}{'AP':>24s}", f"{'':34s}" + "".join(f"{g:>8s}" for g in GROUPS * 2)]
    combined = f"combined (a={result.alpha:g}, b={result.beta:g})" if result.alpha or result.beta else "classification score alone"
    rows = {combined: result.combined, "split-blind (a=b=0)": result.split_blind}
    lines += [f"{name:34s}" + "".join(f"{_number(v):>8s}" for v in _values(ap)) for name, ap in rows.items()]
    absent = result.combined.without_ground_truth()
    if absent:
        lines.append(f"{len(absent)} classes without ground truth are left out of the means: {', '.join(absent)}")
    elif protocol.novel:
        base, novel = len(protocol.base), len(protocol.novel)
        lines.append(f"checked: all = ({base}*base + {novel}*novel)/{base + novel}")
    return "\n".join(lines)


def class_table(result: EvalResult) -> str:
    """AP of every class."""
    lines = [f"{'class':24s}{'':8s}{'AP50':>8s}{'AP':>8s}"]
    for label, (name, ap) in enumerate(result.combined.per_class().items()):
        kind = "novel" if label >= len(result.protocol.base) else "base"
        lines.append(f"{name:24s}{kind:8s}{_number(ap['ap50']):>8s}{_number(ap['ap']):>8s}")
    return "\n".join(lines)


def error_table(errors: ErrorBreakdown) -> str:
    """How many errors of each kind the groups have, and the AP50 that mending them would gain."""
    parts = [errors.groups[group] for group in GROUPS]
    rows: list[tuple[str, list[tuple[int, float | None]]]] = [
        *((kind.value, [(part.counts[kind], part.gains[kind]) for part in parts]) for kind in ERRORS),
        ("all wrong detections", [(part.false_positives, part.false_positive_gain) for part in parts]),
        ("all objects not found", [(part.false_negatives, part.false_negative_gain) for part in parts])]
    lines = ["errors at IoU 0.5: how many, and the AP50 gained if that kind alone were mended",
             f"{'':24s}" + "".join(f"{group:>20s}" for group in GROUPS), f"{'':24s}" + f"{'count':>11s}{'dAP50':>9s}" * len(GROUPS)]
    lines += [f"{name:24s}" + "".join(f"{count:>11,d}{_signed(gain):>9s}" for count, gain in cells) for name, cells in rows]
    shares = [f"{part.found:,d} of {part.objects:,d}" for part in parts]
    lines.append(f"{'objects found':24s}" + "".join(f"{share:>20s}" for share in shares))
    lines.append(f"{'classification errors':24s}" + "".join(f"{f'named {named}':>20s}" for named in ("novel", "base")))
    lines += [f"{f'  of {truth} objects':24s}" + "".join(f"{errors.misnamed[truth][named]:>20,d}" for named in ("novel", "base"))
              for truth in ("novel", "base")]
    return "\n".join(lines)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"


def _values(ap: AveragePrecision) -> list[float | None]:
    summary = ap.summary()
    return [summary[kind][group] for kind in ("ap50", "ap") for group in GROUPS]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
