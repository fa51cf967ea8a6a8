"""Write a converted model in the form of other software, and say what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from moesaic.cli._common import parse, quiet_libraries, show
from moesaic.cli._progress import TerminalProgress
from moesaic.conversion.fix_k import FixK
from moesaic.data import DataConfig, TokenBlocks, load_documents, prepare
from moesaic.models.checkpoint import load_tokenizer
from moesaic.recipes.exporting import ExportConfig, check_output, export, plan_export


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Write a converted model in the form of other software, check it and say what it costs.

    Attributes:
        model: A converted checkpoint.
        format: Registered name; see `moesaic ls formats`.
        out: Directory to write.
        weights: `float32`, `bfloat16` or `float16` in directories, `F32`, `F16`, `BF16`, `Q8_0` or
            `Q4_0` in GGUF files; `auto` as the checkpoint has them.
        fix_k: How the blocks of every token are chosen, where the format needs as many for each.
        calibration_tokens: Training text that is read to choose them.
        recovery_tokens: Training text on which the model of a fixed number of blocks is trained to
            give the dense parent's logits before it is written; 0 for none.
        recovery_rate: Peak learning rate of that.
        measure: Whether the loss is measured on held-out text.
        blocks_per_domain: Held-out blocks of each domain that it is measured on.
        data: The text.
        dry_run: Check everything, say what would be done, do nothing.
        json: Print one JSON document.
    """

    model: tyro.conf.Positional[Path]
    format: str
    out: Path
    weights: str = "auto"
    fix_k: FixK = field(default_factory=FixK)
    calibration_tokens: int = 16_384
    recovery_tokens: int = 0
    recovery_rate: float = 1e-4
    measure: bool = True
    blocks_per_domain: int = 8
    data: DataConfig = field(default_factory=DataConfig)
    dry_run: bool = False
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "export")
    quiet_libraries()
    config = ExportConfig(
        weights=options.weights,
        fix_k=options.fix_k,
        calibration_tokens=options.calibration_tokens,
        recovery_tokens=options.recovery_tokens,
        recovery_rate=options.recovery_rate,
        blocks_per_domain=options.blocks_per_domain,
    )
    check_output(options.out)
    _, fixes = plan_export(options.model, options.format, config)
    if options.dry_run:
        facts = {
            "model": str(options.model),
            "format": options.format,
            "out": str(options.out),
            "fixes_k": fixes,
            "documents": len(load_documents(options.data)) if fixes or options.measure else 0,
        }
        show(facts, as_json=options.json)
        return 0
    text: TokenBlocks | None = None
    heldout: TokenBlocks | None = None
    with TerminalProgress() as progress:
        if fixes or options.measure:
            split = prepare(options.data, load_tokenizer(str(options.model)), progress=progress)
            text, heldout = split.train, split.heldout if options.measure else None
        results = export(
            options.model,
            options.out,
            options.format,
            config,
            text=text,
            heldout=heldout,
            progress=progress,
        )
    if options.json:
        show({"out": str(options.out), **results}, as_json=True)
    else:
        show({"out": str(options.out), **_lines(results)}, as_json=False)
    return 0


def _lines(results: dict[str, Any]) -> dict[str, Any]:
    """Results as fields of one line each; what was lost in words."""
    shown = {name: value for name, value in results.items() if name != "quality"}
    for name, found in results.get("quality", {}).items():
        words = [f"{found['perplexity']:.4g}"]
        words += [
            f"{ratio['value']:.3f}x of {other} ({ratio['low']:.3f}-{ratio['high']:.3f})"
            for other, ratio in found["ratio"].items()
        ]
        shown[f"perplexity {name}"] = ", ".join(words)
    return {name: value for name, value in shown.items() if value != []}
