"""Our inference against numbers computed with torchvision and detectron2 from the same weights and images.

By default one image of each model, and one batch (drills, where they are slow); MRCNN_ORACLE_FULL=1 takes all that the
oracles hold.
"""

from collections.abc import Iterable

import oracle
import oracle_eval
import pytest
from oracle_eval import Difference

FIRST = {
    "tv_maskrcnn_r50_fpn": "17627",
    "tv_keypointrcnn_r50_fpn": "87038",
    "d2_mask_R_50_FPN": "6818",
    "d2_mask_R_50_C4": "37777",
    "d2_mask_R_101_FPN": "17627",
    "d2_mask_X_101_FPN": "37777",
    "d2_keypoint_R_50_FPN": "87038",
}

SLOWEST = ("d2_mask_R_50_C4", "d2_mask_X_101_FPN", "d2_keypoint_R_50_FPN")


def check(differences: Iterable[Difference]) -> None:
    found = list(differences)
    assert found
    failed = [str(each) for each in found if not each.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.drill) if name in SLOWEST else name for name in oracle.MODELS]
)
def test_one_image(name: str) -> None:
    arrays, model = oracle.read_npz(f"{name}_eval.npz"), oracle.built(name)
    check(oracle_eval.compare_image(name, model, arrays, FIRST[name], whole=False))


@pytest.mark.drill
def test_images_that_share_a_batch() -> None:
    name = "tv_maskrcnn_r50_fpn"
    arrays, model = oracle.read_npz(f"{name}_eval.npz"), oracle.built(name)
    check(oracle_eval.compare_batch(name, model, arrays, "batch/", list(oracle.IMAGES)))


@pytest.mark.skipif(not oracle.FULL, reason="minutes for each model: set MRCNN_ORACLE_FULL=1")
@pytest.mark.parametrize("name", oracle.MODELS)
def test_everything(name: str) -> None:
    check(oracle_eval.compare_all(name))
