"""What a program does with its folder: begin a run, write files whole or not at all, keep logs.

Every line of a log, a JSONL file, stands alone.
"""

import contextlib
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch


@contextlib.contextmanager
def errors_in_a_sentence(interrupted):
    """What its user can mend ends the program with a sentence, not with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # closed, or a notebook's
            stream.reconfigure(errors="backslashreplace")  # a console without ‖ prints on
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"\n{interrupted}")
    except BrokenPipeError:  # the reader of the output, such as head, has left
        sys.stdout = None
        sys.exit(1)
    except (OSError, ValueError, FloatingPointError) as e:
        file = e.filename if isinstance(e, OSError) else None
        sys.exit(f"error: {file}: {e.strerror}; check the path" if file else f"error: {e}")


def begin_anew(folder, names):
    """The folder of a new run, without an earlier one's logs and files of these names."""
    if folder == Path() or (folder / "checkpoints").exists():  # of a run of gpt2.train
        raise ValueError(f"{folder} is not for a new run; --out_dir must name a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl", *names):
        (folder / name).unlink(missing_ok=True)


def machine(device="cpu"):
    """What the numbers and times of a run may depend on."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    model = models[0] if models else platform.processor() or platform.machine()
    if device == "cuda":
        model = torch.cuda.get_device_name()
    return {"machine": model, "threads": torch.get_num_threads(), "torch": torch.__version__}


def write_whole(path, write):
    """write(tmp), flush to disk, rename: at any time there is the old file or the whole new one.

    Raises OSError with one sentence, whatever `write` raises.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        tmp.write_bytes(b"")  # without what a kill has left there
        mode = tmp.stat().st_mode
        write(tmp)
        tmp.chmod(mode)  # safetensors writes a file that nobody else may read
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except Exception as e:  # torch.save and safetensors each have their own
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())[:200]
        sentence = f"cannot write {path} ({reason}); free some space or choose another folder"
        raise OSError(sentence) from None
    finally:
        tmp.unlink(missing_ok=True)


def write_tensors(path, tensors):
    write_whole(path, lambda tmp: torch.save(tensors, tmp))


def progress(updates, steps, n_rows):
    """Runs updates that yield (step, loss). Of n_rows of them it yields a row of metrics, with the
    mean loss since the row before, and the seconds that all updates took so far.
    """
    losses, seconds, start = [], 0.0, time.perf_counter()
    for step, loss in updates:
        losses.append(loss)
        if step % max(1, steps // n_rows) == 0 or step == steps:
            seconds += time.perf_counter() - start
            yield {"step": step, "loss": float(np.mean(losses))}, seconds
            losses, start = [], time.perf_counter()


def log(folder, row, steps, seconds, samples=()):
    """Prints a row of metrics with its warnings, and adds it and the samples to the logs."""
    head = f"{row['phase']:8} {row.get('skill', ' ')} {row['step']:5}"
    if row["step"]:
        scores = "".join(f"  {name} {row[name]:.2f}" for name in ("new", "prior") if name in row)
        left = seconds / row["step"] * (steps - row["step"])
        print(f"{head}/{steps}  loss {row['loss']:6.3f}{scores}  {left:3.0f} s left", flush=True)
    for sentence in row.get("warnings", []):
        print(f"{head}  warning: {sentence}", flush=True)
    append(folder / "metrics.jsonl", [row])
    append(folder / "samples.jsonl", samples)


def append(path, rows):
    """Add JSON objects to a JSONL file."""
    # A lone surrogate, which UTF-8 has not, becomes the \\u escape that it is in JSON.
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as f:
        f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(path):
    """The JSON objects of a JSONL file, and how many lines hold none, e.g. a last line cut off."""
    rows, n_unreadable = [], 0
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in filter(str.strip, f):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                n_unreadable += 1
    return rows, n_unreadable
