"""Text out of a saved adapter, in one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from transformers import TextStreamer

from ldmole_dist.backbone import backbone_of, load_adapter, load_backbone, load_tokenizer


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
    path = backbone or backbone_of(adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(path)
    model = load_adapter(load_backbone(path, "causal_lm", precision), adapter, trainable=False)
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
        new_ids = ids[0, inputs["input_ids"].shape[1] :]
        continuations.append(str(tokenizer.decode(new_ids, skip_special_tokens=True)))
    return continuations
