"""Self-distillation fine-tuning (SDFT), the method of "Self-Distillation Enables Continual Learning", arXiv 2601.19897.

One model plays two roles on the same prompt x:

    student  π_θ(·|x)     sees the prompt
    teacher  π_φ(·|x, c)  sees the prompt and c, an expert's demonstration for it; φ is an EMA of θ

Algorithm 1, with the numbers that the comments below refer to:

    1  take a minibatch of prompts and demonstrations (x, c)
    2  roll out one response y ~ π_θ(·|x) from the student
    3  score the same y under both: π_θ(·|x, y<t) and π_φ(·|x, c, y<t) for every token t of y
    4  L(θ) = 1/|y| Σ_t KL(π_θ(·|x, y<t) ‖ π_φ(·|x, c, y<t))                        Eq. (1), gradients through θ only
    5  a step of the optimiser on θ, then φ ← α θ + (1 - α) φ

Left out on purpose: more than one rollout per prompt (the paper finds that it adds little) and the sampled-token estimator
of the KL (it finds it noisier), importance weights for stale samples (every sample here is fresh), any reward, critic or generation server.

    symbol            shape      meaning
    prompts           B lists    token ids of the student's contexts, of any lengths
    teacher_prompts   B lists    token ids of the teacher's contexts
    completions       (B, C)     the student's responses, one row each, columns after the end are filler
    mask              (B, C)     True for completion tokens up to and including the first end-of-sequence token
    logits            (B, C, V)  position t predicts completion token t
"""

import math

import torch
import torch.nn.functional as F

# --- Contexts -------------------------------------------------------------------------------------------------------


def student_context(prompt):
    """What the student reads: the prompt and nothing else."""
    return prompt


def teacher_context(prompt, demonstration, context=None):
    """What the teacher reads, in the paper's words: the question, an example of a response, a request. The line breaks and
    the last colon are ours: a model without a chat template answers on the next line.

    `context` is a text to put before the question, an article for knowledge acquisition, say.
    """
    article = f"{context}\n\n" if context else ""
    return (
        f"{article}{prompt}\n\nThis is an example for a response to the question:\n{demonstration}\n\n"
        "Now answer with a response of your own, including the thinking process:\n"
    )


# --- Rollout and scoring --------------------------------------------------------------------------------------------


def pad_left(prompts, device):
    """Token ids (B, P) and the padding of each row (B,), or None where no row needs any. Prompts end in the same column."""
    if len(prompts) == 0 or min(len(p) for p in prompts) == 0:
        raise ValueError("a batch needs at least one prompt and every prompt at least one token; remove the empty ones")
    P = max(len(p) for p in prompts)
    pad = [P - len(p) for p in prompts]
    idx = torch.tensor([[0] * n + list(p) for n, p in zip(pad, prompts)], device=device)
    return idx, torch.tensor(pad, device=device) if any(pad) else None


@torch.no_grad()
def rollout(model, prompts, max_new_tokens, eos_id, temperature=1.0, generator=None):
    """The model's responses: completions (B, C) and mask (B, C), C <= max_new_tokens. Alg. 1, step 2.

    prompts      B lists of token ids, of any lengths
    temperature  of the sampling; 0 takes the likeliest token
    generator    torch.Generator on the model's device; the same seed and prompts give the same responses. Or a list of B,
                 one per row: then a response does not depend on the rows beside it

    A row ends with its first eos_id, which belongs to the response; the rest of the row is eos_id and masked.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1 and temperature={temperature} at least 0")
    device = model.wte.weight.device
    idx, pad = pad_left(prompts, device)
    B, P = idx.shape
    if P + max_new_tokens > model.config.block_size:
        raise ValueError(
            f"a prompt of {P} tokens and max_new_tokens={max_new_tokens} exceed block_size={model.config.block_size}; "
            "shorten either"
        )
    cache = model.kv_cache(B, P + max_new_tokens - 1)
    completions = torch.full((B, max_new_tokens), eos_id, device=device)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
    running = torch.ones(B, dtype=torch.bool, device=device)
    u = None
    if isinstance(generator, list):
        u = torch.stack([torch.rand(max_new_tokens, generator=g, device=device) for g in generator], 1)  # (C, B)
    for c in range(max_new_tokens):
        # the whole prompt once, then one token at a time; only the last position is projected on the vocabulary
        logits = model.next_logits(idx, pad, cache)  # (B, V)
        if not logits.isfinite().all():
            raise FloatingPointError("the model's logits are not finite; lower the learning rate")
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # finite at any temperature
            token = torch.multinomial(p, 1, generator=generator)[:, 0] if u is None else sample(p, u[c])
        completions[:, c] = token.where(running, eos_id)
        mask[:, c] = running
        running = running & (token != eos_id)
        if not running.any():
            break
        idx = completions[:, c : c + 1]  # (B, 1)
    return completions[:, : c + 1], mask[:, : c + 1]


def sample(p, u):
    """One token per row (B,) of probabilities p (B, V), by inverting the distribution function at u (B,), numbers below 1.

    torch.multinomial draws V numbers per row and token, which takes a third of a bfloat16 rollout of GPT-2 on a CPU (`python -m bench`).
    """
    cdf = p.to(torch.float32 if p.device.type == "mps" else torch.float64).cumsum(-1)  # (B, V)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=p.size(-1) - 1)


def completion_hidden(model, prompts, completions):
    """Hidden states (B, C, D) from which the model predicts completions (B, C) after its own prompts. Alg. 1, step 3.

    The prompts of student and teacher differ in length; padded on the left, both end in the column before the completion,
    so that column t of the result predicts completion token t in either role.
    """
    idx, pad = pad_left(prompts, completions.device)
    idx = torch.cat([idx, completions[:, :-1]], 1)  # (B, P + C - 1); what follows the last token is not scored
    return model.hidden(idx, pad)[:, -completions.size(1) :]


def completion_logits(model, prompts, completions):
    """Logits (B, C, V) of the same."""
    return model.head(completion_hidden(model, prompts, completions))


# --- Loss -----------------------------------------------------------------------------------------------------------


def sdft_loss(student_logits, teacher_logits, mask, kl="reverse", reduction="sequence"):
    """Per-token KL between student and teacher over the whole vocabulary, on the student's own tokens. Eq. (1).

    student_logits  (B, C, V)  position t predicts completion token t; finite; carries the gradient
    teacher_logits  (B, C, V)  on the same tokens; finite; never receives a gradient
    mask            (B, C)     1 for completion tokens up to and including the first end token, 0 for the rest
    kl              "reverse"  KL(student ‖ teacher), Eq. (1)
                    "forward"  KL(teacher ‖ student), what the paper's experiments ran (official repository, issue 5)
                    "jsd"      Jensen-Shannon divergence, the mean of both to their mixture (GKD, arXiv 2306.13649)
    reduction       "sequence" mean over a row's tokens, then over all rows, as in Eq. (1) and the released code
                    "token"    one mean over all tokens

    Returns the loss in nats (a scalar, float32 or better) and info: {"kl": (B, C)}, the detached KL of every token, 0 where
    masked. A row without a token counts as 0; a batch without one has loss 0 and gradient 0.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.shape[:-1] != mask.shape or mask.dim() != 2:
        raise ValueError(
            f"shapes do not match: student_logits {tuple(student_logits.shape)} and teacher_logits "
            f"{tuple(teacher_logits.shape)} must be (B, C, V), mask {tuple(mask.shape)} must be (B, C)"
        )
    per_token = token_kl(student_logits, teacher_logits, kl)  # (B, C)
    mask = mask.to(per_token.dtype)
    per_token = per_token * mask
    if reduction == "sequence":
        loss = (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()
    elif reduction == "token":
        loss = per_token.sum() / mask.sum().clamp(min=1)
    else:
        raise ValueError(f"reduction={reduction!r} is unknown; use 'sequence' or 'token'")
    return loss, {"kl": per_token.detach()}


def token_kl(student_logits, teacher_logits, kl="reverse"):
    """The divergence (...) in nats of every pair of logits (..., V), in float32 or better; as in `sdft_loss`."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(student_logits.to(dtype), -1)  # (..., V), student
    log_q = F.log_softmax(teacher_logits.detach().to(dtype), -1)  # (..., V), teacher
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q

    # the terms q - p of reverse and forward sum to 0 over v; with them every term is >= 0, and the gradient at p = q is 0
    # to the last bit, not to rounding
    if kl == "reverse":
        return (p * log_ratio + q - p).sum(-1)  # Σ_v p log(p/q): Eq. (1)
    if kl == "forward":
        return (p - q - q * log_ratio).sum(-1)  # Σ_v q log(q/p)
    if kl == "jsd":  # with m = (p + q)/2: log p/m = log 2 - softplus(log q/p); the default threshold of 20 costs 2e-9
        p_to_m = math.log(2) - F.softplus(-log_ratio, threshold=40)
        q_to_m = math.log(2) - F.softplus(log_ratio, threshold=40)
        return (p * p_to_m + q * q_to_m).sum(-1) / 2
    raise ValueError(f"kl={kl!r} is unknown; use 'reverse', 'forward' or 'jsd'")


def chunked_sdft_loss(
    student_hidden, student_head, teacher_hidden, teacher_head, mask, kl="reverse", reduction="sequence", chunk=128
):
    """`sdft_loss` of the logits hidden @ head.T, of which only `chunk` tokens exist at a time: the same loss, info and gradients.

    student_hidden  (B, C, D)   final hidden states; carries the gradient
    student_head    (V, D)      the weight of the output layer; carries the gradient
    teacher_hidden  (B, C, D')  and teacher_head (V, D'): the teacher's, never with a gradient

    At V = 50,257 the logits of 2,048 tokens are 0.4 GB, and the formula holds several tensors of that size at once: `python -m bench`
    measures both peaks.
    """
    if student_hidden.shape[:-1] != mask.shape or teacher_hidden.shape[:-1] != mask.shape or chunk < 1:
        raise ValueError(
            f"student_hidden {tuple(student_hidden.shape)} and teacher_hidden {tuple(teacher_hidden.shape)} must be (B, C, D), "
            f"mask {tuple(mask.shape)} must be (B, C), and chunk={chunk} at least 1"
        )
    mask = mask.bool()
    weight = mask.to(torch.promote_types(student_hidden.dtype, torch.float32))  # (B, C), of every token in the loss
    if reduction == "sequence":
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1) / mask.size(0)
    elif reduction == "token":
        weight = weight / weight.sum().clamp(min=1)
    else:
        raise ValueError(f"reduction={reduction!r} is unknown; use 'sequence' or 'token'")
    loss, kls = ChunkedLoss.apply(
        student_hidden[mask], student_head, teacher_hidden[mask].detach(), teacher_head.detach(), weight[mask], kl, chunk
    )
    return loss, {"kl": torch.zeros_like(weight).masked_scatter(mask, kls)}


class ChunkedLoss(torch.autograd.Function):
    """Σ_n weight[n] KL[n] over N tokens, with its gradients taken chunk by chunk in the forward pass, while the logits exist."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, weight, kl, chunk):
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=weight.dtype) if ctx.needs_input_grad[1] else None  # a sum over chunks: not in bfloat16
        kls = torch.zeros_like(weight)  # (N,)
        for n in range(0, max(len(hidden), 1), chunk):
            rows = slice(n, n + chunk)
            logits = F.linear(hidden[rows], head)  # (n, V)
            with torch.enable_grad():
                per_token = token_kl(logits.requires_grad_(), F.linear(teacher_hidden[rows], teacher_head), kl)  # (n,)
                (grad,) = torch.autograd.grad((per_token * weight[rows]).sum(), logits)  # (n, V)
            kls[rows] = per_token.detach()
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ head
            if grad_head is None:
                continue
            if grad.dtype == grad_head.dtype:
                grad_head.addmm_(grad.t(), hidden[rows])  # without another (V, D)
            else:
                grad_head += grad.t() @ hidden[rows]
        ctx.grads = grad_hidden, None if grad_head is None else grad_head.to(head.dtype)
        ctx.mark_non_differentiable(kls)
        return (kls * weight).sum(), kls

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        (grad_hidden, grad_head), ctx.grads = ctx.grads, None  # V x D is not kept until the loss is forgotten
        return *(None if g is None else g.mul_(grad_loss) for g in (grad_hidden, grad_head)), None, None, None, None, None


def sft_loss(logits, tokens, mask):
    """What SDFT is compared with: cross entropy of an expert's tokens (B, C) under logits (B, C, V), in nats per token,
    mean over a row's tokens, then over rows. Off-policy: the tokens are not the student's."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none") * mask  # (B, C)
    return (nll.sum(1) / mask.sum(1).clamp(min=1)).mean()


# --- Teacher and training step --------------------------------------------------------------------------------------


@torch.no_grad()
def ema_update(teacher, student, alpha):
    """φ ← α θ + (1 - α) φ, in place, for parameters and buffers. Alg. 1, step 5.

    alpha 0 keeps a frozen teacher, alpha 1 makes it the live student. Integer buffers are copied.
    """
    for t, s in zip([*teacher.parameters(), *teacher.buffers()], [*student.parameters(), *student.buffers()], strict=True):
        if not t.is_floating_point():
            t.copy_(s)
        elif t.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"the teacher's weights are {t.dtype}, where an EMA loses small updates; keep it in float32")
        else:
            t.lerp_(s.to(t.dtype), alpha)


def update(model, optimizer, loss, clip=1.0):
    """One optimiser step on a loss whose gradients are in place; refuses anything that is not finite, weights untouched."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    if not math.isfinite(loss) or not torch.isfinite(norm):
        raise FloatingPointError(f"loss is {loss}, gradient norm {norm.item()}: not finite; lower the learning rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train_step(
    student,
    teacher,
    optimizer,
    prompts,
    teacher_prompts,
    max_new_tokens,
    eos_id,
    *,
    kl="reverse",
    reduction="sequence",
    alpha=0.02,
    temperature=1.0,
    clip=1.0,
    skip_tokens=0,
    micro_batch=None,
    generator=None,
    sync=None,
    sampler=None,
    chunk=None,
):
    """Algorithm 1 on one minibatch (step 1 is the caller's). Returns the loss in nats (float) and info: "completions" and
    "mask" (B, C), what the student said; "kl" (B, C) per token in nats.

    alpha        EMA rate of the teacher: 0 frozen, 1 live
    skip_tokens  completion tokens at the start that carry no loss; the released code has 3, against students that learn
                 to write "Based on the example"
    micro_batch  rows scored at a time; fewer save memory and change nothing else
    generator    as in `rollout`
    sync         called with the student once its gradients are in place: averages them over several processes, say
    sampler      a copy of the student to roll out with, in bfloat16, say; it is given the student's weights first
    chunk        completion tokens whose logits exist at a time (see `chunked_sdft_loss`); None: all of them
    """
    if len(prompts) != len(teacher_prompts) or skip_tokens < 0 or (micro_batch or 1) < 1:
        raise ValueError(
            f"{len(prompts)} prompts need as many teacher_prompts (here {len(teacher_prompts)}), skip_tokens={skip_tokens} must "
            f"be at least 0, micro_batch={micro_batch} at least 1"
        )
    optimizer.zero_grad(set_to_none=True)
    if sampler is None:
        completions, mask = rollout(student, prompts, max_new_tokens, eos_id, temperature, generator)  # Alg. 1, step 2
    else:
        sampler.load_state_dict(student.state_dict())
        with torch.autocast(sampler.wte.weight.device.type, enabled=False):  # in the sampler's own dtype
            completions, mask = rollout(sampler, prompts, max_new_tokens, eos_id, temperature, generator)
    scored = mask.clone()  # (B, C)
    scored[:, :skip_tokens] = False
    weight = torch.ones(len(prompts)) if reduction == "sequence" else scored.sum(1)  # (B,), of a row in the loss

    B, total, kls = len(prompts), 0.0, []
    for i in range(0, B, micro_batch or B):
        rows = slice(i, i + (micro_batch or B))
        student_hidden = completion_hidden(student, prompts[rows], completions[rows])  # (b, C, D), Alg. 1, step 3
        with torch.no_grad():
            teacher_hidden = completion_hidden(teacher, teacher_prompts[rows], completions[rows])  # (b, C, D)

        if chunk is None:  # Alg. 1, step 4: Eq. (1)
            logits = student.head(student_hidden), teacher.head(teacher_hidden)  # (b, C, V)
            loss, info = sdft_loss(*logits, scored[rows], kl, reduction)
        else:
            hidden_and_head = student_hidden, student.wte.weight, teacher_hidden, teacher.wte.weight
            loss, info = chunked_sdft_loss(*hidden_and_head, scored[rows], kl, reduction, chunk)
        share = weight[rows].sum().item() / max(weight.sum().item(), 1)
        (loss * share).backward()  # the micro-batches add up to the gradient of the whole batch
        total += loss.item() * share
        kls.append(info["kl"])

    if sync:
        sync(student)
    update(student, optimizer, total, clip)  # Alg. 1, step 5: θ
    ema_update(teacher, student, alpha)  # Alg. 1, step 5: φ
    return total, {"completions": completions, "mask": mask, "kl": torch.cat(kls)}
