"""Write the run config and the DeepSpeed config of a candidate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldmole_dist.config import Adapter, Backbone, Config, Data, Optimisation, Parallelism, Run, dump_config
from ldmole_dist.engine.ds_config import load_ds_config, resolve_run
from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_write, write_errors
from ldmole_dist.planner.candidates import Candidate

PLACEHOLDER = "FILL_IN"


def write_configs(
    candidate: Candidate, folder: Path, backbone: str | None, train: str | None, output: str | None
) -> list[str]:
    """Write `run.yaml` and `deepspeed.json`, either both or neither. An existing file is never overwritten.

    Args:
        candidate: Candidate to train.
        folder: Folder to write to; created if it does not exist.
        backbone: Path or hub name of the backbone; None writes `PLACEHOLDER`.
        train: Training file; None writes `PLACEHOLDER`.
        output: Output folder of the run; None writes `PLACEHOLDER`.

    Returns:
        Names of the config fields that contain the placeholder.

    Raises:
        UserError: If the config is invalid, the folder cannot be written to, or one of the files exists already.
    """
    run, deepspeed = folder / "run.yaml", folder / "deepspeed.json"
    given = {"backbone.path": backbone, "data.train": train, "run.output_dir": output}
    missing = [key for key, value in given.items() if value is None]
    w, s = candidate.workload, candidate.strategy
    zero: dict[str, Any] = load_ds_config(s.deepspeed)
    zero["zero_optimization"].update(dict(s.zero))
    config = Config(
        backbone=Backbone(path=backbone or PLACEHOLDER, quantization=w.quantization),
        adapter=Adapter(
            r=w.lora_rank,
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
    # Check the config before writing. deepspeed.json does not exist yet, so use the shipped DeepSpeed config for the check.
    resolve_run(replace(config, parallelism=replace(config.parallelism, deepspeed=s.deepspeed)), s.ranks)
    header = f"# {candidate.name}, {s.ranks} ranks. Start it with: ldmole launch {run}\n"
    if missing:
        header += f"# Set {', '.join(missing)} here, or on the command line as {missing[0]}=VALUE.\n"
    _write_new(folder, {deepspeed: json.dumps(zero, indent=2) + "\n", run: header + dump_config(config)})
    return missing


def _write_new(folder: Path, contents: dict[Path, str]) -> None:
    """Write all files. If one exists already or cannot be written, raise UserError and write none."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--write {folder} is not a folder; choose another path.")
    if existing := [path for path in contents if path.exists()]:
        raise UserError(f"--write: {existing[0]} already exists; remove it or choose another folder.")
    try:
        with write_errors(f"the configs in --write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for path, text in contents.items():
                atomic_write(path, text)
    except UserError:
        for path in contents:
            if path.is_file():  # unlink(missing_ok=True) would raise if a parent of the folder is a file
                path.unlink()
        raise
