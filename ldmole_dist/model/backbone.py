"""Load the frozen Hugging Face backbone and its adapter, convert GGUF files, and enable gradient checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_folder, write_errors
from ldmole_dist.model.quantization import check_quantizable, quantized_loading
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import tuner_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the backbone's tokenizer. If it has no padding token, its end-of-sequence token is used for padding.

    Args:
        path: model folder, or model name on the Hugging Face Hub.

    Raises:
        UserError: if the tokenizer cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load a tokenizer from backbone.path={path!r}: {_first_line(error)}; set backbone.path to a "
            "model folder that contains the tokenizer's files, or to the name of a model on the Hugging Face Hub"
        ) from error
    # Any token can serve as padding, because the attention mask and the labels exclude it.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_backbone(path: str) -> PretrainedConfig:
    """Check that a backbone can be loaded, without loading its weights.

    Only the config and, if `path` is a folder, the headers of its safetensors files are read.

    Args:
        path: model folder, or model name on the Hugging Face Hub.

    Returns:
        The config of the backbone.

    Raises:
        UserError: if the config cannot be loaded, the weights are quantized, or a safetensors file is unreadable or damaged.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load backbone.path={path!r}: {_first_line(error)}; set it to a model folder or to the name of a "
            "model on the Hugging Face Hub"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"backbone.path={path!r} is quantized, which is not supported; set it to the unquantized model, and quantize it "
            "while it is loaded with backbone.quantization=nf4"
        )
    for weights in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(weights, "pt"):
                pass
        except OSError as error:
            raise UserError(
                f"cannot read {weights}: {_first_line(error)}; check that the file exists and is readable"
            ) from error
        except SafetensorError as error:
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
    quantization: str | None = None,
    device: torch.device | str = "cpu",
    partitioned: bool = False,
) -> PreTrainedModel:
    """Load the backbone in the dtype of `precision`.

    Within `partitioned_loading` at ZeRO stage 3, each rank keeps only its partition of the weights.

    Args:
        path: model folder, or model name on the Hugging Face Hub.
        task: "causal_lm" or "sequence_classification".
        precision: "fp32", "bf16" or "fp16".
        labels: class names, for sequence classification.
        attention: attention implementation by its name in transformers; None for the default.
        pad_token_id: id of the padding token, with which a sequence classifier finds the last token; unused for "causal_lm".
        quantization: format that the frozen linears are quantized to, "nf4" or "int8"; None leaves them in `precision`.
        device: device that quantized weights are loaded to. Without quantization, weights are loaded to the CPU.
        partitioned: whether ZeRO-3 partitions the quantized weights later.

    Raises:
        UserError: if the model cannot be loaded, is quantized already, or cannot be quantized.
    """
    options = {"dtype": DTYPES[precision], "attn_implementation": attention}
    config = check_backbone(path)
    if quantization is not None:
        options |= quantized_loading(quantization, DTYPES[precision], device, partitioned)
        with torch.device("meta"):
            check_quantizable(AutoModel.from_config(config), quantization)
    try:
        if task == "causal_lm":
            return AutoModelForCausalLM.from_pretrained(path, **options)
        assert labels is not None  # the config requires them for this task
        config.num_labels, config.pad_token_id = len(labels), pad_token_id
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
        return AutoModelForSequenceClassification.from_pretrained(path, config=config, **options)
    except OSError as error:
        raise UserError(
            f"cannot load backbone.path={path!r}: {_first_line(error)}; copy or download the model again"
        ) from error
    except (ImportError, ValueError) as error:  # ImportError for an attention kernel that is not installed
        raise UserError(
            f"cannot load backbone.path={path!r} with backbone.task={task} and backbone.attention={attention}: "
            f"{_first_line(error)}; check these keys"
        ) from error


def new_adapter(backbone: PreTrainedModel, config: LdMoleConfig) -> PeftModel:
    """Attach a new adapter to the backbone.

    Raises:
        UserError: if the adapter does not fit the backbone, for example if target_modules match no module.
    """
    try:
        return get_peft_model(backbone, config)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_adapter(backbone: PreTrainedModel, folder: str, trainable: bool) -> PeftModel:
    """Attach a saved adapter to its backbone.

    Args:
        backbone: the model that the adapter was trained on.
        folder: folder of the adapter.
        trainable: whether the adapter's parameters get gradients.

    Raises:
        UserError: if the folder has no LD-MoLE adapter; if the adapter cannot be read or does not fit the backbone; or if
            `trainable` and the adapter has trainable_token_indices or ensure_weight_tying.
    """
    config = _adapter_config(folder)
    for name in ("trainable_token_indices", "ensure_weight_tying") if trainable else ():
        if getattr(config, name):
            raise UserError(
                f"the adapter in {folder!r} has {name}={getattr(config, name)}, which `ldmole train` does not support; "
                "train it with Trainer, or start from another adapter"
            )
    try:
        return PeftModel.from_pretrained(backbone, folder, is_trainable=trainable)
    except ValueError as error:  # its message ends with the remedy
        raise UserError(f"cannot load the adapter in {folder!r}: {_first_line(error)}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot load the adapter in {folder!r}: {_first_line(error)}; check that its files are readable, or copy it again"
        ) from error


def backbone_of(folder: str) -> str:
    """Return the path of the backbone that a saved adapter was trained on.

    Raises:
        UserError: if the folder has no LD-MoLE adapter, or the adapter's config does not name a backbone.
    """
    path = _adapter_config(folder).base_model_name_or_path
    if not path:
        raise UserError(f"the adapter in {folder!r} does not name its backbone; pass --backbone")
    return str(path)


def _adapter_config(folder: str) -> LdMoleConfig:
    """Return the config of the adapter in a folder. Raise UserError if it cannot be read or the adapter is not LD-MoLE."""
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        exists = (Path(folder) / "adapter_config.json").is_file()
        remedy = (
            "If adapter_config.json is damaged, copy it again."
            if exists
            else "Pass the folder with its adapter_config.json."
        )
        raise UserError(f"cannot read an adapter in {folder!r}: {_first_line(error)}. {remedy}") from error
    if not isinstance(config, LdMoleConfig):
        raise UserError(f"the adapter in {folder!r} has peft_type={config.peft_type}; pass an LD-MoLE adapter")
    return config


def convert_gguf(gguf_path: str, folder: str) -> None:
    """Convert a GGUF file to a Hugging Face model folder (safetensors, config, tokenizer), dequantized to bfloat16.

    The folder is written under a temporary name and renamed when it is complete.

    Raises:
        UserError: if the GGUF file does not exist, or if the folder exists already or cannot be written.
    """
    source, target = Path(gguf_path), Path(folder)
    if target.exists():
        raise UserError(f"{target} already exists; remove it or choose another folder")
    if not source.is_file():
        raise UserError(f"{source} is not a file; give the path of a GGUF file")
    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **location)
    config = loaded.config
    # transformers keeps the quantization_config of GGUF, which would declare the dequantized weights as quantized.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    with write_errors(f"the backbone {target}"), atomic_folder(target) as unfinished:
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(**location).save_pretrained(unfinished)


def enable_gradient_checkpointing(model: PeftModel) -> None:
    """Enable gradient checkpointing: the backward recomputes each decoder layer and reuses the forward's routing decisions."""
    tuner_of(model).activation_checkpointing_enable()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
