"""The data that goes through the model of a report, and that model on its device."""

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

MAX_LENGTH = 4096  # tokens of a sequence where no run says otherwise
WHOLE = ""  # the domain of rows in data without domains
NO_DOMAIN = "(no domain)"  # of rows without one in data with domains


@dataclass(frozen=True)
class DataSet:
    """What goes through the model.

    Attributes:
        path: of the file.
        examples: domain -> sequences; one domain, `WHOLE`, if no row has one.
        max_length: longer sequences were cut at their start to so many tokens.
        full: sequences of that length, cut or not.
    """

    path: str
    examples: dict[str, list[Encoded]]
    max_length: int
    full: int

    @property
    def has_domains(self) -> bool:
        """Whether any row names one."""
        return list(self.examples) != [WHOLE]


def read_data(saved: SavedModel, path: str | None, limit: int | None, tokenizer: PreTrainedTokenizerBase) -> DataSet:
    """Read and encode the rows.

    Args:
        saved: whose task, labels and length count.
        path: of the file; None: the run's evaluation file, or its training file if it has none.
        limit: read so many rows only.
        tokenizer: of the backbone.

    Raises:
        UserError: where there is no file to take, or a row cannot be read.
    """
    task, max_length, labels = saved.task, MAX_LENGTH, None
    given: str | Sequence[Source] = path or ""
    if saved.config is not None:
        data = saved.config.data
        max_length, labels = data.max_length, data.labels
        if path is None:
            given, limit = data.eval or data.train, limit or (data.eval_limit if data.eval else None)
    elif path is None:
        raise UserError(f"{saved.adapter} is an adapter without a run, which has no data of its own: give --data FILE")
    # Other data may have other classes: routing does not depend on them.
    rows = [row for of_source in read_rows(given, task, None, limit, split="eval") for row in of_source]
    if task == "sequence_classification":
        labels = sorted({row.target for row in rows})
    encoder = Encoder(tokenizer, task, labels, min(max_length, tokenizer.model_max_length), truncation=True)
    encoded = encoder(rows, "tokenising", quiet=False)
    full = sum(len(example.input_ids) == encoder.max_length for example in encoded)
    named = ", ".join(source.path or source.task or "" for source in as_sources(given))
    return DataSet(named, _by_domain(rows, encoded), encoder.max_length, full)


def load_model(saved: SavedModel, precision: str, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """The backbone with the adapter, in evaluation mode, on the GPU if there is one.

    Raises:
        UserError: where they cannot be loaded or do not go together.
    """
    # PEFT 0.21 asks transformers 5.23 for an attribute by its old name, at every injection; a user can do nothing about it.
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
    """Of the active adapter."""
    config = model.active_peft_config
    assert isinstance(config, LdMoleConfig)
    return config


def _class_names(adapter: Path) -> list[str]:
    """As many as the adapter's own head has classes."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        heads = [key for key in file.keys() if key.endswith("score.weight")]  # noqa: SIM118  (not a dictionary)
        classes = file.get_slice(heads[0]).get_shape()[0] if heads else 2
    return [f"class {number}" for number in range(classes)]


def _by_domain(rows: Sequence[Row], encoded: Sequence[Encoded]) -> dict[str, list[Encoded]]:
    some = any(row.domain is not None for row in rows)
    by_domain: dict[str, list[Encoded]] = defaultdict(list)
    for row, example in zip(rows, encoded, strict=True):
        by_domain[(NO_DOMAIN if row.domain is None else row.domain) if some else WHOLE].append(example)
    return dict(sorted(by_domain.items()))
