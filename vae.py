"""The autoencoder of Stable Diffusion, the losses that train it, and its weights on disk.

    mean, logvar = encoder(x);  q(z | x) = N(mean, exp(logvar));  z = mean + exp(logvar / 2) noise
    rec = decoder(z)
    L = mse(rec, x) + w_p LPIPS(rec, x) + w_g L_gan + w_kl KL(q || N(0, 1))

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752;
the GAN loss is that of Esser et al., arXiv 2012.09841; LPIPS is Zhang et al., arXiv 1801.03924.
Module names, config.json and file names are those of diffusers.AutoencoderKL, so a folder written
here loads there and the reverse; CompVis' .ckpt files load too.

    x, rec (N, 3, H, W) images in [-1, 1]      z (N, C, h, w) latents, h = H / f, w = W / f
    level l = 0 ... L, fine to coarse: maps (N, D_l, H_l, W_l), H_l = H / 2^l, W_l likewise; f = 2^L
    in a block H and W are those of its level; a map has D channels, or I going in and O coming out

    vae = AutoencoderKL.from_pretrained("folder")
    z = vae.encode(x).latent_dist.sample()
    rec = vae.decode(z).sample
"""
import contextlib
import hashlib
import http.client
import inspect
import json
import math
import os
import re
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_reduce
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Building blocks


def fast_layout(x):
    """x (N, D, H, W), on a CPU without gradients with its channels last in memory."""
    # CPU: encoder and decoder of a 256 px image 4.3 s instead of 5.1, on one thread; slower with
    # gradients. H100: slower, group norm wants channels first; training 31 images a second, not 39.
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    return x


def silu(x):
    """x sigmoid(x), in place where no gradients are kept."""
    return F.silu(x, inplace=not torch.is_grad_enabled())           # no second map of this size


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (N, I, H, W) -> (N, O, H, W), with a 1x1
    convolution on the shortcut where I and O differ."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        with torch.no_grad():                                    # from scratch, a block that begins
            self.conv2.weight.mul_(0.01)                           # near its shortcut trains faster

    def forward(self, x):
        h = self.conv1(silu(self.norm1(x)))                         # (N, O, H, W)
        h = self.conv2(silu(self.norm2(h)))                         # (N, O, H, W)
        return h.add_(self.conv_shortcut(x))                        # (N, O, H, W), in place as silu


class Attention(nn.Module):
    """Self-attention of one head over the H W positions, with a residual."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)           # (N, H W, D)
        q = self.to_q(h)[:, None]                                   # (N, 1, H W, D)
        k = self.to_k(h)[:, None]                                   # (N, 1, H W, D)
        v = self.to_v(h)[:, None]                                   # (N, 1, H W, D)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]           # (N, H W, D)
        h = self.to_out[0](h).transpose(1, 2)                       # (N, D, H W)
        return x + h.reshape(x.shape)                               # (N, D, H, W)


class Downsample(nn.Module):
    """Half the size: zeros on the right and below only, then a 3x3 convolution of stride 2."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 1))                                  # (N, D, H + 1, W + 1)
        return self.conv(x)                                         # (N, D, H / 2, W / 2)


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        # As one reads it elsewhere:
        #     x = F.interpolate(x, scale_factor=2, mode="nearest")    (N, D, 2H, 2W)
        #     return self.conv(x)                                     (N, D, 2H, 2W)
        # Both are one transposed convolution of stride 2, by the 3x3 kernel widened with a 2x2 box.
        # Each output lies over 2x2 inputs, not 3x3: 4 / 9 of the products. The three upsamplings of
        # a 256 px image take 0.48 s instead of 0.83, the whole decoder 2.7 s instead of 3.0 (one
        # thread of an AMD EPYC, float32, no gradients).
        w = self.conv.weight                                        # (O, I, 3, 3)
        w = F.pad(w, (0, 1)) + F.pad(w, (1, 0))                     # (O, I, 3, 4)
        w = F.pad(w, (0, 0, 0, 1)) + F.pad(w, (0, 0, 1, 0))         # (O, I, 4, 4)
        # a convolution, as torch has it, is a correlation; its transpose turns the kernel round
        w = w.flip(2, 3).transpose(0, 1)                            # (I, O, 4, 4)
        return F.conv_transpose2d(x, w, self.conv.bias, stride=2, padding=1)  # (N, D, 2H, 2W)


def through(modules, x, checkpointed):
    """x through modules one by one; checkpointed: the backward pass computes again what lies inside
    them, instead of keeping it."""
    for module in modules:
        if checkpointed and torch.is_grad_enabled():
            x = checkpoint(module, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = module(x)
    return x


class Level(nn.Module):
    """All that happens at one resolution: resnets, then the way to the next resolution."""

    checkpointed = False

    def __init__(self, in_channels, out_channels, num_layers, groups, down=False, up=False):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(
            ResnetBlock(widths[i], widths[i + 1], groups) for i in range(num_layers))
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if up else [])

    def forward(self, x):
        x = through(self.resnets, x, self.checkpointed)             # (N, O, H, W)
        x = through(self.downsamplers, x, self.checkpointed)        # (N, O, H / 2, W / 2) if down
        return through(self.upsamplers, x, self.checkpointed)       # (N, O, 2H, 2W) if up


class MidBlock(nn.Module):
    """Resnet, attention where there is any, resnet at the lowest resolution."""

    checkpointed = False

    def __init__(self, channels, groups, attention):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x):
        first, second = self.resnets
        modules = (first, *self.attentions, second)
        return through(modules, x, self.checkpointed)               # (N, D, H, W)


class Encoder(nn.Module):
    """Images x (N, in_channels, H, W) -> moments (N, 2C, h, w), before quant_conv."""

    def __init__(self, in_channels, latent_channels, channels, layers_per_block, groups,
                 attention):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width = channels[0]
        for level, out in enumerate(channels):
            down = level < len(channels) - 1
            self.down_blocks.append(Level(width, out, layers_per_block, groups, down=down))
            width = out
        self.mid_block = MidBlock(width, groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(fast_layout(x))                            # (N, D_0, H, W)
        for block in self.down_blocks:                              # l = 0 ... L, the last as it is
            h = block(h)                                            # (N, D_l, H_l / 2, W_l / 2)
        h = self.mid_block(h)                                       # (N, D_L, h, w)
        h = silu(self.conv_norm_out(h))                             # (N, D_L, h, w)
        return self.conv_out(h)                                     # (N, 2C, h, w)


class Decoder(nn.Module):
    """Latents z (N, C, h, w), behind post_quant_conv, -> images (N, out_channels, H, W). One more
    resnet a level than the encoder has."""

    def __init__(self, latent_channels, out_channels, channels, layers_per_block, groups,
                 attention):
        super().__init__()
        width = channels[-1]
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            out = channels[level]
            self.up_blocks.append(Level(width, out, layers_per_block + 1, groups, up=level > 0))
            width = out
        self.mid_block = MidBlock(channels[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def features(self, z):
        """Latents (N, C, h, w) -> what the last layer sees (N, D_0, H, W)."""
        h = self.conv_in(fast_layout(z))                            # (N, D_L, h, w)
        h = self.mid_block(h)                                       # (N, D_L, h, w)
        for block in self.up_blocks:                                # l = L ... 0, the last as it is
            h = block(h)                                            # (N, D_l, 2 H_l, 2 W_l)
        return silu(self.conv_norm_out(h))                          # (N, D_0, H, W)

    def forward(self, z):
        return self.conv_out(self.features(z))                      # (N, 3, H, W)


# --------------------------------------------------------------------------------------------------
# Model


class DiagonalGaussian:
    """q(z | x) from moments (N, 2C, h, w): mean, and log variance clamped to [-30, 20], each
    (N, C, h, w)."""

    def __init__(self, moments):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, generator=None):
        """One draw (N, C, h, w), made on the device of the generator."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(
            self.mean.shape, generator=generator, dtype=self.mean.dtype, device=device)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self):
        """The most likely latent: the mean."""
        return self.mean

    def kl(self, other=None):
        """KL(q || other) in nats, summed over C, h and w -> (N,); `other` is N(0, 1) by default."""
        if other is None:
            return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))
        distance = (self.mean - other.mean).square() / other.var    # (N, C, h, w)
        ratio = self.var / other.var                                # (N, C, h, w)
        return 0.5 * (distance + ratio - 1.0 - self.logvar + other.logvar).sum(dim=(1, 2, 3))

    def nll(self, z):
        """-log q(z) in nats, summed over C, h and w -> (N,)."""
        distance = (z - self.mean).square() / self.var              # (N, C, h, w)
        return 0.5 * (math.log(2 * math.pi) + self.logvar + distance).sum(dim=(1, 2, 3))


class Config(dict):
    """The entries of config.json, as attributes too: config["sample_size"], config.sample_size."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(f"config has no entry {name!r}")
        return self[name]


class AutoencoderKL(nn.Module):
    """diffusers' AutoencoderKL; the defaults are Stable Diffusion's (83,653,863 parameters, f = 8).

    Those of SD3 and FLUX have 16 latent channels, a shift_factor and no quant_conv. `latents_mean`
    and `latents_std` (C numbers each) are statistics of the training data's latents, or None.
    `encode` and `decode` never apply a scale; `normalize` and `denormalize` do. Raises ValueError
    for what is not built here.
    """

    def __init__(self, in_channels=3, out_channels=3, block_out_channels=(128, 256, 512, 512),
                 layers_per_block=2, latent_channels=4, norm_num_groups=32, sample_size=256,
                 scaling_factor=0.18215, latents_mean=None, latents_std=None, shift_factor=None,
                 use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True,
                 force_upcast=True, act_fn="silu", down_block_types=None, up_block_types=None):
        super().__init__()
        channels = list(block_out_channels)                         # D_0 ... D_L
        self.config = Config(
            in_channels=in_channels, out_channels=out_channels, block_out_channels=channels,
            layers_per_block=layers_per_block, latent_channels=latent_channels,
            norm_num_groups=norm_num_groups, sample_size=sample_size,
            scaling_factor=scaling_factor, shift_factor=shift_factor,
            latents_mean=latents_mean, latents_std=latents_std, use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv, force_upcast=force_upcast, act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
            down_block_types=down_block_types or ["DownEncoderBlock2D"] * len(channels),
            up_block_types=up_block_types or ["UpDecoderBlock2D"] * len(channels))
        check_config(self.config)
        blocks = channels, layers_per_block, norm_num_groups, mid_block_add_attention
        self.encoder = Encoder(in_channels, latent_channels, *blocks)
        self.decoder = Decoder(latent_channels, out_channels, *blocks)
        self.quant_conv = nn.Identity()
        self.post_quant_conv = nn.Identity()
        if use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        if use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    @property
    def dtype(self):
        """The type of the weights."""
        return self.encoder.conv_in.weight.dtype

    @property
    def device(self):
        """Where the weights are."""
        return self.encoder.conv_in.weight.device

    @property
    def factor(self):
        """Pixels a side of a latent cell: f = 2^(levels - 1)."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def enable_gradient_checkpointing(self):
        """Keep only the inputs of every block for the backward pass: less memory, one more forward
        pass."""
        for module in self.modules():
            if isinstance(module, (Level, MidBlock)):
                module.checkpointed = True

    def encode(self, x, return_dict=True):
        """x (N, 3, H, W) in [-1, 1] -> object with `latent_dist`, a DiagonalGaussian; a tuple of it
        without return_dict. Raises ValueError for what is no such image (`check_images`)."""
        check_images(x, self.config["in_channels"], self.factor)
        moments = self.quant_conv(self.encoder(x))                  # (N, 2C, h, w)
        posterior = DiagonalGaussian(moments)
        return SimpleNamespace(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z, return_dict=True, generator=None):
        """z (N, C, h, w) -> object with `sample`, images (N, 3, H, W), about [-1, 1]; a tuple of
        them without return_dict. Raises ValueError for another shape.

        generator: not used; pipelines of diffusers give one.
        """
        check_latents(z, self.config["latent_channels"])
        rec = self.decoder(self.post_quant_conv(z))                 # (N, 3, H, W)
        return SimpleNamespace(sample=rec) if return_dict else (rec,)

    def forward(self, x, noise=None):
        """x -> (rec, posterior, z) with z = mean + std noise: all that the loss needs, in one call
        that DDP can wrap. `noise` (N, C, h, w) is drawn where it is not given.

        The values of x are not checked, which would wait for the device.
        """
        moments = self.quant_conv(self.encoder(x))                  # (N, 2C, h, w)
        wide = torch.promote_types(moments.dtype, torch.float32)    # not bfloat16: long sums follow
        posterior = DiagonalGaussian(moments.to(wide))              # mean, std (N, C, h, w)
        if noise is None:
            z = posterior.sample()                                  # (N, C, h, w)
        else:
            z = posterior.mean + posterior.std * noise              # (N, C, h, w)
        return self.decode(z).sample, posterior, z                  # (N, 3, H, W), q, (N, C, h, w)

    def statistics(self, like):
        """(mean, std) of latents, for broadcasting: the training data's per channel where they are
        known, else shift_factor and 1 / scaling_factor."""
        mean, std = self.config["latents_mean"], self.config["latents_std"]
        if mean is None:
            shift = self.config["shift_factor"] or 0.0
            std = 1 / self.config["scaling_factor"]
            return like.new_full((1,), shift), like.new_full((1,), std)  # (1,), (1,)
        mean = like.new_tensor(mean).view(1, -1, 1, 1)              # (1, C, 1, 1)
        std = like.new_tensor(std).view(1, -1, 1, 1)                # (1, C, 1, 1)
        return mean, std

    def normalize(self, z):
        """Latents of the autoencoder -> latents of mean 0 and standard deviation 1, for the
        diffusion model."""
        mean, std = self.statistics(z)
        return (z - mean) / std

    def denormalize(self, z):
        """The reverse of `normalize`."""
        mean, std = self.statistics(z)
        return z * std + mean

    @classmethod
    def from_pretrained(cls, path, subfolder=None, torch_dtype=None):
        """Read a folder of diffusers' layout, or one file of weights (CompVis' .ckpt or another)
        whose shapes tell the configuration, but for its scale: then it is Stable Diffusion's.
        Raises FileNotFoundError or ValueError that says what is missing or wrong.

        subfolder: of the folder, as "vae" of a pipeline. torch_dtype: of the weights, default
        float32, whatever the file holds.
        """
        config, weights, source = read_autoencoder(Path(path) / (subfolder or ""))
        known = inspect.signature(cls).parameters
        for name, found in config_of(weights, source).items():
            given = config.get(name, known[name].default)
            if (list(given) if isinstance(found, list) else given) != found:
                raise ValueError(f"{source} has {name} {found}, and its config.json {given!r}")
        model = cls(**{name: value for name, value in config.items() if name in known})
        model.config = Config({**config, **model.config})           # what is unknown here is kept
        load_strict(model, weights, source)
        return model.to(torch_dtype).eval()

    def save_pretrained(self, folder):
        """Write config.json and diffusion_pytorch_model.safetensors as diffusers reads them."""
        write_autoencoder(self.state_dict(), self.config, Path(folder))


# --------------------------------------------------------------------------------------------------
# Losses


class LPIPS(nn.Module):
    """Perceptual distance of images x and y (N, 3, H, W) in [-1, 1] -> (N,), never trained; H and W
    at least 16.

    Features of five stages of VGG16, each of unit length along its channels; their squared
    differences, weighted by `lin`, are averaged over positions and summed over stages. `vgg` and
    `lin` are the published files vgg16-397923af.pth (torchvision) and vgg.pth (LPIPS v0.1).
    """

    STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's numbers
    CHANNELS = (64, 128, 256, 512, 512)                             # D of the stages

    def __init__(self, vgg=None, lin=None):
        super().__init__()
        self.features = nn.ModuleDict()
        width = 3
        for stage, channels in zip(self.STAGES, self.CHANNELS):
            for index in stage:
                self.features[str(index)] = nn.Conv2d(width, channels, 3, padding=1)
                width = channels
        # no dropout in front of `lin`: it does nothing in eval mode, but in a model in train mode
        # it would be on
        self.lin = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in self.CHANNELS)
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        load_lpips(self, vgg, lin)
        self.requires_grad_(False)

    @classmethod
    def from_published(cls):
        """LPIPS with the published weights, fetched on first use."""
        return cls(fetch(*VGG16), fetch(*LPIPS_LIN)).eval()

    def stages(self, x):
        """Five maps (N, D_i, H_i, W_i) of features of unit length; H_i = H / 2^i."""
        h = fast_layout((x - self.shift) / self.scale)              # (N, 3, H, W)
        maps = []
        for i, stage in enumerate(self.STAGES):
            if i > 0:
                h = F.max_pool2d(h, 2)                              # (N, D_i, H_i, W_i)
            for index in stage:
                h = F.relu(self.features[str(index)](h))            # (N, D_i, H_i, W_i)
            wide = torch.promote_types(h.dtype, torch.float32)      # bfloat16 is too coarse below
            full = h.to(wide)                                       # (N, D_i, H_i, W_i)
            square = full.square().sum(1, keepdim=True)             # (N, 1, H_i, W_i)
            length = (square + 1e-20).sqrt()                        # no nan in the gradient at 0
            maps.append(full / (length + 1e-10))                    # (N, D_i, H_i, W_i)
        return maps

    def by_stage(self, x, y):
        """The five addends (N, 5) of the distance, fine to coarse."""
        terms = []
        for fx, fy, lin in zip(self.stages(x), self.stages(y), self.lin):
            weighted = (fx - fy).square() * lin.weight              # (N, D_i, H_i, W_i)
            terms.append(weighted.sum(1).mean(dim=(1, 2)))          # (N,)
        return torch.stack(terms, dim=1)                            # (N, 5)

    def forward(self, x, y):
        return self.by_stage(x, y).sum(1)                           # (N,)


def mean_over_processes(x):
    """x, of equal shape on all processes, averaged over them; gradients flow back to all."""
    if not dist.is_initialized() or x.is_meta:                    # on meta there is nothing to send
        return x
    return all_reduce(x.clone()) / dist.get_world_size()


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm by the images of all processes, so that N of them train as one does with all
    images. nn.SyncBatchNorm does that on GPUs only."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)                               # (N, D, H, W)
        full = x.to(torch.promote_types(x.dtype, torch.float32))    # (N, D, H, W)
        mean = mean_over_processes(full.mean((0, 2, 3)))            # (D,)
        square = (full - mean[:, None, None]).square()              # (N, D, H, W)
        var = mean_over_processes(square.mean((0, 2, 3)))           # (D,)
        with torch.no_grad():
            n = dist.get_world_size() * x.numel() / x.shape[1]      # numbers of a channel
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)            # (D,)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)  # (D,), unbiased as torch's
        scale = self.weight * (var + self.eps).rsqrt()              # (D,)
        normed = (full - mean[:, None, None]) * scale[:, None, None]  # (N, D, H, W)
        return (normed + self.bias[:, None, None]).to(x.dtype)      # (N, D, H, W)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., arXiv 1611.07004): images (N, in_channels, H, W) -> logits, one for
    each of (H / 8 - 2) x (W / 8 - 2) overlapping patches where n_layers is 3."""

    def __init__(self, in_channels=3, ndf=64, n_layers=3):
        super().__init__()
        layers = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for i in range(1, n_layers + 1):
            out = ndf * min(2 ** i, 8)
            stride = 2 if i < n_layers else 1
            conv = nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=False)
            layers += [conv, BatchNorm2d(out), nn.LeakyReLU(0.2)]
            width = out
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        return self.main(x)                                         # (N, 1, H / 8 - 2, W / 8 - 2)


def hinge_d_loss(logits_real, logits_fake):
    """The discriminator's loss: real logits above 1, fake ones below -1."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def hinge_g_loss(logits_fake):
    """The generator's loss: fake logits up."""
    return -logits_fake.mean()


def adaptive_weight(reference, loss, weight):
    """||d reference / d weight|| / ||d loss / d weight||, at most 1e4: `loss` shall pull as hard as
    `reference`. Both are averages over the images of all processes."""
    g_reference = torch.autograd.grad(reference, weight, retain_graph=True)[0]
    g_loss = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    g_reference, g_loss = mean_over_processes(torch.stack([g_reference, g_loss]))
    return (g_reference.norm() / (g_loss.norm() + 1e-4)).clamp(max=1e4).detach()


def autoencoder_loss(x, rec, posterior, *, pixel_loss="mse", kl_weight=1e-6, perceptual_weight=0.0,
                     lpips=None, disc_weight=0.0, disc_start=0, step=0, discriminator=None,
                     last_layer=None):
    """Total loss of the autoencoder and a dict of its parts, detached scalars: mse or l1, kl,
    lpips, gan, d_weight.

        nll   = pixel_loss(x, rec) + perceptual_weight lpips
        total = nll + kl_weight kl + disc_weight w gan

    nll is an average over batch, channels and pixels; kl is summed over a latent, averaged over the
    batch. w is `adaptive_weight` of nll against gan at `last_layer`, the weight of the decoder's
    last convolution. The GAN comes in at step disc_start; before, the discriminator is not called.
    "gan" in the parts tells whether it is on.

    CompVis' LPIPSWithDiscriminator sums over the 3HW numbers of an image where this averages, so
    its total is 3HW times as large, with pixel_loss "l1" and the same weights but one: divide its
    kl_weight by 3HW (1e-6 at 256 px becomes 5e-12), times exp(s) of its log variance s, which is 0
    by default. Its limit of 1e4 for w is 1e4 / 3HW here.
    """
    pixel = {"mse": F.mse_loss, "l1": F.l1_loss}[pixel_loss](rec, x)
    kl = posterior.kl().mean()
    parts = {pixel_loss: pixel.detach(), "kl": kl.detach()}
    nll = pixel
    if perceptual_weight:
        distance = lpips(rec, x).mean()
        nll = nll + perceptual_weight * distance
        parts["lpips"] = distance.detach()
    total = nll + kl_weight * kl
    if disc_weight and step >= disc_start:
        gan = hinge_g_loss(discriminator(rec))
        d_weight = disc_weight * adaptive_weight(nll, gan, last_layer)
        total = total + d_weight * gan
        parts.update(gan=gan.detach(), d_weight=d_weight)
    return total, parts


# --------------------------------------------------------------------------------------------------
# Measures of a reconstruction


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of images x and y (N, 3, H, W) in [-1, 1] -> (N,); infinite
    where they agree."""
    mse = (x - y).square().mean(dim=(1, 2, 3))                      # (N,)
    return 10 * torch.log10(4 / mse)                                # (N,); 4 = 2^2, 2 is the range


def ssim(x, y):
    """Structural similarity of images x and y (N, 3, H, W) in [-1, 1] -> (N,), averaged over
    channels and positions.

    Wang et al., 2004: Gaussian windows of 11 x 11 and deviation 1.5 that lie within the image,
    K1 = 0.01, K2 = 0.03. Raises ValueError for images that hold no such window.
    """
    check_window(x, 11)
    distance = torch.arange(11, device=x.device, dtype=x.dtype) - 5  # (11,)
    window = torch.exp(-distance.square() / (2 * 1.5 ** 2))         # (11,)
    window = (window / window.sum()).expand(x.shape[1], 1, 1, 11)   # (3, 1, 1, 11)

    def blur(image):
        image = F.conv2d(image, window, groups=len(window))         # (N, 3, H, W - 10)
        return F.conv2d(image, window.transpose(2, 3), groups=len(window))  # (N, 3, H - 10, W - 10)

    mx = blur(x)                                                    # all (N, 3, H - 10, W - 10)
    my = blur(y)
    vx = blur(x * x) - mx * mx
    vy = blur(y * y) - my * my
    cov = blur(x * y) - mx * my
    c1 = (0.01 * 2) ** 2                                            # 2 is the range of [-1, 1]
    c2 = (0.03 * 2) ** 2
    above = (2 * mx * my + c1) * (2 * cov + c2)
    below = (mx * mx + my * my + c1) * (vx + vy + c2)
    return (above / below).mean(dim=(1, 2, 3))                      # (N,)


# --------------------------------------------------------------------------------------------------
# Argument checks: each raises ValueError with the value, and what is wanted


def check_config(config):
    """Refuses blocks that are not built here, sizes that are no whole numbers or do not divide, and
    a scale or statistics that nothing can be normalised by."""
    built = {"act_fn": "silu", "down_block_types": "DownEncoderBlock2D",
             "up_block_types": "UpDecoderBlock2D"}
    for name, want in built.items():
        given = config[name]
        if any(one != want for one in (given if isinstance(given, (list, tuple)) else [given])):
            raise ValueError(f"{name} is {given}, and only {want} is built here")
    sizes = {name: [config[name]] for name in (
        "in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")}
    for name, values in {**sizes, "block_out_channels": config["block_out_channels"]}.items():
        if not values or any(type(value) is not int or value < 1 for value in values):
            raise ValueError(f"{name} is {config[name]!r}: want whole numbers from 1 on")
    for channels in config["block_out_channels"]:
        groups = config["norm_num_groups"]
        if channels % groups:
            raise ValueError(
                f"{channels} channels of a level are no multiple of norm_num_groups {groups}")
    scale, shift = config["scaling_factor"], config["shift_factor"]
    if not is_number(scale) or scale <= 0 or not (shift is None or is_number(shift)):
        raise ValueError(f"scaling_factor is {scale!r}, shift_factor {shift!r}: want a number "
                         "above 0, and a number or none")
    check_statistics(config["latents_mean"], config["latents_std"], config["latent_channels"])


def is_number(x):
    """Whether x is a finite number, as JSON has them."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e30


def check_statistics(mean, std, channels):
    """Refuses anything but two lists of a finite number for each channel, those of std above 0;
    both may be None."""
    if mean is None and std is None:
        return
    for name, numbers in (("latents_mean", mean), ("latents_std", std)):
        if not isinstance(numbers, (list, tuple)) or len(numbers) != channels:
            raise ValueError(f"{name} is {numbers}: want {channels} numbers, one for each channel")
        if not all(map(is_number, numbers)):
            raise ValueError(f"{name} has entries that are no finite numbers")
    if min(std) < 1e-30:
        raise ValueError(f"latents_std has {min(std)}: want numbers above 0")


def check_images(x, channels, factor):
    """Refuses another number of channels, integers, H or W that f does not divide, no image at all,
    and values beyond +-10."""
    shape = tuple(x.shape)
    fits = len(shape) == 4 and shape[1] == channels and x.numel() > 0
    if not fits or shape[2] % factor or shape[3] % factor:
        raise ValueError(f"images of shape {shape}: want (N, {channels}, H, W), "
                         f"H and W multiples of {factor}")
    if not x.is_floating_point():
        raise ValueError(
            f"images of {x.dtype}: want floats in [-1, 1], for example x.float() / 127.5 - 1")
    largest = x.detach().abs().amax().item()
    if not largest <= 10:                                           # nan too
        raise ValueError(f"images with values up to {largest:g}: want [-1, 1]; "
                         "were they scaled from [0, 255]?")


def check_latents(z, channels):
    """Refuses another shape than (N, channels, h, w)."""
    if z.ndim != 4 or z.shape[1] != channels:
        raise ValueError(f"latents of shape {tuple(z.shape)}: want (N, {channels}, h, w)")


def check_window(x, size):
    """Refuses images (N, 3, H, W) that are smaller than the window of SSIM."""
    if min(x.shape[-2:]) < size:
        raise ValueError(
            f"images of shape {tuple(x.shape)}: SSIM wants at least {size} x {size} pixels")


# --------------------------------------------------------------------------------------------------
# Weights on disk: an autoencoder's folder, and the names that its weights had before


def read_autoencoder(path):
    """Config, state dict under today's names, and the path of the weights, from a folder of
    diffusers' layout or one file of weights. Raises FileNotFoundError or ValueError."""
    if path.is_file():
        weights = diffusers_names(load_weights(path))
        beside = path.name.startswith(WEIGHTS) and (path.parent / "config.json").is_file()
        return read_config(path.parent) if beside else config_of(weights, path), weights, path
    config = read_config(path)
    source = weights_files(path)[0]
    return config, diffusers_names(load_weights(source)), source


def write_autoencoder(weights, config, folder):
    """config.json and weights as diffusers reads them; config.json last: where it is, all is."""
    text = json.dumps({"_class_name": "AutoencoderKL", **config}, indent=2, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)                # of other weights
    save_safetensors(weights, folder / f"{WEIGHTS}.safetensors")
    with atomic_file(folder / "config.json") as file:
        file.write((text + "\n").encode())


WEIGHTS = "diffusion_pytorch_model"
ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json",    # in this order
           ".fp16.safetensors", ".safetensors.index.fp16.json", ".fp16.bin", ".bin.index.fp16.json")


def weights_files(folder):
    """The files of an autoencoder's weights: one, or an index and the shards that it names.

    Raises FileNotFoundError for a folder without them, ValueError for a damaged index.
    """
    for ending in ENDINGS:
        path = folder / f"{WEIGHTS}{ending}"
        if path.is_file():
            return [path, *shards_of(path)] if path.suffix == ".json" else [path]
    raise FileNotFoundError(f"{folder} holds {contents(folder)}: want the weights of an "
                            f"autoencoder, {WEIGHTS}.safetensors")


def contents(folder):
    """What a folder holds, in words."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"


def shards_of(index):
    """The files, beside an index, that hold the weights. Raises ValueError for a damaged index."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not names or any(Path(name).name != name or name.endswith(".json") for name in names):
            raise ValueError("it names no files of weights beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights ({error}): fetch it anew") from None
    return [index.with_name(name) for name in names]


def read_config(folder):
    """config.json of diffusers' layout as a dict, with the statistics of a mean_std.json beside it
    where it has none. Raises FileNotFoundError, or ValueError for what AutoencoderKL cannot build.
    """
    path = folder / "config.json"
    if not path.is_file():
        inside = " (see its folder vae)" if (folder / "vae" / "config.json").is_file() else ""
        raise FileNotFoundError(
            f"{path} not found, {folder} holds {contents(folder)}{inside}: "
            "want a folder in diffusers' layout, or one file of weights")
    config = read_json(path)
    if not isinstance(config.get("block_out_channels"), list):
        raise ValueError(
            f"{path} has no block_out_channels: want the config.json of an AutoencoderKL")
    name = config.pop("_class_name", "AutoencoderKL")
    if name != "AutoencoderKL":
        raise ValueError(f"{path} is that of {name}: want an AutoencoderKL's")
    if config.get("latents_mean") is None and (folder / "mean_std.json").is_file():
        config.update(read_mean_std(folder / "mean_std.json", config.get("latent_channels", 4)))
    return config


def read_json(path):
    """A dict from a file of JSON. Raises ValueError for anything else."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch the file anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no names and values: fetch the file anew")
    return content


def read_mean_std(path, channels):
    """latents_mean and latents_std, or mean and std, as two lists of numbers.

    Raises ValueError where their meaning is not plain.
    """
    content = read_json(path)
    found = {name: content.get(name, content.get(name.removeprefix("latents_")))
             for name in ("latents_mean", "latents_std")}
    try:
        if None in found.values():
            raise ValueError(f"its names are {', '.join(content)}")
        check_statistics(*found.values(), channels)
    except ValueError as error:
        raise ValueError(f"{path} is not understood ({error}): want "
                         '{"mean": [...], "std": [...]} of '
                         f"{channels} numbers each, or the file elsewhere") from None
    return found


def config_of(weights, path):
    """AutoencoderKL's arguments from the shapes of a state dict. The groups of the norms leave no
    trace there: 32, as in every autoencoder of CompVis. Raises ValueError where this is no
    autoencoder."""
    pattern = r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight"
    resnets = [found.groups() for name in weights if (found := re.fullmatch(pattern, name))]
    try:
        levels = 1 + max(int(level) for level, _ in resnets)
        if levels > len(resnets):
            raise ValueError("levels without resnets")
        layers = 1 + max(int(layer) for _, layer in resnets)
        first = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)]
        return dict(
            in_channels=weights["encoder.conv_in.weight"].shape[1],
            out_channels=weights["decoder.conv_out.weight"].shape[0],
            block_out_channels=[weights[name].shape[0] for name in first],
            layers_per_block=layers,
            latent_channels=weights["decoder.conv_in.weight"].shape[1],
            use_quant_conv="quant_conv.weight" in weights,
            use_post_quant_conv="post_quant_conv.weight" in weights,
            mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in weights)
    except (KeyError, ValueError, IndexError):
        raise ValueError(f"{path} holds no autoencoder: want weights under the names of diffusers "
                         "or CompVis") from None


OLD_NAMES = (                                                      # CompVis', then diffusers' first
    (r"norm_out\.", r"conv_norm_out."),
    (r"nin_shortcut\.", r"conv_shortcut."),
    (r"down\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
    (r"down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"up\.(\d+)\.block\.", r"up_blocks.\1.resnets."),
    (r"up\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"mid\.block_1\.", r"mid_block.resnets.0."),
    (r"mid\.block_2\.", r"mid_block.resnets.1."),
    (r"mid\.attn_1\.", r"mid_block.attentions.0."),
    (r"attentions\.0\.norm\.", r"attentions.0.group_norm."),
    (r"attentions\.0\.([qkv])\.", r"attentions.0.to_\1."),
    (r"attentions\.0\.proj_out\.", r"attentions.0.to_out.0."),
    (r"attentions\.0\.query\.", r"attentions.0.to_q."),
    (r"attentions\.0\.key\.", r"attentions.0.to_k."),
    (r"attentions\.0\.value\.", r"attentions.0.to_v."),
    (r"attentions\.0\.proj_attn\.", r"attentions.0.to_out.0."),
)


def diffusers_names(weights):
    """A state dict of CompVis, alone or within a whole checkpoint, or of early diffusers, under
    today's names."""
    prefix = "first_stage_model."                                   # in a checkpoint of diffusion
    inside = {name.removeprefix(prefix): value
              for name, value in weights.items() if name.startswith(prefix)}
    weights = inside or weights
    ups = [int(name.split(".")[2]) for name in weights if name.startswith("decoder.up.")]
    last = max(ups, default=0)
    renamed = {}
    for name, value in weights.items():
        if name.startswith(("loss.", "model_ema.")):
            continue
        # CompVis counts the decoder's levels from fine to coarse, diffusers in order of use
        name = re.sub(r"^decoder\.up\.(\d+)\.",
                      lambda found: f"decoder.up.{last - int(found[1])}.", name)
        for old, new in OLD_NAMES:
            name = re.sub(rf"(?<=\.){old}", new, name)
        if ".attentions.0.to_" in name and value.shape[2:] == (1, 1):       # CompVis has 1x1
            value = value[:, :, 0, 0]
        if name in renamed:
            raise ValueError(f"{name} stands twice among the weights, under old and new names")
        renamed[name] = value
    return renamed


def load_lpips(lpips, vgg, lin):
    """Published weights into an LPIPS, from the paths that are not None."""
    if vgg is not None:
        features = {name.removeprefix("features."): value for name, value
                    in load_weights(vgg).items() if name.startswith("features.")}
        load_strict(lpips.features, features, vgg)                  # without VGG16's classifier
    if lin is not None:
        heads = {name.removeprefix("lin").replace("model.1.", ""): value
                 for name, value in load_weights(lin).items()}      # lin0.model.1.weight: 0.weight
        load_strict(lpips.lin, heads, lin)


# --------------------------------------------------------------------------------------------------
# Files of tensors

SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


LONGEST_HEADER = 10_000_000                                         # bytes; a network's are 1 %


def load_weights(path):
    """Dict of tensors from .safetensors, torch's own format, or the index of several such files,
    without what DDP and torch.compile put before their names. Raises FileNotFoundError, or
    ValueError for a file that is damaged or holds more than tensors."""
    path = Path(path)
    if path.suffix == ".json":
        weights = {}
        for shard in shards_of(path):
            weights.update(load_weights(shard))
        return weights
    is_safetensors = path.suffix == ".safetensors" and path.is_file()
    weights = load_safetensors(path) if is_safetensors else load_torch(path)
    bare = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): x for name, x in weights.items()}
    if len(bare) < len(weights):
        raise ValueError(f"{path} holds weights with and without module. before their names")
    return bare


def save_safetensors(tensors, path):
    """Write a dict of name -> tensor: 8 bytes of header length, a JSON header, then the bytes of
    the tensors, whose sha256 the header tells."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header = {"__metadata__": {"format": "pt"}}                     # some readers insist on it
    digest = hashlib.sha256()
    chunks = []
    offset = 0
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().view(-1)
        data = flat.view(torch.uint8) if tensor.numel() else torch.empty(0)
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + data.numel()]}
        chunks.append(data.numpy())
        digest.update(chunks[-1])
        offset += data.numel()
    header["__metadata__"]["sha256"] = digest.hexdigest()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                # tensors begin at multiples of 8
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for chunk in chunks:
            file.write(chunk)


def load_safetensors(path):
    """Read a safetensors file into a dict of tensors. Raises ValueError where header and file do
    not fit together, before memory is taken, or where bytes are not those of save_safetensors."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        room = size - 8 - length                                    # bytes of the tensors
        if size < 8 or room < 0:
            raise ValueError(f"{path} is no safetensors file, or cut off: its header would be "
                             "longer than the file")
        if length > LONGEST_HEADER:
            raise ValueError(f"{path} has a header of {length:,} bytes: want one below "
                             f"{LONGEST_HEADER:,}")
        try:
            entries, sha256 = safetensors_header(file.read(length))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} has no valid safetensors header ({error!r}): "
                             "fetch the file anew") from None
        position = 0
        for name, dtype, shape, begin, end in entries:
            count = math.prod(shape) * dtype.itemsize
            if begin != position or end - begin != count or end > room:
                raise ValueError(
                    f"{path}: the bytes of {name} do not fit the header: fetch the file anew")
            position = end
        if position != room:
            raise ValueError(
                f"{path} has {room - position} bytes that belong to nothing: fetch it anew")
        tensors = {}
        digest = hashlib.sha256()
        for name, dtype, shape, begin, end in entries:
            data = torch.empty(end - begin, dtype=torch.uint8)
            file.readinto(data.numpy())
            digest.update(data.numpy())
            tensors[name] = data.view(dtype).reshape(shape)
    if sha256 and sha256 != digest.hexdigest():
        raise ValueError(f"{path} is damaged: sha256 differs from that of what was written")
    return tensors


def safetensors_header(text):
    """The JSON header as a list of (name, dtype, shape, begin, end), sorted by begin, and the
    sha256 or None. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    entries = []
    header = json.loads(text, object_pairs_hook=unique)
    metadata = header.pop("__metadata__", {})
    for name, entry in header.items():
        shape = entry["shape"]
        begin, end = entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError(f"shape or offsets of {name} are no natural numbers")
        entries.append((name, SAFETENSORS_TYPES[entry["dtype"]], shape, begin, end))
    return sorted(entries, key=lambda entry: entry[3:]), metadata.get("sha256")


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


# --------------------------------------------------------------------------------------------------
# Published files

VGG16 = (
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
LPIPS_LIN = (
    "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)


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
