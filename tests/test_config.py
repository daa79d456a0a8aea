"""Run configs: loading, overrides, and errors that name the key and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ldmole_dist.cli import main
from ldmole_dist.config import Config, accumulation_steps, check_parallelism, dump_config, load_config
from ldmole_dist.errors import UserError

SHIPPED = sorted((Path(__file__).parents[1] / "launch" / "configs").rglob("*.yaml"))
QUICKSTART = Path(__file__).parents[1] / "launch" / "configs" / "quickstart.yaml"
MINIMAL: dict[str, Any] = {
    "backbone": {"path": "backbone"},
    "data": {"train": "train.jsonl"},
    "run": {"output_dir": "runs/x"},
    "optimisation": {"max_steps": 10},
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(MINIMAL))
    return str(tmp_path / "config.yaml")


def refused(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load_config(path, list(overrides))
    return str(raised.value)


def test_dumped_config_loads_as_equal(path: str, tmp_path: Path) -> None:
    config = load_config(path, ["adapter.r=4", "data.labels=[a, b]", "optimisation.betas=[0.8, 0.9]"])
    assert config.adapter.r == 4 and config.data.labels == ["a", "b"] and config.optimisation.betas == (0.8, 0.9)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "again.yaml"), []) == config


def test_override_without_section(path: str) -> None:
    assert load_config(path, ["resume=never"]).run.resume == "never"
    assert load_config(path, ["run={output_dir: there}"]).run.output_dir == "there"
    assert "no section has a key 'resumee'" in refused(path, "resumee=never")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.num_expert=4", "unknown key adapter.num_expert; did you mean num_experts?"),
        ("adaptor.r=4", "unknown key adaptor; did you mean adapter?"),
        ("adapter.r=0", "adapter.r=0"),
        ("adapter.r=four", "adapter.r='four'"),
        ("adapter.lora_dropout=1.5", "adapter.lora_dropout=1.5"),
        ("parallelism.dispatch=some", "parallelism.dispatch='some'"),
        ("parallelism.precision=int8", "parallelism.precision='int8'"),
        ("adapter.num_experts=6", "use one of [1, 2, 3, 6]"),
        ("adapter.num_experts=0", ": adapter.num_experts=0: input should be greater than or equal to 1"),
        ("adapter.num_experts=[]", ": adapter.num_experts=[]: list should have at least 1 item"),
        ("adapter.num_experts=[4, 0]", ": adapter.num_experts.1=0: input should be greater than or equal to 1"),
        (
            "adapter.num_experts=[2, 4]",
            "parallelism.ep_size=4 does not divide adapter.num_experts=[2, 4]; use one of [1, 2]",
        ),
        (
            "adapter={router: topk, num_experts: [2, 8], top_k: 4}",
            "adapter.top_k=4 is greater than the smallest entry of adapter.num_experts=[2, 8]",
        ),
        (
            "optimisation.epochs=1",
            "optimisation.epochs and optimisation.max_steps are both set; set exactly one of them",
        ),
        ("optimisation.max_steps=null", "optimisation.epochs and optimisation.max_steps are both unset"),
        ("backbone.task=sequence_classification", "needs class names; set data.labels"),
        ("data.labels=[a, a]", "must have at least two entries, all different"),
        ("run.save_every=-1", "run.save_every=-1"),
        ("run.output_dir", "does not have the form section.key=value"),
        ("run.output_dir.x=1", "'output_dir' is a value, not a section"),
        ("run.output_dir=[", "the value is not YAML"),
    ],
)
def test_errors_name_the_key_and_the_remedy(path: str, override: str, said: str) -> None:
    assert said in refused(path, "parallelism.ep_size=4" if "num_experts" in override else "seed=1", override)


def test_missing_sections_and_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("backbone: {path: x}\n")
    assert "data is missing" in refused(str(tmp_path / "part.yaml"))
    (tmp_path / "list.yaml").write_text("[1, 2]\n")
    assert "must be a mapping" in refused(str(tmp_path / "list.yaml"))
    assert "give the path of a YAML file" in refused(str(tmp_path / "none.yaml"))


def test_empty_section_is_filled_by_an_override(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump(MINIMAL | {"run": None}))
    assert load_config(str(tmp_path / "empty.yaml"), ["run.output_dir=runs/y"]).run.output_dir == "runs/y"


def with_batches(path: str, micro: int, all_ranks: int) -> Config:
    return load_config(path, [f"optimisation.micro_batch_size={micro}", f"optimisation.global_batch_size={all_ranks}"])


def test_batch_size_and_ep_size_must_fit_the_ranks(path: str) -> None:
    assert accumulation_steps(with_batches(path, 2, 16), 4) == 2
    with pytest.raises(UserError, match="set the global batch size to 12 or 18"):
        accumulation_steps(with_batches(path, 2, 16), 3)
    with pytest.raises(UserError, match="set the global batch size to 8"):
        accumulation_steps(with_batches(path, 2, 4), 4)
    config = load_config(path, ["ep_size=4", "optimisation.global_batch_size=24", "micro_batch_size=2"])
    with pytest.raises(UserError, match=r"ep_size=4 does not divide the 6 ranks.*\[1, 2, 3, 6\]"):
        check_parallelism(config, 6)


def test_validate_command(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", path, "--ranks", "2"]) == 0
    assert "is valid for 2 ranks" in capsys.readouterr().out
    assert main(["validate", path, "deepspeed=zero9"]) == 2
    assert "zero9" in capsys.readouterr().err


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    config = load_config(str(path), [])
    assert config.backbone.task == "causal_lm" or config.data.labels
    check_parallelism(config, config.parallelism.ep_size)
