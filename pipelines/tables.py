"""Results as text tables. AP in percent; a group without ground truth shows as -."""

from __future__ import annotations

from hdovd.coco_ap import GROUPS, AveragePrecision
from hdovd.pipelines.evaluate import EvalResult


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


def _values(ap: AveragePrecision) -> list[float | None]:
    summary = ap.summary()
    return [summary[kind][group] for kind in ("ap50", "ap") for group in GROUPS]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
