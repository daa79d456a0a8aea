"""Backbones of `ldmole plan`, and the messages for those that it does not support."""

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


def error_of(backbone: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", "--backbone", str(backbone), "--gpus", "1", "--gpu-memory", "80GB"]) == EXIT_EXPLAINED
    out, error = capsys.readouterr()
    last = error.splitlines()[-1]  # transformers may print warnings first
    assert last.startswith("error: --backbone") and "Traceback" not in error and not out
    return last


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | dict(hidden_size="64"), "Field 'hidden_size' expected int, got str"),
        (
            LLAMA | dict(num_attention_heads=5, num_key_value_heads=5),
            "not a multiple of the number of attention heads (5)",
        ),
        (LLAMA | dict(num_attention_heads=0), "has num_attention_heads=0, which must be at least 1"),
        (LLAMA | dict(num_hidden_layers=0), "has num_hidden_layers=0, which must be at least 1"),
        (LLAMA | dict(num_key_value_heads=3), "num_key_value_heads=3, which must divide num_attention_heads=4"),
        (LLAMA | dict(hidden_act="wavy"), "has hidden_act='wavy'; use one of gelu"),
        (LLAMA | dict(rope_scaling=dict(type="odd", factor=2.0)), "cannot be built by transformers (KeyError: 'odd')"),
        (LLAMA | dict(quantization_config=dict(quant_method="gptq", bits=4)), "is a quantized model"),
        (dict(model_type="llama", hidden_size=64), "does not contain vocab_size, intermediate_size, num_hidden_layers"),
        (dict(model_type="gemma3", text_config=LLAMA | dict(model_type="gemma3_text")), "save its text_config as"),
        (dict(model_type="t5"), "(model_type 't5') is an encoder-decoder model"),
        (dict(model_type="vit"), "(model_type 'vit') is not a causal language model"),
        (dict(model_type="mamba"), "(model_type 'mamba') is a model without attention heads"),
        (
            LLAMA | dict(model_type="mixtral", num_local_experts=4),
            "mlp.experts.gate_up_proj of this mixtral model has more than",
        ),
        (
            dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=64),
            "c_attn of this gpt2 model is a Conv1D; the planner's counts are tested only for",
        ),
        (dict(model_type="unheard-of"), "unheard-of"),
        ({}, "has no model_type"),
        ([LLAMA], "has no model_type"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_unsupported_config_is_explained(
    config: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in error_of(tmp_path, capsys)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00"])
def test_invalid_json_is_explained(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert f"{tmp_path / 'config.json'} is not JSON (" in error_of(tmp_path, capsys)


def test_unreadable_file_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # file modes do not restrict root
    assert error_of(tmp_path, capsys).endswith("cannot be read (Permission denied); give a readable file or a preset.")


def test_gguf_message_names_the_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.Q4_0.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    for given in (file, tmp_path):
        assert f"convert it with `ldmole convert {file} FOLDER`" in error_of(given, capsys)


def test_folder_with_config_takes_precedence_over_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("SmolLM2-135M")
    folder.mkdir()
    assert is_preset("SmolLM2-135M") and not is_preset("./SmolLM2-135M")  # the folder has no config.json yet
    assert load_backbone_config("SmolLM2-135M").hidden_size == 576
    with pytest.raises(UserError, match="a folder with one"):
        load_backbone_config("./SmolLM2-135M")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert not is_preset("SmolLM2-135M")
    for name in ("SmolLM2-135M", "./SmolLM2-135M"):
        assert load_backbone_config(name).hidden_size == SIZES["hidden_size"]
