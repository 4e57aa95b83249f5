"""SiT: a transformer learns the velocity on a path from noise to data; an ODE or SDE samples it.

    x_t = t x + (1 - t) eps            t = 0 is noise, t = 1 is data
    v = d x_t / d t = x - eps          loss = mean (model(x_t, t, y) - v)^2
    sampling                           from eps at t = 0 follow dx = v dt to t = 1

Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers", arXiv 2401.08740. The network is DiT's (Peebles and Xie, arXiv 2212.09748); parameter
names are the official ones. The paper counts t from the data, the official code as here.
`diff sit.py dit.py` shows what separates flow matching from diffusion: the parts between markers
are the same text.

    N latents of C channels, x (N, C, H, W), of deviation 1 (Stable Diffusion's times 0.18215)
    T = (H / p)(W / p) tokens of width D, p the patch size
    t (N,) times, y (N,) labels, of which num_classes stands for "no label"

    model = create("SiT-B/2", input_size=32, num_classes=1000)
    training_loss(model, x, y).mean().backward()
    z = sample(model.eval(), torch.randn(8, 4, 32, 32), y, num_steps=50, cfg_scale=1.5)

In reading order: the transformer; flow matching on the straight path with Euler's and Heun's
method; then other paths and predictions, other solvers, the SDE, likelihood.
"""
import itertools
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# === shared by sit.py and dit.py: begin ===
# --------------------------------------------------------------------------------------------------
# Embeddings of patches, time and label

def sincos_pos_embed(dim, grid_size):
    """Fixed 2-D position embedding (1, grid_size^2, dim).

    Half of the channels tell the column, half the row.
    """
    omega = 10000.0 ** -(np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    angles = np.outer(np.arange(grid_size, dtype=np.float64), omega)  # (grid, dim / 4)
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, dim / 2)
    row, column = np.divmod(np.arange(grid_size * grid_size), grid_size)
    table = np.concatenate([table[column], table[row]], axis=1)     # (grid^2, dim)
    return torch.from_numpy(table).float().unsqueeze(0)


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, T, D): one linear map of every p x p patch."""

    def __init__(self, input_size, patch_size, in_channels, hidden_size):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is no multiple of patch_size {patch_size}")
        self.grid_size = input_size // patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        x = self.proj(x)                                            # (N, D, H / p, W / p)
        return x.flatten(2).transpose(1, 2)                         # (N, T, D), row by row


class TimestepEmbedder(nn.Module):
    """(N,) -> (N, D): sinusoids of t, then two linear layers."""

    def __init__(self, hidden_size, frequency_embedding_size=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        self.frequency_embedding_size = frequency_embedding_size

    def forward(self, t):
        # float32 whatever the model's type is, as the published models were trained. Frequencies
        # are rounded to it once: float32's exp differs between processors, and 6e-8 of a frequency
        # is 6e-5 of an angle at t = 999.
        half = self.frequency_embedding_size // 2
        exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
        freqs = torch.exp(-math.log(10000) * exponents).float()     # (half,), from 1 to 1e-4
        angles = t.float()[:, None] * freqs[None]                   # (N, half)
        x = torch.cat([angles.cos(), angles.sin()], dim=-1)         # (N, 2 half)
        return self.mlp(x.to(self.mlp[0].weight.dtype))             # (N, D)


class LabelEmbedder(nn.Module):
    """(N,) -> (N, D): a table of class vectors; its last row, num_classes, is that of "no label".

    In train mode a label is dropped with probability dropout_prob, so that guidance has a model
    without labels too. `drop` (N,) bool decides instead where it is given.
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y, drop=None):
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)              # (N,)
        return self.embedding_table(y)                              # (N, D)


# --------------------------------------------------------------------------------------------------
# Transformer block, conditioned by shift, scale and gate (adaLN-Zero)

def modulate(x, shift, scale):
    """x (N, T, D), shift and scale (N, D) -> x (1 + scale) + shift."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


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
    """Two linear layers with the tanh form of GELU, on every token by itself."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.act(self.fc1(x))                                   # (N, T, hidden)
        return self.fc2(x)                                          # (N, T, D)


class Block(nn.Module):
    """Attention and MLP on x (N, T, D).

    c (N, D) sets shift and scale of their norms and the gate of their output.
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c)                       # (N, 6 D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        h = self.attn(modulate(self.norm1(x), shift_msa, scale_msa))  # (N, T, D)
        x = x + gate_msa.unsqueeze(1) * h                           # (N, T, D)
        h = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (N, T, D)
        return x + gate_mlp.unsqueeze(1) * h                        # (N, T, D)


class FinalLayer(nn.Module):
    """(N, T, D) -> (N, T, p * p * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)     # (N, D) each
        x = modulate(self.norm_final(x), shift, scale)              # (N, T, D)
        return self.linear(x)                                       # (N, T, p * p * out_channels)


# --------------------------------------------------------------------------------------------------
# What the two model classes have in common

def unpatchify(x, patch_size, out_channels):
    """(N, T, p * p * C) -> (N, C, H, W); the channel is the fastest index of a token."""
    N, T, _ = x.shape
    p = patch_size
    grid = math.isqrt(T)
    x = x.view(N, grid, grid, p, p, out_channels)                   # row, column, y, x, channel
    x = x.permute(0, 5, 1, 3, 2, 4)                                 # (N, C, grid, p, grid, p)
    return x.reshape(N, out_channels, grid * p, grid * p)           # (N, C, H, W)


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
        nn.init.zeros_(block.adaLN_modulation[1].weight)            # gates of zero: nothing added
    nn.init.zeros_(model.final_layer.adaLN_modulation[1].weight)
    nn.init.zeros_(model.final_layer.linear.weight)


def check_choice(what, value, choices):
    """Raises ValueError where value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{what} {value!r} is not known: choose {', '.join(map(str, choices))}")


# S, B, L and XL are the official sizes; Ti is ours, for the demo
SIZES = {
    "Ti": dict(depth=4, hidden_size=128, num_heads=4),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}


def size_arguments(name, family):
    """Of SiT-B/2: dict(depth=12, hidden_size=768, num_heads=12, patch_size=2).

    Raises ValueError for another name.
    """
    prefix, _, rest = name.partition("-")
    size, _, patch = rest.partition("/")
    if prefix != family or size not in SIZES or not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"model {name!r} is not known: write {family}-SIZE/PATCH "
                         f"with SIZE one of {', '.join(SIZES)}")
    return dict(SIZES[size], patch_size=int(patch))


def guided(model, x, t, y, noise_level, cfg_scale, cfg_interval, cfg_channels):
    """Classifier-free guidance: uncond + cfg_scale (cond - uncond), (N, C or 2C, H, W).

    cfg_interval: (low, high) of the noise level, 1 is noise and 0 is data; outside of it, and at
        scale 1, the output is the conditional one and only that is computed (arXiv 2404.07724).
    cfg_channels: how many of the first channels are guided, None for all. The others stay
        conditional. Official SiT and DiT guide three of four; REPA's samplers guide all.
    """
    low, high = cfg_interval
    if cfg_scale == 1.0 or not low - 1e-6 <= noise_level <= high + 1e-6:  # 1e-6: rounded times
        return model(x, t, y)                                       # (N, C or 2C, H, W)
    y_null = torch.full_like(y, model.num_classes)                  # (N,)
    out = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y_null]))
    cond, uncond = out.to(x.dtype).chunk(2)                         # subtract in x's precision
    k = x.shape[1] if cfg_channels is None else cfg_channels
    guided_part = uncond[:, :k] + cfg_scale * (cond[:, :k] - uncond[:, :k])  # (N, k, H, W)
    return torch.cat([guided_part, cond[:, k:]], dim=1)             # (N, C or 2C, H, W)
# === shared by sit.py and dit.py: end ===


# --------------------------------------------------------------------------------------------------
# Model

class SiT(nn.Module):
    """Velocity network with the official parameter names; defaults: SiT-XL/2, ImageNet, 256 px.

    With learn_sigma the last layer has 2C outputs of which `forward` keeps the first C, as in the
    published weights. Raises ValueError where input_size does not divide into patches or
    hidden_size into heads.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28,
                 num_heads=16, mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000,
                 learn_sigma=True):
        super().__init__()
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes = num_classes
        self.checkpointed = False
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        pos_embed = sincos_pos_embed(hidden_size, self.x_embedder.grid_size)  # (1, T, D)
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        initialize_weights(self)

    def enable_gradient_checkpointing(self):
        """Keep only every block's input for the backward pass, which computes its inside again."""
        self.checkpointed = True

    def forward(self, x, t, y, drop=None):
        """Velocity (N, C, H, W) of x (N, C, H, W) at times t (N,) in [0, 1] with labels y (N,).

        `drop` as in LabelEmbedder.
        """
        check_inputs(self, x, t, y, 1)
        c = self.t_embedder(t) + self.y_embedder(y, drop)           # (N, D)
        x = self.x_embedder(x) + self.pos_embed                     # (N, T, D)
        for block in self.blocks:                                   # (N, T, D) each
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c)
        x = self.final_layer(x, c)                                  # (N, T, p * p * out_channels)
        x = unpatchify(x, self.patch_size, self.out_channels)       # (N, out_channels, H, W)
        return x[:, :self.in_channels]                              # (N, C, H, W)


def create(name, **kwargs):
    """create("SiT-B/2", num_classes=10) -> SiT. Raises ValueError for another kind of name."""
    return SiT(**size_arguments(name, "SiT"), **kwargs)


# --------------------------------------------------------------------------------------------------
# Flow matching on the straight path

def flow_matching_loss(model, x, y, t, eps, drop=None):
    """mean (model(x_t, t, y) - v)^2 over C, H and W -> (N,), with v = d x_t / d t = x - eps."""
    time = t.view(-1, 1, 1, 1)                                      # (N, 1, 1, 1)
    x_t = time * x + (1 - time) * eps                               # (N, C, H, W)
    out = model(x_t, t, y, drop)                                    # (N, C, H, W)
    return (out - (x - eps)).square().flatten(1).mean(1)            # (N,)


def euler(velocity, x, times):
    """Follow dx = v dt by Euler's method through `times`; yields x (N, C, H, W) after every step.

    velocity(x, t, guide_t) is the model's, with guidance as the time guide_t has it.
    """
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, t, guide_t=t)                                 # (N, C, H, W)
        x = x + (t_next - t) * v                                    # (N, C, H, W)
        yield x


def heun(velocity, x, times):
    """The same by Heun's method: the mean of the velocities at both ends of a step.

    The last step is one of Euler's: on the way to data, no model is asked for t = 1.
    """
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, t, guide_t=t)                                 # (N, C, H, W)
        if t_next != times[-1]:
            there = x + (t_next - t) * v                            # (N, C, H, W)
            v = (v + velocity(there, t_next, guide_t=t)) / 2          # (N, C, H, W)
        x = x + (t_next - t) * v                                    # (N, C, H, W)
        yield x


# --------------------------------------------------------------------------------------------------
# Other paths from noise to data, and what a model's output means on them

PATHS = ("linear", "gvp", "vp")
PREDICTIONS = ("velocity", "noise", "score")


def interpolant(path, t):
    """alpha, sigma and their derivatives by t of x_t = alpha_t x + sigma_t eps, shaped as t.

    path: "linear", straight. "gvp" (generalised variance preserving), a quarter of a circle. "vp",
        the diffusion of Song et al. (arXiv 2011.13456) with beta from 20 at the noise to 0.1 at the
        data; at t = 0 its alpha is still 0.0066. Raises ValueError for another path.
    """
    check_choice("path", path, PATHS)
    if path == "linear":
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    if path == "gvp":
        angle = math.pi / 2 * t
        return angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin()
    s = 1 - t
    beta = 0.1 + 19.9 * s
    alpha = torch.exp(-0.05 * s - 19.9 / 4 * s ** 2)                # exp(-1/2 int_0^s beta)
    sigma = torch.sqrt(-torch.expm1(-0.1 * s - 19.9 / 2 * s ** 2))  # sqrt(1 - alpha^2)
    return alpha, sigma, beta / 2 * alpha, -beta / 2 * alpha ** 2 / sigma


def drift_variance(path, t):
    """alpha' / alpha sigma^2 - sigma sigma', infinite where alpha is 0.

    velocity = alpha' / alpha x + this * score.
    """
    if path == "vp":
        return (0.1 + 19.9 * (1 - t)) / 2                           # beta / 2, finite at t = 1 too
    alpha, sigma, d_alpha, d_sigma = interpolant(path, t)
    return d_alpha / alpha * sigma ** 2 - sigma * d_sigma


def as_velocity(out, x, t, path, prediction):
    """Velocity (N, C, H, W) that a model's output means at x (N, C, H, W) and t (N,)."""
    if prediction == "velocity":
        return out
    score = as_score(out, x, t, path, prediction)                   # (N, C, H, W)
    t = t.view(-1, 1, 1, 1)
    alpha, _, d_alpha, _ = interpolant(path, t)                     # (N, 1, 1, 1)
    return d_alpha / alpha * x + drift_variance(path, t) * score    # (N, C, H, W)


def as_score(out, x, t, path, prediction):
    """Score grad log p_t(x) (N, C, H, W) that a model's output means at x (N, C, H, W), t (N,)."""
    if prediction == "score":
        return out
    alpha, sigma, d_alpha, d_sigma = interpolant(path, t.view(-1, 1, 1, 1))  # (N, 1, 1, 1)
    if prediction == "noise":
        return -out / sigma                                         # (N, C, H, W)
    return (alpha * out - d_alpha * x) / (sigma * (d_alpha * sigma - alpha * d_sigma))


def time_interval(path, prediction, eps=None, training=False, reverse=False):
    """(t0, t1) in which a path is trained or sampled.

    It keeps a margin, `eps`, from the ends where a division by alpha or sigma asks for it. Default:
    0 for the velocity on linear and gvp, 1e-3 for noise and score; on vp, whose t0 is 0
    always, 1e-5 in training and 1e-3 in sampling. `reverse`, from data to noise, gives
    (1 - t0, 1 - t1); on vp the prediction of noise begins at 1 - eps, since it is divided by sigma.
    """
    check_transport(path, prediction, eps)
    if eps is None and path == "vp":
        eps = 1e-5 if training else 1e-3
    elif eps is None:
        eps = 0.0 if prediction == "velocity" else 1e-3
    t0 = 0.0 if path == "vp" else eps
    t1 = 1 - eps
    if reverse and path == "vp" and prediction == "noise":
        return t1, 1 - t1
    if reverse:
        return 1 - t0, 1 - t1
    return t0, t1


def training_loss(model, x, y, path="linear", prediction="velocity", weight=None, t=None, eps=None,
                  drop=None, train_eps=None):
    """Loss (N,) of latents x (N, C, H, W) with labels y (N,): squared error of the prediction.

        velocity    (model - (alpha' x + sigma' eps))^2          on linear: flow_matching_loss
        noise       w (model - eps)^2
        score       w (sigma model + eps)^2

    weight: w is 1 for None; "velocity" makes it the error of the velocity, "likelihood" that of a
        bound on -log p. The velocity's loss is the same with any.
    t, eps, drop: drawn here where not given: eps standard normal like x, then t (N,) uniform in
        time_interval(path, prediction, train_eps, True). drop (N,) bool says whose label is
        dropped; a model in train mode draws it.

    Raises ValueError for unknown names.
    """
    t0, t1 = time_interval(path, prediction, train_eps, training=True)
    check_choice("weight", weight, (None, "velocity", "likelihood"))
    if eps is None:
        eps = torch.randn_like(x)                                   # (N, C, H, W)
    if t is None:
        t = t0 + (t1 - t0) * torch.rand(len(x), device=x.device, dtype=x.dtype)  # (N,)
    if (path, prediction) == ("linear", "velocity"):
        return flow_matching_loss(model, x, y, t, eps, drop)
    time = t.view(-1, 1, 1, 1)
    alpha, sigma, d_alpha, d_sigma = interpolant(path, time)        # (N, 1, 1, 1) each
    out = model(alpha * x + sigma * eps, t, y, drop)                # (N, C, H, W)
    if prediction == "velocity":
        return (out - (d_alpha * x + d_sigma * eps)).square().flatten(1).mean(1)
    error = out - eps if prediction == "noise" else sigma * out + eps
    variance = drift_variance(path, time)                           # (N, 1, 1, 1)
    w = {
        None: 1.0,
        "velocity": (variance / sigma) ** 2,
        "likelihood": variance / sigma ** 2,
    }[weight]
    return (w * error.square()).flatten(1).mean(1)                  # (N,)


# --------------------------------------------------------------------------------------------------
# Other solvers of dx/dt = field(x, t): explicit Runge-Kutta methods, in either direction of time

# name: times c, rows a, weights b of k_i = field(x + h sum_j a_ij k_j, t + c_i h)
RUNGE_KUTTA = {
    "midpoint": ((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun2": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "heun3": ((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "rk4": ((0, 1 / 3, 2 / 3, 1),                                   # the 3/8 rule, as torchdiffeq's
            ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)),
            (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
    "dopri5": ((0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
               ((),
                (1 / 5,),
                (3 / 40, 9 / 40),
                (44 / 45, -56 / 15, 32 / 9),
                (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
                (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
                (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
               (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0)),
}
# order 5 minus the embedded order 4 of Shampine (1986), by which torchdiffeq estimates the error
DOPRI5_ERROR = (35 / 384 - 1951 / 21600, 0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720,
                -2187 / 6784 + 12231 / 42400, 11 / 84 - 649 / 6300, -1 / 60)
ODE_SAMPLERS = ("euler", "heun", "midpoint", "heun2", "heun3", "rk4", "dopri5")
SDE_SAMPLERS = ("sde-euler", "sde-heun")


def weighted(weights, slopes):
    """sum_i weights_i slopes_i, without the terms of weight 0."""
    return sum(w * k for w, k in zip(weights, slopes) if w)


def per_row(v, x):
    """v (N,) as (N, 1, ...), to be multiplied with x (N, ...)."""
    return v.to(x.dtype).view(len(v), *[1] * (x.ndim - 1))


def runge_kutta_step(field, x, t, t_next, method, slopes=()):
    """One step: x_next = x + h sum_i b_i k_i with h = t_next - t -> x_next (N, ...), all k_i.

    t, t_next: numbers, or (N,) where every row makes a step of its own.
    slopes: the first k_i, where they are known already.
    """
    times, rows, weights = RUNGE_KUTTA[method]
    slopes = list(slopes)
    h = t_next - t
    h_x = h if isinstance(h, float) else per_row(h, x)
    for i in range(len(slopes), len(times)):
        x_i = x + h_x * weighted(rows[i], slopes)                   # (N, ...)
        t_i = t_next if times[i] == 1 else t + times[i] * h         # t + h may not round to t_next
        slopes.append(field(x_i, t_i))                              # (N, ...)
    return x + h_x * weighted(weights, slopes), slopes


def dopri5(field, x, start, end, atol, rtol):
    """Dormand and Prince's method of order 5 with steps of its own choice; yields x after each.

    A step is as long as an error of atol + rtol |x|, in the root mean square, allows; the first is
    chosen as in Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", II.4. The
    rules are torchdiffeq's, with two changes. Each row of x (N, ...) has steps of its own and waits
    at `end` for the slowest, so that it does not depend on the other rows. And the last step stops
    at `end`, since a model never saw times beyond it. Raises RuntimeError where it finds no step.
    """
    def rms(v):
        return v.flatten(1).square().mean(1).sqrt().double()        # (N, ...) -> (N,)

    t = torch.full((len(x),), start, dtype=torch.float64, device=x.device)  # (N,)
    forward = 1 if end > start else -1
    slope = field(x, t)                                             # (N, ...)

    # the first step h (N,): 1 % of what x or its slope would need to change by itself ...
    tolerance = atol + rtol * x.abs()                               # (N, ...)
    size = rms(x / tolerance)                                       # (N,)
    speed = rms(slope / tolerance)                                  # (N,)
    h = torch.where((size > 1e-5) & (speed > 1e-5), 0.01 * size / speed, 1e-6)
    h = h.clamp(max=abs(end - start))
    # ... and then what its change along such a step allows
    slope_there = field(x + forward * per_row(h, x) * slope, t + forward * h)
    bend = rms((slope_there - slope) / tolerance) / h               # (N,)
    most = torch.maximum(speed, bend)
    allowed = torch.where(most <= 1e-15, (1e-3 * h).clamp(min=1e-6), (0.01 / most) ** (1 / 5))
    h = torch.minimum(100 * h, allowed)                             # (N,)

    while (moving := t != end).any():
        ends = h >= (end - t).abs()                                 # (N,), the step reaches the end
        t_next = torch.where(ends, end, t + forward * h)            # (N,)
        if (moving & ((t_next == t) | ~h.isfinite())).any():
            stuck = t[moving].min() if forward > 0 else t[moving].max()
            raise RuntimeError(f"dopri5 finds no step at t = {stuck:g}: "
                               "the model's output is not finite or bends too much")
        x_next, slopes = runge_kutta_step(field, x, t, t_next, "dopri5", [slope])
        error = per_row(t_next - t, x) * weighted(DOPRI5_ERROR, slopes)  # (N, ...)
        tolerance = atol + rtol * torch.maximum(x.abs(), x_next.abs())  # (N, ...)
        ratio = rms(error / tolerance)                              # (N,), the step counts up to 1
        taken = ratio <= 1                                          # (N,)
        rows = per_row(taken, x).bool()                             # (N, 1, ...)
        x = torch.where(rows, x_next, x)
        slope = torch.where(rows, slopes[-1], slope)
        t = torch.where(taken, t_next, t)
        # an error of order 5: 0.9 of the step that would just count, at most 10 times this one,
        # at least a fifth, and no shorter one after a step that counted
        factor = (0.9 / ratio ** (1 / 5)).clamp(max=10)
        factor = factor.maximum(torch.where(ratio < 1, 1.0, 0.2))
        h = torch.where(moving, h * factor, h)
        yield x


def integrate(field, x, t0, t1, sampler, num_steps, breaks=(), atol=1e-6, rtol=1e-3):
    """Solve dx/dt = field(x, t, guide_t) from t0 to t1 by an ODE sampler; yields x after each step.

    guide_t: a time that stands for the whole step, by which guidance is switched on and off: its
        beginning, or the middle between two breaks.
    breaks: times that no step of dopri5 crosses.
    """
    if sampler == "dopri5":
        inside = [t for t in breaks if min(t0, t1) < t < max(t0, t1)]
        times = [t0, *sorted(inside, reverse=t1 < t0), t1]
        for a, b in zip(times, times[1:]):
            for x in dopri5(lambda x, t: field(x, t, (a + b) / 2), x, a, b, atol, rtol):
                yield x
        return
    times = torch.linspace(t0, t1, num_steps + 1).tolist()          # float32, as the official grid
    if sampler == "euler":
        yield from euler(field, x, times)
    elif sampler == "heun":
        yield from heun(field, x, times)
    else:
        for t, t_next in zip(times, times[1:]):
            x, _ = runge_kutta_step(lambda x, s: field(x, s, t), x, t, t_next, sampler)
            yield x


# --------------------------------------------------------------------------------------------------
# The reverse SDE, dx = (v + w score) dt + sqrt(2 w) dW: the ODE's distribution at every t, by noise

DIFFUSION_FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")


def diffusion(form, path, t, norm=1.0):
    """Diffusion w(t) >= 0 of the reverse SDE at times t, half of the paper's w_t.

    "sbdm" is the path's own; on linear and gvp it is infinite at t = 0. `norm` scales the form, in
    "decreasing" the cosine in it. Raises ValueError for another form.
    """
    check_choice("diffusion_form", form, DIFFUSION_FORMS)
    if form == "constant":
        return norm * torch.ones_like(t)
    if form == "sbdm":
        return norm * drift_variance(path, t)
    if form == "sigma":
        return norm * interpolant(path, t)[1]
    if form == "linear":
        return norm * (1 - t)
    if form == "decreasing":
        return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2
    return norm * torch.sin(math.pi * t) ** 2                       # "increasing-decreasing"


def integrate_sde(velocity_and_score, w, x, t0, t1, sampler, num_steps, noise):
    """Solve the SDE from t0 to t1 by "sde-euler" or "sde-heun"; yields x after every step.

    velocity_and_score(x, t, guide_t): (N, C, H, W) both; guide_t is where the step begins.
    w(t): a number. Where it is infinite, its value at the end of the step is taken.
    noise(i): the standard normal (N, C, H, W) of step i.
    """
    dt = (t1 - t0) / num_steps
    for i in range(num_steps):
        t = t0 + i * dt
        t_next = t1 if i == num_steps - 1 else t0 + (i + 1) * dt
        w_t = w(t) if math.isfinite(w(t)) else w(t_next)
        dx = math.sqrt(2 * w_t * dt) * noise(i)                     # sqrt(2 w) dW
        if sampler == "sde-euler":
            v, score = velocity_and_score(x, t, t)
            x = x + (v + w_t * score) * dt + dx                     # (N, C, H, W)
        else:                                                       # Heun, from where noise leads
            x = x + dx
            v, score = velocity_and_score(x, t, t)
            drift = v + w_t * score
            if t_next < 1:                                          # at t = 1 the score is 0 / 0
                v, score = velocity_and_score(x + drift * dt, t_next, t)
                drift = (drift + v + w(t_next) * score) / 2
            x = x + drift * dt                                      # (N, C, H, W)
        yield x


def last_sde_step(velocity_and_score, w, x, t, size, kind, path):
    """x (N, C, H, W) at t = 1 from x at t = 1 - size, without noise; see `sample` for its kinds."""
    v, score = velocity_and_score(x, t, t)
    if kind == "mean":
        return x + size * (v + w(t) * score)
    if kind == "euler":
        return x + size * v
    alpha, sigma, _, _ = interpolant(path, torch.tensor(t, dtype=x.dtype))
    return (x + sigma ** 2 * score) / alpha                         # Tweedie: E[data | x]


# --------------------------------------------------------------------------------------------------
# Sampling with any of these

@torch.no_grad()
def trajectory(model, eps, y, sampler="heun", num_steps=50, cfg_scale=1.0, cfg_interval=(0.0, 1.0),
               cfg_channels=None, path="linear", prediction="velocity", sample_eps=None,
               reverse=False, atol=1e-6, rtol=1e-3, diffusion_form="sigma", diffusion_norm=1.0,
               last_step="mean", last_step_size=0.04, noise=None):
    """The states (N, C, H, W) that `sample` goes through; the arguments are its own."""
    t0, t1 = time_interval(path, prediction, sample_eps, reverse=reverse)
    check_sampling(model, eps, y, cfg_interval, cfg_channels)
    check_solver(sampler, num_steps, atol, rtol)

    def output(x, t, guide_t):
        """Times (N,), and the model's output (N, C, H, W), guided as the noise level says."""
        times = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        noise_level = 1 - guide_t
        out = guided(model, x, times, y, noise_level, cfg_scale, cfg_interval, cfg_channels)
        return times, out

    def velocity(x, t, guide_t):
        times, out = output(x, t, guide_t)
        return as_velocity(out, x, times, path, prediction)         # (N, C, H, W)

    if sampler in ODE_SAMPLERS:
        breaks = () if cfg_scale == 1.0 else [1 - level for level in cfg_interval]
        yield from integrate(velocity, eps, t0, t1, sampler, num_steps, breaks, atol, rtol)
        return

    check_sde(sampler, reverse, diffusion_norm, last_step, last_step_size, t0)
    if prediction == "velocity" and diffusion_form != "sbdm":
        t0 = 0.0                                                    # nothing divides by alpha
    if last_step is not None:
        t1 = 1 - last_step_size

    def w(t):
        t = torch.tensor(t, dtype=torch.float64)
        return diffusion(diffusion_form, path, t, diffusion_norm).item()

    def velocity_and_score(x, t, guide_t):
        """Both (N, C, H, W), from one call of the model."""
        times, out = output(x, t, guide_t)
        v = as_velocity(out, x, times, path, prediction)
        return v, as_score(out, x, times, path, prediction)

    def dW(i):
        return torch.randn_like(eps) if noise is None else noise(i)

    x = eps
    for x in integrate_sde(velocity_and_score, w, x, t0, t1, sampler, num_steps - 1, dW):
        yield x
    if last_step is not None:
        yield last_sde_step(velocity_and_score, w, x, t1, last_step_size, last_step, path)


def sample(model, eps, y, sampler="heun", num_steps=50, **options):
    """Noise eps (N, C, H, W) and labels y (N,) -> latents (N, C, H, W), from t = 0 to t = 1.

    sampler: an ODE, dx/dt = v, by "euler", "heun", "midpoint", "heun2", "heun3", "rk4" in num_steps
        equal steps, or by "dopri5" with steps that atol=1e-6 and rtol=1e-3 set for each latent; or
        the SDE of the same distribution by "sde-euler" or "sde-heun" in num_steps with the last.
        "heun" is "heun2" with a last step of Euler's: 2 num_steps - 1 calls of the model.
    cfg_scale=1.0, cfg_interval=(0.0, 1.0), cfg_channels=None: see `guided`. The noise level is
        1 - t, looked up where a step begins; dopri5 makes no step across an end of the interval.
    path="linear", prediction="velocity": what the model was trained with.
    sample_eps=None: see `time_interval`.
    reverse=False: True goes from data (given as eps) to noise, by an ODE.
    diffusion_form="sigma", diffusion_norm=1.0: w of the SDE, see `diffusion`: "constant", "sbdm",
        "sigma", "linear", "decreasing" or "increasing-decreasing".
    last_step="mean", last_step_size=0.04: how an SDE goes from 1 - last_step_size to 1: "mean" by
        its drift without noise, "euler" by the ODE's, "tweedie" to the data's mean given x. None:
        the num_steps - 1 steps of the SDE go to 1.
    noise: noise(i) -> (N, C, H, W) gives an SDE's noise of step i; default torch.randn_like(x).

    The official num_steps counts the points of an ODE's grid, one more than its steps. REPA's
    samplers (arXiv 2410.06940) are "heun", "euler" and "sde-euler" with time and velocity turned
    round: its diffusion t is "sigma" on its linear, and "linear" on its cosine path, here gvp.

    Raises ValueError for what is not possible, RuntimeError where dopri5 finds no step.
    """
    x = eps
    for x in trajectory(model, eps, y, sampler, num_steps, **options):
        pass
    return x


@torch.no_grad()
def log_likelihood(model, x, y, sampler="dopri5", num_steps=50, path="linear",
                   prediction="velocity", sample_eps=None, probe=None, atol=1e-6, rtol=1e-3):
    """log p(x | y) (N,) in nats of latents x (N, C, H, W), and their noise (N, C, H, W).

        log p(x) = log N(z; 0, I) - int_0^1 div v dt       by an ODE sampler, from data x to noise z
        div v is estimated by e . grad(e . v) with e of random signs

    probe: probe(i) -> e (N, C, H, W) of evaluation i; default: one draw for all of them, so that
    dopri5 sees a field without noise. There is no correction for grey levels: x is a latent.
    """
    check_sampling(model, x, y, (0.0, 1.0), None)
    check_solver(sampler, num_steps, atol, rtol)
    check_choice("sampler", sampler, ODE_SAMPLERS)
    t0, t1 = time_interval(path, prediction, sample_eps, reverse=True)
    if probe is None:
        signs = torch.randint(2, x.shape, device=x.device).to(x.dtype) * 2 - 1  # (N, C, H, W)
    evaluation = itertools.count()

    def field(state, t, guide_t):
        """v and div v at state (N, CHW + 1), which is x_t and the integral so far."""
        e = signs if probe is None else probe(next(evaluation))     # (N, C, H, W)
        times = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))       # (N,)
        with torch.enable_grad():
            x_t = state[:, :-1].reshape(x.shape).requires_grad_()   # (N, C, H, W)
            v = as_velocity(model(x_t, times, y), x_t, times, path, prediction)
            grad, = torch.autograd.grad((v * e).sum(), x_t)         # (N, C, H, W)
        divergence = (grad * e).flatten(1).sum(1, keepdim=True)     # (N, 1)
        return torch.cat([v.detach().flatten(1), divergence], dim=1)

    state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
    for state in integrate(field, state, t0, t1, sampler, num_steps, atol=atol, rtol=rtol):
        pass
    z = state[:, :-1]                                               # (N, CHW)
    prior = -0.5 * (z ** 2 + math.log(2 * math.pi)).sum(1)          # (N,), log N(z; 0, I)
    return prior + state[:, -1], z.view(x.shape)


# --------------------------------------------------------------------------------------------------
# Checks of arguments

# === checks shared by sit.py and dit.py: begin ===
def check_inputs(model, x, t, y, last):
    """Raises ValueError for latents of another shape, times outside [0, last], unknown labels.

    Values are read on the CPU only: a GPU would have to wait. There nn.Embedding's own assertion
    stops a wrong label.
    """
    want = (model.in_channels, model.input_size, model.input_size)
    if x.ndim != 4 or x.shape[1:] != want:
        raise ValueError(f"latents {tuple(x.shape)}: "
                         f"this model takes (N, {', '.join(map(str, want))})")
    if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
        raise ValueError(f"t {tuple(t.shape)}, y {tuple(y.shape)}: "
                         "want a time and a label for each latent")
    if x.device.type == "cpu" and len(x) and not torch.compiler.is_compiling():
        rows = model.y_embedder.embedding_table.num_embeddings
        if not (t.min() >= 0 and t.max() <= last):                  # nan too
            raise ValueError(f"times {t.min():g} to {t.max():g}: want 0 to {last}")
        if y.min() < 0 or y.max() >= rows:
            raise ValueError(f"labels {y.min()} to {y.max()}: want 0 to {rows - 1} (the number of "
                             "classes is no label, in a model with class_dropout_prob > 0)")


def check_sampling(model, x, y, cfg_interval, cfg_channels):
    """Raises ValueError for labels that the model does not know and guidance it cannot give.

    A model in train mode is refused: it would drop labels at random.
    """
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, LabelEmbedder) and module.training and module.dropout_prob > 0:
                raise ValueError("the model is in train mode and drops labels: call model.eval()")
    if y.shape != x.shape[:1] or y.min() < 0 or y.max() > model.num_classes:
        raise ValueError(f"labels {y.tolist()}: want one a latent, "
                         f"0 to {model.num_classes} (which is no label)")
    low, high = cfg_interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"cfg_interval {low:g} {high:g}: want noise levels 0 <= low <= high <= 1")
    if cfg_channels is not None and not 1 <= cfg_channels <= x.shape[1]:
        raise ValueError(f"cfg_channels {cfg_channels}: the latents have 1 to {x.shape[1]}")
# === checks shared by sit.py and dit.py: end ===


def check_transport(path, prediction, eps):
    """Raises ValueError for unknown names, and for an eps that cannot be."""
    check_choice("path", path, PATHS)
    check_choice("prediction", prediction, PREDICTIONS)
    if eps is None:
        return
    if not 0 <= eps < 0.5 or (eps == 0 and prediction != "velocity"):
        raise ValueError(f"eps {eps:g}: want at least 0 and less than 0.5, "
                         "and more than 0 for noise and score")


def check_solver(sampler, num_steps, atol, rtol):
    """Raises ValueError for an unknown sampler, too few steps and tolerances below 0."""
    check_choice("sampler", sampler, ODE_SAMPLERS + SDE_SAMPLERS)
    if sampler != "dopri5" and num_steps < (2 if sampler in SDE_SAMPLERS else 1):
        raise ValueError(f"num_steps {num_steps} is not possible: "
                         "an ODE takes at least 1 step, an SDE at least 2")
    if min(atol, rtol) < 0 or atol + rtol == 0:
        raise ValueError(f"atol {atol:g}, rtol {rtol:g}: want at least 0, and one of them more")


def check_sde(sampler, reverse, norm, last_step, last_step_size, t0):
    """Raises ValueError for what an SDE cannot do."""
    if reverse:
        raise ValueError(f"reverse: {sampler} goes from noise to data only; take an ODE sampler")
    if norm < 0:
        raise ValueError(f"diffusion_norm {norm:g}: want at least 0")
    check_choice("last_step", last_step, ("mean", "tweedie", "euler", None))
    if last_step is not None and not 0 < last_step_size < 1 - t0:
        raise ValueError(f"last_step_size {last_step_size:g}: "
                         f"want more than 0 and less than {1 - t0:g}")
