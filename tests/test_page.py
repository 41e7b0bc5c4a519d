"""The chat page in a real browser, with a real server behind it."""
import json, os, shutil, subprocess, time, urllib.request
from contextlib import contextmanager

import pytest
from commands import COMMAND

openai = pytest.importorskip("openai", reason="the answers are compared with those of the openai client, which is not installed")
sync_playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright, which is not installed: pip install playwright").sync_playwright
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is shown by Chrome or Chromium, which is not installed")

EVENING, SEA, EVIL = "What is a good way to spend a quiet evening?", "Tell me about the sea.", "<img src=x onerror=\"window.hurt=1\"><b>bold</b>"
WATCH = """
window.violations = []; window.grown = []
addEventListener('securitypolicyviolation', e => violations.push(`${e.violatedDirective}: ${e.blockedURI}`))
new MutationObserver(() => document.querySelectorAll('.pane').forEach(p => { const a = p.querySelector('.turn:last-child .answer'); if (a) grown.push([p.dataset.pane, a.textContent.length]) })).observe(document, {subtree: true, childList: true, characterData: true})
"""

def until(true, what, seconds=30):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(.02)
    return found

def environment(folder, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PERSONA_STEER_")}
    return {**clean, "PERSONA_STEER_DATA_DIR": str(folder), "PERSONA_STEER_EXTRACTION__QUESTIONS": "6", "XDG_CONFIG_HOME": str(folder / "none"), "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **more}

@contextmanager
def served(folder, *options, port=0, **more):
    "Yields (URL, process)"
    note = folder / "server.json"
    with open(folder / "serve.log", "ab") as out: process = subprocess.Popen([COMMAND, "serve", "--port", str(port), *options], env=environment(folder, **more), cwd=folder, stdout=out, stderr=out)
    try:
        until(lambda: note.exists() or process.poll() is not None, "the server starts", 60)
        assert process.poll() is None, (folder / "serve.log").read_text()
        yield json.loads(note.read_text())["url"], process
    finally:
        process.terminate(); process.wait(60)

@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    done = subprocess.run([COMMAND, "extract", "sage", "trickster", "guardian"], env=environment(folder), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder

@pytest.fixture(scope="module")
def server(library):
    with served(library) as (url, _): yield url

@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        yield found
        found.close()

class Chat:
    "A page that is open, and all that it sends and complains about"
    def __init__(self, browser, url, **context):
        self.context, self.url, self.bodies, self.urls, self.complaints = browser.new_context(**context), url, [], [], []
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.add_init_script(WATCH)
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("request", self._sent)
        self.page.goto(url)

    def _sent(self, request):
        self.urls.append(request.url)
        if request.method == "POST": self.bodies.append(request.post_data_json)

    def js(self, code, *given): return self.page.evaluate(code, *given)

    def ready(self):
        until(lambda: self.page.locator("#send").is_enabled(), "the page knows the personas")
        return self

    def set(self, persona=None, strength=None, **fields):
        if persona: self.page.select_option("#persona", persona)
        if strength is not None: self.page.locator("#strength").fill(str(strength))
        if fields and not self.page.locator("#more").is_visible(): self.page.click("#more-button")
        for k, v in fields.items(): self.page.fill(f"#{k.replace('_', '-')}", str(v))
        return self

    def send(self, text):
        before = len(self.bodies)
        self.page.fill("#text", text); self.page.press("#text", "Enter")
        until(lambda: len(self.bodies) == before + 2, "both panes ask")
        return self

    def wait(self):
        until(lambda: self.page.locator("#send").is_enabled(), "both answers are there", 60)
        return self

    def ask(self, text): return self.send(text).wait()

    def body(self, kind): # The latest request of a pane
        mine = [b for b in self.bodies if (b["model"] == "persona-tiny") == (kind == "unsteered")]
        return mine[-1]

    def pane(self, kind): return self.page.locator(f"[data-pane={kind}]")
    def answers(self, kind): return self.pane(kind).locator(".answer").all_text_contents()
    def gauge(self, kind): return self.pane(kind).locator(".gauge")
    def value(self, kind): return float(self.gauge(kind).get_attribute("aria-valuenow"))

    def close(self):
        quiet, violations = self.complaints, self.js("violations")
        self.context.close()
        assert not quiet and not violations, f"the browser complains: {quiet}, {violations}"
        assert all(u.startswith((self.url, "data:")) for u in self.urls), f"the page asks elsewhere: {self.urls}"

@pytest.fixture
def chat(browser, server):
    found = Chat(browser, server).ready()
    yield found
    found.close()

def told(url, model, text, key="none", **extra):
    "What the API answers: (text, gauge)"
    messages = [dict(role="user", content=text)] if isinstance(text, str) else text
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        got = client.chat.completions.create(model=model, messages=messages, temperature=0, extra_body=dict(gauge=True, **extra))
    return got.choices[0].message.content, got.model_extra["gauge"]

def health(url): return json.loads(urllib.request.urlopen(f"{url}/health", timeout=30).read())

def test_it_shows_what_the_server_has(chat, server):
    about = json.loads(urllib.request.urlopen(f"{server}/v1/personas", timeout=30).read())
    assert chat.page.locator("#persona option").all_text_contents() == ["guardian", "sage", "trickster", "nobody", "a blend…"]
    assert (float(chat.page.input_value("#strength")), float(chat.page.get_attribute("#strength", "max"))) == (about["strength"]["default"], about["strength"]["max"])
    assert chat.page.locator("#safety").is_checked() == about["safety"] and chat.page.text_content("#model") == "persona-tiny"
    chat.set("sage")
    assert chat.pane("steered").locator(".hint").text_content() == next(p["description"] for p in about["personas"] if p["name"] == "sage")
    assert chat.page.locator(".verdict").all_text_contents() == ["no answer yet"] * 2 and not chat.page.locator(".marker").first.is_visible()
    assert about["gauge"]["axis"] in chat.page.text_content("#legend")

def test_two_answers_stream_side_by_side_and_are_those_of_the_api(chat, server):
    chat.set("sage", .5, temperature=0).ask(EVENING)
    grown = {kind: [n for k, n in chat.js("grown") if k == kind] for kind in ("steered", "unsteered")}
    for kind, lengths in grown.items(): assert len(set(lengths)) >= 5 and lengths == sorted(lengths), f"{kind} does not grow: {lengths}"
    order = [k for k, n in chat.js("grown") if 0 < n < grown[k][-1]]
    assert order and chat.js("""() => { // both were halfway at some moment
        const last = {}, at = Object.fromEntries(['steered', 'unsteered'].map(k => [k, Math.max(...grown.filter(g => g[0] === k).map(g => g[1]))]))
        return grown.some(([k, n]) => { last[k] = n; return Object.keys(at).every(k => last[k] > 0 && last[k] < at[k]) }) }"""), "one after the other"
    for kind, model, extra in (("steered", "sage@0.5", {}), ("unsteered", "persona-tiny", dict(safety=False))):
        text, gauge = told(server, model, EVENING, **extra)
        assert chat.answers(kind) == [text] and text
        assert chat.value(kind) == pytest.approx(gauge["value"], abs=1e-3)
        assert "tokens/s" in chat.pane(kind).locator(".speed").text_content()
    assert chat.answers("steered") != chat.answers("unsteered")
    assert all(b["stream"] and b["gauge"] for b in chat.bodies) and chat.bodies[0]["seed"] == chat.bodies[1]["seed"]

def test_the_gauge_shows_where_the_answer_is(chat, server):
    band, gauge, values = told(server, "sage", SEA)[1], chat.gauge("steered"), []
    for strength in (0, .9):
        chat.set("sage", strength, temperature=0).ask(SEA)
        values.append(chat.value("steered"))
        least, most = (float(gauge.get_attribute(f"aria-value{k}")) for k in ("min", "max"))
        for name, where in (("marker", values[-1]), ("band", band["low"])):
            assert gauge.locator(f".{name}").evaluate("e => parseFloat(e.style.left)") == pytest.approx(100 * (where - least) / (most - least), abs=.01)
        assert gauge.locator(".band").evaluate("e => parseFloat(e.style.width)") == pytest.approx(100 * (band["high"] - band["low"]) / (most - least), abs=.01)
        place = "below" if values[-1] < band["low"] else "above" if values[-1] > band["high"] else "inside"
        assert gauge.get_attribute("data-place") == place
        assert {"below": "less safe", "above": "safer", "inside": "in the plain assistant's band"}[place] in gauge.locator(".verdict").text_content()
        chat.page.click("#clear")
    assert values[0] != values[1] and not gauge.locator(".marker").is_visible()

def test_slider_and_switch_set_the_next_answer(chat, server):
    chat.set("sage", .5, temperature=0).ask(SEA)
    chat.page.click("#clear")
    chat.page.focus("#strength")
    for _ in range(3): chat.page.keyboard.press("ArrowRight")
    assert chat.page.text_content("#strength-value") == "0.65"
    chat.page.focus("#safety"); chat.page.keyboard.press("Space")
    chat.set(max_tokens=60).ask(SEA)
    first, then = [b for b in chat.bodies if b["model"] == "sage"]
    assert (first["strength"], first["safety"], "max_tokens" in first) == (.5, True, False) and (then["strength"], then["safety"], then["max_tokens"]) == (.65, False, 60)
    assert all("strength" not in b and b["safety"] is False for b in chat.bodies if b["model"] == "persona-tiny")
    assert chat.answers("steered") == [told(server, "sage@0.65", SEA, safety=False, max_tokens=60)[0]]
    assert "sage at 0.65, floor off" in chat.pane("steered").locator(".about").text_content()

def test_the_second_turn_brings_the_first(chat, server):
    chat.set("sage", .5, temperature=0, system="Be brief.").ask(EVENING).ask(SEA)
    for kind, model, extra in (("steered", "sage@0.5", {}), ("unsteered", "persona-tiny", dict(safety=False))):
        one, two = chat.answers(kind)
        wanted = [dict(role="system", content="Be brief."), dict(role="user", content=EVENING), dict(role="assistant", content=one), dict(role="user", content=SEA)]
        assert chat.body(kind)["messages"] == wanted and two == told(server, model, wanted, **extra)[0]
    chat.page.click("#clear")
    assert chat.answers("steered") == [] and chat.page.locator("#starters").is_visible()
    chat.page.click("#starters button >> nth=0"); chat.wait()
    assert len(chat.body("steered")["messages"]) == 2 and len(chat.answers("unsteered")) == 1

def test_stop_frees_the_rows_and_keeps_what_was_said(chat, server):
    chat.set("trickster", 1.5, temperature=0, max_tokens=400).send(SEA)
    until(lambda: len("".join(chat.answers("steered"))) > 20, "the answer has begun")
    assert health(server)["running"] >= 1
    chat.page.click("#stop")
    until(lambda: health(server)["running"] == 0, "the rows are free", 5)
    assert chat.wait().pane("steered").locator(".about").text_content().endswith("stopped")
    said = chat.answers("steered")
    chat.set(max_tokens=5).ask(EVENING)
    assert chat.answers("steered")[:1] == said and chat.body("steered")["messages"][1] == dict(role="assistant", content=said[0])
    chat.set(max_tokens=400).send(SEA)
    until(lambda: len(chat.answers("steered")[-1]) > 20, "it has begun")
    chat.page.keyboard.press("Escape")
    until(lambda: health(server)["running"] == 0, "Escape stops too", 5)
    assert chat.wait().pane("steered").locator(".about").last.text_content().endswith("stopped")

def test_blends(chat, server):
    chat.set(":blend", temperature=0).page.fill("#blend", "sage:0.5+triskter:0.3")
    chat.ask(SEA)
    fault = chat.pane("steered").locator(".fault")
    assert "no persona 'triskter'" in fault.text_content() and "did you mean 'trickster'" in fault.text_content()
    assert chat.pane("unsteered").locator(".fault").count() == 0 and chat.answers("unsteered")[0]
    chat.page.fill("#blend", "sage:0.5+trickster:0.3")
    fault.locator("button").click()
    until(lambda: chat.answers("steered")[0], "it answers"); chat.wait()
    assert fault.count() == 0 and chat.answers("steered") == [told(server, "sage:0.5+trickster:0.3", SEA)[0]]
    chat.page.fill("#blend", "sage:0.5+trickster:0.3@0.3")
    assert not chat.page.locator("#strength").is_enabled()
    chat.ask(EVENING)
    assert "strength" not in chat.body("steered") and len(chat.body("steered")["messages"]) == 3
    chat.set(":base").ask(SEA)
    assert chat.bodies[-2]["model"] == chat.bodies[-1]["model"] == "persona-tiny"
    assert [c for c in chat.complaints if "404" not in c] == [] and len(chat.complaints) == 1  # the browser notes the wrong blend
    chat.complaints.clear()

def test_text_never_becomes_markup(chat):
    chat.set(":blend", system=EVIL, max_tokens=5).page.fill("#blend", EVIL)
    chat.ask(EVIL).ask(EVIL)
    assert EVIL in chat.pane("steered").locator(".you").first.text_content() and "<img src=x" in chat.pane("steered").locator(".fault").first.text_content()
    assert chat.js("[document.querySelectorAll('main img, main b').length, window.hurt === undefined]") == [0, True]
    chat.complaints.clear()  # two answers with status 404

def test_events_are_read_wherever_the_chunks_are_cut(chat):
    sent = "data: {\"a\":\"größe 木 \U0001f30a\"}\n\n: a remark\n\ndata: one\r\ndata:two\r\n\r\nevent: x\ndata: three\n\ndata: cut off"
    read = """async ([bytes, size]) => {
        const body = new ReadableStream({start(c) { for (let k = 0; k < bytes.length; k += size) c.enqueue(new Uint8Array(bytes.slice(k, k + size))); c.close() }}), found = []
        for await (const e of events(body)) found.push(e)
        return found }"""
    for size in (1, 2, 3, 7, 1000): assert chat.js(read, [list(sent.encode()), size]) == ["{\"a\":\"größe 木 \U0001f30a\"}", "one\ntwo", "three"], size

def test_every_control_has_a_name_and_the_keyboard_reaches_it(chat):
    chat.set(":blend"); chat.page.click("#more-button")
    assert chat.js("[...document.querySelectorAll('input, select, textarea, button')].filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.id)") == []
    reached = []
    chat.page.focus("#persona")
    for _ in range(16): reached.append(chat.js("document.activeElement.id")); chat.page.keyboard.press("Tab")
    assert {"persona", "blend", "strength", "safety", "more-button", "temperature", "max-tokens", "system", "text", "send", "clear"} <= set(reached)
    chat.page.fill("#text", "one"); chat.page.press("#text", "Shift+Enter"); chat.page.keyboard.type("two")
    assert chat.page.input_value("#text") == "one\ntwo" and not chat.bodies
    chat.set("sage", max_tokens=3); chat.page.press("#text", "Enter"); chat.wait()
    assert chat.body("steered")["messages"][0]["content"] == "one\ntwo"

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_does_not_scroll_sideways(browser, server, scheme):
    chat = Chat(browser, server, viewport=dict(width=400, height=800), color_scheme=scheme).ready()
    sideways = lambda: chat.js("document.documentElement.scrollWidth > innerWidth || [...document.querySelectorAll('.log')].some(e => e.scrollWidth > e.clientWidth)")
    assert not sideways()
    chat.set(":blend", max_tokens=20)
    assert not sideways()
    chat.set("sage"); chat.page.click("#more-button"); chat.ask("w" * 300)
    assert not sideways()
    one, two = (chat.pane(k).bounding_box() for k in ("steered", "unsteered"))
    assert one["y"] + one["height"] <= two["y"] and one["x"] == two["x"]
    assert (sum(map(int, chat.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)"))) > 380) == (scheme == "light")
    chat.page.set_viewport_size(dict(width=1280, height=800))
    one, two = (chat.pane(k).bounding_box() for k in ("steered", "unsteered"))
    assert one["y"] == two["y"] and one["x"] + one["width"] <= two["x"] and not sideways()
    chat.close()

def test_a_key_a_full_queue_and_a_server_that_went_away(browser, library, tmp_path):
    folder, key, limits = tmp_path / "library", "a key for this test", ("--max-rows", "1", "--max-waiting", "2")
    shutil.copytree(library, folder, ignore=shutil.ignore_patterns("server.json"))
    with served(folder, *limits, PERSONA_STEER_API_KEY=key) as (url, _):
        chat = Chat(browser, url)
        until(lambda: chat.page.locator("#key-form").is_visible(), "it asks for the key")
        assert not chat.page.locator("#send").is_enabled()
        chat.page.fill("#key", "not this one"); chat.page.press("#key", "Enter")
        until(lambda: "not the key" in chat.page.text_content("#key-fault"), "it says that the key is wrong")
        chat.page.fill("#key", key); chat.page.press("#key", "Enter")
        chat.ready()
        assert not chat.page.locator("#key-form").is_visible() and key not in chat.page.content()
        chat.page.reload(); chat.ready()  # the tab remembers
        chat.set("sage", .5, temperature=0).ask(EVENING)
        assert chat.answers("steered") == [told(url, "sage@0.5", EVENING, key)[0]]
        assert all("401" in c for c in chat.complaints); chat.complaints.clear()

        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            endless = lambda: client.chat.completions.create(model="trickster@1.5", messages=[dict(role="user", content=SEA)], temperature=0, max_tokens=450, stream=True)
            others = [endless(), endless()]
            until(lambda: (health(url)["running"], health(url)["waiting"]) == (1, 1), "one is spoken, one waits")
            chat.send(SEA)
            until(lambda: chat.page.locator(".fault").count() == 1, "the second of the two has no place")
            assert "The server is busy" in chat.page.text_content(".fault") and "try again" in chat.page.text_content(".fault")
            for o in others: o.close()
        chat.wait()
        chat.page.click(".fault button")
        until(lambda: chat.page.locator(".fault").count() == 0, "it is tried again"); chat.wait()
        assert len(chat.answers("steered")) == len(chat.answers("unsteered")) == 2 and all(chat.answers("steered") + chat.answers("unsteered"))
        assert all("429" in c for c in chat.complaints); chat.complaints.clear()

    chat.ask(EVENING)
    assert all("does not answer" in t and "The conversation is kept." in t for t in chat.page.locator(".fault").all_text_contents()) and chat.page.locator(".fault").count() == 2
    assert all("ERR_CONNECTION_REFUSED" in c for c in chat.complaints); chat.complaints.clear()
    with served(folder, *limits, port=int(url.rpartition(":")[2]), PERSONA_STEER_API_KEY=key):
        chat.pane("steered").locator(".fault button").click()
        until(lambda: chat.answers("steered")[2], "it answers again"); chat.wait()
        assert len(chat.body("steered")["messages"]) == 5 and chat.pane("unsteered").locator(".fault").count() == 1
        chat.ask(SEA)
        assert [len(chat.body(k)["messages"]) for k in ("steered", "unsteered")] == [7, 5]  # what the model never answered is not in its history
        chat.close()
