"""The command as a newcomer starts it, from nothing."""
import os, shutil, subprocess
from pathlib import Path

import pytest
from commands import COLD

def run(*args, cwd): return subprocess.run([str(COLD), *args], cwd=cwd, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"})

def test_demo_writes_what_it_says_and_says_what_it_wrote(tmp_path):
    done = run("demo", "--no-png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data/demo"
    written = {f.name for f in folder.iterdir()}
    assert {"responses.json", "cosine_matrix.html", "pca.html", "reliability.html"} <= written
    for name in written: assert str(Path("data/demo") / name) in done.stdout
    assert "c = 1.25" in done.stdout and "Next" in done.stdout
    assert "responses:" in done.stderr  # progress is on standard error

@pytest.mark.skipif(not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), reason="PNG files are drawn by Chrome or Chromium, which is not installed")
def test_figures_become_png(tmp_path):
    import plotly.graph_objects as go

    from persona_vectors import save_figure
    html, png = save_figure(go.Figure(go.Scatter(x=[1, 2], y=[1, 2])), tmp_path / "figure")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 5000

def test_errors_are_short_and_leave_nothing(tmp_path):
    done = run("demo", "--steer-to", "gost", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: unknown persona") and "did you mean 'ghost'" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()
