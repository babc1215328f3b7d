"""Adversarial images by projected gradient descent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Attack:
    """Projected gradient descent within a box around each image.

    Args:
        epsilon: largest change of a pixel, in grey values of 0 to 255.
        step_size: change of a pixel in one step, in grey values.
        steps: number of gradient steps; 0 leaves the images as they are, but for a random start.
        random_start: whether the attack starts at a random point of the box.
        targeted: whether it seeks a random other class instead of any but the right one.
        mean: mean of each band with which images are normalized, as a fraction of white.
        std: standard deviation of each band with which images are normalized, likewise.

    Source:
        Madry et al. 2018, arXiv 1706.06083.
    """

    epsilon: float
    step_size: float
    steps: int
    random_start: bool
    targeted: bool
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(
        self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
    ) -> Tensor:
        """Return adversarial images, within epsilon of the given ones and within black and white.

        Gradients of parameters are not touched. Random numbers come from torch's own generators.

        Args:
            forward: from images to logits; it must leave running statistics as they are.
            images: normalized images, [N, C, H, W].
            labels: their classes, [N].

        Communication:
            That of `forward` and its backward pass, once a step: all ranks must attack together.
        """
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        # In units of normalized pixels, band by band.
        epsilon, step = (value / 255 / std for value in (self.epsilon, self.step_size))
        low = torch.maximum(images - epsilon, (0 - mean) / std)
        high = torch.minimum(images + epsilon, (1 - mean) / std)
        attacked = images.detach()
        if self.random_start:
            noise = torch.rand_like(images) * 2 - 1
            attacked = torch.clamp(attacked + epsilon * noise, low, high)
        aims, sign = labels, 1.0
        for number in range(self.steps):
            attacked.requires_grad_()
            with torch.enable_grad():
                logits = forward(attacked).float()
                if self.targeted and number == 0:
                    other = torch.randint(1, logits.shape[1], labels.shape, device=labels.device)
                    aims, sign = (labels + other) % logits.shape[1], -1.0
                loss = F.cross_entropy(logits, aims)
                (gradient,) = torch.autograd.grad(loss, attacked)
            moved = attacked.detach() + sign * step * gradient.sign()
            attacked = torch.clamp(moved, low, high)
        return attacked.detach()
