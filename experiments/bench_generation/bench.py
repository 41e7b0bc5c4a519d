"""How fast are answers generated? Ours beside a plain padded loop and transformers' continuous batching, on persona-tiny.

    python bench.py        # about 10 minutes on 2 cores; writes results.json

414 prompts (23 personas x 18 questions, in random order), at most 128 tokens each, sampled at temperature 0.7. Each method may choose its
batch size. Greedy answers of all methods are compared before anything is counted. Methods take turns, and the best of three counts.
"""
import datetime, json, platform, random, time
from pathlib import Path

import torch
from transformers import GenerationConfig

from persona_vectors.catalog import EVAL_QUESTIONS, PERSONAS
from persona_vectors.chat import chat_prompt, conversation
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.generation import iter_batches
from persona_vectors.models import load_model

HERE, LONGEST, SIZES, ROUNDS = Path(__file__).resolve().parent, 128, (8, 16, 32, 64, 128, 207), 3
model, tokenizer = load_model(PersonaVectorConfig(model_name="persona-tiny", device="cpu"))
PROMPTS = [chat_prompt(tokenizer, conversation(q, s)) for s in PERSONAS.values() for q in EVAL_QUESTIONS]
random.Random(0).shuffle(PROMPTS)
END, PAD = tokenizer.eos_token_id, tokenizer.pad_token_id

def ended(row): return row[:row.index(END)] if END in row else row

@torch.inference_mode()
def plain(size, temperature):
    "Padded batches in the order given; all rows go on until the last has ended"
    sampling, out = dict(do_sample=True, temperature=temperature) if temperature else dict(do_sample=False), []
    for i in range(0, len(PROMPTS), size):
        batch = PROMPTS[i:i + size]; width = max(map(len, batch))
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in batch]); mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        out += [ended(r) for r in model.generate(ids, attention_mask=mask, max_new_tokens=LONGEST, pad_token_id=PAD, **sampling)[:, width:].tolist()]
    return out

def ours(size, temperature):
    out = [None] * len(PROMPTS)
    for batch, ids in iter_batches(model, tokenizer, PROMPTS, max_tokens=LONGEST, temperature=temperature, batch_size=size):
        for i, row in zip(batch, ids.tolist()): out[i] = ended(row)
    return out

def continuous(tokens, temperature):
    "transformers' paged batches of up to `tokens` tokens; its own choice of memory would take the whole machine"
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    sampling = dict(do_sample=True, temperature=temperature) if temperature else dict(do_sample=False)
    found = model.generate_batch(PROMPTS, generation_config=GenerationConfig(max_new_tokens=LONGEST, eos_token_id=END, pad_token_id=PAD, **sampling),
                                 continuous_batching_config=ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=tokens), progress_bar=False)
    return [ended(o.generated_tokens) for o in sorted(found.values(), key=lambda o: int(o.request_id.split("_")[-1]))]

METHODS = dict(plain=(plain, SIZES), ours=(ours, SIZES), continuous=(continuous, (128, 256)))

def timed(method, size): start = time.time(); out = method(size, .7); return time.time() - start, sum(map(len, out))

if __name__ == "__main__":
    expected, same = plain(16, 0), {}
    for name, (method, sizes) in METHODS.items(): same[name] = sum(a == b for a, b in zip(method(sizes[-1], 0), expected))
    print("greedy answers equal to the plain loop's, of 414:", same)
    best = {}
    for _ in range(ROUNDS):
        for name, (method, sizes) in METHODS.items():
            for size in sizes:
                seconds, tokens = timed(method, size)
                best[name, size] = min(best.get((name, size), (1e9, 0)), (seconds, tokens))
                print(f"{name:10} {size:4} {seconds:6.1f} s {tokens / seconds:6.0f} tokens/s", flush=True)
    chosen = {name: min((best[name, s][0], s) for s in sizes) for name, (_, sizes) in METHODS.items()}
    result = dict(date=str(datetime.date.today()), machine=f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", same=same,
                  seconds={f"{n} {s}": round(t, 2) for (n, s), (t, _) in best.items()}, tokens={f"{n} {s}": k for (n, s), (_, k) in best.items()},
                  chosen={n: dict(size=s, seconds=round(t, 2), times_plain=round(chosen["plain"][0] / t, 2)) for n, (t, s) in chosen.items()},
                  at_equal_size={s: round(best["plain", s][0] / best["ours", s][0], 2) for s in SIZES})
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    for n, c in result["chosen"].items(): print(f"{n}: best at {c['size']}, {c['seconds']} s, {c['times_plain']} times the plain loop's speed")
