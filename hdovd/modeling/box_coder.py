"""Boxes as offsets from anchors or RoIs and back: torchvision's coder, for which no number is copied to the device.

torchvision copies its weights and halves there with each call, and a copy that is not told otherwise waits for all that
the device has still to do.
"""

import torch
from torch import Tensor
from torchvision.models.detection import _utils


class BoxCoder(_utils.BoxCoder):
    """Offsets (n, 4) are (dx, dy, dw, dh), each times its weight: the centre's in sides of the anchor, the sides' as
    logarithms.
    """

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """(n, 4) boxes and (n, 4) anchors, both xyxy -> (n, 4) offsets."""
        weights = torch.tensor(self.weights, dtype=reference_boxes.dtype).to(reference_boxes.device, non_blocking=True)
        offsets: Tensor = _utils.encode_boxes(reference_boxes, proposals, weights)
        return offsets

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """(n, 4) offsets and (n, 4) anchors -> (n, 4) boxes."""
        boxes = boxes.to(rel_codes.dtype)
        sides = boxes[:, 2:] - boxes[:, :2]
        wx, wy, ww, wh = self.weights
        shift = torch.stack([rel_codes[:, 0] / wx, rel_codes[:, 1] / wy], dim=1)
        growth = torch.stack([rel_codes[:, 2] / ww, rel_codes[:, 3] / wh], dim=1).clamp(max=self.bbox_xform_clip)
        centre, half = shift * sides + (boxes[:, :2] + 0.5 * sides), 0.5 * (growth.exp() * sides)
        return torch.cat([centre - half, centre + half], dim=1)
