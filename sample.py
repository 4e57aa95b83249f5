"""Sample a trained run or published weights; read masks, depth and features off the latents;
reconstruct images.

    python sample.py --run runs/NAME --num 60 --tasks segmentation depth features --out samples.npz
    torchrun --nproc_per_node=8 -- sample.py --run runs/NAME --num 50000 --out samples.npz
    python sample.py --model SiT-XL/2 --ckpt SiT-XL-2-256.pt --vae FOLDER --classes 207 --out X.npz
    python sample.py --reconstruct images.zip --vae FOLDER --out rec.npz

The "--" keeps torchrun from reading --run and --num as abbreviations of its own flags.

Image i is a function of (seed, i) and the options: up to float rounding it is the same in any
batch, on any number of processes, also after a kill; the same command goes on where it stopped.
samples.npz holds arr_0 (N, H, W, 3) uint8 and arr_1 (N,) labels; --out DIR and --out X.zip get PNG
files, and X-labels.npy. Beside them X.png shows some, X.json has the options, X-tasks.npz what was
read off the latents, X-tasks.png shows that.

--reconstruct passes images through the autoencoder: rec.npz and rec-originals.npz are what rFID
compares, rec.json has the means of PSNR, SSIM and LPIPS. PSNR is infinite where two images agree;
here an image counts with at most 100 dB.

    N images, n in a batch    z (n, C, h, w) latents    x (n, 3, H, W) images, floats in [-1, 1]
"""
import argparse
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import align
import sit
from train import (FAMILIES, DataError, ImageFolder, Rows, at_once, autocast, barrier, build,
                   checksum, decode, device, differ, first_on_node, generator, join_processes,
                   load_autoencoder, loader, rank, read_json, save_picture, say, spread,
                   state_digest, stop, stop_at, stop_out_of_memory, to_float, to_uint8, world_size,
                   write_json)
from vae import LPIPS, atomic_file, load_strict, load_weights, psnr, ssim

# --------------------------------------------------------------------------------------------------
# Sampling


class Noise:
    """Standard normal noise of image numbers: noise(i), (n, *shape), is for step i of a sampler.

    A function of (seed, number) alone for a sampler that asks for every step once and in order;
    the first draw is where it starts.
    """

    def __init__(self, seed, numbers, shape):
        self.generators = [generator(seed, number, 0) for number in numbers]
        self.shape = shape

    def __call__(self, step=0):
        # always float32 and from the CPU: the same numbers in any precision and on any device
        noise = torch.empty(len(self.generators), *self.shape, dtype=torch.float32,
                            pin_memory=device.type == "cuda")
        for own, row in zip(self.generators, noise):
            torch.randn(self.shape, generator=own, out=row)
        return noise.to(device, torch.get_default_dtype(), non_blocking=True)


@torch.no_grad()
def generate(module, model, numbers, labels, seed, **options):
    """Latents (n, C, h, w), as the model sees them, of image numbers and their labels."""
    noise = Noise(seed, numbers, (model.in_channels, model.input_size, model.input_size))
    return module.sample(model, noise(), labels.to(device), noise=noise, **options)


def labels_of(classes, numbers, num_classes, seed):
    """Labels (n,) of image numbers: "balanced" counts through the classes, "random" draws one for
    every number, a list is gone through again and again."""
    if classes == "balanced":
        labels = [number % num_classes for number in numbers]
    elif classes == "random":
        keys = [np.random.SeedSequence([seed, number, 1]) for number in numbers]
        labels = [int(key.generate_state(1, np.uint64)[0]) % num_classes for key in keys]
    else:
        labels = [classes[number % len(classes)] for number in numbers]
    return torch.tensor(labels)


def sample_all(cfg, source, work):
    """Fill `work` with images, and with latents where it has a place for them."""
    # only batches that are not done: what a killed run has written stays
    batches, start = work.batches(cfg.batch_size), time.perf_counter()
    with work.bar(f"sample {cfg.run or cfg.model}", batches) as bar:
        for numbers in batches:
            own, classes = numbers.tolist(), source.model.num_classes
            labels = labels_of(source.labels, own, classes, cfg.seed)           # (n,)
            with autocast(cfg):
                z = generate(source.module, source.model, own, labels, cfg.seed, **source.options)
            # not under autocast: bfloat16 would add noise to the grey levels
            x = decode(source.vae, z)                                     # (n, 3, H, W)
            must_be_finite(numbers, z, x, "it diverged, or the weights are damaged: try more "
                           "--steps, less --cfg-scale, or --precision fp32, and another --out")
            found = {"images": to_uint8(x).permute(0, 2, 3, 1)}                 # (n, H, W, 3)
            if "latents" in work.arrays:
                found["latents"] = source.vae.denormalize(z)                    # (n, C, h, w)
            work.put(numbers, **{name: value.cpu().numpy() for name, value in found.items()})
            bar.update(len(numbers))
    work.finish()
    if batches:
        count, seconds = sum(map(len, batches)), time.perf_counter() - start
        say(f"{count} images by this process in {seconds:.1f} s")


def must_be_finite(numbers, z, x, remedy):
    """Raises DataError for the first image whose latent or pixels are not finite: as uint8 they
    would be black or white."""
    finite = z.flatten(1).isfinite().all(1) & x.flatten(1).isfinite().all(1)    # (n,)
    if not finite.all():
        number = numbers[finite.int().argmin().item()]
        raise DataError(f"image {number} is not finite: {remedy}")


def sample_run(cfg):
    """Sample, read the tasks, and let rank 0 write everything under its name, the images last."""
    source = load_source(cfg)
    heads, task_heads = load_readers(cfg, source) if cfg.tasks else (None, None)
    readers = [heads, *(getattr(task_heads, name, None) for name in ("segmentation", "depth"))]
    options = {"model": cfg.model or cfg.family, **source.weights, "num": cfg.num,
               "seed": cfg.seed, "classes": source.labels, "precision": cfg.precision,
               **source.options, "latents": cfg.latents, "tasks": sorted(cfg.tasks),
               "heads": [state_digest(net) for net in readers if net]}
    if is_done(cfg, options):
        return

    side, size = source.model.input_size, source.model.input_size * source.vae.factor
    arrays = {"images": ((size, size, 3), np.uint8)}
    if cfg.latents or cfg.tasks:
        kind = np.float64 if cfg.precision == "fp64" else np.float32
        arrays["latents"] = (source.model.in_channels, side, side), kind
    work = Rows(cfg.out, (cfg.num,), options, **arrays)
    sample_all(cfg, source, work)
    images = work.arrays["images"]                                              # (N, H, W, 3)
    labels = labels_of(source.labels, range(cfg.num), source.model.num_classes, cfg.seed)
    if cfg.tasks:
        read = read_all(cfg, options, work.arrays["latents"], size, heads, task_heads)
    pngs = work.folder / "png"                                      # until it gets its final name
    if cfg.out.suffix != ".npz":
        write_pngs(images, pngs)
    if rank > 0:
        return

    picture, title = beside(cfg.out, ".png"), f"samples, guidance {options['cfg_scale']:g}"
    save_picture(grid(images, labels, source.classes, title), picture)
    if cfg.latents:
        with open(work.path("latents"), "rb") as latents:
            with atomic_file(beside(cfg.out, "-latents.npy")) as file:
                shutil.copyfileobj(latents, file)
    if cfg.tasks:
        segments = task_heads.classes if task_heads else ()
        shown = task_sheet(images, read.arrays, labels, source.classes, segments)
        save_picture(shown, beside(cfg.out, "-tasks.png"))
        print(f"{', '.join(cfg.tasks)} read off the generated latents: "
              f"{beside(cfg.out, '-tasks.npz')}, -tasks.png")
        read.remove()
    write_json(options, cfg.out.with_suffix(".json"))
    write_samples(cfg, work, labels, pngs)                          # last: where it is, all is done
    work.remove()
    print(f"{cfg.num} images in {cfg.out}, a picture of them in {picture}")


# --------------------------------------------------------------------------------------------------
# Tasks: latents --MLPs--> features like the teacher's --heads--> masks, depth


@torch.no_grad()
def read_tasks(task_heads, size, features, cls_token, raw=None):
    """Masks and depth, each (N, size, size), from features (N, D, gh, gw) and class tokens (N, D),
    normed; None for what there is no head for. `raw` are both before the norm, for a depth head
    that wants them so."""
    def enlarged(x):
        return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)

    masks = depth = None
    if task_heads.segmentation:
        # logits are enlarged, not classes: so borders are smooth
        masks = enlarged(task_heads.segmentation(features)).argmax(1)           # (N, size, size)
    if task_heads.depth:
        pair = (features, cls_token) if task_heads.depth_normed else raw
        depth = enlarged(task_heads.depth(*pair))[:, 0]                         # (N, size, size)
    return masks, depth


@torch.no_grad()
def read_latents(heads, task_heads, z, size):
    """Masks and depth from latents (N, C, h, w): what read_tasks gives for the features that the
    MLPs make of them."""
    raw = None
    if task_heads.depth and not task_heads.depth_normed:
        raw = heads.feature_map(z, normed=False), heads.class_token(z, normed=False)
    return read_tasks(task_heads, size, heads.feature_map(z), heads.class_token(z), raw)


@torch.no_grad()
def read_all(cfg, options, latents, size, heads, task_heads):
    """-tasks.npz from latents (N, C, h, w) on disk, by all processes: `segmentation` (N, H, W)
    class numbers, `depth` (N, H, W) metres or what the head was trained with, `features`
    (N, gh, gw, 3) uint8, principal components as colours."""
    def z_of(numbers):
        return torch.from_numpy(latents[numbers]).to(device)        # (n, C, h, w)

    def read(z):
        found = {}
        masks, depth = read_latents(heads, task_heads, z, size) if task_heads else (None, None)
        if masks is not None:
            few = len(task_heads.classes) <= 256
            found["segmentation"] = masks.to(torch.uint8 if few else torch.int16)   # (n, H, W)
        if depth is not None:
            found["depth"] = depth.float()                          # (n, H, W)
        if "features" in cfg.tasks:
            rgb = align.pca_rgb(heads.feature_map(z), colors)       # (n, 3, gh, gw)
            found["features"] = (rgb * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return {name: x.cpu().numpy() for name, x in found.items()}

    # the axes of the first 100 images for all: so colours do not depend on batches and processes
    colors = align.pca_colors(heads.feature_map(z_of(np.arange(min(100, len(latents))))))
    rows = {name: (x.shape[1:], x.dtype) for name, x in read(z_of(np.arange(1))).items()}
    path, title = beside(cfg.out, "-tasks.npz"), f"read {', '.join(cfg.tasks)}"
    work = Rows(path, (len(latents),), options, **rows)
    batches = work.batches(cfg.batch_size)
    with work.bar(title, batches) as bar:
        for numbers in batches:
            work.put(numbers, **read(z_of(numbers)))
            bar.update(len(numbers))
    work.finish()
    if rank == 0:
        pack(path, **{name: work.path(name) for name in rows})
    return work


# --------------------------------------------------------------------------------------------------
# Reconstruction


def finite_psnr(x, y):
    """PSNR of images (n, 3, H, W) in [-1, 1] -> (n,) dB, at most 100: of 8-bit images of 256 px one
    grey level of one number costs that much, and JSON knows no infinity."""
    return psnr(x, y).clamp(max=100)


METRICS = {"psnr": finite_psnr, "ssim": ssim, "lpips": LPIPS}


@torch.no_grad()
def reconstruct(cfg):
    """Images of a data set through the autoencoder: originals and reconstructions as .npz, figures
    and a picture. Latents are the means; the metrics see what is written, rounded to uint8."""
    vae = load_autoencoder(cfg.vae).to(device)
    size = cfg.image_size or vae.config["sample_size"]
    if size % vae.factor or size < 16:
        stop(f"--image-size {size}: want a multiple of {vae.factor}, and at least 16")
    metrics = {name: METRICS[name] for name in cfg.metrics}
    if "lpips" in metrics:
        metrics["lpips"] = first_on_node(LPIPS.from_published).to(device)
    data = ImageFolder(cfg.reconstruct, cfg.split, size)
    count = cfg.num or len(data)
    if count > len(data):
        stop(f"--num {count}: {cfg.reconstruct} has {len(data)} images in this split")
    rows = spread(len(data), count)                                 # of all classes
    options = {"files": data.facts()["files"], "split": cfg.split, "images": count,
               "image_size": size, "autoencoder": checksum(cfg.vae), "precision": cfg.precision,
               "metrics": sorted(cfg.metrics)}
    if is_done(cfg, options):
        return

    image = (size, size, 3), np.uint8
    figures = {name: ((), np.float64) for name in metrics}
    work = Rows(cfg.out, (count,), options, originals=image, reconstructions=image, **figures)
    batches = work.batches(min(cfg.batch_size, at_once(size)))
    keys = [[(row, False) for row in rows[numbers].tolist()] for numbers in batches]
    with work.bar(f"reconstruct {cfg.reconstruct}", batches) as bar:
        for numbers, (images, _) in zip(batches, loader(data, keys, cfg.workers)):
            x = to_float(images)                                                # (n, 3, H, W)
            z = vae.encode(x).latent_dist.mode()                                # (n, C, h, w)
            rec = vae.decode(z).sample                                          # (n, 3, H, W)
            must_be_finite(numbers, z, rec, f"the weights in {cfg.vae} are damaged")
            rec = to_uint8(rec)
            found = {name: metric(x, to_float(rec)) for name, metric in metrics.items()}    # (n,)
            found["originals"] = images.permute(0, 2, 3, 1)                     # (n, H, W, 3)
            found["reconstructions"] = rec.permute(0, 2, 3, 1)
            work.put(numbers, **{name: value.cpu().numpy() for name, value in found.items()})
            bar.update(len(numbers))
    work.finish()
    if rank == 0:
        write_reconstructions(cfg, options, work, metrics)


def write_reconstructions(cfg, options, work, metrics):
    """Rank 0: picture, originals, figures and, last, the reconstructions under their names."""
    per_row = min(4, work.count)
    shown = min(16, work.count) // per_row * per_row
    columns = {}
    for name in ("originals", "reconstructions"):
        images = torch.from_numpy(work.arrays[name][:shown])                    # (n, H, W, 3)
        columns[name] = images.permute(0, 3, 1, 2).unflatten(0, (-1, per_row))
    picture, originals = beside(cfg.out, ".png"), beside(cfg.out, "-originals.npz")
    save_picture(sheet(columns), picture)
    figures = {name: work.arrays[name].mean().item() for name in metrics}
    pack(originals, arr_0=work.path("originals"))
    facts = {"data": cfg.reconstruct, **options, **figures}
    write_json(facts, cfg.out.with_suffix(".json"))
    pack(cfg.out, arr_0=work.path("reconstructions"))               # last: where it is, all is done
    work.remove()
    said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    print(f"{work.count} images: {said}")
    print(f"{originals} and {cfg.out} are ready; {picture} shows some")


# --------------------------------------------------------------------------------------------------
# Loading: models


def load_source(cfg):
    """What --run, or --model, --ckpt and --vae, name, in --precision and on the device, as load_run
    gives it; also `options`, all of the sampler's, and `labels`, --classes as labels_of wants it.
    Stops with one line for what does not fit together."""
    source = (load_run(cfg.run, cfg.family, cfg.ckpt) if cfg.run
              else load_published(cfg.model, cfg.ckpt, cfg.vae))
    source.options = sampler_options(cfg, source)
    source.labels = parse_classes(cfg.classes, source.classes)
    count, rows = source.model.num_classes, source.model.y_embedder.embedding_table.num_embeddings
    if rows == count and (source.options["cfg_scale"] != 1 or count in list(source.labels)):
        stop("the model was trained without label dropout and knows no missing label: want "
             f"--cfg-scale 1, and --classes below {count}")
    # noise, decoder and heads follow the default type
    if cfg.precision == "fp64":
        torch.set_default_dtype(torch.float64)
    source.model = source.model.to(device, torch.get_default_dtype())
    source.vae = source.vae.to(device, torch.get_default_dtype())
    return source


def load_run(run, family, ckpt=None):
    """A run's stage sit or dit, with averaged weights, and the autoencoder whose latents it was
    trained on, as an object: `module`, `model`, `vae`, `folder` (the autoencoder's), `objective`
    (what the model predicts, as options of its sampler), `classes` (names), `weights` (sha256).
    `ckpt`: a file of other weights than the last, as train.py --snapshots leaves them."""
    folder = run / family
    file = ckpt or folder / "ema.safetensors"
    if not file.is_file():
        remedy = "see --ckpt" if ckpt else f"run train.py --stage {family} --out {run} first"
        stop(f"{file} not found: {remedy}")
    settings = read_json(folder / "settings.json")
    module, network = FAMILIES[family]
    model = with_weights(build(network, folder / "config.json"), file)
    vae = Path(settings["vae"])
    if not vae.is_dir():                                            # the whole run was moved
        vae = run / vae.name
    if checksum(vae) != settings["autoencoder"]:
        stop(f"{vae} is not the autoencoder that {folder} was trained with: put that one back")
    autoencoder = load_autoencoder(vae)
    autoencoder.config.update({k: settings[k] for k in ("latents_mean", "latents_std")})
    # settings.json of stage dit has these flags of SiT's too, where they mean nothing
    names = ("path", "prediction") if family == "sit" else ()
    return SimpleNamespace(
        module=module, model=model, vae=autoencoder, folder=vae,
        objective={name: settings[name] for name in names},
        classes=settings.get("classes") or [str(k) for k in range(model.num_classes)],
        weights={"transformer": checksum(file),
                 "autoencoder": settings["autoencoder"]})


def with_weights(net, path):
    """The network with the weights of a file, to be used as it is; stops where they do not fit."""
    try:
        load_strict(net, weights_of(path), path)
        if not all(x.isfinite().all() for x in net.state_dict().values()):
            raise ValueError(f"{path} holds numbers that are not finite: it is damaged")
    except (OSError, ValueError) as error:
        stop(error)
    return net.eval()


def load_published(name, path, vae):
    """What load_run gives, for "SiT-XL/2" or "DiT-XL/2" with weights from a file, and an
    autoencoder's folder or file. Stops with one line for what does not fit together."""
    family = name.partition("-")[0].lower()
    module, network = FAMILIES.get(family, FAMILIES["sit"])         # another name is refused below
    autoencoder = load_autoencoder(vae)
    try:
        weights = weights_of(path)
        config = module.size_arguments(name, network.__name__)      # depth, width, heads
        try:
            config = {**config, **shape_arguments(weights)}
        except (KeyError, ValueError):
            raise ValueError(f"{path} does not hold the weights of a {network.__name__}") from None
        model = network(**config)
        load_strict(model, weights, path)
    except (OSError, ValueError) as error:
        stop(f"--model {name}: {error}")
    channels = autoencoder.config["latent_channels"]
    if channels != model.in_channels:
        stop(f"{vae} has latents of {channels} channels, {path} wants {model.in_channels}: "
             "give --vae the autoencoder that it was trained with")
    return SimpleNamespace(
        module=module, model=model.eval(), vae=autoencoder, folder=vae, objective={},
        classes=[str(k) for k in range(model.num_classes)],
        weights={"transformer": checksum(path), "autoencoder": checksum(vae),
                 "scale": [x.flatten().tolist() for x in autoencoder.statistics(torch.zeros(1))]})


def weights_of(path):
    """State dict of a file: .safetensors, a bare .pt, or the average ("ema", else "model" or
    "state_dict") of a training checkpoint. Raises FileNotFoundError, or ValueError."""
    # official SiT and DiT checkpoints keep their flags beside the weights
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = load_weights(path)
    if any(name.startswith("projectors.") for name in weights):
        raise ValueError(f"{path} is a SiT of REPA, whose time runs from data at 0 to noise at 1: "
                         "it would be sampled the wrong way round here")
    return weights


def shape_arguments(weights):
    """The arguments of a transformer that the shapes of its weights tell."""
    _, in_channels, patch, _ = weights["x_embedder.proj.weight"].shape
    rows, _ = weights["y_embedder.embedding_table.weight"].shape
    tokens = weights["pos_embed"].shape[1]
    out = weights["final_layer.linear.weight"].shape[0]
    return dict(in_channels=in_channels, input_size=math.isqrt(tokens) * patch,
                num_classes=rows - 1,                               # the last row: no label
                learn_sigma=out == 2 * in_channels * patch ** 2)


# --------------------------------------------------------------------------------------------------
# Loading: heads


def load_readers(cfg, source):
    """The MLPs, and the heads or None, for --tasks; stops where one is missing or does not fit."""
    heads = load_heads(source.folder).to(device, torch.get_default_dtype())
    if set(cfg.tasks) == {"features"}:
        return heads, None
    task_heads = load_task_heads(cfg.heads or [teacher_of(source.folder)])
    for name in ("segmentation", "depth"):
        head = getattr(task_heads, name) if name in cfg.tasks else None
        if name in cfg.tasks and head is None:
            place = cfg.heads or "the folder of the teacher"
            stop(f"--tasks {name}: no head for it in {place}: see --heads")
        setattr(task_heads, name, head and head.to(device, torch.get_default_dtype()))
    side = source.model.input_size
    z = torch.zeros(1, heads.config["latent_channels"], side, side, device=device)
    try:                                                            # say now what does not fit
        read_latents(heads, task_heads, z, 32)
    except ValueError as error:
        stop(error)
    return heads, task_heads


def teacher_of(folder):
    """The folder of the teacher that the autoencoder in a folder was aligned with."""
    settings = folder / "settings.json"
    if not settings.is_file():
        stop(f"--tasks: {settings} does not tell the teacher, since it is not there: give --heads")
    teacher = Path(read_json(settings)["teacher"])
    if str(teacher) in align.DINOV2:
        stop(f"--tasks: the teacher is {teacher}, of which there are several heads: give --heads")
    # or beside the run, where both were moved
    return teacher if teacher.is_dir() else folder.parent.parent / teacher.name


def load_heads(folder):
    """AlignmentHeads, the two MLPs that stage align wrote into its folder."""
    path = folder / "heads.safetensors"
    if not path.is_file():
        stop(f"{path} not found: masks, depth and features need a run of train.py --stage align")
    return with_weights(build(align.AlignmentHeads, folder / "heads.json"), path)


def load_task_heads(sources):
    """Heads for masks and depth, from folders of demo/teacher.py and from published names.

    An object with `segmentation` and `depth` (or None), `depth_normed` (published depth heads want
    features before the last norm) and `classes`, the names of the segments. The last source wins;
    stops with one line for what is neither.
    """
    found = SimpleNamespace(segmentation=None, depth=None, depth_normed=True, classes=())
    for source in map(str, sources):
        if (Path(source) / "heads.json").is_file():
            add_trained_heads(found, Path(source))
        elif source.startswith("dinov2_"):
            add_published_head(found, source)
        else:
            stop(f"{source}: no heads.json there, and no published head of this name: run "
                 "python -m demo.teacher heads first, or give --heads "
                 "dinov2_vitb14_ade20k_linear_head or the like")
    return found


def add_trained_heads(found, folder):
    """Heads that were trained here: on features behind the teacher's last norm."""
    config = read_json(folder / "heads.json")
    if "segmentation" not in config:
        stop(f"{folder} holds the MLPs of stage align: want the folder of a teacher or of heads")
    if config["segmentation"]:
        head = align.SegmentationHead(**config["segmentation"])
        found.segmentation = with_weights(head, folder / "segmentation_head.safetensors")
    if config["depth"]:
        head = align.DepthHead(**config["depth"])
        found.depth = with_weights(head, folder / "depth_head.safetensors")
        found.depth_normed = True
    found.classes = config["classes"] or found.classes


def add_published_head(found, name):
    """A head for masks or for depth, of DINOv2's authors."""
    head = first_on_node(lambda: align.load_head(name))
    if isinstance(head, align.ClassificationHead):
        stop(f"--heads {name} tells classes: want heads for masks or depth")
    if isinstance(head, align.DepthHead):
        found.depth, found.depth_normed = head, False
    else:
        found.segmentation = head
        found.classes = [f"class {k}" for k in range(head.conv_seg.out_channels)]


# --------------------------------------------------------------------------------------------------
# Pictures


def grid(images, labels, classes, title):
    """Picture of images (N, H, W, 3): of up to ten classes a row each, or side by side one each."""
    numbers, shown = by_class(torch.arange(len(labels)), labels, 10, 12)        # (classes, row)
    x = torch.from_numpy(images[numbers.flatten().numpy()])                     # (M, H, W, 3)
    x = x.permute(0, 3, 1, 2).unflatten(0, numbers.shape)           # (classes, row, 3, H, W)
    names = [name_of(classes, k) for k in shown]
    if numbers.shape[1] == 1:
        return sheet({name: row[None] for name, row in zip(names, x)})
    return sheet({title: x}, rows=names)


def task_sheet(images, found, labels, classes, segments):
    """Picture of images (N, H, W, 3) beside what was read off their latents, a row a class.
    `classes` and `segments` are names."""
    rows, shown = by_class(torch.arange(len(labels)), labels, 10, 6)            # (classes, row)
    size, legend = images.shape[1], None

    def chosen(array):
        return torch.from_numpy(array[rows.flatten().numpy()])

    columns = {"generated": chosen(images).permute(0, 3, 1, 2)}                 # (M, 3, H, W) each
    if "segmentation" in found:
        masks = chosen(found["segmentation"]).long()
        columns["mask"] = align.colorize_mask(masks, len(segments))
        legend = legend_of(masks, segments)
    if "depth" in found:
        columns["depth"] = align.colorize_depth(chosen(found["depth"]))
    if "features" in found:
        rgb = chosen(found["features"]).permute(0, 3, 1, 2)                     # (M, 3, gh, gw)
        columns["features (PCA)"] = F.interpolate(rgb, size=(size, size), mode="nearest")
    columns = {title: x.unflatten(0, rows.shape) for title, x in columns.items()}
    return sheet(columns, legend=legend, rows=[name_of(classes, k) for k in shown])


def by_class(images, labels, num_classes, per_row):
    """(classes, row, ...) images of the num_classes most frequent classes, in order: per_row, or
    what the smallest has; and which classes these are."""
    counts = torch.bincount(labels)
    classes = counts.argsort(descending=True, stable=True)[:num_classes]
    classes = classes[counts[classes] > 0].sort().values.tolist()
    per_row = min(per_row, min(int(counts[k]) for k in classes))
    rows = [torch.nonzero(labels == k).flatten()[:per_row] for k in classes]
    return images[torch.stack(rows)], classes


def name_of(classes, label):
    """The class' name; the label behind the last one is none."""
    return classes[label] if label < len(classes) else "no label"


def legend_of(masks, classes):
    """{name: colour} of up to 20 classes in masks (N, H, W), the most frequent ones."""
    counts = torch.bincount(masks.flatten().cpu(), minlength=len(classes))
    found = [int(k) for k in counts.argsort(descending=True)[:20] if counts[k]]
    palette = align.mask_palette(len(classes))
    return {classes[k]: palette[k] for k in sorted(found)}


def sheet(columns, scale=None, gap=2, legend=None, rows=()):
    """PIL image of columns side by side: {title: images (rows, per_row, 3, H, W), uint8 or in
    [0, 1]}, enlarged to at least 64 pixels; left of them the names of the rows, below them a legend
    {name: colour in [0, 1]}."""
    font, head, space = ImageFont.load_default(13), 20, 12          # of titles; between columns
    parts = []
    for title, images in columns.items():
        *_, H, W = images.shape
        scale = scale or max(1, 64 // W)
        page = Image.fromarray(tiled(images, gap))
        page = page.resize((page.width * scale, page.height * scale), Image.NEAREST)
        width = max(page.width, math.ceil(font.getlength(title)) + 8)
        part = Image.new("RGB", (width, page.height + head), "white")
        part.paste(page, (0, head))
        ImageDraw.Draw(part).text((2, 2), title, fill="black", font=font)
        parts.append(part)
    if rows:
        width = math.ceil(max(map(font.getlength, rows))) + 2
        part = Image.new("RGB", (width, parts[0].height), "white")
        for k, name in enumerate(rows):
            middle = head + (k + 0.5) * scale * (H + gap) - gap
            ImageDraw.Draw(part).text((2, middle), name, fill="black", font=font, anchor="lm")
        parts.insert(0, part)

    width = sum(part.width for part in parts) + space * (len(parts) - 1)
    height = max(part.height for part in parts)
    places, bottom = places_of(legend or {}, font, width, height)
    canvas, left = Image.new("RGB", (width, bottom), "white"), 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + space
    draw = ImageDraw.Draw(canvas)
    for name, (x, y) in places.items():
        color = tuple(round(255 * float(value)) for value in legend[name])
        draw.rectangle((x + 2, y + 2, x + 14, y + 14), fill=color)
        draw.text((x + 20, y), name, fill="black", font=font)
    return canvas


def tiled(images, gap):
    """(rows, per_row, 3, H, W), uint8 or in [0, 1] -> one array (rows (H + gap), ..., 3) uint8."""
    if images.dtype != torch.uint8:
        images = (images * 255).round().to(torch.uint8)
    x = F.pad(images, (0, gap, 0, gap), value=255).permute(0, 3, 1, 4, 2)   # (rows, H, row, W, 3)
    return x.flatten(2, 3).flatten(0, 1).cpu().numpy()


def places_of(legend, font, width, height):
    """Where the entries of a legend go, {name: (left, top)}, line by line below a picture of this
    size, and where the whole ends."""
    places, left, top = {}, 0, height + 6
    for name in legend:
        step = math.ceil(font.getlength(name)) + 36
        if left and left + step > width:
            left, top = 0, top + 20
        places[name] = left, top
        left += step
    return places, top + 20 if places else height


# --------------------------------------------------------------------------------------------------
# Files


def is_done(cfg, options):
    """Whether --out is there, of these options; stops where it is of others."""
    path = cfg.out.with_suffix(".json")
    if not cfg.out.exists():
        for other in (cfg.out.with_suffix(ending) for ending in (".npz", ".zip", "")):
            if path.is_file() and other.exists():
                stop(f"--out {cfg.out}: {other} is there, with which it would share {path}: "
                     "choose another name")
        there = [beside(cfg.out, end) for end in PRODUCTS if beside(cfg.out, end).exists()]
        if there and not Rows.folder_of(cfg.out).is_dir() and not is_ours(path):
            stop(f"--out {cfg.out}: {there[0]} is there, is not of this program, and would be "
                 "replaced: choose another name")
        return False
    if not path.is_file():
        stop(f"--out {cfg.out} exists: choose another name or delete it")
    differ(read_json(path), options, cfg.out)
    if rank == 0:
        shutil.rmtree(Rows.folder_of(cfg.out), ignore_errors=True)  # killed at the very end
        print(f"{cfg.out} is done already")
    return True


PRODUCTS = (".json", ".png", "-latents.npy", "-tasks.npz", "-tasks.png", "-labels.npy",
            "-originals.npz")                                       # what stands beside --out


def is_ours(path):
    """Whether a file is the .json that this program writes."""
    try:
        return path.is_file() and "autoencoder" in dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        return False


def beside(path, ending):
    """samples.npz, samples.zip or the folder samples, and "-tasks.png" -> samples-tasks.png."""
    return path.with_name(path.stem + ending)


def pack(path, **files):
    """Write an uncompressed .npz of .npy files {entry: path}, never holding one in memory."""
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, source in files.items():
            archive.write(source, f"{name}.npy")


def write_pngs(images, folder):
    """Images (N, H, W, 3) as folder/000000.png and so on, each process its share."""
    folder.mkdir(exist_ok=True)
    for number in range(rank, len(images), world_size):
        Image.fromarray(images[number]).save(folder / f"{number:06}.png")
    barrier()


def write_samples(cfg, work, labels, pngs):
    """Rank 0: the images under their final name."""
    if cfg.out.suffix == ".npz":
        np.save(work.path("labels"), labels.numpy())
        pack(cfg.out, arr_0=work.path("images"), arr_1=work.path("labels"))
        return
    with atomic_file(beside(cfg.out, "-labels.npy")) as file:
        np.save(file, labels.numpy())
    if cfg.out.suffix == ".zip":
        with atomic_file(cfg.out) as file, zipfile.ZipFile(file, "w") as archive:
            for number in range(len(labels)):
                archive.write(pngs / f"{number:06}.png", f"{number:06}.png")
    else:
        os.replace(pngs, cfg.out)


# --------------------------------------------------------------------------------------------------
# Program


def steps(text):
    """--steps: a number, or what dit.space_timesteps reads."""
    if not re.fullmatch(r"\d+|ddim\d+|\d+(,\d+)+", text):
        raise argparse.ArgumentTypeError(f"{text}: want 50, or for DiT ddim50 or 10,15,20")
    return int(text) if text.isdecimal() else text


def number(text):
    """A finite float."""
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"{text}: want a number")
    return value


SAMPLER_FLAGS = {                                                   # name: (type, help)
    "sampler": (str, f"SiT: {', '.join(sit.ODE_SAMPLERS + sit.SDE_SAMPLERS)} (default heun); "
                "DiT: ddpm, ddim (default ddpm)"),
    "num_steps": (steps, "steps of the sampler (default 50; DiT 250, where also ddim50 or 10,15,20 "
                  "can be said)"),
    "cfg_scale": (number, "guidance; 1 is none (default 1)"),
    "cfg_interval": (number, "noise levels that are guided, LOW HIGH: 1 is noise, 0 is data "
                     "(default 0 1)"),
    "cfg_channels": (int, "guide so many of the latent's channels; the official SiT and DiT guide "
                     "3 (default: all)"),
    "path": (str, "SiT: linear, gvp, vp (a run tells it; default linear)"),
    "prediction": (str, "what the model predicts: velocity, noise, score, or DiT's noise, x_start "
                   "(a run tells it)"),
    "sample_eps": (number, "SiT: distance from the ends of time"),
    "atol": (number, "SiT, dopri5 (default 1e-6)"),
    "rtol": (number, "SiT, dopri5 (default 1e-3)"),
    "diffusion_form": (str, "SiT, SDEs: constant, sbdm, sigma (default), linear, decreasing, "
                       "increasing-decreasing"),
    "diffusion_norm": (number, "SiT, SDEs: factor of the form (default 1)"),
    "last_step": (str, "SiT, SDEs: mean, tweedie, euler, none (default mean)"),
    "last_step_size": (number, "SiT, SDEs (default 0.04)"),
    "schedule": (str, "DiT: linear, squaredcos_cap_v2 (default linear)"),
    "fixed_variance": (str, "DiT without learned variance: large, small (default large)"),
    "clip_denoised": (bool, "DiT: hold every x_start in [-1, 1]"),
    "eta": (number, "DiT, ddim: noise, 0 for none to 1 for that of ddpm (default 0)"),
}
SAMPLERS_OF = {                                                     # where it is not for all
    "atol": ["dopri5"],
    "rtol": ["dopri5"],
    "eta": ["ddim"],
    **dict.fromkeys(("diffusion_form", "diffusion_norm", "last_step", "last_step_size"),
                    sit.SDE_SAMPLERS),
}
TASKS = ("segmentation", "depth", "features")
# group: {name: (type or choices, default, help)}; a list as default: several words
FLAGS = {
    "samples and reconstructions": {
        "out": (Path, None, "X.npz, X.zip, or a folder X for PNG files; pictures go beside it"),
        "num": (int, None, "number of images (default: 100 samples, all reconstructions; fewer of "
                "these are spread over the data)"),
        "vae": (Path, None, "autoencoder: its folder, or one file of its weights"),
        "batch_size": (int, 100, "images at once on a process (default 100)"),
        "precision": (("fp32", "tf32", "bf16", "fp64"), "fp32",
                      "default fp32; bf16 is for the transformer only"),
    },
    "samples": {
        "run": (Path, None, "folder of a run: autoencoder and stage sit or dit"),
        "family": (tuple(FAMILIES), "sit", "which diffusion model of the run (default sit)"),
        "model": (str, None, "instead of a run: SiT-XL/2, DiT-XL/2 and the like, with --ckpt and "
                  "--vae"),
        "ckpt": (Path, None, "weights of --model: .pt or .safetensors; of --run: those of a "
                 "snapshot, RUN/sit/ema-STEP.safetensors"),
        "classes": (str, ["balanced"], "balanced (default), random, or numbers from 0 or names of "
                    "classes, gone through again and again; name:7 is a class that is called 7"),
        "seed": (int, 0, "of noise and random classes (default 0)"),
        "latents": (bool, False, "write the latents too, as OUT-latents.npy"),
        "tasks": (TASKS, [], "read these off the generated latents, as arrays and as a picture"),
        "heads": (str, [], "for --tasks: folders of a teacher or of heads, or names of published "
                  "heads (default: the folder of the run's teacher)"),
    },
    "samplers; sit.sample and dit.sample explain them": {
        name: (kind, None, text) for name, (kind, text) in SAMPLER_FLAGS.items()},
    "reconstructions": {
        "reconstruct": (str, None, "a folder or .zip of images to pass through the autoencoder"),
        "split": (("test", "train", "all"), "test", "which images (default test)"),
        "image_size": (int, None, "pixels a side (default: the autoencoder's)"),
        "workers": (int, 0, "processes that load images (default 0)"),
        "metrics": (tuple(sorted(METRICS)), sorted(METRICS), "what to measure (default: all)"),
    },
}


def flag_of(name):
    """A setting as a word of the command."""
    return f"--{name.replace('num_steps', 'steps').replace('_', '-')}"


def parse_arguments():
    """The flags, once they make sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop                                             # one line, without the usage
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (kind, default, text) in flags.items():
            options = dict(type=kind)
            if kind is bool:
                options = dict(action="store_true")
            elif isinstance(kind, tuple):
                options = dict(choices=kind)
            if isinstance(default, list):
                options["nargs"] = "*" if name == "metrics" else "+"
            if name == "cfg_interval":
                options.update(nargs=2, metavar=("LOW", "HIGH"))
            group.add_argument(flag_of(name), dest=name, default=default, required=name == "out",
                               help=text, **options)
    cfg = parser.parse_args()
    for wrong, message in checks(cfg):
        if wrong:
            stop(message)
    if not cfg.reconstruct and cfg.num is None:
        cfg.num = 100
    return cfg


def checks(cfg):
    """(whether it is wrong, what to say) of everything about the flags; the first one counts."""
    yield from (
        (cfg.reconstruct and (cfg.run or cfg.model or not cfg.vae),
         "--reconstruct wants --vae FOLDER, and no --run or --model"),
        (not cfg.reconstruct and bool(cfg.run) == bool(cfg.model),
         "give --run FOLDER, or --model, --ckpt and --vae, to sample; or --reconstruct DATA "
         "--vae FOLDER"),
        (cfg.model and not (cfg.ckpt and cfg.vae), "--model wants --ckpt FILE and --vae FOLDER"),
        (cfg.run and cfg.vae, "--run has its own autoencoder: give no --vae"),
        (cfg.model and cfg.family != "sit", "--family is for --run: --model tells its own"),
        (cfg.heads and not {"segmentation", "depth"} & set(cfg.tasks),
         "--heads is for --tasks segmentation depth"),
    )
    _, samples, samplers, reconstructions = FLAGS.values()
    kind, foreign = "only", reconstructions
    if cfg.reconstruct:
        kind, foreign = "not", {**samples, **samplers}
    for name, (_, default, _) in foreign.items():
        yield getattr(cfg, name) != default, f"{flag_of(name)} is {kind} for --reconstruct"
    for name, least in dict(num=1, batch_size=1, seed=0, workers=0).items():
        value = getattr(cfg, name)
        small = value is not None and value < least
        yield small, f"{flag_of(name)} {value}: want at least {least}"
    yield from (
        (cfg.reconstruct and cfg.out.suffix != ".npz",
         f"--out {cfg.out}: want a name that ends in .npz"),
        (cfg.out.suffix not in (".npz", ".zip", "") or not cfg.out.name,
         f"--out {cfg.out}: want a name that ends in .npz or .zip, or a folder's, without a dot"),
        (cfg.reconstruct and cfg.precision not in ("fp32", "tf32"),
         f"--precision {cfg.precision}: --reconstruct wants fp32 or tf32"),
    )


def sampler_options(cfg, source):
    """All options of the family's sampler: its defaults, what the model was trained for, the flags.
    Stops for an option that it does not have, and for values that it refuses."""
    signature = inspect.signature(source.module.trajectory).parameters
    options = {name: p.default for name, p in signature.items() if p.default is not p.empty}
    del options["noise"], options["reverse"]
    given = {name: getattr(cfg, name) for name in SAMPLER_FLAGS if getattr(cfg, name) is not None}
    for name, value in given.items():
        flag = flag_of(name)
        if name not in options:
            stop(f"{flag} is no option of {source.module.__name__}.py's samplers")
        if source.objective.get(name, value) != value:
            stop(f"{flag} {value}: the model was trained with {source.objective[name]}")
        if name == "num_steps" and source.module is sit and not isinstance(value, int):
            stop(f"{flag} {value}: SiT wants a number")
    options.update(source.objective, **given)
    options["cfg_interval"] = tuple(options["cfg_interval"])
    for name in given:                                              # what would have no effect
        if options["sampler"] not in SAMPLERS_OF.get(name, [options["sampler"]]):
            stop(f"{flag_of(name)} is for --sampler {', '.join(SAMPLERS_OF[name])}")
        if name in ("cfg_interval", "cfg_channels") and options["cfg_scale"] == 1:
            stop(f"{flag_of(name)} wants guidance: give --cfg-scale")
    if options.get("last_step") == "none":
        options["last_step"] = None

    def silent(x, t, y):                                            # a model that costs nothing
        return torch.zeros_like(x)

    silent.num_classes = source.model.num_classes
    z = torch.zeros(1, source.model.in_channels, 1, 1)
    try:                                                            # say now what is wrong
        source.module.sample(silent, z, torch.tensor([0]), **options)
    except (ValueError, RuntimeError) as error:
        stop(error)
    return options


def parse_classes(words, names):
    """--classes as labels_of wants it: "balanced", "random", or numbers; a word that is no number
    is a class' name. The number behind the last class stands for no label. Stops for others."""
    if words in (["balanced"], ["random"]):
        return words[0]
    labels = []
    for word in words:
        name = word.removeprefix("name:")
        if word.isdecimal() and int(word) <= len(names):
            labels.append(int(word))
        elif name in names:
            labels.append(names.index(name))
        else:
            stop(f"--classes {word}: want balanced, random, numbers from 0 to {len(names)} (which "
                 f"is no label), or names of classes, such as name:{names[0]}")
    return labels


def main():
    """Do what the flags say, in this process of perhaps several."""
    cfg = parse_arguments()
    join_processes()
    tf32 = cfg.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        reconstruct(cfg) if cfg.reconstruct else sample_run(cfg)
    except DataError as error:                                      # now the bar is closed
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
