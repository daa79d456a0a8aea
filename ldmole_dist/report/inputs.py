"""Data and model of a report."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from ldmole_dist.config import Source
from ldmole_dist.data.encode import Encoded, Encoder
from ldmole_dist.data.rows import Row
from ldmole_dist.data.sources import as_sources, read_rows
from ldmole_dist.errors import UserError
from ldmole_dist.model.backbone import load_adapter, load_backbone
from ldmole_dist.model.saved import SavedModel
from ldmole_dist.tuner.config import LdMoleConfig

MAX_LENGTH = 4096  # tokens per sequence without a run config
ALL_ROWS = ""  # domain of every row if no row names one
NO_DOMAIN = "(no domain)"  # domain of rows without one if other rows name one


@dataclass(frozen=True)
class DataSet:
    """Encoded rows of a report.

    Attributes:
        path: File or files of the data.
        examples: Domain -> sequences; the single domain `ALL_ROWS` if no row names one.
        max_length: Sequences are truncated at the left to this number of tokens.
        full: Number of sequences with exactly `max_length` tokens, truncated or not.
    """

    path: str
    examples: dict[str, list[Encoded]]
    max_length: int
    full: int

    @property
    def has_domains(self) -> bool:
        """Whether any row names a domain."""
        return list(self.examples) != [ALL_ROWS]


def read_data(saved: SavedModel, path: str | None, limit: int | None, tokenizer: PreTrainedTokenizerBase) -> DataSet:
    """Read and encode the rows of a report.

    Args:
        saved: Run or adapter, which sets task, labels and maximum length.
        path: Data file; None for the run's evaluation data, or its training data if it has none.
        limit: Maximum number of rows; None for all, or for `data.eval_limit` of the run's evaluation data.
        tokenizer: Tokenizer of the backbone.

    Raises:
        UserError: If there is no file, or a row cannot be read.
    """
    task, max_length, labels = saved.task, MAX_LENGTH, None
    given: str | Sequence[Source] = path or ""
    if saved.config is not None:
        data = saved.config.data
        max_length, labels = data.max_length, data.labels
        if path is None:
            given, limit = data.eval or data.train, limit or (data.eval_limit if data.eval else None)
    elif path is None:
        raise UserError(f"{saved.adapter} is an adapter without a run and has no data of its own; give --data FILE.")
    # Labels are not checked against the run's: other data may have other classes, which do not affect routing.
    rows = [row for source in read_rows(given, task, None, limit, split="eval") for row in source]
    if task == "sequence_classification":
        labels = sorted({row.target for row in rows})
    encoder = Encoder(tokenizer, task, labels, min(max_length, tokenizer.model_max_length), truncation=True)
    encoded = encoder(rows, "tokenizing", quiet=False)
    full = sum(len(example.input_ids) == encoder.max_length for example in encoded)
    names = ", ".join(source.path or source.task or "" for source in as_sources(given))
    return DataSet(names, _by_domain(rows, encoded), encoder.max_length, full)


def load_model(saved: SavedModel, precision: str, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """Load the backbone and the adapter in evaluation mode, on the GPU if there is one.

    Raises:
        UserError: If they cannot be loaded or do not fit together.
    """
    # PEFT 0.21 reads an attribute that transformers 5.23 renamed, in every injection.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing` is deprecated")
    task = saved.task
    classes = _class_names(saved.adapter) if task == "sequence_classification" else None
    attention = saved.config.backbone.attention if saved.config else None
    backbone = load_backbone(
        saved.backbone, task, precision, labels=classes, attention=attention, pad_token_id=tokenizer.pad_token_id
    )
    model: Any = load_adapter(backbone, str(saved.adapter), trainable=False)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    assert isinstance(model, PeftModel)
    return model


def adapter_config(model: PeftModel) -> LdMoleConfig:
    """Return the config of the active adapter."""
    config = model.active_peft_config
    assert isinstance(config, LdMoleConfig)
    return config


def _class_names(adapter: Path) -> list[str]:
    """Return one placeholder name for each class of the adapter's classification head."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        heads = [key for key in file.keys() if key.endswith("score.weight")]  # noqa: SIM118  (safe_open is not a dict)
        classes = file.get_slice(heads[0]).get_shape()[0] if heads else 2
    return [f"class {number}" for number in range(classes)]


def _by_domain(rows: Sequence[Row], encoded: Sequence[Encoded]) -> dict[str, list[Encoded]]:
    default = NO_DOMAIN if any(row.domain is not None for row in rows) else ALL_ROWS
    by_domain: dict[str, list[Encoded]] = defaultdict(list)
    for row, example in zip(rows, encoded, strict=True):
        by_domain[default if row.domain is None else row.domain].append(example)
    return dict(sorted(by_domain.items()))
