"""FID, sFID, Inception Score, precision, recall and KID, as ADM's evaluation suite defines them, without TensorFlow.

    FID         |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of the 2048 features before the last layer
    sFID        the same of 7 channels at 17 x 17 places in the middle of the network
    IS          exp E_x KL(p(y | x) || p(y)), in splits of 5,000 images in the order of the file, mean over splits
    precision   share of samples that lie as near to a real image as its third neighbour among the real ones does
    recall      the same with the roles changed
    KID         squared MMD of the features with the kernel (x.y / 2048 + 1)^3, mean over random subsets

Heusel et al., arXiv 1706.08500; Nash et al., 2103.03841; Salimans et al., 1606.03498; Kynkaanniemi et al., 1904.06991;
Binkowski et al., 1801.01401; ADM's script: github.com/openai/guided-diffusion, evaluations/evaluator.py. The network is
the Inception of 2015 in which all of them are given, in pytorch-fid's conversion, fetched on first use.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 fid.py FOLDER reference.npz --metrics fid precision recall --json figures.json
    python fid.py REFERENCE_FOLDER --save-stats reference.npz

SAMPLES and REFERENCE: .npz with `arr_0` or .npy, (N, H, W, 3) uint8, or a folder or .zip of images, with all below. As
reference also files of statistics: ADM's (mu, sigma, mu_s, sigma_s, and arr_0 for precision and recall), pytorch-fid's.

    images (N, 3, H, W) uint8     feats (N, D) one row an image
"""
import argparse
import collections
import contextlib
import hashlib
import http.client
import json
import os
import pickle
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
from PIL import Image
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Inception v3 with the weights of 2015: names as in pytorch-fid's file

class BasicConv2d(nn.Module):
    """Convolution, batch norm, ReLU; pool: the mean of 3 x 3 places before them."""

    def __init__(self, in_channels, out_channels, kernel_size, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def fold(self):
        """Put the batch norm into the convolution: w' = w s, b' = bias - mean s with s = weight / sqrt(var + eps)."""
        scale = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)
        self.conv.weight.data *= scale.view(-1, 1, 1, 1)
        self.conv.bias = nn.Parameter((self.bn.bias - self.bn.running_mean * scale).detach())
        self.bn = nn.Identity()

    def forward(self, x, pool=False):
        x = self.bn(self.conv(x))
        if pool:                    # after the 1 x 1 convolution, not before: they commute, and here channels are fewer
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return F.relu(x, inplace=True)


class InceptionA(nn.Module):
    """(N, C, 35, 35) -> (N, 224 + pool_features, 35, 35): 1 x 1, 5 x 5, twice 3 x 3, and the mean of 3 x 3."""

    def __init__(self, in_channels, pool_features):
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(in_channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(in_channels, pool_features, 1)

    def forward(self, x):
        return torch.cat([
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(x, pool=True)], dim=1)


class InceptionB(nn.Module):
    """(N, C, 35, 35) -> (N, 480 + C, 17, 17): 3 x 3, twice 3 x 3, and the maximum of 3 x 3, at every second place."""

    def __init__(self, in_channels):
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x):
        return torch.cat([
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionC(nn.Module):
    """(N, C, 17, 17) -> (N, 768, 17, 17): 1 x 1, 7 x 7 and twice 7 x 7 as rows and columns, and the mean of 3 x 3."""

    def __init__(self, in_channels, width):
        super().__init__()
        row, column = dict(kernel_size=(1, 7), padding=(0, 3)), dict(kernel_size=(7, 1), padding=(3, 0))
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

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(x, pool=True)], dim=1)


class InceptionD(nn.Module):
    """(N, C, 17, 17) -> (N, 512 + C, 8, 8): 3 x 3, 7 x 7 and 3 x 3, and the maximum of 3 x 3, at every second place."""

    def __init__(self, in_channels):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x):
        return torch.cat([
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
            F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionE(nn.Module):
    """(N, C, 8, 8) -> (N, 2048, 8, 8): 1 x 1, 3 x 3 and twice 3 x 3 as rows beside columns, and a pool of 3 x 3: "avg",
    or "max", as the last block of the published network has it."""

    def __init__(self, in_channels, pool):
        super().__init__()
        row, column = dict(kernel_size=(1, 3), padding=(0, 1)), dict(kernel_size=(3, 1), padding=(1, 0))
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

    def forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        if self.pool == "max":
            pooled = self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        else:
            pooled = self.branch_pool(x, pool=True)
        return torch.cat([
            self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), pooled], dim=1)


Features = collections.namedtuple("Features", "pool3 spatial logits")
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth",
             "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")


class InceptionV3(nn.Module):
    """The network of FID. Use it in eval mode; `from_published` gives it with weights, folded."""

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
        """With the published weights, from `path` or fetched, in eval mode, folded. Raises OSError or ValueError."""
        path, model = path or fetch(*INCEPTION), cls().eval()
        load_strict(model, load_torch(path), path)
        return model.fold()

    def fold(self):
        """Fold every batch norm into its convolution, for good, and keep channels last: the same outputs, faster."""
        for module in self.modules():
            if isinstance(module, BasicConv2d):
                module.fold()
        return self.to(memory_format=torch.channels_last).requires_grad_(False)

    def forward(self, x):
        """x (N, 3, 299, 299) as RESIZES make it -> pool3 (N, 2048), spatial (N, 2023) and logits (N, 1008).

        spatial: what ADM reads at mixed_6/conv, the first 7 channels of a block, by row, column and channel. logits
        have no bias, as the Inception Score wants them; `fc(pool3)` has it.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))        # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)                                         # (N, 192, 35, 35)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))        # (N, 768, 17, 17)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                        # branch1x1's first channels
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))        # (N, 2048, 8, 8)
        pool3 = x.mean((2, 3))
        return Features(pool3, spatial, pool3 @ self.fc.weight.T)


# ---------------------------------------------------------------------------------------------------------------------
# From images (N, 3, H, W) uint8 to the network's input (N, 3, 299, 299). Tools differ, and so do their figures

def in_float(images):
    """uint8 -> float32; floats as they are."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


def resize_tf1(images):
    """TensorFlow 1's bilinear: pixel i of the result lies at i * old / new of the image. ADM's, and the default."""
    def along(x, dim):
        scale = float(np.float32(x.shape[dim] / 299))                            # TensorFlow's is a float32
        position = torch.arange(299, dtype=x.dtype, device=x.device) * scale
        low = position.floor().long()
        share = (position - low).view([-1 if d == dim else 1 for d in (0, 1, 2, 3)])
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=x.shape[dim] - 1))
        return a + (b - a) * share

    return (along(along(in_float(images), 3), 2) - 128) / 128


def resize_pytorch_fid(images):
    """pytorch-fid's bilinear: pixel centres half a pixel in, no antialiasing."""
    x = F.interpolate(in_float(images) / 255, size=(299, 299), mode="bilinear", align_corners=False)
    return 2 * x - 1


def resize_clean_fid(images):
    """clean-fid's: Pillow's bicubic of float32 channels, which averages where it shrinks."""
    x = [[np.asarray(Image.fromarray(channel, "F").resize((299, 299), Image.Resampling.BICUBIC)) for channel in image]
         for image in images.float().cpu().numpy()]
    return (torch.from_numpy(np.array(x)).to(images.device).clamp(0, 255) - 128) / 128


RESIZES = {"tf1": resize_tf1, "pytorch-fid": resize_pytorch_fid, "clean-fid": resize_clean_fid}


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of features; each can be used alone, on anybody's

NOT_FINITE = "features are not finite: look at the images, or at the weights of the network"


class Statistics:
    """Mean and covariance of rows that come in batches: memory does not grow with their number."""

    def __init__(self, dim, device="cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.products = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, feats):
        """Add feats (N, D)."""
        feats = feats.double()
        self.count += len(feats)
        self.sum += feats.sum(0)
        self.products.addmm_(feats.T, feats)

    def gather(self):
        """The sum over all processes."""
        for value in (self.count, self.sum, self.products):
            dist.all_reduce(value)

    def moments(self):
        """float64 mean (D,) and covariance (D, D), denominator N - 1. Raises ValueError for N < 2 or NaN features."""
        if self.count < 2:
            raise ValueError(f"{int(self.count)} images: mean and covariance need at least 2")
        mean = self.sum / self.count
        sigma = (self.products - self.count * mean.outer(mean)) / (self.count - 1)
        if not sigma.isfinite().all():
            raise ValueError(NOT_FINITE)
        return mean.cpu().numpy(), sigma.cpu().numpy()


def feature_statistics(feats):
    """feats (N, D) -> float64 mean (D,) and covariance (D, D), denominator N - 1. Raises ValueError for N < 2."""
    feats = torch.as_tensor(feats)
    if feats.ndim != 2:
        raise ValueError(f"features have shape {tuple(feats.shape)}: want (N, D), one row an image")
    statistics = Statistics(feats.shape[1], feats.device)
    statistics.update(feats)
    return statistics.moments()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians with means (D,) and covariances (D, D); finite and never negative.

    tr((sigma1 sigma2)^(1/2)) is the sum of the roots of the eigenvalues of L^T sigma2 L with sigma1 = L L^T, which is
    symmetric, unlike sigma1 sigma2. Where a set has fewer images than dimensions, the zeros among them would be noise,
    so it is taken as the sum of the singular values of A^T B, sigma1 = A A^T and sigma2 = B B^T with no more columns
    than their ranks. Raises ValueError for other shapes.
    """
    mu1, mu2, sigma1, sigma2 = (torch.as_tensor(a, dtype=torch.float64) for a in (mu1, mu2, sigma1, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        shapes = ", ".join(str(tuple(a.shape)) for a in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"statistics of shapes {shapes} do not go together: want (D,), (D, D) twice")
    smallest = len(mu1) * torch.finfo(torch.float64).eps                         # relative: below it, zero

    def factor(sigma):
        values, vectors = torch.linalg.eigh(sigma)
        kept = values > values[-1].clamp(min=0) * smallest
        return vectors[:, kept] * values[kept].sqrt()

    (lower, failed1), (other, failed2) = torch.linalg.cholesky_ex(sigma1), torch.linalg.cholesky_ex(sigma2)
    pivots = torch.stack([lower.diagonal(), other.diagonal()]).square()
    if failed1 or failed2 or (pivots.amin(1) <= pivots.amax(1) * smallest).any():
        cross = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    else:
        cross = torch.linalg.eigvalsh(lower.T @ sigma2 @ lower).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(distance.item(), 0.0)


class ScoreSums:
    """What the Inception Score needs of each split of 5,000 images: sum p log p, sum p and the number of images."""

    def __init__(self, count, classes, split_size=5000, device="cpu"):
        self.split_size = split_size
        self.sums = torch.zeros(-(-count // split_size), classes + 2, dtype=torch.float64, device=device)

    def update(self, logits, first):
        """Add logits (N, classes) of the images from number `first` on."""
        log_p = logits.double().log_softmax(dim=1)
        p = log_p.exp()
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], dim=1)
        split = torch.arange(first, first + len(logits), device=logits.device) // self.split_size
        self.sums.index_add_(0, split, rows)

    def gather(self):
        """The sum over all processes."""
        dist.all_reduce(self.sums)

    def score(self):
        """exp of the mean KL(p(y | x) || p(y)) of every split, averaged over splits; a short last one counts as one.
        Raises ValueError for NaN logits."""
        if not self.sums.isfinite().all():
            raise ValueError(NOT_FINITE)
        p, entropy, count = self.sums[:, :-2], self.sums[:, -2], self.sums[:, -1]
        marginal = p / count[:, None]
        return (entropy / count - torch.xlogy(marginal, marginal).sum(1)).exp().mean().item()


def inception_score(logits, split_size=5000):
    """Inception Score of logits (N, classes) in their order. Those of ADM have no bias. Images that are sorted by class
    score otherwise than shuffled ones, since splits do."""
    logits = torch.as_tensor(logits)
    sums = ScoreSums(len(logits), logits.shape[1], split_size, logits.device)
    sums.update(logits, 0)
    return sums.score()


def squared_distances(a, b):
    """a (N, D), b (M, D) -> |a - b|^2 (N, M)."""
    squares = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return squares.add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


def precision_recall(reference, samples, k=3, rows=1000):
    """(precision, recall) of feats samples (N, D) against reference (M, D), by balls that reach to the k-th neighbour.

    Distances are made of `rows` images to all at a time, in the type of the features. ADM rounds them to float16, which
    moves a sample or two across an edge. Raises ValueError for sets of k images or fewer.
    """
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} images a set")
    centre = reference.mean(0)                                                   # smaller numbers, the same distances
    reference, samples = reference - centre, samples - centre

    def radii(feats):                                                            # k + 1: a row holds the image itself
        nearest = [squared_distances(block, feats).topk(k + 1, largest=False).values for block in feats.split(rows)]
        return torch.cat(nearest)[:, -1]

    around_real, around_samples = radii(reference), radii(samples)
    precise, recalled = [], torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for block, radius in zip(samples.split(rows), around_samples.split(rows)):
        squares = squared_distances(block, reference)
        precise.append((squares <= around_real).any(1))
        recalled |= (squares <= radius[:, None]).any(0)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


def kid(feats1, feats2, subsets=100, subset_size=1000, seed=2020):
    """Kernel Inception Distance of feats (N, D), (M, D): mean and deviation of the unbiased MMD^2 over random subsets.

    The subsets are torch-fidelity's of the same seed. Raises ValueError where a set has fewer than subset_size rows.
    """
    if min(len(feats1), len(feats2)) < subset_size:
        raise ValueError(f"{len(feats1)} and {len(feats2)} images: KID wants at least its subset of {subset_size}")
    feats1, feats2 = torch.as_tensor(feats1), torch.as_tensor(feats2)
    rng, values, m = np.random.RandomState(seed), [], subset_size

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    for _ in range(subsets):
        x, y = (feats[torch.from_numpy(rng.choice(len(feats), m, replace=False)).to(feats.device)].double()
                for feats in (feats1, feats2))
        within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
        values.append((within / (m * (m - 1)) - 2 * kernel(x, y).mean()).item())
    return float(np.mean(values)), float(np.std(values))


# ---------------------------------------------------------------------------------------------------------------------
# Images of a file or folder, in order

def to_grey_levels(images, path):
    """An array of images as uint8; floats in [0, 1] are rounded to 256 levels. Raises ValueError for others."""
    if images.dtype == np.uint8:
        return images
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{path} holds {images.min():g} to {images.max():g}: want uint8, or floats in [0, 1]")
    return np.rint(images * 255).astype(np.uint8)


class ArrayImages:
    """`arr_0` of a .npz, compressed or not, or a .npy: (N, H, W, 3) uint8, or floats in [0, 1]. Read piece by piece."""

    def __init__(self, path):
        self.path = Path(path)
        with self.open() as (_, shape, fortran, dtype):
            good = dtype == np.uint8 or dtype in (np.float16, np.float32, np.float64)
            if len(shape) != 4 or shape[3] != 3 or fortran or not good:
                raise ValueError(f"{path} holds {dtype} of shape {shape}{' in Fortran order' if fortran else ''}: "
                                 "want images (N, H, W, 3) of uint8, or of floats in [0, 1]")
        self.shape, self.dtype = shape, dtype
        self.about = f"{shape[0]:,} images of {shape[1]} x {shape[2]}"

    @contextlib.contextmanager
    def open(self):
        """The file behind its header, and shape, order and type from it."""
        with contextlib.ExitStack() as stack:
            try:
                if self.path.suffix == ".npz":
                    file = stack.enter_context(stack.enter_context(zipfile.ZipFile(self.path)).open("arr_0.npy"))
                else:
                    file = stack.enter_context(open(self.path, "rb"))
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                header = read(file)
            except (zipfile.BadZipFile, KeyError, ValueError) as error:
                raise ValueError(f"{self.path} holds no images ({error}): want arr_0 in a .npz, or a .npy") from None
            if header[2].hasobject:
                raise ValueError(f"{self.path} holds pickled objects, which are not read: save images as uint8")
            yield (file, *header)

    def batches(self, first, last, size, workers):
        """Arrays (n, H, W, 3) uint8 with images first .. last - 1."""
        item = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with self.open() as (file, *_):
            file.seek(first * item, os.SEEK_CUR)
            for start in range(first, last, size):
                count = min(size, last - start)
                try:
                    data = bytearray(file.read(count * item))
                except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    raise ValueError(f"{self.path} is damaged near image {start} ({error}): copy it anew") from None
                if len(data) < count * item:
                    whole = start + len(data) // item
                    raise ValueError(f"{self.path} ends after {whole} of {len(self)} images: copy it anew")
                yield to_grey_levels(np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:]), self.path)

    def __len__(self):
        return self.shape[0]


class FolderImages:
    """Image files of a folder or .zip and all below, sorted by name: 8-bit RGB, or grey, which becomes RGB."""

    SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}

    def __init__(self, path):
        self.path, self.zip = Path(path), None
        if self.path.is_dir():
            names = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*")]
        else:
            try:
                self.zip = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path} cannot be read ({error}): want a folder or .zip of images") from None
            names = self.zip.namelist()
        self.names = sorted(name for name in names if Path(name).suffix.lower() in self.SUFFIXES)
        if not self.names:
            raise ValueError(f"{path} has no images: want files of {', '.join(sorted(self.SUFFIXES))}")
        self.size = self.read(self.names[0]).shape
        self.about = f"{len(self):,} images of {self.size[0]} x {self.size[1]}"

    def read(self, name):
        """One image (H, W, 3) uint8."""
        try:
            with self.zip.open(name) if self.zip else open(self.path / name, "rb") as file, Image.open(file) as image:
                if image.mode not in ("RGB", "L", "1", "P") or "transparency" in image.info:
                    kind = "transparent" if "transparency" in image.info else f"of mode {image.mode}"
                    raise ValueError(f"it is {kind}, want 8-bit RGB or grey")
                return np.asarray(image.convert("RGB"))
        except Exception as error:                                               # damaged bytes raise almost anything
            raise ValueError(f"{self.path}/{name} cannot be used ({error}): mend or remove it") from None

    def batches(self, first, last, size, workers):
        """Arrays (n, H, W, 3) uint8 with images first .. last - 1, decoded by threads ahead of time."""
        waiting = collections.deque()

        def finished():
            images = [(name, image.result()) for name, image in waiting.popleft()]
            for name, image in images:
                if image.shape != self.size:
                    raise ValueError(f"{self.path}/{name} is {image.shape[0]} x {image.shape[1]}, {self.names[0]} is "
                                     f"{self.size[0]} x {self.size[1]}: bring all to one size")
            return np.stack([image for _, image in images])

        with ThreadPoolExecutor(workers) as pool:
            for start in range(first, last, size):
                names = self.names[start:min(start + size, last)]
                waiting.append([(name, pool.submit(self.read, name)) for name in names])
                if len(waiting) > 2:
                    yield finished()
            while waiting:
                yield finished()

    def __len__(self):
        return len(self.names)


def open_images(path):
    """ArrayImages or FolderImages. Raises FileNotFoundError, or ValueError for what holds no images."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: want a .npz, a .npy, or a folder or .zip of images")
    if path.suffix in (".npz", ".npy"):
        return ArrayImages(path)
    if path.is_dir() or path.suffix == ".zip":
        return FolderImages(path)
    raise ValueError(f"{path} is no .npz, .npy, folder or .zip")


def read_statistics(path):
    """{"pool3": (mu, sigma), "spatial": ...}, as far as a .npz has them: mu and sigma, mu_s and sigma_s. {} if none."""
    if Path(path).suffix != ".npz":
        return {}
    found = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name, mu, sigma, dim in (("pool3", "mu", "sigma", 2048), ("spatial", "mu_s", "sigma_s", 2023)):
                if mu in file.files and sigma in file.files:
                    mean, cov = file[mu].astype(np.float64), file[sigma].astype(np.float64)
                    if mean.shape != (dim,) or cov.shape != (dim, dim):
                        raise ValueError(f"{mu} {mean.shape}, {sigma} {cov.shape}: want those of {dim} features")
                    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
                        raise ValueError(f"{mu} or {sigma} is not finite")
                    found[name] = mean, cov
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as statistics ({error})") from None
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Weights from outside, and files that are whole or not there

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
    """Dict of tensors from a file of torch's own format, or from the "state_dict" in it.

    weights_only=True unpickles nothing else. Raises FileNotFoundError, or ValueError for a file
    that is damaged or holds more than tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} not found: want a file of weights")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is damaged, or holds more than tensors, which is not read here: "
                         "fetch it anew, or save its state dict alone") from None
    except Exception as error:                                      # damage raises almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read ({reason}): fetch the file anew") from None
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {"": weights}
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
    """Open a binary file for writing that gets its name when it is complete and on disk, or never."""
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


# ---------------------------------------------------------------------------------------------------------------------
# The program

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")
TITLES = dict(zip(METRICS, ("FID", "sFID", "Inception Score", "precision", "recall", "KID")))
PART = {"fid": "pool3", "sfid": "spatial"}                                       # the features that they compare
OF_FEATURES = ("precision", "recall", "kid")                                     # these need the features of all images
Evaluation = collections.namedtuple("Evaluation", "pool3 spatial scores feats")


def process():
    """(rank, local_rank, world_size), as torchrun sets them; (0, 0, 1) without it."""
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in defaults.items())


@torch.no_grad()
def evaluate(model, images, metrics, keep, resize, batch_size, workers):
    """What `metrics` need of images, summed over all processes, of which each runs its share through the model.

    -> Evaluation of Statistics pool3 and spatial, ScoreSums scores, and feats (keep, 2048) of `keep` images, evenly
    spread (on rank 0); each None where it is not asked for.
    """
    rank, _, world_size = process()
    device = model.fc.weight.device
    pool3 = Statistics(2048, device) if "fid" in metrics else None
    spatial = Statistics(2023, device) if "sfid" in metrics else None
    scores = ScoreSums(len(images), 1008, device=device) if "is" in metrics else None
    kept = np.unique(np.linspace(0, len(images) - 1, min(keep, len(images))).round().astype(int)) if keep else []
    chosen, feats = np.isin(np.arange(len(images)), kept), []
    first, last = len(images) * rank // world_size, len(images) * (rank + 1) // world_size
    bar = tqdm(total=last - first, desc=f"inception {images.path.name}", unit="image", disable=rank > 0, leave=False)
    with bar, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for batch in images.batches(first, last, batch_size, workers):
            x = RESIZES[resize](torch.from_numpy(batch).to(device).permute(0, 3, 1, 2))
            out = model(x.contiguous(memory_format=torch.channels_last))
            if pool3:
                pool3.update(out.pool3)
            if spatial:
                spatial.update(out.spatial)
            if scores:
                scores.update(out.logits, first)
            feats.append(out.pool3[torch.from_numpy(chosen[first:first + len(batch)]).to(device)].cpu())
            first += len(batch)
            bar.update(len(batch))
    feats = torch.cat(feats) if keep and feats else torch.empty(0, 2048)
    if world_size > 1:
        for sums in (pool3, spatial, scores):
            if sums:
                sums.gather()
        parts = [None] * world_size
        dist.gather_object(feats, parts if rank == 0 else None)
        feats = torch.cat(parts) if rank == 0 else None
    return Evaluation(pool3, spatial, scores, feats if keep else None)


def compare(samples, reference, statistics, metrics, device):
    """Figures of an Evaluation of samples against one of the reference, or against its `statistics` where a file has
    them: name -> number."""
    figures = {}
    for name, part in PART.items():
        if name in metrics:
            theirs = statistics[part] if part in statistics else getattr(reference, part).moments()
            figures[name] = frechet_distance(*getattr(samples, part).moments(), *theirs)
    if "is" in metrics:
        figures["is"] = samples.scores.score()
    if set(OF_FEATURES) & set(metrics):
        real, ours = reference.feats.to(device), samples.feats.to(device)
        if not (real.isfinite().all() and ours.isfinite().all()):
            raise ValueError(NOT_FINITE)
        if {"precision", "recall"} & set(metrics):
            precision, recall = precision_recall(real, ours)
            figures.update({k: v for k, v in (("precision", precision), ("recall", recall)) if k in metrics})
        if "kid" in metrics:
            figures["kid"], figures["kid_std"] = kid(real, ours, subset_size=min(1000, len(real), len(ours)))
    return figures


def plan(cfg):
    """What the program is to do: images, reference images or None, statistics of a file, and metrics, in order."""
    if (cfg.save_stats is None) == (cfg.reference is None):
        raise ValueError("give SAMPLES and REFERENCE, or one set of images and --save-stats FILE")
    images, reference, statistics = open_images(cfg.samples), None, {}
    metrics = ["fid", "sfid"]
    if cfg.reference:
        statistics = read_statistics(cfg.reference)
        with contextlib.suppress(ValueError) if statistics else contextlib.nullcontext():
            reference = open_images(cfg.reference)                               # statistics may come without images
        possible = [name for name in METRICS if reference or name == "is" or PART.get(name) in statistics]
        metrics = cfg.metrics or [name for name in possible if name != "kid"]
        if not set(metrics) <= set(possible):
            raise ValueError(f"{cfg.reference} has no images, and statistics for {', '.join(possible)} only: ask for "
                             "those, or give another reference")
    for one in (images, reference):
        if one is not None and len(one) < 2:
            raise ValueError(f"{one.path} holds {one.about}: want at least 2")
    for path in (cfg.json, cfg.save_stats):
        if path and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}: make it first")
    return images, reference, statistics, metrics


def report(cfg, images, told, fewest, figures):
    """Print a table of figures, with what they are of, and write them where --json says."""
    weights = cfg.weights or INCEPTION[0].split("/")[-1]
    print(f"samples    {cfg.samples}: {images.about}\nreference  {cfg.reference}: {told}\n"
          f"inception  {weights}, resize {cfg.resize}\n")
    for name, title in TITLES.items():
        if name in figures:
            spread = f" +- {figures['kid_std']:.6f} over subsets" if name == "kid" else ""
            print(f"{title:16}{figures[name]:12.{6 if name == 'kid' else 4}f}{spread}")
    if fewest < 2048 and PART.keys() & figures.keys():
        print("\nfewer than 2,048 images: FID and sFID are far from those of many; compare with as many only")
    if cfg.json:
        facts = dict(samples=str(cfg.samples), num_samples=len(images), reference=f"{cfg.reference}: {told}",
                     weights=str(weights), resize=cfg.resize)
        with atomic_file(cfg.json) as file:
            file.write((json.dumps({**facts, **figures}, indent=2) + "\n").encode())


def run(cfg):
    """Look at what was given, before any work; evaluate; let rank 0 compare, print and write."""
    (rank, local_rank, world_size), cuda = process(), torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    images, reference, statistics, metrics = plan(cfg)
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        torch.cuda.set_device(device) if cuda else None
    if local_rank > 0:
        dist.barrier()                                                           # the first of a node fetches weights
    model = InceptionV3.from_published(cfg.weights).to(device)
    if local_rank == 0 and world_size > 1:
        dist.barrier()
    options, of_features = (cfg.resize, cfg.batch_size, cfg.workers), [m for m in metrics if m in OF_FEATURES]
    ours = evaluate(model, images, metrics, len(images) if of_features else 0, *options)
    theirs, rest = None, [name for name in metrics if name in PART and PART[name] not in statistics]
    if reference and (rest or of_features):
        theirs = evaluate(model, reference, rest, (cfg.references or len(reference)) if of_features else 0, *options)
    if rank > 0:
        return
    if cfg.save_stats:
        (mu, sigma), (mu_s, sigma_s) = ours.pool3.moments(), ours.spatial.moments()
        with atomic_file(cfg.save_stats) as file:
            np.savez(file, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
        print(f"statistics of {images.about} of {cfg.samples}, resize {cfg.resize}, in {cfg.save_stats}")
        return
    told = ["its statistics"] if len(rest) < len(PART.keys() & set(metrics)) else []
    told += [reference.about] if rest else []
    told += [f"{len(theirs.feats):,} images for {', '.join(of_features)}"] if of_features else []
    fewest = min(len(images), len(reference)) if rest else len(images)
    report(cfg, images, "; ".join(told) or "not needed", fewest, compare(ours, theirs, statistics, metrics, device))


def main():
    """Read the flags and run; a mistake of the user ends in one line and exit status 2."""
    def stop(message):
        print(f"fid.py: {message}", file=sys.stderr)
        sys.exit(2)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop                                                          # one line, without the usage
    parser.add_argument("samples", type=Path, help=".npz, .npy, folder or .zip of images")
    parser.add_argument("reference", type=Path, nargs="?", help="the same, or a .npz of statistics")
    parser.add_argument("--metrics", nargs="+", choices=METRICS,
                        help="which (default: of the first five all that the reference allows)")
    parser.add_argument("--resize", choices=sorted(RESIZES), default="tf1",
                        help="how images become 299 x 299 (default: tf1, ADM's)")
    parser.add_argument("--references", type=int, default=10000,
                        help="images of the reference, evenly spread, for precision, recall and KID; 0 takes all")
    parser.add_argument("--weights", type=Path, help="file of the network's weights (default: fetched into the cache)")
    parser.add_argument("--save-stats", type=Path, metavar="FILE", help="write a .npz of one set's statistics")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once on a process")
    parser.add_argument("--workers", type=int, default=4, help="threads that decode images, for every process")
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


if __name__ == "__main__":
    main()
