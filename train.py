"""Train everything: autoencoder (plain or aligned), latents, SiT, DiT. Without --stage: all of it, on built-in scenes.

    python train.py                                                              all stages, then a report
    python train.py --stage align --data DIR_OR_ZIP --teacher runs/scenes/teacher --out runs/NAME
    torchrun --nproc_per_node=8 train.py --stage sit --data DIR_OR_ZIP --out runs/NAME --model SiT-B/2

    stage       reads                        writes, in OUT/STAGE
    teacher     data                         a small DINOv2, segmentation and depth heads on its features
    heads       data with masks or depth     segmentation and depth heads on the features of any teacher
    evaluator   data                         an independent classifier, whose features the report compares
    vae         data                         the plain autoencoder, in diffusers' layout
    align       data, teacher                the aligned autoencoder, and its two MLPs
    latents     data, vae or align           moments of the latents of all training images
    sit, dit    latents                      a diffusion transformer: ema.safetensors, config.json
    report      all of these                 report.md and its pictures, in OUT
    study       data                         all of these, for several seeds, lengths and controls, and report.md

Every stage writes settings.json; those that train also write checkpoint.pt, log.jsonl and curves.png, and go on from
their checkpoint. Randomness is a function of (seed, step) or (seed, epoch, index).
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
import warnings
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import align
import fid
import vae
from sample import (FAMILIES, Rows, autoencoder_folder, barrier, by_class, checksum, decode, device_of_process,
                    first_on_node, generate, join_processes, legend_of, load_autoencoder, load_heads, load_lpips,
                    load_task_heads, process, progress, read_json, read_latents, read_tasks, save_picture, scatter,
                    sheet, stop, to_float, to_uint8, write_json)
from vae import atomic_file, load_weights, save_safetensors

# ---------------------------------------------------------------------------------------------------------------------
# Settings


# Rows of the paper's tables: (model, steps). All else that it says of them is IMAGENET["sit"] and ["dit"], the official
# settings of SiT and DiT, which the paper does not change. Rows with guidance are these, sampled with it.
PRESETS = {
    "imagenet": (None, None),
    "dit-b-2-400k": ("DiT-B/2", 400_000),
    "sit-b-2-400k": ("SiT-B/2", 400_000), "sit-b-2-1m": ("SiT-B/2", 1_000_000), "sit-b-2-4m": ("SiT-B/2", 4_000_000),
    "sit-l-2-400k": ("SiT-L/2", 400_000),
    "sit-xl-2-400k": ("SiT-XL/2", 400_000), "sit-xl-2-2m": ("SiT-XL/2", 2_000_000),
    "sit-xl-2-7m": ("SiT-XL/2", 7_000_000),
}

# The paper does not tell how its autoencoder is trained. This is our choice, after the trainings of Stable Diffusion's
# autoencoder and of VA-VAE; nobody has measured it at this size yet.
AUTOENCODER_256 = dict(
    steps=200_000, batch_size=64, lr=1e-4, weight_decay=0.0, layers_per_block=2, norm_groups=32, perceptual_weight=1.0,
    disc_weight=0.5, disc_start=20_000, held_out=1024, statistics=50_000)
DIFFUSION_256 = dict(steps=400_000, batch_size=256, lr=1e-4, weight_decay=0.0, ema=0.9999)
IMAGENET = {
    "all": dict(image_size=256, channels=(128, 256, 512, 512), latent_channels=4, workers=8, warmup=0, decay=1.0,
                log_every=100, save_every=5000, sample_every=10_000),
    "vae": AUTOENCODER_256,
    "align": dict(AUTOENCODER_256, teacher="dinov2_vitb14", align_weight=0.5, align_adaptive=True, align_hidden=2048),
    "latents": dict(batch_size=32),
    "sit": dict(DIFFUSION_256, model="SiT-XL/2"),
    "dit": dict(DIFFUSION_256, model="DiT-XL/2"),
}


def flag(default, text, choices=None):
    """A field of Config: its default, its help, and the values that it may have."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass
class Config:
    """Every flag. A default of None is filled in by the stage's row of DEFAULTS, or as its help says."""
    stage: str = flag(None, "one stage; without it all of them run, for a plain and an aligned autoencoder",
                      ("teacher", "evaluator", "heads", "vae", "align", "latents", "sit", "dit", "report", "study"))
    data: str = flag("scenes", "built-in scenes, or a folder or .zip with train/CLASS/* and test/CLASS/*, or CLASS/*")
    out: str = flag(None, "the run's folder (default: runs/ and the name of the data, and -study for the study)")
    seed: int = flag(0, "of weights, noise and the order of the images")
    preset: str = flag(None, "with --stage: settings for ImageNet at 256 px, of one of the paper's rows or in general; "
                       "flags that are given too stand above it", tuple(PRESETS))
    image_size: int = flag(32, "pixels a side")
    labels: bool = flag(True, "teacher: learn classes and masks; without them depth alone, as a control")
    scenes: int = flag(20000, "built-in scenes to train on; a tenth as many are held out")
    workers: int = flag(0, "processes that load images, for every training process")
    max_bad: int = flag(0, "images that cannot be read, to pass over: the next one stands in; one more stops the run")
    steps: int = flag(None, "optimiser steps")
    batch_size: int = flag(None, "images a step, on all processes together")
    lr: float = flag(None, "peak of the learning rate of AdamW")
    warmup: int = flag(50, "steps of linear warm-up")
    decay: float = flag(0.05, "share of lr at the end of its cosine; 1 keeps it")
    weight_decay: float = flag(None, "of AdamW")
    clip: float = flag(0.0, "largest norm of the gradient, of each optimiser; 0: no limit")
    skip_nonfinite: int = flag(0, "steps whose loss or gradient is not finite, to pass over; one more stops the run")
    accumulate: int = flag(1, "autoencoder, sit, dit: parts of a batch that follow each other, to save memory")
    precision: str = flag(None, "of the forward pass of autoencoder, sit, dit; weights and optimiser are float32 "
                          "(default: bf16 on GPUs that have it; no fp16: its loss would need scaling)",
                          ("fp32", "tf32", "bf16"))
    compile: bool = flag(False, "autoencoder, sit, dit: torch.compile")
    log_every: int = flag(25, "steps between lines of log.jsonl")
    save_every: int = flag(250, "steps between checkpoints, a multiple of log_every")
    sample_every: int = flag(1000, "autoencoder, sit, dit: steps between pictures in OUT/STAGE/samples")
    utilisation: float = flag(0.4, "share of a GPU's peak for which the plan tells the GPU hours")
    dry_run: bool = flag(False, "print the plan, check data and weights, and end before any work")
    channels: tuple = flag((8, 32, 48), "autoencoder: channels of its levels, each at half the resolution of the last")
    layers_per_block: int = flag(1, "autoencoder: resnets a level")
    norm_groups: int = flag(8, "autoencoder: groups of its norms")
    latent_channels: int = flag(8, "autoencoder: channels of its latents")
    gradient_checkpointing: bool = flag(False, "autoencoder, sit, dit: less memory, one more forward pass")
    pixel_loss: str = flag("mse", "autoencoder: squared or absolute difference", ("mse", "l1"))
    kl_weight: float = flag(1e-6, "weight of the KL term, which is summed over a latent")
    perceptual_weight: float = flag(0.0, "weight of LPIPS")
    disc_weight: float = flag(0.0, "weight of the GAN loss, times its adaptive weight")
    disc_start: int = flag(0, "first step with the GAN loss")
    held_out: int = flag(256, "autoencoder: held-out images on which it is measured at every checkpoint")
    statistics: int = flag(16384, "autoencoder: images, at most, that tell mean and deviation of its latents")
    init: str = flag(None, "vae, align: start from this autoencoder: folder of diffusers' layout, or file of weights")
    teacher: str = flag(None, "align, heads: folder of stage teacher (default: OUT/teacher), or a published name, for "
                        "example dinov2_vitb14")
    teacher_size: int = flag(None, "align, heads: pixels a side that the teacher sees (default: 224 for patches of 14, "
                             "else the image size)")
    cache_tokens: bool = flag(False, "align: keep the teacher's tokens of all images on disk, instead of running it")
    align_weight: float = flag(0.05, "align: weight of the align loss")
    align_adaptive: bool = flag(False, "align: times the ratio of the gradients of all other terms and of the align "
                                "loss at the encoder's last layer")
    align_form: str = flag("both", "align: distance of features: cosine, smooth L1, or the first and a tenth of the "
                           "second", tuple(align.FORMS))
    patch_weight: float = flag(1.0, "align: share of the patch tokens in the align loss")
    cls_weight: float = flag(1.0, "align: share of the class token in the align loss")
    shuffle_targets: bool = flag(False, "align: give every image the tokens of another, as a control")
    align_hidden: int = flag(256, "align: width of the two MLPs")
    fold: int = flag(None, "align: fold x fold latent cells make one token (default: what makes the grids meet)")
    pool: int = flag(4, "align: MLPcls sees the latent averaged to pool x pool cells")
    target: str = flag("norm", "align: the teacher's tokens after its last norm, or before", ("norm", "prenorm"))
    standardize: bool = flag(True, "align: targets of mean 0 and deviation 1 in every channel")
    latent_scale: str = flag("channel", "autoencoder: diffusion sees latents of mean 0 and deviation 1 in every "
                             "channel, or scaled by one factor, as Stable Diffusion's are", ("channel", "one"))
    vae: str = flag(None, "latents, sit, dit: folder of the autoencoder (default: OUT/align, else OUT/vae)")
    latents: str = flag(None, "sit, dit: folder of stage latents (default: OUT/latents)")
    model: str = flag(None, "sit, dit: name of the model, for example SiT-B/2")
    path: str = flag("linear", "sit: from noise to data", ("linear", "gvp", "vp"))
    prediction: str = flag("velocity", "sit: what the model tells of a point on it", ("velocity", "noise", "score"))
    loss_weight: str = flag(None, "sit: of noise and score, to count errors of the velocity or of a bound on the "
                            "likelihood", ("velocity", "likelihood"))
    label_dropout: float = flag(0.1, "sit, dit: share of labels that training drops, for guidance; 0: no guidance")
    ema: float = flag(0.997, "sit, dit: decay of the averaged weights")
    num_samples: int = flag(2000, "all stages: images to sample and to compare")
    cfg_scale: float = flag(1.5, "all stages: guidance of the second set of samples")


DEFAULTS = {
    "teacher": dict(steps=450, batch_size=64, lr=2e-3, weight_decay=0.05),
    "evaluator": dict(steps=250, batch_size=64, lr=2e-3, weight_decay=0.05),
    "heads": dict(steps=500, batch_size=64, lr=2e-3, weight_decay=0.01),
    "vae": dict(steps=1400, batch_size=16, lr=3e-3, weight_decay=0.0),
    "align": dict(steps=1400, batch_size=16, lr=3e-3, weight_decay=0.0),
    "latents": dict(batch_size=256),
    "sit": dict(steps=2400, batch_size=64, lr=2e-3, weight_decay=0.0, model="SiT-Ti/2"),
    "dit": dict(steps=2400, batch_size=64, lr=2e-3, weight_decay=0.0, model="DiT-Ti/2"),
    "report": dict(),
    "study": dict(steps=2400),
}


def parse_arguments(argv=None):
    """argv -> the settings that it gives, a dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop                                                          # one line, without the usage
    for field in dataclasses.fields(Config):
        options = {"type": int, "nargs": "+"} if field.type is tuple else {"type": field.type}
        options = {"action": argparse.BooleanOptionalAction} if field.type is bool else options
        if field.metadata["choices"]:
            options["choices"] = field.metadata["choices"]
        name, text = field.name.replace("_", "-"), field.metadata["help"]
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)
    return vars(parser.parse_args(argv))


def resolve(given, stage):
    """The settings of one stage: those given, else those of the preset, else the stage's defaults, else Config's.
    Stops at values that cannot be."""
    values = dict(DEFAULTS[stage])
    if "preset" in given:
        model, steps = PRESETS[given["preset"]]
        values.update(IMAGENET["all"], **IMAGENET.get(stage, {}))
        if model and stage in ("sit", "dit"):
            if stage != model[:3].lower():
                stop(f"--preset {given['preset']} trains a {model[:3]}: give --stage {model[:3].lower()}")
            values.update(model=model, steps=steps)
    cfg = Config(**{**values, **given, "stage": stage})
    out = f"runs/{Path(cfg.data).stem}" + ("-study" if stage == "study" else "")
    cfg = dataclasses.replace(cfg, channels=tuple(cfg.channels), out=cfg.out or out)
    least = dict(seed=0, workers=0, warmup=0, scenes=20, num_samples=2, max_bad=0, skip_nonfinite=0)
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), field.name.replace("_", "-")
        if field.type is int and field.name != "disc_start" and value is not None and value < least.get(field.name, 1):
            stop(f"--{name} {value}: want at least {least.get(field.name, 1)}")
        if field.type is float and value is not None and not 0 <= value < math.inf:
            stop(f"--{name} {value}: want a number that is not negative")
    for name in ("decay", "ema", "label_dropout", "utilisation"):
        if getattr(cfg, name) > 1:
            stop(f"--{name.replace('_', '-')} {getattr(cfg, name)}: want a share, at most 1")
    if cfg.precision is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        cfg = dataclasses.replace(cfg, precision="bf16" if bf16 else "fp32")
    if cfg.save_every % cfg.log_every:
        stop(f"--save-every {cfg.save_every} is not a multiple of --log-every {cfg.log_every}")
    return cfg


# ---------------------------------------------------------------------------------------------------------------------
# The built-in scenes: a lit solid on a ground under a sky, drawn by sphere tracing of signed distances (Hart, 1996)

SCENE_CLASSES = ("sphere", "cube", "cylinder", "cone", "torus", "octahedron", "star", "cross", "two spheres", "arch")
SEGMENTS = ("sky", "ground") + SCENE_CLASSES
NEAR, FAR = 2.0, 12.0                                                            # range of depth; the sky is at FAR
HALF_HEIGHT = (0.92, 0.68, 0.92, 0.92, 0.95, 1.05, 0.85, 0.95, 0.5, 0.8)         # of each solid, which stands on ground
TURN = (math.pi, math.pi, math.pi, math.pi, 0.7, math.pi, 0.5, 0.7, 0.6, 0.6)    # largest turn about the vertical
REACH = 1.3                                                                      # radius of a ball that holds any solid


def scene_numbers(seed, index, count):
    """(N, count) numbers in [0, 1) that depend on (seed, index, column) alone: SplitMix64 of a counter, count <= 64."""
    x = index.astype(np.uint64)[:, None] * np.uint64(64) + np.arange(count, dtype=np.uint64)
    x = (x + np.array([seed + 1], np.uint64) * np.uint64(0xD1342543DE82EF95)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24))


def box(x, y, z, a, b, c):
    """Distance to a box of half sides a, b, c; too small beyond its edges, never too large."""
    return torch.maximum(torch.maximum(x.abs() - a, y.abs() - b), z.abs() - c)


def solid_distance(label, x, y, z):
    """Signed distance, never too large, from points to the solid of a class; y is up, z towards the camera."""
    name = SCENE_CLASSES[label]
    if name == "sphere":
        return (x * x + y * y + z * z).sqrt() - 0.92
    if name == "cube":
        return box(x, y, z, 0.68, 0.68, 0.68)
    if name == "cylinder":
        return torch.maximum((x * x + z * z).sqrt() - 0.58, y.abs() - 0.92)
    if name == "cone":
        return torch.maximum(0.894 * (x * x + z * z).sqrt() + 0.447 * (y - 1), -0.92 - y)
    if name == "torus":
        return (((x * x + y * y).sqrt() - 0.68).square() + z * z).sqrt() - 0.27
    if name == "octahedron":
        return (x.abs() + y.abs() + z.abs() - 1.05) * 0.577
    if name == "star":                        # the plane folded into a tenth, cut by a line from tip to notch
        angle = (torch.remainder(torch.atan2(x, y) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
        edge = (x * x + y * y).sqrt() * (0.582 * angle.cos() + 0.847 * angle.sin()) - 0.612
        return torch.maximum(edge, z.abs() - 0.28)
    if name == "cross":
        bars = torch.minimum(box(x, y, z, 0.95, 0.32, 0.32), box(x, y, z, 0.32, 0.95, 0.32))
        return torch.minimum(bars, box(x, y, z, 0.32, 0.32, 0.95))
    if name == "two spheres":
        return ((x.abs() - 0.55).square() + y * y + z * z).sqrt() - 0.5
    opening = torch.minimum((x * x + (y + 0.1).square()).sqrt() - 0.5, torch.maximum(x.abs() - 0.5, y + 0.1))
    return torch.maximum(box(x, y, z, 0.95, 0.8, 0.4), -opening)


def hsv(hue, saturation, value):
    """Colours (3, ...) from hue, saturation, value in [0, 1]."""
    k = torch.remainder(torch.stack([5 + 6 * hue, 3 + 6 * hue, 1 + 6 * hue]), 6)
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def trace(label, origin, direction, t, end):
    """Walk along R rays in the solid's own frame, from t to end: which hit, and where. Vectors are triples of (R,)."""
    live, hit, where = torch.arange(len(t)), torch.zeros(len(t), dtype=torch.bool), t.clone()
    for steps in (4, 4, 8, 32):                                                  # most rays need few: then drop them
        for _ in range(steps):
            distance = solid_distance(label, *(o + t * d for o, d in zip(origin, direction)))
            t = t + distance
        arrived, on_way = distance < 2e-3, (distance >= 2e-3) & (t < end)
        hit[live[arrived]], where[live[arrived]] = True, t[arrived]
        live, t, end = live[on_way], t[on_way], end[on_way]
        origin, direction = [o[on_way] for o in origin], [d[on_way] for d in direction]
    return hit, where


def draw_solid(label, u, size):
    """Scenes of one class from numbers u (N, 24): images (3, N, R), segments (N, R), depth (N, R); R = size^2 rays."""
    columns = iter(u.T[:, :, None])                                              # each (N, 1)

    def draw(low=0.0, high=1.0):
        return low + (high - low) * next(columns)

    # rays: the camera looks down by `pitch` at a point above the ground, five units away
    pitch = draw(0.2, 0.34)
    pixel = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1
    a, b = 0.27 * pixel.repeat(size)[None], -0.27 * pixel.repeat_interleave(size)[None]
    norm = (a * a + b * b + 1).rsqrt()
    dx, dy, dz = a * norm, (b * pitch.cos() - pitch.sin()) * norm, -(pitch.cos() + b * pitch.sin()) * norm
    dx = dx.expand_as(dy)
    eye_y, eye_z = 0.8 + 5 * pitch.sin(), 5 * pitch.cos()

    # sky: a gradient, blue or red, with soft clouds
    hue = torch.where(draw() < 0.5, draw(0.53, 0.65), draw(0.0, 0.12))
    saturation, height = draw(0.3, 0.65), (dy * 2.5 + 0.4).clamp(0, 1)
    cloud = torch.sin(9 * dx + draw(0, 6.28)) * torch.sin(17 * dy + draw(0, 6.28))
    sky = hsv(hue, saturation * (0.3 + 0.7 * height), 0.95 - 0.12 * height) + 0.06 * cloud.clamp(min=0)

    # ground: tiles that fade into the horizon, and the shadow of the solid
    light_turn = draw(-0.9, 0.9)
    lx, ly, lz = 0.66 * light_turn.sin(), 0.75, 0.66 * light_turn.cos()          # towards the light
    scale, px, pz = draw(0.85, 1.05), draw(-0.16, 0.16), draw(-0.2, 0.2)
    to_ground = torch.where(dy < -1e-3, -eye_y / dy.clamp(max=-1e-3), 1e9)
    gx, gz, far = to_ground * dx, eye_z + to_ground * dz, (to_ground / FAR).clamp(max=1)
    tile = (torch.sin(2.2 * gx + draw(0, 6.28)) * torch.sin(2.2 * gz + draw(0, 6.28))).sign()
    ground = hsv(draw(0.05, 0.45), draw(0.15, 0.45), draw(0.4, 0.65) * (1 + 0.08 * tile * (1 - far)))
    shadow = ((gx - px + 0.5 * scale * lx).square() + (gz - pz + 0.5 * scale * lz).square()) / (0.8 * scale).square()
    ground = ground * (1 - 0.55 * torch.exp(-shadow))
    horizon = hsv(hue, saturation * 0.3, torch.full_like(hue, 0.95))
    on_ground = to_ground < 2 * FAR
    image = torch.where(on_ground, torch.lerp(ground, horizon, 0.7 * far.square()), sky)
    depth, segments = torch.where(on_ground, to_ground, FAR).clamp(max=FAR), on_ground.long()

    # solid: traced in its own frame, turned and scaled, on the rays that meet the ball around it
    turn = draw(-TURN[label], TURN[label])
    py = HALF_HEIGHT[label] * scale
    ox, oy, oz = -px, eye_y - py, eye_z - pz                                     # from the solid to the eye
    along = ox * dx + oy * dy + oz * dz
    ball = along.square() - (ox.square() + oy.square() + oz.square()) + (REACH * scale).square()
    row, ray = torch.nonzero(ball > 0, as_tuple=True)

    def own_frame(x, y, z):
        c, s = turn.cos()[row, 0], turn.sin()[row, 0]
        return c * x - s * z, y, s * x + c * z

    size_of = scale[row, 0]
    origin = own_frame(ox[row, 0] / size_of, oy[row, 0] / size_of, oz[row, 0] / size_of)
    direction = own_frame(dx[row, ray], dy[row, ray], dz[row, ray])
    middle, half = -along[row, ray] / size_of, ball[row, ray].sqrt() / size_of
    hit, t = trace(label, origin, direction, middle - half, middle + half)
    light = [v[hit] for v in own_frame(lx[row, 0], torch.full_like(size_of, ly), lz[row, 0])]
    row, ray, t = row[hit], ray[hit], t[hit]
    x, y, z = (o[hit] + t * d[hit] for o, d in zip(origin, direction))

    # shading: stripes on a colour, light from the sky and from the lamp, a highlight
    e = 2e-3
    normal = torch.stack([solid_distance(label, x + e, y, z) - solid_distance(label, x - e, y, z),
                          solid_distance(label, x, y + e, z) - solid_distance(label, x, y - e, z),
                          solid_distance(label, x, y, z + e) - solid_distance(label, x, y, z - e)])
    normal = F.normalize(normal, dim=0)
    lamp = (normal * torch.stack(light)).sum(0).clamp(min=0)
    stripes = torch.sin(4 * (draw(-1, 1)[row, 0] * x + y + draw(-1, 1)[row, 0] * z) + draw(0, 6.28)[row, 0]).sign()
    color = hsv(draw(), draw(0.55, 0.95), torch.ones_like(scale))[:, row, 0] * (1 + draw(0, 0.2)[row, 0] * stripes)
    image[:, row, ray] = color * (0.42 + 0.13 * normal[1] + 0.75 * lamp) + 0.25 * lamp ** 12
    depth[row, ray], segments[row, ray] = t * scale[row, 0], 2 + label
    return image.clamp(0, 1), segments, depth


def draw_scenes(seed, index, size=32):
    """Scenes number `index` (N,) of a seed, functions of (seed, index) alone: images (N, 3, size, size) uint8, labels
    (N,), which are index mod 10, segments (N, size, size) uint8 and depth (N, size, size) float32."""
    index = np.asarray(index)
    u, labels = scene_numbers(seed, index, 24), torch.from_numpy(index % 10)
    images = torch.empty(len(index), 3, size, size, dtype=torch.uint8)
    segments = torch.empty(len(index), size, size, dtype=torch.uint8)
    depth = torch.empty(len(index), size, size, dtype=torch.float32)
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).flatten()
        image, segment, distance = draw_solid(label, u[rows], size)
        images[rows] = (image * 255).round().to(torch.uint8).view(3, -1, size, size).transpose(0, 1)
        segments[rows], depth[rows] = segment.to(torch.uint8).view(-1, size, size), distance.view(-1, size, size)
    return images, labels, segments, depth


class Scenes:
    """A fixed set of scenes in memory. Training scenes count up from 0, test scenes from 10^9."""

    classes, flip = SCENE_CLASSES, False                                         # more scenes rather than mirrored ones

    def __init__(self, split, count, size):
        first, parts = {"train": 0, "test": 10 ** 9}[split], []
        with progress(count, f"drawing {split} scenes", "scene") as bar:
            for start in range(first, first + count, 1000):
                parts.append(draw_scenes(0, np.arange(start, min(start + 1000, first + count)), size))
                bar.update(len(parts[-1][0]))
        self.images, self.labels, self.segments, self.depth = (torch.cat(part) for part in zip(*parts))

    def __len__(self):
        return len(self.images)

    def __getitems__(self, keys):
        """keys: list of (index, flip) -> images (N, 3, H, W) uint8, labels (N,), segments and depth (N, H, W)."""
        index = torch.tensor([i for i, _ in keys])
        return self.images[index], self.labels[index], self.segments[index], self.depth[index]


# ---------------------------------------------------------------------------------------------------------------------
# Images from disk

warnings.filterwarnings("ignore", module="PIL")                                  # of odd EXIF and large images
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")      # as in torchvision


class DataError(Exception):
    """Data that the user has to mend; its message is one line."""


def center_crop(image, size):
    """ADM's centre crop, as in DiT and SiT: halve by box filter while possible, then bicubic; (size, size, 3) uint8."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.array(image)[top:top + size, left:left + size]


def read_rgb(file):
    """An image file -> RGB PIL image. Turned upright where EXIF tells how; the first picture of an animation; grey,
    palette and CMYK as Pillow converts them; transparent pixels before white; 16 bits to 8 by rounding. Raises for
    float pixels, and for more than 179 million pixels, which Pillow takes for an attack."""
    with Image.open(file) as image:
        if image.mode == "F":
            raise ValueError("its pixels are floats, of unknown range")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            grey = np.asarray(image)
            if grey.min() < 0 or grey.max() > 65535:
                raise ValueError("its pixels have more than 16 bits")
            image = Image.fromarray((grey / 257).round().astype(np.uint8))       # 65535 = 257 x 255
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def open_image(path):
    """read_rgb of a file; raises DataError where it cannot be read."""
    try:
        return read_rgb(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read ({error}): mend or remove it") from None


class ImageFolder:
    """Images of a folder or .zip: train/CLASS/* and test/CLASS/*, or CLASS/* of which every 20th image is the test set.
    `split` is "train", "test" or "all".

    Classes are numbered in sorted order, as torchvision does. For an image that cannot be read the next one in order
    stands in, with its label, for up to `max_bad` images, which the file `bad` lists. Raises DataError for more of
    them, and for what cannot be used at all.
    """

    flip = True

    def __init__(self, path, split, size, max_bad=0, bad=None):
        self.path, self.size, self.zip, self.pid = Path(path), size, None, None
        self.max_bad, self.bad = max_bad, bad
        if not self.path.is_dir() and not zipfile.is_zipfile(self.path):
            raise DataError(f"--data {path} is no folder and no .zip: give one with a folder of images for every class")
        if self.path.is_dir():
            found = [p.relative_to(self.path) for p in self.path.rglob("*")]
            names = [p.as_posix() + ("/" if (self.path / p).is_dir() else "") for p in found]
        else:
            try:
                with zipfile.ZipFile(self.path) as archive:
                    names = archive.namelist()
            except zipfile.BadZipFile as error:
                raise DataError(f"--data {path} is a broken .zip ({error}): fetch it anew") from None
        names = [n for n in names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/"))]
        splits = any(n.startswith("train/") for n in names) and any(n.startswith("test/") for n in names)
        wanted = ("train/", "test/") if split == "all" else (f"{split}/",)
        inside = [(prefix, n[len(prefix):]) for prefix in (wanted if splits else ("",)) for n in names
                  if n.startswith(prefix)]
        self.classes = tuple(sorted({n.split("/")[0] for _, n in inside if "/" in n}))
        other = {n.split("/")[1] for n in names if n.startswith(("train/", "test/")) and n.count("/") > 1}
        if splits and other != set(self.classes):
            raise DataError(f"--data {path}: train and test have other classes, {sorted(other - set(self.classes))}: "
                            "give both the same class folders")
        if not self.classes:
            raise DataError(f"--data {path} has no class folders: put the images of each class into its folder")
        groups = {name: [] for name in self.classes}
        for prefix, n in sorted(inside):
            if n.lower().endswith(IMAGE_SUFFIXES) and "/" in n:
                groups[n.split("/")[0]].append(prefix + n)
        for name, files in groups.items():
            if not files:
                raise DataError(f"--data {path}: class folder {inside[0][0]}{name} has no images: remove it or fill it")
        self.files = [(n, label) for label, name in enumerate(self.classes) for n in groups[name]]
        if not splits and split != "all":
            held_out = set(range(0, len(self.files), 20))
            self.files = [f for i, f in enumerate(self.files) if (i in held_out) == (split == "test")]

    def __len__(self):
        return len(self.files)

    @property
    def labels(self):
        """(images,) labels of what __getitems__ gives, as far as it is known which images cannot be read."""
        bad, labels = self.bad_names(), [label for _, label in self.files]
        for i in range(2 * len(labels) - 1, -1, -1):                             # twice: the first follows the last
            if self.files[i % len(labels)][0] in bad:
                labels[i % len(labels)] = labels[(i + 1) % len(labels)]
        return torch.tensor(labels)

    def bad_names(self):
        """Names of the images found bad so far, by any process of this run or of one before."""
        return set(self.bad.read_text().splitlines()) if self.max_bad and self.bad.is_file() else set()

    def read(self, name):
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        if self.pid != os.getpid():                                              # a worker needs a handle of its own
            self.zip, self.pid = zipfile.ZipFile(self.path), os.getpid()
        return self.zip.read(name)

    def image(self, index):
        """Image (size, size, 3) uint8 and label of a file, or of the next that can be read."""
        for i in range(index, index + len(self.files)):
            name, label = self.files[i % len(self.files)]
            try:
                return center_crop(read_rgb(io.BytesIO(self.read(name))), self.size), label
            except Exception as error:                                           # Pillow and zipfile raise many kinds
                reason = "no image" if isinstance(error, UnidentifiedImageError) else error
                said, bad = f"{self.path}: {name} cannot be read ({reason})", self.bad_names()
            if name not in bad and len(bad) >= self.max_bad:
                raise DataError(f"{said}: mend or remove it, or pass over more than --max-bad {self.max_bad}")
            if name not in bad:
                print(f"{said}: passed over, number {len(bad) + 1}", file=sys.stderr)
                self.bad.parent.mkdir(parents=True, exist_ok=True)
                with open(self.bad, "a") as file:
                    file.write(name + "\n")
        raise DataError(f"{self.path}: none of the images can be read: mend them")

    def __getitems__(self, keys):
        """keys: list of (index, flip) -> images (N, 3, size, size) uint8, labels (N,)."""
        images, labels = [], []
        for index, flip in keys:
            image, label = self.image(index)
            images.append(image[:, ::-1] if flip else image)
            labels.append(label)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def open_data(cfg, split):
    """The data set of cfg: built-in scenes, folder or .zip."""
    if cfg.data == "scenes":
        if split == "all":
            raise DataError("built-in scenes have the splits train and test: take one of them")
        return Scenes(split, cfg.scenes if split == "train" else max(1, cfg.scenes // 10), cfg.image_size)
    return ImageFolder(cfg.data, split, cfg.image_size, cfg.max_bad, Path(cfg.out or ".") / f"unreadable-{split}.txt")


class StepSampler:
    """This rank's (index, flip) pairs, step by step: global batches are slices of shuffled epochs laid end to end."""

    def __init__(self, data, cfg, first, last):
        self.count, self.flip, self.cfg, self.first, self.last = len(data), data.flip, cfg, first, last

    def epoch(self, number):
        draw = np.random.default_rng([self.cfg.seed, number])
        order = draw.permutation(self.count)
        return order, draw.random(self.count) < 0.5                              # flips are by index, not by position

    def __iter__(self):
        rank, share = process()[0], self.cfg.batch_size // process()[2]
        number, (order, flips) = -1, (None, None)
        for step in range(self.first, self.last):
            keys = []
            first = step * self.cfg.batch_size + rank * share
            for position in range(first, first + share):
                if position // self.count != number:
                    number = position // self.count
                    order, flips = self.epoch(number)
                index = int(order[position % self.count])
                keys.append((index, bool(flips[index]) and self.flip))
            yield keys


def as_it_is(batch):
    """The collate function of data sets that return whole batches."""
    return batch


def ignore_interrupts(worker):
    """Ctrl-C comes to the workers too; it is for the process that they work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_batches(data, sampler, workers):
    """Iterate over batches of a data set; a sampler yields lists of (index, flip)."""
    return iter(DataLoader(data, batch_sampler=sampler, num_workers=workers, collate_fn=as_it_is,
                           worker_init_fn=ignore_interrupts, pin_memory=torch.cuda.is_available()))


def all_batches(data, size, indices=None):
    """Every image once and unflipped, in order, in batches of `size`."""
    indices = range(len(data)) if indices is None else indices
    for start in range(0, len(indices), size):
        yield data.__getitems__([(int(i), False) for i in indices[start:start + size]])


# ---------------------------------------------------------------------------------------------------------------------
# Processes, randomness, progress, logs, checkpoints

def generator(*key, device="cpu"):
    """A torch.Generator that is a function of the integers of its key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


class Draws:
    """Random numbers of one step: those of the global batch, of which this rank gets its rows."""

    def __init__(self, cfg, step, device):
        self.rng, self.batch, self.device = generator(cfg.seed, 1, step, device=device), cfg.batch_size, device
        share = cfg.batch_size // process()[2]
        self.rows = slice(process()[0] * share, (process()[0] + 1) * share)

    def randn(self, *shape):
        return torch.randn(self.batch, *shape, generator=self.rng, device=self.device)[self.rows]

    def rand(self):
        return torch.rand(self.batch, generator=self.rng, device=self.device)[self.rows]

    def randint(self, high):
        return torch.randint(high, (self.batch,), generator=self.rng, device=self.device)[self.rows]


def autocast(cfg):
    """The forward pass in bfloat16, if it shall be; weights, gradients and optimisers are float32 anyway."""
    return torch.autocast(device_of_process().type, torch.bfloat16, enabled=cfg.precision == "bf16")


def parts_of_batch(cfg, model):
    """Gradient accumulation: slices of this process' batch. DDP averages gradients with the last one only."""
    rows = cfg.batch_size // process()[2] // cfg.accumulate
    for i in range(cfg.accumulate):
        wait = isinstance(model, DDP) and i < cfg.accumulate - 1
        with model.no_sync() if wait else contextlib.nullcontext():
            yield slice(i * rows, (i + 1) * rows)


def claim_folder(cfg, *names, **facts):
    """OUT/STAGE and the stage's settings: `facts`, what Config has of `names`, and what is common to all stages.
    Stops where the folder holds a run with other settings."""
    folder = Path(cfg.out) / cfg.stage
    common = ("stage", "data", "scenes", "seed", "image_size", "steps", "batch_size")
    settings = json.loads(json.dumps({**{name: getattr(cfg, name) for name in common + names}, **facts}))
    path = folder / "settings.json"
    if path.is_file():
        before = read_json(path)
        for name in settings:
            if before.get(name) != settings[name]:
                stop(f"{folder} holds a run with {name} = {before.get(name)}, not {settings[name]}: "
                     "choose another --out, or delete it")
    return folder, settings


def write_settings(folder, settings):
    """Mark a folder as belonging to a run with these settings, once all of them are known to work."""
    barrier()
    if process()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(settings, folder / "settings.json")
    barrier()


def read_settings(folder):
    """The settings of a stage that has run; stops where there are none."""
    path = Path(folder) / "settings.json"
    if not path.is_file():
        stop(f"{path} not found: want the folder of a stage of train.py")
    return read_json(path)


OPTIMISER = ("lr", "warmup", "decay", "weight_decay", "clip")                    # settings of a stage that trains
FORWARD = ("accumulate", "precision")
AUTOENCODER = ("channels", "layers_per_block", "norm_groups", "latent_channels")


def megabytes(size):
    """Bytes as text."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def on_meta(module):
    """A copy of a module on the meta device, where tensors have shapes but no numbers: it costs nothing."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    empty.update({id(b): torch.empty_like(b, device="meta") for b in module.buffers()})
    return copy.deepcopy(module, empty)                                          # what is in the memo is not copied


class MemoryCount(TorchDispatchMode):
    """Bytes of the tensors made inside, and the most of them alive at once."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if torch.is_tensor(x) else None
            if storage is not None and storage not in self.seen:
                self.seen.add(storage)
                weakref.finalize(storage, self.free, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return result

    def free(self, size):
        self.now -= size


# matrix products a second, dense, by the makers' data sheets
PEAKS = {"H100 80GB HBM3": dict(bf16=989e12, tf32=494e12, fp32=67e12),
         "H200": dict(bf16=989e12, tf32=494e12, fp32=67e12), "A100": dict(bf16=312e12, tf32=156e12, fp32=19.5e12)}


def peak_flops(precision):
    """FLOPs a second of this process' device: of its data sheet, else measured by the fastest of ten products."""
    device = device_of_process()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known, peaks in PEAKS.items():
        if known in name:
            return peaks[precision]
    size, dtype = (8192 if device.type == "cuda" else 512), torch.bfloat16 if precision == "bf16" else torch.float32
    x, seconds = torch.ones(size, size, device=device, dtype=dtype), []
    for _ in range(10):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(seconds)


class Plan:
    """What a training stage will do: its length, and FLOPs and memory of a step, counted on the meta device.

    `nets` are the modules whose gradients `step` computes; step(rows) does the forward and backward passes of some
    images there. `averaged` tells whether there is an average of the weights too.
    """

    def __init__(self, cfg, data, name, nets, step, tokens=0, averaged=False):
        self.cfg, self.images, self.name, self.tokens = cfg, len(data), name, tokens
        self.parameters = sum(p.numel() for net in nets for p in net.parameters() if p.requires_grad)
        rows = cfg.batch_size // process()[2] // cfg.accumulate
        with FlopCounterMode(display=False) as count:
            step(rows)
        self.flops = count.get_total_flops() / rows                              # an image
        with MemoryCount() as memory:
            step(rows)
        weights = 4 * self.parameters
        held = memory.most // 2 if cfg.precision == "bf16" else memory.most
        self.memory = {"weights": weights, "gradients": weights, "Adam": 2 * weights, "average": weights * averaged,
                       "activations": max(held - weights, 0)}                    # gradients come when these go
        self.peak = peak_flops(cfg.precision)

    def print(self, folder):
        """The plan on the terminal, by rank 0, unless the chain has started this stage."""
        cfg = self.cfg
        if process()[0] == 0 and "REALS_PARENT" not in os.environ:
            share = cfg.batch_size // process()[2] // cfg.accumulate
            images = cfg.steps * cfg.batch_size
            flops = images * self.flops
            hours = ", ".join(f"{flops / peaks['bf16'] / cfg.utilisation / 3600:,.1f} on {name.split()[0]}"
                              for name, peaks in PEAKS.items() if name != "H200")
            tokens = f", {images * self.tokens:,} tokens" if self.tokens else ""
            memory = ", ".join(f"{megabytes(size)} {name}" for name, size in self.memory.items() if size)
            print(f"stage {cfg.stage} in {folder}: {self.name}, {self.parameters / 1e6:,.1f} M parameters, "
                  f"{cfg.precision}\n"
                  f"  data    {cfg.data}: {self.images:,} images\n"
                  f"  batch   {cfg.batch_size} = {process()[2]} processes x {cfg.accumulate} parts x {share} images\n"
                  f"  length  {cfg.steps:,} steps, {images:,} images ({images / self.images:,.1f} epochs){tokens}, "
                  f"{flops:.3g} FLOPs ({self.flops / 1e9:,.3g} G an image)\n"
                  f"  time    GPU hours at {cfg.utilisation:.0%} of the bf16 peak: {hours}\n"
                  f"  memory  about {megabytes(sum(self.memory.values()))} a process: {memory}\n"
                  f"  writes  its weights, config.json, checkpoint.pt, log.jsonl, curves.png, samples/", flush=True)


class Run:
    """A training run in a folder: resumes from its last good checkpoint, sets the learning rate, takes the optimisers'
    steps and writes the log. SIGTERM and Ctrl-C let it finish the step, save and exit with status 143 or 130; the same
    command goes on from there. With --dry-run it ends before it begins.

        run = Run(cfg, folder, settings, plan, net=net, opt=opt)    modules and optimisers that a checkpoint holds
        for step, batch in run.steps(data):
            ...                                           forward, backward
            run.log(loss=loss)                            scalars without gradient; averaged over steps and processes
            run.optimise(opt)                             its gradients, clipped; nothing where they are not finite
        run.summary()
    """

    def __init__(self, cfg, folder, settings, plan, **parts):
        if cfg.dry_run:                                                          # data and weights are there
            sys.exit(0)
        write_settings(folder, settings)
        self.cfg, self.folder, self.parts, self.plan, self.step = cfg, folder, parts, plan, 0
        self.scalars = {}                                                        # of this step: name -> [values]
        self.pending = []                                            # since the last line: (step, {name: value})
        self.nonfinite, self.signal, self.paused, self.last = 0, 0, 0.0, {}
        # signals do not come to all processes at the same step; a group on the CPU lets them agree without the GPU
        self.group = dist.new_group(backend="gloo") if process()[2] > 1 else None
        state = self.last_checkpoint()
        if state:
            self.step, self.nonfinite = state["step"], state["nonfinite"]
            rank, _, world = process()
            self.pending = sum(state["pending"][rank::world], [])                # saved by any number of processes
            for name, part in parts.items():
                part.load_state_dict(state[name])
        if process()[0] == 0:                                                    # lines after the checkpoint come again
            for path in folder.glob(".checkpoint.pt.*.tmp"):                     # of a save that was killed
                path.unlink()
            lines = [line for line in self.lines() if line["step"] <= self.step]
            with atomic_file(folder / "log.jsonl") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def last_checkpoint(self):
        """checkpoint.pt, or the one before if that is damaged, which is said; None where there is none."""
        paths = [path for path in (self.folder / "checkpoint.pt", self.folder / "previous.pt") if path.is_file()]
        for path in paths:
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:                                           # damaged bytes raise almost anything
                if process()[0] == 0:
                    print(f"{path} is damaged ({str(error).splitlines()[0]}): it is passed over", file=sys.stderr)
        if paths:
            stop(f"{self.folder} has no checkpoint that can be read: delete the folder to begin anew")

    def lines(self):
        """The log so far; a line that was cut off by a kill does not count."""
        path = self.folder / "log.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def learning_rate(self):
        """Linear warm-up, then a cosine from lr to lr * decay."""
        cfg = self.cfg
        share = max(0, self.step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        cosine = cfg.decay + (1 - cfg.decay) * 0.5 * (1 + math.cos(math.pi * share))
        return cfg.lr * min(1.0, (self.step + 1) / (cfg.warmup + 1)) * cosine

    def steps(self, data):
        """Yield (step, batch) for the steps that are left; log and save after the loop's body."""
        cfg = self.cfg
        batches = load_batches(data, StepSampler(data, cfg, self.step, cfg.steps), cfg.workers)
        optimisers = [part for part in self.parts.values() if isinstance(part, torch.optim.Optimizer)]
        before = {number: signal.signal(number, lambda number, _: setattr(self, "signal", number))
                  for number in (signal.SIGTERM, signal.SIGINT)}
        with progress(cfg.steps, f"{cfg.stage} {cfg.out}", "step", self.step) as bar:
            since, first, waited, self.paused = time.perf_counter(), self.step, 0.0, 0.0
            while self.step < cfg.steps:
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                for optimiser in optimisers:
                    for group in optimiser.param_groups:
                        group["lr"] = self.learning_rate()
                yield self.step, batch
                self.step += 1
                self.pending.append((self.step, {n: sum(v) / len(v) for n, v in self.scalars.items()}))
                self.scalars = {}
                if os.getppid() != int(os.environ.get("REALS_PARENT", os.getppid())):
                    sys.exit("the chain was killed: its stages end too, so that it can be started again")
                bar.update()
                stopping, end = self.asked_to_stop(), self.step == cfg.steps
                if self.step % cfg.log_every == 0 or end:
                    means = self.means()                                         # waits for the device
                    seconds = time.perf_counter() - since - self.paused
                    self.write_log(bar, means, seconds, self.step - first, waited / seconds)
                if self.step % cfg.save_every == 0 or end or stopping:
                    self.save()
                if stopping:
                    sys.exit(128 + stopping)
                if not self.pending:
                    since, first, waited, self.paused = time.perf_counter(), self.step, 0.0, 0.0
        for number, handler in before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def pause(self):
        """Time spent in here, on pictures and measurements, does not count in the log's rates."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def asked_to_stop(self):
        """The number of the signal to stop that has come to any of the processes, or 0."""
        if self.group is None:
            return self.signal
        number = torch.tensor(self.signal)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return number.item()

    def log(self, **scalars):
        """Add scalars to the step's averages. Tensors stay on the device: no synchronisation here."""
        for name, value in scalars.items():
            self.scalars.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float32))

    def optimise(self, opt, name="gradient"):
        """One step of an optimiser with the gradients that are there, clipped; their norm goes to the log. Where it is
        not finite the optimiser's own kernel does nothing, so that nobody has to wait for the device to know."""
        parameters = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.cfg.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.cfg.clip, norm)
        opt.grad_scale, opt.found_inf = None, (~norm.isfinite()).float()         # as GradScaler tells a fused optimiser
        opt.step()
        self.log(**{name: norm})

    def means(self):
        """Means since the last line, over all processes, of steps that were finite. Stops where more than
        --skip-nonfinite were not, and names the first."""
        values = [value.to(device_of_process()) for _, scalars in self.pending for value in scalars.values()]
        values = iter(torch.stack(values).tolist())                              # waits for the device, here alone
        steps = [(step, {name: next(values) for name in scalars}) for step, scalars in self.pending]
        wrong = [(step, scalars) for step, scalars in steps if not all(map(math.isfinite, scalars.values()))]
        finite = [scalars for step, scalars in steps if step not in dict(wrong)]
        names = dict.fromkeys(name for _, scalars in steps for name in scalars)
        sums = {name: (sum(scalars.get(name, 0.0) for scalars in finite), sum(name in scalars for scalars in finite))
                for name in names}
        if self.group is not None:
            every = [None] * process()[2]
            dist.all_gather_object(every, (sums, wrong), group=self.group)
            sums = {name: [sum(part[name][i] for part, _ in every) for i in (0, 1)] for name in names}
            wrong = max((part for _, part in every), key=len)
        self.pending, self.nonfinite = [], self.nonfinite + len(wrong)
        if wrong:
            step, path = wrong[0][0], self.folder / "checkpoint.pt"
            said = ", ".join(f"{name} {value:.4g}" for name, value in wrong[0][1].items())
            text = f"{self.cfg.stage} {self.cfg.out}: step {step} is not finite: {said}"
            if self.nonfinite > self.cfg.skip_nonfinite:
                good = f"the last good checkpoint is {path}" if path.is_file() else "there is no checkpoint yet"
                stop(f"{text}; {good}; try a smaller --lr, --clip 1 or --precision fp32; --skip-nonfinite "
                     f"{self.cfg.skip_nonfinite} was the limit")
            if process()[0] == 0:
                print(f"{text}; passed over, {self.nonfinite} so far", file=sys.stderr)
        return {name: total / count for name, (total, count) in sums.items() if count}

    def write_log(self, bar, means, seconds, steps, waited):
        """One line of log.jsonl: means of the steps since the last one, and how fast they were."""
        bar.set_postfix({name: f"{value:.4g}" for name, value in list(means.items())[:3]})
        if process()[0] == 0:
            device, rate = device_of_process(), steps * self.cfg.batch_size / seconds
            memory = (torch.cuda.max_memory_allocated(device) if device.type == "cuda"
                      else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            peak = self.plan.peak * process()[2]
            self.last = {"step": self.step, **means, "lr": self.learning_rate(), "seconds_per_step": seconds / steps,
                         "images_per_second": rate, "data_wait": waited, "peak_memory_gib": memory / 2 ** 30,
                         "model_flops_utilisation": rate * self.plan.flops / peak}
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(self.last) + "\n")

    def summary(self):
        """One line that names every output, once the stage has written them all."""
        if process()[0] == 0:
            last = {**(self.lines() or [{}])[-1], **self.last}
            figures = ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k not in SPEED and k not in ("step", "lr"))
            files = sorted(p for p in self.folder.rglob("*") if p.is_file() and not p.name.startswith("."))
            names = ", ".join(f"{p.relative_to(self.folder)} ({megabytes(p.stat().st_size)})" for p in files)
            print(f"{self.folder} is done, {self.step} steps: {figures}. It holds {names}")

    def save(self):
        """checkpoint.pt and curves.png, by rank 0; the checkpoint before becomes previous.pt."""
        pending = [[(step, {n: v.cpu() for n, v in scalars.items()}) for step, scalars in self.pending]]
        if self.group is not None:                                               # asked to stop between two lines
            gathered = [None] * process()[2]
            dist.all_gather_object(gathered, pending[0], group=self.group)
            pending = gathered
        if process()[0] == 0:
            path = self.folder / "checkpoint.pt"
            state = {name: part.state_dict() for name, part in self.parts.items()}
            try:
                with atomic_file(path) as file:
                    torch.save({"step": self.step, "pending": pending, "nonfinite": self.nonfinite, **state}, file)
                    if path.is_file():
                        os.replace(path, self.folder / "previous.pt")
            except (OSError, RuntimeError) as error:                             # torch wraps what its writer meets
                reason = str(error).splitlines()[0]
                stop(f"{path} cannot be written at step {self.step} ({reason}): make room; the same command goes on "
                     "from the one before")
            lines, run = self.lines(), self.folder.parent.name
            panels = {name: {run: [(line["step"], line[name]) for line in lines if name in line]}
                      for name in (lines[-1] if lines else ()) if name not in ("step", "lr", *SPEED)}
            if panels:
                save_picture(plot(panels), self.folder / "curves.png")
        barrier()


PRODUCTS = {"teacher": "dinov2.safetensors", "evaluator": "evaluator.safetensors", "heads": "heads.json",
            "vae": "config.json", "align": "config.json", "latents": "meta.json", "sit": "ema.safetensors",
            "dit": "ema.safetensors"}                                            # what a stage writes last


def finished(folder):
    """Whether a stage's folder is complete; says so."""
    done = (folder / PRODUCTS[folder.name]).is_file()
    if done and process()[0] == 0:
        print(f"{folder} is done already")
    return done


SPEED = ("seconds_per_step", "images_per_second", "data_wait", "peak_memory_gib", "model_flops_utilisation")
LOGARITHMIC = ("mse", "l1", "kl", "lpips", "loss", "class_loss", "segment_loss", "depth_loss", "align", "gradient",
               "discriminator_gradient", "FD")


def plot(panels, size=(300, 200), per_row=3):
    """Curves over steps as a PIL image: {panel: {curve: [(step, value), ...]}}. A title's last word is looked up in
    LOGARITHMIC."""
    colors = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))
    names = sorted({name for curves in panels.values() for name in curves}, reverse=True)
    font, (width, height) = ImageFont.load_default(11), size
    rows = math.ceil(len(panels) / per_row)
    canvas = Image.new("RGB", (min(per_row, len(panels)) * width, rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (title, curves) in enumerate(panels.items()):
        left, top = number % per_row * width + 52, number // per_row * height + 22
        right, bottom = left + width - 66, top + height - 48
        xs, ys = zip(*[point for points in curves.values() for point in points])
        logarithmic = title.split()[-1] in LOGARITHMIC and min(ys) > 0
        scale = math.log10 if logarithmic else float
        low, high = scale(min(ys)), scale(max(ys))
        low, high = (low - 0.5, high + 0.5) if high == low else (low, high)

        def place(x, y):
            return left + (right - left) * x / max(xs), bottom - (bottom - top) * (scale(y) - low) / (high - low)

        draw.text((left, top - 18), title + (", logarithmic" if logarithmic else ""), fill="black", font=font)
        for i in range(5):
            value, y = low + (high - low) * i / 4, bottom - (bottom - top) * i / 4
            label = f"{10 ** value if logarithmic else value:.3g}"
            draw.line((left, y, right, y), fill=(225, 225, 225))
            draw.text((left - 5 - font.getlength(label), y - 7), label, fill=(80, 80, 80), font=font)
        for x in (0, max(xs) // 2, max(xs)):
            label = f"{x} steps" if x == max(xs) else str(x)
            start = min(place(x, ys[0])[0] - font.getlength(label) / 2, right + 12 - font.getlength(label))
            draw.text((start, bottom + 3), label, fill=(80, 80, 80), font=font)
        heights = [place(x, y)[1] for points in curves.values() for x, y in points if x > max(xs) / 2]
        legend = top + 2 if sum(heights) / max(1, len(heights)) > (top + bottom) / 2 else bottom - 30
        for i, (name, points) in enumerate(sorted(curves.items(), reverse=True)):
            color = colors[names.index(name) % len(colors)]
            draw.line([place(x, y) for x, y in points], fill=color, width=2)
            if len(names) > 1:
                draw.text((right - 60, legend + 13 * i), name, fill=color, font=font)
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# Heads for masks and depth, as stages teacher and heads train them

class TaskHeads(nn.Module):
    """Segmentation and depth heads on features (N, D, gh, gw) and class tokens (N, D), in one forward for DDP."""

    def __init__(self, config):
        super().__init__()
        for name, network in (("segmentation", align.SegmentationHead), ("depth", align.DepthHead)):
            setattr(self, name, network(**config[name]) if config[name] else None)

    def forward(self, features, cls, size):
        """-> class logits (N, S, size, size) and depth (N, size, size); None for a head that is not there."""
        def enlarged(x):
            return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)

        return (enlarged(self.segmentation(features)) if self.segmentation else None,
                enlarged(self.depth(features, cls))[:, 0] if self.depth else None)


def dense_loss(logits, depth, masks=None, metres=None):
    """Cross entropy of segments and 5 times the squared log error of depth, where they are known, by the known pixels
    of all processes; and both parts. Nothing of outputs that are None."""
    def mean(errors, known):
        return (errors * known).sum() / vae.mean_over_processes(known.sum().float()).clamp(min=1)

    loss, parts = 0, {}
    if logits is not None:
        parts["segment_loss"] = mean(F.cross_entropy(logits, masks.long(), ignore_index=255, reduction="none"),
                                     masks != 255)
    if depth is not None:
        parts["depth_loss"] = mean((depth.log() - metres.clamp(min=1e-3).log()).square(), metres > 0)
        loss = 5 * parts["depth_loss"]
    return loss + parts.get("segment_loss", 0), {name: value.detach() for name, value in parts.items()}


def save_task_heads(heads, config, classes, folder):
    """The weights of the heads that are there, then heads.json."""
    for name in ("segmentation", "depth"):
        if config[name]:
            save_safetensors(getattr(heads, name).state_dict(), folder / f"{name}_head.safetensors")
    write_json({**config, "classes": list(classes)}, folder / "heads.json")


# ---------------------------------------------------------------------------------------------------------------------
# Stages teacher and evaluator: two classifiers that share nothing; what is aligned to one is judged by the other

class Teacher(nn.Module):
    """A small DINOv2 and its heads: class from class token and mean patch; where scenes tell them, segments and depth
    from patch tokens; without labels depth alone."""

    def __init__(self, image_size, num_classes, dense, labels, embed_dim=96, depth=3, num_heads=4, patch_size=4):
        super().__init__()
        self.config = dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads, patch_size=patch_size,
                           img_size=image_size)
        self.dinov2 = align.DINOv2(**self.config)
        self.classifier = align.ClassificationHead(embed_dim, num_classes) if labels else None
        self.head_config = dict(segmentation=dict(embed_dim=embed_dim, num_classes=len(SEGMENTS)) if labels else None,
                                depth=dict(embed_dim=embed_dim, min_depth=NEAR, max_depth=FAR, num_bins=32))
        self.heads = TaskHeads(self.head_config) if dense else None

    def forward(self, x):
        """x (N, 3, H, W) in [-1, 1] -> class logits, segment logits (N, S, H, W), depth (N, H, W); None for a head that
        is not there."""
        size = x.shape[-1]
        out = self.dinov2.forward_features(align.teacher_input(x, size))
        cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"]
        logits = self.classifier(patches, cls) if self.classifier else None
        if self.heads is None:
            return logits, None, None
        grid = size // self.dinov2.patch_size
        return logits, *self.heads(patches.transpose(1, 2).unflatten(2, (grid, grid)), cls, size)


class Evaluator(nn.Module):
    """A small convolutional classifier, (N, 3, H, W) in [-1, 1] -> features (N, 128), class logits, and, as sFID has
    them, spatial features: seven channels of an inner map (N, 7 h w)."""

    def __init__(self, num_classes, width=32):
        super().__init__()
        layers, channels = [], 3
        for i, (out, stride) in enumerate(((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2))):
            layers += [nn.Conv2d(channels, out * width, 3, stride=stride, padding=1, bias=False),
                       vae.BatchNorm2d(out * width), nn.ReLU()]
            channels = out * width
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(channels, num_classes)

    def forward(self, x):
        inner = self.features[:12](x)                                            # (N, 64, H / 4, W / 4)
        feats = self.features[12:](inner).mean(dim=(2, 3))
        return feats, self.classifier(feats), inner[:, :7].flatten(1)


def degrade(x, rng):
    """Half of the images blurred, half with noise: the evaluator shall look at shapes, not at sharpness."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=x.device)
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=3)
    blur, noise = rng.rand() < 0.5, rng.rand() < 0.5
    x = torch.where(blur.view(-1, 1, 1, 1), blurred, x)
    return x + 0.1 * noise.view(-1, 1, 1, 1) * rng.randn(*x.shape[1:])


def train_classifier(cfg):
    """Stages teacher and evaluator. The evaluator has another seed, so other batches, and degraded images."""
    if cfg.stage == "evaluator":
        cfg = dataclasses.replace(cfg, seed=cfg.seed + 1000)
    folder, settings = claim_folder(cfg, *OPTIMISER, *(("labels",) if cfg.stage == "teacher" else ()))
    weights = "dinov2.safetensors" if cfg.stage == "teacher" else "evaluator.safetensors"
    if finished(folder):
        return
    device, data = device_of_process(), open_data(cfg, "train")
    torch.manual_seed(cfg.seed)
    if cfg.stage == "teacher":
        if cfg.image_size % 4:
            stop(f"--image-size {cfg.image_size} does not divide into the teacher's patches of 4 x 4")
        if not cfg.labels and cfg.data != "scenes":
            stop(f"--no-labels leaves nothing to learn of --data {cfg.data}: scenes alone have depth")
        net = Teacher(cfg.image_size, len(data.classes), cfg.data == "scenes", cfg.labels).to(device)
    else:
        net = Evaluator(len(data.classes)).to(device)
    model = DDP(net) if process()[2] > 1 else net
    opt = torch.optim.AdamW(net.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    shape = on_meta(net)

    def count(rows):
        sum(part.sum() for part in shape(torch.empty(rows, 3, cfg.image_size, cfg.image_size, device="meta"))
            if part is not None).backward()

    plan = Plan(cfg, data, type(net).__name__, [shape], count)
    plan.print(folder)
    run = Run(cfg, folder, settings, plan, net=net, opt=opt)
    for step, (images, labels, *dense) in run.steps(data):
        x, labels, rng = to_float(images, device), labels.to(device, non_blocking=True), Draws(cfg, step, device)
        if cfg.stage == "teacher":
            logits, segments, depth = model(x)
        else:
            (_, logits, _), segments, depth = model(degrade(x, rng)), None, None
        loss, parts = dense_loss(segments, depth, *(p.to(device, non_blocking=True) for p in dense))
        if logits is not None:
            class_loss = F.cross_entropy(logits, labels)
            loss = loss + class_loss
            accuracy = (logits.argmax(1) == labels).float().mean()
            parts = {"class_loss": class_loss.detach(), "accuracy": accuracy, **parts}
        opt.zero_grad()
        loss.backward()
        run.log(**parts)
        run.optimise(opt)
    if process()[0] == 0:
        if cfg.stage == "teacher":
            write_json(net.config, folder / "config.json")
            if net.heads is not None:
                save_task_heads(net.heads, net.head_config, SEGMENTS, folder)
            save_safetensors(net.dinov2.state_dict(), folder / weights)
        else:
            save_safetensors(net.state_dict(), folder / weights)
    run.summary()


def teacher_on_meta(name):
    """The teacher's network without its weights: a published DINOv2, or the folder that stage teacher wrote."""
    if name in align.DINOV2:
        config = align.DINOV2[name][0]
    else:
        folder = Path(name)
        if not (folder / "dinov2.safetensors").is_file():
            stop(f"{folder}/dinov2.safetensors not found: run train.py --stage teacher --out {folder.parent} first, "
                 "or give --teacher a folder or a published name")
        config = read_json(folder / "config.json")
    with torch.device("meta"):
        return align.DINOv2(**config).to("meta")


def checksum_of_teacher(name):
    """sha256 of the weights of a teacher in a folder; None for a published one, which does not change."""
    return None if name in align.DINOV2 else checksum(Path(name) / "dinov2.safetensors")


def load_teacher(name):
    """The frozen teacher: a published DINOv2 by its name, or from the folder that stage teacher wrote."""
    try:
        if name in align.DINOV2:
            return first_on_node(lambda: align.load_dinov2(name))
        teacher, path = teacher_on_meta(name).to_empty(device="cpu"), Path(name) / "dinov2.safetensors"
        vae.load_strict(teacher, load_weights(path), path)
    except (OSError, ValueError) as error:
        stop(error)
    return teacher.eval().requires_grad_(False)


def with_teacher(cfg):
    """cfg with the defaults of its teacher, and the teacher on the meta device."""
    cfg = dataclasses.replace(cfg, teacher=cfg.teacher or str(Path(cfg.out) / "teacher"))
    teacher = teacher_on_meta(cfg.teacher)
    size = cfg.teacher_size or (224 if teacher.patch_size == 14 else cfg.image_size)
    cfg = dataclasses.replace(cfg, teacher_size=size)
    if cfg.teacher_size % teacher.patch_size:
        stop(f"--teacher-size {cfg.teacher_size}: want a multiple of the teacher's patches, {teacher.patch_size}")
    return cfg, teacher


# ---------------------------------------------------------------------------------------------------------------------
# Stage heads: linear heads on a frozen teacher's features, for classes and depths of one's own

class DenseFolder:
    """Images with masks and depth: DATA/images/NAME.*, DATA/masks/NAME.png with class numbers (255: unknown), named
    line by line in DATA/classes.txt, and DATA/depth/NAME.png with 16-bit millimetres (0: unknown). Either may be
    absent. Every 20th image is held out. Raises DataError for what cannot be used."""

    flip = False

    def __init__(self, path, split, size):
        self.path, self.size = Path(path), size
        files = sorted(f for f in (self.path / "images").glob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise DataError(f"--data {path}: no images in {path}/images: put them there, and masks or depth beside it")
        self.files = [f for i, f in enumerate(files) if (i % 20 == 0) == (split == "test")]
        self.has = {name: (self.path / name).is_dir() for name in ("masks", "depth")}
        if not any(self.has.values()):
            raise DataError(f"--data {path} has no masks and no depth: want NAME.png in {path}/masks or {path}/depth")
        self.classes = ()
        if self.has["masks"]:
            if not (self.path / "classes.txt").is_file():
                raise DataError(f"--data {path}: classes.txt not found: name the classes of the masks, one a line")
            self.classes = tuple(filter(None, (self.path / "classes.txt").read_text().split("\n")))

    def __len__(self):
        return len(self.files)

    def plane(self, kind, file, width, height):
        """One mask or depth map (size, size) as int64, cut like its image, which is width x height."""
        path = self.path / kind / f"{file.stem}.png"
        try:
            image = Image.open(path)
            if abs(math.log(image.width / image.height * height / width)) > 0.02:
                raise DataError(f"{path} is {image.width} x {image.height} and its image, upright, {width} x {height}: "
                                "want the same shape")
            scale = self.size / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.NEAREST)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}): mend it or remove its image") from None
        plane = np.asarray(image)
        if plane.ndim != 2:
            raise DataError(f"{path} has colours: want one number a pixel")
        top, left = (image.height - self.size) // 2, (image.width - self.size) // 2
        return plane[top:top + self.size, left:left + self.size].astype(np.int64)

    def __getitems__(self, keys):
        """keys: list of (index, flip) -> images (N, 3, H, W) uint8, file numbers (N,), masks (N, H, W), depth (N, H, W)
        in metres; 255 and 0 where nothing is known."""
        images, masks, depths = [], [], []
        blank = np.zeros((self.size, self.size), dtype=np.int64)
        for index, _ in keys:
            file = self.files[index]
            image = open_image(file)
            images.append(center_crop(image, self.size))
            masks.append(self.plane("masks", file, *image.size) if self.has["masks"] else blank + 255)
            depths.append(self.plane("depth", file, *image.size) if self.has["depth"] else blank)
            wrong = set(np.unique(masks[-1])) - {*range(len(self.classes)), 255}
            if wrong:
                raise DataError(f"{self.path}: the mask of {file.name} has class {max(wrong)}, and classes.txt has "
                                f"{len(self.classes)} names: mend one of them")
        index = torch.tensor([i for i, _ in keys])
        return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), index, torch.from_numpy(np.stack(masks)),
                torch.from_numpy(np.stack(depths)).float() / 1000)


def train_heads(cfg):
    """Stage heads."""
    (cfg, teacher_shape), device = with_teacher(cfg), device_of_process()
    folder, settings = claim_folder(cfg, *OPTIMISER, "teacher", "teacher_size",
                                    teacher_weights=checksum_of_teacher(cfg.teacher))
    if finished(folder):
        return
    scenes, size, width = cfg.data == "scenes", cfg.image_size, teacher_shape.embed_dim
    data = open_data(cfg, "train") if scenes else DenseFolder(cfg.data, "train", size)
    classes = SEGMENTS if scenes else data.classes
    if scenes:
        depth = dict(embed_dim=width, min_depth=NEAR, max_depth=FAR, num_bins=32)
    else:
        rows = np.unique(np.linspace(0, len(data) - 1, min(len(data), 200)).astype(int))
        largest = max(float(batch[3].max()) for batch in all_batches(data, 20, rows)) if data.has["depth"] else 0
        depth = dict(embed_dim=width, max_depth=largest) if largest else None
    config = dict(segmentation=dict(embed_dim=width, num_classes=len(classes)) if classes else None, depth=depth)
    torch.manual_seed(cfg.seed)
    net = TaskHeads(config).to(device)
    model = DDP(net) if process()[2] > 1 else net
    opt = torch.optim.AdamW(net.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    side, shape = cfg.teacher_size // teacher_shape.patch_size, on_meta(net)

    def read(teacher, model, x):
        patch, cls = align.teacher_tokens(teacher, x, cfg.teacher_size)
        return model(patch.transpose(1, 2).unflatten(2, (side, side)), cls, size)

    def count(rows):
        outputs = read(teacher_shape, shape, torch.empty(rows, 3, size, size, device="meta"))
        sum(part.sum() for part in outputs if part is not None).backward()

    plan = Plan(cfg, data, "heads", [shape], count)
    plan.print(folder)
    teacher = load_teacher(cfg.teacher).to(device)
    run = Run(cfg, folder, settings, plan, net=net, opt=opt)
    for step, (images, _, masks, metres) in run.steps(data):
        logits, depth = read(teacher, model, to_float(images, device))
        loss, parts = dense_loss(logits, depth, *(p.to(device, non_blocking=True) for p in (masks, metres)))
        opt.zero_grad()
        loss.backward()
        run.log(**parts)
        run.optimise(opt)
    if process()[0] == 0:
        save_task_heads(net, config, classes, folder)
    run.summary()


# ---------------------------------------------------------------------------------------------------------------------
# Stages vae and align: the same autoencoder, the same loop; align adds one term to the loss

class AlignedAutoencoder(nn.Module):
    """Autoencoder and MLPs in one module, so that DDP sees one forward that returns all that the loss needs."""

    def __init__(self, autoencoder, heads):
        super().__init__()
        self.vae, self.heads = autoencoder, heads

    def forward(self, x, noise):
        rec, posterior, z = self.vae(x, noise)
        return rec, posterior, self.heads(z) if self.heads is not None else None


class WithTokens:
    """A data set and the teacher's tokens (N, 1 + T, D), class token first, from a file that encode_all made."""

    def __init__(self, data, path):
        self.data, self.flip, self.tokens = data, data.flip, np.load(path, mmap_mode="r")

    def __len__(self):
        return len(self.data)

    def __getitems__(self, keys):
        index, flip = zip(*keys)
        tokens = torch.from_numpy(self.tokens[np.array(flip, dtype=int), np.array(index)])
        return (*self.data.__getitems__(keys), tokens.to(torch.get_default_dtype()))


@torch.no_grad()
def encode_all(data, path, batch_size, workers, description, encode):
    """Write encode(x) of all images x (N, 3, H, W) in [-1, 1] to path, a float16 array (flips, images, ...), unflipped
    and, where the data is flipped in training, flipped. All processes work on it; a killed run goes on where it was."""
    device, flips = device_of_process(), 2 if data.flip else 1
    shape = encode(to_float(data.__getitems__([(0, False)])[0], device)).shape[1:]
    work = Rows(path, (flips, len(data)), {}, encoded=(shape, np.float16))
    total, batches = work.count // process()[2], work.batches(batch_size)
    with progress(total, description, "image", max(0, total - sum(map(len, batches)))) as bar:
        keys = [[(row % len(data), row >= len(data)) for row in rows.tolist()] for rows in batches]
        for rows, (images, *_) in zip(batches, load_batches(data, keys, workers)):
            work.put(rows, encoded=encode(to_float(images, device)).cpu().numpy())
            bar.update(len(rows))
    work.finish()
    if process()[0] == 0:
        os.replace(work.path("encoded"), path)
        work.remove()
    barrier()


def new_autoencoder(cfg):
    """The autoencoder to train: from --init, else of the flags; and cfg with its sizes."""
    torch.manual_seed(cfg.seed)
    if cfg.init:
        autoencoder = load_autoencoder(Path(cfg.init)).train()
        autoencoder.config.update(sample_size=cfg.image_size, latents_mean=None, latents_std=None)
        names = dict(channels="block_out_channels", layers_per_block="layers_per_block", norm_groups="norm_num_groups",
                     latent_channels="latent_channels")
        return autoencoder, dataclasses.replace(cfg, **{k: autoencoder.config[name] for k, name in names.items()})
    try:
        autoencoder = vae.AutoencoderKL(block_out_channels=cfg.channels, layers_per_block=cfg.layers_per_block,
                                        norm_num_groups=cfg.norm_groups, latent_channels=cfg.latent_channels,
                                        sample_size=cfg.image_size)
    except ValueError as error:
        stop(error)
    return autoencoder, cfg


def train_autoencoder(cfg):
    """Stages vae and align."""
    aligned, device = cfg.stage == "align", device_of_process()
    autoencoder, cfg = new_autoencoder(cfg)
    grid = cfg.image_size // autoencoder.factor                                  # cells of a latent, a side
    if cfg.image_size % autoencoder.factor:
        stop(f"--image-size {cfg.image_size} is not halved {len(cfg.channels) - 1} times without rest: see --channels")
    names = OPTIMISER + FORWARD + AUTOENCODER + (
        "init", "gradient_checkpointing", "pixel_loss", "kl_weight", "perceptual_weight", "disc_weight", "disc_start",
        "latent_scale")
    facts = {"init_weights": checksum(Path(cfg.init))} if cfg.init else {}
    if aligned:
        cfg, teacher_shape = with_teacher(cfg)
        side = cfg.teacher_size // teacher_shape.patch_size                      # tokens, a side
        cfg = dataclasses.replace(cfg, fold=cfg.fold or max(1, grid // side))
        names += ("teacher", "teacher_size", "align_weight", "align_adaptive", "align_form", "patch_weight",
                  "cls_weight", "shuffle_targets", "align_hidden", "fold", "pool", "target", "standardize")
        facts["teacher_weights"] = checksum_of_teacher(cfg.teacher)
        if cfg.shuffle_targets and cfg.batch_size // process()[2] // cfg.accumulate == 1:
            stop("--shuffle-targets takes the tokens of another image of the batch: give every process two at once")
    folder, settings = claim_folder(cfg, *names, **facts)
    if finished(folder):
        return
    data, held_out = open_data(cfg, "train"), open_data(cfg, "test")
    if cfg.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    net, teacher, lpips = AlignedAutoencoder(autoencoder, None), None, None
    if aligned:
        net.heads = align.AlignmentHeads(cfg.latent_channels, teacher_shape.embed_dim, cfg.align_hidden, cfg.fold,
                                         cfg.pool, cfg.target, None if side * cfg.fold == grid else (side, side))
    discriminator = vae.PatchDiscriminator() if cfg.disc_weight else None
    plan = autoencoder_plan(cfg, data, net, teacher_shape if aligned else None, discriminator)
    plan.print(folder)
    if aligned:
        teacher = load_teacher(cfg.teacher).to(device)
        net.heads.fit_norm(teacher.norm)
    if cfg.perceptual_weight:
        lpips = load_lpips().to(device)
    net.to(device).train()
    opt = torch.optim.AdamW(net.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay, fused=True)
    kept = dict(net=net, opt=opt)
    if discriminator is not None:
        discriminator.to(device)
        d_opt = torch.optim.AdamW(discriminator.parameters(), lr=cfg.lr, betas=(0.5, 0.9), weight_decay=0.0, fused=True)
        kept.update(discriminator=discriminator, d_opt=d_opt)
    parts = SimpleNamespace(net=net, teacher=teacher, lpips=lpips, discriminator=discriminator)
    run = Run(cfg, folder, settings, plan, **kept)
    if aligned and cfg.standardize and run.step == 0:
        rows = np.linspace(0, len(data) - 1, min(len(data), 2048)).astype(int)
        tokens = [tokens_of(cfg, teacher, to_float(images, device)) for images, *_ in all_batches(data, 64, rows)]
        net.heads.fit_statistics(*(torch.cat(part) for part in zip(*tokens)))
    if aligned and cfg.cache_tokens:
        def encode(x):
            patch, cls = tokens_of(cfg, teacher, x)
            return torch.cat([cls[:, None], patch], dim=1)

        if not (folder / "tokens.npy").is_file():
            encode_all(data, folder / "tokens.npy", 64, cfg.workers, f"tokens {cfg.out}", encode)
        data = WithTokens(data, folder / "tokens.npy")
    if cfg.compile:
        autoencoder.encoder.compile()
        autoencoder.decoder.compile()
    model = DDP(net) if process()[2] > 1 else net
    d_model = DDP(discriminator) if process()[2] > 1 and cfg.disc_weight else discriminator
    measure = HeldOut(held_out, cfg.held_out, device, functools.partial(tokens_of, cfg, teacher) if aligned else None)
    for step, (images, *rest) in run.steps(data):
        x, reconstructions = to_float(images, device), []
        noise = Draws(cfg, step, device).randn(cfg.latent_channels, grid, grid)
        cached = rest[-1].to(device, non_blocking=True) if cfg.cache_tokens else None
        if cfg.disc_weight:
            discriminator.requires_grad_(False)                                  # its own turn comes below
        opt.zero_grad()
        for rows in parts_of_batch(cfg, model):
            with autocast(cfg):
                tokens = (cached[rows, 1:], cached[rows, 0]) if cfg.cache_tokens else None
                loss, logged, rec = autoencoder_step(cfg, parts, model, x[rows], noise[rows], step, tokens)
            (loss / cfg.accumulate).backward()
            reconstructions.append(rec.detach())
            run.log(**logged)
        run.optimise(opt)
        if "gan" in logged:
            discriminator.requires_grad_(True)
            d_opt.zero_grad()
            for rows, rec in zip(parts_of_batch(cfg, d_model), reconstructions):
                with autocast(cfg):
                    d_loss = vae.hinge_d_loss(d_model(x[rows]), d_model(rec))
                (d_loss / cfg.accumulate).backward()
                run.log(discriminator=d_loss.detach())
            run.optimise(d_opt, "discriminator_gradient")
        end = step + 1 == cfg.steps
        with run.pause():
            if (step + 1) % cfg.save_every == 0 or end:
                run.log(**measure(net))
            if ((step + 1) % cfg.sample_every == 0 or end) and process()[0] == 0:
                name = "reconstructions" if end else f"step-{step + 1:07}"
                draw_reconstructions(autoencoder, held_out, folder / "samples" / f"{name}.png", device)
    autoencoder.eval()
    measure_latents(autoencoder, data, device, cfg.statistics, cfg.latent_scale)
    if process()[0] == 0:
        if aligned:
            write_json(net.heads.config, folder / "heads.json")
            save_safetensors(net.heads.state_dict(), folder / "heads.safetensors")
        autoencoder.save_pretrained(folder)
    run.summary()
    barrier()


def autoencoder_plan(cfg, data, net, teacher, discriminator):
    """Plan of stages vae and align, of networks with weights or without."""
    with torch.device("meta"):
        lpips = vae.LPIPS().to("meta") if cfg.perceptual_weight else None
    parts = SimpleNamespace(net=on_meta(net), teacher=teacher, lpips=lpips,
                            discriminator=on_meta(discriminator) if discriminator else None)
    grid = cfg.image_size // net.vae.factor

    def step(rows):
        x = torch.empty(rows, 3, cfg.image_size, cfg.image_size, device="meta")
        noise = torch.empty(rows, cfg.latent_channels, grid, grid, device="meta")
        if discriminator:
            parts.discriminator.requires_grad_(False)
        loss, _, rec = autoencoder_step(cfg, parts, parts.net, x, noise, cfg.disc_start)
        loss.backward()
        if discriminator:
            parts.discriminator.requires_grad_(True)
            vae.hinge_d_loss(parts.discriminator(x), parts.discriminator(rec.detach())).backward()

    return Plan(cfg, data, "autoencoder", [part for part in (parts.net, parts.discriminator) if part], step)


def tokens_of(cfg, teacher, x):
    """The teacher's tokens of images x (N, 3, H, W) in [-1, 1]: of patches (N, T, D), of the class (N, D)."""
    return align.teacher_tokens(teacher, x, cfg.teacher_size, cfg.target)


def autoencoder_step(cfg, parts, model, x, noise, step, tokens=None):
    """Loss of images x (N, 3, H, W) of stages vae and align, its parts for the log, and the reconstructions. `parts`
    are the networks (net, teacher, lpips, discriminator), `model` is net or DDP around it; the teacher is asked for
    tokens that are not given."""
    net = parts.net
    rec, posterior, features = model(x, noise)
    loss, logged = vae.autoencoder_loss(
        x, rec, posterior, step=step, pixel_loss=cfg.pixel_loss, kl_weight=cfg.kl_weight,
        perceptual_weight=cfg.perceptual_weight, lpips=parts.lpips, disc_weight=cfg.disc_weight,
        disc_start=cfg.disc_start, discriminator=parts.discriminator, last_layer=net.vae.decoder.conv_out.weight)
    if net.heads is not None:
        target = net.heads.standardize(*(tokens or tokens_of(cfg, parts.teacher, x)))
        if cfg.shuffle_targets:
            target = [x.roll(1, dims=0) for x in target]
        align_loss, cosines = align.align_loss(*features, *target, cfg.align_form, cfg.patch_weight, cfg.cls_weight)
        weight = cfg.align_weight
        if cfg.align_adaptive:
            weight = weight * vae.adaptive_weight(loss, align_loss, net.vae.encoder.conv_out.weight)
            logged["align_ratio"] = weight
        loss = loss + weight * align_loss
        logged.update(align=align_loss.detach(), **cosines)
    return loss, logged, rec


class HeldOut:
    """Measures an autoencoder on `count` held-out images: PSNR, and, where it is aligned, cosines to the teacher."""

    def __init__(self, data, count, device, tokens_of):
        rows = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).astype(int))
        self.batches = []
        for images, *_ in all_batches(data, 4, rows):
            x = to_float(images, device)
            self.batches.append((x, tokens_of(x) if tokens_of else None))

    @torch.no_grad()
    def __call__(self, net):
        sums, count = {}, sum(len(x) for x, _ in self.batches)
        for x, tokens in self.batches:
            z = net.vae.encode(x).latent_dist.mode()
            figures = {"psnr": vae.psnr(x, net.vae.decode(z).sample).mean()}
            if tokens:
                _, parts = align.align_loss(*net.heads(z), *net.heads.standardize(*tokens))
                figures.update(cos_patch=parts["cos_patch"], cos_cls=parts["cos_cls"])
            for name, value in figures.items():
                sums[f"held_out_{name}"] = sums.get(f"held_out_{name}", 0) + value * len(x) / count
        return sums


@torch.no_grad()
def draw_reconstructions(autoencoder, data, path, device):
    """A sheet of up to 64 images, spread evenly over the data, and their reconstructions."""
    per_row = min(8 if autoencoder.config["sample_size"] < 128 else 4, len(data))
    rows = np.linspace(0, len(data) - 1, min(len(data), per_row ** 2) // per_row * per_row).astype(int)
    images = torch.cat([part for part, *_ in all_batches(data, 16, rows)])
    rec = [to_uint8(autoencoder.decode(autoencoder.encode(x).latent_dist.mode()).sample).cpu()
           for x in to_float(images, device).split(4)]
    columns = {"held-out images": images, "reconstructions": torch.cat(rec)}
    path.parent.mkdir(exist_ok=True)
    save_picture(sheet({title: x.unflatten(0, (-1, per_row)) for title, x in columns.items()},
                       scale=1 if images.shape[-1] >= 128 else 2), path)


def measure_latents(autoencoder, data, device, count, scale):
    """Statistics of the latents of at most `count` training images, spread evenly over the data, into the config: mean
    and deviation of every channel, or, with the scale "one", the one factor that makes them of deviation 1."""
    rank, _, world_size = process()
    rows = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).astype(int))
    batches = (to_float(images, device) for images, *_ in all_batches(data, 8, np.array_split(rows, world_size)[rank]))
    mean, std = map(np.array, vae.latent_statistics(autoencoder, batches))
    if scale == "channel":
        autoencoder.config.update(latents_mean=mean.tolist(), latents_std=std.tolist())
    else:
        autoencoder.config["scaling_factor"] = ((std ** 2 + mean ** 2).mean() - mean.mean() ** 2) ** -0.5


# ---------------------------------------------------------------------------------------------------------------------
# Stage latents: every training image encoded once

def find_autoencoder(cfg):
    """Folder of the run's autoencoder; stops where there is none."""
    folder = Path(cfg.vae) if cfg.vae else autoencoder_folder(Path(cfg.out))
    if not (folder / "config.json").is_file():
        stop(f"{folder}/config.json not found: run train.py --stage vae or align --out {cfg.out} first, give --vae")
    return folder


def encode_latents(cfg):
    """Stage latents: moments.npy (flips, images, 2C, h, w) float16 holds mean and std, labels.npy (images,)."""
    source, device = find_autoencoder(cfg), device_of_process()
    cfg = dataclasses.replace(cfg, vae=str(source))
    folder, settings = claim_folder(cfg, "vae", autoencoder=checksum(source))
    if finished(folder):
        return
    autoencoder, data = load_autoencoder(source).to(device), open_data(cfg, "train")
    if cfg.dry_run:
        cells, flips = cfg.image_size // autoencoder.factor, 2 if data.flip else 1
        size = flips * len(data) * 4 * autoencoder.config["latent_channels"] * cells ** 2
        return print(f"stage latents in {folder}: {len(data):,} images, {flips} times; moments.npy ({megabytes(size)})")
    write_settings(folder, settings)

    def encode(x):
        posterior = autoencoder.encode(x).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    encode_all(data, folder / "moments.npy", cfg.batch_size, cfg.workers, f"latents {cfg.out}", encode)
    if process()[0] == 0:
        with atomic_file(folder / "labels.npy") as file:
            np.save(file, data.labels.numpy())
        write_json({"autoencoder": settings["autoencoder"], "classes": list(data.classes)}, folder / "meta.json")
        size = (folder / "moments.npy").stat().st_size
        print(f"{folder} is done: {len(data)} images in moments.npy ({megabytes(size)}), labels.npy, meta.json")
    barrier()


class Latents:
    """The moments that stage latents wrote, as a data set; stops where they are missing or of another autoencoder."""

    def __init__(self, cfg, source):
        folder = Path(cfg.latents or Path(cfg.out) / "latents")
        if not (folder / "meta.json").is_file():
            stop(f"{folder}/meta.json not found: run train.py --stage latents --out {folder.parent} first")
        meta = read_json(folder / "meta.json")
        if meta["autoencoder"] != checksum(source):
            stop(f"{folder} was encoded by another autoencoder than {source}: delete it and run --stage latents again")
        self.moments, self.labels = np.load(folder / "moments.npy", mmap_mode="r"), np.load(folder / "labels.npy")
        self.classes, self.flip = meta["classes"], self.moments.shape[0] == 2

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, keys):
        """keys: list of (index, flip) -> moments (N, 2C, h, w) float32, labels (N,)."""
        index, flip = np.array([i for i, _ in keys]), np.array([int(f) for _, f in keys])
        moments = torch.from_numpy(self.moments[flip, index]).to(torch.get_default_dtype())
        return moments, torch.from_numpy(self.labels[index])


# ---------------------------------------------------------------------------------------------------------------------
# Stages sit and dit: the diffusion transformers; nothing here knows whether the latents are aligned

def new_transformer(cfg, channels, size, classes):
    """The transformer of stages sit and dit for latents (channels, size, size), and its arguments."""
    module, network = FAMILIES[cfg.stage]
    torch.manual_seed(cfg.seed)
    try:
        config = dict(module.size_arguments(cfg.model, network.__name__), input_size=size, in_channels=channels,
                      num_classes=classes, class_dropout_prob=cfg.label_dropout, learn_sigma=cfg.stage == "dit")
        net = network(**config)
    except ValueError as error:
        stop(error)
    if cfg.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    return net, config


def objective(cfg):
    """What the training loss is told of the path from noise to data; DiT has one only."""
    return dict(path=cfg.path, prediction=cfg.prediction, weight=cfg.loss_weight) if cfg.stage == "sit" else {}


def diffusion_plan(cfg, data, net, config):
    """Plan of stages sit and dit."""
    net = on_meta(net)

    def step(rows):
        x = torch.empty(rows, config["in_channels"], config["input_size"], config["input_size"], device="meta")
        y = torch.empty(rows, dtype=torch.long, device="meta")
        t = torch.empty(rows, device="meta") if cfg.stage == "sit" else y
        FAMILIES[cfg.stage][0].training_loss(net, x, y, t=t, eps=x, drop=y > 0, **objective(cfg)).mean().backward()

    tokens = (config["input_size"] // config["patch_size"]) ** 2
    return Plan(cfg, data, cfg.model, [net], step, tokens, averaged=True)


def train_diffusion(cfg):
    """Stages sit and dit."""
    device, module = device_of_process(), FAMILIES[cfg.stage][0]
    if cfg.dry_run and not (Path(cfg.latents or Path(cfg.out) / "latents") / "meta.json").is_file():
        data, size = open_data(cfg, "train"), cfg.image_size // 2 ** (len(cfg.channels) - 1)
        transformer = new_transformer(cfg, cfg.latent_channels, size, len(data.classes))
        diffusion_plan(cfg, data, *transformer).print(Path(cfg.out) / cfg.stage)  # and then tell what is missing
    source = find_autoencoder(cfg)
    cfg = dataclasses.replace(cfg, vae=str(source))
    names = OPTIMISER + FORWARD + (("path", "prediction", "loss_weight") if cfg.stage == "sit" else ())
    names += ("gradient_checkpointing", "vae", "model", "label_dropout", "ema")
    folder, settings = claim_folder(cfg, *names, autoencoder=checksum(source))
    if finished(folder):
        return
    autoencoder, data = load_autoencoder(source).to(device), Latents(cfg, source)
    settings["classes"] = data.classes                                           # for sample.py
    net, config = new_transformer(cfg, data.moments.shape[2] // 2, data.moments.shape[-1], len(data.classes))
    plan = diffusion_plan(cfg, data, net, config)
    plan.print(folder)
    net.to(device)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    sampler = SAMPLERS[cfg.stage]
    if cfg.stage == "sit":
        sampler = dict(sampler, path=cfg.path, prediction=cfg.prediction)
        t0, t1 = module.time_interval(cfg.path, cfg.prediction, training=True)

    def draw(name):
        labels = torch.arange(min(len(data.classes), 10)).repeat_interleave(8)
        images = decode(autoencoder, generate(module, ema, range(len(labels)), labels, cfg.seed, device, **sampler))
        (folder / "samples").mkdir(exist_ok=True)
        save_picture(sheet({"samples, no guidance": images.unflatten(0, (-1, 8))}, rows=data.classes[:10]),
                     folder / "samples" / f"{name}.png")

    opt = torch.optim.AdamW(net.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    run = Run(cfg, folder, settings, plan, net=net, ema=ema, opt=opt)
    if cfg.compile:
        net.compile()
    model = DDP(net) if process()[2] > 1 else net
    for step, (moments, labels) in run.steps(data):
        mean, std = moments.to(device, non_blocking=True).chunk(2, dim=1)
        y, rng = labels.to(device, non_blocking=True), Draws(cfg, step, device)
        x = autoencoder.normalize(mean + std * rng.randn(*mean.shape[1:]))
        eps, drop = rng.randn(*mean.shape[1:]), rng.rand() < cfg.label_dropout
        t = t0 + (t1 - t0) * rng.rand() if cfg.stage == "sit" else rng.randint(1000)
        opt.zero_grad()
        for rows in parts_of_batch(cfg, model):
            with autocast(cfg):
                draws = dict(t=t[rows], eps=eps[rows], drop=drop[rows])
                loss = module.training_loss(model, x[rows], y[rows], **draws, **objective(cfg)).mean()
            (loss / cfg.accumulate).backward()
            run.log(loss=loss.detach())
        run.optimise(opt)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - cfg.ema)
        if (step + 1) % cfg.sample_every == 0 and process()[0] == 0:
            with run.pause():
                draw(f"step-{step + 1:07}")
    if process()[0] == 0:
        write_json(config, folder / "config.json")
        draw("final")
        save_safetensors(ema.state_dict(), folder / "ema.safetensors")
    run.summary()


SAMPLERS = {"sit": dict(sampler="heun", num_steps=10), "dit": dict(sampler="ddpm", num_steps=100)}


# ---------------------------------------------------------------------------------------------------------------------
# Stage report: OUT/plain against OUT/aligned

def linear_probe(train, train_labels, test, test_labels, num_classes):
    """Test accuracy of multinomial logistic regression on standardised features, by at most 200 steps of L-BFGS."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(train.shape[1] + 1, num_classes, device=train.device, requires_grad=True)
    opt = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(train @ weight[1:] + weight[0], train_labels) + 1e-3 * weight[1:].square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    return ((test @ weight[1:] + weight[0]).argmax(1) == test_labels).float().mean().item()


def fit_heads(heads, latents, patch_tokens, cls_token, seed, form, steps=500, batch=64):
    """Train the MLPs of a plain autoencoder afterwards, on its frozen latents: what is in them anyway."""
    opt = torch.optim.AdamW(heads.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps, pct_start=0.05)
    rng = np.random.default_rng([seed, 2])
    with progress(steps, "report: MLPs for the plain latents", "step") as bar:
        for _ in range(steps):
            rows = torch.from_numpy(rng.integers(len(latents), size=batch))
            target = heads.standardize(patch_tokens[rows], cls_token[rows])
            loss, _ = align.align_loss(*heads(latents[rows]), *target, form)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            bar.update()
    return heads.eval()


def mean_iou(prediction, truth, num_classes):
    """Intersection over union of segment maps, over all pixels, averaged over the classes that occur."""
    pairs = torch.bincount((truth.long() * num_classes + prediction.long()).flatten(), minlength=num_classes ** 2)
    pairs = pairs.view(num_classes, num_classes).double()
    union = pairs.sum(0) + pairs.sum(1) - pairs.diag()
    return (pairs.diag()[union > 0] / union[union > 0]).mean().item()


@torch.no_grad()
def in_batches(function, x, size=250):
    """function over x (N, ...) in batches; its tensor or tuple of tensors, concatenated."""
    parts = [function(x[i:i + size]) for i in range(0, len(x), size)]
    return torch.cat(parts) if torch.is_tensor(parts[0]) else tuple(torch.cat(p) for p in zip(*parts))


def frechet(a, b):
    """Frechet distance of two sets of features."""
    return fid.frechet_distance(*fid.feature_statistics(a.cpu()), *fid.feature_statistics(b.cpu()))


def score_tasks(read, truth):
    """Masks and depth (N, H, W) against others: mean intersection over union, relative error."""
    (mask, depth), (segments, metres) = read, truth
    return mean_iou(mask, segments, len(SEGMENTS)), ((depth - metres).abs() / metres).mean().item()


TASK_FIGURES = ("masks from latents, mIoU", "depth from latents, relative error")


class Judge:
    """What both arms are held against: real images, the teacher's reading of them, an independent network."""

    def __init__(self, cfg, out, settings, device):
        self.cfg, self.settings, self.device = cfg, settings, device
        test = open_data(cfg, "test")
        train = open_data(dataclasses.replace(cfg, scenes=min(cfg.scenes, 8000)), "train")
        self.classes = test.classes
        self.teacher = load_teacher(settings["teacher"]).to(device)
        self.evaluator = Evaluator(len(test.classes)).to(device).eval()
        self.evaluator.load_state_dict(load_weights(out / "evaluator" / "evaluator.safetensors"))
        self.task_heads = None                                                   # where the data has no such truth
        if (Path(settings["teacher"]) / "heads.json").is_file():
            self.task_heads = load_task_heads([settings["teacher"]])
            self.task_heads.segmentation.to(device)
            self.task_heads.depth.to(device)
        self.images, self.labels, *self.truth = (torch.cat(part).to(device) for part in zip(*all_batches(test, 500)))
        self.subset = range(0, len(train), max(1, len(train) // 8000))           # a folder lists class after class
        images, self.train_labels, *_ = (torch.cat(p).to(device) for p in zip(*all_batches(train, 500, self.subset)))
        self.x_test, self.x_train = to_float(self.images, device), to_float(images, device)
        self.real, self.real_logits, self.real_spatial = in_batches(self.evaluator, self.x_test)
        self.tokens = in_batches(self.tokens_of, self.x_test)
        self.read = in_batches(self.read_images, self.x_test) if self.task_heads else None

    def tokens_of(self, x, target=None):
        """The teacher's tokens, of the kind that the MLPs learned unless another is asked for."""
        return align.teacher_tokens(self.teacher, x, self.settings["teacher_size"], target or self.settings["target"])

    def read_images(self, x):
        """Masks and depth by the teacher itself."""
        patch, cls = self.tokens_of(x, "norm")
        side = self.settings["teacher_size"] // self.teacher.patch_size
        return read_tasks(self.task_heads, self.cfg.image_size, patch.transpose(1, 2).unflatten(2, (side, side)), cls)

    def heads_for(self, config, latents):
        """MLPs for an autoencoder that has none, fitted to its frozen latents."""
        torch.manual_seed(self.cfg.seed)
        heads, tokens = align.AlignmentHeads(**config).to(self.device), in_batches(self.tokens_of, self.x_train)
        heads.fit_norm(self.teacher.norm)
        if self.settings["standardize"]:
            heads.fit_statistics(*tokens)
        return fit_heads(heads, latents, *tokens, self.cfg.seed, self.settings["align_form"])

    def ideal(self):
        """The end of the scale: what real images score, and what the teacher reads off the images themselves."""
        some = torch.randperm(len(self.x_train), generator=generator(self.cfg.seed, 3))[:self.cfg.num_samples]
        others, *_ = in_batches(self.evaluator, self.x_train[some.to(self.device)])
        accuracy = (self.real_logits.argmax(1) == self.labels).float().mean().item()
        figures = {"FD of samples, no guidance": frechet(others, self.real),
                   "class accuracy of samples, no guidance": accuracy}
        if self.task_heads:
            figures.update(zip(TASK_FIGURES, score_tasks(self.read, self.truth)))
        return figures


def score_autoencoder(judge, autoencoder, heads, z_train, z_test):
    """Figures of an autoencoder's reconstructions and latents (N, C, h, w); its reconstructions and their features."""
    rec = in_batches(lambda z: to_uint8(autoencoder.decode(z).sample), z_test)
    x, (patch, cls) = to_float(rec, judge.device), in_batches(heads, z_test)
    feats, *_ = in_batches(judge.evaluator, x)
    patch_target, cls_target = heads.standardize(*judge.tokens)
    accuracy = linear_probe(z_train.flatten(1), judge.train_labels, z_test.flatten(1), judge.labels, len(judge.classes))
    return {"PSNR of reconstructions, dB": vae.psnr(x, judge.x_test).mean().item(),
            "FD of reconstructions": frechet(feats, judge.real),
            "cosine to the teacher, patches": F.cosine_similarity(patch, patch_target, dim=-1).mean().item(),
            "cosine to the teacher, class token": F.cosine_similarity(cls, cls_target, dim=-1).mean().item(),
            "linear probe on latents, accuracy": accuracy}, rec, feats


def score_samples(judge, path, rec_feats, label):
    """Figures of a file of samples, under `label`, and the samples: images (N, 3, H, W) uint8 and labels (N,)."""
    with np.load(path) as archive:
        images, labels = (torch.from_numpy(archive[name]) for name in ("arr_0", "arr_1"))
    images = images.permute(0, 3, 1, 2)
    feats, logits, _ = in_batches(judge.evaluator, to_float(images, judge.device))
    accuracy = (logits.argmax(1).cpu() == labels).float().mean().item()
    return {f"FD of samples, {label}": frechet(feats, judge.real),
            f"FD of samples to own reconstructions, {label}": frechet(feats, rec_feats),
            f"class accuracy of samples, {label}": accuracy}, (images, labels)


def score_perception(judge, heads, z_test, arm, images):
    """Figures of masks and depth from latents: of held-out images against the truth, of generated latents against what
    the teacher reads off the decoded images (N, 3, H, W); and the masks and depth of the held-out images."""
    def read(z):
        return read_latents(heads, judge.task_heads, z, judge.cfg.image_size)

    z_new = torch.from_numpy(np.load(arm / "samples-latents.npy")).to(judge.device)
    own, new = in_batches(read, z_test), in_batches(read, z_new)
    theirs = in_batches(judge.read_images, to_float(images, judge.device))
    names = "masks of generated latents, mIoU with the teacher's", "depth of generated latents, off the teacher's"
    return dict(zip(TASK_FIGURES + names, (*score_tasks(own, judge.truth), *score_tasks(new, theirs)))), own


def report(cfg):
    """Stage report: figures and pictures of both arms, report.md, and the table on the terminal."""
    started, out, device = time.time(), Path(cfg.out), device_of_process()
    arms = {"plain": out / "plain", "aligned": out / "aligned"}
    for arm in arms.values():
        for path in (autoencoder_folder(arm) / "config.json", arm / "latents" / "meta.json", arm / "sit" / "log.jsonl",
                     arm / "samples.npz", arm / "samples-latents.npy", arm / "samples-guided.npz",
                     out / "evaluator" / "evaluator.safetensors"):
            if not path.is_file():
                stop(f"{path} not found: python train.py --out {out} makes what the report compares")
    for name, value in read_settings(out / "evaluator").items():
        if name in ("data", "scenes", "image_size") and value != getattr(cfg, name):
            stop(f"{out} holds a run with {name} = {value}, not {getattr(cfg, name)}: give the flags of the run")
    aligned = autoencoder_folder(arms["aligned"])
    judge = Judge(cfg, out, read_settings(aligned), device)
    table, pictures, read, pooled = {}, {"original": judge.images}, {"teacher": judge.read}, {}
    for name, arm in arms.items():
        folder = autoencoder_folder(arm)
        autoencoder, latents = load_autoencoder(folder).to(device), Latents(dataclasses.replace(cfg, out=arm), folder)
        z_train = latents.__getitems__([(i, False) for i in judge.subset])[0].chunk(2, dim=1)[0].to(device)
        z_test = in_batches(lambda x: autoencoder.encode(x).latent_dist.mean, judge.x_test)
        heads = load_heads(aligned).to(device)
        if folder != aligned:
            heads = judge.heads_for(heads.config, z_train)
        table[name], pictures[f"{name} reconstruction"], rec_feats = score_autoencoder(
            judge, autoencoder, heads, z_train, z_test)
        for suffix, label in (("", "no guidance"), ("-guided", f"guidance {cfg.cfg_scale:g}")):
            figures, pictures[name + suffix] = score_samples(judge, arm / f"samples{suffix}.npz", rec_feats, label)
            table[name].update(figures)
        if judge.task_heads:
            figures, read[name] = score_perception(judge, heads, z_test, arm, pictures[name][0])
            table[name].update(figures)
        pooled[name] = F.adaptive_avg_pool2d(autoencoder.normalize(z_test), 4).flatten(1).cpu()
    rows = torch.randperm(len(judge.labels), generator=generator(cfg.seed, 4))[:1000]
    if len(rows) >= 90:                                                          # fewer points have no neighbourhoods
        panels = {f"{name} latents of held-out images, t-SNE": align.tsne(x[rows]) for name, x in pooled.items()}
        save_picture(scatter(panels, judge.labels.cpu()[rows], judge.classes), out / "embedding.png")
    ideal = judge.ideal()
    write_json({**table, "real images, teacher": ideal}, out / "report.json")
    draw_report(out, judge, pictures, read)
    write_report(cfg, out, table, ideal, time.time() - started)


def draw_report(out, judge, pictures, read):
    """The report's pictures: real.png, reconstructions.png, samples.png, samples-guided.png, tasks.png, curves.png."""
    classes, labels, truth = judge.classes, judge.labels.cpu(), judge.truth
    shown = min(10, len(classes))
    rows, _ = by_class(torch.arange(len(labels)), labels, shown, 8)
    save_picture(sheet({"held-out images": pictures["original"][rows]}), out / "real.png")
    save_picture(sheet({"original": pictures["original"][rows], "plain": pictures["plain reconstruction"][rows],
                        "aligned": pictures["aligned reconstruction"][rows]}), out / "reconstructions.png")
    for suffix in ("", "-guided"):
        save_picture(sheet({name + suffix.replace("-", ", "): by_class(*pictures[name + suffix], shown, 10)[0]
                            for name in ("plain", "aligned")}), out / f"samples{suffix}.png")
    if judge.task_heads:
        rows = rows[:, :3]
        columns, read = {"held-out image": pictures["original"][rows]}, {"exact": truth, **read}
        for name, (mask, _) in read.items():
            columns[f"mask, {name}"] = align.colorize_mask(mask[rows.flatten()], len(SEGMENTS)).unflatten(0, rows.shape)
        for name, (_, depth) in read.items():
            columns[f"depth, {name}"] = align.colorize_depth(depth[rows.flatten()], NEAR, FAR).unflatten(0, rows.shape)
        save_picture(sheet(columns, legend=legend_of(truth[0].long(), SEGMENTS)), out / "tasks.png")
    curves = {}
    for name in ("plain", "aligned"):
        for title, folder in (("autoencoder", autoencoder_folder(out / name)), ("SiT", out / name / "sit")):
            for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
                for key in ("mse", "kl", "cos_patch", "cos_cls", "loss"):
                    if key in line:
                        curves.setdefault(f"{title} {key}", {}).setdefault(name, []).append((line["step"], line[key]))
    save_picture(plot(curves), out / "curves.png")


def write_report(cfg, out, table, ideal, seconds):
    """report.md, and its table on the terminal."""
    plain, aligned = table["plain"], table["aligned"]
    lines = ["| | plain | aligned | change | real images, teacher |", "|---|---|---|---|---|"]
    for name in plain:
        change = f"{aligned[name] - plain[name]:+.3f}"
        if name.startswith("FD"):
            change = f"{100 * (aligned[name] / plain[name] - 1):+.0f} %"
        last = f"{ideal[name]:.3f}" if name in ideal else ""
        lines.append(f"| {name} | {plain[name]:.3f} | {aligned[name]:.3f} | {change} | {last} |")
    fd = "FD of samples, no guidance"
    gain = 100 * (1 - aligned[fd] / plain[fd])
    verdict = (f"FD of samples without guidance is {abs(gain):.0f} % {'lower' if gain > 0 else 'higher'} when aligned: "
               f"the aim of 15 % lower is {'reached' if gain >= 15 else 'not reached'} in this run.")
    timings = read_timings(out)
    timings["report"] = seconds
    shown = ["curves.png", "real.png", "reconstructions.png", "samples.png", "samples-guided.png"]
    shown += [name for name in ("embedding.png", "tasks.png", "aligned/samples-tasks.png") if (out / name).is_file()]
    text = [f"# Plain and aligned latents: {cfg.data}, seed {cfg.seed}", "", *lines, "", verdict, "",
            "FD is the Frechet distance of the features of this run's own evaluator network to held-out images: it is "
            "no FID and compares with nothing outside this run. The last column gives what real images score, masks "
            "and depth that the teacher itself reads off the images. Cosines are of features standardised per channel. "
            "The plain autoencoder's MLPs were fitted afterwards, to its frozen latents.", ""]
    text += ["| phase | seconds |", "|---|---|"] + [f"| {name} | {value:.0f} |" for name, value in timings.items()]
    text += ["", *(f"![{name}]({name})\n" for name in shown)]
    with atomic_file(out / "report.md") as file:
        file.write(("\n".join(text) + "\n").encode())
    width = max(map(len, plain))
    print("\n" + " " * width + "     plain   aligned")
    for name in plain:
        print(f"{name:{width}} {plain[name]:9.3f} {aligned[name]:9.3f}")
    print(f"\n{verdict}\nreport and pictures: {out}/report.md")


# ---------------------------------------------------------------------------------------------------------------------
# The chain: every stage is a command that could be typed; two run side by side on a CPU

def chain(given):
    """All stages for both arms. What is done already is not done again."""
    check_many(given)
    for name in DEFAULTS:
        resolve(given, name)                                                     # say now what is wrong with the flags
    cfg = resolve(given, "report")
    out, dry_run = Path(cfg.out), given.pop("dry_run", False)
    given = {name: value for name, value in given.items() if name != "out"}
    flags = as_flags(given)
    plain, aligned = out / "plain", out / "aligned"
    tasks = ["--tasks", "features", *(("segmentation", "depth") if cfg.data == "scenes" else ())]
    common = ["--num", cfg.num_samples, "--steps", 8, "--seed", cfg.seed]
    jobs = {
        "teacher": stage_job("teacher", out, flags),
        "plain/vae": stage_job("vae", plain, flags),
        "aligned/align": stage_job("align", aligned, ["--teacher", out / "teacher", *flags], "teacher"),
        "evaluator": stage_job("evaluator", out, flags),
        "plain/latents": stage_job("latents", plain, flags, "plain/vae"),
        "aligned/latents": stage_job("latents", aligned, flags, "aligned/align"),
        "plain/sit": stage_job("sit", plain, flags, "plain/latents"),
        "aligned/sit": stage_job("sit", aligned, flags, "aligned/latents"),
        "plain/samples": sample_job(plain, "samples", [*common, "--latents"], "plain/sit"),
        "aligned/samples": sample_job(aligned, "samples", [*common, "--latents", *tasks], "aligned/sit"),
    }
    for arm in (plain, aligned):
        guided = sample_job(arm, "samples-guided", [*common, "--cfg-scale", cfg.cfg_scale], f"{arm.name}/sit")
        jobs[f"{arm.name}/samples-guided"] = guided
    if dry_run:
        return print("\n".join(shlex.join(["python", *command[1:]]) for command, *_ in jobs.values()))
    claim_run(out, given)
    run_jobs(jobs, out)
    report(cfg)


def check_many(given):
    """Stop where flags or data are not for many stages."""
    if process()[2] > 1:
        stop("many stages start their own processes: run this without torchrun, or one --stage at a time with it")
    for name in ("vae", "latents", "teacher", "preset"):
        if name in given:
            stop(f"--{name} is for one --stage: many stages make their own")
    for split in ("train", "test"):
        if given.get("data", "scenes") != "scenes":
            ImageFolder(given["data"], split, 1)


def as_flags(given):
    """Settings as the words of a command."""
    words = []
    for name, value in given.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, np.atleast_1d(value))]
    return words


def claim_run(out, given):
    """Make the folder of many stages; stops where it holds a run of other flags."""
    path = out / "config.json"
    if path.is_file() and read_json(path) != given:
        stop(f"{out} holds a run with {read_json(path)}, not {given}: choose another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    write_json(given, path)


def stage_job(name, out, flags, *before):
    """A stage as run_jobs takes it: its command, the names of the jobs before it, the file that it ends with."""
    return [sys.executable, __file__, "--stage", name, "--out", str(out), *map(str, flags)], before, Path(
        out, name, PRODUCTS[name])


def sample_job(run, name, flags, *before):
    """The samples RUN/NAME.npz as run_jobs takes them."""
    file = Path(run, f"{name}.npz")
    return [sys.executable, str(Path(__file__).with_name("sample.py")), "--run", str(run), "--out", str(file),
            *map(str, flags)], before, file


def read_timings(out):
    """Seconds that the jobs of a run took, so far."""
    path = out / "timings.json"
    return read_json(path) if path.is_file() else {}


def run_jobs(jobs, out):
    """Run commands, each when all before it are done; two at once on a CPU. Their seconds go to timings.json."""
    slots = 1 if torch.cuda.is_available() or os.cpu_count() == 1 else 2
    env = dict(os.environ, OMP_NUM_THREADS=str(max(1, os.cpu_count() // slots)), OMP_WAIT_POLICY="passive",
               REALS_PARENT=str(os.getpid()))
    timings = read_timings(out)
    done, running = set(), {}
    for name, (command, before, product) in jobs.items():
        if product.suffix == ".npz" and product.is_file():                       # samples are as good as their weights
            weights, latents = jobs[before[0]][2], product.with_name(product.stem + "-latents.npy")
            fresh = weights.is_file() and weights.stat().st_mtime <= product.stat().st_mtime
            if not fresh or "--latents" in command and not latents.is_file():
                product.unlink()
        if product.is_file():
            done.add(name)
    if done:
        print(f"{len(done)} of {len(jobs)} jobs are done already")
    for number in (signal.SIGTERM, signal.SIGINT):                               # so that `finally` comes to pass
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        while len(done) < len(jobs):
            for name, (command, before, _) in jobs.items():
                if len(running) < slots and name not in done | running.keys() and done.issuperset(before):
                    slot = min(set(range(slots)) - {slot for _, slot, _ in running.values()})
                    tqdm.write("$ " + " ".join(["python", *command[1:]]))
                    running[name] = subprocess.Popen(command, env=dict(env, REALS_BAR=str(slot))), slot, time.time()
            time.sleep(0.1)
            for name, (child, _, start) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[name]
                if child.returncode < 0:
                    sys.exit(f"{name} was killed by signal {-child.returncode}: the same command goes on from here")
                if child.returncode:                                             # it has said why
                    sys.exit(child.returncode)
                done.add(name)
                timings.setdefault(name, round(time.time() - start, 1))
                write_json(timings, out / "timings.json")
    finally:
        for child, _, _ in running.values():
            child.terminate()
            child.wait()


# ---------------------------------------------------------------------------------------------------------------------
# The study: does alignment help, how much, and why? Its plan stands before its results, and every run counts

GUIDANCE = {"no guidance": [], "guidance 1.5": ["--cfg-scale", 1.5],
            "guidance 1.5 at noise 0 to 0.75": ["--cfg-scale", 1.5, "--cfg-interval", 0, 0.75],
            # added after the first results, for SiT at its longest: is 1.5 as good a scale for both?
            "guidance 1.1": ["--cfg-scale", 1.1], "guidance 1.25": ["--cfg-scale", 1.25],
            "guidance 1.25 at noise 0 to 0.75": ["--cfg-scale", 1.25, "--cfg-interval", 0, 0.75]}
STUDY_SAMPLER = {"sit": ["--steps", 8], "dit": ["--sampler", "ddim", "--steps", 20]}
AUTOENCODERS = {                                                                 # name: (stage, flags)
    "plain": ("vae", []),
    "aligned": ("align", []),
    # controls: what does as well as the teacher would refute the claim
    "random teacher": ("align", []),                                             # of another teacher: see study_jobs
    "shuffled targets": ("align", ["--shuffle-targets"]),
    "plain, KL x 2": ("vae", ["--kl-weight", 2e-6]),
    "plain, KL x 4": ("vae", ["--kl-weight", 4e-6]),
    # ablations: one choice changed
    "cosine": ("align", ["--align-form", "cosine"]),
    "smooth L1": ("align", ["--align-form", "l1"]),
    "weight 0.02": ("align", ["--align-weight", 0.02]),
    "weight 0.15": ("align", ["--align-weight", 0.15]),
    "adaptive weight 0.5": ("align", ["--align-weight", 0.5, "--align-adaptive"]),
    "patches only": ("align", ["--cls-weight", 0]),
    "class token only": ("align", ["--patch-weight", 0]),
    "fold 2": ("align", ["--fold", 2]),
    "pooled to 1 x 1": ("align", ["--pool", 1]),
    "un-normed targets": ("align", ["--target", "prenorm"]),
    "targets not standardised": ("align", ["--no-standardize"]),
    "plain, one scale": ("vae", ["--latent-scale", "one"]),
    "aligned, one scale": ("align", ["--latent-scale", "one"]),
    # added after the first results: teacher and evaluator have seen the same labels; this teacher sees depth alone
    "teacher without labels": ("align", []),                                     # of another teacher too
}
CONTROLS = ("random teacher", "shuffled targets", "plain, KL x 2", "plain, KL x 4", "teacher without labels")
REPEATED = ("random teacher", "shuffled targets", "teacher without labels")      # with the other seeds: added later too


def study_runs(cfg):
    """The plan: (seed, autoencoder, family, steps, guidance) of every set of samples, in the order of the work."""
    steps, whole = cfg.steps, cfg.data == "scenes"
    runs = [(seed, name, family, length, guidance)
            for length in ((steps // 2, steps, 2 * steps) if whole else (steps,))
            for seed in range(3 if whole else 2) for family in (("sit", "dit") if whole else ("sit",))
            for name in ("plain", "aligned")
            for guidance in list(GUIDANCE)[:None if (family, length) == ("sit", 2 * steps) else 3]]
    if whole:
        runs += [(0, name, "sit", steps, "no guidance") for name in list(AUTOENCODERS)[2:]]
        runs += [(seed, name, "sit", steps, "no guidance") for name in REPEATED for seed in (1, 2)]
    return runs


def study_arm(out, seed, name):
    """Folder of an autoencoder of the study."""
    return out / f"seed{seed}" / name.replace(",", "").replace(" ", "-")


def study_samples(out, seed, name, family, steps, guidance):
    """Where samples of the study are, without ending."""
    return study_arm(out, seed, name) / f"{family}-{steps}" / f"samples-{list(GUIDANCE).index(guidance)}"


def study_jobs(cfg, given, out):
    """Everything that is trained and sampled, as run_jobs takes it."""
    flags = as_flags({name: value for name, value in given.items() if name not in ("stage", "out", "steps", "seed")})
    jobs = {"evaluator": stage_job("evaluator", out, flags)}
    teachers = {"random teacher": ("random", ["--steps", 1, "--lr", 0]),
                "teacher without labels": ("no-labels", ["--no-labels"])}
    for seed, name, family, steps, guidance in study_runs(cfg):
        arm, (stage, extra) = study_arm(out, seed, name), AUTOENCODERS[name]
        key, extra = str(arm.relative_to(out)), [*extra, "--seed", seed, *flags]
        if stage == "align":
            folder, words = teachers.get(name, ("", []))
            teacher = (Path(folder) / "teacher").as_posix()
            jobs[teacher] = stage_job("teacher", out / folder, [*flags, *words])
            jobs[key] = stage_job(stage, arm, ["--teacher", out / teacher, *extra], teacher)
        else:
            jobs[key] = stage_job(stage, arm, extra)
        jobs[f"{key}/latents"] = stage_job("latents", arm, ["--vae", arm / stage, *flags], key)
        run = arm / f"{family}-{steps}"
        weights = str(run.relative_to(out))
        jobs[weights] = stage_job(family, run, ["--vae", arm / stage, "--latents", arm / "latents", "--steps", steps,
                                                "--seed", seed, *flags], f"{key}/latents")
        path = study_samples(out, seed, name, family, steps, guidance)
        jobs[str(path.relative_to(out))] = sample_job(
            run, path.name, ["--family", family, "--num", cfg.num_samples, "--seed", seed, *STUDY_SAMPLER[family],
                             *GUIDANCE[guidance]], weights)
    return jobs


def latent_spectrum(z):
    """Of latents (N, C, h, w) as diffusion sees them: how many dimensions carry their variance, (sum v)^2 / sum v^2 of
    the eigenvalues v of their covariance; and the share of the variance in each ring of spatial frequencies."""
    x = (z - z.mean(0)).double()
    values = torch.linalg.eigvalsh(x.flatten(1).T @ x.flatten(1))
    power = torch.fft.fft2(x).abs().square().sum((0, 1))                         # (h, w)
    frequency = torch.fft.fftfreq(z.shape[-1], device=z.device) * z.shape[-1]
    ring = (frequency[:, None] ** 2 + frequency ** 2).sqrt().round().long()
    rings = torch.bincount(ring.flatten(), power.flatten())
    return (values.sum() ** 2 / values.square().sum()).item(), (rings / rings.sum()).tolist()


def study_autoencoder(judge, autoencoder, arm, stage, heads_config):
    """Figures of an autoencoder of the study. The MLPs that read its latents are fitted afterwards, for all alike."""
    latents = Latents(dataclasses.replace(judge.cfg, out=arm, latents=None), arm / stage)
    z_train = latents.__getitems__([(i, False) for i in judge.subset])[0].chunk(2, dim=1)[0].to(judge.device)
    z_test = in_batches(lambda x: autoencoder.encode(x).latent_dist.mean, judge.x_test)
    heads = judge.heads_for(heads_config, z_train)
    figures, *_ = score_autoencoder(judge, autoencoder, heads, z_train, z_test)
    if judge.task_heads:
        read = in_batches(lambda z: read_latents(heads, judge.task_heads, z, judge.cfg.image_size), z_test)
        figures.update(zip(TASK_FIGURES, score_tasks(read, judge.truth)))
    figures["dimensions"], figures["rings"] = latent_spectrum(autoencoder.normalize(z_test))
    variance = z_test.var((0, 2, 3))
    figures["channels"] = (variance / variance.sum()).sort(descending=True).values.tolist()
    others = z_test[torch.randperm(len(z_test), generator=generator(judge.cfg.seed, 5)).to(judge.device)]
    between = in_batches(lambda z: judge.evaluator(autoencoder.decode(z).sample)[0], (z_test + others) / 2)
    figures["FD halfway between two latents"] = frechet(between, judge.real)
    figures["seconds per step"] = seconds_per_step(arm / stage)
    return figures


def seconds_per_step(folder):
    """The median over the lines of a stage's log."""
    return float(np.median([json.loads(line)["seconds_per_step"]
                            for line in (folder / "log.jsonl").read_text().splitlines()]))


def study_sample_figures(judge, path, family, rec_feats):
    """Figures of a set of samples: those of ADM's suite, with the evaluator in place of Inception."""
    with np.load(path) as archive:
        images, labels = torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(archive["arr_1"])
    feats, logits, spatial = in_batches(judge.evaluator, to_float(images, judge.device))
    precision, recall = fid.precision_recall(judge.real, feats)
    return {"FD": frechet(feats, judge.real), "sFD": frechet(spatial, judge.real_spatial),
            "IS": fid.inception_score(logits), "precision": precision, "recall": recall,
            "FD to own reconstructions": frechet(feats, rec_feats),
            "class accuracy": (logits.argmax(1).cpu() == labels).float().mean().item(),
            "seconds per step": seconds_per_step(path.parent / family)}


def measure_study(cfg, out):
    """Append to results.jsonl what is finished and not in it yet, a line an autoencoder and a line a set of samples;
    returns all lines. A line is made anew when its weights have changed, or the evaluator's."""
    path, device, evaluator = out / "results.jsonl", device_of_process(), out / "evaluator" / PRODUCTS["evaluator"]
    text = path.read_text() if path.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if not text.endswith("\n"):                                                  # killed within a line, or not begun
        with atomic_file(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    known = {json.dumps([line["run"], line["weights"]]) for line in lines}
    timings = read_timings(out)
    found, judge, config = {}, None, None
    for run in study_runs(cfg):
        seed, name, *_ = run
        samples = study_samples(out, *run).with_suffix(".npz")
        if samples.is_file() and evaluator.is_file():
            found.setdefault((seed, name), []).append((run, samples))
    with progress(sum(map(len, found.values())), "measure", "set") as bar, open(path, "a") as file:
        for (seed, name), sets in found.items():
            arm, stage = study_arm(out, seed, name), AUTOENCODERS[name][0]
            judged = {"evaluator": checksum(evaluator)}
            sets = [(run, samples, judged | {key: read_json(samples.with_suffix(".json"))[key]
                                             for key in ("transformer", "autoencoder")}) for run, samples in sets]
            own = [seed, name], judged | {"autoencoder": checksum(arm / stage)}
            todo = [row for row in sets if json.dumps([list(row[0]), row[2]]) not in known]
            if not todo and json.dumps(list(own)) in known:
                bar.update(len(sets))
                continue
            if judge is None:
                aligned = study_arm(out, 0, "aligned") / "align"
                judge, config = Judge(cfg, out, read_settings(aligned), device), load_heads(aligned).config
            autoencoder = load_autoencoder(arm / stage).to(device)
            rec = in_batches(lambda x: to_uint8(autoencoder.decode(autoencoder.encode(x).latent_dist.mean).sample),
                             judge.x_test)
            rec_feats, *_ = in_batches(judge.evaluator, to_float(rec, device))
            new = [(run, weights, {**study_sample_figures(judge, samples, run[2], rec_feats),
                                   "seconds": timings.get(str(samples.with_suffix("").relative_to(out)))})
                   for run, samples, weights in todo]
            if json.dumps(list(own)) not in known:
                new.append((*own, study_autoencoder(judge, autoencoder, arm, stage, config)))
            for run, weights, figures in new:
                lines.append(json.loads(json.dumps({"run": run, "weights": weights, **figures})))
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
            bar.update(len(sets))
    return {tuple(line["run"]): line for line in lines}                          # the last of a run counts


def judge_of(line):
    """The evaluator behind a line of results.jsonl."""
    return line["weights"].get("evaluator")


def spread(values, digits=2):
    """Mean and standard deviation as text."""
    text = f"{np.mean(values):.{digits}f}"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def main_table(runs, seeds, results):
    """Lines of the main table: plain beside aligned, mean and standard deviation over the seeds; then the average."""
    changes, rows = {}, []
    for family, steps, guidance in dict.fromkeys(run[2:] for run in runs):
        pairs = [[results.get((seed, name, family, steps, guidance)) for name in ("plain", "aligned")]
                 for seed in seeds]
        pairs = [pair for pair in pairs if all(pair) and judge_of(pair[0]) == judge_of(pair[1])]
        if not pairs:
            continue
        change = [100 * (aligned["FD"] / plain["FD"] - 1) for plain, aligned in pairs]
        changes.setdefault(guidance, []).extend(change)
        cells = [FAMILIES[family][1].__name__, f"{steps}", guidance, *(spread([pair[i]["FD"] for pair in pairs])
                 for i in (0, 1)), f"{spread(change, 0)} %"]
        cells += [" → ".join(spread([pair[i][key] for pair in pairs]) for i in (0, 1))
                  for key in ("sFD", "IS", "precision", "recall")]
        rows.append(cells)
    lines = table_lines(["", "steps", "guidance", "FD plain", "FD aligned", "change", "sFD", "IS", "precision",
                         "recall"], rows) + [""]
    for guidance, change in changes.items():
        lines.append(f"* {guidance}: the FD of aligned latents is {-np.mean(change):.0f} % lower on average over "
                     f"{len(change)} pairs (from {-np.max(change):.0f} to {-np.min(change):.0f} %); the paper's 15 % "
                     f"is {'reached' if np.mean(change) <= -15 else 'not reached'}.")
    return lines


def table_lines(head, rows):
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def autoencoder_tables(cfg, results):
    """Lines of the sections Why and Ablations, of what is there."""
    columns = {"PSNR, dB": ("PSNR of reconstructions, dB", 2), "FD rec.": ("FD of reconstructions", 3),
               "probe": ("linear probe on latents, accuracy", 3), "cosine": ("cosine to the teacher, patches", 3),
               "mIoU": (TASK_FIGURES[0], 3), "depth error": (TASK_FIGURES[1], 3), "dimensions": ("dimensions", 0),
               "FD halfway": ("FD halfway between two latents", 2)}
    lines, sampled = [], ("sit", cfg.steps, "no guidance")
    for title, chosen in (("Why", ("plain", "aligned", *CONTROLS)),
                          ("Ablations", [name for name in AUTOENCODERS if name not in CONTROLS])):
        found = {name: results[0, name] for name in chosen if (0, name) in results}
        if len(found) < (2 if title == "Why" else 3):                            # plain and aligned are no ablations
            continue
        shown = {label: (key, digits) for label, (key, digits) in columns.items()
                 if all(key in line for line in found.values())}
        rows = []
        for name, line in found.items():
            samples = results.get((0, name, *sampled))
            rows.append([name, *(f"{line[key]:.{digits}f}" for key, digits in shown.values()),
                         f"{samples['FD']:.2f}" if samples else ""])
        noise = ""
        for name in found:
            seeds = [run[0] for run in results if run[1:] == (name,)]
            samples = [results[seed, name, *sampled]["FD"] for seed in seeds if (seed, name, *sampled) in results]
            if min(len(seeds), len(samples)) > 1:
                if title == "Why":
                    rows.append([f"{name}, seeds {', '.join(map(str, seeds))}", *(
                        spread([results[seed, name][key] for seed in seeds], digits) for key, digits in shown.values()),
                        spread(samples)])
                if name == "aligned":
                    noise = (" Between seeds the FD of samples of aligned latents deviates by "
                             f"{np.std(samples, ddof=1):.2f}.")
        lines += ["", f"## {title}", "", f"Seed 0; samples of SiT after {cfg.steps} steps, no guidance. The MLPs that "
                  f"read cosine, masks and depth off the latents are fitted afterwards, for all alike.{noise}", "",
                  *table_lines(["", *shown, "FD of samples"], rows)]
        if title == "Why":
            count = max(len(line["rings"]) for line in found.values())
            rows = [[name, " ".join(f"{100 * share:.0f}" for share in line["channels"]),
                     *(f"{100 * share:.1f}" for share in line["rings"])] for name, line in found.items()]
            lines += ["", "Where the variance of the latents is, in %: by channel, and of the normalised latents by "
                      "spatial frequency, in cycles across the image.", "",
                      *table_lines(["", "channels", *map(str, range(count))], rows)]
    return lines


def cost_table(cfg, results):
    """Lines of the section Cost: medians and ranges over all runs of the main table."""
    costs = {}
    for run, line in results.items():
        seed, name, *rest = run
        if name not in ("plain", "aligned"):
            continue
        model = FAMILIES[rest[0]][1].__name__ if rest else "the autoencoder"
        costs.setdefault(f"a step of {model}", {}).setdefault(name, []).append(line["seconds per step"])
        if rest and line["seconds"]:
            label = f"{cfg.num_samples} samples of {model}, {rest[2]}"
            costs.setdefault(label, {}).setdefault(name, []).append(line["seconds"])
    rows = [[label, *(f"{np.median(by[name]):.3g} ({min(by[name]):.3g} to {max(by[name]):.3g})"
                      for name in ("plain", "aligned")),
             f"{100 * (np.median(by['aligned']) / np.median(by['plain']) - 1):+.0f} %"]
            for label, by in sorted(costs.items()) if len(by) == 2]
    return ["", "## Cost", "", "Median seconds and their range, two commands side by side. The transformers do the "
            "same computation on latents of the same shape.", "",
            *table_lines(["", "plain", "aligned", "change"], rows)]


def draw_study(cfg, out, results):
    """Pictures of the study: fd.png over the length of training, samples.png of seed 0. Returns their names."""
    arms, curves, columns, shown = ("plain", "aligned"), {}, {}, []
    for family, guidance in dict.fromkeys((run[2], run[4]) for run in results if len(run) > 2):
        for name in arms:
            found = {}
            for run, line in results.items():
                if (*run[1:3], *run[4:]) == (name, family, guidance):
                    found.setdefault(run[3], []).append(line["FD"])
            if len(found) > 1:
                title = f"{FAMILIES[family][1].__name__}, {guidance}: FD"
                curves.setdefault(title, {})[name] = [(steps, np.mean(found[steps])) for steps in sorted(found)]
    if curves:
        save_picture(plot(curves, (380, 220)), out / "fd.png")
        shown.append("fd.png")
    lengths = sorted({run[3] for run in study_runs(cfg)})
    for steps in lengths:
        for name in arms:
            run = 0, name, "sit", steps, "no guidance"
            if run in results:
                with np.load(study_samples(out, *run).with_suffix(".npz")) as archive:
                    images, labels = (torch.from_numpy(archive[key]) for key in ("arr_0", "arr_1"))
                columns[f"{name}, {steps} steps"], _ = by_class(images.permute(0, 3, 1, 2), labels, 10,
                                                                10 if len(lengths) == 1 else 3)
    if columns:
        save_picture(sheet(columns), out / "samples.png")
        shown.append("samples.png")
    return shown


def study_tables(cfg, results):
    """Lines of the study's report: the plan, then the tables of what is there."""
    runs = study_runs(cfg)
    seeds, lengths = (sorted({run[i] for run in runs}) for i in (0, 3))
    done = sum(run in results for run in runs)
    text = [f"# Plain and aligned latents: {cfg.data}", "",
            f"The plan, made before any result but for what its code says was added: {len(runs)} sets of "
            f"{cfg.num_samples} samples; seeds {', '.join(map(str, seeds))}, each of its own autoencoders and "
            f"transformers, with one teacher and one evaluator; steps of the transformer "
            f"{', '.join(map(str, lengths))}, each with a schedule of its own. All seeds and all lengths stand below. "
            f"{done} of the {len(runs)} sets are there.", "",
            "FD is the Frechet distance of the evaluator's features to held-out images, sFD that of its spatial "
            "features; IS, precision and recall are of the evaluator too. They compare within this report only. Where "
            "there are several seeds: mean ± standard deviation. Flags of sample.py: for SiT "
            f"{' '.join(map(str, STUDY_SAMPLER['sit']))}, for DiT {' '.join(map(str, STUDY_SAMPLER['dit']))}."]
    if (judges := len({judge_of(line) for line in results.values()})) > 1:
        text += ["", f"{judges} evaluators, each trained on another machine or anew, have judged these sets; plain and "
                 "aligned of a seed were judged by the same one."]
    if done:
        text += ["", "## Main table", "", *main_table(runs, seeds, results), *autoencoder_tables(cfg, results),
                 *cost_table(cfg, results)]
    return text


def study_report(cfg, out, results):
    """report.md of the study, and its pictures."""
    text = study_tables(cfg, results) + [f"\n![{name}]({name})" for name in draw_study(cfg, out, results)]
    with atomic_file(out / "report.md") as file:
        file.write(("\n".join(text) + "\n").encode())


def study(cfg, given):
    """Stage study: train, sample and measure all of the plan, in parts; after each the report is written anew."""
    check_many(given)
    varied = {word[2:].replace("-", "_").removeprefix("no_") for _, words in AUTOENCODERS.values() for word in words
              if str(word).startswith("--")} | {"labels", "cfg_scale", "model"}
    for name in sorted(given.keys() & varied):
        stop(f"--{name.replace('_', '-')} is what the study varies: give it to one --stage, or leave it out")
    for name in DEFAULTS:
        resolve(given, name)                                                     # say now what is wrong with the flags
    if cfg.steps < 2:
        stop(f"--steps {cfg.steps}: the study trains half as long too")
    out, runs, dry_run = Path(cfg.out), study_runs(cfg), given.pop("dry_run", False)
    jobs = study_jobs(cfg, given, out)
    if dry_run:
        return print("\n".join(shlex.join(["python", *command[1:]]) for command, *_ in jobs.values()))
    claim_run(out, {name: value for name, value in given.items() if name != "out"})

    def with_inputs(names):
        for name in names:
            yield from with_inputs(jobs[name][1])
            yield name

    study_report(cfg, out, measure_study(cfg, out))                              # at first the plan alone
    for length, seed in [*dict.fromkeys((run[3], run[0]) for run in runs), (None, None)]:
        part = [run for run in runs if length is None
                or run[1] in ("plain", "aligned") and (run[3], run[0]) == (length, seed)]
        names = with_inputs(["evaluator", *(str(study_samples(out, *run).relative_to(out)) for run in part)])
        run_jobs({name: jobs[name] for name in dict.fromkeys(names)}, out)
        study_report(cfg, out, measure_study(cfg, out))
    print(f"report and pictures: {out}/report.md; figures of every run: {out}/results.jsonl")


def run_stage(cfg):
    """One stage, in this process of perhaps several."""
    if cfg.stage == "report" and process()[2] > 1:
        stop("--stage report is the work of one process: run it without torchrun")
    if cfg.steps and cfg.batch_size % (process()[2] * cfg.accumulate):
        stop(f"--batch-size {cfg.batch_size} is that of all processes: it does not divide by {process()[2]}"
             + (f" and --accumulate {cfg.accumulate}" if cfg.accumulate > 1 else ""))
    join_processes()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.precision == "tf32"
    stages = {"teacher": train_classifier, "evaluator": train_classifier, "heads": train_heads,
              "vae": train_autoencoder, "align": train_autoencoder, "latents": encode_latents,
              "sit": train_diffusion, "dit": train_diffusion, "report": report}
    stages[cfg.stage](cfg)
    if process()[2] > 1:
        dist.destroy_process_group()


def main(argv=None):
    """Run what the flags say: one stage, or all of them."""
    given = parse_arguments(argv)
    try:
        if "stage" in given:
            cfg = resolve(given, given["stage"])
            study(cfg, given) if cfg.stage == "study" else run_stage(cfg)
        else:
            chain(given)
    except DataError as error:
        stop(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
