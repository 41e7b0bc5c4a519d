"""Four things pytest does not know: pages that are edited with nbdev, tests that run in the background, that importing torch takes long, and which files take long."""
import os, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path

import pytest

WARM = Path(__file__).parent / "tests/warm"
sys.path.append(str(WARM))
from warm import SOCKET

# A shell that starts a job in the background tells it to ignore Ctrl-C, and the commands that the tests start and stop would inherit that.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of more than about 20 seconds begin first, so that all workers end together (`--no-loadscope-reorder` keeps this order).
SLOW = """tests/test_scale.py tests/test_generation.py tests/test_library_commands.py nbs/11_calibration.ipynb nbs/tutorials/04_steering.ipynb nbs/index.ipynb tests/test_page.py tests/test_calibration.py nbs/tutorials/11_persona_tiny.ipynb tests/browser/test_dashboards.py
tests/test_server.py tests/test_terminal.py tests/test_cli.py nbs/tutorials/08_responses.ipynb nbs/tutorials/06_safety_and_capping.ipynb tests/test_data_commands.py tests/test_trait_commands.py nbs/14_scale.ipynb nbs/16_demo.ipynb tests/test_extraction.py nbs/16_data_commands.ipynb
tests/test_steering.py nbs/05_coherence.ipynb nbs/16_terminal.ipynb nbs/10_steering.ipynb nbs/07_statistics.ipynb nbs/tutorials/01_quickstart.ipynb tests/test_api.py nbs/11_projections.ipynb""".split()

@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    "Pages and most commands are forked from one process that has torch at hand (tests/warm/warm.py); where that cannot be, they start from nothing"
    try: os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError): return  # no Linux, or one that forbids it
    if config.getoption("nbval", False) and config.option.current_env: config.option.nbval_kernel_name, config.option.current_env = "warm", False
    if SOCKET in os.environ: return  # a worker: its master has started it
    folder = tempfile.TemporaryDirectory(); address = f"{folder.name}/warm"
    os.environ[SOCKET], os.environ["JUPYTER_PATH"] = address, os.pathsep.join([str(WARM), *filter(None, [os.environ.get("JUPYTER_PATH")])])
    server = subprocess.Popen([sys.executable, WARM / "warm.py", "serve", address], stdin=subprocess.PIPE)  # it ends when this pipe is closed, however this process ends
    while not os.path.exists(address): time.sleep(.01); assert server.poll() is None
    def end(): server.stdin.close(); server.wait(); folder.cleanup()
    config.add_cleanup(end)

def pytest_collection_modifyitems(items):
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None: continue
        if cell.get("execution_count", 0) is None: cell["execution_count"] = 1  # nbdev_clean blanks it, and nbval takes a blank for 'never run'
        if "nbdev_export()" in cell["source"]: cell["source"] = "pass"  # it rewrites the modules, which other tests are importing at this moment; tests/test_repository.py checks the export
    at = {name: k for k, name in enumerate(SLOW)}
    items.sort(key=lambda item: at.get(item.nodeid.partition("::")[0], len(at)))
