"""What the documents promise to list, they list: settings, flags, paths, columns, packages, links, citations.

The agent's part of docs/settings.md is compared in tests/agent/test_settings.py; the pages that are normative
for one package are compared where that package is tested.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import herd.cli
import herd_node.cli
from herd import errors
from herd.fleet.status import BackendRow, ModelRow, NodeStatusRow, Reported
from herd.settings import Settings
from herd.store.traces import COLUMNS
from herd.web.routes import OLLAMA_MANAGED, ROUTES
from herd_node.protocol.routes import FORWARDED
from herd_node.settings import PREFIX as AGENT_PREFIX
from herd_node.settings import Settings as AgentSettings
from tests import compatibility

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md"))
    if "node_modules" not in path.parts
)
CODE = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("herd", "herd_node", "tests", "dashboard_templates")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".sql", ".html", ".css", ".js") and "node_modules" not in path.parts
)
COMMANDS = (
    "demo",
    "status",
    "nodes",
    "models",
    "ps",
    "join",
    "traces",
    "explain",
    "pull",
    "rm",
    "load",
    "unload",
)


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def for_people() -> str:
    """Where a user looks for flags, commands and paths."""
    return "\n".join(map(text, ("README.md", "docs/settings.md", "docs/behaviour.md")))


def without_code_blocks(page: str) -> str:
    return re.sub(r"^(```|~~~).*?^\1[ \t]*$", "", text(page), flags=re.MULTILINE | re.DOTALL)


def headings(page: str) -> list[str]:
    return [found.strip() for found in re.findall(r"^#{1,6} +(.+)$", without_code_blocks(page), re.MULTILINE)]


def anchor(heading: str) -> str:
    """As GitHub makes it: lower case, punctuation and symbols gone, spaces to hyphens."""
    kept = (c for c in heading.lower() if c in "-_ " or unicodedata.category(c)[0] in "LNM")
    return "".join(kept).replace(" ", "-")


# --- settings, flags, commands


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_of_the_router_has_its_line(name: str) -> None:
    lines = [line for line in text("docs/settings.md").splitlines() if f"| `FLEET_{name.upper()}` |" in line]
    assert len(lines) == 1
    description = Settings.model_fields[name].description
    assert description is not None
    assert lines[0].rstrip(" |").endswith(description)


@pytest.mark.parametrize("page", PAGES)
def test_every_variable_that_a_page_names_is_a_setting(page: str) -> None:
    known = {f"FLEET_{name.upper()}" for name in Settings.model_fields} | {"FLEET_CONFIG"}
    known |= {AGENT_PREFIX + name.upper() for name in AgentSettings.model_fields}
    assert set(re.findall(r"\bFLEET_[A-Z0-9_]*[A-Z0-9]\b", text(page))) <= known | {"FLEET_NODE"}


def flags_of(main, capsys: pytest.CaptureFixture[str], *command: str) -> set[str]:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_flag_of_herd_is_documented(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = flags_of(herd.cli.main, capsys, *command.split())
    assert {"--help", "--host", "--json"} <= flags
    documented = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", for_people()))
    assert flags - documented == set()


def test_every_flag_of_the_agent_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    flags = flags_of(herd_node.cli.main, capsys)
    assert "--router-url" in flags
    documented = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", for_people()))
    assert flags - documented == set()


def test_every_command_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        herd.cli.main(["--help"])
    listed = re.findall(r"^    ([a-z]+)  ", capsys.readouterr().out, re.MULTILINE)
    assert set(listed) == set(COMMANDS)
    assert [name for name in COMMANDS if f"herd {name}" not in for_people()] == []


# --- paths, columns, errors, state


@pytest.mark.parametrize("path", [route.path for route in ROUTES])
def test_every_path_is_documented(path: str) -> None:
    shown = path.replace(":path}", "}")
    assert f"`{shown}`" in text("docs/behaviour.md")


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_has_its_line(column: str) -> None:
    assert len(re.findall(rf"^\| `{column}` \|", text("docs/traces.md"), re.MULTILINE)) == 1


def test_every_field_of_the_status_is_documented() -> None:
    section = text("docs/behaviour.md").partition("\n## State for scripts\n")[2].partition("\n## ")[0]
    # A path that begins with a dot goes on from the one before it.
    named = {part for path in re.findall(r"`([^`]+)`", section) for part in re.split(r"[.\[\]]+", path)}
    rows = (NodeStatusRow, ModelRow, Reported, BackendRow)
    assert [field.name for row in rows for field in fields(row) if field.name not in named] == []


def test_every_status_of_an_error_has_its_row() -> None:
    section = text("docs/behaviour.md").partition("\n## Errors\n")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| (\d{3}) \|", section, re.MULTILINE))
    tree = [errors.ApiError]
    for kind in tree:
        tree.extend(kind.__subclasses__())
    ours = {kind.status for kind in tree if kind.__module__ == errors.__name__}
    assert listed == {str(status) for status in ours}


# --- what works where


def test_the_table_of_compatibility_is_the_one_that_the_tests_assert() -> None:
    """After a change of a row: python -m tests.compatibility."""
    assert compatibility.in_page(text("docs/compatibility.md")) == text("docs/compatibility.md")


def test_whatever_goes_to_a_node_has_a_row_there() -> None:
    paths = {route.path for route in (*FORWARDED, *OLLAMA_MANAGED)}
    assert {path for path in paths if f"{path.partition('{')[0]}" not in compatibility.table()} == set()
    assert {len(row.cells) for row in compatibility.ROWS} == {len(compatibility.KINDS)}
    titles = [compatibility.title(row) for row in compatibility.ROWS]
    assert len(titles) == len(set(titles))


# --- packages


def requirements() -> list[tuple[str, str]]:
    project = tomllib.loads(text("pyproject.toml"))["project"]
    given = [("At run time", one) for one in project["dependencies"]]
    given += [("Extras", one) for extra in project["optional-dependencies"].values() for one in extra]
    named = [(section, re.split(r"[^A-Za-z0-9._-]", one)[0]) for section, one in given]
    return [row for row in named if row[1] != project["name"]]


@pytest.mark.parametrize(("section", "package"), requirements())
def test_every_dependency_has_its_line(section: str, package: str) -> None:
    part = text("docs/dependencies.md").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("|")]
    assert sum(f"`{package}`" in cell for cell in cells) == 1


def test_no_package_is_documented_as_needed_that_is_not() -> None:
    page = text("docs/dependencies.md")
    part = page.partition("\n## At run time\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE))
    assert documented == {package for section, package in requirements() if section == "At run time"}


# --- the pages themselves


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    prose = re.sub(r"`[^`\n]*`", "", without_code_blocks(page))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists():
            broken.append(target)
        elif fragment and file.suffix == ".md":
            name = file.resolve().relative_to(ROOT).as_posix()
            if fragment not in map(anchor, headings(name)):
                broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_no_page_names_a_place_outside_the_repository(page: str) -> None:
    assert re.findall(r"\.\./shared|(?<![\w.])/(?:work|tmp|root|home)/", text(page)) == []


def test_contributing_fits_on_two_screens() -> None:
    assert len(text("CONTRIBUTING.md").splitlines()) <= 100


def test_every_decision_is_in_the_index() -> None:
    index = text("docs/decisions/README.md")
    pages = sorted(path.name for path in (ROOT / "docs/decisions").glob("0*.md"))
    assert [name for name in pages if f"({name})" not in index] == []
    assert [int(name[:4]) for name in pages] == list(range(1, len(pages) + 1))


# --- what the code cites

CITATION = re.compile(
    r"\bdocs/([a-z_/]+\.md)"
    r"(?P<rest>(?:,? (?:and )?§\d+)*(?:,? R-\d+)*(?:,? \"[^\"\n]+\")*)"
)


def citations(file: str) -> list[tuple[str, str]]:
    """(page, what stands behind it), comment marks and line breaks taken out."""
    flat = re.sub(r"\n[ \t]*#?:?[ \t]*", " ", text(file))
    return [(f"docs/{page}", rest) for page, rest in CITATION.findall(flat)]


def missing(page: str, rest: str) -> list[str]:
    if not (ROOT / page).is_file():
        return [page]
    known = headings(page)
    absent = []
    for number in re.findall(r"§(\d+)", rest):
        if not any(re.match(rf"§?{number}\b", heading) for heading in known):
            absent.append(f"{page} §{number}")
    for rule in re.findall(r"R-\d+", rest):
        if f"**{rule}**" not in text(page):
            absent.append(f"{page} {rule}")
    for words in re.findall(r'"([^"]+)"', rest):
        if words.lower() not in [heading.lower() for heading in known]:
            absent.append(f'{page} "{words}"')
    return absent


def test_every_place_that_the_code_cites_exists() -> None:
    cited = {(file, *one) for file in CODE if file != "tests/test_docs.py" for one in citations(file)}
    assert len(cited) > 60
    assert sorted((file, gap) for file, page, rest in cited for gap in missing(page, rest)) == []


def test_a_citation_of_nothing_is_found() -> None:
    assert missing("docs/nowhere.md", "") == ["docs/nowhere.md"]
    assert missing("docs/protocol.md", " §2") == []
    assert missing("docs/protocol.md", " §2, §99") == ["docs/protocol.md §99"]
    assert missing("docs/behaviour.md", " R-6") == []
    assert missing("docs/behaviour.md", " R-66") == ["docs/behaviour.md R-66"]
    assert missing("docs/behaviour.md", ', "deadlines"') == []
    assert missing("docs/behaviour.md", ', "Miracles"') == ['docs/behaviour.md "Miracles"']
