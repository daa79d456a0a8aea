"""What was trained, as a user names it: a run's folder or that of a saved adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig

from ldmole_dist.config import Config, load_config
from ldmole_dist.errors import UserError
from ldmole_dist.model.backbone import backbone_of


@dataclass(frozen=True)
class SavedModel:
    """A run, or an adapter alone.

    Attributes:
        adapter: its folder.
        backbone: path of the backbone.
        run: the run's folder, if it is one.
        config: of that run.
    """

    adapter: Path
    backbone: str
    run: Path | None = None
    config: Config | None = None

    @property
    def name(self) -> str:
        """For titles and folders."""
        return (self.run or self.adapter).resolve().name

    @property
    def task(self) -> str:
        """As `backbone.task` names it."""
        if self.config is not None:
            return self.config.backbone.task
        task_type = PeftConfig.from_pretrained(str(self.adapter)).task_type
        return "sequence_classification" if task_type == "SEQ_CLS" else "causal_lm"


def find_saved_model(path: str, backbone: str | None) -> SavedModel:
    """See what is in a folder.

    Args:
        path: of a run or an adapter.
        backbone: its path, if it is not where the run or the adapter says.

    Raises:
        UserError: where there is neither, or a run without an adapter.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return SavedModel(folder, backbone or backbone_of(str(folder)))
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{path} is neither a run (it has no config.yaml) nor an adapter (it has no adapter_config.json): give the "
            "folder of one of them"
        )
    config = load_config(str(folder / "config.yaml"), [])
    if not (folder / "adapter" / "adapter_config.json").is_file():
        raise UserError(
            f"the run in {path} has no adapter yet: let it end, or export a checkpoint of it "
            "(ldmole checkpoint export CHECKPOINT ADAPTER) and give that"
        )
    return SavedModel(folder / "adapter", backbone or config.backbone.path, folder, config)
