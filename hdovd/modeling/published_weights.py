"""The authors' names for the weights of their detectors, and ours.

Their code stands on mmdetection; the shapes are the same but for a leading 1. Memories of the losses are not in their
checkpoints, nor is the text of "object".
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """How one detector of the authors' becomes one of ours.

    recipe, settings: what it is here. names: their names as patterns, and ours, tried in order.
    unneeded: pattern of their names -> why hdovd does without. anew: pattern of our names -> why their checkpoint has
    none of it. background: their name of the background embedding, whose last side is D.
    """

    recipe: str
    settings: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    unneeded: dict[str, str]
    anew: dict[str, str]
    background: str = "roi_head.bg_embedding.weight"

    def own_name(self, name: str) -> str | None:
        """Our name of a tensor of theirs, None for one that is not of this detector."""
        for theirs, ours in self.names:
            if found := re.fullmatch(theirs, name):
                return found.expand(ours)
        return None


_BOTH = (
    (r"backbone\.(.+)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(.+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"roi_head\.bg_embedding\.weight", r"background"),
    (r"roi_head\.layernorm\.(.+)", r"image_level.head.norm.\1"),
    (r"roi_head\.linear_transform\.(.+)", r"image_level.head.project.\1"),
)
_FASTER_RCNN = (
    (r"rpn_head\.rpn_conv\.(.+)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(.+)", r"rpn.head.cls_logits.\1"),
    (r"rpn_head\.rpn_reg\.(.+)", r"rpn.head.bbox_pred.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.(.+)", r"head.fc1.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.(.+)", r"head.fc2.\1"),
    (r"roi_head\.bbox_head\.fc_cls\.(.+)", r"head.class_feature.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(.+)", r"head.deltas.\1"),
    (r"roi_head\.fc\.(.+)", r"head.distillation.\1"),
)
_ADAMIXER = (
    (r"norms\.(.+)", r"norms.\1"),
    (r"rpn_head\.token_norm\.(.+)", r"proposals.content_norm.\1"),
    (r"rpn_head\.(conv[12])\.conv\.(.+)", r"proposals.trunk.\1.0.\2"),
    (r"rpn_head\.(conv[12])\.gn\.(.+)", r"proposals.trunk.\1.1.\2"),
    (r"rpn_head\.main_head\.obj_(scale|bias)", r"proposals.main.object_\1"),
    (r"rpn_head\.aux_head\.obj_(scale|bias)", r"proposals.auxiliary.object_\1"),
    (r"rpn_head\.main_head\.anchor_deltas\.(.+)", r"proposals.main.deltas.\1"),
    (r"rpn_head\.aux_head\.anchor_deltas\.(.+)", r"proposals.auxiliary.deltas.\1"),
    (r"rpn_head\.main_head\.objectness_logits\.(.+)", r"proposals.main.feature.\1"),
    (r"rpn_head\.aux_head\.objectness_logits\.(.+)", r"proposals.auxiliary.feature.\1"),
    (r"rpn_head\.main_head\.scales\.(\d+)\.scale", r"proposals.main.scales.\1"),
    (r"rpn_head\.aux_head\.scales\.(\d+)\.scale", r"proposals.auxiliary.scales.\1"),
    (r"roi_head\.bbox_head\.(\d+)\.iof_tau", r"stages.\1.attention.iof_tau"),
    (r"roi_head\.bbox_head\.(\d+)\.attention\.attn\.in_proj_(.+)", r"stages.\1.attention.in_proj.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.attention\.attn\.out_proj\.(.+)", r"stages.\1.attention.out_proj.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.attention_norm\.(.+)", r"stages.\1.attention_norm.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.sampling_n_mixing\.sampling_offset_generator\.0\.(.+)", r"stages.\1.offsets.\2"),
    (
        r"roi_head\.bbox_head\.(\d+)\.sampling_n_mixing\.adaptive_mixing\.parameter_generator\.0\.(.+)",
        r"stages.\1.mixing.parameters_of.\2",
    ),
    (r"roi_head\.bbox_head\.(\d+)\.sampling_n_mixing\.adaptive_mixing\.out_proj\.(.+)", r"stages.\1.mixing.out.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.sampling_n_mixing\.norm\.(.+)", r"stages.\1.mixing_norm.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"stages.\1.feedforward.0.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.ffn\.layers\.1\.(.+)", r"stages.\1.feedforward.2.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.ffn_norm\.(.+)", r"stages.\1.feedforward_norm.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.cls_fcs\.([01])\.(.+)", r"stages.\1.class_feature.\2.\3"),
    (r"roi_head\.bbox_head\.(\d+)\.fc_cls\.(.+)", r"stages.\1.class_feature.2.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.reg_fcs\.(\d+)\.(.+)", r"stages.\1.deltas.\2.\3"),
    (r"roi_head\.bbox_head\.(\d+)\.fc_reg\.(.+)", r"stages.\1.deltas.9.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.objness\.(.+)", r"stages.\1.objectness.\2"),
    (r"roi_head\.visual2text\.layers\.0\.(.+)", r"adapters.visual_to_text.0.\1"),
    (r"roi_head\.visual2text\.layers\.1\.(.+)", r"adapters.visual_to_text.2.\1"),
    (r"roi_head\.visual2text\.layers\.2\.(.+)", r"adapters.visual_to_text.4.\1"),
    (r"roi_head\.fc1\.(.+)", r"adapters.transfer.0.\1"),
    (r"roi_head\.fc2\.(.+)", r"adapters.transfer.2.\1"),
)

PUBLISHED = {
    "faster_rcnn": Published(
        "ov-coco-faster-rcnn-r50",
        ("detector.rpn.rules=authors",),
        _BOTH + _FASTER_RCNN,
        {r".*num_batches_tracked": "frozen batch norms count no batches"},
        {r".*_queue\.rows": "memories of the alignment losses, which begin empty"},
    ),
    "adamixer": Published(
        "ov-coco-adamixer-r50",
        (),
        _BOTH + _ADAMIXER,
        {},
        {  # patterns of our names
            r"instance_level\.(student|teacher)_queues\.\d+\.rows|image_level\.(student|teacher)_queue\.rows": "memories of the alignment losses, which begin empty",  # noqa: E501
            r"text_level\.(centroids|updates)": "moving means of the classes' centroids, which begin as the classes' "
            "texts",
            r"object_text": 'the text embedding of "object", which is a file of its own',
        },
    ),
}
