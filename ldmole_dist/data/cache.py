"""Cache of token ids on disk.

The name of a cache file is a hash of everything that the token ids depend on: rows, tokenizer, chat template and settings. If
any of them changes, so does the name of the file, and stale ids are never read.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldmole_dist.data.encode import Encoded, Encoder
from ldmole_dist.data.rows import Row
from ldmole_dist.io import atomic_file, write_errors

LAYOUT = 1  # version of the cached content; increase it when `Encoder` encodes rows differently


def encode_cached(
    encoder: Encoder, rows: Sequence[Row], folder: str | None, progress: str, quiet: bool, write: bool
) -> list[Encoded]:
    """Return the encoded rows: from the cache if it holds them, otherwise newly encoded.

    Args:
        encoder: encoder of the rows.
        rows: rows to encode.
        folder: cache folder; None disables the cache.
        progress: label of the progress bar.
        quiet: hide the progress bar.
        write: save newly encoded rows to the cache; set it on only one of the processes that share the folder.

    Raises:
        UserError: if a row cannot be encoded (`Encoder.encode`), or the folder cannot be written.
    """
    if folder is None:
        return encoder(rows, progress, quiet)
    path = Path(folder) / f"{cache_key(encoder, rows)}.npz"
    cached = _read(path, encoder, rows)
    if cached is not None:
        return cached
    encoded = encoder(rows, progress, quiet)
    if write:
        _write(path, encoded)
    return encoded


def cache_key(encoder: Encoder, rows: Sequence[Row]) -> str:
    """Return a hash of everything that the token ids of the rows depend on."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest = hashlib.sha256()
    settings = [LAYOUT, encoder.task, encoder.labels and list(encoder.labels), encoder.max_length, encoder.truncation]
    template = getattr(tokenizer, "chat_template", None)
    # Slow tokenizers have no serialized backend; their vocabulary is hashed instead.
    identity = backend.to_str() if backend is not None else repr((tokenizer, sorted(tokenizer.get_vocab().items())))
    for part in (json.dumps(settings), identity, repr(template), repr(tokenizer.special_tokens_map)):
        digest.update(part.encode() + b"\0")
    for row in rows:
        digest.update(repr((row.source, row.target, row.choices, row.messages)).encode() + b"\0")
    return digest.hexdigest()[:32]


def _read(path: Path, encoder: Encoder, rows: Sequence[Row]) -> list[Encoded] | None:
    """Return the encoded rows, with ids and labels from the file; None if the file is missing or cannot be read.

    The domains and choices come from `rows`, because the file does not hold them.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, ends, labels = file["ids"], file["ends"], file["labels"]
        row_ids = [part.tolist() for part in np.split(ids, ends[:-1])]
        if encoder.task == "sequence_classification":
            row_labels: list[list[int] | int] = labels.tolist()
        else:
            row_labels = [part.tolist() for part in np.split(labels, ends[:-1])]
        return [
            Encoded(input_ids, label, row.domain, encoder.choice_ids(row))
            for input_ids, label, row in zip(row_ids, row_labels, rows, strict=True)
        ]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _write(path: Path, encoded: Sequence[Encoded]) -> None:
    labels = [e.labels if isinstance(e.labels, list) else [e.labels] for e in encoded]
    with write_errors(f"the token cache data.cache={path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.savez(
                file,
                ids=np.concatenate([np.array(e.input_ids, dtype=np.int32) for e in encoded]),
                ends=np.cumsum([len(e.input_ids) for e in encoded]),
                labels=np.concatenate([np.array(row_labels, dtype=np.int32) for row_labels in labels]),
            )
