"""The small pictures of the demo: which images they are of, and that they are small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from hdovd.pipelines.demo.run import image_with_most_proposals, small_pictures, telling_pictures
from hdovd.pipelines.demo.world import NOVEL


def test_the_first_pictures_with_two_novel_objects(world: Path) -> None:
    tree = json.loads((world / "annotations" / "instances_val2017.json").read_text())
    novel = {c["id"] for c in tree["categories"] if c["name"] in NOVEL}
    counts = {
        image["file_name"]: sum(a["image_id"] == image["id"] and a["category_id"] in novel for a in tree["annotations"])
        for image in tree["images"]
    }
    shown = telling_pictures(world, NOVEL)
    assert all(file.is_file() for file in shown)
    assert [file.name for file in shown] == sorted(counts, key=lambda name: counts[name] < 2)[:3]


def test_the_image_with_the_most_proposals(tmp_path: Path) -> None:
    file = tmp_path / "proposals.json"
    file.write_text(json.dumps([{"image_id": i} for i in (4, 9, 9, 2, 7, 7)]))
    assert image_with_most_proposals(file) == 9


def test_pictures_are_made_small_and_stand_side_by_side(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = []
    for k, size in enumerate(((500, 400), (300, 600), (1400, 1000))):
        files.append(tmp_path / f"{k}.png")
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(files[-1])
    made = small_pictures(files, files[2], tmp_path / "out")
    assert [file.name for file in made] == ["detections.jpg", "cache-view.jpg"]
    sizes = [Image.open(file).size for file in made]
    assert sizes[1] == (900, 643)
    assert sizes[0] == (900, round(900 * 400 / (500 + 200 + 560 + 12)))  # all as high as the lowest, gaps between them
