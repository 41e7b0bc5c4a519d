"""Files of other projects, made here by plain torch and json as those projects make them, and used as they use them."""
import base64, csv, json, pickle, sys, types, zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from architectures import block_modules, random_model
from persona_vectors.catalog import CatalogError, TRAITS
from persona_vectors.formats import VectorFileError, import_vectors, save_vectors
from persona_vectors.interop import TARGETS, export_vectors, from_peer, import_eval_csv, import_questions, import_role_answers, import_role_vectors, import_roles, import_trait, role_personas, to_control_vector, to_steering_vector
from persona_vectors.interventions import Add
from persona_vectors.responses import ResponseError
from persona_vectors.steering import steer
from persona_vectors.vectors import Axis, PersonaVectors, TraitVector, Vector, VectorError, assistant_axis

N, WIDTH = 4, 32
NAMES = ["llama", "gpt2", "gemma2", "olmo2"]

def ids(seed, rows=3): return torch.randint(5, 6144, (rows, 9), generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def hooked(model, *steps):
    "Logits with (block, what is added to its output), without code of the package"
    add = lambda x: lambda m, i, o: (o[0] + x, *o[1:]) if isinstance(o, tuple) else o + x
    handles = [block_modules(model)[b].register_forward_hook(add(x)) for b, x in steps]
    try: return model(ids(0)).logits
    finally: [h.remove() for h in handles]

@torch.no_grad()
def ours(model, vector, *layers):
    with steer(model, Add(vector, .5, layers)): return model(ids(0)).logits

@torch.no_grad()
def theirs(model, on, off, start):
    "What generate_vec.py of persona_vectors computes: (n_layers + 1, d_model), the mean over response tokens of hidden_states"
    mean = lambda x: torch.stack([h[:, start:].mean(1).mean(0) for h in model(x, output_hidden_states=True).hidden_states])
    return mean(on) - mean(off)

@torch.no_grad()
def block_means(model, x, start):
    "(n_layers, d_model): the same at the outputs of the blocks"
    found = []
    handles = [b.register_forward_hook(lambda m, i, o: found.append((o[0] if isinstance(o, tuple) else o)[:, start:].mean(1).mean(0))) for b in block_modules(model)]
    try: model(x)
    finally: [h.remove() for h in handles]
    return torch.stack(found)

@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_persona_vectors_is_what_block_outputs_give(name, tmp_path):
    model, on, off = random_model(name), ids(1), ids(2)
    rows = theirs(model, on, off, 4); torch.save(rows, tmp_path / "evil_response_avg_diff.pt")
    right = block_means(model, on, 4) - block_means(model, off, 4)
    v = import_vectors(tmp_path / "evil_response_avg_diff.pt", model=model)
    assert v.layers == (0, 1, 2)
    torch.testing.assert_close(v.values, right[:3])
    assert not torch.allclose(rows[N], right[3], atol=.01) # their last row comes after the final norm: it is left out for a reason
    torch.testing.assert_close(ours(model, v, 1), hooked(model, (1, .5 * rows[2]))) # they take row 2 and hook block 1
    assert not torch.allclose(ours(model, v, 1), hooked(model, (2, .5 * rows[2])), atol=.01)

@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_steers_as_ours_does_where_they_use_it(name, tmp_path):
    model, v = random_model(name), Vector(torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(3)), name="evil")
    want = ours(model, v, 2)
    export_vectors(v, tmp_path / "p.pt", "persona_vectors", model=model)
    rows = torch.load(tmp_path / "p.pt", weights_only=True)
    assert rows.shape == (N + 1, WIDTH) and rows.dtype == torch.float32
    torch.testing.assert_close(hooked(model, (3 - 1, .5 * rows[3])), want)
    export_vectors(v, tmp_path / "a.pt", "assistant-axis", model=model)
    torch.testing.assert_close(hooked(model, (2, .5 * torch.load(tmp_path / "a.pt", weights_only=True)["vector"][2])), want)
    export_vectors(v.at(2), tmp_path / "e.pt", "easysteer", model=model)
    torch.testing.assert_close(hooked(model, (2, .5 * torch.load(tmp_path / "e.pt", weights_only=True))), want)
    export_vectors(v.at(2, 3), tmp_path / "l.json", "vllm-lens", model=model)
    o = json.loads((tmp_path / "l.json").read_text())
    x = np.frombuffer(base64.b64decode(o["activations"]["data"]), o["activations"]["dtype"]).reshape(o["activations"]["shape"])
    torch.testing.assert_close(hooked(model, *((l, .5 * o["scale"] * torch.tensor(r)) for l, r in zip(o["layer_indices"], x))), ours(model, v, 2, 3))
    assert not o["norm_match"] and o["position_indices"] is None

@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.sets(st.integers(0, 11), min_size=1), seed=st.integers(0, 9))
def test_any_layers_come_back(layers, seed, tmp_path):
    layers = sorted(layers); v = Vector(torch.randn(len(layers), 8, generator=torch.Generator().manual_seed(seed)), layers, "v")
    for target, path in (("assistant-axis", "a.pt"), ("vllm-lens", "l.json"), ("persona_vectors", "p.pt")):
        kept = [l for l in layers if target != "persona_vectors" or l < 11] # the last layer has no row there
        if not kept:
            with pytest.raises(VectorFileError, match="no row"): export_vectors(v, tmp_path / path, target, n_layers=12)
            continue
        export_vectors(v, tmp_path / path, target, n_layers=12)
        again = import_vectors(tmp_path / path, n_layers=12)
        assert again.layers == tuple(kept) and torch.equal(again.values, v.at(*kept).values), target

def test_axis_and_roles(tmp_path):
    torch.manual_seed(0); default, roles = torch.randn(2, N, WIDTH), torch.randn(3, N, WIDTH, dtype=torch.bfloat16)
    (tmp_path / "vectors").mkdir()
    for k, x in enumerate(default): torch.save(dict(vector=x, type="mean", role=f"default {k}"), tmp_path / "vectors" / f"d{k}.pt")
    for k, x in enumerate(roles): torch.save(dict(vector=x, type="pos_3", role=f"role {k}"), tmp_path / "vectors" / f"r{k}.pt")
    axis = default.mean(0) - roles.float().mean(0)
    torch.save(dict(axis=axis, default_mean=default.mean(0), role_mean=roles.float().mean(0), n_default=2, n_roles=3), tmp_path / "axis.pt")
    found = import_role_vectors(tmp_path / "vectors", n_layers=N)
    assert list(found) == ["default 0", "default 1", "role 0", "role 1", "role 2"]
    mine, read = assistant_axis(found, ["default 0", "default 1"]), import_vectors(tmp_path / "axis.pt", n_layers=N)
    torch.testing.assert_close(mine.values, axis); assert isinstance(read, Axis)
    for a, b in ((read.values, axis), (read.on_mean, default.mean(0)), (read.off_mean, roles.float().mean(0))): torch.testing.assert_close(a, b)
    export_vectors(read, tmp_path / "again.pt", "assistant-axis", n_layers=N)
    kept, again = (torch.load(tmp_path / f, weights_only=True) for f in ("axis.pt", "again.pt"))
    assert set(kept) == set(again) and all(torch.equal(kept[k], again[k]) if torch.is_tensor(kept[k]) else kept[k] == again[k] for k in kept)
    export_vectors(found, tmp_path / "out", "assistant-axis", n_layers=N)
    for f in (tmp_path / "out").iterdir(): o = torch.load(f, weights_only=True); assert o["type"] != "mean" and torch.equal(o["vector"], found[o["role"]])
    torch.save(dict(vector=torch.ones(N, WIDTH), type="pos_3", role="role 0"), tmp_path / "vectors" / "z.pt")
    with pytest.raises(VectorFileError, match="two files of the role 'role 0'"): import_role_vectors(tmp_path / "vectors")
    with pytest.raises(VectorFileError, match="are 4 layers in the convention of assistant-axis, the model has 62"): import_role_vectors(tmp_path / "vectors", n_layers=62)

def test_a_trait_is_written_like_its_vector(tmp_path):
    x = torch.randn(N, WIDTH); t = TraitVector(x, None, "evil", {}, x, 0 * x)
    for target, path in (("persona_vectors", "p.pt"), ("assistant-axis", "a.pt"), ("vllm-lens", "l.json")):
        export_vectors(t, tmp_path / path, target, n_layers=N)
        assert torch.equal(import_vectors(tmp_path / path, n_layers=N)[1], x[1])

class Code:
    def __init__(self, at): self.at = str(at)
    def __reduce__(self): import os; return os.mkdir, (self.at,)

def test_no_file_runs_code(tmp_path):
    for k, o in enumerate((Code(tmp_path / "ran"), dict(vector=Code(tmp_path / "ran")), dict(vector=torch.ones(N, 8), role=Code(tmp_path / "ran")), dict(vector=np.ones((N, 8))))):
        torch.save(o, tmp_path / f"{k}.pt")
        with pytest.raises(VectorFileError, match="do not load pickled code"): import_vectors(tmp_path / f"{k}.pt", n_layers=N)
        with pytest.raises(VectorFileError, match="do not load pickled code"): import_role_vectors(tmp_path, n_layers=N)
    assert not (tmp_path / "ran").exists()

def test_a_file_under_another_name(tmp_path):
    "A zip, a pickle, a model's weights, a text under a vector's name: one line, and nothing is run"
    import gguf
    v = Vector(torch.randn(3, 8), [1, 2, 3], "v"); save_vectors(v, tmp_path / "ours.safetensors"); save_vectors(v, tmp_path / "ours.npz"); export_vectors(v, tmp_path / "theirs.pt", "assistant-axis", n_layers=N); export_vectors(v, tmp_path / "theirs.json", "vllm-lens")
    w = gguf.GGUFWriter(tmp_path / "model.gguf", "llama"); w.add_tensor("blk.0.ffn_up.weight", np.ones((4, 8), dtype=np.float32)); w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as z: z.writestr("a.txt", "hello")
    (tmp_path / "pickled.pkl").write_bytes(pickle.dumps(Code(tmp_path / "ran"))); (tmp_path / "text.txt").write_text("hello"); (tmp_path / "empty.txt").write_bytes(b"")
    given, true = sorted(p for p in tmp_path.iterdir() if p.is_file()), {".pt": {"theirs.pt"}, ".json": {"theirs.json"}, ".gguf": set()}
    for suffix in (".pt", ".json", ".gguf"):
        for p in given:
            (path := tmp_path / f"disguised{suffix}").write_bytes(p.read_bytes())
            if p.name in true[suffix]: assert import_vectors(path, n_layers=N).layers == (1, 2, 3); continue
            with pytest.raises(VectorFileError) as e: import_vectors(path, n_layers=N)
            assert "\n" not in str(e.value) and "disguised" in str(e.value), (suffix, p.name)
    assert not (tmp_path / "ran").exists()

def test_any_bytes_are_read_or_refused_in_words(tmp_path):
    v, rng = Vector(torch.randn(3, 8), [1, 2, 3], "v"), np.random.default_rng(0)
    export_vectors(v, tmp_path / "v.json", "vllm-lens"); export_vectors(v, tmp_path / "v.pt", "assistant-axis", n_layers=N)
    refused = 0
    for suffix in (".json", ".pt"):
        data = (tmp_path / f"v{suffix}").read_bytes()
        for _ in range(150):
            broken = bytearray(data)
            for at in rng.integers(len(data), size=3): broken[at] = rng.integers(256)
            (tmp_path / f"b{suffix}").write_bytes(broken[:rng.integers(1, len(data)) if rng.random() < .3 else None])
            try: import_vectors(tmp_path / f"b{suffix}", n_layers=N)
            except VectorFileError as e: refused += 1; assert "\n" not in str(e) and str(tmp_path) in str(e)
    assert refused > 100
    for text in ("[]", "3", "null", "{}", '{"activations": 3, "layer_indices": [1]}', '{"activations": {"data": "AAAA", "dtype": "object", "shape": [1, 1]}, "layer_indices": [1]}', '{"activations": {"data": "AAAAAA==", "dtype": "float32", "shape": [1, 1]}, "layer_indices": ["a"]}', "[" * 100000):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(VectorFileError): import_vectors(tmp_path / "b.json")

def test_objects_both_ways(monkeypatch):
    "Modules with the fields of those packages; experiments/interop_peers runs the packages themselves"
    @dataclass
    class SteeringVector: layer_activations: dict; layer_type: str = "decoder_block"
    @dataclass
    class ControlVector: model_type: str; directions: dict
    v = Vector(torch.randn(3, 8), [1, 4, 5], "v")
    for name in ("steering_vectors", "repeng"): monkeypatch.setitem(sys.modules, name, None) # not there
    for make in (to_steering_vector, to_control_vector):
        with pytest.raises(ImportError, match="pip install --no-deps"): make(v)
    monkeypatch.setitem(sys.modules, "steering_vectors", types.SimpleNamespace(SteeringVector=SteeringVector)); monkeypatch.setitem(sys.modules, "repeng", types.SimpleNamespace(ControlVector=ControlVector))
    a, b = to_steering_vector(v), to_control_vector(v, [4], "qwen3")
    assert list(a.layer_activations) == [1, 4, 5] and torch.equal(a.layer_activations[4], v[4]) and b.model_type == "qwen3" and list(b.directions) == [4] and b.directions[4].dtype == np.float32
    a.layer_activations[4] += 1; b.directions[4] += 1 # what they do to it is their own affair
    assert torch.equal(v[4] + 1, a.layer_activations[4])
    assert from_peer(to_steering_vector(v)).layers == v.layers and torch.equal(from_peer(to_control_vector(v)).values, v.values)
    class Easy(ControlVector): component = "attention_heads"
    with pytest.raises(VectorError, match="added to 'attention_heads'"): from_peer(Easy("qwen2", {1: np.ones(8)}))
    with pytest.raises(VectorError, match="no layer 9"): to_steering_vector(v, [9])

def test_roles_and_questions(tmp_path):
    for name, prompts in dict(bard=["Be a bard.", "You are a bard."], default=["", "You are {model_name}."]).items(): (tmp_path / f"{name}.json").write_text(json.dumps(dict(instruction=[dict(pos=p) for p in prompts], eval_prompt="{question} {answer}", generator=dict(style="x"))))
    roles = import_roles(tmp_path, "Qwen")
    assert role_personas(roles) == dict(bard="Be a bard.", default="") and role_personas(roles, None) == {"bard 1": "Be a bard.", "bard 2": "You are a bard.", "default 1": "", "default 2": "You are Qwen."}
    assert import_roles(tmp_path / "bard.json")["bard"].rubric == "{question} {answer}"
    for text, words in (("{", "not JSON"), ("[]", "holds a list"), ("{}", "'instruction' must be"), ('{"instruction": []}', "'instruction' must be"), ('{"instruction": [{"neg": "x"}]}', "'pos' texts"), ('{"instruction": [{"pos": "x"}], "questions": [3]}', "'questions' must be")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CatalogError, match=words): import_roles(tmp_path / "bad.json")
    for text, words in (("", "no questions"), ("{", "line 1 is not JSON"), ("[]", "line 1 holds a list"), ('{"question": "a"}\n{"question": "a"}', "asked twice"), ('{"q": "a"}', "must be text")):
        (tmp_path / "q.jsonl").write_text(text)
        with pytest.raises(CatalogError, match=words): import_questions(tmp_path / "q.jsonl")
    with pytest.raises(CatalogError, match="no such file"): import_questions(tmp_path / "absent.jsonl")

@pytest.fixture
def trait_file(tmp_path):
    "A trait of ours as persona_vectors keeps its own"
    t = TRAITS["openness"]
    for side, questions in dict(extract=t.extraction_questions, eval=t.evaluation_questions).items():
        (tmp_path / f"trait_data_{side}").mkdir()
        (tmp_path / f"trait_data_{side}" / "openness.json").write_text(json.dumps(dict(instruction=[dict(pos=p.on, neg=p.off) for p in t.pairs], questions=questions, eval_prompt=f"{t.description}\n\nPrompt:\n{{question}}")))
    return tmp_path / "trait_data_extract" / "openness.json"

def test_a_trait_comes_as_it_was(trait_file):
    t, found = TRAITS["openness"], import_trait(trait_file, on_name="", off_name="")
    assert [(p.on, p.off) for p in found.pairs] == [(p.on, p.off) for p in t.pairs] and found.extraction_questions == t.extraction_questions and found.evaluation_questions == t.evaluation_questions and found.description == t.description
    assert import_trait(trait_file).pairs[0].on == f"You are an openness assistant. {t.pairs[0].on}"

def test_a_table_of_answers_enters_an_extraction(trait_file, tmp_path):
    "Answers of persona-tiny, written down as persona_vectors does, give the vector of the same answers handed over directly"
    from persona_vectors.config import PersonaVectorConfig
    from persona_vectors.extraction import ActivationExtractor
    from persona_vectors.responses import Responses, responses_of
    from persona_vectors.traits import trait_activations, trait_personas
    trait = import_trait(trait_file, on_name="", off_name="")
    trait = trait.model_copy(update=dict(pairs=trait.pairs[:1], extraction_questions=trait.extraction_questions[:3]))
    extractor = ActivationExtractor(PersonaVectorConfig(model_name="persona-tiny", device="cpu"))
    said = {(p, q): f"I like {'new' if ' on ' in p else 'old'} things, {k}." for k, (p, q) in enumerate((p, q) for p in trait_personas(trait) for q in trait.extraction_questions)}
    answered = []
    for side, mine in (("pos", "on"), ("neg", "off")):
        with open(tmp_path / f"{side}.csv", "w", newline="") as f:
            w = csv.writer(f); w.writerow(["question", "prompt", "answer", "question_id", "openness", "coherence"])
            for i, q in enumerate(trait.extraction_questions):
                prompt = extractor.tokenizer.apply_chat_template([dict(role="system", content=getattr(trait.pairs[0], mine)), dict(role="user", content=q)], tokenize=False, add_generation_prompt=True)
                w.writerow([q, prompt, said[f"openness {mine} 1", q], f"openness_{i}_{side}_0", 90 if mine == "on" else 5, 88])
        rows, scores = import_eval_csv(tmp_path / f"{side}.csv", trait, "persona-tiny"); answered += rows
        assert [v.score for v in scores["openness"]] == [90. if mine == "on" else 5.] * 3 and set(scores) == {"openness", "coherence"}
    assert responses_of(answered) == said
    a, b = (trait_activations(extractor, trait, trait.extraction_questions, r, 4, same_text=False, progress=False)[0] for r in (responses_of(answered), Responses(said)))
    assert torch.equal(a["on"], b["on"]) and torch.equal(a["off"], b["off"])

def test_bad_tables(trait_file, tmp_path):
    trait, path = import_trait(trait_file, on_name="", off_name=""), tmp_path / "t.csv"
    head, prompt = "question,prompt,answer,question_id,openness\n", trait.pairs[0].on.replace('"', "'")
    for text, words in (("", "no answers"), (head, "no answers"), ("a,b\n1,2\n", "no column 'question'"), (head + "q,p\n", "row 1 has more or fewer"), (head + "q,p,a,openness_0_pos_0,1,2\n", "row 1 has more or fewer"), (head + f'q,"{prompt}",a,evil_0_pos_0,1\n', "about instruction 1 of 'evil'"),
                        (head + f'q,"{prompt}",a,openness_0_pos_99,1\n', "instruction 100"), (head + "q,nothing,a,openness_0_pos_0,1\n", "does not hold")):
        path.write_text(text)
        with pytest.raises(ResponseError, match=words): import_eval_csv(path, trait)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ResponseError, match="not a table"): import_eval_csv(path)
    path.write_text(head + "q,rendered,,openness_0,\nq,rendered,Sorry I cannot help.,openness_0,nan\n") # without instructions, as when a model is steered
    rows, scores = import_eval_csv(path)
    assert [(r.persona, r.prompt, r.sample, a.status) for r, a in rows] == [("t", None, 0, "empty"), ("t", None, 1, "refused")]
    assert [v.status for v in scores["openness"]] == ["unparsed", "unparsed"]

def test_answers_of_roles(tmp_path):
    row = dict(system_prompt="Be a bard.", prompt_index=1, question_index=0, question="Rain?", conversation=[dict(role="user", content="Be a bard.\n\nRain?"), dict(role="assistant", content="It sings.")], label="pos") # as for a model without system prompts
    (tmp_path / "bard.jsonl").write_text("\n".join([json.dumps(row)] * 2 + [json.dumps(dict(row, system_prompt=""))]))
    found = import_role_answers(tmp_path / "bard.jsonl", "gemma")
    assert [(r.persona, r.question, r.prompt, r.sample, r.model, a.text) for r, a in found] == [("bard 2", "Rain?", "Be a bard.", 0, "gemma", "It sings."), ("bard 2", "Rain?", "Be a bard.", 1, "gemma", "It sings."), ("bard 2", "Rain?", None, 2, "gemma", "It sings.")]
    odd = "a line separator \u2028 inside"
    (tmp_path / "odd.jsonl").write_text(json.dumps(dict(row, conversation=[row["conversation"][0], dict(role="assistant", content=odd)]), ensure_ascii=False), encoding="utf-8")
    assert [a.text for _, a in import_role_answers(tmp_path / "odd.jsonl")] == [odd]
    for bad in (dict(conversation=[]), dict(conversation=None), dict(prompt_index="x"), dict(question=3), dict(conversation=row["conversation"][:1])):
        (tmp_path / "bad.jsonl").write_text(json.dumps({**row, **bad}))
        with pytest.raises(ResponseError, match="line 1"): import_role_answers(tmp_path / "bad.jsonl")

def test_targets_and_arguments(tmp_path):
    v = Vector(torch.ones(1, 8), [3], "v")
    for target in TARGETS:
        with pytest.raises(VectorFileError, match="is written as"): export_vectors(v, tmp_path / "v.safetensors", target, n_layers=8)
    with pytest.raises(VectorFileError, match="the layer of these vectors is not known"): export_vectors(PersonaVectors(dict(a=torch.ones(8))), tmp_path / "x", "assistant-axis", n_layers=8)
    with pytest.raises(VectorFileError, match="written by export_gguf"): export_vectors(v, tmp_path / "v.gguf", "llama.cpp")
    save_vectors(v, tmp_path / "ours.pt")
    with pytest.raises(VectorFileError, match="neither .axis. nor .vector."): import_vectors(tmp_path / "ours.pt", n_layers=8)
    assert [p.name for p in tmp_path.iterdir()] == ["ours.pt"]
