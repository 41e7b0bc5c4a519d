"""The same numbers from repeng, from steering-vectors and from us, on persona-tiny; where they differ, by how much.

    PYTHONPATH=build/peers python parity.py     # ten seconds; writes results.json

The packages themselves run here, as their authors publish them. Three things are asked of all: the difference of means at the last
token of a prompt, at every layer; logits and greedy texts with one vector added at one block with one coefficient; and each other's
files and objects. What should agree is checked and ends the run where it does not, and so is what should not agree: a vector one
block off must be seen. What differs for a reason is measured.
"""
import base64, datetime, io, json, platform, tempfile
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from persona_vectors.catalog import EVAL_QUESTIONS, PERSONAS
from persona_vectors.chat import conversation
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.control_vectors import export_gguf
from persona_vectors.directions import diff_of_means, find_direction
from persona_vectors.extraction import ActivationExtractor
from persona_vectors.formats import import_vectors
from persona_vectors.interop import from_peer, to_control_vector, to_steering_vector
from persona_vectors.interventions import Add
from persona_vectors.steering import steer
from persona_vectors.vectors import Vector

np.float_ = getattr(np, "float_", np.float64) # repeng 0.4.0 was written for numpy 1
import repeng
import repeng.extract
import steering_vectors
import zstandard

HERE, ON, OFF, LAYER, NEW = Path(__file__).resolve().parent, "ghost", "default", 4, 40

def far(a, b): return float((torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max())
def cosine(a, b): return float(torch.nn.functional.cosine_similarity(torch.as_tensor(a).double(), torch.as_tensor(b).double(), dim=-1))

def agree(what, a, b, within):
    "The largest difference; ends the run where there should be none"
    d = far(a, b)
    if not d <= within: raise SystemExit(f"{what}: {d:.1e} apart, {within:.0e} expected")
    return d

class Setting:
    "Model, prompts and our own activations"
    def __init__(self):
        self.ex = ActivationExtractor(PersonaVectorConfig(model_name="persona-tiny", device="cpu"))
        self.model, self.tok, self.n = self.ex.model, self.ex.tokenizer, self.ex.n_layers
        self.rows = {name: self.ex.extract([conversation(q, PERSONAS[name], "Well.") for q in EVAL_QUESTIONS], "all", where="last_prompt", progress=False) for name in (ON, OFF)}
        self.v = Vector(diff_of_means(self.rows[ON], self.rows[OFF]), name=f"{ON} - {OFF}")

    def text(self, name, q): return self.tok.apply_chat_template(conversation(q, PERSONAS[name]), tokenize=False, add_generation_prompt=True)
    @property
    def pairs(self): return [(self.text(ON, q), self.text(OFF, q)) for q in EVAL_QUESTIONS]

# ---------------------------------------------------------------- difference of means at a token
def means(s):
    "Largest differences, in residual-stream units, beside the longest vector"
    out, n = dict(longest=float(s.v.norm.max())), s.n
    theirs = steering_vectors.train_steering_vector(s.model, s.tok, s.pairs, read_token_index=-1)
    out["steering-vectors"] = agree("steering-vectors, difference of means", torch.stack([theirs.layer_activations[l] for l in range(n)]), s.v.values, 1e-4)
    batched = steering_vectors.train_steering_vector(s.model, s.tok, s.pairs, read_token_index=-1, batch_size=6)
    out["steering-vectors, 6 at once"] = agree("the same, padded", torch.stack([batched.layer_activations[l] for l in range(n)]), s.v.values, 1e-4)
    with redirect_stderr(io.StringIO()): h = repeng.extract.batched_get_hiddens(s.model, s.tok, [t for p in s.pairs for t in p], list(range(n)), 32)
    repeng_means = torch.stack([torch.from_numpy(h[l][::2].mean(0) - h[l][1::2].mean(0)) for l in range(n)])
    out["repeng, layers before the last"] = agree("repeng, difference of means", repeng_means[:-1], s.v.values[:-1], 1e-4)
    with torch.no_grad(): normed = [s.model.get_decoder().norm(x[:, -1]) for x in s.rows.values()]
    out["repeng's last layer from our activations after the final norm"] = agree("repeng's last layer", repeng_means[-1], normed[0].mean(0) - normed[1].mean(0), 1e-3)
    out["repeng, last layer"] = dict(cosine=cosine(repeng_means[-1], s.v[n - 1]), length_over_ours=float(repeng_means[-1].norm() / s.v[n - 1].norm()))
    if out["repeng, last layer"]["cosine"] > .999: raise SystemExit("the final norm changes nothing: this model is no test of it")
    return out

def directions(s):
    "Cosines of what `train` gives by default and otherwise, mean over the layers before the last"
    pca, ours = find_direction(s.rows[ON], s.rows[OFF], "pca"), s.v.values
    entries = [repeng.DatasetEntry(*p) for p in s.pairs]
    train = lambda method: torch.stack([torch.from_numpy(found[l]) for l in range(1, s.n - 1)]) if (found := quiet(lambda: repeng.ControlVector.train(s.model, s.tok, entries, method=method).directions)) else None
    theirs = steering_vectors.train_steering_vector(s.model, s.tok, s.pairs, aggregator=steering_vectors.pca_aggregator())
    theirs = torch.stack([theirs.layer_activations[l] for l in range(1, s.n - 1)])
    mean = lambda a, b: float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean())
    found = {"repeng pca_center, ours pca": mean(train("pca_center"), pca[1:-1]), "repeng pca_diff (its default), ours pca": mean(train("pca_diff"), pca[1:-1]), "repeng pca_diff (its default), difference of means": mean(train("pca_diff"), ours[1:-1]),
             "steering-vectors pca_aggregator, ours pca": mean(theirs, pca[1:-1]), "ours pca, difference of means": mean(pca[1:-1], ours[1:-1])}
    for k in ("repeng pca_center, ours pca", "steering-vectors pca_aggregator, ours pca"):
        if abs(found[k]) < .9999: raise SystemExit(f"{k}: cosine {found[k]}")
    return found

def quiet(run):
    with redirect_stderr(io.StringIO()): return run()

# ---------------------------------------------------------------- steering
@contextmanager
def repeng_steers(s, v, c, layer):
    model = repeng.ControlModel(s.model, [layer])
    try: model.set_control(to_control_vector(v, [layer], s.model.config.model_type), c); yield
    finally: model.unwrap()

def sv_steers(s, v, c, layer): return to_steering_vector(v, [layer]).apply(s.model, multiplier=c)
def ours_steers(s, v, c, layer): return steer(s.model, Add(v, c, layer))

@torch.no_grad()
def spoken(s, how, questions):
    "(logits of the prompts where there is a token, greedy texts) of one padded batch"
    chats = [s.tok.apply_chat_template(conversation(q), tokenize=False, add_generation_prompt=True) for q in questions]
    batch = s.tok(chats, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    places = (batch.attention_mask.cumsum(1) - 1).clamp(min=0) # as `generate` gives them; repeng needs them to leave padding out
    with how: logits = s.model(**batch, position_ids=places).logits
    return logits[batch.attention_mask.bool()], batch

@torch.no_grad()
def texts(s, how, batch):
    with how: out = s.model.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=s.tok.pad_token_id or s.tok.eos_token_id)
    return s.tok.batch_decode(out[:, batch.input_ids.shape[1]:], skip_special_tokens=True)

def steering(s):
    out = {}
    unit = .5 * float(s.rows[OFF][:, LAYER].norm(dim=-1).median() / s.v[LAYER].norm()) # half a residual norm
    for layer in (0, LAYER, s.n - 1):
        for size, questions in (("one prompt", EVAL_QUESTIONS[:1]), ("18 prompts, padded on the left", EVAL_QUESTIONS)):
            want, batch = spoken(s, ours_steers(s, s.v, unit, layer), questions); said = texts(s, ours_steers(s, s.v, unit, layer), batch)
            plain, _ = spoken(s, nullcontext(), questions); row = dict(moved_by_steering=far(want, plain))
            if row["moved_by_steering"] < .1: raise SystemExit(f"layer {layer}: steering moves the logits by {row['moved_by_steering']:.2g}, too little to compare")
            if size == "one prompt" and layer < s.n - 1: row["one block off"] = far(want, spoken(s, ours_steers(s, s.v[layer], unit, layer + 1), questions)[0])
            if row.get("one block off", 1) < .1: raise SystemExit(f"layer {layer}: one block off is not seen")
            for name, how in (("repeng", repeng_steers), ("steering-vectors", sv_steers)):
                logits, _ = spoken(s, how(s, s.v, unit, layer), questions)
                row[name] = dict(logits=agree(f"{name}, layer {layer}, {size}", logits, want, 1e-4), texts_equal=f"{sum(a == b for a, b in zip(texts(s, how(s, s.v, unit, layer), batch), said))} of {len(questions)}")
            out[f"layer {layer}, {size}"] = row
    try:
        with torch.no_grad(), repeng_steers(s, s.v, unit, LAYER): s.model(**batch)
        out["repeng, a plain pass of 18 rows without position_ids"] = "works"
    except RuntimeError as e: out["repeng, a plain pass of 18 rows without position_ids"] = f"fails: {e}"
    out["coefficient"] = unit; out["for example"] = dict(question=EVAL_QUESTIONS[-1], unsteered=texts(s, nullcontext(), batch)[-1], steered=said[-1])
    if not all(r[p]["texts_equal"] in ("1 of 1", "18 of 18") for k, r in out.items() if k.startswith("layer") for p in ("repeng", "steering-vectors")): raise SystemExit(f"greedy texts differ: {out}")
    return out

# ---------------------------------------------------------------- files and objects
def exchange(s):
    "Each other's vectors, bit by bit"
    v = s.v.at(*range(1, s.n)) # llama.cpp's files begin at 1
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        to_control_vector(v, model_type="qwen3").export_gguf(folder / "repeng.gguf")
        back = import_vectors(folder / "repeng.gguf", model=s.model)
        export_gguf(v, folder / "ours.gguf", model=s.model)
        theirs = repeng.ControlVector.import_gguf(folder / "ours.gguf")
        lens = dict(data=base64.b64encode(zstandard.ZstdCompressor(level=1).compress(v.values.bfloat16().view(torch.int16).numpy().tobytes())).decode(), dtype="int16", original_dtype="torch.bfloat16", shape=list(v.values.shape), compression="zstd") # as vllm-lens packs it
        (folder / "lens.json").write_text(json.dumps(dict(activations=lens, layer_indices=list(v.layers), scale=1., norm_match=False, position_indices=None)))
        packed = import_vectors(folder / "lens.json", model=s.model)
        (folder / "cut.json").write_text(json.dumps(dict(activations={**lens, "data": lens["data"][:400]}, layer_indices=list(v.layers))))
        try: import_vectors(folder / "cut.json"); raise SystemExit("a frame that is cut off was read")
        except ValueError as e: cut = str(e).split(": ", 1)[1][:60]
    checks = {"a .gguf of repeng, read by us": torch.equal(back.values, v.values) and back.layers == v.layers, "our .gguf, read by repeng": sorted(theirs.directions) == list(v.layers) and all(np.array_equal(theirs.directions[l], v[l].numpy()) for l in v.layers),
              "ControlVector and back": torch.equal(from_peer(to_control_vector(v), model=s.model).values, v.values), "SteeringVector and back": torch.equal(from_peer(to_steering_vector(v), model=s.model).values, v.values),
              "JSON of vllm-lens, packed bfloat16": torch.equal(packed.values, v.values.bfloat16().float())}
    if not all(checks.values()): raise SystemExit(f"not the same bits: {[k for k, ok in checks.items() if not ok]}")
    return {**{k: "the same bits" for k in checks}, "a zstd frame that is cut off": cut}

def rounded(o): return {k: rounded(x) for k, x in o.items()} if isinstance(o, dict) else float(f"{o:.3g}") if isinstance(o, float) else o

def main():
    torch.manual_seed(0); torch.set_num_threads(1)
    s = Setting()
    found = dict(date=str(datetime.date.today()), machine=platform.processor() or platform.machine(), versions={"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "repeng", "steering-vectors")}},
                 model="persona-tiny, float32", pairs=len(s.pairs), means=means(s), directions=directions(s), steering=steering(s), exchange=exchange(s))
    (HERE / "results.json").write_text(json.dumps(rounded(found), indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(rounded(found), indent=1, ensure_ascii=False))

if __name__ == "__main__": main()
