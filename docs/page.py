"""A notebook to the site's Markdown. Problems are collected, each with its notebook and cell, and end the build."""

import base64
import os.path
import re
import struct
from urllib.parse import unquote

import api
import prose
from project import Cell, Project, Source

PLOT = re.compile(r"^(?:\w.*=\s*)?plt\.(?:subplots|figure|plot|imshow|show|scatter)\(", re.MULTILINE)
IMAGES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}
ANSI = re.compile(r"\x1B(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")


class Page:
    "One page in the making; `prose` calls back for links, citations and figures."

    def __init__(self, project: Project, source: Source):
        self.project, self.source = project, source
        self.assets: dict[str, bytes] = {}  # path in the site -> content
        self.figures: dict[str, int] = {}  # id -> number
        self.level = 1  # of the heading above
        self.cell = Cell(0, "markdown", "")  # the one being written, for messages
        notebook = source.path.endswith(".ipynb")
        found = [t for c in source.cells if c.kind == "markdown" for t in prose.tags(c.source)]
        self.tags = set(found) if notebook else None
        for n in sorted({t for t in found if found.count(t) > 1}) if notebook else ():
            self.problem(f"\\tag{{{n}}} stands on more than one equation of this page", whole=True)
        self.shown = {c.source.split("(", 1)[1].rstrip(" ;)").split(",")[0] for c in source.cells if _shows(c)}

    def problem(self, text: str, whole: bool = False) -> None:
        where = "" if whole else f', cell {self.cell.number} ("{self.cell.source.strip()[:40].splitlines()[0]}...")'
        message = f"{self.source.path}{where}: {text}"
        if message not in self.project.problems: self.project.problems.append(message)

    def markdown(self) -> str:
        parts, write = [], self.head  # the first text is the page's head
        for cell in self.source.cells:
            self.cell = cell
            if cell.kind == "markdown" and cell.source.strip():
                if cell.source.count("$$") % 2: self.problem("an equation is opened with $$ and not closed")
                parts.append(write(cell.source.strip()))
                write = self.text
            elif cell.kind == "code" and not cell.hidden:
                parts += self.code(cell)
        if write == self.head: self.problem("no title: the first cell must open with '# Title' and '> subtitle'", whole=True)
        return re.sub(r"\0(fig-[\w-]+)\0", self.number, "\n\n".join(x for x in parts if x) + "\n")

    def number(self, m: re.Match) -> str:
        if m[1] not in self.figures: self.problem(f"cites @{m[1]}, but no figure of this page has that label", whole=True)
        return str(self.figures.get(m[1], "?"))

    def text(self, markdown: str) -> str:
        return prose.prose(markdown, self)

    def head(self, text: str) -> str:
        "Title, subtitle and the two buttons of a notebook."
        m = re.match(r"# (?P<title>[^\n]+)\n*(?:> (?P<lead>[^\n]+(?:\n> [^\n]+)*))?(?P<rest>.*)", text, re.DOTALL)
        if not m:
            self.problem("no title: the first cell must open with '# Title' and '> subtitle'")
            return self.text(text)
        lead = (m["lead"] or "").replace("\n> ", " ")
        parts = [f"# {m['title']}"]
        if lead: parts.append(prose.inline(lead, self) + "\n{ .lead }")
        if self.source.path.endswith(".ipynb"):
            links = [("Open in Colab", self.project.colab(self.source.path)), ("View source", self.blob(self.source.path))]
            parts.append(" ".join(f"[{name}]({url}){{ .button }}" for name, url in links if url))
        return "\n\n".join([*parts, self.text(m["rest"].strip())])

    # What prose.py asks of a page.
    def link(self, url: str, image: bool = False) -> str:
        path, _, anchor = url.partition("#")
        if path.startswith(self.project.site):  # as nbdev writes them
            return self.to(path.removeprefix(self.project.site).replace(".html", ".md") or "index.md") + f"#{anchor}"
        if not path or re.match(r"[a-z][a-z0-9+.-]*:", url):
            if image: self.problem(f"the image {url} lies on another host: keep it in the project")
            return url
        path = os.path.normpath(os.path.join(os.path.dirname(self.source.path), unquote(path)))
        if path in self.project.sources:
            return self.to(self.project.sources[path].target) + (f"#{anchor}" if anchor else "")
        file = self.project.root / path
        if not file.exists() or path.startswith(".."):
            self.problem(f"links to {url}, but there is no {path}")
            return "#"
        if not image: return self.blob(path) + (f"#{anchor}" if anchor else "")
        return self.asset(os.path.basename(path), file.read_bytes())

    def to(self, target: str) -> str:
        return os.path.relpath(target, os.path.dirname(self.source.target) or ".")

    def blob(self, path: str) -> str:
        return f"{self.project.git}/{'tree' if (self.project.root / path).is_dir() else 'blob'}/{self.project.branch}/{path}"

    def asset(self, name: str, content: bytes) -> str:
        path = f"{self.source.target.removesuffix('.md')}_files/{name}"
        self.assets[path] = content
        return self.to(path)

    def symbol(self, name: str) -> str:
        here = {n.name for s in self.source.symbols for n in (s, *s.methods)}
        if name in here: return f"#{name.lower()}"
        target = self.project.index.get(name)
        return self.to(target) if target and target != self.source.target else ""

    def figure(self, caption: str, path: str, label: str = "", width: int | None = None) -> str:
        number = len(self.figures) + 1
        label = label or f"fig-{number}"
        if label in self.figures: self.problem(f"a second figure is labelled {label}")
        self.figures[label] = number
        if not caption.strip(): self.problem('a figure without a caption: add `#| fig-cap: "..."` to its cell, or write ![caption](path)')
        alt = re.sub(r"[\[\]$`*\\{}\"]", "", caption)
        size = f'{{ width="{width}" }}' if width else ""
        return (f'<figure id="{label}" markdown="1">\n\n![{alt}]({path}){size}\n\n'
                f'<figcaption markdown="span">**Figure {number}.** {prose.inline(caption, self)}</figcaption>\n\n</figure>')

    # Code cells.
    def code(self, cell: Cell) -> list[str]:
        prose.check_code(cell.source, self)
        if _shows(cell): return [self.explicit(cell)]
        parts = [self.card(s) for s in cell.symbols if s.name not in self.shown]
        if cell.source.strip() and not cell.says("echo", "false"): parts.append(self.listing(cell))
        if not cell.says("output", "false"): parts += self.outputs(cell)
        return parts

    def listing(self, cell: Cell) -> str:
        title = self.project.module_file(self.source.module) if cell.exported and self.source.module else ""
        text = fence(cell.source.strip("\n"), "python", title=title)
        fold, summary = cell.directives.get("code-fold", ""), cell.directives.get("code-summary", "Code")
        if not fold and cell.exported and api.only_imports(cell.source): fold, summary = "true", "Imports"
        if fold not in ("true", "show"): return text
        return f'???{"+" if fold == "show" else ""} abstract "{summary}"\n\n' + prose.indented(text)

    def explicit(self, cell: Cell) -> str:
        name = re.match(r"show_doc\(([\w.]+)", cell.source.strip())[1]
        for source in (self.source, *self.project.sources.values()):
            for s in source.symbols:
                for found in (s, *s.methods):
                    if found.name == name: return self.card(found, source)
        self.problem(f"show_doc({name}): no exported cell defines it")
        return ""

    def card(self, symbol: api.Symbol, source: Source | None = None) -> str:
        "Name, call, docstring and a row per parameter; then the same, smaller, for each method."
        source = source or self.source
        if re.search(r"<\w", re.sub(r"`[^`]+`", "", symbol.doc)):
            self.problem(f"the docstring of {symbol.name} has a < that reads as markup: put it between backticks")
        level = "#" * (min(self.level + 1, 5) + symbol.name.count("."))
        name, _, _ = symbol.name.partition(".")
        line = self.line(source.module, name)
        link = f"[source]({self.blob(line)}){{ .source }}\n\n" if line and "." not in symbol.name else ""
        methods = [self.card(m, source) for m in symbol.methods if m.name not in self.shown]
        body = "\n\n".join(x for x in (
            f"{level} `{symbol.name}` {{ #{symbol.anchor} }}", link + fence(symbol.signature, "python", "signature"),
            self.text(symbol.doc), self.table(symbol.rows), *methods) if x)
        return body if "." in symbol.name else f'<div class="api" markdown="1">\n\n{body}\n\n</div>'

    def line(self, module: str, name: str) -> str:
        path = self.project.module_file(module)
        file = self.project.root / path
        if not file.exists(): return ""
        lines = file.read_text(encoding="utf-8").splitlines()
        at = next((i for i, x in enumerate(lines, 1) if re.match(rf"(?:async )?(?:def|class) {name}\b", x)), None)
        return f"{path}#L{at}" if at else ""

    def table(self, rows: list[api.Row]) -> str:
        if not rows: return ""
        columns = [c for c in ("type", "default") if any(getattr(r, c) for r in rows)]
        lines = [["Parameter", *(c.capitalize() for c in columns), "Meaning"], ["---"] * (2 + len(columns))]
        for r in rows:
            name = f"*{r.name}*" if r.name == "returns" else f"`{r.name}`"
            values = [f"`{getattr(r, c)}`" if getattr(r, c) else "" for c in columns]
            lines.append([name, *values, prose.inline(plain(r.note), self)])
        return "\n".join("| " + " | ".join(x) + " |" for x in lines)

    # Outputs.
    def outputs(self, cell: Cell) -> list[str]:
        parts, drawn = [], False
        for output in cell.outputs:
            if output["output_type"] == "stream":
                parts.append(shown(output["text"], output["name"]))
            elif output["output_type"] == "error":
                parts.append(shown(output.get("traceback") or [f"{output['ename']}: {output['evalue']}"], "error"))
            else:
                text, image = self.data(output["data"], cell, drawn)
                parts, drawn = [*parts, text], drawn or image
        plots = "fig-cap" in cell.directives or (PLOT.search(cell.source) and not cell.outputs)
        if plots and not drawn and not cell.says("eval", "false"):
            self.problem("a plotting cell without its stored figure: run the notebook and save it with its outputs")
        return parts

    def data(self, data: dict, cell: Cell, drawn: bool) -> tuple[str, bool]:
        "The richest form of a result, and whether it was an image."
        for kind, ending in IMAGES.items():
            if kind not in data: continue
            raw = "".join(data[kind])
            content = raw.encode() if ending == "svg" else base64.b64decode(raw)
            label = cell.directives.get("label", "") if not drawn else ""
            name = f"{label or f'fig-{len(self.figures) + 1}'}.{ending}"
            return self.figure(cell.directives.get("fig-cap", ""), self.asset(name, content), label, width(content)), True
        if "text/markdown" in data: return self.text("".join(data["text/markdown"])), False
        if "text/html" in data: return html("".join(data["text/html"])), False
        if "text/latex" in data: return self.text("".join(data["text/latex"])), False
        text = "".join(data.get("text/plain", ""))
        if re.search(r"<[\w. ]+ at 0x[0-9a-f]+>", text):
            self.problem(f"the output {text[:60]} differs from run to run: end the cell's last line with ;")
        return shown(text), False


def _shows(cell: Cell) -> bool:
    return cell.kind == "code" and cell.source.strip().startswith("show_doc(")


def fence(text: str, language: str, *classes: str, title: str = "") -> str:
    "A code block that no run of backticks inside it can close."
    ticks = "`" * (1 + max([2, *(len(x) for x in re.findall(r"^\s*(`{3,})", text, re.MULTILINE))]))
    info = "{ " + " ".join(f".{c}" for c in (language, *classes)) + " }" if classes else language
    return f'{ticks}{info}{f" title={chr(34)}{title}{chr(34)}" if title else ""}\n{text}\n{ticks}'


def shown(text: str | list[str], *classes: str) -> str:
    text = ANSI.sub("", "".join(text)).rstrip()
    return fence(text, "text", "output", *classes, "no-copy") if text else ""


def html(text: str) -> str:
    "A table of a data frame, without the notebook's own styling."
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<table[^>]*class="dataframe[^>]*>', "<table>", text)
    text = re.sub(r"\n\s*\n", "\n", text.strip())
    return f'<div class="output-html">\n{text}\n</div>'


def plain(comment: str) -> str:
    "A code comment is not Markdown: only `code` and $math$ keep their meaning."
    parts = re.split(r"(`[^`]+`|\$[^$\s](?:[^$]*[^$\s])?\$)", comment)
    escape = {"{": "&#123;", "<": "&lt;", "*": "&#42;", "|": "&#124;", "_": "&#95;", "[": "&#91;", "$": "&#36;"}
    return "".join(x if i % 2 else re.sub(r"[{<*|_\[$]", lambda m: escape[m[0]], x) for i, x in enumerate(parts))


def width(content: bytes) -> int | None:
    "Width in CSS pixels: 100 to the inch of the figure, whatever resolution it was drawn with."
    if content[:4] == b"\x89PNG":
        pixels, at = struct.unpack(">I", content[16:20])[0], content.find(b"pHYs")
        per_metre = struct.unpack(">I", content[at + 4:at + 8])[0] if at > 0 else 3937
        return round(pixels * 100 / max(per_metre * 0.0254, 50))
    points = re.search(rb'<svg[^>]*?\swidth="([\d.]+)pt"', content)
    return round(float(points[1]) * 100 / 72) if points else None
