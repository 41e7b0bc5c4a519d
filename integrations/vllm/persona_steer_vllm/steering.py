"""What is done to the residual stream after which block: read from a checkpoint, applied to what a block gives back

Two kinds of step: 'add' is `h + k v`, and 'clamp' moves `h` along the unit vector `u` until `<h,u>` lies between two bounds, which is a floor, a ceiling, or both. All of it in float32, cast once at the end.
The arithmetic is that of `persona_vectors.interventions`; tests/test_vllm_export.py holds the two together.
"""
import hashlib, json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

FORMAT, HEADER, KINDS = 1, 'persona_steering', ('add', 'clamp')

class SteeringFileError(ValueError):
    "A checkpoint cannot be steered as it says; the message says why"

# ---------------------------------------------------------------- the file
@dataclass(frozen=True)
class Step:
    "One change after one block"
    layer:int # 0-based block whose output is changed
    kind:str # One of `KINDS`
    vector:Tensor # (d_model,) float32; of length 1 for 'clamp'
    strength:float # Multiple of the vector, or share of what is missing to the bound
    low:float # Least projection; -inf where there is no floor
    high:float # Greatest projection; inf where there is no ceiling

def read_steps(
    path:str|Path, # The .safetensors that `export_vllm` has written
    sha256:str|None=None, # What its bytes hash to, from config.json
    d_model:int|None=None, # Width of the model
    n_layers:int|None=None, # Its depth
)->list[Step]: # In the order in which they are applied; raises SteeringFileError
    "The steps of a checkpoint"
    try: data = Path(path).read_bytes()
    except OSError as e: raise SteeringFileError(f'{path}: cannot be read ({e.strerror}); copy the whole folder of the checkpoint') from None
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256: raise SteeringFileError(f'{path}: sha256 {found[:12]}... is not the {sha256[:12]}... of config.json; export the checkpoint again')
    try:
        header, arrays = _header(data), load(data)
        if header['format'] > FORMAT: raise SteeringFileError(f"{path}: format {header['format']}, this plugin reads up to {FORMAT}; update persona-steer-vllm")
        steps = [_step(s, arrays[f'step.{i}']) for i,s in enumerate(header['steps'])]
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        if isinstance(e, SteeringFileError): raise
        raise SteeringFileError(f'{path}: damaged, or no file of export_vllm ({type(e).__name__}: {e})') from None
    if not steps: raise SteeringFileError(f'{path}: no step in it; serve the plain checkpoint')
    for s in steps: _check(s, path, d_model, n_layers)
    return steps

def _header(data):
    "What the JSON at the start of a safetensors file says about it"
    n = int.from_bytes(data[:8], 'little')
    return json.loads(json.loads(data[8:8 + n])['__metadata__'][HEADER])

def _step(s, v):
    low, high = (float(given) if given is not None else none for given,none in ((s['low'], float('-inf')), (s['high'], float('inf'))))
    return Step(int(s['layer']), s['kind'], v, float(s['strength']), low, high)

def _check(s, path, d_model, n_layers):
    if s.kind not in KINDS: raise SteeringFileError(f'{path}: a step of kind {s.kind!r}; this plugin knows {", ".join(KINDS)}')
    if s.vector.dtype != torch.float32 or s.vector.ndim != 1 or not s.vector.isfinite().all(): raise SteeringFileError(f'{path}: the vector at layer {s.layer} is {s.vector.dtype} of shape {tuple(s.vector.shape)}; finite float32 of shape (d_model,) is needed')
    if d_model not in (None, len(s.vector)): raise SteeringFileError(f'{path}: vectors of width {len(s.vector)}, the model has {d_model}; they belong to another model')
    if s.layer < 0 or n_layers is not None and s.layer >= n_layers: raise SteeringFileError(f'{path}: a step at layer {s.layer}, the model has layers 0 to {n_layers - 1 if n_layers else "?"}')
    if not s.low <= s.high or s.strength != s.strength or abs(s.strength) == float('inf'): raise SteeringFileError(f'{path}: at layer {s.layer}, low={s.low:g}, high={s.high:g}, strength={s.strength:g}')

# ---------------------------------------------------------------- the arithmetic
class Steering(nn.Module):
    "The steps after one block"
    def __init__(self,
        steps:Sequence[Step], # Of one layer, in order
        device:Any='cpu', # Of the block
    ):
        super().__init__()
        self.kinds = tuple(s.kind for s in steps)
        for i,s in enumerate(steps): # numbers are buffers like the vectors: a compiled graph, or a CUDA graph, would keep plain ones for good
            self.register_buffer(f'vector_{i}', s.vector.to(device, torch.float32), persistent=False)
            for name in ('strength', 'low', 'high'): self.register_buffer(f'{name}_{i}', torch.tensor(getattr(s, name), dtype=torch.float32, device=device), persistent=False)
        self.register_buffer('dose', torch.ones((), dtype=torch.float32, device=device), persistent=False) # multiplies every strength; see `doses`

    def forward(self,
        h:Tensor, # (..., d_model) float32
    )->Tensor: # The same, steered
        "All steps in turn"
        at = lambda name, i: getattr(self, f'{name}_{i}')
        for i,kind in enumerate(self.kinds):
            v, k = at('vector', i), self.dose*at('strength', i)
            if kind == 'clamp':
                p = (h*v).sum(-1, keepdim=True) # a sum of products, since a matrix product may be rounded to tf32
                k = k*(p.clamp(at('low', i), at('high', i)) - p)
            h = torch.addcmul(h, k, v)
        return h

# ---------------------------------------------------------------- at a block
def steered(
    block:nn.Module, # With a `persona_steering`
    args:tuple, # What it was called with
    out:Any, # What it gave back: the residual stream, or, as most of vLLM's blocks do, two addends of it
)->Any: # The same kind of thing
    "A forward hook that steers the output of a block"
    steering = block.persona_steering
    if isinstance(out, Tensor): return steering(out.float()).to(out.dtype)
    h, *rest = out
    if not rest or len(rest) == 1 and rest[0] is None: return (steering(h.float()).to(h.dtype), *rest)
    if len(rest) > 1 or rest[0].shape != h.shape: raise TypeError(f'{type(block).__name__} gave back {len(out)} things, which is neither a residual stream nor two addends of it')
    whole = steering(h.float() + rest[0].float())
    return whole.to(h.dtype), torch.zeros_like(rest[0]) # the next block adds the two

def blocks_of(
    model:nn.Module, # Model of vLLM, or of transformers
    n:int, # How many blocks it has
)->nn.ModuleList: # In order; raises SteeringFileError
    "Find the decoder blocks"
    lists = {k:m for k,m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n}
    top = [k for k in lists if not any(k.startswith(f'{o}.') for o in lists)] # a list inside a block is no list of blocks
    if len(top) != 1: raise SteeringFileError(f'{type(model).__name__}: cannot tell which module holds the {n} decoder blocks, candidates: {top or "none"}')
    return lists[top[0]]

def attach(
    blocks:nn.ModuleList, # Of the model, in order
    steps:Iterable[Step], # From `read_steps`
    device:Any='cpu', # Of the blocks
)->dict[int, Steering]: # {layer: what was put there}; undone by removing `persona_steering` and the hook
    "Steer a model for good"
    found:dict[int, list[Step]] = {}
    for s in steps: found.setdefault(s.layer, []).append(s)
    for layer,own in found.items():
        if type(blocks[layer]).__name__ == 'PPMissingLayer': continue # it runs on another machine of the pipeline
        blocks[layer].persona_steering = Steering(own, device)
        blocks[layer].register_forward_hook(steered)
    return {l:blocks[l].persona_steering for l in found if hasattr(blocks[l], 'persona_steering')}

def steps_of(
    config:Any, # config.json of the checkpoint, with its `persona_steering`
    folder:str|Path, # Where the checkpoint lies
)->list[Step]: # From `read_steps`
    "The steps that belong to a config"
    about, text = getattr(config, HEADER, None), config.get_text_config()
    if not isinstance(about, Mapping) or 'file' not in about: raise SteeringFileError(f'{folder}: config.json names a steered architecture and says nothing about {HEADER}; export the checkpoint again')
    return read_steps(Path(folder)/about['file'], about.get('sha256'), text.hidden_size, text.num_hidden_layers)
