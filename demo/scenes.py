"""The built-in world: one lit solid on a tiled ground under a sky, with its exact mask and depth.

    python -m demo.scenes --out runs/scenes/scenes.zip

writes a data set as train.py reads it, train/CLASS/NUMBER.png and test/CLASS/NUMBER.png, and beside
it scenes-truth.npz: train_masks, train_depth, test_masks, test_depth, each (images, size, size) in
the order of train.ImageFolder. A scene is a function of its number alone: nothing is downloaded,
and every machine draws the same ones.

A ray leaves the eye o through every pixel, in direction v, and meets the sky, the ground or the
solid. The solid is found by sphere tracing (Hart, 1996): nothing of it is nearer to a point p than
its signed distance d(p), so the ray may go that far.

    t <- t + d(o + t v)     until d < 0.002, a hit, or until the ray has passed the solid

    x right, y up, z towards the eye; the ground is y = 0     angles in radians
    N scenes of one class     R = size * size rays of a scene     H hits, of all scenes together
"""
import argparse
import io
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from train import progress, stop
from vae import atomic_file

SCENE_CLASSES = ("sphere", "cube", "cylinder", "cone", "torus", "octahedron", "star", "cross",
                 "two spheres", "arch")
SEGMENTS = ("sky", "ground") + SCENE_CLASSES         # what the numbers of a mask stand for
NEAR, FAR = 2.0, 12.0                                # range of depth; the sky is at FAR

# Of each solid: half its height, so that it stands on the ground, and its largest turn about the
# vertical. The flat ones turn little: from the side all of them are bars.
HALF_HEIGHT = (0.92, 0.68, 0.92, 0.92, 0.95, 1.05, 0.85, 0.95, 0.5, 0.8)
LARGEST_TURN = (math.pi, math.pi, math.pi, math.pi, 0.7, math.pi, 0.5, 0.7, 0.6, 0.6)
REACH = 1.3                                          # radius of a ball that holds any of them

# What differs from scene to scene, with its lowest and highest value. They take a scene's random
# numbers in this order: another order is another world.
VARIES = dict(
    pitch=(0.2, 0.34),                               # by this angle the camera looks down
    redness=(0, 1), blue_hue=(0.53, 0.65), red_hue=(0, 0.12), sky_saturation=(0.3, 0.65),
    cloud_x=(0, 6.28), cloud_y=(0, 6.28),
    lamp_turn=(-0.9, 0.9),                           # light comes from the left or the right
    scale=(0.85, 1.05), place_x=(-0.16, 0.16), place_z=(-0.2, 0.2),  # of the solid
    tile_x=(0, 6.28), tile_z=(0, 6.28),
    ground_hue=(0.05, 0.45), ground_saturation=(0.15, 0.45), ground_value=(0.4, 0.65),
    turn=(0, 1),                                     # from -LARGEST_TURN to LARGEST_TURN
    stripe_x=(-1, 1), stripe_z=(-1, 1), stripe_phase=(0, 6.28),      # stripes, and their slant
    hue=(0, 1), saturation=(0.55, 0.95), stripe_strength=(0, 0.2))


# --------------------------------------------------------------------------------------------------
# Numbers, colours, solids

def scene_numbers(seed, index, count):
    """(N, count) numbers in [0, 1), functions of (seed, index, column): SplitMix64 of a counter."""
    x = index.astype(np.uint64)[:, None] * np.uint64(64) + np.arange(count, dtype=np.uint64)
    x = x + np.array([seed + 1], np.uint64) * np.uint64(0xD1342543DE82EF95)
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    # the upper 24 bits are all that a float32 below 1 can hold
    return torch.from_numpy((x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24))


def hsv(hue, saturation, value):
    """Colours (3, ...) from hue, saturation, value in [0, 1]."""
    k = torch.remainder(torch.stack([5 + 6 * hue, 3 + 6 * hue, 1 + 6 * hue]), 6)
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def box(x, y, z, a, b, c):
    """Distance to a box of half sides a, b, c; too small beyond its edges, never too large."""
    return torch.maximum(torch.maximum(x.abs() - a, y.abs() - b), z.abs() - c)


def solid_distance(label, x, y, z):
    """Signed distance, never too large, from points (H,) to the solid of a class at the origin."""
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
    if name == "star":
        # the plane, folded into a tenth, cut by a line from the tip to the notch
        fifth = 2 * math.pi / 5
        angle = (torch.remainder(torch.atan2(x, y) + fifth / 2, fifth) - fifth / 2).abs()
        radius = (x * x + y * y).sqrt()
        edge = radius * (0.582 * angle.cos() + 0.847 * angle.sin()) - 0.612
        return torch.maximum(edge, z.abs() - 0.28)
    if name == "cross":
        bars = torch.minimum(box(x, y, z, 0.95, 0.32, 0.32), box(x, y, z, 0.32, 0.95, 0.32))
        return torch.minimum(bars, box(x, y, z, 0.32, 0.32, 0.95))
    if name == "two spheres":
        return ((x.abs() - 0.55).square() + y * y + z * z).sqrt() - 0.5
    # the arch: a block without a round window and without what lies below the window
    window = (x * x + (y + 0.1).square()).sqrt() - 0.5
    opening = torch.minimum(window, torch.maximum(x.abs() - 0.5, y + 0.1))
    return torch.maximum(box(x, y, z, 0.95, 0.8, 0.4), -opening)


# --------------------------------------------------------------------------------------------------
# The picture, in the order of painting: sky, ground, solid. A vector is a triple (x, y, z)

def camera(scene, size):
    """The eye, three (N, 1), and the unit directions of the rays, three (N, R), row by row."""
    pixel = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1       # (size,)
    right = 0.27 * pixel.repeat(size)[None]                                      # (1, R)
    up = -0.27 * pixel.repeat_interleave(size)[None]                             # (1, R)
    norm = (right * right + up * up + 1).rsqrt()
    cos, sin = scene.pitch.cos(), scene.pitch.sin()
    dy = (up * cos - sin) * norm
    dz = -(cos + up * sin) * norm
    dx = (right * norm).expand_as(dy)
    # five units away from the point that it looks at, 0.8 above the middle of the ground
    return (torch.zeros_like(cos), 0.8 + 5 * sin, 5 * cos), (dx, dy, dz)


def paint_sky(scene, direction):
    """Colours (3, N, R): a gradient of blue or red with soft clouds."""
    dx, dy, _ = direction
    height = (dy * 2.5 + 0.4).clamp(0, 1)
    cloud = torch.sin(9 * dx + scene.cloud_x) * torch.sin(17 * dy + scene.cloud_y)
    saturation = scene.sky_saturation * (0.3 + 0.7 * height)
    return hsv(scene.sky_hue, saturation, 0.95 - 0.12 * height) + 0.06 * cloud.clamp(min=0)


def paint_ground(scene, eye, direction):
    """Colours (3, N, R) of tiles under a shadow, and how far away they are (N, R)."""
    (_, eye_y, eye_z), (dx, dy, dz) = eye, direction
    t = torch.where(dy < -1e-3, -eye_y / dy.clamp(max=-1e-3), 1e9)   # rays upwards miss it
    x, z = t * dx, eye_z + t * dz
    far = (t / FAR).clamp(max=1)
    tile = (torch.sin(2.2 * x + scene.tile_x) * torch.sin(2.2 * z + scene.tile_z)).sign()
    value = scene.ground_value * (1 + 0.08 * tile * (1 - far))       # tiles fade far away
    color = hsv(scene.ground_hue, scene.ground_saturation, value)
    # a soft round shadow, on the side of the solid that is away from the lamp
    lamp_x, _, lamp_z = scene.lamp
    shadow_x = x - scene.place_x + 0.5 * scene.scale * lamp_x
    shadow_z = z - scene.place_z + 0.5 * scene.scale * lamp_z
    shadow = (shadow_x.square() + shadow_z.square()) / (0.8 * scene.scale).square()
    color = color * (1 - 0.55 * torch.exp(-shadow))
    # the air between: without it the horizon would be a hard line
    horizon = hsv(scene.sky_hue, scene.sky_saturation * 0.3, torch.full_like(scene.sky_hue, 0.95))
    return torch.lerp(color, horizon, 0.7 * far.square()), t


def own_frame(turn, x, y, z):
    """A vector as the solid sees it that is turned by `turn` about the vertical."""
    c, s = turn.cos(), turn.sin()
    return c * x - s * z, y, s * x + c * z


def trace(label, origin, direction, t, end):
    """Sphere tracing in the solid's own frame, from t to `end`: which rays hit, and at which t."""
    live = torch.arange(len(t))                      # numbers of the rays that are still under way
    hit, where = torch.zeros(len(t), dtype=torch.bool), t.clone()
    for steps in (4, 4, 8, 32):                      # most rays need few steps, so they are dropped
        for _ in range(steps):
            distance = solid_distance(label, *(o + t * d for o, d in zip(origin, direction)))
            t = t + distance
        arrived = distance < 2e-3
        under_way = (distance >= 2e-3) & (t < end)
        hit[live[arrived]], where[live[arrived]] = True, t[arrived]
        live, t, end = live[under_way], t[under_way], end[under_way]
        origin = [o[under_way] for o in origin]
        direction = [d[under_way] for d in direction]
    return hit, where


def find_solid(label, scene, eye, direction):
    """The hits: scene, ray, distance from the eye, each (H,), and place, seen from the solid."""
    (_, eye_y, eye_z), (dx, dy, dz) = eye, direction
    # from the solid's middle to the eye
    x, y, z = -scene.place_x, eye_y - HALF_HEIGHT[label] * scene.scale, eye_z - scene.place_z
    # only rays that meet the ball around the solid are traced, and only inside that ball
    along = x * dx + y * dy + z * dz                                             # (N, R)
    ball = along.square() - (x.square() + y.square() + z.square()) + (REACH * scene.scale).square()
    row, ray = torch.nonzero(ball > 0, as_tuple=True)
    # the solid of solid_distance neither turns nor grows, so the ray turns and shrinks instead
    turn, scale = scene.turn[row, 0], scene.scale[row, 0]
    origin = own_frame(turn, x[row, 0] / scale, y[row, 0] / scale, z[row, 0] / scale)
    direction = own_frame(turn, dx[row, ray], dy[row, ray], dz[row, ray])
    middle, half = -along[row, ray] / scale, ball[row, ray].sqrt() / scale
    hit, t = trace(label, origin, direction, middle - half, middle + half)
    place = [o[hit] + t[hit] * d[hit] for o, d in zip(origin, direction)]
    return row[hit], ray[hit], t[hit] * scale[hit], place


def shade(label, scene, row, place):
    """Colours (3, H): stripes on a plain colour, light of the sky and of the lamp, a highlight."""
    x, y, z = place
    e = 2e-3                                         # the normal is the gradient of the distance
    normal = torch.stack([solid_distance(label, x + e, y, z) - solid_distance(label, x - e, y, z),
                          solid_distance(label, x, y + e, z) - solid_distance(label, x, y - e, z),
                          solid_distance(label, x, y, z + e) - solid_distance(label, x, y, z - e)])
    normal = F.normalize(normal, dim=0)                                          # (3, H)
    to_lamp = own_frame(scene.turn[row, 0], *(v[row, 0] for v in scene.lamp))
    lamp = (normal * torch.stack(to_lamp)).sum(0).clamp(min=0)                   # (H,)
    slant = scene.stripe_x[row, 0] * x + y + scene.stripe_z[row, 0] * z
    stripes = torch.sin(4 * slant + scene.stripe_phase[row, 0]).sign()
    color = hsv(scene.hue, scene.saturation, torch.ones_like(scene.hue))[:, row, 0]
    color = color * (1 + scene.stripe_strength[row, 0] * stripes)
    return color * (0.42 + 0.13 * normal[1] + 0.75 * lamp) + 0.25 * lamp ** 12


def draw_class(label, u, size):
    """Scenes of one class from numbers u (N, 24): images (3, N, R), masks and depth (N, R)."""
    scene = SimpleNamespace()
    for (name, (low, high)), column in zip(VARIES.items(), u.T[:, :, None]):
        setattr(scene, name, low + (high - low) * column)                # (N, 1)
    scene.sky_hue = torch.where(scene.redness < 0.5, scene.blue_hue, scene.red_hue)
    scene.turn = -LARGEST_TURN[label] + 2 * LARGEST_TURN[label] * scene.turn
    scene.lamp = (0.66 * scene.lamp_turn.sin(), torch.full_like(scene.lamp_turn, 0.75),
                  0.66 * scene.lamp_turn.cos())

    eye, direction = camera(scene, size)
    sky = paint_sky(scene, direction)                                            # (3, N, R)
    ground, t = paint_ground(scene, eye, direction)
    on_ground = t < 2 * FAR
    image = torch.where(on_ground, ground, sky)
    mask = on_ground.long()                                              # 0 is sky, 1 is ground
    depth = torch.where(on_ground, t, FAR).clamp(max=FAR)

    row, ray, t, place = find_solid(label, scene, eye, direction)
    image[:, row, ray] = shade(label, scene, row, place)
    mask[row, ray] = 2 + label
    depth[row, ray] = t
    return image.clamp(0, 1), mask, depth


def draw_scenes(seed, index, size=32):
    """Scenes number `index` (N,) of a seed, functions of (seed, index) alone.

    Images (N, 3, size, size) uint8; labels (N,), which are index mod 10; masks (N, size, size)
    uint8, numbers in SEGMENTS; depth (N, size, size) float32, from NEAR to FAR.
    """
    index = np.asarray(index)
    u, labels = scene_numbers(seed, index, 24), torch.from_numpy(index % 10)
    images = torch.empty(len(index), 3, size, size, dtype=torch.uint8)
    masks = torch.empty(len(index), size, size, dtype=torch.uint8)
    depths = torch.empty(len(index), size, size, dtype=torch.float32)
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).flatten()
        image, mask, depth = draw_class(label, u[rows], size)
        image = (image * 255).round().to(torch.uint8)
        images[rows] = image.view(3, -1, size, size).transpose(0, 1)
        masks[rows] = mask.to(torch.uint8).view(-1, size, size)
        depths[rows] = depth.view(-1, size, size)
    return images, labels, masks, depths


# --------------------------------------------------------------------------------------------------
# The data set

def truth_path(path):
    """Where masks and depth of a data set's images are: scenes.zip -> scenes-truth.npz."""
    return Path(path).with_name(f"{Path(path).stem}-truth.npz")


def write_split(archive, split, first, count, size, bar):
    """Scenes first to first + count - 1 into the zip file; their masks and depth, in its order."""
    masks, depths = [], []
    for name in sorted(SCENE_CLASSES):               # as train.ImageFolder lists the folders
        numbers = np.arange(first + SCENE_CLASSES.index(name), first + count, 10)
        for part in np.array_split(numbers, math.ceil(len(numbers) / 100)):
            images, _, mask, depth = draw_scenes(0, part, size)
            masks.append(mask.numpy())
            depths.append(depth.numpy().astype(np.float16))
            for number, image in zip(part, images.permute(0, 2, 3, 1).numpy()):
                png = io.BytesIO()
                Image.fromarray(image).save(png, format="PNG")
                # an entry made of its name alone is not deflated and dates from 1980, so that the
                # file has the same bytes each time
                archive.writestr(zipfile.ZipInfo(f"{split}/{name}/{number:06}.png"), png.getvalue())
            bar.update(len(part))
    return np.concatenate(masks), np.concatenate(depths)


def write_scenes(path, count=20000, size=32):
    """Write `count` scenes to train on and a tenth as many to test on, unless they are there.

    Raises ValueError for a count or size that cannot be, and where other scenes are there.
    """
    path, truth_file = Path(path), truth_path(path)
    if count < 100 or size < 1:
        raise ValueError(f"{count} scenes of {size} pixels: want at least 100, so that every class "
                         "has one to test on, and a pixel")
    if path.is_file():
        if not truth_file.is_file():
            raise ValueError(f"{path} is there without {truth_file}: move it away")
        with np.load(truth_file) as truth:
            there = truth["train_masks"].shape
        if there != (count, size, size):
            raise ValueError(f"{path} holds {there[0]} scenes of {there[1]} pixels, not {count} of "
                             f"{size}: move it away or choose another name")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    truth, bar = {}, progress(count + count // 10, "drawing scenes", "scene")
    with atomic_file(path) as file, bar:
        with zipfile.ZipFile(file, "w") as archive:
            # test scenes count from 10^9, so that more scenes to train on never are among them
            for split, first, number in (("train", 0, count), ("test", 10 ** 9, count // 10)):
                masks, depth = write_split(archive, split, first, number, size, bar)
                truth[f"{split}_masks"], truth[f"{split}_depth"] = masks, depth
        with atomic_file(truth_file) as beside:      # the .zip gets its name last of all
            np.savez(beside, **truth)


def main(argv=None):
    """Write the built-in world to a .zip."""
    parser = argparse.ArgumentParser(prog="python -m demo.scenes", description=main.__doc__)
    parser.error = stop                              # one line, without the usage
    parser.add_argument("--out", type=Path, required=True, help="the .zip to write")
    parser.add_argument("--count", type=int, default=20000, help="scenes to train on")
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side")
    args = parser.parse_args(argv)
    try:
        write_scenes(args.out, args.count, args.image_size)
    except (ValueError, OSError) as error:
        stop(error)
    print(f"{args.out} is ready, and {truth_path(args.out)} with its masks and depth")


if __name__ == "__main__":
    main()
