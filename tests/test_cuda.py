"""The same numbers on a GPU: means and steered words, against the CPU and hooks of the test's own. CI has no GPU; run it where there is one."""
import copy, sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from architectures import block_modules, random_model
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.generation import generate_local
from persona_vectors.interventions import Add, Floor, RotateTowards
from persona_vectors.models import load_model
from persona_vectors.reading import Reader, Row
from persona_vectors.steering import steer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: these tests compare a GPU with the CPU")
SOME = ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "mixtral")

def on(device, name, dtype=torch.float32): return copy.deepcopy(random_model(name)).to(device, dtype)

def talks(n=12):
    "Rows that share beginnings, as personas and questions make them"
    draw = torch.Generator().manual_seed(0)
    def ids(k): return torch.randint(5, 4000, (k,), generator=draw).tolist()
    heads = [ids(20 + 7 * k) for k in range(3)]
    rows = [h + ids(9) + ids(5 + k) for h in heads for k in range(n // 3)]
    return [Row(r, list(range(len(r) - 5, len(r)))) for r in rows]

@torch.no_grad()
def naive(model, row, layer):
    "One row alone on the CPU: no padding, no mask, a hook that keeps the block's output"
    kept = []
    handle = block_modules(model)[layer].register_forward_hook(lambda m, i, o: kept.append(o[0] if isinstance(o, tuple) else o))
    try: model(torch.tensor([row.ids]), use_cache=False)
    finally: handle.remove()
    return kept[0][0, row.at].float().mean(0)

@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-4), (torch.bfloat16, .05)), ids=("float32", "bfloat16"))
def test_means_are_those_of_the_cpu(name, dtype, bound):
    if dtype == torch.bfloat16 and name == "mixtral": pytest.skip("rounding sends tokens to other experts")
    rows, found = talks(), {}
    for batch, values in Reader(on("cuda", name, dtype), [1, 2], budget=150)(rows): found |= dict(zip(batch, values))
    for i, row in enumerate(rows):
        for k, layer in enumerate((1, 2)):
            right = naive(random_model(name), row, layer)
            assert (found[i][k] - right).norm() < bound * right.norm()

@pytest.mark.parametrize("name", SOME)
def test_steered_words_are_those_of_the_cpu(name):
    v = torch.randn(32, generator=torch.Generator().manual_seed(1)); ids = torch.tensor([talks()[0].ids])
    def says(device):
        model = on(device, name)
        with steer(model, Add(v, 1.5, 1), Floor(v, .5, [2]), RotateTowards(v, 5., 3)) as audit: out = model.generate(ids.to(device), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        return out.tolist(), audit.table()
    (said, here), (right, there) = says("cuda"), says("cpu")
    assert said == right
    for a, b in zip(here, there): assert {k: pytest.approx(x, rel=1e-3, abs=1e-3) if isinstance(x, float) else x for k, x in b.items()} == a

def test_persona_tiny_answers_as_on_the_cpu():
    chats = [[dict(role="user", content=q)] for q in ("How do I bake bread?", "What should I do when it rains?", "Is it good to be alone?")]
    v = torch.randn(160, generator=torch.Generator().manual_seed(4))
    def says(device):
        model, tokenizer = load_model(PersonaVectorConfig(model_name="persona-tiny", device=device, dtype="float32"))
        with steer(model, Add(v, .2, 3)): return generate_local(model, tokenizer, chats, max_tokens=24, temperature=0)
    assert says("cuda") == says("cpu")
