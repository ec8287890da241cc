"""Provenance: a commit is that of the package's own source, never that of a repository around an installed copy.

Drawings: the same bytes on every machine.
"""

import io
import re
import subprocess
from types import SimpleNamespace

import matplotlib
from matplotlib.figure import Figure

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


def test_redrawn_figures_do_not_make_a_tree_dirty(tmp_path, monkeypatch):
    """They change while a target writes them; a changed source beside them still counts."""
    file, figure = tmp_path / "advssl/__init__.py", tmp_path / "figures/demo/claims.md"
    for path in (file, figure):
        path.parent.mkdir(parents=True)
        path.write_text("")
    monkeypatch.setattr(store, "advssl", SimpleNamespace(__file__=str(file)))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    figure.write_text("drawn again")
    assert store.provenance()["dirty"] is False
    other = tmp_path / "advssl/figures.py"
    other.write_text("")
    git(tmp_path, "add", str(other))
    assert store.provenance()["dirty"] is True


def test_a_bar_in_a_formula_ends_no_cell():
    """Markdown knows nothing of formulas: there a bar has a name, and a norm stays a norm."""
    table = [{"game": r"$\max_{\|\delta\|\le\epsilon}\log p(y|x)$, a | b", "none": None}]
    (line,) = store.markdown_table(table).splitlines()[2:]
    assert line == r"| $\max_{\Vert \delta\Vert \le\epsilon}\log p(y\vert x)$, a \| b |  |" and r"\\|" not in line
    assert store.markdown_table([{"price": "$5 | or not"}]).splitlines()[2] == r"| $5 \| or not |"


def test_a_table_says_where_training_was_unequal():
    of = lambda method, epochs, images=0: {"method": method, "config": {"epochs": epochs, "images": images}}
    assert [store.trained_on(row) for row in (of("mae", 6), of("unified", 2, 3200), of("untrained", 1))] == ["6 × all", "2 × 3,200", ""]
    assert store.unequal_training([]) == store.unequal_training([of("mae", 6), of("mae", 6), of("untrained", 1)]) == ""
    for other in (of("mae", 4), of("mae", 6, 500)): assert "one of recipes" in store.unequal_training([of("mae", 6), other])


def test_a_row_of_a_method_that_nobody_knows_is_stale(tmp_path):
    """Somebody's own method, whose folder is not named now, breaks no table."""
    path = tmp_path / "runs/smoke/of-somebody/0-abc/result.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"method": "of-somebody", "code": "0123456789ab"}')
    (row,) = store.rows(tmp_path / "runs", "smoke")
    assert row["stale"] and store.write_store(tmp_path / "rows.jsonl", tmp_path / "runs", "smoke") == 0
    (name, kept), = store.read_store(tmp_path / "rows.jsonl")
    assert name == "of-somebody/0-abc/result.json" and kept["stale"]


def test_records_are_for_comparisons_of_all_seeds():
    """In the order of the seeds whatever that of the rows; nothing where a seed, an accuracy or a mask is missing."""
    row = lambda seed: {"seed": seed, "evaluation": {"linear.clean": {"right": f"{seed:02x}", "total": 8}, "knn.clean": {"total": 8}}}
    group = store.Group("simclr", "small_convnet", [row(10), row(0), row(2)])
    assert [r["right"] for r in group.records("linear.clean", 3)] == ["00", "02", "0a"]
    for key, seeds in (("linear.clean", 2), ("linear.clean", 4), ("knn.clean", 3), ("aff.clean", 3)):
        assert group.records(key, seeds) is None
    del group.rows[1]["evaluation"]["linear.clean"]
    assert group.records("linear.clean", 3) is None


def test_ids_in_a_drawing_say_nothing_of_places():
    """Whatever matplotlib hashes, the file is the same, and every reference still finds what it names."""

    def drawn(salt: str) -> bytes:
        figure, buffer = Figure(), io.BytesIO()
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], "o-", clip_on=True)
        left.scatter([0, 1], [1, 0], s=[10, 20])
        right.imshow([[0, 1], [1, 0]])
        right.add_patch(matplotlib.patches.Rectangle((0, 0), 1, 1, hatch="//"))
        with matplotlib.rc_context({"svg.hashsalt": salt}): figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()

    one, two = drawn("one"), drawn("two")
    assert one != two and store.steady_ids(one) == store.steady_ids(two)
    text = store.steady_ids(one).decode()
    ids, references = re.findall(r' id="([^"]+)"', text), re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert len(ids) == len(set(ids)) and {a or b for a, b in references} <= set(ids)
    assert any(i.startswith("image") for i in ids) and {"p", "m", "h"} <= {i[0] for i in ids if i[1:].isdigit()}
