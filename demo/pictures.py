"""Pictures that teach: how noise becomes an image, what lies between two, what is in a latent.

    python -m demo.pictures trajectory --run runs/NAME --out trajectory.png
    python -m demo.pictures interpolate 0 3 --run runs/NAME --out between.png
    python -m demo.pictures embedding DATA --vae runs/ONE/vae runs/OTHER/align --out embedding.png
    python -m demo.pictures features DATA --vae runs/NAME/align --out features.png
    python -m demo.pictures curves runs/ONE/sit runs/OTHER/sit --out curves.png

    trajectory    the steps of a sampler, decoded, as a strip and an animated .gif beside it
    interpolate   from image number A to B of a run: by the noise, by the class, by both
    embedding     latents of held-out images in the plane (t-SNE), coloured by class: does a class
                  lie together?
    features      what the teacher sees in an image and what the MLPs read off its latent: first
                  principal components as colours, and what is alike to the middle of the image
    curves        all numbers of one or several log.jsonl over the steps

    N images   z (N, C, h, w) latents   (N, D, gh, gw) features   K steps from one image to another
"""
import argparse
import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import align
from sample import (SAMPLER_FLAGS, Noise, flag_of, labels_of, legend_of, load_heads, load_source,
                    load_task_heads, name_of, read_latents, sheet)
from train import (FAMILIES, DataError, ImageFolder, decode, device, generator, in_order,
                   load_autoencoder, load_teacher, progress, read_json, save_picture, spread, stop,
                   to_float, to_uint8)
from vae import atomic_file


# --------------------------------------------------------------------------------------------------
# From noise to an image

@torch.no_grad()
def draw_trajectory(args):
    """Images 0 to num - 1 of a run while the sampler works: nine steps as a strip, up to 60 as a
    .gif."""
    source, numbers = load_source(args), range(args.num or 4)
    model = source.model
    labels = labels_of(source.labels, numbers, model.num_classes, args.seed)
    noise = Noise(args.seed, numbers, (model.in_channels, model.input_size, model.input_size))
    states = [noise()]                                               # each (N, C, h, w)
    with progress(None, "sample", "step") as bar:
        for z in source.module.trajectory(model, states[0], labels.to(device), noise=noise,
                                          **source.options):
            states.append(z)
            bar.update()
    last = len(states) - 1
    strip, frames = spread(len(states), 9).tolist(), spread(len(states), 60).tolist()
    images = {k: to_uint8(decode(source.vae, states[k])).cpu() for k in {*strip, *frames}}

    names = [name_of(source.classes, label) for label in labels.tolist()]
    save_picture(sheet({f"step {k}": images[k][:, None] for k in strip}, rows=names), args.out)
    per_row = math.ceil(math.sqrt(len(names)))
    pages = []
    for k in frames:
        empty = -len(names) % per_row                                # white places at the end
        page = F.pad(images[k], (0, 0, 0, 0, 0, 0, 0, empty), value=255).unflatten(0, (-1, per_row))
        pages.append(sheet({f"step {k} of {last}": page}, max(1, 128 // page.shape[-1])))
    with atomic_file(args.out.with_suffix(".gif")) as file:
        pages[0].save(file, format="GIF", save_all=True, append_images=pages[1:], loop=0,
                      duration=[80] * (len(pages) - 1) + [2000])     # milliseconds
    print(f"{args.out.with_suffix('.gif')} shows it as an animation")


# --------------------------------------------------------------------------------------------------
# From one image to another

def slerp(a, b, s):
    """From noise a (C, h, w) at s = 0 to b at s = 1, for s (K,), on the sphere on which noise of
    many dimensions lies: half-way on the straight line it is too short, as no model has seen it."""
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    s = s.view(-1, 1, 1, 1)                                          # (K, 1, 1, 1)
    return (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / angle.sin()


def with_mixed_classes(model, label_a, label_b, s):
    """A copy of the model that has K classes: class k is the point s[k] of the line from one class'
    vector to the other's."""
    model = copy.deepcopy(model)
    table = model.y_embedder.embedding_table.weight                  # (classes + 1, D)
    mixed = torch.lerp(table[label_a], table[label_b], s[:, None])   # (K, D)
    no_label = table[model.num_classes:]                             # (1, D), for guidance
    model.y_embedder.embedding_table = nn.Embedding.from_pretrained(torch.cat([mixed, no_label]))
    model.num_classes = model.y_embedder.num_classes = len(s)
    return model


@torch.no_grad()
def interpolate(args):
    """From image number A to number B by the noise, by the class and by both, a row each."""
    if min(args.images) < 0 or args.images[0] == args.images[1] or args.num == 1:
        stop("interpolate: want two different images, counted from 0, and a --num from 2 on")
    source, numbers, count = load_source(args), args.images, args.num or 9
    model, s = source.model, torch.linspace(0, 1, count, device=device)          # (K,)
    label_a, label_b = labels_of(source.labels, numbers, model.num_classes, args.seed).tolist()
    shape = (model.in_channels, model.input_size, model.input_size)
    noise_a, noise_b = Noise(args.seed, numbers, shape)()
    between, still = slerp(noise_a, noise_b, s), noise_a.expand(count, *shape)
    mixed, walk = with_mixed_classes(model, label_a, label_b, s), torch.arange(count, device=device)
    rows = {"noise": (model, between, torch.full_like(walk, label_a))}
    if label_a != label_b:
        rows.update({"class": (mixed, still, walk), "both": (mixed, between, walk)})
    pages = []
    with progress(len(rows), "interpolate", "row") as bar:
        for network, eps, y in rows.values():
            noise = Noise(args.seed, numbers[:1], shape)             # of image A, for all alike
            noise()                                                  # its first is where A starts
            z = source.module.sample(network, eps, y, noise=lambda step: noise(step).expand_as(eps),
                                     **source.options)
            pages.append(to_uint8(decode(source.vae, z)).cpu())      # (K, 3, H, W)
            bar.update()
    a, b = (name_of(source.classes, label) for label in (label_a, label_b))
    title = f"from image {numbers[0]} ({a}) to image {numbers[1]} ({b})"
    save_picture(sheet({title: torch.stack(pages)}, rows=list(rows)), args.out)


# --------------------------------------------------------------------------------------------------
# Latents in the plane

def neighbours(x, perplexity):
    """P (N, N) of t-SNE for points x (N, D): from a Gaussian about every point, so wide that it has
    `perplexity` neighbours, that is, an entropy of log perplexity."""
    squares, others = torch.cdist(x, x).square(), 1 - torch.eye(len(x), dtype=x.dtype)
    beta = torch.ones(len(x), 1, dtype=x.dtype) / squares.mean()     # 1 / (2 sigma_i^2)
    low, high = torch.zeros_like(beta), torch.full_like(beta, math.inf)
    for _ in range(60):                                              # bisection, all points at once
        p = torch.exp(-(squares - squares.amin(1, keepdim=True)) * beta) * others
        p = p / p.sum(1, keepdim=True)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(1, keepdim=True)
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    return (p + p.T) / (2 * len(x))


@torch.no_grad()
def tsne(x, perplexity=30.0, steps=500):
    """x (N, D) -> (N, 2): t-SNE (van der Maaten and Hinton, 2008), exact, of the first 50 principal
    components. Minimises KL(P || Q), q_ij from a Student t of the distance in the plane. Raises
    ValueError for fewer points than three times the perplexity."""
    N = len(x)
    if N < 3 * perplexity:
        raise ValueError(f"t-SNE of {N} points with perplexity {perplexity:g}: want at least "
                         f"{3 * perplexity:g} points, or take pca instead")
    x = align.principal_components(x, 50)                            # the rest is mostly noise
    p, others = neighbours(x, perplexity).float(), 1 - torch.eye(N)
    y = (1e-4 * x[:, :2] / x[:, 0].std()).float()
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        # early exaggeration: at first clusters gather more tightly than they will stand
        exaggeration, momentum = (12.0, 0.5) if step < steps // 4 else (1.0, 0.8)
        t = others / (1 + torch.cdist(y, y).square())
        pull = (exaggeration * p - t / t.sum()) * t
        grad = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        # a step grows along a coordinate that keeps its direction, and shrinks where it turns
        gain = torch.where((grad > 0) == (velocity > 0), 0.8 * gain, gain + 0.2).clamp(min=0.01)
        velocity = momentum * velocity - max(N / 48, 50.0) * gain * grad
        y = y + velocity
    return y - y.mean(0)


def scatter(panels, labels, names, size=420):
    """PIL image of points in the plane, {title: (N, 2)}, a panel each, coloured by labels (N,),
    with a legend of up to 20 names."""
    count = int(labels.max()) + 1
    palette = align.mask_palette(count)
    colors = [tuple(color) for color in (palette * 255).round().int().tolist()]
    columns = {}
    for title, points in panels.items():
        # twice as large and then halved: points with smooth edges
        page = Image.new("RGB", (2 * size, 2 * size), "white")
        draw = ImageDraw.Draw(page)
        low, high = points.min(0).values, points.max(0).values
        places = (points - (low + high) / 2) / (high - low).max() * (2 * size - 24) + size
        for (x, y), label in zip(places.tolist(), labels.tolist()):
            draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colors[label])
        page = np.array(page.resize((size, size), Image.LANCZOS))
        columns[title] = torch.from_numpy(page).permute(2, 0, 1)[None, None]     # (1, 1, 3, H, W)
    return sheet(columns, scale=1, legend=dict(zip(names, palette)) if count <= 20 else None)


@torch.no_grad()
def draw_embedding(args):
    """Pooled latents of a data set's images in the plane, a panel for each autoencoder."""
    panels = {}
    # every autoencoder sees the same images
    for folder, name in zip(args.vae, short_names(args.vae)):
        vae = load_autoencoder(folder).to(device).eval()
        data = ImageFolder(args.data, args.split, vae.config["sample_size"], flip=False)
        rows = torch.randperm(len(data), generator=generator(0))[:args.num or 1000].tolist()
        pooled, labels = [], []
        for images, y in in_order(data, 50, rows):
            z = vae.normalize(vae.encode(to_float(images)).latent_dist.mode())   # (n, C, h, w)
            pooled.append(F.adaptive_avg_pool2d(z, 4).flatten(1).cpu())          # (n, 16 C)
            labels.append(y)
        x = torch.cat(pooled)
        panels[name] = tsne(x) if args.method == "tsne" else align.principal_components(x, 2)
    save_picture(scatter(panels, torch.cat(labels), data.classes), args.out)


# --------------------------------------------------------------------------------------------------
# What is in a latent

def similarity_map(features, row, column):
    """Cosine (N, gh, gw) of every place of features (N, D, gh, gw) to the one at (row, column)."""
    unit = F.normalize(features, dim=1)
    return torch.einsum("ndhw,nd->nhw", unit, unit[:, :, row, column])


@torch.no_grad()
def draw_features(args):
    """The teacher's features of an image beside those of its latent, a row an image.

    As colours, and how alike every place is to the middle; mask and depth where --heads reads them.
    """
    if len(args.vae) > 1:
        stop("features: want one --vae")
    folder = args.vae[0]
    vae, heads = load_autoencoder(folder).to(device).eval(), load_heads(folder).to(device)
    settings, size = read_json(folder / "settings.json"), vae.config["sample_size"]
    teacher = load_teacher(args.teacher or settings["teacher"]).to(device)
    if teacher.embed_dim != heads.config["embed_dim"]:
        width = heads.config["embed_dim"]
        stop(f"{folder} has MLPs for features of width {width}, and the teacher's have "
             f"{teacher.embed_dim}: give --teacher the one that it was trained with")
    data = ImageFolder(args.data, args.split, size, flip=False)
    rows = spread(len(data), args.num or 6)
    images = torch.cat([images for images, _ in in_order(data, 8, rows)])
    x = to_float(images)
    z = vae.encode(x).latent_dist.mode()
    patch, _ = align.teacher_tokens(teacher, x, settings["teacher_size"])
    side = settings["teacher_size"] // teacher.patch_size
    maps = {"teacher": patch.transpose(1, 2).unflatten(2, (side, side)),         # (N, D, gh, gw)
            "latent": heads.feature_map(z)}

    def shown(x):                                                    # -> (N, 1, 3, H, W)
        return F.interpolate(x, size=(size, size), mode="nearest")[:, None].cpu()

    columns = {"image": images[:, None]}
    middle = side // 2
    # both in one set of colours: what has the same colour has the same feature
    for name, rgb in zip(maps, align.pca_rgb(torch.cat(list(maps.values()))).chunk(2)):
        columns[f"{name}: PCA"] = shown(rgb)
    for name, features in maps.items():
        alike = align.colorize(similarity_map(features, middle, middle), -0.2, 1.0)
        alike[:, :, middle, middle] = torch.tensor([1.0, 0.0, 0.0], device=device)
        columns[f"{name}: like the red place"] = shown(alike)
    legend = {}
    if args.heads:
        task_heads = load_task_heads(args.heads)
        masks, depth = read_latents(heads.cpu(), task_heads, z.cpu(), size)
        if masks is not None:
            columns["latent: mask"] = align.colorize_mask(masks, len(task_heads.classes))[:, None]
            legend = legend_of(masks, task_heads.classes)
        if depth is not None:
            columns["latent: depth"] = align.colorize_depth(depth)[:, None]
    save_picture(sheet(columns, max(1, 128 // size), legend=legend), args.out)


# --------------------------------------------------------------------------------------------------
# Curves

SPEED = ("images_per_second", "peak_memory_gib")                     # of the machine alone
LOGARITHMIC = ("mse", "kl", "lpips", "loss", "class_loss", "segment_loss", "depth_loss", "align",
               "gradient", "discriminator_gradient", "FD")
COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14),
          (23, 190, 207), (140, 86, 75))


def draw_panel(draw, box, title, curves, colors):
    """One panel of plot into the rectangle `box` of its axes."""
    left, top, right, bottom = box
    font = ImageFont.load_default(11)
    xs, ys = zip(*[point for points in curves.values() for point in points])
    logarithmic = title.split()[-1] in LOGARITHMIC and min(ys) > 0
    scale = math.log10 if logarithmic else float
    low, high = scale(min(ys)), scale(max(ys))
    if high == low:                                                  # a constant, in the middle
        low, high = low - 0.5, high + 0.5

    def place(x, y):
        return (left + (right - left) * x / max(xs),
                bottom - (bottom - top) * (scale(y) - low) / (high - low))

    draw.text((left, top - 18), title + (", logarithmic" if logarithmic else ""), "black", font)
    for i in range(5):
        value, y = low + (high - low) * i / 4, bottom - (bottom - top) * i / 4
        label = f"{10 ** value if logarithmic else value:.3g}"
        draw.line((left, y, right, y), (225, 225, 225))
        draw.text((left - 5, y), label, (80, 80, 80), font, anchor="rm")
    for x, anchor in ((0, "la"), (max(xs) // 2, "ma"), (max(xs), "ra")):
        label = f"{x} steps" if anchor == "ra" else str(x)
        at = left + (right - left) * x / max(xs), bottom + 3
        draw.text(at, label, (80, 80, 80), font, anchor)
    # the curves end below the legend or above it
    ends = [place(x, y)[1] for points in curves.values() for x, y in points if x > max(xs) / 2]
    below = sum(ends) / len(ends) > (top + bottom) / 2
    legend = top + 2 if below else bottom - 2 - 13 * len(curves)
    for i, (name, points) in enumerate(curves.items()):
        places = [place(x, y) for x, y in points]
        draw.line(places, colors[name], width=2)
        if len(places) == 1:                                         # of which there is no line
            draw.circle(places[0], 3, colors[name])
        if len(colors) > 1:
            draw.text((right - 2, legend + 13 * i), name, colors[name], font, anchor="ra")


def plot(panels, size=(300, 200), per_row=3):
    """PIL image of curves over steps, {panel: {curve: [(step, value), ...]}}. The last word of a
    title is looked up in LOGARITHMIC."""
    names = dict.fromkeys(name for curves in panels.values() for name in curves)
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    (width, height), rows = size, math.ceil(len(panels) / per_row)
    canvas = Image.new("RGB", (min(per_row, len(panels)) * width, rows * height), "white")
    for i, (title, curves) in enumerate(panels.items()):
        left, top = i % per_row * width + 52, i // per_row * height + 22
        box = (left, top, left + width - 66, top + height - 48)
        draw_panel(ImageDraw.Draw(canvas), box, title, curves, colors)
    return canvas


def short_names(paths):
    """What tells paths apart: of runs/a/sit and runs/b/sit, a and b."""
    parts = [Path(path).parts for path in paths]
    for end in (0, -1):
        while len(parts) > 1 and len({way[end] for way in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [way[1:] if end == 0 else way[:-1] for way in parts]
    return ["/".join(way) for way in parts]


def draw_curves(args):
    """All figures of log.jsonl that change over the steps, a panel each."""
    panels = {}
    folders = [path.parent if path.name == "log.jsonl" else path for path in args.logs]
    for folder, name in zip(folders, short_names(folders)):
        file = folder / "log.jsonl"
        if not file.is_file():
            stop(f"{file} not found: want log.jsonl of a stage that trains, or its folder")
        for line in map(json.loads, file.read_text().splitlines()):
            for key, value in line.items():
                if key not in ("step", *SPEED):
                    panels.setdefault(key, {}).setdefault(name, []).append((line["step"], value))
    if not panels:
        stop(f"{', '.join(map(str, args.logs))}: no line there yet")
    changing = {title: curves for title, curves in panels.items()
                if any(len({value for _, value in curve}) > 1 for curve in curves.values())}
    save_picture(plot(changing or panels), args.out)


# --------------------------------------------------------------------------------------------------
# Program

def parse_arguments(argv):
    """The flags of the subcommand, as an object."""
    parser = argparse.ArgumentParser(prog="python -m demo.pictures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    add = {name: commands.add_parser(name, help=draw.__doc__.split("\n")[0])
           for name, draw in PICTURES.items()}
    add["interpolate"].add_argument("images", type=int, nargs=2, metavar=("A", "B"))
    for name in ("trajectory", "interpolate"):
        command = add[name]
        command.add_argument("--run", type=Path, required=True, help="folder with stage sit or dit")
        command.add_argument("--family", choices=sorted(FAMILIES), default="sit")
        command.add_argument("--ckpt", type=Path, help="other weights of the run: a snapshot's")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--classes", nargs="+", default=["balanced"], metavar="CLASS",
                             help="as those of sample.py: balanced, random, numbers or names")
        command.set_defaults(precision="fp32", **dict.fromkeys(SAMPLER_FLAGS))
        for flag in ("sampler", "num_steps", "cfg_scale"):
            kind, text = SAMPLER_FLAGS[flag]
            command.add_argument(flag_of(flag), dest=flag, type=kind, help=text)
    for name in ("embedding", "features"):
        command = add[name]
        command.add_argument("data", type=Path, help="folder or .zip of images")
        command.add_argument("--split", choices=("test", "train", "all"), default="test")
        command.add_argument("--vae", type=Path, nargs="+", required=True, metavar="FOLDER",
                             help="of stage align, or for an embedding of any autoencoders")
    add["embedding"].add_argument("--method", choices=("tsne", "pca"), default="tsne")
    add["features"].add_argument("--teacher", help="folder or name (default: the one trained with)")
    add["features"].add_argument("--heads", nargs="+", default=[], help="for masks and depth: "
                                 "folders of a teacher or of heads, or published names")
    add["curves"].add_argument("logs", type=Path, nargs="+", help="log.jsonl, or folders of stages")
    for name, command in add.items():
        command.add_argument("--out", type=Path, required=True, help="the .png to write")
        if name != "curves":
            command.add_argument("--num", type=int, help="images; steps of an interpolation")
    for command in (parser, *add.values()):
        command.error = stop                                         # one line, without the usage
    args = parser.parse_args(argv)
    if args.out.suffix != ".png":
        stop(f"--out {args.out}: want a name that ends in .png")
    if getattr(args, "num", None) is not None and args.num < 1:
        stop(f"--num {args.num}: want at least 1")
    return args


PICTURES = {"trajectory": draw_trajectory, "interpolate": interpolate, "embedding": draw_embedding,
            "features": draw_features, "curves": draw_curves}


def main(argv=None):
    """Draw one picture."""
    args = parse_arguments(argv)
    try:
        PICTURES[args.picture](args)
    except (DataError, ValueError, OSError) as error:
        stop(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(f"{args.out} is ready")


if __name__ == "__main__":
    main()
