"""Teach a small GPT three skills in turn, by supervised fine-tuning (SFT) and by SDFT.

    python train_toy.py                              # from nothing, on a laptop, in minutes
    python train_toy.py --base out/toy/base.pt       # again, without the pretraining
    python train_toy.py --sft_style own --sft_lr 1e-4 --sft_steps 60    # a control

A base is pretrained in the world of data/toy.py (see data/README.md). Then it learns the skills X,
Y and Z one after the other. SFT and SDFT get the same prompts and the same expert demonstrations.
The prior skills A to H are never trained on again: they tell what is forgotten. An answer counts
by its content, in the model's style (digits) or in the expert's (letters). The log's accuracies are
on validation inputs, the table's on test inputs. Files for --out_dir: metrics.jsonl and
samples.jsonl (see data/watch.py), results.json, base.pt, sft.pt, sdft.pt.
"""

import argparse
import copy
import json
import math
import os
import shlex
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import samples, toy, watch
from model import GPT, GPTConfig
from sdft import clip_and_step, completion_logits, rollout, sft_loss, train_step

MODEL = dict(block_size=32, vocab_size=len(toy.VOCAB), n_layer=2, n_head=4, n_embd=128)
TEACHER_GATE = 0.95  # a teacher below this accuracy has nothing to distil


def sft_step(student, teacher, optimizer, batch, generator):
    """One SFT update, off-policy: imitate the expert's demonstrations (B, C). Returns the loss."""
    tokens = torch.from_numpy(batch["demonstrations"]).to(student.wte.weight.device)  # (B, C)
    is_end = (tokens == toy.EOS).long()
    mask = is_end.cumsum(1) - is_end == 0  # (B, C), up to and including the first end token
    loss = sft_loss(completion_logits(student, batch["prompts"], tokens), tokens, mask)
    loss.backward()
    clip_and_step(student, optimizer, loss.item())
    return loss.item()


def sdft_step(student, teacher, optimizer, batch, generator, **settings):
    """One SDFT update, on-policy: Algorithm 1. Returns the loss."""
    contexts = batch["prompts"], batch["teacher_prompts"]  # Ctx_S(x) and Ctx_T(x, c)
    settings |= dict(max_new_tokens=limit(batch["answers"]), eos_id=toy.EOS, generator=generator)
    return train_step(student, teacher, optimizer, *contexts, **settings)[0]


def limit(answers):
    """A response's most tokens: one more than the answers (n, A), to see a missing end token."""
    return answers.shape[1] + 1


def fine_tune(student, data, step, lr, steps, batch_size=64, seed=0, on_step=None, **settings):
    """Teach `student` one skill, in place. Returns the teacher.

    step     sft_step, sdft_step, or another function of that signature; it gets `settings`
    on_step  called as on_step(loss, teacher) after every update; True ends the training
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = adamw(student, lr, weight_decay=0.0)
    rng = np.random.default_rng([seed, 2])
    generator = torch.Generator(student.wte.weight.device).manual_seed(seed)
    for i in range(steps):
        set_learning_rate(optimizer, lr, i, steps)
        n = len(data["prompts"])
        rows = rng.choice(n, min(batch_size, n), replace=False)
        batch = {key: values[rows] for key, values in data.items()}
        loss = step(student, teacher, optimizer, batch, generator, **settings)
        if on_step and on_step(loss, teacher):
            break
    return teacher


def pretrain(batch, seed, steps, device, on_step=None, **sizes):
    """A base from nothing: cross entropy on the answers of a world, which `batch` draws."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    model = GPT(GPTConfig(**MODEL | sizes)).to(device)
    lr = 2e-3
    optimizer = adamw(model, lr, betas=(0.9, 0.99), weight_decay=0.01)
    for i in range(steps):
        set_learning_rate(optimizer, lr, i, steps, warmup=50)
        prompts, answers = batch(rng, 128, seed)
        tokens = torch.from_numpy(answers).to(device)  # (B, C)
        logits = completion_logits(model, prompts, tokens)  # (B, C, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        clip_and_step(model, optimizer, loss.item())
        if on_step:
            on_step(loss.item())
    return model


def adamw(model, lr, **settings):
    fused = model.wte.weight.device.type != "mps"  # one kernel for all weights: 10 times as fast
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=fused, **settings)


def set_learning_rate(optimizer, lr, step, steps, warmup=10):
    """Linear warm-up times a cosine to zero."""
    rate = lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def evaluate(model, sets, prompts="prompts", temperature=0.0, seed=0, is_correct=toy.is_correct):
    """Accuracy, and mean response length in tokens, of every data set in {name: data}.

    `prompts` is the key of what the model reads: "teacher_prompts" have the demonstration.
    """
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    rows = np.concatenate([data[prompts] for data in sets.values()])
    answers = np.concatenate([data["answers"] for data in sets.values()])
    y, mask = rollout(model, rows, limit(answers), toy.EOS, temperature, generator)
    ends = np.cumsum([len(data[prompts]) for data in sets.values()])[:-1]
    scores = is_correct(y.cpu().numpy(), answers), mask.sum(1).cpu().numpy()  # (rows,) each
    return tuple({k: float(v.mean()) for k, v in zip(sets, np.split(s, ends))} for s in scores)


def measure(model, sets, sampled=False):
    """Greedy accuracy on the new skills in `sets`, and the mean over the prior ones as "prior".

    With `sampled` also at temperature 1, under "X_sampled" and so on.
    """
    row = {}
    for suffix, temperature in [("", 0.0), ("_sampled", 1.0)][: 1 + sampled]:
        accuracy, _ = evaluate(model, sets, temperature=temperature)
        row |= {name + suffix: accuracy[name] for name in sets if name in toy.NEW}
        row["prior" + suffix] = float(np.mean([accuracy[k] for k in sets if k in toy.PRIOR]))
    return row


def main(argv=None):
    args, start = parse_args(argv), time.perf_counter()
    device = torch.device(args.device)
    both = dict(batch_size=args.batch_size, seed=args.seed)
    sdft = dict(divergence=args.divergence, alpha=args.ema_alpha)
    arms = {
        "sft": both | dict(step=sft_step, lr=args.sft_lr, steps=args.sft_steps),
        "sdft": both | sdft | dict(step=sdft_step, lr=args.lr, steps=args.steps),
    }
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "samples.jsonl", "page.html", "sft.pt", "sdft.pt"):
        (args.out_dir / name).unlink(missing_ok=True)  # of an earlier run
    log = open(args.out_dir / "metrics.jsonl", "w", encoding="utf-8")
    config = vars(args) | dict(threads=torch.get_num_threads(), torch=torch.__version__)
    print("device {device}, {threads} threads, torch {torch}, seed {seed}".format(**config))
    if args.base:
        base = load_base(args.base, device)
    else:
        on_step = progress(log, "pretrain", args.pretrain_steps, lines=8)
        base = pretrain(toy.rivals_batch, args.seed, args.pretrain_steps, device, on_step)
        save(base, args.out_dir / "base.pt")

    test = load_skills("test", args.seed, n_new=400, n_prior=100)
    base_row = measure(base, test, sampled=True)
    teacher = evaluate(base, {name: test[name] for name in toy.NEW}, "teacher_prompts")[0]
    base_row["teacher"] = float(np.mean([*teacher.values()]))
    print("base: " + ", ".join(f"{k} {base_row[k]:.2f}" for k in [*toy.NEW, "prior", "teacher"]))
    if base_row["teacher"] < TEACHER_GATE:
        raise ValueError(
            f"the base's accuracy with a demonstration is {base_row['teacher']:.2f}, below "
            f"{TEACHER_GATE}, so that there is nothing to distil; raise --pretrain_steps"
        )
    command = shlex.join(["python", "train_toy.py", *(sys.argv[1:] if argv is None else argv)])
    results = {"config": config, "command": command, "base": base_row}
    for arm, settings in arms.items():
        results[arm] = learn_in_turn(base, arm, settings, test, args, log)
    results["seconds"] = time.perf_counter() - start

    print_table(results)
    text = json.dumps(results, indent=1, default=str) + "\n"
    write_whole(args.out_dir / "results.json", lambda tmp: tmp.write_text(text))
    print(f"\n{results['seconds']:.0f} s in all; results and weights are in {args.out_dir}")
    print(f"every token, both roles: python -m experiments.page {shlex.quote(str(args.out_dir))}")


def learn_in_turn(base, arm, settings, test, args, log):
    """Each skill from where the last one ended. Returns the test accuracies after every skill."""
    student, rows, looks = copy.deepcopy(base), [], []
    validation = load_skills("val", args.seed, n_new=100, n_prior=25)
    for skill in toy.NEW:
        data = toy.skill(skill, "train", args.seed, args.sft_style if arm == "sft" else "expert")
        watched = {k: v for k, v in validation.items() if k == skill or k in toy.PRIOR}
        prompts = toy.prompts_to_watch(watched, n_new=50)
        how = tools(limit(data["answers"]), args.seed)

        def look(step, teacher):
            models = student, teacher if arm == "sdft" else None, base
            about = {"phase": arm, "skill": skill, "step": step}
            seen, said = watch.look(models, prompts, *how, args.divergence, **about)
            samples.append(args.out_dir / "samples.jsonl", said)
            accuracy = measure(student, watched)
            seen |= {"new": accuracy[skill], "prior": accuracy["prior"]}
            looks.append(about | seen)
            for sentence in (warnings := watch.warnings(looks)):
                print(f"{arm:8} {skill} {step:5}  warning: {sentence}", flush=True)
            return looks[-1] | {"warnings": warnings}

        print(json.dumps(look(0, student)), file=log)
        on_step = progress(log, arm, settings["steps"], 5, skill, look)
        fine_tune(student, data, on_step=on_step, **settings)
        rows.append({"after": skill} | measure(student, test, sampled=True))
        save(student, args.out_dir / f"{arm}.pt")
    return rows


def tools(max_new_tokens, seed):
    """How data/watch.py lets a model respond, and scores and judges the response."""

    def respond(model, prompts, greedy):
        generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
        return rollout(model, prompts, max_new_tokens, toy.EOS, float(not greedy), generator)

    score = lambda *context: completion_logits(*context).detach().cpu().numpy()
    is_correct = lambda ids, row: toy.is_correct(np.array([ids]), row["answer"][None])[0]
    return respond, score, is_correct, toy.decode, toy.EOS


def load_skills(split, seed, n_new, n_prior):
    """{name: data} of all skills: the first n_new rows of the new, n_prior of the prior ones."""
    sets = {}
    for name in toy.KNOWN:
        n = n_new if name in toy.NEW else n_prior
        sets[name] = {key: values[:n] for key, values in toy.skill(name, split, seed).items()}
    return sets


def progress(log, phase, steps, lines, skill=None, look=None):
    """An on_step that logs a few lines per phase; the loss is the mean since the line before."""
    losses, done, start = [], 0, time.perf_counter()

    def on_step(loss, teacher=None):
        nonlocal done
        done += 1
        losses.append(loss)
        if done * lines // steps == (done - 1) * lines // steps:
            return
        left = (time.perf_counter() - start) / done * (steps - done)
        row = {"phase": phase, "skill": skill, "step": done, "loss": float(np.mean(losses))}
        row |= look(done, teacher) if look else {}
        losses.clear()
        print(json.dumps(row), file=log, flush=True)
        line = f"{phase:8} {skill or ' '} {done:5}/{steps}  loss {row['loss']:6.3f}"
        line += f"  new {row['new']:.2f}  prior {row['prior']:.2f}" if look else ""
        print(f"{line}  {left:3.0f} s left", flush=True)

    return on_step


def print_table(results):
    columns = [*toy.NEW, "prior"]
    print("\ngreedy accuracy on unseen inputs; the prior skills are never trained on")
    print(f"{'':8}{'SFT':>20}{'SDFT':>31}")
    print("after   " + "   ".join(2 * ["".join(f"{c:>7}" for c in columns)]))
    base = {"after": "base"} | results["base"]
    for rows in zip([base, *results["sft"]], [base, *results["sdft"]]):
        cells = ["".join(f"{row[c]:7.2f}" for c in columns) for row in rows]
        print(f"{rows[0]['after']:8}" + "   ".join(cells))


def write_whole(path, write):
    """write(tmp), then rename: the file is there as a whole or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    write(tmp)
    os.replace(tmp, path)


def save(model, path):
    write_whole(path, lambda tmp: torch.save(model.state_dict(), tmp))


def load_base(path, device):
    """The base in a file that an earlier run has written."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load ignores the file's checksums
        model, state = GPT(GPTConfig(**MODEL)), torch.load(path, "cpu", weights_only=True)
        model.load_state_dict({} if damaged else state)
    except Exception:  # a damaged file makes the readers raise almost anything
        raise ValueError(f"--base {path} is missing or no base; leave it out to pretrain") from None
    return model.to(device)


def parse_args(argv=None):
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
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
    ranges = dict.fromkeys(("steps", "sft_steps", "pretrain_steps"), (1, 10**6))
    ranges |= dict(batch_size=(1, 400), seed=(0, 2**63 - 1), lr=(0, 1), sft_lr=(0, 1))
    for name, (low, high) in (ranges | dict(ema_alpha=(0, 1))).items():
        if not low <= getattr(args, name) <= high:  # NaN fails too
            p.error(f"--{name} must lie between {low} and {high}")
    return args


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        sys.exit(f"error: {e.filename}: {e.strerror}; choose another --out_dir")
    except (ValueError, FloatingPointError) as e:
        sys.exit(f"error: {e}")
    except (RuntimeError, AssertionError) as e:  # e.g. a device that this machine does not have
        sys.exit(f"error: {str(e).splitlines()[0]}; if --device is not cpu, try that")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; if base.pt is there, --base reuses it")
