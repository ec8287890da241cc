"""Builds the documentation: notebooks -> _md/ -> _site/, with nothing fetched from anywhere.

python docs/build.py [--serve] | --readme | --check-readme
"""

import argparse
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from page import Page, fence  # noqa: E402
from project import Project  # noqa: E402

os.environ["NO_MKDOCS_2_WARNING"] = "1"  # a notice of the theme about its successor


class Broken(Exception):
    "What is wrong, a line each."


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def convert(project: Project, out: Path) -> None:
    "All pages as Markdown under `out`."
    extras(project)
    targets: dict[str, str] = {}
    shutil.rmtree(out, ignore_errors=True)
    for source in project.sources.values():
        if other := targets.get(source.target): project.problems.append(f"{source.path}: same page as {other}")
        targets[source.target] = source.path
        page = Page(project, source)
        write(out / source.target, page.markdown())
        for path, content in page.assets.items(): write(out / path, content)
    if "index.md" not in targets: write(out / "index.md", f"# {project.settings['title']}\n")


def navigation(project: Project) -> list:
    "Sections are folders, in reading order; titles of pages come from their H1."
    nav: list = [{"Home": "index.md"}]
    sections: dict[str, list] = {}
    for source in project.sources.values():
        folder, _, name = source.target.rpartition("/")
        if source.target == "index.md": continue
        if source.path.endswith(".ipynb"):
            words = re.sub(r"^(\d+)_", r"\1 ", folder).replace("_", " ")
            title = re.sub(r"^[\d ]*[a-z]", lambda m: m[0].upper(), words)  # 1_foundations -> 1 Foundations
        else: title = "Results" if folder == "results" else "Project"
        if title not in sections: nav.append({title: sections.setdefault(title, [])})
        sections[title].append(source.target)
    return nav


def extras(project: Project) -> None:
    "Pages that are not notebooks."
    results(project)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        file = project.root / name
        if file.exists(): project.add(name, name.lower(), file.read_text(encoding="utf-8"))


def results(project: Project) -> None:
    "A page per scale from figures/<scale>/: each target's table and figure, and how they came about."
    for folder in sorted(p for p in (project.root / "figures").glob("*") if p.is_dir()):
        names = sorted({p.name.split(".")[0] for p in folder.iterdir() if p.suffix in (".md", ".svg")})
        parts = ["# Benchmarks" if folder.name == "bench" else f"# Results: {folder.name} scale"]
        for name in names:
            parts.append(f"## {name.replace('_', ' ').capitalize()}")
            table, sidecar = folder / f"{name}.md", folder / f"{name}.provenance.json"
            facts = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.exists() else {}
            if (folder / f"{name}.svg").exists(): parts.append(f"![{facts.get('caption', name)}]({name}.svg)")
            if table.exists(): parts.append(re.sub(r"^#", "###", table.read_text(encoding="utf-8"), flags=re.MULTILINE))
            rows = "\n".join(f"| {k} | {summary(v)} |" for k, v in facts.items() if k != "caption")
            made = f"<summary>How it was made</summary>\n\n| | |\n|---|---|\n{rows}"
            if rows: parts.append(f'<details class="abstract" markdown="1">\n{made}\n\n</details>')
        if names: project.add(f"figures/{folder.name}/index.md", f"results/{folder.name}.md", "\n\n".join(parts))


def summary(value) -> str:
    "A value of the sidecar in a cell of a table; long lists and hashes are cut."
    if isinstance(value, dict): text = ", ".join(f"{k} {summary(v)}" for k, v in list(value.items())[:8])
    elif isinstance(value, list): text = ", ".join(summary(v) for v in value[:8]) + (f" ... ({len(value)})" if len(value) > 8 else "")
    else: text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{32,}", text) else text.replace("|", "/")


def readme(project: Project) -> dict[str, bytes]:
    "README.md and its images, from the index notebook, for a reader of the repository."
    path = f"{project.settings['nbs_path']}/{project.settings['readme_nb']}"
    files: dict[str, bytes] = {}
    parts = [f"<!-- Made from {path} by docs/build.py: edit the notebook. -->"]

    def relink(m: re.Match) -> str:
        if re.match(r"[a-z]+:|#", m[2]): return m[0]
        return f"{m[1]}({os.path.normpath(os.path.join(os.path.dirname(path), m[2]))})"

    for cell in project.sources[path].cells:
        if cell.kind == "markdown": parts.append(re.sub(r"(\[[^\]]*\])\(([^()\s]+)\)", relink, cell.source.strip()))
        if cell.kind != "code" or cell.hidden: continue
        if cell.source.strip() and not cell.says("echo", "false"): parts.append(fence(cell.source.strip("\n"), "python"))
        for output in cell.outputs if not cell.says("output", "false") else ():
            page = Page(project, project.sources[path])
            page.cell, data = cell, output.get("data", {})
            if "image/png" in data or "image/svg+xml" in data:
                page.data(data, cell, False)
                name, content = next(iter(page.assets.items()))
                files[f"docs/readme/{os.path.basename(name)}"] = content
                parts.append(f"![{cell.directives.get('fig-cap', '')}](docs/readme/{os.path.basename(name)})")
            elif text := data.get("text/markdown"): parts.append("".join(text).strip())
            elif text := output.get("text") or data.get("text/plain"): parts.append(fence("".join(text).rstrip(), "text"))
    files["README.md"] = ("\n\n".join(parts) + "\n").encode()
    return files


def site(project: Project, pages: Path, out: Path) -> None:
    "The pages as a site. Every warning of MkDocs (a link or an anchor that leads nowhere) is a problem."
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    for name in ("mkdocs", "material"): logging.getLogger(name).setLevel(logging.WARNING)
    found = Collector(project)
    logging.getLogger("mkdocs").addHandler(found)
    text = {k: project.settings[k] for k in ("title", "description", "author", "copyright")}
    config = load_config(
        str(HERE.parent / "mkdocs.yml"), docs_dir=str(pages), site_dir=str(out), nav=navigation(project),
        site_name=text["title"], site_description=text["description"], site_author=text["author"],
        site_url=project.site, copyright="Copyright " + text["copyright"])
    config.extra["social"] = [{"icon": "fontawesome/brands/git-alt", "link": project.git, "name": "Source"}]
    try: build(config)
    finally: logging.getLogger("mkdocs").removeHandler(found)


class Collector(logging.Handler):
    "MkDocs' warnings, with the notebook's name instead of the page's."

    def __init__(self, project: Project):
        super().__init__(logging.WARNING)
        self.problems = project.problems
        self.sources = {source.target: source.path for source in project.sources.values()}

    def emit(self, record: logging.LogRecord) -> None:
        text = re.sub(r"'([^']+\.md)'", lambda m: f"'{self.sources.get(m[1], m[1])}'", record.getMessage())
        self.problems.append(text)


def build_all(root: Path, pages: Path, out: Path) -> None:
    "Every problem of every page is told at once."
    start = time.perf_counter()
    project = Project(root)
    convert(project, pages)
    site(project, pages, out)
    if project.problems: raise Broken("\n".join(project.problems))
    print(f"{len(project.sources)} pages in {time.perf_counter() - start:.1f} s: {out}")


def serve(root: Path, pages: Path, out: Path, port: int) -> None:
    "The site on this machine, built again whenever a notebook, a style or a setting changes."
    handler = partial(SimpleHTTPRequestHandler, directory=str(out))
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)")
    seen = 0.0
    while True:
        files = [*(root / "nbs").rglob("*.ipynb"), *(root / "figures").rglob("*"), *HERE.rglob("*.*"), *root.glob("*.*")]
        newest = max(f.stat().st_mtime for f in files if f.is_file())
        if newest > seen:
            seen = newest
            try: build_all(root, pages, out)
            except Broken as e: print(e, file=sys.stderr)
        time.sleep(1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="build, serve on 127.0.0.1 and rebuild on change")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--readme", action="store_true", help="write README.md from the index notebook")
    parser.add_argument("--check-readme", action="store_true", help="exit 1 if README.md is not what --readme would write")
    parser.add_argument("--root", type=Path, default=HERE.parent, help="the project")
    parser.add_argument("--pages", type=Path, help="where the Markdown goes (default: _md in the project)")
    parser.add_argument("--site", type=Path, help="where the site goes (default: _site in the project)")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    pages, out = (args.pages or root / "_md").resolve(), (args.site or root / "_site").resolve()
    try:
        if args.serve: serve(root, pages, out, args.port)
        elif args.readme or args.check_readme:
            for path, content in readme(Project(root)).items():
                file = root / path
                if args.readme: write(file, content)
                elif not file.exists() or file.read_bytes() != content:
                    raise Broken(f"{path} is not what the index notebook says: run python docs/build.py --readme")
        else: build_all(root, pages, out)
    except Broken as e:
        print(f"{e}\n\n{len(str(e).splitlines())} problem(s): the documentation is not fit to be published.", file=sys.stderr)
        return 1
    except KeyboardInterrupt: print()
    return 0


if __name__ == "__main__": sys.exit(main())
