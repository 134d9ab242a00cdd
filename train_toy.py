"""Self-distillation fine-tuning beside supervised fine-tuning, on a laptop, in minutes.

    python train_toy.py                          # pretrain a small base, then teach it X, Y and Z in turn, both ways
    python train_toy.py --sft_style own --out_dir out/own    # control: demonstrations in the model's own style
    python train_toy.py --report out/toy out/own             # finished runs side by side; seeds with mean and deviation

The base knows eight prior skills and half knows X, Y and Z (data/README.md). SFT imitates an expert's demonstrations; SDFT
sees the same prompts and demonstrations, but learns from its own responses. The prior skills are never trained on: they
are the benchmark that tells what was forgotten. An answer counts as right by its content, whichever style it is in.

Writes to --out_dir: metrics.jsonl (a line per log line), results.json, base.pt, sft.pt, sdft.pt, and with matplotlib retention.png.
A later run with the same --out_dir replaces them, but uses the base again where it fits. Log lines are on 100 validation inputs
of the skill and 25 of each prior one; the tables are on test inputs.
"""

import argparse
import ast
import copy
import inspect
import json
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import toy
from model import GPT, GPTConfig, write_atomically
from sdft import completion_logits, ema_update, rollout, sft_loss, train_step, update

MODEL = dict(block_size=16, vocab_size=len(toy.VOCAB), n_layer=2, n_head=4, n_embd=128)
MAX_NEW_TOKENS = 5  # one more than the longest answer has, so that a response that does not end is seen
TEACHER_GATE = 0.9  # below this accuracy with a demonstration there is nothing to distil


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--out_dir", type=Path, default=Path("out/toy"), help="folder for everything that is written (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the base, the data splits and the training (default: %(default)s)")
    add("--device", default=None, help="cpu, cuda or mps (default: the best one there is)")
    add("--kl", choices=["reverse", "forward", "jsd"], default="reverse", help="divergence of the SDFT loss: reverse is the paper's Eq. (1), forward is what its experiments ran (default: %(default)s)")
    add("--teacher", choices=["ema", "frozen", "live"], default="ema", help="the teacher's weights: a moving average of the student, the stage's start, or the student itself (default: %(default)s)")
    add("--ema_alpha", type=float, default=0.02, help="share of the student in the EMA teacher at every update (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="of the student's rollouts (default: %(default)s)")
    add("--lr", type=float, default=1e-4, help="SDFT's peak learning rate (default: %(default)s)")
    add("--steps", type=int, default=80, help="SDFT's updates per skill (default: %(default)s)")
    add("--sft_style", choices=["expert", "own"], default="expert", help="style of SFT's demonstrations; own is the control in which they are close to the base (default: %(default)s)")
    add("--sft_lr", type=float, default=None, help="SFT's peak learning rate (default: 1e-3, own style 1e-4)")
    add("--sft_steps", type=int, default=None, help="SFT's updates per skill (default: 400, own style 80)")
    add("--batch_size", type=int, default=64, help="prompts per fine-tuning update, of 400 per skill (default: %(default)s)")
    add("--pretrain_steps", type=int, default=3200, help="updates of the base's pretraining (default: %(default)s)")
    add("--log_lines", type=int, default=4, help="log lines per skill (default: %(default)s)")
    add("--report", nargs="+", type=Path, metavar="RUN", help="print a table of these finished runs and stop")
    args = p.parse_args(argv)
    # what each needs to learn a new skill: a foreign style takes more and larger updates
    default_lr, default_steps = {"expert": (1e-3, 400), "own": (1e-4, 80)}[args.sft_style]
    args.sft_lr = default_lr if args.sft_lr is None else args.sft_lr
    args.sft_steps = default_steps if args.sft_steps is None else args.sft_steps
    for name in ("steps", "sft_steps", "batch_size", "pretrain_steps", "log_lines"):
        if getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1")
    for name, (low, high) in {"lr": (1e-12, 1), "sft_lr": (1e-12, 1), "temperature": (0, 100), "seed": (0, 2**63 - 1)}.items():
        if not low <= getattr(args, name) <= high:  # NaN fails too
            p.error(f"--{name} must lie between {low} and {high}")
    if not args.batch_size <= 400:
        p.error("--batch_size must be at most 400, the number of training prompts of a skill")
    if not 0 <= args.ema_alpha <= 1:
        p.error("--ema_alpha must lie between 0 (frozen) and 1 (live)")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.report:
        return report(args.report)
    device = pick_device(args.device)
    alpha = {"ema": args.ema_alpha, "frozen": 0.0, "live": 1.0}[args.teacher]
    arms = {  # arms are data: every one runs through the same `fine_tune`
        "sft": dict(method=sft, lr=args.sft_lr, steps=args.sft_steps, style=args.sft_style),
        "sdft": dict(method="sdft", lr=args.lr, steps=args.steps, kl=args.kl, alpha=alpha, temperature=args.temperature),
    }
    config = {k: v for k, v in vars(args).items() if k != "report"} | {
        "out_dir": str(args.out_dir),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }

    out, base_file = args.out_dir, args.out_dir / "base.pt"
    print(f"device {device}, {config['threads']} threads, torch {torch.__version__}, seed {args.seed}")
    base = load_base(base_file, device, args.seed, args.pretrain_steps)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "retention.png", "sft.pt", "sdft.pt"):  # an earlier run's are not to be taken for this one's
            (out / name).unlink(missing_ok=True)
        log = Log(out / "metrics.jsonl")
    except OSError as e:
        sys.exit(f"error: cannot write to --out_dir {out} ({e.strerror}); name a folder that you may write to")

    start, seconds = time.perf_counter(), {"pretrain": 0.0}
    if base is not None:
        print(f"base from {base_file}")
    else:
        base = pretrain(args.seed, args.pretrain_steps, device, log)
        save(base, base_file, base_config(args.seed, args.pretrain_steps))
        seconds["pretrain"] = time.perf_counter() - start

    test = {name: head(toy.skill(name, "test", args.seed), 400 if name in toy.NEW else 100) for name in toy.KNOWN}
    new = {name: test[name] for name in toy.NEW}
    base_row = measure(base, test, sampled=True)
    base_row["teacher"] = float(np.mean(list(evaluate(base, new, prompts="teacher_prompts")[0].values())))
    print(
        f"base: prior {base_row['prior']:.2f}, new "
        + ", ".join(f"{k} {base_row[k]:.2f} (sampled {base_row[f'{k}_sampled']:.2f})" for k in new)
        + f", with a demonstration {base_row['teacher']:.2f}"
    )
    if base_row["teacher"] < TEACHER_GATE:
        sys.exit(
            f"error: the base answers only {base_row['teacher']:.0%} right with a demonstration in its prompt, below "
            f"{TEACHER_GATE:.0%}: there is nothing to distil; raise --pretrain_steps (now {args.pretrain_steps})"
        )

    results = {"config": config, "seconds": seconds, "base": base_row}
    students = {}
    for arm, settings in arms.items():
        began = time.perf_counter()
        students[arm] = copy.deepcopy(base)
        results[arm] = run_stages(students[arm], arm, settings, test, args, log, out)
        seconds[arm] = time.perf_counter() - began
    seconds["total"] = time.perf_counter() - start

    print_table(results)
    print_examples({"base": base, **students}, test)
    write_atomically(out / "results.json", lambda tmp: tmp.write_text(json.dumps(results, indent=1) + "\n"))
    written = ["metrics.jsonl", "results.json", *["base.pt"] * (seconds["pretrain"] > 0), "sft.pt", "sdft.pt"]
    written += draw(results, out / "retention.png")
    print(" + ".join(f"{k} {v:.0f} s" for k, v in seconds.items() if k != "total") + f" = {seconds['total']:.0f} s in all")
    print(f"wrote {', '.join(written)} to {out}")


# --- Training -------------------------------------------------------------------------------------------------------


def schedule(optimizer, lr, step, steps, warmup=10):
    """Linear warm-up times a cosine to zero."""
    rate = lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def pretrain(seed, steps, device, log, world="skills", n_embd=MODEL["n_embd"], batch_size=128, lr=2e-3):
    """A base from nothing: cross entropy on its answers to the prompts of a world of data/toy.py, "skills" or "facts"."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    batch = {"skills": toy.skills_batch, "facts": toy.facts_batch}[world]
    model = GPT(GPTConfig(**MODEL | {"n_embd": n_embd})).to(device)
    optimizer = adamw(model, lr, betas=(0.9, 0.99), weight_decay=0.01)
    log.begin("pretrain", steps, lines=16)
    for step in range(steps):
        schedule(optimizer, lr, step, steps, warmup=50)
        prompts, answers = batch(rng, batch_size, seed)
        y = torch.from_numpy(answers).to(device)  # (B, C)
        loss = F.cross_entropy(completion_logits(model, prompts, y).flatten(0, 1), y.flatten())
        loss.backward()
        update(model, optimizer, loss.item())
        log.step(loss.item(), y.numel())
    return model


def sft(student, teacher, batch, generator):
    """Supervised fine-tuning: cross entropy of the demonstrations (B, C), through the end token of each."""
    y = torch.from_numpy(batch["demonstrations"]).to(student.wte.weight.device)
    mask = (y == toy.EOS).cumsum(1) - (y == toy.EOS).long() == 0  # (B, C)
    return sft_loss(completion_logits(student, batch["prompts"], y), y, mask), int(mask.sum())


def fine_tune(
    student, data, method, lr, steps, batch_size=64, kl="reverse", alpha=0.02, temperature=1.0, seed=0, on_step=None
):
    """Teach `student` one skill in place, by any method, from the same prompts and demonstrations. Returns the teacher.

    method   "sdft"; or a function of student, teacher, a minibatch of `data` and a generator that returns a loss and its number
             of tokens, like `sft`
    on_step  on_step(loss, tokens) is called after every update and ends the training by returning True

    The optimiser and the teacher start afresh.
    """
    device = student.wte.weight.device
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = adamw(student, lr, betas=(0.9, 0.999), weight_decay=0.0)
    rng = np.random.default_rng([seed, 2])
    generator = torch.Generator(device).manual_seed(seed)
    for step in range(steps):
        schedule(optimizer, lr, step, steps)
        rows = rng.choice(len(data["prompts"]), min(batch_size, len(data["prompts"])), replace=False)  # Alg. 1, step 1
        batch = {k: v[rows] for k, v in data.items()}
        if method == "sdft":
            loss, info = train_step(
                student, teacher, optimizer, batch["prompts"], batch["teacher_prompts"], MAX_NEW_TOKENS, toy.EOS,
                kl=kl, alpha=alpha, temperature=temperature, generator=generator,
            )  # fmt: skip
            tokens = int(info["mask"].sum())
        else:
            loss, tokens = method(student, teacher, batch, generator)
            loss.backward()
            loss = loss.item()
            update(student, optimizer, loss)
            ema_update(teacher, student, alpha)
        if on_step and on_step(loss, tokens):
            break
    return teacher


def adamw(model, lr, **kw):
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=model.wte.weight.device.type != "mps", **kw)


def run_stages(student, arm, settings, test, args, log, out):
    """The skills in turn, each stage from where the last one ended; the accuracies on the test inputs after each."""
    settings = dict(settings)
    style = settings.pop("style", "expert")
    val = {name: head(toy.skill(name, "val", args.seed), 100 if name in toy.NEW else 25) for name in toy.KNOWN}
    log.begin(arm, settings["steps"] * len(toy.NEW), args.log_lines * len(toy.NEW))
    save(student, out / f"{arm}.pt")  # what is left where a stage fails
    rows = []
    for name in toy.NEW:
        data = toy.skill(name, "train", args.seed, style)
        watched = {k: v for k, v in val.items() if k == name or k in toy.PRIOR}
        on_step = lambda loss, tokens: log.step(loss, tokens, name, lambda: measure(student, watched))
        log.last = time.perf_counter()
        try:
            fine_tune(student, data, batch_size=args.batch_size, seed=args.seed, on_step=on_step, **settings)
            length = evaluate(student, {name: test[name]})[1][name]
            rows.append({"after": name} | measure(student, test, sampled=True) | {"length": length})
        except FloatingPointError as e:
            kept = f"the weights of the last finished stage, or the base's, are in {out / f'{arm}.pt'}"
            sys.exit(f"error: {arm} on {name}, update {log.done + 1}: {e}; {kept}")
        save(student, out / f"{arm}.pt")
    return rows


# --- Evaluation -----------------------------------------------------------------------------------------------------


def head(data, n):
    """The first n rows of a data set."""
    return {k: v[:n] for k, v in data.items()}


def evaluate(model, sets, prompts="prompts", temperature=0.0, seed=0, is_right=toy.is_right):
    """Accuracy and mean response length in tokens for every data set in {name: data}: two dictionaries."""
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    rows = np.concatenate([d[prompts] for d in sets.values()])
    completions, mask = rollout(model, rows, MAX_NEW_TOKENS, toy.EOS, temperature, generator)
    right = is_right(completions.cpu().numpy(), np.concatenate([d["answers"] for d in sets.values()]))
    length = mask.sum(1).cpu().numpy()
    ends = np.cumsum([len(d[prompts]) for d in sets.values()])[:-1]
    return tuple({k: float(x.mean()) for k, x in zip(sets, np.split(values, ends))} for values in (right, length))


def measure(model, sets, sampled=False, **kw):
    """Greedy accuracy on every new skill in `sets` and the mean over the prior ones; on request at temperature 1 as well."""
    row = {}
    for temperature, suffix in [(0.0, ""), (1.0, "_sampled")][: 1 + sampled]:
        accuracy, _ = evaluate(model, sets, temperature=temperature, **kw)
        row |= {k + suffix: v for k, v in accuracy.items() if k in toy.NEW}
        row["prior" + suffix] = float(np.mean([v for k, v in accuracy.items() if k in toy.PRIOR]))
    return row


# --- Files, log and figure ------------------------------------------------------------------------------------------


def pick_device(name):
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except Exception:  # every backend has its own
        sys.exit(f"error: --device {name} is not available with this torch {torch.__version__}; leave the flag out, or use cpu")


def save(model, path, config=None):
    write_atomically(path, lambda tmp: torch.save({"config": config, "model": model.state_dict()}, tmp))


def base_config(seed, steps, world="skills", n_embd=MODEL["n_embd"]):
    """What a base was made from: its settings, and the code of the world, the model and the pretraining."""
    code = fingerprint(inspect.getsource(toy), inspect.getsource(sys.modules[GPT.__module__]), inspect.getsource(pretrain))
    return {**MODEL, "n_embd": n_embd, "world": world, "seed": seed, "steps": steps, "code": code}


def fingerprint(*sources):
    """A number that changes with the code, but not with its comments and docstrings."""
    trees = [ast.parse(source) for source in sources]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    return zlib.crc32("".join(map(ast.dump, trees)).encode())


def load_base(path, device, *what):
    """The base in `path`, or None where there is none that was made from the same; `what` as for `base_config`."""
    if not path.exists():
        return None
    config = base_config(*what)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["config"] != config:
            print(f"{path} was made with other settings or code: pretraining again")
            return None
        model = GPT(GPTConfig(**MODEL | {"n_embd": config["n_embd"]}))
        model.load_state_dict(saved["model"])
    except Exception:  # whatever a damaged file makes torch.load raise
        sys.exit(f"error: {path} is damaged or not a base of this program; delete it to pretrain again")
    return model.to(device)


class Log:
    """A line on the screen and in metrics.jsonl now and then. The loss is the mean since the line before, tokens are answer
    tokens, the time left is the phase's."""

    def __init__(self, path):
        self.file = open(path, "w")

    def begin(self, phase, steps, lines):
        self.phase, self.steps, self.lines = phase, steps, lines
        self.done = self.done_before = self.tokens = self.loss = 0
        self.start = self.last = time.perf_counter()

    def step(self, loss, tokens, skill=None, evaluate=None):
        self.done += 1
        self.tokens += tokens
        self.loss += loss
        if self.done * self.lines // self.steps == (self.done - 1) * self.lines // self.steps:
            return
        seconds, steps = time.perf_counter() - self.last, self.done - self.done_before
        row = {"phase": self.phase, "skill": skill, "step": self.done, "loss": self.loss / steps}
        row |= {"tokens_per_s": self.tokens / seconds, "ms_per_step": 1000 * seconds / steps}
        row |= evaluate() if evaluate else {}
        self.last, self.done_before, self.tokens, self.loss = time.perf_counter(), self.done, 0, 0  # evaluating is not counted
        left = (self.last - self.start) / self.done * (self.steps - self.done)
        print(json.dumps(row), file=self.file, flush=True)
        accuracy = f"new {row[skill]:.2f}  prior {row['prior']:.2f}  " if evaluate else ""
        print(
            f"{self.phase:8} {skill or ' '} {self.done:5}/{self.steps}  loss {row['loss']:6.3f}  {accuracy}"
            f"{row['tokens_per_s']:6.0f} tok/s  {row['ms_per_step']:4.0f} ms/step  {left:3.0f} s left",
            flush=True,
        )


COLUMNS = [*toy.NEW, "prior"]


def print_table(results):
    arms = ("sft", "sdft")
    for suffix, how in (("", "greedy"), ("_sampled", "sampled at temperature 1")):
        columns = [c + suffix for c in COLUMNS] + ["length"] * (not suffix)  # the length is that of greedy responses
        print(f"\naccuracy on unseen inputs, {how}; the prior skills are never trained on")
        print(" " * 8 + "".join(f"{arm.upper():>14}".ljust(7 * len(columns) + 3) for arm in arms).rstrip())
        print("after   " + "   ".join("".join(f"{c.removesuffix(suffix):>7}" for c in columns) for _ in arms))
        for stage in range(-1, len(toy.NEW)):
            rows = [results["base"] if stage < 0 else results[arm][stage] for arm in arms]
            cells = ("".join(f"{r[c]:7.2f}" if c in r else " " * 7 for c in columns) for r in rows)
            print(f"{rows[0].get('after', 'base'):8}" + "   ".join(cells))


def print_examples(models, test, names="XYZAB", row=1):
    """One unseen prompt of a few skills, with everyone's greedy answer; the teacher is the base with the demonstration."""
    print("\nprompt    demonstration  right   " + "".join(f"{m:7}" for m in models) + "teacher")
    for name in names:
        data = {k: v[row : row + 1] for k, v in test[name].items()}
        say = lambda model, key: toy.decode(rollout(model, data[key], MAX_NEW_TOKENS, toy.EOS, temperature=0)[0][0].tolist())
        replies = [say(m, "prompts") for m in models.values()] + [say(models["base"], "teacher_prompts")]
        head = [toy.decode(data[k][0]) for k in ("prompts", "demonstrations", "answers")]
        print(f"{head[0]:10}{head[1]:15}{head[2]:8}" + "".join(f"{r:7}" for r in replies))
    print()


def draw(results, path):
    """The figure of accuracy over the stages, SFT beside SDFT; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: it needs matplotlib (pip install matplotlib)")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    colours = dict(zip(COLUMNS, ["tab:blue", "tab:orange", "tab:green", "black"]))
    for panel, arm in zip(panels, ("sft", "sdft")):
        rows = [results["base"], *results[arm]]
        for c in COLUMNS:
            label = "prior skills" if c == "prior" else f"skill {c}"
            panel.plot([r[c + "_sampled"] for r in rows], "--o" if c == "prior" else "-o", color=colours[c], label=label)
        panel.set_xticks(range(4), ["base", *(f"after {r['after']}" for r in results[arm])])
        panel.set(title=arm.upper(), ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on unseen inputs,\nsampled at temperature 1")
    panels[1].legend(loc="lower right")
    figure.tight_layout()
    write_atomically(path, lambda tmp: figure.savefig(tmp, format="png", dpi=150))
    plt.close(figure)
    return [path.name]


def report(folders):
    """Every run, then mean ± standard deviation. "own": a skill at the end of its own stage; "end": after the last stage."""
    own = lambda rows, key: [r[r["after"] + key] for r in rows]
    mean_end = lambda rows, key: np.mean([rows[-1][c + key] for c in toy.NEW])
    of_base = {c: lambda base, c=c: base[c] for c in COLUMNS + ["teacher"]}
    of_base["XYZ, sampled"] = lambda base: np.mean([base[f"{c}_sampled"] for c in toy.NEW])
    of_stages = {
        **{f"own {c}": lambda rows, i=i: own(rows, "")[i] for i, c in enumerate(toy.NEW)},
        "own, sampled": lambda rows: np.mean(own(rows, "_sampled")),
        **{f"end {c}": lambda rows, c=c: rows[-1][c] for c in COLUMNS},
        "end XYZ": lambda rows: mean_end(rows, ""),
        "end XYZ, sampled": lambda rows: mean_end(rows, "_sampled"),
        "end prior, sampled": lambda rows: rows[-1]["prior_sampled"],
    }
    # runs that differ in anything else are not seeds of one another: they are named by their folders and not averaged
    settings = lambda config: {k: v for k, v in config.items() if k not in ("seed", "out_dir", "device", "threads", "torch")}
    runs = []
    for folder in folders:
        try:
            run = json.loads((folder / "results.json").read_text())
            parts = [("base", of_base), ("sft", of_stages), ("sdft", of_stages)]
            runs.append({part: [float(metric(run[part])) for metric in metrics.values()] for part, metrics in parts})
            runs[-1] |= {"label": f"seed {run['config']['seed']}", "folder": str(folder), "config": settings(run["config"])}
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            sys.exit(f"error: there is no readable results.json in {folder}; --report takes --out_dir of finished runs")
    alike = all(run["config"] == runs[0]["config"] for run in runs)
    for part, metrics in parts:
        print(f"\n| {part.upper()} | " + " | ".join(metrics) + " |\n" + "|---" * (len(metrics) + 1) + "|")
        for run in runs:
            print(f"| {run['label' if alike else 'folder']} | " + " | ".join(f"{v:.2f}" for v in run[part]) + " |")
        if alike and len(runs) > 1:
            values = [run[part] for run in runs]
            spread = zip(np.mean(values, 0), np.std(values, 0, ddof=1))
            print("| mean ± sd | " + " | ".join(f"{m:.2f} ± {s:.2f}" for m, s in spread) + " |")


if __name__ == "__main__":
    try:
        main()
    except (OSError, FloatingPointError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; a finished base is kept in --out_dir and is reused by the next run")
