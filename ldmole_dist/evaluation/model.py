"""Load a saved adapter on all ranks for evaluation, at the ZeRO stage of the config."""

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
class DistributedModel:
    """Model that is loaded on all ranks for evaluation.

    Args:
        config: config of the evaluation, resolved for the world size.
        engine: engine that holds the model.
        tokenizer: tokenizer of the backbone.
        process: this rank.
        stage: ZeRO stage.
    """

    config: Config
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    process: Process
    stage: int

    def outcomes(self, examples: Sequence[Encoded], progress: str) -> Outcomes:
        """Return the outcomes of all examples on every rank. Collective: every rank must call it."""
        batch_size = self.config.optimisation.micro_batch_size
        evaluator = Evaluator(examples, int(self.tokenizer.pad_token_id), batch_size, self.process)
        return evaluator.outcomes(self.engine.module, progress)


def eval_config(
    saved: SavedModel, overrides: list[str], data: str | None, limit: int | None, batch_size: int | None
) -> Config:
    """Return the config of an evaluation: the config of the run, or the defaults for an adapter without a run, with overrides.

    Gradient checkpointing is off and the optimizer is AdamW, whatever the run or the overrides set.

    Args:
        saved: run or adapter.
        overrides: config values to override, each as "a.b=c".
        data: evaluation file that replaces `data.eval`; None keeps it.
        limit: maximum number of rows of each source; None keeps `data.eval_limit`, or reads all rows if `data` is set.
        batch_size: sequences per forward pass of a rank; None uses twice `optimisation.micro_batch_size`.

    Raises:
        UserError: if a value of the config is invalid.
    """
    if saved.config is not None:
        raw = plain_config(saved.config)
    else:
        # The config requires these keys, but evaluation does not use them.
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
def load_distributed(config: Config, with_adapter: bool) -> Iterator[DistributedModel]:
    """Load a model on all ranks and yield it. Collective: every rank must enter the context.

    Args:
        config: return value of `eval_config`; its ep_size and global_batch_size are set to values that fit the world size.
        with_adapter: if False, disable the adapter in the context.

    Raises:
        UserError, PeerError: on every rank, if the config is invalid for the world size or the model cannot be loaded.
    """
    process = start(config.parallelism.timeout_minutes)
    p, o = config.parallelism, config.optimisation
    p.ep_size = math.gcd(p.ep_size, process.world_size)  # the results do not depend on ep_size
    o.global_batch_size = o.micro_batch_size * process.world_size
    with raise_on_all_ranks("checking the config"):
        check_parallelism(config, process.world_size)
        ds_config = resolve_run(config, process.world_size)
        tokenizer = load_tokenizer(config.backbone.path)
    parallel = expert_parallel(p.ep_size, p.dispatch, p.overlap)
    model = build_model(config, parallel, process, stage_of(ds_config), tokenizer.pad_token_id)
    # The engine always creates an optimizer; evaluation never calls it.
    engine = Engine(model, ds_config, o)
    model.eval()
    context: Any = nullcontext() if with_adapter else model.disable_adapter()
    with context:
        yield DistributedModel(config, engine, tokenizer, process, stage_of(ds_config))


def load_eval_data(config: Config) -> tuple[list[Row], Encoder]:
    """Read the evaluation rows of a config, and return them and their encoder. Collective: every rank must call it.

    Call this function before `load_distributed`, so that an error in the data is reported before the model is loaded.

    Raises:
        UserError, PeerError: on every rank, if `data.eval` is not set, `read_rows` raises an error, or the tokenizer cannot be
            loaded or does not fit `data.labels`.
    """
    start(config.parallelism.timeout_minutes)
    data, task = config.data, config.backbone.task
    with raise_on_all_ranks("reading the data"):
        if data.eval is None:
            raise UserError("data.eval is not set; pass --data FILE or set data.eval=FILE.")
        by_source = read_rows(data.eval, task, data.labels, data.eval_limit, split="eval")
        encoder = Encoder(load_tokenizer(config.backbone.path), task, data.labels, data.max_length, data.truncation)
    return [row for rows in by_source for row in rows], encoder
