"""Self-distillation fine-tuning (SDFT): "Self-Distillation Enables Continual Learning".

arXiv 2601.19897; marks such as "Alg. 1, line 7" and "Eq. (2)" are those of its v1. One model plays
two roles on the same prompt x:

    student  π_θ(·|x)     reads the prompt only, as it will at inference
    teacher  π_φ(·|x, c)  reads the prompt and c, an expert's demonstration for this very prompt

φ starts as θ and follows it as a moving average (EMA). The student rolls out its own response y,
both roles score y, and the student is pulled towards the teacher at every token. The expert's
tokens are never a target: c acts only through what the teacher makes of it.

    prompts, teacher_prompts  B lists of token ids, of any lengths: the contexts of the two roles
    completions  (B, C)       the student's responses, padded with eos_id after the end
    mask         (B, C)       1 for tokens that count: those of a rollout to its first end token
    logits       (B, C, V)    position t predicts completion token t
"""

import math

import torch
import torch.nn.functional as F


def student_context(prompt):
    """Ctx_S(x): the prompt and nothing else. Alg. 1, line 6."""
    return prompt


def teacher_context(prompt, demonstration, article=None):
    """Ctx_T(x, c): the question, an example of a response, a request. Alg. 1, line 9.

    Words and final colon are the paper's (Sec. 3); the released script has the blank lines, and a
    full stop at the end. `article` is a text to put in front, for knowledge acquisition.
    """
    question = f"{article}\n\n{prompt}" if article else prompt
    example = f"This is an example for a response to the question:\n{demonstration}"
    request = "Now answer with a response of your own, including the thinking process:"
    return f"{question}\n\n{example}\n\n{request}\n"


def left_pad(prompts, device):
    """Token ids (B, P) and the number of padding tokens per row (B,), None if no row has any."""
    longest = max((len(p) for p in prompts), default=0)
    n_pad = [longest - len(p) for p in prompts]
    if longest == 0 or longest == max(n_pad):
        raise ValueError("a batch needs a prompt and every prompt a token; remove the empty ones")
    tokens = torch.tensor([[0] * n + list(p) for n, p in zip(n_pad, prompts)], device=device)
    return tokens, torch.tensor(n_pad, device=device) if any(n_pad) else None


@torch.no_grad()
def rollout(model, prompts, max_new_tokens, eos_id, temperature=1.0, generator=None):
    """Sample one response per prompt: completions (B, C) and mask (B, C). Alg. 1, line 7.

    A row ends with its first eos_id, which is part of the response; the rest of it is filled with
    eos_id and masked. Temperature 0 is greedy. The model has model.py's kv_cache, hidden, lm_head.
    """
    if max_new_tokens < 1 or not (temperature == 0 or temperature >= 0.01):
        raise ValueError("max_new_tokens must be >= 1, temperature 0 (greedy) or >= 0.01")
    device = next(model.parameters()).device
    tokens, n_pad = left_pad(prompts, device)
    B, P = tokens.shape
    cache = model.kv_cache(B, P + max_new_tokens)
    completions = torch.full((B, max_new_tokens), eos_id, device=device)  # (B, C)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)  # (B, C)
    unfinished = torch.ones(B, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        # The first pass reads the whole prompt, every later one only the newest token.
        logits = model.lm_head(model.hidden(tokens, n_pad, cache)[:, -1]).float()  # (B, V)
        if not logits.isfinite().all():
            raise FloatingPointError("the logits are not finite; lower the learning rate")
        if temperature == 0:
            token = logits.argmax(-1)  # (B,)
        else:
            probs = (logits / temperature).softmax(-1)  # (B, V)
            token = torch.multinomial(probs, 1, generator=generator)[:, 0]  # (B,)
        completions[:, t] = token.where(unfinished, eos_id)
        mask[:, t] = unfinished
        unfinished = unfinished & (token != eos_id)
        if not unfinished.any():
            break
        tokens = completions[:, t : t + 1]  # (B, 1)
    # Under autocast, casts made without gradients must not serve the pass that needs them.
    torch.clear_autocast_cache()
    return completions[:, : t + 1], mask[:, : t + 1]


def completion_logits(model, prompts, completions):
    """Logits (B, C, V) of the completions (B, C) after their prompts. Alg. 1, lines 10 and 11.

    The two roles' prompts differ in length. Padded on the left, all end in the same column, and
    column t of the result predicts completion token t (. padding, r the template's request):

        student  . . x x x | y1 y2 y3        teacher  x x x c c c r | y1 y2 y3
        student  . x x x x | y1 y2 y3        teacher  . x x x c c r | y1 y2 y3
                         ^   ^  ^                                 ^   ^  ^
                   the columns whose logits predict y1, y2 and y3
    """
    tokens, n_pad = left_pad(prompts, completions.device)  # (B, P)
    tokens = torch.cat([tokens, completions[:, :-1]], 1)  # (B, P + C - 1): y3 predicts nothing
    return model.lm_head(model.hidden(tokens, n_pad)[:, -completions.size(1) :])


def token_divergence(student_logits, teacher_logits, divergence="reverse"):
    """Divergence of the next-token distributions, (..., V) to (...), in nats, in float32 or better.

    reverse  KL(student ‖ teacher), Eqs. (1) and (2)
    forward  KL(teacher ‖ student), with which the paper's results were made (v2, Sec. 3)
    jsd      Jensen-Shannon: the mean of both roles' KL to their mixture
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(student_logits.to(dtype), -1)  # (..., V), student
    log_q = F.log_softmax(teacher_logits.detach().to(dtype), -1)  # (..., V), teacher
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
    # q - p sums to 0 over the vocabulary. With it the gradient at p = q is exactly 0; without it
    # rounding leaves noise there, which Adam would turn into full-sized steps.
    if divergence == "reverse":
        return (p * log_ratio + q - p).sum(-1)  # Σ_v p log(p/q)
    if divergence == "forward":
        return (p - q - q * log_ratio).sum(-1)  # Σ_v q log(q/p)
    if divergence == "jsd":  # With m = (p + q)/2, log(p/m) is log 2 - softplus(log(q/p)).
        log_p_to_m = math.log(2) - F.softplus(-log_ratio, threshold=40)
        log_q_to_m = math.log(2) - F.softplus(log_ratio, threshold=40)
        return (p * log_p_to_m + q * log_q_to_m).sum(-1) / 2
    raise ValueError(f"divergence={divergence!r} is unknown; use 'reverse', 'forward' or 'jsd'")


def sdft_loss(student_logits, teacher_logits, mask, divergence="reverse"):
    """The SDFT loss, a scalar in nats per token, and {"divergence": (B, C)}, detached, 0 if masked.

    The logits (B, C, V) are finite and of the same completions; only the student's carry a
    gradient. The mask (B, C) is 1 for the tokens that count; a row without any counts as 0.

    This is the analytic per-token estimator (Eq. (2), App. A.1): at every token the divergence is
    summed over the whole vocabulary, and the sampled response is treated as fixed. The gradient has
    low variance, but is biased for that of the sequence-level KL, Eq. (1): it ignores how a token
    affects the tokens after it. Mean over a row's tokens (the released code's 1/|y|), then rows.
    """
    shapes = tuple(student_logits.shape), tuple(teacher_logits.shape), tuple(mask.shape)
    if mask.dim() != 2 or shapes[0] != shapes[1] or shapes[0][:-1] != shapes[2]:
        raise ValueError("logits {} and {} must be (B, C, V), mask {} (B, C)".format(*shapes))
    per_token = token_divergence(student_logits, teacher_logits, divergence) * mask  # (B, C)
    loss = (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()
    return loss, {"divergence": per_token.detach()}


def distill_loss(
    student, teacher, prompts, teacher_prompts, completions, mask, divergence="reverse"
):
    """`sdft_loss` of given completions (B, C), scored under both roles. Alg. 1, lines 10 to 14."""
    student_logits = completion_logits(student, prompts, completions)  # (B, C, V)
    with torch.no_grad():
        teacher_logits = completion_logits(teacher, teacher_prompts, completions)  # (B, C, V)
    return sdft_loss(student_logits, teacher_logits, mask, divergence)


def sft_loss(logits, tokens, mask):
    """The SFT baseline, off-policy: cross entropy on the expert's tokens (B, C), nats per token."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, C, V)
    nll = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none") * mask  # (B, C)
    return (nll.sum(1) / mask.sum(1).clamp(min=1)).mean()


@torch.no_grad()
def implicit_reward(student_logits, teacher_logits, completions):
    """r_t = log π_T(y_t) - log π_S(y_t), (B, C), in nats: SDFT's implicit reward, Eqs. (3)-(6).

    REINFORCE on its sum over a response descends Eq. (1): on-policy RL without a reward model.
    """
    log_ratio = teacher_logits.log_softmax(-1) - student_logits.log_softmax(-1)  # (B, C, V)
    return log_ratio.gather(2, completions[:, :, None])[:, :, 0]


@torch.no_grad()
def ema_update(teacher, student, alpha):
    """φ ← α θ + (1 - α) φ, in place, buffers included. Alg. 1, line 17.

    The average lags behind, so that an unlucky update of the student does not become its target.
    α = 0 is a frozen teacher, α = 1 the live student; .02 is the middle of the paper's sweep.
    """
    if alpha == 0:  # The teacher may then be shared, or in half precision.
        return
    weights = ([*model.parameters(), *model.buffers()] for model in (teacher, student))
    for t, s in zip(*weights, strict=True):
        if t.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"{t.dtype} loses an EMA's small updates; keep the teacher in float32")
        t.lerp_(s.to(t.dtype), alpha) if t.is_floating_point() else t.copy_(s)


def clip_and_step(model, optimizer, loss, grad_clip=1.0):
    """Alg. 1, line 16: clip, step, clear. Raises if the gradients or the loss are not finite."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    if not math.isfinite(loss) or not norm.isfinite():
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}: lower the learning rate")
    optimizer.step()
    optimizer.zero_grad()
    torch.clear_autocast_cache()  # it holds casts of the weights from before the step


def train_step(
    student,
    teacher,
    optimizer,
    prompts,
    teacher_prompts,
    max_new_tokens,
    eos_id,
    *,
    divergence="reverse",
    alpha=0.02,
    temperature=1.0,
    grad_clip=1.0,
    skip_tokens=0,
    generator=None,
):
    """Algorithm 1 on one minibatch: the loss (float), and what the student said, (B, C) each.

    `skip_tokens` leaves a response's first tokens out of the loss. The released code skips 3, so
    that a student does not learn to open with "Based on the example" (v2, Sec. 5).
    """
    # Alg. 1, line 7: one response per prompt, from the student itself.
    y, mask = rollout(student, prompts, max_new_tokens, eos_id, temperature, generator)
    loss_mask = mask & (torch.arange(mask.size(1), device=mask.device) >= skip_tokens)
    # Lines 10 to 14: both roles score it. The gradient is Eq. (2), and goes to the student only.
    loss, info = distill_loss(student, teacher, prompts, teacher_prompts, y, loss_mask, divergence)
    loss.backward()
    clip_and_step(student, optimizer, loss.item(), grad_clip)  # Line 16.
    ema_update(teacher, student, alpha)  # Line 17.
    return loss.item(), info | {"completions": y, "mask": mask, "loss_mask": loss_mask}
