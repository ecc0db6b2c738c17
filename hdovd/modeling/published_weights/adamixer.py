"""The names of the authors' published AdaMixer weights (HD-OVD), and ours. Called by `hdovd.modeling.published_weights.names`.

Their code stands on mmdetection. Shapes are the same. Memories of the losses are not in their checkpoints, nor is the text of "object".
"""

from __future__ import annotations

import re

_NAMES = tuple((re.compile(theirs), ours) for theirs, ours in (  # in order
    (r"backbone\.(.+)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(.+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"norms\.(.+)", r"norms.\1"),
    (r"rpn_head\.token_norm\.(.+)", r"proposals.content_norm.\1"),
    (r"rpn_head\.(conv[12])\.conv\.(.+)", r"proposals.trunk.\1.0.\2"),
    (r"rpn_head\.(conv[12])\.gn\.(.+)", r"proposals.trunk.\1.1.\2"),
    (r"rpn_head\.(main|aux)_head\.obj_(scale|bias)", r"proposals.\1.object_\2"),
    (r"rpn_head\.(main|aux)_head\.anchor_deltas\.(.+)", r"proposals.\1.deltas.\2"),
    (r"rpn_head\.(main|aux)_head\.objectness_logits\.(.+)", r"proposals.\1.feature.\2"),
    (r"rpn_head\.(main|aux)_head\.scales\.(\d+)\.scale", r"proposals.\1.scales.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.iof_tau", r"stages.\1.attention.iof_tau"),
    (r"roi_head\.bbox_head\.(\d+)\.attention\.attn\.in_proj_(.+)", r"stages.\1.attention.in_proj.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.attention\.attn\.out_proj\.(.+)", r"stages.\1.attention.out_proj.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.attention_norm\.(.+)", r"stages.\1.attention_norm.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.sampling_n_mixing\.sampling_offset_generator\.0\.(.+)", r"stages.\1.offsets.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.sampling_n_mixing\.adaptive_mixing\.parameter_generator\.0\.(.+)", r"stages.\1.mixing.parameters_of.\2"),
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
    (r"roi_head\.bg_embedding\.weight", r"background"),
    (r"roi_head\.visual2text\.layers\.0\.(.+)", r"adapters.visual_to_text.0.\1"),
    (r"roi_head\.visual2text\.layers\.1\.(.+)", r"adapters.visual_to_text.2.\1"),
    (r"roi_head\.visual2text\.layers\.2\.(.+)", r"adapters.visual_to_text.4.\1"),
    (r"roi_head\.fc1\.(.+)", r"adapters.transfer.0.\1"),
    (r"roi_head\.fc2\.(.+)", r"adapters.transfer.2.\1"),
    (r"roi_head\.layernorm\.(.+)", r"image_level.head.norm.\1"),
    (r"roi_head\.linear_transform\.(.+)", r"image_level.head.project.\1"),
))

NOT_PUBLISHED = {  # patterns of our names -> why their checkpoint has none of it
    r"instance_level\.(student|teacher)_queues\.\d+\.rows|image_level\.(student|teacher)_queue\.rows":
        "memories of the alignment losses, which begin empty",
    r"text_level\.(centroids|updates)": "moving means of the classes' centroids, which begin as the classes' texts",
    r"object_text": "the text embedding of \"object\", which is a file of its own",
}


def own_name(name: str) -> str | None:
    """Our name of a tensor of their AdaMixer, or None if it is not one of it."""
    for theirs, ours in _NAMES:
        if found := theirs.fullmatch(name):
            return found.expand(ours).replace("proposals.aux.", "proposals.auxiliary.")
    return None
