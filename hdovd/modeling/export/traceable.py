"""Any detector as a module that torch can trace, or at least call."""

from torch import Tensor, nn

from hdovd.core.registry import resolve
from hdovd.modeling.base import Detector
from hdovd.modeling.boxes import detect


def traceable(detector: Detector) -> nn.Module:
    """The detector as a module over (image, texts, is_novel), in eval mode: one that torch can trace, if it has one."""
    if detector.exportable is None:
        return _OnePicture(detector)
    module: nn.Module = resolve(detector.exportable, "the detector's exportable")(detector)
    return module


class _OnePicture(nn.Module):
    """`Detector.predict` and `detect` of one picture."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()

    def forward(self, image: Tensor, texts: Tensor, is_novel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = detect(self.detector.predict([image], texts)[0], is_novel, self.detector.recipe.inference)
        return found.boxes, found.scores, found.labels
