"""What a user can get wrong, as exceptions whose message names the offending value and the remedy.

Every class derives from :class:`UserError`. The command line prints the message alone and exits with status 2; a
library caller sees an ordinary ``ValueError``.
"""

from textwrap import shorten

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the work is saved, start the command again


class UserError(ValueError):
    """Something the caller can put right. The message says what was wrong and what to do."""


def reason(error: Exception) -> str:
    """A library's error as part of one line: its kind and the beginning of its message."""
    return f"{type(error).__name__}: {shorten(str(error), 300, placeholder=' ...')}"


class ConfigError(UserError):
    """A setting that is out of range, or settings that contradict each other."""


class ModelNotFoundError(UserError):
    """No model or tokenizer at that name, path or revision."""


class CheckpointMismatchError(UserError):
    """A checkpoint whose parameters are not the ones that its configuration describes."""


class TextError(UserError):
    """A text that cannot be used as asked (no ``<mask>``, empty, or not representable in the vocabulary)."""


class DataFileError(UserError):
    """A data file that is missing, unreadable, empty or malformed."""


class OutputDirError(UserError):
    """An output folder that cannot be created or written, or that belongs to another run."""


class MemoryBudgetError(UserError):
    """A computation that would not fit into the memory that is free."""


class DiskSpaceError(UserError):
    """Files that would not fit on the disk."""


class DivergedError(UserError):
    """Training whose gradient is no longer finite."""


class StoppedError(Exception):
    """A run that a signal stopped after it saved its state; not the user's mistake. The command line exits with
    ``EXIT_STOPPED``."""


class SandboxError(UserError):
    """Programs cannot be executed here, or not in the way that was asked for."""
