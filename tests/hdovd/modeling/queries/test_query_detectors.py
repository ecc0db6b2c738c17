"""What all detectors made of queries do alike: odd batches, epochs, memories, checkpoints, prediction."""

from collections.abc import Callable
from types import ModuleType

import adamixer_scenes
import pytest
import rtdetr_scenes
import torch
from adamixer_scenes import BASE, DIM, noise, pictures, targets, unit
from torch import Tensor

from hdovd.config.recipe import PRESETS, load_recipe
from hdovd.core import HdovdError, lines_to
from hdovd.data.targets import Targets
from hdovd.modeling.base import build_detector
from hdovd.modeling.batching import batch_images
from hdovd.modeling.boxes import detect_batch
from hdovd.modeling.queries.detector import QueryDetector

SIZES = ((96, 128), (128, 96))
BOXES, PSEUDO = [[4.0, 4.0, 60.0, 70.0], [20.0, 10.0, 90.0, 80.0]], [[30.0, 5.0, 80.0, 60.0], [0.0, 40.0, 50.0, 90.0]]
OWN = {"classification", "objectness", "box", "giou"}
DISTILLED = {"instance_alignment", "instance_relation", "text_alignment", "text_relation", "image_alignment"}


@pytest.fixture(params=[adamixer_scenes, rtdetr_scenes], ids=["adamixer", "rtdetr"])
def scenes(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


def full_batch() -> list[Targets]:
    return [targets(BOXES, PSEUDO, [1, 3], 10), targets(BOXES[:1], PSEUDO[:1], [0], 20)]


def found_batch(model: QueryDetector) -> list[Targets]:
    """Base boxes where the last stage sees objects: each has a student."""
    with torch.no_grad():
        look = model.train().find(batch_images(pictures(*SIZES), model.recipe.input)[0])
    return [targets(boxes[:3].tolist(), [], [1, 3, 0], 10 * i) for i, boxes in enumerate(look.boxes[-1])]


def losses_of(
    model: QueryDetector, batch: list[Targets], sizes: tuple[tuple[int, int], ...] = SIZES
) -> dict[str, Tensor]:
    return model.train()(pictures(*sizes), batch, unit(BASE, DIM, seed=1), [5, 6])


def test_registered_and_every_parameter_learns(scenes: ModuleType) -> None:
    assert type(build_detector(scenes.small(), DIM)) is type(scenes.detector())
    model = scenes.detector()
    losses = losses_of(model, found_batch(model))
    assert losses.keys() == OWN | scenes.OWN | DISTILLED
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert {
        name for name in idle if ".scales." not in name
    } == set()  # a level's scale: no object has a candidate of that level


def test_before_the_first_epoch_of_pseudo_boxes(scenes: ModuleType) -> None:
    """Pseudo boxes teach the proposals alone; nothing distils; memories stay."""
    model = scenes.detector()
    model.begin_epoch(1)
    early = losses_of(model, full_batch())
    without = [targets(BOXES, [], [1, 3], 10), targets(BOXES[:1], [], [0], 20)]
    assert {name for name in DISTILLED if early[name] == 0} == DISTILLED
    sum(early.values()).backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None} == {"adapters", "image_level"}
    assert model.text_level.centroids.shape[1] == 0
    again = scenes.detector()
    again.begin_epoch(1)
    other = losses_of(again, without)
    other, early = ({name: float(loss.detach()) for name, loss in one.items()} for one in (other, early))
    for name in ("classification", "objectness", "box", "giou"):
        assert other[name] == pytest.approx(early[name], rel=1e-5)
    assert other[scenes.FIRST] != pytest.approx(early[scenes.FIRST], rel=1e-3)
    model.begin_epoch(2)
    assert losses_of(model, full_batch())["text_relation"] > 0


NOTHING = {
    "no pseudo boxes": lambda: [targets(BOXES, [], [1, 3], 10), targets(BOXES[:1], [], [0], 20)],
    "pseudo boxes alone": lambda: [targets([], PSEUDO, [], 10), targets([], PSEUDO[:1], [], 20)],
    "one picture without boxes": lambda: [targets(BOXES, PSEUDO, [1, 3], 10), targets([], [], [], 20)],
    "no box at all": lambda: [targets([], [], [], 10), targets([], [], [], 20)],
    "one class": lambda: [targets(BOXES, PSEUDO, [2, 2], 10), targets([], [], [], 20)],
    "more boxes than queries": lambda: [targets(BOXES * 6, PSEUDO, [1, 3] * 6, 10), targets(BOXES[:1], [], [0], 20)],
}


@pytest.mark.parametrize("scene", NOTHING)
def test_odd_batches(scenes: ModuleType, scene: str) -> None:
    model = scenes.detector()
    losses = losses_of(model, NOTHING[scene]())
    assert losses.keys() == OWN | scenes.OWN | DISTILLED
    sum(losses.values()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    if scene == "no box at all":
        assert {name for name, loss in losses.items() if loss != 0} == {
            "classification",
            "objectness",
            "image_alignment",
        } | scenes.WITHOUT_BOXES
    if scene == "one class":
        assert losses["text_alignment"] == losses["text_relation"] == 0
    if scene == "pseudo boxes alone":
        assert losses["box"] == losses["giou"] == 0
        assert losses[scenes.FIRST.partition("_")[0] + "_box"] > 0


def test_fewer_positions_than_queries(scenes: ModuleType) -> None:
    """A picture of 32 x 32 has 16 + 4 + 1 (+ 1) positions, this detector 50 queries, and an NMS leaves fewer still."""
    model = scenes.detector("detector.decoder.queries=50", "input.short_side=32", "input.long_side=32", *scenes.WIDE)
    batch = [targets([[2.0, 2.0, 20.0, 24.0]], [], [1], 10), targets([], [], [], 20)]
    losses = losses_of(model, batch, ((32, 32), (32, 32)))
    sum(losses.values()).backward()
    found = model.eval().predict(pictures((32, 32)), unit(3, DIM, seed=2))[0].boxes
    assert len(found) == 21 + (scenes is adamixer_scenes)


def test_pictures_do_not_see_each_other_in_prediction(scenes: ModuleType) -> None:
    model = scenes.detector().eval()
    images, texts = pictures(SIZES[0], SIZES[0]), unit(7, DIM, seed=2)
    together = model.predict(images, texts)
    for image, expected in zip(images, together, strict=True):
        alone = model.predict([image], texts)[0]
        torch.testing.assert_close(alone.boxes, expected.boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(alone.class_probability, expected.class_probability, atol=1e-5, rtol=1e-3)


def test_predictions_and_detections(scenes: ModuleType) -> None:
    model = scenes.detector().eval()
    texts = unit(7, DIM, seed=2)
    found = model.predict(pictures(*SIZES), texts)
    for one in found:
        assert one.class_probability.shape == (8, 8)
        torch.testing.assert_close(one.class_probability.sum(dim=1), torch.ones(8))
        shares = one.distillation_score.sum(dim=1)  # of what is sure to be an object
        torch.testing.assert_close(shares, torch.ones(8)) if scenes is adamixer_scenes else None
        assert bool((shares < 1 + 1e-5).all())
    detections = detect_batch(found, torch.arange(7) > 4, model.recipe.inference)
    assert all(len(d.scores) > 0 and bool((d.scores.diff() <= 0).all()) for d in detections)


def test_boxes_come_in_pixels_of_the_picture(scenes: ModuleType) -> None:
    """A picture of twice the size is resized to the same pixels: its boxes are twice as large."""
    model, texts = scenes.detector().eval(), unit(7, DIM, seed=2)
    (picture,) = pictures(SIZES[0])
    large = picture.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    with torch.inference_mode():
        one, two = model.predict([picture], texts)[0], model.predict([large], texts)[0]
    torch.testing.assert_close(two.boxes / 2, one.boxes, atol=0.2, rtol=0.02)


def base_only(scenes: ModuleType) -> QueryDetector:
    return scenes.detector(*PRESETS["base-only"])


def test_base_only_has_no_levels_and_one_score(scenes: ModuleType) -> None:
    model = base_only(scenes)
    assert losses_of(model, full_batch()).keys() == OWN | scenes.OWN
    assert model.eval().predict(pictures(SIZES[0]), unit(7, DIM, seed=2))[0].distillation_score is None


@pytest.mark.parametrize("build", [lambda scenes: scenes.detector(), base_only], ids=["all levels", "none"])
def test_a_checkpoint_goes_on_where_it_was(scenes: ModuleType, build: Callable[[ModuleType], QueryDetector]) -> None:
    """Weights, memories, moving means, their count and the text of "object"."""
    model, again = build(scenes), build(scenes)
    losses_of(model, full_batch())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = type(model)(again.recipe, DIM, initialise=False)
    fresh.load_state_dict(state)
    expected, found = (losses_of(m, full_batch()) for m in (model, fresh))
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss)


def test_without_the_text_of_object(scenes: ModuleType) -> None:
    """Training takes the mean of the base classes' and says so; prediction refuses."""
    said: list[str] = []
    model = build_detector(scenes.small(), DIM)
    with pytest.raises(HdovdError, match="object"):
        model.eval().predict(pictures(SIZES[0]), unit(3, DIM, seed=2))
    with lines_to(said.append):
        losses_of(model, full_batch())
    assert "mean of the base classes" in said[-1]
    texts = unit(BASE, DIM, seed=1)
    torch.testing.assert_close(model.object_text, torch.nn.functional.normalize(texts.mean(dim=0), dim=0))


def test_students_are_the_instance_levels_of_the_last_stage(scenes: ModuleType) -> None:
    model = scenes.detector()
    batch = found_batch(model)
    held = [queue.read().clone() for queue in model.instance_level.student_queues]
    students = model.train().students(pictures(*SIZES), batch)
    assert [torch.equal(a, q.read()) for a, q in zip(held, model.instance_level.student_queues, strict=True)] == [
        True,
        True,
    ]
    losses_of(model, batch)
    pushed = model.instance_level.student_queues[-1].read()
    assert len(pushed) == len(students.q) >= 2
    for row in pushed:
        assert (students.q - row).abs().amax(dim=1).min() < 1e-4
    assert bool((students.box.diff() > 0).all())
    assert [len(t.all_boxes) for t in students.targets] == [3, 3]


def test_extra_losses_see_the_last_stage(scenes: ModuleType) -> None:
    model = scenes.detector("loss.extra.seen.use=adamixer_extra:Seen", "loss.extra.seen.weight=2.0")
    losses = losses_of(model, full_batch())
    assert float(losses["seen"].detach()) > 0
    sum(losses.values()).backward()


def test_another_detectors_recipe(scenes: ModuleType) -> None:
    with pytest.raises(HdovdError, match="faster_rcnn"):
        type(scenes.detector())(load_recipe("demo"), DIM, initialise=False)


def test_another_number_of_classes_than_the_checkpoints(scenes: ModuleType) -> None:
    model = scenes.detector()
    losses_of(model, full_batch())
    with pytest.raises(HdovdError, match="5 base classes, expected 6"):
        model(pictures(*SIZES), full_batch(), noise(6, DIM, seed=1))


def test_under_autocast(scenes: ModuleType) -> None:
    """bfloat16: all losses are float32, finite, and near those of float32."""
    expected = losses_of(scenes.detector(), full_batch())
    with torch.autocast("cpu", torch.bfloat16):
        found = losses_of(scenes.detector(), full_batch())
    assert {loss.dtype for loss in found.values()} == {torch.float32}
    sum(found.values()).backward()
    for name in ("box", "objectness"):
        assert float(found[name].detach()) == pytest.approx(float(expected[name].detach()), rel=0.3)


def test_texts_of_backgrounds_share_the_learned_ones_part(scenes: ModuleType) -> None:
    """At training and in prediction; and they come with the weights."""
    model, again = scenes.detector(), scenes.detector(initialise=False)
    grounds, texts, images = unit(2, DIM, seed=11), unit(BASE, DIM, seed=1), pictures(*SIZES)
    without = losses_of(model, full_batch())
    many = [one.class_probability for one in model.eval().predict(images, torch.cat([texts, grounds]))]
    model.set_background_texts(grounds)
    again.load_state_dict(model.state_dict())
    for one in (model, again.eval()):
        for merged, apart in zip(one.predict(images, texts), many, strict=True):
            torch.testing.assert_close(merged.class_probability[:, :BASE], apart[:, :BASE])
            torch.testing.assert_close(merged.class_probability[:, BASE], apart[:, BASE:].sum(dim=1))
    losses = losses_of(model, full_batch())
    assert torch.isfinite(losses["classification"])
    assert losses["classification"] != without["classification"]
    torch.testing.assert_close(losses["objectness"], without["objectness"])
