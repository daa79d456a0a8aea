"""A model to evaluate: a run's config with the adapter that was saved, on as many ranks as there are, at its ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ldmole_dist.config import Config, check_parallelism, make_config, plain_config
from ldmole_dist.data.encode import Encoded, Encoder
from ldmole_dist.data.rows import Row
from ldmole_dist.data.sources import read_rows
from ldmole_dist.distributed import Process, raise_on_all_ranks
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.ds_config import resolve_run, stage_of
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.errors import UserError
from ldmole_dist.evaluation.evaluator import Evaluator
from ldmole_dist.evaluation.metrics import Outcomes
from ldmole_dist.model.backbone import load_tokenizer
from ldmole_dist.model.build import build_model
from ldmole_dist.model.saved import SavedModel


@dataclass(frozen=True)
class Evaluated:
    """A model on its ranks.

    Args:
        config: as it was resolved for them.
        engine: with the model.
        tokenizer: of the backbone.
        process: of this rank.
        stage: of ZeRO.
    """

    config: Config
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    process: Process
    stage: int

    def outcomes(self, examples: Sequence[Encoded], doing: str) -> Outcomes:
        """Of every example, on every rank; every rank calls it."""
        batch_size = self.config.optimisation.micro_batch_size
        evaluator = Evaluator(examples, int(self.tokenizer.pad_token_id), batch_size, self.process)
        return evaluator.outcomes(self.engine.module, doing)


def config_of(
    saved: SavedModel, overrides: list[str], data: str | None, limit: int | None, batch_size: int | None
) -> Config:
    """The config to evaluate with: the run's, or for an adapter alone one with defaults.

    Args:
        saved: run or adapter.
        overrides: "a.b=c".
        data: file to evaluate on, instead of data.eval.
        limit: rows of each source.
        batch_size: rows of a forward; None: twice the run's micro-batch.

    Raises:
        UserError: where a value is not as it must be.
    """
    if saved.config is not None:
        raw = plain_config(saved.config)
    else:
        # What has no default and is not used.
        raw = {"data": {"train": ""}, "optimisation": {"max_steps": 1}, "run": {"output_dir": str(saved.adapter)}}
        raw["backbone"] = {"task": saved.task}
    raw["backbone"]["path"] = saved.backbone
    raw.setdefault("adapter", {})["init_from"] = str(saved.adapter)
    if data is not None:
        raw["data"] |= {"eval": data, "eval_limit": None}
    if limit is not None:
        raw["data"]["eval_limit"] = limit
    config = make_config(raw, overrides, str(saved.run or saved.adapter))
    o = config.optimisation
    o.micro_batch_size, o.optimizer = batch_size or 2 * o.micro_batch_size, "adamw"
    config.parallelism.gradient_checkpointing = False
    return config


@contextmanager
def prepared(config: Config, with_adapter: bool) -> Iterator[Evaluated]:
    """Load the model on all ranks; every rank calls it.

    Args:
        config: from `config_of`.
        with_adapter: False switches it off within.

    Raises:
        UserError, PeerError: on every rank.
    """
    process = start(config.parallelism.timeout_minutes)
    p, o = config.parallelism, config.optimisation
    p.ep_size = math.gcd(p.ep_size, process.world_size)  # results do not depend on it
    o.global_batch_size = o.micro_batch_size * process.world_size
    with raise_on_all_ranks("checking the config"):
        check_parallelism(config, process.world_size)
        ds_config = resolve_run(config, process.world_size)
        tokenizer = load_tokenizer(config.backbone.path)
    parallel = expert_parallel(p.ep_size, p.dispatch, p.overlap)
    model = build_model(config, parallel, process, stage_of(ds_config), tokenizer.pad_token_id)
    # DeepSpeed partitions a model only together with an optimizer, which never steps here.
    engine = Engine(model, ds_config, o)
    model.eval()
    switched: Any = nullcontext() if with_adapter else model.disable_adapter()
    with switched:
        yield Evaluated(config, engine, tokenizer, process, stage_of(ds_config))


def rows_and_encoder(config: Config) -> tuple[list[Row], Encoder]:
    """What the config evaluates on; every rank calls it, before the model is loaded, which takes longer.

    Raises:
        UserError, PeerError: on every rank, where it cannot be read.
    """
    start(config.parallelism.timeout_minutes)
    data, task = config.data, config.backbone.task
    with raise_on_all_ranks("reading the data"):
        if data.eval is None:
            raise UserError("there is no data to evaluate on: give --data FILE, or data.eval=[...]")
        found = read_rows(data.eval, task, data.labels, data.eval_limit, split="eval")
        encoder = Encoder(load_tokenizer(config.backbone.path), task, data.labels, data.max_length, data.truncation)
    return [row for rows in found for row in rows], encoder
