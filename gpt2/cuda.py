"""The ways to use a GPU, each once: does it run, is it right, and how fast is it there?

    python -m gpt2.cuda                               # needs what `gpt2.bench --peers` needs
    python -m gpt2.cuda --init_from out/gpt2          # without a network, from a folder

Every step is a program of its own with a limit on its time, some ten minutes for all. After each
--out has its command, its exit status, its seconds and the last lines that it wrote, beside the
GPU's name and the versions. "resumed" kills a run (kill -9) between two checkpoints, goes on, and
tells the largest difference of a weight from the step "float32", which was left alone. "torchrun"
uses NCCL if there are several GPUs.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data import files
from gpt2.bench import ends_of
from model import GPT

# A step adds the name of the folder, and flags.
TRAIN = "-m gpt2.train --data data/facts.jsonl --eval data/prior.jsonl --steps 12 --batch_size 8 "
TRAIN += "--max_new_tokens 32 --log_every 1 --save_every 6 --device {device} "
TRAIN += "--init_from {init_from} --out_dir {out}/"
STEPS = {  # name: (most seconds, arguments of python)
    "tests": (45, "-m pytest -q -k cuda gpt2/test_fast.py gpt2/test_lora.py"),
    "toy": (75, "train_toy.py --device {device} --out_dir {out}/toy"),
    "float32": (50, TRAIN + "float32 --dtype float32"),
    "bfloat16": (45, TRAIN + "bfloat16 --dtype bfloat16"),
    "adapters": (45, TRAIN + "adapters --dtype float32 --lora_rank 16"),
    "torchrun": (60, "-m torch.distributed.run --nproc_per_node={gpus} " + TRAIN + "torchrun"),
    "speed": (160, "-m gpt2.bench --peers --device {device} --init_from {init_from}"),
    "gpt2-xl": (60, "-m gpt2.bench --device {device} --init_from gpt2-xl"),
}
RESUMED = 60  # most seconds of the step "resumed"


def run(arguments, limit):
    """The command, its exit status (124: too long), seconds and last lines."""
    start, command = time.perf_counter(), [sys.executable, *arguments.split()]
    about = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, start_new_session=True, **about) as process:
        try:
            output, _ = process.communicate(timeout=limit)
            status = process.returncode
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers then
            time.sleep(3)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own processes are left, e.g. bench's
            output, _ = process.communicate()
            status = 124
    seconds = round(time.perf_counter() - start, 1)
    command = "python " + arguments
    return dict(command=command, status=status, seconds=seconds, last=output.splitlines()[-25:])


def resumed(arguments, folder, uninterrupted):
    """As `run`, of a run that is killed after a checkpoint on its way and goes on."""
    process = subprocess.Popen([sys.executable, *arguments.split()], stdout=subprocess.DEVNULL)
    end = time.monotonic() + RESUMED / 2
    is_saved = lambda: any(folder.glob("checkpoints/*[1-9].pt"))
    while process.poll() is None and not is_saved() and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    found = run(f"-m gpt2.train --resume --out_dir {folder}", RESUMED / 2)
    if found["status"] == 0:
        pairs = zip(*(GPT.from_pretrained(f).parameters() for f in (folder, uninterrupted)))
        found["difference"] = max((a - b).abs().max().item() for a, b in pairs)
    return found


def copy_speed(device):
    """GB/s of a copy, read and written: it bounds a rollout, which reads all weights per token."""
    source = torch.zeros(2**28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    ends = ends_of(lambda: target.copy_(source), 6, device)
    return round(2 * source.nbytes / min(b - a for a, b in zip(ends, ends[1:])) / 1e9, 1)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument("steps", nargs="*", help="only these: " + ", ".join([*STEPS, "resumed"]))
    p.add_argument("--init_from", default="gpt2", help="or a folder with weights and vocabulary")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try it")
    p.add_argument("--out", type=Path, default="gpt2/results/cuda.json", help="file to write")
    args = p.parse_args(argv)
    steps = args.steps or [*STEPS, "resumed"]
    if not {*steps} <= {*STEPS, "resumed"} or ("resumed" in steps and "float32" not in steps):
        p.error(f"steps are {', '.join(STEPS)} and, with float32, resumed")
    gpus = min(torch.cuda.device_count(), 2)
    if args.device == "cuda" and not gpus:
        sys.exit("error: torch finds no GPU; --device cpu tries the steps without one")
    found = files.machine(args.device) | dict(gpus=gpus, cuda=torch.version.cuda)
    found |= dict(copy_gb_per_s=copy_speed(args.device), steps={})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as out:
        names = dict(device=args.device, init_from=args.init_from, out=out, gpus=gpus or 1)
        for step in steps:
            if step == "resumed":
                arguments = (TRAIN + "resumed --dtype float32").format(**names)
                done = resumed(arguments, Path(out, "resumed"), Path(out, "float32"))
            else:
                limit, arguments = STEPS[step]
                done = run(arguments.format(**names), limit)
            found["steps"][step] = done
            text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
            files.write_whole(args.out, lambda tmp: tmp.write_text(text, encoding="utf-8"))
            print(f"{step}: status {done['status']}, {done['seconds']} s", flush=True)
    if any(done["status"] for done in found["steps"].values()):
        sys.exit(f"error: a step has failed; its last lines are in {args.out}")


if __name__ == "__main__":
    main()
