"""A slow judge of schedules, to hold the verifier to.

It reads a schedule's text on its own and replays it in the plainest way: sets and dictionaries of
tuples, every transport replayed until nothing moves any more. It shares no code with the
library, knows no fast path, and answers only: sound, or the name of the rule that is broken.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

WORD = re.compile(
    r"(?P<open>\()?(?P<recv><)?(?P<stage>\d+)(?P<copy>'*)(?P<letter>[FBIWfbRUu])"
    r"(?P<mb>\d+)?(?P<tail>[>!)])?"
)


@dataclass(frozen=True)
class Step:
    """One word of the text: its letter, with marks for what surrounds it."""

    letter: str
    mark: str
    stage: int
    copy: int
    mb: int | None

    @property
    def place(self) -> tuple[int, int, int | None]:
        return self.copy, self.stage, self.mb


@dataclass
class Text:
    """A schedule's text, taken apart."""

    stages: int
    counts: list[int]
    ranks_of: list[list[int]]
    streams: list[list[Step]] = field(default_factory=list)


def read_word(word: str) -> Step:
    match = WORD.fullmatch(word)
    assert match, word
    mark = (match["open"] or "") + (match["recv"] or "") + (match["tail"] or "")
    mb = None if match["mb"] is None else int(match["mb"])
    return Step(match["letter"], mark, int(match["stage"]), len(match["copy"]), mb)


def read(text: str) -> Text:
    lines = text.splitlines()
    stages = int(lines[1].split("stages ")[1])
    copies = [line for line in lines if line.startswith("copy ")]
    counts = [int(line.split(": ")[1].split()[0]) for line in copies]
    ranks_of = [[int(rank) for rank in line.split("ranks ")[1].split()] for line in copies]
    parsed = Text(stages, counts, ranks_of)
    for line in lines:
        if line.startswith("rank "):
            words = line.partition(":")[2].split()
            parsed.streams.append([read_word(word) for word in words])
    return parsed


def judge(text: str) -> str | None:
    """The name of a broken rule; None for a sound schedule."""
    t = read(text)
    return (
        judge_pairs(t)
        or judge_places(t)
        or judge_counts(t)
        or judge_order(t)
        or judge_messages(t)
        or judge_reductions(t)
        or next(
            (bad for model in ("eager", "rendezvous", "queue") if (bad := replay(t, model))), None
        )
    )


def judge_pairs(t: Text) -> str | None:
    for stream in t.streams:
        for at, step in enumerate(stream):
            if step.mark == "(":
                partner = stream[at + 1] if at + 1 < len(stream) else None
                if partner is None or partner.mark != ")" or partner.place == step.place:
                    return "pair"
            if step.mark == ")" and (at == 0 or stream[at - 1].mark != "("):
                return "pair"
    return None


def judge_places(t: Text) -> str | None:
    for rank, stream in enumerate(t.streams):
        for step in stream:
            if step.copy >= len(t.counts) or step.stage >= t.stages:
                return "place"
            if t.ranks_of[step.copy][step.stage] != rank:
                return "place"
            if step.mb is not None and step.mb >= t.counts[step.copy]:
                return "place"
    return None


def slots(t: Text) -> list[tuple[int, int, int]]:
    return [
        (copy, stage, mb)
        for copy, count in enumerate(t.counts)
        for stage in range(t.stages)
        for mb in range(count)
    ]


def crosses(t: Text, copy: int, stage: int) -> bool:
    """Whether stages `stage` and `stage + 1` live on different ranks."""
    inside = 0 <= stage < t.stages - 1
    return inside and t.ranks_of[copy][stage] != t.ranks_of[copy][stage + 1]


def trains(t: Text) -> bool:
    return any(step.letter in "BIW" for stream in t.streams for step in stream)


def judge_counts(t: Text) -> str | None:
    seen = Counter(
        (step.letter, step.mark.strip("()"), step.place) for s in t.streams for step in s
    )
    waits = any(mark == "!" and letter in "fb" for letter, mark, _ in seen)
    for copy, stage, mb in slots(t):
        here = (copy, stage, mb)
        backwards = tuple(seen["BIW"[i], "", here] for i in range(3))
        wanted = {(1, 0, 0), (0, 1, 1)} if trains(t) else {(0, 0, 0)}
        if seen["F", "", here] != 1 or backwards not in wanted:
            return "count"
        out, into = crosses(t, copy, stage), crosses(t, copy, stage - 1)
        gradients = int(trains(t))
        expected = {
            ("f", ">"): int(out),
            ("f", "<"): int(into),
            ("b", ">"): gradients * int(into),
            ("b", "<"): gradients * int(out),
            ("f", "!"): int(out and waits),
            ("b", "!"): gradients * int(into and waits),
        }
        if any(seen[letter, mark, here] != n for (letter, mark), n in expected.items()):
            return "count"
    return None


def judge_order(t: Text) -> str | None:
    """What a rank's own stream must respect, without looking at any other rank."""
    for stream in t.streams:
        at = {(step.letter, step.mark.strip("()"), step.place): i for i, step in enumerate(stream)}

        def before(first: tuple, then: tuple, at: dict = at) -> bool:
            return first not in at or then not in at or at[first] < at[then]

        for letter, mark, place in list(at):
            copy, stage, mb = place
            here = (letter, mark, place)
            if letter in "BI" and not before(("F", "", place), here):
                return "order"
            if letter == "W" and not before(("I", "", place), here):
                return "order"
            if letter == "F":
                local = stage > 0 and not crosses(t, copy, stage - 1)
                source = ("F", "", (copy, stage - 1, mb)) if local else ("f", "<", place)
                if not before(source, here):
                    return "order"
            if letter in "BI":
                local = stage < t.stages - 1 and not crosses(t, copy, stage)
                sources = (
                    [(x, "", (copy, stage + 1, mb)) for x in "BI"] if local else [("b", "<", place)]
                )
                if not all(before(source, here) for source in sources):
                    return "order"
            if mark == ">":
                makers = ["F"] if letter == "f" else ["B", "I"]
                if not all(before((maker, "", place), here) for maker in makers):
                    return "order"
            if mark == "!" and letter in "fb" and not before((letter, ">", place), here):
                return "order"
    return None


def message(step: Step) -> tuple[str, int, int, int | None]:
    """What a send or receive moves, named by the stage that made it."""
    if step.mark != "<":
        return step.letter, step.copy, step.stage, step.mb
    return step.letter, step.copy, step.stage + (-1 if step.letter == "f" else 1), step.mb


def ends(t: Text, m: tuple[str, int, int, int | None]) -> tuple[int, int]:
    letter, copy, stage, _ = m
    return t.ranks_of[copy][stage], t.ranks_of[copy][stage + (1 if letter == "f" else -1)]


def is_transfer(step: Step) -> bool:
    return step.letter in "fb" and step.mark in {"<", ">"}


def judge_messages(t: Text) -> str | None:
    sent, received = defaultdict(list), defaultdict(list)
    for stream in t.streams:
        for step in stream:
            if is_transfer(step):
                m = message(step)
                (sent if step.mark == ">" else received)[ends(t, m)].append(m)
    return "message order" if sent != received else None


def judge_reductions(t: Text) -> str | None:
    if len(t.counts) == 1 or not trains(t):
        return None
    for copy in range(len(t.counts)):
        for stage in range(t.stages):
            stream = t.streams[t.ranks_of[copy][stage]]
            mine = [(i, s) for i, s in enumerate(stream) if (s.copy, s.stage) == (copy, stage)]
            starts = [i for i, s in mine if s.letter == "R" and s.mark == ""]
            waits = [i for i, s in mine if s.letter == "R" and s.mark == "!"]
            last = max((i for i, s in mine if s.letter in "BW"), default=-1)
            if len(starts) != 1 or len(waits) != 1 or not last < starts[0] < waits[0]:
                return "reduction"
    for a in range(len(t.streams)):
        for b in range(a):
            shared = {
                stage
                for stage in range(t.stages)
                if {a, b} <= {ranks[stage] for ranks in t.ranks_of}
            }
            orders = [
                [
                    s.stage
                    for s in t.streams[r]
                    if (s.letter, s.mark) == ("R", "") and s.stage in shared
                ]
                for r in (a, b)
            ]
            if orders[0] != orders[1]:
                return "reduction"
    return None


def replay(t: Text, model: str) -> str | None:
    """Runs all ranks until nothing moves; the model's name if that is before the end."""
    position = [0] * len(t.streams)
    posted: set[tuple] = set()  # sends and receives begun, as (mark, message)
    arrived: set[tuple] = set()
    reducing: Counter[int] = Counter()
    queues: dict[tuple[int, int], dict[int, list]] = defaultdict(lambda: defaultdict(list))

    def settle() -> None:
        """Lets messages arrive that the model lets arrive."""
        if model != "queue":
            for mark, m in list(posted):
                if mark == ">" and (model == "eager" or ("<", m) in posted):
                    arrived.add(m)
            return
        for pair, sides in queues.items():
            a, b = pair
            while sides[a] and sides[b] and sides[a][0] == sides[b][0]:
                arrived.add(sides[a].pop(0))
                sides[b].pop(0)

    def can_run(step: Step) -> bool:
        copy, stage, mb = step.place
        if step.letter == "F" and crosses(t, copy, stage - 1):
            return ("f", copy, stage - 1, mb) in arrived
        if step.letter in "BI" and crosses(t, copy, stage):
            return ("b", copy, stage + 1, mb) in arrived
        if step.letter in "fb" and step.mark == ">" and model == "rendezvous":
            return ("<", message(step)) in posted
        if step.letter in "fb" and step.mark == "!" and model != "eager":
            return message(step) in arrived
        if step.letter == "R" and step.mark == "!":
            return reducing[stage] == len(t.counts)
        return True

    moved = True
    while moved:
        moved = False
        for rank, stream in enumerate(t.streams):
            while position[rank] < len(stream):
                step = stream[position[rank]]
                both = [step]
                if step.mark == "(":
                    both.append(stream[position[rank] + 1])
                settle()
                if not all(can_run(half) for half in both):
                    break
                if is_transfer(step):
                    m = message(step)
                    posted.add((step.mark, m))
                    queues[tuple(sorted(ends(t, m)))][rank].append(m)
                if (step.letter, step.mark) == ("R", ""):
                    reducing[step.stage] += 1
                position[rank] += len(both)
                moved = True
    stuck = any(at < len(stream) for at, stream in zip(position, t.streams, strict=True))
    settle()
    left = model == "queue" and any(side for sides in queues.values() for side in sides.values())
    return model if stuck or left else None
