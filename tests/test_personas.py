"""Settings and personas: what users, disks and other processes can do wrong, and an engine against plain recomputation."""
import copy, json, multiprocessing, os, string, sys, threading

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings, strategies as st
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from persona_vectors.chat import chat_prompt, conversation
from persona_vectors.generation import generate_local
from persona_vectors.models import blocks
from persona_vectors.engine import EngineBusy, Monitor, SteeringEngine, inked
from persona_vectors.personas import ModelWrapper, PersonaError, PersonaManager, parse_blend, require_name
from persona_vectors.settings import Settings, SettingsError, get_config
from persona_vectors.vectors import Activations, Vector

GREEDY = dict(temperature=0, max_tokens=16)
OPTIONS = dict(model={"name": "persona-tiny", "device": "cpu"}, extraction={"questions": 3, "max_tokens": 16, "target_layers": [3]})
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

@pytest.fixture(autouse=True)
def no_settings_of_the_machine(monkeypatch, tmp_path_factory):
    for k in [k for k in os.environ if k.startswith("PERSONA_STEER_")]: monkeypatch.delenv(k)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp()/"config"))

@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    "A library with a sage and a trickster"
    folder = tmp_path_factory.mktemp("library")
    m = PersonaManager(get_config(**OPTIONS, data_dir=folder), progress=False)
    for name in ("sage", "trickster"): m.create_from_archetype(name)
    return m

def says_one_line(call, *args):
    "What a call gives, None for one of the errors that are documented"
    try: return call(*args)
    except (PersonaError, SettingsError, OSError) as e: assert str(e).strip() and "\n" not in str(e) and len(str(e)) < 1000, str(e)

# Text

names = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=64).filter(lambda s: s[0] != "-")
weights = st.floats(-1e6, 1e6).filter(lambda w: abs(w) > 1e-9)

@fuzz
@given(st.one_of(st.text(), st.text("sage .5+-*:=,e0\n\0"), st.none(), st.binary()))
@example("1e999 sage")
@example("sage:1e999")
def test_any_text_is_a_blend_or_a_line(text):
    found = says_one_line(parse_blend, text)
    if text in ("1e999 sage", "sage:1e999"): assert found is None
    if found: assert all(abs(w) < float("inf") and require_name(k) for k, w in found.items()) and any(found.values())

@fuzz
@given(st.dictionaries(names, weights, min_size=1, max_size=5))
def test_blends_are_read_as_written(wanted):
    first = next(iter(wanted))
    assert parse_blend(",".join(f"{k}:{w!r}" for k, w in wanted.items())) == wanted
    with pytest.raises(PersonaError, match="there twice"): parse_blend(f"{first} + {first}")
    assert parse_blend(" ".join(f"{'' if k == first and w > 0 else '- ' if w < 0 else '+ '}{abs(w)!r} {k}" for k, w in wanted.items())) == wanted

keys = st.one_of(st.text(max_size=6), st.integers(), st.sampled_from(["model", "extraction", "steering", "data_dir", "name", "device", "target_layers", "batch_size", "temperature", "unit", "default_strength", "max_strength", "safety", "model.name", "api_key"]))
plain = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["persona-tiny", "cpu", "norm", "sk-secret-secret", "[", "*x", "!t"])), lambda o: st.one_of(st.lists(o, max_size=3), st.dictionaries(keys, o, max_size=4)), max_leaves=12)

@fuzz
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda s: s.encode("utf-8", "surrogatepass")), plain.map(lambda o: yaml.safe_dump(o).encode()), st.dictionaries(keys, plain, max_size=4).map(lambda o: yaml.safe_dump(o).encode())))
@example(b"data_dir: 2001-99-99")
@example(b"["*5000)
@example(b"? [a]\n: b")
@example(b"model: &a {name: *a}")
def test_any_file_is_settings_or_a_line(tmp_path, content):
    path = tmp_path/"config.yaml"; path.write_bytes(content)
    found = says_one_line(get_config, path)
    assert found is None or isinstance(found, Settings) and found.run.model_name

@fuzz
@given(st.sampled_from(["MODEL__NAME", "MODEL__API_KEY", "STEERING__DEFAULT_STRENGTH", "EXTRACTION__TARGET_LAYERS", "EXTRACTION", "DATA_DIR", "", "__", "X__Y__Z"]), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20))
def test_any_variable_is_a_setting_or_a_line(key, value):
    os.environ[f"PERSONA_STEER_{key}"] = value
    try: says_one_line(get_config)
    finally: del os.environ[f"PERSONA_STEER_{key}"]

@pytest.mark.parametrize("text", ["token: {0}", "model: {{openrouter_api_key: {0}}}", "model: {0}", "{0}", "model: {{name: [{0}}}", "? {0}\n: 1\n? {0}\n: 2", "model: *{0}", "model: !{0} x", "model: &{0} *{0}", "a: '{0}\n\t\x01"])
def test_a_key_in_the_file_is_never_shown(tmp_path, text):
    (tmp_path/"config.yaml").write_text(text.format("sk-or-v1-abcdef0123456789"))
    with pytest.raises(SettingsError) as e: get_config(tmp_path/"config.yaml")
    assert "abcdef" not in str(e.value)

def test_file_variable_and_argument_in_rising_order(tmp_path, monkeypatch):
    path = tmp_path/"config.yaml"; path.write_text("steering: {max_strength: 3, default_strength: 1, unit: raw}\ndata_dir: here")
    monkeypatch.setenv("PERSONA_STEER_STEERING__DEFAULT_STRENGTH", "2")
    monkeypatch.setenv("PERSONA_STEER_MODEL__NAME", "of the variable"); monkeypatch.setenv("PERSONA_STEER_MODEL__DEVICE", "cuda:1")
    found = get_config(path, steering={"max_strength": 4}, model={"name": "of the argument"})
    assert (found.model.name, found.model.device) == ("of the argument", "cuda:1")
    assert (found.steering.max_strength, found.steering.default_strength, found.steering.unit, found.data_dir) == (4, 2, "raw", tmp_path/"here")
    with pytest.raises(SettingsError, match="PERSONA_STEER_STEERING__DEFAULT_STRENGTH|default_strength=2 is beyond"): get_config(path, steering={"max_strength": 1})

# Files

@pytest.mark.parametrize("name", ["../x", "..", ".", "/etc/x", "a/b", "a\\b", "a\0b", "", " ", "x"*65, "ä", "х", "-rf", "a.b", "a\n", None, 5])
def test_names_stay_in_the_folder(manager, name):
    before = sorted(manager.config.data_dir.parent.rglob("*"))
    for call in (manager.load, manager.info, manager.dataset, manager.unload, lambda n: manager.delete(n, yes=True), manager.create_from_archetype, lambda n: manager.create_from_data(n, torch.ones(8, 160)), lambda n: manager.create_from_description(n, "x"), lambda n: manager.blend("sage", name=n) if n is not None else require_name(n)):
        with pytest.raises(PersonaError, match="is no name of a persona"): call(name)
    assert sorted(manager.config.data_dir.parent.rglob("*")) == before

def header(path):
    from safetensors import safe_open
    with safe_open(path, "pt") as f: return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["__about__"])

broken = st.one_of(st.tuples(st.just("bytes"), st.binary(max_size=300)), st.tuples(st.just("cut"), st.floats(0, .999)), st.tuples(st.just("flip"), st.integers(0, 3000)),
    st.tuples(st.just("about"), st.tuples(st.sampled_from(["name", "description", "fingerprint", "model", "created", "version", "degrees", "kind", "format", "convention"]), plain)),
    st.tuples(st.just("top"), st.tuples(st.sampled_from(["about", "layers", "names", "counts", "kind", "format"]), plain)), st.tuples(st.just("yaml"), st.one_of(st.binary(max_size=100), plain.map(lambda o: yaml.safe_dump(o).encode()))))

def test_a_persona_that_another_process_replaced_is_read_again(manager):
    other = PersonaManager(manager.config, manager.model, progress=False)
    manager.create_from_data("fresh", manager.load("sage").raw, "the first", replace=True)
    assert other.load("fresh").description == "the first" and other.load("fresh") is other.load("fresh")
    manager.create_from_data("fresh", manager.load("trickster").raw, "the second", replace=True)
    assert other.load("fresh").description == "the second"
    manager.delete("fresh", yes=True)
    assert other.load("fresh").description == "the second"  # at hand, though its file is gone

@settings(fuzz, max_examples=120)
@given(broken)
def test_any_file_is_a_persona_or_a_line(manager, how):
    kind, x = how
    whole, path = manager._file("sage").read_bytes(), manager._file("torn")
    manager.unload("torn")
    written = manager._yaml("torn"); written.write_bytes(x if kind == "yaml" else manager._yaml("sage").read_bytes())
    if kind == "bytes": path.write_bytes(x)
    elif kind == "cut": path.write_bytes(whole[:int(len(whole)*x)])
    elif kind == "flip": path.write_bytes(whole[:x] + bytes([whole[x] ^ 255]) + whole[x + 1:])
    elif kind == "yaml": path.write_bytes(whole)
    else:
        arrays, h = header(manager._file("sage"))
        (h["about"] if kind == "about" else h)[x[0]] = x[1]
        save_file(arrays, path, {"__about__": json.dumps(h)})
    try:
        for call in (manager.info, manager.load, manager.dataset, lambda n: manager.blend({n: 1.}), manager.list): says_one_line(call, *(["torn"] if call != manager.list else []))
    finally: path.unlink(); written.unlink()

def moved(manager):
    "The manager of a model with other weights, on the same files"
    other = ModelWrapper(manager.config); other.__dict__["_loaded"] = copy.deepcopy(manager.model.model), manager.model.tokenizer
    with torch.no_grad(): blocks(other.model)[0].mlp.down_proj.weight.mul_(1.5)
    return PersonaManager(manager.config, other, progress=False)

def test_files_of_another_model_are_refused_and_kept(manager):
    stranger = moved(manager); files = {p: p.read_bytes() for p in manager.config.data_dir.rglob("*.safetensors")}
    for call in (lambda: stranger.load("sage"), lambda: stranger.blend("sage + trickster"), lambda: SteeringEngine(stranger).set("sage"), stranger.safety_axis, stranger.assistant_baseline, lambda: stranger.create_from_archetype("guardian")):
        with pytest.raises(PersonaError, match="set model.name to that model, or data_dir to another folder"): call()
    with pytest.raises(PersonaError, match="made with"): SteeringEngine(stranger).set(manager.load("sage")) # one that is in memory
    assert {p: p.read_bytes() for p in manager.config.data_dir.rglob("*.safetensors")} == files

def test_nothing_is_replaced_unasked(manager):
    kept = manager._file("sage").read_bytes(), manager._yaml("sage").read_bytes()
    for call in (lambda: manager.create_from_archetype("sage"), lambda: manager.create_from_data("sage", torch.ones(8, 160)), lambda: manager.create_from_description("sage", "x"), lambda: manager.blend("trickster", name="sage")):
        with pytest.raises(PersonaError, match="'sage' is there already"): call()
    assert (manager._file("sage").read_bytes(), manager._yaml("sage").read_bytes()) == kept

def _create(folder, k, start, results):
    "In a process of its own"
    torch.set_num_threads(1)
    m = PersonaManager(get_config(**OPTIONS, steering={"orthogonalize": False}, data_dir=folder), progress=False)
    m.model.fingerprint; start.wait()
    try: m.create_from_data("same", torch.full((8, 160), k + 1.)); results.put((k, "made"))
    except PersonaError as e: results.put((k, str(e)))
    m.create_from_data(f"own{k}", torch.full((8, 160), k + 1.))

@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes_make_the_same_persona(manager, tmp_path):
    context = multiprocessing.get_context("fork")
    for round_ in range(3):
        folder, start, results = tmp_path/str(round_), context.Barrier(2), context.Queue()
        both = [context.Process(target=_create, args=(folder, k, start, results)) for k in range(2)]
        for p in both: p.start()
        said = dict(results.get(timeout=60) for _ in both)
        for p in both: p.join(60); assert p.exitcode == 0
        (winner,), (line,) = [k for k, s in said.items() if s == "made"], [s for s in said.values() if s != "made"]
        assert "is there already" in line
        reader = PersonaManager(get_config(**OPTIONS, data_dir=folder), manager.model, progress=False)
        assert reader.list() == ["own0", "own1", "same"] and reader.load("same").raw[3][0] == winner + 1
        assert not [p for p in folder.rglob(".*") if p.name != ".lock"] # no temporary files

def test_deleting_asks(manager, monkeypatch):
    manager.create_from_data("gone", torch.ones(8, 160)); before = set(manager.config.data_dir.rglob("*"))
    monkeypatch.setattr(sys, "stdin", None); monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with pytest.raises(PersonaError, match="nobody to ask"): manager.delete("gone")
    class Terminal:
        def isatty(self): return True
    monkeypatch.setattr(sys, "stdin", Terminal())
    asked = []
    for answer, done in (("", False), ("n", False), ("maybe", False), ("yes", True)):
        monkeypatch.setattr("builtins.input", lambda q, answer=answer: asked.append(q) or answer)
        assert manager.delete("gone") is done
    assert "gone.safetensors" in asked[0] and {p.name for p in before - set(manager.config.data_dir.rglob("*"))} == {"gone.safetensors"}
    with pytest.raises(PersonaError, match="no persona 'gone'"): manager.delete("gone")

def test_other_settings_make_axis_and_baseline_again(manager, tmp_path):
    first = PersonaManager(get_config(**OPTIONS, data_dir=tmp_path), manager.model, progress=False)
    made, kept = first.assistant_baseline(), (tmp_path/"vectors/assistant_baseline.safetensors").read_bytes()
    again = PersonaManager(first.config, manager.model, progress=False).assistant_baseline()
    assert (tmp_path/"vectors/assistant_baseline.safetensors").read_bytes() == kept and torch.equal(again["response"], made["response"])
    more = get_config(**{**OPTIONS, "extraction": {**OPTIONS["extraction"], "questions": 4}}, data_dir=tmp_path)
    assert len(PersonaManager(more, manager.model, progress=False).assistant_baseline()["response"]) == 4

# The engine

def small_gemma(manager):
    "Random weights, with sliding windows shorter than a conversation"
    torch.manual_seed(0)
    config = Gemma3TextConfig(vocab_size=len(manager.model.tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1, head_dim=32, sliding_window=12, sliding_window_pattern=2, max_position_embeddings=512, eos_token_id=manager.model.tokenizer.eos_token_id, pad_token_id=0, bos_token_id=None)
    model = Gemma3ForCausalLM(config).eval()
    only = manager.model.tokenizer(list(".,?!;"), add_special_tokens=False).input_ids # what it babbles is tokenized again as it was said
    mask = torch.full((config.vocab_size,), -1e4); mask[[i for (i,) in only]] = 0.
    model.lm_head.register_forward_hook(lambda head, args, out: out + mask)
    other = ModelWrapper(manager.config); other.__dict__["_loaded"] = model, manager.model.tokenizer
    return other

def test_strength_0_is_no_steering(manager):
    engine = SteeringEngine(manager).set("0.5 sage + 0.3 trickster", strength=0, safety=False)
    for how in (GREEDY, dict(temperature=1., top_p=.8, seed=5, max_tokens=16)):
        for q in ("What is truth?", "Why?"): assert engine.generate(conversation(q), **how) == generate_local(engine.model, engine.tokenizer, [conversation(q)], **how)[0]
    assert engine.set(strength=.5).generate(conversation("Why?"), **GREEDY) != generate_local(engine.model, engine.tokenizer, [conversation("Why?")], **GREEDY)[0]

@pytest.mark.parametrize("kind", ["persona-tiny", "sliding windows"])
def test_a_kept_conversation_is_a_recomputed_one(manager, tmp_path, kind):
    if kind == "sliding windows":
        wrapper = small_gemma(manager)
        manager = PersonaManager(get_config(**OPTIONS, data_dir=tmp_path), wrapper, progress=False)
        torch.manual_seed(1); manager._shared = {}
        axis = torch.randn(6, 64)
        manager.safety_axis = lambda: Vector(axis, name="axis"); manager.assistant_baseline = lambda: Activations({k: torch.randn(5, 6, 64) for k in ("response", "last_prompt")}, dict.fromkeys(("response", "last_prompt"), ["q"]*5), range(6), {"norms": [5.]*6})
        manager.create_from_data("sage", torch.randn(6, 64))
    else: manager = PersonaManager(manager.config, manager.model, progress=False)
    manager.floors = lambda: {"response": dict.fromkeys((4, 5), 10.), "last_prompt": dict.fromkeys((4, 5), 40.)} # floors that hold nearly every token
    engine, seen = SteeringEngine(manager).set("sage", strength=.4, safety=True), []
    logits = engine._pass
    engine._pass = lambda turn, memory, new, monitors: seen.append(logits(turn, memory, new, monitors)) or seen[-1]
    for q in ("What is truth?", "Why do you say so?", "And what of the sea?"):
        first = len(seen); said = engine.chat(q, stream=False, **GREEDY); kept, turn = seen[first:], engine.turn
        first = len(seen); again = engine.generate(engine.messages[:-1], **GREEDY)
        assert said == again and engine.turn.reused == 0 and len(kept) == len(seen) - first
        for a, b in zip(kept, seen[first:]): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert turn.reused > len(turn.prompt)/2
    floors = [t for t in turn.audit.table() if t["name"] == "Clamp"]
    assert {t["where"] for t in floors} == {"last_prompt", "response"} and any(t["share"] for t in floors)

def test_a_change_leaves_what_was_said(manager):
    engine = SteeringEngine(manager)
    calm = "".join(engine.set("sage", strength=0, safety=False).chat("Tell me about the sea.", **GREEDY))
    for n in (0, 3, 7):
        for what in (dict(strength=1), dict(persona="trickster", strength=-1), dict(persona=None, safety=True)):
            engine.reset().set("sage", strength=0, safety=False); pieces = engine.chat("Tell me about the sea.", **GREEDY)
            before = "".join(next(pieces) for _ in range(n)); engine.set(**what); text = before + "".join(pieces)
            assert text[:len(before)] == calm[:len(before)]
            assert text == engine.messages[-1]["content"]
            if what == dict(strength=1): assert text != calm
            steered = [t["tokens"] for t in engine.turn.audit.table() if t["name"] == "Add"]
            if what.get("persona", "") is None and n: assert steered[0] < len(engine.turn.prompt) + len(engine.turn.said)

def test_by_hand(manager):
    "Each token of an answer is the likeliest of a whole pass with the vector added and the floors held by plain hooks"
    for where, taus in manager.floors().items():
        for l, tau in taus.items():
            p = manager.assistant_baseline()[where][:, l] @ torch.nn.functional.normalize(manager.safety_axis()[l], dim=0)
            assert tau == pytest.approx(p.quantile(.25).item(), abs=1e-4)
    engine = SteeringEngine(manager).set("trickster", strength=.5, safety=True)
    engine.generate(conversation("What is a good life?"), **GREEDY)
    model, turn, axis, floors = engine.model, engine.turn, manager.safety_axis(), manager.floors()
    v = .5*manager.norms()[3]*torch.nn.functional.normalize(manager.load("trickster").vector[3], dim=0); p = len(turn.prompt)
    def hook(layer):
        u = torch.nn.functional.normalize(axis[layer], dim=0)
        def change(block, args, h):
            tau = torch.full(h.shape[:2], -1e9); tau[:, p - 1] = floors["last_prompt"][layer]; tau[:, p:] = floors["response"][layer]
            return h + (tau - h @ u).clamp(min=0)[..., None]*u
        return change
    handles = [blocks(model)[3].register_forward_hook(lambda block, args, h: h + v), *(blocks(model)[l].register_forward_hook(hook(l)) for l in floors["response"])]
    with torch.no_grad(): best = model(torch.tensor([turn.prompt + turn.said])).logits[0].argmax(-1).tolist()
    for h in handles: h.remove()
    assert best[p - 1:p - 1 + len(turn.said)] == turn.said

def test_one_speaker_at_a_time(manager):
    engine, hold, went = SteeringEngine(manager).set(safety=False), threading.Event(), threading.Event()
    hooks = lambda: [(list(b._forward_hooks), list(b._forward_pre_hooks)) for b in blocks(engine.model)]
    found = hooks()  # transformers leaves some of its own on a model that was once asked for hidden states
    def wait(block, args, out): went.set(); hold.wait(20)
    handle = blocks(engine.model)[0].register_forward_hook(wait)
    said = []
    thread = threading.Thread(target=lambda: said.append("".join(engine.chat("Tell me about the sea.", **GREEDY)))); thread.start()
    try:
        assert went.wait(20)
        for call in (lambda: engine.chat("Hi"), lambda: engine.generate(conversation("Hi"))):
            with pytest.raises(EngineBusy, match="stop"): call()
        engine.stop() # it ends after the token it is at
    finally: hold.set(); thread.join(20); handle.remove()
    assert said == [""] and engine.messages == [] and engine.turn.finish == "interrupted"
    assert engine.chat("Hi", stream=False, **GREEDY)
    assert hooks() == found

def test_ctrl_c_keeps_what_was_said(manager):
    engine, passes = SteeringEngine(manager).set("sage", safety=True), []
    def interrupt(block, args, out):
        passes.append(1)
        if len(passes) == 6: raise KeyboardInterrupt
    handle = blocks(engine.model)[5].register_forward_hook(interrupt)
    heard = ""
    with pytest.raises(KeyboardInterrupt):
        for piece in engine.chat("Tell me about the sea.", **GREEDY): heard += piece
    handle.remove()
    assert heard and engine.messages == [dict(role="user", content="Tell me about the sea."), dict(role="assistant", content=heard)]
    answer = engine.chat("Go on.", stream=False, **GREEDY)
    assert answer == engine.generate(engine.messages[:-1], **GREEDY)

@pytest.mark.parametrize("at", [4, 9, 15, 22])
def test_stop_strings_end_an_answer_and_are_not_shown(manager, at):
    engine = SteeringEngine(manager).set(safety=False)
    whole = engine.generate(conversation("What is truth?"), **GREEDY); n = len(engine.turn.said)
    stop = [whole[at:at + 7], "never said"] # longer than a token, so that its beginning comes first
    pieces = list(engine.generate(conversation("What is truth?"), stream=True, stop=stop, **GREEDY))
    assert "".join(pieces) == whole[:whole.find(stop[0])].strip() and engine.turn.finish == "stop" and len(engine.turn.said) < n

# The monitor

def test_a_monitor_says_what_a_second_reading_says(manager):
    alerts, engine = [], SteeringEngine(manager).set("trickster", strength=.4, safety=False)
    axes = {"safety": manager.safety_axis(), "sage": manager.load("sage").raw.at(6), "early": manager.load("sage").raw.at(1)}
    monitor = engine.attach(Monitor(axes, manager.assistant_baseline(), on_alert=alerts.append))
    v = .4*manager.norms()[3]*torch.nn.functional.normalize(manager.load("trickster").vector[3], dim=0)
    for k, q in enumerate(("What is truth?", "Tell me about the sea.", "Why?")):
        engine.chat(q, stream=False, temperature=.8, seed=k, max_tokens=12)
        turn, seen = engine.turn, {}
        handles = [blocks(engine.model)[3].register_forward_hook(lambda block, args, h: h + v), *(blocks(engine.model)[l].register_forward_hook(lambda block, args, h, l=l, seen=seen: seen.update({l: h[0]})) for l in range(8))]
        with torch.no_grad(): engine.model(torch.tensor([turn.prompt + turn.said]))
        for h in handles: h.remove()
        part = inked(engine.tokenizer, turn.said); assert engine.tokenizer.decode(turn.said[part]).strip() == turn.text
        for r in monitor.table()[-3:]:
            u = torch.nn.functional.normalize(axes[r["axis"]][r["layer"]], dim=0)
            spoken = seen[r["layer"]][len(turn.prompt):][part] @ u
            assert (r["turn"], r["tokens"]) == (k, len(spoken)) and r["value"] == pytest.approx(spoken.mean().item(), abs=1e-3)
            p = manager.assistant_baseline()["response"][:, r["layer"]] @ u
            assert (r["low"], r["high"]) == pytest.approx((p.quantile(.025).item(), p.quantile(.975).item()), abs=1e-4)
            assert r["outside"] == (not r["low"] <= r["value"] <= r["high"]) == (abs(r["drift"]) > 1)
    assert alerts == [r for r in monitor.table() if r["outside"]] and alerts

def test_thinking_is_not_heard(manager):
    tokenizer = manager.model.tokenizer
    ids = tokenizer("\n <think>I wonder.</think> It is so. \n", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids[inked(tokenizer, ids)]).strip() == "It is so."
    assert inked(tokenizer, tokenizer(" \n", add_special_tokens=False).input_ids) == slice(0, 0) and inked(tokenizer, []) == slice(0, 0)

def test_the_prompt_has_no_say_in_the_template(manager):
    "A conversation that the tokenizer writes otherwise is computed again, not continued wrongly"
    engine = SteeringEngine(manager).set("sage", safety=True)
    engine.chat("What is truth?", stream=False, **GREEDY)
    engine.messages[1]["content"] = "Something else was said, and it was said at greater length than that which was said before, so that no shorter prompt is the reason to begin again."
    answer = engine.chat("Why?", stream=False, **GREEDY)
    assert engine.turn.reused == 0 and engine.turn.prompt == chat_prompt(engine.tokenizer, engine.messages[:-1])
    assert answer == engine.generate(engine.messages[:-1], **GREEDY)
