"""Every error Warren raises on purpose.

WarrenError
├── UserError       the person who runs Warren can fix it: exit code 2
├── StageFailed     a stage could not account for or finish all of its work: exit code 1
└── PartDamaged     a finished file is missing, cut or changed: found by a re-read, exit code 1
"""

from __future__ import annotations


class WarrenError(Exception):
    """Base of every error raised on purpose."""


class UserError(WarrenError):
    """Says what is wrong, why it is wrong and how to mend it, in three sentences."""

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        """Return the sentences that are there, one a line."""
        labelled = (("", self.what), ("why: ", self.why), ("fix: ", self.fix))
        return "\n".join(label + text for label, text in labelled if text)


class StageFailed(WarrenError):
    """A stage has failed items, lost rows or too many quarantined rows; it is not recorded."""


class PartDamaged(WarrenError):
    """A finished output does not have the size or digest that its marker recorded."""
