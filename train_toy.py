"""Teach a small GPT three skills in turn, by supervised fine-tuning (SFT) and by SDFT.

    python train_toy.py                              # from nothing, on a laptop, in minutes
    python train_toy.py --base out/toy/base.pt       # again, without the pretraining
    python train_toy.py --sft_style own --sft_lr 1e-4 --sft_steps 60    # a control

A base is pretrained in the world of data/toy.py (see data/README.md). Then it learns the skills X,
Y and Z one after the other. SFT and SDFT get the same prompts and the same expert demonstrations.
The prior skills A to H are never trained on again: they tell what is forgotten. An answer counts
by its content, in the model's style (digits) or in the expert's (letters). The log's accuracies are
on validation inputs, the table's on test inputs.
"""

import copy
import itertools
import json
import math
import shlex
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import numpy as np
import torch

from data import files, toy, watch
from data.files import write_tensors, write_whole
from model import GPT, GPTConfig
from sdft import clip_and_step, completion_logits, distill_loss, ema_update, rollout, sft_loss

MODEL = dict(block_size=32, vocab_size=len(toy.VOCAB), n_layer=2, n_head=4, n_embd=128)


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
    y, mask = rollout(student, prompts, max_new_tokens, toy.EOS, generator=generator)  # (B, C)
    loss, _ = distill_loss(student, teacher, prompts, teacher_prompts, y, mask, divergence)
    return loss


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
    """Cross entropy on a world's answers, in place: yields (step, loss) after every update."""
    lr, rng = 2e-3, np.random.default_rng([seed, 1])
    optimizer = adamw(model, lr, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(1, steps + 1):
        set_learning_rate(optimizer, lr, step, steps, warmup=50)
        prompts, answers = draw_batch(rng, 128)  # (B, P) and (B, C), token ids
        tokens = torch.from_numpy(answers).to(model.wte.weight.device)  # (B, C)
        logits = completion_logits(model, prompts, tokens)  # (B, C, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
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
    """Accuracy and mean length in tokens of the responses to a column of every {name: data}."""
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    rows, answers = (np.concatenate([d[k] for d in sets.values()]) for k in (prompts, "answers"))
    y, mask = rollout(model, rows, answers.shape[1] + 1, toy.EOS, temperature, generator)
    scores = is_correct(y.cpu().numpy(), answers), mask.sum(1).cpu().numpy()  # (rows,) each
    ends = np.cumsum([len(data[prompts]) for data in sets.values()])[:-1]
    return tuple({k: float(v.mean()) for k, v in zip(sets, np.split(s, ends))} for s in scores)


def measure(model, sets):
    """Greedy accuracy on each of the `sets` that is new, and the mean over the prior ones."""
    accuracy, _ = evaluate(model, sets)
    prior = float(np.mean([accuracy[name] for name in sets if name in toy.PRIOR]))
    return {name: accuracy[name] for name in sets if name not in toy.PRIOR} | {"prior": prior}


# --- The experiment ------------------------------------------------------------------------------


def main(argv=None):
    args, began = parse_args(argv), time.perf_counter()
    torch.manual_seed(args.seed)
    base = GPT(GPTConfig(**MODEL)).to(args.device)
    if args.base:
        load(base, args.base)
    # All that can be wrong with the flags is known by now: an earlier run's files may go.
    files.begin_anew(args.out_dir, "results.json page.html sft.pt sdft.pt".split())
    config = vars(args) | files.machine(args.device)
    print("{machine}, {device}, {threads} threads, torch {torch}, seed {seed}".format(**config))
    if not args.base:
        updates = pretrain(base, toy.pretraining_batch, args.seed, args.pretrain_steps)
        for row, seconds in files.progress(updates, args.pretrain_steps, n_rows=8):
            files.log(args.out_dir, {"phase": "pretrain"} | row, args.pretrain_steps, seconds)
        write_tensors(args.out_dir / "base.pt", base.state_dict())

    test = toy.skills("test", args.seed, n_new=400, n_prior=100)
    teacher, _ = evaluate(base, {name: test[name] for name in toy.NEW}, "teacher_prompts")
    scores = measure(base, test) | {"teacher": float(np.mean([*teacher.values()]))}
    print("base: " + ", ".join(f"{name} {score:.2f}" for name, score in scores.items()))
    results = {"config": config, "base": {"after": "base"} | scores, "seconds": {}}
    results["command"] = shlex.join(["python", "train_toy.py", *(argv or sys.argv[1:])])
    for arm in ("sft", "sdft"):
        results[arm], results["seconds"][f"{arm} update"] = teach(arm, base, test, args)
    results["seconds"]["in all"] = time.perf_counter() - began
    print_table(results)
    text = json.dumps(results, indent=1, default=str) + "\n"
    write_whole(args.out_dir / "results.json", lambda tmp: tmp.write_text(text, "utf-8"))
    cost = "{sft update:.3f} s an update of SFT, {sdft update:.3f} s of SDFT, {in all:.0f} s in all"
    folder = shlex.quote(str(args.out_dir))
    print(f"\n{cost.format(**results['seconds'])}; results and weights are in {folder}")
    print(f"every token, both roles: python -m experiments.page {folder}", flush=True)


def teach(arm, base, test, args):
    """Teach a copy of the base X, Y and Z in turn: test scores after each, seconds of an update."""
    student, looks, scores, seconds = copy.deepcopy(base), [], [], []
    style, steps = (args.sft_style, args.sft_steps) if arm == "sft" else ("expert", args.steps)
    both = dict(steps=steps, batch_size=args.batch_size, seed=args.seed)
    of_sdft = dict(alpha=args.ema_alpha, divergence=args.divergence)
    validation = toy.skills("val", args.seed, n_new=100, n_prior=25)
    reading = toy.decode, toy.is_correct_text, toy.N_DIGITS + 1, toy.EOS, args.divergence
    for skill in toy.NEW:
        # Each skill starts from where the last one ended, and SDFT's teacher as its student.
        data = toy.skill(skill, "train", args.seed, style)
        if arm == "sft":
            teacher, updates = None, fine_tune(student, None, data, sft, args.sft_lr, **both)
        else:
            teacher = copy.deepcopy(student).requires_grad_(False)
            updates = fine_tune(student, teacher, data, sdft, args.lr, **both, **of_sdft)
        # Now and then the models are looked at, on validation inputs, first before training.
        sets = {name: validation[name] for name in toy.PRIOR} | {"new": validation[skill]}
        watched, start = toy.rows_to_watch(sets, n_new=50), ({"step": 0}, 0.0)
        for row, spent in itertools.chain([start], files.progress(updates, steps, n_rows=5)):
            about = {"phase": arm, "skill": skill, "step": row["step"]}
            metrics, samples = watch.look(student, teacher, base, watched, *reading, **about)
            looks.append(about | row | metrics | measure(student, sets))
            looks[-1]["warnings"] = watch.warnings(looks)
            files.log(args.out_dir, looks[-1], steps, spent, samples)
        seconds.append(spent / steps)
        scores.append({"after": skill} | measure(student, test))
        write_tensors(args.out_dir / f"{arm}.pt", student.state_dict())
    return scores, float(np.mean(seconds))


def print_table(results):
    print("\ngreedy accuracy on unseen inputs; the prior skills are never trained on")
    print(f"{'SFT':>28}{'SDFT':>31}")
    print("after" + 2 * "         X      Y      Z  prior")
    for rows in zip(*([results["base"], *results[arm]] for arm in ("sft", "sdft"))):
        cells = ["".join(f"{row[c]:7.2f}" for c in [*toy.NEW, "prior"]) for row in rows]
        print(f"{rows[0]['after']:8}" + "   ".join(cells))


def load(model, path):
    try:
        model.load_state_dict(torch.load(path, "cpu", weights_only=True))
    except Exception:  # a damaged file makes the readers raise almost anything
        raise ValueError(f"--base {path} is missing or no base; leave it out to pretrain") from None


def parse_args(argv=None):
    p = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p.description, add = __doc__.splitlines()[0], p.add_argument
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    add("--out_dir", type=Path, default="out/toy", help="folder for everything that is written")
    add("--base", type=Path, help="a base.pt of an earlier run; without it a base is pretrained")
    add("--seed", type=int, default=0, help="of the base, the data splits and the training")
    add("--device", default="cpu", choices=[k for k in there if there[k]], help="where to train")
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
    counts = args.steps, args.sft_steps, args.pretrain_steps, args.batch_size, args.seed + 1
    if min(counts) < 1 or not all(0 <= x <= 1 for x in (args.lr, args.sft_lr, args.ema_alpha)):
        p.error("steps and --batch_size are at least 1, --seed at least 0, rates and alpha 0 to 1")
    return args


if __name__ == "__main__":
    with files.errors_in_a_sentence("interrupted; if base.pt is there, --base reuses it"):
        main()
