"""The run config and the DeepSpeed config of a line, ready to be filled in and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldmole_dist.config import Adapter, Backbone, Config, Data, Optimisation, Parallelism, Run, dump_config, load_config
from ldmole_dist.engine.ds_config import load_ds_config, resolve_run
from ldmole_dist.errors import UserError
from ldmole_dist.study.plan.choose import Line

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
    if existing := [str(path) for path in (run, deepspeed) if path.exists()]:
        raise UserError(f"--write {folder}: {existing[0]} is there already: remove it or choose another folder")
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        deepspeed.write_text(json.dumps(zero, indent=2) + "\n")
        run.write_text("\n".join(heading) + "\n" + dump_config(config))
    except OSError as error:
        raise UserError(f"--write {folder}: {error.strerror or error}; choose a folder that can be written") from error
    resolve_run(load_config(str(run), []), s.ranks)  # what was written is what can be read
    return missing
