"""Train ReaLS: an autoencoder whose latents are aligned with DINOv2, then SiT or DiT on those
latents.

    torchrun --nproc_per_node=8 train.py --stage align latents sit --data imagenet --out runs/in256
    python train.py --preset small --stage vae latents sit --data images.zip --out runs/mine
    python train.py                                    the demo, on a built-in world: python -m demo

    stage       reads                       writes, in OUT/STAGE
    vae         images                      a plain autoencoder, in diffusers' layout
    align       images, a teacher           an autoencoder aligned with the teacher, and two MLPs
    latents     images, an autoencoder      mean and deviation of q(z | x) of every training image
    sit, dit    latents                     a diffusion transformer: ema.safetensors, config.json

A stage also writes settings.json, and one that trains checkpoint.pt, log.jsonl and samples/. The
same command goes on where a run was stopped or killed, and ends the same: every random number is a
function of the seed and of the step, or of the seed, the epoch and the image.

    B images a step on all processes, b on one    x (b, 3, H, W) in [-1, 1]    z (b, C, h, w)
"""
import argparse
import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from tqdm import tqdm

import align
import dit
import sit
import vae
from fid import list_images, read_file, read_rgb
from vae import atomic_file, save_safetensors

# as torchrun sets them; without it this is one process
rank = int(os.environ.get("RANK", 0))
local_rank = int(os.environ.get("LOCAL_RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")

FAMILIES = {"sit": (sit, sit.SiT), "dit": (dit, dit.DiT)}

# --------------------------------------------------------------------------------------------------
# Settings


def flag(group, default, text=None, choices=None):
    """A field of Config: its group in --help, its default, its help; without help it is no flag."""
    metadata = dict(group=group, text=text, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """All settings of a stage. The defaults are the paper's, and where it is silent those of the
    official trainings of SiT and DiT. None: as the stage's row of PRESETS or the help says."""
    stage: str = flag("run", None, "one or several, in turn; a flag holds for all of them",
                      ("vae", "align", "latents", "sit", "dit"))
    data: str = flag("run", None, "folder or .zip: train/CLASS/* and val/CLASS/* (or test/), or "
                     "CLASS/*")
    out: str = flag("run", None, "folder of the run (default: runs/ and the name of the data)")
    preset: str = flag("run", "paper", "ImageNet at 256 px, or 32 px on a laptop",
                       ("paper", "small"))
    workers: int = flag("run", 8, "processes that load images, for every training process")
    precision: str = flag("run", None, "of the forward pass; weights and optimiser are float32 "
                          "(default: bf16 on a GPU that has it)", ("fp32", "tf32", "bf16"))
    compile: bool = flag("run", False, "torch.compile")
    log_every: int = flag("run", 100, "steps between lines of log.jsonl")
    save_every: int = flag("run", 5000, "steps between checkpoints, a multiple of --log-every")
    sample_every: int = flag("run", 10_000, "steps between pictures in OUT/STAGE/samples")
    snapshots: tuple = flag("run", None, "sit, dit: steps whose averaged weights are kept too, for "
                            "sample.py --ckpt")
    dry_run: bool = flag("run", False, "check flags, data and weights, say what would be done, end")

    seed: int = flag("data", 0, "of weights, noise and the order of the images")
    image_size: int = flag("data", 256, "pixels a side")
    flip: bool = flag("data", True, "mirror half of the images; --no-flip for letters and the like")

    steps: int = flag("training", None, "optimiser steps")
    batch_size: int = flag("training", None, "images a step, on all processes together")
    accumulate: int = flag("training", 1, "parts of a batch that follow each other, to save memory")
    lr: float = flag("training", 1e-4, "peak of the learning rate of AdamW")
    warmup: int = flag("training", 0, "steps of linear warm-up")
    decay: float = flag("training", 1.0, "share of --lr at the end of its cosine; 1 keeps it")
    weight_decay: float = flag("training", 0.0, "of AdamW")
    clip: float = flag("training", 0.0, "largest norm of the gradient; 0: no limit")
    gradient_checkpointing: bool = flag("training", False, "less memory, one more forward pass")

    init: str = flag("autoencoder", None, "start from this one: diffusers' folder, or a file")
    channels: tuple = flag("autoencoder", (128, 256, 512, 512), "of its levels, each half as large")
    layers_per_block: int = flag("autoencoder", 2, "resnets a level")
    norm_groups: int = flag("autoencoder", 32, "groups of its norms")
    latent_channels: int = flag("autoencoder", 4, "channels of its latents")
    kl_weight: float = flag("autoencoder", 1e-6, "w_kl, of a KL summed over the latent")
    perceptual_weight: float = flag("autoencoder", 1.0, "w_p, of LPIPS")
    disc_weight: float = flag("autoencoder", 0.5, "w_g, of the GAN loss, times its adaptive weight")
    disc_start: int = flag("autoencoder", 20_000, "first step with the GAN loss")

    teacher: str = flag("alignment", "dinov2_vitb14", "a published DINOv2, a teacher's folder, or "
                        "MODULE:FUNCTION that returns one")
    teacher_size: int = flag("alignment", None, "pixels a side that the teacher sees "
                             "(default: 224 for patches of 14, else the image size)")
    align_weight: float = flag("alignment", 0.5, "w_a")
    align_adaptive: bool = flag("alignment", True, "times the ratio of the gradients of all other "
                                "terms and of the align loss at the encoder's last layer")
    align_hidden: int = flag("alignment", 2048, "width of the two MLPs")
    fold: int = flag("alignment", None, "fold x fold latent cells make one token "
                     "(default: so that the grids meet)")
    pool: int = flag("alignment", 4, "MLPcls sees the latent averaged to pool x pool cells")
    freeze: bool = flag("alignment", False, "with --init: the autoencoder stays as it is, the MLPs "
                        "learn to read it")
    # no flags: what only an ablation changes, from Python (demo/study.py)
    align_form: str = flag("alignment", "both")                     # or cosine, l1
    patch_weight: float = flag("alignment", 1.0)
    cls_weight: float = flag("alignment", 1.0)
    shuffle_targets: bool = flag("alignment", False)                # tokens of another image
    target: str = flag("alignment", "norm")                       # or prenorm: before the last norm
    standardize: bool = flag("alignment", True)                  # targets of mean 0 and deviation 1

    latent_scale: str = flag("latents", "channel")                  # or one, as in Stable Diffusion
    vae: str = flag("diffusion", None, "folder of the autoencoder "
                    "(default: OUT/align, else OUT/vae)")
    latents: str = flag("diffusion", None, "folder of stage latents (default: OUT/latents)")
    model: str = flag("diffusion", None, "SiT-B/2, DiT-XL/2 and the like")
    path: str = flag("diffusion", "linear", "SiT: from noise to data", ("linear", "gvp", "vp"))
    prediction: str = flag("diffusion", "velocity", "SiT: what it predicts",
                           ("velocity", "noise", "score"))
    loss_weight: str = flag("diffusion", None, "SiT: weight of noise and score",
                            ("velocity", "likelihood"))
    label_dropout: float = flag("diffusion", 0.1, "share of labels that are dropped, for guidance")
    ema: float = flag("diffusion", 0.9999, "decay of the averaged weights")


# The paper's README does not tell how its autoencoder was trained: vae and align are our choice,
# after Stable Diffusion's autoencoder and VA-VAE. Nobody has measured it at this size yet.
PRESETS = {
    "paper": {
        "all": dict(),
        "vae": dict(steps=200_000, batch_size=64),
        "align": dict(steps=200_000, batch_size=64),
        "latents": dict(batch_size=32),
        "sit": dict(steps=400_000, batch_size=256, model="SiT-XL/2"),
        "dit": dict(steps=400_000, batch_size=256, model="DiT-XL/2"),
    },
    "small": {
        "all": dict(image_size=32, workers=0, warmup=50, decay=0.05, channels=(8, 32, 48),
                    layers_per_block=1, norm_groups=8, latent_channels=8, perceptual_weight=0.0,
                    disc_weight=0.0, disc_start=0, align_weight=0.05, align_adaptive=False,
                    align_hidden=256, ema=0.997, log_every=25, save_every=250, sample_every=1000),
        "vae": dict(steps=1400, batch_size=16, lr=3e-3),
        "align": dict(steps=1400, batch_size=16, lr=3e-3),
        "latents": dict(batch_size=256),
        "sit": dict(steps=2400, batch_size=64, lr=2e-3, model="SiT-Ti/2"),
        "dit": dict(steps=2400, batch_size=64, lr=2e-3, model="DiT-Ti/2"),
    },
}
GROUPS = {                                                    # the settings that a stage depends on
    "vae": ("data", "training", "autoencoder"),
    "align": ("data", "training", "autoencoder", "alignment"),
    "latents": ("data", "latents"),
    "sit": ("data", "training", "diffusion"),
    "dit": ("data", "training", "diffusion"),
}


def parse_arguments(argv):
    """argv -> the settings that it gives, a dict; `stage` is a list."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop                                             # one line, without the usage
    groups, small = {}, PRESETS["small"]["all"]
    for field in dataclasses.fields(Config):
        group, text = field.metadata["group"], field.metadata["text"]
        if text is None:
            continue
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        options = dict(type=field.type, choices=field.metadata["choices"])
        if field.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        if field.type is tuple:
            options = dict(type=int, nargs="+")
        if field.name == "stage":
            options.update(nargs="+", required=True)
        if field.default is not None and field.type is not bool:
            also = f", small: {small[field.name]}" if field.name in small else ""
            text += f" (default: {field.default}{also})"
        groups[group].add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                                   help=text.replace("%", "%%"), **options)
    return vars(parser.parse_args(argv))


MOST = dict(seed=2 ** 63 - 1, image_size=2 ** 14, batch_size=2 ** 20, layers_per_block=64,
            workers=256)                                            # of all others 10^9


def resolve(stage, given):
    """The settings of a stage: those given, else the preset's, else Config's; stops at bad ones."""
    preset = PRESETS[given.get("preset", "paper")]
    cfg = Config(**{**preset["all"], **preset[stage], **given, "stage": stage})
    if not cfg.data and (stage in ("vae", "align", "latents") or not cfg.out):
        stop("--data: want a folder or .zip of images")
    cfg.channels = tuple(cfg.channels)
    cfg.out = cfg.out or f"runs/{Path(cfg.data).stem}"
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), "--" + field.name.replace("_", "-")
        least = 0 if field.name in ("seed", "workers", "warmup", "disc_start") else 1
        if field.type is int and value is not None and value < least:
            stop(f"{name} {value}: want at least {least}")
        if field.type is int and value is not None and value > MOST.get(field.name, 10 ** 9):
            stop(f"{name} {value}: want at most {MOST.get(field.name, 10 ** 9):,}")
        if field.type is tuple and value is not None and min(value) < 1:
            stop(f"{name} {min(value)}: want at least 1")
        if field.type is float and not 0 <= value < math.inf:
            stop(f"{name} {value}: want a number that is not negative")
        if field.name in ("decay", "ema", "label_dropout") and value > 1:
            stop(f"{name} {value}: want a share, at most 1")
    cfg.snapshots = cfg.snapshots or ()
    if stage in FAMILIES and max(cfg.snapshots, default=0) > cfg.steps:
        stop(f"--snapshots {max(cfg.snapshots)}: the run has {cfg.steps} steps, see --steps")
    if cfg.save_every % cfg.log_every:
        stop(f"--save-every {cfg.save_every} is not a multiple of --log-every {cfg.log_every}")
    if stage != "latents" and cfg.batch_size % (world_size * cfg.accumulate):
        stop(f"--batch-size {cfg.batch_size} is that of all processes together: it does not divide "
             f"by {world_size} (processes) x {cfg.accumulate} (--accumulate)")
    if cfg.freeze and (stage == "vae" or not cfg.init):
        stop("--freeze is for --stage align --init FOLDER: it keeps that autoencoder")
    if stage in FAMILIES:
        module, network = FAMILIES[stage]
        try:
            module.size_arguments(cfg.model, network.__name__)
        except ValueError as error:
            stop(error)
    if cfg.precision is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.precision = "bf16" if bf16 else "fp32"
    return cfg


# --------------------------------------------------------------------------------------------------
# Stages vae and align: L = L_mse + w_p L_lpips + w_kl L_kl + w_g a_g L_gan (+ w_a a_a L_align)
# a_g, a_a: ratios of gradients, vae.adaptive_weight (a_a is 1 with --no-align-adaptive)


def train_autoencoder(cfg):
    """Stages vae and align. The discriminator takes its step after the autoencoder, on the same
    images."""
    train_set, held_out = open_data(cfg)
    cfg, nets = new_autoencoder(cfg)
    weights = digests(init=cfg.init) | teacher_digest(cfg.teacher, nets.teacher)
    folder = begin(cfg, train_set.facts(), nets.autoencoder, **weights)
    if folder is None:
        return
    move_networks(cfg, nets, train_set)
    net, discriminator = nets.autoencoder, nets.discriminator
    # beta_2 is a choice of this project; the discriminator's pair is that of VQGAN's training
    opt = torch.optim.AdamW(net.parameters(), cfg.lr, (0.9, 0.99), weight_decay=cfg.weight_decay,
                            fused=True)
    kept, optimizers = dict(net=net, opt=opt), [opt]                # what a checkpoint holds
    if discriminator:
        d_opt = torch.optim.AdamW(discriminator.parameters(), cfg.lr, (0.5, 0.9), weight_decay=0.0,
                                  fused=True)
        kept.update(discriminator=discriminator, d_opt=d_opt)
        optimizers.append(d_opt)
    log = Log(cfg, folder)
    start = load_checkpoint(folder, kept, log)
    if cfg.compile:
        compile_autoencoder(net.vae)
    model, d_model = parallel(net), parallel(discriminator)
    if discriminator:
        discriminator.requires_grad_(False)                         # until its own turn in a step
    batches = load_batches(train_set, cfg, start)
    side = cfg.image_size // net.vae.factor
    shape = (cfg.batch_size, cfg.latent_channels, side, side)
    note_signals()
    bar = steps_left(cfg, start)
    for step in bar:
        log.start_clock()
        lr = set_learning_rate(cfg, step, *optimizers)
        x = to_float(next(batches)[0])                            # (b, 3, H, W), this process' rows
        rng = generator(cfg.seed, TRAINING, step, device=device)
        noise = own_rows(torch.randn(shape, generator=rng, device=device))  # (b, C, h, w)

        opt.zero_grad()
        reconstructions = []
        for rows in parts_of_batch(cfg, model):
            with autocast(cfg):
                loss, terms, rec = reconstruct_and_align(
                    cfg, nets, model, x[rows], noise[rows], step)
            (loss / cfg.accumulate).backward()
            reconstructions.append(rec)
            log.add(**terms)
        log.add(gradient=clip_gradient(net.parameters(), cfg.clip))
        opt.step()

        if "gan" in terms:                                          # from --disc-start on
            discriminator.requires_grad_(True)
            d_opt.zero_grad()
            for rows, rec in zip(parts_of_batch(cfg, d_model), reconstructions):
                with autocast(cfg):
                    d_loss = vae.hinge_d_loss(d_model(x[rows]), d_model(rec.detach()))
                (d_loss / cfg.accumulate).backward()
                log.add(discriminator=d_loss)
            log.add(discriminator_gradient=clip_gradient(discriminator.parameters(), cfg.clip))
            d_opt.step()
            discriminator.requires_grad_(False)

        stopping = asked_to_stop()                                  # a signal's number, or 0
        if due(step, cfg.log_every, cfg):
            bar.set_postfix(log.write(step + 1, lr))                # stops where one is not finite
        if due(step, cfg.save_every, cfg):
            log.line(step + 1, held_out_figures(cfg, nets, held_out))
        if due(step, cfg.sample_every, cfg):
            draw_reconstructions(net.vae, held_out, picture_of(folder, step + 1))
        if due(step, cfg.save_every, cfg) or stopping:
            save_checkpoint(folder, step + 1, kept, log)
        if stopping:
            sys.exit(128 + stopping)

    save_autoencoder(cfg, net.eval(), train_set, folder)
    finish(folder)


def reconstruct_and_align(cfg, nets, model, x, noise, step):
    """Loss of images x (n, 3, H, W), a part of the batch; its terms for the log; reconstructions.
    `model` is nets.autoencoder, perhaps in DDP."""
    rec, posterior, features = model(x, noise)                      # (n, 3, H, W), q(z | x), tokens
    loss, terms, net = 0.0, {}, nets.autoencoder
    if not cfg.freeze:
        loss, terms = vae.autoencoder_loss(
            x, rec, posterior, step=step, kl_weight=cfg.kl_weight,
            perceptual_weight=cfg.perceptual_weight, lpips=nets.lpips,
            disc_weight=cfg.disc_weight, disc_start=cfg.disc_start,
            discriminator=nets.discriminator, last_layer=net.vae.decoder.conv_out.weight)
    if nets.teacher:
        patch, cls = tokens_of(cfg, nets, x)                        # (n, T, D), (n, D)
        patch, cls = net.heads.standardize(patch, cls)
        if cfg.shuffle_targets:
            patch, cls = patch.roll(1, dims=0), cls.roll(1, dims=0)
        align_loss, cosines = align.align_loss(
            *features, patch, cls, cfg.align_form, cfg.patch_weight, cfg.cls_weight)
        weight = 1.0 if cfg.freeze else cfg.align_weight
        if cfg.align_adaptive and not cfg.freeze:
            weight = weight * vae.adaptive_weight(loss, align_loss, net.vae.encoder.conv_out.weight)
        loss = loss + weight * align_loss
        terms.update(align=align_loss, align_factor=weight, **cosines)
    return loss, terms, rec


class Autoencoder(nn.Module):
    """Autoencoder and MLPs in one module: DDP wants one forward that returns all that the loss
    needs. A frozen autoencoder only encodes."""

    def __init__(self, autoencoder, heads=None, frozen=False):
        super().__init__()
        self.vae, self.heads, self.frozen = autoencoder, heads, frozen

    def forward(self, x, noise):
        if self.frozen:
            with torch.no_grad():
                posterior = self.vae.encode(x).latent_dist
                z, rec = posterior.mean + posterior.std * noise, None
        else:
            rec, posterior, z = self.vae(x, noise)            # (b, 3, H, W), q(z | x), (b, C, h, w)
        features = self.heads(z) if self.heads else None            # (b, T, D), (b, D)
        return rec, posterior, features


def new_autoencoder(cfg):
    """cfg with the sizes of the autoencoder and of the teacher's grid, and the networks of stages
    vae and align: an object with autoencoder, teacher, lpips and discriminator, or None
    for what the stage does without."""
    torch.manual_seed(cfg.seed)
    try:
        if cfg.init:
            autoencoder = vae.AutoencoderKL.from_pretrained(cfg.init)
        else:
            autoencoder = vae.AutoencoderKL(
                block_out_channels=cfg.channels, layers_per_block=cfg.layers_per_block,
                norm_num_groups=cfg.norm_groups, latent_channels=cfg.latent_channels,
                sample_size=cfg.image_size)
    except (OSError, ValueError) as error:
        stop(error)
    cfg = dataclasses.replace(cfg, channels=tuple(autoencoder.config["block_out_channels"]),
                              layers_per_block=autoencoder.config["layers_per_block"],
                              norm_groups=autoencoder.config["norm_num_groups"],
                              latent_channels=autoencoder.config["latent_channels"])
    if cfg.image_size % autoencoder.factor:
        stop(f"--image-size {cfg.image_size} is not halved {len(cfg.channels) - 1} times without "
             "rest: see --channels")
    if cfg.freeze:
        autoencoder.requires_grad_(False)
    else:
        autoencoder.config.update(sample_size=cfg.image_size, latents_mean=None, latents_std=None)
    if cfg.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    net = Autoencoder(autoencoder, frozen=cfg.freeze)
    nets = SimpleNamespace(autoencoder=net, teacher=None, lpips=None, discriminator=None)
    if cfg.stage == "align":
        nets.teacher = load_teacher(cfg.teacher)
        patch_size, grid = nets.teacher.patch_size, cfg.image_size // autoencoder.factor
        cfg.teacher_size = cfg.teacher_size or (224 if patch_size == 14 else cfg.image_size)
        if cfg.teacher_size % patch_size:
            stop(f"--teacher-size {cfg.teacher_size}: want a multiple of the teacher's patches, "
                 f"{patch_size}")
        side = cfg.teacher_size // patch_size                       # tokens, a side
        cfg.fold = cfg.fold or max(1, grid // side)
        nets.autoencoder.heads = align.AlignmentHeads(
            cfg.latent_channels, nets.teacher.embed_dim, cfg.align_hidden, cfg.fold, cfg.pool,
            cfg.target, None if side * cfg.fold == grid else (side, side))
        if cfg.target == "prenorm":
            nets.autoencoder.heads.fit_norm(nets.teacher.norm)
    if cfg.disc_weight and not cfg.freeze:
        if cfg.image_size < 24:
            stop(f"--image-size {cfg.image_size}: the discriminator wants at least 24 pixels; "
                 "--disc-weight 0 does without it")
        nets.discriminator = vae.PatchDiscriminator()
    return cfg, nets


def tokens_of(cfg, nets, x):
    """The teacher's tokens of images x (b, 3, H, W): of patches (b, T, D), of the class (b, D)."""
    return align.teacher_tokens(nets.teacher, x, cfg.teacher_size, cfg.target)


def move_networks(cfg, nets, train_set):
    """The networks of stages vae and align on the device, ready to train, with LPIPS; the MLPs'
    targets measured on 2,048 images: every channel of the teacher's tokens is brought to mean 0 and
    deviation 1."""
    nets.autoencoder.to(device).train()
    nets.autoencoder.vae.train(not cfg.freeze)
    if cfg.perceptual_weight and not cfg.freeze:
        nets.lpips = first_on_node(vae.LPIPS.from_published).to(device)
    if nets.discriminator:
        nets.discriminator.to(device).train()
    if nets.teacher:
        nets.teacher.to(device)
        if cfg.standardize:
            batches = in_order(train_set, 64, spread(len(train_set), 2048))
            tokens = [tokens_of(cfg, nets, to_float(images)) for images, _ in batches]
            patch, cls = (torch.cat(part) for part in zip(*tokens))
            nets.autoencoder.heads.fit_statistics(patch, cls)


@torch.no_grad()
def held_out_figures(cfg, nets, held_out, count=256):
    """PSNR on held-out images, and cosines to the teacher where there is one."""
    sums, rows, net = {}, spread(len(held_out), count), nets.autoencoder
    for images, _ in in_order(held_out, 4, rows):
        x = to_float(images)
        z = net.vae.encode(x).latent_dist.mode()
        figures = {"held_out_psnr": vae.psnr(x, net.vae.decode(z).sample).mean()}
        if nets.teacher:
            target = net.heads.standardize(*tokens_of(cfg, nets, x))
            _, parts = align.align_loss(*net.heads(z), *target)
            figures.update(held_out_cos_patch=parts["cos_patch"], held_out_cos_cls=parts["cos_cls"])
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(x) / len(rows)
    return sums


@torch.no_grad()
def draw_reconstructions(autoencoder, held_out, path):
    """Up to 32 held-out images, each with its reconstruction to the right."""
    if rank > 0:
        return
    pairs = []
    for images, _ in in_order(held_out, 4, spread(len(held_out), 32)):
        z = autoencoder.encode(to_float(images)).latent_dist.mode()
        pairs.append(torch.stack([images, to_uint8(autoencoder.decode(z).sample).cpu()], dim=1))
    save_picture(tile(torch.cat(pairs).flatten(0, 1), per_row=8), path)


def save_autoencoder(cfg, net, train_set, folder):
    """The MLPs, if there are any, then the autoencoder: where that is, all is done."""
    if not cfg.freeze:
        keep_statistics(net.vae, train_set)
    if rank > 0:
        return
    if net.heads:
        write_json(net.heads.config, folder / "heads.json")
        save_safetensors(net.heads.state_dict(), folder / "heads.safetensors")
    net.vae.save_pretrained(folder)


@torch.no_grad()
def keep_statistics(autoencoder, data, count=16_384):
    """Mean and deviation of every channel of the latents, into the autoencoder's config, as
    diffusers has them."""
    rows = np.array_split(spread(len(data), count), world_size)[rank]
    posteriors = (autoencoder.encode(to_float(images)).latent_dist
                  for images, _ in in_order(data, 8, rows))
    batches = ((q.mean, q.std) for q in posteriors)                 # each (n, C, h, w)
    mean, std = mean_and_deviation(batches, autoencoder.config["latent_channels"])
    # diffusers applies both: its scale says nothing beside them
    autoencoder.config.update(latents_mean=mean.tolist(), latents_std=std.tolist(),
                              scaling_factor=1.0, shift_factor=None)


# --------------------------------------------------------------------------------------------------
# Stage latents: every training image encoded once


@torch.no_grad()
def encode_latents(cfg):
    """Stage latents: moments.npy (flips, images, 2C, h, w) float16 holds mean and std of q(z | x),
    labels.npy (images,), meta.json the mean and deviation of every channel of z, by which stages
    sit and dit and sample.py normalise."""
    source = find_autoencoder(cfg)
    digest, autoencoder = checksum(source), load_autoencoder(source).to(device)
    train_set, _ = open_data(cfg)
    folder = begin(cfg, train_set.facts(), autoencoder, vae=digest)
    if folder is None:
        return
    flips = 2 if cfg.flip else 1
    side = cfg.image_size // autoencoder.factor
    shape = (2 * autoencoder.config["latent_channels"], side, side)
    work = Rows(folder / "moments.npy", (flips, len(train_set)), {}, moments=(shape, np.float16),
                crc=((), np.uint32))
    batches = work.batches(cfg.batch_size)
    keys = [[(row % len(train_set), row >= len(train_set)) for row in rows.tolist()]
            for rows in batches]
    note_signals()
    with work.bar(f"latents {cfg.out}", batches) as bar:
        for rows, (images, _) in zip(batches, loader(train_set, keys, cfg.workers)):
            posterior = autoencoder.encode(to_float(images)).latent_dist
            moments = torch.cat([posterior.mean, posterior.std], dim=1).half()  # (n, 2C, h, w)
            if not moments.isfinite().all():
                stop(f"{source}: latents of images {rows[0]} to {rows[-1]} are not finite, or "
                     "beyond float16: is it damaged, or in half precision?")
            moments = moments.cpu().numpy()
            crc = np.array([zlib.crc32(row.tobytes()) for row in moments], np.uint32)
            work.put(rows, moments=moments, crc=crc)
            bar.update(len(rows))
            if signals:                     # each for itself: not all have as many batches
                work.flush()
                sys.exit(128 + max(signals))
    work.finish()
    mean, std = statistics(work.arrays["moments"], cfg.latent_scale)
    if rank == 0:
        os.replace(work.path("moments"), folder / "moments.npy")
        os.replace(work.path("crc"), folder / "crc.npy")
        with atomic_file(folder / "labels.npy") as file:
            np.save(file, train_set.labels.numpy())
        write_json(dict(autoencoder=digest, classes=list(train_set.classes),
                        mean=mean, std=std), folder / "meta.json")
        work.remove()
    finish(folder)


def statistics(moments, scale):
    """Mean and deviation of every channel of z, lists of C numbers, from moments (flips, images,
    2C, h, w). Scale "one": no mean and one deviation for all, as Stable Diffusion has it."""
    moments = moments.reshape(-1, *moments.shape[2:])               # (M, 2C, h, w)
    blocks = np.array_split(np.arange(len(moments)), max(1, len(moments) // 256))
    batches = (torch.from_numpy(moments[rows]).chunk(2, dim=1)      # each (m, C, h, w)
               for rows in blocks[rank::world_size])
    mean, deviation = mean_and_deviation(batches, moments.shape[1] // 2)
    if scale == "one":
        whole = np.sqrt((deviation ** 2 + mean ** 2).mean() - mean.mean() ** 2)
        mean, deviation = 0 * mean, 0 * deviation + whole
    return mean.tolist(), deviation.tolist()


def mean_and_deviation(batches, channels):
    """Of every channel of z, arrays (C,), from batches of (mean, std) of q(z | x), each
    (n, C, h, w), of all processes: Var z = Var mean + E std^2, without drawing any z."""
    sums = torch.zeros(4, channels, dtype=torch.float64)
    for mean, std in batches:
        mean = mean.double()                                        # the squares need its digits
        std = std.double()
        powers = torch.stack([torch.ones_like(mean), mean, mean ** 2, std ** 2])
        sums += powers.sum((1, 3, 4)).cpu()                         # (4, C)
    if world_size > 1:
        dist.all_reduce(sums := sums.to(device))
    count, first, second, noise = sums.cpu().numpy()                # each (C,)
    mean = first / count
    of_means = (second / count - mean ** 2).clip(0)                 # rounding may go below
    return mean, np.sqrt(of_means + noise / count)


class Latents:
    """What stage latents wrote, as a data set: moments of q(z | x) and labels."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        if not (folder / "meta.json").is_file():
            stop(f"{folder}/meta.json not found: run train.py --stage latents --out "
                 f"{folder.parent} first")
        meta = read_json(folder / "meta.json")
        try:
            self.moments = np.load(folder / "moments.npy", mmap_mode="r")
            self.crc = np.load(folder / "crc.npy")                  # (flips, images)
            self.labels = torch.from_numpy(np.load(folder / "labels.npy"))
        except (OSError, ValueError) as error:
            stop(f"{folder} is damaged ({error}): run stage latents again with another --out")
        self.classes, self.autoencoder, self.mean, self.std = (
            meta[name] for name in ("classes", "autoencoder", "mean", "std"))
        shape, channels = self.moments.shape, 2 * len(self.mean)
        fits = len(shape) == 5 and shape[2] == channels == 2 * len(self.std)
        if not fits or self.crc.shape != shape[:2] or self.labels.shape != shape[1:2]:
            stop(f"{folder} is damaged (its arrays do not fit together): run stage latents again "
                 "with another --out")
        self.flip = len(self.moments) == 2

    def facts(self):
        return dict(images=len(self), classes=self.classes, latents_mean=self.mean,
                    latents_std=self.std)

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, keys):
        """keys: list of (index, flipped) -> moments (n, 2C, h, w), labels (n,)."""
        index, flipped = np.array(keys, dtype=int).T
        moments = self.moments[flipped, index]
        for row, crc, number in zip(moments, self.crc[flipped, index], index):
            if zlib.crc32(row.tobytes()) != crc:
                raise DataError(f"{self.folder}/moments.npy is damaged at image {number}: run "
                                "stage latents again with another --out")
        moments = torch.from_numpy(moments)
        return moments.to(torch.get_default_dtype()), self.labels[index]


# --------------------------------------------------------------------------------------------------
# Stages sit and dit: the diffusion transformer. Nothing here knows whether the latents are aligned


def train_diffusion(cfg):
    """Stages sit and dit."""
    cfg, latents, autoencoder = open_latents(cfg)
    module, _ = FAMILIES[cfg.stage]
    net, config = new_transformer(cfg, latents)
    folder = begin(cfg, latents.facts(), net, autoencoder=latents.autoencoder)
    if folder is None:
        return
    if rank == 0:
        write_json(config, folder / "config.json")
    net.to(device).train()
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    opt = torch.optim.AdamW(net.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    kept = dict(net=net, ema=ema, opt=opt)                          # what a checkpoint holds
    log = Log(cfg, folder)
    start = load_checkpoint(folder, kept, log)
    if cfg.compile:
        net.compile()
    model = parallel(net)
    batches = load_batches(latents, cfg, start)
    channel_mean, channel_std = autoencoder.statistics(torch.zeros((), device=device))
    shape = (cfg.batch_size, net.in_channels, net.input_size, net.input_size)
    note_signals()
    bar = steps_left(cfg, start)
    for step in bar:
        log.start_clock()
        lr = set_learning_rate(cfg, step, opt)
        moments, y = next(batches)                                  # (b, 2C, h, w), (b,)
        moments, y = (part.to(device, non_blocking=True) for part in (moments, y))
        mean, std = moments.chunk(2, dim=1)                         # (b, C, h, w)
        rng = generator(cfg.seed, TRAINING, step, device=device)
        noise = own_rows(torch.randn(shape, generator=rng, device=device))
        eps = own_rows(torch.randn(shape, generator=rng, device=device))
        u = own_rows(torch.rand(cfg.batch_size, generator=rng, device=device))
        drop = u < cfg.label_dropout                                # (b,)
        t = own_rows(draw_times(cfg, rng))                          # (b,)
        z = mean + std * noise                                      # a fresh sample of q(z | image)
        x = (z - channel_mean) / channel_std

        opt.zero_grad()
        for rows in parts_of_batch(cfg, model):
            with autocast(cfg):
                loss = module.training_loss(model, x[rows], y[rows], t=t[rows], eps=eps[rows],
                                            drop=drop[rows], **objective(cfg)).mean()
            (loss / cfg.accumulate).backward()
            log.add(loss=loss)
        log.add(gradient=clip_gradient(net.parameters(), cfg.clip))
        opt.step()
        update_average(ema, net, cfg.ema)

        stopping = asked_to_stop()                                  # a signal's number, or 0
        if due(step, cfg.log_every, cfg):
            bar.set_postfix(log.write(step + 1, lr))                # stops where one is not finite
        if due(step, cfg.sample_every, cfg):
            draw_samples(cfg, ema, autoencoder, picture_of(folder, step + 1))
        if step + 1 in cfg.snapshots and rank == 0:
            save_safetensors(ema.state_dict(), snapshot_of(folder, step + 1))
        if due(step, cfg.save_every, cfg) or stopping:
            save_checkpoint(folder, step + 1, kept, log)
        if stopping:
            sys.exit(128 + stopping)

    if rank == 0:
        save_safetensors(ema.state_dict(), folder / "ema.safetensors")     # last: now all is done
    finish(folder)


def open_latents(cfg):
    """cfg with what is noted of the latents, the latents, and the autoencoder that they are of,
    which normalises by their statistics. Stops where they do not belong together."""
    source, latents = find_autoencoder(cfg), Latents(cfg.latents or Path(cfg.out) / "latents")
    if latents.autoencoder != checksum(source):
        stop(f"{latents.folder} was encoded by another autoencoder than {source}: run stage "
             "latents with another --out")
    autoencoder = load_autoencoder(source).to(device)
    autoencoder.config.update(latents_mean=latents.mean, latents_std=latents.std)
    latents.flip = latents.flip and cfg.flip
    side = latents.moments.shape[-1] * autoencoder.factor
    cfg = dataclasses.replace(cfg, vae=str(source), flip=latents.flip, image_size=side)
    return cfg, latents, autoencoder


def snapshot_of(folder, step):
    """The file of the averaged weights that a stage had at a step."""
    return folder / f"ema-{step:07}.safetensors"


def picture_of(folder, step):
    """The picture that a stage draws after a step."""
    return folder / "samples" / f"step-{step:07}.png"


def new_transformer(cfg, latents):
    """The transformer of stages sit and dit, and its arguments."""
    module, network = FAMILIES[cfg.stage]
    torch.manual_seed(cfg.seed)
    try:
        config = dict(
            module.size_arguments(cfg.model, network.__name__),
            input_size=latents.moments.shape[-1], in_channels=latents.moments.shape[2] // 2,
            num_classes=len(latents.classes), class_dropout_prob=cfg.label_dropout,
            learn_sigma=cfg.stage == "dit")
        net = network(**config)
    except ValueError as error:
        stop(error)
    if cfg.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    return net, config


def draw_times(cfg, rng):
    """Times (B,): of SiT uniform between noise and data, of DiT one of its 1,000 steps."""
    if cfg.stage == "dit":
        return torch.randint(1000, (cfg.batch_size,), generator=rng, device=device)
    t0, t1 = sit.time_interval(cfg.path, cfg.prediction, training=True)
    return t0 + (t1 - t0) * torch.rand(cfg.batch_size, generator=rng, device=device)


def objective(cfg):
    """What the training loss is told of the path from noise to data; DiT has one only."""
    if cfg.stage == "dit":
        return {}
    return dict(path=cfg.path, prediction=cfg.prediction, weight=cfg.loss_weight)


@torch.no_grad()
def update_average(ema, net, decay):
    """ema <- decay ema + (1 - decay) net."""
    for average, weight in zip(ema.parameters(), net.parameters()):
        average.lerp_(weight, 1 - decay)


@torch.no_grad()
def draw_samples(cfg, ema, autoencoder, path):
    """Eight samples of each of up to ten classes, a row a class, by the average of the weights,
    without guidance."""
    if rank > 0:
        return
    y = torch.arange(min(ema.num_classes, 10), device=device).repeat_interleave(8)
    shape = (len(y), ema.in_channels, ema.input_size, ema.input_size)
    eps = torch.randn(shape, generator=generator(cfg.seed, PREVIEW)).to(device)
    if cfg.stage == "sit":
        x = sit.sample(ema, eps, y, "heun", 10, path=cfg.path, prediction=cfg.prediction)
    else:
        x = dit.sample(ema, eps, y, "ddim", 50)
    save_picture(tile(to_uint8(decode(autoencoder, x)).cpu(), per_row=8), path)


# --------------------------------------------------------------------------------------------------
# Pieces of a loop


def set_learning_rate(cfg, step, *optimizers):
    """Linear warm-up, then a cosine from lr to lr * decay, for all these optimisers; returns it."""
    share = max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    cosine = cfg.decay + (1 - cfg.decay) * 0.5 * (1 + math.cos(math.pi * share))
    lr = cfg.lr * min(1.0, (step + 1) / (cfg.warmup + 1)) * cosine
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    return lr


TRAINING, PREVIEW = 1, 2                                            # what is drawn, in a key


def generator(*key, device="cpu"):
    """A torch.Generator that is a function of the integers of its key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


def own_rows(x):
    """This process' rows of what was drawn for all: so N processes train as one does."""
    share = len(x) // world_size
    return x[rank * share:(rank + 1) * share]


def autocast(cfg):
    """The forward pass in bfloat16 with --precision bf16; weights, gradients and optimiser are
    float32 anyway."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")


def parts_of_batch(cfg, model):
    """Rows of each of the --accumulate parts of this process' batch. Only with the last part DDP
    averages the gradients over the processes."""
    size = cfg.batch_size // world_size // cfg.accumulate
    for i in range(cfg.accumulate):
        alone = isinstance(model, DDP) and i < cfg.accumulate - 1
        with model.no_sync() if alone else contextlib.nullcontext():    # until the next is wanted
            yield slice(i * size, (i + 1) * size)


def clip_gradient(parameters, limit):
    """Norm of the gradient of the parameters, which becomes at most the limit; 0: no limit."""
    return nn.utils.clip_grad_norm_(parameters, limit or math.inf)


def parallel(net):
    """The network to call in training: it averages its gradients over all processes."""
    return DDP(net) if net is not None and world_size > 1 else net


def compile_autoencoder(autoencoder):
    """In place; no loss is in it. Nor the decoder's last layer, where the gradient ends that weighs
    the GAN: a backward pass that was compiled to be gone through once a step refuses a second."""
    autoencoder.encoder.compile()
    autoencoder.decoder.features = torch.compile(autoencoder.decoder.features)


def due(step, every, cfg):
    """Whether what happens every so many steps, and at the end, happens after this step."""
    return (step + 1) % every == 0 or step + 1 == cfg.steps


def steps_left(cfg, start):
    """The steps that are left, with a bar."""
    bars[:] = [tqdm(range(start, cfg.steps), f"{cfg.stage} {cfg.out}", cfg.steps, initial=start,
                    unit="step", leave=False, disable=rank > 0, position=BAR, mininterval=INTERVAL)]
    return bars[0]


RSS_UNIT = 1 if sys.platform == "darwin" else 1024                  # bytes, of ru_maxrss


class Log:
    """Means of what the steps tell, a line of log.jsonl every --log-every steps. The sums stay on
    the device, so that a step does not wait for it; a checkpoint holds them, so that a run which
    goes on writes the same lines."""

    def __init__(self, cfg, folder):
        self.path, self.every, self.batch_size = folder / "log.jsonl", cfg.log_every, cfg.batch_size
        self.sums, self.clock, self.steps = {}, None, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)              # of the stage before

    def start_clock(self):
        """Time runs from here to the next line; what comes after that, pictures for example, does
        not count."""
        self.clock = self.clock or time.perf_counter()
        self.steps += 1

    def add(self, **scalars):
        for name, value in scalars.items():
            if not torch.is_tensor(value):
                value = torch.full((), value, device=device)        # as_tensor would wait for a GPU
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value.detach().double(), count + 1

    def totals(self):
        """{name: (sum, count)} over all processes, as numbers. Stops where one is not finite."""
        names = sorted(self.sums)                                   # in the same order everywhere
        totals = torch.tensor([[float(value) for value in self.sums[name]] for name in names],
                              dtype=torch.float64)
        if world_size > 1:
            dist.all_reduce(totals, group=cpu_group)
        totals = dict(zip(names, totals.tolist()))
        for name in self.sums:                                      # the losses before the gradient
            if not math.isfinite(totals[name][0]):
                path = self.path.with_name("checkpoint.pt")
                good = "there is no checkpoint yet"
                if path.is_file():
                    good = f"the last good checkpoint is {path}"
                stop(f"{self.path.parent}: {name} is not finite in the last {self.every} steps; "
                     f"{good}; begin anew with a smaller --lr, --clip 1 or --precision fp32, and "
                     "another --out")
        return {name: tuple(totals[name]) for name in self.sums}

    def write(self, step, lr):
        """The line of a step; returns its means, for the bar."""
        totals = self.totals()                                      # waits for the device
        means = {name: float(f"{total / count:.6g}") for name, (total, count) in totals.items()}
        seconds = time.perf_counter() - self.clock
        memory = (torch.cuda.max_memory_allocated(device) if device.type == "cuda"
                  else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT)
        speed = dict(images_per_second=self.steps * self.batch_size / seconds,
                     peak_memory_gib=memory / 2 ** 30)
        self.line(step, {**means, "lr": lr, **speed})
        self.sums, self.clock, self.steps = {}, None, 0
        return means

    def line(self, step, figures):
        if rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **figures}, allow_nan=False) + "\n")

    def go_on(self, step, totals, processes):
        """Take the sums of a checkpoint that so many processes wrote; lines that came after it will
        come again."""
        if rank > 0:
            return
        share = world_size / processes                              # a step counts once a process
        self.sums = {name: (total * share, count * share)
                     for name, (total, count) in totals.items()}
        text = self.path.read_text(errors="replace") if self.path.is_file() else ""
        lines = text.splitlines(keepends=True)
        kept, reached, damaged = [], 0, 0
        for line in lines:
            try:
                at = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                damaged += line.endswith("\n")                      # a kill cuts the last line off
                continue
            if at <= step and line.endswith("\n"):
                kept.append(line)
                reached = max(reached, at)
        if damaged or reached < step // self.every * self.every:
            say(f"{self.path} is damaged: {damaged} lines cannot be read, the last is of step "
                f"{reached} of {step}; what can be read is kept")
        with atomic_file(self.path) as file:
            file.write("".join(kept).encode())


def save_checkpoint(folder, step, kept, log):
    """checkpoint.pt, whole or not at all; the one before becomes previous.pt."""
    totals = log.totals()
    if rank == 0:
        path = folder / "checkpoint.pt"
        states = {name: part.state_dict() for name, part in kept.items()}
        try:
            with atomic_file(path) as file:
                torch.save({"step": step, "log": totals, "processes": world_size, **states}, file)
                file.flush()
                os.fsync(file.fileno())                             # before the last one goes
                if path.is_file():
                    os.replace(path, folder / "previous.pt")
        except (OSError, RuntimeError):                             # torch wraps what it meets
            free = shutil.disk_usage(folder).free
            stop(f"{path} cannot be written at step {step} ({free:,} bytes are free there): make "
                 "room; the same command goes on from the one before")
    barrier()


def load_checkpoint(folder, kept, log):
    """Fill `kept` from checkpoint.pt, or from the one before where that is damaged; returns the
    steps done. Stops where other processes find other ones."""
    if rank == 0:
        for leftover in folder.glob(".*.tmp"):                      # of a save that was killed
            leftover.unlink()
    state = {"step": 0, "log": {}, "processes": world_size}         # killed before it saved
    paths = [path for path in (folder / "checkpoint.pt", folder / "previous.pt") if path.is_file()]
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():                   # torch.load looks at no checksum
                    raise ValueError(f"the checksum of {damaged} is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True)
            break
        except Exception as error:                             # damaged bytes raise almost anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if "weights_only" in str(error):                        # torch's page of advice
                reason = "it holds more than numbers"
            say(f"{path} is damaged ({reason}): it is passed over")
    else:
        if paths:
            stop(f"{folder} has no checkpoint that can be read: move {folder} away to begin anew")
    for name, part in kept.items() if paths else ():
        part.load_state_dict(state[name])
    log.go_on(state["step"], state["log"], state["processes"])
    least_most = torch.tensor([-state["step"], state["step"]])
    if world_size > 1:
        dist.all_reduce(least_most, dist.ReduceOp.MAX, group=cpu_group)
    if least_most.sum():
        stop(f"{folder} has step {-least_most[0]} for one process and {least_most[1]} for another: "
             "want one folder that all machines see")
    return state["step"]


# --------------------------------------------------------------------------------------------------
# Images

HELD_OUT = ("val", "valid", "validation", "test")


class DataError(Exception):
    """Data that the user has to mend; its message is one line."""


def center_crop(image, size):
    """ADM's centre crop, as in DiT and SiT: halve by box filter while possible, then bicubic;
    (size, size, 3) uint8."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    return middle_square(image, size, Image.BICUBIC)


def middle_square(image, size, resample):
    """The middle of an image whose short side becomes `size`: an array (size, size, ...)."""
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if scale > 1 and max(image.size) > 16 * min(image.size):
        # a strip: all of 1 x 1,000,000 pixels took 2.7 GiB as 16 x 16,000,000
        x, y = image.width / width, image.height / height
        box = left * x, top * y, (left + size) * x, (top + size) * y
        return np.array(image.resize((size, size), resample, box))
    image = image.resize((width, height), resample)
    return np.array(image)[top:top + size, left:left + size]


class ImageFolder:
    """Images of a folder or .zip as a data set: train/CLASS/* and val/CLASS/* (or valid,
    validation, test), or CLASS/* or train/CLASS/* alone, of which every 20th image is held out;
    without class folders all images are one class. A folder around all of them is looked through.
    `split` is "train", "test" (what is held out) or "all".

    Classes are numbered in sorted order, as torchvision does. Raises DataError for what cannot be
    used. """

    def __init__(self, path, split, size, flip=True):
        self.path, self.size, self.flip = Path(path), size, flip
        if not self.path.is_dir() and not zipfile.is_zipfile(self.path):
            raise DataError(f"--data {path} is no folder and no .zip: give one with a folder of "
                            "images for every class")
        try:
            images, self.entries, others = list_images(self.path)
        except (OSError, ValueError) as error:
            raise DataError(f"--data {error}") from None
        around, splits = find_splits(images)
        held_out = next((splits[name] for name in HELD_OUT if name in splits), None)
        whole = splits.get("train", around)
        self.classes, files = by_class_folder(images, whole, self.path.stem)
        if held_out:
            classes, test = by_class_folder(images, held_out, self.path.stem)
            if classes != self.classes:
                other = sorted(set(classes) ^ set(self.classes))[:3]
                raise DataError(f"--data {path}: {whole} and {held_out} have other classes, "
                                f"{other}: give both the same class folders")
            self.splits = {"train": files, "test": test, "all": files + test}
        else:
            train = [file for i, file in enumerate(files) if i % 20 or len(files) == 1]
            self.splits = {"train": train, "test": files[::20], "all": files}
        self.passed_over = others + len(images) - len(self.splits["all"])
        self.take(split)

    def take(self, split):
        self.files = self.splits[split]
        self.labels = torch.tensor([label for _, label in self.files])

    def other(self, split):
        """The same data, another split of it: what is on disk is listed once."""
        data = copy.copy(self)
        data.take(split)
        return data

    def __len__(self):
        return len(self.files)

    def facts(self):
        """What a stage notes of its data: moved elsewhere, it is the same."""
        digest = hashlib.sha256("\n".join(name for name, _ in self.files).encode()).hexdigest()
        return dict(images=len(self), classes=list(self.classes), files=digest)

    def image(self, index):
        """Image (size, size, 3) uint8 of a file."""
        name, _ = self.files[index]
        try:
            image = read_rgb(read_file(self.path, name, self.entries))
            return center_crop(image, self.size)                    # (size, size, 3)
        except Exception as error:                                  # Pillow raises many kinds
            raise DataError(f"{self.path}: {name} cannot be read ({error}): mend or remove it"
                            ) from None

    def __getitems__(self, keys):
        """keys: list of (index, flipped) -> images (n, 3, size, size) uint8, labels (n,)."""
        images = [self.image(index)[:, ::-1] if flipped else self.image(index)
                  for index, flipped in keys]
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return images, self.labels[torch.tensor([index for index, _ in keys])]


def find_splits(images):
    """The folder around all images ("" or "NAME/"), and {"train": prefix, "val": prefix, ...} of
    the splits in it."""
    around = ""
    while True:
        tops = {name[len(around):].split("/")[0] for name in images}
        splits = {top.lower(): f"{around}{top}/" for top in tops
                  if top.lower() in ("train", *HELD_OUT)}
        if "train" in splits:
            return around, splits
        # one folder around everything is looked through, unless it is the one class that there is
        only = next(iter(tops))
        if len(tops) > 1 or not any(name[len(around):].count("/") > 1 for name in images):
            return around, {}
        around += f"{only}/"


def by_class_folder(images, prefix, name):
    """Names of the classes below a prefix, and [(image, label)]; where there is no class folder,
    one class."""
    inside = [image for image in images if image.startswith(prefix)]
    start = len(prefix)
    folders = [image[start:image.index("/", start)] if "/" in image[start:] else None
               for image in inside]
    classes = tuple(sorted(set(folders) - {None}))
    if not classes:
        return (name,), [(image, 0) for image in inside]
    number = {folder: label for label, folder in enumerate(classes)}
    files = [(image, number[folder]) for image, folder in zip(inside, folders) if folder]
    return classes, sorted(files, key=lambda file: file[1])         # images are sorted already


def open_data(cfg):
    """Training images and held-out ones, and a line that says what they are."""
    if Path(cfg.out).resolve().is_relative_to(Path(cfg.data).resolve()):
        stop(f"--out {cfg.out} lies inside --data {cfg.data}: its pictures would be trained on; "
             "choose another --out")
    train_set = ImageFolder(cfg.data, "train", cfg.image_size, cfg.flip)
    held_out = train_set.other("test")
    classes = train_set.classes
    names = ", ".join((*classes[:3], *["..."][:len(classes) - 3]))
    say(f"{cfg.data}: {len(train_set):,} images of {len(classes)} classes ({names}); "
        f"{len(held_out):,} held out; files passed over: {train_set.passed_over}")
    return train_set, held_out


def loader(data, keys, workers):
    """Batches of a data set, one for each list of keys [(index, flipped), ...]."""
    # Python 3.14 would begin workers from nothing, each with a copy of all latents
    context = "fork" if workers and sys.platform == "linux" else None
    return iter(DataLoader(data, batch_sampler=keys, num_workers=workers, collate_fn=as_it_is,
                           worker_init_fn=ignore_signals, pin_memory=device.type == "cuda",
                           multiprocessing_context=context))


def as_it_is(batch):
    """The data sets here return whole batches."""
    return batch


def ignore_signals(worker):
    """Ctrl-C and SIGTERM may come to the loader's processes too; they are for the one that these
    work for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def load_batches(data, cfg, start):
    """This process' batches from a step on. All batches are slices of shuffled epochs laid end to
    end."""
    return loader(data, keys_of_steps(len(data), data.flip, cfg, start), cfg.workers)


def keys_of_steps(count, flip, cfg, start):
    """Keys [(index, flipped), ...] of this process' rows of each step that is left."""
    share, epoch = cfg.batch_size // world_size, None
    for step in range(start, cfg.steps):
        keys, first = [], step * cfg.batch_size + rank * share
        for position in range(first, first + share):
            if position // count != epoch:
                epoch = position // count
                rng = np.random.default_rng([cfg.seed, epoch])
                order, flipped = rng.permutation(count), rng.random(count) < 0.5
            index = int(order[position % count])
            keys.append((index, bool(flipped[index]) and flip))
        yield keys


def in_order(data, batch_size, indices=None):
    """Images (n, 3, H, W) and labels (n,), unflipped and in order, of all or of some."""
    indices = range(len(data)) if indices is None else indices
    for start in range(0, len(indices), batch_size):
        yield data.__getitems__([(int(i), False) for i in indices[start:start + batch_size]])


def spread(count, most):
    """At most so many of the numbers below count, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def to_float(images):
    """uint8 images -> floats in [-1, 1], on the device."""
    return images.to(device, non_blocking=True).to(torch.get_default_dtype()) / 127.5 - 1


def to_uint8(x):
    """Images in [-1, 1] -> uint8, by rounding. Raises DataError where they are not finite."""
    if not x.isfinite().all():                                      # they would be black
        raise DataError("images are not finite: it diverged, or the weights are damaged")
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def decode(autoencoder, x):
    """Images (N, 3, H, W) in about [-1, 1] of normalised latents x (N, C, h, w), a few at once."""
    return torch.cat([autoencoder.decode(autoencoder.denormalize(part)).sample
                      for part in x.split(at_once(x.shape[-1] * autoencoder.factor))])


def at_once(side):
    """How many images of so many pixels a side go through an autoencoder at once: as many as have
    2^16 pixels, which was fastest on a CPU, or on a GPU 2^20."""
    return max(1, (2 ** 20 if device.type == "cuda" else 2 ** 16) // side ** 2)


def tile(images, per_row, gap=2):
    """PIL image of images (N, 3, H, W) uint8, a row after the other, small ones enlarged to 64
    pixels."""
    enlarge = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    N, _, H, W = images.shape
    rows, columns = math.ceil(N / per_row), min(N, per_row)
    page = np.full((rows * (H + gap), columns * (W + gap), 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = i // per_row * (H + gap), i % per_row * (W + gap)
        page[top:top + H, left:left + W] = image
    return Image.fromarray(page)


def save_picture(picture, path):
    """Write a PIL picture as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


# --------------------------------------------------------------------------------------------------
# Folders of stages, and what one stage hands to the next


LAST = {"vae": "config.json", "align": "config.json", "latents": "meta.json",
        "sit": "ema.safetensors", "dit": "ema.safetensors"}         # what a stage writes last


def begin(cfg, data, net, **facts):
    """OUT/STAGE, marked as that of a run of these settings; None where nothing is left to do: it is
    done already, or --dry-run only asks. Stops where the folder is that of another run, or another
    process works in it.

    `data` is what is known of the data, `facts` what else the weights depend on. """
    folder = Path(cfg.out) / cfg.stage
    settings = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)
                if field.metadata["group"] in GROUPS[cfg.stage]}
    settings.update(stage=cfg.stage, precision=cfg.precision, **data, **facts)
    settings = json.loads(json.dumps(settings))                     # as they are read back
    # moved elsewhere, they are the same: their sha256 or statistics count
    moved = {"latents", *({"init"} if "init_weights" in facts else ()),
             *({"vae"} if "autoencoder" in facts else ()),
             *({"teacher"} if "teacher_weights" in facts else ())}
    path = folder / "settings.json"
    before = read_json(path) if path.is_file() else settings
    # with a constant rate, more steps go on where fewer ended; a cosine would have been another
    longer = cfg.stage in FAMILIES and cfg.steps > before.get("steps", cfg.steps)
    for name, value in settings.items():
        if name not in moved and before.get(name) != value and not (
                name == "steps" and longer and cfg.decay == 1):
            why = ("" if name != "steps" or not longer else
                   ", and its rate falls towards the last: other steps are another training")
            stop(f"{folder} holds a run with {name} = {str(before.get(name))[:60]}, not "
                 f"{str(value)[:60]}{why}: choose another --out")
    ended = (folder / LAST[cfg.stage]).is_file()
    done = ended and not longer
    if ended and longer and not (folder / "checkpoint.pt").is_file():
        stop(f"{folder} has no checkpoint.pt any more, from which {cfg.steps} steps could go on: "
             "choose another --out")
    if done:
        say(f"{folder} is done already")
    elif cfg.dry_run:
        count = sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6
        say(f"stage {cfg.stage}: {count:,.1f} M parameters, {world_size} processes; would write "
            f"{folder}/{LAST[cfg.stage]} and what is beside it:\n{json.dumps(settings, indent=2)}")
    if done or cfg.dry_run:
        return None
    barrier()
    try:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
            if ended and longer:                                    # it is not the end any more
                os.replace(folder / LAST[cfg.stage], snapshot_of(folder, before["steps"]))
            write_json(settings, path)
    except OSError as error:
        stop(f"--out {cfg.out}: {error.filename} cannot be written ({error.strerror}): choose "
             "another place")
    barrier()
    return folder


locks = []


def lock(folder):
    """Hold a folder until this process ends, however it ends; stops where another one holds it."""
    locks.append(open(folder / ".lock", "w"))
    try:
        # not flock: a loader's processes would inherit it, and outlive a killed one for seconds
        fcntl.lockf(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):                      # POSIX allows either
        stop(f"another process works in {folder}: wait for it, stop it, or choose another --out")
    except OSError:                                                 # a file system without locks
        say(f"{folder} cannot be locked: start no second run there")


def finish(folder):
    """Say that a stage is done, when all processes are."""
    barrier()
    log, figures = folder / "log.jsonl", {}
    for line in log.read_text().splitlines()[-2:] if log.is_file() else ():
        figures.update(json.loads(line))
    said = ", ".join(f"{name} {value:.6g}" for name, value in figures.items())
    say(f"{folder} is done" + (f": {said}" if said else ""))


def digests(**paths):
    """sha256 of the weights that a stage begins with, as far as they are files here."""
    return {f"{name}_weights": checksum(path) for name, path in paths.items()
            if path and Path(path).exists()}


def teacher_digest(name, teacher):
    """What tells a teacher from others of its name: sha256 of its file, or of the weights (not the
    code) that a function has given it; those of a published name are known. {} without one."""
    facts = digests(teacher=teacher and name)
    if teacher and not facts and name not in align.DINOV2:
        facts = {"teacher_state": state_digest(teacher)}
    return facts


def state_digest(net):
    """sha256 of a network's weights, names and shapes."""
    digest = hashlib.sha256()
    for key, value in net.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)}".encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def checksum(path):
    """sha256 of a file of weights, or of those in the folder of an autoencoder or teacher; stops
    where there are none."""
    path = Path(path)
    teacher = path / "dinov2.pth"
    try:
        files = [path] if path.is_file() else [teacher] if teacher.is_file() else (
            vae.weights_files(path))
    except (OSError, ValueError) as error:
        stop(error)
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            hashlib.file_digest(opened, lambda: digest)             # one digest of all
    return digest.hexdigest()


def write_json(value, path):
    """Write JSON, whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


class Written(dict):
    """What a file of JSON holds; a name that is not there is a damage of the file."""
    path = None

    def __missing__(self, name):
        raise DataError(f"{self.path} is damaged: it has no {name!r}; move it away, and run again "
                        "what wrote it")


def read_json(path):
    """The dict that write_json wrote; stops where it is damaged."""
    try:
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            written = Written(value)
            written.path = path
            return written
        error = "it holds no names"
    except (ValueError, OSError, RecursionError) as caught:
        error = caught
    stop(f"{path} is damaged ({error}): move it away, and run again what wrote it")


def build(network, path):
    """network(...) of the arguments in a file of JSON; stops where they are none."""
    try:
        return network(**read_json(path))
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:     # also absurd sizes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        stop(f"{path} is damaged ({reason}): move it away, and run again what wrote it")


def autoencoder_folder(out):
    """The folder of a run's autoencoder: OUT/align where there is one, else OUT/vae."""
    return out / ("align" if (out / "align" / "config.json").is_file() else "vae")


def find_autoencoder(cfg):
    """The folder of the autoencoder of stages latents, sit and dit; stops where there is none."""
    folder = Path(cfg.vae) if cfg.vae else autoencoder_folder(Path(cfg.out))
    if not (folder / "config.json").is_file():
        stop(f"{folder}/config.json not found: run train.py --stage vae or align --out {cfg.out} "
             "first, or give --vae")
    return folder


def load_autoencoder(folder):
    """An autoencoder from a folder of diffusers' layout; stops where there is none."""
    try:
        return vae.AutoencoderKL.from_pretrained(folder)
    except (OSError, ValueError) as error:
        stop(error)


def load_teacher(name):
    """The frozen teacher, as align.load_teacher has it; stops with one line where there is none."""
    return first_on_node(lambda: align.load_teacher(name), f"--teacher {name}: ")


class Rows:
    """Arrays on disk of which every process fills some rows, in a hidden folder beside `out`, with
    a mark for every row that is done: a killed program goes on from there.

    shape: rows, in one or more dimensions; put() counts them through. arrays: name=(shape of a row,
    dtype). options: what else the rows depend on; stops where the folder holds rows of others. All
    the disk space is taken at once, so that a full disk shows before any work. """

    def __init__(self, out, shape, options, **arrays):
        self.folder = self.folder_of(out)
        path, arrays = self.folder / "options.json", dict(arrays, done=((), bool))
        options = {**options, "arrays": {name: [*shape, *row, np.dtype(dtype).name]
                                         for name, (row, dtype) in arrays.items()}}
        whole = path.is_file() and all(
            self.path(name).is_file() and self.path(name).stat().st_size == size
            for name, size in read_json(path).get("bytes", {}).items())
        barrier()
        if rank == 0 and whole:
            differ(read_json(path), options, self.folder)
        elif rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                self.folder.mkdir(parents=True)
                for name, (row, dtype) in arrays.items():
                    np.lib.format.open_memmap(self.path(name), "w+", dtype, (*shape, *row))
                    if hasattr(os, "posix_fallocate"):              # not on macOS
                        with open(self.path(name), "r+b") as file:
                            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
                sizes = {name: self.path(name).stat().st_size for name in arrays}
                write_json({**options, "bytes": sizes}, path)
            except OSError as error:
                shutil.rmtree(self.folder, ignore_errors=True)
                stop(f"{self.folder} cannot be written ({error.strerror}): make room there or "
                     "choose another --out")
        barrier()
        self.arrays = {name: np.load(self.path(name), mmap_mode="r+") for name in arrays}
        self.count, self.pending, self.flushed = math.prod(shape), [], time.monotonic()
        self.todo = np.flatnonzero(~self.arrays["done"].reshape(-1))
        barrier()                                                   # before anyone marks a row

    @staticmethod
    def folder_of(out):
        return out.with_name(f".{out.name}.partial")

    def path(self, name):
        return self.folder / f"{name}.npy"

    def batches(self, size):
        """This process' share of the batches that are not done. How the rows are cut into batches
        does not depend on the number of processes nor on what is done already."""
        starts = np.array_split(np.unique(self.todo // size) * size, world_size)[rank]
        return [np.arange(start, min(start + size, self.count)) for start in starts.tolist()]

    def bar(self, title, batches):
        """A bar of this process' share, of which these batches are not done."""
        share = self.count // world_size
        return progress(share, title, "image", max(0, share - sum(map(len, batches))))

    def put(self, rows, **values):
        """Write numpy arrays (len(rows), ...); now and then, what is written goes to the disk and
        is marked as done."""
        for name, value in values.items():
            self.arrays[name].reshape(self.count, *value.shape[1:])[rows] = value
        self.pending.append(rows)
        if time.monotonic() > self.flushed + 1:
            self.flush()

    def flush(self):
        """First what is done, then the mark that it is."""
        for name in [name for name in self.arrays if name != "done"]:
            self.arrays[name].flush()
        for rows in self.pending:
            self.arrays["done"].reshape(-1)[rows] = True
        self.arrays["done"].flush()
        self.pending, self.flushed = [], time.monotonic()

    def finish(self):
        """Flush, and wait until the other processes have done so."""
        self.flush()
        barrier()

    def remove(self):
        shutil.rmtree(self.folder)


def differ(before, now, place):
    """Stop where the options of what is at `place` are others."""
    for name, value in json.loads(json.dumps(now)).items():
        if before.get(name) != value:
            stop(f"{place} has {name} = {before.get(name)}, not {value}: choose another --out")


# --------------------------------------------------------------------------------------------------
# Processes, signals, messages


BAR = int(os.environ.get("REALS_BAR", 0))                  # line of the bar, where two programs run
INTERVAL = 0.5 if sys.stderr.isatty() else 60                    # seconds between two of its states
cpu_group = None                                           # what processes agree on without the GPU
signals = []
bars = []                                                  # the one that is on the terminal


def join_processes():
    """Take this process' GPU, and begin to talk to the others where there are any. torchrun
    --max-restarts keeps its store, with the addresses of the dead in it, so every start has keys of
    its own. An hour is for downloads, for which the others wait."""
    global cpu_group
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            stop(f"process {local_rank} of this machine finds {torch.cuda.device_count()} GPUs: "
                 "start no more processes than GPUs, or hide them by CUDA_VISIBLE_DEVICES=")
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        hour = timedelta(hours=1)
        store, *_ = next(rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=hour)
        cpu_group = dist.new_group(backend="gloo", timeout=hour)


def barrier():
    """Wait for all processes."""
    if world_size > 1:
        dist.barrier(group=cpu_group)


def first_on_node(load, said=""):
    """load() in the very first process, then in the first of every other node, then in the others:
    what it fetches is there for them, whether nodes share a disk or not. Stops with one line, with
    `said` before it, where it cannot be had."""
    mine, loaded = 0 if rank == 0 else 1 if local_rank == 0 else 2, None
    for turn in range(3):
        if turn == mine:
            try:
                loaded = load()
            except (OSError, ValueError) as error:
                stop(f"{said}{error}")
        barrier()
    return loaded


def note_signals():
    """From here on SIGTERM and Ctrl-C let the loop finish its step and save: see asked_to_stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))


def asked_to_stop():
    """The number of the signal that has come to any of the processes, or 0: they all stop at the
    same step."""
    number = torch.tensor(max(signals, default=0))
    if world_size > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX, group=cpu_group)
    return number.item()


def progress(total, description, unit, done=0):
    """A tqdm bar of the first process."""
    bars[:] = [tqdm(total=total, desc=description, unit=unit, initial=done, disable=rank > 0,
                    leave=False, position=BAR, mininterval=INTERVAL)]
    return bars[0]


def say(text):
    """A line on the terminal, of the first process."""
    if rank == 0:
        print(text, flush=True)


def stop(message):
    """End with one line and exit status 2: a mistake of the user. Processes after the first wait 3
    seconds, so that what all of them find is said once: torchrun ends them meanwhile."""
    if rank > 0:
        time.sleep(3)
    # from a loader's process the message comes as the last line of a traceback
    line = str(message).splitlines()[-1].split("DataError: ")[-1]
    for bar in bars:                                                # not on the bar's line
        bar.close()
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)


def stop_at(error, place):
    """Stop for an OSError: a disk that is full, read-only or gone."""
    if not error.strerror:                                          # it is none of the system's
        raise error
    stop(f"{error.filename or place}: {error.strerror}: mend that, and the same command goes on "
         "from here")


def stop_out_of_memory(error):
    """Stop where an error is one of memory."""
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
            "allocate memory" not in str(error)):
        raise error
    reason = str(error).splitlines()[0][:100]
    stop(f"out of memory ({reason}): want a smaller --batch-size or model, "
         "in training --accumulate or --gradient-checkpointing")


STAGES = {"vae": train_autoencoder, "align": train_autoencoder, "latents": encode_latents,
          "sit": train_diffusion, "dit": train_diffusion}


def main(argv=None, **settings):
    """Run the stages that the flags name; `settings` are fields of Config that stand above them."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:                                                  # the demo is a command of its own
        here = Path(__file__).resolve().parent
        paths = (str(here), os.environ.get("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        os.execv(sys.executable, [sys.executable, "-m", "demo"])
    given = {**parse_arguments(argv), **settings}
    stages = given.pop("stage")
    plans = [resolve(stage, given) for stage in stages]       # say now what is wrong with the flags
    join_processes()
    try:
        for cfg in plans:
            # with bf16, what is outside of autocast may be in TF32: 6 times as fast on an H100
            tf32 = cfg.precision != "fp32"
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            STAGES[cfg.stage](cfg)
    except DataError as error:
        stop(error)
    except OSError as error:
        stop_at(error, cfg.out)
    except (MemoryError, RuntimeError) as error:
        stop_out_of_memory(error)
    except KeyboardInterrupt:
        sys.exit(130)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
