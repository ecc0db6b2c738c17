"""Level 2, class-wise distillation in text space, novel-class-aware (METHOD section 5).

N images, R sampled RoIs, K base classes, P pseudo boxes of the whole batch, D embedding size.
Prompts are [t_1..t_K; u_1..u_P; bg], so labels are 0..K-1 base, K..K+P-1 pseudo, K+P background.

The paper writes image i's prompts with its own pseudo boxes first and the others in ring order. A softmax
does not see the order of its columns, so all images share one order here and only the labels shift.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_logits(features: Tensor, prompts: Tensor, scale: float) -> Tensor:
    """`scale * cos(feature, prompt)`: features (R, D), prompts (C, D), float32 logits (R, C)."""
    with torch.autocast(features.device.type, enabled=False):  # a product in bfloat16 would be off by 0.2 at scale 50
        return scale * F.normalize(features.float(), dim=1) @ F.normalize(prompts.float(), dim=1).T


def with_one_background(logits: Tensor, rows: int) -> Tensor:
    """Logits (R, C + rows), the last `rows` of backgrounds -> (R, C + 1), whose softmax has the sum of their parts
    last.
    """
    if rows == 1:
        return logits
    return torch.cat([logits[:, :-rows], logits[:, -rows:].logsumexp(dim=1, keepdim=True)], dim=1)


def class_probability(features: Tensor, texts: Tensor, backgrounds: Tensor, scale: float) -> Tensor:
    """Probabilities (R, C + 1) of the classes with texts (C, D) and, last, of what the backgrounds (B + 1, D) stand
    for.
    """
    logits = cosine_logits(features, torch.cat([texts, backgrounds]), scale)
    return with_one_background(logits, len(backgrounds)).softmax(dim=1)


def of_judged(logits: Tensor, judged: list[Tensor | None], image: Tensor, is_background: Tensor) -> Tensor:
    """Logits (R, X), in which a RoI of background is none of the base classes that its image is judged by: the others,
    whose objects may be there without a box, are at -inf, and so no negatives. An object is one of its own class alone.

    Args:
        judged: (K,) bool of each image; None anywhere: annotations that are not federated. image: (R,) int64, the image
        of each RoI. is_background: (R,) bool.
    """
    known = [part for part in judged if part is not None]
    if not known or len(known) < len(judged):
        return logits
    unknown = ~torch.stack(known)[image] & is_background[:, None]
    return torch.cat([logits[:, : unknown.shape[1]].masked_fill(unknown, -torch.inf), logits[:, unknown.shape[1] :]], 1)


def classification_loss(logits: Tensor, labels: Tensor, weights: Tensor, count: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy, summed and divided by the number of RoIs with positive weight.

    Args:
        logits: (R, K+P+1). labels: (R,) int64.
        weights: (R,) 1 for base and background RoIs, w_j for a RoI matched to pseudo box j.
        count: () what to divide by where these rows are a part of all (`distributed.divisor`); None: counted here.
    """
    rows = F.cross_entropy(logits, labels, reduction="none")
    return (rows * weights).sum() / ((weights > 0).sum().clamp(min=1) if count is None else count)


def box_loss(deltas: Tensor, targets: Tensor, is_base: Tensor, count: Tensor | None = None) -> Tensor:
    """L1 over the RoIs of base boxes, divided by all sampled RoIs: pseudo boxes teach no regression.

    Args:
        deltas, targets: (R, 4) encoded offsets. is_base: (R,) bool.
        count: () as in `classification_loss`; None: R.
    """
    distance = (
        (deltas - targets).masked_fill(~is_base[:, None], 0.0).abs()
    )  # a mask as an index would have the host wait for the device
    return distance.sum() / (max(len(deltas), 1) if count is None else count)


def reliability(visual: Tensor, text: Tensor, centre: float, width: float, scale: float) -> Tensor:
    """How far a pseudo box's noun is trusted: `scale * sigmoid((cos(v, u) - centre) / width)` (METHOD section 2).

    Args:
        visual, text: (P, D) L2-normalised v and u.

    Returns:
        (P,) weights in 0..scale.
    """
    return scale * torch.sigmoid(((visual * text).sum(1) - centre) / width)
