"""A JupyterLab of its own, and a person in front of it: opens a notebook, runs it, moves sliders, and hears every complaint of the page."""
import importlib.util, json, os, secrets, shutil, signal, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = Path(__file__).parent / "shots"
REMEDIES = {"playwright": "pip install playwright", "jupyterlab": "pip install jupyterlab", "anywidget": "pip install anywidget"}

def require_browser():
    "Where something is missing the tests are skipped, except in continuous integration: nobody would notice there"
    missing = [f"{k} ({v})" for k, v in REMEDIES.items() if importlib.util.find_spec(k) is None] + ([] if CHROMIUM else ["Chromium (apt-get install chromium)"])
    if missing: (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"panels are tried in a real browser, for which is missing: {', '.join(missing)}")

def until(true, what, seconds=30):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds} s: {what() if callable(what) else what}"
        time.sleep(.03)
    return found

def write_notebook(path, cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(nb, path)

@contextmanager
def running(command, folder, address, **environment):
    "A server as a process of its own, from its first answer at `address(port)` on; yields the port. Nothing of the user's Jupyter or settings is read or written"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    own = {f"JUPYTER_{k}_DIR": str(folder / f".{k.lower()}") for k in ("CONFIG", "DATA", "RUNTIME")}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PERSONA_STEER_", "JUPYTER"))}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*command, f"--port={port}"], stdout=log, stderr=log, cwd=folder, env={**clean, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / ".ipython"), **own, **environment}, start_new_session=True)
    def answers():
        assert process.poll() is None, (folder / "log").read_text()
        try: return urllib.request.urlopen(address(port), timeout=5)
        except OSError: return None
    try:
        until(answers, f"{command[0]} answers", 60)
        yield port
    finally: # its kernels are in its group, and end with it
        try: os.killpg(process.pid, signal.SIGTERM)
        except ProcessLookupError: pass # it ended by itself, and said why
        try: process.wait(20)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL); process.wait(20)

@contextmanager
def running_lab(folder):
    "Yields URL(notebook). No news, no updates; every cell is in the page, so that it can be found"
    for name, value in {"apputils-extension/notification": dict(fetchNews="false"), "notebook-extension/tracker": dict(windowingMode="none")}.items():
        f = folder / ".settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        f.parent.mkdir(parents=True, exist_ok=True); f.write_text(json.dumps(value))
    token, own = secrets.token_hex(16), {f"JUPYTERLAB_{k}_DIR": str(folder / f".{k.lower()}") for k in ("WORKSPACES", "SETTINGS")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly", "--LabServerApp.open_browser=False", "--expose-app-in-browser"]
    with running(command, folder, lambda port: f"http://127.0.0.1:{port}/api?token={token}", **own) as port: yield lambda notebook: f"http://127.0.0.1:{port}/doc/tree/{notebook}?reset&token={token}"

@contextmanager
def chromium():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        try: yield browser
        finally: browser.close()

CURRENT = "window.jupyterapp.shell.currentWidget"

class Notebook:
    "An open notebook, and all that its page complains about or asks for"
    def __init__(self, browser, url, **context):
        self.complaints, self.outside = [], []
        self.page = browser.new_page(**context)
        self.page.set_default_timeout(30_000)
        self.page.on("console", lambda m: self.complaints.append(f"{m.text} {m.location.get('url', '')}") if m.type == "error" and not m.text.startswith("Failed to load resource") else None)  # JupyterLab asks for files that need not be there; requests elsewhere are counted apart
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        for event in ("request", "websocket"): self.page.on(event, self._asked)
        self.page.goto(url)
        self.page.wait_for_function(f"window.jupyterapp?.commands.hasCommand('notebook:run-all-cells') && {CURRENT}?.sessionContext?.session?.kernel?.status === 'idle'", timeout=60_000)

    def _asked(self, request):
        if not request.url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")): self.outside.append(request.url)

    def js(self, code, *given): return self.page.evaluate(code, *given)

    def run(self):
        "Every cell; fails with the traceback of the first that does"
        self.js("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function(f"{CURRENT}.sessionContext.session.kernel.status === 'idle'", timeout=60_000)
        wrong = [o for o in self.js(f"[...{CURRENT}.content.model.cells].flatMap(c => c.toJSON().outputs ?? [])") if o["output_type"] == "error"]
        assert not wrong, "\n".join(wrong[0]["traceback"])
        return self

    def ask(self, code):
        "What the kernel answers to an expression, through the page: what a panel shows is compared with it"
        said = self.js(f"""async code => {{
            const done = {CURRENT}.sessionContext.session.kernel.requestExecute({{code, store_history: false}}); let said = ''
            done.onIOPub = m => {{ if (m.header.msg_type === 'stream') said += m.content.text; if (m.header.msg_type === 'error') said += m.content.traceback.join('\\n') }}
            await done.done; return said }}""", f"import json; print('~' + json.dumps({code}))")
        assert "~" in said, said
        return json.loads(said.partition("~")[2])

    def cell(self, k): return Cell(self, self.page.locator(".jp-Notebook .jp-CodeCell").nth(k))

class Cell:
    "A panel below its cell, used as a person would"
    def __init__(self, notebook, where): self.notebook, self.page, self.where = notebook, notebook.page, where

    def show(self): self.where.locator(".jp-OutputArea").scroll_into_view_if_needed(); return self
    def text(self): return self.where.locator(".jp-OutputArea").inner_text()
    def button(self, name): return self.where.get_by_role("button", name=name, exact=True)
    def control(self, name): return self.where.locator(".widget-inline-hbox", has=self.page.locator(f"xpath=./label[normalize-space()='{name}']"))
    def handle(self, name): return self.control(name).locator(".noUi-handle").first
    def readout(self, name): return self.control(name).locator(".widget-readout").inner_text().replace("\u2212", "-")
    def choice(self, name): return self.control(name).locator("select")
    def chosen(self, name): return self.choice(name).evaluate("e => e.selectedOptions[0].textContent.replaceAll('\\u00a0', ' ')")

    def press(self, name, *keys):
        self.handle(name).focus()
        for k in keys: self.page.keyboard.press(k)

    def type(self, name, value):
        "A number into the field beside a slider"
        self.control(name).locator(".widget-readout").click()
        self.page.keyboard.press("Control+a"); self.page.keyboard.type(str(value)); self.page.keyboard.press("Enter")

    def drag(self, name, dx):
        self.handle(name).scroll_into_view_if_needed()
        box = self.handle(name).bounding_box(); x, y = box["x"] + box["width"]/2, box["y"] + box["height"]/2
        self.page.mouse.move(x, y); self.page.mouse.down(); self.page.mouse.move(x + dx/2, y, steps=4); self.page.mouse.move(x + dx, y, steps=4); self.page.mouse.up()

    def titles(self): return self.where.locator(".js-plotly-plot .gtitle").all_text_contents()
    def plot(self, code, k=0):
        "`gd` is plotly's own element: what is really drawn, not what the kernel believes (a figure that is just being replaced has nothing to tell)"
        return until(lambda: self.where.locator(".js-plotly-plot").nth(k).evaluate(f"gd => gd._fullData ? [{code}] : null"), "plotly has drawn", 10)[0]

    def point(self, x, y, k=0):
        "Where the numbers x and y of a plot lie in the page (categories count from 0)"
        self.where.locator(".js-plotly-plot").nth(k).scroll_into_view_if_needed()
        box, at = self.where.locator(".js-plotly-plot").nth(k).bounding_box(), self.plot(f"(({{xaxis: a, yaxis: b}}) => [a._offset + a.c2p({x}), b._offset + b.c2p({y})])(gd._fullLayout)", k)
        return box["x"] + at[0], box["y"] + at[1]

    def click_plot(self, x, y, k=0):
        px, py = self.point(x, y, k)
        self.page.mouse.move(px - 3, py - 3); self.page.mouse.move(px, py); self.page.wait_for_timeout(150); self.page.mouse.click(px, py)

    def time(self, event, changed, do):
        "Milliseconds from a person's event to the next frame in which `changed(root)` holds, by the browser's clock"
        self.page.wait_for_timeout(300) # a person's pace: panels use the time between two steps
        self.where.evaluate(f"""root => {{
            let began = null; window.took = null
            root.addEventListener('{event}', () => began ??= performance.now(), {{capture: true, once: true}})
            const changed = {changed}, first = changed(root)
            const seen = new MutationObserver(() => {{ if (began !== null && changed(root) !== first) {{ seen.disconnect(); requestAnimationFrame(() => window.took = performance.now() - began) }} }})
            seen.observe(root, {{subtree: true, childList: true, characterData: true, attributes: true}}) }}""")
        do()
        self.page.wait_for_function("window.took !== null")
        return self.notebook.js("window.took")

    def columns(self): # {title: text} of answers side by side
        return dict(self.where.evaluate("root => [...root.querySelectorAll('.widget-html-content [style*=grid-template-columns] > div')].filter(e => e.children.length > 1).map(e => [e.children[0].innerText, e.children[1].innerText])"))

    def crossed(self): # titles whose lines lie on each other, or on the plot
        return self.where.evaluate("""root => [...root.querySelectorAll('.js-plotly-plot')].filter(g => {
            const lines = [...g.querySelectorAll('.gtitle, .gtitle tspan.line, .gtitle-subtitle')].filter(e => !e.querySelector('tspan.line')).map(e => e.getBoundingClientRect()), inner = g.getBoundingClientRect().top + (g._fullLayout?._size.t ?? 0)
            return lines.some((r, k) => r.bottom > (lines[k + 1]?.top ?? inner) + 3) }).map(g => g.querySelector('.gtitle').textContent)""")

    def shot(self, name):
        "A picture to look at, as large as a person sees it"
        until(lambda: not self.crossed(), lambda: f"titles are clear of their subtitles: {self.crossed()}", 5)
        SHOTS.mkdir(exist_ok=True); self.page.mouse.move(2, 2); self.page.wait_for_timeout(200)
        self.where.locator(".jp-OutputArea").first.screenshot(path=SHOTS / f"{name}.png")
