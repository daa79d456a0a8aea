"""Tiny encoders with a head, and tiny encoder-decoders that read text."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests.backbones.sizes import PAD, S_DECODER, Architecture, B, Batch, config, prompt, tokens

LABELS = 3
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "bert-cls": {},
    "deberta-cls": dict(relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2-cls": dict(model_type="deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "distilbert-cls": {},
    "electra-cls": {},
    "llama-cls": {},
    "modernbert-cls": {},
    "qwen3-cls": {},
    "roberta-cls": {},
    "xlm_roberta-cls": dict(model_type="xlm-roberta"),
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": dict(decoder_start_token_id=PAD),
    "mt5-gated": dict(decoder_start_token_id=PAD),
    "switch_transformers": dict(
        decoder_start_token_id=PAD, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=16
    ),
    "t5": dict(decoder_start_token_id=PAD),
    "t5gemma": dict(decoder_start_token_id=PAD),
}


def labeled() -> Batch:
    """Return tokens and one label per sequence."""
    return tokens() | dict(labels=torch.arange(B) % LABELS)


def translation() -> Batch:
    """Return tokens of an encoder, and tokens and labels of a decoder, which are fewer and padded differently."""
    decoder = tokens(S_DECODER, padding=2, seed=7)
    return tokens() | dict(
        decoder_input_ids=decoder["input_ids"],
        decoder_attention_mask=decoder["attention_mask"],
        labels=decoder["input_ids"].masked_fill(decoder["attention_mask"] == 0, -100),
    )


def _t5gemma(**settings: Any) -> Any:
    return config(**settings, encoder=config("t5_gemma_module"), decoder=config("t5_gemma_module"))


def architectures() -> dict[str, Architecture]:
    """Return every text encoder with a head and every text encoder-decoder by its name."""
    found = {}
    for name, changes in CLASSIFIERS.items():
        settings = partial(config, **({"model_type": name.removesuffix("-cls"), "num_labels": LABELS} | changes))
        # PEFT trains the modules whose names end in "classifier" as a whole; they must not be targets as well.
        exclude = ["pre_classifier"] if name == "distilbert-cls" else None
        found[name] = Architecture(AutoModelForSequenceClassification, settings, labeled, None, "SEQ_CLS", exclude)
    for name, changes in ENCODER_DECODERS.items():
        settings = partial(
            _t5gemma if name == "t5gemma" else config, **({"model_type": name.removesuffix("-gated")} | changes)
        )
        found[name] = Architecture(AutoModelForSeq2SeqLM, settings, translation, prompt, "SEQ_2_SEQ_LM")
    return found
