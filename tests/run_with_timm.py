"""Runs a module of `launch` where torchvision's operators do not load beside a CPU torch.

accelerate launch --config_file ... tests/run_with_timm.py launch.train DATA ...
"""

import runpy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import timm_environment  # noqa: E402, F401

if __name__ == "__main__":
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
