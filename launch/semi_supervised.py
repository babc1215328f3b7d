"""Labelled and unlabelled images of different domains in one batch: split batch norm's first use.

A batch is laid out [labelled | unlabelled]. With `--norm split` each part has batch norms of its
own, over all ranks, so that the unlabelled domain does not spoil the statistics of the labelled
one, which the test images have. `python -m launch.semi_supervised --help` says how.
"""

import argparse
import contextlib
import copy
import functools
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import default_collate

from sync_splitbn import (
    assign_splits,
    convert_sync_split_batchnorm,
    frozen_stats,
    split_divergence,
)

from .images.labelled import FirstView, LabelledAndUnlabelled, divide, known_classes
from .images.sets import ImageSets, load_images
from .images.shift import Shift, Shifted
from .recipe.comparison import compare
from .recipe.consistency import divergence_loss, pseudo_label_loss, virtual_adversary
from .recipe.evaluation import evaluate
from .recipe.loading import test_loader, training_loader
from .recipe.models import forward_parts
from .recipe.optimization import create_schedule
from .recipe.preparation import prepare_model
from .recipe.run import Recipe, leave, run_safely
from .recipe.semi_supervised_figures import draw_comparison, draw_run
from .recipe.semi_supervised_options import parse_arguments
from .recipe.trainer import Task

# Items of the batch whose divergence is observed.
_PROBED = 32

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
        split = int(options.norm.startswith("split"))
        with frozen_stats(inner), assign_splits(inner, only=split):
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
    logits = forward_parts(model, [labelled, unlabelled], is_split=norm.startswith("split"))
    return logits[: len(labelled)], logits[len(labelled) :]


def prepare(options: argparse.Namespace, accelerator: Accelerator) -> Task:
    """Return data, model, optimizer and schedule: build, load, convert, optimizer, prepare."""
    is_split = options.norm.startswith("split")
    convert = functools.partial(
        convert_sync_split_batchnorm,
        num_splits=2 if is_split else 1,
        share_affine=options.norm == "split-shared-affine",
    )
    model, optimizer, ema = prepare_model(options, accelerator, convert)
    images = load_images(options, model)
    dataset = training_set(options, images)
    # Drawn at random, because a set may be sorted by class.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    probe = default_collate([dataset[i] for i in order[:_PROBED].tolist()])
    model, optimizer, loader, tests, labelled = accelerator.prepare(
        model,
        optimizer,
        training_loader(options, accelerator, dataset),
        test_loader(
            options,
            accelerator,
            known_classes(images.test, options.missing_classes),
        ),
        test_loader(options, accelerator, FirstView(dataset.labelled)),
    )
    schedule = create_schedule(options, optimizer.optimizer, steps=len(loader))
    set_seed(options.seed, device_specific=True)

    def metrics(model: nn.Module) -> dict[str, Any]:
        tested = model if ema is None else ema.module
        if options.norm == "labelled-only-test":
            tested = copy.deepcopy(tested)
            update_bn(labelled, tested, accelerator.device)
        loss, accuracy = evaluate(accelerator, tested, tests, split=0)
        by_layer = divergence_by_layer(
            model,
            probe,
            accelerator.device,
            is_split=is_split,
            is_compiled=options.torchcompile is not None,
        )
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
        classes=images.classes,
        mean=images.mean,
        std=images.std,
        images_per_item=1 + options.mu,
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


def divergence_by_layer(
    model: nn.Module, probe: Any, device: torch.device, *, is_split: bool, is_compiled: bool
) -> dict[str, float]:
    """Return how far the two parts of a batch are apart where they enter each batch norm, in nats.

    Communication:
        All ranks call it: the forward pass is one of training, with statistics over all ranks.
    """
    labelled, _, unlabelled = probe
    rows = torch.cat([labelled, unlabelled[:, :, 0].flatten(0, 1)]).to(device)
    sizes = (len(labelled), len(rows) - len(labelled))
    with contextlib.ExitStack() as stack:
        if is_split:
            stack.enter_context(assign_splits(model, sizes=sizes))
        if is_compiled:
            # For hooks, the model would be traced anew.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        found = split_divergence(model, rows, sizes=sizes)
    return {layer: pairs[0, 1] for layer, pairs in found.items()}


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
        Recipe(COLUMNS, prepare, draw_run, conclude),
        {norm: {"norm": norm} for norm in options.norm},
        options.seeds,
        draw_comparison,
        ["test_accuracy"],
    )
    return run_safely(body, options)


if __name__ == "__main__":
    leave(main())
