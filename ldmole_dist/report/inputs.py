"""Load the data and the model of a report."""

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

MAX_LENGTH = 4096  # maximum tokens per sequence for an adapter without a run config
ALL_ROWS = ""  # domain of all rows if no row has a domain
NO_DOMAIN = "(no domain)"  # domain of rows without a domain, if other rows have one


@dataclass(frozen=True)
class DataSet:
    """Encoded rows of a report.

    Attributes:
        path: Comma-separated paths of the data files; the task's name for a task loaded from the Hugging Face Hub.
        examples: Domain -> sequences; the only domain is `ALL_ROWS` if no row has a domain.
        max_length: Maximum tokens per sequence; longer plain texts are cut at the end, other sequences at the start.
        full: Number of sequences with exactly `max_length` tokens, truncated or not.
    """

    path: str
    examples: dict[str, list[Encoded]]
    max_length: int
    full: int

    @property
    def has_domains(self) -> bool:
        """Whether any row has a domain."""
        return list(self.examples) != [ALL_ROWS]


def read_data(saved: SavedModel, path: str | None, limit: int | None, tokenizer: PreTrainedTokenizerBase) -> DataSet:
    """Read and encode the rows of a report.

    Args:
        saved: Run or adapter of the report, which determines the task. The config of a run also determines the maximum length
            and, for causal_lm, the labels. For sequence classification, the labels are those that occur in the data.
        path: Path of the data file. None reads the run's evaluation data, or its training data if it has none.
        limit: Maximum number of rows of each source. None means `data.eval_limit` for the run's evaluation data, and no
            limit for other data.
        tokenizer: Tokenizer of the backbone.

    Raises:
        UserError: If `path` is None for an adapter without a run, or the data cannot be read or encoded.
    """
    task, max_length, labels = saved.task, MAX_LENGTH, None
    given: str | Sequence[Source] = path or ""
    if saved.config is not None:
        data = saved.config.data
        max_length, labels = data.max_length, data.labels
        if path is None:
            given, limit = data.eval or data.train, limit or (data.eval_limit if data.eval else None)
    elif path is None:
        raise UserError(
            f"{saved.adapter} is an adapter outside a run folder, so there is no default data; set --data FILE."
        )
    # Do not check the labels against the run's labels: other data can have other classes, which do not affect the
    # routing.
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
        UserError: If one of them cannot be loaded, or the adapter does not match the backbone.
    """
    # Whenever PEFT 0.21 adds an adapter, it reads `is_gradient_checkpointing`, which transformers 5.23 deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing` is deprecated")
    task = saved.task
    classes = _class_names(saved.adapter) if task == "sequence_classification" else None
    attention = saved.config.backbone.attention if saved.config else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(
        saved.backbone,
        task,
        precision,
        labels=classes,
        attention=attention,
        pad_token_id=tokenizer.pad_token_id,
        quantization=saved.quantization,
        device=device,
    )
    model: Any = load_adapter(backbone, str(saved.adapter), trainable=False)
    model = model.to(device).eval()
    assert isinstance(model, PeftModel)
    return model


def adapter_config(model: PeftModel) -> LdMoleConfig:
    """Return the config of the active adapter."""
    config = model.active_peft_config
    assert isinstance(config, LdMoleConfig)
    return config


def _class_names(adapter: Path) -> list[str]:
    """Return a placeholder name for each class of the adapter's classification head, or two names if no head is saved."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        heads = [key for key in file.keys() if key.endswith("score.weight")]  # noqa: SIM118  (safe_open is not a dict)
        classes = file.get_slice(heads[0]).get_shape()[0] if heads else 2
    return [f"class {number}" for number in range(classes)]


def _by_domain(rows: Sequence[Row], encoded: Sequence[Encoded]) -> dict[str, list[Encoded]]:
    """Return domain -> its encoded rows, sorted by domain. See `ALL_ROWS` and `NO_DOMAIN` for rows without a domain."""
    default = NO_DOMAIN if any(row.domain is not None for row in rows) else ALL_ROWS
    by_domain: dict[str, list[Encoded]] = defaultdict(list)
    for row, example in zip(rows, encoded, strict=True):
        by_domain[default if row.domain is None else row.domain].append(example)
    return dict(sorted(by_domain.items()))
