"""Models of known shape and random weights, for benchmarks where no weights can be had."""
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

def gemma_27b():
    "Gemma 3 27B's text model on the GPU, in bfloat16: 62 blocks of width 5376, 54 GB"
    config = Gemma3TextConfig(vocab_size=262208, hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32, num_key_value_heads=16, head_dim=128, sliding_window=1024, query_pre_attn_scalar=168,
                              bos_token_id=None, eos_token_id=None, pad_token_id=0)
    before = torch.get_default_dtype(); torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"): return Gemma3ForCausalLM(config).eval()
    finally: torch.set_default_dtype(before)
