"""Files: GPT-2 checkpoints read with care, everything written whole or not at all, runs resumed."""

import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path

import torch

from gpt2 import lora
from gpt2.data import unique_keys
from model import GPT, GPT2_SIZES, TRANSPOSED, GPTConfig

FIELDS = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")  # in GPTConfig's order
ONLY = {  # what model.py computes; a checkpoint that asks for anything else is an error
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


# --- Writing --------------------------------------------------------------------------------------


def make_folder(folder, exist_ok=True):
    try:
        Path(folder).mkdir(parents=True, exist_ok=exist_ok)
    except OSError as e:
        raise OSError(
            f"cannot make the folder {folder} ({e.strerror or e}); name one that you may write to"
        ) from None


def write_atomically(path, write):
    """write(tmp), flush to disk, rename: at any time there is the old file or the whole new one.

    Raises OSError with one sentence, whatever `write` raised.
    """
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        tmp.touch()
        mode = tmp.stat().st_mode
        write(tmp)
        tmp.chmod(mode)  # safetensors writes a file that nobody else may read
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except Exception as e:  # torch.save and safetensors each have their own
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())[:200]
        raise OSError(
            f"cannot write {path} ({reason}); free some space or choose another folder"
        ) from None
    finally:
        tmp.unlink(missing_ok=True)


def save_tensors(tensors, path):
    with open(path, "wb") as f:  # by its path, torch.save would not tell why it fails
        torch.save(tensors, f)


def append_line(path, row):
    """Add a JSON object to a JSONL file."""
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as e:
        raise OSError(
            f"cannot write {path} ({e.strerror or e}); free some space or choose another folder"
        ) from None


def forget_after(path, step, last):
    """Drop the lines of a log that a run writes again from this step on, and any cut off by a kill.

    The final evaluation, of step `last`, comes after all checkpoints and is always written again.
    """
    if not path.exists():
        return
    keep = []
    # splitlines() would also cut at U+2028, which may stand inside a JSON string.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            looked = "eval" in row or "tokens" in row  # metrics.jsonl's, samples.jsonl's
            if row["step"] <= step and not (looked and row["step"] == last):
                keep.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
    write_atomically(path, lambda tmp: tmp.write_text("".join(keep), encoding="utf-8"))


# --- Weights in Hugging Face's format -------------------------------------------------------------


def source_folder(name_or_path):
    """The folder of the weights and perhaps of a vocabulary; None if the model is downloaded."""
    path = Path(name_or_path)
    return None if name_or_path in GPT2_SIZES else path if path.is_dir() else path.parent


def source_files(name_or_path):
    """The files that a run reads of a local model, if they are there."""
    if name_or_path in GPT2_SIZES:
        return []
    path, folder = Path(name_or_path), source_folder(name_or_path)
    files = [folder / name for name in ("config.json", "vocab.json", "merges.txt")]
    return files + ([path / name for name in WEIGHT_FILES] if path.is_dir() else [path])


def load_model(name_or_path):
    """`GPT.from_pretrained`, from a weights file too, with a sentence for everything that is wrong.

    A name in GPT2_SIZES wins over a folder of that name (write ./gpt2 for the folder). Raises
    ValueError or OSError.

    The model's memory is its own. The file's pages, which count as the process's while they are
    mapped, are given back.
    """
    if name_or_path not in GPT2_SIZES:
        config, weights = read_checkpoint(Path(name_or_path))
        check_weights(name_or_path, config, weights)
        return GPT.from_checkpoint(config, {name: w.clone() for name, w in weights.items()})
    try:
        return GPT.from_pretrained(name_or_path)
    except OSError as e:
        raise OSError(
            f"cannot download {name_or_path} ({e}); connect to the network once, or name a local "
            "GPT-2 folder"
        ) from None
    except Exception:  # whatever a damaged file makes the reader raise
        file = Path(torch.hub.get_dir()) / "checkpoints" / f"{name_or_path}.bin"
        raise ValueError(
            f"{file} is damaged or not a plain checkpoint; nothing in it was run; delete it to "
            "download it again"
        ) from None


def map_model(name_or_path):
    """`load_model`, frozen, for a short use: a local file's weights are mapped and not copied.

    They are read as they are needed, in the file's layout, and the memory is the system's to take
    back. A download, or a file of another form, is read as a whole.
    """
    if name_or_path in GPT2_SIZES:
        return load_model(name_or_path).requires_grad_(False)
    config, weights = read_checkpoint(Path(name_or_path))
    weights = check_weights(name_or_path, config, weights)
    with torch.device("meta"):
        model = GPT(config)
    weights = {k: (w.t() if k.endswith(TRANSPOSED) else w).float() for k, w in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def read_checkpoint(path):
    """GPTConfig and {name: tensor} of a folder, or of a weights file beside its config.json."""
    folder, files = path.parent, [path]
    if path.is_dir():
        folder, files = path, [path / name for name in WEIGHT_FILES]
    files = [file for file in files if file.is_file()]
    if not files:
        raise FileNotFoundError(
            f"{path} is no GPT-2 checkpoint, which has {' or '.join(WEIGHT_FILES)} and config.json;"
            " check the path"
        )
    config = read_config(folder / "config.json")
    try:
        if files[0].suffix == ".safetensors":
            from safetensors.torch import load_file  # optional

            weights = load_file(files[0])
        else:
            weights = load_tensors(files[0])
        if not (isinstance(weights, dict) and all(isinstance(name, str) for name in weights)):
            raise TypeError
    except ImportError:
        raise ValueError(f"{files[0]} needs safetensors: pip install safetensors") from None
    except Exception as e:  # whatever a damaged file makes the readers raise
        if memory_is_full(e):
            raise
        raise ValueError(
            f"{files[0]} is damaged or not a plain checkpoint of tensors; nothing in it was run; "
            "fetch it again"
        ) from None
    return config, weights


def load_tensors(path):
    """torch.load that runs no code of a pickle, and notices changed bytes in a zip file.

    torch.load does not compare the checksums that torch.save writes.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped and zipfile.ZipFile(path).testzip():
        raise ValueError
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)  # others cannot be


def memory_is_full(e):
    """PyTorch's allocators raise a RuntimeError, on a CPU and on other devices."""
    texts = ("out of memory", "allocate memory")
    torchs = isinstance(e, RuntimeError) and any(text in str(e) for text in texts)
    return isinstance(e, MemoryError) or torchs


def read_config(path):
    try:
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        sizes = {name: fields[name] for name in FIELDS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{path} is missing or no GPT-2 configuration; it belongs beside the weights"
        ) from None
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size < 2**31:
            raise ValueError(f"{path}: {name} must be a positive whole number; fetch it again")
    if fields.get("n_inner") == 4 * fields["n_embd"]:
        fields["n_inner"] = None  # which means the same
    for name, value in ONLY.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{path}: {name}={fields[name]!r} is not supported, only {value!r}")
    return GPTConfig(*sizes.values())


def check_weights(source, config, weights):
    """Names, shapes and values of the weights, before `GPT.from_checkpoint` builds the model.

    Returns the weights by GPT's own names.
    """
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    causal_masks = (".attn.bias", ".attn.masked_bias")
    weights = {name: w for name, w in weights.items() if not name.endswith(causal_masks)}
    for name, w in weights.items():
        if not is_plain(w):
            raise ValueError(
                f"{source}: {name} is no plain tensor of floating-point numbers; fetch it again"
            )
    lm_head = weights.pop("lm_head.weight", None)
    # Sizes first: a wrong one may ask for a model of billions of layers.
    layers = {name.split(".")[1] for name in weights if name.startswith("h.")}
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    sizes = len(layers), shapes.get("wte.weight"), shapes.get("wpe.weight")
    D = config.n_embd
    if sizes != (config.n_layer, (config.vocab_size, D), (config.block_size, D)):
        raise ValueError(
            f"{source}: weights and config.json are of different sizes; fetch both again"
        )
    with torch.device("meta"):
        expected = GPT(config).state_dict()
    if odd := sorted(set(weights) ^ set(expected)):
        what = "lacks the" if odd[0] in expected else "has an unknown"
        raise ValueError(f"{source} {what} weight {odd[0]}; it must be a GPT-2 language model")
    for name, w in weights.items():
        shape = tuple(expected[name].shape)
        shape = shape[::-1] if name.endswith(TRANSPOSED) else shape
        if shapes[name] != shape:
            raise ValueError(f"{source}: {name} is {shapes[name]}, but config.json means {shape}")
        if not torch.isfinite(w.float()).all():
            raise ValueError(f"{source}: {name} has values that are not finite; fetch it again")
    if lm_head is not None and not torch.equal(lm_head, weights["wte.weight"]):
        raise ValueError(
            f"{source} has an output layer of its own; only one tied to the embedding is supported"
        )
    return weights


def is_plain(w):
    """Dense, in memory, of a usual dtype, and with as many numbers in its storage as it has."""
    if not isinstance(w, torch.Tensor) or w.is_nested or w.layout != torch.strided or w.is_meta:
        return False
    usual = w.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return usual and w.untyped_storage().nbytes() >= w.numel() * w.element_size()


def save_model(model, folder):
    """`model.save_pretrained`, atomically, with all of transformers' fields of the configuration.

    The weights go to model.safetensors if safetensors is installed, else to pytorch_model.bin.
    """
    folder, c = Path(folder), model.config
    sizes = (c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    eos = min(50256, c.vocab_size - 1)  # smaller vocabularies end with it
    fields = ONLY | dict(zip(FIELDS, sizes)) | {"architectures": ["GPT2LMHeadModel"]}
    fields |= {"torch_dtype": "float32", "tie_word_embeddings": True}
    fields |= {"bos_token_id": eos, "eos_token_id": eos}
    make_folder(folder)
    name, stale, weights = *WEIGHT_FILES, model.checkpoint()
    try:
        from safetensors.torch import save_file  # optional

        write_atomically(
            folder / name, lambda tmp: save_file(weights, tmp, metadata={"format": "pt"})
        )
    except ImportError:
        name, stale = stale, name
        write_atomically(folder / name, lambda tmp: save_tensors(weights, tmp))
    text = json.dumps(fields, indent=2) + "\n"
    write_atomically(folder / "config.json", lambda tmp: tmp.write_text(text))
    (folder / stale).unlink(missing_ok=True)  # an earlier save's, which readers may prefer


def save_adapters(model, folder, base):
    """The adapters of gpt2/lora.py alone, a small folder in the format of the PEFT library."""
    rank, alpha = model.lora
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    fields |= {"r": rank, "lora_alpha": alpha, "target_modules": ["c_attn", "c_proj", "c_fc"]}
    fields |= {"fan_in_fan_out": True}  # GPT-2 keeps its weights as (in, out)
    prefix = "base_model.model.transformer"
    adapters = {f"{prefix}.{name}.weight": w.cpu() for name, w in lora.state(model).items()}
    make_folder(folder)
    write_atomically(folder / "adapter_model.bin", lambda tmp: save_tensors(adapters, tmp))
    text = json.dumps(fields, indent=2) + "\n"
    write_atomically(folder / "adapter_config.json", lambda tmp: tmp.write_text(text))


def copy_tokenizer(source, folder):
    """A checkpoint's own vocabulary, or none, goes where its weights go; None is a download."""
    for name in TOKENIZER_FILES:
        if source and (source / name).is_file():
            write_atomically(folder / name, lambda tmp: shutil.copyfile(source / name, tmp))
        else:  # another model's would make other text of the tokens
            (folder / name).unlink(missing_ok=True)


# --- Checkpoints of a run -------------------------------------------------------------------------


def crc32(path):
    value = 0
    try:
        with open(path, "rb") as f:
            while block := f.read(1 << 24):
                value = zlib.crc32(block, value)
    except OSError as e:
        raise OSError(f"cannot read {path} ({e.strerror or e}); check the path") from None
    return f"{value:08x}"


def run_checkpoints(folder):
    """Oldest first."""
    return sorted(folder.glob("[0-9]*-[0-9a-f]*.pt"))


def save_run(folder, state):
    """Write a checkpoint, STEP-CRC.pt, and keep the newest two. `state` is a dict with its step."""
    make_folder(folder)
    new = folder / "new"
    write_atomically(new, lambda tmp: save_tensors(state, tmp))
    os.replace(new, folder / f"{state['step']:08d}-{crc32(new)}.pt")
    for old in [*run_checkpoints(folder)[:-2], *folder.glob(".*.tmp")]:
        old.unlink()


def load_run(folder):
    """The newest checkpoint's state; None if there is none. ValueError if it is damaged."""
    files = run_checkpoints(folder)
    if not files:
        return None
    try:
        if crc32(files[-1]) != files[-1].stem.split("-")[1]:
            raise ValueError
        return torch.load(files[-1], map_location="cpu", weights_only=True)
    except Exception as e:
        if memory_is_full(e):
            raise
        raise ValueError(f"checkpoint {files[-1]} is damaged; {way_back(folder)}") from None


def way_back(folder):
    """What to do if the newest checkpoint is of no use."""
    files = run_checkpoints(folder)
    if len(files) > 1:
        return f"delete it and --resume goes on from {files[-2].name}"
    return "start again in another --out_dir"
