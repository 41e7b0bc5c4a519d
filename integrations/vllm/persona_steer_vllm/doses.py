"""Turn all strengths of a steered checkpoint up or down, in one engine: a sweep need not load the model again"""
from typing import Any

WORKER = 'persona_steer_vllm.doses.DoseWorker' # For LLM(..., worker_extension_cls=WORKER)

class DoseWorker:
    "What a worker of vLLM learns"
    def set_persona_dose(self, dose:float)->list[int]: # The layers that have it now
        "Multiply every strength of the checkpoint by `dose`"
        found = [(name, m.persona_steering) for name,m in self.model_runner.get_model().named_modules() if hasattr(m, 'persona_steering')]
        for _,steering in found: steering.dose.fill_(dose) # in place, where a CUDA graph reads it
        return [int(next(p for p in reversed(name.split('.')) if p.isdigit())) for name,_ in found]

def set_dose(
    llm:Any, # vllm.LLM(checkpoint, worker_extension_cls=WORKER) that is not generating
    dose:float, # 1 is the checkpoint as it is, 0 not steered at all
)->list[int]: # The layers that are steered, of all workers; raises RuntimeError where nothing was changed
    "Multiply all strengths, and forget what was computed with the last ones"
    if not llm.reset_prefix_cache(): raise RuntimeError('the engine is busy, and its cache, computed at another dose, cannot be dropped; wait for the answers, then call set_dose again')
    layers = sorted({l for own in llm.collective_rpc('set_persona_dose', args=(float(dose),)) for l in own})
    if not layers: raise RuntimeError('this model has no steered layer; load a checkpoint of export_vllm')
    return layers
