"""The Python blocks of the documents run as they stand, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import seqdgm

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/quickstart.md",
    "docs/models.md",
    "docs/deep.md",
    "docs/particles.md",
    "docs/datasets.md",
    "docs/report.md",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks, f"{name} has no Python blocks"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "document", "sq": seqdgm}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
