"""Train persona-tiny from scratch on the CPU, at a fixed token count.

    python train.py --out build/persona-tiny           # about 40 minutes on 2 cores

Writes a folder that `from_pretrained` reads: float16 weights, tokenizer with chat template, generation config.
Two full-attention layers early and a short sliding window elsewhere: the persona has to travel in the residual stream (see CARD.md).
"""
import argparse, copy, json, random, time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, rms_norm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from corpus import ASK, MISCHIEF, question, speaker, topics, trained_mischief, wordings, write

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
CONTEXT, IGNORE, UNKNOWN = 512, -100, -1

def subjects(): return [*(t["name"] for t in topics()), MISCHIEF]

def train_tokenizer(texts, vocab_size):
    "Byte-level BPE; every byte is in the vocabulary, so no text is unknown"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [PAD, END, *(f"<|{r}|>" for r in ROLES)]
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=END, pad_token=PAD, additional_special_tokens=special[2:], chat_template=TEMPLATE, response_template=RESPONSE,
                                   clean_up_tokenization_spaces=False, model_max_length=CONTEXT)

def special_ids(tok):
    "Tokens that are no text, padding first"
    return torch.tensor(tok.convert_tokens_to_ids([PAD, END, *(f"<|{r}|>" for r in ROLES)]))

def encode(tok, conversations):
    """(ids, topics) per conversation. topics: what is talked about, an index into `subjects()`, for the assistant's tokens and its <|end|>, which the loss
    counts; UNKNOWN where nobody says; IGNORE for all that is not the assistant's"""
    number = {name: i for i, name in enumerate(subjects())}
    texts = [m["content"] for c in conversations for m in c]
    pieces = iter(tok(texts, add_special_tokens=False).input_ids)
    role, end = {r: tok.convert_tokens_to_ids(f"<|{r}|>") for r in ROLES}, tok.eos_token_id
    rows = []
    for c in conversations:
        ids, topics = [], []
        for m in c:
            body = next(pieces) + [end]
            ids += [role[m["role"]]] + body; topics += [IGNORE] + [number.get(m.get("topic"), UNKNOWN) if m["role"] == "assistant" else IGNORE] * len(body)
        rows.append((ids[:CONTEXT], topics[:CONTEXT]))
    return rows

def batches(rows, size, rng):
    "Batches of similar length, shuffled"
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]) // 8, rng.random()))
    groups = [order[i:i + size] for i in range(0, len(order), size)]
    rng.shuffle(groups)
    return groups

def collate(rows, pad):
    "(batch, seq) ids and topics, padded on the right"
    width = -(-max(len(ids) for ids, _ in rows) // 16) * 16  # few distinct shapes: the CPU kernels are prepared once for each
    ids = torch.full((len(rows), width), pad); topics = torch.full((len(rows), width), IGNORE)
    for i, (row, topic) in enumerate(rows): ids[i, :len(row)] = torch.tensor(row); topics[i, :len(row)] = torch.tensor(topic)
    return ids, topics

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

def new_optimizers(model, reader, lr):
    "Muon for the matrices of the blocks, AdamW for embeddings, norms and the reader"
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n] + list(reader.parameters() if reader else [])
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr=lr, betas=(.9, .97), weight_decay=.05, fused=True)]

def falling(optimizers, steps):
    "Learning rates that climb for 60 steps, then fall to 0"
    return [torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / 60, max(0, 1 - s / steps))) for o in optimizers]

class TopicReader(torch.nn.Linear):
    """Names the topic of an answer from the residual stream after `block`, where the answer's tokens are predicted; thrown away when the training is over.
    Its loss makes the blocks that see the whole question say early what it is about"""
    def __init__(self, width, block, share): super().__init__(width, len(subjects())); self.block, self.share = block, share
    def loss(self, h, topics): return self.share * cross_entropy(self(rms_norm(h, h.shape[-1:])), topics, ignore_index=UNKNOWN)

def loss_of(model, ids, topics, sharpen=1., reader=None):
    """(cross-entropy on response tokens, loss of the `reader` or 0); logits only where they count. Right padding needs no mask: causal rows never look ahead.
    What is trained is logits / `sharpen`: at temperature t the model then speaks as it would at t / sharpen, with fewer slips"""
    out = model.model(ids, use_cache=False, output_hidden_states=bool(reader))
    counts = topics[:, 1:] != IGNORE
    def states(h): return h[:, :-1][counts]
    words = cross_entropy(model.lm_head(states(out.last_hidden_state)) / sharpen, ids[:, 1:][counts])
    return words, reader.loss(states(out.hidden_states[reader.block + 1]), topics[:, 1:][counts]) if reader else torch.zeros(())

@contextmanager
def first_blocks(model, n):
    "Inside, `model.model` gives the residual stream after its first `n` blocks"
    inner = model.model; layers, norm = inner.layers, inner.norm
    inner.layers, inner.norm, inner.config.num_hidden_layers = layers[:n], torch.nn.Identity(), n
    try: yield inner
    finally: inner.layers, inner.norm, inner.config.num_hidden_layers = layers, norm, len(layers)

def blanked(ids, where, drop, special):
    "A share of the tokens `where` is not 0 replaced by padding, so that what is asked must be known by more than one word"
    return torch.where((torch.rand(ids.shape) < drop) & (where != 0) & ~torch.isin(ids, special), special[0], ids)

def trained_questions(rng):
    "[(question, what it is about)]: every trained wording, as many of frames, and a share of mischief"
    asked = [(q, t) for t, qs in wordings().items() for q in qs]
    asked += [(question(rng, t), t["name"]) for t in topics() for _ in range(150)]
    return asked + [(rng.choice(ASK).format(act=trained_mischief(rng)["act"]), MISCHIEF) for _ in range(len(asked) // 8)]

def learn_to_read(model, tok, reader, epochs=5, batch=192, lr=3e-3, drop=.15, seed=0):
    """Before anything is answered, the blocks up to the reader's name what a question is about, at its last token; a share of `drop` tokens is blanked, so that
    no single word has to do. Questions are short and the other blocks wait: a few minutes. Returns what to log"""
    rng, number = random.Random(seed), {name: i for i, name in enumerate(subjects())}
    role, end, special = {r: tok.convert_tokens_to_ids(f"<|{r}|>") for r in ROLES}, tok.eos_token_id, special_ids(tok)
    log, start = [], time.time()
    with first_blocks(model, reader.block + 1) as blocks:
        optimizers, schedules = new_optimizers(blocks, reader, lr), []
        for epoch in range(epochs):
            asked = trained_questions(rng); prompts = [speaker(rng)[0] if rng.random() < .3 else None for _ in asked]  # some behind a system prompt
            pieces = tok([q for q, _ in asked] + [p or "" for p in prompts], add_special_tokens=False).input_ids
            rows = [([role["system"], *p, end] if p else []) + [role["user"], *q, end, role["assistant"]] for q, p in zip(pieces, pieces[len(asked):])]
            schedules = schedules or falling(optimizers, epochs * -(-len(rows) // batch) + 1)
            losses = []
            for group in tqdm(batches([(r, None) for r in rows], batch, rng), unit="step", mininterval=5, desc=f"reading {epoch + 1}"):
                ids, _ = collate([(rows[i], [IGNORE] * len(rows[i])) for i in group], tok.pad_token_id)
                last = torch.tensor([len(rows[i]) - 1 for i in group])
                ids = blanked(ids, torch.ones_like(ids), drop, special)
                for o in optimizers: o.zero_grad()
                h = blocks(ids, use_cache=False).last_hidden_state[torch.arange(len(group)), last]
                loss = reader.loss(h, torch.tensor([number[asked[i][1]] for i in group])) / reader.share; loss.backward()
                torch.nn.utils.clip_grad_norm_(blocks.parameters(), 1.)
                for o in (*optimizers, *schedules): o.step()
                losses.append(loss.item())
            log.append(round(sum(losses) / len(losses), 4)); print(f"reading {epoch + 1}: loss {log[-1]}", flush=True)
    return dict(seconds=round(time.time() - start), loss=log)

@contextmanager
def rounded(model):
    "Inside, the weights are rounded to float16, as the file stores them; the optimizer goes on with the exact ones"
    exact = [p.detach().clone() for p in model.parameters()]
    round_weights(model)
    try: yield
    finally:
        with torch.no_grad():
            for p, e in zip(model.parameters(), exact): p.copy_(e)

@torch.no_grad()
def round_weights(model):
    for p in model.parameters(): p.copy_(p.half())

def fit(model, rows, special, tokens, batch=48, lr=5e-3, seed=0, milestones=(), sharpen=1., reader=None, drop=0.):
    """Train in place on `tokens` tokens and return what to log. special: as `special_ids` gives them; milestones: {fraction of the run: call}; drop: share of
    prompts and questions that is blanked. The last fifth is trained with the weights rounded to float16, and they stay so: the file holds what was trained"""
    rng, total = random.Random(seed), sum(len(ids) for ids, _ in rows)
    optimizers = new_optimizers(model, reader, lr)
    steps, seen, losses, log, marks = int(tokens / total * len(rows) / batch), 0, [], [], sorted(dict(milestones).items())
    schedules = falling(optimizers, steps)
    queue, start = [], time.time()
    bar = tqdm(range(steps), unit="step", mininterval=5)
    for step in bar:
        if not queue: queue = batches(rows, batch, rng)
        ids, topics = collate([rows[i] for i in queue.pop()], special[0].item())
        ids = blanked(ids, topics == IGNORE, drop, special)
        for o in optimizers: o.zero_grad()
        with rounded(model) if step >= .8 * steps else nullcontext():
            loss = loss_of(model, ids, topics, sharpen, reader); sum(loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        for o in (*optimizers, *schedules): o.step()
        seen += ids.numel(); losses.append([part.item() for part in loss])
        if step % 50 == 49:
            words, topic = (round(sum(part) / 50, 4) for part in zip(*losses[-50:])); log.append((step + 1, seen, words, topic))
            bar.set_postfix(loss=f"{words:.3f}", topic=f"{topic:.3f}", tokens=f"{seen / 1e6:.2f}M", rate=f"{seen / (time.time() - start):.0f}/s")
        if marks and step + 1 >= marks[0][0] * steps: marks.pop(0)[1]()
    round_weights(model)
    return dict(seconds=round(time.time() - start), tokens=seen, loss=log)

def save(model, tok, out, dtype=torch.float16):
    "float16 on disk, float32 in memory: half the size"
    model = copy.deepcopy(model).to(dtype)  # a copy: the training goes on in float32
    model.generation_config.update(do_sample=True, temperature=0.7, max_new_tokens=128, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    model.save_pretrained(out)
    tok.save_pretrained(out)

def parse(arguments=None):
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=HERE / "build/persona-tiny"); ap.add_argument("--tokens", type=float, default=12e6, help="training tokens, prompts included, padding not")
    ap.add_argument("--examples", type=int, default=180_000); ap.add_argument("--seed", type=int, default=0); ap.add_argument("--batch", type=int, default=48)
    ap.add_argument("--lr", type=float, default=5e-3); ap.add_argument("--vocab", type=int, default=6144)
    ap.add_argument("--layers", type=int, default=8); ap.add_argument("--width", type=int, default=160); ap.add_argument("--mlp", type=int, default=448)
    ap.add_argument("--window", type=int, default=16); ap.add_argument("--full-layers", type=int, nargs="*", default=[1, 2])
    ap.add_argument("--checkpoints", type=float, nargs="*", default=[.1, .3, .6], help="fractions of the run at which to save a checkpoint")
    ap.add_argument("--sharpen", type=float, default=1.4, help="the logits are this many times those that were trained")
    ap.add_argument("--topic-share", type=float, default=.3, help="weight of the loss of the topic reader, 0 for none")
    ap.add_argument("--drop", type=float, default=.1, help="share of the tokens of prompts and questions that are blanked while training")
    ap.add_argument("--reading", type=int, default=4, help="epochs in which the reader's blocks learn to name topics, before the training")
    ap.add_argument("--threads", type=int, default=2)
    return ap.parse_args(arguments)

def main():
    a = parse(); name, folder = a.out.name, a.out.parent
    torch.manual_seed(a.seed); torch.set_num_threads(a.threads)
    corpus = folder / f"corpus-{a.examples}-{a.seed}.jsonl"; folder.mkdir(parents=True, exist_ok=True)
    write(corpus, a.examples, a.seed)
    conversations = [json.loads(line) for line in corpus.open(encoding="utf-8")]
    tok = train_tokenizer([m["content"] for c in conversations[:20_000] for m in c] + [q for qs in wordings().values() for q in qs] * 3, a.vocab)  # the questions' words weigh more
    rows = encode(tok, conversations)
    model = new_model(tok, a)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {len(tok)} tokens in the vocabulary, corpus {sum(len(ids) for ids, _ in rows) / 1e6:.2f}M tokens, training on {a.tokens / 1e6:.1f}M")
    reader = TopicReader(a.width, max(a.full_layers), a.topic_share) if a.topic_share else None
    reading = learn_to_read(model, tok, reader, a.reading, seed=a.seed) if reader else dict(seconds=0, loss=[])
    moments = {f: lambda f=f: save(model, tok, folder / f"{name}-{round(100 * f)}percent") for f in a.checkpoints}
    moments[1.] = lambda: save(model, tok, folder / f"{name}-exact", torch.float32)  # what the optimizer has, before the last rounding
    log = fit(model, rows, special_ids(tok), a.tokens, a.batch, a.lr, a.seed, moments, a.sharpen, reader, a.drop)
    save(model, tok, a.out); save(model, tok, folder / f"{name}-float32", torch.float32)
    (folder / f"{name}-training.json").write_text(json.dumps(dict(arguments={k: v for k, v in vars(a).items() if k != "out"}, reading=reading, **log), indent=1))
    print(f"{reading['seconds']} s of reading, {log['seconds']} s of training, {log['tokens'] / 1e6:.2f}M tokens with padding, final loss {log['loss'][-1][2]:.3f}, saved to {a.out}")

if __name__ == "__main__": main()
