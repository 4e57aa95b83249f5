"""Frechet distance between two sets of features.

    d^2 = |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

of the Gaussians N(mu, sigma) fitted to each set: Dowson and Landau, 1982; Heusel et al., arXiv 1706.08500. It is called
FID where the features are those of the published Inception network, and by another name (FD) where they are not.

    feats (N, D) one row an image
"""
import numpy as np


def feature_statistics(feats):
    """feats (N, D) -> float64 mean (D,) and covariance (D, D), denominator N - 1. Raises ValueError for N < 2."""
    feats = np.asarray(feats, dtype=np.float64)
    if feats.ndim != 2 or len(feats) < 2:
        raise ValueError(f"features have shape {feats.shape}: want (N, D) with at least two rows")
    return feats.mean(axis=0), np.cov(feats, rowvar=False).reshape(feats.shape[1], feats.shape[1])


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians with means (D,) and covariances (D, D); finite and never negative.

    tr((sigma1 sigma2)^(1/2)) is the sum of the singular values of sigma1^(1/2) sigma2^(1/2): symmetric roots, which
    exist for covariances of any rank, unlike the root of the product. Raises ValueError for other shapes.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == mu1.shape * 2:
        raise ValueError(f"shapes {mu1.shape}, {sigma1.shape}, {mu2.shape}, {sigma2.shape}: want (D,), (D, D) twice")

    def root(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T

    cross = np.linalg.svd(root(sigma1) @ root(sigma2), compute_uv=False).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return float(max(distance, 0.0))
