"""Run the notebooks below nbs/, each in a process of its own and from its own folder; `--store` keeps the outputs in place.

Cells flagged `#| slow` or `#| gpu` are left out, as nbdev does. Prints the seconds of each notebook; exit status 1 if one fails.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds; far above the budget of a minute, to catch what hangs

STORE = """
import sys
from pathlib import Path
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
path = Path(sys.argv[1])
nb = read_nb(path)
for cell in nb.cells:
    if cell.cell_type == "code": cell.outputs = []  # a cell that falls silent would keep its old ones
write_nb(nb, path)
CaptureShell().execute(path, path, exc_stop=True)
nb = read_nb(path)
clean_nb(nb, allowed_cell_metadata_keys=["tags"])
write_nb(nb, path)
"""


def run(path: Path, store: bool) -> tuple[Path, float, subprocess.CompletedProcess]:
    """One notebook, in its own process."""
    nbdev_test = [str(Path(sys.executable).parent / "nbdev_test"), "--path", str(path), "--n_workers", "0", "--do_print"]
    command = [sys.executable, "-c", STORE, str(path)] if store else nbdev_test
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}  # bars are for people who wait
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=LIMIT, env=environment)
    return path, time.monotonic() - began, done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", action="store_true", help="write the outputs into the notebooks")
    parser.add_argument("paths", nargs="*", type=Path, help="default: all of nbs/")
    options = parser.parse_args()
    found = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.parts))
    paths = [p.resolve() for p in options.paths] or found
    failed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, seconds, done in pool.map(lambda p: run(p, options.store), paths):
            print(f"{seconds:6.1f} s  {path.relative_to(ROOT)}{'' if done.returncode == 0 else '  FAILED'}", flush=True)
            if done.returncode: failed.append((path, done.stdout + done.stderr))
    for path, output in failed: print(f"\n===== {path.relative_to(ROOT)}\n{output}")
    print(f"{len(paths) - len(failed)} notebooks passed, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
