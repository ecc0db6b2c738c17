"""The class level from several names a class, or from a file: which files are taken, what becomes of them, and what
they leave alone.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, Exif
from hdovd.pipelines.cache_tools.config import CheckConfig
from hdovd.pipelines.cache_tools.verify import check_cache
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.demo.world import BASE, NOVEL
from hdovd.pipelines.embedding.crop_recipe import CropRecipe, Shape
from hdovd.pipelines.extraction.config import Executor, ExtractConfig, LabelChoice, LabelRule, Share, Store
from hdovd.pipelines.extraction.extract_clip import ExtractReport, extract_clip, prepare
from hdovd.pipelines.extraction.identities import read_class_embeddings, read_synonyms
from hdovd.pipelines.extraction.source import laid_over
from hdovd.pipelines.teachers.base import Activation
from hdovd.pipelines.teachers.openclip import load_clip

Config = Callable[..., ExtractConfig]
NAMES = [*BASE, *NOVEL]
CLASS = Level.CLASS
SYNONYMS = 'umbrella = ["umbrella", "parasol"]\ncar = ["automobile"]  # not called car here\nfish = ["fish"]\n'


def _decisions(report: ExtractReport) -> dict[Level, str]:
    """Of the levels that were no hit."""
    return {level: decision for level, decision in report.levels.items() if decision != "hit"}


def _rows(dim: int = 24, seed: int = 0) -> torch.Tensor:
    """(K, D) float32, normalised."""
    return torch.nn.functional.normalize(
        torch.randn(len(NAMES), dim, generator=torch.Generator().manual_seed(seed)), dim=1
    )


@pytest.fixture
def synonyms(tmp_path: Path) -> Path:
    (tmp_path / "synonyms.toml").write_text(SYNONYMS)
    return tmp_path / "synonyms.toml"


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    np.save(tmp_path / "classes.npy", _rows().numpy())
    return tmp_path / "classes.npy"


# --- synonyms ---


def test_synonyms_are_read_in_the_order_of_the_classes(synonyms: Path) -> None:
    """A class with its own name alone says nothing new."""
    assert list(read_synonyms(synonyms, ["fish", "car", "umbrella"]).items()) == [
        ("car", ("automobile",)),
        ("umbrella", ("umbrella", "parasol")),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such file; expected TOML such as couch = "),
        ('{"couch": ["couch", "sofa"]}', r"is not valid TOML .*; expected TOML such as couch = "),
        ("hot dog = ['hot dog']", r"is not valid TOML .*quoted where it has spaces"),
        ("couch = ['couch']\ncouch = ['sofa']", r"is not valid TOML"),
        (b"couch = ['\xff']", r"is no text file in UTF-8"),
        ("coach = ['coach', 'sofa']", r"no classes of the protocol: 'coach' \(the nearest is 'couch'\)"),
        ("Couch = ['sofa']\nxyz = ['x']", r"'Couch' \(the nearest is 'couch'\), 'xyz'\. Each key is a class"),
        ("[couch]\nnames = ['sofa']", r"couch must be a list of names, not an object"),
        ("couch = 'sofa'", r"couch must be a list of names, not the text 'sofa'"),
        ("couch = []", r"couch must be a list of names, not a list"),
        ("couch = ['couch', ' ']", r"couch must be a list of names"),
        ("couch = ['couch', 3]", r"couch must be a list of names"),
        ("couch = ['couch', 'sofa', 'couch']", r"couch lists couch twice"),
    ],
    ids=[
        "missing",
        "json",
        "unquoted",
        "class twice",
        "no text",
        "unknown",
        "unknown ones",
        "table",
        "text",
        "empty",
        "blank",
        "number",
        "name twice",
    ],
)
def test_synonyms_that_cannot_be_used(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    file = tmp_path / "s.toml"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(HdovdError, match=rf"--synonyms .*s\.toml.*{message}"):
        read_synonyms(file, ["couch", "hot dog", "car"])


@pytest.mark.parametrize("part_rows", [64, 7])
def test_class_rows_are_means_over_all_names_and_only_they_are_made_anew(
    copied_cache: Path, extraction: Config, synonyms: Path, clip: str, counting: Any, part_rows: int
) -> None:
    templates = ("a photo of a {}",)
    changes = {"synonyms": synonyms, "features": "named", "part_rows": part_rows}
    lines: list[str] = []
    with lines_to(lines.append):
        assert _decisions(extract_clip(extraction(copied_cache, **changes, dry_run=True))) == {CLASS: "extract"}
    assert any(
        'synonyms differs: expected {"car": ["automobile"], "umbrella": ["umbrella", "parasol"]}, the cache has null'
        in line
        for line in lines
    ), lines
    extract_clip(extraction(copied_cache, **changes), counting)
    assert counting.names == [
        ("automobile",) if n == "car" else ("umbrella", "parasol") if n == "umbrella" else n for n in NAMES
    ]
    plain, named = FeatureCache(copied_cache), FeatureCache(copied_cache, "named")
    named.require_together()
    assert {level for level in Level if plain.key(level) != named.key(level)} == {CLASS}
    assert named.names(CLASS) == NAMES
    before, after = plain.embeddings(CLASS), named.embeddings(CLASS)
    assert [name for name, same in zip(NAMES, np.abs(before - after).max(axis=1) < 1e-3, strict=True) if not same] == [
        name for name in NAMES if name in ("car", "umbrella")
    ]
    one, other, car = load_clip(clip, None, device="cpu").embed_names(["umbrella", "parasol", "automobile"], templates)
    np.testing.assert_allclose(after[NAMES.index("umbrella")], (one + other) / np.linalg.norm(one + other), atol=1e-3)
    np.testing.assert_allclose(after[NAMES.index("car")], car, atol=1e-3)
    assert _decisions(extract_clip(extraction(copied_cache, **changes))) == {}


def test_file_that_names_no_synonym_is_a_hit(copied_cache: Path, extraction: Config, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('car = ["car"]\n')
    assert _decisions(extract_clip(extraction(copied_cache, synonyms=tmp_path / "own.toml"))) == {}


def test_leak_audit_knows_synonyms_of_novel_classes(extraction: Config, tmp_path: Path, counting: Any) -> None:
    (tmp_path / "words.txt").write_text("parasol\numbrella\ncar\nautomobile\n")
    (tmp_path / "synonyms.toml").write_text('umbrella = ["parasol"]\ncar = ["automobile"]\n')
    lines: list[str] = []
    config = extraction(tmp_path / "cache", vocabulary=tmp_path / "words.txt", captions=None)
    with lines_to(lines.append):
        prepare(config, counting)
    assert any("the vocabulary holds 1 of the 8 novel names (umbrella)" in line for line in lines)
    with lines_to(lines.append):
        prepare(replace(config, synonyms=tmp_path / "synonyms.toml"), counting)
    assert any("the vocabulary holds 2 of the 9 novel names (umbrella, parasol)" in line for line in lines)


# --- embeddings from a file ---


def _save(file: Path, form: str, rows: torch.Tensor) -> Path:
    """Write rows in one of the forms that are taken."""
    file = file.with_suffix("." + form.split()[0])
    wrapped = {"dict": {"embeddings": rows}, "parameter": torch.nn.Parameter(rows)}.get(form.split()[-1], rows)
    if file.suffix == ".npy":
        array = rows.numpy()
        np.save(
            file,
            {
                "big-endian": array.astype(">f4"),
                "double": array.astype(np.float64),
                "columns": np.asfortranarray(array),
            }.get(form.split()[-1], array),
        )
    elif file.suffix == ".safetensors":
        save_file({"anything": rows.contiguous()}, file)
    else:
        torch.save(wrapped, file)
    return file


@pytest.mark.parametrize(
    "form", ["npy", "npy big-endian", "npy double", "npy columns", "safetensors", "pt", "pth dict", "pt parameter"]
)
def test_every_form_gives_the_same_product(
    tmp_path: Path, extraction: Config, counting: Any, embeddings: Path, form: str
) -> None:
    """To the key, which is of the numbers and not of the file; float32 here."""
    one = read_class_embeddings(embeddings, NAMES)
    other = read_class_embeddings(_save(tmp_path / "other", form, _rows()), NAMES)
    assert one.dtype == other.dtype == np.float32
    np.testing.assert_array_equal(other, _rows().numpy())
    keys = {
        prepare(extraction(tmp_path / "c", class_embeddings=file), counting).plans[CLASS].key
        for file in (embeddings, _save(tmp_path / "other", form, _rows()))
    }
    assert len(keys) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    for form in ("pt", "safetensors"):
        found = read_class_embeddings(_save(tmp_path / "rows", form, _rows().to(dtype)), NAMES)
        np.testing.assert_array_equal(found, _rows().to(dtype).float().numpy())


def _bad(change: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    return lambda file: torch.save(change(_rows()), file)


def _with(row: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(rows: torch.Tensor) -> torch.Tensor:
        rows[row] = value
        return rows

    return change


class _Code:
    def __reduce__(self) -> Any:
        return print, ("code of the file ran",)


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("c.pt", lambda file: None, "no file"),
    "a row less": (
        "c.pt",
        _bad(lambda rows: rows[1:]),
        rf"shape \(23, 24\), expected \(24, D\): .* base then novel, {NAMES[0]} first and {NAMES[-1]} last",
    ),
    "one row": ("c.pt", _bad(lambda rows: rows[0]), r"shape \(24,\), expected"),
    "transposed": (
        "c.npy",
        lambda file: np.save(file, np.ones((512, 24), np.float32)),
        r"shape \(512, 24\), expected \(24, D\)",
    ),
    "no column": ("c.pt", _bad(lambda rows: rows[:, :0]), r"shape \(24, 0\), expected"),
    "empty": ("c.npy", lambda file: np.save(file, np.zeros((0, 24), np.float32)), r"shape \(0, 24\), expected"),
    "other CLIP": (
        "c.pt",
        _bad(lambda rows: torch.cat([rows, rows], 1)),
        "rows of 48 values, the CLIP gives 24: are they of another",
    ),
    "zero row": (
        "c.pt",
        _bad(_with(2, 0)),
        rf"1 of 24 rows cannot be normalised, they are zero or not finite: 2 \({NAMES[2]}\)",
    ),
    "nan": ("c.pt", _bad(_with(5, float("nan"))), r"1 of 24 rows cannot .*: 5 \("),
    "infinite": ("c.pt", _bad(_with(0, float("inf"))), r"1 of 24 rows cannot .*: 0 \("),
    "too large for float32": ("c.npy", lambda file: np.save(file, np.full((24, 24), 1e300)), "24 of 24 rows cannot"),
    "whole numbers": (
        "c.npy",
        lambda file: np.save(file, np.ones((24, 24), np.int64)),
        "no tensor of floating-point numbers",
    ),
    "whole numbers in a tensor": ("c.pt", _bad(lambda rows: rows.long()), "no tensor of floating-point numbers"),
    "objects": (
        "c.npy",
        lambda file: np.save(file, np.array([{}] * 24), allow_pickle=True),
        r"no \.npy file of numbers, or damaged",
    ),
    "two tensors": (
        "c.pt",
        _bad(lambda rows: {"base": rows[:16], "novel": rows[16:]}),
        r"holds base \(16, 24\), novel \(8, 24\): expected one tensor",
    ),
    "two in safetensors": (
        "c.safetensors",
        lambda file: save_file({"a": _rows(), "b": _rows()[:3].clone()}, file),
        r"holds a \(24, 24\), b \(3, 24\): expected one",
    ),
    "names beside": (
        "c.pth",
        _bad(lambda rows: {"embeddings": rows, "names": NAMES[::-1]}),
        r"names \(a list\): expected one",
    ),
    "empty dict": ("c.pt", _bad(lambda rows: {}), "holds nothing: expected one tensor"),
    "nested": (
        "c.pt",
        _bad(lambda rows: {"state_dict": {"ctx": rows}}),
        r"no tensor of floating-point numbers \(found a dict\)",
    ),
    "list": ("c.pt", _bad(lambda rows: [rows]), r"no tensor of floating-point numbers \(found a list\)"),
    "posing as more": (
        "c.pt",
        _bad(lambda rows: torch.ones(1).expand(24, 10**12)),
        r"\(24, 1000000000000\) numbers over 4 bytes",
    ),
    "cut short": ("c.npy", lambda file: file.write_bytes(_saved(file)[:-9]), r"no \.npy file of numbers, or damaged"),
    "no safetensors": ("c.safetensors", lambda file: file.write_bytes(b"\0" * 64), "is damaged"),
    "no torch file": ("c.pt", lambda file: file.write_bytes(b"not at all"), "no file of tensors, or damaged"),
    "code": (
        "c.pt",
        lambda file: file.write_bytes(pickle.dumps(_Code(), 2)),
        "asks for print, which is no tensor; do not trust it",
    ),
    "unknown ending": (
        "c.csv",
        lambda file: file.write_text("1,2"),
        r"expected \.npy, \.safetensors, \.pt or \.pth, not \.csv",
    ),
    "no ending": ("classes", lambda file: file.write_text("1,2"), "not a name without ending"),
}


def _saved(file: Path) -> bytes:
    np.save(file, _rows().numpy())
    return file.read_bytes()


@pytest.mark.parametrize("name", BAD)
def test_class_embeddings_that_cannot_be_used(
    tmp_path: Path, extraction: Config, counting: Any, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    file, write, message = tmp_path / BAD[name][0], *BAD[name][1:]
    write(file)
    with pytest.raises(HdovdError) as error:
        extract_clip(extraction(tmp_path / "cache", class_embeddings=file), counting)
    assert re.search(message, str(error.value)), str(error.value)
    assert "--class-embeddings" in str(error.value)
    assert file.name in str(error.value)
    assert "code of the file ran" not in capfd.readouterr().out
    assert counting.batches == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("part_rows", [64, 7])
def test_class_embeddings_take_the_place_of_the_names_and_nothing_else(
    copied_cache: Path, extraction: Config, embeddings: Path, counting: Any, part_rows: int
) -> None:
    changes = {"class_embeddings": embeddings, "features": "learned", "part_rows": part_rows}
    lines: list[str] = []
    with lines_to(lines.append):
        report = extract_clip(extraction(copied_cache, **changes), counting)
    assert _decisions(report) == {CLASS: "extract"}
    assert (counting.pictures, counting.names) == (0, [])
    assert any(
        re.search('class_embeddings differs: expected "[0-9a-f]{24}", the cache has null', line) for line in lines
    ), lines
    plain, learned = FeatureCache(copied_cache), FeatureCache(copied_cache, "learned")
    learned.require_together()
    assert {level for level in Level if plain.key(level) != learned.key(level)} == {CLASS}
    np.testing.assert_array_equal(learned.class_embeddings(NAMES), _rows().numpy().astype(np.float16))
    np.testing.assert_array_equal(
        learned.class_embeddings([NAMES[20], NAMES[3]]), _rows()[[20, 3]].numpy().astype(np.float16)
    )
    inputs = learned.key_inputs(CLASS)
    assert inputs.keys() == {"schema_version", "clip", "names", "class_embeddings"}
    assert (inputs["clip"], inputs["names"]) == (learned.key_inputs(Level.IMAGE)["clip"], NAMES)
    assert _decisions(extract_clip(extraction(copied_cache, **changes))) == {}


def test_templates_still_make_the_nouns_and_only_they_do(
    copied_cache: Path, extraction: Config, embeddings: Path
) -> None:
    extract_clip(extraction(copied_cache, class_embeddings=embeddings))
    report = extract_clip(extraction(copied_cache, class_embeddings=embeddings, templates=("{} in the snow",)))
    assert _decisions(report) == dict.fromkeys((Level.NOUN, Level.PSEUDO_LABEL), "extract")


def test_rows_of_other_norms_are_normalised(tmp_path: Path, extraction: Config, counting: Any) -> None:
    rows = _rows()
    rows[3] *= 1e20  # its square is no float32
    rows[7] *= 1e-30
    torch.save(rows, tmp_path / "long.pt")
    extract_clip(extraction(tmp_path / "cache", class_embeddings=tmp_path / "long.pt"), counting)
    np.testing.assert_allclose(FeatureCache(tmp_path / "cache").class_embeddings(NAMES), _rows().numpy(), atol=1e-3)


def test_other_rows_are_another_product(copied_cache: Path, extraction: Config, embeddings: Path) -> None:
    extract_clip(extraction(copied_cache, class_embeddings=embeddings))
    rows = _rows()
    rows[[0, 1]] = rows[[1, 0]]
    np.save(embeddings, rows.numpy())
    assert _decisions(extract_clip(extraction(copied_cache, class_embeddings=embeddings))) == {CLASS: "extract"}


def test_synonyms_and_class_embeddings_exclude_each_other(
    tmp_path: Path, extraction: Config, synonyms: Path, embeddings: Path
) -> None:
    with pytest.raises(HdovdError, match="--synonyms has no use with --class-embeddings"):
        extraction(tmp_path / "cache", synonyms=synonyms, class_embeddings=embeddings)


# --- from one process to another, and from then to now ---


def test_config_survives_as_plain_values_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that decides on a key; how it is computed is for each process to say."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").touch()
    (tmp_path / "p.toml").touch()
    here = {
        "proposals": Path("p.json"),
        "vocabulary": Path("v.txt"),
        "captions": Path("c.json"),
        "synonyms": Path("s.toml"),
    }
    config = ExtractConfig(
        data=DataPaths(Path("coco"), Path("images"), Path("a.json"), "voc"),
        cache="cache",
        clip="local-dir:clip",
        pretrained="weights.pt",
        protocol="p.toml",
        templates=("{} here", "a {}"),
        recipe=CropRecipe(Shape.SQUARE, (1, 2)),
        precision=Precision.BF16,
        activation=Activation.GELU,
        features="mine",
        device="cpu",
        batch_size=3,
        part_rows=5,
        workers=1,
        dry_run=True,
        retry_failed=True,
        share=Share(1, 2),
        executor=Executor.RAY,
        store=Store.WEBDATASET,
        exif=Exif.IGNORE,
        **here,
    )
    tree = json.loads(json.dumps(config.to_dict()))
    monkeypatch.chdir("/")
    again = ExtractConfig.from_dict(tree, "elsewhere")
    expected = {name: tmp_path / path for name, path in here.items()} | {
        "data": DataPaths(tmp_path / "coco", tmp_path / "images", tmp_path / "a.json", "voc"),
        "cache": "elsewhere",
        "clip": f"local-dir:{tmp_path / 'clip'}",
        "pretrained": str(tmp_path / "weights.pt"),
        "protocol": str(tmp_path / "p.toml"),
        "templates": ("{} here", "a {}"),
        "recipe": CropRecipe(Shape.SQUARE, (1, 2)),
        "precision": Precision.BF16,
        "activation": Activation.GELU,
        "features": "mine",
        "class_embeddings": None,
        "nouns": None,
        "verdicts": None,
        "labels": LabelRule(choice=LabelChoice.LIKELY),
        "device": "auto",
        "batch_size": None,
        "part_rows": 65_536,
        "workers": None,
        "dry_run": False,
        "retry_failed": False,
        "share": None,
        "executor": Executor.LOCAL,
        "submitit": None,
        "store": Store.ZARR,
        "exif": Exif.IGNORE,
        "teacher": "open_clip",
    }
    assert {f.name: getattr(again, f.name) for f in fields(ExtractConfig)} == expected
    other = replace(again, synonyms=None, class_embeddings=Path("c.npy"), teacher="my_module:load")
    assert ExtractConfig.from_dict(other.to_dict(), "elsewhere") == replace(other, class_embeddings=Path("/c.npy"))


def test_a_form_of_ones_own_is_not_imported_because_a_set_names_it() -> None:
    known = DataPaths(Path("data"), form="my_forms:form")
    with pytest.raises(HdovdError, match=r"form my_forms:form, code outside .* with --data data --form my_forms:form"):
        laid_over(DataPaths(images=Path("i")), known)
    assert laid_over(DataPaths(form="my_forms:form"), known) == known
    assert laid_over(DataPaths(Path("elsewhere")), known) == DataPaths(Path("elsewhere"))
    assert laid_over(DataPaths(images=Path("i")), replace(known, form="voc")) == DataPaths(
        Path("data"), Path("i"), form="voc"
    )
    assert laid_over(DataPaths(form="yolo"), replace(known, form="voc")) == replace(known, form="yolo")


def test_sets_from_before_these_options_stay_what_they_are(copied_cache: Path, extraction: Config) -> None:
    """What they were made from says nothing of the options; they are read, and written no other way."""
    made_from = FeatureCache(copied_cache).set.made_from
    assert made_from["data"].keys() == {"root", "images", "annotations"}
    assert not made_from.keys() & {"synonyms", "class_embeddings"}
    assert ExtractConfig.from_dict(made_from, "c", device="cpu") == replace(
        extraction(Path("c")), cache="c", precision=Precision.FP32
    )


@pytest.mark.parametrize("option", ["synonyms", "class_embeddings"])
def test_repair_makes_the_class_level_from_the_same_file(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    extraction: Config,
    counting: Any,
    contents: Callable[[Path], dict[str, str]],
    option: str,
) -> None:
    file: Path = request.getfixturevalue({"synonyms": "synonyms", "class_embeddings": "embeddings"}[option])
    cache = tmp_path / "cache"
    extract_clip(extraction(cache, **{option: file}), counting)
    before = contents(cache)
    (rows,) = cache.glob("class/*/embedding/c/0/0")
    rows.write_bytes(rows.read_bytes()[:-50])
    assert check_cache(CheckConfig(cache=cache), counting).findings
    check_cache(CheckConfig(cache=cache, repair=True), counting)
    extract_clip(extraction(cache, **{option: file}), counting)
    assert check_cache(CheckConfig(cache=cache), counting).findings == []
    assert contents(cache) == before
