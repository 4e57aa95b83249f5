"""The autoencoder of Stable Diffusion, the losses that train it, and its weights on disk.

    moments = encoder(x);  q(z | x) = N(mean, exp(logvar));  z = mean + exp(logvar / 2) noise;  rec = decoder(z)
    L = mse(rec, x) + w_p LPIPS(rec, x) + w_g L_gan + w_kl KL(q || N(0, 1))           (+ w_a L_align: align.py)

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752; the GAN loss is that
of Esser et al., arXiv 2012.09841; LPIPS is Zhang et al., arXiv 1801.03924. Module names, config.json and file names are
those of diffusers.AutoencoderKL, so a folder written here loads there and the reverse.

    x (N, 3, H, W) images in [-1, 1]     z (N, C, H / f, W / f) latents, f = 2^(levels - 1)

    vae = AutoencoderKL.from_pretrained("folder")
    z = vae.encode(x).latent_dist.sample()
    rec = vae.decode(z).sample
"""
import contextlib
import inspect
import json
import math
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Building blocks

class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the shortcut where the channels change."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)         # from scratch, a block that begins as its shortcut trains far faster

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Single-head self-attention over the H W positions, with a residual."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)                        # (N, H W, C)
        h = F.scaled_dot_product_attention(self.to_q(h)[:, None], self.to_k(h)[:, None], self.to_v(h)[:, None])[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Half the size: zeros on the right and below only, then a 3x3 convolution of stride 2."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """All that happens at one resolution: resnets, then the way to the next resolution."""

    def __init__(self, in_channels, out_channels, num_layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(num_layers))
        if down:
            self.downsamplers = nn.ModuleList([Downsample(out_channels)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x):
        for child in self.children():                                            # resnets, then the sampler if any
            for module in child:
                x = module(x)
        return x


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """x (N, in_channels, H, W) -> (N, 2 latent_channels, H / f, W / f)."""

    def __init__(self, in_channels, latent_channels, channels, layers_per_block, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(channels[max(0, i - 1)], c, layers_per_block, groups, down=i < len(channels) - 1)
            for i, c in enumerate(channels))
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """z (N, latent_channels, h, w) -> (N, out_channels, f h, f w). One more resnet a level than the encoder has."""

    def __init__(self, latent_channels, out_channels, channels, layers_per_block, groups):
        super().__init__()
        channels = channels[::-1]
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            Level(channels[max(0, i - 1)], c, layers_per_block + 1, groups, up=i < len(channels) - 1)
            for i, c in enumerate(channels))
        self.mid_block = MidBlock(channels[0], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, z):
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


# ---------------------------------------------------------------------------------------------------------------------
# Model

class DiagonalGaussian:
    """q(z | x) from moments (N, 2C, h, w): mean, and log variance clamped to [-30, 20], each (N, C, h, w)."""

    def __init__(self, moments):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self, generator=None):
        """One draw (N, C, h, w). The generator lives on the device of the moments."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * noise

    def mode(self):
        """The most likely latent: the mean."""
        return self.mean

    def kl(self):
        """KL(q || N(0, 1)) in nats, summed over C, h and w -> (N,)."""
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """diffusers' AutoencoderKL; the defaults are Stable Diffusion's (83,653,863 parameters, f = 8).

    `latents_mean` and `latents_std` (C numbers each) are statistics of the training data's latents, or None.
    `encode` and `decode` never apply a scale; `normalize` and `denormalize` do.
    """

    def __init__(self, in_channels=3, out_channels=3, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                 latent_channels=4, norm_num_groups=32, sample_size=256, scaling_factor=0.18215,
                 latents_mean=None, latents_std=None):
        super().__init__()
        for channels in block_out_channels:
            if channels % norm_num_groups:
                raise ValueError(f"{channels} channels of a level are no multiple of norm_num_groups {norm_num_groups}")
        channels = list(block_out_channels)
        self.config = dict(
            in_channels=in_channels, out_channels=out_channels, block_out_channels=channels,
            layers_per_block=layers_per_block, latent_channels=latent_channels, norm_num_groups=norm_num_groups,
            sample_size=sample_size, scaling_factor=scaling_factor, latents_mean=latents_mean, latents_std=latents_std)
        self.encoder = Encoder(in_channels, latent_channels, channels, layers_per_block, norm_num_groups)
        self.decoder = Decoder(latent_channels, out_channels, channels, layers_per_block, norm_num_groups)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x):
        """x (N, 3, H, W) in [-1, 1] -> object with `latent_dist`, a DiagonalGaussian. H and W are multiples of f."""
        return SimpleNamespace(latent_dist=DiagonalGaussian(self.quant_conv(self.encoder(x))))

    def decode(self, z):
        """z (N, C, h, w) -> object with `sample`, images (N, 3, f h, f w), about [-1, 1]."""
        return SimpleNamespace(sample=self.decoder(self.post_quant_conv(z)))

    def forward(self, x, noise=None):
        """x -> (rec, posterior, z) with z = mean + std noise: all that the loss needs, in one call that DDP can wrap.

        `noise` (N, C, h, w) is drawn where it is not given.
        """
        posterior = self.encode(x).latent_dist
        z = posterior.sample() if noise is None else posterior.mean + posterior.std * noise
        return self.decode(z).sample, posterior, z

    def statistics(self, like):
        """(mean, std), each (1, C, 1, 1): of the training data's latents where known, else 0 and 1 / scaling_factor."""
        mean, std = self.config["latents_mean"], self.config["latents_std"]
        if mean is None:
            return like.new_zeros(1), like.new_full((1,), 1 / self.config["scaling_factor"])
        return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)

    def normalize(self, z):
        """Latents of the autoencoder -> latents of mean 0 and standard deviation 1, for the diffusion model."""
        mean, std = self.statistics(z)
        return (z - mean) / std

    def denormalize(self, z):
        """The reverse of `normalize`."""
        mean, std = self.statistics(z)
        return z * std + mean

    def save_pretrained(self, folder):
        """Write config.json and diffusion_pytorch_model.safetensors as diffusers reads them."""
        folder, levels = Path(folder), len(self.config["block_out_channels"])
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "AutoencoderKL", "act_fn": "silu",
                  "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        config.update(self.config)
        save_safetensors(self.state_dict(), folder / "diffusion_pytorch_model.safetensors")
        with atomic_file(folder / "config.json") as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder):
        """Read a folder of diffusers' layout. Raises FileNotFoundError or ValueError that says what is missing."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}/config.json not found: want a folder in diffusers' AutoencoderKL layout")
        config = json.loads((folder / "config.json").read_text())
        known = set(inspect.signature(cls).parameters)
        model = cls(**{k: v for k, v in config.items() if k in known})
        model.config = {**config, **model.config}                                # keys unknown here are kept
        for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
            if (folder / name).is_file():
                try:
                    model.load_state_dict(load_weights(folder / name))
                except RuntimeError as error:
                    reason = str(error).splitlines()[-1].strip()
                    raise ValueError(f"{folder / name} does not fit config.json: {reason}") from None
                return model.eval()
        raise FileNotFoundError(f"{folder}/diffusion_pytorch_model.safetensors (or .bin) not found: no weights to load")


# ---------------------------------------------------------------------------------------------------------------------
# Losses

class LPIPS(nn.Module):
    """Perceptual distance of images x and y (N, 3, H, W) in [-1, 1] -> (N,), never trained.

    Features of five stages of VGG16, each normalised along its channels; squared differences, weighted by `lin`, are
    averaged over positions and summed over stages. `vgg` and `lin` are the published files vgg16-397923af.pth
    (torchvision) and vgg.pth (LPIPS v0.1). Inference only: the dropout in front of `lin` does not exist here.
    """

    STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))        # torchvision's numbers of the layers
    CHANNELS = (64, 128, 256, 512, 512)

    def __init__(self, vgg=None, lin=None):
        super().__init__()
        width, features = 3, {}
        for stage, channels in zip(self.STAGES, self.CHANNELS):
            for index in stage:
                features[str(index)] = nn.Conv2d(width, channels, 3, padding=1)
                width = channels
        self.features = nn.ModuleDict(features)
        self.lin = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in self.CHANNELS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        if vgg is not None:
            weights = load_weights(vgg)
            self.features.load_state_dict({k[9:]: v for k, v in weights.items() if k.startswith("features.")})
        if lin is not None:
            weights = load_weights(lin)
            self.lin.load_state_dict({f"{i}.weight": weights[f"lin{i}.model.1.weight"] for i in range(5)})
        self.requires_grad_(False)

    def stages(self, x):
        """Five maps of unit-length features, fine to coarse."""
        h, maps = (x - self.shift) / self.scale, []
        for i, stage in enumerate(self.STAGES):
            h = h if i == 0 else F.max_pool2d(h, 2)
            for index in stage:
                h = F.relu(self.features[str(index)](h))
            maps.append(h / ((h.square().sum(1, keepdim=True) + 1e-20).sqrt() + 1e-10))   # no nan gradient where h is 0
        return maps

    def forward(self, x, y):
        distance = 0
        for fx, fy, lin in zip(self.stages(x), self.stages(y), self.lin):
            distance = distance + lin((fx - fy).square()).mean(dim=(1, 2, 3))
        return distance


class PatchDiscriminator(nn.Module):
    """PatchGAN: images (N, C, H, W) -> logits (N, 1, h, w), one an overlapping patch (Isola et al., 1611.07004)."""

    def __init__(self, in_channels=3, ndf=64, n_layers=3):
        super().__init__()
        widths = [ndf * min(2 ** i, 8) for i in range(n_layers + 1)]
        layers = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, n_layers + 1):
            layers += [nn.Conv2d(widths[i - 1], widths[i], 4, stride=2 if i < n_layers else 1, padding=1, bias=False),
                       nn.BatchNorm2d(widths[i]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        return self.main(x)


def hinge_d_loss(logits_real, logits_fake):
    """The discriminator's loss: real logits above 1, fake ones below -1."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def hinge_g_loss(logits_fake):
    """The generator's loss: fake logits up."""
    return -logits_fake.mean()


def adaptive_weight(reference, loss, weight):
    """||d reference / d weight|| / ||d loss / d weight||, at most 1e4: `loss` shall pull as hard as `reference`."""
    g_reference = torch.autograd.grad(reference, weight, retain_graph=True)[0]
    g_loss = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    return (g_reference.norm() / (g_loss.norm() + 1e-4)).clamp(max=1e4).detach()


def autoencoder_loss(x, rec, posterior, *, kl_weight=1e-6, perceptual_weight=0.0, lpips=None,
                     disc_weight=0.0, discriminator=None, last_layer=None):
    """Total loss of the autoencoder and a dict of its parts: mse, kl, lpips, gan (detached scalars).

        total = mse + perceptual_weight lpips + disc_weight w gan + kl_weight kl
    mse is averaged over batch, channels and pixels, lpips over the batch; kl is summed over a latent and averaged over
    the batch; w is `adaptive_weight` of mse + perceptual_weight lpips against gan at `last_layer`, the weight of the
    decoder's last convolution. CompVis sums its pixel loss over the 3HW numbers of an image: their kl_weight is ours
    times 3HW, their disc_weight the same as ours.
    """
    mse = F.mse_loss(rec, x)
    kl = posterior.kl().mean()
    nll, parts = mse, {"mse": mse.detach(), "kl": kl.detach()}
    if perceptual_weight:
        distance = lpips(rec, x).mean()
        nll, parts["lpips"] = nll + perceptual_weight * distance, distance.detach()
    total = nll + kl_weight * kl
    if disc_weight:
        gan = hinge_g_loss(discriminator(rec))
        total, parts["gan"] = total + disc_weight * adaptive_weight(nll, gan, last_layer) * gan, gan.detach()
    return total, parts


# ---------------------------------------------------------------------------------------------------------------------
# Weights on disk

SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                     "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


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


def save_safetensors(tensors, path):
    """Write a dict of name -> tensor: 8 bytes of header length, a JSON header, then the bytes of the tensors."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header, chunks, offset = {}, [], 0
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        chunks.append(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                              # tensors begin at a multiple of 8
    with atomic_file(path) as file:
        for chunk in (len(text).to_bytes(8, "little"), text, *chunks):
            file.write(chunk)


def load_safetensors(path):
    """Read a safetensors file into a dict of tensors. Raises ValueError where header and file do not fit together."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is not a safetensors file: its header would be longer than the file")
        try:
            header = json.loads(file.read(length))
            entries = [(name, SAFETENSORS_TYPES[entry["dtype"]], entry["shape"], *entry["data_offsets"])
                       for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has no readable safetensors header ({error!r}): fetch the file anew") from None
        tensors, position = {}, 0
        for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: entry[3:]):
            bytes_wanted = math.prod(shape) * dtype.itemsize
            if begin != position or end - begin != bytes_wanted or end > size - 8 - length:
                raise ValueError(f"{path}: the bytes of {name} do not fit the header: fetch the file anew")
            data = torch.frombuffer(bytearray(file.read(bytes_wanted)), dtype=dtype) if bytes_wanted else torch.empty(0)
            tensors[name], position = data.to(dtype).reshape(shape), end
    return tensors


def load_weights(path):
    """Dict of tensors from .safetensors, or from torch's own format read with weights_only=True (nothing unpickled).
    Raises FileNotFoundError, or ValueError for a file that is damaged or holds more than tensors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: want a file of weights")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}: fetch the file anew") from None
