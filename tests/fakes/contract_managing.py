"""What an Ollama promises about managing its models; run against the fake and against a real one.

Nothing of a user's is touched: every model made here is called `herd-contract…` and deleted again, and what
is pulled or pushed goes to a port where nobody listens.
"""

from __future__ import annotations

import hashlib
from typing import Any

import httpx
import orjson

from tests.fakes.contract import Check, Target, post, same_head, same_shape
from tests.fakes.recordings import recording

MADE = "herd-contract:one"
BLOB = b"hello blob"
DIGEST = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"
NOBODY = "127.0.0.1:9/library/none"


def lines(body: bytes) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in body.splitlines()]


async def delete(target: Target, name: str) -> httpx.Response:
    return await target.http.request("DELETE", "/api/delete", json={"model": name})


async def blobs_are_kept_by_their_digest(target: Target) -> None:
    first = await target.http.post(f"/api/blobs/{DIGEST}", content=BLOB)
    assert first.status_code in (200, 201)
    again = await target.http.post(f"/api/blobs/{DIGEST}", content=BLOB)
    same_head(again, recording("ollama/blob-post-again"))
    assert again.content == b""
    same_head(await target.http.head(f"/api/blobs/{DIGEST}"), recording("ollama/blob-head"))
    missing = await target.http.head(f"/api/blobs/sha256:{'2' * 64}")
    same_head(missing, recording("ollama/blob-head-missing"))


async def a_blob_that_is_another_is_refused(target: Target) -> None:
    for name in ("blob-post-mismatch", "blob-post-bad-digest"):
        recorded = recording(f"ollama/{name}")
        path = recorded.request_head.split()[1].decode()
        answer = await target.http.post(path, content=recorded.request_body)
        same_head(answer, recorded)
        assert answer.content == recorded.body


async def a_model_is_copied_and_deleted(target: Target) -> None:
    copied = await post(target, "/api/copy", source=target.model, destination=MADE)
    same_head(copied, recording("ollama/copy"))
    assert copied.content == b""
    listed = (await target.http.get("/api/tags")).json()["models"]
    assert MADE in [entry["name"] for entry in listed]
    deleted = await delete(target, MADE)
    same_head(deleted, recording("ollama/delete"))
    assert deleted.content == b""


async def what_is_not_there_is_neither_copied_nor_deleted(target: Target) -> None:
    for name in ("copy-unknown", "delete-unknown", "delete-empty"):
        recorded = recording(f"ollama/{name}")
        method, path = recorded.request_head.decode().split()[:2]
        answer = await target.http.request(method, path, content=recorded.request_body)
        same_head(answer, recorded)
        assert answer.content == recorded.body


async def a_model_is_created_from_another_line_by_line(target: Target) -> None:
    recorded = recording("ollama/create-from")
    made = await post(target, "/api/create", model=MADE, **{"from": target.model})
    same_head(made, recorded)
    ours, theirs = lines(made.content), lines(recorded.body)
    same_shape(ours[0], theirs[0])
    assert ours[-2:] == theirs[-2:]
    quiet = await post(target, "/api/create", model=MADE, stream=False, **{"from": target.model})
    same_head(quiet, recording("ollama/create-from-nostream"))
    assert quiet.content == recording("ollama/create-from-nostream").body
    assert (await delete(target, MADE)).status_code == 200


async def a_create_that_cannot_be_says_so_in_a_line(target: Target) -> None:
    nothing = await post(target, "/api/create", model="herd-contract:five")
    same_head(nothing, recording("ollama/create-nothing"))
    assert nothing.json() == orjson.loads(recording("ollama/create-nothing").body)
    files = {"m.gguf": f"sha256:{'2' * 64}"}
    missing = await post(target, "/api/create", model="herd-contract:five", files=files)
    same_head(missing, recording("ollama/create-missing-blob"))
    theirs = lines(recording("ollama/create-missing-blob").body)
    for ours, line in zip(lines(missing.content), theirs, strict=True):
        same_shape(ours, line)


async def a_pull_that_fails_is_a_line_with_status_200_and_500_without_a_stream(target: Target) -> None:
    streamed = await post(target, "/api/pull", model=NOBODY, insecure=True)
    recorded = recording("ollama/pull-no-network")
    same_head(streamed, recorded)
    for ours, theirs in zip(lines(streamed.content), lines(recorded.body), strict=True):
        same_shape(ours, theirs)
    quiet = await post(target, "/api/pull", model=NOBODY, insecure=True, stream=False)
    same_head(quiet, recording("ollama/pull-no-network-nostream"))
    assert quiet.json()["error"].startswith("pull model manifest: ")


async def a_push_that_fails_is_a_line_with_status_200(target: Target) -> None:
    unknown = await post(target, "/api/push", model="herd-contract-nope")
    recorded = recording("ollama/push-unknown")
    same_head(unknown, recorded)
    for ours, theirs in zip(lines(unknown.content), lines(recorded.body), strict=True):
        same_shape(ours, theirs)


async def an_empty_request_with_keep_alive_0_unloads(target: Target) -> None:
    await post(target, "/api/generate", model=target.model)
    answer = await post(target, "/api/generate", model=target.model, keep_alive=0)
    recorded = recording("ollama/keepalive-zero-unload")
    same_head(answer, recorded)
    same_shape(answer.json(), orjson.loads(recorded.body))
    assert answer.json()["done_reason"] == "unload"
    chat = await post(target, "/api/chat", model=target.model, messages=[], keep_alive=0)
    same_shape(chat.json(), orjson.loads(recording("ollama/keepalive-zero-chat-empty").body))


MANAGING: tuple[Check, ...] = (
    blobs_are_kept_by_their_digest,
    a_blob_that_is_another_is_refused,
    a_model_is_copied_and_deleted,
    what_is_not_there_is_neither_copied_nor_deleted,
    a_model_is_created_from_another_line_by_line,
    a_create_that_cannot_be_says_so_in_a_line,
    a_pull_that_fails_is_a_line_with_status_200_and_500_without_a_stream,
    a_push_that_fails_is_a_line_with_status_200,
    an_empty_request_with_keep_alive_0_unloads,
)


async def tiny_is_pulled_with_progress(target: Target) -> None:
    """Only the fake has this registry."""
    fields = {"model": "127.0.0.1:5999/library/tiny", "insecure": True}
    for name, more in (("pull", {}), ("pull-again", {}), ("pull-nostream", {"stream": False})):
        answer = await post(target, "/api/pull", **fields, **more)
        same_head(answer, recording(f"ollama/{name}"))
        assert answer.content == recording(f"ollama/{name}").body
    for name in ("pull-not-found", "pull-not-found-nostream", "pull-digest-mismatch", "push-insecure"):
        recorded = recording(f"ollama/{name}")
        path = recorded.request_head.split()[1].decode()
        answer = await target.http.post(path, content=recorded.request_body)
        same_head(answer, recorded)
        assert answer.content == recorded.body
    assert (await delete(target, fields["model"])).status_code == 200
