"""Baked models of every architecture, reloaded, against naive hooks; refusals that name who can serve; nothing half written."""
import copy, json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from architectures import ARCHITECTURES, SIZE, block_modules, random_model
from persona_vectors.baking import BakingError, bake, biased, place
from persona_vectors.interventions import Ablate, Add, Ceiling, Clamp, Dial, Floor, Last, SteeringError
from persona_vectors.models import fingerprint, model_source
from persona_vectors.vectors import Vector, VectorError

IDS = torch.randint(5, 4000, (2, 40), generator=torch.Generator().manual_seed(1))
OWN = dict(mistral=dict(sliding_window=None), qwen2=dict(use_sliding_window=False), granite=dict(residual_multiplier=.4, embedding_multiplier=3., attention_multiplier=.2, logits_scaling=2.))  # a place for a bias only without a window; multipliers that are not 1
BAKES = dict(llama="Llama", mistral="Llama", qwen2="Llama", granite="Granite", smollm3="SmolLM3", gpt_oss="GptOss", gpt2="GPT2LMHead", gpt_neox="GPTNeoX", phi="Phi", starcoder2="Starcoder2", opt="OPT", bloom="Bloom")
WITH_WINDOW = ("mistral", "qwen2")  # which ARCHITECTURES gives a window

def plain_model(name):
    "As ARCHITECTURES has it, or of its own"
    if name not in OWN: return random_model(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZE, **OWN[name]})).float().eval()
    for p in model.parameters():
        with torch.no_grad(): p.normal_(0, .15) if p.ndim > 1 else p.add_(.1*torch.randn_like(p))
    return model

def rows_for(model, layers=(0, 2, 3)):
    "Vectors half as long as the residual stream, a random direction each"
    g = torch.Generator().manual_seed(3)
    with torch.no_grad(): norms = [h.norm(dim=-1).mean() for h in model(IDS, output_hidden_states=True).hidden_states]
    return {l: .5*norms[l + 1]*torch.nn.functional.normalize(torch.randn(32, generator=g), dim=0) for l in layers}

def hooked(model, rows, **inputs):
    "Logits with the vectors added by hooks of torch alone"
    added = lambda h, v: (h.float() + v).to(h.dtype)
    plus = lambda v: lambda m, i, o: (added(o[0], v), *o[1:]) if isinstance(o, tuple) else added(o, v)
    hooks = [block_modules(model)[l].register_forward_hook(plus(v)) for l, v in rows.items()]
    try:
        with torch.no_grad(): return model(**(inputs or dict(input_ids=IDS))).logits
    finally:
        for h in hooks: h.remove()

@pytest.mark.parametrize("name", BAKES)
def test_a_reloaded_model_is_the_hooked_one(name, tmp_path):
    model = plain_model(name); rows = rows_for(model); before = fingerprint(model)
    wanted, plain = hooked(model, rows), hooked(model, {})
    done = bake(model, rows, tmp_path / "baked")
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(found).__name__.startswith(BAKES[name]) and done.architecture == type(found).__name__
    with torch.no_grad(): logits = found(IDS).logits
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
    assert (wanted - plain).abs().max() > .3 and done.difference < 1e-5 and done.layers == (0, 2, 3)
    note = json.loads((tmp_path / "baked/config.json").read_text())["persona_steer"]
    assert note["made_from"] == dict(model="", architecture=type(model).__name__, fingerprint=before) and note["norms"] == pytest.approx([rows[l].norm().item() for l in (0, 2, 3)], rel=1e-4)
    assert fingerprint(model) == before and torch.equal(hooked(model, {}), plain)  # the model is as it was

@pytest.mark.parametrize("name", ["llama", "gpt_oss", "granite"])
def test_padding_and_greedy_text_agree(name, tmp_path):
    model = plain_model(name); rows = rows_for(model)
    bake(model, rows, tmp_path / "baked")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    mask = torch.ones_like(IDS); mask[0, :7] = 0
    with torch.no_grad(): torch.testing.assert_close(found(IDS, attention_mask=mask).logits[mask.bool()], hooked(model, rows, input_ids=IDS, attention_mask=mask)[mask.bool()], atol=1e-5, rtol=0)
    said = found.generate(IDS[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 40:].tolist()
    ids = IDS[:1]
    for _ in range(12): ids = torch.cat([ids, hooked(model, rows, input_ids=ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert said == ids[0, 40:].tolist()

@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in BAKES or n in WITH_WINDOW])
def test_others_are_refused_with_who_can_serve_them(name, tmp_path):
    with pytest.raises(BakingError, match="export_vllm.*persona-steer serve.*export_gguf"): bake(random_model(name), {1: torch.ones(32)}, tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize("o, words", [
    (Floor(torch.ones(32), 1., 1), "persona-steer serve"), (Ceiling(torch.ones(32), 1., 1), "export_vllm"), (Ablate(torch.ones(32), 1), "Ablate depends"), (Clamp(torch.ones(32), 1, 0., 1.), "Clamp depends"),
    (Add(torch.ones(32), 1., 1, where="prompt"), "only where='all'"), (Add(torch.ones(32), 1., 1, where=Last(2)), "only where='all'"), (Add(torch.ones(32), Dial(1.), 1), "dial.value"), (Add(torch.ones(32), [1., 2.], 1), "a coefficient per row"),
    (Add(torch.ones(32), 1., 7), "7"), ({1: torch.ones(16)}, "width 16"), ({9: torch.ones(32)}, "layers 0 to 3"), ({1: torch.full((32,), float("nan"))}, "NaN"), (Vector(torch.ones(1, 32), [1], about=dict(fingerprint="of another")), "of another"), (torch.ones(32), "does not say"), ([], "nothing to add")])
def test_what_is_no_constant_or_of_another_model_is_refused(o, words, tmp_path):
    with pytest.raises((SteeringError, VectorError), match=words): bake(random_model("llama"), o, tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []

def test_units_and_sums_are_those_of_steer(tmp_path):
    model = random_model("llama"); rows = rows_for(model); norms = {2: 7., 3: 5.}
    done = bake(model, [Add(rows, .5, [0, 2]), Add(rows, -.4, -1, unit="norm", norms=norms), Add(rows[2], 1., 2)], tmp_path / "baked")
    by_hand = {0: .5*rows[0], 2: 1.5*rows[2], 3: -.4*5*rows[3]/rows[3].norm()}
    with torch.no_grad(): torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "baked")(IDS).logits, hooked(model, by_hand), atol=1e-5, rtol=0)
    assert done.layers == (0, 2, 3)

def test_bfloat16_is_measured_and_told(tmp_path):
    model = copy.deepcopy(random_model("llama")).to(torch.bfloat16); rows = rows_for(model)
    done = bake(model, rows, tmp_path / "baked")
    with torch.no_grad(): off = (AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.bfloat16)(IDS).logits - hooked(model, rows)).float().abs().max().item()
    assert done.dtype == "bfloat16" and 1e-4 < done.difference and .3*done.difference < off < 3*done.difference and f"{done.difference:.1e}" in str(done) and "bfloat16" in str(done)

def test_the_tokenizer_comes_along(tmp_path):
    model = plain_model("qwen2"); tokenizer = AutoTokenizer.from_pretrained(model_source("persona-tiny"))
    model.save_pretrained(tmp_path / "model"); tokenizer.save_pretrained(tmp_path / "model"); model.generation_config.max_new_tokens = 7; model.generation_config.save_pretrained(tmp_path / "model")
    done = bake(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), {1: torch.ones(32)}, tmp_path / "baked")  # the one that lies beside the model
    tokenizer, again = (AutoTokenizer.from_pretrained(tmp_path / k) for k in ("model", "baked"))
    assert done.tokenizer and again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    assert json.loads((tmp_path / "baked/generation_config.json").read_text())["max_new_tokens"] == 7
    note = json.loads((tmp_path / "baked/config.json").read_text())["persona_steer"]
    assert note["made_from"]["model"] == "model" and str(tmp_path) not in json.dumps(note)
    text = "It's 2024, don't you  know?"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert not bake(model, {1: torch.ones(32)}, tmp_path / "bare").tokenizer and not (tmp_path / "bare/tokenizer.json").exists()

def test_a_tokenizer_that_reads_otherwise_from_the_folder_is_refused(tmp_path):
    shouting = AutoTokenizer.from_pretrained(model_source("persona-tiny"))
    class Shouting(type(shouting)):
        def __call__(self, text, **more): return super().__call__(text.upper(), **more)
    shouting.__class__ = Shouting
    with pytest.raises(BakingError, match="the tokenizer"): bake(random_model("llama"), {1: torch.ones(32)}, tmp_path / "baked", shouting)
    assert list(tmp_path.iterdir()) == []

def test_a_crash_in_the_middle_leaves_the_old_folder(tmp_path):
    code = f"""
import sys, os; sys.path.insert(0, {str(Path(__file__).parent)!r})
from architectures import random_model; import torch; from persona_vectors.baking import bake
from transformers import LlamaForCausalLM
bake(random_model('llama'), {{1: torch.ones(32)}}, 'baked')
LlamaForCausalLM.save_pretrained = lambda self, folder: (open(f'{{folder}}/half', 'w').write('x'), os._exit(9))
bake(random_model('llama'), {{2: torch.ones(32)}}, 'baked')
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert json.loads((tmp_path / "baked/config.json").read_text())["persona_steer"]["baked"]["layers"] == [1]

def test_weights_are_shared_and_places_are_found():
    model = random_model("llama"); new = biased(model)
    assert {p.data_ptr() for p in model.parameters()} <= {p.data_ptr() for p in new.parameters()} and place(block_modules(model)[0]) is None and place(block_modules(new)[0]) == "mlp.down_proj.bias"
    assert place(block_modules(random_model("gpt_oss"))[0]) == "mlp.experts.down_proj_bias"

def test_adapters_and_models_in_pieces_are_refused(tmp_path):
    model = plain_model("qwen2")
    model.model.layers[1].mlp.register_parameter("lora_A", torch.nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(BakingError, match="lora_A; merge adapters"): bake(model, {1: torch.ones(32)}, tmp_path / "baked")
    model = plain_model("qwen2"); model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(BakingError, match="load it on one device"): bake(model, {1: torch.ones(32)}, tmp_path / "baked")
    assert list(tmp_path.iterdir()) == []
