"""Hugging Face's Trainer and TRL's SFTTrainer: their gradients are our own trainer's, auxiliary losses included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ldmole_dist.config import load_config
from ldmole_dist.hf_trainer import AuxiliaryLosses, LdMoleTrainer
from ldmole_dist.method.context import LossWeights
from ldmole_dist.model.backbone import load_adapter, load_backbone, load_tokenizer
from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.training.run import prepare
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import tuner_of
from tests.small_adapter import move
from tests.small_run import make_config, make_folder

MICRO, WEIGHTS = 4, LossWeights(balance=0.7, sparsity=0.3, z=0.05, target_k=2)
Gradients = dict[str, Tensor]


class LdMoleSFTTrainer(AuxiliaryLosses, SFTTrainer):
    """The class that docs/integrations.md shows."""


class InOrder(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = gradients_of(kwargs["model"])


def gradients_of(model: Any) -> Gradients:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def our_gradients(config: str, *overrides: str) -> tuple[Gradients, list[list[dict[str, list[int]]]]]:
    """Of the first optimizer step of our trainer, and the micro-batches that it had; sent to a rank."""
    trainer = prepare(load_config(config, list(overrides)))
    found: list[Gradients] = []
    engine: Any = trainer.engine
    update = engine.step

    def step() -> None:
        if engine.deepspeed.is_gradient_accumulation_boundary():
            found.append(gradients_of(engine.module))
        update()

    engine.step = step
    trainer._train_step(1)
    trainer.monitor.close()
    batches = [
        [{"input_ids": example.input_ids, "labels": example.labels} for example in micro_batch]
        for micro_batch in trainer.data.micro_batches(0)
    ]
    return found[0], batches  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, data and an adapter that is away from its start, where its gradients vanish."""
    folder = make_folder(tmp_path_factory.mktemp("trainers"))
    settings = LdMoleConfig(num_experts=4, r=2, lambda_hidden=16, lora_dropout=0.0, task_type="CAUSAL_LM")
    move(get_peft_model(load_backbone(str(folder / "backbone"), "causal_lm", "fp32"), settings)).save_pretrained(
        folder / "adapter"
    )
    return folder


def loaded(folder: Path) -> PeftModel:
    backbone = load_backbone(str(folder / "backbone"), "causal_lm", "fp32")
    return load_adapter(backbone, str(folder / "adapter"), trainable=True)


@pytest.fixture(scope="module")
def ours(folder: Path, ranks1: LocalRanks) -> Callable[[int], tuple[Gradients, list[dict[str, list[int]]]]]:
    """By accumulation steps."""
    known: dict[int, Any] = {}

    def get(accumulation: int) -> Any:
        if accumulation not in known:
            config = make_config(
                folder,
                adapter={"init_from": str(folder / "adapter")},
                data={"labels": None},
                optimisation={
                    "micro_batch_size": MICRO,
                    "global_batch_size": MICRO * accumulation,
                    "max_grad_norm": 0.0,
                    "balance_coef": WEIGHTS.balance,
                    "sparsity_coef": WEIGHTS.sparsity,
                    "z_coef": WEIGHTS.z,
                },
                parallelism={"ep_size": 1, "deepspeed": "zero0"},
                run={"output_dir": str(folder / f"ours_{accumulation}")},
            )
            (gradients, batches) = ranks1.run(our_gradients, str(config))[0]
            known[accumulation] = gradients, [row for batch in batches for row in batch]
        return known[accumulation]

    return get


def theirs(kind: Any, folder: Path, rows: list[dict[str, list[int]]], accumulation: int, **changes: Any) -> Any:
    """Return a trainer that is ready to train one step on these rows in this order, and the callback that keeps its gradients.

    `kind` is "trainer", "sft" or a subclass of Trainer.
    """
    kept, tokenizer = InOrder(), load_tokenizer(str(folder / "backbone"))
    settings: dict[str, Any] = dict(
        max_steps=1,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    given: dict[str, Any] = dict(model=loaded(folder), train_dataset=Dataset.from_list(rows), callbacks=[kept])
    given |= {name: changes.pop(name) for name in ("eval_dataset",) if name in changes}
    settings |= changes
    output = str(folder / "theirs")
    made: Any
    if kind == "sft":
        config = SFTConfig(output, **({"gradient_checkpointing": False, "bf16": False} | settings))
        made = LdMoleSFTTrainer(args=config, processing_class=tokenizer, auxiliary=WEIGHTS, **given)
    else:
        args, collator = TrainingArguments(output, **settings), DataCollatorForSeq2Seq(tokenizer)
        made = (LdMoleTrainer if kind == "trainer" else kind)(
            args=args, data_collator=collator, auxiliary=WEIGHTS, **given
        )
    made._get_train_sampler = lambda dataset: SequentialSampler(dataset)
    return made, kept


def distance(found: Gradients, expected: Gradients) -> float:
    assert found.keys() == expected.keys()
    # Ours was on the GPU where there is one, theirs is on the CPU.
    return max(float((found[n].cpu() - g.cpu()).norm() / g.norm()) for n, g in expected.items())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.full), 4])
@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_gradients_are_our_trainers(folder: Path, ours: Any, kind: str, accumulation: int, checkpointing: bool) -> None:
    expected, rows = ours(accumulation)
    trainer, kept = theirs(kind, folder, rows, accumulation, gradient_checkpointing=checkpointing)
    trainer.train()
    assert distance(kept.gradients, expected) < 1e-5
    logged = next(line for line in trainer.state.log_history if "loss_balance" in line)
    assert 1 <= logged["experts_per_token"] <= 4 and logged["lambda_mean"] < 1 and logged["loss_z"] > 0


def test_a_loss_scale_scales_the_auxiliary_losses_too(folder: Path, ours: Any) -> None:
    """As fp16 has it: accelerate's scaler, on the CPU."""
    expected, rows = ours(4)
    trainer, kept = theirs("trainer", folder, rows, 4)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train()
    unscaled = {name: gradient / 1024 for name, gradient in kept.gradients.items()}
    assert distance(unscaled, expected) < 1e-5


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_bf16_autocast_has_nearly_the_same_gradients(folder: Path, ours: Any, kind: str) -> None:
    expected, rows = ours(4)
    trainer, kept = theirs(kind, folder, rows, 4, bf16=True)
    trainer.train()
    assert kept.gradients.keys() == expected.keys()
    found, exact = (torch.cat([g[name].flatten() for name in expected]) for g in (kept.gradients, expected))
    assert 0 < (found - exact).norm() / exact.norm() < 0.1  # more than 0: autocast was on


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_fp16_on_a_cpu_trains_in_float32(folder: Path, ours: Any, kind: str) -> None:
    expected, rows = ours(4)
    trainer, kept = theirs(kind, folder, rows, 4, bf16=False, fp16=True)
    trainer.train()
    assert trainer.args.fp16 and not trainer.accelerator.native_amp  # accelerate enables fp16 only on an accelerator
    assert distance(kept.gradients, expected) < 1e-5


def test_a_loss_of_ones_own(folder: Path, ours: Any) -> None:
    """A user's loss function normalizes over the step, also where the model takes no number of answers."""
    expected, rows = ours(4)

    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    trainer, kept = theirs("trainer", folder, rows, 4)
    trainer.compute_loss_func, trainer.model_accepts_loss_kwargs = own, False
    trainer.train()
    assert distance(kept.gradients, expected) < 1e-5


def test_evaluation_has_no_auxiliary_loss(folder: Path, ours: Any) -> None:
    _, rows = ours(1)
    trainer, _ = theirs("trainer", folder, rows, 1)
    with_aux = trainer.evaluate(Dataset.from_list(rows))["eval_loss"]
    trainer.context.weights = LossWeights()
    assert trainer.evaluate(Dataset.from_list(rows))["eval_loss"] == with_aux


def test_training_metrics_are_not_logged_in_evaluation(folder: Path, ours: Any) -> None:
    _, rows = ours(1)
    settings = dict(max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=1)
    trainer, _ = theirs("trainer", folder, rows, 1, eval_dataset=Dataset.from_list(rows), **settings)
    trainer.train()
    assert ["loss_z" in line for line in trainer.state.log_history] == [False, True, False, False]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_several_forwards_in_a_loss(folder: Path, ours: Any, checkpointing: bool) -> None:
    """The auxiliary losses are the mean of those of the forwards with gradients, each with its own mask."""
    _, rows = ours(1)
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]

    class InChunks(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            chunks = [{k: v[i : i + 2] for k, v in inputs.items()} for i in (0, 2)]
            loss = torch.stack([model(**chunk).loss for chunk in chunks]).mean()
            with torch.no_grad(), model.disable_adapter():
                model(**{k: v[:, :3] for k, v in inputs.items()})
            with torch.no_grad():
                model(**{k: v[:, :3] for k, v in inputs.items()})
            return loss

    class LdMoleInChunks(AuxiliaryLosses, InChunks):
        pass

    trainer, kept = theirs(LdMoleInChunks, folder, rows, 1, gradient_checkpointing=checkpointing)
    trainer.train()
    model = loaded(folder).train()
    context = tuner_of(model).context
    context.weights = WEIGHTS
    batch = DataCollatorForSeq2Seq(load_tokenizer(str(folder / "backbone")))(rows)
    assert not batch["attention_mask"][:2].equal(batch["attention_mask"][2:])
    for i in (0, 2):
        loss = model(**{k: v[i : i + 2] for k, v in batch.items()}).loss + context.auxiliary_loss()
        (loss / 2).backward()
    assert distance(kept.gradients, gradients_of(model)) < 1e-5


def test_a_loss_without_a_forward_of_the_model_is_refused(folder: Path, ours: Any) -> None:
    _, rows = ours(1)

    class OfTheDecoder(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            return model.get_base_model().model(inputs["input_ids"]).last_hidden_state.sum()

    class LdMoleOfTheDecoder(AuxiliaryLosses, OfTheDecoder):
        pass

    trainer, _ = theirs(LdMoleOfTheDecoder, folder, rows, 1)
    with pytest.raises(RuntimeError, match="LdMoleOfTheDecoder computed its loss without calling the model"):
        trainer.train()


def test_reentrant_checkpointing_is_refused(folder: Path, ours: Any) -> None:
    _, rows = ours(1)
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant=True silently drops the gradient"):
        theirs("trainer", folder, rows, 1, **kwargs)


def test_spread_experts_are_refused(folder: Path, ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, rows = ours(1)
    monkeypatch.setattr(ExpertParallel, "size", property(lambda self: 2))
    with pytest.raises(ValueError, match="spread over 2 ranks"):
        theirs("trainer", folder, rows, 1)


def test_saved_and_resumed(folder: Path, ours: Any, tmp_path: Path) -> None:
    _, rows = ours(4)
    again: dict[str, Tensor] = {}
    for run in ("whole", "resumed"):
        trainer, _ = theirs("trainer", folder, rows, 1, max_steps=3, save_strategy="steps", save_steps=2)
        trainer.args.output_dir = str(tmp_path)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if run == "resumed" else None)
        trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert not again or all(trained[n].equal(value) for n, value in again.items())
        again = trained
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_adapter(
        load_backbone(str(folder / "backbone"), "causal_lm", "fp32"), str(tmp_path / "saved"), trainable=True
    )
    assert all(p.equal(again[n]) for n, p in saved.named_parameters() if p.requires_grad)
