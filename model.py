"""GPT-2's architecture at any size, with a key-value cache that is an argument, not a hidden state.

Learned positions, pre-norm blocks, tanh GELU, output head tied to the token embedding; module names are those of
Hugging Face's GPT-2 checkpoints. There is no dropout: the teacher's targets must not be noisy.

Ragged batches are padded on the LEFT, and `pad` (B,) counts the padding tokens of each row. Positions count real
tokens only and attention never sees padding, so a row's logits do not depend on the rows beside it.

Shapes: B batch, T new tokens, S cached and new columns, D width, H heads, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; change one of them")


class KVCache:
    """Keys and values of the tokens seen so far, allocated once: decoding writes in place and copies nothing."""

    def __init__(self, model, batch_size, max_len):
        c, weight = model.config, model.wte.weight
        shape = (c.n_layer, 2, batch_size, c.n_head, max_len, c.n_embd // c.n_head)
        self.kv = torch.empty(shape, device=weight.device, dtype=weight.dtype)
        self.length = 0  # columns filled, the same for every row

    def append(self, layer, k, v):
        end = self.length + k.size(2)
        self.kv[layer, 0, :, :, self.length : end] = k
        self.kv[layer, 1, :, :, self.length : end] = v
        return self.kv[layer, :, :, :, :end]  # (2, B, H, S, D/H)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, layer, mask, cache):
        B, T, D = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T == k.size(2))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, layer, mask, cache):
        x = x + self.attn(self.ln_1(x), layer, mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # GPT-2's init; residual projections shrink with depth so that the sum keeps its scale
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5 if "c_proj" in name else 0.02)

    def forward(self, idx, pad=None, cache=None):
        """Next-token logits (B, T, V) of token ids idx (B, T); see `hidden` for the other arguments."""
        return self.head(self.hidden(idx, pad, cache))

    def head(self, x):
        """Logits (..., V) of final hidden states (..., D). Apart from `hidden`, so that callers project only what they score."""
        return F.linear(x, self.wte.weight)

    def hidden(self, idx, pad=None, cache=None):
        """Final hidden states (B, T, D).

        idx    (B, T) token ids; with a cache, the columns that follow those already in it
        pad    (B,) padding tokens at the left of each row, the same at every call on one cache; None: there are none
        cache  KVCache to read and extend; None: idx starts at column 0
        """
        B, T = idx.shape
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(
                f"{start + T} tokens do not fit block_size={self.config.block_size}; shorten the prompt or the completion"
            )
        column = torch.arange(start, start + T, device=idx.device)
        position, mask = column, None  # no mask: plain causal attention, for which SDPA has its fast paths
        if pad is not None or (start > 0 and T > 1):
            key = torch.arange(start + T, device=idx.device)
            mask = key <= column[:, None]  # (T, S)
        if pad is not None:
            position = (column - pad[:, None]).clamp(min=0)  # (B, T)
            # a padding query may attend to itself: a softmax over nothing would be NaN
            mask = mask & (key >= pad[:, None, None]) | (key == column[:, None])  # (B, T, S)
            mask = mask[:, None]  # (B, 1, T, S), the same for every head

        x = self.wte(idx) + self.wpe(position)
        for layer, block in enumerate(self.h):
            x = block(x, layer, mask, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)
