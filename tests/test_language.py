"""Phrases that readers have stumbled over stay out of code, tests and documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["ldmole_dist", "tests", "docs", "launch", "examples", "ds_configs", ".ci"]
SUFFIXES = {".py", ".md", ".sh", ".yaml", ".sbatch", ".html", ".css", ".toml", ""}
# Phrase -> what to write instead.
REPLACED = {
    r"(?:go|goes|going|gone|went) on\b": "resume, continue",
    r"anew": "fresh, again",
    r"of before": "previous, earlier",
    r"whole checkpoint": "complete checkpoint",
    r"(?:is|are|was|were) no numbers?": "non-finite, NaN or infinite",
    r"is no multiple": "is not a multiple",
    r"names? no module": "matches no module",
    r"stretch(?:es)?": "flat range, shard",
    r"parcels?": "payload, message",
    r"under way": "in flight, running",
    r"travel(?:s|led|ling)?": "is sent",
    r"lent": "sent to a peer",
    r"(?:told|tell|tells) apart|(?:cannot|can't) be told": "distinguished, cannot be determined",
    r"so many|so often|as often as": "N, at most N times, once per",
    r"asked to end|saved on request": "stop requested",
    r"nobody|somebody|whoever": "no rank, any caller",
    r"let the backbone speak": "generate without the adapter",
    r"accept an installation": "verify an installation",
}
PATTERN = re.compile("|".join(rf"\b(?:{phrase})\b" for phrase in REPLACED), re.IGNORECASE)


def files() -> Iterator[Path]:
    """Every file that people write, without recorded data."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*.py"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*"))]:
        recorded = {"wordnet", "compatibility", "fixtures", "golden", "__pycache__"} & set(path.parts)
        if path.is_file() and path.suffix in SUFFIXES and not recorded and path != Path(__file__):
            yield path


def replaced_phrases(text: str) -> list[str]:
    """The phrases of `text` that have a plain replacement, also across a line break."""
    return [match.group() for match in PATTERN.finditer(re.sub(r"\s*\n[\s#]*", " ", text))]


def test_no_file_uses_a_replaced_phrase() -> None:
    found = {
        str(path.relative_to(ROOT)): phrases for path in files() if (phrases := replaced_phrases(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The run goes on from its checkpoint.", 1),
        ("a loss that is\n    # no number", 1),
        ("Two runs cannot\nbe told apart by so many seeds.", 2),
        ("Resume from the latest complete checkpoint.", 0),
        ("Depends on ongoing transfers.", 0),
    ],
)
def test_phrases_are_found_across_lines(text: str, count: int) -> None:
    assert len(replaced_phrases(text)) == count
