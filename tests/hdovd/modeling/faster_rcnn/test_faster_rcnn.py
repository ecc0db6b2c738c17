"""The detector: its losses against METHOD sections 4 to 6 written with loops, odd batches, and prediction.

`naive_losses` draws the same RoIs as the detector (same seed), then does everything from the features on by hand.
"""

import math
from dataclasses import replace

import pytest
import torch
from faster_rcnn_scenes import (
    BASE_BOXES,
    BASE_COUNT,
    BASE_ONLY,
    DIM,
    DISTILLED,
    PSEUDO_BOXES,
    TEXTS,
    batch,
    check_backward,
    detector,
    pictures,
    run,
    small,
    targets_of,
    unit,
)
from torch import Tensor

from hdovd.config.recipe import PRESETS
from hdovd.core import HdovdError
from hdovd.data.targets import Targets, with_large_pseudo_boxes
from hdovd.modeling.base import StepContext
from hdovd.modeling.batching import batch_images, draw_short_sides
from hdovd.modeling.faster_rcnn.model import FasterRCNN
from hdovd.modeling.levels import classwise as class_level
from hdovd.modeling.losses import classwise
from hdovd.modeling.rois import number_boxes, sample_rois_of_images

# Losses by hand.


def cross_entropy(logits: list[float], place: int) -> float:
    highest = max(logits)
    return highest + math.log(sum(math.exp(v - highest) for v in logits)) - logits[place]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / a.double().norm() / b.double().norm())


def info_nce(q: list[Tensor], e: list[Tensor], q_memory: list[Tensor], e_memory: list[Tensor], tau: float) -> float:
    return (
        sum(
            cross_entropy([tau * cosine(q[k], row) for row in e + e_memory], k)
            + cross_entropy([tau * cosine(e[k], row) for row in q + q_memory], k)
            for k in range(len(q))
        )
        / 2
        / len(q)
    )


def relation(q: list[Tensor], e: list[Tensor], tau: float, temperature: float) -> float:
    total = 0.0
    for k in range(len(q)):
        teacher, student = ([tau * cosine(rows[k], row) / temperature for row in rows] for rows in (e, q))
        p = [-cross_entropy(teacher, j) for j in range(len(q))]
        total += sum(math.exp(p[j]) * (p[j] + cross_entropy(student, j)) for j in range(len(q)))
    return temperature**2 * total / len(q)


def encode(box: list[float], roi: list[float]) -> list[float]:
    w, h, gw, gh = roi[2] - roi[0], roi[3] - roi[1], box[2] - box[0], box[3] - box[1]
    centre = [10 * (box[0] + gw / 2 - roi[0] - w / 2) / w, 10 * (box[1] + gh / 2 - roi[1] - h / 2) / h]
    return [*centre, 5 * math.log(gw / w), 5 * math.log(gh / h)]


Memories = dict[str, list[Tensor]]


@torch.no_grad()
def naive_losses(
    model: FasterRCNN, images: list[Tensor], targets: list[Targets], memories: Memories, seed: int
) -> dict[str, float]:
    torch.manual_seed(seed)
    padded, _ = batch_images(images, model.recipe.input)
    targets = [with_large_pseudo_boxes([t], 8.0)[0].with_first_pseudo_boxes(2) for t in targets]
    features = model.backbone(padded.tensors)
    proposals, rpn = model.rpn(padded, features, [{"boxes": t.all_boxes} for t in targets])
    rois, matches, _ = sample_rois_of_images(proposals, [t.all_boxes for t in targets], 32, 0.5, [None] * len(targets))
    deltas, c, r_of_rois = model.head(model.pool(features, list(rois)))
    deltas, c, d = (rows.split([len(r) for r in rois]) for rows in (deltas, c, model.head.distill(r_of_rois)))
    classification = box = 0.0
    counted = 0
    q, e = [], []
    for i, t in enumerate(targets):
        in_turn = [targets[(i + step) % len(targets)].pseudo_texts for step in range(len(targets))]
        ring = torch.cat([TEXTS, *in_turn, model.background[None]])
        for r, k in enumerate(matches[i].tolist()):
            logits = [50.0 * cosine(c[i][r], prompt) for prompt in ring]
            is_base = 0 <= k < len(t.boxes)
            label, weight = (int(t.labels[k]) if is_base else len(ring) - 1), 1.0
            if k >= len(t.boxes):
                j = k - len(t.boxes)
                label, weight = (
                    BASE_COUNT + j,
                    1.3 / (1 + math.exp(-(cosine(t.pseudo_embeddings[j], t.pseudo_texts[j]) - 0.1) / 0.5)),
                )
            classification += weight * cross_entropy(logits, label)
            counted += 1
            if is_base:
                wanted = encode(t.boxes[k].tolist(), rois[i][r].tolist())
                box += sum(abs(a - b) for a, b in zip(deltas[i][r].tolist(), wanted, strict=True))
        for k, teacher in enumerate([*t.embeddings, *t.pseudo_embeddings]):
            members = [d[i][r] for r, match in enumerate(matches[i].tolist()) if match == k]
            if members:
                q.append(torch.nn.functional.normalize(sum(members) / len(members), dim=0))
                e.append(teacher)
    levels = [features[name] for name in ("3", "4", "5")]
    g, f = list(model.image_level.head(levels, padded.image_sizes, 32)), [t.image_embedding for t in targets]
    losses = {
        "rpn_objectness": float(rpn["loss_objectness"]),
        "rpn_box": float(rpn["loss_rpn_box_reg"]),
        "classification": classification / counted,
        "box": box / sum(map(len, rois)),
        "instance_alignment": 0.1 * info_nce(q, e, memories["q"], memories["e"], 20.0),
        "instance_relation": 1.0 * relation(q, e, 5.0, 10.0),
        "image_alignment": 0.1 * info_nce(g, f, memories["g"], memories["f"], 20.0),
    }
    assert len({k for m, t in zip(matches, targets, strict=True) for k in m.tolist() if k >= len(t.boxes)}) > 0, (
        "no pseudo box was matched"
    )
    for name, rows, length in (("q", q, 7), ("e", e, 7), ("g", g, 5), ("f", f, 5)):
        memories[name] = (rows + memories[name])[:length]
    return losses


def test_losses_equal_the_method_over_steps_with_filled_queues() -> None:
    model, memories = detector().train(), {name: [] for name in "qegf"}
    for layer in (model.head.class_feature, model.head.deltas):
        torch.nn.init.normal_(layer.weight, std=0.3)
    for step in range(4):
        images, targets = batch(seed=step)
        expected = naive_losses(model, images, targets, memories, seed=step)
        losses = run(model, images, targets, seed=step)
        assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert len(memories["q"]) == 7
    assert len(memories["g"]) == 5
    queues = {
        "q": model.instance_level.student_queue,
        "e": model.instance_level.teacher_queue,
        "g": model.image_level.student_queue,
        "f": model.image_level.teacher_queue,
    }
    for name, queue in queues.items():
        torch.testing.assert_close(queue.read(), torch.stack(memories[name]), atol=1e-5, rtol=0)


# Batches of every kind.


def test_a_normal_batch_teaches_every_part() -> None:
    model = detector().train()
    losses = run(model, *batch())
    assert set(losses) == DISTILLED
    check_backward(model, losses)
    assert all(loss > 0 for loss in losses.values())
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("base", "pseudo"),
    [
        (BASE_BOXES, [[], []]),
        ([[[4.0, 4.0, 30.0, 28.0]], BASE_BOXES[1]], PSEUDO_BOXES),  # images with a single base box
        (BASE_BOXES, [PSEUDO_BOXES[0], [[5.0, 5.0, 12.0, 60.0], [50.0, 5.0, 90.0, 9.0]]]),  # all too small in one image
        (BASE_BOXES, [[[5.0, 5.0, 9.0, 9.0]], [[50.0, 5.0, 90.0, 9.0]]]),  # all too small in all images
        ([[[0.0, 0.0, 96.0, 64.0]], BASE_BOXES[1]], [[], PSEUDO_BOXES[1]]),
        ([BASE_BOXES[0]], [PSEUDO_BOXES[0]]),  # a batch of one
    ],
)
def test_losses_of_odd_batches_are_finite(base: list[list[list[float]]], pseudo: list[list[list[float]]]) -> None:
    model = detector().train()
    for step in range(2):
        images, targets = batch(base, pseudo, seed=step)
        losses = run(model, images, targets)
        assert set(losses) == DISTILLED
        check_backward(model, losses)


def test_one_pair_gives_no_instance_loss_and_no_memory() -> None:
    model = detector().train()
    losses = run(model, *batch([[[10.0, 20.0, 60.0, 50.0]]], [[]]))
    assert losses["instance_alignment"] == 0
    assert losses["instance_relation"] == 0
    assert len(model.instance_level.student_queue.read()) == 0
    check_backward(model, losses)


def test_small_pseudo_boxes_count_for_nothing() -> None:
    images, targets = batch()
    none = [with_large_pseudo_boxes([t], 1e9)[0].with_first_pseudo_boxes(5) for t in targets]
    tiny = [
        targets_of(t.boxes.tolist(), [[5.0, 5.0, 12.0, 60.0], [50.0, 5.0, 90.0, 13.0]], i)
        for i, t in enumerate(targets)
    ]
    with_none, with_tiny = run(detector(), images, none), run(detector(), images, tiny)
    for name in DISTILLED:
        assert with_tiny[name].item() == pytest.approx(with_none[name].item(), abs=1e-7), name


def test_pseudo_boxes_are_measured_at_the_input_scale() -> None:
    images = pictures((32, 48), (128, 192))  # doubled, halved
    base = [[[4.0, 4.0, 20.0, 20.0]], [[20.0, 20.0, 90.0, 100.0]]]
    kept = [
        targets_of(base[0], [[20.0, 10.0, 25.0, 15.0]], 0),
        targets_of(base[1], [[20.0, 10.0, 34.0, 24.0]], 1),
    ]  # 10 px and 7 px then
    expected = [kept[0], with_large_pseudo_boxes([kept[1]], 1e9)[0].with_first_pseudo_boxes(5)]
    one, two = run(detector(), images, kept), run(detector(), images, expected)
    for name in DISTILLED:
        assert one[name].item() == pytest.approx(two[name].item(), abs=1e-7), name


def test_base_only_has_no_distillation() -> None:
    model = detector(*PRESETS["base-only"]).train()
    losses = run(model, *batch(pseudo=[[], []]))
    assert set(losses) == BASE_ONLY
    check_backward(model, losses)
    assert model.head.distillation is None
    assert not any("queue" in name or "image_level" in name or "distillation" in name for name in model.state_dict())
    assert model.eval().predict(pictures((64, 96)), TEXTS)[0].distillation_score is None


@pytest.mark.parametrize(
    ("settings", "absent"),
    [
        (["loss.instance.enabled=false"], {"instance_alignment", "instance_relation"}),
        (["loss.image.enabled=false"], {"image_alignment"}),
        (["loss.class.enabled=false"], set()),
    ],
)
def test_levels_switch_off_one_by_one(settings: list[str], absent: set[str]) -> None:
    model = detector(*settings).train()
    losses = run(model, *batch())
    assert set(losses) == DISTILLED - absent
    check_backward(model, losses)


def test_without_the_class_level_pseudo_texts_have_no_say() -> None:
    """Then the prompts are [t_base; bg], and RoIs on pseudo boxes weigh nothing."""
    images, targets = batch()
    other = [replace(t, pseudo_texts=unit(len(t.pseudo_texts), DIM, seed=77 + i)) for i, t in enumerate(targets)]
    off = ("loss.class.enabled=false",)
    one, two = run(detector(*off), images, targets), run(detector(*off), images, other)
    assert one["instance_alignment"] > 0
    for name in DISTILLED:
        assert one[name].item() == pytest.approx(two[name].item(), abs=1e-6), name
    with_level = [run(detector(), images, rows)["classification"].item() for rows in (targets, other)]
    assert abs(with_level[0] - with_level[1]) > 1e-3


def test_the_class_weight_scales_the_pseudo_rois_only() -> None:
    matches = number_boxes((torch.tensor([2, -1, 0]), torch.tensor([1])), [3, 4])
    full, half = (labels_and_weights(matches, *setting)[1] for setting in ((), ("loss.class.weight=0.5",)))
    torch.testing.assert_close(half, full * torch.tensor([0.5, 1.0, 1.0, 0.5]))
    model = detector("loss.class.weight=0.5")
    check_backward(model, run(model, *batch()))


# Numbering.


def labels_and_weights(
    box_of_roi: Tensor, *settings: str, targets: list[Targets] | None = None
) -> tuple[Tensor, Tensor]:
    """As the classification loss is given them."""
    _, batched = batch()  # 2 base + 1 pseudo, 1 base + 3 pseudo
    level, given = detector(*settings).class_level, []
    c, nothing = torch.zeros(len(box_of_roi), DIM), torch.zeros(0, 4)
    view = StepContext({}, [], targets or batched, TEXTS, [nothing], box_of_roi, nothing, c, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classwise, "classification_loss", lambda *all_of_it: given.extend(all_of_it[1:3]) or c.sum())
        level(view, torch.ones(1, DIM))
    labels, weights = given
    return labels, weights


def test_boxes_are_numbered_image_by_image() -> None:
    matches = (torch.tensor([-1, 0, 2, 1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([3, -1, 0, 1, 2]))
    assert number_boxes(matches, [3, 2, 4]).tolist() == [-1, 0, 2, 1, 2, 8, -1, 5, 6, 7]


def test_labels_and_weights_are_those_of_the_boxes_base_before_pseudo() -> None:
    _, targets = batch()
    labels, weights = labels_and_weights(torch.tensor([-1, 0, 2, 1, 2, 6, -1, 3, 4, 5]))
    background = BASE_COUNT + 4
    assert labels.tolist() == [background, 0, 3, 1, 3, 6, background, 1, 4, 5]  # image 1's base box has label 1
    trust = [
        1.3 / (1 + math.exp(-(cosine(v, u) - 0.1) / 0.5))
        for t in targets
        for v, u in zip(t.pseudo_embeddings, t.pseudo_texts, strict=True)
    ]
    torch.testing.assert_close(weights, torch.tensor([1, 1, trust[0], 1, trust[0], trust[3], 1, 1, trust[1], trust[2]]))


def test_labels_of_pseudo_boxes_begin_behind_the_prompts_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_level, "counts_of_ranks", lambda own, _: [5, own, 2])
    monkeypatch.setattr(class_level, "rank", lambda: 1)
    monkeypatch.setattr(class_level, "gather_rows", lambda rows, counts: rows.new_ones(sum(counts), rows.shape[1]))
    labels, _ = labels_and_weights(torch.tensor([-1, 0, 2, 3, 6]))
    assert labels.tolist() == [BASE_COUNT + 11, 0, BASE_COUNT + 5, 1, BASE_COUNT + 8]


def test_without_the_class_level_pseudo_rois_have_no_weight() -> None:
    labels, weights = labels_and_weights(torch.tensor([-1, 0, 2, 6, 3, -1]), "loss.class.enabled=false")
    assert labels.tolist() == [BASE_COUNT, 0, BASE_COUNT, BASE_COUNT, 1, BASE_COUNT]
    assert weights.tolist() == [1, 1, 0, 0, 1, 1]


def test_labels_without_pseudo_boxes() -> None:
    _, targets = batch(pseudo=[[], []])
    labels, weights = labels_and_weights(torch.tensor([1, -1, -1, 2]), targets=targets)
    assert labels.tolist() == [1, BASE_COUNT, BASE_COUNT, 1]
    assert weights.tolist() == [1, 1, 1, 1]


# Keys: what is drawn for an image is its own.

KEYS = [11, 2**63 - 1, 7]
ROUNDING = 1e-5
THREE_BASE = [*BASE_BOXES, [[30.0, 8.0, 70.0, 44.0], [2.0, 30.0, 20.0, 60.0]]]
THREE_PSEUDO = [*PSEUDO_BOXES, []]


def losses_in_order(order: list[int], keys: list[int] = KEYS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of three images in an order, from a fresh detector without batch statistics that draws few
    of many.
    """
    model = frozen_detector("detector.rpn.samples=6", "detector.head.samples=8").train()
    images, targets = batch(THREE_BASE, THREE_PSEUDO)
    losses = model([images[i] for i in order], [targets[i] for i in order], TEXTS, [keys[i] for i in order])
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


def frozen_detector(*settings: str) -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(small("detector.backbone.norm=frozen", *settings), DIM, initialise=False)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
def test_with_keys_the_order_of_images_changes_no_loss_and_no_gradient(order: list[int]) -> None:
    torch.manual_seed(1)
    losses, gradients = losses_in_order([0, 1, 2])
    torch.manual_seed(2)
    other_losses, other_gradients = losses_in_order(order)
    for (
        name,
        loss,
    ) in (
        losses.items()
    ):  # sums in another order: the relation's terms, 100 times a difference of logarithms, keep six digits
        assert loss.item() > 0
        assert other_losses[name].item() == pytest.approx(loss.item(), rel=ROUNDING), name
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=0, atol=ROUNDING * float(gradient.abs().max()))


@pytest.mark.parametrize("image", range(3))
def test_another_key_moves_losses_by_far_more_than_rounding(image: int) -> None:
    keys = [
        other if number == image else key
        for number, (key, other) in enumerate(zip(KEYS, [14, 2**63 - 4, 10], strict=True))
    ]
    losses, others = losses_in_order([0, 1, 2])[0], losses_in_order([0, 1, 2], keys)[0]
    assert max(abs(others[name].item() / loss.item() - 1) for name, loss in losses.items()) > 50 * ROUNDING


def test_other_keys_draw_otherwise() -> None:
    images, targets = batch()
    values = {
        tuple(loss.item() for loss in frozen_detector().train()(images, targets, TEXTS, keys).values())
        for keys in ([1, 2], [1, 2 + 2**32], [1 + 2**40, 2])
    }
    assert len(values) == 3


def test_with_keys_the_rois_of_an_image_do_not_depend_on_the_batch() -> None:
    model, seen = frozen_detector().train(), []
    images, targets = batch(THREE_BASE, THREE_PSEUDO)
    model.pool.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    for order in ([1], [0, 1], [1, 2, 0]):
        model([images[i] for i in order], [targets[i] for i in order], TEXTS, [KEYS[i] for i in order])
    for rois in (seen[1][1], seen[2][0]):
        torch.testing.assert_close(rois, seen[0][0], atol=1e-4, rtol=0)


def test_keys_leave_the_global_generator_alone() -> None:
    model = frozen_detector().train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model(*batch(), TEXTS, [1, 2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([1], r"keys \[1\]: expected one an image, 2"),
        ([1, 2**63], r"\[1, 9223372036854775808\]"),
        ([-1, 0], r"\[-1, 0\]"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: list[int], message: str) -> None:
    with pytest.raises(HdovdError, match=message):
        detector().train()(*batch(), TEXTS, keys)


# Multi-scale training.


def test_boxes_and_the_size_rule_follow_the_scale_that_is_drawn() -> None:
    """At scale 1 the pseudo box has 10 px, at scale 1/2 it has 5 and is too small; two images of the same picture."""
    model = frozen_detector("input.train_short_sides=[64, 32]").train()
    keys = [next(k for k in range(99) if draw_short_sides([k], model.recipe.input) == [side]) for side in (64, 32)]
    images = pictures((64, 96)) * 2
    targets = [targets_of(BASE_BOXES[0], [[60.0, 40.0, 70.0, 50.0]], 0)] * 2
    views = []
    model.image_level.register_forward_pre_hook(lambda _, arguments: views.append(arguments[0]))
    model(images, targets, TEXTS, keys)
    for i, (pseudo, factor, size) in enumerate((([[60.0, 40.0, 70.0, 50.0]], 1.0, (64, 96)), ([], 0.5, (32, 48)))):
        assert views[0].image_sizes[i] == size
        torch.testing.assert_close(views[0].targets[i].boxes, factor * torch.tensor(BASE_BOXES[0]))
        assert views[0].targets[i].pseudo_boxes.tolist() == pseudo
        assert (views[0].rois[i] <= torch.tensor([size[1], size[0], size[1], size[0]])).all()
        assert len(views[0].targets[i].pseudo_texts) == len(views[0].targets[i].pseudo_embeddings) == len(pseudo)


def test_prediction_is_at_the_fixed_scale() -> None:
    images = pictures((64, 96), (100, 120))
    plain, several = (
        frozen_detector(*setting).eval().predict(images, TEXTS)
        for setting in ((), ("input.train_short_sides=[32, 40]",))
    )
    for one, two in zip(plain, several, strict=True):
        assert torch.equal(one.boxes, two.boxes)


# Prediction.


def test_predict_scores_and_boxes_equal_loops_in_original_pixels() -> None:
    model = detector().eval()
    torch.nn.init.normal_(model.head.deltas.weight, std=0.3)  # large offsets: some boxes leave the image
    images, texts = pictures((32, 40), (128, 180), (64, 96)), unit(5, DIM, seed=3)
    found = model.predict(images, texts)
    padded, factors = batch_images(images, model.recipe.input)
    with torch.no_grad():
        features = model.backbone(padded.tensors)
        proposals, _ = model.rpn(padded, features)
        deltas, c, r_of_rois = model.head(model.pool(features, proposals))
        deltas, c, d = (rows.split([len(p) for p in proposals]) for rows in (deltas, c, model.head.distill(r_of_rois)))
    for i, (image, prediction) in enumerate(zip(images, found, strict=True)):
        count, (height, width), (x, y) = len(proposals[i]), padded.image_sizes[i], factors[i]
        assert prediction.boxes.shape == (count, 4)
        assert prediction.class_probability.shape == (count, 6)
        assert prediction.distillation_score is not None
        assert prediction.distillation_score.shape == (count, 5)
        for r in range(count):
            x0, y0, x1, y1 = proposals[i][r].tolist()
            dx, dy, dw, dh = deltas[i][r].tolist()
            cx, cy = (x0 + x1) / 2 + dx / 10 * (x1 - x0), (y0 + y1) / 2 + dy / 10 * (y1 - y0)
            w, h = (
                (x1 - x0) * math.exp(min(dw / 5, math.log(1000 / 16))),
                (y1 - y0) * math.exp(min(dh / 5, math.log(1000 / 16))),
            )
            expected = [
                min(max(cx - w / 2, 0), width) / x,
                min(max(cy - h / 2, 0), height) / y,
                min(max(cx + w / 2, 0), width) / x,
                min(max(cy + h / 2, 0), height) / y,
            ]
            assert prediction.boxes[r].tolist() == pytest.approx(expected, abs=1e-3)
            logits = [50 * cosine(c[i][r], prompt) for prompt in [*texts, model.background.detach()]]
            s1 = [math.exp(-cross_entropy(logits, k)) for k in range(6)]
            assert prediction.class_probability[r].tolist() == pytest.approx(s1, abs=1e-4)
            s2 = [1 / (1 + math.exp(-20 * cosine(d[i][r], text))) for text in texts]
            assert prediction.distillation_score[r].tolist() == pytest.approx(s2, abs=1e-4)
        assert (prediction.boxes[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]]) + 1e-3).all()


def test_predict_does_not_depend_on_the_classes_asked_for_beyond_their_scores() -> None:
    model, images, texts = detector().eval(), pictures((64, 96)), unit(5, DIM, seed=3)
    five, two = model.predict(images, texts)[0], model.predict(images, texts[:2])[0]
    assert torch.equal(five.boxes, two.boxes)
    assert five.distillation_score is not None
    assert two.distillation_score is not None
    torch.testing.assert_close(five.distillation_score[:, :2], two.distillation_score)


def test_a_state_dict_makes_the_same_detector() -> None:
    model = detector().train()
    run(model, *batch())
    again = FasterRCNN(small(), DIM, initialise=False)
    again.load_state_dict(model.state_dict())
    assert len(again.instance_level.student_queue.read()) == len(model.instance_level.student_queue.read()) > 0
    images = pictures((64, 96))
    one, two = model.eval().predict(images, TEXTS)[0], again.eval().predict(images, TEXTS)[0]
    assert torch.equal(one.boxes, two.boxes)
    assert torch.equal(one.class_probability, two.class_probability)


def test_checkpoints_of_before_the_levels_were_parts_still_load() -> None:
    model = detector().train()
    run(model, *batch())
    old = {
        "instance_level.student_queue": "student_queue",
        "instance_level.teacher_queue": "teacher_queue",
        "image_level.head": "image_head",
        "image_level.student_queue": "image_student_queue",
        "image_level.teacher_queue": "image_teacher_queue",
    }
    state = {
        next((before + name.removeprefix(now) for now, before in old.items() if name.startswith(now)), name): value
        for name, value in model.state_dict().items()
    }
    assert not any("level" in name for name in state)
    again = FasterRCNN(small(), DIM, initialise=False)
    again.load_state_dict(state)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_losses_barely_move_under_autocast() -> None:
    images, targets = batch()
    plain = run(detector(), images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(detector(), images, targets)
    assert {loss.dtype for loss in mixed.values()} == {torch.float32}
    for name in ("rpn_objectness", "image_alignment"):  # these do not depend on which RoIs are drawn
        assert mixed[name].item() == pytest.approx(plain[name].item(), rel=0.05), name


def test_texts_of_backgrounds_share_the_learned_ones_part() -> None:
    """At training the background's part of the softmax is the sum over all its rows; so it is when it predicts."""
    model, again = detector().train(), FasterRCNN(small(), DIM, initialise=False)
    grounds, images = unit(2, DIM, seed=11), pictures((64, 96))
    texts = unit(5, DIM, seed=3)
    many = model.eval().predict(images, torch.cat([texts, grounds]))[0].class_probability
    model.set_background_texts(grounds)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.background_texts, grounds)
    for one in (model, again.eval()):
        merged = one.predict(images, texts)[0].class_probability
        assert merged.shape[1] == 6
        torch.testing.assert_close(merged[:, :5], many[:, :5])
        torch.testing.assert_close(merged[:, 5], many[:, 5:].sum(dim=1))
    loss = run(model.train(), *batch())["classification"]
    model.set_background_texts(grounds[:0])
    assert torch.isfinite(loss)
    assert loss != run(model, *batch())["classification"]


def test_weights_of_before_there_were_texts_of_backgrounds_load() -> None:
    model = detector()
    assert "background_texts" not in model.state_dict()
    again = FasterRCNN(small(), DIM, initialise=False)
    again.load_state_dict(model.state_dict())
    assert len(again.background_texts) == 0
