"""Train persona-tiny from scratch on the CPU, at a fixed token count.

    python train.py --out build/persona-tiny           # about 40 minutes on 2 cores

Writes a folder that `from_pretrained` reads: float16 weights, tokenizer with chat template, generation config.
Two full-attention layers early and a short sliding window elsewhere: the persona has to travel in the residual stream (see CARD.md).
"""
import argparse, copy, json, random, time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from corpus import write

HERE = Path(__file__).resolve().parent
ROLES, END, PAD = ("system", "user", "assistant"), "<|end|>", "<|pad|>"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
RESPONSE = dict(defaults=dict(role="assistant"), start_anchor="<|assistant|>", fields=dict(content=dict(close=END, content="text")))  # for servers: without it they parse answers as Qwen's
CONTEXT, IGNORE = 512, -100

def train_tokenizer(texts, vocab_size):
    "Byte-level BPE; every byte is in the vocabulary, so no text is unknown"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [PAD, END, *(f"<|{r}|>" for r in ROLES)]
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=END, pad_token=PAD, additional_special_tokens=special[2:], chat_template=TEMPLATE, response_template=RESPONSE,
                                   clean_up_tokenization_spaces=False, model_max_length=CONTEXT)

def encode(tok, conversations):
    "(ids, response mask) per conversation: the loss counts the assistant's tokens and its <|end|>"
    texts = [m["content"] for c in conversations for m in c]
    pieces = iter(tok(texts, add_special_tokens=False).input_ids)
    role, end = {r: tok.convert_tokens_to_ids(f"<|{r}|>") for r in ROLES}, tok.eos_token_id
    rows = []
    for c in conversations:
        ids, mask = [], []
        for m in c:
            body = next(pieces) + [end]
            ids += [role[m["role"]]] + body; mask += [0] + [int(m["role"] == "assistant")] * len(body)
        rows.append((ids[:CONTEXT], mask[:CONTEXT]))
    return rows

def batches(rows, size, rng):
    "Batches of similar length, shuffled"
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]) // 8, rng.random()))
    groups = [order[i:i + size] for i in range(0, len(order), size)]
    rng.shuffle(groups)
    return groups

def collate(rows, pad):
    width = -(-max(len(ids) for ids, _ in rows) // 16) * 16  # few distinct shapes: the CPU kernels are prepared once for each
    ids = torch.full((len(rows), width), pad); labels = torch.full((len(rows), width), IGNORE)
    for i, (row, mask) in enumerate(rows):
        row = torch.tensor(row); ids[i, :len(row)] = row
        labels[i, :len(row)] = torch.where(torch.tensor(mask).bool(), row, IGNORE)
    return ids, labels

def new_model(tok, a):
    layers = ["full_attention" if i in a.full_layers else "sliding_attention" for i in range(a.layers)]
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tok), hidden_size=a.width, intermediate_size=a.mlp, num_hidden_layers=a.layers, num_attention_heads=a.width // 32, num_key_value_heads=a.width // 32,
        head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=True, use_sliding_window=True, sliding_window=a.window, layer_types=layers,
        bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))

class Muon(torch.optim.Optimizer):
    "Muon (Jordan et al., 2024) in float32, on stacks of equal matrices; torch's own computes in bfloat16, which this CPU does 10 times slower"
    def __init__(self, params, lr, momentum=.95, weight_decay=.05): super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            shapes = {}
            for p in g["params"]: shapes.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), ps in shapes.items():
                grads = torch.stack([p.grad for p in ps])
                buffer = self.state[ps[0]].setdefault("momentum", torch.zeros_like(grads)).lerp_(grads, 1 - g["momentum"])
                update = orthogonal(grads.lerp(buffer, g["momentum"])) * .2 * max(rows, columns) ** .5  # the size of an AdamW step (Liu et al., 2025)
                for p, u in zip(ps, update): p.mul_(1 - g["lr"] * g["weight_decay"]).sub_(u, alpha=g["lr"])

def orthogonal(x, steps=5):
    "Nearest orthogonal matrices of a stack, by Newton and Schulz"
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    y = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = y @ y.mT
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return y if wide is x else y.mT

def new_optimizers(model, lr):
    "Muon for the matrices of the blocks, AdamW for embeddings and norms"
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr=lr, betas=(.9, .97), weight_decay=.05, fused=True)]

def loss_of(model, ids, labels):
    "Cross-entropy on response tokens; logits only where they count. Right padding needs no mask: causal rows never look ahead"
    h = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    target = labels[:, 1:]; keep = target != IGNORE
    return torch.nn.functional.cross_entropy(model.lm_head(h[keep]), target[keep])

def fit(model, rows, pad, tokens, batch=48, lr=5e-3, seed=0, milestones=()):
    "Train in place on `tokens` tokens; milestones: {fraction of the run: call}. Returns what to log"
    rng, total = random.Random(seed), sum(len(ids) for ids, _ in rows)
    optimizers = new_optimizers(model, lr)
    steps, seen, losses, log, marks = int(tokens / total * len(rows) / batch), 0, [], [], sorted(dict(milestones).items())
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / 60, max(0, 1 - s / steps))) for o in optimizers]
    queue, start = [], time.time()
    bar = tqdm(range(steps), unit="step", mininterval=5)
    for step in bar:
        if not queue: queue = batches(rows, batch, rng)
        ids, labels = collate([rows[i] for i in queue.pop()], pad)
        loss = loss_of(model, ids, labels)
        model.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        for o in (*optimizers, *schedules): o.step()
        seen += ids.numel(); losses.append(loss.item())
        if step % 50 == 49:
            recent = sum(losses[-50:]) / 50; log.append((step + 1, seen, round(recent, 4)))
            bar.set_postfix(loss=f"{recent:.3f}", tokens=f"{seen / 1e6:.2f}M", rate=f"{seen / (time.time() - start):.0f}/s")
        if marks and step + 1 >= marks[0][0] * steps: marks.pop(0)[1]()
    return dict(seconds=round(time.time() - start), tokens=seen, loss=log)

@torch.no_grad()
def sharpen(model, factor):
    "Multiply the logits: at temperature t the model then speaks as it did at t / factor, with fewer slips of topic and wording"
    model.model.norm.weight.mul_(factor)

def save(model, tok, out, dtype=torch.float16):
    "float16 on disk, float32 in memory: half the size, the same answers"
    model = copy.deepcopy(model).to(dtype)  # a copy: the training goes on in float32
    model.generation_config.update(do_sample=True, temperature=0.7, max_new_tokens=128, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    model.save_pretrained(out)
    tok.save_pretrained(out)

def parse(arguments=None):
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=HERE / "build/persona-tiny"); ap.add_argument("--tokens", type=float, default=10e6, help="training tokens, prompts included, padding not")
    ap.add_argument("--examples", type=int, default=120_000); ap.add_argument("--seed", type=int, default=0); ap.add_argument("--batch", type=int, default=48)
    ap.add_argument("--lr", type=float, default=5e-3); ap.add_argument("--vocab", type=int, default=4096)
    ap.add_argument("--layers", type=int, default=8); ap.add_argument("--width", type=int, default=160); ap.add_argument("--mlp", type=int, default=448)
    ap.add_argument("--window", type=int, default=16); ap.add_argument("--full-layers", type=int, nargs="*", default=[1, 2])
    ap.add_argument("--checkpoints", type=float, nargs="*", default=[.1, .3, .6], help="fractions of the run at which to save a checkpoint")
    ap.add_argument("--sharpen", type=float, default=1.4, help="the trained model's logits are multiplied by this")
    ap.add_argument("--threads", type=int, default=2)
    return ap.parse_args(arguments)

def main():
    a = parse(); name, folder = a.out.name, a.out.parent
    torch.manual_seed(a.seed); torch.set_num_threads(a.threads)
    corpus = folder / f"corpus-{a.examples}-{a.seed}.jsonl"; folder.mkdir(parents=True, exist_ok=True)
    write(corpus, a.examples, a.seed)
    conversations = [json.loads(line) for line in corpus.open(encoding="utf-8")]
    tok = train_tokenizer((m["content"] for c in conversations for m in c), a.vocab)
    rows = encode(tok, conversations)
    model = new_model(tok, a)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {len(tok)} tokens in the vocabulary, corpus {sum(len(ids) for ids, _ in rows) / 1e6:.2f}M tokens, training on {a.tokens / 1e6:.1f}M")
    log = fit(model, rows, tok.pad_token_id, a.tokens, a.batch, a.lr, a.seed, {f: lambda f=f: save(model, tok, folder / f"{name}-{round(100 * f)}percent") for f in a.checkpoints})
    sharpen(model, a.sharpen); save(model, tok, a.out); save(model, tok, folder / f"{name}-float32", torch.float32)
    (folder / f"{name}-training.json").write_text(json.dumps(dict(arguments={k: v for k, v in vars(a).items() if k != "out"}, **log), indent=1))
    print(f"{log['seconds']} s, {log['tokens'] / 1e6:.2f}M tokens with padding, final loss {log['loss'][-1][2]:.3f}, saved to {a.out}")

if __name__ == "__main__": main()
