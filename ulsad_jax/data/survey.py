"""The survey of a category's files, taken while they are read.

A survey is taken once, when the data set is prepared, and stored with it. It holds
digests of the files' contents, and remarks for the user that every run repeats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ulsad_jax.data.pixels import guess_level

SHOWN = 3  # number of file names in a remark
DARK = 4096  # 16-bit images with all values below this are reported


@dataclasses.dataclass
class Survey:
    """Contents and peculiarities of the files read so far.

    Attributes:
        digests: SHA-256 of an image's file and its masks, by "<split>/<name>".
        noticed: paths of the files that have a peculiarity, by peculiarity.
        brightest: largest value of each file with 16 bits per channel that was read
            without a white level, by path.
    """

    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    noticed: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    brightest: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, image: str, contents: Iterable[bytes]) -> None:
        """Adds the digest of one image's files.

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
            peculiarity: clause that follows "<n> files", the same for all files that
                have it, such as "have no pixel that is not 0".
            path: path of the file.
        """
        self.noticed.setdefault(peculiarity, []).append(str(path))

    def notice_depth(self, path: Path, brightest: float, white_level: float) -> None:
        """Records a file with more than 8 bits per channel.

        Args:
            path: path of the file.
            brightest: largest value in the file.
            white_level: white level with which the file was read; 0 if there is none.
        """
        if not white_level:
            self.brightest[str(path)] = brightest
        elif brightest > white_level:
            self.notice(
                "have values above config.dataset.white_level, which are white, too",
                path,
            )

    def contents(self, *splits: str) -> dict[str, str]:
        """Returns the digests of the images of some splits."""
        return {k: v for k, v in self.digests.items() if k.split("/")[0] in splits}

    @property
    def remarks(self) -> list[str]:
        """Remarks, one sentence per peculiarity, with the first files that have it."""
        noticed = self.noticed | self._notice_dark()
        return [remark(text, paths) for text, paths in noticed.items()]

    def _notice_dark(self) -> dict[str, list[str]]:
        """Returns a peculiarity of all 16-bit files if none uses more than 12 bits.

        Such files usually come from a camera.
        """
        brightest = max(self.brightest.values(), default=DARK)
        if brightest >= DARK:
            return {}
        level = f"{max(255, guess_level(brightest)):g}"
        text = (
            f"have 16 bits a channel, but no value above {level}: if {level} is white, "
            f"set --config.dataset.white_level={level}"
        )
        return {text: list(self.brightest)}

    def to_json(self) -> str:
        """Returns the survey as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Survey:
        """Returns the survey that `to_json` wrote.

        Raises:
            ValueError: the text is not JSON.
        """
        document: dict[str, Any] = json.loads(text)
        return cls(**document)


def remark(peculiarity: str, paths: Sequence[str | Path]) -> str:
    """Returns "<n> files <peculiarity>: <first names> and <m> more"."""
    files = "file" if len(paths) == 1 else "files"
    return f"{len(paths)} {files} {peculiarity}: {_shorten(paths)}"


def describe_changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Describes how images differ from earlier ones; "" if they are the same.

    Args:
        before: earlier digests, by "<split>/<name>".
        after: current digests, by "<split>/<name>".
    """
    changes = {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "with other content": sorted(
            k for k in before.keys() & after.keys() if before[k] != after[k]
        ),
    }
    return "; ".join(
        f"{len(names)} {what} ({_shorten(names)})"
        for what, names in changes.items()
        if names
    )


def digest(contents: Mapping[str, str]) -> str:
    """Returns one SHA-256 of the digests of many images, independent of their order."""
    return hashlib.sha256(json.dumps(sorted(contents.items())).encode()).hexdigest()


def _shorten(names: Sequence[str | Path]) -> str:
    count = len(names) - SHOWN
    shown = ", ".join(str(name) for name in names[:SHOWN])
    return f"{shown} and {count} more" if count > 0 else shown
