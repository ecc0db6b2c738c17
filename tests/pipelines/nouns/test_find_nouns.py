"""Nouns by image as a file: what is in it, what is said of it, and files that it cannot be made from or read as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.nouns.allowed import Nouns, offered_nouns, read_noun_file
from hdovd.pipelines.nouns.config import NounsConfig, Parser
from hdovd.pipelines.nouns.find import NounsReport, find_nouns

CAPTIONS = [
    (9, "Umbrellas and a tennis racket"),
    (2, "A dog's umbrella."),
    (9, "tennis rackets near a zog"),
    (30, "zogs, a zog"),
]


def _job(
    tmp_path: Path,
    captions: list[tuple[int, str]] = CAPTIONS,
    images: list[int] | None = None,
    vocabulary: str | Path | None = None,
    **changes: Any,
) -> NounsConfig:
    tree: dict[str, Any] = {"annotations": [{"image_id": i, "caption": c} for i, c in captions]}
    if images is not None:
        tree = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in images]} | tree
    (tmp_path / "captions.json").write_text(json.dumps(tree))
    if isinstance(vocabulary, str):
        (tmp_path / "words.txt").write_text(vocabulary.replace("|", "\n"))
        vocabulary = tmp_path / "words.txt"
    return NounsConfig(
        captions=tmp_path / "captions.json",
        out=tmp_path / "out" / "nouns.json",
        vocabulary=vocabulary,
        **({"parser": Parser.MATCH} | changes),
    )


def _run(job: NounsConfig) -> tuple[NounsReport, str]:
    lines: list[str] = []
    with lines_to(lines.append):
        return find_nouns(job), "\n".join(lines)


def test_file_can_be_read_on_its_own(tmp_path: Path) -> None:
    _run(_job(tmp_path, vocabulary="umbrella|dog|tennis racket|kite"))
    tree = json.loads((tmp_path / "out" / "nouns.json").read_text())
    assert (tree["format"], tree["version"]) == ("hdovd nouns", 1)
    assert tree["vocabulary"] == ["umbrella", "dog", "tennis racket", "kite"]
    assert tree["images"] == {"2": [0, 1], "9": [0, 2], "30": []}
    assert tree["unmatched"] == {"zog": 2}  # in two captions
    made = tree["made_by"]
    assert made["captions"]["captions"] == 4
    assert made["parser"]["name"] == "match"
    assert made["vocabulary"]["source"] == "words.txt"
    assert {len(made[part]["sha256"]) for part in ("captions", "vocabulary", "stop_list")} == {64}
    assert read_noun_file(tmp_path / "out" / "nouns.json") == Nouns(
        tuple(tree["vocabulary"]), {2: (0, 1), 9: (0, 2), 30: ()}
    )


def test_report_counts_images(tmp_path: Path) -> None:
    report, text = _run(_job(tmp_path, images=[2, 9, 30, 31], vocabulary="umbrella|dog|tennis racket|kite"))
    assert report.images_of == {"umbrella": 2, "tennis racket": 1, "dog": 1}
    assert (report.captions, report.images_without) == (4, 2)  # 31 has no caption
    assert report.novel == {"dog": 1, "umbrella": 2}
    assert "4 captions of 4 images; 1.00 nouns an image, 2 images without one; 3 of 4 names occur" in text
    assert "umbrella 2, dog 1, tennis racket 1" in text
    assert "lacks, nouns or not, in captions: zog 2" in text
    assert "holds 2 of the 17 novel names, in images: umbrella 2, dog 1" in text


def test_novel_names_in_the_plural_are_reported_too(tmp_path: Path) -> None:
    report, _ = _run(_job(tmp_path, vocabulary="umbrellas|kite"))
    assert report.novel == {"umbrella": 2}


def test_vocabulary_without_novel_names_says_so(tmp_path: Path) -> None:
    assert "none of the 17 novel names of --protocol ov-coco" in _run(_job(tmp_path, vocabulary="tennis racket"))[1]


@pytest.mark.parametrize("vocabulary", [None, Path("general")])
def test_general_list_is_the_default(tmp_path: Path, vocabulary: Path | None) -> None:
    report, _ = _run(_job(tmp_path, vocabulary=vocabulary))
    assert set(report.images_of) == {"umbrella", "dog", "tennis racket"}
    assert len(report.nouns.vocabulary) > 1_000
    assert json.loads((tmp_path / "out" / "nouns.json").read_text())["made_by"]["vocabulary"]["source"] == "general"


def test_stop_list_takes_nouns_out_and_changes_the_identity(tmp_path: Path) -> None:
    job = _job(tmp_path, vocabulary="umbrella|dog|front")
    _, text = _run(job)
    assert "the vocabulary holds front, which the stop list that ships calls no object" in text
    before = json.loads(job.out.read_text())
    (tmp_path / "stop.txt").write_text("# mine\numbrella\nfront\n")
    _, text = _run(_job(tmp_path, vocabulary="umbrella|dog|front", stop_list=tmp_path / "stop.txt"))
    assert "stopped: umbrella, front" in text
    after = json.loads(job.out.read_text())
    assert after["vocabulary"] == before["vocabulary"]
    assert after["images"] == {"2": [1], "9": [], "30": []}
    assert after["made_by"]["stop_list"] != before["made_by"]["stop_list"]


def test_same_bytes_again_and_in_any_order_of_captions(tmp_path: Path) -> None:
    first = _job(tmp_path, vocabulary="umbrella|dog|tennis racket")
    _run(first)
    whole = first.out.read_bytes()
    _run(first)
    assert first.out.read_bytes() == whole
    _run(_job(tmp_path, CAPTIONS[::-1], vocabulary="umbrella|dog|tennis racket"))
    one, other = json.loads(whole), json.loads(first.out.read_bytes())
    assert one["made_by"].pop("captions") != other["made_by"].pop("captions")
    assert one == other


def test_extraction_finds_the_same_in_captions(tmp_path: Path) -> None:
    job = _job(tmp_path, vocabulary="umbrella|dog|tennis racket|front|glasses")
    report, _ = _run(job)
    assert offered_nouns(None, job.vocabulary, job.captions) == report.nouns == read_noun_file(job.out)


# --- what cannot be done ---


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "no file"),
        ("{}", "no COCO captions file"),
        ("[]", "no COCO captions file"),
        ('{"annotations": {}}', "no COCO captions file"),
        ('{"annotations": [{"image_id": 1}]}', "entry 0 of annotations is no"),
        (
            '{"annotations": [{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "a"}]}',
            "entry 1 of annotations: image_id is the text '1', expected a whole number",
        ),
        (
            '{"annotations": [{"image_id": 1, "caption": ["a"]}]}',
            "entry 0 of annotations: caption is a list, expected text",
        ),
        ('{"images": [{"id": "1"}], "annotations": []}', "an image's id is the text '1'"),
        ('{"annotations": []}', "0 captions, and none holds a noun"),
        ('{"annotations": [', "not valid JSON"),
        ('{"annotations": [{"image_id": 1, "caption": "Ein Regenschirm und eine Katze"}]}', "are they of one language"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path: Path, content: str | None, what: str) -> None:
    job = _job(tmp_path)
    job.captions.unlink()
    if content is not None:
        job.captions.write_text(content)
    with pytest.raises(HdovdError, match=what) as error:
        _run(job)
    assert "captions.json" in str(error.value)
    assert not job.out.exists()


def test_a_failed_run_leaves_the_file_of_before(tmp_path: Path) -> None:
    job = _job(tmp_path, vocabulary="dog")
    _run(job)
    before = job.out.read_bytes()
    job.captions.write_text('{"annotations": [{"image_id": 1, "caption": "dog"}, 5]}')
    with pytest.raises(HdovdError, match="entry 1"):
        _run(job)
    assert job.out.read_bytes() == before
    assert [file.name for file in job.out.parent.iterdir()] == ["nouns.json"]


@pytest.mark.parametrize(
    "changes", [{"vocabulary": Path("nowhere.txt")}, {"stop_list": Path("nowhere.txt")}, {"protocol": "nowhere"}]
)
def test_files_that_are_not_there(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(HdovdError, match="nowhere"):
        _run(_job(tmp_path, **changes))


def test_out_is_neither_a_folder_nor_an_input(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="is a folder"):
        NounsConfig(captions=tmp_path / "captions.json", out=tmp_path)
    with pytest.raises(HdovdError, match="is one of the files that are read"):
        NounsConfig(captions=tmp_path / "captions.json", out=tmp_path / "captions.json")


GOOD: dict[str, Any] = {"format": "hdovd nouns", "version": 1, "vocabulary": ["cat", "dog"], "images": {"1": [0]}}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"format": "other"}, "no file of nouns"),
        ({"version": 2}, '"version": 1, ...}, found 2'),
        ({"vocabulary": []}, "list of names"),
        ({"vocabulary": ["cat", 1]}, "list of names"),
        ({"images": [1]}, "rows by image id"),
        ({"images": {"1": [2]}}, r"image 1 has \[2\], expected an image id, and rows of the vocabulary, 0 to 1"),
        ({"images": {"1": [-1]}}, "image 1"),
        ({"images": {"1": [True]}}, "image 1"),
        ({"images": {"1": 0}}, "image 1"),
        ({"images": {"one": [0]}}, r"image one has \[0\], expected an image id"),
        ({"images": {"1": []}}, "no image with a noun"),
        ({"images": {}}, "no image with a noun"),
    ],
)
def test_file_of_nouns_that_is_none(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    (tmp_path / "nouns.json").write_text(json.dumps(GOOD | changes))
    with pytest.raises(HdovdError, match=what) as error:
        read_noun_file(tmp_path / "nouns.json")
    assert "nouns.json" in str(error.value)


def test_file_of_nouns_that_someone_wrote_by_hand(tmp_path: Path) -> None:
    (tmp_path / "nouns.json").write_text(json.dumps(GOOD | {"images": {"7": [1, 0, 1]}}))
    assert read_noun_file(tmp_path / "nouns.json") == Nouns(("cat", "dog"), {7: (0, 1)})
