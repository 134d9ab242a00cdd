"""Fine-tune GPT-2 on your own demonstrations: self-distillation (SDFT), or SFT to compare.

    python -m gpt2.train --init_from gpt2 --data data/facts.jsonl --eval data/prior.jsonl \\
        --divergence forward --teacher frozen --teacher_reads article --out_dir out/facts
    python -m gpt2.train --report out/facts out/sft           # finished runs side by side
    python -m gpt2.train --resume --out_dir out/facts         # go on after an interruption
    torchrun --nproc_per_node=2 -m gpt2.train ...             # several processes, the same update

gpt2/README.md has the data format, the files that are written and what every metric means.

Every random number follows from --seed, the step and the row's place in the minibatch. So a resumed
run repeats the uninterrupted one, and micro-batches or processes do not change what is sampled.
"""

import argparse
import contextlib
import datetime
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from data import files, watch
from data.scoring import contains
from gpt2 import checkpoint, evaluate, fast, lora
from gpt2.data import TEMPLATES, RowReader, minibatch, read_template
from gpt2.tokenizer import Tokenizer, load_tokenizer
from model import GPT

# --- Flags ----------------------------------------------------------------------------------------


def number(kind, low, high=2**31):
    """For argparse: an int or a float in a range."""

    def parse(text):
        if not low <= kind(text) <= high:  # NaN fails too
            raise argparse.ArgumentTypeError(f"must lie between {low} and {high}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parse_args(argv=None):
    """The settings of a run."""
    positive, natural, share = number(int, 1), number(int, 0), number(float, 0, 1)
    scale, dtypes = number(float, 1e-6, 1e6), ("auto", "float32", "bfloat16")
    layout = {"description": __doc__, "formatter_class": HelpFormatter}
    p = argparse.ArgumentParser(**layout, allow_abbrev=False)
    # What is read and written.
    p.add_argument("--init_from", default="gpt2", help="gpt2 to gpt2-xl, or a folder of a GPT-2")
    p.add_argument("--base", help="the model that the KL is measured to; without it --init_from")
    p.add_argument("--data", help="JSONL to learn from: prompt, demonstration, article, answer")
    p.add_argument("--test", help="JSONL of prompt and answer to score; without it rows of --data")
    p.add_argument("--ood", help="JSONL of prompt and answer that asks for the same in other words")
    p.add_argument("--eval", help="JSONL of prior abilities: text, or prompt and answer")
    p.add_argument("--old", nargs="+", metavar="FILE", help="JSONL like --test, of earlier tasks")
    p.add_argument("--eval_rows", type=positive, default=200, help="most rows of a set to score")
    p.add_argument("--skip_long", action="store_true", help="drop and count rows that do not fit")
    p.add_argument("--out_dir", help="folder for everything that is written")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if any")
    p.add_argument("--report", nargs="+", metavar="RUN", help="print a table of finished runs")
    p.add_argument("--keep", choices=("last", "best"), default="last", help="best: also in best/")
    # The method.
    p.add_argument("--method", choices=("sdft", "sft"), default="sdft", help="or SFT to compare")
    divergences, teachers = ("reverse", "forward", "jsd"), ("ema", "frozen", "live")
    p.add_argument("--divergence", choices=divergences, default="reverse", help="reverse: Eq. (1)")
    p.add_argument("--teacher", choices=teachers, default="ema", help="EMA, start or the student")
    p.add_argument("--ema_alpha", type=share, default=0.02, help="the student's share in the EMA")
    reads = p.add_mutually_exclusive_group()
    reads.add_argument("--teacher_reads", choices=TEMPLATES, default="both", help="its prompt")
    reads.add_argument("--teacher_template", metavar="FILE", help="or a text with {prompt} etc.")
    p.add_argument("--skip_tokens", type=natural, default=0, help="first tokens without loss")
    p.add_argument("--temperature", type=number(float, 0, 100), default=1.0, help="of sampling")
    p.add_argument("--max_new_tokens", type=positive, default=64, help="a response's most tokens")
    # The updates.
    p.add_argument("--steps", type=positive, default=100, help="updates")
    p.add_argument("--batch_size", type=number(int, 1, 2**16), default=8, help="rows per update")
    p.add_argument("--micro_batch", type=positive, help="rows per pass; saves memory")
    p.add_argument("--lr", type=share, default=1e-5, help="peak learning rate")
    p.add_argument("--warmup", type=natural, default=10, help="updates; then a cosine to 0")
    p.add_argument("--weight_decay", type=share, default=0.0, help="of AdamW")
    p.add_argument("--grad_clip", type=scale, default=1.0, help="largest gradient norm")
    p.add_argument("--lora_rank", type=number(int, 1, 2**16), help="of adapters, trained alone")
    p.add_argument("--lora_alpha", type=scale, default=16.0, help="adapters times alpha/rank")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all draws")
    # The machine and the log.
    p.add_argument("--device", help="cpu, cuda or mps; without it the best available")
    p.add_argument("--dtype", choices=dtypes, default="auto", help="of the arithmetic")
    p.add_argument("--rollout_dtype", choices=dtypes, default="auto", help="of what samples")
    p.add_argument("--log_every", type=positive, default=10, help="updates between log lines")
    p.add_argument("--eval_every", type=positive, default=50, help="updates between evaluations")
    p.add_argument("--save_every", type=positive, default=50, help="updates between checkpoints")
    args = p.parse_args(argv)
    if 0 < args.temperature < 0.01:
        p.error("--temperature must be 0 (greedy) or at least 0.01")
    if args.skip_tokens >= args.max_new_tokens:
        p.error("--skip_tokens must be below --max_new_tokens, or no token has a loss")
    if not (args.report or args.out_dir):
        p.error("--out_dir is missing: name a folder for what the run writes")
    return args


def pick_device(name):
    """The named device or the best available; of several GPUs, that of this process."""
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else mps))
        if device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device).item()
        return device
    except Exception:  # each backend has its own
        raise ValueError(f"--device {name} is not available; use another, or cpu") from None


def compute_dtype(name, device):
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and on_gpu) else torch.float32


def rollout_dtype(args, device):
    return compute_dtype(args.dtype if args.rollout_dtype == "auto" else args.rollout_dtype, device)


def autocast(args, device):
    half = compute_dtype(args.dtype, device) == torch.bfloat16
    # No cache of cast weights: a cast made under no_grad must not serve a pass with gradients.
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def make_optimizer(student, args):
    weights = lora.trained(student).values()
    # fused: one pass over the weights, several times as fast on a CPU.
    return torch.optim.AdamW(weights, lr=args.lr, weight_decay=args.weight_decay, fused=True)


def learning_rate(step, args):
    """Linear warm-up, times a cosine that ends at 0."""
    warm_up = min(1.0, (step + 1) / max(args.warmup, 1))
    return args.lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / args.steps))


# --- What a run consists of -----------------------------------------------------------------------


@dataclass
class Run:
    """What the loop reads and changes."""

    args: argparse.Namespace
    argv: list  # its command line, which a checkpoint keeps
    device: torch.device
    tokenizer: Tokenizer
    sets: dict  # of `read_sets`
    start: GPT | None  # of --init_from, if training needs it at every step
    student: GPT
    teacher: GPT | None  # None for SFT
    optimizer: torch.optim.Optimizer
    step: int = 0
    base_scores: dict | None = None  # None until they are measured
    looks: list = field(default_factory=list)  # rows of metrics.jsonl, of the evaluations so far


def prepare(args, argv, saved, device):
    """Read and check all that a run needs, from the start or from the checkpoint `saved`."""
    student = fast.save_memory(checkpoint.load_model(args.init_from).to(device))
    sizes = lambda model: (model.config.vocab_size, model.config.block_size)
    if args.base and sizes(checkpoint.load_model(args.base)) != sizes(student):
        raise ValueError("--base must have the vocab_size and n_positions of --init_from")
    vocab_size, block_size = sizes(student)
    tokenizer = load_tokenizer(args.init_from, vocab_size)
    sets = read_sets(args, tokenizer, block_size)
    if args.keep == "best" and not sets["test"]:
        raise ValueError("--keep best needs a score: name --test, or add answers to --data")

    start = teacher = None
    if args.lora_rank:
        start = student.requires_grad_(False)
        torch.manual_seed(args.seed)  # of the adapters
        student = lora.add_adapters(lora.share(start), args.lora_rank, args.lora_alpha)
    if args.method == "sdft" and args.teacher == "frozen":
        start = teacher = start or lora.share(student).requires_grad_(False)
    elif args.method == "sdft":
        teacher = lora.share(student).requires_grad_(False)
    models = start, student, teacher, make_optimizer(student, args)
    run = Run(args, argv, device, tokenizer, sets, *models)
    if saved:
        try:
            run.step, run.base_scores = saved["step"], saved["base_scores"]
            for name, model in (("student", student), ("teacher", teacher)):
                if saved[name]:
                    model.load_state_dict(model.state_dict() | saved[name])
            run.optimizer.load_state_dict(saved["optimizer"])
        except Exception:  # whatever other contents make PyTorch raise
            what = f"the newest checkpoint does not fit --init_from {args.init_from}"
            raise ValueError(f"{what}; restore that model, or use another --out_dir") from None
    return run


def read_sets(args, tokenizer, block_size):
    """{"train", "test", "ood", "texts", "questions", "old FILE" ...: rows}."""
    file, reads, imitates = args.teacher_template, args.teacher_reads, args.method == "sft"
    template = read_template(file) if file else TEMPLATES[reads]
    limits = block_size, args.max_new_tokens
    reader = RowReader(tokenizer, *limits, template, imitates, args.skip_long)
    train = reader.read(args.data, reader.training)
    prior = reader.read(args.eval, reader.prior) if args.eval else []
    answered = [row for row in train if row["answer"]]
    sets = {
        "test": reader.read(args.test, reader.task) if args.test else answered,
        "ood": reader.read(args.ood, reader.task) if args.ood else [],
        "texts": [row for row in prior if "text_ids" in row],
        "questions": [row for row in prior if "answer_ids" in row],
    }
    sets |= {f"old {path}": reader.read(path, reader.task) for path in args.old or ()}
    for name, rows in sets.items():
        if len(rows) > args.eval_rows:
            first = f"the first {args.eval_rows} of {len(rows)} rows"
            print(f"note: {first} of {name} are evaluated (--eval_rows)")
            sets[name] = rows[: args.eval_rows]
    return sets | {"train": train}


def save(run):
    """A checkpoint to go on from. A teacher that never moves is in --init_from."""
    moves = run.teacher is not None and run.teacher is not run.start
    state = {"argv": run.argv, "step": run.step, "base_scores": run.base_scores}
    state |= {"student": lora.state(run.student), "optimizer": run.optimizer.state_dict()}
    state |= {"teacher": lora.state(run.teacher) if moves else {}}
    checkpoint.save_run(run.args.out_dir, state)


def update(run, rows, generators):
    """One update on this process's rows of the minibatch: loss and info, as of sdft.train_step."""
    args, eos_id = run.args, run.tokenizer.eos_id
    run.optimizer.param_groups[0]["lr"] = learning_rate(run.step, args)
    prompts = [row["prompt_ids"] for row in rows]
    with autocast(args, run.device):
        if args.method == "sft":
            demonstrations = [row["demonstration_ids"] for row in rows]
            sizes = eos_id, args.grad_clip, args.micro_batch
            return fast.sft_step(run.student, run.optimizer, prompts, demonstrations, *sizes)
        models = run.student, run.teacher, run.optimizer
        contexts = prompts, [row["teacher_ids"] for row in rows]
        same = ("divergence", "temperature", "grad_clip", "skip_tokens", "micro_batch")
        options = {name: getattr(args, name) for name in same} | {"generators": generators}
        options["alpha"] = {"ema": args.ema_alpha, "frozen": 0.0, "live": 1.0}[args.teacher]
        options["rollout_dtype"] = rollout_dtype(args, run.device)
        return fast.train_step(*models, *contexts, args.max_new_tokens, eos_id, **options)


def averages(run, loss, info, stop):
    """Metrics of the minibatch over all processes, its number of tokens, and if any must stop."""
    mask, n = info["mask"], len(info["mask"])
    endless = mask.all(1) & (info["completions"][:, -1] != run.tokenizer.eos_id)  # (B,)
    sums = {"stop": stop, "rows": n, "loss": loss * n, "length": mask.sum()}
    sums |= {"truncated": endless.sum()}
    if "divergence" in info:  # SFT has none.
        sums |= {"divergence": info["divergence"].sum(), "loss_tokens": info["loss_mask"].sum()}
    values = torch.tensor([*sums.values()], dtype=torch.float32, device=run.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    sums = dict(zip(sums, values.tolist()))
    metrics = {name: sums[name] / sums["rows"] for name in ("loss", "length", "truncated")}
    n = max(sums.get("loss_tokens", 0), 1)
    metrics["divergence"] = sums["divergence"] / n if "divergence" in sums else None
    return metrics, sums["length"], sums["stop"] > 0


def measure(run):
    """Scores of the student; they, samples and warnings go to the logs, the best weights to best/.

    The KL is to --base or --init_from, which is read again if training does not hold it in memory.
    """
    args, base = run.args, run.start
    if run.base_scores is None and not args.base:
        base = None  # It is the student itself.
    elif args.base or base is None:
        base = checkpoint.load_model(args.base or args.init_from).to(run.device)

    def rollout(model, prompts, max_new_tokens, eos_id, temperature, _):
        generators = fast.row_generators(args.seed, 0, range(len(prompts)), run.device)
        return fast.rollout(model, prompts, max_new_tokens, eos_id, temperature, generators)

    with autocast(args, run.device):
        student, tokenizer = fast.RolloutGPT(run.student), run.tokenizer
        n, size = args.max_new_tokens, args.micro_batch or args.batch_size
        scores = evaluate.evaluate(student, run.sets, tokenizer, n, size, base)
        teacher = None if run.teacher is None else fast.RolloutGPT(run.teacher)
        models = student, teacher, student if base is None else fast.RolloutGPT(base)
        rows = evaluate.rows_to_watch(run.sets, student.config.block_size - n)
        inputs = *models, rows, tokenizer.decode, contains, n, tokenizer.eos_id
        options = {"divergence": args.divergence, "temperature": args.temperature}
        options |= {"rollout": rollout, "batch_size": 8}  # rows whose logits are all in memory
        about = {"phase": args.method, "step": run.step}
        seen, samples = watch.look(*inputs, **options, **about, skill=None)
    row = about | {"eval": scores} | seen
    for name, score in (("new", "lenient"), ("prior", "prior_acc")):  # as data/watch.py names them
        row |= {name: scores[score]} if score in scores else {}
    row["warnings"] = watch.warnings([*run.looks, row])
    for sentence in row["warnings"]:
        print(f"warning: {sentence}")
    out = Path(args.out_dir)
    files.append(out / "samples.jsonl", samples)
    files.append(out / "metrics.jsonl", [row])
    earlier = [look["new"] for look in run.looks if look.get("step") and "new" in look]
    if args.keep == "best" and run.step and row["new"] > max(earlier, default=-1):
        checkpoint.save_model(lora.merge(run.student), out / "best", run.tokenizer)
    run.looks.append(row)
    return scores


# --- The run --------------------------------------------------------------------------------------


def fine_tune(args, argv, rank, n_processes):
    """One run, from its start or a checkpoint to its end; False if a signal stops it before."""
    # Load and check everything.
    began = time.perf_counter()
    saved = checkpoint.load_run(args.out_dir) if args.resume else None
    if saved:  # A resumed run keeps its settings.
        own, args, argv = parse_args(saved["argv"]), parse_args(saved["argv"] + argv), saved["argv"]
        for name, was in vars(own).items():
            value = getattr(args, name)
            if value != was and name not in ("resume", "out_dir", "device"):
                raise ValueError(f"--{name} {value} differs from the run's {was}; leave it out")
    else:
        checkpoint.check_new(args.out_dir)
        if not args.data:
            raise ValueError(f"--data is missing, and {args.out_dir} holds no run to --resume")
    if args.batch_size % n_processes:
        raise ValueError(f"--batch_size must be a multiple of the {n_processes} processes")
    device = pick_device(args.device)
    if n_processes > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    wait = dist.barrier if n_processes > 1 else lambda: None  # for the other processes
    run, out = prepare(args, argv, saved, device), Path(args.out_dir)
    print(
        f"{args.method} from {args.init_from}: {len(run.sets['train'])} rows, {args.batch_size} "
        f"a step, steps {run.step + 1} to {args.steps}, {compute_dtype(args.dtype, device)}\n"
        f"{device} x {n_processes}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"end token {run.tokenizer.decode([run.tokenizer.eos_id])}"
    )

    # The base's scores, and logs that end where the checkpoint does.
    if rank == 0:
        if not saved:
            save(run)  # from here on the folder can be resumed
        step = -1 if run.base_scores is None else run.step
        checkpoint.rewind(out / "samples.jsonl", step, args.steps)
        rows = checkpoint.rewind(out / "metrics.jsonl", step, args.steps)
        run.looks = [row for row in rows if "eval" in row]
        if run.base_scores is None:
            run.base_scores = measure(run)
        print("base  " + evaluate.line_of(run.base_scores))
    wait()

    # Train. Ctrl-C and SIGTERM let a step be finished and saved; a second Ctrl-C does not wait.
    # torchrun passes on what the terminal has sent already: several processes get no second one.
    stop = []

    def on_signal(*_):
        if stop and n_processes == 1:
            raise KeyboardInterrupt
        stop.append(True)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    data, share = run.sets["train"], args.batch_size // n_processes
    places = range(rank * share, (rank + 1) * share)  # this process's, in the minibatch
    first, tokens, start = run.step, 0, time.perf_counter()
    last, stopped = start, False
    while run.step < args.steps and not stopped:
        # The rows of the step, each with a random stream of its own.
        indices = minibatch(len(data), args.batch_size, run.step, args.seed)
        rows = [data[indices[place]] for place in places]
        generators = fast.row_generators(args.seed, run.step, places, device)
        loss, info = update(run, rows, generators)
        metrics, n, stopped = averages(run, loss, info, bool(stop))
        run.step, tokens = run.step + 1, tokens + n
        done, head = run.step == args.steps, f"step {run.step:5}/{args.steps}  "

        if rank == 0 and (run.step % args.log_every == 0 or done):
            now = time.perf_counter()
            metrics |= {"lr": run.optimizer.param_groups[0]["lr"], "seconds": now - start}
            metrics |= {"tokens_per_s": tokens / (now - last)}
            row = {"phase": args.method, "step": run.step} | metrics
            files.append(out / "metrics.jsonl", [row])
            left = (now - start) / (run.step - first) * (args.steps - run.step)
            print(f"{head}{evaluate.line_of(metrics)}  {left:.0f} s left")
            last, tokens = now, 0
        if rank == 0 and run.step % args.eval_every == 0 and not done:
            print(head + evaluate.line_of(measure(run)))
            last, tokens = time.perf_counter(), 0
        if rank == 0 and (run.step % args.save_every == 0 or done or stopped):
            save(run)
        wait()  # while the first process evaluates

    # Finish. From here on nothing is lost: all is in a checkpoint.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stopped:
        again = f"python -m gpt2.train --resume --out_dir {shlex.quote(args.out_dir)}"
        print(f"stopped after step {run.step}, saved; go on with: {again}")
    elif rank == 0:
        final = measure(run)
        checkpoint.save_model(lora.merge(run.student), out, run.tokenizer)
        if args.lora_rank:
            checkpoint.save_adapters(run.student, out / "adapter", args.init_from)
        results = {"config": vars(args), "base": run.base_scores, "final": final}
        results["command"] = shlex.join(["python", "-m", "gpt2.train", *run.argv])
        results["seconds"] = time.perf_counter() - began
        checkpoint.write_json(out / "results.json", results)
        rows = [("base", run.base_scores), (f"{args.method}, {args.steps} steps", final)]
        print("\n" + evaluate.table(rows))
        print(f"\nweights, scores and logs are in {out}; {results['seconds']:.0f} s")
    wait()
    if n_processes > 1:
        dist.destroy_process_group()
    return not stopped


def main(argv=None):
    fast.keep_freed_memory()
    argv = sys.argv[1:] if argv is None else argv
    interrupted = "interrupted; if a checkpoint was saved, --resume goes on from it"
    with files.errors_in_a_sentence(interrupted):
        args = parse_args(argv)
        if args.report:
            return print(evaluate.report(args.report))
        # As torchrun sets them, or another launcher.
        rank, n_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= rank < n_processes:
            raise ValueError(f"RANK={rank} is not below WORLD_SIZE={n_processes}; unset both")
        if rank:
            sys.stdout = open(os.devnull, "w")  # one process prints
        try:
            with checkpoint.locked(args.out_dir) if rank == 0 else contextlib.nullcontext():
                finished = fine_tune(args, argv, rank, n_processes)
        except RuntimeError as e:
            if "out of memory" not in str(e) and "allocate memory" not in str(e):
                raise
            remedy = "lower --micro_batch, --max_new_tokens or --batch_size"
            raise ValueError(f"the memory is full; {remedy}") from None
        if not finished:
            sys.exit(130)


if __name__ == "__main__":
    if sys.stdout:  # None if it is closed
        sys.stdout.reconfigure(line_buffering=True)
    main()
