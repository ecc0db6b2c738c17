"""Losses, gradients and detections of Faster R-CNN against numbers that the authors' released code computed, with the
same weights and inputs.

`faster_rcnn_reference.json` holds them: the published shapes with weights of `made_weights`, two pictures, all anchors
and RoIs sampled, so that nothing is drawn. Two steps without an optimiser, the second one with other labels and filled
memories.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torchvision
from adamixer_scenes import made_weights, noise, pictures, require_same, targets
from torch import Tensor

from hdovd.config.recipe import load_recipe
from hdovd.modeling.boxes import detect_batch
from hdovd.modeling.faster_rcnn.model import FasterRCNN
from hdovd.modeling.published_weights import PUBLISHED

REFERENCE = json.loads((Path(__file__).parents[3] / "data" / "faster_rcnn_reference.json").read_text())
CLASSES, BASE, DIM = 65, 48, 512
THEIRS = {  # our names of the losses
    "rpn_objectness": "loss_rpn_cls",
    "rpn_box": "loss_rpn_bbox",
    "classification": "loss_cls",
    "box": "loss_bbox",
    "instance_alignment": "loss_skd",
    "instance_relation": "loss_rkd",
    "image_alignment": "img_distill_loss",
}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the authors' published Faster R-CNN."""
    body = torchvision.models.resnet50(weights=None).state_dict()
    shapes = {f"backbone.{k}": tuple(v.shape) for k, v in body.items() if not k.startswith("fc.")}
    weights = {f"neck.lateral_convs.{level}.conv": (256, 256 * 2**level, 1, 1) for level in range(4)}
    weights |= {f"neck.fpn_convs.{level}.conv": (256, 256, 3, 3) for level in range(4)}
    weights |= {
        "rpn_head.rpn_conv": (256, 256, 3, 3),
        "rpn_head.rpn_cls": (3, 256, 1, 1),
        "rpn_head.rpn_reg": (12, 256, 1, 1),
        "roi_head.bbox_head.shared_fcs.0": (1024, 256 * 49),
        "roi_head.bbox_head.shared_fcs.1": (1024, 1024),
        "roi_head.bbox_head.fc_cls": (DIM, 1024),
        "roi_head.bbox_head.fc_reg": (4, 1024),
        "roi_head.fc": (DIM, 1024),
        "roi_head.linear_transform": (DIM, 256),
        "roi_head.layernorm": (256,),
    }
    for name, shape in weights.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | {"roi_head.bg_embedding.weight": (1, DIM)}


@pytest.fixture(scope="module")
def model() -> FasterRCNN:
    recipe = load_recipe(
        "ov-coco-faster-rcnn-r50",
        [
            *PUBLISHED["faster_rcnn"].settings,
            "detector.backbone.weights=none",
            "input.short_side=80",
            "input.long_side=96",
            "detector.rpn.samples=100000",
            "detector.head.samples=100000",
            "pseudo_boxes.reliability_centre=0.31",
            "pseudo_boxes.reliability_width=0.026",
            "pseudo_boxes.reliability_scale=1.3",
        ],
    )
    made = FasterRCNN(recipe, DIM, initialise=False)  # weights are loaded over it
    theirs = made_weights(published_shapes())
    theirs["rpn_head.rpn_reg.weight"] *= 0.2
    theirs["rpn_head.rpn_cls.weight"] *= 0.5
    theirs["roi_head.bg_embedding.weight"] = theirs["roi_head.bg_embedding.weight"][0]
    state = {
        name: value
        for key, value in theirs.items()
        if (name := PUBLISHED["faster_rcnn"].own_name(key)) in made.state_dict()
    }
    fit = made.load_state_dict(state, strict=False)
    assert not fit.unexpected_keys
    assert all("queue" in name for name in fit.missing_keys)
    return made


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return pictures(*(tuple(one["size"]) for one in REFERENCE["pictures"]), first=30)


@pytest.fixture(scope="module")
def texts() -> Tensor:
    return 1.7 * noise(CLASSES, DIM, seed=6)


def test_losses_and_gradients(model: FasterRCNN, images: list[Tensor], texts: Tensor) -> None:
    """To 1e-4 and 1e-3, relative."""
    model.train()
    model.begin_epoch(1)
    for wanted in REFERENCE["steps"]:
        model.zero_grad(set_to_none=True)
        boxes = [
            targets(
                one["base"],
                one["pseudo"],
                [(label + wanted["shift"]) % BASE for label in one["labels"]],
                one["seed"],
                DIM,
            )
            for one in REFERENCE["pictures"]
        ]
        losses = model(images, boxes, texts[:BASE], [1, 2])
        assert losses.keys() == THEIRS.keys()
        for name, loss in losses.items():
            assert float(loss.detach()) == pytest.approx(wanted["losses"][THEIRS[name]], rel=1e-4), name
        sum(losses.values()).backward()
        of = dict(model.named_parameters())
        for name, norm in wanted["gradient_norms"].items():
            grad = of[str(PUBLISHED["faster_rcnn"].own_name(name))].grad
            assert grad is not None
            assert float(grad.double().norm()) == pytest.approx(norm, rel=1e-3), name


def test_detections(model: FasterRCNN, images: list[Tensor], texts: Tensor) -> None:
    """To 1e-3 pixels and 1e-4 in score."""
    model.eval()
    found = detect_batch(model.predict(images, texts), torch.arange(CLASSES) >= BASE, model.recipe.inference)
    require_same(found, REFERENCE)


def test_the_shapes_are_the_published_ones() -> None:
    """355 entries, 42.5 M parameters."""
    shapes = published_shapes()
    assert len(shapes) == 355
    assert sum(math.prod(shape) for name, shape in shapes.items() if name.endswith(("weight", "bias"))) == 42_528_339
    assert all(PUBLISHED["faster_rcnn"].own_name(name) for name in shapes)
