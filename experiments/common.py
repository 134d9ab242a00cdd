"""What the experiments share: worlds and bases, training and metrics.

Accuracies are those of greedy answers to unseen inputs, as in the paper; "sampled" are those of
responses at temperature 1. "new" is the skill that is learned, "prior" the mean over the eight
prior skills.
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
from train_toy import evaluate, fine_tune, limit, pretrain, write_whole

BATCH_SIZE = 32
PRETRAIN_STEPS = {"skills": 2600, "long": 2200, "facts": 2800}
LONG = 5  # digits of a prompt in the world "long"
# Of this process: the command line's options, which runner.py fills in.
options = argparse.Namespace(out_dir=Path("out/experiments"), quick=False)


# --- Worlds and bases ----------------------------------------------------------------------------


def world_batch(world):
    """The lines of a world's pretraining, as a function of (rng, n, seed)."""
    if world == "long":
        # More bare answers than in the toy's world: they are harder to use for longer chains.
        more = dict(new={"X": toy.P_OWN}, n_digits=LONG, styles=(0.66, 0.12, 0.22))
        return lambda rng, n, seed: toy.rivals_batch(rng, n, seed, **more)
    if world == "skills":
        return lambda rng, n, seed: toy.rivals_batch(rng, n, seed, toy.many_skills(seed))
    return toy.facts_batch


def base(seed, world="skills", n_layer=2, n_embd=128):
    """The pretrained base of a seed, from its file or made now."""
    steps = 5 if options.quick else PRETRAIN_STEPS[world]
    sizes = dict(n_layer=n_layer, n_embd=n_embd)
    config = base_config(seed, steps, world, sizes)
    path = options.out_dir / "bases" / f"{world}-{n_layer}x{n_embd}-seed{seed}.pt"
    student = load_base(path, config)
    if student is None:
        print(f"pretraining a base: {path.stem}", flush=True)
        student = pretrain(world_batch(world), seed, steps, torch.device("cpu"), **sizes)
        saved = {"config": config, "model": student.state_dict()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda tmp: torch.save(saved, tmp))
    return student


def base_config(seed, steps, world, sizes):
    """What a base is made from: its settings, and the code of world, model and pretraining."""
    made_by = [toy, model_file, world_batch, pretrain]
    made_by += [train_toy.adamw, train_toy.set_learning_rate]
    code = fingerprint(*map(inspect.getsource, made_by))
    more = {"world": world, "digits": LONG, "seed": seed, "steps": steps, "code": code}
    return train_toy.MODEL | sizes | more


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


def skill(name, split, seed, style="expert", n=400, world="skills"):
    """The first n rows of a skill's data."""
    n_digits = LONG if world == "long" else toy.N_DIGITS
    n = min(n, 10) if options.quick else n
    return first_rows(toy.skill(name, split, seed, style, n_digits), n)


def train(student, data, seed, step, lr, steps, style="expert", on_step=None, **settings):
    """`fine_tune` a copy of the student: the copy and its teacher. `style` is in the data."""
    student = copy.deepcopy(student)
    steps = min(steps, 3) if options.quick else steps
    teacher = fine_tune(student, data, step, lr, steps, BATCH_SIZE, seed, on_step, **settings)
    return student, teacher


def train_on_skill(student, seed, settings, name="X", world="skills", **more):
    """A copy of the student, taught one skill; without settings the student itself.

    The demonstrations are in the settings' style.
    """
    if not settings:
        return student
    data = skill(name, "train", seed, settings.get("style", "expert"), world=world)
    return train(student, data, seed, **settings, **more)[0]


def train_to_match(other, student, seed, settings, name="X", every=5):
    """`train_on_skill`, stopped when the student is as accurate as `other` is, but for 0.02.

    Both are measured on validation inputs, the student after every few updates. Returns the
    student, its number of updates, and whether it got there.
    """
    validation_inputs = {name: skill(name, "val", seed)}
    target = evaluate(other, validation_inputs)[0][name] - 0.02
    student, done, matched = copy.deepcopy(student), 0, False

    def stop_if_matched(loss, teacher):
        nonlocal done, matched
        done += 1
        if done % every == 0:
            matched = evaluate(student, validation_inputs)[0][name] >= target
        return matched

    settings = settings | ({"steps": 3} if options.quick else {})
    data = skill(name, "train", seed, settings.pop("style", "expert"))
    fine_tune(student, data, seed=seed, batch_size=BATCH_SIZE, on_step=stop_if_matched, **settings)
    return student, done, matched


def anchored(step, anchor):
    """The step with `anchor` as its teacher, in place of the one that it is given."""
    return lambda student, teacher, *rest, **settings: step(student, anchor, *rest, **settings)


def learn_from(loss, student, teacher, optimizer, alpha):
    """The rest of an update, for a step with a loss of its own. The loss as a float."""
    loss.backward()
    clip_and_step(student, optimizer, loss.item())
    ema_update(teacher, student, alpha)
    return loss.item()


# --- Metrics -------------------------------------------------------------------------------------


def skill_metrics(
    model, start, seed, name="X", split="test", is_correct=toy.is_correct, world="skills"
):
    """Accuracy on a new skill and on the prior ones, greedy and sampled, and KL to the start.

    "length" is that of the new skill's greedy answers, in tokens. "KL" is KL(model ‖ start) on
    the new skill's prompts, "KL forward" KL(start ‖ model), both in nats per response.
    """
    names = [*toy.PRIOR, name]
    sets = {k: skill(k, split, seed, n=400 if k == name else 50, world=world) for k in names}
    greedy, length = evaluate(model, sets, is_correct=is_correct)
    sampled, _ = evaluate(model, sets, temperature=1.0, is_correct=is_correct)
    return {
        "new": greedy[name],
        "prior": float(np.mean([greedy[k] for k in toy.PRIOR])),
        "sampled": sampled[name],
        "prior sampled": float(np.mean([sampled[k] for k in toy.PRIOR])),
        "length": length[name],
        "KL": kl(model, start, sets[name]["prompts"], sets[name]["answers"]),
        "KL forward": kl(start, model, sets[name]["prompts"], sets[name]["answers"]),
    }


def validation(model, seed, name="X", is_correct=toy.is_correct, world="skills"):
    """What settings are chosen by: greedy accuracy on validation inputs, new and prior."""
    names = [*toy.PRIOR, name]
    sets = {k: skill(k, "val", seed, n=200 if k == name else 25, world=world) for k in names}
    accuracy, _ = evaluate(model, sets, is_correct=is_correct)
    prior = float(np.mean([accuracy[k] for k in toy.PRIOR]))
    return {"val new": accuracy[name], "val prior": prior}


@torch.no_grad()
def kl(p, q, prompts, answers, p_prompts=None, seed=0):
    """KL(p ‖ q) of two models' responses to prompts, in nats per response.

    The responses are sampled from p; at every token the sum is over the vocabulary (chain rule).
    `p_prompts` are what p reads, if it is not what q reads.
    """
    p_prompts = prompts if p_prompts is None else p_prompts
    generator = torch.Generator().manual_seed(seed)
    completions, mask = rollout(p, p_prompts, limit(answers), toy.EOS, generator=generator)
    _, info = distill_loss(p, q, p_prompts, prompts, completions, mask)
    return info["divergence"].sum(1).mean().item()
