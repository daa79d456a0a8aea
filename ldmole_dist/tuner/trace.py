"""A trace of a backbone: which tensor each of its linears reads, found by running a copy of it on the meta device.

This computes nothing, allocates no memory, and also works if the weights of the backbone are partitioned or quantized.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

AUDIO_SAMPLES = 16000  # one second; the convolutions of speech encoders need more than a few samples


class Sizes(NamedTuple):
    """Sizes of the inputs of a traced forward.

    Attributes:
        sequences: number of sequences, images or recordings.
        tokens: number of tokens of each sequence.
        decoder_tokens: number of tokens of each sequence of the decoder, in a model with an encoder and a decoder.
    """

    sequences: int
    tokens: int
    decoder_tokens: int


class Call(NamedTuple):
    """The first call of a linear in a traced forward.

    Attributes:
        tensor: its input, on the meta device. Calls that read the same tensor have the same object here.
        version: version of the tensor, which an in-place operation increases.
        has_masks: False if it is unknown which mask covers its rows, because the linear was called only in a part of the model
            that was run by itself and may read tokens that the model's attention mask does not cover.
        same_shape: whether all further calls of the linear in this forward had an input of the same shape.
    """

    tensor: Tensor
    version: int
    has_masks: bool
    same_shape: bool = True


class Trace(NamedTuple):
    """Calls of linears in a traced forward.

    Attributes:
        calls: by name of the linear, in the order of the calls. Linears that were not called are missing.
        error: error that ended a forward early; None if there was none.
    """

    calls: dict[str, Call]
    error: Exception | None


class TracedCopy:
    """Copy of a backbone on the meta device whose linears record their inputs.

    Args:
        model: backbone. Adapters in it have no effect, because the copy is created from its config.
        names: names of the linears to record.
    """

    def __init__(self, model: PreTrainedModel, names: Collection[str]) -> None:
        config = copy.deepcopy(model.config)
        # Some kernels, such as flash-attention and grouped matrix products, do not run on the meta device. These
        # implementations do, and the linears read the same tensors.
        config._attn_implementation = "eager"
        config._experts_implementation = "batched_mm"
        self._calls: dict[str, Call] = {}
        self._has_masks = True
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            self._model = type(model)(config).eval()
        nn.Module.to(self._model, dtype=model.dtype)
        for name, module in self._model.named_modules():
            if name in names:
                module.register_forward_pre_hook(self._record(name))

    def _record(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            first = self._calls.get(name)
            if first is None:
                self._calls[name] = Call(args[0], args[0]._version, self._has_masks)
            elif first.tensor.shape != args[0].shape:
                self._calls[name] = first._replace(same_shape=False)

        return hook

    def run(self, sizes: Sizes) -> Trace:
        """Run the copy and record the calls of its linears.

        A model inside it whose linears this run does not call, such as a vision tower, is then run by itself.

        Args:
            sizes: sizes of the inputs.

        Returns:
            The calls, and the last error.
        """
        self._calls = {}
        error = None
        for module in self._untouched():
            # If the model has a separate decoder or reads no text, a part that runs by itself can read `input_ids` that the
            # model's attention mask does not cover.
            self._has_masks = module is self._model or self._masks_text()
            error = self._run(module, sizes) or error
        return Trace(self._calls, error)

    def _run(self, module: PreTrainedModel, sizes: Sizes) -> Exception | None:
        """Run a module without an attention mask and, if that attempt fails, again with one.

        Keep the calls of the attempt that succeeded or, if both failed, of the attempt that recorded more linears. Return the
        error of the kept attempt; None if it succeeded.
        """
        before = dict(self._calls)
        attempts: list[tuple[Exception | None, dict[str, Call]]] = []
        # Meta tensors have no values. Some models read the values of the mask; others, without a mask, read those of the ids.
        for with_mask in (False, True):
            self._calls, error = dict(before), None
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    module(**_inputs(module, sizes, with_mask))
            except Exception as raised:  # any model code may run here, and what it has called until then is recorded
                error = raised
            attempts.append((error, self._calls))
            if error is None:
                break
        error, self._calls = max(attempts, key=lambda attempt: (attempt[0] is None, len(attempt[1])))
        return error

    def _masks_text(self) -> bool:
        accepted = inspect.signature(self._model.forward).parameters
        return "input_ids" in accepted and not getattr(self._model.config, "is_encoder_decoder", False)

    def _untouched(self) -> Iterator[PreTrainedModel]:
        """Yield the copy, then each model inside it of which no linear has been called yet."""
        for path, module in self._model.named_modules():
            if isinstance(module, PreTrainedModel):
                prefix = f"{path}." if path else ""
                if not any(name.startswith(prefix) for name in self._calls):
                    yield module


def _inputs(model: PreTrainedModel, sizes: Sizes, with_mask: bool) -> dict[str, Tensor]:
    """Return inputs of the modality that the model reads, on the meta device.

    Raises:
        NotImplementedError: if no such inputs are known.
    """
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters

    def zeros(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    inputs = {}
    if "input_ids" in accepted and model.main_input_name == "input_ids":
        inputs["input_ids"] = zeros(sizes.sequences, sizes.tokens, dtype=torch.long)
        if with_mask:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    elif model.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs["pixel_values"] = zeros(sizes.sequences, getattr(config, "num_channels", 3), height, width)
    elif model.main_input_name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 64)
        inputs["input_features"] = zeros(sizes.sequences, config.num_mel_bins, frames)
    elif model.main_input_name == "input_values":
        inputs["input_values"] = zeros(sizes.sequences, AUDIO_SAMPLES)
    else:
        raise NotImplementedError(
            f"no inputs are known for {type(model).__name__}, which reads {model.main_input_name}"
        )
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = zeros(sizes.sequences, sizes.decoder_tokens, dtype=torch.long)
    return inputs
