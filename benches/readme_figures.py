"""Writes the figures in README.md from the files in benches/results.

    python benches/readme_figures.py [--check]

Rewrites the block between the marks; with `--check` it only says whether the block is what it would
write. Nothing in the block is typed by hand: whoever runs a benchmark anew runs this too.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benches" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- begin: figures (written by benches/readme_figures.py) -->\n"
END = "<!-- end: figures -->"

PLANS = (("DeepSeek-R1 1k1k", 288, 32), ("DeepSeek-R1 1k1k", 320, 64), ("log-normal s=1", 288, 32))
LONG = "sequence 2048, 8 micro-batches"
SHORT = "sequence 256, 32 micro-batches"
PEERS = ("DeepSeek", "torch")
CONTENDERS = {
    "DualPipe": ("DualPipe", "DeepSeek DualPipe", None),
    "DualPipeV": ("DualPipeV", "DeepSeek DualPipeV", "torch DualPipeV"),
    "ZBV": ("ZBV", None, "torch ZBVZeroBubble"),
    "1F1B": ("1F1B", None, "torch 1F1B"),
}


def figures() -> str:
    """The block in README.md, between its marks."""
    return f"{placing()}\n{moving()}\n{stepping()}\n{serving()}\n{pipelines()}"


def placing() -> str:
    """Plans from scratch, beside the reference algorithm."""
    results = read("balance")
    rows = []
    for load, slots, ranks in PLANS:
        case = {"load": load, "slots": slots, "ranks": ranks}
        (theirs,) = find(results["even"], policy="deepseek", **case)
        quick, best = find(results["even"], policy="balanced", **case)
        ours = best if best["median_us"] < 3000 else quick
        rows.append(
            [
                load,
                f"{slots} on {ranks}",
                f"{theirs['balance']:.4f}",
                f"{ours['balance']:.4f}",
                f"{ours['balance'] / (1 - ours['gap']):.4f}",
                theirs["duplicates"],
                ours["duplicates"],
                milliseconds(theirs["median_us"]),
                milliseconds(ours["median_us"]),
            ]
        )
    drop_in = read("planner")["cases"][0]
    return paragraphs(
        "**Plans for 58 layers of 256 experts**, beside DeepSeek's algorithm (which is in the package "
        "too, and timed as such). Balance is mean over largest load of a GPU.",
        table(
            "load | slots on GPUs | balance: DeepSeek | eplb-rs | at most | "
            "expert twice on a GPU: DeepSeek | eplb-rs | ms: DeepSeek | eplb-rs",
            rows,
        ),
        f"As a drop-in, `rebalance_experts` takes {milliseconds(drop_in['median_us'])} ms (p99 "
        f"{milliseconds(drop_in['p99_us'])}) for DeepSeek-R1 on 32 GPUs of 4 nodes, "
        f"{drop_in['numpy_reference_us'] / drop_in['median_us']:.0f} times less than the algorithm in "
        "NumPy.",
        measured(results, "one core, medians"),
    )


def moving() -> str:
    """Plans from the placement in force."""
    results = read("balance")["moves"]
    rows = [
        [f"{case['moves']:,}", f"{case['balance']:.4f}", milliseconds(case["median_us"])]
        for case in results
        if "moves" in case
    ]
    return paragraphs(
        "**Few weights moved.** The load of each expert changes by 10 %; a new plan may make so many "
        "moves, on 16,704 slots:",
        table("moves | balance | ms", rows),
    )


def stepping() -> str:
    """One layer of one micro-batch."""
    results = read("realtime")
    rust, python = results["all"]["rust"], results["all"]["python"]
    rows = [
        [
            kind["kind"].removesuffix(" DeepSeek-R1"),
            f"{kind['ultraep_imbalance']:.3f}",
            f"{kind['imbalance']:.3f}",
            f"{kind['python']['median_us']:.0f}",
        ]
        for kind in results["kinds"]
        if "DeepSeek-R1" in kind["kind"]
    ]
    return paragraphs(
        f"**One layer, in real time**, from the load of the micro-batch itself (DeepSeek-R1): median "
        f"{rust['median_us']:.0f} us in Rust and {python['median_us']:.0f} through Python (p99 "
        f"{rust['p99_us']:.0f} and {python['p99_us']:.0f}). Imbalance is largest over mean; UltraEP is "
        "the recorded answer of its GPU kernel.",
        table("GPUs x (home + spare slots) | UltraEP | eplb-rs | us", rows),
        measured(results, "one core"),
    )


def pipelines() -> str:
    """Training steps on two GPUs, and of newer code on the halves of one."""
    results, halves = read("executor"), read("executor_half_gpus")
    gpus, halved = results["machine"]["gpus"], halves["machine"]["gpus"][0]
    commits = sorted({halves["commit"], *halves["of earlier commits"].values()})
    return paragraphs(
        "**Pipelines.** A training step of a transformer in bf16 over the time of one rank's share "
        "without a pipeline: 8 long micro-batches, and 32 short ones (there the ideal launches no "
        "kernels, it replays a CUDA graph); and the peak memory of the first.",
        training(results, PEERS),
        f"Measured on {len(gpus)} {gpus[0]}, torch {results['machine']['torch']}, medians; "
        f"commit {results['commit'][:10]}.",
        f"Newer code on the two halves of one {halved}, which both ran the ideal too. It is under 1 "
        "where matrix products add weight gradients themselves, which the ideal leaves to autograd:",
        training(halves, PEERS[:1]),
        f"torch {halves['machine']['torch']}, medians; commits "
        f"{' and '.join(commit[:10] for commit in commits)}.",
    )


def training(results: dict[str, Any], peers: Sequence[str]) -> str:
    """A row for each schedule: steps long and short, and memory, of ours and of the peers."""
    kinds = {
        "8 long": lambda found: ratio(found, LONG, "step / ideal"),
        "32 short": lambda found: ratio(found, SHORT, "step / launch-free ideal"),
        "GiB": peak,
    }
    names = ("eplb-rs", *peers)
    columns = [f"{kind}: {name}" if name == names[0] else name for kind in kinds for name in names]
    rows = []
    for schedule, contenders in CONTENDERS.items():
        found = [results["results"].get(contender) for contender in contenders[: len(names)]]
        rows.append([schedule, *(cell(each) for cell in kinds.values() for each in found)])
    return table(" | ".join(["schedule", *columns]), rows)


def serving() -> str:
    """A rank's share of an expert-parallel layer on one GPU, before and after balancing."""
    results = read("moe_layer_one_gpu")
    steps = results["results"]["step"]["triton"]
    before, after = (
        [f"{steps[f'{layer} {when}']['step / ideal'][1]:.3f}" for layer in ("worst", "median")]
        for when in ("before", "after")
    )
    return paragraphs(
        "**Experts in a layer.** The slower of two ranks' shares of a DeepSeek-V3 layer, forward "
        "and backward, over that of a router which chooses at random, for DeepSeek-R1's least even "
        f"and median layer: {before[0]} and {before[1]} before balancing, {after[0]} and "
        f"{after[1]} after.",
        f"Each share in turn on one {results['gpus']['gpus'][0]}, copies in memory for the exchange, "
        f"torch {results['gpus']['torch']}, medians; commit {results['commit'][:10]}.",
    )


def ratio(results: dict[str, Any] | None, case: str, name: str) -> str:
    return f"{results[case][name][1]:.3f}" if results else ""


def peak(results: dict[str, Any] | None) -> str:
    return f"{max(rank['allocated'] for rank in results[LONG]['peak_gib']):.1f}" if results else ""


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def find(cases: list[dict[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    return [case for case in cases if wanted.items() <= case.items()]


def milliseconds(microseconds: float) -> str:
    """Three significant digits."""
    value = microseconds / 1000
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measured(results: dict[str, Any], how: str) -> str:
    machine = ", ".join(str(value) for value in results["machine"].values())
    return f"Measured on {machine}; {how}; commit {results['commit'][:10]}."


def table(head: str, rows: Iterable[list[Any]]) -> str:
    titles = head.split(" | ")
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def paragraphs(*texts: str) -> str:
    return "\n\n".join(texts) + "\n"


def main() -> int:
    text = README.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        sys.exit(f"{README} lacks the marks of the figures: {BEGIN.strip()} and {END}")
    written = before + BEGIN + figures() + END + after
    if sys.argv[1:] == ["--check"]:
        if written != text:
            sys.exit("README.md differs from benches/results: run python benches/readme_figures.py")
        return 0
    README.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
