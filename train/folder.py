"""The folder of a job: what lies where, and which job it belongs to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h1bjax.json_file import read_json_object
from h1bjax.whole_file import replace_text


@dataclass(frozen=True)
class JobFolder:
    """Where a job keeps what it makes."""

    path: Path

    @property
    def record(self) -> Path:
        """The settings of the job that the folder belongs to."""
        return self.path / "job.json"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """See `train.log`."""
        return self.path / "log.csv"

    @property
    def curve(self) -> Path:
        """See `train.curve`."""
        return self.path / "loss.png"

    @property
    def model(self) -> Path:
        """The trained model, which is there when training has ended."""
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        """How well the trained model predicts the validation text."""
        return self.path / "evaluation.json"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Checks that a job may write here.

        Args:
            settings: what makes the job what it is, in types that JSON has.

        Raises:
            ValueError: the folder is a file, has other content, or belongs to another job.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; give a folder")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not self.record.is_file():
            raise ValueError(
                f"{self.path} is not empty and holds no training job, and nothing is overwritten; "
                "give a new or empty folder"
            )
        theirs = read_json_object(self.record)
        different = [
            f"{name} is {_short(theirs.get(name))} there, {_short(settings.get(name))} here"
            for name in sorted({*theirs, *settings})
            if theirs.get(name) != settings.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.path} holds another training job, and nothing is overwritten; give another "
                f"folder, or the same settings to continue it: {'; '.join(different)}"
            )

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder this job's, unless it already is.

        Raises:
            ValueError: see `check`.
        """
        self.check(settings)
        if self.record.is_file():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # A folder never belongs to half a record.
        replace_text(self.record, json.dumps(settings, indent=2) + "\n")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
