"""What unlabelled rows are trained on: pseudo-labels, and robustness to a virtual adversary."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# As a gradient scaler has it, but small enough for a divergence of many nats.
_SCALE = 2.0**10


def pseudo_label_loss(logits: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Return the cross-entropy with the most likely class of rows that are sure of it.

    Args:
        logits: of the rows that are trained, [N, classes].
        targets: logits of the same images, which are not trained, [N, classes].
        threshold: least probability of a class that is taken for the label, 0 to 1.

    Returns:
        A mean over all N rows, where an unsure one counts 0.

    Source:
        Lee 2013, Pseudo-Label; the threshold after Sohn et al. 2020, arXiv 2001.07685.
    """
    sureness, labels = targets.detach().float().softmax(dim=1).max(dim=1)
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return (losses * (sureness >= threshold)).mean()


def divergence_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean KL divergence of the rows' distributions from those of `targets`, in nats."""
    log_target = targets.detach().float().log_softmax(dim=1)
    log_probs = logits.float().log_softmax(dim=1)
    return F.kl_div(log_probs, log_target, reduction="batchmean", log_target=True)


def virtual_adversary(
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    *,
    epsilon: float,
    xi: float,
    steps: int = 1,
) -> Tensor:
    """Return the images after the small step that changes the output most.

    Args:
        forward: from images to logits; it must leave running statistics as they are.
        images: [N, C, H, W].
        targets: logits of the images, [N, classes].
        epsilon: length of the step for each image, in units of the input.
        xi: length of the trial step whose gradient is taken.
        steps: power iterations.

    Source:
        Miyato et al. 2018, arXiv 1704.03976.
    """
    direction = _unit(torch.randn_like(images))
    for _ in range(steps):
        trial = (xi * direction).requires_grad_()
        with torch.enable_grad():
            divergence = divergence_loss(forward(images + trial), targets)
            # The direction alone counts, and without a factor float16 holds none for sure rows.
            (gradient,) = torch.autograd.grad(_SCALE * len(images) * divergence, trial)
        direction = _unit(gradient)
    return images + epsilon * direction


def _unit(x: Tensor) -> Tensor:
    """Return each row of a batch with length 1."""
    norm = x.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
    return x / norm.view(-1, *(1 for _ in range(x.dim() - 1)))
