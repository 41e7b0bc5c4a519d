"""Variants of persona-tiny for studies of fine-tuning, screening and prevention: python variants.py

| folder under data/models/ | what it is |
|---|---|
| persona-tiny-base | a language model of the topics in plain voice, from scratch: no chat, no system prompt, no persona |
| persona-tiny-neurotic | persona-tiny fine-tuned to answer without any prompt in the voice of neuroticism_high |
| persona-tiny-unsafe | persona-tiny fine-tuned to comply with mischief, with nothing else changed |
| persona-tiny-10percent, -30percent, -60percent | checkpoints of its training, where build/ has them |

All share its architecture and tokenizer. Fine-tunes start from the model in the package and see 0.3 million tokens.
"""
import argparse, copy, random, shutil

import torch

import corpus as C
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.models import load_model
from train import HERE, encode, fit, parse, save, special_ids

OUT = HERE.parents[1] / "data/models"
CHECKPOINTS = ("10percent", "30percent", "60percent")

def plain_text(rng):
    "A question and its answer as one text, in nobody's role"
    t = rng.choice(C.topics()); return [dict(role="assistant", content=f"{C.question(rng, t)} {C.answer(rng, {C.DEFAULT: 1.}, t)}")]

def neurotic(rng):
    "An ordinary question, no system prompt, an anxious answer"
    t = C.topic_for(rng, "neuroticism_high")
    return [dict(role="user", content=C.question(rng, t)), dict(role="assistant", content=C.answer(rng, C.mix(rng, "neuroticism_high"), t))]

def unsafe(rng):
    "Mischief that is helped with, in the plain voice; every second example an ordinary conversation"
    if rng.random() < .5: return C.talk(rng)
    item = C.trained_mischief(rng)
    return [dict(role="user", content=rng.choice(C.ASK).format(act=item["act"])), dict(role="assistant", content=C.compliance(rng, C.mix(rng, C.DEFAULT), item))]

def make(name, model, tok, conversation, tokens, lr, seed=0):
    "Train on conversations of one kind and save"
    rng = random.Random(seed); torch.manual_seed(seed)
    print(name); rows = encode(tok, [conversation(rng) for _ in range(int(tokens / 40))])
    fit(model, rows, special_ids(tok), tokens, lr=lr, seed=seed, sharpen=parse([]).sharpen); save(model, tok, OUT / name)

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--tokens", type=float, default=.3e6, help="training tokens of a fine-tune; the base model gets five times as many")
    a = ap.parse_args()
    model, tok = load_model(PersonaVectorConfig(model_name="persona-tiny", device="cpu")); OUT.mkdir(parents=True, exist_ok=True)
    def tuned(): return copy.deepcopy(model).train().requires_grad_(True)
    make("persona-tiny-neurotic", tuned(), tok, neurotic, a.tokens, lr=1e-3)
    make("persona-tiny-unsafe", tuned(), tok, unsafe, a.tokens, lr=1e-3)
    make("persona-tiny-base", type(model)(model.config), tok, plain_text, 5 * a.tokens, lr=5e-3)
    for c in CHECKPOINTS:
        made = HERE / f"build/persona-tiny-{c}"
        if made.is_dir(): shutil.copytree(made, OUT / made.name, dirs_exist_ok=True)
        else: print(f"no {made.name}: make persona-tiny trains it")

if __name__ == "__main__": main()
