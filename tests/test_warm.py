"""A forked command is like one that was started from nothing: what it says, reads, hears, and ends with."""
import os, signal, subprocess, sys, time

import pytest
from commands import COLD, COMMAND

pytestmark = pytest.mark.skipif(COMMAND == COLD, reason="commands are forked on Linux only")

@pytest.mark.parametrize("line", ["--version", "list --catalog --json", "info nobody", "extrat", "config show --json", "generate -", "demo --steer-to gost", "generate --help"])
def test_it_says_the_same_and_ends_the_same(line, tmp_path):
    env = {**os.environ, "PERSONA_STEER_DATA_DIR": str(tmp_path / "library"), "COLUMNS": "90", "NO_COLOR": "1"}
    warm, cold = (subprocess.run([c, *line.split()], cwd=tmp_path, env=env, input=" \n", capture_output=True, text=True) for c in (COMMAND, COLD))
    assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)

def started(folder): return subprocess.Popen([COMMAND, "chat", "--persona", "default"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PERSONA_STEER_DATA_DIR": str(folder)})

def forked():
    "Processes of commands that have been forked and still run"
    server = next(p for p in os.listdir("/proc") if p.isdigit() and os.environ["PERSONA_VECTORS_WARM"].encode() in read(f"/proc/{p}/cmdline"))
    return set(read(f"/proc/{server}/task/{server}/children").split())

def read(path):
    try: return open(path, "rb").read()
    except OSError: return b""  # it has ended meanwhile

@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_reaches_it(how, code, tmp_path):
    before, process = forked(), started(tmp_path)
    while not (mine := forked() - before): time.sleep(.01)
    time.sleep(1.); process.send_signal(how)
    assert process.wait(20) == code, process.stderr.read()
    process.stdin.close(); process.stdout.close(); process.stderr.close()
    end = time.monotonic() + 20
    while mine & forked(): assert time.monotonic() < end, "it goes on though whoever asked has ended"; time.sleep(.01)
