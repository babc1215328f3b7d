"""Makes timm importable beside a CPU build of torch.

The torchvision that belongs to this torch is a CUDA build: its operators do not load beside a CPU
torch, and its import fails at the first of them. Two declarations let the import go through; the
operators themselves are never called here.
"""

import sys

import pytest
import torch

DECLARED = []


def import_torchvision():
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)  # declarations vanish with their library
        import torchvision  # noqa: F401
    except ImportError:
        return


import_torchvision()
timm = pytest.importorskip("timm")
