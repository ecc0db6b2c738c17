"""The incremental reader agrees with `json.loads` on every document, at every block border, and on what is no
document."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from hdovd.core import HdovdError
from hdovd.core.text_files import JsonStream

BLOCKS = [1, 2, 7, 64, 1 << 20]


def rebuilt(path: Path, block: int) -> Any:
    """The document as `json.loads` gives it, put together from the stream's pairs."""
    stream = JsonStream(path, "file", block)
    tree: dict[str | None, Any] = {}
    for key, item in stream:
        if key in stream.lists:
            tree.setdefault(key, []).append(item)
        else:
            assert key not in tree  # whole, once
            tree[key] = item
    for key in stream.lists:
        tree.setdefault(key, [])
    return tree.get(None, tree)


def check(path: Path, content: str | bytes, blocks: list[int] = BLOCKS) -> None:
    """What `json.loads` makes of it is what the stream makes of it; errors are at the same place."""
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(data)
    try:
        expected = json.loads(data.decode())
    except json.JSONDecodeError as error:
        place = r"\d+" if error.msg.startswith("Illegal trailing comma") else error.pos  # Python 3.13 names the comma
        for block in blocks:
            with pytest.raises(
                HdovdError, match=rf"file .*{path.name} is not valid JSON .*char {place}\); is the download complete"
            ):
                rebuilt(path, block)
    else:
        for block in blocks:
            found = rebuilt(path, block)
            if isinstance(expected, dict):  # empty lists come last above
                found = {key: found[key] for key in expected} | found
            assert repr(found) == repr(expected), block  # repr: NaN, and 1 is not 1.0


characters = st.characters(exclude_categories=["Cs"])  # lone surrogates are no UTF-8
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(characters),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(characters, max_size=6), inner, max_size=6),
    max_leaves=30,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=values | st.lists(values) | st.dictionaries(st.text('ab☃"\\😀', max_size=3), values),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 3]),
    tight=st.booleans(),
    around=st.text(" \t\r\n", max_size=20),
    block=st.integers(1, 40),
)
def test_any_document(
    tmp_path: Path, tree: Any, ascii_only: bool, indent: int | None, tight: bool, around: str, block: int
) -> None:
    text = json.dumps(tree, ensure_ascii=ascii_only, indent=indent, separators=(",", ":") if tight else None)
    check(tmp_path / "f.json", around + text + around, [block, 1, 1 << 20])


@pytest.mark.parametrize(
    "text",
    [
        "1234",
        "-12.5e+10",
        "0.1",
        "1E5",
        "-0",
        "-Infinity",
        "NaN",
        "[12,3456,-7.25e-3,1e+5]",
        '{"a":1234.5e+6,"b":12}',
        '{"a": [1234, 1.5E-7 ]}',
        "[]",
        "{}",
        "[[]]",
        "[{}]",
        '{"a": []}',
        '{"a": {}, "b": [[]], "c": [] }',
        " [ ] ",
        "\n{\r\n}\t",
        "[null,true,false]",
        '""',
        "null",
        "[ 1 , 2 ]",
        '{"": [NaN, Infinity, -Infinity]}',
        '["\\ud83d\\ude00", "\\ud83d", "\\u2603\\n", "a\\\\"]',
        '{"\\u0061": [1], "☃": ["😀é"]}',
    ],
)
def test_tokens_at_every_border(tmp_path: Path, text: str) -> None:
    for lead in range(20):  # shifts every token against the borders
        check(tmp_path / "f.json", " " * lead + text, [1, 2, 3, 5, 7, 16, 17, 64])


DOCUMENT = '{"alpha": [{"id": 12, "b": [1.5e+3, -2]}, {"x": "☃\\u00e9\\ud83d\\ude00"}], "be": {"q": [true, null]}, "c": [], "dddd": -1.25}'  # noqa: E501


@pytest.mark.parametrize(
    "text", [DOCUMENT, '[{"image_id": 1, "bbox": [1, 2.5, 3, 4e1], "score": 0.5}, {"☃": -Infinity}, [], "a\\"b"]']
)
def test_a_document_with_one_fault(tmp_path: Path, text: str) -> None:
    """Cut short, a character less, another character: an error exactly where `json.loads` has one."""
    blocks = [1, 7, 1 << 20]
    for k in range(len(text)):
        for faulty in (text[:k], text[:k] + text[k + 1 :], *(text[:k] + c + text[k + 1 :] for c in ',]}"1{\n')):
            check(tmp_path / "f.json", faulty, blocks)


@pytest.mark.parametrize("after", ["]", "x", "{}", ", 1", "1", "\0", "\f"])
@pytest.mark.parametrize("text", ["[1, 2]", "[]", "{}", '{"a": [1]}', '{"a": 1}', '"text"'])
def test_trailing_garbage(tmp_path: Path, text: str, after: str) -> None:
    check(tmp_path / "f.json", text + after)
    check(tmp_path / "f.json", text + " " * 100 + after)


@pytest.mark.parametrize(
    "text",
    [
        "[1,]",
        "[,1]",
        "[1 2]",
        '{"a" 1}',
        '{"a": }',
        '{"a": 1,}',
        '{"a": [1], }',
        "{a: 1}",
        "{1: 1}",
        "[1}",
        '{"a": [1}',
        "[.5]",
        "[01]",
        "[1.]",
        "[1e+]",
        "[+1]",
        "['a']",
        '["\n"]',
        '["\\x"]',
        '["\\u12"]',
        "[tru]",
        "nul",
        "",
        "  ",
        "\ufeff",
        "\ufeff\ufeff[]",
    ],
)
def test_what_is_no_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(text, encoding="utf-8")
    for block in BLOCKS:
        with pytest.raises(HdovdError, match=r"f\.json is not valid JSON"):
            rebuilt(path, block)


@pytest.mark.parametrize(
    ("data", "byte"),
    [(b'["\xff"]', 2), ('["☃☃'.encode()[:-1], 5), ('{"é": ["é'.encode() + b'\x80"]}', 11), (b"\xff\xfe\x00\x01", 0)],
)
def test_what_is_no_utf8(tmp_path: Path, data: bytes, byte: int) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(data)
    for block in BLOCKS:
        with pytest.raises(HdovdError, match=rf"f\.json is not valid JSON \(.*byte {byte}\); is the download complete"):
            rebuilt(path, block)


def test_good_items_come_before_the_fault_is_met(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text("[" + "11, " * 50)
    items = iter(JsonStream(path, "file", 8))
    assert [next(items) for _ in range(50)] == [(None, 11)] * 50
    with pytest.raises(HdovdError, match="Expecting value: char 201"):
        next(items)


def test_a_list_that_stands_twice(tmp_path: Path) -> None:
    """`json.loads` keeps the last; items already handed out cannot be taken back."""
    path = tmp_path / "f.json"
    path.write_text('{"a": [1], "b": 2, "a": [3]}')
    with pytest.raises(HdovdError, match=r"f\.json: the list 'a' stands twice"):
        list(JsonStream(path, "file"))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"cannot read .*f\.json: No such file"):
        list(JsonStream(tmp_path / "f.json", "things"))


def test_it_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('{"a": [1, 2]}')
    stream = JsonStream(path, "file", 4)
    assert list(stream) == list(stream) == [("a", 1), ("a", 2)]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path, item = tmp_path / "f.json", json.dumps({"id": 1, "segmentation": [0.5] * 100})
    path.write_text('{"a": [' + ", ".join([item] * 8000) + "]}")
    assert path.stat().st_size > 4_000_000
    tracemalloc.start()
    try:
        count = sum(1 for _ in JsonStream(path, "file", 1 << 14))
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()
    assert count == 8000


def test_one_item_of_many_blocks(tmp_path: Path) -> None:
    path, tree = tmp_path / "f.json", {"a": ["x" * 100_000, [[1, 2]] * 20_000], "b": {"c": "☃" * 50_000}}
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    assert rebuilt(path, 1) == tree
