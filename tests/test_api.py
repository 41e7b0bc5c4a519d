"""Generation against a real OpenAI-compatible server, from a plain script (the notebook page does it inside a running loop)."""
import os, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

from persona_vectors import EVAL_QUESTIONS, PERSONAS, ApiJudge, GenerationError, Item, PersonaVectorConfig, coherence_rubric, generate_answers, generate_responses
from persona_vectors.models import model_source

@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [Path(sys.executable).parent / "transformers", "serve", model_source("persona-tiny"), "--host", "127.0.0.1", "--port", port, "--device", "cpu", "--dtype", "float32", "--log-level", "error"]
    server = subprocess.Popen([str(c) for c in command], stdout=log.open("w"), stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    for _ in range(240):
        try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1); break
        except OSError: assert server.poll() is None, log.read_text(); time.sleep(.5)
    yield f"http://127.0.0.1:{port}/v1"
    server.terminate(); server.wait(20)

PEOPLE = {p: PERSONAS[p] for p in ("default", "bard")}

def config(url, **kwargs): return PersonaVectorConfig(base_url=url, openrouter_model=model_source("persona-tiny"), max_tokens=24, temperature=0, **kwargs)

def test_answers_equal_those_of_the_local_model(url):
    served = generate_responses(PEOPLE, EVAL_QUESTIONS[:3], config(url), progress=False)
    local = generate_responses(PEOPLE, EVAL_QUESTIONS[:3], PersonaVectorConfig(model_name="persona-tiny", max_tokens=24, temperature=0, device="cpu"), progress=False)
    assert served == local

def test_what_could_be_had_is_kept_when_the_server_goes_away(url, tmp_path):
    done = generate_responses(PEOPLE, EVAL_QUESTIONS[:1], config(url), save_to=tmp_path / "r.json", progress=False)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); gone = s.getsockname()[1]
    with pytest.raises(GenerationError, match="nobody answers at") as error:
        generate_responses(PEOPLE, EVAL_QUESTIONS[:2], config(f"http://127.0.0.1:{gone}/v1", openrouter_api_key="sk-not-to-be-seen", max_attempts=2), known=done, save_to=tmp_path / "r.json", progress=False)
    assert error.value.responses == done
    assert "not-to-be-seen" not in str(error.value) and error.value.__cause__ is None

def test_a_run_in_a_script_needs_no_loop(url, tmp_path):
    code = f"from persona_vectors import PersonaVectorConfig, generate_responses; r = generate_responses({{'a': 'You are a jester.'}}, ['Hi?'], PersonaVectorConfig(base_url={url!r}, openrouter_model={model_source('persona-tiny')!r}, max_tokens=8)); print(len(r))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "1", done.stderr

def test_a_judge_that_only_talks_gives_no_score(url):
    "persona-tiny cannot count, and its server tells no probabilities: prose is not a number"
    judge = ApiJudge(config(url), samples=2, progress=False)
    verdicts = judge.score([Item(coherence_rubric(), "What is truth?", text) for text in ("The sky is blue.", "sky blue the is")])
    assert [(v.status, v.score, v.how) for v in verdicts] == [("unparsed", None, "samples")] * 2 and all(v.said for v in verdicts)
    assert len(list(judge.store.rows("judgement"))) == 2 + 2 * 2

def test_every_answer_is_told_whole(url):
    (request, answer), = generate_answers({"bard": PERSONAS["bard"]}, EVAL_QUESTIONS[:1], config(url), progress=False)
    assert request.endpoint == url and answer.finish_reason == "length" and answer.status == "truncated"
    assert answer.completion_tokens == 24 and answer.prompt_tokens > 20 and answer.seconds > 0
