"""Notebook Markdown (CommonMark) to the site's Markdown: lists and notes, equations and their citations, links.

The page is any object with `link(url, image)`, `symbol(name)`, `figure(caption, image)`, `problem(text)` and `tags`
(the numbers of its equations; None switches the check of citations off)."""

import re

NUMBER = r"\(([A-Z]?\d+[a-z]?'?)\)"
CITATION = rf"\bEq(?:s?\.|uations?)\s{NUMBER}(?:(?:,\s(?:and\s)?|\s(?:and|or|to)\s|\s?[-–]\s?){NUMBER})*"
# "the survey's Eq. (1)" or "Chen et al.'s Eq. (2)" is not ours.
FOREIGN = re.compile(r"(?:survey|paper|article|appendix|authors?|et al\.|\b(?!It|That|Let|Here|What)[A-Z][\w-]+)['’]s?\s(?:own\s)?$")
MALFORMED = r"\bEqs?\.?\s?(?:\d|\(\d+\s*[,–-])"
LIST = re.compile(r"(?:[-*+]|\d{1,9}[.)])(?: +|$)")
NOTE = re.compile(r"(?:\*\*(?P<bold>[A-Z][^*\n]{0,70}?)[.:]?\*\*[.:]?|\[!(?P<alert>\w+)\]|(?P<word>[A-Z]\w+):)(?:\s+|$)")
KINDS = {"warning": "warning", "caution": "warning", "danger": "danger", "tip": "tip", "hint": "tip", "example": "example",
         "open question": "question", "question": "question"}

TOKEN = re.compile(
    r"(?P<fence>^[ ]*(?P<ticks>`{3,}|~{3,})[^\n]*\n(?:.*?\n)??[ ]*(?P=ticks)[ ]*$)"
    r"|(?P<heading>^[ ]{0,3}\#{1,6}[ ][^\n]*$)"
    r"|(?P<figure>^!\[(?P<caption>[^\n]*)\]\((?P<path>[^()\s]+)\)[ ]*$)"
    r"|\s*(?P<display>\$\$(?P<tex>.+?)\$\$(?P<stop>[.,;]?))[ \t]*"
    r"|(?P<code>(?P<bt>`+)(?!`)(?P<inner>.+?)(?<!`)(?P=bt)(?!`))"
    r"|(?P<math>(?<!\\)\$(?!\s)(?:\\.|[^\\$])+?(?<!\s)\$)"
    r"|(?P<link>(?P<bang>!?)\[(?P<label>(?:[^\[\]`]|`[^`]*`|\[[^\]]*\])*)\]\((?P<url>[^()\s]+)(?P<title>\s+\"[^\"]*\")?\))"
    r"|(?P<html><(?=[a-zA-Z/!])[^>\n]*>)"
    rf"|(?P<cite>{CITATION})|(?P<malformed>{MALFORMED})"
    r"|(?P<ref>@fig-[\w-]*\w)", re.DOTALL | re.MULTILINE)


def prose(text: str, page) -> str:
    "One Markdown cell."
    parts, fence = [], False  # parts: [is it a quote, its lines]
    for line in restructure(text).splitlines():
        quoted = line.startswith(">") and not fence
        if line.lstrip().startswith(("```", "~~~")): fence = not fence
        if not parts or parts[-1][0] != quoted: parts.append((quoted, []))
        parts[-1][1].append(re.sub(r"^> ?", "", line) if quoted else line)
    done = [_quote("\n".join(lines), page) if quoted else inline("\n".join(lines), page) for quoted, lines in parts]
    return "\n\n".join(x.strip("\n") for x in done)


def _quote(text: str, page) -> str:
    "A quote that opens with a bold title, a word and a colon, or [!WORD] is a note; other quotes stay quotes."
    note = NOTE.match(text)
    if not note: return "\n".join(f"> {x}".rstrip() for x in prose(text, page).splitlines())
    title = note["bold"] or note["word"] or note["alert"].capitalize()
    return f'!!! {KINDS.get(title.lower(), "note")} "{title}"\n\n' + indented(prose(text[note.end():], page))


def restructure(text: str) -> str:
    """What CommonMark allows and Python-Markdown does not: a list or table right after a line of text, items nested by
    2 or 3. Code that is set off by four spaces gets a fence, so that nothing in it is taken for text."""
    out: list[str] = []
    columns: list[int] = []  # where the text of each open list item starts
    fence, code = "", False
    for line in text.splitlines():
        body = line.lstrip(" ")
        indent = len(line) - len(body)
        after_text = bool(out and out[-1].strip())
        if body and indent >= 4 and not columns and not fence and (code or not after_text):
            out += [line[4:]] if code else ["```", line[4:]]
            code = True
            continue
        if body and code:
            _close(out)
            code = after_text = False
        if fence:
            if body.startswith(fence): fence = ""
        elif not body:
            out.append("")
            continue
        else:
            marker = LIST.match(body) if indent - (columns[-1] if columns else 0) < 4 else None
            if marker or not after_text or re.match(r"#{1,6} |>|```|~~~", body):
                while columns and indent < columns[-1]: columns.pop()
            if marker:
                if after_text and not columns and not LIST.match(out[-1].lstrip()): out.append("")
                out.append(" " * 4 * len(columns) + body)
                columns.append(indent + len(marker[0]))
                continue
            if body.startswith(("```", "~~~")): fence = body[:3]
            if body.startswith("|") and after_text and not out[-1].lstrip().startswith("|"): out.append("")
        extra = max(0, indent - (columns[-1] if columns else 0))
        if columns and extra < 4 and not fence: extra = 0
        out.append(" " * (4 * len(columns) + extra) + body)
    if code: _close(out)
    return "\n".join(out)


def _close(out: list[str]) -> None:
    while not out[-1].strip(): out.pop()
    out += ["```", ""]


def inline(text: str, page, links: bool = True) -> str:
    "Everything that is not a block of its own. Without `links` (headings) citations are checked but stay text."

    def token(m: re.Match) -> str:
        return next(handle for kind, handle in HANDLERS.items() if m[kind] is not None)(m, page, links)

    return TOKEN.sub(token, text)


def _keep(m: re.Match, page, links: bool) -> str:
    return m[0]


def _heading(m: re.Match, page, links: bool) -> str:
    marks, title = re.match(r"\s*(#+ )(.*)", m[0]).groups()
    page.level = len(marks) - 1
    return marks + inline(title, page, links=False)


def _display(m: re.Match, page, links: bool) -> str:
    start = m.string.rfind("\n", 0, m.start("display")) + 1
    line = m.string[start:m.start("display")]
    indent = " " * (len(line) - len(line.lstrip()) + (4 if LIST.match(line.lstrip()) else 0))
    anchors = "".join(f'<a id="{anchor(n)}" class="eq"></a>' for n in tags(m["tex"]))
    tex = "\n".join(x for x in f"$$\n{m['tex'].strip()}{m['stop']}\n$$".splitlines() if x.strip())
    return "\n\n" + "\n\n".join(indented(x, indent) for x in (anchors, tex) if x) + "\n\n" + indent


def indented(text: str, by: str = "    ") -> str:
    return "\n".join(by + x if x else "" for x in text.splitlines())


def tags(tex: str) -> list[str]:
    return re.findall(r"\\tag\{([^}]+)\}", tex)


def anchor(number: str) -> str:
    return "eq-" + number.replace("'", "prime")


def _code(m: re.Match, page, links: bool) -> str:
    target = links and page.symbol(m["inner"].removesuffix("()"))
    return f"[{m[0]}]({target})" if target else m[0]


def _link(m: re.Match, page, links: bool) -> str:
    if m["bang"] and not m["label"].strip(): page.problem(f"the image {m['url']} has no caption: write ![what it shows]({m['url']})")
    return f"{m['bang']}[{m['label']}]({page.link(m['url'], bool(m['bang']))}{m['title'] or ''})"


def _cite(m: re.Match, page, links: bool) -> str:
    if page.tags is None or FOREIGN.search(m.string[max(0, m.start() - 60):m.start()]): return m[0]
    elsewhere = re.match(r"\s(?:of|in|on)\s\[[^\]]*\]\(([^)#\s]+\.ipynb)\)", m.string[m.end():])
    if (not elsewhere and missing(m[0], page)) or not links: return m[0]
    where = page.link(elsewhere[1]) if elsewhere else ""
    if len(re.findall(NUMBER, m[0])) == 1:
        return f"[{m[0]}]({where}#{anchor(re.search(NUMBER, m[0])[1])})"
    return re.sub(NUMBER, lambda n: f"[{n[0]}]({where}#{anchor(n[1])})", m[0])


def missing(citation: str, page) -> bool:
    "Every number of a citation, and every one inside a range such as (1)-(4), must be the tag of an equation."
    numbers = re.findall(NUMBER, citation)
    for a, b in re.findall(rf"{NUMBER}\s?(?:[-–]|to)\s?{NUMBER}", citation):
        if a.isdigit() and b.isdigit(): numbers += [str(i) for i in range(int(a) + 1, int(b))]
    for n in numbers:
        if n not in page.tags:
            page.problem(f"cites Eq. ({n}), but no equation of this page has \\tag{{{n}}} "
                         "(another text's equation: \"the paper's Eq. (n)\"; another page's: \"Eq. (n) of [title](x.ipynb)\")")
    return not page.tags.issuperset(numbers)


def check_code(source: str, page) -> None:
    "The citations in comments and docstrings, which stay as they are."
    for m in re.finditer(CITATION, source):
        if not FOREIGN.search(source[max(0, m.start() - 60):m.start()]) and not re.match(r"\sof\s", source[m.end():]):
            missing(m[0], page)


def _malformed(m: re.Match, page, links: bool) -> str:
    if page.tags is not None: page.problem(f'"{m[0]}...": cite an equation as "Eq. (n)", several as "Eqs. (n) and (m)"')
    return m[0]


def _ref(m: re.Match, page, links: bool) -> str:
    return f"[Figure \0{m[0][1:]}\0](#{m[0][1:]})" if links else f"Figure \0{m[0][1:]}\0"


HANDLERS = {
    "fence": _keep, "heading": _heading, "figure": lambda m, page, _: page.figure(m["caption"], page.link(m["path"], True)),
    "display": _display, "code": _code, "math": _keep, "link": _link, "html": _keep, "cite": _cite, "malformed": _malformed,
    "ref": _ref,
}
