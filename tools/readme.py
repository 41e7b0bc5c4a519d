"""README.md is nbs/index.ipynb as markdown.

    python tools/readme.py           # write README.md and its pictures
    python tools/readme.py --check   # exit 1 when they are out of step
"""
import argparse, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp)\b", re.M)
BLANKS = re.compile(r"\n{3,}")

def render():
    "(markdown, {file name: bytes of a picture})"
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and HIDDEN.search(c.source))]
    nb.metadata.language_info = dict(name="python")  # fences say which language they hold
    for c in nb.cells:
        for o in c.get("outputs", []):  # a picture says it better than its JSON
            if "image/png" in o.get("data", {}): o["data"] = {"image/png": o["data"]["image/png"]}
    body, resources = MarkdownExporter().from_notebook_node(nb, resources=dict(output_files_dir="README_files", unique_key="README"))
    body = body.replace("](images/", "](nbs/images/")  # the notebook lies in nbs/, README.md above it
    return BLANKS.sub("\n\n", body).strip() + "\n", resources.get("outputs", {})

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--check", action="store_true", help="write nothing; exit 1 when README.md is out of step")
    check = ap.parse_args().check
    text, pictures = render()
    files = {"README.md": text.encode(), **pictures}
    if check:
        stale = [f for f, data in files.items() if not (ROOT / f).exists() or (ROOT / f).read_bytes() != data]
        print(f"out of step with nbs/index.ipynb: {', '.join(stale)}; run python tools/readme.py" if stale else "README.md is in step with nbs/index.ipynb")
        return bool(stale)
    for f, data in files.items():
        (ROOT / f).parent.mkdir(exist_ok=True); (ROOT / f).write_bytes(data)
    print(f"wrote README.md with {len(pictures)} picture(s)")
    return 0

if __name__ == "__main__": sys.exit(main())
