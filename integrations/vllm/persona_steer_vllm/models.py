"""The steered architectures: each is vLLM's own, with steps after some of its blocks"""
import logging
from pathlib import Path

from vllm import ModelRegistry

from . import ARCHITECTURES, PREFIX, TRANSFORMERS
from .steering import attach, blocks_of, steps_of

log = logging.getLogger('vllm.persona_steer') # below vLLM's own, so that its settings hold

def folder_of(
    config, # vLLM's ModelConfig
)->Path: # With config.json and the steps
    "Where a checkpoint lies, which may be named by a folder or as on the hub"
    if Path(config.model).is_dir(): return Path(config.model)
    from huggingface_hub import snapshot_download
    return Path(snapshot_download(config.model, revision=config.revision, allow_patterns=['config.json', 'persona_steering/*']))

def _steered(arch):
    "vLLM's class for an architecture, steered"
    base = ModelRegistry.models[arch].load_model_cls()
    def __init__(self, *, vllm_config, prefix=''):
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config
        steps = steps_of(config.hf_config, folder_of(config))
        found = attach(blocks_of(self, config.hf_config.get_text_config().num_hidden_layers), steps, vllm_config.device_config.device)
        log.info('steered after layers %s', ', '.join(map(str, sorted(found))) or 'of other machines')
    return type(f'{PREFIX}{arch}', (base,), dict(__init__=__init__, __module__=__name__))

def __getattr__(name): # made when vLLM asks for it: importing one architecture should not import all
    if name.removeprefix(PREFIX) not in (*ARCHITECTURES, TRANSFORMERS) or not name.startswith(PREFIX): raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    globals()[name] = made = _steered(name.removeprefix(PREFIX))
    return made
