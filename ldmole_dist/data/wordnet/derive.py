"""Derive the bundled word-category task from WordNet's noun file.

Each item asks for the category of a noun, given its dictionary definition. The output is reproducible byte for byte: items are
selected and ordered by a hash of their text, not by a random generator.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from ldmole_dist.io import atomic_write

# Lexicographer file number -> label, as numbered in WordNet's lexnames manual page.
LABELS = {
    "05": "animal",
    "08": "body",
    "13": "food",
    "15": "place",
    "17": "object",
    "18": "person",
    "20": "plant",
    "28": "time",
}
# A definition that names its own category gives the answer away.
NAMES = {
    "animal": "animals?",
    "body": "body|bodies",
    "food": "foods?",
    "place": "places?",
    "object": "objects?",
    "person": "persons?|people",
    "plant": "plants?",
    "time": "times?",
}
GIVEAWAYS = {label: re.compile(rf"\b({names})\b", re.IGNORECASE) for label, names in NAMES.items()}
# Definitions of slurs and obscenities are excluded.
UNWANTED = re.compile(
    r"\b(slurs?|offensive|obscene|derogatory|vulgar|disparag\w+|ethnic|sexual\w*|prostitut\w+)\b", re.I
)
# Offset, lexicographer file number, part of speech, words and pointers, then the gloss.
SYNSET = re.compile(r"\d{8} (\d\d) n .*? \| (.*)")
MIN_WORDS, MAX_WORDS = 4, 25
TRAIN_PER_LABEL, TEST_PER_LABEL = 500, 50


def stable_key(text: str) -> str:
    """Return a sort key that is the same in every process, unlike `hash`."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_definitions(data_noun: Path) -> dict[str, list[str]]:
    """Return the usable definitions of each label, in hash order."""
    labels_of: dict[str, list[str]] = defaultdict(list)
    with data_noun.open(encoding="utf-8") as lines:
        for line in lines:
            # The license at the top of the file does not match.
            synset = SYNSET.match(line)
            if synset is None or synset[1] not in LABELS:
                continue
            # Example sentences are quoted and come last.
            definition = " ".join(synset[2].partition('"')[0].split()).strip(" ;:,")
            labels_of[definition].append(LABELS[synset[1]])

    definitions: dict[str, list[str]] = {label: [] for label in LABELS.values()}
    for definition in sorted(labels_of, key=stable_key):
        # Skip definitions that several synsets share: they may have several labels, and would appear twice.
        if len(labels_of[definition]) > 1:
            continue
        label = labels_of[definition][0]
        if UNWANTED.search(definition):
            continue
        if MIN_WORDS <= len(definition.split()) <= MAX_WORDS and not GIVEAWAYS[label].search(definition):
            definitions[label].append(definition)
    return definitions


def interleave(definitions: dict[str, list[str]], start: int, stop: int) -> list[dict[str, str]]:
    """Return the rows of definitions `start` to `stop - 1` of each label.

    The rows are ordered in rounds, each with one row of every label. In any prefix of the list, the numbers of rows of two
    labels therefore differ by at most one.
    """
    rows = []
    for index in range(start, stop):
        labels = sorted(definitions, key=lambda label: stable_key(f"{label}: {definitions[label][index]}"))
        for label in labels:
            prompt = f"Definition: {definitions[label][index]}\nCategory:"
            rows.append({"prompt": prompt, "completion": f" {label}"})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as JSON lines."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    atomic_write(path, text)


def derive(data_noun: Path, out_dir: Path) -> None:
    """Write train.jsonl and test.jsonl to `out_dir`.

    Raises:
        OSError: if `data_noun` cannot be read or `out_dir` cannot be written.
        ValueError: if `data_noun` has too few usable definitions or is not UTF-8 text.
    """
    definitions = read_definitions(data_noun)
    smallest = min(definitions, key=lambda label: len(definitions[label]))
    usable = len(definitions[smallest])
    if usable <= TEST_PER_LABEL:
        raise ValueError(
            f"{data_noun} has {usable} usable definitions for '{smallest}', but more than {TEST_PER_LABEL} are needed; "
            "pass WordNet 3.0's data.noun."
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    stop = min(usable, TEST_PER_LABEL + TRAIN_PER_LABEL)
    write_rows(out_dir / "test.jsonl", interleave(definitions, 0, TEST_PER_LABEL))
    write_rows(out_dir / "train.jsonl", interleave(definitions, TEST_PER_LABEL, stop))


def main() -> None:
    """Parse the command line and call `derive`; on an error, print it and exit with code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m ldmole_dist.data.wordnet.derive",
        description="Derive train.jsonl and test.jsonl from WordNet 3.0's data.noun.",
    )
    parser.add_argument("data_noun", type=Path, metavar="DATA_NOUN", help="path of WordNet 3.0's data.noun")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to write train.jsonl and test.jsonl to")
    args = parser.parse_args()
    try:
        derive(args.data_noun, args.out_dir)
    except (OSError, ValueError) as error:
        sys.exit(f"derive: {error}")


if __name__ == "__main__":
    main()
