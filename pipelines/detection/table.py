"""What `hdovd detect` prints. Called by its command."""

from __future__ import annotations

from hdovd.core.errors import counted, shorten
from hdovd.pipelines.common.picture_files import printable
from hdovd.pipelines.detection.detect import DetectResult
from hdovd.pipelines.runs.tables import table_lines

SHOWN_NAMES = 30
SHOWN_SKIPPED = 10


def detect_lines(result: DetectResult) -> list[str]:
    """The first pictures with what was found, every name with its count, and what was skipped."""
    tally, lines = result.tally, []
    if tally.rows:
        rows = [(printable(row.name), f"{row.size[0]}x{row.size[1]}", str(row.count), row.best or "-") for row in tally.rows]
        lines += table_lines(("picture", "size", "found", "best"), rows, {"size", "found"})
        if tally.images > len(rows):
            lines.append(f"... and {tally.images - len(rows):,d} more pictures, in images.json")
        kind = dict(zip(result.names, result.is_novel, strict=True))
        counts = [(name, "novel" if kind[name] else "base", f"{count:,d}", f"{tally.pictures_with[name]:,d}")
                  for name, count in tally.objects.most_common(SHOWN_NAMES)]
        lines += ["", *table_lines(("name", "", "found", "in pictures"), counts, {"found", "in pictures"})]
        none = [name for name in result.names if name not in tally.objects]
        if len(tally.objects) > SHOWN_NAMES:
            lines.append(f"... and {len(tally.objects) - SHOWN_NAMES} more names")
        if none:
            lines.append(f"not found: {shorten(list(none), SHOWN_NAMES)}")
    lines.append(f"{counted(tally.images, 'picture')}, {tally.found:,d} found")
    if skipped := list(result.skipped.values()):
        lines += [f"{counted(len(skipped), 'picture')} skipped, which cannot be read:",
                  *(f"  {printable(reason)}" for reason in skipped[:SHOWN_SKIPPED])]
        if len(skipped) > SHOWN_SKIPPED:
            lines.append(f"  ... and {len(skipped) - SHOWN_SKIPPED:,d} more, in images.json")
    return lines
