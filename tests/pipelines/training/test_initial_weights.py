"""`train --init`: what a new run begins with, what begins anew, and what is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adamixer_micro import recipe as adamixer_recipe
from rtdetr_micro import recipe as rtdetr_recipe
from safetensors.torch import load_file
from torch import Tensor

from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError, Stopped, lines_to
from hdovd.data import DataPaths, Protocol, load_protocol
from hdovd.modeling.base import build_detector
from hdovd.pipelines.ablation.ablate import AblateConfig, commands, level_keys, plan
from hdovd.pipelines.audit.audit import AuditConfig, audit
from hdovd.pipelines.audit.checks import Verdict
from hdovd.pipelines.runs import RunFolder, init_hash
from hdovd.pipelines.training.hooks import RunHooks
from hdovd.pipelines.training.loop import Loop
from hdovd.pipelines.training.train import TrainConfig, train

Started = Callable[..., tuple[dict[str, Tensor], str]]
NO_DISTILLATION = ("loss.instance.enabled=false", "loss.class.enabled=false", "loss.image.enabled=false")


@pytest.fixture
def job(world: Path, training_cache: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]) -> TrainConfig:
    return TrainConfig(
        data=DataPaths(world),
        cache=training_cache,
        out=tmp_path / "new",
        recipe=micro_recipe(),
        protocol=str(world / "protocol.toml"),
        device="cpu",
    )


@pytest.fixture
def started(job: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Started:
    """The state of a model in the moment in which its training begins, and what was said until then."""

    def run(**changes: Any) -> tuple[dict[str, Tensor], str]:
        seen, said = list[dict[str, Tensor]](), list[str]()
        with monkeypatch.context() as patch:
            patch.setattr(
                Loop, "run", lambda loop, _: seen.append({k: v.clone() for k, v in loop.model.state_dict().items()})
            )
            with lines_to(said.append):
                train(replace(job, **changes))
        return seen[0], "\n".join(said)

    return run


@pytest.fixture
def untrained(world: Path, training_cache: Path, tmp_path: Path) -> Callable[..., RunFolder]:
    """A run folder of a model with weights drawn anew."""

    def write(
        name: str, recipe: Recipe, dim: int = 24, protocol: Protocol | None = None, record: dict[str, Any] | None = None
    ) -> RunFolder:
        torch.manual_seed(7)
        protocol = protocol or load_protocol(str(world / "protocol.toml"))
        texts = torch.nn.functional.normalize(torch.randn(len(protocol.names), dim), dim=1)
        record = {"cache": {"levels": {}}, **(record or {})}
        run = RunFolder.create(tmp_path / name, recipe, protocol, texts, record)
        model = build_detector(recipe, dim, initialise=False)
        model.set_object_text(torch.randn(dim))
        run.save_model(model)
        return run

    return write


def weights(run: RunFolder) -> dict[str, Tensor]:
    return load_file(run.path / "model.safetensors")


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=0, atol=0)


def test_all_weights_are_those_of_the_run_and_memories_are_empty(
    started: Started, distilled: RunFolder, job: TrainConfig
) -> None:
    state, said = started(init=distilled.path)
    before = weights(distilled)
    memories = {name for name in before if "_queue." in name}
    assert len(memories) == 4
    assert all(before[name].any() and not state[name].any() for name in memories)
    assert state.keys() == before.keys()
    require_same(state, {name: value for name, value in before.items() if name not in memories})
    assert f"{len(before) - 5} tensors of its model.safetensors" in said
    assert "begin anew: 4 memories of the losses (instance_level.student_queue.rows" in said
    assert "not in " not in said
    assert "not used" not in said
    assert "note: the class embeddings" not in said
    record = json.loads((job.out / "run.json").read_text())["init"]
    assert record["run"] == str(distilled.path.resolve())
    assert record["sha256"] == init_hash(distilled.path)
    assert set(record["memories_begun_anew"]) == memories
    assert record["begun_anew"] == record["unused"] == []


def test_another_run_has_other_weights(started: Started, distilled: RunFolder) -> None:
    """Or the test before would hold of any two runs of a seed."""
    assert not torch.equal(started()[0]["head.fc1.weight"], weights(distilled)["head.fc1.weight"])


def test_what_levels_add_and_leave_out_is_named(
    started: Started, distilled: RunFolder, base_only: RunFolder, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    parts = {
        "head.distillation.weight",
        "head.distillation.bias",
        *(n for n in weights(distilled) if n.startswith("image_level.head.")),
    }
    state, said = started(init=base_only.path)
    require_same(state, weights(base_only))
    assert f"not in {base_only.path}: {len(parts)} tensors begin at their initial values (" in said
    assert set(json.loads((tmp_path / "new" / "run.json").read_text())["init"]["begun_anew"]) == parts
    state, said = started(init=distilled.path, recipe=micro_recipe(*NO_DISTILLATION), overwrite=True)
    require_same(weights(distilled), state)
    assert f"not used of {distilled.path}: {len(parts) + 4} tensors" in said  # and memories
    assert "begin anew" not in said
    unused = set(json.loads((tmp_path / "new" / "run.json").read_text())["init"]["unused"])
    assert unused == weights(distilled).keys() - weights(base_only).keys() - {"background_texts"}


def test_the_recipes_own_backbone_weights_are_not_asked_for(
    started: Started, distilled: RunFolder, micro_recipe: Callable[..., Recipe]
) -> None:
    state, _ = started(init=distilled.path, recipe=micro_recipe("detector.backbone.weights=nowhere.pth"))
    assert torch.equal(state["backbone.body.conv1.weight"], weights(distilled)["backbone.body.conv1.weight"])


def test_an_adamixer_brings_its_text_of_object(
    started: Started, untrained: Callable[..., RunFolder], job: TrainConfig
) -> None:
    """Moving means of other classes do not matter: they begin anew."""
    recipe, classes = adamixer_recipe(), load_protocol(job.protocol)
    fewer = Protocol("fewer", classes.base[:3], classes.novel, classes.min_image_side_px)
    source = untrained("source", recipe, protocol=fewer)
    model = build_detector(recipe, 24, initialise=False)
    source.load_model(model)
    model.text_level.centroids = torch.ones(2, 3, 24)
    model.text_level.updates += 5
    source.save_model(model)
    state, said = started(init=source.path, recipe=recipe)
    memories = {
        name for name in weights(source) if "_queue" in name or name in ("text_level.centroids", "text_level.updates")
    }
    require_same(state, {name: value for name, value in weights(source).items() if name not in memories})
    assert state["object_text"].any()
    assert state["text_level.centroids"].shape == (2, 0, 24)
    assert state["text_level.updates"] == 0
    assert "stands in" not in said
    assert f"begin anew: {len(memories)} memories" in said
    assert "another CLIP, or other prompts" in said  # its embeddings were drawn at random


def test_an_adamixer_trains_on(untrained: Callable[..., RunFolder], job: TrainConfig) -> None:
    source, said = untrained("source", adamixer_recipe()), list[str]()
    with lines_to(said.append):
        run = train(replace(job, init=source.path, recipe=adamixer_recipe("train.epochs=1")))
    assert torch.equal(weights(run)["object_text"], weights(source)["object_text"])
    assert not torch.equal(weights(run)["background"], weights(source)["background"])
    assert "stands in" not in "\n".join(said)


@pytest.mark.parametrize(("there", "asked"), [(0, 20), (20, 0)])
def test_denoising_may_come_and_go(
    started: Started, untrained: Callable[..., RunFolder], there: int, asked: int
) -> None:
    source = untrained("source", rtdetr_recipe(f"detector.denoising.queries={there}"))
    found, said = started(init=source.path, recipe=rtdetr_recipe(f"detector.denoising.queries={asked}"))
    require_same(found, {name: value for name, value in weights(source).items() if name.startswith("network.")})
    assert "denoising" in said


def test_boxes_of_novel_classes_are_told(
    started: Started, untrained: Callable[..., RunFolder], job: TrainConfig, micro_recipe: Callable[..., Recipe]
) -> None:
    classes = load_protocol(job.protocol)
    source = untrained("source", micro_recipe(), protocol=Protocol("all", classes.names, (), classes.min_image_side_px))
    assert f"boxes of {len(classes.novel)} classes that are novel in protocol" in started(init=source.path)[1]


def test_weights_of_an_oracle_are_told_and_recorded(
    started: Started, untrained: Callable[..., RunFolder], job: TrainConfig, micro_recipe: Callable[..., Recipe]
) -> None:
    source, novel = untrained("source", micro_recipe(), record={"oracle": True}), load_protocol(job.protocol).novel
    said = started(init=source.path)[1]
    assert f"boxes of {len(novel)} classes that are novel in protocol" in said
    record = json.loads((job.out / "run.json").read_text())
    assert record["init"]["oracle"] is True
    assert "oracle" not in record
    assert RunFolder(job.out).saw_novel


def test_another_size_is_refused_before_anything_is_written(
    started: Started, distilled: RunFolder, micro_recipe: Callable[..., Recipe], job: TrainConfig
) -> None:
    told = r"its model.safetensors does not fit(.|\n)*tensors are of another shape: .*expected .*\n.*fpn_channels differs: this recipe 24"  # noqa: E501
    with pytest.raises(HdovdError, match=told):
        started(init=distilled.path, recipe=micro_recipe("detector.backbone.fpn_channels=24"))
    assert not job.out.exists()


def test_another_number_of_stages_is_refused(started: Started, untrained: Callable[..., RunFolder]) -> None:
    for there, asked, told in ((2, 3, "weights of the detector are missing"), (3, 2, "tensors are of no part of it")):
        source = untrained(f"source{there}", adamixer_recipe(f"detector.decoder.stages={there}"))
        with pytest.raises(
            HdovdError, match=rf"{told}(.|\n)*stages differs: this recipe {asked}, source{there} {there}"
        ):
            started(init=source.path, recipe=adamixer_recipe(f"detector.decoder.stages={asked}"))


def test_another_detector_embedding_size_or_no_run_is_refused(
    started: Started,
    distilled: RunFolder,
    untrained: Callable[..., RunFolder],
    micro_recipe: Callable[..., Recipe],
    job: TrainConfig,
    tmp_path: Path,
) -> None:
    with pytest.raises(HdovdError, match=r"detector\.name differs: this recipe .adamixer., .* .faster_rcnn."):
        started(init=distilled.path, recipe=adamixer_recipe())
    with pytest.raises(HdovdError, match="tensors are of another shape"):
        started(init=untrained("narrow", micro_recipe(), 16).path)
    with pytest.raises(HdovdError, match=r"nowhere is no run"):
        started(init=tmp_path / "nowhere")
    with pytest.raises(HdovdError, match="is --out too"):
        started(init=job.out, overwrite=True)
    damaged = untrained("damaged", micro_recipe())
    (damaged.path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(HdovdError, match=r"model.safetensors is damaged"):
        started(init=damaged.path)
    assert not job.out.exists()


def test_a_resumed_run_needs_the_first_one_no_more(
    job: TrainConfig,
    distilled: RunFolder,
    base_only: RunFolder,
    tmp_path: Path,
    micro_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own state wins; another --init, or none, is another beginning."""
    shutil.copytree(distilled.path, tmp_path / "first")
    step = RunHooks.step

    def stop(self: RunHooks, loop: Loop[Any]) -> None:
        if loop.step_number == 2:
            self.stop.signals.append(15)
        step(self, loop)

    asked = replace(
        job, recipe=micro_recipe("train.epochs=2", "train.batch_size=8"), init=tmp_path / "first", resume=True
    )
    whole = train(replace(asked, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(RunHooks, "step", stop)
        with pytest.raises(Stopped):
            train(asked)
    shutil.rmtree(tmp_path / "first")
    for other in (None, base_only.path):
        with pytest.raises(HdovdError, match=r"--init differs: asked for .*, began with .*first\n"):
            train(replace(asked, init=other))
    require_same(weights(train(asked)), weights(whole))


def test_the_audit_says_that_there_was_a_run_before(
    started: Started, distilled: RunFolder, job: TrainConfig, world: Path, training_cache: Path
) -> None:
    started(init=distilled.path)
    found = audit(AuditConfig(data=DataPaths(world), cache=training_cache, protocol=job.protocol, run=job.out))
    backbone = next(check for check in found.checks if check.name == "run: backbone")
    assert backbone.verdict is Verdict.UNKNOWN
    assert f"began with the weights of {distilled.path.resolve()}" in backbone.text


def test_all_cells_of_an_ablation_begin_with_it(
    distilled: RunFolder, base_only: RunFolder, world: Path, training_cache: Path, tmp_path: Path
) -> None:
    config = AblateConfig(
        data=DataPaths(world),
        cache=training_cache,
        out=tmp_path / "out",
        grid=("loss.class.enabled=true,false",),
        recipe="demo",
        seeds=1,
        protocol=str(world / "protocol.toml"),
        device="cpu",
        init=distilled.path,
    )
    first = plan(config)[0]
    words = commands(first, config)[0]
    assert words[words.index("--init") + 1] == str(distilled.path)
    first.path.mkdir(parents=True)
    (first.path / "config.toml").write_text(first.recipe.to_toml())
    (first.path / "run.json").write_text(
        json.dumps(
            {
                "protocol": load_protocol(config.protocol).to_dict(),
                "cache": {"levels": level_keys(config)},
                "init": {"run": "source", "sha256": init_hash(distilled.path)},
            }
        )
    )
    assert plan(config)[0].left
    for other in (None, base_only.path):
        asked = replace(config, init=other)
        with pytest.raises(HdovdError, match="other weights than those of --init"):
            plan(asked)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"has no class_embeddings\.safetensors.*copied whole"),
        (b"torn", r"class_embeddings\.safetensors is damaged.*copied whole"),
    ],
)
def test_a_run_that_was_not_copied_whole_is_named(
    distilled: RunFolder, tmp_path: Path, content: bytes | None, said: str
) -> None:
    shutil.copytree(distilled.path, tmp_path / "run")
    file = tmp_path / "run" / "class_embeddings.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(HdovdError, match=said):
        RunFolder.open(tmp_path / "run").class_embeddings()
