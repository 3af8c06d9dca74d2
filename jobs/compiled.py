"""torch.compile, where it pays: the backbone, whose shapes follow from the batch's size alone."""

from __future__ import annotations

import os
import shutil

from mrcnn.model import MaskRCNN

COMPILERS = ("g++", "c++", "clang++", "gcc", "cc")


def compile_backbones(model: MaskRCNN) -> None:
    """Compile the model's backbones at their first use; names of weights stay the same.

    Whatever the size of images, one compilation serves. Raises ValueError where there is no C++ compiler, which
    torch.compile needs on CPUs and GPUs both.
    """
    given = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([given] if given else COMPILERS)):
        raise ValueError(
            f"compile is True, but there is no C++ compiler ({given or ', '.join(COMPILERS)}): install g++, name "
            "another one by CXX, or leave --compile out"
        )
    for backbone in (model.backbone, model.rpn_backbone):
        if backbone is not None:
            backbone.compile(dynamic=True)
