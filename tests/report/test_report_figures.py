"""Figures of models of any size: positions of linears, lift, very small and very large grids."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ldmole_dist.config.adapter import LINEARS
from ldmole_dist.data.encode import Encoded
from ldmole_dist.method.routers import Routing
from ldmole_dist.method.statistics import summarize
from ldmole_dist.model.backbone import load_tokenizer
from ldmole_dist.model.saved import SavedModel
from ldmole_dist.monitor.linears import Linears, Position
from ldmole_dist.report.by_layer import load_grid
from ldmole_dist.report.coactivation import lift
from ldmole_dist.report.collect import Counter, Observed
from ldmole_dist.report.html import Figure, Section, Table, page
from ldmole_dist.report.inputs import ALL_ROWS, DataSet
from ldmole_dist.report.page import ReportData, sections, summary
from ldmole_dist.tuner.config import LdMoleConfig
from tests.small_run import make_backbone


def test_layers_and_projections_of_linears() -> None:
    linears = Linears(["model.layers.10.self_attn.q_proj", "model.layers.2.self_attn.q_proj", "lm_head"])
    assert linears.projections == ["q_proj", "lm_head"] and linears.layers == [2, 10, None]
    assert linears.layer_labels() == ["2", "10", "–"] and linears.label("lm_head") == "lm_head"
    assert linears.label("model.layers.2.self_attn.q_proj") == "layer 2 q_proj"
    values = linears.values("lm_head", lambda name: 7.0)
    assert np.isnan(values[:2]).all() and values[2] == 7.0
    assert linears.of("q_proj") == ["model.layers.2.self_attn.q_proj", "model.layers.10.self_attn.q_proj"]


def test_linears_of_the_same_layer_and_projection_keep_distinct_names() -> None:
    linears = Linears(["encoder.layers.0.q_proj", "decoder.layers.0.q_proj", "decoder.layers.0.o_proj"])
    assert linears.projections == ["encoder.layers.*.q_proj", "decoder.layers.*.q_proj", "o_proj"]
    assert linears.position["decoder.layers.0.q_proj"] == Position("decoder.layers.*.q_proj", 0)


def test_lift_by_hand() -> None:
    # 100 tokens: expert 0 in 50, 1 in 40, both in 30; 2 in 1, too rare for a lift; 3 in 20, never with 0.
    together = np.array([[50, 30, 1, 0], [30, 40, 0, 10], [1, 0, 1, 0], [0, 10, 0, 20]], dtype=float)
    found = lift(together, 100)
    assert found[0, 1] == found[1, 0] == pytest.approx(30 / (50 * 40 / 100))
    assert found[0, 3] == 0 and found[1, 3] == pytest.approx(10 / 8)
    assert np.isnan(found[2]).all() and np.isnan(np.diag(found)).all()


def routed(names: list[str], experts: int, dead: bool) -> Observed:
    """Return random routing of 40 tokens; with `dead`, no token uses expert 0 of the first linear."""
    generator = torch.Generator().manual_seed(0)
    counter = Counter(600, torch.device("cpu"))
    ids = torch.randint(2, 30, (1, 40), generator=generator)
    counter.begin(ALL_ROWS, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for index, name in enumerate(names):
        p_TE = torch.rand(40, experts, generator=generator).sub(0.4).relu()
        p_TE[:, -1] += 0.1
        if dead and not index:
            p_TE[:, 0] = 0
        counter(name, Routing(p_TE, p_TE, torch.rand(40, generator=generator)), None)
    return counter.result()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_backbone(tmp_path_factory.mktemp("tokenizer"))))


@pytest.mark.parametrize(
    ("layers", "projections", "experts"),
    [(1, ["q_proj"], 1), (2, ["q_proj"], 64), (40, list(LINEARS), 8), (3, ["a", "b"], 2)],
)
def test_figures_of_models_of_any_size(
    tokenizer: PreTrainedTokenizerBase, layers: int, projections: list[str], experts: int
) -> None:
    names = [f"model.layers.{layer}.{projection}" for layer in range(layers) for projection in projections]
    observed = routed(names, experts, dead=experts > 1)
    data = DataSet("data.jsonl", {ALL_ROWS: [Encoded([1], [1])]}, 32, 0)
    report = ReportData(SavedModel(Path("x"), "y"), LdMoleConfig(num_experts=experts), data, observed, None, [], "here")
    figures = {f.name: f for section in sections(report, tokenizer) for f in section.parts if isinstance(f, Figure)}
    assert ("coactivation" in figures) == (experts > 1) and len(figures) == 5 + (experts > 1)
    for figure in figures.values():
        picture = np.asarray(Image.open(io.BytesIO(figure.png)).convert("L"))
        assert picture.shape[1] == 1560 and 0.001 < (picture < 250).mean() < 0.9
    assert dict(summary(report))["dead experts"] == f"{int(experts > 1)} of {len(names) * experts:,}"
    assert f"({int(experts > 1)} in total)" in figures["load"].caption


def test_load_grid_is_indexed_by_layer_and_expert() -> None:
    names = ["model.layers.0.a", "model.layers.1.a", "model.layers.1.b"]
    of = {name: summarize(sums) for name, sums in routed(names, 4, dead=True).by_linear.items()}
    linears = Linears(names)
    grid = load_grid(linears, of, "a")
    assert (
        grid[0].tolist() == of["model.layers.0.a"]["load"] and grid[0, 0] == 0 and grid[1].tolist() != grid[0].tolist()
    )
    assert np.isnan(load_grid(linears, of, "b")[0]).all()


def test_page_escapes_its_contents() -> None:
    table = Table(["a", "b"], [["<x>", "1"], ["&", "−2"]], "<c>")
    figure = Figure("name", "<title>", "<caption>", b"png")
    html = page("<t>", "<lead>", [Section("<s>", ["<p>", table, figure])], "<f>")
    assert not any(f"<{tag}>" in html for tag in ("x", "c", "caption>&", "t", "lead", "s", "f"))
    assert "<p>&lt;p&gt;</p>" in html and 'class="number">−2<' in html and 'class="number"><' not in html
