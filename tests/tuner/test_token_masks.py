"""Each adapted linear counts the tokens of its own mask: encoder's, decoder's, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ldmole_dist.method.context import LossWeights
from ldmole_dist.selftest.tiny import SIZES, tiny_backbone
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import tuner_of

TEXT: dict[str, Any] = dict(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
VISION = TEXT | dict(image_size=8, patch_size=4, projection_dim=16)  # 4 patches
IDS = torch.arange(6).repeat(2, 1) + 6
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])  # 9 of 12 tokens are real


def adapted(backbone: PreTrainedModel, target_modules: Any = "all-linear") -> PeftModel:
    config = LdMoleConfig(target_modules=target_modules, num_experts=4, r=2, lora_dropout=0.0, lambda_hidden=4)
    model = get_peft_model(backbone, config).train()
    tuner_of(model).context.weights = LossWeights(balance=0.5, sparsity=0.5, z=0.5)
    return model


def counted(model: PeftModel, **inputs: Tensor) -> dict[str, int]:
    """Run forward and backward, and return the number of tokens that each linear counted."""
    context = tuner_of(model).context
    output = model(**inputs)
    (output[0].mean() + context.auxiliary_loss()).backward()
    return {name: int(stats[2]) for name, stats in context.stats.items()}


def t5() -> PeftModel:
    return adapted(
        T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    )


@pytest.mark.parametrize("length", [3, 8])
def test_encoder_and_decoder_have_their_own_masks(length: int) -> None:
    decoder_ids = torch.ones(2, length, dtype=torch.long)
    decoder_mask = torch.ones_like(decoder_ids)
    decoder_mask[0, -1] = 0
    inputs = dict(input_ids=IDS, attention_mask=MASK, decoder_input_ids=decoder_ids)
    for mask, of_decoder in ((decoder_mask, 2 * length - 1), (None, 2 * length)):
        counts = counted(t5(), **inputs, decoder_attention_mask=mask)
        for name, count in counts.items():
            reads_encoder = name.startswith("encoder") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            assert count == (9 if reads_encoder else of_decoder), name
        assert len(counts) == 6 + 10


def test_encoder_decoder_generates_in_training_mode() -> None:
    model = t5()
    generated = model.generate(
        input_ids=IDS, attention_mask=MASK, min_new_tokens=9, max_new_tokens=9, decoder_start_token_id=0
    )
    assert generated.shape == (2, 10)


def test_pooler_and_classifier_count_sequences() -> None:
    model = adapted(BertForSequenceClassification(BertConfig(**TEXT, num_labels=3)))
    counts = counted(model, input_ids=IDS, attention_mask=MASK)
    assert {name for name, count in counts.items() if count == 2} == {"bert.pooler.dense", "classifier"}
    assert all(count in (2, 9) for count in counts.values())


def test_vision_tower_counts_patches() -> None:
    config = PaliGemmaConfig(
        text_config=dict(model_type="gemma", num_key_value_heads=1, head_dim=8, **TEXT),
        vision_config=dict(model_type="siglip_vision_model", **VISION),
        projection_dim=16,
        image_token_index=5,
    )
    model = adapted(PaliGemmaForConditionalGeneration(config), r".*layers.*((q|v|gate)_proj|fc1)")
    # As many text tokens as patches and images as texts, so that the text's mask would fit the patches.
    ids = torch.cat([torch.full((2, 4), 5), IDS[:, :1]], dim=1)[:, :5]
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    counts = counted(
        model, input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids), pixel_values=images
    )
    assert len(counts) == 6
    for name, count in counts.items():
        assert count == (8 if "vision_tower" in name else 9), name


def test_rows_with_more_dimensions_and_flattened_rows() -> None:
    config = DeepseekV3Config(
        **TEXT,
        num_key_value_heads=2,
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        first_k_dense_replace=0,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    )
    counts = counted(adapted(DeepseekV3ForCausalLM(config)), input_ids=IDS, attention_mask=MASK)
    assert any(name.endswith("kv_b_proj") for name in counts) and set(counts.values()) == {9}


def test_recomputation_after_another_forward_has_its_own_mask() -> None:
    """Preference losses run two forwards before one backward."""
    found = []
    for checkpointed in (False, True):
        model = adapted(tiny_backbone("llama", torch.float32, torch.device("cpu")))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        if checkpointed:
            model.gradient_checkpointing_enable()
        context = tuner_of(model).context
        losses = []
        for mask in (MASK, None):
            logits = model(input_ids=IDS, attention_mask=mask).logits
            losses.append(logits[:, 0].square().mean() + context.auxiliary_loss())
        sum(losses).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_mask_of_another_size_is_not_used() -> None:
    model = adapted(tiny_backbone("llama", torch.float32, torch.device("cpu")))
    context = tuner_of(model).context
    model(input_ids=IDS, attention_mask=MASK)
    model.base_model.model.model(
        input_ids=IDS[:1]
    )  # a call of an inner module, after the forward that the mask belongs to
    context.begin(MASK)
    linear = tuner_of(model).model.get_submodule("model.layers.0.self_attn.q_proj")
    linear(torch.randn(5, SIZES["hidden_size"]))
    assert int(context.stats[linear.name][2]) == 5
