"""What is pushed comes back, from a hub of our own on this machine that speaks the interface of the real one; what fails, fails in one line."""
import json, logging, os, subprocess, sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants, get_token
from pydantic import SecretStr

from hub_server import hub as running_hub
from persona_vectors.capping import Capping
from persona_vectors.config import PersonaVectorConfig
from persona_vectors.models import fingerprint, load_model
from persona_vectors.sharing import SUFFIX, SharingError, from_hub, model_card, push_to_hub
from persona_vectors.statistics import direction_report
from persona_vectors.vectors import Activations, Axis, PersonaVectors, TraitVector, Vector

@pytest.fixture(scope="module", autouse=True)
def by_lfs():
    "Large files go by git-lfs, which the stand-in speaks, and not by xet"
    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    yield
    constants.HF_HUB_DISABLE_XET = before

@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch, tmp_path):
    "Whoever runs the tests, it is not with their token"
    for k in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    assert get_token() is None

@pytest.fixture(scope="module")
def server():
    with running_hub() as h: yield h

@pytest.fixture
def hub(server):
    server.repos.clear(); server.objects.clear(); server.seen.clear(); server.broken.clear(); server.meanwhile = None
    return server

@pytest.fixture
def me(hub, tmp_path): return dict(endpoint=hub.url, token=hub.token), dict(endpoint=hub.url, token=hub.token, cache_dir=tmp_path / "cache")

@pytest.fixture(scope="module")
def model(): return load_model(PersonaVectorConfig(model_name="persona-tiny", device="cpu"))[0]

ABOUT = dict(model="Qwen/Qwen3-8B", fingerprint="0123456789abcdef", dtype="bfloat16", where="response", keep=["ok"], seed=3, note="ä | b")
Q = [f"q{i % 6}" for i in range(24)]

@cache
def trait(kind=TraitVector, seed=0, **more):
    g = torch.Generator().manual_seed(seed); on, off = torch.randn(24, 2, 16, generator=g) + .5, torch.randn(24, 2, 16, generator=g)
    report = direction_report(on, off, Q, Q, layers=(3, 5), bootstrap=30, permutations=30)
    return kind(on.mean(0) - off.mean(0), (3, 5), "warmth", ABOUT, on.mean(0), off.mean(0), 24, 24, report, replace(report, n_on=7), **more)

def things():
    torch.manual_seed(0)
    return dict(vector=Vector(torch.randn(2, 16), (3, 5), "v", ABOUT), trait=trait(), axis=trait(Axis, poles=("roles", "default")), personas=PersonaVectors(dict(ghost=torch.randn(2, 16), sage=torch.randn(2, 16)), (3, 5), dict(ghost=18, sage=17), ABOUT),
                rows=Activations(dict(a=torch.randn(4, 2, 16)), dict(a=list("wxyz")), (3, 5), ABOUT), capping=Capping(Vector(torch.randn(2, 16), (3, 5), "axis", ABOUT), {3: -1.5, 5: .25}, "careful", 1.5, dict(percentile=25)))

def tensors(o):
    if isinstance(o, Capping): return [o.axis.values]
    return list(o.rows.values()) if hasattr(o, "rows") else [x for k in ("values", "on_mean", "off_mean") if (x := getattr(o, k, None)) is not None]

def about_of(o): return (o.axis if isinstance(o, Capping) else o).about

@pytest.mark.parametrize("large", [(".safetensors",), ()], ids=["large files", "all files small"])
def test_everything_comes_back(hub, me, large, monkeypatch):
    push, pull = me; monkeypatch.setattr(hub, "large", large)
    assert push_to_hub(things(), "me/all", license="mit", **push) == f"{hub.url}/me/all"
    assert sorted(hub.files("me/all")) == sorted([".gitattributes", "README.md", *(f"{k}{SUFFIX}" for k in things())])
    for name, o in things().items():
        again = from_hub("me/all", name, **pull)
        assert type(again) is type(o) and all(map(torch.equal, tensors(again), tensors(o)))
        for k in ("layers", "name", "report", "same_text", "poles", "counts", "questions", "floors", "strength", "n_on"): assert getattr(again, k, None) == getattr(o, k, None), (name, k)
        found = dict(about_of(again)); where = found.pop("hub")
        assert found == about_of(o) and where.startswith(f"me/all/{name}{SUFFIX}@") and len(where.split("@")[1]) == 12
    assert hub.repos["model", "me/all"]["log"] == ["vector, trait, axis, personas, rows, capping"] # one push is one commit
    assert any(path.startswith("/lfs/") for _, _, path, _ in hub.seen) == bool(large)

def test_the_token_goes_to_the_hub_and_nowhere_else(hub, me, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    push, pull = me; secret = SecretStr(hub.token)
    push_to_hub(trait(), "me/warmth", endpoint=hub.url, token=secret); from_hub("me/warmth", endpoint=hub.url, token=secret, cache_dir=tmp_path / "c")
    assert {key for _, host, path, key in hub.seen if host == "127.0.0.1" and path.startswith("/api")} == {f"Bearer {hub.token}"}
    assert {key for _, host, path, key in hub.seen if host == "localhost" or path.startswith("/lfs/")} == {None} # storage is elsewhere, and hears nothing
    for bad in ("hf_wrong_but_secret", hub.token):
        with pytest.raises(SharingError) as e: push_to_hub(trait(), "you/x", endpoint=hub.url, token=bad)
        assert bad not in str(e.value) and e.value.__cause__ is None and e.value.__suppress_context__
    assert hub.token not in caplog.text + "".join(capfd.readouterr()) and all(hub.token.encode() not in data for data in hub.files("me/warmth").values())
    assert not any(hub.token.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())

def test_the_card_tells_what_the_vector_knows():
    t = trait(); card = model_card({"warmth": t, "plain": Vector(torch.ones(1, 16), (7,), "p")}, "me/warmth", license="cc-by-4.0", description="Warm.", intended_use="To be looked at.")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == dict(library_name="persona-steer", tags=["persona-vectors", "steering-vectors", "activation-steering", "interpretability"], license="cc-by-4.0", base_model=["Qwen/Qwen3-8B"])
    rows = {int(cells[1]): cells for line in body.splitlines() if (cells := [c.strip() for c in line.split("|")])[1:2] and cells[1] in ("3", "5")}
    for l in t.report.layers:
        assert rows[l.layer][2:8] == [f"{l.auc:.3f} ({l.interval[0]:.3f} to {l.interval[1]:.3f})", f"{l.separation:.2f} ({l.separation_interval[0]:.2f} to {l.separation_interval[1]:.2f})", f"{l.d_prime:.2f} ({l.d_prime_interval[0]:.2f} to {l.d_prime_interval[1]:.2f})",
                                      f"{l.accuracy:.2f} ({l.accuracy_interval[0]:.2f} to {l.accuracy_interval[1]:.2f})", f"{l.p:.3f}", f"{l.noise:.2f}"]
    for words in ("Warm.", "To be looked at.", "0123456789abcdef", "24 responses with it, 24 without, to 6 questions", f"Best at layer {t.best_layer}", "No statistics were kept", "Nothing is known about where it came from", "from_hub('me/warmth', 'warmth')", "ä \\| b", "same words"): assert words in body, words
    unknown = replace(t, report=replace(t.report, chosen_auc=float("nan"), layers=[replace(l, p=float("nan")) for l in t.report.layers]), same_text=None)
    assert "nan" not in model_card(unknown, "me/w") and "| – |" in model_card(unknown, "me/w")

def test_the_three_lines_of_the_card_run(hub, me, tmp_path):
    "As somebody pastes them, with the hub's address in the environment and nobody logged in"
    push, _ = me; push_to_hub(trait(), "me/warmth", **push)
    lines = hub.files("me/warmth")["README.md"].decode().split("```python\n")[1].split("```")[0]
    assert len(lines.strip().splitlines()) == 3
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    code = lines.replace("from persona_vectors import", "from persona_vectors.sharing import") + "print(row.shape, vector)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "torch.Size([16]) warmth: 24 on" in done.stdout, done.stderr

def test_private_and_gated(hub, me, tmp_path):
    push, pull = me; push_to_hub(trait(), "me/secret", private=True, **push)
    assert hub.repos["model", "me/secret"]["private"] and from_hub("me/secret", **pull).name == "warmth"
    for token in (None, "hf_stand_in_reader"):
        with pytest.raises(SharingError, match="or it is private and the token may not see it"): from_hub("me/secret", endpoint=hub.url, token=token, cache_dir=tmp_path / "x")
    push_to_hub(trait(), "me/open", **push); hub.repos["model", "me/open"]["gated"] = True
    with pytest.raises(SharingError, match="gated: accept its terms"): from_hub("me/open", endpoint=hub.url, token="hf_stand_in_reader", cache_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()

def test_revisions(hub, me):
    push, pull = me
    push_to_hub(trait(), "me/w", **push); first = hub.repos["model", "me/w"]["branches"]["main"]
    push_to_hub(trait(seed=1), "me/w", revision="v2", **push); push_to_hub(trait(seed=2), "me/w", revision="v2", **push); push_to_hub(trait(seed=3), "me/w", **push)
    for revision, seed in ((None, 3), ("main", 3), ("v2", 2), (first, 0)): assert torch.equal(from_hub("me/w", revision=revision, **pull).values, trait(seed=seed).values), revision
    assert from_hub("me/w", revision=first, **pull).about["hub"].endswith(first[:12])
    with pytest.raises(SharingError, match="no such revision"): from_hub("me/w", revision="v3", **pull)

def test_the_same_again_is_no_new_commit(hub, me):
    push, _ = me; push_to_hub(trait(), "me/w", **push); n = len(hub.repos["model", "me/w"]["commits"])
    push_to_hub(trait(), "me/w", **push)
    assert len(hub.repos["model", "me/w"]["commits"]) == n

def test_nothing_is_half_there(hub, me):
    push, pull = me
    with pytest.raises(SharingError, match="no token to push with"): push_to_hub(trait(), "me/w", endpoint=hub.url)
    for bad, words in ((dict(ABOUT, file="/data/me/x.pt"), r"about\['file'\] holds a path"), (dict(ABOUT, keys=["hf_abcdefghijklmnopqrst"]), "a path or a key"), (dict(ABOUT, data="C:\\Users\\me\\x"), "a path or a key"), (dict(ABOUT, of=dict(a="~/x/y")), "a path or a key")):
        with pytest.raises(SharingError, match=words): push_to_hub(replace(trait(), about=bad), "me/w", **push)
    with pytest.raises(SharingError, match="must be an identifier"): push_to_hub(trait(), "me/w", license="All Rights", **push)
    with pytest.raises(SharingError, match="is Tensor: shared are"): push_to_hub(torch.ones(3), "me/w", **push)
    assert not hub.seen and not hub.repos # the hub has heard of none of it
    for part, status, words in (("/commit/", 503, r"the hub answers 503: out of order, Bearer \*\*\* .*; try again later"), ("/objects/batch", 400, "the hub answers 400"), ("/lfs/", 400, "the hub answers 400"), ("/validate-yaml", 400, "Invalid metadata")):
        hub.broken = {part: status}
        with pytest.raises(SharingError, match=words) as e: push_to_hub(trait(), "me/w", **push)
        assert "\n" not in str(e.value) and hub.token not in str(e.value) and list(hub.files("me/w")) == [".gitattributes"]
    hub.broken = {}
    push_to_hub(trait(), "me/w", **push); assert from_hub("me/w", **pull).name == "warmth"

def test_two_who_push_at_once_do_not_mix(hub, me):
    push, _ = me; push_to_hub(trait(), "me/w", **push)
    hub.meanwhile = lambda: hub.put("me/w", {"theirs.txt": b"x"})
    with pytest.raises(SharingError, match="somebody else has written to it meanwhile"): push_to_hub(trait(seed=1), "me/w", **push)
    push_to_hub(trait(seed=1), "me/w", **push); assert "theirs.txt" in hub.files("me/w")

def test_cards_of_people_and_neighbours(hub, me, caplog):
    push, _ = me; card = lambda: hub.files("me/w")["README.md"].decode()
    push_to_hub(trait(), "me/w", **push); push_to_hub(Vector(torch.ones(1, 16), (2,), "cold"), "me/w", **push)
    assert "| `cold` |" in card() and "| `warmth` |" in card() and "24 responses with it" in card() # the neighbour's statistics too
    push_to_hub(Vector(torch.ones(1, 16), (2,), "third"), "me/w", card=False, **push); assert "third" not in card() and f"third{SUFFIX}" in hub.files("me/w")
    hub.put("me/w", {"README.md": "# Mine, all mine\n".encode()})
    push_to_hub(trait(seed=1), "me/w", **push)
    assert card() == "# Mine, all mine\n" and "written by hand and stays" in caplog.text

def test_what_is_not_there(hub, me):
    push, pull = me; push_to_hub({"a": trait(), "b/c d": trait(seed=1)}, "me/w", **push)
    for args, words in ((("me/none",), "no such repository at http"), (("me/w",), "has a, b-c-d; say which: from_hub\\('me/w', 'a'\\)"), (("me/w", "x"), "no vectors named 'x'; there are a, b-c-d"), (("not a name",), "not a name on the hub")):
        with pytest.raises(SharingError, match=words): from_hub(*args, **pull)
    with pytest.raises(SharingError, match="no file 'x.pt' in it"): from_hub("me/w", file="x.pt", **pull)
    with pytest.raises(SharingError, match="is for a file of another project"): from_hub("me/w", "a", source="gguf", **pull)
    hub.put("me/model", {"config.json": b"{}", "model.safetensors": b"x" * 1000}); hub.seen.clear()
    with pytest.raises(SharingError, match="no vectors in it .* there are config.json, model.safetensors"): from_hub("me/model", **pull)
    assert not any("resolve" in path for _, _, path, _ in hub.seen) # nobody's weights are fetched to find that out
    with pytest.raises(SharingError, match="the token is not valid there"): from_hub("me/w", "a", endpoint=hub.url, token="hf_wrong", cache_dir=pull["cache_dir"])

def test_whose_vectors(hub, me, model):
    push, pull = me; fits = Vector(torch.ones(2, 160), (3, 4), "v", dict(model="persona-tiny", fingerprint=fingerprint(model)))
    push_to_hub(dict(fits=fits, other=replace(fits, about=dict(model="other", fingerprint="abc")), wide=trait(), cap=Capping(replace(fits, about=dict(model="other", fingerprint="abc")), {3: 1.})), "me/w", **push)
    assert from_hub("me/w", "fits", model, **pull).name == "v" and from_hub("me/w", "other", model, any_model=True, **pull).name == "v"
    for name in ("other", "cap"):
        with pytest.raises(SharingError, match=f"me/w/{name}{SUFFIX}: the vectors were made with other .abc., this model is persona-tiny .*; pass any_model=True to use them"): from_hub("me/w", name, model, **pull)
    for any_model in (False, True):
        with pytest.raises(SharingError, match="have width 16, the model 160"): from_hub("me/w", "wide", model, any_model, **pull)

def test_damaged_files(hub, me):
    push, pull = me; push_to_hub(trait(), "me/w", **push); data = hub.files("me/w")[f"warmth{SUFFIX}"]
    for name, bad in dict(garbage=b"nothing", cut=data[:-40], pickled=b"\x80\x04cos\nmkdir\n", empty=b"").items():
        hub.put(f"me/{name}", {f"x{SUFFIX}": bad})
        with pytest.raises(SharingError, match=f"me/{name}/x{SUFFIX}: damaged.*; the copy on this machine is") as e: from_hub(f"me/{name}", **pull)
        assert "\n" not in str(e.value)
    hub.put("me/out", {f"../x{SUFFIX}": data})
    with pytest.raises(SharingError): from_hub("me/out", **pull)
    assert not (pull["cache_dir"].parent / f"x{SUFFIX}").exists()

def test_out_of_reach(me, tmp_path, caplog):
    with running_hub() as h:
        at = dict(endpoint=h.url, cache_dir=tmp_path / "c"); push_to_hub(trait(), "me/w", endpoint=h.url, token=h.token)
        assert from_hub("me/w", **at).name == "warmth"
        h.broken = {"/api/models": 503}
        assert from_hub("me/w", **at).name == "warmth" and "the copy on this machine" in caplog.text
        with pytest.raises(SharingError, match="the hub answers 503.*try again later"): from_hub("me/new", **at)
    caplog.clear()
    again = from_hub("me/w", **at); assert torch.equal(again.values, trait().values) and "cannot be reached" in caplog.text
    with pytest.raises(SharingError, match="cannot be reached .*no copy on this machine; check the connection"): from_hub("me/new", **at)
    with pytest.raises(SharingError, match="cannot be reached .*check the connection and HF_ENDPOINT"): push_to_hub(trait(), "me/w", endpoint=at["endpoint"], token="hf_x")

class Code:
    def __init__(self, at): self.at = str(at)
    def __reduce__(self): return os.mkdir, (self.at,)

def test_files_of_other_projects(hub, me, tmp_path):
    _, pull = me; axis, mean = torch.randn(4, 16), torch.randn(4, 16); torch.save(dict(axis=axis, default_mean=mean, role_mean=mean - axis, n_roles=275), tmp_path / "axis.pt"); torch.save(dict(axis=Code(tmp_path / "ran")), tmp_path / "evil.pt")
    hub.put("lu/vectors", {"gemma/assistant_axis.pt": (tmp_path / "axis.pt").read_bytes(), "evil.pt": (tmp_path / "evil.pt").read_bytes()}, kind="dataset")
    found = from_hub("lu/vectors", file="gemma/assistant_axis.pt", repo_type="dataset", n_layers=4, **pull)
    assert isinstance(found, Axis) and torch.equal(found[2], axis[2]) and found.about["hub"].startswith("lu/vectors/gemma/assistant_axis.pt@")
    with pytest.raises(SharingError, match="lu/vectors/gemma/assistant_axis.pt: 4 rows are 4 layers in the convention of assistant-axis, the model has 62"): from_hub("lu/vectors", file="gemma/assistant_axis.pt", repo_type="dataset", n_layers=62, **pull)
    with pytest.raises(SharingError, match="do not load pickled code"): from_hub("lu/vectors", file="evil.pt", repo_type="dataset", n_layers=4, **pull)
    assert not (tmp_path / "ran").exists()

def test_the_stand_in_is_strict(hub):
    "What it takes is what was announced: it would not hide a mistake of ours"
    from huggingface_hub import CommitOperationAdd, HfApi
    api = HfApi(endpoint=hub.url, token=hub.token); api.create_repo("me/w")
    import httpx
    assert httpx.put(f"{hub.url}/lfs/{'0' * 64}", content=b"other").status_code == 400
    with pytest.raises(Exception, match="Invalid metadata"): api.create_commit("me/w", [CommitOperationAdd("README.md", b"---\nlicense: [mit]\n---\n")], commit_message="m")
    with pytest.raises(Exception, match="403|rights"): HfApi(endpoint=hub.url, token="hf_stand_in_reader").create_repo("me/w2")
    assert json.loads(httpx.get(f"{hub.url}/api/models/me/w").text)["siblings"] == [dict(rfilename=".gitattributes", size=50)]
