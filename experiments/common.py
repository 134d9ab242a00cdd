"""What the experiments share: bases, training and metrics.

Accuracies are those of responses sampled at temperature 1 on unseen inputs, unless a metric says greedy: a greedy answer is right as soon as
it is the likeliest, which a half-known skill's already is in the base. "prior" is the mean over the eight prior skills.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch

import train_toy
from data import toy
from sdft import completion_logits, rollout, sdft_loss
from train_toy import MAX_NEW_TOKENS, Log, base_config, evaluate, fine_tune, head, load_base, pretrain, save

PRETRAIN_STEPS = {"skills": 3200, "facts": 2800}
options = argparse.Namespace(out_dir=Path("out/experiments"), quick=False)  # of the process, see runner.py


# --- Bases and training ---------------------------------------------------------------------------------------------


def base(seed, world="skills", n_embd=train_toy.MODEL["n_embd"]):
    """The pretrained base of a seed, from its file or made now."""
    what = (seed, 20 if options.quick else PRETRAIN_STEPS[world], world, n_embd)
    path = options.out_dir / "bases" / f"{world}-{n_embd}-seed{seed}.pt"
    device = torch.device("cpu")
    model = load_base(path, device, *what)
    if model is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        model = pretrain(seed, what[1], device, Log(path.with_suffix(".jsonl")), world, n_embd)
        save(model, path, base_config(*what))
    return model


def skill(name, split, seed, style="expert", n=400):
    """The first n rows of a skill's data."""
    return head(toy.skill(name, split, seed, style), 20 if options.quick else n)


def train(student, data, seed, method, lr, steps, style="expert", **kw):
    """`fine_tune` a copy of `student`; returns it and its teacher. `style` has gone into the data."""
    student = copy.deepcopy(student)
    teacher = fine_tune(student, data, method, lr, min(steps, 3) if options.quick else steps, seed=seed, **kw)
    return student, teacher


def train_on_skill(student, seed, settings, name="X"):
    """A copy of `student`, taught one skill from demonstrations in the settings' style; without settings the student itself."""
    if not settings:
        return student
    return train(student, skill(name, "train", seed, settings.get("style", "expert")), seed, **settings)[0]


def train_to_match(other, student, seed, settings, name="X", every=5):
    """`train_on_skill`, stopped as soon as the student is as accurate on validation inputs as `other` is, looked at every few updates.
    Returns the student and the number of updates."""
    student, done = copy.deepcopy(student), 0
    accuracy = lambda model: evaluate(model, {name: skill(name, "val", seed)}, temperature=1.0)[0][name]
    target = accuracy(other)

    def look(loss, tokens):
        nonlocal done
        done += 1
        return done % every == 0 and accuracy(student) >= target

    settings = settings | ({"steps": 3} if options.quick else {})
    data = skill(name, "train", seed, settings.pop("style"))
    fine_tune(student, data, seed=seed, on_step=look, **settings)
    return student, done


# --- Metrics --------------------------------------------------------------------------------------------------------


def skill_metrics(model, seed, name="X", split="test", is_right=toy.is_right):
    """Accuracy on a new skill and on the prior ones, sampled and greedy, and the length of the new skill's responses in tokens."""
    sets = {k: skill(k, split, seed, n=400 if k == name else 100) for k in [*toy.PRIOR, name]}
    sampled, length = evaluate(model, sets, temperature=1.0, is_right=is_right)
    greedy, _ = evaluate(model, sets, is_right=is_right)
    prior = lambda accuracy: float(np.mean([accuracy[k] for k in toy.PRIOR]))
    return {
        "new": sampled[name], "prior": prior(sampled), "new greedy": greedy[name], "prior greedy": prior(greedy), "length": length[name],
    }  # fmt: skip


def validation(model, seed, is_right=toy.is_right):
    """What settings are chosen by: `skill_metrics` on validation inputs."""
    metrics = skill_metrics(model, seed, split="val", is_right=is_right)
    return {"val new": metrics["new"], "val prior": metrics["prior"]}


@torch.no_grad()
def kl_to_base(base, model, prompts, model_prompts=None, seed=0):
    """KL(model ‖ base) between whole responses, in nats per response: sampled from the model, at every token the sum over the vocabulary
    (chain rule). `model_prompts` are what the model reads where it is not what the base reads."""
    model_prompts = prompts if model_prompts is None else model_prompts
    y, mask = rollout(model, model_prompts, MAX_NEW_TOKENS, toy.EOS, generator=torch.Generator().manual_seed(seed))
    logits, base_logits = completion_logits(model, model_prompts, y), completion_logits(base, prompts, y)
    return sdft_loss(logits, base_logits, mask)[1]["kl"].sum(1).mean().item()
