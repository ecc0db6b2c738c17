"""Which nouns an image offers: whole words of its own captions that the vocabulary holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hdovd.core import HdovdError
from hdovd.pipelines.common.name_list import read_vocabulary
from hdovd.pipelines.nouns.allowed import Nouns, named_novel, offered_nouns


def _read(tmp_path: Path, words: list[str], captions: list[tuple[int, str]] | None) -> Nouns:
    (tmp_path / "words.txt").write_text("\n".join(words) + "\n")
    file = None if captions is None else tmp_path / "captions.json"
    if file is not None:
        file.write_text(json.dumps({"annotations": [{"image_id": i, "caption": c} for i, c in captions or ()]}))
    nouns = offered_nouns(None, tmp_path / "words.txt", file)
    assert nouns is not None
    return nouns


def test_vocabulary_keeps_order_and_drops_blanks_comments_and_repeats(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# nouns\n zebra \n\ncat\nzebra\nfire hydrant\r\n")
    assert read_vocabulary(tmp_path / "words.txt") == ("zebra", "cat", "fire hydrant")


def test_words_of_all_captions_of_the_image(tmp_path: Path) -> None:
    nouns = _read(
        tmp_path, ["cat", "dog", "car"], [(1, "A cat."), (2, "A car and a car"), (1, "Dog! with CAT"), (3, "nothing")]
    )
    assert nouns.offered(1) == (0, 1)
    assert nouns.offered(2) == (2,)
    assert nouns.offered(3) == ()
    assert nouns.offered(99) == ()


def test_only_whole_words_count(tmp_path: Path) -> None:
    nouns = _read(
        tmp_path, ["car", "cat", "dog"], [(1, "A cart, a category and a carpet beside a dog-house"), (2, "one cat")]
    )
    assert nouns.offered(1) == (2,)


def test_longest_name_wins(tmp_path: Path) -> None:
    nouns = _read(
        tmp_path,
        ["dog", "hot dog", "traffic light"],
        [(1, "A Hot Dog under a traffic light"), (2, "a hot dog and a dog")],
    )
    assert nouns.offered(1) == (1, 2)
    assert nouns.offered(2) == (0, 1)


def test_names_with_signs_are_not_patterns(tmp_path: Path) -> None:
    nouns = _read(tmp_path, ["t.v", "cat"], [(1, "a tiv and a cat"), (2, "a t.v set")])
    assert nouns.offered(1) == (1,)
    assert nouns.offered(2) == (0,)


def test_without_captions_all_nouns_for_every_image(tmp_path: Path) -> None:
    assert _read(tmp_path, ["cat", "dog"], None).offered(12345) == (0, 1)


def test_captions_in_another_language(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="no caption of"):
        _read(tmp_path, ["cat", "dog"], [(1, "Eine Katze"), (2, "ein Hund")])


def test_leak_audit_names_the_novel_classes() -> None:
    assert named_novel(["Umbrella", "tree", "key"], ["key", "umbrella", "star"]) == ["key", "umbrella"]
    assert named_novel(["tree"], ["key"]) == []


def test_the_longest_name_takes_its_words(tmp_path: Path) -> None:
    captions = [(1, "A Fire  hydrant."), (2, "a t-shirt on fire"), (3, "fire; hydrant")]
    nouns = _read(tmp_path, ["hydrant", "fire hydrant", "fire", "t-shirt"], captions)
    assert nouns.offered(1) == (1,)
    assert nouns.offered(2) == (2, 3)
    assert nouns.offered(3) == (1,)
