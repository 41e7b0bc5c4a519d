"""The commands over data in real processes: the embedded model, a real HTTP server, files that are read back, Ctrl-C in the middle."""
import csv, json, os, signal, sqlite3, subprocess, sys, time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from commands import COMMAND
from test_generation import serving, stats
from persona_vectors import EVAL_QUESTIONS, PERSONAS, ApiJudge, Item, PersonaVectorConfig, ResponseStore, coherence_rubric, import_capping_config, load_capping, load_vectors, role_rubric, tiny_judge
from persona_vectors.data_commands import app

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("data_commands")

def started(folder, *args, **env):
    clean = {k: v for k, v in os.environ.items() if k not in ("OPENROUTER_API_KEY", "COLUMNS")}
    return subprocess.Popen([str(COMMAND), *map(str, args)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**clean, "COLUMNS": "100", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "PERSONA_STEER_DATA_DIR": str(folder / "data"), **env},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # hears Ctrl-C also where the tests run in the background

def run(folder, *args, code=0, **env):
    "(standard output, standard error) of a command that ends with this exit code"
    process = started(folder, *args, **env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (args, process.returncode, out, err)
    assert "Traceback" not in err and "\x1b" not in out
    return out, err

def query(path, sql):
    with closing(sqlite3.connect(path)) as db: return db.execute(sql).fetchall()

@pytest.fixture(scope="module")
def local(folder):
    "Six answers of the embedded model"
    out, err = run(folder, "responses", "generate", "--store", "local.sqlite", "--personas", "ghost", "bard", "--questions", 3, "--max-tokens", 32, "--seed", 2, "--json")
    assert "responses:" in err and json.loads(out)["total"]["answered"] == 6
    return folder / "local.sqlite"

@pytest.fixture(scope="module")
def library(folder):
    "A library with a ghost in it, and a calibration; here and not in a process of its own, because the page runs that one"
    line = ["calibrate", "strength", "ghost", "--layers", "2", "4", "--doses", "0", ".3", ".6", "--questions", "8", "--max-tokens", "24", "--no-png", "--json"]
    done = CliRunner().invoke(app, line, env={"PERSONA_STEER_DATA_DIR": str(folder / "data"), "PERSONA_STEER_EXTRACTION__QUESTIONS": "8", "PERSONA_STEER_EXTRACTION__MAX_TOKENS": "32"})
    return json.loads(done.stdout)

def test_the_line_says_how_answers_are_sampled(local):
    with ResponseStore(local) as store: asked = [r for r, _ in store.answered()]
    assert {(r.persona, r.question) for r in asked} == {(p, q) for p in ("ghost", "bard") for q in EVAL_QUESTIONS[:3]} and {r.prompt for r in asked} == {PERSONAS["ghost"], PERSONAS["bard"]}
    assert {(r.parameters["max_tokens"], r.parameters["seed"], r.model) for r in asked} == {(32, 2, "persona-tiny")}

def test_ctrl_c_keeps_what_is_finished_and_resume_asks_only_for_the_rest(folder):
    store = folder / "stopped.sqlite"
    with serving("--rate", 0, "--delay", .2) as url:
        process = started(folder, "responses", "generate", "--store", store, "--personas", "ghost", "jester", "--questions", 8, "--model", "test/model", "--url", url, "--concurrency", 2)
        while not (store.is_file() and query(store, "SELECT count(*) FROM sqlite_master")[0][0] and query(store, "SELECT count(*) FROM answers")[0][0] >= 3): assert process.poll() is None, process.communicate(); time.sleep(.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130 and "go on with: persona-steer responses resume" in err and "Traceback" not in err, err
        first = query(store, "SELECT key, text FROM answers ORDER BY rowid")
        assert 3 <= len(first) < 16
        told = json.loads(run(folder, "responses", "status", store, "--json")[0])
        assert told["total"]["answered"] == len(first) and told["total"]["missing"] == 16 - len(first) and told["total"]["failed"] == 0
        before = stats(url)["requests"]
        out, _ = run(folder, "responses", "resume", store, "--json")
        assert stats(url)["requests"] - before == 16 - len(first)
    assert json.loads(out)["total"] == {**json.loads(out)["total"], "requests": 16, "answered": 16, "missing": 0, "failed": 0}
    assert query(store, "SELECT key, text FROM answers ORDER BY rowid")[:len(first)] == first and query(store, "SELECT count(DISTINCT question || persona) FROM answers")[0][0] == 16

def test_some_that_fail_are_exit_code_3_and_status_counts_what_is_in_the_file(folder):
    store = folder / "partly.sqlite"
    with serving("--rate", .5, "--seed", 3, "--faults", "500", "null", "length") as url:
        out, err = run(folder, "responses", "generate", "--store", store, "--personas", "ghost", "jester", "bard", "--questions", 6, "--model", "test/model", "--url", url, "--attempts", 1, code=3)
        failed = stats(url)["faults"]["500"]
        assert failed and f"{failed} of 18 requests to 'test/model' failed" in err and f"{failed} failed: HTTP 500: out of order" in err and "persona-steer responses resume" in err
        told = json.loads(run(folder, "responses", "status", store, "--json")[0])
        by_hand = Counter({(p, s): n for p, s, n in query(store, "SELECT persona, status, count(*) FROM answers GROUP BY 1, 2 UNION ALL SELECT persona, 'failed', count(*) FROM failures GROUP BY 1")})
        assert {r["persona"] for r in told["personas"]} == {"ghost", "jester", "bard"} and {s for _, s in by_hand} == {"ok", "empty", "truncated", "failed"}
        for r in told["personas"]: assert {k: n for k, n in r.items() if n and k not in ("persona", "requests", "answered")} == {s: n for (p, s), n in by_hand.items() if p == r["persona"]} and r["requests"] == 6
        assert told["total"]["failed"] == failed == len(told["failures"]) and told["total"]["answered"] == 18 - failed
        rows = [line.split() for line in run(folder, "responses", "status", store)[0].splitlines()]
        assert rows[0] == ["persona", "requests", "answered", "ok", "truncated", "refused", "empty", "failed", "missing"] and rows[-1] == ["all", "18", str(18 - failed), *(str(told["total"][k]) for k in rows[0][3:])] and len(rows) == 5
    assert json.loads(run(folder, "responses", "resume", store, "--forget", "--json")[0])["total"]["requests"] == 18 - failed

def test_a_wrong_key_ends_the_run_and_is_not_shown(folder):
    with serving("--rate", 0) as url:
        done = CliRunner().invoke(app, ["responses", "generate", "--store", str(folder / "key.sqlite"), "--personas", "ghost", "--model", "test/model", "--url", url, "--key-from", "MY_KEY"], env={"MY_KEY": "wrong-key"})
    assert done.exit_code == 1 and done.stdout == "" and "the key is not accepted" in str(done.exception) and "wrong-key" not in str(done.exception) + done.stderr
    assert query(folder / "key.sqlite", "SELECT * FROM failures") == []  # nobody wants to go on with that

def test_a_judge_of_the_api_is_asked_once(folder, local):
    with serving("--rate", 0) as url:
        judge = ["judge", local, "--rubric", "coherence", "--judge", "api", "--judge-model", "judge", "--url", url, "--json"]
        told = json.loads(CliRunner().invoke(app, list(map(str, judge))).stdout)
        assert (told["judge"], told["failed"]) == ("api", 0) and stats(url)["requests"] == 6
        with ResponseStore(local) as store: answered = store.answered()
        verdicts = ApiJudge(PersonaVectorConfig(model_name="persona-tiny", openrouter_model="judge", base_url=url), progress=False).score([Item(coherence_rubric(), r.question, a.text) for r, a in answered])
        assert query(local, "SELECT count(*) FROM answers WHERE kind = 'judgement'") == [(6,)]  # kept beside the answers, so nothing is paid for twice
        for row in told["scores"]: assert row["mean"] == pytest.approx(sum(v.score for v, (r, _) in zip(verdicts, answered) if r.persona == row["persona"]) / 3) and row["n"] == row["scored"] == 3

def test_the_table_of_a_judge_is_that_of_judging_by_hand(folder, local):
    out, err = run(folder, "judge", local, "--rubric", "role:ghost", "coherence", "--min-score", 2.5, "--out", "scores.csv")
    rows = {(c[0], c[1]): c for c in (line.split() for line in out.splitlines()[1:])}
    with ResponseStore(local) as store: answered = store.answered()
    for name, rubric in (("role:ghost", role_rubric("ghost", PERSONAS["ghost"])), ("coherence", coherence_rubric())):
        for persona in ("ghost", "bard"):
            scores = [v.score for v in tiny_judge().score([Item(rubric, r.question, a.text) for r, a in answered if r.persona == persona])]
            assert rows[persona, name][2:5] == ["3", "3", f"{sum(scores) / 3:.3g}"] and rows[persona, name][6] == f"{sum(s >= 2.5 for s in scores) / 3:.3g}"
    with (folder / "scores.csv").open(newline="") as f: written = list(csv.DictReader(f))
    assert [(w["persona"], w["question"], w["answer"]) for w in written[:6]] == [(r.persona, r.question, a.text) for r, a in answered] and len(written) == 12

def test_answers_come_back_from_every_format(folder, local):
    with ResponseStore(local) as store: rows = list(store.rows())
    for suffix in ("jsonl", "csv", "json", "parquet"): assert run(folder, "responses", "export", local, f"out.{suffix}") == (f"6 answers: out.{suffix}\n", "")
    assert [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()] == rows
    with (folder / "out.csv").open(newline="") as f: assert [(o["key"], o["text"], json.loads(o["parameters"])) for o in csv.DictReader(f)] == [(r["key"], r["text"], r["parameters"]) for r in rows]
    assert [(o["persona"], o["question"], o["response"]) for o in json.loads((folder / "out.json").read_text())] == [(r["persona"], r["question"], r["text"]) for r in rows]
    import pandas as pd
    assert pd.read_parquet(folder / "out.parquet").key.tolist() == [r["key"] for r in rows]
    assert run(folder, "responses", "import", "again.sqlite", "out.jsonl")[0] == "6 new answers, 6 in all: again.sqlite\n"
    with ResponseStore(folder / "again.sqlite") as store: assert list(store.rows()) == rows
    assert run(folder, "responses", "export", local, "some.jsonl", "--persona", "bard")[0] == "3 answers: some.jsonl\n"

def test_a_calibration_says_what_to_set_and_writes_what_it_says(folder, library):
    best = library["chosen"]
    assert library["config"] == [f"persona-steer config set extraction.target_layers '[{best['layer']}]'", f"persona-steer config set steering.default_strength {best['dose']:g}"]
    assert [(d["layer"], d["dose"]) for d in library["doses"]] == [(l, d) for l in (2, 4) for d in (0, .3, .6)] and best["trait"][0] > 25 > library["baseline"]["trait"][0]
    chosen, = (d for d in library["doses"] if (d["layer"], d["dose"]) == (best["layer"], best["dose"]))
    assert chosen["usable"] and chosen["trait"] == best["trait"][0]
    files = [Path(f) for f in library["files"]]
    assert {f.name for f in files} == {"strength_ghost.html", "strength_ghost.json"} and all(f.stat().st_size > 1000 for f in files)
    assert json.loads((folder / "data/calibration/strength_ghost.json").read_text())["doses"] == library["doses"]

def test_exported_vectors_are_those_of_the_library(folder, library):
    there = load_vectors(folder / "data/vectors/personas/ghost.safetensors")
    assert run(folder, "export", "ghost", "--format", "npz")[0] == "ghost.npz\n"
    done = CliRunner().invoke(app, ["export", "ghost", "--raw", "--out", str(folder / "raw.pt"), "--json"], env={"PERSONA_STEER_DATA_DIR": str(folder / "data")})
    assert json.loads(done.stdout) == dict(file=str(folder / "raw.pt"), format="pt")
    for name, row in (("ghost.npz", "vector"), ("raw.pt", "raw")):
        found = load_vectors(folder / name)
        assert found.values.equal(there[row]) and found.layers == there.layers and found.about["fingerprint"] == there.about["fingerprint"]

def test_a_control_vector_is_what_the_engine_adds(folder, library):
    from persona_vectors import import_vectors
    rows, norms = load_vectors(folder / "data/vectors/personas/ghost.safetensors"), load_vectors(folder / "data/vectors/assistant_baseline.safetensors").about["norms"]
    out, err = run(folder, "export", "ghost", "--gguf")
    assert out == "ghost.gguf\n" and "llama-server -m MODEL.gguf --control-vector ghost.gguf" in err and "added at layer 4; without the floor" in err
    found = import_vectors(folder / "ghost.gguf")
    assert found.layers == (4,) and found.name == "ghost" and found.about["fingerprint"] == rows.about["fingerprint"]
    assert found[4].allclose(.6 * norms[4] * rows["vector"][4] / rows["vector"][4].norm(), atol=1e-5)
    env = {"PERSONA_STEER_DATA_DIR": str(folder / "data")}
    done = CliRunner().invoke(app, ["export", "ghost", "--raw", "--format", "gguf", "--layers", "2", "6", "--strength", "-0.4", "--out", str(folder / "two.gguf"), "--json"], env=env)
    assert json.loads(done.stdout) == dict(file=str(folder / "two.gguf"), format="gguf")
    two = import_vectors(folder / "two.gguf")
    assert two.layers == (2, 6) and all(two[l].allclose(-.4 * norms[l] * rows["raw"][l] / rows["raw"][l].norm(), atol=1e-5) for l in (2, 6))
    assert "Qwen3ForCausalLM has no bias" in str(CliRunner().invoke(app, ["export", "ghost", "--format", "baked", "--out", str(folder / "never")], env=env).exception) and not (folder / "never").exists()

def test_a_baked_model_is_the_steered_one(tmp_path):
    "A small random Llama with the embedded tokenizer: persona-tiny itself has no place for it"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from persona_vectors import Add, Vector, save_vectors, steer
    from persona_vectors.models import model_source
    torch.manual_seed(0); tokenizer = AutoTokenizer.from_pretrained(model_source("persona-tiny"))
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path / "llama"); tokenizer.save_pretrained(tmp_path / "llama")
    v = Vector(torch.randn(4, 32), name="v"); save_vectors(v, tmp_path / "v.safetensors")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "v.safetensors"), "--format", "baked", "--layers", "0", "2", "--strength", "1.5", "--out", str(tmp_path / "baked"), "--model", str(tmp_path / "llama")], env={"PERSONA_STEER_DATA_DIR": str(tmp_path / "data")})
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'baked'}\n" and "what is baked is off by up to" in done.stderr, (done.exception, done.output)
    plain, baked = (AutoModelForCausalLM.from_pretrained(tmp_path / k) for k in ("llama", "baked")); ids = torch.randint(4000, (1, 12))
    with torch.no_grad(), steer(plain, Add(v, 1.5, [0, 2])): wanted = plain(ids).logits
    with torch.no_grad(): torch.testing.assert_close(baked(ids).logits, wanted, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "baked").chat_template == tokenizer.chat_template

def test_a_floor_is_found_saved_and_exported(folder):
    out, _ = run(folder, "calibrate", "capping", "--windows", "2-4", "--percentiles", 25, "--requests", 4, "--max-tokens", 12, "--no-png", "--out", "floors")
    cap = load_capping(folder / "floors/capping.safetensors")
    assert cap.layers == (2, 3, 4) and "persona-steer config set steering.capping_layers '[2, 3, 4]'" in out and "persona-steer config set steering.safety_floor_percentile 25" in out
    found = json.loads((folder / "floors/capping.json").read_text())
    assert [(s["read"], s["window"], s["percentile"]) for s in found["settings"]] == [("none", None, None), ("last_prompt", "2-4", 25), ("response", "2-4", 25)]
    assert CliRunner().invoke(app, ["export", str(folder / "floors/capping.safetensors"), "--format", "capping", "--out", str(folder / "capping_config.pt")]).exit_code == 0
    theirs, = import_capping_config(folder / "capping_config.pt").values()
    assert theirs.floors == cap.floors and theirs.axis.values.allclose(cap.axis.unit().values)

@pytest.mark.parametrize("line, code, words", [
    ("responses status nowhere.sqlite", 1, "make one with: persona-steer responses generate"), ("responses generate --store x.sqlite --personas gost", 1, "did you mean 'ghost'"), ("responses generate --store x.sqlite", 2, "--personas-file FILE"),
    ("responses generate --store x.sqlite --all --backend nobody", 2, "nobody"), ("responses generate --store x.sqlite --all --questions 99", 1, "there are 18"), ("responses generate --store x.sqlite --all --key-from NO_SUCH", 1, "export NO_SUCH="),
    ("responses import x.sqlite nowhere.jsonl", 1, "no such file"), ("export", 2, "say what to export"), ("export ghost", 2, "--format npz"), ("export ghost --gguf --format npz", 2, "one of them"), ("export ghost --format npz --layers 3", 2, "holds the vector as it is"), ("calibrate capping --windows 4", 2, "first-last")])
def test_errors_are_a_line_and_leave_nothing(folder, line, code, words):
    out, err = run(folder, *line.split(), code=code)
    assert out == "" and words in " ".join(err.replace("│", " ").split()) and (code == 2 or err.startswith("error: ") and err.count("\n") == 1)
    assert not (folder / "x.sqlite").exists()

def test_no_key_no_judge_but_a_remedy(folder, local):
    _, err = run(folder, "judge", local, "--judge", "api", "--judge-model", "a/b", code=1)
    assert err == "error: https://openrouter.ai/api/v1 needs a key: export OPENROUTER_API_KEY=..., or name another API with --url; or judge with --judge tiny\n"

def test_help_has_examples_and_exit_codes():
    for line in ("responses generate", "responses status", "responses resume", "responses export", "responses import", "judge", "calibrate strength", "calibrate capping", "export"):
        text = " ".join(CliRunner().invoke(app, [*line.split(), "--help"], env={"COLUMNS": "100", "NO_COLOR": "1"}).output.split())
        assert f"Examples persona-steer {line}" in text, line
        if line in ("responses generate", "responses resume", "judge"): assert "Exit codes: 0 all there; 1 an error" in text and "3 some of it failed" in text
