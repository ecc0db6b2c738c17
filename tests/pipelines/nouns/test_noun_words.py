"""Plural to singular: what simplemma gives for nouns of captions, with what is corrected."""

from __future__ import annotations

import pytest

from hdovd.pipelines.common.name_list import shipped
from hdovd.pipelines.nouns.allowed import noun_words, singular, singular_of

PAIRS = """umbrellas umbrella|knives knife|buses bus|mice mouse|geese goose|leaves leaf|shelves shelf|loaves loaf|dishes dish|dresses dress
children child|women woman|firemen fireman|snowmen snowman|people person|teeth tooth|cacti cactus|lenses lens|benches bench|boxes box
sandwiches sandwich|donuts donut|cookies cookie|ties tie|pies pie|berries berry|puppies puppy|skies sky|tomatoes tomato|mangoes mango
buses bus|horses horse|vases vase|eyes eye|axes axe|scarves scarf|hooves hoof|calves calf|poles pole|giraffes giraffe|mattresses mattress
tvs tv|suvs suv|coatracks coatrack|quesadillas quesadilla|paninis panini|countertops countertop|eyepatches eyepatch|buildings building"""  # noqa: E501
SAME = """scissors glasses skis jeans pants shorts sunglasses binoculars pliers trousers pajamas stairs headphones clothes goggles tongs
bus glass dress lens gas cactus octopus walrus asparagus tennis chess hippopotamus grass compass mattress christmas sheep deer fish
moose painting building lighter eraser legging ceiling propeller curling saw specimen a"""  # noqa: E501


@pytest.mark.parametrize("pair", PAIRS.replace("\n", "|").split("|"))
def test_plural_becomes_singular(pair: str) -> None:
    plural, one = pair.split()
    assert singular(plural) == one


@pytest.mark.parametrize("word", SAME.split())
def test_singular_nouns_and_other_words_stay(word: str) -> None:
    assert singular(word) == word


def test_singular_of_a_singular_is_itself() -> None:
    for name in shipped("general"):
        once = singular_of(noun_words(name))
        assert singular_of(once) == once, name


def test_general_names_are_in_the_singular_already() -> None:
    changed = {name for name in shipped("general") if singular_of(noun_words(name)) != noun_words(name)}
    assert changed == {"chest of drawers", "high heels", "sports car", "sports uniform"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's T-shirt", "a man t shirt"),
        ("the dog\u2019s hot_dog, it`s", "the dog hot dog it"),
        ("Café No. 12!", "café no 12"),
        ("", ""),
        ("'s", "s"),
    ],
)
def test_words_of_a_text(text: str, words: str) -> None:
    assert noun_words(text) == tuple(words.split())
