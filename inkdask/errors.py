"""The errors that a user sees: one sentence, no traceback."""

from __future__ import annotations

import re

_SECRETS = re.compile(
    r"(?<=://)[^/@\s]+@"  # user and password
    r"|(?<=[?&])(?:X-(?:Amz|Goog)-[\w-]+|AWSAccessKeyId|Signature|sig|(?:access_)?token)=[^&\s]*&?",
    re.IGNORECASE,
)
LONGEST = 1000  # signs of a sentence; a damaged file or a wrong value may be any long


class InkdaskError(Exception):
    """A mistake or a misfortune that the user can act on.

    ``str(error)`` is one clear sentence that names the file or the variable. The command line
    prints it and exits with ``exit_code``. Every public function raises it, and nothing else, for
    bad input.
    """

    exit_code = 1

    def __str__(self) -> str:
        text = without_password(super().__str__())
        half = LONGEST // 2
        return text if len(text) <= LONGEST else f"{text[:half]} [...] {text[-half:]}"


def without_password(text: str) -> str:
    """Return a text without the user, password and signature of any URI."""
    return _SECRETS.sub("", text)


def reason(error: BaseException) -> str:
    """Return what an error says, or else its type, on one line and without a full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class UnavailableError(InkdaskError):
    """A place does not answer now: the same work may succeed later, or on another machine."""


class DamagedError(InkdaskError):
    """A file cannot be decoded: it is damaged, or of another kind."""


class SettingsError(InkdaskError):
    """A setting is missing or out of its bounds."""

    exit_code = 2
