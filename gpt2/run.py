"""A run of gpt2/train.py: what it consists of, read and checked, from the start or a checkpoint."""

import argparse
import contextlib
import copy
import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken
import torch

from gpt2 import checkpoint, evaluate, fast, look, lora, settings
from gpt2.data import TEMPLATES, RowReader, check_there, load_encoding, read_template
from model import GPT

STATE = {"args": dict, "step": int, "inputs": dict, "base_scores": dict}  # of a checkpoint
STATE |= {"student": dict, "teacher": dict, "optimizer": dict}


@dataclass
class Run:
    """What the loop reads and changes. Of several processes only the first prints and writes."""

    args: argparse.Namespace
    device: torch.device
    rank: int
    n_processes: int
    enc: tiktoken.Encoding
    sets: dict  # "train", "test", "ood", "prior", "old FILE" ...: rows of gpt2/data.py
    inputs: dict  # path: CRC-32, or None if there is none, of every file that it reads
    start: GPT | None  # of --init_from, if training needs it at every step
    student: GPT
    teacher: GPT | None  # None for SFT
    optimizer: torch.optim.Optimizer
    step: int = 0
    base_scores: dict = field(default_factory=dict)

    @property
    def out(self):
        return Path(self.args.out_dir)

    def say(self, line):
        if self.rank == 0:
            print(line, flush=True)

    def read_start(self):
        """The model of --init_from, from its file if training does not hold it in memory."""
        return self.read("init_from") if self.start is None else self.start

    def read_base(self):
        """The model that the KL is measured to."""
        return self.read("base") if self.args.base else self.read_start()

    def read(self, flag):
        source = getattr(self.args, flag)
        check_unchanged(source_crcs(source), self.inputs)
        return load(flag, source, checkpoint.map_model).to(self.device)

    def evaluate(self, start=False):
        """Scores of the student; `start` if it is still the model of --init_from."""
        args = self.args
        limits = args.max_new_tokens, args.micro_batch or args.batch_size
        base = None if start and not args.base else self.read_base()
        with settings.autocast(args, self.device):
            decoder = fast.RolloutGPT.of(self.student)
            scores = evaluate.evaluate(decoder, self.sets, self.enc, *limits, base, start)
            models = self.student, self.teacher, self.student if base is None else base
            seen, said = look.look(models, self.sets, self.enc, args, self.step)
        row = {"phase": args.method, "step": self.step, "eval": scores}
        row |= {k: scores[s] for k, s in look.SCORES.items() if s in scores} | seen
        looks, warnings = look.record(self.out, row, said)
        for sentence in warnings:
            self.say(f"warning: {sentence}")
        if args.keep == "best" and self.step and look.is_best(row, looks):
            self.save_best()
        return scores

    def save_best(self):
        checkpoint.save_model(lora.merge(self.student), self.out / "best")
        checkpoint.copy_tokenizer(checkpoint.source_folder(self.args.init_from), self.out / "best")

    def save(self):
        state = {"args": vars(self.args), "step": self.step, "inputs": self.inputs}
        state["base_scores"] = self.base_scores
        state |= self.weights() | {"optimizer": self.optimizer.state_dict()}
        checkpoint.save_run(self.out / "checkpoints", state)

    def weights(self):
        """What a checkpoint keeps of both roles. A teacher that never moves is in --init_from."""
        moves = self.teacher is not None and self.teacher is not self.start
        teacher = lora.state(self.teacher) if moves else {}
        return {"student": lora.state(self.student), "teacher": teacher}


def prepare(args, saved, device, rank, n_processes):
    """Read and check everything that the run needs; `saved` is a checkpoint to go on from."""
    inputs = source_crcs(args.init_from) | (source_crcs(args.base) if args.base else {})
    check_unchanged(inputs, saved and saved["inputs"])
    files = [args.data, args.test, args.ood, args.eval, args.teacher_template, *(args.old or [])]
    for file in filter(None, files):
        check_there(file)  # A wrong name is told before seconds go into the model.
    student = fast.lean(load("init_from", args.init_from, checkpoint.load_model).to(device))
    enc = load_encoding(checkpoint.source_folder(args.init_from))
    config = student.config
    if enc.n_vocab > config.vocab_size:
        raise ValueError(
            f"--init_from {args.init_from} has a vocabulary of {config.vocab_size} tokens, "
            f"the encoding {enc.n_vocab}; put the model's vocab.json and merges.txt into its folder"
        )
    if args.base:
        other = load("base", args.base, checkpoint.map_model).config
        if (other.vocab_size, other.block_size) != (config.vocab_size, config.block_size):
            raise ValueError(
                f"--base {args.base} has another vocab_size or n_positions than --init_from "
                f"{args.init_from}; name a model with the same"
            )
    sets, notes, crcs = read_data(args, enc, config.block_size)
    check_unchanged(crcs, saved and saved["inputs"])
    inputs |= crcs
    if args.keep == "best" and not sets["test"]:
        raise ValueError(
            "--keep best needs a score: name --test, or add an answer to --data's rows"
        )
    start = teacher = None
    if args.lora_rank:
        start = student.requires_grad_(False)
        torch.manual_seed(args.seed)  # of the adapters
        student = lora.add_adapters(lora.share(start), args.lora_rank, args.lora_alpha)
    if args.method == "sdft" and args.teacher == "frozen":
        start = teacher = copy.deepcopy(student) if start is None else start
    elif args.method == "sdft":
        teacher = lora.share(student)
    for model in (start, teacher):
        if model is not None:
            model.requires_grad_(False)
    optimizer = settings.make_optimizer(student, args)
    models = start, student, teacher, optimizer
    run = Run(args, device, rank, n_processes, enc, sets, inputs, *models)
    if saved:
        run.step, run.base_scores = saved["step"], saved["base_scores"]
        restore(run, saved)
    for note in notes:
        run.say(f"note: {note}")
    return run


def load(flag, source, reader):
    try:
        return reader(source)
    except (ValueError, OSError) as e:
        raise ValueError(f"--{flag} {source}: {e}") from None


def source_crcs(source):
    """path: CRC-32, or None if there is none, of a model's files."""
    files = checkpoint.source_files(source)
    return {str(file): checkpoint.crc32(file) if file.is_file() else None for file in files}


def check_unchanged(crcs, inputs):
    for path, crc in crcs.items():
        if inputs and inputs.get(path) != crc:
            raise ValueError(
                f"{path} has changed since the run began; restore it, or start in another --out_dir"
            )


def restore(run, saved):
    """Put a checkpoint's state into the run."""
    try:
        for name, own in run.weights().items():
            if own.keys() != saved[name].keys():
                raise ValueError
            for key, w in own.items():
                if w.shape != saved[name][key].shape:
                    raise ValueError
                w.copy_(saved[name][key])
        moments = saved["optimizer"]["state"]  # {place: {"step", "exp_avg", "exp_avg_sq"}}
        for i, p in enumerate(lora.trained(run.student).values() if run.step else ()):
            shapes = {name: tuple(w.shape) for name, w in moments[i].items()}
            if shapes != {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
                raise ValueError
        for tensors in (saved["student"], saved["teacher"], *moments.values()):
            if not all(map(checkpoint.is_plain, tensors.values())):
                raise ValueError
        groups = run.optimizer.state_dict()["param_groups"]
        run.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except Exception:  # whatever other contents make PyTorch raise
        raise ValueError(not_ours(run.out)) from None


def read_data(args, enc, block_size):
    """The four sets of rows, notes for the user, and the CRC-32 of every file."""
    template, crcs = TEMPLATES[args.teacher_reads], {}
    if args.teacher_template:
        template = read_template(args.teacher_template, crcs)
    imitates = args.method == "sft"
    limits = block_size, args.max_new_tokens
    reader = RowReader(enc, *limits, template, imitates, args.skip_long, crcs=crcs)
    sets = {
        "train": reader.read(args.data, reader.training),
        "test": reader.read(args.test, reader.task) if args.test else [],
        "ood": reader.read(args.ood, reader.task) if args.ood else [],
        "prior": reader.read(args.eval, reader.prior) if args.eval else [],
    }
    sets |= {f"old {file}": reader.read(file, reader.task) for file in args.old or ()}
    sets["test"] = sets["test"] or [row for row in sets["train"] if row["answer"]]
    return sets, reader.notes, crcs


def check_folder(args, given):
    """The checkpoint to go on from, if any, and the settings: the run's own if it is resumed."""
    out = Path(args.out_dir)
    if args.resume and (saved := checkpoint.load_run(out / "checkpoints")):
        check_state(out, saved, args)
        here = {name: getattr(args, name) for name in ("resume", "out_dir", "device")}
        for name in sorted(given - set(here)):
            value, was = getattr(args, name), saved["args"].get(name)
            if value != was:
                raise ValueError(
                    f"--{name} {value} differs from the run in {out}, which has {was}; leave it "
                    "out with --resume"
                )
        return saved, argparse.Namespace(**saved["args"] | here)
    if not args.resume and checkpoint.run_checkpoints(out / "checkpoints"):
        raise ValueError(
            f"{out} already holds a run; go on with it by --resume, or choose another --out_dir"
        )
    for name in ("results.json", "config.json", *checkpoint.WEIGHT_FILES):
        if (out / name).exists():
            raise ValueError(
                f"{out} already holds {name}, which the run would overwrite, and no checkpoint to "
                "go on from; choose another --out_dir"
            )
    if not args.data:
        where = f"there is no checkpoint in {out}, and " if args.resume else ""
        raise ValueError(f"{where}--data is missing: name a JSONL file of prompts to learn from")
    return None, args


def check_state(out, saved, args):
    """A right checksum does not tell who has written a checkpoint, e.g. an older program."""
    try:
        ours = saved.keys() == STATE.keys() and saved["args"].keys() == vars(args).keys()
        ours = ours and all(isinstance(saved[name], kind) for name, kind in STATE.items())
        settings.check(argparse.Namespace(**saved["args"]))
        ours = ours and {float} >= {type(score) for score in saved["base_scores"].values()}
        ours = ours and 0 <= saved["step"] <= saved["args"]["steps"]
    except (AttributeError, KeyError, TypeError, ValueError):
        ours = False
    if not ours:
        raise ValueError(not_ours(out))


def not_ours(out):
    return (
        f"the newest checkpoint in {out} was not written by this version of the program; finish "
        "the run with that one, or start again in another --out_dir"
    )


@contextlib.contextmanager
def held(folder):
    """Keeps other runs out of a folder. The system ends this with the process, even if killed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise OSError(
            f"cannot open {folder} ({e.strerror or e}); choose another --out_dir"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing to {folder}; wait for its end or choose another --out_dir"
            ) from None
        yield
    finally:
        os.close(descriptor)
