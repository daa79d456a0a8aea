"""The run config and the DeepSpeed config of a line, ready to be filled in and run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldmole_dist.config import Adapter, Backbone, Config, Data, Optimisation, Parallelism, Run, dump_config
from ldmole_dist.engine.ds_config import load_ds_config, resolve_run
from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_write, write_errors
from ldmole_dist.planner.choose import Line

PLACEHOLDER = "FILL_IN"


def write_configs(line: Line, folder: Path, backbone: str | None, train: str | None, output: str | None) -> list[str]:
    """Write `run.yaml` and `deepspeed.json`.

    Args:
        line: what to run.
        folder: made if it is not there.
        backbone: path of the weights, or name on the hub; what is None is left to be filled in, as FILL_IN.
        train: training file.
        output: folder of the run.

    Returns:
        Keys that the user has to fill in.

    Raises:
        UserError: where the folder cannot be written, or holds configs already.
    """
    run, deepspeed = folder / "run.yaml", folder / "deepspeed.json"
    given = {"backbone.path": backbone, "data.train": train, "run.output_dir": output}
    missing = [key for key, value in given.items() if value is None]
    w, s = line.workload, line.strategy
    zero: dict[str, Any] = load_ds_config(s.deepspeed)
    zero["zero_optimization"].update(dict(s.zero))
    config = Config(
        backbone=Backbone(path=backbone or PLACEHOLDER),
        adapter=Adapter(
            r=w.rank,
            num_experts=w.num_experts,
            lambda_hidden=w.lambda_hidden,
            lora_dropout=w.dropout,
            target_modules=list(w.target_modules),
        ),
        data=Data(train=train or PLACEHOLDER, max_length=w.seq),
        optimisation=Optimisation(
            epochs=1.0, micro_batch_size=w.micro_batch, global_batch_size=w.micro_batch * w.accumulation * s.ranks
        ),
        parallelism=Parallelism(
            ep_size=s.ep_size,
            dispatch=s.dispatch,
            deepspeed=str(deepspeed.resolve()),
            precision=w.precision,
            gradient_checkpointing=s.checkpointing,
        ),
        run=Run(output_dir=output or PLACEHOLDER),
    )
    heading = [f"# {line.name()}, on {s.ranks} ranks: ldmole launch {run}"]
    if missing:
        heading.append(f"# Fill in {', '.join(missing)}, here or as {missing[0]}=... behind the command.")
    shipped = replace(config, parallelism=replace(config.parallelism, deepspeed=s.deepspeed))
    resolve_run(shipped, s.ranks)  # refuses what could not be run, before anything is written
    _write_new(
        folder,
        {deepspeed: json.dumps(zero, indent=2) + "\n", run: "\n".join(heading) + "\n" + dump_config(config)},
    )
    return missing


def _write_new(folder: Path, contents: dict[Path, str]) -> None:
    """Write all files or none, and overwrite none."""
    existing = [path for path in contents if path.exists()]
    if folder.exists() and not folder.is_dir():
        existing.append(folder)
    if existing:
        raise UserError(f"--write {folder}: {existing[0]} already exists; remove it or choose another folder.")
    try:
        with write_errors(f"--write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for path, text in contents.items():
                atomic_write(path, text)
    except UserError:
        for path in contents:
            path.unlink(missing_ok=True)
        raise
