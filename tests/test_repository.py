"""The repository keeps its own rules: export, README, direction of imports, lazy imports, nothing private in it."""
import ast, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
BIN = Path(sys.executable).parent

def run(*args, cwd=ROOT): return subprocess.run([str(a) for a in args], cwd=cwd, capture_output=True, text=True)

def exported(page):
    "The code a notebook exports"
    cells = json.loads(page.read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code" and "".join(c["source"]).startswith("#| export"))

def module_of(page): return re.search(r"#\| default_exp (\S+)", page.read_text().replace("\\n", "\n").replace('"', "\n"))[1]

def test_export_is_in_step(tmp_path):
    for name in ("nbs", "persona_vectors", "settings.ini"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("persona-tiny", "__pycache__", ".ipynb_checkpoints")) if source.is_dir() else shutil.copy(source, tmp_path)
    done = run(BIN / "nbdev_export", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made, kept = ({p.name: p.read_text() for p in (folder / "persona_vectors").glob("*.py")} for folder in (tmp_path, ROOT))
    assert set(made) == set(kept)
    assert [n for n in made if made[n] != kept[n]] == [], "run `make export` and commit notebooks and modules together"

def test_readme_is_in_step():
    done = run(sys.executable, "tools/readme.py", "--check")
    assert done.returncode == 0, done.stdout

@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_imports_point_downwards(page):
    number = {module_of(p): int(p.name[:2]) for p in PAGES}
    tree = ast.parse(exported(page))
    imported = {n.module.split(".")[1] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("persona_vectors.")}
    upward = {m for m in imported if number[m] >= int(page.name[:2])}
    assert not upward, f"{page.name} imports {upward}, which come later"

def test_heavy_packages_enter_at_their_doors():
    "Help and the catalog must not wait for torch"
    for module in ("persona_vectors", "persona_vectors.config", "persona_vectors.catalog", "persona_vectors.responses", "persona_vectors.cli"):
        done = run(sys.executable, "-c", f"import sys, {module}; print([m for m in ('torch', 'transformers', 'plotly', 'sklearn', 'openai') if m in sys.modules])")
        assert done.stdout.strip() == "[]", (module, done.stdout, done.stderr)

def test_modules_need_no_nbdev():
    for path in (ROOT / "persona_vectors").glob("*.py"):
        assert not re.search(r"^\s*(from|import) (fastcore|nbdev)", path.read_text(), re.M), path

def test_every_exported_argument_is_documented():
    "A public function says what each argument is, beside it"
    for page in PAGES:
        source = exported(page); lines = source.splitlines()
        for f in ast.parse(source).body:
            if isinstance(f, ast.FunctionDef) and not f.name.startswith("_") and f.name != "main" and not any(re.search(r"\.(command|callback)\(", ast.unparse(d)) for d in f.decorator_list): # commands say it in their help
                assert ast.get_docstring(f) or f.lineno == f.body[0].lineno, f"{page.name}: {f.name} has no docstring"
                for arg in f.args.args + f.args.kwonlyargs:
                    if f.lineno != arg.lineno: assert "#" in lines[arg.lineno - 1], f"{page.name}: {f.name}: say what {arg.arg} is"

def test_package_is_small_and_complete():
    tiny = ROOT / "persona_vectors/data/persona-tiny"
    assert sum(f.stat().st_size for f in tiny.iterdir()) < 8e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {f.name for f in tiny.iterdir()}

def test_nothing_private_in_tracked_files():
    files = run("git", "ls-files").stdout.split("\n")[:-1] or pytest.skip("not a git checkout")
    private = re.compile(r"sk-[A-Za-z0-9]{20,}|hf_[A-Za-z]{30,}|(?<![\w.])/(?:home|root|Users|work)/[a-z]")
    for name in files:
        path = ROOT / name
        if path.suffix in {".safetensors", ".pt", ".npz", ".png", ".gz"} or not path.exists() or path == Path(__file__): continue
        found = private.search(path.read_text(encoding="utf-8"))
        assert not found, f"{name}: {found[0]}"
