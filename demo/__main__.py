"""The demo: plain against aligned latents, by commands that you could type yourself.

    python -m demo                           a built-in world of ten solids, in runs/scenes
    python -m demo --data images.zip         images of your own, in runs/images

Every command is printed as it starts. A lane is a list of commands, one after the other; two lanes
run side by side:

    scenes      teacher     plain      vae, MLPs for it, latents, SiT, samples      report
                judge       aligned    align, latents, SiT, samples with masks

Stopped at any point, it goes on when it is typed again: every program knows what it has done.
"""
import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from demo.scenes import truth_path
from train import read_json, stop, world_size, write_json

ROOT = Path(__file__).resolve().parent.parent


# --------------------------------------------------------------------------------------------------
# What is run


def command(program, *words):
    """The words of a command: command("train.py", ...) or command("demo.teacher", ...)."""
    start = [os.path.relpath(ROOT / program)] if program.endswith(".py") else ["-m", program]
    return [sys.executable, *start, *map(str, words)]


def shared_commands(cfg):
    """What both lanes begin with, as groups of lanes: the world, then its teacher and its judge."""
    flags = ["--data", cfg.data, "--seed", cfg.seed, *cfg.shorter]
    scenes = command("demo.scenes", "--out", cfg.data, "--count", cfg.scenes)
    teacher = command("demo.teacher", "train", "--out", cfg.out / "teacher", *flags)
    judge = command("demo.teacher", "judge", "--out", cfg.out / "judge", *flags)
    world = [[[("scenes", scenes)]]] if cfg.built_in else []
    return [*world, [[("teacher", teacher)], [("judge", judge)]]]


def lane(cfg, name):
    """[(name, command), ...] for an autoencoder, `plain` or `aligned`, and SiT on its latents."""
    run, jobs = cfg.out / name, {}
    common = ["--preset", "small", "--data", cfg.data, "--out", run, "--seed", cfg.seed]
    common += cfg.shorter
    if cfg.has_truth:                                    # more scenes rather than mirrored ones
        common.append("--no-flip")
    align = ["--stage", "align", "--teacher", cfg.out / "teacher"]
    if name == "plain":                                  # its MLPs learn to read it afterwards
        jobs["vae"] = command("train.py", "--stage", "vae", *common)
        align += ["--init", run / "vae", "--freeze"]
    jobs["align"] = command("train.py", *align, *common)
    jobs["sit"] = command("train.py", "--stage", "latents", "sit", *common)

    sampler = ["--run", run, "--num", cfg.num, "--steps", 8, "--seed", cfg.seed]
    tasks = ["--latents"]
    if name == "aligned":                                # photographs have no masks to learn from
        tasks += ["--tasks", "features", *(["segmentation", "depth"] if cfg.has_truth else [])]
    jobs["samples"] = command("sample.py", *sampler, *tasks, "--out", run / "samples.npz")
    jobs["samples-guided"] = command("sample.py", *sampler, "--cfg-scale", cfg.cfg_scale,
                                     "--out", run / "samples-guided.npz")
    return [(f"{name}/{job}", words) for job, words in jobs.items()]


# --------------------------------------------------------------------------------------------------
# How it is run


def run_lanes(lanes, out):
    """Run lanes [[(name, command), ...], ...], two at once on a CPU. OUT/timings.json gets their
    seconds. A command that fails ends the other lanes and this program, with its own status."""
    slots = min(2, os.cpu_count())
    if torch.cuda.is_available():                        # such small networks leave it idle
        slots = max(1, os.cpu_count() // 2)
    for number in (signal.SIGTERM, signal.SIGINT):       # an exception, so that `finally` happens
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    waiting = [list(jobs) for jobs in lanes]
    running = {}                                         # slot: (child, its name, start, next jobs)
    try:
        while waiting or running:
            for slot in range(slots):
                jobs = []
                if slot not in running:
                    jobs = waiting.pop(0) if waiting else []
                elif running[slot][0].poll() is not None:
                    child, name, start, jobs = running.pop(slot)
                    note_end(name, child.returncode, time.time() - start, out)
                if jobs:
                    (name, words), *jobs = jobs
                    running[slot] = start_command(words, slot, slots), name, time.time(), jobs
            time.sleep(0.05)
    finally:
        for child, *_ in running.values():
            child.terminate()
        for child, *_ in running.values():
            child.wait()


def start_command(words, slot, slots):
    """Print a command and start it, with its share of the cores."""
    print("\n$ " + shlex.join(["python", *words[1:]]), flush=True)
    env = dict(os.environ,
               OMP_NUM_THREADS=str(max(1, os.cpu_count() // slots)),
               OMP_WAIT_POLICY="passive",                # a thread that waits leaves its core alone
               REALS_BAR=str(slot),                      # the line of the progress bar
               PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    return subprocess.Popen(words, env=env)


def note_end(name, status, seconds, out):
    """Keep the seconds of a command; end this program as the command has ended, if it failed."""
    if status < 0:
        print(f"{name} was killed by signal {-status}: the same command goes on from here",
              file=sys.stderr)
        status = 128 - status
    if status:
        sys.exit(status)                                 # the command itself has said why
    timings = read_timings(out)
    if name not in timings:                              # a second run only finds that it is done
        write_json({**timings, name: round(seconds, 1)}, out / "timings.json")


def read_timings(out):
    """{name: seconds} of the commands that have run so far."""
    return read_json(out / "timings.json") if (out / "timings.json").is_file() else {}


def parse_arguments(argv=None):
    """The flags, and what follows from them: built_in, has_truth, shorter."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop                                  # one line, without the usage
    parser.add_argument("--data", type=Path, help="images of your own, a folder or .zip")
    parser.add_argument("--out", type=Path, help="default: runs/scenes, or runs/ and your data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=2000, help="images to sample and to compare")
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="of the second set of samples")
    parser.add_argument("--scenes", type=int, default=20000, help="scenes to train on")
    parser.add_argument("--steps", type=int, help="of all that trains, to try the commands out")
    cfg = parser.parse_args(argv)
    cfg.built_in = cfg.data is None
    cfg.out = cfg.out or Path("runs", "scenes" if cfg.built_in else cfg.data.stem)
    cfg.data = cfg.data or cfg.out / "scenes.zip"
    cfg.has_truth = cfg.built_in or truth_path(cfg.data).is_file()
    cfg.shorter = ["--steps", cfg.steps] if cfg.steps else []
    return cfg


def main():
    """Run all commands of the demo, the report last; stops under torchrun."""
    cfg = parse_arguments()
    if world_size > 1:
        stop("the demo starts its own processes: run it without torchrun")
    lanes = [lane(cfg, "plain"), lane(cfg, "aligned")]
    logs = [cfg.out / name for name in ("teacher", "judge", "plain/vae", "plain/align",
                                        "aligned/align", "plain/sit", "aligned/sit")]
    curves = command("demo.pictures", "curves", *logs, "--out", cfg.out / "curves.png")
    report = command("demo.report", "--out", cfg.out)
    for group in (*shared_commands(cfg), lanes, [[("curves", curves), ("report", report)]]):
        run_lanes(group, cfg.out)


if __name__ == "__main__":
    main()
