"""The code beside a checkpoint: this package's own files, to load it where moesaic is missing.

transformers copies a checkpoint's modules by their relative imports and knows no subpackages, so
`moesaic/nn/layer.py` becomes `moesaic_nn_layer.py`, and the dotted name of a module becomes that
name, relative. Nothing else changes: there is no second implementation.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_ENTRY = "modeling_moesaic.py"
_HERE = Path(__file__).resolve()
# In a checkpoint this very file has a flat name.
_BUNDLED = _HERE.name != "remote.py"
_NAME = re.compile(r"\bmoesaic((?:\.[A-Za-z_]\w*)+)")


def write_code(directory: str | Path) -> None:
    """Write the modules that a checkpoint needs into its directory."""
    directory = Path(directory)
    if _BUNDLED:
        for source in [*_HERE.parent.glob("moesaic_*.py"), _HERE.parent / _ENTRY]:
            if source.parent != directory.resolve():
                shutil.copyfile(source, directory / source.name)
        return
    root = _HERE.parents[1]
    modules: dict[str, Path] = {}
    _collect("moesaic.models.modeling", root, modules)
    for name, source in modules.items():
        (directory / f"{_flat(name)}.py").write_text(_flatten(source.read_text(), root))
    # transformers finds the files to copy by this form of import alone.
    imports = "".join(
        f"from .{_flat(name)} import __doc__ as _{i}\n" for i, name in enumerate(sorted(modules))
    )
    entry = (
        '"""Loads this checkpoint where moesaic is not installed; made by moesaic."""\n\n'
        f"{imports}\nfrom .{_flat('moesaic.models.modeling')} import __getattr__\n"
    )
    (directory / _ENTRY).write_text(entry)


def _collect(name: str, root: Path, modules: dict[str, Path]) -> None:
    """Follow the names of modules in a source file, imports and method tables alike."""
    if name in modules:
        return
    modules[name] = _path(name, root)
    for match in _NAME.finditer(modules[name].read_text()):
        found = _module_in(match.group(0), root)
        if found is not None:
            _collect(found, root, modules)


def _path(name: str, root: Path) -> Path:
    return root.joinpath(*name.split(".")[1:]).with_suffix(".py")


def _module_in(name: str, root: Path) -> str | None:
    """The longest prefix of a dotted name that is a module file of the package."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        candidate = ".".join(parts[:length])
        if _path(candidate, root).is_file():
            return candidate
    return None


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _flatten(source: str, root: Path) -> str:
    """Rewrite every module name of the package to its flat, relative form."""

    def flat(match: re.Match[str]) -> str:
        found = _module_in(match.group(0), root)
        if found is None:
            return match.group(0)
        return f".{_flat(found)}{match.group(0)[len(found) :]}"

    return _NAME.sub(flat, source)
