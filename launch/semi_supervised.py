"""Labelled and unlabelled images of different domains in one batch: split batch norm's first use.

A batch is laid out [labelled | unlabelled]. With `--norm split` each part has batch norms of its
own, over all ranks, so that the unlabelled domain does not spoil the statistics of the labelled
one, which the test images have. `python -m launch.semi_supervised --help` says how.
"""

import argparse
import contextlib
import copy
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset, Subset, default_collate

from sync_splitbn import (
    assign_splits,
    convert_sync_split_batchnorm,
    frozen_stats,
    split_divergence,
)

from .images.labelled import FirstView, LabelledAndUnlabelled, divide
from .images.sets import ImageSets, count_channels, count_classes, load_images
from .images.shift import Shift, Shifted
from .recipe.comparison import Results, compare, mean_and_error
from .recipe.consistency import divergence_loss, pseudo_label_loss, virtual_adversary
from .recipe.evaluation import evaluate
from .recipe.loading import test_loader, training_loader
from .recipe.models import build_model
from .recipe.optimization import create_ema, create_optimizer, create_schedule
from .recipe.options import (
    add_augmentation_options,
    add_data_options,
    add_optimization_options,
    add_run_options,
)
from .recipe.parser import Parser
from .recipe.report import draw_accuracy, draw_loss, new_figure
from .recipe.run import Recipe, run_safely
from .recipe.trainer import Task

NORMS = {
    "joint": "all rows share statistics",
    "split": "labelled and unlabelled rows have statistics and parameters of their own",
    "split-shared-affine": "statistics of their own, shared parameters",
    "labelled-only-test": "joint, but tested with statistics of the labelled images alone",
    "separate-calls": "joint layers, called for labelled and unlabelled rows one after the other",
}
COLUMNS = (
    ("test_loss", "test loss", "9.4f"),
    ("test_accuracy", "test accuracy", "13.2%"),
    ("divergence", "divergence", "10.4f"),
)


def loss_of_batch(
    options: argparse.Namespace, accelerator: Accelerator, model: nn.Module, batch: Any
) -> Tensor:
    """Return the loss of one step: labelled rows by their labels, unlabelled ones by the method."""
    labelled, labels, unlabelled = batch
    # [B, mu, V, C, H, W]: the weak view, and what fixmatch trains on.
    weak, strong = (view.flatten(0, 1) for view in (unlabelled[:, :, 0], unlabelled[:, :, -1]))
    # Forward passes beside the training one: no gradients to average, so not through DDP.
    inner = accelerator.unwrap_model(model)

    def predict(rows: Tensor) -> Tensor:
        """Return logits by the statistics of these unlabelled rows, which are not remembered."""
        with frozen_stats(inner), _only_unlabelled(inner):
            return inner(rows)

    targets = None
    if options.method == "vat" or options.targets == "frozen":
        with torch.no_grad():
            targets = predict(weak)
    trained = strong
    if options.method == "vat":
        trained = virtual_adversary(
            predict, weak, targets, epsilon=options.vat_epsilon, xi=options.vat_xi
        )
    elif options.method == "fixmatch" and targets is None:
        trained = torch.cat([weak, strong])

    logits, others = forward(model, labelled, trained, options.norm)
    supervised = F.cross_entropy(logits.float(), labels, label_smoothing=options.smoothing)
    if options.method == "vat":
        return supervised + options.unlabelled_weight * divergence_loss(others, targets)
    if targets is None:
        targets, others = others.chunk(2) if options.method == "fixmatch" else (others, others)
    unsupervised = pseudo_label_loss(others, targets, options.threshold)
    return supervised + options.unlabelled_weight * unsupervised


def forward(
    model: nn.Module, labelled: Tensor, unlabelled: Tensor, norm: str
) -> tuple[Tensor, Tensor]:
    """Return the logits of labelled and unlabelled rows, normalized as `norm` says."""
    if norm == "separate-calls":
        return model(labelled), model(unlabelled)
    sizes = (len(labelled), len(unlabelled))
    is_split = norm.startswith("split")
    with assign_splits(model, sizes=sizes) if is_split else contextlib.nullcontext():
        logits = model(torch.cat([labelled, unlabelled]))
    return logits.split(sizes)


@contextlib.contextmanager
def _only_unlabelled(model: nn.Module) -> Iterator[None]:
    """Send all rows through the last split: the unlabelled one, or the only one."""
    last = max(getattr(module, "num_splits", 1) for module in model.modules()) - 1
    with assign_splits(model, only=last):
        yield


def prepare(options: argparse.Namespace, accelerator: Accelerator) -> Task:
    """Return data, model, optimizer and schedule: build, load, convert, optimizer, prepare."""
    model = build_model(
        options, num_classes=count_classes(options), in_channels=count_channels(options)
    )
    model = convert_sync_split_batchnorm(
        model,
        2 if options.norm.startswith("split") else 1,
        share_affine=options.norm == "split-shared-affine",
    )
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    model = model.to(accelerator.device, memory_format=memory_format)
    optimizer = create_optimizer(options, model, ranks=accelerator.num_processes)
    ema = create_ema(options, model)

    images = load_images(options, model)
    dataset = training_set(options, images)
    probe = default_collate([dataset[i] for i in range(min(_PROBED, len(dataset)))])
    if options.torchcompile:
        model.compile(backend=options.torchcompile)
    model, optimizer, loader, tests, labelled = accelerator.prepare(
        model,
        optimizer,
        training_loader(options, accelerator, dataset),
        test_loader(options, accelerator, images_of_known_classes(options, images)),
        test_loader(options, accelerator, FirstView(dataset.labelled)),
    )
    schedule = create_schedule(options, optimizer.optimizer, steps=len(loader))
    set_seed(options.seed, device_specific=True)

    def metrics(model: nn.Module) -> dict[str, Any]:
        tested = model if ema is None else ema.module
        if options.norm == "labelled-only-test":
            tested = copy.deepcopy(tested)
            update_bn(labelled, tested, accelerator.device)
        split = 0 if options.norm.startswith("split") else None
        loss, accuracy = evaluate(accelerator, tested, tests, split=split)
        by_layer = divergence_by_layer(model, probe, accelerator.device)
        return {
            "test_loss": loss,
            "test_accuracy": accuracy,
            "divergence": sum(by_layer.values()) / len(by_layer),
            "divergences": by_layer,
        }

    return Task(
        model=model,
        loss=functools.partial(loss_of_batch, options, accelerator),
        evaluate=metrics,
        loader=loader,
        set_epoch=dataset.set_epoch,
        optimizer=optimizer,
        schedule=schedule,
        clip_grad=options.clip_grad,
        ema=ema,
    )


def training_set(options: argparse.Namespace, images: ImageSets) -> LabelledAndUnlabelled:
    """Return the items of an epoch: labelled images as they are, unlabelled ones shifted."""
    labelled, unlabelled = divide(
        images.train.targets,
        options.labelled,
        missing_classes=options.missing_classes,
        seed=options.seed,
    )
    shift = Shift(
        invert=options.invert,
        contrast=options.contrast,
        blur=options.blur,
        salt_and_pepper=options.salt_and_pepper,
    )
    views = [Shifted(shift, images.clean)]
    if options.method == "fixmatch":
        views.append(Shifted(shift, images.augmented))
    return LabelledAndUnlabelled(
        images.train,
        labelled,
        unlabelled,
        mu=options.mu,
        labelled_view=images.clean,
        unlabelled_views=views,
        seed=options.seed,
    )


def images_of_known_classes(options: argparse.Namespace, images: ImageSets) -> Dataset[Any]:
    """Return the test images whose class has labelled images."""
    known = max(images.train.targets) + 1 - options.missing_classes
    return Subset(images.test, [i for i, c in enumerate(images.test_targets) if c < known])


def divergence_by_layer(model: nn.Module, probe: Any, device: torch.device) -> dict[str, float]:
    """Return how far the two parts of a batch are apart where they enter each batch norm, in nats.

    Communication:
        All ranks call it: the forward pass is one of training, with statistics over all ranks.
    """
    labelled, _, unlabelled = probe
    rows = torch.cat([labelled, unlabelled[:, :, 0].flatten(0, 1)]).to(device)
    sizes = (len(labelled), len(rows) - len(labelled))
    splits = max(getattr(module, "num_splits", 1) for module in model.modules())
    with assign_splits(model, sizes=sizes) if splits > 1 else contextlib.nullcontext():
        found = split_divergence(model, rows, sizes=sizes)
    return {layer: pairs[0, 1] for layer, pairs in found.items()}


def draw(results: dict[str, Any]) -> Figure:
    """Draw loss, accuracy and the divergence over depth of one run."""
    figure, axes = new_figure(3, _title(results))
    draw_loss(axes[0], results, {"test_loss": "test images"})
    draw_accuracy(axes[1], results, {"test_accuracy": "test images"})
    _draw_depth(axes[2], {results["arguments"]["norm"]: [results]})
    return figure


def draw_comparison(results: Results) -> Figure:
    """Draw accuracy by normalization, and how far the two domains are apart, by depth and time."""
    first = next(iter(results.values()))[0]
    figure, axes = new_figure(3, _title(first))
    for number, (norm, runs) in enumerate(results.items()):
        accuracies = [run["epochs"][-1]["test_accuracy"] for run in runs]
        mean, error = mean_and_error(accuracies)
        axes[0].bar(number, mean, yerr=error, color=f"C{number}", alpha=0.6, capsize=4)
        axes[0].plot([number] * len(runs), accuracies, "k.", markersize=4)
        axes[0].annotate(f"{mean:.1%}", (number, 0.02), ha="center")
        epochs = [row["epoch"] for row in runs[0]["epochs"]]
        over_time = [
            sum(run["epochs"][i]["divergence"] for run in runs) / len(runs)
            for i in range(len(epochs))
        ]
        axes[2].plot(epochs, over_time, marker=".", color=f"C{number}", label=norm)
    axes[0].set_xticks(range(len(results)), [norm.replace("-", "-\n") for norm in results])
    axes[0].set(title="test accuracy, standard error over seeds", ylim=(0, 1))
    axes[0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _draw_depth(axes[1], results)
    axes[2].set(title="mean over layers, by epoch", xlabel="epoch", yscale="log")
    axes[2].set_ylabel("symmetric KL divergence (nats)")
    axes[2].legend(frameon=False)
    return figure


def _draw_depth(axes: Any, results: Results) -> None:
    """Draw the divergence at the end of training by layer, the mean over seeds."""
    for number, (norm, runs) in enumerate(results.items()):
        by_run = [[*run["epochs"][-1]["divergences"].values()] for run in runs]
        means = [sum(values) / len(values) for values in zip(*by_run, strict=True)]
        axes.plot(range(1, len(means) + 1), means, marker="o", color=f"C{number}", label=norm)
    axes.set(title="labelled and unlabelled statistics apart", yscale="log")
    axes.set(xlabel="batch norm layer, input to output", ylabel="symmetric KL divergence (nats)")
    axes.legend(frameon=False)


def _title(results: dict[str, Any]) -> str:
    options = results["arguments"]
    shifts = [
        f"{name.replace('_', ' ')} {options[name]}"
        for name, none in (("salt_and_pepper", 0), ("contrast", 1), ("blur", 0))
        if options[name] != none
    ]
    shifts = (["inverted"] if options["invert"] else []) + shifts
    return (
        f"{options['method']}, {options['labelled']} labelled images, unlabelled ones "
        f"{', '.join(shifts) or 'not shifted'}, {results['ranks']} x {results['device']}"
    )


def conclude(results: dict[str, Any]) -> str:
    """Return the test accuracy in a sentence."""
    last = results["epochs"][-1]
    norm = results["arguments"]["norm"]
    return f"test accuracy {last['test_accuracy']:.2%} with {norm} batch norms"


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says, and return the exit code."""
    options = parse_arguments(arguments)
    body = functools.partial(
        compare,
        Recipe(COLUMNS, prepare, draw, conclude),
        {norm: {"norm": norm} for norm in options.norm},
        options.seeds,
        draw_comparison,
        ["test_accuracy"],
    )
    return run_safely(body, options)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or exit with a message that says what must hold."""
    parser = Parser(
        "launch.semi_supervised",
        "Train on a few labelled images and many unlabelled ones from another domain, and compare "
        "ways to normalize the mixed batch.",
        digits=_DIGITS,
    )
    add_data_options(parser)
    _add_method_options(parser)
    _add_shift_options(parser)
    add_optimization_options(
        parser, "--batch-labelled", "labelled images in a batch of each rank; unlabelled: --mu"
    )
    add_run_options(parser)
    options = parser.parse(arguments)
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(options, name) <= high:
            parser.refuse(name, f"must be in [{low}, {high}], got {getattr(options, name)}")
    return options


_PROBED = 32
_DIGITS = {"epochs": 8, "batch_size": 16, "warmup_epochs": 1.0, "lr": 0.05}
_RANGES = {
    "labelled": (1, 10**9),
    "mu": (1, 10**4),
    "seeds": (1, 1000),
    "missing_classes": (0, 10**6),
    "threshold": (0, 1),
    "unlabelled_weight": (0, 1e6),
    "vat_epsilon": (0, 1e6),
    "vat_xi": (1e-12, 1e6),
    "salt_and_pepper": (0, 1),
    "contrast": (0, 1e3),
    "blur": (0, 1e3),
}


def _add_method_options(parser: Parser) -> None:
    group = parser.add_argument_group("labelled and unlabelled images")
    group.add_argument(
        "--norm",
        nargs="+",
        choices=NORMS,
        default=["joint", "split"],
        metavar="NORM",
        help="one or several to compare: "
        + "; ".join(f"{name} ({what})" for name, what in NORMS.items()),
    )
    group.add_argument(
        "--method",
        choices=("pseudo-label", "fixmatch", "vat"),
        default="pseudo-label",
        help="what unlabelled rows are trained on: their own most likely class, that of a weak "
        "view (with --aa for the strong one), or robustness to a virtual adversary",
    )
    group.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each NORM")
    group.add_argument(
        "--labelled", type=int, default=100, metavar="N", help="labelled images, alike a class"
    )
    group.add_argument(
        "--mu", type=int, default=4, metavar="N", help="unlabelled images for each labelled one"
    )
    group.add_argument(
        "--targets",
        choices=("frozen", "same"),
        default="frozen",
        help="where pseudo-labels come from: a forward pass of the unlabelled rows before, which "
        "running statistics do not remember, or the training pass itself",
    )
    group.add_argument(
        "--threshold", type=float, default=0.95, help="least probability of a pseudo-label"
    )
    group.add_argument(
        "--unlabelled-weight", type=float, default=1.0, metavar="W", help="of the unlabelled loss"
    )
    group.add_argument(
        "--vat-epsilon", type=float, default=2.5, metavar="L", help="length of the adversary's step"
    )
    group.add_argument(
        "--vat-xi", type=float, default=1e-2, metavar="L", help="length of its trial step"
    )
    add_augmentation_options(parser, group)


def _add_shift_options(parser: Parser) -> None:
    group = parser.add_argument_group("shift of the unlabelled images")
    group.add_argument(
        "--salt-and-pepper",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the pixels that become black or white",
    )
    group.add_argument("--invert", action="store_true", help="black becomes white")
    group.add_argument(
        "--contrast", type=float, default=1.0, metavar="FACTOR", help="1 leaves the image"
    )
    group.add_argument(
        "--blur", type=float, default=0.0, metavar="RADIUS", help="of a Gaussian, in pixels"
    )
    group.add_argument(
        "--missing-classes",
        type=int,
        default=0,
        metavar="N",
        help="last classes that the labelled images lack, which are not tested either",
    )


if __name__ == "__main__":
    sys.exit(main())
