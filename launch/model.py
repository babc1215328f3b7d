"""A small residual network for small images, with plain batch norms that conversion replaces."""

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: step of the first convolution, in pixels.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, input: Tensor) -> Tensor:
        """Keep the shape but for the channels and the stride."""
        hidden = self.act(self.bn1(self.conv1(input)))
        return self.act(self.bn2(self.conv2(hidden)) + self.shortcut(input))


class SmallResNet(nn.Sequential):
    """A stem, three residual blocks and a linear classifier: nine batch norms.

    Args:
        num_classes: size of the output.
        in_channels: 1 for grey images, 3 for colour.
        width: channels of the first block; the second has twice, the third four times as many.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 24) -> None:
        super().__init__()
        # The stem halves the image: a fifth of the time, and MNIST does not notice.
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.block1 = ResidualBlock(width, width, stride=1)
        self.block2 = ResidualBlock(width, 2 * width, stride=2)
        self.block3 = ResidualBlock(2 * width, 4 * width, stride=2)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes)
        )
