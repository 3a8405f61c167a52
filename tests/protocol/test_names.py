import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_node.protocol.names import canonical, header_value, is_model_name, is_node_id, legal_node_id

quick = settings(deadline=None, max_examples=100)


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        ("llama3", "llama3"),
        ("llama3:latest", "llama3"),
        ("LLaMA3:LATEST", "llama3"),
        ("library/llama3:latest", "llama3"),
        ("registry.ollama.ai/library/llama3:latest", "llama3"),
        ("Registry.Ollama.AI/Library/llama3", "llama3"),
        ("llama3:8b", "llama3:8b"),
        ("hf.co/User/Repo-GGUF:Q4_K_M", "hf.co/user/repo-gguf:q4_k_m"),
        ("registry.ollama.ai/someone/llama3", "registry.ollama.ai/someone/llama3"),
        ("my/library/llama3", "my/library/llama3"),
        ("latest", "latest"),
        ("llama3:latest-2", "llama3:latest-2"),
        ("МОДЕЛЬ:7B", "МОДЕЛЬ:7b"),
        ("İstanbul", "İstanbul"),
        ("", ""),
        (":latest", ":latest"),
        ("library/", "library/"),
    ],
)
def test_names_that_mean_one_model_compare_equal(written, compared):
    assert canonical(written) == compared


@quick
@given(
    st.lists(
        st.sampled_from(["registry.ollama.ai/", "library/", "LLama", ":latest", ":LATEST", "/", "é", "İ"])
    )
)
def test_a_canonical_name_is_its_own_canonical_name(parts):
    name = canonical("".join(parts))
    assert canonical(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "llama3:8b",
        "hf.co/user/Repo-GGUF:Q4_K_M",
        "a",
        "模型:7b",
        "модель",
        "a" * 200,
        "a..b",
        "v1...",
        "naïve+x@1",
        "a|b~c",
    ],
)
def test_model_names_of_any_script_are_let_in(name):
    assert is_model_name(name)


@pytest.mark.parametrize(
    "character", [*"<>\"'&\\;%{}", " ", "\u00a0", "\u2028", "\t", "\n", "\0", "\x7f", "\x85"]
)
def test_markup_spaces_and_controls_never_get_into_a_model_name(character):
    assert not is_model_name(f"llama{character}3")


@pytest.mark.parametrize("character", ["\u200b", "\u202e", "\ufeff", "\u00ad", "\ud800", "\U000e0041"])
def test_what_cannot_be_seen_never_gets_into_a_model_name(character):
    assert not is_model_name(f"llama{character}3")


@pytest.mark.parametrize(
    "name", ["", "a" * 201, "..", "../x", "x/..", "x/../y", "x:..", "../..", None, 7, b"llama"]
)
def test_other_things_are_no_model_names(name):
    assert not is_model_name(name)


@pytest.mark.parametrize("text", ["attic", "Mac-Studio.2", "a_b", "...", "9", "x" * 64])
def test_legal_node_ids(text):
    assert is_node_id(text)


@pytest.mark.parametrize("text", ["", "x" * 65, ".", "..", "a/b", "a b", "küche", "a\n", "<b>", None, 7])
def test_illegal_node_ids(text):
    assert not is_node_id(text)


@pytest.mark.parametrize(
    ("hostname", "node_id"),
    [
        ("attic", "attic"),
        ("Anna-MacBook.local", "Anna-MacBook"),
        ("Anna-MacBook.LOCAL.", "Anna-MacBook"),
        ("Anna’s Mac", "Anna-s-Mac"),
        ("küche", "k-che"),
        ("box.lan", "box.lan"),
        ("local", "local"),
        ("x" * 80, "x" * 64),
        ("", "node"),
        ("..", "node"),
        ("日本", "node"),
    ],
)
def test_a_host_name_becomes_a_legal_node_id(hostname, node_id):
    assert legal_node_id(hostname) == node_id


@quick
@given(st.text(max_size=100))
def test_whatever_the_host_is_called_its_node_id_is_legal(hostname):
    assert is_node_id(legal_node_id(hostname))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("llama3:8b", b"llama3:8b"),
        ("50% <b>", b"50%25 <b>"),
        ("模", b"%E6%A8%A1"),
        ("a\r\nX-Evil: 1", b"a%0D%0AX-Evil: 1"),
        (" a b ", b"%20a b%20"),
        ("  ", b"%20%20"),
        ("", b""),
        ("\ud800", b"%ED%A0%80"),
    ],
)
def test_header_values_are_printable_ascii(text, value):
    assert header_value(text) == value


@quick
@given(st.text(alphabet=st.characters(codec=None), max_size=50))
def test_a_header_value_can_be_read_back_and_cannot_end_the_header(text):
    from urllib.parse import unquote

    value = header_value(text)
    assert all(0x20 <= byte < 0x7F for byte in value)
    assert value == value.strip()
    assert unquote(value.decode(), errors="surrogatepass") == text
