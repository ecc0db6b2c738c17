"""Prompt templates: the shipped sets are what they are named after, and a name goes into them as it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from hdovd.core import HdovdError
from hdovd.data import DataPaths
from hdovd.pipelines.cache_tools.config import ForeignFormat, ImportConfig
from hdovd.pipelines.extraction.config import DEFAULT_TEMPLATES, ExtractConfig
from hdovd.pipelines.extraction.identities import TextRows
from hdovd.pipelines.teachers import base as prompt_templates
from hdovd.pipelines.teachers.base import check_templates, prompts, read_templates, said, shipped_templates
from hdovd.pipelines.teachers.openclip import load_clip


def test_shipped_sets() -> None:
    assert shipped_templates() == ["clip80", "photo", "vild"]
    assert read_templates("photo") == DEFAULT_TEMPLATES
    assert list(read_templates("clip80")) == [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    for name in shipped_templates():
        check_templates(read_templates(name))
        assert (prompt_templates._SETS / f"{name}.txt").read_text().startswith("# ")  # where it comes from


def test_vild_prompts_are_what_its_text_encoder_is_given() -> None:
    """ViLD puts "This is" before every prompt that begins with a or the."""
    texts = [text for _, text in prompts(["apple"], read_templates("vild"))]
    assert len(texts) == 63
    assert texts[:6] == [
        "There is an apple in the scene.",
        "There is the apple in the scene.",
        "This is a photo of an apple in the scene.",
        "This is a photo of the apple in the scene.",
        "This is a photo of one apple in the scene.",
        "itap of an apple.",
    ]
    assert texts[-4:] == [
        "This is an embroidered apple.",
        "This is the embroidered apple.",
        "This is a painting of the apple.",
        "This is a painting of a apple.",
    ]  # as there: not every prompt heeds the name
    assert not [text for text in texts if text.startswith(("a", "the"))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", "a cat"),
        ("owl", "an owl"),
        ("Owl", "an Owl"),
        ("11 apples", "a 11 apples"),
        ("{article}", "a {article}"),
        ("{}", "a {}"),
    ],
)
def test_article_follows_the_names_first_letter(name: str, expected: str) -> None:
    assert list(prompts([name], ["{article} {}"])) == [(0, expected)]


def test_prompts_come_row_by_row_and_a_row_may_have_several_names() -> None:
    found = list(prompts(["cat", ("couch", "sofa")], ["a {}", "the {}"]))
    assert found == [(0, "a cat"), (0, "the cat"), (1, "a couch"), (1, "the couch"), (1, "a sofa"), (1, "the sofa")]


def test_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("# two of them\n{article} {} here\n\nno {}\n")
    assert read_templates(str(tmp_path / "mine.txt")) == ("{article} {} here", "no {}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clip8", None, "--templates clip8: neither a set nor a file. The sets are clip80, photo, vild"),
        ("prompts/photo", None, "neither a set nor a file"),
        ("empty.txt", b"# nothing\n", "--templates empty.txt holds nothing"),
        ("picture.jpg", b"\xff\xd8\xff", "--templates picture.jpg is no text file"),
    ],
)
def test_templates_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(HdovdError) as error:
        read_templates(name)
    assert message in str(error.value)


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{article}", "a {} {of sorts}", "{Article} {}", "{name}"])
def test_template_with_other_braces_is_refused(
    tmp_path: Path, extraction: Callable[..., ExtractConfig], template: str
) -> None:
    with pytest.raises(HdovdError) as error:
        extraction(tmp_path / "cache", templates=("a {}", template))
    assert repr(template) in str(error.value)
    with pytest.raises(HdovdError, match="template"):
        ImportConfig(
            format=ForeignFormat.OADP, source=tmp_path, data=DataPaths(tmp_path), cache=tmp_path, templates=(template,)
        )


@pytest.mark.parametrize("name", ["photo", "vild", "clip80"])
def test_embeddings_of_a_set_are_open_clips(clip: str, name: str) -> None:
    """24 names in 63 or 80 prompts: most names are spread over two batches of prompts."""
    names = [f"{letter}{kind}" for letter in "aeiouxyz" for kind in ("pple", " thing", "")]
    templates = read_templates(name)
    model, tokenizer = open_clip.create_model(clip).eval(), open_clip.get_tokenizer(clip)
    wanted = []
    with torch.no_grad():
        for one in names:
            texts = [t.replace("{article}", "an" if one[0] in "aeiou" else "a").replace("{}", one) for t in templates]
            each = torch.nn.functional.normalize(model.encode_text(tokenizer(texts)).double(), dim=1)
            wanted.append(torch.nn.functional.normalize(each.mean(dim=0), dim=0).numpy())
    found = load_clip(clip, None, device="cpu").embed_names(names, templates)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_row_of_several_names_is_the_mean_over_all_their_prompts(clip: str) -> None:
    """Of the normalised embeddings, not of the means of each name."""
    teacher, templates = load_clip(clip, None, device="cpu"), ("a {}", "the {}", "{} here")
    rows = teacher.embed_names([("couch", "sofa", "settee"), "cat", ("cat",)], templates)
    each = np.concatenate(
        [teacher.embed_names([text], ("{}",)) for _, text in prompts(["couch", "sofa", "settee"], templates)]
    )
    mean = each.mean(axis=0)
    np.testing.assert_allclose(rows[0], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_array_equal(rows[1], rows[2])
    of_means = teacher.embed_names(["couch", "sofa", "settee"], templates).mean(axis=0)
    assert np.abs(rows[0] - of_means / np.linalg.norm(of_means)).max() > 1e-4


def test_prompts_are_made_and_embedded_a_batch_at_a_time(clip: str) -> None:
    """However many there are: no more are drawn from the names than a batch needs."""
    teacher, drawn, seen = load_clip(clip, None, device="cpu"), 0, []

    class Names(list[str]):
        def __iter__(self) -> Any:
            nonlocal drawn
            for name in list.__iter__(self):
                drawn += 1
                yield name

    tokenizer = teacher.tokenizer

    def watched(texts: list[str]) -> Any:
        seen.append((len(texts), drawn))
        return tokenizer(texts)

    teacher.tokenizer = watched
    names = Names(f"thing {k}" for k in range(1_000))
    teacher.embed_names(names, ("a {}", "the {}"))
    assert seen == [(256, 128 * k) for k in range(1, 8)] + [(2_000 - 7 * 256, 1_000)]
    seen.clear()
    drawn = 0
    teacher.hash_prompts(names, ("a {}", "the {}"))
    assert seen == [(256, 128 * k) for k in range(1, 8)] + [(2_000 - 7 * 256, 1_000)]


def test_underscores_of_a_name_are_spaces(clip: str) -> None:
    """As LVIS's names have them: a text tower was not taught `alarm_clock`."""
    assert [said(name) for name in ("alarm_clock", ("bow_(weapon)", "bow"))] == ["alarm clock", ("bow (weapon)", "bow")]
    teacher, templates = load_clip(clip, None, device="cpu"), ("{article} {}",)
    spoken, written = (
        TextRows(names, synonyms).inputs(teacher, templates)["tokens"]
        for names, synonyms in ((("alarm clock", "bow"), {}), (("alarm_clock", "bow"), {"bow": ("bow", "long_bow")}))
    )
    assert TextRows(("alarm_clock", "bow")).inputs(teacher, templates)["tokens"] == spoken != written
    rows = TextRows(("alarm_clock", "alarm clock", "clock")).embed(teacher, templates, 0, 3)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
