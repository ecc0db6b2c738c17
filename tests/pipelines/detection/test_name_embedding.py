"""Text embeddings of any names for a run: the rows are those that its cache would hold, and CLIP is loaded only if it
must be.
"""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdovd.cache import Level
from hdovd.cache.identity import sealed
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.detection import names as name_embedding
from hdovd.pipelines.detection.names import NameEmbedder
from hdovd.pipelines.runs import RunFolder

CPU = torch.device("cpu")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The CLIPs that are loaded while a test runs, each the real one."""
    clips: list[Any] = []

    def load(*words: Any) -> Any:
        clips.append(real(*words))
        return clips[-1]

    real = name_embedding.load_run_clip
    monkeypatch.setattr(name_embedding, "load_run_clip", load)
    return clips


@pytest.fixture
def embedder(distilled: RunFolder, tmp_path: Path) -> Callable[..., NameEmbedder]:
    def make(run: Path | None = None, **options: Any) -> NameEmbedder:
        usual: dict[str, Any] = {"kept_in": tmp_path / "kept"}
        return NameEmbedder(distilled if run is None else RunFolder(run), CPU, **(usual | options))

    return make


@pytest.fixture
def changed(distilled: RunFolder, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run whose record was changed."""

    def make(change: Callable[[dict[str, Any]], object]) -> Path:
        out = Path(shutil.copytree(distilled.path, tmp_path / "changed run"))
        record = json.loads((out / "run.json").read_text())
        change(record["cache"])
        del record["sha256"]  # as an older version wrote it
        (out / "run.json").write_text(json.dumps(record))
        return out

    return make


def _nouns(cache: Path, run: RunFolder) -> tuple[list[str], np.ndarray]:
    """Nouns that are no classes, with their rows as extraction wrote them."""
    reader, classes = FeatureCache(cache), set(run.protocol().names)
    names, rows = reader.names(Level.NOUN), reader.embeddings(Level.NOUN)
    places = [row for row, name in enumerate(names) if name not in classes][:5]
    assert places
    return [names[row] for row in places], rows[places]


def test_rows_are_those_of_the_cache(
    embedder: Callable[..., NameEmbedder], cache: Path, distilled: RunFolder, loaded: list[Any]
) -> None:
    nouns, rows = _nouns(cache, distilled)
    novel = distilled.protocol().novel[0]
    found = embedder().embed([*nouns, novel])
    assert found.dtype == torch.float32
    assert np.abs(found[:-1].numpy() - rows).max() <= 1e-3  # a place of float16: CLIP sums other batches here
    assert torch.equal(found[-1], distilled.class_embeddings()[len(distilled.protocol().base)])
    assert len(loaded) == 1


def test_classes_of_the_run_need_no_clip(
    embedder: Callable[..., NameEmbedder], distilled: RunFolder, loaded: list[Any]
) -> None:
    names = distilled.protocol().names
    assert torch.equal(embedder().embed([names[3].upper(), names[-1]]), distilled.class_embeddings()[[3, -1]])
    assert loaded == []


def test_the_second_time_needs_no_clip_and_gives_the_same_bits(
    embedder: Callable[..., NameEmbedder], loaded: list[Any]
) -> None:
    first = embedder().embed(["red kite", "zeppelin"])
    assert torch.equal(embedder().embed(["zeppelin", "red kite"]), first.flip(0))
    assert len(loaded) == 1
    embedder().embed(["zeppelin", "a third"])
    assert len(loaded) == 2


def test_one_embedder_keeps_its_clip_until_it_is_told_to_forget_it(
    embedder: Callable[..., NameEmbedder], loaded: list[Any]
) -> None:
    names = embedder()
    names.embed(["one"])
    names.embed(["two"])
    assert len(loaded) == 1
    names.forget_clip()
    names.embed(["three"])
    assert len(loaded) == 2


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])],
    ids=["empty", "cut", "one bit"],
)
def test_a_damaged_row_is_told_and_made_anew(
    damage: Callable[[bytes], bytes], embedder: Callable[..., NameEmbedder], tmp_path: Path, loaded: list[Any]
) -> None:
    whole = embedder().embed(["zeppelin"])
    (file,) = (tmp_path / "kept").rglob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    log: list[str] = []
    with lines_to(log.append):
        assert torch.equal(embedder().embed(["zeppelin"]), whole)
    assert any(str(file) in line and "damaged" in line for line in log)
    assert torch.equal(embedder().embed(["zeppelin"]), whole)
    assert len(loaded) == 2


def test_a_folder_that_cannot_be_written_is_told(embedder: Callable[..., NameEmbedder], tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file in its place")
    log: list[str] = []
    with lines_to(log.append):
        assert embedder().embed(["zeppelin"]).shape == (1, 24)
    assert any("not kept" in line for line in log)


def test_two_processes_may_keep_the_same_names_at_once(
    embedder: Callable[..., NameEmbedder], tmp_path: Path, loaded: list[Any]
) -> None:
    names = [f"thing {number}" for number in range(20)]
    first = embedder()
    expected = first.embed(names)
    shutil.rmtree(tmp_path / "kept")
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            try:
                for _ in range(5):
                    first.embed(names)
                    shutil.rmtree(tmp_path / "kept", ignore_errors=True)  # others' files go, as they write them
                first.embed(names)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    log: list[str] = []
    with lines_to(log.append):
        assert torch.equal(embedder().embed(names), expected)
    assert not any("damaged" in line for line in log)


# --- the prompts ---


def test_other_prompts_are_used_for_all_names_and_kept_apart(
    embedder: Callable[..., NameEmbedder], distilled: RunFolder, loaded: list[Any]
) -> None:
    known, log = distilled.protocol().names[0], list[str]()
    plain = embedder().embed(["zeppelin", known])
    with lines_to(log.append):
        other = embedder(templates=["it says {} there"]).embed(["zeppelin", known])
    assert (other - plain).abs().amax(1).min() > 0.01
    assert any("not the prompts" in line for line in log)
    assert torch.equal(embedder().embed(["zeppelin", known]), plain)
    assert torch.equal(embedder(templates=["it says {} there"]).embed(["zeppelin", known]), other)
    assert len(loaded) == 2


def test_rows_of_a_file_leave_no_prompts_for_other_names(
    embedder: Callable[..., NameEmbedder], changed: Callable[..., Path], distilled: RunFolder
) -> None:
    def from_file(cache: dict[str, Any]) -> None:
        inputs = cache["levels"]["class"]["inputs"]
        del inputs["templates"], inputs["tokens"]
        inputs["class_embeddings"] = "a hash"

    run, known = changed(from_file), distilled.protocol().names[0]
    with pytest.raises(HdovdError, match=r"--templates, or --class-embeddings"):
        embedder(run).embed(["zeppelin"])
    found = embedder(run, templates=["a photo of a {}"]).embed(["zeppelin", known])
    assert torch.equal(found[1], distilled.class_embeddings()[0])  # the file's, whatever the prompts
    assert torch.equal(found, embedder().embed(["zeppelin", known]))


# --- which CLIP ---


def test_another_clip_is_refused(
    embedder: Callable[..., NameEmbedder], save_clip: Callable[..., str], tmp_path: Path
) -> None:
    other = save_clip(tmp_path / "other", seed=7)
    with pytest.raises(HdovdError, match=r"not the CLIP of the run:\s+weights_sha256 differs"):
        embedder(clip=other).embed(["zeppelin"])
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


def test_another_tokenizer_is_refused(embedder: Callable[..., NameEmbedder], changed: Callable[..., Path]) -> None:
    run = changed(lambda cache: cache["levels"]["class"]["inputs"].update(tokens="of another tokenizer"))
    with pytest.raises(HdovdError, match="another tokenizer"):
        embedder(run).embed(["zeppelin"])


def test_a_run_whose_prompts_had_underscores_embeds_other_names(
    distilled: RunFolder, embedder: Callable[..., NameEmbedder], changed: Callable[..., Path]
) -> None:
    """Its record is of names, and of tokens, as they were written; names of today are said with spaces."""
    clip = name_embedding.load_run_clip(distilled, None, CPU)

    def before(cache: dict[str, Any]) -> None:
        inputs = cache["levels"]["class"]["inputs"]
        inputs["names"] = ["traffic_light", *inputs["names"][1:]]
        inputs["tokens"] = clip.hash_prompts(inputs["names"], tuple(inputs["templates"]))

    rows = embedder(changed(before)).embed(["alarm_clock", "alarm clock", "clock tower"])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_without_its_cache_a_run_needs_to_be_told_where_clip_is(
    embedder: Callable[..., NameEmbedder], changed: Callable[..., Path], clip: str, tmp_path: Path
) -> None:
    run = changed(lambda cache: cache.update(path=str(tmp_path / "gone")))
    with pytest.raises(HdovdError, match=r"gone[\s\S]*--clip"):
        embedder(run).embed(["zeppelin"])
    assert torch.equal(embedder(run, clip=clip).embed(["zeppelin"]), embedder().embed(["zeppelin"]))


def test_a_clip_that_is_not_where_the_cache_says_is_named(
    embedder: Callable[..., NameEmbedder], copied_cache: Path, changed: Callable[..., Path], tmp_path: Path
) -> None:
    (file,) = (copied_cache / "sets").iterdir()
    tree = json.loads(file.read_text())
    tree["made_from"]["clip"] = f"local-dir:{tmp_path}/moved"
    file.write_text(json.dumps(sealed(tree)))
    run = changed(lambda cache: cache.update(path=str(copied_cache)))
    with pytest.raises(HdovdError, match=r"moved[\s\S]*say where: --clip"):
        embedder(run).embed(["zeppelin"])


def test_half_precision_needs_a_gpu(embedder: Callable[..., NameEmbedder], changed: Callable[..., Path]) -> None:
    run = changed(lambda cache: cache["levels"]["class"]["inputs"]["clip"].update(compute_dtype="float16"))
    with pytest.raises(HdovdError, match="float16, which needs a GPU"):
        embedder(run).embed(["zeppelin"])


def test_rows_of_another_precision_are_not_taken(
    embedder: Callable[..., NameEmbedder], changed: Callable[..., Path], loaded: list[Any]
) -> None:
    embedder().embed(["zeppelin"])
    run = changed(lambda cache: cache["levels"]["class"]["inputs"]["clip"].update(compute_dtype="bfloat16"))
    embedder(run).embed(["zeppelin"])
    assert [clip.identity["compute_dtype"] for clip in loaded] == ["float32", "bfloat16"]
