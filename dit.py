"""DiT: a transformer learns the noise in a latent and the variance of a step back; DDPM and DDIM.

    q(x_t | x_start)   x_t = sqrt(alphas_cumprod_t) x_start + sqrt(1 - alphas_cumprod_t) eps
    t = 0 .. 999       t = 0 is (almost) data, t = 999 is noise: the reverse of sit.py
    loss               mean (eps_hat - eps)^2 + KL(q(x_{t-1} | x_t, x_start) || p(x_{t-1} | x_t)),
                       the KL in bits; it teaches the variance alone, and is an NLL at t = 0
    sampling           x_{t-1} ~ p(x_{t-1} | x_t) for t = 999 .. 0, on all steps or on a few of them

Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748; the diffusion is
that of Nichol and Dhariwal, arXiv 2102.09672. Parameter names are the official ones. `diff sit.py
dit.py` shows what separates diffusion from flow matching: the parts between markers are the same
text.

    N latents of C channels, x (N, C, H, W), of deviation 1 (Stable Diffusion's times 0.18215)
    T = (H / p)(W / p) tokens of width D, p the patch size
    t (N,) steps of S, y (N,) labels, of which num_classes stands for "no label"

    model = create("DiT-B/2", input_size=32, num_classes=1000)
    training_loss(model, x, y).mean().backward()
    z = sample(model.eval(), torch.randn(8, 4, 32, 32), y, num_steps=250, cfg_scale=1.5)

In reading order: the transformer; the diffusion, its loss, DDPM and DDIM; then sampling with
guidance, noise schedules, shorter chains and the variational bound.
"""
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

class DiT(nn.Module):
    """Noise network with the official parameter names; defaults: DiT-XL/2, ImageNet, 256 px.

    With learn_sigma the output has 2C channels: the noise, and where the variance lies between its
    two bounds. Raises ValueError where input_size does not divide into patches or hidden_size into
    heads.
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
        """Noise and variance (N, C or 2C, H, W) of x (N, C, H, W) at steps t (N,), labels y (N,).

        `drop` as in LabelEmbedder.
        """
        check_inputs(self, x, t, y, 999)
        c = self.t_embedder(t) + self.y_embedder(y, drop)           # (N, D)
        x = self.x_embedder(x) + self.pos_embed                     # (N, T, D)
        for block in self.blocks:                                   # (N, T, D) each
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c)
        x = self.final_layer(x, c)                                  # (N, T, p * p * out_channels)
        return unpatchify(x, self.patch_size, self.out_channels)    # (N, C or 2C, H, W)


def create(name, **kwargs):
    """create("DiT-B/2", num_classes=10) -> DiT. Raises ValueError for another kind of name."""
    return DiT(**size_arguments(name, "DiT"), **kwargs)


# --------------------------------------------------------------------------------------------------
# Gaussian diffusion: x_t of x_start, and the way back

class GaussianDiffusion:
    """q(x_t | x_start) of 1000 steps, seen at some of them, and its reverse p(x_{t-1} | x_t).

    num_steps: which steps are seen, see `space_timesteps`. t (N,) counts these; `timestep_map` (S,)
        has the original ones, which the model is told.
    schedule: see `betas_of`. prediction: the model's first C channels are "noise" or "x_start".
    fixed_variance: of a model that learns none: "large" is beta, "small" the posterior's.

    Tables (S,) are float64, and float32 where tensors meet them, as in the official code.
    """

    def __init__(self, num_steps=1000, schedule="linear", prediction="noise",
                 fixed_variance="large"):
        check_choice("prediction", prediction, ("noise", "x_start"))
        check_choice("fixed_variance", fixed_variance, ("large", "small"))
        self.prediction = prediction
        self.timestep_map = np.array(space_timesteps(1000, num_steps))
        self.num_timesteps = len(self.timestep_map)
        if self.num_timesteps < 2:
            raise ValueError("num_steps 1 is not possible: "
                             "the one step would be t = 0, which is nearly data")
        # A shorter chain has betas of its own, so that its alphas_cumprod are those of the whole.
        self.alphas_cumprod = np.cumprod(1 - betas_of(schedule))[self.timestep_map]
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev
        self.log_betas = np.log(self.betas)
        # q(x_t | x_start), and x_start = recip x_t - recipm1 eps
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)
        # q(x_{t-1} | x_t, x_start) = N(coef1 x_start + coef2 x_t, posterior_variance)
        rest = 1 - self.alphas_cumprod
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / rest
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / rest
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / rest
        # the variance at step 0 is 0: its logarithm, and that of beta, take the value of step 1
        small = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        large = np.log(np.append(self.posterior_variance[1], self.betas[1:]))
        self.posterior_log_variance_clipped = small
        self.fixed_log_variance = large if fixed_variance == "large" else small
        self.on_device = {}

    def table(self, name, device, dtype):
        """A table (S,) on a device, where it is kept."""
        if (name, device) not in self.on_device:
            table = torch.tensor(getattr(self, name), dtype=dtype, device=device)
            self.on_device[name, device] = table
        return self.on_device[name, device]

    def at(self, name, t):
        """Entries (N, 1, 1, 1) of a table at steps t (N,), float32."""
        return self.table(name, t.device, torch.float32)[t].view(-1, 1, 1, 1)

    def original(self, t):
        """The steps (N,) of the whole chain that t (N,) are."""
        return self.table("timestep_map", t.device, torch.int64)[t]

    def q_sample(self, x_start, t, eps):
        """x_t (N, C, H, W) of x_start at steps t with noise eps."""
        signal = self.at("sqrt_alphas_cumprod", t)                  # (N, 1, 1, 1)
        return signal * x_start + self.at("sqrt_one_minus_alphas_cumprod", t) * eps

    def predict_x_start(self, x_t, t, eps):
        """x_start (N, C, H, W) that x_t and its noise imply."""
        recip = self.at("sqrt_recip_alphas_cumprod", t)             # (N, 1, 1, 1)
        return recip * x_t - self.at("sqrt_recipm1_alphas_cumprod", t) * eps

    def predict_eps(self, x_t, t, x_start):
        """Noise (N, C, H, W) that x_t and its x_start imply."""
        recip = self.at("sqrt_recip_alphas_cumprod", t)             # (N, 1, 1, 1)
        return (recip * x_t - x_start) / self.at("sqrt_recipm1_alphas_cumprod", t)

    def q_posterior(self, x_start, x_t, t):
        """Mean and log variance of q(x_{t-1} | x_t, x_start)."""
        mean = (self.at("posterior_mean_coef1", t) * x_start
                + self.at("posterior_mean_coef2", t) * x_t)         # (N, C, H, W)
        return mean, self.at("posterior_log_variance_clipped", t)

    def p_mean_variance(self, out, x_t, t, clip_denoised=False):
        """Mean and log variance of p(x_{t-1} | x_t), and x_start, of the model's output.

        out (N, C or 2C, H, W). clip_denoised holds x_start in [-1, 1], the range of images; latents
        have none.
        """
        C = x_t.shape[1]
        predicted, fraction = out[:, :C], out[:, C:]
        if self.prediction == "noise":
            predicted = self.predict_x_start(x_t, t, predicted)
        x_start = predicted.clamp(-1, 1) if clip_denoised else predicted
        mean, low = self.q_posterior(x_start, x_t, t)               # (N, C, H, W), (N, 1, 1, 1)
        if fraction.shape[1] == 0:                                  # no variance is learned
            return mean, self.at("fixed_log_variance", t), x_start
        # the log variance lies between the posterior's (-1) and beta's (1); it is not clamped
        fraction = (fraction + 1) / 2                               # (N, C, H, W)
        return mean, fraction * self.at("log_betas", t) + (1 - fraction) * low, x_start


def training_loss(model, x, y, diffusion=None, loss="mse", t=None, eps=None, drop=None):
    """Loss (N,) of latents x (N, C, H, W) with labels y (N,).

    diffusion: the whole chain of 1000 steps, predicting the noise, where not given.
    loss: "mse" is (model - eps)^2, or (model - x)^2, + the variational bound in bits per dimension
        where the model learns its variance; "rescaled_mse" the same with the bound times S / 1000;
        "kl" is S times the bound alone.
    t, eps, drop: drawn here where not given: eps standard normal like x, then t (N,) uniform over
        the S steps of `diffusion`. drop (N,) bool says whose label is dropped; a model in train
        mode draws it.

    Raises ValueError for another loss.
    """
    check_choice("loss", loss, ("mse", "rescaled_mse", "kl"))
    diffusion = diffusion or DIFFUSION
    if eps is None:
        eps = torch.randn_like(x)                                   # (N, C, H, W)
    if t is None:
        t = torch.randint(diffusion.num_timesteps, (len(x),), device=x.device)  # (N,)
    x_t = diffusion.q_sample(x, t, eps)                             # (N, C, H, W)
    out = model(x_t, diffusion.original(t), y, drop)                # (N, C or 2C, H, W)
    if loss == "kl":
        bound, _ = variational_bound(diffusion, out, x, x_t, t)
        return diffusion.num_timesteps * bound                      # (N,)
    C = x.shape[1]
    target = eps if diffusion.prediction == "noise" else x
    mse = (out[:, :C] - target).square().flatten(1).mean(1)         # (N,)
    if out.shape[1] == C:
        return mse
    # the bound teaches the variance only: no gradient goes through the mean in it
    frozen = torch.cat([out[:, :C].detach(), out[:, C:]], dim=1)    # (N, 2C, H, W)
    bound, _ = variational_bound(diffusion, frozen, x, x_t, t)       # (N,)
    if loss == "rescaled_mse":
        bound = bound * (diffusion.num_timesteps / 1000)
    return mse + bound


def ddpm(diffusion, predict, x, noise):
    """Ancestral sampling, x_{t-1} ~ p(x_{t-1} | x_t); yields x (N, C, H, W) after every step.

    predict(x, t, step): mean, log variance and x_start that the model gives at t (N,), all `step`.
    noise(i): standard normal (N, C, H, W) of the i-th step.
    """
    for i, step in enumerate(reversed(range(diffusion.num_timesteps))):
        t = torch.full((len(x),), step, device=x.device)            # (N,)
        mean, logvar, _ = predict(x, t, step)                       # (N, C, H, W)
        x = mean
        if step > 0:                                                # the last step takes no noise
            x = x + (0.5 * logvar).exp() * noise(i)
        yield x


def ddim(diffusion, predict, x, noise, eta=0.0):
    """The same by DDIM (Song et al., arXiv 2010.02502): eta 0 is an ODE's step.

    eta 1 is as noisy as DDPM with the posterior's variance. Yields x after every step.
    """
    for i, step in enumerate(reversed(range(diffusion.num_timesteps))):
        t = torch.full((len(x),), step, device=x.device)            # (N,)
        _, _, x_start = predict(x, t, step)                         # (N, C, H, W)
        eps = diffusion.predict_eps(x, t, x_start)                  # (N, C, H, W)
        alpha_prev = diffusion.alphas_cumprod_prev[step]
        sigma = eta * math.sqrt(diffusion.posterior_variance[step])
        x = math.sqrt(alpha_prev) * x_start + math.sqrt(1 - alpha_prev - sigma ** 2) * eps
        if sigma > 0:                                               # it is 0 at step 0
            x = x + sigma * noise(i)
        yield x


# --------------------------------------------------------------------------------------------------
# Sampling, with guidance

@torch.no_grad()
def trajectory(model, eps, y, sampler="ddpm", num_steps=250, cfg_scale=1.0, cfg_interval=(0.0, 1.0),
               cfg_channels=None, schedule="linear", prediction="noise", fixed_variance="large",
               reverse=False, clip_denoised=False, eta=0.0, noise=None):
    """The states (N, C, H, W) that `sample` goes through; the arguments are its own."""
    check_sampling(model, eps, y, cfg_interval, cfg_channels)
    check_sampler(sampler, eta, reverse)
    diffusion = GaussianDiffusion(num_steps, schedule, prediction, fixed_variance)

    def predict(x, t, step):
        """Mean, log variance and x_start, of the model guided as the noise level says."""
        original = diffusion.original(t)                            # (N,)
        noise_level = int(diffusion.timestep_map[step]) / 999
        out = guided(model, x, original, y, noise_level, cfg_scale, cfg_interval, cfg_channels)
        return diffusion.p_mean_variance(out, x, t, clip_denoised)

    def draw(i):
        return torch.randn_like(eps) if noise is None else noise(i)

    if reverse:
        yield from ddim_reverse(diffusion, predict, eps)
    elif sampler == "ddpm":
        yield from ddpm(diffusion, predict, eps, draw)
    else:
        yield from ddim(diffusion, predict, eps, draw, eta)


def ddim_reverse(diffusion, predict, x):
    """DDIM from data x to noise; yields x (N, C, H, W) after every step."""
    for step in range(diffusion.num_timesteps):
        t = torch.full((len(x),), step, device=x.device)            # (N,)
        _, _, x_start = predict(x, t, step)                         # (N, C, H, W)
        eps = diffusion.predict_eps(x, t, x_start)                  # (N, C, H, W)
        alpha_next = diffusion.alphas_cumprod_next[step]
        x = math.sqrt(alpha_next) * x_start + math.sqrt(1 - alpha_next) * eps
        yield x


def sample(model, eps, y, sampler="ddpm", num_steps=250, **options):
    """Noise eps (N, C, H, W) and labels y (N,) -> latents (N, C, H, W).

    sampler: "ddpm" or "ddim". The model is called once a step.
    num_steps: how many of the 1000 steps, or which: see `space_timesteps`.
    cfg_scale=1.0, cfg_interval=(0.0, 1.0), cfg_channels=None: see `guided`. The noise level is
        t / 999.
    schedule="linear", prediction="noise", fixed_variance="large": see `GaussianDiffusion`. Whether
        the variance is learned is read from the model's output.
    reverse=False: True goes from data (given as eps) to noise, by ddim with eta 0.
    clip_denoised=False: hold every x_start in [-1, 1].
    eta=0.0: noise of ddim, 0 to 1.
    noise: noise(i) -> (N, C, H, W) gives the noise of step i, counted from 0; default
        torch.randn_like(x).

    Raises ValueError for what is not possible.
    """
    x = eps
    for x in trajectory(model, eps, y, sampler, num_steps, **options):
        pass
    return x


# --------------------------------------------------------------------------------------------------
# Schedules, shorter chains, and the whole variational bound

def betas_of(schedule):
    """Variances (1000,) of the noise that each step adds. Raises ValueError for another schedule.

    "linear" goes from 1e-4 to 0.02; "squaredcos_cap_v2" is Nichol and Dhariwal's.
    """
    check_choice("schedule", schedule, ("linear", "squaredcos_cap_v2"))
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    alpha_bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def space_timesteps(num_timesteps, respacing):
    """The steps of a shorter chain, sorted.

    respacing: 250 or "250" of them evenly from 0 to the last; "ddim50" every 20th from 0; or counts
    ("10,15,20"), one for each equal section of the chain. 1 gives [0], as in the official code.

    Raises ValueError for more steps than there are, and where no whole stride gives "ddimN".
    """
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        count = int(respacing[4:])
        for stride in range(1, num_timesteps):
            if len(range(0, num_timesteps, stride)) == count:
                return list(range(0, num_timesteps, stride))
        raise ValueError(f"{respacing}: no whole stride makes {count} of {num_timesteps} steps")
    if isinstance(respacing, str):
        respacing = [int(count) for count in respacing.split(",")]
    counts = [respacing] if isinstance(respacing, int) else respacing
    steps = []
    start = 0
    for i, count in enumerate(counts):
        size = num_timesteps // len(counts) + (i < num_timesteps % len(counts))     # of the section
        if not 1 <= count <= size:
            raise ValueError(f"num_steps {count} is not possible: "
                             f"DiT samples in 1 to {size} steps")
        stride = (size - 1) / max(1, count - 1)
        place = 0.0
        for _ in range(count):
            steps.append(start + round(place))
            place += stride                                         # not i * stride: it rounds so
        start += size
    return steps


def variational_bound(diffusion, out, x_start, x_t, t, clip_denoised=False):
    """The bound's term of step t (N,) in bits per dimension, and the model's x_start.

    It is the KL of the two posteriors; at step 0 it is the negative log likelihood of x_start as a
    grey level, though a latent is none.
    """
    true_mean, true_logvar = diffusion.q_posterior(x_start, x_t, t)
    mean, logvar, predicted = diffusion.p_mean_variance(out, x_t, t, clip_denoised)
    kl = gaussian_kl(true_mean, true_logvar, mean, logvar)          # (N, C, H, W)
    nll = discretized_gaussian_nll(x_start, mean, 0.5 * logvar)     # (N, C, H, W)
    nats = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))       # (N,)
    return nats / math.log(2), predicted


def gaussian_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) in nats, element by element."""
    distance = (mean1 - mean2).square() * (-logvar2).exp()
    return 0.5 * (logvar2 - logvar1 - 1 + (logvar1 - logvar2).exp() + distance)


def discretized_gaussian_nll(x, mean, log_scale):
    """-log p(x) in nats, element by element, where x in [-1, 1] is one of 256 grey levels."""
    def cdf(v):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3)))

    above = cdf((x - mean + 1 / 255) * (-log_scale).exp())
    below = cdf((x - mean - 1 / 255) * (-log_scale).exp())
    p = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -p.clamp(min=1e-12).log()


DIFFUSION = GaussianDiffusion()                                     # what the paper trains with


@torch.no_grad()
def bits_per_dim(model, x, y, diffusion=DIFFUSION, clip_denoised=False, noise=None):
    """The variational bound on -log2 p(x | y) per dimension of latents x (N, C, H, W), by parts.

    -> dict of total_bpd (N,), prior_bpd (N,), and vb, xstart_mse, mse (N, S): the bound's terms and
    the squared errors of x_start and of the noise, from the noisiest step to step 0.

    noise: noise(i) -> (N, C, H, W) of the i-th of them; default torch.randn_like(x). Calls the
    model S times.
    """
    terms = {"vb": [], "xstart_mse": [], "mse": []}
    for i, step in enumerate(reversed(range(diffusion.num_timesteps))):
        t = torch.full((len(x),), step, device=x.device)            # (N,)
        eps = torch.randn_like(x) if noise is None else noise(i)    # (N, C, H, W)
        x_t = diffusion.q_sample(x, t, eps)                         # (N, C, H, W)
        out = model(x_t, diffusion.original(t), y)                  # (N, C or 2C, H, W)
        bound, x_start = variational_bound(diffusion, out, x, x_t, t, clip_denoised)
        eps_hat = diffusion.predict_eps(x_t, t, x_start)            # (N, C, H, W)
        terms["vb"].append(bound)                                   # (N,)
        terms["xstart_mse"].append((x_start - x).square().flatten(1).mean(1))
        terms["mse"].append((eps_hat - eps).square().flatten(1).mean(1))
    # the prior's term: KL(q(x_T | x_start) || N(0, 1))
    last = torch.full((len(x),), diffusion.num_timesteps - 1, device=x.device)  # (N,)
    mean = diffusion.at("sqrt_alphas_cumprod", last) * x            # (N, C, H, W)
    logvar = diffusion.at("log_one_minus_alphas_cumprod", last)     # (N, 1, 1, 1)
    zero = torch.zeros((), device=x.device)
    prior = gaussian_kl(mean, logvar, zero, zero)                   # (N, C, H, W)
    out = {name: torch.stack(columns, dim=1) for name, columns in terms.items()}  # (N, S) each
    out["prior_bpd"] = prior.flatten(1).mean(1) / math.log(2)       # (N,)
    out["total_bpd"] = out["vb"].sum(1) + out["prior_bpd"]          # (N,)
    return out


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


def check_sampler(sampler, eta, reverse):
    """Raises ValueError for an unknown sampler, and for noise that it cannot have."""
    check_choice("sampler", sampler, ("ddpm", "ddim"))
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta:g}: want 0 to 1")
    if reverse and (sampler, eta) != ("ddim", 0.0):
        raise ValueError("reverse: only ddim with eta 0 goes from data to noise")
