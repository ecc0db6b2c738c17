"""Recipes: the shipped values are METHOD's, and a wrong key or value is named."""

import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from hdovd.config.recipe import PRESETS, load_recipe
from hdovd.core import HdovdError
from hdovd.core.text_files import shipped
from hdovd.modeling.faster_rcnn import model as faster_rcnn
from hdovd.modeling.losses.instance import MIN_PAIRS
from hdovd.modeling.rois import POOL_SIZE, POSITIVE_IOU
from hdovd.modeling.rpn import ASPECT_RATIOS


@pytest.mark.parametrize("name", shipped("recipes"))
def test_every_shipped_recipe_loads(name: str) -> None:
    named = [known for known in ("adamixer", "rtdetr") if known in name]
    assert load_recipe(name).detector.name == (named[0] if named else "faster_rcnn")


def test_names_of_shipped_recipes() -> None:
    assert {"demo", "ov-coco-faster-rcnn-r50"} <= set(shipped("recipes"))


@pytest.mark.parametrize("detector", ["faster-rcnn", "adamixer"])
def test_the_ov_lvis_recipes_are_those_of_ov_coco_but_for_what_they_say(detector: str) -> None:
    coco, lvis = (
        leaves(load_recipe(f"ov-{data}-{detector}-r50").model_dump(by_alias=True)) for data in ("coco", "lvis")
    )
    assert {key: value for key, value in lvis.items() if value != coco[key]} == {
        "input.train_short_sides": [640, 672, 704, 736, 768, 800],
        "inference.score_threshold": 0.001 if detector == "faster-rcnn" else 0.0001,
        "inference.detections_per_image": 300,
        "train.epochs": 24,
        "train.step_epochs": [16, 19],
        "train.repeat_threshold": 0.001,
    }


def test_a_file_lies_over_the_shipped_recipe_that_it_extends(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('extends = "demo"\n[train]\nlr = 0.5\n[loss.class]\nweight = 0.25\n')
    expected = load_recipe("demo", ["train.lr=0.5", "loss.class.weight=0.25", "train.seed=7"])
    assert load_recipe(str(file), ["train.seed=7"]) == expected
    file.write_text('extends = "demo"\n[train]\nlrr = 0.5\n')
    with pytest.raises(HdovdError, match=r"mine\.toml:\s+unknown key train\.lrr; the nearest valid one is train\.lr"):
        load_recipe(str(file))


@pytest.mark.parametrize("parent", ['"dmo"', '"other.toml"', "3", '["demo"]'])
def test_a_file_extends_no_other_file(parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.toml").write_text(load_recipe("demo").to_toml())
    Path("mine.toml").write_text(f"extends = {parent}\n")
    with pytest.raises(HdovdError, match=r"recipe mine\.toml: extends is .*, expected a shipped recipe: demo, "):
        load_recipe("mine.toml")


OV_COCO = {  # every number of METHOD sections 2 to 8 for faster_rcnn, typed from there
    "detector.name": "faster_rcnn",
    "detector.backbone.name": "resnet50",
    "detector.backbone.fpn_channels": 256,  # 3
    "detector.backbone.levels": [2, 3, 4, 5],
    "detector.head.fc_channels": 1024,
    "detector.head.logit_scale": 50.0,
    "pseudo_boxes.max_per_image": 5,
    "pseudo_boxes.min_side": 32.0,  # 2
    "pseudo_boxes.reliability_centre": "auto",
    "pseudo_boxes.reliability_width": "auto",
    "pseudo_boxes.reliability_scale": "auto",
    "loss.instance.enabled": True,
    "loss.instance.tau": 20.0,
    "loss.instance.queue": 2048,
    "loss.instance.relation_tau": 5.0,  # 4
    "loss.instance.relation_temperature": 10.0,
    "loss.instance.alignment_weight": 0.1,
    "loss.instance.relation_weight": 1.0,
    "loss.class.enabled": True,
    "loss.class.weight": 1.0,  # 5: the weight of a RoI of pseudo box j is w_j itself
    "loss.image.enabled": True,
    "loss.image.tau": 20.0,
    "loss.image.queue": 512,
    "loss.image.weight": 0.1,  # 6
    "inference.alpha": 0.25,
    "inference.beta": 0.45,
    "inference.distillation_scale": 20.0,  # 7
    "inference.score_threshold": 0.05,
    "inference.nms": 0.5,
    "inference.detections_per_image": 100,
    "train.epochs": 12,
    "train.optimizer": "sgd",
    "train.lr": 0.02,
    "train.batch_size": 16,
    "train.momentum": 0.9,  # 8
    "train.weight_decay": 1e-4,
    "train.schedule": "step",
    "train.step_epochs": [8, 11],
    "train.warmup_iterations": 500,
    "input.short_side": 800,
    "input.long_side": 1333,
    "input.train_short_sides": [],
    "input.flip": 0.5,
    "detector.backbone.frozen_stages": 2,
    "detector.backbone.norm": "frozen",  # stem and first stage
}
OF_OTHERS = {  # the authors' configuration and mmdetection's defaults, which METHOD does not repeat
    "detector.rpn.anchor_sizes": [[32], [64], [128], [256], [512]],
    "detector.rpn.samples": 256,
    "detector.rpn.pre_nms": 2000,
    "detector.rpn.post_nms": 1000,
    "detector.rpn.nms": 0.7,
    "detector.head.samples": 512,
    "detector.head.positive_share": 0.25,
    "detector.head.canonical_size": 224,
    "detector.head.sampling_ratio": 0,
    "detector.backbone.weights": "auto",
    "input.mean": [0.485, 0.456, 0.406],
    "input.std": [0.229, 0.224, 0.225],
    "loss.extra": {},
    "train.clip_norm": 0.0,
    "detector.rpn.rules": "authors",
    "pseudo_boxes.from_epoch": 1,
    "input.exif": "apply",  # as OpenCV reads pictures for mmdetection
}


ADAMIXER = {  # typed from METHOD sections 3 to 8, and from the authors' configuration and code
    "detector.backbone.norm": "batch",
    "detector.backbone.frozen_stages": 0,
    "detector.proposals.pre_nms": 1000,
    "detector.proposals.nms": 0.7,
    "detector.proposals.shuffle": 64,
    "detector.proposals.aux_positives": 8,
    "detector.proposals.iou_power": 6.0,
    "detector.proposals.class_weight": 1.0,
    "detector.proposals.box_weight": 2.0,
    "detector.decoder.queries": 300,
    "detector.decoder.stages": 6,
    "detector.decoder.points": 32,
    "detector.decoder.groups": 4,
    "detector.decoder.out_points": 128,
    "detector.decoder.heads": 8,
    "detector.decoder.feedforward": 2048,
    "detector.decoder.logit_scale": 50.0,
    "detector.matching.objectness": 2.0,
    "detector.matching.l1": 5.0,
    "detector.matching.giou": 2.0,
    "detector.loss.classification": 0.5,
    "detector.loss.objectness": 2.0,
    "detector.loss.box": 5.0,
    "detector.loss.giou": 2.0,
    "detector.loss.unmatched_weight": 0.5,
    "detector.loss.near_iou": 0.7,
    "detector.loss.poor_iou": 0.4,
    "detector.text.alignment_weight": 0.5,
    "detector.text.relation_weight": 5.0,
    "detector.text.decay": 0.9999,
    "detector.text.decay_updates": 2000.0,
    "input.short_side": 800,
    "input.long_side": 1333,
    "pseudo_boxes.from_epoch": 2,
    "loss.instance.alignment_weight": 0.5,
    "loss.instance.relation_weight": 5.0,
    "loss.instance.queue": 2048,
    "loss.image.weight": 0.2,
    "loss.image.queue": 512,
    "inference.alpha": 0.35,
    "inference.beta": 0.65,
    "inference.score_threshold": 0.005,
    "inference.nms": 0.7,
    "inference.detections_per_image": 100,
    "train.epochs": 12,
    "train.batch_size": 16,
    "train.optimizer": "adamw",
    "train.lr": 5e-5,
    "train.weight_decay": 1e-4,
    "train.clip_norm": 1.0,
    "train.step_epochs": [8, 11],
    "train.warmup_iterations": 500,
}


RTDETR = {  # typed from arXiv 2304.08069 (sections 4 and 5, tables A and B) and its authors' configuration
    "detector.backbone.norm": "frozen",
    "detector.backbone.levels": [3, 4, 5],
    "detector.backbone.fpn_channels": 256,
    "detector.encoder.heads": 8,
    "detector.encoder.feedforward": 1024,
    "detector.encoder.blocks": 3,
    "detector.encoder.hidden": 256,
    "detector.decoder.queries": 300,
    "detector.decoder.stages": 6,
    "detector.decoder.points": 4,
    "detector.decoder.grid": 5,
    "detector.decoder.heads": 8,
    "detector.decoder.feedforward": 1024,
    "detector.denoising.queries": 100,
    "detector.denoising.label_noise": 0.25,
    "detector.denoising.box_noise": 1.0,
    "detector.matching.objectness": 2.0,
    "detector.matching.l1": 5.0,
    "detector.matching.giou": 2.0,
    "detector.loss.objectness": 1.0,
    "detector.loss.box": 5.0,
    "detector.loss.giou": 2.0,
    "detector.loss.near_iou": 1.0,
    "inference.nms": 1.0,
    "train.epochs": 72,
    "train.batch_size": 16,
    "train.optimizer": "adamw",
    "train.lr": 1e-4,
    "train.weight_decay": 1e-4,
    "train.clip_norm": 0.1,
    "train.ema": 0.9999,
}
OF_RESNET18 = {
    "detector.backbone.name": "resnet18",
    "detector.backbone.norm": "batch",
    "detector.backbone.frozen_stages": 0,
    "detector.encoder.hidden": 64,
    "detector.decoder.stages": 3,
    "detector.backbone.fpn_channels": 128,
}
OF_OLN = {  # arXiv 2108.06753, section 3, and its authors' configuration, typed from there
    "proposals.score_iou": 0.3,
    "proposals.box_iou": 0.7,
    "proposals.roi_iou": 0.3,
    "proposals.rois": 2000,
    "proposals.rpn_nms": 1.0,
    "proposals.nms": 0.7,
    "proposals.centerness_weight": 1.0,
    "proposals.rpn_box_weight": 10.0,
    "proposals.iou_weight": 1.0,
    "proposals.box_weight": 1.0,
    "proposals.epochs": 0,
    "loss.class.backgrounds": False,
    "loss.class.federated": False,
}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


def test_ov_coco_recipe_has_the_constants_of_the_method() -> None:
    found = leaves(load_recipe("ov-coco-faster-rcnn-r50").model_dump(by_alias=True))
    expected = OV_COCO | OF_OTHERS | OF_OLN
    assert {key: found.get(key) for key in expected} == expected
    assert {key for key in found if not key.startswith("train.")} <= expected.keys()  # none without a source


def test_the_adamixer_recipe_has_the_constants_of_the_method() -> None:
    found = leaves(load_recipe("ov-coco-adamixer-r50").model_dump(by_alias=True))
    assert {key: found.get(key) for key in ADAMIXER} == ADAMIXER


def test_the_rtdetr_recipes_have_the_constants_of_their_papers() -> None:
    """What is about distillation is as AdaMixer's."""
    found, small, other = (
        leaves(load_recipe(f"ov-coco-{name}").model_dump(by_alias=True))
        for name in ("rtdetr-r50", "rtdetr-r18", "adamixer-r50")
    )
    assert {key: found.get(key) for key in RTDETR} == RTDETR
    assert {key: value for key, value in small.items() if value != found[key]} == OF_RESNET18
    alike = ("detector.text.", "loss.", "pseudo_boxes.", "inference.alpha", "inference.beta")
    assert {k: v for k, v in found.items() if k.startswith(alike)} == {
        k: v for k, v in other.items() if k.startswith(alike)
    }


def test_a_part_of_a_section_leaves_the_rest_as_that_detector_has_it() -> None:
    loss = load_recipe("demo-rtdetr", ["detector.loss={poor_iou=0.25}"]).detector.model_dump()["loss"]
    assert (loss["poor_iou"], loss["objectness"], loss["near_iou"]) == (0.25, 1.0, 1.0)


def test_constants_of_the_method_that_are_not_in_recipes() -> None:
    """Sections 3 to 6: RoIAlign 7x7, IoU 0.5, n >= 2, box deltas of the authors' configuration (0.1, 0.1, 0.2, 0.2)."""
    assert (POOL_SIZE, POSITIVE_IOU, MIN_PAIRS) == (7, 0.5, 2)
    assert ASPECT_RATIOS == (0.5, 1.0, 2.0)
    assert faster_rcnn.CODER.weights == (10.0, 10.0, 5.0, 5.0)


@pytest.mark.parametrize("name", ["ov-coco-faster-rcnn-r50", "ov-coco-adamixer-r50", "ov-coco-rtdetr-r50"])
def test_every_value_of_the_ov_coco_recipes_has_its_source_behind_it(name: str) -> None:
    lines = resources.files("hdovd").joinpath(f"recipes/{name}.toml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\w+ = ", line)]
    assert len(values) > 60
    assert [
        line
        for line in values
        if not re.search(r"# .*(METHOD \d|config|code|OLN|mmdetection|torchvision|RT-DETR|here)", line)
    ] == []


@pytest.mark.parametrize("name", shipped("recipes"))
def test_a_resolved_recipe_can_be_given_again(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["train.lr=0.125", "loss.class.weight=0.5", "detector.backbone.weights=a b/weights.pth"])
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml())
    assert load_recipe(str(file)) == recipe
    assert tomllib.loads(file.read_text())["loss"]["class"]["weight"] == 0.5


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("loss.image.enabled=false", ("loss", "image", "enabled"), False),
        ("loss.class.enabled=false", ("loss", "class_", "enabled"), False),
        ("train.lr=1e-3", ("train", "lr"), 0.001),
        ("train.clip_norm=5", ("train", "clip_norm"), 5.0),
        ("train.epochs = 3", ("train", "epochs"), 3),
        ("train.step_epochs=[1, 2]", ("train", "step_epochs"), [1, 2]),
        ("detector.backbone.weights=none", ("detector", "backbone", "weights"), "none"),
        ('detector.backbone.weights="none"', ("detector", "backbone", "weights"), "none"),
        ("detector.backbone.weights=/some folder/a=b.pth", ("detector", "backbone", "weights"), "/some folder/a=b.pth"),
        ("train.optimizer=sgd", ("train", "optimizer"), "sgd"),
    ],
)
def test_settings(setting: str, path: tuple[str, ...], value: object) -> None:
    found: object = load_recipe("demo", [setting])
    for name in path:
        found = getattr(found, name)
    assert found == value


def test_the_last_setting_wins_and_the_rest_stays() -> None:
    recipe, plain = load_recipe("demo", ["train.lr=0.5", "train.lr=0.25"]), load_recipe("demo")
    assert recipe.train.lr == 0.25
    assert recipe.train.model_copy(update={"lr": plain.train.lr}) == plain.train
    assert recipe.loss == plain.loss


@pytest.mark.parametrize(
    ("setting", "near"),
    [
        ("train.lrr=1", "train.lr"),
        ("train.epoch=1", "train.epochs"),
        ("loss.instance.temperature=1", "loss.instance.relation_temperature"),
        ("loss.imag.enabled=false", "loss.image.enabled"),
        ("loss.class_.enabled=false", "loss.class."),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(setting: str, near: str) -> None:
    with pytest.raises(HdovdError) as error:
        load_recipe("demo", [setting])
    key = setting.split("=")[0]
    assert any(f"unknown key {part}" in str(error.value) for part in (key, key.rpartition(".")[0]))
    assert near in str(error.value)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("train.epochs=many", "train.epochs = 'many'"),
        ("train.epochs=1.5", "train.epochs = 1.5"),
        ("train.epochs=0", "train.epochs = 0"),
        ("train.epochs=true", "train.epochs = True"),
        ("train.lr=-1.0", "train.lr = -1.0"),
        ("train.lr=nan", "train.lr = nan"),
        ("train.lr=inf", "train.lr = inf"),
        ("train.optimizer=lamb", "train.optimizer = 'lamb'"),
        ("loss.image.enabled=1", "loss.image.enabled = 1"),
        ("loss.image.enabled=no", "loss.image.enabled = 'no'"),
        ("inference.alpha=1.5", "inference.alpha = 1.5"),
        ("input.mean=[0.5, 0.5]", "input.mean"),
        ("input.std=[0.5, 0.0, 0.5]", "input.std"),
        ("detector.backbone.levels=[1, 2]", "detector.backbone.levels"),
        ("detector.backbone.levels=[]", "detector.backbone.levels"),
        (
            "detector.backbone.levels=[3, 5]",
            "detector.backbone.levels",
        ),  # RoIs that belong to level 4 would be pooled from nowhere
        ("detector.backbone.levels=[3, 3, 4]", "detector.backbone.levels"),
        ("pseudo_boxes.reliability_centre=nan", "pseudo_boxes.reliability_centre"),
        ("loss.image=3", "loss.image"),
    ],
)
def test_a_wrong_value_is_named(setting: str, key: str) -> None:
    with pytest.raises(HdovdError) as error:
        load_recipe("demo", [setting])
    assert key in str(error.value)
    assert "demo" in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "setting", "told"),
    [
        ("demo", "detector.rpn.sample=3", "the nearest valid one is detector.rpn.samples"),
        ("demo-adamixer", "detector.decoder.quries=3", "the nearest valid one is detector.decoder.queries"),
        ("demo-adamixer", "detector.rpn.samples=3", "unknown key detector.rpn.samples"),
        ("demo-rtdetr", "detector.encoder.block=3", "the nearest valid one is detector.encoder.blocks"),
        ("demo", "detector.backbone.nam=x", "the nearest valid one is detector.backbone.name"),
        ("demo", "detector.name=faster_rcn", "did you mean faster_rcnn"),
        ("demo", "detector.name=3", "detector.name = 3"),
        ("demo", "detector=3", "detector = 3"),
    ],
)
def test_a_wrong_value_of_a_detector_is_told_of_that_detector(recipe: str, setting: str, told: str) -> None:
    with pytest.raises(HdovdError) as error:
        load_recipe(recipe, [setting])
    assert told in str(error.value)
    assert not ("adamixer" in recipe and "head.samples" in str(error.value))


def test_a_recipe_of_before_there_were_rules_and_epochs_for_pseudo_boxes_loads() -> None:
    recipe = load_recipe("demo")
    assert (recipe.faster_rcnn.rpn.rules, recipe.pseudo_boxes.from_epoch) == ("torchvision", 1)
    assert "rules" not in resources.files("hdovd").joinpath("recipes/demo.toml").read_text()


@pytest.mark.parametrize("recipe", ["ov-coco-faster-rcnn-r50", "ov-coco-adamixer-r50", "demo", "demo-adamixer"])
def test_a_recipe_of_before_these_choices_loads(recipe: str) -> None:
    """Run folders are read back; the shipped recipes are of the same form."""
    content = resources.files("hdovd").joinpath(f"recipes/{recipe}.toml").read_text()
    assert not {"accumulate", "ema", "compile"} & tomllib.loads(content)["train"].keys()
    train = load_recipe(recipe).train
    assert (train.accumulate, train.ema, train.compile) == (1, 0.0, False)


def test_what_is_built_of_faster_rcnn_parts_refuses_another_detector() -> None:
    with pytest.raises(HdovdError, match=r"'adamixer'.*needs a recipe with detector\.name = 'faster_rcnn'"):
        _ = load_recipe("demo-adamixer").faster_rcnn


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(HdovdError) as error:
        load_recipe("demo", ["train.epochs=many", "loss.image.tau=0.0", "loss.image.rate=1"])
    assert all(key in str(error.value) for key in ("train.epochs", "loss.image.tau", "loss.image.rate"))


@pytest.mark.parametrize("setting", ["train.lr", "=3", "train.lr.x=3"])
def test_a_malformed_setting_is_told(setting: str) -> None:
    with pytest.raises(HdovdError, match="--set"):
        load_recipe("demo", [setting])


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(load_recipe("demo").to_toml().replace("epochs", "epoch", 1))
    with pytest.raises(HdovdError, match=r"missing key train\.epochs"):
        load_recipe(str(file))


def test_a_recipe_kept_before_there_were_proposals_loads(tmp_path: Path) -> None:
    """Run folders are read back: without the section its values are those of the COCO recipe, which are its
    defaults."""
    before = load_recipe("ov-coco-faster-rcnn-r50").to_toml().partition("[proposals]")[0]
    (tmp_path / "config.toml").write_text(before)
    assert "proposals" not in tomllib.loads(before)
    assert load_recipe(str(tmp_path / "config.toml")) == load_recipe("ov-coco-faster-rcnn-r50")


@pytest.mark.parametrize("content", [b"[train\nlr = 1", b"\xff\xfe\x00"])
def test_a_file_that_is_not_toml(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(content)
    with pytest.raises(HdovdError, match=r"recipe\.toml"):
        load_recipe(str(file))


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(HdovdError, match=r"did you mean 'demo'.*ov-coco-faster-rcnn-r50"):
        load_recipe("demmo")
    with pytest.raises(HdovdError, match="no recipe"):
        load_recipe("/no/such/file.toml")


def test_base_only_turns_all_distillation_off() -> None:
    loss = load_recipe("demo", PRESETS["base-only"]).loss
    assert [loss.instance.enabled, loss.class_.enabled, loss.image.enabled] == [False] * 3
    assert not loss.uses_pseudo_boxes
    assert not loss.uses_cache
    assert load_recipe("demo").loss.uses_cache


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("name", shipped("recipes"))
def test_every_preset_fits_every_recipe(name: str, preset: str) -> None:
    assert load_recipe(name, PRESETS[preset]) != load_recipe(name)


@pytest.mark.parametrize(
    ("settings", "pseudo_boxes", "cache"),
    [
        (["loss.instance.enabled=false"], True, True),
        (["loss.class.enabled=false"], True, True),
        (["loss.class.enabled=false", "loss.instance.enabled=false"], False, True),
        (["loss.image.enabled=false"], True, True),
    ],
)
def test_what_the_levels_need(settings: list[str], pseudo_boxes: bool, cache: bool) -> None:
    loss = load_recipe("demo", settings).loss
    assert (loss.uses_pseudo_boxes, loss.uses_cache) == (pseudo_boxes, cache)
