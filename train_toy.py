"""Teach a small GPT three skills in turn, by supervised fine-tuning (SFT) and by SDFT.

    python train_toy.py                              # from nothing, on a laptop, in minutes
    python train_toy.py --base out/toy/base.pt       # again, without the pretraining
    python train_toy.py --sft_style own --sft_lr 1e-4 --sft_steps 60    # a control

A base is pretrained in the world of data/toy.py (see data/README.md). Then it learns the skills X,
Y and Z one after the other. SFT and SDFT get the same prompts and the same expert demonstrations.
The prior skills A to H are never trained on again: they tell what is forgotten. An answer counts
by its content, in the model's style (digits) or in the expert's (letters). The log's accuracies are
on validation inputs, the table's on test inputs. Files for --out_dir: metrics.jsonl and
samples.jsonl (see data/README.md), results.json, base.pt, sft.pt, sdft.pt.
"""

import argparse
import copy
import itertools
import json
import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import files, toy, watch
from data.files import write_whole
from model import GPT, GPTConfig
from sdft import clip_and_step, completion_logits, ema_update, rollout, sdft_loss, sft_loss

MODEL = dict(block_size=32, vocab_size=len(toy.VOCAB), n_layer=2, n_head=4, n_embd=128)
TEACHER_GATE = 0.95  # a teacher below this accuracy has nothing to distil


# --- The two methods, and the loop that they share -----------------------------------------------


def sft(student, teacher, batch, generator):
    """The loss of SFT. Off-policy: the expert's demonstrations (B, C) are the target."""
    tokens = torch.from_numpy(batch["demonstrations"]).to(student.wte.weight.device)  # (B, C)
    is_end = tokens == toy.EOS
    mask = is_end.cumsum(1) - is_end.long() == 0  # (B, C), up to and including the first end token
    return sft_loss(completion_logits(student, batch["prompts"], tokens), tokens, mask)


def sdft(student, teacher, batch, generator, divergence="reverse"):
    """The loss of SDFT, Algorithm 1. On-policy: the student's own responses are scored."""
    prompts, teacher_prompts = batch["prompts"], batch["teacher_prompts"]  # Ctx_S(x), Ctx_T(x, c)
    # One token more than an answer needs, to see when the end token is missing.
    max_new_tokens = batch["answers"].shape[1] + 1
    completions, mask = rollout(student, prompts, max_new_tokens, toy.EOS, generator=generator)
    student_logits = completion_logits(student, prompts, completions)  # (B, C, V)
    with torch.no_grad():
        teacher_logits = completion_logits(teacher, teacher_prompts, completions)  # (B, C, V)
    return sdft_loss(student_logits, teacher_logits, mask, divergence)[0]


def fine_tune(
    student, teacher, data, method, lr, steps, batch_size=64, seed=0, alpha=0.02, **settings
):
    """Teach `student` one skill, in place: yields (step, loss) after every update.

    method   sft, sdft, or another loss of that signature; it gets `settings`
    teacher  begins as a copy of the student and follows it with rate alpha; None if there is none
    data     {name: array of n rows}, as toy.skill gives it
    """
    optimizer = adamw(student, lr, weight_decay=0.0)
    rng = np.random.default_rng([seed, 2])
    generator = torch.Generator(student.wte.weight.device).manual_seed(seed)
    n = len(data["prompts"])
    for step in range(1, steps + 1):
        set_learning_rate(optimizer, lr, step, steps)
        rows = rng.choice(n, min(batch_size, n), replace=False)
        batch = {name: values[rows] for name, values in data.items()}
        loss = method(student, teacher, batch, generator, **settings)
        loss.backward()
        clip_and_step(student, optimizer, loss.item())
        if teacher is not None:
            ema_update(teacher, student, alpha)
        yield step, loss.item()


def pretrain(model, draw_batch, seed, steps):
    """Cross entropy on the answers of a world, in place: yields (step, loss) after every update.

    draw_batch(rng, n) gives prompts (n, P) and answers (n, C), arrays of token ids.
    """
    lr, rng = 2e-3, np.random.default_rng([seed, 1])
    optimizer = adamw(model, lr, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(1, steps + 1):
        set_learning_rate(optimizer, lr, step, steps, warmup=50)
        prompts, answers = draw_batch(rng, 128)
        tokens = torch.from_numpy(answers).to(model.wte.weight.device)  # (B, C)
        logits = completion_logits(model, prompts, tokens)  # (B, C, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        clip_and_step(model, optimizer, loss.item())
        yield step, loss.item()


def adamw(model, lr, **settings):
    fused = model.wte.weight.device.type != "mps"  # one kernel for all weights: 10 times as fast
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=fused, **settings)


def set_learning_rate(optimizer, lr, step, steps, warmup=10):
    """Of update `step`, 1 ... steps: linear warm-up times a cosine to zero."""
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, step / warmup) * cosine


# --- Measuring -----------------------------------------------------------------------------------


def evaluate(model, sets, prompts="prompts", temperature=0.0, seed=0, is_correct=toy.is_correct):
    """Accuracy, and mean response length in tokens, of every data set in {name: data}.

    `prompts` is the key of what the model reads: "teacher_prompts" have the demonstration.
    """
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    rows = np.concatenate([data[prompts] for data in sets.values()])
    answers = np.concatenate([data["answers"] for data in sets.values()])
    max_new_tokens = answers.shape[1] + 1
    y, mask = rollout(model, rows, max_new_tokens, toy.EOS, temperature, generator)
    ends = np.cumsum([len(data[prompts]) for data in sets.values()])[:-1]
    scores = is_correct(y.cpu().numpy(), answers), mask.sum(1).cpu().numpy()  # (rows,) each
    return tuple({k: float(v.mean()) for k, v in zip(sets, np.split(s, ends))} for s in scores)


def measure(model, sets):
    """Greedy accuracy on the new skills in `sets`, and the mean over the prior ones as "prior"."""
    accuracy, _ = evaluate(model, sets)
    prior = float(np.mean([accuracy[name] for name in sets if name in toy.PRIOR]))
    return {name: accuracy[name] for name in sets if name in toy.NEW} | {"prior": prior}


# --- The experiment ------------------------------------------------------------------------------


def main(argv=None):
    args, start = parse_args(argv), time.perf_counter()
    torch.manual_seed(args.seed)
    base = load_base(args.base) if args.base else GPT(GPTConfig(**MODEL))
    base.to(args.device)
    # Whatever can be wrong with the flags is known by now: an earlier run's files may go.
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name in "metrics.jsonl samples.jsonl results.json page.html sft.pt sdft.pt".split():
        (args.out_dir / name).unlink(missing_ok=True)
    config = vars(args) | dict(threads=torch.get_num_threads(), torch=torch.__version__)
    print("device {device}, {threads} threads, torch {torch}, seed {seed}".format(**config))
    if not args.base:
        losses, began = [], time.perf_counter()
        for step, loss in pretrain(base, toy.pretraining_batch, args.seed, args.pretrain_steps):
            losses.append(loss)
            if step % max(1, args.pretrain_steps // 8) == 0:
                log({"phase": "pretrain", "step": step}, losses, args.pretrain_steps, began, args)
        save(base, args.out_dir / "base.pt")

    test = toy.skills("test", args.seed, n_new=400, n_prior=100)
    base_row = {"after": "base"} | measure(base, test)
    teacher = evaluate(base, {name: test[name] for name in toy.NEW}, "teacher_prompts")[0]
    base_row["teacher"] = float(np.mean([*teacher.values()]))
    print("base: " + ", ".join(f"{k} {base_row[k]:.2f}" for k in [*toy.NEW, "prior", "teacher"]))
    if base_row["teacher"] < TEACHER_GATE:
        raise ValueError(
            f"the base's accuracy with a demonstration is {base_row['teacher']:.2f}, below "
            f"{TEACHER_GATE}, so that there is nothing to distil; raise --pretrain_steps"
        )
    command = shlex.join(["python", "train_toy.py", *(sys.argv[1:] if argv is None else argv)])
    results = {"config": config, "command": command, "base": base_row, "seconds": {}}
    for arm in ("sft", "sdft"):
        # Both start from the base, and each skill from where the last one ended.
        student, looks, results[arm], seconds = copy.deepcopy(base), [], [], []
        for skill in toy.NEW:
            seconds.append(learn(arm, skill, student, base, looks, args))
            results[arm].append({"after": skill} | measure(student, test))
            save(student, args.out_dir / f"{arm}.pt")
        results["seconds"][f"{arm} update"] = float(np.mean(seconds))
    results["seconds"]["in all"] = time.perf_counter() - start

    print_table(results)
    text = json.dumps(results, indent=1, default=str) + "\n"
    write_whole(args.out_dir / "results.json", lambda tmp: tmp.write_text(text))
    print(
        "\n{sft update:.3f} s an update of SFT, {sdft update:.3f} s of SDFT, {in all:.0f} s in all;"
        " results and weights are in {}".format(args.out_dir, **results["seconds"])
    )
    folder = shlex.quote(str(args.out_dir))
    print(f"every token, both roles: python -m experiments.page {folder}")


def learn(arm, skill, student, base, looks, args):
    """Teach `student` one skill, in place, and look at it now and then on validation inputs.

    `looks` are this arm's rows of metrics so far, of earlier skills too. Returns the seconds of an
    update, without the looks.
    """
    shared = dict(batch_size=args.batch_size, seed=args.seed)
    if arm == "sft":
        data, teacher = toy.skill(skill, "train", args.seed, args.sft_style), None
        steps = args.sft_steps
        updates = fine_tune(student, None, data, sft, args.sft_lr, steps, **shared)
    else:
        data = toy.skill(skill, "train", args.seed, "expert")
        teacher = copy.deepcopy(student).requires_grad_(False)
        steps = args.steps
        shared |= dict(alpha=args.ema_alpha, divergence=args.divergence)
        updates = fine_tune(student, teacher, data, sdft, args.lr, steps, **shared)
    validation = toy.skills("val", args.seed, n_new=100, n_prior=25)
    validation = {name: validation[name] for name in [*toy.PRIOR, skill]}
    watched, max_new_tokens = toy.rows_to_watch(validation, n_new=50), data["answers"].shape[1] + 1
    reading = toy.decode, toy.is_correct_text, max_new_tokens, toy.EOS, args.divergence

    losses, began, looking = [], time.perf_counter(), 0.0
    for step, loss in itertools.chain([(0, None)], updates):  # step 0: before training
        losses += [] if loss is None else [loss]
        if step % max(1, steps // 5) == 0 or step == steps:
            looked = time.perf_counter()
            row = {"phase": arm, "skill": skill, "step": step}
            metrics, samples = watch.look(student, teacher, base, watched, *reading, **row)
            accuracy = measure(student, validation)
            row |= metrics | {"new": accuracy[skill], "prior": accuracy["prior"]}
            looks.append(row)
            row["warnings"] = watch.warnings(looks)
            files.append(args.out_dir / "samples.jsonl", samples)
            log(row, losses, steps, began, args)
            looking += time.perf_counter() - looked
    return (time.perf_counter() - began - looking) / steps


def log(row, losses, steps, began, args):
    """Print a row of metrics and add it to metrics.jsonl; its loss is the mean since the last."""
    line = f"{row['phase']:8} {row.get('skill', ' ')} {row['step']:5}"
    if losses:
        row["loss"] = float(np.mean(losses))
        losses.clear()
        left = (time.perf_counter() - began) / row["step"] * (steps - row["step"])
        scores = f"  new {row['new']:.2f}  prior {row['prior']:.2f}" if "new" in row else ""
        print(f"{line}/{steps}  loss {row['loss']:6.3f}{scores}  {left:3.0f} s left", flush=True)
    for sentence in row.get("warnings", []):
        print(f"{line}  warning: {sentence}", flush=True)
    files.append(args.out_dir / "metrics.jsonl", [row])


def print_table(results):
    columns = [*toy.NEW, "prior"]
    print("\ngreedy accuracy on unseen inputs; the prior skills are never trained on")
    print(f"{'':8}{'SFT':>20}{'SDFT':>31}")
    print("after   " + "   ".join(2 * ["".join(f"{c:>7}" for c in columns)]))
    for sft_row, sdft_row in zip(*([results["base"], *results[arm]] for arm in ("sft", "sdft"))):
        cells = ["".join(f"{row[c]:7.2f}" for c in columns) for row in (sft_row, sdft_row)]
        print(f"{sft_row['after']:8}" + "   ".join(cells))


def save(model, path):
    write_whole(path, lambda tmp: torch.save(model.state_dict(), tmp))


def load_base(path):
    """The base in a file that an earlier run has written."""
    try:
        model, state = GPT(GPTConfig(**MODEL)), torch.load(path, "cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception:  # a damaged file makes the readers raise almost anything
        raise ValueError(f"--base {path} is missing or no base; leave it out to pretrain") from None
    return model


def parse_args(argv=None):
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = p.add_argument
    add("--out_dir", type=Path, default="out/toy", help="folder for everything that is written")
    add("--base", type=Path, help="a base.pt of an earlier run; without it a base is pretrained")
    add("--seed", type=int, default=0, help="of the base, the data splits and the training")
    add("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="where to train")
    add("--divergence", choices=("reverse", "forward", "jsd"), default="reverse", help="SDFT's KL")
    add("--ema_alpha", type=float, default=0.02, help="0 freezes the teacher, 1 is the student")
    add("--lr", type=float, default=6e-5, help="SDFT's peak learning rate")
    add("--steps", type=int, default=80, help="SDFT's updates per skill")
    add("--sft_style", choices=("expert", "own"), default="expert", help="SFT's demonstrations")
    add("--sft_lr", type=float, default=1e-3, help="SFT's peak learning rate")
    add("--sft_steps", type=int, default=160, help="SFT's updates per skill")
    add("--batch_size", type=int, default=64, help="prompts per update, of 400 per skill")
    add("--pretrain_steps", type=int, default=2600, help="updates of the base's pretraining")
    args = p.parse_args(argv)
    if min(args.steps, args.sft_steps, args.pretrain_steps, args.batch_size) < 1:
        p.error("--steps, --sft_steps, --pretrain_steps and --batch_size must be at least 1")
    if args.out_dir == Path():
        p.error("--out_dir must name a folder of its own")
    if not 0 <= args.ema_alpha <= 1:
        p.error("--ema_alpha must lie between 0 and 1")
    return args


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, FloatingPointError) as e:
        sys.exit(f"error: {e}")
    except (RuntimeError, AssertionError) as e:  # e.g. a device that this machine does not have
        sys.exit(f"error: {str(e).splitlines()[0]}; if --device is not cpu, try that")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; if base.pt is there, --base reuses it")
