"""The package as users install it: a source archive, the wheel made of it, and a suite that runs without the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("setuptools", "70")


def run(*words: str, **options) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made of the source archive, so both hold what is needed."""
    folder = tmp_path_factory.mktemp("wheel")
    archive = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run("-c", archive, str(folder), cwd=ROOT)
    (source,) = folder.glob("*.tar.gz")
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", str(folder), str(source))
    (made,) = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(folder / "site"), str(made))
    return made, folder / "site"


def test_contents(wheel):
    """Every module and every file that the package reads, the notebooks of the suite, both licences; nothing else."""
    names = set(zipfile.ZipFile(wheel[0]).namelist())
    package = {n for n in names if n.startswith("advssl/")}
    files = [p for p in (ROOT / "advssl").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    here = {f"advssl/{p.relative_to(ROOT / 'advssl').as_posix()}" for p in files if not any(part.startswith(".") for part in p.parts)}
    notebooks = {f"advssl/experiments/{p.name}" for p in (ROOT / "nbs/experiments").glob("*.ipynb")}
    assert package == here | notebooks
    needed = ("experiments/run.ipynb", "workflow/Snakefile", "workflow/profiles/slurm/config.yaml", "assets/fashion_mnist_subset.npz")
    assert {f"advssl/{name}" for name in needed} <= package
    about = {n.split("/", 1)[1] for n in names - package}
    assert {"licenses/LICENSE", "licenses/advssl/assets/fashion_mnist_subset-LICENSE", "entry_points.txt"} <= about
    assert all(".dist-info/" in n for n in names - package), "tests or notebooks beside the package"


def test_it_runs_without_the_repository(wheel, tmp_path):
    """The methods are listed, a target is made and a profile is found by the installed copy, far from any checkout."""
    site = wheel[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("ADVSSL_")} | {"PYTHONPATH": str(site)}
    where = "import advssl, advssl.suite.notebooks as n; print(advssl.__file__, n.NOTEBOOKS, advssl.__version__)"
    file, notebooks, version = run("-c", where, cwd=tmp_path, env=env).split()
    assert Path(file) == site / "advssl/__init__.py" and Path(notebooks) == site / "advssl/experiments"
    assert version in wheel[0].name
    assert "RoCL" in run(str(site / "bin/advssl"), "methods", cwd=tmp_path, env=env)
    run(str(site / "bin/advssl"), "reproduce", "taxonomy", "--scale", "smoke", cwd=tmp_path, env=env)
    assert "| RoCL |" in (tmp_path / "figures/smoke/taxonomy.md").read_text()
    executed = next((tmp_path / "runs/smoke").rglob("taxonomy.ipynb")).read_text()
    assert str(ROOT) not in executed and (tmp_path / "figures/smoke/taxonomy.provenance.json").exists()


def test_citation():
    """CITATION.cff has what its format asks for, the version of the package, and the two papers that the project follows."""
    yaml = pytest.importorskip("yaml")
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cite["cff-version"] == "1.2.0" and cite["type"] == "software" and cite["message"] and cite["title"].startswith("advssl")
    settings = (ROOT / "settings.ini").read_text()
    assert f"version = {cite['version']}\n" in settings and cite["license"] == "Apache-2.0"
    assert cite["authors"] == [{"name": "The advssl authors"}] and "author = The advssl authors\n" in settings
    assert {r["url"].rsplit("/", 1)[1] for r in cite["references"]} == {"2210.13463", "2003.12862"}
    for reference in cite["references"]:
        assert {"type", "title", "authors", "year"} <= reference.keys()
        assert all(set(author) == {"given-names", "family-names"} for author in reference["authors"])
