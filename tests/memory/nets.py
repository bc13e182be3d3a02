"""Small faithful networks of kinds that people bring."""

import torch
import torch.nn.functional as F
from torch import nn


def conv_norm(inputs, outputs, kernel=3, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Bottleneck(nn.Module):
    """As in torchvision: one in-place ReLU, called three times."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        middle = outputs // 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = conv_norm(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self, width=8, depths=(2, 3), classes=5):
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        widths = [width, *(4 * width * 2**i for i in range(len(depths)))]
        self.layers = nn.ModuleList(
            nn.Sequential(Bottleneck(a, b, 1 + (i > 0)), *(Bottleneck(b, b) for _ in range(depth - 1)))
            for i, (a, b, depth) in enumerate(zip(widths, widths[1:], depths, strict=False))
        )
        self.head = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, x):
        size = x.shape[2:]
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return F.interpolate(self.head(x), size, mode="bilinear")


def double(inputs, outputs):
    return nn.Sequential(
        *conv_norm(inputs, outputs),
        nn.ReLU(inplace=True),
        *conv_norm(outputs, outputs),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Skips, and lists of modules that the network calls itself."""

    def __init__(self, width=8, depth=2, classes=5):
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, 2) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.join = nn.ModuleList(double(2 * a, a) for a in widths[-2::-1])
        self.dropout, self.head = nn.Dropout2d(0.2), nn.Conv2d(width, classes, 1)

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        x = self.dropout(skips.pop())
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


class Branches(nn.Module):
    """Two resolutions side by side, exchanged: several inputs, lists as outputs."""

    class Exchange(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.high = nn.Sequential(*(Bottleneck(width, width) for _ in range(2)))
            self.low = nn.Sequential(*(Bottleneck(2 * width, 2 * width) for _ in range(2)))
            self.to_high, self.to_low = conv_norm(2 * width, width, 1), conv_norm(width, 2 * width, 3, 2)

        def forward(self, maps):
            high, low = self.high(maps[0]), self.low(maps[1])
            raised = F.interpolate(self.to_high(low), high.shape[2:], mode="nearest")
            return [F.relu(high + raised), F.relu(low + self.to_low(high))]

    def __init__(self, width=8, depth=2, classes=5):
        super().__init__()
        self.stem, self.split = conv_norm(3, width), conv_norm(width, 2 * width, 3, 2)
        self.stages = nn.ModuleList(Branches.Exchange(width) for _ in range(depth))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        maps = [x, self.split(x)]
        for stage in self.stages:
            maps = stage(maps)
        return self.head(maps[0])


class Transformer(nn.Module):
    def __init__(self, width=16, depth=2, classes=5):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        layer = nn.TransformerEncoderLayer(
            width, 2, 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        maps = self.patches(x)
        tokens = self.encoder(maps.flatten(2).transpose(1, 2))
        scores = self.head(tokens.transpose(1, 2).unflatten(2, maps.shape[2:]))
        return F.interpolate(scores, x.shape[2:], mode="bilinear")


class Decoder(nn.Module):
    """Maps of several sizes raised and joined, before an activation too; dense connections."""

    class Dense(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
            self.conv1 = nn.Conv2d(inputs, 16, 1, bias=False)
            self.norm2, self.relu2 = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(16, outputs, 3, padding=1, bias=False)

        def forward(self, maps):
            x = torch.cat(maps, 1)
            return self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 8, 3, 2), nn.ReLU(inplace=True))
        self.deeper = nn.Sequential(
            *conv_norm(8, 8, 3, 2), nn.ReLU(inplace=True), *conv_norm(8, 8), nn.ReLU()
        )
        self.dense = nn.ModuleList(Decoder.Dense(8 + 8 * i, 8) for i in range(3))
        self.lateral = nn.Conv2d(8, 8, 1)
        self.fuse = nn.Sequential(*conv_norm(40, 16), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, x):
        first = self.stem(x)
        maps = [self.deeper(first)]
        for block in self.dense:
            maps.append(block(maps))
        raised = [
            F.interpolate(each, first.shape[2:], mode="bilinear", align_corners=True) for each in maps[:2]
        ]
        raised += [F.interpolate(each, scale_factor=2) for each in maps[2:]]
        y = self.fuse(torch.cat([self.lateral(first), *raised], dim=1))
        return F.interpolate(self.head(y), x.shape[2:], mode="bilinear")


class Volumes(nn.Module):
    """A residual encoder with instance norm and a decoder with batch norm, in three dimensions."""

    class Residual(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1, self.norm1 = (
                nn.Conv3d(inputs, outputs, 3, stride, 1),
                nn.InstanceNorm3d(outputs, affine=True),
            )
            self.act1, self.conv2 = nn.LeakyReLU(inplace=True), nn.Conv3d(outputs, outputs, 3, padding=1)
            self.norm2, self.act2 = nn.InstanceNorm3d(outputs, affine=True), nn.LeakyReLU(inplace=True)
            self.skip = nn.Sequential(nn.AvgPool3d(stride), nn.Conv3d(inputs, outputs, 1, bias=False))

        def forward(self, x):
            y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
            return self.act2(y + self.skip(x))

    def __init__(self, width=4, classes=5):
        super().__init__()
        self.first = Volumes.Residual(1, width, 1)
        self.second = Volumes.Residual(width, 2 * width, 2)
        self.raised = nn.ConvTranspose3d(2 * width, width, 2, 2)
        row = nn.Conv3d(2 * width, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU(inplace=True)
        self.join, self.head = nn.Sequential(*row), nn.Conv3d(width, classes, 1)

    def forward(self, x):
        first = self.first(x)
        return self.head(self.join(torch.cat([first, self.raised(self.second(first))], 1)))


DOUBLES = ("down.0", "down.1", "down.2", "join.0", "join.1")  # rows of six modules in the U-Net
NETS = {"resnet": ResNet, "u-net": UNet, "branches": Branches, "transformer": Transformer}


def conv_net(depth: int) -> nn.Sequential:
    layers = []
    for _ in range(depth):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.PReLU(8)]
    return nn.Sequential(*layers)
