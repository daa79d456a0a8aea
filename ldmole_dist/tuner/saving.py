"""Saving and loading of an adapter by PEFT, with experts that may be spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.tuner.state_dict import check_adapter_fits, is_expert_tensor, saved_key


class SavedAdapters(BaseTuner):
    """Part of `LdMoleModel`: the tensors of an adapter file, from the parameters of all ranks and back.

    Attributes:
        parallel: expert-parallel group that the experts are spread over.
        gather_parameter: function that returns the full tensor of a parameter of which this rank holds a shard; set under
            ZeRO-3, None otherwise.
    """

    parallel: ExpertParallel
    gather_parameter: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return saved_key(key, adapter_name) or super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]  # PEFT passes every argument by name
        cls, *, model: nn.Module, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the tensors to save: full tensors on global rank 0, meta tensors on the others. Collective.

        The entries of `state_dict` are replaced too. If the caller of `save_pretrained` passed another tensor for a parameter,
        that tensor is saved. If that tensor has only the experts of this rank, the experts of all ranks are gathered.
        """
        selected = super()._get_adapter_state_dict(model=model, state_dict=state_dict, **kwargs)
        tuner: Any = model.base_model
        keeps = not dist.is_initialized() or dist.get_rank() == 0
        for key, parameter in model.named_parameters():
            # PEFT reads modules_to_save from `state_dict` after this call; under ZeRO-3 the entries there are empty.
            if key in selected or (".modules_to_save." in key and key in state_dict):
                value = state_dict[key]
                if value.data_ptr() == parameter.data_ptr() and value.shape == parameter.shape:
                    value = tuner.full_parameter(key, parameter)
                elif is_expert_tensor(key) and value.shape == parameter.shape:
                    value = tuner.parallel.all_gather(value)
                state_dict[key] = value.cpu() if keeps else value.to("meta")
        return {key: state_dict[key] for key in selected}

    def full_parameter(self, name: str, parameter: Tensor) -> Tensor:
        """Return the full tensor of a parameter of an adapter. If it holds experts, those of all ranks are included.

        Collective: every rank must call it, for the same parameters in the same order.

        Args:
            name: name of the parameter in the model.
            parameter: the parameter as this rank holds it, possibly a shard.
        """
        value = parameter.detach() if self.gather_parameter is None else self.gather_parameter(parameter)
        return self.parallel.all_gather(value) if is_expert_tensor(name) else value

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename the keys of an adapter file to those of the model, check the tensors, and slice out the experts of this rank.

        Raises:
            ValueError: if the tensors do not match the parameters of the model (`check_adapter_fits`).
        """
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        tuner: Any = model.base_model
        parallel: ExpertParallel = tuner.parallel
        experts = check_adapter_fits(model, config, adapter_name, remapped, parallel.size)
        if parallel.size > 1:
            # Clone: with low_cpu_mem_usage the model keeps this tensor, and a view would keep the experts of all ranks.
            remapped |= {key: remapped[key][parallel.placement(len(remapped[key])).local].clone() for key in experts}
        return remapped
