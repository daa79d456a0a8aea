"""The model card of a saved adapter: what it is, how to load it, and the paper."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

CARD_NAME = "README.md"
TAGS = ("ldmole_dist", "ld-mole", "mixture-of-experts", "peft")
HEADING = "## LD-MoLE adapter"
TEXT = f"""{HEADING}

A mixture of LoRA experts in each adapted linear, routed by Sparsegen with a learned sparsity for each token. To load it,
install `ldmole-dist` and import it beside PEFT:

```python
import ldmole_dist  # registers the method LDMOLE with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "<this repository or folder>")
```

Paper: [LD-MoLE: Learnable Dynamic Routing for Mixture of LoRA Experts](https://arxiv.org/abs/2509.25684), ICLR 2026.
"""


def complete_card(card_path: Path) -> None:
    """Add tags, the lines that load the adapter, and the paper to a model card of PEFT; a card that has them is kept."""
    card = ModelCard.load(card_path)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *TAGS})
    if HEADING not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{TEXT}".lstrip()
    card.save(card_path)
