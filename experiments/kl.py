"""Which divergence, and must it be summed over the vocabulary?

The paper: the analytic KL of every token does best, its estimate from the sampled token is noisier. Its equation is the reverse KL, its
results were made with the forward KL; replications find no difference, or +6 points for forward.

    python -m experiments.kl --seeds 5

All at SDFT's settings on skill X. "noise" is the variance of the gradient over rollouts of one minibatch, summed over the weights, as a multiple
of the squared length of the mean gradient, all at the base's weights: 1 means that noise and signal are of equal size in one update.
"""

import torch

from data import toy
from experiments import common, runner
from experiments.common import base, skill, skill_metrics, train
from experiments.settings import SDFT
from sdft import completion_logits, rollout, sdft_loss
from train_toy import MAX_NEW_TOKENS


def sampled_token(student, teacher, batch, generator):
    """The reverse KL estimated from the sampled tokens alone: its gradient is that of Eq. (1) on average, since
    Σ_v p ∇log p log(p/q) = ∇ Σ_v p log(p/q)."""
    y, mask = rollout(student, batch["prompts"], MAX_NEW_TOKENS, toy.EOS, generator=generator)
    log_p = completion_logits(student, batch["prompts"], y).log_softmax(-1).gather(2, y[:, :, None])[:, :, 0]  # (B, C)
    with torch.no_grad():
        log_q = completion_logits(teacher, batch["teacher_prompts"], y).log_softmax(-1).gather(2, y[:, :, None])[:, :, 0]
    per_token = (log_p - log_q).detach() * log_p * mask
    return (per_token.sum(1) / mask.sum(1)).mean(), int(mask.sum())


def analytic(kl):
    def loss(student, teacher, batch, generator):
        y, mask = rollout(student, batch["prompts"], MAX_NEW_TOKENS, toy.EOS, generator=generator)
        with torch.no_grad():
            teacher_logits = completion_logits(teacher, batch["teacher_prompts"], y)
        return sdft_loss(completion_logits(student, batch["prompts"], y), teacher_logits, mask, kl)[0], int(mask.sum())

    return loss


ARMS = {
    "reverse": dict(SDFT, loss=analytic("reverse")),
    "forward": dict(SDFT, kl="forward", loss=analytic("forward")),
    "jsd": dict(SDFT, kl="jsd", loss=analytic("jsd")),
    "reverse, sampled token": dict(SDFT, method=sampled_token, loss=sampled_token),
}
COLUMNS = ["new", "prior", "new greedy", "noise"]
WORLDS = [("skills",)]
DRAWS = 64


def measure(seed, loss, **settings):
    start, data = base(seed), skill("X", "train", seed)
    student, _ = train(start, data, seed, **settings)
    batch = {k: v[:64] for k, v in data.items()}
    return skill_metrics(student, seed) | {"noise": gradient_noise(start, batch, loss, 4 if common.options.quick else DRAWS)}


def gradient_noise(model, batch, loss, draws):
    """Variance over rollouts of the gradient of loss(model, model, batch, generator), relative to its squared mean."""
    grads = torch.stack([gradient(model, batch, loss, draw) for draw in range(draws)])  # (draws, weights)
    variance = grads.var(0).sum()
    return (variance / (grads.mean(0).square().sum() - variance / draws)).item()  # the mean's square, less its own noise


def gradient(model, batch, loss, seed):
    value, _ = loss(model, model, batch, torch.Generator().manual_seed(seed))
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, [*model.parameters()], allow_unused=False)])


if __name__ == "__main__":
    runner.main("kl")
