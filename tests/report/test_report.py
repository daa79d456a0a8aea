"""`ldmole report` on a tiny run: counts, routing history, page and error messages."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from ldmole_dist.checkpoint.export import export_checkpoint
from ldmole_dist.checkpoint.load import list_checkpoints
from ldmole_dist.cli import main
from ldmole_dist.data.encode import Encoded
from ldmole_dist.errors import EXIT_EXPLAINED
from ldmole_dist.method.routers import Routing
from ldmole_dist.method.statistics import summarize
from ldmole_dist.model.backbone import load_adapter, load_backbone, load_tokenizer, new_adapter
from ldmole_dist.model.saved import find_saved_model
from ldmole_dist.monitor.linears import Linears
from ldmole_dist.monitor.supports import Supports
from ldmole_dist.report import history
from ldmole_dist.report.collect import collect
from ldmole_dist.report.history import trace_history
from ldmole_dist.report.inputs import read_data
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import tuner_of
from tests.small_run import LABELS, make_backbone, make_config, make_data, make_folder, run_training

EXPERTS = 4
DOMAINS = {
    "long": [Encoded([5, 9, 5, 7, 11, 30, 31, 8], [-100] * 8), Encoded([5, 6, 7], [-100] * 3)],
    "short": [Encoded([12], [-100]), Encoded([5, 12, 40], [-100] * 3)],
}
FIGURES = {"lambda_by_layer", "experts_by_layer", "experts_histogram", "tokens", "load", "coactivation"}
HISTORY_FIGURES = {"movement", "movement_lines"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ranks1: LocalRanks) -> Path:
    """A run with the checkpoints of steps 2, 4 and 6 of 7."""
    folder = make_folder(tmp_path_factory.mktemp("report"))
    config = make_config(
        folder,
        optimisation={"max_steps": 7, "global_batch_size": 4, "learning_rate": 0.03, "schedule": "constant"},
        parallelism={"ep_size": 1},
        run={"save_every": 2, "keep_last": 5},
    )
    ranks1.run(run_training, str(config))
    return folder / "run"


def loaded(run: Path, adapter: Path) -> PeftModel:
    """Load a model in float64, so that a sequence is routed the same alone and in a batch."""
    backbone = load_backbone(str(run.parent / "backbone"), "causal_lm", "fp32")
    return load_adapter(backbone, str(adapter), trainable=False).double().eval()


def active_sets(model: PeftModel, example: Encoded) -> dict[str, list[frozenset[int]]]:
    """Return the active experts of each token of one sequence, by linear."""
    found: dict[str, list[frozenset[int]]] = {}

    def observe(name: str, routing: Routing, mask_T: Tensor | None) -> None:
        found[name] = [frozenset(row.nonzero().flatten().tolist()) for row in routing.p_TE]

    context = tuner_of(model).context
    context.observer = observe
    with torch.no_grad():
        model(input_ids=torch.tensor([example.input_ids]))
    context.observer = None
    return found


def test_counts_equal_a_count_by_hand(run: Path) -> None:
    model = loaded(run, run / "adapter")
    observed = collect(model, DOMAINS, pad_id=1, batch_size=2)
    tokens: Counter[int] = Counter()
    active: Counter[int] = Counter()
    together: dict[str, Counter[tuple[int, int]]] = {}
    numbers: dict[tuple[str, str], list[int]] = {}
    for domain, examples in DOMAINS.items():
        for example in examples:
            tokens.update(example.input_ids)
            for name, sets in active_sets(model, example).items():
                for token, experts in zip(example.input_ids, sets, strict=True):
                    active[token] += len(experts)
                    together.setdefault(name, Counter()).update(itertools.product(experts, repeat=2))
                    numbers.setdefault((domain, name), []).append(len(experts))
    assert observed.tokens_V.sum() == 15 and observed.tokens_V[5] == 4 and len(together) == 14
    assert {t: int(n) for t, n in enumerate(observed.tokens_V) if n} == tokens
    assert {t: int(n) for t, n in enumerate(observed.active_V) if n} == active
    for name, pairs in together.items():
        expected = [[pairs[i, j] for j in range(EXPERTS)] for i in range(EXPERTS)]
        assert observed.together[name].tolist() == expected
    assert any(pairs[0, 1] != pairs[0, 0] for pairs in together.values())
    for (domain, name), counts in numbers.items():
        summary = summarize(observed.by_domain[domain][name])
        assert summary["tokens"] == len(counts) == {"long": 11, "short": 4}[domain]
        assert summary["experts_per_token"] == pytest.approx(sum(counts) / len(counts))
        assert summary["histogram"] == pytest.approx([counts.count(k) / len(counts) for k in range(EXPERTS + 1)])
    total = summarize(observed.by_linear["model.layers.1.mlp.up_proj"])
    pair = [numbers[domain, "model.layers.1.mlp.up_proj"] for domain in DOMAINS]
    assert total["experts_per_token"] == pytest.approx(sum(map(sum, pair)) / 15)


def test_history_equals_a_computation_by_hand(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(history, "PROBE_TOKENS", 12)
    examples = DOMAINS["long"] + DOMAINS["short"]  # 8, 3, 1 and 3 tokens; the last sequence exceeds the 12 probe tokens
    model = loaded(run, run / "adapter")
    found = trace_history(model, find_saved_model(str(run), None), examples, pad_id=1, batch_size=2)
    assert found is not None and found.tokens == 12 and found.skipped == 0
    assert [state.label for state in found.states] == ["0", "2", "4", "6", "final"]

    models = []
    config = LdMoleConfig.from_pretrained(run / "adapter")
    assert isinstance(config, LdMoleConfig)
    fresh = LdMoleConfig(num_experts=EXPERTS, r=2, lambda_hidden=16, task_type="CAUSAL_LM", init_seed=config.init_seed)
    models.append(new_adapter(load_backbone(str(run.parent / "backbone"), "causal_lm", "fp32"), fresh).double().eval())
    for checkpoint in list_checkpoints(run)[::-1]:
        export_checkpoint(checkpoint, tmp_path / checkpoint.name)
        models.append(loaded(run, tmp_path / checkpoint.name))
    models.append(loaded(run, run / "adapter"))
    routed = [[active_sets(m, example) for example in examples[:3]] for m in models]

    def differing(one: int, other: int, name: str) -> float:
        pairs = zip(routed[one], routed[other], strict=True)
        return sum(a != b for x, y in pairs for a, b in zip(x[name], y[name], strict=True)) / 12

    for index, state in enumerate(found.states):
        names = state.to_final
        assert len(names) == 14 and state.to_final == {n: pytest.approx(differing(index, -1, n)) for n in names}
        if index:
            assert state.changed == {n: pytest.approx(differing(index, index - 1, n)) for n in names}
            assert max(state.changed.values()) > 0
        of_first = [len(s) for example in routed[index] for s in example["model.layers.0.self_attn.q_proj"]]
        summary = summarize(state.sums["model.layers.0.self_attn.q_proj"])
        assert summary["tokens"] == 12 and summary["experts_per_token"] == pytest.approx(sum(of_first) / 12)

    assert model.active_adapters == ["default"] and list(model.peft_config) == ["default"]
    after = active_sets(model, examples[0])
    assert after == routed[-1][0]


def test_support_changes_if_any_expert_changes() -> None:
    before = torch.zeros(3, 12)
    before[:, 0] = 1
    now = before.clone()
    now[1, 11] = now[2, 4] = now[2, 10] = 1
    seen = []
    for p_TE in before, now:
        seen.append(Supports())
        for part in slice(0, 2), slice(2, 4):  # the fourth token is padding and must be ignored
            rows = torch.cat([p_TE, torch.full((1, 12), len(seen) - 1.0)])[part]
            mask_T = torch.tensor([True, True, True, False])[part]
            seen[-1]("x", Routing(rows, rows, rows[:, 0]), mask_T)
    assert seen[1].changed_from(seen[0]) == {"x": (2, 3)}


def test_final_state_is_omitted_if_the_last_checkpoint_equals_it(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    metrics = (run / "metrics.jsonl").read_text().splitlines()[:6]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    found = trace_history(
        loaded(run, run / "adapter"), find_saved_model(str(tmp_path / "run"), None), DOMAINS["long"], 1, batch_size=2
    )
    assert found is not None and [state.label for state in found.states] == ["0", "2", "4", "6"]


def test_number_of_checkpoints_is_limited(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_CHECKPOINTS", 2)
    model = loaded(run, run / "adapter")
    found = trace_history(model, find_saved_model(str(run), None), DOMAINS["long"], pad_id=1, batch_size=2)
    assert found is not None and found.skipped == 1
    assert [state.label for state in found.states] == ["0", "2", "6", "final"]


def test_logits_are_computed_for_one_position_unless_the_head_is_adapted(tmp_path: Path) -> None:
    path = str(make_backbone(tmp_path / "backbone"))
    for targets, positions in (["q_proj"], {1}), (["q_proj", "lm_head"], {8, 3}):
        config = LdMoleConfig(num_experts=EXPERTS, r=2, lambda_hidden=16, task_type="CAUSAL_LM", target_modules=targets)
        model = new_adapter(load_backbone(path, "causal_lm", "fp32"), config).eval()
        seen = set()
        head = model.get_base_model().get_output_embeddings()
        head.register_forward_pre_hook(lambda module, args, seen=seen: seen.add(args[0].shape[1]))
        observed = collect(model, DOMAINS, pad_id=1, batch_size=2)
        assert seen == positions
        linears = Linears(observed.together)
        assert linears.projections == targets and linears.layers == ([0, 1] if len(targets) == 1 else [0, 1, None])
        assert all(summarize(sums)["tokens"] == 15 for sums in observed.by_linear.values())


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def check_page(folder: Path, figures: set[str]) -> str:
    """Check that the page embeds exactly these figures and loads nothing; return its HTML without them."""
    page = (folder / "index.html").read_text()
    files = {path.stem: path.read_bytes() for path in folder.glob("*.png")}
    assert set(files) == figures
    embedded = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert sorted(base64.b64decode(data) for data in embedded) == sorted(files.values())
    bare = re.sub(r'src="data:[^"]*"', "", page)
    assert not re.search(r"src=|url\(|@import|<script|<link|https?://", bare)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', bare))
    assert len(re.findall("<figcaption><b>", bare)) == len(files)
    return bare


def test_report_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"lambda_mean": -1.0, "experts_per_token": 3.0, "max_load": 1.2, "dead_experts": 1}
    line = {"linears": {"model.layers.0.self_attn.q_proj": summary, "model.layers.1.mlp.up_proj": summary}}
    (run / "routing.jsonl").write_text("".join(json.dumps({"step": step} | line) + "\n" for step in (2, 4)))
    assert report(run) == 0
    page = check_page(run / "report", FIGURES | HISTORY_FIGURES | {"curves"})
    assert "eval.jsonl: 12 rows" in page and "Over the run" in page and "Domains" not in page
    printed = capsys.readouterr().out
    assert str(run / "report" / "index.html") in printed and "of 4, mean over tokens and linears" in printed
    (run / "routing.jsonl").write_text('{"step": 2}\n')
    assert report(run) == EXIT_EXPLAINED
    assert "routing.jsonl, line 1 is damaged" in capsys.readouterr().err
    (run / "routing.jsonl").unlink()


def test_report_by_domain_without_checkpoints(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "report"))
    rows = [{"prompt": "The colour of sea is", "completion": " blue", "domain": d} for d in ("<a>", "b", None, "b")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report(tmp_path / "run", "--data", data, "--output", tmp_path / "out", "--batch-size", 1) == 0
    page = check_page(tmp_path / "out", FIGURES | {"domains"})
    assert "Over the run" not in page
    rows_of = re.findall(r'<tr><th>([^<]*)</th><td class="number">(\d+)</td><td class="number">(\d+)</td>', page)
    assert rows_of == [("(no domain)", "1", "6"), ("&lt;a&gt;", "1", "6"), ("b", "2", "12")]


def test_limit_restricts_the_rows(run: Path) -> None:
    saved = find_saved_model(str(run), None)
    tokenizer = load_tokenizer(saved.backbone)
    rows = [sum(map(len, read_data(saved, None, limit, tokenizer).examples.values())) for limit in (5, None)]
    assert rows == [5, 12]


def test_report_of_an_adapter(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(run / "adapter", "--data", run.parent / "eval.jsonl", "--precision", "fp32") == 0
    check_page(tmp_path / "report_adapter", FIGURES)


@pytest.mark.full
def test_report_of_a_classifier(tmp_path: Path, ranks1: LocalRanks) -> None:
    make_backbone(tmp_path / "backbone")
    data = make_data(tmp_path / "train.jsonl", 8, "sequence_classification")
    config = make_config(
        tmp_path,
        backbone={"task": "sequence_classification"},
        data={"labels": [label.strip() for label in LABELS], "eval": None},
        optimisation={"max_steps": 1, "global_batch_size": 2},
        parallelism={"ep_size": 1},
        run={"save_every": 1},
    )
    ranks1.run(run_training, str(config))
    run = tmp_path / "run"
    assert report(run) == 0
    assert "train.jsonl: 8 rows" in check_page(run / "report", FIGURES | HISTORY_FIGURES)
    assert report(run / "adapter", "--data", data, "--output", tmp_path / "out") == 0
    check_page(tmp_path / "out", FIGURES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is neither a run"),
        (["adapter"], "set --data FILE"),
        (["unfinished"], "has no adapter yet"),
        (["adapter", "--data", "missing.jsonl"], "missing.jsonl: No such file"),
        (["adapter", "--data", "empty.jsonl"], "empty.jsonl has no rows"),
        (["adapter", "--data", "eval.jsonl", "--output", "empty.jsonl/out"], "--output"),
        (["adapter", "--data", "eval.jsonl", "--backbone", "nowhere"], "nowhere"),
    ],
)
def test_invalid_arguments_are_explained(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "adapter", "adapter")
    Path("unfinished").mkdir()
    shutil.copyfile(run / "config.yaml", "unfinished/config.yaml")
    shutil.copyfile(run.parent / "eval.jsonl", "eval.jsonl")
    Path("empty.jsonl").touch()
    assert report(*arguments) == EXIT_EXPLAINED
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and message in error and "Traceback" not in error


def test_damaged_checkpoint_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    (damaged,) = (tmp_path / "run" / "checkpoints" / "step_00000004").glob("rank_*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert report(tmp_path / "run") == EXIT_EXPLAINED
    assert f"{damaged} has" in capsys.readouterr().err


def test_token_texts_and_kinds(run: Path) -> None:
    from ldmole_dist.report.tokens import kind_of, token_text

    tokenizer = load_tokenizer(str(run.parent / "backbone"))

    def text(of: str) -> tuple[str, str]:
        (token,) = tokenizer(of)["input_ids"]
        shown = token_text(tokenizer, token)
        return shown, kind_of(tokenizer, token, shown)

    assert text(" blue") == ("␣blue", "begins a word") and text("The") == ("The", "begins a word")
    assert text("d") == ("d", "continues a word") and text("\n") == ("⏎", "special, white space")
    assert text("$") == ("$", "punctuation, digits") and text("</s>") == ("</s>", "special, white space")
    assert {kind_of(tokenizer, 5, shown) for shown in ("⏎␣␣", "␣␣")} == {"special, white space"}
    part = tokenizer("é")["input_ids"][0]
    assert token_text(tokenizer, part) == f"#{part}"
