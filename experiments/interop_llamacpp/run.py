"""Does llama.cpp say what we say? Control vectors and baked models in its own engine, against `steer`.

    python run.py --source build/source/vendor/llama.cpp --server build/llama/bin/llama-server        # about 3 minutes on a core; writes results.json

Every model is written as float32, converted by llama.cpp's own convert_hf_to_gguf.py, and read by llama-cpp-python with keys and values in float32
and flash attention off, so that only the order of sums differs. 20 prompts, logits of every token. What is compared must agree, what is one layer
off must not, and a greedy answer must be the same token by token. With --server the same files are given to llama-server on its command line.
"""
import argparse, copy, ctypes, datetime, json, logging, platform, shutil, socket, subprocess, sys, time, urllib.request
from importlib.metadata import version
from pathlib import Path

import llama_cpp, numpy as np, torch
from gguf import GGUFReader, GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from persona_vectors.baking import bake
from persona_vectors.catalog import EVAL_QUESTIONS, PERSONAS
from persona_vectors.chat import chat_prompt, conversation
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.control_vectors import export_gguf
from persona_vectors.formats import import_vectors
from persona_vectors.extraction import ActivationExtractor
from persona_vectors.interventions import Add
from persona_vectors.models import blocks, model_source, n_layers
from persona_vectors.steering import steer
from persona_vectors.vectors import Vector

HERE, BAR, ANSWER, F32 = Path(__file__).resolve().parent, 2e-5, 24, 0
BUILD = HERE / "build" / "models"
SIZE = dict(vocab_size=6144, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=1)
OWN = dict(gpt2=dict(vocab_size=6144, n_embd=128, n_layer=6, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=1), mistral=dict(sliding_window=None), qwen2=dict(use_sliding_window=False), gpt_neox=dict(rotary_pct=.5), phi=dict(num_key_value_heads=4),
           granite=dict(residual_multiplier=.4, embedding_multiplier=3., attention_multiplier=.2, logits_scaling=2.))
BAKED = ("llama", "mistral", "qwen2", "granite", "smollm3", "gpt2", "gpt_neox", "phi")

def without_windows():
    "persona-tiny with every layer seeing everything: llama.cpp's Qwen3 knows no sliding window. The weights are the same"
    config = AutoConfig.from_pretrained(model_source("persona-tiny"))
    config.layer_types, config.use_sliding_window, config.sliding_window = ["full_attention"] * config.num_hidden_layers, False, None
    return AutoModelForCausalLM.from_pretrained(model_source("persona-tiny"), config=config, dtype=torch.float32).eval()

def random_model(kind):
    "Weights large enough that every token counts"
    torch.manual_seed(0)
    own = OWN.get(kind, {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(own if "vocab_size" in own else {**SIZE, **own}))).float().eval()
    for name, p in model.named_parameters():
        with torch.no_grad(): p.normal_(0, 1. if "embed" in name or "wte" in name else .08) if p.ndim > 1 else p.add_(.1 * torch.randn_like(p))
    return model

class Converter:
    "llama.cpp's own; only the name of the pre-tokenizer, which it looks up for published tokenizers, is given"
    OLD = dict(gpt2=[("n_ctx", "n_positions", 512)], gpt_neox=[("rotary_pct", "", .5)])  # names of configs that transformers 5 writes no more and the converter still reads
    def __init__(self, source): self.source = source.resolve()
    def __call__(self, folder):
        out, file = folder.with_suffix(".gguf"), folder / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**{k: config.get(o, x) for k, o, x in self.OLD.get(config["model_type"], [])}, **config}))
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import convert_hf_to_gguf; from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda *_: 'gpt-2'; convert_hf_to_gguf.main()"
        done = subprocess.run([sys.executable, "-c", code, str(self.source), str(folder), "--outtype", "f32", "--outfile", str(out)], capture_output=True, text=True)
        if done.returncode: raise ValueError(f"not converted: {done.stderr.strip().splitlines()[-1]}")
        return out

class Engine:
    "A GGUF in llama.cpp"
    def __init__(self, path): self.llama = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False, n_threads=1, type_k=F32, type_v=F32, flash_attn=False)

    def control(self, path=None, shift=0):
        "Apply a file as llama.cpp's loader does: direction.k at (k-1)*n_embd; `shift` moves it to other layers"
        n, context, rows = self.llama.n_embd(), self.llama._ctx.ctx, {} if path is None else {int(t.name.split(".")[1]) + shift: np.array(t.data) for t in GGUFReader(path).tensors}
        data = np.zeros(n * max(rows, default=0), dtype=np.float32)
        for k, v in rows.items(): data[(k - 1)*n:k*n] = v
        done = llama_cpp.llama_set_adapter_cvec(context, data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) if rows else None, data.size, n, 1, self.llama._model.n_layer() if hasattr(self.llama._model, "n_layer") else 999)
        if done: raise SystemExit(f"llama.cpp refuses {path}: {done}")

    def logits(self, ids):
        self.llama.reset(); self.llama.eval(ids)
        return np.array(self.llama.scores[:len(ids)])

    def answer(self, ids):
        "Greedy, with its cache"
        self.llama.reset(); self.llama.eval(ids); said = []
        for _ in range(ANSWER): said.append(int(self.llama.scores[self.llama.n_tokens - 1].argmax())); self.llama.eval(said[-1:])
        return said

@torch.inference_mode()
def ours(model, prompts, *additions, answers=True):
    "(logits of every token, greedy answers)"
    read = lambda: ([model(torch.tensor([p]), use_cache=False).logits[0].numpy() for p in prompts], [model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, len(p):].tolist() for p in prompts] if answers else [])
    if not additions: return read()
    with steer(model, *additions): return read()

def farthest(a, b): return max(float(np.abs(x[:, :y.shape[1]] - y[:, :x.shape[1]]).max()) for x, y in zip(a, b))

def half_norms(model, prompts):
    "{layer: half the median length of the residual stream}"
    hidden = [[] for _ in blocks(model)]
    hooks = [b.register_forward_hook(lambda m, i, o, h=h: h.append((o[0] if isinstance(o, tuple) else o)[0].norm(dim=-1))) for b, h in zip(blocks(model), hidden)]
    with torch.inference_mode(): [model(torch.tensor([p]), use_cache=False) for p in prompts]
    for h in hooks: h.remove()
    return {l: .5*torch.cat(h).median().item() for l, h in enumerate(hidden)}

def control_vectors(name, model, engine, prompts, vector, told):
    "A file per layer, and one of several layers, against Add; moved by one layer it must not agree"
    lengths, rows, last = half_norms(model, prompts), [], n_layers(model) - 1
    plain = ours(model, prompts)
    engine.control()
    unsteered = [engine.logits(p) for p in prompts]
    exact = ours(copy.deepcopy(model).double(), prompts, answers=False)[0]
    told["unsteered"] = dict(difference=farthest(unsteered, plain[0]), largest_logit=max(float(np.abs(x).max()) for x in plain[0]), llama_cpp_from_float64=farthest(unsteered, exact), ours_from_float64=farthest(plain[0], exact), answers=sum(engine.answer(p) == a for p, a in zip(prompts, plain[1])), of=len(prompts))
    unit = vector.unit()
    for layers in [[1], [last//2], [last - 1], [last], [1, last//2, last]]:
        additions = [Add(unit, lengths[l]/len(layers)**.5, l) for l in layers]
        path = BUILD / f"{name}-{'-'.join(map(str, layers))}.gguf"
        export_gguf(additions, path, model=model)
        wanted, said = ours(model, prompts, *additions)
        engine.control(path); found = [engine.logits(p) for p in prompts]
        row = dict(layers=layers, moved=farthest(wanted, plain[0]), difference=farthest(found, wanted), answers=sum(engine.answer(p) == a for p, a in zip(prompts, said)), changed=sum(a != b for a, b in zip(said, plain[1])), of=len(prompts))
        for shift in (-1, 1):
            if min(layers) + shift >= 1 and max(layers) + shift <= last: engine.control(path, shift); row[f"one layer {'above' if shift > 0 else 'below'}"] = farthest([engine.logits(p) for p in prompts], wanted)
        rows.append(row); print(name, {k: (f"{x:.1e}" if isinstance(x, float) else x) for k, x in row.items()}, flush=True)
    engine.control()
    told["cleared again"] = farthest([engine.logits(p) for p in prompts], unsteered)
    told["files"] = rows

def baked(kind, convert, tokenizer, prompts):
    "A baked model, converted, against Add; layer 0 too"
    model = random_model(kind); vector = Vector(torch.nn.functional.normalize(torch.randn(n_layers(model), 128, generator=torch.Generator().manual_seed(5)), dim=-1), name="random")
    lengths = half_norms(model, prompts); additions = [Add(vector, lengths[l], l) for l in (0, 3)]
    done = bake(model, additions, BUILD / f"baked-{kind}", tokenizer)
    try: engine = Engine(convert(BUILD / f"baked-{kind}"))
    except ValueError as e: print("baked", kind, e, flush=True); return dict(model=kind, served_as=done.architecture, refused=str(e).split(" from file")[0])
    plain, (wanted, said) = ours(model, prompts)[0], ours(model, prompts, *additions)
    bake(model, {0: torch.zeros(128)}, BUILD / f"plain-{kind}", tokenizer)  # the same form, and nothing added
    noise = Engine(convert(BUILD / f"plain-{kind}"))  # what the two engines differ by without any of this
    row = dict(model=kind, served_as=done.architecture, unsteered=farthest([noise.logits(p) for p in prompts], plain), moved=farthest(wanted, plain), difference=farthest([engine.logits(p) for p in prompts], wanted), answers=sum(engine.answer(p) == a for p, a in zip(prompts, said)), of=len(prompts))
    print("baked", row, flush=True)
    return row

class Server:
    "A llama-server for as long as the context lasts"
    def __init__(self, binary, model, *args):
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); self.port = s.getsockname()[1]
        self.line = [str(binary), "-m", str(model), "--port", str(self.port), "--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", "-c", "512", "-np", "1", "-t", "1", *map(str, args)]
    def get(self, path, body=None):
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}), timeout=60) as r: return r.status, json.load(r)
    def __enter__(self):
        self.log = (BUILD / "server.log").open("w+"); self.process = subprocess.Popen(self.line, stdout=self.log, stderr=subprocess.STDOUT)
        for _ in range(300):
            if self.process.poll() is not None: self.log.seek(0); raise RuntimeError(self.log.read()[-2000:])
            try: self.health = self.get("/health")[0]; return self
            except OSError: time.sleep(.1)
        raise RuntimeError("llama-server does not answer")
    def __exit__(self, *_): self.process.terminate(); self.process.wait(30); self.log.close()
    def answer(self, ids): return self.get("/completion", dict(prompt=ids, n_predict=ANSWER, temperature=0, top_k=1, repeat_penalty=1., ignore_eos=True, return_tokens=True, cache_prompt=False))[1]["tokens"]

def served(binary, name, model, path, prompts, told):
    "The command line of the tutorial; and what the loader does with a direction.0"
    layer = (n_layers(model) - 1)//2; file = BUILD / f"{name}-{layer}.gguf"
    v = import_vectors(file)
    plain, steered, half = (ours(model, prompts, *o)[1] for o in ([], [Add(v, 1., layer)], [Add(v, .5, layer)]))
    zero = BUILD / "zero.gguf"
    w = GGUFWriter(str(zero), "controlvector"); w.add_string("controlvector.model_hint", "x"); w.add_uint32("controlvector.layer_count", 1); w.add_tensor("direction.0", 40*v[layer].numpy()); w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    count = lambda server, wanted: sum(server.answer(p) == a[:ANSWER] for p, a in zip(prompts, wanted))
    for key, args, wanted in [("unsteered", [], plain), ("--control-vector", ["--control-vector", file], steered), ("--control-vector-scaled FILE:0.5", ["--control-vector-scaled", f"{file}:0.5"], half), ("direction.0", ["--control-vector", zero], plain)]:
        try:
            with Server(binary, path, *args) as s: told[key] = dict(health=s.health, answers=count(s, wanted), of=len(prompts), steered=sum(a != b for a, b in zip(wanted, plain)))
        except RuntimeError as e: told[key] = dict(refused=str(e).strip().splitlines()[-1][-200:])
        print("server", key, told[key], flush=True)

def main():
    ask = argparse.ArgumentParser(); ask.add_argument("--source", type=Path, required=True); ask.add_argument("--server", type=Path); given = ask.parse_args()
    logging.disable(logging.WARNING); torch.set_num_threads(1); shutil.rmtree(BUILD, ignore_errors=True); BUILD.mkdir(parents=True)
    convert = Converter(given.source); tokenizer = AutoTokenizer.from_pretrained(model_source("persona-tiny"))
    prompts = [chat_prompt(tokenizer, conversation(q, PERSONAS["jester"] if i % 2 else None)) for i, q in enumerate([*EVAL_QUESTIONS, "Tell me about the sea.", "How do I bake bread?"][:20])]
    results = dict(date=datetime.date.today().isoformat(), machine=platform.machine(), versions={k: version(k) for k in ("llama-cpp-python", "torch", "transformers", "gguf", "persona-steer")}, bar=BAR, prompts=len(prompts), tokens=sum(map(len, prompts)), answer_tokens=ANSWER, control_vectors={}, baked=[], server={})

    tiny = PersonaVectorConfig(model_name="persona-tiny", device="cpu", max_tokens=48, temperature=0)
    ghost = Vector(ActivationExtractor(tiny).extract_for_persona([PERSONAS["ghost"]], EVAL_QUESTIONS[:6], progress=False), name="ghost")
    whole = without_windows(); whole.save_pretrained(BUILD / "persona-tiny"); tokenizer.save_pretrained(BUILD / "persona-tiny")
    path = convert(BUILD / "persona-tiny"); engine = Engine(path)
    text = tokenizer.decode(prompts[0]); results["tokenizer_agrees"] = engine.llama.tokenize(text.encode(), add_bos=False, special=True) == prompts[0]
    windowed = ActivationExtractor(tiny).model
    control_vectors("persona-tiny", whole, engine, prompts, ghost, told := results["control_vectors"].setdefault("persona-tiny without its windows", {}))
    told["the same with its windows, which llama.cpp ignores"] = farthest([engine.logits(p) for p in prompts], ours(windowed, prompts)[0])
    if given.server: served(given.server.resolve(), "persona-tiny", whole, path, prompts, results["server"])

    llama = random_model("llama"); llama.save_pretrained(BUILD / "llama"); tokenizer.save_pretrained(BUILD / "llama")
    control_vectors("llama", llama, Engine(convert(BUILD / "llama")), prompts, Vector(torch.randn(6, 128, generator=torch.Generator().manual_seed(2)), name="random"), results["control_vectors"].setdefault("random Llama", {}))
    results["baked"] = [baked(k, convert, tokenizer, prompts) for k in BAKED]

    rows = {**{f"{k}, layers {f['layers']}": dict(f, unsteered=m["unsteered"]["difference"]) for k, m in results["control_vectors"].items() for f in m["files"]}, **{f"baked {r['model']}": r for r in results["baked"] if "refused" not in r}}
    off = min(x for r in rows.values() for k, x in r.items() if k.startswith("one layer"))
    beyond = {k: dict(difference=r["difference"], unsteered=r["unsteered"]) for k, r in rows.items() if r["difference"] >= BAR}
    results["summary"] = dict(within_the_bar=len(rows) - len(beyond), largest_within_the_bar=max(r["difference"] for k, r in rows.items() if k not in beyond), beyond_the_bar=beyond, smallest_when_one_layer_off=off, answers=sum(r["answers"] for r in rows.values()), of=sum(r["of"] for r in rows.values()), refused=[r["model"] for r in results["baked"] if "refused" in r])
    results["passed"] = not beyond and off > 1000*BAR and results["summary"]["answers"] == results["summary"]["of"]
    results["adds_nothing"] = all(r["difference"] < 2*r["unsteered"] for r in beyond.values())  # where a model is beyond the bar: are the engines as far apart without any vector?
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["summary"]), "passed" if results["passed"] else "MISSED")
    sys.exit(not results["passed"])

if __name__ == "__main__": main()
