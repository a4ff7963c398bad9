"""Every error tombola raises on purpose: what, got, expected, next.

    TombolaError
    ├── SettingsError       a setting is wrong; carries all wrong settings at once
    ├── AnatomyError        the structure of a model could not be read or proved
    ├── MaskError           a mask does not fit, is empty where it may not be, or did not act
    ├── TicketError         a ticket folder is damaged, newer than we read, or not a ticket
    │   └── FingerprintError    the ticket belongs to other weights
    ├── DataError           a data set, its columns or its labels
    ├── SearchError         a search cannot start or cannot give a meaningful ticket
    ├── CheckpointError     what a killed run left cannot be gone on from
    └── StoreError          the folder of results

The command line prints one as a single message and leaves with exit code 2. Anything else that escapes is a bug.
"""

from collections.abc import Sequence


class TombolaError(Exception):
    """One problem, in four parts, each also a field.

    what      the thing that is wrong, as a noun phrase or sentence
    got       what was found
    expected  what would have been right
    next      what the user can do now
    """

    exit_code = 2

    def __init__(self, what: str, *, got: object = None, expected: object = None, next: str | None = None) -> None:
        self.what, self.got, self.expected, self.next = what, got, expected, next
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        if self.got is not None:
            parts.append(f"  got:      {self.got}")
        if self.expected is not None:
            parts.append(f"  expected: {self.expected}")
        if self.next is not None:
            parts.append(f"  next:     {self.next}")
        return "\n".join(parts)


class SettingsError(TombolaError):
    """One or several wrong settings; `problems` holds each."""

    def __init__(self, problems: Sequence[TombolaError]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        many = f"{len(self.problems)} settings are wrong"
        super().__init__(first.what if len(self.problems) == 1 else many, got=first.got, expected=first.expected, next=first.next)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        return "\n".join([f"{self.what}:", *(str(problem) for problem in self.problems)])


class AnatomyError(TombolaError):
    """The structure of a model could not be read or proved."""


class MaskError(TombolaError):
    """A mask does not fit, is empty where it may not be, or did not act."""


class TicketError(TombolaError):
    """A ticket folder is damaged, newer than we read, or not a ticket."""


class FingerprintError(TicketError):
    """The ticket belongs to other weights."""


class DataError(TombolaError):
    """A data set, its columns or its labels."""


class SearchError(TombolaError):
    """A search cannot start or cannot give a meaningful ticket."""


class CheckpointError(TombolaError):
    """What a killed run left cannot be gone on from: damaged, of another run, or of a newer format."""


class StoreError(TombolaError):
    """The folder of results."""
