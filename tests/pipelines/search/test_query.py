"""What a query becomes: parts as the extraction embeds them, their sum, and parts that cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache, normalised_rows
from hdovd.core import HdovdError
from hdovd.data import DataPaths, Split, load_protocol
from hdovd.pipelines.search.config import SearchConfig, weighted
from hdovd.pipelines.search.search import opened, query_of


@pytest.fixture
def query(cache: Path) -> Callable[..., np.ndarray]:
    def ask(**asked: Any) -> np.ndarray:
        config = SearchConfig(cache=cache, device="cpu", **asked)
        return query_of(config, opened(config))

    return ask


@pytest.fixture
def split(world: Path) -> Split:
    return DataPaths(world).load("train2017", load_protocol(str(world / "protocol.toml")), base_only=True)


def _unit(row: np.ndarray) -> np.ndarray:
    return np.asarray(normalised_rows(row[None])[0])


def test_weights() -> None:
    assert weighted("red umbrella=2.5") == ("red umbrella", 2.5)
    assert weighted("a=b") == ("a=b", 1.0)
    assert weighted("a=b=2") == ("a=b", 2.0)


def test_words_are_embedded_as_the_class_names_are(cache: Path, query: Callable[..., np.ndarray]) -> None:
    cached = FeatureCache(cache)
    names, rows = cached.names(Level.CLASS), normalised_rows(cached.embeddings(Level.CLASS))
    assert query(queries=(names[3],)) == pytest.approx(rows[3], abs=2e-3)  # the cache is rounded
    both = query(queries=(names[3], f"{names[5]}=2"), not_=(f"{names[0]}=0.5",))
    assert both == pytest.approx(_unit(rows[3] + 2 * rows[5] - 0.5 * rows[0]), abs=3e-3)


def test_a_box_of_a_picture_is_embedded_as_the_boxes_of_the_set_are(
    cache: Path, split: Split, query: Callable[..., np.ndarray]
) -> None:
    cached, image = FeatureCache(cache), split.images[2]
    rows = cached.instances(image.id)
    left, top, right, bottom = rows.box[0].tolist()
    found = query(image=(str(split.path(image)),), box=(left, top, right - left, bottom - top))
    assert found == pytest.approx(_unit(rows.embedding[0].astype(np.float32)), abs=2e-3)
    whole = query(image=(f"{split.path(image)}=3",))
    assert whole == pytest.approx(_unit(cached.image_embedding(image.id).astype(np.float32)), abs=2e-3)


def test_rows_of_the_set_and_of_a_file_need_no_clip(
    cache: Path, kept: list[int], query: Callable[..., np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdovd.pipelines.search.search.load_same_clip", None)
    row = _unit(FeatureCache(cache).instance_embeddings(kept[1])[1].astype(np.float32))
    assert query(like=(f"{kept[1]}:1",)) == pytest.approx(row, abs=1e-6)
    np.save(tmp_path / "one.npy", 7 * row)
    save_file(
        {"rows": torch.from_numpy(np.stack([row, 3 * np.eye(24, dtype=np.float32)[0]]))}, tmp_path / "t.safetensors"
    )
    assert query(embeddings=tmp_path / "one.npy") == pytest.approx(row, abs=1e-6)
    assert query(embeddings=tmp_path / "t.safetensors") == pytest.approx(_unit(row + np.eye(24)[0]), abs=1e-6)


def test_another_clip_is_refused(
    cache: Path, query: Callable[..., np.ndarray], save_clip: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(HdovdError, match=r"is not the CLIP of the set:\n.*weights_sha256"):
        query(queries=("tree",), clip=save_clip(tmp_path / "other", seed=1))


def _text_file(folder: Path) -> Path:
    (folder / "notes.png").write_text("no picture")
    return folder / "notes.png"


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"queries": ("&nbsp;",)}, "the tokenizer of the set's CLIP makes nothing of it"),
        ({"queries": (" ",)}, "the tokenizer of the set's CLIP makes nothing of it"),
        ({"queries": ("tree",), "not_": ("tree",)}, "add up to nothing"),
        ({"like": ("7",)}, "expected IMAGE_ID:ROW"),
        ({"like": ("KEPT:99",)}, "there is no such row.*the image has [0-9]+ rows, from 0 on"),
        ({"like": ("99999:0",)}, "no rows of image 99999"),
        ({"image": ("NOTES",)}, "notes.png: no picture"),
        ({"image": ("PICTURE",), "box": (0, 0, 5000, 5)}, r"--box 0,0,5000,5 is not within .*, which is \d+x\d+"),
        ({"image": ("PICTURE",), "box": (3, 3, 0, 5)}, "--box 3,3,0,5 is not within"),
        ({"embeddings": Path("NPY")}, r"has shape \(7,\), the set's embeddings have 24 values"),
    ],
)
def test_parts_that_cannot_be_had(
    asked: dict[str, Any], why: str, query: Callable[..., np.ndarray], split: Split, kept: list[int], tmp_path: Path
) -> None:
    np.save(tmp_path / "seven.npy", np.ones((2, 7), np.float32))
    places = {"NOTES": _text_file(tmp_path), "PICTURE": split.path(split.images[0]), "NPY": tmp_path / "seven.npy"}
    for name, value in list(asked.items()):
        if isinstance(value, Path):
            asked[name] = places[str(value)]
        elif name != "box":
            asked[name] = tuple(str(places.get(text, text.replace("KEPT", str(kept[0])))) for text in value)
    with pytest.raises(HdovdError, match=why):
        query(**asked)
