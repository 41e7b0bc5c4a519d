"""The trait toolkit in real processes: tables, files, JSON, dialogue, errors. Numbers and texts are compared with what the library or transformers give."""
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pexpect
import pytest
from commands import COMMAND

QUICK = ("--layers", "2", "3", "4", "--n-samples", "3")
CHROME = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))

@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return {**os.environ, "PERSONA_STEER_DATA_DIR": str(tmp_path_factory.mktemp("data")), "PERSONA_STEER_MODEL__DEVICE": "cpu", "PERSONA_STEER_EXTRACTION__QUESTIONS": "4", "PERSONA_STEER_EXTRACTION__MAX_TOKENS": "64", "NO_COLOR": "1", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}

@pytest.fixture(scope="module")
def run(env): return lambda *args, **more: subprocess.run([str(COMMAND), *map(str, args)], capture_output=True, text=True, env=env, **more)

@pytest.fixture(scope="module")
def traits(env): return Path(env["PERSONA_STEER_DATA_DIR"]) / "vectors/traits/persona-tiny"

@pytest.fixture(scope="module")
def extractor():
    from persona_vectors import ActivationExtractor, PersonaVectorConfig
    return ActivationExtractor(PersonaVectorConfig(model_name="persona-tiny", max_tokens=64, device="cpu"))

@pytest.fixture(scope="module")
def evil(run, traits):
    "The trait as the command has made it, and what it printed"
    done = run("extract-trait", "--model_name", "persona-tiny", "--trait", "evil", "--layer_range", 2, 4, "--n_samples", 3)
    assert done.returncode == 0, done.stderr
    from persona_vectors import load_vectors
    return load_vectors(traits / "evil.npz"), done

@pytest.fixture
def told(env, monkeypatch, capsys):
    "The command in this process, as a terminal starts it: (exit code, stdout, stderr)"
    for k, v in env.items(): monkeypatch.setenv(k, v)
    def tell(*args):
        from persona_vectors.cli import main
        monkeypatch.setattr(sys, "argv", ["persona-steer", *map(str, args)])
        with pytest.raises(SystemExit) as end: main()
        return end.value.code or 0, *capsys.readouterr()
    return tell

def files_in(folder): return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file()}

def by_hand(extractor, prompt, layer, move, max_tokens):
    "A greedy answer while `move` is added after a block"
    import torch
    model, tok = extractor.model, extractor.tokenizer
    ids = torch.tensor([tok.apply_chat_template([dict(role="user", content=prompt)], add_generation_prompt=True, return_dict=False)])
    handle = model.model.layers[layer].register_forward_hook(lambda module, args, out: out + move)
    with torch.no_grad(): said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, pad_token_id=tok.pad_token_id)
    handle.remove()
    return tok.decode(said[0, ids.shape[1]:], skip_special_tokens=True).strip()

def test_extract_trait_writes_what_the_library_finds(evil, traits, extractor):
    import torch
    from persona_vectors import extract_trait
    made, done = evil
    expected = extract_trait(extractor, "evil", layers=[2, 3, 4], n_samples=3, bootstrap=20, permutations=0, directions=20, progress=False)
    torch.testing.assert_close(made.values, expected.values, rtol=0, atol=0)
    assert made.layers == (2, 3, 4) and made.about["fingerprint"] == expected.about["fingerprint"]
    table = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d ", line)]
    assert [(int(r[0]), float(r[1])) for r in table] == [(o.layer, round(o.auc, 3)) for o in expected.report.layers]
    assert [int(r[0]) for r in table if "<-" in r] == [made.best_layer]
    assert [(float(r[6]), r[7]) for r in table] == [(round(o.auc, 3), f"({o.noise:.2f})") for o in made.same_text.layers] and "same words (random)" in done.stdout
    assert f"layer chosen on the other questions: AUC {expected.report.chosen_auc:.3f}" in done.stdout
    assert all(f"wrote {traits / name}" in done.stderr for name in ["evil.npz", "evil_layers.html"] + ["evil_layers.png"]*CHROME) and "wrote" not in done.stdout
    assert (traits / "evil_layers.png").exists() == CHROME or "no PNG" in done.stderr

def test_extract_trait_as_json_takes_up_what_is_there(told, evil, traits):
    code, out, err = told("extract-trait", "--trait", "evil", *QUICK, "--no-png", "--json")
    found, made = json.loads(out), evil[0]
    assert code == 0 and "was there already" in err
    assert (found["best_layer"], found["about"]["fingerprint"]) == (made.best_layer, made.about["fingerprint"])
    assert [(o["layer"], o["auc"], o["d_prime"], o["same_words_auc"]) for o in found["layers"]] == [(o.layer, o.auc, o.d_prime, s.auc) for o, s in zip(made.report.layers, made.same_text.layers)]

def test_two_questions_are_too_few_to_choose_a_layer(told, tmp_path):
    code, out, err = told("extract-trait", "--trait", "openness", "--n-samples", 2, "--out", tmp_path, "--no-png")
    assert code == 0 and "<- best" in out and "too few answers to choose a layer on the other questions" in out, err

def test_analyze(run, told, traits, extractor, tmp_path):
    import torch
    from persona_vectors import analyze_trait, load_vectors
    done = run("analyze", "--model_name", "persona-tiny", "--persona_trait", "openness", "--layer_start", 2, "--layer_end", -4, "--max_samples", 6, "--no-png", "--json")
    assert done.returncode == 0, done.stderr
    expected = analyze_trait(extractor, "openness", None, 2, 4, 6, bootstrap=20, permutations=0, directions=20, progress=False)
    torch.testing.assert_close(load_vectors(traits / "openness_items.npz").values, expected.values, rtol=0, atol=0)
    assert [o["auc"] for o in json.loads(done.stdout)["layers"]] == [o.auc for o in expected.report.layers]
    items = [dict(personality="Candour", question=f"Question {k}?", response_high1="Yes, I say so.", response_high2="I say what is so.", response_low1="No comment.", response_low2="I would rather not.") for k in range(3)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    code, out, err = told("analyze", "--persona-trait", "candour", "--layer-start", 3, "--layer-end", 3, "--data", tmp_path / "items.jsonl", "--out", tmp_path / "o", "--no-png")
    assert code == 0 and "<- best" in out and sorted(p.name for p in (tmp_path / "o").iterdir()) == ["candour_items.npz", "candour_items_layers.html"]

def test_batch_is_stopped_and_goes_on(told, env, tmp_path):
    import torch
    from persona_vectors import load_vectors
    out = tmp_path / "o"
    line = ["batch", "sycophancy", "hallucination", "--traits", "neuroticism", *QUICK, "--out", out, "--no-png"]
    going = subprocess.Popen([str(COMMAND), *map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    while not (out / "sycophancy.npz").exists(): assert going.poll() is None, going.stderr.read(); time.sleep(.05)
    going.send_signal(signal.SIGINT)
    stdout, stderr = going.communicate(timeout=60)
    assert (going.returncode, stdout, "Traceback" in stderr) == (130, "", False), stderr
    assert re.search(r"sycophancy(, hallucination)? of sycophancy, hallucination, neuroticism; the same command goes on", stderr.replace("\n", " "))
    before = {p: at for p, at in files_in(out).items() if p.suffix == ".npz"}
    code, stdout, stderr = told(*line, "--json")
    assert code == 0 and "sycophancy" in [l for l in stderr.splitlines() if "there already" in l][0]
    assert before.items() <= files_in(out).items()  # what was finished is not written again
    found, vectors = json.loads(stdout), {n: load_vectors(out / f"{n}.npz") for n in ("sycophancy", "hallucination", "neuroticism")}
    assert [(r["trait"], r["layer"]) for r in found["traits"]] == [(n, v.best_layer) for n, v in vectors.items()]
    for a, v in vectors.items():
        for b, w in vectors.items(): assert found["cosines"][a][b] == pytest.approx(torch.cosine_similarity(v[found["layer"]], w[found["layer"]], dim=0).item(), abs=1e-5)
    assert {"traits.html", "cosines.html"} <= {p.name for p in out.iterdir()}

def test_steered_texts_are_those_of_a_plain_hook(told, evil, extractor):
    vector, _ = evil
    for more, layer, one in (((), vector.best_layer, vector.gap), (("--unit", "raw", "--layer", 2), 2, vector.norm)):
        code, out, err = told("steer", "--vector_file", "evil", "--prompt", "What is a friend?", "My desk is", "--strengths", -2, 0, 1.5, "--max-tokens", 24, "--json", *more)
        found = json.loads(out)
        assert (code, found["layer"]) == (0, layer) and found["one"] == pytest.approx(one[vector.layers.index(layer)].item(), rel=1e-4)
        assert [(r["prompt"], r["strength"]) for r in found["answers"]] == [(p, s) for p in ("What is a friend?", "My desk is") for s in (-2, 0, 1.5)]
        for r in found["answers"]: assert r["text"] == by_hand(extractor, r["prompt"], layer, r["strength"]*found["one"]*vector[layer]/vector[layer].norm(), 24)
        assert len({r["text"] for r in found["answers"]}) >= 4

def test_strength_in_lengths_of_the_residual_stream(told, evil, env):
    code, out, _ = told("steer", "--vector-file", "evil", "--unit", "norm", "--strengths", 0, "--prompt", "Hi", "--max-tokens", 2, "--json")
    from persona_vectors import load_vectors
    norms = load_vectors(Path(env["PERSONA_STEER_DATA_DIR"]) / "vectors/assistant_baseline.safetensors").about["norms"]
    assert code == 0 and json.loads(out)["one"] == pytest.approx(norms[evil[0].best_layer], rel=1e-4)

def test_dialogue_through_a_pipe(run, evil, traits, extractor):
    vector, _ = evil
    done = run("steer", "--vector-file", traits / "evil.npz", "--interactive", "--max-tokens", 16, input="1\ns 0 2\nl 2\nl 9\n99\nWhat is a friend?\nq\nNever asked\n")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    from persona_vectors import TRAITS
    assert all(s in done.stderr for s in TRAITS["evil"].starters) and "no layer 9; it has 2, 3, 4" in done.stderr and "there is no prompt 99" in done.stderr
    first, second = done.stdout.split("What is a friend?\n")
    assert first.startswith(TRAITS["evil"].starters[0]) and re.findall(r"^ ?([+-]?\d)  ", first, re.M) == ["-2", "-1", "0", "+1", "+2"]
    said = {s: " ".join(t.split()) for s, t in re.findall(r"^ ?([+-]?\d)  (.*(?:\n {4}\S.*)*)", second, re.M)}
    one = vector.gap[0].item()*vector[2]/vector[2].norm()
    assert said == {s: " ".join(by_hand(extractor, "What is a friend?", 2, float(s)*one, 16).split()) for s in ("0", "+2")}
    assert "Never asked" not in done.stdout

def test_dialogue_in_a_terminal(env, evil):
    child = pexpect.spawn(str(COMMAND), ["steer", "--vector-file", "evil", "-i", "--max-tokens", "8", "--strengths", "-1", "0", "1"], env={**env, "TERM": "xterm"}, dimensions=(40, 120), encoding="utf-8", timeout=60)
    child.expect("q quits"); child.expect("> "); child.sendline("2")
    child.expect(r"for help are\S*\r\n[^\r\n]*-1 [^\r\n]*0 [^\r\n]*\+1 ")  # side by side, since 120 columns hold three
    child.expect("> "); child.sendline("l x"); child.expect("one whole number"); child.expect("> "); child.sendline("q")
    child.expect(pexpect.EOF); child.close()
    assert child.exitstatus == 0

def test_project(run, evil, env, extractor, tmp_path):
    import torch
    talk = [("What do you make of the sea?", "The sea is a cold, pale mist, and a lonely lantern drifts."), ("Really?", "I sneer at those who deny it."), ("Why?", "It is a ruthless minion.")]
    (tmp_path / "talk.txt").write_text("".join(f"user: {q}\nassistant: {a}\n" for q, a in talk))
    done = run("project", tmp_path / "talk.txt", "--axis", "safety", "evil", "--layer", 3, "--out", tmp_path / "drift.html", "--no-png", "--json")
    assert done.returncode == 0, done.stderr
    found, library = json.loads(done.stdout), Path(env["PERSONA_STEER_DATA_DIR"]) / "vectors"
    from persona_vectors import load_vectors
    axes, usual = {"safety axis": load_vectors(library / "safety_axis.safetensors"), "evil": evil[0]}, load_vectors(library / "assistant_baseline.safetensors")
    model, tok, messages, expected = extractor.model, extractor.tokenizer, [], []
    for q, a in talk:
        messages.append(dict(role="user", content=q))
        head, body = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False), tok(a, add_special_tokens=False).input_ids
        with torch.no_grad(): h = model(torch.tensor([head + body]), output_hidden_states=True).hidden_states[4][0]
        expected.append(dict(zip(axes, (h[len(head) - 1], h[len(head):].mean(0)))))  # the safety axis is read where an answer begins
        messages.append(dict(role="assistant", content=a))
    assert [(r["axis"], r["turn"]) for r in found["rows"]] == [(n, k) for n in axes for k in range(3)]
    for r in found["rows"]:
        u = torch.nn.functional.normalize(axes[r["axis"]][3], dim=0)
        assert r["value"] == pytest.approx((expected[r["turn"]][r["axis"]] @ u).item(), abs=2e-3)
        plain = usual["last_prompt" if r["axis"] == "safety axis" else "response"][:, 3] @ u
        assert [r["low"], r["high"]] == pytest.approx([plain.quantile(.025).item(), plain.quantile(.975).item()], abs=1e-3) and r["outside"] == (not r["low"] <= r["value"] <= r["high"])
    assert {p.name for p in tmp_path.iterdir()} == {"talk.txt", "drift.html"}

def test_project_several_conversations_as_a_table(told, evil, tmp_path):
    talk = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello [there].")]
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps(o) for o in (talk, dict(messages=talk + talk))))
    code, out, _ = told("project", tmp_path / "talks.jsonl", "--axis", "evil", "--out", tmp_path / "drift", "--no-png")
    rows = [l.split() for l in out.splitlines() if "●" in l]
    assert code == 0 and [r[:2] for r in rows] == [["1", "1"], ["2", "1"], ["2", "2"]] and rows[0][2] == rows[1][2] and "Hello [there]." in out and (tmp_path / "drift.html").exists()

@pytest.mark.parametrize("line, why", [
    ("extract-trait --trait opennes", "did you mean 'openness'"), ("extract-trait --trait openness --layers 2 99", "layers are 0 to 7"), ("extract_trait --trait openness --layer_range 4 99", "layers are 0 to 7"),
    ("extract-trait --trait openness --method magic", "must be one of diff_of_means"), ("analyze --persona-trait opennes", "there are Openness"), ("analyze --persona-trait openness --layer-end 99", "layers are 0 to 7"), ("analyze --persona-trait openness --data {tmp}/no.jsonl", "no such file"),
    ("batch evil sycophanty", "did you mean 'sycophancy'"), ("steer --vector-file evill", "did you mean 'evil'"), ("steer --vector-file {tmp}/no.npz", "no such file"), ("steer --vector-file {tmp}/text.npz", "damaged"), ("steer --vector-file {tmp}/narrow.npz", "narrow.npz: the vectors have width 3"),
    ("steer --vector-file {tmp}/other.npz", "other.npz: the vectors were made with someone"), ("steer --vector-file {tmp}/two.npz", "one vector is needed"), ("steer --vector-file evil --layer 7", "no layer 7; it has 2-4"), ("steer --vector-file evil --strengths nan", "finite"), ("steer --vector-file evil --prompt ''", "a prompt is empty"),
    ("project {tmp}/no.txt", "No such file"), ("project {tmp}/empty.txt", "is empty"), ("project {tmp}/prose.txt", "plain text begins with"), ("project {tmp}/talk.txt --axis evill", "did you mean 'evil'"), ("project {tmp}/talk.txt --axis evil --layer 7", "no layer 7"),
])
def test_errors_are_a_line_and_write_nothing(told, evil, env, tmp_path, line, why):
    import torch
    from persona_vectors import PersonaVectors, Vector, save_vectors
    for name, text in {"text.npz": "not numbers", "empty.txt": " ", "prose.txt": "Hello there", "talk.txt": "user: Hi\nassistant: Hello\n"}.items(): (tmp_path / name).write_text(text)
    save_vectors(Vector(torch.ones(2, 3)), tmp_path / "narrow.npz"); save_vectors(PersonaVectors({"a": torch.ones(1, 160), "b": torch.ones(1, 160)}), tmp_path / "two.npz")
    save_vectors(Vector(torch.ones(2, 160), about={"fingerprint": "0"*16, "model": "someone"}), tmp_path / "other.npz")
    before = files_in(env["PERSONA_STEER_DATA_DIR"])
    code, out, err = told(*(o.strip("'") for o in line.format(tmp=tmp_path).split(" ")))
    last = [l for l in err.split("\n") if l.strip()][-1]
    assert (code, out) == (1, "") and last.startswith("error: ") and why in last and "Traceback" not in err
    made = {p for p in set(files_in(env["PERSONA_STEER_DATA_DIR"])) - set(before) if p.name != "assistant_baseline.safetensors"}
    assert not made, made

def test_wrong_usage(told, evil):
    for line in ("extract-trait", "extract-trait --trait openness --layers 2 --layer-range 2 3", "extract-trait --trait openness --layer-range 4 2", "extract-trait --trait openness --n-samples 1", "extract-trait --trait openness --judge api", "batch evil --all", "steer --vector-file evil -i --json", "steer --vector-file evil --unit miles"):
        code, out, err = told(*line.split())
        assert (code, out) == (2, "") and "Traceback" not in err, line

def test_help_shows_examples_and_needs_no_torch(run, env):
    code = "import sys\nfrom persona_vectors.trait_commands import app\nfor command in ('extract-trait', 'analyze', 'batch', 'steer', 'project'):\n    try: app([command, '--help'])\n    except SystemExit: pass\nprint([m for m in ('torch', 'transformers', 'plotly', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.count("Examples") == 5 and done.stdout.strip().endswith("[]"), (done.stdout[-300:], done.stderr)
    assert "--n-samples" in run("extract_trait", "--help").stdout
