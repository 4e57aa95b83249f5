"""DINOv2, the alignment of latents with its features, and what the alignment buys: masks and depth out of a latent.

    patch*, cls* = DINOv2(resize(x)), frozen                    z (N, C, h, w) = a latent of the autoencoder
    patch = MLPpatch(fold(z))       (N, T, D)                   every token from the latent cells at its place
    cls   = MLPcls(pool(z))         (N, D)
    L_align = d(patch, patch*) + d(cls, cls*)                   d = w_cos (1 - cosine) + w_l1 smooth_l1

Method: "Exploring Representation-Aligned Latent Space for Better Generation", arXiv 2502.00359. The
paper's README does not state d, nor the widths of the MLPs, nor the pooling: d is known at second hand
(see FORMS), the others are choices of this file. DINOv2 is Oquab et al., arXiv 2304.07193; with
registers, Darcet et al., arXiv 2309.16588. Parameter names are the official ones.

    x (N, 3, H, W) images in [-1, 1]     T tokens of width D on a grid (gh, gw), row by row

    teacher = load_teacher("dinov2_vitb14")
    heads = AlignmentHeads(latent_channels=4, embed_dim=768, fold=2)
    patch, cls = heads(z);  loss, parts = align_loss(patch, cls, *heads.standardize(*teacher_tokens(teacher, x, 224)))
    mask = segmentation_head(heads.feature_map(z)).argmax(1)    no training needed: the head was made for DINOv2 itself
"""
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import urllib.request
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

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
def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v of q, k, v (N, heads, T, d): what torch's kernel computes."""
    weights = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])      # (N, heads, T, T)
    weights = weights.softmax(dim=-1)                               # a token's shares sum to 1
    return weights @ v                                              # (N, heads, T, d)


class Attention(nn.Module):
    """Multi-head self-attention over T tokens, (N, T, D) -> (N, T, D).

    `fused` takes torch's kernel, which never holds the T x T weights in memory; False takes the
    lines above.
    """

    fused = True

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, T, D = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (N, heads, T, D / heads) each
        attend = F.scaled_dot_product_attention if self.fused else attention
        x = attend(q, k, v)                                         # (N, heads, T, D / heads)
        x = x.transpose(1, 2).reshape(N, T, D)                      # heads side by side
        return self.proj(x)                                         # (N, T, D)
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
            raise ValueError(f"image of {H} x {W} does not divide into patches of {self.patch_size}: resize or pad it")
        tokens = torch.cat([self.cls_token.expand(N, -1, -1), self.patch_embed(x)], dim=1)
        tokens = tokens + self.interpolated_pos_embed(H // self.patch_size, W // self.patch_size)
        if self.num_registers:                                                   # between cls and patches, no position
            tokens = torch.cat([tokens[:, :1], self.register_tokens.expand(N, -1, -1), tokens[:, 1:]], dim=1)
        return tokens

    def forward_features(self, x):
        """x (N, 3, H, W) -> dict of x_norm_clstoken (N, D), x_norm_regtokens (N, registers, D), x_norm_patchtokens
        (N, T, D), and x_prenorm (N, 1 + registers + T, D) before the last norm."""
        h = self.tokens(x)
        for block in self.blocks:
            h = block(h)
        norm, first = self.norm(h), 1 + self.num_registers
        return {"x_norm_clstoken": norm[:, 0], "x_norm_regtokens": norm[:, 1:first],
                "x_norm_patchtokens": norm[:, first:], "x_prenorm": h}

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        """Patch tokens (N, T, D) after the last n blocks, or after those numbered in n, as a tuple in their order;
        reshape: as maps (N, D, gh, gw); return_class_token: pairs with the class token (N, D); norm: by the last norm.
        """
        wanted = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        h, layers = self.tokens(x), []
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i in wanted:
                layers.append(self.norm(h) if norm else h)
        patches = [layer[:, 1 + self.num_registers:] for layer in layers]
        if reshape:
            grid = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
            patches = [patch.transpose(1, 2).unflatten(2, grid) for patch in patches]
        return tuple(zip(patches, [layer[:, 0] for layer in layers])) if return_class_token else tuple(patches)

    def forward(self, x):
        """x (N, 3, H, W) -> class token (N, D) after the last norm."""
        return self.forward_features(x)["x_norm_clstoken"]


# Published models: arguments of DINOv2, and sha256 of the file where it is known. "_reg" is the one with 4 registers.
DINOV2 = {
    "dinov2_vits14": (dict(embed_dim=384, depth=12, num_heads=6),
                      "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": (dict(embed_dim=768, depth=12, num_heads=12),
                      "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14": (dict(embed_dim=1024, depth=24, num_heads=16),
                      "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "dinov2_vitg14": (dict(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"), None)}
DINOV2.update({f"{name}_reg": (dict(arguments, num_registers=4), None) for name, (arguments, _) in DINOV2.items()})
DINOV2["dinov2_vitb14_reg"] = (DINOV2["dinov2_vitb14_reg"][0],
                               "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71")
DINOV2_ADDRESS = "https://dl.fbaipublicfiles.com/dinov2"


def load_dinov2(name, path=None):
    """The frozen DINOv2 of a published name, from a local file or fetched on first use.

    Raises ValueError for another name or a file that does not fit, OSError where it cannot be had.
    """
    if name not in DINOV2:
        raise ValueError(f"no DINOv2 is called {name!r}: choose one of {', '.join(DINOV2)}")
    arguments, sha256 = DINOV2[name]
    base = name.removesuffix("_reg")
    file = f"{base}{'_reg4' if name.endswith('_reg') else ''}_pretrain.pth"
    path = path or fetch(f"{DINOV2_ADDRESS}/{base}/{file}", sha256)
    model = DINOv2(**arguments)
    load_strict(model, load_torch(path), path)
    return model.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Teachers

# This is the one place that knows what a teacher is. To align with another model (CLIP, MAE, a
# ResNet), let load_teacher return for its name a frozen module with
#
#     embed_dim, patch_size, num_registers    D, pixels a side that make one token, and 0
#     norm                                    its last norm, or nn.LayerNorm(D) where it has none
#     forward_features(x) -> dict             of "x_norm_patchtokens" (N, T, D), a square grid row by
#                                             row, and "x_norm_clstoken" (N, D)
#
# x comes from teacher_input; a model with other statistics than ImageNet's undoes them first. A
# ResNet's last map, flattened, is such tokens, and its mean is such a class token.

def load_teacher(name_or_folder):
    """The frozen teacher: a published DINOv2 by its name, or a folder with config.json (arguments of
    DINOv2) and dinov2.pth (a state dict), as demo/teacher.py writes it.

    Raises FileNotFoundError where there is neither, ValueError for files that do not fit, OSError
    where a published one cannot be had.
    """
    if str(name_or_folder) in DINOV2:
        return load_dinov2(str(name_or_folder))
    config, weights = (Path(name_or_folder) / name for name in ("config.json", "dinov2.pth"))
    for path in (config, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found: a teacher is a folder with config.json and "
                                    f"dinov2.pth, or one of {', '.join(DINOV2)}")
    try:
        model = DINOv2(**json.loads(config.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config} does not hold the arguments of DINOv2 ({error}): write it anew"
                         ) from None
    load_strict(model, load_torch(weights), weights)
    return model.eval().requires_grad_(False)


def teacher_input(x, size):
    """Images (N, 3, H, W) in [-1, 1] -> (N, 3, size, size) as DINOv2 wants them: ImageNet statistics, bicubic."""
    mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = ((x + 1) / 2 - mean) / std
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True)


@torch.no_grad()
def teacher_tokens(teacher, x, size, target="norm"):
    """Patch tokens (N, T, D) and class tokens (N, D) of images x (N, 3, H, W) in [-1, 1], seen at size x size pixels.

    target: "norm", after the teacher's last norm, as segmentation heads want them; "prenorm", before it, as depth heads
    do. Nothing here has a gradient.
    """
    out = teacher.forward_features(teacher_input(x, size))
    if target == "norm":
        return out["x_norm_patchtokens"], out["x_norm_clstoken"]
    return out["x_prenorm"][:, 1 + teacher.num_registers:], out["x_prenorm"][:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Alignment

def mlp(in_dim, hidden_dim, out_dim):
    """Three linear layers with SiLU between them."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(),
                         nn.Linear(hidden_dim, out_dim))


class AlignmentHeads(nn.Module):
    """MLPpatch and MLPcls: latents -> features of the teacher.

    fold x fold latent cells make one token: 2 fits DINOv2 on 224 x 224 pixels (16 x 16 tokens) to a latent of 32 x 32,
    1 gives every cell a token of its own (448 pixels). Where the teacher's grid is no such fraction of the latent's,
    `grid` (gh, gw) names it, and the latent is resized to fold times that first. MLPcls reads the latent averaged to
    pool x pool cells (1: their mean, only C numbers).

    The MLPs may predict targets standardised per channel: `fit_statistics` stores mean and deviation, `standardize`
    applies them, `feature_map` and `class_token` undo it, so that heads made for the teacher work on a latent. `target`
    tells what was learned: tokens after the teacher's last norm ("norm"), or before it ("prenorm"); then the norm's own
    parameters are stored too, and both kinds can be had.
    """

    def __init__(self, latent_channels=4, embed_dim=1024, hidden_dim=2048, fold=2, pool=4, target="norm", grid=None):
        super().__init__()
        self.config = dict(latent_channels=latent_channels, embed_dim=embed_dim, hidden_dim=hidden_dim, fold=fold,
                           pool=pool, target=target, grid=grid)
        self.fold, self.pool, self.target, self.grid = fold, pool, target, grid
        self.mlp_patch = mlp(latent_channels * fold * fold, hidden_dim, embed_dim)
        self.mlp_cls = mlp(latent_channels * pool * pool, hidden_dim, embed_dim)
        for name in ("patch", "cls"):
            self.register_buffer(f"{name}_mean", torch.zeros(embed_dim))
            self.register_buffer(f"{name}_std", torch.ones(embed_dim))
        if target == "prenorm":
            self.register_buffer("norm_weight", torch.ones(embed_dim))
            self.register_buffer("norm_bias", torch.zeros(embed_dim))

    def grid_of(self, z):
        """(gh, gw): the token grid of latents z (N, C, h, w). Raises ValueError where h or w does not fold."""
        if self.grid is None and (z.shape[2] % self.fold or z.shape[3] % self.fold):
            raise ValueError(f"a latent of {z.shape[2]} x {z.shape[3]} does not fold by {self.fold}: give a grid")
        return tuple(self.grid or (z.shape[2] // self.fold, z.shape[3] // self.fold))

    def forward(self, z):
        """z (N, C, h, w) -> patch tokens (N, gh gw, D) and class tokens (N, D), standardised as in the loss."""
        gh, gw = self.grid_of(z)
        cells = (gh * self.fold, gw * self.fold)
        folded = z if z.shape[2:] == cells else F.interpolate(z, size=cells, mode="bilinear", antialias=True)
        folded = F.pixel_unshuffle(folded, self.fold).flatten(2).transpose(1, 2)               # (N, T, C fold^2)
        pooled = F.adaptive_avg_pool2d(z, self.pool).flatten(1)                                # (N, C pool^2)
        return self.mlp_patch(folded), self.mlp_cls(pooled)

    @torch.no_grad()
    def fit_statistics(self, patch_tokens, cls_token):
        """Take mean and standard deviation of every channel from targets (N, T, D) and (N, D)."""
        for name, tokens in (("patch", patch_tokens.flatten(0, 1)), ("cls", cls_token)):
            getattr(self, f"{name}_mean").copy_(tokens.mean(0))
            getattr(self, f"{name}_std").copy_(tokens.std(0).clamp(min=1e-6))

    @torch.no_grad()
    def fit_norm(self, norm):
        """Take the parameters of the teacher's last norm, if the targets are tokens before it."""
        if self.target == "prenorm":
            self.norm_weight.copy_(norm.weight)
            self.norm_bias.copy_(norm.bias)

    def standardize(self, patch_tokens, cls_token):
        """The teacher's tokens (N, T, D) and (N, D) as the MLPs predict them."""
        return (patch_tokens - self.patch_mean) / self.patch_std, (cls_token - self.cls_mean) / self.cls_std

    def normed(self, tokens, wanted):
        """Tokens (..., D) in the teacher's own scale, after its last norm if wanted, else before it."""
        if wanted and self.target == "prenorm":
            return F.layer_norm(tokens, tokens.shape[-1:], self.norm_weight, self.norm_bias, eps=1e-6)
        if not wanted and self.target == "norm":
            raise ValueError("tokens before the last norm are wanted from MLPs that learned those after it: "
                             "train them with target 'prenorm'")
        return tokens

    def feature_map(self, z, normed=True):
        """z (N, C, h, w) -> teacher-like features (N, D, gh, gw), for the heads below. Raises ValueError for features
        before the last norm (normed=False) that were not learned."""
        patch = self(z)[0] * self.patch_std + self.patch_mean
        return self.normed(patch, normed).transpose(1, 2).unflatten(2, self.grid_of(z))

    def class_token(self, z, normed=True):
        """z (N, C, h, w) -> teacher-like class tokens (N, D)."""
        return self.normed(self(z)[1] * self.cls_std + self.cls_mean, normed)


# Forms of the align loss: factors (w_cos, w_l1). Those of "both" are the paper's at second hand: the
# paper's README states none, and a public trainer that cites it has these, as AM-RADIO
# (arXiv 2312.06709) has them.
FORMS = {"both": (0.9, 0.1), "cosine": (1.0, 0.0), "l1": (0.0, 1.0)}


def align_loss(patch, cls, patch_target, cls_target, form="both", patch_weight=1.0, cls_weight=1.0):
    """L_align and a dict of its parts (detached): cos_patch and cos_cls are cosine similarities, l1_* smooth L1 losses.

        d = w_cos (1 - cosine) + w_l1 smooth_l1                 L_align = patch_weight d(patch) + cls_weight d(cls)

    patch and patch_target (N, T, D), cls and cls_target (N, D); averaged over batch and positions. The targets get no
    gradient. Smooth L1 is there since the cosine leaves the length of a feature free, which the heads need.
    """
    (w_cos, w_l1), total, parts = FORMS[form], 0, {}
    for name, weight, x, target in (("patch", patch_weight, patch, patch_target.detach()),
                                    ("cls", cls_weight, cls, cls_target.detach())):
        cosine, l1 = F.cosine_similarity(x, target, dim=-1).mean(), F.smooth_l1_loss(x, target)
        total = total + weight * (w_cos * (1 - cosine) + w_l1 * l1)
        parts[f"cos_{name}"], parts[f"l1_{name}"] = cosine.detach(), l1.detach()
    return total, parts


# ---------------------------------------------------------------------------------------------------------------------
# Heads on features

def check_width(features, wanted, head):
    """ValueError where features (N, D, ...) are not as wide as a head wants them."""
    if features.shape[1] != wanted:
        raise ValueError(f"a {head} for width {wanted} got features of {features.shape[1]}: it is of another teacher")


class ClassificationHead(nn.Linear):
    """DINOv2's linear classifier: class tokens (N, D) of one or four blocks and the last one's patch tokens (N, T, D)
    -> logits (N, num_classes); all tokens are normed."""

    def __init__(self, embed_dim, num_classes=1000, num_layers=1):
        super().__init__((num_layers + 1) * embed_dim, num_classes)

    def forward(self, patch_tokens, *cls_tokens):
        x = torch.cat([*cls_tokens, patch_tokens.mean(1)], dim=1)
        check_width(x, self.in_features, "classification head")
        return super().forward(x)


class SegmentationHead(nn.Module):
    """DINOv2's linear segmentation head: normed features (N, D, gh, gw) -> logits (N, num_classes, gh, gw)."""

    def __init__(self, embed_dim, num_classes):
        super().__init__()
        self.bn = nn.BatchNorm2d(embed_dim)
        self.conv_seg = nn.Conv2d(embed_dim, num_classes, 1)

    def forward(self, features):
        check_width(features, self.bn.num_features, "segmentation head")
        return self.conv_seg(self.bn(features))


class DepthHead(nn.Module):
    """DINOv2's linear depth head: features (N, D, gh, gw) and class tokens (N, D), or lists of them from four blocks ->
    depth (N, 1, 4 gh, 4 gw). The published heads want features before the norm.

    depth = sum_k p_k d_k with p_k = (relu(a_k) + 0.1) / sum_j (relu(a_j) + 0.1) over 256 depths d_k in [min, max].
    The official hub builds every linear head with a maximum of 80; NYU's heads were trained with 10, KITTI's with 80.
    """

    def __init__(self, embed_dim, min_depth=0.001, max_depth=10.0, num_bins=256, num_layers=1):
        super().__init__()
        self.conv_depth = nn.Conv2d(2 * num_layers * embed_dim, num_bins, 1)
        self.register_buffer("bins", torch.linspace(min_depth, max_depth, num_bins), persistent=False)

    def forward(self, features, cls_token):
        layers = [(features, cls_token)] if torch.is_tensor(features) else zip(features, cls_token)
        pairs = [torch.cat([patch, cls[:, :, None, None].expand_as(patch)], dim=1) for patch, cls in layers]
        x = torch.cat(pairs, dim=1)
        check_width(x, self.conv_depth.in_channels, "depth head")
        # the official head resizes before its convolution: 1 x 1, so the order is free, and this one 16 times cheaper
        logits = F.interpolate(self.conv_depth(x), scale_factor=4, mode="bilinear", align_corners=False)
        p = F.relu(logits) + 0.1
        return torch.einsum("nkhw,k->nhw", p / p.sum(dim=1, keepdim=True), self.bins)[:, None]


HEADS = {"ade20k": (SegmentationHead, dict(num_classes=150)), "voc2012": (SegmentationHead, dict(num_classes=21)),
         "nyu": (DepthHead, dict(max_depth=10.0)), "kitti": (DepthHead, dict(max_depth=80.0))}


def load_head(name, path=None):
    """A published head, from a local file or fetched on first use: for example dinov2_vitb14_ade20k_linear_head,
    dinov2_vitb14_voc2012_ms_head, dinov2_vits14_nyu_linear_head, dinov2_vitl14_kitti_linear4_head, or the classifiers
    dinov2_vits14_linear_head, dinov2_vits14_reg4_linear4_head. Raises as load_dinov2 does."""
    found = re.fullmatch(r"(dinov2_vit[sblg]14)(?:_reg4)?_(?:(ade20k|voc2012|nyu|kitti)_)?(linear4?|ms)_head", name)
    if not found:
        raise ValueError(f"no head of DINOv2 is called {name!r}: want for example dinov2_vitb14_ade20k_linear_head")
    width, layers = DINOV2[found[1]][0]["embed_dim"], 4 if found[3] in ("linear4", "ms") else 1
    network, arguments = HEADS.get(found[2], (ClassificationHead, {}))
    if network is SegmentationHead:
        head = network(layers * width, **arguments)
    else:
        head = network(width, num_layers=layers, **arguments)
    path = path or fetch(f"{DINOV2_ADDRESS}/{found[1]}/{name}.pth")
    weights = {k.removeprefix("decode_head."): v for k, v in load_torch(path).items()}
    load_strict(head, weights, path)
    return head.eval().requires_grad_(False)


def center_pad(x, multiple):
    """Zeros around images (N, C, H, W), so that their sides are multiples; what is odd goes to the right and below."""
    pads = [(-size % multiple // 2, -size % multiple - -size % multiple // 2) for size in (x.shape[3], x.shape[2])]
    return F.pad(x, (*pads[0], *pads[1]))


def segment(dinov2, head, x):
    """Logits (N, classes, H, W) of normalised images x (N, 3, H, W) by a published head, as the official code does it:
    centred in zeros to whole patches, then resized to H x W with the border that was added still in it."""
    layers = head.bn.num_features // dinov2.embed_dim
    maps = dinov2.get_intermediate_layers(center_pad(x, dinov2.patch_size), n=layers, reshape=True)
    return F.interpolate(head(torch.cat(maps, dim=1)), size=x.shape[2:], mode="bilinear", align_corners=False)


DEPTH_BLOCKS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}     # what heads of four layers read


def estimate_depth(dinov2, head, x):
    """Depth (N, 1, H, W) of normalised images x (N, 3, H, W) by a published head; the border is treated as above."""
    single = head.conv_depth.in_channels == 2 * dinov2.embed_dim
    blocks = 1 if single else DEPTH_BLOCKS[len(dinov2.blocks)]
    pairs = dinov2.get_intermediate_layers(center_pad(x, dinov2.patch_size), blocks, True, True, norm=False)
    return F.interpolate(head(*zip(*pairs)), size=x.shape[2:], mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def principal_axes(x, count):
    """x (N, D) -> mean (D,) and directions (D, count) of largest variance, each with a sum that is not negative."""
    mean = x.double().mean(0)
    axes = torch.linalg.eigh((x.double() - mean).T @ (x.double() - mean))[1].flip(1)[:, :count]
    return mean, axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)


def principal_components(x, count):
    """x (N, D) -> (N, count): centred, on its principal axes."""
    mean, axes = principal_axes(x, count)
    return (x.double() - mean) @ axes


def pca_colors(features):
    """What pca_rgb needs of features (M, D, gh, gw): their mean (D,), first three principal axes (D, 3), and the range
    (3,), (3,) along these, without the outer hundredths."""
    x = features.movedim(1, -1).flatten(0, -2)                                   # (M gh gw, D)
    mean, axes = principal_axes(x, 3)
    along = ((x.double() - mean) @ axes).sort(dim=0).values
    return mean, axes, along[len(x) // 100], along[-1 - len(x) // 100]


def pca_rgb(features, colors=None):
    """Features (N, D, gh, gw) -> (N, 3, gh, gw) in [0, 1]: first three principal components over all N as colours. Maps
    that shall share their colours go in together, or with the `colors` = pca_colors(...) of some of them."""
    mean, axes, low, high = pca_colors(features) if colors is None else colors
    along = (features.movedim(1, -1).double() - mean) @ axes                     # (N, gh, gw, 3)
    return ((along - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float().movedim(-1, 1)


def mask_palette(num_classes):
    """Colours (num_classes, 3) in [0, 1]: hues a golden angle apart, alternating in brightness."""
    k = torch.arange(num_classes)
    channel = (torch.tensor([5.0, 3.0, 1.0]) + 6 * ((k * 0.618034 + 0.55) % 1.0)[:, None]) % 6
    value = torch.where(k % 2 == 0, 0.95, 0.7)[:, None]
    return value - value * 0.65 * torch.minimum(channel, 4 - channel).clamp(0, 1)


def colorize_mask(mask, num_classes):
    """Class indices (N, H, W) -> (N, 3, H, W) in [0, 1], by mask_palette."""
    return mask_palette(num_classes).to(mask.device)[mask.long()].permute(0, 3, 1, 2)


VIRIDIS = ((0.27, 0.00, 0.33), (0.23, 0.32, 0.55), (0.13, 0.57, 0.55), (0.37, 0.79, 0.38), (0.99, 0.91, 0.14))


def colorize(x, low, high):
    """Numbers (N, H, W) -> (N, 3, H, W) in [0, 1]: low is violet, high yellow (five colours of the viridis scale)."""
    anchors = x.new_tensor(VIRIDIS)
    position = ((x - low) / max(float(high - low), 1e-12)).clamp(0, 1) * (len(anchors) - 1)
    below = position.floor().long().clamp(max=len(anchors) - 2)
    share = (position - below).unsqueeze(-1)
    return (anchors[below] * (1 - share) + anchors[below + 1] * share).permute(0, 3, 1, 2)


def colorize_depth(depth, near=None, far=None):
    """Depth (N, H, W) -> (N, 3, H, W) in [0, 1]: near is yellow, far is violet; the range is the data's by default."""
    return colorize(-depth, -(depth.max() if far is None else far), -(depth.min() if near is None else near))


# --------------------------------------------------------------------------------------------------
# Published files

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
