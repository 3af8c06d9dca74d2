"""A training step never waits for the device: no shape and no branch depends on a value.

Without a GPU this is seen in two ways. FakeTensorMode runs the whole forward pass on tensors that say they are on a GPU
and have no values: `.item()`, `nonzero`, boolean indexing and a copy from the host all fail there or show. The
backward pass, which FakeTensorMode cannot run without a device, is watched on the CPU, operator by operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from models import batch_of, with_keypoints
from test_variants import VARIANTS, model_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from watch import Watched


def on_fake_gpu(value: Any) -> Any:
    """A tensor, or a dataclass of tensors, of the same shape on a GPU that is not there."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: on_fake_gpu(getattr(value, f.name)) for f in fields(value)})
    return value


def move_to_fake_gpu(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(on_fake_gpu(parameter), requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, on_fake_gpu(buffer))


@contextmanager
def fake_gpu() -> Iterator[Watched]:
    with FakeTensorMode(), Watched() as watched:
        yield watched


BOXES = [[[10, 10, 60, 70], [50, 20, 110, 60]], [[5, 30, 40, 90]]]


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_need_no_value_on_the_host(name: str) -> None:
    model = model_of(name)
    images, targets = with_keypoints(*batch_of(BOXES), model.config.keypoint.num_keypoints)
    with fake_gpu() as watched:
        move_to_fake_gpu(model)
        losses = model(on_fake_gpu(images), on_fake_gpu(targets))
        assert all(loss.device.type == "cuda" for loss in losses.values())
    assert watched.waits == []


def test_the_watch_sees_what_it_is_for() -> None:
    with fake_gpu() as watched:
        x = torch.ones(4, device="cuda")
        _ = x + torch.ones(4).to("cuda")
        for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0]):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                wait()
    assert watched.waits == ["_to_copy on ['cpu', 'cuda']"]
    x = torch.ones(4)
    with Watched() as watched:
        x.sum().item()
        x[x > 0]
    assert [wait.split()[0] for wait in watched.waits] == ["_local_scalar_dense", "index"]


@pytest.mark.parametrize("name", ["fpn", "c4", "mask and keypoints", "roi precise"])
def test_gradients_need_no_value_on_the_host(name: str) -> None:
    model = model_of(name)
    images, targets = with_keypoints(*batch_of(BOXES), model.config.keypoint.num_keypoints)
    with Watched() as watched:
        torch.stack(list(model(images, targets).values())).sum().backward()
    assert watched.waits == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_on_a_gpu_does_not_wait(name: str) -> None:
    model = model_of(name).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, targets = with_keypoints(*batch_of(BOXES), model.config.keypoint.num_keypoints)
    images, targets = images.to("cuda"), targets.to("cuda")
    for step in range(2):  # the first one may compile and allocate
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            torch.stack(list(model(images, targets).values())).sum().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
