"""What a GGUF is pulled by: names that mean a file, and names that mean none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_node.models.reach import reach_of
from herd_node.models.reference import (
    BadReference,
    HubFile,
    HubReference,
    UrlReference,
    choose,
    file_name_of,
    hub_file_url,
    hub_files,
    hub_list_url,
    is_model_file,
    parse_reference,
    sha256_in,
)
from herd_node.protocol.names import source_of


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("llama3:8b", "registry"),
        ("registry.example/a/b:c", "registry"),
        ("hf.co/org/repo:Q4_K_M", "hub"),
        ("HuggingFace.co/org/repo", "hub"),
        ("https://host/x.gguf", "url"),
        ("HTTP://host/x.gguf", "url"),
        ("httpd:1", "registry"),
        ("", "registry"),
    ],
)
def test_a_name_says_where_it_is_pulled_from(name: str, source: str) -> None:
    assert source_of(name) == source


@pytest.mark.parametrize(
    ("text", "repo", "tag", "name"),
    [
        ("hf.co/org/repo", "org/repo", "", "hf.co/org/repo"),
        ("hf.co/org/repo:latest", "org/repo", "", "hf.co/org/repo"),
        ("huggingface.co/Org/Re.po-GGUF:Q4_K_M", "Org/Re.po-GGUF", "Q4_K_M", "hf.co/Org/Re.po-GGUF:Q4_K_M"),
        ("hf.co/org/repo:a.Q8_0.gguf", "org/repo", "a.Q8_0.gguf", "hf.co/org/repo:a.Q8_0.gguf"),
    ],
)
def test_a_repository_is_named_with_its_quantisation(text: str, repo: str, tag: str, name: str) -> None:
    assert parse_reference(text) == HubReference(repo, tag, name)


@pytest.mark.parametrize(
    ("text", "url", "file_name", "name"),
    [
        ("https://h/a/x.gguf", "https://h/a/x.gguf", "x.gguf", "https://h/a/x.gguf"),
        ("HTTPS://h/x.GGUF?download=true#f", "https://h/x.GGUF?download=true", "x.GGUF", "https://h/x.GGUF"),
        (
            "https://huggingface.co/o/r/blob/main/x.gguf",
            "https://huggingface.co/o/r/resolve/main/x.gguf",
            "x.gguf",
            "https://huggingface.co/o/r/resolve/main/x.gguf",
        ),
        ("https://h/x.gguf?sig=secret", "https://h/x.gguf?sig=secret", "x.gguf", "https://h/x.gguf"),
        ("https://h/" + "a" * 300 + "/x.gguf", "https://h/" + "a" * 300 + "/x.gguf", "x.gguf", ""),
    ],
)
def test_a_url_names_its_file_and_the_model_is_called_by_it_without_what_may_be_secret(
    text: str, url: str, file_name: str, name: str
) -> None:
    assert parse_reference(text) == UrlReference(url, file_name, name)


@pytest.mark.parametrize(
    "text",
    [
        "llama3",
        "",
        "hf.co/",
        "hf.co/org",
        "hf.co/org/repo/more",
        "hf.co/../repo",
        "hf.co/org/repo:a/b",
        "hf.co/org/re po",
        "https://",
        "https:///x.gguf",
        "https://user:pw@host/x.gguf",
        "https://host:port/x.gguf",
        "https://host/x.bin",
        "https://host/",
        "https://host/..gguf",
        "https://host/%2e%2e%2fx.gguf%00",
        "https://host/a b.gguf",
        "https://host/.hidden.gguf",
        "https://host/x-00001-of-00003.gguf",
        "https://host/x\r\nHost: y/x.gguf",
        "https://[::1/x.gguf",
    ],
)
def test_what_names_no_file_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(BadReference) as refused:
        parse_reference(text)
    assert str(refused.value)


@given(st.text(max_size=80))
def test_no_text_becomes_a_path_or_an_unexpected_error(text: str) -> None:
    for start in ("", "hf.co/", "https://host/"):
        try:
            found = parse_reference(start + text)
        except BadReference:
            continue
        if isinstance(found, UrlReference):
            assert not set(found.file_name) & set("/\\\0 ")
            assert not found.file_name.startswith(".")


LISTED = [
    {"type": "directory", "path": "old", "size": 0, "oid": "x"},
    {"type": "file", "path": "README.md", "size": 10, "oid": "x"},
    {"type": "file", "path": "mmproj-m-F16.gguf", "size": 10, "oid": "x"},
    {"type": "file", "path": "m-Q8_0.gguf", "size": 20, "oid": "x", "lfs": {"oid": "A" * 64, "size": 20}},
    {"type": "file", "path": "m-Q4_K_M.gguf", "size": 10, "oid": "x", "lfs": {"oid": "b" * 64, "size": 10}},
    {"type": "file", "path": "sub/m-IQ4_K_M.gguf", "size": 10, "oid": "x"},
    {"type": "file", "path": "../evil-Q2_K.gguf", "size": 10, "oid": "x"},
    {"type": "file", "path": 7},
    "x",
]


def test_only_models_of_a_repository_are_seen_with_their_hash() -> None:
    assert hub_files(LISTED) == (
        HubFile("m-Q8_0.gguf", 20, "a" * 64),
        HubFile("m-Q4_K_M.gguf", 10, "b" * 64),
        HubFile("sub/m-IQ4_K_M.gguf", 10, None),
    )
    assert hub_files({"error": "x"}) == ()
    assert hub_files(None) == ()


@pytest.mark.parametrize(
    ("tag", "path"),
    [
        ("", "m-Q4_K_M.gguf"),
        ("q8_0", "m-Q8_0.gguf"),
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("IQ4_K_M", "sub/m-IQ4_K_M.gguf"),
        ("m-q8_0.GGUF", "m-Q8_0.gguf"),
    ],
)
def test_the_quantisation_chooses_the_file_and_none_means_the_usual_one(tag: str, path: str) -> None:
    assert choose(hub_files(LISTED), HubReference("o/r", tag, "")).path == path


def test_a_quantisation_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(BadReference, match=r"there is no Q2_K in o/r; there is m-Q8_0\.gguf, "):
        choose(hub_files(LISTED), HubReference("o/r", "Q2_K", ""))
    with pytest.raises(BadReference, match="there is no GGUF file in o/r"):
        choose((), HubReference("o/r", "", ""))
    assert choose((HubFile("odd.gguf", 1, None),), HubReference("o/r", "", "")).path == "odd.gguf"


def test_the_hubs_urls_are_made_of_the_repository_and_the_path() -> None:
    reference = HubReference("o/r", "", "")
    assert hub_list_url("https://hub", reference) == "https://hub/api/models/o/r/tree/main?recursive=true"
    file = HubFile("sub/a b.gguf", None, None)
    assert hub_file_url("https://hub", reference, file) == "https://hub/o/r/resolve/main/sub/a%20b.gguf"


def test_only_a_strong_etag_of_64_hex_digits_is_a_hash() -> None:
    assert sha256_in(json.dumps("A" * 64)) == "a" * 64
    for other in (f'W/"{"a" * 64}"', '"abc"', "", None, 7):
        assert sha256_in(other) is None


@pytest.mark.parametrize("name", ["a.gguf", "A-1.2_b+c.GGUF"])
def test_plain_names_are_kept(name: str) -> None:
    assert file_name_of(f"/x/{name}") == name
    assert is_model_file(name)


@pytest.mark.parametrize(
    ("address", "reach"),
    [
        ("8.8.8.8", "public"),
        ("2606:4700::1111", "public"),
        ("127.0.0.1", "private"),
        ("::1", "private"),
        ("10.1.2.3", "private"),
        ("172.31.0.1", "private"),
        ("192.168.1.4", "private"),
        ("100.64.0.1", "private"),
        ("fd12::1", "private"),
        ("::ffff:127.0.0.1", "private"),
        ("64:ff9b::7f00:1", "private"),
        ("2002:7f00:1::", "private"),
        ("169.254.169.254", "never"),
        ("::ffff:169.254.169.254", "never"),
        ("64:ff9b::a9fe:a9fe", "never"),
        ("fe80::1%eth0", "never"),
        ("fec0::1", "never"),
        ("0.0.0.0", "never"),
        ("::", "never"),
        ("224.0.0.1", "never"),
        ("ff02::1", "never"),
        ("255.255.255.255", "never"),
        ("240.0.0.1", "never"),
        ("192.0.2.1", "never"),
    ],
)
def test_how_far_away_an_address_is(address: str, reach: str) -> None:
    assert reach_of(address) == reach
