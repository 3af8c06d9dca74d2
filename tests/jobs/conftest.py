"""A model and a batch small enough for a training step in a test."""

from __future__ import annotations

import pytest
import torch
from models import batch_of
from models import small_model as make_model

from mrcnn import MaskRCNN
from mrcnn.structures import ImageBatch, Targets


@pytest.fixture
def small_model() -> MaskRCNN:
    return make_model()


@pytest.fixture
def small_batch() -> tuple[ImageBatch, Targets]:
    torch.manual_seed(0)
    return batch_of([[[10, 10, 60, 70], [50, 20, 110, 60]], [[5, 30, 40, 90]]])
