"""A checkpoint for vLLM holds what `steer` does: its structure, what is refused, and the plugin's own arithmetic on blocks of transformers (vLLM itself: experiments/interop_vllm)."""
import ast, hashlib, importlib, json, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "integrations/vllm"
sys.path[:0] = [str(Path(__file__).parent), str(PLUGIN)]
import persona_steer_vllm
from architectures import block_modules, random_model
from persona_steer_vllm.steering import Step, Steering, SteeringFileError, attach, blocks_of, read_steps, steered, steps_of
from persona_vectors import vllm_export
from persona_vectors.capping import Capping
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.interventions import Ablate, Add, Ceiling, Clamp, Dial, Floor, Last, RotateTowards, SetProjection, SteeringError
from persona_vectors.models import fingerprint, load_model, model_source
from persona_vectors.steering import steer
from persona_vectors.vectors import TraitVector, Vector
from persona_vectors.vllm_export import FILE, export_vllm

TINY = Path(model_source("persona-tiny"))

@pytest.fixture(scope="module")
def tiny(): return load_model(PersonaVectorConfig(model_name="persona-tiny", device="cpu"))

def some(seed=0, n=8, d=160): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
def trait(): on, off = some(1), some(2); return TraitVector(on - off, layers=range(8), name="warm", on_mean=on, off_mean=off, n_on=3, n_off=3)
def about(folder): return json.loads((folder / "config.json").read_text())

# ---------------------------------------------------------------- what is in it
MANY = [("add", lambda: [Add(some(3), -2., [0, -1])]), ("add in gaps", lambda: [Add(TraitVector(some(1) - some(2), on_mean=some(1), off_mean=some(2), n_on=3, n_off=3, name="warm"), .4, [3])]),
        ("add in norms", lambda: [Add(some(3)[0], .5, [2, 3], unit="norm", norms={2: 4., 3: 6.})]), ("floor", lambda: [Floor(some(4), {1: .5, 2: 3.}, [1, 2])]), ("ceiling", lambda: [Ceiling(some(4), [1., -2.], (-1, 0), strength=1.5)]),
        ("clamp", lambda: [Clamp(some(4)[1], 3, low=-.1, high=torch.tensor(.2))]), ("ablate", lambda: [Ablate(some(5), [2, 4, 5], strength=.7)]), ("set", lambda: [SetProjection(some(5), 2., 6)]), ("capping", lambda: [Capping(Vector(some(6)), {2: 2., 3: 1.}).intervention()]),
        ("all, also twice at a layer", lambda: [Add(some(3), 1., [2, 5]), Floor(some(4), 4., [2, 3]), Ceiling(some(7), -1., 2), Ablate(some(5), 5), Add(some(8), .5, 2)])]

@pytest.mark.parametrize("made", [m for _, m in MANY], ids=[n for n, _ in MANY])
def test_plugin_says_what_steer_says(tiny, tmp_path, made):
    "Through the file, with the plugin's own hook on the blocks of a model of transformers"
    model, _ = tiny
    path = export_vllm("persona-tiny", made(), tmp_path / "x", link=True)
    steps = steps_of(type(model.config).from_pretrained(path), path)
    ids = torch.randint(5, 4000, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids).logits.log_softmax(-1)
        with steer(model, *made()): expected = model(ids).logits.log_softmax(-1)
        blocks = blocks_of(model, 8)
        try:
            attach(blocks, steps)
            found = model(ids).logits.log_softmax(-1)
        finally:
            for b in blocks: b._forward_hooks.clear(); b._modules.pop("persona_steering", None)
        assert torch.equal(model(ids).logits.log_softmax(-1), plain)
    assert (expected - plain).abs().max() > .05
    assert_close(found, expected, rtol=1e-6, atol=2e-5) # a log-probability of -30 has steps of 2e-6 in float32

@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "olmo2", "gpt_oss"])
def test_finds_the_blocks(name): assert blocks_of(random_model(name), 4) is block_modules(random_model(name))

def test_two_addends_of_a_residual_stream():
    "Most blocks of vLLM give back two tensors whose sum is meant, in the type of the weights; the formula by hand, in double"
    g = torch.Generator().manual_seed(0)
    h, rest, v, u = (torch.randn(*s, generator=g) for s in ((5, 32), (5, 32), (32,), (32,))); u = u / u.norm()
    block = torch.nn.Identity(); block.persona_steering = Steering([Step(0, "add", v, 1.5, -float("inf"), float("inf")), Step(0, "clamp", u, 2., .5, .6)])
    for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, .05)):
        a, b = h.to(dtype), rest.to(dtype)
        x = a.double() + b.double() + 1.5 * v.double(); p = x @ u.double()
        x = x + 2 * (p.clamp(.5, .6) - p)[:, None] * u.double()
        one, other = steered(block, (), (a, b))
        assert one.dtype == other.dtype == dtype and torch.equal(one + other, one)
        assert_close(one.double(), x, rtol=0, atol=atol); assert torch.equal(one, x.to(dtype)) or dtype == torch.float32 # cast once: the nearest there is
        alone = steered(block, (), (a.float() + b.float(),))
        assert isinstance(alone, tuple) and len(alone) == 1; assert_close(alone[0].double(), x, rtol=0, atol=1e-5)
    block.persona_steering.dose.fill_(0)
    assert torch.equal(steered(block, (), h), h)
    with pytest.raises(TypeError, match="neither a residual stream nor two addends"): steered(block, (), (h, rest, rest))
    with pytest.raises(TypeError, match="neither a residual stream nor two addends"): steered(block, (), (h, rest[:2]))

def test_structure(tmp_path):
    path = export_vllm(TINY, [Add(Vector(some(), name="kind", about=dict(seed=7)), 1.5, [2, -1]), Floor(some(1)[0], 2., 4)], tmp_path / "a/b", about=dict(who="me"))
    plain, config = about(TINY), about(path)
    own = config.pop("persona_steering")
    assert config.pop("architectures") == ["PersonaSteeredTransformersForCausalLM"] and config == {k: x for k, x in plain.items() if k != "architectures"}
    assert own["sha256"] == hashlib.sha256((path / FILE).read_bytes()).hexdigest() and own["file"] == FILE and own["about"] == dict(who="me") and own["model"] == "persona-tiny"
    assert own["interventions"] == [dict(kind="Add", layers=[2, -1], coefficient=1.5, unit="raw", name="kind", vector=dict(seed=7)), dict(kind="Clamp", layers=4, strength=1., low=2.)]
    assert "0-based" in own["convention"]
    with safe_open(path / FILE, "pt") as f:
        header = json.loads(f.metadata()["persona_steering"])
        assert header == dict(format=1, n_layers=8, d_model=160, steps=[dict(layer=2, kind="add", strength=1.5, low=None, high=None), dict(layer=7, kind="add", strength=1.5, low=None, high=None), dict(layer=4, kind="clamp", strength=1., low=2., high=None)])
        assert torch.equal(f.get_tensor("step.1"), some()[7]); assert_close(f.get_tensor("step.2"), some(1)[0] / some(1)[0].norm())
    for f in TINY.iterdir(): assert f.name == "config.json" or (path / f.name).read_bytes() == f.read_bytes()
    assert oct(path.stat().st_mode)[-3:] == "755"
    assert [o.name for o in (tmp_path / "a").iterdir()] == ["b"]

def test_loaded_model_is_saved_with_its_weights(tiny, tmp_path):
    model, tokenizer = tiny
    path = export_vllm(model, Add(Vector(some(), about=dict(fingerprint=fingerprint(model))), 1., 2), tmp_path / "x")
    assert about(path)["persona_steering"]["fingerprint"] == fingerprint(model)
    assert_close(load_file(path / "model.safetensors")["model.norm.weight"], model.model.norm.weight.detach())
    from transformers import AutoTokenizer
    assert AutoTokenizer.from_pretrained(path).get_vocab() == tokenizer.get_vocab()
    bare = random_model("llama")
    with pytest.raises(SteeringError, match="pass it: tokenizer="): export_vllm(bare, Add(torch.ones(32), 1., 0), tmp_path / "y")
    path = export_vllm(bare, Add(torch.ones(32), 1., 0), tmp_path / "y", tokenizer)
    assert about(path)["architectures"] == ["PersonaSteeredLlamaForCausalLM"]

def test_our_loader_refuses_it(tmp_path):
    "transformers would read it as the model it was made from, and speak unsteered"
    from transformers import AutoModelForCausalLM
    path = export_vllm("persona-tiny", Add(torch.ones(160), 1., 2), tmp_path / "x", link=True)
    assert AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers == 8
    with pytest.raises(ValueError, match="exported for vLLM.*Load the model that it was made from"): load_model(PersonaVectorConfig(model_name=str(path), device="cpu"))

def test_links(tmp_path):
    before = {f.name: f.read_bytes() for f in TINY.iterdir()}
    path = export_vllm(TINY, Add(some(), 1., 2), tmp_path / "x", link=True)
    assert (path / "model.safetensors").is_symlink() and not (path / "config.json").is_symlink()
    export_vllm(TINY, Add(some(), 2., 2), tmp_path / "x", link=True, overwrite=True)
    assert {f.name: f.read_bytes() for f in TINY.iterdir()} == before

def test_a_recorded_graph_follows_the_dose():
    "What CUDA graphs need, as far as a CPU can show it: a single graph, with nothing in it for Python to decide, whose numbers are read when it runs"
    v, u = some(3)[0], torch.nn.functional.normalize(some(4)[0], dim=0); none = float("inf")
    block = torch.nn.Identity(); block.persona_steering = Steering([Step(0, "add", v, 2., -none, none), Step(0, "clamp", u, 1.5, -.1, .2)])
    torch._dynamo.reset(); graphs = []
    def record(graph, inputs): graphs.append(graph); return graph.forward
    recorded = torch.compile(lambda *addends: sum(steered(block, (), addends)), backend=record, fullgraph=True)
    def naive(h, dose): h = h + dose * 2 * v; p = h @ u; return h + dose * 1.5 * (p.clip(-.1, .2) - p)[:, None] * u
    for dose, seed in ((1., 5), (0., 6), (-.5, 7)):
        block.persona_steering.dose.fill_(dose)
        assert_close(recorded(some(seed), some(seed + 9)), naive(some(seed) + some(seed + 9), dose), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1 and not [n for n in graphs[0].graph.nodes if n.target in ("item", "tolist", "cpu", "numpy") or "scalar" in str(n.target)] # no number goes back to Python

# ---------------------------------------------------------------- whole or not at all
def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    path = export_vllm(TINY, Add(some(), 1., 2), tmp_path / "x")
    files = lambda: {f.relative_to(path): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    before = files()
    with pytest.raises(SteeringError, match="JSON-serialisable"): export_vllm(TINY, Add(some(), 2., 2), path, overwrite=True, about=dict(x={1, 2}))
    def interrupted(*_): raise KeyboardInterrupt
    monkeypatch.setattr(vllm_export, "_copy", interrupted)
    for where in (path, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt): export_vllm(TINY, Add(some(), 2., 2), where, overwrite=True)
    monkeypatch.undo()
    assert files() == before and [o.name for o in tmp_path.iterdir()] == ["x"]
    real = Path.rename
    def fails(self, to): # the second of two: the old folder is out of the way, and the new one cannot come
        if self.name.startswith(".x.") and not self.name.endswith(".old"): raise OSError("no")
        return real(self, to)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"): export_vllm(TINY, Add(some(), 2., 2), path, overwrite=True)
    monkeypatch.undo()
    assert files() == before and [o.name for o in tmp_path.iterdir()] == ["x"]

def test_what_is_there_stays(tmp_path):
    (tmp_path / "mine").mkdir(); (tmp_path / "mine/config.json").write_text("{}"); (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(FileExistsError, match="choose another folder"): export_vllm(TINY, Add(some(), 1., 2), tmp_path / name)
        with pytest.raises(FileExistsError, match="no checkpoint of export_vllm"): export_vllm(TINY, Add(some(), 1., 2), tmp_path / name, overwrite=True)
    shutil.copytree(TINY, tmp_path / "model")
    for inside in ("model", "model/steered"):
        with pytest.raises(SteeringError, match="lies in the checkpoint it is made from"): export_vllm(tmp_path / "model", Add(some(), 1., 2), tmp_path / inside, overwrite=True)

# ---------------------------------------------------------------- refused
REFUSED = {"where='response'": lambda: Add(some(), 1., 2, where="response"), "where=Last": lambda: Add(some(), 1., 2, where=Last(2)), "RotateTowards: a checkpoint": lambda: RotateTowards(some(), 5., 2), "one per row": lambda: Add(some(), [1., 2.], 2),
           "one per row: a checkpoint has one": lambda: Ablate(some(), 2, strength=torch.tensor([1., 2.])), "coefficient is a Dial": lambda: Add(some(), Dial(1.), 2), "low is a Dial": lambda: Floor(some(), Dial(1.), 2), "the model has 8 blocks": lambda: Add(some(), 1., 9),
           "needs \\(160,\\)": lambda: Add(some(d=32), 1., 2), "NaN or infinite": lambda: Add(some() / 0, 1., 2), "finite number": lambda: Add(some(), float("nan"), 2), "low=3 is above high=1": lambda: Clamp(some(), 2, low=3., high=1.),
           "other|another model|were made with": lambda: Add(Vector(some(), about=dict(fingerprint="0" * 16, model="m")), 1., 2), "Capping is no intervention": lambda: Capping(Vector(some()), {2: 1.}), "int is no intervention": lambda: 3}

@pytest.mark.parametrize("message", REFUSED)
def test_refused(tmp_path, message):
    with pytest.raises(SteeringError, match=message): export_vllm(TINY, [REFUSED[message]()], tmp_path / "x")
    assert not list(tmp_path.iterdir())

def test_refused_models(tmp_path):
    add = Add(torch.ones(32), 1., 0)
    for name, message in dict(gpt2="GPT2LMHeadModel: a causal language model|GPT2LMHeadModel", falcon="not among those that were compared", gemma3="of one that also sees or hears").items():
        with pytest.raises(SteeringError, match=message): export_vllm(random_model(name), add, tmp_path / "x", tokenizer=object())
    with pytest.raises(SteeringError, match="what its blocks in vLLM give back is not known"): export_vllm(random_model("falcon"), add, tmp_path / "x", tokenizer=object(), implementation="vllm")
    with pytest.raises(SteeringError, match="must be one of auto, vllm, transformers"): export_vllm(TINY, Add(some(), 1., 2), tmp_path / "x", implementation="sglang")
    with pytest.raises(SteeringError, match="no folder with a config.json"): export_vllm("someone/model", add, tmp_path / "x")
    with pytest.raises(SteeringError, match="no interventions"): export_vllm(TINY, [], tmp_path / "x")
    path = export_vllm(TINY, Add(some(), 1., 2), tmp_path / "x", link=True)
    with pytest.raises(SteeringError, match="steered already"): export_vllm(path, Add(some(), 1., 2), tmp_path / "y")

# ---------------------------------------------------------------- the plugin alone
def test_plugin_refuses_what_does_not_fit(tiny, tmp_path):
    path = export_vllm(TINY, [Add(some(), 1., 2), Floor(some(1), 2., 4)], tmp_path / "x", link=True)
    file, config = path / FILE, type(tiny[0].config).from_pretrained(path)
    whole = file.read_bytes()
    assert len(read_steps(file, d_model=160, n_layers=8)) == 2
    for kw, message in ((dict(d_model=64), "width 160, the model has 64"), (dict(n_layers=4), "layer 4, the model has layers 0 to 3"), (dict(sha256="0" * 64), "export the checkpoint again")):
        with pytest.raises(SteeringFileError, match=message): read_steps(file, **kw)
    for bad in (b"", b"x", whole[:100], whole[:-8], b"\xff" * 200):
        file.write_bytes(bad)
        with pytest.raises(SteeringFileError, match="damaged"): read_steps(file)
        with pytest.raises(SteeringFileError, match="is not the"): steps_of(config, path)
    save_file({"step.0": torch.ones(160)}, file)
    with pytest.raises(SteeringFileError, match="damaged, or no file of export_vllm"): read_steps(file)
    step = dict(layer=2, kind="add", strength=1., low=None, high=None)
    for header, message in ((dict(format=2, steps=[step]), "reads up to 1"), (dict(format=1, steps=[]), "no step"), (dict(format=1, steps=[dict(step, kind="turn")]), "of kind 'turn'"), (dict(format=1, steps=[dict(step, strength=float("nan"))]), "strength=nan"), (dict(format=1, steps=[step, step]), "damaged"), (dict(format=1, steps=[dict(step, low=2, high=1)]), "low=2, high=1"), ([1], "damaged")):
        save_file({"step.0": torch.ones(160)}, file, metadata=dict(persona_steering=json.dumps(header)))
        with pytest.raises(SteeringFileError, match=message): read_steps(file)
    for odd in (torch.ones(2, 160), torch.ones(160).half(), torch.full((160,), float("nan"))):
        save_file({"step.0": odd}, file, metadata=dict(persona_steering=json.dumps(dict(format=1, steps=[step]))))
        with pytest.raises(SteeringFileError, match="finite float32 of shape"): read_steps(file)
    file.unlink()
    with pytest.raises(SteeringFileError, match="copy the whole folder"): steps_of(config, path)
    with pytest.raises(SteeringFileError, match="says nothing about persona_steering"): steps_of(tiny[0].config, path)

def test_plugin_needs_torch_and_safetensors_only():
    done = subprocess.run([sys.executable, "-c", "import sys, persona_steer_vllm; assert 'torch' not in sys.modules; import persona_steer_vllm.steering; print([m for m in ('transformers', 'vllm', 'persona_vectors', 'numpy.testing') if m in sys.modules])"], cwd=PLUGIN, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    for f in (PLUGIN / "persona_steer_vllm").glob("*.py"):
        tops = {(n.module or "").split(".")[0] if isinstance(n, ast.ImportFrom) and not n.level else "" for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))} | {a.name.split(".")[0] for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.Import) for a in n.names}
        assert tops <= {"", "dataclasses", "fcntl", "hashlib", "json", "logging", "os", "pathlib", "time", "typing", "torch", "safetensors", "vllm", "huggingface_hub"}, f

def test_both_sides_know_the_same():
    assert persona_steer_vllm.ARCHITECTURES == vllm_export.VLLM_ARCHITECTURES and persona_steer_vllm.PREFIX == "PersonaSteered"
    steering = importlib.import_module("persona_steer_vllm.steering")
    assert steering.FORMAT == vllm_export.FORMAT
    entry = (PLUGIN / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\npersona_steer = "persona_steer_vllm:register"' in entry
