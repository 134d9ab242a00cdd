"""Files: GPT-2 checkpoints in and out, everything written whole or not at all, runs resumed."""

import contextlib
import json
import os
import shutil
import zipfile
from dataclasses import astuple
from pathlib import Path

import torch

from data import files
from data.files import write_tensors, write_whole
from gpt2 import lora
from gpt2.tokenizer import FILES, read_json
from model import COMPUTED, GPT, GPT2_SIZES, SIZES

TOKENIZER_FILES = (*FILES, "chat_template.jinja", "chat_template.json")
STATE = {"argv", "step", "base_scores", "student", "teacher", "optimizer"}  # of a checkpoint
# What a run writes.
OWN = ("results.json", "metrics.jsonl", "samples.jsonl", "best", "adapter", "config.json")
OWN += ("generation_config.json", "model.safetensors", "pytorch_model.bin", *TOKENIZER_FILES)


@contextlib.contextmanager
def locked(folder):
    """Keeps other runs out of a folder, which is made, and removed again if it stays empty."""
    # The system ends the lock with the process, even if it is killed.
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = None
    try:
        import fcntl  # not on Windows

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another run is writing to {folder}; wait for its end") from None
    except (ImportError, OSError):  # or a file system without locks
        print(f"note: {folder} cannot be locked here; do not start a second run in it")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            os.rmdir(folder)
        if descriptor is not None:
            os.close(descriptor)


def check_new(folder):
    """A new run overwrites nothing."""
    if run_checkpoints(folder):
        raise ValueError(f"{folder} already holds a run; --resume it, or choose another --out_dir")
    for name in OWN:
        if (Path(folder) / name).exists():
            raise ValueError(f"{folder} already holds {name}; choose another --out_dir")


def write_json(path, fields):
    text = json.dumps(fields, indent=2) + "\n"
    write_whole(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def rewind(path, step, last):
    """The rows of a log up to a step. Those that a run writes again are removed from the file.

    The final evaluation, of step `last`, comes after all checkpoints and is always written again.
    """
    if not path.exists():
        return []
    of_look = {"eval", "tokens"}  # in metrics.jsonl and in samples.jsonl
    again = lambda row: row["step"] > step or (row["step"] == last and of_look & row.keys())
    rows = [row for row in files.read(path)[0] if not again(row)]
    write_whole(path, lambda tmp: files.append(tmp, rows))
    return rows


def load_model(name_or_folder):
    """`GPT.from_pretrained`, with one sentence for all that may be wrong.

    A name in GPT2_SIZES wins over a folder of that name (write ./gpt2 for the folder).
    """
    try:
        return GPT.from_pretrained(name_or_folder)
    except Exception as e:  # whatever a missing or damaged file makes the readers raise
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        remedy = "name a folder with config.json and weights of GPT-2, or fetch its files again"
        if name_or_folder in GPT2_SIZES:
            file = Path(torch.hub.get_dir()) / "checkpoints" / f"{name_or_folder}.bin"
            remedy = f"connect to the network once, or delete {file} if it is damaged"
        raise ValueError(f"cannot load {name_or_folder} ({reason}); {remedy}") from None


def save_model(model, folder, tokenizer=None):
    """`model.save_pretrained`, atomically, with all of transformers' fields of the configuration.

    The weights go to model.safetensors if safetensors is installed, else to pytorch_model.bin.
    The tokenizer's files and end token go with them; without one, the last token is the end.
    """
    folder, c = Path(folder), model.config
    eos_id = tokenizer.eos_id if tokenizer else c.vocab_size - 1
    source = tokenizer and tokenizer.folder
    ends = {"bos_token_id": eos_id, "eos_token_id": eos_id}
    fields = COMPUTED | {"architectures": ["GPT2LMHeadModel"], "torch_dtype": "float32"}
    fields |= dict(zip(SIZES, astuple(c))) | ends
    weights = model.checkpoint()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from safetensors.torch import save_file  # optional

        path, about = folder / "model.safetensors", {"format": "pt"}
        write_whole(path, lambda tmp: save_file(weights, tmp, metadata=about))
    except ImportError:
        write_tensors(folder / "pytorch_model.bin", weights)
    write_json(folder / "config.json", fields)
    generates = read_json(source / "generation_config.json") if source else {}
    write_json(folder / "generation_config.json", ends | generates | {"eos_token_id": eos_id})
    for name in TOKENIZER_FILES if source else ():
        if (source / name).is_file():
            write_whole(folder / name, lambda tmp: shutil.copyfile(source / name, tmp))


def save_adapters(model, folder, base):
    """The adapters of gpt2/lora.py alone, a small folder in the format of the PEFT library."""
    rank, alpha = model.lora
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    fields |= {"r": rank, "lora_alpha": alpha, "target_modules": ["c_attn", "c_proj", "c_fc"]}
    fields |= {"fan_in_fan_out": True}  # GPT-2 keeps its weights as (in, out)
    name = "base_model.model.transformer.{}.weight"
    adapters = {name.format(key): w.cpu() for key, w in lora.state(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.bin", adapters)
    write_json(folder / "adapter_config.json", fields)


def run_checkpoints(out_dir):
    """Oldest first."""
    return sorted((Path(out_dir) / "checkpoints").glob("[0-9]*.pt"))


def save_run(out_dir, state):
    """Write a checkpoint, STEP.pt, and keep the newest two. `state` is a dict with its step."""
    folder = Path(out_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / f"{state['step']:08d}.pt", state)
    for old in [*run_checkpoints(out_dir)[:-2], *folder.glob(".*.tmp")]:
        old.unlink()


def load_run(out_dir):
    """The newest checkpoint's state; None if there is none. ValueError if it is damaged."""
    files = run_checkpoints(out_dir)
    if not files:
        return None
    try:
        if zipfile.ZipFile(files[-1]).testzip():  # torch.load looks at no checksum
            raise ValueError("a checksum is wrong")
        saved = torch.load(files[-1], map_location="cpu", weights_only=True)
        if saved.keys() != STATE:
            raise ValueError("other fields")
        return saved
    except Exception as e:  # whatever a damaged file makes the readers raise
        remedy = "start again in another --out_dir"
        if files[1:]:
            remedy = f"delete it and --resume goes on from {files[-2].name}"
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"cannot read checkpoint {files[-1]} ({reason}); {remedy}") from None
