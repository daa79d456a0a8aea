"""The sections and keys of a run config, with their types, ranges and defaults.

The keys of the `adapter` section are in `config/adapter.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from ldmole_dist.config.adapter import AdapterFields, Positive

_strict_keys = ConfigDict(extra="forbid")
NonNegative = Annotated[int, Field(ge=0)]
Coefficient = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
TaskName = Literal[
    "arc_challenge", "arc_easy", "commonsense_qa", "openbookqa", "swag", "hellaswag", "mmlu_pro", "cola", "rte"
]
# Class names of the sequence-classification tasks; the labels in their data are indices into these.
TASK_CLASSES: dict[str, tuple[str, ...]] = {
    "cola": ("unacceptable", "acceptable"),
    "rte": ("entailment", "not_entailment"),
}


@dataclass(config=_strict_keys)
class Backbone:
    """The frozen model.

    Args:
        path: local folder, or model name on the Hugging Face Hub (`ldmole convert` makes a folder from a GGUF file).
        task: "causal_lm", or "sequence_classification", which trains a `score` head over data.labels.
        attention: attention implementation by its name in transformers ("sdpa", "flash_attention_2", ...); null for the
            default of transformers.
        quantization: format that the frozen linears are quantized to while they are loaded: "nf4" (4 bits, QLoRA) or "int8"
            (8 bits, LLM.int8); null for none. Needs the extra "quantization" (docs/train.md).
    """

    path: str
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    attention: str | None = None
    quantization: Literal["nf4", "int8"] | None = None


@dataclass(config=_strict_keys)
class Adapter(AdapterFields):
    """The adapter to train; `AdapterFields` has its other keys.

    Args:
        init_from: folder of a saved adapter to start from; its own config then replaces the other keys of this section.
    """

    init_from: str | None = None


@dataclass(config=_strict_keys)
class Source:
    """One data set of a mixture (docs/data.md).

    Args:
        path: .jsonl, .json, .csv or .parquet file; null loads the task from the Hugging Face Hub.
        task: one of the paper's tasks (docs/tasks.md), whose columns the data has.
        format: row format of data without a task; null detects it from the keys of the first row.
        answers: format of a multiple-choice task: "letter" lists the options in the prompt and answers with a letter, as in the
            paper; "text" lists no options and answers with the text of an option.
        split: split of a task on the Hub; null for the default split.
        weight: sampling weight relative to the other sources; set it for all sources or for none.
        name: domain of the rows that do not set their own; results are grouped by domain. With several sources, the default is
            the name of the task or file.
    """

    path: str | None = None
    task: TaskName | None = None
    format: Literal["prompt_completion", "alpaca", "sharegpt", "messages", "text", "classification"] | None = None
    answers: Literal["letter", "text"] = "letter"
    split: str | None = None
    weight: Annotated[float, Field(gt=0)] | None = None
    name: str | None = None


# The tags make pydantic report only the errors of the alternative that matches the type of the value.
Sources = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Source], Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<text>"),
]


@dataclass(config=_strict_keys)
class Data:
    """Training and evaluation data (docs/data.md).

    Args:
        train: file to train on, or a list of sources.
        eval: file to evaluate on, a list of sources, or null.
        labels: class names, or possible completions of one token each. If set, the answer of each row without `choices` must be
            one of them, and evaluation reports accuracy. Multiple-choice tasks set `choices`. If all training sources are
            the same classification task, its classes are the default.
        max_length: maximum number of tokens of a sequence.
        truncation: cut sequences longer than max_length: plain texts at their end, all others at their start. If false, such a
            sequence is an error.
        packing: concatenate the sequences of a micro-batch into one row instead of padding them. Each sequence keeps its own
            position ids, and its tokens attend only to each other. Needs backbone.task "causal_lm" and backbone.attention
            null, "sdpa", "eager" or "flash_attention_2".
        cache: folder for encoded data sets, visible to all ranks. The file names depend on everything that affects encoding.
        streaming: keep the training set on disk: .jsonl files are read and checked once at the start, and rows are encoded when
            a step needs them. Needs truncation.
        workers: number of processes per rank that read and encode rows ahead; needs streaming.
        eval_limit: maximum number of rows to evaluate on from each source, taken from its start; null for all.
    """

    train: Sources
    eval: Sources | None = None
    labels: list[str] | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    truncation: bool = False
    packing: bool = False
    cache: str | None = None
    streaming: bool = False
    workers: NonNegative = 0
    eval_limit: Positive | None = None


@dataclass(config=_strict_keys)
class Optimisation:
    """Batch sizes, optimizer, learning-rate schedule and losses.

    Args:
        epochs: number of passes over the training data; set either this or max_steps.
        max_steps: number of optimizer steps; set either this or epochs.
        micro_batch_size: sequences per forward on one rank.
        global_batch_size: sequences per optimizer step, over all ranks and micro-batches.
        learning_rate: learning rate at the end of the warm-up.
        weight_decay: weight decay of AdamW.
        betas: decay rates of the Adam moments.
        eps: term that Adam adds to the denominator.
        optimizer: "adamw" is PyTorch's; "fused_adam" and "cpu_adam" are DeepSpeed's and need a compiler.
        schedule: learning rate after the warm-up: "cosine" decays to 0, "multistep" multiplies by gamma at each milestone,
            "constant" keeps it.
        warmup_steps: number of initial steps over which the learning rate increases linearly.
        milestones: milestones of "multistep", as fractions of all steps.
        gamma: factor by which "multistep" multiplies the learning rate at each milestone.
        max_grad_norm: norm that gradients are clipped to; 0 disables clipping.
        label_smoothing: label smoothing of the task loss.
        balance_coef: coefficient of the load-balancing loss (c_lb); 1.0 in the paper.
        sparsity_coef: coefficient of the sparsity loss (c_sp); 0 in the paper's main results.
        sparsity_target: target number of active experts per token (k*) in the sparsity loss and the L1 loss of router "relu".
        z_coef: coefficient of the router z-loss.
        l1_coef: initial coefficient of the L1 loss of router "relu"; the default is ReMoE's. Each step multiplies the
            coefficient by l1_rate if the mean number of active experts per token exceeds sparsity_target, and divides the
            coefficient by l1_rate if the mean is lower.
        l1_rate: factor by which the coefficient of the L1 loss changes per step; the default is ReMoE's.
        entropy_coef: coefficient of the entropy loss of router "top_p"; 1e-4 in that router's paper.
        router_noise: initial standard deviation of Gaussian noise on the router logits in training; 0, as in the paper,
            disables it.
        router_noise_share: fraction of all steps over which the noise decreases linearly to 0.
    """

    epochs: Annotated[float, Field(gt=0)] | None = None
    max_steps: Positive | None = None
    micro_batch_size: Positive = 8
    global_batch_size: Positive = 16
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Coefficient = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    optimizer: Literal["adamw", "fused_adam", "cpu_adam"] = "adamw"
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_steps: NonNegative = 0
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=lambda: [0.6, 0.8])
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    max_grad_norm: Coefficient = 1.0
    label_smoothing: Fraction = 0.0
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
    """How the run is distributed over ranks, and its precision.

    Args:
        ep_size: expert-parallel size: each group of this many consecutive ranks holds all experts once. Must divide num_experts
            and the number of ranks.
        dispatch: exchange in an expert-parallel group: "all_to_all" sends tokens, "gather" sends experts, and "auto" chooses,
            for each expert, whichever of the two causes less traffic.
        overlap: run the exchange while the frozen linears compute. The results are the same with and without overlap.
        deepspeed: name of a file in ds_configs/, such as "zero2", or path of a DeepSpeed JSON config.
        precision: dtype of the backbone and the activations; adapter parameters are always float32. fp16 uses a loss scale.
        gradient_checkpointing: recompute decoder layers in the backward instead of keeping their activations.
        timeout_minutes: time after which a collective that some rank has not entered raises an error.
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
    """Output folder, seed, and the intervals of evaluations, checkpoints and reports.

    Args:
        output_dir: folder of the run (config.yaml, adapter/, checkpoints/, tensorboard/, metrics.jsonl and other .jsonl files).
        seed: seed of initial values, dropout, router noise and data order.
        eval_every: number of optimizer steps between evaluations; 0 omits these evaluations. The last step is always followed
            by an evaluation.
        eval_before: also evaluate before the first step of a fresh run.
        save_every: number of optimizer steps between checkpoints; 0 saves one only after a stop request (SIGTERM or SIGINT).
        keep_last: number of latest checkpoints to keep.
        detail_every: number of optimizer steps between detailed reports: routing of each linear, gradient norms by part, time
            spent in dispatch, volume sent per input group, and peak memory.
        save_async: write checkpoints in the background from a copy in host memory. If false, training waits while a checkpoint
            is written, and no copy is needed.
        resume: "auto" resumes from the latest complete checkpoint in output_dir, if there is one. "never" starts fresh and
            moves previous results in output_dir aside. The path of a checkpoint resumes from this checkpoint, the path of a run
            from its latest checkpoint. If the latest checkpoint in output_dir is from a run with the same value of `resume`,
            this checkpoint is used instead, so that a restarted run keeps its progress.
    """

    output_dir: str
    seed: int = 0
    eval_every: NonNegative = 0
    eval_before: bool = True
    save_every: NonNegative = 0
    keep_last: Positive = 2
    detail_every: Positive = 10
    save_async: bool = True
    resume: str = "auto"


@dataclass(config=_strict_keys)
class Config:
    """The configuration of a run; each field is a section of the YAML file."""

    backbone: Backbone
    data: Data
    run: Run
    adapter: Adapter = Field(default_factory=Adapter)
    optimisation: Optimisation = Field(default_factory=Optimisation)
    parallelism: Parallelism = Field(default_factory=Parallelism)
