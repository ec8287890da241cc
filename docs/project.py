"""The project as the documentation sees it: settings.ini, the notebooks in reading order, the index of names."""

import configparser
import json
import os.path
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import api


@dataclass
class Cell:
    number: int  # from 1, as a reader counts
    kind: str
    source: str  # without directives
    directives: dict[str, str] = field(default_factory=dict)
    outputs: list[dict] = field(default_factory=list)

    @classmethod
    def read(cls, number: int, raw: dict) -> "Cell":
        source = "".join(raw["source"])
        if raw["cell_type"] != "code": return cls(number, raw["cell_type"], source)
        lines, directives, key = source.splitlines(), {}, ""
        while lines and (not lines[0].strip() or lines[0].startswith("#|")):
            m = re.match(r"#\|(\s*)([\w-]+)(:?)\s*(.*)", lines.pop(0))
            if not m: continue
            if len(m[1]) > 1 and key: directives[key] += " " + m[0][2:].strip()  # a long caption goes on
            else:
                key = m[2]
                directives[key] = m[4].strip()
        code = "\n".join(x for x in lines if not re.search(r"#\|\s*hide_line\s*$", x))
        return cls(number, "code", code, {k: _unquote(v) for k, v in directives.items()}, raw.get("outputs", []))

    def says(self, directive: str, value: str) -> bool:
        return self.directives.get(directive, "").lower() == value

    @property
    def exported(self) -> bool:
        return bool(self.directives.keys() & {"export", "exports", "exporti"})

    @cached_property
    def symbols(self) -> list[api.Symbol]:
        "What the cell gives to the library's users."
        return api.symbols(self.source) if self.exported and not self.hidden and "exporti" not in self.directives else []

    @property
    def hidden(self) -> bool:
        return bool(self.directives.keys() & {"hide", "default_exp"}) or self.says("include", "false")


def _unquote(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"': return value[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    if len(value) > 1 and value[0] == value[-1] == "'": return value[1:-1].replace("''", "'")
    return value


@dataclass
class Source:
    "A notebook, or a Markdown file of one cell, and its place in the site."

    path: str  # from the project's root
    target: str  # in the site's Markdown
    cells: list[Cell]

    @property
    def module(self) -> str:
        return next((c.directives["default_exp"] for c in self.cells if "default_exp" in c.directives), "")

    @cached_property
    def symbols(self) -> list[api.Symbol]:
        return [s for c in self.cells for s in c.symbols]


class Project:
    def __init__(self, root: Path):
        self.root = root
        ini = configparser.ConfigParser(delimiters=["="])
        ini.read(root / "settings.ini", encoding="utf-8")
        self.settings = dict(ini["DEFAULT"])
        self.git, self.branch = self.settings["git_url"].rstrip("/"), self.settings["branch"]
        self.site = self.settings["doc_host"] + self.settings["doc_baseurl"].rstrip("/") + "/"
        self.problems: list[str] = []
        self.sources = {p: self._notebook(p) for p in self._paths()}
        self.index = self._index()

    def add(self, path: str, target: str, text: str) -> None:
        self.sources[path] = Source(path, target, [Cell(1, "markdown", text)])

    def _paths(self) -> list[str]:
        "Notebooks in reading order: an index first, then by number, then by name."
        def order(path: Path) -> list:
            return [(part != "index.ipynb", int(re.match(r"\d*", part)[0] or 10**6), part) for part in path.parts]

        top = self.root / self.settings["nbs_path"]
        found = [p.relative_to(top) for p in top.rglob("*.ipynb") if not re.search(r"(^|/)[_.]", str(p.relative_to(top)))]
        return [f"{self.settings['nbs_path']}/{p.as_posix()}" for p in sorted(found, key=order)]

    def _notebook(self, path: str) -> Source:
        "The site's path is nbdev's: the folder stays, the file loses its number."
        raw = json.loads((self.root / path).read_text(encoding="utf-8"))
        folder, name = os.path.split(os.path.relpath(path, self.settings["nbs_path"]))
        name = re.sub(r"^\d+[a-zA-Z0-9]*_", "", name.lower()).replace(".ipynb", ".md")
        return Source(path, os.path.join(folder, name), [Cell.read(i, c) for i, c in enumerate(raw["cells"], 1)])

    def _index(self) -> dict[str, str]:
        "What a word in backticks may mean -> page and anchor. A name that two modules share links only when qualified."
        index: dict[str, str] = {}
        shared = set()
        for source in self.sources.values():
            if not source.module: continue
            module = f"{self.settings['lib_name']}.{source.module}"
            index[module] = source.target
            for s in source.symbols:
                for name in (s.name, *(m.name for m in s.methods)):
                    target = f"{source.target}#{name.lower()}"
                    if name in index: shared.add(name)
                    index |= {name: target, f"{source.module}.{name}": target, f"{module}.{name}": target}
        return {k: v for k, v in index.items() if k not in shared}

    def module_file(self, module: str) -> str:
        return f"{self.settings['lib_path']}/{module.replace('.', '/')}.py"

    def colab(self, path: str) -> str:
        url = urlsplit(self.git)
        if url.netloc != "github.com": return ""
        return f"https://colab.research.google.com/github{url.path}/blob/{self.branch}/{path}"
