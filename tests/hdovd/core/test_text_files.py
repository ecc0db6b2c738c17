"""Text files that people bring: byte-order marks, packed files, files that are no text; and that nobody reads one
beside `text_files`.
"""

import ast
import codecs
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hdovd
from hdovd.config.recipe import load_recipe
from hdovd.core import HdovdError
from hdovd.core.text_files import JsonStream, checked_name, cut, read_json, read_toml, shown
from hdovd.data import load_protocol
from hdovd.pipelines.common.name_list import read_vocabulary
from hdovd.pipelines.extraction.identities import read_synonyms
from hdovd.pipelines.teachers.base import read_templates

BOM = codecs.BOM_UTF8
PROTOCOL = 'name = "mine"\nbase = ["a"]\nnovel = []\n'
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "JSON": ('{"a": [1, 2]}', lambda file: read_json(file, "what")),
    "stream": ('{"a": [1, 2]}', lambda file: [*JsonStream(file, "what")]),
    "TOML": ('a = "☃"', lambda file: read_toml(file, "what")),
    "names": ("anchor\nbook\n", read_vocabulary),
    "templates": ("a photo of a {}\n", lambda file: read_templates(str(file))),
    "protocol": (PROTOCOL, lambda file: load_protocol(str(file))),
    "recipe": (load_recipe("demo").to_toml(), lambda file: load_recipe(str(file))),
    "synonyms": ('couch = ["couch", "sofa"]', lambda file: read_synonyms(file, ["couch"])),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_byte_order_mark_is_passed_over_and_packed_files_are_unpacked(tmp_path: Path, kind: str) -> None:
    text, read = READERS[kind]
    file = tmp_path / "file"
    file.write_bytes(text.encode())
    expected = read(file)
    for content in (
        BOM + text.encode(),
        gzip.compress(text.encode(), mtime=0),
        gzip.compress(BOM + text.encode(), mtime=0),
    ):
        file.write_bytes(content)
        assert read(file) == expected


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "content",
    [b"\xff\xfea\x00", b"\x1f\x8b", b"\x1f\x8b\x08\x00 damaged", gzip.compress(b"abc" * 99, mtime=0)[:-9], b"\x80"],
)
def test_what_is_no_text_is_a_line(tmp_path: Path, kind: str, content: bytes) -> None:
    file = tmp_path / "the file"
    file.write_bytes(content)
    with pytest.raises(HdovdError, match="the file") as error:
        READERS[kind][1](file)
    assert len(str(error.value)) < 600


DEEP, LONG = 100_000, 5_000


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        ("JSON", "[" * DEEP + "]" * DEEP, "nested too deeply"),
        ("stream", "[" * DEEP + "]" * DEEP, "nested too deeply"),
        ("stream", '{"a": [' + '{"b":' * DEEP + "1" + "}" * DEEP + "]}", "nested too deeply"),
        ("JSON", "9" * LONG, "digits"),
        ("stream", "[" + "9" * LONG + "]", "digits"),
        ("TOML", "a = " + "[" * DEEP + "]" * DEEP, "nested too deeply"),
        ("TOML", "a = " + "9" * LONG, "not valid TOML"),
        ("TOML", f"{'k' * 100_000} = 1\n{'k' * 100_000} = 2", "not valid TOML"),
        ("protocol", f'name = "x"\nbase = ["a"]\nnovel = []\n{"k" * 100_000} = 1', "kkkk.* is 1: Unexpected"),
        ("protocol", f'name = "x"\nbase = ["{"a" * 100_000}"]\nnovel = []', "of 100,000 characters"),
        ("protocol", f'name = "x"\nbase = "{"a" * 100_000}"\nnovel = []', "base is the text"),
        (
            "protocol",
            f'name = "x"\nbase = ["a"]\nnovel = []\nmin_image_side_px = "{"a" * 100_000}"',
            "min_image_side_px",
        ),
        ("protocol", 'name = "\\u001b[31m"\nbase = ["a"]\nnovel = []', r"name in it is the text '\\x1b\[31m'"),
        ("protocol", 'name = "x"\nbase = ["\\ufeffa"]\nnovel = []', "cannot be printed"),
        ("recipe", f"{'k' * 100_000} = 1", "unknown key"),
        ("recipe", f'input = "{"k" * 100_000}"', "input"),
        ("recipe", "\n".join(f"k{i} = 1" for i in range(20_000)), "and 19,?.* more"),
        ("names", "a\x1b[31mb", r"line 1 is the text 'a\\x1b\[31mb'"),
        ("names", "a\n" + "b" * 3000, "line 2 is .* of 3,000 characters"),
        ("templates", "a photo\x07 of {}", "cannot be printed"),
        ("synonyms", 'couch = ["so\\u0000fa"]', "cannot be printed"),
    ],
    ids=lambda value: value[:16],
)
def test_what_no_reader_takes_is_a_short_line(tmp_path: Path, kind: str, text: str, why: str) -> None:
    file = tmp_path / "the file"
    file.write_text(text)
    with pytest.raises(HdovdError, match=why) as error:
        READERS[kind][1](file)
    assert "the file" in str(error.value)
    assert len(str(error.value)) < 8_000
    assert all(line.isprintable() for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"),
        (True, "true"),
        ("1", "the text '1'"),
        ("x" * 100, f"the text {'x' * 80!r}..."),
        (3, "3"),
        (1.5, "1.5"),
        (10**5000, "a number of more than 64 bits"),
        ([1], "a list"),
        ((1,), "a list"),
        ({}, "an object"),
        (b"a", "of type bytes"),
        ("\x1b\u202e\ud800", r"the text '\x1b\u202e\ud800'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_in_messages(value: object, expected: str) -> None:
    assert shown(value) == expected


def test_names_that_people_use_are_names() -> None:
    for name in ("hot dog", "crêpe", "نان", "می\u200cخواهم", "狗", "👩\u200d🚀", " x"):  # noqa: RUF001
        assert checked_name(name, "name") == name
    assert cut("a\x1bb" * 200) == ("a\\x1bb" * 200)[:600] + "..."


# --- nobody reads such a file beside these functions ---

OWN = {  # files that hdovd wrote itself, or that the system or the package holds
    "cache": "the stores' own records",
    "hdovd/core/text_files.py": "here",
    "hdovd/__main__.py": "the standard streams",
    "hdovd/config/recipe.py": "the recipes that ship",
    "hdovd/data/protocol.py": "the protocols that ship",
    "pipelines/ablation/ablate.py": "runs",
    "pipelines/runs/listing.py": "runs",
    "pipelines/runs/folder.py": "runs",
    "pipelines/detection/detect.py": "its lines",
    "pipelines/detection/detector.py": "what it wrote of examples",
    "pipelines/extraction/export.py": "cache records",
    "pipelines/export/model.py": "exported models",
    "pipelines/proposals/networks.py": "metadata of weights",
    "pipelines/audit/audit.py": "metadata of weights",
    "pipelines/proposal_files/file.py": "metadata of .npz",
    "pipelines/common": "/proc and /sys",
    "pipelines/report/report.py": "pages that ship",
    "pipelines/hub/push.py": "the card that ships",
    "pipelines/demo": "the demo's own world",
}


LINKS = ("hdovd/cache/", "hdovd/cli/", "hdovd/pipelines/")


def test_every_text_file_of_a_users_is_read_by_text_files() -> None:
    package = Path(hdovd.__file__).parent
    root, strays = package.parent, list[str]()
    for folder in (package, root / "cache", root / "cli", root / "pipelines"):
        for file in folder.rglob("*.py"):
            name = str(file.relative_to(root))
            if any(name == own or name.startswith(f"{own}/") for own in OWN) or name.startswith(LINKS):
                continue
            strays += [f"{name}:{node.lineno}" for node in ast.walk(ast.parse(file.read_text())) if _reads_text(node)]
    assert not strays, (
        f"read them by hdovd.core.text_files, which takes byte-order marks and packed files, or list them in OWN: "
        f"{strays}"
    )


@pytest.mark.parametrize(
    ("call", "reads"),
    [
        ("path.read_text()", True),
        ("open(path)", True),
        ("path.open()", True),
        ("path.open(encoding='utf-8')", True),
        ("open(path, 'r')", True),
        ("json.load(file)", True),
        ("json.loads(data)", True),
        ("tomllib.load(file)", True),
        ("path.open('rb')", False),
        ("open(p, 'w')", False),
        ("Image.open(path)", False),
        ("os.open(path)", False),
        ("read_text(path, what)", False),
        ("read_json(path, what)", False),
    ],
)
def test_what_counts_as_reading(call: str, reads: bool) -> None:
    assert _reads_text(ast.parse(call, mode="eval").body) is reads


def _reads_text(node: ast.AST) -> bool:
    """Whether this calls `read_text()`, `open()` for reading text, or parses JSON or TOML."""
    if not isinstance(node, ast.Call):
        return False
    words = ast.unparse(node.func).split(".")
    if (words[-1] == "read_text" and len(words) > 1) or (
        words[0] in ("json", "tomllib") and words[-1] in ("load", "loads")
    ):
        return True
    modes = [
        a.value
        for a in (*node.args, *(k.value for k in node.keywords if k.arg == "mode"))
        if isinstance(a, ast.Constant)
    ]
    return (
        words[-1] == "open"
        and words != ["os", "open"]
        and not any(isinstance(m, str) and set(m) & set("bwax") for m in modes)
        and (words == ["open"] or not node.args)
    )
