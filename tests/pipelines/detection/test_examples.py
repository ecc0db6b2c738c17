"""Classes by example: their rows are those that the cache would hold of such boxes, moved among the texts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.detection import names as name_embedding
from hdovd.pipelines.detection.detector import Detector, evaluate_examples
from hdovd.pipelines.detection.names import Gap, NameEmbedder, read_examples
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.runs import RunFolder

CPU = torch.device("cpu")


@pytest.fixture
def embedder(distilled: RunFolder, tmp_path: Path) -> NameEmbedder:
    return NameEmbedder(distilled, CPU, kept_in=tmp_path / "kept")


@pytest.fixture
def crops(world: Path, tmp_path: Path) -> Path:
    """A folder of crops of two base and two novel classes, all that the training pictures hold of them."""
    tree, out = json.loads((world / "annotations" / "instances_train2017.json").read_text()), tmp_path / "crops"
    name_of = {one["id"]: one["name"] for one in tree["categories"]}
    file_of = {one["id"]: one["file_name"] for one in tree["images"]}
    for one in tree["annotations"]:
        name, (x, y, w, h) = name_of[one["category_id"]], one["bbox"]
        if name in ("anchor", "bell", "fish", "star"):
            (out / name).mkdir(parents=True, exist_ok=True)
            with Image.open(world / "train2017" / file_of[one["image_id"]]) as picture:
                picture.crop((x, y, x + w, y + h)).save(out / name / f"{one['id']}.png")
    assert len(list(out.iterdir())) == 4
    return out


def _alone(embedder: NameEmbedder, source: Any, images: Path | None = None) -> dict[str, torch.Tensor]:
    examples = read_examples(source, images)
    return dict(zip(examples.names, embedder.embed_examples(examples, 1.0), strict=True))


# --- rows ---


def test_boxes_of_the_training_pictures_have_the_rows_of_the_cache(
    embedder: NameEmbedder, world: Path, cache: Path, distilled: RunFolder, crops: Path
) -> None:
    protocol, reader = load_protocol(str(world / "protocol.toml")), FeatureCache(cache)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in protocol.base}
    for image in DataPaths(world).load("train2017", protocol, base_only=True).images:
        names = dict(zip(image.annotation_ids.tolist(), (protocol.base[k] for k in image.labels), strict=True))
        own = reader.instances(image.id).base_boxes()
        for row, number in zip(own.embedding, own.annotation_id.tolist(), strict=True):
            rows[names[number]].append(row.astype(np.float32))
    gap = Gap.of(reader, embedder.own_rows(protocol.base))
    found = _alone(embedder, world / "annotations" / "instances_train2017.json", world / "train2017")
    assert {*protocol.base} & {*found}
    assert {*protocol.novel} & {*found}
    for name in {*protocol.base} & {*found}:
        expected = gap.moved(normalize(torch.from_numpy(np.stack(rows[name])).mean(dim=0, keepdim=True), dim=1))[0]
        assert torch.allclose(found[name], expected, atol=2e-3), name
    for name, row in _alone(embedder, crops).items():  # the same boxes, cut out
        assert torch.allclose(found[name], row, atol=2e-3), name


def test_pictures_of_python_are_examples_too(embedder: NameEmbedder, crops: Path) -> None:
    files = sorted((crops / "star").iterdir())
    with Image.open(files[0]) as picture:
        shown = [picture.convert("RGB"), *map(str, files[1:])]
    found = _alone(embedder, {" my   star": shown, "fish": sorted((crops / "fish").iterdir())})
    expected = _alone(embedder, crops)
    assert list(found) == ["my star", "fish"]
    assert torch.allclose(found["my star"], expected["star"], atol=1e-6)
    assert torch.allclose(found["fish"], expected["fish"], atol=1e-6)
    assert not torch.allclose(found["fish"], expected["star"], atol=0.05)


def test_clip_is_loaded_once_until_it_is_forgotten(
    embedder: NameEmbedder, crops: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, load = list[RunFolder](), name_embedding.load_run_clip
    monkeypatch.setattr(name_embedding, "load_run_clip", lambda *given: (loads.append(given[0]), load(*given))[1])
    examples = read_examples(crops)
    embedder.embed(["never named"])
    first, second = embedder.embed_examples(examples), embedder.embed_examples(examples)
    assert torch.equal(first, second)
    assert len(loads) == 1
    embedder.forget_clip()
    assert torch.equal(embedder.embed_examples(examples), first)
    assert len(loads) == 2


def test_examples_alone_ask_nothing_of_the_name_and_a_mix_lies_between(embedder: NameEmbedder, crops: Path) -> None:
    examples = read_examples(crops)
    alone, half, names = (embedder.embed_examples(examples, mix) for mix in (1.0, 0.5, 0.0))
    assert torch.allclose(names, normalize(embedder.embed(examples.names), dim=1), atol=1e-6)
    assert torch.allclose(half, normalize(alone + names, dim=1), atol=1e-5)
    renamed = read_examples({f"thing {name}": sorted((crops / name).iterdir()) for name in examples.names})
    assert torch.allclose(embedder.embed_examples(renamed, 1.0), alone, atol=1e-6)
    assert not (embedder._kept_in / "texts").exists()


def test_rows_are_moved_by_what_lies_between_the_means() -> None:
    gap = Gap(image=torch.tensor([0.6, 0.0, 0.0]), text=torch.tensor([0.0, 0.0, 0.8]), spread=0.5)
    found = gap.moved(torch.tensor([[0.6, 0.8, 0.0]]))
    assert torch.allclose(found, normalize(torch.tensor([[0.0, 0.5, 0.8]]), dim=1))


def test_classes_with_many_boxes_weigh_no_more_and_zeros_nothing() -> None:
    own = {0: [[1, 0, 0]] * 9, 1: [[0, 1, 0], [0, 0, 0]]}  # the last of a picture that could not be read
    cache: Any = SimpleNamespace(
        url="cache",
        image_ids=lambda: np.array([0, 1]),
        instances=lambda n: SimpleNamespace(base_boxes=lambda: SimpleNamespace(embedding=np.array(own[n], np.float16))),
    )
    gap = Gap.of(cache, normalize(torch.tensor([[1.0, 0, 1], [0, 1, 1], [-1, -1, 1]]), dim=1))
    assert gap.image.tolist() == [0.5, 0.5, 0]
    cache.instances = lambda _: SimpleNamespace(base_boxes=lambda: SimpleNamespace(embedding=np.zeros((2, 3))))
    with pytest.raises(HdovdError, match="no embeddings of base boxes"):
        Gap.of(cache, torch.eye(3))


# --- what cannot be used ---


def test_unreadable_crops_are_told_and_a_class_without_any_is_refused(embedder: NameEmbedder, crops: Path) -> None:
    expected = _alone(embedder, crops)
    (crops / "star" / "text.png").write_text("no picture")
    whole = next((crops / "star").glob("[0-9]*.png")).read_bytes()
    (crops / "star" / "torn.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    told: list[str] = []
    with lines_to(told.append):
        found = _alone(embedder, crops)
    assert torch.allclose(found["star"], expected["star"], atol=1e-6)
    line = next(line for line in told if "could not be read" in line)
    assert line.startswith("2 examples")
    assert "text.png" in line
    assert "torn.png" in line
    for file in (crops / "fish").iterdir():
        file.write_bytes(b"")
    with pytest.raises(HdovdError, match="no readable crop of fish"):
        _alone(embedder, crops)


def test_a_class_of_crowds_alone_is_left_out(world: Path, tmp_path: Path) -> None:
    tree = json.loads((world / "annotations" / "instances_train2017.json").read_text())
    bell = next(one["id"] for one in tree["categories"] if one["name"] == "bell")
    for one in tree["annotations"]:
        one["iscrowd"] = int(one["category_id"] == bell)
    (tmp_path / "crowds.json").write_text(json.dumps(tree))
    found = read_examples(tmp_path / "crowds.json", world / "train2017").names
    assert "bell" not in found
    assert len(found) == len({one["category_id"] for one in tree["annotations"]}) - 1


def test_boxes_of_a_torn_picture_count_for_nothing(embedder: NameEmbedder, copied_world: Path, tmp_path: Path) -> None:
    file, folder = copied_world / "annotations" / "instances_train2017.json", copied_world / "train2017"
    tree = json.loads(file.read_text())
    torn = folder / tree["images"][0]["file_name"]
    torn.write_bytes(torn.read_bytes()[:1500])
    tree["annotations"] = [one for one in tree["annotations"] if one["image_id"] != tree["images"][0]["id"]]
    (tmp_path / "without.json").write_text(json.dumps(tree))
    told: list[str] = []
    with lines_to(told.append):
        found, expected = _alone(embedder, file, folder), _alone(embedder, tmp_path / "without.json", folder)
    assert any(line.startswith("1 example could not be read") and torn.name in line for line in told)
    assert found.keys() == expected.keys()
    for name, row in found.items():
        assert torch.allclose(row, expected[name], atol=1e-5), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda crops: [shutil.rmtree(one) for one in crops.iterdir()], "has no subfolders"),
        (lambda crops: shutil.copytree(crops / "star", crops / "Star"), "named twice: Star, star"),
        (lambda crops: (crops / "empty").mkdir(), "no crops of empty: its folder is empty"),
    ],
)
def test_folders_that_do_not_fit_are_refused(crops: Path, change: Callable[[Path], Any], said: str) -> None:
    change(crops)
    with pytest.raises(HdovdError, match=said):
        read_examples(crops)


def test_annotations_without_their_pictures_are_refused(world: Path, tmp_path: Path) -> None:
    file = world / "annotations" / "instances_train2017.json"
    with pytest.raises(HdovdError, match="--example-images"):
        read_examples(file)
    with pytest.raises(HdovdError, match=r"not in .*val2017: \d+ of \d+ pictures"):
        read_examples(file, world / "val2017")


def test_another_clip_and_a_cache_that_is_gone_are_refused(
    distilled: RunFolder, crops: Path, save_clip: Callable[..., str], tmp_path: Path
) -> None:
    other = NameEmbedder(distilled, CPU, clip=save_clip(tmp_path / "other", seed=1))
    with pytest.raises(HdovdError, match="is not the CLIP of the run"):
        other.embed_examples(read_examples(crops), 1.0)
    run = RunFolder(Path(shutil.copytree(distilled.path, tmp_path / "run")), trusted=True)
    record = json.loads((run.path / "run.json").read_text())
    record["cache"]["path"] = str(tmp_path / "gone")
    (run.path / "run.json").write_text(json.dumps(record))
    with pytest.raises(HdovdError, match="gone"):
        NameEmbedder(run, CPU).embed_examples(read_examples(crops), 1.0)


# --- detection and evaluation ---


def test_a_detector_takes_examples_and_names_together(distilled: RunFolder, crops: Path, world: Path) -> None:
    detector = Detector.from_run(distilled.path, device="cpu")
    picture = next((world / "val2017").iterdir())
    assert detector.set_examples(crops, names=["Star", "candle"], mix=1.0) is detector
    assert detector.names == ("anchor", "bell", "fish", "Star", "candle")
    assert detector.is_novel.tolist() == [False, False, True, True, False]
    rows = _alone(detector.embedder, crops)
    expected = torch.stack([*rows.values(), detector.embedder.own_rows(["candle"])[0]])
    assert torch.allclose(detector.class_embeddings, expected, atol=1e-3)
    assert len(detector(picture, 0.0).names) > 0
    with pytest.raises(HdovdError, match=r"--mix 1\.5"):
        detector.set_examples(crops, mix=1.5)
    with pytest.raises(HdovdError, match="named twice: Dog, dog"):
        detector.set_examples(crops, names=["dog", "Dog"])


def test_evaluation_by_example_leaves_the_run_s_own_alone(
    distilled: RunFolder, crops: Path, world: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(distilled.path, tmp_path / "run"))
    plain = evaluate(EvalConfig(run=run, data=DataPaths(world), device="cpu"))
    before = {name: (run / name).read_bytes() for name in ("metrics.json", "detections.json")}
    found = {
        mix: evaluate_examples(EvalConfig(run=run, data=DataPaths(world), device="cpu", mix=mix), crops)
        for mix in (0.0, 1.0)
    }
    assert before == {name: (run / name).read_bytes() for name in before}
    assert found[0.0].combined.summary()["ap50"] == pytest.approx(plain.combined.summary()["ap50"])
    assert json.loads((run / "examples" / "crops-1" / "examples.json").read_text())["mix"] == 1
    ours, own = (
        json.loads(f.read_text()) for f in (run / "examples" / "crops-1" / "detections.json", found[0.0].files[1])
    )
    assert ours
    assert ours != own
    other = Path(shutil.copytree(crops, tmp_path / "other" / "crops"))
    with pytest.raises(HdovdError, match=r"crops-1 holds results of .*: move it away"):
        evaluate_examples(EvalConfig(run=run, data=DataPaths(world), device="cpu", mix=1.0), other)
    (crops / "star").rename(crops / "unheard of")
    with pytest.raises(HdovdError, match="no classes of protocol demo-world: unheard of"):
        evaluate_examples(EvalConfig(run=run, data=DataPaths(world), device="cpu"), crops)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["detect", "RUN", "PICTURE", "--out", "out", "--examples", "crops"], 0, "names: 4, of them base classes"),
        (["detect", "RUN", "PICTURE", "--out", "out", "--examples", "crops", "--mix", "2"], 1, "--mix 2"),
        (["detect", "RUN", "PICTURE", "--out", "out", "--examples", "nothing"], 1, "no such file or folder"),
        (["detect", "RUN", "PICTURE", "--out", "out", "--example-images", "crops"], 1, "--examples FILE.json"),
        (["detect", "RUN", "PICTURE", "--out", "out", "--examples", "PICTURE"], 1, "expected a folder of crops"),
        (["eval", "RUN", "--data", "WORLD", "--examples", "crops", "--example-images", "crops"], 1, "COCO file"),
        (["detect", "RUN", "PICTURE", "--out", "out", "--examples", "crops", "--class-embeddings", "x"], 1, "both"),
        (["eval", "RUN", "--data", "WORLD", "--examples", "crops"], 0, "examples/crops-0.25/metrics.json"),
        (["eval", "RUN", "--data", "WORLD", "--examples", "crops", "--protocol", "zero-shot"], 1, "--protocol"),
    ],
)
def test_the_commands(
    distilled: RunFolder,
    crops: Path,
    world: Path,
    words: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hdovd.cli.main import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))
    monkeypatch.chdir(crops.parent)
    places = {"RUN": shutil.copytree(distilled.path, tmp_path / "run"), "WORLD": world}
    places["PICTURE"] = next((world / "val2017").iterdir())
    monkeypatch.setattr(sys, "argv", ["hdovd", *(str(places.get(word, word)) for word in words), "--device", "cpu"])
    ended = 0
    try:
        main()
    except SystemExit as end:
        ended = int(end.code or 0)
    printed = capsys.readouterr()
    assert ended == code, printed
    assert said in printed.out + printed.err
    if words[0] == "detect" and not code:
        assert json.loads((tmp_path / "out" / "images.json").read_text())["info"]["examples"] == "crops"
