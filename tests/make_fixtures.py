"""Make data/test_fixtures: responses by the package, expected vectors by the naive script, in a process of its own."""
import subprocess, sys
from pathlib import Path

from persona_vectors import EVAL_QUESTIONS, PERSONAS, PersonaVectorConfig, generate_responses

ROOT = Path(__file__).resolve().parent.parent
FIXTURES, LAYER = ROOT / "data/test_fixtures", 2

if __name__ == "__main__":
    config = PersonaVectorConfig(model_name="persona-tiny", max_tokens=96, batch_size=64, device="cpu")
    (FIXTURES / "responses_cache.json").unlink(missing_ok=True)
    generate_responses(personas=PERSONAS, questions=EVAL_QUESTIONS, config=config, save_to=FIXTURES / "responses_cache.json")
    for stale in FIXTURES.glob("persona_vectors_layer*.pt"): stale.unlink()
    subprocess.run([sys.executable, ROOT / "tests/naive_reference.py", FIXTURES / "responses_cache.json", FIXTURES / f"persona_vectors_layer{LAYER}.pt", "--layer", str(LAYER)], check=True)
