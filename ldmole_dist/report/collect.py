"""Run a data set through a model and count how often its routers activate each expert.

The counts take O(V + linears x E x (E + domains)) memory, independent of the number of rows.

Shapes: B sequences, S positions, T = B S tokens, E experts, V vocabulary size.
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
from ldmole_dist.method.statistics import RoutingSums, merge_sums
from ldmole_dist.model.forward import observe_routing


@dataclass(frozen=True)
class Observed:
    """Routing counts of a data set. Padding is not counted.

    Attributes:
        by_domain: Domain -> name of a linear -> result of `statistics.routing_sums`, summed over batches.
        together: Name of a linear -> (E, E), number of tokens for which both experts are active; on the diagonal,
            number of tokens for which that expert is active.
        tokens_V: (V,), number of occurrences of each token id.
        active_V: (V,), number of active experts of each token id, summed over occurrences and linears.
    """

    by_domain: Mapping[str, Mapping[str, Tensor]]
    together: Mapping[str, Tensor]
    tokens_V: Tensor
    active_V: Tensor

    @property
    def by_linear(self) -> dict[str, Tensor]:
        """Name of a linear -> its sums in the format of `statistics.routing_sums`, over all domains."""
        names = next(iter(self.by_domain.values()))
        return {name: merge_sums(sums[name] for sums in self.by_domain.values()) for name in names}


class Counter:
    """Observer (`context.Observer`) that accumulates the counts of `Observed` on a device.

    Call `begin` before each forward.

    Args:
        vocabulary: V, number of token ids.
        device: Device of the counts.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._domains: dict[str, RoutingSums] = {}
        self._together: dict[str, Tensor] = {}
        self._tokens_V, self._active_V = (torch.zeros(vocabulary, dtype=torch.int64, device=device) for _ in range(2))

    def begin(self, domain: str, batch: Mapping[str, Tensor]) -> None:
        """Count the tokens of the next forward's batch. All of its sequences belong to `domain`."""
        self._sums = self._domains.setdefault(domain, RoutingSums())
        self._ids_T = batch["input_ids"].flatten()
        self._mask_T = batch["attention_mask"].flatten() != 0
        self._tokens_V.index_add_(0, self._ids_T, self._mask_T.long())

    def __call__(self, name: str, routing: Routing, mask_T: Tensor | None) -> None:
        """Count the routing of one linear (signature of `context.Observer`).

        Real tokens are those in the attention mask of the batch passed to `begin`; `mask_T` is not used.

        Raises:
            UserError: If the number of the linear's input rows differs from the number of tokens.
        """
        if len(routing.p_TE) != len(self._mask_T):
            raise UserError(
                f"{name} reads {len(routing.p_TE)} rows for a batch of {len(self._mask_T)} tokens, so rows cannot be assigned "
                "to tokens; use `ldmole report` with an adapter whose linears all read one row per token."
            )
        self._sums(name, routing, self._mask_T)
        active_TE = (routing.p_TE != 0) & self._mask_T.unsqueeze(1)
        self._active_V.index_add_(0, self._ids_T, active_TE.sum(1))
        active_TE = active_TE.float()  # float32 is exact up to 2^24, far above the number of tokens in a batch
        together_EE = (active_TE.T @ active_TE).double()
        previous = self._together.get(name)
        self._together[name] = together_EE if previous is None else previous + together_EE

    def result(self) -> Observed:
        """Return the counts of all forwards so far, copied to the CPU."""
        return Observed(
            {domain: {n: s.cpu() for n, s in sums.by_linear.items()} for domain, sums in self._domains.items()},
            {name: together.cpu() for name, together in self._together.items()},
            self._tokens_V.cpu(),
            self._active_V.cpu(),
        )


def collect(model: PeftModel, examples: Mapping[str, Sequence[Encoded]], pad_id: int, batch_size: int) -> Observed:
    """Run all examples through the model once and return the routing counts.

    Args:
        model: Model with its adapter, in evaluation mode.
        examples: Domain -> sequences.
        pad_id: Token id of the padding.
        batch_size: Sequences per forward.

    Raises:
        UserError: If an adapted linear does not read one row per token.
    """
    base: Any = model.get_base_model()
    device = next(base.parameters()).device
    counter = Counter(base.get_input_embeddings().num_embeddings, device)
    with tqdm(total=sum(map(len, examples.values())), desc="routing the data", unit="row") as progress:
        for domain, sequences in examples.items():
            for batch in batches(sequences, pad_id, batch_size, device):
                counter.begin(domain, batch)
                observe_routing(model, batch, counter)
                progress.update(len(batch["input_ids"]))
    return counter.result()


def batches(
    examples: Sequence[Encoded], pad_id: int, batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield padded batches of sequences of similar length, shortest first.

    Args:
        examples: Sequences.
        pad_id: Token id of the padding.
        batch_size: Sequences per batch.
        device: Device of the tensors.
    """
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    for start in range(0, len(by_length), batch_size):
        yield collate(by_length[start : start + batch_size], pad_id, device)
