"""The frozen Hugging Face model and the adapter on it: loading them, converting GGUF, recomputation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_folder, write_errors
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import tuner_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer; where it has no padding token, its end-of-sequence token pads (masked everywhere).

    Raises:
        UserError: where there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"backbone.path={path!r} has no tokenizer that can be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_backbone(path: str) -> PretrainedConfig:
    """The config of a backbone that can be adapted; of its weights only the headers are read.

    Raises:
        UserError: where there is none, its weights are quantised, or a file of them is cut off.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"backbone.path={path!r} cannot be loaded: {_first_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"backbone {path!r} is quantised: its linears hold packed integers, which ZeRO-3 cannot partition and the "
            "experts' parity was never tested on; use the unquantised weights (bf16 halves them already)"
        )
    for weights in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(weights, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{weights} is damaged: {_first_line(error)}; copy or download it again") from error
    return config


def load_backbone(
    path: str,
    task: str,
    precision: str,
    *,
    labels: Sequence[str] | None = None,
    attention: str | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """The model with its weights in the dtype of `precision`; under `partitioned_loading` in pieces.

    Args:
        path: folder or name on the hub.
        task: "causal_lm" or "sequence_classification".
        precision: "fp32", "bf16" or "fp16".
        labels: class names, for sequence_classification.
        attention: implementation, as transformers names it.
        pad_token_id: a sequence classifier needs it to find the last token.

    Raises:
        UserError: where the model cannot be loaded, or is quantised.
    """
    options = {"dtype": DTYPES[precision], "attn_implementation": attention}
    config = check_backbone(path)
    try:
        if task == "causal_lm":
            return AutoModelForCausalLM.from_pretrained(path, **options)
        assert labels is not None  # checked with the config
        config.num_labels, config.pad_token_id = len(labels), pad_token_id
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
        return AutoModelForSequenceClassification.from_pretrained(path, config=config, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"backbone.path={path!r} cannot be loaded: {_first_line(error)}") from error


def new_adapter(backbone: PreTrainedModel, config: LdMoleConfig) -> PeftModel:
    """Inject a new adapter.

    Raises:
        UserError: where it does not fit the backbone.
    """
    try:
        return get_peft_model(backbone, config)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_adapter(backbone: PreTrainedModel, folder: str, trainable: bool) -> PeftModel:
    """Put a saved adapter on its backbone.

    Raises:
        UserError: where there is none, it is another method's, or it was made for another backbone.
    """
    _adapter_config(folder)
    try:
        return PeftModel.from_pretrained(backbone, folder, is_trainable=trainable)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"adapter {folder!r}: {_first_line(error)}") from error


def backbone_of(folder: str) -> str:
    """The path of the backbone that a saved adapter was made for.

    Raises:
        UserError: where there is no adapter, or it does not say.
    """
    path = _adapter_config(folder).base_model_name_or_path
    if not path:
        raise UserError(f"the adapter in {folder!r} does not say what its backbone is: give --backbone")
    return str(path)


def _adapter_config(folder: str) -> LdMoleConfig:
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"there is no adapter that can be read in {folder!r}: {_first_line(error)}") from error
    if not isinstance(config, LdMoleConfig):
        raise UserError(f"the adapter in {folder!r} is {config.peft_type}, not an LD-MoLE adapter")
    return config


def convert_gguf(gguf_path: str, folder: str) -> None:
    """Write an ordinary model folder (safetensors, config, tokenizer) from a GGUF file, dequantised to bfloat16.

    The folder appears whole or not at all.

    Raises:
        UserError: where the file cannot be read, or the folder exists.
    """
    source, target = Path(gguf_path), Path(folder)
    if target.exists():
        raise UserError(f"{target} exists already: remove it or choose another folder")
    if not source.is_file():
        raise UserError(f"there is no GGUF file {source}")
    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **location)
    config = loaded.config
    # It would say that the saved weights are still packed.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    with write_errors(f"the backbone {target}"), atomic_folder(target) as unfinished:
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(**location).save_pretrained(unfinished)


def enable_gradient_checkpointing(model: PeftModel) -> None:
    """Recompute every decoder layer in the backward, replaying its routing."""
    tuner_of(model).activation_checkpointing_enable()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
