"""A checkpoint in the authors' form becomes a run: all of it used or named, and nothing of it run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, load_protocol
from hdovd.modeling.base import build_detector
from hdovd.modeling.published_weights import PUBLISHED
from hdovd.pipelines.audit.audit import AuditConfig, audit
from hdovd.pipelines.audit.checks import Verdict
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.report.report import ReportConfig, relations, report
from hdovd.pipelines.runs import ImportCheckpointConfig, RunFolder, read_run
from hdovd.pipelines.runs.listing import State
from hdovd.pipelines.training.initial_weights import import_checkpoint

D = 24
SETTINGS = (
    "detector.backbone.name=resnet18",
    "detector.backbone.weights=none",
    "detector.backbone.fpn_channels=16",
    "detector.rpn.pre_nms=60",
    "detector.rpn.post_nms=20",
    "detector.head.fc_channels=32",
    "input.short_side=96",
    "input.long_side=128",
    "inference.score_threshold=0.0",
    "loss.instance.queue=8",
    "loss.image.queue=8",
)
THEIRS = {  # by our names; a few of the 355, typed from their code
    "backbone.body.layer1.0.conv1.weight": "backbone.layer1.0.conv1.weight",
    "backbone.fpn.inner_blocks.2.0.bias": "neck.lateral_convs.2.conv.bias",
    "rpn.head.conv.0.0.weight": "rpn_head.rpn_conv.weight",
    "head.fc2.weight": "roi_head.bbox_head.shared_fcs.1.weight",
    "head.class_feature.bias": "roi_head.bbox_head.fc_cls.bias",
    "head.deltas.weight": "roi_head.bbox_head.fc_reg.weight",
    "head.distillation.weight": "roi_head.fc.weight",
    "background": "roi_head.bg_embedding.weight",
    "image_level.head.project.weight": "roi_head.linear_transform.weight",
}


def model_of() -> Any:
    from hdovd.config.recipe import load_recipe

    torch.manual_seed(4)
    recipe = load_recipe("ov-coco-faster-rcnn-r50", SETTINGS)
    return build_detector(recipe, D, initialise=False)


def theirs_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's state under the authors' names: each of ours is looked for among patterns turned round."""
    turned = [
        (r"backbone\.body\.(.+)", r"backbone.\1"),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.(.+)", r"neck.lateral_convs.\1.conv.\2"),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.(.+)", r"neck.fpn_convs.\1.conv.\2"),
        (r"rpn\.head\.conv\.0\.0\.(.+)", r"rpn_head.rpn_conv.\1"),
        (r"rpn\.head\.cls_logits\.(.+)", r"rpn_head.rpn_cls.\1"),
        (r"rpn\.head\.bbox_pred\.(.+)", r"rpn_head.rpn_reg.\1"),
        (r"head\.fc1\.(.+)", r"roi_head.bbox_head.shared_fcs.0.\1"),
        (r"head\.fc2\.(.+)", r"roi_head.bbox_head.shared_fcs.1.\1"),
        (r"head\.class_feature\.(.+)", r"roi_head.bbox_head.fc_cls.\1"),
        (r"head\.deltas\.(.+)", r"roi_head.bbox_head.fc_reg.\1"),
        (r"head\.distillation\.(.+)", r"roi_head.fc.\1"),
        (r"background", r"roi_head.bg_embedding.weight"),
        (r"image_level\.head\.norm\.(.+)", r"roi_head.layernorm.\1"),
        (r"image_level\.head\.project\.(.+)", r"roi_head.linear_transform.\1"),
    ]
    state = {}
    for name, value in model.state_dict().items():
        for pattern, to in turned:
            if found := re.fullmatch(pattern, name):
                state[found.expand(to)] = value[None] if name == "background" else value
    return state | {"backbone.bn1.num_batches_tracked": torch.tensor(7)}


@pytest.fixture
def files(tmp_path: Path, world: Path) -> Callable[..., ImportCheckpointConfig]:
    """Writes a checkpoint and class embeddings; returns the job that imports them."""
    classes = len(load_protocol(str(world / "protocol.toml")).names)

    def write(content: Any, embeddings: Any = None, **changes: Any) -> ImportCheckpointConfig:
        torch.save(content, tmp_path / "theirs.pth")
        torch.save(
            torch.randn(classes, D, generator=torch.Generator().manual_seed(0)) if embeddings is None else embeddings,
            tmp_path / "classes.pt",
        )
        values: dict[str, Any] = {
            "class_embeddings": tmp_path / "classes.pt",
            "protocol": str(world / "protocol.toml"),
            "settings": SETTINGS,
        } | changes
        return ImportCheckpointConfig(
            file=tmp_path / "theirs.pth", out=tmp_path / "run", detector=values.pop("detector", "faster_rcnn"), **values
        )

    return write


ADAMIXER = (
    "detector.backbone.name=resnet18",
    "detector.backbone.weights=none",
    "detector.backbone.fpn_channels=32",
    "detector.proposals.shuffle=8",
    "detector.proposals.pre_nms=40",
    "detector.decoder.queries=6",
    "detector.decoder.stages=2",
    "detector.decoder.points=4",
    "detector.decoder.out_points=6",
    "detector.decoder.heads=4",
    "detector.decoder.feedforward=16",
    "input.short_side=96",
    "input.long_side=128",
    "loss.instance.queue=8",
    "loss.image.queue=8",
)

Files = Callable[..., ImportCheckpointConfig]


def test_their_names() -> None:
    assert {ours: PUBLISHED["faster_rcnn"].own_name(theirs) for ours, theirs in THEIRS.items()} == {
        ours: ours for ours in THEIRS
    }
    assert PUBLISHED["faster_rcnn"].own_name("roi_head.bbox_head.0.fc_reg.weight") is None  # AdaMixer's


def test_what_is_imported_is_the_model(files: Files) -> None:
    model, said = model_of(), list[str]()
    job = files({"meta": {"epoch": 12, "iter": 7}, "state_dict": theirs_of(model), "optimizer": {"state": {}}})
    with lines_to(said.append):
        run = import_checkpoint(job)
    again = build_detector(run.recipe(), D, initialise=False)
    run.load_model(again)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    text = "\n".join(said)
    assert "not used: 1 tensors (backbone.bn1.num_batches_tracked)" in text
    assert "not in the file: 4 tensors (instance_level.student_queue.rows" in text
    record = run.record()["imported"]
    assert record["unused"] == ["backbone.bn1.num_batches_tracked"]
    assert run.recipe().pseudo_boxes.reliability == (0.31, 0.026, 1.3)
    torch.testing.assert_close(run.class_embeddings().norm(dim=1), torch.ones(len(run.protocol().names)))


def test_the_run_is_evaluated_and_listed_and_has_no_cache(files: Files, world: Path) -> None:
    run = import_checkpoint(files({"state_dict": theirs_of(model_of())}))
    result = evaluate(EvalConfig(run=run.path, data=DataPaths(world), device="cpu"))
    assert result.detections
    assert json.loads((run.path / "metrics.json").read_text())["cache"] == {"path": None, "levels": {}}
    listed = read_run(run.path)
    assert (listed.state, listed.cache, listed.wrong) == (State.FINISHED, None, ())
    page = report(
        ReportConfig(
            runs=(run.path,), out=run.path / "report", data=DataPaths(world), gallery=2, pseudo=2, device="cpu"
        )
    )
    assert (
        page.read_text().count("imported from a checkpoint, so there is no cache") == 2
    )  # of pseudo boxes, and of relations
    with pytest.raises(HdovdError, match="imported from a checkpoint, so there is no cache"):
        relations(RunFolder(run.path), DataPaths(world).load("train2017", run.protocol(), base_only=True), 2)


def test_the_audit_does_not_know_what_an_imported_run_was_trained_on(
    files: Files, world: Path, training_cache: Path
) -> None:
    run = import_checkpoint(files({"state_dict": theirs_of(model_of())}))
    found = audit(
        AuditConfig(data=DataPaths(world), cache=training_cache, protocol=str(world / "protocol.toml"), run=run.path)
    )
    of_run = [check for check in found.checks if check.name in ("run: cache", "run: backbone")]
    assert len(of_run) == 2
    for check in of_run:
        assert check.verdict is Verdict.UNKNOWN
        assert "was imported from" in check.text
    assert not found.leaks


def their_adamixer() -> tuple[Any, dict[str, Tensor]]:
    """A small AdaMixer, and its state under the authors' names: for each of ours, the one of theirs that is mapped to
    it.
    """
    from hdovd.config.recipe import load_recipe

    torch.manual_seed(5)
    model = build_detector(load_recipe("ov-coco-adamixer-r50", ADAMIXER), D, initialise=False)
    state = {}
    for name, value in model.state_dict().items():
        for pattern, own in ADAMIXER_NAMES:
            if re.fullmatch(pattern, name):
                theirs = re.fullmatch(pattern, name).expand(own)  # type: ignore[union-attr]
                assert PUBLISHED["adamixer"].own_name(theirs) == name
                state[theirs] = value
    return model, state


ADAMIXER_NAMES = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.(.+)", r"neck.lateral_convs.\1.conv.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.(.+)", r"neck.fpn_convs.\1.conv.\2"),
    (r"norms\.(.+)", r"norms.\1"),
    (r"proposals\.content_norm\.(.+)", r"rpn_head.token_norm.\1"),
    (r"proposals\.trunk\.(conv\d)\.0\.(.+)", r"rpn_head.\1.conv.\2"),
    (r"proposals\.trunk\.(conv\d)\.1\.(.+)", r"rpn_head.\1.gn.\2"),
    (r"proposals\.(main|aux)(?:iliary)?\.object_(.+)", r"rpn_head.\1_head.obj_\2"),
    (r"proposals\.(main|aux)(?:iliary)?\.deltas\.(.+)", r"rpn_head.\1_head.anchor_deltas.\2"),
    (r"proposals\.(main|aux)(?:iliary)?\.feature\.(.+)", r"rpn_head.\1_head.objectness_logits.\2"),
    (r"proposals\.(main|aux)(?:iliary)?\.scales\.(\d)", r"rpn_head.\1_head.scales.\2.scale"),
    (r"stages\.(\d)\.attention\.iof_tau", r"roi_head.bbox_head.\1.iof_tau"),
    (r"stages\.(\d)\.attention\.in_proj\.(.+)", r"roi_head.bbox_head.\1.attention.attn.in_proj_\2"),
    (r"stages\.(\d)\.attention\.out_proj\.(.+)", r"roi_head.bbox_head.\1.attention.attn.out_proj.\2"),
    (r"stages\.(\d)\.attention_norm\.(.+)", r"roi_head.bbox_head.\1.attention_norm.\2"),
    (r"stages\.(\d)\.offsets\.(.+)", r"roi_head.bbox_head.\1.sampling_n_mixing.sampling_offset_generator.0.\2"),
    (
        r"stages\.(\d)\.mixing\.parameters_of\.(.+)",
        r"roi_head.bbox_head.\1.sampling_n_mixing.adaptive_mixing.parameter_generator.0.\2",
    ),
    (r"stages\.(\d)\.mixing\.out\.(.+)", r"roi_head.bbox_head.\1.sampling_n_mixing.adaptive_mixing.out_proj.\2"),
    (r"stages\.(\d)\.mixing_norm\.(.+)", r"roi_head.bbox_head.\1.sampling_n_mixing.norm.\2"),
    (r"stages\.(\d)\.feedforward\.0\.(.+)", r"roi_head.bbox_head.\1.ffn.layers.0.0.\2"),
    (r"stages\.(\d)\.feedforward\.2\.(.+)", r"roi_head.bbox_head.\1.ffn.layers.1.\2"),
    (r"stages\.(\d)\.feedforward_norm\.(.+)", r"roi_head.bbox_head.\1.ffn_norm.\2"),
    (r"stages\.(\d)\.class_feature\.([01])\.(.+)", r"roi_head.bbox_head.\1.cls_fcs.\2.\3"),
    (r"stages\.(\d)\.class_feature\.2\.(.+)", r"roi_head.bbox_head.\1.fc_cls.\2"),
    (r"stages\.(\d)\.deltas\.9\.(.+)", r"roi_head.bbox_head.\1.fc_reg.\2"),
    (r"stages\.(\d)\.deltas\.([0-8])\.(.+)", r"roi_head.bbox_head.\1.reg_fcs.\2.\3"),
    (r"stages\.(\d)\.objectness\.(.+)", r"roi_head.bbox_head.\1.objness.\2"),
    (r"background", r"roi_head.bg_embedding.weight"),
    (r"adapters\.visual_to_text\.0\.(.+)", r"roi_head.visual2text.layers.0.\1"),
    (r"adapters\.visual_to_text\.2\.(.+)", r"roi_head.visual2text.layers.1.\1"),
    (r"adapters\.visual_to_text\.4\.(.+)", r"roi_head.visual2text.layers.2.\1"),
    (r"adapters\.transfer\.0\.(.+)", r"roi_head.fc1.\1"),
    (r"adapters\.transfer\.2\.(.+)", r"roi_head.fc2.\1"),
    (r"image_level\.head\.norm\.(.+)", r"roi_head.layernorm.\1"),
    (r"image_level\.head\.project\.(.+)", r"roi_head.linear_transform.\1"),
)


def test_an_adamixer_is_imported_with_the_text_of_object(files: Files, tmp_path: Path) -> None:
    model, state = their_adamixer()
    row = torch.randn(1, D, generator=torch.Generator().manual_seed(1))
    torch.save(row, tmp_path / "object.pt")
    job = files({"state_dict": state}, detector="adamixer", settings=ADAMIXER, object_embedding=tmp_path / "object.pt")
    run = import_checkpoint(job)
    again = build_detector(run.recipe(), D, initialise=False)
    run.load_model(again)
    expected = model.state_dict() | {"object_text": torch.nn.functional.normalize(row, dim=1)[0]}
    torch.testing.assert_close(again.state_dict(), expected)
    with pytest.raises(HdovdError, match="give --object-embedding FILE"):
        import_checkpoint(files({"state_dict": state}, detector="adamixer", settings=ADAMIXER, overwrite=True))
    with pytest.raises(HdovdError, match="does not fit detector faster_rcnn"):
        import_checkpoint(files({"state_dict": state}, overwrite=True))


@pytest.mark.parametrize("wrapped", [False, True])
def test_half_precision_and_wrapped_names(wrapped: bool, files: Files) -> None:
    model = model_of()
    state = {
        ("module." if wrapped else "") + k: v.half() if v.is_floating_point() else v
        for k, v in theirs_of(model).items()
    }
    run = import_checkpoint(files({"state_dict": state}))
    again = build_detector(run.recipe(), D, initialise=False)
    run.load_model(again)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    torch.testing.assert_close(
        again.state_dict()["head.fc1.weight"], model.state_dict()["head.fc1.weight"].half().float(), rtol=0, atol=0
    )


def test_missing_unknown_and_misshapen_tensors_are_named_together(files: Files) -> None:
    state = theirs_of(model_of())
    del state["rpn_head.rpn_cls.bias"]
    state |= {"roi_head.what": torch.zeros(3), "roi_head.fc.bias": torch.zeros(3)}
    with pytest.raises(HdovdError) as error:
        import_checkpoint(job := files({"state_dict": state}))
    for part in (
        "rpn.head.cls_logits.bias",
        "of no part of it: roi_head.what",
        f"roi_head.fc.bias is (3,), expected ({D},)",
    ):
        assert part in str(error.value)
    assert not job.out.exists()


class _Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickle_that_wants_to_run_code_is_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"it asks for .*, which is no tensor; do not trust it"):
        import_checkpoint(files({"state_dict": theirs_of(model_of()), "meta": _Evil(tmp_path / "ran")}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "is no checkpoint"),
        ({"state_dict": {}}, "is no checkpoint"),
        ({"state_dict": {"a": 3}}, "is no checkpoint"),
        ({"state_dict": {"a": torch.zeros(2)}}, "it has no roi_head.bg_embedding.weight"),
        ({"roi_head.bg_embedding.weight": torch.full((1, D), float("nan"))}, "not finite"),
    ],
)
def test_what_is_no_checkpoint_is_told(content: Any, told: str, files: Files) -> None:
    with pytest.raises(HdovdError, match=told):
        import_checkpoint(files(content))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (torch.ones(3, D), r"is \(3, 24\), expected"),
        (torch.ones(9, D + 1), "of the checkpoint's embedding size"),
        ({"a": 1}, "is no tensor"),
    ],
)
def test_class_embeddings_that_do_not_fit(rows: Any, told: str, files: Files) -> None:
    with pytest.raises(HdovdError, match=told):
        import_checkpoint(files({"state_dict": theirs_of(model_of())}, rows))


def test_class_embeddings_are_asked_for_and_a_run_is_kept(files: Files, micro_recipe: Callable[..., Recipe]) -> None:
    content = {"state_dict": theirs_of(model_of())}
    with pytest.raises(HdovdError, match="give --class-embeddings FILE"):
        import_checkpoint(files(content, class_embeddings=None))
    import_checkpoint(files(content))
    with pytest.raises(HdovdError, match="holds a run already"):
        import_checkpoint(files(content))
