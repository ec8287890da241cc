"""The documentation: the converter on small notebooks, then the built site in a browser."""

import base64
import functools
import http.server
import json
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import api  # noqa: E402
import build  # noqa: E402
from page import Page  # noqa: E402
from project import Project  # noqa: E402


def png(width: int, dpi: int) -> str:
    "A white image that says its resolution, as matplotlib's do."
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    per_metre = round(dpi / 0.0254)
    raw = (b"\0" + b"\xff" * width) * 4
    content = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 4, 8, 0, 0, 0, 0))
               + chunk(b"pHYs", struct.pack(">IIB", per_metre, per_metre, 1))
               + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    return base64.b64encode(content).decode()


def md(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def code(text: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "metadata": {}, "source": text, "outputs": list(outputs), "execution_count": None}


def printed(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": [text]}


def result(**data) -> dict:
    "result(image_png=...) is an output of kind image/png."
    data = {k.replace("_", "/", 1).replace("svg", "svg+xml"): v for k, v in data.items()}
    return {"output_type": "display_data", "metadata": {}, "data": data}


HEAD = md("# Balls\n\n> Where a perturbation may live.\n\n**Paper** none")


@pytest.fixture
def make(tmp_path):
    "make({path: cells}) -> a project whose notebooks are these."
    def write(notebooks: dict[str, list[dict]]) -> Project:
        shutil.copy(ROOT / "settings.ini", tmp_path)
        for path, cells in notebooks.items():
            file = tmp_path / "nbs" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
        return Project(tmp_path)
    return write


@pytest.fixture
def one(make):
    "one(cells...) -> the Markdown of a notebook with these cells after its head, and its problems."
    def convert(*cells: dict) -> tuple[str, list[str]]:
        project = make({"1_foundations/10_balls.ipynb": [HEAD, *cells]})
        page = Page(project, project.sources["nbs/1_foundations/10_balls.ipynb"])
        return page.markdown(), project.problems
    return convert


def test_head_has_lead_and_buttons_from_settings(one):
    text, problems = one()
    assert text.startswith("# Balls\n\nWhere a perturbation may live.\n{ .lead }\n")
    settings = Project(ROOT).settings
    owner = settings["git_url"].removeprefix("https://github.com/")
    assert f"research.google.com/github/{owner}/blob/{settings['branch']}/nbs/1_foundations/10_balls.ipynb)" in text
    assert f"[View source]({settings['git_url']}/blob/" in text and "**Paper** none" in text and not problems


def test_colab_follows_a_fork(make, tmp_path):
    project = make({"index.ipynb": [HEAD]})
    ini = (tmp_path / "settings.ini").read_text()
    (tmp_path / "settings.ini").write_text(re.sub(r"(?m)^user = .*$", "user = someone", ini))
    assert "/github/someone/" in Project(tmp_path).colab("nbs/index.ipynb")
    project.git = "https://git.example.org/x/y"
    assert project.colab("nbs/index.ipynb") == ""


def test_equations_get_anchors_and_citations_link(one):
    text, problems = one(
        md("So $$a=b.\\tag{1}$$ and\n\n$$c=d\\tag{2}$$\n\n$$e\\tag{3a}$$"),
        md("By Eq. (1), Eqs. (1) and (2), Eqs. (1)-(2), but not `Eq. (1)` or the survey's Eq. (9); **Eq. (3a)** too.\n\n"
           "### Eq. (2) in a heading"))
    assert '<a id="eq-1" class="eq"></a>\n\n$$\na=b.\\tag{1}\n$$' in text
    assert "By [Eq. (1)](#eq-1), Eqs. [(1)](#eq-1) and [(2)](#eq-2), Eqs. [(1)](#eq-1)-[(2)](#eq-2)" in text
    assert "`Eq. (1)` or the survey's Eq. (9); **[Eq. (3a)](#eq-3a)**" in text and "### Eq. (2) in a heading" in text
    assert not problems


@pytest.mark.parametrize("cell, word", [
    (md("See Eq. (7)."), "Eq. (7)"), (md("See Eqs. (1)-(4)."), "Eq. (3)"), (md("See Eq. 1."), "cite an equation as"),
    (md("$$b\\tag{1}$$"), "more than one equation"), (md("$$b"), "not closed"), (code("x = 1  # Eq. (8)"), "Eq. (8)"),
    (code('#| fig-cap: "By Eq. (6)."\nplt.show()', result(image_png=png(8, 100))), "Eq. (6)"),
    (code("plt.plot([1])", result(image_png=png(8, 100))), "without a caption"),
    (code('#| fig-cap: "A line."\nplot()'), "without its stored figure"), (code("fig, ax = plt.subplots()"), "without its stored"),
    (md("[x](20_gone.ipynb)"), "no nbs/1_foundations/20_gone.ipynb"), (md("![](10_balls.ipynb)"), "without a caption"),
    (md("![x](https://example.org/x.png)"), "another host"), (md("As in @fig-none."), "@fig-none"),
    (code("f", result(text_plain="<function f at 0x7f>")), "differs from run to run"), (code("show_doc(gone)"), "show_doc(gone)"),
    (code('#| export\ndef f():\n    "In runs/<scale>."'), "reads as markup"),
])
def test_mistakes_are_named(one, cell, word):
    _, problems = one(md("$$a\\tag{1}$$ $$a\\tag{2}$$ $$a\\tag{4}$$"), cell)
    assert len([p for p in problems if word in p]) == 1, problems
    assert problems[0].startswith("nbs/1_foundations/10_balls.ipynb")
    assert ", cell 3 (" in problems[0] or "of this page" in problems[0]


def test_figures_are_numbered_and_sized(one):
    retina, plain = result(image_png=png(800, 200)), result(image_png=png(800, 100))
    text, problems = one(
        md("$$a\\tag{1}$$\n\nSee @fig-b."),
        code('#| label: fig-a\n#| fig-cap: "The move of Eq. (1)."\nplot()', retina),
        code("#| label: fig-b\n#| fig-cap: 'Plain'\nplot()", plain, printed("done")))
    assert '<figure id="fig-a" markdown="1">\n\n![The move of Eq. (1).](balls_files/fig-a.png){ width="400" }' in text
    assert "**Figure 1.** The move of [Eq. (1)](#eq-1).</figcaption>" in text and "**Figure 2.** Plain" in text
    assert 'width="800"' in text and "See [Figure 2](#fig-b)." in text and "fig-cap" not in text and not problems


def test_directives_shape_code(one):
    text, _ = one(code("#| hide\nsecret = 1"), code("#| echo: false\nprint('quiet')", printed("loud")),
                  code("#| code-fold: true\n#| code-summary: \"The run\"\nlong = 1"),
                  code("#| output: false\nx", result(text_plain="gone")), code("shown = 1\n\n\nkept = 2"))
    assert "secret" not in text and "quiet" not in text and "loud" in text and "gone" not in text and "#|" not in text
    assert '??? abstract "The run"\n\n    ```python\n    long = 1\n    ```' in text and "shown = 1\n\n\nkept = 2" in text


def test_every_kind_of_output(one):
    text, problems = one(code(
        "x", printed("\x1b[31mred\x1b[0m\n", "stderr"), result(text_plain="3 ``` 4"),
        result(text_markdown="| a |\n|---|\n| 1 |", text_plain="no"),
        result(text_html='<style scoped>p {}</style><table border="1" class="dataframe"><tr><td>5</td></tr></table>'),
        {"output_type": "error", "ename": "ValueError", "evalue": "eps must be > 0", "traceback": []}),
        code('#| fig-cap: "Drawn."\ny', result(image_svg='<svg width="72pt"></svg>')))
    assert "{ .text .output .stderr .no-copy }\nred" in text and "{ .text .output .no-copy }\n3 ``` 4" in text
    assert "\n| a |" in text and "| no" not in text and "<table><tr>" in text and "style" not in text
    assert "ValueError: eps must be > 0" in text and 'fig-1.svg){ width="100" }' in text and not problems


def test_prose_is_made_fit_for_python_markdown(one):
    text, _ = one(md("Words:\n- a\n  - b\n- c\n\n> **Open question.** Which sign?\n\nText\n> a quote"))
    assert "Words:\n\n- a\n    - b\n- c" in text and '!!! question "Open question"\n\n    Which sign?' in text and "\n> a quote" in text
    text, problems = one(md("Run:\n\n    # Eq. (9)\n    make `x`\n\n      more\n\nThen.\n\n- item\n\n    of the item"))
    assert "```\n# Eq. (9)\nmake `x`\n\n  more\n```\n\nThen." in text and "\n\n    of the item" in text and not problems


def test_equations_in_lists(one):
    text, _ = one(md("1. first $$x$$\n\n   more\n| a |\n|---|"))
    assert "1. first\n\n    $$\n    x\n    $$\n\n" in text and "\n    more\n" in text


SOURCE = '''#| export
@dataclass(frozen=True)
class Linf:
    "Ball of Eq. (1)."
    eps: float  # radius, in {8/255}
    start: tuple[float, float] | None = (0., 1.)  # a | b

    def project(
        self,
        # rows are samples,
        # anything after that
        delta: Tensor,
        *,
        train=False,
    ) -> Tensor:  # inside
        "Nearest point, see `step`."

    def _private(self): "no"

async def step(x, *, lr: float = 1e-3): "Docstring."
def noted(x: int) -> int:  # twice x
    "One line."
def _hidden(): "no"
'''


def test_api_reads_signatures_and_notes():
    ball, step, noted = api.symbols(SOURCE)
    assert ball.signature == "class Linf(eps, start=(0., 1.))" and [m.name for m in ball.methods] == ["Linf.project"]
    assert [(r.name, r.type, r.default, r.note) for r in ball.rows] == [
        ("eps", "float", "", "radius, in {8/255}"), ("start", "tuple[float, float] | None", "(0., 1.)", "a | b")]
    project = ball.methods[0]
    assert project.signature == "Linf.project(delta, *, train=False) -> Tensor"
    assert [r.note for r in project.rows] == ["rows are samples, anything after that", "", "inside"]
    assert step.signature == "step(x, *, lr: float = 1e-3)" and not step.rows
    assert [(r.name, r.note) for r in noted.rows] == [("x", ""), ("returns", "twice x")]


def test_api_blocks_and_links_between_pages(make):
    project = make({
        "1_foundations/10_balls.ipynb": [HEAD, code("#| default_exp threat"), code("#| export\nimport math"),
                                         md("## The ball\n\n$$a\\tag{1}$$"), code(SOURCE)],
        "2_contrastive/20_rocl.ipynb": [md("# RoCL\n\n> Attacks."), md(
            "Uses `Linf` and `Linf.project()`, [the ball](../1_foundations/10_balls.ipynb#the-ball), "
            "Eq. (1) of [Balls](../1_foundations/10_balls.ipynb), [settings](../../settings.ini).")]})
    balls, rocl = (Page(project, s) for s in project.sources.values())
    text = balls.markdown()
    assert '??? abstract "Imports"' in text and '```python title="advssl/threat.py"\n@dataclass' in text
    assert '<div class="api" markdown="1">\n\n### `Linf` { #linf }' in text and "#### `Linf.project` { #linf.project }" in text
    assert "| Parameter | Type | Default | Meaning |" in text and "| `eps` | `float` |  | radius, in &#123;8/255} |" in text
    assert "| *returns* | `Tensor` |  | inside |" in text and "Nearest point, see [`step`](#step)." in text
    assert "Ball of [Eq. (1)](#eq-1)." in text
    text = rocl.markdown()
    page = "../1_foundations/balls.md"
    assert f"[`Linf`]({page}#linf) and [`Linf.project()`]({page}#linf.project), [the ball]({page}#the-ball)" in text
    assert f"[Eq. (1)]({page}#eq-1) of [Balls]({page})" in text and "/blob/main/settings.ini)" in text
    assert not project.problems
    assert build.navigation(project) == [{"Home": "index.md"}, {"1 Foundations": ["1_foundations/balls.md"]},
                                         {"2 Contrastive": ["2_contrastive/rocl.md"]}]


def test_order_is_the_readers(make):
    paths = ["experiments/a.ipynb", "2_b/100_z.ipynb", "2_b/20_y.ipynb", "10_c/1_x.ipynb", "index.ipynb", "2_b/_no.ipynb"]
    found = [p.removeprefix("nbs/") for p in make({p: [HEAD] for p in paths}).sources]
    assert found == ["index.ipynb", "2_b/20_y.ipynb", "2_b/100_z.ipynb", "10_c/1_x.ipynb", "experiments/a.ipynb"]


def test_readme_of_a_small_index(make):
    project = make({"index.ipynb": [
        md("# advssl\n\n> Learn.\n\nRead [balls](1_foundations/10_balls.ipynb), [licence](../LICENSE), [site](https://example.org)."),
        code("#| hide\nimport x"), code("#| code-fold: true\nprint(1)", printed("1\n")),
        code('#| fig-cap: "A line."\n#| label: fig-l\nplot()', result(image_png=png(8, 100)))]})
    files = build.readme(project)
    text = files["README.md"].decode()
    assert "(nbs/1_foundations/10_balls.ipynb), [licence](LICENSE), [site](https://example.org)" in text
    assert "```python\nprint(1)\n```\n\n```text\n1\n```" in text and "import x" not in text and "#|" not in text
    assert "![A line.](docs/readme/fig-l.png)" in text and "docs/readme/fig-l.png" in files
    assert build.main(["--check-readme", "--root", str(project.root)]) == 1
    assert build.main(["--readme", "--root", str(project.root)]) == 0
    assert build.main(["--check-readme", "--root", str(project.root)]) == 0


@pytest.mark.skipif(not (ROOT / "nbs/index.ipynb").exists(), reason="no index notebook yet")
def test_readme_is_the_index_notebook():
    for path, content in build.readme(Project(ROOT)).items():
        assert (ROOT / path).read_bytes() == content, f"{path}: run python docs/build.py --readme"


def test_results_page_needs_nothing_and_shows_what_is_there(make, tmp_path):
    project = make({"index.ipynb": [HEAD]})
    build.extras(project)
    assert not [s for s in project.sources if "figures" in s]
    folder = tmp_path / "figures/demo"
    folder.mkdir(parents=True)
    (folder / "cost.md").write_text("# Cost\n\n| a |\n|---|\n| 1 |\n")
    (folder / "robustness.svg").write_text('<svg width="72pt"></svg>')
    (folder / "robustness.provenance.json").write_text('{"caption": "Accuracy.", "seeds": [0, 1], "code": "%s"}' % ("ab" * 32))
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\nEq. (9) of [balls](nbs/index.ipynb).")
    build.extras(project)
    assert build.navigation(project)[1:] == [{"Results": ["results/demo.md"]}, {"Project": ["changelog.md"]}]
    assert "[balls](index.md)" in Page(project, project.sources["CHANGELOG.md"]).markdown()
    page = Page(project, project.sources["figures/demo/index.md"])
    text = page.markdown()
    assert "## Cost\n\n### Cost\n\n| a |" in text and "**Figure 1.** Accuracy." in text and "| seeds | 0, 1 |" in text
    assert "```" not in text, "a table in the box is code"
    assert "| code | abababababab |" in text and list(page.assets) == ["results/demo_files/robustness.svg"] and not project.problems


def built(project: Project) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "docs/build.py"), "--root", str(project.root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_build_is_strict(make):
    pytest.importorskip("material")
    good = [HEAD, md("## One\n\n[down](#one) [over](20_next.ipynb#two)\n\n$$a\\tag{1}$$\n\nEq. (1)")]
    following = [md("# Next\n\n> Page."), md("## Two\n\nText.")]
    made = built(make({"1_foundations/10_balls.ipynb": good, "1_foundations/20_next.ipynb": following}))
    assert made.returncode == 0, made.stderr
    following[1] = md("## Three\n\nText.")
    made = built(make({"1_foundations/20_next.ipynb": following}))
    assert made.returncode == 1 and "does not contain an anchor '#two'" in made.stderr and "10_balls.ipynb" in made.stderr
    assert "1 problem(s)" in made.stderr


# The real site, in a browser.
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    out = tmp_path_factory.mktemp("site")
    made = subprocess.run([sys.executable, str(ROOT / "docs/build.py"), "--site", str(out), "--pages", str(out) + "-md"],
                          capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return out


def test_the_whole_site_builds_strictly(site):
    assert (site / "index.html").exists() and (site / "search/search_index.json").stat().st_size > 100_000


@pytest.fixture(scope="module")
def served(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM: pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, request):
    "A fresh visitor; `indirect` chooses the colour scheme."
    context = browser.new_context(viewport={"width": 1360, "height": 900}, color_scheme=getattr(request, "param", "light"))
    yield context.new_page()
    context.close()


LOOK = """() => ({
  unset: [...document.querySelectorAll('.arithmatex')].filter(n => !n.querySelector('.katex')).length,
  errors: document.querySelectorAll('.katex-error').length,
  blank: [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src),
})"""

# A page as it is served, parsed and its equations set, but not laid out: that takes seconds, and nothing here looks at it.
READ = r"""async (url) => {
  const page = new DOMParser().parseFromString(await (await fetch(url)).text(), 'text/html');
  const all = (what) => [...page.querySelectorAll(what)], at = (path) => new URL(path, url).href, errors = [];
  const tex = all('.arithmatex').map(n => n.textContent.trim());
  for (const t of tex) {
    try { katex.renderToString(t.slice(2, -2), { displayMode: t.startsWith('\\[') }); } catch (e) { errors.push(e.message); }
  }
  const prose = all('article :is(p, li, td, figcaption, h1, h2, h3, h4)').map(n => {
    const copy = n.cloneNode(true);
    copy.querySelectorAll('code, pre, .arithmatex').forEach(x => x.remove());
    return copy.textContent;
  });
  return {
    displays: tex.filter(t => t.startsWith('\\[')).length, errors, ids: all('[id]').map(n => n.id), prose: prose.join('\n'),
    links: all('a[href]').map(n => at(n.getAttribute('href'))), images: all('img').map(n => at(n.getAttribute('src'))),
    loads: [...all('script[src]').map(n => at(n.getAttribute('src'))), ...all('link[rel=stylesheet]').map(n => at(n.getAttribute('href')))],
  };
}"""

BLANK = """async (urls) => {
  const blank = [];
  for (const url of urls) { const image = new Image(); image.src = url; try { await image.decode(); } catch { blank.push(url); } }
  return blank;
}"""


@pytest.mark.browser
def test_every_page_reads_well(site, served, tab):
    noise, foreign = [], []
    tab.on("console", lambda m: noise.append(f"{tab.url}: {m.text}") if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: noise.append(f"{tab.url}: {e}"))
    tab.on("response", lambda r: noise.append(f"{tab.url}: {r.status} {r.url}") if r.status >= 400 else None)
    tab.on("request", lambda r: foreign.append(r.url) if not r.url.startswith((served, "data:", "blob:")) else None)
    urls = [f"{served}/{f.relative_to(site).as_posix()}" for f in sorted(site.rglob("*.html")) if f.name != "404.html"]
    for url in {url.rpartition("/")[0]: url for url in urls}.values():  # one page of every folder, as a visitor sees it
        tab.goto(url)
        look = tab.evaluate(LOOK)
        assert not any(look.values()), f"{url}: {look}"
    looks = {url: tab.evaluate(READ, url) for url in urls}
    blank = tab.evaluate(BLANK, sorted({image for look in looks.values() for image in look["images"]}))
    assert not blank, f"images that did not load: {blank}"
    project = Project(ROOT)
    build.extras(project)
    assert len(looks) == len(project.sources) + (not (ROOT / "nbs/index.ipynb").exists())
    ids, there = {url: set(look["ids"]) for url, look in looks.items()}, lambda url: (site / url.removeprefix(f"{served}/")).is_file()
    for url, look in looks.items():
        assert not look["errors"], f"{url}: equations that KaTeX could not set: {look['errors']}"
        assert not re.search(r"\$\$|\\tag|\\frac|\$[^\s$]+\$", look["prose"]), f"{url}: raw mathematics in the text"
        assert all(map(there, look["loads"])), f"{url}: {look['loads']}"
        for link in look["links"]:
            page, _, anchor = link.partition("#")
            if not page.startswith(served): continue
            page = page + "index.html" if page.endswith("/") else page
            assert page in ids or there(page), f"{url}: {link} leads nowhere"
            assert not anchor or anchor in ids[page], f"{url}: no {anchor} in {page}"
    for source in project.sources.values():
        shown = sum(c.source.count("$$") // 2 for c in source.cells if c.kind == "markdown")
        url = f"{served}/{source.target.replace('.md', '.html')}"
        assert looks[url]["displays"] == shown, f"{source.path}: {shown} equations, {looks[url]['displays']} on the page"
    assert not noise and not foreign, (noise, foreign)


@pytest.mark.browser
def test_search_finds_a_page(served, tab):
    titles = [re.search(r"^# (.+)$", c.source, re.MULTILINE)[1] for s in Project(ROOT).sources.values()
              for c in s.cells if c.kind == "markdown" and c.source.startswith("# ")]
    wanted = next((t for t in titles if "RoCL" in t), titles[-1])
    tab.goto(served + "/index.html")
    tab.click("label.md-search__icon[for=__search], .md-search__input")
    tab.fill(".md-search__input", "RoCL" if "RoCL" in wanted else wanted)
    tab.wait_for_selector(".md-search-result__item")
    found = tab.inner_text(".md-search-result__list")
    assert wanted.lower() in found.lower()


@pytest.mark.browser
@pytest.mark.parametrize("tab", ["dark"], indirect=True)
def test_dark_scheme_keeps_figures_on_white(site, served, tab):
    page = next((p for p in sorted(site.rglob("*.html")) if "<figure" in p.read_text(encoding="utf-8")), None)
    if not page: pytest.skip("no figure on the site yet")
    tab.goto(f"{served}/{page.relative_to(site).as_posix()}")
    assert tab.evaluate("document.body.dataset.mdColorScheme") == "slate"
    assert tab.evaluate("getComputedStyle(document.querySelector('figure img')).backgroundColor") == "rgb(255, 255, 255)"
