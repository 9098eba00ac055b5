"""A small Hugging Face Hub on 127.0.0.1: how huggingface_hub downloads files of a repository.

HF_ENDPOINT=server.url is read when huggingface_hub is imported, so give the client a process of
its own, or patch its constants. What is not served here is answered 501.
"""
import hashlib
import re
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Request = namedtuple("Request", "method path range")
FILE = r"/(datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"


def etag(path, data):
    """The Hub's name for a file's content: the sha256 if it lies in LFS, else git's blob id."""
    if path.endswith((".bin", ".msgpack", ".npy", ".npz", ".pt", ".pth", ".safetensors")):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """Serves `repos`, {repo id: {path: bytes} or a folder}, in a `with`.

    requests: all so far, as Request(method, path without query, range header).
    cut_after = N: the next `cut_times` GETs of a file end after N bytes, their connections too.
    """

    def __init__(self, repos=None):
        self.refs, self.commits, self.requests = {}, {}, []
        self.cut_after, self.cut_times = None, 0
        for repo, files in (repos or {}).items():
            self.add(repo, files)

    def add(self, repo, files, revision="main"):
        """Make `files` the whole of a revision. Returns the commit's sha."""
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
        matches = [re.fullmatch(FILE, request.path)
                   for request in self.requests if request.method == "GET"]
        return [unquote(match["path"]) for match in matches if match]

    def __enter__(self):
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.hub, self.url = self, f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.httpd.shutdown()
        self.httpd.server_close()


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # of each read and write, so that no thread waits for a dead client

    def do_GET(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append(Request(self.command, path, self.headers["Range"]))
        match = re.fullmatch(FILE, path)
        if not match:
            return self.refuse(501, f"hub_server.py does not serve {self.command} {path}")
        repo, revision, file = [unquote(match[key]) for key in ("repo", "revision", "path")]
        if repo not in hub.refs:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        sha = hub.refs[repo].get(revision, revision)
        if sha not in hub.commits[repo]:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if file not in hub.commits[repo][sha]:
            return self.refuse(404, "Entry not found", "EntryNotFound", sha)
        self.send(hub.commits[repo][sha][file], sha, etag(file, hub.commits[repo][sha][file]))

    do_HEAD = do_GET

    def send(self, data, sha, tag):
        hub, start, stop = self.server.hub, 0, None
        headers = {"X-Repo-Commit": sha, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if asked and self.command == "GET":
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and hub.cut_times:
            stop = hub.cut_after
            hub.cut_times -= 1
        self.answer(206 if "Content-Range" in headers else 200, headers, data[start:], stop)

    def refuse(self, status, message, code="", sha=""):
        self.answer(status, {"X-Error-Message": message, "X-Error-Code": code,
                             "X-Repo-Commit": sha})

    def answer(self, status, headers, data=b"", stop=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:stop])

    def log_message(self, *_):
        pass
