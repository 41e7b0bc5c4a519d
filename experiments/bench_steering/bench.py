"""What does steering cost while a model speaks? Ours beside a bare hook and two peers, against the same call unsteered.

    python bench.py                     # about 10 minutes on 2 cores; writes results.json
    python bench.py --threads 1         # on cores shared with others: two threads wait for each other
    python bench.py --shape gemma-27b   # on a GPU: a random model of exactly Gemma 3 27B's text shape
    python bench.py --shape gemma-thin --threads 1   # its 62 blocks, so narrow that a token is Python and the start of operations, what a GPU waits for

`model.generate` of a random Llama of 110M parameters: 64 tokens in, 64 out, greedy, never an end, with its cache; float32 on the CPU,
bfloat16 on CUDA where there is one, and in both Gemmas. All methods are checked against hooks written out here before anything is timed (in float32, so always
on the small model). In each round all
calls run side by side and take turns token by token, in a new order each time, so that other processes disturb all of them alike: each
is a plain call of `generate` on a model of its own (the weights are shared) that waits after each token. A call's time runs from before
the hooks are put in until after they are gone and the audit has been checked, and is divided by the unsteered one's of the same round;
a token's time is divided by the unsteered one's of the same turn. A second unsteered call shows what is only noise.
"""
import argparse, copy, datetime, json, platform, random, sys, time
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from persona_vectors.config import layer_at
from persona_vectors.interventions import Add, Floor
from persona_vectors.models import resolve_device, resolve_dtype
from persona_vectors.steering import steer

np.float_ = getattr(np, "float_", np.float64) # repeng 0.4.0 was written for numpy 1
from repeng import ControlModel, ControlVector
from steering_vectors import SteeringVector

HERE, LENGTH, NEW, CHECKED = Path(__file__).resolve().parent, 64, 64, 16
sys.path.insert(0, str(HERE.parent))
from shapes import gemma_27b, gemma_thin

SHAPES = {"gemma-27b": gemma_27b, "gemma-thin": gemma_thin}

def model_110m():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True, eos_token_id=None)).eval()
    model.generation_config.eos_token_id = None; model.generation_config.pad_token_id = 0
    return model

# ---------------------------------------------------------------- the methods: each a context around `generate`
class Setting:
    "Model, vector, strength and thresholds that all methods share"
    def __init__(self, model):
        self.model, self.layer = model, layer_at(len(model.get_decoder().layers), .65); self.window = tuple(range(self.layer - 1, self.layer + 3))
        torch.manual_seed(1); self.v, u = torch.randn(2, model.config.hidden_size); self.u = nn.functional.normalize(u, dim=-1)
        kept = {}
        with torch.inference_mode(), hooked(*((self.blocks[l], lambda m, i, o, l=l: kept.__setitem__(l, first(o))) for l in self.window)): model(prompts(model, 8))
        self.strength = .1 * float(kept[self.layer].norm(dim=-1).median()) / float(self.v.norm())
        self.tau = {l: float((h.float().cpu() @ self.u).median()) for l, h in kept.items()} # about half of the tokens lie below

    @property
    def blocks(self): return self.model.get_decoder().layers

    def another(self):
        "The same with a model of its own, whose weights are those of this one"
        new = copy.copy(self); new.model = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        return new

def prompts(model, size): return torch.randint(10, 32000, (size, LENGTH), generator=torch.Generator().manual_seed(size)).to(model.device)

def first(out): return out[0] if isinstance(out, tuple) else out

@contextmanager
def hooked(*pairs):
    "Hooks on blocks, for as long as the context lasts"
    with ExitStack() as stack:
        for block, hook in pairs: stack.callback(block.register_forward_hook(hook).remove)
        yield

def replaced(out, new): return (new, *out[1:]) if isinstance(out, tuple) else new

def bare(s):
    "h + c*v in the dtype of the model and nothing else"
    step = (s.strength * s.v).to(s.model.device, s.model.dtype)
    return hooked((s.blocks[s.layer], lambda m, i, o: replaced(o, first(o) + step)))

def bare_response(s):
    "The same for generated tokens, which come one at a time; for the check"
    step = (s.strength * s.v).to(s.model.device, s.model.dtype)
    return hooked((s.blocks[s.layer], lambda m, i, o: replaced(o, first(o) + step) if first(o).shape[1] == 1 else o))

def bare_floor(s):
    "h + max(tau - h.u, 0) u in the dtype of the model and nothing else"
    u = s.u.to(s.model.device, s.model.dtype)
    def hook(tau): return lambda m, i, o: replaced(o, first(o) + (tau - first(o) @ u).clamp(min=0)[..., None] * u)
    return hooked(*((s.blocks[l], hook(s.tau[l])) for l in s.window))

@contextmanager
def bare_both(s):
    with bare_floor(s), bare(s): yield

@contextmanager
def repeng(s):
    "ControlModel puts itself around the blocks; its layer ids are 0-based blocks, whose output it changes"
    wrapped = ControlModel(s.model, [s.layer])
    try: wrapped.set_control(ControlVector("llama", {s.layer: s.v.numpy()}), s.strength); yield
    finally: wrapped.unwrap()

def steering_vectors(s):
    "Layer numbers of its decoder blocks are 0-based, and their output is changed"
    return SteeringVector({s.layer: s.v.to(s.model.device, s.model.dtype)}).apply(s.model, multiplier=s.strength)

def add(s, where="all"): return Add(s.v, s.strength, s.layer, where=where)
def floor(s): return Floor(s.u, s.tau, s.window)

METHODS = {
    "unsteered": lambda s: nullcontext(), "unsteered again": lambda s: nullcontext(),
    "bare hook": bare, "bare floor, 4 layers": bare_floor,
    "ours, Add": lambda s: steer(s.model, add(s)), "ours, Add to the response": lambda s: steer(s.model, add(s, "response")),
    "ours, Floor at 4 layers": lambda s: steer(s.model, floor(s)), "ours, Floor at 4 layers and Add": lambda s: steer(s.model, floor(s), add(s)),
    "repeng": repeng, "steering-vectors": steering_vectors}

# ---------------------------------------------------------------- the same is computed
@torch.inference_mode()
def seen(s, how, size):
    "(tokens, logits of each) of one call"
    with how(s): out = s.model.generate(prompts(s.model, size), max_new_tokens=CHECKED, do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits, 1).float()

def check(s, size):
    "Raises SystemExit where two ways that should agree do not; in float32, where greedy choices cannot hang on rounding. Returns the largest difference of logits"
    plain, expected, far = seen(s, METHODS["unsteered"], size)[1], {}, 0.
    same = {"ours, Add": bare, "repeng": bare, "steering-vectors": bare, "ours, Add to the response": bare_response, "ours, Floor at 4 layers": bare_floor, "ours, Floor at 4 layers and Add": bare_both}
    for name, how in same.items():
        if how not in expected: expected[how] = seen(s, how, size)
        (ids, logits), (want, right) = seen(s, METHODS[name], size), expected[how]
        if ids.shape != (size, LENGTH + CHECKED): raise SystemExit(f"{name}: {tuple(ids.shape)} tokens")
        if not torch.equal(ids, want) or not torch.allclose(logits, right, atol=1e-4, rtol=1e-4): raise SystemExit(f"{name}, batch {size}: not what the hook written out gives")
        if (logits - plain).abs().max() < 1e-2: raise SystemExit(f"{name}, batch {size}: steers nothing")
        far = max(far, float((logits - right).abs().max()))
    with steer(s.model, floor(s)) as audit: s.model.generate(prompts(s.model, size), max_new_tokens=CHECKED, do_sample=False)
    shares = [r["share"] for r in audit.table()]
    if not all(0 < x < 1 for x in shares): raise SystemExit(f"a floor that moves {shares} of the tokens is no test")
    print(f"batch {size}: every method gives the tokens of the hook written out, logits within {far:.0e}; the floor moves {min(shares):.0%} to {max(shares):.0%} of the tokens", flush=True)
    return dict(logits_differ_at_most=far, share_moved_by_floor=[round(x, 3) for x in shares])

# ---------------------------------------------------------------- and what it costs
class Turns:
    "A streamer that lets the others go on after each token; called once with the prompt before the first pass"
    def put(self, tokens): getcurrent().parent.switch()
    def end(self): pass

def speak(s, name, ids, new):
    with METHODS[name](s): s.model.generate(ids, max_new_tokens=new, do_sample=False, use_cache=True, streamer=Turns())

@torch.inference_mode()
def round_of(settings, ids, rng, new=NEW):
    "{method: seconds of its turns}: hooks are put in; the prompt is read; each further token; hooks are taken out"
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    speakers = {name: greenlet(speak) for name in METHODS}; seconds, order = {name: [] for name in METHODS}, list(METHODS)
    for turn in range(new + 2):
        rng.shuffle(order)
        for name in order:
            wait(); start = time.perf_counter(); speakers[name].switch(*(() if turn else (settings[name], name, ids, new))); wait()
            seconds[name].append(time.perf_counter() - start)
    if not all(o.dead for o in speakers.values()): raise SystemExit("a call has more turns than tokens")
    return seconds

def overhead(these, those, draws=10000):
    "Percent, the median of all pairs, and 95% of the medians of resampled pairs"
    x = 100 * (np.ravel(these) / np.ravel(those) - 1); medians = np.median(x[np.random.default_rng(0).integers(0, len(x), (draws, len(x)))], 1)
    return dict(percent=round(float(np.median(x)), 2), interval=np.quantile(medians, (.025, .975)).round(2).tolist())

def compare(s, size, rounds):
    ids, rng = prompts(s.model, size), random.Random(size)
    def settings(): return {name: s.another() for name in rng.sample(list(METHODS), len(METHODS))} # made anew for each round: where a model's modules lie in memory makes half a percent
    round_of(settings(), ids, rng, 4) # warm
    runs = [round_of(settings(), ids, rng) for _ in range(rounds)]
    turns = {name: np.array([r[name] for r in runs]) for name in METHODS} # (rounds, turns)
    plain = turns["unsteered"]
    found = {name: dict(call=overhead(t.sum(1), plain.sum(1)), token=overhead(t[:, 2:-1], plain[:, 2:-1])) for name, t in turns.items() if name != "unsteered"}
    print(f"batch {size}: unsteered {np.median(plain.sum(1)):.2f} s a call, {1000 * np.median(plain[:, 2:-1]):.2f} ms a token" + " " * 10 + "the call" + " " * 24 + "a token", flush=True)
    for name, o in found.items(): print(f"  {name:34}" + "".join(f"{o[k]['percent']:+8.2f}% ({o[k]['interval'][0]:+7.2f} to {o[k]['interval'][1]:+7.2f})  " for k in ("call", "token")), flush=True)
    return dict(seconds_a_call=round(float(np.median(plain.sum(1))), 3), ms_a_token=round(1000 * float(np.median(plain[:, 2:-1])), 3), methods=found,
                calls={name: t.sum(1).round(4).tolist() for name, t in turns.items()}, ms_of_token={name: np.median(1000 * t[:, 2:-1], 1).round(3).tolist() for name, t in turns.items()})

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--rounds", type=int, default=8); ap.add_argument("--sizes", type=int, nargs="*", default=[1, 8], help="rows of a batch")
    ap.add_argument("--shape", choices=("llama-110m", *SHAPES), default="llama-110m"); ap.add_argument("--device", default="auto"); ap.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 on cores shared with others")
    ap.add_argument("--out", type=Path, default=HERE / "results.json"); a = ap.parse_args(); torch.set_num_threads(a.threads)
    device = resolve_device("cpu" if a.shape == "gemma-thin" else a.device); model = model_110m().to(device)
    checked = {size: check(Setting(model), size) for size in a.sizes}
    target = 3 if a.shape == "llama-110m" and device.type == "cpu" else 1
    s = Setting(SHAPES[a.shape]() if a.shape in SHAPES else model.to(resolve_dtype("auto", device)))
    found = {size: dict(compare(s, size, a.rounds), check=checked[size]) for size in a.sizes}
    missed = [f"{n}, batch {size}" for size, r in found.items() for n, m in r["methods"].items() if n.startswith("ours") and m["call"]["percent"] > target]
    print(f"more than the {target}% aimed at: {'; '.join(missed) or 'none'}")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    result = dict(date=str(datetime.date.today()), machine=machine, versions={"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "repeng", "steering-vectors")}},
                  model=dict(parameters=sum(p.numel() for p in s.model.parameters()), dtype=str(s.model.dtype).removeprefix("torch."), layer=s.layer, window=s.window), rounds=a.rounds, target_percent=target, missed=missed, batch=found)
    before = json.loads(a.out.read_text()) if a.out.exists() else {}
    a.out.write_text(json.dumps({**before, device.type if a.shape == "llama-110m" else a.shape: result}, indent=1) + "\n")

if __name__ == "__main__": main()
