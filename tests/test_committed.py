"""The committed tables and figures are what their rows say: drawn again from the store alone, they are the same bytes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from advssl.checkpoint import sha256
from advssl.suite.store import STORE, read_store
from advssl.suite.targets import TARGETS

FIGURES = Path(__file__).resolve().parents[1] / "figures"
SCALE = "laptop"
SIDECARS = sorted((FIGURES / SCALE).glob("*.provenance.json"))


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory):
    "The folder of the scale, made anew from a copy of its store."
    figures = tmp_path_factory.mktemp("figures")
    (figures / SCALE).mkdir()
    shutil.copy(FIGURES / SCALE / STORE, figures / SCALE)
    targets = [path.name.removesuffix(".provenance.json") for path in SIDECARS]
    words = ["reproduce", *targets, "--scale", SCALE, "--from-store", "--figures", str(figures)]
    done = subprocess.run([sys.executable, "-m", "advssl", *words], capture_output=True, text=True, cwd=figures)
    assert done.returncode == 0, done.stderr[-3000:]
    return figures / SCALE


def test_every_target_is_committed():
    assert {path.name.split(".")[0] for path in SIDECARS} == {name for name, target in TARGETS.items() if not target.asked}


@pytest.mark.parametrize("sidecar", SIDECARS, ids=lambda path: path.name.split(".")[0])
def test_redrawn_from_the_store_it_is_the_same(redrawn, sidecar):
    files = json.loads(sidecar.read_text())["files"]
    assert files, "a target without files"
    for name, digest in files.items():
        assert sha256(FIGURES / SCALE / name) == digest, f"{name} was changed by hand"
        assert (redrawn / name).read_bytes() == (FIGURES / SCALE / name).read_bytes(), name


def test_rows_say_where_they_come_from():
    rows = [row for file, row in read_store(FIGURES / SCALE / STORE) if "evaluation" in row]
    assert {row["scale"] for row in rows} == {SCALE} and {row["seed"] for row in rows} == {0, 1, 2}
    for row in rows: assert not row["stale"] and row["provenance"]["commit"] and row["checkpoint"] and row["evaluation"]["data_sha256"]


@pytest.mark.parametrize("name", ["tradeoff", "gallery"])
def test_the_readme_shows_the_committed_picture(name):
    shown, kept = FIGURES.parent / f"docs/readme/fig-{name}.png", FIGURES / SCALE / f"{name}.png"
    assert shown.read_bytes() == kept.read_bytes(), "store the outputs of nbs/index.ipynb, then write the README"
