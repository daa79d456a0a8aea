"""What all tiny random models have in common: their sizes, and the batches that they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, HIDDEN, FEED_FORWARD, LAYERS, HEADS, HEAD_SIZE, POSITIONS, EXPERTS = 64, 32, 48, 2, 4, 8, 64, 4
B, S, S_DECODER = 3, 9, 7  # sequences, positions, and positions of a decoder that reads an encoder
PAD, BOS, EOS, IMAGE, VIDEO, START, END, AUDIO, WORD = range(9)  # token ids; those of words start at WORD

# The value of each field that has one of these names in a config class. transformers has several names for each size.
_NAMES: list[tuple[str, Any]] = [
    ("vocab_size vocab_size_per_layer_input", VOCABULARY),
    ("hidden_size n_embd d_model dim embedding_size projection_dim out_hidden_size embed_dim lru_width", HIDDEN),
    ("intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim ffn_hidden_size", FEED_FORWARD),
    ("intermediate_size_mlp shared_intermediate_size", FEED_FORWARD),
    ("num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers depth", LAYERS),
    ("num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads", HEADS),
    ("mamba_n_heads n_mamba_heads mamba_num_heads", HEADS),
    ("num_key_value_heads num_kv_heads linear_num_key_heads linear_num_value_heads index_n_heads", HEADS // 2),
    ("head_dim d_kv kv_channels qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim", HEAD_SIZE),
    ("linear_head_dim index_head_dim", HEAD_SIZE),
    ("linear_num_heads num_mel_bins", HEADS),
    ("qk_rope_head_dim rotary_dim", HEAD_SIZE // 2),
    ("moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size", 16),
    ("mamba_head_dim mamba_d_head hidden_size_per_layer_input classifier_proj_size", 16),
    ("kv_lora_rank q_lora_rank o_lora_rank laurel_rank", 16),
    ("state_size mamba_d_state ssm_state_size chunk_size mamba_chunk_size index_topk", 8),
    ("max_position_embeddings n_positions max_seq_len context_length max_target_positions", POSITIONS),
    ("num_experts num_local_experts n_routed_experts moe_num_experts", EXPERTS),
    ("num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts", 2),
    ("n_group topk_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace num_dense_layers", 1),
    ("num_kv_shared_layers num_nextn_predict_layers num_mtp_layers", 0),
    ("pad_token_id", PAD),
    ("bos_token_id", BOS),
    ("eos_token_id sep_token_id forced_eos_token_id", EOS),
    ("apply_spec_augment use_mamba_kernels", False),
]
_SIZES = {name: value for names, value in _NAMES for name in names.split()}


def config(model_type: str, **changes: Any) -> PretrainedConfig:
    """Return a tiny config: the sizes of this module where the class has such a field, no dropout, and `changes`."""
    kind = CONFIG_MAPPING[model_type]
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    tiny = {name: value for name, value in _SIZES.items() if name in fields}
    noise = {name: 0.0 for name, default in fields.items() if _is_noise(name) and isinstance(default, float)}
    return kind(**(tiny | noise | changes))


def _is_noise(name: str) -> bool:
    return "drop" in name or "jitter" in name


Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """One architecture: how to make its tiny random model, and what the model reads.

    Attributes:
        auto: transformers' auto class of the model.
        settings: returns the model's config.
        batch: returns the inputs of a training forward, with padding on the right and labels.
        prompt: returns the inputs of `generate`, without padding; None if the model does not generate.
        task: PEFT's task type; None if it has none for such a model.
        exclude: linears that cannot be adapted, LoRA included: `exclude_modules` of the adapter's config.
    """

    auto: Any
    settings: Callable[[], PretrainedConfig]
    batch: Callable[[], Batch]
    prompt: Callable[[], Batch] | None = None
    task: str | None = None
    exclude: list[str] | None = None

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Return the model, with eager attention and the same weights at every call."""
        torch.manual_seed(3)
        model: PreTrainedModel = self.auto.from_config(self.settings(), attn_implementation="eager", dtype=dtype)
        return model.eval()


def tokens(length: int = S, padding: int = 3, seed: int = 5) -> Batch:
    """Return `input_ids` and an `attention_mask`, with `padding` positions of padding in the second sequence."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORD, VOCABULARY, (B, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, -padding:] = 0
    return dict(input_ids=ids.masked_fill(mask == 0, PAD), attention_mask=mask)


def text() -> Batch:
    """Return tokens and, as labels, the same tokens."""
    batch = tokens()
    return batch | dict(labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))


def prompt() -> Batch:
    """Return one sequence without padding."""
    return {name: value[:1] for name, value in tokens().items()}


def values(*shape: int) -> Tensor:
    """Return random numbers, such as pixels."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))
