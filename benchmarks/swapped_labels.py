"""Wrong labels found by `hdovd search --suspicious`: a share of a data set's base labels is swapped, and so many boxes
are asked for.

    python benchmarks/swapped_labels.py DEMO [--share 0.05] [--draws 3]

DEMO is the folder of a finished `hdovd demo`, of which nothing is changed. Prints the share of what is found that was
swapped, draw by draw.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from arguments import workplace

from hdovd.cache.reader import FeatureCache
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.search.config import SearchConfig
from hdovd.pipelines.search.search import search


def swapped(demo: Path, out: Path, share: float, seed: int) -> set[int]:
    """Write `out`, the annotations with a share of the base labels swapped for other base labels; returns the ids of
    those.
    """
    tree = json.loads((demo / "world" / "annotations" / "instances_train2017.json").read_text())
    base = set(load_protocol(str(demo / "world" / "protocol.toml")).base)
    classes = sorted(entry["id"] for entry in tree["categories"] if entry["name"] in base)
    labelled = [entry for entry in tree["annotations"] if entry["category_id"] in classes]
    draw = np.random.default_rng(seed)
    chosen = draw.choice(len(labelled), round(share * len(labelled)), replace=False)
    for number in chosen.tolist():
        place = classes.index(labelled[number]["category_id"]) + int(draw.integers(1, len(classes)))
        labelled[number]["category_id"] = classes[place % len(classes)]
    out.write_text(json.dumps(tree))
    return {labelled[number]["id"] for number in chosen.tolist()}


def precision(demo: Path, annotations: Path, wrong: set[int]) -> float:
    """The share of swapped ones among the len(wrong) most suspicious boxes."""
    data = DataPaths(annotations=annotations)
    config = SearchConfig(cache=demo / "cache", data=data, suspicious=True, count=len(wrong))
    cache = FeatureCache(demo / "cache")
    found = [int(cache.instances(hit.image_id).annotation_id[hit.row or 0]) for hit in search(config)]
    return len(wrong & set(found)) / len(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--draws", type=int, default=3)
    asked = parser.parse_args()
    with workplace() as place:
        for seed in range(asked.draws):
            wrong = swapped(asked.demo, place / "instances.json", asked.share, seed)
            found = precision(asked.demo, place / "instances.json", wrong)
            print(f"draw {seed}: {len(wrong)} labels swapped, precision {found:.3f}")


if __name__ == "__main__":
    main()
