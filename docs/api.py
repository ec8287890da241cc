"""The public definitions of an exported cell, read from its source: nothing is imported or run.

A parameter's note is the comment on its line, or the comment lines right above it (nbdev's docments)."""

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import dataclass, field

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Row:
    name: str
    type: str = ""
    default: str = ""
    note: str = ""


@dataclass
class Symbol:
    name: str  # qualified within the module: "Linf" or "Linf.project"
    signature: str
    doc: str
    rows: list[Row] = field(default_factory=list)  # empty when no parameter has a note
    methods: list["Symbol"] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return self.name.lower()  # what nbdev writes in its links


def symbols(source: str) -> list[Symbol]:
    "Public functions and classes defined at the top level of a cell, in order."
    cell = Cell(source)
    return [cell.symbol(node) for node in cell.tree.body
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")]


def only_imports(source: str) -> bool:
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)


class Cell:
    def __init__(self, source: str):
        self.lines, self.tree = source.encode().splitlines(), ast.parse(source)
        comments = {t.start[0]: t.string.lstrip("# ").strip()
                    for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
        self.notes, above = {}, []  # line -> its comment, else the comment lines directly above it
        for i, line in enumerate(source.splitlines(), 1):
            if line.lstrip().startswith("#"):
                above.append(comments[i])
                continue
            self.notes[i] = comments.get(i) or " ".join(above)
            above = []

    def text(self, node: ast.AST | None) -> str:
        "The node as its author wrote it, on one line."
        if node is None: return ""
        lines = self.lines[node.lineno - 1:node.end_lineno]
        lines[-1] = lines[-1][:node.end_col_offset]
        lines[0] = lines[0][node.col_offset:]
        return " ".join(b" ".join(lines).decode().split())

    def symbol(self, node: Function | ast.ClassDef, owner: str = "") -> Symbol:
        name = f"{owner}.{node.name}" if owner else node.name
        doc = inspect.cleandoc(ast.get_docstring(node) or "")
        if isinstance(node, ast.ClassDef): return self.class_(node, name, doc)
        back = self.text(node.returns)
        if any(self.text(d) in ("property", "cached_property") for d in node.decorator_list):
            return Symbol(name, f"{name}: {back}" if back else name, doc)
        rows, shape = self.parameters(node, method=bool(owner))
        signature = _signature(name, rows, shape, f" -> {back}" if back else "")
        if node.returns and self.notes[node.returns.lineno]:
            rows.append(Row("returns", back, "", self.notes[node.returns.lineno]))
        return Symbol(name, signature, doc, _noted(rows))

    def class_(self, node: ast.ClassDef, name: str, doc: str) -> Symbol:
        bases = ", ".join(self.text(b) for b in node.bases)
        init = next((n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None)
        rows, shape = [], []
        if init:
            rows, shape = self.parameters(init, method=True)
            doc = doc or inspect.cleandoc(ast.get_docstring(init) or "")
        elif bases == "NamedTuple" or any("dataclass" in self.text(d) for d in node.decorator_list):
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            rows = [Row(n.target.id, self.text(n.annotation), self.text(n.value), self.notes[n.lineno]) for n in fields]
            shape = [r.name for r in rows]
        call = _signature(name, rows, shape) if shape else f"{name}({bases})" if bases else name
        methods = [self.symbol(n, name) for n in node.body if isinstance(n, Function) and not n.name.startswith("_")]
        return Symbol(name, f"class {call}", doc, _noted(rows), [m for m in methods if m.doc or m.rows])

    def parameters(self, node: Function, method: bool) -> tuple[list[Row], list[str]]:
        "The rows of the table, and the names as they stand in a call, with the bare `*` and `/`."
        a = node.args
        positional = [*a.posonlyargs, *a.args]
        defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
        found = [(p, p.arg, d) for p, d in zip(positional, defaults, strict=True)]
        if method and found and found[0][1] in ("self", "cls"): found = found[1:]
        if a.vararg: found.append((a.vararg, f"*{a.vararg.arg}", None))
        found += [(p, p.arg, d) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
        if a.kwarg: found.append((a.kwarg, f"**{a.kwarg.arg}", None))
        owner = {p.lineno: name for p, name, _ in found}  # several on a line: the comment is the last one's
        if node.returns: owner[node.returns.lineno] = "returns"
        rows = [Row(name, self.text(p.annotation), self.text(d), self.notes[p.lineno] if owner[p.lineno] == name else "")
                for p, name, d in found]
        shape = [r.name for r in rows]
        if a.kwonlyargs and not a.vararg: shape.insert(shape.index(a.kwonlyargs[0].arg), "*")
        if a.posonlyargs and a.posonlyargs[-1].arg in shape: shape.insert(shape.index(a.posonlyargs[-1].arg) + 1, "/")
        return rows, shape


def _noted(rows: list[Row]) -> list[Row]:
    return rows if any(r.note for r in rows) else []


def _signature(name: str, rows: list[Row], shape: list[str], back: str = "", width: int = 88) -> str:
    "The call as one writes it. Types stand in the table; without a table they stand here."
    types, parts = not _noted(rows), []
    for p in shape:
        row = next((r for r in rows if r.name == p), Row(p))
        typed = f"{p}: {row.type}" if types and row.type else p
        equals = " = " if typed != p else "="
        parts.append(f"{typed}{equals}{row.default}" if row.default else typed)
    line = f"{name}({', '.join(parts)}){back}"
    if len(line) <= width: return line
    lines = textwrap.wrap(" ".join(p.replace(" ", "\0") + "," for p in parts), width - 4, break_on_hyphens=False)
    return f"{name}(\n    " + "\n    ".join(lines).replace("\0", " ") + f"\n){back}"
