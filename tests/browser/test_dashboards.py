"""Every panel of the tutorials in a real JupyterLab, used with mouse and keyboard."""
# ruff: noqa: B023  (what is defined in a loop here is called before the loop goes on)
import json, re
from pathlib import Path

import pytest
from lab import Notebook, SHOTS, chromium, require_browser, running_lab, until, write_notebook

TUTORIALS = Path(__file__).parents[2] / "nbs" / "tutorials"
PANELS = {"VectorExplorer": "02_is_it_real", "TokenLens": "02_is_it_real", "LayerSweep": "03_big_five", "SteeringPlayground": "04_steering", "ConversationMonitor": "05_assistant_axis"}
OPEN, PRACTICAL = "The moon is a door, and behind it every colour has a name.", "I fix the shelf, and then I eat bread."

# The names that the panels' cells use, in less time than their tutorials take
NAMES = f"""
import tempfile
from pathlib import Path
from persona_vectors import ActivationExtractor, DEFAULT_PERSONAS, Monitor, PersonaManager, PersonaVectorConfig, SteeringEngine, assistant_axis, get_config
from persona_vectors.explorers import tiny_personas, tiny_trait
extractor = ActivationExtractor(PersonaVectorConfig(model_name='persona-tiny', device='cpu'))
trait, pairs = tiny_trait('openness')[0], {{'its words': ({OPEN!r}, {PRACTICAL!r})}}
manager = PersonaManager(get_config(model={{'name': 'persona-tiny', 'device': 'cpu'}}, extraction={{'questions': 6, 'max_tokens': 48, 'target_layers': [4]}}, data_dir=Path(tempfile.mkdtemp())), progress=False)
for name in ('sage', 'trickster'): manager.create_from_archetype(name)
LAYER, seen = 3, tiny_personas().at(3)
axis, bard = assistant_axis(seen.vectors()), seen.vectors().vector('bard') - seen.vectors().only(DEFAULT_PERSONAS).mean
engine, half = SteeringEngine(manager).set('trickster', strength=.6, safety=False), lambda k: seen.only(DEFAULT_PERSONAS)
"""

def panel_cell(name):
    "The cell of the tutorial, as it stands there; the last line is kept under the panel's name, so that tests can ask it"
    cells = [c["source"] for c in json.loads((TUTORIALS / f"{PANELS[name]}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    found = [s for s in map("".join, cells) if re.search(rf"^{name}\(", s, re.M)]
    assert len(found) == 1, f"{len(found)} cells of {PANELS[name]} show a {name}"
    return re.sub(rf"^{name}\(", f"{name.lower()} = {name}(", found[0], flags=re.M) + f"\n{name.lower()}"

@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    require_browser()
    folder = tmp_path_factory.mktemp("lab")
    write_notebook(folder / "panels.ipynb", [NAMES, *map(panel_cell, PANELS)])
    with running_lab(folder) as url: yield url("panels.ipynb")

@pytest.fixture(scope="module") # and not longer: one thread can hold one Playwright at a time
def opened(lab):
    with chromium() as browser: yield Notebook(browser, lab, viewport=dict(width=1280, height=1300)).run()

@pytest.fixture
def notebook(opened):
    yield opened
    complaints, opened.complaints, outside, opened.outside = opened.complaints, [], opened.outside, []
    assert not (complaints or outside), f"the page complains: {complaints}; it asks elsewhere: {outside}"

@pytest.fixture
def panel(notebook, request):
    "The panel that a test is named after"
    return notebook.cell(1 + list(PANELS).index(request.function.__name__.split("_")[1])).show()

KINDS = "gd._fullData.map(t => t.type)"
TITLE = "root => root.querySelector('.gtitle')?.textContent"
TOLD = "root => [...root.querySelectorAll('.widget-html-content')].map(e => e.textContent).join()"

def shows(cell, *texts): until(lambda: all(t in cell.text() for t in texts), lambda: f"{texts} in {cell.text()!r}")

def report(request, **numbers):
    "What is measured, said at the end of the line of the test under -v -s, and kept beside the pictures"
    SHOTS.mkdir(exist_ok=True); line = f"{request.node.name}: " + ", ".join(f"{k} {v}" for k, v in numbers.items())
    print(f"\n{line}")
    with open(SHOTS / "times.txt", "a") as f: f.write(line + "\n")

def spread(times): return f"{sorted(times)[len(times)//2]:.0f} ms (least {min(times):.0f}, most {max(times):.0f}, {len(times)} times)"

def test_VectorExplorer_moves_turns_and_tells(panel, notebook, request):
    until(lambda: panel.titles(), "the figure is drawn")
    start = int(panel.readout("layer"))
    took = [panel.time("keydown", TITLE, lambda: panel.press("layer", "ArrowRight")) for _ in range(3)]
    assert panel.readout("layer") == str(start + 3) and f"layer {start + 3}" in panel.titles()[0]
    back = [panel.time("keydown", TITLE, lambda: panel.press("layer", "ArrowLeft")) for _ in range(3)] # drawn before, so that the kernel has them
    assert f"layer {start}" in panel.titles()[0]
    panel.drag("layer", -120)
    layer = int(panel.readout("layer"))
    assert layer < start
    until(lambda: f"layer {layer}" in panel.titles()[0], "the figure follows the mouse")

    names = panel.plot("Array.from(gd._fullLayout.xaxis._categories)")
    a, b = names.index("ghost"), names.index("bard")
    panel.click_plot(b, a)
    until(lambda: (panel.chosen("persona"), panel.chosen("and")) == ("ghost", "bard"), lambda: f"the two of the cell are chosen, not {panel.chosen('persona'), panel.chosen('and')}")
    cosine = notebook.ask("(lambda V: (lambda a, b: float(a @ b/a.norm()/b.norm()))(*(V[k] - sum(V.values())/len(V) for k in ('ghost', 'bard'))))(dict(tiny_personas().vectors().at(%d)))" % layer)
    assert abs(panel.plot(f"gd._fullData[0].z[{a}][{b}]") - cosine) < .01
    shows(panel, f"{cosine:.2f}", "by the noise of")
    question, answers = panel.chosen("question"), notebook.ask("{k: tiny_personas().answers[k] for k in ('ghost', 'bard')}")
    assert question == notebook.ask("tiny_personas().questions['ghost'][0]")
    assert panel.columns() == {k: answers[k][0] for k in ("ghost", "bard")}
    panel.choice("question").select_option(index=2)
    until(lambda: panel.columns() == {k: answers[k][2] for k in ("ghost", "bard")}, "both answer the other question")
    panel.shot("explorer-cosines")

    drawn = lambda view: f"layer {layer}" in "".join(panel.titles()) and (view == "axis") == ("assistant axis" in panel.titles()[0]) and (view == "space") == ("scatter3d" in panel.plot(KINDS)) and "heatmap" not in panel.plot(KINDS)
    for view in ("map", "space", "axis"):
        panel.button(view).click()
        until(lambda: drawn(view), lambda: f"{view} is drawn, not {panel.titles(), panel.plot(KINDS)}")
        panel.page.wait_for_timeout(300); panel.shot(f"explorer-{view}")
        if view == "map":
            x, y, name = panel.plot("(t => [t.x[2], t.y[2], t.customdata[2]])(gd._fullData[0])")
            panel.click_plot(x, y)
            until(lambda: panel.chosen("persona") == (name if isinstance(name, str) else name[0]), f"{name} is chosen by a click on its point")
    panel.button("cosines").click(); until(lambda: "heatmap" in panel.plot(KINDS), "cosines again")
    report(request, first_time=spread(took), again=spread(back))

def test_TokenLens_reads_another_text(panel, notebook, request):
    shows(panel, OPEN.split()[1], "openness at layer")
    start = int(panel.readout("layer"))
    took = [panel.time("keydown", TOLD, lambda: panel.press("layer", k)) for k in ("ArrowRight", "ArrowLeft", "ArrowRight")]
    shows(panel, f"openness at layer {start + 1}")
    panel.drag("layer", -100)
    layer = int(panel.readout("layer"))
    assert layer < start
    text = "A quiet lake keeps its <b>secrets</b> well."
    panel.where.locator("textarea").fill(text); panel.page.keyboard.press("Tab")
    shows(panel, "openness at layer " + str(layer), "<b>")
    tokens = panel.where.locator(".widget-html-content span[title]")
    until(lambda: "".join(tokens.all_text_contents()).startswith("A quiet lake"), "the new text is coloured")
    assert "".join(tokens.all_text_contents()).startswith(text)
    by_hand = notebook.ask(f"trait.at({layer}).project(extractor.tokens([dict(role='user', content='What do you see?'), dict(role='assistant', content={text!r})], [{layer}])[1])[:, 0].tolist()") # of the whole chat
    shown = [float(v) for v in tokens.evaluate_all("all => all.map(e => e.title)")]
    assert any(max(abs(a - b) for a, b in zip(shown, by_hand[k:])) < .006 for k in range(len(by_hand) - len(shown) + 1)), "each token has its own projection"
    assert abs(float(re.search(r"mean ([-+][\d.]+)", panel.text())[1]) - sum(shown)/len(shown)) < .011
    assert len(set(tokens.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)"))) > 3
    panel.shot("lens"); report(request, layer_moved=spread(took))

def test_LayerSweep_finds_a_layer(panel, notebook, request):
    until(lambda: len(panel.titles()) == 2, lambda: f"two figures, not {panel.titles()}, in {panel.text()[:300]!r}")
    layers = notebook.ask("[dict(auc=float(s.auc), separation=float(s.separation)) for s in layersweep.trait.report.layers]")
    best = int(panel.readout("layer"))
    assert layers[best]["auc"] == max(l["auc"] for l in layers)
    panel.button("separation").click()
    until(lambda: abs(panel.plot("gd._fullData[1].y[2]") - layers[2]["separation"]) < 1e-6, "the curve is that of the metric")
    go = "ArrowLeft" if best > 3 else "ArrowRight"
    heap = "root => [...root.querySelectorAll('.gtitle')].at(-1).textContent"
    took = [panel.time("keydown", heap, lambda: panel.press("layer", go)) for _ in range(3)]
    layer = int(panel.readout("layer"))
    assert layer == best + (3 if go == "ArrowRight" else -3)
    until(lambda: f"layer {layer}" in panel.titles()[1], "the histogram is of this layer")
    shows(panel, "Nearest the threshold")
    share = lambda: re.search(r"(\d+)% on the right side", panel.titles()[1])[1]
    before, hardest = share(), panel.text().partition("Nearest the threshold")[2]
    panel.drag("threshold", 70)
    until(lambda: panel.text().partition("Nearest the threshold")[2] != hardest, "other answers are the nearest")
    until(lambda: abs(float(panel.readout("threshold")) - notebook.ask("layersweep.threshold.value")) < .006, "the kernel has heard where the drag ended")
    cut = notebook.ask("layersweep.threshold.value")
    assert cut > 0 and abs(float(panel.readout("threshold")) - cut) < .006
    right = notebook.ask(f"(lambda s: 100*(sum(s['on'] > {cut}) + sum(s['off'] <= {cut}))/(len(s['on']) + len(s['off'])))(layersweep.held({layer})).item()")
    until(lambda: abs(int(share()) - right) <= .51, lambda: f"{share()}% shown, {right:.1f}% counted; before {before}%")
    told = [float(t) for t in re.findall(r"^[+\u2212-]\d+\.\d+", panel.text().partition("Nearest the threshold")[2], re.M)]
    assert len(told) == 6 and [abs(t - cut) for t in told] == sorted((abs(t - cut) for t in told), key=lambda d: round(d, 1))
    panel.shot("sweep"); report(request, two_figures=spread(took))

PIECES = "root => [...root.querySelectorAll('.widget-html-content [style*=grid-template-columns] > div')].map(e => e.children[1]?.querySelectorAll('span[title]').length ?? 0)"

def answered(panel, n=3): return until(lambda: len(c := panel.columns()) == n and not any(t.endswith("...") for t in c) and c, lambda: f"{n} answers in {panel.columns()}", 60)

def test_SteeringPlayground_steers(panel, notebook, request):
    panel.choice("persona").select_option("trickster")
    was = panel.readout("strength")
    panel.drag("strength", 25)
    assert panel.readout("strength") != was
    panel.press("strength", "Home"); assert float(panel.readout("strength")) == -2
    panel.drag("strength", 1000)
    panel.press("strength", *["ArrowLeft"] * 26)
    assert panel.readout("strength") == "0.70"
    panel.where.evaluate(f"root => {{ window.grown = []; new MutationObserver(() => grown.push(({PIECES})(root))).observe(root, {{subtree: true, childList: true}}) }}")
    took = []
    for _ in range(3): # to the first token of the steered answer that is new, and coloured
        panel.where.evaluate("root => root.querySelectorAll('.widget-html-content [style*=grid-template-columns]').forEach(e => e.remove())")
        took.append(panel.time("click", f"root => ({PIECES})(root)[1] > 0", lambda: panel.button("Ask").click()))
        columns = answered(panel)
    titles, texts = [*columns], [*columns.values()]
    assert [t.partition(",")[0] for t in titles] == ["the model itself", "steered", "steered"] and "above the floor" in titles[2]
    say = lambda *how: notebook.ask(f"SteeringEngine(manager).set(*{how!r}).generate([dict(role='user', content='What is truth?')], max_tokens=64, temperature=0)")
    for text, how in zip(texts, ((None, .7, False), ("trickster", .7, False), ("trickster", .7, True))): assert text.replace("↵\n", "\n").startswith(say(*how).strip()[:60]), how
    grown = notebook.js("grown.filter(g => g.length === 3)")
    assert all(len({g[k] for g in grown} - {0}) >= 2 for k in range(3)), f"each pane is seen before it is full: {grown}" # a quick machine says a short answer in two pictures
    assert any(min(g) > 0 and max(g) < max(map(max, grown)) for g in grown), "and all three at once"
    boxes = [b.bounding_box() for b in panel.where.locator(".widget-html-content [style*=grid-template-columns] > div").all()]
    assert len({b["y"] for b in boxes}) == 1 and [b["x"] for b in boxes] == sorted({b["x"] for b in boxes})
    until(lambda: panel.where.locator("summary", has_text="audit").count(), "the audit is there")
    panel.where.locator("summary", has_text="audit").click()
    shows(panel, "trickster", "layer")
    panel.where.locator("summary", has_text="Python").click()
    shows(panel, "engine.set('trickster', strength=0.7", "persona-steer generate")
    panel.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copies = panel.where.get_by_role("button", name="copy")
    copies.nth(1).click(); until(lambda: panel.where.get_by_role("button", name="copied").count() == 1, "the button says that it copied")
    assert panel.page.evaluate("navigator.clipboard.readText()").startswith("persona-steer generate")
    copies.nth(0).click(); until(lambda: copies.count() == 0, "the other too")
    assert panel.page.evaluate("navigator.clipboard.readText()") == notebook.ask("steeringplayground.python")
    panel.shot("playground"); report(request, first_steered_token=spread(took))

    panel.choice("persona").select_option("sage")
    panel.button("Ask").click()
    until(lambda: list(panel.columns().values())[:1] == texts[:1] and list(panel.columns().values())[1:2] != texts[1:2] and not any(t.endswith("...") for t in panel.columns()), "the sage speaks, and the model itself says the same as before")

def test_SteeringPlayground_stops(panel, notebook):
    panel.choice("persona").select_option("trickster"); panel.type("strength", 1.5); panel.press("max tokens", "End")
    assert (panel.readout("strength"), panel.readout("max tokens")) == ("1.50", "512")
    panel.button("Ask").click()
    shows(panel, "ask for at most 505") # a fault that a user can mend is told, and how
    panel.type("max tokens", 480)
    panel.button("Ask").click()
    until(lambda: len(c := panel.where.evaluate(PIECES)) == 3 and 5 < c[1] < 400 and any(t.endswith("...") for t in panel.columns()), lambda: f"it is in the middle of {panel.columns()}, tokens {panel.where.evaluate(PIECES)}")
    assert notebook.ask("1 + 1") == 2 and any(t.endswith("...") for t in panel.columns()) # other cells run meanwhile
    panel.shot("playground-streaming")
    panel.button("Stop").click()
    said = answered(panel)
    pieces = panel.where.evaluate(PIECES)
    assert max(pieces) < 500 and "cancelled" in notebook.ask("[j.finish for j in steeringplayground.jobs.values()]")
    panel.page.wait_for_timeout(400)
    assert panel.columns() == said

def test_SteeringPlayground_sweeps(panel, notebook):
    panel.type("max tokens", 40); panel.type("strength", .8)
    panel.choice("persona").select_option("sage")
    panel.button("Sweep").click()
    until(lambda: panel.titles(), "the curve is drawn", 60)
    assert "sage" in panel.titles()[0]
    x = panel.plot("Array.from(gd._fullData.find(t => t.name?.includes('sage')).x)")
    assert len(x) == 8 and x[0] == 0 and x == sorted(x) and {f"{d:g}" for d in x} == set(panel.columns())
    assert panel.plot("gd._fullData.map(t => t.name)").count("is coherent") >= 1
    panel.shot("playground-sweep")
    panel.choice("persona").select_option("nobody"); panel.button("Sweep").click()
    shows(panel, "choose a persona first")

def test_ConversationMonitor_watches(panel, notebook):
    def turn(text, n):
        box = panel.where.get_by_placeholder("say something, and press Enter")
        box.fill(text); box.press("Enter")
        until(lambda: "..." in bubbles()[-1:][0] if bubbles() else False, "the answer streams")
        until(lambda: len(bubbles()) == 2*n and not bubbles()[-1].endswith(" ...") and notebook.ask("conversationmonitor.speaking") is False, "the answer is there", 60)
        assert box.input_value() == "" and bubbles()[-2] == text
    bubbles = lambda: panel.where.locator(".widget-html-content [style*='border-radius:8px']").all_inner_texts()
    assert not panel.titles()
    turn("What is truth?", 1); turn("Why do you say <i>so</i>?", 2)
    assert [*map(str.strip, bubbles())] == [m.strip() for m in notebook.ask("[m['content'] for m in conversationmonitor.engine.messages]")]
    until(lambda: panel.titles(), "drift is drawn")
    rows = notebook.ask("[dict(turn=r['turn'], axis=r['axis'], value=float(r['value']), outside=bool(r['outside'])) for r in conversationmonitor.monitor.table()]")
    drawn = panel.plot("gd._fullData.map(t => Array.from(t.y ?? []))")
    for axis in ("assistant axis", "way to the bard"): assert any(len(y) == 2 and all(abs(v - r) < 1e-4 for v, r in zip(y, [r["value"] for r in rows if r["axis"] == axis])) for y in drawn), axis
    if any(r["outside"] and r["turn"] == 1 for r in rows): shows(panel, "is outside of the plain assistant's range")
    panel.shot("monitor")
    panel.button("Clear").click()
    until(lambda: not bubbles() and not panel.titles(), "it begins again")
