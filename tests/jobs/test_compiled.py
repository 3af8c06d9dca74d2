"""--compile: the same losses, whatever the size of images, and a word where there is no compiler.

The generated code is left out: to make it takes a C++ compiler minutes. PyTorch's own operators run in its place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import batch_of, small_model
from torch import nn

from jobs.compiled import compile_backbones
from jobs.config import OptimizerConfig, TrainConfig
from jobs.engine import Engine, read_losses
from mrcnn import MaskRCNN

SIZES = ((96, 128), (64, 96), (128, 96))


def losses(model: MaskRCNN) -> torch.Tensor:
    """Of three steps with images of three sizes."""
    config = TrainConfig(model=model.config, optimizer=OptimizerConfig(warmup_steps=3))
    engine = Engine(model, config, torch.device("cpu"))
    boxes = [[[10, 10, 60, 60], [50, 20, 90, 60]], [[5, 30, 40, 60]]]
    return read_losses([engine.train_step(*batch_of(boxes, size=size)) for size in SIZES])


def test_the_losses_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, backend=backend, **how))
    model = small_model()
    names = list(model.state_dict())
    compile_backbones(model)
    torch.testing.assert_close(losses(model), losses(small_model()), rtol=0, atol=1e-4)
    assert list(model.state_dict()) == names
    assert len(graphs) == 1, "the backbone should be one graph, for images of every size"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no C\+\+ compiler \(no-such-compiler\): install g\+\+"):
        compile_backbones(small_model())
