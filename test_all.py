"""Every test. Figures in assets/reference.json come from the official code on the weights and inputs that `fill` and
`array` make from names and seeds; `difference` is the distance of an output from them, in their standard deviations.
"""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
from PIL import Image

import align
import dit
import fid
import sample
import sit
import train
import vae

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "assets" / "reference.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Deterministic weights and inputs, and what the reference file stores of an output

@torch.no_grad()
def fill(module, skip=()):
    """Overwrite every floating-point entry of the state dict with values that depend on its name and shape."""
    for name, tensor in module.state_dict().items():
        if name in skip or not tensor.is_floating_point():
            continue
        x = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(tuple(tensor.shape))
        if tensor.ndim >= 2:
            x = x / np.sqrt(max(1, int(np.prod(tensor.shape[1:]))))
        else:
            x = 1 + 0.1 * np.abs(x) if name.endswith(("weight", "gamma", "running_var")) else 0.1 * x
        tensor.copy_(torch.from_numpy(np.asarray(x)))
    return module.eval()


def array(shape, seed, low=None, high=None):
    rng = np.random.RandomState(seed)
    x = rng.standard_normal(shape) if low is None else rng.uniform(low, high, shape)
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def difference(x, expected):
    assert list(x.shape) == expected["shape"]
    flat, scale = x.detach().double().reshape(-1), max(expected["std"], 1e-12)
    got = flat[torch.linspace(0, flat.numel() - 1, 10).round().long()].tolist()
    gaps = [abs(a - b) for a, b in zip(got, expected["probe"])]
    gaps += [abs(flat.mean().item() - expected["mean"]), abs(flat.std(unbiased=False).item() - expected["std"])]
    return max(gaps) / scale


def check(entry, outputs, float32=1e-4, float64=1e-6):
    """Compare outputs with a reference entry: with its float64 figures if they are float64, else its float32 ones."""
    for name, value in outputs.items():
        kind = "float64" if value.dtype == torch.float64 else "float32"
        gap = difference(value, REFERENCE[entry][name][kind])
        assert gap < (float64 if kind == "float64" else float32), f"{entry} {name} {kind}: {gap:.2e}"


# ---------------------------------------------------------------------------------------------------------------------
# vae.py

@pytest.mark.parametrize("entry, x, z", [
    ("vae_tiny_square", ((2, 3, 32, 32), 101, -1, 1), ((2, 4, 16, 16), 102)),
    ("vae_tiny_nonsquare", ((2, 3, 32, 48), 104, -1, 1), ((2, 4, 16, 24), 105))])
def test_autoencoder_equals_diffusers_figures(entry, x, z):
    model = fill(vae.AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1))
    for dtype in (torch.float32, torch.float64):
        model, x_, z_ = model.to(dtype), array(*x).to(dtype), array(*z).to(dtype)
        with torch.no_grad():
            posterior = model.encode(x_).latent_dist
            outputs = {"parameters": torch.cat([posterior.mean, posterior.logvar], 1), "kl": posterior.kl(),
                       "decode_z": model.decode(z_).sample}
        check(entry, outputs)


def test_autoencoder_has_the_size_of_stable_diffusions():
    with torch.device("meta"):
        model = vae.AutoencoderKL()
    assert sum(p.numel() for p in model.parameters()) == 83_653_863 and len(model.state_dict()) == 248


def test_autoencoder_and_diffusers_read_each_others_folders(tmp_path):
    torch.manual_seed(0)
    ours = fill(vae.AutoencoderKL(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=32,
                                  latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]))
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    back = vae.AutoencoderKL.from_pretrained(tmp_path / "theirs")
    x = array((2, 3, 32, 32), 1, -1, 1)
    with torch.no_grad():
        z = ours.encode(x).latent_dist.mean
        for other in (theirs, back):
            torch.testing.assert_close(other.encode(x).latent_dist.mean, z, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(other.decode(z).sample, ours.decode(z).sample, rtol=1e-5, atol=1e-5)
    assert list(theirs.config.latents_std) == [1.0, 2.0, 3.0, 4.0]
    assert back.config["latents_mean"] == [0.1, 0.2, 0.3, 0.4]
    torch.testing.assert_close(back.denormalize(back.normalize(z)), z)
    torch.testing.assert_close(back.normalize(z)[:, 1], (z[:, 1] - 0.2) / 2)


def test_safetensors_both_ways(tmp_path):
    tensors = {"a": torch.randn(3, 5), "half": torch.randn(7).half(), "brain": torch.randn(2, 2).bfloat16(),
               "whole": torch.arange(4), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    vae.save_safetensors(tensors, tmp_path / "ours.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    for loaded in (safetensors.torch.load_file(tmp_path / "ours.safetensors"),
                   vae.load_weights(tmp_path / "theirs.safetensors")):
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[k], tensors[k]) and loaded[k].dtype == tensors[k].dtype for k in tensors)
    whole = (tmp_path / "ours.safetensors").read_bytes()
    for broken in (whole[:-3], b"\xff" * 8 + whole[8:], whole[:4], whole.replace(b"[0, 60]", b"[0, 61]"),
                   b"\x80\x02}" + whole[3:]):
        (tmp_path / "broken.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="broken.safetensors"):
            vae.load_weights(tmp_path / "broken.safetensors")


def test_losses_equal_official_figures():
    lpips = vae.LPIPS()
    fill(nn.ModuleDict({"features": lpips.features}))                            # features.N.weight
    for name, conv in lpips.features.items():
        conv.weight.data *= 2 ** 0.5
    for i, conv in enumerate(lpips.lin):
        fill(nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": nn.ModuleList([nn.Identity(), conv])})}))
    value = lpips(array((2, 3, 64, 64), 205, -1, 1), array((2, 3, 64, 64), 206, -1, 1))
    expected = REFERENCE["lpips_filled_lin_gain"]["value"]["float32"]["values"]
    np.testing.assert_allclose(value.detach().numpy().ravel(), np.ravel(expected), rtol=1e-4)

    discriminator = fill(vae.PatchDiscriminator())
    real = array((2, 3, 64, 64), 211, -1, 1)
    check("patchgan_64_3", {"eval_logits_real": discriminator(real)})
    check("patchgan_64_3", {"train_logits_real": discriminator.train()(real)})

    real, fake = array((2, 1, 6, 6), 215), array((2, 1, 6, 6), 216)
    scalars = REFERENCE["gan_losses"]["scalars"]
    assert vae.hinge_d_loss(real, fake).item() == pytest.approx(scalars["hinge_d_loss"], rel=1e-6)
    assert vae.hinge_g_loss(fake).item() == pytest.approx(scalars["generator_loss"], rel=1e-6)

    conv = fill(nn.Conv2d(4, 3, 3, padding=1)).double()
    r = conv(array((2, 4, 9, 7), 217).double())
    nll, g = (r - array((2, 3, 9, 7), 218)).abs().sum() / 2, -(torch.tanh(r) ** 3).mean()
    weight = 0.5 * vae.adaptive_weight(nll, g, conv.weight)                      # the reference includes the weight 0.5
    assert weight.item() == pytest.approx(REFERENCE["adaptive_weight"]["d_weight"], rel=1e-6)
    assert 0.5 * vae.adaptive_weight(nll, 1e-12 * g, conv.weight).item() == pytest.approx(5000)


def test_one_step_moves_every_parameter():
    torch.manual_seed(0)
    autoencoder = vae.AutoencoderKL(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
    heads, discriminator, lpips = align.AlignmentHeads(4, 24, 32), vae.PatchDiscriminator(ndf=8), vae.LPIPS().eval()
    net = train.AlignedAutoencoder(autoencoder, heads)
    fill(net)                                                                    # away from the zeros of the first step
    fill(discriminator).train()
    x = array((4, 3, 32, 32), 3, -1, 1)
    rec, posterior, features = net(x, torch.randn(4, 4, 16, 16))
    grad = torch.autograd.grad(lpips(rec, x).mean(), autoencoder.decoder.conv_out.weight, retain_graph=True)[0]
    assert grad.abs().max() > 0, "LPIPS sends no gradient to the decoder"
    total, parts = vae.autoencoder_loss(x, rec, posterior, perceptual_weight=1.0, lpips=lpips, disc_weight=0.5,
                                        discriminator=discriminator, last_layer=autoencoder.decoder.conv_out.weight)
    assert set(parts) == {"mse", "kl", "lpips", "gan"}
    loss, _ = align.align_loss(*features, torch.randn(4, 64, 24), torch.randn(4, 24))
    (total + loss).backward()
    discriminator.zero_grad()
    discriminator.main[-1].bias.data.fill_(0.95)                                 # some logits beyond the hinge
    vae.hinge_d_loss(discriminator(x), discriminator(rec.detach())).backward()
    for module in (net, discriminator):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"no gradient for {name}"


# ---------------------------------------------------------------------------------------------------------------------
# align.py

VITS = dict(embed_dim=384, depth=12, num_heads=6)


def filled_dinov2(pos, token, **config):
    model = fill(align.DINOv2(**config))
    with torch.no_grad():
        model.pos_embed.mul_(pos)
        model.cls_token.mul_(token)
        if config.get("num_registers"):
            model.register_tokens.mul_(token)
    return model


@pytest.mark.parametrize("entry, x, pos, token, config", [
    ("dinov2_s14_98x98", ((2, 3, 98, 98), 302), 500, 20, VITS),
    ("dinov2_s14reg_140x196", ((2, 3, 140, 196), 313), 500, 20, dict(VITS, num_registers=4)),
    ("dinov2_tiny_swiglu", ((2, 3, 70, 56), 331), 50, 5,
     dict(embed_dim=96, depth=3, num_heads=3, img_size=70, ffn="swiglu"))])
def test_dinov2_equals_official_figures(entry, x, pos, token, config):
    model = filled_dinov2(pos, token, **config)
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            out = model.to(dtype).forward_features(array(*x).to(dtype))
        check(entry, {name: out[name] for name in ("x_norm_clstoken", "x_norm_patchtokens")})


def test_linear_heads_equal_official_figures():
    model = filled_dinov2(500, 20, **VITS)
    grid = dict(dim=2, sizes=(8, 9))
    with torch.no_grad():
        out = model.forward_features(array((1, 3, 112, 126), 341))
        features = out["x_norm_patchtokens"].transpose(1, 2).unflatten(**grid)
        check("dinov2_seg_linear_voc", {"logits": fill(align.SegmentationHead(384, 21))(features)})
        out = model.forward_features(array((1, 3, 112, 126), 351))["x_prenorm"]  # depth heads want un-normed tokens
        features, cls_token = out[:, 1:].transpose(1, 2).unflatten(**grid), out[:, 0]
        check("dinov2_depth_linear_nyu", {"head_output": fill(align.DepthHead(384))(features, cls_token)})


def test_teacher_input_is_what_dinov2_expects():
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor(align.IMAGENET_MEAN).view(3, 1, 1), torch.tensor(align.IMAGENET_STD).view(3, 1, 1)
    torch.testing.assert_close(align.teacher_input(2 * x - 1, 32), (x - mean) / std)
    assert align.teacher_input(x, 28).shape == (2, 3, 28, 28)


def test_heads_put_every_token_at_its_place():
    """A change in one latent cell changes the token of its place and no other."""
    heads = align.AlignmentHeads(latent_channels=4, embed_dim=16, hidden_dim=8, fold=2)
    z = torch.randn(1, 4, 8, 12)
    moved = z.clone()
    moved[0, :, 5, 6] += 1                                                       # cell (5, 6) is in token (2, 3)
    changed = (heads.feature_map(moved) - heads.feature_map(z)).abs().sum(1)[0] > 1e-6
    assert changed.shape == (4, 6) and changed.nonzero().tolist() == [[2, 3]]
    with pytest.raises(ValueError, match="does not fold"):
        heads(torch.randn(1, 4, 7, 8))


def test_standardised_targets_come_back():
    heads = align.AlignmentHeads(4, 6, 8, fold=1)
    patches, cls_token = 3 * torch.randn(5, 9, 6) + 2, torch.randn(5, 6) - 4
    heads.fit_statistics(patches, cls_token)
    p, c = heads.standardize(patches, cls_token)
    torch.testing.assert_close(p.flatten(0, 1).mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(c * heads.cls_std + heads.cls_mean, cls_token)


def test_align_loss_is_zero_on_the_target_and_leaves_it_alone():
    patches, cls_token = torch.randn(2, 9, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    loss, parts = align.align_loss(patches, cls_token, patches, cls_token)
    assert abs(loss.item()) < 1e-6 and parts["cos_patch"].item() == pytest.approx(1)
    prediction = torch.randn(2, 9, 6, requires_grad=True)
    loss, parts = align.align_loss(prediction, cls_token.detach(), patches, cls_token)
    loss.backward()
    assert prediction.grad.abs().max() > 0 and patches.grad is None
    opposite, parts = align.align_loss(-patches, -cls_token, patches, cls_token, l1_weight=0)
    assert opposite.item() == pytest.approx(4)                                   # 1 - cos = 2, for patches and for cls


def test_pictures_have_colours_in_range():
    rgb = align.pca_rgb(torch.randn(3, 20, 4, 5))
    assert rgb.shape == (3, 3, 4, 5) and 0 <= rgb.min() and rgb.max() <= 1
    mask = align.colorize_mask(torch.arange(12).view(1, 3, 4), 12)
    assert len({tuple(c.tolist()) for c in mask[0].flatten(1).T}) == 12, "two classes share a colour"
    depth = align.colorize_depth(torch.tensor([[[1.0, 2.0, 3.0]]]))
    assert depth.shape == (1, 3, 1, 3) and depth[0, :, 0, 0].sum() > depth[0, :, 0, 2].sum()


# ---------------------------------------------------------------------------------------------------------------------
# sit.py and dit.py

TINY = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=96, depth=2, num_heads=4, num_classes=10)
FAMILIES = {"sit": (sit, sit.SiT), "dit": (dit, dit.DiT)}


def shared(path, files):
    begin, end = (f"# === shared by {files}: {word} ===\n" for word in ("begin", "end"))
    text = (HERE / path).read_text()
    assert text.count(begin) == text.count(end) == 1, f"{path}: want one begin and one end marker"
    return text.split(begin)[1].split(end)[0]


def test_shared_sections_are_the_same_text():
    files = "sit.py and dit.py"
    assert shared("sit.py", files) == shared("dit.py", files), "the shared sections differ: diff sit.py dit.py"
    files = "align.py, sit.py and dit.py"
    assert shared("align.py", files) == shared("sit.py", files) == shared("dit.py", files)


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_transformers_equal_official_figures(family):
    model = fill(FAMILIES[family][1](**TINY), skip=("pos_embed",))
    x, y = array((6, 4, 8, 8), {"sit": 101, "dit": 114}[family]), torch.tensor([1, 4, 7, 0, 3, 10])
    t = torch.tensor([0.0, 0.1, 0.35, 0.5, 0.8, 1.0]) if family == "sit" else torch.tensor([0, 1, 37, 250, 500, 999])
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            check(f"{family}/forward/tiny", {"out": model.to(dtype)(x.to(dtype), t, y)})


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_official_parameter_counts(family):
    module, _ = FAMILIES[family]
    with torch.device("meta"):
        counts = [sum(p.numel() for p in module.create(f"{family[0].upper()}i{family[2].upper()}-{size}").parameters())
                  for size in ("S/2", "B/2", "L/2", "XL/2")]
    assert [round(c / 1e6, 1) for c in counts] == [33.0, 130.5, 458.1, 675.1]
    for name in ("SiX-B/2", "SiT-Q/2", "SiT-B", "DiT-B/x", "nonsense"):
        with pytest.raises(ValueError, match="not known"):
            module.create(name)


def test_sit_loss_and_euler_equal_official_figures():
    model = fill(sit.SiT(**TINY), skip=("pos_embed",)).double()
    t, y = torch.tensor([0.001, 0.1, 0.35, 0.5, 0.8, 0.999]).double(), torch.tensor([1, 4, 7, 0, 3, 10])
    loss = sit.training_loss(model, array((6, 4, 8, 8), 140).double(), y, t, array((6, 4, 8, 8), 139).double())
    check("sit/training_losses/Linear/velocity/None", {"loss": loss})
    z = sit.sample(model, array((3, 4, 8, 8), 200).double(), torch.tensor([1, 4, 10]), "euler", num_steps=9)
    check("sit/sample_ode/tiny/Linear/velocity/euler/10", {"final": z})          # ten points are nine steps


def test_dit_losses_and_samplers_equal_official_figures():
    model = fill(dit.DiT(**TINY), skip=("pos_embed",)).double()
    x, eps = array((5, 4, 8, 8), 418).double(), array((5, 4, 8, 8), 419).double()
    t, y = torch.tensor([0, 1, 100, 500, 999]), torch.tensor([1, 4, 7, 0, 10])
    check("dit/training_losses", {"loss": dit.training_loss(model, x, y, t, eps)})
    y = torch.tensor([1, 4, 10])
    torch.manual_seed(439)
    eps = array((3, 4, 8, 8), 438).double()
    z = dit.sample(model, eps, y, "ddpm", 10, noise=lambda i: torch.randn(3, 4, 8, 8).double())
    check("dit/p_sample_loop/tiny/10/clip=False", {"final": z}, float64=1e-5)
    z = dit.sample(model, array((3, 4, 8, 8), 440).double(), y, "ddim", 10)
    check("dit/ddim_sample_loop/tiny/10/eta=0.0/clip=False", {"final": z}, float64=1e-5)


class Counting(nn.Module):
    """A velocity or noise field that counts the rows it is asked for: 2 for a class, 1 for "no label"."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.rows, self.times = [], []

    def forward(self, x, t, y):
        self.rows.append(len(x))
        self.times.append(t[0].item())
        return torch.where(y == 3, 1.0, 2.0).to(x.dtype).view(-1, 1, 1, 1).expand_as(x).clone()


def test_guidance_moves_away_from_the_unconditional_output():
    x, t, y = torch.zeros(5, 4, 2, 2), torch.zeros(5), torch.zeros(5, dtype=torch.long)
    out = sit.guided(Counting(), x, t, y, 0.5, 4.0, (0.0, 1.0), 3)
    assert (out[:, :3] == 5).all() and (out[:, 3:] == 2).all()                   # 1 + 4 (2 - 1); conditional


@pytest.mark.parametrize("module, sampler", [(sit, "euler"), (sit, "heun"), (dit, "ddim")])
def test_guided_rows_are_computed_only_in_the_interval(module, sampler):
    eps, y = torch.randn(5, 4, 2, 2), torch.zeros(5, dtype=torch.long)
    for scale, interval in ((1.0, (0.0, 1.0)), (3.0, (0.0, 0.75))):
        model = Counting()
        module.sample(model, eps, y, sampler, num_steps=8, cfg_scale=scale, cfg_interval=interval)
        for rows, t in zip(model.rows, model.times):
            noise_level = 1 - t if module is sit else t / 999
            assert rows == (10 if scale > 1 and noise_level <= 0.75 else 5)
        assert {5, 10} == set(model.rows) or scale == 1


def test_euler_and_heun_are_exact_where_they_must_be():
    """A constant velocity is exact for Euler in any number of steps; one linear in time for Heun."""
    class Field(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.slope, self.times = slope, []

        def forward(self, x, t, y):
            self.times.append(t[0].item())
            return (3 + self.slope * t).view(-1, 1, 1, 1).expand_as(x)

    eps, y = torch.randn(2, 4, 2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    for steps in (1, 3, 10):
        torch.testing.assert_close(sit.sample(Field(0), eps, y, "euler", steps), eps + 3)
    field = Field(2)
    out = sit.sample(field, eps, y, "heun", 10)                                  # the last step is Euler's
    torch.testing.assert_close(out, eps + 3 + 1 - 0.1 ** 2)
    assert len(field.times) == 19 and max(field.times) < 1


def test_dit_finds_a_single_point_from_its_exact_noise():
    """Data that is one point x: eps = (x_t - a x) / s is the exact noise, and both samplers must end at x."""
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)

    class Exact(nn.Module):
        def forward(self, x_t, t, y):
            alpha = dit.DIFFUSION.at(dit.DIFFUSION.alphas_cumprod, t, x_t)
            return (x_t - alpha.sqrt() * x) / (1 - alpha).sqrt()

    for sampler, steps in (("ddpm", 50), ("ddim", 10), ("ddim", 1)):
        eps, y = torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
        z = dit.sample(Exact(), eps, y, sampler, steps)
        torch.testing.assert_close(z, x.expand(3, -1, -1, -1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["sit", "dit"])
def test_labels_are_dropped_in_training_only(family):
    module, network = FAMILIES[family]
    torch.manual_seed(0)
    model = fill(network(**dict(TINY, class_dropout_prob=0.5)), skip=("pos_embed",))
    x, t, y = array((64, 4, 8, 8), 5), torch.zeros(64, dtype=torch.long), torch.zeros(64, dtype=torch.long)
    x[:] = x[0]
    with torch.no_grad():
        kept, nulled = model(x, t, y), model(x, t, torch.full_like(y, 10))
        assert torch.equal(model(x, t, y, drop=torch.ones(64, dtype=torch.bool)), nulled)
        out = model.train()(x, t, y)
    is_kept, is_null = (out - kept).abs().amax((1, 2, 3)) < 1e-5, (out - nulled).abs().amax((1, 2, 3)) < 1e-5
    assert (is_kept ^ is_null).all() and 10 < is_null.sum() < 54


# ---------------------------------------------------------------------------------------------------------------------
# fid.py

def test_frechet_distance_equals_official_figures():
    for entry, a, b in (("fid_n300_d64", array((300, 64), 501), array((300, 64), 502) * 1.3 + 0.2),
                        ("fid_n50_d64_rank_deficient", array((50, 64), 503), array((50, 64), 504) * 0.8 - 0.1)):
        value = fid.frechet_distance(*fid.feature_statistics(a), *fid.feature_statistics(b))
        assert value == pytest.approx(REFERENCE["fid"][entry]["fid_nuclear_norm_of_centred_data"], rel=1e-6)
    a = fid.feature_statistics(array((40, 64), 505))
    assert 0 <= fid.frechet_distance(*a, *a) < 1e-5                              # fewer samples than dimensions


def test_frechet_distance_of_known_gaussians():
    mu, sigma = np.zeros(3), np.eye(3)
    assert fid.frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(12)   # equal covariances: |mu1 - mu2|^2
    assert fid.frechet_distance(mu, sigma, mu, 9 * sigma) == pytest.approx(12)   # (3 - 1)^2 in each of three directions
    with pytest.raises(ValueError, match="shapes"):
        fid.frechet_distance(mu, sigma, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="two rows"):
        fid.feature_statistics(np.zeros((1, 3)))


# ---------------------------------------------------------------------------------------------------------------------
# Data of train.py

def test_scenes_depend_on_seed_and_index_alone():
    whole = train.draw_scenes(3, np.arange(40))
    part = train.draw_scenes(3, np.array([37, 5, 12]))
    for a, b in zip(whole, part):
        assert torch.equal(a[[37, 5, 12]], b)
    assert not torch.equal(whole[0], train.draw_scenes(4, np.arange(40))[0])
    assert train.draw_scenes(3, np.arange(10 ** 9, 10 ** 9 + 10))[1].tolist() == list(range(10))


def test_segments_and_depth_of_scenes_agree():
    images, labels, segments, depth = train.draw_scenes(0, np.arange(200))
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    for i in range(200):
        assert set(segments[i].unique().tolist()) <= {0, 1, 2 + i % 10} and labels[i] == i % 10
    solid = (segments >= 2).float().mean(dim=(1, 2))
    assert solid.min() > 0.04 and solid.max() < 0.6
    assert (depth[segments == 0] == train.FAR).all() and depth.min() > train.NEAR
    assert (depth[segments >= 2] < 8).all(), "a solid stands five units away"


def test_a_sphere_is_drawn_where_geometry_puts_it():
    """The nearest point of a sphere is at distance |eye - centre| - radius: the smallest depth on the solid."""
    u = train.scene_numbers(0, np.arange(0, 400, 10), 24)
    _, segments, depth = train.draw_solid(0, u, 96)
    pitch = 0.2 + 0.14 * u[:, 0]
    scale = 0.85 + 0.2 * u[:, 8]
    px, pz = -0.16 + 0.32 * u[:, 9], -0.2 + 0.4 * u[:, 10]
    eye = torch.stack([-px, 0.8 + 5 * pitch.sin() - 0.92 * scale, 5 * pitch.cos() - pz])
    expected = eye.norm(dim=0) - 0.92 * scale
    nearest = depth.masked_fill(segments != 2, 100).amin(1)
    torch.testing.assert_close(nearest, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("width, height, seed, digest", [
    (500, 375, 1, "4311b12bc5c3918d5d3d6aa8568714643d13d2aaae83f3af4775738f93d1b073"),
    (333, 500, 2, "744dcd0174114e6bc61ff997f4360a647a347dde71ccb029181b8f50d7958d33")])
def test_centre_crop_equals_adms(width, height, seed, digest):
    g = np.random.RandomState(seed)
    small = g.randint(0, 256, (max(2, height // 16), max(2, width // 16), 3)).astype(np.uint8)
    image = np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC)).astype(np.int64)
    image = np.clip(image + g.randint(-12, 13, (height, width, 3)), 0, 255).astype(np.uint8)
    assert hashlib.sha256(train.center_crop(Image.fromarray(image), 256).tobytes()).hexdigest() == digest


def write_images(root, splits=("train", "test"), count=12):
    """An ImageFolder of two classes whose images are plain colours that tell class and number."""
    for split in splits:
        for k, name in enumerate(("b_blue", "a_red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                color = (10 * i, 50, 200) if k == 0 else (200, 50, 10 * i)
                Image.new("RGB", (40, 36), color).save(folder / f"{i:03}.png")
    return root


def zipped(root, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, file.relative_to(root))
    return path


def test_folder_and_zip_are_the_same_data(tmp_path):
    root = write_images(tmp_path / "images")
    folder = train.ImageFolder(root, "train", 32)
    archive = train.ImageFolder(zipped(root, tmp_path / "x.zip"), "train", 32)
    assert folder.classes == archive.classes == ("a_red", "b_blue") and len(folder) == 24
    keys = [(0, False), (23, True), (13, False)]
    for a, b in zip(folder.__getitems__(keys), archive.__getitems__(keys)):
        assert torch.equal(a, b)
    images, labels = folder.__getitems__(keys)
    assert labels.tolist() == [0, 1, 1] and images.shape == (3, 3, 32, 32) and images[2, 0, 0, 0] == 10
    flat = train.ImageFolder(root / "train", "train", 32), train.ImageFolder(root / "train", "test", 32)
    assert len(flat[0]) + len(flat[1]) == 24 and not set(flat[0].files) & set(flat[1].files)


def test_every_image_comes_once_an_epoch_whatever_the_processes(monkeypatch):
    data = train.ImageFolder.__new__(train.ImageFolder)
    data.files = list(range(10))
    cfg = train.Config(batch_size=4, seed=1)
    alone = list(train.StepSampler(data, cfg, 0, 10))                            # 40 positions: four epochs of ten
    assert sorted(i for keys in alone for i, _ in keys) == sorted(list(range(10)) * 4)
    assert {flip for keys in alone for _, flip in keys} == {True, False}
    assert list(train.StepSampler(data, cfg, 7, 10)) == alone[7:]
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        ranks.append(list(train.StepSampler(data, cfg, 0, 10)))
    assert [a + b for a, b in zip(*ranks)] == alone


# ---------------------------------------------------------------------------------------------------------------------
# The programs, as users run them

def command(*words, check=True, processes=1, **env):
    """Run a program of ours to its end, with one thread a process."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run([*start, *map(str, words)], cwd=HERE, env=env, capture_output=True, text=True, timeout=400)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


SMALL = ["--scenes", 240, "--latent-channels", 4, "--channels", 8, 16, 16, "--align-hidden", 16, "--batch-size", 8]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The whole system, tiny: the folder of a finished chain."""
    out = tmp_path_factory.mktemp("chain") / "run"
    done = command("train.py", "--out", out, "--steps", 6, "--num-samples", 20, *SMALL)
    assert "Traceback" not in done.stderr
    (out / "stdout.txt").write_text(done.stdout)
    return out


def test_the_chain_writes_a_report_with_all_figures_and_pictures(whole):
    figures = json.loads((whole / "report.json").read_text())
    wanted = {"PSNR of reconstructions, dB", "cosine to the teacher, patches", "cosine to the teacher, class token",
              "linear probe on latents, accuracy", "FD of samples, no guidance",
              "FD of samples to own reconstructions, no guidance", "class accuracy of samples, no guidance",
              "masks from latents, mIoU", "depth from latents, relative error"}
    for arm in ("plain", "aligned"):
        assert wanted <= figures[arm].keys() and all(np.isfinite(v) for v in figures[arm].values())
    text = (whole / "report.md").read_text()
    for line in wanted:
        assert line in text and line in (whole / "stdout.txt").read_text()
    assert ("is reached" in text) != ("is not reached" in text)
    for name in text.split("](")[1:]:
        picture = Image.open(whole / name.split(")")[0])
        assert picture.width > 100 and len(picture.resize((50, 50)).getcolors(2500)) > 5, f"{name} is blank"
    for phase in ("teacher", "evaluator", "plain/vae", "aligned/align", "plain/sit", "aligned/samples", "report"):
        assert f"| {phase} |" in text


def test_the_chain_does_nothing_twice(whole):
    files = {p: p.stat().st_mtime_ns for suffix in ("safetensors", "npz") for p in whole.rglob(f"*.{suffix}")}
    assert len(files) >= 10
    done = command("train.py", "--out", whole, "--steps", 6, "--num-samples", 20, *SMALL)
    assert "is done already" in done.stdout
    assert files == {p: p.stat().st_mtime_ns for p in files}


def test_weights_of_a_run_are_in_published_formats(whole):
    theirs = diffusers.AutoencoderKL.from_pretrained(whole / "aligned" / "align")
    assert len(theirs.config.latents_std) == 4
    checkpoint = torch.load(whole / "plain" / "sit" / "checkpoint.pt", weights_only=True)
    assert set(checkpoint) == {"step", "net", "ema", "opt"} and checkpoint["step"] == 6
    module, model = sample.load_diffusion(whole / "plain", "sit")
    assert module is sit and model.num_classes == 10


def test_latents_have_the_statistics_that_the_autoencoder_tells(whole):
    autoencoder = vae.AutoencoderKL.from_pretrained(whole / "plain" / "vae")
    moments = torch.from_numpy(np.load(whole / "plain" / "latents" / "moments.npy").astype(np.float32))[0]
    assert moments.shape == (240, 8, 8, 8)
    mean, std = moments.chunk(2, dim=1)
    z = autoencoder.normalize(mean + std * torch.randn_like(mean))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)


def copy_of(whole, folder, *stages):
    """A copy of the plain arm with some of its stages."""
    for stage in stages:
        shutil.copytree(whole / "plain" / stage, folder / stage)
    return folder


def log_without_rates(path):
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def test_a_killed_stage_ends_like_one_that_ran_through(whole, tmp_path):
    through, killed = copy_of(whole, tmp_path / "a", "vae", "latents"), copy_of(whole, tmp_path / "b", "vae", "latents")
    stage = ["--stage", "sit", "--scenes", "240", "--batch-size", "8", "--steps", "120", "--log-every", "5",
             "--save-every", "10"]
    vae_of = ["--vae", str(whole / "plain" / "vae")]
    command("train.py", "--out", through, *stage, *vae_of)
    child = subprocess.Popen([sys.executable, "train.py", "--out", str(killed), *stage, *vae_of], cwd=HERE,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    log = killed / "sit" / "log.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) >= 9):        # past a checkpoint, before the end
        assert child.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (killed / "sit" / "ema.safetensors").exists()
    command("train.py", "--out", killed, *stage, *vae_of)
    assert (through / "sit" / "ema.safetensors").read_bytes() == (killed / "sit" / "ema.safetensors").read_bytes()
    assert log_without_rates(through / "sit") == log_without_rates(killed / "sit")
    a, b = (torch.load(run / "sit" / "checkpoint.pt", weights_only=True) for run in (through, killed))
    for name, state in a["opt"]["state"].items():
        assert all(torch.equal(v, b["opt"]["state"][name][k]) for k, v in state.items())


@pytest.mark.parametrize("stage, weights", [
    ("align", "diffusion_pytorch_model.safetensors"), ("sit", "ema.safetensors"), ("dit", "ema.safetensors")])
def test_two_processes_train_like_one(whole, tmp_path, stage, weights):
    results = []
    for processes in (1, 2):
        out = copy_of(whole, tmp_path / str(processes), "vae", "latents")
        words = ["--stage", stage, "--out", out, *SMALL, "--steps", 4, "--lr", 1e-4]
        words += ["--teacher", whole / "teacher"] if stage == "align" else ["--vae", whole / "plain" / "vae"]
        command("train.py", *words, processes=processes)
        results.append(vae.load_weights(out / stage / weights))
    for name, a in results[0].items():
        torch.testing.assert_close(a, results[1][name], rtol=1e-3, atol=2e-5, msg=lambda m: f"{name}: {m}")


def test_lpips_and_gan_train_on_two_processes(tmp_path):
    """With weights of LPIPS in the cache folder, under their published names; every part of the loss is in the log."""
    lpips = vae.LPIPS()
    torch.save({f"features.{name}": value for name, value in lpips.features.state_dict().items()},
               tmp_path / "vgg16-397923af.pth")
    torch.save({f"lin{i}.model.1.weight": conv.weight.data.abs() for i, conv in enumerate(lpips.lin)},
               tmp_path / "vgg.pth")
    command("train.py", "--stage", "vae", "--out", tmp_path, *SMALL, "--steps", 3, "--log-every", 1, "--save-every", 1,
            "--perceptual-weight", 1, "--disc-weight", 0.5, "--disc-start", 1, processes=2, REALS_CACHE=str(tmp_path))
    lines = log_without_rates(tmp_path / "vae")
    assert {"mse", "kl", "lpips"} <= lines[0].keys() and "gan" not in lines[0]
    assert {"mse", "kl", "lpips", "gan", "discriminator"} <= lines[-1].keys()
    state = torch.load(tmp_path / "vae" / "checkpoint.pt", weights_only=True)
    assert set(state) == {"step", "net", "opt", "discriminator", "d_opt"}


def test_two_processes_encode_the_same_latents(whole, tmp_path):
    out = copy_of(whole, tmp_path, "vae")
    command("train.py", "--stage", "latents", "--out", out, *SMALL, processes=2)
    for name in ("moments.npy", "labels.npy"):
        a, b = np.load(whole / "plain" / "latents" / name), np.load(out / "latents" / name)
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), atol=4e-3)


def test_a_sample_does_not_depend_on_its_batch_or_process(whole, tmp_path):
    arrays = []
    for name, size, processes in (("a", 12, 1), ("b", 5, 1), ("c", 3, 2)):
        command("sample.py", "--run", whole / "plain", "--num", 12, "--batch-size", size, "--num-steps", 3,
                "--cfg-scale", 2, "--out", tmp_path / f"{name}.npz", processes=processes)
        arrays.append(np.load(tmp_path / f"{name}.npz"))
    for other in arrays[1:]:
        assert np.array_equal(arrays[0]["arr_1"], other["arr_1"])
        assert np.abs(arrays[0]["arr_0"].astype(int) - other["arr_0"].astype(int)).max() <= 1
    assert arrays[0]["arr_0"].shape == (12, 32, 32, 3) and arrays[0]["arr_0"].dtype == np.uint8
    assert arrays[0]["arr_1"].tolist() == [*range(10), 0, 1]
    assert not np.array_equal(arrays[0]["arr_0"][0], arrays[0]["arr_0"][10]), "two images share their noise"


def test_ddpm_noise_is_by_image_too(whole, tmp_path):
    out = copy_of(whole, tmp_path, "vae", "latents")
    command("train.py", "--stage", "dit", "--out", out, "--vae", whole / "plain" / "vae", *SMALL, "--steps", 3)
    images = []
    for size in (4, 3):
        path = tmp_path / f"{size}.npz"
        command("sample.py", "--run", out, "--family", "dit", "--num", 4, "--batch-size", size, "--num-steps", 5,
                "--out", path)
        images.append(np.load(path)["arr_0"].astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1


def test_the_chain_runs_on_images_from_disk(tmp_path):
    """Photographs have no segments and no depth: the report has the other figures."""
    root = tmp_path / "images"
    for split, first in (("train", 0), ("test", 10 ** 9)):
        images, labels, _, _ = train.draw_scenes(0, np.arange(first, first + 80))
        for i, (image, label) in enumerate(zip(images, labels)):
            folder = root / split / train.SCENE_CLASSES[label].replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    archive = zipped(root, tmp_path / "solids.zip")
    command("train.py", "--data", archive, "--out", tmp_path / "run", "--steps", 3, "--num-samples", 20, *SMALL)
    figures = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "masks from latents, mIoU" not in figures["plain"] and figures["aligned"]["FD of samples, no guidance"] >= 0
    assert np.load(tmp_path / "run" / "plain" / "latents" / "moments.npy").shape[:2] == (2, 80)     # both flips


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit status 2

def refused(*words, **env):
    done = command(*words, check=False, **env)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return lines[-1]


def broken_data(tmp_path, kind):
    root = tmp_path / kind
    if kind == "missing":
        return root
    if kind == "text":
        root.write_text("not a zip")
        return root
    write_images(root)
    if kind == "empty class":
        for split in ("train", "test"):
            (root / split / "c_empty").mkdir()
    if kind == "other classes":
        (root / "test" / "a_red").rename(root / "test" / "z_other")
    if kind == "broken image":
        for file in (root / "train" / "a_red").iterdir():
            file.write_bytes(b"\x89PNG but not really")
    if kind == "no classes":
        shutil.rmtree(root)
        root.mkdir()
        Image.new("RGB", (8, 8)).save(root / "a.png")
    return root


@pytest.mark.parametrize("kind, says", [
    ("missing", "no folder and no .zip"), ("text", "no folder and no .zip"), ("other classes", "other classes"),
    ("empty class", "c_empty has no images"),
    ("no classes", "no class folders"), ("broken image", "cannot be read")])
def test_bad_data_is_refused(tmp_path, kind, says):
    data = broken_data(tmp_path, kind)
    line = refused("train.py", "--stage", "vae", "--data", data, "--out", tmp_path / "run", "--steps", 2, *SMALL)
    assert says in line and str(data) in line
    if kind != "broken image":                                                   # the chain says so before it starts
        assert says in refused("train.py", "--data", data, "--out", tmp_path / "chain")
        assert not (tmp_path / "chain").exists()
    if kind != "broken image":
        assert not (tmp_path / "run" / "vae").exists(), "a refused command has left something behind"


def test_an_image_that_a_worker_cannot_read_is_one_line_too(tmp_path):
    data = broken_data(tmp_path, "broken image")
    line = refused("train.py", "--stage", "vae", "--data", data, "--out", tmp_path / "run", "--workers", 1, *SMALL)
    assert "cannot be read" in line and "a_red" in line


@pytest.mark.parametrize("words, says", [
    (["--stage", "align"], "--stage teacher"), (["--stage", "latents"], "--stage vae"),
    (["--stage", "sit"], "--stage vae"), (["--stage", "report"], "python train.py"),
    (["--stage", "nonsense"], "invalid choice"),
    (["--stage", "vae", "--steps", "0"], "want at least 1"), (["--stage", "vae", "--channels", "9"], "norm_num_groups"),
    (["--stage", "vae", "--log-every", "7"], "multiple of"), (["--stage", "vae", "--seed", "-1"], "want at least 0"),
    (["--stage", "vae", "--image-size", "30"], "halved"), (["--vae", "x"], "for one --stage"),
    (["--stage", "vae", "--scenes", "2"], "want at least 20"),
    (["--stage", "vae", "--perceptual-weight", "1"], "vgg16-397923af.pth")])
def test_bad_commands_are_refused(tmp_path, words, says):
    line = refused("train.py", "--out", tmp_path / "run", "--scenes", 20, *words, REALS_CACHE=str(tmp_path))
    assert says in line


def test_missing_and_foreign_inputs_are_refused(whole, tmp_path):
    out = copy_of(whole, tmp_path / "arm", "vae", "latents")
    assert "steps" in refused("train.py", "--stage", "vae", "--out", out, *SMALL, "--steps", 7)
    assert "SiT-SIZE/PATCH" in refused("train.py", "--stage", "sit", "--out", out, "--vae", whole / "plain" / "vae",
                                       *SMALL, "--model", "SiT-Huge/2")
    other = whole / "aligned" / "align"
    assert "another autoencoder" in refused("train.py", "--stage", "sit", "--out", out, "--vae", other, *SMALL)
    shutil.rmtree(out / "latents")
    assert "--stage latents" in refused("train.py", "--stage", "sit", "--out", out, *SMALL)
    assert "choose another --out" in refused("train.py", "--out", whole, "--steps", 7)
    assert "--stage sit" in refused("sample.py", "--run", tmp_path, "--out", tmp_path / "x.npz")
    assert "exists" in refused("sample.py", "--run", whole / "plain", "--out", whole / "plain" / "samples.npz")
    words = ["sample.py", "--run", whole / "plain", "--out", tmp_path / "x.npz", "--num"]
    assert "at least one" in refused(*words, 0)
    assert "not known to SiT" in refused(*words, 2, "--sampler", "ddpm")
    assert "stage align" in refused(*words, 2, "--tasks", "features")
    assert not (tmp_path / "x.npz").exists()
    arm = copy_of(whole, tmp_path / "retrained", "vae", "sit")
    (arm / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"other weights")
    settings = json.loads((arm / "sit" / "settings.json").read_text())
    (arm / "sit" / "settings.json").write_text(json.dumps({**settings, "vae": "gone/vae"}))
    assert "is not the autoencoder" in refused("sample.py", "--run", arm, "--num", 2, "--out", tmp_path / "x.npz")
    assert "do not fit the teacher" in refused("train.py", "--stage", "align", "--out", tmp_path / "f", "--teacher",
                                               whole / "teacher", *SMALL, "--fold", 2)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    words = ["train.py", "--stage", "vae", "--out", tmp_path, "--batch-size", 3, "--scenes", 20]
    done = command(*words, processes=2, check=False)
    assert done.returncode != 0 and "does not divide by 2" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The house

@pytest.mark.parametrize("name", ["vae", "align", "sit", "dit", "fid"])
def test_a_file_stands_alone(tmp_path, name):
    shutil.copy(HERE / f"{name}.py", tmp_path)
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); import {name}"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_runs_what_the_readme_says():
    readme, ci = (HERE / "README.md").read_text(), (HERE / ".ci" / "run").read_text()
    commands = [line for line in readme.splitlines() if line.startswith("pip install -r requirements.txt")]
    assert len(commands) == 2 and commands[1] in ci and commands[0].endswith("&& python train.py")
