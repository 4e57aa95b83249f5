"""Sample a trained run: images in ADM's .npz and a picture; masks, depth and features of the generated latents.

    python sample.py --run runs/scenes/aligned --num 60 --out samples.npz --tasks segmentation depth features
    torchrun --nproc_per_node=8 -- sample.py --run runs/NAME --num 50000 --out samples.npz
    python sample.py --reconstruct images.zip --vae FOLDER --out rec.npz

The "--" keeps torchrun from reading --run and --num as abbreviations of its own flags.

Image i has label i mod num_classes and noise that depends on (seed, i) alone: up to float rounding it is the same in
any batch, on any number of processes. samples.npz holds arr_0 (N, H, W, 3) uint8 and arr_1 (N,) labels; samples.png
shows some of them. --reconstruct passes images through the autoencoder instead: rec.npz and rec-originals.npz are what
rFID compares, rec.json has PSNR, SSIM and LPIPS, rec.png shows some.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import zipfile
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
    store, with the addresses of the dead in it, so every start has keys of its own."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device_of_process())
    if process()[2] > 1:
        store, rank, world_size = next(rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def barrier():
    """Wait for all processes."""
    if process()[2] > 1:
        dist.barrier()


def first_on_node(load):
    """load() in the first process of every node, then in the others: what it fetches is there for them."""
    if process()[1] > 0:
        barrier()
    loaded = load()
    if process()[1] == 0:
        barrier()
    return loaded


def progress(total, description, unit, initial=0):
    """A tqdm bar of rank 0. REALS_BAR is its line where stages run side by side."""
    return tqdm(total=total, desc=description, unit=unit, initial=initial, disable=process()[0] > 0, leave=False,
                position=int(os.environ.get("REALS_BAR", 0)), mininterval=0.5 if sys.stderr.isatty() else 60)


def stop(message):
    """A mistake of the user: one line, exit status 2. An exception from a loader's worker comes with its traceback, of
    which the last line is the message."""
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


def sheet(columns, scale=2, gap=2, legend=None):
    """PIL image of columns side by side: {title: images (rows, per_row, 3, H, W), uint8 or in [0, 1]}; below, a legend
    {name: colour in [0, 1]}."""
    font, parts = ImageFont.load_default(13), []
    for title, images in columns.items():
        if images.dtype != torch.uint8:
            images = (images * 255).round().to(torch.uint8)
        rows, per_row, _, H, W = images.shape
        images = F.pad(images, (0, gap, 0, gap), value=255)
        page = images.permute(0, 3, 1, 4, 2).reshape(rows * (H + gap), per_row * (W + gap), 3).cpu().numpy()
        picture = Image.fromarray(page).resize((page.shape[1] * scale, page.shape[0] * scale), Image.NEAREST)
        width = max(picture.width, math.ceil(font.getlength(title)) + 8)
        part = Image.new("RGB", (width, picture.height + 20), "white")
        part.paste(picture, (0, 20))
        ImageDraw.Draw(part).text((2, 2), title, fill="black", font=font)
        parts.append(part)
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
    """(classes, row, ...) images of the first num_classes classes that have any: per_row, or what the smallest has."""
    counts = torch.bincount(labels, minlength=num_classes)[:num_classes]
    per_row = min(per_row, int(counts[counts > 0].min()))
    rows = [torch.nonzero(labels == k).flatten()[:per_row] for k in range(num_classes) if counts[k]]
    return images[torch.stack(rows)]


def save_picture(picture, path):
    """Write a PIL picture as PNG."""
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


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


def checksum(folder):
    """sha256 of the weights of an autoencoder's folder; stops where there are none."""
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    stop(f"{folder}/diffusion_pytorch_model.safetensors (or .bin) not found: want the folder of an autoencoder")


def autoencoder_of(run, family):
    """The folder of the autoencoder whose latents a run's stage sit or dit was trained on; stops if it has changed."""
    settings = json.loads((run / family / "settings.json").read_text())
    folder = Path(settings["vae"]) if Path(settings["vae"]).is_dir() else run / Path(settings["vae"]).name
    if checksum(folder) != settings["autoencoder"]:
        stop(f"{folder} is not the autoencoder that {run / family} was trained with: put that one back")
    return folder


def objective_of(run, family):
    """What the model of a run's stage was trained to predict, as options of its sampler."""
    settings = json.loads((run / family / "settings.json").read_text())
    return {name: settings[name] for name in ("path", "prediction") if name in settings}


def load_diffusion(run, family):
    """(module, network) of a run's stage sit or dit, with EMA weights."""
    folder = run / family
    if not (folder / "ema.safetensors").is_file():
        stop(f"{folder}/ema.safetensors not found: run train.py --stage {family} --out {run} first")
    module, network = FAMILIES[family]
    model = network(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_weights(folder / "ema.safetensors"))
    return module, model.eval()


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
    heads = align.AlignmentHeads(**json.loads((folder / "heads.json").read_text()))
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
            config = json.loads((folder / "heads.json").read_text())
            for name, network in (("segmentation", align.SegmentationHead), ("depth", align.DepthHead)):
                if config[name]:
                    head, file = network(**config[name]), folder / f"{name}_head.safetensors"
                    try:
                        load_strict(head, load_weights(file), file)
                    except (OSError, ValueError) as error:
                        stop(error)
                    setattr(found, name, head.eval())
                    found.depth_normed = found.depth_normed or name == "depth"
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
    raw = None if task_heads.depth_normed else (heads.feature_map(z, normed=False), heads.class_token(z, normed=False))
    return read_tasks(task_heads, size, heads.feature_map(z), heads.class_token(z), raw)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def noise_of(seed, index, step, shape):
    """Standard normal noise of image `index` at a sampler's step, float32: a function of its arguments alone."""
    key = int(np.random.SeedSequence([seed, index, step]).generate_state(1, np.uint64)[0] >> 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))


@torch.no_grad()
def generate(module, model, vae, indices, labels, seed, device, **options):
    """Latents (N, C, h, w) of the autoencoder and images (N, 3, H, W) in [-1, 1] for image numbers and their labels."""
    shape = (model.in_channels, model.input_size, model.input_size)

    def noise(step):
        return torch.stack([noise_of(seed, i, step, shape) for i in indices]).to(device)

    z = module.sample(model, noise(0), labels.to(device), noise=lambda step: noise(1 + step), **options)
    z = vae.denormalize(z)
    return z, vae.decode(z).sample


def task_sheet(tasks, images, latents, labels, heads, task_heads):
    """Picture of images (N, 3, H, W) uint8 beside what the heads read off their latents (N, C, h, w), a row a class."""
    rows = by_class(torch.arange(len(images)), labels, 10, 6)
    columns, flat, size, legend = {"generated": images[rows]}, latents[rows.flatten()], images.shape[-1], None
    if task_heads is not None:
        masks, depth = read_latents(heads, task_heads, flat, size)
    if "segmentation" in tasks:
        columns["mask"] = align.colorize_mask(masks, len(task_heads.classes)).unflatten(0, rows.shape)
        legend = legend_of(masks, task_heads.classes)
    if "depth" in tasks:
        columns["depth"] = align.colorize_depth(depth).unflatten(0, rows.shape)
    if "features" in tasks:
        with torch.no_grad():
            rgb = F.interpolate(align.pca_rgb(heads.feature_map(flat)), size=(size, size), mode="nearest")
        columns["features (PCA)"] = rgb.unflatten(0, rows.shape)
    return sheet(columns, legend=legend)


def sample_all(cfg, module, model, vae, device):
    """All images (N, 3, H, W) uint8, their latents (N, C, h, w) and labels (N,), on rank 0; None on the others."""
    rank, _, world_size = process()
    options = dict(objective_of(cfg.run, cfg.family), sampler=cfg.sampler, num_steps=cfg.num_steps,
                   cfg_scale=cfg.cfg_scale, cfg_interval=tuple(cfg.cfg_interval), cfg_channels=cfg.cfg_channels)
    mine, parts = torch.arange(rank, cfg.num, world_size), []
    with progress(len(mine), f"sample {cfg.run}", "image") as bar:
        for indices in mine.split(cfg.batch_size):
            labels = indices % model.num_classes
            try:
                z, x = generate(module, model, vae, indices.tolist(), labels, cfg.seed, device, **options)
            except ValueError as error:
                stop(error)
            parts.append((to_uint8(x).cpu(), z.cpu(), labels, indices))
            bar.update(len(indices))
    parts = [torch.cat(part) for part in zip(*parts)]
    if world_size > 1:
        gathered = [None] * world_size
        dist.gather_object(parts, gathered if rank == 0 else None)
        if rank > 0:
            return None
        parts = [torch.cat(part) for part in zip(*gathered)]
    order = parts.pop().argsort()
    return [part[order] for part in parts]


def sample_run(cfg, device):
    """Load a run, sample, and let rank 0 write the pictures and then the .npz."""
    module, model = load_diffusion(cfg.run, cfg.family)
    folder = autoencoder_of(cfg.run, cfg.family)
    if cfg.tasks:
        heads, task_heads = load_heads(folder), None
        if set(cfg.tasks) != {"features"}:
            task_heads = load_task_heads(cfg.heads or [json.loads((folder / "settings.json").read_text())["teacher"]])
            for name in set(cfg.tasks) - {"features"}:
                if getattr(task_heads, name) is None:
                    stop(f"--tasks {name}: no head for it in {cfg.heads or 'the folder of the teacher'}: see --heads")
            grid = model.input_size
            try:                                                                 # say now what does not fit
                read_latents(heads, task_heads, torch.zeros(1, heads.config["latent_channels"], grid, grid), 32)
            except ValueError as error:
                stop(error)
    sampled = sample_all(cfg, module, model.to(device), load_autoencoder(folder).to(device), device)
    if sampled is None:
        return
    images, latents, labels = sampled
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    picture = cfg.out.with_suffix(".png")
    save_picture(sheet({f"samples, guidance {cfg.cfg_scale:g}": by_class(images, labels, 10, 12)}), picture)
    if cfg.tasks:
        path = cfg.out.with_name(cfg.out.stem + "-tasks.png")
        save_picture(task_sheet(cfg.tasks, images, latents, labels, heads, task_heads), path)
        print(f"{', '.join(cfg.tasks)} read off the generated latents in {path}")
    if cfg.latents:
        with atomic_file(cfg.out.with_name(cfg.out.stem + "-latents.npy")) as file:
            np.save(file, latents.numpy())
    with atomic_file(cfg.out) as file:                                           # last: where it is, all is done
        np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    print(f"{cfg.num} images in {cfg.out}, a picture of them in {picture}")


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction

METRICS = {"psnr": psnr, "ssim": ssim, "lpips": LPIPS}


def shared_array(path, shape):
    """(array, its path): uint8 zeros on disk for all processes to fill, under a hidden name beside `path`."""
    hidden = path.with_name(f".{path.stem}.npy")
    if process()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(hidden, mode="w+", dtype=np.uint8, shape=shape)
    barrier()
    return np.load(hidden, mmap_mode="r+"), hidden


def pack(hidden, path):
    """Turn a hidden array into the .npz `path` with the one entry arr_0, never holding it in memory."""
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.write(hidden, "arr_0.npy")
    hidden.unlink()


@torch.no_grad()
def reconstruct_all(vae, batches, arrays, start, metrics, device, bar):
    """Write this process' images and their reconstructions into two arrays (N, H, W, 3), from row `start` on; return
    the sum of every metric (float64). Latents are the means; the metrics see what is written, rounded to uint8."""
    sums = torch.zeros(len(metrics), dtype=torch.float64, device=device)
    for images in batches:
        x = to_float(images, device)
        rec = to_uint8(vae.decode(vae.encode(x).latent_dist.mode()).sample)
        for measure, total in zip(metrics, sums):
            total += measure(x, to_float(rec, device)).double().sum()
        for array, batch in zip(arrays, (images, rec)):
            array[start:start + len(x)] = batch.permute(0, 2, 3, 1).cpu().numpy()
        start += len(x)
        bar.update(len(x))
    for array in arrays:
        array.flush()
    return sums


def reconstruct(cfg, device):
    """Images of a data set through the autoencoder: originals and reconstructions as .npz, figures and a sheet."""
    import train                                                                 # here, since it imports this file
    (rank, _, world_size), vae = process(), load_autoencoder(cfg.vae).to(device)
    size = cfg.image_size or vae.config["sample_size"]
    if size % vae.factor or size < 16:
        stop(f"--image-size {size}: want a multiple of {vae.factor}, and at least 16")
    metrics = [load_lpips().to(device) if name == "lpips" else METRICS[name] for name in cfg.metrics]
    try:
        data = train.open_data(train.Config(data=cfg.reconstruct, image_size=size), cfg.split)
        count = min(cfg.num or len(data), len(data))
        if count < world_size:
            stop(f"--reconstruct {cfg.reconstruct} has {count} images for {world_size} processes: start fewer")
        files = cfg.out.with_name(f"{cfg.out.stem}-originals.npz"), cfg.out      # the second tells that all is done
        arrays, hidden = zip(*(shared_array(path, (count, size, size, 3)) for path in files))
        mine = np.array_split(np.arange(count), world_size)[rank]
        keys = [[(int(i), False) for i in mine[k:k + cfg.batch_size]] for k in range(0, len(mine), cfg.batch_size)]
        with progress(len(mine), f"reconstruct {cfg.reconstruct}", "image") as bar:
            batches = (images for images, *_ in train.load_batches(data, keys, cfg.workers))
            sums = reconstruct_all(vae, batches, arrays, int(mine[0]), metrics, device, bar)
    except train.DataError as error:
        stop(error)
    if world_size > 1:
        dist.all_reduce(sums)
    if rank == 0:
        shown = {title: torch.from_numpy(array[:16]).permute(0, 3, 1, 2)
                 for title, array in zip(("originals", "reconstructions"), arrays)}
        per_row = min(4, count)
        columns = {title: x[:len(x) // per_row * per_row].unflatten(0, (-1, per_row)) for title, x in shown.items()}
        save_picture(sheet(columns, scale=max(1, 64 // size)), cfg.out.with_suffix(".png"))
        figures = {name: value / count for name, value in zip(cfg.metrics, sums.tolist())}
        with atomic_file(cfg.out.with_suffix(".json")) as file:
            file.write((json.dumps({"images": count, **figures}, indent=2) + "\n").encode())
        for name, path in zip(hidden, files):
            pack(name, path)
        print(f"{count} images: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        print(f"{files[0]} and {files[1]} are ready; {cfg.out.with_suffix('.png')} shows some")


# ---------------------------------------------------------------------------------------------------------------------
# Program

def parse_arguments():
    """The flags, once they make sense."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="folder of a run: autoencoder and stage sit or dit")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="sit", help="which diffusion model of the run")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write; pictures go beside it")
    parser.add_argument("--num", type=int, help="number of images (default: 100 samples, all reconstructions)")
    parser.add_argument("--batch-size", type=int, default=100, help="images at once on a process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", help=f"SiT: {', '.join(sit.ODE_SAMPLERS + sit.SDE_SAMPLERS)} (default heun); "
                        "DiT: ddpm, ddim (default ddpm)")
    parser.add_argument("--num-steps", type=int, default=50, help="steps of the sampler")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="guidance; 1 is none")
    parser.add_argument("--cfg-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
                        help="noise levels that are guided: 1 is noise, 0 is data")
    parser.add_argument("--cfg-channels", type=int, help="guide the first of the latent's channels only; the official "
                        "SiT and DiT guide 3 (default: all)")
    parser.add_argument("--tasks", nargs="*", default=[], choices=("segmentation", "depth", "features"),
                        help="read these off the generated latents into a picture")
    parser.add_argument("--heads", nargs="+", default=[], help="for --tasks: folders of stage heads or teacher, or "
                        "names of published heads (default: the folder of the run's teacher)")
    parser.add_argument("--latents", action="store_true", help="write the latents too, as OUT-latents.npy")
    parser.add_argument("--reconstruct", metavar="DATA", help="no samples: images of this folder or .zip, or scenes, "
                        "through the autoencoder")
    parser.add_argument("--vae", type=Path, help="reconstruct: folder of the autoencoder, or one file of its weights")
    parser.add_argument("--split", choices=("test", "train", "all"), default="test", help="reconstruct: which images")
    parser.add_argument("--image-size", type=int, help="reconstruct: pixels a side (default: the autoencoder's)")
    parser.add_argument("--workers", type=int, default=0, help="reconstruct: processes that load images")
    parser.add_argument("--metrics", nargs="*", default=sorted(METRICS), choices=sorted(METRICS),
                        help="reconstruct: what to measure (default: all)")
    cfg = parser.parse_args()
    if cfg.reconstruct and (cfg.run or not cfg.vae):
        stop("--reconstruct wants --vae FOLDER, and no --run")
    if not cfg.reconstruct and not cfg.run:
        stop("give --run FOLDER to sample, or --reconstruct DATA --vae FOLDER")
    cfg.num = 100 if cfg.num is None and not cfg.reconstruct else cfg.num
    if cfg.num is not None and cfg.num < process()[2]:
        stop(f"--num {cfg.num}: want at least one image a process")
    if cfg.batch_size < 1:
        stop(f"--batch-size {cfg.batch_size}: want at least one image")
    if cfg.out.suffix != ".npz":
        stop(f"--out {cfg.out}: want a name that ends in .npz")
    if cfg.out.exists():
        stop(f"--out {cfg.out} exists: choose another name or delete it")
    cfg.sampler = cfg.sampler or {"sit": "heun", "dit": "ddpm"}[cfg.family]
    return cfg


def main():
    """Sample a run, or reconstruct images, and let rank 0 write what is to be written."""
    cfg, device = parse_arguments(), device_of_process()
    join_processes()
    if cfg.reconstruct:
        reconstruct(cfg, device)
    else:
        sample_run(cfg, device)
    if process()[2] > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
