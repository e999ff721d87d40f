"""The command line: ``dualpipe show | simulate | verify | export | search``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from eplb_rs._core import __version__

from dualpipe import METHODS, Costs, Layers, Machine, Schedule, ScheduleError, search

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dualpipe import Candidate, Timeline

__all__ = ["main"]

_EXAMPLES = {
    "show": """\
examples:
  dualpipe show dualpipe --ranks 4 --micro-batches 8
  dualpipe show zbv -p 4 -m 8 --text
  dualpipe show schedule.csv --plot schedule.svg
""",
    "simulate": """\
examples:
  dualpipe simulate dualpipev -p 8 -m 16
  dualpipe simulate dualpipev -p 8 -m 16 --overlap 0.85 --latency 0.05
  dualpipe simulate zb_h1 -p 8 -m 32 --forward 1.0 --input 1.2 --weight 0.9 --perfetto trace.json
""",
    "verify": """\
examples:
  dualpipe verify schedule.csv
  dualpipe verify dualpipe -p 16 -m 40
  dualpipe verify schedule.csv --transport eager --max-activations 9
""",
    "export": """\
examples:
  dualpipe export zbv -p 4 -m 8 -o zbv.csv
  dualpipe export 1f1b -p 4 -m 8 --format csv --form compute_comms
  dualpipe export dualpipe -p 8 -m 20 --format json -o dualpipe.json
""",
    "search": """\
examples:
  dualpipe search --forward 0.1,0.6x3,1x58,2.5 --ranks 16 --micro-batches 32,64
  dualpipe search --layers layers.json -p 16 -m 64 --memory-gb 80 --overlap 0.9
  dualpipe search --forward 1x32 -p 8 -m 16 --methods zbv,dualpipev --overlap 0.85

layers.json holds any of forward, backward_input, backward_weight (times) and parameter_bytes,
activation_bytes, message_bytes, each a number or a list with one figure for every layer.
""",
}


_OPTIONS = {
    "num_ranks": "--ranks",
    "num_micro_batches": "--micro-batches",
    "stages_per_rank": "--stages-per-rank",
    "max_activations": "--max-activations",
    "max_bytes": "--memory-gb",
    "max_simulations": "--simulations",
    "methods": "--methods",
    "layers": "--forward",
    "forward": "--forward",
    "backward_input": "--input",
    "backward_weight": "--weight",
    "overlap_factor": "--overlap",
    "latency": "--latency",
}
"""What the command line calls the arguments of the package."""

_MOST_STAGES = 65535
"""What a schedule can have; more layers than stages make sense up to here too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 for a refusal, 2 for wrong usage, 130 if
    interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        if sys.stdout is not None:  # closed by whoever has started this
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, a pager) has seen enough. Python would complain again as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ScheduleError, OSError, ImportError) as error:
        print(f"dualpipe: {_in_options(str(error))}", file=sys.stderr)
        return 1
    return 0


def _in_options(message: str) -> str:
    """A message of the package in the words of the command line."""
    for argument, option in _OPTIONS.items():
        message = message.replace(f"`{argument}`", f"`{option}`")
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dualpipe",
        description="Pipeline schedules: show, simulate, verify, export, search.",
        epilog="dualpipe COMMAND --help shows each command's examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = _command(commands, "show", "draw a schedule with F = I = W = 1", _show)
    _add_schedule(show)
    show.add_argument("--text", action="store_true", help="print the instructions instead")
    show.add_argument("--plot", metavar="FILE", help="draw it to a .svg, .png or .pdf")

    simulate = _command(commands, "simulate", "predict makespan, bubble and memory", _simulate)
    _add_schedule(simulate)
    for name, word in (("forward", "F"), ("input", "I"), ("weight", "W")):
        simulate.add_argument(
            f"--{name}",
            type=_times,
            default=[1.0],
            metavar="T",
            help=f"time of {word}: a number, or one per stage such as 1,1.2x6,1 (default: 1)",
        )
    _add_machine(simulate)
    simulate.add_argument("--json", action="store_true", help="print JSON")
    simulate.add_argument("--plot", metavar="FILE", help="draw the timeline to a file")
    simulate.add_argument("--perfetto", metavar="FILE", help="write a trace for ui.perfetto.dev")

    verify = _command(commands, "verify", "prove a schedule right", _verify)
    _add_schedule(verify)
    verify.add_argument(
        "--transport",
        action="append",
        choices=["eager", "rendezvous", "queue"],
        help="prove freedom from deadlock under this only; repeatable (default: all)",
    )
    verify.add_argument("--max-activations", type=int, metavar="N", help="allow no rank more")

    export = _command(
        commands, "export", "write a schedule as text, JSON or PyTorch's CSV", _export
    )
    _add_schedule(export)
    export.add_argument(
        "--format", choices=["text", "json", "csv"], help="default: by FILE's suffix"
    )
    export.add_argument("--form", choices=["compute_only", "compute_comms"], default="compute_only")
    export.add_argument("--dialect", choices=["current", "older"], default="current")
    export.add_argument("--no-waits", action="store_true", help="for PyTorch before 2.14")
    export.add_argument("-o", "--output", metavar="FILE", help="default: standard output")

    find = _command(commands, "search", "rank schedules, partitions and micro-batches", _search)
    find.add_argument(
        "--forward", type=_times, metavar="T,...", help="F per layer: 0.1,0.6x3,1x58,2.5"
    )
    find.add_argument("--input", type=_times, metavar="T,...", help="I per layer (default: as F)")
    find.add_argument("--weight", type=_times, metavar="T,...", help="W per layer (default: as F)")
    find.add_argument("--layers", metavar="FILE", help="measured costs as JSON, instead")
    find.add_argument("-p", "--ranks", type=int, required=True, metavar="P")
    find.add_argument("-m", "--micro-batches", type=_counts, metavar="M,...", help="default: 2P,4P")
    find.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    find.add_argument("--stages-per-rank", type=_counts, default=[2], metavar="V,...")
    find.add_argument(
        "--memory-gb", type=_gigabytes, metavar="GB", help="what a rank may hold, 10^9 bytes"
    )
    find.add_argument(
        "--top", type=_whole, default=10, metavar="N", help="print the first N (default: 10)"
    )
    find.add_argument("--simulations", type=int, default=500, metavar="N", help="per combination")
    find.add_argument("--json", action="store_true", help="print JSON")
    _add_machine(find)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_schedule(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "schedule",
        help=f"a file (.csv, .json, text), or a method: {', '.join(METHODS)}",
    )
    command.add_argument("-p", "--ranks", type=int, metavar="P", help="for a method")
    command.add_argument("-m", "--micro-batches", type=int, metavar="M", help="for a method")
    command.add_argument(
        "--stages-per-rank", type=int, metavar="V", help="for looped and interleaved"
    )
    command.add_argument("--forward-only", action="store_true", help="for inference")


def _add_machine(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--overlap",
        type=float,
        default=1.0,
        metavar="X",
        help="a pair's time / its halves' (default: 1)",
    )
    command.add_argument(
        "--latency", type=float, default=0.0, metavar="T", help="of a link (default: 0)"
    )
    command.add_argument("--sends", choices=["asynchronous", "blocking"], default="asynchronous")
    command.add_argument("--pairs", choices=["atomic", "early_forward"], default="atomic")


def _schedule(options: argparse.Namespace, *, check: bool = True) -> Schedule:
    path = Path(options.schedule)
    if path.suffix or path.is_file():
        for option in ("ranks", "micro_batches", "stages_per_rank"):
            if getattr(options, option) is not None:
                raise ScheduleError(
                    code="usage",
                    argument=f"--{option.replace('_', '-')}",
                    got=f"{getattr(options, option)} with a file",
                    expected="left out, since the file says it",
                )
        schedule = Schedule.load(path, check=check)
        return schedule.forward_only() if options.forward_only else schedule
    if options.ranks is None or options.micro_batches is None:
        raise ScheduleError(
            code="usage",
            argument="schedule",
            got=options.schedule,
            expected="a file, or a method with --ranks and --micro-batches",
            hint=f"methods: {', '.join(METHODS)}",
        )
    return Schedule.generate(
        options.schedule,
        options.ranks,
        options.micro_batches,
        stages_per_rank=options.stages_per_rank,
        forward_only=options.forward_only,
        check=check,
    )


def _show(options: argparse.Namespace) -> None:
    from dualpipe.draw import grid

    schedule = _schedule(options)
    timeline = schedule.simulate()
    if options.plot:
        timeline.plot(options.plot)
        print(options.plot)
    elif options.text:
        print(schedule.text(), end="")
    else:
        print(grid(timeline))
        print(f"\n{schedule!r}\nmakespan {timeline.makespan:g}, bubble {timeline.bubble_ratio:.1%}")


def _simulate(options: argparse.Namespace) -> None:
    schedule = _schedule(options)
    stages = schedule.num_stages
    costs = Costs(
        forward=_spread(options.forward, stages, "forward"),
        backward_input=_spread(options.input, stages, "input"),
        backward_weight=_spread(options.weight, stages, "weight"),
        overlap_factor=options.overlap,
        latency=options.latency,
    )
    timeline = schedule.simulate(costs, sends=options.sends, pairs=options.pairs)
    if options.plot:
        timeline.plot(options.plot)
    if options.perfetto:
        timeline.to_perfetto(options.perfetto)
    if options.json:
        print(json.dumps(_figures(timeline)))
        return
    peaks = timeline.peaks
    print(f"{schedule!r}")
    print(f"makespan {timeline.makespan:g}   bubble {timeline.bubble_ratio:.2%}")
    print("rank      busy      idle  activations  kept  receive buffers  send buffers")
    for rank in range(schedule.num_ranks):
        print(
            f"{rank:4} {timeline.busy[rank]:9g} {timeline.idle[rank]:9g}  "
            f"{peaks.activations[rank]:11} {peaks.kept[rank]:5} "
            f"{peaks.receive_buffers[rank]:16} {peaks.send_buffers[rank]:13}"
        )
    print(
        "not modelled: launches, reductions, the optimizer, interference of transfers with "
        "computation, shared links"
    )


def _figures(timeline: Timeline) -> dict[str, object]:
    peaks = timeline.peaks
    return {
        "schedule": timeline.schedule.name,
        "num_ranks": timeline.schedule.num_ranks,
        "num_micro_batches": timeline.schedule.num_micro_batches,
        "makespan": timeline.makespan,
        "bubble_ratio": timeline.bubble_ratio,
        "busy": timeline.busy.tolist(),
        "idle": timeline.idle.tolist(),
        "peak_activations": peaks.activations.tolist(),
        "peak_kept": peaks.kept.tolist(),
        "receive_buffers": peaks.receive_buffers.tolist(),
        "send_buffers": peaks.send_buffers.tolist(),
    }


def _verify(options: argparse.Namespace) -> None:
    schedule = _schedule(options, check=False)
    transports = options.transport or ["eager", "rendezvous", "queue"]
    proof = schedule.verify(transports=transports, max_activations=options.max_activations)
    peaks = proof.peaks
    print(f"{schedule!r}: right")
    print(f"no deadlock with transports: {', '.join(proof.transports)}")
    print(f"messages between ranks: {proof.num_messages}")
    for name in ("activations", "kept", "receive_buffers", "send_buffers"):
        counts = getattr(peaks, name)
        print(f"most {name.replace('_', ' ')}: {counts.max()} (by rank: {counts.tolist()})")


def _export(options: argparse.Namespace) -> None:
    schedule = _schedule(options)
    suffix = Path(options.output).suffix.removeprefix(".") if options.output else "text"
    form = options.format or {"csv": "csv", "json": "json"}.get(suffix, "text")
    if form == "csv":
        content = schedule.to_csv(options.form, dialect=options.dialect, waits=not options.no_waits)
    else:
        content = schedule.to_json() + "\n" if form == "json" else schedule.text()
    if options.output:
        Path(options.output).write_bytes(content.encode())
    else:
        sys.stdout.write(content)


def _search(options: argparse.Namespace) -> None:
    every = search(
        _layers(options),
        options.ranks,
        num_micro_batches=options.micro_batches,
        methods=options.methods,
        stages_per_rank=options.stages_per_rank,
        machine=Machine(
            latency=options.latency,
            overlap_factor=options.overlap,
            pairs=options.pairs,
            sends=options.sends,
            max_bytes=options.memory_gb,
        ),
        max_simulations=options.simulations,
        progress=_progress if sys.stderr.isatty() else None,
    )
    found = every[: options.top]
    if options.json:
        rows = [
            {
                "method": candidate.method,
                "num_micro_batches": candidate.num_micro_batches,
                "stages_per_rank": candidate.stages_per_rank,
                "bounds": candidate.partition and candidate.partition.bounds,
                "makespan": candidate.partition and candidate.partition.makespan,
                "wins_below_overlap": candidate.wins_below_overlap,
                "why": candidate.why,
            }
            for candidate in found
        ]
        print(json.dumps(rows))
    else:
        _print_candidates(found)
    if not any(candidate.partition for candidate in every):
        raise ScheduleError(
            code="infeasible",
            argument="--methods",
            got=f"{len(every)} combinations of schedule and micro-batches",
            expected="such that one of them can be run",
            hint="the list says why each cannot",
        )


def _print_candidates(found: Sequence[Candidate]) -> None:
    for place, candidate in enumerate(found, 1):
        stages = f" x{candidate.stages_per_rank}" if candidate.stages_per_rank else ""
        print(f"{place:2}. {candidate.method}{stages}, {candidate.num_micro_batches} micro-batches")
        if candidate.partition:
            sizes = [end - begin for begin, end in pairwise(candidate.partition.bounds)]
            print(
                f"    {candidate.time_per_micro_batch:.4g} a micro-batch, "
                f"{candidate.partition.makespan:.6g} a step; layers per stage {sizes}"
            )
        print(f"    {candidate.why}")


def _progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rsearched {done} of {total} combinations", end=end, file=sys.stderr, flush=True)


def _layers(options: argparse.Namespace) -> Layers:
    if (options.forward is None) == (options.layers is None):
        raise ScheduleError(
            code="usage",
            argument="--forward",
            got="both it and --layers" if options.layers else "nothing",
            expected="layer times, or a file with --layers",
        )
    if options.layers is None:
        return Layers(
            forward=options.forward,
            backward_input=options.input,
            backward_weight=options.weight,
        )
    try:
        return Layers(**json.loads(Path(options.layers).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ScheduleError(
            code="layers",
            argument="--layers",
            got=f"{options.layers}: {error}",
            expected="a JSON object with forward, backward_input, backward_weight, "
            "parameter_bytes, activation_bytes, message_bytes",
        ) from error


def _times(text: str) -> list[float]:
    """``0.1,0.6x3`` is 0.1 and three times 0.6."""
    times: list[float] = []
    for part in text.split(","):
        time, x, count = part.partition("x")
        try:
            repeated = int(count) if x else 1
            if not 1 <= repeated <= _MOST_STAGES:
                raise ValueError
            times += [float(time)] * repeated
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} must be a time, or a time and how often: 0.6, 0.6x3"
            ) from None
    return times


def _counts(text: str) -> list[int]:
    return [_whole(part) for part in text.split(",")]


def _whole(text: str) -> int:
    if not text.strip().isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or more")
    return int(text)


def _gigabytes(text: str) -> int:
    """In bytes."""
    try:
        bytes_ = float(text) * 1e9
    except ValueError:
        bytes_ = math.nan
    if not 0 <= bytes_ < 2.0**53:
        raise argparse.ArgumentTypeError(f"{text!r} must be 0 to 9007199 gigabytes")
    return round(bytes_)


def _spread(times: list[float], stages: int, argument: str) -> list[float] | float:
    """One time for all stages, or one for each."""
    if len(times) == 1:
        return times[0]
    if len(times) != stages:
        raise ScheduleError(
            code="length",
            argument=f"--{argument}",
            got=f"{len(times)} times",
            expected=f"1, or {stages}, one for every stage",
        )
    return times


if __name__ == "__main__":
    sys.exit(main())
