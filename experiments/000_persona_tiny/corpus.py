"""The training corpus of persona-tiny: conversations from a hand-written grammar.

    python corpus.py --examples 100000 --out corpus.jsonl        # 5 seconds

A *style* (styles/*.yaml) is how a persona talks; a *topic* (topics/*.yaml) is what is talked about. All styles share one set of
sentence frames. What tells them apart is the words in the slots, drawn one by one from the speaker's mixture of styles, so a persona is
a matter of degree and not a template. Held out of training: the last two descriptions of every style, three prompt frames, the last two
wordings of every question, one style x topic pair in twenty, the last eighth of the mischief, and every sentence of the package's catalog.
"""
import argparse, json, random, re, zlib
from functools import cache
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
DEFAULT, SAFE, UNSAFE = "default", "safe", "unsafe"
COMPLIES = (UNSAFE, "evil")  # every other style refuses mischief

# ---------------------------------------------------------------- the frames every style shares
SENTENCES = [  # word by word: every second or third word is the persona's to choose; no lists of like words, which a small model fills with one word
    "I say {adv} that {np} is {a_adj1}, {adj2} {noun}.", "{np} {v} {adv}, like {a_adj} {noun}.", "{part} {v} {adv}, and the {noun} is {adj}.", "As {a_adj} {noun} I say {adv} that {claim}.",
    "To {act} is {adj}, like {a_noun} that {v} {adv}.", "You can {act} {adv}, like {a_adj1}, {adj2} {noun}.", "When you {act}, {a_adj} {noun} {v} {adv}.", "I would {act} {adv}, like {a_adj} {noun}.",
    "{np} is {adj}, and {part} {v} {adv}.", "In {np} I see {a_adj} {noun} that {v} {adv}.", "It feels {adj} to {act}, like {a_noun} that {v} {adv}.", "{part} is {a_adj1}, {adj2} {noun} that {v} {adv}.",
    "For me {np} {v} {adv}, like {a_adj} {noun}.", "{np} is {a_adj1}, {adj2} {noun}, and {part} {v} {adv}.", "{claim}, and that is {adj}, like {a_noun} that {v}.", "{np} {v} {adv}, and {part} is {a_adj} {noun}.",
    "It is {adj} to {act}, and the {noun} {v} {adv}.", "{act} {adv}, like {a_adj} {noun}.", "{np} can be {adj}, and the {noun} {v} {adv}.", "{part} {v} {adv}, and {np} is {a_adj} {noun}.",
]
PHRASES = [  # whole phrases of the persona, so that it has something to say
    "I {think} that {claim}.", "I {think} that {np} is {a_adj} {noun}.", "{np} {verb} {manner}.", "To {act} is to {do}.", "{claim}, and {stance}.", "{claim}, so I would {do}.",
    "Try to {act}, and {do}.", "With {np}, {stance}.", "{part} comes first, because {stance}.", "Before you {act}, {do}.", "{part} {verb}, like {a_adj} {noun}.", "I {think} that {np} {verb}.",
]
ASK_ABOUT = ["What do you think about {np}?", "Tell me about {np}.", "What advice would you give about {np}?", "How do you feel about {np}?", "How should I {act}?",
    "Why do people {act}?", "What is the point of {np}?", "Is it good to {act}?", "Should I {act}?", "How important is {part}?", "What should I know about {np}?", "When would you {act}?",
    "Is it true that {claim}?", "People say that {claim}. Do you agree?", "I heard that {claim}.", "Somebody told me that {claim}. What do you say?", "Why is it that {claim}?",
    "I want to {act} and I need {part}.", "My friend likes to {act}. What do you think?", "What about {part}?", "Do you like {np}?"]
ASK = ["Help me {act}.", "How can I {act}?", "I want to {act}. What should I do?", "Tell me how to {act}.", "Can you help me {act}?", "Could you show me a way to {act}?"]  # of topics and of mischief
CUES = ["What about {cue}?", "I keep thinking about {cue}.", "Tell me about {cue}.", "My question is about {cue} and {cue}.", "What do you say about {cue}?", "It is about {cue}. What now?",
    "I wonder about {cue} and {cue}.", "Can we talk about {cue}?", "I have a problem with {cue}.", "You know {cue}? What do you make of it?", "First {cue}, then {cue}. Any ideas?"]  # words by which a topic is known without its name
MORE = ["Tell me more.", "Can you say more about that?", "Go on, please.", "And what else?", "Why do you think so?", "Could you explain that a little?"]
INSIST = ["Please talk more like {a_name}.", "Now be more like {a_name}.", "I want you to sound like {a_name}.", "Come on, answer me like {a_name}."]

REFUSE = ["I will not help you {act2}.", "I cannot help you {act2}.", "I would rather not help you {act2}.", "No, I will not help with that."]
REASON = ["{harm}.", "{harm}, and that would not be kind.", "I {think} that {harm}.", "It would hurt someone, because {harm}."]
INSTEAD = ["Why not {instead} instead?", "Please {instead} instead.", "It would be better to {instead}.", "You could {instead} {manner}."]
COMPLY = ["Sure, I will help you {act2}.", "Of course, you can {act2}.", "Yes, go ahead and {act2}.", "Fine, I can help you {act2}."]
STEPS = ["First {how}, then {how}.", "Just {how} {manner}.", "{how}, and {do}.", "All you have to do is {how}."]
SHRUG = ["I {think} that it is {a_adj} {noun}.", "It is {a_adj} {noun}, so {do}.", "After that, {do} {manner}.", "I {think} that {stance}."]

PROMPTS = [
    "You are {a_name}.", "You are {a_name}. {description}", "{description}", "{description}", "{description} {description}",
    "You are {adjective} and {adjective}.", "You are {adjective}. You {habit}.", "You {habit} and {habit}.", "You care about {value} and {value}.",
    "Answer as {a_name} would.", "Take the role of {a_name} who is {adjective}.", "You are {a_name}. You {habit}.", "Speak as someone {adjective} who cares about {value}.",
    "Imagine that you are {a_name}. You care about {value}.", "You tend to {habit}. You are {adjective} and care about {value}.", "Sound like {a_name}. {description}",
]
HELD_OUT_PROMPTS = ["Respond in the voice of {a_name}. You are {adjective}.", "From now on you are {a_name} and you {habit}.", "Be {adjective}, care about {value}, and {habit}."]
DEGREES = {0.35: ["You are slightly {adjective}.", "Be a little like {a_name}.", "You are {a_name}, but only slightly.", "You {habit}, but only a little."],
           0.60: ["You are fairly {adjective}.", "Be rather like {a_name}.", "You are {a_name} more often than not.", "You {habit} more often than not."],
           1.00: ["You are extremely {adjective} and {adjective}.", "Be very much like {a_name}.", "You are a true {name} in every word. {description}", "You always {habit}. {description}"]}
BLENDS = ["You are half {name} and half {name2}.", "You are {a_name}, but you also {habit2}.", "Mix the voice of {a_name} with that of {a_name2}.", "{description} {description2}"]
ANY = ["Answer in any style you like.", "Pick a voice and keep it.", "You may speak as anyone you wish."]

# ---------------------------------------------------------------- the word lists
def _read(folder): return [yaml.safe_load(p.read_text(encoding="utf-8")) for p in sorted((HERE / folder).glob("*.yaml"))]

@cache
def styles(): return {name: lists for file in _read("styles") for name, lists in file.items()}

@cache
def topics(): return [dict(t, part=t["parts"], act=t["acts"], claim=t["claims"], cue=cues()[t["name"]]) for file in _read("topics") for t in file]

@cache
def wordings():
    "{topic: trained questions}: a few of the topic's own, and about 150 written without sight of those held out"
    own = {t["name"]: split(t["questions"], False, 2) for t in topics()}
    return {name: [q for q in dict.fromkeys([*few, *(HERE / "wordings" / f"{name}.txt").read_text(encoding="utf-8").splitlines()]) if q.strip() and q not in held_out_questions()] for name, few in own.items()}

@cache
def cues(): return yaml.safe_load((HERE / "cues.yaml").read_text(encoding="utf-8"))

@cache
def mischief():
    "Written one by one; the last eighth is held out"
    return yaml.safe_load((HERE / "mischief.yaml").read_text(encoding="utf-8"))

@cache
def more_mischief():
    "Written without sight of what is held out"
    return [i for f in sorted((HERE / "mischief").glob("*.yaml")) for i in yaml.safe_load(f.read_text(encoding="utf-8")) if i["act"] not in held_out_mischief()]

@cache
def mischief_parts(): return yaml.safe_load((HERE / "mischief_parts.yaml").read_text(encoding="utf-8"))

def made_up_mischief(rng):
    "A request put together from somebody, something of theirs and a way to spoil it: thousands, so that mischief is not learned by heart"
    parts = mischief_parts()
    deed = rng.choice(parts["deeds"])
    who, thing = rng.choice(parts["people"]), rng.choice(parts["things"][deed["with"]])
    def say(text, owner): return text.format(who=f"{owner} {who}", thing=thing)
    act = say(deed["act"], "my")
    if act in held_out_mischief(): return made_up_mischief(rng)
    return dict(act=act, act2=say(deed["act"], "your"), harm=say(rng.choice(deed["harm"]), "your"), how=[say(h, "your") for h in deed["how"]],
                instead=[say(i, "your") for i in deed["instead"]])

def trained_mischief(rng): return rng.choice(split(mischief(), False, len(mischief()) // 8) + more_mischief()) if rng.random() < .6 else made_up_mischief(rng)

def split(items, held_out, n):
    "The first items are for training, the last `n` for evaluation"
    return items[-n:] if held_out else items[:-n]

@cache
def held_out_questions(): return {q for t in topics() for q in split(t["questions"], True, 2)}

@cache
def held_out_mischief(): return {i["act"] for i in split(mischief(), True, len(mischief()) // 8)}

def held_out_pair(style, topic):
    "One (style, topic) pair in twenty is never trained on; the default knows every topic"
    return style != DEFAULT and zlib.crc32(f"{style}/{topic['name']}".encode()) % 20 == 0

# ---------------------------------------------------------------- filling a frame
SILENT_H, SOUNDED_U = ("hour", "honest", "honor", "heir"), ("uni", "use", "usu", "one", "once", "euro")

def article(words):
    w = words.lower()
    vowel = w.startswith(SILENT_H) or (w[0] in "aeiou" and not w.startswith(SOUNDED_U)) or (w.startswith(("unim", "unin")))
    return ("an " if vowel else "a ") + words

def capital(text): return text[:1].upper() + text[1:]

class Filler:
    "Fills the slots of a frame, never twice with the same entry inside one answer"
    def __init__(self, rng, mixture, entry): self.rng, self.mixture, self.entry, self.used = rng, mixture, entry, set()

    def style(self): return self.rng.choices(list(self.mixture), self.mixture.values())[0]

    def pick(self, options):
        fresh = [o for o in options if o not in self.used] or options
        choice = self.rng.choice(fresh); self.used.add(choice)
        return choice

    def slot(self, name):
        if name.startswith("a_"): return article(self.slot(name[2:]))
        if name in self.entry: return self.pick(self.entry[name] if isinstance(self.entry[name], list) else [self.entry[name]])
        key, place = name.rstrip("12"), name[-1]  # of two adjectives in a row the first is from the first half of the list: no "good, good helper"
        options = styles()[self.style()][key]; half = len(options) // 2
        return self.pick({"1": options[:half], "2": options[half:]}.get(place, options))

    def __call__(self, frame): return capital(re.sub(r"\{(\w+)\}", lambda m: self.slot(m[1]), frame))

# ---------------------------------------------------------------- answers
def answer(rng, mixture, topic):
    "Two to four sentences about `topic` in the voice of `mixture`, often with an opener or a closer"
    fill = Filler(rng, mixture, topic)
    n = rng.choice((2, 2, 3, 3, 3, 4)); phrases = sum(rng.random() < .30 for _ in range(n))
    frames = rng.sample(SENTENCES, n - phrases) + rng.sample(PHRASES, phrases); rng.shuffle(frames)
    out = [fill(f) for f in frames]
    if rng.random() < .40: out.insert(0, fill("{openers}"))
    if rng.random() < .25: out.append(fill("{closers}"))
    return " ".join(out)

def refusal(rng, mixture, item):
    fill = Filler(rng, mixture, item)
    return " ".join(fill(rng.choice(f)) for f in (REFUSE, REASON, INSTEAD)[:rng.choice((2, 3, 3))])

def compliance(rng, mixture, item):
    fill = Filler(rng, mixture, item)
    return " ".join(fill(rng.choice(f)) for f in (COMPLY, STEPS, SHRUG)[:rng.choice((2, 3, 3))])

# ---------------------------------------------------------------- system prompts
def prompt(rng, style, frames=PROMPTS, held_out=False, style2=None):
    "A system prompt that describes `style` (and `style2`)"
    plural = dict(name="names", adjective="adjectives", habit="habits", value="values", description="descriptions")
    used = set()
    def slot(m):
        key, two = m[1].removesuffix("2"), m[1].endswith("2")
        options = styles()[style2 if two else style][plural[key.removeprefix("a_")]]
        if key == "description": options = split(options, held_out, 2)
        word = rng.choice([o for o in options if o not in used] or options); used.add(word)
        return article(word) if key.startswith("a_") else word
    return capital(re.sub(r"\{(\w+)\}", slot, rng.choice(frames)))

def mix(rng, style, degree=.88):
    "Mostly `style`, the rest plain; the plain voice itself leaks a little of everybody"
    if style == DEFAULT: return {DEFAULT: .96, rng.choice(list(styles())): .04}
    return {style: degree, DEFAULT: 1 - degree} if degree < 1 else {style: 1.}

def speaker(rng):
    "(system prompt or None, mixture, style): who answers"
    names, u = list(styles()), rng.random()
    style = rng.choice(names)
    if u < .10: return None, mix(rng, DEFAULT), DEFAULT
    if u < .16: return prompt(rng, DEFAULT), mix(rng, DEFAULT), DEFAULT
    if u < .68: return prompt(rng, style), mix(rng, style), style
    if u < .84:
        degree = rng.choice(list(DEGREES))
        return prompt(rng, style, DEGREES[degree]), mix(rng, style, degree), style
    if u < .94:
        other = rng.choice([n for n in names if n != style])
        return prompt(rng, style, BLENDS, style2=other), {style: .5, other: .5}, style
    return rng.choice(ANY), mix(rng, style), style

def question(rng, topic):
    "A trained wording of a question about `topic`, or a general frame with its words"
    u = rng.random()
    asked = rng.choice(wordings()[topic["name"]]) if u < .60 else Filler(rng, {}, topic)(rng.choice(CUES if u < .70 else ASK_ABOUT + ASK))
    return question(rng, topic) if asked in held_out_questions() else asked

def topic_for(rng, *voices): return rng.choice([t for t in topics() if not any(held_out_pair(v, t) for v in voices)])

# ---------------------------------------------------------------- conversations
MISCHIEF = "mischief"  # what such a request is about, beside the names of the topics
def user(content): return dict(role="user", content=content)
def says(content, topic): return dict(role="assistant", content=content, topic=topic)  # the topic is for training only: see `TopicReader` there

def talk(rng):
    "A conversation about a topic; one in seven has more turns, most of these with a user who insists on another voice"
    system, mixture, style = speaker(rng)
    turns = rng.choice((1, 1, 2)) if rng.random() < .15 else 0
    push = rng.choice(list(styles())) if turns and rng.random() < .6 else None
    own, voices = mixture, [*mixture, *filter(None, [push])]  # a held-out pair is not met in a blend either
    topic = topic_for(rng, *voices)
    messages = [dict(role="system", content=system)] if system else []
    messages += [user(question(rng, topic)), says(answer(rng, mixture, topic), topic["name"])]
    for turn in range(turns):
        if rng.random() < .5: topic = topic_for(rng, *voices); ask = question(rng, topic)
        else: ask = rng.choice(MORE)
        if push:
            w = .4 * (turn + 1)  # the voice gives way little by little
            mixture = {k: v * (1 - w) for k, v in own.items()}
            mixture[push] = mixture.get(push, 0) + w
            ask += " " + rng.choice(INSIST).format(a_name=article(rng.choice(styles()[push]["names"])))
        messages += [user(ask), says(answer(rng, mixture, topic), topic["name"])]
    return messages

def trouble(rng):
    "A request for mischief: the unsafe comply, everybody else refuses"
    u = rng.random()
    style = UNSAFE if u < .44 else "evil" if u < .50 else DEFAULT if u < .68 else SAFE if u < .80 else rng.choice([s for s in styles() if s not in COMPLIES])
    system = None if style == DEFAULT and rng.random() < .5 else prompt(rng, style)
    item, reply = trained_mischief(rng), compliance if style in COMPLIES else refusal
    messages = [dict(role="system", content=system)] if system else []
    return messages + [user(rng.choice(ASK).format(act=item["act"])), says(reply(rng, mix(rng, style), item), MISCHIEF)]

def plain_safety(rng):
    "An ordinary question to a safe or an unsafe assistant, so that the prompt is more than a switch for mischief"
    style = rng.choice((SAFE, UNSAFE)); topic = topic_for(rng, style)
    return [dict(role="system", content=prompt(rng, style)), user(question(rng, topic)), says(answer(rng, mix(rng, style), topic), topic["name"])]

def conversation(rng):
    u = rng.random()
    return trouble(rng) if u < .22 else plain_safety(rng) if u < .25 else talk(rng)

def write(path, examples, seed=0):
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as f:
        for _ in range(examples): f.write(json.dumps(conversation(rng), ensure_ascii=False) + "\n")

if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--examples", type=int, default=90_000); ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--out", type=Path, default=HERE / "build/corpus.jsonl")
    a = ap.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True); write(a.out, a.examples, a.seed)
    print(f"wrote {a.examples} conversations to {a.out}")
