"""Sample a trained run or published weights; read masks, depth and features off the latents; show how it works.

    python sample.py --run runs/scenes/aligned --num 60 --out samples.npz --tasks segmentation depth features
    python sample.py --model SiT-XL/2 --ckpt SiT-XL-2-256.pt --vae FOLDER --classes 207 360 --num 8 --out cats.npz
    torchrun --nproc_per_node=8 -- sample.py --run runs/NAME --num 50000 --cfg-scale 1.5 --out samples.npz
    python sample.py --run runs/NAME --trajectory --out trajectory.png
    python sample.py --run runs/NAME --interpolate 0 3 --out between.png
    python sample.py --reconstruct images.zip --vae FOLDER --out rec.npz

The "--" keeps torchrun from reading --run and --num as abbreviations of its own flags.

Image i is a function of (seed, i) and the options: up to float rounding it is the same in any batch, on any number of
processes, also after a kill; the same command goes on where it stopped. samples.npz holds arr_0 (N, H, W, 3) uint8 and
arr_1 (N,) labels; --out DIR and --out X.zip get PNG files and X-labels.npy instead. Beside it: .png shows some, .json
has the options, -tasks.npz what was read off the latents, -tasks.png shows that. --reconstruct passes images through
the autoencoder instead: rec.npz and rec-originals.npz are what rFID compares, rec.json has PSNR, SSIM and LPIPS.
"""
import argparse
import contextlib
import copy
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

import align
import dit
import sit
from vae import LPIPS, AutoencoderKL, atomic_file, load_strict, load_weights, psnr, ssim

# ---------------------------------------------------------------------------------------------------------------------
# Processes and mistakes

def process():
    """(rank, local_rank, world_size), as torchrun sets them; (0, 0, 1) without it."""
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in defaults.items())


def device_of_process():
    """The GPU of this process, else the CPU."""
    return torch.device("cuda", process()[1]) if torch.cuda.is_available() else torch.device("cpu")


def join_processes():
    """Take this process' GPU, and begin to talk to the others where there are any. torchrun --max-restarts keeps its
    store, with the addresses of the dead in it, so every start has keys of its own. An hour is for downloads, for which
    the others wait."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device_of_process())
    if process()[2] > 1:
        store, rank, world_size = next(rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=1))


def barrier():
    """Wait for all processes."""
    if process()[2] > 1:
        dist.barrier()


def first_on_node(load):
    """load() in the very first process, then in the first of every other node, then in the others: what it fetches is
    there for them, whether nodes share a disk or not."""
    rank, local_rank, _ = process()
    mine, loaded = 0 if rank == 0 else 1 if local_rank == 0 else 2, None
    for turn in range(3):
        if turn == mine:
            loaded = load()
        barrier()
    return loaded


def progress(total, description, unit, initial=0):
    """A tqdm bar of rank 0. REALS_BAR is its line where stages run side by side."""
    return tqdm(total=total, desc=description, unit=unit, initial=initial, disable=process()[0] > 0, leave=False,
                position=int(os.environ.get("REALS_BAR", 0)), mininterval=0.5 if sys.stderr.isatty() else 60)


def stop(message):
    """A mistake of the user: one line, exit status 2. An exception from a loader's worker comes with its traceback, of
    which the last line is the message. What all processes find is said by the first one: torchrun ends the others, who
    wait for that."""
    if process()[0] > 0:
        time.sleep(3)
    line = str(message).splitlines()[-1].split("DataError: ")[-1]
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def to_uint8(x):
    """Images (N, 3, H, W) in [-1, 1] -> uint8, by rounding."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images, device):
    """uint8 images -> floats in [-1, 1]."""
    return images.to(device, non_blocking=True).to(torch.get_default_dtype()) / 127.5 - 1


def sheet(columns, scale=None, gap=2, legend=None, rows=()):
    """PIL image of columns side by side: {title: images (rows, per_row, 3, H, W), uint8 or in [0, 1]}, enlarged to at
    least 64 pixels; left of them the names of the rows, below them a legend {name: colour in [0, 1]}."""
    font, parts = ImageFont.load_default(13), []
    for title, images in columns.items():
        if images.dtype != torch.uint8:
            images = (images * 255).round().to(torch.uint8)
        num_rows, per_row, _, H, W = images.shape
        scale = scale or max(1, 64 // W)
        images = F.pad(images, (0, gap, 0, gap), value=255)
        page = images.permute(0, 3, 1, 4, 2).reshape(num_rows * (H + gap), per_row * (W + gap), 3).cpu().numpy()
        picture = Image.fromarray(page).resize((page.shape[1] * scale, page.shape[0] * scale), Image.NEAREST)
        width = max(picture.width, math.ceil(font.getlength(title)) + 8)
        part = Image.new("RGB", (width, picture.height + 20), "white")
        part.paste(picture, (0, 20))
        ImageDraw.Draw(part).text((2, 2), title, fill="black", font=font)
        parts.append(part)
    if rows:
        part = Image.new("RGB", (math.ceil(max(map(font.getlength, rows))) + 2, parts[0].height), "white")
        for k, name in enumerate(rows):
            middle = 20 + (k + 0.5) * scale * (H + gap) - gap
            ImageDraw.Draw(part).text((2, middle), name, fill="black", font=font, anchor="lm")
        parts.insert(0, part)
    width, height = sum(p.width for p in parts) + 12 * (len(parts) - 1), max(p.height for p in parts)
    places, left, top = [], 0, height + 6
    for name in legend or ():
        step = math.ceil(font.getlength(name)) + 36
        left, top = (0, top + 20) if left + step > width and left else (left, top)
        places.append((name, left, top))
        left += step
    canvas = Image.new("RGB", (width, top + 20 if places else height), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + 12
    for name, x, y in places:
        color = tuple(round(255 * float(value)) for value in legend[name])
        draw.rectangle((x + 2, y + 2, x + 14, y + 14), fill=color)
        draw.text((x + 20, y), name, fill="black", font=font)
    return canvas


def scatter(panels, labels, names, size=420):
    """PIL image of points in the plane, {title: (N, 2)}, side by side, coloured by labels (N,), with a legend of up to
    20 names."""
    count = int(labels.max()) + 1
    colors = [tuple(c) for c in (align.mask_palette(count) * 255).round().int().tolist()]
    pages = []
    for points in panels.values():
        page = Image.new("RGB", (2 * size, 2 * size), "white")                   # twice as large, then smoothed
        low, high = points.min(0).values, points.max(0).values
        places = ((points - low) / (high - low).max() * (2 * size - 24) + 12).tolist()
        for (x, y), label in zip(places, labels.tolist()):
            ImageDraw.Draw(page).ellipse((x - 6, y - 6, x + 6, y + 6), fill=colors[label])
        page = torch.from_numpy(np.array(page.resize((size, size), Image.LANCZOS))).permute(2, 0, 1)
        pages.append(page[None, None])
    shown = {name: align.mask_palette(count)[i] for i, name in enumerate(names[:count])} if count <= 20 else None
    return sheet(dict(zip(panels, pages)), scale=1, legend=shown)


def legend_of(masks, classes):
    """{name: colour} of up to 20 classes that occur in masks (N, H, W), the most frequent ones first."""
    counts = torch.bincount(masks.flatten().cpu(), minlength=len(classes))
    found = [int(k) for k in counts.argsort(descending=True)[:20] if counts[k]]
    return {classes[k]: align.mask_palette(len(classes))[k] for k in sorted(found)}


def by_class(images, labels, num_classes, per_row):
    """(classes, row, ...) images of the num_classes most frequent classes, in order: per_row, or what the smallest
    has; and which classes these are."""
    counts = torch.bincount(labels)
    classes = counts.argsort(descending=True, stable=True)[:num_classes]
    classes = classes[counts[classes] > 0].sort().values.tolist()
    per_row = min(per_row, min(int(counts[k]) for k in classes))
    return images[torch.stack([torch.nonzero(labels == k).flatten()[:per_row] for k in classes])], classes


def save_picture(picture, path):
    """Write a PIL picture as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def write_json(value, path):
    """Write JSON, whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path):
    """What write_json wrote; stops where it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        stop(f"{path} is damaged ({error}): delete it, and run again what wrote it")


# ---------------------------------------------------------------------------------------------------------------------
# Models of a run

FAMILIES = {"sit": (sit, sit.SiT), "dit": (dit, dit.DiT)}


def load_autoencoder(folder):
    """An autoencoder from a folder of diffusers' layout; stops with one line where there is none."""
    try:
        return AutoencoderKL.from_pretrained(folder)
    except (FileNotFoundError, ValueError) as error:
        stop(error)


def autoencoder_folder(run):
    """The folder of a run's autoencoder: `align` where there is one, else `vae`."""
    return next((run / name for name in ("align", "vae") if (run / name / "config.json").is_file()), run / "vae")


def checksum(path):
    """sha256 of a file of weights, or of the one in an autoencoder's folder; stops where there is none."""
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    for file in (path, *(path / name for name in names)):
        if file.is_file():
            with open(file, "rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
    stop(f"{path}/{names[0]} (or .bin) not found: want the folder of an autoencoder")


def load_run(run, family):
    """A run's stage sit or dit, with EMA weights, and the autoencoder whose latents it was trained on, as an object:
    `module`, `model`, `vae`, `folder` (the autoencoder's), `objective` (what the model predicts, as options of its
    sampler), `classes` (names) and `weights` (of what: sha256). Stops where something is missing or has changed."""
    folder = run / family
    if not (folder / "ema.safetensors").is_file():
        stop(f"{folder}/ema.safetensors not found: run train.py --stage {family} --out {run} first")
    settings, (module, network) = read_json(folder / "settings.json"), FAMILIES[family]
    model = network(**read_json(folder / "config.json"))
    try:
        load_strict(model, load_weights(folder / "ema.safetensors"), folder / "ema.safetensors")
    except ValueError as error:
        stop(error)
    vae = Path(settings["vae"]) if Path(settings["vae"]).is_dir() else run / Path(settings["vae"]).name
    if checksum(vae) != settings["autoencoder"]:
        stop(f"{vae} is not the autoencoder that {folder} was trained with: put that one back")
    return SimpleNamespace(
        module=module, model=model.eval(), vae=load_autoencoder(vae), folder=vae,
        objective={name: settings[name] for name in ("path", "prediction") if name in settings},
        classes=settings.get("classes") or [str(k) for k in range(model.num_classes)],
        weights={"transformer": checksum(folder / "ema.safetensors"), "autoencoder": settings["autoencoder"]})


def transformer_weights(path):
    """State dict of a file: .safetensors, a bare .pt, or the average ("ema", else "model" or "state_dict") of a
    training checkpoint, of the official SiT and DiT too, where an argparse.Namespace is among the other contents."""
    if path.suffix == ".safetensors" or not path.is_file():
        return load_weights(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                                   # damaged bytes raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read ({reason}): fetch the file anew") from None
    if isinstance(weights, dict):
        names = [name for name in ("ema", "model", "state_dict") if isinstance(weights.get(name), dict)]
        weights = weights[names[0]] if names else weights
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise ValueError(f"{path} is no state dict: want the weights of a SiT or DiT")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def load_published(name, path, vae):
    """What load_run gives, for a transformer "SiT-XL/2" or "DiT-XL/2" with weights from a file, and an autoencoder's
    folder or file. The name tells depth, width and heads; the shapes of the weights tell the rest. Stops with one line
    for what does not fit together."""
    family = name.partition("-")[0].lower()
    module, network = FAMILIES.get(family, FAMILIES["sit"])                      # another name is refused below
    autoencoder = load_autoencoder(vae)
    try:
        weights, config = transformer_weights(path), module.size_arguments(name, network.__name__)
        try:
            (_, in_channels, patch, _), rows = (weights[f"{key}.weight"].shape for key in (
                "x_embedder.proj", "y_embedder.embedding_table"))
            tokens, out = weights["pos_embed"].shape[1], weights["final_layer.linear.weight"].shape[0]
        except (KeyError, ValueError):
            raise ValueError(f"{path} does not hold the weights of a {network.__name__}") from None
        model = network(**config, input_size=math.isqrt(tokens) * patch, in_channels=in_channels,
                        num_classes=rows[0] - 1, learn_sigma=out == 2 * in_channels * patch ** 2)
        load_strict(model, weights, path)
    except (FileNotFoundError, ValueError) as error:
        stop(f"--model {name}: {error}")
    if autoencoder.config["latent_channels"] != in_channels:
        stop(f"{vae} has latents of {autoencoder.config['latent_channels']} channels, {path} wants {in_channels}: "
             "give --vae the autoencoder that it was trained with")
    return SimpleNamespace(module=module, model=model.eval(), vae=autoencoder, folder=vae, objective={},
                           classes=[str(k) for k in range(model.num_classes)],
                           weights={"transformer": checksum(path), "autoencoder": checksum(vae)})


def load_lpips():
    """LPIPS with the published weights; stops with one line where they cannot be had."""
    try:
        return first_on_node(LPIPS.from_published)
    except (OSError, ValueError) as error:
        stop(error)


def load_heads(folder):
    """AlignmentHeads that stage align wrote into its folder."""
    if not (folder / "heads.safetensors").is_file():
        stop(f"{folder}/heads.safetensors not found: masks, depth and features need a run of train.py --stage align")
    heads = align.AlignmentHeads(**read_json(folder / "heads.json"))
    try:
        load_strict(heads, load_weights(folder / "heads.safetensors"), folder / "heads.safetensors")
    except ValueError as error:
        stop(error)
    return heads.eval()


def load_task_heads(sources):
    """Heads for masks and depth, from folders of stage teacher or heads and from published names, as an object with
    `segmentation` and `depth` (or None), `depth_normed` (published depth heads want features before the last norm) and
    `classes`, the names of the segments. Stops with one line for what is neither."""
    found = SimpleNamespace(segmentation=None, depth=None, depth_normed=True, classes=())
    for source in sources:
        folder = Path(source)
        if (folder / "heads.json").is_file():
            config = read_json(folder / "heads.json")
            if "segmentation" not in config:
                stop(f"{folder} holds the MLPs of stage align: want the folder of stage heads or teacher")
            for name, network in (("segmentation", align.SegmentationHead), ("depth", align.DepthHead)):
                if config[name]:
                    head, file = network(**config[name]), folder / f"{name}_head.safetensors"
                    try:
                        load_strict(head, load_weights(file), file)
                    except (OSError, ValueError) as error:
                        stop(error)
                    setattr(found, name, head.eval())
                    if name == "depth":
                        found.depth_normed = True
            found.classes = config["classes"] or found.classes
            continue
        if str(source).startswith("dinov2_"):
            try:
                head = first_on_node(lambda: align.load_head(str(source)))
            except (OSError, ValueError) as error:
                stop(error)
            if isinstance(head, align.ClassificationHead):
                stop(f"--heads {source} tells classes: want heads for masks or depth")
            if isinstance(head, align.DepthHead):
                found.depth, found.depth_normed = head, False
            else:
                found.segmentation = head
                found.classes = [f"class {k}" for k in range(head.conv_seg.out_channels)]
            continue
        stop(f"{source}: no heads.json there, and no published head of this name: run train.py --stage heads first, or "
             "give --heads dinov2_vitb14_ade20k_linear_head or the like")
    return found


@torch.no_grad()
def read_tasks(task_heads, size, features, cls_token, raw=None):
    """Masks and depth, each (N, size, size), from features (N, D, gh, gw) and class tokens (N, D), normed; None for
    what there is no head for. `raw` are both before the norm, for a depth head that wants them so."""
    def enlarged(x):
        return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)

    masks = enlarged(task_heads.segmentation(features)).argmax(1) if task_heads.segmentation else None
    pair = (features, cls_token) if task_heads.depth_normed else raw
    return masks, enlarged(task_heads.depth(*pair))[:, 0] if task_heads.depth else None


@torch.no_grad()
def read_latents(heads, task_heads, z, size):
    """Masks and depth from latents (N, C, h, w): what read_tasks gives for the features that the MLPs make of them."""
    normed = task_heads.depth is None or task_heads.depth_normed
    raw = None if normed else (heads.feature_map(z, normed=False), heads.class_token(z, normed=False))
    return read_tasks(task_heads, size, heads.feature_map(z), heads.class_token(z), raw)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays on disk, filled by all processes, and what they become

class Rows:
    """Arrays on disk of which every process fills some rows, in a hidden folder beside `out`, with a mark for every row
    that is done: a killed program goes on from there.

    shape: rows, in one or more dimensions; put() counts them through. arrays: name=(shape of a row, dtype). options:
    what else the rows depend on; stops where the folder holds rows of others. All the disk space is taken at once, so
    that a full disk shows before any work.
    """

    def __init__(self, out, shape, options, **arrays):
        self.folder = self.folder_of(out)
        path, arrays = self.folder / "options.json", dict(arrays, done=((), bool))
        options = {**options, "arrays": {name: [*shape, *row, np.dtype(dtype).name]
                                         for name, (row, dtype) in arrays.items()}}
        if process()[0] == 0 and path.is_file():
            differ(read_json(path), options, self.folder)
        elif process()[0] == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                self.folder.mkdir(parents=True)
                for name, (row, dtype) in arrays.items():
                    np.lib.format.open_memmap(self.path(name), "w+", dtype, (*shape, *row))
                    if hasattr(os, "posix_fallocate"):                           # not on macOS
                        with open(self.path(name), "r+b") as file:
                            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
                write_json(options, path)
            except OSError as error:
                shutil.rmtree(self.folder, ignore_errors=True)
                stop(f"{self.folder} cannot be written ({error.strerror}): make room there or choose another --out")
        barrier()
        self.arrays = {name: np.load(self.path(name), mmap_mode="r+") for name in arrays}
        self.count, self.pending, self.flushed = math.prod(shape), [], time.monotonic()
        self.todo = np.flatnonzero(~self.arrays["done"].reshape(-1))
        barrier()                                                                # before anyone marks a row

    @staticmethod
    def folder_of(out):
        return out.with_name(f".{out.name}.partial")

    def path(self, name):
        return self.folder / f"{name}.npy"

    def batches(self, size):
        """This process' share of the batches that are not done. How the rows are cut into batches does not depend on
        the number of processes nor on what is done already."""
        rank, _, world_size = process()
        starts = np.array_split(np.unique(self.todo // size) * size, world_size)[rank]
        return [np.arange(start, min(start + size, self.count)) for start in starts.tolist()]

    def put(self, rows, **values):
        """Write numpy arrays (len(rows), ...); now and then, what is written goes to the disk and is marked as done."""
        for name, value in values.items():
            array = self.arrays[name]
            array.reshape(self.count, *value.shape[1:])[rows] = value
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
            stop(f"{place} has {name} = {before.get(name)}, not {value}: choose another --out, or delete it")


def is_done(cfg, options):
    """Whether --out is there, of these options; stops where it is of others."""
    path = cfg.out.with_suffix(".json")
    if not cfg.out.exists():
        for other in (cfg.out.with_suffix(ending) for ending in (".npz", ".zip", "")):
            if path.is_file() and other.exists():
                stop(f"--out {cfg.out}: {other} is there, with which it would share {path}: choose another name")
        return False
    if not path.is_file():
        stop(f"--out {cfg.out} exists: choose another name or delete it")
    differ(read_json(path), options, cfg.out)
    if process()[0] == 0:
        shutil.rmtree(Rows.folder_of(cfg.out), ignore_errors=True)               # killed at the very end
        print(f"{cfg.out} is done already")
    return True


def pack(path, **files):
    """Write an uncompressed .npz of .npy files {entry: path}, never holding one in memory."""
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, source in files.items():
            archive.write(source, f"{name}.npy")


def beside(path, ending):
    """samples.npz, samples.zip or the folder samples, and "-tasks.png" -> samples-tasks.png."""
    return path.with_name(path.stem + ending)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

class Noise:
    """Standard normal noise for image numbers: noise(i), (N, *shape), is that of a sampler's step i. A function of
    (seed, number) alone for a sampler that asks for every step once and in order; the first draw is where it starts."""

    def __init__(self, seed, numbers, shape, device):
        keys = [np.random.SeedSequence([seed, n, 0]).generate_state(1, np.uint64)[0] >> np.uint64(1) for n in numbers]
        self.generators = [torch.Generator().manual_seed(int(key)) for key in keys]
        self.shape, self.device, self.pinned = shape, device, device.type == "cuda"

    def __call__(self, step=0):
        noise = torch.empty(len(self.generators), *self.shape, dtype=torch.float32, pin_memory=self.pinned)
        for generator, row in zip(self.generators, noise):
            torch.randn(self.shape, generator=generator, out=row)
        return noise.to(self.device, torch.get_default_dtype(), non_blocking=True)


@torch.no_grad()
def generate(module, model, numbers, labels, seed, device, **options):
    """Latents (N, C, h, w), as the model sees them, of image numbers and their labels."""
    noise = Noise(seed, numbers, (model.in_channels, model.input_size, model.input_size), device)
    return module.sample(model, noise(), labels.to(device), noise=noise, **options)


@torch.no_grad()
def decode(vae, z, batch_size=None):
    """Images (N, 3, H, W) uint8 of latents (N, C, h, w) as the model sees them, `batch_size` at once; by default as
    many as have 2^16 pixels, which was fastest on a CPU, or on a GPU, where nobody has measured it, 2^20."""
    pixels = 2 ** 20 if z.is_cuda else 2 ** 16
    batch_size = batch_size or max(1, pixels // (z.shape[-1] * vae.factor) ** 2)
    return torch.cat([to_uint8(vae.decode(vae.denormalize(part)).sample) for part in z.split(batch_size)])


def labels_of(classes, numbers, num_classes, seed):
    """Labels (N,) of image numbers: "balanced" counts through the classes, "random" draws one for every number, a list
    is gone through again and again."""
    if classes == "balanced":
        return torch.tensor([number % num_classes for number in numbers])
    if classes == "random":
        keys = (np.random.SeedSequence([seed, number, 1]).generate_state(1, np.uint64)[0] for number in numbers)
        return torch.tensor([int(key % np.uint64(num_classes)) for key in keys])
    return torch.tensor([classes[number % len(classes)] for number in numbers])


def parse_classes(words, names):
    """--classes as labels_of wants it: "balanced", "random", or numbers; a word may be a class' name. Stops for others.
    The number behind the last class stands for no label."""
    if words in (["balanced"], ["random"]):
        return words[0]
    for word in words:
        if word not in names and not (word.isdecimal() and int(word) <= len(names)):
            stop(f"--classes {word}: want balanced, random, numbers from 0 to {len(names)} (which is no label), or "
                 f"names of classes, such as {names[0]!r}")
    return [names.index(word) if word in names else int(word) for word in words]


def sampler_options(cfg, source):
    """All options of the family's sampler: its defaults, what the model was trained for, the flags. Stops for an option
    that it does not have, and for values that it refuses."""
    signature = inspect.signature(source.module.trajectory).parameters
    options = {name: p.default for name, p in signature.items() if p.default is not p.empty}
    for name in ("noise", "reverse"):
        del options[name]
    given = {name: getattr(cfg, name) for name in SAMPLER_FLAGS if getattr(cfg, name) is not None}
    for name, value in given.items():
        flag = flag_of(name)
        if name not in options:
            stop(f"{flag} is no option of {source.module.__name__}.py's samplers")
        if name in source.objective and source.objective[name] != value:
            stop(f"{flag} {value}: the model was trained with {source.objective[name]}")
        if name == "num_steps" and source.module is sit and not isinstance(value, int):
            stop(f"{flag} {value}: SiT wants a number")
    options = {**options, **source.objective, **given}
    options["cfg_interval"] = tuple(options["cfg_interval"])
    if options.get("last_step") == "none":
        options["last_step"] = None

    def silent(x, t, y):
        return torch.zeros_like(x)

    silent.num_classes = source.model.num_classes
    try:                                                                         # say now what is wrong
        source.module.sample(silent, torch.zeros(1, source.model.in_channels, 1, 1), torch.tensor([0]), **options)
    except (ValueError, RuntimeError) as error:
        stop(error)
    return options


def load_source(cfg, device):
    """What --run, or --model, --ckpt and --vae, name: see load_run. In --precision, on the device."""
    source = load_run(cfg.run, cfg.family) if cfg.run else load_published(cfg.model, cfg.ckpt, cfg.vae)
    source.options = sampler_options(cfg, source)
    source.labels = parse_classes(cfg.classes, source.classes)
    count = source.model.num_classes
    if source.model.y_embedder.embedding_table.num_embeddings == count and (
            source.options["cfg_scale"] != 1 or count in list(source.labels)):
        stop("the model was trained without label dropout and knows no missing label: want --cfg-scale 1, and "
             f"--classes below {count}")
    if cfg.precision == "fp64":
        torch.set_default_dtype(torch.float64)
    source.model, source.vae = (net.to(device, torch.get_default_dtype()) for net in (source.model, source.vae))
    return source


def autocast(cfg, device):
    """bfloat16 for the transformer, with --precision bf16. The decoder never: it would add noise to the grey levels."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")


@contextlib.contextmanager
def timed(seconds, name, device):
    """Add the time that the block takes on its device to seconds[name]."""
    def now():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    yield
    seconds[name] = seconds.get(name, 0) + now() - start


def sample_all(cfg, source, work, device):
    """Fill `work` with images, and with latents where it has a place for them."""
    seconds, start = {}, time.perf_counter()
    batches = work.batches(cfg.batch_size)
    total, left = math.ceil(work.count / process()[2]), sum(map(len, batches))
    with progress(total, f"sample {cfg.run or cfg.model}", "image", max(0, total - left)) as bar:
        for numbers in batches:
            labels = labels_of(source.labels, numbers.tolist(), source.model.num_classes, cfg.seed)
            with timed(seconds, "sampler", device), autocast(cfg, device):
                z = generate(source.module, source.model, numbers.tolist(), labels, cfg.seed, device, **source.options)
            with timed(seconds, "decoder", device):
                images = decode(source.vae, z, cfg.decode_batch_size)
            values = {"images": images.permute(0, 2, 3, 1), "latents": source.vae.denormalize(z)}
            work.put(numbers, **{name: x.cpu().numpy() for name, x in values.items() if name in work.arrays})
            bar.update(len(numbers))
    work.finish()
    total = time.perf_counter() - start
    if process()[0] == 0 and batches:
        shares = ", ".join(f"{name} {value / total:.1%}" for name, value in seconds.items())
        print(f"{left} images by this process in {total:.1f} s: {shares}, else {1 - sum(seconds.values()) / total:.1%}")


def load_readers(cfg, source, device):
    """The MLPs and the heads for --tasks; stops where one is missing or does not fit."""
    heads, task_heads = load_heads(source.folder).to(device, torch.get_default_dtype()), None
    if set(cfg.tasks) != {"features"}:
        settings = source.folder / "settings.json"
        if not cfg.heads and not settings.is_file():
            stop(f"--tasks: {settings} does not tell the teacher, since it is not there: give --heads")
        teacher = Path(cfg.heads[0] if cfg.heads else read_json(settings)["teacher"])
        moved = source.folder.parent.parent / teacher.name                       # with the whole run, from elsewhere
        if not cfg.heads and str(teacher) in align.DINOV2:
            stop(f"--tasks: the teacher is {teacher}, of which there are several heads: give --heads")
        task_heads = load_task_heads(cfg.heads or [teacher if teacher.is_dir() else moved])
        for name in ("segmentation", "depth"):
            head = getattr(task_heads, name) if name in cfg.tasks else None
            if name in cfg.tasks and head is None:
                stop(f"--tasks {name}: no head for it in {cfg.heads or 'the folder of the teacher'}: see --heads")
            setattr(task_heads, name, head.to(device, torch.get_default_dtype()) if head else None)
        z = torch.zeros(1, heads.config["latent_channels"], *2 * [source.model.input_size], device=device)
        try:                                                                     # say now what does not fit
            read_latents(heads, task_heads, z, 32)
        except ValueError as error:
            stop(error)
    return heads, task_heads


@torch.no_grad()
def read_all(cfg, options, latents, size, heads, task_heads, device):
    """-tasks.npz from latents (N, C, h, w) on disk: `segmentation` (N, H, W) class numbers, `depth` (N, H, W) metres or
    what the head was trained with, `features` (N, gh, gw, 3) uint8, principal components as colours, which are those of
    the first 100 images. All processes work on it."""
    def rows(numbers):
        return torch.from_numpy(latents[numbers]).to(device)

    first = heads.feature_map(rows(np.arange(min(100, len(latents)))))
    colors, shapes = align.pca_colors(first), {}
    if task_heads and task_heads.segmentation:
        shapes["segmentation"] = (size, size), np.uint8 if len(task_heads.classes) <= 256 else np.int16
    if task_heads and task_heads.depth:
        shapes["depth"] = (size, size), np.float32
    if "features" in cfg.tasks:
        shapes["features"] = (*first.shape[2:], 3), np.uint8
    path = beside(cfg.out, "-tasks.npz")
    work = Rows(path, (len(latents),), options, **shapes)
    with progress(work.count, f"read {', '.join(cfg.tasks)}", "image", work.count - len(work.todo)) as bar:
        for numbers in work.batches(cfg.batch_size):
            z, found = rows(numbers), {}
            if task_heads is not None:
                found["segmentation"], found["depth"] = read_latents(heads, task_heads, z, size)
            if "features" in cfg.tasks:
                rgb = align.pca_rgb(heads.feature_map(z), colors)
                found["features"] = (rgb * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            work.put(numbers, **{name: x.cpu().numpy() for name, x in found.items() if x is not None})
            bar.update(len(numbers))
    work.finish()
    if process()[0] == 0:
        pack(path, **{name: work.path(name) for name in shapes})
    return work


def name_of(classes, label):
    """The class' name; the label behind the last one is none."""
    return classes[label] if label < len(classes) else "no label"


def task_sheet(images, found, labels, classes, segments):
    """Picture of images (N, H, W, 3) beside what was read off their latents, a row a class. `classes` and `segments`
    are names."""
    rows, shown = by_class(torch.arange(len(labels)), labels, 10, 6)
    size, legend = images.shape[1], None

    def picture(array):
        return torch.from_numpy(array[rows.flatten().numpy()])

    columns = {"generated": picture(images).permute(0, 3, 1, 2)}
    if "segmentation" in found:
        masks = picture(found["segmentation"]).long()
        columns["mask"], legend = align.colorize_mask(masks, len(segments)), legend_of(masks, segments)
    if "depth" in found:
        columns["depth"] = align.colorize_depth(picture(found["depth"]))
    if "features" in found:
        rgb = picture(found["features"]).permute(0, 3, 1, 2)
        columns["features (PCA)"] = F.interpolate(rgb, size=(size, size), mode="nearest")
    columns = {title: x.unflatten(0, rows.shape) for title, x in columns.items()}
    return sheet(columns, legend=legend, rows=[name_of(classes, k) for k in shown])


def grid(images, labels, classes, title):
    """Picture of images (N, H, W, 3) for people: of up to ten classes a row each, or side by side one of each."""
    numbers, shown = by_class(torch.arange(len(labels)), labels, 10, 12)
    x = torch.from_numpy(images[numbers.flatten().numpy()]).permute(0, 3, 1, 2).unflatten(0, numbers.shape)
    if numbers.shape[1] == 1:
        return sheet({name_of(classes, k): row[None] for k, row in zip(shown, x)})
    return sheet({title: x}, rows=[name_of(classes, k) for k in shown])


def write_pngs(images, folder):
    """Images (N, H, W, 3) as folder/000000.png and so on, each process its share."""
    folder.mkdir(exist_ok=True)
    rank, _, world_size = process()
    for number in range(rank, len(images), world_size):
        Image.fromarray(images[number]).save(folder / f"{number:06}.png")
    barrier()


def write_samples(cfg, work, labels, pngs):
    """Rank 0: the images under their final name."""
    if cfg.out.suffix == ".npz":
        np.save(work.path("labels"), labels.numpy())
        return pack(cfg.out, arr_0=work.path("images"), arr_1=work.path("labels"))
    with atomic_file(beside(cfg.out, "-labels.npy")) as file:
        np.save(file, labels.numpy())
    if cfg.out.suffix == ".zip":
        with atomic_file(cfg.out) as file, zipfile.ZipFile(file, "w") as archive:
            for path in sorted(pngs.iterdir()):
                archive.write(path, path.name)
    else:
        os.replace(pngs, cfg.out)


def sample_run(cfg, device):
    """Sample, read the tasks, and let rank 0 write everything under its name, the images last."""
    source = load_source(cfg, device)
    options = {"model": cfg.model or cfg.family, **source.weights, "num": cfg.num, "seed": cfg.seed,
               "classes": source.labels, "precision": cfg.precision, **source.options, "latents": cfg.latents,
               "tasks": sorted(cfg.tasks), "heads": cfg.heads}
    if is_done(cfg, options):
        return
    if cfg.tasks:
        heads, task_heads = load_readers(cfg, source, device)
    side, size = source.model.input_size, source.model.input_size * source.vae.factor
    arrays = {"images": ((size, size, 3), np.uint8)}
    if cfg.latents or cfg.tasks:
        kind = np.float64 if cfg.precision == "fp64" else np.float32
        arrays["latents"] = (source.model.in_channels, side, side), kind
    work = Rows(cfg.out, (cfg.num,), options, **arrays)
    sample_all(cfg, source, work, device)
    images, labels = work.arrays["images"], labels_of(source.labels, range(cfg.num), source.model.num_classes, cfg.seed)
    if cfg.tasks:
        read = read_all(cfg, options, work.arrays["latents"], size, heads, task_heads, device)
    pngs = work.folder / "png"
    if cfg.out.suffix != ".npz":
        write_pngs(images, pngs)
    if process()[0] > 0:
        return
    picture = beside(cfg.out, ".png")
    save_picture(grid(images, labels, source.classes, f"samples, guidance {options['cfg_scale']:g}"), picture)
    if cfg.latents:
        with atomic_file(beside(cfg.out, "-latents.npy")) as file, open(work.path("latents"), "rb") as latents:
            shutil.copyfileobj(latents, file)
    if cfg.tasks:
        segments = task_heads.classes if task_heads else ()
        save_picture(task_sheet(images, read.arrays, labels, source.classes, segments), beside(cfg.out, "-tasks.png"))
        print(f"{', '.join(cfg.tasks)} read off the generated latents: {beside(cfg.out, '-tasks.npz')}, -tasks.png")
        read.remove()
    write_json(options, cfg.out.with_suffix(".json"))
    write_samples(cfg, work, labels, pngs)                                       # last: where it is, all is done
    work.remove()
    print(f"{cfg.num} images in {cfg.out}, a picture of them in {picture}")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that teach: how noise becomes an image, and what lies between two images

def slerp(a, b, s):
    """a (C, h, w) at s = 0 to b at s = 1, along the sphere on which normal noise of many dimensions lies; s (K,)."""
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    s = s.view(-1, 1, 1, 1)
    return (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / angle.sin()


def with_mixed_classes(model, label_a, label_b, s):
    """A copy of the model whose class k lies at s[k] of the way from one class' vector to the other's, in a line."""
    model = copy.deepcopy(model)
    table = model.y_embedder.embedding_table.weight
    mixed = torch.lerp(table[label_a], table[label_b], s[:, None].to(table))
    model.y_embedder.embedding_table = torch.nn.Embedding.from_pretrained(
        torch.cat([mixed, table[model.num_classes:]]))                           # and the vector of no label
    model.num_classes = model.y_embedder.num_classes = len(s)
    return model


@torch.no_grad()
def interpolate(cfg, device):
    """--interpolate A B: from image number A to number B, by the noise, by the class, by both; a row each."""
    source, numbers = load_source(cfg, device), cfg.interpolate
    model, s = source.model, torch.linspace(0, 1, cfg.num, dtype=torch.get_default_dtype())
    label_a, label_b = labels_of(source.labels, numbers, model.num_classes, cfg.seed).tolist()
    shape = (model.in_channels, model.input_size, model.input_size)
    noise_a, noise_b = Noise(cfg.seed, numbers, shape, device)()
    between, still = slerp(noise_a, noise_b, s.to(device)), noise_a.expand(cfg.num, *shape)
    a, b = (name_of(source.classes, k) for k in (label_a, label_b))
    mixed, fixed = with_mixed_classes(model, label_a, label_b, s), torch.full((cfg.num,), label_a, device=device)
    walk = torch.arange(cfg.num, device=device)
    jobs = {"noise": (model, between, fixed), "class": (mixed, still, walk), "both": (mixed, between, walk)}
    pages = []
    with progress(len(jobs), "interpolate", "row") as bar:
        for network, eps, y in jobs.values() if a != b else [jobs["noise"]]:
            drawn = Noise(cfg.seed, numbers[:1], shape, device)                  # that of image A, for all alike
            drawn()
            with autocast(cfg, device):
                z = source.module.sample(network, eps, y, noise=lambda i: drawn(i).expand_as(eps), **source.options)
            pages.append(decode(source.vae, z, cfg.decode_batch_size).cpu())
            bar.update(1)
    title = f"from image {numbers[0]} ({a}) to image {numbers[1]} ({b})"
    save_picture(sheet({title: torch.stack(pages)}, rows=[*jobs][:len(pages)]), cfg.out)
    print(f"{title}: {cfg.out}")


@torch.no_grad()
def draw_trajectory(cfg, device):
    """--trajectory: images 0 to num - 1 while a sampler works, as a strip and, beside it, an animated .gif."""
    source = load_source(cfg, device)
    model, numbers = source.model, range(cfg.num)
    labels = labels_of(source.labels, numbers, model.num_classes, cfg.seed)
    noise = Noise(cfg.seed, numbers, (model.in_channels, model.input_size, model.input_size), device)
    states = [noise()]
    with progress(None, "sample", "step") as bar, autocast(cfg, device):
        for z in source.module.trajectory(model, states[0], labels.to(device), noise=noise, **source.options):
            states.append(z)
            bar.update(1)
    last, size = len(states) - 1, model.input_size * source.vae.factor
    frames = sorted({round(k) for k in np.linspace(0, last, min(last + 1, 60)).tolist()})
    strip = sorted({round(k) for k in np.linspace(0, last, min(last + 1, 9)).tolist()})
    images = {}
    for k in tqdm(sorted({*frames, *strip}), "decode", unit="frame", leave=False):
        images[k] = decode(source.vae, states[k], cfg.decode_batch_size).cpu()
    names = [name_of(source.classes, k) for k in labels.tolist()]
    save_picture(sheet({f"step {k}": images[k][:, None] for k in strip}, rows=names), cfg.out)
    per_row = math.ceil(math.sqrt(cfg.num))
    pages = []
    for k in frames:
        padded = F.pad(images[k], (0, 0, 0, 0, 0, 0, 0, -cfg.num % per_row), value=255)
        pages.append(sheet({f"step {k} of {last}": padded.unflatten(0, (-1, per_row))}, max(1, 128 // size)))
    with atomic_file(cfg.out.with_suffix(".gif")) as file:
        pages[0].save(file, format="GIF", save_all=True, append_images=pages[1:], loop=0,
                      duration=[80] * (len(pages) - 1) + [2000])
    print(f"{last} steps: {cfg.out}, and as an animation {cfg.out.with_suffix('.gif')}")


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction

METRICS = {"psnr": psnr, "ssim": ssim, "lpips": LPIPS}


@torch.no_grad()
def reconstruct(cfg, device):
    """Images of a data set through the autoencoder: originals and reconstructions as .npz, figures and a sheet. Latents
    are the means; the metrics see what is written, rounded to uint8."""
    import train                                                                 # here, since it imports this file
    vae = load_autoencoder(cfg.vae).to(device)
    size = cfg.image_size or vae.config["sample_size"]
    if size % vae.factor or size < 16:
        stop(f"--image-size {size}: want a multiple of {vae.factor}, and at least 16")
    metrics = {name: load_lpips().to(device) if name == "lpips" else METRICS[name] for name in cfg.metrics}
    try:
        data = train.open_data(train.Config(data=cfg.reconstruct, image_size=size), cfg.split)
        count = min(cfg.num or len(data), len(data))
        options = {"data": cfg.reconstruct, "split": cfg.split, "images": count, "image_size": size,
                   "autoencoder": checksum(cfg.vae), "metrics": cfg.metrics}
        if is_done(cfg, options):
            return
        image = (size, size, 3), np.uint8
        figures = {name: ((), np.float64) for name in metrics}
        work = Rows(cfg.out, (count,), options, originals=image, reconstructions=image, **figures)
        batches = work.batches(cfg.batch_size)
        keys = [[(number, False) for number in numbers.tolist()] for numbers in batches]
        with progress(count, f"reconstruct {cfg.reconstruct}", "image", count - len(work.todo)) as bar:
            for numbers, (images, *_) in zip(batches, train.load_batches(data, keys, cfg.workers)):
                x = to_float(images, device)
                rec = to_uint8(vae.decode(vae.encode(x).latent_dist.mode()).sample)
                figures = {name: measure(x, to_float(rec, device)) for name, measure in metrics.items()}
                written = dict(originals=images.permute(0, 2, 3, 1), reconstructions=rec.permute(0, 2, 3, 1), **figures)
                work.put(numbers, **{name: value.cpu().numpy() for name, value in written.items()})
                bar.update(len(x))
    except train.DataError as error:
        stop(error)
    work.finish()
    if process()[0] > 0:
        return
    per_row = min(4, count)
    columns = {name: torch.from_numpy(work.arrays[name][:min(16, count) // per_row * per_row])
               for name in ("originals", "reconstructions")}
    save_picture(sheet({name: x.permute(0, 3, 1, 2).unflatten(0, (-1, per_row)) for name, x in columns.items()}),
                 beside(cfg.out, ".png"))
    figures = {name: work.arrays[name].mean().item() for name in metrics}
    originals = beside(cfg.out, "-originals.npz")
    pack(originals, arr_0=work.path("originals"))
    write_json({**options, **figures}, cfg.out.with_suffix(".json"))
    pack(cfg.out, arr_0=work.path("reconstructions"))                            # last: where it is, all is done
    work.remove()
    print(f"{count} images: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    print(f"{originals} and {cfg.out} are ready; {beside(cfg.out, '.png')} shows some")


# ---------------------------------------------------------------------------------------------------------------------
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


SAMPLER_FLAGS = {                                                                # name: (type, help)
    "sampler": (str, f"SiT: {', '.join(sit.ODE_SAMPLERS + sit.SDE_SAMPLERS)} (default heun); DiT: ddpm, ddim "
                "(default ddpm)"),
    "num_steps": (steps, "steps of the sampler (default 50; DiT 250, where also ddim50 or 10,15,20 can be said)"),
    "cfg_scale": (number, "guidance; 1 is none (default 1)"),
    "cfg_interval": (number, "noise levels that are guided, LOW HIGH: 1 is noise, 0 is data (default 0 1)"),
    "cfg_channels": (int, "guide so many of the latent's channels; the official SiT and DiT guide 3 (default: all)"),
    "path": (str, "SiT: linear, gvp, vp (a run tells it; default linear)"),
    "prediction": (str, "what the model predicts: velocity, noise, score, or DiT's noise, x_start (a run tells it)"),
    "sample_eps": (number, "SiT: distance from the ends of time"),
    "atol": (number, "SiT, dopri5 (default 1e-6)"),
    "rtol": (number, "SiT, dopri5 (default 1e-3)"),
    "diffusion_form": (str, "SiT, SDEs: constant, sbdm, sigma (default), linear, decreasing, increasing-decreasing"),
    "diffusion_norm": (number, "SiT, SDEs: factor of the form (default 1)"),
    "last_step": (str, "SiT, SDEs: mean, tweedie, euler, none (default mean)"),
    "last_step_size": (number, "SiT, SDEs (default 0.04)"),
    "schedule": (str, "DiT: linear, squaredcos_cap_v2 (default linear)"),
    "fixed_variance": (str, "DiT without learned variance: large, small (default large)"),
    "clip_denoised": (bool, "DiT: hold every x_start in [-1, 1]"),
    "eta": (number, "DiT, ddim: noise, 0 for none to 1 for that of ddpm (default 0)"),
}


def flag_of(name):
    """A setting as a word of the command."""
    return f"--{name.replace('num_steps', 'steps').replace('_', '-')}"


def parse_arguments():
    """The flags, once they make sense."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = stop                                                          # one line, without the usage
    parser.add_argument("--run", type=Path, help="folder of a run: autoencoder and stage sit or dit")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="sit", help="which diffusion model of the run")
    parser.add_argument("--model", help="instead of a run: SiT-XL/2, DiT-XL/2 and the like, with --ckpt and --vae")
    parser.add_argument("--ckpt", type=Path, help="weights of --model: .pt or .safetensors")
    parser.add_argument("--vae", type=Path, help="autoencoder: its folder, or one file of its weights")
    parser.add_argument("--out", type=Path, required=True, help="X.npz, X.zip, or a folder X for PNG files; pictures "
                        "go beside it. With --trajectory and --interpolate a .png")
    parser.add_argument("--num", type=int, help="number of images (default: 100 samples, all reconstructions, 4 "
                        "trajectories, 9 steps of an interpolation)")
    parser.add_argument("--classes", nargs="+", default=["balanced"], metavar="CLASS", help="balanced (default), "
                        "random, or numbers or names, gone through again and again")
    parser.add_argument("--batch-size", type=int, default=100, help="images at once on a process")
    parser.add_argument("--decode-batch-size", type=int, help="latents that are decoded at once (default: see decode)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp64"), default="fp32",
                        help="bf16 is for the transformer only")
    sampler = parser.add_argument_group("options of the samplers; sit.sample and dit.sample explain them")
    for name, (kind, text) in SAMPLER_FLAGS.items():
        how = dict(action="store_true", default=None) if kind is bool else dict(type=kind)
        if name == "cfg_interval":
            how.update(nargs=2, metavar=("LOW", "HIGH"))
        sampler.add_argument(flag_of(name), dest=name, help=text, **how)
    parser.add_argument("--tasks", nargs="+", default=[], choices=("segmentation", "depth", "features"),
                        help="read these off the generated latents, as arrays and as a picture")
    parser.add_argument("--heads", nargs="+", default=[], help="for --tasks: folders of stage heads or teacher, or "
                        "names of published heads (default: the folder of the run's teacher)")
    parser.add_argument("--latents", action="store_true", help="write the latents too, as OUT-latents.npy")
    parser.add_argument("--trajectory", action="store_true", help="no samples: a picture of how noise becomes images")
    parser.add_argument("--interpolate", type=int, nargs=2, metavar=("A", "B"), help="no samples: a picture of "
                        "what lies between images number A and B")
    parser.add_argument("--reconstruct", metavar="DATA", help="no samples: images of this folder or .zip, or scenes, "
                        "through the autoencoder")
    parser.add_argument("--split", choices=("test", "train", "all"), default="test", help="reconstruct: which images")
    parser.add_argument("--image-size", type=int, help="reconstruct: pixels a side (default: the autoencoder's)")
    parser.add_argument("--workers", type=int, default=0, help="reconstruct: processes that load images")
    parser.add_argument("--metrics", nargs="*", default=sorted(METRICS), choices=sorted(METRICS),
                        help="reconstruct: what to measure (default: all)")
    cfg = parser.parse_args()
    if cfg.reconstruct and (cfg.run or cfg.model or not cfg.vae):
        stop("--reconstruct wants --vae FOLDER, and no --run or --model")
    if not cfg.reconstruct and bool(cfg.run) == bool(cfg.model):
        stop("give --run FOLDER, or --model, --ckpt and --vae, to sample; or --reconstruct DATA --vae FOLDER")
    if cfg.model and not (cfg.ckpt and cfg.vae):
        stop("--model wants --ckpt FILE and --vae FOLDER")
    if cfg.run and (cfg.ckpt or cfg.vae):
        stop("--run has its own weights: give no --ckpt and no --vae")
    teaching = cfg.trajectory or cfg.interpolate is not None
    if cfg.trajectory + bool(cfg.interpolate) + bool(cfg.reconstruct) > 1:
        stop("--trajectory, --interpolate and --reconstruct are one or the other")
    if teaching and (cfg.tasks or cfg.latents or process()[2] > 1):
        stop("--trajectory and --interpolate want one process, no --tasks and no --latents")
    for name in ((*SAMPLER_FLAGS, "family", "ckpt", "classes", "decode_batch_size", "seed", "tasks", "heads", "latents")
                 if cfg.reconstruct else ("split", "image_size", "workers", "metrics")):
        if getattr(cfg, name) != parser.get_default(name):
            stop(f"{flag_of(name)} is {'not' if cfg.reconstruct else 'only'} for --reconstruct")
    if not cfg.reconstruct and cfg.num is None:
        cfg.num = 4 if cfg.trajectory else 9 if cfg.interpolate else 100
    if cfg.num is not None and cfg.num < (2 if cfg.interpolate else 1):
        stop(f"--num {cfg.num}: want at least {2 if cfg.interpolate else 1}")
    for name in ("batch_size", "decode_batch_size"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            stop(f"{flag_of(name)} {getattr(cfg, name)}: want at least 1")
    if cfg.seed < 0:
        stop(f"--seed {cfg.seed}: want at least 0")
    if cfg.interpolate and (min(cfg.interpolate) < 0 or len(set(cfg.interpolate)) < 2):
        stop(f"--interpolate {cfg.interpolate[0]} {cfg.interpolate[1]}: want two different images, counted from 0")
    endings = (".png",) if teaching else (".npz",) if cfg.reconstruct else (".npz", ".zip", "")
    if cfg.out.suffix not in endings or not cfg.out.name:
        stop(f"--out {cfg.out}: want a name that ends in {' or '.join(filter(None, endings))}"
             + (", or a folder's, without a dot" if "" in endings else ""))
    for file in (cfg.out, cfg.out.with_suffix(".gif")):
        if teaching and file.exists():
            stop(f"--out {cfg.out}: {file} exists: choose another name or delete it")
    if cfg.workers < 0:
        stop(f"--workers {cfg.workers}: want at least 0")
    if cfg.reconstruct and cfg.precision not in ("fp32", "tf32"):
        stop(f"--precision {cfg.precision}: --reconstruct wants fp32 or tf32")
    return cfg


def main():
    """Do what the flags say, in this process of perhaps several."""
    cfg, device = parse_arguments(), device_of_process()
    join_processes()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.precision == "tf32"
    try:
        if cfg.reconstruct:
            reconstruct(cfg, device)
        elif cfg.trajectory:
            draw_trajectory(cfg, device)
        elif cfg.interpolate:
            interpolate(cfg, device)
        else:
            sample_run(cfg, device)
    except OSError as error:
        stop(f"{error.filename or cfg.out}: {error.strerror}: mend that, and the same command goes on from here")
    except KeyboardInterrupt:
        sys.exit(130)
    if process()[2] > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
