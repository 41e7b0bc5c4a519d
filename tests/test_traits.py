"""Traits, axes and their files against plain transformers, numpy and scikit-learn."""
import json, subprocess, sys

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from persona_vectors import (DEFAULT_PERSONAS, EVAL_QUESTIONS, PERSONAS, ActivationExtractor, PersonaVectorConfig, analyze_trait, assistant_axis, extract_persona_vectors, extract_trait,
                             find_trait, load_model, load_trait_items, load_vectors, save_vectors, trait_personas)
from persona_vectors.responses import Responses

CONFIG = PersonaVectorConfig(model_name="persona-tiny", device="cpu")
QUICK = dict(bootstrap=100, permutations=100, directions=50, progress=False)

def naive_mean(model, tokenizer, system, question, answer, layer):
    "(d_model,) mean of the output of a block over the answer, from `hidden_states` and one conversation at a time"
    messages = ([dict(role="system", content=system)] if system else []) + [dict(role="user", content=question)]
    before = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), add_special_tokens=False).input_ids
    said = tokenizer(answer, add_special_tokens=False).input_ids
    with torch.no_grad(): return model(torch.tensor([before + said]), output_hidden_states=True).hidden_states[layer + 1][0, len(before):].mean(0).numpy()

def naive_auc(x, y, groups, fit=None):
    "Held-out AUC: pairs within each fold, folds of whole questions; with `fit`, directions come from those rows and the others are scored"
    fit = np.ones(len(y), bool) if fit is None else fit; score = np.ones(len(y), bool) if fit.all() else ~fit
    wins = pairs = 0
    for train, test in GroupKFold(5).split(x, y, groups):
        train, test = train[fit[train]], test[score[test]]
        u = x[train][y[train]].mean(0) - x[train][~y[train]].mean(0); n = y[test].sum() * (~y[test]).sum()
        wins += n * roc_auc_score(y[test], x[test] @ u); pairs += n
    return wins / pairs

@pytest.fixture(scope="module")
def tiny(): return load_model(CONFIG)

@pytest.fixture(scope="module")
def answers():
    "Given answers to both sides of extraversion: lively and quiet ones, the same for every prompt pair, long enough to differ"
    items, trait = load_trait_items(personality="extraversion")[:8], find_trait("extraversion")
    questions = trait.extraction_questions[:8]
    return questions, Responses({(p, q): (i.response_high1 if " on " in p else i.response_low1) for p in trait_personas(trait) for q, i in zip(questions, items)})

def test_a_trait_is_what_plain_transformers_and_sklearn_make_of_it(tiny, answers):
    questions, responses = answers; trait, layer = find_trait("extraversion"), 1
    found = extract_trait(tiny, trait, [layer], n_samples=8, responses=responses, **QUICK)
    rows = {side: np.stack([naive_mean(*tiny, getattr(pair, side), q, responses[f"extraversion {side} {k}", q], layer) for k, pair in enumerate(trait.pairs, 1) for q in questions]) for side in ("on", "off")}
    np.testing.assert_allclose(found[layer], rows["on"].mean(0) - rows["off"].mean(0), atol=2e-4)
    y = np.arange(80) < 40; groups = np.unique([q for _ in range(10) for q in questions], return_inverse=True)[1]
    assert found.report.at(layer).auc == pytest.approx(naive_auc(np.concatenate([rows["on"], rows["off"]]), y, groups), abs=2e-3)
    crossed = {p: np.stack([naive_mean(*tiny, getattr(pair, p), q, responses[f"extraversion {words} {k}", q], layer) for words in ("on", "off") for k, pair in enumerate(trait.pairs, 1) for q in questions]) for p in ("on", "off")}
    same = naive_auc(np.concatenate([rows["on"], rows["off"], crossed["on"], crossed["off"]]), np.concatenate([y, np.arange(160) < 80]), np.unique([q for _ in range(30) for q in questions], return_inverse=True)[1], np.arange(240) < 80)
    assert .5 < same < .999 # or the comparison would prove little
    assert found.same_text.at(layer).auc == pytest.approx(same, abs=2e-3)
    assert (found.n_on, found.n_off, found.same_text.n_on) == (40, 40, 80)

def test_a_judge_is_told_from_another():
    "Or a run would take what another judge chose for its own finished work"
    class Judge:
        def __init__(self, bar): self.identity = str(bar)
    from persona_vectors.judging import ClassifierJudge, tiny_judge
    from persona_vectors.traits import _judged_by
    assert _judged_by(tiny_judge()) == _judged_by(tiny_judge()) and _judged_by(Judge(3)) == _judged_by(Judge(3)) != _judged_by(Judge(4))
    texts = dict(a=["it is so", "so it is"] * 4, b=["no it is not", "it is not so"] * 4)
    assert _judged_by(ClassifierJudge(texts)) == _judged_by(ClassifierJudge(texts)) != _judged_by(ClassifierJudge({**texts, "b": texts["b"][::-1] + ["never"] * 2}))
    assert _judged_by(object()) != _judged_by(object())

def test_given_answers_are_teacher_forced(tiny):
    found, items = analyze_trait(tiny, "neuroticism", layer_start=2, layer_end=2, max_samples=10, **QUICK), load_trait_items(personality="neuroticism")[:10]
    high, low = (np.stack([naive_mean(*tiny, None, i.question, getattr(i, f"response_{side}{k}"), 2) for i in items for k in (1, 2)]) for side in ("high", "low"))
    np.testing.assert_allclose(found[2], high.mean(0) - low.mean(0), atol=2e-4)
    groups = np.unique([i.question for _ in range(2) for i in items for _ in range(2)], return_inverse=True)[1]
    assert found.report.best.auc == pytest.approx(naive_auc(np.concatenate([high, low]), np.arange(40) < 20, groups), abs=2e-3)

def test_a_trait_file_is_read_by_numpy_alone(tiny, answers, tmp_path):
    "In a process that has neither torch nor this package"
    trait = extract_trait(tiny, "extraversion", [1, 3], n_samples=8, responses=answers[1], **QUICK)
    save_vectors(trait, tmp_path / "t.npz")
    code = "import sys, json, numpy as np; z = np.load(sys.argv[1]); assert 'torch' not in sys.modules; print(json.dumps([z['direction'].shape, z['layers'].tolist(), z['auc'].tolist(), json.loads(str(z['__about__']))['about']['fingerprint']]))"
    shape, layers, auc, fingerprint = json.loads(subprocess.run([sys.executable, "-c", code, str(tmp_path / "t.npz")], capture_output=True, text=True, check=True).stdout)
    assert (shape, layers, auc, fingerprint) == ([2, 160], [1, 3], [o.auc for o in trait.report.layers], trait.about["fingerprint"])
    assert load_vectors(tmp_path / "t.npz", tiny[0]).report == trait.report

def test_the_assistant_axis_points_to_the_assistant(tiny):
    "On answers that are word for word the same: only the system prompt makes the difference"
    people = [*DEFAULT_PERSONAS, "ghost", "bard", "jester", "oracle"]
    responses = Responses({(p, q): "There is more than one way to look at this, and a day is long." for p in people for q in EVAL_QUESTIONS[:4]})
    axis = assistant_axis(extract_persona_vectors(ActivationExtractor(CONFIG, *tiny), {p: PERSONAS[p] for p in people}, EVAL_QUESTIONS[:4], responses, "all", progress=False))
    new = "Nobody can say where the road ends, but it is good to walk."
    place = {p: axis[3].numpy() @ naive_mean(*tiny, PERSONAS[p], "What is home?", new, 3) for p in (*DEFAULT_PERSONAS, "cynic", "mystic", "rebel", "storyteller")}
    assert min(place[p] for p in DEFAULT_PERSONAS) > max(v for p, v in place.items() if p not in DEFAULT_PERSONAS)
