"""A Hugging Face Hub on the loopback interface, in memory: what `huggingface_hub` calls to push and to load models.

Repositories with branches and commits, private ones, Git LFS for `.safetensors` (uploaded by PUT, served by a redirect
to another host name, as a CDN is), and the error codes that the client turns into its exceptions. No Xet: the client
must run with `HF_HUB_DISABLE_XET=1`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

OWNERS = {"token-of-ann": "ann", "token-of-ben": "ben"}
"""Who may write to and read the private repositories of which namespace, by token."""

CODES = {
    "RepoNotFound": (404, "Repository not found"),
    "RevisionNotFound": (404, "Invalid rev id"),
    "EntryNotFound": (404, "Entry not found"),
}


@dataclass
class Repo:
    """A repository: branches name commits, a commit holds all files."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class Failure(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: object) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class Hub(ThreadingHTTPServer):
    """The server and all it holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self.server_port}"


@contextmanager
def running_hub():
    """A Hub that serves until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def owner_of(repo: str) -> str:
    return repo.partition("/")[0]


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"/api/models/{REPO}", "info"),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/models/{REPO}/refs", "refs"),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", r"/lfs/verify", "lfs_verify"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_get"),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    """One connection. Methods are named by ROUTES."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_route("GET")

    def do_HEAD(self) -> None:
        self.handle_route("GET")

    def do_POST(self) -> None:
        self.handle_route("POST")

    def do_PUT(self) -> None:
        self.handle_route("PUT")

    def handle_route(self, method: str) -> None:
        self.data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        where = urlsplit(self.path).path
        try:
            with self.server.lock:
                self.server.requests.append(f"{self.command} {unquote(where)}")
                for wanted, pattern, name in ROUTES:
                    match = re.fullmatch(pattern, where)
                    if match and wanted == method:
                        return getattr(self, name)(**{key: unquote(value) for key, value in match.groupdict().items()})
                self.server.unknown.append(f"{self.command} {self.path}")
            raise Failure(404, f"no such route: {where}")
        except Failure as failure:
            headers = {"X-Error-Message": failure.message} | ({"X-Error-Code": failure.code} if failure.code else {})
            body = {"error": failure.message, **failure.body}
            self.answer(json.dumps(body).encode(), failure.status, headers)

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, (headers or {}).pop(name, value))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, body: object, status: int = 200) -> None:
        self.answer(json.dumps(body).encode(), status)

    @property
    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in OWNERS:
            raise Failure(401, "Invalid credentials in Authorization header")
        return OWNERS.get(token)

    def readable(self, repo: str, revision: str = "main") -> Repo:
        """The repository, if it exists and may be read. As on the Hub, nobody learns which of the two it was."""
        found = self.server.repos.get(repo)
        if found is None or (found.private and self.user != owner_of(repo)):
            if self.user is None:
                raise Failure(401, "Invalid username or password.")
            raise Failure(*CODES["RepoNotFound"], "RepoNotFound")
        if revision not in found.branches and revision not in found.commits:
            raise Failure(*CODES["RevisionNotFound"], "RevisionNotFound")
        return found

    def writable(self, repo: str, revision: str = "main") -> Repo:
        self.owner(owner_of(repo))
        return self.readable(repo, revision)

    def owner(self, namespace: str) -> None:
        if self.user is None:
            raise Failure(401, "Invalid username or password.")
        if self.user != namespace:
            raise Failure(403, f"You don't have the rights to create a model under the namespace '{namespace}'")

    def whoami(self) -> None:
        if self.user is None:
            raise Failure(401, "Invalid username or password.")
        self.json({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked = json.loads(self.data)
        namespace = asked.get("organization") or self.user
        self.owner(namespace)
        repo = f"{namespace}/{asked['name']}"
        url = f"{self.server.endpoint}/{repo}"
        if repo in self.server.repos:
            raise Failure(409, "You already created this model repo", url=url)
        self.server.repos[repo] = Repo(private=asked.get("visibility") == "private")
        self.json({"url": url, "name": repo})

    def validate(self) -> None:
        """The rules that the Hub's own check applies to what PEFT writes."""
        match = re.match(r"---\n(.*?)\n---\n", json.loads(self.data)["content"], re.DOTALL)
        facts = (yaml.safe_load(match.group(1)) if match else None) or {}
        bases = facts.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
                message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
                raise Failure(400, "Invalid metadata", errors=[{"message": message}], warnings=[])
        warnings = [] if facts else [{"message": "empty or missing yaml metadata in repo card"}]
        self.json({"errors": [], "warnings": warnings})

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.readable(repo, revision)
        files = [{"rfilename": path} for path in sorted(found.files(revision))]
        sha = found.branches.get(revision, revision)
        self.json({"id": repo, "sha": sha, "private": found.private, "siblings": files, "tags": [], "downloads": 0})

    def refs(self, repo: str) -> None:
        branches = self.readable(repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        self.json({"branches": listed, "converts": [], "tags": []})

    def tree(self, repo: str, revision: str) -> None:
        entries = []
        for path, data in sorted(self.readable(repo, revision).files(revision).items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
            if is_lfs(path):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.json(entries)

    def branch(self, repo: str, branch: str) -> None:
        found = self.writable(repo)
        if branch in found.branches:
            raise Failure(409, "Reference already exists")
        found.branches[branch] = found.branches["main"]
        self.json({}, 201)

    def preupload(self, repo: str, revision: str) -> None:
        present = self.writable(repo, revision).files(revision)
        answers = []
        for asked in json.loads(self.data)["files"]:
            path = asked["path"]
            answers.append({"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False})
            if path in present and not is_lfs(path):
                answers[-1]["oid"] = blob_id(present[path])
        self.json({"files": answers})

    def commit(self, repo: str, revision: str) -> None:
        found = self.writable(repo, revision)
        files = dict(found.files(revision))
        for line in self.data.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = found.commit(revision, files)
        self.json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}"})

    def lfs_batch(self, repo: str) -> None:
        self.writable(repo)
        objects = []
        for asked in json.loads(self.data)["objects"]:
            upload = {"href": f"{self.server.endpoint}/lfs/{asked['oid']}"}
            verify = {"href": f"{self.server.endpoint}/lfs/verify"}
            new = {} if asked["oid"] in self.server.blobs else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": asked["oid"], "size": asked["size"], **new})
        self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.data).hexdigest() != oid:
            raise Failure(400, "the content has another digest")
        self.server.blobs[oid] = self.data
        self.answer(b"")

    def lfs_verify(self) -> None:
        asked = json.loads(self.data)
        if len(self.server.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Failure(400, "no such object of that size")
        self.json({})

    def lfs_get(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Failure(400, "a token was sent to the CDN")
        if oid not in self.server.blobs:
            raise Failure(404, "no such object")
        data = self.server.blobs[oid]
        self.answer(data, headers={"Content-Type": "application/octet-stream", "ETag": f'"{oid}"'})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.readable(repo, revision)
        files = found.files(revision)
        sha = found.branches.get(revision, revision)
        if path not in files:
            raise Failure(*CODES["EntryNotFound"], "EntryNotFound")
        data = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob_id(data)}"', "Content-Type": "application/octet-stream"}
        if is_lfs(path):
            oid = hashlib.sha256(data).hexdigest()
            self.server.blobs[oid] = data
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            self.answer(b"", 302, headers | {"Location": f"{self.server.cdn}/lfs/{oid}"})
        else:
            self.answer(data, headers=headers)
