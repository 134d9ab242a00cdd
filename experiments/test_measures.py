"""What the experiments measure: right answers, losses and gradients, each by an oracle.

A lookup table in a model's place, correct on prompts that a test chooses, has known scores; a tiny
model's responses can all be enumerated.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import train_toy
from data import toy
from experiments import (
    cold_start,
    common,
    context,
    controls,
    demonstrations,
    estimators,
    kl,
    knowledge,
    many_stages,
    mismatch,
    on_policy,
    pareto,
    pass_at_k,
    reasoning,
    scaling,
    sequential,
    settings,
    teacher,
    teacher_weights,
)
from model import GPT, GPTConfig
from sdft import completion_logits, sdft_loss

EQUALS = toy.VOCAB.index("=")  # the last token of every prompt


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(common.options, "quick", True)


# --- Scores --------------------------------------------------------------------------------------


class LookUp(torch.nn.Module):
    """Gives the known answers with probability p and ends at once at any other prompt."""

    def __init__(self, *data, key="prompts", p=1.0):
        super().__init__()
        self.wte = torch.nn.Embedding(1, 1)  # only to have parameters and a device
        self.known, self.p = {}, p
        for d in data:
            self.known |= dict(zip(map(tuple, d[key].tolist()), d["answers"].tolist()))

    def kv_cache(self, batch_size, max_len):
        return {"tokens": torch.empty(batch_size, 0, dtype=torch.long)}

    def hidden(self, tokens, n_pad=None, cache=None):
        assert n_pad is None  # the toy's prompts in one set are equally long
        columns = range(1, tokens.size(1) + 1)
        if cache is not None:
            tokens = cache["tokens"] = torch.cat([cache["tokens"], tokens], 1)
            columns = [tokens.size(1)]  # a rollout needs the last one only
        rows = [[self.logits(row[:t]) for t in columns] for row in tokens.tolist()]
        return torch.tensor(rows)  # (B, T, V)

    def logits(self, prefix):
        logits = [-30.0] * len(toy.VOCAB)
        if EQUALS in prefix:
            end = prefix.index(EQUALS) + 1
            self.answer(logits, prefix[:end], prefix[end:])
        return logits

    def answer(self, logits, prompt, said):
        answer, n = self.known.get(tuple(prompt), []), len(said)
        p = self.p if n == 0 else 1.0
        logits[toy.EOS] = math.log(1 - p + 1e-9)
        logits[answer[n] if n < len(answer) else toy.EOS] = math.log(p)

    def lm_head(self, hidden):
        return hidden


class Table(LookUp):
    """Follows one skill's table, from whatever it has said last."""

    def __init__(self, name):
        super().__init__()
        self.table = toy.TABLES[toy.NAMES.index(name)]

    def answer(self, logits, prompt, said):
        digits, n = prompt[2:-1], len(said) + 1
        last = said[-1] if said else digits[0]
        logits[self.table[last, digits[n]] if n < len(digits) else toy.EOS] = 0.0


def of_skill(name, split="test", style="expert", n_digits=3):
    return toy.skill(name, split, 0, style, n_digits)


def taught(student, seed=0, settings=True, name="X"):
    """In place of `train_on_skill`: a copy that knows one more skill."""
    new = LookUp(of_skill(name))
    new.known |= student.known if settings else {}
    return new if settings else student


def test_skill_metrics_tell_greedy_from_sampled():
    """Greedy accuracies that are sampled, a prior mean over other skills, a KL the wrong way."""
    model, start = LookUp(of_skill("X"), *(of_skill(k) for k in "AB"), p=0.6), LookUp()
    metrics = common.skill_metrics(model, start, 0)
    assert (metrics["new"], metrics["prior"], metrics["length"]) == (1, 2 / 8, 3)
    assert metrics["sampled"] == pytest.approx(0.6, abs=0.1)
    assert metrics["prior sampled"] == pytest.approx(0.6 * 2 / 8, abs=0.04)
    # The start ends at once: with log-probability -30 it gives a digit, first or second.
    first = 0.6 * (math.log(0.6) + 30) + 0.4 * math.log(0.4)
    assert metrics["KL"] == pytest.approx(first + 0.6 * 30, rel=0.1)
    assert metrics["KL forward"] == pytest.approx(-math.log(0.4), rel=1e-3)
    other = common.skill_metrics(model, model, 0, "Y")
    assert (other["new"], other["KL"], other["KL forward"]) == (0, 0, 0)


def test_settings_are_judged_by_validation_inputs(quick):
    """Test inputs must not choose the settings."""
    on_val, on_test = LookUp(of_skill("X", "val")), LookUp(of_skill("X", "test"))
    assert common.validation(on_val, 0) == {"val new": 1, "val prior": 0}
    assert common.validation(on_test, 0) == {"val new": 0, "val prior": 0}
    assert common.skill_metrics(on_val, on_val, 0)["new"] == 0


def test_matching_stops_on_validation_inputs(monkeypatch):
    """It stops at the first look that reaches the other's accuracy, and never by test inputs."""

    def learn(student, data, on_step, steps, split, **settings):
        for update in range(1, steps + 1):
            if update == 5:
                student.known |= LookUp(of_skill("X", split)).known
            if on_step(1.0, None):
                break

    other = LookUp(of_skill("X", "val"))
    for split, updates, matched in [("val", 6, True), ("test", 8, False)]:
        arm = dict(style="expert", steps=8, split=split)
        monkeypatch.setattr(common, "fine_tune", learn)
        start = LookUp()
        assert common.train_to_match(other, start, 0, arm, every=3)[1:] == (updates, matched)
        assert not start.known  # a copy was trained


@pytest.mark.parametrize(
    "part, question, expected",
    [
        ("new", "A", {"strict": 1, "lenient": 1, "OOD": 0, "known": 0}),
        ("new", "B", {"strict": 0, "lenient": 0, "OOD": 1, "known": 0}),
        ("known", "A", {"strict": 0, "lenient": 0, "OOD": 0, "known": 0.5}),
        ("val", "A", {"strict": 0, "lenient": 0, "OOD": 0, "known": 0}),
    ],
)
def test_facts_are_scored_by_entities_and_questions(part, question, expected):
    """OOD that asks the trained question, or a score of the wrong entities."""
    metrics = knowledge.facts_metrics(LookUp(toy.facts(part, 0, question)), 0)
    assert {name: metrics[name] for name in expected} == expected


def test_lenient_needs_the_last_token_only():
    """Strict and lenient swapped, or both by the same rule."""
    data = toy.facts("new", 0)
    data["answers"][:, 0] += 1  # the first attribute is wrong
    metrics = knowledge.facts_metrics(LookUp(data), 0)
    assert (metrics["strict"], metrics["lenient"]) == (0, 1)


def test_facts_are_validated_on_other_entities(monkeypatch):
    """The second run learns and asks the validation entities, not those of the table."""

    def train(student, data, seed, **settings):
        is_val = np.array_equal(data["prompts"], toy.facts("val", 0)["prompts"])
        return LookUp(toy.facts("val" if is_val else "known", 0)), None

    monkeypatch.setattr(knowledge, "base", lambda *a: LookUp())
    monkeypatch.setattr(knowledge, "train", train)
    metrics = knowledge.measure(0, settings=settings.SDFT)
    assert (metrics["strict"], metrics["val strict"]) == (0, 1)
    assert (metrics["known"], metrics["val known"]) == (0.5, 0)


def test_known_facts_are_rehearsed_without_a_text(monkeypatch):
    """After the new facts, known ones on question A, for which the base reads the same prompt."""
    seen = []

    def step(student, teacher, optimizer, batch, generator, alpha):
        assert (student, teacher, alpha) == ("student", "base", 0)
        seen.append(batch)

    monkeypatch.setattr(knowledge, "sdft_step", step)
    monkeypatch.setattr(knowledge, "base", lambda *a: LookUp())
    monkeypatch.setattr(knowledge, "train", lambda s, data, *a, **kw: seen.append(kw) or (s, s))
    knowledge.measure(0, settings=knowledge.grid(knowledge.FAMILIES)["sdft + known at 0.0002"])
    known, new = seen[0]["known"], toy.facts("new", 0)
    assert np.array_equal(known, toy.facts("known", 0, "A")["prompts"])
    seen.clear()
    generator = torch.Generator().manual_seed(0)
    rest = dict(known=known, first=step, alpha=0)
    knowledge.and_known_step("student", "base", None, new, generator, **rest)
    assert seen[0] is new and len(seen[1]["prompts"]) == 20
    assert np.array_equal(seen[1]["teacher_prompts"], seen[1]["prompts"])
    assert {*map(tuple, seen[1]["prompts"])} <= {*map(tuple, known)}


def test_texts_are_read_where_they_belong(monkeypatch):
    """The oracle and the teacher read the text named; the base reads none."""
    base = LookUp(toy.facts("new", 0, reads="article"), key="teacher_prompts")
    for module in (knowledge, context):
        monkeypatch.setattr(module, "base", lambda *a: base)
    assert knowledge.measure(0, read="article")["strict"] == 1
    assert knowledge.measure(0)["strict"] == 0
    for text in ("article", "answer", "both"):
        assert context.measure(0, text, None)["teacher"] == (text == "article")


@pytest.mark.parametrize("text", ["answer", "article", "both"])
def test_the_named_text_teaches_the_facts(text, monkeypatch):
    """In training the teacher reads the arm's text, not another."""
    seen = []
    monkeypatch.setattr(context, "base", lambda *a: LookUp())
    monkeypatch.setattr(knowledge, "train", lambda s, data, *a, **kw: seen.append(data) or (s, s))
    [arm] = {a["text"] for name, a in context.ARMS.items() if name.startswith(text)}
    context.measure(0, arm, settings.SDFT)
    for part, data in zip(("val", "new"), seen, strict=True):
        prompts = toy.facts(part, seed=0, reads=text)["teacher_prompts"]
        assert np.array_equal(data["teacher_prompts"], prompts)


@pytest.mark.parametrize("arm, style", [(settings.SFT_OWN, "own"), (settings.SDFT, "expert")])
def test_training_gets_style_seed_and_settings(arm, style, monkeypatch):
    """Demonstrations in another style, minibatches and rollouts that ignore the seed."""
    seen = {}

    def fine_tune(student, data, step, lr, steps, batch_size, seed, on_step, **more):
        seen.update(data=data, got=dict(step=step, lr=lr, steps=steps, seed=seed, **more))
        assert batch_size == 32

    monkeypatch.setattr(common, "fine_tune", fine_tune)
    start = LookUp()
    assert common.train_on_skill(start, 3, arm, "Y") is not start
    expected = toy.skill("Y", "train", 3, style)["demonstrations"]
    assert np.array_equal(seen["data"]["demonstrations"], expected)
    assert seen["got"] | {"style": style} == {"style": style, "seed": 3} | arm


def test_the_teacher_reads_the_demonstration(quick, monkeypatch):
    """Accuracy or KL of the teacher without its demonstration."""
    base = LookUp(of_skill("X"), key="teacher_prompts")
    monkeypatch.setattr(teacher, "base", lambda *a: base)
    without, reading = (teacher.measure(0, **teacher.ARMS[arm]) for arm in ("base", "teacher"))
    assert without == {"accuracy": 0, "KL": 0}
    assert reading["accuracy"] == 1 and reading["KL"] > 1


@pytest.mark.parametrize("style, length", [("own", 5), ("short", 2)])
def test_answers_without_reasoning_count_by_result(style, length, quick, monkeypatch):
    """The bare result is correct too, and shorter; the teacher reads it as its demonstration."""
    data = of_skill("X", style=style, n_digits=5)
    data["answers"] = data["demonstrations"]
    base = LookUp(data)
    base.known |= LookUp(of_skill("X", "test", "short", 5), key="teacher_prompts").known
    monkeypatch.setattr(reasoning, "base", lambda *a: base)
    metrics = reasoning.measure(0)
    assert (metrics["new"], metrics["length"]) == (1, length)
    assert reasoning.measure(0, read="teacher_prompts") == {"new": 1, "length": 5}


def test_each_stage_starts_from_the_last(quick, monkeypatch):
    """Stages that start from the base again would know Z only."""
    monkeypatch.setattr(sequential, "base", lambda *a: LookUp())
    monkeypatch.setattr(sequential, "train_on_skill", taught)
    metrics = sequential.measure(0, **sequential.ARMS["sdft"])
    for i, (stage, name) in itertools.product(range(3), enumerate("XYZ")):
        assert metrics[f"after {'XYZ'[i]}: {name}"] == (stage <= i)
    assert metrics["own"] == metrics["X"] == metrics["Z"] == 1 and metrics["prior"] == 0


def test_many_stages_keep_the_original_teacher(quick, monkeypatch):
    """Over 13 stages, each from where the last one ended."""
    seed, cold = 3, "VUTSR"
    start, seen, students = LookUp(), [], [None]
    students[0] = start

    def train(student, data, seed, step, alpha):
        assert student is students[-1] and alpha == 0
        seen.append(toy.VOCAB[data["prompts"][0, 1]])
        step(student, "the stage's teacher")
        students.append(LookUp(*(toy.skill(k, "test", seed) for k in seen[-2:])))  # forgets others
        return students[-1], LookUp()

    def step(student, teacher):
        assert teacher is start

    monkeypatch.setattr(many_stages, "base", lambda seed: start)
    monkeypatch.setattr(many_stages, "train", train)
    metrics = many_stages.measure(seed, dict(step=step, alpha=0), original=True)
    assert "".join(seen) == "XYZMNOPQ" + cold
    assert (metrics["own"], metrics["8"], metrics["end"]) == (1, 2 / 8, 0)
    assert metrics["prior 1"] == metrics["prior 13"] == metrics["teacher"] == 0


def test_stopped_sft_matches_sdft_not_base(quick, monkeypatch):
    """The accuracy to reach is that of a trained SDFT."""
    monkeypatch.setattr(pareto, "base", lambda *a: LookUp())
    monkeypatch.setattr(pareto, "train_on_skill", taught)
    monkeypatch.setattr(pareto, "train_to_match", lambda other, *a: (other, 5, True))
    metrics = pareto.measure(0, **pareto.ARMS["sft stopped, 0.002"])
    assert (metrics["new"], metrics["updates"], metrics["matched"]) == (1, 5, True)


def test_sizes_reach_the_base(quick, monkeypatch):
    """The teacher is the base that was asked for, with a demonstration, and so are the weights."""
    asked, model = [], LookUp(of_skill("X"), key="teacher_prompts")
    monkeypatch.setattr(scaling, "base", lambda *size: asked.append(size) or model)
    metrics = scaling.measure(0, **scaling.ARMS["2 x 32, base"])
    assert asked == [(0, "skills", 2, 32)] and asked[0][1:] in scaling.WORLDS
    assert (metrics["weights"], metrics["teacher"], metrics["new"]) == (1, 1, 0)


@pytest.mark.parametrize("collapsed", [True, False])
def test_collapsed_is_below_half_the_base(collapsed, quick, monkeypatch):
    """The inverted comparison, and a teacher measured without its demonstration."""
    student = LookUp() if collapsed else LookUp(of_skill("X"))
    trained = student, LookUp(of_skill("X"), key="teacher_prompts")
    monkeypatch.setattr(teacher_weights, "base", lambda *a: LookUp(of_skill("X")))
    monkeypatch.setattr(teacher_weights, "train", lambda *a, **kw: trained)
    metrics = teacher_weights.measure(0, settings.SDFT)
    assert (metrics["collapsed"], metrics["teacher"]) == (collapsed, 1)
    assert metrics["teacher, noisy"] == 0


@pytest.mark.parametrize("seed, level, name", [(0, 0.0, "R"), (1, 0.0, "V"), (2, 0.3, "S")])
def test_a_cold_level_is_the_seeds_skill(seed, level, name, monkeypatch):
    """Trained and measured: R to V have 0, .03, .1, .3 and .6, one place further per seed."""
    monkeypatch.setattr(cold_start, "base", lambda seed: "base")
    monkeypatch.setattr(cold_start, "train_on_skill", lambda *a: a)
    monkeypatch.setattr(cold_start, "skill_metrics", lambda *a: {"trained": a[0], "of": a[1:]})
    monkeypatch.setattr(cold_start, "validation", lambda *a: {"validated": a[1:]})
    metrics = cold_start.measure(seed, level, settings.SDFT)
    assert metrics["trained"] == ("base", seed, settings.SDFT, name)
    assert metrics["of"] == ("base", seed, name) and metrics["validated"] == (seed, name)


def test_only_the_named_number_of_demonstrations_teaches(monkeypatch):
    """In the method's style; more rows than are named would be seen otherwise."""
    seen = []
    monkeypatch.setattr(demonstrations, "base", lambda *a: None)
    monkeypatch.setattr(
        demonstrations, "train", lambda s, data, *a, **kw: seen.append(data) or (s, s)
    )
    monkeypatch.setattr(demonstrations, "skill_metrics", lambda *a: {})
    monkeypatch.setattr(demonstrations, "validation", lambda *a: {})
    demonstrations.measure(1, **demonstrations.ARMS["16, sft, own style at 6e-05"])
    expected = toy.skill("X", "train", 1, "own")
    assert all(np.array_equal(seen[0][key], expected[key][:16]) for key in expected)


def test_steps_count_up_to_the_first_error():
    """A later step that is right again does not count."""
    data = of_skill("X", n_digits=5)
    wrong = {key: values.copy() for key, values in data.items()}
    wrong["answers"][:100, 1] += 10  # in letters, which is right
    for rows, step in [(slice(100, 200), 1), (slice(200, 300), 3)]:
        wrong["answers"][rows, step] = (wrong["answers"][rows, step] + 1) % 10
    assert on_policy.by_step(LookUp(wrong), data) == {"step 1": 1, "step 2": 0.75, "step 4": 0.5}
    assert on_policy.by_step(LookUp(), of_skill("X")) == {"step 1": 0, "step 2": 0}


@pytest.mark.parametrize("n_digits", [3, 5])
def test_recovering_is_following_the_own_table(n_digits):
    """From the rival's first step, A's, where that is wrong for X."""
    data, x, hits = of_skill("X", n_digits=n_digits), toy.decimals(2), []
    for digits in data["prompts"][:, 2:-1].tolist():
        last = sum(digits[:2]) % 10
        if last != x[digits[0], digits[1]]:
            for digit in digits[2:]:
                hits.append((last + digit) % 10 == x[last, digit])
                last = (last + digit) % 10
    assert on_policy.recovers(Table("X"), data) == 1 and on_policy.recovers(LookUp(), data) == 0
    assert on_policy.recovers(Table("A"), data) == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("arm", ["offline at 6e-05", "sft, offline at 6e-05", "sdft at 6e-05"])
def test_offline_responses_are_the_teachers(arm, quick, monkeypatch):
    """Responses drawn without the demonstration; offline SFT that imitates the expert."""
    seen = {}

    def train(student, data, seed, **settings):
        seen.update(data)
        return student, None

    base = LookUp(of_skill("X", "train"), key="teacher_prompts")
    monkeypatch.setattr(on_policy, "base", lambda *a: base)
    monkeypatch.setattr(on_policy, "train", train)
    on_policy.measure(0, **on_policy.ARMS[f"3 digits, {arm}"])
    assert np.array_equal(seen["samples"], seen["answers"]) and seen["samples_mask"].all()
    is_offline_sft = np.array_equal(seen["demonstrations"], seen["samples"])
    assert is_offline_sft == arm.startswith("sft, offline")


@pytest.mark.parametrize("style", ["expert", "own"])
@pytest.mark.parametrize("kind", ["wrong", "another row's", "one for all"])
def test_the_named_share_is_spoiled(kind, style):
    """Demonstrations and the teacher's prompts alike; prompts and answers stay."""
    data = toy.skill("X", "train", 0, style)
    assert np.array_equal(
        mismatch.spoiled(data, kind, 0, 0)["demonstrations"], data["demonstrations"]
    )
    for share in (0.2, 1.0):
        spoiled = mismatch.spoiled(data, kind, share, 0)
        assert spoiled["prompts"] is data["prompts"] and spoiled["answers"] is data["answers"]
        good, bad = data["demonstrations"], spoiled["demonstrations"]
        told = [[*map(toy.decode, spoiled[key])] for key in ("prompts", "teacher_prompts")]
        assert told[1] == [f"{x[:-1]}!{toy.decode(d)}=" for x, d in zip(told[0], bad)]
        changed = (good != bad).any(1)
        assert changed.mean() == pytest.approx(share, abs=0.06)
        source = {"another row's": np.roll(good, 1, 0), "one for all": good[[0] * 400]}
        assert kind == "wrong" or np.array_equal(bad[changed], source[kind][changed])
        assert {*toy.decode(bad.ravel())} <= {*("0123456789." if style == "own" else "abcdefghij.")}


# --- Losses and estimators -----------------------------------------------------------------------


@pytest.mark.parametrize("n, c, k", [(6, 0, 2), (6, 1, 1), (6, 2, 3), (5, 4, 2), (6, 6, 6)])
def test_pass_at_k_is_the_share_of_subsets(n, c, k):
    """The share of the subsets of k responses that hold a correct one, by enumeration."""
    correct = [True] * c + [False] * (n - c)
    subsets = [any(subset) for subset in itertools.combinations(correct, k)]
    assert pass_at_k.pass_at_k(n, c, k) == pytest.approx(np.mean(subsets))


def test_pass_at_k_draws_all_samples_anew(quick, monkeypatch):
    """1 - (1 - p)^k: the same 16 responses eight times would give .28 in place of .73."""
    monkeypatch.setattr(pass_at_k, "base", lambda *a: LookUp(of_skill("X"), p=0.02))
    metrics = pass_at_k.measure(0, None)
    assert metrics["pass@64"] == pytest.approx(1 - 0.98**64, abs=0.15)
    assert metrics["pass@1"] == pytest.approx(0.02, abs=0.01)


@pytest.fixture
def tiny_world(monkeypatch):
    """Four tokens, of which 0 ends a response: all of them can be enumerated."""
    monkeypatch.setattr(toy, "EOS", 0)
    monkeypatch.setattr(toy, "VOCAB", "0123")


def tiny(seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=8)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def responses(n):
    """All responses of at most n tokens."""
    for length in range(1, n + 1):
        for start in itertools.product((1, 2, 3), repeat=length - 1):
            yield from [(*start, end) for end in range(4) if end == 0 or length == n]


def log_probability(model, prompt, y):
    log_p = completion_logits(model, [prompt], torch.tensor([y]))[0].log_softmax(-1)
    return log_p[range(len(y)), y].sum()


def kl_of_responses(p, q, p_prompt, q_prompt, n):
    """Σ_y p(y) log(p(y)/q(y)), by enumeration; the gradient is p's."""
    total = 0
    for y in responses(n):
        log_p, log_q = log_probability(p, p_prompt, y), log_probability(q, q_prompt, y).detach()
        total = total + log_p.exp() * (log_p - log_q)
    return total


def test_kl_is_of_whole_responses(tiny_world):
    """Of what p reads to what q reads, whose prompts may differ."""
    p, q, p_prompt, q_prompt = tiny(1), tiny(0), [1, 2, 3], [1, 2]
    exact = kl_of_responses(p, q, p_prompt, q_prompt, 2).item()
    answers = np.zeros((2000, 1))  # so that a response has two tokens at most
    sampled = common.kl(p, q, [q_prompt] * 2000, answers, [p_prompt] * 2000)
    assert exact > 0.1 and sampled == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("arm", ["reverse", "forward", "jsd"])
def test_noise_is_of_the_arms_divergence(arm, quick, monkeypatch):
    """Each arm's noise is that of the gradient by which it was trained."""
    used, distill_loss = [], kl.distill_loss

    def noted(*inputs):
        used.append(inputs[6])
        return distill_loss(*inputs)

    monkeypatch.setattr(kl, "base", lambda seed: GPT(GPTConfig(**train_toy.MODEL | {"n_embd": 16})))
    monkeypatch.setattr(kl, "distill_loss", noted)
    kl.measure(0, **kl.ARMS[arm])
    assert used == [arm] * 4  # draws, with --quick


def test_gradient_noise_is_unbiased_with_few_draws():
    """E[variance] = sd² and E[|mean|²] - sd²/n = 1 per weight, with n = 2 draws, too."""
    n, sd = 20000, 0.5
    model = torch.nn.Linear(n, 1, bias=False)

    def loss(generator):
        return (model.weight * (1 + sd * torch.randn(1, n, generator=generator))).sum()

    assert kl.gradient_noise(model, loss, draws=2) == pytest.approx(sd**2, rel=0.05)


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])


def test_sampled_token_has_the_kls_gradient(monkeypatch):
    """Its expectation over the sampled token is the gradient of the sum over the vocabulary."""
    student, teacher_model = tiny(0), tiny(1)
    batch = {"prompts": [[1, 2]], "teacher_prompts": [[1, 2, 3]], "answers": np.zeros((1, 1))}
    logits, teacher_logits = (
        completion_logits(model, batch[key], torch.tensor([[0]]))
        for model, key in ((student, "prompts"), (teacher_model, "teacher_prompts"))
    )
    average = 0
    for token, p in enumerate(logits.softmax(-1)[0, 0].tolist()):
        drawn = torch.tensor([[token, 3]]), torch.tensor([[True, False]])  # 3 is padding
        monkeypatch.setattr(kl, "rollout", lambda *a, **kw: drawn)
        loss = kl.sampled_token_loss(student, teacher_model, batch, None)
        average = average + p * gradient(loss, student)
    exact = gradient(sdft_loss(logits, teacher_logits, torch.ones(1, 1))[0], student)
    assert_close(average, exact, rtol=1e-4, atol=1e-6)


TWO = {"prompts": [[1, 2], [2, 1]], "teacher_prompts": [[1, 2, 3], [2, 1, 3]]}


def test_exact_loss_is_the_kl_of_whole_responses(tiny_world):
    """Eq. (1) by enumeration, a mean over prompts, and its gradient; both losses have one value."""
    model = tiny(0)
    rows = zip(TWO["prompts"], TWO["teacher_prompts"])
    expected = sum(kl_of_responses(model, model, *row, estimators.TOKENS) for row in rows) / 2
    exact = estimators.exact_loss(model, TWO)
    assert_close(exact, expected)
    assert_close(estimators.expected_analytic_loss(model, TWO), expected)
    assert_close(gradient(exact, model), gradient(expected, model))


@pytest.mark.parametrize("name", [*estimators.ARMS])
def test_mean_of_an_estimator_is_what_it_claims(name, tiny_world, monkeypatch):
    """Over all responses: Eq. (1)'s gradient, or the analytic one's, which is another."""
    model, average, total = tiny(0), 0, 0
    one = {key: rows[:1] for key, rows in TWO.items()}
    for y in responses(estimators.TOKENS):
        mask = torch.arange(estimators.TOKENS)[None] < len(y)
        padded = torch.tensor([[*y] + [0] * (estimators.TOKENS - len(y))])
        monkeypatch.setattr(estimators, "rollout", lambda *a, **kw: (padded, mask))
        p = log_probability(model, one["prompts"][0], y).exp().item()
        average += p * gradient(estimators.surrogate(model, one, None, name), model)
        total += p
    exact = gradient(estimators.exact_loss(model, one), model)
    analytic = gradient(estimators.expected_analytic_loss(model, one), model)
    assert total == pytest.approx(1) and (exact - analytic).norm() > 0.01 * exact.norm()
    assert_close(average, analytic if name == "analytic" else exact)


def updated(step, student, teacher, batch, **more):
    """The step's loss and the student's weights after it, by SGD."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return step(student, teacher, optimizer, batch, None, **more), [*student.parameters()]


def by_hand(student, loss):
    grads = torch.autograd.grad(loss, [*student.parameters()])
    clip = min(1, 1 / torch.cat([g.flatten() for g in grads]).norm().item())
    return loss.item(), [p - 0.1 * clip * g for p, g in zip(student.parameters(), grads)]


ROUNDED = dict(rtol=1e-5, atol=1e-7)  # PyTorch adds 1e-6 to the norm that it clips
BATCH = {"prompts": [[1, 2], [2, 2]], "demonstrations": np.array([[3, 1, 0], [2, 2, 0]])}
BATCH |= {"prior_prompts": [[3, 1], [3, 2]], "prior_answers": np.array([[1, 1, 0], [3, 1, 0]])}


@pytest.mark.parametrize("control", ["w 0", "w 0.3", "dft", "replay"])
def test_controls_descend_their_losses(control, tiny_world):
    """Cross entropy, with the KL to the teacher, scaled by p or with answers to prior prompts."""
    student, base = tiny(0), tiny(1)

    def log_p(model, prompts, tokens):
        """(B, C, V), row by row, without padding or completion_logits."""
        rows = [model(torch.tensor([[*x, *y]]))[0, 1:-1] for x, y in zip(prompts, tokens)]
        return torch.stack(rows).log_softmax(-1)

    at = lambda log_p, tokens: log_p.gather(2, torch.as_tensor(tokens)[:, :, None])[:, :, 0]
    new = log_p(student, BATCH["prompts"], BATCH["demonstrations"])  # (B, C, V)
    said = at(new, BATCH["demonstrations"])
    of_base = log_p(base, BATCH["prompts"], BATCH["demonstrations"]).detach()
    penalty = (new.exp() * (new - of_base)).sum(2).mean()
    prior = at(
        log_p(student, BATCH["prior_prompts"], BATCH["prior_answers"]), BATCH["prior_answers"]
    )
    loss, step, more = {
        "w 0": (-said.mean(), controls.kl_penalty_step, dict(weight=0)),
        "w 0.3": (-said.mean() + 0.3 * penalty, controls.kl_penalty_step, dict(weight=0.3)),
        "dft": (-(said.exp().detach() * said).mean(), controls.dft_step, {}),
        "replay": (-(said.mean() + prior.mean()) / 2, controls.replay_step, {}),
    }[control]
    expected, before = by_hand(student, loss), [p.clone() for p in base.parameters()]
    assert_close(updated(step, student, base, BATCH, **more), expected, **ROUNDED)
    assert_close([*base.parameters()], before, rtol=0, atol=0)
    if control == "w 0":
        assert_close(updated(train_toy.sft_step, tiny(0), None, BATCH), expected, **ROUNDED)


def test_a_heavy_penalty_keeps_the_base(tiny_world):
    """Where SFT moves on and on, a student under a weight of 1000 stays beside its base."""
    moved = []
    for weight in (0, 1000):
        student = tiny(0)
        for _ in range(30):
            updated(controls.kl_penalty_step, student, tiny(0), BATCH, weight=weight)
        moved.append(kl_of_responses(student, tiny(0), [1, 2], [1, 2], 3).item())
    assert moved[1] < 0.1 * moved[0]


def test_replay_reads_right_answers_to_prior_prompts():
    """As many as asked for, none twice, of training inputs of every prior skill."""
    right = {}
    for name in toy.PRIOR:
        data = toy.skill(name, "train", 5)
        right |= dict(zip(map(toy.decode, data["prompts"]), map(toy.decode, data["answers"])))
    rows = controls.prior_rows(5, 400)
    prompts, answers = ([*map(toy.decode, rows[f"prior_{k}"])] for k in ("prompts", "answers"))
    assert len(set(prompts)) == 400 and {prompt[1] for prompt in prompts} == {*"ABCDEFGH"}
    assert [right[prompt] for prompt in prompts] == answers


def test_reinvoking_follows_sft_with_the_base_as_teacher(quick, monkeypatch):
    """On prior prompts, which the teacher reads without a demonstration."""
    start, after_sft, trained, seen = LookUp(), LookUp(), [], []

    def train(student, data, seed, step, **more):
        trained.append((student, step))
        if student is after_sft:
            step(student, "another teacher", None, data, None)
        return after_sft, None

    monkeypatch.setattr(controls, "base", lambda seed: start)
    monkeypatch.setattr(controls, "train", train)
    monkeypatch.setattr(controls, "sdft_step", lambda *a, **kw: seen.append((a, kw)))
    controls.measure(0, **controls.ARMS["sft + re-invoke at 0.0002"])
    assert trained[0] == (start, train_toy.sft_step) and len(trained) == 2
    (student, its_teacher, _, batch, _), more = seen[0]
    assert student is after_sft and its_teacher is start and more == {"alpha": 0}
    assert batch["prompts"] is batch["teacher_prompts"] is batch["prior_prompts"]


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_the_offline_step_scores_given_responses(divergence):
    """Its loss is `sdft_loss` on the samples; student and teacher move as in any step."""
    student, teacher_model = tiny(0), tiny(1)
    start = [p.clone() for p in teacher_model.parameters()]
    samples, mask = torch.tensor([[1, 0], [3, 2]]), torch.tensor([[True, False], [True, True]])
    batch = {"prompts": [[1, 2]] * 2, "teacher_prompts": [[1, 2, 3]] * 2}
    logits = [
        completion_logits(model, batch[key], samples)
        for model, key in ((student, "prompts"), (teacher_model, "teacher_prompts"))
    ]
    expected = by_hand(student, sdft_loss(*logits, mask, divergence)[0])
    batch |= {"samples": samples.numpy(), "samples_mask": mask.numpy()}
    more = dict(divergence=divergence, alpha=0.25)
    got = updated(on_policy.offline_step, student, teacher_model, batch, **more)
    assert_close(got, expected, **ROUNDED)
    for t, old, s in zip(teacher_model.parameters(), start, student.parameters()):
        assert_close(t, 0.75 * old + 0.25 * s)
