"""A little model hub on 127.0.0.1, with the HTTP interface that huggingface_hub speaks: what is pushed can be pulled again.

    with hub() as h: HfApi(endpoint=h.url, token=h.token)...      # in a process
    python hub_server.py                                          # prints address and token when it listens

Repositories with branches and commits, regular files and large ones (git-lfs: batch, upload, verify; served by a redirect to another
host name, as from a CDN), private ones, tokens that may read or write. It keeps all in memory, and the requests it saw in `seen`.
"""
import base64, hashlib, json, sys, threading, time
from contextlib import contextmanager
from urllib.parse import unquote

import uvicorn, yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

def sha(data, kind="sha1"): return hashlib.new(kind, data).hexdigest()
def blob_id(data): return sha(b"blob %d\0" % len(data) + data) # as git names a file

class Refused(Exception):
    def __init__(self, status, message, code=None): self.status, self.message, self.code = status, message, code

class Hub:
    "Repositories, tokens and what happened"
    def __init__(self, large=(".safetensors", ".pt"), writers=None):
        self.large, self.writers = large, writers or {"hf_stand_in_writer": "me"}
        self.readers, self.repos, self.objects, self.seen, self.port = {"hf_stand_in_reader": "you"}, {}, {}, [], 0
        self.broken, self.meanwhile = {}, None # {part of a path: the status it answers}; what happens just before the next commit

    @property
    def url(self): return f"http://127.0.0.1:{self.port}"
    @property
    def token(self): return next(iter(self.writers))

    # ------------------------------------------------------------ who may do what
    def user(self, request):
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if given and given not in self.writers and given not in self.readers: raise Refused(401, "Invalid credentials in Authorization header")
        return self.writers.get(given) or self.readers.get(given)

    def repo(self, request, kind, name, write=False):
        user, found = self.user(request), self.repos.get((kind, name))
        if found is None or found["private"] and user != name.split("/")[0]: raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if found.get("gated") and user != name.split("/")[0]: raise Refused(403, "Access to this repository is restricted", "GatedRepo")
        if write and not user: raise Refused(401, "Invalid username or password.")
        if write and self.writers.get(request.headers["authorization"].removeprefix("Bearer ")) != name.split("/")[0]: raise Refused(403, "you must use a token with write access")
        return found

    def commit_of(self, repo, revision):
        at = repo["branches"].get(unquote(revision), unquote(revision))
        if at not in repo["commits"]: raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return at

    def new_commit(self, repo, tree, branch, message):
        at = sha(json.dumps([message, time.time_ns(), {k: blob_id(v) for k, v in tree.items()}]).encode())
        repo["commits"][at], repo["branches"][branch] = tree, at
        return at

    def put(self, name, files, kind="model", private=False, branch="main"):
        "A repository made behind the interface, for tests; returns its commit"
        repo = self.repos.setdefault((kind, name), dict(private=private, commits={}, branches={}, log=[]))
        return self.new_commit(repo, {**repo["commits"].get(repo["branches"].get(branch), {}), **files}, branch, "put")

    def files(self, name, kind="model", revision="main"): repo = self.repos[kind, name]; return repo["commits"][repo["branches"][revision]]

def app_of(hub):
    app = FastAPI()

    @app.middleware("http")
    async def watch(request, proceed):
        hub.seen.append((request.method, request.url.hostname, request.url.path, request.headers.get("authorization")))
        if status := next((n for part, n in hub.broken.items() if part in request.url.path), None): return JSONResponse(dict(error="out of order"), status, {"X-Error-Message": f"out of order, {request.headers.get('authorization', 'stranger')}"}) # as careless servers do
        try: return await proceed(request)
        except Refused as e: return refusal(e)

    def refusal(e): return JSONResponse(dict(error=e.message), e.status, {"X-Error-Message": e.message, **({"X-Error-Code": e.code} if e.code else {})})
    @app.exception_handler(Refused)
    async def refused(request, e): return refusal(e)

    @app.post("/api/repos/create")
    async def create(request: Request):
        user, asked = hub.user(request), await request.json()
        if not user: raise Refused(401, "Invalid username or password.")
        owner, kind = asked.get("organization") or user, asked.get("type", "model"); name = f"{owner}/{asked['name']}"
        if user not in hub.writers.values() or owner != user: raise Refused(403, f"You don't have the rights to create a {kind} under the namespace \"{owner}\"")
        if (kind, name) in hub.repos: return JSONResponse(dict(error=f"You already created this {kind} repo", url=f"{hub.url}/{name}"), 409)
        hub.put(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, kind, asked.get("visibility") == "private" or asked.get("private", False))
        return dict(url=f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{name}", name=name)

    @app.post("/api/validate-yaml")
    async def validate(request: Request):
        text = (await request.json())["content"]
        if not text.startswith("---\n"): return dict(errors=[], warnings=[dict(message="empty or missing yaml metadata in repo card")])
        try: found = yaml.safe_load(text.split("---\n")[1])
        except yaml.YAMLError as e: return JSONResponse(dict(errors=[dict(message=str(e))], warnings=[]), 400)
        bad = [k for k, kind in dict(license=str, tags=list, library_name=str, base_model=(str, list)).items() if k in found and not isinstance(found[k], kind)]
        return JSONResponse(dict(errors=[dict(message=f'"{k}" has the wrong type') for k in bad], warnings=[]), 400 if bad else 200)

    @app.post("/api/{kinds}/{owner}/{name}/preupload/{revision}")
    async def preupload(request: Request, kinds, owner, name, revision):
        repo = hub.repo(request, kinds[:-1], f"{owner}/{name}", True); tree = repo["commits"][hub.commit_of(repo, revision)]
        kind_of = lambda path: "lfs" if path.endswith(hub.large) else "regular"
        oid = lambda path: None if path not in tree else sha(tree[path], "sha256") if kind_of(path) == "lfs" else blob_id(tree[path])
        return dict(files=[dict(path=f["path"], uploadMode=kind_of(f["path"]), shouldIgnore=False, oid=oid(f["path"])) for f in (await request.json())["files"]])

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(request: Request, owner, name):
        hub.repo(request, "model", f"{owner}/{name}", True)
        return dict(transfer="basic", objects=[dict(o, **({} if o["oid"] in hub.objects else dict(actions=dict(upload=dict(href=f"{hub.url}/lfs/{o['oid']}?signed=1"), verify=dict(href=f"{hub.url}/lfs-verify"))))) for o in (await request.json())["objects"]])

    @app.put("/lfs/{oid}")
    async def upload(request: Request, oid):
        data = await request.body()
        if sha(data, "sha256") != oid: raise Refused(400, "not what was announced")
        hub.objects[oid] = data
        return Response()

    @app.post("/lfs-verify")
    async def verify(request: Request):
        asked = await request.json()
        if len(hub.objects.get(asked["oid"], b"")) != asked["size"]: raise Refused(404, "Object not found")
        return Response()

    @app.post("/api/{kinds}/{owner}/{name}/commit/{revision}")
    async def commit(request: Request, kinds, owner, name, revision):
        if hub.meanwhile: happens, hub.meanwhile = hub.meanwhile, None; happens()
        repo = hub.repo(request, kinds[:-1], f"{owner}/{name}", True); parent = hub.commit_of(repo, revision)
        lines = [json.loads(line) for line in (await request.body()).splitlines()]; head = lines[0]["value"]
        if head.get("parentCommit", parent) != parent: raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo["commits"][parent])
        for line in lines[1:]:
            o = line["value"]
            if line["key"] == "file": tree[o["path"]] = base64.b64decode(o["content"])
            elif line["key"] == "lfsFile":
                if o["oid"] not in hub.objects: raise Refused(400, f"{o['path']} was not uploaded")
                tree[o["path"]] = hub.objects[o["oid"]]
            elif line["key"] == "deletedFile": tree.pop(o["path"])
        at = hub.new_commit(repo, tree, unquote(revision), head["summary"]); repo["log"].append(head["summary"])
        return dict(success=True, commitOid=at, commitUrl=f"{hub.url}/{owner}/{name}/commit/{at}")

    @app.post("/api/{kinds}/{owner}/{name}/branch/{branch}")
    async def branch(request: Request, kinds, owner, name, branch):
        repo = hub.repo(request, kinds[:-1], f"{owner}/{name}", True)
        if branch in repo["branches"]: raise Refused(409, f"Reference already exists: refs/heads/{branch}")
        repo["branches"][branch] = hub.commit_of(repo, "main")
        return Response()

    def info(request, kinds, name, revision):
        repo = hub.repo(request, kinds[:-1], name); at = hub.commit_of(repo, revision); tree = repo["commits"][at]
        return dict(id=name, modelId=name, author=name.split("/")[0], sha=at, private=repo["private"], gated=False, disabled=False, downloads=0, likes=0, tags=[], siblings=[dict(rfilename=k, size=len(v)) for k, v in tree.items()])
    @app.get("/api/{kinds}/{owner}/{name}")
    async def newest(request: Request, kinds, owner, name): return info(request, kinds, f"{owner}/{name}", "main")
    @app.get("/api/{kinds}/{owner}/{name}/revision/{revision}")
    async def at_revision(request: Request, kinds, owner, name, revision): return info(request, kinds, f"{owner}/{name}", revision)

    @app.get("/api/{kinds}/{owner}/{name}/tree/{revision}")
    async def tree_of(request: Request, kinds, owner, name, revision):
        repo = hub.repo(request, kinds[:-1], f"{owner}/{name}")
        return [dict(type="file", path=k, size=len(v), oid=blob_id(v), **(dict(lfs=dict(oid=sha(v, "sha256"), size=len(v), pointerSize=134)) if k.endswith(hub.large) else {})) for k, v in repo["commits"][hub.commit_of(repo, revision)].items()]

    async def resolve(request, kind, name, revision, path):
        repo = hub.repo(request, kind, name); at = hub.commit_of(repo, revision)
        if path not in repo["commits"][at]: return JSONResponse(dict(error="Entry not found"), 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": at})
        data = repo["commits"][at][path]
        if path.endswith(hub.large): hub.objects[oid := sha(data, "sha256")] = data; return Response(status_code=302, headers={"X-Repo-Commit": at, "X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{oid}"', "Location": f"http://localhost:{hub.port}/cdn/{oid}"})
        return Response(data, headers={"X-Repo-Commit": at, "ETag": f'"{blob_id(data)}"'}, media_type="application/octet-stream")
    @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def model_file(request: Request, owner, name, revision, path): return await resolve(request, "model", f"{owner}/{name}", revision, path)
    @app.api_route("/datasets/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def dataset_file(request: Request, owner, name, revision, path): return await resolve(request, "dataset", f"{owner}/{name}", revision, path)
    @app.get("/cdn/{oid}")
    async def large_file(oid): return Response(hub.objects[oid], media_type="application/octet-stream")
    return app

@contextmanager
def hub(**settings):
    "A hub that listens, for as long as the context lasts"
    h = Hub(**settings); server = uvicorn.Server(uvicorn.Config(app_of(h), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True); thread.start()
    while not server.started:
        if not thread.is_alive(): raise RuntimeError("the hub did not start")
        time.sleep(.01)
    h.port = server.servers[0].sockets[0].getsockname()[1]
    try: yield h
    finally: server.should_exit = True; thread.join(5)

if __name__ == "__main__":
    with hub() as h:
        print(json.dumps(dict(url=h.url, token=h.token)), flush=True)
        try: sys.stdin.read() # until whoever started it goes away
        except KeyboardInterrupt: pass
