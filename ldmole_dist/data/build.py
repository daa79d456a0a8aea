"""Training and evaluation data of a run, built from its config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from ldmole_dist.config import Config
from ldmole_dist.data.batches import Mixture, TrainingOrder, content_digest, describe_order, make_mixture
from ldmole_dist.data.cache import encode_cached
from ldmole_dist.data.encode import Encoded, Encoder
from ldmole_dist.data.rows import Row
from ldmole_dist.data.sources import RowParser, as_sources, read_rows
from ldmole_dist.data.streaming import PartIndex, StreamedRows, index_part
from ldmole_dist.data.training_data import InMemoryData, StreamedData, TrainingData
from ldmole_dist.distributed import Process, raise_on_all_ranks

SAMPLE_SIZE = 16  # training examples whose routing is probed if there is no evaluation set


@dataclass(frozen=True)
class RunData:
    """Data of a run.

    Args:
        training: micro-batches of this rank.
        size: number of training examples.
        order: values that determine the order of the examples (`describe_order`).
        sample: the first training examples, at most `SAMPLE_SIZE`.
        held_out: evaluation set, complete on every rank; None if `data.eval` is not set.
    """

    training: TrainingData
    size: int
    order: dict[str, int | str]
    sample: Sequence[Encoded]
    held_out: list[Encoded] | None


def read_data(config: Config, tokenizer: PreTrainedTokenizerBase, process: Process) -> RunData:
    """Return the data of a run: all rows are read and checked, and those that are not streamed are encoded.

    Collective: every rank must call it.

    Raises:
        UserError, PeerError: on every rank, if `data.labels` do not fit the tokenizer, a source does not fit the task, has no
            rows or cannot be read, a row is invalid or cannot be encoded, or the cache cannot be written. For a row, the
            message names the location (`Row.where`) and the reason.
    """
    data, task, quiet = config.data, config.backbone.task, not process.is_main

    with raise_on_all_ranks("checking the tokenizer"):
        encoder = Encoder(tokenizer, task, data.labels, data.max_length, data.truncation)

    def encode(by_source: list[list[Row]], progress: str) -> list[Encoded]:
        rows = [row for rows in by_source for row in rows]
        return encode_cached(encoder, rows, data.cache, progress, quiet, write=process.is_main)

    streamed = _index_files(config, encoder, process) if data.streaming else None
    with raise_on_all_ranks("reading the data"):
        held_out = None
        if data.eval is not None:
            eval_rows = read_rows(data.eval, task, data.labels, data.eval_limit, split="eval")
            held_out = encode(eval_rows, "tokenizing the evaluation set")
        if streamed is not None:
            mixture = make_mixture(data.train, streamed.sizes)
            order = _make_order(config, streamed.lengths, process, mixture)
            training = StreamedData(streamed, encoder, order, process.rank, data.workers)
            sample = [encoder.encode(streamed.row(index)) for index in range(min(SAMPLE_SIZE, len(streamed)))]
            described = describe_order(config, len(streamed), streamed.digest, mixture)
            return RunData(training, len(streamed), described, sample, held_out)
        by_source = read_rows(data.train, task, data.labels)
        mixture = make_mixture(data.train, [len(rows) for rows in by_source])
        examples = encode(by_source, "tokenizing the training set")
    order = _make_order(config, [len(example.input_ids) for example in examples], process, mixture)
    described = describe_order(config, len(examples), content_digest(examples), mixture)
    in_memory = InMemoryData(examples, order, process.rank)
    return RunData(in_memory, len(examples), described, examples[:SAMPLE_SIZE], held_out)


def _make_order(config: Config, lengths: Sequence[int], process: Process, mixture: Mixture | None) -> TrainingOrder:
    o = config.optimisation
    return TrainingOrder(lengths, o.global_batch_size, o.micro_batch_size, process.world_size, config.run.seed, mixture)


def _index_files(config: Config, encoder: Encoder, process: Process) -> StreamedRows:
    """Check and index the training files, and return their rows.

    Collective: each rank reads one part of every file and receives the indexes of all parts.
    """
    sources = as_sources(config.data.train)
    with raise_on_all_ranks("checking the data"):
        parsers = [RowParser(s, config.backbone.task, config.data.labels, named=len(sources) > 1) for s in sources]
        own_parts = [
            index_part(source, parser, encoder.check, process.rank, process.world_size, not process.is_main)
            for source, parser in zip(sources, parsers, strict=True)
        ]
    by_rank: list[list[PartIndex]] = [own_parts] * process.world_size
    dist.all_gather_object(by_rank, own_parts)
    return StreamedRows(sources, parsers, list(zip(*by_rank, strict=True)))
