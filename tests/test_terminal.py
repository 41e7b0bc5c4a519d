"""The chat through a real terminal: a pseudo-terminal whose screen is drawn by pyte, and the command in a process of its own."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest
from commands import COLD, COMMAND

pexpect, pyte = pytest.importorskip("pexpect"), pytest.importorskip("pyte")
if not hasattr(pexpect, "spawn"): pytest.skip("no pseudo-terminals here", allow_module_level=True)

ALT_ENTER, CTRL_C, CTRL_D, TAB, UP = "\x1b\r", "\x03", "\x04", "\t", "\x1b[A"
PATIENCE = 40  # seconds; a machine may be busy

class Terminal:
    "A chat in a terminal: what is typed, and what is on the screen"
    def __init__(self, *args, env, cwd, rows=24, columns=80):
        self.screen, self.raw, self.mark = pyte.HistoryScreen(columns, rows, history=5000), "", 0
        self.stream = pyte.Stream(self.screen)
        self.child = pexpect.spawn(str(COLD), ["chat", *args], env=env, cwd=str(cwd), dimensions=(rows, columns), encoding="utf-8", timeout=PATIENCE)
        self.screen.write_process_input = self.child.send  # prompt_toolkit asks where the cursor is
        self.wait("Ctrl-D leaves"); self.prompt()

    def pump(self):
        try: new = self.child.read_nonblocking(65536, timeout=.05)
        except pexpect.TIMEOUT: return
        self.raw += new
        self.stream.feed(new)

    @property
    def lines(self):
        "Everything that was shown, without what is below the cursor"
        above = ["".join(row[k].data for k in range(self.screen.columns)) if row else "" for row in self.screen.history.top]
        return [line.rstrip() for line in [*above, *self.screen.display[:self.screen.cursor.y + 1]]]

    @property
    def text(self): return "\n".join(self.lines[self.mark:])  # since the latest line that was typed

    @property
    def status(self): return self.screen.display[-1].strip()

    def wait(self, found, timeout=PATIENCE):
        "Until a pattern is in what is new, or a condition holds"
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self.pump()
            if found() if callable(found) else re.search(found, self.text): return self.text
        pytest.fail(f"waited for {found!r}, on the screen is:\n" + "\n".join([*self.lines[-40:], "...", *self.screen.display[-2:]]))

    def prompt(self): self.wait(lambda: self.screen.display[self.screen.cursor.y].strip() == ">" and self.status)

    def type(self, line, wait=None):
        "A line and Enter; then wait for a pattern, and for the next prompt"
        self.prompt()
        self.mark = len(self.lines) - 1
        self.child.send(line + "\r")
        if wait is None: return
        self.wait(wait)
        self.wait(lambda: self.lines[-1] == ">" and len(self.lines) - 1 > self.mark)
        return "\n".join(self.lines[self.mark + 1:-1])

    def messages(self, folder):
        "The conversation, as the chat saves it"
        path = folder / f"{time.monotonic_ns()}.json"
        self.type(f"/save {path}", "saved in")
        return json.loads(path.read_text(encoding="utf-8"))["messages"]

    def resize(self, columns):
        self.child.setwinsize(self.screen.lines, columns)
        self.screen.resize(columns=columns)

@pytest.fixture(scope="module")
def env(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PERSONA_STEER_") and k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    return {**kept, "PERSONA_STEER_DATA_DIR": str(folder / "library"), "PERSONA_STEER_EXTRACTION__QUESTIONS": "6", "PERSONA_STEER_MODEL__DEVICE": "cpu", "XDG_STATE_HOME": str(folder / "state"), "XDG_CONFIG_HOME": str(folder / "config"), "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}

@pytest.fixture(scope="module")
def first(env, tmp_path_factory):
    "The first thing a newcomer may do, on an empty library, through a pipe"
    return pipe("--persona", "sage", said="What is truth?\n\n/persona trickster\n", env=env, cwd=tmp_path_factory.mktemp("first"))

def pipe(*args, said, env, cwd): return subprocess.run([str(COMMAND), "chat", *args], input=said, capture_output=True, text=True, env=env, cwd=cwd, timeout=300)

@pytest.fixture(scope="module")
def shared(env, first, tmp_path_factory):
    terminal = Terminal("--persona", "sage", "--max-tokens", "400", env=env, cwd=tmp_path_factory.mktemp("chat"))
    yield terminal
    terminal.child.close(force=True)

@pytest.fixture
def chat(shared):
    "The one chat of this module, as it was in the beginning"
    assert shared.child.isalive()
    shared.resize(80)
    if shared.lines[-1] != ">": shared.child.send(CTRL_C)  # whatever a test that failed has left
    for line in ("/safety on", "/strength 0.6", "/persona sage"): shared.type(line, "strength")
    shared.type("/reset", "a new conversation")
    return shared

FOOTER = r"\n  \d+ tokens, \d+/s"
def answer(shown): return re.match(r"[^:]+: (.*?)\n  \d+ tokens", shown, re.S)[1]

# Through a pipe

def test_a_newcomers_first_command_makes_what_it_needs(first):
    assert first.returncode == 0, first.stderr
    assert re.fullmatch(r"[^\n\x1b]{20,}\n", first.stdout)  # one line was said, so one is answered
    for note in ("first use of this library", "sage is not in the library yet", "trickster is not in the library yet"): assert note in first.stderr

def test_a_pipe_carries_answers_and_nothing_else(first, env, tmp_path):
    done = pipe("--persona", "sage", said="What is truth?\n/strength 0.8\n/compare\nWhy?\n/quit\nnever asked\n", env={**env, "FORCE_COLOR": "1", "COLUMNS": "80"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said, heads, *rows = done.stdout.splitlines()
    assert said + "\n" == first.stdout  # the same seed
    assert heads.split() == ["sage", "at", "0.8", "│", "unsteered"] and rows and all("│" in r and len(r) <= 80 for r in rows)
    assert "\x1b" not in done.stdout and "making" not in done.stderr

@pytest.mark.parametrize("args,said,code,error", [
    ((), "/persona sagge\nHello\n", 1, "did you mean 'sage'?"),
    ((), "/persoan sage\nHello\n", 1, "did you mean /persona?"),
    (("--persona", "sage", "--blend", "0.5 sage"), "Hello\n", 2, "give one of them"),
    (("--strength", "2.5"), "Hello\n", 1, "from -2 to 2"),
])
def test_a_mistake_in_a_pipe_ends_it(args, said, code, error, first, env, tmp_path):
    done = pipe(*args, said=said, env={**env, "COLUMNS": "200"}, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "") and error in done.stderr and "Traceback" not in done.stderr

def test_help_is_light(env):
    code = "import sys; sys.argv = ['persona-steer', 'chat', '--help']\nfrom persona_vectors.cli import main\ntry: main()\nexcept SystemExit: pass\nprint([m for m in ('torch', 'transformers', 'numpy', 'plotly', 'prompt_toolkit') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**env, "COLUMNS": "100"})
    assert done.stdout.splitlines()[-1] == "[]" and "--no-safety" in done.stdout and "persona-steer chat --persona sage" in done.stdout, done.stdout + done.stderr

# In a terminal

def test_an_answer_streams_and_fits(chat, tmp_path):
    shown = chat.type("What is truth?", FOOTER)
    said = chat.messages(tmp_path)
    assert [m["role"] for m in said] == ["user", "assistant"]
    assert answer(shown).replace("\n", " ") == said[1]["content"]  # broken between words, and nothing lost
    assert re.search(r"; drift [·\[\]●◂▸]{13} [+-]\d", shown)
    chat.prompt()
    assert re.fullmatch(r"sage · strength 0.6 · safety on · \d+ tok/s · drift [·\[\]●◂▸]{13} [+-]\d+\.\d", chat.status)

def test_ctrl_c_ends_the_answer_and_not_the_chat(chat, tmp_path):
    chat.type("/strength 2", "strength 2")  # it will not stop by itself
    chat.type("Tell me a story.")
    seen = set()
    chat.wait(lambda: seen.add(chat.text) or len(seen) > 5 and len(chat.text) > 300)  # it comes bit by bit
    assert "tokens," not in chat.text
    chat.child.send("typed ahead" + CTRL_C)
    chat.wait(", stopped")
    chat.prompt()
    shown = chat.text.split("\n", 1)[1]
    assert "typed" not in shown and "^C" not in shown
    said = chat.messages(tmp_path)
    assert len(said) == 2 and answer(shown).replace("\n", " ") == said[1]["content"]
    assert len(said[1]["content"].split()) < 390
    chat.type("/strength 0.6", "strength 0.6")
    chat.type("And then?", FOOTER)
    assert len(chat.messages(tmp_path)) == 4

def test_ctrl_c_and_ctrl_d_at_the_prompt(chat):
    chat.prompt(); chat.mark = len(chat.lines) - 1
    chat.child.send("half a line")
    chat.wait("half a line")
    chat.child.send(CTRL_C)
    chat.wait(lambda: chat.lines[-1] == ">")
    assert "half" not in chat.text and "leaves" not in chat.text
    chat.child.send(CTRL_C)
    chat.wait("Ctrl-D or /quit leaves")
    chat.prompt()
    chat.child.kill(signal.SIGINT)  # from outside
    chat.wait(lambda: chat.text.count("Ctrl-D or /quit leaves") == 2)
    assert chat.child.isalive()

def test_commands_change_what_the_status_line_says(chat):
    for line, status in (("/persona trickster", "trickster · strength 0.6 · safety on"), ("/strength 0.8", "trickster · strength 0.8 · safety on"), ("/safety off", "trickster · strength 0.8 · safety off"), ("/blend 0.5 sage + 0.3 trickster", "0.5 sage + 0.3 trickster · strength 0.8"), ("/none", "no persona · strength 0.8")):
        chat.type(line, "strength")
        chat.wait(lambda: chat.status.startswith(status))  # noqa: B023
    before = chat.status
    for line, error in (("/persoan sage", "did you mean /persona[?]"), ("/persona sagge", "no persona 'sagge': did you mean 'sage'"), ("/blend 0.5 sage + x y", "cannot be read"), ("/strength 7", "from -2 to 2"), ("/load nowhere.json", "nowhere.json"), ("/undo", "nothing to take back")):
        chat.type(line, error)
        chat.prompt()
        assert chat.status == before
    assert "/compare" in chat.type("/help", "/quit") and "* sage" not in chat.type("/list", "made when first used")
    assert "axes safety axis; `persona-steer extract-axes` makes" in re.sub(r"\s+", " ", chat.type("/status", "library"))

def test_a_new_width_holds_from_the_next_answer_on(chat, tmp_path):
    chat.type("/strength 1.5", "strength 1.5")
    for columns in (50, 110):
        chat.resize(columns)
        chat.type("/reset", "a new conversation")
        chat.type("Tell me a story.")
        chat.wait(lambda: len(chat.text) > 700)
        time.sleep(.4)  # a slow terminal: what it has not read yet must survive Ctrl-C
        chat.child.send(CTRL_C)
        chat.wait(FOOTER)
        shown = answer(chat.text.split("\n", 1)[1])
        chat.resize(80)
        assert shown.replace("\n", " ") == chat.messages(tmp_path)[-1]["content"]  # else the terminal has cut words
        assert columns - 15 < max(map(len, shown.split("\n"))) <= columns

def test_several_lines(chat, tmp_path):
    chat.prompt(); chat.mark = len(chat.lines) - 1
    for keys in ("What is\\", "\r", "truth", ALT_ENTER, "to you?"): chat.child.send(keys); time.sleep(.2)
    chat.wait(r"> What is\n  truth\n  to you")
    chat.child.send("\r")
    chat.wait(FOOTER)
    assert chat.messages(tmp_path)[0]["content"] == "What is\ntruth\nto you?"

def test_tab_completes_commands_and_personas(chat):
    chat.prompt(); chat.mark = len(chat.lines) - 1
    chat.child.send("/per")
    chat.wait(lambda: "speak as this persona" in "\n".join(chat.screen.display))  # the menu says what it is
    chat.child.send(TAB); chat.wait(r"> /persona$")
    chat.child.send("tri" + TAB + "\r")  # as fast as somebody who knows it
    chat.wait("trickster, strength 0.6")
    chat.prompt(); chat.mark = len(chat.lines) - 1
    chat.child.send("/blend 0.5 sage + 0.3 tri" + TAB + "\r"); chat.wait("0.5 sage [+] 0.3 trickster, strength")

def test_undo_save_and_load(chat, tmp_path):
    one, two = (answer(chat.type(q, FOOTER)).replace("\n", " ") for q in ("What is truth?", "What is a river?"))
    assert [m["content"] for m in chat.messages(tmp_path)] == ["What is truth?", one, "What is a river?", two]
    chat.type("/undo", "taken back: 'What is a river[?]'; 1 left")
    assert [m["content"] for m in chat.messages(tmp_path)] == ["What is truth?", one]
    assert answer(chat.type("What is a river?", FOOTER)).replace("\n", " ") != two  # asked again, answered anew
    (tmp_path / "plain list.json").write_text(json.dumps([dict(role="user", content="Who are you?"), dict(role="assistant", content="\x1b[2JNobody.")]))
    chat.type(f"/load {tmp_path}/plain list.json", "1 exchange of")
    chat.type("Since when?", FOOTER)
    assert [m["content"] for m in chat.messages(tmp_path)][:3] == ["Who are you?", "\x1b[2JNobody.", "Since when?"]
    assert "Nobody" in chat.type("/project", "nothing added")
    assert chat.text.startswith("> /project")  # what was loaded has not cleared the screen
    (tmp_path / "notes.txt").write_text("mine")
    chat.type(f"/save {tmp_path}/notes.txt", "another name")
    assert (tmp_path / "notes.txt").read_text() == "mine"

def test_compare_fits_and_keeps_the_steered_answer(chat, tmp_path):
    chat.type("/compare", "beside that of the model as it is")
    rows = chat.type("What is a good life?", FOOTER).split("\n")[:-1]
    assert re.fullmatch(r"sage at 0.6 +│ unsteered", rows[0]) and all(len(r) <= 80 for r in rows)
    left, right = (" ".join(" ".join(r.split("│")[k].strip() for r in rows[1:]).split()) for k in range(2))
    assert left == chat.messages(tmp_path)[1]["content"] != right and len(right) > 10
    shown = chat.type("/project", "nothing added")
    assert re.search(r"safety axis +sage", shown) and re.search(r"\n1 .*●|▸", shown)
    chat.type("/strength 2", "strength 2")
    chat.type("/compare Tell me more.")
    chat.wait(lambda: len(chat.text) > 800)
    chat.child.send(CTRL_C)
    chat.wait(", stopped")
    assert len(chat.messages(tmp_path)) == 4

def test_leaving_and_history(chat, env, tmp_path):
    "Another chat at the same time: without colours, with what was typed in the first"
    chat.type("/strength 0.61", "strength 0.61")
    (Path(env["PERSONA_STEER_DATA_DIR"]) / "startup.json").write_text('["trickster"]')
    try: other = Terminal("--blend", "sage:0.5,trickster:0.3", "--system", "Be brief.", "--no-safety", env={**env, "NO_COLOR": "1"}, cwd=tmp_path)
    finally: (Path(env["PERSONA_STEER_DATA_DIR"]) / "startup.json").unlink()
    assert "at hand: trickster" in other.text
    other.prompt(); other.mark = len(other.lines) - 1
    assert other.status.startswith("0.5 sage + 0.3 trickster · strength 0.6 · safety off")
    other.child.send(UP)
    other.wait("> /strength 0.61")
    other.child.send("\r")
    other.wait("strength 0.61, safety off")
    other.type("Hello", FOOTER)
    assert [m["role"] for m in other.messages(tmp_path)] == ["system", "user", "assistant"]
    other.prompt()
    assert "●" in other.status or "▸" in other.status or "◂" in other.status
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38;5;\d+|48;5;\d+)m", other.raw)
    other.child.send(CTRL_D)
    other.child.expect(pexpect.EOF); other.child.close()
    assert other.child.exitstatus == 0
    history = Path(env["XDG_STATE_HOME"]) / "persona-steer/chat_history"
    assert history.stat().st_mode & 0o077 == 0 and "+Hello" in history.read_text()
    chat.type("/quit")
    chat.child.expect(pexpect.EOF); chat.child.close()
    assert chat.child.exitstatus == 0
