"""AdaMixer (arXiv 2203.16507) with distinct queries (2303.12776), as HD-OVD distils into it (2503.10152; METHOD section 11).

Called by the stages train and evaluate like `FasterRCNN`, whose interface it has. A training step waits for the device three times:
for the sides of the pseudo boxes, for the proposals' NMS, and for the costs that queries and boxes are paired by.
N pictures, Q queries, S stages, C channels, D embedding size, K base classes, G boxes of the batch, picture by picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from hdovd.adamixer.adapters import TextAdapters
from hdovd.adamixer.boxes import to_corners, to_xyzr
from hdovd.adamixer.boxes_of_step import StepBoxes, boxes_of_step
from hdovd.adamixer.config import GROUPS_OF_NORM, AdaMixerConfig
from hdovd.adamixer.decoder import DecoderStage
from hdovd.adamixer.instance_level import PAIR_IOU, InstanceLevels
from hdovd.adamixer.matching import pair_candidates, pair_stages, pairing_costs, to_host
from hdovd.adamixer.proposal_loss import auxiliary_losses, main_losses
from hdovd.adamixer.proposals import Candidates, DensePredictions, QueryProposals, positions
from hdovd.adamixer.sampling import SamplingTable
from hdovd.adamixer.stage_losses import Pairs, box_losses, classification_loss, objectness_loss, query_weights
from hdovd.adamixer.text_level import TextLevel
from hdovd.backbone import build_backbone
from hdovd.batching import batch_images, draw_short_sides, padded
from hdovd.config import Recipe
from hdovd.distributed import counts_of_ranks, divisor, gather_rows, rank
from hdovd.errors import HdovdError
from hdovd.extra_losses import ExtraLosses
from hdovd.faster_rcnn import RoIPredictions, Students
from hdovd.levels.imagewise import ImageLevel
from hdovd.losses.classwise import cosine_logits
from hdovd.sampling import keys_of
from hdovd.step_view import StepView
from hdovd.targets import Targets

CANDIDATE_PROBABILITY = 1e-5  # least, and one less it most, in the cost of pairing a candidate; released code
