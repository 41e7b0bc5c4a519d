"""Response means read while vLLM generates: of all the residual stream, only the mean over each answer's tokens is kept

vLLM's own `extract_hidden_states` keeps the chosen layers of each token beside the KV cache; the connector here averages them when an answer is finished, on the device, and writes `n_layers x d_model` numbers instead of one row per token.
"""
import fcntl, os, time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector, PendingSave

@dataclass
class _Answer(PendingSave):
    "A finished answer, on its way from the scheduler to the worker"
    start:int=0 # Tokens of its prompt

class _Done:
    "A copy that is not waited for"
    def query(self)->bool: return True

class ResponseMeans(ExampleHiddenStatesConnector):
    "A KV connector that writes the mean over each answer"
    def request_finished(self, request, block_ids):
        kept, where = super().request_finished(request, block_ids)
        p = self._pending_saves.get(request.request_id)
        if p is None: return kept, where
        ids = torch.tensor(list(request.all_token_ids)[:-1]) # the last one was said, and never read
        self._pending_saves[request.request_id] = _Answer(p.req_id, p.filename, ids, p.block_ids, request.num_prompt_tokens)
        return kept, where

    def _submit_async_write(self, p):
        "Average and write; a few numbers, so nothing is gained by doing it later"
        if not self._is_tp_rank_zero: return
        ids = p.token_ids[p.start:]
        mean = _mean(self._kv_cache, p.block_ids, p.start, len(p.token_ids), self._block_size)
        Path(p.filename).parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(mean=mean.cpu(), token_ids=ids), p.filename)
        if (lock := self._lock_fds.pop(p.req_id, None)) is not None: os.close(lock) # whoever waits for the file may read it now
        self._req_copy_events[p.req_id] = _Done()

def _mean(cache, block_ids, start, stop, size):
    "(n_layers, d_model) float32 mean over tokens `start` to `stop` of (n_blocks, n_layers, block, d_model); NaN for no tokens"
    at = torch.arange(start, stop)
    blocks, rows = torch.tensor(block_ids)[at//size].to(cache.device), (at % size).to(cache.device)
    return torch.stack([cache[blocks, l, rows].float().mean(0) for l in range(cache.shape[1])]) # a layer at a time: all of a long answer in float32 would be large

def reading(
    layers:Sequence[int], # 0-based blocks, whose outputs are averaged
    folder:str|Path, # Where a file per answer waits until `read_mean` takes it
)->dict[str, Any]: # For LLM(model, **reading(...)), or as JSON for the options of the same names of `vllm serve`
    "What makes vLLM keep response means"
    ids = [l + 1 for l in layers] # vLLM counts the embeddings as 0
    if not ids or ids != sorted(set(ids)) or ids[0] < 1: raise ValueError(f'layers={list(layers)}: 0-based blocks, in order, each once; vLLM gives them back in order')
    return dict(speculative_config=dict(method='extract_hidden_states', num_speculative_tokens=1, draft_model_config=dict(hf_config=dict(eagle_aux_hidden_state_layer_ids=ids))),
                kv_transfer_config=dict(kv_connector='ResponseMeans', kv_connector_module_path='persona_steer_vllm.means', kv_role='kv_producer', kv_connector_extra_config=dict(shared_storage_path=str(folder))))

def read_mean(
    output:Any, # A RequestOutput of vLLM, or the path that a server has put in `kv_transfer_params`
    timeout:float=60, # Seconds to wait for the file; it is there moments after the answer
)->tuple[Tensor, list[int]]: # ((n_layers, d_model) float32, ids of the tokens it is the mean of)
    "The mean of one answer; its file is removed. Raises TimeoutError"
    path = output if isinstance(output, (str, Path)) else output.kv_transfer_params['hidden_states_path']
    end = time.monotonic() + timeout
    with open(f'{path}.lock') as lock:
        while not _free(lock):
            if time.monotonic() > end: raise TimeoutError(f'{path} was not written in {timeout:g} s; an engine inside this process (VLLM_ENABLE_V1_MULTIPROCESSING=0) stops before the last answers are written, so let it have its own')
            time.sleep(.01)
    found = load_file(path)
    for name in (path, f'{path}.lock'): Path(name).unlink()
    return found['mean'], found['token_ids'].tolist()

def _free(lock):
    "Whether the writer has let go of it: the file is whole then"
    try: fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError: return False
    return True
