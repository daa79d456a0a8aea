"""Write the data of the comparison: WordNet definitions as one domain, and VADER's rated sentences as four domains."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path

from ldmole_dist.data.vader import DOMAINS, LABELS, read_vader
from ldmole_dist.io import atomic_write, write_errors

WORDNET_LABELS = [" animal", " plant", " food", " person", " object", " body", " place", " time"]
ALL_LABELS = [*WORDNET_LABELS, *LABELS]
TRAIN = {"wordnet": 480, "vader": 200}  # training rows: of WordNet, and of each of VADER's domains
TEST = 80  # test rows of each domain


def write_data(archive: str, folder: Path) -> tuple[Path, Path]:
    """Write train.jsonl and test.jsonl. The rows are drawn with a fixed seed.

    Args:
        archive: path of vaderSentiment-3.3.2.tar.gz (`data.vader`).
        folder: output folder; created if it does not exist.

    Returns:
        The paths of train.jsonl and test.jsonl.

    Raises:
        UserError: if the archive cannot be read or is not vaderSentiment-3.3.2, or the folder cannot be written to.
    """
    draw = random.Random(0)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for split, number in (("train", TRAIN["wordnet"]), ("test", TEST)):
        text = files("ldmole_dist.data.wordnet").joinpath(f"{split}.jsonl").read_text(encoding="utf-8")
        drawn = draw.sample(text.splitlines(), number)
        rows[split] += [json.loads(line) | {"domain": "wordnet"} for line in drawn]
    sentences = read_vader(archive)
    for domain in DOMAINS:
        for split, number in (("train", TRAIN["vader"]), ("test", TEST)):
            candidates = [s for s in sentences if s.domain == domain and s.for_testing == (split == "test")]
            rows[split] += [sentence.row() for sentence in draw.sample(candidates, number)]
    with write_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        for split, chosen in rows.items():
            atomic_write(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in chosen))
    return folder / "train.jsonl", folder / "test.jsonl"
