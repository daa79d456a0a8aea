"""The data of a run, from its config to what every rank trains and evaluates on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from ldmole_dist.config import Config
from ldmole_dist.data.batches import Mixture, TrainingOrder, describe_order, digest_of, mixture_of
from ldmole_dist.data.cache import encode_cached
from ldmole_dist.data.encode import Encoded, Encoder
from ldmole_dist.data.rows import Row
from ldmole_dist.data.sources import RowMaker, read_rows, sources_of
from ldmole_dist.data.streaming import Part, StreamedRows, read_part
from ldmole_dist.data.training_data import InMemory, Streamed, TrainingData
from ldmole_dist.distributed import Process, raise_on_all_ranks

FEW = 16  # examples for whoever wants to look at some


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Args:
        training: this rank's, step by step.
        size: examples of the training set.
        described: what their order depends on (`describe_order`).
        few: the first examples of the training set.
        held_out: the evaluation set, on every rank; None without one.
    """

    training: TrainingData
    size: int
    described: dict[str, int | str]
    few: Sequence[Encoded]
    held_out: list[Encoded] | None


def read_data(config: Config, tokenizer: PreTrainedTokenizerBase, process: Process) -> RunData:
    """Read, check and, unless they are streamed, encode all rows; every rank calls it.

    Raises:
        UserError, PeerError: on every rank, naming file, line and reason of the first row that is not as it should be.
    """
    data, task, quiet = config.data, config.backbone.task, not process.is_main

    with raise_on_all_ranks("looking at the tokenizer"):
        encoder = Encoder(tokenizer, task, data.labels, data.max_length, data.truncation)

    def encoded(by_source: list[list[Row]], doing: str) -> list[Encoded]:
        rows = [row for rows in by_source for row in rows]
        return encode_cached(encoder, rows, data.cache, doing, quiet, write=process.is_main)

    streamed = _look_at_files(config, encoder, process) if data.streaming else None
    with raise_on_all_ranks("reading the data"):
        held_out = None
        if data.eval is not None:
            found = read_rows(data.eval, task, data.labels, data.eval_limit, split="eval")
            held_out = encoded(found, "tokenising the evaluation set")
        if streamed is not None:
            mixture = mixture_of(data.train, streamed.sizes)
            order = _order(config, streamed.lengths, process, mixture)
            training = Streamed(streamed, encoder, order, process.rank, data.workers)
            few = [encoder.encode(streamed.row(index)) for index in range(min(FEW, len(streamed)))]
            described = describe_order(config, len(streamed), streamed.digest, mixture)
            return RunData(training, len(streamed), described, few, held_out)
        by_source = read_rows(data.train, task, data.labels)
        mixture = mixture_of(data.train, [len(rows) for rows in by_source])
        examples = encoded(by_source, "tokenising the training set")
    order = _order(config, [len(example.input_ids) for example in examples], process, mixture)
    described = describe_order(config, len(examples), digest_of(examples), mixture)
    return RunData(InMemory(examples, order, process.rank), len(examples), described, examples[:FEW], held_out)


def _order(config: Config, lengths: Sequence[int], process: Process, mixture: Mixture | None) -> TrainingOrder:
    o = config.optimisation
    return TrainingOrder(lengths, o.global_batch_size, o.micro_batch_size, process.world_size, config.run.seed, mixture)


def _look_at_files(config: Config, encoder: Encoder, process: Process) -> StreamedRows:
    """Every rank reads and checks its part of every file, and knows all parts afterwards."""
    sources = sources_of(config.data.train)
    with raise_on_all_ranks("checking the data"):
        makers = [RowMaker(s, config.backbone.task, config.data.labels, named=len(sources) > 1) for s in sources]
        mine = [
            read_part(source, maker, encoder.check, process.rank, process.world_size, not process.is_main)
            for source, maker in zip(sources, makers, strict=True)
        ]
    of_ranks: list[list[Part]] = [mine] * process.world_size
    dist.all_gather_object(of_ranks, mine)
    return StreamedRows(sources, makers, list(zip(*of_ranks, strict=True)))
