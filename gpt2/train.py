"""Fine-tune GPT-2 on your own demonstrations: self-distillation (SDFT), or SFT to compare.

    python -m gpt2.train --init_from gpt2 --data data/facts.jsonl --eval data/prior.jsonl \\
        --divergence forward --teacher frozen --teacher_reads article --out_dir out/facts
    python -m gpt2.train --method sft --init_from gpt2 --data data/facts.jsonl \\
        --eval data/prior.jsonl --out_dir out/sft
    python -m gpt2.train --report out/facts out/sft           # finished runs side by side
    python -m gpt2.train --init_from out/facts --base gpt2 --data data/units.jsonl \\
        --old data/facts.jsonl --out_dir out/units            # a second task, after the first
    python -m gpt2.train --init_from gpt2 --data data/facts.jsonl --lora_rank 16 --lr 1e-4 \\
        --out_dir out/lora                                    # adapters in place of all weights
    python -m gpt2.train --resume --out_dir out/facts         # go on after an interruption
    torchrun --nproc_per_node=2 -m gpt2.train ...             # several processes, the same update

gpt2/README.md has the data format, the files that are written and what every metric means.

Every random number follows from --seed, the step and the row's place in the minibatch. So a resumed
run repeats the uninterrupted one, and micro-batches or processes do not change what is sampled.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports just ends it

import contextlib
import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from gpt2 import checkpoint, evaluate, fast, lora, settings
from gpt2.data import minibatch
from gpt2.run import check_folder, held, prepare

LOG_LINE = {
    "sdft": "loss {loss:.4f}  divergence {divergence:.4f}  length {length:5.1f}  "
    "truncated {truncated:4.0%}  {tokens_per_s:6.0f} tok/s  {left:4.0f} s left",
    "sft": "loss {loss:.4f}  length {length:5.1f}  {tokens_per_s:6.0f} tok/s  {left:4.0f} s left",
}


# --- Training -------------------------------------------------------------------------------------


def update(run, rows, generators):
    """One step on this process's rows of the minibatch: loss and info, as of sdft.train_step."""
    args, eos_id = run.args, run.enc.eot_token
    for group in run.optimizer.param_groups:
        group["lr"] = settings.learning_rate(run.step, args.steps, args.lr, args.warmup)
    prompts = [row["prompt_ids"] for row in rows]
    with settings.autocast(args, run.device):
        if args.method == "sft":
            demonstrations = [row["demonstration_ids"] for row in rows]
            return fast.sft_step(
                run.student,
                run.optimizer,
                prompts,
                demonstrations,
                eos_id,
                args.grad_clip,
                args.micro_batch,
            )
        return fast.train_step(
            run.student,
            run.teacher,
            run.optimizer,
            prompts,
            [row["teacher_ids"] for row in rows],
            args.max_new_tokens,
            eos_id,
            generators=generators,
            rollout_dtype=settings.rollout_dtype(args, run.device),
            divergence=args.divergence,
            alpha={"ema": args.ema_alpha, "frozen": 0.0, "live": 1.0}[args.teacher],
            temperature=args.temperature,
            grad_clip=args.grad_clip,
            skip_tokens=args.skip_tokens,
            micro_batch=args.micro_batch,
        )


def averages(run, loss, info, stop):
    """Metrics of the minibatch over all processes, its number of tokens, and if any must stop."""
    mask, completions = info["mask"], info.get("completions")
    sums = {"stop": stop, "rows": len(mask), "loss": loss * len(mask), "tokens": mask.sum().item()}
    if completions is not None:
        endless = mask.all(1) & (completions[:, -1] != run.enc.eot_token)  # (B,), no end token
        sums["truncated"] = endless.sum().item()
        sums["divergence"] = info["divergence"].sum().item()
        sums["loss_tokens"] = info["loss_mask"].sum().item()
    values = torch.tensor(list(sums.values()), dtype=torch.float32, device=run.device)
    if run.n_processes > 1:
        dist.all_reduce(values)
    sums = dict(zip(sums, values.tolist()))
    rows, metrics = sums["rows"], {"loss": sums["loss"] / sums["rows"], "divergence": None}
    if completions is not None:
        metrics["divergence"] = sums["divergence"] / max(sums["loss_tokens"], 1)
    metrics["length"] = sums["tokens"] / rows
    metrics["truncated"] = sums.get("truncated", 0) / rows
    return metrics, sums["tokens"], sums["stop"] > 0


def catch_signals(n_processes):
    """A list that Ctrl-C and SIGTERM append to, so that a step is finished and saved first.

    A second Ctrl-C does not wait. torchrun passes on what the terminal has sent already, so that
    with several processes there is no second one.
    """
    stop = []

    def on_signal(*_):
        if stop and n_processes == 1:
            raise KeyboardInterrupt
        stop.append(True)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return stop


def train(run):
    """Updates to args.steps; logs, evaluates and saves on the way. False if a signal stops it."""
    args, data = run.args, run.sets["train"]
    share = args.batch_size // run.n_processes
    places = range(run.rank * share, (run.rank + 1) * share)  # this process's, in the minibatch
    stop = catch_signals(run.n_processes)
    first, tokens, start = run.step, 0, time.perf_counter()
    last = start
    while run.step < args.steps:
        indices = minibatch(len(data), args.batch_size, run.step, args.seed)
        rows = [data[indices[place]] for place in places]
        streams = args.seed, run.step, places, run.device
        try:
            loss, info = update(run, rows, fast.row_generators(*streams))
        except FloatingPointError as e:
            raise FloatingPointError(f"step {run.step + 1}: {e}") from None
        rate = run.optimizer.param_groups[0]["lr"]
        metrics, n, stopped = averages(run, loss, info, bool(stop))
        run.step, tokens = run.step + 1, tokens + n
        done = run.step == args.steps
        head = f"step {run.step:5}/{args.steps}  "

        if run.rank == 0 and (run.step % args.log_every == 0 or done):
            now = time.perf_counter()
            about = {"phase": args.method, "step": run.step}
            metrics |= {"lr": rate, "tokens_per_s": tokens / (now - last), "seconds": now - start}
            checkpoint.append_line(run.out / "metrics.jsonl", about | metrics)
            left = (now - start) / (run.step - first) * (args.steps - run.step)
            run.say(head + LOG_LINE[args.method].format(**metrics, left=left))
            last, tokens = now, 0
        if run.rank == 0 and run.step % args.eval_every == 0 and not done:
            run.say(head + evaluate.line_of(run.evaluate()))
            last, tokens = time.perf_counter(), 0
        if run.rank == 0 and (run.step % args.save_every == 0 or done or stopped):
            run.save()
        if run.n_processes > 1:
            dist.barrier()  # the others wait while the first evaluates
        if stopped:
            return False
    return True


# --- The command ----------------------------------------------------------------------------------


def fine_tune(args, given, rank, n_processes, stack):
    """One run from start or checkpoint to end; False if a signal stops it before.

    The folder is its own until the ExitStack `stack` is closed.
    """
    out = Path(args.out_dir)
    there = out.is_dir()
    if there and rank == 0:
        stack.enter_context(held(out))
    saved, args = check_folder(args, given)
    if args.batch_size % n_processes:
        raise ValueError(
            f"--batch_size {args.batch_size} must be a multiple of the {n_processes} processes"
        )
    began = time.perf_counter()
    device = settings.pick_device(args.device, os.environ.get("LOCAL_RANK"))
    if n_processes > 1:
        join_processes("nccl" if device.type == "cuda" else "gloo")
    run = prepare(args, saved, device, rank, n_processes)
    if rank == 0 and not there:
        checkpoint.make_folder(out, exist_ok=False)
        stack.enter_context(held(out))
    parameters = sum(p.numel() for p in run.student.parameters()) / 1e6
    trained = sum(p.numel() for p in lora.trained(run.student).values()) / 1e6
    adapters = f", {trained:.1f}M of them trained" if args.lora_rank else ""
    dtype = str(settings.compute_dtype(args.dtype, device)).removeprefix("torch.")
    run.say(
        f"{args.method} from {args.init_from}: {parameters:.1f}M parameters{adapters}, "
        f"{len(run.sets['train'])} rows, {args.steps} steps of {args.batch_size} rows\n"
        f"device {device} x {n_processes}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {dtype}"
    )
    if rank == 0:
        for file in ("metrics.jsonl", "samples.jsonl"):
            checkpoint.forget_after(out / file, run.step if saved else -1, args.steps)
        if not saved:
            run.base_scores = run.evaluate(start=True)
            run.save()  # from here on the folder can be resumed
        run.say("base  " + evaluate.line_of(run.base_scores))
    if saved:
        run.say(f"resumed at step {run.step}")
    if n_processes > 1:
        dist.barrier()

    finished = train(run)
    # From here on nothing is lost: all is in a checkpoint.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not finished:
        again = f"python -m gpt2.train --resume --out_dir {out}"
        run.say(f"stopped after step {run.step}, saved; go on with: {again}")
    elif rank == 0:
        final = run.evaluate()
        checkpoint.save_model(lora.merge(run.student), out)
        if args.lora_rank:
            checkpoint.save_adapters(run.student, out / "adapter", args.init_from)
        checkpoint.copy_tokenizer(checkpoint.source_folder(args.init_from), out)
        results = {"config": vars(args), "command": settings.command(args), "base": run.base_scores}
        results["final"] = final
        results["seconds"] = time.perf_counter() - began
        text = json.dumps(results, indent=1) + "\n"
        checkpoint.write_atomically(out / "results.json", lambda tmp: tmp.write_text(text))
        rows = [("base", run.base_scores), (f"{args.method}, {args.steps} steps", final)]
        run.say("\n" + evaluate.table(rows))
        files = "weights, results.json, metrics.jsonl and samples.jsonl"
        run.say(f"\n{files} are in {out}; {results['seconds']:.0f} s")
    if n_processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return finished


def join_processes(backend):
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    except (ValueError, RuntimeError):
        raise ValueError(
            "the processes cannot find each other; start them with torchrun, or unset RANK and "
            "WORLD_SIZE for one process"
        ) from None


def process_numbers():
    """Rank and number of processes, which torchrun puts into the environment."""
    words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if all(word.isdecimal() for word in words) and 0 <= int(words[0]) < int(words[1]):
        return int(words[0]), int(words[1])
    raise ValueError(
        "RANK and WORLD_SIZE in the environment are {!r} and {!r}, not as torchrun sets them; "
        "unset both for one process".format(*words)
    )


def main(argv=None):
    fast.keep_freed_memory()
    args, given = settings.parse_args(__doc__, argv)
    rank = 0
    try:
        rank, n_processes = process_numbers()
        with contextlib.ExitStack() as stack:
            if args.report:
                print(evaluate.report(args.report))
            elif not fine_tune(args, given, rank, n_processes, stack):
                sys.exit(130)
    except FloatingPointError as e:
        end(rank, f"{e}{after_explosion(Path(args.out_dir) / 'checkpoints')}")
    except (ValueError, OSError) as e:
        unforeseen = (
            getattr(e, "filename", None) and f"{e.filename}: {e.strerror or e}; check the path"
        )
        end(rank, unforeseen or str(e))
    except (MemoryError, RuntimeError) as e:
        if not checkpoint.memory_is_full(e):
            raise
        remedy = "lower --micro_batch, --max_new_tokens or --batch_size, or choose a smaller model"
        end(rank, f"the memory is full; {remedy}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; if a checkpoint was saved, --resume goes on from it")


def after_explosion(folder):
    """Weights may be beyond use before a number is not finite, and then be saved."""
    if not (files := checkpoint.run_checkpoints(folder)):
        return ""
    remedy = checkpoint.way_back(folder)
    return f"; {files[-1]} is from before it, and if --resume ends here again, {remedy}"


def end(rank, sentence):
    """Exit with a sentence on one line; of several processes, one prints."""
    sys.exit("error: " + " ".join(sentence.split()) if rank == 0 else 1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # A name that they cannot print must not end a run.
        stream.reconfigure(errors="backslashreplace")
    main()
