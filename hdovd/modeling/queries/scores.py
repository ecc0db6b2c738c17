"""From the class features of queries to scores for any classes. Q queries, K classes, D embedding size."""

import torch
from torch import Tensor, nn

from hdovd.modeling.losses.classwise import cosine_logits, with_one_background


class TextAdapters(nn.Module):
    """`classified` is what the classifier compares with its prompts; `distilled` what the losses in text space are
    about.

    The second one's weights are made of the last ones of the first, which learn nothing by it. It starts as the
    identity.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.visual_to_text = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )
        self.transfer = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        for start in self.transfer[-1].parameters():
            nn.init.zeros_(start)

    def classified(self, c: Tensor) -> Tensor:
        """(..., D) -> (..., D) float32."""
        moved: Tensor = self.visual_to_text(c)
        return c + moved.float()

    def distilled(self, c: Tensor) -> Tensor:
        """(..., D) -> (..., D) float32."""
        last = self.visual_to_text[-1]
        assert isinstance(last, nn.Linear)
        with torch.autocast(c.device.type, enabled=False):
            moved: Tensor = c @ self.transfer(last.weight.detach()).T
            return c + moved


def query_scores(
    c: Tensor, d: Tensor | None, texts: Tensor, backgrounds: Tensor, logit_scale: float, distillation_scale: float
) -> tuple[Tensor, Tensor | None]:
    """Scores of queries for any classes (METHOD section 7); both are a softmax over the classes (released code).

    Args:
        c, d: (Q, D) class features in text space, as the classifier and, if a level teaches it, as the distillation
        moves them. texts: (K, D) of the classes. backgrounds: (B + 1, D).

    Returns:
        Probabilities (Q, K + 1), the last of the background; and (Q, K), or None.
    """
    logits = cosine_logits(c, torch.cat([texts, backgrounds]), logit_scale)
    first = with_one_background(logits, len(backgrounds)).softmax(dim=1)
    return first, None if d is None else cosine_logits(d, texts, distillation_scale).softmax(dim=1)


def with_objectness(first: Tensor, second: Tensor | None, objectness: Tensor) -> tuple[Tensor, Tensor | None]:
    """Both scores of queries, times the probability (Q,) that there is an object of which no other query is surer; what
    the classes lose is the background's.
    """
    share = objectness[:, None]
    classes = first[:, :-1] * share
    return torch.cat([classes, 1 - classes.sum(dim=1, keepdim=True)], dim=1), None if second is None else second * share
