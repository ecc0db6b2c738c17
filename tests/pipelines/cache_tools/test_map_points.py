"""The sample and the figures of `hdovd cache map`, against cache rows and against counts made one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level, Source
from hdovd.data.coco import DataPaths
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.cache_tools.map_points import BLOCK_ROWS, MapPoints, measure, nearest_neighbours, sample_rows, take_points


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize(("rows", "count"), [(0, 5), (1, 5), (5, 5), (1_000, 300), (10_000, 700), (700, 699)])
def test_a_sample_is_of_different_rows_in_order(rows: int, count: int, in_blocks: bool) -> None:
    found = sample_rows(rows, count, 3, in_blocks=in_blocks)
    assert (np.diff(found) > 0).all()
    assert len(found) == 0 or (found[0] >= 0 and found[-1] < rows)
    assert len(found) == min(rows, count) or (in_blocks and count - BLOCK_ROWS < len(found) <= count)
    assert found.tolist() == sample_rows(rows, count, 3, in_blocks=in_blocks).tolist()
    if rows > 1_000:
        assert found.tolist() != sample_rows(rows, count, 4, in_blocks=in_blocks).tolist()
        if in_blocks:
            assert len(np.unique(found // BLOCK_ROWS)) <= count // BLOCK_ROWS + 2


@pytest.mark.parametrize("mapped", [True, False])
def test_rows_by_number_are_those_of_their_images(cache: Path, mapped: bool) -> None:
    opened = FeatureCache(cache, mapped=mapped)
    image, rows = opened.instances_at(np.arange(opened.row_count()))
    for number in opened.image_ids().tolist():
        own, mine = opened.instances(number), image == number
        for name in rows.__slots__:
            assert np.array_equal(getattr(own, name), getattr(rows, name)[mine]), (number, name)
    some = np.array([0, 3, opened.row_count() - 1])
    assert np.array_equal(opened.instances_at(some)[1].embedding, rows.embedding[some])
    assert opened.instances_at(np.zeros(0, np.int64))[1].embedding.shape == (0, opened.dim)


def test_points_say_what_the_cache_says(cache: Path, world: Path) -> None:
    opened, protocol = FeatureCache(cache), load_protocol(str(world / "protocol.toml"))
    split = DataPaths(world).load("train2017", protocol, base_only=True, log=lambda _: None)
    images = {image.id: image for image in split.images}
    points = take_points(opened, 10_000, 0, images, protocol.names, protocol.base)
    assert points.rows == len(points.name) == opened.row_count()
    assert (points.left_out, points.base.sum()) == (0, sum(len(image.boxes) for image in split.images))
    key = opened.key(Level.CLASS)
    texts = zarr.open_group(str(cache), mode="r")[f"class/{key}/embedding"][:].astype(np.float64)
    classes, nouns, at = opened.names(Level.CLASS), opened.names(Level.NOUN), 0
    for image in split.images:
        rows, labels = opened.instances(image.id), dict(zip(image.annotation_ids.tolist(), image.labels.tolist(), strict=True))
        for k in range(len(rows.box)):
            base = rows.source[k] == Source.BASE_BOX
            name = protocol.base[labels[rows.annotation_id[k]]] if base else (nouns[rows.noun[k]] if rows.noun[k] >= 0 else "")
            cosines = texts @ rows.embedding[k].astype(np.float64)
            assert (points.image[at], points.name[at], points.nearest[at]) == (image.id, name, classes[int(cosines.argmax())])
            assert points.nearest_base[at] == max(protocol.base, key=lambda n: cosines[classes.index(n)])
            expected = cosines[classes.index(name)] if base else rows.noun_cosine[k] if name else np.nan
            assert points.cosine[at] == pytest.approx(expected, abs=2e-3, nan_ok=True)
            at += 1
    few = take_points(opened, 20, 1, {}, (), ())
    assert len(few.name) == 20
    assert {name for name, base in zip(few.name, few.base, strict=True) if base} == {""}


def _points(embedding: np.ndarray, names: list[str], source: list[int], nearest: list[str]) -> MapPoints:
    n = len(names)
    return MapPoints(embedding.astype(np.float32), np.arange(n), np.zeros((n, 4), np.float32), np.array(source, np.uint8),
                     np.ones(n, np.float32), names, np.zeros(n, np.float32), nearest, np.zeros(n, np.float32), nearest, 0, n)


def test_neighbours_one_by_one() -> None:
    points = np.random.default_rng(0).normal(size=(700, 3))
    near = nearest_neighbours(points, 4)
    for k in (0, 1, 511, 512, 699):
        distance = np.linalg.norm(points - points[k], axis=1)
        assert near[k].tolist() == np.argsort(distance)[1:5].tolist()
    assert nearest_neighbours(points[:3]).shape == (3, 2)
    assert nearest_neighbours(points[:1]).shape == (1, 0)
    assert k not in near[k]


def test_figures_of_a_case_counted_by_hand() -> None:
    """Two groups of 11 far from each other, one box of the first called as the second; the picture mixes nothing."""
    draw = np.random.default_rng(0)
    embedding = np.repeat(np.eye(2, 4), 11, axis=0) + draw.normal(0, 0.01, (22, 4))
    names = ["a"] * 10 + ["b"] + ["b"] * 11
    numbers = measure(_points(embedding, names, [0] * 22, ["a"] * 11 + ["b"] * 11), embedding[:, :2])
    count, here, seen, chance = numbers.pure["base boxes"]
    # each of the ten "a" has nine of its ten neighbours of its name, the lone "b" none, the eleven others all
    assert (count, here, seen) == (22, pytest.approx((10 * 0.9 + 0 + 11) / 22), pytest.approx((10 * 0.9 + 11) / 22))
    assert chance == pytest.approx((10 * 9 + 12 * 11) / (22 * 21))
    assert numbers.named == pytest.approx(21 / 22)
    assert set(numbers.pure) == {"base boxes"}
    assert numbers.kept == 1.0
    assert "95.5% of base boxes" in "\n".join(numbers.lines(22))
    apart = measure(_points(embedding, names, [1] * 22, [""] * 22), draw.normal(size=(22, 2)))
    assert (apart.named, set(apart.pure)) == (None, {"proposals"})
    assert apart.kept is not None
    assert apart.kept < 0.9


def test_figures_of_nothing() -> None:
    numbers = measure(_points(np.zeros((1, 4)), [""], [0], [""]), np.zeros((1, 2)))
    assert (numbers.named, numbers.pure, numbers.kept, len(numbers.lines(1))) == (None, {}, None, 1)
