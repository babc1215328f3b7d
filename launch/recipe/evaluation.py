"""Loss and accuracy over a test set that all ranks share."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn import functional as F

from sync_splitbn import assign_splits, split_divergence


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Any,
    *,
    split: int | None = None,
    make_input: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[float, float]:
    """Return the mean loss in nats and the accuracy, each test image counted once.

    Args:
        accelerator: which prepared the loader.
        model: without wrappers, on every rank; it is in evaluation only during the call.
        loader: yields images [B, C, H, W] and labels [B].
        split: whose statistics and parameters are used; None for a model without splits.
        make_input: from images and labels to the input of the model, such as an attack.

    Communication:
        Gathers two numbers an image.
    """
    gathered = []
    only = contextlib.nullcontext() if split is None else assign_splits(model, only=split)
    with evaluating(model), only, torch.no_grad():
        for images, labels in loader:
            rows = images if make_input is None else make_input(images, labels)
            with accelerator.autocast():
                logits = model(rows).float()
            losses = F.cross_entropy(logits, labels, reduction="none")
            hits = (logits.argmax(dim=1) == labels).float()
            gathered.append(accelerator.gather_for_metrics(torch.stack([losses, hits], dim=1)))
    seen = torch.cat(gathered)  # [test images, 2]
    if len(seen) != loader.total_dataset_length:
        raise RuntimeError(
            f"every test image must be counted once, got {len(seen)} of "
            f"{loader.total_dataset_length}"
        )
    loss, accuracy = seen.double().mean(dim=0).tolist()
    return loss, accuracy


def share_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all ranks the buffers of the first, which are saved and exported.

    DDP does so before each forward pass, not after the last. Synchronized layers have them in
    common; plain batch norms have those of their rank.

    Communication:
        One broadcast a buffer, on several ranks.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            broadcast(buffer)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and back into the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def divergence_metrics(model: nn.Module) -> dict[str, Any]:
    """Return the divergence between the splits' running statistics, in nats, for a table row.

    `divergence` is the mean over layers and pairs of splits, `divergences` has each of them by
    layer and pair. A model without splits has neither.
    """
    has_splits = any(getattr(module, "num_splits", 1) > 1 for module in model.modules())
    if not has_splits:
        return {}
    by_layer = {
        layer: {f"{i}-{j}": value for (i, j), value in pairs.items()}
        for layer, pairs in split_divergence(model).items()
    }
    values = [value for pairs in by_layer.values() for value in pairs.values()]
    return {"divergence": sum(values) / len(values), "divergences": by_layer}
