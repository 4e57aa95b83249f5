"""Plain against aligned: the figures and pictures of a run of the demo.

    python -m demo.report --out runs/scenes

reads OUT/teacher, OUT/judge, OUT/plain and OUT/aligned; writes report.md, report.json, pictures.

    FD        Frechet distance of the judge's features, |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)),
              to those of held-out images. The judge is a small network of this run: FD is no FID
    cosine    of what the MLPs predict from a latent and the teacher's tokens of its image
    mIoU      of the masks that the teacher's head reads off what the MLPs make of a latent

    N images   C channels of latents z (N, C, h, w)   H = W the image's side   D the teacher's width
"""
import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import align
import fid
import vae
from demo.__main__ import read_timings
from demo.pictures import scatter, tsne
from demo.scenes import FAR, NEAR, truth_path
from demo.teacher import load_judge
from sample import (by_class, legend_of, load_heads, load_task_heads, read_latents, read_tasks,
                    sheet)
from train import (DataError, ImageFolder, Latents, autoencoder_folder, device, generator, in_order,
                   load_autoencoder, load_teacher, read_json, save_picture, spread, stop, to_float,
                   to_uint8, write_json)
from vae import atomic_file

PROBED = 8000                                            # training images of the linear probe
FD = "FD of samples, no guidance"
MASKS = "masks from latents, mIoU"
DEPTH = "depth from latents, relative error"


# --------------------------------------------------------------------------------------------------
# What both autoencoders are held against


class Referee:
    """Held-out images, what the judge and the teacher see in them, and their masks and depth where
    the data has any. The folder `out` holds teacher/ and judge/."""

    def __init__(self, out):
        settings = read_json(out / "judge" / "settings.json")
        data, self.size = settings["data"], settings["image_size"]
        test = ImageFolder(data, "test", self.size)
        self.train_set = ImageFolder(data, "train", self.size)
        self.classes, self.labels = test.classes, test.labels.to(device)
        # spread over all of them, since a folder lists one class after the other
        self.probed = spread(len(self.train_set), PROBED)
        self.probed_labels = self.train_set.labels[self.probed].to(device)
        self.images = torch.cat([images for images, _ in in_order(test, 500)])   # (N, 3, H, W)
        self.x = to_float(self.images)                                           # (N, 3, H, W)

        self.judge = load_judge(out / "judge", len(self.classes))
        self.feats, self.logits, self.spatial = in_batches(self.judge, self.x)
        self.teacher = load_teacher(str(out / "teacher")).to(device)
        self.tokens = in_batches(self.teacher_tokens, self.x)                    # (N, T, D), (N, D)
        # photographs come without masks and depth: no figures of them then
        self.truth, self.task_heads, self.seen = None, None, None
        if truth_path(data).is_file():
            with np.load(truth_path(data)) as archive:
                masks, depth = (torch.from_numpy(archive[f"test_{k}"]) for k in ("masks", "depth"))
            self.truth = masks.to(device), depth.to(device, torch.float32)       # (N, H, W) each
            self.task_heads = load_task_heads([out / "teacher"])
            self.task_heads.segmentation.to(device)
            self.task_heads.depth.to(device)
            self.seen = in_batches(self.read_images, self.x)

    def teacher_tokens(self, x):
        return align.teacher_tokens(self.teacher, x, self.size)

    def read_images(self, x):
        """Masks and depth (N, H, W) as the teacher itself sees them."""
        patch, cls = self.teacher_tokens(x)
        side = self.size // self.teacher.patch_size
        features = patch.transpose(1, 2).unflatten(2, (side, side))              # (N, D, gh, gw)
        return read_tasks(self.task_heads, self.size, features, cls)

    def ideal(self, count):
        """The end of the scale: figures of real images, and of the teacher on the images."""
        # as many as there are samples: the distance of small sets is larger
        rows = torch.randperm(len(self.train_set), generator=generator(0, 3))[:count]
        x = torch.cat([to_float(images) for images, _ in in_order(self.train_set, 500, rows)])
        feats, *_ = in_batches(self.judge, x)
        accuracy = (self.logits.argmax(1) == self.labels).float().mean().item()
        figures = {FD: frechet(feats, self.feats),
                   "class accuracy of samples, no guidance": accuracy}
        if self.truth:
            figures[MASKS], figures[DEPTH] = score_tasks(self.seen, self.truth)
        return figures


@torch.no_grad()
def in_batches(function, x, size=250):
    """function over x (N, ...) in batches; its tensor, or its tuple of tensors, of all."""
    parts = [function(part) for part in x.split(size)]
    if torch.is_tensor(parts[0]):
        return torch.cat(parts)
    return tuple(torch.cat(part) for part in zip(*parts))


# --------------------------------------------------------------------------------------------------
# Figures


def frechet(a, b):
    """Frechet distance of two sets of features (N, D)."""
    return fid.frechet_distance(*fid.feature_statistics(a.cpu()), *fid.feature_statistics(b.cpu()))


def mean_iou(mask, truth, num_classes):
    """Intersection over union of masks, over all pixels, averaged over the classes that occur."""
    pairs = truth.long() * num_classes + mask.long()                             # (N, H, W)
    counts = torch.bincount(pairs.flatten(), minlength=num_classes ** 2).double()
    counts = counts.view(num_classes, num_classes)                               # truth, mask
    intersection = counts.diag()
    union = counts.sum(0) + counts.sum(1) - intersection                         # 0: nowhere
    return (intersection[union > 0] / union[union > 0]).mean().item()


def score_tasks(read, truth):
    """Masks and depth (N, H, W) against others: mean IoU, mean relative error of depth."""
    (mask, depth), (true_mask, true_depth) = read, truth
    num_classes = int(max(mask.max(), true_mask.max())) + 1
    error = (depth - true_depth).abs() / true_depth
    return mean_iou(mask, true_mask, num_classes), error.mean().item()


def linear_probe(x, labels, test_x, test_labels, num_classes):
    """Accuracy on test_x of multinomial logistic regression, by up to 200 steps of L-BFGS."""
    # standardised, so that the penalty is the same for latents of any scale
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, test_x = (x - mean) / std, (test_x - mean) / std
    weight = torch.zeros(x.shape[1], num_classes, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    opt = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    return ((test_x @ weight + bias).argmax(1) == test_labels).float().mean().item()


def load_lane(folder, latents, referee, heads=True):
    """What is measured of the autoencoder in a folder, with the latents of its run, as an object:
    `autoencoder`; `heads`, the MLPs that read the referee's teacher, or None; `z_probed` and `z`,
    the means of q(z | x) of the probed training images and of the held-out ones; `x`, z as
    diffusion sees it."""
    latents, autoencoder = Latents(latents), load_autoencoder(folder).to(device)
    moments, _ = latents.__getitems__([(row, False) for row in referee.probed])
    # means, no samples: the figures have no noise of their own
    z = in_batches(lambda x: autoencoder.encode(x).latent_dist.mean, referee.x)
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (latents.mean, latents.std))
    return SimpleNamespace(autoencoder=autoencoder, z=z,
                           heads=load_heads(folder).to(device) if heads else None,
                           z_probed=moments.chunk(2, dim=1)[0].to(device), x=(z - mean) / std)


def score_autoencoder(referee, lane):
    """Figures of reconstructions and latents; adds the reconstructions and their features."""
    lane.rec = in_batches(lambda z: to_uint8(lane.autoencoder.decode(z).sample), lane.z)
    lane.rec_feats, *_ = in_batches(referee.judge, to_float(lane.rec))
    figures = {"PSNR of reconstructions, dB": vae.psnr(to_float(lane.rec), referee.x).mean().item(),
               "FD of reconstructions": frechet(lane.rec_feats, referee.feats)}
    if lane.heads:
        patch, cls = in_batches(lane.heads, lane.z)                              # (N, T, D), (N, D)
        # channel by channel, as the MLPs learned them: else one large channel is all of the cosine
        true_patch, true_cls = lane.heads.standardize(*referee.tokens)           # (N, T, D), (N, D)
        for name, x, true in (("patches", patch, true_patch), ("class token", cls, true_cls)):
            cosine = F.cosine_similarity(x, true, dim=-1).mean().item()
            figures[f"cosine to the teacher, {name}"] = cosine
    figures["linear probe on latents, accuracy"] = linear_probe(
        lane.z_probed.flatten(1), referee.probed_labels, lane.z.flatten(1), referee.labels,
        len(referee.classes))
    return figures


def score_latents(referee, lane):
    """Figures of the masks and depth of held-out images, read off their latents."""
    lane.read = in_batches(lambda z: read_latents(lane.heads, referee.task_heads, z, referee.size),
                           lane.z)
    return dict(zip((MASKS, DEPTH), score_tasks(lane.read, referee.truth)))


def load_samples(path):
    """Images (N, 3, H, W) uint8 and labels (N,) that sample.py wrote."""
    with np.load(path) as archive:
        images, labels = torch.from_numpy(archive["arr_0"]), torch.from_numpy(archive["arr_1"])
    return images.permute(0, 3, 1, 2), labels


def score_samples(referee, lane, images, labels, guidance):
    """Figures of samples; guidance is a word of their names."""
    feats, logits, _ = in_batches(referee.judge, to_float(images))
    accuracy = (logits.argmax(1).cpu() == labels).float().mean().item()
    return {f"FD of samples, {guidance}": frechet(feats, referee.feats),
            f"FD of samples to own reconstructions, {guidance}": frechet(feats, lane.rec_feats),
            f"class accuracy of samples, {guidance}": accuracy}


def score_generated(referee, lane, latents, images):
    """Masks and depth of generated latents against what the teacher sees in their images."""
    read = in_batches(lambda z: read_latents(lane.heads, referee.task_heads, z, referee.size),
                      torch.from_numpy(latents).to(device))                      # (N, H, W) each
    iou, error = score_tasks(read, in_batches(referee.read_images, to_float(images)))
    return {"masks of generated latents, mIoU with the teacher's": iou,
            "depth of generated latents, off the teacher's": error}


def measure(run, referee):
    """All figures of a lane, and the lane with what the pictures show."""
    lane = load_lane(autoencoder_folder(run), run / "latents", referee)
    figures = score_autoencoder(referee, lane)
    scale = read_json(run / "samples-guided.json")["cfg_scale"]
    lane.samples = load_samples(run / "samples.npz")
    lane.guided = load_samples(run / "samples-guided.npz")
    figures.update(score_samples(referee, lane, *lane.samples, "no guidance"))
    figures.update(score_samples(referee, lane, *lane.guided, f"guidance {scale:g}"))
    if referee.truth:
        figures.update(score_latents(referee, lane))
        latents = np.load(run / "samples-latents.npy")
        figures.update(score_generated(referee, lane, latents, lane.samples[0]))
    return figures, lane


# --------------------------------------------------------------------------------------------------
# Pictures and report


def draw_report(out, referee, lanes):
    """The pictures of the report. Returns their names."""
    labels = referee.labels.cpu()
    rows, _ = by_class(torch.arange(len(labels)), labels, 10, 8)         # (classes, 8)
    drawn = {}
    drawn["reconstructions.png"] = sheet({
        "original": referee.images[rows],
        **{name: lane.rec.cpu()[rows] for name, lane in lanes.items()}})
    drawn["samples.png"] = sheet({
        name: by_class(*lane.samples, 10, 10)[0] for name, lane in lanes.items()})
    drawn["samples-guided.png"] = sheet({
        f"{name}, guided": by_class(*lane.guided, 10, 10)[0] for name, lane in lanes.items()})
    if referee.truth:
        drawn["tasks.png"] = task_picture(referee, lanes, rows[:, :3])
    some = torch.randperm(len(labels), generator=generator(0, 4))[:1000]
    if len(some) >= 90:                                  # fewer points have no neighbourhoods
        panels = {}
        for name, lane in lanes.items():
            # 4 x 4 cells: what is where, roughly; a shift of two pixels counts little
            pooled = F.adaptive_avg_pool2d(lane.x, 4).flatten(1).cpu()           # (N, 16 C)
            panels[f"{name} latents of held-out images, t-SNE"] = tsne(pooled[some])
        drawn["embedding.png"] = scatter(panels, labels[some], referee.classes)
    for name, picture in drawn.items():
        save_picture(picture, out / name)
    return list(drawn)


def task_picture(referee, lanes, rows):
    """Masks and depth of held-out images: exact, as the teacher sees them, read off latents."""
    columns = {"held-out image": referee.images[rows]}
    views = {"exact": referee.truth, "teacher": referee.seen,
             **{name: lane.read for name, lane in lanes.items()}}
    segments = referee.task_heads.classes
    for name, (mask, _) in views.items():
        colors = align.colorize_mask(mask.cpu()[rows.flatten()], len(segments))
        columns[f"mask, {name}"] = colors.unflatten(0, rows.shape)
    for name, (_, depth) in views.items():
        colors = align.colorize_depth(depth.cpu()[rows.flatten()], NEAR, FAR)
        columns[f"depth, {name}"] = colors.unflatten(0, rows.shape)
    return sheet(columns, legend=legend_of(referee.truth[0].long(), segments))


def verdict(table):
    """The paper's claim, held against this run."""
    plain, aligned = table["plain"][FD], table["aligned"][FD]
    gain = 100 * (1 - aligned / plain)
    direction = "lower" if gain > 0 else "higher"
    reached = "reached" if gain >= 15 else "not reached"
    return (f"FD of samples without guidance is {abs(gain):.0f} % {direction} when aligned: the "
            f"aim of 15 % lower is {reached} in this run.")


def write_report(out, table, ideal, timings, drawn):
    """report.md, and its table on the terminal."""
    plain, aligned = table["plain"], table["aligned"]
    lines = ["# Plain and aligned latents", "",
             "| | plain | aligned | change | real images, teacher |", "|---|---|---|---|---|"]
    for name in plain:
        change = f"{aligned[name] - plain[name]:+.3f}"
        if name.startswith("FD"):                        # has no unit: only its ratio says much
            change = f"{100 * (aligned[name] / plain[name] - 1):+.0f} %"
        last = f"{ideal[name]:.3f}" if name in ideal else ""
        lines.append(f"| {name} | {plain[name]:.3f} | {aligned[name]:.3f} | {change} | {last} |")
    lines += ["", verdict(table), "",
              "FD is the Frechet distance of the features of this run's own judge to held-out "
              "images: it is no FID and compares with nothing outside this run. The last column "
              "gives what real images score, and the masks and depth that the teacher sees in the "
              "images. Cosines are of features standardised per channel. The plain autoencoder's "
              "MLPs have learned to read it afterwards.", "",
              "| command | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.0f} |" for name, seconds in timings.items()]
    lines += ["", *(f"![{name}]({name})\n" for name in drawn)]
    with atomic_file(out / "report.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    width = max(map(len, plain))
    print(f"\n{'':{width}}     plain   aligned")
    for name in plain:
        print(f"{name:{width}} {plain[name]:9.3f} {aligned[name]:9.3f}")
    print(f"\n{verdict(table)}\nreport and pictures: {out}/report.md")


def report(out):
    """Measure both lanes, and write all that is said of them."""
    started = time.time()
    for name in ("plain", "aligned"):
        for file in ("samples.npz", "samples-latents.npy", "samples-guided.npz"):
            if not (out / name / file).is_file():
                stop(f"{out / name / file} not found: run python -m demo --out {out} first")
    referee, table, lanes = Referee(out), {}, {}
    for name in ("plain", "aligned"):
        table[name], lanes[name] = measure(out / name, referee)
    ideal = referee.ideal(len(lanes["plain"].samples[1]))
    write_json({**table, "real images, teacher": ideal}, out / "report.json")    # before pictures
    drawn = draw_report(out, referee, lanes)
    drawn += [name for name in ("aligned/samples-tasks.png", "curves.png")
              if (out / name).is_file()]
    # its own end is noted after it by the demo, too late for the table
    timings = {**read_timings(out), "report": time.time() - started}
    write_report(out, table, ideal, timings, drawn)


def main(argv=None):
    """The report of a finished demo; stops with one line where something of it is missing."""
    parser = argparse.ArgumentParser(prog="python -m demo.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop                                  # one line, without the usage
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"), help="folder of the demo")
    try:
        report(parser.parse_args(argv).out)
    except DataError as error:
        stop(error)


if __name__ == "__main__":
    main()
