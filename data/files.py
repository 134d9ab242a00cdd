"""Files that are written whole or not at all, and JSONL files of which every line stands alone."""

import json
import os
from pathlib import Path


def write_whole(path, write):
    """write(tmp), flush to disk, rename: at any time there is the old file or the whole new one.

    Raises OSError with one sentence, whatever `write` raises.
    """
    path = Path(path)
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
        # A full disk is the context of torch's own error.
        reason = getattr(e.__context__ or e, "strerror", None) or " ".join(str(e).split())[:200]
        sentence = f"cannot write {path} ({reason}); free some space or choose another folder"
        raise OSError(sentence) from None
    finally:
        tmp.unlink(missing_ok=True)


def append(path, rows):
    """Add JSON objects to a JSONL file."""
    # A lone surrogate, which UTF-8 has not, becomes the \\u escape that it is in JSON.
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as f:
        f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(path):
    """The JSON objects of a JSONL file, and how many lines hold none, e.g. a last line cut off."""
    rows, n_unreadable = [], 0
    with open(path, encoding="utf-8", errors="replace", newline="\n") as f:
        for line in f:
            try:
                row = json.loads(line) if line.strip() else {}
                rows += [dict(row)] if row else []
            except (ValueError, TypeError, RecursionError):
                n_unreadable += 1
    return rows, n_unreadable
