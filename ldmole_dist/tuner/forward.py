"""The forward of a model with adapters: the state that its linears share, and activation checkpointing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldmole_dist.method.context import StepContext
from ldmole_dist.tuner.config import narrowed
from ldmole_dist.tuner.trainable import TrainableAdapters


class AdapterForward(TrainableAdapters):
    """Part of `LdMoleModel`: hooks on the model that open and close the step context.

    Attributes:
        context: state of the current forward, shared by all adapted linears.
    """

    context: StepContext

    def _add_hooks(self, model: nn.Module) -> None:
        self.context = StepContext()
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel is not supported: its replicas would share one state of the forward; start one process "
                "per GPU, as with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        given = inspect.signature(model.forward).bind_partial(*args).arguments | kwargs
        # transformers' logits_to_keep is a tensor of positions, or a number of positions at the end. The context aligns masks
        # to the end of the sequence anyway, so only a tensor is passed to it.
        positions = given.get("logits_to_keep")
        self.context.begin(
            given.get("attention_mask"),
            positions if isinstance(positions, Tensor) else None,
            given.get("decoder_attention_mask"),
            self._hidden(model, given) if self.reads_hidden else None,
        )

    @property
    def reads_hidden(self) -> bool:
        """Whether the forward routes on the backbone's last hidden states (`router_input='hidden'`)."""
        return self.adapters_enabled and any(
            narrowed(self.peft_config[name]).router_input == "hidden" for name in self.active_adapters
        )

    @torch.no_grad()
    def _hidden(self, model: nn.Module, given: dict[str, Any]) -> Tensor:
        """Return the last hidden states of the backbone without adapters, (sequences, positions, hidden size).

        Raises:
            ValueError: if the call uses a key-value cache.
        """
        if given.get("past_key_values") is not None or given.get("use_cache", False):
            raise ValueError(
                "router_input='hidden' does not support a key-value cache: it first runs the backbone without the adapter, and "
                "the keys and values of that forward differ from those with the adapter; pass use_cache=False and no "
                "past_key_values"
            )
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        inputs = {name: given[name] for name in names if name in given}
        decoder: Any = model.base_model
        self.context.adapter_disabled = True
        try:
            hidden: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
        finally:
            self.context.adapter_disabled = False
        return hidden

    def _end(self, *_: Any) -> None:
        self.context.end()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "LD-MoLE applies one adapter to a whole batch, so adapter_names is not supported; call set_adapter and run the "
                "examples of each adapter in their own batch"
            )
        yield

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable the model's activation checkpointing, with a recomputation that replays the routing of the forward.

        Args:
            activation_checkpointing_kwargs: arguments for `torch.utils.checkpoint.checkpoint`.
            kwargs: other arguments of the model's method of this name.

        Raises:
            ValueError: if `use_reentrant` is True, which would silently drop the gradient of the auxiliary losses.
        """
        settings = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if settings["use_reentrant"]:
            raise ValueError(
                "use_reentrant=True silently drops the gradient of the auxiliary losses; remove it, or set it to False"
            )
        model: Any = self.model
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=settings | {"context_fn": self.context.checkpoint_contexts}, **kwargs
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Call `activation_checkpointing_enable`. Earlier versions of transformers call this method instead."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
