"""Batches of images and sound. Their sizes are those that the tiny configs of `multimodal` have.

Every image becomes IMAGE_TOKENS tokens of a sequence; most vision towers read four times as many patches, so that their rows
are not the tokens of the text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.backbones.sizes import END, IMAGE, POSITIONS, S_DECODER, START, B, Batch, tokens, values

IMAGE_TOKENS, PATCH, SIDE = 4, 4, 16  # tokens per image, pixels of a patch's side and of an image's
LENGTH = 13


def image_text() -> Batch:
    """Return sequences that begin with an image, in the layout of most models, and labels."""
    batch = tokens(LENGTH)
    batch["input_ids"][:, 0] = START
    batch["input_ids"][:, 1 : 1 + IMAGE_TOKENS] = IMAGE
    batch["input_ids"][:, 1 + IMAGE_TOKENS] = END
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE)
    batch["labels"] = batch["input_ids"].masked_fill(hidden, -100)
    return batch | dict(pixel_values=values(B, 3, SIDE, SIDE))


def with_token_types() -> Batch:
    """As `image_text`, and `token_type_ids`, which are 1 for image tokens."""
    batch = image_text()
    return batch | dict(token_type_ids=(batch["input_ids"] == IMAGE).long())


def several_images() -> Batch:
    """As `image_text`, with a dimension for the images of a sequence."""
    batch = image_text()
    return batch | dict(pixel_values=batch["pixel_values"].unsqueeze(1))


def sized_images() -> Batch:
    """As `image_text`, with the size of each image."""
    return image_text() | dict(image_sizes=torch.full((B, 2), SIDE))


def patches() -> Batch:
    """As `image_text`, with flattened patches of two frames, as Qwen's vision towers read them."""
    batch, side = image_text(), SIDE // PATCH
    return batch | dict(
        pixel_values=values(B * side * side, 3 * 2 * PATCH * PATCH),
        image_grid_thw=torch.tensor([[1, side, side]] * B),
        mm_token_type_ids=(batch["input_ids"] == IMAGE).int(),
    )


def positioned_patches() -> Batch:
    """As `image_text`, with flattened patches and their coordinates, as Gemma 4's vision tower reads them."""
    batch, side = image_text(), SIDE // PATCH
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(B, -1, -1)
    return batch | dict(
        pixel_values=values(B, side * side, 3 * PATCH * PATCH),
        image_position_ids=at,
        mm_token_type_ids=(batch["input_ids"] == IMAGE).long(),
    )


def pixels() -> Batch:
    """Return images and one label per image."""
    return dict(pixel_values=values(B, 3, SIDE, SIDE), labels=torch.arange(B) % 2)


def waveform() -> Batch:
    """Return the samples of sounds, of which the second is shorter, and their transcripts."""
    mask = torch.ones(B, 120, dtype=torch.long)
    mask[1, 90:] = 0
    transcript = tokens(4)
    return dict(input_values=values(B, 120) * mask, attention_mask=mask, labels=transcript["input_ids"])


def spectrogram() -> Batch:
    """Return the features of sounds and the tokens of their transcripts, padded, which are also the labels."""
    transcript = tokens(S_DECODER, padding=2)
    return dict(
        input_features=values(B, 4, 2 * POSITIONS),
        decoder_input_ids=transcript["input_ids"],
        decoder_attention_mask=transcript["attention_mask"],
        labels=transcript["input_ids"].masked_fill(transcript["attention_mask"] == 0, -100),
    )


def first(batch: Callable[[], Batch]) -> Batch:
    """Return the first sequence of a batch, without what `generate` does not read."""
    return {n: v[:1] for n, v in batch().items() if n != "labels" and not n.startswith("decoder_")}


def first_patches() -> Batch:
    """As `first` of `patches`, which has the patches of all images in one dimension."""
    batch = first(patches)
    return batch | dict(pixel_values=patches()["pixel_values"][: batch["image_grid_thw"].prod()])
