"""SiT: a transformer that learns the velocity on the straight path between noise and data, and its ODE samplers.

    x_t = alpha_t x + sigma_t eps      alpha_t = t, sigma_t = 1 - t         t = 0 is noise, t = 1 is data
    v   = d x_t / d t = x - eps        loss = mean (model(x_t, t, y) - v)^2
    sampling: start from eps at t = 0 and follow dx/dt = model(x, t, y) to t = 1

Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers",
arXiv 2401.08740. The network is DiT's (Peebles and Xie, arXiv 2212.09748); parameter names are the official ones.
`diff sit.py dit.py` shows what separates flow matching from diffusion: the part between the markers is the same text.

    x (N, C, H, W) normalised latents    t (N,) time    y (N,) labels, num_classes stands for "no label"
    T = (H / p)(W / p) tokens of width D, heads of width D / heads

    model = create("SiT-B/2", input_size=32, num_classes=1000)
    training_loss(model, x, y).mean().backward()
    z = sample(model, torch.randn(8, 4, 32, 32), y, num_steps=50, cfg_scale=1.5)
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# === shared by sit.py and dit.py: begin ===
# ---------------------------------------------------------------------------------------------------------------------
# Embeddings

def sincos_pos_embed(dim, grid_size):
    """Fixed 2-D position embedding (1, grid_size^2, dim): half of the channels tell the column, half the row."""
    omega = 10000.0 ** -(np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    angles = np.outer(np.arange(grid_size, dtype=np.float64), omega)             # (grid, dim / 4)
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)             # (grid, dim / 2)
    row, column = np.divmod(np.arange(grid_size * grid_size), grid_size)
    return torch.from_numpy(np.concatenate([table[column], table[row]], axis=1)).float().unsqueeze(0)


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, T, D): one linear map of every p x p patch."""

    def __init__(self, input_size, patch_size, in_channels, hidden_size):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        self.grid_size = input_size // patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """(N,) -> (N, D): sinusoids of t, then two linear layers."""

    def __init__(self, hidden_size, frequency_embedding_size=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(),
                                 nn.Linear(hidden_size, hidden_size))
        self.frequency_embedding_size = frequency_embedding_size

    def forward(self, t):
        half = self.frequency_embedding_size // 2
        # float32 whatever the model's type is, as the published models were trained
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t.float()[:, None] * freqs[None]                                # (N, half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """(N,) -> (N, D): a table of class vectors. Its last row, num_classes, is the vector of "no label".

    In train mode a label is dropped with probability dropout_prob; `drop` (N,) bool decides instead where it is given.
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, y, drop=None):
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)


# ---------------------------------------------------------------------------------------------------------------------
# Transformer block, conditioned by shift, scale and gate (adaLN-Zero)

def modulate(x, shift, scale):
    """x (N, T, D), shift and scale (N, D) -> x (1 + scale) + shift."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


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
    """Two linear layers with the tanh form of GELU, on every token by itself."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP on x (N, T, D); c (N, D) sets shift and scale of their norms and the gate of their output."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    """(N, T, D) -> (N, T, p * p * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# ---------------------------------------------------------------------------------------------------------------------
# What the two model classes have in common

def unpatchify(x, patch_size, out_channels):
    """(N, T, p * p * C) -> (N, C, H, W); the channel is the fastest index of a token."""
    N, T, _ = x.shape
    grid = math.isqrt(T)
    x = x.view(N, grid, grid, patch_size, patch_size, out_channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(N, out_channels, grid * patch_size, grid * patch_size)


def initialize_weights(model):
    """DiT's initialisation: every block begins as the identity, the model as zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    # the patch embedding is a linear layer that is written as a convolution
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[0].weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[2].weight, std=0.02)
    for block in model.blocks:
        nn.init.zeros_(block.adaLN_modulation[1].weight)          # gates of zero: the block adds nothing yet
    nn.init.zeros_(model.final_layer.adaLN_modulation[1].weight)
    nn.init.zeros_(model.final_layer.linear.weight)


# S, B, L and XL are the official sizes; Ti is ours, for the built-in run
SIZES = {
    "Ti": dict(depth=4, hidden_size=128, num_heads=4),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}


def size_arguments(name, family):
    """"SiT-B/2" -> dict(depth=12, hidden_size=768, num_heads=12, patch_size=2). Raises ValueError for another name."""
    prefix, _, rest = name.partition("-")
    size, _, patch = rest.partition("/")
    if prefix != family or size not in SIZES or not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"model {name!r} is not known: write {family}-SIZE/PATCH with SIZE one of {', '.join(SIZES)}")
    return dict(SIZES[size], patch_size=int(patch))


def guided(model, x, t, y, noise_level, cfg_scale, cfg_interval, cfg_channels):
    """Classifier-free guidance, uncond + cfg_scale (cond - uncond), on the first cfg_channels channels (None: all).

    Outside cfg_interval = (low, high) of the noise level (1 is noise, 0 is data, both ends included) and at scale 1 the
    conditional output is the result and only it is computed. The official samplers guide three channels; so does
    cfg_channels=3. Channels beyond the guided ones (DiT's variance too) stay conditional.
    """
    low, high = cfg_interval
    if cfg_scale == 1.0 or not low <= noise_level <= high:
        return model(x, t, y)
    y_null = torch.full_like(y, model.num_classes)
    cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y_null])).chunk(2)
    k = x.shape[1] if cfg_channels is None else cfg_channels
    return torch.cat([uncond[:, :k] + cfg_scale * (cond[:, :k] - uncond[:, :k]), cond[:, k:]], dim=1)
# === shared by sit.py and dit.py: end ===


# ---------------------------------------------------------------------------------------------------------------------
# Model

class SiT(nn.Module):
    """Velocity network with the official parameter names. Its defaults are SiT-XL/2 on 32 x 32 latents of ImageNet.

    With learn_sigma the last layer has 2C outputs of which `forward` keeps the first C, as in the published weights.
    Raises ValueError where input_size does not divide into patches or hidden_size into heads.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True):
        super().__init__()
        self.in_channels, self.patch_size, self.num_classes = in_channels, patch_size, num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_pos_embed(hidden_size, self.x_embedder.grid_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        initialize_weights(self)

    def forward(self, x, t, y, drop=None):
        """x (N, C, H, W), t (N,) in [0, 1], y (N,) labels -> velocity (N, C, H, W). `drop` as in LabelEmbedder."""
        c = self.t_embedder(t) + self.y_embedder(y, drop)                        # (N, D)
        x = self.x_embedder(x) + self.pos_embed                                  # (N, T, D)
        for block in self.blocks:
            x = block(x, c)                                                      # (N, T, D)
        x = self.final_layer(x, c)                                               # (N, T, p * p * out_channels)
        return unpatchify(x, self.patch_size, self.out_channels)[:, :self.in_channels]


def create(name, **kwargs):
    """create("SiT-B/2", num_classes=10) -> SiT. Raises ValueError for a name that is not SiT-SIZE/PATCH."""
    return SiT(**size_arguments(name, "SiT"), **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Objective and samplers

def training_loss(model, x, y, t=None, eps=None, drop=None):
    """Flow-matching loss (N,) of latents x (N, C, H, W) with labels y (N,).

    Draws that are not given are made here: t (N,) uniform in [0, 1), eps standard normal like x; drop (N,) bool says
    whose label is dropped (None: the model draws it in train mode).
    """
    t = torch.rand(x.shape[0], device=x.device, dtype=x.dtype) if t is None else t
    eps = torch.randn_like(x) if eps is None else eps
    alpha_t = t.view(-1, 1, 1, 1)
    x_t = alpha_t * x + (1 - alpha_t) * eps
    return (model(x_t, t, y, drop) - (x - eps)).square().flatten(1).mean(1)


@torch.no_grad()
def sample(model, eps, y, sampler="heun", num_steps=50, cfg_scale=1.0, cfg_interval=(0.0, 1.0), cfg_channels=None):
    """Noise eps (N, C, H, W) and labels y (N,) -> latents (N, C, H, W), by num_steps equal steps from t = 0 to t = 1.

    sampler "euler" calls the model num_steps times, "heun" 2 num_steps - 1 times (its last step is an Euler step, so
    that no model call is made at t = 1). The noise level of cfg_interval is 1 - t; see `guided`. The official ODE
    sampler counts the points of the time grid, one more than steps. Raises ValueError for another sampler or no step.
    """
    if sampler not in ("euler", "heun"):
        raise ValueError(f"sampler {sampler!r} is not known to SiT: choose euler or heun")
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} is not possible: SiT samples in at least one step")

    def velocity(x, t):
        times = torch.full((x.shape[0],), t, device=x.device, dtype=x.dtype)
        return guided(model, x, times, y, 1 - t, cfg_scale, cfg_interval, cfg_channels)

    x, dt = eps, 1 / num_steps
    for i in range(num_steps):
        v = velocity(x, i / num_steps)
        if sampler == "heun" and i < num_steps - 1:
            v = (v + velocity(x + dt * v, (i + 1) / num_steps)) / 2
        x = x + dt * v
    return x
