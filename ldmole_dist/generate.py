"""Text out of a saved adapter, in one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from peft import PeftConfig, PeftModel
from transformers import TextStreamer

from ldmole_dist.backbone import load_backbone, load_tokenizer
from ldmole_dist.errors import UserError
from ldmole_dist.peft_method import LdMoleConfig


def generate(
    adapter: str, prompts: Sequence[str], max_new_tokens: int, backbone: str | None, precision: str
) -> list[str]:
    """Continue each prompt greedily, streaming to standard output.

    Args:
        adapter: folder of a saved adapter.
        prompts: to continue.
        max_new_tokens: at most, for each.
        backbone: path, if it is not where the adapter says.
        precision: "fp32", "bf16" or "fp16".

    Returns:
        The continuations, without the prompts.

    Raises:
        UserError: where adapter or backbone cannot be loaded, or do not go together.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise UserError(f"there is no adapter in {adapter!r}: {str(error).splitlines()[0]}") from error
    if not isinstance(config, LdMoleConfig):
        raise UserError(f"the adapter in {adapter!r} is {config.peft_type}, not an LD-MoLE adapter")
    path = backbone or config.base_model_name_or_path
    if path is None:
        raise UserError(f"the adapter in {adapter!r} does not say what its backbone is: give --backbone")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(path)
    try:
        model = PeftModel.from_pretrained(load_backbone(path, "causal_lm", precision), adapter)
    except ValueError as error:
        raise UserError(str(error)) from error
    model = model.to(device).eval()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    continuations = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        sys.stdout.write(prompt)
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id,
            )
        continuations.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return continuations
