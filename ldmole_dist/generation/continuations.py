"""Continuing prompts: one that streams, or a batch of them padded on the left."""

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
    """How the next token is chosen.

    Args:
        max_new_tokens: at most, for each prompt.
        temperature: of the distribution that tokens are drawn from; 0 takes the most likely.
        top_p: draw from the most likely tokens that have this probability together.
        top_k: draw from so many of the most likely tokens; 0: from all.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def settings(self) -> dict[str, Any]:
        """For `generate` of transformers; whatever the backbone's own generation config says."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


def load_generator(
    saved: SavedModel, precision: str, with_adapter: bool = True
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model on the GPU if there is one, in evaluation mode, and its tokenizer.

    Args:
        saved: run or adapter.
        precision: "fp32", "bf16" or "fp16".
        with_adapter: False: the backbone alone.

    Raises:
        UserError: where they cannot be loaded, do not go together, or do not write text.
    """
    if saved.task != "causal_lm":
        raise UserError(f"{saved.adapter} is a classifier, which writes no text: see what it says with ldmole eval")
    tokenizer = load_tokenizer(saved.backbone)
    model: Any = load_backbone(saved.backbone, "causal_lm", precision)
    if with_adapter:
        model = load_adapter(model, str(saved.adapter), trainable=False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


@torch.no_grad()
def continue_batch(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    rendered: bool = False,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Continue prompts together. Padding is on the left and masked: a prompt's continuation is what it would be alone.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: of the backbone.
        prompts: B texts.
        sampling: see there.
        stop: texts that end a continuation.
        rendered: prompts come from a chat template, which has put the special tokens there.
        streamer: gets the tokens of a single prompt as they come.

    Returns:
        The continuations, without the prompts.

    Raises:
        UserError: on a prompt without a token, which nothing can follow.
    """
    before = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=not rendered)
    finally:
        tokenizer.padding_side = before
    if inputs["input_ids"].shape[1] == 0 or not inputs["attention_mask"].any(1).all():
        raise UserError("an empty prompt cannot be continued with this tokenizer: give it at least a word")
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # Routers that read another forward have no use for what the adapted one has cached.
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
