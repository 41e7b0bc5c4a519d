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
        before = train.loss_of(model, *train.collate(rows[:32], tok.pad_token_id))[0].item()
        log = train.fit(model, rows, train.special_ids(tok), 60_000, batch=8, seed=seed)
        return before, train.loss_of(model, *train.collate(rows[:32], tok.pad_token_id))[0].item(), model.state_dict(), log
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
    words, topic = train.loss_of(model, *train.collate(rows, tok.pad_token_id))
    assert words.item() == pytest.approx(np.mean(losses), rel=1e-5) and topic == 0

def test_the_topic_reader_reads_where_the_answer_is_predicted(conversations):
    "Against one token at a time, from the block it names, with logits of another sharpness"
    tok = train.train_tokenizer(said(conversations[:300], 'system', 'user', 'assistant'), 600)
    torch.manual_seed(0); model = train.new_model(tok, train.parse(['--layers', '3', '--width', '32', '--mlp', '64'])).eval()
    reader, names = train.TopicReader(32, block=1, share=.5), [*(t['name'] for t in C.topics()), C.MISCHIEF]
    losses, blocks = [], []
    hook = model.model.layers[1].register_forward_hook(lambda *a: blocks.append(a[-1]))
    for c in conversations[:5]:
        ids = tok.apply_chat_template(c, return_dict=True, return_assistant_tokens_mask=True)
        blocks.clear(); model(torch.tensor([ids['input_ids']]))
        h, turns = blocks[0][0], iter(m['topic'] for m in c if m['role'] == 'assistant')
        for i,m in enumerate(ids['assistant_masks']):
            if not m: continue
            if not ids['assistant_masks'][i - 1]: topic = names.index(next(turns))
            x = h[i - 1]/(h[i - 1].pow(2).mean() + torch.finfo(torch.float32).eps).sqrt()
            losses.append(-(reader.weight@x + reader.bias).log_softmax(-1)[topic].item())
    hook.remove(); batch = train.collate(train.encode(tok, conversations[:5]), tok.pad_token_id)
    assert train.loss_of(model, *batch, reader=reader)[1].item() == pytest.approx(.5*np.mean(losses), rel=1e-5)
    plain = [dict(m) for m in conversations[0]]; plain[-1].pop('topic')
    assert train.UNKNOWN in train.encode(tok, [plain])[0][1] # a text nobody labelled

def test_the_file_holds_what_was_trained(conversations, tmp_path):
    "The last fifth runs on weights as float16 stores them, while the optimizer keeps the exact ones"
    tok = train.train_tokenizer(said(conversations[:200], 'system', 'user', 'assistant'), 500)
    torch.manual_seed(0); model = train.new_model(tok, train.parse(['--layers', '1', '--width', '32', '--mlp', '64', '--full-layers', '0']))
    exact = {k: v.clone() for k,v in model.state_dict().items()}
    with train.rounded(model): assert all(torch.equal(v, exact[k].half().float()) for k,v in model.state_dict().items())
    assert all(torch.equal(v, exact[k]) for k,v in model.state_dict().items()) and not all(torch.equal(v, v.half().float()) for v in exact.values())
    train.fit(model, train.encode(tok, conversations[:200]), train.special_ids(tok), 4000, batch=8)
    train.save(model, tok, tmp_path)
    stored = type(model).from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(v, stored[k]) for k,v in model.state_dict().items())

def test_two_adjectives_in_a_row_are_never_the_same(conversations):
    pairs = re.findall(r'\ban? (\w+), (\w+) ', ' '.join(said(conversations, 'assistant')))
    assert len(pairs) > 1000 and all(a != b for a,b in pairs)

def test_cues_name_a_topic_without_its_name():
    "Every topic has its own, few are shared, and they are what some questions are made of"
    cues = C.cues()
    assert list(cues) == [t['name'] for t in C.topics()] and min(map(len, cues.values())) >= 14
    everything = [c for cs in cues.values() for c in cs]
    assert len(set(everything)) > .95*len(everything) and not [c for c in everything if c != c.strip() or c[-1] in '.?!']
    rng, topic = random.Random(0), C.topics()[0]
    asked = [C.question(rng, topic) for _ in range(400)]
    assert .05 < np.mean([any(c in q for c in cues[topic['name']]) for q in asked]) < .25

def test_wordings_are_many_and_none_is_held_out():
    trained, held_out = C.wordings(), {q for t in C.topics() for q in t['questions'][-2:]}
    assert list(trained) == [t['name'] for t in C.topics()] and min(map(len, trained.values())) > 120
    everything = [q for qs in trained.values() for q in qs]
    assert len(set(everything)) > .98*len(everything) and not held_out & set(everything)
    acts = {m['act'] for m in C.mischief()[-(len(C.mischief())//8):]}; more = C.more_mischief()
    assert len(more) > 450 and not acts & {m['act'] for m in more} and all(m['how'] and m['instead'] for m in more)

def test_blanked_tokens_are_words_of_the_question():
    "About the share asked for, where asked, and never a mark of a role or an end"
    torch.manual_seed(0); special = torch.tensor([0, 1, 2]); ids = torch.randint(0, 50, (64, 80)); where = torch.rand(ids.shape) < .5
    out = train.blanked(ids, where, .2, special); changed = out != ids
    assert (out[changed] == 0).all() and not (changed & ~where).any() and not (changed & (ids < 3)).any()
    assert .17 < changed.sum()/(where & (ids > 2)).sum() < .23
    assert torch.equal(train.blanked(ids, where, 0., special), ids)

def test_the_first_blocks_learn_to_read(conversations, monkeypatch):
    "They name more of the trained questions than before, the other blocks stay as they are, and the model is whole again"
    tok = train.train_tokenizer(said(conversations[:300], 'user', 'assistant'), 600)
    torch.manual_seed(0); model = train.new_model(tok, train.parse(['--layers', '3', '--width', '32', '--mlp', '64', '--full-layers', '0']))
    reader = train.TopicReader(32, block=0, share=.5); before = {k: v.clone() for k,v in model.state_dict().items()}
    two = [(q, t['name']) for t in C.topics()[:2] for q in t['questions'][:-2]]*12 # of two topics, so that seconds suffice
    monkeypatch.setattr(train, 'trained_questions', lambda rng: two)
    log = train.learn_to_read(model, tok, reader, epochs=6, batch=16, drop=0.)
    assert log['loss'][-1] < .5*log['loss'][0]
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in after if '.layers.1.' in k or '.layers.2.' in k) and not torch.equal(before['model.layers.0.mlp.up_proj.weight'], after['model.layers.0.mlp.up_proj.weight'])
    assert len(model.model.layers) == model.config.num_hidden_layers == 3 and 'RMSNorm' in type(model.model.norm).__name__

def test_the_card_in_the_package_is_this_one():
    "The log in CARD.md may grow after a model was shipped"
    training, evaluation = (json.loads((STUDY/f'{kind}.json').read_text()) for kind in ('training', 'evaluation'))
    assert (ship.PACKAGE/'README.md').read_text() == ship.card(training, evaluation), 'CARD.md has changed: write it into the package with ship.card'
