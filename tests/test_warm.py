"""A forked command is like one that was started from nothing: what it says, reads, hears, and ends with."""
import os, signal, subprocess, time

import pytest
from commands import COLD, COMMAND

pytestmark = pytest.mark.skipif(COMMAND == COLD, reason="commands are forked on Linux only")

@pytest.mark.parametrize("line", ["--version", "list --catalog --json", "info nobody", "extrat", "config show --json", "generate -", "demo --steer-to gost", "generate --help"])
def test_it_says_the_same_and_ends_the_same(line, tmp_path):
    env = {**os.environ, "PERSONA_STEER_DATA_DIR": str(tmp_path / "library"), "COLUMNS": "90", "NO_COLOR": "1"}
    warm, cold = (subprocess.run([c, *line.split()], cwd=tmp_path, env=env, input=" \n", capture_output=True, text=True) for c in (COMMAND, COLD))
    assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)

def at_work(folder):
    "Forked processes that stand in a folder"
    def cwd(pid):
        try: return os.readlink(f"/proc/{pid}/cwd"), open(f"/proc/{pid}/cmdline").read()
        except OSError: return "", ""  # it has ended meanwhile
    return {p for p in os.listdir("/proc") if p.isdigit() for at, line in [cwd(p)] if at == str(folder) and "serve" in line}  # they are still called as their server is

@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_reaches_it(how, code, tmp_path):
    with subprocess.Popen([COMMAND, "chat"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PERSONA_STEER_DATA_DIR": str(tmp_path)}) as process:
        while not at_work(tmp_path): time.sleep(.01)
        time.sleep(1.); process.send_signal(how)
        assert process.wait(20) == code, process.stderr.read()
        end = time.monotonic() + 20 # its standard input is open still, so it does not end for want of that
        while at_work(tmp_path): assert time.monotonic() < end, "it goes on though whoever asked has ended"; time.sleep(.01)
