"""Every architecture, tiny and random, and its decoder blocks found without code of the package."""
from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

SIZE = dict(vocab_size=6144, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=1)
GPT2 = dict(vocab_size=6144, n_embd=32, n_layer=4, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=1)
WINDOW, MOE = dict(sliding_window=8), dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
ARCHITECTURES = dict(
    llama={}, mistral=WINDOW, mixtral=LOCAL, qwen2=dict(use_sliding_window=True, sliding_window=8, max_window_layers=2), qwen2_moe=dict(MOE, shared_expert_intermediate_size=32), qwen3={}, qwen3_moe=MOE,
    gemma={}, gemma2=WINDOW, gemma3_text=WINDOW, gemma3=None, olmo2={}, olmo3=WINDOW, phi3={}, gpt2=GPT2, gpt_neox={}, gpt_oss=dict(WINDOW, **LOCAL), falcon=dict(vocab_size=6144, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, alibi=True), starcoder2=WINDOW,
    granite={}, cohere={}, cohere2=WINDOW, smollm3={}, stablelm={}, opt=dict(ffn_dim=64, word_embed_proj_dim=32), bloom=dict(vocab_size=6144, hidden_size=32, n_layer=4, n_head=4), phi={}, glm4={}, mpt=dict(vocab_size=6144, d_model=32, n_layers=4, n_heads=4, expansion_ratio=2), mamba=dict(state_size=4))

def config_of(name):
    if name == 'gemma3': return Gemma3Config(text_config=dict(SIZE, **WINDOW), vision_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14))
    own = ARCHITECTURES[name]
    return AutoConfig.for_model(name, **(own if 'vocab_size' in own else {**SIZE, **own}))

@cache
def random_model(name):
    "Weights large enough that every token, position and window counts"
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config_of(name)) if name == 'gemma3' else AutoModelForCausalLM.from_config(config_of(name))
    for p in model.parameters():
        with torch.no_grad(): p.normal_(0, .15) if p.ndim > 1 else p.add_(.1*torch.randn_like(p))
    return model.float().eval()

def block_modules(model, n=4):
    "The decoder blocks, found naively"
    text = model.get_decoder() if hasattr(model, 'get_decoder') else model
    return next(m for _, m in text.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n)
