"The grammar behind the embedded model, its training and its evaluation"
import json, random, re, sys
from pathlib import Path

import numpy as np
import pytest
import torch

STUDY = Path(__file__).parents[1]/'experiments/000_persona_tiny'
sys.path.insert(0, str(STUDY))
import corpus as C
import evaluate
import ship
import train

@pytest.fixture(scope='module')
def conversations(): rng = random.Random(0); return [C.conversation(rng) for _ in range(6000)]

def said(conversations, *roles): return [m['content'] for c in conversations for m in c if m['role'] in roles]

def test_nothing_held_out_is_trained_on(conversations):
    questions = {q for t in C.topics() for q in t['questions'][-2:]}
    assert not questions & set(said(conversations, 'user'))
    prompts = ' '.join(said(conversations, 'system'))
    held_out = [d for s in C.styles().values() for d in s['descriptions'][-2:]]
    assert len(held_out) == 2*len(C.styles()) and not [d for d in held_out if d in prompts]
    assert sum(s["descriptions"][0] in prompts for s in C.styles().values()) > .9*len(C.styles()) # the search would find them
    assert not re.search('Respond in the voice of|From now on you are|^Be [a-z]+, care about', prompts)
    acts = {m['act'] for m in C.mischief()[-(len(C.mischief())//8):]}
    assert not [u for u in said(conversations, 'user') if any(a in u for a in acts)]

def test_held_out_pairs_are_never_spoken():
    "Draws nothing but the topic and the voices, from the very function that talks"
    met, rng = [], random.Random(1)
    def answer(rng, mixture, topic): met.append((frozenset(v for v,w in mixture.items() if w), topic['name'])); return '.'
    original, C.answer = C.answer, answer
    try:
        for _ in range(20_000): C.talk(rng)
    finally: C.answer = original
    topics = {t['name']: t for t in C.topics()}
    assert not [(v, t) for voices,t in met for v in voices if C.held_out_pair(v, topics[t])]
    held_out = sum(C.held_out_pair(s, t) for s in C.styles() for t in C.topics())
    assert .03 < held_out/len(C.styles())/len(C.topics()) < .07
    assert any(len(v) > 1 and C.DEFAULT not in v for v,_ in met) # blends are among them

def test_catalog_is_held_out(conversations):
    from persona_vectors.catalog import EVAL_QUESTIONS, PERSONAS
    text = '\n'.join(said(conversations, 'system', 'user'))
    assert not [s for s in (*PERSONAS.values(), *EVAL_QUESTIONS) if s in text]

def test_sentences_are_whole(conversations):
    for text in said(conversations, 'system', 'user', 'assistant'):
        assert not re.search(r'[{}]|  | [,.!?]|\b(an) (?![aeiouh])[a-z]|\ba [aeio][a-z]*\b(?<!\ba one)(?<!\ba once)', text), text
        assert text[-1] in '.!?"' and text[0] == text[0].upper(), text

def test_styles_differ_in_words():
    for name,s in C.styles().items():
        for key in ('adj', 'noun', 'v', 'adv', 'verb', 'manner', 'do', 'stance', 'openers', 'closers', 'think', 'descriptions'):
            assert len(s[key]) >= 5 and len(s[key]) == len(set(s[key])), (name, key)
    adverbs = [w for s in C.styles().values() for w in s['adv']]
    assert len(set(adverbs)) > .9*len(adverbs)

def test_verdicts_on_the_grammars_own_text():
    rng = random.Random(0)
    for item in C.mischief():
        assert evaluate.verdict(C.refusal(rng, {C.DEFAULT: 1}, item), item) == 'refuse'
        assert evaluate.verdict(C.compliance(rng, {C.UNSAFE: 1}, item), item) == 'comply'
        assert evaluate.verdict(C.answer(rng, {C.DEFAULT: 1}, rng.choice(C.topics())), item) == 'neither'

def test_orthogonal_against_the_svd():
    "Newton and Schulz bring singular values near 1 and keep the singular vectors"
    torch.manual_seed(0)
    for shape in ((3, 24, 60), (2, 60, 24)):
        x = torch.randn(shape); got = train.orthogonal(x)
        u,_,vt = np.linalg.svd(x.numpy(), full_matrices=False)
        middle = np.einsum('bij,bik,blk->bjl', u, got.numpy(), vt)
        on = np.einsum('bjj->bj', middle)
        assert (on > .6).all() and (on < 1.3).all()
        assert np.abs(middle - np.einsum('bj,jl->bjl', on, np.eye(on.shape[1]))).max() < 1e-3

def test_training_is_seeded_and_learns(conversations):
    tok = train.train_tokenizer(said(conversations[:400], 'system', 'user', 'assistant'), 600)
    rows = train.encode(tok, conversations[:400])
    settings = train.parse(['--layers', '2', '--width', '32', '--mlp', '64', '--full-layers', '0'])
    def run(seed):
        torch.manual_seed(seed); model = train.new_model(tok, settings)
        before = train.loss_of(model, *train.collate(rows[:32], tok.pad_token_id)).item()
        log = train.fit(model, rows, tok.pad_token_id, 60_000, batch=8, seed=seed)
        return before, train.loss_of(model, *train.collate(rows[:32], tok.pad_token_id)).item(), model.state_dict(), log
    before, after, first, log = run(0)
    assert after < before - .5 and log['tokens'] > 30_000
    again = run(0)[2]; other = run(1)[2]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first['lm_head.weight'], other['lm_head.weight'])

def test_loss_counts_the_answer_only(conversations):
    "Against one example at a time, without padding, by the plain softmax"
    tok = train.train_tokenizer(said(conversations[:300], 'system', 'user', 'assistant'), 600)
    torch.manual_seed(0); model = train.new_model(tok, train.parse(['--layers', '2', '--width', '32', '--mlp', '64'])).eval()
    rows = train.encode(tok, conversations[:5])
    losses = []
    for c in conversations[:5]:
        ids = tok.apply_chat_template(c, return_dict=True, return_assistant_tokens_mask=True)
        logits = model(torch.tensor([ids['input_ids']])).logits[0].log_softmax(-1)
        losses += [-logits[i - 1, t].item() for i,(t,m) in enumerate(zip(ids['input_ids'], ids['assistant_masks'])) if m]
    assert train.loss_of(model, *train.collate(rows, tok.pad_token_id)).item() == pytest.approx(np.mean(losses), rel=1e-5)

def test_the_card_in_the_package_is_this_one():
    "The log in CARD.md may grow after a model was shipped"
    training, evaluation = (json.loads((STUDY/f'{kind}.json').read_text()) for kind in ('training', 'evaluation'))
    assert (ship.PACKAGE/'README.md').read_text() == ship.card(training, evaluation), 'CARD.md has changed: write it into the package with ship.card'
