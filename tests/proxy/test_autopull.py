"""What a pull that somebody causes must know beforehand: the size, and where it is written."""

from __future__ import annotations

import pytest

from herd.proxy.autopull import manifest_url, size_by_name


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [
        ("llama3:8b", 4.85),
        ("llama3.2:1b", 0.61),
        ("qwen2.5-coder:1.5b-instruct-q8_0", 1.66),
        ("mixtral:8x7b", 33.95),
        ("smollm2:135m", 0.082),
        ("gemma:2b-f16", 4.0),
        ("hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M", 1.82),
        ("hf.co/x/Model-70B-GGUF:IQ2_XS", 24.9),
        ("deepseek-r1:671b-fp32", 2684.0),
    ],
)
def test_a_name_that_says_the_parameters_says_the_size(model: str, gigabytes: float) -> None:
    size = size_by_name(model)
    assert size is not None
    assert size / 1e9 == pytest.approx(gigabytes, rel=0.02)


@pytest.mark.parametrize("model", ["llama3", "mistral:latest", "phi3:mini", "a/b:c", "bge-m3", "x:8bit", ""])
def test_a_name_that_says_nothing_says_no_size(model: str) -> None:
    assert size_by_name(model) is None


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("llama3", "library/llama3/manifests/latest"),
        ("llama3:8b", "library/llama3/manifests/8b"),
        ("me/mine:x", "me/mine/manifests/x"),
        ("registry.ollama.ai/library/llama3", "library/llama3/manifests/latest"),
    ],
)
def test_names_of_ollamas_registry_have_a_manifest(model: str, path: str) -> None:
    assert manifest_url(model) == f"https://registry.ollama.ai/v2/{path}"


@pytest.mark.parametrize(
    "model",
    ["hf.co/a/b:Q4", "https://example.org/x.gguf", "127.0.0.1:5999/library/tiny", "a.b/c/d", "a/b/c/d"],
)
def test_other_names_are_asked_for_nowhere(model: str) -> None:
    assert manifest_url(model) is None
