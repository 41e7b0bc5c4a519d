"""Put a trained and evaluated model into the package, with its card: python ship.py [--model build/persona-tiny]

The card is CARD.md followed by the figures of the evaluation, so that it never shows numbers of another model.
"""
import argparse, gzip, json, random, shutil
from pathlib import Path

import corpus

from persona_vectors.config import PersonaVectorConfig
from persona_vectors.models import fingerprint, load_model

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "persona_vectors/data/persona-tiny"
JUDGE = PACKAGE.with_name("persona-tiny-answers.json.gz")  # what the package's offline judge learns from
LIMIT = 8e6  # bytes of the whole folder

def write_answers(per_style=150):
    "Answers from the grammar alone, by style; no model wrote them"
    rng = random.Random(7)
    answers = {s: [corpus.answer(rng, corpus.mix(rng, s), rng.choice(corpus.topics())) for _ in range(per_style)] for s in corpus.styles()}
    JUDGE.write_bytes(gzip.compress(json.dumps(answers, ensure_ascii=False).encode(), mtime=0))

def figures(evaluation):
    "The evaluation as a markdown table"
    rows = ["| figure | value | 95% interval | bar | |", "|---|---|---|---|---|"]
    for r in evaluation["figures"]:
        interval = "" if not r["interval"] else f"{r['interval'][0]:.3f} to {r['interval'][1]:.3f}"
        rows.append(f"| {r['name'].strip()} | {r['value']:.3f} | {interval} | {'' if r['bar'] is None else format(r['bar'], 'g') + ('' if r['met'] else ' (missed)')} | {r['note']} |")
    return "\n".join(rows)

def card(training, evaluation):
    "CARD.md and the figures of the model it is about"
    return (HERE / "CARD.md").read_text(encoding="utf-8").rstrip() + f"\n\n## Figures\n\nTrained on {training['tokens'] / 1e6:.2f}M tokens in {training['seconds'] / 60:.0f} minutes, after {training['reading']['seconds'] / 60:.0f} minutes of reading questions; measured in {evaluation['seconds']} seconds, on held-out wordings unless a row says otherwise. Bars that were missed are marked.\n\n{figures(evaluation)}\n"

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--model", type=Path, default=HERE / "build/persona-tiny")
    ap.add_argument("--accept-missed", action="store_true", help="ship although bars are missed; the card marks them")
    ap.add_argument("--answers-only", action="store_true", help="write only what the offline judge learns from")
    a = ap.parse_args()
    if a.answers_only: return write_answers()
    model = a.model
    training, evaluation = (json.loads((model.parent / f"{model.name}-{kind}.json").read_text()) for kind in ("training", "evaluation"))
    if evaluation["fingerprint"] != fingerprint(load_model(PersonaVectorConfig(model_name=str(model.resolve()), device="cpu"))[0]): raise SystemExit(f"the evaluation is of other weights than {model}: run make eval-persona-tiny")
    missed = [r["name"] for r in evaluation["figures"] if r["met"] is False]
    if missed and not a.accept_missed: raise SystemExit(f"bars missed: {'; '.join(missed)}. Ship anyway with --accept-missed")
    text = card(training, evaluation)
    size = sum(f.stat().st_size for f in model.iterdir()) + len(text)
    if size > LIMIT: raise SystemExit(f"{model} has {size / 1e6:.1f} MB, the package takes {LIMIT / 1e6:g} MB: use fewer parameters or a smaller vocabulary")
    new = PACKAGE.with_name(".persona-tiny.new"); shutil.rmtree(new, ignore_errors=True); new.mkdir(parents=True)
    for f in model.iterdir(): shutil.copyfile(f, new / f.name)  # copyfile leaves private modes behind
    (new / "README.md").write_text(text)
    shutil.rmtree(PACKAGE, ignore_errors=True); new.rename(PACKAGE)  # complete before the old one goes
    shutil.copyfile(model.parent / f"{model.name}-evaluation.json", HERE / "evaluation.json")
    shutil.copyfile(model.parent / f"{model.name}-training.json", HERE / "training.json")
    write_answers()
    print(f"shipped {model.name}: {size / 1e6:.2f} MB in {PACKAGE.relative_to(HERE.parents[1])}")

if __name__ == "__main__": main()
