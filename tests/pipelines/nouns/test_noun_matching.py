"""Names of a vocabulary in captions: the longest, in singular and plural, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from hdovd.pipelines.common.name_list import read_vocabulary, shipped
from hdovd.pipelines.nouns.allowed import MatchFinder, NameMatcher, StopList, noun_words


def _found(names: list[str], caption: str, stop: tuple[str, ...] = ()) -> list[str]:
    (found,) = MatchFinder(names, StopList(stop))([(1, caption)])
    return found.nouns


def _unmatched(names: list[str], caption: str) -> list[str]:
    (found,) = MatchFinder(names, StopList())([(1, caption)])
    return found.unmatched


@pytest.mark.parametrize(
    ("names", "caption", "found"),
    [
        ("umbrella|knife", "Umbrellas, a knife and KNIVES", "umbrella|knife|knife"),
        ("tennis racket|racket|tennis ball", "two tennis rackets and a racket", "tennis racket|racket"),
        ("dog|hot dog", "Hot dogs for dogs", "hot dog|dog"),
        ("dog|hot dog", "hotdogs and a hot-dog", "hot dog|hot dog"),
        ("skateboard|board", "a skate board on a board", "skateboard|board"),
        ("wineglass|glass", "two wine glasses", "wineglass"),
        ("t-shirt", "tshirts, a T-shirt and a t shirt", "t-shirt|t-shirt|t-shirt"),
        ("fire hydrant|fire|hydrant", "a fire; hydrant", "fire hydrant"),
        ("dog bed", "the dog's bed", "dog bed"),
        ("chest of drawers", "a chest of drawers", "chest of drawers"),
        ("person|man", "people and men", "person|man"),
    ],
    ids=lambda text: text[:20],
)
def test_names_are_found_in_captions(names: str, caption: str, found: str) -> None:
    assert _found(names.split("|"), caption) == found.split("|")


@pytest.mark.parametrize(
    ("names", "caption"),
    [
        ("acorn", "a corn on a cob"),
        ("carrot", "a ca rrot"),
        ("car|cat", "a cart with a carpet and a category"),
        ("dog|cat", "doggy, catseye"),
        ("skis", "a ski resort"),
        ("glasses", "a glass of wine"),
        ("scissors", "a scissor kick"),
        ("paint|light|erase", "a painting, a lighter and an eraser"),
        ("hot dog", "a dog that is hot"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_name_is_not_found(names: str, caption: str) -> None:
    assert _found(names.split("|"), caption) == []


def test_names_that_are_plural_by_nature_win_over_their_parts() -> None:
    assert _found(["glass", "glasses", "ski", "skis"], "glasses, a glass, skis and a ski") == [
        "glasses",
        "glass",
        "skis",
        "ski",
    ]
    assert _found(["glass", "ski"], "glasses and skis") == ["glass", "ski"]


def test_user_vocabulary_in_the_plural_is_found_in_the_singular() -> None:
    assert _found(["dogs", "cats"], "a dog and cats") == ["dogs", "cats"]
    assert _found(["dogs", "dog"], "a dog and dogs") == ["dog", "dogs"]  # letter by letter first


@pytest.mark.parametrize("names", [[], ["!!!"], ["!!!", "-"]])
def test_names_without_letters_are_nowhere(names: list[str]) -> None:
    assert NameMatcher(names).find(noun_words("a dog! - and !!!")) == []
    assert NameMatcher(names).find(()) == []


# --- stop list ---


def test_a_users_stop_list_takes_names_out_in_any_number() -> None:
    assert _found(["dog", "cats", "front"], "a dog, a cat and a front", stop=("cat",)) == ["dog", "front"]
    assert MatchFinder(["dog", "cats", "front"], StopList(("cat",))).stopped == ["cats"]


def test_the_stop_list_that_ships_leaves_a_vocabulary_alone() -> None:
    assert "front" in StopList()
    assert _found(["front"], "the front") == ["front"]


@pytest.mark.parametrize(
    "name", ["front", "top", "group", "picture", "photo", "couple", "background", "side", "way", "groups"]
)
def test_non_objects_are_on_the_stop_list(name: str) -> None:
    stop = StopList()
    assert name in stop
    assert stop.ends(("train", name))
    assert "dog" not in stop
    assert not stop.ends(("front", "door"))


# --- what the vocabulary lacks ---


def test_words_that_the_vocabulary_lacks_are_told_in_the_singular() -> None:
    assert _unmatched(["dog"], "Two dogs sitting in front of the red streets with kites, qwok") == [
        "street",
        "kite",
        "qwok",
    ]


def test_words_of_a_match_are_not_lacking() -> None:
    assert _unmatched(["fire hydrant"], "fire hydrants and fire") == ["fire"]


# --- the lists that ship ---


def test_general_list_is_what_its_head_says() -> None:
    names = shipped("general")
    assert 1_000 < len(names) < 1_500
    assert list(names) == sorted(names)
    joined = ["".join(noun_words(name)) for name in names]
    assert len(set(joined)) == len(names)
    assert all(name == name.lower() and name.isascii() for name in names)
    assert {
        "tennis racket",
        "hot dog",
        "umbrella",
        "man",
        "woman",
        "traffic light",
        "scissors",
        "sofa",
        "couch",
    } <= set(names)
    assert not {name for name in names if name in StopList()}
    assert not set(names) & {"jacuzzi", "band aid", "lego", "ipod", "home appliance", "mushroon"}


def test_the_lists_stand_apart() -> None:
    assert not set(shipped("stop")) & set(shipped("common"))


def test_general_is_a_name_beside_paths() -> None:
    assert read_vocabulary(Path("general")) == shipped("general")
