"""Level 1, instance-wise distillation in visual space (METHOD section 4).

P positive RoIs, B boxes of the batch (image by image, base before pseudo), n boxes with a positive RoI,
D embedding size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_PAIRS = 2  # with fewer there is nothing to contrast or relate: both losses are zero


def box_students(distillation: Tensor, box_of_roi: Tensor, box_count: int) -> tuple[Tensor, Tensor]:
    """The student embedding of every box that has a positive RoI: mean first, then normalise.

    Args:
        distillation: (P, D) features d of the positive RoIs.
        box_of_roi: (P,) int64, the box in 0..box_count-1 that each belongs to.
        box_count: B.

    Returns:
        q (n, D) normalised, and (n,) int64 the boxes they belong to, in box order.
    """
    count = box_of_roi.new_zeros(box_count).index_add(
        0, box_of_roi, torch.ones_like(box_of_roi)
    )  # a GPU's bincount has the host wait
    total = distillation.new_zeros(box_count, distillation.shape[1]).index_add(0, box_of_roi, distillation)
    matched = count.nonzero().flatten()
    return F.normalize(total[matched] / count[matched, None], dim=1), matched


def relation_loss(student: Tensor, teacher: Tensor, tau: float, temperature: float) -> Tensor:
    """KL between the similarity rows of teacher and student.

        T^2 mean_rows KL(softmax(tau e e^T / T) || softmax(tau q q^T / T))

    Args:
        student, teacher: (n, D) L2-normalised rows q and e; the teacher gets no gradient.
        tau: inverse temperature of the similarities. temperature: T.

    Returns:
        Scalar; exactly zero (with a gradient path) if n is 0.
    """
    if len(student) == 0:
        return student.sum()
    with torch.autocast(student.device.type, enabled=False):
        log_q = F.log_softmax(tau * student @ student.T / temperature, dim=1)
        log_p = F.log_softmax(tau * teacher @ teacher.T / temperature, dim=1).detach()
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
