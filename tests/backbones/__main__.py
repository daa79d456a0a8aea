"""Write docs/models.md."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from tests.backbones.page import PAGE, page

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    (Path(__file__).parents[2] / PAGE).write_text(page())
