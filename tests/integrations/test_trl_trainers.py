"""TRL's DPO, KTO, reward and GRPO trainers equal a plain loop over the published loss plus the auxiliary losses, for two steps.

Shapes: N sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
)

from ldmole_dist import AuxiliaryLosses, LdMoleConfig, LossWeights, tuner_of
from ldmole_dist.parallel.dispatch import ExpertParallel
from tests.small_adapter import move, trainable
from tests.small_run import make_folder

BETA, LEARNING_RATE = 0.5, 0.5
WEIGHTS = LossWeights(balance=0.7, sparsity=0.3, z=0.05, target_k=2)
PROMPTS = ["The colour of rose is", "The colour of sky and sea is", "The colour of frog is", "Colour:"] * 2
CHOSEN = [" red", " blue and blue", " green", " grey and green and red"] * 2
REJECTED = [" grey and red", " red", " red and blue and grey", " blue"] * 2
ADAPTERS = ["new", "pretrained"]
Batch = dict[str, Tensor]
Loss = Callable[[PeftModel, Batch], Tensor]


class LdMoleDPOTrainer(AuxiliaryLosses, DPOTrainer):
    """The class of examples/dpo_trainer.py."""


class LdMoleKTOTrainer(AuxiliaryLosses, KTOTrainer):
    pass


class LdMoleRewardTrainer(AuxiliaryLosses, RewardTrainer):
    pass


class LdMoleGRPOTrainer(AuxiliaryLosses, GRPOTrainer):
    """The class of examples/grpo_trainer.py."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("trl"))


def backbone(folder: Path, kind: str = "causal_lm") -> Any:
    torch.manual_seed(0)  # of the reward model's head
    if kind == "causal_lm":
        return AutoModelForCausalLM.from_pretrained(folder / "backbone")
    return AutoModelForSequenceClassification.from_pretrained(folder / "backbone", num_labels=1, pad_token_id=1)


def adapter_config(kind: str = "causal_lm") -> LdMoleConfig:
    task = "CAUSAL_LM" if kind == "causal_lm" else "SEQ_CLS"
    return LdMoleConfig(num_experts=4, r=2, lambda_hidden=16, lora_dropout=0.0, task_type=task)


def adapted(folder: Path, kind: str = "causal_lm") -> PeftModel:
    """Return a model with nonzero B, the same in each call. At the initial B = 0, most gradients of an adapter vanish."""
    model = move(get_peft_model(backbone(folder, kind), adapter_config(kind)))
    tuner_of(model).context.weights = WEIGHTS
    return model.train()


def prepare(folder: Path, trainer_class: Any, config_class: Any, rows: dict[str, Any], **settings: Any) -> Any:
    """Return a trainer whose new adapter has the values of `adapted`, about to train two steps of plain gradient descent."""
    settings = (
        dict(
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_checkpointing=False,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        | settings
    )
    kind = "reward" if trainer_class is LdMoleRewardTrainer else "causal_lm"
    rest = {"reward_funcs": vowels} if trainer_class is LdMoleGRPOTrainer else {}
    given = adapted(folder, kind) if settings.pop("adapter", "new") == "pretrained" else backbone(folder, kind)
    trainer = trainer_class(
        model=given,
        args=config_class(str(folder / "out"), **settings),
        processing_class=AutoTokenizer.from_pretrained(folder / "backbone"),
        train_dataset=Dataset.from_dict(rows),
        peft_config=None if isinstance(given, PeftModel) else adapter_config(kind),
        auxiliary=WEIGHTS,
        **rest,
    )
    if not isinstance(given, PeftModel):
        move(trainer.model)
    if trainer_class is not LdMoleGRPOTrainer:
        trainer._get_train_sampler = lambda dataset=None: SequentialSampler(dataset)
    return trainer


def check(trainer: Any, folder: Path, loss_of: Loss, batches: Sequence[Batch], accumulation: int = 1) -> None:
    """Train, and compare logged losses and final parameters with those of gradient descent on `loss_of`."""
    kind = "reward" if isinstance(trainer, RewardTrainer) else "causal_lm"
    model = adapted(folder, kind)
    context, losses, auxiliaries = tuner_of(model).context, [], []
    for first in range(0, 2 * accumulation, accumulation):
        model.zero_grad()
        total = torch.zeros(())
        for batch in batches[first : first + accumulation]:
            task = loss_of(model, batch)
            loss = (task + context.auxiliary_loss()) / accumulation
            loss.backward()
            total += loss.detach()
            auxiliaries.append(float(torch.as_tensor(context.mean("sparsity")).detach()))
        losses.append(float(total))
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter -= LEARNING_RATE * parameter.grad
    start = {name: p.detach().clone() for name, p in trainable(adapted(folder, kind)).items()}
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in logged] == pytest.approx(losses, rel=1e-5)
    sparsity = [sum(auxiliaries[i : i + accumulation]) / accumulation for i in (0, accumulation)]
    assert [line["loss_sparsity"] for line in logged] == pytest.approx(sparsity, rel=1e-5)
    found, expected = trainable(trainer.model), trainable(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        moved = value - start[name]
        assert (found[name] - value).norm() < 1e-4 * moved.norm(), name


def log_probs(model: PeftModel, batch: Batch, prefix: str = "") -> Tensor:
    """Log-probability of each token of the completions given those before it, 0 elsewhere, (N, S - 1)."""
    logits = model(input_ids=batch[f"{prefix}input_ids"], attention_mask=batch[f"{prefix}attention_mask"]).logits
    targets, counts = batch[f"{prefix}input_ids"][:, 1:], batch[f"{prefix}completion_mask"][:, 1:]
    return logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1) * counts


def vowels(completions: list[str], **_: Any) -> list[float]:
    """Return the number of vowels of each completion, the reward in the tests of GRPO."""
    return [float(sum(letter in "aeiou" for letter in completion)) for completion in completions]


class Reference:
    """The reference model: the model at the start of training, without its adapter if that is "new"."""

    def __init__(self, folder: Path, adapter: str) -> None:
        self.model = adapted(folder).eval()
        if adapter == "new":
            self.model.base_model.disable_adapter_layers()

    @torch.no_grad()
    def __call__(self, batch: Batch, prefix: str = "") -> Tensor:
        return log_probs(self.model, batch, prefix)


def batches_of(trainer: Any) -> list[Batch]:
    return [{k: v.clone() for k, v in batch.items()} for batch in trainer.get_train_dataloader()]


PREFERENCES = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.full),
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        pytest.param({"precompute_ref_log_probs": True}, marks=pytest.mark.full),
    ],
    ids=["plain", "checkpointing", "precomputed"],
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_dpo(folder: Path, adapter: str, settings: dict[str, Any]) -> None:
    """Rafailov et al. 2023, equation 7."""
    trainer = prepare(folder, LdMoleDPOTrainer, DPOConfig, PREFERENCES, beta=BETA, adapter=adapter, **settings)
    reference, batches = Reference(folder, adapter), batches_of(trainer)

    def loss_of(model: PeftModel, batch: Batch) -> Tensor:
        chosen, rejected = (log_probs(model, batch) - reference(batch)).sum(-1).chunk(2)
        return -logsigmoid(BETA * (chosen - rejected)).mean()

    trainer.train()
    check(trainer, folder, loss_of, batches, settings.get("gradient_accumulation_steps", 1))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_kto(folder: Path, adapter: str) -> None:
    """Ethayarajh et al. 2024, equations 7 and 8, with lambda_D = 1.5 and lambda_U = 1."""
    rows = {"prompt": PROMPTS[1:], "completion": REJECTED[1:], "label": [True, False, False, True] + [True] * 3}
    trainer = prepare(folder, LdMoleKTOTrainer, KTOConfig, rows, beta=BETA, desirable_weight=1.5, adapter=adapter)
    reference, batches = Reference(folder, adapter), batches_of(trainer)

    def loss_of(model: PeftModel, batch: Batch) -> Tensor:
        with torch.no_grad():
            z = (log_probs(model, batch, "KL_") - reference(batch, "KL_")).sum(-1).mean().clamp(min=0)
        r = (log_probs(model, batch) - reference(batch)).sum(-1)
        good = torch.as_tensor(batch["label"]).bool()
        value = torch.where(good, 1.5 * torch.sigmoid(BETA * (r - z)), torch.sigmoid(BETA * (z - r)))
        return (torch.where(good, 1.5, 1.0) - value).mean()

    trainer.train()
    check(trainer, folder, loss_of, batches)
    assert any(line.get("kl", 0) > 1e-3 for line in trainer.state.log_history)  # z matters


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_reward(folder: Path, adapter: str) -> None:
    """Bradley-Terry: Ouyang et al. 2022, equation 1. The head of the model is trained, too."""
    rows = {
        "chosen": [p + c for p, c in zip(PROMPTS, CHOSEN, strict=True)],
        "rejected": [p + r for p, r in zip(PROMPTS, REJECTED, strict=True)],
    }
    trainer = prepare(folder, LdMoleRewardTrainer, RewardConfig, rows, adapter=adapter)

    def loss_of(model: PeftModel, batch: Batch) -> Tensor:
        chosen, rejected = model(**batch).logits.squeeze(-1).chunk(2)
        return -logsigmoid(chosen - rejected).mean()

    batches = batches_of(trainer)
    trainer.train()
    assert any("score" in name for name in trainable(trainer.model))
    check(trainer, folder, loss_of, batches)


def rollouts_of(trainer: Any) -> list[Batch]:
    """Return the list to which the trainer appends each batch of completions that it computes a loss for."""
    seen: list[Batch] = []
    compute = trainer._compute_loss

    def record(model: Any, inputs: Batch) -> Tensor:
        seen.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = record
    return seen


def whole(rollout: Batch) -> Batch:
    """Prompts and completions of a rollout as one batch, with the masks of all tokens and of the completions."""
    none = torch.zeros_like(rollout["prompt_mask"])
    return {
        "input_ids": torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1),
        "attention_mask": torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1),
        "completion_mask": torch.cat([none, rollout["completion_mask"]], dim=1),
    }


@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.full), True], ids=["plain", "checkpointing"]
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_grpo(folder: Path, adapter: str, checkpointing: bool) -> None:
    """Shao et al. 2024, equations 3 and 4: each group of 4 completions is used for two steps of two micro-batches."""
    trainer = prepare(
        folder,
        LdMoleGRPOTrainer,
        GRPOConfig,
        {"prompt": PROMPTS},
        adapter=adapter,
        beta=BETA,
        loss_type="grpo",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        num_iterations=2,
        max_completion_length=5,
        gradient_checkpointing=checkpointing,
    )
    tokenizer = trainer.processing_class

    def scored(rollout: Batch) -> tuple[list[str], list[float]]:
        prompts, completions = (
            tokenizer.batch_decode(rollout[f"{part}_ids"], skip_special_tokens=True)
            for part in ("prompt", "completion")
        )
        return prompts, vowels(completions)

    rollouts, start, reference = rollouts_of(trainer), adapted(folder), Reference(folder, adapter)
    trainer.train()
    assert all(rollouts[i]["completion_ids"] is rollouts[i + 2]["completion_ids"] for i in (0, 1))

    groups: dict[str, list[float]] = {}
    for rollout in rollouts[:2]:
        for prompt, reward in zip(*scored(rollout), strict=True):
            groups.setdefault(prompt, []).append(reward)
    assert [len(group) for group in groups.values()] == [4, 4]

    def loss_of(model: PeftModel, rollout: Batch) -> Tensor:
        batch = whole(rollout)
        group = torch.tensor([groups[prompt] for prompt in scored(rollout)[0]])
        reward = torch.tensor(scored(rollout)[1])
        advantage = ((reward - group.mean(1)) / (group.std(1) + 1e-4))[:, None]
        with torch.no_grad():
            old = log_probs(start, batch)
        given, policy = reference(batch), log_probs(model, batch)
        ratio, excess = (policy - old).exp(), given - policy
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        kl = ratio * (excess.exp() - excess - 1)  # TRL's default: DeepSeek-V3.2, equation 7
        each = (surrogate - BETA * kl) * batch["completion_mask"][:, 1:]
        return -(each.sum(1) / batch["completion_mask"].sum(1)).mean()

    check(trainer, folder, loss_of, rollouts, accumulation=2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static"},
        pytest.param(
            {
                "use_transformers_continuous_batching": True,
                "transformers_continuous_batching_config": {"num_blocks": 8, "block_size": 16, "max_batch_tokens": 64},
            },
            marks=pytest.mark.full,
        ),
    ],
    ids=["dynamic cache", "static cache", "continuous batching"],
)
def test_grpo_generates_with_the_adapter(folder: Path, settings: dict[str, Any]) -> None:
    """Greedy generation with a key-value cache and left-padded prompts gives the tokens of forwards without a cache."""
    changed = dict(per_device_train_batch_size=4, num_generations=2, max_completion_length=6, top_k=1, **settings)
    trainer = prepare(folder, LdMoleGRPOTrainer, GRPOConfig, {"prompt": PROMPTS}, **changed)
    rollouts, expected = rollouts_of(trainer), []
    generate = trainer._generate_single_turn

    def generate_both(prompts: list[list[int]], *rest: Any) -> Any:
        expected.append([greedy(trainer.model, prompt, 6) for prompt in prompts])
        return generate(prompts, *rest)

    trainer._generate_single_turn = generate_both
    trainer.train()
    bare = [greedy(backbone(folder), prompt, 6) for prompt in trainer.processing_class(PROMPTS)["input_ids"]]
    for rollout, completions in zip(rollouts, expected, strict=True):
        found = [
            ids[: mask.sum()].tolist()
            for ids, mask in zip(rollout["completion_ids"], rollout["completion_mask"], strict=True)
        ]
        assert sorted(found) == sorted(completions)
        assert not any(ids in bare for ids in found)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], length: int) -> list[int]:
    """Return the most likely next tokens, up to the end of the sequence, from forwards without a key-value cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length and (ids[-1] != 1 or len(ids) == len(prompt)):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"use_vllm": True}, "use_vllm=True does not work with LD-MoLE"),
        ({"use_transformers_continuous_batching": True, "bf16": True}, "set bf16=False"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "drops the gradient",
        ),
    ],
    ids=["vllm", "continuous batching in bf16", "reentrant"],
)
def test_options_of_grpo_are_refused(folder: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        prepare(folder, LdMoleGRPOTrainer, GRPOConfig, {"prompt": PROMPTS}, per_device_train_batch_size=8, **settings)


def test_spread_experts_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpertParallel, "size", property(lambda self: 2))
    with pytest.raises(ValueError, match="spread over 2 ranks"):
        prepare(folder, LdMoleDPOTrainer, DPOConfig, PREFERENCES)


def test_adapter_of_a_quantized_backbone_cast_by_trl_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "is_loaded_in_4bit", True, raising=False)
    with pytest.raises(ValueError, match="TRL casts it"):
        prepare(folder, LdMoleDPOTrainer, DPOConfig, PREFERENCES)
