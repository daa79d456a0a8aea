"""LD-MoLE on tiny random models of many architectures, with PEFT's LoRA as the reference."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.backbones.known import known_failures
from tests.backbones.ld_mole_checks import LdMoleTrial, failures
from tests.backbones.page import PAGE, adapted, row
from tests.backbones.tiny import ARCHITECTURES

QUICK = ["bert-cls", "gpt2", "mamba2", "qwen2_vl", "qwen3_moe", "t5", "vit", "whisper"]
# One of each kind of model; what the nightly tests add differs little from one of these.
FULL = (
    "apertus bamba bart biogpt bitnet bloom codegen cohere2 dbrx deberta_v2-cls deepseek_v3 deepseek_v4 "
    "distilbert-cls electra-cls ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba gemma2 gemma3-mm gemma3-text gemma4-moe "
    "glm4_moe gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granitemoe granitemoehybrid jamba jetmoe kimi_linear lfm2 "
    "llama-cls llama-tied-bias llama4-text llava mamba minimax mixtral modernbert-cls mpt nanochat nemotron olmo2 "
    "olmo_hybrid opt paligemma persimmon phi phi3 phimoe qwen2_moe qwen3 qwen3_5 recurrent_gemma rwkv smollm3 "
    "stablelm wav2vec2-ctc"
)


def check(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's LoRA, about the settings that it adds for some architectures
        found = failures(ARCHITECTURES[name])
    known = known_failures(name)
    unexpected = {check: message for check, message in found.items() if check not in known}
    assert not unexpected, f"{name} fails {unexpected}"
    repaired = sorted(known.keys() - found.keys())
    assert not repaired, f"{name} passes {repaired}; remove them from tests/backbones/known.py"


@pytest.mark.parametrize("name", QUICK)
def test_a_few_architectures(name: str) -> None:
    check(name)


@pytest.mark.full
@pytest.mark.parametrize("name", FULL.split())
def test_kinds_of_architectures(name: str) -> None:
    check(name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {*QUICK, *FULL.split()}))
def test_other_architectures(name: str) -> None:
    check(name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["bert-cls", "gpt2", "qwen2_vl", "qwen3_moe"])
def test_docs_are_up_to_date(name: str) -> None:
    architecture = ARCHITECTURES[name]
    assert row(name, architecture) in (Path(__file__).parents[2] / PAGE).read_text().splitlines()
    assert adapted(architecture.model(), architecture).keys() == LdMoleTrial(architecture).adapted.keys()
