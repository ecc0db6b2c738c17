"""A file of nouns in place of vocabulary and captions: the same products, sets that know it, and sets from before there
was one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.cache_tools.config import CheckConfig
from hdovd.pipelines.cache_tools.verify import check_cache
from hdovd.pipelines.common.name_list import shipped
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip, prepare
from hdovd.pipelines.nouns.config import NounsConfig, Parser
from hdovd.pipelines.nouns.find import find_nouns

Config = Callable[..., ExtractConfig]


@pytest.fixture
def nouns_file(world: Path, tmp_path: Path) -> Path:
    """What `hdovd nouns` finds in the micro world's captions."""
    find_nouns(
        NounsConfig(
            captions=world / "annotations" / "captions_train2017.json",
            out=tmp_path / "nouns.json",
            vocabulary=world / "vocabulary.txt",
            parser=Parser.MATCH,
            protocol=str(world / "protocol.toml"),
        )
    )
    return tmp_path / "nouns.json"


def _keys(config: ExtractConfig) -> dict[Level, str]:
    return {level: plan.key for level, plan in prepare(config).plans.items()}


def test_file_of_nouns_makes_what_vocabulary_and_captions_make(
    cache: Path, extraction: Config, nouns_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "cache"
    extract_clip(extraction(copy, vocabulary=None, captions=None, nouns=nouns_file))
    one, other = FeatureCache(copy), FeatureCache(cache)
    assert one.set.levels == other.set.levels
    for image_id in one._rows_by_image(Level.BOXES):
        np.testing.assert_array_equal(one.instances(image_id).noun, other.instances(image_id).noun)
    assert one.set.made_from["nouns"] == str(nouns_file.absolute())


def test_repair_names_the_file_of_nouns(copied_cache: Path, extraction: Config, nouns_file: Path) -> None:
    config, lines = extraction(copied_cache, vocabulary=None, captions=None, nouns=nouns_file), list[str]()
    extract_clip(config)
    key = FeatureCache(copied_cache).key(Level.PSEUDO_LABEL)
    (part,) = (copied_cache / "pseudo_label" / key / "noun" / "c").glob("*")
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with lines_to(lines.append):
        check_cache(CheckConfig(cache=copied_cache, repair=True))
    assert f" --nouns {nouns_file.absolute()} " in lines[-1]
    extract_clip(config)
    assert part.read_bytes() == whole


def test_general_list_for_every_image(tmp_path: Path, extraction: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = extraction(tmp_path / "cache", vocabulary=Path("general"), captions=None)
    monkeypatch.chdir(tmp_path)
    extract_clip(config)
    reader = FeatureCache(tmp_path / "cache")
    assert tuple(reader.names(Level.NOUN)) == shipped("general")
    assert ExtractConfig.from_dict(reader.set.made_from, "c").vocabulary == Path(
        "general"
    )  # a name, wherever it is read again


# --- sets from before plurals were known ---


def _plural(world: Path) -> None:
    file = world / "annotations" / "captions_train2017.json"
    tree = json.loads(file.read_text())
    for entry in tree["annotations"]:
        entry["caption"] = (
            entry["caption"].replace("star", "stars").replace("umbrella", "umbrellas").replace("tree", "trees")
        )
    file.write_text(json.dumps(tree))


def test_old_sets_are_read_and_made_again_with_plurals(copied_world: Path, tmp_path: Path, extraction: Config) -> None:
    """Their records say nothing of matching: names were found letter by letter."""
    _plural(copied_world)
    config = extraction(tmp_path / "cache", data=copied_world)
    tree = json.loads(json.dumps(config.to_dict()))
    assert tree.pop("matching") == "lemmas"
    assert "nouns" not in tree
    again = ExtractConfig.from_dict(tree, tmp_path / "cache", device="cpu")
    assert _keys(again) == _keys(config)


# --- what does not go together ---


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"nouns": Path("n.json")}, "--vocabulary and --captions out"),
        ({"nouns": Path("n.json"), "captions": None}, "--vocabulary and --captions out"),
        (
            {"nouns": Path("n.json"), "vocabulary": None, "captions": None, "proposals": None},
            "--nouns name pseudo boxes",
        ),
    ],
)
def test_options_that_do_not_go_together(
    extraction: Config, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(HdovdError, match=what):
        extraction(tmp_path / "cache", **changes)


def test_file_of_nouns_of_other_images(extraction: Config, nouns_file: Path, tmp_path: Path) -> None:
    tree = json.loads(nouns_file.read_text())
    tree["images"] = {str(int(image_id) + 1_000_000): rows for image_id, rows in tree["images"].items()}
    nouns_file.write_text(json.dumps(tree))
    with pytest.raises(HdovdError, match=r"nouns\.json has no noun for any of the \d+ training images"):
        prepare(extraction(tmp_path / "cache", vocabulary=None, captions=None, nouns=nouns_file))


def test_captions_of_other_images(extraction: Config, tmp_path: Path) -> None:
    config = extraction(tmp_path / "cache")
    tree = json.loads(config.captions.read_text())
    for entry in tree["annotations"]:
        entry["image_id"] += 1_000_000
    (tmp_path / "c.json").write_text(json.dumps(tree))
    with pytest.raises(HdovdError, match=r"--captions .*c\.json has no noun for any of the \d+ training images"):
        prepare(replace(config, captions=tmp_path / "c.json"))
