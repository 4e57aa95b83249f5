"""FID, sFID, Inception Score, precision and recall as ADM's evaluator defines them, and KID.

A network that was trained to classify ImageNet, Inception v3, turns every image into features. A
measure compares the features of generated images with those of real ones:

    FID         |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))
    sFID        the same, of 7 channels at 17 x 17 places in the middle of the network
    IS          exp mean_x KL(p(y | x) || p(y)), mean over splits of 5,000 images in their order
    precision   share of samples as near to some real image as its third real neighbour is
    recall      the same with the roles changed
    KID         squared MMD with the kernel (x.y / D + 1)^3, mean over random subsets

    images (N, 3, H, W) uint8   feats (N, D) a row an image, of a second set (M, D); D = 2048
    mu (D,) mean   sigma (D, D) covariance   logits (N, K) of K = 1008 classes

Heusel et al., arXiv 1706.08500; Nash et al., 2103.03841; Salimans et al., 1606.03498; Kynkaanniemi
et al., 1904.06991; Binkowski et al., 1801.01401; ADM's script: github.com/openai/guided-diffusion,
evaluations/evaluator.py. The network is TensorFlow's of 2015, as ADM has it, in pytorch-fid's
conversion, fetched on first use. As in ADM its features are those of precision and recall too,
where Kynkaanniemi's are of VGG-16. KID is torch-fidelity's.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 fid.py FOLDER VIRTUAL_imagenet256_labeled.npz --json out.json
    python fid.py REFERENCE_FOLDER --save-stats stats.npz
    python fid.py samples.npz stats.npz --metrics fid sfid

SAMPLES and REFERENCE: .npz with `arr_0` or .npy, (N, H, W, 3) uint8, or a folder or .zip of images,
with all below. As reference also files of statistics: those of --save-stats; ADM's (mu, sigma,
mu_s, sigma_s, and arr_0 for precision and recall); pytorch-fid's, of --resize pytorch-fid.
"""
import argparse
import collections
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import struct
import sys
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# The measures. Each can be used alone, on anybody's features

NOT_FINITE = "features are not finite: look at the images, or at the weights of the network"


def check_finite(*arrays):
    """Raise ValueError where a number is infinite or NaN."""
    for array in arrays:
        if not array.isfinite().all():
            raise ValueError(NOT_FINITE)


class Statistics:
    """Mean and covariance of rows that come in batches: memory does not grow with their number.

    mu = sum x / N      sigma = (sum x x^T - N mu mu^T) / (N - 1)
    """

    def __init__(self, dim, device="cpu"):
        # float64, since sigma is a small difference of large sums
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.products = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, feats):
        """Add feats (N, D)."""
        feats = feats.double()
        self.count += len(feats)
        self.sum += feats.sum(0)                                    # (D,)
        self.products.addmm_(feats.T, feats)                        # (D, D)

    def moments(self):
        """float64 mu (D,) and sigma (D, D). Raises ValueError for N < 2 or NaN features."""
        if self.count < 2:
            raise ValueError(f"{int(self.count)} images: mean and covariance need at least 2")
        mu = self.sum / self.count                                  # (D,)
        sigma = (self.products - self.count * mu.outer(mu)) / (self.count - 1)  # (D, D)
        check_finite(sigma)
        return mu.cpu().numpy(), sigma.cpu().numpy()


def feature_statistics(feats):
    """feats (N, D) -> float64 mu (D,) and sigma (D, D), denominator N - 1.

    Raises ValueError for N < 2 or NaN features.
    """
    feats = torch.as_tensor(feats)
    if feats.ndim != 2:
        raise ValueError(f"features have shape {tuple(feats.shape)}: want (N, D), one row an image")
    statistics = Statistics(feats.shape[1], feats.device)
    statistics.update(feats)
    return statistics.moments()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """FID: the squared Frechet distance of two Gaussians, finite and never negative.

    mu (D,), sigma (D, D). Raises ValueError for other shapes, and for NaN.
    """
    mu1, mu2, sigma1, sigma2 = (
        torch.as_tensor(a, dtype=torch.float64) for a in (mu1, mu2, sigma1, sigma2))
    dim = mu1.numel()
    if not (mu1.shape == mu2.shape == (dim,) and sigma1.shape == sigma2.shape == (dim, dim)):
        shapes = ", ".join(str(tuple(a.shape)) for a in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"statistics of shapes {shapes} do not go together: "
                         "want (D,), (D, D) twice")
    check_finite(mu1, sigma1, mu2, sigma2)

    def factor(sigma):
        """A (D, rank) with sigma = A A^T."""
        values, vectors = torch.linalg.eigh(sigma)                  # (D,), (D, D)
        rounding = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
        kept = values > rounding
        return vectors[:, kept] * values[kept].sqrt()               # (D, rank)

    # Textbook: cross = scipy.linalg.sqrtm(sigma1 @ sigma2).trace(). But the product is not
    # symmetric, so that the root may come out complex, and with fewer images than dimensions the
    # zeros among its eigenvalues come out as noise. With sigma1 = A A^T and sigma2 = B B^T the
    # eigenvalues of the root are the singular values of A^T B: 5.8 s for 2048 dimensions on one CPU
    # core, where sqrtm took 13.
    cross = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(distance.item(), 0.0)


SPLIT_SIZE = 5000                                                   # ADM's


def inception_score(logits, split_size=SPLIT_SIZE):
    """Inception Score of logits (N, K), without bias as ADM's: the mean over splits in their order.

    So images that are sorted by class score otherwise than shuffled ones. A short last split counts
    as one. Raises ValueError for NaN logits, and for none.
    """
    logits = torch.as_tensor(logits)
    if len(logits) == 0:
        raise ValueError("0 images: the Inception Score needs at least 1")
    check_finite(logits)
    scores = []
    for split in logits.split(split_size):                          # (split_size, K)
        log_p = split.double().log_softmax(dim=1)                   # p(y | x): (split_size, K)
        p = log_p.exp()                                             # (split_size, K)
        marginal = p.mean(dim=0)                                    # p(y): (K,)
        # KL = sum_y p(y | x) (log p(y | x) - log p(y)), and its mean over x
        kl = (p * log_p).sum(dim=1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(kl.exp().item())
    return float(np.mean(scores))


def precision_recall(reference, samples, k=3, rows=1000):
    """(precision, recall) of feats samples (N, D) against reference (M, D).

    Around every image lies a ball that reaches to its k-th neighbour in its own set. Precision is
    the share of samples in some ball of the reference, recall that of the reference in some ball
    of the samples. Distances are made of `rows` images to all at a time, in the type of the
    features. Raises ValueError for sets of k images or fewer, and for NaN features.
    """
    reference = torch.as_tensor(reference)
    samples = torch.as_tensor(samples)
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} images a set")
    check_finite(reference, samples)
    centre = reference.mean(0)                                      # smaller numbers round less
    reference = reference - centre                                  # (M, D)
    samples = samples - centre                                      # (N, D)

    def radii(feats):
        nearest = []
        for block in feats.split(rows):                             # (rows, D)
            distances = torch.cdist(block, feats)                   # (rows, N)
            nearest.append(distances.topk(k + 1, largest=False).values)  # the image itself, and k
        return torch.cat(nearest)[:, -1]                            # (N,)

    around_reference = radii(reference)                             # (M,)
    around_samples = radii(samples)                                 # (N,)
    precise = []
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for block, radius in zip(samples.split(rows), around_samples.split(rows)):
        distances = torch.cdist(block, reference)                   # (rows, M)
        precise.append((distances <= around_reference).any(dim=1))  # (rows,)
        recalled |= (distances <= radius[:, None]).any(dim=0)       # (M,)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


def kid(feats1, feats2, subsets=100, subset_size=1000, seed=2020):
    """Kernel Inception Distance of feats (N, D), (M, D): mean and deviation of unbiased MMD^2.

    The random subsets are torch-fidelity's of the same seed. Raises ValueError where a set has
    fewer than subset_size rows, and for NaN features.
    """
    feats1 = torch.as_tensor(feats1)
    feats2 = torch.as_tensor(feats2)
    if min(len(feats1), len(feats2)) < subset_size:
        raise ValueError(f"{len(feats1)} and {len(feats2)} images: KID wants at least its subset "
                         f"of {subset_size}")
    check_finite(feats1, feats2)
    rng = np.random.RandomState(seed)

    def subset(feats):
        chosen = torch.from_numpy(rng.choice(len(feats), subset_size, replace=False))
        return feats[chosen.to(feats.device)].double()              # (subset_size, D)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3                      # (subset_size, subset_size)

    def pairs(x):                                                   # sum of k(x, x'), x' not x
        k = kernel(x, x)                                            # (subset_size, subset_size)
        return k.sum() - k.trace()

    values = []
    for _ in range(subsets):
        x = subset(feats1)                                          # (subset_size, D)
        y = subset(feats2)                                          # (subset_size, D)
        # MMD^2 = mean of k(x, x') + mean of k(y, y') - 2 mean of k(x, y)
        within = (pairs(x) + pairs(y)) / (subset_size * (subset_size - 1))
        values.append((within - 2 * kernel(x, y).mean()).item())
    return float(np.mean(values)), float(np.std(values))


# --------------------------------------------------------------------------------------------------
# Inception v3 with the weights of 2015: names as in pytorch-fid's file

class BasicConv2d(nn.Module):
    """Convolution, batch norm, ReLU; with pool, the mean of 3 x 3 places before them."""

    def __init__(self, in_channels, out_channels, kernel_size, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def fold(self):
        """Put the batch norm into the convolution: w' = w s, b' = bias - mean s,
        s = weight / sqrt(var + eps)."""
        scale = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)
        self.conv.weight.data *= scale.view(-1, 1, 1, 1)
        self.conv.bias = nn.Parameter((self.bn.bias - self.bn.running_mean * scale).detach())
        self.bn = nn.Identity()

    def forward(self, x, pool=False):                               # (N, in_channels, H, W)
        x = self.bn(self.conv(x))                                   # (N, out_channels, h, w)
        # Textbook: the mean stands before the convolution. With one of 1 x 1 it commutes, and here
        # channels are fewer: the network is 4 % faster. TensorFlow's mean leaves the padding out.
        if pool:
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)  # the same shape
        return F.relu(x, inplace=True)                              # (N, out_channels, h, w)


class InceptionA(nn.Module):
    """1 x 1, 5 x 5, twice 3 x 3, and the mean of 3 x 3, side by side."""

    def __init__(self, in_channels, pool_features):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(in_channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(in_channels, pool_features, 1)

    def forward(self, x):                                           # (N, in_channels, 35, 35)
        branch5x5 = self.branch5x5_1(x)                             # (N, 48, 35, 35)
        branch3x3 = self.branch3x3dbl_2(self.branch3x3dbl_1(x))     # (N, 96, 35, 35)
        return torch.cat([
            self.branch1x1(x),                                      # (N, 64, 35, 35)
            self.branch5x5_2(branch5x5),                            # (N, 64, 35, 35)
            self.branch3x3dbl_3(branch3x3),                         # (N, 96, 35, 35)
            self.branch_pool(x, pool=True),                         # (N, pool_features, 35, 35)
        ], dim=1)                                                 # (N, 224 + pool_features, 35, 35)


class InceptionB(nn.Module):
    """3 x 3, twice 3 x 3, and the maximum of 3 x 3, at every second place."""

    def __init__(self, in_channels):
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x):                                           # (N, in_channels, 35, 35)
        branch3x3 = self.branch3x3dbl_2(self.branch3x3dbl_1(x))     # (N, 96, 35, 35)
        return torch.cat([
            self.branch3x3(x),                                      # (N, 384, 17, 17)
            self.branch3x3dbl_3(branch3x3),                         # (N, 96, 17, 17)
            F.max_pool2d(x, 3, stride=2),                           # (N, in_channels, 17, 17)
        ], dim=1)                                                   # (N, 480 + in_channels, 17, 17)


class InceptionC(nn.Module):
    """1 x 1, 7 x 7 and twice 7 x 7 as rows and columns, and the mean of 3 x 3."""

    def __init__(self, in_channels, width):
        super().__init__()
        row = dict(kernel_size=(1, 7), padding=(0, 3))
        column = dict(kernel_size=(7, 1), padding=(3, 0))
        self.branch1x1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7_1 = BasicConv2d(in_channels, width, 1)
        self.branch7x7_2 = BasicConv2d(width, width, **row)
        self.branch7x7_3 = BasicConv2d(width, 192, **column)
        self.branch7x7dbl_1 = BasicConv2d(in_channels, width, 1)
        self.branch7x7dbl_2 = BasicConv2d(width, width, **column)
        self.branch7x7dbl_3 = BasicConv2d(width, width, **row)
        self.branch7x7dbl_4 = BasicConv2d(width, width, **column)
        self.branch7x7dbl_5 = BasicConv2d(width, 192, **row)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, x):                                           # (N, 768, 17, 17)
        single = self.branch7x7_2(self.branch7x7_1(x))              # (N, width, 17, 17)
        double = self.branch7x7dbl_2(self.branch7x7dbl_1(x))        # (N, width, 17, 17)
        double = self.branch7x7dbl_4(self.branch7x7dbl_3(double))   # (N, width, 17, 17)
        return torch.cat([
            self.branch1x1(x),                                      # (N, 192, 17, 17)
            self.branch7x7_3(single),                               # (N, 192, 17, 17)
            self.branch7x7dbl_5(double),                            # (N, 192, 17, 17)
            self.branch_pool(x, pool=True),                         # (N, 192, 17, 17)
        ], dim=1)                                                   # (N, 768, 17, 17)


class InceptionD(nn.Module):
    """3 x 3, 7 x 7 and 3 x 3, and the maximum of 3 x 3, at every second place."""

    def __init__(self, in_channels):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x):                                           # (N, in_channels, 17, 17)
        branch7x7 = self.branch7x7x3_2(self.branch7x7x3_1(x))       # (N, 192, 17, 17)
        branch7x7 = self.branch7x7x3_3(branch7x7)                   # (N, 192, 17, 17)
        return torch.cat([
            self.branch3x3_2(self.branch3x3_1(x)),                  # (N, 320, 8, 8)
            self.branch7x7x3_4(branch7x7),                          # (N, 192, 8, 8)
            F.max_pool2d(x, 3, stride=2),                           # (N, in_channels, 8, 8)
        ], dim=1)                                                   # (N, 512 + in_channels, 8, 8)


class InceptionE(nn.Module):
    """1 x 1, 3 x 3 and twice 3 x 3 as rows beside columns, and a pool of 3 x 3, "avg" or "max"."""

    def __init__(self, in_channels, pool):
        super().__init__()
        row = dict(kernel_size=(1, 3), padding=(0, 1))
        column = dict(kernel_size=(3, 1), padding=(1, 0))
        self.pool = pool
        self.branch1x1 = BasicConv2d(in_channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, **row)
        self.branch3x3_2b = BasicConv2d(384, 384, **column)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, **row)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, **column)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, x):                                           # (N, in_channels, 8, 8)
        single = self.branch3x3_1(x)                                # (N, 384, 8, 8)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))        # (N, 384, 8, 8)
        if self.pool == "max":
            pooled = self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))  # (N, 192, 8, 8)
        else:
            pooled = self.branch_pool(x, pool=True)                 # (N, 192, 8, 8)
        return torch.cat([
            self.branch1x1(x),                                      # (N, 320, 8, 8)
            self.branch3x3_2a(single),                              # (N, 384, 8, 8)
            self.branch3x3_2b(single),                              # (N, 384, 8, 8)
            self.branch3x3dbl_3a(double),                           # (N, 384, 8, 8)
            self.branch3x3dbl_3b(double),                           # (N, 384, 8, 8)
            pooled,                                                 # (N, 192, 8, 8)
        ], dim=1)                                                   # (N, 2048, 8, 8)


Features = collections.namedtuple("Features", "pool3 spatial logits")


class InceptionV3(nn.Module):
    """The network of FID. Use it in eval mode; `from_published` gives it with weights, folded.

    It is not torchvision's: a mean leaves the padding out, the last block has a maximum in place of
    its mean, and there are 1008 classes.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, pool="avg")
        self.Mixed_7c = InceptionE(2048, pool="max")
        self.fc = nn.Linear(2048, 1008)

    @classmethod
    def from_published(cls, path=None):
        """With the published weights, from `path` or fetched, in eval mode, folded.

        Raises OSError or ValueError.
        """
        path = path or fetch(*INCEPTION)
        model = cls().eval()
        load_strict(model, load_torch(path), path)
        return model.fold()

    def fold(self):
        """Fold every batch norm into its convolution, for good, and keep channels last.

        Textbook: the model as it is, with the same outputs. Measured on one CPU core, 16 images at
        a time: folding makes it 1.11 times as fast, channels last 1.64 times, both 1.89 times.
        """
        for module in self.modules():
            if isinstance(module, BasicConv2d):
                module.fold()
        return self.to(memory_format=torch.channels_last).requires_grad_(False)

    def forward(self, x):
        """x (N, 3, 299, 299) as RESIZES make it -> Features pool3, spatial and logits.

        spatial is what ADM reads at mixed_6/conv: the first 7 channels, by row, column and channel.
        logits have no bias, as the Inception Score wants them; `fc(pool3)` has it.
        """
        x = self.Conv2d_1a_3x3(x)                                   # (N, 32, 149, 149)
        x = self.Conv2d_2a_3x3(x)                                   # (N, 32, 147, 147)
        x = self.Conv2d_2b_3x3(x)                                   # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)                            # (N, 64, 73, 73)
        x = self.Conv2d_3b_1x1(x)                                   # (N, 80, 73, 73)
        x = self.Conv2d_4a_3x3(x)                                   # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)                            # (N, 192, 35, 35)
        x = self.Mixed_5b(x)                                        # (N, 256, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(x))                         # (N, 288, 35, 35)
        x = self.Mixed_6a(x)                                        # (N, 768, 17, 17)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))          # (N, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)           # (N, 2023): 17 x 17 x 7
        x = self.Mixed_6e(x)                                        # (N, 768, 17, 17)
        x = self.Mixed_7a(x)                                        # (N, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))                         # (N, 2048, 8, 8)
        pool3 = x.mean(dim=(2, 3))                                  # (N, 2048)
        logits = pool3 @ self.fc.weight.T                           # (N, 1008)
        return Features(pool3, spatial, logits)


# --------------------------------------------------------------------------------------------------
# From images (N, 3, H, W), uint8 or floats of 0 .. 255, to the network's input in [-1, 1]. Tools
# differ, and so do their figures

def in_float(images):
    """uint8 -> float32; floats as they are."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


def resize_tf1(images):
    """TensorFlow 1's bilinear, ADM's: pixel i of the result lies at i * old / new of the image."""
    def along(x, dim):
        scale = float(np.float32(x.shape[dim] / 299))               # TensorFlow's is a float32
        position = torch.arange(299, dtype=x.dtype, device=x.device) * scale  # (299,)
        low = position.floor().long()                               # (299,)
        high = (low + 1).clamp(max=x.shape[dim] - 1)                # (299,)
        share = position - low                                      # (299,)
        if dim == 2:
            share = share[:, None]                                  # (299, 1): of rows
        a = x.index_select(dim, low)                                # 299 places along dim
        b = x.index_select(dim, high)                               # the same
        return a + (b - a) * share                                  # the same

    x = along(in_float(images), dim=3)                              # (N, 3, H, 299)
    return (along(x, dim=2) - 128) / 128                            # (N, 3, 299, 299)


def resize_pytorch_fid(images):
    """pytorch-fid's bilinear: pixel centres half a pixel in, no antialiasing."""
    x = in_float(images) / 255                                      # (N, 3, H, W)
    x = F.interpolate(x, (299, 299), mode="bilinear")               # (N, 3, 299, 299)
    return 2 * x - 1                                                # (N, 3, 299, 299)


def resize_clean_fid(images):
    """clean-fid's: Pillow's bicubic of float32 channels, which averages where it shrinks."""
    resized = []
    for channel in images.float().flatten(0, 1).cpu().numpy():      # (H, W)
        image = Image.fromarray(channel).resize((299, 299), Image.Resampling.BICUBIC)
        resized.append(np.asarray(image))                           # (299, 299)
    x = torch.from_numpy(np.array(resized)).to(images.device)       # (3 N, 299, 299)
    x = x.unflatten(0, (-1, 3)).clamp(0, 255)                       # (N, 3, 299, 299)
    return (x - 128) / 128                                          # (N, 3, 299, 299)


RESIZES = {"tf1": resize_tf1, "pytorch-fid": resize_pytorch_fid, "clean-fid": resize_clean_fid}


# --------------------------------------------------------------------------------------------------
# Features of a set of images, shared out over the processes of torchrun

# as torchrun sets them; read when this file is imported
rank = int(os.environ.get("RANK", 0))
local_rank = int(os.environ.get("LOCAL_RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
Evaluation = collections.namedtuple("Evaluation", "pool3 spatial feats logits")


@torch.no_grad()
def evaluate(model, images, keep, resize, batch_size, workers):
    """What the measures need of `images`, of which every process runs its share through the model.

    images is of a class below, or any object with path, len() and batches(first, last, size,
    workers). -> on rank 0 an Evaluation: pool3 and spatial, (mu, sigma) of all images each; feats
    (keep, 2048) and logits (keep, 1008) of `keep` images, evenly spread. None on other ranks.
    """
    device = model.fc.weight.device
    pool3 = Statistics(2048, device)
    spatial = Statistics(2023, device)
    feats = [torch.empty(0, 2048)]                                  # this process may have no image
    logits = [torch.empty(0, 1008)]
    kept = torch.zeros(len(images), dtype=torch.bool)
    kept[np.linspace(0, len(images) - 1, min(keep, len(images))).round().astype(int)] = True
    first = len(images) * rank // world_size
    last = len(images) * (rank + 1) // world_size
    bar = tqdm(total=last - first, desc=f"inception {images.path.name}", unit="image",
               disable=rank > 0, leave=False)
    with bar, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # FID is of float32
        for batch in images.batches(first, last, batch_size, workers):
            x = torch.from_numpy(batch).to(device)                  # (N, H, W, 3) uint8
            x = RESIZES[resize](x.permute(0, 3, 1, 2))              # (N, 3, 299, 299)
            x = x.contiguous(memory_format=torch.channels_last)     # the same, as the weights lie
            out = model(x)                                          # Features of the N images
            finite = torch.cat(out, dim=1).isfinite().all(dim=1)    # (N,) bool
            if not finite.all():
                number = first + finite.tolist().index(False)
                raise ValueError(f"{images.path}, image {number} (the first is 0): {NOT_FINITE}")
            pool3.update(out.pool3)                                 # (N, 2048)
            spatial.update(out.spatial)                             # (N, 2023)
            here = kept[first:first + len(batch)]                   # (N,) bool
            feats.append(out.pool3.cpu()[here])                     # (kept of N, 2048)
            logits.append(out.logits.cpu()[here])                   # (kept of N, 1008)
            first += len(batch)
            bar.update(len(batch))
    feats, logits = torch.cat(feats), torch.cat(logits)
    if world_size > 1:
        for sums in (pool3, spatial):
            for total in (sums.count, sums.sum, sums.products):
                dist.all_reduce(total)
        shares = [None] * world_size if rank == 0 else None
        dist.gather_object((feats, logits), shares)
        if rank > 0:
            return None
        feats, logits = (torch.cat(parts) for parts in zip(*shares))
    return Evaluation(pool3.moments(), spatial.moments(), feats, logits)


def compare(samples, reference, metrics, device):
    """Figures of two Evaluations: name -> number. KID's subsets are as small as the smaller set."""
    figures = {}
    if "fid" in metrics:
        figures["fid"] = frechet_distance(*samples.pool3, *reference.pool3)
    if "sfid" in metrics:
        figures["sfid"] = frechet_distance(*samples.spatial, *reference.spatial)
    if "is" in metrics:
        figures["is"] = inception_score(samples.logits)
    if {"precision", "recall", "kid"} & set(metrics):
        feats = samples.feats.to(device)                            # (N, 2048)
        feats_reference = reference.feats.to(device)                # (M, 2048)
        if {"precision", "recall"} & set(metrics):
            figures["precision"], figures["recall"] = precision_recall(feats_reference, feats)
        if "kid" in metrics:
            size = min(1000, len(feats_reference), len(feats))
            figures["kid"], figures["kid_std"] = kid(feats_reference, feats, subset_size=size)
            figures["kid_subset_size"] = size
    return {name: value for name, value in figures.items() if name.split("_")[0] in metrics}


# --------------------------------------------------------------------------------------------------
# Images of a file or folder, in order, and files of statistics

class ArrayImages:
    """`arr_0` of a .npz, compressed or not, or a .npy: (N, H, W, 3) uint8, or floats in [0, 1].

    Read piece by piece. Raises ValueError for others.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            if self.path.suffix == ".npz":
                self.file = zipfile.ZipFile(path).open("arr_0.npy")
            else:
                self.file = open(path, "rb")
            version = np.lib.format.read_magic(self.file)
            read = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                    else np.lib.format.read_array_header_2_0)
            self.shape, fortran, self.dtype = read(self.file)
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise ValueError(f"{path} holds no images ({error}): "
                             "want arr_0 in a .npz, or a .npy") from None
        self.start = self.file.tell()                               # behind the header
        if self.dtype.hasobject:
            raise ValueError(f"{path} holds pickled objects, which are not read: "
                             "save images as uint8")
        good = self.dtype in (np.uint8, np.float16, np.float32, np.float64)
        if len(self.shape) != 4 or self.shape[3] != 3 or fortran or not good:
            order = " in Fortran order" if fortran else ""
            raise ValueError(f"{path} holds {self.dtype} of shape {self.shape}{order}: "
                             "want images (N, H, W, 3) of uint8, or of floats in [0, 1]")
        self.about = f"{len(self):,} images of {self.shape[1]} x {self.shape[2]}"

    def batches(self, first, last, size, workers):
        """Arrays (n, H, W, 3) uint8 with images first .. last - 1."""
        item = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        for start in range(first, last, size):
            count = min(size, last - start)
            try:
                self.file.seek(self.start + start * item)
                data = bytearray(self.file.read(count * item))
            except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{self.path} is damaged near image {start} ({error}): "
                                 "copy it anew") from None
            if len(data) < count * item:
                whole = start + len(data) // item
                raise ValueError(f"{self.path} ends after {whole} of {len(self)} images: "
                                 "copy it anew")
            images = np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
            if self.dtype != np.uint8:
                if not (images.min() >= 0 and images.max() <= 1):
                    raise ValueError(f"{self.path} holds {images.min():g} to {images.max():g}: "
                                     "want uint8, or floats in [0, 1]")
                images = np.rint(images * 255).astype(np.uint8)     # (n, H, W, 3)
            yield images

    def __len__(self):
        return self.shape[0]


class FolderImages:
    """Image files of a folder or .zip and all below, by name, as read_rgb reads them.

    Raises ValueError where there is none or one cannot be read, and for different sizes.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.names, self.entries, others = list_images(self.path)
        self.shape = None
        self.shape = self.read(self.names[0]).shape                 # (H, W, 3), that of all
        self.about = f"{len(self):,} images of {self.shape[0]} x {self.shape[1]}"
        if others:
            self.about += f" (files passed over: {others:,})"

    def read(self, name):
        """One image (H, W, 3) uint8."""
        try:
            pixels = np.asarray(read_rgb(read_file(self.path, name, self.entries)))
        except Exception as error:                                  # damage raises almost anything
            raise ValueError(f"{self.path}/{name} cannot be used ({error}): "
                             "mend or remove it") from None
        if self.shape and pixels.shape != self.shape:
            raise ValueError(f"{self.path}/{name} is {pixels.shape[0]} x {pixels.shape[1]}, "
                             f"{self.names[0]} is {self.shape[0]} x {self.shape[1]}: "
                             "bring all to one size")
        return pixels                                               # (H, W, 3)

    def batches(self, first, last, size, workers):
        """Arrays (n, H, W, 3) uint8 with images first .. last - 1, decoded by threads."""
        # two batches are decoded while the network is at a third
        ahead = collections.deque()
        with ThreadPoolExecutor(workers) as pool:
            for start in range(first, last, size):
                ahead.append(pool.map(self.read, self.names[start:min(start + size, last)]))
                if len(ahead) > 2:
                    yield np.stack(list(ahead.popleft()))           # (n, H, W, 3)
            while ahead:
                yield np.stack(list(ahead.popleft()))               # (n, H, W, 3)

    def __len__(self):
        return len(self.names)


def open_images(path):
    """ArrayImages or FolderImages. Raises FileNotFoundError, or ValueError if it has no images."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: "
                                "want a .npz, a .npy, or a folder or .zip of images")
    if path.suffix in (".npz", ".npy"):
        return ArrayImages(path)
    if path.is_dir() or path.suffix == ".zip":
        return FolderImages(path)
    raise ValueError(f"{path} is no .npz, .npy, folder or .zip")


def read_statistics(path):
    """{"pool3": (mu, sigma), "spatial": ...} of those that a .npz has, {} of other files; and how
    their images were resized, None where the file does not tell.

    In the file they are mu and sigma, mu_s and sigma_s, and `resize`, which files of other tools
    lack; those with mu_s are ADM's. Raises ValueError if they are of no use.
    """
    found, resize = {}, None
    if Path(path).suffix != ".npz" or not Path(path).is_file():
        return found, resize
    try:
        with np.load(path, allow_pickle=False) as file:
            for part, end, dim in (("pool3", "", 2048), ("spatial", "_s", 2023)):
                if f"mu{end}" not in file.files or f"sigma{end}" not in file.files:
                    continue
                mu = file[f"mu{end}"].astype(np.float64)            # (dim,)
                sigma = file[f"sigma{end}"].astype(np.float64)      # (dim, dim)
                if mu.shape != (dim,) or sigma.shape != (dim, dim):
                    raise ValueError(f"mu{end} {mu.shape}, sigma{end} {sigma.shape}: "
                                     f"want those of {dim} features")
                if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                    raise ValueError(f"mu{end} or sigma{end} is not finite")
                found[part] = mu, sigma
            if "spatial" in found:
                resize = "tf1"
            if found and "resize" in file.files:
                resize = str(file["resize"])
    except (OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as statistics ({error})") from None
    return found, resize


# --------------------------------------------------------------------------------------------------
# The program

METRICS = {"fid": "FID", "sfid": "sFID", "is": "Inception Score", "precision": "precision",
           "recall": "recall", "kid": "KID"}
PART = {"fid": "pool3", "sfid": "spatial"}                          # what has statistics in files


def plan(cfg):
    """What is to be done: samples, reference images or None, statistics of a file, and metrics.

    Raises OSError or ValueError for what cannot be done, before any work.
    """
    if (cfg.save_stats is None) == (cfg.reference is None):
        raise ValueError("give SAMPLES and REFERENCE, or one set of images and --save-stats FILE")
    if cfg.save_stats and (cfg.metrics or cfg.json):
        raise ValueError("--save-stats compares nothing: give no --metrics and no --json")
    if cfg.save_stats and cfg.save_stats.suffix != ".npz":
        raise ValueError(f"--save-stats {cfg.save_stats}: want a name that ends in .npz")
    samples = open_images(cfg.samples)
    reference, statistics, metrics = None, {}, []
    if cfg.reference:
        statistics, resize = read_statistics(cfg.reference)
        if resize not in (None, cfg.resize):
            raise ValueError(f"{cfg.reference} has statistics of images resized by {resize}, not "
                             f"{cfg.resize}: want --resize {resize}")
        if statistics and resize is None and rank == 0:
            print(f"{cfg.reference} does not tell how its images were resized: --resize must be "
                  "that of the tool that made it\n")
        # statistics may come without images
        if not statistics or "arr_0.npy" in zipfile.ZipFile(cfg.reference).namelist():
            reference = open_images(cfg.reference)
        possible = [name for name in METRICS
                    if reference or name == "is" or PART.get(name) in statistics]
        metrics = cfg.metrics or [name for name in possible if name != "kid"]
        if not set(metrics) <= set(possible):
            raise ValueError(f"{cfg.reference} has no images, and statistics for "
                             f"{', '.join(possible)} only: ask for those, "
                             "or give another reference")
    for images in (samples, reference):
        if images is not None and len(images) < 2:
            raise ValueError(f"{images.path} holds {images.about}: want at least 2")
    for path in (cfg.json, cfg.save_stats):
        if path and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}: make it first")
    if cfg.json and cfg.json.exists() and not is_report(cfg.json):
        raise ValueError(f"--json {cfg.json} is there and no report of fid.py: choose another name")
    if cfg.save_stats and cfg.save_stats.exists() and not is_statistics(cfg.save_stats):
        raise ValueError(f"--save-stats {cfg.save_stats} is there and no file of fid.py: choose "
                         "another name")
    return samples, reference, statistics, metrics


def is_report(path):
    """Whether a file is one that `report` writes."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"samples", "num_samples", "reference"} <= found.keys()


def is_statistics(path):
    """Whether a file is one that --save-stats writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return "resize.npy" in names and "arr_0.npy" not in names


def report(cfg, samples, compared_with, few, figures):
    """Print a table of figures, with what they are of, and write them where --json says."""
    facts = dict(samples=str(cfg.samples), num_samples=len(samples),
                 reference=f"{cfg.reference}: {compared_with}",
                 weights=str(cfg.weights or INCEPTION[0].split("/")[-1]), resize=cfg.resize)
    print(f"samples    {cfg.samples}: {samples.about}\nreference  {facts['reference']}\n"
          f"inception  {facts['weights']}, resize {cfg.resize}\n")
    for name, title in METRICS.items():
        if name not in figures:
            continue
        if name == "kid":
            print(f"{title:16}{figures[name]:12.6f} +- {figures['kid_std']:.6f} "
                  f"over subsets of {figures['kid_subset_size']:,} images")
        else:
            print(f"{title:16}{figures[name]:12.4f}")
    if few and PART.keys() & figures.keys():
        print("\nfewer than 2,048 images: FID and sFID are far from those of many; "
              "compare with as many only")
    rest = len(samples) % SPLIT_SIZE
    if "is" in figures and rest and len(samples) > SPLIT_SIZE:
        print(f"\nInception Score: the last split has {rest:,} images and counts like those of "
              f"{SPLIT_SIZE:,}")
    if cfg.json:
        with atomic_file(cfg.json) as file:
            text = json.dumps({**facts, **figures}, indent=2, allow_nan=False)
            file.write((text + "\n").encode())


def run(cfg):
    """Look at what was given, before any work; evaluate; let rank 0 compare, print and write."""
    samples, reference, statistics, metrics = plan(cfg)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False                   # some containers allow it
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        if cuda:
            torch.cuda.set_device(device)
    if local_rank > 0:
        dist.barrier()                                              # the first of a node fetches
    model = InceptionV3.from_published(cfg.weights).to(device)
    if local_rank == 0 and world_size > 1:
        dist.barrier()
    # of the reference a metric wants mean and covariance, those of its file or of its images, or
    # features
    of_file = [name for name in metrics if PART.get(name) in statistics]
    of_moments = [name for name in metrics if name in PART and name not in of_file]
    of_feats = [name for name in metrics if name in ("precision", "recall", "kid")]
    options = cfg.resize, cfg.batch_size, cfg.workers
    keep = len(samples) if of_feats or "is" in metrics else 0
    of_samples = evaluate(model, samples, keep, *options)
    of_reference = Evaluation(None, None, None, None)
    if of_feats or of_moments:
        keep = cfg.references or len(reference)
        of_reference = evaluate(model, reference, keep if of_feats else 0, *options)
    if rank > 0:
        return
    if cfg.save_stats:
        (mu, sigma), (mu_s, sigma_s) = of_samples.pool3, of_samples.spatial
        with atomic_file(cfg.save_stats) as file:
            np.savez(file, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, resize=cfg.resize)
        print(f"statistics of {samples.about} of {cfg.samples}, resize {cfg.resize}, "
              f"in {cfg.save_stats}")
        return
    compared_with = []
    if of_file:
        compared_with.append(f"its statistics for {', '.join(of_file)}")
    if of_moments:
        compared_with.append(f"{reference.about} for {', '.join(of_moments)}")
    if of_feats:
        compared_with.append(f"{len(of_reference.feats):,} images for {', '.join(of_feats)}")
    few = len(samples) < 2048 or (of_moments and len(reference) < 2048)
    figures = compare(of_samples, of_reference._replace(**statistics), metrics, device)
    report(cfg, samples, "; ".join(compared_with) or "not needed", few, figures)


def main():
    """Read the flags and run; a mistake of the user ends in one line and exit status 2."""
    def stop(message):
        print(f"fid.py: {message}", file=sys.stderr)
        sys.exit(2)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop                                             # one line, without the usage
    add = parser.add_argument
    add("samples", type=Path, help=".npz, .npy, folder or .zip of images")
    add("reference", type=Path, nargs="?", help="the same, or a .npz of statistics")
    add("--metrics", nargs="+", choices=METRICS,
        help="which (default: of the first five all that the reference allows)")
    add("--resize", choices=sorted(RESIZES), default="tf1",
        help="how images become 299 x 299 (default: tf1, ADM's)")
    add("--references", type=int, default=10000,
        help="images of the reference, evenly spread, for precision, recall and KID; 0 takes all")
    add("--weights", type=Path,
        help="file of the network's weights (default: fetched into the cache)")
    add("--save-stats", type=Path, metavar="FILE", help="write a .npz of one set's statistics")
    add("--json", type=Path, metavar="FILE", help="write the figures")
    add("--batch-size", type=int, default=64, help="images at once on a process")
    add("--workers", type=int, default=4, help="threads that decode images, for every process")
    cfg = parser.parse_args()
    for name, least in (("batch_size", 1), ("workers", 1), ("references", 0)):
        if getattr(cfg, name) < least:
            stop(f"--{name.replace('_', '-')} {getattr(cfg, name)}: want at least {least}")
    try:
        run(cfg)
    except (OSError, ValueError) as error:
        stop(error)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Image files of a folder or .zip. train.py finds and reads its images with these too

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")      # Pillow opens no other
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LARGEST_FILE = 2 ** 29                                              # bytes of an image's file


def read_rgb(file):
    """An image file -> RGB PIL image. Turned upright where EXIF tells how; the first picture of an
    animation; grey, palette and CMYK as Pillow converts them; transparent pixels before white; 16
    bits to 8 by rounding. Raises for float pixels, and for more than 179 million pixels, which
    Pillow takes for an attack."""
    try:
        opened = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("no image") from None
    with opened as image:
        if image.mode == "F":
            raise ValueError("its pixels are floats, of unknown range")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            grey = np.asarray(image)
            if grey.min() < 0 or grey.max() > 65535:
                raise ValueError("its pixels have more than 16 bits")
            image = Image.fromarray((grey / 257).round().astype(np.uint8))  # 65535 = 257 x 255
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def list_images(path):
    """Names of the image files of a folder or .zip and all below it, sorted; what `read_file` wants
    of them; and the number of other files. Hidden files are nothing. Raises OSError, or ValueError
    for a broken .zip and where there is no image."""
    entries = None if path.is_dir() else list_zip(path)
    names = list_folder(path) if entries is None else list(entries)
    images = sorted(name for name in names if name.lower().endswith(SUFFIXES))
    if not images:
        raise ValueError(f"{path} has no images: want files that end in {', '.join(SUFFIXES)}")
    return images, entries, len(names) - len(images)


def list_folder(path):
    """Names of all files below a folder, linked folders too, hidden ones not: about as fast as
    os.walk."""
    names, todo = [], [("", ())]
    while todo:
        inside, above = todo.pop()
        status = os.stat(path / inside)
        if (status.st_dev, status.st_ino) in above:                 # a link to a folder around it
            continue
        with os.scandir(path / inside) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir():
                    folders = (*above, (status.st_dev, status.st_ino))
                    todo.append((f"{inside}{entry.name}/", folders))
                else:
                    names.append(inside + entry.name)
    return names


def list_zip(path):
    """{name: where its bytes are} of all files in a .zip, hidden ones not: its directory is read
    once, here, and not again in every process that loads images."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is a broken .zip ({error}): fetch it anew") from None
    return {info.filename: (info.header_offset, info.compress_size, info.file_size,
                            info.compress_type, info.CRC)
            for info in infos if not info.is_dir() and not any(
                part.startswith((".", "__MACOSX")) for part in info.filename.split("/"))}


def read_file(path, name, entries):
    """A file of a folder or .zip, in memory, of at most LARGEST_FILE bytes. Raises OSError or
    ValueError."""
    if entries is not None:
        return io.BytesIO(read_from_zip(path, *entries[name]))
    if (path / name).stat().st_size > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE} bytes")
    return io.BytesIO((path / name).read_bytes())


def read_from_zip(path, offset, compressed, size, method, checksum):
    """Bytes of one file in a .zip: a local header, then the data, stored or deflated. Raises
    ValueError for others."""
    known = method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if not known or max(size, compressed) > LARGEST_FILE:
        raise ValueError(f"it has {size} bytes, compressed by method {method}")
    with open(path, "rb") as file:
        file.seek(offset)
        lengths = struct.unpack("<26xHH", file.read(30))            # of the name, the extra field
        file.seek(sum(lengths), os.SEEK_CUR)
        data = file.read(compressed)
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-15).decompress(data, size + 1)   # never more than was declared
    if len(data) != size or zlib.crc32(data) != checksum:
        raise ValueError("its bytes are not those that the .zip lists")
    return data


# --------------------------------------------------------------------------------------------------
# Published weights, and files that are whole or not there

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth",
             "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")


# === shared by vae.py, align.py and fid.py: begin ===
def fetch(address, sha256=None):
    """Path of a published file in ~/.cache/reals (or $REALS_CACHE), downloaded if it is not there.

    A download that broke off goes on where it stopped. The file gets its name when its size, and
    its sha256 where that is known, are right. Raises OSError of one line that says what to do.
    """
    folder = Path(os.environ.get("REALS_CACHE", "~/.cache/reals")).expanduser()
    path = folder / address.split("/")[-1]
    part = path.with_name(path.name + ".part")
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.is_file() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != 206:                                # the server sends all of it
                have = 0
            length = int(answer.headers.get("Content-Length", 0))   # 0: the server does not say
            total = have + length if length else None
            bar = tqdm(total=total, initial=have, desc=path.name, unit="B", unit_scale=True)
            with open(part, "ab" if have else "wb") as file, bar:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", 0) == 416:                        # nothing is left to send
            part.unlink()
            return fetch(address, sha256)
        raise OSError(f"{path.name} is not in {folder} and cannot be fetched ({error}): "
                      f"download {address} and put it there") from None
    if total and part.stat().st_size != total:
        raise OSError(f"{address} broke off after {part.stat().st_size} of {total} bytes: "
                      "try again, it goes on there")
    with open(part, "rb") as file:
        if sha256 and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            part.unlink()
            raise OSError(f"{address} did not send the bytes that were published "
                          "(sha256 differs): removed, try again")
    os.replace(part, path)
    return path


def load_torch(path):
    """Dict of tensors from a file of torch's own format, or from the "ema", "model" or "state_dict"
    in it.

    weights_only=True unpickles nothing else. Raises FileNotFoundError, or ValueError for a file
    that is damaged or holds more than tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} not found: want a file of weights")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                      # damage raises almost anything
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(f"{path} holds more than tensors ({refused[1]}), which is not "
                             "unpickled: save its state dict alone") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise ValueError(f"{path} cannot be read ({reason}): fetch the file anew") from None
    for name in ("ema", "model", "state_dict"):                     # of a training checkpoint
        if isinstance(weights, dict) and weights.get(name) and isinstance(weights[name], dict):
            weights = weights[name]
            break
    weights = weights if isinstance(weights, dict) else {"": weights}
    for name, value in weights.items():
        if not torch.is_tensor(value):
            raise ValueError(f"{path} is no state dict: {name!r} is no tensor")
    return weights


def load_strict(module, weights, path):
    """module.load_state_dict(weights); `path` is where the weights are from.

    Raises ValueError of one line: the first names that are missing, not expected or of another
    shape.
    """
    own = module.state_dict()
    wrong = {
        "missing": [k for k in own if k not in weights],
        "unexpected": [k for k in weights if k not in own],
        "of another shape": [k for k in own if k in weights and weights[k].shape != own[k].shape],
    }
    said = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in wrong.items() if names]
    if said:
        raise ValueError(f"{path} does not fit the network: {'; '.join(said)}")
    module.load_state_dict(weights)
# === shared by vae.py, align.py and fid.py: end ===


# === shared by vae.py and fid.py: begin ===
@contextlib.contextmanager
def atomic_file(path):
    """A binary file for writing that gets its name when it is complete and on disk, or never."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
# === shared by vae.py and fid.py: end ===


if __name__ == "__main__":
    main()
