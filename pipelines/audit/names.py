"""The audit's report of novel names among the nouns: which there are, in which form, and how often they won. Called by `audit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hdovd.pipelines.audit.inputs import Audited
from hdovd.pipelines.audit.report import Check, Verdict
from hdovd.pipelines.nouns.allowed import meaning


def class_of_noun(nouns: Sequence[str], classes: Sequence[str], synonyms: Mapping[str, Sequence[str]]) -> dict[int, str]:
    """The class that a noun names, by the noun's row: its name or a synonym, in whatever form (`nouns.meaning`)."""
    meant = {meaning(own): name for name in reversed(classes) for own in (*synonyms.get(name, ()), name)}
    return {row: meant[form] for row, noun in enumerate(nouns) if (form := meaning(noun)) in meant}


def report_names(audited: Audited) -> Check:
    """A disclosure: captions may name novel classes, and results must say that they did."""
    boxes, novel, name = audited.boxes, audited.protocol.novel, "novel names"
    if boxes.noun is None:
        return Check(name, Verdict.REPORT, "the cache has no nouns: no pseudo box is named")
    if not boxes.nouns:
        return Check(name, Verdict.UNKNOWN, "pseudo boxes have texts that others published without the words: which they are is not known")
    meant = class_of_noun(boxes.nouns, novel, audited.synonyms)
    wins = np.bincount(boxes.noun[boxes.noun >= 0], minlength=len(boxes.nouns))
    of_novel = {row: int(wins[row]) for row in meant}
    named = int((boxes.noun >= 0).sum())
    text = (f"{len(set(meant.values()))} of the {len(novel)} novel classes are named by {len(meant)} of {len(boxes.nouns)} nouns, which "
            f"won {sum(of_novel.values()):,d} of {named:,d} pseudo labels (allowed, since captions name them; say so with results)")
    if not meant:
        text = f"none of the {len(boxes.nouns)} nouns names one of the {len(novel)} novel classes, in singular or plural"
    ordered = sorted(meant, key=lambda row: -of_novel[row])
    details = tuple(f"{boxes.nouns[row]}: {of_novel[row]:,d}" + (f" (for {meant[row]})" if meant[row] != boxes.nouns[row] else "")
                    for row in ordered)
    return Check(name, Verdict.REPORT, text, details, {"nouns": len(boxes.nouns), "pseudo_labels": named, "won": {
        boxes.nouns[row]: {"class": meant[row], "pseudo_labels": of_novel[row]} for row in ordered}})
