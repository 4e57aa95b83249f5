"""DiT: a transformer that learns the noise in a latent and the variance of a step back, and DDPM and DDIM samplers.

    q(x_t | x_start):  x_t = sqrt(alphas_cumprod_t) x_start + sqrt(1 - alphas_cumprod_t) eps     t = 0 .. T - 1
    t = 0 is (almost) data, t = T - 1 is noise: the reverse of sit.py
    loss = mean (eps_hat - eps)^2 + KL(q(x_{t-1} | x_t, x_start) || p(x_{t-1} | x_t)) in bits     "hybrid", T = 1000
    sampling: x_{t-1} ~ p(x_{t-1} | x_t) for t = T - 1 .. 0, on all steps or on a few of them

Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748; the diffusion is that of Nichol and
Dhariwal, arXiv 2102.09672. Parameter names are the official ones.
`diff sit.py dit.py` shows what separates diffusion from flow matching: the part between the markers is the same text.

    x (N, C, H, W) normalised latents    t (N,) integer steps    y (N,) labels, num_classes stands for "no label"
    T = (H / p)(W / p) tokens of width D, heads of width D / heads

    model = create("DiT-B/2", input_size=32, num_classes=1000)
    training_loss(model, x, y).mean().backward()
    z = sample(model, torch.randn(8, 4, 32, 32), y, num_steps=250, cfg_scale=1.5)
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

class DiT(nn.Module):
    """Noise network with the official parameter names. Its defaults are DiT-XL/2 on 32 x 32 latents of ImageNet.

    With learn_sigma the output has 2C channels: the noise, and where the variance lies between its two bounds.
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
        """x (N, C, H, W), t (N,) original steps, y (N,) labels -> (N, C or 2C, H, W). `drop` as in LabelEmbedder."""
        c = self.t_embedder(t) + self.y_embedder(y, drop)                        # (N, D)
        x = self.x_embedder(x) + self.pos_embed                                  # (N, T, D)
        for block in self.blocks:
            x = block(x, c)                                                      # (N, T, D)
        x = self.final_layer(x, c)                                               # (N, T, p * p * out_channels)
        return unpatchify(x, self.patch_size, self.out_channels)


def create(name, **kwargs):
    """create("DiT-B/2", num_classes=10) -> DiT. Raises ValueError for a name that is not DiT-SIZE/PATCH."""
    return DiT(**size_arguments(name, "DiT"), **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian diffusion

class GaussianDiffusion:
    """Tables of the forward process with T = 1000 and betas from 1e-4 to 0.02, seen at the `steps` that are given.

    A subset of the steps (Nichol and Dhariwal, section 4) has betas of its own, so that alphas_cumprod at its steps are
    those of the whole chain; `timestep_map` gives the original step, which is what the model is told.
    """

    def __init__(self, steps=range(1000)):
        alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
        self.timestep_map = np.array(sorted(steps))
        self.alphas_cumprod = alphas_cumprod[self.timestep_map]
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev
        self.log_betas = np.log(self.betas)
        # q(x_{t-1} | x_t, x_start) = N(coef1 x_start + coef2 x_t, posterior_variance)
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)
        # the posterior variance of step 0 is 0; its logarithm takes the value of step 1
        self.posterior_log_variance = np.log(np.append(self.posterior_variance[1:2], self.posterior_variance[1:]))

    def at(self, table, t, x):
        """Entries t (N,) of a table, shaped to multiply x (N, C, H, W); rounded to float32 as in the official code."""
        return torch.from_numpy(table).float().to(t.device)[t].to(x.dtype).view(-1, 1, 1, 1)

    def q_sample(self, x_start, t, eps):
        """x_t of x_start at the steps t (N,) of this chain."""
        return (self.at(self.sqrt_alphas_cumprod, t, x_start) * x_start
                + self.at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * eps)

    def predict_x_start(self, x_t, t, eps):
        """x_start that x_t and its noise eps imply."""
        return (self.at(1 / self.sqrt_alphas_cumprod, t, x_t) * x_t
                - self.at(self.sqrt_one_minus_alphas_cumprod / self.sqrt_alphas_cumprod, t, x_t) * eps)

    def posterior_mean(self, x_start, x_t, t):
        """Mean of q(x_{t-1} | x_t, x_start)."""
        return self.at(self.posterior_mean_coef1, t, x_t) * x_start + self.at(self.posterior_mean_coef2, t, x_t) * x_t

    def log_variance(self, fraction, t, x_t):
        """The learned log variance: `fraction` in [-1, 1] (not clamped) goes from the posterior's to log beta."""
        low, high = self.at(self.posterior_log_variance, t, x_t), self.at(self.log_betas, t, x_t)
        return low + (fraction + 1) / 2 * (high - low)


DIFFUSION = GaussianDiffusion()


def gaussian_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) in nats, element by element."""
    return 0.5 * (logvar2 - logvar1 - 1 + (logvar1 - logvar2).exp() + (mean1 - mean2).square() * (-logvar2).exp())


def discretized_gaussian_nll(x, mean, log_scale):
    """-log p(x) in nats, element by element, where x in [-1, 1] stands for one of 256 grey levels.

    The official code uses this at t = 0 though its x are latents, which are no grey levels; so does this file.
    """
    def cdf(v):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3)))

    above, below = cdf((x - mean + 1 / 255) * (-log_scale).exp()), cdf((x - mean - 1 / 255) * (-log_scale).exp())
    p = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -p.clamp(min=1e-12).log()


# ---------------------------------------------------------------------------------------------------------------------
# Objective and samplers

def training_loss(model, x, y, t=None, eps=None, drop=None):
    """Hybrid loss (N,) of latents x (N, C, H, W) with labels y (N,): squared error of the noise + variational bound.

    Draws that are not given are made here: t (N,) uniform over the 1000 steps, eps standard normal like x; drop (N,)
    bool says whose label is dropped (None: the model draws it in train mode). A model without learn_sigma has the first
    term alone. The bound is in bits per dimension and teaches the variance only: the mean in it carries no gradient.
    """
    t = torch.randint(1000, (x.shape[0],), device=x.device) if t is None else t
    eps = torch.randn_like(x) if eps is None else eps
    x_t = DIFFUSION.q_sample(x, t, eps)
    out = model(x_t, t, y, drop)
    eps_hat, fraction = out[:, :x.shape[1]], out[:, x.shape[1]:]
    loss = (eps_hat - eps).square().flatten(1).mean(1)
    if fraction.shape[1] == 0:
        return loss
    mean = DIFFUSION.posterior_mean(DIFFUSION.predict_x_start(x_t, t, eps_hat.detach()), x_t, t)
    logvar = DIFFUSION.log_variance(fraction, t, x_t)
    true_mean = DIFFUSION.posterior_mean(x, x_t, t)
    kl = gaussian_kl(true_mean, DIFFUSION.at(DIFFUSION.posterior_log_variance, t, x), mean, logvar).flatten(1).mean(1)
    nll = discretized_gaussian_nll(x, mean, 0.5 * logvar).flatten(1).mean(1)
    return loss + torch.where(t == 0, nll, kl) / math.log(2)


def spaced_steps(num_steps):
    """num_steps of the 1000 steps, evenly spaced from 0 to 999. Raises ValueError outside 1 .. 1000."""
    if not 1 <= num_steps <= 1000:
        raise ValueError(f"num_steps {num_steps} is not possible: DiT samples in 1 to 1000 steps")
    stride = 999 / max(1, num_steps - 1)
    return [round(i * stride) for i in range(num_steps)]


@torch.no_grad()
def sample(model, eps, y, sampler="ddpm", num_steps=250, cfg_scale=1.0, cfg_interval=(0.0, 1.0), cfg_channels=None,
           noise=None):
    """Noise eps (N, C, H, W) and labels y (N,) -> latents (N, C, H, W), by num_steps model calls.

    sampler "ddpm" draws fresh noise at every step but the last: noise(i) -> (N, C, H, W) gives that of step i (default:
    torch.randn_like). sampler "ddim" is deterministic. x_start is not clipped, since latents have no range. The noise
    level of cfg_interval is t / 999; see `guided`. Raises ValueError for another sampler or an impossible num_steps.
    """
    if sampler not in ("ddpm", "ddim"):
        raise ValueError(f"sampler {sampler!r} is not known to DiT: choose ddpm or ddim")
    diffusion, C, x = GaussianDiffusion(spaced_steps(num_steps)), eps.shape[1], eps
    for i, step in enumerate(reversed(range(num_steps))):
        t = torch.full((x.shape[0],), step, device=x.device)
        original = int(diffusion.timestep_map[step])
        out = guided(model, x, torch.full_like(t, original), y, original / 999, cfg_scale, cfg_interval, cfg_channels)
        eps_hat, fraction = out[:, :C], out[:, C:]
        x_start = diffusion.predict_x_start(x, t, eps_hat)
        if sampler == "ddim":
            alpha_prev = diffusion.alphas_cumprod_prev[step]
            x = math.sqrt(alpha_prev) * x_start + math.sqrt(1 - alpha_prev) * eps_hat
            continue
        mean = diffusion.posterior_mean(x_start, x, t)
        if step == 0:
            return mean
        if fraction.shape[1] == 0:                                # no learned variance: the posterior's
            logvar = diffusion.at(diffusion.posterior_log_variance, t, x)
        else:
            logvar = diffusion.log_variance(fraction, t, x)
        x = mean + (0.5 * logvar).exp() * (torch.randn_like(x) if noise is None else noise(i))
    return x
