"""A small Hugging Face Hub on 127.0.0.1: how huggingface_hub downloads and uploads models.

Weights go by git-lfs's basic transfer, small files inside the commit. There is no Xet: uploads need
HF_HUB_DISABLE_XET=1. That, HF_ENDPOINT=server.url and HF_HOME are read when huggingface_hub is
imported, so give the client a process of its own.
What is not served here is answered 501, so that a test fails loudly.
"""
import base64
import hashlib
import json
import re
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Request = namedtuple("Request", "method path range authorization")
MODEL, REVISION = "(?P<repo>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
ROUTES = {"file": f"(GET|HEAD) /{MODEL}/resolve/{REVISION}/(?P<path>.+)",
          "create": "POST /api/repos/create",
          "validate": "POST /api/validate-yaml",
          "preupload": f"POST /api/models/{MODEL}/preupload/{REVISION}",
          "lfs_batch": rf"POST /{MODEL}\.git/info/lfs/objects/batch",
          "lfs_upload": "PUT /lfs/(?P<oid>[0-9a-f]{64})",
          "commit": f"POST /api/models/{MODEL}/commit/{REVISION}"}


def is_lfs(path, size):
    weights = (".bin", ".msgpack", ".npy", ".npz", ".pt", ".pth", ".safetensors")
    return path.endswith(weights) or size > 10 << 20


def etag(path, data):
    """The Hub's name for a file's content: the sha256 if it lies in LFS, else git's blob id."""
    if is_lfs(path, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """Serves `repos`, {repo id: {path: bytes} or a folder}, from start() to stop() or in a `with`.

    private: {repo id: the token that opens it}. Once a token is known, others are refused
        everywhere, as on the Hub; until then any will do. Uploads need one always.
    requests: all so far, as Request(method, path without query, range and authorization header).
    cut_after = N: the next GET of a file, or the next `cut_times`, ends after N bytes and the
        connection with it.
    refs, commits: {repo id: {revision: sha}}, {repo id: {sha: {path: bytes}}}: what was uploaded.
    """

    def __init__(self, repos=None, private=None):
        self.private = dict(private or {})
        self.refs, self.commits, self.lfs, self.requests = {}, {}, {}, []
        self.cut_after, self.cut_times, self.lock = None, 1, threading.Lock()
        for repo, files in (repos or {}).items():
            self.add(repo, files)

    def add(self, repo, files, revision="main"):
        """Make `files` the whole of a revision, new or not. Returns the commit's sha, which follows
        from their content."""
        if not isinstance(files, dict):
            files = {path.relative_to(files).as_posix(): path.read_bytes()
                     for path in Path(files).rglob("*") if path.is_file()}
        content = sorted((path, etag(path, data)) for path, data in files.items())
        sha = hashlib.sha1(repr(content).encode()).hexdigest()
        self.commits.setdefault(repo, {})[sha] = dict(files)
        self.refs.setdefault(repo, {})[revision] = sha
        return sha

    @property
    def fetched(self):
        """Path in its repository of each file that was asked for by GET, in order, with repeats."""
        matches = [re.fullmatch(ROUTES["file"], f"GET {request.path}")
                   for request in self.requests if request.method == "GET"]
        return [unquote(match["path"]) for match in matches if match]

    def start(self):
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.hub, self.url = self, f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self, *_):
        self.httpd.shutdown()
        self.httpd.server_close()

    __enter__, __exit__ = start, stop


class Refusal(Exception):
    """status, X-Error-Message, X-Error-Code, X-Repo-Commit"""


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # of each read and write, so that no thread waits for a dead client

    def route(self):
        hub, url = self.server.hub, urlsplit(self.path)
        authorization = self.headers["Authorization"]
        hub.requests.append(Request(self.command, url.path, self.headers["Range"], authorization))
        known = hub.private.values()
        self.hub, self.token = hub, (authorization or "")[len("Bearer "):]
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        try:
            if self.token and known and self.token not in known:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for name, pattern in ROUTES.items():
                match = re.fullmatch(pattern, f"{self.command} {url.path}")
                if match and "create_pr" not in url.query:
                    parts = {key: unquote(value) for key, value in match.groupdict().items()}
                    return getattr(self, name)(**parts)
            raise Refusal(501, f"hub_server.py does not serve {self.command} {self.path}")
        except Refusal as refusal:
            status, *values = refusal.args
            names = ("X-Error-Message", "X-Error-Code", "X-Repo-Commit")
            self.answer(b"", status, dict(zip(names, values)))
        except ConnectionError:  # the client went away
            pass

    do_GET = do_HEAD = do_POST = do_PUT = route

    def answer(self, data, status=200, headers=None, stop=None):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:stop])

    def log_message(self, *_):
        pass

    def files(self, repo, revision, write=False):
        """(commit sha, files) of a revision, or the refusal that the Hub gives."""
        hub = self.hub
        if repo not in hub.refs or hub.private.get(repo, self.token) != self.token:
            # Not a word that it exists.
            raise Refusal(404 if self.token else 401, "Repository not found", "RepoNotFound")
        if write and not self.token:
            raise Refusal(401, "Invalid username or password.")
        sha = hub.refs[repo].get(revision, revision)
        if sha not in hub.commits[repo]:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, hub.commits[repo][sha]

    def file(self, repo, revision, path):
        sha, files = self.files(repo, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", sha)
        data, get, start, stop = files[path], self.command == "GET", 0, None
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag(path, data)}"', "Accept-Ranges": "bytes"}
        if get and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")):
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        with self.hub.lock:
            if get and self.hub.cut_after is not None:
                stop, self.hub.cut_times = self.hub.cut_after, self.hub.cut_times - 1
                if self.hub.cut_times < 1:
                    self.hub.cut_after, self.hub.cut_times = None, 1
        self.answer(data[start:], 206 if "Content-Range" in headers else 200, headers, stop)

    def create(self):
        if not self.token:
            raise Refusal(401, "Invalid username or password.")
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or 'user'}/{asked['name']}"
        exists = repo in self.hub.refs
        if not exists:
            self.hub.add(repo, {})
        self.answer({"url": f"{self.hub.url}/{repo}"}, 409 if exists else 200)

    def validate(self):
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        files = self.files(repo, revision, write=True)[1]
        new = [(entry["path"], entry["size"]) for entry in json.loads(self.body)["files"]]
        self.answer({"files": [{
            "path": path, "shouldIgnore": False,
            "uploadMode": "lfs" if is_lfs(path, size) else "regular",
            "oid": etag(path, files[path]) if path in files else None} for path, size in new]})

    def lfs_batch(self, repo):
        self.files(repo, "main", write=True)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.lfs:  # else nothing to do
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):  # without a token: on the Hub the address itself is signed
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "These are not the bytes that were announced")
        self.hub.lfs[oid] = self.body
        self.answer({})

    def commit(self, repo, revision):
        with self.hub.lock:
            files = dict(self.files(repo, revision, write=True)[1])
            for key, value in (json.loads(line).values() for line in self.body.splitlines()):
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = self.hub.lfs[value["oid"]]
                elif key == "deletedFile":
                    files.pop(value["path"], None)
                elif key != "header":
                    raise Refusal(501, f"hub_server.py does not serve {key}")
            sha = self.hub.add(repo, files, revision)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url})
