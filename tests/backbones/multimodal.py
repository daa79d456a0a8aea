"""Tiny models that read images or sound, most of them beside text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import (
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
)

from tests.backbones.media import (
    IMAGE_TOKENS,
    PATCH,
    SIDE,
    first,
    first_patches,
    image_text,
    patches,
    pixels,
    positioned_patches,
    several_images,
    sized_images,
    spectrogram,
    waveform,
    with_token_types,
)
from tests.backbones.sizes import (
    AUDIO,
    BOS,
    END,
    HEAD_SIZE,
    HIDDEN,
    IMAGE,
    PAD,
    POSITIONS,
    START,
    VIDEO,
    Architecture,
    Batch,
    config,
    prompt,
    text,
)

WIDE = 2 * PATCH  # patch side of a tower that does not merge patches
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])  # of HEAD_SIZE / 2 frequencies
QWEN_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
QWEN_VISION = dict(patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2)


def _tower(model_type: str, **changes: Any) -> Any:
    return config(model_type, image_size=SIDE, **(dict(patch_size=PATCH) | changes))


# Config and batch of each architecture that reads images beside text.
_IMAGE_TEXT: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], Batch]]] = {
    "gemma3-mm": (
        lambda: dict(
            model_type="gemma3",
            text_config=config("gemma3_text"),
            vision_config=_tower("siglip_vision_model", vision_use_head=False),
            mm_tokens_per_image=IMAGE_TOKENS,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        ),
        with_token_types,
    ),
    "gemma4-mm": (
        lambda: dict(
            model_type="gemma4",
            text_config=config("gemma4_text", global_head_dim=HEAD_SIZE),
            vision_config=config("gemma4_vision", patch_size=PATCH, pooling_kernel_size=2, position_embedding_size=64),
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            boi_token_id=START,
            eoi_token_id=END,
        ),
        positioned_patches,
    ),
    "idefics3": (
        lambda: dict(
            text_config=config("llama"),
            vision_config=_tower("idefics3_vision"),
            scale_factor=2,
            image_token_id=IMAGE,
            pad_token_id=PAD,
        ),
        several_images,
    ),
    "internvl": (
        lambda: dict(
            text_config=config("qwen2"),
            vision_config=_tower("internvl_vision"),
            image_seq_length=IMAGE_TOKENS,
            image_token_id=IMAGE,
        ),
        image_text,
    ),
    "llava": (
        lambda: dict(
            text_config=config("llama"),
            vision_config=_tower("clip_vision_model", patch_size=WIDE),
            image_seq_length=IMAGE_TOKENS,
            image_token_index=IMAGE,
        ),
        image_text,
    ),
    "mistral3": (
        lambda: dict(
            text_config=config("mistral"),
            vision_config=_tower("pixtral"),
            spatial_merge_size=2,
            image_token_index=IMAGE,
        ),
        sized_images,
    ),
    "paligemma": (
        lambda: dict(
            text_config=config("gemma"),
            vision_config=_tower("siglip_vision_model", patch_size=WIDE, vision_use_head=False),
            image_token_index=IMAGE,
        ),
        with_token_types,
    ),
    "qwen2_vl": (
        lambda: dict(
            text_config=config("qwen2_vl_text", rope_parameters=MROPE),
            vision_config=config("qwen2_vl_vision", **QWEN_VISION),
            **QWEN_IDS,
        ),
        patches,
    ),
    "qwen2_5_vl": (
        lambda: dict(
            text_config=config("qwen2_5_vl_text", rope_parameters=MROPE),
            vision_config=config("qwen2_5_vl_vision", window_size=2 * WIDE, fullatt_block_indexes=[1], **QWEN_VISION),
            **QWEN_IDS,
        ),
        patches,
    ),
    "qwen3_vl": (
        lambda: dict(
            text_config=config("qwen3_vl_text", rope_parameters=MROPE),
            vision_config=config(
                "qwen3_vl_vision", deepstack_visual_indexes=[0], num_position_embeddings=16, **QWEN_VISION
            ),
            **QWEN_IDS,
        ),
        patches,
    ),
    "qwen3_5-mm": (
        lambda: dict(
            model_type="qwen3_5",
            text_config=config("qwen3_5_text", layer_types=["linear_attention", "full_attention"]),
            vision_config=config("qwen3_5_vision", num_position_embeddings=16, **QWEN_VISION),
            **QWEN_IDS,
        ),
        patches,
    ),
    "smolvlm": (
        lambda: dict(
            text_config=config("llama"),
            vision_config=_tower("smolvlm_vision"),
            scale_factor=2,
            image_token_id=IMAGE,
            pad_token_id=PAD,
        ),
        several_images,
    ),
}
# Models that read images or sound, of which only the text part runs here.
_TEXT_ONLY: dict[str, Callable[[], dict[str, Any]]] = {
    "phi4_multimodal": lambda: dict(
        vision_config=_tower("phi4_multimodal_vision", crop_size=SIDE, image_token_id=IMAGE),
        audio_config=config(
            "phi4_multimodal_audio",
            num_blocks=2,
            ext_pw_out_channel=HIDDEN,
            depthwise_separable_out_channel=HIDDEN,
            nemo_conv_channels=HIDDEN,
            audio_token_id=AUDIO,
        ),
    ),
    "qwen2_audio-textonly": lambda: dict(
        model_type="qwen2_audio",
        text_config=config("qwen2"),
        audio_config=config("qwen2_audio_encoder"),
        audio_token_index=AUDIO,
    ),
}


def _settings(name: str, changes: Callable[[], dict[str, Any]]) -> Any:
    return config(**({"model_type": name} | changes()))


def architectures() -> dict[str, Architecture]:
    """Return every architecture that reads images or sound by its name."""
    found = {}
    for name, (settings, batch) in _IMAGE_TEXT.items():
        made = partial(_settings, name, settings)
        read = first_patches if batch is patches else partial(first, batch)
        found[name] = Architecture(AutoModelForImageTextToText, made, batch, read, "CAUSAL_LM")
    for name, settings in _TEXT_ONLY.items():
        made = partial(_settings, name, settings)
        # torch's MultiheadAttention takes the weight of its out_proj.
        exclude = ["head.attention.out_proj"] if name == "phi4_multimodal" else None
        found[name] = Architecture(AutoModelForMultimodalLM, made, text, prompt, "CAUSAL_LM", exclude)
    vit = partial(config, "vit", image_size=SIDE, patch_size=PATCH)
    found["vit"] = Architecture(AutoModelForImageClassification, vit, pixels)
    wav2vec2 = partial(
        config,
        "wav2vec2",
        conv_dim=[HIDDEN, HIDDEN],
        conv_kernel=[4, 3],
        conv_stride=[4, 2],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    found["wav2vec2-ctc"] = Architecture(AutoModelForCTC, wav2vec2, waveform)
    whisper = partial(config, "whisper", max_source_positions=POSITIONS, decoder_start_token_id=BOS)
    found["whisper"] = Architecture(AutoModelForSpeechSeq2Seq, whisper, spectrogram, partial(first, spectrogram))
    return found
