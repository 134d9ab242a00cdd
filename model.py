"""GPT-2's architecture at any size, with an explicit KV cache.

Learned positions, pre-norm blocks, tanh GELU, output layer tied to the token embedding; the names
are those of Hugging Face's GPT-2 checkpoints, which it reads and writes. There is no dropout: the
teacher's targets must not be noisy.

Ragged batches are padded on the left, and n_pad (B,) counts the padding tokens of each row.
Positions count real tokens only and attention never sees padding, so that a row's logits do not
depend on the rows beside it.

B batch, T new tokens, S cached and new columns, D width, H heads, V vocabulary
"""

import json
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

GPT2_SIZES = {  # layers, heads, width
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
SIZES = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")  # GPTConfig in config.json
GPT2_URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks in some checkpoints, not weights
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 keeps these as (in, out)
# What this file computes; a checkpoint whose config.json asks for anything else is refused.
COMPUTED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
COMPUTED |= {"n_inner": None, "add_cross_attention": False, "tie_word_embeddings": True}
COMPUTED |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class KVCache:
    """Keys and values of the columns seen so far, allocated once and written in place."""

    def __init__(self, model, batch_size, max_len):
        c, weight = model.config, model.wte.weight
        if max_len > c.block_size:
            need = f"prompt and response need {max_len} tokens, more than block_size={c.block_size}"
            raise ValueError(f"{need}; shorten the prompt or max_new_tokens")
        shape = (c.n_layer, 2, batch_size, c.n_head, max_len, c.n_embd // c.n_head)
        self.kv = torch.empty(shape, device=weight.device, dtype=weight.dtype)
        self.length = 0  # columns filled, the same for every row

    def append(self, layer, k, v):
        """Store k and v (B, H, T, D/H); the layer's whole past, keys and values (B, H, S, D/H)."""
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
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head)  # (B, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D/H) each
        # Without padding the mask is the causal one, for which PyTorch has faster kernels.
        causal = mask is None and T == k.size(2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))  # (B, H, T, D/H) to (B, T, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (B, T, D)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, layer, mask, cache):
        x = x + self.attn(self.ln_1(x), layer, mask, cache)
        return x + self.mlp(self.ln_2(x))  # (B, T, D)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's init. The residual stream is a sum over 2 n_layer projections; they start smaller
        # the more of them there are, so that the sum keeps its scale.
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                scale = (2 * config.n_layer) ** -0.5 if "c_proj" in name else 1.0
                nn.init.normal_(p, std=0.02 * scale)

    def forward(self, tokens, n_pad=None, cache=None):  # next-token logits (B, T, V)
        return self.lm_head(self.hidden(tokens, n_pad, cache))

    def lm_head(self, hidden):
        """Logits (..., V) of hidden states (..., D), apart from `hidden`: few need all of them."""
        return F.linear(hidden, self.wte.weight)

    def hidden(self, tokens, n_pad=None, cache=None):
        """Final hidden states (B, T, D).

        tokens  (B, T) token ids; with a cache, the columns after those that it holds
        n_pad   (B,) padding tokens at the left of each row, the same at every call with one cache;
                None if there are none
        cache   KVCache to read and to extend; None if tokens start at column 0
        """
        T = tokens.size(1)
        start = 0 if cache is None else cache.length
        S = start + T
        if S > self.config.block_size:
            raise ValueError(f"{S} tokens exceed block_size={self.config.block_size}; shorten them")
        column = torch.arange(start, S, device=tokens.device)  # (T,)
        position, mask = column, None
        if n_pad is not None or S > T > 1:
            key = torch.arange(S, device=tokens.device)
            mask = key <= column[:, None]  # (T, S), causal
        if n_pad is not None:
            position = (column - n_pad[:, None]).clamp(min=0)  # (B, T), of real tokens
            # A padding query attends to itself, since a softmax over nothing is NaN.
            mask = mask & (key >= n_pad[:, None, None]) | (key == column[:, None])  # (B, T, S)
            mask = mask[:, None]  # (B, 1, T, S), the same for every head

        x = self.wte(tokens) + self.wpe(position)  # (B, T, D)
        for layer, block in enumerate(self.h):
            x = block(x, layer, mask, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def kv_cache(self, batch_size, max_len):
        return KVCache(self, batch_size, max_len)

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """GPT-2 by a name in GPT2_SIZES, downloaded once, or from a Hugging Face folder."""
        if name_or_folder in GPT2_SIZES:
            config = GPTConfig(1024, 50257, *GPT2_SIZES[name_or_folder])
            files = dict(url=GPT2_URL.format(name_or_folder), file_name=f"{name_or_folder}.bin")
            load = torch.hub.load_state_dict_from_url
            return cls.from_checkpoint(config, load(**files, map_location="cpu", weights_only=True))
        folder = Path(name_or_folder)
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name, value in COMPUTED.items():
            if (asked := fields.get(name, value)) != value:
                raise ValueError(f"{folder}: {name} is {asked!r}; model.py computes {value!r} only")
        files = [*folder.glob("model[.-]*safetensors")] or [*folder.glob("pytorch_model[.-]*bin")]
        load = lambda file: torch.load(file, map_location="cpu", weights_only=True)  # runs no code
        if not files:
            raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
        if files[0].suffix == ".safetensors":
            import safetensors.torch as st  # optional: pip install safetensors

            load = lambda file: st.load(file.read_bytes())  # not mapped: a file may shrink
        state = {name: w for file in sorted(files) for name, w in load(file).items()}
        return cls.from_checkpoint(GPTConfig(*(fields[name] for name in SIZES)), state)

    @classmethod
    def from_checkpoint(cls, config, state):
        """A model of Hugging Face's GPT-2 weights {name: tensor}; names and shapes must match."""
        state = {k.removeprefix("transformer."): state[k] for k in state if not k.endswith(MASKS)}
        head = state.pop("lm_head.weight", None)
        if head is not None and not head.equal(state.get("wte.weight", head)):
            raise ValueError("lm_head.weight is not wte.weight; only a tied output layer is known")
        for name, w in state.items():
            state[name] = (w.t().contiguous() if name.endswith(TRANSPOSED) else w).float()
        with torch.device("meta"):  # neither memory nor random numbers for what is replaced
            model = cls(config)
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder):
        """Write config.json and pytorch_model.bin, which transformers' GPT2LMHeadModel reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fields = {"model_type": "gpt2"} | dict(zip(SIZES, astuple(self.config)))
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        torch.save(self.checkpoint(), folder / "pytorch_model.bin")
        for stale in folder.glob("model[.-]*safetensors*"):  # of an earlier save; read first
            stale.unlink()

    def checkpoint(self):
        """The weights by Hugging Face's names and in its layout: what `from_checkpoint` reads."""
        return {
            f"transformer.{name}": (w.t() if name.endswith(TRANSPOSED) else w).contiguous().cpu()
            for name, w in self.state_dict().items()
        }
