"""Run PEFT's own tests on LD-MoLE.

The tests are those of the installed version of PEFT. They are taken from its source distribution, which pip downloads to a
temporary folder. `LdMoleConfig` becomes the only method in their parametrizations, and tiny random models take the place of
the models of the Hub, so that the tests run offline.

Usage: python tests/peft_suite.py [--peft FOLDER] [PYTEST-ARGUMENT ...]
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

PACKAGE = "peft_tests"  # not "tests": that is the package of our own tests
METHOD = {"r": 2, "num_experts": 3, "lambda_hidden": 8}

# Functions that replace those of PEFT's tests, by the name of the file.
OVERRIDES = {
    # Called before the part of a test that merges an adapter. PEFT's has a case for each method that cannot be merged.
    "testing_common": """

def _skip_if_merging_not_supported(model_id, config_cls, config_kwargs):
    pytest.skip("LD-MoLE cannot be merged into the base weights")
""",
    # PEFT's asks the Hub for a model the first time.
    "testing_utils": """

@contextmanager
def hub_online_once(model_id):
    yield
""",
}

# Kinds of tests that are left out, by how their names start, each with the reason why it would fail.
ONE_ACTIVE = "LD-MoLE refuses two active adapters: routing over the experts of both is not defined"
NO_MERGE = "LD-MoLE cannot be merged into the base weights, so no merged adapter can be deleted"
REENTRANT = "LD-MoLE refuses use_reentrant=True, which drops the gradient of the auxiliary losses"
HUB = "it loads the config of an adapter on the Hub"
LEFT_OUT = {
    "test_active_adapter[": ONE_ACTIVE,
    "test_multiple_active_adapters_with_different_modules_to_save_works[": ONE_ACTIVE,
    "test_delete_merged_adapter_only_rejects_the_merged_one[": NO_MERGE,
    "test_delete_merged_adapter_raises_without_mutation[": NO_MERGE,
    "test_training_decoders_gradient_checkpointing[True-": REENTRANT,
    "test_training_encoder_decoders_gradient_checkpointing[True-": REENTRANT,
    "test_training_gradient_checkpointing[True-": REENTRANT,
    "test_from_pretrained[": HUB,
    "test_from_pretrained_cache_dir[": HUB,
    "test_save_pretrained_with_runtime_config[": HUB,
}


def rows() -> dict[str, dict[str, Any]]:
    """Return the values of the parametrizations: name of a test file -> name of a list in it -> its rows."""
    from ldmole_dist import LdMoleConfig

    mlp = {
        "one linear, as a regular expression": {"target_modules": "lin0"},
        "one linear": {"target_modules": ["lin0"]},
        "the last linear": {"target_modules": ["lin1"]},
        "two linears": {"target_modules": ["lin0", "lin1"]},
        "a saved module": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        "dropout": {"target_modules": ["lin0"], "lora_dropout": 0.1},
        "topk": {"target_modules": ["lin0"], "router": "topk"},
        "relu": {"target_modules": ["lin0"], "router": "relu"},
        "lora": {"target_modules": ["lin0"], "router": "lora"},
    }
    conv1d = {"target_modules": ["conv1d"]}
    custom = [
        (f"MLP {name}", "MLP", LdMoleConfig, METHOD | {"lora_dropout": 0.0} | kwargs) for name, kwargs in mlp.items()
    ]
    custom.append(("transformers' Conv1D", "EmbConv1D", LdMoleConfig, METHOD | {"lora_dropout": 0.0} | conv1d))

    def models(task_type: str | None) -> list[tuple[Any, dict[str, Any]]]:
        task = {} if task_type is None else {"task_type": task_type}
        return [(LdMoleConfig, METHOD | task | {"target_modules": None})]

    return {
        "test_custom_models": {"TEST_CASES": custom, "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": []},
        "test_decoder_models": {"ALL_CONFIGS": models("CAUSAL_LM")},
        "test_encoder_decoder_models": {"ALL_CONFIGS": models("SEQ_2_SEQ_LM")},
        "test_feature_extraction_models": {"ALL_CONFIGS": models("FEATURE_EXTRACTION")},
        "test_seq_classifier": {"ALL_CONFIGS": models("SEQ_CLS")},
        "test_token_classification_qa": {
            "TOKEN_CLS_CONFIGS": models("TOKEN_CLS"),
            "QA_CONFIGS": models("QUESTION_ANS"),
        },
        "test_config": {"ALL_CONFIG_CLASSES": [(LdMoleConfig, {})]},
    }


def download(folder: Path) -> Path:
    """Download the source distribution of the installed version of PEFT and return the folder of its tests."""
    import peft

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
    subprocess.run([*command, "--no-build-isolation", f"peft=={peft.__version__}", "-d", str(folder)], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.glob("peft-*/tests") if path.is_dir())


def prepare(tests: Path, folder: Path) -> Path:
    """Copy PEFT's tests to a package, with the lists of methods replaced by `rows`, and return its folder."""
    package = folder / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    for source in [*tests.glob("testing_*.py"), *(tests / f"{name}.py" for name in rows())]:
        text = _with_rows(source.read_text(), source.stem) + OVERRIDES.get(source.stem, "")
        (package / source.name).write_text(text)
    return package


def _with_rows(text: str, module: str) -> str:
    """Replace the value of each list that `rows` names, in the source code of a module."""
    lines, expected = text.splitlines(), set(rows().get(module, {}))
    assignments = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    for node in reversed(assignments):
        name = node.targets[0].id if isinstance(node.targets[0], ast.Name) else ""
        if name in expected:
            expected.remove(name)
            lines[node.lineno - 1 : node.end_lineno] = [
                f"{name} = __import__('peft_suite').rows()['{module}']['{name}']"
            ]
    assert not expected, f"{module}.py of this version of PEFT does not assign {sorted(expected)}"
    return "\n".join(lines) + "\n"


class Selection:
    """Pytest plugin that keeps the tests that are parametrized with LD-MoLE and are not left out."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        from ldmole_dist import LdMoleConfig

        kept, dropped = [], []
        for item in items:
            values = item.callspec.params.values() if hasattr(item, "callspec") else ()
            if LdMoleConfig not in values:
                dropped.append(item)
            elif kind := next((start for start in LEFT_OUT if item.name.startswith(start)), None):
                self.left_out[kind] += 1
                dropped.append(item)
            else:
                kept.append(item)
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def fill_hub_cache(folder: Path) -> None:
    """Write tiny random models to a cache of the Hub, under the names by which PEFT's tests load them."""
    import torch
    import transformers as hf

    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=64)
    gpt = dict(n_embd=16, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2)
    positions = dict(max_position_embeddings=64)
    bert = size | positions
    llama = size | positions | dict(num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    deberta = bert | dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False)
    opt = dict(
        hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24, vocab_size=64
    )
    bart = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    bart |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=64, max_position_embeddings=64)
    t5 = dict(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    gemma = llama | dict(head_dim=4, sliding_window=8)
    peft, trl, internal = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"
    models: dict[str, Any] = {
        f"{peft}/tiny-random-OPTForCausalLM": hf.OPTForCausalLM(hf.OPTConfig(**opt, **positions)),
        f"{peft}/tiny-random-GPT2LMHeadModel": hf.GPT2LMHeadModel(hf.GPT2Config(**gpt)),
        f"{internal}/tiny-random-gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(**gpt)),
        f"{peft}/tiny-random-GPTJForCausalLM": hf.GPTJForCausalLM(hf.GPTJConfig(**gpt, rotary_dim=4)),
        f"{trl}/tiny-random-LlamaForCausalLM": hf.LlamaForCausalLM(hf.LlamaConfig(**llama)),
        f"{peft}/tiny-dummy-qwen2": hf.Qwen2ForCausalLM(hf.Qwen2Config(**llama)),
        f"{internal}/tiny-random-MistralForCausalLM": hf.MistralForCausalLM(hf.MistralConfig(**llama)),
        f"{internal}/tiny-random-Gemma3ForCausalLM": hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**gemma)),
        f"{peft}/tiny-random-T5ForConditionalGeneration-calibrated": hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
        f"{peft}/tiny-random-BartForConditionalGeneration": hf.BartForConditionalGeneration(hf.BartConfig(**bart)),
        f"{peft}/tiny-random-BertModel": hf.BertModel(hf.BertConfig(**bert)),
        f"{peft}/tiny-random-RobertaModel": hf.RobertaModel(hf.RobertaConfig(**bert)),
        f"{peft}/tiny-random-DebertaModel": hf.DebertaModel(hf.DebertaConfig(**deberta)),
        f"{peft}/tiny-random-DebertaV2Model": hf.DebertaV2Model(hf.DebertaV2Config(**deberta)),
        f"{peft}/tiny-random-BertForSequenceClassification": hf.BertForSequenceClassification(hf.BertConfig(**bert)),
        f"{peft}/tiny-random-RobertaForSequenceClassification": hf.RobertaForSequenceClassification(
            hf.RobertaConfig(**bert)
        ),
        f"{trl}/tiny-LlamaForSequenceClassification-3.2": hf.LlamaForSequenceClassification(hf.LlamaConfig(**llama)),
    }
    for name, model in models.items():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)  # large enough for adapters to change the outputs visibly
        repository = folder / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        model.save_pretrained(repository / "snapshots" / ("0" * 40))


def stub_diffusers() -> None:
    """Install an empty `diffusers`: PEFT's tests import it, but the ones that are run do not use it."""
    module: Any = types.ModuleType("diffusers")
    module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    module.__spec__ = types.SimpleNamespace()
    sys.modules.setdefault("diffusers", module)


def main(arguments: list[str]) -> int:
    """Run the tests; return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", type=Path, help="folder of PEFT's tests; default: download them")
    options, pytest_arguments = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["HF_HUB_CACHE"] = str(folder / "hub")
        sys.path[:0] = [str(Path(__file__).parent), str(folder)]
        import pytest

        fill_hub_cache(folder / "hub")
        stub_diffusers()
        package = prepare(options.peft or download(folder), folder)
        selection = Selection()
        chosen = [a for a in pytest_arguments if not a.startswith("-") and a in rows()]
        rest = [a for a in pytest_arguments if a not in chosen]
        files = [str(package / f"{name}.py") for name in chosen or rows()]
        code = pytest.main(
            ["-p", "no:cacheprovider", "-q", "--rootdir", str(folder), "-c", os.devnull, *rest, *files],
            plugins=[selection],
        )
        for kind, count in sorted(selection.left_out.items()):
            print(f"left out: {count} of {kind.rstrip('[-')}: {LEFT_OUT[kind]}")
        return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
