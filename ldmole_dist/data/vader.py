"""Sentences of four domains with the sentiment that people heard in them: the ratings that VADER was validated on.

Source: Hutto and Gilbert, ICWSM 2014; the archive additional_resources/hutto_ICWSM_2014.tar.gz of the source distribution of
vaderSentiment 3.3.2, which is read where it lies and is no part of this software:

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2

Every sentence has the mean of twenty ratings from -4 (extremely negative) to 4.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import NamedTuple

from ldmole_dist.errors import UserError

# Domain -> (file, rows in it).
DOMAINS = {
    "tweets": ("tweets_GroundTruth.txt", 4200),
    "movies": ("movieReviewSnippets_GroundTruth.txt", 10605),
    "products": ("amazonReviewSnippets_GroundTruth.txt", 3708),
    "editorials": ("nytEditorialSnippets_GroundTruth.txt", 5190),
}
THRESHOLD = 0.5  # of the mean rating, beyond which a sentence is positive or negative
LABELS = [" positive", " negative", " neutral"]
TEST_SHARE = 5  # one document in so many is for testing
_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"


class Sentence(NamedTuple):
    """One rated sentence.

    Args:
        domain: one of `DOMAINS`.
        document: that it is from; sentences of one document are all for training or all for testing.
        rating: -4 to 4.
        text: as it was rated.
    """

    domain: str
    document: str
    rating: float
    text: str

    @property
    def label(self) -> str:
        """One of `LABELS`."""
        if abs(self.rating) < THRESHOLD:
            return " neutral"
        return " positive" if self.rating > 0 else " negative"

    @property
    def for_testing(self) -> bool:
        """By a hash of the document, so that it never changes."""
        digest = hashlib.sha256(f"{self.domain} {self.document}".encode()).digest()
        return int.from_bytes(digest[:4]) % TEST_SHARE == 0

    def row(self) -> dict[str, str]:
        """As `data.rows` reads it."""
        return {"prompt": f"Text: {self.text}\nSentiment:", "completion": self.label, "domain": self.domain}


def read_vader(archive: str) -> list[Sentence]:
    """All rated sentences, domain by domain.

    Args:
        archive: path of vaderSentiment-3.3.2.tar.gz.

    Raises:
        UserError: where it is not that archive.
    """
    path = Path(archive)
    remedy = "get it by: pip download --no-deps --no-binary :all: vaderSentiment==3.3.2"
    sentences = []
    try:
        with tarfile.open(path) as outer:
            member = next((name for name in outer.getnames() if name.endswith(_INNER)), None)
            inner_file = None if member is None else outer.extractfile(member)
            if inner_file is None:
                raise UserError(f"{path} does not hold {_INNER}, so it is not vaderSentiment 3.3.2; {remedy}")
            with tarfile.open(fileobj=io.BytesIO(inner_file.read())) as inner:
                for domain, (name, rows) in DOMAINS.items():
                    file = inner.extractfile(f"hutto_ICWSM_2014/{name}")
                    assert file is not None  # it would have raised KeyError
                    found = [_parse(line, domain, name) for line in file.read().decode().splitlines() if line.strip()]
                    if len(found) != rows:
                        raise UserError(f"{path}: {name} has {len(found)} rows instead of {rows}; {remedy}")
                    sentences += found
    except (OSError, tarfile.TarError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as vaderSentiment 3.3.2 ({error}); {remedy}") from error
    return sentences


def _parse(line: str, domain: str, name: str) -> Sentence:
    try:
        number, rating, text = line.split("\t")
        return Sentence(domain, number.partition("_")[0], float(rating), text.strip())
    except ValueError as error:
        raise UserError(f"{name}: {line!r:.80} is not number, rating and text with tabs between") from error
