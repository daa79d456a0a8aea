"""What LD-MoLE promises beyond what any adapter does: token counts without padding, and input groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ldmole_dist import tuner_of
from tests.backbones.checks import CHECKS, PREFIX, Trial, lora
from tests.backbones.sizes import VOCABULARY, WORD, Architecture, Batch

MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


class LdMoleTrial(Trial):
    """LD-MoLE on one architecture, with LoRA on the same architecture as the reference."""

    @cached_property
    def lora(self) -> Trial | None:
        """LoRA on this architecture; None if it cannot be injected or trained."""
        try:
            trial = Trial(self.architecture, lora)
            _ = trial.trained
        except Exception:
            return None
        return trial

    @cached_property
    def reads(self) -> dict[str, tuple[Tensor, int]]:
        """The tensor that each adapted linear reads in its first call of a training forward, and its version then.

        The adapter is disabled, and the tensors are kept alive, so that no other tensor gets the address of one of them.
        """
        seen: dict[str, tuple[Tensor, int]] = {}

        def recorder(name: str) -> Callable[..., None]:
            return lambda module, args: seen.setdefault(name, (args[0], args[0]._version)) and None

        hooks = [m.base_layer.register_forward_pre_hook(recorder(name)) for name, m in self.adapted.items()]
        with self.model.disable_adapter(), torch.no_grad():
            self.model.train()(**self.batch)
        for hook in hooks:
            hook.remove()
        return seen

    @property
    def shared_inputs(self) -> set[frozenset[str]]:
        """The sets of several linears that read the same tensor within one checkpointed region."""
        modules: dict[str, nn.Module] = dict(self.model.get_base_model().named_modules())
        regions = [name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)]
        groups: dict[Any, set[str]] = {}
        for name, (x, version) in self.reads.items():
            region = max((r for r in regions if name.startswith(f"{r}.")), key=len, default="")
            groups.setdefault((x.data_ptr(), x.shape, x.stride(), version, region), set()).add(name)
        return {frozenset(names) for names in groups.values() if len(names) > 1}

    @property
    def groups(self) -> set[frozenset[str]]:
        """The input groups of several linears that the adapter has."""
        groups = {module.groups["default"] for module in self.adapted.values()}
        return {frozenset(linear.name for linear in group.linears) for group in groups if len(group.linears) > 1}


def gradients(trial: LdMoleTrial) -> None:
    """Check that every parameter of the adapter has a gradient if its linear is called and LoRA trains it."""
    missing = {name for name, gradient in trial.trained[1].items() if gradient is None}
    untrained = {name for name in trial.adapted if any(part.startswith(f"{PREFIX}{name}.") for part in missing)}
    trainable = trial.adapted.keys() if trial.lora is None else trial.lora.trained_modules.keys()
    assert not untrained & trial.reads.keys() & trainable, f"{sorted(untrained)} have no gradient"
    assert not (trial.reads.keys() & trainable) - trial.trained_modules.keys()


def lora_trains(trial: LdMoleTrial) -> None:
    """Check that what LoRA trains is trained."""
    if trial.lora is None:
        return
    idle = [
        name
        for name, largest in trial.lora.trained_modules.items()
        if name in trial.adapted and largest > 0 and not trial.trained_modules.get(name, 0.0) > 0
    ]
    assert not idle, f"LoRA trains {idle}, LD-MoLE does not"
    left_out = sorted(trial.lora.trained_modules.keys() - trial.adapted.keys())
    assert not left_out, f"LoRA adapts {left_out}, LD-MoLE does not"


def padding(trial: LdMoleTrial) -> None:
    """Check that statistics count the real tokens of linears that read tokens, and every row of all others."""
    real = {trial.batch[m].numel(): int(trial.batch[m].sum()) for ids, m in MASKS.items() if ids in trial.batch}
    rows: dict[str, int] = {}
    stats = _statistics(trial, trial.batch, rows)
    wrong = {name: int(stats[name][2]) for name, n in rows.items() if stats[name][2] != real.get(n, n)}
    assert not wrong, f"linears count a wrong number of tokens: {wrong}"
    other = dict(trial.batch)
    for ids, mask in MASKS.items():
        if ids in other:
            drawn = torch.randint(WORD, VOCABULARY, other[ids].shape, generator=torch.Generator().manual_seed(8))
            other[ids] = torch.where(other[mask] == 0, drawn, other[ids])
    again = _statistics(trial, other, {})
    changed = [name for name, n in rows.items() if n in real and not torch.allclose(stats[name], again[name], 1e-4)]
    assert not changed, f"the content of padding changes the statistics of {changed}"


def _statistics(trial: LdMoleTrial, batch: Batch, rows: dict[str, int]) -> dict[str, Tensor]:
    """Return the statistics of a training forward, and in `rows` the number of rows that each linear reads first."""

    def count(module: Any, args: tuple[Any, ...]) -> None:
        rows.setdefault(module.name, args[0].numel() // args[0].shape[-1])

    hooks = [module.register_forward_pre_hook(count) for module in trial.adapted.values()]
    trial.model.train()(**batch)
    for hook in hooks:
        hook.remove()
    return dict(tuner_of(trial.model).context.stats)


def groups(trial: LdMoleTrial) -> None:
    """Check that the input groups are the linears that share an input in a real forward."""
    called = {group for group in trial.groups if group & trial.reads.keys()}
    lost, wrong = trial.shared_inputs - called, called - trial.shared_inputs
    names = [sorted(map(sorted, found)) for found in (lost, wrong)]
    assert not lost and not wrong, f"groups that were not found: {names[0]}; groups without a common input: {names[1]}"


def exclusions(trial: LdMoleTrial) -> None:
    """Check that the adapter is refused without the exclusions of this architecture."""
    if not trial.architecture.exclude:
        return
    try:
        LdMoleTrial(replace(trial.architecture, exclude=None))
    except (ValueError, TypeError):  # TypeError: PEFT's own, of a module that is both a target and saved as a whole
        return
    raise AssertionError(f"{trial.architecture.exclude} need not be excluded")


OWN_CHECKS: dict[str, Callable[[LdMoleTrial], None]] = {
    check.__name__: check for check in (gradients, lora_trains, padding, groups, exclusions)
}


def failures(architecture: Architecture) -> dict[str, str]:
    """Run every check on an architecture and return the messages of those that fail, by the name of the check.

    The only key is "injection" if the adapter cannot be injected. A check that LoRA fails in the same way is left out.
    """
    try:
        trial = LdMoleTrial(architecture)
    except Exception as error:
        return {"injection": _message(error)}
    found: dict[str, str] = {}
    for name, check in (CHECKS | OWN_CHECKS).items():
        try:
            check(trial)  # type: ignore[arg-type]
        except Exception as error:
            if name not in CHECKS or trial.lora is None or not _fails(CHECKS[name], trial.lora):
                found[name] = _message(error)
    return found


def _fails(check: Callable[[Trial], None], trial: Trial) -> bool:
    try:
        check(trial)
    except Exception:
        return True
    return False


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
