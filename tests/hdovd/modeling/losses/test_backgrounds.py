"""Several backgrounds as one: METHOD section 5's softmax with more rows than the learned one."""

import torch

from hdovd.modeling.losses.classwise import classification_loss, with_one_background


def test_the_part_of_all_backgrounds_is_the_sum_of_theirs() -> None:
    logits = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)) * 5
    found, apart = with_one_background(logits, 3).softmax(dim=1), logits.softmax(dim=1)
    torch.testing.assert_close(found, torch.cat([apart[:, :3], apart[:, 3:].sum(dim=1, keepdim=True)], dim=1))


def test_one_background_is_left_as_it_is() -> None:
    logits = torch.randn(3, 4)
    assert with_one_background(logits, 1) is logits


def test_a_roi_of_the_background_may_be_like_any_of_them() -> None:
    """It costs nothing to be like a text of a background, and much to be like a class."""
    logits = torch.tensor([[0.0, 0.0, 30.0, 0.0], [0.0, 0.0, 0.0, 30.0], [30.0, 0.0, 0.0, 0.0]])
    rows = [
        float(classification_loss(with_one_background(one[None], 2), torch.tensor([2]), torch.ones(1)))
        for one in logits
    ]
    assert max(rows[:2]) < 1e-6
    assert rows[2] > 25
