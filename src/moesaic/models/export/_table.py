"""The export formats, by name."""

from __future__ import annotations

from moesaic._registry import MethodInfo, MethodTable

_CONFIG = "moesaic.models.export._base:FormatConfig"

FORMATS = MethodTable(
    "format",
    [
        MethodInfo(
            name="glm4_moe",
            target="moesaic.models.export.glm4_moe:Glm4Moe",
            config=_CONFIG,
            summary="transformers, vLLM, SGLang: k sigmoid gates and a shared block",
            paper="GLM-4.5, arXiv 2508.06471",
            abilities=frozenset({"stock", "fixed-k"}),
        ),
        MethodInfo(
            name="remote-code",
            target="moesaic.models.export.remote_code:RemoteCode",
            config=_CONFIG,
            summary="transformers with trust_remote_code: every model exactly, any number of blocks",
            paper="ours",
        ),
    ],
)
