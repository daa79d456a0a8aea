"""Checkpoints that are damaged, do not fit or cannot be written: one clear error, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ldmole_dist.checkpoint.load import newest
from ldmole_dist.checkpoint.manifest import _own_hash, read_manifest, verify
from ldmole_dist.cli import main
from ldmole_dist.errors import UserError
from ldmole_dist.selftest.local_ranks import LocalRanks, RankFailed
from tests.small_run import make_config, make_folder, run_training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ranks2: LocalRanks) -> Path:
    """A folder with a run of 4 steps and checkpoints after 2 and 4."""
    folder = make_folder(tmp_path_factory.mktemp("damaged"))
    make_config(folder, data={"eval": None}, optimisation={"max_steps": 4}, run={"save_every": 2})
    ranks2.run(run_training, str(folder / "config.yaml"))
    return folder


class Copy:
    """A copy of the run, to be damaged and gone on with."""

    def __init__(self, trained: Path, tmp_path: Path, ranks: LocalRanks) -> None:
        self.config, self.ranks, self.run = trained / "config.yaml", ranks, tmp_path / "run"
        shutil.copytree(trained / "run", self.run)
        self.last, self.first = newest(self.run)

    def go_on(self, *overrides: str) -> list[int]:
        """Train to step 6; the steps that were reported afterwards."""
        fixed = [f"run.output_dir={self.run}", "optimisation.max_steps=6", "run.detail_every=1000"]
        self.ranks.run(run_training, str(self.config), *fixed, *overrides)
        return [json.loads(line)["step"] for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def refused(self, *overrides: str) -> str:
        """What the ranks say; nothing in the run's folder may have changed."""
        before = self._contents()
        with pytest.raises(RankFailed) as raised:
            self.go_on(*overrides)
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


def newer(checkpoint: Path) -> str:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 99'))
    return "is of format 99, this software reads 2: upgrade"


def garble(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_text('{"format_version": 2, "step"')
    return "manifest.json cannot be read"


def count_differently(checkpoint: Path) -> str:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"adam_step": 4', '"adam_step": 5'))
    return "manifest.json was changed after it was written"


DAMAGES = [truncate, flip, remove, newer, garble, count_differently]


@pytest.mark.parametrize(
    "damage",
    [pytest.param(damage, marks=[] if number == 0 else pytest.mark.full) for number, damage in enumerate(DAMAGES)],
)
def test_a_damaged_checkpoint_is_refused_and_auto_takes_an_older_one(
    copy: Copy, damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = damage(copy.last)
    assert said in copy.refused(f"run.resume={copy.last}")
    assert main(["checkpoint", "verify", str(copy.last)]) == 2
    assert said in "".join(capsys.readouterr())
    assert main(["checkpoint", "verify", str(copy.first)]) == 0
    assert main(["checkpoint", "export", str(copy.last), str(copy.run / "exported")]) == 2
    assert said in capsys.readouterr().err and not (copy.run / "exported").exists()

    assert copy.go_on("run.save_every=2") == [1, 2, 3, 4, 5, 6]  # 3 and 4 again
    names = sorted(path.name for path in (copy.run / "checkpoints").iterdir())
    # The damaged one is put aside for whoever wants to look at it.
    assert names == ["latest", "step_00000004", "step_00000006", "unused_step_00000004"]
    assert all(verify(checkpoint) == [] for checkpoint in newest(copy.run))


def test_where_none_is_whole_nothing_starts_anew_by_itself(copy: Copy) -> None:
    flip(copy.last)
    remove(copy.first)
    assert "no checkpoint to go on from is whole" in copy.refused()


@pytest.mark.full
def test_going_on_from_an_older_one_puts_later_ones_aside(copy: Copy) -> None:
    assert copy.go_on(f"run.resume={copy.first}", "run.save_every=3") == [1, 2, 3, 4, 5, 6]
    names = sorted(path.name for path in (copy.run / "checkpoints").iterdir())
    assert names == ["latest", "step_00000003", "step_00000006", "unused_step_00000004"]


@pytest.mark.parametrize("spelling", ["absolute", "link"])
def test_a_checkpoint_of_this_run_is_known_however_it_is_spelled(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    (tmp_path / "link").symlink_to(copy.run)
    path = copy.run if spelling == "absolute" else tmp_path / "link"
    relative = os.path.relpath(copy.run)
    steps = copy.go_on(f"run.output_dir={relative}", f"run.resume={path / 'checkpoints' / copy.last.name}")
    assert steps == [1, 2, 3, 4, 5, 6] and newest(copy.run)[0].name == "step_00000006"


def test_a_run_that_was_sent_elsewhere_goes_on_with_its_own_when_started_again(copy: Copy, tmp_path: Path) -> None:
    other = tmp_path / "other"
    same = [f"run.resume={copy.first}", f"run.output_dir={other}", "run.save_every=1"]
    copy.go_on(*same, "optimisation.max_steps=5")
    copy.go_on(*same)
    assert [json.loads(x)["step"] for x in (other / "metrics.jsonl").read_text().splitlines()] == [3, 4, 5, 6]
    assert not Path(f"{other}.1").exists()


@pytest.mark.parametrize(("stage", "scale"), [(2, {}), (3, {}), (2, {"loss_scale": 128})])
def test_another_precision_keeps_its_own_loss_scale(
    copy: Copy, tmp_path: Path, stage: int, scale: dict[str, int]
) -> None:
    ds_config = tmp_path / "zero.json"
    ds_config.write_text(
        json.dumps({"zero_optimization": {"stage": stage}, "fp16": {"initial_scale_power": 8} | scale})
    )
    overrides = [f"parallelism.deepspeed={ds_config}", "parallelism.precision=fp16", "run.save_every=1"]
    copy.go_on(*overrides)
    scaler = read_manifest(newest(copy.run)[0]).training["loss_scaler"]
    assert scaler["cur_scale"] == (128 if scale else 2**8) and scaler["dynamic"] is (not scale)


@pytest.mark.full
def test_resume_names_what_is_no_checkpoint(copy: Copy, tmp_path: Path) -> None:
    assert "is neither a checkpoint" in copy.refused(f"run.resume={tmp_path}")
    # A run's folder stands for its newest checkpoint.
    other = tmp_path / "other"
    assert copy.go_on(f"run.resume={copy.run}", f"run.output_dir={other}") == [1, 2, 3, 4]  # of the first run
    assert [json.loads(x)["step"] for x in (other / "metrics.jsonl").read_text().splitlines()] == [5, 6]


@pytest.mark.full
def test_another_adapter_backbone_or_data_is_refused(copy: Copy, trained: Path, tmp_path: Path) -> None:
    assert "adapter.num_experts=4, this run has 8" in copy.refused("adapter.num_experts=8")
    assert "adapter.r=2, this run has 4" in copy.refused("adapter.r=4")
    assert "global_batch_size=16, this run has 8" in copy.refused("optimisation.global_batch_size=8")
    assert "use 8 or 12" in copy.refused("optimisation.micro_batch_size=2", "optimisation.global_batch_size=10")
    assert "examples=60, this run has 12" in copy.refused(f"data.train={trained / 'eval.jsonl'}")

    another = tmp_path / "another"
    shutil.copytree(trained / "backbone", another)
    weights = load_file(another / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, another / "model.safetensors", metadata={"format": "pt"})
    said = copy.refused(f"backbone.path={another}")
    assert "is of another backbone" in said and f"the weights of {another} differ" in said
    same = tmp_path / "same"
    shutil.copytree(trained / "backbone", same)
    assert copy.go_on(f"backbone.path={same}") == [1, 2, 3, 4, 5, 6]


def write_no_more_than(size: int, config: str, *overrides: str) -> str:
    """On a rank: train where no file may grow beyond `size` bytes, as on a full disk. What it said."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        run_training(config, *overrides)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    return "it was written"


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_stops_all_ranks_and_leaves_the_former_checkpoint(copy: Copy, background: bool) -> None:
    overrides = [f"run.output_dir={copy.run}", "optimisation.max_steps=8", f"run.save_async={str(background).lower()}"]
    said = copy.ranks.run(write_no_more_than, 40_000, str(copy.config), *overrides)
    assert said[0].startswith("UserError: cannot write the checkpoint ") and "File too large. Existing content is" in said[0]
    assert said[1].startswith("PeerError: rank 0 failed while writing the checkpoint")
    assert [path.name for path in newest(copy.run)] == ["step_00000004", "step_00000002"]
    assert all(verify(checkpoint) == [] for checkpoint in newest(copy.run))
    copy.go_on()


@pytest.mark.full
def test_a_folder_that_cannot_be_written_is_named(copy: Copy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "run.output_dir=" in copy.refused(f"run.output_dir={tmp_path}/file/run")
    with pytest.raises(RankFailed, match="cannot write the checkpoint .*fix the permissions"):
        copy.go_on("run.save_every=1", "run.resume=never", f"run.output_dir={_with_a_file(tmp_path / 'blocked')}")


def _with_a_file(run: Path) -> Path:
    """A run's folder in which no checkpoint can be written."""
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
    assert "exists already" in capsys.readouterr().err


def test_no_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no whole checkpoint"):
        verify(tmp_path)


def test_everything_is_there_once(copy: Copy) -> None:
    path = copy.last / "manifest.json"
    manifest = json.loads(path.read_text())
    name = next(name for name in manifest["shapes"] if "lora_A" in name)
    manifest["shapes"][name][0] += 1
    del manifest["sha256"]
    manifest["sha256"] = _own_hash(manifest)
    path.write_text(json.dumps(manifest))
    (problem, *_) = verify(copy.last)
    assert f"master/{name}" in problem and "elements are there" in problem
