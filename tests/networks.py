"""A tiny network with one batch norm, and its logits by plain functions."""

import torch
from torch import nn
from torch.nn import functional as F

from sync_splitbn import convert_sync_split_batchnorm


class Net(nn.Module):
    """A convolution, a batch norm, and a linear head over the mean of all positions."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn, self.head = (
            nn.Conv2d(channels, 4, 3),
            nn.BatchNorm2d(4),
            nn.Linear(4, 3),
        )

    def forward(self, images):
        return self.head(self.bn(self.conv(images)).relu().mean(dim=(2, 3)))


def network(splits, channels):
    """The network in float64 and in training, converted, with random parameters."""
    torch.manual_seed(0)
    model = convert_sync_split_batchnorm(Net(channels).double(), splits).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def logits_by(model, split, rows):
    """Logits by the batch statistics of these rows and the parameters of a split."""
    stats = [model.bn, *model.bn.aux_bn][split]
    hidden = F.conv2d(rows, model.conv.weight, model.conv.bias)
    mean = hidden.mean(dim=(0, 2, 3), keepdim=True)
    var = (hidden - mean).square().mean(dim=(0, 2, 3), keepdim=True)
    shape = (1, -1, 1, 1)
    hidden = (hidden - mean) / (var + 1e-5).sqrt() * stats.weight.view(shape)
    hidden = (hidden + stats.bias.view(shape)).relu().mean(dim=(2, 3))
    return F.linear(hidden, model.head.weight, model.head.bias)
