"""The server as a process of its own, asked by OpenAI's client, by broken ones and by hostile ones."""
import asyncio, json, os, re, signal, socket, subprocess, threading, time
from collections import Counter
from shutil import copytree

import httpx
import pytest
import torch
from commands import COMMAND
from hypothesis import HealthCheck, example, given, settings, strategies as st
from openai import APIError, APIStatusError, AsyncOpenAI, AuthenticationError, BadRequestError, InternalServerError, NotFoundError, OpenAI, RateLimitError
from prometheus_client.parser import text_string_to_metric_families

from persona_vectors.chat import chat_prompt, conversation
from persona_vectors.engine import SteeringEngine
from persona_vectors.personas import PersonaManager
from persona_vectors.server import serve
from persona_vectors.settings import EMBEDDED, get_config

KEY, QUESTION, STORY = "a key that nobody guesses", "What is truth?", "Tell me a story about a fox."
OPTIONS = {"PERSONA_STEER_EXTRACTION__QUESTIONS": "6", "PERSONA_STEER_EXTRACTION__MAX_TOKENS": "32"}
NAMES = ["persona-tiny", "sage", "trickster", "sage:0.5+trickster:0.3"]
QUESTIONS = [QUESTION, "Why do people tell stories?", "How do I bake bread?", "Where does the river go?"]
LONG = dict(text=STORY, model="trickster", temperature=2, seed=14, max_tokens=400) # says nearly four hundred tokens

class Server:
    "A running `persona-steer serve`"
    def __init__(self, folder, *args, key=None, host="127.0.0.1"):
        self.folder, self.key, self.host, self.log = folder, key, host, folder.parent / f"{folder.name}.log"
        env = {k: v for k, v in os.environ.items() if not k.startswith("PERSONA_STEER_")} | OPTIONS | {"PERSONA_STEER_DATA_DIR": str(folder), "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "100"} | ({"PERSONA_STEER_API_KEY": key} if key else {})
        self.process = subprocess.Popen([COMMAND, "serve", "--host", host, "--port", "0", *args], stdout=subprocess.PIPE, stderr=self.log.open("w"), env=env, cwd=folder)

    def wait(self):
        until(lambda: (self.folder / "server.json").exists() or self.process.poll() is not None, 150)
        assert self.process.poll() is None, self.log.read_text()
        self.note = json.loads((self.folder / "server.json").read_text())
        self.port = int(self.note["url"].rpartition(":")[2]); self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, headers=self.headers, timeout=30)
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=60)
        return self

    @property
    def headers(self): return {"Authorization": f"Bearer {self.key}"} if self.key else {}
    def async_client(self): return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=60)
    def ask(self, model="sage", text=QUESTION, **more): return self.client.chat.completions.create(**{**dict(model=model, messages=conversation(text), temperature=0, max_tokens=20), **more})
    def say(self, model="sage", text=QUESTION, **more): return self.ask(model, text, **more).choices[0].message.content
    def health(self): return self.http.get("/health").json()
    def idle(self, seconds=20): until(lambda: (lambda h: h["running"] == h["waiting"] == 0)(self.health()), seconds)
    def end(self, how=signal.SIGTERM):
        if self.process.poll() is None: self.process.send_signal(how)
        try: return self.process.wait(40)
        finally: self.process.kill(); self.process.stdout.close()

    def meters(self):
        "{name and labels: value}"
        return {(s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(self.http.get("/metrics").text) for s in f.samples}

def until(ready, seconds=20):
    end = time.monotonic() + seconds
    while not ready(): assert time.monotonic() < end, "nothing happens"; time.sleep(.01)

@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    "A library with a sage and a trickster"
    folder = tmp_path_factory.mktemp("server") / "library"
    m = PersonaManager(get_config(None, EMBEDDED, extraction={"questions": 6, "max_tokens": 32}, data_dir=folder), progress=False)
    for k in ("sage", "trickster"): m.create_from_archetype(k)
    return m

@pytest.fixture(scope="module")
def servers(manager):
    "One as it is; one with a short patience; one for everybody, with a key and little room"
    folder = manager.config.data_dir
    copies = [copytree(folder, folder.parent / k) for k in ("usual", "hasty", "narrow")]
    found = [Server(copies[0]), Server(copies[1], "--max-rows", "1", "--max-seconds", "1"), Server(copies[2], "--max-rows", "1", "--max-waiting", "1", key=KEY, host="0.0.0.0")]
    try: yield [s.wait() for s in found]
    finally:
        for s in found: s.end(signal.SIGKILL)

@pytest.fixture
def server(servers):
    "The usual one, whose rows are free again afterwards"
    if servers[0].process.poll() is not None: pytest.fail(servers[0].log.read_text()[-2000:])
    yield servers[0]
    assert servers[0].process.poll() is None and not re.search("Traceback|failed", servers[0].log.read_text()), servers[0].log.read_text()[-3000:]
    servers[0].idle()

@pytest.fixture
def hasty(servers): return servers[1]
@pytest.fixture
def narrow(servers): return servers[2]

@pytest.fixture(scope="module")
def alone(manager):
    "What the engine says, which knows no batches"
    engine = SteeringEngine(manager); plain = manager.config.steering
    def say(persona, text=QUESTION, strength=plain.default_strength, safety=plain.safety, **sampling): return engine.set(persona, strength, safety).generate(conversation(text), **{**dict(max_tokens=20, temperature=0), **sampling})
    return say

# ---------------------------------------------------------------- the API

def test_every_name_speaks_as_its_persona(server, alone):
    assert [m.id for m in server.client.models.list()] == ["persona-tiny", "sage", "trickster"]
    cases = [("persona-tiny", {}, (None, {})), ("sage", {}, ("sage", {})), ("sage@0.8", {}, ("sage", dict(strength=.8))), ("sage:0.5+trickster:0.3", {}, ("0.5 sage + 0.3 trickster", {})), ("sage:0.5+trickster:0.3@1.2", {}, ("0.5 sage + 0.3 trickster", dict(strength=1.2))),
             ("trickster", dict(strength=-.6), ("trickster", dict(strength=-.6))), ("trickster", dict(safety=False, strength=1.5), ("trickster", dict(safety=False, strength=1.5))), ("persona-tiny", dict(safety=False), (None, dict(safety=False)))]
    said = [server.say(name, extra_body=extra) for name, extra, _ in cases]
    assert said == [alone(who, **how) for _, _, (who, how) in cases] and len(set(said)) > 4
    assert server.say("trickster", extra_body=dict(layers=[1], strength=1.5)) != server.say("trickster", extra_body=dict(strength=1.5))
    whole = server.ask("sage", max_tokens=200)
    assert (whole.model, whole.object, whole.choices[0].finish_reason, whole.choices[0].message.role) == ("sage", "chat.completion", "stop", "assistant")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens < 200

def test_usage_and_lengths(server, manager):
    tokenizer = manager.model.tokenizer
    for most in (1, 7):
        r = server.ask(max_tokens=most)
        assert (r.usage.prompt_tokens, r.usage.completion_tokens, r.choices[0].finish_reason) == (len(chat_prompt(tokenizer, conversation(QUESTION))), most, "length")
        assert server.ask(max_completion_tokens=most, max_tokens=9).usage.completion_tokens == most
    assert r.choices[0].message.content == tokenizer.decode(tokenizer(" " + r.choices[0].message.content, add_special_tokens=False).input_ids[:7]).strip()
    system = server.ask(messages=[dict(role="system", content="You are a pirate."), *conversation(QUESTION)]).usage
    assert system.prompt_tokens == len(chat_prompt(tokenizer, conversation(QUESTION, "You are a pirate.")))

def collect(stream):
    "(text, chunks) of a stream of one choice"
    chunks = list(stream)
    said = [c.choices[0] for c in chunks if c.choices]
    return "".join((c.delta.content if hasattr(c, "delta") else c.text) or "" for c in said), chunks

def test_a_stream_is_the_answer_in_pieces(server):
    for more in ({}, dict(stop=["the"]), dict(temperature=1.2, seed=5), dict(temperature=2, seed=5, max_tokens=60)):
        whole = server.ask(**more)
        text, chunks = collect(server.ask(stream=True, stream_options=dict(include_usage=True), **more))
        assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage and not chunks[-1].choices
        assert chunks[0].choices[0].delta.role == "assistant" and {c.choices[0].delta.role for c in chunks[1:-1]} == {None}
        assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [whole.choices[0].finish_reason]
        assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {"chat.completion.chunk"} and len(chunks) > 2
    assert collect(server.ask(stream=True))[1][-1].usage is None

def test_async(server):
    async def both():
        async with server.async_client() as client:
            given = dict(model="trickster", messages=conversation(QUESTION), temperature=0, max_tokens=20)
            whole = await client.chat.completions.create(**given)
            pieces = [c.choices[0].delta.content or "" async for c in await client.chat.completions.create(stream=True, **given)]
            return whole.choices[0].message.content, "".join(pieces), [m.id async for m in client.models.list()]
    whole, pieces, names = asyncio.run(both())
    assert whole == pieces == server.say("trickster") and names == ["persona-tiny", "sage", "trickster"]

@torch.inference_mode()
def test_completions_are_those_of_the_model(server, manager):
    model, tokenizer = manager.model.model, manager.model.tokenizer
    def naive(prompt, n=12): ids = torch.tensor([tokenizer(prompt).input_ids]); return tokenizer.decode(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)[0, ids.shape[1]:], skip_special_tokens=True)
    ask = lambda prompt, **more: server.client.completions.create(**{**dict(model="persona-tiny", prompt=prompt, max_tokens=12, temperature=0, extra_body=dict(safety=False)), **more})
    texts = ["A fox", "The river and the", "One day"]; expected = [naive(t) for t in texts]; ids = [tokenizer(t).input_ids for t in texts]
    assert [ask(t).choices[0].text for t in texts] == expected and len(set(expected)) == 3
    assert [ask(i).choices[0].text for i in ids] == expected
    for many in (texts, ids):
        r = ask(many)
        assert [(c.index, c.text) for c in r.choices] == list(enumerate(expected)) and r.object == "text_completion"
        assert r.usage.prompt_tokens == sum(map(len, ids))
    assert collect(ask(texts[0], stream=True))[0] == expected[0]
    assert ask(texts[0], model="sage", extra_body={}).choices[0].text != expected[0]
    r = ask(texts[1], logprobs=3, max_tokens=5)
    whole = ids[1] + tokenizer(r.choices[0].text, add_special_tokens=False).input_ids
    scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)[len(ids[1]) - 1:]
    scored = r.choices[0].logprobs
    assert "".join(scored.tokens) == r.choices[0].text and all(len(t) == 3 for t in scored.top_logprobs)
    torch.testing.assert_close(torch.tensor(scored.token_logprobs), torch.stack([s[t] for s, t in zip(scores, whole[len(ids[1]):])]), atol=1e-3, rtol=1e-3)

@torch.inference_mode()
def test_log_probabilities(server, manager):
    model, tokenizer = manager.model.model, manager.model.tokenizer
    for stream in (False, True):
        r = server.ask("persona-tiny", logprobs=True, top_logprobs=4, max_tokens=9, stream=stream, extra_body=dict(safety=False))
        scored = [t for c in r for t in c.choices[0].logprobs.content] if stream else r.choices[0].logprobs.content
        said = [next(i for i in range(len(tokenizer)) if tokenizer.decode([i]) == t.token) for t in scored]
        prompt = chat_prompt(tokenizer, conversation(QUESTION))
        scores = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1:].log_softmax(-1)
        assert len(scored) == 9
        for k, t in enumerate(scored):
            best = scores[k].topk(4)
            torch.testing.assert_close(torch.tensor([t.logprob, *(o.logprob for o in t.top_logprobs)]), torch.cat([scores[k, said[k]][None], best.values]), atol=1e-3, rtol=1e-3)
            assert [o.token for o in t.top_logprobs] == [tokenizer.decode([i]) for i in best.indices] and bytes(t.bytes).decode() == t.token
    assert server.ask().choices[0].logprobs is None

def test_sampling(server, alone):
    hot = dict(temperature=1.3, max_tokens=20)
    assert server.say(seed=7, **hot) == server.say(seed=7, **hot) == alone("sage", seed=7, **hot)
    assert len({server.say(seed=k, **hot) for k in range(3)}) == 3 and len({server.say(**hot) for _ in range(3)}) == 3
    assert server.say(top_p=1e-6, seed=1, **hot) == server.say()
    assert server.say(top_p=.7, seed=3, **hot) == alone("sage", seed=3, top_p=.7, **hot)
    three = [c.message.content for c in server.ask(n=3, seed=7, **hot).choices]
    assert len(set(three)) == 3 and three[0] == server.say(seed=7, **hot)
    found = {}
    for c in server.ask(n=3, seed=7, stream=True, **hot): found[c.choices[0].index] = found.get(c.choices[0].index, "") + (c.choices[0].delta.content or "")
    assert [found[k] for k in range(3)] == three

def test_stop_strings(server):
    whole = server.say(max_tokens=60)
    for stop in (whole.split()[4], whole.split()[2][1:], whole[10:13], whole[0], "never said"):
        expected = whole[:whole.index(stop)].strip() if stop in whole else whole
        r = server.ask(max_tokens=60, stop=stop)
        assert (r.choices[0].message.content, r.choices[0].finish_reason) == (expected, "stop")
        assert collect(server.ask(max_tokens=60, stop=[stop, "\n\n\n"], stream=True))[0] == expected

def test_models_by_name(server):
    for name in ("sage", "persona-tiny", "sage@0.8", "sage:0.5+trickster:0.3"): assert server.client.models.retrieve(name).id == name
    for name in ("sagee", "sage@99x", "sage:1+nobody:1", "gpt-4o"):
        with pytest.raises(NotFoundError) as e: server.client.models.retrieve(name)
        assert e.value.code == "model_not_found"
        with pytest.raises(NotFoundError): server.ask(name)

def test_personas_are_loaded_and_unloaded(server):
    loaded = lambda: [p["name"] for p in server.http.get("/v1/personas").json()["personas"] if p["loaded"]]
    post = lambda path: server.http.post(f"/v1/personas/{path}", json={})
    assert post("sage/load").json() == dict(name="sage", loaded=True) and "sage" in loaded()
    assert post("sage/unload").json() == dict(name="sage", loaded=False) and "sage" not in loaded()
    for path in ("sage/unload", "nobody/load", "nobody/unload", "..%2Fx/load"): assert is_error(post(path)) == 404, path

def test_a_damaged_file_does_not_hide_the_others(server):
    bad = server.folder / "vectors/personas/odd.safetensors"; bad.write_bytes(b"nothing")
    try: assert {"sage", "trickster", "odd"} <= {m.id for m in server.client.models.list()} and server.http.get("/v1/models/sage").status_code == 200
    finally: bad.unlink()

def test_no_layer_at_all_is_refused(server):
    with pytest.raises(BadRequestError, match="name at least one"): server.ask(extra_body=dict(layers=[]))

def test_the_gauge(server):
    r = server.ask(extra_body=dict(gauge=True), max_tokens=12)
    assert r.gauge["tokens"] == 11 and r.gauge["low"] < r.gauge["high"] and isinstance(r.gauge["value"], float) and r.gauge["layer"] < 8
    assert not hasattr(server.ask(), "gauge")

def test_the_page(server):
    r = server.http.get("/")
    assert r.status_code == 200 and "<html" in r.text.lower() and "frame-ancestors 'none'" in r.headers["content-security-policy"]

# ---------------------------------------------------------------- many at once

async def stream(client, model, text, **more):
    pieces = [c.choices[0].delta.content or "" async for c in await client.chat.completions.create(**{**dict(model=model, messages=conversation(text), temperature=0, max_tokens=32, stream=True), **more})]
    return "".join(pieces)

def test_sixteen_streams_of_four_personas_say_what_each_says_alone(server):
    pairs = [(m, q) for q in QUESTIONS for m in NAMES]
    expected = [server.say(m, q, max_tokens=32) for m, q in pairs]
    before = server.meters()
    async def together():
        async with server.async_client() as client: return await asyncio.gather(*(stream(client, *p) for p in pairs))
    assert asyncio.run(together()) == expected and len(set(expected)) > 12
    after = server.meters()
    assert after["persona_steer_row_steps",] - before["persona_steer_row_steps",] > 4*(after["persona_steer_steps",] - before["persona_steer_steps",]) # more than four at a time

def test_who_leaves_frees_a_row_and_disturbs_nobody(server):
    expected = server.say(max_tokens=100)
    async def leaves(client, after):
        pieces = await client.chat.completions.create(model="trickster", messages=conversation(STORY), temperature=2, seed=1, max_tokens=400, stream=True)
        async for k, _ in enumerated(pieces):
            if k == after: await pieces.close(); return
    async def together():
        async with server.async_client() as client: return await asyncio.gather(*(leaves(client, k % 4) for k in range(6)), *(stream(client, "sage", QUESTION, max_tokens=100) for _ in range(3)))
    assert asyncio.run(together())[6:] == [expected] * 3
    server.idle(2)
    running = server.ask(stream=True, **LONG); next(running)
    assert server.health()["running"] == 1
    running.close(); server.idle(1)

async def enumerated(pieces):
    k = 0
    async for p in pieces: yield k, p; k += 1

def raw(server, payload, wait=10):
    "What comes back for these bytes"
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as s:
        try: s.sendall(payload)
        except ConnectionError: pass
        out = b""
        while more := s.recv(65536): out += more
        return out

def http(server, path="/v1/chat/completions", body=b"", method="POST", length=None, **headers):
    "A request as bytes"
    lines = {"Host": f"127.0.0.1:{server.port}", "Content-Type": "application/json", "Connection": "close", **server.headers, "Content-Length": len(body) if length is None else length, **{k.replace("_", "-"): v for k, v in headers.items()}}
    return f"{method} {path} HTTP/1.1\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode("latin-1") for k, v in lines.items() if v is not ...) + b"\r\n" + body

def long(**more): return json.dumps({**{k: v for k, v in LONG.items() if k != "text"}, "messages": conversation(STORY), **more}).encode()

def statuses(server):
    "{status: requests} so far"
    return {dict(k[1:])["status"]: n for k, n in server.meters().items() if k[:2] == ("persona_steer_requests_total", ("path", "/v1/chat/completions"))}

@pytest.mark.parametrize("which", ["usual", "narrow"]) # where there is room, and where it has to wait
def test_who_disconnects_is_forgotten(servers, which):
    s = servers[("usual", "hasty", "narrow").index(which)]; before, over = Counter(statuses(s)), []
    def seen(*kinds): return sum(statuses(s).get(k, 0) for k in kinds)
    def leaves(payload, ready=None):
        "It is missed, and that soon. On a busy machine its answer may be over before: then another one leaves"
        for _ in range(5):
            missed, both = seen("499"), seen("499", "200")
            with socket.create_connection(("127.0.0.1", s.port)) as other: other.sendall(payload); ready and until(ready)
            until(lambda before=both: seen("499", "200") > before)
            if seen("499") > missed: return
            over.append(payload)
        raise AssertionError("five left, and were answered all the same")
    for streaming in (False, True):
        busy = s.ask(stream=True, **LONG) if which == "narrow" else None
        leaves(http(s, body=long(stream=streaming))) # at once
        leaves(http(s, body=long(), length=9999)) # within its body
        if busy: busy.close(); s.idle(); busy = s.ask(stream=True, **LONG)
        leaves(http(s, body=long(stream=streaming)), lambda: s.health()["waiting" if which == "narrow" else "running"] == 1)
        if busy: assert s.health()["running"] == 1; busy.close()
    s.idle()
    until(lambda: seen("499") - before["499"] == (10 if which == "narrow" else 6))
    assert Counter(statuses(s)) - before == Counter({"499": seen("499") - before["499"], "200": len(over)}) and s.say("trickster", max_tokens=5) # nobody else was answered
    assert "Traceback" not in s.log.read_text(), s.log.read_text()[-3000:]

def test_a_full_queue_is_said(narrow):
    running = narrow.ask(stream=True, **LONG); next(running)
    found = []
    other = threading.Thread(target=lambda: found.append(narrow.say(max_tokens=5))); other.start()
    until(lambda: narrow.health()["waiting"] == 1)
    with pytest.raises(RateLimitError, match="try again later") as e: narrow.ask()
    assert e.value.code == "overloaded" and e.value.response.headers["retry-after"] == "1"
    with pytest.raises(BadRequestError, match="takes 1 at once: ask for fewer"): narrow.ask(n=4) # that would be refused for ever
    running.close(); other.join()
    assert found == [narrow.say(max_tokens=5)]
    with OpenAI(base_url=f"{narrow.url}/v1", api_key=KEY, max_retries=5) as patient:
        running = narrow.ask(stream=True, **LONG); next(running)
        threading.Timer(.3, running.close).start()
        assert patient.chat.completions.create(model="sage", messages=conversation(QUESTION), temperature=0, max_tokens=5).choices[0].message.content == found[0]

def test_a_request_has_its_time(hasty):
    texts, faults = [], []
    def ask(streaming):
        try: texts.append(collect(hasty.ask(stream=True, **LONG))[0] if streaming else hasty.say(**LONG))
        except APIError as e: faults.append(e)
    threads = [threading.Thread(target=ask, args=(k % 2,)) for k in range(10)]
    start = time.monotonic()
    for t in threads: t.start()
    for t in threads: t.join()
    assert time.monotonic() - start < 6 and len(faults) + len(texts) == 10 and len(faults) > 4
    assert {e.code for e in faults} == {"timeout"} and {e.status_code for e in faults if isinstance(e, InternalServerError)} == {504}
    hasty.idle(2); assert hasty.say(max_tokens=3)

# ---------------------------------------------------------------- who may come in

def test_a_key_is_needed(narrow):
    for key in ("wrong", KEY + "x", KEY[:-1], "é".encode().decode("latin-1")):
        r = httpx.get(f"{narrow.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode("latin-1")})
        assert is_error(r) == 401 and KEY not in r.text
    with OpenAI(base_url=f"{narrow.url}/v1", api_key="wrong", max_retries=0) as c, pytest.raises(AuthenticationError): c.models.list()
    for path, status in (("/health", 200), ("/", 200), ("/metrics", 401), ("/v1/personas", 401), ("/v1/none", 401)): assert httpx.get(narrow.url + path).status_code == status, path
    assert [m.id for m in narrow.client.models.list()][0] == "persona-tiny" and KEY not in narrow.log.read_text()

def test_not_for_everybody_without_a_key(manager):
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(ValueError, match="so a key is needed: set PERSONA_STEER_API_KEY"): serve(manager, host, 0)
    for key in ("short", "ключ ключ ключ", "tab\tand line\n"):
        with pytest.raises(ValueError, match="at least 8 printable"): serve(manager, "0.0.0.0", 0, key)

def test_a_port_is_taken(manager, server):
    s = Server(manager.config.data_dir, "--port", str(server.port))
    assert s.process.wait(60) == 1 and re.search(r"already in use.*--port", s.log.read_text().replace("\n", " ")) and "Traceback" not in s.log.read_text()
    s.process.stdout.close()
    assert json.loads((server.folder / "server.json").read_text()) == server.note

# ---------------------------------------------------------------- what should not be sent

def is_error(r):
    "The status of an answer that is an error as OpenAI writes it"
    e = r.json()["error"]
    assert 400 <= r.status_code < 500 and set(e) == {"message", "type", "param", "code"} and e["message"] and "\n" not in e["message"] and len(e["message"]) < 600 and e["code"] and e["type"], (r.status_code, r.text[:500])
    return r.status_code

def chat(**more): return json.dumps({**dict(model="sage", messages=conversation("Hi"), max_tokens=2), **more}).encode()

BAD = dict(no_json=b'{"model": ', no_utf8=b'{"model": "\xff\xfe"}', no_object=b"[]", empty=b"", null=b"null", surrogate=b'{"model": "\\ud800", "messages": [{"role": "user", "content": "\\udfff"}]}', deep=b"["*100_000, deep_message=chat(messages=None)[:-1] + b', "metadata": ' + b'{"a":'*5000 + b"1" + b"}"*5001,
    huge_tokens=chat(max_tokens=10**9), huger_tokens=chat(max_tokens=10**300), digits=b'{"max_tokens": ' + b"9"*10_000 + b"}", digits_elsewhere=b'{"frequency_penalty": ' + b"9"*6_000 + b"}", infinite=chat(temperature=float("inf")), nan=chat(strength=float("nan")), exponent=b'{"temperature": 1e999}', too_hot=chat(temperature=2.1), strong=chat(strength=1e30), layers=chat(layers=[10**30]), layer=chat(layers=[8]),
    context=chat(messages=conversation("word "*5000)), many=chat(messages=conversation("Hi")*2000), no_user=chat(messages=[dict(role="system", content="x")]), nul_name=chat(model="sage\0"), path=chat(model="../../etc/passwd"), names=chat(model="+".join(f"a{i}" for i in range(150))), model_strength=chat(model="persona-tiny", strength=1.), twice=chat(model="sage@0.5", strength=1.), tool=chat(tools=[{}]), image=chat(messages=[dict(role="user", content=[dict(type="image_url", image_url="x")])]),
    stops=chat(stop=["a"]*9), unknown=chat(max_token=3), n=chat(n=17), zero=chat(n=0), nothing=chat(messages=[]), empty_content=chat(messages=conversation("")))

@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_errors_as_openai_writes_them(server, name):
    r = server.http.post("/v1/chat/completions", content=BAD[name], headers={"Content-Type": "application/json"})
    if r.status_code != 200 or name != "empty_content": assert is_error(r) in (400, 404)

def test_errors_name_what_is_at_fault(server):
    def told(path, **more): return server.http.post(path, json=dict(model="sage", max_tokens=2, **more)).json()["error"]["message"]
    assert told("/v1/chat/completions", messages=[dict(role="user", content=[dict(type="text", text="a"), dict(type="image_url", image_url="x")])]).startswith("messages.0.content.1.type: must be 'text'")
    assert told("/v1/completions", prompt=["a"]*60, n=16) == "the request asks for 960 answers, and this server takes 256 at once: ask for fewer"

@pytest.mark.parametrize("body", [dict(prompt=[]), dict(prompt=[[]]), dict(prompt=""), dict(prompt=[50_000]), dict(prompt=[-1]), dict(prompt=[10**30]), dict(prompt=["a", 1]), dict(prompt=[True]), dict(prompt=[1.5]), dict(prompt="a"*2000), dict(prompt=list(range(600))), dict(prompt="a", logprobs=6), dict(prompt="a", echo=True), dict(prompt=["a"]*65), {}])
def test_bad_prompts(server, body): assert is_error(server.http.post("/v1/completions", json=dict(model="sage", **body))) == 400

def test_what_is_not_for_this_server(server):
    ok = chat()
    statuses = {}
    def seen(name, payload): answer = raw(server, payload); statuses[name] = int(answer.split()[1]); head, _, body = answer.partition(b"\r\n\r\n"); return json.loads(body)["error"] if b"json" in head.lower() else None
    for name, payload in {"text": http(server, body=ok, Content_Type="text/plain"), "form": http(server, body=ok, Content_Type="application/x-www-form-urlencoded"), "untyped": http(server, body=ok, Content_Type=...), "host": http(server, body=ok, Host="evil.example"), "other host": http(server, "/health", method="GET", Host=f"127.0.0.1.evil.example:{server.port}"), "path": http(server, "/v1/nothing", method="GET"), "long path": http(server, "/v1/models/" + "a"*9000, method="GET"), "odd path": http(server, "/v1/models/%00%ff%f0", method="GET"),
                          "method": http(server, body=ok, method="DELETE"), "put": http(server, body=ok, method="PUT"), "get": http(server, method="GET"), "declared": http(server, body=b"x", length=2**40), "length": http(server, body=b"", length=2**21 + 1)}.items():
        error = seen(name, payload)
        assert error and error["code"] and error["message"], (name, statuses[name])
    assert statuses == {"text": 415, "form": 415, "untyped": 415, "host": 421, "other host": 421, "path": 404, "long path": 404, "odd path": 404, "method": 405, "put": 405, "get": 405, "declared": 413, "length": 413}
    for junk in (b"\0"*100 + b"\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\r\n\r\n", http(server, body=ok, length="\xb2"), http(server, body=ok, length=-5), http(server, body=ok, length="9"*5000)):
        answer = raw(server, junk); assert not answer or 400 <= int(answer.split()[1]) < 500, (junk[:60], answer[:200])
    assert server.http.post("/v1/chat/completions", content=ok, headers={"Content-Type": "application/json; charset=utf-8"}).status_code == 200

def test_large_bodies(server):
    for size in (2**21 + 1, 2**23):
        with pytest.raises(APIStatusError) as e: server.ask(messages=conversation("a"*size))
        assert e.value.status_code == 413 and "more than 2,097,152 bytes" in str(e.value)
        r = server.http.post("/v1/chat/completions", content=iter([b" "*2**16]*(size//2**16 + 1)), headers={"Content-Type": "application/json"}) # chunked: of unknown length
        assert is_error(r) == 413
    with pytest.raises(BadRequestError, match="tokens"): server.ask(messages=conversation("a b "*200_000))
    assert server.say(max_tokens=3)

def test_a_long_stop_string_holds_nobody_up(server):
    start = time.monotonic()
    assert server.say(stop=["a"*2_000_000]) == server.say() and time.monotonic() - start < 5

scalars = st.none() | st.booleans() | st.integers(-3, 20) | st.integers() | st.sampled_from([2**31, 2**63, 2**64, 10**30, -10**400, 1e308, float("nan"), float("inf"), -0., 5e-324]) | st.floats() | st.text(max_size=8) | st.sampled_from(["sage", "sage@", "sage@1e9", "sage:", "user", "\ud800", "\0", "a"*600])
anything = st.recursive(scalars, lambda o: st.lists(o, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage", "x"]), o, max_size=3), max_leaves=8)
fields = st.sampled_from(["model", "messages", "prompt", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "strength", "safety", "layers", "gauge", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "tools", "logit_bias", "user", "best_of", "echo", "response_format", "nonsense"])

@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(fields, anything, max_size=4), st.booleans(), st.none() | st.tuples(st.floats(0, 1), st.binary(max_size=4)))
@example(dict(seed=10**400), True, None)
@example(dict(seed=-1, n=2), True, None)
@example(dict(temperature=1e-320, top_p=1e-320), True, None)
@example(dict(temperature=1e-38, strength=-0.), True, None)
@example(dict(layers=None), True, None)
def test_any_body_is_answered_or_refused(servers, change, chatting, hurt):
    server = servers[0]
    body = json.dumps({**dict(model="sage", max_tokens=2), **(dict(messages=conversation("Hi")) if chatting else dict(prompt="A")), **change}).encode()
    if hurt: at = int(hurt[0]*len(body)); body = body[:at] + hurt[1] + body[at + 1:]
    r = server.http.post("/v1/chat/completions" if chatting else "/v1/completions", content=body, headers={"Content-Type": "application/json"})
    if r.status_code != 200: is_error(r)
    elif not r.headers["content-type"].startswith("text/event-stream"): assert r.json()["choices"]
    else: assert r.text.endswith("data: [DONE]\n\n") and '"error"' not in r.text

# ---------------------------------------------------------------- what is counted, and the end

def test_meters_agree_with_what_was_sent(server):
    before = server.meters()
    said = [server.ask(max_tokens=k) for k in (3, 5)] + [server.ask(n=2, max_tokens=4)]
    streamed = collect(server.ask(stream=True, max_tokens=6, stream_options=dict(include_usage=True)))[1][-1].usage
    server.client.completions.create(model="sage", prompt="A", max_tokens=1)
    for _ in range(2):
        with pytest.raises(NotFoundError): server.ask("nobody")
    with pytest.raises(BadRequestError): server.ask(n=99)
    after = server.meters()
    gained = lambda *k: after.get(k, 0) - before.get(k, 0)
    chats = ("path", "/v1/chat/completions")
    assert [gained("persona_steer_requests_total", chats, ("status", s)) for s in ("200", "404", "400")] == [4, 2, 1]
    assert gained("persona_steer_requests_total", ("path", "/v1/completions"), ("status", "200")) == 1
    assert gained("persona_steer_tokens_total", ("kind", "completion")) == sum(r.usage.completion_tokens for r in said) + streamed.completion_tokens + 1
    assert gained("persona_steer_tokens_total", ("kind", "prompt")) == sum(r.usage.prompt_tokens for r in said) + streamed.prompt_tokens + 1
    assert gained("persona_steer_request_seconds_count") == 8 and gained("persona_steer_first_token_seconds_count") == 5
    assert after["persona_steer_rows_running",] == after["persona_steer_rows_waiting",] == 0
    assert not [k for k in after if k[0] == "persona_steer_requests_total" and dict(k[1:])["status"] == "500"]

def test_sigterm_lets_those_finish_who_speak(servers):
    server = servers[0]
    expected = [server.say("sage", STORY, temperature=1, seed=k, max_tokens=50) for k in range(3)]
    running = [server.ask("sage", STORY, temperature=1, seed=k, max_tokens=50, stream=True) for k in range(3)]
    begun = [next(r).choices[0].delta.content or "" for r in running]
    server.process.send_signal(signal.SIGTERM)
    def refuses():
        try: httpx.get(f"{server.url}/health", timeout=5)
        except httpx.TransportError: return True
    until(refuses, 3)
    assert [b + collect(r)[0] for b, r in zip(begun, running)] == expected
    server.client.close(); server.http.close()
    assert server.process.wait(20) == 0 and not (server.folder / "server.json").exists() and "Traceback" not in server.log.read_text(), server.log.read_text()[-3000:]

def test_ctrl_c_ends_it(hasty):
    assert hasty.end(signal.SIGINT) == 130 and not (hasty.folder / "server.json").exists() and "Traceback" not in hasty.log.read_text()
