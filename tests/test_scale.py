"""Shards survive what happens on clusters: dying workers, actors, nodes and drivers lose nothing finished and count nothing twice.
A process costs more to start than all shards to do, so what need not die runs here."""
import json, os, subprocess, sys, threading, time
from pathlib import Path

import psutil
import pytest
import torch

import persona_vectors.scale as scale
from persona_vectors import load_persona_vectors

ROOT = Path(__file__).resolve().parent.parent
RESPONSES = ROOT / 'data/test_fixtures/responses_cache.json'
FIXTURE = next((ROOT / 'data/test_fixtures').glob('persona_vectors_layer*.pt'))
LAYER = FIXTURE.stem.removeprefix('persona_vectors_layer')
SIZE, SHARDS = 6, 69 # 23 personas x 18 questions

def line(out, folder, *more, responses=RESPONSES): return ['extract', str(responses), '--layer', LAYER, '--size', str(SIZE), '--folder', str(folder), '--out', str(out), *more]
def command(*args): return ['-m', 'persona_vectors.scale', *line(*args)]
def start(*args, **kw): return subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ, OMP_NUM_THREADS='1', RAY_DEDUP_LOGS='0'), **kw)
def torchrun(*args): return start('-m', 'torch.distributed.run', '--nproc_per_node', 2, *args)
def files(folder): return {p.name: p.stat().st_mtime_ns for p in Path(folder).glob('*.safetensors')}

def wait_for(folder, n, process, seconds=120):
    "Until `n` shards are finished"
    end = time.time() + seconds
    while len(files(folder)) < n:
        assert process.poll() is None and time.time() < end, process.communicate()[0][-3000:]
        time.sleep(.02)

def finish(process, seconds=180): out = process.communicate(timeout=seconds)[0]; return process.returncode, out

@pytest.fixture(scope='module')
def expected(tmp_path_factory):
    "One process, nobody dies"
    folder = tmp_path_factory.mktemp('one')
    scale.app(line(folder / 'v.safetensors', folder / 'shards'), standalone_mode=False)
    assert len(files(folder / 'shards')) == SHARDS
    return load_persona_vectors(folder / 'v.safetensors')

def same(path, expected):
    got = load_persona_vectors(path)
    assert set(got) == set(expected)
    for name in expected: torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)

def test_one_process_equals_the_naive_script(expected):
    "The shards, against the fixture of a script that knows neither shards nor hooks"
    naive = torch.load(FIXTURE, weights_only=True)
    assert set(naive) == set(expected)
    for name in naive: torch.testing.assert_close(expected[name], naive[name], rtol=1e-4, atol=1e-4)

def test_torchrun_worker_killed(tmp_path, expected):
    shards, out = tmp_path / 'shards', tmp_path / 'v.safetensors'
    first = torchrun(*command(out, shards)); wait_for(shards, 4, first)
    workers = [p for p in psutil.Process(first.pid).children(recursive=True) if 'persona_vectors.scale' in ' '.join(p.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    code, text = finish(first)
    assert code != 0 and not out.exists(), text[-3000:]
    kept = files(shards)
    assert 4 <= len(kept) < SHARDS
    code, text = finish(torchrun(*command(out, shards)))
    assert code == 0 and 'worker 1 of 2' in text and 'worker 2 of 2' in text, text[-3000:]
    assert len(files(shards)) == SHARDS and kept.items() <= files(shards).items()
    same(out, expected)

def test_damaged_response_fails_with_a_code(tmp_path, monkeypatch):
    rows = json.loads(RESPONSES.read_text()); rows[100]['response'] = '<|end|>'
    bad = tmp_path / 'bad.json'; bad.write_text(json.dumps(rows))
    monkeypatch.setattr(sys, 'argv', ['scale', *line(tmp_path / 'v.safetensors', tmp_path / 'shards', responses=bad)])
    with pytest.raises(SystemExit, match='control token'): scale.main() # a text is exit code 1
    assert not (tmp_path / 'v.safetensors').exists()

# ---------------------------------------------------------------- Ray
ray = pytest.importorskip('ray', reason="Ray is not installed: pip install 'persona-steer[ray]'")

def actors(): return [p for p in psutil.process_iter(['cmdline', 'pid']) if 'ray::_Worker' in ' '.join(p.info['cmdline'] or [])]

@pytest.fixture
def nodes():
    "A cluster of two nodes, and the driver is this process"
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, include_dashboard=False))
    workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    try: yield cluster, workers
    finally: ray.shutdown(); cluster.shutdown()

def test_ray_actor_driver_and_node_killed(tmp_path, expected, request, monkeypatch, capsys):
    shards, out = tmp_path / 'shards', tmp_path / 'v.safetensors'
    before = {p.pid for p in actors()}
    first = start(*command(out, shards, '--ray', 'local', '--workers', '2')); wait_for(shards, 3, first)
    next(p for p in actors() if p.pid not in before).kill() # Ray starts another in its place
    wait_for(shards, 12, first)
    tree = psutil.Process(first.pid).children(recursive=True)
    first.kill(); first.wait()
    kept = files(shards)
    for p in tree: # what a killed driver leaves behind on its own machine
        if p.is_running(): p.kill()
    assert 12 <= len(kept) < SHARDS and not out.exists()

    cluster, workers = request.getfixturevalue('nodes')
    assert sum(n['Alive'] for n in ray.nodes()) == 3 and ray.cluster_resources()['CPU'] == 2
    at = []
    def remove():
        while len(files(shards)) < len(kept) + 6: time.sleep(.01)
        cluster.remove_node(workers[0], allow_graceful=False); at.append(len(files(shards))) # for good: its worker finds no other place
    killer = threading.Thread(target=remove, daemon=True); killer.start()
    monkeypatch.setattr(scale, 'PATIENCE', 3)
    scale.app(line(out, shards, '--ray', 'auto', '--workers', '2'), standalone_mode=False)
    killer.join(30)
    assert len(kept) + 6 <= at[0] < SHARDS
    assert '23 vectors from 414 responses' in capsys.readouterr().out
    assert len(files(shards)) == SHARDS and kept.items() <= files(shards).items()
    same(out, expected)
