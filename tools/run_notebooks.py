"""Run the notebooks below nbs/, each in a process of its own and from its own folder; `--store` keeps the outputs in place.

Cells flagged `#| slow` or `#| gpu` are left out, as nbdev does, but not when outputs are stored. Prints the seconds of each
notebook; exit status 1 if one fails. The processes are forked from one that has loaded the libraries and nothing of ours:
loading them anew takes longer than many a notebook.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import signal
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds; far above the budget of a minute, to catch what hangs
LIBRARIES = ["torch", "torchvision", "timm", "lightning_fabric", "matplotlib", "nbdev.test", "nbdev.clean"]


def check(path: Path) -> bool:
    """Run a notebook; errors go to stderr."""
    from nbdev.config import get_config
    from nbdev.test import test_nb

    return test_nb(path, skip_flags=get_config().tst_flags.split())[0]


def store(path: Path) -> bool:
    """Run a notebook and write what it said into it."""
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb

    nb = read_nb(path)
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = []  # a cell that falls silent would keep its old ones
    fresh = path.with_name(f".{path.name}")  # a notebook is the source: one that fails, or a kill, leaves it as it was
    try:
        write_nb(nb, fresh)
        CaptureShell().execute(fresh, fresh, exc_stop=True)
        nb = read_nb(fresh)
        clean_nb(nb, allowed_cell_metadata_keys=["tags"])
        write_nb(nb, fresh)
        os.replace(fresh, path)
    finally: fresh.unlink(missing_ok=True)
    return True


def timeout(*_):
    raise TimeoutError(f"the notebook runs longer than {LIMIT} s")


def run(path: Path, job) -> tuple[bool, float, str]:
    """One notebook, in its own process and folder: whether it passed, seconds, what was printed."""
    sys.path.insert(0, str(ROOT))
    os.chdir(path.parent)
    signal.signal(signal.SIGALRM, timeout)
    signal.alarm(LIMIT)
    began, output = time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try: passed = job(path)
        except Exception:  # whatever a notebook raises is this notebook's failure, and the others go on
            traceback.print_exc()
            passed = False
    return passed, time.monotonic() - began, output.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", action="store_true", help="write the outputs into the notebooks")
    parser.add_argument("paths", nargs="*", type=Path, help="default: all of nbs/")
    options = parser.parse_args()
    found = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.parts))
    paths = [p.resolve() for p in options.paths] or found
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # bars are for people who wait
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(LIBRARIES)
    failed = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=server, max_tasks_per_child=1) as pool:
        jobs = {pool.submit(run, path, store if options.store else check): path.relative_to(ROOT) for path in paths}
        for job in as_completed(jobs):
            passed, seconds, output = job.result()
            print(f"{seconds:6.1f} s  {jobs[job]}{'' if passed else '  FAILED'}", flush=True)
            if not passed: failed.append((jobs[job], output))
    for path, output in failed: print(f"\n===== {path}\n{output}")
    print(f"{len(paths) - len(failed)} notebooks passed, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
