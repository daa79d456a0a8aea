"""Checkpoints that are damaged, do not match the run or cannot be written cause one clear error and no data loss."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ldmole_dist.checkpoint.load import list_checkpoints
from ldmole_dist.checkpoint.manifest import _own_hash, read_manifest, verify
from ldmole_dist.cli import main
from ldmole_dist.errors import UserError
from ldmole_dist.selftest.local_ranks import LocalRanks, RankFailed
from tests.small_run import make_config, make_folder, run_training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ranks2: LocalRanks) -> Path:
    """Return a folder with a run of 4 steps and checkpoints after steps 2 and 4."""
    folder = make_folder(tmp_path_factory.mktemp("damaged"))
    make_config(folder, data={"eval": None}, optimisation={"max_steps": 4}, run={"save_every": 2})
    ranks2.run(run_training, str(folder / "config.yaml"))
    return folder


class Copy:
    """Copy of the run that a test may damage and resume."""

    def __init__(self, trained: Path, tmp_path: Path, ranks: LocalRanks) -> None:
        self.config, self.ranks, self.run = trained / "config.yaml", ranks, tmp_path / "run"
        shutil.copytree(trained / "run", self.run)
        self.last, self.first = list_checkpoints(self.run)

    def resume(self, *overrides: str) -> list[int]:
        """Train to step 6 and return the steps in metrics.jsonl."""
        fixed = [f"run.output_dir={self.run}", "optimisation.max_steps=6", "run.detail_every=1000"]
        self.ranks.run(run_training, str(self.config), *fixed, *overrides)
        return [json.loads(line)["step"] for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def resume_error(self, *overrides: str) -> str:
        """Return the error of a resume that must fail without changing the run's folder."""
        before = self._contents()
        with pytest.raises(RankFailed) as raised:
            self.resume(*overrides)
        assert self._contents() == before
        return str(raised.value)

    def _contents(self) -> dict[str, bytes]:
        files = (p for p in self.run.rglob("*") if p.is_file() and "tensorboard" not in p.parts)
        return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def copy(trained: Path, tmp_path: Path, ranks2: LocalRanks) -> Copy:
    return Copy(trained, tmp_path, ranks2)


def truncate(checkpoint: Path) -> str:
    path = checkpoint / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "rank_00001.safetensors has "


def flip(checkpoint: Path) -> str:
    path = checkpoint / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    return "rank_00000.safetensors was changed after it was written"


def remove(checkpoint: Path) -> str:
    (checkpoint / "rank_00001.safetensors").unlink()
    return "rank_00001.safetensors is missing"


def raise_version(checkpoint: Path) -> str:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 99'))
    return "has format 99, but this version reads format 2; upgrade"


def garble(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_text('{"format_version": 2, "step"')
    return "manifest.json cannot be read"


def change_manifest(checkpoint: Path) -> str:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"adam_step": 4', '"adam_step": 5'))
    return "manifest.json was changed after it was written"


@contextmanager
def changed_manifest(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """Yield the manifest's values, and write them back with the hash of what they are then."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    yield manifest
    del manifest["sha256"]
    manifest["sha256"] = _own_hash(manifest)
    path.write_text(json.dumps(manifest))


DAMAGES = [truncate, flip, remove, raise_version, garble, change_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(copy: Copy, damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]) -> None:
    message = damage(copy.last)
    assert main(["checkpoint", "verify", str(copy.last)]) == 2
    assert message in "".join(capsys.readouterr())
    assert main(["checkpoint", "verify", str(copy.first)]) == 0
    assert main(["checkpoint", "export", str(copy.last), str(copy.run / "exported")]) == 2
    assert message in capsys.readouterr().err and not (copy.run / "exported").exists()


@pytest.mark.parametrize(
    "damage", [truncate, *(pytest.param(damage, marks=pytest.mark.nightly) for damage in DAMAGES[1:])]
)
def test_damaged_checkpoint_is_rejected_and_auto_uses_an_older_one(copy: Copy, damage: Callable[[Path], str]) -> None:
    assert damage(copy.last) in copy.resume_error(f"run.resume={copy.last}")
    assert copy.resume("run.save_every=2") == [1, 2, 3, 4, 5, 6]  # resumed after step 2
    names = sorted(path.name for path in (copy.run / "checkpoints").iterdir())
    # The damaged checkpoint is renamed, not deleted.
    assert names == ["latest", "step_00000004", "step_00000006", "unused_step_00000004"]
    assert all(verify(checkpoint) == [] for checkpoint in list_checkpoints(copy.run))


def test_run_does_not_start_fresh_if_all_checkpoints_are_damaged(copy: Copy) -> None:
    flip(copy.last)
    remove(copy.first)
    assert "no usable checkpoint to resume from" in copy.resume_error()


@pytest.mark.full
def test_resuming_from_an_older_checkpoint_renames_later_ones(copy: Copy) -> None:
    assert copy.resume(f"run.resume={copy.first}", "run.save_every=3") == [1, 2, 3, 4, 5, 6]
    names = sorted(path.name for path in (copy.run / "checkpoints").iterdir())
    assert names == ["latest", "step_00000003", "step_00000006", "unused_step_00000004"]


@pytest.mark.parametrize("spelling", ["absolute", "link"])
def test_own_checkpoint_is_recognized_by_relative_path_and_link(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    (tmp_path / "link").symlink_to(copy.run)
    path = copy.run if spelling == "absolute" else tmp_path / "link"
    relative = os.path.relpath(copy.run)
    steps = copy.resume(f"run.output_dir={relative}", f"run.resume={path / 'checkpoints' / copy.last.name}")
    assert steps == [1, 2, 3, 4, 5, 6] and list_checkpoints(copy.run)[0].name == "step_00000006"


def test_same_command_resumes_from_own_checkpoints(copy: Copy, tmp_path: Path) -> None:
    other = tmp_path / "other"
    same = [f"run.resume={copy.first}", f"run.output_dir={other}", "run.save_every=1"]
    copy.resume(*same, "optimisation.max_steps=5")
    copy.resume(*same)
    assert [json.loads(x)["step"] for x in (other / "metrics.jsonl").read_text().splitlines()] == [3, 4, 5, 6]
    assert not Path(f"{other}.1").exists()


@pytest.mark.parametrize(("stage", "scale"), [(2, {}), (3, {}), (2, {"loss_scale": 128})])
def test_resuming_in_another_precision_keeps_the_configured_loss_scale(
    copy: Copy, tmp_path: Path, stage: int, scale: dict[str, int]
) -> None:
    ds_config = tmp_path / "zero.json"
    ds_config.write_text(
        json.dumps({"zero_optimization": {"stage": stage}, "fp16": {"initial_scale_power": 8} | scale})
    )
    overrides = [f"parallelism.deepspeed={ds_config}", "parallelism.precision=fp16", "run.save_every=1"]
    copy.resume(*overrides)
    scaler = read_manifest(list_checkpoints(copy.run)[0]).training["loss_scaler"]
    assert scaler["cur_scale"] == (128 if scale else 2**8) and scaler["dynamic"] is (not scale)


@pytest.mark.full
def test_resume_path_must_be_a_checkpoint_or_a_run(copy: Copy, tmp_path: Path) -> None:
    assert "is neither a checkpoint" in copy.resume_error(f"run.resume={tmp_path}")
    # The path of a run selects its latest checkpoint.
    other = tmp_path / "other"
    steps_of_first_run = copy.resume(f"run.resume={copy.run}", f"run.output_dir={other}")
    assert steps_of_first_run == [1, 2, 3, 4]
    assert [json.loads(x)["step"] for x in (other / "metrics.jsonl").read_text().splitlines()] == [5, 6]


@pytest.mark.full
def test_different_adapter_backbone_or_data_is_rejected(copy: Copy, trained: Path, tmp_path: Path) -> None:
    assert "adapter.num_experts=4, but this run has 8" in copy.resume_error("adapter.num_experts=8")
    assert "adapter.r=2, but this run has 4" in copy.resume_error("adapter.r=4")
    assert "global_batch_size=8, but this run has 16" in copy.resume_error("optimisation.global_batch_size=16")
    assert "batch size to 8 or 12" in copy.resume_error(
        "optimisation.micro_batch_size=2", "optimisation.global_batch_size=10"
    )
    assert "examples=30, but this run has 12" in copy.resume_error(f"data.train={trained / 'eval.jsonl'}")
    with changed_manifest(copy.last) as manifest:
        manifest["data"]["mixture"] = "[1.0] of [30]"
    assert "on data with mixture=[1.0] of [30], but this run has None" in copy.resume_error()
    with changed_manifest(copy.last) as manifest:
        del manifest["data"]["mixture"]

    another = tmp_path / "another"
    shutil.copytree(trained / "backbone", another)
    weights = load_file(another / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, another / "model.safetensors", metadata={"format": "pt"})
    message = copy.resume_error(f"backbone.path={another}")
    assert "was trained on another backbone" in message and f"the weights in {another} differ" in message
    same = tmp_path / "same"
    shutil.copytree(trained / "backbone", same)
    assert copy.resume(f"backbone.path={same}") == [1, 2, 3, 4, 5, 6]


def train_with_file_size_limit(size: int, config: str, *overrides: str) -> str:
    """Train with files limited to `size` bytes, like on a full disk, and return the error; runs on a rank."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        run_training(config, *overrides)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    return "no error was raised"


@pytest.mark.parametrize("background", [True, False])
def test_full_disk_stops_all_ranks_and_keeps_earlier_checkpoints(copy: Copy, background: bool) -> None:
    overrides = [f"run.output_dir={copy.run}", "optimisation.max_steps=8", f"run.save_async={str(background).lower()}"]
    errors = copy.ranks.run(train_with_file_size_limit, 40_000, str(copy.config), *overrides)
    assert (
        errors[0].startswith("UserError: cannot write the checkpoint ")
        and "File too large. Existing content is" in errors[0]
    )
    assert errors[1].startswith("PeerError: rank 0 failed while writing the checkpoint")
    assert [path.name for path in list_checkpoints(copy.run)] == ["step_00000004", "step_00000002"]
    assert all(verify(checkpoint) == [] for checkpoint in list_checkpoints(copy.run))
    copy.resume()


@pytest.mark.full
def test_unwritable_folder_is_named(copy: Copy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "run.output_dir=" in copy.resume_error(f"run.output_dir={tmp_path}/file/run")
    with pytest.raises(RankFailed, match="cannot write the checkpoint .*fix the permissions"):
        copy.resume(
            "run.save_every=1", "run.resume=never", f"run.output_dir={_block_checkpoints(tmp_path / 'blocked')}"
        )


def _block_checkpoints(run: Path) -> Path:
    """Create a run's folder in which no checkpoint can be written and return it."""
    run.mkdir()
    (run / "checkpoints").write_text("")
    return run


def test_inspect_and_export(copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(copy.last)]) == 0
    printed = capsys.readouterr().out
    assert "after 4 optimizer steps" in printed and "2 rank(s), ZeRO 2, ep_size 2" in printed
    assert all(kind in printed for kind in ("experts", "routers", "lambda-MLPs", "rank_00001.safetensors"))
    assert main(["checkpoint", "export", str(copy.last), str(tmp_path / "adapter")]) == 0
    exported, trained = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", copy.run / "adapter")
    )
    assert exported.keys() == trained.keys() and all(exported[name].equal(value) for name, value in trained.items())
    configs = [
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "adapter", copy.run / "adapter")
    ]
    assert configs[0] == configs[1]
    assert main(["checkpoint", "export", str(copy.last), str(tmp_path / "adapter")]) == 2
    assert "already exists" in capsys.readouterr().err


def test_folder_without_manifest_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        verify(tmp_path)


def test_missing_elements_are_found(copy: Copy) -> None:
    with changed_manifest(copy.last) as manifest:
        name = next(name for name in manifest["shapes"] if "lora_A" in name)
        manifest["shapes"][name][0] += 1
    (problem, *_) = verify(copy.last)
    assert f"master/{name}" in problem and "elements instead of" in problem
