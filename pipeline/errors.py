"""The one exception that users are meant to read."""

from __future__ import annotations


class PipelineError(Exception):
    """A mistake in the input: the message names the file or field, its value and the fix.

    The command line prints it as one line and exits with status 1; anything else is a bug and
    keeps its traceback.
    """
