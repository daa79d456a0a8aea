"""The commands of README.md and docs/*.md.

Every ```bash block runs nightly on the backbone of the quickstart, and in the full tier on a tiny backbone unless its commands
have tests of their own. A block that needs a cluster, a download or files of the reader opens with ```bash no-test, after a
comment <!-- no-test: REASON -->. The quick tier checks the arguments of all commands.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ldmole_dist.cli import _parser
from tests.launched import ForkedCommand

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BACKBONE = Path("backbones") / "SmolLM2-135M-Instruct"
FIRST_COMMANDS = ["bash launch/quickstart.sh", "bash launch/test.sh"]  # have tests of their own
STARTS_PROCESSES = ("launch", "doctor")  # these ldmole commands cannot be forked
WITH_OWN_TESTS = ("examples/", " selftest", " bench ")  # tests/integrations, tests/selftest and tests/study


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        page: name of the file.
        line: of the opening fence, from 1.
        info: what follows the three backticks.
        text: between the fences.
        before: the line before the opening fence.
    """

    page: str
    line: int
    info: str
    text: str
    before: str

    @property
    def commands(self) -> list[str]:
        """Commands of a bash block, each on one line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]

    @property
    def has_own_tests(self) -> bool:
        return all(any(text in command for text in WITH_OWN_TESTS) for command in self.commands)


def find_blocks(language: str) -> list[Block]:
    blocks = []
    for page in PAGES:
        text = page.read_text()
        # Fences without a language are matched as well, so that their end is not taken for a start.
        for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            if match[1].split()[:1] == [language]:
                above = text[: match.start()].splitlines()
                blocks.append(
                    Block(str(page.relative_to(ROOT)), len(above) + 1, match[1], match[2], above[-1] if above else "")
                )
    return blocks


BASH = find_blocks("bash")
TESTED = [pytest.param(b, id=f"{b.page}:{b.line}") for b in BASH if b.info == "bash" and b.commands != FIRST_COMMANDS]


def environment_of_reader(folder: Path) -> dict[str, str]:
    # Settings of the tests must not reach what a reader runs.
    ours = ("DS_ACCELERATOR", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return environment | {"PATH": f"{folder}/.venv/bin:{environment['PATH']}"}  # as after activating the environment


def shell(command: str, folder: Path, timeout: int) -> str:
    """Run a command as a reader would, and return its output."""
    environment = environment_of_reader(folder)
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{command}\n{output[-4000:]}"
    return output


def run_block(block: Block, folder: Path, forked: bool) -> None:
    """Run the commands of a block.

    Args:
        block: of a page.
        folder: the repository.
        forked: run `ldmole` commands in forks of a process that has imported the package, which is faster than in a shell.
    """
    for command in block.commands:
        if " checkpoint export " in command:  # refuses to overwrite what an earlier run has exported
            shutil.rmtree(folder / shlex.split(command)[-1], ignore_errors=True)
        arguments = ldmole_arguments(command)
        if forked and arguments and arguments[0] not in STARTS_PROCESSES and "torch.distributed.run" not in command:
            output = folder / "output.txt"
            output.unlink(missing_ok=True)
            code = ForkedCommand(arguments, environment_of_reader(folder), output, folder).wait(600)
            assert code == 0, f"{command}\n{output.read_text()[-4000:]}"
        else:
            shell(command, folder, timeout=1200)


def ldmole_arguments(command: str) -> list[str] | None:
    """Return what a command passes to `ldmole`, None if it runs something else."""
    words = shlex.split(command, comments=True)
    if words and Path(words[0]).name == "ldmole":
        return words[1:]
    return words[words.index("ldmole_dist.cli") + 1 :] if "ldmole_dist.cli" in words else None


def test_readme_starts_with_quickstart_and_tests() -> None:
    assert BASH[0].page == "README.md" and BASH[0].commands == FIRST_COMMANDS


def test_blocks_that_do_not_run_give_a_reason() -> None:
    assert {block.info for block in BASH} <= {"bash", "bash no-test"}
    for block in BASH:
        assert (block.info == "bash no-test") == block.before.startswith("<!-- no-test: "), f"{block.page}:{block.line}"


@pytest.mark.parametrize(
    "arguments", [found for block in BASH for c in block.commands if (found := ldmole_arguments(c))], ids=shlex.join
)
def test_arguments_are_valid(arguments: list[str]) -> None:
    # As in `main`: argparse does not continue a list of positional arguments after an option.
    _, rest = _parser().parse_known_args(arguments)
    assert not [argument for argument in rest if argument.startswith("-")]


def test_scripts_exist() -> None:
    scripts = {
        word for b in BASH for c in b.commands for word in c.split() if re.fullmatch(r"(launch|examples)/\S+", word)
    }
    assert scripts and not [script for script in sorted(scripts) if not (ROOT / script).exists()]


@pytest.fixture(scope="module")
def quickstart() -> str:
    """Output of the quickstart, run in this repository."""
    return shell("bash launch/quickstart.sh", ROOT, timeout=1800)


def linked_repository(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """Fill a folder with links to the contents of this repository, so that new files do not end up in it."""
    for path in ROOT.iterdir():
        if path.name not in (".git", *without):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def real(quickstart: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository after the quickstart."""
    return linked_repository(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def tiny(quickstart: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository after a quickstart on a tiny backbone with the tokenizer of the real one."""
    folder = linked_repository(tmp_path_factory.mktemp("tiny"), without=("backbones", "runs"))
    shutil.copytree(ROOT / BACKBONE, folder / BACKBONE, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = AutoConfig.from_pretrained(ROOT / BACKBONE)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    config.update(sizes | {"head_dim": 16})
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / BACKBONE)
    train = ".venv/bin/python -m ldmole_dist.cli launch launch/configs/quickstart.yaml --ranks 2"
    shell(f"{train} data.eval_limit=8 parallelism.precision=fp32", folder, timeout=600)
    return folder


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_quickstart_lifts_accuracy_to_85_percent(quickstart: str) -> None:
    run = ROOT / "runs" / "quickstart"
    before, *_, after = [json.loads(line)["accuracy"] for line in (run / "evaluations.jsonl").open()]
    assert 0.5 < before < 0.65 and after >= 0.85
    assert "TensorBoard" in quickstart and "generate" in quickstart
    assert (run / "adapter" / "adapter_model.safetensors").exists() and list((run / "tensorboard").iterdir())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    promised = "step loss loss_task loss_balance loss_sparsity grad_norm lr tokens_per_second experts_per_token"
    assert set(promised.split()) | {"lambda_mean", "wire_elements"} <= metrics[0].keys()
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1)) and metrics[0]["wire_elements"] > 0


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_adapter_of_the_quickstart_names_the_category(quickstart: str) -> None:
    prompt = r"Definition: a large cat with a striped coat\nCategory:"
    command = f".venv/bin/python -m ldmole_dist.cli generate runs/quickstart/adapter '{prompt}' --max-new-tokens 1"
    assert "Category: animal" in shell(command, ROOT, timeout=300)


@pytest.mark.full
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("block", [case for case in TESTED if not case.values[0].has_own_tests])
def test_commands_run_on_a_tiny_backbone(tiny: Path, block: Block) -> None:
    run_block(block, tiny, forked=True)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("block", TESTED)
def test_commands_run(real: Path, block: Block) -> None:
    run_block(block, real, forked=False)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", find_blocks("python"), ids=lambda b: f"{b.page}:{b.line}")
def test_python_runs(tiny: Path, block: Block, tmp_path: Path) -> None:
    if block.info != "python":
        pytest.skip("marked no-test")
    script = tmp_path / "block.py"
    script.write_text(block.text)
    shell(f".venv/bin/python '{script}'", tiny, timeout=300)
