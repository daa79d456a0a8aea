"""Which backbone is taken, and what is said of those that cannot be planned for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldmole_dist.cli import main
from ldmole_dist.errors import EXIT_EXPLAINED, UserError
from ldmole_dist.planner.presets import is_preset, load_backbone_config
from ldmole_dist.selftest.tiny import SIZES

LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES}


def refused(backbone: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", "--backbone", str(backbone), "--gpus", "1", "--gpu-memory", "80GB"]) == EXIT_EXPLAINED
    out, error = capsys.readouterr()
    last = error.splitlines()[-1]  # transformers may have warned before
    assert last.startswith("error: --backbone") and "Traceback" not in error and not out
    return last


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LLAMA | dict(hidden_size="64"), "Field 'hidden_size' expected int, got str"),
        (
            LLAMA | dict(num_attention_heads=5, num_key_value_heads=5),
            "not a multiple of the number of attention heads (5)",
        ),
        (LLAMA | dict(num_attention_heads=0), "has num_attention_heads=0, which must be at least 1"),
        (LLAMA | dict(num_hidden_layers=0), "has num_hidden_layers=0, which must be at least 1"),
        (LLAMA | dict(num_key_value_heads=3), "num_key_value_heads=3, which must divide num_attention_heads=4"),
        (LLAMA | dict(hidden_act="wavy"), "has hidden_act='wavy', which is not one of gelu"),
        (LLAMA | dict(rope_scaling=dict(type="odd", factor=2.0)), "cannot be built by transformers (KeyError: 'odd')"),
        (LLAMA | dict(quantization_config=dict(quant_method="gptq", bits=4)), "of a quantised model"),
        (dict(model_type="llama", hidden_size=64), "does not say vocab_size, intermediate_size, num_hidden_layers"),
        (dict(model_type="gemma3", text_config=LLAMA | dict(model_type="gemma3_text")), "write its text_config into"),
        (dict(model_type="t5"), "is of 't5', with an encoder"),
        (dict(model_type="vit"), "is of 'vit', which is no causal language model"),
        (dict(model_type="mamba"), "is of 'mamba', which has no attention heads"),
        (LLAMA | dict(model_type="mixtral", num_local_experts=4), "mlp.experts.gate_up_proj has three dimensions"),
        (dict(model_type="unheard-of"), "unheard-of"),
        ({}, "has no model_type"),
        ([LLAMA], "has no model_type"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_config_that_cannot_be_planned(
    config: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert says in refused(tmp_path, capsys)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00"])
def test_a_file_that_is_no_json(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert f"{tmp_path / 'config.json'} is no JSON: " in refused(tmp_path, capsys)


def test_a_file_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # the superuser may read everything
    assert refused(tmp_path, capsys).endswith("cannot be read: Permission denied")


def test_gguf_is_to_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.Q4_0.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    for given in (file, tmp_path):
        assert f"make a model folder of it with `ldmole convert {file} FOLDER`" in refused(given, capsys)


def test_a_folder_that_is_called_like_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("SmolLM2-135M")
    folder.mkdir()
    assert is_preset("SmolLM2-135M") and not is_preset("./SmolLM2-135M")  # without a config.json it is not meant
    assert load_backbone_config("SmolLM2-135M").hidden_size == 576
    with pytest.raises(UserError, match="nor a folder with one"):
        load_backbone_config("./SmolLM2-135M")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert not is_preset("SmolLM2-135M")
    assert (
        load_backbone_config("SmolLM2-135M").hidden_size
        == load_backbone_config("./SmolLM2-135M").hidden_size
        == SIZES["hidden_size"]
    )
