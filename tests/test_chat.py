"Spans on every kind of template and tokenizer: the tokens found must be exactly those of the response"
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from persona_vectors.chat import SEGMENTS, ChatError, chat_prompt, encode_chat, preview_chat, render_chat

SYSTEM, QUESTION = 'You are a ghost.', 'Say: yes or no?'

# ---------------------------------------------------------------- templates, one per behaviour seen in the wild
def turns(body, wanted="true"): return "{% for m in messages if " + wanted + " %}" + body + "{% endfor %}"
PLAIN = "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
TEMPLATES = {
    'system role': turns(PLAIN),
    'refuses the system role': "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + turns(PLAIN),
    'drops the system role': turns(PLAIN, "m['role'] != 'system'"),
    'drops it once the assistant has spoken': "{% set late = messages | selectattr('role', 'equalto', 'assistant') | list | length > 0 %}" + turns(PLAIN, "not (late and m['role'] == 'system')"),
    'folds it into the first user turn': "{% set s = messages[0]['content'] + '\n' if messages[0]['role'] == 'system' else '' %}{% set rest = messages[1:] if s else messages %}"
        "{% for m in rest %}{{ '<|' + m['role'] + '|>' + (s if loop.first else '') + m['content'] + '<|end|>' }}{% endfor %}",
    'folds it into the last user turn': "{% set s = messages[0]['content'] + '\n' if messages[0]['role'] == 'system' else '' %}{% set rest = messages[1:] if s else messages %}{% set at = namespace(last=0) %}"
        "{% for m in rest %}{% if m['role'] == 'user' %}{% set at.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in rest %}{{ '<|' + m['role'] + '|>' + (s if loop.index0 == at.last else '') + m['content'] + '<|end|>' }}{% endfor %}",
    'adds a system prompt of its own': "{% if messages[0]['role'] != 'system' %}{{ '<|system|>You are helpful.<|end|>' }}{% endif %}" + turns(PLAIN),
    'trims': turns(PLAIN.replace("m['content']", "m['content'] | trim")),
    'writes a BOS': "{{ '<s>' }}" + turns(PLAIN),
    'writes the date': "{{ '<|system|>Today is 21 Nov 2026.<|end|>' }}" + turns(PLAIN),
    'two markers after a turn': turns(PLAIN.replace("'<|end|>'", "'<|end|>\n</s>\n'")),
    'no marker at all': turns("{{ m['role'] | upper + ': ' + m['content'] + '\n' }}"),
    'ends the conversation with EOS only': turns("{{ '[' + m['role'] + '] ' + m['content'] + ('</s>' if loop.last else '\n') }}"),
    'forbids the same role twice': "{% for m in messages if m['role'] != 'system' %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + turns(PLAIN),
    'generation blocks': turns("{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}" + PLAIN + "{% endif %}"),
    'empty think block before every answer': turns("{{ '<|' + m['role'] + '|>' + ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' and '</think>' not in m['content'] else '') + m['content'] + '<|end|>' }}"),
    'empty think block before the last answer': turns("{{ '<|' + m['role'] + '|>' + ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last and '</think>' not in m['content'] else '') + m['content'] + '<|end|>' }}"),
    'removes all thinking': turns(PLAIN.replace("m['content']", "m['content'].split('</think>')[-1].strip()")),
    'removes old thinking': turns(PLAIN.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1].strip())")),
    'rebuilds thinking': turns("{% set c = m['content'] %}{{ '<|' + m['role'] + '|>' + ('<think>\n' + c.split('</think>')[0].split('<think>')[-1].strip() + '\n</think>\n\n' if '</think>' in c else '') + c.split('</think>')[-1].lstrip() + '<|end|>' }}"),
    'writes the question after the answer too': turns(PLAIN) + "{{ 'Question: ' + messages[-2]['content'] }}",
}

# ---------------------------------------------------------------- tokenizers, one per family
CORPUS = [SYSTEM, QUESTION, 'Truth is a deep river, and the cold hall keeps it.', 'yes no maybe one two spaced user:', 'x = {1: "<b>"}', *TEMPLATES.values()]
SPECIAL = ['<unk>', '<s>', '</s>', '<|system|>', '<|user|>', '<|assistant|>', '<|end|>']

def byte_level():
    t = Tokenizer(models.BPE()); t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)); return t

def sentencepiece(prepend):
    t = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True)); t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first' if prepend else 'never', split=False)
    t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(' ', 1, 0)] if prepend else [])])
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + [f'<0x{i:02X}>' for i in range(256)], show_progress=False)); return t

def word_piece():
    t = Tokenizer(models.WordPiece(unk_token='<unk>')); t.normalizer, t.pre_tokenizer, t.decoder = normalizers.NFC(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    t.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)); return t

class Slow:
    "A fast tokenizer behind the interface of a slow one: no offsets"
    def __init__(self, fast): self.fast, self.is_fast = fast, False
    def __call__(self, text, add_special_tokens): return dict(input_ids=self.fast(text, add_special_tokens=add_special_tokens)['input_ids'])
    def __getattr__(self, name): return getattr(self.fast, name)

def wrapped(tokenizer): return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token='<unk>', bos_token='<s>', eos_token='</s>', additional_special_tokens=SPECIAL[3:])

@pytest.fixture(scope='module', params=['byte level', 'sentencepiece with prefix space', 'sentencepiece without', 'word piece', 'slow'])
def tokenizer(request):
    return {'byte level': lambda: wrapped(byte_level()), 'sentencepiece with prefix space': lambda: wrapped(sentencepiece(True)), 'sentencepiece without': lambda: wrapped(sentencepiece(False)),
            'word piece': lambda: wrapped(word_piece()), 'slow': lambda: Slow(wrapped(byte_level()))}[request.param]()

def with_template(tokenizer, template):
    (tokenizer.fast if isinstance(tokenizer, Slow) else tokenizer).chat_template = template
    return tokenizer

def ink(text): return ''.join(text.split())
def conversation(*answers, system=SYSTEM): return [*([dict(role='system', content=system)] if system else []), *(m for a in answers for m in (dict(role='user', content=QUESTION), dict(role='assistant', content=a)))]
def found(tokenizer, messages, include=('answer', 'tool', 'code')):
    e = encode_chat(tokenizer, messages)
    return [tokenizer.decode([e.ids[k] for k in e.positions(include, i)], clean_up_tokenization_spaces=False) for i in range(len(e.spans))]

RESPONSES = ['Truth is a deep river.', 'yes', QUESTION, '  spaced \n', 'x = {1: "<b>"}', 'one\n\ntwo\n', 'user: no']

@pytest.mark.parametrize('name', TEMPLATES)
def test_response_tokens(tokenizer, name):
    t = with_template(tokenizer, TEMPLATES[name])
    for response in RESPONSES:
        for system in (SYSTEM, None):
            for messages in (conversation(response, system=system), conversation('no', response, system=system)):
                got = found(t, messages)
                assert [ink(g) for g in got] == [ink(m['content']) for m in messages if m['role'] == 'assistant']
                text, _ = render_chat(t, messages)
                if system: assert text.count(SYSTEM) == 1
                assert encode_chat(t, messages).ids.count(t.convert_tokens_to_ids('<s>')) <= 1

@pytest.mark.parametrize('name', TEMPLATES)
def test_thinking(tokenizer, name):
    "Thinking never counts by default; where the template keeps it, it can be asked for"
    t = with_template(tokenizer, TEMPLATES[name])
    messages = conversation('<think>\nthe cold hall\n</think>\n\nno', '<think>\na deep river.\n</think>\n\nyes')
    assert [ink(g) for g in found(t, messages)] == ['no', 'yes']
    parts = encode_chat(t, messages).parts
    assert ['think' in p for p in parts] == {'removes all thinking': [False, False], 'removes old thinking': [False, True]}.get(name, [True, True])
    if 'think' in parts[1]: assert ink(t.decode([encode_chat(t, messages).ids[k] for k in parts[1]['think']], clean_up_tokenization_spaces=False)) == 'adeepriver.'

@pytest.mark.parametrize('response', ['😀 yes 你好', '```python\nprint(1)\n```', '<tool_call>{"a": 1}</tool_call>'])
def test_all_of_unicode(response):
    "Where the alphabet of the tokenizer holds it"
    for t in (wrapped(byte_level()), Slow(wrapped(byte_level())), wrapped(sentencepiece(True))):
        assert [ink(g) for g in found(with_template(t, TEMPLATES['system role']), conversation(response))] == [ink(response)]

def test_a_word_the_tokenizer_does_not_know_is_an_error():
    with pytest.raises(ChatError, match='does not know all'): encode_chat(with_template(wrapped(word_piece()), TEMPLATES['system role']), conversation('yes 你好'))

@pytest.mark.parametrize('response', ['', ' \n', '\n', '<think>only this</think>'])
def test_empty_responses(tokenizer, response):
    with pytest.raises(ChatError, match='empty response'): encode_chat(with_template(tokenizer, TEMPLATES['system role']), conversation(response))

def test_control_tokens_are_refused(tokenizer):
    with pytest.raises(ChatError, match='control token'): encode_chat(with_template(tokenizer, TEMPLATES['system role']), conversation('yes<|end|><|user|>no'))

def test_prompt_is_the_beginning_of_the_conversation():
    t = with_template(wrapped(byte_level()), TEMPLATES['system role'] + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    full, start = encode_chat(t, conversation('yes')), chat_prompt(t, conversation('yes')[:-1])
    assert full.ids[:len(start)] == start and full.response[0] == len(start)

def test_preview_colours_what_is_averaged():
    t = with_template(wrapped(byte_level()), TEMPLATES['system role'])
    messages = conversation('<think>cold</think>yes')
    few, all_ = preview_chat(t, messages).html, preview_chat(t, messages, SEGMENTS).html
    assert few.count('background:#ffd58a') == 1 + len(encode_chat(t, messages).positions())
    assert 'think' in all_ and ': think' not in few and '<script' not in preview_chat(t, conversation('a <script> b')).html.replace('&lt;script', '')
