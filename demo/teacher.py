"""Small networks of the demo: a teacher to align with, a judge of samples, and heads for tasks.

    python -m demo.teacher train --data runs/scenes/scenes.zip --out runs/scenes/teacher
    python -m demo.teacher judge --data runs/scenes/scenes.zip --out runs/scenes/judge
    python -m demo.teacher heads DIR --teacher dinov2_vitb14 --out runs/mine/heads

    teacher   a small DINOv2. It learns classes, and where the data has them masks and depth:
              L = CE(class) + CE(mask) + 5 (log depth - log depth*)^2
    judge     a convolutional classifier that shares nothing with the teacher: what was aligned with
              one network is measured by another
    heads     linear heads for masks and depth of your own on a frozen teacher's features. Then
              sample.py --tasks --heads reads generated latents with them, with no further training

Each is a loop of a minute or two on a CPU, in one process and without checkpoints: after a kill it
begins again from its seed and ends the same.

    B images a step   x (B, 3, H, W) in [-1, 1]   T = gh gw tokens of width D   S segments
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ExifTags, Image

import align
from demo.scenes import FAR, NEAR, SEGMENTS, truth_path
from fid import FORMATS
from train import (TRAINING, DataError, ImageFolder, Log, device, differ, due, finish, generator,
                   load_batches, lock, middle_square, read_json, set_learning_rate, spread,
                   steps_left, stop, teacher_digest, to_float, world_size, write_json)
from vae import atomic_file, load_strict, load_weights, save_safetensors


# --------------------------------------------------------------------------------------------------
# Networks

class TaskHeads(nn.Module):
    """Linear heads for masks and depth; a config of None leaves one out."""

    def __init__(self, segmentation, depth):
        super().__init__()
        self.config = dict(segmentation=segmentation, depth=depth)
        self.segmentation = align.SegmentationHead(**segmentation) if segmentation else None
        self.depth = align.DepthHead(**depth) if depth else None

    def forward(self, patch, cls, size):
        """patch (B, T, D), cls (B, D) -> class logits (B, S, size, size), depth (B, size, size)."""
        side = math.isqrt(patch.shape[1])
        features = patch.transpose(1, 2).unflatten(2, (side, side))          # (B, D, gh, gw)
        logits, depth = None, None
        if self.segmentation:
            logits = self.segmentation(features)                             # (B, S, gh, gw)
            logits = F.interpolate(logits, (size, size), mode="bilinear")    # (B, S, H, W)
        if self.depth:
            depth = self.depth(features, cls)                                # (B, 1, 4 gh, 4 gw)
            depth = F.interpolate(depth, (size, size), mode="bilinear")      # (B, 1, H, W)
            depth = depth[:, 0]                                              # (B, H, W)
        return logits, depth

    def save(self, folder, classes):
        """The weights of the heads that are there, then heads.json, as sample.py reads them."""
        for name in ("segmentation", "depth"):
            if self.config[name]:
                head = getattr(self, name)
                save_safetensors(head.state_dict(), folder / f"{name}_head.safetensors")
        write_json({**self.config, "classes": list(classes)}, folder / "heads.json")


class Teacher(nn.Module):
    """A small DINOv2 with a linear classifier on the class token and the mean patch token, and
    TaskHeads on the patch tokens where the data has masks and depth. Without labels, the control of
    the study, it learns from depth alone."""

    def __init__(self, image_size, num_classes, dense, labels):
        super().__init__()
        # patches of 4: on 32 pixels 8 x 8 tokens, one for each cell of the small latents
        width = 96
        self.config = dict(embed_dim=width, depth=3, num_heads=4, patch_size=4, img_size=image_size)
        self.dinov2 = align.DINOv2(**self.config)
        self.classifier = align.ClassificationHead(width, num_classes) if labels else None
        masks = dict(embed_dim=width, num_classes=len(SEGMENTS)) if labels else None
        depth = dict(embed_dim=width, min_depth=NEAR, max_depth=FAR, num_bins=32)
        self.heads = TaskHeads(masks, depth) if dense else None

    def forward(self, x):
        """x (B, 3, H, W) -> class logits, mask logits (B, S, H, W), depth (B, H, W), or None."""
        size = x.shape[-1]
        out = self.dinov2.forward_features(align.teacher_input(x, size))
        patch, cls = out["x_norm_patchtokens"], out["x_norm_clstoken"]       # (B, T, D), (B, D)
        logits = self.classifier(patch, cls) if self.classifier else None
        masks, depth = self.heads(patch, cls, size) if self.heads else (None, None)
        return logits, masks, depth


class Judge(nn.Module):
    """A small convolutional classifier, whose features measure the demo's Frechet distances."""

    def __init__(self, num_classes, width=32):
        super().__init__()
        # batch norm and strides: as unlike the teacher as a classifier can be
        layers, channels = [], 3
        for factor, stride in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)):
            layers += [nn.Conv2d(channels, factor * width, 3, stride, padding=1, bias=False),
                       nn.BatchNorm2d(factor * width), nn.ReLU()]
            channels = factor * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x):
        """x (B, 3, H, W) -> features (B, 128), class logits, and spatial features as sFID has them,
        seven channels of an inner map (B, 7 h w)."""
        inner = self.features[:12](x)                                        # (B, 64, H/4, W/4)
        features = self.features[12:](inner).mean(dim=(2, 3))                # (B, 128)
        return features, self.classifier(features), inner[:, :7].flatten(1)


def load_judge(folder, num_classes):
    """The judge of a folder, frozen, on the device; stops where it has none for so many classes."""
    judge, path = Judge(num_classes), Path(folder) / "judge.safetensors"
    if not path.is_file():
        stop(f"{path} not found: run python -m demo.teacher judge --data DATA --out {folder} first")
    try:
        load_strict(judge, load_weights(path), path)
    except ValueError as error:
        stop(error)
    return judge.to(device).eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Losses and augmentation

def dense_loss(logits, depth, masks=None, metres=None):
    """Loss of logits (B, S, H, W) for masks (B, H, W), 255 where unknown, and of depth (B, H, W)
    for depth in metres, 0 where unknown, by the pixels that are known; and both terms. What is None
    has no loss."""
    def mean(errors, known):
        return (errors * known).sum() / known.sum().clamp(min=1)

    loss, terms = 0, {}
    if logits is not None:
        masks = masks.to(logits.device).long()
        errors = F.cross_entropy(logits, masks, ignore_index=255, reduction="none")
        terms["segment_loss"] = mean(errors, masks != 255)
        loss = loss + terms["segment_loss"]
    if depth is not None:
        # of logarithms, so that a tenth too far counts the same nearby and far away
        metres = metres.to(depth.device)
        errors = (depth.log() - metres.clamp(min=1e-3).log()).square()
        terms["depth_loss"] = mean(errors, metres > 0)
        loss = loss + 5 * terms["depth_loss"]
    return loss, terms


def degrade(x, rng):
    """Half of the images blurred, half with noise: the judge shall look at shapes. A judge that saw
    sharp images alone measures little else than how sharp an autoencoder decodes."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=x.device)
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=3)
    blur = torch.rand(len(x), generator=rng, device=x.device) < 0.5
    noise = torch.rand(len(x), generator=rng, device=x.device) < 0.5
    x = torch.where(blur[:, None, None, None], blurred, x)
    eps = torch.randn(x.shape, generator=rng, device=x.device)
    return x + 0.1 * noise[:, None, None, None] * eps


# --------------------------------------------------------------------------------------------------
# The three loops. cfg holds the flags of the program; what a loop calls stands in train.py

def train_teacher(cfg):
    """The teacher: config.json, dinov2.pth, and with masks and depth heads.json and the heads."""
    if cfg.image_size % 4:
        stop(f"--image-size {cfg.image_size} does not divide into the teacher's patches of 4 x 4")
    data = with_truth(cfg, ImageFolder(cfg.data, "train", cfg.image_size, flip=False))
    dense = isinstance(data, WithTruth)
    if not (dense or cfg.labels):
        stop(f"--no-labels leaves nothing to learn: {truth_path(cfg.data)} with depth is not there")
    if not begin(cfg, "dinov2.pth"):
        return
    torch.manual_seed(cfg.seed)
    net = Teacher(cfg.image_size, len(data.classes), dense, cfg.labels).to(device)
    opt = torch.optim.AdamW(net.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    log = Log(cfg, cfg.out)
    batches = load_batches(data, cfg, 0)
    bar = steps_left(cfg, 0)
    for step in bar:
        log.start_clock()
        lr = set_learning_rate(cfg, step, opt)
        images, y, *truth = next(batches)                            # (B, 3, H, W), (B,), (B, H, W)
        x, y = to_float(images), y.to(device)
        class_logits, mask_logits, depth = net(x)
        loss, terms = dense_loss(mask_logits, depth, *truth)
        if cfg.labels:
            terms["class_loss"] = F.cross_entropy(class_logits, y)
            terms["accuracy"] = (class_logits.argmax(1) == y).float().mean()
            loss = loss + terms["class_loss"]
        opt.zero_grad()
        loss.backward()
        opt.step()
        log.add(**terms)
        if due(step, cfg.log_every, cfg):
            bar.set_postfix(log.write(step + 1, lr))
    write_json(net.config, cfg.out / "config.json")
    if net.heads:
        net.heads.save(cfg.out, SEGMENTS)
    with atomic_file(cfg.out / "dinov2.pth") as file:                # last: then all is there
        torch.save({name: x.cpu() for name, x in net.dinov2.state_dict().items()}, file)
    finish(cfg.out)


def train_judge(cfg):
    """The judge: judge.safetensors."""
    data = ImageFolder(cfg.data, "train", cfg.image_size, flip=False)
    if not begin(cfg, "judge.safetensors"):
        return
    # other weights and batches than the teacher's, which has the same --seed
    cfg.seed += 1000
    torch.manual_seed(cfg.seed)
    net = Judge(len(data.classes)).to(device)
    opt = torch.optim.AdamW(net.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    log = Log(cfg, cfg.out)
    batches = load_batches(data, cfg, 0)
    bar = steps_left(cfg, 0)
    for step in bar:
        log.start_clock()
        lr = set_learning_rate(cfg, step, opt)
        images, y = next(batches)                                    # (B, 3, H, W), (B,)
        x, y = to_float(images), y.to(device)
        _, logits, _ = net(degrade(x, generator(cfg.seed, TRAINING, step, device=device)))
        loss = F.cross_entropy(logits, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        log.add(class_loss=loss, accuracy=(logits.argmax(1) == y).float().mean())
        if due(step, cfg.log_every, cfg):
            bar.set_postfix(log.write(step + 1, lr))
    save_safetensors(net.state_dict(), cfg.out / "judge.safetensors")
    finish(cfg.out)


def train_heads(cfg):
    """Heads for the masks and depth of a DenseFolder: heads.json and the heads."""
    teacher = align.load_teacher(cfg.teacher).to(device)             # frozen
    # published ones saw 224 pixels and more, small images are enlarged for them
    cfg.teacher_size = cfg.teacher_size or (224 if teacher.patch_size == 14 else cfg.image_size)
    if cfg.teacher_size % teacher.patch_size:
        stop(f"--teacher-size {cfg.teacher_size}: want a multiple of the teacher's patches, "
             f"{teacher.patch_size}")
    data, width = DenseFolder(cfg.data, cfg.image_size), teacher.embed_dim
    if not begin(cfg, "heads.json", **teacher_digest(cfg.teacher, teacher)):
        return
    masks = dict(embed_dim=width, num_classes=len(data.classes)) if data.classes else None
    # a depth head is a mean of fixed depths, so it reaches as far as the data does
    depth = dict(embed_dim=width, max_depth=data.farthest()) if data.has["depth"] else None
    torch.manual_seed(cfg.seed)
    net = TaskHeads(masks, depth).to(device)
    opt = torch.optim.AdamW(net.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    log = Log(cfg, cfg.out)
    batches = load_batches(data, cfg, 0)
    bar = steps_left(cfg, 0)
    for step in bar:
        log.start_clock()
        lr = set_learning_rate(cfg, step, opt)
        images, *truth = next(batches)                               # (B, 3, H, W), (B, H, W) twice
        patch, cls = align.teacher_tokens(teacher, to_float(images), cfg.teacher_size)
        loss, terms = dense_loss(*net(patch, cls, cfg.image_size), *truth)
        opt.zero_grad()
        loss.backward()
        opt.step()
        log.add(**terms)
        if due(step, cfg.log_every, cfg):
            bar.set_postfix(log.write(step + 1, lr))
    net.save(cfg.out, data.classes)
    finish(cfg.out)


# --------------------------------------------------------------------------------------------------
# Data

class WithTruth:
    """A data set of images, and for each the mask and the depth (H, W)."""

    flip = False                                                     # as the truth is not mirrored

    def __init__(self, images, masks, depth):
        self.images, self.masks, self.depth, self.classes = images, masks, depth, images.classes

    def __len__(self):
        return len(self.images)

    def __getitems__(self, keys):
        """keys: list of (index, False) -> images (B, 3, H, W) uint8, labels (B,), masks and depth
        (B, H, W)."""
        rows = [index for index, _ in keys]
        masks, depth = torch.from_numpy(self.masks[rows]), torch.from_numpy(self.depth[rows])
        return *self.images.__getitems__(keys), masks, depth.float()


def with_truth(cfg, images):
    """The images, with masks and depth where a file beside the data has them."""
    path = truth_path(cfg.data)
    if not path.is_file():
        return images
    with np.load(path) as truth:
        masks, depth = truth["train_masks"], truth["train_depth"]
    if masks.shape != (len(images), cfg.image_size, cfg.image_size):
        stop(f"{path} has masks of shape {masks.shape}, and there are {len(images)} images of "
             f"--image-size {cfg.image_size}: give the size of the scenes, or write both anew")
    return WithTruth(images, masks, depth)


class DenseFolder:
    """Images of your own with masks, depth or both. DIR/images/NAME.*; DIR/masks/NAME.png has class
    numbers (255: unknown), named line by line in DIR/classes.txt; DIR/depth/NAME.png has 16-bit
    millimetres (0: unknown). Raises DataError for what cannot be used."""

    flip = False

    def __init__(self, path, size):
        self.path, self.size, self.classes = Path(path), size, ()
        if not (self.path / "images").is_dir():
            raise DataError(f"{path}/images not found: put images there, masks or depth beside it")
        self.images = ImageFolder(self.path / "images", "all", size, flip=False)
        # which of both are there
        self.has = {kind: (self.path / kind).is_dir() for kind in ("masks", "depth")}
        if not any(self.has.values()):
            raise DataError(f"{path} has no masks and no depth: want NAME.png in {path}/masks or "
                            f"{path}/depth")
        if self.has["masks"]:
            names = self.path / "classes.txt"
            if not names.is_file():
                raise DataError(f"{names} not found: name the classes of the masks, one a line")
            self.classes = tuple(filter(None, names.read_text().split("\n")))

    def __len__(self):
        return len(self.images)

    def plane(self, kind, index):
        """A mask or depth map (size, size) as int64, cut like its image; unknown all over where the
        folder has none of the kind."""
        if not self.has[kind]:
            return np.full((self.size, self.size), 255 if kind == "masks" else 0, dtype=np.int64)
        name = Path(self.images.files[index][0])
        path = self.path / kind / name.with_suffix(".png")
        # of another shape it would be cut elsewhere than its image, and nobody would see that
        try:
            width, height = upright_size(self.path / "images" / name)
            with Image.open(path, formats=FORMATS) as image:
                if abs(math.log(image.width / image.height * height / width)) > 0.02:
                    raise DataError(f"{path} is {image.width} x {image.height} and its image, "
                                    f"upright, {width} x {height}: want the same shape")
                # a class is no mean of two
                plane = middle_square(image, self.size, Image.NEAREST)
        except (OSError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read ({error}): mend it or remove its image"
                            ) from None
        if plane.ndim != 2:
            raise DataError(f"{path} has colours: want one number a pixel")
        plane = plane.astype(np.int64)                               # (size, size)
        if kind == "masks" and (wrong := {*np.unique(plane)} - {*range(len(self.classes)), 255}):
            raise DataError(f"{path} has class {max(wrong)}, and classes.txt has "
                            f"{len(self.classes)} names: mend one of them")
        return plane

    def farthest(self):
        """The largest depth in metres of up to 200 maps; stops where all of it is unknown."""
        largest = max(self.plane("depth", row).max() for row in spread(len(self), 200)) / 1000
        if not largest:
            raise DataError(f"{self.path}/depth has zeros alone: fill or remove it")
        return float(largest)

    def __getitems__(self, keys):
        """keys: list of (index, False) -> images (B, 3, H, W) uint8, masks and depth (B, H, W)."""
        images, _ = self.images.__getitems__(keys)
        masks, depth = (torch.from_numpy(np.stack([self.plane(kind, row) for row, _ in keys]))
                        for kind in ("masks", "depth"))
        return images, masks, depth.float() / 1000                               # millimetres -> m


def upright_size(path):
    """(width, height) of an image file as it is shown, which its EXIF orientation may turn."""
    with Image.open(path, formats=FORMATS) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        return image.size[::-1] if turned else image.size


# --------------------------------------------------------------------------------------------------
# Program

def begin(cfg, product, **facts):
    """Mark the folder --out as that of a loop of these flags, and of what else it depends on; False
    where its product is there."""
    if world_size > 1:
        stop("demo.teacher is for one process: start it without torchrun")
    settings = {name: str(value) if isinstance(value, Path) else value
                for name, value in vars(cfg).items() if name != "out"} | facts
    path = cfg.out / "settings.json"
    if path.is_file():
        differ(read_json(path), settings, cfg.out)                   # stops
    if (cfg.out / product).is_file():
        print(f"{cfg.out} is done already")
        return False
    cfg.out.mkdir(parents=True, exist_ok=True)
    lock(cfg.out)                                                    # one process a folder
    write_json(settings, path)
    (cfg.out / "log.jsonl").unlink(missing_ok=True)                  # of a loop that was killed
    return True


def positive(text):
    """A number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: want a number from 1 on")
    return int(text)


def parse_arguments(argv):
    """The flags of the subcommand, as an object."""
    parser = argparse.ArgumentParser(prog="python -m demo.teacher", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="stage", required=True, metavar="train|judge|heads")
    train = commands.add_parser("train", help="a small teacher")
    judge = commands.add_parser("judge", help="a classifier that judges samples")
    heads = commands.add_parser("heads", help="heads for masks and depth of your own")
    for command in (train, judge):
        command.add_argument("--data", type=Path, required=True, help="folder or .zip of images; "
                             "masks and depth for X.zip are in X-truth.npz")
    train.add_argument("--labels", action=argparse.BooleanOptionalAction, default=True,
                       help="learn classes and masks, and not depth alone")
    heads.add_argument("data", type=Path, metavar="DIR",
                       help="folder of images, masks or depth or both, and classes.txt")
    heads.add_argument("--teacher", required=True, help="published name, folder of a teacher, or "
                       "MODULE:FUNCTION")
    heads.add_argument("--teacher-size", type=positive, help="pixels a side that the teacher sees "
                       "(default: 224 for patches of 14, else the image size)")
    defaults = {train: (450, 0.05), judge: (250, 0.05), heads: (500, 0.01)}
    for command, (steps, weight_decay) in defaults.items():
        command.add_argument("--out", type=Path, required=True, help="folder to write")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--image-size", type=positive, default=32, help="pixels a side")
        command.add_argument("--steps", type=positive, default=steps)
        command.add_argument("--batch-size", type=positive, default=64)
        command.add_argument("--lr", type=float, default=2e-3, help="peak of the learning rate")
        # what train.py's loops know too
        command.set_defaults(weight_decay=weight_decay, warmup=50, decay=0.05, log_every=25,
                             workers=0)
    for command in (parser, *defaults):
        command.error = stop                                         # one line, without the usage
    return parser.parse_args(argv)


def main(argv=None):
    """Train a teacher, a judge or heads."""
    cfg = parse_arguments(argv)
    loops = {"train": train_teacher, "judge": train_judge, "heads": train_heads}
    try:
        loops[cfg.stage](cfg)
    except (DataError, ValueError, OSError) as error:
        stop(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
