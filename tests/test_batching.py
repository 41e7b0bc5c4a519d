"""Answers in batches against one row at a time: a pass over the whole text, without cache, padding or any code of the package."""
import logging, threading, time
from contextlib import ExitStack
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from transformers import AutoTokenizer

from architectures import ARCHITECTURES, block_modules, random_model
from persona_vectors.batching import Asked, Batcher, BatchFull, Ear, Job, Text, Token
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.engine import Manner, Manners, SteeringEngine
from persona_vectors.extraction import ActivationExtractor
from persona_vectors.generation import generate_local
from persona_vectors.models import load_model, lock_of, model_source
from persona_vectors.personas import ModelWrapper, PersonaManager
from persona_vectors.settings import get_config

TOKENIZER = AutoTokenizer.from_pretrained(model_source("persona-tiny"))
FLOORED = (1, 2)
UNSTEERED = Manner(None, 0., False, {})
fuzz = settings(max_examples=150, deadline=None)

def outputs(model, n, hooks):
    "A context in which h of the output of block l becomes hook(h)"
    def hook(change): return lambda m, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
    stack = ExitStack()
    for l, change in hooks: stack.callback(block_modules(model, n)[l].register_forward_hook(hook(change)).remove)
    return stack

@torch.inference_mode()
def typical(model, ids, n=4):
    "Median length of the residual stream after each block"
    kept = {}
    with outputs(model, n, [(l, lambda h, l=l: kept.setdefault(l, h)) for l in range(n)]): model(input_ids=torch.tensor([ids]))
    return {l: h[0].norm(dim=-1).median() for l, h in kept.items()}

class House:
    "A model, a guard of random directions, and random vectors of a size that counts"
    def __init__(self, model, folder, n=4):
        self.model, self.n = model, n
        wrapper = ModelWrapper(get_config(model={"name": "persona-tiny", "device": "cpu"}, steering={"unit": "raw"}, data_dir=folder)); wrapper.__dict__["_loaded"] = model, TOKENIZER
        self.manners = Manners(PersonaManager(wrapper.config, wrapper, progress=False))
        torch.manual_seed(0)
        self.ids = torch.randint(2, 6144, (64,)).tolist()
        self.norms = typical(model, self.ids[:24], n)
        self.d = model.get_input_embeddings().weight.shape[1]
        axis = {l: torch.nn.functional.normalize(torch.randn(self.d), dim=0) for l in FLOORED}
        self.manners.__dict__["guard"] = axis, {"response": {l: float(.2 * self.norms[l]) for l in FLOORED}, "last_prompt": {l: float(.5 * self.norms[l]) for l in FLOORED}}

    def manner(self, *layers, strength=1., safety=False): return Manner(None, strength, safety, {l: .3 * self.norms[l] * torch.nn.functional.normalize(torch.randn(self.d), dim=0) for l in layers})

    @torch.inference_mode()
    def scores(self, asked, said):
        "(len(said) + 1, vocabulary): log probabilities of each token of an answer, and of the one after it"
        start, (axis, floors), m = len(asked.prompt), self.manners.guard, asked.manner
        def add(l): return lambda h: h + m.strength * m.vectors[l]
        def floor(l):
            def change(h):
                tau = torch.full(h.shape[1:2], -torch.inf); tau[start - 1], tau[start:] = floors["last_prompt"][l], floors["response"][l]
                return h + (tau - h @ axis[l]).clamp(min=0)[..., None] * axis[l]
            return change
        with outputs(self.model, self.n, [*((l, add(l)) for l in m.vectors), *((l, floor(l)) for l in axis if m.safety)]): return self.model(input_ids=torch.tensor([[*asked.prompt, *said]])).logits[0, start - 1:].float().log_softmax(-1)

    def check(self, job):
        "A greedy answer is what the model says alone"
        scores, a = self.scores(job.asked, job.said), job.asked
        for k, t in enumerate(job.said): assert scores[k, t] > scores[k].max() - 1e-3, f"token {k} of {len(job.said)}: {t}, not {int(scores[k].argmax())}"
        if job.finish == "length": assert len(job.said) == a.max_tokens
        else: assert job.finish == "stop" and int(scores[-1].argmax()) == 1, job.finish
        tokens = [p.token for p in job.pieces if p.token]
        assert [t.id for t in tokens] == job.said
        for k, t in enumerate(tokens): torch.testing.assert_close(torch.tensor(t.logprob), scores[k, t.id], atol=1e-3, rtol=1e-3)

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return House(load_model(PersonaVectorConfig(model_name="persona-tiny", device="cpu"))[0], tmp_path_factory.mktemp("house"), 8)

def wait(ready, seconds=20):
    end = time.monotonic() + seconds
    while not ready(): assert time.monotonic() < end, "nothing happens"; time.sleep(.001)

def endless(*args, **kwargs):
    "A batcher that takes no token for an end"
    batcher = Batcher(*args, **kwargs); batcher.stops = set()
    return batcher

def one_after_the_other(batcher, asked):
    "Each joins when the one before has said two tokens"
    jobs = []
    for a in asked: jobs.append(batcher.submit(a)); wait(lambda: len(jobs[-1].said) > 1 or jobs[-1].finish)
    wait(lambda: all(j.finish for j in jobs))
    return jobs

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_say_what_each_says_alone(name, tmp_path, caplog):
    house = House(random_model(name), tmp_path); ids = house.ids
    manners = [house.manner(1), house.manner(0, 2, strength=-1.), UNSTEERED, house.manner(2, strength=.5, safety=True), Manner(None, 0., True, {}), house.manner(1, safety=True), house.manner(3), house.manner(0, 1)]
    asked = [Asked(ids[k:k + n], m, most, temperature=0, logprobs=0) for k, (m, n, most) in enumerate(zip(manners, (5, 17, 2, 11, 3, 24, 1, 9), (26, 9, 19, 4, 15, 6, 12, 1)))]
    with caplog.at_level(logging.WARNING): batcher = Batcher(house.manners, max_rows=4)
    jobs = one_after_the_other(batcher, asked)
    batcher.close()
    for job in jobs: house.check(job)
    assert len({tuple(j.said) for j in jobs}) > 5
    alone = name == "mamba"
    assert (batcher.steps == batcher.row_steps) == alone and batcher.row_steps >= sum(len(j.said) for j in jobs) and ("one at a time" in caplog.text) == alone
    plain = house.scores(Asked(asked[0].prompt, UNSTEERED), jobs[0].said)
    assert (plain - house.scores(asked[0], jobs[0].said)).abs().max() > .01 # the vectors do something
    assert (house.scores(Asked(asked[4].prompt, UNSTEERED), jobs[4].said) - house.scores(asked[4], jobs[4].said)).abs().max() > .01 # and the floors

@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba"]) # the last has a state, and no keys that would say how far it is
def test_an_engine_says_what_the_model_says(name, tmp_path):
    house = House(random_model(name), tmp_path)
    engine = SteeringEngine(house.manners.manager); engine.manners, engine._manner = house.manners, house.manner(1, 3, safety=True)
    engine.generate([dict(role="user", content="Tell me of the sea.")], max_tokens=12, temperature=0)
    turn = engine.turn
    scores = house.scores(Asked(turn.prompt, engine._manner), turn.said)
    assert len(turn.said) > 3
    for k, t in enumerate(turn.said): assert scores[k, t] > scores[k].max() - 1e-3, k
    tokens = {(r["layer"], r["where"]): r["tokens"] for r in turn.audit.table() if r["name"] != "Add"}
    assert tokens == {(l, at): n for l in FLOORED for at, n in dict(last_prompt=1, response=len(turn.said)).items()} # all that was said has been fed

@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
def test_a_seed_says_the_same_in_a_batch_and_alone(name, tmp_path):
    house = House(random_model(name), tmp_path); m = house.manner(1, safety=True)
    asked = [Asked(house.ids[k % 3:9], m if k % 2 else UNSTEERED, 8 + k, temperature=(.7, 1.3, 0)[k % 3], top_p=(1., .8)[k % 2], seed=k // 4, sample=k % 4) for k in range(8)]
    alone, batch = Batcher(house.manners, max_rows=1), Batcher(house.manners, max_rows=8)
    expected = [alone.answer([a])[0].said for a in asked]
    assert [j.said for j in one_after_the_other(batch, asked)] == expected and [j.said for j in batch.answer(asked)] == expected
    assert len({tuple(o[:8]) for o in expected}) == len(expected)
    alone.close(); batch.close()

def test_likeliest_tokens_are_those_of_the_steered_model(tiny):
    batcher = Batcher(tiny.manners)
    asked = [Asked(tiny.ids[:9], tiny.manner(3, safety=k == 1), 12, temperature=k, seed=3, logprobs=n) for k, n in enumerate((3, 0, 20))] + [Asked(tiny.ids[:4], UNSTEERED, 12)]
    jobs = [batcher.submit(a) for a in asked]
    batches = [list(batcher.stream(j)) for j in jobs]
    batcher.close()
    for job, pieces in zip(jobs[:3], batches):
        scores, tokens = tiny.scores(job.asked, job.said), [p.token for p in pieces if p.token]
        for k, t in enumerate(tokens):
            best = scores[k].topk(job.asked.logprobs)
            torch.testing.assert_close(torch.tensor([p for _, p in t.top]), best.values, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(torch.tensor(t.logprob), scores[k, t.id], atol=1e-3, rtol=1e-3)
            assert all(abs(scores[k, i] - p) < 1e-3 for i, p in t.top)
    assert all(p.token.logprob is None and p.token.top == () for p in batches[3] if p.token)

def test_the_gauge_hears_each_row(tiny):
    u = torch.nn.functional.normalize(torch.ones(tiny.d), dim=0)
    batcher = Batcher(tiny.manners, ear=Ear("ones", 5, 0., 1., u))
    jobs = one_after_the_other(batcher, [Asked(tiny.ids[:n], tiny.manner(2, 5, safety=bool(n % 2)), 14, temperature=0) for n in (3, 8, 21)])
    batcher.close()
    for job in jobs:
        kept = []
        with outputs(tiny.model, 8, [(5, lambda h, kept=kept: kept.append(h) or h)]): tiny.scores(job.asked, job.said)
        seen = kept[0][0] + job.asked.manner.vectors[5] # the hook above is before that of the vector
        torch.testing.assert_close(torch.tensor(job.heard), (seen @ u)[len(job.asked.prompt):][:len(job.heard)], atol=2e-3, rtol=1e-3)
        assert len(job.heard) == len(job.said) - (job.finish == "length")

# Coming and going

def test_a_cancelled_row_leaves_and_the_others_go_on(tiny):
    batcher = endless(tiny.manners, max_rows=3)
    jobs = [batcher.submit(Asked(tiny.ids[:n], UNSTEERED, 80, temperature=0, logprobs=0)) for n in (4, 9, 6)]
    late = batcher.submit(Asked(tiny.ids[:7], UNSTEERED, 5, temperature=0, logprobs=0))
    never = batcher.submit(Asked(tiny.ids[:7], UNSTEERED, 5)); never.cancel()
    for j in jobs: wait(lambda j=j: len(j.said) > 3 or j.finish)
    jobs[1].cancel(); said = len(jobs[1].said)
    wait(lambda: late.finish and never.finish)
    assert jobs[1].finish == "cancelled" and len(jobs[1].said) <= said + 2 and jobs[1].pieces[-1].finish == "cancelled"
    assert never.finish == "cancelled" and not never.said
    tiny.check(late)
    for j in (jobs[0], jobs[2]):
        wait(lambda j=j: j.finish); tiny.check(j)
    assert (batcher.running, batcher.waiting) == (0, 0)
    batcher.close()

def test_a_queue_is_full_of_those_who_still_want_an_answer(tiny):
    batcher = Batcher(tiny.manners, max_rows=1, max_waiting=2)
    ask = Asked(tiny.ids[:4], UNSTEERED, 5, temperature=0, logprobs=0)
    with lock_of(tiny.model): # nothing can be computed meanwhile
        first, second = batcher.submit(ask), batcher.submit(ask)
        with pytest.raises(BatchFull, match="2 answers are waited for already"): batcher.submit(ask)
        first.cancel(); assert batcher.waiting == 1
        third = batcher.submit(ask)
        with pytest.raises(BatchFull): batcher.submit(ask)
    wait(lambda: third.finish)
    assert (first.finish, len(first.said)) == ("cancelled", 0)
    for j in (second, third): tiny.check(j)
    batcher.close()

def test_a_batch_that_dies_is_told_and_the_next_is_served(tiny, caplog):
    batcher, ask = endless(tiny.manners, max_rows=4), Asked(tiny.ids[:6], tiny.manner(3), 40, temperature=0, logprobs=0)
    def die(m, args, out):
        if out[0].shape[0] == 3 or isinstance(out, torch.Tensor) and out.shape[0] == 3: raise MemoryError("no more")
    handle = block_modules(tiny.model, 8)[4].register_forward_hook(die)
    try:
        with lock_of(tiny.model): jobs = [batcher.submit(ask) for _ in range(3)] # nobody begins before all are there
        wait(lambda: all(j.finish for j in jobs))
        assert [j.finish for j in jobs] == ["failed"] * 3 and all(type(j.error) is MemoryError for j in jobs)
        with pytest.raises(MemoryError): list(batcher.stream(jobs[0]))
        assert "a batch of 3 failed: MemoryError" in caplog.text
        for j in batcher.answer([ask, ask]): assert j.finish == "length"
    finally: handle.remove()
    running = batcher.submit(ask)
    with pytest.raises(IndexError): list(batcher.stream(batcher.submit(Asked([10**6], UNSTEERED)))) # its own prompt kills it alone
    wait(lambda: running.finish); tiny.check(running)
    batcher.close()

def test_reading_and_generating_beside_a_batcher_is_as_alone(tiny):
    "Hooks belong to a model and not to a thread: without a lock a reading ends the batcher's pass, and what is generated is steered by it"
    extractor = ActivationExtractor(PersonaVectorConfig(model_name="persona-tiny", device="cpu"), tiny.model, TOKENIZER)
    chats = [[dict(role="user", content=f"{n}?"), dict(role="assistant", content="Truth is a river.")] for n in range(6)]
    def read(): return extractor.extract(chats, [4], progress=False)
    def say(): return generate_local(tiny.model, TOKENIZER, [c[:1] for c in chats], max_tokens=12, temperature=0, batch_size=2)
    alone = read(), say()
    batcher, ask = endless(tiny.manners, max_rows=2), Asked(tiny.ids[:6], tiny.manner(3, strength=8.), 60, temperature=0, logprobs=0)
    jobs = [batcher.submit(ask) for _ in range(3)]
    wait(lambda: jobs[0].said)
    for _ in range(4):
        torch.testing.assert_close(read(), alone[0], rtol=0, atol=1e-4) # steering moves it by .2
        assert say() == alone[1]
    wait(lambda: all(j.finish for j in jobs))
    for j in jobs: tiny.check(j)
    batcher.close()

def test_a_queue_of_none_still_serves_who_finds_a_place(tiny):
    batcher, ask = endless(tiny.manners, max_rows=1, max_waiting=0), Asked(tiny.ids[:6], UNSTEERED, 200, temperature=1.)
    job = batcher.submit(ask); wait(lambda: job.said)
    with pytest.raises(BatchFull): batcher.submit(ask)
    batcher.close(now=True)

def test_closing_waits_or_does_not(tiny):
    ask = Asked(tiny.ids[:6], UNSTEERED, 30, temperature=0, logprobs=0)
    batcher = Batcher(tiny.manners, max_rows=2); jobs = [batcher.submit(ask) for _ in range(5)]
    batcher.close()
    for j in jobs: tiny.check(j)
    with pytest.raises(BatchFull, match="shutting down"): batcher.submit(ask)
    batcher = endless(tiny.manners, max_rows=2); jobs = [batcher.submit(Asked(tiny.ids[:6], UNSTEERED, 400, temperature=1.)) for _ in range(5)]
    wait(lambda: jobs[0].said); start = time.monotonic(); batcher.close(now=True)
    assert time.monotonic() - start < 2 and {j.finish for j in jobs} == {"cancelled"} and jobs[4].pieces[-1].finish == "cancelled"
    assert not any(t.name == "batcher" and t is batcher._thread for t in threading.enumerate())

# Text

def pieces_of(ids, stop, trim):
    text, out = Text(TOKENIZER, stop, trim), []
    for i in ids:
        out.append(text.add(i))
        if text.stopped: break
    return [*out, text.end()], text

def cut(text, stop): return text[:min([text.index(s) for s in stop if s in text], default=len(text))]

@fuzz
@given(st.lists(st.integers(0, 4095) | st.integers(60, 330), max_size=40), st.lists(st.text("ab. \n\ufffdé", min_size=1, max_size=3), max_size=2), st.booleans())
@example([177, 258, 104, 237, 177, 258], [], True)
@example([177, 258], [], True)
@example(TOKENIZER(" A fox.").input_ids, ["."], True)
@example(TOKENIZER(" A fox.").input_ids, ["x"], True)
@example(TOKENIZER("\nA fox.").input_ids, ["\n"], True)
def test_pieces_are_the_text(ids, stop, trim):
    pieces, text = pieces_of(ids, stop, trim)
    whole = cut(TOKENIZER.decode(text.ids, skip_special_tokens=True), stop)
    assert "".join(pieces) == text.shown == (whole.strip() if trim else whole)

@fuzz
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30) | st.text("🦊你好é a\n", max_size=20), st.sampled_from([(), ("END",), ("好a", "é ")]))
@example("你好 🦊🦊 世界", ())
@example("<|end|>A", ())
@example("a<|user|> é", ("é ",))
def test_each_character_comes_whole_and_at_once(said, stop):
    ids = TOKENIZER(said, add_special_tokens=False).input_ids
    pieces, text = pieces_of(ids, stop, False)
    assert "".join(pieces) == cut(TOKENIZER.decode(text.ids, skip_special_tokens=True), stop) and "\ufffd" not in "".join(pieces)
    for k, shown in enumerate(accumulate(pieces[:-1]), 1):
        now = TOKENIZER.decode(ids[:k], skip_special_tokens=True).rstrip("\ufffd")
        if cut(now, stop) != now: break # it has ended
        held = max((n for s in stop for n in range(len(s)) if now.endswith(s[:n])), default=0)
        assert shown == now[:len(now) - held]

def test_what_comes_before_a_stop_string_in_its_token_is_said():
    "Streamed and not"
    token = next(i for i in range(300, 6144) if len(TOKENIZER.decode([i]).strip()) > 6)
    for end in ("length", "stop"):
        word = TOKENIZER.decode([token]); job = Job(Asked([5], UNSTEERED, 1 if end == "length" else 9, stop=[word[-2:]] if end == "stop" else []), TOKENIZER)
        job.take(Token(token, None), {1}); job.tell()
        said = (word if end == "length" else cut(word, [word[-2:]])).strip()
        assert "".join(p.text for p in job.pieces) == job.text.shown == said and job.finish == end and said

def test_who_hears_of_an_end_finds_the_model_as_it_was(tiny):
    "The end of an answer is told when nothing of the batch is on the model any more, so that the listener may run it"
    seen, hooks = [], lambda: [(list(b._forward_hooks), list(b._forward_pre_hooks)) for b in block_modules(tiny.model, tiny.n)]
    before = hooks()
    def listen(jobs):
        if any(j.finish for j in jobs): seen.append(hooks() == before)
    batcher = endless(tiny.manners, max_rows=4, on_news=listen)
    try: batcher.answer([Asked(tiny.ids[:8], tiny.manner(1, safety=safe), max_tokens=n, temperature=0) for safe, n in ((False, 3), (True, 9), (False, 9))])
    finally: batcher.close()
    assert len(seen) >= 2 and all(seen), seen
