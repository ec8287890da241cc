"""Provenance: a commit is that of the package's own source, never that of a repository around an installed copy."""

import subprocess
from types import SimpleNamespace

from advssl.suite import store


def git(folder, *words):
    own = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", str(folder), *own, *words], capture_output=True, text=True, check=True).stdout.strip()


def test_only_the_own_repository_counts(tmp_path, monkeypatch):
    """A copy inside somebody else's repository has no commit, whether it is ignored or only not tracked; a tracked one has it."""
    file = tmp_path / "env/advssl/__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(store, "advssl", SimpleNamespace(__file__=str(file)))
    assert store.provenance()["commit"] is None and store.provenance()["dirty"] is None  # no repository at all
    git(tmp_path, "init", "--quiet")
    (tmp_path / "theirs.txt").write_text("theirs")
    git(tmp_path, "add", "theirs.txt")
    git(tmp_path, "commit", "--quiet", "-m", "theirs")
    assert git(tmp_path, "rev-parse", "HEAD")  # there is a commit, but it says nothing about the package
    assert store.provenance()["commit"] is None and store.provenance()["dirty"] is None
    (tmp_path / ".gitignore").write_text("env\n")
    assert store.provenance()["commit"] is None
    (tmp_path / ".gitignore").unlink()
    git(tmp_path, "add", "env")
    git(tmp_path, "commit", "--quiet", "-m", "ours")
    stamp = store.provenance()
    assert stamp["commit"] == git(tmp_path, "rev-parse", "HEAD") and stamp["dirty"] is False
    file.write_text("changed = True\n")
    assert store.provenance()["dirty"] is True
