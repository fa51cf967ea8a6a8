"""Every committed result names the commit that it was measured from, and history has it."""

import re
import subprocess

import pytest
from test_house import ROOT

# Some files keep twelve digits of it.
_COMMIT = re.compile(r'"commit": ?"([0-9a-f]{12,40})(-dirty)?"')


def git(*arguments):
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()


def named():
    """Result files and the commits that they name."""
    return [
        pytest.param(path, commit, id=f"{path.relative_to(ROOT)}-{commit[:7]}")
        for directory in ("bench/results", "evidence")
        for path in sorted((ROOT / directory).rglob("*.json*"))
        for commit in sorted({found[1] for found in _COMMIT.finditer(path.read_text("utf-8"))})
    ]


@pytest.fixture(scope="module")
def history():
    """Every commit that this one stems from."""
    if git("rev-parse", "--is-shallow-repository") != ["false"]:
        pytest.skip("no whole history here: an archive or a shallow clone; git fetch --unshallow")
    return git("rev-list", "HEAD")


@pytest.mark.parametrize(("path", "commit"), named())
def test_results_are_of_a_commit_in_history(path, commit, history):
    assert any(one.startswith(commit) for one in history), (
        f"{path.name} was measured from {commit}, which history does not have; measure it again"
    )
