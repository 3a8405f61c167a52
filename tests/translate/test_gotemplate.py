"""Templates of Ollama's kind, as Go and Ollama render them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_node.translate import Refusal
from herd_node.translate.gotemplate import Template

CHATML = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
WITH_MESSAGES = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<user>{{ .Content }}
{{- else if eq .Role "system" }}<system>{{ .Content }}
{{- end }}
{{- if $last }}<assistant>{{ end }}
{{- end }}"""


def rendered(written: str, system: str = "", prompt: str = "P", think: bool | None = None) -> str:
    return Template(written).generate(system, prompt, think=bool(think), think_is_set=think is not None)


def refused(written: str) -> str:
    with pytest.raises(Refusal) as caught:
        rendered(written)
    assert caught.value.status == 400
    return caught.value.message


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("", ""),
        ("plain } text", "plain } text"),
        ("{{ .Prompt }}", "P"),
        ("{{.Prompt}}!", "P!"),
        ("a {{- .Prompt -}} b", "aPb"),
        ("a {{/* said */}} b", "a  b"),
        ("a {{- /* said */ -}} b", "ab"),
        ("{{ if .System }}yes{{ else }}no{{ end }}", "no"),
        ("{{ if .System }}1{{ else if .Prompt }}2{{ else }}3{{ end }}", "2"),
        ("{{ if and .Prompt (not .System) }}a{{ end }}", "a"),
        ("{{ if or .System .Prompt }}a{{ end }}", "a"),
        ('{{ if eq .Prompt "X" "P" }}a{{ end }}', "a"),
        ('{{ if ne .Prompt "P" }}a{{ else }}b{{ end }}', "b"),
        ("{{ if gt (len .Prompt) 0 }}a{{ end }}", "a"),
        ("{{ with .Prompt }}[{{ . }}]{{ end }}", "[P]"),
        ("{{ with .System }}x{{ else }}none{{ end }}", "none"),
        ("{{ $p := .Prompt }}{{ $p }}{{ $p }}", "PP"),
        ("{{ .Prompt | json }}", '"P"'),
        ('{{ `raw` }}{{ "a\\n" }}{{ 7 }}{{ true }}', 'raw"a\n"7true'.replace('"', "")),
        ("{{ print .Prompt 1 }}", "P1"),
        ("{{ .Unknown }}", ""),
        ("{{ if .Think }}t{{ end }}{{ if .IsThinkSet }}s{{ end }}", ""),
    ],
)
def test_actions_are_rendered_as_go_renders_them(written: str, text: str) -> None:
    assert rendered(written) == text


def test_thinking_is_told_to_the_template() -> None:
    written = "{{ if and .IsThinkSet (not .Think) }}/no_think{{ end }}"
    assert [rendered(written, think=think) for think in (None, True, False)] == ["", "", "/no_think"]


def test_an_older_template_ends_where_the_response_would_stand() -> None:
    assert rendered(CHATML) == "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n"
    with_system = rendered(CHATML, system="S")
    assert with_system.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nP")
    assert rendered("{{ if .Prompt }}{{ .Prompt }}:{{ .Response }}!{{ end }}?") == "P:"
    assert rendered("a {{ if .Response }}{{ .Response }}b{{ end }}c") == "a "


def test_a_newer_template_gets_the_messages() -> None:
    assert rendered(WITH_MESSAGES) == "<user>P<assistant>"
    assert rendered(WITH_MESSAGES, system="S") == "<system>S<user>P<assistant>"
    assert rendered("{{ (index .Messages 0).Content }}{{ range .Tools }}t{{ else }}-{{ end }}") == "P-"
    assert (
        rendered("{{ range .Messages }}{{ continue }}x{{ end }}{{ range .Messages }}{{ break }}{{ end }}.")
        == "."
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{{ .Prompt ", "unclosed action"),
        ("{{ if .Prompt }}", "unexpected EOF"),
        ("{{ end }}", "unexpected {{end}}"),
        ("{{ }}", "missing value for command"),
        ("{{ nonsense }}", 'function "nonsense" not defined'),
        ("{{ $x }}", "undefined variable $x"),
        ("{{ (len .Prompt }}", "unclosed left paren"),
        ("{{ len 7 }}", "len cannot work with these values"),
        ("{{ lt .Prompt 1 }}", "lt cannot work with these values"),
        ("{{ index .Prompt 7 }}", "index cannot work with these values"),
        ("{{ ; }}", "unexpected character in an action"),
        ("{{ range 7 }}{{ end }}", "range can't iterate over this value"),
        ("{{ break }}", "break outside of a range"),
        ('{{ printf "%s" 1 }}', "printf is not supported on this node"),
        ('{{ template "x" }}', "template is not supported on this node"),
        ("{{ if .A }}" * 100 + "{{ end }}" * 100, "nested too deeply"),
        ("x" * 70_000, "longer than 65536 characters"),
    ],
)
def test_what_is_no_template_is_refused(written: str, message: str) -> None:
    assert refused(written).startswith("template: :1: ")
    assert message in refused(written)


def test_a_template_cannot_run_for_ever() -> None:
    inner = "{{ range $.Messages }}" * 30 + "x" + "{{ end }}" * 30
    with pytest.raises(Refusal, match="does not end"):
        Template(inner).generate("S", "P", think=False, think_is_set=False)


PIECES = ["{{", "}}", "-", "if", "end", "range", "else", "with", ".", ".Prompt", ".Messages", "$", "$x"]
PIECES += [":=", "|", "(", ")", '"', "`", "len", "eq", "7", "text", "/*", "*/", "\n"]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map(" ".join))
def test_whatever_is_written_is_rendered_or_refused(written: str) -> None:
    with suppress(Refusal):
        assert isinstance(rendered(written, system="S"), str)
