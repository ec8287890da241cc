"""A method in a folder of one's own is a method like the others, for every command and for the jobs that a suite starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from advssl.method import methods

PAGE = Path(__file__).resolve().parents[1] / "nbs" / "6_frontiers" / "90_your_own.ipynb"


@pytest.fixture
def environment(tmp_path):
    "The page's imports and class, saved as it says."
    cells = ["".join(cell["source"]) for cell in json.loads(PAGE.read_text())["cells"] if cell["cell_type"] == "code"]
    end = next(i for i, cell in enumerate(cells) if "class WarpCLR" in cell)
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "warpclr.py").write_text("\n\n".join(cells[: end + 1]))
    return os.environ | {"ADVSSL_METHODS": str(folder), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def advssl(*words, **options):
    return subprocess.run([sys.executable, "-m", "advssl", *words], capture_output=True, text=True, **options)


def test_without_the_variable_nobody_knows_it():
    assert "warpclr" not in methods()


def test_the_suite_trains_judges_and_prints_it(environment, tmp_path):
    made = advssl("reproduce", "robustness", "taxonomy", "--scale", "smoke", "--method", "warpclr", env=environment, cwd=tmp_path)
    assert made.returncode == 0, made.stderr[-3000:]
    for target in ("robustness", "taxonomy"): assert (tmp_path / f"figures/smoke/{target}.md").read_text().count("| WarpCLR |") == 1
    (row,) = (tmp_path / "runs/smoke/warpclr").glob("*/result.json")
    note = tmp_path / "runs/smoke/note.json"
    assert str(source := Path(environment["ADVSSL_METHODS"], "warpclr.py")) in json.loads(note.read_text())["state"]
    source.write_text(source.read_text().replace("radius: float = 0.15", "radius: float = 0.14 + 0.01"))  # the same settings by other code
    look = (
        "import json; from pathlib import Path; from advssl.suite.notebooks import nothing_to_do; "
        "from advssl.suite.store import result_code; "
        "note = Path('runs/smoke/note.json'); print(result_code('warpclr'), nothing_to_do(note, json.loads(note.read_text())['request']))"
    )
    seen = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    code, idle = seen.stdout.split()
    assert code != json.loads(row.read_text())["code"] and idle == "False", "code of a method of one's own has changed, and nobody sees it"
