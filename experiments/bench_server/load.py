"""Does the server stand 200 clients at once, bad ones among them? On persona-tiny.

    python load.py         # about 2 minutes; adds to results.json, ends with status 1 when something is wrong

For a minute, 140 good clients ask for greedy answers of 4 personas, streamed or not, each as soon as it has its last one, and compare every
answer with the one its persona and question have alone. 60 others leave half-way or while they wait, send broken JSON, ask for models that are
not there, read slowly, or send bodies that are too large. Nothing may be answered with a 5xx, memory must stay within 5% from second 20 on, and
no row may be taken afterwards.
"""
import asyncio, datetime, json, os, platform, random, shutil, sys, tempfile, time
from collections import Counter
from pathlib import Path

import httpx
from openai import APIStatusError, AsyncOpenAI

from bench import HERE, PAIRS, Server, made
from persona_vectors.chat import conversation

SECONDS, SETTLED, FLAT, LONGEST, GOOD, BAD = 60, 20, .05, 16, 140, 10 # of each kind

class Load:
    "200 clients of one server"
    def __init__(self, url, pid): self.url, self.pid, self.counts, self.wrong, self.memory, self.expected = url, pid, Counter(), [], [], {}

    def given(self, model, question, **more): return {**dict(model=model, messages=conversation(question), temperature=0, max_tokens=LONGEST), **more}
    def going(self): return time.monotonic() < self.end

    async def answer(self, model, question, stream):
        "Text of one answer"
        found = await self.client.chat.completions.create(**self.given(model, question, stream=stream))
        return "".join([c.choices[0].delta.content or "" async for c in found]) if stream else found.choices[0].message.content

    async def good(self, k):
        rng = random.Random(k)
        while self.going():
            pair, stream = rng.choice(PAIRS), rng.random() < .7
            self.check(pair, await self.answer(*pair, stream), "answers")

    def check(self, pair, text, kind):
        if text != self.expected[pair]: self.wrong.append(f"{pair}: {text!r}, not {self.expected[pair]!r}")
        self.counts[kind] += 1

    async def refused(self, kind, statuses, content, pause=.5):
        "Sends what cannot be answered, again and again"
        async with httpx.AsyncClient(timeout=120) as http:
            while self.going():
                r = await http.post(f"{self.url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
                if r.status_code not in statuses or "error" not in r.json(): self.wrong.append(f"{kind}: status {r.status_code} {r.text[:200]}")
                self.counts[kind] += 1
                await asyncio.sleep(pause)

    async def leaves_half_way(self, k):
        while self.going():
            pieces = await self.client.chat.completions.create(**self.given("sage", "Tell me a story.", stream=True, max_tokens=300, temperature=1))
            seen = 0
            async for _ in pieces:
                seen += 1
                if seen > k % 4: break
            await pieces.close(); self.counts["left half-way"] += 1

    async def leaves_the_queue(self, k):
        while self.going():
            try: await asyncio.wait_for(self.answer(*PAIRS[k], k % 2 == 0), .3); self.counts["answers"] += 1
            except asyncio.TimeoutError: self.counts["left while waiting"] += 1

    async def reads_slowly(self, k):
        while self.going():
            pair = PAIRS[k % len(PAIRS)]; body = json.dumps(self.given(*pair, stream=True)).encode()
            reader, writer = await asyncio.open_connection(*self.url.removeprefix("http://").split(":"), limit=64)
            writer.write(b"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            got = b""
            while more := await reader.read(200): got += more; await asyncio.sleep(.05)
            writer.close()
            head, _, events = got.partition(b"\r\n\r\n")
            said = [json.loads(e[6:])["choices"][0]["delta"].get("content", "") for e in events.decode().split("\n\n") if e.startswith("data: {")]
            self.check(pair, "".join(said), "read slowly")

    async def watch(self):
        status = Path(f"/proc/{self.pid}/status")
        while self.going():
            self.memory.append(next(int(l.split()[1]) for l in status.read_text().splitlines() if l.startswith("VmRSS")) / 1024)
            await asyncio.sleep(1)

    async def run(self):
        async with AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300) as self.client:
            self.expected = {p: await self.answer(*p, False) for p in PAIRS}
            self.end = time.monotonic() + SECONDS
            unknown, bad, large = json.dumps(self.given("nobody", "Hi")).encode(), b'{"model": "sage", "messages": [', b" " * (2**21 + 1)
            clients = [*(self.good(k) for k in range(GOOD)), *(f(k) for f in (self.leaves_half_way, self.leaves_the_queue, self.reads_slowly) for k in range(BAD)),
                       *(self.refused(*o) for o in (("unknown models", (404,), unknown), ("broken JSON", (400,), bad), ("bodies too large", (413,), large, 2.)) for _ in range(BAD))]
            found = await asyncio.gather(self.watch(), *clients, return_exceptions=True)
            self.wrong += [f"{type(e).__name__}: {e}" + (f" {e.status_code}" if isinstance(e, APIStatusError) else "") for e in found if e is not None]
            async with httpx.AsyncClient() as http:
                await asyncio.sleep(2)
                health = (await http.get(f"{self.url}/health")).json()
                statuses = Counter()
                for l in (await http.get(f"{self.url}/metrics")).text.splitlines():
                    if l.startswith("persona_steer_requests_total{"): statuses[l.split('status="')[1][:3]] += int(float(l.split()[-1]))
        return len(clients), health, statuses

def main():
    folder = Path(tempfile.mkdtemp()); made(folder)
    with Server(folder) as server:
        load = Load(server.url, server.process.pid)
        clients, health, statuses = asyncio.run(load.run())
        alive = server.process.poll() is None
    shutil.rmtree(folder)
    settled = load.memory[SETTLED:]
    grown = (max(settled) - min(settled)) / settled[0]
    faults = [*load.wrong[:5], *([f"{len(load.wrong)} faults in all"] if load.wrong else []), *([] if alive else ["the server ended"]), *([f"memory moved by {grown:.1%}"] if grown > FLAT else []),
              *([f"rows are taken: {health}"] if health["running"] or health["waiting"] else []), *(f"{n} answers with status {s}" for s, n in statuses.items() if s.startswith("5")), *([] if server.process.returncode == 0 else [f"it ended with {server.process.returncode}"])]
    result = dict(date=str(datetime.date.today()), machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", load=round(os.getloadavg()[0], 1), seconds=SECONDS, clients=clients, counts=dict(load.counts), statuses=dict(sorted(statuses.items())), memory_mb=dict(at_20_s=round(settled[0]), lowest=round(min(settled)), highest=round(max(settled)), moved_percent=round(100 * grown, 2)), rows_afterwards=health["running"] + health["waiting"], faults=faults)
    print(json.dumps(result, indent=1))
    out = HERE / "results.json"; before = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**before, "load": result}, indent=1) + "\n")
    sys.exit(bool(faults))

if __name__ == "__main__": main()
