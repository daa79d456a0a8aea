"""The configuration of a run: one YAML file of dataclasses, changed on the command line by a.b=c.

An unknown key, a wrong type or a value out of range is one `UserError` that names the key and the remedy.
"""

from __future__ import annotations

import difflib
import math
import typing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ldmole_dist.errors import UserError

_strict_keys = ConfigDict(extra="forbid")
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Coefficient = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
TaskName = Literal[
    "arc_challenge", "arc_easy", "commonsense_qa", "openbookqa", "swag", "hellaswag", "mmlu_pro", "cola", "rte"
]
# Of those tasks that are sequence classification: the class names, in the order of the data's numbers.
TASK_CLASSES: dict[str, tuple[str, ...]] = {
    "cola": ("unacceptable", "acceptable"),
    "rte": ("entailment", "not_entailment"),
}
# The tags let pydantic say what is wrong with the one that is meant, and not what is wrong with each.
ExpertCounts = Annotated[
    Annotated[Positive, Tag("<number>")] | Annotated[list[Positive], Field(min_length=1), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<number>"),
]


@dataclass(config=_strict_keys)
class Backbone:
    """The frozen model.

    Args:
        path: a local folder or a name on the hub (`ldmole convert` makes a folder from a GGUF file).
        task: "causal_lm", or "sequence_classification" with a trained `score` head over data.labels.
        attention: implementation, as transformers names it ("sdpa", "flash_attention_2", ...); None lets it choose.
    """

    path: str
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    attention: str | None = None


@dataclass(config=_strict_keys)
class Adapter:
    """The adapter; field by field as `LdMoleConfig`, which explains them.

    Args:
        init_from: folder of a saved adapter to start from; its own config then decides everything else here.
    """

    r: Positive = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    lora_dropout: Share = 0.1
    num_experts: ExpertCounts = 8
    target_modules: list[str] | str = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    router: Literal["sparsegen", "topk", "relu", "softmax", "top_p", "lora"] = "sparsegen"
    router_input: Literal["layer", "hidden"] = "layer"
    top_k: Positive = 2
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.4
    lambda_hidden: Positive = 256
    lambda_eps: Annotated[float, Field(gt=0, le=1)] = 0.01
    lambda_init: Literal["live", "authors"] = "live"
    modules_to_save: list[str] | None = None
    init_from: str | None = None


@dataclass(config=_strict_keys)
class Source:
    """One data set of several (docs/data.md).

    Args:
        path: file: .jsonl, .json, .csv or .parquet. A task without one comes from the hub.
        task: name of one of the paper's tasks (docs/tasks.md), whose columns the data has.
        format: of the rows, if it is not a task's; None recognises it by the keys of the first row.
        answers: of a multiple-choice task: "letter" shows the options and answers with a letter, as the paper does; "text"
            shows none, and the answer is the option itself.
        split: of a task on the hub, instead of its usual one.
        weight: share of what is trained on, relative to the weights of the other sources; all of them have one or none has.
        name: domain of rows that name none, in results; the task's or the file's name, if there are several sources.
    """

    path: str | None = None
    task: TaskName | None = None
    format: Literal["prompt_completion", "alpaca", "sharegpt", "messages", "text", "classification"] | None = None
    answers: Literal["letter", "text"] = "letter"
    split: str | None = None
    weight: Annotated[float, Field(gt=0)] | None = None
    name: str | None = None


Sources = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Source], Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<text>"),
]


@dataclass(config=_strict_keys)
class Data:
    """What is trained and evaluated on (docs/data.md).

    Args:
        train: file to train on, or a list of sources.
        eval: file to evaluate on, or a list of sources, or None.
        labels: the possible completions, one token each, or class names: given, every row must have one of them, and
            evaluation reports accuracy. Tasks bring their own.
        max_length: tokens of a sequence.
        truncation: cut longer sequences at the start of the prompt, plain texts at their end; off, a longer one is an error.
        packing: the sequences of a micro-batch follow each other in one row instead of being padded, each with positions and
            attention of its own. Needs an attention that knows where they begin: "sdpa", "eager" or "flash_attention_2".
        cache: folder of token ids that were encoded before, which all ranks see; what they depend on is part of their names.
        streaming: leave the training set on the disk: .jsonl files are read and checked once at the start, and rows are encoded
            when a step needs them. Needs truncation.
        workers: processes on each rank that read and encode ahead, with streaming.
        eval_limit: evaluate on so many rows of each source, from its start.
    """

    train: Sources
    eval: Sources | None = None
    labels: list[str] | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    truncation: bool = False
    packing: bool = False
    cache: str | None = None
    streaming: bool = False
    workers: NotNegative = 0
    eval_limit: Positive | None = None


@dataclass(config=_strict_keys)
class Optimisation:
    """How parameters are updated.

    Args:
        epochs: passes over the training file; or give max_steps.
        max_steps: optimizer steps.
        micro_batch_size: sequences of one forward on one rank.
        global_batch_size: sequences of an optimizer step, over all ranks and micro-batches.
        eps: Adam's.
        optimizer: "adamw" is torch's; "fused_adam" and "cpu_adam" are DeepSpeed's and need a compiler.
        schedule: after the warm-up: "cosine" to 0, "multistep" (times gamma at each milestone) or "constant".
        warmup_steps: of linear increase from 0.
        milestones: for "multistep", as shares of all steps.
        gamma: for "multistep".
        max_grad_norm: gradients are scaled down to this norm; 0 for no clipping.
        label_smoothing: of the task loss.
        balance_coef: c_lb. 1.0 in the paper.
        sparsity_coef: c_sp. 0 in the paper's main results.
        sparsity_target: k*, the number of experts that the sparsity loss steers to, and router relu's L1 loss.
        z_coef: of the router z-loss.
        l1_coef: of the L1 loss of router relu at the first step; from step to step it is multiplied with or divided by l1_rate,
            until sparsity_target experts are active.
        l1_rate: see l1_coef; both defaults are ReMoE's.
        entropy_coef: of the entropy loss of router top_p; 1e-4 in its paper.
        router_noise: standard deviation of Gaussian noise on the router scores in training, at the first step; 0, as in the
            paper, for none.
        router_noise_share: of all steps, over which the noise falls linearly to 0.
    """

    epochs: Annotated[float, Field(gt=0)] | None = None
    max_steps: Positive | None = None
    micro_batch_size: Positive = 8
    global_batch_size: Positive = 16
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Coefficient = 0.1
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    optimizer: Literal["adamw", "fused_adam", "cpu_adam"] = "adamw"
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_steps: NotNegative = 0
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=lambda: [0.6, 0.8])
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    max_grad_norm: Coefficient = 1.0
    label_smoothing: Share = 0.0
    balance_coef: Coefficient = 1.0
    sparsity_coef: Coefficient = 0.0
    sparsity_target: Positive = 2
    z_coef: Coefficient = 0.0
    l1_coef: Coefficient = 1e-8
    l1_rate: Annotated[float, Field(gt=1)] = 1.2
    entropy_coef: Coefficient = 0.0
    router_noise: Coefficient = 0.0
    router_noise_share: Annotated[float, Field(gt=0, le=1)] = 0.5


@dataclass(config=_strict_keys)
class Parallelism:
    """How the run is spread over ranks and fits into their memory.

    Args:
        ep_size: consecutive ranks that hold one copy of all experts between them; must divide num_experts and the ranks.
        dispatch: what moves between the ranks of such a group: "auto" whichever is lighter, the tokens of a rank or the
            experts that it needs; "all_to_all" always tokens; "gather" always experts.
        overlap: let what moves travel while the frozen linears compute; the numbers are the same.
        deepspeed: name of a file in ds_configs/ ("zero2") or path of a DeepSpeed JSON config.
        precision: of the backbone and the activations; adapter parameters are float32 in every one. fp16 has a loss scale.
        gradient_checkpointing: recompute decoder layers in the backward instead of keeping their activations.
        timeout_minutes: after which a collective that a rank does not enter is an error.
    """

    ep_size: Positive = 1
    dispatch: Literal["auto", "all_to_all", "gather"] = "auto"
    overlap: bool = True
    deepspeed: str = "zero2"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = True
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0


@dataclass(config=_strict_keys)
class Run:
    """Where results go and how often.

    Args:
        output_dir: the run's folder (config.yaml, adapter/, checkpoints/, tensorboard/, metrics.jsonl, routing.jsonl).
        seed: of initial values, dropout and data order.
        eval_every: optimizer steps between evaluations; 0: only before and after training.
        eval_before: evaluate before the first step too.
        save_every: optimizer steps between checkpoints; 0: none.
        keep_last: checkpoints that are kept.
        detail_every: optimizer steps between detailed reports: routing of each linear, gradient norms by part, time in
            dispatch, what each input group sent.
        save_async: write checkpoints while training goes on, from a copy in host memory; false: stop for them, and copy
            nothing.
        resume: "auto" goes on from the newest whole checkpoint in output_dir, if there is one; "never" starts anew, and
            what output_dir holds is moved aside; a path goes on from that checkpoint, or the newest of that run.
    """

    output_dir: str
    seed: int = 0
    eval_every: NotNegative = 0
    eval_before: bool = True
    save_every: NotNegative = 0
    keep_last: Positive = 2
    detail_every: Positive = 10
    save_async: bool = True
    resume: str = "auto"


@dataclass(config=_strict_keys)
class Config:
    """A whole run."""

    backbone: Backbone
    data: Data
    run: Run
    adapter: Adapter = Field(default_factory=Adapter)
    optimisation: Optimisation = Field(default_factory=Optimisation)
    parallelism: Parallelism = Field(default_factory=Parallelism)


def load_config(path: str, overrides: list[str]) -> Config:
    """Read, override and check.

    Args:
        path: of the YAML file.
        overrides: "a.b=c", c read as YAML; "b=c" where only one section has b.

    Raises:
        UserError: see the head of this file.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    return make_config(raw, overrides, path)


def make_config(raw: Any, overrides: list[str], path: str) -> Config:
    """Override and check what was read.

    Args:
        raw: as YAML gives it; changed.
        overrides: see `load_config`.
        path: where it is from, for messages.

    Raises:
        UserError: see the head of this file.
    """
    if not isinstance(raw, dict):
        raise UserError(f"config {path} must be a mapping with the sections {_names(Config)}, it holds: {raw!r:.80}")
    for override in overrides:
        _override(raw, override)
    try:
        config = TypeAdapter(Config).validate_python(raw)
    except ValidationError as error:
        raise UserError(f"config {path}: " + "; ".join(_explain(e) for e in error.errors())) from error
    _check(config)
    return config


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back."""
    return yaml.safe_dump(plain_config(config), sort_keys=False)


def plain_config(config: Config) -> dict[str, Any]:
    """Dictionaries, lists and values, as in the file."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches of an optimizer step on each rank.

    Raises:
        UserError: if the global batch cannot be divided so.
    """
    o = config.optimisation
    per_forward = o.micro_batch_size * world_size
    if o.global_batch_size % per_forward:
        lower = o.global_batch_size // per_forward * per_forward
        fits = [n for n in (lower, lower + per_forward) if n]
        raise UserError(
            f"optimisation.global_batch_size={o.global_batch_size} is no multiple of optimisation.micro_batch_size="
            f"{o.micro_batch_size} times {world_size} ranks: {' or '.join(map(str, fits))} would fit"
        )
    return o.global_batch_size // per_forward


def check_parallelism(config: Config, world_size: int) -> None:
    """Raises UserError where this config cannot run on `world_size` ranks."""
    check_ep_size(config.parallelism.ep_size, world_size)
    accumulation_steps(config, world_size)


def check_ep_size(ep_size: int, world_size: int) -> None:
    """Raises UserError where `world_size` ranks cannot be grouped so."""
    if world_size % ep_size:
        raise UserError(
            f"parallelism.ep_size={ep_size} does not divide the {world_size} ranks of this run: "
            f"choose one of {[p for p in range(1, world_size + 1) if world_size % p == 0]}"
        )


def _check(config: Config) -> None:
    o, a, ep_size = config.optimisation, config.adapter, config.parallelism.ep_size
    counts = a.num_experts if isinstance(a.num_experts, list) else [a.num_experts]
    if (o.epochs is None) == (o.max_steps is None):
        raise UserError("give one of optimisation.epochs and optimisation.max_steps, not both and not neither")
    if a.router == "topk" and a.top_k > min(counts):
        raise UserError(
            f"adapter.top_k={a.top_k} is more than adapter.num_experts={a.num_experts}: lower it to at most {min(counts)}"
        )
    if math.gcd(*counts) % ep_size:
        raise UserError(
            f"adapter.num_experts={a.num_experts} is no multiple of parallelism.ep_size={ep_size}: "
            f"choose ep_size among {[p for p in range(1, min(counts) + 1) if math.gcd(*counts) % p == 0]}"
        )
    _check_sources(config)
    _check_streaming(config.data)
    _check_packing(config)
    if config.backbone.task == "sequence_classification" and not config.data.labels:
        raise UserError("backbone.task=sequence_classification needs data.labels, the names of the classes")
    if config.data.labels is not None and len(set(config.data.labels)) < max(2, len(config.data.labels)):
        raise UserError(f"data.labels={config.data.labels} must be at least two different values")


def _check_packing(config: Config) -> None:
    if config.data.packing and config.backbone.task == "sequence_classification":
        raise UserError(
            "data.packing=true is for causal language models: a classifier reads the last token of each row"
        )
    known = (None, "sdpa", "eager", "flash_attention_2")
    if config.data.packing and config.backbone.attention not in known:
        raise UserError(
            f"data.packing=true was not tested with backbone.attention={config.backbone.attention}: choose one of {known[1:]}"
        )


def _check_streaming(data: Data) -> None:
    if data.workers and not data.streaming:
        raise UserError(
            f"data.workers={data.workers} is for data.streaming=true: in memory all rows are encoded at the start"
        )
    if data.streaming and not data.truncation:
        raise UserError(
            "data.streaming=true needs data.truncation=true: how long rows are is not known before their step"
        )
    sources = data.train if isinstance(data.train, list) else [Source(path=data.train)]
    for source in sources if data.streaming else []:
        if source.path is None or Path(source.path).suffix != ".jsonl":
            raise UserError(
                f"data.streaming=true reads .jsonl files, not {source.path or source.task}: write its rows to one, an object a "
                "line, or leave streaming out"
            )


def _check_sources(config: Config) -> None:
    for key, data in (("train", config.data.train), ("eval", config.data.eval)):
        sources = data if isinstance(data, list) else []
        if isinstance(data, list) and not data:
            raise UserError(f"data.{key} is an empty list: give at least one source")
        for source in sources:
            if source.task is None and source.path is None:
                raise UserError(f"data.{key}: a source needs a path or a task")
            if source.answers == "text" and (source.task is None or source.task in TASK_CLASSES):
                raise UserError(
                    f"data.{key}: answers=text is for multiple-choice tasks, not for {source.task or source.path}"
                )
            if source.task is not None and source.format is not None:
                raise UserError(f"data.{key}: task {source.task} has a format of its own, leave format out")
        if len({source.weight is None for source in sources}) > 1:
            raise UserError(f"data.{key}: some sources have a weight and some none: give all of them one, or none")
        if key == "train" and config.data.labels is None and config.backbone.task == "sequence_classification":
            named = {TASK_CLASSES.get(source.task or "") for source in sources}
            if len(named) == 1 and (classes := named.pop()) is not None:
                config.data.labels = list(classes)


def _override(raw: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    *sections, name = key.split(".")
    if not found or not all([*sections, name]):
        raise UserError(f"override {override!r} must look like section.key=value")
    if not sections and name not in _names(
        Config
    ):  # "resume=never": the section goes without saying if only one has it
        sections = [section for section in _names(Config) if name in _names(_section([section]))]
        if len(sections) != 1:
            where = f"it is in {sections}" if sections else f"no section has it; there are {_names(Config)}"
            raise UserError(f"override {override!r} must look like section.key=value: {where}")
    target = raw
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        target[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML") from error


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"] if part not in ("<number>", "<list>", "<text>")]
    key = ".".join(path)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _names(_section(path[:-1]))
        close = difflib.get_close_matches(path[-1], known, n=1)
        return f"unknown key {key}; " + (f"did you mean {close[0]}?" if close else f"there are {known}")
    if error["type"] in ("missing", "missing_argument"):
        return f"{key} is missing: give it a value"
    return f"{key}={error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _section(path: list[str]) -> Any:
    section: Any = Config
    for name in path:
        section = Source if name.isdigit() else typing.get_type_hints(section)[name]
    return section


def _names(section: Any) -> list[str]:
    return [field.name for field in fields(section)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
