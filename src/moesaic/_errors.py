"""The errors a user can cause, and the one thing each tells the command line: its exit code."""

from __future__ import annotations


class MoesaicError(Exception):
    """Base of every error this library raises on purpose; the message is one sentence."""

    exit_code = 1


class InputError(MoesaicError, ValueError):
    """A value the user gave is wrong; says the field, the value, the bound and the remedy."""

    exit_code = 2


class UnknownNameError(InputError, KeyError):
    """A name that no table knows; carries the closest names that exist."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message.
        return str(self.args[0])


class CheckpointError(InputError):
    """A checkpoint file that is missing, truncated, edited or of another kind; names the file."""


class RunError(MoesaicError, RuntimeError):
    """Work that failed after it started, for a reason the user can act on."""
