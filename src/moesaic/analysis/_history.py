"""What was done and with what: manifest, machine and data as readable facts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from moesaic.analysis import _record
from moesaic.analysis._format import integer

_TITLE_KEYS = ("name", "method", "command", "step", "kind")
_MAX_LISTED = 12
_MAX_JSON = 500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A titled list of names and values."""

    title: str
    facts: list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainData:
    """Where the held-out text of one domain comes from."""

    name: str
    tokens: str
    documents: str
    sources: list[str]


def moment(text: str) -> str:
    """Write an ISO time to the minute; any other text stays as it is."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = when.tzname() or ""
    return f"{when:%Y-%m-%d %H:%M} {zone}".strip()


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """List nested data as dotted names and written values; long lists are cut and counted."""
    if isinstance(value, Mapping):
        return [
            fact
            for key, inner in value.items()
            for fact in flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, (list, tuple)):
        if any(isinstance(v, (Mapping, list, tuple)) for v in value):
            shown = [
                f for i, v in enumerate(value[:_MAX_LISTED]) for f in flatten(v, f"{prefix}[{i}]")
            ]
            more = len(value) - _MAX_LISTED
            return shown if more <= 0 else [*shown, (prefix, f"and {more} more")]
        text = ", ".join(map(_scalar, value[:_MAX_LISTED]))
        more = len(value) - _MAX_LISTED
        return [(prefix, f"{text} and {more} more" if more > 0 else text or "none")]
    return [(prefix, _scalar(value))]


def _scalar(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def steps(manifest: Mapping[str, Any]) -> list[Facts]:
    """List the steps of a manifest in order, each with its resolved settings and results."""
    found = []
    for index, step in enumerate(_record.items(manifest, "steps")):
        if not isinstance(step, Mapping):
            found.append(Facts(title=_scalar(step), facts=[]))
            continue
        key = next((k for k in _TITLE_KEYS if isinstance(step.get(k), str)), None)
        rest = {k: v for k, v in step.items() if k != key}
        title = f"step {index + 1}" if key is None else str(step[key])
        found.append(Facts(title=title, facts=flatten(rest)))
    return found


def other_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what a manifest says beside its steps."""
    return flatten({k: v for k, v in manifest.items() if k != "steps"})


def raw_json(manifest: Mapping[str, Any]) -> str:
    """Write a manifest as JSON; one too long for a page is cut, and says so."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, default=str)
    if len(text) <= _MAX_JSON:
        return text
    return f"{text[:_MAX_JSON]}\n... cut; all {len(text):,} characters are in moesaic.json"


def domain_data(record: Mapping[str, Any]) -> list[DomainData]:
    """List the held-out text by domain, with its sources."""
    domains = _record.section(_record.section(record, "data"), "domains")
    return [_domain(str(name), _record.section(domains, name)) for name in domains]


def _domain(name: str, data: Mapping[str, Any]) -> DomainData:
    counts = [_record.number(data, key) for key in ("tokens", "documents")]
    tokens, documents = ("-" if count is None else integer(count) for count in counts)
    return DomainData(
        name=name,
        tokens=tokens,
        documents=documents,
        sources=[_source(source) for source in _record.items(data, "sources")],
    )


def _source(source: Any) -> str:
    if not isinstance(source, Mapping):
        return _scalar(source)
    return "; ".join(f"{key}: {value}" for key, value in flatten(source))


def machines(lines: Sequence[Mapping[str, Any]]) -> list[list[tuple[str, str]]]:
    """Every machine that lines are from, once."""
    found = [flatten(_record.section(line, "machine")) for line in lines]
    return [facts for i, facts in enumerate(found) if facts and facts not in found[:i]]


def versions(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The versions and commits that lines are from; several if they differ."""
    values: dict[str, dict[str, None]] = {}
    for line in lines:
        for name, value in _record.section(line, "versions").items():
            values.setdefault(str(name), {})[str(value)] = None
    return [(name, ", ".join(found)) for name, found in values.items()]
