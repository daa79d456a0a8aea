"""Reported communication: by kind at every step, by input group in detailed steps, in metrics.jsonl and TensorBoard."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldmole_dist.parallel.wire import FORWARD, KINDS
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.small_run import make_config, make_folder, run_training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sent_elements_are_reported_by_kind_and_group(tmp_path: Path, ranks2: LocalRanks, checkpointing: bool) -> None:
    config = make_config(
        make_folder(tmp_path),
        data={"eval": None},
        optimisation={"max_steps": 4, "global_batch_size": 8},
        parallelism={"gradient_checkpointing": checkpointing, "precision": "bf16", "dispatch": "all_to_all"},
        run={"detail_every": 2},
    )
    ranks2.run(run_training, str(config))
    steps: list[dict[str, Any]] = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for step in steps:
        kinds = step["wire"]
        assert tuple(kinds) == KINDS and sum(kinds.values()) == step["wire_elements"]
        assert kinds["rows"] > 0 and kinds["sums"] > 0 == kinds["weights"]
        assert kinds["grad_sums"] == kinds["sums"] and kinds["grad_gates"] == kinds["gates"]
        # 2 micro-batches on each of 2 ranks; 8 groups with 3 + 1 + 2 + 1 linears per layer; 2 experts per rank.
        assert kinds["counts"] == 2 * 2 * 2 * ((3 + 1 + 2 + 1) * (1 + 2) + 4 * 2)
        if checkpointing:
            assert [kinds[f"again_{kind}"] for kind in FORWARD] == [kinds[kind] for kind in FORWARD]
            assert kinds["grad_rows"] == kinds["rows"]
        else:
            assert sum(kinds[f"again_{kind}"] for kind in FORWARD) == 0
            # The input of q, k and v in the first layer, the embeddings, needs no gradient.
            assert 0 < kinds["grad_rows"] < kinds["rows"]
        # Rows and sums are bfloat16, gates float32, counts int64.
        narrow = sum(n for kind, n in kinds.items() if kind.endswith(("rows", "sums")))
        wide = sum(n for kind, n in kinds.items() if kind.endswith("gates"))
        assert step["wire_bytes"] == 2 * narrow + 4 * wide + 8 * kinds["counts"]
    assert ["wire_by_group" in step for step in steps] == [False, True, False, True]
    groups = steps[1]["wire_by_group"]
    assert len(groups) == 8
    assert sum(sum(kinds.values()) for kinds in groups.values()) == steps[1]["wire_elements"]

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/wire_elements", "wire/rows", "wire/again_rows"} <= tags
    assert {f"wire_by_group/{name}/rows" for name in groups} <= tags
    assert [event.value for event in events.Scalars("wire/rows")] == [step["wire"]["rows"] for step in steps]
