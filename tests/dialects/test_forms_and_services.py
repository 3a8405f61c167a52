"""Multipart forms, and the services of OpenAI's dialect whose answers never stream."""

from __future__ import annotations

import mmap
import tempfile
from contextlib import suppress

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.dialects import SERVICES
from herd.dialects.services import parse_form
from herd.errors import ApiError, BadRequest
from herd_node.protocol.forms import MAX_FIELD_BYTES, MAX_PARTS, Form, FormError, read_form
from herd_node.protocol.routes import FORWARDED_BY_PATH

ROUTE = FORWARDED_BY_PATH["/v1/audio/transcriptions"]
TYPE = b"multipart/form-data; boundary=xx"
SOUND = b"RIFF\r\n--x\r\n\x00\xff--xx"


def part(head: str, value: bytes) -> bytes:
    return b"--xx\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + value + b"\r\n"


def form(*parts: bytes, end: bytes = b"--xx--\r\n") -> bytes:
    return b"".join(parts) + end


MODEL = part('name="model"', b"whisper:1")
FILE = part('name="file"; filename="a.wav"\r\nContent-Type: audio/wav', SOUND)


def encoded(boundary: str | None = None) -> tuple[bytes, bytes]:
    """As httpx writes it, and so the clients."""
    headers = {} if boundary is None else {"content-type": f"multipart/form-data; boundary={boundary}"}
    request = httpx.Request(
        "POST",
        "http://x/",
        data={"model": "whisper:1", "timestamp_granularities[]": ["word", "segment"]},
        files={"file": ("ü.wav", SOUND, "audio/wav")},
        headers=headers,
    )
    return request.headers["content-type"].encode(), request.read()


@pytest.mark.parametrize("boundary", [None, "xyz", '"a b:c"'])
def test_a_form_of_a_client_is_read(boundary: str | None):
    content_type, body = encoded(boundary)
    found = read_form(content_type, body)
    assert found.files == {"file"}
    model = found.fields["model"]
    assert (model.value, body[model.start : model.end]) == ("whisper:1", b"whisper:1")


@pytest.mark.parametrize("parts", [(MODEL, FILE), (FILE, MODEL)])
def test_the_model_may_stand_before_or_behind_the_file(parts: tuple[bytes, ...]):
    for body in (form(*parts), b"preamble\r\n" + form(*parts), form(*parts) + b"epilogue"):
        parsed, (start, end) = parse_form(ROUTE, TYPE, body)
        assert (parsed.asked, body[start:end]) == (("whisper:1",), b"whisper:1")
        assert parsed.needs == {"/v1/audio/transcriptions"}


def test_a_form_in_a_mapped_file_is_read_like_one_in_memory():
    body = form(MODEL, part('name="file"; filename="a"', b"\x00" * 3_000_000))
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert read_form(TYPE, mapped) == read_form(TYPE, body)


@pytest.mark.parametrize(
    ("content_type", "body", "said"),
    [
        (b"application/json", b"{}", "multipart/form-data"),
        (b"", b"", "multipart/form-data"),
        (b"multipart/form-data", form(MODEL, FILE), "boundary"),
        (b"multipart/form-data; boundary=yy", form(MODEL, FILE), "boundary"),
        (TYPE, b"", "boundary"),
        (TYPE, b"--xx", "badly framed"),
        (TYPE, MODEL + FILE, "badly framed"),
        (TYPE, MODEL + FILE[:40], "no end of its head"),
        (TYPE, MODEL + FILE[:-10], "badly framed"),
        (TYPE, form(b"--xx\r\nContent-Type: text/plain\r\n\r\nx\r\n"), "no name"),
        (TYPE, form(MODEL, MODEL, FILE), "twice"),
        (TYPE, form(part('name="model"', b"\xff"), FILE), "not UTF-8"),
        (TYPE, form(part('name="model"', b"x" * (MAX_FIELD_BYTES + 1)), FILE), "longer than"),
        (TYPE, form(*[part(f'name="a{n}"', b"") for n in range(MAX_PARTS + 1)]), "more than"),
        (TYPE, form(FILE), "model"),
        (TYPE, form(part('name="model"', b""), FILE), "model"),
        (TYPE, form(part('name="model"', b"a b"), FILE), "invalid model name"),
        (TYPE, form(part('name="model"', b"a\r\nX-Evil: 1"), FILE), "invalid model name"),
        (TYPE, form(part('name="model"; filename="m"', b"whisper:1"), FILE), "model"),
        (TYPE, form(MODEL), "file"),
    ],
)
def test_what_is_no_such_form_is_refused_in_a_sentence(content_type: bytes, body: bytes, said: str):
    with pytest.raises(BadRequest) as caught:
        parse_form(ROUTE, content_type, body)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@given(body=st.binary(max_size=200), kind=st.sampled_from([TYPE, b'multipart/form-data; boundary="x"']))
def test_any_bytes_are_a_form_or_refused(body: bytes, kind: bytes):
    for given_body in (body, b"--xx\r\n" + body, MODEL + body):
        with suppress(FormError):
            assert isinstance(read_form(kind, given_body), Form)


def parse(path: str, **body: object):
    return SERVICES.parse(FORWARDED_BY_PATH[path], orjson.dumps({"model": "m"} | body))


def test_rerank_reads_each_document_beside_the_query():
    one = parse("/v1/rerank", query="q" * 36, documents=["d" * 36])
    two = parse("/rerank", query="q" * 36, documents=["d" * 36, {"text": "d" * 36}])
    assert (one.est_tokens, two.est_tokens) == (20.0, 40.0)
    assert (one.max_tokens, one.needs, two.needs) == (1, {"/v1/rerank"}, {"/v1/rerank"})


def test_a_value_that_is_nested_too_deeply_is_refused():
    deep: object = "x"
    for _ in range(200):
        deep = [deep]
    with pytest.raises(ApiError):
        parse("/v1/rerank", query="q", documents=[deep])


@pytest.mark.parametrize(
    ("path", "body", "how"),
    [
        ("/v1/rerank", b'{"results":[{"index":0,"relevance_score":0.5}]}', "complete"),
        ("/v1/rerank", b'{"model":"m"}', "truncated"),
        ("/v1/images/generations", b'{"created":1,"data":[{"b64_json":"aGk="}]}', "complete"),
        ("/v1/images/generations", b'{"created":1}', "truncated"),
        ("/v1/audio/transcriptions", b'{"text":"hello"}', "complete"),
        ("/v1/audio/transcriptions", b'{"text":""}', "complete"),
        ("/v1/audio/transcriptions", b"hello there", "complete"),
        ("/v1/audio/transcriptions", b"WEBVTT\n\n00:00.000 --> 00:01.000\nhello", "complete"),
        ("/v1/audio/transcriptions", b"", "truncated"),
        ("/v1/audio/transcriptions", b"{}", "truncated"),
        ("/v1/audio/transcriptions", b'{"error":{"message":"no"}}', "error"),
    ],
)
def test_an_answer_is_complete_or_not(path: str, body: bytes, how: str):
    assert SERVICES.whole(FORWARDED_BY_PATH[path], body).how == how
