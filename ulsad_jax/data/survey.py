"""What is noticed of a category's files while they are read.

A survey is taken once, while the data set is prepared, and kept with it: what the
files contain, by a digest, and what a person should know of them, in remarks that
every run repeats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SHOWN = 3  # file names in a remark


@dataclasses.dataclass
class Survey:
    """Contents and peculiarities of the files read so far.

    Attributes:
        digests: "<split>/<name>" of an image to the SHA-256 of its file and its masks.
        noticed: a peculiarity to the files that have it.
    """

    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    noticed: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, image: str, contents: Iterable[bytes]) -> None:
        """Records what the files of one image contain.

        Args:
            image: "<split>/<name>", unique within the category.
            contents: bytes of the image's file, then of its masks' files.
        """
        digest = hashlib.sha256()
        for content in contents:
            digest.update(hashlib.sha256(content).digest())
        self.digests[image] = digest.hexdigest()

    def notice(self, peculiarity: str, path: Path) -> None:
        """Records that a file has a peculiarity.

        Args:
            peculiarity: a clause that follows "<n> files", the same text for all files
                that have it, such as "have no pixel that is not 0".
            path: the file.
        """
        self.noticed.setdefault(peculiarity, []).append(str(path))

    @property
    def remarks(self) -> list[str]:
        """One sentence for each peculiarity, with the first files that have it."""
        return [remark(text, paths) for text, paths in self.noticed.items()]

    def to_json(self) -> str:
        """Returns the survey as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Survey:
        """Returns the survey that `to_json` wrote.

        Raises:
            ValueError: the text is something else.
        """
        document: dict[str, Any] = json.loads(text)
        return cls(document["digests"], document["noticed"])


def remark(peculiarity: str, paths: Sequence[str | Path]) -> str:
    """Returns "<n> files <peculiarity>: <first names> and <m> more"."""
    count = len(paths)
    shown = ", ".join(str(path) for path in paths[:SHOWN])
    more = f" and {count - SHOWN} more" if count > SHOWN else ""
    return f"{count} file{'s' * (count != 1)} {peculiarity}: {shown}{more}"
