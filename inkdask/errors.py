"""The errors that a user sees: one sentence, no traceback."""

from __future__ import annotations


class InkdaskError(Exception):
    """A mistake or a misfortune that the user can act on.

    ``str(error)`` is one clear sentence that names the file or the variable. The command line
    prints it and exits with ``exit_code``. Every public function raises it, and nothing else, for
    bad input.
    """

    exit_code = 1


class UnavailableError(InkdaskError):
    """A place does not answer now: the same work may succeed later, or on another machine."""


class DamagedError(InkdaskError):
    """A file cannot be decoded: it is damaged, or of another kind."""


class SettingsError(InkdaskError):
    """A setting is missing or out of its bounds."""

    exit_code = 2
