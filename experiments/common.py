"""What the experiments share: bases, training and metrics.

Accuracies are those of responses sampled at temperature 1 on unseen inputs, unless a metric says
greedy: a greedy answer is correct as soon as it is the likeliest, which a half-known skill's
already is in the base. "prior" is the mean over the eight prior skills.
"""

import argparse
import ast
import copy
import inspect
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

import model as model_file
import train_toy
from data import toy
from sdft import clip_and_step, distill_loss, ema_update, rollout
from train_toy import MAX_NEW_TOKENS, evaluate, fine_tune, pretrain, write_whole

PRETRAIN_STEPS = {"skills": 3200, "facts": 2800}
BATCHES = {"skills": toy.half_known_batch, "facts": toy.facts_batch}
# Of this process: the command line's options, which runner.py fills in.
options = argparse.Namespace(out_dir=Path("out/experiments"), quick=False)


# --- Bases ---------------------------------------------------------------------------------------


def base(seed, world="skills", n_embd=train_toy.MODEL["n_embd"]):
    """The pretrained base of a seed, from its file or made now."""
    steps = 5 if options.quick else PRETRAIN_STEPS[world]
    config = base_config(seed, steps, world, n_embd)
    path = options.out_dir / "bases" / f"{world}-{n_embd}-seed{seed}.pt"
    student = load_base(path, config)
    if student is None:
        print(f"pretraining a base: {world}, width {n_embd}, seed {seed}", flush=True)
        student = pretrain(BATCHES[world], seed, steps, torch.device("cpu"), n_embd=n_embd)
        saved = {"config": config, "model": student.state_dict()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda tmp: torch.save(saved, tmp))
    return student


def base_config(seed, steps, world, n_embd):
    """What a base is made from: its settings, and the code of world, model and pretraining."""
    made_by = [toy, model_file, pretrain, train_toy.adamw, train_toy.set_learning_rate]
    code = fingerprint(*map(inspect.getsource, made_by))
    sizes = train_toy.MODEL | {"n_embd": n_embd}
    return sizes | {"world": world, "seed": seed, "steps": steps, "code": code}


def load_base(path, config):
    """The base in `path`, or None if there is none of this configuration."""
    if not path.exists():
        return None
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not compare the file's checksums
            raise ValueError
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["config"] != config:
            print(f"{path} is of other settings or other code: pretraining again", flush=True)
            return None
        sizes = {name: config[name] for name in train_toy.MODEL}
        student = model_file.GPT(model_file.GPTConfig(**sizes))
        student.load_state_dict(saved["model"])
    except Exception:  # a damaged file makes torch.load raise almost anything
        raise ValueError(f"{path} is damaged or not a base; delete it to pretrain again") from None
    return student


def fingerprint(*sources):
    """A number that changes with the code, but not with its comments and docstrings."""
    trees = [ast.parse(source) for source in sources]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    return zlib.crc32("".join(map(ast.dump, trees)).encode())


# --- Training ------------------------------------------------------------------------------------


def first_rows(data, n):
    return {key: values[:n] for key, values in data.items()}


def skill(name, split, seed, style="expert", n=400):
    """The first n rows of a skill's data."""
    return first_rows(toy.skill(name, split, seed, style), min(n, 10) if options.quick else n)


def train(student, data, seed, step, lr, steps, style="expert", **settings):
    """`fine_tune` a copy of the student: the copy and its teacher. `style` is in the data."""
    student = copy.deepcopy(student)
    steps = min(steps, 3) if options.quick else steps
    teacher = fine_tune(student, data, step, lr, steps, seed=seed, **settings)
    return student, teacher


def train_on_skill(student, seed, settings, name="X"):
    """A copy of the student, taught one skill; without settings the student itself.

    The demonstrations are in the settings' style.
    """
    if not settings:
        return student
    data = skill(name, "train", seed, settings.get("style", "expert"))
    return train(student, data, seed, **settings)[0]


def train_to_match(other, student, seed, settings, name="X", every=5):
    """`train_on_skill`, stopped when the student is as accurate as `other` is.

    Both are measured on validation inputs, the student after every few updates. Returns the
    student and its number of updates.
    """
    validation_inputs = {name: skill(name, "val", seed)}
    target = evaluate(other, validation_inputs, temperature=1.0)[0][name]
    student, done = copy.deepcopy(student), 0

    def stop_if_matched(loss, teacher):
        nonlocal done
        done += 1
        if done % every:
            return False
        return evaluate(student, validation_inputs, temperature=1.0)[0][name] >= target

    settings = settings | ({"steps": 3} if options.quick else {})
    data = skill(name, "train", seed, settings.pop("style"))
    fine_tune(student, data, seed=seed, on_step=stop_if_matched, **settings)
    return student, done


def learn_from(loss, student, teacher, optimizer, alpha):
    """The rest of an update, for a step with a loss of its own. The loss as a float."""
    loss.backward()
    clip_and_step(student, optimizer, loss.item())
    ema_update(teacher, student, alpha)
    return loss.item()


# --- Metrics -------------------------------------------------------------------------------------


def skill_metrics(model, seed, name="X", split="test", is_correct=toy.is_correct):
    """Accuracy on a new skill and on the prior ones, sampled and greedy.

    "length" is that of the new skill's sampled responses, in tokens.
    """
    sets = {k: skill(k, split, seed, n=400 if k == name else 100) for k in [*toy.PRIOR, name]}
    sampled, length = evaluate(model, sets, temperature=1.0, is_correct=is_correct)
    greedy, _ = evaluate(model, sets, is_correct=is_correct)
    return {
        "new": sampled[name],
        "prior": float(np.mean([sampled[k] for k in toy.PRIOR])),
        "new greedy": greedy[name],
        "prior greedy": float(np.mean([greedy[k] for k in toy.PRIOR])),
        "length": length[name],
    }


def validation(model, seed, is_correct=toy.is_correct):
    """What settings are chosen by: `skill_metrics` on validation inputs."""
    metrics = skill_metrics(model, seed, split="val", is_correct=is_correct)
    return {"val new": metrics["new"], "val prior": metrics["prior"]}


@torch.no_grad()
def kl_to_base(base, model, prompts, model_prompts=None, seed=0):
    """KL(model ‖ base) between whole responses, in nats per response.

    The responses are sampled from the model; at every token the sum is over the vocabulary (chain
    rule). `model_prompts` are what the model reads, if it is not what the base reads.
    """
    model_prompts = prompts if model_prompts is None else model_prompts
    generator = torch.Generator().manual_seed(seed)
    completions, mask = rollout(model, model_prompts, MAX_NEW_TOKENS, toy.EOS, generator=generator)
    _, info = distill_loss(model, base, model_prompts, prompts, completions, mask)
    return info["divergence"].sum(1).mean().item()
