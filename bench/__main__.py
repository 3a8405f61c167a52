"""`python -m bench`: argv → programs → rounds → verdicts. Progress goes to standard error, tables to standard
output. Exit code: 0, or 1 when a request failed or something could not be measured, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from bench import decision, goals, machine, memory, report, scenarios
from bench.build import build
from bench.errors import BenchError
from bench.rounds import Bench, Pace
from bench.scenarios import Scenario
from bench.targets import AGENT, ALL, DIRECT, ROUTER, Stage

_README = Path(__file__).parent / "README.md"
_QUICK_TARGETS = (DIRECT, ROUTER, AGENT)
_QUICK_PACE = Pace(rounds=1, seconds=1.0, warm_up_s=0.2)
_QUICK_REQUESTS = 1_000
_FEWEST_FILES = 4_500


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(args)
    except BenchError as error:
        _say(f"bench: {error}")
        return 1
    except KeyboardInterrupt:
        _say("bench: interrupted; everything that was started has been ended")
        return 130


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(args: argparse.Namespace) -> int:
    chosen = _scenarios(args)
    names = args.targets or (_QUICK_TARGETS if args.quick else ALL)
    pace = _pace(args)
    files = machine.raise_file_limit()
    if files < _FEWEST_FILES:
        _say(f"bench: only {files} open files are allowed here; 2,000 streams will fail (ulimit -Hn)")
    described = machine.description()
    when = datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
    tools = build()
    with tempfile.TemporaryDirectory(prefix="herd-bench-") as folder:
        with Stage(tools, Path(folder), args.peers_venv) as stage:
            bench = Bench(tools, Path(folder), pace, _say)
            remembered = None
            if args.memory:
                _say("memory of a router of its own")
                requests = _QUICK_REQUESTS if args.quick else memory.REQUESTS
                remembered = memory.measure(stage, bench, requests)
        with Stage(tools, Path(folder), args.peers_venv) as stage:
            _say("starting " + ", ".join(names))
            targets = stage.targets(names)
            _say_missing(names, [target.name for target in targets])
            rounds = Bench(tools, Path(folder), pace, _say).run(chosen, targets)
    counts = decision.NODE_COUNTS[:1] if args.quick else decision.NODE_COUNTS
    decisions = [decision.measure(count) for count in counts] if args.decision else []
    found = report.Report(
        command=_command(sys.argv[1:]),
        when=when,
        machine=described,
        pace=pace,
        scenarios=chosen,
        targets=targets,
        rounds=rounds,
        decisions=decisions,
        memory=remembered,
        results=goals.judge(rounds, decisions, remembered),
    )
    return _tell(found, args)


def _tell(found: report.Report, args: argparse.Namespace) -> int:
    markdown = report.as_markdown(found)
    sys.stdout.write(markdown + "\n")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(report.as_json(found))
    _say(f"every cell: {args.json}")
    if args.readme:
        report.into_readme(_README, markdown)
        _say(f"tables written into {_README}")
    if found.error_count:
        _say(f"bench: {found.error_count} requests failed")
        return 1
    return 0


def _scenarios(args: argparse.Namespace) -> tuple[Scenario, ...]:
    offered = scenarios.quick() if args.quick else scenarios.SCENARIOS
    if not args.only:
        return offered
    by_name = {**scenarios.BY_NAME, **{scenario.name: scenario for scenario in offered}}
    unknown = sorted(set(args.only) - by_name.keys())
    if unknown:
        raise BenchError(f"There is no scenario {', '.join(unknown)}; there are {', '.join(by_name)}.")
    return tuple(scenario for name, scenario in by_name.items() if name in args.only)


def _pace(args: argparse.Namespace) -> Pace:
    pace = _QUICK_PACE if args.quick else Pace()
    if args.rounds is not None:
        pace = pace._replace(rounds=args.rounds)
    if args.seconds is not None:
        pace = pace._replace(seconds=args.seconds)
    return pace


def _say_missing(asked: Sequence[str], found: Sequence[str]) -> None:
    for name in asked:
        if name not in found:
            _say(f"bench: {name} is not installed here and is left out (bench/README.md says how)")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="What a request costs in the router, beside other routers.",
        epilog="Scenarios: " + ", ".join(scenarios.BY_NAME) + ". Targets: " + ", ".join(ALL) + ".",
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    add = parser.add_argument
    add("--quick", action="store_true", help="a smoke run: small scenarios of a second, no peers, one round")
    add("--only", type=_names, metavar="NAMES", help="scenarios, comma separated")
    add("--targets", type=_targets, metavar="NAMES", help="targets, comma separated (all that are installed)")
    add("--rounds", type=_positive, metavar="N", help="rounds, alternately forwards and backwards (3)")
    add("--seconds", type=float, metavar="S", help="length of a cell (1.5)")
    add(
        "--peers-venv",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="virtual environment that has sglang-router or vllm-router; repeatable",
    )
    add("--no-memory", dest="memory", action="store_false", help="do not measure memory")
    add("--no-decision", dest="decision", action="store_false", help="do not time decisions")
    add("--json", type=Path, default=cache / "herd-bench" / "latest.json", metavar="FILE", help="every cell")
    add("--readme", action="store_true", help="write the tables into bench/README.md")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _targets(text: str) -> tuple[str, ...]:
    names = _names(text)
    unknown = sorted(set(names) - set(ALL))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"there is no target {', '.join(unknown)}; there are {', '.join(ALL)}"
        )
    return names


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"a whole number above 0, not {text!r}")
    return int(text)


def _command(arguments: Sequence[str]) -> str:
    """As it can be repeated; where the peers lie is this machine's business."""
    shown = list(arguments)
    for place, word in enumerate(shown[:-1]):
        if word == "--peers-venv":
            shown[place + 1] = "DIR"
    return shlex.join(["python", "-m", "bench", *shown])


if __name__ == "__main__":
    sys.exit(main())
