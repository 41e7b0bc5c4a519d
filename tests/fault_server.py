"""An OpenAI-compatible server that misbehaves on purpose, by a seeded schedule. Its only purpose is to be a hard customer of our client.

    python fault_server.py --port 8000 --rate .3            # prints its address when it listens

Whether the n-th sending of a request is answered well depends on the seed, the request and n alone, not on the order of arrival. What it
answers depends on the request alone, so a test can compute it: see `text_of`. GET /stats tells what was seen: requests, the most at once,
faults by kind, and how often each request was answered.
"""
import argparse, asyncio, hashlib, json, math, random, sys
from collections import Counter

HARD = ("429", "429-later", "500", "502", "503", "cut", "slow", "hang", "invalid", "html", "no-choices", "no-message")  # no answer comes of these
SOFT = ("null", "other-model", "length", "no-logprobs", "parts", "half-emoji", "no-usage", "null-top")  # an answer, with something wrong about it
FAULTS = HARD + SOFT

def key_of(body): return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

def draft_of(asked):
    "What a careless author of traits writes: prose, then too little, then what was asked for"
    complaint = asked.partition("could not be used: ")[2]
    if not complaint: return "Certainly! Here is what you asked for: {pairs: five of them}"
    pairs = [dict(on=f"You are full of it in way {n}.", off=f"You are free of it in way {n}.") for n in range(5)]
    return "```json\n" + json.dumps(dict(pairs=pairs, questions=[f"What about {n}?" for n in range(3 if "JSON cannot be read" in complaint else 40)], rubric="Score from 0 to 100.")) + "\n```"

def text_of(body):
    "What is answered to a request: a number to a judge's question, a sentence to any other"
    if body["model"] == "author": return draft_of(body["messages"][-1]["content"])
    key = key_of({k: v for k, v in body.items() if k not in ("logprobs", "top_logprobs")})
    if body["model"] == "judge-refuses": return "I'm sorry, I can't help with that."
    if body["model"] == "judge-talks": return "Well, that depends."
    return str(int(key[:8], 16) % 101) if "judge" in body["model"] else f"An answer, number {key[:12]}, to: {body['messages'][-1]['content']}"

def fault_of(seed, rate, faults, body, n):
    "What goes wrong at the n-th sending of a request, or None"
    rng = random.Random(f"{seed} {key_of(body)} {n}")
    return rng.choice(faults) if rng.random() < rate else None

class Server:
    def __init__(self, a):
        self.a, self.sent, self.answered, self.faults = a, Counter(), Counter(), Counter()
        self.now = self.most = self.requests = 0; self.keys, self.bodies = set(), []

    async def connection(self, reader, writer):
        try:
            while await self.request(reader, writer): pass
        except (ConnectionError, asyncio.IncompleteReadError): pass
        finally: writer.close()

    async def request(self, reader, writer):
        "One request of a connection; False ends the connection"
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
        method, path, _ = head[0].split(" ", 2)
        raw = await reader.readexactly(int(fields.get("content-length", 0)))
        if path == "/stats": return self.send(writer, dict(requests=self.requests, most_at_once=self.most, faults=self.faults, answered=list(self.answered.values()), sent=sum(self.sent.values()), twice=sum(n > 1 for n in self.answered.values())))
        if path == "/bodies": return self.send(writer, self.bodies)
        if path == "/v1/models": return self.send(writer, dict(object="list", data=[dict(id=self.a.model, object="model", created=0, owned_by="test", pricing=dict(prompt="0.000001", completion="0.000002"))]))
        if fields.get("authorization") == "Bearer wrong-key": return self.send(writer, dict(error=dict(message="Incorrect API key provided: wrong-key", code=401)), 401)
        body = json.loads(raw); key = key_of(body); self.sent[key] += 1; self.requests += 1
        if self.a.keep_bodies: self.bodies.append(body)
        self.now += 1; self.most = max(self.most, self.now)
        try: return await self.answer(reader, writer, body, key, fault_of(self.a.seed, self.a.rate, self.a.faults, body, self.sent[key]))
        finally: self.now -= 1

    async def answer(self, reader, writer, body, key, fault):
        if fault: self.faults[fault] += 1
        await asyncio.sleep(self.a.delay)
        if fault == "429": return self.send(writer, dict(error=dict(message="slow down")), 429)
        if fault == "429-later": return self.send(writer, dict(error=dict(message="slow down")), 429, extra="Retry-After: 0.2\r\n")
        if fault in ("500", "502", "503"): return self.send(writer, dict(error=dict(message="out of order")), int(fault))
        if fault == "hang": await reader.read(1); return False
        if fault == "invalid": return self.send(writer, b'{"id": "x", "choices": [{"mess')
        if fault == "html": return self.send(writer, b"<html><body><h1>502 Bad Gateway</h1></body></html>", kind="text/html")
        if body["model"] == "judge-without-logprobs" and body.get("logprobs"): return self.send(writer, dict(error=dict(message="logprobs is not supported with this model")), 400)
        text = text_of(body)
        message = dict(role="assistant", content={"null": None, "parts": [dict(type="thinking", thinking=[]), dict(type="text", text=text)], "half-emoji": text + "\ud83d"}.get(fault, text))
        logprobs = None
        if body.get("logprobs") and fault != "no-logprobs" and not self.a.no_logprobs:
            top = [(text, .6), (str(min(100, int(text) + 1)) if text.isdigit() else "x", .3), ("the", .1)]
            if body["model"] == "judge-digits": top = [(text[0], .9), ("the", .1)]  # a tokenizer that writes numbers digit by digit
            logprobs = dict(content=[dict(token=top[0][0], bytes=None, logprob=math.log(top[0][1]), top_logprobs=[dict(token=t, bytes=None, logprob=math.log(p)) for t, p in top])])
        if fault == "null-top": logprobs = dict(content=[dict(token=text, bytes=None, logprob=-.1, top_logprobs=None)])
        said = dict(id="chatcmpl-1", object="chat.completion", created=0, model="another/small-model" if fault == "other-model" else body["model"], provider="Testing",
                    choices=[] if fault == "no-choices" else [dict(index=0, message=None if fault == "no-message" else message, finish_reason="length" if fault == "length" else "stop", logprobs=logprobs)],
                    usage={} if fault == "no-usage" else dict(prompt_tokens=11, completion_tokens=7, total_tokens=18, cost=.000025))
        data = json.dumps(said).encode()
        if fault in ("cut", "slow"):
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data[:40]); await writer.drain()
            for byte in data[40:] if fault == "slow" else b"":
                writer.write(bytes([byte])); await writer.drain(); await asyncio.sleep(self.a.slow)
            if fault == "cut": writer.transport.abort()
            return False
        if fault not in ("no-choices", "no-message"): self.answered[key] += 1
        return self.send(writer, data)

    def send(self, writer, data, status=200, extra="", kind="application/json"):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n{extra}\r\n".encode() + data)
        return True

async def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--port", type=int, default=0); ap.add_argument("--seed", type=int, default=0); ap.add_argument("--rate", type=float, default=.3)
    ap.add_argument("--faults", nargs="*", default=list(FAULTS), choices=FAULTS); ap.add_argument("--model", default="test/model")
    ap.add_argument("--delay", type=float, default=0., help="seconds before every answer"); ap.add_argument("--slow", type=float, default=.05, help="seconds between the bytes of a slow answer")
    ap.add_argument("--no-logprobs", action="store_true"); ap.add_argument("--keep-bodies", action="store_true")
    server = Server(ap.parse_args())
    listening = await asyncio.start_server(server.connection, "127.0.0.1", server.a.port)
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", flush=True)
    await listening.serve_forever()

if __name__ == "__main__":
    try: asyncio.run(main())
    except KeyboardInterrupt: sys.exit(0)
