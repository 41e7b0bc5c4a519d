"""Steered personas in vLLM: a plugin that serves checkpoints of `persona_vectors.vllm_export`

Importing it needs nothing; `steering` needs torch and safetensors; `models`, `doses` and `means` need vLLM.
"""
PREFIX = 'PersonaSteered' # Put before the name of an architecture: a vLLM without this plugin does not know it, and refuses

ARCHITECTURES = ('GemmaForCausalLM', 'Gemma2ForCausalLM', 'Gemma3ForCausalLM', 'Glm4ForCausalLM', 'GptOssForCausalLM', 'GraniteForCausalLM', 'LlamaForCausalLM', 'MistralForCausalLM', 'Phi3ForCausalLM', 'Qwen2ForCausalLM', 'Qwen3ForCausalLM', 'Qwen3MoeForCausalLM') # whose blocks in vLLM give back what `steering.steered` expects, as experiments/interop_vllm has measured; there are others that look alike and mean something else
TRANSFORMERS = 'TransformersForCausalLM' # vLLM running the code of transformers, whatever the architecture: a block then gives back the residual stream itself

def register()->None: # vLLM calls this in each of its processes, perhaps more than once
    "Tell vLLM about the steered architectures; nothing is imported before one of them is asked for"
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    for arch in (*ARCHITECTURES, TRANSFORMERS):
        if arch not in ModelRegistry.get_supported_archs(): continue # an older vLLM, which then refuses the steered one as it refuses the plain one
        ModelRegistry.register_model(f'{PREFIX}{arch}', f'persona_steer_vllm.models:{PREFIX}{arch}')
        if arch in MODELS_CONFIG_MAP: MODELS_CONFIG_MAP[f'{PREFIX}{arch}'] = MODELS_CONFIG_MAP[arch] # what vLLM settles by the name of an architecture holds for the steered one too
