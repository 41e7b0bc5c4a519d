"""Models of known shape and random weights, for benchmarks where no weights can be had."""
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

def gemma_27b():
    "Gemma 3 27B's text model on the GPU, in bfloat16: 62 blocks of width 5376, 54 GB"
    return _gemma("cuda", vocab_size=262208, hidden_size=5376, intermediate_size=21504, num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168)

def gemma_thin():
    "Its 62 blocks so narrow that next to nothing is computed: what is left is Python and the start of each operation, which is what a GPU waits for in eager decoding"
    return _gemma("cpu", vocab_size=32000, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16)

def _gemma(device, **sizes):
    config = Gemma3TextConfig(**sizes, num_hidden_layers=62, sliding_window=1024, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    before = torch.get_default_dtype(); torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device): return Gemma3ForCausalLM(config).eval()
    finally: torch.set_default_dtype(before)
