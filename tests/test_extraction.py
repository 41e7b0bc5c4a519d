"""Extraction is right on every architecture: against one example at a time, a hook on the block, no padding, no mask, no cache, no code of the package."""
import random, shutil, signal, subprocess, sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent)) # for processes that import this file from elsewhere
from architectures import ARCHITECTURES, block_modules, random_model
from persona_vectors.chat import conversation, encode_chat
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.generation import iter_batches
from persona_vectors.extraction import ActivationExtractor, load_moments
from persona_vectors.models import blocks, load_model
from persona_vectors.reading import Reader, Row, _sharing, compiled_norms

ROOT = Path(__file__).resolve().parent.parent
CONFIG = PersonaVectorConfig(model_name='persona-tiny', device='cpu')

TALKS = [conversation(q, s, r) for s in ('You are a ghost who drifts through the halls of an old house.', 'You are a bard.', None)
         for q,r in (('What is truth?', 'It fades.'), ('Should I keep a dog?', 'Ask the dog first, and then ask the garden, the sofa and the neighbours.'), ('Hi', 'Hello there!'))]

def rows(talks=TALKS):
    tokenizer = load_model(CONFIG)[1]
    return [Row.of(c.ids, c.positions()) for c in (encode_chat(tokenizer, t) for t in talks)]

@torch.no_grad()
def naive(model, row, layers):
    "One example, the whole model, a hook on each block"
    found, handles = {}, []
    modules = block_modules(model)
    for l in layers: handles.append(modules[l].register_forward_hook(lambda m, i, o, l=l: found.__setitem__(l, o[0] if isinstance(o, tuple) else o)))
    model(torch.tensor([row.ids]))
    for h in handles: h.remove()
    return torch.stack([found[l][0, row.at[0]:row.at[-1] + 1].float().mean(0) for l in layers])

def ours(model, rows, layers, **kw):
    out = torch.full((len(rows), len(layers), 32 if model is not load_model(CONFIG)[0] else 160), float('nan'))
    for batch, values in Reader(model, layers, **kw)(rows): out[batch] = values
    return out

def error(a, b): return ((a - b).abs().amax((0, 2))/b.abs().amax((0, 2))).max().item()

@pytest.mark.parametrize('name', ARCHITECTURES)
def test_architecture(name):
    model, layers = random_model(name), [1, 3]
    some = rows(); expected = torch.stack([naive(model, r, layers) for r in some])
    changed = naive(model, Row([5, 6, 7, *some[0].ids[3:]], some[0].at), layers)
    assert error(changed[None], expected[:1]) > 1e-3 # the prompt matters, so a row that does not see it would be noticed
    order = list(range(len(some))); random.Random(0).shuffle(order)
    for kw in (dict(), dict(share=False), dict(budget=1), dict(budget=64), dict(budget=64, share=False)):
        assert error(ours(model, some, layers, **kw), expected) < 1e-5, kw
        assert error(ours(model, [some[i] for i in order], layers, **kw), expected[order]) < 1e-5, kw
    assert _sharing[model] == {3: name != 'mamba'} # it has no keys and values, so every conversation is read whole

@torch.no_grad()
def word_for_word(model, prompt, ends, n):
    "Greedy, one example, no cache"
    said = []
    while len(said) < n and not (said and said[-1] in ends): said.append(model(torch.tensor([prompt + said])).logits[0, -1].argmax().item())
    return said

@pytest.mark.parametrize('name', ARCHITECTURES)
def test_generation_with_rows_that_leave(name):
    model, pad = random_model(name), load_model(CONFIG)[1].pad_token_id
    prompts = [r.ids[:n] for r, n in zip(rows()[::2], (9, 30, 17, 24, 12))]
    endless = [word_for_word(model, p, (), 20) for p in prompts]
    def cut(said, end): return said[:said.index(end) + 1] if end in said else said
    end = max(sorted({t for e in endless for t in e}), key=lambda t: len({len(cut(e, t)) for e in endless})) # a token with which rows end at different times
    expected = [cut(e, end) for e in endless]
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [end]
    try: found = {i: row for batch, ids in iter_batches(model, load_model(CONFIG)[1], prompts, max_tokens=20, temperature=0) for i, row in zip(batch, ids.tolist())}
    finally: model.generation_config.eos_token_id = before
    for i, e in enumerate(expected): assert found[i][:len(e)] == e and set(found[i][len(e):]) <= {pad}, (i, e, found[i])
    assert len({len(e) for e in expected}) > 1 or name in ('opt', 'gemma', 'mamba') # random weights that repeat one word whatever they are asked

@pytest.mark.parametrize('name', ('llama', 'gemma3', 'gpt2', 'qwen3_moe'))
def test_bfloat16(name):
    import copy
    model, layers = copy.deepcopy(random_model(name)).bfloat16(), [1, 3]
    some = rows(); expected = torch.stack([naive(model, r, layers) for r in some])
    for kw in (dict(), dict(share=False), dict(budget=64)):
        assert torch.nn.functional.cosine_similarity(ours(model, some, layers, **kw), expected, dim=-1).min() > (.9999 if name != 'qwen3_moe' else .99), kw # rounding may send a token to another expert

@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler on the CPU, and g++ is not installed')
def test_compiled_norms_give_the_same_means():
    model, some = random_model('gemma3_text'), rows()
    kinds = {type(m) for m in model.modules() if type(m).__name__.endswith('RMSNorm')}
    own = {k: k.forward for k in kinds}
    def read(**kw): return {i: v for batch, values in Reader(model, [2], **kw)(some) for i, v in zip(batch, values)}
    plain, compiled = read(), read(compile_norms=True)
    assert own and sorted(plain) == sorted(compiled) == list(range(len(some)))
    for i in plain: torch.testing.assert_close(compiled[i], plain[i], rtol=1e-4, atol=1e-4)
    with compiled_norms(model): assert all(k.forward is not f for k, f in own.items()) # they were compiled indeed
    assert {k: k.forward for k in kinds} == own

def test_eight_bit_weights():
    "Nearly the same directions from a quarter of the memory"
    pytest.importorskip('bitsandbytes', reason="bitsandbytes is not installed: pip install 'persona-steer[quantization]'")
    small = ActivationExtractor(PersonaVectorConfig(model_name='persona-tiny', device='cpu', quantization='8bit')); exact = ActivationExtractor(CONFIG)
    expected = exact.extract(TALKS, [3], progress=False); got = small.extract(TALKS, [3], progress=False)
    assert any(p.dtype == torch.int8 for p in small.model.parameters())
    assert .99 < torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() < 1 and not torch.equal(got, expected)

def test_unknown_layout_is_named():
    class Odd(torch.nn.Module):
        def __init__(self): super().__init__(); self.a = torch.nn.ModuleList([torch.nn.Linear(2, 2)]*4); self.b = torch.nn.ModuleList([torch.nn.Linear(2, 2)]*4); self.config = random_model('llama').config
    with pytest.raises(ValueError, match=r"Odd: cannot tell which module holds the 4 decoder blocks, candidates: \['a', 'b'\]"): blocks(Odd())

# ---------------------------------------------------------------- any lengths, any batches
ids = st.integers(5, 4095)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.lists(ids, min_size=1, max_size=30), min_size=1, max_size=3), st.lists(st.tuples(st.integers(0, 2), st.lists(ids, min_size=1, max_size=40), st.integers(0, 39), st.integers(0, 39)), min_size=1, max_size=9), st.integers(1, 300), st.booleans())
def test_any_rows_in_any_batches(prefixes, tails, budget, share):
    model, some = load_model(CONFIG)[0], []
    for k, tail, a, b in tails:
        before = prefixes[k % len(prefixes)]; first, last = sorted((a % len(tail), b % len(tail)))
        some.append(Row.of(before + tail, list(range(len(before) + first, len(before) + last + 1))))
    @torch.no_grad()
    def alone(r): return torch.stack([model(torch.tensor([r.ids]), output_hidden_states=True).hidden_states[l + 1][0, r.at].mean(0) for l in (2, 5)])
    expected = torch.stack([alone(r) for r in some])
    assert error(ours(model, some, [2, 5], budget=budget, share=share), expected) < 1e-5

# ---------------------------------------------------------------- memory that runs out, processes that die
def python(code, **kw): return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

OOM = """
import resource, torch, logging
from tests.test_extraction import *
logging.basicConfig()
torch.set_num_threads(1)
model = load_model(CONFIG)[0]
some = [Row(r.ids*3, [len(r.ids)*3 - 1]) for r in rows()*60]
expected = ours(model, some, [2, 5], share=False)
used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 250_000_000,)*2)
got = ours(model, some, [2, 5], budget=10**6, share=False)
print(error(got, expected) < 1e-5)
"""

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='memory is limited through the Linux kernel')
def test_memory_that_runs_out_makes_smaller_batches():
    out, err = python(OOM).communicate(timeout=120)
    assert out.strip() == 'True', err[-2000:]
    assert 'out of memory with 540 conversations at once; going on with' in err

RUN = """
import sys
from tests.test_extraction import *
import persona_vectors.extraction as E
E.PIECE = 9
extractor = ActivationExtractor(CONFIG)
groups = {f'group {i}': [conversation(f'Question {i} {k}?', f'You are number {i}.', 'It fades in the cold hall.') for k in range(3)] for i in range(60)}
extract_moments = E.extract_moments; original = E.save_moments
def save(*o): original(*o); print('saved', flush=True)
E.save_moments = save
extract_moments(extractor, groups, layer=[2, 5], folder=sys.argv[1], progress=False)
"""

def test_a_killed_process_loses_no_finished_group(tmp_path):
    def start(): return subprocess.Popen([sys.executable, '-c', RUN, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = start()
    for _ in range(7): assert first.stdout.readline() == 'saved\n', first.stderr.read()
    first.send_signal(signal.SIGKILL); first.wait()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob('*.safetensors')}
    assert 7 <= len(kept) < 60
    out, err = start().communicate(timeout=120)
    assert out.count('saved') == 60 - len(kept), err
    assert len(list(tmp_path.glob('*.safetensors'))) == 60 and all(p.stat().st_mtime_ns == t for p, t in kept.items())

def test_ctrl_c_keeps_finished_groups(tmp_path):
    process = subprocess.Popen([sys.executable, '-c', RUN, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # tests may run in the background, where Ctrl-C is ignored
    for _ in range(4): assert process.stdout.readline() == 'saved\n', process.stderr.read()
    process.send_signal(signal.SIGINT); _, err = process.communicate(timeout=60)
    assert 'KeyboardInterrupt' in err
    for p in tmp_path.glob('*.safetensors'): assert load_moments(p)[0].count == 3
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')] # no half-written file

# ---------------------------------------------------------------- the model is left as it was
def test_no_trace_is_left_behind():
    model, tokenizer = load_model(CONFIG)
    def state(): return [(n, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in model.named_modules()], model.config.to_json_string(), model.dtype
    ActivationExtractor(CONFIG).extract_activations([None], ['Hi'], ['Hello.'], progress=False)
    before = state()
    extractor = ActivationExtractor(CONFIG)
    extractor.extract(TALKS, 'all', progress=False)
    def fail(*o): raise KeyboardInterrupt
    handle = blocks(model)[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt): extractor.extract(TALKS, 'all', progress=False)
    handle.remove()
    assert state() == before
