"""What makes a real run fast, each piece beside the textbook function that it equals.

    here               textbook            what is different
    rollout            sdft.rollout        a random stream per row; inverse-CDF sampling
    RolloutGPT         model.GPT           matrices packed for oneDNN; a copy in bfloat16
    save_memory        model.Block         computes again, in the backward pass, what is cheap
    chunked_sdft_loss  sdft.sdft_loss      the logits of one chunk of tokens at a time
    distill_backward   sdft.distill_loss   micro-batches, and the backward pass
    train_step         sdft.train_step     several processes, and all of the above
    sft_step           sdft.sft_loss       micro-batches, several processes, and the update
    keep_freed_memory                      memory that is freed is used again, not given back

test_fast.py holds every pair equal: tokens, loss, gradients and the weights after a step.
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
from gpt2.data import pad_right
from model import GPT, Block
from sdft import clip_and_step, completion_logits, ema_update, left_pad, sft_loss, token_divergence

CHUNK = 64  # tokens whose logits exist at a time


def row_generators(seed, step, places, device):
    """A random stream for each place in a minibatch, whichever process or micro-batch has it."""
    keys = [np.random.SeedSequence([seed, 2, step, place]) for place in places]
    return [torch.Generator(device).manual_seed(int(k.generate_state(1)[0])) for k in keys]


def inverse_cdf(probs, u):
    """Inverse-CDF sampling: tokens (B,) from probs (B, V) with uniforms u (B,) in [0, 1)."""
    # torch.multinomial draws V random numbers per row and token instead.
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


class RolloutGPT(GPT):
    """A GPT that only decodes, with the weights of another.

    It shares the model's memory if dtype is None or the model's own; otherwise it is a copy, which
    has the adapters of gpt2/lora.py merged into its weights. Matrices packed on a CPU are copies of
    the same size, freed with this model.
    """

    def __init__(self, model, dtype=None):
        with torch.device("meta"):
            super().__init__(model.config)
        self.packed_head = None
        weights = model.state_dict()
        if dtype not in (None, model.wte.weight.dtype):
            weights = {name: w.to(dtype) for name, w in lora.merged(model)}
        elif hasattr(model, "lora"):
            lora.add_adapters(self, *model.lora)
        self.load_state_dict(weights, assign=True)
        self.requires_grad_(False)
        del weights  # A copy's matrices are then free as soon as they are packed.
        weight = self.wte.weight
        if PackedLinear.can_hold(weight):
            for module in [*self.modules()]:
                for name, child in [*module.named_children()]:
                    if isinstance(child, nn.Linear):
                        setattr(module, name, PackedLinear(child.weight, child.bias))
            if not hasattr(self, "lora"):  # Beside adapters it would set the peak of an update.
                self.packed_head = PackedLinear(weight)
        # In bfloat16 a CPU's attention of one layer to 128 keys takes five times as long.
        self.attends_in_float32 = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        if self.attends_in_float32:
            for block in self.h:
                block.attn.c_attn.register_forward_hook(lambda layer, x, qkv: qkv.float())
                block.attn.c_proj.register_forward_pre_hook(lambda layer, x: x[0].bfloat16())

    def lm_head(self, hidden):
        return super().lm_head(hidden) if self.packed_head is None else self.packed_head(hidden)

    def kv_cache(self, batch_size, max_len):
        cache = super().kv_cache(batch_size, max_len)
        if self.attends_in_float32:
            cache.kv = cache.kv.float()
        return cache


def keep_freed_memory():
    """Have glibc keep freed memory for the next tensors, whose pages the system would otherwise map
    and clear again. Other C libraries stay as they are.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def save_memory(model):
    """Change a GPT in place so that it trains in less memory: same weights, outputs, gradients.

    The embedding's gradient is sparse; `distill_backward` adds the output layer's dense one.
    """
    for block in model.h:
        block.__class__ = RecomputingBlock
    model.wte.sparse = model.wte.weight.device.type != "mps"  # which lacks sparse tensors
    return model


class RecomputingBlock(Block):
    """Keeps 12 of 17 values per token and unit of width for the backward pass.

    LayerNorm and GELU of the MLP are computed again there, and an adapter's two small products; no
    large product is, since `checkpoint` stops once it has what the backward pass needs.
    """

    def forward(self, x, layer, mask, cache):
        x = x + self.attn(self.ln_1(x), layer, mask, cache)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        hidden = checkpoint(lambda x: self.mlp.c_fc(self.ln_2(x)), x, **options)  # (B, T, 4D)
        gelu = lambda hidden: F.gelu(hidden, approximate="tanh")
        return x + checkpoint(lambda hidden: self.mlp.c_proj(gelu(hidden)), hidden, **options)


def completion_hidden(model, prompts, completions):
    """Hidden states (B, C, D) whose lm_head is `sdft.completion_logits`."""
    tokens, n_pad = left_pad(prompts, completions.device)  # (B, P)
    tokens = torch.cat([tokens, completions[:, :-1]], 1)  # (B, P + C - 1)
    return model.hidden(tokens, n_pad)[:, -completions.size(1) :]


@torch.no_grad()
def chunked_sdft_loss(hidden, head, teacher_hidden, teacher_head, mask, divergence="reverse"):
    """`sdft.sdft_loss` and its gradients, with the logits of CHUNK tokens at a time.

    hidden, teacher_hidden  (B, C, D), (B, C, D')  final hidden states of both roles
    head, teacher_head      (V, D), (V, D')        weights of their output layers
    mask                    (B, C)                 bool

    Returns the loss, the divergences (B, C) and the loss's gradients with respect to `hidden` and
    to `head`, None if that is frozen. With V = 50,257 the logits of 2,048 tokens take 0.4 GB, and
    the divergence needs several tensors of that size at once. The gradients are taken here, while
    the logits of a chunk exist.
    """
    weight = (mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask))[mask]  # (N,), N tokens
    divergences, grad_states = torch.zeros_like(weight), torch.zeros_like(hidden[mask])
    grad_head = torch.zeros_like(head) if head.requires_grad else None
    operands = hidden[mask], head, teacher_hidden[mask], teacher_head
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # It would cast both output layers for every chunk.
        operands = [w.to(torch.get_autocast_dtype(device)) for w in operands]
    states, head, teacher_states, teacher_head = operands
    for start in range(0, len(states), CHUNK):
        rows = slice(start, start + CHUNK)
        logits = F.linear(states[rows], head)  # (n, V)
        teacher_logits = F.linear(teacher_states[rows], teacher_head)  # (n, V)
        with torch.enable_grad():
            part = token_divergence(logits.requires_grad_(), teacher_logits, divergence)  # (n,)
            (grad,) = torch.autograd.grad((part * weight[rows]).sum(), logits)  # (n, V)
        divergences[rows] = part.detach()
        grad_states[rows] = grad @ head
        if grad_head is not None:  # In place, without a second (V, D); in bfloat16 a sum is lossy.
            grad_head.addmm_(grad.t().to(grad_head.dtype), states[rows].to(grad_head.dtype))
    loss = (divergences * weight).sum()
    grad_hidden = torch.zeros_like(hidden).masked_scatter(mask[:, :, None], grad_states)
    return loss, mask.float().masked_scatter(mask, divergences), grad_hidden, grad_head


def distill_backward(student, teacher, prompts, teacher_prompts, y, mask, divergence, micro_batch):
    """`sdft.distill_loss` of y (B, C) and its backward pass: loss (float), divergences (B, C).

    A pass takes `micro_batch` rows, all if that is None, and the gradients accumulate.
    """
    head, head_grad = student.wte.weight, None  # (V, D), the embedding and the output layer
    total, parts, B = 0.0, [], len(prompts)
    for start in range(0, B, micro_batch or B):
        rows = slice(start, start + (micro_batch or B))
        with torch.no_grad():  # First, while there are no activations of the student beside it.
            teacher_hidden = completion_hidden(teacher, teacher_prompts[rows], y[rows])
        hidden = completion_hidden(student, prompts[rows], y[rows])  # (b, C, D)
        loss, divergences, grad_hidden, grad_head = chunked_sdft_loss(
            hidden, head, teacher_hidden, teacher.wte.weight, mask[rows], divergence
        )
        share = torch.tensor(1 / B) * len(hidden)
        hidden.backward(grad_hidden * share)
        if head.requires_grad:
            grad_head *= share
            head_grad = grad_head if head_grad is None else head_grad.add_(grad_head)
        total += (loss * len(hidden) / B).item()
        parts.append(divergences)
    if head.requires_grad:
        # After `save_memory` the embedding's gradient has only the rows that were read. So far a
        # single dense (V, D) gradient was there.
        read = head.grad.coalesce() if head.grad.is_sparse else head.grad
        head.grad = head_grad.add_(read)
    return total, torch.cat(parts)


def average_gradients(model):
    """Their mean over the processes, if there are several, each with an equal share of the rows."""
    if dist.is_available() and dist.is_initialized():
        for p in lora.trained(model).values():
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
):
    """`sdft.train_step` on this process's rows of the minibatch.

    generators     one per row
    rollout_dtype  of the weights that sample, also under autocast; None is the student's
    micro_batch    rows per forward/backward pass; gradients accumulate, which takes less memory
    """
    with torch.autocast(student.wte.weight.device.type, enabled=False):
        model = RolloutGPT(student, rollout_dtype)
        y, mask = rollout(model, prompts, max_new_tokens, eos_id, temperature, generators)
        del model  # The memory of a copy is free for the activations.
    loss_mask = mask.clone()
    loss_mask[:, :skip_tokens] = False
    loss, divergences = distill_backward(
        student, teacher, prompts, teacher_prompts, y, loss_mask, divergence, micro_batch
    )
    average_gradients(student)
    clip_and_step(student, optimizer, loss, grad_clip)
    # Without the frozen weights, which adapters of both roles share.
    moving = [nn.ParameterList(lora.trained(model).values()) for model in (teacher, student)]
    ema_update(*moving, alpha)
    info = {"divergence": divergences, "completions": y, "mask": mask, "loss_mask": loss_mask}
    return loss, info


def scored(model, pairs, eos_id, size):
    """Logits (B, C, V), tokens and mask (B, C) of at most `size` (prompt, completion) at a time.

    They are fewer if the longest prompt and the longest completion do not fit together.
    """
    while pairs:
        n, most = min(size, len(pairs)), model.config.block_size
        while n > 1 and sum(max(len(pair[i]) for pair in pairs[:n]) for i in (0, 1)) > most:
            n -= 1
        prompts, completions = zip(*pairs[:n])
        tokens, mask = pad_right(completions, eos_id, next(model.parameters()).device)
        yield completion_logits(model, prompts, tokens), tokens, mask
        pairs = pairs[n:]


def sft_step(student, optimizer, prompts, demonstrations, eos_id, grad_clip=1.0, micro_batch=None):
    """One SFT update on the demonstrations, B lists of token ids that end with eos_id."""
    total, B = 0.0, len(prompts)
    pairs = list(zip(prompts, demonstrations))
    for logits, tokens, mask in scored(student, pairs, eos_id, micro_batch or B):
        loss = sft_loss(logits, tokens, mask) * len(tokens) / B
        loss.backward()
        total += loss.item()
    average_gradients(student)
    clip_and_step(student, optimizer, total, grad_clip)
    tokens, mask = pad_right(demonstrations, eos_id, student.wte.weight.device)
    return total, {"completions": tokens, "mask": mask}
