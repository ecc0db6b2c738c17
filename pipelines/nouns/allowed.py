"""Which nouns may name an image's pseudo boxes (METHOD section 2), for extraction.

Without captions: the whole vocabulary, the same for every image. With captions, or a file of `hdovd nouns`: the
vocabulary's names that the image's own captions hold. See `matching` for how they are found.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.name_list import read_vocabulary
from hdovd.pipelines.nouns.captions import Captions
from hdovd.pipelines.nouns.config import Matching
from hdovd.pipelines.nouns.matching import Found, MatchFinder, StopList, longest_matches
from hdovd.pipelines.nouns.words import noun_words, singular_of


@dataclass(frozen=True, slots=True)
class Nouns:
    """`vocabulary` in row order; `by_image` the rows that each image offers, or None: all, for every image."""

    vocabulary: tuple[str, ...]
    by_image: dict[int, tuple[int, ...]] | None

    def offered(self, image_id: int) -> tuple[int, ...]:
        if self.by_image is None:
            return tuple(range(len(self.vocabulary)))
        return self.by_image.get(image_id, ())


def read_nouns(vocabulary: Path, captions: Path | None, matching: Matching = Matching.LEMMAS) -> Nouns:
    """The nouns that images offer. Raises HdovdError if the captions hold no word of the vocabulary."""
    names = read_vocabulary(vocabulary)
    if captions is None:
        return Nouns(names, None)
    finder = MatchFinder(names, StopList()) if matching is Matching.LEMMAS else _WholeWords(names)
    row_of = {name: row for row, name in enumerate(names)}
    found: dict[int, set[int]] = {}
    for one in finder(Captions(captions)):
        found.setdefault(one.image_id, set()).update(row_of[name] for name in one.nouns)
    if not any(found.values()):
        raise HdovdError(
            f"no caption of {captions} holds a word of {vocabulary} ({len(names)} names): are they of one language?"
        )
    return Nouns(names, {image_id: tuple(sorted(rows)) for image_id, rows in found.items()})


class _WholeWords:
    """The names that stand in captions letter by letter; at every place the longest one, which takes its words."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._rows = names, {words(name): row for row, name in enumerate(names)}
        self._longest = max(map(len, self._rows))

    def __call__(self, captions: Iterable[tuple[int, str]]) -> Iterator[Found]:
        for image_id, caption in captions:
            yield Found(image_id, self._found(words(caption)), [])

    def _found(self, caption: tuple[str, ...]) -> list[str]:
        matches = longest_matches(len(caption), self._longest, lambda start, stop: self._rows.get(caption[start:stop]))
        return [self._names[match.row] for match in matches]


def words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without punctuation."""
    return tuple(re.findall(r"\w+", text.lower()))


def meaning(name: str) -> str:
    """What names have in common that differ in case, number, signs and spaces alone: "Hot-dogs" and "hotdog" are
    one."""
    return "".join(singular_of(noun_words(name)))


def named_novel(vocabulary: Sequence[str], novel: Sequence[str]) -> list[str]:
    """The novel class names that a vocabulary holds, in whatever form: allowed, since captions hold them, but
    reported."""
    have = set(map(meaning, vocabulary))
    return [name for name in novel if meaning(name) in have]
