"""Generation: alone and in batches, with sampling, from resumed files, and in a typed conversation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ldmole_dist.cli import _parser
from ldmole_dist.errors import UserError
from ldmole_dist.generation.generate import Sampling, generate_batch, load_generator
from ldmole_dist.model.backbone import load_backbone, new_adapter
from ldmole_dist.model.saved import find_saved_model
from ldmole_dist.tuner.config import LdMoleConfig
from tests.small_run import make_backbone

PROMPTS = ["The colour of rose is", "grass", "The colour of sky and sea and jay and ash is", "a leaf is a leaf"]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an adapter with weights so large that the backbone alone generates something else."""
    folder = tmp_path_factory.mktemp("generate")
    make_backbone(folder / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(folder / "backbone")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "backbone")
    model = new_adapter(load_backbone(str(folder / "backbone"), "causal_lm", "fp32"), LdMoleConfig(num_experts=4, r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


@pytest.fixture(scope="module")
def generator(adapter: Path) -> tuple[Any, Any]:
    return load_generator(find_saved_model(str(adapter), None), "fp32")


def generate(adapter: Path, *arguments: str) -> None:
    args = _parser().parse_args(["generate", str(adapter), *arguments, "--precision", "fp32", "--max-new-tokens", "6"])
    assert args.call(args) == 0


def test_batch_equals_single_prompts(generator: tuple[Any, Any]) -> None:
    together = generate_batch(*generator, PROMPTS, Sampling(12))
    alone = [generate_batch(*generator, [prompt], Sampling(12))[0] for prompt in PROMPTS]
    assert together == alone and len(set(together)) > 1
    assert generator[1].padding_side == "right"  # restored


def test_adapter_changes_the_output(adapter: Path, generator: tuple[Any, Any]) -> None:
    backbone = load_generator(find_saved_model(str(adapter), None), "fp32", with_adapter=False)
    assert generate_batch(*backbone, PROMPTS, Sampling(12)) != generate_batch(*generator, PROMPTS, Sampling(12))


def test_sampling_depends_on_the_seed(generator: tuple[Any, Any]) -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(generate_batch(*generator, PROMPTS, Sampling(12, temperature=1.5, top_p=0.9, top_k=50)))
    assert drawn[0] == drawn[1] != drawn[2]


def test_stop_text_ends_the_output(generator: tuple[Any, Any]) -> None:
    (text,) = generate_batch(*generator, PROMPTS[:1], Sampling(12))
    letters = re.search("[a-z]{2}", text)
    assert letters is not None  # most tokens of the untrained model are bytes, not text
    stop = letters.group()
    (ended,) = generate_batch(*generator, PROMPTS[:1], Sampling(12), stop=[stop])
    assert text.startswith(ended) and stop in ended and len(ended) < len(text)


def test_empty_prompt_is_rejected(generator: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match="the prompt '' has no tokens"):
        generate_batch(*generator, ["", "grass"], Sampling(1))


def make_prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    records: list[dict[str, Any]] = [{"prompt": prompt, "id": n} for n, prompt in enumerate(PROMPTS)]
    records.append({"messages": [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_resumed_output_equals_uninterrupted_output(
    adapter: Path, generator: Any, tmp_path: Path, temperature: str
) -> None:
    prompts, complete, cut = make_prompts(tmp_path), tmp_path / "complete.jsonl", tmp_path / "cut.jsonl"
    arguments = ["--file", str(prompts), "--batch-size", "2", "--temperature", temperature]
    generate(adapter, *arguments, "--output", str(complete))
    records = [json.loads(line) for line in complete.read_text().splitlines()]
    assert [record.get("id") for record in records] == [0, 1, 2, 3, None]
    if temperature == "0":
        alone = [generate_batch(*generator, [prompt], Sampling(6))[0] for prompt in PROMPTS]
        assert [record["generated"] for record in records[:4]] == alone
        turn = generate_batch(*generator, ["[user] sky?\n[assistant]"], Sampling(6), templated=True)
        assert records[4]["generated"] == turn[0]
    lines = complete.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:2]) + lines[2][:7])
    generate(adapter, *arguments, "--output", str(cut))
    assert cut.read_bytes() == complete.read_bytes()


def test_output_of_other_prompts_is_not_changed(adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text('{"prompt": "other", "generated": "x"}\n')
    with pytest.raises(UserError, match="line 1 does not match prompt 1"):
        generate(adapter, "--file", str(make_prompts(tmp_path)), "--output", str(output))
    assert output.read_text() == '{"prompt": "other", "generated": "x"}\n'


def test_prompts_on_the_command_line(adapter: Path, generator: Any, capsys: pytest.CaptureFixture[str]) -> None:
    generate(adapter, *PROMPTS[:2])
    output = capsys.readouterr().out
    for prompt in PROMPTS[:2]:
        assert prompt + generate_batch(*generator, [prompt], Sampling(6))[0] in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello", "--output", "x"], "--output requires"),
        (["hello", "--system", "x"], "--system requires"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--file", "nowhere.txt"], "cannot read prompts"),
        (["--file", "bad.jsonl"], "bad.jsonl, line 1: the record has neither a string 'prompt' nor 'messages'"),
        (
            ["--file", "turns.jsonl"],
            "turns.jsonl, line 1: the record has neither a string 'prompt' nor 'messages', a list",
        ),
    ],
)
def test_invalid_arguments_are_rejected(adapter: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "turns.jsonl").write_text('{"prompt": "x", "messages": ["hi"]}\n')
    with pytest.raises(UserError, match=message):
        generate(adapter, *(str(tmp_path / a) if (tmp_path / a).exists() else a for a in arguments))


def test_several_ranks_are_rejected_with_a_remedy(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="different numbers of tokens.*ldmole checkpoint export CHECKPOINT ADAPTER"):
        generate(adapter, "hello")


@pytest.mark.full
def test_typed_prompts_form_a_conversation(adapter: Path, generator: Any) -> None:
    command = [sys.executable, "-m", "ldmole_dist.cli", "generate", str(adapter), "--chat", "--system", "be brief"]
    output = subprocess.run(
        [*command, "--precision", "fp32", "--max-new-tokens", "6"],
        input="sky?\n\ngrass?\n/new\ngrass?\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout

    def answer(conversation: str) -> str:
        return generate_batch(*generator, [conversation], Sampling(6), templated=True)[0]

    start = "[system] be brief\n[user] {}\n[assistant]"
    first = answer(start.format("sky?"))
    second = answer(f"[system] be brief\n[user] sky?\n[assistant] {first}\n[user] grass?\n[assistant]")
    third = answer(start.format("grass?"))
    assert output == f"{first}\n{second}\n{third}\n"
