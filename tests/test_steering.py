"""Steering is right on every architecture: against one example at a time, hooks of the test's own on the blocks, no padding, no mask, no cache, no code of the package."""
import copy, math, random, sys, threading
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache, TextIteratorStreamer

sys.path.insert(0, str(Path(__file__).parent))
from architectures import ARCHITECTURES, block_modules, random_model
from persona_vectors.chat import conversation
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.generation import generate_local, iter_batches
from persona_vectors.interventions import Ablate, Add, AfterThinking, Clamp, Dial, Floor, FromPosition, Last, RotateTowards, SetProjection, SteeringError, Window
from persona_vectors.models import load_model
from persona_vectors.passes import batch_of
from persona_vectors.steering import Steering, steer
from persona_vectors.vectors import Vector

CONFIG = PersonaVectorConfig(model_name='persona-tiny', device='cpu')
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)

# ---------------------------------------------------------------- the reference
RULES = {'all': lambda k, n: True, 'prompt': lambda k, n: k < n, 'response': lambda k, n: k >= n, FromPosition(-1): lambda k, n: k >= n - 1, Window(2, 5): lambda k, n: n + 2 <= k < n + 5, Last(3): lambda k, n: n - 3 <= k < n}
SCOPES = list(RULES)[:4]
def weights(where, seq, n): return torch.tensor([float(RULES[where](k, n)) for k in range(seq)])[:, None] # (seq, 1) of the tokens of a text whose prompt has n

@contextmanager
def by_hand(model, change):
    "Inside, the output of block `l` is `change(l, h)`"
    def hook(l): return lambda m, i, o: (change(l, o[0]), *o[1:]) if isinstance(o, tuple) else change(l, o)
    handles = [b.register_forward_hook(hook(l)) for l, b in enumerate(block_modules(model, model.config.get_text_config().num_hidden_layers))]
    try: yield
    finally: [h.remove() for h in handles]

@torch.no_grad()
def read(model, ids, change, start):
    "(seq, vocab) logits of one whole text; `change(l, h, start)` is told where its prompt ends"
    with by_hand(model, lambda l, h: change(l, h, start)): return model(torch.tensor([ids]), use_cache=False).logits[0]

def word_by_word(model, prompt, n, change, ends=()):
    "Greedy: (ids, (steps, vocab) logits)"
    said, logits = [], []
    while len(said) < n and not (said and said[-1] in ends): logits.append(read(model, prompt + said, change, len(prompt))[-1]); said.append(logits[-1].argmax().item())
    return said, torch.stack(logits)

def says(model, prompt, said, change): return read(model, prompt + said, change, len(prompt))[len(prompt) - 1:-1].argmax(-1).tolist() == said # the same in one pass: every word is the likeliest after those before it
def added(v, c, where, layer=1): return lambda l, h, start: h + c*weights(where, h.shape[1], start)*v if l == layer else h
def said_by_hand(model, prompts, n, v, doses, where): return [word_by_word(model, p, n, added(v, c, where))[0] for p, c in zip(prompts, doses)]
def gap(logits): best = logits.topk(2).values; return (best[..., 0] - best[..., 1]).min().item() # how near the likeliest token was to a tie

def some_prompts(*lengths): return [random.Random(n).choices(range(5, 4000), k=n) for n in lengths]
def padded(prompts):
    width = max(map(len, prompts))
    return torch.tensor([[0]*(width - len(p)) + p for p in prompts]), torch.tensor([[0]*(width - len(p)) + [1]*len(p) for p in prompts])
def generated(model, prompts, n, **kw):
    "Greedy, in one batch padded on the left, with the cache"
    ids, mask = padded(prompts)
    return model.generate(ids, attention_mask=mask, max_new_tokens=n, **{**GREEDY, **kw})[:, ids.shape[1]:].tolist()
def direction(seed=0, width=32): return torch.randn(width, generator=torch.Generator().manual_seed(seed))

# ---------------------------------------------------------------- the model is left as it was, after every test
def traces(model): return [(n, sorted(m.__dict__), *(len(m.__dict__[k]) for k in sorted(m.__dict__) if k.startswith(('_forward', '_backward')))) for n, m in model.named_modules()]
WATCHED = {}
def watched(model): WATCHED.setdefault(id(model), (model, traces(model))); return model
def known(name): return watched(tiny()[0] if name == 'persona-tiny' else random_model(name))
@cache
def tiny(): return load_model(CONFIG) # which remembers one model only

@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    for model, before in WATCHED.values(): assert traces(model) == before and batch_of(model) is None

# ---------------------------------------------------------------- architectures
def cut(said, end): return said[:said.index(end) + 1] if end in said else said

def telling_case(model, prompts, n, seed):
    """(vector, axis, thresholds, doses, {scope: (what each prompt's answer is, its logits)}) by the reference alone, or None where a mistake would not show: what is
    said must depend on the scope, on the addition and on the floor, nothing may hang on rounding, and a token must be there after which rows end at different times"""
    v, axis = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)); u = axis/axis.norm()
    plain = {1: [], 3: []}
    for p in prompts: read(model, p, lambda l, h, start: (plain.get(l, []).append(h[0]), h)[1], len(p))
    size, tau = 1.2*torch.cat(plain[1]).norm(dim=-1).median().item()/v.norm().item(), [(torch.cat(plain[l]) @ u).quantile(.95).item() for l in (1, 3)]
    doses = [size, -size, .5*size]
    def add(c, where): return added(v, c, where)
    def both(c, where):
        def change(l, h, start): h = add(c, where)(l, h, start); return h + (tau[l//2] - h @ u).clamp(min=0)[..., None]*u if l in (1, 3) else h
        return change
    expected = {}
    for where in SCOPES:
        said, logits = zip(*(word_by_word(model, p, n, both(c, where)) for p, c in zip(prompts, doses)))
        expected[where] = list(said), torch.stack(logits)
    said = expected['response'][0]
    telling = len({str(o) for o, _ in expected.values()}) == len(SCOPES) and all(gap(o) > 5e-5 and len(last_of(w)[1]) > 1 for w, o in expected.values())
    for share, less in ((0, add), (1, add), (0, both)): telling = telling and not all(says(model, p, o, less(share*c, 'response')) for p, o, c in zip(prompts, said, doses))
    return (v, axis, tau, doses, expected) if telling else None

def last_of(said):
    "(the token with which rows end at the most different times, those times)"
    ends = {t: {len(cut(o, t)) for o in said} for o in said for t in o}
    return max(sorted(ends.items()), key=lambda o: len(o[1]))

@pytest.mark.parametrize('name', ARCHITECTURES)
def test_architecture(name, monkeypatch):
    model, prompts, n = known(name), some_prompts(5, 14, 9), 8 # windows have 8 tokens
    v, axis, tau, doses, expected = next(filter(None, (telling_case(model, prompts, n, seed) for seed in range(7, 30))))
    monkeypatch.setattr('persona_vectors.generation.STRIDE', 3) # rows leave soon
    ids, mask = padded(prompts)
    for where, (said, logits) in expected.items():
        def steering(where=where): return steer(model, Add(v, doses, 1, where=where), Floor(axis, tau, [1, 3]))
        with steering() as audit: out = model.generate(ids, attention_mask=mask, max_new_tokens=n, output_logits=True, return_dict_in_generate=True, **GREEDY)
        assert out.sequences[:, ids.shape[1]:].tolist() == said, where
        assert (torch.stack(out.logits, 1) - logits).abs().max() < 1e-4*logits.abs().max(), where
        whole = sum(map(len, prompts)); spoken = 3*(n - 1) # the last word is not read
        assert [r['tokens'] for r in audit.table()] == [{'all': whole + spoken, 'prompt': whole, 'response': spoken, FromPosition(-1): 3 + spoken}[where], *[whole + spoken]*2]
        assert all(0 < r['share'] < 1 for r in audit.table()[1:]) # some tokens were below the floor
        end, _ = last_of(said)
        monkeypatch.setattr(model.generation_config, 'eos_token_id', [end])
        with steering(): found = {i: row for batch, rows in iter_batches(model, SimpleNamespace(pad_token_id=0, eos_token_id=end), prompts, max_tokens=n, temperature=0) for i, row in zip(batch, rows.tolist())}
        for i, e in enumerate(cut(s, end) for s in said): assert found[i][:len(e)] == e and set(found[i][len(e):]) <= {0}, (where, i)

@pytest.mark.parametrize('name', [n for n in ARCHITECTURES if n != 'mamba']) # whose `generate` gives no cache back
def test_second_turn_of_a_conversation(name):
    "The keys and values of the first turn stay as they were computed; `response` is what is said in this turn"
    model, first, then, n, v = known(name), some_prompts(9, 14), some_prompts(4, 4), 6, direction()
    ids, mask = padded(first)
    with steer(model, Add(v, 2., 1, where='response')): one = model.generate(ids, attention_mask=mask, max_new_tokens=n, return_dict_in_generate=True, **GREEDY)
    both, mask = torch.cat([one.sequences, torch.tensor(then)], 1), torch.cat([mask, torch.ones(2, n + 4, dtype=torch.long)], 1)
    with steer(model, Add(v, [-1.5, 1.], 1, where='response')): two = model.generate(both, attention_mask=mask, past_key_values=one.past_key_values, max_new_tokens=n, **GREEDY)
    other = []
    for p, a, b, c, row in zip(first, one.sequences[:, ids.shape[1]:].tolist(), then, (-1.5, 1.), two[:, both.shape[1]:].tolist()):
        assert says(model, p, a, added(v, 2., 'response'))
        def change(l, h, start, p=p, c=c):
            k = torch.arange(h.shape[1])[:, None]
            return h + (2.*(k >= len(p))*(k < len(p) + n - 1) + c*(k >= start))*v if l == 1 else h # the last word of the first turn was not in the cache: it is read in the second
        assert says(model, p + a + b, row, change)
        other += [not says(model, p + a + b, row, added(v, o, 'response')) for o in (0., c)]
    assert any(other) # it matters how both turns were said

@torch.no_grad()
def own_loop(model, prompt, n, cache, key='past_key_values'):
    "Greedy, without `generate`"
    out, said = model(torch.tensor([prompt]), use_cache=True, **({} if cache is None else {key: cache})), []
    while True:
        said.append(out.logits[0, -1].argmax().item())
        if len(said) == n: return said
        out = model(torch.tensor([said[-1:]]), use_cache=True, **{key: out[key]})

OWN = dict(dynamic=lambda m: DynamicCache(config=m.config), none=lambda m: None, static=lambda m: StaticCache(config=m.config, max_cache_len=40))
@pytest.mark.parametrize('name, cache', [*((n, c) for n in ('llama', 'gemma3_text') for c in OWN), ('mamba', 'none')])
def test_a_loop_of_ones_own(name, cache):
    model, (prompt,), v = known(name), some_prompts(9), direction()
    for where in RULES:
        expected = word_by_word(model, prompt, 10, added(v, 2., where))[0]
        with steer(model, Add(v, 2., 1, where=where)) as audit: assert own_loop(model, prompt, 10, OWN[cache](model), 'cache_params' if name == 'mamba' else 'past_key_values') == expected, where
        assert audit.table()[0]['tokens'] == weights(where, 18, 9).sum(), where

# ---------------------------------------------------------------- weights that are elsewhere, or small
def offloaded(model, how, folder):
    from accelerate import cpu_offload, disk_offload, dispatch_model
    model = copy.deepcopy(model)
    if how == 'cpu': return cpu_offload(model, execution_device='cpu')
    if how == 'disk': return disk_offload(model, folder, execution_device='cpu')
    parts = {n: 'disk' if n.endswith(('layers.1', 'layers.3')) else 'cpu' for n in ('model.embed_tokens', 'model.rotary_emb', *(f'model.layers.{l}' for l in range(4)), 'model.norm', 'lm_head')}
    return dispatch_model(model, parts, main_device='cpu', offload_dir=folder, force_hooks=True)

@pytest.mark.parametrize('how', ('cpu', 'disk', 'some on disk'))
def test_blocks_that_are_offloaded(how, tmp_path):
    prompts, v, doses = some_prompts(5, 14, 9), direction(), (2., -2., 1.)
    model = watched(offloaded(random_model('llama'), how, tmp_path))
    assert {p.device.type for p in model.parameters()} == ({'meta', 'cpu'} if how == 'some on disk' else {'meta'})
    for where in SCOPES:
        with steer(model, Add(v, doses, 1, where=where)): said = generated(model, prompts, 8)
        assert said == said_by_hand(random_model('llama'), prompts, 8, v, doses, where) != said_by_hand(random_model('llama'), prompts, 8, v, (0., 0., 0.), 'all'), where

def test_a_vector_for_blocks_that_are_offloaded(tmp_path):
    prompts, v = some_prompts(5, 14), direction()
    model = watched(offloaded(random_model('llama'), 'some on disk', tmp_path))
    with steer(model, Add(Vector(v, [1]), 2., 1)): assert generated(model, prompts, 8) == said_by_hand(random_model('llama'), prompts, 8, v, (2., 2.), 'all')

@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_eight_bit_weights(dtype):
    pytest.importorskip('bitsandbytes', reason="bitsandbytes is not installed: pip install 'persona-steer[quantization]'")
    model = watched(load_model(PersonaVectorConfig(model_name='persona-tiny', device='cpu', quantization='8bit', dtype=str(dtype)[6:]))[0])
    assert any(p.dtype == torch.int8 for p in model.parameters())
    ids, v, seen = torch.tensor(some_prompts(30)), direction(width=160), []
    def run():
        handle = block_modules(model, 8)[3].register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o)) # after those of steering
        try: model(ids)
        finally: handle.remove()
    with torch.no_grad():
        run()
        with steer(model, Add(v, .3, 3)) as audit: run()
    before, after = seen; expected = (before.float() + .3*v).to(dtype)
    assert after.dtype == dtype and (after == expected).float().mean() > .8; torch.testing.assert_close(after, expected) # but for the last bit
    r, shift = audit.table()[0], ((after.float() - before.float()) @ v/v.norm()).mean().item()
    assert r['intended'] == pytest.approx(.3*v.norm().item(), rel=1e-5) and r['achieved'] == pytest.approx(shift, rel=1e-4) == pytest.approx(r['intended'], rel=1e-5 if dtype == torch.float32 else .05)

DEVICES = pytest.mark.parametrize('device', ('cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here'))))
ROWS = torch.tensor([1., -2., 0.])[:, None, None]
RAMP = torch.tensor([min((k + 1)/9, 1.)*(k < 30) for k in range(100)]) # Window(last=30, rise=8), written out
# Each way, and beside it what it should do to (3, seq, 32) states in float64 at the k-th generated token; `turned` is what a dial shows then
def bounded(h, u, low, high): p = h @ u; return h + (p.clamp(low, high) - p)[..., None]*u
def rotated(h, u, degrees):
    n = h.norm(dim=-1, keepdim=True); p = (h @ u)[..., None]/n; w = torch.nn.functional.normalize(h/n - p*u, dim=-1); a = (p.acos() - math.radians(degrees)).clamp(0, math.pi)
    return n*(a.cos()*u + a.sin()*w)
WAYS = dict(
    add=(lambda v, dial: Add(v, 1., 1), lambda h, v, u, k, turned: h + v),
    clamp=(lambda v, dial: Clamp(v, 1, low=-.2, high=.4), lambda h, v, u, k, turned: bounded(h, u, -.2, .4)),
    overshoot=(lambda v, dial: Floor(v, [.3], [1], strength=1.5), lambda h, v, u, k, turned: h + 1.5*(bounded(h, u, .3, None) - h)),
    ablate=(lambda v, dial: Ablate(v, 1, strength=.8), lambda h, v, u, k, turned: h - .8*(h @ u)[..., None]*u),
    rotate=(lambda v, dial: RotateTowards(v, 20., 1), lambda h, v, u, k, turned: rotated(h, u, 20)),
    per_row=(lambda v, dial: Add(v, [1., -2., 0.], 1), lambda h, v, u, k, turned: h + ROWS*v),
    response=(lambda v, dial: Add(v, 1., 1, where='response'), lambda h, v, u, k, turned: h if k < 0 else h + v),
    ramp=(lambda v, dial: Add(v, [1., -2., 0.], 1, where=Window(last=30, rise=8)), lambda h, v, u, k, turned: h if k < 0 else h + RAMP[k]*ROWS*v),
    dial=(lambda v, dial: Add(v, dial, 1), lambda h, v, u, k, turned: h + turned*v),
    dial_as_bound=(lambda v, dial: Floor(v, dial, 1), lambda h, v, u, k, turned: bounded(h, u, turned, None)))

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float16))
@DEVICES
def test_half_precision_and_its_audit(way, dtype, device):
    "States are taken by hooks of the test's own, before and after that of steering, and worked out in float64; those of generated tokens wait for the audit, those of more than 256 do not"
    model, v, dial = copy.deepcopy(random_model('llama')).to(device, dtype), torch.randn(32, generator=torch.Generator().manual_seed(2)), Dial(.1); make, formula = WAYS[way]
    prompt = torch.randint(5, 4000, (3, 10), generator=torch.Generator().manual_seed(3)).to(device); before, after, turned = [], [], []
    def keep(where): return lambda m, i, o: where.append((o[0] if isinstance(o, tuple) else o).cpu().clone())
    def turn(m, i, o): turned.append(dial.value); dial.value += .01 # after steering has read it: another strength for each token
    block = block_modules(model)[1]; first = block.register_forward_hook(keep(before))
    with steer(model, make(v, dial)) as audit:
        others = block.register_forward_hook(keep(after)), block.register_forward_hook(turn)
        try: model.generate(prompt, max_new_tokens=100, min_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0)
        finally: first.remove(); [o.remove() for o in others]
    u = (v/v.norm()).double(); expected = [formula(h.double(), v.double(), u, k, t) for k, (h, t) in enumerate(zip(before, turned), -1)]
    for got, want in zip(after, expected): torch.testing.assert_close(got, want.to(dtype), rtol=1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps, atol=1e-5) # at most the last bit
    same = torch.cat([(got == want.to(dtype)).flatten() for got, want in zip(after, expected)]).float().mean(); assert dtype == torch.float32 or same > .99 # rounded once
    counted = {'response': 1, 'ramp': 1}.get(way, 0), {'ramp': 31}.get(way) # passes; the first is the prompt's
    p, intended, q = (torch.cat([(h.double() @ u).flatten() for h in hs[counted[0]:counted[1]]]) for hs in (before, expected, after)); r = audit.table()[0]
    assert r['tokens'] == len(p) and r['passes'] == len(before) == 100
    assert (r['before'], r['after'], r['intended'], r['achieved']) == pytest.approx((p.mean().item(), q.mean().item(), (intended - p).mean().item(), (q - p).mean().item()), rel=1e-4, abs=1e-5)
    assert r['share'] == pytest.approx(((q - p).abs() > 1e-6*p.abs() + 1e-9).double().mean().item(), abs=.01)

def seen_around(model, layer, run, u):
    "(mean projection before, after) of what a block hands on, by hooks of the test's own around those that `run` puts on"
    before, after = [], []
    def keep(where): return lambda m, i, o: where.append(((o[0] if isinstance(o, tuple) else o).detach().double() @ u).flatten())
    block = block_modules(model)[layer]; first = block.register_forward_hook(keep(before))
    try: run(lambda: block.register_forward_hook(keep(after)))
    finally: first.remove()
    return torch.cat(before).mean().item(), torch.cat(after).mean().item()

def test_the_audit_under_autocast():
    "Arithmetic stays in float32, and what is worked out later, outside, is what was done"
    model, v = watched(random_model('llama')), direction(); u, found = (v/v.norm()).double(), []
    def run(listen):
        with steer(model, Clamp(v, 1, low=.2, high=.2)) as audit:
            last = listen()
            try:
                with torch.autocast('cpu', torch.bfloat16): model.generate(torch.tensor(some_prompts(9)), max_new_tokens=30, **GREEDY)
            finally: last.remove()
        found.extend(audit.table())
    before, after = seen_around(model, 1, run, u); r = found[0]
    assert (r['before'], r['before'] + r['achieved']) == pytest.approx((before, after), abs=1e-5) and after == pytest.approx(.2, abs=1e-3)

def test_a_vector_that_learns_between_answers():
    "It is changed in place while states of generated tokens wait; inside inference mode first, then with gradients"
    model, w = watched(copy.deepcopy(random_model('llama'))), direction().requires_grad_(); u, ids, found = (w/w.norm()).detach().double(), torch.tensor(some_prompts(9)), []
    def run(listen):
        steering = Steering(model, Add(w, 1., 1), Ablate(direction(3), 2))
        for _ in range(2):
            with steering.on():
                last = listen()
                try:
                    with torch.inference_mode(): model.generate(ids, max_new_tokens=20, **GREEDY)
                    model(ids, labels=ids, use_cache=False).loss.backward()
                finally: last.remove()
            with torch.no_grad(): w.mul_(3); w.grad = None
        found.extend(steering.audit.table())
    before, after = seen_around(model, 1, run, u); r = found[0]
    assert r['achieved'] == pytest.approx(after - before, rel=1e-4) == pytest.approx(2*direction().norm().item(), rel=1e-4)

@pytest.mark.parametrize('where', ('all', 'response'))
def test_generation_that_was_compiled_before(where):
    "Compiled code does not look for hooks that came later: it would go on unsteered"
    model, v, prompts = copy.deepcopy(random_model('llama')), direction(), some_prompts(9, 9)
    compiled = CompileConfig(backend='eager', mode=None); compiled._compile_all_devices = True # else on a GPU only, by itself
    static = dict(cache_implementation='static', compile_config=compiled)
    plain = generated(model, prompts, 8, **static); assert '_compiled_call' in watched(model).__dict__
    with steer(model, Add(v, 2., 1, where=where)) as audit: steered = generated(model, prompts, 8, **static)
    assert plain != steered == said_by_hand(model, prompts, 8, v, (2., 2.), where) and audit.table()[0]['passes'] == 8

class Operations(TorchDispatchMode):
    "Counts what a GPU would have to start: no views, no room that is only set aside"
    FREE = {'view', '_unsafe_view', 'unsqueeze', 'squeeze', 'select', 'slice', 'expand', 't', 'transpose', 'alias', 'detach', 'empty', 'empty_like'}
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None): self.n += op.__name__.split('.')[0] not in self.FREE; return op(*args, **(kwargs or {}))

@pytest.mark.parametrize('kind, where, most', (('add', 'all', 1), ('add', 'response', 1), ('floor', 'all', 5)))
def test_operations_for_each_token(kind, where, most):
    "While a model speaks, the start of an operation costs more than its arithmetic; the plain formula in the dtype of the model starts 1 for an addition (with a vector that is there) and 5 for a floor"
    model, v, ids = copy.deepcopy(random_model('llama')).bfloat16(), direction(), torch.tensor(some_prompts(9)); u = (v/v.norm()).bfloat16()
    ours = Add(v, 1., 1, where=where) if kind == 'add' else Floor(v, .1, 1)
    plain = (lambda h: h + v.bfloat16()) if kind == 'add' else (lambda h: h + (.1 - h @ u).clamp(min=0)[..., None]*u)
    def operations(n, how):
        with how(), Operations() as counted: model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
        return counted.n
    def each(how): return (operations(30, how) - operations(10, how))/20
    none = each(nullcontext); assert each(lambda: steer(model, ours)) - none == most
    v = v.bfloat16(); handle = block_modules(model)[1].register_forward_hook(lambda m, i, o: (plain(o[0]), *o[1:]) if isinstance(o, tuple) else plain(o))
    try: assert each(nullcontext) - none == most
    finally: handle.remove()

# ---------------------------------------------------------------- beams and samples
@pytest.mark.parametrize('name', ('llama', 'gemma3_text', 'gpt2', 'bloom', 'qwen3_moe'))
def test_strengths_follow_their_beams(name):
    model, prompts, doses, v, n = known(name), some_prompts(5, 14, 9), (2., -2., 0.), direction(), 8
    beams = dict(num_beams=3, num_return_sequences=2)
    for where in ('all', 'response'):
        with steer(model, Add(v, list(doses), 1, where=where)): together = generated(model, prompts, n, **beams)
        def alone(p, c, where=where):
            at = [0] # tokens that are in the cache: of all beams alike
            def change(l, h):
                if l != 1: return h
                w = weights(where, at[0] + h.shape[1], len(p))[at[0]:]; at[0] += h.shape[1]
                return h + c*w*v
            with by_hand(model, change): return generated(model, [p], n, **beams)
        assert together == [said for p, c in zip(prompts, doses) for said in alone(p, c)], where
        assert together[:4] != [said for p in prompts[:2] for said in alone(p, 0.)]

@pytest.mark.parametrize('where', SCOPES, ids=str)
def test_strengths_follow_their_samples(where):
    "The reference draws as `generate` does: one number for each row and step, from probabilities computed one text at a time"
    model, prompts, doses, v, n = known('llama'), some_prompts(5, 14), (3., -3.), direction(), 8
    torch.manual_seed(5)
    with steer(model, Add(v, list(doses), 1, where=where)): out = generated(model, prompts, n, do_sample=True, top_k=0, num_return_sequences=2)
    def drawn(doses):
        torch.manual_seed(5); rows = [(p, [], c) for p, c in zip(prompts, doses) for _ in range(2)]
        for _ in range(n):
            p = torch.stack([read(model, p + said, added(v, c, where), len(p))[-1] for p, said, c in rows]).softmax(-1)
            for (_, said, _), i in zip(rows, torch.multinomial(p, 1)): said.append(i.item())
        return [said for _, said, _ in rows]
    assert out == drawn(doses) != drawn(doses[::-1])

OPEN = 5
class Thinking:
    "Whose ids are words, some of which open or close a think block"
    def __init__(self, opening, closing): self.opening, self.closing = opening, closing
    def decode(self, ids): return ''.join('<think>' if i in self.opening else '</think>' if self.closing(i) else f'w{i} ' for i in ids)

def test_after_thinking_under_beams():
    "Every beam thinks as long as its own text says: its score is that of its final text, read at once with weights by hand"
    model, v, n, doses = known('llama'), direction(), 10, (2., -2.)
    template, itself = some_prompts(8, 47); template.append(OPEN)
    opening = (OPEN, read(model, itself, lambda l, h, start: h, 0)[-1].argmax().item()) # what the likeliest beam begins with, and others do not
    tokenizer = Thinking(opening, lambda i: i % 4 == 1 and i not in opening)
    ids, mask = padded([template, itself])
    with steer(model, Add(v, list(doses), 1, where=AfterThinking(tokenizer))):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=n, num_beams=6, num_return_sequences=6, length_penalty=0., return_dict_in_generate=True, output_scores=True, **GREEDY)
    ends, scores = [], []
    for row, said in enumerate(out.sequences[:, ids.shape[1]:].tolist()):
        prompt, c = ((template, doses[0]), (itself, doses[1]))[row//6]
        thinks = prompt[-1] in opening or said[0] in opening
        ends.append(next((k + 1 for k, i in enumerate(said) if tokenizer.closing(i)), n) if thinks else 0)
        def change(l, h, start, c=c, end=ends[-1]): return h + c*(torch.arange(h.shape[1]) >= start + end).float()[:, None]*v if l == 1 else h
        logits = read(model, prompt + said, change, len(prompt))[len(prompt) - 1:-1]
        scores.append(logits.log_softmax(-1)[range(n), said].sum())
    torch.testing.assert_close(out.sequences_scores, torch.stack(scores), rtol=1e-4, atol=1e-4)
    assert len(set(ends[:6])) > 1 and {0, n} < set(ends[6:]) # beams of the same prompt differ: one thinks to the end, one does not think

@pytest.mark.parametrize('first', ('w', ' '))
def test_after_thinking_with_and_without_the_cache(first):
    "What a token gets may not depend on what is said later"
    model, (prompt,), v = known('llama'), some_prompts(9), 4*direction()
    said = word_by_word(model, prompt, 1, added(v, 0., 'all'))[0]
    tokenizer = Thinking((), lambda i: False); tokenizer.decode = lambda ids: ''.join(first if i in said else f'w{i} ' for i in ids) # of the first word
    def logits(**kw):
        with steer(model, Add(v, 1., 1, where=AfterThinking(tokenizer))): out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 9), max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **{**GREEDY, **kw})
        return torch.stack(out.logits)
    torch.testing.assert_close(logits(), logits(use_cache=False), rtol=1e-4, atol=1e-4)

# ---------------------------------------------------------------- other ways to generate
@pytest.mark.parametrize('name', ('llama', 'gemma3_text', 'gpt2', 'qwen3_moe'))
def test_assisted_decoding(name):
    "Several tokens in one pass, some of which are taken back"
    model, (prompt,), v = known(name), some_prompts(14), direction()
    for where in RULES:
        expected = word_by_word(model, prompt, 12, added(v, 2., where))[0]
        for how in (dict(assistant_model=model), dict(prompt_lookup_num_tokens=3)):
            with steer(model, Add(v, 2., 1, where=where)): assert generated(model, [prompt], 12, **how) == [expected], (where, list(how))

def test_streaming_from_a_thread():
    model, tokenizer, (prompt,), v = known('persona-tiny'), tiny()[1], some_prompts(14), direction(width=160)
    for where in RULES:
        expected = word_by_word(model, prompt, 12, added(v, 4., where, layer=3))[0]
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        with steer(model, Add(v, 4., 3, where=where)):
            speaker = threading.Thread(target=generated, args=(model, [prompt], 12), kwargs=dict(streamer=streamer)); speaker.start()
            assert ''.join(streamer) == tokenizer.decode(expected), where
            speaker.join()

def test_two_threads():
    "One pass waits in its first block while another begins and ends"
    model, (long, short), v, waiting, go_on = known('llama'), some_prompts(14, 5), direction(), threading.Event(), threading.Event()
    def hold(m, i, o):
        if o[0].shape[-2] == 14 and not waiting.is_set(): waiting.set(); go_on.wait(10)
    expected, found = read(model, long, added(v, 2., Last(3)), 14), []
    handle = block_modules(model)[0].register_forward_hook(hold)
    def slow():
        try: found.append(read(model, long, lambda l, h, start: h, 0))
        except Exception as e: found.append(e)
    try:
        with steer(model, Add(v, 2., 1, where=Last(3))):
            thread = threading.Thread(target=slow); thread.start(); waiting.wait(10)
            with torch.no_grad(): model(torch.tensor([short]))
            go_on.set(); thread.join()
    finally: handle.remove()
    torch.testing.assert_close(found[0], expected)

# ---------------------------------------------------------------- any prompts, any strengths, any batches
text = st.text(st.characters(codec='utf-8', exclude_categories=('Cs', 'Cc')), min_size=1, max_size=60)
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate]) # to make a failing example smaller would take minutes
@given(st.lists(st.tuples(text, st.none() | text, st.integers(-12, 12).map(lambda c: c/2)), min_size=3, max_size=4), st.integers(1, 3), st.sampled_from(SCOPES))
def test_any_rows_in_any_batches(asked, batch_size, where):
    model, tokenizer, v, n = known('persona-tiny'), tiny()[1], direction(width=160), 7
    ends = {tokenizer.eos_token_id, model.generation_config.eos_token_id}
    with mock.patch('persona_vectors.generation.STRIDE', 2), steer(model, Add(v, [c for *_, c in asked], 3, where=where)): together = generate_local(model, tokenizer, [conversation(q, s) for q, s, _ in asked], max_tokens=n, temperature=0, batch_size=batch_size, stop=['t']) # rows leave soon
    for (q, s, c), got in zip(asked, together):
        messages = [dict(role='system', content=s)]*(s is not None) + [dict(role='user', content=q)]
        prompt = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), add_special_tokens=False).input_ids
        said, logits = word_by_word(model, prompt, n, added(v, c, where, layer=3), ends)
        if gap(logits) > 1e-4: assert got == tokenizer.decode(said, skip_special_tokens=True).split('t')[0].strip() # nearer to a tie, rounding decides

# ---------------------------------------------------------------- bad input
V = direction()
def tried(make):
    "Steers, or raises SteeringError, which is a ValueError and says something; nothing else, and nothing is left on the model"
    model = known('llama'); before = traces(model)
    try:
        with torch.no_grad(), steer(model, make()): model(torch.tensor([[5, 6, 7], [8, 9, 10]]), attention_mask=torch.ones(2, 3, dtype=torch.long))
    except SteeringError as e: assert isinstance(e, ValueError) and str(e).strip()
    finally: assert traces(model) == before

FIELDS = dict(coefficient=lambda x: Add(V, x, 1), dial=lambda x: Add(V, Dial(x), 1), strength=lambda x: Ablate(V, 1, x), degrees=lambda x: RotateTowards(V, x, 1), tau=lambda x: Floor(V, x, [1, 2]), tau_of_a_layer=lambda x: Floor(V, {1: x}, 1), low=lambda x: Clamp(V, 1, low=x, high=1e6),
    value=lambda x: SetProjection(V, x, 1), layers=lambda x: Add(V, 1., x), layers_of_a_floor=lambda x: Floor(V, [1., 2.], x), vector=lambda x: Add(x, 1., 1), direction=lambda x: Ablate(x, 1), vector_of_a_layer=lambda x: Add({1: x}, 1., 1), where=lambda x: Add(V, 1., 1, where=x),
    where_gives=lambda x: Add(V, 1., 1, where=lambda p: x), unit=lambda x: Add(V, 1., 1, unit=x), norms=lambda x: Add(V, 1., 1, unit='norm', norms=x), first=lambda x: Add(V, 1., 1, where=FromPosition(x)), last=lambda x: Add(V, 1., 1, where=Last(x)), window=lambda x: Add(V, 1., 1, where=Window(x)), rise=lambda x: Add(V, 1., 1, where=Window(0, rise=x)), intervention=lambda x: x)
NAN, INF, HUGE = float('nan'), float('inf'), 10**400
JUNK = [None, True, False, 0, -1, 2, 10**30, HUGE, .5, -INF, NAN, 1e300, 1j, '', 'x', '1', b'x', [], (), {}, [[]], [1., 2.], [1., 2., 3.], [1., 'a'], [1., None], [NAN], [HUGE], [[1., 2.]], [[1., 2.], [3.]], {1}, range(2), {1: 1.}, {1: None}, {1: 'a'}, {1: V}, {'a': V}, {1: V[:31]}, object(), print, Dial([1., 2.]), Dial(2.), Last, Last(2),
    V, V[:31], V[:0], 0*V, V*NAN, V/0, V.double(), V.bool(), V + 1j, V[0], V[:2], V.repeat(4, 1), V.repeat(3, 1), V[None, None], V.numpy(), V.numpy()[:2], torch.ones(2, 3), torch.ones(2, 3).bool(), torch.ones(2, 3)*NAN, torch.ones(3, 2), Vector(V.repeat(4, 1)), Vector(V, [2]), Vector(V[:31].repeat(4, 1))]
def name_of(x): return f'{type(x).__name__}{tuple(x.shape)} {x.flatten()[:1]}' if hasattr(x, 'shape') else f'Dial({x.value!r})' if isinstance(x, Dial) else repr(x)[:40]

@pytest.mark.filterwarnings('ignore:Casting complex values')
@pytest.mark.parametrize('field', FIELDS)
def test_bad_input(field):
    escaped = []
    for x in JUNK:
        try: tried(lambda x=x: FIELDS[field](x))
        except Exception as e: escaped.append(f'{name_of(x)}: {type(e).__name__}: {e}'[:120])
    assert not escaped, '\n'.join(escaped)

numbers = st.integers() | st.sampled_from([HUGE, -HUGE]) | st.floats() | st.booleans() | st.none() | st.text(max_size=3)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 31, 32]), max_size=3).flatmap(lambda o: st.sampled_from([0., 1., NAN, INF]).map(lambda x: torch.full(o, x)))
junk = st.recursive(numbers | shapes | st.sampled_from([x for x in JUNK if not isinstance(x, Dial)]), lambda o: st.lists(o, max_size=3) | st.dictionaries(st.integers(0, 4) | st.text(max_size=1), o, max_size=2), max_leaves=4)
layers, strengths, vectors, scopes = (st.one_of(st.sampled_from(good), junk) for good in ([1, -1, [1, 2]], [1., [1., 2.]], [V, V.repeat(4, 1), {1: V, 2: V}], ['all', 'prompt', Last(2), FromPosition(0)]))
kinds = st.sampled_from([lambda v, c, l, w: Add(v, c, l, where=w), lambda v, c, l, w: Floor(v, c, l, where=w), lambda v, c, l, w: Clamp(v, l, high=c, where=w), lambda v, c, l, w: Ablate(v, l, c, where=w), lambda v, c, l, w: RotateTowards(v, c, l, where=w), lambda v, c, l, w: SetProjection(v, c, l, where=w)])

@settings(max_examples=300, deadline=None, derandomize=True, report_multiple_bugs=False)
@given(kinds, vectors, strengths, layers, scopes)
def test_any_input(kind, vector, strength, layers, where): tried(lambda: kind(vector, strength, layers, where))

@pytest.mark.parametrize('c', (1e300, [1e300, 1.]), ids=('number', 'row'))
def test_a_strength_too_large_for_float32(c):
    with pytest.raises(SteeringError, match='finite'), torch.no_grad(), steer(known('llama'), Add(V, c, 1)): known('llama')(torch.tensor([[5, 6, 7], [8, 9, 10]]))
