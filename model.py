"""GPT-2's architecture at any size, with a key-value cache that is an argument, not a hidden state.

Learned positions, pre-norm blocks, tanh GELU, output head tied to the token embedding; module names are those of
Hugging Face's GPT-2 checkpoints. There is no dropout: the teacher's targets must not be noisy.

Ragged batches are padded on the LEFT, and `pad` (B,) counts the padding tokens of each row. Positions count real
tokens only and attention never sees padding, so a row's logits do not depend on the rows beside it.

Shapes: B batch, T new tokens, S cached and new columns, D width, H heads, V vocabulary.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

OPENAI = {  # the released sizes: layers, heads, width
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}  # fmt: skip
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # kept transposed in checkpoints
CONFIG_FIELDS = {"block_size": "n_positions"} | {k: k for k in ("vocab_size", "n_layer", "n_head", "n_embd")}  # our name: theirs
ONLY = {  # what this network computes; a checkpoint that asks for anything else is refused
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}  # fmt: skip


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
        # attention over bfloat16 keys takes several times as long on a CPU (`python -m bench`)
        slow = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        dtype = torch.float32 if slow else weight.dtype
        self.kv = torch.empty(shape, device=weight.device, dtype=dtype)
        self.length = 0  # columns filled, the same for every row

    def columns(self, T):
        """How many columns attention reads once T more are in."""
        return self.length + T

    def append(self, layer, k, v):
        end = self.length + k.size(2)
        self.kv[layer, 0, :, :, self.length : end] = k
        self.kv[layer, 1, :, :, self.length : end] = v
        return self.kv[layer, :, :, :, :end]  # (2, B, H, S, D/H)


def linear(x, weight, bias=None):
    """F.linear. In float32 on a CPU the few rows of a decoding step take about half the time with the weights on the left of the
    product, where these are wider than they are deep (`python -m bench`)."""
    few = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() <= 16 * x.size(-1)
    if not few or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    y = (weight @ x.reshape(-1, x.size(-1)).t()).t().reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class WideLinear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = WideLinear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, layer, mask, cache):
        B, T, D = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask, is_causal=mask is None and T == k.size(2))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D).to(q.dtype))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = WideLinear(config.n_embd, 4 * config.n_embd)
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
        return linear(x, self.wte.weight)

    def hidden(self, idx, pad=None, cache=None):
        """Final hidden states (B, T, D).

        idx    (B, T) token ids; with a cache, the columns that follow those already in it
        pad    (B,) padding tokens at the left of each row, the same at every call on one cache; None: there are none
        cache  KVCache to read and extend; None: idx starts at column 0
        """
        B, T = idx.shape
        start, S = (cache.length, cache.columns(T)) if cache is not None else (0, T)
        if S > self.config.block_size:
            raise ValueError(f"{S} tokens do not fit block_size={self.config.block_size}; shorten the prompt or the completion")
        column = start + torch.arange(T, device=idx.device)
        position, mask = column, None  # no mask: plain causal attention, for which SDPA has its fast paths
        if pad is not None or S > T > 1 or torch.is_tensor(start):  # a tensor: cuda_graphs.py
            key = torch.arange(S, device=idx.device)
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

    def kv_cache(self, batch_size, max_len):
        return KVCache(self, batch_size, max_len)

    def next_logits(self, idx, pad, cache):
        """Logits (B, V) in float32 of the token after idx (B, T), whose columns the cache takes in: what decoding calls."""
        return self.head(self.hidden(idx, pad, cache)[:, -1]).float()

    @classmethod
    def from_pretrained(cls, name_or_path):
        """GPT-2's weights: one of the names in OPENAI, downloaded once, or a folder or weights file in Hugging Face's format.

        A name wins over a folder of the same name (write ./gpt2 for that). Raises ValueError or OSError with one sentence.
        """
        if str(name_or_path) in OPENAI:
            config, state = download(str(name_or_path))
        else:
            config, state = read_checkpoint(Path(name_or_path))
        state = {k.removeprefix("transformer."): v for k, v in state.items()}
        state = {k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}  # causal masks
        head = state.pop("lm_head.weight", None)
        c, layers = config, {k.split(".")[1] for k in state if k.startswith("h.")}
        said = c.n_layer, (c.vocab_size, c.n_embd), (c.block_size, c.n_embd)
        if said != (len(layers), *(tuple(state[k].shape) if k in state else None for k in ("wte.weight", "wpe.weight"))):
            # before anything of that size is built
            raise ValueError(f"{name_or_path}: weights and config.json are of different sizes; fetch both again")
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
            model = cls(config)
        own = model.state_dict()
        if odd := sorted(set(state) ^ set(own)):
            what = "lacks" if odd[0] in own else "has the unknown"
            raise ValueError(f"{name_or_path} {what} weight {odd[0]}; it must be a GPT-2 language model")
        for k, v in state.items():
            state[k] = v = (v.t() if k.endswith(CONV1D) else v).float().contiguous()
            if v.shape != own[k].shape:
                raise ValueError(f"{name_or_path}: {k} is {tuple(v.shape)}, config.json asks for {tuple(own[k].shape)}; fetch it again")
            if not torch.isfinite(v).all():
                raise ValueError(f"{name_or_path}: {k} holds values that are not finite; fetch it again")
        if head is not None and not torch.equal(head.float(), state["wte.weight"]):
            raise ValueError(f"{name_or_path} has an output head of its own; only heads tied to the embedding are supported")
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder):
        """config.json and the weights, as transformers' GPT2LMHeadModel reads them: model.safetensors where safetensors is
        installed, otherwise pytorch_model.bin. Raises OSError with one sentence."""
        folder, eos = Path(folder), min(50256, self.config.vocab_size - 1)  # padded vocabularies end elsewhere
        state = {k: (v.t() if k.endswith(CONV1D) else v).detach().cpu().contiguous() for k, v in self.state_dict().items()}
        state = {f"transformer.{k}": v for k, v in state.items()}
        fields = ONLY | {theirs: getattr(self.config, ours) for ours, theirs in CONFIG_FIELDS.items()}
        fields |= {"architectures": ["GPT2LMHeadModel"], "torch_dtype": "float32", "tie_word_embeddings": True}
        fields |= {"bos_token_id": eos, "eos_token_id": eos}
        make_folder(folder)
        name, stale = "model.safetensors", "pytorch_model.bin"
        try:
            from safetensors.torch import save_file
        except ImportError:
            name, stale, save_file = stale, name, lambda state, tmp, metadata: torch.save(state, tmp)
        write_atomically(folder / name, lambda tmp: save_file(state, tmp, metadata={"format": "pt"}))
        write_atomically(folder / "config.json", lambda tmp: tmp.write_text(json.dumps(fields, indent=2) + "\n"))
        (folder / stale).unlink(missing_ok=True)  # of an earlier save: readers would take it for this one's


# --- Checkpoint files -----------------------------------------------------------------------------------------------


def download(name):
    """Configuration and weights of an OpenAI model; torch.hub shows a progress bar and keeps the file."""
    n_layer, n_head, n_embd = OPENAI[name]
    url = f"https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
    try:
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", file_name=f"{name}.bin", weights_only=True)
    except OSError as e:
        raise OSError(f"cannot download {name} ({e}); connect to the network once, or name a local GPT-2 folder") from None
    except Exception:
        file = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.bin"
        raise ValueError(f"{file} is damaged or not a plain checkpoint; nothing in it was run; delete it to download again") from None
    return GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd), state


def read_checkpoint(path):
    """Configuration and weights {name: tensor} of a folder, or of a weights file with its config.json beside it."""
    names = ("model.safetensors", "pytorch_model.bin")
    folder = path if path.is_dir() else path.parent
    file = next((path / n for n in names if (path / n).is_file()), None) if path.is_dir() else path
    if file is None or not file.is_file():
        raise FileNotFoundError(f"{path} is no GPT-2 checkpoint: there must be {' or '.join(names)} and config.json; check the path")
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = {ours: fields[theirs] for ours, theirs in CONFIG_FIELDS.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{folder / 'config.json'} is missing or no GPT-2 configuration; it belongs beside {file.name}") from None
    if bad := [k for k, v in sizes.items() if type(v) is not int or not 0 < v < 2**31]:
        raise ValueError(f"{folder / 'config.json'}: {bad[0]} must be a positive whole number; fetch the file again")
    if fields.get("n_inner") == 4 * sizes["n_embd"]:
        fields["n_inner"] = None  # the same thing, said otherwise
    if bad := [k for k, v in ONLY.items() if fields.get(k, v) != v]:
        raise ValueError(f"{folder / 'config.json'}: {bad[0]}={fields[bad[0]]!r} is not supported, only {ONLY[bad[0]]!r}")
    config = GPTConfig(**sizes)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)  # never runs what a pickle asks for
        assert all(isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided for k, v in state.items())
    except ImportError:
        raise ValueError(f"{file} needs safetensors: pip install safetensors") from None
    except MemoryError:
        raise ValueError(f"{file} does not fit into memory; choose a smaller model") from None
    except Exception:  # whatever a damaged file makes the readers raise
        raise ValueError(f"{file} is damaged or not a plain checkpoint of tensors; nothing in it was run; fetch it again") from None
    return config, state


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(f"cannot make the folder {folder} ({e.strerror}); name one that you may write to") from None


def write_atomically(path, write):
    """write(tmp), to the disk, then rename: whoever looks, after a power cut too, sees the old file or the whole new one."""
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        tmp.touch()
        mode = tmp.stat().st_mode
        write(tmp)
        tmp.chmod(mode)  # safetensors leaves a file that nobody else may read
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except Exception as e:  # torch.save and safetensors report a full disk each in its own way
        reason = " ".join(str(e).split())[:200]
        raise OSError(f"cannot write {path} ({reason}); free some space or choose another folder") from None
    finally:
        tmp.unlink(missing_ok=True)
