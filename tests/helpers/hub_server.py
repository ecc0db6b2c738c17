"""The Hugging Face Hub's API, as far as huggingface_hub asks for it to make repositories, commit and download: over
HTTP on this machine, with everything in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_ThisIsTheSecretOfTheTests"
READ_ONLY = "hf_ThisOneMayOnlyRead"
LFS_FROM = 2000  # bytes; smaller files lie in git


@dataclass
class Repository:
    """Commits are files by path, the last one is `main`'s. `gated`: of no use to anybody but its owner."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.head if revision == "main" else revision)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}".encode() + b"".join(sorted(files.values()))).hexdigest()
        self.commits[sha] = files
        return sha

    def change(self, **files: bytes | None) -> str:
        """A commit by anybody's hand; None deletes."""
        after = self.commits[self.head] | {name: data for name, data in files.items() if data is not None}
        return self.commit({name: data for name, data in after.items() if files.get(name, b"") is not None})


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub:` `url`; `repositories` by ("model" or "dataset", "USER/NAME"); `asked`: all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: list[str] = []  # of this server's own
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        self.faults.append(traceback.format_exc())

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, tree: Any = None, status: int = 200, body: bytes = b"", **headers: str) -> None:
        body = body if tree is None else json.dumps(tree).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "") -> None:
        self.answer({"error": "no"}, status, **({"X_Error_Code": code} if code else {}))

    def do_GET(self) -> None:
        self.handle_all()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def handle_all(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(f"{self.command} {path}")
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "api/repos/create":
            self.create(json.loads(data), token)
        elif path.startswith("lfs/"):
            assert hashlib.sha256(data).hexdigest() == path.removeprefix("lfs/")
            self.server.objects[path.removeprefix("lfs/")] = data
            self.answer({})
        elif path.count("/") < 2 and path.startswith("api/"):
            self.refuse(404)
        else:
            self.of_repository(path, data, token)

    def create(self, asked: dict[str, Any], token: str) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        key = (asked.get("type", "model"), name)
        if token != TOKEN:
            self.refuse(403 if token else 401)
        elif key in self.server.repositories:
            self.answer({"url": f"{self.server.url}/{name}"}, 409)
        else:
            self.server.repositories[key] = Repository(asked.get("visibility", "private") == "private")
            self.server.repositories[key].commit({".gitattributes": b""})
            self.answer({"url": f"{self.server.url}/{name}"})

    def of_repository(self, path: str, data: bytes, token: str) -> None:
        api = path.startswith("api/")
        words = path.removeprefix("api/").split("/")
        kind = words.pop(0).rstrip("s") if api or words[0] == "datasets" else "model"
        name, rest = f"{words[0]}/{words[1].removesuffix('.git')}", words[2:]
        repository = self.server.repositories.get((kind, name))
        if repository is None or (repository.private and token not in (TOKEN, READ_ONLY)):
            return self.refuse(401 if repository or not token else 404, "RepoNotFound")
        if repository.gated:
            return self.refuse(403, "GatedRepo")
        if rest[:1] == ["info"]:
            return self.batch(json.loads(data))
        action, revision = rest[:2] if rest else ("revision", "main")
        inside = "/".join(rest[2:])
        files = repository.files(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        head = repository.head if revision == "main" else revision
        if action == "revision":
            return self.answer({"id": name, "sha": head, "siblings": [{"rfilename": one} for one in files]})
        if action == "tree":
            return self.answer([self.entry(*one) for one in files.items()])
        if action == "preupload":
            asked = json.loads(data)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["size"] >= LFS_FROM else "regular",
                    "shouldIgnore": False,
                }
                for one in asked
            ]
            return self.answer({"files": modes})
        if action == "commit":
            return self.commit(repository, path.removeprefix("api/models/").removeprefix("api/"), data, token)
        assert action == "resolve"
        if inside not in files:
            return self.refuse(404, "EntryNotFound")
        etag = self.entry(inside, files[inside]).get("lfs", {}).get("oid") or hashlib.sha1(files[inside]).hexdigest()
        return self.answer(
            body=files[inside], ETag=f'"{etag}"', X_Repo_Commit=head, X_Linked_Size=str(len(files[inside]))
        )

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": path, "size": len(data), "oid": blob} | (
            {"lfs": lfs} if len(data) >= LFS_FROM else {}
        )

    def batch(self, asked: dict[str, Any]) -> None:
        objects = [
            one | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
            if one["oid"] not in self.server.objects
            else one
            for one in asked["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, path: str, data: bytes, token: str) -> None:
        if token != TOKEN:
            return self.refuse(403)
        files = dict(repository.commits[repository.head])
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files)
        return self.answer({"commitUrl": f"{self.server.url}/{path.removesuffix('main')}{sha}", "commitOid": sha})
