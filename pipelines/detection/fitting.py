"""Rows of classes, fitted to what a detector sees at examples in their pictures.

A crop is told to CLIP alone. A picture with its boxes also shows what the detector makes of an example, and what lies
around it. n regions, D embedding size, K classes with examples, O other classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from hdovd.core.errors import HdovdError, counted
from hdovd.core.log import log
from hdovd.data.coco import Exif
from hdovd.modeling.base import Detector
from hdovd.modeling.export.detectors import ExportableDetector, traceable
from hdovd.pipelines.common.device import inference_autocast
from hdovd.pipelines.detection.examples import Examples

ON_IOU, OFF_IOU, OFF = 0.5, 0.3, -1  # a region is on an example from the one on, off all below the other
OFF_REGIONS = 100  # of a picture
KEPT, PRIOR = 10.0, 3000.0  # weights; chosen by base classes (docs/RESULTS.md)
STEPS, RATE = 100, 0.02  # of Adam; more change nothing that counts


@torch.inference_mode(False)
@torch.enable_grad()
def fit_rows(model: Detector, examples: Examples, rows: Tensor, others: Tensor) -> Tensor:
    """(K, D) L2-normalised: rows (K, D) of norm 1, moved until regions on examples are found as their class, and those
    off all examples have the probabilities that they had, as far as that takes no row far.

        sum over regions on examples of -log p + KEPT * sum over the others of KL(before || after)
        + PRIOR * sum over rows of (1 - cosine with what the row was)

    Other classes (O, D) compete. Examples that are crops without their pictures, and detectors that do not tell
    features of regions (`exportable`), leave the rows as they are.
    """
    detector = traceable(model)
    if not examples.in_pictures or not isinstance(detector, ExportableDetector):
        return rows
    found = (_regions(detector, examples, number) for number in range(len(examples.images)))
    c, label = map(torch.cat, zip(*filter(None, found), strict=True))
    on, start, others = label != OFF, rows.to(c).clone(), others.to(c).clone()  # copies, outside of inference mode
    log(f"examples in their pictures: the detector has {counted(int(on.sum()), 'region')} on them")

    def log_probabilities(moved: Tensor) -> Tensor:
        first, _ = detector.scores(c, None, torch.cat([moved, others]))
        return first.clamp(min=1e-12).log()

    before, moved = log_probabilities(start).detach(), start.clone().requires_grad_()
    adam = torch.optim.Adam([moved], lr=RATE)
    for _ in range(STEPS):
        unit = F.normalize(moved, dim=1)
        after = log_probabilities(unit)
        loss = F.nll_loss(after[on], label[on], reduction="sum") + PRIOR * (1 - (unit * start).sum(dim=1)).sum()
        loss = loss + KEPT * F.kl_div(after[~on], before[~on], reduction="sum", log_target=True)
        adam.zero_grad()
        (loss / len(on)).backward()
        adam.step()
    return F.normalize(moved.detach(), dim=1).to(rows)


@torch.no_grad()
def _regions(detector: ExportableDetector, examples: Examples, number: int) -> tuple[Tensor, Tensor] | None:
    """Features (n, D) and labels (n,) of regions of a picture, the class of the example that one is on, or OFF: of all
    that are on examples, and of OFF_REGIONS at most that are off all. None for a picture that cannot be read.
    """
    image, device = examples.images[number], detector.mean.device
    try:
        pixels = examples.picture(examples.path(image), image.width, image.height, Exif.APPLY).pixels
    except HdovdError:
        return None  # its examples are told as left out
    with inference_autocast(device, detector.recipe):
        boxes, c = detector.rois(pixels.to(device))[:2]
    overlap, nearest = box_iou(boxes.float(), torch.from_numpy(image.boxes).to(device)).max(dim=1)
    label = torch.from_numpy(image.labels).to(device)[nearest].where(overlap >= ON_IOU, OFF)
    off = (overlap < OFF_IOU).nonzero().flatten()
    kept = torch.cat([(label != OFF).nonzero().flatten(), off[:: -(-len(off) // OFF_REGIONS) or 1]])
    return c[kept].float(), label[kept]
