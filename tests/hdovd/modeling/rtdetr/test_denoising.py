"""Denoising: which boxes the slots are of, how far they lie off, who sees whom; and the losses of its own."""

import torch
from adamixer_scenes import BASE, DIM, pictures, targets, unit
from rtdetr_scenes import detector
from torch import Tensor

from hdovd.data.targets import Targets
from hdovd.modeling.batching import batch_images
from hdovd.modeling.queries.detector import Step
from hdovd.modeling.queries.pairs import NONE, Candidates, StepBoxes
from hdovd.modeling.rtdetr.model import CHOSEN, NOBODY, RTDETR, Noised, candidate_losses, noised, varifocal_rows
from hdovd.modeling.rtdetr.network import to_pixels

BOXES, PSEUDO = [[14.0, 14.0, 60.0, 70.0], [20.0, 10.0, 90.0, 80.0]], [[30.0, 5.0, 80.0, 60.0], [0.0, 40.0, 50.0, 90.0]]
SIZES = ((96, 128), (128, 96), (96, 96))


def batch() -> list[Targets]:
    """Four boxes, none, one."""
    return [targets(BOXES, PSEUDO, [1, 3], 10), targets([], [], [], 20), targets(BOXES[:1], [], [0], 30)]


def step_of(model: RTDETR, rows: list[Targets], keys: list[int], first: int = 0) -> Step:
    _, boxes = model._batch(pictures(*SIZES[first : first + len(rows)]), rows, keys)
    return model._step(boxes, keys, unit(BASE, DIM, seed=1))


def slots_of(*settings: str) -> tuple[Noised, Step]:
    model = detector("detector.denoising.queries=12", *settings)
    step = step_of(model, batch(), [5, 6, 7])
    found = noised(step, model.config.denoising)
    assert found is not None
    return found, step


def test_each_group_holds_each_box_twice() -> None:
    found, _ = slots_of()
    assert [len(g.unique()) for g in found.group] == [3, 1, 12]  # 3 groups of 4; padding alone; 12 groups of 1
    for n, (first, count, groups) in enumerate([(0, 4, 3), (4, 0, 0), (4, 1, 12)]):
        real = found.group[n] != NOBODY
        assert real.sum() == 2 * count * groups
        for group in range(groups):
            own = found.group[n] == group
            for near in (True, False):
                assert found.box[n, own & (found.positive[n] == near)].tolist() == list(range(first, first + count))
        torch.testing.assert_close(found.share[n].sum(), torch.tensor(2.0 * count))
    assert not found.positive[found.group == NOBODY].any()


def test_noise_is_near_or_too_far() -> None:
    """Corners of positives within half a side, those of negatives beyond it, but for the picture's edges."""
    found, step = slots_of()
    sizes = step.boxes.sizes[:, None]
    corners = to_pixels(found.boxes, step.boxes.sizes)
    own = step.boxes.boxes[found.box]
    half = (own[..., 2:] - own[..., :2]).tile(2) / 2
    off = (corners - own).abs() / half
    assert (off[found.positive] <= 1 + 1e-4).all()
    assert (off[found.positive] > 0.5).any()
    far = found.real & ~found.positive
    edge = sizes.flip(-1).tile(2)
    at_edge = (corners < 1e-2) | (corners > edge - 1e-2)
    inwards = (corners[..., :2] > own[..., :2]) & (corners[..., 2:] < own[..., 2:])  # may have passed each other
    away = (off > 1 - 1e-4) | at_edge | inwards.tile(2)
    assert away[far].all()
    assert not away[found.positive].any(dim=-1).all()
    assert off[far].mean() > 2 * off[found.positive].mean()
    assert (found.boxes[found.real][:, 2:] >= 0).all()


def test_some_are_told_another_class() -> None:
    told, step = slots_of("detector.denoising.label_noise=0.0")
    assert torch.equal(told.prompt[told.real], step.labels[told.box][told.real])
    noisy, _ = slots_of("detector.denoising.label_noise=1.0")
    assert noisy.prompt[noisy.real].unique().tolist() == list(range(BASE))
    half, _ = slots_of()
    assert 0.2 < (half.prompt != told.prompt)[half.real].float().mean() < 0.6


def test_draws_are_the_pictures_own() -> None:
    """Neither the other pictures of the batch nor their order change them; its key does."""
    model = detector()
    together = noised(step_of(model, batch(), [5, 6, 7]), model.config.denoising)
    for key, same in ((7, True), (8, False)):
        alone = noised(step_of(model, batch()[2:], [key], 2), model.config.denoising)
        assert torch.equal(alone.boxes[0], together.boxes[2, : alone.boxes.shape[1]]) is same
    assert noised(step_of(model, batch()[1:2], [6], 1), model.config.denoising) is None


def test_groups_do_not_see_each_other_nor_do_chosen_queries_see_them() -> None:
    found, _ = slots_of()
    seen, queries = found.seen(4), 4
    group = torch.cat([torch.full((3, queries), CHOSEN), found.group], dim=1)
    for n in range(3):
        for one in range(seen.shape[1]):
            for other in range(seen.shape[1]):
                allowed = group[n, one] == group[n, other] or other < queries
                assert bool(seen[n, one, other]) is bool(allowed)


def contents(model: RTDETR, changed: slice | None) -> list[Tensor]:
    """What comes of all queries, where the content of some slots is another one."""
    rows = batch()
    images, _ = batch_images(pictures(*SIZES), model.recipe.input)
    step = step_of(model, rows, [5, 6, 7])

    def moved(_: object, __: object, content: Tensor) -> None:
        if changed is not None:
            content[:, changed] += 3.0

    model.denoising.register_forward_hook(moved)
    with torch.no_grad():
        look = model.find(images, step)
    return [look.contents[-1], look.denoised[-1][0]]


def test_what_a_group_holds_changes_no_other() -> None:
    """Through all stages. The first group of the first picture is slots 0 to 7."""
    model = detector("detector.denoising.queries=8").eval()
    chosen, denoised = contents(model, None)
    chosen_too, changed = contents(detector("detector.denoising.queries=8").eval(), slice(0, 8))
    torch.testing.assert_close(chosen_too, chosen, rtol=0, atol=0)
    torch.testing.assert_close(changed[0, 8:], denoised[0, 8:], rtol=0, atol=0)
    assert (changed[0, :8] - denoised[0, :8]).abs().amax(dim=1).min() > 1e-3


def test_more_groups_of_the_same_noise_are_the_same_losses() -> None:
    """They are means over a picture's groups: without noise all are alike."""
    few, many = (
        detector(*(f"detector.denoising.{value}" for value in (f"queries={n}", "box_noise=0.0", "label_noise=0.0")))
        for n in (4, 12)
    )
    one, other = (m.train()(pictures(*SIZES), batch(), unit(BASE, DIM, seed=1), [5, 6, 7]) for m in (few, many))
    for name in ("denoising_classification", "denoising_objectness", "denoising_box", "denoising_giou"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
        assert one[name] > 0


def test_varifocal_loss_by_hand() -> None:
    p, q = torch.tensor([0.8, 0.3, 0.6]), torch.tensor([0.5, 0.0, 1.0])
    cross = -(q * p.log() + (1 - q) * (1 - p).log())
    expected = torch.tensor([0.5, 0.75 * 0.3**2, 1.0]) * cross
    torch.testing.assert_close(varifocal_rows(p, q), expected)


def test_losses_of_candidates_by_hand() -> None:
    """Two objects, one of them paired; of four candidates one lies in the padding."""
    probability = torch.tensor([[0.8, 0.3, 0.6, 0.9]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 20, 20], [5, 5, 9, 9], [0, 0, 1, 1]]])
    found = Candidates(probability, boxes, torch.tensor([[True, True, True, False]]))
    objects = torch.tensor([[[0.0, 0, 10, 20], [3, 3, 6, 6]]])
    blank = dict.fromkeys(StepBoxes.__slots__)
    step = StepBoxes(**blank | {"objects": objects, "sizes": torch.tensor([[40.0, 20.0]])})
    own, far, apart = candidate_losses(found, step, torch.tensor([[1, NONE]]), torch.tensor(2.0))
    quality = torch.tensor([0.0, 0.5, 0.0])
    torch.testing.assert_close(own, varifocal_rows(probability[0, :3], quality).sum() / 2)
    torch.testing.assert_close(far, torch.tensor(10 / 20 / 2))
    torch.testing.assert_close(apart, torch.tensor((1 - 0.5) / 2))
