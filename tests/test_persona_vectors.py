"""The first pipeline against vectors a separate, naive script computed (tests/naive_reference.py)."""
import re
from pathlib import Path

import pytest
import torch

from persona_vectors import (ActivationExtractor, EVAL_QUESTIONS, PERSONAS, PersonaVectorConfig, direction_report, extract_persona_vectors,
                             generate_responses, load_persona_vectors, load_responses, save_persona_vectors, save_responses)

FIXTURES = Path(__file__).resolve().parent.parent / "data/test_fixtures"

@pytest.fixture(scope="module")
def expected():
    "(vectors of the naive script, the layer they were read at)"
    path, = FIXTURES.glob("persona_vectors_layer*.pt")
    return torch.load(path, weights_only=True), int(re.search(r"layer(\d+)", path.name)[1])

@pytest.fixture(scope="module")
def responses(): return load_responses(FIXTURES / "responses_cache.json")

@pytest.fixture(scope="module")
def extractor(): return ActivationExtractor(PersonaVectorConfig(model_name="persona-tiny", device="cpu"))

@pytest.fixture(scope="module")
def vectors(extractor, responses, expected):
    return extract_persona_vectors(extractor=extractor, personas=PERSONAS, questions=EVAL_QUESTIONS, responses=responses, layer=expected[1])

def test_fixtures_are_complete(responses, expected):
    assert len(PERSONAS) == 23 and len(EVAL_QUESTIONS) == 18
    assert set(responses) == {(p, q) for p in PERSONAS for q in EVAL_QUESTIONS}
    assert set(expected[0]) == set(PERSONAS)
    assert len(set(responses.values())) > 400  # 414 answers, hardly any said twice

def test_every_vector_agrees_with_the_naive_script(vectors, expected, record_property):
    cosines = {p: torch.cosine_similarity(vectors[p], expected[0][p], dim=0).item() for p in PERSONAS}
    name = min(cosines, key=cosines.get)
    record_property("smallest cosine", f"{name}: {cosines[name]:.7f}"); print(f"smallest cosine: {name} {cosines[name]:.7f}")
    assert cosines[name] > 0.99

def test_centred_vectors_agree_too(vectors, expected):
    "Raw cosines of persona means are all near 1; without the common mean nothing is given away"
    ours, theirs = (torch.stack([v[p] for p in PERSONAS]) for v in (vectors, expected[0]))
    cosines = torch.cosine_similarity(ours - ours.mean(0), theirs - theirs.mean(0), dim=-1)
    print(f"smallest centred cosine: {cosines.min().item():.7f}")
    assert cosines.min() > 0.99
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

def test_an_off_by_one_layer_or_span_would_be_seen(extractor, responses, expected):
    "The comparison has teeth: the neighbouring layer, and the same responses shifted between personas, do not pass"
    shifted = dict(zip(PERSONAS, [*list(PERSONAS)[1:], next(iter(PERSONAS))]))
    wrong_responses = {(p, q): responses[shifted[p], q] for p, q in responses}
    for kwargs in (dict(responses=responses, layer=expected[1] - 1), dict(responses=wrong_responses, layer=expected[1])):
        wrong = extract_persona_vectors(extractor, PERSONAS, EVAL_QUESTIONS, progress=False, **kwargs)
        ours, theirs = (torch.stack([v[p] for p in PERSONAS]) for v in (wrong, expected[0]))
        assert torch.cosine_similarity(ours - ours.mean(0), theirs - theirs.mean(0), dim=-1).min() < 0.99

def test_the_interface_word_for_word(tmp_path):
    config = PersonaVectorConfig()
    assert (config.model_name, config.openrouter_model, config.layer_fraction, config.max_tokens) == ("google/gemma-3-27b-it", None, 0.65, 256)
    assert (config.temperature, config.max_concurrent_requests) == (0.7, 10)
    config = PersonaVectorConfig(model_name="persona-tiny", max_tokens=128, device="cpu")
    personas, questions = {p: PERSONAS[p] for p in ("default", "jester")}, EVAL_QUESTIONS[:2]
    responses = generate_responses(personas=personas, questions=questions, config=config)
    assert set(responses) == {(p, q) for p in personas for q in questions}
    save_responses(responses, tmp_path / "r.json"); assert load_responses(tmp_path / "r.json") == responses
    extractor = ActivationExtractor(config)
    acts = extractor.extract_activations(system_prompts=list(personas.values()), questions=questions, responses=[responses["default", q] for q in questions], layer=4)
    assert acts.shape == (2, 160) and acts.dtype == torch.float32
    vectors = extract_persona_vectors(extractor=extractor, personas=personas, questions=questions, responses=responses, layer=4)
    assert {k: v.shape for k, v in vectors.items()} == {"default": (160,), "jester": (160,)}
    for suffix in ("pt", "npz", "safetensors"):
        save_persona_vectors(vectors, tmp_path / f"v.{suffix}")
        assert all(torch.equal(v, vectors[k]) for k, v in load_persona_vectors(tmp_path / f"v.{suffix}").items())

def test_a_persona_is_told_from_others_and_not_by_its_words_alone(extractor, responses):
    "The report finds a real persona; with word for word the same answers it finds it where the system prompt has been read, and not before"
    others = ["default", "analyst", "trader", "cynic", "bard", "oracle"]
    def read(people, said): return extractor.extract_activations([PERSONAS[p] for p in people for _ in EVAL_QUESTIONS], list(EVAL_QUESTIONS) * len(people), [said(p, q) for p in people for q in EVAL_QUESTIONS], layer="all", progress=False)
    def report(said): return direction_report(read(["ghost"], said), read(others, said), EVAL_QUESTIONS, list(EVAL_QUESTIONS) * len(others), bootstrap=300, permutations=200)
    own, same = report(lambda p, q: responses[p, q]), report(lambda p, q: responses["default", q])
    assert own.best.interval[0] > .95 and own.best.auc > own.best.noise and own.best.p < .01
    assert same.layers[0].auc < .7 < .95 < same.layers[3].auc and same.layers[3].p < .01
