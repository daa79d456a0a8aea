"""Input groups: the linears of a model that read the same tensor (q, k, v; gate, up), and the token mask that covers it."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ldmole_dist.method.context import MaskName
from ldmole_dist.tuner.trace import Call, Sizes, Trace, TracedCopy

logger = logging.getLogger(__name__)

# Sizes of two traced forwards. The sizes differ, and are unusual as sizes of a model. So if the rows of a linear's input match
# the tokens in both forwards, the rows are tokens, and the match is not a coincidence.
SIZES = Sizes(3, 7, 5), Sizes(2, 13, 11)


class NamedGroup(NamedTuple):
    """Names and masks of the linears of one input group.

    Attributes:
        linears: names of the linears, in the order of their calls.
        mask_names: for each linear, the mask that covers the rows of its input; None if no mask is known to cover them.
    """

    linears: list[str]
    mask_names: list[MaskName | None]


def find_input_groups(model: nn.Module, names: Collection[str]) -> list[NamedGroup]:
    """Group linears that read the same tensor object in a forward.

    Linears in different layers are never grouped, even if they read the same tensor, as cross-attention does: gradient
    checkpointing recomputes each layer by itself.

    Args:
        model: backbone. Adapters in it have no effect.
        names: names of the linears and experts modules to group.

    Returns:
        The groups. A linear that was not called in the trace has a group of its own and no mask: without dropout its outputs
        are the same, but it needs its own dispatch and dropout mask. A linear whose `Call.has_masks` is False has no mask
        either. Without a mask, padding counts in the auxiliary losses and statistics. A warning gives the number of linears of
        both kinds. No linear is called if the model is not a `PreTrainedModel` or has no copy on the meta device.
    """
    first, second = _trace(model, names)
    found: dict[tuple[object, ...], list[str]] = {}
    for name, call in first.calls.items():
        found.setdefault((id(call.tensor), call.version, _layer(name)), []).append(name)
    groups = [
        NamedGroup(linears, [_mask_name(first.calls[name], second.calls.get(name)) for name in linears])
        for linears in found.values()
    ]
    unknown = [name for name in names if name not in first.calls or not first.calls[name].has_masks]
    if unknown:
        logger.warning(
            "%d of %d linears, such as %s, could not be traced (%s): padding counts in their auxiliary losses and statistics, "
            "and linears that read the same input may be dispatched separately, which is slower",
            len(unknown),
            len(names),
            unknown[0],
            first.error or "the model does not call them",
        )
    return groups + [NamedGroup([name], [None]) for name in names if name not in first.calls]


def _trace(model: nn.Module, names: Collection[str]) -> tuple[Trace, Trace]:
    if not isinstance(model, PreTrainedModel):
        none = Trace({}, TypeError(f"{type(model).__name__} is not a PreTrainedModel of transformers"))
        return none, none
    try:
        traced = TracedCopy(model, names)
    except Exception as error:  # any model code may run here
        return Trace({}, error), Trace({}, error)
    first, second = (traced.run(sizes) for sizes in SIZES)
    return first, second


def _layer(name: str) -> str:
    """Return the name of the innermost numbered module around a linear, such as the layer that is checkpointed; "" if none."""
    numbered = re.match(r"(.+\.)?\d+(?=\.)", name)
    return numbered[0] if numbered else ""


def _mask_name(first: Call, second: Call | None) -> MaskName | None:
    """Return the mask whose tokens are the rows of a linear's input in both traced forwards; None if there is none."""
    for mask_name in ("attention_mask", "decoder_attention_mask"):
        if second is not None and all(
            _reads_tokens(
                call, sizes.sequences, sizes.tokens if mask_name == "attention_mask" else sizes.decoder_tokens
            )
            for call, sizes in zip((first, second), SIZES, strict=True)
        ):
            return mask_name
    return None


def _reads_tokens(call: Call, sequences: int, tokens: int) -> bool:
    shape = tuple(size for size in call.tensor.shape[:-1] if size != 1)
    return call.has_masks and call.same_shape and shape in ((sequences, tokens), (sequences * tokens,))
