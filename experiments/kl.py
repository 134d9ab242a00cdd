"""Which divergence, and must it be summed over the vocabulary? Losses, and their gradients.

    python -m experiments.kl --seeds 5

kl          Skill X at SDFT's rate, sampled tokens at two more; "four responses" has 8 prompts in
            a batch, all others 32. "noise" is the variance of the gradient over rollouts of one
            minibatch, summed over the weights, as a multiple of the squared length of the mean
            gradient, at the base's weights
estimators  Four estimates of the gradient of Eq. (1), the KL between whole responses (App. A.1),
            which is known exactly where responses have at most three tokens. "bias" is the length
            of the mean estimate's error, "noise" the standard deviation of an estimate, both in
            lengths of the exact gradient; "cosine" is the angle's between the two. The mean of
            "analytic" is exact, the others' is over 200 estimates and off by "bias error"

README.md, "The divergence" and "The estimators".
"""

import numpy as np
import torch

from data import toy
from experiments import common, runner
from experiments.common import base, skill, skill_metrics, train
from experiments.settings import LOW, RATES, SDFT, SDFT_FORWARD, SDFT_JSD, grid
from experiments.worlds import first_rows
from sdft import completion_logits, rollout
from train_toy import sdft


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])


def at_tokens(values, tokens):
    """Of values (B, C, V) those of the tokens (B, C)."""
    return values.gather(2, tokens[:, :, None])[:, :, 0]


def both_roles(student, teacher, data, y):
    """log p of the student and log q of the teacher, (B, C, V) each, of responses y (B, C)."""
    with torch.no_grad():
        log_q = completion_logits(teacher, data["teacher_prompts"], y).log_softmax(-1)
    return completion_logits(student, data["prompts"], y).log_softmax(-1), log_q


# --- Which divergence ----------------------------------------------------------------------------


def sampled_token(student, teacher, batch, generator, with_later_tokens=False):
    """The reverse KL estimated from the sampled tokens: -(log q - log p) log p, the first detached.

    As in App. A.1 a token answers for its own log ratio, and the gradient is on average that of
    Eq. (2): Σ_v p log(p/q) ∇log p = ∇ Σ_v p log(p/q). With those of the tokens after it, this is
    REINFORCE on the implicit reward, and the gradient that of Eq. (1).
    """
    n = batch["answers"].shape[1] + 1
    y, mask = rollout(student, batch["prompts"], n, toy.EOS, generator=generator)  # (B, C)
    log_p, log_q = (at_tokens(log, y) for log in both_roles(student, teacher, batch, y))  # (B, C)
    return (policy_gradient(log_p, log_q, mask, with_later_tokens) / mask.sum(1)).mean()


def policy_gradient(log_p, log_q, mask, with_later_tokens):
    """Of the sampled tokens (B, C), a loss per response (B,), for its gradient."""
    reward = (log_q - log_p).detach() * mask
    reward = from_here_on(reward) if with_later_tokens else reward
    return -(reward * log_p).sum(1)


def reinforce(student, teacher, batch, generator):
    return sampled_token(student, teacher, batch, generator, with_later_tokens=True)


def four_responses(student, teacher, batch, generator):
    """SDFT with four responses to a quarter of the prompts: as many responses as with one."""
    few = first_rows(batch, len(batch["prompts"]) // 4)
    return sdft(student, teacher, {k: np.repeat(v, 4, 0) for k, v in few.items()}, generator)


def measure(seed, settings):
    start, data = base(seed), skill("X", "train", seed)
    student, _ = train(start, data, seed, **settings)
    batch = first_rows(data, 64)
    divergence = {key: settings[key] for key in settings if key == "divergence"}
    loss = lambda generator: settings["method"](start, start, batch, generator, **divergence)
    noise = gradient_noise(start, loss, 4 if common.options.quick else 16)
    return skill_metrics(student, start, seed) | {"noise": noise}


def gradient_noise(model, loss, draws):
    """Variance over rollouts of the gradient of loss(generator), relative to its squared mean."""
    generators = [torch.Generator().manual_seed(draw) for draw in range(draws)]
    gradients = [gradient(loss(generator), model) for generator in generators]
    gradients = torch.stack(gradients)  # (draws, weights)
    variance = gradients.var(0).sum()
    squared_mean = gradients.mean(0).square().sum() - variance / draws  # less its own noise
    return (variance / squared_mean).item()


METHODS = {"reverse": SDFT, "forward": SDFT_FORWARD, "jsd": SDFT_JSD}
LOSSES = {"sampled token": sampled_token, "REINFORCE": reinforce, "four responses": four_responses}
METHODS |= {f"reverse, {name}": SDFT | dict(method=method) for name, method in LOSSES.items()}
RATES_OF = dict.fromkeys(METHODS, RATES[1:2])
RATES_OF |= dict.fromkeys(["reverse, sampled token", "reverse, REINFORCE"], LOW)
KL = runner.Experiment(
    name="kl",
    arms=grid(RATES_OF, METHODS),
    measure=measure,
    columns=["new", "prior", "sampled", "KL", "noise"],
)


# --- Four gradients for one loss ----------------------------------------------------------------

PROMPTS, TOKENS = 8, 3
ESTIMATES = ("analytic", "sampled token", "REINFORCE", "Rao-Blackwellised")


def measure_estimator(seed, name):
    model, data = base(seed), skill("X", "train", seed, n=PROMPTS)
    exact = gradient(enumerated_loss(model, data), model)
    generator, draws = torch.Generator().manual_seed(seed), 20 if common.options.quick else 200
    total, squares = torch.zeros_like(exact), 0.0
    for _ in range(draws):
        error = gradient(estimator(model, data, generator, name), model) - exact
        total += error
        squares += error.square().sum().item()
    bias, size = total / draws, exact.norm().item()
    variance = (squares - draws * bias.square().sum().item()) / (draws - 1)
    bias_error = (variance / draws) ** 0.5 / size
    if name == "analytic":  # its mean is known, and that of "sampled token" is the same
        bias = gradient(enumerated_loss(model, data, fixed_responses=True), model) - exact
        bias_error = 0.0
    return {
        "bias": bias.norm().item() / size,
        "bias error": bias_error,
        "noise": variance**0.5 / size,
        "cosine": torch.cosine_similarity(bias + exact, exact, 0).item(),
    }


def estimator(model, data, generator, name):
    """A loss whose gradient is the estimate: one response to each prompt."""
    y, mask = rollout(model, data["prompts"], TOKENS, toy.EOS, generator=generator)  # (B, C)
    log_p, log_q = both_roles(model, model, data, y)  # (B, C, V)
    log_p_of_y, log_q_of_y = at_tokens(log_p, y), at_tokens(log_q, y)  # (B, C)
    kl = (log_p.exp() * (log_p - log_q)).sum(2) * mask  # (B, C), analytic
    if name == "analytic":
        return kl.sum(1).mean()
    if name != "Rao-Blackwellised":
        return policy_gradient(log_p_of_y, log_q_of_y, mask, name == "REINFORCE").mean()
    # The token's own term is summed over the vocabulary, the KL of what comes after it is sampled.
    after = from_here_on(kl.detach()) - kl.detach()
    return (kl + log_p_of_y * after * mask).sum(1).mean()


def from_here_on(values):
    """Sums (B, C) of every token's value and those after it."""
    return values.flip(1).cumsum(1).flip(1)


def enumerated_loss(model, data, fixed_responses=False):
    """Eq. (1), KL(student ‖ teacher) of whole responses by the chain rule, mean of prompts.

    With fixed responses P(prefix) has no gradient: the loss whose gradient is the analytic
    estimator's mean.
    """
    V, losses = len(toy.VOCAB), []
    # All prefixes of TOKENS - 1 tokens, in the order of counting; the last token is never read.
    y = torch.cartesian_prod(*[torch.arange(V)] * (TOKENS - 1))  # (V^(C-1), C - 1)
    y = torch.nn.functional.pad(y, (0, 1), value=toy.EOS)
    goes_on = (torch.arange(V) != toy.EOS).to(model.wte.weight.dtype)  # (V,)
    for prompt, teacher_prompt in zip(data["prompts"], data["teacher_prompts"]):
        prompts = dict(prompts=[prompt] * len(y), teacher_prompts=[teacher_prompt] * len(y))
        log_p, log_q = both_roles(model, model, prompts, y)
        kl = (log_p.exp() * (log_p - log_q)).sum(2)  # (V^(C-1), C)
        loss, p_prefix = 0.0, torch.ones(1)
        for t in range(TOKENS):
            # A prefix of t tokens begins many rows: take the first of each.
            rows = torch.arange(0, len(y), V ** (TOKENS - 1 - t))  # (V^t,)
            loss += ((p_prefix.detach() if fixed_responses else p_prefix) * kl[rows, t]).sum()
            p_next = log_p[rows, t].exp() * goes_on  # (V^t, V): after an end comes nothing
            p_prefix = (p_prefix[:, None] * p_next).flatten()  # (V^(t+1),)
        losses.append(loss)
    return torch.stack(losses).mean()


ESTIMATORS = runner.Experiment(
    name="estimators",
    arms=[dict(arm=name, name=name) for name in ESTIMATES],
    measure=measure_estimator,
    columns=["bias", "bias error", "noise", "cosine"],
)

if __name__ == "__main__":
    runner.main(__doc__, KL, ESTIMATORS)
