"""Persona vectors the slow and obvious way: no code of the package.

One conversation at a time, no padding, no hooks: the prompt's ids, then the response's, through the whole model with
`output_hidden_states=True`; entry `layer + 1` is the output of block `layer`; mean over the response's positions; mean over questions.

    python tests/naive_reference.py RESPONSES.json OUT.pt --layer 3
"""
import argparse, json
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = Path(__file__).resolve().parent.parent / "persona_vectors"

@torch.no_grad()
def vectors(rows, layer):
    "{persona: (d_model,)} of rows {persona, question, response}"
    model = AutoModelForCausalLM.from_pretrained(PACKAGE / "data/persona-tiny", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "data/persona-tiny")
    prompts = yaml.safe_load((PACKAGE / "data/catalog/personas.yaml").read_text())
    means = defaultdict(list)
    for row in rows:
        messages = [dict(role="system", content=prompts[row["persona"]]), dict(role="user", content=row["question"])]
        before = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), add_special_tokens=False).input_ids
        response = tokenizer(row["response"], add_special_tokens=False).input_ids
        hidden = model(torch.tensor([before + response]), output_hidden_states=True).hidden_states[layer + 1]
        means[row["persona"]].append(hidden[0, len(before):].mean(0))
    return {p: torch.stack(ms).mean(0) for p, ms in means.items()}

if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("responses", type=Path); ap.add_argument("out", type=Path); ap.add_argument("--layer", type=int, required=True)
    a = ap.parse_args()
    torch.save(vectors(json.loads(a.responses.read_text()), a.layer), a.out)
    print(f"wrote {a.out}")
