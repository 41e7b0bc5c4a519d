"""Commands and notebook kernels without five seconds of imports: forked from one process that has torch and transformers at hand.

    warm.py serve SOCKET          imports when it is first asked, then forks a child for each
    warm.py persona-steer ...     a command, as a shell starts it
    warm.py kernel FILE           a Jupyter kernel on a connection file

Whoever asks lends its folder, environment and open files; the child writes to them, hears the signals it hears, ends when it ends, and gives it its exit code.
"""
import atexit, contextlib, gc, importlib, json, os, select, signal, socket, sys, threading

SOCKET = "PERSONA_VECTORS_WARM"  # the variable that says where the server listens
HEAVY = """numpy scipy.stats sklearn.linear_model pandas torch transformers.models.qwen3.modeling_qwen3 transformers.generation safetensors.torch tokenizers
plotly.graph_objects plotly.io ipywidgets ipykernel.kernelapp ipykernel.ipkernel IPython.core.interactiveshell""".split()

# ---------------------------------------------------------------- whoever asks
def ask(*line):
    "Exit code of a command or kernel that runs as if it were this process"
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[SOCKET])
        socket.send_fds(server, [b"\0"], [0, 1, 2])
        said = server.makefile("rw", encoding="utf-8")
        print(json.dumps(dict(line=line, folder=os.getcwd(), env=dict(os.environ))), file=said, flush=True)
        child = int(said.readline())
        for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda n, _: os.kill(child, n))
        code = int(said.readline())
    if code < 0: signal.signal(-code, signal.SIG_DFL); os.kill(os.getpid(), -code)  # ended by a signal, as the child was
    return code

# ---------------------------------------------------------------- who answers
def serve(path):
    "Listens until standard input is closed; returns in each child too: what is left to do"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path); listener.listen(64)
        going = {}  # {file that can be read when a child has ended: (its process, who asked)}
        while True:
            ready = select.select([0, listener, *going, *(s for _, s in going.values())], [], [])[0]
            if 0 in ready: return lambda: None  # nobody can ask any more
            if listener in ready:
                if "torch" not in sys.modules: warm_up()
                asker, _ = listener.accept(); _, files, *_ = socket.recv_fds(asker, 1, 3)
                if not (line := asker.makefile(encoding="utf-8").readline()): asker.close(); continue  # it has ended while the server was busy
                if not (child := os.fork()): return work(json.loads(line), files)
                for f in files: os.close(f)
                going[os.pidfd_open(child)] = child, asker
                with contextlib.suppress(OSError): asker.sendall(f"{child}\n".encode())
            for f, (child, asker) in list(going.items()):
                if asker in ready: os.kill(child, signal.SIGKILL)  # whoever asked has ended
                if asker in ready or f in ready:
                    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    with contextlib.suppress(OSError): asker.sendall(f"{code}\n".encode())
                    asker.close(); os.close(f); del going[f]

def warm_up():
    for name in HEAVY: importlib.import_module(name)
    gc.collect(); gc.freeze()

def work(wanted, files):
    "Takes on what the asker has lent; what is left to do"
    for k, f in enumerate(files): os.dup2(f, k); os.close(f)
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = open(0, closefd=False), open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False), open(2, "w", buffering=1, closefd=False)
    os.chdir(wanted["folder"]); os.environ.clear(); os.environ.update(wanted["env"])
    what, *rest = wanted["line"]
    if what == "kernel":
        os.environ.pop("JPY_PARENT_PID", None)  # the kernel would look whether its parent lives; here the server looks after it
        sys.argv, sys.path[0] = ["ipykernel_launcher", "-f", *rest], ""
        return importlib.import_module("ipykernel.kernelapp").launch_new_instance
    sys.argv, sys.path[0] = [what, *rest], os.path.dirname(sys.executable)
    return importlib.import_module("persona_vectors.cli").main

def leave_after(do):
    "As Python ends, but for taking apart all that the server has imported: that takes longer than most commands"
    try: do(); code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
    except BaseException: sys.excepthook(*sys.exc_info()); code = 1
    threading._shutdown(); atexit._run_exitfuncs(); sys.stdout.flush(); sys.stderr.flush(); os._exit(code)

if __name__ == "__main__": leave_after(serve(sys.argv[2])) if sys.argv[1] == "serve" else sys.exit(ask(*sys.argv[1:]))
