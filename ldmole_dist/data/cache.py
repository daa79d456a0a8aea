"""Token ids on the disk, under a name that says all that they depend on: other rows, another tokenizer, chat template or
setting have another name, so nothing stale is ever read."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldmole_dist.data.encode import Encoded, Encoder
from ldmole_dist.data.rows import Row
from ldmole_dist.errors import UserError

LAYOUT = 1  # of the files; to be raised when what `Encoder` makes of a row changes


def encode_cached(
    encoder: Encoder, rows: Sequence[Row], folder: str | None, doing: str, quiet: bool, write: bool
) -> list[Encoded]:
    """As `encoder` does, or as it did before.

    Args:
        encoder: of the rows.
        rows: to encode.
        folder: of the cache; None: there is none.
        doing: what the progress bar says.
        quiet: no progress bar.
        write: keep what is not there yet; one process of those that share the folder does.

    Raises:
        UserError: see `Encoder`; or where the folder cannot be written.
    """
    if folder is None:
        return encoder(rows, doing, quiet)
    path = Path(folder) / f"{name_of(encoder, rows)}.npz"
    found = _read(path, encoder, rows)
    if found is not None:
        return found
    encoded = encoder(rows, doing, quiet)
    if write:
        _write(path, encoded)
    return encoded


def name_of(encoder: Encoder, rows: Sequence[Row]) -> str:
    """A digest of everything that the token ids depend on."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest = hashlib.sha256()
    settings = [LAYOUT, encoder.task, encoder.labels and list(encoder.labels), encoder.max_length, encoder.truncation]
    template = getattr(tokenizer, "chat_template", None)
    identity = backend.to_str() if backend is not None else repr((tokenizer, sorted(tokenizer.get_vocab().items())))
    for part in (json.dumps(settings), identity, repr(template), repr(tokenizer.special_tokens_map)):
        digest.update(part.encode() + b"\0")
    for row in rows:
        digest.update(repr((row.source, row.target, row.choices, row.messages)).encode() + b"\0")
    return digest.hexdigest()[:32]


def _read(path: Path, encoder: Encoder, rows: Sequence[Row]) -> list[Encoded] | None:
    """None where there is nothing, or nothing whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, ends, labels = file["ids"], file["ends"], file["labels"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    if encoder.task == "sequence_classification":
        of_rows: list[list[int] | int] = labels.tolist()
    else:
        of_rows = [part.tolist() for part in np.split(labels, ends[:-1])]
    sequences = [part.tolist() for part in np.split(ids, ends[:-1])]
    return [
        Encoded(sequence, label, row.domain, encoder.choices_of(row))
        for sequence, label, row in zip(sequences, of_rows, rows, strict=True)
    ]


def _write(path: Path, encoded: Sequence[Encoded]) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    labels = [e.labels if isinstance(e.labels, list) else [e.labels] for e in encoded]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.savez(
                file,
                ids=np.concatenate([np.array(e.input_ids, dtype=np.int32) for e in encoded]),
                ends=np.cumsum([len(e.input_ids) for e in encoded]),
                labels=np.concatenate([np.array(of_row, dtype=np.int32) for of_row in labels]),
            )
        unfinished.rename(path)
    except OSError as error:
        raise UserError(
            f"data.cache {path.parent}: {error.strerror or error}; choose another folder, or null"
        ) from error
