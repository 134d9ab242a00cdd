"""What the experiments measure: right answers, losses and gradients, each by an oracle.

A lookup table in a model's place, correct on prompts that a test chooses, has known scores; a tiny
model's responses can all be enumerated.
"""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from data import toy
from experiments import common, kl, knowledge, on_policy, pareto, pass_at_k, sequential, worlds
from experiments.bases import COLD_START
from experiments.conftest import Rules
from experiments.demonstrations import DEMONSTRATIONS, MISMATCH, REASONING
from experiments.search import METHODS as OF_SEARCH
from experiments.settings import SDFT, SFT_OWN
from experiments.teacher import TEACHER, TEACHER_WEIGHTS
from model import GPT, GPTConfig
from sdft import completion_logits

EQUALS = toy.VOCAB.index("=")  # the last token of every prompt


# --- Scores --------------------------------------------------------------------------------------


class LookUp(Rules):
    """Gives the known answers with probability p and ends at once at any other prompt."""

    def __init__(self, *data, key="prompts", p=1.0):
        super().__init__()
        self.known, self.p = {}, p
        for d in data:
            self.known |= dict(zip(map(tuple, d[key].tolist()), d["answers"].tolist()))

    def logits(self, prefix):
        logits, end = [-30.0] * len(toy.VOCAB), prefix.index(EQUALS) + 1
        answer, n = self.known.get(tuple(prefix[:end]), []), len(prefix) - end
        p = self.p if n == 0 else 1.0
        logits[toy.EOS] = math.log(1 - p + 1e-9)
        logits[answer[n] if n < len(answer) else toy.EOS] = math.log(p)
        return logits


def arm(experiment, name, rate=None):
    """The fields that `measure` gets of an arm."""
    [row] = [a for a in experiment.arms if a["arm"] == name and a.get("rate") == rate]
    return {k: v for k, v in row.items() if k not in ("arm", "rate", "family")}


@pytest.fixture
def trains(monkeypatch):
    """Replaces a module's base, and its training by a function of (student, data, settings)."""

    def replace(module, start, result=lambda student, *_: (student, student)):
        got = []

        def train(student, data, seed, **settings):
            got.append((student, data, settings))
            return result(*got[-1])

        for place in (common, module):
            monkeypatch.setattr(place, "base", lambda *a, **size: start, raising=False)
            monkeypatch.setattr(place, "train", train, raising=False)
        return got

    return replace


def test_skill_metrics_tell_greedy_from_sampled():
    """Greedy and sampled, of test and validation inputs; the prior mean is of all eight skills."""
    known = [("X", "test"), ("A", "test"), ("B", "test"), ("X", "val"), ("C", "val")]
    model, start = LookUp(*itertools.starmap(toy.skill, known), p=0.6), LookUp()
    metrics = common.skill_metrics(model, start, 0)
    assert (metrics["new"], metrics["prior"], metrics["length"]) == (1, 2 / 8, 3)
    assert metrics["sampled"] == pytest.approx(0.6, abs=0.1)
    assert metrics["prior sampled"] == pytest.approx(0.6 * 2 / 8, abs=0.04)
    # The start ends at once: with log-probability -30 it gives a digit, first or second.
    first = 0.6 * (math.log(0.6) + 30) + 0.4 * math.log(0.4)
    assert metrics["KL"] == pytest.approx(first + 0.6 * 30, rel=0.1)
    assert metrics["KL forward"] == pytest.approx(-math.log(0.4), rel=1e-3)
    assert (metrics["val new"], metrics["val prior"]) == (1, 1 / 8)
    test = toy.skill("X", "test")
    taught = LookUp(test, key="teacher_prompts", p=0.6)
    assert common.kl(taught, model, test, "teacher_prompts") == pytest.approx(0, abs=1e-6)


def test_training_gets_style_seed_and_settings(monkeypatch):
    """Student and teacher are copies of the start, unless the settings name a teacher."""
    seen = []
    monkeypatch.setattr(common, "fine_tune", lambda *a, **kw: seen.append((a, kw)) or iter(()))
    start = LookUp()
    student, its_teacher = common.train_on_skill(start, 3, SFT_OWN, "Y")
    (*models, data), used = seen[0]
    assert models == [student, its_teacher] and start not in models and student != its_teacher
    np.testing.assert_equal(data, toy.skill("Y", "train", 3, "own"))
    assert used | dict(style="own") == SFT_OWN | dict(batch_size=32, seed=3)
    assert common.train_on_skill(start, 3, SFT_OWN | dict(teacher=start))[1] is start


@pytest.mark.parametrize(
    "split, n, expected",
    [("val", 197, (10, True)), ("val", 195, (20, False)), ("test", 400, (20, False))],
)
def test_stopped_sft_matches_sdft_on_validation_inputs(split, n, expected, monkeypatch):
    """It ends at the first look, every 5 updates, that is as accurate as SDFT but for .02."""
    start, goal, student = LookUp(), LookUp(toy.skill("X", "val")), LookUp()

    def updates():
        for step in range(1, 21):
            if step == 6:
                student.known |= LookUp(worlds.first_rows(toy.skill("X", split), n)).known
            yield step, 1.0

    monkeypatch.setattr(pareto, "base", lambda seed: start)
    monkeypatch.setattr(pareto, "train_on_skill", lambda *a: trained.append(a) or (goal, None))
    monkeypatch.setattr(pareto, "training", lambda *a, **settings: (student, None, updates()))
    trained, fields = [], arm(pareto.PARETO, "sft stopped, 0.002")
    metrics = pareto.measure(0, **fields)
    assert (metrics["updates"], metrics["matched"]) == expected and trained == [(start, 0, SDFT)]
    assert metrics["val new"] == pytest.approx(n / 200 * (split == "val"))


@pytest.mark.parametrize(
    "part, question, expected",
    [("new", "A", (1, 1, 0, 0)), ("new", "B", (0, 0, 1, 0))]
    + [("known", "A", (0, 0, 0, 0.5)), ("val", "A", (0, 0, 0, 0)), ("wrong", "A", (0, 1, 0, 0))],
)
def test_facts_are_scored_by_entities_and_questions(part, question, expected):
    """Lenient needs the last token only: it forgives a wrong attribute."""
    data = worlds.facts("new" if part == "wrong" else part, 0, question)
    data["answers"][:, 0] += part == "wrong"
    metrics = knowledge.scores(LookUp(data), 0)
    assert tuple(metrics[name] for name in ("strict", "lenient", "OOD", "known")) == expected


def test_texts_are_read_where_they_belong(trains):
    """The oracle and the teacher read the text named, in training too."""
    base = LookUp(worlds.facts("new", 0, reads="article"), key="teacher_prompts")
    got = trains(knowledge, base)
    assert knowledge.measure(0, reads="article")["strict"] == 1
    for name, text in {"answer only": "answer", "article only": "article", "both": "both"}.items():
        metrics = knowledge.measure_context(0, **arm(knowledge.CONTEXT, name, 2e-4))
        assert metrics["teacher"] == (text == "article")
        for part, (_, data, _) in zip(("val", "new"), got[-2:], strict=True):
            expected = worlds.facts(part, seed=0, reads=text)["teacher_prompts"]
            assert np.array_equal(data["teacher_prompts"], expected)


def test_each_stage_starts_from_the_last(quick, trains):
    """Stages that start from the base again would know Z only."""

    def learn_one_more(student, data, settings):
        more = LookUp(toy.skill(toy.VOCAB[data["prompts"][0, 1]], "test"))
        more.known |= student.known
        return more, None

    trains(sequential, LookUp(), learn_one_more)
    metrics = sequential.measure(0, **arm(sequential.SEQUENTIAL, "sdft"))
    for i, j in itertools.product(range(3), repeat=2):
        assert metrics[f"after {'XYZ'[i]}: {'XYZ'[j]}"] == (j <= i)
    assert metrics["own"] == metrics["X"] == metrics["Z"] == 1 and metrics["prior"] == 0


@pytest.mark.parametrize("name", ["offline, original teacher", "sdft, EMA teacher"])
def test_many_stages_have_the_named_teacher(name, quick, trains):
    """Over 13 stages, each from where the last one ended; the student forgets all but two."""
    seed, students = 3, []
    # It reads demonstrations of two of the eight skills.
    start = LookUp(*(toy.skill(k, "test", seed) for k in "XY"), key="teacher_prompts")

    def learn(student, data, settings):
        assert student is (students or [start])[-1]
        recent = [toy.VOCAB[d["prompts"][0, 1]] for _, d, _ in got[-2:]]
        students.append(LookUp(*(toy.skill(k, "test", seed) for k in recent)))
        return students[-1], settings.get("teacher", LookUp())

    got = trains(sequential, start, learn)
    metrics = sequential.measure_many(seed, **arm(sequential.MANY_STAGES, name))
    assert "".join(toy.VOCAB[d["prompts"][0, 1]] for _, d, _ in got) == "XYZMNOPQVUTSR"
    assert (metrics["own"], metrics["8"], metrics["end"]) == (1, 2 / 8, 0)
    assert metrics["teacher"] == (2 / 8 if name == "offline, original teacher" else 0)


@pytest.mark.parametrize(
    "experiment, name, rate, expected",
    [
        (DEMONSTRATIONS, "8, sft, own style", 6e-5, ("X", "own", 3, 8)),
        (COLD_START, "0.3, sft", 2e-3, ("T", "expert", 3, 10)),
        (on_policy.ON_POLICY, "5 digits, offline", 6e-5, ("X", "expert", 5, 10)),
        (REASONING, "sdft", 2e-4, ("X", "short", 5, 10)),
        (pareto.ROTATED, "sdft", None, ("Y", "expert", 3, 10)),
        (TEACHER, "sft, own style", None, ("X", "own", 3, 10)),
        (MISMATCH, "100% wrong", None, ("X", "expert", 3, 10)),
        (pass_at_k.PASS_AT_K, "sdft, forward KL", None, ("X", "expert", 3, 10)),
    ],
)
def test_an_arm_learns_its_skill_in_its_style(experiment, name, rate, expected, quick, trains):
    """Its number of rows, at its settings; that skill is measured, of student and teacher.

    Levels of cold skills, and tables that rotate, move one place per seed. The teacher's responses
    are those of the base with the demonstration in its prompt; some arms' demonstrations are wrong.
    """
    letter, style, n_digits, n = expected
    fields = arm(experiment, name, rate)
    data, test = (toy.skill(letter, s, 1, style, n_digits) for s in ("train", "test"))
    data = worlds.first_rows(data, n)
    data = worlds.spoil(data, *fields["spoiled"], 1) if "spoiled" in fields else data
    right = LookUp(test | {"answers": test["demonstrations"]})  # says them as it was shown
    start, final = LookUp(data, key="teacher_prompts"), LookUp(data, test, key="teacher_prompts")
    module = sys.modules[experiment.measure.__module__]
    got = trains(module, start, lambda *_: (right, final))
    metrics = experiment.measure(1, **fields)
    assert metrics.get("new", metrics.get("accuracy", metrics.get("pass@1"))) == 1
    assert metrics.get("teacher", 1) == metrics.get("teacher, training", 1) == 1
    _, learned, settings = got[0]
    assert all(np.array_equal(learned[key], data[key]) for key in data)
    assert settings == fields["settings"]
    if "teacher's" in learned:
        assert np.array_equal(learned["teacher's"], data["answers"])


def test_collapsed_is_below_half_of_the_base():
    metrics = {"base": {"new": [0.4, 0.4]}, "live": {"new": [0.19, 0.21]}}
    TEACHER_WEIGHTS.derive(metrics)
    assert metrics["live"]["seeds"] == "1 of 2"


# --- Losses and estimators -----------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets():
    """The share of the subsets of k responses that hold a correct one, by enumeration."""
    for n, c, k in [(6, 0, 2), (6, 1, 1), (6, 2, 3), (5, 4, 2), (6, 6, 6)]:
        subsets = itertools.combinations([True] * c + [False] * (n - c), k)
        assert pass_at_k.pass_at_k(n, c, k) == pytest.approx(np.mean([*map(any, subsets)]))


def test_pass_at_k_draws_all_samples_anew(quick, monkeypatch):
    """1 - (1 - p)^k of the half that it knows; the same 16 responses eight times give less."""
    half = LookUp(worlds.first_rows(toy.skill("X", "test"), 5), p=0.02)
    monkeypatch.setattr(pass_at_k, "base", lambda *a: half)
    metrics = pass_at_k.measure(0)
    assert metrics["pass@64"] == pytest.approx((1 - 0.98**64) / 2, abs=0.12)
    assert metrics["pass@1"] == pytest.approx(0.01, abs=0.01) and metrics["pass@128"] <= 0.5


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


def test_gradient_noise_is_unbiased_with_few_draws():
    """E[variance] = sd² and E[|mean|²] - sd²/n = 1 per weight, with n = 2 draws, too."""
    n, sd = 20000, 0.5
    model = torch.nn.Linear(n, 1, bias=False)

    def loss(generator):
        return (model.weight * (1 + sd * torch.randn(1, n, generator=generator))).sum()

    assert kl.gradient_noise(model, loss, draws=2) == pytest.approx(sd**2, rel=0.05)


BATCH = {"prompts": [[1, 2], [2, 2]], "prior_prompts": [[3, 1], [3, 2]]}
BATCH |= {"teacher_prompts": [[1, 2, 3], [2, 2, 3]]}
BATCH |= {"demonstrations": np.array([[3, 1, 0], [2, 2, 0]])}
BATCH |= {"prior_answers": np.array([[1, 1, 0], [3, 1, 0]])}
BATCH |= {"teacher's": np.array([[1, 0, 0], [3, 1, 0]]), "base's": np.array([[2, 0, 0], [2, 1, 0]])}


def test_exact_loss_is_the_kl_of_whole_responses(tiny_world):
    """Eq. (1), Σ_y p(y) log(p(y)/q(y)), by enumeration, a mean over prompts, and its gradient."""
    model, expected = tiny(0), 0
    for prompt, teacher_prompt in zip(BATCH["prompts"], BATCH["teacher_prompts"]):
        for y in responses(kl.TOKENS):
            log_p, log_q = (log_probability(model, x, y) for x in (prompt, teacher_prompt))
            expected = expected + log_p.exp() * (log_p - log_q.detach()) / 2
    exact = kl.enumerated_loss(model, BATCH)
    assert_close(exact, expected)
    assert_close(kl.gradient(exact, model), kl.gradient(expected, model))


@pytest.mark.parametrize("name", [a["name"] for a in kl.ESTIMATORS.arms])
def test_mean_of_an_estimator_is_what_it_claims(name, tiny_world, monkeypatch):
    """Eq. (1)'s gradient, or the analytic one's, which is another: the mean over all responses.

    The losses of the same name in training are means over tokens.
    """
    model, one, average = tiny(0), worlds.first_rows(BATCH, 1), 0
    for y in responses(kl.TOKENS):
        padded = torch.tensor([[*y] + [3] * (kl.TOKENS - len(y))])  # (1, C)
        drawn = padded, torch.arange(kl.TOKENS)[None] < len(y)
        monkeypatch.setattr(kl, "rollout", lambda *a, **more: drawn)
        loss = kl.estimator(model, one, None, name)
        if name in kl.LOSSES:
            batch = one | {"answers": np.zeros((1, kl.TOKENS - 1))}
            assert_close(len(y) * kl.LOSSES[name](model, model, batch, None), loss)
        p = log_probability(model, one["prompts"][0], y).exp().item()
        average += p * kl.gradient(loss, model)
    exact = kl.gradient(kl.enumerated_loss(model, one), model)
    analytic = kl.gradient(kl.enumerated_loss(model, one, fixed_responses=True), model)
    assert (exact - analytic).norm() > 0.01 * exact.norm()
    assert_close(average, analytic if name in ("analytic", "sampled token") else exact)


def test_four_responses_are_of_the_first_quarter_of_the_prompts(monkeypatch):
    monkeypatch.setattr(kl, "sdft", lambda student, teacher, batch, generator: batch["prompts"])
    batch = {"prompts": np.arange(8)}
    assert kl.four_responses(None, None, batch, None).tolist() == [0] * 4 + [1] * 4


def test_bias_and_noise_are_of_the_estimates(quick, monkeypatch):
    """In lengths of the exact gradient: estimates that are the exact one ± 3 and + 4 elsewhere."""
    exact, off, swing = torch.diag(torch.tensor([2.0, 4.0, 3.0], dtype=torch.double))
    gradients = {"exact": itertools.repeat(exact)}
    gradients["estimate"] = itertools.cycle([exact + off + swing, exact + off - swing])
    monkeypatch.setattr(kl, "base", lambda seed: None)
    monkeypatch.setattr(kl, "gradient", lambda loss, model: next(gradients[loss]))
    monkeypatch.setattr(kl, "estimator", lambda *a: "estimate")
    monkeypatch.setattr(kl, "enumerated_loss", lambda *a: "exact")
    metrics = kl.measure_estimator(0, "REINFORCE")
    noise = 3 * (20 / 19) ** 0.5 / 2  # of 20 draws, with --quick
    expected = {"bias": 2, "bias error": noise / 20**0.5, "noise": noise, "cosine": 1 / 5**0.5}
    assert metrics == pytest.approx(expected)


def test_methods_have_their_losses(tiny_world):
    """Cross entropy: with a KL, scaled by p, with prior answers, on drawn texts; KL on those."""
    student, base = tiny(0), tiny(1)

    def log_p(model, prompts, texts):
        """(B, C, V), row by row, without padding or completion_logits."""
        rows = [model(torch.tensor([[*x, *y]])) for x, y in zip(BATCH[prompts], BATCH[texts])]
        return torch.stack([row[0, -4:-1] for row in rows]).log_softmax(-1)

    def said(prompts, texts):
        tokens = torch.as_tensor(BATCH[texts])[:, :, None]
        return log_p(student, prompts, texts).gather(2, tokens)[:, :, 0]  # (B, C)

    def both(texts):
        return log_p(student, "prompts", texts), log_p(base, "teacher_prompts", texts).detach()

    divergence = lambda p, q: (p.exp() * (p - q)).sum(2)  # (B, C)
    until_end = lambda values: (values[0, :2].mean() + values[1].mean()) / 2
    shown, prior = said("prompts", "demonstrations"), said("prior_prompts", "prior_answers")
    new, of_base = (log_p(model, "prompts", "demonstrations") for model in (student, base))
    parameters = [*student.parameters()]
    for name, expected in {
        "sft + KL, w 0.3": -shown.mean() + 0.3 * divergence(new, of_base.detach()).mean(),
        "dft": -(shown.exp().detach() * shown).mean(),
        "sft + replay": -(shown.mean() + prior.mean()) / 2,
        "sft, offline": -until_end(said("prompts", "teacher's")),
        "offline, forward KL": until_end(divergence(*reversed(both("teacher's")))),
        "stale": until_end(divergence(*both("base's"))),
    }.items():
        settings = (on_policy.FAMILIES | on_policy.CONTROLS_FAMILIES | OF_SEARCH)[name]
        more = {k: settings[k] for k in ("weight", "divergence", "texts") if k in settings}
        found = settings["method"](student, base, BATCH, None, **more)
        assert_close(found, expected)
        for gradient in torch.autograd.grad(found - expected, parameters, retain_graph=True):
            assert gradient.abs().max() < 1e-9


def test_replay_reads_right_answers_to_prior_prompts():
    """As many as asked for, none twice, of training inputs of every prior skill."""
    right = LookUp(*(toy.skill(name, "train", 5) for name in toy.PRIOR)).known
    rows = on_policy.prior_rows(5, 400)
    prompts = [*map(tuple, rows["prior_prompts"].tolist())]
    assert len({*prompts}) == 400 and {toy.VOCAB[p[1]] for p in prompts} == {*"ABCDEFGH"}
    assert [right[prompt] for prompt in prompts] == rows["prior_answers"].tolist()
