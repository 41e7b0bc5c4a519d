"""What `prove.py` asks of vLLM: run by the Python of vLLM's own environment, one process for each question.

    python engine.py question.json answer.safetensors
"""
import gc, json, os, sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

SIZES = dict(dtype="float32", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=512, max_logprobs=-1, skip_tokenizer_init=True)
def asked(n=1, **kw): return SamplingParams(max_tokens=n, temperature=0, logprobs=-1, detokenize=False, ignore_eos=True, **kw)
def row(found): return torch.tensor([found[i].logprob for i in range(len(found))])
def loaded(model, **kw): return LLM(model, **{"enforce_eager": True, **SIZES, **kw})
def prompts_of(ids, **kw): return [dict(prompt_token_ids=p, **kw) for p in ids]

def said(llm, prompts, n, name):
    "Log-probabilities of all words after each token of a prompt but the last, and of `n` greedy steps"
    found = {}
    for i, o in enumerate(llm.generate(prompts_of(prompts), asked(n, prompt_logprobs=-1), use_tqdm=False)):
        found[f"{name}/prompt.{i}"] = torch.stack([row(p) for p in o.prompt_logprobs[1:]])
        found[f"{name}/steps.{i}"] = torch.stack([row(p) for p in o.outputs[0].logprobs])
        found[f"{name}/said.{i}"] = torch.tensor(o.outputs[0].token_ids)
    return found

def logprobs(models, n=6, **kw):
    "{name: folder and prompts} -> what each says"
    found = {}
    for name, o in models.items():
        try: llm = loaded(o["folder"], **kw)
        except Exception as e: print(f"{name}: {type(e).__name__}: {' '.join(str(e).split())[:300]}", flush=True); continue # prove.py sees that it is missing
        found.update(said(llm, o["prompts"], n, name))
        del llm; gc.collect(); cleanup_dist_env_and_memory()
    return found

def sweep(folder, prompts, doses):
    "The same prompts at several doses in one engine: careless, with a salt for each dose, and with set_dose"
    from persona_steer_vllm.doses import WORKER, set_dose
    llm, found = loaded(folder, worker_extension_cls=WORKER, enable_prefix_caching=True), {}
    def first(name, **kw): found[name] = torch.stack([row(o.outputs[0].logprobs[0]) for o in llm.generate(prompts_of(prompts, **kw), asked(), use_tqdm=False)])
    for d in doses: set_dose(llm, d); first(f"reset/{d}")
    set_dose(llm, doses[0])
    for d in doses: llm.collective_rpc("set_persona_dose", args=(d,)); first(f"careless/{d}")
    set_dose(llm, doses[0])
    for d in doses: llm.collective_rpc("set_persona_dose", args=(d,)); first(f"salt/{d}", cache_salt=f"dose {d}")
    return found

def means(models, folder):
    "{name: folder, layers, prompts, n, stop} -> the mean over each answer, and what was said"
    from persona_steer_vllm.means import read_mean, reading
    found = {}
    for name, o in models.items():
        try: llm = loaded(o["folder"], **reading(o["layers"], folder))
        except Exception as e: print(f"{name}: {type(e).__name__}: {' '.join(str(e).split())[:300]}", flush=True); continue
        for i, out in enumerate(llm.generate(prompts_of(o["prompts"]), SamplingParams(max_tokens=o["n"], temperature=0, detokenize=False, ignore_eos=True, stop_token_ids=o.get("stop")), use_tqdm=False)):
            mean, ids = read_mean(out)
            assert ids == list(out.outputs[0].token_ids[:-1])
            found.update({f"{name}/mean.{i}": mean, f"{name}/said.{i}": torch.tensor(out.outputs[0].token_ids)})
        assert not list(Path(folder).iterdir()), "read_mean has left files"
        del llm; gc.collect(); cleanup_dist_env_and_memory()
    return found

if __name__ == "__main__":
    question = json.loads(Path(sys.argv[1]).read_text()); what = question.pop("what")
    save_file({k: v.contiguous() for k, v in dict(logprobs=logprobs, sweep=sweep, means=means)[what](**question).items()}, sys.argv[2])
