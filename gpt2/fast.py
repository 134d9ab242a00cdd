"""What makes a real run fast, each piece beside the textbook function that it equals.

    here               textbook            what is different
    rollout            sdft.rollout        a random stream per row; inverse-CDF sampling
    RolloutGPT         model.GPT           matrices packed for oneDNN; a copy in bfloat16
    lean               model.Block         computes again, in the backward pass, what is cheap
    chunked_sdft_loss  sdft.sdft_loss      the logits of one chunk of tokens at a time
    train_step         sdft.train_step     micro-batches, several processes, all of the above
    sft_step           sdft.sft_loss       micro-batches, several processes, and the update
    keep_freed_memory                      memory that is freed is used again, not given back

test_fast.py holds every pair equal: tokens, loss, gradients and the weights after a step.
`python -m gpt2.bench --tricks` measures what they gain.
"""

import ctypes

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import sdft
from gpt2 import lora
from gpt2.data import batches, pad_right
from model import GPT, Attention, Block, KVCache
from sdft import clip_and_step, completion_logits, ema_update, left_pad, sft_loss, token_divergence

CHUNK = 64  # tokens whose logits exist at a time


# --- Rollout --------------------------------------------------------------------------------------


def row_generators(seed, step, places, device):
    """A random stream for each of these places in the step's minibatch.

    A response then depends on seed, step and place only, and neither on the micro-batch nor on the
    process that samples it.
    """
    keys = [np.random.SeedSequence([seed, 2, step, place]) for place in places]
    return [torch.Generator(device).manual_seed(int(k.generate_state(1)[0])) for k in keys]


def inverse_cdf(probs, u):
    """Inverse-CDF sampling: tokens (B,) from probs (B, V) with uniforms u (B,) in [0, 1).

    torch.multinomial draws V random numbers per row and token instead.
    """
    dtype = torch.float32 if probs.device.type == "mps" else torch.float64  # MPS has no float64
    cdf = probs.to(dtype).cumsum(-1)  # (B, V)
    tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]  # (B,)
    return tokens.clamp(max=probs.size(-1) - 1)


@torch.no_grad()
def rollout(model, prompts, max_new_tokens, eos_id, temperature=1.0, generators=None):
    """`sdft.rollout` with a generator per row, which makes a row independent of those beside it."""
    if max_new_tokens < 1 or not temperature >= 0.01:  # greedy, or what sdft.rollout refuses
        return sdft.rollout(model, prompts, max_new_tokens, eos_id, temperature)
    device = next(model.parameters()).device
    tokens, n_pad = left_pad(prompts, device)  # (B, P)
    B, P = tokens.shape
    cache = model.kv_cache(B, P + max_new_tokens)
    completions = torch.full((B, max_new_tokens), eos_id, device=device)  # (B, C)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)  # (B, C)
    unfinished = torch.ones(B, dtype=torch.bool, device=device)
    uniforms = [torch.rand(max_new_tokens, generator=g, device=device) for g in generators]
    uniforms = torch.stack(uniforms, 1)  # (C, B)
    for t in range(max_new_tokens):
        logits = model.lm_head(model.hidden(tokens, n_pad, cache)[:, -1]).float()  # (B, V)
        if not logits.isfinite().all():
            raise FloatingPointError("the logits are not finite; lower the learning rate")
        token = inverse_cdf((logits / temperature).softmax(-1), uniforms[t])  # (B,)
        completions[:, t] = token.where(unfinished, eos_id)
        mask[:, t] = unfinished
        unfinished = unfinished & (token != eos_id)
        if not unfinished.any():
            break
        tokens = completions[:, t : t + 1]  # (B, 1)
    return completions[:, : t + 1], mask[:, : t + 1]


class PackedLinear(nn.Module):
    """nn.Linear with its weight in the layout that oneDNN's kernels read, packed once.

    F.linear on a CPU packs the weight at every call, which for the few rows of a decoding step
    takes at least as long as the product.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        self.packed, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight), bias

    @staticmethod
    def can_hold(weight):
        """Not under autocast, which does not cast for the packed product."""
        if weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        half = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
        return torch.backends.mkldnn.is_available() and weight.dtype in (torch.float32, half)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class RolloutKVCache(KVCache):
    """Holds a bfloat16 model's keys in float32 on a CPU, where attention to bfloat16 ones is slow.

    One layer's attention to 128 keys takes five times as long in bfloat16.
    """

    def __init__(self, model, batch_size, max_len):
        super().__init__(model, batch_size, max_len)
        if self.kv.dtype == torch.bfloat16 and self.kv.device.type == "cpu":
            self.kv = self.kv.float()


class RolloutAttention(Attention):
    """Attention in the dtype of the cache, which need not be the model's."""

    def forward(self, x, layer, mask, cache):
        B, T, D = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head)  # (B, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D/H) each
        causal = mask is None and T == k.size(2)
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask, is_causal=causal)
        return self.c_proj(y.to(q.dtype).transpose(1, 2).reshape(B, T, D))  # (B, T, D)


class RolloutGPT(GPT):
    """A GPT that only decodes, with the weights of another: `RolloutGPT.of(model, dtype)`."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.h:
            block.attn = RolloutAttention(config)
        self.packed_head = None

    @classmethod
    def of(cls, model, dtype=None):
        """Shares the model's memory if dtype is None or the model's own; otherwise a copy.

        A copy has the adapters of gpt2/lora.py merged into its weights. Matrices packed on a CPU
        are copies of the same size, freed with this model.
        """
        with torch.device("meta"):
            rollout_model = cls(model.config)
        weights = model.state_dict()
        if dtype not in (None, model.wte.weight.dtype):
            weights = {name: w.to(dtype) for name, w in lora.merged(model)}
        elif hasattr(model, "lora"):
            lora.add_adapters(rollout_model, *model.lora)
        rollout_model.load_state_dict(weights, assign=True)
        rollout_model.requires_grad_(False)
        del weights  # A copy's matrices are then free as soon as they are packed.
        if PackedLinear.can_hold(rollout_model.wte.weight):
            rollout_model.pack()
        return rollout_model

    def pack(self):
        for module in [*self.modules()]:
            for name, child in [*module.named_children()]:
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child.weight, child.bias))
        if not hasattr(self, "lora"):  # Beside adapters it would set the peak of an update.
            self.packed_head = PackedLinear(self.wte.weight)

    def lm_head(self, hidden):
        return super().lm_head(hidden) if self.packed_head is None else self.packed_head(hidden)

    def kv_cache(self, batch_size, max_len):
        return RolloutKVCache(self, batch_size, max_len)


# --- Memory ---------------------------------------------------------------------------------------


def keep_freed_memory():
    """Have glibc keep freed memory for the next tensors. Other C libraries stay as they are.

    Otherwise glibc gives large blocks back to the system, which maps and clears every page of them
    again for the next update. `gpt2.bench --tricks` shows what that costs on a machine.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def lean(model):
    """Change a GPT in place so that it trains in less memory: same weights, outputs, gradients.

    The embedding's gradient is sparse; `train_step` adds it to the output layer's dense one.
    """
    for block in model.h:
        block.__class__ = LeanBlock
    model.wte.sparse = model.wte.weight.device.type != "mps"  # which lacks sparse tensors
    return model


class LeanBlock(Block):
    """Keeps 12 of 17 values per token and unit of width for the backward pass.

    LayerNorm and GELU of the MLP are computed again there, and an adapter's two small products; no
    large product is, since `checkpoint` stops once it has what the backward pass needs.
    """

    def forward(self, x, layer, mask, cache):
        x = x + self.attn(self.ln_1(x), layer, mask, cache)
        hidden = recomputed(lambda x: self.mlp.c_fc(self.ln_2(x)), x)  # (B, T, 4D)
        return x + recomputed(lambda h: self.mlp.c_proj(F.gelu(h, approximate="tanh")), hidden)


def recomputed(function, x):
    """function(x), of which the backward pass keeps x only and computes again what it needs."""
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


# --- Loss -----------------------------------------------------------------------------------------


def completion_hidden(model, prompts, completions):
    """Hidden states (B, C, D) whose lm_head is `sdft.completion_logits`."""
    tokens, n_pad = left_pad(prompts, completions.device)  # (B, P)
    tokens = torch.cat([tokens, completions[:, :-1]], 1)  # (B, P + C - 1)
    return model.hidden(tokens, n_pad)[:, -completions.size(1) :]


def chunked_sdft_loss(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    mask,
    divergence="reverse",
    chunk=CHUNK,
):
    """`sdft.sdft_loss` of the logits hidden @ head.T, of which `chunk` tokens exist at a time.

    student_hidden  (B, C, D)   final hidden states, with a gradient
    student_head    (V, D)      weight of the output layer, with a gradient
    teacher_hidden  (B, C, D')  the teacher's hidden states and
    teacher_head    (V, D')     output layer, never with a gradient

    With V = 50,257 the logits of 2,048 tokens take 0.4 GB, and the divergence needs several tensors
    of that size at once.
    """
    if not student_hidden.shape[:-1] == teacher_hidden.shape[:-1] == mask.shape or chunk < 1:
        raise ValueError(
            f"hidden states {tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)} must "
            f"be (B, C, D), mask {tuple(mask.shape)} (B, C), and chunk={chunk} at least 1"
        )
    mask = mask.bool()
    weight = mask.to(torch.promote_types(student_hidden.dtype, torch.float32))  # (B, C)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1) / mask.size(0)  # mean over rows
    loss, per_token = ChunkedLoss.apply(
        student_hidden[mask],
        student_head,
        teacher_hidden[mask].detach(),
        teacher_head.detach(),
        weight[mask],
        divergence,
        chunk,
    )
    return loss, {"divergence": torch.zeros_like(weight).masked_scatter(mask, per_token)}


class ChunkedLoss(torch.autograd.Function):
    """Σ_n weight[n] divergence[n] over N tokens, and the divergences (N,).

    The gradients are taken in the forward pass, chunk by chunk, while the logits exist.
    """

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, weight, divergence, chunk):
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None  # (N, D)
        # A sum over chunks loses too much in bfloat16.
        grad_head = torch.zeros_like(head, dtype=weight.dtype) if ctx.needs_input_grad[1] else None
        per_token = torch.zeros_like(weight)  # (N,)
        # Under autocast every chunk would cast the output layers again.
        device, head_dtype = hidden.device.type, head.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        operands = hidden, head, teacher_hidden, teacher_head
        hidden, head, teacher_hidden, teacher_head = (w.to(dtype or w.dtype) for w in operands)
        for start in range(0, max(len(hidden), 1), chunk):  # Without tokens: one empty chunk.
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], head)  # (n, V)
            teacher_logits = F.linear(teacher_hidden[rows], teacher_head)  # (n, V)
            with torch.enable_grad():
                part = token_divergence(logits.requires_grad_(), teacher_logits, divergence)  # (n,)
                (grad,) = torch.autograd.grad((part * weight[rows]).sum(), logits)  # (n, V)
            per_token[rows] = part.detach()
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ head
            if grad_head is not None:  # in place: no second (V, D)
                grad_head.addmm_(grad.t().to(weight.dtype), hidden[rows].to(weight.dtype))
        ctx.grads = grad_hidden, None if grad_head is None else grad_head.to(head_dtype)
        ctx.mark_non_differentiable(per_token)
        return (per_token * weight).sum(), per_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        # Forget the (V, D) here; the loss may be kept for longer.
        (grad_hidden, grad_head), ctx.grads = ctx.grads, None
        scaled = [None if g is None else g.mul_(grad_loss) for g in (grad_hidden, grad_head)]
        return *scaled, None, None, None, None, None


# --- Steps ----------------------------------------------------------------------------------------


def average_gradients(model):
    """Replace the gradients by their mean over the processes, if there are several.

    Each process has the mean over its equal share of the rows, so this is the whole minibatch's.
    """
    if dist.is_available() and dist.is_initialized():
        for p in model.parameters():
            if p.requires_grad:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


def train_step(
    student,
    teacher,
    optimizer,
    prompts,
    teacher_prompts,
    max_new_tokens,
    eos_id,
    *,
    generators,
    rollout_dtype=None,
    divergence="reverse",
    alpha=0.02,
    temperature=1.0,
    grad_clip=1.0,
    skip_tokens=0,
    micro_batch=None,
    chunk=CHUNK,
):
    """`sdft.train_step` on this process's rows of the minibatch.

    generators     one per row
    rollout_dtype  of the weights that sample, also under autocast; None is the student's
    micro_batch    rows per forward/backward pass; gradients accumulate, which takes less memory
    """
    with torch.autocast(student.wte.weight.device.type, enabled=False):
        rollout_model = RolloutGPT.of(student, rollout_dtype)
        completions, mask = rollout(
            rollout_model, prompts, max_new_tokens, eos_id, temperature, generators
        )
        del rollout_model  # The memory of a copy is free for the activations.
    loss_mask = mask.clone()
    loss_mask[:, :skip_tokens] = False
    # The tied output layer is a leaf of its own. The embedding's gradient, sparse in a lean model,
    # is added at the end, so that a single pass holds only one dense (V, D) gradient.
    tied = student.wte.weight
    head = tied.detach().requires_grad_(tied.requires_grad)  # (V, D)
    total, parts, B = 0.0, [], len(prompts)
    for start in range(0, B, micro_batch or B):
        rows = slice(start, start + (micro_batch or B))
        with torch.no_grad():  # First, while there are no activations of the student beside it.
            teacher_hidden = completion_hidden(teacher, teacher_prompts[rows], completions[rows])
        hidden = completion_hidden(student, prompts[rows], completions[rows])  # (b, C, D)
        sides = hidden, head, teacher_hidden, teacher.wte.weight
        loss, info = chunked_sdft_loss(*sides, loss_mask[rows], divergence, chunk)
        loss = loss * len(prompts[rows]) / B
        loss.backward()
        total += loss.item()
        parts.append(info["divergence"])
    if tied.requires_grad:
        own = tied.grad.coalesce() if tied.grad.is_sparse else tied.grad
        tied.grad = head.grad.add_(own)
    average_gradients(student)
    clip_and_step(student, optimizer, total, grad_clip)
    if alpha:  # A frozen teacher is not written to, since it may be the base.
        own = [nn.ParameterList(lora.trained(m).values()) for m in (teacher, student)]
        ema_update(*own, alpha)
    info = {"divergence": torch.cat(parts), "completions": completions}
    return total, info | {"mask": mask, "loss_mask": loss_mask}


def sft_step(student, optimizer, prompts, demonstrations, eos_id, grad_clip=1.0, micro_batch=None):
    """One SFT update on the demonstrations, B lists of token ids that end with eos_id."""
    device, total, B = student.wte.weight.device, 0.0, len(prompts)
    pairs = list(zip(prompts, demonstrations))
    for contexts, completions in batches(pairs, micro_batch or B, student.config.block_size):
        tokens, mask = pad_right(completions, eos_id, device)
        logits = completion_logits(student, contexts, tokens)
        loss = sft_loss(logits, tokens, mask) * len(contexts) / B
        loss.backward()
        total += loss.item()
    average_gradients(student)
    clip_and_step(student, optimizer, total, grad_clip)
    return total, {"mask": pad_right(demonstrations, eos_id, device)[1]}
