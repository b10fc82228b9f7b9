"""The examples run as a newcomer would run them, and leave one picture and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
OPTIONS = {"dmm_on_a_panel": ["--quick"]}


def files(folder):
    found = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    return {p for p in found if "__pycache__" not in p.parts}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_leaves_one_picture(script, tmp_path):
    beside = files(EXAMPLES)
    (tmp_path / "scratch").mkdir()
    picture = tmp_path / "new" / "folder" / f"{script.stem}.png"
    run = subprocess.run(
        [sys.executable, str(script), "--output", str(picture), *OPTIONS.get(script.stem, [])],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert run.stdout.endswith(f"picture: {picture}\n")
    assert files(tmp_path) == {picture.relative_to(tmp_path)}
    assert files(EXAMPLES) == beside
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(picture)
    height, width, _ = pixels.shape
    assert 1000 <= width <= 2000
    assert 500 <= height <= 1500
    drawn = np.mean(pixels[..., :3].min(-1) < 0.95)
    assert 0.02 < drawn < 0.6, "the picture is blank, or black"


def test_every_example_is_listed():
    listed = re.findall(r"^- \[(.+?)\]\(\1\): ", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [script.name for script in SCRIPTS]
