"""A site of the notebooks: tutorials with their pictures, and every public name with its arguments. No Quarto, no script from elsewhere, nothing is imported or run.

    python tools/docs.py                                # all pages into _docs/
    python tools/docs.py --out /tmp/x nbs/08_vectors.ipynb   # some of them

Why not a tool for it? pdoc shows docstrings and drops the comments beside arguments, which is where this package says shapes and units; nbconvert's own
pages show the code of a module and not what can be called, and fetch scripts from the net. So nbconvert renders the words, and the reference is read from the exported cells.
"""
import argparse, ast, html, io, re, shutil, sys, tokenize
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
from nbconvert.filters import ansi2html
from nbconvert.filters.markdown_mistune import MarkdownWithMath, IPythonRenderer
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
TOPICS = {
    "Settings, catalog, models": "config files settings catalog models",
    "Questions and answers": "chat answers client responses generation coherence judging authoring",
    "From answers to vectors": "reading extraction online directions vectors",
    "Files, also of other tools": "formats interop control_vectors vllm_export sharing baking",
    "Is it real?": "statistics analysis traits projections",
    "Steering": "passes interventions steering capping calibration",
    "Somebody to talk to": "personas engine batching making",
    "Looking": "canvas layouts plots tokenmaps panels explorers dashboards",
    "Many machines, and servers": "scale protocol server remote",
    "The command": "runs trait_runs project console terminal data_commands library_commands trait_commands doctor demo lab cli",
    "The package": "package",
}

# ---------------------------------------------------------------- what there is

def source_of(cell): return re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
def directives(cell): return {d.split()[0].rstrip(":") for d in re.findall(r"^#\|\s*(.+)", cell.source, re.M)}

class Page:
    "A notebook, and what it defines"
    def __init__(self, path):
        self.path, self.nb = path, nbformat.read(path, as_version=4)
        for c in self.nb.cells: # written by several hands: a directive in a markdown cell is no heading
            c.marks = directives(c)
        self.file = path.relative_to(NBS).with_suffix(".html").as_posix().replace("index.html", "overview.html") # index.html lists the pages
        self.up = "../" * self.file.count("/")
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in self.nb.cells), re.M)
        self.module = found and found[1]
        text = next((source_of(c) for c in self.nb.cells if c.cell_type == "markdown"), "")
        self.title = m[1] if (m := re.search(r"^# (?:\d\d )?(.+)", text, re.M)) else path.stem
        said = re.search(r"^> (.+)", text, re.M) or re.search(r"^(?!#)(\S.*?[.?!])(?=\s|$)", text, re.M)
        self.line = said[1].replace("*", "") if said else ""
        self.names = [d.name for c in self.nb.cells if "export" in c.marks and c.cell_type == "code" for d in definitions(source_of(c))] if self.module else []

    @property
    def name(self): return "package" if self.module == "__init__" else self.module

def definitions(source):
    "Public functions and classes of a cell"
    try: tree = ast.parse(source)
    except SyntaxError: return []
    return [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not n.name.startswith("_")]

def surface():
    "{name: module} of what `from persona_vectors import ...` knows"
    tree = ast.parse((ROOT / "persona_vectors/__init__.py").read_text(encoding="utf-8"))
    table = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_NAMES")
    return {name: k.arg for k in table.keywords for name in ast.literal_eval(k.value)}

# ---------------------------------------------------------------- reference

def comments(source):
    "{line: what is said beside it}"
    try: return {t.start[0]: t.string.lstrip("# ").strip() for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    except (tokenize.TokenError, IndentationError): return {}

def typer_help(annotation):
    "(type, help) of Annotated[type, typer.Option(help='...')]"
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated" and isinstance(annotation.slice, ast.Tuple)): return annotation, ""
    said = [k.value.value for e in annotation.slice.elts for k in getattr(e, "keywords", []) if k.arg == "help" and isinstance(k.value, ast.Constant)]
    return annotation.slice.elts[0], said[0] if said else ""

def annotated(source):
    "{name: annotation} of the options that several commands share, `Model = Annotated[...]`"
    return {n.targets[0].id: n.value for n in ast.parse(source).body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and ast.unparse(n.value).startswith("Annotated[")}

def arguments(f, said, shared=()):
    "(name, type, default, what it is) of every argument but self"
    a = f.args
    plain = [*a.posonlyargs, *a.args]
    defaults = dict(zip(reversed([o.arg for o in plain]), reversed(a.defaults))) | {o.arg: d for o,d in zip(a.kwonlyargs, a.kw_defaults) if d}
    rows = [(o, "") for o in plain] + ([(a.vararg, "*")] if a.vararg else []) + [(o, "") for o in a.kwonlyargs] + ([(a.kwarg, "**")] if a.kwarg else [])
    out = []
    for o,star in rows:
        if o.arg in ("self", "cls"): continue
        kind, told = typer_help(shared[o.annotation.id] if isinstance(o.annotation, ast.Name) and o.annotation.id in shared else o.annotation)
        beside = said.get(o.end_lineno, "") if o.lineno != f.lineno else ""
        out.append((star + o.arg, ast.unparse(kind) if kind else "", ast.unparse(defaults[o.arg]) if o.arg in defaults else None, beside or told))
    return out

def returned(f, said):
    "What is said of the result: beside the arrow, or at the end of a definition of one line"
    line = f.returns.end_lineno if f.returns else f.lineno
    return said.get(line, "")

class Reference:
    "Renders definitions; knows where every name is explained"
    def __init__(self, pages):
        self.surface, self.shared = surface(), {}
        for p in pages:
            for c in p.nb.cells:
                if c.cell_type == "code" and "export" in c.marks and "Annotated[" in c.source: self.shared |= annotated(source_of(c))
        self.known = {n: f"{p.file}#{n}" for p in pages for n in p.names if self.public(n, p)} # a word such as `make` is a name on its own page only

    def public(self, name, page): return self.surface.get(name) == page.module

    def words(self, text, up):
        "One line of markdown"
        return self.linked(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False)), up)

    def linked(self, made, up):
        "Names in code become links"
        def link(m): return f'<a class="name" href="{up}{self.known[m[1]]}"><code>{m[1]}</code></a>' if m[1] in self.known else m[0]
        return re.sub(r"<code>(\w+)</code>(?!</a>)", link, made)

    def typed(self, kind, up):
        "A type whose names are links"
        return re.sub(r"\w+", lambda m: f'<a href="{up}{self.known[m[0]]}">{m[0]}</a>' if m[0] in self.known and m[0][0].isupper() else m[0], html.escape(kind, quote=False))

    def table(self, rows, up, result=None):
        body = "".join(f'<tr><td><code>{html.escape(n)}</code></td><td>{f"<code>{self.typed(k, up)}</code>" if k else ""}</td><td>{f"<code>{html.escape(d)}</code>" if d is not None else ""}</td><td>{self.words(w, up)}</td></tr>' for n,k,d,w in rows)
        if result: body += f'<tr class="result"><td>returns</td><td>{f"<code>{self.typed(result[0], up)}</code>" if result[0] else ""}</td><td></td><td>{self.words(result[1], up)}</td></tr>'
        return f'<table class="arguments"><thead><tr><th>argument</th><th>type</th><th>default</th><th></th></tr></thead><tbody>{body}</tbody></table>' if body else ""

    def function(self, f, said, up, owner=""):
        rows, name = arguments(f, said, self.shared), f.name
        prop = any(ast.unparse(d).split(".")[-1] in ("property", "cached_property") for d in f.decorator_list)
        call = "" if prop else "(" + ", ".join(html.escape(n) + (f'=<span class="default">{html.escape(d)}</span>' if d is not None else "") for n,_,d,_ in rows) + ")"
        result = (ast.unparse(f.returns) if f.returns else "", returned(f, said)) if f.returns or returned(f, said) else None
        doc = ast.get_docstring(f)
        inner = f"<p>{self.words(doc, up)}</p>" if doc else ""
        arrow = ""
        if rows: inner += self.table(rows, up, result)
        elif result: arrow = f' <span class="result">→ <code>{self.typed(result[0], up)}</code> {self.words(result[1], up)}</span>' # no table for one line
        return f'<div class="{"method" if owner else "function"}" id="{owner}{name}"><h4><code><b>{html.escape(owner + name)}</b>{call}</code>{arrow}</h4>{inner}</div>'

    def klass(self, c, said, up):
        fields = [(n.target.id, ast.unparse(typer_help(n.annotation)[0]), ast.unparse(n.value) if n.value else None, said.get(n.end_lineno, "")) for n in c.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and not n.target.id.startswith("_")]
        fields = [(n, k, (re.search(r"default=([^,)]+)", d)[1] if "default=" in d else None) if d and d.startswith("field(") else d, w) for n,k,d,w in fields]
        methods = [m for m in c.body if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef))]
        made = next((m for m in methods if m.name == "__init__"), None)
        bases = ", ".join(ast.unparse(b) for b in c.bases)
        rows = arguments(made, said) if made else fields
        doc = ast.get_docstring(c)
        call = "(" + ", ".join(html.escape(n) + (f'=<span class="default">{html.escape(d)}</span>' if d is not None else "") for n,_,d,_ in rows) + ")" if rows else ""
        head = f'<h4><code><span class="kind">class</span> <b>{c.name}</b>{call}</code>' + (f' <span class="bases">is a {self.typed(bases, up)}</span>' if bases else "") + "</h4>"
        inner = (f"<p>{self.words(doc, up)}</p>" if doc else "") + self.table(rows, up)
        return f'<div class="class" id="{c.name}">{head}{inner}' + "".join(self.function(m, said, up, f"{c.name}.") for m in methods if not m.name.startswith("_") and not any(ast.unparse(d).endswith(".setter") for d in m.decorator_list)) + "</div>"

    def cell(self, source, page):
        "An exported cell: what can be called, and its source behind a click"
        said, out = comments(source), []
        for d in definitions(source):
            where = "" if self.public(d.name, page) else f".{page.module}" if page.module != "__init__" else ""
            made = self.klass(d, said, page.up) if isinstance(d, ast.ClassDef) else self.function(d, said, page.up)
            out.append(f'<section class="entry">{made}<p class="from"><code>from persona_vectors{where} import {d.name}</code></p></section>')
        if not out and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body): return ""
        return "".join(out) + f'<details><summary>source</summary>{code(source)}</details>'

# ---------------------------------------------------------------- pages

def code(source): return highlight(source, PythonLexer(), HtmlFormatter(cssclass="highlight"))

def output(o, up):
    "What a cell showed: the picture rather than the script, no widgets"
    if o.output_type == "stream": return f'<pre class="{o.name}">{ansi2html(o.text.rstrip())}</pre>'
    if o.output_type == "error": return f'<pre class="stderr">{ansi2html(chr(10).join(o.traceback))}</pre>'
    data = o.get("data", {})
    if "image/png" in data: return f'<img src="data:image/png;base64,{data["image/png"].strip()}" alt="{html.escape(caption(data))}" loading="lazy">'
    if "application/vnd.jupyter.widget-view+json" in data: return ""
    if "text/html" in data: return f'<div class="html">{data["text/html"]}</div>'
    if "text/markdown" in data: return markdown(data["text/markdown"])
    return f'<pre>{html.escape(data["text/plain"])}</pre>' if "text/plain" in data else ""

def caption(data):
    "The title of a figure, for who cannot see it"
    title = data.get("application/vnd.plotly.v1+json", {}).get("layout", {}).get("title", {})
    return re.sub(r"<[^>]+>", " ", title.get("text") or "figure") if isinstance(title, dict) else str(title)

def markdown(text): return MarkdownWithMath(renderer=IPythonRenderer(escape=False)).render(text)

class Site:
    def __init__(self, paths, out):
        self.pages, self.out = [Page(p) for p in paths], out
        self.files = {p.file for p in self.pages}
        self.tutorials = [p for p in self.pages if p.path.parent.name == "tutorials"]
        self.modules = [p for p in self.pages if p.module]
        self.reference, self.missing = Reference(self.modules), []

    def links(self, made, page):
        "Links to notebooks lead to their pages; those to a notebook that is not there become text"
        def link(m):
            target, _, anchor = m[2].partition("#")
            if not target.endswith(".ipynb"): return m[0]
            file = (NBS / page.file).parent.joinpath(unquote(target)).resolve()
            file = file.relative_to(NBS).with_suffix(".html").as_posix() if NBS in file.parents else ""
            if file == "index.html": file = "overview.html"
            if file not in self.files: self.missing.append(f"{page.file}: {m[2]}"); return m[3]
            return f'<a{m[1]}href="{page.up}{file}{"#" + anchor if anchor else ""}">{m[3]}</a>'
        return re.sub(r'<a([^>]*?)href="([^"]+)"[^>]*>(.*?)</a>', link, made, flags=re.S)

    def body(self, page):
        out, headed = [], False
        for c in page.nb.cells:
            source = source_of(c)
            if c.cell_type == "markdown":
                made = self.reference.linked(self.links(markdown(source), page), page.up)
                if page.module and not headed and "<h1" in made: made = re.sub(r"(<h1[^>]*>).*?</h1>", rf"\1persona_vectors.<wbr>{page.module}</h1>".replace(".<wbr>__init__", ""), made, count=1, flags=re.S); headed = True
                out.append(made)
            elif c.cell_type != "code" or "default_exp" in c.marks or "hide" in c.marks: continue
            elif "export" in c.marks: out.append(self.reference.cell(source, page))
            elif source.strip():
                shown = "".join(output(o, page.up) for o in c.get("outputs", []))
                out.append(f'<div class="cell">{code(source)}{f"<div class=output>{shown}</div>" if shown else ""}</div>')
        return "\n".join(out)

    def contents(self, page, body):
        heads = [(m[1], re.sub(r"<[^>]+>|¶|&#182;", "", m[2])) for m in re.finditer(r'<h2 id="([^"]+)"[^>]*>(.*?)</h2>', body, re.S)]
        names = [(n, f"<code>{n}</code>") for n in page.names]
        def items(rows): return "".join(f'<li><a href="#{a}">{t}</a></li>' for a,t in rows)
        return "".join(f"<h5>{title}</h5><ul>{items(rows)}</ul>" for title,rows in (("On this page", heads), ("Names", names)) if rows)

    def whole(self, title, body, up="", side=""):
        top = f'<a class="brand" href="{up}index.html">persona_vectors</a><a href="{up}index.html#tutorials">Tutorials</a><a href="{up}index.html#modules">Modules</a><a href="{up}names.html">All names</a>'
        return f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title><link rel="stylesheet" href="{up}style.css"></head>\n<body><nav class="top">{top}</nav><div class="page">{f"<aside>{side}</aside>" if side else ""}<main>{body}</main></div></body></html>\n'

    def write(self, file, text):
        path = self.out / file
        path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text, encoding="utf-8")

    def neighbours(self, page):
        if page not in self.tutorials: return ""
        k = self.tutorials.index(page)
        before, after = (self.tutorials[j] if 0 <= j < len(self.tutorials) else None for j in (k - 1, k + 1))
        def to(p, text): return f'<a href="{page.up}{p.file}">{text}</a>' if p else "<span></span>"
        return f'<nav class="next">{to(before, "← " + html.escape(before.title) if before else "")}{to(after, html.escape(after.title) + " →" if after else "")}</nav>'

    def index(self):
        def card(p, title): return f'<li><a href="{p.file}">{title}</a><span>{self.reference.words(p.line, "")}</span></li>'
        by_name, listed, parts = {p.name: p for p in self.modules}, set(), []
        for topic,names in [*TOPICS.items(), ("More", " ".join(by_name))]:
            found = [by_name[n] for n in names.split() if n in by_name and n not in listed]
            listed |= {p.name for p in found}
            if found: parts.append(f'<h3 id="{re.sub("[^a-z]+", "-", topic.lower()).strip("-")}">{topic}</h3><ul class="cards">{"".join(card(p, f"<code>{p.name}</code>") for p in found)}</ul>')
        whole = any(p.file == "overview.html" for p in self.pages)
        body = "<h1>persona_vectors</h1><p class=lede>Persona vectors of language models: extract, measure, look, steer.</p>" + ('<p><a href="overview.html">What it is, in ten lines of Python</a> · <a href="names.html">all names, A to Z</a></p>' if whole else '<p><a href="names.html">All names, A to Z</a></p>')
        body += '<h2 id="tutorials">Tutorials</h2><ul class="cards">' + "".join(card(p, f"{p.path.stem[:2]} {html.escape(p.title)}") for p in self.tutorials) + "</ul>"
        body += '<h2 id="modules">Modules, by topic</h2><p>Each page is a notebook: what can be called with its arguments and shapes, examples that were run, and the source behind a click.</p>' + "".join(parts)
        self.write("index.html", self.whole("persona_vectors", body))

    def names(self):
        rows = sorted(((n, p) for p in self.modules for n in p.names), key=lambda o: o[0].lower())
        items = "".join(f'<li><a href="{p.file}#{n}"><code>{n}</code></a> <span>{p.name}{"" if self.reference.public(n, p) else " · from its module only"}</span></li>' for n,p in rows)
        script = "<script>document.getElementById('q').addEventListener('input',e=>{const q=e.target.value.toLowerCase();document.querySelectorAll('#names li').forEach(l=>{l.hidden=!l.textContent.toLowerCase().includes(q)})})</script>"
        self.write("names.html", self.whole("All names", f'<h1>All names</h1><p><input id="q" type="search" placeholder="steer, plot, load ..." aria-label="Filter names" autofocus></p><ul id="names">{items}</ul>{script}'))

    def build(self):
        "Write all pages; how many there are"
        if self.out.exists():
            if any(self.out.iterdir()) and not (self.out / "names.html").exists(): raise SystemExit(f"{self.out} holds something else: choose another --out, or empty it")
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True)
        if (NBS / "images").exists(): shutil.copytree(NBS / "images", self.out / "images")
        self.write("style.css", STYLE + HtmlFormatter(style="default").get_style_defs(".highlight") + "@media (prefers-color-scheme: dark) {" + HtmlFormatter(style="github-dark").get_style_defs(".highlight") + "}" + LATE)
        for p in self.pages:
            body = self.body(p)
            self.write(p.file, self.whole(p.title, body + self.neighbours(p), p.up, self.contents(p, body)))
        self.index(); self.names()
        return len(self.pages) + 2

STYLE = """
:root { --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --paper: #fff; --ground: #f6f8fa; --link: #0072b2; --mark: #fff7e0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a9b4c0; --line: #2f3a45; --paper: #161c22; --ground: #1d252d; --link: #4aa8e8; --mark: #2b2a1f } }
* { box-sizing: border-box } html { scroll-padding-top: 64px }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 Helvetica, Arial, sans-serif }
a { color: var(--link); text-decoration: none } a:hover { text-decoration: underline }
code, pre { font: 13.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace } p code, li code, td code { background: var(--ground); border-radius: 4px; padding: 1px 4px }
nav.top a { white-space: nowrap } nav.top { position: sticky; top: 0; z-index: 1; display: flex; gap: 24px; padding: 12px 32px; background: var(--paper); border-bottom: 1px solid var(--line) } .brand { font-weight: bold; color: var(--ink) }
.page { display: flex; gap: 40px; max-width: 1240px; margin: 0 auto; padding: 0 32px } main { flex: 1; min-width: 0; max-width: 860px; padding: 16px 0 96px }
aside { flex: 0 0 220px; position: sticky; top: 50px; align-self: flex-start; max-height: calc(100vh - 50px); overflow: auto; padding: 24px 0; font-size: 14px } aside ul { list-style: none; padding: 0; margin: 0 0 16px } aside li { margin: 4px 0; overflow-wrap: anywhere } aside h5 { margin: 0 0 8px; color: var(--soft); font-weight: normal } aside code { font-size: 12.5px }
h1 { font-size: 32px; line-height: 1.2; margin: 24px 0 8px } h2 { margin: 48px 0 12px; font-size: 24px } h3 { margin: 32px 0 8px } .lede { font-size: 20px; color: var(--soft) }
blockquote { margin: 0 0 24px; color: var(--soft); font-size: 18px } blockquote p { margin: 0 } .anchor-link { visibility: hidden; padding-left: 8px } :hover > .anchor-link { visibility: visible }
pre { margin: 0; overflow-x: auto } main pre { white-space: pre-wrap; overflow-wrap: anywhere } main > pre { background: var(--ground) } .highlight, main > pre { border-radius: 6px; padding: 12px 16px; margin: 16px 0 0 }
.output { padding: 10px 16px; margin-bottom: 16px; border-left: 2px solid var(--line) } .output pre { color: var(--soft); padding: 4px 0 } .output img, main img { max-width: 100%; height: auto; border-radius: 6px } .html { overflow-x: auto } .stderr { opacity: .8 }
.entry { border: 1px solid var(--line); border-radius: 8px; padding: 4px 16px 8px; margin: 20px 0 8px } .entry:target, :target > h4 { background: var(--mark) } .entry h4 { margin: 12px 0 4px; font-weight: normal } .entry h4 code { white-space: pre-wrap; overflow-wrap: anywhere } .entry h4 b { color: var(--link) } .default, .kind, .bases, .from { color: var(--soft) } .entry p { margin: 4px 0 8px } .from { font-size: 13px; text-align: right } .from code { background: none }
.method { margin: 16px 0 8px 16px; padding-left: 16px; border-left: 2px solid var(--line) }
table { border-collapse: collapse; font-size: 14px; margin: 8px 0 12px } th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line) } th { color: var(--soft); font-weight: normal } .arguments { width: 100% } .arguments td:nth-child(-n+3) code { white-space: pre-wrap; overflow-wrap: anywhere } .arguments td:first-child code { white-space: nowrap } .arguments td:last-child { min-width: 38% } .result td:first-child, span.result { color: var(--soft) }
details { margin: 0 0 24px } summary { cursor: pointer; color: var(--soft); font-size: 13px }
.cards { list-style: none; padding: 0 } .cards li { display: grid; grid-template-columns: 260px 1fr; gap: 16px; margin: 8px 0 } .cards > li > a { font-weight: bold } .cards span { color: var(--soft) }
#q { width: 100%; font: inherit; padding: 8px 12px; border: 1px solid var(--line); border-radius: 6px; background: var(--ground); color: var(--ink) } #names { columns: 2; list-style: none; padding: 0 } #names li { break-inside: avoid } #names span { color: var(--soft); font-size: 13px }
.next { display: flex; justify-content: space-between; margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--line) }
@media (max-width: 860px) { aside { display: none } .page, nav.top { padding-left: 16px; padding-right: 16px } nav.top { gap: 14px; font-size: 15px } h1 { font-size: 27px } h1, code { overflow-wrap: anywhere } main table { display: block; overflow-x: auto } .arguments td:nth-child(-n+3) code { white-space: nowrap } .arguments td:last-child { min-width: 220px } .method { margin-left: 0; padding-left: 10px } #names { columns: 1 } .cards li { grid-template-columns: 1fr; gap: 0 } }
"""
LATE = "\n.highlight, .highlight pre { background: var(--ground) } .highlight .err { border: 0; color: inherit; background: none }\n"

# ---------------------------------------------------------------- does it hold together?

class Links(HTMLParser):
    "Where a page leads to, what it fetches, and its anchors"
    def __init__(self): super().__init__(); self.to, self.fetched, self.ids = [], [], set()
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if "id" in a: self.ids.add(a["id"])
        if tag == "a" and a.get("href"): self.to.append(a["href"])
        if tag == "link" and a.get("href"): self.fetched.append(a["href"])
        self.fetched += [a[k] for k in ("src", "data", "poster", "srcset") if a.get(k) and not a[k].startswith("data:")]
        self.fetched += re.findall(r"url\(([^)]+)\)", a.get("style") or "")

def check(out):
    "Faults of a site: links that lead nowhere, and things that would have to come from the net"
    read = {}
    for path in sorted(Path(out).rglob("*.html")): read[path.resolve()] = parser = Links(); parser.feed(path.read_text(encoding="utf-8"))
    faults = [f"style.css fetches {m}" for m in re.findall(r"@import[^;]+|url\([^)]+\)", (Path(out) / "style.css").read_text(encoding="utf-8"))]
    for path,page in read.items():
        name = path.relative_to(Path(out).resolve()).as_posix()
        for o in page.fetched:
            if re.match(r"(\w+:)?//", o): faults.append(f"{name} fetches {o}")
            elif not (path.parent / unquote(o)).exists(): faults.append(f"{name} shows {o}, which is not there")
        for o in page.to:
            if re.match(r"\w+:", o): continue # a link to the net is one to click on
            file, _, anchor = o.partition("#")
            target = (path.parent / unquote(file)).resolve() if file else path
            if not target.exists(): faults.append(f"{name} links to {o}, which is not there")
            elif anchor and target in read and unquote(anchor) not in {unquote(i) for i in read[target].ids}: faults.append(f"{name} links to {o}: no such place on that page")
    return faults

def all_pages(): return sorted(NBS.glob("[0-9]*.ipynb")) + sorted((NBS / "tutorials").glob("*.ipynb")) + [NBS / "index.ipynb"]

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder to write; what is in it is replaced")
    ap.add_argument("pages", nargs="*", type=Path, help="notebooks; all without it")
    asked = ap.parse_args()
    site = Site([p.resolve() for p in asked.pages] or all_pages(), asked.out)
    n = site.build()
    faults = check(asked.out) + ([f"{m}: no such notebook" for m in site.missing] if not asked.pages else [])
    print(*faults, f"{n} pages in {asked.out.name}/; open {asked.out.name}/index.html", sep="\n")
    return bool(faults)

if __name__ == "__main__": sys.exit(main())
