"""Find a saved run or adapter in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig

from ldmole_dist.config import Config, load_config
from ldmole_dist.errors import UserError
from ldmole_dist.model.backbone import backbone_of


@dataclass(frozen=True)
class SavedModel:
    """A saved adapter and its backbone; also the run that trained the adapter, if the folder of the run was given.

    Attributes:
        adapter: folder of the adapter.
        backbone: path of the backbone.
        run: folder of the run; None for an adapter alone.
        config: config of the run; None for an adapter alone.
    """

    adapter: Path
    backbone: str
    run: Path | None = None
    config: Config | None = None

    @property
    def name(self) -> str:
        """Name of the folder of the run or adapter, for titles and output paths."""
        return (self.run or self.adapter).resolve().name

    @property
    def task(self) -> str:
        """Task, "causal_lm" or "sequence_classification", as in `backbone.task`."""
        if self.config is not None:
            return self.config.backbone.task
        task_type = PeftConfig.from_pretrained(str(self.adapter)).task_type
        return "sequence_classification" if task_type == "SEQ_CLS" else "causal_lm"

    @property
    def quantization(self) -> str | None:
        """Quantization of the run's backbone, as in `backbone.quantization`; None if unquantized, and for an adapter alone."""
        return None if self.config is None else self.config.backbone.quantization


def find_saved_model(path: str, backbone: str | None) -> SavedModel:
    """Find the adapter in the folder of a run or of an adapter.

    Args:
        path: folder of a run or of an adapter.
        backbone: path of the backbone; None uses the path in the config of the run or of the adapter.

    Returns:
        The adapter and its backbone, and for the folder of a run also the run.

    Raises:
        UserError: if the folder is neither a run nor an adapter, its config is invalid or names no backbone, or the run has no
            adapter yet.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return SavedModel(folder, backbone or backbone_of(str(folder)))
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{path} is neither a run (it has no config.yaml) nor an adapter (it has no adapter_config.json); pass the "
            "folder of a run or of an adapter"
        )
    config = load_config(str(folder / "config.yaml"), [])
    if not (folder / "adapter" / "adapter_config.json").is_file():
        raise UserError(
            f"the run in {path} has no adapter yet; wait until it has finished, or export one of its checkpoints with "
            "`ldmole checkpoint export CHECKPOINT ADAPTER` and pass the exported folder"
        )
    return SavedModel(folder / "adapter", backbone or config.backbone.path, folder, config)
