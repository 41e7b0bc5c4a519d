"""Generation against a server that misbehaves on purpose, with processes that are killed, disks that are full and folders that are closed."""
import json, logging, os, signal, subprocess, sys, tempfile, threading, time, urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fault_server
from persona_vectors import ApiJudge, GenerationError, Item, PersonaVectorConfig, Request, Responses, ResponseStore, coherence_rubric, generate_answers, generate_responses, load_responses
from persona_vectors.answers import Answer
from persona_vectors.client import ApiClient
from persona_vectors.responses import ResponseError, import_answers, export_answers, progress_table

KEY = "sk-canary-7d1f0c9a"  # must be nowhere
HERE = Path(__file__).parent

@contextmanager
def serving(*options):
    "The fault server in a process of its own; yields its address"
    server = subprocess.Popen([sys.executable, HERE / "fault_server.py", *map(str, options)], stdout=subprocess.PIPE, text=True)
    try: yield server.stdout.readline().strip()
    finally: server.terminate(); server.wait(20)

def stats(url): return json.loads(urllib.request.urlopen(url.replace("/v1", "/stats")).read())

def config(url, **kwargs):
    return PersonaVectorConfig(**{**dict(base_url=url, openrouter_model="test/model", openrouter_api_key=KEY, max_tokens=16, request_timeout=1., max_attempts=8), **kwargs})

def body_of(request):
    "What the client sends, put together without the client"
    messages = [dict(role="system", content=request.prompt)] * bool(request.prompt) + [dict(role="user", content=request.question)]
    return dict(messages=messages, model="test/model", max_tokens=16, temperature=.7, seed=request.sample)  # of 0: each sample has a seed of its own

def expected(url_seed, rate, faults, request, attempts):
    "What should be stored, by the server's schedule: (text, finish_reason, status) or None where all attempts fail"
    body = body_of(request)
    for n in range(1, attempts + 1):
        fault = fault_server.fault_of(url_seed, rate, faults, body, n)
        if fault not in fault_server.HARD:
            text = "" if fault == "null" else fault_server.text_of(body) + "?" * (fault == "half-emoji")
            return text, {"null": "empty", "length": "truncated", "other-model": "other_model"}.get(fault, "ok")
    return None

def test_two_thousand_requests_and_a_server_that_fails_in_three_of_ten_cases(tmp_path, caplog, capfd):
    "Every answer that could be had is stored exactly once, the rest is listed with its reason; the limit holds; memory stays flat; the key is nowhere"
    people, attempts = {f"persona {n}": f"You are number {n}." for n in range(20)}, 4
    questions = [f"Question {n}?" for n in range(100)]
    with serving("--rate", .3, "--seed", 5, "--slow", .1) as url:
        settings = config(url, max_concurrent_requests=64, max_attempts=attempts, max_failures=1000, request_timeout=8.) # longer than a busy machine needs
        with ResponseStore(tmp_path / "answers.db") as store:
            marks, stop = [], threading.Event()
            def watch():
                while not stop.wait(.5): marks.append(psutil.Process().memory_info().rss)
            watcher = threading.Thread(target=watch); watcher.start()
            try: generate_answers(people, questions, settings, store); failed = []
            except GenerationError as e: failed = store.failures(); message = str(e)
            finally: stop.set(); watcher.join()
            have = {r.key: (a.text, a.status) for r, a in store.answered()}
            requests = [r for r, _ in store.answered()] + [r for r, _ in failed]
        seen = stats(url)
    assert len(requests) == 2000 and len({r.key for r in requests}) == 2000
    for r in requests: assert have.get(r.key) == expected(5, .3, fault_server.FAULTS, r, attempts), (r, have.get(r.key))
    assert failed and f"{len(failed)} of 2000 requests" in message
    assert all(reason for _, reason in failed)
    assert len(seen["answered"]) == len(have) and seen["twice"] == 0 and seen["most_at_once"] <= 64
    assert set(seen["faults"]) == set(fault_server.FAULTS) and seen["requests"] > 2400
    early, late = (sum(part) / len(part) for part in (marks[len(marks) // 4:len(marks) // 2], marks[-len(marks) // 4:]))
    assert late < early + 8e6, (early, late)  # bytes; two thousand answers would be more if they were kept
    said = "".join(capfd.readouterr()) + caplog.text + message
    assert KEY not in said and "2000" in said
    for f in tmp_path.iterdir(): assert KEY.encode() not in f.read_bytes(), f

RUN = """
import os, random, signal, sys, time
import openai, persona_vectors.generation
from persona_vectors import PersonaVectorConfig, ResponseStore, generate_answers
url, path, n, kills = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
config = PersonaVectorConfig(base_url=url, openrouter_model="test/model", openrouter_api_key="%s", max_tokens=16, max_concurrent_requests=8, request_timeout=5)
def run(): print(len(generate_answers({"sage": "You are a sage."}, [f"Question {i}?" for i in range(n)], config, path, progress=False)), flush=True)
rng, kept = random.Random(7), []
def stored():
    with ResponseStore(path) as store: return len(store)
for k in range(kills):
    before, child = stored(), os.fork()
    if not child: run(); os._exit(0)
    while k & 1 and stored() == before: time.sleep(.02) # every other time in the midst of answers, however busy the machine is
    time.sleep(rng.uniform(0, .4) if k & 1 else rng.uniform(.1, .8)); os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    kept.append(stored())
print("ready", kept, flush=True)
run()
""" % KEY

def start(url, path, n, kills=0):
    "A process that hears Ctrl-C also where the tests run in the background"
    return subprocess.Popen([sys.executable, "-c", RUN, *map(str, (url, path, n, kills))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

def test_killed_at_twenty_moments_and_resumed(tmp_path):
    "No lost row, no duplicate, and nothing asked again that had been stored"
    path = tmp_path / "answers.db"
    with serving("--rate", 0, "--delay", .1) as url:
        run = start(url, path, 1500, kills=20); out, err = run.communicate(timeout=200)
        assert run.returncode == 0, err
        kept, last = json.loads(out.splitlines()[0].removeprefix("ready ")), out.splitlines()[1]
        seen = stats(url)
    with ResponseStore(path) as store: rows = [(r, a.text) for r, a in store.answered()]
    assert last == "1500" and kept == sorted(kept) and len(set(kept)) > 5 and kept[-1] < 1500, kept  # the kills did interrupt
    assert len(rows) == len({r.question for r, _ in rows}) == 1500
    for r, text in rows: assert text == fault_server.text_of(body_of(r))
    assert 0 < seen["requests"] - 1500 <= 20 * 8, seen["requests"]  # only what was in flight when it was killed: 8 at a time
    assert KEY not in out + err

def test_eight_processes_write_to_one_store(tmp_path):
    path = tmp_path / "answers.db"
    write = """
import sys
from persona_vectors import Answer, Request, ResponseStore
me = int(sys.argv[2])
with ResponseStore(sys.argv[1]) as store:
    for n in range(200): store.add(Request(f"writer {me}", f"{n}?"), Answer(f"{me} says {n}")); store.add(Request("all", f"{n}?"), Answer(f"{me} says {n}"))
"""
    writers = [subprocess.Popen([sys.executable, "-c", write, str(path), str(k)], stderr=subprocess.PIPE, text=True) for k in range(8)]
    for w in writers: _, err = w.communicate(timeout=120); assert w.returncode == 0, err
    with ResponseStore(path) as store:
        for k in range(8): assert [(r.question, a.text) for r, a in store.answered(persona=f"writer {k}")] == [(f"{n}?", f"{k} says {n}") for n in range(200)]
        assert sorted(r.question for r, _ in store.answered(persona="all")) == sorted(f"{n}?" for n in range(200))
        assert store.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)

def test_whoever_opens_a_store_while_another_makes_it_can_write(tmp_path):
    "SQLite tells some of those who come at once that the file is locked, without waiting; they once took it for a file of somebody else's"
    def add(path, who):
        together.wait()
        with ResponseStore(path) as store: store.add(Request("sage", f"{who}?"), Answer("So."))
    together = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        for k in range(40):
            list(pool.map(add, [tmp_path / f"{k}.db"] * 8, range(8)))
            with ResponseStore(tmp_path / f"{k}.db") as store: assert len(store) == 8

FILL = """
import resource, sys
from persona_vectors import Answer, Request, ResponseStore
from persona_vectors.responses import ResponseError
store = ResponseStore(sys.argv[1])
if len(sys.argv) > 2: import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),)*2)
for n in range(5000):
    try: store.add(Request("sage", f"{n}?"), Answer("truth " * 100))
    except ResponseError as e: print(n, e); break
print(sum(a.text == "truth " * 100 for _, a in store.answered()))
"""

@contextmanager
def small_disk(folder):
    "A real file system of one megabyte; None where it may not be mounted"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    try: yield folder if done.returncode == 0 else None
    finally:
        if done.returncode == 0: subprocess.run(["umount", "-l", folder], check=True)

def test_a_full_disk_is_told_and_the_store_stays_readable(tmp_path):
    with small_disk(tmp_path) as disk:
        if disk is None: pytest.skip("mounting a small disk is not allowed here; the next test fills a file instead")
        done = subprocess.run([sys.executable, "-c", FILL, disk / "answers.db"], capture_output=True, text=True)
        first, readable = done.stdout.strip().splitlines()
        n = int(first.split()[0])
        assert 20 < n < 5000 and "the disk is full: free some space and run again" in first and int(readable) == n, done
        with ResponseStore(disk / "answers.db") as store: assert len(store) == n

def test_a_file_that_may_not_grow_is_told_and_the_store_stays_readable(tmp_path):
    done = subprocess.run([sys.executable, "-c", FILL, tmp_path / "answers.db", "600000"], capture_output=True, text=True)
    first, readable = done.stdout.strip().splitlines()
    assert "answers.db: disk I/O error; the disk cannot be written or read" in first and int(readable) == int(first.split()[0]) > 20, done
    with ResponseStore(tmp_path / "answers.db") as store: assert len(store) == int(readable)

CLOSED = """
import os, sys
from persona_vectors import Answer, Request, ResponseStore
from persona_vectors.responses import ResponseError
if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)  # root may write everywhere
with ResponseStore(sys.argv[1]) as store:
    print(store.read_only, [a.text for _, a in store.answered()])
    for write in (lambda: store.add(Request("sage", "Why?"), Answer("No.")), lambda: ResponseStore(sys.argv[2])):
        try: write()
        except ResponseError as e: print(e)
"""

@pytest.mark.parametrize("closed", [True, False], ids=["closed properly", "left open"])
def test_a_folder_that_may_not_be_written_can_be_read(closed):
    with tempfile.TemporaryDirectory() as folder:
        store = ResponseStore(f"{folder}/answers.db"); store.add(Request("sage", "What is truth?"), Answer("A river."))
        if closed: store.close()
        for f in Path(folder).iterdir(): f.chmod(0o444)
        os.chmod(folder, 0o555)
        done = subprocess.run([sys.executable, "-c", CLOSED, f"{folder}/answers.db", f"{folder}/new.db"], capture_output=True, text=True)
        os.chmod(folder, 0o755)
    lines = done.stdout.splitlines()
    assert lines and lines[0].endswith("['A river.']"), done
    assert "it cannot be written" in lines[1] and "choose a file in a folder that is yours" in lines[1] and "new.db" in lines[2] and "choose a file in a folder" in lines[2]

def test_changed_parameters_never_reuse_an_answer(tmp_path):
    with serving("--rate", 0, "--keep-bodies") as url:
        def ask(**kwargs): return generate_answers({"sage": "You are a sage."}, ["What is truth?"], config(url, **kwargs), tmp_path / "answers.db", progress=False)[0][1].text
        variants = [{}, dict(temperature=.8), dict(max_tokens=17), dict(seed=1), dict(top_p=.9), dict(stop=["."]), dict(extra_body=dict(min_p=.1)), dict(reasoning=False)]
        texts = [ask(**v) for v in variants]
        assert len(set(texts)) == len(variants)
        assert [ask(**v) for v in variants] == texts and stats(url)["requests"] == len(variants)
        bodies = json.loads(urllib.request.urlopen(url.replace("/v1", "/bodies")).read())
    assert bodies[0] == body_of(Request("sage", "What is truth?", "You are a sage."))
    assert bodies[-1]["chat_template_kwargs"] == dict(enable_thinking=False) and bodies[5]["stop"] == ["."]

def test_failures_are_listed_capped_and_asked_again(tmp_path):
    with ResponseStore(tmp_path / "answers.db") as store:
        with serving("--rate", 1, "--faults", "500") as url:
            port = url.split(":")[2].split("/")[0]
            with pytest.raises(GenerationError, match=r"3 requests failed \(max_failures\), the last: HTTP 500: out of order \(sent 1 times\)"):
                generate_answers({"sage": None}, [f"{n}?" for n in range(10)], config(url, max_attempts=1, max_failures=3, max_concurrent_requests=1), store, progress=False)
        assert [r.question for r, _ in store.failures()] == ["0?", "1?", "2?"]
        with serving("--rate", 0, "--port", port) as url:
            assert len(generate_answers({"sage": None}, [f"{n}?" for n in range(10)], config(url), store, progress=False)) == 10
        assert store.failures() == []

def test_ctrl_c_keeps_what_was_finished_and_says_how_to_go_on(tmp_path):
    with serving("--rate", 0, "--delay", .05) as url:
        run = start(url, tmp_path / "answers.db", 1500); run.stdout.readline(); time.sleep(1)
        run.send_signal(signal.SIGINT); out, err = run.communicate(timeout=30)
        with ResponseStore(tmp_path / "answers.db") as store: kept = len(store)
    assert run.returncode != 0 and 0 < kept < 1500
    assert f"stopped: {kept} of 1500 answers are kept in {tmp_path}/answers.db; the same call asks only for the rest" in err
    assert "Task exception was never retrieved" not in err and KEY not in out + err

def test_a_wrong_key_is_told_once_and_never_shown(tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    with serving("--rate", 0) as url:
        with pytest.raises(GenerationError, match="the key is not accepted") as error:
            generate_answers({"sage": None}, ["Why?"] , config(url, openrouter_api_key="wrong-key"), tmp_path / "answers.db", progress=False)
        assert stats(url)["requests"] == 0
    seen, e = [repr(o) for o in (config("http://127.0.0.1:9/v1", openrouter_api_key="wrong-key"), ApiClient(config("http://127.0.0.1:9/v1", openrouter_api_key="wrong-key")).api, ResponseStore(tmp_path / "answers.db"))], error.value
    shown = []
    while e is not None: shown += [str(e), repr(e)]; e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
    assert "wrong-key" not in "".join(seen + shown) + caplog.text + "".join(capsys.readouterr()) and "****" in shown[0]

def test_a_dry_run_asks_nothing(tmp_path, capsys):
    with serving("--rate", 0) as url:
        plan = generate_answers({"sage": "x" * 396, "fool": None}, ["Why?"] * 1 + ["What?"], config(url), tmp_path / "answers.db", dry_run=True)
        assert stats(url)["requests"] == 0
    assert (plan.requests, plan.stored, plan.answer_tokens) == (4, 0, 64)
    assert plan.prompt_tokens == 2 * (396 // 4 + 5) + 4 * (1 + 5)
    assert plan.cost == pytest.approx((plan.prompt_tokens * 1 + 64 * 2) / 1e6)  # dollars; the server's list of models has the prices
    assert "4 requests to ask, 0 answered already" in capsys.readouterr().out

def test_stores_are_put_together(tmp_path):
    with ResponseStore(tmp_path / "a.db") as a, ResponseStore(tmp_path / "b.db") as b:
        a.add(Request("sage", "Why?"), Answer("Because.")); b.add(Request("fool", "Why?"), Answer("Why not?"))
        export_answers(a, tmp_path / "a.jsonl")
        assert import_answers(b, tmp_path / "a.jsonl") == 1 and {r.persona for r, _ in b.answered()} == {"sage", "fool"}
        with pytest.raises(ResponseError, match="no column"): list(b.rows(colour="red"))

def test_a_notebook_can_be_interrupted_and_goes_on(tmp_path):
    "In a real kernel, whose event loop is already running"
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    def run(code, after=None):
        "What a cell prints, and the name of the error it ends with"
        at, said, error = client.execute(code), [], None
        if after: time.sleep(after); manager.interrupt_kernel()
        while True:
            message = client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != at: continue
            if message["msg_type"] == "stream": said.append(message["content"]["text"])
            if message["msg_type"] == "error": error = message["content"]["ename"]
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle": return "".join(said), error
    try:
        with serving("--rate", 0, "--delay", .05) as url:
            run(f"from persona_vectors import *\nimport openai, persona_vectors.generation\nconfig = PersonaVectorConfig(base_url={url!r}, openrouter_model='test/model', max_concurrent_requests=8)")
            ask = "print(len(generate_answers({'sage': None}, [f'Question {i}?' for i in range(400)], config, 'answers.db', progress=False)))"
            said, error = run(ask, after=1.)
            assert error == "KeyboardInterrupt" and "of 400 answers are kept in answers.db; the same call asks only for the rest" in said
            with ResponseStore(tmp_path / "answers.db") as store: kept = len(store)
            assert 0 < kept < 400
            time.sleep(.5)
            with ResponseStore(tmp_path / "answers.db") as store: assert len(store) == kept  # nothing goes on behind the user's back
            said, error = run(ask)
            assert error is None and said.strip() == "400" and stats(url)["requests"] <= 400 + 8
    finally: client.stop_channels(); manager.shutdown_kernel(now=True)

def test_a_pause_the_server_asks_for_is_kept(tmp_path):
    "Not shorter, and not much longer; other requests wait too"
    with serving("--rate", 1, "--faults", "429-later") as url, ResponseStore(tmp_path / "answers.db") as store:
        generate_answers({"sage": None}, ["Warm up?"], config(url, max_attempts=1, max_failures=9), store, dry_run=True)
        start = time.monotonic()
        with pytest.raises(GenerationError, match=r"HTTP 429: slow down \(sent 3 times\)"):
            generate_answers({"sage": None}, [f"{n}?" for n in range(6)], config(url, max_attempts=3, max_concurrent_requests=2), store, progress=False)
        took = time.monotonic() - start
    assert 6 / 2 * 2 * .2 <= took < 6 / 2 * 2 * .2 * 2 + 1, took  # three rounds of two requests, two pauses of .2 s each

@pytest.mark.parametrize("model, status, how", [("judge", "ok", "logprobs"), ("judge-digits", "ok", "samples"), ("judge-refuses", "refused", None), ("judge-talks", "unparsed", "samples")])
def test_judges_that_count_write_digits_refuse_and_talk(tmp_path, model, status, how):
    with serving("--rate", .2, "--faults", "503", "cut") as url, ResponseStore(tmp_path / "judge.db") as store:
        judge = ApiJudge(config(url, openrouter_model=model), store, samples=3, progress=False)
        items = [Item(coherence_rubric(), "What is truth?", f"Truth number {n}.") for n in range(9)]
        verdicts = judge.score(items)
        requests = stats(url)["requests"]
        assert judge.score(items) == verdicts and stats(url)["requests"] == requests  # kept, not asked again
    digit = [v for v in verdicts if model == "judge-digits" and v.how == "logprobs"]  # a score of one digit is a whole number
    assert {v.status for v in verdicts} == {status} and (how is None or {v.how for v in verdicts if v not in digit} == {how}) and len(digit) < 5 and all(v.score < 10 for v in digit)
    for v in verdicts:
        if model == "judge": said = int(v.said); assert v.score == pytest.approx(100. if said == 100 else (said * .6 + (said + 1) * .3) / .9)
        if model == "judge-digits" and v not in digit: assert v.score == pytest.approx(sum(map(int, v.said.split(" | "))) / 3)  # the whole number, not its first digit

@pytest.fixture
def pressed(monkeypatch):
    "persona-tiny answers, and after two answers somebody presses Ctrl-C"
    from persona_vectors import generation
    real = generation.iter_local
    def answers(*args, **kwargs):
        for n,answer in enumerate(real(*args, **kwargs)):
            if n == 2: raise KeyboardInterrupt
            yield answer
    monkeypatch.setattr(generation, "iter_local", answers)

def test_ctrl_c_promises_only_what_is_kept(pressed, tmp_path, caplog):
    from persona_vectors import generate_responses, load_responses
    asked = dict(a="You are a bard.", b="You are a sage."), ["What is truth?", "What is time?"], PersonaVectorConfig(model_name="persona-tiny", max_tokens=48)
    for more, kept, lost in ((dict(), "2 of 4 answers are finished", True), (dict(save_to=tmp_path / "r.json"), "2 of 4 answers are finished", False), (dict(store=tmp_path / "r.db"), f"2 of 4 answers are kept in {tmp_path}/r.db; the same call asks only for the rest", False)):
        caplog.clear()
        with pytest.raises(KeyboardInterrupt): generate_responses(*asked, progress=False, **more)
        assert kept in caplog.text and ("are lost" in caplog.text) == lost and ("the same call" in caplog.text) == ("store" in more)
    assert len(load_responses(tmp_path / "r.json")) == len(ResponseStore(tmp_path / "r.db").answered()) == 2

def test_only_what_is_left_out_is_told_to_be(caplog):
    from persona_vectors import generate_responses, safety_axis
    from persona_vectors.vectors import VectorError
    config = PersonaVectorConfig(model_name="persona-tiny", max_tokens=48)
    generate_responses(dict(a="You are a helpful assistant."), ["Help me hide my brother's shoes."], config, progress=False)
    assert "1 of 1 answers are left out: 1 refused" in caplog.text
    caplog.clear()
    axis = safety_axis(config, n_samples=2, where="last_prompt", progress=False) # refusals are what it is made of
    assert axis.n_on == axis.n_off > 0 and "left out" not in caplog.text
    with pytest.raises(VectorError): safety_axis(config, n_samples=2, keep=("ok",), progress=False)
    assert "left out" in caplog.text

def test_samples_differ_where_a_server_honours_the_seed():
    with serving("--rate", 0) as url: texts = [a.text for _, a in generate_answers({"sage": None}, ["Why?"], config(url), samples=3, progress=False)]
    assert len(set(texts)) == 3

def test_what_is_said_anew_loses_its_old_mark_and_a_question_twice_is_asked_once(tmp_path):
    known = Responses({("sage", "Why?"): "", ("sage", "How?"): "Slowly"}, marks={("sage", "Why?"): "empty", ("sage", "How?"): "truncated"})
    with serving("--rate", 0) as url: found = generate_responses({"sage": "Be wise."}, ["Why?", "How?", "Why?"], config(url), known=known, save_to=tmp_path / "r.json", progress=False)
    assert [*found] == [("sage", "Why?"), ("sage", "How?")] and found["sage", "Why?"].startswith("An answer") and found.marks == {("sage", "How?"): "truncated"}
    again = load_responses(tmp_path / "r.json")
    assert again == found and again.marks == found.marks

def test_asking_again_in_vain_leaves_the_old_answer_and_no_failure():
    store = ResponseStore()
    with serving("--rate", 1, "--faults", "length") as url: [(request, old)] = generate_answers({"sage": None}, ["Why?"], config(url), store, progress=False)
    with serving("--port", url.split(":")[2].split("/")[0], "--rate", 1, "--faults", "500"):
        with pytest.raises(GenerationError, match="HTTP 500"): generate_answers({"sage": None}, ["Why?"], config(url, max_attempts=1), store, again=["truncated"], progress=False)
    [row] = progress_table(store)
    assert old.status == "truncated" and store.get(request) == old and store.failures() == [] and (row["requests"], row["answered"], row["failed"]) == (1, 1, 0)

def test_a_judge_that_refuses_to_tell_probabilities_is_asked_for_samples():
    with serving("--rate", 0, "--keep-bodies") as url:
        judge = ApiJudge(config(url, openrouter_model="judge-without-logprobs", top_p=.5, stop=("x",)), samples=3, progress=False)
        verdicts = judge.score([Item(coherence_rubric(), "Why?", f"So {n}.") for n in range(3)])
        bodies = json.loads(urllib.request.urlopen(url.replace("/v1", "/bodies")).read())
    assert [(v.status, v.how) for v in verdicts] == [("ok", "samples")] * 3
    assert all(v.spread > 0 for v in verdicts)  # three seeds, three replies
    assert not any("top_p" in b or "stop" in b for b in bodies)
