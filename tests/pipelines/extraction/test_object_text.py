"""The text embedding of "object": extraction keeps it in the set, old caches get it and nothing else, and AdaMixer
takes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adamixer_micro import recipe as adamixer_recipe
from safetensors.torch import load_file
from torch import Tensor

from hdovd.cache.identity import sealed
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths
from hdovd.pipelines.extraction.export import ExportConfig, export_tars
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.extraction.identities import object_text_of
from hdovd.pipelines.teachers.openclip import load_clip
from hdovd.pipelines.training.train import TrainConfig, train


def forget(cache: Path) -> None:
    """Make it as caches were before."""
    file = cache / "sets" / "default.json"
    tree = json.loads(file.read_text())
    del tree["object_text"]
    file.write_text(json.dumps(sealed(tree)))


@pytest.fixture
def text_after_training(world: Path, tmp_path: Path) -> Callable[..., tuple[Tensor, str]]:
    def run(cache: Path, data: DataPaths | None = None) -> tuple[Tensor, str]:
        said = list[str]()
        job = TrainConfig(
            data=DataPaths(world) if data is None else data,
            cache=cache,
            out=tmp_path / "run",
            recipe=adamixer_recipe("train.epochs=1"),
            protocol=str(world / "protocol.toml"),
            device="cpu",
            overwrite=True,
        )
        with lines_to(said.append):
            return load_file(train(job).path / "model.safetensors")["object_text"], "\n".join(said)

    return run


def test_it_is_the_clips_own_and_is_trained_with(
    cache: Path,
    copied_cache: Path,
    clip: str,
    extraction: Callable[..., Any],
    tmp_path: Path,
    text_after_training: Callable[..., tuple[Tensor, str]],
) -> None:
    config = extraction(cache)
    teacher = load_clip(
        config.clip, config.pretrained, device="cpu", precision=config.precision, activation=config.activation
    )
    expected = F.normalize(torch.from_numpy(teacher.embed_names(["object"], config.templates)[0]).half().float(), dim=0)
    found, said = text_after_training(copied_cache)
    torch.testing.assert_close(found, expected)
    assert 'the text embedding of "object" is that of' in said
    assert "stands in" not in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["object_text"] == "cache"


def test_an_old_cache_trains_with_the_mean_and_says_what_adds_it(
    copied_cache: Path,
    extraction: Callable[..., Any],
    tmp_path: Path,
    text_after_training: Callable[..., tuple[Tensor, str]],
) -> None:
    forget(copied_cache)
    found, said = text_after_training(copied_cache)
    texts = load_file(tmp_path / "run" / "class_embeddings.safetensors")["embeddings"]
    base = json.loads((tmp_path / "run" / "run.json").read_text())["protocol"]["base"]
    torch.testing.assert_close(found, F.normalize(texts[: len(base)].mean(dim=0), dim=0))
    assert "the hdovd extract-clip command that made a Zarr cache adds it" in said
    assert "the mean of the base classes' texts stands in for it" in said


def test_extracting_again_adds_it_and_nothing_else(
    cache: Path, copied_cache: Path, extraction: Callable[..., Any], contents: Callable[[Path], dict[str, str]]
) -> None:
    forget(copied_cache)
    before = contents(copied_cache)
    report = extract_clip(extraction(copied_cache))
    assert set(report.levels.values()) == {"hit"}
    after = contents(copied_cache)
    assert {name for name in after if after[name] != before.get(name)} == {"sets/default.json"}
    assert FeatureCache(copied_cache).set.object_text == FeatureCache(cache).set.object_text
    extract_clip(extraction(copied_cache))
    assert contents(copied_cache) == after


def test_tar_shards_have_it_and_old_ones_get_it(
    copied_cache: Path, world: Path, tmp_path: Path, text_after_training: Callable[..., tuple[Tensor, str]]
) -> None:
    file, shards = copied_cache / "sets" / "default.json", tmp_path / "shards"
    whole = file.read_text()
    config = ExportConfig(
        cache=str(copied_cache), out=str(shards), data=DataPaths(world), protocol=str(world / "protocol.toml")
    )
    forget(copied_cache)
    export_tars(config)
    assert "stands in" in text_after_training(shards, DataPaths())[1]
    file.write_text(whole)
    export_tars(config)
    found, _ = text_after_training(shards, DataPaths())
    torch.testing.assert_close(found, object_text_of(FeatureCache(copied_cache).set, 24, "here"))


@pytest.mark.parametrize(
    "entry", [{"key": "k"}, {"embedding": [1.0, 2.0]}, {"embedding": [0.0] * 24}, {"embedding": "text"}]
)
def test_a_damaged_one_is_refused(
    entry: dict[str, Any], copied_cache: Path, text_after_training: Callable[..., tuple[Tensor, str]]
) -> None:
    file = copied_cache / "sets" / "default.json"
    file.write_text(json.dumps(sealed(json.loads(file.read_text()) | {"object_text": entry})))
    with pytest.raises(HdovdError, match=r'the text embedding of "object" is damaged'):
        text_after_training(copied_cache)
