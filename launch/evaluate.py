"""Score a trained model on test images, through the statistics of every split.

`python -m launch.evaluate runs/train` says how well each split of that run does;
`python -m launch.evaluate --help` says how to score other weights, or another folder.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from sync_splitbn import convert_sync_split_batchnorm

from .images.labelled import known_classes
from .images.sets import classes_of, count_channels, load_test_images
from .recipe.errors import RunError
from .recipe.evaluation import evaluate
from .recipe.loading import test_loader
from .recipe.models import build_model, load_state, read_weights
from .recipe.options import add_data_options
from .recipe.parser import Parser
from .recipe.run import leave, run_safely

_AUXILIARY = re.compile(r"(?:^|\.)aux_bn\.(\d+)\.")


# What the folder of a run knows of its model and images.
_REMEMBERED = (
    "data",
    "val_split",
    "train_split",
    "model",
    "num_classes",
    "img_size",
    "crop_pct",
    "mean",
    "std",
    "missing_classes",
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; what the run says of its model and images are the defaults."""
    parser = Parser(
        "launch.evaluate",
        "Score a trained model on test images, split by split.",
        usage="python -m launch.evaluate WEIGHTS [DATA] [options], or by accelerate launch",
    )
    parser.add_argument(
        "weights",
        type=Path,
        metavar="WEIGHTS",
        help="folder of a run or of a checkpoint, which knows its model, or a file of weights with "
        "plain or split batch norms (.safetensors, or of torch.save)",
    )
    add_data_options(parser)
    group = parser.add_argument_group("the test")
    group.add_argument(
        "--eval-split",
        type=int,
        nargs="+",
        metavar="K",
        help="splits whose statistics and parameters are used (default: all)",
    )
    group.add_argument("-b", "--batch-size", type=int, metavar="B", help="images of a rank at once")
    group.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="of the model")
    group.add_argument(
        "--cpu", action="store_true", help="score on the CPU although there is an accelerator"
    )
    # What `start`, `build_model` and the test ask for, and no option says.
    parser.set_defaults(seed=0, timeout=600.0, tracker=None, output=None)
    parser.set_defaults(pretrained=False, initial_checkpoint=None, missing_classes=0)
    saved = _results_of(parser.parse_args(arguments).weights)
    known = saved.get("arguments", {})
    parser.set_defaults(**{name: known[name] for name in _REMEMBERED if name in known})
    parser.set_defaults(classes=saved.get("classes"))
    return parser.parse(arguments)


def _results_of(weights: Path) -> dict[str, Any]:
    """Return what the run to which `weights` belong says of itself, nothing if there is none."""
    for folder in (weights, weights.parent, weights.parent.parent):
        file = folder / "results.json"
        if file.is_file():
            try:
                results: dict[str, Any] = json.loads(file.read_text())
                arguments = results["arguments"]
            except (KeyError, TypeError, ValueError):
                return {}  # of something else
            if arguments.get("data") is not None:
                arguments["data"] = Path(arguments["data"])
            return results
    return {}


def load_model(options: argparse.Namespace) -> tuple[nn.Module, int]:
    """Return the model with its weights, and its number of splits, 1 with plain batch norms.

    Raises:
        RunError: the weights are missing, or of another model.
    """
    file = options.weights
    if file.is_dir():
        names = ("split.safetensors", "plain.safetensors", "model.safetensors")
        found = [file / name for name in names if (file / name).is_file()]
        if not found:
            raise RunError(f"WEIGHTS must hold one of {', '.join(names)}, got {file} without")
        file = found[0]
    state = read_weights(file)
    numbers = [int(match[1]) for key in state if (match := _AUXILIARY.search(key))]
    num_splits = max(numbers, default=-1) + 2
    model = build_model(
        options, num_classes=len(classes_of(options)), in_channels=count_channels(options)
    )
    if num_splits > 1:
        has_own = any(_AUXILIARY.search(key) and key.endswith(".weight") for key in state)
        model = convert_sync_split_batchnorm(model, num_splits, share_affine=not has_own)
    load_state(model, state, file)
    return model, num_splits


def run(options: argparse.Namespace, accelerator: Accelerator) -> int:
    """Print a line for each split."""
    model, num_splits = load_model(options)
    splits = options.eval_split or list(range(num_splits))
    for split in splits:
        if not 0 <= split < num_splits:
            raise RunError(f"--eval-split must be in [0, {num_splits - 1}], got {split}")
    model = model.to(accelerator.device)
    dataset = known_classes(load_test_images(options, model), options.missing_classes)
    loader = accelerator.prepare(test_loader(options, accelerator, dataset))
    accelerator.print(f"{options.weights}: {len(loader.dataset)} test images")
    accelerator.print("split       loss   accuracy")
    for split in splits:
        loss, accuracy = evaluate(
            accelerator, model, loader, split=split if num_splits > 1 else None
        )
        accelerator.print(f"{split:5d}  {loss:9.4f}  {accuracy:9.2%}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Score as the command line says, and return the exit code."""
    return run_safely(run, parse_arguments(arguments))


if __name__ == "__main__":
    leave(main())
