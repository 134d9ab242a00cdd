"""Three gradients for one loss, against the exact one.

The paper compares them in App. A.1: the sampled token, the analytic sum over the vocabulary at
every token (which it uses), and a Rao-Blackwellised one. The analytic one treats the response as
fixed: less noise, but biased for the KL between whole responses, Eq. (1).

    python -m experiments.estimators --seeds 5

Responses of the toy can be enumerated, so the exact gradient of Eq. (1) is known: of 8 prompts of
skill X, responses of at most three tokens. An estimate is one response to each of the 8 prompts,
with the base as student and teacher. "bias" is the length of the mean estimate's error, "noise" the
standard deviation of an estimate around its mean, both in lengths of the exact gradient; "cosine"
is the angle's between the mean estimate and the exact gradient. The mean of "analytic" is taken
exactly as well, that of the others over 500 estimates, whose remaining error is "bias error".
"""

import torch

from data import toy
from experiments import common, runner, verdicts
from experiments.common import base, first_rows, skill
from sdft import completion_logits, rollout

PROMPTS, TOKENS = 8, 3
ARMS = {k: dict(name=k) for k in ("analytic", "sampled token", "Rao-Blackwellised")}
COLUMNS = ["bias", "bias error", "noise", "cosine"]
WORLDS = [("skills",)]


def measure(seed, name):
    model, data = base(seed), first_rows(skill("X", "train", seed), PROMPTS)
    weights = [*model.parameters()]
    gradient = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    exact = gradient(exact_loss(model, data))
    generator, draws = torch.Generator().manual_seed(seed), 20 if common.options.quick else 500
    total, squares = torch.zeros_like(exact), 0.0
    for _ in range(draws):
        estimate = gradient(surrogate(model, data, generator, name)) - exact
        total += estimate
        squares += estimate.square().sum().item()
    error, size = total / draws, exact.norm().item()
    variance = (squares - draws * error.square().sum().item()) / (draws - 1)
    if name == "analytic":
        error = gradient(expected_analytic_loss(model, data)) - exact
    cosine = torch.cosine_similarity(error + exact, exact, 0).item()
    return {
        "bias": error.norm().item() / size,
        "bias error": 0.0 if name == "analytic" else (variance / draws) ** 0.5 / size,
        "noise": variance**0.5 / size,
        "cosine": cosine,
    }


def surrogate(model, data, generator, name):
    """A loss whose gradient is the estimate: one response to each prompt."""
    prompts, teacher_prompts = data["prompts"], data["teacher_prompts"]
    y, mask = rollout(model, prompts, TOKENS, toy.EOS, generator=generator)  # (B, C)
    log_p, log_q = both_roles(model, prompts, teacher_prompts, y)  # (B, C, V)
    said = log_p.gather(2, y[:, :, None])[:, :, 0]  # (B, C)
    kl = (log_p.exp() * (log_p - log_q)).sum(2) * mask  # (B, C), analytic
    reward = (log_q - log_p).gather(2, y[:, :, None])[:, :, 0].detach() * mask  # (B, C)
    if name == "analytic":
        return kl.sum(1).mean()
    if name == "sampled token":  # REINFORCE: a token answers for itself and for what comes after it
        to_go = reward.flip(1).cumsum(1).flip(1)
        return -(said * to_go).sum(1).mean()
    # The token's own term is summed over the vocabulary, the KL of what comes after it is sampled.
    after = kl.detach().flip(1).cumsum(1).flip(1) - kl.detach()
    return (kl + said * after * mask).sum(1).mean()


def both_roles(model, prompts, teacher_prompts, y):
    with torch.no_grad():
        log_q = completion_logits(model, teacher_prompts, y).log_softmax(-1)
    return completion_logits(model, prompts, y).log_softmax(-1), log_q


def tree(model, prompt, teacher_prompt):
    """Of one prompt: P(prefix) and the KL at its next token, for all prefixes of every length.

    A list over lengths t = 0 ... TOKENS - 1 of pairs (V, ..., V), t dimensions each. A prefix that
    has ended has no next token: its KL is 0.
    """
    V = len(toy.VOCAB)
    y = torch.cat(
        [
            torch.cartesian_prod(*[torch.arange(V)] * (TOKENS - 1)),
            torch.full((V ** (TOKENS - 1), 1), toy.EOS),
        ],
        1,
    )
    log_p, log_q = both_roles(model, [prompt] * len(y), [teacher_prompt] * len(y), y)
    kl = (log_p.exp() * (log_p - log_q)).sum(2)  # (V^(C-1), C)
    levels, reach = [], torch.ones(())
    for t in range(TOKENS):
        # The prefix of t tokens stands in every row that goes on from it: take the first of those.
        rows = torch.arange(0, len(y), V ** (TOKENS - 1 - t))
        levels.append((reach, kl[rows, t].reshape([V] * t)))
        goes_on = torch.ones(V).index_fill(0, torch.tensor(toy.EOS), 0.0)
        p = log_p[rows, t].exp().reshape([V] * t + [V])
        reach = reach[..., None] * p * goes_on
    return levels


def exact_loss(model, data):
    """Eq. (1), KL(student ‖ teacher) of whole responses by the chain rule, mean of prompts."""
    rows = zip(data["prompts"], data["teacher_prompts"])
    losses = [sum((p * kl).sum() for p, kl in tree(model, *row)) for row in rows]
    return torch.stack(losses).mean()


def expected_analytic_loss(model, data):
    """The loss whose gradient is the analytic estimator's mean: P(prefix) is fixed."""
    rows = zip(data["prompts"], data["teacher_prompts"])
    losses = [sum((p.detach() * kl).sum() for p, kl in tree(model, *row)) for row in rows]
    return torch.stack(losses).mean()


def claims(at):
    names = ("analytic", "sampled token", "Rao-Blackwellised")
    analytic, sampled, rao = (at(name, "noise") for name in names)
    yield (
        "the analytic gradient is less noisy than the sampled token's (noise)",
        "analytic best (App. A.1)",
        verdicts.against(analytic, sampled),
        verdicts.more(sampled, analytic),
    )
    yield (
        "it is biased for Eq. (1) (length of the bias; 1 = the exact gradient's)",
        "yes (App. A.1)",
        runner.mean_and_spread(at("analytic", "bias")),
        verdicts.more(at("analytic", "bias"), 0 * analytic),
    )
    yield (
        "Rao-Blackwellising brings less noise than the analytic gradient has (noise)",
        "no measurable gain",
        verdicts.against(rao, analytic),
        verdicts.more(analytic, rao),
    )


if __name__ == "__main__":
    runner.main("estimators")
