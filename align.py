"""DINOv2, the alignment of latents with its features, and what the alignment buys: masks and depth out of a latent.

    patch*, cls* = DINOv2(resize(x)), frozen                    z (N, C, h, w) = a latent of the autoencoder
    patch = MLPpatch(fold(z))       (N, T, D)                   every token from the latent cells at its place
    cls   = MLPcls(pool(z))         (N, D)
    L_align = d(patch, patch*) + d(cls, cls*)                   d = w_cos (1 - cosine) + w_l1 smooth_l1

Method: "Exploring Representation-Aligned Latent Space for Better Generation", arXiv 2502.00359. d, its weights, the
widths of the MLPs and the pooling are choices of this file: the paper's README does not state them. DINOv2 is Oquab et
al., arXiv 2304.07193; with registers, Darcet et al., arXiv 2309.16588. Parameter names are the official ones.

    x (N, 3, H, W) images in [-1, 1]     T tokens of width D on a grid (gh, gw), row by row

    heads = AlignmentHeads(latent_channels=4, embed_dim=1024, fold=2)
    patch, cls = heads(z);  loss, parts = align_loss(patch, cls, patch_target, cls_target)
    mask = segmentation_head(heads.feature_map(z)).argmax(1)    no training needed: the head was made for DINOv2 itself
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # DINOv2's images are normalised so


# ---------------------------------------------------------------------------------------------------------------------
# DINOv2

class PatchEmbed(nn.Module):
    """(N, 3, H, W) -> (N, T, D): one linear map of every patch."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


# === shared by align.py, sit.py and dit.py: begin ===
class Attention(nn.Module):
    """Multi-head self-attention over T tokens."""

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, T, D = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)                              # (N, heads, T, D / heads)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))
# === shared by align.py, sit.py and dit.py: end ===


class Mlp(nn.Module):
    """Two linear layers with the exact GELU."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """silu(x W1) * (x W2), then W3: the MLP of ViT-g."""

    def __init__(self, dim, hidden):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class LayerScale(nn.Module):
    """A learned factor for every channel of a residual branch."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(self, dim, num_heads, ffn):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[ffn](dim, 4 * dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """The vision transformer of DINOv2, official names. ViT-S/14 is DINOv2(384, 12, 6), B (768, 12, 12), L (1024, 24,
    16), g (1536, 40, 24, ffn="swiglu"). Position embeddings are made for img_size and interpolated for other sizes.

    Images come normalised by IMAGENET_MEAN and IMAGENET_STD, their sides multiples of patch_size; see `teacher_input`.
    """

    def __init__(self, embed_dim=384, depth=12, num_heads=6, patch_size=14, img_size=518, num_registers=0, ffn="mlp"):
        super().__init__()
        self.embed_dim, self.patch_size, self.num_registers = embed_dim, patch_size, num_registers
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 1e-6)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (img_size // patch_size) ** 2, embed_dim) * 0.02)
        if num_registers:
            self.register_tokens = nn.Parameter(torch.randn(1, num_registers, embed_dim) * 1e-6)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, ffn) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))                # of the pre-training; never used here
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def interpolated_pos_embed(self, gh, gw):
        """Position embeddings (1, 1 + gh gw, D) for a grid of gh x gw tokens."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if gh == gw == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().view(1, side, side, -1).permute(0, 3, 1, 2)
        if self.num_registers:                                                   # the register models were trained so
            grid = F.interpolate(grid, size=(gh, gw), mode="bicubic", antialias=True)
        else:                                                                    # the others with an offset of 0.1
            scale = ((gh + 0.1) / side, (gw + 0.1) / side)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    def tokens(self, x):
        """x (N, 3, H, W) -> (N, 1 + registers + T, D): what goes into the first block."""
        N, _, H, W = x.shape
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"image of {H} x {W} does not divide into patches of {self.patch_size}: resize it first")
        tokens = torch.cat([self.cls_token.expand(N, -1, -1), self.patch_embed(x)], dim=1)
        tokens = tokens + self.interpolated_pos_embed(H // self.patch_size, W // self.patch_size)
        if self.num_registers:                                                   # between cls and patches, no position
            tokens = torch.cat([tokens[:, :1], self.register_tokens.expand(N, -1, -1), tokens[:, 1:]], dim=1)
        return tokens

    def forward_features(self, x):
        """x (N, 3, H, W) -> dict of x_norm_clstoken (N, D), x_norm_patchtokens (N, T, D), x_prenorm (N, all, D)."""
        h = self.tokens(x)
        for block in self.blocks:
            h = block(h)
        norm = self.norm(h)
        return {"x_norm_clstoken": norm[:, 0], "x_norm_patchtokens": norm[:, 1 + self.num_registers:], "x_prenorm": h}

    def forward(self, x):
        """x (N, 3, H, W) -> class token (N, D) after the last norm."""
        return self.forward_features(x)["x_norm_clstoken"]


def teacher_input(x, size):
    """Images (N, 3, H, W) in [-1, 1] -> (N, 3, size, size) as DINOv2 wants them: ImageNet statistics, bicubic."""
    mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = ((x + 1) / 2 - mean) / std
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True)


# ---------------------------------------------------------------------------------------------------------------------
# Alignment

def mlp(in_dim, hidden_dim, out_dim):
    """Three linear layers with SiLU between them."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(),
                         nn.Linear(hidden_dim, out_dim))


class AlignmentHeads(nn.Module):
    """MLPpatch and MLPcls: latents -> features of the teacher.

    fold x fold latent cells make one token: 1 gives every cell a token of its own, 2 fits DINOv2 on 224 x 224 pixels
    (16 x 16 tokens) to a latent of 32 x 32. MLPcls reads the latent averaged to pool x pool cells (1: their mean, only
    C numbers). The MLPs predict targets standardised per channel; `standardize` and the buffers do that, and
    `feature_map` and `class_token` undo it, so that heads made for the teacher's features can be used on a latent.
    """

    def __init__(self, latent_channels=4, embed_dim=1024, hidden_dim=2048, fold=2, pool=4):
        super().__init__()
        self.config = dict(latent_channels=latent_channels, embed_dim=embed_dim, hidden_dim=hidden_dim, fold=fold,
                           pool=pool)
        self.fold, self.pool = fold, pool
        self.mlp_patch = mlp(latent_channels * fold * fold, hidden_dim, embed_dim)
        self.mlp_cls = mlp(latent_channels * pool * pool, hidden_dim, embed_dim)
        for name in ("patch", "cls"):
            self.register_buffer(f"{name}_mean", torch.zeros(embed_dim))
            self.register_buffer(f"{name}_std", torch.ones(embed_dim))

    def forward(self, z):
        """z (N, C, h, w) -> standardised patch tokens (N, (h / fold)(w / fold), D) and class tokens (N, D).

        Raises ValueError where h or w is not a multiple of fold.
        """
        if z.shape[2] % self.fold or z.shape[3] % self.fold:
            raise ValueError(f"a latent of {z.shape[2]} x {z.shape[3]} does not fold by {self.fold}: choose fold 1")
        cells = F.pixel_unshuffle(z, self.fold).flatten(2).transpose(1, 2)       # (N, T, C fold^2)
        pooled = F.adaptive_avg_pool2d(z, self.pool).flatten(1)                  # (N, C pool^2)
        return self.mlp_patch(cells), self.mlp_cls(pooled)

    @torch.no_grad()
    def fit_statistics(self, patch_tokens, cls_token):
        """Take mean and standard deviation of every channel from targets (N, T, D) and (N, D)."""
        for name, tokens in (("patch", patch_tokens.flatten(0, 1)), ("cls", cls_token)):
            getattr(self, f"{name}_mean").copy_(tokens.mean(0))
            getattr(self, f"{name}_std").copy_(tokens.std(0).clamp(min=1e-6))

    def standardize(self, patch_tokens, cls_token):
        """The teacher's tokens (N, T, D) and (N, D) as the MLPs predict them."""
        return (patch_tokens - self.patch_mean) / self.patch_std, (cls_token - self.cls_mean) / self.cls_std

    def feature_map(self, z):
        """z (N, C, h, w) -> teacher-like features (N, D, h / fold, w / fold), for the heads below."""
        patch, _ = self(z)
        patch = patch * self.patch_std + self.patch_mean
        return patch.transpose(1, 2).reshape(z.shape[0], -1, z.shape[2] // self.fold, z.shape[3] // self.fold)

    def class_token(self, z):
        """z (N, C, h, w) -> teacher-like class tokens (N, D)."""
        return self(z)[1] * self.cls_std + self.cls_mean


def align_loss(patch, cls, patch_target, cls_target, cosine_weight=1.0, l1_weight=0.1, patch_weight=1.0,
               cls_weight=1.0):
    """L_align and a dict of its parts (detached): cos_patch and cos_cls are cosine similarities, l1_* smooth L1 losses.

    patch and patch_target (N, T, D), cls and cls_target (N, D); averaged over batch and positions. The targets carry no
    gradient. Smooth L1 is there since the cosine leaves the length of a feature free, which the heads need.
    """
    total, parts = 0, {}
    for name, weight, x, target in (("patch", patch_weight, patch, patch_target.detach()),
                                    ("cls", cls_weight, cls, cls_target.detach())):
        cosine, l1 = F.cosine_similarity(x, target, dim=-1).mean(), F.smooth_l1_loss(x, target)
        total = total + weight * (cosine_weight * (1 - cosine) + l1_weight * l1)
        parts[f"cos_{name}"], parts[f"l1_{name}"] = cosine.detach(), l1.detach()
    return total, parts


# ---------------------------------------------------------------------------------------------------------------------
# Heads on features

class SegmentationHead(nn.Module):
    """DINOv2's linear segmentation head: features (N, D, gh, gw) -> logits (N, num_classes, gh, gw)."""

    def __init__(self, embed_dim, num_classes):
        super().__init__()
        self.bn = nn.BatchNorm2d(embed_dim)
        self.conv_seg = nn.Conv2d(embed_dim, num_classes, 1)

    def forward(self, features):
        return self.conv_seg(self.bn(features))


class DepthHead(nn.Module):
    """DINOv2's linear depth head: features (N, D, gh, gw) and class tokens (N, D) -> depth (N, 1, 4 gh, 4 gw).

    depth = sum_k p_k d_k with p_k = (relu(a_k) + 0.1) / sum_j (relu(a_j) + 0.1) over 256 depths d_k in [min, max].
    """

    def __init__(self, embed_dim, min_depth=0.001, max_depth=10.0, num_bins=256):
        super().__init__()
        self.conv_depth = nn.Conv2d(2 * embed_dim, num_bins, 1)
        self.register_buffer("bins", torch.linspace(min_depth, max_depth, num_bins), persistent=False)

    def forward(self, features, cls_token):
        x = torch.cat([features, cls_token[:, :, None, None].expand_as(features)], dim=1)
        # the official head resizes before its convolution: 1 x 1, so the order is free, and this one 16 times cheaper
        logits = F.interpolate(self.conv_depth(x), scale_factor=4, mode="bilinear", align_corners=False)
        p = F.relu(logits) + 0.1
        return torch.einsum("nkhw,k->nhw", p / p.sum(dim=1, keepdim=True), self.bins)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def pca_rgb(features):
    """Features (N, D, gh, gw) -> (N, 3, gh, gw) in [0, 1]: first three principal components over all N as colours."""
    N, D, gh, gw = features.shape
    x = features.permute(0, 2, 3, 1).reshape(-1, D).double()
    x = x - x.mean(0)
    components = torch.linalg.eigh(x.T @ x)[1][:, -3:].flip(1)                   # (D, 3), largest variance first
    x = x @ (components * components.sum(0).sign())                              # an eigenvector has no sign of its own
    x_sorted = x.sort(dim=0).values
    low, high = x_sorted[len(x) // 100], x_sorted[-1 - len(x) // 100]            # the outer hundredths are cut
    x = ((x - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return x.float().reshape(N, gh, gw, 3).permute(0, 3, 1, 2)


def colorize_mask(mask, num_classes):
    """Class indices (N, H, W) -> (N, 3, H, W) in [0, 1]: hues a golden angle apart, alternating in brightness."""
    k = torch.arange(num_classes, device=mask.device)
    hue = (k * 0.618034 + 0.55) % 1.0
    channel = (torch.tensor([5.0, 3.0, 1.0], device=mask.device)[:, None] + 6 * hue) % 6
    value = torch.where(k % 2 == 0, 0.95, 0.7)
    palette = value - value * 0.65 * torch.minimum(channel, 4 - channel).clamp(0, 1)         # (3, num_classes)
    return palette[:, mask.long()].transpose(0, 1)


def colorize_depth(depth, near=None, far=None):
    """Depth (N, H, W) -> (N, 3, H, W) in [0, 1]: near is yellow, far is violet; the range is the data's by default."""
    near = depth.min() if near is None else near
    far = depth.max() if far is None else far
    anchors = torch.tensor([[0.99, 0.91, 0.14], [0.37, 0.79, 0.38], [0.13, 0.57, 0.55], [0.23, 0.32, 0.55],
                            [0.27, 0.0, 0.33]], device=depth.device)             # five colours of the viridis scale
    position = ((depth - near) / (far - near)).clamp(0, 1) * (len(anchors) - 1)
    low = position.floor().long().clamp(max=len(anchors) - 2)
    share = (position - low).unsqueeze(-1)
    return (anchors[low] * (1 - share) + anchors[low + 1] * share).permute(0, 3, 1, 2)
