"""Sentences of four domains with human sentiment ratings: the data that VADER was validated on.

Source: Hutto and Gilbert, ICWSM 2014; additional_resources/hutto_ICWSM_2014.tar.gz in the source distribution of
vaderSentiment 3.3.2. The archive is not part of this package; download it:

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2

Each rating is the mean of twenty human ratings, from -4 (extremely negative) to 4 (extremely positive).
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import NamedTuple

from ldmole_dist.errors import UserError

# Domain -> (file name, number of rows).
DOMAINS = {
    "tweets": ("tweets_GroundTruth.txt", 4200),
    "movies": ("movieReviewSnippets_GroundTruth.txt", 10605),
    "products": ("amazonReviewSnippets_GroundTruth.txt", 3708),
    "editorials": ("nytEditorialSnippets_GroundTruth.txt", 5190),
}
THRESHOLD = 0.5  # sentences with a smaller absolute mean rating are neutral
LABELS = [" positive", " negative", " neutral"]
TEST_EVERY = 5  # about one document in TEST_EVERY is in the test split
_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"


class Sentence(NamedTuple):
    """One rated sentence.

    Args:
        domain: one of `DOMAINS`.
        document: number of the document that contains the sentence; all its sentences are in the same split.
        rating: mean rating, -4 to 4.
        text: the sentence.
    """

    domain: str
    document: str
    rating: float
    text: str

    @property
    def label(self) -> str:
        """Sentiment label, one of `LABELS`."""
        if abs(self.rating) < THRESHOLD:
            return " neutral"
        return " positive" if self.rating > 0 else " negative"

    @property
    def for_testing(self) -> bool:
        """Whether the sentence is in the test split; a hash of domain and document decides, so the split never changes."""
        digest = hashlib.sha256(f"{self.domain} {self.document}".encode()).digest()
        return int.from_bytes(digest[:4]) % TEST_EVERY == 0

    def row(self) -> dict[str, str]:
        """Return a record in the `prompt_completion` format."""
        return {"prompt": f"Text: {self.text}\nSentiment:", "completion": self.label, "domain": self.domain}


def read_vader(archive: str) -> list[Sentence]:
    """Return all rated sentences, domain by domain.

    Args:
        archive: path of vaderSentiment-3.3.2.tar.gz.

    Raises:
        UserError: if the file cannot be read or is not that archive.
    """
    path = Path(archive)
    remedy = "download the archive with `pip download --no-deps --no-binary :all: vaderSentiment==3.3.2`."
    sentences = []
    try:
        with tarfile.open(path) as outer:
            member = next((name for name in outer.getnames() if name.endswith(_INNER)), None)
            inner_file = None if member is None else outer.extractfile(member)
            if inner_file is None:
                raise UserError(f"{path} is not the archive of vaderSentiment 3.3.2: {_INNER} is missing; {remedy}")
            with tarfile.open(fileobj=io.BytesIO(inner_file.read())) as inner:
                for domain, (name, rows) in DOMAINS.items():
                    file = inner.extractfile(f"hutto_ICWSM_2014/{name}")
                    assert (
                        file is not None
                    )  # extractfile returns None for a directory; a missing member raises KeyError
                    found = [_parse(line, domain, name) for line in file.read().decode().splitlines() if line.strip()]
                    if len(found) != rows:
                        raise UserError(f"{path}: {name} has {len(found)} rows instead of {rows}; {remedy}")
                    sentences += found
    except (OSError, EOFError, tarfile.TarError, KeyError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error  # str(error) of an OSError repeats the path
        raise UserError(f"cannot read {path} as the archive of vaderSentiment 3.3.2 ({reason}); {remedy}") from error
    return sentences


def _parse(line: str, domain: str, name: str) -> Sentence:
    try:
        number, rating, text = line.split("\t")
        return Sentence(domain, number.partition("_")[0], float(rating), text.strip())
    except ValueError as error:
        raise UserError(
            f"{name}: cannot parse {line!r:.80} as three tab-separated fields (number, numeric rating, text); download the "
            "archive again."
        ) from error
