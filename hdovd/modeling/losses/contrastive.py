"""InfoNCE with memory, used by the instance level (METHOD section 4) and the image level (section 6).

n rows in the batch, m rows in the memory, D embedding size. All rows are expected to be L2-normalised.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment_loss(
    student: Tensor, teacher: Tensor, student_memory: Tensor, teacher_memory: Tensor, tau: float
) -> Tensor:
    """Symmetric InfoNCE: row k of the student against row k of the teacher.

        1/2 CE(tau q [e; E]^T, diag) + 1/2 CE(tau e [q; Q]^T, diag)

    Args:
        student, teacher: (n, D) rows q and e of the batch.
        student_memory, teacher_memory: (m, D) rows Q and E of earlier batches; no gradient is wanted.
        tau: inverse temperature.

    Returns:
        Scalar, mean over rows; exactly zero (with a gradient path) if n is 0.
    """
    if len(student) == 0:
        return student.sum()
    target = torch.arange(len(student), device=student.device)
    with torch.autocast(student.device.type, enabled=False):
        cosines = student @ teacher.T  # once, for both directions; and no gradient is computed for the memories
        to_teacher = tau * torch.cat([cosines, student @ teacher_memory.T], dim=1)
        to_student = tau * torch.cat([cosines.T, teacher @ student_memory.T], dim=1)
    return (F.cross_entropy(to_teacher, target) + F.cross_entropy(to_student, target)) / 2
