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


# ---------------------------------------------------------------------------------------------------------------------
# vae.py

TINY_VAE = dict(block_out_channels=(32, 64), layers_per_block=1)


@pytest.fixture(scope="session")
def stable_diffusion():
    """The autoencoder of Stable Diffusion with filled weights."""
    return fill(vae.AutoencoderKL())


def autoencoder_outputs(model, x, z, seed):
    """All that a reference entry of the autoencoder records."""
    torch.manual_seed(seed)
    with torch.no_grad():
        out, posterior = model.encoder(x), model.encode(x).latent_dist
        drawn = posterior.sample()
        z_seeded = posterior.sample(torch.Generator().manual_seed(seed + 1))
        return {"encoder_out": out, "parameters": torch.cat([posterior.mean, posterior.logvar], 1),
                "mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std, "mode": posterior.mode(),
                "kl": posterior.kl(), "decode_z": model.decode(z).sample, "sample_global_rng": drawn, "sample": drawn,
                "sample_generator": z_seeded, "recon_mode": model.decode(posterior.mode()).sample,
                "recon_sample": model.decode(z_seeded).sample, "scalars": {"kl": posterior.kl().mean().item()}}


@pytest.mark.parametrize("entry, x, z, seed", [
    ("vae_tiny_square", ((2, 3, 32, 32), 101, -1, 1), ((2, 4, 16, 16), 102), 103),
    ("vae_tiny_nonsquare", ((2, 3, 32, 48), 104, -1, 1), ((2, 4, 16, 24), 105), 106),
    ("vae_compvis_tiny", ((2, 3, 32, 32), 131, -1, 1), ((2, 4, 16, 16), 132), 133),
    ("vae_names_tiny", ((1, 3, 32, 32), 141, -1, 1), ((1, 4, 16, 16), 0), 0),
    ("vae_sd_64", ((1, 3, 64, 64), 111, -1, 1), ((1, 4, 8, 8), 112), 113),
    ("vae_sd_64x96", ((1, 3, 64, 96), 114, -1, 1), ((1, 4, 8, 12), 115), 116),
    ("vae_compvis_sd", ((1, 3, 64, 64), 134, -1, 1), ((1, 4, 8, 8), 135), 136),
    ("vae_names_sd", ((1, 3, 64, 64), 142, -1, 1), ((1, 4, 8, 8), 0), 0)])
def test_autoencoder_equals_official_figures(stable_diffusion, entry, x, z, seed):
    model = fill(vae.AutoencoderKL(**TINY_VAE)) if "tiny" in entry else stable_diffusion
    kinds = [k for k in ("float32", "float64") if any(k in v for n, v in REFERENCE[entry].items() if n != "scalars")]
    for kind in kinds:
        dtype = getattr(torch, kind)
        check_all(entry, autoencoder_outputs(model.to(dtype), array(*x).to(dtype), array(*z).to(dtype), seed))
    model.float()


def test_posterior_equals_official_figures():
    for dtype in (torch.float32, torch.float64):
        posterior = vae.DiagonalGaussian((array((2, 8, 6, 6), 121) * 25).to(dtype))
        other = vae.DiagonalGaussian(array((2, 8, 6, 6), 122).to(dtype))
        torch.manual_seed(123)
        check_all("vae_posterior_clamp", {
            "mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std, "var": posterior.var,
            "kl": posterior.kl(), "kl_other": posterior.kl(other), "nll_of_other_mean": posterior.nll(other.mean),
            "sample": posterior.sample()})


def test_autoencoder_has_the_size_of_stable_diffusions(stable_diffusion):
    assert sum(p.numel() for p in stable_diffusion.parameters()) == 83_653_863
    assert len(stable_diffusion.state_dict()) == 248


def same_autoencoder(a, b, x):
    """Two autoencoders, ours or diffusers', give the same latents and images."""
    with torch.no_grad():
        z = a.encode(x).latent_dist.mean
        torch.testing.assert_close(b.encode(x).latent_dist.mean, z, rtol=1e-4, atol=5e-5)
        torch.testing.assert_close(b.decode(z).sample, a.decode(z).sample, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("config", [
    dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=32),
    dict(block_out_channels=(16, 48, 24), layers_per_block=3, norm_num_groups=8, latent_channels=7, in_channels=1,
         out_channels=2, sample_size=32)])
def test_autoencoder_and_diffusers_read_each_others_folders(tmp_path, config):
    torch.manual_seed(0)
    numbers = torch.rand(2, config.get("latent_channels", 4)).tolist()
    ours = fill(vae.AutoencoderKL(**config, latents_mean=numbers[0], latents_std=numbers[1]))
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours").eval()
    x = array((2, config.get("in_channels", 3), 32, 48), 1, -1, 1)
    same_autoencoder(ours, theirs, x)
    theirs.save_pretrained(tmp_path / "theirs")
    text = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**text, "my_note": [1, 2]}))
    back = vae.AutoencoderKL.from_pretrained(tmp_path / "theirs")
    same_autoencoder(ours, back, x)
    back.save_pretrained(tmp_path / "back")                                      # what we do not know is kept
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["my_note"] == [1, 2] and config["_diffusers_version"] == diffusers.__version__
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "back")
    assert [list(again.config.latents_mean), list(again.config.latents_std)] == numbers
    z = torch.randn(2, len(numbers[0]), 3, 3)
    torch.testing.assert_close(back.denormalize(back.normalize(z)), z)
    torch.testing.assert_close(back.normalize(z)[:, 1], (z[:, 1] - numbers[0][1]) / numbers[1][1])


def test_the_papers_example(tmp_path, stable_diffusion):
    """Its lines, with another import; the folder is Stable Diffusion's, which diffusers reads too."""
    stable_diffusion.save_pretrained(tmp_path)
    AutoencoderKL, path = vae.AutoencoderKL, str(tmp_path)
    autoencoder = AutoencoderKL.from_pretrained(path)
    x = array((1, 3, 64, 64), 142, -1, 1)
    with torch.no_grad():
        z = autoencoder.encode(x).latent_dist.sample()
        assert z.shape == (1, 4, 8, 8) and autoencoder.decode(z).sample.shape == x.shape
    same_autoencoder(diffusers.AutoencoderKL.from_pretrained(path), autoencoder, x)
    config = json.loads((tmp_path / "config.json").read_text())
    written = REFERENCE["vae_names_sd"]["config_json"]
    assert all(written[name] == value for name, value in config.items() if name != "sample_size")


def test_older_names_and_files_load(tmp_path, stable_diffusion):
    ours = fill(vae.AutoencoderKL(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8))
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

    # CompVis: the names as the official code lists them, in a whole checkpoint and in one of the autoencoder alone
    names = {new: before for before, new in REFERENCE["vae_compvis_sd"]["names"].items()}
    weights = {names[k]: v[:, :, None, None] if ".attentions.0.to_" in k and v.ndim == 2 else v
               for k, v in stable_diffusion.state_dict().items()}
    extra = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(64)}
    torch.save({"state_dict": {**weights, **extra}, "global_step": 7}, tmp_path / "model.ckpt")
    loaded = vae.AutoencoderKL.from_pretrained(tmp_path / "model.ckpt")
    outputs = autoencoder_outputs(loaded, array((1, 3, 64, 64), 134, -1, 1), array((1, 4, 8, 8), 135), 136)
    check_all("vae_compvis_sd", outputs)
    whole = {**{f"first_stage_model.{k}": v for k, v in weights.items()}, "model.diffusion_model.out.2.bias": extra}
    assert vae.diffusers_names(whole).keys() == stable_diffusion.state_dict().keys()

    # a number of levels that the list does not have, against diffusers' own conversion
    names = []
    for side, way, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        parts = ["norm_out.weight", "mid.block_2.norm1.bias", "mid.attn_1.norm.bias", "mid.attn_1.v.weight"]
        for i in range(3):
            parts += [f"{way}.{i}.block.0.nin_shortcut.bias", f"{way}.{i}.block.2.conv2.weight"]
            parts += [f"{way}.{i}.{sampler}.conv.weight", f"{way}.{i}.{sampler}.conv.bias"]
        names += [f"{side}.{part}" for part in parts]
    weights = {name: torch.full((1, 1, 1, 1), float(i)) for i, name in enumerate(names)}
    theirs = convert_ldm_vae_checkpoint(weights, {"up_block_types": [0] * 3, "down_block_types": [0] * 3})
    for name, value in vae.diffusers_names(weights).items():
        assert theirs[name].item() == value.item(), name


def test_safetensors_both_ways(tmp_path):
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16,
              torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {f"{dtype}": (8 * torch.randn(3, 5)).to(dtype) for dtype in dtypes}
    tensors.update(empty=torch.empty(0, 3), scalar=torch.tensor(2.5), strided=torch.randn(2, 3, 4, 4).to(
        memory_format=torch.channels_last), transposed=torch.randn(4, 2).T)
    vae.save_safetensors(tensors, tmp_path / "ours.safetensors")
    theirs = {name: value.contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors", metadata={"format": "pt", "note": "{}"})
    for loaded in (safetensors.torch.load_file(tmp_path / "ours.safetensors"),
                   vae.load_weights(tmp_path / "theirs.safetensors"), vae.load_weights(tmp_path / "ours.safetensors")):
        assert loaded.keys() == tensors.keys()
        for name, value in tensors.items():
            assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
            assert torch.equal(loaded[name].double(), value.double())
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def safetensors_file(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry_of(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("content", [
    b"", b"\x07\0\0", safetensors_file({"a": entry_of()})[:-1], safetensors_file({"a": entry_of()}, length=2 ** 62),
    safetensors_file({"a": entry_of()}, length=70), safetensors_file({"a": entry_of(), "b": entry_of(4, 12)}),
    safetensors_file({"a": entry_of(8, 16)}), safetensors_file({"a": entry_of(0, 4)}, b"\0" * 4),
    safetensors_file({"a": entry_of(0, 2 ** 40, [2 ** 38])}), safetensors_file({"a": entry_of(shape=[-1, -2])}),
    safetensors_file({"a": entry_of(shape=[2.0])}), safetensors_file({"a": entry_of(shape=[True, 2])}),
    safetensors_file({"a": entry_of(dtype="F31")}), safetensors_file({"a": entry_of()}, b"\0" * 12),
    safetensors_file({"a": entry_of(-8, 0)}), safetensors_file(["a"]), safetensors_file({"a": 1}),
    safetensors_file(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
                     b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
    safetensors_file(b'{"a":'), safetensors_file(b"\xff\xfe"), safetensors_file(b"[" * 100000)])
def test_a_damaged_safetensors_file_is_one_clear_line(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.safetensors") as error:
        vae.load_weights(path)
    assert "\n" not in str(error.value)


def test_other_files_of_weights_are_refused_in_one_line(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickle.safetensors")
    torch.save({"a": Path("x")}, tmp_path / "code.bin")
    torch.save({"a": "text"}, tmp_path / "text.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "pickle.safetensors").read_bytes()[:-200])
    (tmp_path / "noise.ckpt").write_bytes(b"noise" * 100)
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("pickle.safetensors", "code.bin", "text.bin", "cut.bin", "noise.ckpt", "empty.pth"):
        with pytest.raises(ValueError, match=name) as error:
            vae.load_weights(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.bin"):
        vae.load_weights(tmp_path / "none.bin")


def autoencoder_folder(tmp_path, **config):
    """A small autoencoder's folder, whose config.json is changed by `config`."""
    vae.AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8).save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**text, **config}))
    return tmp_path


@pytest.mark.parametrize("config, says", [
    (dict(act_fn="relu"), "act_fn"), (dict(use_quant_conv=False), "use_quant_conv"),
    (dict(down_block_types=["AttnDownEncoderBlock2D"] * 2), "down_block_types"),
    (dict(layers_per_block=2), r"missing \(encoder.down_blocks.0.resnets.1.norm1.weight, .*\.\.\.\)"),
    (dict(block_out_channels=[8, 8]), "of another shape"), (dict(block_out_channels=[8]), "unexpected"),
    (dict(norm_num_groups=3), "norm_num_groups"), (dict(norm_num_groups=0), "norm_num_groups"),
    (dict(latents_mean=[0.0], latents_std=[1.0]), "latents_mean"), (dict(latents_mean=[0.0] * 4), "one is missing"),
    (dict(block_out_channels=None), "block_out_channels")])
def test_a_folder_that_does_not_fit_is_one_clear_line(tmp_path, config, says):
    with pytest.raises(ValueError, match=says) as error:
        vae.AutoencoderKL.from_pretrained(autoencoder_folder(tmp_path, **config))
    assert "\n" not in str(error.value)


def test_folders_without_their_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        vae.AutoencoderKL.from_pretrained(tmp_path)
    folder = autoencoder_folder(tmp_path)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
        vae.AutoencoderKL.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        vae.AutoencoderKL.from_pretrained(folder)
    vae.save_safetensors({"a": torch.zeros(2)}, folder / "other.safetensors")
    with pytest.raises(ValueError, match="no autoencoder"):
        vae.AutoencoderKL.from_pretrained(folder / "other.safetensors")


@pytest.mark.parametrize("x, says", [
    (torch.zeros(1, 3, 32, 33), "multiples of 2"), (torch.zeros(1, 4, 32, 32), "3, H, W"),
    (torch.zeros(3, 32, 32), "3, H, W"), (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "float"),
    (torch.full((1, 3, 32, 32), 128.0), "255"), (torch.full((1, 3, 32, 32), float("nan")), "nan"),
    (torch.zeros(0, 3, 32, 32), "3, H, W")])
def test_images_that_are_none_are_refused(x, says):
    model = vae.AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8)
    with pytest.raises(ValueError, match=says):
        model.encode(x)
    with pytest.raises(ValueError, match="4, h, w"):
        model.decode(torch.zeros(1, 3, 8, 8))


def test_upsampling_is_nearest_neighbour_and_a_convolution():
    layer, x = fill(vae.Upsample(6)), torch.randn(2, 6, 5, 7)
    expected = layer.conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(layer(x), expected)


def published_lin():
    """The file of LPIPS' published weights, as the package brings it."""
    return importlib.metadata.distribution("lpips").locate_file("lpips/weights/v0.1/vgg.pth")


def filled_lpips(gain, lin=None):
    """LPIPS with a filled VGG16, and with published weights `lin` or filled ones."""
    lpips = vae.LPIPS(lin=lin)
    fill(nn.ModuleDict({"features": lpips.features}))                            # features.N.weight
    for conv in lpips.features.values():
        conv.weight.data *= gain
    if lin is None:
        for i, conv in enumerate(lpips.lin):
            fill(nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": nn.ModuleList([nn.Identity(), conv])})}))
    return lpips


@pytest.mark.parametrize("entry, seed, width, gain, published", [
    ("lpips_real_lin", 201, 64, 1, True), ("lpips_real_lin_gain", 203, 48, 2 ** 0.5, True),
    ("lpips_filled_lin_gain", 205, 64, 2 ** 0.5, False)])
def test_lpips_equals_official_figures(entry, seed, width, gain, published):
    """By the means over the batch, which are not rounded: the deviation between its two images is tiny."""
    lpips = filled_lpips(gain, published_lin() if published else None)
    for dtype, relative in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        x, y = (array((2, 3, 64, width), seed + i, -1, 1).to(dtype) for i in (0, 1))
        with torch.no_grad():
            value, stages = lpips.to(dtype)(x, y), lpips.by_stage(x, y)
        figures = REFERENCE[entry]
        kind = str(dtype).split(".")[1]
        for name, got in (("value", value), *((f"layer{i}", stages[:, i]) for i in range(5))):
            assert got.mean().item() == pytest.approx(figures[name][kind]["mean"], rel=relative, abs=1e-9), name
            np.testing.assert_allclose(got, figures[name][kind]["values"], rtol=relative, atol=1e-7)


def test_lpips_reads_the_published_weights():
    figures = REFERENCE["lpips_vgg_v0.1_lin_weights"]
    check("lpips_vgg_v0.1_lin_weights", {f"lin{i}.model.1.weight": conv.weight
                                         for i, conv in enumerate(vae.LPIPS(lin=published_lin()).lin)})
    assert sum(name.startswith("lin") for name in figures) == 5


def test_discriminator_equals_official_figures():
    for dtype in (torch.float32, torch.float64):
        model = fill(vae.PatchDiscriminator()).to(dtype)
        real, fake = (array((2, 3, 64, 64), seed, -1, 1).to(dtype) for seed in (211, 212))
        outputs = {"eval_logits_real": model(real), "eval_logits_fake": model(fake)}
        model.train()
        outputs.update(train_logits_real=model(real), train_logits_fake=model(fake))
        d_loss = vae.hinge_d_loss(outputs["train_logits_real"], outputs["train_logits_fake"])
        g_loss = vae.hinge_g_loss(outputs["train_logits_fake"])
        outputs["d_hinge_grad_first_conv"] = torch.autograd.grad(d_loss, model.main[0].weight, retain_graph=True)[0]
        outputs["g_grad_last_conv"] = torch.autograd.grad(g_loss, model.main[11].weight, retain_graph=True)[0]
        for i in (3, 6, 9):
            outputs[f"after_train_main.{i}.running_mean"] = model.main[i].running_mean
            outputs[f"after_train_main.{i}.running_var"] = model.main[i].running_var
        check_all("patchgan_64_3", {**outputs, "scalars": {"hinge_d_loss": d_loss.item(),
                                                           "generator_loss": g_loss.item()}})


def test_gan_losses_equal_official_figures():
    real, fake = array((2, 1, 6, 6), 215).double(), array((2, 1, 6, 6), 216).double()
    scalars = {name: value["float64"] for name, value in REFERENCE["gan_losses"]["scalars"].items()}
    assert vae.hinge_d_loss(real, fake).item() == pytest.approx(scalars["hinge_d_loss"], rel=1e-6)
    assert vae.hinge_g_loss(fake).item() == pytest.approx(scalars["generator_loss"], rel=1e-6)

    conv = fill(nn.Conv2d(4, 3, 3, padding=1)).double()
    r = conv(array((2, 4, 9, 7), 217).double())
    nll, g = (r - array((2, 3, 9, 7), 218)).abs().sum() / 2, -(torch.tanh(r) ** 3).mean()
    scalars = REFERENCE["adaptive_weight"]["scalars"]                            # with its weight of 0.5
    weight, limit = (0.5 * vae.adaptive_weight(nll, c * g, conv.weight).item() for c in (1, 1e-12))
    assert weight == pytest.approx(scalars["d_weight"]["float64"], rel=1e-6)
    assert limit == pytest.approx(scalars["d_weight_g_times_1e-12"]["float64"], rel=1e-6) == 5000


@pytest.mark.parametrize("entry, seed, disc_start, s", [
    ("lpips_with_disc_hinge", 221, 0, 0.0), ("lpips_with_disc_before_start", 231, 50001, 0.3)])
def test_autoencoder_loss_equals_compvis_figures(entry, seed, disc_start, s):
    """LPIPSWithDiscriminator at step 10, by the equivalence that autoencoder_loss states; s is its log variance.
    One activation of the discriminator on the real images lies 5.5e-7 from the kink of its
    LeakyReLU, as much as its error in float32: a CPU's kernels may turn it over, which moves the
    gradient of the first layer by 5e-3."""
    count, gain = 3 * 64 * 64, math.exp(-s)
    for dtype in (torch.float32, torch.float64):
        x, h, moments = (array(shape, seed + i, *bounds).to(dtype) for i, (shape, bounds) in enumerate(
            [((2, 3, 64, 64), (-1, 1)), ((2, 8, 64, 64), ()), ((2, 8, 8, 8), ())]))
        lpips = filled_lpips(2 ** 0.5, published_lin()).to(dtype)
        discriminator = fill(vae.PatchDiscriminator()).to(dtype).train()
        conv = fill(nn.Conv2d(8, 3, 3, padding=1)).to(dtype)
        rec, posterior = conv(h), vae.DiagonalGaussian(moments)
        total, parts = vae.autoencoder_loss(
            x, rec, posterior, pixel_loss="l1", kl_weight=1e-6 / gain / count, perceptual_weight=1.0, lpips=lpips,
            disc_weight=0.5, disc_start=disc_start, step=10, discriminator=discriminator, last_layer=conv.weight)
        assert ("gan" in parts) == (disc_start == 0)
        kind = str(dtype).split(".")[1]
        figures = {name: value[kind] for name, value in REFERENCE[entry]["scalars"].items()}
        near = functools.partial(pytest.approx, rel=1e-6 if kind == "float64" else 1e-4)
        nll = (parts["l1"] + parts["lpips"]).item()
        assert gain * count * total.item() + count * s == near(figures["log0_total_loss"])
        assert count * (gain * nll + s) == near(figures["log0_nll_loss"])
        assert parts["kl"].item() == near(figures["log0_kl_loss"]) and nll == near(figures["log0_rec_loss"])
        if disc_start == 0:
            assert count * parts["d_weight"].item() == near(figures["log0_d_weight"])
            assert parts["gan"].item() == near(figures["log0_g_loss"])
        outputs = {"reconstructions": rec, "kl": posterior.kl(), "grad_last_layer_of_loss":
                   gain * count * torch.autograd.grad(total, conv.weight, retain_graph=True)[0]}
        if disc_start == 0:
            d_loss = vae.hinge_d_loss(discriminator(x), discriminator(rec.detach()))
            assert d_loss.item() == near(figures["log1_disc_loss"])
            outputs["grad_disc_first_conv"], outputs["grad_disc_last_conv"] = torch.autograd.grad(
                d_loss, (discriminator.main[0].weight, discriminator.main[11].weight))
            first = outputs.pop("grad_disc_first_conv")
            check(entry, {"grad_disc_first_conv": first}, float32=1e-2)
        check(entry, outputs)


def test_one_step_moves_every_parameter():
    """From a fresh start; and LPIPS sends its gradient to the decoder."""
    torch.manual_seed(0)
    autoencoder = vae.AutoencoderKL(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
    net = train.Autoencoder(autoencoder, align.AlignmentHeads(4, 24, 32))
    discriminator, lpips = vae.PatchDiscriminator(ndf=8), vae.LPIPS()
    before = {id(p): p.detach().clone() for module in (net, discriminator) for p in module.parameters()}
    opt, d_opt = (torch.optim.SGD(module.parameters(), lr=1.0) for module in (net, discriminator))
    x = array((4, 3, 32, 32), 3, -1, 1)
    rec, posterior, features = net(x, torch.randn(4, 4, 16, 16))
    grad = torch.autograd.grad(lpips(rec, x).mean(), autoencoder.decoder.conv_out.weight, retain_graph=True)[0]
    assert grad.abs().max() > 0, "LPIPS sends no gradient to the decoder"
    total, parts = vae.autoencoder_loss(x, rec, posterior, perceptual_weight=1.0, lpips=lpips, disc_weight=0.5,
                                        discriminator=discriminator, last_layer=autoencoder.decoder.conv_out.weight)
    assert set(parts) == {"mse", "kl", "lpips", "gan", "d_weight"}
    loss, _ = align.align_loss(*features, torch.randn(4, 64, 24), torch.randn(4, 24))
    (total + loss).backward()
    opt.step()
    d_opt.zero_grad()
    discriminator.main[-1].bias.data.fill_(0.95)                                 # some logits beyond the hinge
    vae.hinge_d_loss(discriminator(x), discriminator(rec.detach())).backward()
    d_opt.step()
    for module in (net, discriminator):
        for name, parameter in module.named_parameters():
            # a bias of the keys shifts all scores alike: softmax gives it no gradient
            moved = not torch.equal(parameter, before[id(parameter)])
            assert moved or name.endswith("to_k.bias"), f"{name} has not moved"
    assert all(parameter.grad is None for parameter in lpips.parameters())


def test_checkpointing_and_bfloat16_leave_the_loss_as_it_is():
    torch.manual_seed(0)
    model = fill(vae.AutoencoderKL(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)).train()
    discriminator, lpips = fill(vae.PatchDiscriminator(ndf=8)).train(), filled_lpips(2 ** 0.5)
    x, noise, results = array((2, 3, 32, 32), 3, -1, 1), torch.randn(2, 4, 16, 16), {}
    for kind in ("plain", "checkpointing", "bfloat16"):
        if kind == "checkpointing":
            model.enable_gradient_checkpointing()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
            rec, posterior, _ = model(x, noise)
            total, parts = vae.autoencoder_loss(
                x, rec, posterior, kl_weight=1e-4, perceptual_weight=1.0, lpips=lpips, disc_weight=0.5,
                discriminator=discriminator, last_layer=model.decoder.conv_out.weight)
            # as the adaptive weight of the alignment: a gradient through the whole decoder, then the real one
            weight = vae.adaptive_weight(total, posterior.mean.square().mean(), model.encoder.conv_out.weight)
        (weight * total).backward()
        results[kind] = total.item(), {name: p.grad.clone() for name, p in model.named_parameters()}
        assert posterior.mean.dtype == torch.float32
    assert results["checkpointing"][0] == pytest.approx(results["plain"][0], rel=1e-6)
    for name, grad in results["plain"][1].items():
        torch.testing.assert_close(results["checkpointing"][1][name], grad, rtol=1e-4, atol=1e-6)
    assert results["bfloat16"][0] == pytest.approx(results["plain"][0], rel=2e-2)


def one_deviation_off(mean, std):
    """Twice as many latents, with the mean and the deviation of samples, without their chance."""
    return torch.cat([mean - std, mean + std])


def test_latent_statistics_are_those_of_samples():
    model = fill(vae.AutoencoderKL(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8))
    x = array((40, 3, 16, 16), 3, -1, 1)
    mean, std = vae.latent_statistics(model, x.split(16))                        # batches of unequal size
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
    z = one_deviation_off(posterior.mean, posterior.std)
    torch.testing.assert_close(torch.tensor(mean), z.mean((0, 2, 3)), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(std), z.std((0, 2, 3)), atol=1e-3, rtol=0)


def test_psnr_and_ssim_equal_scikit_images():
    x = train.to_float(demo.scenes.draw_scenes(0, np.arange(3), 48)[0]).cpu().double()
    y = (x + 0.1 * array((3, 3, 48, 48), 4)).clamp(-1, 1)
    for i in range(3):
        a, b = x[i].numpy(), y[i].numpy()
        expected = structural_similarity(a, b, data_range=2, channel_axis=0, gaussian_weights=True, sigma=1.5,
                                         use_sample_covariance=False)
        assert vae.ssim(x, y)[i].item() == pytest.approx(expected, rel=1e-9)
        assert vae.psnr(x, y)[i].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2), rel=1e-9)
    torch.testing.assert_close(vae.ssim(x, x), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="11"):
        vae.ssim(x[..., :8], x[..., :8])


# ---------------------------------------------------------------------------------------------------------------------
# align.py

TINY_VIT = dict(embed_dim=96, depth=3, num_heads=3, img_size=70)


@pytest.fixture(scope="session")
def vits():
    """ViT-S/14 without and with registers, with filled weights."""
    return {name: fill(align.DINOv2(**align.DINOV2[name][0])) for name in ("dinov2_vits14", "dinov2_vits14_reg")}


@contextlib.contextmanager
def louder(model, pos, token):
    """The factors by which the reference entries multiply the tables that `fill` makes tiny."""
    tables = [(model.pos_embed, pos), (model.cls_token, token)]
    tables += [(model.register_tokens, token)] if model.num_registers else []
    before = [table.detach().clone() for table, _ in tables]
    with torch.no_grad():
        for table, factor in tables:
            table.mul_(factor)
        yield model
        for (table, _), value in zip(tables, before):
            table.copy_(value)


def dinov2_outputs(model, x, blocks):
    """All that a reference entry of DINOv2 records."""
    out, grid = model.forward_features(x), (x.shape[2] // model.patch_size, x.shape[3] // model.patch_size)
    out.update(forward=model(x), pos_embed_interpolated=model.interpolated_pos_embed(*grid),
               tokens_prepared=model.tokens(x), last_not_reshaped_not_normed=model.get_intermediate_layers(
                   x, norm=False)[0])
    for i, (patch, cls) in enumerate(model.get_intermediate_layers(x, blocks, reshape=True, return_class_token=True)):
        out.update({f"layer{i}_patch": patch, f"layer{i}_cls": cls})
    return out


@pytest.mark.parametrize("entry, shape, seed, factors", [
    ("dinov2_s14_224x224", (1, 3, 224, 224), 301, (500, 20)), ("dinov2_s14_98x98", (2, 3, 98, 98), 302, (500, 20)),
    ("dinov2_s14_140x196", (2, 3, 140, 196), 303, (500, 20)),
    ("dinov2_s14reg_224x224", (1, 3, 224, 224), 311, (500, 20)),
    ("dinov2_s14reg_98x98", (2, 3, 98, 98), 312, (500, 20)),
    ("dinov2_s14reg_140x196", (2, 3, 140, 196), 313, (500, 20)),
    ("dinov2_s14_98x98_plain_fill", (1, 3, 98, 98), 321, (1, 1)),
    ("dinov2_tiny_swiglu", (2, 3, 70, 56), 331, (50, 5))])
def test_dinov2_equals_official_figures(vits, entry, shape, seed, factors):
    tiny = "tiny" in entry
    model = fill(align.DINOv2(**TINY_VIT, ffn="swiglu")) if tiny else vits[
        "dinov2_vits14_reg" if "reg" in entry else "dinov2_vits14"]
    with louder(model, *factors):
        for kind in ("float32", "float64"):
            if any(kind in value for value in REFERENCE[entry].values()):
                dtype = getattr(torch, kind)
                check_all(entry, dinov2_outputs(model.to(dtype), array(shape, seed).to(dtype), 3 if tiny else 4))
        model.float()


def test_published_models_have_their_sizes():
    for name, (parameters, entries) in REFERENCE["dinov2_backbones"].items():
        with torch.device("meta"):
            model = align.DINOv2(**align.DINOV2[name][0])
        assert sum(p.numel() for p in model.parameters()) == parameters and len(model.state_dict()) == entries, name
    assert REFERENCE["dinov2_backbones"].keys() <= align.DINOV2.keys() and len(align.DINOV2) == 8


@pytest.mark.parametrize("registers, ffn, size", [(0, "mlp", (70, 70)), (4, "swiglu", (98, 56)), (4, "mlp", (70, 70))])
def test_dinov2_equals_hugging_faces(tmp_path, registers, ffn, size):
    """Without registers on the native grid only: there Hugging Face's interpolation is not the official one.
    The names are those of the files that it publishes, which any version reads; those of its
    modules change."""
    ours = fill(align.DINOv2(**TINY_VIT, num_registers=registers, ffn=ffn))
    names = {"cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
             "pos_embed": "embeddings.position_embeddings", "register_tokens": "embeddings.register_tokens",
             "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks": "encoder.layer",
             "attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1",
             "ls2.gamma": "layer_scale2.lambda1", "mlp.w12": "mlp.weights_in",
             "mlp.w3": "mlp.weights_out"}
    weights = {}
    for name, value in ours.state_dict().items():
        for official, theirs in names.items():
            name = name.replace(official, theirs)
        name = "layernorm" + name[4:] if name.startswith("norm.") else name
        for part, piece in zip(("query", "key", "value"), value.chunk(3)):
            if "attn.qkv" in name:
                weights[name.replace("attn.qkv", f"attention.attention.{part}")] = piece.clone()
            else:
                weights[name] = value
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    extra = dict(num_register_tokens=registers) if registers else {}
    getattr(transformers, f"{kind}Config")(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=70, patch_size=14,
        use_swiglu_ffn=ffn == "swiglu", **extra).save_pretrained(tmp_path)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, told = getattr(transformers, f"{kind}Model").from_pretrained(
        tmp_path, output_loading_info=True)
    assert not any(told.values()), told                         # every name and shape fits
    x = array((2, 3, *size), 5)
    with torch.no_grad():
        out, expected = ours.forward_features(x), theirs(x).last_hidden_state
    torch.testing.assert_close(out["x_norm_clstoken"], expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["x_norm_patchtokens"], expected[:, 1 + registers:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry, shape, seed, classes", [
    ("dinov2_seg_linear_voc", (1, 3, 112, 126), 341, 21), ("dinov2_seg_linear_ade_padded", (1, 3, 100, 131), 342, 150)])
def test_segmentation_head_equals_official_figures(vits, entry, shape, seed, classes):
    head = fill(align.SegmentationHead(384, classes))
    with louder(vits["dinov2_vits14"], 500, 20) as model:
        for dtype in (torch.float64, torch.float32):
            model, head, x = model.to(dtype), head.to(dtype), array(shape, seed).to(dtype)
            features = model.get_intermediate_layers(align.center_pad(x, 14), reshape=True)[0]
            logits = align.segment(model, head, x)
            best = logits.argmax(1) if dtype == torch.float64 else best
            # two classes of a pixel are 5e-6 apart, where float32 has errors of 3e-6
            assert (logits.argmax(1) != best).sum() <= 1
            check_all(entry, {"features_last": features, "logits": head(features), "logits_resized": logits,
                              "probabilities": logits.softmax(1), "scalars": {
                                  "argmax_sum": best.sum().item(), "argmax_classes_used": len(best.unique())}})
        model.float()


@pytest.mark.parametrize("entry, shape, seed, layers, farthest", [
    ("dinov2_depth_linear_nyu", (1, 3, 112, 126), 351, 1, 10.0),
    ("dinov2_depth_linear4_nyu", (1, 3, 98, 113), 352, 4, 10.0),
    ("dinov2_depth_linear_hub_as_is", (1, 3, 112, 126), 353, 1, 80.0)])
def test_depth_head_equals_official_figures(vits, entry, shape, seed, layers, farthest):
    head = fill(align.DepthHead(384, max_depth=farthest, num_layers=layers))
    with louder(vits["dinov2_vits14"], 500, 20) as model:
        for dtype in (torch.float32, torch.float64):
            model, x = model.to(dtype), array(shape, seed).to(dtype)
            head = head.to(dtype)
            head.bins = torch.linspace(0.001, farthest, 256, dtype=dtype)        # float32 is all that a cast leaves
            pairs = model.get_intermediate_layers(align.center_pad(x, 14), 1 if layers == 1 else (2, 5, 8, 11), True,
                                                  True, norm=False)
            depth = head(*zip(*pairs))
            check_all(entry, {"head_output": depth, "clamped": depth, "depth": align.estimate_depth(model, head, x)})
        model.float()


@pytest.mark.parametrize("entry, seed, name, layers", [("dinov2_classifier_1", 361, "dinov2_vits14", 1),
                                                       ("dinov2_classifier_4", 362, "dinov2_vits14_reg", 4)])
def test_classifier_equals_official_figures(vits, entry, seed, name, layers):
    head = fill(align.ClassificationHead(384, num_layers=layers))
    with louder(vits[name], 500, 20) as model:
        for dtype in (torch.float32, torch.float64):
            pairs = model.to(dtype).get_intermediate_layers(array((2, 3, 98, 98), seed).to(dtype), layers,
                                                            return_class_token=True)
            check_all(entry, {"logits": head.to(dtype)(pairs[-1][0], *(cls for _, cls in pairs))})
        model.float()


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
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Files.files, Files.cut, Files.asked = {}, None, []
        monkeypatch.setenv("REALS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")             # where a proxy leads outside
        monkeypatch.setattr(align, "DINOV2_ADDRESS", f"http://127.0.0.1:{server.server_port}")
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_is_fetched_once_and_resumed(server, tmp_path):
    content = np.random.RandomState(0).bytes(5_000_000)
    Files.files, sha256 = {"/folder/weights.pth": content}, hashlib.sha256(content).hexdigest()
    Files.cut = 2_000_000
    for _ in range(2):                                                           # two cuts, each goes on from the last
        with pytest.raises(OSError, match="broke off .* of 5000000 bytes"):
            align.fetch(f"{server}/folder/weights.pth", sha256)
    assert not (tmp_path / "cache" / "weights.pth").exists()
    path = align.fetch(f"{server}/folder/weights.pth", sha256)
    assert path == tmp_path / "cache" / "weights.pth" and path.read_bytes() == content
    assert [asked for _, asked in Files.asked] == [None, "bytes=2000000-", "bytes=4000000-"]
    assert align.fetch(f"{server}/folder/weights.pth") == path and len(Files.asked) == 3
    assert [p.name for p in path.parent.iterdir()] == ["weights.pth"]


def test_a_download_that_stopped_before_its_new_name(server, tmp_path):
    (tmp_path / "cache").mkdir()
    Files.files = {"/w.pth": b"weights"}
    (tmp_path / "cache" / "w.pth.part").write_bytes(b"weights")
    assert align.fetch(f"{server}/w.pth", hashlib.sha256(b"weights").hexdigest()).read_bytes() == b"weights"


def test_downloads_that_fail_say_what_to_do(server, tmp_path, monkeypatch):
    Files.files = {"/w.pth": b"other"}
    with pytest.raises(OSError, match="w.pth did not send the bytes that were published"):
        align.fetch(f"{server}/w.pth", hashlib.sha256(b"weights").hexdigest())
    assert list((tmp_path / "cache").iterdir()) == []
    for address, says in ((f"{server}/none.pth", "404"), ("http://127.0.0.1:9/none.pth", "refused")):
        with pytest.raises(OSError, match=says) as error:
            align.fetch(address)
        assert f"download {address} and put it there" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REALS_CACHE", str(tmp_path / "file" / "cache"))         # no folder can be made there
    with pytest.raises(OSError, match="w.pth is not in"):
        align.fetch(f"{server}/w.pth")


def test_published_weights_load(server, tmp_path, vits):
    """Backbone and heads under their published names, over the network, from a local file, and damaged."""
    model = vits["dinov2_vits14_reg"]
    torch.save(model.state_dict(), tmp_path / "model.pth")
    content = (tmp_path / "model.pth").read_bytes()
    Files.files = {"/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth": content,
                   "/dinov2_vits14/dinov2_vits14_pretrain.pth": content}
    x = array((1, 3, 28, 28), 1)
    with torch.no_grad():
        for loaded in (align.load_dinov2("dinov2_vits14_reg"),
                       align.load_dinov2("dinov2_vits14_reg", tmp_path / "model.pth")):
            assert torch.equal(loaded(x), model(x))
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(OSError, match="did not send the bytes that were published"):   # another file than Meta's
        align.load_dinov2("dinov2_vits14")
    with pytest.raises(ValueError, match="model.pth does not fit the network: .*unexpected"):
        align.load_dinov2("dinov2_vits14", tmp_path / "model.pth")
    with pytest.raises(ValueError, match="choose one of dinov2_vits14, "):
        align.load_dinov2("dinov2_vitx14")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        align.load_dinov2("dinov2_vits14", tmp_path / "nowhere.pth")
    for name, head in (("dinov2_vits14_ade20k_linear_head", align.SegmentationHead(384, 150)),
                       ("dinov2_vits14_voc2012_ms_head", align.SegmentationHead(4 * 384, 21)),
                       ("dinov2_vits14_nyu_linear4_head", align.DepthHead(384, num_layers=4)),
                       ("dinov2_vits14_kitti_linear_head", align.DepthHead(384, max_depth=80.0)),
                       ("dinov2_vits14_reg4_linear4_head", align.ClassificationHead(384, num_layers=4))):
        prefix = "" if isinstance(head, nn.Linear) else "decode_head."
        weights = {prefix + key: value for key, value in fill(head).state_dict().items()}
        torch.save({"state_dict": weights, "meta": {}} if prefix else weights, tmp_path / "head.pth")
        Files.files[f"/dinov2_vits14/{name}.pth"] = (tmp_path / "head.pth").read_bytes()
        loaded = align.load_head(name)
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in head.state_dict().items())
        if isinstance(head, align.DepthHead):
            assert torch.equal(loaded.bins, head.bins)
    with pytest.raises(ValueError, match="of another shape"):
        align.load_head("dinov2_vitb14_ade20k_linear_head", tmp_path / "cache" / "dinov2_vits14_ade20k_linear_head.pth")
    with pytest.raises(ValueError, match="no head of DINOv2 is called"):
        align.load_head("dinov2_vitb14_mask2former")


def test_heads_of_another_width_are_refused():
    with pytest.raises(ValueError, match="width 16 got features of 12"):
        align.SegmentationHead(16, 3)(torch.randn(1, 12, 4, 4))
    with pytest.raises(ValueError, match="width 32 got features of 24"):
        align.DepthHead(16)(torch.randn(1, 12, 4, 4), torch.randn(1, 12))
    with pytest.raises(ValueError, match="28 x 29 does not divide into patches of 14"):
        align.DINOv2(**TINY_VIT)(torch.randn(1, 3, 28, 29))


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


def test_latents_are_resized_to_a_grid_that_they_do_not_fold_to():
    heads = align.AlignmentHeads(4, 16, 8, fold=1, grid=(5, 7))
    patch, cls = heads(torch.randn(2, 4, 8, 8))
    assert patch.shape == (2, 35, 16) and cls.shape == (2, 16)
    assert heads.feature_map(torch.randn(2, 4, 8, 8)).shape == (2, 16, 5, 7)
    z = torch.zeros(1, 4, 8, 8)
    z[..., 4:] = 1                                                               # left and right stay left and right
    patch = heads.feature_map(z)
    assert (patch[..., 0] - patch[..., 6]).abs().max() > 1e-3
    assert align.AlignmentHeads(**heads.config).grid == (5, 7)


def test_standardised_targets_come_back():
    heads = align.AlignmentHeads(4, 6, 8, fold=1)
    patches, cls_token = 3 * torch.randn(5, 9, 6) + 2, torch.randn(5, 6) - 4
    heads.fit_statistics(patches, cls_token)
    p, c = heads.standardize(patches, cls_token)
    torch.testing.assert_close(p.flatten(0, 1).mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(c * heads.cls_std + heads.cls_mean, cls_token)


def test_features_before_and_after_the_norm():
    """MLPs that learned tokens before the teacher's norm give both kinds; those that learned normed ones say so."""
    teacher, x = fill(align.DINOv2(**TINY_VIT)), array((3, 3, 70, 70), 1, -1, 1)
    raw, normed = (align.teacher_tokens(teacher, x, 70, target) for target in ("prenorm", "norm"))
    torch.testing.assert_close(teacher.norm(raw[0]), normed[0])
    torch.testing.assert_close(teacher.norm(raw[1]), normed[1])
    heads, z = align.AlignmentHeads(4, 96, 8, fold=1, target="prenorm"), torch.randn(3, 4, 5, 5)
    heads.fit_norm(teacher.norm)
    heads.fit_statistics(*raw)
    before, after = heads.feature_map(z, normed=False), heads.feature_map(z)
    torch.testing.assert_close(teacher.norm(before.flatten(2).transpose(1, 2)), after.flatten(2).transpose(1, 2))
    torch.testing.assert_close(teacher.norm(heads.class_token(z, normed=False)), heads.class_token(z))
    with pytest.raises(ValueError, match="prenorm"):
        align.AlignmentHeads(4, 96, 8, fold=1).feature_map(z, normed=False)


def test_align_loss_is_zero_on_the_target_and_leaves_it_alone():
    patches, cls_token = torch.randn(2, 9, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    loss, parts = align.align_loss(patches, cls_token, patches, cls_token)
    assert abs(loss.item()) < 1e-6 and parts["cos_patch"].item() == pytest.approx(1)
    prediction = torch.randn(2, 9, 6, requires_grad=True)
    loss, parts = align.align_loss(prediction, cls_token.detach(), patches, cls_token)
    loss.backward()
    assert prediction.grad.abs().max() > 0 and patches.grad is None


def test_forms_of_the_align_loss():
    patches, cls_token = torch.randn(2, 9, 6), torch.randn(2, 6)
    opposite, _ = align.align_loss(-patches, -cls_token, patches, cls_token, form="cosine")
    assert opposite.item() == pytest.approx(4)                                   # 1 - cos = 2, for patches and for cls
    longer, _ = align.align_loss(2 * patches, 2 * cls_token, patches, cls_token, form="cosine")
    assert longer.item() == pytest.approx(0, abs=1e-6)
    l1, parts = align.align_loss(patches + 3, cls_token - 3, patches, cls_token, form="l1")
    assert l1.item() == pytest.approx(5, rel=1e-6)                               # |3| - 1 / 2, twice
    both, parts = align.align_loss(patches + 3, cls_token - 3, patches, cls_token)
    cosines = parts["cos_patch"] + parts["cos_cls"]
    assert both.item() == pytest.approx((0.9 * (2 - cosines) + 0.1 * 5).item(), rel=1e-5)
    alone, _ = align.align_loss(patches + 3, cls_token - 3, patches, cls_token, form="l1", cls_weight=0.0)
    assert alone.item() == pytest.approx(2.5, rel=1e-6)


def test_gradients_reach_encoder_and_mlps_and_never_the_teacher():
    torch.manual_seed(0)
    teacher = fill(align.DINOv2(**TINY_VIT))                                     # not even frozen
    net = train.Autoencoder(vae.AutoencoderKL(block_out_channels=(16, 32), layers_per_block=1,
                                              norm_num_groups=8),
                            align.AlignmentHeads(4, 96, 8, grid=(5, 5)))
    x = array((2, 3, 16, 16), 1, -1, 1)
    _, _, features = net(x, torch.randn(2, 4, 8, 8))
    loss, _ = align.align_loss(*features, *net.heads.standardize(*align.teacher_tokens(teacher, x, 70)))
    loss.backward()
    for name, parameter in (*net.vae.encoder.named_parameters(), *net.heads.named_parameters()):
        assert parameter.grad is not None and (parameter.grad.abs().max() > 0 or name.endswith("to_k.bias")), name
    assert all(p.grad is None for p in teacher.parameters())


def test_pictures_have_colours_in_range():
    rgb = align.pca_rgb(torch.randn(3, 20, 4, 5))
    assert rgb.shape == (3, 3, 4, 5) and 0 <= rgb.min() and rgb.max() <= 1
    mask = align.colorize_mask(torch.arange(12).view(1, 3, 4), 12)
    assert len({tuple(c.tolist()) for c in mask[0].flatten(1).T}) == 12, "two classes share a colour"
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
    for y, least in ((demo.pictures.tsne(x, perplexity=15), 0.97), (align.principal_components(x, 2), 0.0)):
        assert y.shape == (200, 2)
        nearest = (torch.cdist(y, y) + 1e9 * torch.eye(200)).argmin(1)
        assert (labels[nearest] == labels).float().mean() >= least
    with pytest.raises(ValueError, match="at least 90"):
        demo.pictures.tsne(x[:80])


# ---------------------------------------------------------------------------------------------------------------------
# sit.py and dit.py against the official code: one function for each kind of entry gives what the entry has figures of

TINY = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=96, depth=2, num_heads=4, num_classes=10)
FAMILIES = {"sit": (sit, sit.SiT), "dit": (dit, dit.DiT)}
DIFFUSION_FIGURES = REFERENCE["diffusion"]
REPRODUCE = {}


class Affine(nn.Module):
    """a x + (b0 + b1 t) table[y], and tanh(x) for a variance where the entry has one: a model without weights."""

    num_classes = 10

    def __init__(self, family, a, b0, b1, table, tanh=None):
        super().__init__()
        self.a, self.b0, self.b1, self.tanh = a, b0, b1, tanh
        self.table = nn.Parameter(array(**table["array"]), requires_grad=False)

    def forward(self, x, t, y, drop=None):
        out = self.a * x + ((self.b0 + self.b1 * t)[:, None] * self.table[y])[:, :, None, None].to(x.dtype)
        return out if self.tanh is None else torch.cat([out, self.tanh * x.tanh()], dim=1)


class Watched(nn.Module):
    """A model that remembers the times and the rows of its calls."""

    def __init__(self, model):
        super().__init__()
        self.model, self.num_classes, self.times, self.rows = model, model.num_classes, [], []

    def forward(self, x, t, y, drop=None):
        self.times.append(t[0].item())
        self.rows.append(len(x))
        return self.model(x, t, y)


def model_of(entry, dtype):
    config = entry["config"]["model"]
    if config["family"] == "affine":
        return Affine(**config).to(dtype)
    return fill(FAMILIES[config["family"].lower()][1](**config["kwargs"]), skip=("pos_embed",)).to(dtype)


def inputs_of(entry, dtype):
    def tensor(value):
        if "array" in value:
            return torch.cat([array(**value["array"])] * value.get("cat", 1)).to(dtype)
        given = torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
        return given.to(dtype) if given.is_floating_point() else given
    return {name: tensor(value) for name, value in entry.get("inputs", {}).items()}


def half_if_guided(entry, *tensors):
    """The official samplers double the batch by hand; ours are given its first half."""
    count = len(tensors[0]) // 2 if "cfg_scale" in entry["config"] else len(tensors[0])
    return [tensor[:count] for tensor in tensors]


def path_of(entry):
    transport = dict(entry["config"]["transport"], **entry["config"]["transport"].get("set_after", {}))
    return dict(path=transport["path_type"].lower(), prediction=transport["prediction"])


def agrees(got, want, tolerance, where):
    """Assert that what we got is what is recorded: summaries of tensors, numbers, and lists and dicts of them."""
    if got is want:
        return
    if isinstance(want, dict) and "mean" in want and not isinstance(got, dict):
        gap = difference(torch.as_tensor(got), want)
        assert gap < tolerance, f"{where}: {gap:.2e}"
    elif isinstance(want, dict):
        assert want.keys() <= got.keys(), f"{where}: nothing to compare with {want.keys() - got.keys()}"
        for name in want:
            agrees(got[name], want[name], tolerance, f"{where} {name}")
    elif isinstance(want, list) and want and not isinstance(want[0], (int, float)):
        assert len(got) == len(want), where
        for i, (mine, theirs) in enumerate(zip(got, want)):
            agrees(mine, theirs, tolerance, f"{where} {i}")
    elif isinstance(want, (list, float)):
        got = got.tolist() if isinstance(got, torch.Tensor) else got
        assert got == pytest.approx(want, rel=tolerance, abs=1e-12), where
    else:
        assert got == want, where


def reproduces(*kinds):
    def register(function):
        REPRODUCE.update(dict.fromkeys(kinds, function))
        return function
    return register


@reproduces("state_dict")
def _(entry, dtype):
    model = model_of(entry, dtype)
    return {"names": [[name, list(value.shape)] for name, value in model.state_dict().items()],
            "total": sum(p.numel() for p in model.parameters()), "state_dict_entries": len(model.state_dict()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad), "pos_embed": model.pos_embed}


@reproduces("forward")
def _(entry, dtype):
    model, x, seen = model_of(entry, dtype), inputs_of(entry, dtype), {}
    for name in entry["float64"]["intermediates"]:
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    out = model(x["x"], x["t"], x["y"])
    return {"out": out, "per_sample": out, "intermediates": seen, "pos_embed": model.pos_embed}


@reproduces("label")
def _(entry, dtype):
    model, x = model_of(entry, dtype), inputs_of(entry, dtype)
    table, drop = model.y_embedder, x["force_drop_ids"] == 1
    out = {"eval": table(x["y"]), "force_drop_ids, train=False": table(x["y"], drop)}
    table.train()
    torch.manual_seed(entry["seed"])
    out.update({"train=True, rng": table(x["y"]), "force_drop_ids, train=True": table(x["y"], drop)})
    rows = table.embedding_table.weight
    for name, like in (("labels_forced", "force_drop_ids, train=True"), ("labels_rng", "train=True, rng")):
        out[name] = torch.cdist(out[like].double(), rows.double()).argmin(1)
    return dict(out, table_rows=len(rows))


@reproduces("forward_train")
def _(entry, dtype):
    model, x = model_of(entry, dtype), inputs_of(entry, dtype)
    labels = []
    model.y_embedder.embedding_table.register_forward_pre_hook(lambda m, given: labels.extend(given[0].tolist()))
    torch.manual_seed(entry["seed"])
    out = model.train()(x["x"], x["t"], x["y"])
    return {"out": out, "dropped": [label == 10 for label in labels]}


@reproduces("forward_cfg")
def _(entry, dtype):
    model, x = model_of(entry, dtype), inputs_of(entry, dtype)
    z, t, y = x["x"][:3], x["t"][:3], x["y"][:3]
    first = sit.guided(model, z, t, y, 0.5, entry["config"]["cfg_scale"], (0.0, 1.0), 3)
    if entry["config"]["cfg_scale"] == 1.0:                                      # the same without the null half
        torch.testing.assert_close(first, model(z, t, y))
    second = torch.cat([first[:, :3], model(z, t, torch.full_like(y, 10))[:, 3:]], dim=1)
    return {"out": torch.cat([first, second]), "first_half_channels_0_2": first[:, :3],
            "first_half_channels_3_on": first[:, 3:], "second_half_channels_0_2": second[:, :3],
            "second_half_channels_3_on": second[:, 3:]}


@reproduces("param_counts")
def _(entry, dtype):
    module, counts = FAMILIES[entry["config"]["family"].lower()][0], {}
    with torch.device("meta"):
        for name in entry["float32"]["models"]:
            model = module.create(name)
            counts[name] = {
                "total": sum(p.numel() for p in model.parameters()), "state_dict_entries": len(model.state_dict()),
                "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "depth": len(model.blocks), "hidden": model.pos_embed.shape[2], "tokens": model.pos_embed.shape[1],
                "heads": model.blocks[0].attn.num_heads, "patch": model.patch_size}
    return {"models": counts}


@reproduces("timestep")
def _(entry, dtype):
    config, t = entry["config"], inputs_of(entry, dtype)["t"]
    embedder, seen = fill(sit.TimestepEmbedder(config["hidden_size"], config["frequency_embedding_size"])).to(dtype), []
    embedder.mlp.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    out = embedder(t)
    return {"sinusoid": seen[0], "sinusoid_per_t": seen[0], "embedding": out, "embedding_per_t": out}


@reproduces("pos_embed")
def _(entry, dtype):
    table = sit.sincos_pos_embed(entry["config"]["embed_dim"], entry["config"]["grid_size"])
    return {"pos_embed_float64_table": table[0]}


@reproduces("init")
def _(entry, dtype):
    torch.manual_seed(0)
    model = FAMILIES[entry["config"]["model"]["family"].lower()][1](**entry["config"]["model"]["kwargs"])
    recorded, out = entry["float32"]["parameters"], {}
    for name, p in model.named_parameters():
        std = p.std(unbiased=False).item()
        assert std == pytest.approx(recorded[name]["std"], rel=0.1), name        # a random draw: its statistics alone
        assert p.abs().max().item() == pytest.approx(recorded[name]["absmax"], rel=0.3), name
        out[name] = dict(recorded[name], shape=list(p.shape), all_zero=not p.any(), requires_grad=p.requires_grad)
    return {"parameters": out}


@reproduces("path")
def _(entry, dtype):
    path, x, out = entry["config"]["path_type"].lower(), inputs_of(entry, dtype), {}
    forms = ("constant", "SBDM", "sigma", "linear", "decreasing", "inccreasing-decreasing")
    for time_ in entry["config"]["t"]:
        t = torch.tensor(time_, dtype=torch.float32).to(dtype)                   # the official time is float32
        alpha, sigma, d_alpha, d_sigma = sit.interpolant(path, t)
        times = t.expand(2)
        score = sit.as_score(x["model_output"], x["x"], times, path, "velocity")
        out[f"t={time_}"] = {
            "scalars": {name: value.item() for name, value in (
                ("alpha", alpha), ("d_alpha", d_alpha), ("sigma", sigma), ("d_sigma", d_sigma),
                ("d_alpha_alpha_ratio", d_alpha / alpha), ("compute_drift[1]", sit.drift_variance(path, t)))},
            "compute_drift[0]": -d_alpha / alpha * x["x"],
            "diffusion": {f"{form}|norm={norm}": sit.diffusion(form.lower().replace("cc", "c"), path, t, norm).item()
                          for form in forms for norm in entry["config"]["norms"]},
            "score_from_velocity": score, "noise_from_velocity": -sigma * score,
            "velocity_from_score": sit.as_velocity(x["model_output"], x["x"], times, path, "score"),
            "plan_xt": alpha * x["x1"] + sigma * x["x0"], "plan_ut": d_alpha * x["x1"] + d_sigma * x["x0"]}
    return out


@reproduces("training_losses")
def _(entry, dtype):
    model, x = model_of(entry, dtype), inputs_of(entry, dtype)
    predicted = []
    model.register_forward_hook(lambda module, given, out: predicted.append(out))
    loss = sit.training_loss(model, x["x1"], x["y"], **path_of(entry),
                             weight=entry["config"]["transport"]["loss_weight"], t=x["t"], eps=x["x0"])
    loss.mean().backward()
    return {"loss": loss, "pred": predicted[0],
            "grad of loss.mean()": {name: model.get_parameter(name).grad for name in entry["config"]["grads"]}}


@reproduces("check_interval")
def _(entry, dtype):
    transport, names = entry["config"]["transport"], path_of(entry)
    if "raises" in entry["float32"]:                                             # train_eps alone: ours works
        assert sit.time_interval(**names, eps=1e-4, training=True) == (0.0, 1 - 1e-4)
        assert sit.time_interval(**names) == (0.0, 0.999)
        return entry["float32"]
    train_eps, sample_eps = transport["train_eps"], transport["sample_eps"]
    ignored = names["prediction"] == "velocity" and names["path"] != "vp"
    if ignored or train_eps is None:                                             # the official code ignores it
        assert sit.time_interval(**names, eps=0.03)[1] == 0.97
        train_eps = sample_eps = None
    t0, t1 = sit.time_interval(**names, eps=sample_eps)
    back = sit.time_interval(**names, eps=sample_eps, reverse=True)
    if names == dict(path="vp", prediction="noise"):                             # theirs begins with 1 / 0
        assert back[0] == t1
        back = (1.0, back[1])
    out = {"train": sit.time_interval(**names, eps=train_eps, training=True), "ode_sample": (t0, t1),
           "ode_sample_reverse": back}
    for form in ("SBDM", "sigma"):
        out.update({f"sde|{form}|last_step_size=0.0": (t0, t1), f"sde|{form}|last_step_size=0.04": (t0, 0.96)})
    out = {name: list(interval) for name, interval in out.items()}
    return dict(out, train_eps=entry["float32"]["train_eps"], sample_eps=entry["float32"]["sample_eps"])


@reproduces("transport_sample")
def _(entry, dtype):
    x1, given = inputs_of(entry, dtype)["x1"], []
    torch.manual_seed(entry["seed"])
    sit.training_loss(lambda *call: given.append(call) or call[0], x1, None, **path_of(entry))
    x_t, t = given[0][:2]
    alpha, sigma, _, _ = sit.interpolant(path_of(entry)["path"], t.view(-1, 1, 1, 1))
    return {"t": t, "x0": (x_t - alpha * x1) / sigma, "x1_is_input": True}


@reproduces("sample_ode")
def _(entry, dtype):
    options, x = dict(entry["config"]["sample_ode"]), inputs_of(entry, dtype)
    if "raises" in entry["float32" if "float32" in entry else "float64"]:
        assert options["sampling_method"] == "heun"                              # documented there, unknown; ours works
        assert sit.sample(model_of(entry, dtype), x["x"], x["y"], "heun", 5).isfinite().all()
        return entry["float32"]
    model, method = Watched(model_of(entry, dtype)), options.get("sampling_method", "dopri5")
    z, y = half_if_guided(entry, x["x"], x["y"])
    states = [z, *sit.trajectory(
        model, z, y, method, options.get("num_steps", 50) - 1, **path_of(entry), reverse=options.get("reverse", False),
        cfg_scale=entry["config"].get("cfg_scale", 1.0), cfg_channels=3,
        sample_eps=entry["config"]["transport"].get("sample_eps"))]
    recorded = entry["float64"]
    out = {"final": states[-1], "middle": states[len(states) // 2], "returned_states": len(states),
           "nfe": len(model.times), "model_times": model.times}
    if method == "dopri5":
        assert 0 <= min(model.times) and max(model.times) <= 1
        out = dict(recorded, final=states[-1])
    return out


@reproduces("sample_sde")
def _(entry, dtype):
    options, x = dict(entry["config"]["sample_sde"]), inputs_of(entry, dtype)
    model, steps = Watched(model_of(entry, dtype)), options.get("num_steps", 250)
    z, y = half_if_guided(entry, x["x"], x["y"])
    transport = dict(entry["config"]["transport"], **entry["config"]["transport"].get("set_after", {}))
    last = options.get("last_step", "Mean")
    torch.manual_seed(entry["seed"])
    states = list(sit.trajectory(
        model, z, y, f"sde-{options.get('sampling_method', 'Euler').lower()}", steps, **path_of(entry),
        cfg_scale=entry["config"].get("cfg_scale", 1.0), cfg_channels=3, sample_eps=transport.get("sample_eps"),
        diffusion_form=options.get("diffusion_form", "SBDM").lower().replace("cc", "c"),
        diffusion_norm=options.get("diffusion_norm", 1.0), last_step=last and last.lower(),
        last_step_size=options.get("last_step_size", 0.04),
        noise=lambda i: torch.randn(x["x"].shape)[:len(z)].to(dtype)))
    recorded = entry.get("float64") or entry["float32"]
    if "raises" in recorded or recorded["final"].get("nonfinite"):               # ours works
        assert all(state.isfinite().all() and state.std() < 10 for state in states)
        return recorded
    assert len(model.times) <= (recorded["model_calls"] + 1) // 2                # one call gives velocity and score
    if last is None:
        states.append(states[-1])
    return dict(recorded, final=states[-1], before_last_step=states[-2], after_first_step=states[0],
                returned_states=len(states), last_model_time=model.times[-1])


@reproduces("likelihood")
def _(entry, dtype):
    options, x = entry["config"]["sample_ode_likelihood"], inputs_of(entry, dtype)
    model, recorded = Watched(model_of(entry, dtype)), entry["float64"]
    def probe(i):
        if "probe" in x:
            return torch.where(x["probe"] >= 0, 1.0, -1.0).to(dtype)
        return torch.randint(2, x["x"].shape, dtype=torch.float64).to(dtype) * 2 - 1
    if "seed" in entry:
        torch.manual_seed(entry["seed"])
    method = options.get("sampling_method", "dopri5")
    logp, z = sit.log_likelihood(model, x["x"], x["y"], method, options["num_steps"] - 1, **path_of(entry), probe=probe,
                                 sample_eps=entry["config"]["transport"].get("sample_eps"))
    assert len(model.times) <= recorded["model_calls"] / 2 and 0 <= min(model.times) and max(model.times) <= 1
    if method != "dopri5":                                                       # relative to itself, not to its spread
        assert logp.tolist() == pytest.approx(recorded["logp"]["values"], rel=1e-6)
    prior = -0.5 * (z ** 2 + math.log(2 * math.pi)).flatten(1).sum(1)
    return dict(recorded, logp=recorded["logp"], z=z, prior_logp_of_z=prior)


@reproduces("repa")
def _(entry, dtype):
    """REPA's time runs from noise to data, and so does its velocity."""
    config, x = entry["config"], inputs_of(entry, dtype)
    model, options = model_of(entry, dtype), config["kwargs"]
    class Turned(nn.Module):
        num_classes, times = 1000, []

        def forward(self, x, t, y):
            self.times.append(1 - t[0].item())
            return -model(x, 1 - t, y)
    turned = Turned()
    if "seed" in entry:
        torch.manual_seed(entry["seed"])
    guidance = dict(cfg_scale=options["cfg_scale"], cfg_interval=(options["guidance_low"], options["guidance_high"]))
    if config["function"] == "euler_sampler":
        z = sit.sample(turned, x["x"], x["y"], "heun" if options["heun"] else "euler", options["num_steps"], **guidance)
    else:
        linear = options["path_type"] == "linear"
        z = sit.sample(turned, x["x"], x["y"], "sde-euler", options["num_steps"], path="linear" if linear else "gvp",
                       diffusion_form="sigma" if linear else "linear", **guidance,
                       noise=lambda i: torch.randn(x["x"].shape, dtype=torch.float64).to(dtype))
    return {"final": z, "output_dtype": "torch.float64", "model_calls": len(turned.times), "model_times": turned.times}


@reproduces("repa_score")
def _(entry, dtype):
    x, path = inputs_of(entry, dtype), {"linear": "linear", "cosine": "gvp"}[entry["config"]["path_type"]]
    return {f"t={t}": sit.as_score(-x["v"], x["x"], torch.full((2,), 1 - t, dtype=dtype), path, "velocity")
            for t in entry["config"]["t"]}


def chain_of(entry):
    options = entry["config"]["create_diffusion"]
    return dict(num_steps=options["timestep_respacing"] or 1000,
                prediction="x_start" if options.get("predict_xstart") else "noise",
                fixed_variance="small" if options.get("sigma_small") else "large")


@reproduces("tables")
def _(entry, dtype):
    chain, recorded = dit.GaussianDiffusion(**chain_of(entry)), entry["float32"]
    out = {}
    for name, table in recorded["tables"].items():
        ours = torch.from_numpy(getattr(chain, name))
        difference_from = {k: v for k, v in table.items() if k != "at"}
        assert difference(ours, difference_from) < 1e-9, name
        out[name] = dict(table, at={i: ours[int(i)].item() for i in table["at"]})
    return dict(recorded, num_timesteps=chain.num_timesteps, tables=out,
                **({"timestep_map": chain.timestep_map.tolist()} if "timestep_map" in recorded else {}))


@reproduces("space")
def _(entry, dtype):
    out = {}
    for steps, respacing in entry["config"]["cases"]:
        try:
            value = dit.space_timesteps(steps, respacing)
        except ValueError:
            value = entry["float32"][f"space_timesteps({steps}, {respacing!r})"]
            assert "raises" in value
        out[f"space_timesteps({steps}, {respacing!r})"] = value
    return out


@reproduces("cosine")
def _(entry, dtype):
    betas, recorded = torch.from_numpy(dit.betas_of(entry["config"]["schedule"])), entry["float32"]["betas"]
    assert difference(betas, {k: v for k, v in recorded.items() if k != "at"}) < 1e-6
    return {"betas": dict(recorded, at={i: betas[int(i)].item() for i in recorded["at"]})}


@reproduces("q")
def _(entry, dtype):
    chain, x = dit.GaussianDiffusion(**chain_of(entry)), inputs_of(entry, dtype)
    x_start, eps, t = x["x_start"], x["noise"], x["t"]
    x_t = chain.q_sample(x_start, t, eps)
    mean, logvar = chain.q_posterior(x_start, x_t, t)
    log_variance = chain.at("log_one_minus_alphas_cumprod", t).flatten()
    return {"q_sample": x_t, "q_mean": chain.q_sample(x_start, t, 0 * eps), "q_variance": log_variance.exp(),
            "q_log_variance": log_variance, "posterior_mean (x_t = the q_sample output)": mean,
            "posterior_variance": chain.at("posterior_variance", t).flatten(),
            "posterior_log_variance_clipped": logvar.flatten(),
            "predict_xstart_from_eps(x_t, t, noise)": chain.predict_x_start(x_t, t, eps)}


@reproduces("p")
def _(entry, dtype):
    chain, x, model = dit.GaussianDiffusion(**chain_of(entry)), inputs_of(entry, dtype), model_of(entry, dtype)
    out = model(x["x"], chain.original(x["t"]), x["y"])
    mean, logvar, x_start = chain.p_mean_variance(out, x["x"], x["t"], entry["config"]["clip_denoised"])
    logvar, variance = logvar.expand_as(mean), logvar.exp()
    if "sigma_small" in entry["config"]["create_diffusion"]:                     # 0 at step 0
        variance = chain.at("posterior_variance", x["t"])
    return {"mean": mean, "pred_xstart": x_start, "log_variance (whole batch)": logvar,
            "log_variance_mean_per_sample": logvar.flatten(1).mean(1),
            "variance_mean_per_sample": variance.expand_as(mean).flatten(1).mean(1)}


@reproduces("dit_losses")
def _(entry, dtype):
    chain, x, model = dit.GaussianDiffusion(**chain_of(entry)), inputs_of(entry, dtype), model_of(entry, dtype)
    options = entry["config"]["create_diffusion"]
    kind = "kl" if options.get("use_kl") else "rescaled_mse" if options.get("rescale_learned_sigmas") else "mse"
    predicted = []
    model.register_forward_hook(lambda module, given, out: predicted.append(out))
    draws = dict(t=x["t"], eps=x["noise"])
    loss = dit.training_loss(model, x["x_start"], x["y"], chain, kind, **draws)
    loss[x["t"] > 0].mean().backward()
    target = x["noise"] if chain.prediction == "noise" else x["x_start"]
    mse = (predicted[0][:, :4] - target).square().flatten(1).mean(1)
    return {"loss": loss, "mse": mse, "vb": loss - mse, "grad of loss[t>0].mean()": {
        name: model.get_parameter(name).grad for name in entry["config"]["grads"]}}


@reproduces("p_loop", "ddim_loop", "ddim_reverse")
def _(entry, dtype):
    model, x, options = Watched(model_of(entry, dtype)), inputs_of(entry, dtype), entry["config"]["kwargs"]
    if "seed" in entry:
        torch.manual_seed(entry["seed"])
    drawn = torch.randn(entry["config"]["shape"]) if "shape" in entry["config"] else None
    z = drawn.to(dtype) if drawn is not None else x["noise" if "noise" in x else "x"]
    shape, (z, y) = z.shape, half_if_guided(entry, z, x["y"])
    states = list(dit.trajectory(
        model, z, y, "ddpm" if entry["kind"] == "p_loop" else "ddim", cfg_scale=entry["config"].get("cfg_scale", 1.0),
        cfg_channels=3, reverse=entry["kind"] == "ddim_reverse", eta=options.get("eta", 0.0),
        clip_denoised=options.get("clip_denoised", True), noise=lambda i: torch.randn(shape)[:len(z)].to(dtype),
        **chain_of(entry)))
    return {"final": states[-1], "final_pred_xstart": states[-1], "after_first_step": states[0],
            "model_calls": len(model.times), "model_times": [float(t) for t in model.times]}


@reproduces("bpd")
def _(entry, dtype):
    chain, x = dit.GaussianDiffusion(**chain_of(entry)), inputs_of(entry, dtype)
    model = model_of(entry, dtype)
    torch.manual_seed(entry["seed"])
    return dit.bits_per_dim(model, x["x_start"], x["y"], chain, entry["config"]["clip_denoised"],
                            noise=lambda i: torch.randn(x["x_start"].shape).to(dtype))


def shared(path, files):
    begin, end = (f"# === shared by {files}: {word} ===\n" for word in ("begin", "end"))
    text = (HERE / path).read_text()
    assert text.count(begin) == text.count(end) == 1, f"{path}: want one begin and one end marker"
    return text.split(begin)[1].split(end)[0]


# What the float32 of DiT's time embedding is worth. The official code takes frequency f = exp(-a) and angle t f in
# float32, where u = 2^-24 is one rounding: a is off by a u, f by f u more, so an angle by t u f (1 + a) = t u f (1 - ln f)
# <= t u. A sinusoid moves as far as its angle, and t goes to 999; the deviation of a sinusoid is sqrt(1 / 2). Behind the
# embedding the linear layers mix 256 sinusoids, which makes it less, not more. SiT's t <= 1 is below 1e-6.
EMBEDDING = 999 * 2 ** -24 / 0.5 ** 0.5                                          # 8.4e-5
# The same of noise that torch.randn draws in float32: sqrt(-2 ln u) cos(2 pi v), four roundings of up to 5 deviations.
DRAWN = 5 * 4 * 2 ** -24                                                         # 1.2e-6


@pytest.mark.parametrize("name", DIFFUSION_FIGURES)
def test_sit_and_dit_equal_official_figures(name):
    entry = DIFFUSION_FIGURES[name]
    recorded = entry.get("float64") or entry["float32"]
    embeds = entry["kind"] in ("forward", "forward_train", "forward_cfg", "p", "dit_losses", "bpd", "p_loop",
                               "ddim_loop") and entry["config"]["model"]["family"] == "DiT"
    embeds = embeds or name.startswith("dit/timestep_embedder")
    for dtype in [torch.float64] * ("float64" in entry) + [torch.float32] * (entry["kind"] != "repa_score"):
        tolerance = max(1e-5, 10 * entry.get("gap", 0))
        if dtype == torch.float64:                                               # the official loops round to float32
            tolerance = 1e-5 if entry["kind"] in ("p_loop", "ddim_loop", "ddim_reverse") else 1e-6
            tolerance += DRAWN if entry["kind"] in ("sample_sde", "bpd") else 0
        if embeds:
            tolerance = max(tolerance, EMBEDDING)
        if "dopri5" in name:                                                     # it is exact to within atol + rtol
            tolerance = 3e-3
        agrees(REPRODUCE[entry["kind"]](entry, dtype), recorded, tolerance, f"{name} {dtype}")


@pytest.mark.parametrize("module", [sit, dit])
def test_time_embedding_is_rounded_once(module):
    """Frequencies, angles and sinusoids of float32, against correctly rounded ones; a library's cos and sin may be one
    unit in the last place off."""
    embedder, seen = module.TimestepEmbedder(8), []
    embedder.mlp.register_forward_pre_hook(lambda layers, given: seen.append(given[0]))
    for t in (0, 1, 250.5, 999):
        embedder(torch.tensor([t]))
        freqs = [np.float32(math.exp(-math.log(10000) * j / 128)) for j in range(128)]
        angles = [float(np.float32(t) * f) for f in freqs]
        want = np.float32([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        np.testing.assert_array_max_ulp(seen.pop()[0].detach().numpy(), want, maxulp=1)


def test_shared_sections_are_the_same_text():
    files = "sit.py and dit.py"
    assert shared("sit.py", files) == shared("dit.py", files), "the shared sections differ: diff sit.py dit.py"
    files = "vae.py, align.py and fid.py"
    assert shared("vae.py", files) == shared("align.py", files) == shared("fid.py", files)
    assert shared("vae.py", "vae.py and fid.py") == shared("fid.py", "vae.py and fid.py")
    files = "align.py, sit.py and dit.py"
    assert shared("align.py", files) == shared("sit.py", files) == shared("dit.py", files)


def test_readable_attention_equals_the_fused_kernel():
    model, x = fill(sit.Attention(96, 4)).double(), array((3, 50, 96), 1).double().requires_grad_()
    out = model(x)
    grad, = torch.autograd.grad(out.square().sum(), x)
    model.fused = False
    with mock.patch.object(sit.F, "scaled_dot_product_attention", side_effect=AssertionError("the fused kernel ran")):
        readable = model(x)
    torch.testing.assert_close(readable, out)
    torch.testing.assert_close(torch.autograd.grad(readable.square().sum(), x)[0], grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(family):
    module, network = FAMILIES[family]
    model, kept = fill(network(**dict(TINY, depth=6)), skip=("pos_embed",)).double(), {}
    x, y, t = array((4, 4, 8, 8), 1).double(), torch.arange(4), torch.tensor([1, 0, 1, 1])

    def gradients(name):
        kept[name] = 0

        def pack(tensor):
            kept[name] += tensor.numel()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module.training_loss(model, x, y, t=t, eps=array((4, 4, 8, 8), 2).double()).mean()
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    plain = gradients("plain")
    model.enable_gradient_checkpointing()
    for ours, theirs in zip(gradients("checkpointed"), plain):
        torch.testing.assert_close(ours, theirs)
    assert kept["checkpointed"] < 0.4 * kept["plain"]


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_load_strictly_and_other_sizes_work(family, tmp_path):
    module, network = FAMILIES[family]
    name = f"{network.__name__}-S/4"
    torch.save(fill(module.create(name), skip=("pos_embed",)).state_dict(), tmp_path / "official.pt")
    model = module.create(name).eval()
    model.load_state_dict(torch.load(tmp_path / "official.pt", weights_only=True), strict=True)
    y = torch.tensor([1, 1000])
    out = model(array((2, 4, 32, 32), 1), torch.tensor([0, 1]), y)
    assert out.std() > 0.1 and out.shape[1] == (4 if family == "sit" else 8)
    for size, channels, classes in ((12, 7, 3), (16, 1, 1)):
        model = network(**dict(TINY, input_size=size, in_channels=channels, num_classes=classes, patch_size=4)).eval()
        z = module.sample(model, array((2, channels, size, size), 1), torch.zeros(2, dtype=torch.long), num_steps=2,
                          cfg_scale=2.0)
        assert z.shape == (2, channels, size, size) and z.isfinite().all()
    for name in ("SiX-B/2", f"{network.__name__}-Q/2", f"{network.__name__}-B", f"{network.__name__}-B/x", "nonsense"):
        with pytest.raises(ValueError, match="SIZE one of Ti, S, B, L, XL"):
            module.create(name)


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


class Bf16(Counting):
    """The same, as a model under autocast gives it."""

    def forward(self, x, t, y):
        return super().forward(x, t, y).bfloat16()


def test_guidance_moves_away_from_the_unconditional_output():
    x, t, y = torch.zeros(5, 4, 2, 2), torch.zeros(5), torch.zeros(5, dtype=torch.long)
    out = sit.guided(Counting(), x, t, y, 0.5, 4.0, (0.0, 1.0), 3)
    assert (out[:, :3] == 5).all() and (out[:, 3:] == 2).all()                   # 1 + 4 (2 - 1); conditional
    assert (sit.guided(Counting(), x, t, y, 0.5, 4.0, (0.0, 1.0), None) == 5).all()


def test_the_outputs_of_a_bf16_model_are_guided_in_float32():
    x, t, y = torch.zeros(5, 4, 2, 2), torch.zeros(5), torch.zeros(5, dtype=torch.long)
    out = sit.guided(Bf16(), x, t, y, 0.5, 1.1, (0.0, 1.0), None)
    assert out.dtype == torch.float32 and out[0, 0, 0, 0].item() == pytest.approx(2.1, abs=1e-6)


@pytest.mark.parametrize("module, sampler", [
    *((sit, sampler) for sampler in sit.ODE_SAMPLERS + sit.SDE_SAMPLERS), (dit, "ddpm"), (dit, "ddim")])
def test_guided_rows_are_computed_only_in_the_interval(module, sampler):
    """A step is guided if it begins in the interval, which dopri5's steps do not leave."""
    eps, y = torch.randn(5, 4, 2, 2), torch.zeros(5, dtype=torch.long)
    stages = len(module.RUNGE_KUTTA[{"heun": "heun2"}.get(sampler, sampler)][0]) if sampler in sit.ODE_SAMPLERS else 1
    for scale, (low, high) in ((1.0, (0.0, 1.0)), (3.0, (0.0, 0.75)), (3.0, (0.25, 0.75)), (3.0, (0.0, 1.0))):
        model = Counting()
        module.sample(model, eps, y, sampler, num_steps=8, cfg_scale=scale, cfg_interval=(low, high))
        assert scale == 1.0 or (low, high) == (0.0, 1.0) or set(model.rows) == {5, 10}
        for call, (rows, t) in enumerate(zip(model.rows, model.times)):
            begin = model.times[call - call % stages] if stages > 1 and sampler != "dopri5" else t
            if sampler == "sde-heun":
                begin = model.times[call - call % 2]
            level = 1 - begin if module is sit else begin / 999
            if sampler == "dopri5" and min(abs(level - low), abs(level - high)) < 1e-6:
                continue                                                         # both sides' steps end here
            assert rows == (10 if scale > 1 and low - 1e-6 <= level <= high + 1e-6 else 5), (sampler, level)


def test_fixed_steps_have_their_order():
    """Half the step, 2^p times less error on dx/dt = (1 + x) cos 5t."""
    class Field(nn.Module):
        num_classes = 1

        def forward(self, x, t, y):
            return (1 + x) * torch.cos(5 * t).view(-1, 1, 1, 1)

    eps, y = array((2, 4, 2, 2), 3).double(), torch.zeros(2, dtype=torch.long)
    exact = (1 + eps) * math.exp(math.sin(5) / 5) - 1
    for sampler, order in (("euler", 1), ("midpoint", 2), ("heun", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)):
        errors = [(sit.sample(Field(), eps, y, sampler, steps) - exact).abs().max().item() for steps in (32, 64)]
        assert 2 ** (order - 0.3) < errors[0] / errors[1] < 2 ** (order + 0.6), (sampler, errors)
    back = sit.sample(Field(), sit.sample(Field(), eps, y, "rk4", 64), y, "rk4", 64, reverse=True)
    torch.testing.assert_close(back, eps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("reverse", [False, True])
def test_dopri5_equals_torchdiffeq_with_no_more_evaluations(rtol, reverse):
    models = [fill(sit.SiT(**TINY), skip=("pos_embed",)).double(),
              Affine("affine", -8.0, 3.0, 5.0, dict(array=dict(shape=(11, 4), seed=1))).double()]
    for model in models:
        xs, ys = array((2, 4, 8, 8), 1).double(), torch.tensor([1, 10])
        options, counts = dict(sampler="dopri5", atol=1e-3 * rtol, rtol=rtol, reverse=reverse), []
        times = torch.tensor([1.0, 0.0] if reverse else [0.0, 1.0], dtype=torch.float64)
        together = Watched(model)
        zs = sit.sample(together, xs, ys, **options)
        for x, y, z in zip(xs.split(1), ys.split(1), zs.split(1)):
            watched, counted = Watched(model), Watched(model)

            def theirs(t, z):                                                    # the model takes times in [0, 1] only
                return counted(z, t.clamp(0, 1).expand(1).to(z.dtype), y)
            with torch.no_grad():
                exact = torchdiffeq.odeint(theirs, x, times, rtol=1e-10, atol=1e-12, method="dopri5")[-1]
                counted.times.clear()
                expected = torchdiffeq.odeint(theirs, x, times, rtol=rtol, atol=1e-3 * rtol, method="dopri5")[-1]
            torch.testing.assert_close(sit.sample(watched, x, y, **options), z, rtol=0, atol=rtol)
            assert len(watched.times) <= len(counted.times)
            assert 0 <= min(watched.times) and max(watched.times) <= 1
            assert (z - exact).abs().max() < max(3 * (expected - exact).abs().max(), rtol * exact.abs().max())
            counts.append(len(watched.times))
        assert len(together.times) == max(counts)


def test_dopri5_stops_where_the_model_is_not_finite():
    class Broken(Counting):
        def forward(self, x, t, y):
            return torch.where(t.view(-1, 1, 1, 1) > 0.5, math.nan, 1.0) * x
    with pytest.raises(RuntimeError, match="dopri5 finds no step"):
        sit.sample(Broken(), torch.randn(2, 4, 2, 2), torch.zeros(2, dtype=torch.long), "dopri5")


class Normal(nn.Module):
    """The exact velocity of latents that are N(mean, std^2) in every channel, on a path."""

    num_classes = 1

    def __init__(self, path, mean=1.5, std=0.4):
        super().__init__()
        self.path, self.mean, self.std = path, mean, std

    def forward(self, x, t, y):
        alpha, sigma, d_alpha, d_sigma = sit.interpolant(self.path, t.view(-1, 1, 1, 1).double())
        variance = (alpha * self.std) ** 2 + sigma ** 2
        slope = (alpha * d_alpha * self.std ** 2 + sigma * d_sigma.clamp(min=-1e6)) / variance
        return (d_alpha * self.mean + slope * (x - alpha * self.mean)).to(x.dtype)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_every_sde_ends_at_the_distribution_of_the_data(path):
    """2 x 12,800 numbers through 500 steps: mean 1.5 and deviation 0.4 to 3 %, whatever the diffusion."""
    torch.manual_seed(0)
    eps, y = torch.randn(200, 4, 4, 4, dtype=torch.float64), torch.zeros(200, dtype=torch.long)
    forms = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")
    for form in forms:
        for sampler in sit.SDE_SAMPLERS:
            z = sit.sample(Normal(path), eps, y, sampler, 500, path=path, diffusion_form=form, last_step="euler")
            assert abs(z.mean() - 1.5) < 0.03 and abs(z.std() - 0.4) < 0.025, (form, sampler, z.mean(), z.std())
    z = sit.sample(Normal(path), eps, y, "sde-heun", 500, path=path, last_step=None)
    assert abs(z.mean() - 1.5) < 0.03 and abs(z.std() - 0.4) < 0.025


def test_likelihood_is_that_of_the_distribution_of_the_data():
    """The divergence of this field is diagonal: any probe of random signs gives it exactly."""
    x, y = 1.5 + 0.4 * array((3, 4, 2, 2), 1).double(), torch.zeros(3, dtype=torch.long)
    exact = torch.distributions.Normal(1.5, 0.4).log_prob(x).flatten(1).sum(1)
    for sampler, steps in (("dopri5", None), ("rk4", 50)):
        logp, z = sit.log_likelihood(Normal("linear"), x, y, sampler, steps, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(logp, exact, rtol=1e-5, atol=0)
        torch.testing.assert_close(z, (x - 1.5) / 0.4, rtol=1e-4, atol=1e-4)


def test_dit_finds_a_single_point_from_its_exact_noise():
    """Data that is one point x: eps = (x_t - a x) / s is the exact noise, and both samplers must end at x."""
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)

    class Exact(nn.Module):
        num_classes = 1

        def forward(self, x_t, t, y):
            alpha = dit.DIFFUSION.at("alphas_cumprod", t)
            return (x_t - alpha.sqrt() * x) / (1 - alpha).sqrt()

    eps, y = torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    for sampler, steps in (("ddpm", 50), ("ddim", 10), ("ddim", "ddim20"), ("ddim", 2)):
        z = dit.sample(Exact(), eps, y, sampler, steps)
        torch.testing.assert_close(z, x.expand(3, -1, -1, -1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_refuse_what_they_do_not_take(family):
    module, network = FAMILIES[family]
    model, x, y = network(**TINY).eval(), torch.zeros(2, 4, 8, 8), torch.tensor([0, 10])
    t = torch.tensor([0, 1])
    for want, arguments in {
            "latents": (torch.zeros(2, 4, 16, 16), t, y), "latents (2, 3": (torch.zeros(2, 3, 8, 8), t, y),
            "times": (x, torch.tensor([-1, 0]), y), "times 0 to 1000": (x, torch.tensor([0, 1000]), y),
            "one time": (x, t[:1], y), "labels 0 to 11": (x, t, torch.tensor([0, 11])),
            "labels -1": (x, t, torch.tensor([-1, 0]))}.items():
        with pytest.raises(ValueError, match=re.escape(want.replace("one time", "want a time"))):
            model(*arguments)
    with pytest.raises(ValueError, match="times nan"):
        model(x, torch.tensor([math.nan, 0.0]), y)
    without_null = network(**dict(TINY, class_dropout_prob=0.0)).eval()
    with pytest.raises(ValueError, match="class_dropout_prob"):
        module.sample(without_null, x, torch.zeros(2, dtype=torch.long), cfg_scale=2.0)
    watched = Watched(model)
    refused_options = [
        ("labels", dict(y=torch.tensor([0, 11]))), ("cfg_interval", dict(cfg_interval=(0.8, 0.2))),
        ("cfg_interval", dict(cfg_interval=(0.0, 1.5))), ("cfg_channels 5", dict(cfg_channels=5)),
        ("sampler 'x'", dict(sampler="x")), ("num_steps 0", dict(num_steps=0))]
    refused_options += {
        "sit": [("path 'x'", dict(path="x")), ("prediction 'x'", dict(prediction="x")),
                ("eps 0.7", dict(sample_eps=0.7)), ("eps 0:", dict(sample_eps=0, prediction="noise")),
                ("num_steps 1", dict(sampler="sde-euler", num_steps=1)),
                ("diffusion_form 'x'", dict(sampler="sde-euler", diffusion_form="x")),
                ("last_step 'x'", dict(sampler="sde-euler", last_step="x")),
                ("last_step_size 0", dict(sampler="sde-euler", last_step_size=0)),
                ("reverse", dict(sampler="sde-euler", reverse=True))],
        "dit": [("num_steps 1001", dict(num_steps=1001)), ("num_steps 1 ", dict(num_steps=1)),
                ("schedule 'x'", dict(schedule="x")), ("prediction 'x'", dict(prediction="x")),
                ("fixed_variance 'x'", dict(fixed_variance="x")), ("ddim300", dict(num_steps="ddim300")),
                ("reverse", dict(reverse=True))]}[family]
    for want, options in refused_options:
        with pytest.raises(ValueError, match=re.escape(want)):
            module.sample(watched, x, **{"y": y, **options})
    assert not watched.times                                                     # all before any work


# ---------------------------------------------------------------------------------------------------------------------
# fid.py

FID_FIGURES = REFERENCE["fid"]
RESIZE_NAMES = {"tf1": "tf1", "pytorch_fid": "pytorch-fid", "cleanfid": "clean-fid"}


def filled_inception(gain=1.4):
    """Inception with filled weights. Without the gain its features would hardly depend on the image."""
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
    hooks = [model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
             for name in ("Mixed_5b", "Mixed_6b", "Mixed_6e", "Mixed_7b", "Mixed_7c", "Conv2d_2b_3x3", "Conv2d_4a_3x3")]
    with torch.no_grad():
        pool3, spatial, logits = model(x)
    for hook in hooks:
        hook.remove()
    return dict(seen, pool3=pool3, pool3_item0_minus_item1=pool3[0] - pool3[1], network_input=x,
                spatial_flat_as_ADM_nhwc=spatial, spatial_nchw_17x17=spatial.view(2, 17, 17, 7).permute(0, 3, 1, 2),
                logits_unbiased=logits, logits=model.fc(pool3), block2=seen["Mixed_6e"],
                block0=F.max_pool2d(seen["Conv2d_2b_3x3"], 3, 2), block1=F.max_pool2d(seen["Conv2d_4a_3x3"], 3, 2))


@pytest.mark.parametrize("name", [name for name in FID_FIGURES if name.startswith("inception_")])
def test_inception_equals_official_figures(name):
    """Unfolded and folded. pool3_item0_minus_item1, the image's share of the features, shows an error of the resize;
    its own float32 error is 1e-4 of it, and 8e-3 where there is no gain."""
    entry = FID_FIGURES[name]
    x, model, resize = array(**entry["array"]), filled_inception(entry["config"]["gain"]), lambda x: x
    if "resize" in entry["config"]:
        x, resize = x.floor(), fid.RESIZES[RESIZE_NAMES[entry["config"]["resize"]]]
    kinds = [(model, torch.float32), (copy.deepcopy(model).fold(), torch.float32)]
    if "float64" in entry:
        kinds.append((copy.deepcopy(model).double(), torch.float64))
    for network, dtype in kinds:
        out = inception_outputs(network, resize(x.to(dtype)).to(dtype))
        for key, recorded in entry[str(dtype).split(".")[1]].items():
            tolerance = {1: 2e-2, 1.4: 5e-4}[entry["config"]["gain"]] if "minus" in key else 1e-4
            assert difference(out[key], recorded) < (tolerance if dtype == torch.float32 else 1e-6), (key, dtype)


def test_inception_has_the_published_names():
    ours = {name: "x".join(map(str, value.shape)) for name, value in fid.InceptionV3().state_dict().items()}
    assert ours == FID_FIGURES["names"]


@pytest.mark.parametrize("name", [name for name in FID_FIGURES if name.startswith("resize_")])
def test_resizes_equal_official_figures(name):
    x = array(**FID_FIGURES[name]["array"]).floor().to(torch.uint8)
    for key, recorded in FID_FIGURES[name]["float32"].items():
        assert difference(fid.RESIZES[RESIZE_NAMES[key]](x), recorded) < 1e-5, key


def features_of(entry, name):
    given = entry["inputs"][name]["features"]
    x = array((given["n"], given["d"]), given["seed"])
    if "mix" in given:
        x = x @ (array((given["d"], given["d"]), given["mix"]) / np.float32(np.sqrt(given["d"])))
    x = x * np.float32(given.get("scale", 1)) + np.float32(given.get("shift", 0))
    return x.clamp(min=0) if given.get("relu") else x


@pytest.mark.parametrize("name", [name for name in FID_FIGURES if name.startswith(("fid_", "is_", "pr_", "kid_"))])
def test_metrics_equal_official_figures(name):
    """Rank-deficient and identical sets among them, where the figure of the centred data's singular values is exact."""
    entry, scalars = FID_FIGURES[name], FID_FIGURES[name]["scalars"]
    if name.startswith("fid_"):
        a, b = (fid.feature_statistics(features_of(entry, side)) for side in "ab")
        distance = fid.frechet_distance(*a, *b)
        exact = scalars["fid_nuclear_norm_of_centred_data"]
        assert distance == pytest.approx(exact, rel=1e-6, abs=1e-6) and distance >= 0
        assert fid.frechet_distance(*b, *a) == pytest.approx(distance, rel=1e-9, abs=1e-6)
        check_figures = {"mu_a": torch.from_numpy(a[0]), "sigma_a": torch.from_numpy(a[1])}
        agrees(check_figures, entry["float64"], 1e-6, name)
    elif name.startswith("is_"):
        given = entry["inputs"]
        scale = float(given["W"]["then"].split("(")[1].strip(")"))               # "x * float32(0.3)"
        logits = features_of(entry, "features") @ (array(**given["W"]["array"]) * np.float32(scale))
        for size in entry["config"]["split_sizes"]:
            score = fid.inception_score(logits, size)
            assert score == pytest.approx(scalars[f"float64_split_size_{size}"], rel=1e-6)
            assert score == pytest.approx(scalars[f"adm_split_size_{size}"], rel=1e-5)
    elif name.startswith("pr_"):
        reference, samples = features_of(entry, "ref"), features_of(entry, "sample")
        for dtype in (torch.float32, torch.float64):
            found = fid.precision_recall(reference.to(dtype), samples.to(dtype), rows=70)
            assert found == (scalars["numpy_float64_precision"], scalars["numpy_float64_recall"])
            theirs = scalars["adm_precision"], scalars["adm_recall"]             # float16: a sample more or less
            assert found == pytest.approx(theirs, abs=1.01 / len(samples))
    else:
        config = entry["config"]
        mean, std = fid.kid(features_of(entry, "features_1"), features_of(entry, "features_2"), config["kid_subsets"],
                            config["kid_subset_size"], config["rng_seed"])
        assert (mean, std) == pytest.approx((scalars["mean_float64"], scalars["std_float64"]), rel=1e-6)


def test_precision_and_recall_are_not_exchanged():
    """Samples of one of two real modes: all of them are real, but they miss half of what is."""
    real = torch.cat([array((100, 4), 1), array((100, 4), 2) + 50])
    assert fid.precision_recall(real, real[:100] + 0.01 * array((100, 4), 3)) == (1.0, 0.5)


def test_frechet_distance_of_known_gaussians():
    mu, sigma = np.zeros(3), np.eye(3)
    assert fid.frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(12)   # equal covariances: |mu1 - mu2|^2
    assert fid.frechet_distance(mu, sigma, mu, 9 * sigma) == pytest.approx(12)   # (3 - 1)^2 in each of three directions
    assert fid.frechet_distance(mu, 0 * sigma, mu + 1, 0 * sigma) == pytest.approx(3)
    with pytest.raises(ValueError, match="do not go together"):
        fid.frechet_distance(mu, sigma, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="1 images: mean and covariance need at least 2"):
        fid.feature_statistics(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        fid.feature_statistics(np.array([[1.0, math.nan], [1, 2], [2, 2]]))
    with pytest.raises(ValueError, match="more than 3"):
        fid.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


@pytest.fixture(scope="session")
def torch_fidelity():
    """torch-fidelity's own network and metrics. It imports torchvision, which it does not need for them and which this
    torch does not go with."""
    absent = ("torchvision", "torchvision.datasets", "torchvision.models", "torchvision.transforms",
              "torchvision.transforms.functional")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in absent}):
        names = ("feature_extractor_inceptionv3", "metric_fid", "metric_isc", "metric_kid", "metric_prc")
        return SimpleNamespace(**{name: importlib.import_module(f"torch_fidelity.{name}") for name in names})


def test_every_figure_equals_torch_fidelitys(torch_fidelity, inception_weights):
    names = ["2048", "logits_unbiased"]
    theirs = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "peer", names, feature_extractor_weights_path=str(inception_weights))
    ours = fid.InceptionV3.from_published(inception_weights)
    images = (array((8, 3, 40, 56), 1, 0, 256) * array((8, 3, 1, 1), 3, 0.1, 1)).floor().to(torch.uint8)
    with torch.no_grad():
        (pool3, logits), out = theirs(images), ours(fid.RESIZES["tf1"](images))
    for mine, expected in ((out.pool3, pool3), (out.logits, logits)):
        atol = 1e-4 * expected.std().item()
        torch.testing.assert_close(mine, expected, rtol=0, atol=atol)
        torch.testing.assert_close(mine - mine.mean(0), expected - expected.mean(0), rtol=0, atol=atol)
    real, samples = array((90, 32), 5), array((130, 32), 6) * 1.1 + 0.1
    quiet = dict(verbose=False, save_cpu_ram=False)
    scores = torch_fidelity.metric_prc.prc_features_to_metric(
        samples, real, prc_neighborhood=3, prc_batch_size=50, **quiet)
    assert fid.precision_recall(real, samples) == pytest.approx((scores["precision"], scores["recall"]), abs=1e-6)
    scores = torch_fidelity.metric_kid.kid_features_to_metric(
        samples.double(), real.double(), kid_subsets=7, kid_subset_size=60, kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=2020, **quiet)
    expected = scores["kernel_inception_distance_mean"], scores["kernel_inception_distance_std"]
    assert fid.kid(samples, real, 7, 60) == pytest.approx(expected, rel=1e-6)
    scores = torch_fidelity.metric_isc.isc_features_to_metric(samples, splits=2, shuffle=False)
    assert fid.inception_score(samples, 65) == pytest.approx(scores["inception_score_mean"], rel=1e-6)
    statistics = [dict(zip(("mu", "sigma"), fid.feature_statistics(x))) for x in (real, samples)]
    scores = torch_fidelity.metric_fid.fid_statistics_to_metric(*statistics, False)
    distance = fid.frechet_distance(*statistics[0].values(), *statistics[1].values())
    assert distance == pytest.approx(scores["frechet_inception_distance"], rel=1e-6)


def evaluated(*words, processes=1, **env):
    """The figures that the program writes, and what it prints."""
    path = Path(words[0]).parent / f"figures-{len(list(Path(words[0]).parent.iterdir()))}.json"
    done = command("fid.py", *words, "--json", path, processes=processes, **env)
    return json.loads(path.read_text()), done.stdout


@pytest.fixture(scope="session")
def image_sets(tmp_path_factory, inception_weights):
    """The same 21 samples in every form, 13 reference images, and the reference's statistics as ADM writes them."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    samples, reference = (rng.integers(0, 256, (n, 4, 4, 3), np.uint8).repeat(6, 1).repeat(6, 2) for n in (21, 13))
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
    command("fid.py", root / "reference.npz", "--save-stats", root / "stats.npz", "--weights", inception_weights)
    with np.load(root / "stats.npz") as stats:
        np.savez(root / "adm.npz", arr_0=reference, **stats)
        np.savez(root / "pytorch-fid.npz", mu=stats["mu"], sigma=stats["sigma"])
    return root


def test_all_forms_of_images_are_read_alike(image_sets):
    with np.load(image_sets / "samples.npz") as file:
        expected = file["arr_0"]
    for name in ("samples.npz", "compressed.npz", "samples.npy", "floats.npy", "folder", "samples.zip"):
        images = fid.open_images(image_sets / name)
        assert len(images) == 21 and images.about == "21 images of 24 x 24"
        np.testing.assert_array_equal(np.concatenate(list(images.batches(0, 21, 8, 2))), expected, name)
        np.testing.assert_array_equal(np.concatenate(list(images.batches(5, 19, 4, 2))), expected[5:19], name)


def test_processes_and_files_of_statistics_give_the_same_figures(image_sets, inception_weights):
    weights, every = ("--weights", inception_weights, "--batch-size", 8), ("--metrics", *fid.METRICS)
    whole, table = evaluated(image_sets / "samples.npz", image_sets / "reference.npz", *weights, *every)
    for text in ("21 images of 24 x 24", "resize tf1", "FID", "sFID", "Inception Score", "precision", "recall", "KID",
                 "13 images", "fewer than 2,048"):
        assert text in table
    assert whole["fid"] > 1 and whole["sfid"] > 1 and whole["num_samples"] == 21
    figures, table = evaluated(image_sets / "folder", image_sets / "adm.npz", *weights, *every, processes=2)
    assert "its statistics; 13 images for precision, recall, kid" in table
    for metric in (*fid.METRICS, "kid_std"):
        assert figures[metric] == pytest.approx(whole[metric], rel=1e-5, abs=1e-6), metric
    figures, table = evaluated(image_sets / "samples.npz", image_sets / "pytorch-fid.npz", *weights)
    assert figures["fid"] == pytest.approx(whole["fid"], rel=1e-6) and not {"sfid", "precision"} & figures.keys()
    assert figures["is"] == pytest.approx(whole["is"])
    figures, table = evaluated(image_sets / "samples.npz", image_sets / "samples.npy", *weights, "--references", 7,
                               "--metrics", "fid", "recall", "--resize", "clean-fid")
    assert figures["fid"] == pytest.approx(0, abs=1e-4)                          # with fewer images than dimensions
    assert figures["recall"] == 1.0 and "7 images for recall" in table and "resize clean-fid" in table


def test_the_program_computes_what_its_functions_do(image_sets, inception_weights):
    model, features = fid.InceptionV3.from_published(inception_weights), []
    for name in ("samples.npz", "reference.npz"):
        with np.load(image_sets / name) as file, torch.no_grad():
            features.append(model(fid.resize_tf1(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2))))
    ours, theirs = features
    figures, _ = evaluated(image_sets / "samples.npz", image_sets / "reference.npz", "--weights", inception_weights)
    for metric, part in (("fid", "pool3"), ("sfid", "spatial")):
        a, b = (torch.as_tensor(getattr(side, part)).double().numpy() for side in (ours, theirs))
        expected = fid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
        assert figures[metric] == pytest.approx(expected, rel=1e-5)
    assert figures["is"] == pytest.approx(fid.inception_score(ours.logits), rel=1e-5)
    assert (figures["precision"], figures["recall"]) == fid.precision_recall(theirs.pool3, ours.pool3)


def test_a_big_file_is_read_in_pieces(tmp_path):
    """240 MB of images, deflated, pass through 48 MB."""
    with zipfile.ZipFile(tmp_path / "big.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
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


def broken_images(tmp_path, kind):
    path, image = tmp_path / f"{kind}.npz", np.zeros((8, 8, 3), dtype=np.uint8)
    folder = tmp_path / kind
    if kind == "pickled":
        np.savez(path, np.array([{"a": 1}, None], dtype=object))
    elif kind == "one image":
        np.savez(path, image[None])
    elif kind == "floats":
        np.savez(path, np.full((3, 8, 8, 3), 2.0))
    elif kind == "grey array":
        np.savez(path, np.zeros((3, 8, 8), dtype=np.uint8))
    elif kind == "no arr_0":
        np.savez(path, images=image[None])
    elif kind == "truncated":
        np.savez(path, np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "truncated npy":
        path = tmp_path / "truncated.npy"
        np.save(path, np.zeros((9, 8, 8, 3), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "damaged":
        np.savez_compressed(path, np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8))
        data = bytearray(path.read_bytes())
        data[150_000:150_040] = bytes(40)
        path.write_bytes(data)
    else:
        folder.mkdir()
        path = folder
        for i in range(3):
            Image.fromarray(image).save(folder / f"{i}.png")
        if kind == "mixed sizes":
            Image.fromarray(np.zeros((9, 8, 3), dtype=np.uint8)).save(folder / "odd.png")
        elif kind == "corrupt":
            (folder / "odd.png").write_bytes((folder / "0.png").read_bytes()[:40])
        elif kind == "rgba":
            Image.fromarray(np.zeros((8, 8, 4), dtype=np.uint8)).save(folder / "odd.png")
        elif kind == "sixteen bits":
            Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(folder / "odd.png")
        elif kind == "empty":
            shutil.rmtree(folder)
            folder.mkdir()
    return path


@pytest.mark.parametrize("kind, said", {
    "missing.npz": "not found", "pickled": "pickled objects", "one image": "at least 2", "floats": "want uint8",
    "grey array": "want images (N, H, W, 3)", "no arr_0": "arr_0", "truncated": "truncated.npz holds no images",
    "truncated npy": "ends after 4 of 9 images", "damaged": "is damaged", "mixed sizes": "odd.png is 9 x 8",
    "corrupt": "odd.png cannot be used", "rgba": "mode RGBA", "sixteen bits": "mode I;16",
    "empty": "has no images"}.items())
def test_images_that_cannot_be_used_are_named(tmp_path, image_sets, inception_weights, kind, said):
    path = tmp_path / kind if kind == "missing.npz" else broken_images(tmp_path, kind)
    words = ("--weights", inception_weights, "--json", tmp_path / "out.json")
    line = refused("fid.py", path, image_sets / "pytorch-fid.npz", *words)
    assert said in line and line.startswith("fid.py: ") and not (tmp_path / "out.json").exists()


def test_grey_images_become_rgb_as_stated(tmp_path):
    Image.fromarray(np.full((4, 4), 7, dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 9, dtype=np.uint8)).convert("P").save(tmp_path / "b.png")
    batch, = fid.open_images(tmp_path).batches(0, 2, 8, 1)
    assert batch.shape == (2, 4, 4, 3) and (batch[0] == 7).all() and (batch[1] == 9).all()


def test_the_evaluator_refuses_what_it_cannot_do(image_sets, inception_weights, server, monkeypatch, tmp_path):
    samples, weights = image_sets / "samples.npz", ("--weights", inception_weights)
    only = image_sets / "pytorch-fid.npz"
    assert "statistics for fid, is only" in refused("fid.py", samples, only, *weights, "--metrics", "sfid")
    assert "statistics for fid, is only" in refused("fid.py", samples, only, *weights, "--metrics", "fid", "recall")
    assert "give SAMPLES and REFERENCE" in refused("fid.py", samples, *weights)
    assert "--batch-size 0" in refused("fid.py", samples, only, *weights, "--batch-size", 0)
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert "want those of 2048" in refused("fid.py", samples, tmp_path / "other.npz", *weights)
    np.savez(tmp_path / "nan.npz", mu=np.full(2048, math.nan), sigma=np.eye(2048))
    assert "not finite" in refused("fid.py", samples, tmp_path / "nan.npz", *weights)
    broken = torch.load(inception_weights, weights_only=True)
    broken["fc.bias"] = torch.zeros(5)
    torch.save(broken, tmp_path / "broken.pth")
    assert "does not fit" in refused("fid.py", samples, only, "--weights", tmp_path / "broken.pth")
    broken["fc.bias"] = torch.zeros(1008)
    broken["Mixed_5b.branch1x1.bn.bias"] = torch.full((64,), math.nan)
    torch.save(broken, tmp_path / "nan.pth")
    for metrics in ("fid", "is"):
        line = refused("fid.py", samples, only, "--weights", tmp_path / "nan.pth", "--metrics", metrics)
        assert "features are not finite" in line
    assert "there is no folder" in refused("fid.py", samples, only, *weights, "--json", tmp_path / "no" / "out.json")
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
    assert set(checkpoint_of(through / "sit")) == {"step", "log", "net", "ema", "opt"}
    words = stage(whole, "sit", stopped, **flags)
    folder.mkdir(parents=True)                               # killed before it saved, within a line
    (folder / "log.jsonl").write_text('{"step": 5, "loss": 1}\n{"step": 1')
    for kind, lines, workers in ((signal.SIGKILL, 5, 1), ("saving", 9, 0), (signal.SIGTERM, 13, 0),
                                 (signal.SIGINT, 16, 1)):
        child = start(*words, "--workers", workers, start_new_session=True)
        until_it_has_logged(child, folder / "log.jsonl", lines)     # past a checkpoint
        if kind == signal.SIGTERM:
            assert "another process works in" in refused(*words)
        if kind == "saving":
            kind = signal.SIGKILL
            while not list(folder.glob(".checkpoint.pt.*")):
                assert child.poll() is None, "it was not seen saving"
        if kind == signal.SIGINT:
            os.killpg(child.pid, kind)                              # as a terminal does
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


RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
RED_BLUE = Image.fromarray(np.uint8([[RED] * 4 + [BLUE] * 4] * 8))
GREY = RED_BLUE.getchannel("R")                                     # white, black
ON_ITS_SIDE = Image.Exif()                                          # as cameras store it
ON_ITS_SIDE[0x0112] = 6


@pytest.mark.parametrize("image, options, left, right", [
    (RED_BLUE, {}, RED, BLUE), (RED_BLUE.convert("P"), {}, RED, BLUE), (GREY, {}, WHITE, BLACK),
    (RED_BLUE.transpose(Image.ROTATE_90), {"exif": ON_ITS_SIDE}, RED, BLUE),
    (RED_BLUE.convert("CMYK"), {"format": "TIFF"}, RED, BLUE),
    (Image.merge("RGBA", (*RED_BLUE.split(), GREY)), {}, RED, WHITE),
    (Image.fromarray(np.asarray(GREY, np.uint16) * 257 // 2), {}, (127, 127, 127), BLACK),
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
        assert one.keys() == {"step", "log", "net", "opt", "discriminator", "d_opt"}
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
        torch.save(state, folder / "checkpoint.pt")
        (folder / "ema.safetensors").unlink()
        command(*words, processes=processes)
        again = log_of(folder)
        assert again[:2] == log[:2] and again[2]["step"] == 6
        mixed = (saved + 2 * processes * log[2]["loss"]) / (saved + 2 * processes)
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
                    f"--batch-size {size} --decode-batch-size {size} --out", path)
            images.append(images_of(path))
            assert np.load(path)["arr_1"].tolist() == labels
            assert np.abs(images[-1] - images[0]).max() <= most
        assert images[0].shape == (12, 32, 32, 3) and np.load(path)["arr_0"].dtype == np.uint8
        assert len({image.tobytes() for image in images[0]}) == 12, "two images are one"


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
    (expected, _), = train.in_order(held_out, 21, range(21))
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
    torch.save(nets["DiT"].state_dict(), root / "dit.pt")
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
    ("FILES --tasks features", "stage align"), ("FILES --out x.jpg", "ends in .npz or .zip"),
    ("FILES --steps ddim5", "steps ddim5: SiT wants a number"),
    ("FILES --steps X", "--steps: X: want 50"), ("FILES --eta 1", "--eta is no option of sit.py"),
    ("FILES --cfg-interval 0.9 0.1", "cfg_interval"),
    ("FILES --cfg-channels 5", "cfg_channels 5"), ("FILES --cfg-scale nan", "nan: want a number"),
    ("FILES --sampler dopri5 --atol 0 --rtol 0", "one of them more"),
    ("FILES --sampler sde-euler --diffusion-form x", "diffusion_form 'x'"),
    ("FILES --sampler sde-euler --diffusion-norm -1", "diffusion_norm -1"),
    ("--model SiT-Ti/2", "--ckpt FILE"), ("--run nowhere", "--stage sit"),
    ("RUN --ckpt ROOT/sit.pt", "no --ckpt"), ("RUN --path gvp", "was trained with linear"),
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


def test_the_study_plans_measures_and_reports(whole, tmp_path):
    """Its plan has every seed, length, family and guidance for both; what is there is measured
    once, with the figures of the demo's report; what is missing is not in the tables."""
    study, out, runs = demo.study, tmp_path / "study", {}
    jobs = command("demo.study --steps 6 --num 20 --dry-run --out", out).stdout.splitlines()
    sets = 2 * 3 * 3 * 2 * 3 + 2 * 3 * 3 + len(study.AUTOENCODERS) - 2 + 2 * 3
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
    seconds = {study.name_of(study.samples_of(out, run), out): 1.5 for run in runs.values()}
    train.write_json(seconds, out / "timings.json")

    plan, file = study.Plan(True, 6, 20), out / "results.jsonl"
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
    """All tables of the scenes, the main ones of CIFAR-10; no set of the two plans is missing."""
    readme = (HERE / "demo/README.md").read_text().splitlines()
    for words, sets, least in (("demo/study.jsonl", 150, 60),
                               ("demo/study-cifar10.jsonl --data cifar10.zip", 12, 8)):
        said = command("demo.study tables", words).stdout
        assert f"{sets} of the {sets} sets are there" in said
        said = said.split("## Why")[0] if "cifar10" in words else said
        tables = [line for line in said.splitlines() if line.startswith(("|", "*"))]
        assert len(tables) >= least and set(tables) <= set(readme)


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
