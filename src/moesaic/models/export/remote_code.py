"""Our own directory: every model exactly, with the source files that load it anywhere.

It holds gates with a threshold, bypasses and whatever else we make. transformers and vLLM's
transformers backend load it with `trust_remote_code`.
"""

from __future__ import annotations

from moesaic.models.export._base import Format, FormatConfig
from moesaic.models.export._directory import DirectoryFormat, Target

_TARGET = Target(
    name="remote-code",
    layout=None,
    obstacle=lambda config: "",
    build=lambda model: model,
)


def remote_code_format(config: FormatConfig) -> Format:
    """Make the format, which writes our own classes and their code."""
    return DirectoryFormat(_TARGET, config)
