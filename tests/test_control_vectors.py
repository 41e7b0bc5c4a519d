"""Control vectors: what is in the file, read with the gguf package alone; what is refused and leaves nothing; and what llama.cpp itself made of them, stored."""
import json, os, subprocess, sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from persona_vectors.control_vectors import export_gguf, layer_sums
from persona_vectors.formats import VectorFileError, import_vectors
from persona_vectors.interventions import Add, Dial, Floor, SteeringError
from persona_vectors.vectors import Axis, TraitVector, Vector, VectorError

ROWS = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
LATER = list(range(1, 6))

def fields(path): return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
def tensors(path): return {t.name: (t.tensor_type.name, np.array(t.data)) for t in gguf.GGUFReader(path).tensors}

@pytest.mark.parametrize("form", ["vector", "trait", "axis", "tensor", "rows", "add", "list"])
@pytest.mark.parametrize("coefficient", [1., -.25])
def test_every_form_writes_the_same_directions(tmp_path, form, coefficient):
    v, both = Vector(ROWS[1:], LATER, "v"), dict(on_mean=ROWS[1:], off_mean=0*ROWS[1:])
    zeroed = ROWS.clone(); zeroed[0] = 0
    given = dict(vector=v, trait=TraitVector(ROWS[1:], LATER, "v", **both), axis=Axis(ROWS[1:], LATER, "v", **both), tensor=zeroed, rows={l: ROWS[l] for l in LATER}, add=Add(v, 1., LATER), list=[Add(v, .5, LATER), {l: .5*ROWS[l] for l in LATER}])[form]
    export_gguf(given, tmp_path / "v.gguf", coefficient, model_hint="llama")
    found = tensors(tmp_path / "v.gguf")
    assert list(found) == [f"direction.{l}" for l in LATER] and {k for k, _ in found.values()} == {"F32"}
    for l in LATER: np.testing.assert_allclose(found[f"direction.{l}"][1], coefficient*ROWS[l].numpy(), rtol=1e-6)
    about = fields(tmp_path / "v.gguf")
    assert (about["general.architecture"], about["controlvector.model_hint"], about["controlvector.layer_count"]) == ("controlvector", "llama", 5)
    again = import_vectors(tmp_path / "v.gguf", n_layers=6)
    assert again.layers == tuple(LATER) and torch.allclose(again.values, coefficient*ROWS[1:]) and again.about["coefficient"] == coefficient

@pytest.mark.parametrize("given, options, error, words", [
    (ROWS, {}, VectorFileError, "llama.cpp has no direction.0.*bake"), ({0: ROWS[0]}, {}, VectorFileError, "direction.0"), (Add(ROWS, 1., [0, 3]), {}, VectorFileError, "direction.0"), ({3: ROWS[3]*float("nan")}, {}, VectorError, "NaN"),
    ({3: ROWS[3]}, dict(coefficient=float("nan")), SteeringError, "finite number"), ({3: torch.full((16,), 3e38)}, dict(coefficient=9.), VectorError, "infinite"), (ROWS[3], {}, SteeringError, "does not say"), ({}, {}, SteeringError, "does not say"), ({3: ROWS[:2]}, {}, SteeringError, "shape"),
    (ROWS, dict(layers=[7]), SteeringError, "no layer 7"), (Floor(ROWS, 1., 3), {}, SteeringError, "persona-steer serve"), (Add(ROWS, Dial(1.), 3), {}, SteeringError, "dial.value"), (Add(ROWS, 1., 3, where="prompt"), {}, SteeringError, "every token"), ({-1: ROWS[3]}, {}, VectorError, "from 0")])
def test_refusals_leave_the_file_as_it_was(tmp_path, given, options, error, words):
    (tmp_path / "v.gguf").write_bytes(b"before")
    with pytest.raises(error, match=words): export_gguf(given, tmp_path / "v.gguf", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["v.gguf"] and (tmp_path / "v.gguf").read_bytes() == b"before"

def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    code = "import torch, os; from persona_vectors.control_vectors import export_gguf; export_gguf({1: torch.ones(8)}, 'v.gguf'); import gguf; gguf.GGUFWriter.write_tensors_to_file = lambda self: os._exit(9); export_gguf({2: torch.ones(8)}, 'v.gguf')"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 9
    assert list(tensors(tmp_path / "v.gguf")) == ["direction.1"]

def test_sums_are_those_of_the_formulas():
    found = layer_sums([Add(ROWS, 2., [1, 3]), Add(ROWS[4], .5, 3, unit="norm", norms={3: 7.}), {1: ROWS[0]}])
    assert found.layers == (1, 3)
    torch.testing.assert_close(found[1], 2*ROWS[1] + ROWS[0]); torch.testing.assert_close(found[3], 2*ROWS[3] + 3.5*ROWS[4]/ROWS[4].norm())

def test_files_changed_at_random_are_refused_in_words_or_load(tmp_path):
    export_gguf({l: ROWS[l] for l in LATER}, tmp_path / "v.gguf")
    whole, random = bytearray((tmp_path / "v.gguf").read_bytes()), np.random.default_rng(0)
    for i in range(150):
        changed = bytearray(whole)
        for at in random.integers(len(whole) if i % 2 else 400, size=3): changed[at] = random.integers(256)
        (tmp_path / "x.gguf").write_bytes(changed if i % 3 else changed[:random.integers(len(whole))])
        try: assert import_vectors(tmp_path / "x.gguf").values.isfinite().all()
        except VectorFileError: pass

def test_llama_cpp_said_the_same():
    "The stored result of experiments/interop_llamacpp, which runs in an environment of its own"
    told = json.loads((Path(__file__).parent.parent / "experiments/interop_llamacpp/results.json").read_text())
    llama, files = told["control_vectors"]["random Llama"], [f for m in told["control_vectors"].values() for f in m["files"]]
    assert told["prompts"] == 20 and told["bar"] == 2e-5
    beyond = told["summary"]["beyond_the_bar"]  # missed, and said to be: two models whose engines are as far apart without any vector
    assert told["passed"] is False and {k.split(" without")[0] for k in beyond} == {"persona-tiny", "baked gpt2"} and all(r["difference"] < 2*r["unsteered"] for r in beyond.values())
    assert all(f["difference"] < 2e-5 for f in llama["files"]) and all(b["difference"] < (2*b["unsteered"] if b["model"] == "gpt2" else 2e-5) for b in told["baked"] if "refused" not in b)
    assert all(f["answers"] == f["changed"] == f["of"] == 20 for f in files) and min(x for f in files for k, x in f.items() if k.startswith("one layer")) > .1
    assert {b["model"] for b in told["baked"] if "refused" not in b} >= {"llama", "mistral", "qwen2", "granite"}
