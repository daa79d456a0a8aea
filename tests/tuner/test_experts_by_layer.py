"""Adapters with a different number of experts per layer, as in MoLA: assignment, files, reports and refused values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from ldmole_dist.checkpoint.inspect import print_table
from ldmole_dist.cli import main
from ldmole_dist.config import Adapter
from ldmole_dist.method.statistics import merge_sums, summarize
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.compare.methods import equal_lora_rank
from ldmole_dist.tuner.targets import experts_of_linear
from tests.small_adapter import adapt, backbone, config, logits, move, trainable
from tests.small_run import make_config, make_folder, run_training


def test_entries_are_assigned_to_equal_shares_of_layers() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(8))})

    def counts(*given: int) -> list[int]:
        settings = config(num_experts=list(given))
        return [experts_of_linear(model, settings, f"layers.{layer}.q") for layer in range(8)]

    assert counts(2, 4, 6, 8) == [2, 2, 4, 4, 6, 6, 8, 8]
    assert counts(2, 4, 6) == [2, 2, 2, 4, 4, 4, 6, 6]
    assert counts(1, 2, 3, 4, 5, 6, 7, 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert counts(3) == [3] * 8
    with pytest.raises(ValueError, match="has 9 entries, but layers has only 8 layers"):
        counts(*range(1, 10))


def test_invalid_counts_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"num_experts=\[2, 4\] is a list, but lm_head is not in a numbered decoder layer"
    ):
        adapt(num_experts=[2, 4], target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"than the smallest entry of num_experts=\[2, 4\]; lower top_k to at most 2"):
        config(router="topk", top_k=3, num_experts=[2, 4])
    for wrong in ([], [2, 0], 0):
        with pytest.raises(ValueError, match="num_experts.*(greater than or equal to 1|at least 1 item)"):
            config(num_experts=wrong)


def test_files_have_the_experts_of_each_layer(tmp_path: Path) -> None:
    model = move(adapt(num_experts=[2, 3]))
    model.save_pretrained(tmp_path)
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        if "lambda_mlp" not in name:
            assert len(tensor) == (2 if ".layers.0." in name else 3), name
    torch.testing.assert_close(logits(PeftModel.from_pretrained(backbone(), str(tmp_path))), logits(model))


def test_statistics_of_linears_with_different_numbers_of_experts_add_up() -> None:
    sums = [torch.arange(4.0 + 3 * E + 1) for E in (1, 2)]
    together = summarize(merge_sums(sums))
    assert together["tokens"] == 0 and together["lambda_mean"] == pytest.approx(2.0)
    scalars, histogram, active = merge_sums(sums)[:4], merge_sums(sums)[4:7], merge_sums(sums)[7:9]
    assert scalars.tolist() == [0, 2, 4, 6] and histogram.tolist() == [8, 10, 6] and active.tolist() == [6 + 7, 8]


@pytest.mark.parametrize("num_experts", [4, [2, 4]])
def test_equal_rank_gives_the_nearest_number_of_parameters(tmp_path: Path, num_experts: int | list[int]) -> None:
    backbone().config.save_pretrained(tmp_path)
    for targets in (["q_proj", "down_proj"], r".*\.1\.mlp\.(up|down)_proj"):
        given = Adapter(num_experts=num_experts, r=4, lambda_hidden=8, target_modules=targets)
        model = adapt(num_experts=num_experts, r=4, target_modules=targets)
        rank = equal_lora_rank(str(tmp_path), given)
        wanted = sum(p.numel() for p in trainable(model).values())
        found = {
            r: sum(
                p.numel() for p in trainable(adapt(router="lora", num_experts=1, r=r, target_modules=targets)).values()
            )
            for r in (rank - 1, rank, rank + 1)
        }
        assert min(found, key=lambda r: abs(found[r] - wanted)) == rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ranks2: LocalRanks) -> Path:
    """Folder of a finished run on two ranks."""
    folder = make_folder(tmp_path_factory.mktemp("by_layer"))
    path = make_config(
        folder,
        adapter={"num_experts": [2, 4], "router": "topk", "top_k": 1},
        data={"eval_limit": 3},
        optimisation={"max_steps": 2, "global_batch_size": 8},
        run={"detail_every": 1, "save_every": 1},
    )
    ranks2.run(run_training, str(path))
    return folder


def test_outputs_of_a_run(folder: Path, ranks2: LocalRanks, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "run"
    for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items():
        assert len(tensor) == (2 if ".layers.0." in name else 4), name
    routing = json.loads((run / "routing.jsonl").read_text().splitlines()[0])["linears"]
    assert {len(summary["load"]) for name, summary in routing.items() if ".0." in name} == {2}
    assert {len(summary["load"]) for name, summary in routing.items() if ".1." in name} == {4}
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["experts_per_token"] == 1
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Images("load/q_proj")[0].width == 4 * 16
    print_table(run / "checkpoints" / "step_00000002")
    assert "; experts per linear: 2, 4 (by group of layers); r: 2" in capsys.readouterr().out
    messages = ranks2.run(refusal, str(folder / "config.yaml"), "adapter.router=relu", "optimisation.max_steps=3")
    assert "adapter.router=topk, but this run has relu" in messages[0]


def refusal(path: str, *overrides: str) -> str:
    try:
        run_training(path, *overrides)
    except Exception as error:  # the test reads its message, whatever the type
        return str(error)
    return "none"


@pytest.mark.full
def test_report_of_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder / "run"), "--limit", "8", "--output", str(tmp_path / "report")]) == 0
    assert "1.00 of 2 to 4, mean over tokens and linears" in capsys.readouterr().out


@pytest.mark.full
def test_training_starts_from_the_saved_adapter_on_other_ranks(
    folder: Path, tmp_path: Path, ranks2: LocalRanks
) -> None:
    adapter, out = folder / "run" / "adapter", tmp_path / "further"
    overrides = [f"adapter.init_from={adapter}", f"run.output_dir={out}", "learning_rate=1e-12", "max_steps=1"]
    ranks2.run(run_training, str(folder / "config.yaml"), *overrides)
    before, after = (load_file(of / "adapter_model.safetensors") for of in (adapter, out / "adapter"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)
