"""The export formats, by name."""

from __future__ import annotations

from moesaic._registry import MethodInfo, MethodTable

_CONFIG = "moesaic.models.export._base:FormatConfig"

FORMATS = MethodTable(
    "format",
    [
        MethodInfo(
            name="gguf",
            target="moesaic.models.export.gguf:Gguf",
            config=_CONFIG,
            summary="llama.cpp: one file with tokenizer, as glm4_moe or mixtral, maybe quantised",
            paper="GLM-4.5, arXiv 2508.06471",
            abilities=frozenset({"fixed-k"}),
        ),
        MethodInfo(
            name="glm4_moe",
            target="moesaic.models.export.glm4_moe:glm4_moe_format",
            config=_CONFIG,
            summary="transformers, vLLM, SGLang: k sigmoid gates and a shared block",
            paper="GLM-4.5, arXiv 2508.06471",
            abilities=frozenset({"stock", "fixed-k"}),
        ),
        MethodInfo(
            name="mixtral",
            target="moesaic.models.export.mixtral:mixtral_format",
            config=_CONFIG,
            summary="transformers, vLLM, SGLang: k blocks whose weights sum to one, none shared",
            paper="Mixtral, arXiv 2401.04088",
            abilities=frozenset({"stock", "fixed-k"}),
        ),
        MethodInfo(
            name="qwen3_moe",
            target="moesaic.models.export.qwen3_moe:qwen3_moe_format",
            config=_CONFIG,
            summary="transformers, vLLM, SGLang: as mixtral for the family of Qwen3",
            paper="Qwen3, arXiv 2505.09388",
            abilities=frozenset({"stock", "fixed-k"}),
        ),
        MethodInfo(
            name="remote-code",
            target="moesaic.models.export.remote_code:remote_code_format",
            config=_CONFIG,
            summary="transformers with trust_remote_code: any model, exactly as it is",
            paper="ours",
        ),
    ],
)
