"""Two questions about cost: does it grow linearly at constant memory, and what does reading while generating add?

    python growth.py                    # about 3 minutes on 2 cores; writes growth.json and growth.png
"""
import gc, json, random, time
from pathlib import Path

from plotly.subplots import make_subplots

from bench import HERE, peak, used
from persona_vectors.catalog import EVAL_QUESTIONS, PERSONAS
from persona_vectors.chat import conversation
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.extraction import ActivationExtractor, extract_moments
from persona_vectors.generation import generate_local, sampling_of
from persona_vectors.online import generate_and_extract

def talks(n, seed=0):
    rng = random.Random(seed); names = list(PERSONAS); words = "the old house has a door that nobody opens and a lamp which burns all night".split()
    return {p: [conversation(rng.choice(EVAL_QUESTIONS), PERSONAS[p], " ".join(rng.choices(words, k=rng.randint(20, 60))).capitalize() + ".") for _ in range(n // len(names))] for p in names}

def grow(extractor, sizes=(1000, 4000, 16000)):
    "Seconds and memory of moments of 23 groups, all layers"
    extract_moments(extractor, talks(230), progress=False); rows = []
    for n in sizes:
        groups = talks(n); gc.collect(); Path("/proc/self/clear_refs").write_text("5"); before, t0 = used(), time.perf_counter()
        extract_moments(extractor, groups); rows.append(dict(examples=sum(map(len, groups.values())), seconds=round(time.perf_counter() - t0, 2), megabytes=round((peak() - before) / 1e6, 1)))
        print(rows[-1], flush=True)
    return rows

def listen(extractor, rounds=5):
    "Seconds of generating, and of generating and reading, interleaved"
    chats = [conversation(q, PERSONAS[p]) for p in list(PERSONAS)[:8] for q in EVAL_QUESTIONS[:16]]; plain, both = [], []
    for _ in range(rounds):
        t0 = time.perf_counter(); texts = generate_local(extractor.model, extractor.tokenizer, chats, **sampling_of(extractor.config)); plain.append(time.perf_counter() - t0)
        t0 = time.perf_counter(); same, _ = generate_and_extract(extractor, chats, progress=False); both.append(time.perf_counter() - t0)
        assert same == texts
    print(f"generating {min(plain):.2f} s, with reading {min(both):.2f} s: {min(both) / min(plain) - 1:+.1%}")
    return dict(generate=plain, generate_and_extract=both, overhead=min(both) / min(plain) - 1)

def picture(rows):
    "Linear axes, so that a straight line through zero is linear growth; beside memory, what keeping every activation would take"
    fig = make_subplots(1, 2, subplot_titles=("seconds", "megabytes beyond the model")); x = [r["examples"] for r in rows]
    fig.add_scatter(x=[0, *x], y=[0, *(r["seconds"] for r in rows)], mode="lines+markers", row=1, col=1, showlegend=False)
    fig.add_scatter(x=[0, x[-1]], y=[0, x[-1] * 8 * 160 * 4 / 1e6], mode="lines", line_dash="dot", line_color="#888", name="every activation kept (computed)", row=1, col=2)
    fig.add_scatter(x=x, y=[r["megabytes"] for r in rows], mode="lines+markers", line_color="#d62728", name="moments (measured)", row=1, col=2)
    fig.update_xaxes(title="responses", tickformat=","); fig.update_yaxes(rangemode="tozero")
    fig.update_layout(template="simple_white", width=900, height=380, legend=dict(x=.58, y=.98), title="Moments of 23 groups at 8 layers: time is linear, memory hardly grows")
    fig.write_image(HERE / "growth.png")

def main():
    extractor = ActivationExtractor(PersonaVectorConfig(model_name="persona-tiny", device="cpu", max_tokens=96, batch_size=64))
    listening, rows = listen(extractor), grow(extractor)
    (HERE / "growth.json").write_text(json.dumps(dict(growth=rows, listening=listening), indent=1) + "\n"); picture(rows)

if __name__ == "__main__": main()
