"""ReaLS: the latents of an autoencoder aligned with DINOv2, and masks and depth read from them.

    patch*, cls* = DINOv2(resize(x))             frozen: a token for every patch, one for the image
    patch = MLPpatch(fold(z))                    every token from the latent cells at its place
    cls   = MLPcls(pool(z))
    L_align = d(patch, patch*) + d(cls, cls*)    d = w_cos (1 - cosine) + w_l1 smooth_l1
    L = L_autoencoder + w_a L_align              trains encoder, decoder and both MLPs (train.py)

Method: "Exploring Representation-Aligned Latent Space for Better Generation", arXiv 2502.00359. Its
README and its figure show which networks there are and what is compared. They state neither d, nor
the sizes of DINOv2, MLPs and pooled latent: d is known at second hand (see FORMS), the sizes are
choices of this code. DINOv2 is Oquab et al., arXiv 2304.07193; with registers, Darcet et al., arXiv
2309.16588. Its parameters have the official names.

    x (N, 3, H, W) images in [-1, 1]     z (N, C, h, w) latents of the autoencoder
    T patch tokens of width D, row by row of a grid (gh, gw), of patches of p x p pixels
    S = 1 + R + T tokens inside DINOv2: the class token, R registers, the patches

    teacher = load_teacher("dinov2_vitb14")
    heads = AlignmentHeads(latent_channels=4, embed_dim=768, fold=2)
    heads.fit_statistics(*teacher_tokens(teacher, many_images, 224))
    targets = heads.standardize(*teacher_tokens(teacher, x, 224))
    loss, parts = align_loss(*heads(z), *targets)
    mask = segmentation_head(heads.feature_map(z)).argmax(1)        # a head made for DINOv2 itself
"""
import hashlib
import http.client
import importlib
import json
import math
import os
import re
import urllib.request
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# The alignment: two MLPs and a loss


def mlp(in_dim, hidden_dim, out_dim):
    """Three linear layers with SiLU between them."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.SiLU(),
                         nn.Linear(hidden_dim, hidden_dim), nn.SiLU(),
                         nn.Linear(hidden_dim, out_dim))


class AlignmentHeads(nn.Module):
    """MLPpatch and MLPcls: latents -> features of the teacher.

    fold x fold latent cells make one token: 2 fits DINOv2 on 224 x 224 pixels (16 x 16 tokens) to a
    latent of 32 x 32, 1 gives every cell a token of its own (448 pixels). Where the teacher's grid
    is no such fraction of the latent's, `grid` (gh, gw) names it, and the latent is resized to fold
    times that first. MLPcls reads the latent averaged to pool x pool cells (1: only C numbers).

    The MLPs may predict targets standardised per channel: `fit_statistics` stores mean and
    deviation, `standardize` applies them, `feature_map` and `class_token` undo it, so that heads
    made for the teacher work on a latent. `target` tells what was learned: tokens after the
    teacher's last norm ("norm"), or before it ("prenorm"); then the norm's own parameters are
    stored too, and both kinds can be had.
    """

    def __init__(self, latent_channels=4, embed_dim=1024, hidden_dim=2048, fold=2, pool=4,
                 target="norm", grid=None):
        super().__init__()
        if target not in ("norm", "prenorm"):
            raise ValueError(f"target {target!r} is not known: choose norm or prenorm")
        self.config = dict(latent_channels=latent_channels, embed_dim=embed_dim,
                           hidden_dim=hidden_dim, fold=fold, pool=pool, target=target, grid=grid)
        self.fold = fold
        self.pool = pool
        self.target = target
        self.grid = grid
        self.mlp_patch = mlp(latent_channels * fold ** 2, hidden_dim, embed_dim)
        self.mlp_cls = mlp(latent_channels * pool ** 2, hidden_dim, embed_dim)
        self.register_buffer("patch_mean", torch.zeros(embed_dim))
        self.register_buffer("patch_std", torch.ones(embed_dim))
        self.register_buffer("cls_mean", torch.zeros(embed_dim))
        self.register_buffer("cls_std", torch.ones(embed_dim))
        if target == "prenorm":
            self.register_buffer("norm_weight", torch.ones(embed_dim))
            self.register_buffer("norm_bias", torch.zeros(embed_dim))

    def forward(self, z):
        """z (N, C, h, w) -> patch tokens (N, T, D) and class tokens (N, D), standardised."""
        gh, gw = self.grid_of(z)
        cells = (gh * self.fold, gw * self.fold)                    # fold x fold for every token
        folded = z                                                  # (N, C, h, w)
        if z.shape[2:] != cells:
            folded = F.interpolate(z, cells, mode="bilinear", antialias=True)  # (N, C, *cells)
        folded = F.pixel_unshuffle(folded, self.fold)               # (N, C fold^2, gh, gw)
        folded = folded.flatten(2).transpose(1, 2)                  # (N, T, C fold^2)
        pooled = F.adaptive_avg_pool2d(z, self.pool).flatten(1)     # (N, C pool^2)
        patch = self.mlp_patch(folded)                              # (N, T, D)
        cls = self.mlp_cls(pooled)                                  # (N, D)
        return patch, cls

    def standardize(self, patch_tokens, cls_token):
        """The teacher's tokens (N, T, D) and (N, D) as the MLPs predict them."""
        patch = (patch_tokens - self.patch_mean) / self.patch_std   # (N, T, D)
        cls = (cls_token - self.cls_mean) / self.cls_std            # (N, D)
        return patch, cls

    def feature_map(self, z, normed=True):
        """z (N, C, h, w) -> teacher-like features (N, D, gh, gw), for the heads below.

        Raises ValueError for features before the last norm (normed=False) that were not learned.
        """
        patch, _ = self(z)                                          # (N, T, D)
        patch = patch * self.patch_std + self.patch_mean            # (N, T, D), teacher's scale
        patch = self.apply_norm(patch, normed)                      # (N, T, D)
        return patch.transpose(1, 2).unflatten(2, self.grid_of(z))  # (N, D, gh, gw)

    def class_token(self, z, normed=True):
        """z (N, C, h, w) -> teacher-like class tokens (N, D). Raises as feature_map does."""
        _, cls = self(z)                                            # (N, D)
        cls = cls * self.cls_std + self.cls_mean                    # (N, D), teacher's scale
        return self.apply_norm(cls, normed)                         # (N, D)

    @torch.no_grad()
    def fit_statistics(self, patch_tokens, cls_token):
        """Take mean and standard deviation of every channel from targets (N, T, D) and (N, D)."""
        patch_tokens = patch_tokens.flatten(0, 1)                   # (N T, D)
        self.patch_mean.copy_(patch_tokens.mean(0))                 # (D,), as all four
        self.patch_std.copy_(patch_tokens.std(0).clamp(min=1e-6))
        self.cls_mean.copy_(cls_token.mean(0))
        correction = min(1, len(cls_token) - 1)                     # one image alone: 0, not nan
        self.cls_std.copy_(cls_token.std(0, correction=correction).clamp(min=1e-6))

    @torch.no_grad()
    def fit_norm(self, norm):
        """Take the parameters of the teacher's last norm, for targets that are tokens before it."""
        self.norm_weight.copy_(norm.weight)
        self.norm_bias.copy_(norm.bias)

    def apply_norm(self, tokens, normed):
        """Tokens (..., D) in the teacher's scale, after its last norm if normed, else before it."""
        if normed and self.target == "prenorm":
            return F.layer_norm(tokens, tokens.shape[-1:], self.norm_weight, self.norm_bias, 1e-6)
        if not normed and self.target == "norm":
            raise ValueError("tokens before the last norm are wanted from MLPs that learned those "
                             "after it: train them with target 'prenorm'")
        return tokens

    def grid_of(self, z):
        """(gh, gw): the token grid of latents (N, C, h, w). ValueError where they do not fold."""
        h, w = z.shape[2:]
        if self.grid is None and (h % self.fold or w % self.fold):
            raise ValueError(f"a latent of {h} x {w} does not fold by {self.fold}: give a grid")
        return tuple(self.grid or (h // self.fold, w // self.fold))


# Forms of d: factors (w_cos, w_l1). Those of "both" are the paper's at second hand: its README
# states none, and a public trainer that cites it has these.
FORMS = {"both": (0.9, 0.1), "cosine": (1.0, 0.0), "l1": (0.0, 1.0)}


def feature_distance(x, target, form):
    """d of features x and their targets (..., D), and its two parts, detached.

        d = w_cos (1 - cosine) + w_l1 smooth_l1, averaged over all tokens, smooth_l1 over channels
        smooth_l1 = a^2 / 2 where a = |x - target| is below 1, a - 1/2 elsewhere
    """
    w_cos, w_l1 = FORMS[form]
    target = target.detach()                                        # (..., D), no gradient
    cosine = F.cosine_similarity(x, target, dim=-1).mean()          # (), of the directions
    # the cosine leaves the length of a feature free, and the heads that read it need the length
    l1 = F.smooth_l1_loss(x, target)                                # ()
    d = w_cos * (1 - cosine) + w_l1 * l1                            # ()
    return d, cosine.detach(), l1.detach()


def align_loss(patch, cls, patch_target, cls_target, form="both", patch_weight=1.0, cls_weight=1.0):
    """L_align = patch_weight d(patch, patch*) + cls_weight d(cls, cls*), and a dict of its parts.

    patch and patch_target (N, T, D), cls and cls_target (N, D); `form` is one of FORMS. The parts,
    detached: cos_patch and cos_cls are mean cosine similarities, l1_patch and l1_cls smooth L1
    losses. The targets get no gradient.
    """
    d_patch, cos_patch, l1_patch = feature_distance(patch, patch_target, form)
    d_cls, cos_cls, l1_cls = feature_distance(cls, cls_target, form)
    loss = patch_weight * d_patch + cls_weight * d_cls              # ()
    return loss, dict(cos_patch=cos_patch, l1_patch=l1_patch, cos_cls=cos_cls, l1_cls=l1_cls)


# --------------------------------------------------------------------------------------------------
# Teachers: the one place that knows what a teacher is

# Another model (CLIP, MAE, a ResNet) becomes one by three names, as README shows in ten lines:
# embed_dim, patch_size, and forward_features(x), which gives x_norm_patchtokens (N, T, D) of a
# square grid and x_norm_clstoken (N, D). A model that was trained with other statistics than
# ImageNet's first undoes those of teacher_input. demo/efficientnet.py is a whole example.


def load_teacher(name):
    """The frozen teacher: a published DINOv2 by its name; of "MODULE:FUNCTION" what that function
    of a module of yours returns; or of a folder with config.json (arguments of DINOv2) and
    dinov2.pth (a state dict), as demo/teacher.py writes it.

    Raises FileNotFoundError where there is none of these, ValueError for what does not fit, OSError
    where a published one cannot be had.
    """
    name = str(name)
    if name in DINOV2:
        teacher = load_dinov2(name)
    elif re.fullmatch(r"\w[\w.]*:\w+", name):
        module, function = name.split(":")
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{error}: want MODULE:FUNCTION where Python finds both and what they "
                             "import, as beside train.py") from None
        teacher = make() if callable(make) else None
        wanted = ("embed_dim", "patch_size", "forward_features")
        if not (isinstance(teacher, nn.Module) and all(hasattr(teacher, key) for key in wanted)):
            raise ValueError(f"{name} returns no module with {', '.join(wanted)}: see README")
    else:
        teacher = load_dinov2_folder(Path(name))
    return teacher.eval().requires_grad_(False)


IMAGENET_MEAN = (0.485, 0.456, 0.406)                               # of images in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


def teacher_input(x, size):
    """Images (N, 3, H, W) in [-1, 1] -> (N, 3, size, size) as DINOv2 wants them: ImageNet
    statistics, bicubic."""
    mean = x.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = x.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    x = ((x + 1) / 2 - mean) / std                                  # (N, 3, H, W)
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True)  # (N, 3, size, size)


@torch.no_grad()
def teacher_tokens(teacher, x, size, target="norm"):
    """Patch tokens (N, T, D) and class tokens (N, D) of images x (N, 3, H, W) in [-1, 1], seen at
    size x size pixels. Nothing here has a gradient.

    target: "norm", after the teacher's last norm, as segmentation heads want them; "prenorm",
    before it, as depth heads do.
    """
    x = teacher_input(x, size)                                      # (N, 3, size, size)
    out = teacher.forward_features(x)
    if target == "norm":
        return out["x_norm_patchtokens"], out["x_norm_clstoken"]    # (N, T, D), (N, D)
    tokens = out["x_prenorm"]                                       # (N, S, D)
    return tokens[:, 1 + teacher.num_registers:], tokens[:, 0]      # (N, T, D), (N, D)


# --------------------------------------------------------------------------------------------------
# DINOv2: a vision transformer


class PatchEmbed(nn.Module):
    """(N, 3, H, W) -> (N, T, D): one linear map of every patch."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        x = self.proj(x)                                            # (N, D, gh, gw)
        return x.flatten(2).transpose(1, 2)                         # (N, T, D)


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
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        x = F.gelu(self.fc1(x))                                     # (N, S, hidden)
        return self.fc2(x)                                          # (N, S, D)


class SwiGLU(nn.Module):
    """silu(x W1) * (x W2), then W3: the MLP of ViT-g."""

    def __init__(self, dim, hidden):
        super().__init__()
        # two thirds: the three matrices have as many weights as the two of Mlp; multiples of 8
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)                       # W1 and W2 side by side
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)                         # (N, S, hidden) each
        x = F.silu(a) * b                                           # (N, S, hidden)
        return self.w3(x)                                           # (N, S, D)


class LayerScale(nn.Module):
    """A learned factor for every channel of a residual branch."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma                                       # (N, S, D)


class Block(nn.Module):
    """Attention, then an MLP, each normalised before and scaled behind, on a residual branch."""

    def __init__(self, dim, num_heads, ffn):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.ls2 = LayerScale(dim)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[ffn](dim, 4 * dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))                  # (N, S, D)
        x = x + self.ls2(self.mlp(self.norm2(x)))                   # (N, S, D)
        return x


class DINOv2(nn.Module):
    """The vision transformer of DINOv2, official names. ViT-S/14 is DINOv2(384, 12, 6), B (768, 12,
    12), L (1024, 24, 16), g (1536, 40, 24, ffn="swiglu").

    Images come normalised by IMAGENET_MEAN and IMAGENET_STD, their sides multiples of patch_size;
    see `teacher_input`. Position embeddings are made for images of img_size and interpolated for
    others. Registers are tokens that belong to no patch and are dropped at the end.
    """

    def __init__(self, embed_dim=384, depth=12, num_heads=6, patch_size=14, img_size=518,
                 num_registers=0, ffn="mlp"):
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.num_registers = num_registers
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 1e-6)
        num_positions = 1 + (img_size // patch_size) ** 2           # the class token has one too
        self.pos_embed = nn.Parameter(torch.randn(1, num_positions, embed_dim) * 0.02)
        if num_registers:
            registers = torch.randn(1, num_registers, embed_dim) * 1e-6
            self.register_tokens = nn.Parameter(registers)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, ffn) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        # stands for hidden patches in the pre-training; here only since the published files have it
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def interpolated_pos_embed(self, gh, gw):
        """Position embeddings (1, 1 + gh gw, D) for a grid of gh x gw tokens."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if gh == gw == side:
            return self.pos_embed                                   # (1, 1 + side^2, D)
        cls = self.pos_embed[:, :1]                                 # (1, 1, D)
        grid = self.pos_embed[:, 1:].float()                        # (1, side^2, D)
        grid = grid.view(1, side, side, -1).permute(0, 3, 1, 2)     # (1, D, side, side)
        if self.num_registers:                                      # as the official code for these
            grid = F.interpolate(grid, (gh, gw), mode="bicubic", antialias=True)  # (1, D, gh, gw)
        else:
            # and for the others: its 0.1, against a size rounded down, moves the samples a little
            scale = ((gh + 0.1) / side, (gw + 0.1) / side)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")  # (1, D, gh, gw)
        grid = grid.permute(0, 2, 3, 1).flatten(1, 2)               # (1, gh gw, D)
        return torch.cat([cls, grid.to(cls.dtype)], dim=1)          # (1, 1 + gh gw, D)

    def tokens(self, x):
        """x (N, 3, H, W) -> (N, S, D): what goes into the first block."""
        N, _, H, W = x.shape
        p = self.patch_size
        if H % p or W % p:
            raise ValueError(f"image of {H} x {W} does not divide into patches of {p}: "
                             "resize or pad it")
        patch = self.patch_embed(x)                                 # (N, T, D)
        cls = self.cls_token.expand(N, -1, -1)                      # (N, 1, D)
        tokens = torch.cat([cls, patch], dim=1)                     # (N, 1 + T, D)
        tokens = tokens + self.interpolated_pos_embed(H // p, W // p)  # (N, 1 + T, D)
        if self.num_registers:                                      # they have no position
            registers = self.register_tokens.expand(N, -1, -1)      # (N, R, D)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)  # (N, S, D)
        return tokens                                               # (N, S, D)

    def forward_features(self, x):
        """x (N, 3, H, W) -> dict of x_norm_clstoken (N, D), x_norm_regtokens (N, R, D) and
        x_norm_patchtokens (N, T, D), and x_prenorm (N, S, D) before the last norm."""
        h = self.tokens(x)                                          # (N, S, D)
        for block in self.blocks:
            h = block(h)                                            # (N, S, D)
        norm = self.norm(h)                                         # (N, S, D)
        first = 1 + self.num_registers                              # place of the first patch
        return {"x_norm_clstoken": norm[:, 0],                      # (N, D)
                "x_norm_regtokens": norm[:, 1:first],               # (N, R, D)
                "x_norm_patchtokens": norm[:, first:],              # (N, T, D)
                "x_prenorm": h}                                     # (N, S, D)

    def forward(self, x):
        """x (N, 3, H, W) -> class token (N, D) after the last norm."""
        return self.forward_features(x)["x_norm_clstoken"]          # (N, D)

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        """Patch tokens (N, T, D) after the last n blocks, or after those numbered in n, as a tuple
        in their order; reshape: as maps (N, D, gh, gw); return_class_token: pairs with the class
        token (N, D); norm: by the last norm."""
        wanted = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        if not set(wanted) <= set(range(len(self.blocks))):
            raise ValueError(f"blocks {list(wanted)}: there are 0 to {len(self.blocks) - 1}")
        grid = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        layers = []
        h = self.tokens(x)                                          # (N, S, D)
        for i, block in enumerate(self.blocks):
            h = block(h)                                            # (N, S, D)
            if i not in wanted:
                continue
            out = self.norm(h) if norm else h                       # (N, S, D)
            cls = out[:, 0]                                         # (N, D)
            patch = out[:, 1 + self.num_registers:]                 # (N, T, D)
            if reshape:
                patch = patch.transpose(1, 2).unflatten(2, grid)    # (N, D, gh, gw)
            layers.append((patch, cls) if return_class_token else patch)
        return tuple(layers)


# --------------------------------------------------------------------------------------------------
# Heads on features, of DINOv2 or of a latent: classes, masks, depth


class ClassificationHead(nn.Linear):
    """DINOv2's linear classifier -> logits (N, num_classes): of the class tokens (N, D) of one or
    four blocks and the last one's patch tokens (N, T, D), all after the last norm."""

    def __init__(self, embed_dim, num_classes=1000, num_layers=1):
        super().__init__((num_layers + 1) * embed_dim, num_classes)

    def forward(self, patch_tokens, *cls_tokens):
        mean = patch_tokens.mean(1)                                 # (N, D)
        x = torch.cat([*cls_tokens, mean], dim=1)                   # (N, (layers + 1) D)
        check_width(x, self.in_features, "classification head")
        return super().forward(x)                                   # (N, num_classes)


class SegmentationHead(nn.Module):
    """DINOv2's linear segmentation head: features (N, D, gh, gw) after the last norm -> logits
    (N, num_classes, gh, gw)."""

    def __init__(self, embed_dim, num_classes):
        super().__init__()
        self.bn = nn.BatchNorm2d(embed_dim)
        self.conv_seg = nn.Conv2d(embed_dim, num_classes, 1)

    def forward(self, features):
        check_width(features, self.bn.num_features, "segmentation head")
        x = self.bn(features)                                       # (N, D, gh, gw)
        return self.conv_seg(x)                                     # (N, num_classes, gh, gw)


class DepthHead(nn.Module):
    """DINOv2's linear depth head: features (N, D, gh, gw) and class tokens (N, D), or lists of them
    from four blocks -> depth (N, 1, 4 gh, 4 gw). The published heads want features before the norm.

        depth = sum_k p_k d_k         p_k = (relu(a_k) + 0.1) / sum_j (relu(a_j) + 0.1)

    over 256 depths d_k, spread evenly over [min, max]. The official hub builds every linear head
    with a maximum of 80; NYU's heads were trained with 10, KITTI's with 80.
    """

    def __init__(self, embed_dim, min_depth=0.001, max_depth=10.0, num_bins=256, num_layers=1):
        super().__init__()
        self.conv_depth = nn.Conv2d(2 * num_layers * embed_dim, num_bins, 1)
        bins = torch.linspace(min_depth, max_depth, num_bins)       # d_k
        self.register_buffer("bins", bins, persistent=False)

    def forward(self, features, cls_token):
        if torch.is_tensor(features):
            features, cls_token = [features], [cls_token]
        parts = []
        for patch, cls in zip(features, cls_token):
            parts.append(patch)                                     # (N, D, gh, gw)
            parts.append(cls[:, :, None, None].expand_as(patch))    # (N, D, gh, gw)
        x = torch.cat(parts, dim=1)                                 # (N, 2 layers D, gh, gw)
        check_width(x, self.conv_depth.in_channels, "depth head")
        # officially self.conv_depth(F.interpolate(x, ...)): a 1 x 1 convolution and a resizing may
        # change places, and the convolution first has 16 times fewer pixels
        a = self.conv_depth(x)                                      # (N, bins, gh, gw)
        a = F.interpolate(a, scale_factor=4, mode="bilinear")       # (N, bins, 4 gh, 4 gw)
        p = F.relu(a) + 0.1                                         # (N, bins, 4 gh, 4 gw)
        p = p / p.sum(dim=1, keepdim=True)                          # sums to 1 over the bins
        depth = torch.einsum("nkhw,k->nhw", p, self.bins)           # (N, 4 gh, 4 gw)
        return depth.unsqueeze(1)                                   # (N, 1, 4 gh, 4 gw)


def segment(dinov2, head, x):
    """Logits (N, num_classes, H, W) of normalised images x (N, 3, H, W) by a published head, in one
    window and at one scale: centred in zeros to whole patches, then resized to H x W with the
    border that was added still in it, as the official code does."""
    num_layers = head.bn.num_features // dinov2.embed_dim
    padded = center_pad(x, dinov2.patch_size)                       # (N, 3, p gh, p gw)
    maps = dinov2.get_intermediate_layers(padded, num_layers, reshape=True)
    features = torch.cat(maps, dim=1)                               # (N, layers D, gh, gw)
    logits = head(features)                                         # (N, num_classes, gh, gw)
    return F.interpolate(logits, x.shape[2:], mode="bilinear")      # (N, num_classes, H, W)


DEPTH_BLOCKS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}  # of heads of 4 blocks


def estimate_depth(dinov2, head, x):
    """Depth (N, 1, H, W) of normalised images x (N, 3, H, W) by a published head; the border is
    treated as in `segment`."""
    single = head.conv_depth.in_channels == 2 * dinov2.embed_dim
    blocks = 1 if single else DEPTH_BLOCKS[len(dinov2.blocks)]
    padded = center_pad(x, dinov2.patch_size)                       # (N, 3, p gh, p gw)
    layers = dinov2.get_intermediate_layers(padded, blocks, reshape=True, return_class_token=True,
                                            norm=False)
    features, cls_tokens = zip(*layers)                             # (N, D, gh, gw), (N, D) each
    depth = head(features, cls_tokens)                              # (N, 1, 4 gh, 4 gw)
    return F.interpolate(depth, x.shape[2:], mode="bilinear")       # (N, 1, H, W)


def center_pad(x, multiple):
    """Zeros around images (N, C, H, W), so that their sides are multiples; what is odd goes to the
    right and below."""
    rows = -x.shape[2] % multiple
    columns = -x.shape[3] % multiple
    left, top = columns // 2, rows // 2
    return F.pad(x, (left, columns - left, top, rows - top))


# --------------------------------------------------------------------------------------------------
# Pictures of features, masks and depth


def principal_axes(x, count):
    """x (N, D) -> mean (D,) and directions (D, count) of largest variance."""
    x = x.double()
    mean = x.mean(0)                                                # (D,)
    _, axes = torch.linalg.eigh((x - mean).T @ (x - mean))         # (D, D), smallest variance first
    axes = axes.flip(1)[:, :count]                                  # (D, count)
    # an axis may point either way: with a sum that is not negative, colours are the same anywhere
    return mean, axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)


def principal_components(x, count):
    """x (N, D) -> (N, count): centred, on its principal axes."""
    mean, axes = principal_axes(x, count)
    return (x.double() - mean) @ axes                               # (N, count)


def pca_colors(features):
    """What pca_rgb needs of features (N, D, gh, gw): their mean (D,), first three principal axes
    (D, 3), and the range (3,), (3,) along these, without the outer hundredths."""
    x = features.movedim(1, -1).flatten(0, -2)                      # (N T, D)
    mean, axes = principal_axes(x, 3)                               # (D,), (D, 3)
    along = (x.double() - mean) @ axes                              # (N T, 3)
    along = along.sort(dim=0).values                                # (N T, 3)
    outer = len(x) // 100
    return mean, axes, along[outer], along[-1 - outer]


def pca_rgb(features, colors=None):
    """Features (N, D, gh, gw) -> (N, 3, gh, gw) in [0, 1]: first three principal components over
    all N as colours. Maps that shall share their colours go in together, or with the `colors` =
    pca_colors(...) of some of them."""
    mean, axes, low, high = pca_colors(features) if colors is None else colors
    along = (features.movedim(1, -1).double() - mean) @ axes        # (N, gh, gw, 3)
    share = (along - low) / (high - low).clamp(min=1e-12)           # (N, gh, gw, 3)
    return share.clamp(0, 1).float().movedim(-1, 1)                 # (N, 3, gh, gw)


def mask_palette(num_classes):
    """Colours (num_classes, 3) in [0, 1]: hues a golden angle apart, alternating in brightness."""
    k = torch.arange(num_classes)                                   # (num_classes,)
    hue = (k * 0.618034 + 0.55) % 1.0                               # (num_classes,) in [0, 1)
    value = torch.where(k % 2 == 0, 0.95, 0.7)[:, None]             # (num_classes, 1)
    # HSV -> RGB with a saturation of 0.65
    channel = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6  # (num_classes, 3)
    return value - value * 0.65 * torch.minimum(channel, 4 - channel).clamp(0, 1)


def colorize_mask(mask, num_classes):
    """Class indices (N, H, W) -> (N, 3, H, W) in [0, 1], by mask_palette."""
    palette = mask_palette(num_classes).to(mask.device)             # (num_classes, 3)
    return palette[mask.long()].permute(0, 3, 1, 2)                 # (N, 3, H, W)


# five colours of the scale viridis, from violet to yellow
VIRIDIS = ((0.27, 0.00, 0.33), (0.23, 0.32, 0.55), (0.13, 0.57, 0.55), (0.37, 0.79, 0.38),
           (0.99, 0.91, 0.14))


def colorize(x, low, high):
    """Numbers (N, H, W) -> (N, 3, H, W) in [0, 1]: low is violet, high yellow."""
    anchors = x.new_tensor(VIRIDIS)                                 # (5, 3)
    last = len(anchors) - 1
    position = ((x - low) / max(float(high - low), 1e-12)).clamp(0, 1) * last
    below = position.floor().long().clamp(max=last - 1)             # (N, H, W), 0 .. 3
    share = (position - below).unsqueeze(-1)                        # (N, H, W, 1)
    rgb = anchors[below] * (1 - share) + anchors[below + 1] * share  # (N, H, W, 3)
    return rgb.permute(0, 3, 1, 2)                                  # (N, 3, H, W)


def colorize_depth(depth, near=None, far=None):
    """Depth (N, H, W) -> (N, 3, H, W) in [0, 1]: near is yellow, far is violet; the range is the
    data's by default."""
    near = depth.min() if near is None else near
    far = depth.max() if far is None else far
    return colorize(-depth, -far, -near)


# --------------------------------------------------------------------------------------------------
# Weights on disk: published models and heads, and folders of a teacher

# name: arguments of DINOv2, and sha256 of the file where it is known
DINOV2 = {
    "dinov2_vits14": (dict(embed_dim=384, depth=12, num_heads=6),
                      "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": (dict(embed_dim=768, depth=12, num_heads=12),
                      "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14": (dict(embed_dim=1024, depth=24, num_heads=16),
                      "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "dinov2_vitg14": (dict(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu"), None),
    "dinov2_vits14_reg": (dict(embed_dim=384, depth=12, num_heads=6, num_registers=4), None),
    "dinov2_vitb14_reg": (dict(embed_dim=768, depth=12, num_heads=12, num_registers=4),
                          "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71"),
    "dinov2_vitl14_reg": (dict(embed_dim=1024, depth=24, num_heads=16, num_registers=4), None),
    "dinov2_vitg14_reg": (dict(embed_dim=1536, depth=40, num_heads=24, num_registers=4,
                               ffn="swiglu"), None),
}
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


def load_dinov2_folder(folder):
    """The DINOv2 of a folder with config.json and dinov2.pth. Raises as load_teacher does."""
    config, weights = folder / "config.json", folder / "dinov2.pth"
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
    return model


HEADS = {
    None: (ClassificationHead, {}),                                 # of ImageNet's classes
    "ade20k": (SegmentationHead, dict(num_classes=150)),
    "voc2012": (SegmentationHead, dict(num_classes=21)),
    "nyu": (DepthHead, dict(max_depth=10.0)),
    "kitti": (DepthHead, dict(max_depth=80.0)),
}
HEAD_NAME = re.compile(r"(dinov2_vit[sblg]14)(?:_reg4)?_(?:(ade20k|voc2012|nyu|kitti)_)?"
                       r"(linear4?|ms)_head")


def load_head(name, path=None):
    """A published head, from a local file or fetched on first use. For example
    dinov2_vitb14_ade20k_linear_head, dinov2_vitb14_voc2012_ms_head, dinov2_vits14_nyu_linear_head,
    dinov2_vitl14_kitti_linear4_head, or the classifiers dinov2_vits14_linear_head and
    dinov2_vits14_reg4_linear4_head. Raises as load_dinov2 does."""
    found = HEAD_NAME.fullmatch(name)
    if not found:
        raise ValueError(f"no head of DINOv2 is called {name!r}: want for example "
                         "dinov2_vitb14_ade20k_linear_head")
    backbone, data, kind = found.groups()
    width = DINOV2[backbone][0]["embed_dim"]
    num_layers = 4 if kind in ("linear4", "ms") else 1
    network, arguments = HEADS[data]
    if network is SegmentationHead:
        head = network(num_layers * width, **arguments)
    else:
        head = network(width, num_layers=num_layers, **arguments)
    path = path or fetch(f"{DINOV2_ADDRESS}/{backbone}/{name}.pth")
    weights = load_torch(path)
    weights = {key.removeprefix("decode_head."): value for key, value in weights.items()}
    load_strict(head, weights, path)
    return head.eval().requires_grad_(False)


def check_width(features, wanted, head):
    """ValueError where features (N, D, ...) are not as wide as a head wants them."""
    if features.shape[1] != wanted:
        raise ValueError(f"a {head} for width {wanted} got features of {features.shape[1]}: "
                         "it is of another teacher, or of another number of its blocks")


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
