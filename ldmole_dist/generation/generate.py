"""Text generation for a batch of prompts, with left padding; a single prompt can be streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextStreamer

from ldmole_dist.errors import UserError
from ldmole_dist.model.backbone import load_adapter, load_backbone, load_tokenizer
from ldmole_dist.model.saved import SavedModel
from ldmole_dist.tuner.model import tuner_of


@dataclass(frozen=True)
class Sampling:
    """Settings of `generate_batch`: the maximum length, and how tokens are sampled.

    Args:
        max_new_tokens: maximum number of tokens generated per prompt.
        temperature: temperature of the distribution; 0 always takes the most likely token.
        top_p: cumulative probability of the most likely tokens to sample from.
        top_k: number of the most likely tokens to sample from; 0 means all.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments for `generate` of transformers; they override the backbone's generation config."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


def load_generator(
    saved: SavedModel, precision: str, with_adapter: bool = True
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Load a model in evaluation mode, on the GPU if there is one, and its tokenizer.

    Args:
        saved: run or adapter.
        precision: "fp32", "bf16" or "fp16".
        with_adapter: load the adapter; if False, load only the backbone.

    Raises:
        UserError: if the backbone or the adapter cannot be loaded, if they do not match, or if the model is a classifier.
    """
    if saved.task != "causal_lm":
        raise UserError(f"{saved.adapter} is a classifier and cannot generate text; evaluate it with `ldmole eval`.")
    tokenizer = load_tokenizer(saved.backbone)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_backbone(saved.backbone, "causal_lm", precision, quantization=saved.quantization, device=device)
    if with_adapter:
        model = load_adapter(model, str(saved.adapter), trainable=False)
    # PreTrainedModel.to raises an error for 8-bit weights, even if they are already on the device; nn.Module.to does not.
    return torch.nn.Module.to(model, device).eval(), tokenizer


@torch.no_grad()
def generate_batch(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    templated: bool = False,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Generate text for several prompts at once.

    Padding is on the left and masked, so greedy output is, up to rounding, the same as for each prompt alone.

    Args:
        model: causal language model in evaluation mode.
        tokenizer: tokenizer of the backbone.
        prompts: texts to continue.
        sampling: sampling settings.
        stop: strings at which the generation for a prompt stops; the text may contain the stop string.
        templated: whether the prompts come from a chat template, which has already added the special tokens.
        streamer: receives the tokens as they are generated; requires a single prompt.

    Returns:
        The generated texts, without the prompts.

    Raises:
        UserError: if a prompt has no tokens.
    """
    padding_side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=not templated)
    finally:
        tokenizer.padding_side = padding_side
    if inputs["input_ids"].shape[1] == 0 or not inputs["attention_mask"].any(1).all():
        empty = next(text for text, mask in zip(prompts, inputs["attention_mask"], strict=True) if not mask.any())
        raise UserError(f"the prompt {empty!r} has no tokens, not even a start token; provide at least one word.")
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # With router_input="hidden", a forward pass without the adapter needs the full sequence: use no key-value cache.
    use_cache = not (isinstance(model, PeftModel) and tuner_of(model).reads_hidden)
    ids = causal.generate(
        **inputs.to(causal.device),
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        use_cache=use_cache,
        **({"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}),
        **sampling.settings(),
    )
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
