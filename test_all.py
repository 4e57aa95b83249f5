"""Every test. Figures in assets/reference.json come from the official code on the weights and
inputs that `fill` and `array` make from names and seeds; `difference` is the distance of an output
from them, in their standard deviations.
"""
import argparse
import contextlib
import copy
import fcntl
import functools
import hashlib
import http.server
import importlib
import importlib.metadata
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import urllib.request
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import efficientnet_lite_pytorch
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchdiffeq
import transformers
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import align
import demo.efficientnet
import demo.pictures
import demo.report
import demo.scenes
import demo.study
import demo.teacher
import dit
import fid
import sample
import sit
import train
import vae

HERE = Path(__file__).parent
torch.set_num_threads(1)                                          # the other core is another test's
os.environ["PET_LOCAL_ADDR"] = "127.0.0.1"           # torchrun need not look up this machine's name
README = (HERE / "README.md").read_text()
REFERENCE = json.loads((HERE / "assets" / "reference.json").read_text())


# --------------------------------------------------------------------------------------------------
# Tests run two at a time, a core each; what starts two processes waits for both cores

RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
CORES = open(Path(tempfile.gettempdir()) / f"reals-tests-{RUN}", "w")


@pytest.fixture(autouse=True)
def one_core():
    fcntl.flock(CORES, fcntl.LOCK_SH)
    yield
    fcntl.flock(CORES, fcntl.LOCK_UN)


@contextlib.contextmanager
def both_cores():
    fcntl.flock(CORES, fcntl.LOCK_EX)
    yield
    fcntl.flock(CORES, fcntl.LOCK_SH)


# --------------------------------------------------------------------------------------------------
# Our programs, as users run them

MAIN = {"train.py": train.main, "sample.py": sample.main, "fid.py": fid.main,
        "demo.scenes": demo.scenes.main, "demo.teacher": demo.teacher.main,
        "demo.pictures": demo.pictures.main, "demo.report": demo.report.main,
        "demo.study": demo.study.main}
NO_NETWORK = "http://127.0.0.1:9"                                   # a proxy that nobody is


def split(words):
    """The words of a command as a list; a str may hold several of them."""
    lists = (word.split() if isinstance(word, str) else [str(word)] for word in words)
    return [word for words in lists for word in words]


def start(*words, launch=(), env=None, **options):
    """A program of ours in a process of its own, or in those of `launch`."""
    words, env = split(words), {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    module = [] if words[0].endswith(".py") else ["-m"]
    if launch:                                                # two processes want two GPUs, or none
        env["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen([sys.executable, *launch, *module, *words], cwd=HERE, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def torchrun(processes, flags="--standalone"):
    return split([f"-m torch.distributed.run --nproc_per_node={processes} {flags} --"])


def command(*words, check=True, processes=1, fresh=False, **env):
    """Run a program of ours to its end, in this process where processes are not what is tested."""
    if processes > 1 or fresh:
        with both_cores():
            done = start(*words, launch=torchrun(processes) if processes > 1 else (), env=env)
            done.stdout, done.stderr = done.communicate(timeout=400)
    else:
        done, (out, err) = SimpleNamespace(returncode=0), (io.StringIO(), io.StringIO())
        words, dtype = split(words), torch.get_default_dtype()
        handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        urllib.request.install_opener(None)                         # so that proxies are read anew
        with (mock.patch.dict(os.environ, env), mock.patch.object(sys, "argv", words),
              contextlib.chdir(HERE), contextlib.redirect_stdout(out),
              contextlib.redirect_stderr(err)):
            try:
                MAIN[words[0]]()
            except SystemExit as ended:
                done.returncode = ended.code or 0
        for number, handler in handlers.items():           # from here on as at the end of a process
            signal.signal(number, handler)
        train.locks.clear()
        torch.set_default_dtype(dtype)
        urllib.request.install_opener(None)
        done.stdout, done.stderr = out.getvalue(), err.getvalue()
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def last_line(text):
    return [line for line in text.splitlines() if line.strip()][-1]


def refused(*words, **env):
    """The line with which a program refuses what it was given, with exit status 2."""
    done = command(*words, check=False, **env)
    assert done.returncode == 2, done.stderr[-2000:]
    return last_line(done.stderr)


# --------------------------------------------------------------------------------------------------
# Deterministic weights and inputs, and what the reference file stores of an output

@torch.no_grad()
def fill(module, skip=()):
    """Overwrite all floats of the state dict with values that depend on their name and shape."""
    for name, tensor in module.state_dict().items():
        if name in skip or not tensor.is_floating_point():
            continue
        rng = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
        x = rng.standard_normal(tuple(tensor.shape))
        if tensor.ndim >= 2:
            x = x / np.sqrt(max(1, int(np.prod(tensor.shape[1:]))))
        elif name.endswith(("weight", "gamma", "running_var")):
            x = 1 + 0.1 * np.abs(x)
        else:
            x = 0.1 * x
        tensor.copy_(torch.from_numpy(np.asarray(x)))
    return module.eval()


def array(shape, seed, low=None, high=None):
    rng = np.random.RandomState(seed)
    x = rng.standard_normal(shape) if low is None else rng.uniform(low, high, shape)
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def difference(x, expected):
    """Largest distance from the recorded numbers, which are rounded to seven decimals, in their
    standard deviations."""
    assert list(x.shape) == expected["shape"]
    flat, scale = x.detach().double().reshape(-1), max(expected["std"], 1e-12)
    recorded = expected.get("values") or expected["probe"]
    some = torch.linspace(0, flat.numel() - 1, 10).round().long()
    got = flat.tolist() if "values" in expected else flat[some].tolist()
    gaps = [abs(a - b) - 5.1e-8 for a, b in zip(got, recorded)]
    gaps.append(abs(flat.mean().item() - expected["mean"]))
    gaps.append(abs(flat.std(unbiased=False).item() - expected["std"]))
    return max(gaps) / scale


def check(entry, outputs, float32=1e-4, float64=1e-6):
    """Compare outputs with the figures of a reference entry in their own precision."""
    for name, value in outputs.items():
        kind = "float64" if value.dtype == torch.float64 else "float32"
        gap, most = difference(value, REFERENCE[entry][name][kind]), float32
        if kind == "float64":
            most = float64
        assert gap < most, f"{entry} {name} {kind}: {gap:.2e}"


def check_all(entry, outputs, **tolerances):
    """check, for all that the entry has figures of in this precision; `scalars` among the outputs
    are numbers."""
    outputs = dict(outputs)
    scalars = outputs.pop("scalars", {})
    kind = "float64" if next(iter(outputs.values())).dtype == torch.float64 else "float32"
    wanted = {name for name, value in REFERENCE[entry].items() if kind in value}
    assert wanted <= outputs.keys(), f"{entry}: nothing compared with {wanted - outputs.keys()}"
    check(entry, {name: outputs[name] for name in wanted}, **tolerances)
    for name, value in REFERENCE[entry].get("scalars", {}).items():
        if kind in value:
            expected = pytest.approx(value[kind], rel=1e-6 if kind == "float64" else 1e-4)
            assert scalars[name] == expected, f"{entry} {name} {kind}"


# --------------------------------------------------------------------------------------------------
# vae.py

TINY_VAE = dict(block_out_channels=(32, 64), layers_per_block=1)
SMALL_VAE = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
KINDS = {"float32": torch.float32, "float64": torch.float64}


@contextlib.contextmanager
def one_line(error, says):
    """An error of this kind, of one line that matches."""
    with pytest.raises(error, match=says) as found:
        yield
    assert "\n" not in str(found.value)


@pytest.fixture(scope="session")
def stable_diffusion():
    """The autoencoder of Stable Diffusion with filled weights."""
    return fill(vae.AutoencoderKL())


def test_upsampling_is_nearest_neighbour_and_a_convolution():
    layer, x = fill(vae.Upsample(6)), torch.randn(2, 6, 5, 7)
    expected = layer.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(layer(x), expected)


def autoencoder_outputs(model, shape, seed, dtype=torch.float32):
    """All that a reference entry of the autoencoder records: of images of this shape and seed, of
    latents with the next seed, and of noise with the one after."""
    n, _, height, width = shape
    x = array(shape, seed, -1, 1).to(dtype)
    z = array((n, 4, height // model.factor, width // model.factor), seed + 1).to(dtype)
    torch.manual_seed(seed + 2)
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        drawn = posterior.sample()
        z_seeded = posterior.sample(torch.Generator().manual_seed(seed + 3))
        return {
            "encoder_out": model.encoder(x),
            "parameters": torch.cat([posterior.mean, posterior.logvar], 1),
            "mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std,
            "mode": posterior.mode(), "kl": posterior.kl(), "decode_z": model.decode(z).sample,
            "sample_global_rng": drawn, "sample": drawn, "sample_generator": z_seeded,
            "recon_mode": model.decode(posterior.mode()).sample,
            "recon_sample": model.decode(z_seeded).sample,
            "scalars": {"kl": posterior.kl().mean().item()}}


@pytest.mark.parametrize("entry, shape, seed", [
    ("vae_tiny_square", (2, 3, 32, 32), 101), ("vae_tiny_nonsquare", (2, 3, 32, 48), 104),
    ("vae_compvis_tiny", (2, 3, 32, 32), 131), ("vae_names_tiny", (1, 3, 32, 32), 141),
    ("vae_sd_64", (1, 3, 64, 64), 111), ("vae_sd_64x96", (1, 3, 64, 96), 114),
    ("vae_compvis_sd", (1, 3, 64, 64), 134), ("vae_names_sd", (1, 3, 64, 64), 142)])
def test_autoencoder_equals_official_figures(stable_diffusion, entry, shape, seed):
    model = fill(vae.AutoencoderKL(**TINY_VAE)) if "tiny" in entry else stable_diffusion
    for kind, dtype in KINDS.items():
        if kind in REFERENCE[entry]["mean"]:
            check_all(entry, autoencoder_outputs(model.to(dtype), shape, seed, dtype))
    model.float()


def test_posterior_equals_official_figures():
    for dtype in KINDS.values():
        posterior = vae.DiagonalGaussian((array((2, 8, 6, 6), 121) * 25).to(dtype))
        other = vae.DiagonalGaussian(array((2, 8, 6, 6), 122).to(dtype))
        torch.manual_seed(123)
        check_all("vae_posterior_clamp", {
            "mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std,
            "var": posterior.var, "kl": posterior.kl(), "kl_other": posterior.kl(other),
            "nll_of_other_mean": posterior.nll(other.mean), "sample": posterior.sample()})


def one_deviation_off(mean, std):
    """Twice as many latents, with the mean and the deviation of samples, without their chance."""
    return torch.cat([mean - std, mean + std])


def test_a_trained_autoencoder_keeps_the_statistics_of_its_latents(whole):
    """In its config.json: those of all 900 images, which stage latents measures too."""
    config = vae.AutoencoderKL.from_pretrained(whole / "plain" / "vae").config
    latents = train.Latents(whole / "plain" / "latents")
    np.testing.assert_allclose(config["latents_mean"], latents.mean, atol=1e-3)
    np.testing.assert_allclose(config["latents_std"], latents.std, atol=1e-3)


def published_lin():
    """The file of LPIPS' published weights, as the package brings it."""
    return importlib.metadata.distribution("lpips").locate_file("lpips/weights/v0.1/vgg.pth")


def filled_lpips(gain, lin=None):
    """LPIPS with a filled VGG16, and with published weights `lin` or filled ones."""
    lpips = vae.LPIPS(lin=lin)
    fill(nn.ModuleDict({"features": lpips.features}))               # features.N.weight
    for conv in lpips.features.values():
        conv.weight.data *= gain
    if lin is None:
        for i, conv in enumerate(lpips.lin):                        # linN.model.1.weight
            model = nn.ModuleDict({"model": nn.ModuleList([nn.Identity(), conv])})
            fill(nn.ModuleDict({f"lin{i}": model}))
    return lpips


@pytest.mark.parametrize("entry, seed, width, gain, published", [
    ("lpips_real_lin", 201, 64, 1, True), ("lpips_real_lin_gain", 203, 48, 2 ** 0.5, True),
    ("lpips_filled_lin_gain", 205, 64, 2 ** 0.5, False)])
def test_lpips_equals_official_figures(entry, seed, width, gain, published):
    """By the means over the batch, which are not rounded: the deviation between its two images is
    tiny."""
    lpips = filled_lpips(gain, published_lin() if published else None)
    for (kind, dtype), relative in zip(KINDS.items(), (1e-4, 1e-6)):
        x, y = (array((2, 3, 64, width), seed + i, -1, 1).to(dtype) for i in (0, 1))
        with torch.no_grad():
            outputs = {"value": lpips.to(dtype)(x, y)}
            outputs.update({f"layer{i}": d for i, d in enumerate(lpips.by_stage(x, y).T)})
        for name, got in outputs.items():
            want = REFERENCE[entry][name][kind]
            assert got.mean().item() == pytest.approx(want["mean"], rel=relative, abs=1e-9), name
            np.testing.assert_allclose(got, want["values"], rtol=relative, atol=1e-7)


def test_lpips_reads_the_published_weights():
    weights = {f"lin{i}.model.1.weight": conv.weight
               for i, conv in enumerate(vae.LPIPS(lin=published_lin()).lin)}
    check_all("lpips_vgg_v0.1_lin_weights", {**weights, "scalars": {
        f"{word}_{name}": getattr(weight, word)().item()
        for name, weight in weights.items() for word in ("sum", "min")}})


def test_discriminator_equals_official_figures():
    for dtype in KINDS.values():
        model = fill(vae.PatchDiscriminator()).to(dtype)
        real, fake = (array((2, 3, 64, 64), seed, -1, 1).to(dtype) for seed in (211, 212))
        outputs = {"eval_logits_real": model(real), "eval_logits_fake": model(fake)}
        model.train()
        outputs.update(train_logits_real=model(real), train_logits_fake=model(fake))
        d_loss = vae.hinge_d_loss(outputs["train_logits_real"], outputs["train_logits_fake"])
        g_loss = vae.hinge_g_loss(outputs["train_logits_fake"])
        outputs["d_hinge_grad_first_conv"] = torch.autograd.grad(
            d_loss, model.main[0].weight, retain_graph=True)[0]
        outputs["g_grad_last_conv"] = torch.autograd.grad(g_loss, model.main[11].weight)[0]
        for i in (3, 6, 9):
            outputs[f"after_train_main.{i}.running_mean"] = model.main[i].running_mean
            outputs[f"after_train_main.{i}.running_var"] = model.main[i].running_var
        outputs["scalars"] = {"hinge_d_loss": d_loss.item(), "generator_loss": g_loss.item()}
        check_all("patchgan_64_3", outputs)


def test_gan_losses_and_adaptive_weight_equal_official_figures():
    def near(entry, name):
        return pytest.approx(REFERENCE[entry]["scalars"][name]["float64"], rel=1e-6)

    real, fake = (array((2, 1, 6, 6), seed).double() for seed in (215, 216))
    assert vae.hinge_d_loss(real, fake).item() == near("gan_losses", "hinge_d_loss")
    assert vae.hinge_g_loss(fake).item() == near("gan_losses", "generator_loss")

    conv = fill(nn.Conv2d(4, 3, 3, padding=1)).double()
    rec = conv(array((2, 4, 9, 7), 217).double())
    nll, gan = (rec - array((2, 3, 9, 7), 218)).abs().sum() / 2, -(torch.tanh(rec) ** 3).mean()
    weight, limit = (0.5 * vae.adaptive_weight(nll, c * gan, conv.weight).item()
                     for c in (1, 1e-12))                           # CompVis' weight is 0.5 there
    assert weight == near("adaptive_weight", "d_weight")
    assert limit == near("adaptive_weight", "d_weight_g_times_1e-12") == 5000


@pytest.mark.parametrize("entry, seed, disc_start, s", [
    ("lpips_with_disc_hinge", 221, 0, 0.0), ("lpips_with_disc_before_start", 231, 50001, 0.3)])
def test_autoencoder_loss_equals_compvis_figures(entry, seed, disc_start, s):
    """LPIPSWithDiscriminator at step 10, by the equivalence that autoencoder_loss states; s is its
    log variance. One activation of the discriminator on the real images lies 5.5e-7 from the kink
    of its LeakyReLU, as much as its error in float32: a CPU's kernels may turn it over, which moves
    the gradient of the first layer by 5e-3."""
    count, gain = 3 * 64 * 64, math.exp(-s)
    for kind, dtype in KINDS.items():
        x = array((2, 3, 64, 64), seed, -1, 1).to(dtype)
        h = array((2, 8, 64, 64), seed + 1).to(dtype)
        posterior = vae.DiagonalGaussian(array((2, 8, 8, 8), seed + 2).to(dtype))
        lpips = filled_lpips(2 ** 0.5, published_lin()).to(dtype)
        discriminator = fill(vae.PatchDiscriminator()).to(dtype).train()
        conv = fill(nn.Conv2d(8, 3, 3, padding=1)).to(dtype)
        rec = conv(h)
        total, parts = vae.autoencoder_loss(
            x, rec, posterior, pixel_loss="l1", kl_weight=1e-6 / gain / count,
            perceptual_weight=1.0, lpips=lpips, disc_weight=0.5, disc_start=disc_start, step=10,
            discriminator=discriminator, last_layer=conv.weight)
        assert ("gan" in parts) == (disc_start == 0)
        nll = (parts["l1"] + parts["lpips"]).item()
        scalars = {
            "log0_total_loss": gain * count * total.item() + count * s,
            "log0_nll_loss": count * (gain * nll + s),
            "log0_kl_loss": parts["kl"].item(), "log0_rec_loss": nll}
        gradient = torch.autograd.grad(total, conv.weight, retain_graph=True)[0]
        outputs = {"reconstructions": rec, "kl": posterior.kl(),
                   "grad_last_layer_of_loss": gain * count * gradient}
        if disc_start == 0:
            d_loss = vae.hinge_d_loss(discriminator(x), discriminator(rec.detach()))
            scalars.update({
                "log0_d_weight": count * parts["d_weight"].item(),
                "log0_g_loss": parts["gan"].item(), "log1_disc_loss": d_loss.item()})
            first, outputs["grad_disc_last_conv"] = torch.autograd.grad(
                d_loss, (discriminator.main[0].weight, discriminator.main[11].weight))
            check(entry, {"grad_disc_first_conv": first}, float32=1e-2)
        check(entry, outputs)
        for name, value in scalars.items():
            want = REFERENCE[entry]["scalars"][name][kind]
            assert value == pytest.approx(want, rel=1e-6 if kind == "float64" else 1e-4), name


def test_one_step_moves_every_parameter():
    """From a fresh start; and LPIPS sends its gradient to the decoder."""
    torch.manual_seed(0)
    autoencoder = vae.AutoencoderKL(**SMALL_VAE)
    net = train.Autoencoder(autoencoder, align.AlignmentHeads(4, 24, 32))
    discriminator, lpips = vae.PatchDiscriminator(ndf=8), vae.LPIPS()
    last_layer = autoencoder.decoder.conv_out.weight
    both = nn.ModuleList([net, discriminator])
    before = copy.deepcopy(both.state_dict())
    x = array((4, 3, 32, 32), 3, -1, 1)
    rec, posterior, features = net(x, torch.randn(4, 4, 16, 16))
    grad = torch.autograd.grad(lpips(rec, x).mean(), last_layer, retain_graph=True)[0]
    assert grad.abs().max() > 0, "LPIPS sends no gradient to the decoder"
    total, parts = vae.autoencoder_loss(
        x, rec, posterior, perceptual_weight=1.0, lpips=lpips, disc_weight=0.5,
        discriminator=discriminator, last_layer=last_layer)
    assert set(parts) == {"mse", "kl", "lpips", "gan", "d_weight"}
    loss, _ = align.align_loss(*features, torch.randn(4, 64, 24), torch.randn(4, 24))
    (total + loss).backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    discriminator.zero_grad()
    discriminator.main[-1].bias.data.fill_(0.95)                    # some logits beyond the hinge
    before["1.main.11.bias"].fill_(0.95)
    vae.hinge_d_loss(discriminator(x), discriminator(rec.detach())).backward()
    torch.optim.SGD(discriminator.parameters(), lr=1.0).step()
    for name, parameter in both.named_parameters():
        # a bias of the keys shifts all scores alike: softmax gives it no gradient
        moved = not torch.equal(parameter, before[name])
        assert moved or name.endswith("to_k.bias"), f"{name} has not moved"
    assert all(parameter.grad is None for parameter in lpips.parameters())


def test_checkpointing_and_bfloat16_leave_the_loss_as_it_is():
    torch.manual_seed(0)
    model = fill(vae.AutoencoderKL(**SMALL_VAE)).train()
    discriminator = fill(vae.PatchDiscriminator(ndf=8)).train()
    lpips = filled_lpips(2 ** 0.5)
    x, noise, losses, grads = array((2, 3, 32, 32), 3, -1, 1), torch.randn(2, 4, 16, 16), {}, {}
    for kind in ("plain", "checkpointing", "bfloat16"):
        if kind == "checkpointing":
            model.enable_gradient_checkpointing()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
            rec, posterior, _ = model(x, noise)
            total, parts = vae.autoencoder_loss(
                x, rec, posterior, kl_weight=1e-4, perceptual_weight=1.0, lpips=lpips,
                disc_weight=0.5, discriminator=discriminator,
                last_layer=model.decoder.conv_out.weight)
            # as for the alignment: a gradient through the whole decoder, then the real one
            weight = vae.adaptive_weight(
                total, posterior.mean.square().mean(), model.encoder.conv_out.weight)
        (weight * total).backward()
        losses[kind] = total.item()
        grads[kind] = {name: p.grad.clone() for name, p in model.named_parameters()}
        assert posterior.mean.dtype == torch.float32
    assert losses["checkpointing"] == pytest.approx(losses["plain"], rel=1e-6)
    assert losses["bfloat16"] == pytest.approx(losses["plain"], rel=2e-2)
    torch.testing.assert_close(grads["checkpointing"], grads["plain"], rtol=1e-4, atol=1e-6)


def test_psnr_and_ssim_equal_scikit_images():
    x = train.to_float(demo.scenes.draw_scenes(0, np.arange(3), 48)[0]).cpu().double()
    y = (x + 0.1 * array((3, 3, 48, 48), 4)).clamp(-1, 1)
    psnr, ssim = vae.psnr(x, y), vae.ssim(x, y)
    for i in range(3):
        a, b = x[i].numpy(), y[i].numpy()
        expected = structural_similarity(a, b, data_range=2, channel_axis=0, gaussian_weights=True,
                                         sigma=1.5, use_sample_covariance=False)
        assert ssim[i].item() == pytest.approx(expected, rel=1e-9)
        expected = peak_signal_noise_ratio(a, b, data_range=2)
        assert psnr[i].item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(vae.ssim(x, x), torch.ones(3, dtype=torch.float64))
    with one_line(ValueError, "11"):
        vae.ssim(x[..., :8], x[..., :8])


@pytest.mark.parametrize("x, says", [
    (torch.zeros(1, 3, 32, 33), "multiples of 2"), (torch.zeros(1, 4, 32, 32), "3, H, W"),
    (torch.zeros(3, 32, 32), "3, H, W"), (torch.zeros(0, 3, 32, 32), "3, H, W"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "float"),
    (torch.full((1, 3, 32, 32), 128.0), "255"), (torch.full((1, 3, 32, 32), math.nan), "nan")])
def test_images_that_are_none_are_refused(x, says):
    model = vae.AutoencoderKL(**SMALL_VAE)
    with one_line(ValueError, says):
        model.encode(x)
    with one_line(ValueError, "4, h, w"):
        model.decode(torch.zeros(1, 3, 8, 8))


def same_autoencoder(a, b, x):
    """Two autoencoders, ours or diffusers', give the same latents and images."""
    with torch.no_grad():
        z = a.encode(x).latent_dist.mean
        torch.testing.assert_close(b.encode(x).latent_dist.mean, z, rtol=1e-4, atol=5e-5)
        rec = a.decode(z).sample
        torch.testing.assert_close(b.decode(z).sample, rec, rtol=1e-4, atol=5e-5)


def drawn_config(seed):
    """Arguments of an autoencoder that nobody chose."""
    rng = np.random.RandomState(seed)
    return dict(
        block_out_channels=(8 * rng.randint(1, 5, rng.randint(1, 4))).tolist(),
        layers_per_block=int(rng.randint(1, 4)), norm_num_groups=int(rng.choice([2, 4, 8])),
        in_channels=int(rng.randint(1, 5)), out_channels=int(rng.randint(1, 5)),
        latent_channels=int(rng.choice([3, 4, 16])), sample_size=32,
        scaling_factor=round(rng.uniform(0.1, 2), 3), shift_factor=round(rng.uniform(-1, 1), 3),
        **{name: bool(rng.randint(2)) for name in (
            "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "force_upcast")})


@pytest.mark.parametrize("config", [
    dict(SMALL_VAE, sample_size=32),
    # as SD3's and FLUX's are, but small
    dict(SMALL_VAE, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
         use_quant_conv=False, use_post_quant_conv=False),
    *map(drawn_config, range(6))])
def test_autoencoder_and_diffusers_read_each_others_folders(tmp_path, config):
    torch.manual_seed(0)
    numbers = (0.5 + torch.rand(2, config.get("latent_channels", 4))).tolist()
    ours = fill(vae.AutoencoderKL(**config, latents_mean=numbers[0], latents_std=numbers[1]))
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours").eval()
    x = array((2, config.get("in_channels", 3), 32, 48), 1, -1, 1)
    same_autoencoder(ours, theirs, x)

    theirs.save_pretrained(tmp_path / "theirs")
    change_config(tmp_path / "theirs", my_note=[1, 2])
    back = vae.AutoencoderKL.from_pretrained(tmp_path / "theirs")
    same_autoencoder(ours, back, x)
    z = torch.randn(2, len(numbers[0]), 3, 3)
    torch.testing.assert_close(back.denormalize(back.normalize(z)), z)
    torch.testing.assert_close(back.normalize(z)[:, 1], (z[:, 1] - numbers[0][1]) / numbers[1][1])

    back.save_pretrained(tmp_path / "back")                         # what we do not know is kept
    text = change_config(tmp_path / "back")
    assert text["my_note"] == [1, 2] and text["_diffusers_version"] == diffusers.__version__
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "back")
    assert [list(again.config.latents_mean), list(again.config.latents_std)] == numbers
    for name, value in config.items():
        assert again.config[name] == value or list(again.config[name]) == list(value), name


def test_variants_and_shards_load(tmp_path):
    theirs = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        **SMALL_VAE).eval()
    x = array((1, 3, 32, 32), 1, -1, 1)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 2
    sharded = vae.AutoencoderKL.from_pretrained(tmp_path / "shards")
    same_autoencoder(theirs, sharded, x)
    sharded.save_pretrained(tmp_path / "one")
    change_config(tmp_path / "one", scaling_factor=0.5)             # a file beside its config.json
    one = vae.AutoencoderKL.from_pretrained(
        tmp_path / "one/diffusion_pytorch_model.safetensors")
    same_autoencoder(theirs, one, x)
    assert one.config.scaling_factor == 0.5

    half = copy.deepcopy(theirs).half()
    half.save_pretrained(tmp_path / "pipeline" / "vae", variant="fp16")
    half.save_pretrained(tmp_path / "both", variant="fp16", max_shard_size="100KB")
    loaded = vae.AutoencoderKL.from_pretrained(tmp_path / "pipeline", subfolder="vae")
    assert loaded.dtype == torch.float32
    same_autoencoder(half.float(), loaded, x)
    loaded = vae.AutoencoderKL.from_pretrained(tmp_path / "both", torch_dtype=torch.float64)
    assert loaded.dtype == torch.float64
    same_autoencoder(half.double(), loaded, x.double())

    index = tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json"
    digest = train.checksum(tmp_path / "shards")
    shard = sorted((tmp_path / "shards").glob("*-of-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert train.checksum(tmp_path / "shards") != digest
    shard.unlink()
    with one_line(FileNotFoundError, shard.name):
        vae.AutoencoderKL.from_pretrained(tmp_path / "shards")
    elsewhere = '{"weight_map": {"a": "../x.safetensors"}}'
    for text in ("{", "[]", "{}", '{"weight_map": {}}', elsewhere):
        index.write_text(text)
        with one_line(ValueError, "no index of weights"):
            vae.AutoencoderKL.from_pretrained(tmp_path / "shards")


def test_statistics_beside_the_config_are_read_where_their_meaning_is_plain(tmp_path):
    vae.AutoencoderKL(**SMALL_VAE).save_pretrained(tmp_path)
    mean, std = [0.5, -1.0, 2.0, 0.0], [1.0, 2.0, 3.0, 0.25]
    for content in ({"mean": mean, "std": std}, {"latents_std": std, "latents_mean": mean, "n": 1}):
        (tmp_path / "mean_std.json").write_text(json.dumps(content))
        config = vae.AutoencoderKL.from_pretrained(tmp_path).config
        assert (config.latents_mean, config.latents_std) == (mean, std)
    for content in ([mean, std], {"mean": mean}, {"mean": 1, "std": 2},
                    {"mean": mean[:3], "std": std}, {"mean": mean, "std": ["1"] * 4},
                    {"mean": mean, "std": [1.0, 2.0, 3.0, -1.0]},
                    {"std_mean": mean}, {"mean": mean, "log_std": std}):
        (tmp_path / "mean_std.json").write_text(json.dumps(content))
        with one_line(ValueError, "mean_std.json"):
            vae.AutoencoderKL.from_pretrained(tmp_path)
    change_config(tmp_path, latents_mean=mean, latents_std=std)     # which comes first
    assert vae.AutoencoderKL.from_pretrained(tmp_path).config.latents_mean == mean


def test_a_pipeline_of_diffusers_takes_the_autoencoder():
    """DiTPipeline makes the same images with ours as with its own."""
    torch.manual_seed(0)
    ours = fill(vae.AutoencoderKL(**SMALL_VAE, sample_size=16))
    theirs = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        **SMALL_VAE, sample_size=16).eval()
    theirs.load_state_dict(ours.state_dict())
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, num_embeds_ada_norm=1000).eval()
    images = []
    for autoencoder in (ours, theirs):
        pipeline = diffusers.DiTPipeline(transformer, autoencoder, diffusers.DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline([1, 2], num_inference_steps=2, output_type="np",
                               generator=torch.Generator().manual_seed(0)).images)
    assert images[0].shape == (2, 16, 16, 3) and images[0].std() > 0.01
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)

    x = array((1, 3, 16, 16), 1, -1, 1)
    posterior, = ours.encode(x, return_dict=False)
    assert torch.equal(posterior.mean, ours.encode(x).latent_dist.mean)
    rec, = ours.decode(posterior.mode(), return_dict=False)
    assert torch.equal(rec, ours.decode(posterior.mode()).sample)
    assert ours.config.scaling_factor == ours.config["scaling_factor"] == 0.18215
    with pytest.raises(AttributeError, match="scaling"):
        ours.config.scaling


def test_the_papers_example(tmp_path, stable_diffusion):
    """Its lines, with another import; diffusers reads Stable Diffusion's folder too."""
    assert sum(p.numel() for p in stable_diffusion.parameters()) == 83_653_863
    assert len(stable_diffusion.state_dict()) == 248
    stable_diffusion.save_pretrained(tmp_path)
    AutoencoderKL, path = vae.AutoencoderKL, str(tmp_path)
    autoencoder = AutoencoderKL.from_pretrained(path)
    x = array((1, 3, 64, 64), 142, -1, 1)
    with torch.no_grad():
        z = autoencoder.encode(x).latent_dist.sample()
        assert z.shape == (1, 4, 8, 8) and autoencoder.decode(z).sample.shape == x.shape
    same_autoencoder(diffusers.AutoencoderKL.from_pretrained(path), autoencoder, x)
    text, official = change_config(tmp_path), REFERENCE["vae_names_sd"]["config_json"]
    assert {**official, **text, "sample_size": 32} == official


def test_names_of_early_diffusers_load(tmp_path):
    ours = fill(vae.AutoencoderKL(**SMALL_VAE))
    ours.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in ours.state_dict().items():
        for new, before in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{before}.")
        weights[name] = value
    assert sum(".query." in name for name in weights) == 4
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    x = array((1, 3, 32, 32), 1, -1, 1)
    same_autoencoder(ours, vae.AutoencoderKL.from_pretrained(tmp_path), x)
    same_autoencoder(ours, diffusers.AutoencoderKL.from_pretrained(tmp_path), x)


def test_checkpoints_of_compvis_load(tmp_path, stable_diffusion):
    """The names as the official code lists them, alone and in a checkpoint of diffusion."""
    names = {new: before for before, new in REFERENCE["vae_compvis_sd"]["names"].items()}
    weights = {}
    for name, value in stable_diffusion.state_dict().items():
        convolution = ".attentions.0.to_" in name and value.ndim == 2
        weights[names[name]] = value[:, :, None, None] if convolution else value
    rest = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(64)}
    checkpoint = {"state_dict": {**weights, **rest}, "global_step": 7}
    torch.save(checkpoint, tmp_path / "model.ckpt")
    loaded = vae.AutoencoderKL.from_pretrained(tmp_path / "model.ckpt")
    check_all("vae_compvis_sd", autoencoder_outputs(loaded, (1, 3, 64, 64), 134))
    whole = {f"first_stage_model.{name}": value for name, value in weights.items()}
    whole["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    assert vae.diffusers_names(whole).keys() == stable_diffusion.state_dict().keys()


def test_names_of_compvis_are_changed_as_diffusers_does():
    """For three levels; the official list has four."""
    names = [name for name in REFERENCE["vae_compvis_sd"]["names"]
             if not re.search(r"(down|up)\.3\.", name)]
    weights = {name: torch.full((1, 1, 1, 1), float(i)) for i, name in enumerate(names)}
    blocks = {"up_block_types": [0] * 3, "down_block_types": [0] * 3}
    theirs = convert_ldm_vae_checkpoint(weights, blocks)
    ours = vae.diffusers_names(weights)
    assert {name: value.item() for name, value in ours.items()} == {
        name: value.item() for name, value in theirs.items()}


def change_config(folder, **changes):
    """Change config.json of a folder; its text afterwards, as a dict."""
    path = Path(folder) / "config.json"
    text = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(text))
    return text


@pytest.mark.parametrize("config, says", [
    (dict(act_fn="relu"), "act_fn"), (dict(act_fn=None), "act_fn"),
    (dict(use_quant_conv=False), "use_quant_conv True, and its config.json False"),
    (dict(mid_block_add_attention=False), "mid_block_add_attention"),
    (dict(latent_channels=4.5), "latent_channels 4, and its config.json 4.5"),
    (dict(norm_num_groups="8"), "norm_num_groups is '8'"), (dict(scaling_factor=0), "above 0"),
    (dict(shift_factor=math.nan), "shift_factor nan"), (dict(block_out_channels=5), "no block_out"),
    (dict(_class_name="AutoencoderDC"), "that of AutoencoderDC"),
    (dict(down_block_types=["AttnDownEncoderBlock2D"] * 2), "down_block_types"),
    (dict(layers_per_block=2), "layers_per_block 1, and its config.json 2"),
    (dict(block_out_channels=[8, 8]), r"block_out_channels \[16, 32\], and its config.json"),
    (dict(block_out_channels=[8]), "block_out_channels"),
    (dict(block_out_channels=[10 ** 9] * 2), "block_out_channels"),
    (dict(block_out_channels=None), "block_out_channels"),
    (dict(norm_num_groups=3), "norm_num_groups"), (dict(norm_num_groups=0), "norm_num_groups"),
    (dict(latents_mean=[0.0], latents_std=[1.0]), "latents_mean"),
    (dict(latents_mean=[0.0] * 4), "latents_std is None"),
    (dict(latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 0.0, 1.0]), "above 0")])
def test_a_folder_that_does_not_fit_is_one_clear_line(tmp_path, config, says):
    vae.AutoencoderKL(**SMALL_VAE).save_pretrained(tmp_path)
    change_config(tmp_path, **config)
    with one_line(ValueError, says):
        vae.AutoencoderKL.from_pretrained(tmp_path)


def test_folders_without_their_files_are_refused(tmp_path):
    vae.AutoencoderKL(**SMALL_VAE).save_pretrained(tmp_path / "vae")
    with one_line(FileNotFoundError, "config.json .*see its folder vae"):
        vae.AutoencoderKL.from_pretrained(tmp_path)
    vae.AutoencoderKL(**SMALL_VAE).save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "flax_model.msgpack").touch()
    with one_line(FileNotFoundError, "config.json, flax_model.msgpack, vae: want .* diffusion_"):
        vae.AutoencoderKL.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with one_line(ValueError, "config.json"):
        vae.AutoencoderKL.from_pretrained(tmp_path)
    vae.save_safetensors({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with one_line(ValueError, "no autoencoder"):
        vae.AutoencoderKL.from_pretrained(tmp_path / "other.safetensors")


def test_safetensors_both_ways(tmp_path):
    torch.manual_seed(0)
    tensors = {name: (8 * torch.randn(3, 5)).to(getattr(torch, name)) for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "bool")}
    tensors["empty"], tensors["scalar"] = torch.empty(0, 3), torch.tensor(2.5)
    tensors["strided"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors["transposed"] = torch.randn(4, 2).T
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    vae.save_safetensors(tensors, ours)
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(contiguous, theirs, metadata={"format": "pt", "note": "{}"})
    for loaded in (safetensors.torch.load_file(ours), vae.load_weights(theirs),
                   vae.load_weights(ours)):
        assert loaded.keys() == tensors.keys()
        for name, value in tensors.items():
            assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
            assert torch.equal(loaded[name].double(), value.double())
    with safetensors.safe_open(ours, "pt") as file:
        assert file.metadata().keys() == {"format", "sha256"}


def safetensors_file(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry_of(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ENTRY = json.dumps(entry_of()).encode()


@pytest.mark.parametrize("content", [
    b"", b"\x07\0\0",
    safetensors_file({"a": entry_of()})[:-1],
    safetensors_file({"a": entry_of()}, length=2 ** 62),
    safetensors_file({"a": entry_of()}, length=70),
    safetensors_file({"a": entry_of()}, b"\0" * 12),
    safetensors_file({"a": entry_of(), "b": entry_of(4, 12)}),
    safetensors_file({"a": entry_of(8, 16)}),
    safetensors_file({"a": entry_of(-8, 0)}),
    safetensors_file({"a": entry_of(0, 4)}, b"\0" * 4),
    safetensors_file({"a": entry_of(0, 2 ** 40, [2 ** 38])}),
    safetensors_file({"a": entry_of(shape=[-1, -2])}),
    safetensors_file({"a": entry_of(shape=[2.0])}),
    safetensors_file({"a": entry_of(shape=[True, 2])}),
    safetensors_file({"a": entry_of(dtype="F31")}),
    safetensors_file(b'{"a": ' + ENTRY + b', "a": ' + ENTRY + b"}"),
    safetensors_file(["a"]), safetensors_file({"a": 1}), safetensors_file(b'{"a":'),
    safetensors_file(b"\xff\xfe"), safetensors_file(b"[" * 100000)])
def test_a_damaged_safetensors_file_is_one_clear_line(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with one_line(ValueError, "broken.safetensors"):
        vae.load_weights(path)


def test_other_files_of_weights_are_refused_in_one_line(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickle.safetensors")
    torch.save({"a": Path("x")}, tmp_path / "code.bin")
    torch.save({"a": Path("x")}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"a": "text"}, tmp_path / "text.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "pickle.safetensors").read_bytes()[:-200])
    (tmp_path / "noise.ckpt").write_bytes(b"noise" * 100)
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"a": torch.zeros(1), "module.a": torch.ones(1)}, tmp_path / "twice.bin")
    many = {f"{i:0100}": entry_of(0, 0, (0,)) for i in range(80_000)}   # took a minute of parsing
    (tmp_path / "many.safetensors").write_bytes(safetensors_file(many, b""))
    for path in list(tmp_path.iterdir()):
        says = {"text": "no tensor", "twice": "with and without", "many": "has a header",
                "pickle": "no safetensors file",
                "code": "save its state dict", "old": "save its state dict"}
        with one_line(ValueError, f"{path.name} .*{says.get(path.stem, 'fetch the file anew')}"):
            vae.load_weights(path)
    with one_line(FileNotFoundError, "none.bin"):
        vae.load_weights(tmp_path / "none.bin")


# --------------------------------------------------------------------------------------------------
# align.py

TINY_VIT = dict(embed_dim=96, depth=3, num_heads=3, img_size=70)


def test_alignment_heads_put_every_token_at_its_place():
    """A change in one latent cell changes the token of its place and no other; a latent that does
    not fold to the grid is resized to it, and left stays left."""
    heads = align.AlignmentHeads(latent_channels=4, embed_dim=16, hidden_dim=8, fold=2)
    z = torch.randn(1, 4, 8, 12)
    moved = z.clone()
    moved[0, :, 5, 6] += 1                                          # in token (2, 3)
    changed = (heads.feature_map(moved) - heads.feature_map(z)).abs().sum(1)[0] > 1e-6
    assert changed.shape == (4, 6) and changed.nonzero().tolist() == [[2, 3]]
    assert not torch.allclose(heads.class_token(z), heads.class_token(z.flip(3)), atol=1e-3)
    with pytest.raises(ValueError, match="a latent of 7 x 8 does not fold by 2"):
        heads(torch.randn(1, 4, 7, 8))
    heads = align.AlignmentHeads(4, 16, 8, fold=1, grid=(5, 7))
    z = torch.stack([torch.zeros(4, 8, 8), torch.ones(4, 8, 8)])
    patch, cls = heads(z)
    zeros, ones = heads.feature_map(z)
    assert patch.shape == (2, 35, 16) and cls.shape == (2, 16) and ones.shape == (16, 5, 7)
    halves = torch.cat([z[0, ..., :4], z[1, ..., 4:]], dim=2)       # 0 on the left, 1 on the right
    features = heads.feature_map(halves[None])[0]
    torch.testing.assert_close(features[..., 0], zeros[..., 0])
    torch.testing.assert_close(features[..., 6], ones[..., 6])
    assert (zeros - ones).abs().max() > 1e-3
    assert align.AlignmentHeads(**heads.config).grid == (5, 7)


def test_alignment_heads_give_features_in_the_scale_of_the_teacher():
    """Targets are standardised, and that is undone; MLPs that learned tokens before the teacher's
    norm give both kinds, those that learned normed ones say so."""
    teacher, x = fill(align.DINOv2(**TINY_VIT)), array((3, 3, 70, 70), 1, -1, 1)
    raw, normed = (align.teacher_tokens(teacher, x, 70, target) for target in ("prenorm", "norm"))
    for before, after in zip(raw, normed):
        torch.testing.assert_close(teacher.norm(before), after)
    heads, z = align.AlignmentHeads(4, 96, 8, fold=1, target="prenorm"), torch.randn(3, 4, 5, 5)
    predicted = heads(z)
    heads.fit_norm(teacher.norm)
    heads.fit_statistics(*raw)
    for tokens in heads.standardize(*raw):
        deviation, mean = torch.std_mean(tokens.flatten(0, -2), dim=0)
        torch.testing.assert_close(mean, torch.zeros(96), atol=1e-4, rtol=0)
        torch.testing.assert_close(deviation, torch.ones(96), atol=1e-4, rtol=0)
    given = heads.feature_map(z, normed=False).flatten(2).mT, heads.class_token(z, normed=False)
    after = heads.feature_map(z).flatten(2).mT, heads.class_token(z)
    for want, back, tokens, wanted in zip(predicted, heads.standardize(*given), given, after):
        torch.testing.assert_close(back, want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(teacher.norm(tokens), wanted)
    with pytest.raises(ValueError, match="prenorm"):
        align.AlignmentHeads(4, 96, 8, fold=1).feature_map(z, normed=False)
    heads.fit_statistics(raw[0][:1], raw[1][:1])         # of one image: finite, and undone too
    assert all(tokens.isfinite().all() for tokens in heads.standardize(raw[0][:1], raw[1][:1]))


def test_align_loss():
    patch, cls = torch.randn(2, 9, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    for x, y, arguments, expected in (
            (patch, cls, {}, 0),
            (-patch, -cls, dict(form="cosine"), 4),                 # 1 - cos = 2, for patch and cls
            (2 * patch, 2 * cls, dict(form="cosine"), 0),
            (patch + 3, cls - 2, dict(form="l1"), 2.5 + 1.5),       # |3| - 1 / 2 and |2| - 1 / 2
            (patch + 3, cls - 2, dict(form="l1", cls_weight=0.0), 2.5),
            (patch + 3, cls - 2, dict(form="l1", patch_weight=0.0), 1.5)):
        loss, parts = align.align_loss(x.detach(), y.detach(), patch, cls, **arguments)
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6), arguments
    x, y = (patch + 3).detach().requires_grad_(), (cls - 2).detach().requires_grad_()
    loss, parts = align.align_loss(x, y, patch, cls)
    loss.backward()
    cosines = parts["cos_patch"] + parts["cos_cls"]
    assert loss.item() == pytest.approx((0.9 * (2 - cosines) + 0.1 * 4).item(), rel=1e-5)
    assert x.grad.abs().max() > 0 and y.grad.abs().max() > 0
    assert patch.grad is None and cls.grad is None


def test_gradients_reach_encoder_and_mlps_and_never_the_teacher():
    torch.manual_seed(0)
    teacher = fill(align.DINOv2(**TINY_VIT))                        # not even frozen
    autoencoder = vae.AutoencoderKL(block_out_channels=(16, 32), layers_per_block=1,
                                    norm_num_groups=8)
    net = train.Autoencoder(autoencoder, align.AlignmentHeads(4, 96, 8, grid=(5, 5)))
    x = array((2, 3, 16, 16), 1, -1, 1)
    _, _, features = net(x, torch.randn(2, 4, 8, 8))
    targets = net.heads.standardize(*align.teacher_tokens(teacher, x, 70))
    align.align_loss(*features, *targets)[0].backward()
    for name, p in (*net.vae.encoder.named_parameters(), *net.heads.named_parameters()):
        assert p.grad is not None and (p.grad.abs().max() > 0 or name.endswith("to_k.bias")), name
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_input_is_what_dinov2_expects():
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (align.IMAGENET_MEAN, align.IMAGENET_STD))
    torch.testing.assert_close(align.teacher_input(2 * x - 1, 32), (x - mean) / std)
    assert align.teacher_input(x, 28).shape == (2, 3, 28, 28)


@pytest.fixture(scope="session")
def vits():
    """ViT-S/14 without and with registers, with filled weights."""
    return {name: fill(align.DINOv2(**align.DINOV2[name][0]))
            for name in ("dinov2_vits14", "dinov2_vits14_reg")}


def louder(model, pos=500, token=20):
    """A copy of a model, the tables that `fill` makes tiny times the factors of the references."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.pos_embed.mul_(pos)
        model.cls_token.mul_(token)
        if model.num_registers:
            model.register_tokens.mul_(token)
    return model


def dinov2_outputs(model, x, blocks):
    """All that a reference entry of DINOv2 records."""
    grid = x.shape[2] // model.patch_size, x.shape[3] // model.patch_size
    out = model.forward_features(x)
    out.update(forward=model(x), tokens_prepared=model.tokens(x),
               pos_embed_interpolated=model.interpolated_pos_embed(*grid),
               last_not_reshaped_not_normed=model.get_intermediate_layers(x, norm=False)[0])
    layers = model.get_intermediate_layers(x, blocks, reshape=True, return_class_token=True)
    for i, (patch, cls) in enumerate(layers):
        out.update({f"layer{i}_patch": patch, f"layer{i}_cls": cls})
    return out


@pytest.mark.parametrize("entry, shape, seed, factors", [
    ("dinov2_s14_224x224", (1, 3, 224, 224), 301, (500, 20)),
    ("dinov2_s14_98x98", (2, 3, 98, 98), 302, (500, 20)),
    ("dinov2_s14_140x196", (2, 3, 140, 196), 303, (500, 20)),
    ("dinov2_s14reg_224x224", (1, 3, 224, 224), 311, (500, 20)),
    ("dinov2_s14reg_98x98", (2, 3, 98, 98), 312, (500, 20)),
    ("dinov2_s14reg_140x196", (2, 3, 140, 196), 313, (500, 20)),
    ("dinov2_s14_98x98_plain_fill", (1, 3, 98, 98), 321, (1, 1)),
    ("dinov2_tiny_swiglu", (2, 3, 70, 56), 331, (50, 5))])
def test_dinov2_equals_official_figures(vits, entry, shape, seed, factors):
    if "tiny" in entry:
        model, blocks = fill(align.DINOv2(**TINY_VIT, ffn="swiglu")), 3
    else:
        model, blocks = vits["dinov2_vits14_reg" if "reg" in entry else "dinov2_vits14"], 4
    model = louder(model, *factors)
    for kind in ("float32", "float64"):
        if any(kind in value for value in REFERENCE[entry].values()):
            dtype = getattr(torch, kind)
            x = array(shape, seed).to(dtype)
            check_all(entry, dinov2_outputs(model.to(dtype), x, blocks))


@pytest.mark.parametrize("registers, ffn, size", [
    (0, "mlp", (70, 70)), (4, "swiglu", (98, 56)), (4, "mlp", (70, 70))])
def test_dinov2_equals_hugging_faces(tmp_path, registers, ffn, size):
    """Without registers on the native grid only: there Hugging Face's interpolation is not the
    official one. The names are those of the files that it publishes, which any version reads; those
    of its modules change."""
    ours = fill(align.DINOv2(**TINY_VIT, num_registers=registers, ffn=ffn))
    names = {"cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
             "pos_embed": "embeddings.position_embeddings",
             "register_tokens": "embeddings.register_tokens",
             "patch_embed.proj": "embeddings.patch_embeddings.projection",
             "blocks": "encoder.layer", "attn.proj": "attention.output.dense",
             "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
             "mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}
    weights = {}
    for name, value in ours.state_dict().items():
        for official, theirs in names.items():
            name = name.replace(official, theirs)
        weights[re.sub("^norm", "layernorm", name)] = value
    for name in [name for name in weights if "attn.qkv" in name]:
        for part, piece in zip(("query", "key", "value"), weights.pop(name).chunk(3)):
            weights[name.replace("attn.qkv", f"attention.attention.{part}")] = piece.clone()
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    extra = dict(num_register_tokens=registers) if registers else {}
    getattr(transformers, f"{kind}Config")(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=70, patch_size=14,
        use_swiglu_ffn=ffn == "swiglu", **extra).save_pretrained(tmp_path)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, told = getattr(transformers, f"{kind}Model").from_pretrained(
        tmp_path, output_loading_info=True)
    assert not any(told.values()), told                             # every name and shape fits
    x = array((2, 3, *size), 5)
    out, expected = ours.forward_features(x), theirs(x).last_hidden_state
    for name, value in (("x_norm_clstoken", expected[:, 0]),
                        ("x_norm_patchtokens", expected[:, 1 + registers:])):
        torch.testing.assert_close(out[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry, seed, name, layers", [
    ("dinov2_classifier_1", 361, "dinov2_vits14", 1),
    ("dinov2_classifier_4", 362, "dinov2_vits14_reg", 4)])
def test_classification_head_equals_official_figures(vits, entry, seed, name, layers):
    model, head = louder(vits[name]), fill(align.ClassificationHead(384, num_layers=layers))
    for dtype in (torch.float32, torch.float64):
        x = array((2, 3, 98, 98), seed).to(dtype)
        pairs = model.to(dtype).get_intermediate_layers(x, layers, return_class_token=True)
        patches, classes = zip(*pairs)
        check_all(entry, {"logits": head.to(dtype)(patches[-1], *classes)})


@pytest.mark.parametrize("entry, shape, seed, classes", [
    ("dinov2_seg_linear_voc", (1, 3, 112, 126), 341, 21),
    ("dinov2_seg_linear_ade_padded", (1, 3, 100, 131), 342, 150)])
def test_segmentation_head_equals_official_figures(vits, entry, shape, seed, classes):
    model, head = louder(vits["dinov2_vits14"]), fill(align.SegmentationHead(384, classes))
    best = None
    for dtype in (torch.float64, torch.float32):
        model, head, x = model.to(dtype), head.to(dtype), array(shape, seed).to(dtype)
        features = model.get_intermediate_layers(align.center_pad(x, 14), reshape=True)[0]
        logits = align.segment(model, head, x)
        best = logits.argmax(1) if best is None else best
        # two classes of a pixel are 5e-6 apart, where float32 has errors of 3e-6
        assert (logits.argmax(1) != best).sum() <= 1
        scalars = {"argmax_sum": best.sum().item(), "argmax_classes_used": len(best.unique())}
        check_all(entry, {"features_last": features, "logits": head(features), "scalars": scalars,
                          "logits_resized": logits, "probabilities": logits.softmax(1)})


@pytest.mark.parametrize("entry, shape, seed, blocks, farthest", [
    ("dinov2_depth_linear_nyu", (1, 3, 112, 126), 351, 1, 10.0),
    ("dinov2_depth_linear4_nyu", (1, 3, 98, 113), 352, (2, 5, 8, 11), 10.0),
    ("dinov2_depth_linear_hub_as_is", (1, 3, 112, 126), 353, 1, 80.0)])
def test_depth_head_equals_official_figures(vits, entry, shape, seed, blocks, farthest):
    model, layers = louder(vits["dinov2_vits14"]), 1 if blocks == 1 else 4
    head = fill(align.DepthHead(384, max_depth=farthest, num_layers=layers))
    for dtype in (torch.float32, torch.float64):
        model, head, x = model.to(dtype), head.to(dtype), array(shape, seed).to(dtype)
        head.bins = torch.linspace(0.001, farthest, 256, dtype=dtype)   # a cast leaves float32's
        pairs = model.get_intermediate_layers(align.center_pad(x, 14), blocks, True, True, False)
        depth = head(*zip(*pairs))
        check_all(entry, {"head_output": depth, "clamped": depth,
                          "depth": align.estimate_depth(model, head, x)})


def test_heads_of_another_width_are_refused():
    features, cls = torch.randn(1, 12, 4, 4), torch.randn(1, 12)
    with pytest.raises(ValueError, match="width 48 got features of 24"):
        align.ClassificationHead(24)(features.flatten(2).mT, cls)
    with pytest.raises(ValueError, match="width 16 got features of 12"):
        align.SegmentationHead(16, 3)(features)
    with pytest.raises(ValueError, match="width 32 got features of 24"):
        align.DepthHead(16)(features, cls)
    with pytest.raises(ValueError, match="28 x 29 does not divide into patches of 14"):
        align.DINOv2(**TINY_VIT)(torch.randn(1, 3, 28, 29))


def test_pictures_have_colours_in_range():
    rgb = align.pca_rgb(torch.randn(3, 20, 4, 5))
    assert rgb.shape == (3, 3, 4, 5) and 0 <= rgb.min() and rgb.max() <= 1
    mask = align.colorize_mask(torch.arange(12).view(1, 3, 4), 12)
    colors = {tuple(c.tolist()) for c in mask[0].flatten(1).T}
    assert len(colors) == 12, "two classes share a colour"
    depth = align.colorize_depth(torch.tensor([[[1.0, 2.0, 3.0]]]))
    assert depth.shape == (1, 3, 1, 3) and depth[0, :, 0, 0].sum() > depth[0, :, 0, 2].sum()
    assert align.colorize_depth(torch.ones(1, 2, 2)).isfinite().all()


def test_similarity_map():
    features = torch.randn(2, 6, 4, 5)
    features[:, :, 3, 4] = -2 * features[:, :, 1, 2]
    alike = demo.pictures.similarity_map(features, 1, 2)
    assert alike.shape == (2, 4, 5)
    torch.testing.assert_close(alike[:, 1, 2], torch.ones(2))
    torch.testing.assert_close(alike[:, 3, 4], -torch.ones(2))


def test_tsne_keeps_clusters_apart_that_a_plane_cannot_show():
    torch.manual_seed(0)
    labels = torch.arange(5).repeat(40)
    x = 6 * torch.eye(5, 20)[labels] + torch.randn(200, 20)
    flat = align.principal_components(x, 2)
    assert flat.std(0).tolist() == sorted(flat.std(0).tolist(), reverse=True)
    for y, least in ((demo.pictures.tsne(x, perplexity=15), 0.97), (flat, 0.0)):
        assert y.shape == (200, 2)
        nearest = (torch.cdist(y, y) + 1e9 * torch.eye(200)).argmin(1)
        assert (labels[nearest] == labels).float().mean() >= least
    with pytest.raises(ValueError, match="at least 90"):
        demo.pictures.tsne(x[:80])


def test_published_models_have_their_sizes():
    for name, (parameters, entries) in REFERENCE["dinov2_backbones"].items():
        with torch.device("meta"):
            model = align.DINOv2(**align.DINOV2[name][0])
        assert sum(p.numel() for p in model.parameters()) == parameters, name
        assert len(model.state_dict()) == entries, name
    assert REFERENCE["dinov2_backbones"].keys() <= align.DINOV2.keys() and len(align.DINOV2) == 8


class Files(http.server.BaseHTTPRequestHandler):
    """A server of `files`, which knows ranges; `cut` bytes, then it hangs up."""

    files, cut, asked = {}, None, []

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Range")))
        content = self.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:start + self.cut] if self.cut else content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A small server on loopback, and an empty cache."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        Files.files, Files.cut, Files.asked = {}, None, []
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("REALS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")                 # where a proxy leads outside
        monkeypatch.setattr(align, "DINOV2_ADDRESS", address)
        yield address
        server.shutdown()


def test_published_backbones_load(server, tmp_path, vits):
    """Under their published names over the network, from a local file, from a teacher's folder."""
    name, model = "dinov2_vits14_reg", vits["dinov2_vits14_reg"]
    path = tmp_path / "dinov2.pth"
    torch.save(model.state_dict(), path)
    (tmp_path / "config.json").write_text(json.dumps(align.DINOV2[name][0]))
    for file in ("dinov2_vits14_reg4_pretrain.pth", "dinov2_vits14_pretrain.pth"):
        Files.files[f"/dinov2_vits14/{file}"] = path.read_bytes()
    x = array((1, 3, 28, 28), 1)
    for loaded in (align.load_teacher(name), align.load_dinov2(name, path),
                   align.load_teacher(tmp_path)):
        assert torch.equal(loaded(x), model(x)) and not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(OSError, match="did not send the bytes that were published"):
        align.load_dinov2("dinov2_vits14")                          # another file than Meta's
    with pytest.raises(ValueError, match="dinov2.pth does not fit the network: .*unexpected"):
        align.load_dinov2("dinov2_vits14", path)
    with pytest.raises(ValueError, match="choose one of dinov2_vits14, "):
        align.load_dinov2("dinov2_vitx14")


def test_published_heads_load(server, tmp_path):
    for name, head in {
            "dinov2_vits14_ade20k_linear_head": align.SegmentationHead(384, 150),
            "dinov2_vits14_voc2012_ms_head": align.SegmentationHead(4 * 384, 21),
            "dinov2_vits14_nyu_linear4_head": align.DepthHead(384, num_layers=4),
            "dinov2_vits14_kitti_linear_head": align.DepthHead(384, max_depth=80.0),
            "dinov2_vits14_reg4_linear4_head": align.ClassificationHead(384, num_layers=4)}.items():
        weights = fill(head).state_dict()
        if not isinstance(head, align.ClassificationHead):          # the others are published so
            weights = {f"decode_head.{key}": value for key, value in weights.items()}
            weights = {"state_dict": weights, "meta": {}}
        torch.save(weights, tmp_path / "head.pth")
        Files.files[f"/dinov2_vits14/{name}.pth"] = (tmp_path / "head.pth").read_bytes()
        loaded = align.load_head(name)
        for key, value in head.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key]), f"{name} {key}"
        if isinstance(head, align.DepthHead):                       # not in the state dict
            assert torch.equal(loaded.bins, head.bins)
    small = tmp_path / "cache" / "dinov2_vits14_ade20k_linear_head.pth"
    with pytest.raises(ValueError, match="of another shape"):
        align.load_head("dinov2_vitb14_ade20k_linear_head", small)
    with pytest.raises(ValueError, match="no head of DINOv2 is called"):
        align.load_head("dinov2_vitb14_mask2former")


def test_fetch_takes_a_file_once_and_goes_on_where_it_broke_off(server, tmp_path):
    content, cache = np.random.RandomState(0).bytes(5_000_000), tmp_path / "cache"
    Files.files = {"/folder/weights.pth": content, "/w.pth": b"weights"}
    address, sha256 = f"{server}/folder/weights.pth", hashlib.sha256(content).hexdigest()
    Files.cut = 2_000_000
    for _ in range(2):                                              # the second goes on
        with pytest.raises(OSError, match="broke off .* of 5000000 bytes"):
            align.fetch(address, sha256)
    assert not (cache / "weights.pth").exists()
    path = align.fetch(address, sha256)
    assert path == cache / "weights.pth" and path.read_bytes() == content
    assert [asked for _, asked in Files.asked] == [None, "bytes=2000000-", "bytes=4000000-"]
    assert align.fetch(address) == path and len(Files.asked) == 3
    assert [p.name for p in cache.iterdir()] == ["weights.pth"]
    (cache / "w.pth.part").write_bytes(b"weights")                  # it only lacked its name
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert align.fetch(f"{server}/w.pth", sha256).read_bytes() == b"weights"


def test_fetch_says_what_to_do_where_it_fails(server, tmp_path, monkeypatch):
    Files.files = {"/w.pth": b"other"}
    with pytest.raises(OSError, match="w.pth did not send the bytes that were published"):
        align.fetch(f"{server}/w.pth", hashlib.sha256(b"weights").hexdigest())
    assert list((tmp_path / "cache").iterdir()) == []
    for address, says in ((f"{server}/none.pth", "404"),
                          ("http://127.0.0.1:9/none.pth", "refused")):
        with pytest.raises(OSError, match=says) as error:
            align.fetch(address)
        assert f"download {address} and put it there" in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REALS_CACHE", str(tmp_path / "file" / "cache"))  # no folder can be there
    with pytest.raises(OSError, match="w.pth is not in"):
        align.fetch(f"{server}/w.pth")


# --------------------------------------------------------------------------------------------------
# sit.py and dit.py against the official code

TINY = dict(
    input_size=8, patch_size=2, in_channels=4, hidden_size=96, depth=2, num_heads=4, num_classes=10)
FAMILIES = {"SiT": (sit, sit.SiT), "DiT": (dit, dit.DiT)}
both_families = pytest.mark.parametrize("module, network", FAMILIES.values(), ids=FAMILIES)
DIFFUSION_FIGURES = REFERENCE["diffusion"]


def tiny(network, **changes):
    return fill(network(**dict(TINY, **changes)), skip=("pos_embed",))


class Watched:
    """A model, or a function of x, t and y, that remembers the times and the rows of its calls."""

    def __init__(self, function, num_classes=None):
        self.function = function
        self.num_classes = num_classes or function.num_classes
        self.times, self.rows = [], []

    def __call__(self, x, t, y):
        self.times.append(t[0].item())
        self.rows.append(len(x))
        return self.function(x, t, y)


def affine(family, a, b0, b1, table, tanh=None):
    """a x + (b0 + b1 t) table[y], and tanh(x) for a variance where the entry has one."""
    table = array(**table["array"])

    def function(x, t, y):
        shift = (b0 + b1 * t)[:, None] * table.to(x.dtype)[y]       # (N, C)
        out = a * x + shift[:, :, None, None]                       # (N, C, H, W)
        return out if tanh is None else torch.cat([out, tanh * x.tanh()], dim=1)
    return Watched(function, num_classes=10)


def watch(module):
    """Two lists, to which every call of a module adds its first input and its output."""
    inputs, outputs = [], []

    def hook(module, given, out):
        inputs.append(given[0])
        outputs.append(out)
    module.register_forward_hook(hook)
    return inputs, outputs


def counts(model):
    return {"total": sum(p.numel() for p in model.parameters()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "state_dict_entries": len(model.state_dict())}


def compared(table, recorded, tolerance):
    """The whole of a table is compared here; of its entries `at`, ours are returned."""
    table = torch.from_numpy(table)
    assert difference(table, recorded) < tolerance
    return dict(recorded, at={i: table[int(i)].item() for i in recorded["at"]})


def form_of(name):
    return name.lower().replace("cc", "c")                          # theirs: "inccreasing"


class Reproduce:
    """A function for each kind of entry: what our code gives for all that the entry has figures of.

    Arguments are the entry's inputs and settings, and what `case_of` makes of them. What a function
    hands back of `recorded` is not compared.
    """

    def state_dict(model, **_):
        names = [[name, list(value.shape)] for name, value in model.state_dict().items()]
        return dict(counts(model), names=names, pos_embed=model.pos_embed)

    def forward(model, x, t, y, recorded, **_):
        seen = {name: watch(model.get_submodule(name)) for name in recorded["intermediates"]}
        out = model(x, t, y)
        intermediates = {name: outputs[0] for name, (_, outputs) in seen.items()}
        return dict(out=out, per_sample=out, intermediates=intermediates, pos_embed=model.pos_embed)

    def label(model, y, force_drop_ids, **_):
        table, drop = model.y_embedder, force_drop_ids == 1
        labels, _ = watch(table.embedding_table)
        out = {"eval": table(y), "force_drop_ids, train=False": table(y, drop)}
        table.train()
        out["train=True, rng"] = table(y)
        out["force_drop_ids, train=True"] = table(y, drop)
        table.dropout_prob = 0.5
        table(torch.zeros(1000, dtype=torch.long))
        assert 400 < (labels[4] == 10).sum() < 600
        return dict(out, table_rows=len(table.embedding_table.weight), labels_rng=labels[2],
                    labels_forced=labels[3])

    def forward_train(model, x, t, y, **_):
        labels, _ = watch(model.y_embedder.embedding_table)
        out = model.train()(x, t, y)
        dropped = labels[0] == 10
        torch.testing.assert_close(model.eval()(x, t, y, dropped), out)
        return {"out": out, "dropped": dropped}

    def forward_cfg(model, x, t, y, cfg_scale, **_):
        first = sit.guided(model, x, t, y, 0.5, cfg_scale, (0.0, 1.0), 3)
        if cfg_scale == 1.0:                                        # the same without the null half
            torch.testing.assert_close(first, model(x, t, y))
        null = model(x, t, torch.full_like(y, 10))
        second = torch.cat([first[:, :3], null[:, 3:]], dim=1)
        out = {"out": torch.cat([first, second])}
        for name, half in (("first", first), ("second", second)):
            out[f"{name}_half_channels_0_2"] = half[:, :3]
            out[f"{name}_half_channels_3_on"] = half[:, 3:]
        return out

    def param_counts(family, recorded, **_):
        (module, _), models = FAMILIES[family], {}
        for name in recorded["models"]:
            with torch.device("meta"):
                model = module.create(name)
            _, tokens, hidden = model.pos_embed.shape
            models[name] = dict(
                counts(model), depth=len(model.blocks), hidden=hidden, tokens=tokens,
                heads=model.blocks[0].attn.num_heads, patch=model.patch_size)
        return {"models": models}

    def timestep(t, hidden_size, frequency_embedding_size, dtype, **_):
        embedder = fill(sit.TimestepEmbedder(hidden_size, frequency_embedding_size)).to(dtype)
        sinusoids, _ = watch(embedder.mlp)
        out = embedder(t)
        return {"sinusoid": sinusoids[0], "sinusoid_per_t": sinusoids[0],
                "embedding": out, "embedding_per_t": out}

    def pos_embed(embed_dim, grid_size, **_):
        return {"pos_embed_float64_table": sit.sincos_pos_embed(embed_dim, grid_size)[0]}

    def init(model, kwargs, recorded, **_):
        out = {}
        for name, p in type(model)(**kwargs).named_parameters():    # drawn: statistics alone
            want = recorded["parameters"][name]
            assert p.std(unbiased=False).item() == pytest.approx(want["std"], rel=0.1), name
            assert p.abs().max().item() == pytest.approx(want["absmax"], rel=0.3), name
            out[name] = dict(want, shape=list(p.shape), all_zero=not p.any(),
                             requires_grad=p.requires_grad)
        return {"parameters": out}

    def path(x, x0, x1, model_output, path_type, recorded, dtype, **_):
        path, out = path_type.lower(), {}
        for name, figures in recorded.items():
            t = torch.tensor(float(name[2:]), dtype=torch.float32)  # as the official time is
            t = t.to(dtype)
            alpha, sigma, d_alpha, d_sigma = sit.interpolant(path, t)
            score = sit.as_score(model_output, x, t.expand(2), path, "velocity")
            velocity = sit.as_velocity(model_output, x, t.expand(2), path, "score")
            scalars = {"alpha": alpha, "d_alpha": d_alpha, "sigma": sigma, "d_sigma": d_sigma,
                       "d_alpha_alpha_ratio": d_alpha / alpha,
                       "compute_drift[1]": sit.drift_variance(path, t)}
            out[name] = {
                "scalars": {key: value.item() for key, value in scalars.items()},
                "compute_drift[0]": -d_alpha / alpha * x, "diffusion": {},
                "score_from_velocity": score, "noise_from_velocity": -sigma * score,
                "velocity_from_score": velocity, "plan_xt": alpha * x1 + sigma * x0,
                "plan_ut": d_alpha * x1 + d_sigma * x0}
            for key in figures["diffusion"]:
                form, norm = key.split("|norm=")
                w = sit.diffusion(form_of(form), path, t, float(norm))
                out[name]["diffusion"][key] = w.item()
        return out

    def training_losses(model, x0, x1, t, y, on_path, loss_weight, grads, **_):
        _, predicted = watch(model)
        loss = sit.training_loss(model, x1, y, **on_path, weight=loss_weight, t=t, eps=x0)
        loss.mean().backward()
        return {"loss": loss, "pred": predicted[0], "grad of loss.mean()": {
            name: model.get_parameter(name).grad for name in grads}}

    def check_interval(on_path, recorded, train_eps=None, sample_eps=None, **_):
        interval = functools.partial(sit.time_interval, **on_path)
        # The official code fails where train_eps alone is given.
        if "raises" in recorded:
            assert interval(eps=1e-4, training=True) == (0.0, 1 - 1e-4)
            assert interval() == (0.0, 0.999)
            return recorded
        # It ignores eps for velocity on linear and gvp, and sample_eps where there is no train_eps.
        if train_eps is None or (on_path["prediction"] == "velocity" and on_path["path"] != "vp"):
            assert interval(eps=0.03)[1] == 0.97
            train_eps = sample_eps = None
        t0, t1 = interval(eps=sample_eps)
        back = interval(eps=sample_eps, reverse=True)
        # In reverse it begins at t = 1 on vp, where noise / sigma is infinite.
        if on_path == dict(path="vp", prediction="noise"):
            assert back[0] == t1
            back = (1.0, back[1])
        out = {"train": interval(eps=train_eps, training=True), "ode_sample": (t0, t1),
               "ode_sample_reverse": back}
        for form in ("SBDM", "sigma"):
            out[f"sde|{form}|last_step_size=0.0"] = (t0, t1)
            out[f"sde|{form}|last_step_size=0.04"] = (t0, 0.96)
        return dict(out, train_eps=recorded["train_eps"], sample_eps=recorded["sample_eps"])

    def transport_sample(x1, on_path, **_):
        model = mock.Mock(side_effect=lambda x_t, t, y, drop: x_t)
        sit.training_loss(model, x1, None, **on_path)
        x_t, t = model.call_args.args[:2]
        alpha, sigma, _, _ = sit.interpolant(on_path["path"], t.view(-1, 1, 1, 1))
        return {"t": t, "x0": (x_t - alpha * x1) / sigma, "x1_is_input": True}

    def sample_ode(model, x, y, options, recorded, sampling_method="dopri5", num_steps=50, **_):
        model = Watched(model)
        states = [x, *sit.trajectory(model, x, y, sampling_method, num_steps - 1, **options)]
        # The official code documents "heun", which it does not know.
        if "raises" in recorded:
            assert sampling_method == "heun" and states[-1].isfinite().all()
            return recorded
        if sampling_method == "dopri5":
            assert 0 <= min(model.times) and max(model.times) <= 1
            return dict(recorded, final=states[-1])
        return {"final": states[-1], "middle": states[len(states) // 2], "nfe": len(model.times),
                "returned_states": len(states), "model_times": model.times}

    def sample_sde(model, x, y, options, recorded, normal, sampling_method="Euler",
                   diffusion_form="SBDM", last_step="Mean", num_steps=250, **_):
        model = Watched(model)
        states = list(sit.trajectory(
            model, x, y, f"sde-{sampling_method.lower()}", num_steps, **options,
            diffusion_form=form_of(diffusion_form), last_step=last_step and last_step.lower(),
            noise=lambda i: normal(x)))
        # The official SDE cannot sample with "constant"; it spells "increasing-decreasing"
        # differently in two places; it gives NaN in the first step with sbdm, in Heun's at t = 1.
        if "raises" in recorded or recorded["final"].get("nonfinite"):
            assert all(state.isfinite().all() and state.std() < 10 for state in states)
            return recorded
        # Our one call gives velocity and score.
        assert len(model.times) <= (recorded["model_calls"] + 1) // 2
        if last_step is None:
            states.append(states[-1])
        return dict(recorded, final=states[-1], before_last_step=states[-2],
                    after_first_step=states[0], returned_states=len(states),
                    last_model_time=model.times[-1])

    def likelihood(model, x, y, on_path, recorded, sampling_method, num_steps, dtype, probe=None,
                   sample_eps=None, **_):
        def signs(i):
            if probe is not None:
                return torch.where(probe >= 0, 1.0, -1.0).to(dtype)
            # The official likelihood draws its probe anew at each evaluation.
            return torch.randint(2, x.shape, dtype=torch.float64).to(dtype) * 2 - 1
        model = Watched(model)
        logp, z = sit.log_likelihood(model, x, y, sampling_method, num_steps - 1, **on_path,
                                     probe=signs, sample_eps=sample_eps)
        assert len(model.times) <= recorded["model_calls"] / 2
        assert 0 <= min(model.times) and max(model.times) <= 1
        rel = 3e-3 if sampling_method == "dopri5" else 1e-6         # of itself, not of its spread
        assert logp.tolist() == pytest.approx(recorded["logp"]["values"], rel=rel)
        prior = -0.5 * (z ** 2 + math.log(2 * math.pi)).flatten(1).sum(1)
        return dict(recorded, z=z, prior_logp_of_z=prior)

    def repa(model, x, y, function, recorded, num_steps, cfg_scale, guidance_low, guidance_high,
             dtype, heun=False, path_type=None, **_):
        # REPA's time runs from noise to data, and so does its velocity. Like the scripts of SiT and
        # DiT, it numbers "no label" 1000, whatever the classes.
        turned = Watched(lambda x, t, y: -model(x, 1 - t, y), num_classes=1000)
        sampler = {"euler_sampler": "heun" if heun else "euler"}.get(function, "sde-euler")
        path, form = ("gvp", "linear") if path_type == "cosine" else ("linear", "sigma")
        z = sit.sample(turned, x, y, sampler, num_steps, path=path, diffusion_form=form,
                       cfg_scale=cfg_scale, cfg_interval=(guidance_low, guidance_high),
                       noise=lambda i: torch.randn(x.shape, dtype=torch.float64).to(dtype))
        return dict(recorded, final=z, model_calls=len(turned.times),
                    model_times=[1 - t for t in turned.times])

    def repa_score(x, v, path_type, recorded, dtype, **_):
        path, scores = {"linear": "linear", "cosine": "gvp"}[path_type], {}
        for name in recorded:
            t = torch.full((2,), 1 - float(name[2:]), dtype=dtype)
            scores[name] = sit.as_score(-v, x, t, path, "velocity")
        return scores

    def tables(diffusion, recorded, **_):
        tables = {name: compared(getattr(diffusion, name), table, 1e-9)
                  for name, table in recorded["tables"].items()}
        return dict(recorded, tables=tables, num_timesteps=diffusion.num_timesteps,
                    timestep_map=diffusion.timestep_map.tolist())

    def space(cases, recorded, **_):
        out = {}
        for steps, respacing in cases:
            name = f"space_timesteps({steps}, {respacing!r})"
            raises = "raises" in recorded[name]                     # so does ours: see the refusals
            out[name] = recorded[name] if raises else dit.space_timesteps(steps, respacing)
        return out

    def cosine(schedule, recorded, **_):
        return {"betas": compared(dit.betas_of(schedule), recorded["betas"], 1e-6)}

    def q(diffusion, x_start, t, noise, **_):
        x_t = diffusion.q_sample(x_start, t, noise)
        mean, logvar = diffusion.q_posterior(x_start, x_t, t)
        log_variance = diffusion.at("log_one_minus_alphas_cumprod", t).flatten()
        return {"q_sample": x_t, "q_mean": diffusion.q_sample(x_start, t, 0 * noise),
                "q_variance": log_variance.exp(), "q_log_variance": log_variance,
                "posterior_mean (x_t = the q_sample output)": mean,
                "posterior_variance": diffusion.at("posterior_variance", t).flatten(),
                "posterior_log_variance_clipped": logvar.flatten(),
                "predict_xstart_from_eps(x_t, t, noise)": diffusion.predict_x_start(x_t, t, noise)}

    def p(diffusion, model, x, t, y, clip_denoised, sigma_small=None, **_):
        out = model(x, diffusion.original(t), y)
        mean, logvar, x_start = diffusion.p_mean_variance(out, x, t, clip_denoised)
        logvar = logvar.expand_as(mean)
        variance = logvar.exp()
        if sigma_small:                                             # 0 at step 0
            variance = diffusion.at("posterior_variance", t).expand_as(mean)
        return {"mean": mean, "pred_xstart": x_start, "log_variance (whole batch)": logvar,
                "log_variance_mean_per_sample": logvar.flatten(1).mean(1),
                "variance_mean_per_sample": variance.flatten(1).mean(1)}

    def dit_losses(diffusion, model, x_start, noise, t, y, grads, use_kl=False,
                   rescale_learned_sigmas=False, **_):
        kind = "kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse"
        _, predicted = watch(model)
        loss = dit.training_loss(model, x_start, y, diffusion, kind, t=t, eps=noise)
        loss[t > 0].mean().backward()
        target = noise if diffusion.prediction == "noise" else x_start
        mse = (predicted[0][:, :4] - target).square().flatten(1).mean(1)
        return {"loss": loss, "mse": mse, "vb": loss - mse, "grad of loss[t>0].mean()": {
            name: model.get_parameter(name).grad for name in grads}}

    def p_loop(kind, model, y, options, normal, dtype, noise=None, x=None, shape=None, **_):
        model = Watched(model)
        z = torch.randn(shape).to(dtype) if shape else x if noise is None else noise
        states = list(dit.trajectory(
            model, z, y, "ddpm" if kind == "p_loop" else "ddim", **options,
            reverse=kind == "ddim_reverse", noise=lambda i: normal(z)))
        return {"final": states[-1], "final_pred_xstart": states[-1], "after_first_step": states[0],
                "model_calls": len(model.times), "model_times": [float(t) for t in model.times]}

    ddim_loop = ddim_reverse = p_loop

    def bpd(diffusion, model, x_start, y, clip_denoised, normal, **_):
        return dit.bits_per_dim(model, x_start, y, diffusion, clip_denoised,
                                noise=lambda i: normal(x_start))


def case_of(entry, dtype):
    """An entry's settings and inputs by name, its model, and what several kinds make of them."""
    config = entry["config"]
    case = dict(config, kind=entry["kind"], dtype=dtype)
    case["recorded"] = entry.get("float64") or entry["float32"]
    for settings in config.values():
        case.update(settings if isinstance(settings, dict) else {})
    case.update(case.get("set_after", {}))
    # The official samplers double a guided batch by hand; ours are given its first half.
    copies = 2 if "cfg_scale" in config else 1
    for name, value in entry.get("inputs", {}).items():
        if "array" in value:
            x = torch.cat([array(**value["array"])] * value.get("cat", 1))
        else:
            x = torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
        case[name] = x[:len(x) // copies].to(dtype if x.is_floating_point() else x.dtype)

    def normal(x):
        """Noise like x, as the official code draws it: float32, for its whole batch."""
        return torch.randn(copies * len(x), *x.shape[1:])[:len(x)].to(dtype)
    case["normal"] = normal
    names = ("sample_eps", "reverse", "diffusion_norm", "last_step_size", "clip_denoised", "eta")
    options = {name: case[name] for name in names if name in case}
    options.update(cfg_scale=config.get("cfg_scale", 1.0), cfg_channels=3)
    if "prediction" in case:
        on_path = dict(path=case["path_type"].lower(), prediction=case["prediction"])
        case.update(on_path=on_path, options={**on_path, **options})
    if "timestep_respacing" in case:
        chain = dict(num_steps=case["timestep_respacing"] or 1000,
                     prediction="x_start" if case.get("predict_xstart") else "noise",
                     fixed_variance="small" if case.get("sigma_small") else "large")
        case.update(diffusion=dit.GaussianDiffusion(**chain), options={**chain, **options})
    if "model" in config and case["family"] == "affine":
        case["model"] = affine(**config["model"])
    elif "model" in config:
        _, network = FAMILIES[case["family"]]
        case["model"] = tiny(network, **case["kwargs"]).to(dtype)
    torch.manual_seed(entry.get("seed", 0))
    return case


def agrees(got, want, tolerance, where):
    """Assert that we got what is recorded: a tensor's summary, a number, a list or dict of them."""
    if got is want:
        return
    if isinstance(want, list) and want and not isinstance(want[0], (int, float)):
        assert len(got) == len(want), where
        got, want = dict(enumerate(got)), dict(enumerate(want))
    if isinstance(want, dict) and "mean" in want and not isinstance(got, dict):
        gap = difference(torch.as_tensor(got), want)
        assert gap < tolerance, f"{where}: {gap:.2e}"
    elif isinstance(want, dict):
        missing = want.keys() - got.keys()
        assert not missing, f"{where}: nothing to compare with {missing}"
        for name in want:
            agrees(got[name], want[name], tolerance, f"{where} {name}")
    elif isinstance(want, (list, float)):
        got = got.tolist() if isinstance(got, torch.Tensor) else got
        assert got == pytest.approx(want, rel=tolerance, abs=1e-12), where
    else:
        assert got == want, where


# What the float32 of DiT's time embedding is worth. The official code takes frequency f = exp(-a)
# and angle t f in float32, where u = 2^-24 is one rounding: a is off by a u, f by f u more, so an
# angle by t u f (1 + a) = t u f (1 - ln f) <= t u. A sinusoid moves as far as its angle, and t goes
# to 999; the deviation of a sinusoid is sqrt(1 / 2). Behind the embedding the linear layers mix 256
# sinusoids, which makes it less, not more. SiT's t <= 1 is below 1e-6.
EMBEDDING = 999 * 2 ** -24 / 0.5 ** 0.5                             # 8.4e-5
# The same of noise that torch.randn draws in float32: sqrt(-2 ln u) cos(2 pi v), four roundings of
# up to 5 deviations.
DRAWN = 5 * 4 * 2 ** -24                                            # 1.2e-6


@pytest.mark.parametrize("name", DIFFUSION_FIGURES)
def test_sit_and_dit_equal_official_figures(name):
    entry = DIFFUSION_FIGURES[name]
    kind = entry["kind"]
    for dtype in [torch.float64] * ("float64" in entry) + [torch.float32] * (kind != "repa_score"):
        case = case_of(entry, dtype)
        tolerance = max(1e-5, 10 * entry.get("gap", 0))
        if dtype == torch.float64:
            loop = kind in ("p_loop", "ddim_loop", "ddim_reverse")
            tolerance = 1e-5 if loop else 1e-6                      # theirs rounds to float32
            tolerance += DRAWN if kind in ("sample_sde", "bpd") else 0
        if case.get("family") == "DiT" and ("t" in case or kind in ("p_loop", "ddim_loop", "bpd")):
            tolerance = max(tolerance, EMBEDDING)
        if "dopri5" in name:
            tolerance = 3e-3                                        # exact to within atol + rtol
        got = getattr(Reproduce, kind)(**case)
        agrees(got, case["recorded"], tolerance, f"{name} {dtype}")


def test_shared_sections_are_the_same_text():
    def section(path, title):
        begin, end = f"# === {title}: begin ===\n", f"# === {title}: end ===\n"
        text = (HERE / path).read_text()
        assert text.count(begin) == text.count(end) == 1, f"{path}: want one of each of its markers"
        return text.split(begin)[1].split(end)[0]

    for title in (
            "shared by sit.py and dit.py", "checks shared by sit.py and dit.py",
            "shared by align.py, sit.py and dit.py", "shared by vae.py, align.py and fid.py",
            "shared by vae.py and fid.py"):
        texts = {section(path, title) for path in re.findall(r"\w+\.py", title)}
        assert len(texts) == 1, f"the sections {title} differ: diff these files"


def test_time_embedding_is_rounded_once():
    """To float32; a library's cos and sin may be one unit in the last place off."""
    embedder = sit.TimestepEmbedder(8)
    sinusoids, _ = watch(embedder.mlp)
    for t in (0, 1, 250.5, 999):
        embedder(torch.tensor([t]))
        freqs = [np.float32(math.exp(-math.log(10000) * j / 128)) for j in range(128)]
        angles = [float(np.float32(t) * f) for f in freqs]
        want = np.float32([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        np.testing.assert_array_max_ulp(sinusoids.pop()[0].numpy(), want, maxulp=1)


def test_readable_attention_equals_the_fused_kernel():
    model = fill(sit.Attention(96, 4)).double()
    x = array((3, 50, 96), 1).double().requires_grad_()
    out = model(x)
    grad, = torch.autograd.grad(out.square().sum(), x)
    model.fused = False
    unused = AssertionError("the fused kernel ran")
    with mock.patch.object(sit.F, "scaled_dot_product_attention", side_effect=unused):
        readable = model(x)
    torch.testing.assert_close(readable, out)
    torch.testing.assert_close(torch.autograd.grad(readable.square().sum(), x)[0], grad)


@both_families
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(module, network):
    model = tiny(network, depth=6).double()
    x, eps = array((4, 4, 8, 8), 1).double(), array((4, 4, 8, 8), 2).double()
    t, y = torch.tensor([1, 0, 1, 1]), torch.arange(4)

    def gradients():
        kept = []

        def pack(tensor):
            kept.append(tensor.numel())
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module.training_loss(model, x, y, t=t, eps=eps).mean()
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(loss, trained), sum(kept)

    plain, kept_plain = gradients()
    model.enable_gradient_checkpointing()
    checkpointed, kept = gradients()
    torch.testing.assert_close(checkpointed, plain)
    assert kept < 0.4 * kept_plain


@both_families
def test_models_of_other_sizes_sample_and_unknown_names_are_refused(module, network):
    name = network.__name__
    for size, channels, classes in ((32, 4, 1000), (12, 7, 3), (16, 1, 1)):
        model = fill(module.create(
            f"{name}-Ti/4", input_size=size, in_channels=channels, num_classes=classes))
        eps, y = array((2, channels, size, size), 1), torch.zeros(2, dtype=torch.long)
        z = module.sample(model, eps, y, num_steps=2, cfg_scale=2.0)
        assert z.shape == eps.shape and z.isfinite().all() and (z - eps).std() > 0.1
    for wrong in ("SiX-B/2", f"{name}-Q/2", f"{name}-B", f"{name}-B/x", f"{name}-B/0", "nonsense"):
        with pytest.raises(ValueError, match="SIZE one of Ti, S, B, L, XL"):
            module.create(wrong)


def two_or_one(dtype=None):
    """A velocity or noise field of its own type: 2 for a class, 1 for "no label"."""
    def field(x, t, y):
        value = torch.where(y == 3, 1.0, 2.0).view(-1, 1, 1, 1)     # (N, 1, 1, 1)
        return value.expand(x.shape).to(dtype or x.dtype)
    return Watched(field, num_classes=3)


def test_the_outputs_of_a_bf16_model_are_guided_in_float32():
    x, t, y = torch.zeros(5, 4, 2, 2), torch.zeros(5), torch.zeros(5, dtype=torch.long)
    out = sit.guided(two_or_one(torch.bfloat16), x, t, y, 0.5, 1.1, (0.0, 1.0), None)
    assert out.dtype == torch.float32 and out[0, 0, 0, 0].item() == pytest.approx(2.1, abs=1e-6)


@pytest.mark.parametrize("module, sampler", [
    *((sit, sampler) for sampler in sit.ODE_SAMPLERS + sit.SDE_SAMPLERS),
    (dit, "ddpm"), (dit, "ddim")])
def test_guided_rows_are_computed_only_in_the_interval(module, sampler):
    """A step is guided if it begins in the interval, which dopri5's steps do not leave."""
    eps, y = torch.randn(5, 4, 2, 2), torch.zeros(5, dtype=torch.long)
    calls_of_a_step = {"midpoint": 2, "heun": 2, "heun2": 2, "heun3": 3, "rk4": 4, "sde-heun": 2}
    calls = calls_of_a_step.get(sampler, 1)
    for scale, low, high in ((1.0, 0.0, 1.0), (3.0, 0.0, 0.75), (3.0, 0.25, 0.75), (3.0, 0.0, 1.0)):
        model = two_or_one()
        module.sample(model, eps, y, sampler, 8, cfg_scale=scale, cfg_interval=(low, high))
        assert scale == 1.0 or (low, high) == (0.0, 1.0) or set(model.rows) == {5, 10}
        for i, rows in enumerate(model.rows):
            begin = model.times[i - i % calls]
            level = 1 - begin if module is sit else begin / 999
            if sampler == "dopri5" and min(abs(level - low), abs(level - high)) < 1e-6:
                continue                                            # both sides' steps end here
            within = scale > 1 and low - 1e-6 <= level <= high + 1e-6
            assert rows == (10 if within else 5), (sampler, level)


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("reverse", [False, True])
def test_dopri5_equals_torchdiffeq_with_no_more_evaluations(rtol, reverse):
    xs, ys = array((2, 4, 8, 8), 1).double(), torch.tensor([1, 10])
    options = dict(sampler="dopri5", atol=1e-3 * rtol, rtol=rtol, reverse=reverse)
    times = torch.tensor([1.0, 0.0] if reverse else [0.0, 1.0], dtype=torch.float64)
    bent = affine("affine", -8.0, 3.0, 5.0, dict(array=dict(shape=(11, 4), seed=1)))
    for model in (tiny(sit.SiT).double(), bent):
        together, calls = Watched(model), []
        zs = sit.sample(together, xs, ys, **options)
        for x, y, z in zip(xs.split(1), ys.split(1), zs.split(1)):
            alone, reference = Watched(model), Watched(model)

            @torch.no_grad()
            def torchdiffeq_solves(atol, rtol):
                def field(t, z):
                    t = t.clamp(0, 1).to(z.dtype)                   # it steps beyond the end
                    return reference(z, t.expand(1), y)
                reference.times.clear()
                return torchdiffeq.odeint(field, x, times, rtol=rtol, atol=atol, method="dopri5")[1]
            exact = torchdiffeq_solves(1e-12, 1e-10)
            expected = torchdiffeq_solves(1e-3 * rtol, rtol)
            most = max(3 * (expected - exact).abs().max(), rtol * exact.abs().max())
            assert (z - exact).abs().max() < most
            torch.testing.assert_close(sit.sample(alone, x, y, **options), z, rtol=0, atol=rtol)
            assert len(alone.times) <= len(reference.times)
            assert 0 <= min(alone.times) and max(alone.times) <= 1
            calls.append(len(alone.times))
        assert len(together.times) == max(calls)


def test_dopri5_stops_where_the_model_is_not_finite():
    broken = Watched(
        lambda x, t, y: torch.where(t.view(-1, 1, 1, 1) > 0.5, math.nan, 1.0) * x, num_classes=3)
    with pytest.raises(RuntimeError, match="dopri5 finds no step"):
        sit.sample(broken, torch.randn(2, 4, 2, 2), torch.zeros(2, dtype=torch.long), "dopri5")


def velocity_of_normal(path, mean=1.5, std=0.4):
    """The exact velocity of latents that are N(mean, std^2) in every channel, on a path."""
    def velocity(x, t, y):
        t = t.view(-1, 1, 1, 1).double()
        alpha, sigma, d_alpha, d_sigma = sit.interpolant(path, t)
        variance = (alpha * std) ** 2 + sigma ** 2
        slope = (alpha * d_alpha * std ** 2 + sigma * d_sigma.clamp(min=-1e6)) / variance
        return (d_alpha * mean + slope * (x - alpha * mean)).to(x.dtype)
    return Watched(velocity, num_classes=1)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_every_sde_ends_at_the_distribution_of_the_data(path):
    """500 steps give 12,800 numbers the data's mean 1.5 and deviation 0.4, with any diffusion."""
    torch.manual_seed(0)
    eps = torch.randn(200, 4, 4, 4, dtype=torch.float64)
    model, y = velocity_of_normal(path), torch.zeros(200, dtype=torch.long)
    runs = [("sde-heun", dict(last_step=None))]
    for form in sit.DIFFUSION_FORMS:
        for sampler in sit.SDE_SAMPLERS:
            runs.append((sampler, dict(diffusion_form=form, last_step="euler")))
    for sampler, options in runs:
        z = sit.sample(model, eps, y, sampler, 500, path=path, **options)
        mean, std = z.mean().item(), z.std().item()
        assert abs(mean - 1.5) < 0.03 and abs(std - 0.4) < 0.025, (sampler, options, mean, std)


def test_vp_has_no_hole_at_the_data():
    """Where sigma is 0 its derivative is infinite: beta / 2 is the product's limit there."""
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = sit.interpolant("vp", t)
    generic = d_alpha / alpha * sigma ** 2 - sigma * d_sigma
    torch.testing.assert_close(sit.drift_variance("vp", t)[:2], generic[:2])
    assert sit.drift_variance("vp", t)[2] == pytest.approx(0.05)
    model, x = tiny(sit.SiT).double(), array((2, 4, 8, 8), 1).double()
    options = dict(sampler="rk4", num_steps=3, path="vp", prediction="score")
    y = torch.tensor([1, 2])
    assert sit.sample(model, x, y, reverse=True, **options).isfinite().all()
    assert sit.log_likelihood(model, x, y, **options)[0].isfinite().all()


def test_likelihood_is_that_of_the_distribution_of_the_data():
    """The divergence of this field is diagonal: any probe of random signs gives it exactly."""
    x, y = 1.5 + 0.4 * array((3, 4, 2, 2), 1).double(), torch.zeros(3, dtype=torch.long)
    exact = torch.distributions.Normal(1.5, 0.4).log_prob(x).flatten(1).sum(1)
    for sampler, steps in (("dopri5", None), ("rk4", 50)):
        model = velocity_of_normal("linear")
        logp, z = sit.log_likelihood(model, x, y, sampler, steps, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(logp, exact, rtol=1e-5, atol=0)
        torch.testing.assert_close(z, (x - 1.5) / 0.4, rtol=1e-4, atol=1e-4)


def test_dit_finds_a_single_point_from_its_exact_noise():
    """Data that is one point x has the noise (x_t - a x) / s, with which both samplers end at x."""
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)

    def exact(x_t, t, y):
        alpha = dit.DIFFUSION.at("alphas_cumprod", t)               # (N, 1, 1, 1)
        return (x_t - alpha.sqrt() * x) / (1 - alpha).sqrt()

    eps, y = torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    for sampler, steps in (("ddpm", 50), ("ddim", 10), ("ddim", "ddim20"), ("ddim", 2)):
        z = dit.sample(Watched(exact, num_classes=1), eps, y, sampler, steps)
        torch.testing.assert_close(z, x.expand(3, -1, -1, -1), rtol=0, atol=1e-3)


@both_families
def test_transformers_refuse_what_they_do_not_take(module, network):
    model, without_null = tiny(network), tiny(network, class_dropout_prob=0.0)
    x, t, y = torch.zeros(2, 4, 8, 8), torch.tensor([0, 1]), torch.tensor([0, 9])
    for want, *arguments in [
            ("latents (2, 4, 16", torch.zeros(2, 4, 16, 16), t, y),
            ("latents (2, 3", torch.zeros(2, 3, 8, 8), t, y),
            ("times -1", x, torch.tensor([-1, 0]), y),
            ("times 0 to 1000", x, torch.tensor([0, 1000]), y),
            ("times nan", x, torch.tensor([math.nan, 0.0]), y),
            ("want a time", x, t[:1], y),
            ("labels 0 to 11", x, t, torch.tensor([0, 11])),
            ("labels -1", x, t, torch.tensor([-1, 0]))]:
        with pytest.raises(ValueError, match=re.escape(want)):
            model(*arguments)
    with pytest.raises(ValueError, match="class_dropout_prob"):
        module.sample(without_null, x, y, cfg_scale=2.0)
    with pytest.raises(ValueError, match="train mode"):             # it would drop labels at random
        module.sample(copy.deepcopy(model).train(), x, y)

    watched = Watched(model)
    refused = [("labels", dict(y=torch.tensor([0, 11]))), ("cfg_channels 5", dict(cfg_channels=5)),
               ("cfg_interval", dict(cfg_interval=(0.8, 0.2))),
               ("cfg_interval", dict(cfg_interval=(0.0, 1.5))),
               ("sampler 'x'", dict(sampler="x")), ("num_steps 0", dict(num_steps=0)),
               ("prediction 'x'", dict(prediction="x"))]
    sde = dict(sampler="sde-euler")
    refused += {
        sit: [("path 'x'", dict(path="x")), ("eps 0.7", dict(sample_eps=0.7)),
                ("eps 0:", dict(sample_eps=0, prediction="noise")),
                ("num_steps 1", dict(sde, num_steps=1)), ("reverse", dict(sde, reverse=True)),
                ("diffusion_form 'x'", dict(sde, diffusion_form="x")),
                ("last_step 'x'", dict(sde, last_step="x")),
                ("last_step_size 0", dict(sde, last_step_size=0))],
        dit: [("num_steps 1001", dict(num_steps=1001)), ("num_steps 1 ", dict(num_steps=1)),
                ("ddim300", dict(num_steps="ddim300")), ("schedule 'x'", dict(schedule="x")),
                ("fixed_variance 'x'", dict(fixed_variance="x")), ("reverse", dict(reverse=True))],
    }[module]
    for want, options in refused:
        with pytest.raises(ValueError, match=re.escape(want)):
            module.sample(watched, x, **{"y": y, **options})
    assert not watched.times                                        # all before any work


# --------------------------------------------------------------------------------------------------
# fid.py

FID_FIGURES = REFERENCE["fid"]
RESIZE_NAMES = {"tf1": "tf1", "pytorch_fid": "pytorch-fid", "cleanfid": "clean-fid"}


def official(prefix):
    """A test for every entry of the official figures of that name."""
    names = [name for name in FID_FIGURES if name.startswith(prefix)]
    return pytest.mark.parametrize("entry", [FID_FIGURES[name] for name in names], ids=names)


def features_of(entry, name):
    given = entry["inputs"][name]["features"]
    x = array((given["n"], given["d"]), given["seed"])
    if "mix" in given:
        x = x @ (array((given["d"], given["d"]), given["mix"]) / np.float32(np.sqrt(given["d"])))
    x = x * np.float32(given.get("scale", 1)) + np.float32(given.get("shift", 0))
    return x.clamp(min=0) if given.get("relu") else x


@official("fid_")
def test_frechet_distance_equals_official_figures(entry):
    """Rank-deficient and identical sets among them, where the official root is not exact and that
    of the singular values of the centred data is."""
    a, b = (fid.feature_statistics(features_of(entry, side)) for side in "ab")
    mu, sigma = map(torch.from_numpy, a)
    agrees({"mu_a": mu, "sigma_a": sigma}, entry["float64"], 1e-6, "statistics")
    distance = fid.frechet_distance(*a, *b)
    exact = entry["scalars"]["fid_nuclear_norm_of_centred_data"]
    assert distance == pytest.approx(exact, rel=1e-6, abs=1e-6) and distance >= 0
    assert fid.frechet_distance(*b, *a) == pytest.approx(distance, rel=1e-9, abs=1e-6)


def test_frechet_distance_of_known_gaussians():
    mu, sigma = np.zeros(3), np.eye(3)
    for mu2, sigma1, sigma2, expected in (
            (mu + 2, sigma, sigma, 12),                  # equal covariances: |mu1 - mu2|^2
            (mu, sigma, 9 * sigma, 12),                  # (3 - 1)^2 in each of three directions
            (mu + 1, 0 * sigma, 0 * sigma, 3)):
        assert fid.frechet_distance(mu, sigma1, mu2, sigma2) == pytest.approx(expected)


@official("is_")
def test_inception_score_equals_official_figures(entry):
    given, scalars = entry["inputs"], entry["scalars"]
    scale = float(given["W"]["then"].split("(")[1].strip(")"))          # "x * float32(0.3)"
    weight = array(**given["W"]["array"]) * np.float32(scale)
    for size in entry["config"]["split_sizes"]:
        score = fid.inception_score(features_of(entry, "features") @ weight, size)
        assert score == pytest.approx(scalars[f"float64_split_size_{size}"], rel=1e-6)
        assert score == pytest.approx(scalars[f"adm_split_size_{size}"], rel=1e-5)


@official("pr_")
def test_precision_recall_equals_official_figures(entry):
    """ADM takes its distances in float16 where they are finite there: a sample more or less. Ours
    are of the features' own type."""
    scalars = entry["scalars"]
    reference, samples = features_of(entry, "ref"), features_of(entry, "sample")
    for dtype in (torch.float32, torch.float64):
        found = fid.precision_recall(reference.to(dtype), samples.to(dtype), rows=70)
        assert found == (scalars["numpy_float64_precision"], scalars["numpy_float64_recall"])
        theirs = scalars["adm_precision"], scalars["adm_recall"]
        assert found == pytest.approx(theirs, abs=1.01 / len(samples))


@official("kid_")
def test_kid_equals_official_figures(entry):
    config, scalars = entry["config"], entry["scalars"]
    found = fid.kid(features_of(entry, "features_1"), features_of(entry, "features_2"),
                    config["kid_subsets"], config["kid_subset_size"], config["rng_seed"])
    expected = scalars["mean_float64"], scalars["std_float64"]
    assert found == pytest.approx(expected, rel=1e-6)


ONE_NAN = np.eye(9, 3)
ONE_NAN[0, 1] = math.nan


@pytest.mark.parametrize("measure, given, said", [
    (fid.frechet_distance, (np.zeros(3), np.eye(3), np.zeros(2), np.eye(2)), "do not go together"),
    (fid.feature_statistics, (np.zeros((1, 3)),), "1 images: mean and covariance need at least 2"),
    (fid.feature_statistics, (ONE_NAN,), "not finite"),
    (fid.frechet_distance, (np.zeros(3), np.eye(3), ONE_NAN[0], np.eye(3)), "not finite"),
    (fid.inception_score, (ONE_NAN,), "not finite"),
    (fid.inception_score, (np.zeros((0, 3)),), "0 images: the Inception Score needs at least 1"),
    (fid.precision_recall, (np.zeros((3, 2)), np.zeros((9, 2))), "more than 3"),
    (fid.precision_recall, (ONE_NAN, np.eye(9, 3)), "not finite"),
    (fid.precision_recall, (np.eye(9, 3), ONE_NAN), "not finite"),
    (fid.kid, (np.zeros((9, 2)), np.zeros((8, 2)), 1, 9), "at least its subset of 9"),
    (fid.kid, (ONE_NAN, np.eye(9, 3), 1, 9), "not finite"),
    (fid.kid, (np.eye(9, 3), ONE_NAN, 1, 9), "not finite")])
def test_measures_refuse_what_they_cannot_compare(measure, given, said):
    with pytest.raises(ValueError, match=said):
        measure(*given)


def filled_inception(gain=1.4):
    """Inception with filled weights. Without a gain its features hardly depend on the image."""
    model = fill(fid.InceptionV3())
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.ndim == 4:
                value.mul_(gain)
    return model


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(filled_inception().state_dict(), path)
    return path


def inception_outputs(model, x):
    seen = {}
    hooks = [child.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
             for name, child in model.named_children()]
    with torch.no_grad():
        pool3, spatial, logits = model(x)
    for hook in hooks:
        hook.remove()
    return dict(
        seen, network_input=x, pool3=pool3, pool3_item0_minus_item1=pool3[0] - pool3[1],
        block0=F.max_pool2d(seen["Conv2d_2b_3x3"], 3, 2), block2=seen["Mixed_6e"],
        block1=F.max_pool2d(seen["Conv2d_4a_3x3"], 3, 2), spatial_flat_as_ADM_nhwc=spatial,
        spatial_nchw_17x17=spatial.view(2, 17, 17, 7).permute(0, 3, 1, 2),
        logits_unbiased=logits, logits=model.fc(pool3))


@official("inception_")
def test_inception_equals_official_figures(entry, tmp_path):
    """As it is, and loaded and folded. pool3_item0_minus_item1, the image's share of the features,
    shows an error of the resize; its float32 error is 1e-4 of it, and 8e-3 without a gain."""
    gain, resize = entry["config"]["gain"], entry["config"].get("resize")
    model = filled_inception(gain)
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    loaded = fid.InceptionV3.from_published(tmp_path / "inception.pth")
    float32 = {1: 2e-2, 1.4: 5e-4}[gain]
    for network, kind, tolerance, of_item0_minus_item1 in (
            (model, "float32", 1e-4, float32), (loaded, "float32", 1e-4, float32),
            (copy.deepcopy(model).double(), "float64", 1e-6, 1e-6)):
        x = array(**entry["array"]).to(getattr(torch, kind))
        if resize:
            x = fid.RESIZES[RESIZE_NAMES[resize]](x.floor()).to(x.dtype)
        out = inception_outputs(network, x) if kind in entry else {}
        for key, recorded in entry.get(kind, {}).items():
            limit = of_item0_minus_item1 if key.endswith("item0_minus_item1") else tolerance
            assert difference(out[key], recorded) < limit, (key, kind)


def test_inception_has_the_published_names():
    ours = {name: "x".join(map(str, value.shape))
            for name, value in fid.InceptionV3().state_dict().items()}
    assert ours == FID_FIGURES["names"]


@official("resize_")
def test_resizes_equal_official_figures(entry):
    x = array(**entry["array"]).floor().to(torch.uint8)
    for key, recorded in entry["float32"].items():
        assert difference(fid.RESIZES[RESIZE_NAMES[key]](x), recorded) < 1e-5, key


@pytest.fixture(scope="session")
def image_sets(tmp_path_factory, inception_weights):
    """The same 21 samples in every form, 13 reference images, and their statistics as ADM has."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    samples, reference = (rng.integers(0, 256, (n, 4, 4, 3), np.uint8).repeat(6, 1).repeat(6, 2)
                          for n in (21, 13))
    np.savez(root / "samples.npz", samples, np.zeros(21, dtype=np.int64))
    np.savez_compressed(root / "compressed.npz", arr_0=samples)
    np.save(root / "samples.npy", samples)
    np.save(root / "floats.npy", samples.astype(np.float32) / 255)
    np.savez(root / "reference.npz", reference)
    (root / "folder" / "below").mkdir(parents=True)
    with zipfile.ZipFile(root / "samples.zip", "w") as archive:
        for i, image in enumerate(samples):
            path = root / "folder" / ("below" if i > 9 else "") / f"{i:03d}.png"
            Image.fromarray(image).save(path)
            archive.write(path, f"some/{i:03d}.png")
    command("fid.py", root / "reference.npz", "--save-stats", root / "stats.npz",
            "--weights", inception_weights)
    with np.load(root / "stats.npz") as stats:
        np.savez(root / "adm.npz", arr_0=reference, **stats)
        np.savez(root / "pytorch-fid.npz", mu=stats["mu"], sigma=stats["sigma"])
    return root


def evaluated(*words, processes=1, **env):
    """The figures that the program writes, and what it prints."""
    folder = Path(words[0]).parent
    path = folder / f"figures-{len(list(folder.iterdir()))}.json"
    done = command("fid.py", *words, "--json", path, processes=processes, **env)
    return json.loads(path.read_text()), done.stdout


@pytest.fixture(scope="session")
def whole_figures(image_sets, inception_weights):
    return evaluated(image_sets / "samples.npz", image_sets / "reference.npz",
                     "--weights", inception_weights, "--metrics", *fid.METRICS)


def test_the_program_computes_what_its_functions_do(image_sets, inception_weights, whole_figures):
    model, outputs = fid.InceptionV3.from_published(inception_weights), []
    for name in ("samples.npz", "reference.npz"):
        with np.load(image_sets / name) as file, torch.no_grad():
            images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
            outputs.append(model(fid.resize_tf1(images)))
    ours, theirs = outputs
    figures, table = whole_figures
    for metric, a, b in (("fid", ours.pool3, theirs.pool3), ("sfid", ours.spatial, theirs.spatial)):
        a, b = a.double().numpy(), b.double().numpy()
        expected = fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
        assert figures[metric] == pytest.approx(expected, rel=1e-5) and figures[metric] > 1
    assert figures["is"] == pytest.approx(fid.inception_score(ours.logits), rel=1e-5)
    expected = fid.precision_recall(theirs.pool3, ours.pool3)
    assert (figures["precision"], figures["recall"]) == expected
    expected = fid.kid(theirs.pool3, ours.pool3, subset_size=13)
    assert (figures["kid"], figures["kid_std"]) == pytest.approx(expected, rel=1e-4)
    assert figures["num_samples"] == 21 and figures["kid_subset_size"] == 13
    for text in ("21 images of 24 x 24", "resize tf1", *fid.METRICS.values(), "13 images",
                 "over subsets of 13 images", "fewer than 2,048"):
        assert text in table


def test_the_image_of_features_that_are_not_finite_is_named(inception_weights):
    class Images:
        path = Path("images.npy")

        def batches(self, first, last, size, workers):
            for start in range(first, last, size):
                batch = np.zeros((min(size, last - start), 8, 8, 3), np.float32)
                batch[5 - start:6 - start] = math.nan if start <= 5 else 0
                yield batch

        def __len__(self):
            return 7

    model = fid.InceptionV3.from_published(inception_weights)
    with pytest.raises(ValueError, match=r"images.npy, image 5 \(the first is 0\): features"):
        fid.evaluate(model, Images(), 0, "tf1", 4, 1)


def test_the_report_says_what_a_figure_hides(tmp_path, capsys):
    """A last split that is smaller; and it is strict JSON, which knows no infinity."""
    cfg = SimpleNamespace(samples="s", reference="r", weights=None, resize="tf1",
                          json=tmp_path / "report.json")
    for count, said in ((4999, False), (5000, False), (5001, True), (10_000, False)):
        np.save(tmp_path / "samples.npy", np.zeros((count, 1, 1, 3), np.uint8))
        images = fid.open_images(tmp_path / "samples.npy")
        fid.report(cfg, images, "not needed", False, {"is": 2.0})
        assert ("the last split has" in capsys.readouterr().out) == said
    assert fid.is_report(cfg.json) and json.loads(cfg.json.read_text())["is"] == 2
    with pytest.raises(ValueError):
        fid.report(cfg, images, "not needed", False, {"fid": math.inf})
    assert json.loads(cfg.json.read_text())["is"] == 2 and len(list(tmp_path.iterdir())) == 2


def test_processes_and_files_of_statistics_give_the_same_figures(image_sets, inception_weights,
                                                                 whole_figures):
    samples, whole = image_sets / "samples.npz", whole_figures[0]
    options = ("--weights", inception_weights, "--batch-size", 8)
    figures, table = evaluated(image_sets / "folder", image_sets / "adm.npz", *options,
                               "--metrics", *fid.METRICS, processes=2)
    assert "its statistics for fid, sfid; 13 images for precision, recall, kid" in table
    for metric in (*fid.METRICS, "kid_std"):
        assert figures[metric] == pytest.approx(whole[metric], rel=1e-5, abs=1e-6), metric
    figures, _ = evaluated(samples, image_sets / "pytorch-fid.npz", *options)
    assert figures["fid"] == pytest.approx(whole["fid"], rel=1e-6)
    assert figures["is"] == pytest.approx(whole["is"])
    assert not {"sfid", "precision"} & figures.keys()
    assert "does not tell how its images were resized" in command(
        "fid.py", samples, image_sets / "pytorch-fid.npz", *options).stdout
    figures, table = evaluated(samples, image_sets / "samples.npy", *options, "--references", 7,
                               "--metrics", "fid", "recall", "--resize", "clean-fid")
    assert figures["fid"] == pytest.approx(0, abs=1e-4)  # with fewer images than dimensions
    assert figures["recall"] == 1.0 and "precision" not in figures
    assert "7 images for recall" in table and "resize clean-fid" in table


def test_all_forms_of_images_are_read_alike(image_sets):
    with np.load(image_sets / "samples.npz") as file:
        expected = file["arr_0"]
    for name in ("samples.npz", "compressed.npz", "samples.npy", "floats.npy", "folder",
                 "samples.zip"):
        images = fid.open_images(image_sets / name)
        assert len(images) == 21 and images.about == "21 images of 24 x 24"
        for first, last, size in ((0, 21, 8), (5, 19, 4)):
            read = np.concatenate(list(images.batches(first, last, size, workers=2)))
            np.testing.assert_array_equal(read, expected[first:last], name)


def test_figures_are_of_the_images_that_training_reads(tmp_path):
    """Upright, grey as RGB, transparent pixels before white, 16 bits as 8; of a folder, with linked
    ones and a loop of them, and of a .zip. Hidden files and a Mac's are nothing, others counted."""
    image = np.zeros((8, 8, 3), dtype=np.uint8)          # red beside blue
    image[:, :4, 0], image[:, 4:, 2] = 255, 255
    red = image[:, :, 0]                                 # white beside black; here the alpha, too
    plain, alpha, exif = Image.fromarray(image), Image.fromarray(red), Image.Exif()
    exif[0x0112] = 6                                     # stored on its side, as cameras do
    files = {"a/grey.pgm": (alpha, np.stack([red] * 3, axis=2)),
             "a/plain.png": (plain, image), "a/upright.PNG": (plain, image),
             "a/rgba.png": (Image.merge("RGBA", (*plain.split(), alpha)),
                            np.where(red[:, :, None] > 0, image, 255)),
             "a/sixteen.png": (Image.fromarray(red.astype(np.uint16) * 257 // 2),
                               np.stack([red // 2] * 3, axis=2)),
             "link/palette.tif": (plain.convert("P"), image), "x.png/plain.png": (plain, image)}
    others = ("a/._a.png", "__MACOSX/a.png", ".thumbs/a.png", "a/notes.txt")
    root = tmp_path / "data"
    for folder in ("a", "x.png", "__MACOSX", ".thumbs", "../outside"):
        (root / folder).mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "a" / "loop").symlink_to(root)
    for name, (picture, _) in files.items():
        picture.save(root / name)
    plain.transpose(Image.ROTATE_90).save(root / "a/upright.PNG", exif=exif)
    for name in others:
        (root / name).write_text("x")
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("x.png")
        for name in (*files, *others):
            archive.write(root / name, name)
    for path in (root, tmp_path / "data.zip"):
        images, data = fid.open_images(path), train.ImageFolder(path, "all", 8)
        assert images.about == "7 images of 8 x 8 (files passed over: 1)"
        assert images.names == [name for name, _ in data.files] == sorted(files)
        batch, = images.batches(0, 7, 8, 2)
        for i, name in enumerate(images.names):
            np.testing.assert_array_equal(batch[i], files[name][1], err_msg=name)
            np.testing.assert_array_equal(data.image(i), files[name][1], err_msg=name)


@pytest.mark.parametrize("declared, said", [
    (3 << 30, "it has 3221225472 bytes"), (70, "its bytes are not those that the .zip lists")])
def test_no_more_of_a_zip_is_unpacked_than_it_declares(tmp_path, declared, said):
    """64 MiB of zeros lie behind an entry that declares more, or less."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", bytes(1 << 26))
    data = bytearray(path.read_bytes())
    size_at = data.rindex(b"PK\1\2") + 24
    data[size_at:size_at + 4] = declared.to_bytes(4, "little")
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"x.png cannot be used .{said}"):
        fid.open_images(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


@pytest.mark.parametrize("width, height", [(2, 200), (200, 2), (3, 101), (1, 1_000_000)])
def test_a_strip_is_cropped_before_it_is_enlarged(tmp_path, width, height):
    """To the crop of the whole enlarged strip, which for the longest has 768 MB."""
    side = np.linspace(0, 40 * math.pi, max(width, height))
    wave = np.uint8(128 + 100 * np.sin(side)).reshape(height if height > width else 1, -1)
    image = Image.fromarray(np.broadcast_to(wave, (height, width))).convert("RGB")
    image.save(tmp_path / "x.png")
    tracemalloc.start()
    cropped = train.ImageFolder(tmp_path, "all", 16).image(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cropped.shape == (16, 16, 3) and peak < 4e6
    if max(width, height) > 1000:
        assert np.ptp(cropped) < 2, "the wave is long there"
        return
    scale = 16 / min(width, height)
    whole = image.resize((round(width * scale), round(height * scale)), Image.BICUBIC)
    left, top = (whole.width - 16) // 2, (whole.height - 16) // 2
    expected = np.asarray(whole.crop((left, top, left + 16, top + 16))).astype(int)
    assert np.ptp(expected) > 40
    np.testing.assert_allclose(cropped, expected, atol=2)


@pytest.mark.parametrize("kind, mode, side, written_as", [
    ("masks", "L", 8, "PCX"), ("depth", "L", 8, "PCX"), ("images", "L", 8, "PCX"),
    ("masks", "1", 20_000, "PNG")])
def test_masks_and_depth_are_of_the_closed_list_of_formats_too(tmp_path, kind, mode, side,
                                                               written_as):
    for folder in ("images", "masks", "depth"):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / "x.png")
    (tmp_path / "classes.txt").write_text("ground")
    data = demo.teacher.DenseFolder(tmp_path, 8)
    read = "depth" if kind == "depth" else "masks"
    assert (data.plane(read, 0) == 0).all()
    Image.new(mode, (side, side)).save(tmp_path / kind / "x.png", written_as)
    with pytest.raises(train.DataError, match=f"{read}/x.png cannot be read"):
        data.plane(read, 0)


def test_a_big_file_is_read_in_pieces(tmp_path):
    """240 MB of images, deflated, pass through 48 MB."""
    with (zipfile.ZipFile(tmp_path / "big.npz", "w", zipfile.ZIP_DEFLATED) as archive,
          archive.open("arr_0.npy", "w", force_zip64=True) as file):
        header = dict(descr="|u1", fortran_order=False, shape=(5000, 128, 128, 3))
        np.lib.format.write_array_header_1_0(file, header)
        for i in range(5000):
            file.write(bytes([i % 256]) * (128 * 128 * 3))
    images = fid.open_images(tmp_path / "big.npz")
    tracemalloc.start()
    seen = [int(batch[0, 0, 0, 0]) for batch in images.batches(1250, 5000, 50, 1)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == [i % 256 for i in range(1250, 5000, 50)] and peak < 48e6


BLACK = np.zeros((9, 8, 8, 3), dtype=np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)


def damaged(make, start, zeros=0, inside=""):
    """What makes a file and puts some zeros into it, or cuts it off."""
    def make_damaged(path):
        make(path)
        content = (path / inside).read_bytes()
        rest = content[start + zeros:] if zeros else b""
        (path / inside).write_bytes(content[:start] + bytes(zeros) + rest)
    return make_damaged


def folder_with(odd, odd_format="PNG"):
    """What makes a folder of three images and an odd one."""
    def make(path):
        path.mkdir()
        for i in range(3):
            Image.fromarray(BLACK[0]).save(path / f"{i}.png")
        Image.fromarray(odd).save(path / "odd.png", odd_format)
    return make


UNUSABLE = {                                             # how it is made, and what is said of it
    "missing.npz": (lambda path: None, "not found"),
    "pickled.npz": (lambda path: np.savez(path, np.array([{"a": 1}, None])), "pickled objects"),
    "one.npz": (lambda path: np.savez(path, BLACK[:1]), "at least 2"),
    "floats.npz": (lambda path: np.savez(path, BLACK + 2.0), "want uint8"),
    "grey.npz": (lambda path: np.savez(path, BLACK[..., 0]), "want images (N, H, W, 3)"),
    "named.npz": (lambda path: np.savez(path, images=BLACK), "arr_0"),
    "cut.npz": (damaged(lambda path: np.savez(path, BLACK), 900), "cut.npz holds no images"),
    "cut.npy": (damaged(lambda path: np.save(path, BLACK), 900), "ends after 4 of 9 images"),
    "damaged.npz": (damaged(lambda path: np.savez_compressed(path, NOISE), 150_000, 40),
                    "is damaged"),
    "mixed": (folder_with(np.zeros((9, 8, 3), np.uint8)), "odd.png is 9 x 8"),
    "corrupt": (damaged(folder_with(BLACK[0]), 40, inside="odd.png"), "odd.png cannot be used"),
    "floats": (folder_with(np.zeros((8, 8), np.float32), "TIFF"), "its pixels are floats"),
    "closed": (folder_with(BLACK[0], "PCX"), "odd.png cannot be used (no image)"),
    "bomb": (folder_with(np.zeros((20_000, 20_000), bool)), "exceeds limit of 178956970 pixels"),
    "empty": (Path.mkdir, "has no images")}


@pytest.mark.parametrize("name", UNUSABLE)
def test_images_that_cannot_be_used_are_named(tmp_path, image_sets, inception_weights, name):
    make, said = UNUSABLE[name]
    make(tmp_path / name)
    line = refused("fid.py", tmp_path / name, image_sets / "pytorch-fid.npz",
                   "--weights", inception_weights, "--json", tmp_path / "out.json")
    assert said in line and line.startswith("fid.py: ") and not (tmp_path / "out.json").exists()


OTHER_JSON = ['{"num": 21, "steps": 250, "cfg_scale": 1.0}', "[1, 2]", "a diary"]


def test_the_evaluator_refuses_what_it_cannot_do(image_sets, inception_weights, server,
                                                 monkeypatch, tmp_path):
    samples, only = image_sets / "samples.npz", image_sets / "pytorch-fid.npz"
    stats = image_sets / "stats.npz"
    weights = ("--weights", inception_weights)
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "nan.npz", mu=np.full(2048, math.nan), sigma=np.eye(2048))
    np.savez(tmp_path / "grey.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=BLACK[..., 0])
    others = [tmp_path / f"{i}.json" for i in range(len(OTHER_JSON))]
    for path, text in zip(others, OTHER_JSON):
        path.write_text(text)
    broken = torch.load(inception_weights, weights_only=True)
    torch.save({**broken, "fc.bias": torch.zeros(5)}, tmp_path / "broken.pth")
    broken["Mixed_5b.branch1x1.bn.bias"] = torch.full((64,), math.nan)
    torch.save(broken, tmp_path / "nan.pth")
    for words, said in (
            ((only, *weights, "--metrics", "sfid"), "statistics for fid, is only"),
            ((only, *weights, "--metrics", "fid", "recall"), "statistics for fid, is only"),
            (weights, "give SAMPLES and REFERENCE"),
            ((only, *weights, "--batch-size", 0), "--batch-size 0"),
            ((tmp_path / "other.npz", *weights), "want those of 2048"),
            ((tmp_path / "nan.npz", *weights), "not finite"),
            ((tmp_path / "grey.npz", *weights), "want images (N, H, W, 3)"),
            ((stats, *weights, "--resize", "clean-fid"), "by tf1, not clean-fid: want --resize"),
            ((only, "--weights", tmp_path / "broken.pth"), "does not fit"),
            ((only, "--weights", tmp_path / "nan.pth"), "image 0 (the first is 0): features"),
            ((image_sets / "adm.npz", *weights, "--resize", "clean-fid"), "by tf1, not clean-fid"),
            (("--save-stats", "x.npz", "--json", "x.json", *weights), "compares nothing"),
            (("--save-stats", tmp_path / "x", *weights), "ends in .npz"),
            ((only, *weights, "--json", tmp_path / "no" / "out.json"), "there is no folder"),
            *(((only, *weights, "--json", path), "is there and no report of fid.py")
              for path in others),
            *((("--save-stats", path, *weights), "is there and no file of fid.py")
              for path in (samples, image_sets / "adm.npz"))):
        assert said in refused("fid.py", samples, *words)
    assert [path.read_text() for path in others] == OTHER_JSON
    command("fid.py", samples, "--save-stats", tmp_path / "s.npz", *weights)
    command("fid.py", samples, "--save-stats", tmp_path / "s.npz", *weights)
    monkeypatch.setattr(fid, "INCEPTION", (f"{server}/inception.pth", None))
    line = refused("fid.py", samples, only)
    assert "inception.pth is not in" in line and "download" in line


# --------------------------------------------------------------------------------------------------
# Tiny runs, which the tests of the programs share

DEMO = "--scenes 900 --steps 6 --num 20"
SMALL = ("--preset small --no-flip --latent-channels 4 --channels 8 16 16 --align-hidden 16 "
         "--batch-size 8")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a finished tiny demo. The first of pytest's processes makes it for all."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = base / "whole"
    with open(base / "whole.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "whole.txt").is_file():
            done = command("demo --out", out, DEMO, fresh=True)
            assert "Traceback" not in done.stderr
            (base / "whole.txt").write_text(done.stdout)
    return out


def stage(whole, name, out, words="", **flags):
    """The words of a tiny stage on the demo's scenes, teacher and plain latents."""
    plain = whole / "plain"
    flags = dict(data=whole / "scenes.zip", teacher=whole / "teacher", vae=plain / "vae",
                 latents=plain / "latents", out=out) | flags
    flags = [word for flag in flags for word in (f"--{flag.replace('_', '-')}", flags[flag])]
    return ["train.py", "--stage", name, SMALL, *flags, words]


def ablation(whole, name, out, settings, words="", **flags):
    """Run a tiny stage with settings that are no flags, as the study does."""
    _, *words = stage(whole, name, out, words, **flags)
    command("demo.study stage", json.dumps(settings, separators=(",", ":")), *words)


def copy_of(whole, folder, *stages):
    """A copy of the demo's plain lane with some of its stages."""
    for name in stages:
        shutil.copytree(whole / "plain" / name, folder / name)
    return folder


def checkpoint_of(folder):
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)


def log_of(folder):
    """The lines of a stage's log, without what tells of the machine."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in demo.pictures.SPEED} for line in lines]


def images_of(path):
    """Images (N, H, W, 3) that sample.py wrote, as integers."""
    return np.load(path)["arr_0"].astype(int)


def kill_at_work(words, out, name, rows):
    """Kill a program that fills arrays row by row, once so many rows are done; one of them gets
    other values, which tell that it is not done again. Returns its number."""
    child, work = start(*words), out.with_name(f".{out.name}.partial")
    while not (work / "options.json").is_file() or np.load(work / "done.npy").sum() < rows:
        assert child.poll() is None, "it ended before it was killed"
    child.kill()
    child.communicate()
    done = np.load(work / "done.npy")
    assert rows <= done.sum() < done.size and not out.exists()
    row, array = np.flatnonzero(done)[0], np.load(work / f"{name}.npy", mmap_mode="r+")
    array.reshape(-1, *array.shape[-3:])[row] = 7
    array.flush()
    return row


@pytest.fixture(scope="session")
def lpips_cache(tmp_path_factory):
    """Where weights of LPIPS are found under their published names."""
    folder, lpips = tmp_path_factory.mktemp("cache"), filled_lpips(2 ** 0.5)
    vgg = {f"features.{name}": value for name, value in lpips.features.state_dict().items()}
    torch.save(vgg, folder / "vgg16-397923af.pth")
    shutil.copy(published_lin(), folder / "vgg.pth")
    return {"REALS_CACHE": str(folder)}


def write_images(root, folders="train/b train/a test/b test/a", count=12):
    """Plain colours that tell class and number, in class folders."""
    for folder in folders.split():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            color = (200, 50, 10 * i) if folder.endswith("a") else (10 * i, 50, 200)
            Image.new("RGB", (40, 36), color).save(root / folder / f"{i:03}.png")
    return root


def zipped(root, path, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, file.relative_to(root))
    return path


# --------------------------------------------------------------------------------------------------
# train.py: settings and stages

def test_defaults_are_the_papers():
    """ImageNet at 256 px, as the official trainings of SiT and DiT; a flag stands above them."""
    for name, network in (("sit", "SiT"), ("dit", "DiT")):
        cfg = train.resolve(name, dict(data="imagenet"))
        assert (cfg.model, cfg.steps, cfg.batch_size) == (f"{network}-XL/2", 400_000, 256)
        assert (cfg.lr, cfg.weight_decay, cfg.clip, cfg.warmup, cfg.decay) == (1e-4, 0, 0, 0, 1)
        assert (cfg.ema, cfg.label_dropout, cfg.image_size) == (0.9999, 0.1, 256)
        assert train.resolve(name, dict(data="imagenet", lr=3e-4)).lr == 3e-4
    cfg = train.resolve("align", dict(data="folder/imagenet.zip"))
    assert cfg.channels == (128, 256, 512, 512) and cfg.out == "runs/imagenet"
    told = command("train.py --help").stdout
    for group in ("run", "data", "training", "autoencoder", "alignment", "diffusion"):
        assert f"\n{group}:\n" in told
    assert "--align-form" not in told, "what only an ablation changes is no flag"


@pytest.mark.parametrize("words, says", [
    ("--stage latents", "--stage vae or align"), ("--stage sit", "--stage vae or align"),
    ("--stage nonsense", "invalid choice"), ("--precision fp16", "invalid choice"),
    ("--steps 0", "want at least 1"), ("--seed -1", "want at least 0"), ("--lr nan", "--lr nan"),
    ("--label-dropout 1.5", "at most 1"), ("--stage vae sit --batch-size 0", "--batch-size 0"),
    ("--accumulate 3", "does not divide by 1"), ("--log-every 7", "multiple of"),
    ("--channels 9", "norm_num_groups"), ("--image-size 30", "not halved 2 times"),
    ("--data=", "want a folder or .zip"), ("--freeze", "--stage align --init FOLDER"),
    ("--init nowhere", "nowhere/config.json"), ("--stage align --teacher x", "one of dinov2_"),
    ("--stage vae sit --model SiT-X/2", "write SiT-SIZE/PATCH"),
    ("--out DATA/run", "lies inside --data"), ("--out FILE/x", "cannot be written"),
    ("--perceptual-weight 1", "vgg16-397923af.pth is not in")])
def test_bad_commands_are_refused(tmp_path, words, says):
    """Before any work, and without weights left behind."""
    data = write_images(tmp_path / "data", ".", 20)
    (tmp_path / "file").touch()
    words = words.replace("DATA", str(data)).replace("FILE", str(tmp_path / "file"))
    assert says in refused("train.py --stage vae", SMALL, "--data", data, "--out", tmp_path / "run",
                           words, REALS_CACHE=str(tmp_path / "cache"), https_proxy=NO_NETWORK)
    assert not [*tmp_path.rglob("*.pt"), *tmp_path.rglob("*.safetensors")]


def test_a_dry_run_checks_everything_and_writes_nothing(whole, tmp_path):
    words = stage(whole, "align", tmp_path / "x", "--dry-run")
    said = command(*words).stdout
    assert "M parameters" in said and '"steps": 1400' in said and "900 images of 10 classes" in said
    assert "teacher's patches" in refused(*words, "--teacher-size 30")
    assert not (tmp_path / "x").exists()


def test_every_option_of_the_alignment(whole, tmp_path):
    """From another autoencoder, to tokens of another grid, before the norm, by an adaptive weight;
    what is no flag is set from Python."""
    plain, out = whole / "plain/vae", tmp_path / "align"
    settings = dict(align_form="cosine", target="prenorm", standardize=False)
    ablation(whole, "align", tmp_path, settings, "--align-adaptive", init=plain, steps=2,
             log_every=1, save_every=1, teacher_size=48, pool=1, lr=1e-9)
    config, settings = (train.read_json(out / f"{name}.json") for name in ("heads", "settings"))
    assert config["grid"] == [12, 12] and config["target"] == "prenorm" and config["pool"] == 1
    assert settings["align_form"] == "cosine" and settings["channels"] == [8, 32, 48]
    for step in (1, 2):
        line = {k: v for line in log_of(out) if line["step"] == step for k, v in line.items()}
        assert {"mse", "kl", "align_factor", "l1_patch", "l1_cls", "held_out_psnr",
                "held_out_cos_patch", "held_out_cos_cls"} <= line.keys()
        expected = 2 - line["cos_patch"] - line["cos_cls"]
        assert line["align"] == pytest.approx(expected, rel=1e-4)
    before, after = (vae.AutoencoderKL.from_pretrained(at).state_dict() for at in (plain, out))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    heads, z = sample.load_heads(out), torch.randn(2, 8, 8, 8)
    assert (heads.patch_std == 1).all() and (heads.cls_mean == 0).all()
    raw, normed = (heads.feature_map(z, normed=normed).flatten(2).mT for normed in (False, True))
    torch.testing.assert_close(normed, align.load_teacher(whole / "teacher").norm(raw))


def test_parts_of_the_align_loss_and_shuffled_targets(whole, tmp_path):
    """The log tells the parts, of which a weight of 0 leaves one out; shuffled targets are those
    of other images."""
    first = {}
    for name, settings in {"both": {}, "patch": {"cls_weight": 0.0}, "cls": {"patch_weight": 0.0},
                           "shuffled": {"shuffle_targets": True}}.items():
        ablation(whole, "align", tmp_path / name, settings, steps=1, log_every=1, save_every=1)
        first[name] = log_of(tmp_path / name / "align")[0]
    both, (w_cos, w_l1) = first["both"], align.FORMS["both"]
    expected = {part: w_cos * (1 - both[f"cos_{part}"]) + w_l1 * both[f"l1_{part}"]
                for part in ("patch", "cls")}
    expected["both"] = expected["patch"] + expected["cls"]
    assert {name: first[name]["align"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert first["shuffled"]["mse"] == both["mse"]
    assert abs(first["shuffled"]["align"] - both["align"]) > 1e-3


def test_an_autoencoder_that_is_frozen_stays_as_it_is(whole, tmp_path):
    """--init FOLDER --freeze: not a bit of it moves, and the MLPs learn to read it."""
    plain = whole / "plain/vae"
    words = stage(whole, "align latents", tmp_path, "--freeze", init=plain, align_hidden=64,
                  steps=40, warmup=0, log_every=10, save_every=40)
    command(*words)                                              # as README has it: its latents too
    assert (tmp_path / "latents/meta.json").is_file()
    for file in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert (tmp_path / "align" / file).read_bytes() == (plain / file).read_bytes()
    *lines, figures = log_of(tmp_path / "align")
    a, b, c, d = (line["align"] for line in lines)
    assert c + d < a + b - 0.1 and "mse" not in lines[0]
    assert figures.keys() == {"step", "held_out_psnr", "held_out_cos_patch", "held_out_cos_cls"}
    moved = copy_of(whole, tmp_path / "moved", "vae") / "vae"
    words[words.index(plain)] = moved
    assert "is done already" in command(*words).stdout
    scratch = stage(whole, "align", tmp_path, align_hidden=64, steps=40, warmup=0)
    assert "holds a run with init" in refused(*scratch), "silently from scratch"


def test_masks_out_of_a_foreign_autoencoder(whole, tmp_path):
    """README's three commands, for one of the shape of SD3's that diffusers wrote in float16. The
    statistics of its latents are those that diffusers' own latents have."""
    theirs = fill(diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16), norm_num_groups=8, latent_channels=16, sample_size=32,
        scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3))
    theirs.half().save_pretrained(tmp_path / "theirs", variant="fp16")
    common = ["--preset small --no-flip --batch-size 8 --steps 2 --align-hidden 16 --data",
              whole / "scenes.zip", "--out", tmp_path / "mine"]
    command("train.py --stage align --freeze --teacher", whole / "teacher", "--init",
            tmp_path / "theirs", *common)
    command("train.py --stage latents sit", *common)
    command("sample.py --num 5 --steps 2 --tasks segmentation depth features --run",
            tmp_path / "mine", "--out", tmp_path / "x.npz")
    found = np.load(tmp_path / "x-tasks.npz")
    assert found["segmentation"].shape == found["depth"].shape == (5, 32, 32)
    assert len(found["features"]) == 5

    data = train.ImageFolder(whole / "scenes.zip", "train", 32, flip=False)
    images = torch.cat([images for images, _ in train.in_order(data, 64, range(len(data)))])
    with torch.no_grad():
        posterior = theirs.float().encode(train.to_float(images)).latent_dist
    mean = posterior.mean.mean((0, 2, 3))
    std = (posterior.mean.var((0, 2, 3)) + posterior.var.mean((0, 2, 3))).sqrt()
    meta = json.loads((tmp_path / "mine/latents/meta.json").read_text())
    np.testing.assert_allclose(meta["mean"], mean, atol=1e-3 * std.max().item())
    np.testing.assert_allclose(meta["std"], std, rtol=2e-3)


def test_the_teacher_that_readme_adds(whole, tmp_path, monkeypatch):
    """Its lines, with a small network for torchvision's, align an autoencoder; of other weights of
    the same name, and of what Python does not find, the program says so."""
    lines = re.search(r"import torchvision\n(\nclass ResNetTeacher.*?)```", README, re.DOTALL)[1]
    lines = lines.replace('torchvision.models.resnet50(weights="DEFAULT")', "network()")
    module = tmp_path / "resnet.py"
    module.write_text(f"import torch\n{lines}\ndef network():\n    torch.manual_seed(0)\n"
                      "    return torch.nn.Sequential(torch.nn.Conv2d(3, 2048, 32, stride=32),\n"
                      "                               torch.nn.Identity(), torch.nn.Identity())\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    words = stage(whole, "align", out, teacher="resnet:teacher", teacher_size=128, steps=2,
                  log_every=1, save_every=2)
    command(*words)
    assert json.loads((out / "align/heads.json").read_text())["embed_dim"] == 2048
    assert -1 < log_of(out / "align")[0]["cos_patch"] < 1
    torch.manual_seed(1)
    other = nn.Sequential(nn.Conv2d(3, 2048, 32, stride=32), nn.Identity(), nn.Identity())
    sys.modules["resnet"].network = lambda: other
    sys.modules["resnet"].layers = lambda: other.eval()                 # a module, but no teacher
    assert "teacher_state" in refused(*words)
    for name in ("resnet:student", "resnets:teacher", "resnet:torch", "resnet:layers"):
        words = stage(whole, "align", tmp_path / "other", teacher=name, steps=2)
        assert f"--teacher {name}: " in refused(*words)


def test_efficientnet_lite_is_the_published_one():
    """Logits of the published implementation on drawn weights and images of several sizes; tokens
    of the published weights are its maps; the centred ones have no mean; random weights are always
    the same, and what they see is more than the place."""
    published = efficientnet_lite_pytorch.EfficientNet
    for version in (0, 1):
        torch.manual_seed(version)
        own = demo.efficientnet.EfficientNetLite(version).eval()
        for value in own.state_dict().values():
            if value.ndim == 1:                                     # of batch norms
                value.uniform_(0.5, 1.5)
        for size in (96, 128, 97):
            peer = published.from_name(f"efficientnet-lite{version}", image_size=size).eval()
            peer.load_state_dict(own.state_dict())
            x = torch.randn(2, 3, size, size)
            torch.testing.assert_close(own(x), peer(x), rtol=1e-4, atol=1e-5)
    teacher = align.load_teacher("demo.efficientnet:lite0")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    pixels = F.interpolate((images + 1) * 127.5, (128, 128), mode="bicubic", antialias=True)
    peer = published.from_name("efficientnet-lite0", image_size=128).eval()
    peer.load_state_dict(teacher.net.state_dict())
    maps = {}
    for index in (10, 15):                              # the last of 112 channels, and of 320
        peer._blocks[index].register_forward_hook(
            lambda block, inputs, output, index=index: maps.update({index: output}))
    peer((pixels - 127) / 128)
    patch, cls = align.teacher_tokens(teacher, images, 128)         # (2, 64, 432), (2, 432)
    wide = F.interpolate(maps[15], (8, 8), mode="bilinear")
    expected = torch.cat((maps[10], wide), 1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patch, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(cls, expected.mean(1), rtol=1e-3, atol=1e-3)
    centred, same = align.teacher_tokens(align.load_teacher("demo.efficientnet:lite0_centred"),
                                         images, 128)
    torch.testing.assert_close(centred, patch - cls[:, None])
    torch.testing.assert_close(same, cls)
    first, second = (align.load_teacher("demo.efficientnet:lite0_random") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    patch, _ = align.teacher_tokens(align.load_teacher("demo.efficientnet:lite0_random"),
                                    torch.rand(50, 3, 8, 8) * 2 - 1, 128)
    place = (patch.mean(0) - patch.mean((0, 1))).square().mean(0) / patch.var((0, 1))
    assert place.mean() < 0.4


def test_several_stages_follow_each_other_and_none_is_done_twice(tmp_path):
    """Also with both flips, of images without class folders, in bfloat16; weights are float32."""
    root, out = write_images(tmp_path / "solids", ".", 40), tmp_path / "run"
    words = ["train.py --stage vae latents sit dit", SMALL, "--data", root, "--out", out,
             "--flip --steps 2 --precision bf16 --gradient-checkpointing"]
    assert "done already" not in command(*words).stdout
    assert np.load(out / "latents/moments.npy", mmap_mode="r").shape == (2, 38, 8, 8, 8)
    assert sample.load_run(out, "dit").classes == ["solids"]
    for name in ("vae", "sit", "dit"):
        assert {x.dtype for x in checkpoint_of(out / name)["net"].values()} == {torch.float32}
    assert command(*words).stdout.count("is done already") == 4


def test_killed_encoding_goes_on_where_it_stopped(whole, tmp_path):
    """The latents are those of an uninterrupted run, of any number of processes; what was written
    is kept."""
    through, stopped = tmp_path / "a/latents", tmp_path / "b/latents"
    command(*stage(whole, "latents", tmp_path / "a", batch_size=1), processes=2)
    words = stage(whole, "latents", tmp_path / "b", batch_size=1)
    row = kill_at_work(words, stopped / "moments.npy", "moments", 100)
    command(*words)
    a, b = (np.load(folder / "moments.npy") for folder in (through, stopped))
    assert (b[0, row] == 7).all()
    b[0, row] = a[0, row]
    assert a.tobytes() == b.tobytes() and [path.name for path in stopped.glob(".*")] == [".lock"]
    a, b = train.Latents(through), train.Latents(whole / "plain/latents")
    np.testing.assert_allclose(a.moments.astype(float), b.moments.astype(float), atol=4e-3)
    np.testing.assert_allclose([a.mean, a.std], [b.mean, b.std], atol=1e-3)
    assert torch.equal(a.labels, b.labels) and a.classes == b.classes


def test_processes_with_unequal_numbers_of_batches_encode_alike(whole, tmp_path):
    """113 and 112 batches: neither waits for what the other does not ask."""
    command(*stage(whole, "latents", tmp_path, batch_size=4), processes=2)
    a, b = (train.Latents(folder / "latents") for folder in (tmp_path, whole / "plain"))
    np.testing.assert_allclose(a.moments.astype(float), b.moments.astype(float), atol=4e-3)
    np.testing.assert_allclose([a.mean, a.std], [b.mean, b.std], atol=1e-3)


def test_latents_are_normalised_by_their_own_statistics(whole, tmp_path):
    """meta.json has mean and deviation of samples of q(z | x); sit and sample.py use these, and
    config.json has them as diffusers does. One scale makes the deviation 1 over all channels
    together, and there is no mean."""
    theirs = diffusers.AutoencoderKL.from_pretrained(whole / "aligned/align")
    assert len(theirs.config.latents_std) == 8
    ablation(whole, "latents", tmp_path, {"latent_scale": "one"})
    command(*stage(whole, "sit", tmp_path, latents=tmp_path / "latents", steps=1))
    for run in (whole / "plain", tmp_path):
        latents, autoencoder = train.Latents(run / "latents"), sample.load_run(run, "sit").vae
        assert latents.moments.shape == (1, 900, 16, 8, 8)
        assert autoencoder.config["latents_mean"] == latents.mean
        assert autoencoder.config["latents_std"] == latents.std
        mean, std = torch.from_numpy(latents.moments[0].astype(np.float32)).chunk(2, dim=1)
        x = autoencoder.normalize(one_deviation_off(mean, std))
        if run == tmp_path:
            assert latents.mean == [0] * 8 and len(set(latents.std)) == 1
            assert x.std().item() == pytest.approx(1, abs=3e-3) and x.std((0, 2, 3)).std() > 0.01
        else:
            torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(8), atol=3e-3, rtol=0)
            torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(8), atol=3e-3, rtol=0)


def test_statistics_keep_their_digits_where_a_mean_is_large():
    rng = np.random.default_rng(0)
    moments = np.empty((2, 300, 4, 4, 4), np.float16)            # 300: not a whole number of blocks
    moments[:, :, 0] = rng.normal(100, 0.3, (2, 300, 4, 4))
    moments[:, :, 1] = rng.normal(-1, 2, (2, 300, 4, 4))
    moments[:, :, 2], moments[:, :, 3] = 0.4, rng.uniform(0, 1, (2, 300, 4, 4))
    means, stds = np.split(moments.astype(np.float64), 2, axis=2)
    variance = means.var((0, 1, 3, 4)) + (stds ** 2).mean((0, 1, 3, 4))
    mean, std = train.statistics(moments, "channel")
    np.testing.assert_allclose(mean, means.mean((0, 1, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(std, np.sqrt(variance), rtol=1e-9)
    assert std[0] == pytest.approx(0.5, abs=0.01)                   # sqrt(0.3^2 + 0.4^2)


def test_the_gan_goes_through_no_compiled_part_twice(whole, tmp_path):
    """Its weight wants a gradient of its own, which torch.compile refuses where the first steps
    wanted one only."""
    passes = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            passes.append(gradient.shape)
            return gradient

    def noted(function, **options):
        return lambda *inputs: Noted.apply(function(*inputs))

    def noted_network(net):
        net._compiled_call_impl = noted(net._call_impl)

    with (mock.patch.object(torch, "compile", noted),
          mock.patch.object(nn.Module, "compile", noted_network)):
        command(*stage(whole, "vae", tmp_path, f"--compile {GAN}", steps=3, log_every=1))
    assert "d_weight" in log_of(tmp_path / "vae")[2] and len(passes) == 3 * 2


def test_options_of_the_optimiser_do_what_they_say(whole, tmp_path):
    """A tiny limit on the gradient leaves nothing of a step but the decay of weights; labels are
    dropped as often as stated; and a compiled network learns the same."""
    def compiled(net):                                              # needs no compiler of C++
        net._compiled_call_impl = torch.compile(net._call_impl, backend="aot_eager")

    nets = {}
    for name, options in {"plain": "", "decay": "--clip 1e-20 --weight-decay 0.5",
                          "compiled": "--compile", "dropped": "--label-dropout 1"}.items():
        flags = dict(steps=4, lr=0.01, warmup=0, decay=1)
        with mock.patch.object(nn.Module, "compile", compiled):
            command(*stage(whole, "sit", tmp_path / name, options, **flags))
        nets[name] = checkpoint_of(tmp_path / name / "sit")["net"]
    cfg = train.resolve("sit", dict(out="x", preset="small"))
    first, _ = train.new_transformer(cfg, train.Latents(whole / "plain/latents"))
    first, last = first.state_dict(), "final_layer.linear.weight"   # the last one begins at zero
    assert nets["decay"][last].abs().max() < 1e-9 < 1e-3 < nets["plain"][last].abs().max()
    name, table = "blocks.0.mlp.fc1.weight", "y_embedder.embedding_table.weight"
    torch.testing.assert_close(nets["decay"][name], first[name] * (1 - 0.01 * 0.5) ** 4)
    for key, value in nets["plain"].items():
        torch.testing.assert_close(nets["compiled"][key], value, rtol=1e-3, atol=1e-5)
    moved = (nets["dropped"][table] != first[table]).any(1)
    assert moved.tolist() == [False] * 10 + [True]
    assert (nets["plain"][table] != first[table]).any(1)[:10].any()


# --------------------------------------------------------------------------------------------------
# train.py: log and checkpoints

def test_what_is_not_finite_stops_a_stage(whole, tmp_path):
    """Training, with the last good checkpoint named and none after it; encoding, with images."""
    cfg = train.resolve("sit", dict(out="x", batch_size=8, steps=60))
    (image, _), *_ = list(train.keys_of_steps(900, False, cfg, 0))[12]
    for name, images in (("one", image), ("all", slice(None))):
        latents = copy_of(whole, out := tmp_path / name, "latents") / "latents"
        moments = np.load(latents / "moments.npy", mmap_mode="r+")
        moments[0, images] = np.nan
        moments.flush()
        crc = np.load(latents / "crc.npy", mmap_mode="r+")          # as if it was encoded so
        crc[0, images] = zlib.crc32(moments[0, image].tobytes())
        crc.flush()
        flags = dict(steps=60, log_every=5, save_every=5, latents=latents)
        line, path = refused(*stage(whole, "sit", out, **flags)), out / "sit/checkpoint.pt"
        good = f"the last good checkpoint is {path}" if name == "one" else "no checkpoint yet"
        assert "is not finite in the last 5 steps" in line and good in line
        assert path.is_file() == (name == "one")
    state = checkpoint_of(tmp_path / "one/sit")
    assert state["step"] == 10
    assert all(x.isfinite().all() for part in ("net", "ema") for x in state[part].values())
    autoencoder = vae.AutoencoderKL.from_pretrained(whole / "plain/vae")
    autoencoder.quant_conv.bias.data[0] = 1e5                       # more than float16 holds
    autoencoder.save_pretrained(tmp_path / "vae")
    line = refused(*stage(whole, "latents", tmp_path, vae=tmp_path / "vae"))
    assert "latents of images 0 to 7 are not finite, or beyond float16" in line
    assert not (tmp_path / "latents/meta.json").exists()


def until_it_has_logged(child, log, lines):
    while not (log.is_file() and len(log.read_text().splitlines()) >= lines):
        assert child.poll() is None, "it ended before it was stopped"
        time.sleep(0.01)


def same_end(a, b):
    """Two runs of SiT with the same weights, averages, optimiser and log, bit for bit."""
    a, b = a / "sit", b / "sit"
    assert (a / "ema.safetensors").read_bytes() == (b / "ema.safetensors").read_bytes()
    assert log_of(a) == log_of(b)
    a, b = (checkpoint_of(folder)["opt"]["state"] for folder in (a, b))
    for name, state in a.items():
        assert all(torch.equal(value, b[name][key]) for key, value in state.items())


def test_a_stopped_stage_ends_like_one_that_ran_through(whole, tmp_path):
    """Killed between checkpoints, its workers left behind; killed while saving; asked to stop,
    between two lines of the log, also by Ctrl-C while workers load; its last checkpoint cut off, or
    with one bit flipped. While it lives nobody else may work in its folder."""
    through, stopped, folder = tmp_path / "a", tmp_path / "b", tmp_path / "b/sit"
    flags = dict(steps=120, log_every=5, save_every=10)
    command(*stage(whole, "sit", through, **flags))
    assert set(checkpoint_of(through / "sit")) == {
        "step", "log", "processes", "net", "ema", "opt"}
    words = stage(whole, "sit", stopped, **flags)
    folder.mkdir(parents=True)                      # killed while it saved first, and within a line
    (folder / ".checkpoint.pt.1.tmp").write_bytes(b"PK")
    (folder / "log.jsonl").write_text('{"step": 5, "loss": 1}\n{"step": 1')
    for kind, lines, workers in ((signal.SIGKILL, 5, 1), ("saving", 9, 0), (signal.SIGTERM, 13, 1),
                                 (signal.SIGINT, 16, 1)):
        child = start(*words, "--workers", workers, start_new_session=True)
        until_it_has_logged(child, folder / "log.jsonl", lines)     # past a checkpoint
        if kind == signal.SIGTERM:
            assert "another process works in" in refused(*words)
        if kind == "saving":
            kind = signal.SIGKILL
            while not list(folder.glob(".checkpoint.pt.*")):
                assert child.poll() is None, "it was not seen saving"
        if kind in (signal.SIGINT, signal.SIGTERM):                 # as a terminal does, or SLURM
            os.killpg(child.pid, kind)
        else:
            child.send_signal(kind)
        _, errors = child.communicate()
        expected = -kind if kind == signal.SIGKILL else 128 + kind
        assert child.returncode == expected, errors[-2000:]
        assert not (folder / "ema.safetensors").exists()
        if kind != signal.SIGKILL:                         # of a killed one its worker may complain
            assert "Traceback" not in errors
            step = checkpoint_of(folder)["step"]                    # after it nothing was done
            assert max(line["step"] for line in log_of(folder)) <= step < 120
    path = folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-path.stat().st_size // 2])
    assert f"{path} is damaged" in command(*words).stdout
    same_end(through, stopped)
    assert [path.name for path in folder.glob(".*")] == [".lock"], "what a kill left is gone"
    (folder / "ema.safetensors").unlink()                           # a kill at the very end
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1                      # in the weights, which torch.load believes
    path.write_bytes(damaged)
    assert "the checksum of" in command(*words).stdout
    same_end(through, stopped)


def test_a_finished_run_becomes_a_longer_one(whole, tmp_path):
    """With a constant rate it ends like one of that length, and keeps what it had; with a cosine,
    without a checkpoint, or shorter it is refused. sample.py takes a snapshot."""
    long, grown, cosine = (tmp_path / name for name in ("long", "grown", "cosine"))
    flags = dict(decay=1, warmup=2, log_every=5, save_every=5)
    command(*stage(whole, "sit", long, "--snapshots 10", steps=20, **flags))
    command(*stage(whole, "sit", grown, steps=10, **flags))
    first = (grown / "sit/ema.safetensors").read_bytes()
    samples = "sample.py --num 2 --steps 2 --run", grown, "--out"
    command(*samples, tmp_path / "first.npz")
    command(*stage(whole, "sit", grown, steps=20, **flags))
    same_end(long, grown)
    for run in (long, grown):
        assert (run / "sit/ema-0000010.safetensors").read_bytes() == first
    command(*samples, tmp_path / "same.npz", "--ckpt", grown / "sit/ema-0000010.safetensors")
    command(*samples, tmp_path / "last.npz")
    a, b, c = (images_of(tmp_path / f"{name}.npz") for name in ("first", "same", "last"))
    assert (a == b).all() and (a != c).any()

    assert "steps = 20, not 10" in refused(*stage(whole, "sit", grown, steps=10, **flags))
    assert "30: the run has 20" in refused(
        *stage(whole, "sit", long, "--snapshots 30", steps=20, **flags))
    command(*stage(whole, "sit", cosine, steps=5, **{**flags, "decay": 0.5}))
    assert "its rate falls" in refused(
        *stage(whole, "sit", cosine, steps=10, **{**flags, "decay": 0.5}))
    (grown / "sit/checkpoint.pt").unlink()
    assert "no checkpoint.pt" in refused(*stage(whole, "sit", grown, steps=30, **flags))


SAMPLE_RUN = "sample.py --num 2 --steps 1 --run RUN --out OUT"
TASKS_RUN = SAMPLE_RUN + " --tasks features"
TRAIN_RUN = ("train.py --stage sit SMALL --workers 1 --steps 200 --data x --out RUN/b "
             "--vae RUN/align --latents RUN/latents")


@pytest.mark.parametrize("file, content, says, words", [
    # one bit, in the middle of what another stage wrote, where the file is still whole
    ("sit/ema.safetensors", None, "sha256 differs", SAMPLE_RUN),
    ("align/diffusion_pytorch_model.safetensors", None, "is not the autoencoder", SAMPLE_RUN),
    ("latents/moments.npy", None, "is damaged at image", TRAIN_RUN),
    # all of the content
    ("sit/config.json", "[]", "config.json is damaged", SAMPLE_RUN),
    ("sit/config.json", '{"depth": "x"}', "config.json is damaged", SAMPLE_RUN),
    ("sit/config.json", '{"hidden_size": 100000000000}', "config.json is damaged", SAMPLE_RUN),
    ("sit/settings.json", "{}", "settings.json is damaged: it has no 'vae'", SAMPLE_RUN),
    ("align/heads.json", '{"fold": []}', "heads.json is damaged", TASKS_RUN),
    ("latents/meta.json", "{}", "meta.json is damaged: it has no 'classes'", TRAIN_RUN),
    ("latents/labels.npy", "no array", "latents is damaged", TRAIN_RUN),
    ("latents/crc.npy", np.zeros(3), "its arrays do not fit together", TRAIN_RUN),
    ("latents/labels.npy", np.array([{}, {}]), "latents is damaged", TRAIN_RUN)])
def test_damage_is_noticed_by_the_stage_that_reads_it(whole, tmp_path, file, content, says, words):
    run, out = copy_of(whole, tmp_path / "run", "align", "latents", "sit"), tmp_path / "x.npz"
    settings = run / "sit/settings.json"                            # they name the demo's folders
    settings.write_text(settings.read_text().replace(str(whole / "plain"), str(run)))
    if content is None:
        damaged = bytearray((run / file).read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (run / file).write_bytes(damaged)
    elif isinstance(content, str):
        (run / file).write_text(content)
    else:
        np.save(run / file, content)
    words = words.replace("SMALL", SMALL).replace("RUN", str(run)).replace("OUT", str(out))
    assert says in refused(words) and not out.exists()


def test_a_log_goes_on_with_what_happened(tmp_path, capsys):
    """A step counts once, whatever processes wrote it and go on; lines that cannot be read are
    left out, and that is said."""
    log = train.Log(SimpleNamespace(log_every=5, batch_size=8), tmp_path)
    path, line = tmp_path / "log.jsonl", '{{"step": {}, "loss": 1.0}}\n'.format
    path.write_text(line(5) + '{"st\n' + line(15) + "7\n" + line(25) + '{"step": 30')
    log.go_on(20, {"loss": (6.0, 6)}, 2)                            # three steps of mean 1
    assert path.read_text() == line(5) + line(15)
    said = capsys.readouterr().out
    assert "2 lines cannot be read, the last is of step 15 of 20" in said
    log.start_clock()
    log.add(loss=5.0)
    assert log.write(24, 0.1) == {"loss": 2.0}
    path.write_text(line(5))
    log.go_on(5, {}, 1)
    assert path.read_text() == line(5) and not capsys.readouterr().out


def under_a_limit(kilobytes, *words):
    """The last line of a program that may write no file larger than this; its exit status is 2."""
    words = shlex.join([sys.executable, *split(words)])
    done = subprocess.run(["bash", "-c", f"ulimit -f {kilobytes}; {words}"], cwd=HERE, text=True,
                          capture_output=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return last_line(done.stderr)


def test_a_full_disk_leaves_the_checkpoint_before(whole, tmp_path):
    """Training says so when it meets it, sampling before any work."""
    out, folder = tmp_path / "x.npz", tmp_path / "sit"
    line = under_a_limit(1000, "sample.py --num 400 --run", whole / "plain", "--out", out)
    assert "cannot be written" in line and list(tmp_path.iterdir()) == []
    words = stage(whole, "sit", tmp_path, steps=20, log_every=5, save_every=10)
    line = under_a_limit(2000, *words)
    assert "checkpoint.pt cannot be written at step 10" in line and "make room" in line
    assert not list(folder.glob("*.pt*"))
    command(*words)
    for name in ("checkpoint.pt", "previous.pt"):
        (folder / name).write_bytes(b"nothing")
    (folder / "ema.safetensors").unlink()
    assert "no checkpoint that can be read" in refused(*words)


# --------------------------------------------------------------------------------------------------
# train.py: images

@pytest.mark.parametrize("width, height, size, seed, digest", [
    (500, 375, 256, 1, "4311b12bc5c3918d"), (333, 500, 256, 2, "744dcd0174114e6b"),
    (1024, 600, 256, 3, "bb4ec7171135c90d"), (256, 256, 256, 4, "923fbd04d3280a9b"),
    (80, 100, 64, 5, "7932b8653923deda"), (900, 1200, 64, 6, "9525c7c511c2a6a3"),
    (47, 33, 32, 7, "be290b4757e89467"), (31, 20, 32, 8, "aa1414a2655048bc")])
def test_centre_crop_equals_adms(tmp_path, width, height, size, seed, digest):
    """Byte for byte, on the way that training takes."""
    g = np.random.RandomState(seed)
    small = g.randint(0, 256, (max(2, height // 16), max(2, width // 16), 3)).astype(np.uint8)
    image = np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC))
    image = image.astype(np.int64) + g.randint(-12, 13, (height, width, 3))
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(tmp_path / "x.png")
    images, _ = train.ImageFolder(tmp_path, "all", size).__getitems__([(0, False), (0, True)])
    read, mirrored = images.permute(0, 2, 3, 1)
    assert hashlib.sha256(read.numpy().tobytes()).hexdigest().startswith(digest)
    assert torch.equal(mirrored, read.flip(1))


RED, BLUE, WHITE, DARK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
RED_BLUE = Image.fromarray(np.uint8([[RED] * 4 + [BLUE] * 4] * 8))
GREY = RED_BLUE.getchannel("R")                                     # white, black
ON_ITS_SIDE = Image.Exif()                                          # as cameras store it
ON_ITS_SIDE[0x0112] = 6


@pytest.mark.parametrize("image, options, left, right", [
    (RED_BLUE, {}, RED, BLUE), (RED_BLUE.convert("P"), {}, RED, BLUE), (GREY, {}, WHITE, DARK),
    (RED_BLUE.transpose(Image.ROTATE_90), {"exif": ON_ITS_SIDE}, RED, BLUE),
    (RED_BLUE.convert("CMYK"), {"format": "TIFF"}, RED, BLUE),
    (Image.merge("RGBA", (*RED_BLUE.split(), GREY)), {}, RED, WHITE),
    (Image.fromarray(np.asarray(GREY, np.uint16) * 257 // 2), {}, (127, 127, 127), DARK),
    (RED_BLUE, dict(format="GIF", save_all=True, append_images=[GREY]), RED, BLUE),
    (RED_BLUE.resize((20_000, 8), Image.NEAREST), {}, RED, BLUE)],
    ids=["RGB", "P", "L", "EXIF", "CMYK", "RGBA", "I;16", "animated", "panorama"])
def test_unusual_images_are_read_as_stated(image, options, left, right):
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **options})
    read = train.center_crop(train.read_rgb(file), 8).astype(int)
    assert read.shape == (8, 8, 3)
    assert np.abs(read[:, :4] - left).max() <= 1 and np.abs(read[:, 4:] - right).max() <= 1


@pytest.mark.parametrize("mode, side, kept", [
    ("RGB", 8, 0), ("RGB", 8, 40), ("F", 8, None), ("1", 20_000, None)],
    ids=["empty", "cut off", "floats", "bomb of 400 million pixels"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, mode, side, kept):
    path = tmp_path / "x.png"
    Image.new(mode, (side, side)).save(path, "TIFF" if mode == "F" else "PNG")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(train.DataError, match="x.png cannot be read .*: mend or remove it"):
        train.ImageFolder(tmp_path, "all", 8).image(0)


@pytest.mark.parametrize("folders, classes, count, held_out", [
    ("train/a train/b val/a val/b", "ab", 6, 6), ("train/a train/b test/a test/b", "ab", 6, 6),
    ("Train/a Val/a", "a", 3, 3), ("train/a valid/a", "a", 3, 3),
    ("train/a val/a test/x", "a", 3, 3),                        # of two that are held out the first
    ("train/a train/b", "ab", 5, 1), ("a b", "ab", 5, 1),           # every 20th is held out
    ("around/all/train/a around/all/val/a", "a", 3, 3), ("around/a around/b", "ab", 5, 1),
    ("a/deep/deeper a/deep/other b", "ab", 8, 1),
    (".", ["data"], 2, 1), ("train val", ["data"], 3, 3)])          # without classes: one class
def test_layouts_of_data(tmp_path, folders, classes, count, held_out):
    """Of a folder and of a .zip, whose images are the same."""
    root = write_images(tmp_path / "data", folders, 3)
    for path in (root, zipped(root, tmp_path / "data.zip")):
        data, test, both = (train.ImageFolder(path, split, 8) for split in ("train", "test", "all"))
        assert data.classes == test.classes == tuple(classes)
        assert (len(data), len(test)) == (count, held_out)
        assert sorted(data.files + test.files) == sorted(both.files)
        assert data.files == sorted(data.files, key=lambda file: file[::-1])
        assert data.files == train.ImageFolder(root, "train", 8).files


def test_links_are_followed_and_other_files_are_counted(tmp_path, capsys):
    """Linked folders, a loop of them too; hidden files are nothing, other kinds are counted."""
    root = write_images(tmp_path / "data", "a b .cache __MACOSX/a a/.thumbs", 2)
    (root / "c").symlink_to(write_images(tmp_path / "outside", ".", 2))
    (root / "a" / "loop").symlink_to(root)
    for name in ("a/._000.png", "a/notes.txt", "labels.csv"):
        (root / name).write_text("x")
    cfg = train.resolve("vae", {"data": str(root), "out": str(tmp_path / "run")})
    data, held_out = train.open_data(cfg)
    assert data.classes == ("a", "b", "c") and len(data) + len(held_out) == 6
    said = capsys.readouterr().out
    assert "5 images of 3 classes (a, b, c); 1 held out; files passed over: 2" in said
    path = zipped(root, tmp_path / "data.zip")                 # zipfile follows no link to a folder
    assert train.ImageFolder(path, "all", 8).passed_over == 0


def test_workers_read_a_zip_without_its_directory(tmp_path, monkeypatch):
    """Stored and deflated files are those of the folder, also mirrored, in order of the keys."""
    root = write_images(tmp_path / "images")
    folder = train.ImageFolder(root, "train", 32)
    assert folder.classes == ("a", "b") and len(folder) == 24
    keys = [[(0, False)], [(23, True), (13, False)]]
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = zipped(root, tmp_path / f"{method}.zip", method)
        with monkeypatch.context() as patch:
            archive = train.ImageFolder(path, "train", 32)
            patch.setattr(zipfile, "ZipFile", None)               # nobody reads the directory again
            for batch, of_batch in zip(train.loader(archive, keys, workers=1), keys, strict=True):
                for a, b in zip(batch, folder.__getitems__(of_batch), strict=True):
                    assert torch.equal(a, b)
    images, labels = batch
    assert labels.tolist() == [1, 1] and images.shape == (2, 3, 32, 32) and images[1, 0, 0, 0] == 10


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("field, bit, says", [
    (10, 64, "compressed by method"), (16, 1, "not those that the .zip lists"),  # its checksum
    (24, 1, "not those that the .zip lists"), (27, 128, "it has 21474")])  # its size
def test_a_zip_that_lies_is_found_out(tmp_path, method, field, bit, says):
    """A bit of an image's entry in the directory is another one; so is one of its bytes."""
    path = zipped(write_images(tmp_path / "images", "a", 1), tmp_path / "x.zip", method)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2") + field] ^= bit
    path.write_bytes(data)
    with pytest.raises(train.DataError, match=f"a/000.png cannot be read .*{says}"):
        train.ImageFolder(path, "all", 8).image(0)


def test_bad_data_is_refused(tmp_path):
    """Before any work; a damaged image by the process that loads it."""
    (tmp_path / "text").write_text("not a zip")
    path = zipped(write_images(tmp_path / "images", "a", 2), tmp_path / "broken.zip")
    path.write_bytes(path.read_bytes().replace(b"PK\1\2", b"PK\1\1"))
    (tmp_path / "empty/train/a").mkdir(parents=True)
    write_images(tmp_path / "other", "train/a train/b test/a test/b test/c", 1)
    for path in write_images(tmp_path / "damaged", "a", 4).rglob("*.png"):
        path.write_bytes(b"\x89PNG but not really")
    for name, says in {"missing": "no folder and no .zip", "text": "no folder and no .zip",
                       "broken.zip": "is a broken .zip", "empty": "has no images",
                       "other": "train/ and test/ have other classes, ['c']",
                       "damaged": "cannot be read"}.items():
        for program in (f"train.py --stage vae {SMALL} --workers 1", "demo.teacher judge"):
            line = refused(program, "--data", tmp_path / name, "--out", tmp_path / "run")
            assert says in line and str(tmp_path / name) in line
            assert not list(tmp_path.rglob("*.safetensors"))
            assert name == "damaged" or not (tmp_path / "run").exists()


def test_every_image_comes_once_an_epoch_whatever_the_processes(monkeypatch):
    cfg = train.Config(batch_size=4, seed=1, steps=10)     # 40 positions: four epochs of ten images
    alone = list(train.keys_of_steps(10, True, cfg, 0))
    assert sorted(i for keys in alone for i, _ in keys) == sorted(list(range(10)) * 4)
    assert {flipped for keys in alone for _, flipped in keys} == {True, False}
    assert list(train.keys_of_steps(10, True, cfg, 7)) == alone[7:]
    unflipped = [[(i, False) for i, _ in keys] for keys in alone]
    assert list(train.keys_of_steps(10, False, cfg, 0)) == unflipped
    monkeypatch.setattr(train, "world_size", 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "rank", rank)
        halves.append(list(train.keys_of_steps(10, True, cfg, 0)))
    assert [a + b for a, b in zip(*halves)] == alone


# --------------------------------------------------------------------------------------------------
# train.py: folders of stages, processes

def test_missing_and_foreign_inputs_are_refused(whole, tmp_path):
    out, aligned = copy_of(whole, tmp_path, "vae", "latents"), whole / "aligned/align"
    for name, flags, says in (
            ("vae", {}, "holds a run with steps = 6, not 1400"),
            ("sit", {"vae": aligned}, "another autoencoder"),
            ("latents", {"vae": aligned}, "holds a run with vae"),
            ("sit", {"latents": tmp_path}, "--stage latents")):
        assert says in refused(*stage(whole, name, out, **flags))


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


GAN = "--disc-weight 0.5 --disc-start 1"


@pytest.mark.parametrize("name, options, parts", [
    ("vae", f"--perceptual-weight 1 {GAN}", 1), ("vae", "", 2),
    ("align", f"--align-adaptive {GAN}", 1), ("sit", "", 2), ("dit", "", 1)])
def test_two_processes_train_like_one(whole, tmp_path, lpips_cache, monkeypatch, name, options,
                                      parts):
    """In float64: all networks and optimisers agree to rounding, with the discriminator's batch
    norm and the adaptive weights of both losses, also where each process takes its share of a batch
    in parts. Two nodes with a process each are two processes, too."""
    outs, env = (tmp_path / "one", tmp_path / "two"), {"PYTHONPATH": str(HERE), **lpips_cache}
    flags = dict(steps=3, lr=1e-3, warmup=0, log_every=1, save_every=3)
    monkeypatch.setattr(train, "device", torch.device("cpu"))       # as that of the two
    torch.set_default_dtype(torch.float64)
    done = command(*stage(whole, name, outs[0], options, **flags), check=False, **env)
    torch.set_default_dtype(torch.float32)
    assert done.returncode == 0, done.stderr

    script = tmp_path / "exact.py"
    script.write_text("import torch, train\ntorch.set_default_dtype(torch.float64)\ntrain.main()\n")
    nodes = f"--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=localhost:{free_port()}"
    launch, times = (torchrun(1, nodes), 2) if name == "sit" else (torchrun(2), 1)
    _, *words = stage(whole, name, outs[1], options, accumulate=parts, **flags)
    with both_cores():
        for child in [start(script, *words, launch=launch, env=env) for _ in range(times)]:
            _, errors = child.communicate(timeout=200)
            assert child.returncode == 0, errors[-3000:]

    one, two = (checkpoint_of(out / name) for out in outs)
    for part in one.keys() & {"net", "ema", "discriminator"}:
        for key, a in one[part].items():
            assert a.dtype == torch.float64 or not a.is_floating_point() or "pos_embed" in key
            torch.testing.assert_close(a, two[part][key], rtol=1e-9, atol=1e-9, msg=key)
    for a, b in zip(one["opt"]["state"].values(), two["opt"]["state"].values(), strict=True):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-9, atol=1e-12)
    if "perceptual" in options:                                     # the GAN's come from its start
        first, *_, last = [line for line in log_of(outs[1] / name) if "gradient" in line]
        assert one.keys() == {"step", "log", "processes", "net", "opt", "discriminator", "d_opt"}
        assert {"mse", "kl", "lpips"} <= first.keys() and "gan" not in first
        assert {"gan", "d_weight", "discriminator", "discriminator_gradient"} <= last.keys()


def test_a_stage_goes_on_with_more_and_with_fewer_processes(whole, tmp_path):
    """What one process saved between two lines of the log goes on as two, and the other way."""
    words = stage(whole, "sit", tmp_path, steps=6, log_every=2, save_every=2)
    command(*words)
    folder = tmp_path / "sit"
    log = log_of(folder)
    for saved, processes in ((1, 2), (2, 1)):                # after step 4, as if the line were due
        state = torch.load(folder / "previous.pt", weights_only=True)
        state["log"] = {"loss": (1.0 * saved, saved), "gradient": (1.0 * saved, saved)}
        state["processes"] = saved
        torch.save(state, folder / "checkpoint.pt")
        (folder / "ema.safetensors").unlink()
        command(*words, processes=processes)
        again = log_of(folder)
        assert again[:2] == log[:2] and again[2]["step"] == 6
        mixed = (1 + 2 * log[2]["loss"]) / 3                        # each step counts once
        assert again[2]["loss"] == pytest.approx(mixed, rel=1e-4)


def test_torchrun_starts_again_what_one_process_lost(whole, tmp_path):
    """A signal reaches one of two processes: asked to stop, both save at the same step; killed,
    both end. torchrun starts them again, also while workers of the dead one are about."""
    flags, through = dict(steps=60, log_every=5, save_every=10), tmp_path / "through"
    command(*stage(whole, "sit", through, **flags), processes=2)
    for kind, rank, told in ((signal.SIGTERM, 1, "143"), (signal.SIGKILL, 0, "-9")):
        stopped = tmp_path / told
        with both_cores():
            child = start(*stage(whole, "sit", stopped, workers=1, **flags),
                          launch=torchrun(2, "--standalone --max-restarts=1"))
            until_it_has_logged(child, stopped / "sit/log.jsonl", 5)
            children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
            ranks = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
            os.kill(next(pid for pid, environ in ranks.items()
                         if f"\0RANK={rank}\0".encode() in environ), kind)
            _, errors = child.communicate()
        assert child.returncode == 0 and told in errors, errors[-3000:]
        same_end(through, stopped)


def test_machines_that_see_different_folders_do_not_begin(whole, tmp_path):
    """One finds a checkpoint, the other none: their optimisers would not be the same."""
    words = stage(whole, "sit", tmp_path / "0", steps=6, log_every=2, save_every=2)
    command(*words)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    for name in ("0", "1"):
        (tmp_path / name / "sit/ema.safetensors").unlink()
    (tmp_path / "1/sit/checkpoint.pt").unlink()
    script = tmp_path / "apart.py"
    script.write_text("import os, sys, train\n"
                      "own = f'{os.environ[\"OUT\"]}/{os.environ[\"RANK\"]}'\n"
                      "train.main([*sys.argv[1:], '--out', own])\n")
    with both_cores():
        child = start(script, *words[1:], launch=torchrun(2),
                      env={"PYTHONPATH": str(HERE), "OUT": str(tmp_path)})
        _, errors = child.communicate(timeout=200)
    assert child.returncode and "step 4 for one process and 6 for another" in errors


@pytest.mark.parametrize("words, says", [
    ("--image-size 16 --disc-weight 0.5", "wants at least 24 pixels"),
    ("--channels 8 8000000", "out of memory"), ("--batch-size 1000000000", "at most 1,048,576"),
    ("--seed 99999999999999999999", "--seed 99999999999999999999: want at most"),
    ("--image-size 100000000", "at most 16,384"), ("--layers-per-block 100000", "at most 64"),
    ("--latent-channels 1000000000", "out of memory")])
def test_absurd_sizes_are_refused_before_any_work(whole, tmp_path, words, says):
    line = refused("train.py --stage vae --preset small --data", whole / "scenes.zip", "--out",
                   tmp_path / "x", words)
    assert says in line and not (tmp_path / "x").exists()


def test_one_image_makes_a_run(tmp_path):
    """Also in batches of one."""
    root = write_images(tmp_path / "one", ".", 1)
    command("train.py --stage vae latents sit", SMALL, "--batch-size 1 --steps 2 --log-every 1 "
            "--save-every 2 --data", root, "--out", tmp_path / "run")
    assert (tmp_path / "run/sit/ema.safetensors").is_file()


def test_processes_that_do_not_fit_are_refused(whole, tmp_path, monkeypatch):
    words = stage(whole, "vae", tmp_path)
    monkeypatch.setattr(train, "device", torch.device("cuda"))
    monkeypatch.setattr(train, "local_rank", torch.cuda.device_count())
    assert "start no more processes than GPUs" in refused(*words)
    monkeypatch.setattr(train, "world_size", 3)
    assert "does not divide by 3" in refused(*words)
    monkeypatch.setattr(demo.teacher, "world_size", 2)
    words = "demo.teacher judge --data", whole / "scenes.zip", "--out", tmp_path
    assert "one process" in refused(*words)


# --------------------------------------------------------------------------------------------------
# sample.py

@pytest.fixture(scope="session")
def diffused(whole, tmp_path_factory):
    """A run with both families, the demo's SiT and a DiT on the same latents, whose weights are
    filled: so early in training they would still be near zero."""
    out = copy_of(whole, tmp_path_factory.mktemp("both"), "sit")
    command(*stage(whole, "dit", out, steps=3))
    for family in ("sit", "dit"):
        net = fill(sample.load_run(out, family).model, ("pos_embed",))
        vae.save_safetensors(net.state_dict(), out / family / "ema.safetensors")
    return out


@pytest.mark.parametrize("options", [
    "--steps 3 --cfg-scale 2 --cfg-interval 0.2 0.9",
    "--sampler dopri5 --cfg-scale 1.5 --cfg-interval 0 0.7 --classes random",
    "--sampler sde-heun --steps 4 --classes 3 arch 10",
    "--family dit --steps ddim5 --sampler ddim --eta 0.7", "--family dit --steps 5"])
def test_a_sample_does_not_depend_on_its_batch(diffused, tmp_path, options):
    """In float64 the same images, in float32 to one grey level, from batches of 12, 5 and 1."""
    labels = [3, 0, 10] * 4 if "arch" in options else [*range(10), 0, 1]
    if "random" in options:
        labels = [sample.labels_of("random", [i], 10, 0).item() for i in range(12)]
        assert max(labels) < 10 and len(set(labels)) > 3
    for precision, most in (("fp64", 0), ("fp32", 1)):
        images = []
        for size in (12, 5, 1):
            path = tmp_path / f"{precision}-{size}.npz"
            command("sample.py --run", diffused, options, "--num 12 --precision", precision,
                    f"--batch-size {size} --out", path)
            images.append(images_of(path))
            assert np.load(path)["arr_1"].tolist() == labels
            assert np.abs(images[-1] - images[0]).max() <= most
        assert images[0].shape == (12, 32, 32, 3) and np.load(path)["arr_0"].dtype == np.uint8
        assert len({image.tobytes() for image in images[0]}) == 12, "two images are one"


@pytest.mark.parametrize("name", ["x.json", "x.png", "x-latents.npy"])
def test_files_of_others_are_not_replaced(diffused, tmp_path, name):
    (tmp_path / name).write_text('{"mine": 1}')
    line = refused("sample.py --num 2 --steps 1 --run", diffused, "--out", tmp_path / "x.npz")
    assert f"{name} is there" in line
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, '{"mine": 1}')]


def test_a_number_is_the_place_of_a_class_and_no_name():
    names = ["1", "2", "cat"]
    assert sample.parse_classes(["0", "1", "3"], names) == [0, 1, 3]
    assert sample.parse_classes(["name:1", "cat", "name:cat"], names) == [0, 2, 2]
    with pytest.raises(SystemExit):
        sample.parse_classes(["4"], names)


def test_killed_sampling_goes_on_where_it_stopped(diffused, tmp_path):
    """SIGKILL, then two processes go on: what was written is kept, and images and latents are those
    of an uninterrupted run, with the noise of an SDE. Other options do not go on."""
    through, stopped = tmp_path / "a.npz", tmp_path / "b.npz"
    words = ["sample.py --num 60 --batch-size 2 --sampler sde-euler --steps 60 --latents",
             "--run", diffused, "--out"]
    command(*words, through)
    words.append(stopped)
    row = kill_at_work(words, stopped, "images", 6)
    line = refused(*words, "--seed 1")
    assert "seed = 0, not 1" in line and ".b.npz.partial" in line
    command(*words, processes=2)
    a, b = images_of(through), images_of(stopped)
    assert (b[row] == 7).all()
    b[row] = a[row]
    assert np.array_equal(a, b)
    a, b = ((tmp_path / f"{name}-latents.npy").read_bytes() for name in "ab")
    assert a == b and (tmp_path / "a.png").stat().st_size > 1000 and not list(tmp_path.glob(".*"))
    assert "num_steps = 60, not 50" in refused(*words, "--steps 50")


def test_samples_with_other_weights_beside_do_not_count_as_done(whole, published, tmp_path):
    """Heads that were trained again into the same folder, an autoencoder with another scale."""
    heads = shutil.copytree(whole / "teacher", tmp_path / "heads")
    words = ["sample.py --num 2 --steps 2 --tasks segmentation --heads", heads, "--run",
             whole / "aligned", "--out", tmp_path / "a.npz"]
    command(*words)
    shutil.copytree(heads, tmp_path / "moved")
    words[1] = tmp_path / "moved"
    assert "is done already" in command(*words).stdout
    path = tmp_path / "moved/segmentation_head.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: 2 * x for name, x in weights.items()}, path)
    assert "has heads = " in refused(*words)
    scaled = shutil.copytree(published[0] / "vae", tmp_path / "vae")
    words = ["sample.py --num 2 --steps 2 --model SiT-Ti/2 --ckpt", published[0] / "sit.pt",
             "--vae", scaled, "--out", tmp_path / "b.npz"]
    command(*words)
    train.write_json({**train.read_json(scaled / "config.json"), "scaling_factor": 0.18},
                     scaled / "config.json")
    assert "has scale = " in refused(*words)


def test_png_files_and_zip_hold_the_images_of_the_npz(diffused, tmp_path):
    words = "sample.py --num 11 --steps 2 --run", diffused, "--out"
    command(*words, tmp_path / "a.npz")
    command(*words, tmp_path / "b.zip")
    command(*words, tmp_path / "c", processes=2)
    images, names = images_of(tmp_path / "a.npz"), [f"{i:06}.png" for i in range(11)]
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        assert archive.namelist() == names == sorted(os.listdir(tmp_path / "c"))
        for image, name in zip(images, names):
            assert np.array_equal(image, np.asarray(Image.open(archive.open(name))))
            assert np.abs(image - np.asarray(Image.open(tmp_path / "c" / name))).max() <= 1
    labels = np.load(tmp_path / "a.npz")["arr_1"]
    for name in "bc":
        assert np.array_equal(np.load(tmp_path / f"{name}-labels.npy"), labels)
    assert "a.npz is there" in refused(*words, tmp_path / "a.zip")  # both would have a.json
    assert not list(tmp_path.glob(".*"))


def test_tasks_are_read_off_the_written_latents(whole, tmp_path):
    """-tasks.npz holds what heads and MLPs give for -latents.npy, whose images are the .npz's."""
    folder = whole / "aligned/align"
    run = "sample.py --tasks segmentation depth features --run", whole / "aligned"
    assert "MLPs of stage align" in refused(*run, "--heads", folder, "--out", tmp_path / "x.npz")
    for k in (1, 2):
        command(*run, "--num 23 --steps 2 --batch-size 5 --latents --out", tmp_path / f"{k}.npz",
                processes=k)
    found, other = (np.load(tmp_path / f"{k}-tasks.npz") for k in (1, 2))
    heads, z = sample.load_heads(folder), torch.from_numpy(np.load(tmp_path / "1-latents.npy"))
    masks, depth = sample.read_latents(heads, sample.load_task_heads([whole / "teacher"]), z, 32)
    assert found["segmentation"].shape == (23, 32, 32)
    assert np.mean(found["segmentation"] == masks.numpy()) > 0.999
    assert np.mean(found["segmentation"] == other["segmentation"]) > 0.99
    np.testing.assert_allclose(found["depth"], depth, rtol=1e-4)
    with torch.no_grad():
        rgb = align.pca_rgb(heads.feature_map(z)).movedim(1, -1)
        decoded = vae.AutoencoderKL.from_pretrained(folder).decode(z).sample
    np.testing.assert_allclose(found["features"] / 255, rgb, rtol=0, atol=0.01)
    decoded = train.to_uint8(decoded).movedim(1, -1).numpy()
    assert np.abs(decoded - images_of(tmp_path / "1.npz")).max() <= 1
    assert Image.open(tmp_path / "1-tasks.png").width > 600 and not list(tmp_path.glob(".*"))


def test_reconstructions_are_measured_and_written(whole, tmp_path, lpips_cache, inception_weights):
    """The same on one process and on two; the figures are those of the images that are written,
    and fid.py reads them."""
    words, results = ["sample.py --reconstruct", whole / "scenes.zip", "--vae", whole / "plain/vae",
                      "--num 21 --batch-size 4 --out"], []
    for k in (1, 2):
        command(*words, tmp_path / f"{k}.npz", processes=k, **lpips_cache)
        images = [images_of(tmp_path / f"{k}{end}.npz") for end in ("-originals", "")]
        results.append((*images, train.read_json(tmp_path / f"{k}.json")))
    (originals, rec, figures), other = results
    held_out = train.ImageFolder(whole / "scenes.zip", "test", 32)
    (expected, _), = train.in_order(held_out, 21, train.spread(len(held_out), 21))
    assert np.array_equal(originals, expected.permute(0, 2, 3, 1))
    assert np.array_equal(originals, other[0]) and np.abs(rec - other[1]).max() <= 1
    x, y = (train.to_float(torch.from_numpy(v).permute(0, 3, 1, 2)) for v in (originals, rec))
    lpips = filled_lpips(2 ** 0.5, published_lin())
    for name, metric in {"psnr": vae.psnr, "ssim": vae.ssim, "lpips": lpips}.items():
        assert figures[name] == pytest.approx(metric(x, y).mean().item(), rel=1e-4)
        assert other[2][name] == pytest.approx(figures[name], rel=1e-3)
    assert figures["images"] == 21 and not list(tmp_path.glob(".*"))
    assert Image.open(tmp_path / "1.png").width > 200
    words.append(tmp_path / "1.npz")
    assert "is done already" in command(*words, **lpips_cache).stdout
    assert "images = 21, not 20" in refused(*words, "--num 20", **lpips_cache)
    assert "precision = fp32, not tf32" in refused(*words, "--precision tf32", **lpips_cache)
    assert "90 images in this split" in refused(*words, "--num 91", **lpips_cache)
    command(*words, "--metrics ssim psnr lpips", **lpips_cache)     # the same in any order
    found, _ = evaluated(tmp_path / "1.npz", tmp_path / "1-originals.npz", "--weights",
                         inception_weights, "--metrics", "fid")
    assert found["num_samples"] == 21 and found["fid"] > 0


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Weights as they are published: an autoencoder in a folder of diffusers, a SiT as its official
    training saves it, with argparse's Namespace, and a DiT's bare state dict."""
    root, nets = tmp_path_factory.mktemp("published"), {}
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4, sample_size=32,
        scaling_factor=0.5, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2)
    theirs.save_pretrained(root / "vae")
    for name, module in (("SiT", sit), ("DiT", dit)):
        net = module.create(f"{name}-Ti/2", input_size=16, num_classes=30, learn_sigma=True)
        nets[name] = fill(net, ("pos_embed",))
    ema = nets["SiT"].state_dict()
    other = {name: value + 1 for name, value in ema.items()}
    torch.save({"ema": ema, "model": other, "opt": {"state": {}},
                "args": argparse.Namespace(model="SiT-Ti/2")}, root / "sit.pt")
    # as DDP and torch.compile leave it, in bfloat16
    nets["DiT"] = nets["DiT"].bfloat16().float()
    torch.save({f"_orig_mod.module.{name}": value.bfloat16()
                for name, value in nets["DiT"].state_dict().items()}, root / "dit.pt")
    torch.save({"ema": {**ema, "projectors.0.0.weight": torch.zeros(2, 2)}}, root / "repa.pt")
    wide = vae.AutoencoderKL(block_out_channels=(32, 32), layers_per_block=1, latent_channels=8)
    wide.save_pretrained(root / "wide")
    return root, nets, theirs.eval()


@pytest.mark.parametrize("family, module, options", [
    ("SiT", sit, dict(sampler="sde-euler", num_steps=4, cfg_scale=3.0, cfg_channels=3,
                      diffusion_form="decreasing", last_step="euler", last_step_size=0.1)),
    ("SiT", sit, dict(sampler="rk4", num_steps=2, path="gvp", prediction="noise",
                      sample_eps=0.05)),
    ("DiT", dit, dict(sampler="ddim", num_steps=3, schedule="squaredcos_cap_v2",
                      clip_denoised=True, eta=0.5))])
def test_published_checkpoints_are_sampled(published, tmp_path, family, module, options):
    """The program's images are those of the file's sampler and diffusers' decoder."""
    (root, nets, theirs), out = published, tmp_path / "a.npz"
    flags = [f"{sample.flag_of(name)} {'' if value is True else value}"
             for name, value in options.items()]
    command(f"sample.py --classes 29 3 30 --num 3 --seed 5 --model {family}-Ti/2", *flags,
            "--ckpt", root / f"{family.lower()}.pt", "--vae", root / "vae", "--out", out)
    noise, labels = sample.Noise(5, range(3), (4, 16, 16)), torch.tensor([29, 3, 30])
    net = copy.deepcopy(nets[family]).to(train.device)
    with torch.no_grad():
        z = module.sample(net, noise(), labels.to(train.device), noise=noise, **options).cpu()
        expected = train.to_uint8(theirs.decode(z / 0.5).sample).movedim(1, -1).numpy()
    assert np.abs(images_of(out) - expected).max() <= 1 and expected.std() > 5
    assert np.load(out)["arr_1"].tolist() == [29, 3, 30]


def test_a_model_without_dropped_labels_is_not_guided(diffused, tmp_path):
    run, table = shutil.copytree(diffused, tmp_path / "run"), "y_embedder.embedding_table.weight"
    config, path = train.read_json(run / "sit/config.json"), run / "sit/ema.safetensors"
    train.write_json({**config, "class_dropout_prob": 0.0}, run / "sit/config.json")
    weights = vae.load_weights(path)
    vae.save_safetensors({**weights, table: weights[table][:-1]}, path)
    words = "sample.py --num 2 --steps 2 --run", run, "--out", tmp_path / "x.npz"
    assert "without label dropout" in refused(*words, "--cfg-scale 2")
    assert "without label dropout" in refused(*words, "--classes 10")
    command(*words)


def test_a_run_whose_files_have_changed_is_not_sampled(whole, tmp_path):
    run, out = copy_of(whole, tmp_path, "align", "sit"), tmp_path / "x.npz"
    settings, path = train.read_json(run / "sit/settings.json"), run / "sit/settings.json"
    train.write_json({**settings, "vae": "gone/align"}, path)
    command("sample.py --num 2 --steps 2 --run", run, "--out", out)
    (run / "align/diffusion_pytorch_model.safetensors").write_bytes(b"other weights")
    assert "is not the autoencoder" in refused("sample.py --run", run, "--out", out)
    path.write_text('{"vae": ')
    assert "settings.json is damaged" in refused("sample.py --run", run, "--out", out)


@pytest.mark.parametrize("words, says", [
    ("FILES --model SiT-S/2", "does not fit the network"),
    ("FILES --model SiT-Ti/4", "does not fit the network"),
    ("FILES --model UViT-S/2", "write SiT-SIZE/PATCH"),
    ("FILES --ckpt nowhere.pt", "nowhere.pt not found"),
    ("FILES --ckpt ROOT/vae/diffusion_pytorch_model.safetensors", "hold the weights of a SiT"),
    ("FILES --vae ROOT", "config.json"), ("FILES --vae ROOT/wide", "has latents of 8 channels"),
    ("FILES --classes 31", "numbers from 0 to 30"), ("FILES --classes cat", "names of classes"),
    ("FILES --ckpt ROOT/repa.pt", "a SiT of REPA"), ("FILES --tasks features", "stage align"),
    ("FILES --out x.jpg", "ends in .npz or .zip"),
    ("FILES --steps ddim5", "steps ddim5: SiT wants a number"),
    ("FILES --steps X", "--steps: X: want 50"), ("FILES --eta 1", "--eta is no option of sit.py"),
    ("FILES --cfg-scale 2 --cfg-interval 0.9 0.1", "cfg_interval"),
    ("FILES --cfg-interval 0 0.5", "--cfg-interval wants guidance"),
    ("FILES --cfg-channels 3", "--cfg-channels wants guidance"),
    ("FILES --cfg-scale 2 --cfg-channels 5", "cfg_channels 5"),
    ("FILES --cfg-scale nan", "nan: want a number"),
    ("FILES --sampler dopri5 --atol 0 --rtol 0", "one of them more"),
    ("FILES --atol 1e-4", "--atol is for --sampler dopri5"),
    ("FILES --last-step mean", "--last-step is for --sampler sde-euler, sde-heun"),
    ("RUN --family dit --eta 0.5", "--eta is for --sampler ddim"),
    ("RUN --heads x", "--heads is for --tasks"), ("FILES --family dit", "--family is for --run"),
    ("RUN --ckpt x.pt", "x.pt not found: see --ckpt"),
    ("FILES --sampler sde-euler --diffusion-form x", "diffusion_form 'x'"),
    ("FILES --sampler sde-euler --diffusion-norm -1", "diffusion_norm -1"),
    ("--model SiT-Ti/2", "--ckpt FILE"), ("--run nowhere", "--stage sit"),
    ("RUN --ckpt ROOT/sit.pt", "does not fit"), ("RUN --path gvp", "was trained with linear"),
    ("RUN --sampler ddpm", "sampler 'ddpm' is not known: choose euler"),
    ("RUN --family dit --sampler ddim --eta 1.5", "eta 1.5: want 0 to 1"),
    ("RUN --metrics psnr", "--metrics is only for --reconstruct"), ("RUN --num 0", "at least 1"),
    ("IMAGES --vae nowhere", "config.json"), ("IMAGES --image-size 33", "multiple of 4"),
    ("IMAGES --image-size 8", "at least 16"), ("IMAGES --num 0", "at least 1"),
    ("IMAGES --run x", "no --run"), ("IMAGES --metrics fid", "invalid choice"),
    ("IMAGES --metrics lpips", "vgg16-397923af.pth is not in"),
    ("IMAGES --cfg-scale 2", "--cfg-scale is not for --reconstruct"),
    ("IMAGES --classes 3", "--classes is not for --reconstruct")])
def test_bad_weights_and_options_are_refused(whole, published, diffused, tmp_path, words, says):
    """Before any work, and without a file left behind."""
    root, plain = published[0], whole / "plain/vae"
    for name, given in {
            "FILES": f"--model SiT-Ti/2 --ckpt {root}/sit.pt --vae {root}/vae", "ROOT": f"{root}",
            "IMAGES": f"--reconstruct {whole}/scenes.zip --vae {plain} --metrics psnr",
            "RUN": f"--run {diffused}"}.items():
        words = words.replace(name, given)
    line = refused("sample.py --num 2 --out", tmp_path / "x.npz", words, REALS_CACHE=str(tmp_path),
                   https_proxy=NO_NETWORK)
    assert says in line and list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# demo/: the commands, scenes, teacher and heads

def test_the_demo_writes_a_report_with_all_figures_and_pictures(whole, tmp_path):
    """Its commands are printed as they start."""
    figures, text = train.read_json(whole / "report.json"), (whole / "report.md").read_text()
    plain, said = figures["plain"], whole.with_suffix(".txt").read_text()
    assert said.count("$ python train.py") == 5 and said.count("$ python sample.py") == 4
    for word, count in {"reconstructions": 4, "cosine": 2, "probe": 1, "guidance": 6, "FD": 5,
                        "from latents": 2, "generated latents": 2}.items():
        assert sum(word in name for name in plain) == count
    assert all(name in text and name in said for name in plain) and len(plain) == 15
    assert plain.keys() == figures["aligned"].keys()
    assert np.isfinite([*plain.values(), *figures["aligned"].values()]).all()
    assert ("is reached" in text) != ("is not reached" in text)
    names = [name.split(")")[0] for name in text.split("](")[1:]]
    assert {"reconstructions.png", "samples.png", "samples-guided.png", "tasks.png",
            "embedding.png", "aligned/samples-tasks.png"} <= set(names)
    for name in names:
        picture = Image.open(whole / name)
        colors = picture.resize((50, 50)).getcolors(2500)
        assert picture.width > 100 and len(colors) > 5, f"{name} is blank"
    for name in ("scenes", "teacher", "judge", "plain/vae", "aligned/align", "aligned/samples"):
        assert f"| {name} |" in text
    assert "not found" in refused("demo.report --out", tmp_path)


def said_by_the_demo(*flags):
    """What its commands say, which are run one after the other in this process."""
    cfg = demo.__main__.parse_arguments(split(flags))
    groups, lanes = demo.__main__.shared_commands(cfg), ("plain", "aligned")
    jobs = sum(sum(groups, []), []) + sum((demo.__main__.lane(cfg, name) for name in lanes), [])
    said = [command(*words[2 if words[1] == "-m" else 1:]).stdout for _, words in jobs]
    return "".join(said) + command("demo.report --out", cfg.out).stdout


def test_the_demo_does_nothing_twice(whole):
    written = {path: path.stat().st_mtime_ns for path in whole.rglob("*.*")
               if path.suffix in (".safetensors", ".npz", ".npy", ".pth")}
    said = said_by_the_demo("--out", whole, DEMO)
    assert len(written) >= 16 and said.count("is done already") == 13  # stages and samples
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_the_demo_takes_images_of_ones_own(whole, tmp_path):
    """They have no masks and no depth: its report has the other figures."""
    data, out = shutil.copy(whole / "scenes.zip", tmp_path / "solids.zip"), tmp_path / "run"
    said_by_the_demo("--data", data, "--out", out, "--steps 3 --num 20")
    figures = train.read_json(out / "report.json")
    assert figures["aligned"]["FD of samples, no guidance"] >= 0
    assert "masks from latents, mIoU" not in figures["plain"]
    moments = np.load(out / "plain/latents/moments.npy", mmap_mode="r")
    assert moments.shape[:2] == (2, 900) and not np.array_equal(*moments), "also mirrored"
    assert list(np.load(out / "aligned/samples-tasks.npz")) == ["features"]


def test_without_flags_train_py_is_the_demo_in_a_folder_of_its_own():
    for words, out in (([], "runs/scenes"), (["--data", "x/cats.zip"], "runs/cats")):
        assert demo.__main__.parse_arguments(words).out == Path(out)
    script = "import os, train; os.execv = lambda *given: print(given); train.main([])"
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert repr([sys.executable, "-m", "demo"]) in done.stdout
    assert "--stage" in refused("train.py --data x")


def test_scenes_depend_on_seed_and_index_alone():
    whole = demo.scenes.draw_scenes(3, np.arange(40))
    part = demo.scenes.draw_scenes(3, np.array([37, 5, 12]))
    images, labels, masks, depth = ((a[[37, 5, 12]].double(), b.double())
                                    for a, b in zip(whole, part))
    assert torch.equal(*labels)
    # another place in memory may mean another kernel: it rounds otherwise, also over an edge
    for (a, b), most in ((images, 1), (masks, 0), (depth, 1e-5)):
        gaps = (a - b).abs()
        assert (gaps == 0).double().mean() > 0.95 and (gaps > most).double().mean() < 2e-3
    assert not torch.equal(whole[0], demo.scenes.draw_scenes(4, np.arange(40))[0])
    test = demo.scenes.draw_scenes(3, np.arange(10 ** 9, 10 ** 9 + 10))
    assert test[1].tolist() == list(range(10))


def test_masks_and_depth_of_scenes_agree():
    images, labels, masks, depth = demo.scenes.draw_scenes(0, np.arange(200))
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    for i in range(200):
        assert set(masks[i].unique().tolist()) <= {0, 1, 2 + i % 10} and labels[i] == i % 10
    solid = (masks >= 2).float().mean(dim=(1, 2))
    assert solid.min() > 0.04 and solid.max() < 0.6
    assert (depth[masks == 0] == demo.scenes.FAR).all() and depth.min() > demo.scenes.NEAR
    assert (depth[masks >= 2] < 8).all(), "a solid stands five units away"


def test_a_sphere_is_drawn_where_geometry_puts_it():
    """Its nearest point is at |eye - centre| - radius: the smallest depth on the solid."""
    u = demo.scenes.scene_numbers(0, np.arange(0, 400, 10), 24)
    _, masks, depth = demo.scenes.draw_class(0, u, 96)
    pitch, scale = 0.2 + 0.14 * u[:, 0], 0.85 + 0.2 * u[:, 8]
    px, pz = -0.16 + 0.32 * u[:, 9], -0.2 + 0.4 * u[:, 10]
    eye = torch.stack([-px, 0.8 + 5 * pitch.sin() - 0.92 * scale, 5 * pitch.cos() - pz])
    expected = eye.norm(dim=0) - 0.92 * scale
    nearest = depth.masked_fill(masks != 2, 100).amin(1)
    torch.testing.assert_close(nearest, expected, rtol=0, atol=0.01)


def test_scenes_become_an_ordinary_data_set(tmp_path):
    """A .zip of class folders, the same bytes each time; masks and depth in ImageFolder's order."""
    path = tmp_path / "scenes.zip"
    demo.scenes.write_scenes(path, 120, 16)
    written = path.read_bytes()
    with np.load(demo.scenes.truth_path(path)) as truth:
        for split, count in (("train", 120), ("test", 12)):
            data = train.ImageFolder(path, split, 16)
            assert data.classes == tuple(sorted(demo.scenes.SCENE_CLASSES)) and len(data) == count
            numbers = np.array([int(Path(name).stem) for name, _ in data.files])
            images, labels, masks, depth = demo.scenes.draw_scenes(0, numbers, 16)
            (read, its_labels), = train.in_order(data, count)
            assert torch.equal(read, images) and np.array_equal(truth[f"{split}_masks"], masks)
            np.testing.assert_allclose(truth[f"{split}_depth"], depth, rtol=1e-3)
            names = [demo.scenes.SCENE_CLASSES[k] for k in labels]
            assert [data.classes[k] for k in its_labels] == names
    demo.scenes.write_scenes(path, 120, 16)
    with pytest.raises(ValueError, match="holds 120 scenes of 16 pixels, not 130"):
        demo.scenes.write_scenes(path, 130, 16)
    path.unlink()
    demo.scenes.write_scenes(path, 120, 16)
    assert path.read_bytes() == written


def test_what_is_unknown_does_not_count():
    """Masks of 255 and depth of 0 are in no loss; a batch of them alone is a loss of 0."""
    logits, depth = torch.randn(2, 5, 4, 4), torch.rand(2, 4, 4) + 1
    masks, metres = torch.full((2, 4, 4), 255), torch.zeros(2, 4, 4)
    loss, parts = demo.teacher.dense_loss(logits, depth, masks, metres)
    assert loss == 0 and set(parts) == {"segment_loss", "depth_loss"}
    masks[0, 1, 2], metres[1, 3, 0] = 3, 2.0
    loss, parts = demo.teacher.dense_loss(logits, depth, masks, metres)
    segment, depth = -logits[0, :, 1, 2].log_softmax(0)[3], (depth[1, 3, 0] / 2).log().square()
    torch.testing.assert_close(parts, {"segment_loss": segment, "depth_loss": depth})
    torch.testing.assert_close(loss, segment + 5 * depth)


def test_a_teacher_that_has_changed_is_another_teacher(whole, tmp_path):
    """Stage align does not count as done with it; one without labels knows depth alone; and one
    that is begun again ends the same."""
    folder = tmp_path / "teacher"
    words = "demo.teacher train --steps 2 --data", whole / "scenes.zip", "--out", folder
    command(*words, "--no-labels")
    heads, weights = train.read_json(folder / "heads.json"), folder / "dinov2.pth"
    assert heads["segmentation"] is None and heads["depth"]["max_depth"] == demo.scenes.FAR
    assert "class_loss" not in log_of(folder)[-1] and "depth_loss" in log_of(folder)[-1]
    assert "labels = False, not True" in refused(*words)
    written = weights.read_bytes()
    weights.unlink()
    command(*words, "--no-labels")
    assert weights.read_bytes() == written
    align_words = stage(whole, "align", tmp_path, teacher=folder, steps=2)
    command(*align_words)
    shutil.rmtree(folder)
    command(*words)
    assert {"class_loss", "segment_loss", "depth_loss"} <= log_of(folder)[-1].keys()
    assert "teacher_weights" in refused(*align_words)


def test_a_published_teacher_and_heads_of_ones_own(whole, tmp_path, vits):
    """DINOv2 and a head by their published names in the cache; heads trained on a folder of images,
    masks and depth; pictures of what they see; what is wrong with a mask is said."""
    cache, data, heads = (tmp_path / name for name in ("cache", "data", "heads"))
    cache.mkdir()
    torch.save(vits["dinov2_vits14"].state_dict(), cache / "dinov2_vits14_pretrain.pth")
    weights = align.SegmentationHead(384, 21).state_dict()
    torch.save({f"decode_head.{name}": value for name, value in weights.items()},
               cache / "dinov2_vits14_voc2012_linear_head.pth")
    images, _, masks, depth = demo.scenes.draw_scenes(0, np.arange(40), 40)
    for kind, planes in {"images": images.movedim(1, 3).numpy(), "masks": masks.numpy(),
                         "depth": (1000 * depth).numpy().astype(np.uint16)}.items():
        (data / kind).mkdir(parents=True)                           # depth in millimetres
        for i, plane in enumerate(planes):
            Image.fromarray(plane).save(data / kind / f"{i:02}.png")
    (data / "classes.txt").write_text("\n".join(demo.scenes.SEGMENTS) + "\n")
    env = {"REALS_CACHE": str(cache)}
    command(*stage(whole, "align", tmp_path, data=data / "images", steps=2, teacher_size=28,
                   teacher="dinov2_vits14"), **env)
    config = train.read_json(tmp_path / "align/heads.json")
    assert config["fold"] == 4                                      # 8 cells, 2 tokens a side
    words = ["demo.teacher heads", data, "--teacher dinov2_vits14 --teacher-size 28 --steps 5 "
             "--batch-size 8 --out"]
    command(*words, heads, **env)
    found = sample.load_task_heads([heads])
    assert tuple(found.classes) == demo.scenes.SEGMENTS
    assert found.depth.bins[-1] == pytest.approx(12, abs=0.1)
    x, seen, metres = demo.teacher.DenseFolder(data, 40).__getitems__([(0, False), (3, False)])
    assert torch.equal(x, images[[0, 3]]) and torch.equal(seen, masks[[0, 3]].long())
    torch.testing.assert_close(metres, depth[[0, 3]], rtol=0, atol=0.001)

    picture = ["demo.pictures features", data / "images", "--vae", tmp_path / "align",
               "--num 2 --split all --out", tmp_path / "features.png"]
    for sources in ([heads], ["dinov2_vits14_voc2012_linear_head", heads]):
        command(*picture, "--heads", *sources, **env)
        assert Image.open(tmp_path / "features.png").width > 800
    assert "width 96" in refused(*picture, "--heads", whole / "teacher", **env)
    assert "give --teacher" in refused(*picture, "--teacher", whole / "teacher", **env)
    for bad, says in ((Image.new("RGB", (40, 40)), "has colours"),
                      (Image.new("L", (40, 20)), "upright, 40 x 40: want the same shape"),
                      (Image.new("L", (40, 40), 77), "has class 77")):
        bad.save(data / "masks/03.png")
        assert says in refused(*words, tmp_path / "bad", **env)
    for file, says in (("masks/03.png", "cannot be read"), ("classes.txt", "not found")):
        (data / file).unlink()
        assert says in refused(*words, tmp_path / "bad", **env)


# --------------------------------------------------------------------------------------------------
# demo/: pictures and study

def tiles(path, rows, columns, size=64, gap=4):
    """The last columns of a picture that sheet has drawn: (rows, columns, size, size, 3)."""
    picture, step = np.asarray(Image.open(path).convert("RGB")).astype(int), size + gap
    picture = picture[20:20 + rows * step, picture.shape[1] - columns * step:]
    picture = picture.reshape(rows, step, columns, step, 3).swapaxes(1, 2)
    return picture[:, :, :size, :size]


@pytest.mark.parametrize("options, steps", [
    ("--sampler heun --steps 4 --cfg-scale 1.5", 4), ("--sampler sde-euler", None),
    ("--sampler dopri5", None), ("--family dit --steps 5", 5)])
def test_trajectories_and_interpolations_end_at_the_samples(diffused, tmp_path, options, steps):
    words = options, "--run", diffused, "--out"
    command("sample.py --num 5", *words, tmp_path / "s.npz")
    images = images_of(tmp_path / "s.npz").repeat(2, 1).repeat(2, 2)

    command("demo.pictures trajectory --num 3", *words, tmp_path / "t.png")
    assert np.abs(tiles(tmp_path / "t.png", 3, 1)[:, 0] - images[:3]).max() <= 1
    with Image.open(tmp_path / "t.gif") as animation:
        assert 3 <= animation.n_frames <= 60 and animation.info["loop"] == 0
        assert steps is None or animation.n_frames == steps + 1

    words = *words, tmp_path / "i.png"
    command("demo.pictures interpolate 1 4 --num 5", *words)
    noise, label, both = tiles(tmp_path / "i.png", 3, 5)
    for row in (noise, label, both):
        assert np.abs(row[0] - images[1]).max() <= 1 and not np.array_equal(row[1], row[2])
    assert not np.array_equal(noise[-1], label[-1])
    if "heun" in options:                                    # the others' steps keep the noise of A
        assert np.abs(both[-1] - images[4]).max() <= 1
    command("demo.pictures interpolate 1 11 --num 3", *words)
    assert Image.open(tmp_path / "i.png").height < 100, "of one class: a single row"
    assert "two different images" in refused("demo.pictures interpolate 1 1", *words)


def test_curves_and_embeddings_are_drawn(whole, tmp_path):
    lanes, out = [whole / name / "align" for name in ("plain", "aligned")], tmp_path / "x.png"
    command("demo.pictures curves", *lanes, "--out", out)
    width, height = Image.open(out).size
    assert width == 900 and height % 200 == 0 and height >= 800     # three panels a row
    for method in ("tsne", "pca"):
        command("demo.pictures embedding --num 90 --method", method, whole / "scenes.zip", "--vae",
                *lanes, "--out", tmp_path / f"{method}.png")
        assert Image.open(tmp_path / f"{method}.png").width > 800
    assert "ends in .png" in refused("demo.pictures curves", *lanes, "--out x.jpg")


def test_the_study_of_starts_begins_with_the_plain_autoencoder_of_the_seed(tmp_path):
    starts = command("demo.study --starts --dry-run --out", tmp_path).stdout
    assert starts.count("sample.py") == 3 * 4
    assert starts.count(f"--init {tmp_path}/seed1/plain/vae --teacher {tmp_path}/teacher") == 1
    assert starts.count("--steps 2800") == 3
    shorter = command("demo.study --starts --steps 6 --dry-run --out", tmp_path).stdout
    assert len(re.findall("align latents .* --steps 12 ", shorter)) == 3     # the last one counts
    done = set()                                         # however many lanes run side by side
    for part in demo.study.Plan("starts").parts():
        assert all((run.seed, "plain") in done for run in part if run.name in demo.study.STARTS)
        done.update((run.seed, run.name) for run in part)


def test_the_study_of_teachers_compares_like_with_like(tmp_path):
    """Outside teachers and their controls have the weight that was chosen and see the same pixels;
    a length has one set of flags for all; without the second judge nothing begins."""
    study, words = demo.study, "demo.study --teachers --data images.zip --dry-run --out"
    jobs = [split([job]) for job in command(words, tmp_path).stdout.splitlines()]
    assert sum("sample.py" in job for job in jobs) == len(study.Plan("teachers").runs()) == 74
    weight = " ".join(map(str, study.WEIGHT))
    assert study.AUTOENCODERS[study.CHOSEN] == study.outside("lite0", study.WEIGHT)
    arms = [" ".join(job) for job in jobs if "--stage align latents" in " ".join(job)]
    for name, teacher in ((study.CHOSEN, "lite0"), ("outside, untrained", "lite0_random"),
                          ("outside, patches only", "lite0"),
                          ("outside, class token only", "lite0"),
                          ("outside, centred patches only", "lite0_centred")):
        folder = study.folder_of(Path(), 0, name).name
        assert sum(f"efficientnet:{teacher} --teacher-size 128 {weight} --out" in arm
                   for arm in arms if arm.endswith(f"/{folder}")) == 3
    for length in (2400, 9600):
        flags = {re.sub("seed[0-9]/[^ ]*|--seed [0-9]", "", " ".join(job)) for job in jobs
                 if "sit" in job and str(length) in job}
        assert len(flags) == 1
    with mock.patch.dict(demo.efficientnet.FILES, {1: "none"}):
        assert "Lite1" in refused("demo.study --teachers --data images.zip --out", tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_study_plans_measures_and_reports(whole, tmp_path):
    """Its plan has every seed, length, family and guidance for both; what is there is measured
    once, with the figures of the demo's report; what is missing is not in the tables."""
    study, out, runs = demo.study, tmp_path / "study", {}
    jobs = command("demo.study --steps 6 --num 20 --dry-run --out", out).stdout.splitlines()
    sets = 2 * 3 * 3 * 2 * 3 + 2 * 3 * 3 + len(study.CONTROLS) + len(study.ABLATIONS) + 2 * 3
    assert sum("sample.py" in job for job in jobs) == sets == 150
    assert len(jobs) == len(set(jobs)) and not out.exists()
    for name, autoencoder in (("plain", "vae"), ("aligned", "align")):  # those of the demo
        run = runs[name] = study.Run(0, name, "sit", 6, "no guidance")
        folder, samples = study.folder_of(out, 0, name), study.samples_of(out, run)
        for source, target in ((autoencoder, autoencoder), ("latents", "latents"),
                               ("align", "mlps/align"), ("sit", "sit-6/sit")):
            shutil.copytree(whole / name / source, folder / target)
        for ending in (".npz", ".json"):
            shutil.copy(whole / name / f"samples{ending}", samples.with_suffix(ending))
    for name in ("judge", "teacher"):
        shutil.copytree(whole / name, out / name)
    seconds = {study.timing_name(study.samples_of(out, run), out): 1.5 for run in runs.values()}
    train.write_json(seconds, out / "timings.json")

    plan, file = study.Plan("scenes", 6, 20), out / "results.jsonl"
    results = study.last_of_each(study.measure(plan, out))
    lines = file.read_text().splitlines()
    assert len(lines) == len(results) == 4
    report = train.read_json(whole / "report.json")
    for name, run in runs.items():
        of_autoencoder, of_samples = results[0, name], results[run]
        for key in ("PSNR of reconstructions, dB", "linear probe on latents, accuracy",
                    "masks from latents, mIoU", "cosine to the teacher, patches"):
            assert of_autoencoder[key] == pytest.approx(report[name][key], rel=1e-5)
        for key in ("FD of samples", "class accuracy of samples",
                    "FD of samples to own reconstructions"):
            expected = report[name][f"{key}, no guidance"]
            found = of_samples[key.replace(" of samples", "")]
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-8)
        channels, rings = of_autoencoder["channels"], of_autoencoder["rings"]
        assert sum(channels) == pytest.approx(1) == sum(rings) and len(channels) == 8
        assert 1 <= of_autoencoder["dimensions"] <= 8 * 8 * 8
        assert 0 <= of_samples["precision"] <= 1 <= of_samples["IS"] <= 10
    study.measure(plan, out)
    assert file.read_text().splitlines() == lines
    assert "--num 20" in refused("demo.study --steps 6 --num 30 --dry-run --out", out)
    judge = out / "judge/judge.safetensors"
    weights = safetensors.torch.load_file(judge)
    weights["classifier.bias"] += 1
    safetensors.torch.save_file(weights, judge)                     # another judge: all is due anew
    results = study.last_of_each(study.measure(plan, out))
    assert len(results) == 4 and len(file.read_text().splitlines()) == 8

    study.write_report(plan, out)
    text = (out / "report.md").read_text()
    plain, aligned = (results[run]["FD"] for run in runs.values())
    change = f"{100 * (aligned / plain - 1):.0f} %"
    assert f"| SiT | 6 | no guidance | {plain:.2f} | {aligned:.2f} | {change} |" in text
    assert "| 20 samples of SiT, no guidance | 1.5 (1.5 to 1.5) | 1.5 (1.5 to 1.5) | +0 % |" in text
    assert "2 of the 150 sets are there" in text
    assert "| DiT |" not in text and "guidance 1.5 |" not in text
    assert Image.open(out / "samples.png").width > 250 and not (out / "fd.png").exists()


def test_the_tables_of_the_demos_readme_are_those_of_its_results():
    """All tables of the scenes, the main ones of CIFAR-10, those over the seeds of the starts; no
    set of these plans is missing."""
    readme = (HERE / "demo/README.md").read_text().splitlines()
    for words, sets, least in (("demo/study.jsonl", 150, 60),
                               ("demo/study-cifar10.jsonl --data cifar10.zip", 12, 8),
                               ("demo/study-starts.jsonl --starts", 12, 8)):
        said = command("demo.study tables", words).stdout
        assert f"{sets} of the {sets} sets are there" in said
        said = said.split("## Why")[0] if "cifar10" in words else said
        said = said.split("## Starts")[1].split("## Cost")[0] if "starts" in words else said
        tables = [line for line in said.splitlines() if line.startswith(("|", "*"))
                  and ("starts" not in words or "(3)" in line)]
        assert len(tables) >= least and set(tables) <= set(readme)


def test_the_tables_of_teachers_are_those_of_their_results():
    """The rows that README shows of them; no set is missing."""
    readme = (HERE / "demo/README.md").read_text().split("### A teacher from outside")[1]
    said = command("demo.study tables demo/study-teachers.jsonl --teachers").stdout
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert len(rows) >= 30 and set(rows) <= set(said.splitlines())
    assert "74 of the 74 sets are there" in said


def test_white_latents_have_all_dimensions_and_a_flat_spectrum():
    """The share of the smallest ring, with 80,000 numbers, has a deviation of 0.5 %."""
    dimensions, rings = demo.study.latent_spectrum(torch.randn(40_000, 2, 4, 4))
    assert 31 < dimensions <= 32
    counts = np.bincount([round(math.hypot(a, b)) for a in (0, 1, 2, 1) for b in (0, 1, 2, 1)])
    np.testing.assert_allclose(rings, counts / 16, rtol=0.05)
    flat = torch.randn(4000, 2, 1, 1).expand(-1, -1, 4, 4)
    dimensions, rings = demo.study.latent_spectrum(flat)
    assert 1.9 < dimensions <= 2.001 and rings[0] == pytest.approx(1)


# --------------------------------------------------------------------------------------------------
# The house

def test_nothing_holds_a_device_of_its_own():
    """Networks, losses and samplers on meta, where a tensor on the CPU would not fit in."""
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    autoencoder = vae.AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1,
                                    norm_num_groups=8, latents_mean=[0.0] * 4,
                                    latents_std=[1.0] * 4).to("meta")
    teacher = align.DINOv2(embed_dim=24, depth=2, num_heads=2).to("meta")
    heads = align.AlignmentHeads(4, 24, 8, 2).to("meta")
    discriminator = vae.PatchDiscriminator(ndf=8).to("meta")
    x, y = empty(2, 3, 64, 64), empty(2, dtype=torch.long)
    rec, posterior, z = autoencoder(x)
    loss, _ = vae.autoencoder_loss(
        x, rec, posterior, perceptual_weight=1.0, lpips=vae.LPIPS().to("meta"), disc_weight=1.0,
        discriminator=discriminator, last_layer=autoencoder.decoder.conv_out.weight)
    target = heads.standardize(*align.teacher_tokens(teacher, x, 224))
    (loss + align.align_loss(*heads(z), *target)[0]).backward()
    vae.hinge_d_loss(discriminator(x), discriminator(rec.detach())).backward()
    assert vae.psnr(x, rec).is_meta and vae.ssim(x, rec).is_meta and posterior.kl().is_meta
    assert align.SegmentationHead(24, 5).to("meta")(empty(2, 24, 4, 4)).is_meta
    assert align.DepthHead(24).to("meta")(empty(2, 24, 4, 4), empty(2, 24)).is_meta
    z = empty(2, 4, 8, 8)
    for family, module, samplers in (("SiT", sit, sit.ODE_SAMPLERS + sit.SDE_SAMPLERS),
                                     ("DiT", dit, ("ddpm", "ddim"))):
        net = module.create(f"{family}-S/2", input_size=8, num_classes=5).to("meta")
        t = empty(2) if module is sit else y
        module.training_loss(net, z, y, t=t, eps=z).mean().backward()
        for name in samplers:
            if name != "dopri5":                             # which looks at the error of its steps
                with mock.patch.object(module, "check_sampling"):   # and this at the labels
                    out = module.sample(net, z, y, sampler=name, num_steps=3, cfg_scale=2.0,
                                        noise=lambda i: z)
                assert autoencoder.decode(autoencoder.denormalize(out)).sample.is_meta
    inception = fid.InceptionV3().to("meta")
    assert all(part.is_meta for part in inception(empty(2, 3, 299, 299)))


@pytest.mark.parametrize("name", ["vae", "align", "sit", "dit", "fid"])
def test_a_file_stands_alone(tmp_path, name):
    shutil.copy(HERE / f"{name}.py", tmp_path)
    script = f"import sys; sys.path.insert(0, '.'); import {name}"
    done = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_ci_runs_what_the_readme_says():
    readme, ci = (HERE / "README.md").read_text(), (HERE / ".ci" / "run").read_text()
    start = "pip install -r requirements.txt"
    commands = [line for line in readme.splitlines() if line.startswith(start)]
    assert len(commands) == 2 and commands[1] in ci
    assert commands[0].endswith("&& python train.py")
