"""Bad input makes every rank exit with a non-zero code and exactly one error message."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launched import Launched
from tests.small_run import make_backbone, make_config, make_folder


def fail_training(config: Path, *overrides: str, only_rank_1: tuple[str, ...] = (), forked: bool = True) -> str:
    """Train on two ranks as a launcher would, check that both fail, and return their output.

    Args:
        config: of the run.
        overrides: for both ranks.
        only_rank_1: further overrides for rank 1.
        forked: as of `Launched`.
    """
    with Launched(config, *overrides, rank_overrides={1: list(only_rank_1)}, forked=forked) as launched:
        codes, output = launched.wait(timeout=100)
    assert 0 not in codes, output
    assert output.count("error: ") == 1 and "Traceback" not in output, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("bad"))


def replace_line_8(folder: Path, name: str, line: str) -> str:
    """Write a copy of the training file with another line 8 and return the override that selects it."""
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[7] = line
    (folder / name).write_text("\n".join(lines) + "\n")
    return f"data.train={folder / name}"


def test_missing_data_file_is_named(folder: Path) -> None:
    output = fail_training(make_config(folder), "data.train=nowhere.jsonl", forked=False)
    assert "cannot read data file nowhere.jsonl: No such file" in output


def test_malformed_line_is_named(folder: Path) -> None:
    output = fail_training(make_config(folder), replace_line_8(folder, "malformed.jsonl", '{"prompt": "x", '))
    assert "malformed.jsonl, line 8: not valid JSON" in output


def test_unknown_label_is_named(folder: Path) -> None:
    output = fail_training(
        make_config(folder), replace_line_8(folder, "label.jsonl", '{"prompt": "x", "completion": " pink"}')
    )
    assert "label.jsonl, line 8" in output and "' pink'" in output and "data.labels" in output


def test_too_long_sequence_is_named(folder: Path) -> None:
    line = '{"prompt": "%s is", "completion": " red"}' % ("rose " * 50)
    output = fail_training(make_config(folder), replace_line_8(folder, "long.jsonl", line))
    assert "long.jsonl, line 8" in output and "data.max_length=32" in output and "data.truncation=true" in output


def test_unknown_target_module_is_named(folder: Path) -> None:
    output = fail_training(make_config(folder), "adapter.target_modules=[q_proj, query]")
    assert "['query']" in output and "'q_proj'" in output


def test_adapter_of_another_backbone_is_rejected(folder: Path, tmp_path: Path) -> None:
    from ldmole_dist.model.backbone import load_backbone, new_adapter
    from ldmole_dist.tuner.config import LdMoleConfig

    other = make_backbone(tmp_path / "other", layers=3)
    config = LdMoleConfig(num_experts=4, r=2, lambda_hidden=16, task_type="CAUSAL_LM")
    new_adapter(load_backbone(str(other), "causal_lm", "fp32"), config).save_pretrained(tmp_path / "adapter")
    output = fail_training(make_config(folder), f"adapter.init_from={tmp_path / 'adapter'}")
    assert "another backbone" in output and "layers.2" in output


@pytest.mark.parametrize("kind", ["missing", "not YAML", "unknown key"])
def test_invalid_config_is_explained(folder: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.yaml"
    if kind == "not YAML":
        path.write_text("data: [1, 2\n")
    elif kind == "unknown key":
        path = make_config(folder, adapter={"num_expert": 4})
    expected = {"missing": "No such file", "not YAML": "is not YAML", "unknown key": "did you mean num_experts?"}
    assert expected[kind] in fail_training(path)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_failure_on_one_rank_stops_all_ranks(folder: Path, tmp_path: Path, stage: int) -> None:
    damaged = make_backbone(tmp_path / "damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    for override, doing in (
        ("data.train=nowhere.jsonl", "reading the data"),
        (f"backbone.path={damaged.parent}", "checking the backbone"),
    ):
        output = fail_training(make_config(folder), f"parallelism.deepspeed=zero{stage}", only_rank_1=(override,))
        message = (
            "cannot read data file nowhere.jsonl: No such file" if "nowhere" in override else f"{damaged} is damaged"
        )
        assert f"error: {message}" in output
        assert f"stopped: rank 1 failed while {doing}: UserError: {message}" in output


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_nan_weight_is_reported_with_step_rank_and_layer(folder: Path, tmp_path: Path, stage: int) -> None:
    broken: Any = make_backbone(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    overrides = [f"backbone.path={broken}", f"parallelism.deepspeed=zero{stage}", "data.eval=null"]
    output = fail_training(make_config(folder), *overrides)
    assert "at step 1" in output and "layers.1.mlp.up_proj" in output
    assert "rank 0: first non-finite output" in output and "rank 1: first non-finite output" in output
    assert "weight is not finite" in output
