"""The site of the notebooks: arguments with their shapes, pictures and links, and nothing from the net."""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import docs  # noqa: E402

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "site"
    site = docs.Site([ROOT / "nbs/08_vectors.ipynb", ROOT / "nbs/tutorials/07_blending.ipynb"], out)
    assert site.build() == 4 # two pages, the index, the names
    return out

def test_it_holds_together(built):
    assert docs.check(built) == []
    assert {p.relative_to(built).as_posix() for p in built.rglob("*.html")} == {"index.html", "names.html", "08_vectors.html", "tutorials/07_blending.html"}

def test_arguments_are_beside_their_shapes(built):
    page = (built / "08_vectors.html").read_text(encoding="utf-8")
    entry = page.split('id="persona_activations"')[1].split("</section>")[0]
    for said in ("<td><code>extractor</code></td>", "{(persona, question): response}", "Show a progress bar", "<code>True</code>", "from persona_vectors import persona_activations", "<td>returns</td>"): assert said in entry, said
    row = {r.split("</code>")[0].split("<code>")[-1]: r for r in entry.split("<tr>")[1:]} # each says its own and not its neighbour's
    assert "{(persona, question): response}" in row["responses"] and "{name: system prompt}" in row["personas"] and "Show a progress bar" in row["progress"]
    assert "(n_layers, d_model), float32, on CPU, not normalised" in page.split('id="Vector"')[1].split("</table>")[0] # a field of a class
    assert 'id="Vector.orthogonalize"' in page and "_frozen" not in page.split("<details>")[0] # methods are there, private functions only in the source
    assert "#| export" not in page and "nbdev_export" not in page

def test_options_of_commands_say_what_they_are():
    pages = [docs.Page(ROOT / "nbs/14_scale.ipynb")]
    made = "".join(docs.Reference(pages).cell(docs.source_of(c), pages[0]) for c in pages[0].nb.cells if "app.command" in c.source)
    entry = made.split('id="generate"')[1].split("</section>")[0]
    assert "Conversations per shard." in entry and "Longest response." in entry and "Annotated" not in entry # also of an option that two commands share

def test_tutorial_shows_its_pictures_and_no_scripts(built):
    page = (built / "tutorials/07_blending.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 3 and 'alt="What is said tips over"' in page
    assert "plotly" not in page and "<script" not in page
    assert "page 6" in page and "06_safety_and_capping.html" not in page # not among these two pages, so no link

def test_index_lists_by_topic(built):
    page = (built / "index.html").read_text(encoding="utf-8")
    assert page.index("Tutorials</h2>") < page.index("tutorials/07_blending.html") < page.index("From answers to vectors") < page.index("08_vectors.html")
    assert 'href="08_vectors.html#Vector"' in (built / "names.html").read_text(encoding="utf-8")

def test_every_module_has_a_topic():
    listed = {n for names in docs.TOPICS.values() for n in names.split()}
    there = {p.name for p in map(docs.Page, docs.all_pages()) if p.module}
    assert there <= listed, f"put {there - listed} into TOPICS of tools/docs.py"

def test_faults_are_found(tmp_path):
    (tmp_path / "style.css").write_text("@import 'https://fonts.example/x.css'; body { color: red }")
    (tmp_path / "a.html").write_text('<a href="gone.html">x</a><a href="b.html#nowhere">y</a><a href="b.html#here">z</a><a href="https://example.org">fine</a><img src="gone.png"><script src="//cdn.example/x.js"></script>')
    (tmp_path / "b.html").write_text('<h2 id="here">x</h2><link rel="stylesheet" href="http://cdn.example/y.css">')
    faults = docs.check(tmp_path)
    assert len(faults) == 6, faults
    for said in ("fonts.example", "links to gone.html", "#nowhere: no such place", "shows gone.png", "fetches //cdn.example/x.js", "b.html fetches http://cdn.example/y.css"): assert any(said in f for f in faults), (said, faults)

def test_another_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="holds something else"): docs.Site([ROOT / "nbs/00_files.ipynb"], tmp_path).build()
    assert (tmp_path / "thesis.txt").exists()

@pytest.mark.parametrize("page", sorted((ROOT / "nbs/tutorials").glob("*.ipynb")), ids=lambda p: p.stem)
def test_tutorials_are_small(page): assert page.stat().st_size <= 200_000, f"{page.name}: {page.stat().st_size:,} bytes; fewer figures, or less text on hover"

def test_small_pictures_look_the_same():
    "A quarter of the bytes, the same size, and no pixel is off by what an eye sees"
    import io
    import numpy as np
    from PIL import Image
    from run_notebooks import small
    k = np.arange(400)
    picture = np.stack([np.outer(np.sin(k/40) + 1, np.ones(600)).astype("float32")*60 + c for c in (20, 60, 100)], -1).astype("uint8")
    picture[100:120, 100:300] = (213, 94, 0); picture[200:202] = 0 # an area and a line
    file = io.BytesIO(); Image.fromarray(picture).convert("RGBA").save(file, "png")
    made = Image.open(io.BytesIO(small(file.getvalue()))).convert("RGB")
    assert made.size == (600, 400) and len(small(file.getvalue())) <= len(file.getvalue())
    assert abs(np.asarray(made).astype(int) - picture).max() <= 8
