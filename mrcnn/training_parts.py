"""Training a part of a model, the RPN or the detector alone, while everything else stays as it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from torch import Tensor, nn

from mrcnn.model import MaskRCNN
from mrcnn.rpn import Proposals
from mrcnn.structures import ImageBatch, Targets

Part = Literal["all", "rpn", "detector"]


class TrainedPart(nn.Module):
    """The losses of one part of a model, and gradients for what learns from them.

    All that does not learn gets no gradient and stays in evaluation mode: its normalisation keeps its statistics.
    Use its `train()`, not the model's, to train on after an evaluation.

    Args:
        model: changed in place, by requires_grad_(False) on what does not learn
        part: whose losses: the RPN's, those of the detector on given proposals, or all of both
        learns: names of the model's modules that learn (backbone, rpn, ...), as far as they are not frozen already
    """

    def __init__(self, model: MaskRCNN, part: Part, learns: Collection[str]) -> None:
        super().__init__()
        names = {name for name, _ in model.named_children()}
        assert names.issuperset(learns), f"{sorted(learns)} are not all among {sorted(names)}"
        self.model, self.part = model, part
        self.fixed = [module for name, module in model.named_children() if name not in learns]
        for module in self.fixed:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> TrainedPart:
        """What does not learn stays in evaluation mode."""
        super().train(mode)
        for module in self.fixed:
            module.eval()
        return self

    def forward(self, images: ImageBatch, targets: Targets, proposals: Proposals | None = None) -> dict[str, Tensor]:
        """The part's losses of a batch, by name as in MaskRCNN.

        Raises ValueError as MaskRCNN does, and for a detector without proposals.
        """
        if self.part == "rpn":
            return self.model.rpn_losses(images, targets)
        if self.part == "detector" and proposals is None:
            raise ValueError("proposals is None, but a detector trained apart needs them: give those of its RPN")
        losses: dict[str, Tensor] = self.model(images, targets, proposals)
        return losses
