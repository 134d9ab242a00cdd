"""What the experiments share: bases, training and metrics.

Accuracies are those of greedy answers to unseen inputs, as in the paper; "sampled" are those of
responses at temperature 1. "new" is the skill that is learned, "prior" the mean over the eight
prior skills.
"""

import argparse
import copy
import functools
import zlib
from pathlib import Path

import numpy as np
import torch

from data import toy
from data.files import write_tensors
from experiments import worlds
from model import GPT, GPTConfig
from sdft import clip_and_step, completion_logits, distill_loss, rollout, sft_loss
from train_toy import MODEL, adamw, evaluate, fine_tune, pretrain, set_learning_rate, sft

BATCH_SIZE = 32
ROOT = Path(__file__).parent.parent
MADE_BY = [ROOT / p for p in ("model.py", "train_toy.py", "data/toy.py", "experiments/worlds.py")]
# Of this process: the command line's options, which runner.py fills in.
options = argparse.Namespace(out_dir=Path("out/experiments"), quick=False)


# --- Bases ---------------------------------------------------------------------------------------


def base(seed, world="skills", **sizes):
    """The pretrained base of a seed, from its file or made now. `sizes` are those of MODEL."""
    sizes, (draw_batch, steps) = MODEL | sizes, worlds.WORLDS[world]
    steps = 5 if options.quick else steps
    config = sizes | {"world": world, "seed": seed, "steps": steps, "code": code_of(MADE_BY)}
    name = f"{world}-{sizes['n_layer']}x{sizes['n_embd']}-seed{seed}.pt"
    path = options.out_dir / "bases" / name
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**sizes))
    saved = torch.load(path, weights_only=True) if path.exists() else {"config": None}
    if saved["config"] == config:
        model.load_state_dict(saved["model"])
        return model
    print(f"pretraining a base: {path}", flush=True)
    learn = pretrain_on_targets if world == "search" else pretrain
    for _ in learn(model, functools.partial(draw_batch, seed=seed), seed, steps):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"config": config, "model": model.state_dict()})
    return model


def pretrain_on_targets(model, draw_batch, seed, steps):
    """As train_toy.pretrain, of a world that tells which tokens of its answers are targets."""
    lr, rng = 2e-3, np.random.default_rng([seed, 1])
    optimizer = adamw(model, lr, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(1, steps + 1):
        set_learning_rate(optimizer, lr, step, steps, warmup=50)
        prompts, answers, is_target = draw_batch(rng, 64)
        tokens, mask = torch.from_numpy(answers), torch.from_numpy(is_target)
        loss = sft_loss(completion_logits(model, prompts, tokens), tokens, mask)
        loss.backward()
        clip_and_step(model, optimizer, loss.item())
        yield step, loss.item()


def code_of(paths):
    """A number that changes with the content of files."""
    return zlib.crc32(b"".join(path.read_bytes() for path in paths))


# --- Training ------------------------------------------------------------------------------------


def skill(name, split, seed, style="expert", n=400, world="skills"):
    """The first n rows of a skill's data, see `toy.skill`."""
    data = toy.skill(name, split, seed, style, worlds.N_DIGITS[world])
    return worlds.first_rows(data, min(n, 10) if options.quick else n)


def training(student, data, seed, *, style=None, teacher=None, **settings):
    """A copy of the student, its teacher, and its updates, to be iterated over: (step, loss).

    The settings are those of `fine_tune`. Without a teacher among them it is another copy of the
    student; `style` is that of the data.
    """
    student = copy.deepcopy(student)
    teacher = teacher or copy.deepcopy(student).requires_grad_(False)
    if options.quick:
        settings["steps"] = min(settings["steps"], 3)
    settings = dict(batch_size=BATCH_SIZE, seed=seed) | settings
    return student, teacher, fine_tune(student, teacher, data, **settings)


def train(student, data, seed, **settings):
    """A copy of the student after all its updates, and its teacher."""
    student, teacher, updates = training(student, data, seed, **settings)
    for _ in updates:
        pass
    return student, teacher


def train_on_skill(student, seed, settings, name="X", **of_skill):
    """`train` on one skill, in the settings' style; without settings nothing is learned."""
    if not settings:
        return student, student
    data = skill(name, "train", seed, settings["style"], **of_skill)
    return train(student, data, seed, **settings)


def teacher_texts(start, data, seed):
    """The teacher's responses to the training prompts (n, C), drawn once."""
    generator, n = torch.Generator().manual_seed(seed), data["answers"].shape[1] + 1
    drawn, _ = rollout(start, data["teacher_prompts"], n, toy.EOS, generator=generator)
    return {"teacher's": drawn.numpy()}


def on_texts(student, teacher, batch, generator, texts="teacher's", divergence="reverse"):
    """SDFT's loss on responses that were drawn before the training, offline."""
    tokens = torch.from_numpy(batch[texts])  # (B, C)
    is_end = tokens == toy.EOS
    mask = is_end.cumsum(1) - is_end.long() == 0  # up to and including the first end token
    contexts = batch["prompts"], batch["teacher_prompts"]
    return distill_loss(student, teacher, *contexts, tokens, mask, divergence)[0]


def sft_on_texts(student, teacher, batch, generator, texts="teacher's"):
    """SFT on responses that were drawn before the training."""
    return sft(student, teacher, batch | {"demonstrations": batch[texts]}, generator)


# --- Metrics -------------------------------------------------------------------------------------


def measure(
    seed, settings=None, name="X", n=400, world="skills", lenient=False, spoiled=None, **size
):
    """What most experiments do: a base learns one skill, and is asked what it knows.

    n        demonstrations
    lenient  an answer counts if its last token does, with its steps or without
    spoiled  (kind, share) of the demonstrations, see worlds.spoil
    size     of the base, see MODEL

    "teacher" is the final teacher's accuracy with a demonstration, "teacher, training" that with
    the training's demonstrations.
    """
    start = student = teacher = base(seed, world, **size)
    style = settings["style"] if settings else "expert"
    data = skill(name, "train", seed, style, n, world)
    data = worlds.spoil(data, *spoiled, seed) if spoiled else data
    if settings:
        data |= teacher_texts(start, data, seed)
        student, teacher = train(start, data, seed, **settings)
    rule = dict(is_correct=worlds.is_last_correct) if lenient else {}
    metrics = skill_metrics(student, start, seed, name, world=world, **rule)
    metrics["teacher, training"] = accuracy(teacher, data, "teacher_prompts", **rule)
    test = skill(name, "test", seed, style, world=world)
    return metrics | {"teacher": accuracy(teacher, test, "teacher_prompts", **rule)}


def accuracy(model, data, reads="prompts", **rule):
    """Greedy accuracy on one set of data, when the model reads its prompts or teacher_prompts."""
    return evaluate(model, {"": data}, reads, **rule)[0][""]


def skill_metrics(model, start, seed, name="X", is_correct=toy.is_correct, world="skills"):
    """What a model knows of a new skill and of the prior ones, and how far it is from the start.

    "length" is that of the new skill's greedy answers, in tokens; "prior A" is one skill's
    accuracy. "KL" is KL(model ‖ start) on the new skill's prompts, "KL forward" KL(start ‖ model),
    both in nats per response. "val" are accuracies on validation inputs, by which settings are
    chosen.
    """
    sizes = {k: 50 for k in toy.PRIOR} | {name: 400}
    test = {k: skill(k, "test", seed, n=n, world=world) for k, n in sizes.items()}
    val = {k: skill(k, "val", seed, n=n // 2, world=world) for k, n in sizes.items()}
    greedy, length = evaluate(model, test, is_correct=is_correct)
    sampled, _ = evaluate(model, test, temperature=1.0, is_correct=is_correct)
    on_val, _ = evaluate(model, val, is_correct=is_correct)
    metrics = {"new": greedy[name], "prior": prior_of(greedy), "length": length[name]}
    metrics |= {f"prior {k}": greedy[k] for k in toy.PRIOR}
    metrics |= {"sampled": sampled[name], "prior sampled": prior_of(sampled)}
    metrics |= {"val new": on_val[name], "val prior": prior_of(on_val)}
    kls = {"KL": kl(model, start, test[name]), "KL forward": kl(start, model, test[name])}
    return metrics | kls


def prior_of(accuracies):
    """The mean over the prior skills."""
    return np.mean([accuracies[k] for k in toy.PRIOR])


@torch.no_grad()
def kl(p, q, data, p_reads="prompts", seed=0):
    """KL(p ‖ q) of two models' responses to prompts, in nats per response.

    The responses are sampled from p; at every token the sum is over the vocabulary (chain rule).
    `p_reads` is the key of what p reads; q reads the prompts.
    """
    prompts, n = data[p_reads], data["answers"].shape[1] + 1
    generator = torch.Generator().manual_seed(seed)
    completions, mask = rollout(p, prompts, n, toy.EOS, generator=generator)
    _, info = distill_loss(p, q, prompts, data["prompts"], completions, mask)
    return info["divergence"].sum(1).mean().item()
