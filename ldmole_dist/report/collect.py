"""Runs data through a model and counts what its routers do: O(vocabulary + linears x E x E) memory, however much the data.

Shapes: B sequences, S positions, T = B S tokens, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from ldmole_dist.data.batches import collate
from ldmole_dist.data.encode import Encoded
from ldmole_dist.errors import UserError
from ldmole_dist.method.routers import Routing
from ldmole_dist.method.statistics import RoutingSums, added
from ldmole_dist.model.forward import route


@dataclass(frozen=True)
class Observed:
    """What the routers did with a data set, padding left out.

    Attributes:
        by_domain: domain -> linear -> sums (`routing_sums`).
        together: linear -> (E, E), tokens in which both experts are active; on the diagonal, in which the one is.
        tokens_V: how often each token of the vocabulary was there.
        active_V: active experts of these tokens, summed over them and over all linears.
    """

    by_domain: Mapping[str, Mapping[str, Tensor]]
    together: Mapping[str, Tensor]
    tokens_V: Tensor
    active_V: Tensor

    @property
    def by_linear(self) -> dict[str, Tensor]:
        """Linear -> sums over all domains."""
        names = next(iter(self.by_domain.values()))
        return {name: added(sums[name] for sums in self.by_domain.values()) for name in names}


class Counter:
    """An observer (`context.Observer`) that adds everything up on the device."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._domains: dict[str, RoutingSums] = {}
        self._together: dict[str, Tensor] = {}
        self._tokens_V, self._active_V = (torch.zeros(vocabulary, dtype=torch.int64, device=device) for _ in range(2))

    def begin(self, domain: str, batch: Mapping[str, Tensor]) -> None:
        """A batch follows, all of it of one domain."""
        self._sums = self._domains.setdefault(domain, RoutingSums())
        self._ids_T = batch["input_ids"].flatten()
        self._mask_T = batch["attention_mask"].flatten() != 0
        self._tokens_V.index_add_(0, self._ids_T, self._mask_T.long())

    def __call__(self, name: str, routing: Routing, mask_T: Tensor | None) -> None:
        """See `context.Observer`."""
        if len(routing.p_TE) != len(self._mask_T):
            raise UserError(
                f"{name} reads {len(routing.p_TE)} rows of a batch of {len(self._mask_T)} tokens: which token each is of "
                "cannot be told; the report is for adapters on linears that read every token"
            )
        self._sums(name, routing, self._mask_T)
        active_TE = (routing.p_TE != 0) & self._mask_T.unsqueeze(1)
        self._active_V.index_add_(0, self._ids_T, active_TE.sum(1))
        counted_TE = active_TE.float()  # exact: a batch has far fewer than 2^24 tokens
        together_EE = (counted_TE.T @ counted_TE).double()
        before = self._together.get(name)
        self._together[name] = together_EE if before is None else before + together_EE

    def result(self) -> Observed:
        """Everything so far, on the CPU."""
        return Observed(
            {domain: {n: s.cpu() for n, s in sums.by_linear.items()} for domain, sums in self._domains.items()},
            {name: together.cpu() for name, together in self._together.items()},
            self._tokens_V.cpu(),
            self._active_V.cpu(),
        )


def collect(
    model: PeftModel, examples: Mapping[str, Sequence[Encoded]], pad_id: int, batch_size: int, doing: str
) -> Observed:
    """Run all examples through the model once.

    Args:
        model: with its adapter, on its device, in evaluation mode.
        examples: domain -> sequences.
        pad_id: for batches.
        batch_size: sequences of one forward.
        doing: what the progress bar says.

    Raises:
        UserError: where an adapted linear does not read every token.
    """
    base: Any = model.get_base_model()
    device = next(base.parameters()).device
    counter = Counter(base.get_input_embeddings().num_embeddings, device)
    with tqdm(total=sum(map(len, examples.values())), desc=doing, unit="row") as progress:
        for domain, sequences in examples.items():
            for batch in batches(sequences, pad_id, batch_size, device):
                counter.begin(domain, batch)
                route(model, batch, counter)
                progress.update(len(batch["input_ids"]))
    return counter.result()


def batches(
    examples: Sequence[Encoded], pad_id: int, batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches of sequences of like length."""
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    for start in range(0, len(by_length), batch_size):
        yield collate(by_length[start : start + batch_size], pad_id, device)
