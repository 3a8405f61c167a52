"""Pulling GGUF files from a host on loopback: progress, resuming, checks, sharing, where it may not lead."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from herd_node.models import downloads as module
from herd_node.models.downloads import Downloads
from herd_node.models.folder import ModelsFolder
from herd_node.models.outward import FetchError, Outward
from herd_node.models.reference import parse_reference
from herd_node.runtime.clock import SystemClock
from herd_node.runtime.tasks import Tasks
from herd_node.settings import Proxy
from tests.fakes.file_host import FileHost, gguf, sha256

BODY = gguf(3 * 1024 * 1024 + 11)
REPO = "org/tiny-GGUF"


class QuickClock(SystemClock):
    """Pauses between tries end at once."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


class Place:
    """A folder, what comes into it, and where that comes from."""

    def __init__(self, root: Path, host: FileHost) -> None:
        self.host = host
        self.tasks = Tasks("test")
        self.folder = ModelsFolder(root / "models")
        self.outward = Outward(Proxy(), agent="test")
        self.downloads = Downloads(self.folder, self.outward, self.tasks, QuickClock(), hub=host.url)
        self.changes = 0

    def follow(self, name: str) -> Any:
        return self.downloads.follow(parse_reference(name), self._changed)

    async def pull(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) async for line in self.follow(name)]

    def _changed(self) -> None:
        self.changes += 1

    @property
    def files(self) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes()
            for path in self.folder.root.iterdir()
            if not path.name.startswith(".") and path.suffix != ".json"
        }


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with FileHost() as host:
        place = Place(tmp_path, host)
        yield place
        await place.tasks.close()


def error_of(lines: list[dict[str, Any]]) -> str:
    assert set(lines[-1]) == {"error"}
    return str(lines[-1]["error"])


# -- what is pulled, and how it is told


async def test_a_file_by_its_url_with_lines_in_ollamas_shape(place: Place) -> None:
    place.host.put("/a/tiny.gguf", BODY)
    lines = await place.pull(f"{place.host.url}/a/tiny.gguf")
    assert lines[0] == {"status": "pulling manifest"}
    progress = [line for line in lines if "total" in line]
    assert progress[-1] == {"status": "pulling file", "total": len(BODY), "completed": len(BODY)}
    assert [line["status"] for line in lines[-3:]] == [
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]
    assert place.files == {"tiny.gguf": BODY}
    assert place.changes == 1
    found = place.folder.find(f"{place.host.url}/a/tiny.gguf")
    assert found is not None
    assert (found.name, found.sha256, found.size_bytes) == ("tiny", sha256(BODY), len(BODY))
    assert (place.folder.root / "tiny.gguf").stat().st_mode & 0o777 == 0o600


async def test_a_file_of_hugging_face_by_its_quantisation(place: Place) -> None:
    other = gguf(5000, seed=2)
    place.host.put_repo(REPO, {"tiny-Q8_0.gguf": other, "tiny-Q4_K_M.gguf": BODY})
    lines = await place.pull(f"hf.co/{REPO}:Q4_K_M")
    digest = sha256(BODY)
    assert lines[-4] == {
        "status": f"pulling {digest[:12]}",
        "digest": f"sha256:{digest}",
        "total": len(BODY),
        "completed": len(BODY),
    }
    assert lines[-1] == {"status": "success"}
    assert place.files == {"tiny-Q4_K_M.gguf": BODY}
    found = place.folder.find(f"HF.co/{REPO}:q4_k_m")
    assert found is not None
    assert found.name == "tiny-Q4_K_M"


async def test_what_was_pulled_before_is_told_without_asking_anybody(place: Place) -> None:
    place.host.put_repo(REPO, {"tiny-Q4_K_M.gguf": BODY})
    await place.pull(f"hf.co/{REPO}")
    asked = len(place.host.asked)
    lines = await place.pull(f"hf.co/{REPO}")
    assert len(place.host.asked) == asked
    assert [line["status"] for line in lines] == [
        "pulling manifest", f"pulling {sha256(BODY)[:12]}", "success",
    ]  # fmt: skip
    assert place.changes == 2
    # by another name that turns out to be the same file
    again = await place.pull(f"hf.co/{REPO}:Q4_K_M")
    assert again[-1] == {"status": "success"}
    assert place.host.ranges(f"/store/{sha256(BODY)}") == [None]


async def test_nothing_is_ever_overwritten(place: Place) -> None:
    place.folder.ensure()
    mine = place.folder.root / "tiny.gguf"
    mine.write_bytes(b"GGUF mine")
    place.host.put("/tiny.gguf", BODY)
    lines = await place.pull(f"{place.host.url}/tiny.gguf")
    assert error_of(lines) == (
        "pull model: tiny.gguf is there already, from elsewhere; nothing is overwritten, delete 'tiny' first"
    )
    assert mine.read_bytes() == b"GGUF mine"


async def test_a_file_that_somebody_put_there_is_taken_as_it_is_if_it_is_the_one(place: Place) -> None:
    place.host.put_repo(REPO, {"tiny-Q4_K_M.gguf": BODY})
    place.folder.ensure()
    mine = place.folder.root / "tiny-Q4_K_M.gguf"
    mine.write_bytes(BODY)
    assert (await place.pull(f"hf.co/{REPO}"))[-1] == {"status": "success"}
    assert place.host.ranges(f"/store/{sha256(BODY)}") == []
    found = place.folder.find(f"hf.co/{REPO}")
    assert found is not None
    assert found.sha256 == sha256(BODY)
    mine.with_name(mine.name + ".json").unlink()
    mine.write_bytes(gguf(len(BODY), seed=5))
    assert "from elsewhere" in error_of(await place.pull(f"hf.co/{REPO}"))


async def test_a_file_that_came_there_meanwhile_is_not_overwritten_either(place: Place) -> None:
    go_on = asyncio.Event()
    place.host.put("/tiny.gguf", BODY, wait=go_on)
    pulling = asyncio.ensure_future(place.pull(f"{place.host.url}/tiny.gguf"))
    while not place.host.asked:
        await asyncio.sleep(0.001)
    (place.folder.root / "tiny.gguf").write_bytes(b"GGUF mine")
    go_on.set()
    assert "nothing is overwritten" in error_of(await pulling)
    assert place.files["tiny.gguf"] == b"GGUF mine"


# -- resuming


async def test_a_connection_that_breaks_is_taken_up_where_it_broke(place: Place) -> None:
    place.host.put("/tiny.gguf", BODY, cut_after=1024 * 1024 + 5)
    assert (await place.pull(f"{place.host.url}/tiny.gguf"))[-1] == {"status": "success"}
    first, second = place.host.ranges("/tiny.gguf")
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 1024 * 1024 + 5
    assert place.host.asked[-1][1]["if-range"] == '"v1"'
    assert place.files == {"tiny.gguf": BODY}


async def test_whoever_leaves_ends_the_download_and_the_next_one_goes_on_from_there(place: Place) -> None:
    go_on = asyncio.Event()
    served = place.host.put("/tiny.gguf", BODY, wait=go_on)
    lines = place.follow(f"{place.host.url}/tiny.gguf")
    async for line in lines:
        if json.loads(line).get("completed"):
            break
    await lines.aclose()
    while not place.host.left:
        await asyncio.sleep(0.005)
    served.wait = None
    assert (await place.pull(f"{place.host.url}/tiny.gguf"))[-1] == {"status": "success"}
    assert place.host.ranges("/tiny.gguf")[1] is not None
    assert place.files == {"tiny.gguf": BODY}


async def test_a_part_of_a_file_that_changed_is_thrown_away(place: Place) -> None:
    place.host.put("/tiny.gguf", BODY, cut_after=1024 * 1024, ranges=True)
    place.host.files["/tiny.gguf"].status = 200
    newer = gguf(len(BODY), seed=7)

    lines = place.follow(f"{place.host.url}/tiny.gguf")
    async for line in lines:
        if json.loads(line).get("completed"):
            break
    await lines.aclose()
    place.host.put("/tiny.gguf", newer, etag='"v2"')
    assert (await place.pull(f"{place.host.url}/tiny.gguf"))[-1] == {"status": "success"}
    assert place.files == {"tiny.gguf": newer}


async def test_without_an_etag_or_a_hash_a_part_proves_nothing_and_is_not_used(place: Place) -> None:
    place.folder.ensure()
    (place.folder.root / "tiny.gguf.part").write_bytes(BODY[:100_000])
    place.host.put("/tiny.gguf", BODY, etag=None)
    assert (await place.pull(f"{place.host.url}/tiny.gguf"))[-1] == {"status": "success"}
    assert place.host.ranges("/tiny.gguf") == [None]
    assert place.files == {"tiny.gguf": BODY}


async def test_a_host_without_ranges_is_read_from_the_start_again(place: Place) -> None:
    place.host.put("/tiny.gguf", BODY, cut_after=1024 * 1024, ranges=False)
    assert (await place.pull(f"{place.host.url}/tiny.gguf"))[-1] == {"status": "success"}
    assert place.files == {"tiny.gguf": BODY}


async def test_a_part_that_is_all_of_it_is_only_checked(place: Place) -> None:
    place.host.put_repo(REPO, {"tiny-Q4_K_M.gguf": BODY})
    place.folder.ensure()
    part = place.folder.root / "tiny-Q4_K_M.gguf.part"
    part.write_bytes(BODY)
    url = f"{place.host.url}/{REPO}/resolve/main/tiny-Q4_K_M.gguf"
    part.with_name(part.name + ".json").write_text(json.dumps({"url": url, "sha256": sha256(BODY)}))
    assert (await place.pull(f"hf.co/{REPO}"))[-1] == {"status": "success"}
    assert place.files == {"tiny-Q4_K_M.gguf": BODY}


async def test_a_part_that_is_longer_than_the_file_is_begun_anew(place: Place) -> None:
    place.host.put("/tiny.gguf", BODY)
    place.folder.ensure()
    part = place.folder.root / "tiny.gguf.part"
    part.write_bytes(BODY + b"more")
    note = {"url": f"{place.host.url}/tiny.gguf", "sha256": None, "etag": '"v1"'}
    part.with_name(part.name + ".json").write_text(json.dumps(note))
    assert (await place.pull(f"{place.host.url}/tiny.gguf"))[-1] == {"status": "success"}
    assert place.files == {"tiny.gguf": BODY}


async def test_a_host_that_brings_nothing_any_more_is_given_up(place: Place) -> None:
    served = place.host.put("/tiny.gguf", BODY)
    served.status = 503
    lines = await place.pull(f"{place.host.url}/tiny.gguf")
    assert error_of(lines) == "pull model: the host answers 503"
    assert len(place.host.asked) == module.MAX_VAIN_TRIES


# -- checks


async def test_what_is_not_what_the_hub_says_is_thrown_away(place: Place) -> None:
    place.host.put_repo(REPO, {"tiny-Q4_K_M.gguf": BODY})
    wrong = gguf(len(BODY), seed=9)
    place.host.files[f"/store/{sha256(BODY)}"].body = wrong
    lines = await place.pull(f"hf.co/{REPO}")
    assert error_of(lines) == (
        f"pull model: digest mismatch, file must be downloaded again: want sha256:{sha256(BODY)}, "
        f"got sha256:{sha256(wrong)}"
    )
    assert place.files == {}


async def test_the_hash_of_a_redirect_counts_where_no_list_was_read(place: Place) -> None:
    place.host.put("/x.gguf", b"", status=302, location="/store", linked_etag=f'"{"0" * 64}"')
    place.host.put("/store", BODY)
    lines = await place.pull(f"{place.host.url}/x.gguf")
    assert "digest mismatch" in error_of(lines)


@pytest.mark.parametrize(
    ("manners", "sentence"),
    [
        ({"status": 404}, "file does not exist"),
        ({"status": 401}, "the host does not give it to everybody (401)"),
        ({"status": 302}, "the host answers 302"),
        ({"length": None}, "the host does not say how large it is"),
        ({"length": "2"}, "what the host sends is no GGUF file"),
        ({"body": b"<html>sign in</html>"}, "what the host sends is no GGUF file"),
        ({"body": b"GG"}, "what the host sends is no GGUF file"),
        ({"status": 302, "location": "ftp://h/x"}, "it leads to something that is neither http nor https"),
        ({"status": 302, "location": "/x.gguf"}, "it redirects too often"),
    ],
)
async def test_what_cannot_be_right_is_told_and_leaves_no_file(
    place: Place, manners: dict[str, object], sentence: str
) -> None:
    place.host.put("/x.gguf", **({"body": BODY} | manners))  # type: ignore[arg-type]
    lines = await place.pull(f"{place.host.url}/x.gguf")
    assert error_of(lines) == f"pull model: {sentence}"
    assert [name for name in place.files if not name.endswith(".part")] == []


async def test_a_repository_that_is_not_public_or_has_no_such_file_is_told(place: Place) -> None:
    assert error_of(await place.pull("hf.co/no/body")) == (
        "pull model: there is no public repository no/body on Hugging Face"
    )
    place.host.put_repo(REPO, {"tiny-Q4_K_M.gguf": BODY})
    assert "there is no Q2_K in" in error_of(await place.pull(f"hf.co/{REPO}:Q2_K"))
    place.host.put_repo("o/split", {"big-Q4_K_M-00001-of-00002.gguf": BODY})
    assert "split over several files" in error_of(await place.pull("hf.co/o/split"))


async def test_a_file_that_would_fill_the_disk_is_refused_before_it_is_fetched(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.host.put("/x.gguf", BODY)
    monkeypatch.setattr(place.folder, "free_bytes", lambda: module.RESERVE_BYTES + len(BODY) - 1)
    lines = await place.pull(f"{place.host.url}/x.gguf")
    assert error_of(lines).startswith(f"pull model: not enough disk: {len(BODY)} bytes are still to come")
    assert place.files == {"x.gguf.part": b""}


# -- one download for many


async def test_everybody_who_waits_for_a_file_shares_one_download(place: Place) -> None:
    go_on = asyncio.Event()
    place.host.put("/tiny.gguf", BODY, wait=go_on)
    url = f"{place.host.url}/tiny.gguf"
    waiting = [asyncio.ensure_future(place.pull(url)) for _ in range(5)]
    leaver = place.follow(url)
    assert json.loads(await anext(leaver)) == {"status": "pulling manifest"}
    await anext(leaver)
    await leaver.aclose()
    go_on.set()
    for lines in await asyncio.gather(*waiting):
        assert lines[0] == {"status": "pulling manifest"}
        assert lines[-1] == {"status": "success"}
    assert len(place.host.asked) == 1
    assert place.changes == 1


async def test_after_a_failure_the_next_caller_tries_again(place: Place) -> None:
    url = f"{place.host.url}/tiny.gguf"
    slow_reader = place.follow(url)
    async for line in slow_reader:
        if b"error" in line:
            break
    place.host.put("/tiny.gguf", BODY)
    assert (await place.pull(url))[-1] == {"status": "success"}
    await slow_reader.aclose()


# -- where it may lead


NO_PROXY = Proxy()


def outward(addresses: dict[str, Sequence[str]], proxy: Proxy = NO_PROXY) -> Outward:
    async def resolve(host: str, port: int) -> Sequence[str]:
        if host not in addresses:
            raise OSError("no such host")
        return addresses[host]

    return Outward(proxy, agent="test", resolve=resolve)


async def opened(outward: Outward, url: str) -> int:
    async with outward.get(url) as answer:
        return answer.status


@pytest.mark.parametrize(
    ("url", "addresses", "sentence"),
    [
        (
            "http://far.example/x.gguf",
            ["93.184.216.34"],
            "files from other networks are fetched by https only",
        ),
        ("http://far.example/x.gguf", ["127.0.0.1", "93.184.216.34"], "fetched by https only"),
        ("https://far.example/x.gguf", ["169.254.169.254"], "an address that nothing is fetched from"),
        ("http://far.example/x.gguf", ["::ffff:169.254.169.254"], "an address that nothing is fetched from"),
        ("https://far.example/x.gguf", ["0.0.0.0"], "an address that nothing is fetched from"),
        ("https://nowhere.example/x.gguf", [], "there is no host nowhere.example"),
    ],
)
async def test_an_address_decides_and_not_a_name(url: str, addresses: list[str], sentence: str) -> None:
    with pytest.raises(FetchError, match=sentence):
        await opened(outward({"far.example": addresses}), url)


async def test_a_private_source_may_be_named_and_may_lead_on_inside(place: Place) -> None:
    place.host.put("/x.gguf", b"", status=307, location=f"http://inside.test:{place.host.port}/y")
    place.host.put("/y", BODY)
    inside = {"127.0.0.1": ["127.0.0.1"], "inside.test": ["127.0.0.1"]}
    assert await opened(outward(inside), f"{place.host.url}/x.gguf") == 200


async def test_a_public_source_leads_to_nothing_private(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public host is the one on loopback, taken for public by its address only."""
    place.host.put("/x.gguf", b"", status=302, location=f"http://10.0.0.1:{place.host.port}/y")
    reach = {"127.0.0.1": "public"}
    monkeypatch.setattr("herd_node.models.outward.reach_of", lambda address: reach.get(address, "private"))
    monkeypatch.setattr("herd_node.models.outward._PRIVATE", frozenset({"private", "public"}))
    names = {"127.0.0.1": ["127.0.0.1"], "10.0.0.1": ["10.0.0.1"]}
    with pytest.raises(FetchError, match="an address that nothing is fetched from"):
        await opened(outward(names), f"{place.host.url}/x.gguf")


async def test_through_a_proxy_names_go_and_local_ones_do_not(place: Place) -> None:
    through = outward({"127.0.0.1": ["127.0.0.1"]}, Proxy(place.host.url))
    for url in ("https://localhost/x.gguf", "https://box.local/x.gguf"):
        with pytest.raises(FetchError, match="a proxy is not asked for hosts of this network"):
            await opened(through, url)
    with pytest.raises(FetchError, match="an address that nothing is fetched from"):
        await opened(through, "https://169.254.169.254/x.gguf")
    with pytest.raises(FetchError, match="the proxy does not let it through"):
        await opened(through, "https://far.example/x.gguf")
    assert place.host.asked[-1][0] == "far.example:443"
    assert "proxy-authorization" not in place.host.asked[-1][1]
    place.host.put("/x.gguf", BODY)
    assert await opened(through, f"{place.host.url}/x.gguf") == 200, "plain http stays in this network"
    with_login = outward({}, Proxy(place.host.url.replace("//", "//me:p%40ss@")))
    with pytest.raises(FetchError, match="the proxy does not let it through"):
        await opened(with_login, "https://far.example/x.gguf")
    assert place.host.asked[-1][1]["proxy-authorization"] == "Basic bWU6cEBzcw=="
    with pytest.raises(FetchError, match="HTTPS_PROXY must look like"):
        await opened(outward({}, Proxy("socks5://p:1")), "https://far.example/x.gguf")


async def test_no_more_than_what_is_needed_is_said_to_a_host(place: Place) -> None:
    place.host.put("/x.gguf", BODY)
    await place.pull(f"{place.host.url}/x.gguf")
    assert place.host.asked[0][1] == {
        "host": f"127.0.0.1:{place.host.port}",
        "user-agent": "test",
        "accept-encoding": "identity",
    }
