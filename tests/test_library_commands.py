"""The commands around the library in real processes: one library for all of them, on the embedded model."""
import json, os, pty, re, select, signal, struct, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from commands import COMMAND

from persona_vectors.catalog import load_archetypes
from persona_vectors.formats import load_vectors
from persona_vectors.project import changed_text, config_text
from persona_vectors.settings import get_config

COMMANDS = ["init", "extract-axes", "extract", "create", "list", "info", "load", "unload", "delete", "generate", "doctor", "config", "config show", "config set", "config path"]
SAGES = ["sage", "trickster"]

def variables(folder, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PERSONA_STEER_")}
    return {**clean, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1", "XDG_CONFIG_HOME": str(folder / "user"), "PERSONA_STEER_EXTRACTION__QUESTIONS": "6", **more}

@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    "A project with a sage and a trickster"
    folder = tmp_path_factory.mktemp("work") / "mine"
    for args in (["init", str(folder)], ["extract", *SAGES, "--config", str(folder / "config.yaml")]): assert run(*args, cwd=folder.parent).returncode == 0
    return folder

def run(*args, cwd, text="", **more): return subprocess.run([str(COMMAND), *args], cwd=cwd, input=text, capture_output=True, text=True, env=variables(Path(cwd), **more))

def works(*args, cwd, **more):
    done = run(*args, cwd=cwd, **more)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done.stdout

def fails(*args, cwd, **more):
    "The one line that is said"
    done = run(*args, cwd=cwd, **more)
    assert (done.returncode, done.stdout) == (1, ""), done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    return said[0]

def forget(folder, name):
    for kind, ending in (("vectors", "safetensors"), ("datasets", "yaml")): (folder / kind / "personas" / f"{name}.{ending}").unlink(missing_ok=True)

def loaded(cwd, **more): return [r["name"] for r in json.loads(works("list", "--loaded", "--json", cwd=cwd, **more))]

# Without torch

def test_help_has_examples_and_needs_nothing_heavy(tmp_path):
    code = f"""
import contextlib, io, sys
from persona_vectors.cli import app
for line in {COMMANDS!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try: app([*line.split(), '--help'], standalone_mode=False)
        except SystemExit: pass
    assert 'Usage' in out.getvalue() and (line == 'config' or 'Examples' in out.getvalue() and 'persona-steer ' + line in out.getvalue()), (line, out.getvalue())
print([m for m in ('torch', 'transformers', 'plotly', 'numpy', 'httpx', 'persona_vectors.settings') if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=variables(tmp_path))
    assert done.stdout.strip() == "[]", done.stderr

@pytest.mark.parametrize("args", [["list"], ["list", "--loaded"], ["list", "--catalog"], ["config", "show"], ["config", "path"], ["init"]], ids=" ".join)
def test_what_only_reads_files_needs_no_torch(mine, args):
    done = subprocess.run([sys.executable, "-c", f"import sys\nfrom persona_vectors.cli import app\napp({args!r}, standalone_mode=False)\nprint([m for m in ('torch', 'transformers', 'plotly', 'numpy') if m in sys.modules])"], cwd=mine, capture_output=True, text=True, env=variables(mine))
    assert done.stdout.splitlines()[-1] == "[]", (done.stdout, done.stderr)

def tab(line, cwd, shell="bash", **more):
    "What a shell is offered behind a line, as its own script asks"
    asked = dict(COMP_WORDS=line, COMP_CWORD=str(len(line.split(" ")) - 1)) if shell == "bash" else dict(_TYPER_COMPLETE_ARGS=line)
    done = subprocess.run([str(COMMAND)], cwd=cwd, capture_output=True, text=True, env=variables(Path(cwd), _PERSONA_STEER_COMPLETE=f"complete_{shell}", **asked, **more))
    assert done.stderr == "", done.stderr
    return done.stdout.split("\n") if shell == "zsh" else done.stdout.split()

def test_tab_offers_names(mine):
    for line, found in {"info ": SAGES, "load sage tr": ["trickster"], "delete s": ["sage"], "generate Hi --persona jes": ["jester"], "chat --blend tricks": ["trickster"], "extract guard": ["guardian"], "create x --from-archetype guard": ["guardian"],
                        "extract-trait --trait openn": ["openness"], "batch openness syc": ["sycophancy"], "batch --traits evil syc": ["sycophancy"], "config set steering.un": ["steering.unit"], "demo --steer-to gho": ["ghost"],
                        "responses generate --personas ghost jes": ["jester"], "calibrate strength sag": ["sage"], "extract-t": ["extract-trait"], "info --js": ["--json"]}.items():
        assert tab(f"persona-steer {line}", mine) == found, line
    assert [key for key in tab("persona-steer config set ", mine) if key.startswith("extraction.")] and {"data_dir", "model.name"} < set(tab("persona-steer config set ", mine))
    assert any("sage" in row and row.count(":") for row in tab("persona-steer info s", mine, "zsh")) # with who that is

def test_tab_looks_where_the_line_says(mine, tmp_path):
    assert tab("persona-steer info ", tmp_path, PERSONA_STEER_DATA_DIR=str(tmp_path)) == []
    assert tab(f"persona-steer info --config {mine / 'config.yaml'} ", tmp_path) == SAGES
    (tmp_path / "config.yaml").write_text("model: [")
    assert tab("persona-steer info ", tmp_path) == [] # and no word of it
    (tmp_path / "traits/vectors/traits/persona-tiny").mkdir(parents=True); (tmp_path / "traits/vectors/traits/persona-tiny/kind.npz").write_bytes(b"")
    (tmp_path / "config.yaml").write_text("data_dir: traits")
    assert tab("persona-steer steer --vector-file ", tmp_path) == ["kind"]

def test_a_command_is_where_the_door_looks_for_it():
    import typer

    from persona_vectors import cli
    for part, names in cli._PARTS.items(): assert set(names.split()) == set(typer.main.get_group(getattr(__import__(f"persona_vectors.{part}"), part).app).commands)
    code = "import sys; from persona_vectors.cli import app\ntry: app(['info', '--help'], standalone_mode=False)\nexcept SystemExit: pass\nprint(sorted(m for m in sys.modules if m.endswith(('_commands', '.terminal', '.doctor', 'torch'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['persona_vectors.library_commands']", done.stderr
    done = subprocess.run([str(COMMAND), "extrat"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"})
    assert done.returncode == 2 and "Did you mean 'extract'" in done.stderr

def test_init_overwrites_nothing(tmp_path):
    assert "there already" not in works("init", "p", "--datasets", cwd=tmp_path)
    files = [f for f in (tmp_path / "p").rglob("*") if f.is_file()]
    assert {f.name for f in files} == {"config.yaml", "archetypes.yaml", "personas.yaml", "safety.yaml", "questions.yaml"}
    for f in files: f.write_bytes(b"# mine\n")
    rows = json.loads(works("init", "p", "--datasets", "--model", "other/model", "--json", cwd=tmp_path))
    assert not any(r["made"] for r in rows) and all(f.read_bytes() == b"# mine\n" for f in files)
    works("init", "q", "--model", "other/model", cwd=tmp_path)
    assert yaml.safe_load((tmp_path / "q/config.yaml").read_text())["model"]["name"] == "other/model"
    assert "is a file" in fails("init", "p/config.yaml", cwd=tmp_path)

def test_every_key_can_be_changed_and_nothing_else_is():
    text = config_text()
    for section, o in yaml.safe_load(text).items():
        for key in ([f"{section}.{k}" for k in o] if isinstance(o, dict) else [section]):
            for new in ("other", 7, -.5, True, None, [1, 2], "a: b # c", ""):
                found = changed_text(text, key, new)
                differ = [(a, b) for a, b in zip(text.splitlines(), found.splitlines()) if a != b]
                assert len(text.splitlines()) == len(found.splitlines()) and len(differ) <= 1
                for a, b in differ: assert a.split(":")[0] == b.split(":")[0] and (section == "data_dir" or a[a.index(" # "):] == b[-len(a[a.index(" # "):]):])
                now = yaml.safe_load(found)
                assert (now[section][key.partition(".")[2]] if "." in key else now[section]) == new

def test_config_set_keeps_comments_and_refuses(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"# ours\r\nsteering:   # how\r\n    unit: 'norm'  # the unit\r\n    default_strength: .3\r\n\r\nmodel: {name: persona-tiny}  # small\r\n")
    before = path.read_bytes()
    assert works("config", "set", "steering.default_strength", "-0.5", cwd=tmp_path) == "steering.default_strength: -0.5\n"
    assert path.read_bytes() == before.replace(b".3", b"-0.5")
    works("config", "set", "steering.safety", "off", cwd=tmp_path)
    assert path.read_bytes() == before.replace(b".3\r\n", b"-0.5\r\n    safety: false\r\n")
    before = path.read_bytes()
    for key, value, said in (("steering.unit", "gap", "must be 'norm' or 'raw'"), ("steering.units", "raw", "did you mean 'steering.unit'"), ("steering.default_strength", "99", "is beyond max_strength"), ("extraction.seed", "1.5", "must be a valid integer"),
                             ("hf_token", "x", "HF_TOKEN"), ("model.name", "hf_abcdefghij", "HF_TOKEN"), ("model", "x", "did you mean 'model.name'"), ("config", "x", "there is no setting")):
        line = fails("config", "set", key, value, cwd=tmp_path)
        assert said in line and "abcdefghij" not in line and path.read_bytes() == before
    assert run("config", "set", "steering.unit", cwd=tmp_path).returncode == 2
    assert [f.name for f in tmp_path.iterdir()] == ["config.yaml"]

def test_without_a_file_the_users_is_made(tmp_path):
    work = tmp_path / "work"; work.mkdir()
    where = works("config", "path", cwd=work).strip()
    works("config", "set", "extraction.target_layers", "[3, 4]", cwd=work)
    assert where.endswith("config.yaml") and Path(where).read_text() == "extraction: {target_layers: [3, 4]}\n" and not (work / "config.yaml").exists()
    rows = {r["key"]: r for r in json.loads(works("config", "show", "--json", "--model", "persona-tiny", cwd=work))}
    assert (rows["extraction.target_layers"]["value"], rows["extraction.target_layers"]["source"]) == ([3, 4], where)
    assert [rows[k]["source"] for k in ("model.name", "extraction.questions", "steering.default_strength", "steering.unit")] == ["the command line", "PERSONA_STEER_EXTRACTION__QUESTIONS", "what suits the embedded model", "default"]
    assert "extraction.target_layers" in works("config", "show", cwd=work)

def test_an_empty_library_says_where_to_begin(tmp_path):
    done = run("list", cwd=tmp_path, PERSONA_STEER_DATA_DIR=str(tmp_path / "[x]"))
    assert (done.returncode, done.stdout) == (0, "") and all(o in done.stderr for o in ("[x]", "extract --all", "create", "list --catalog"))
    kinds = [r["kind"] for r in json.loads(works("list", "--catalog", "--json", cwd=tmp_path))]
    assert {k: kinds.count(k) for k in set(kinds)}.keys() == {"archetype", "persona", "trait"}

@pytest.mark.parametrize("args, said", [(["info", "saeg"], "did you mean 'sage'?"), (["load", "sage", "trikster"], "did you mean 'trickster'?"), (["unload", "jester"], "persona-steer extract jester"), (["delete", "xxxx", "--yes"], "there are sage, trickster"), (["extract", "gardian"], "did you mean 'guardian'"),
    (["create", "x", "--blend", "sage", "--from-archetype", "sage"], "one of: --from-archetype"), (["create", "sage", "--description", "x"], "pass --replace"), (["create", "x", "--blend", "sage", "--prompt", "You are x."], "--prompt goes with --description"),
    (["delete", "sage"], "pass --yes"), (["generate", " \n"], "prompt is empty"), (["generate", "-"], "prompt is empty"), (["generate", "Hi", "--prompted"], "needs one")], ids=lambda o: " ".join(o) if isinstance(o, list) else "")
def test_mistakes_are_a_line(mine, args, said):
    assert said in fails(*args, cwd=mine)
    assert json.loads(works("list", "--json", cwd=mine))[0]["name"] == "sage" and loaded(mine) == []

def test_a_damaged_file_does_not_hide_the_others(mine):
    bad = mine / "vectors/personas/broken.safetensors"
    bad.write_bytes(struct.pack("<Q", 10**15) + b"{")
    try: rows = {r["name"]: r for r in json.loads(works("list", "--json", cwd=mine))}
    finally: bad.unlink()
    assert rows["broken"]["description"].startswith("damaged") and rows["sage"]["made"] == "archetype sage"

# With a server

class Server(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, status, body): body = json.dumps(body).encode(); self.send_response(status); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_GET(self): self.answer(200, dict(personas=[dict(name=k, description="", loaded=v) for k, v in self.server.shelf.items()]))
    def do_POST(self):
        *_, name, what = self.path.split("/")
        if self.server.full: return self.answer(503, dict(error=dict(message="no room\nfor more", type="server_error", param=None, code=None)))
        self.server.shelf[name] = what == "load"; self.answer(200, dict(name=name, loaded=what == "load"))

@pytest.fixture
def server(mine):
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server); http.shelf, http.full = dict.fromkeys(SAGES, False), False
    threading.Thread(target=http.serve_forever, daemon=True).start()
    (mine / "server.json").write_text(json.dumps(dict(url=f"http://127.0.0.1:{http.server_port}", pid=os.getpid(), model="persona-tiny", started="2026-01-01T00:00:00+00:00")))
    yield http
    http.shutdown(); http.server_close(); (mine / "server.json").unlink(missing_ok=True)

def test_load_means_the_server_where_one_runs(mine, server):
    assert "loaded by the server at" in works("load", "sage", cwd=mine, HTTP_PROXY="http://127.0.0.1:9")
    assert server.shelf == dict(sage=True, trickster=False) and loaded(mine) == ["sage"] and not (mine / "startup.json").exists()
    assert "unloaded by the server" in works("unload", "sage", cwd=mine)
    assert loaded(mine, PERSONA_STEER_API_KEY="a key") == []
    server.full = True
    assert "error: no room for more (the server at" in fails("load", "sage", cwd=mine)

def test_a_server_that_is_gone_is_said_and_ignored(mine, server):
    server.shutdown(); server.server_close()
    done = run("list", "--loaded", "--json", cwd=mine)
    assert json.loads(done.stdout) == [] and "may be deleted" in done.stderr

# On the model

def test_without_a_server_load_is_kept_for_the_next_start(mine):
    assert "no server is running" in works("load", "trickster", cwd=mine)
    assert loaded(mine) == ["trickster"] and json.loads((mine / "startup.json").read_text()) == ["trickster"]
    assert works("unload", "trickster", "sage", cwd=mine).splitlines()[1].startswith("sage: chat and serve did not start")
    assert loaded(mine) == []

def test_axes_say_how_good_each_layer_is(mine):
    table = works("extract-axes", cwd=mine)
    assert table.count("<- best") == 2 and "assistant axis: from roles to default assistant" in table and "baseline: 6 answers" in table
    rows = [line.split() for line in table.splitlines() if re.match(r" +\d ", line)]
    assert [int(r[0]) for r in rows] == [*range(8)]*2
    for axis in (rows[:8], rows[8:]):
        best = next(r for r in axis if r[-1] == "best")
        assert float(best[1]) == max(float(r[1]) for r in axis) > .9

def test_create_makes_what_a_blend_needs_and_info_tells(mine):
    works("create", "fox", "--blend", "sage:0.5,jester:0.3", cwd=mine)
    works("create", "again", "--vector", "vectors/personas/fox.safetensors", "--description", "The fox", cwd=mine)
    made = json.loads(works("create", "wizard", "--description", "A grumpy wizard", "--prompt", "You are a grumpy wizard.", "Grumble.", "--json", cwd=mine))
    again = json.loads(works("info", "again", "--json", cwd=mine))
    rows = {r["name"]: r["made"] for r in json.loads(works("list", "--json", cwd=mine))}
    assert rows == dict(again="data", fox="blend 0.5 sage + 0.3 jester", jester="archetype jester", sage="archetype sage", trickster="archetype trickster", wizard="description")
    assert (made["prompts"], again["description"], again["added"], again["layers"], again["loaded"]) == (2, "The fox", [4], [*range(8)], False)
    fox, copy = (load_vectors(mine / f"vectors/personas/{k}.safetensors") for k in ("fox", "again"))
    assert torch.equal(fox["raw"], copy["raw"]) and again["norms"] == fox["raw"].norm(dim=1).tolist() and max(again["degrees"]) > 0
    for name in set(rows) - set(SAGES): forget(mine, name)

def test_delete_asks_on_a_terminal(mine):
    (mine / "vectors/personas/gone.safetensors").write_bytes((mine / "vectors/personas/sage.safetensors").read_bytes())
    for answer, there in (("n", True), ("y", False)):
        keyboard, terminal = pty.openpty()
        with subprocess.Popen([str(COMMAND), "delete", "gone"], cwd=mine, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables(mine)) as p:
            asked = os.read(p.stderr.fileno(), 200).decode() if select.select([p.stderr], [], [], 60)[0] else ""
            os.write(keyboard, f"{answer}\n".encode()); out = p.communicate(timeout=120)[0].decode()
        os.close(keyboard); os.close(terminal)
        assert "Delete gone" in asked and (mine / "vectors/personas/gone.safetensors").exists() == there and out == f"gone: {'kept' if there else 'deleted'}\n"

def test_extract_all_is_stopped_and_goes_on(mine, tmp_path):
    archetypes = tmp_path / "datasets/archetypes.yaml"; archetypes.parent.mkdir()
    archetypes.write_text("one:\n  description: One.\n  system_prompts: [You are one.]\ntwo:\n  description: Two.\n  system_prompts: [You are two.]\n")
    assert list(load_archetypes(archetypes)) == ["one", "two"]
    (tmp_path / "vectors").mkdir()
    for f in mine.glob("vectors/*.safetensors"): (tmp_path / "vectors" / f.name).write_bytes(f.read_bytes())
    with subprocess.Popen([str(COMMAND), "extract", "--all", "--model", "persona-tiny"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables(tmp_path)) as p:
        first = tmp_path / "vectors/personas"
        while not list(first.glob("*.safetensors")) and p.poll() is None: time.sleep(.02)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and "Traceback" not in err, err
    kept = {f.stem for f in first.glob("*.safetensors")}
    assert kept and set(re.findall(r"^(\w+) +made", out, re.M)) <= kept and not list(first.glob(".*.safetensors.*"))
    rows = {r["name"]: r["result"] for r in json.loads(works("extract", "--all", "--json", "--model", "persona-tiny", cwd=tmp_path))}
    assert {"one", "two", *SAGES} <= set(rows) and all(rows[k] == ("there already" if k in kept else "made") for k in rows)
    assert yaml.safe_load((tmp_path / "datasets/personas/one.yaml").read_text())["system_prompts"] == ["You are one."]

def test_generate_is_what_is_said_and_nothing_else(mine):
    ask = ["--persona", "sage", "--max_tokens", "24", "--seed", "3"]
    plain = works("generate", "-", *ask, cwd=mine, text="What is truth?\n")
    told = json.loads(works("generate", "What is truth?", *ask, "--json", "--compare", cwd=mine))
    assert told["answer"] + "\n" == plain and told["unsteered"] not in (None, told["answer"]) and (told["persona"], told["safety"], told["finish"] in ("stop", "length")) == ("sage", True, True)
    prompted = json.loads(works("generate", "What is truth?", *ask, "--prompted", "--no-safety", "--json", cwd=mine))
    assert prompted["system"].startswith("You are a sage") and prompted["strength"] is None and prompted["answer"] not in (told["answer"], told["unsteered"])

def test_a_persona_of_the_catalog_is_made_on_the_fly(mine):
    done = run("generate", "Hi", "--blend", "sage:.5,jester:.5", "--max-tokens", "4", "--no-stream", cwd=mine)
    assert done.returncode == 0 and "jester is not in the library yet" in done.stderr and done.stdout.count("\n") == 1
    forget(mine, "jester")

def test_a_closed_pipe_is_no_error(mine):
    done = subprocess.run(f"'{COMMAND}' generate 'Tell me of the sea.' --persona sage --max-tokens 60 | head -c 1", shell=True, cwd=mine, capture_output=True, text=True, env=variables(mine))
    assert len(done.stdout) == 1 and not any(o in done.stderr for o in ("Traceback", "Broken pipe", "error:")), done.stderr

def test_doctor_shows_no_key_and_tells_a_bad_config(mine):
    done = run("doctor", "--json", cwd=mine, HF_TOKEN="hf_nottobeseen", OPENROUTER_API_KEY="sk-nottobeseen")
    rows = {r["what"]: r for r in json.loads(done.stdout)}
    assert done.returncode == 0 and "nottobeseen" not in done.stdout + done.stderr
    assert (rows["HF_TOKEN"]["value"], rows["answers from an API"]["ok"], rows["the embedded model"]["ok"]) == ("set", True, True)
    assert rows["library"]["value"] == str(mine) == str(get_config(mine / "config.yaml").data_dir)
    (mine / "bad.yaml").write_text("steering: {unit: gap}")
    done = run("doctor", "--config", "bad.yaml", cwd=mine)
    (mine / "bad.yaml").unlink()
    assert done.returncode == 1 and "must be 'norm' or 'raw'" in done.stdout and "yes: answers" in done.stdout
