"""How fast, and in how much memory, are response means read? Ours beside the plain way, three peers, and a limit.

    python bench.py                     # workloads A and B on the CPU, all methods side by side; writes results.json
    python bench.py --workload C        # on a GPU: a random model of exactly Gemma 3 27B's text shape

A: the tests' 414 responses of persona-tiny, from text to vectors. B: 414 random conversations (23 system prompts x 18 questions) with
realistic lengths on a random Llama of 110M parameters; from token ids to means. C: as B with longer prompts, on the GPU in bfloat16.
Every method runs in a process of its own (C: all in one, its 54 GB are made once); all are checked against each other.
"""
import argparse, datetime, json, platform, random, resource, subprocess, sys, time
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from persona_vectors.catalog import EVAL_QUESTIONS, PERSONAS
from persona_vectors.chat import conversation
from persona_vectors.config import PersonaVectorConfig, layer_at
from persona_vectors.extraction import ActivationExtractor
from persona_vectors.models import load_model
from persona_vectors.reading import Reader, Row, shared_prefixes
from persona_vectors.responses import load_responses

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from shapes import gemma_27b

RESPONSES = HERE.parents[1] / "data/test_fixtures/responses_cache.json"

# ---------------------------------------------------------------- workloads
def conversations_a(n):
    responses = load_responses(RESPONSES)
    return [conversation(q, PERSONAS[p], responses[p, q]) for p in PERSONAS for q in EVAL_QUESTIONS][:n]

def rows_b(n, vocab, seed=0):
    "Token ids with the lengths of real conversations: system 20-80, question 10-40, response 40-256 tokens"
    rng = random.Random(seed)
    def ids(lo, hi): return [rng.randrange(10, vocab) for _ in range(rng.randint(lo, hi))]
    questions = [ids(10, 40) for _ in range(18)]; rows = []
    for _ in range(23):
        system = ids(20, 80)
        for q in questions: answer = ids(40, 256); head = system + q; rows.append(Row(head + answer, list(range(len(head), len(head) + len(answer)))))
    return rows[:n]

def model_b():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True)).eval()

# ---------------------------------------------------------------- the peers, each at its best batch size
def padded(rows, device):
    width = max(len(r.ids) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long); mask = torch.zeros_like(ids); answer = torch.zeros(len(rows), width)
    for i, r in enumerate(rows): ids[i, :len(r.ids)] = torch.tensor(r.ids); mask[i, :len(r.ids)] = 1; answer[i, r.at] = 1
    return ids.to(device), mask.to(device), answer.to(device)

def mean(h, answer): return ((h.float() * answer[..., None]).sum(1) / answer.sum(1, keepdim=True)).cpu()

def in_batches(model, rows, size, read): return torch.cat([read(*padded(rows[i:i + size], model.device)) for i in range(0, len(rows), size)])

@torch.inference_mode()
def plain(model, rows, layer, size):
    "Padded batches, output_hidden_states, the whole model"
    return in_batches(model, rows, size, lambda ids, mask, answer: mean(model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer + 1], answer))

@torch.inference_mode()
def steering_vectors(model, rows, layer, size):
    from steering_vectors import record_activations
    def read(ids, mask, answer):
        with record_activations(model, layer_type="decoder_block", layer_nums=[layer]) as found: model(ids, attention_mask=mask)
        return mean(found[layer][0], answer)
    return in_batches(model, rows, size, read)

@torch.inference_mode()
def nnsight(model, rows, layer, size):
    from nnsight import NNsight
    wrapped = NNsight(model)
    def read(ids, mask, answer):
        with wrapped.trace(ids, attention_mask=mask) as tracer:
            h = wrapped.model.layers[layer].output.save()
            tracer.stop()
        return mean(h[0] if isinstance(h, tuple) else h, answer)
    return in_batches(model, rows, size, read)

@torch.inference_mode()
def assistant_axis(model, rows, layer, size):
    "That project's approach, in our words: hooks on all layers, padded, stacked on the CPU, then averaged"
    def read(ids, mask, answer):
        kept = []
        hooks = [b.register_forward_hook(lambda m, i, o: kept.append((o[0] if isinstance(o, tuple) else o).cpu())) for b in model.get_decoder().layers]
        try: model(ids, attention_mask=mask)
        finally: [h.remove() for h in hooks]
        stacked = torch.stack(kept); return mean(stacked[layer], answer.cpu())
    return in_batches(model, rows, size, read)

def ours(model, rows, layer, size, **how):
    out = torch.empty(len(rows), model.config.hidden_size)
    for batch, values in Reader(model, [layer], **how)(rows): out[batch] = values[:, 0]
    return out

def ours_compiled(model, rows, layer, size): return ours(model, rows, layer, size, compile_norms=True)

def unique_tokens(rows):
    "How many tokens have to be computed: every shared beginning once"
    return sum(m + sum(len(rows[i].ids) - m for i in g) for m, g in shared_prefixes(rows))

@torch.inference_mode()
def limit(model, rows, layer, size):
    "Nothing can be faster: a bare decoder cut after the layer, over just as many tokens as are unique, in rows of the mean length, without padding, mask or hooks"
    decoder = model.get_decoder(); layers, norm = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = layers[:layer + 1], torch.nn.Identity()
    n = unique_tokens(rows); width = round(sum(len(r.ids) for r in rows) / len(rows)); size = max(1, (1024 if model.device.type == "cpu" else 16384) // width)
    try:
        while n > 0: b = max(1, min(size, n // width)); decoder(torch.randint(10, 1000, (b, min(width, n)), device=model.device), use_cache=False); n -= b * width
    finally: decoder.layers, decoder.norm = layers, norm

PEERS = ("plain", "steering-vectors", "nnsight", "assistant-axis")
METHODS = {"plain": plain, "steering-vectors": steering_vectors, "nnsight": nnsight, "assistant-axis": assistant_axis, "ours": ours, "ours, compiled norms": ours_compiled, "limit": limit}

# ---------------------------------------------------------------- workload A goes from text to vectors
def rows_from_text(tokenizer, talks):
    "What a careful user writes: prompt and response tokenized apart"
    def one(c):
        head = tokenizer(tokenizer.apply_chat_template(c[:-1], tokenize=False, add_generation_prompt=True), add_special_tokens=False).input_ids
        answer = tokenizer(c[-1]["content"], add_special_tokens=False).input_ids
        return Row(head + answer, list(range(len(head), len(head) + len(answer))))
    return [one(c) for c in talks]

def job(workload, method, n, size):
    "(a function that does the work once, the model)"
    if workload == "A":
        config = PersonaVectorConfig(model_name="persona-tiny", device="cpu"); model, tokenizer = load_model(config)
        talks, layer, extractor = conversations_a(n), layer_at(8, .65), ActivationExtractor(config, model, tokenizer)
        if method == "ours": return lambda: extractor.extract(talks, layer, progress=False)[:, 0]
        return lambda: METHODS[method](model, rows_from_text(tokenizer, talks), layer, size)
    model = model_of(workload)
    rows, layer = rows_b(n, model.config.vocab_size), layer_at(model.config.num_hidden_layers, .65)
    return lambda: METHODS[method](model, rows, layer, size)

@cache
def model_of(workload): return model_b() if workload == "B" else gemma_27b()

# ---------------------------------------------------------------- one process per method
def used(): return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
def peak(): return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))

def worker(a):
    "Prints a line of JSON: seconds of each round, memory beyond the weights, a checksum of the vectors"
    work = job(a.workload, a.method, a.n, a.size)
    if a.workload == "A": job(a.workload, a.method, min(a.n, 8), a.size)() # warm
    Path("/proc/self/clear_refs").write_text("5"); before = used()
    seconds, out = [], None
    for _ in range(a.rounds): t0 = time.perf_counter(); out = work(); seconds.append(time.perf_counter() - t0)
    print(json.dumps(dict(seconds=seconds, memory=peak() - before, first=checksum(out))))

def checksum(out): return None if out is None else out[:, :4].flatten()[:400].tolist()

def on_gpu(workload, method, n, size, rounds):
    "The same in this process, after a few rows to warm up"
    try:
        job(workload, method, 24, size)()
        torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated(); work, seconds = job(workload, method, n, size), []
        for _ in range(rounds): torch.cuda.synchronize(); t0 = time.perf_counter(); out = work(); torch.cuda.synchronize(); seconds.append(time.perf_counter() - t0)
    except torch.OutOfMemoryError as e: print(f"  {method}, {size} rows at once: {str(e).splitlines()[0]}", flush=True); return None
    return dict(seconds=seconds, memory=torch.cuda.max_memory_allocated() - before, first=checksum(out))

@torch.inference_mode()
def matmul_peak(seconds=3., shape=(16384, 5376, 21504)):
    "Measured FLOP/s of a bfloat16 product as large as the model's own"
    n, k, m = shape; x = torch.randn(n, k, device="cuda", dtype=torch.bfloat16); w = torch.randn(k, m, device="cuda", dtype=torch.bfloat16); out = torch.empty(n, m, device="cuda", dtype=torch.bfloat16)
    def run(times): torch.cuda.synchronize(); t0 = time.perf_counter(); [torch.mm(x, w, out=out) for _ in range(times)]; torch.cuda.synchronize(); return (time.perf_counter() - t0) / times
    return 2 * n * k * m / run(max(1, int(seconds / run(10))))

def flops(model, rows, layer):
    "Of the matrices of all blocks up to the layer, for just as many tokens as are unique; attention's own products left out, so a share is rather too low"
    return 2 * unique_tokens(rows) * sum(p.numel() for b in model.get_decoder().layers[:layer + 1] for p in b.parameters() if p.ndim == 2)

def measure(workload, method, n, size, rounds):
    if workload == "C": return on_gpu(workload, method, n, size, rounds)
    done = subprocess.run([sys.executable, __file__, "--worker", "--workload", workload, "--method", method, "--n", str(n), "--size", str(size), "--rounds", str(rounds)], capture_output=True, text=True)
    if done.returncode: print(f"  {method}: {done.stderr.strip().splitlines()[-1]}"); return None
    return json.loads(done.stdout.splitlines()[-1])

def compare(workload, a):
    "All methods, interleaved round by round; peers with the batch size that is fastest on a sixth of the work"
    print(f"workload {workload}: {a.n} conversations, {a.rounds} rounds", flush=True)
    sizes = {}
    for method in [m for m in PEERS if m in a.peers]:
        if len(a.sizes) == 1: sizes[method] = a.sizes[0]; continue
        tried = {s: measure(workload, method, a.n // 6, s, 1) for s in a.sizes}
        tried = {s: r["seconds"][0] for s, r in tried.items() if r}
        if tried: sizes[method] = min(tried, key=tried.get)
    found = {}
    for _ in range(a.rounds):
        for method in [m for m in METHODS if m in sizes or m not in PEERS and (workload == "C" or m != "ours, compiled norms")]:
            r = measure(workload, method, a.n, sizes.get(method, 0), 1)
            if r: o = found.setdefault(method, dict(r, seconds=[], batch_size=sizes.get(method))); o["seconds"] += r["seconds"]; o["memory"] = max(o["memory"], r["memory"]); print(f"  {method}: {r['seconds'][0]:.2f} s", flush=True)
    reference = torch.tensor(found["plain"]["first"])
    for method, r in found.items():
        first = r.pop("first")
        if first and not torch.allclose(torch.tensor(first), reference, rtol=1e-3, atol=1e-3 if workload != "C" else .5): raise SystemExit(f"{method} computes something else than the plain way")
    best = {m: min(r["seconds"]) for m, r in found.items()}
    for m, r in found.items():
        r["plain_over_this"] = round(best["plain"] / best[m], 3); r["memory_share"] = round(r["memory"] / found["plain"]["memory"], 3)
        print(f"  {m:18} {best[m]:8.2f} s   plain/this {r['plain_over_this']:5.2f}   memory {r['memory'] / 1e6:8.0f} MB ({r['memory_share']:.2f} of plain)   batch {r['batch_size'] or '-'}", flush=True)
    peers = [best[m] for m in PEERS[1:] if m in best]
    summary = dict(over_plain=best["plain"] / best["ours"], over_fastest_peer=min(peers) / best["ours"] if peers else None, of_limit=best["limit"] / best["ours"], memory_share=found["ours"]["memory_share"])
    if workload == "C":
        model = model_of(workload); layer = layer_at(model.config.num_hidden_layers, .65); rows = rows_b(a.n, model.config.vocab_size); peak = matmul_peak()
        summary |= dict(seconds=best["ours"], layer=layer, unique_tokens=unique_tokens(rows), matmul_peak_tflops=peak / 1e12, **{f"{m}, of matmul peak": flops(model, rows, layer) / best[m] / peak for m in ("ours", "ours, compiled norms", "limit")})
    print("  " + ", ".join(f"{k} {v:.2f}" for k, v in summary.items() if v), flush=True)
    return dict(methods=found, summary=summary)

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--workload", choices=("A", "B", "C", "AB"), default="AB"); ap.add_argument("--n", type=int, default=414); ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--sizes", type=int, nargs="*", default=[8, 16, 32], help="batch sizes the peers may choose from"); ap.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS); ap.add_argument("--out", type=Path, default=HERE / "results.json")
    ap.add_argument("--worker", action="store_true", help=argparse.SUPPRESS); ap.add_argument("--method", help=argparse.SUPPRESS); ap.add_argument("--size", type=int, default=16, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.worker: return worker(a)
    results = {w: compare(w, a) for w in a.workload}
    before = json.loads(a.out.read_text()) if a.out.exists() else {}
    about = dict(date=str(datetime.date.today()), cpus=torch.get_num_threads(), machine=torch.cuda.get_device_name() if a.workload == "C" else platform.machine(), torch=torch.__version__, n=a.n, rounds=a.rounds)
    a.out.write_text(json.dumps({**before, **{w: dict(about, **r) for w, r in results.items()}}, indent=1) + "\n")

if __name__ == "__main__": main()
