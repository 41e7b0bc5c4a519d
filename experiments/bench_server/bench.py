"""What do batches gain, and what does HTTP cost? 16 streams of 4 personas, on persona-tiny.

    python bench.py        # about 3 minutes on 2 cores; writes results.json

The same 16 requests (4 personas x 4 questions, greedy, at most 64 tokens) are answered in four ways: through HTTP one after the other, through
HTTP all at once (OpenAI's client against a `persona-steer serve` of its own), by a `Batcher` without HTTP, and by a plain loop over
`SteeringEngine.generate`. All texts must be equal before anything is counted. The ways take turns, in a new order each round; medians count.
Processor seconds are those of the process that runs the model, so that they depend less on what else the machine does.
"""
import asyncio, datetime, json, os, platform, random, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from openai import AsyncOpenAI

from persona_vectors.batching import Batcher, asked_of
from persona_vectors.chat import conversation
from persona_vectors.engine import Manners, SteeringEngine
from persona_vectors.personas import PersonaManager
from persona_vectors.settings import EMBEDDED, get_config

HERE, ROUNDS, LONGEST, BAR = Path(__file__).resolve().parent, 7, 64, 4
PERSONAS = {"persona-tiny": None, "sage": "sage", "trickster": "trickster", "sage:0.5+trickster:0.3": "0.5 sage + 0.3 trickster"}
QUESTIONS = ["What is truth?", "Why do people tell stories?", "How do I bake bread?", "Where does the river go after the rain?"]
PAIRS = [(m, q) for q in QUESTIONS for m in PERSONAS]

def made(folder):
    "A library with a sage and a trickster"
    manager = PersonaManager(get_config(None, EMBEDDED, extraction={"questions": 6}, data_dir=folder), progress=False)
    for k in ("sage", "trickster"): manager.create_from_archetype(k)
    return manager

class Server:
    "A `persona-steer serve` for as long as the context lasts"
    def __init__(self, folder, *args): self.folder, self.args = folder, args
    def __enter__(self):
        env = {**os.environ, "PERSONA_STEER_DATA_DIR": str(self.folder), "PERSONA_STEER_EXTRACTION__QUESTIONS": "6", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen([Path(sys.executable).parent / "persona-steer", "serve", "--port", "0", *self.args], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder)
        note = self.folder / "server.json"
        while not note.exists():
            if self.process.poll() is not None: raise SystemExit(f"the server ended with {self.process.returncode}")
            time.sleep(.1)
        self.url = json.loads(note.read_text())["url"]
        return self
    def __exit__(self, *_): self.process.terminate(); self.process.wait(60)
    def seconds(self):
        "Of the processor, so far"
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

async def stream(client, model, question):
    "(text, seconds to the first piece, tokens)"
    start, first, text, tokens = time.perf_counter(), None, "", 0
    async for c in await client.chat.completions.create(model=model, messages=conversation(question), temperature=0, max_tokens=LONGEST, stream=True, stream_options=dict(include_usage=True)):
        if c.usage: tokens = c.usage.completion_tokens
        for o in c.choices:
            if o.delta.content and first is None: first = time.perf_counter() - start
            text += o.delta.content or ""
    return text, first, tokens

def through_http(server, together):
    async def go():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            await client.models.list() # a connection is there
            before, start = server.seconds(), time.perf_counter()
            found = await asyncio.gather(*(stream(client, *p) for p in PAIRS)) if together else [await stream(client, *p) for p in PAIRS]
            return time.perf_counter() - start, server.seconds() - before, found
    return asyncio.run(go())

def without_http(batcher, manners):
    asked = [asked_of(manners, conversation(q), manners.manner(PERSONAS[m]), max_tokens=LONGEST, temperature=0) for m, q in PAIRS]
    start, before = time.perf_counter(), time.process_time()
    jobs = batcher.answer(asked)
    return time.perf_counter() - start, time.process_time() - before, [(j.text.shown, None, len(j.said)) for j in jobs]

def plain_loop(engine, plain):
    start, before, found = time.perf_counter(), time.process_time(), []
    for m, q in PAIRS:
        text = engine.set(PERSONAS[m], plain.strength, plain.safety).generate(conversation(q), max_tokens=LONGEST, temperature=0)
        found.append((text, None, len(engine.turn.said)))
    return time.perf_counter() - start, time.process_time() - before, found

def share(xs, q): return round(1000 * statistics.quantiles(xs, n=100, method="inclusive")[q - 1], 1)

def main():
    folder = Path(tempfile.mkdtemp()); manager = made(folder); manners = Manners(manager); batcher, engine = Batcher(manners), SteeringEngine(manager)
    with Server(folder) as server:
        ways = {"HTTP, one after the other": lambda: through_http(server, False), "HTTP, 16 at once": lambda: through_http(server, True), "batch of 16, no HTTP": lambda: without_http(batcher, manners), "plain loop, no HTTP": lambda: plain_loop(engine, manners.plain)}
        texts = {name: [t for t, _, _ in way()[2]] for name, way in ways.items()} # warm
        expected = texts["plain loop, no HTTP"]
        if len(set(expected)) < 12 or any(t != expected for t in texts.values()): raise SystemExit(f"the texts differ: {texts}")
        runs, order = {name: [] for name in ways}, list(ways)
        for k in range(ROUNDS):
            random.Random(k).shuffle(order)
            for name in order: runs[name].append(ways[name]())
    batcher.close(); shutil.rmtree(folder)
    found = {}
    for name, rs in runs.items():
        tokens, firsts = sum(n for _, _, n in rs[0][2]), [f for r in rs for _, f, _ in r[2] if f is not None]
        seconds, cpu = (statistics.median(r[i] for r in rs) for i in (0, 1))
        found[name] = dict(tokens=tokens, seconds=round(seconds, 3), tokens_a_second=round(tokens / seconds), processor_ms_a_token=round(1000 * cpu / tokens, 3), **({"first_token_ms": dict(p50=share(firsts, 50), p95=share(firsts, 95))} if firsts else {}), rounds=[round(r[0], 3) for r in rs])
        print(f"{name:28}{found[name]['seconds']:8.3f} s{found[name]['tokens_a_second']:8} tokens/s{found[name]['processor_ms_a_token']:8.3f} ms of the processor a token  {found[name].get('first_token_ms', '')}", flush=True)
    slow, fast, ceiling = (runs[k] for k in ("HTTP, one after the other", "HTTP, 16 at once", "batch of 16, no HTTP"))
    times = statistics.median(a[0] / b[0] for a, b in zip(slow, fast))
    tokens = found["HTTP, 16 at once"]["tokens"]
    of_http = dict(ms_a_token=round(statistics.median(1000 * (a[0] - b[0]) / tokens for a, b in zip(fast, ceiling)), 3), processor_ms_a_token=round(statistics.median(1000 * (a[1] - b[1]) / tokens for a, b in zip(fast, ceiling)), 3), share_of_ceiling=round(statistics.median(b[0] / a[0] for a, b in zip(fast, ceiling)), 2))
    print(f"16 at once: {times:.2f} times one after the other (at least {BAR} aimed at); HTTP: {of_http}")
    result = dict(date=str(datetime.date.today()), machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}", load=round(os.getloadavg()[0], 1), rounds=ROUNDS, ways=found, times_one_after_the_other=round(times, 2), bar=BAR, met=times >= BAR, http=of_http)
    out = HERE / "results.json"; before = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**before, "bench": result}, indent=1) + "\n")

if __name__ == "__main__": main()
