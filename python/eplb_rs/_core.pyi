"""The native module. Use the packages; this module is theirs."""

from collections.abc import Callable, Sequence
from typing import Any, Final, Self, TypeAlias, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "Forecaster",
    "Placement",
    "Planner",
    "Schedule",
    "Splitter",
    "StepPlanner",
    "Topology",
    "__version__",
    "bounds",
    "check_groups",
    "outlook_scenarios",
    "partition_layers",
    "plan_linked",
    "plan_scenarios",
    "predicted_s",
    "schedule_methods",
    "search_schedules",
    "tight_lower_bound",
    "total_variation",
    "transfers",
    "windows_since_shift",
]

__version__: Final[str]

@final
class Topology:
    """The machines: nodes, the GPUs in them, and the expert slots on each GPU.

    Each GPU is one rank of expert parallelism. Ranks are numbered node by node, slots rank by
    rank.

    Raises:
        InvalidInputError: ``not_positive``, ``not_integer`` or ``too_large`` for a count; for
            ``slots``, ``speeds`` and ``dead`` as :meth:`with_slots`, :meth:`with_speeds` and
            :meth:`with_dead`.
    """

    def __new__(
        cls,
        num_nodes: int,
        gpus_per_node: int,
        slots_per_gpu: int,
        *,
        slots: Sequence[int] | None = None,
        speeds: Sequence[float] | None = None,
        dead: Sequence[int] | None = None,
    ) -> Self: ...
    @staticmethod
    def from_totals(*, num_replicas: int, num_nodes: int, num_gpus: int) -> Topology:
        """The topology with these totals, as :func:`eplb_rs.rebalance_experts` takes them.

        Raises:
            InvalidInputError: As the constructor; ``not_multiple`` if ``num_gpus`` does not
                divide over the nodes or ``num_replicas`` over the GPUs.
        """
    def with_slots(self, slots: Sequence[int]) -> Topology:
        """The same machines with ``slots[gpu]`` expert slots on each GPU.

        Raises:
            InvalidInputError: ``wrong_shape`` unless there is one number for each GPU,
                ``not_integer``, ``not_positive`` or ``too_large`` for a number, ``wrong_type``
                for what is no list.
        """
    def with_speeds(self, speeds: Sequence[float]) -> Topology:
        """The same machines with GPUs of these speeds: how much load each serves in the same time,
        in any unit.

        Raises:
            InvalidInputError: ``wrong_shape`` unless there is one number for each GPU,
                ``out_of_range`` for one that is not above zero, or if one is more than 1,000
                times another; ``wrong_type`` for what is no list of numbers.
        """
    def with_dead(self, dead: Sequence[int]) -> Topology:
        """The same machines when these GPUs, and no others, are dead. Their slots keep their
        numbers and hold -1. If more have died, ``topology.with_dead([*topology.dead, 7])``.

        Raises:
            InvalidInputError: ``out_of_range`` for a GPU that does not exist, ``too_small`` if
                none is left; ``not_integer`` or ``negative`` for what is no number of a GPU,
                ``wrong_type`` for what is no list.
        """
    @property
    def slots(self) -> list[int]:
        """How many slots each GPU has, by GPU."""
    @property
    def speeds(self) -> list[float]:
        """How fast each GPU is, by GPU."""
    @property
    def dead(self) -> list[int]:
        """The GPUs that are dead."""
    @property
    def is_even(self) -> bool:
        """Whether all GPUs have the same number of slots and the same speed, and none is dead."""
    @property
    def num_nodes(self) -> int:
        """How many nodes there are."""
    @property
    def gpus_per_node(self) -> int:
        """How many GPUs each node has."""
    @property
    def slots_per_gpu(self) -> int:
        """How many expert slots each GPU has."""
    @property
    def num_gpus(self) -> int:
        """How many GPUs there are, over all nodes."""
    @property
    def num_slots(self) -> int:
        """How many slots there are, over all GPUs."""
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __getnewargs_ex__(self) -> tuple[tuple[int, int, int], dict[str, Any]]: ...

@final
class Placement:
    """Which expert each slot holds. Its arrays are views of its own memory and read-only."""

    def __new__(
        cls,
        topology: Topology,
        num_experts: int,
        phy2log: npt.NDArray[np.int64],
        log2phy: npt.NDArray[np.int64] | None = None,
        logcnt: npt.NDArray[np.int64] | None = None,
    ) -> Self: ...
    @property
    def topology(self) -> Topology: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def max_replicas(self) -> int: ...
    @property
    def phy2log(self) -> npt.NDArray[np.int64]: ...
    @property
    def log2phy(self) -> npt.NDArray[np.int64]: ...
    @property
    def logcnt(self) -> npt.NDArray[np.int64]: ...
    def rank_load(self, load: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]: ...
    def duplicates(self) -> npt.NDArray[np.int64]: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...

@final
class Planner:
    """Plans placements on one topology; see :class:`eplb_rs.Planner`."""

    def __new__(
        cls,
        topology: Topology,
        num_groups: int,
        policy: str,
        threads: int,
        release_gil: bool | None,
        group_rule: str = "strict",
        iterations: int | None = None,
        time_limit_us: float | None = None,
        crossing_cost: float = 1.0,
    ) -> Self: ...
    @property
    def topology(self) -> Topology: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def policy(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def release_gil(self) -> bool | None: ...
    @property
    def group_rule(self) -> str: ...
    @property
    def crossing_cost(self) -> float: ...
    @property
    def iterations(self) -> int | None: ...
    @property
    def time_limit_us(self) -> float | None: ...
    @property
    def keeps_groups(self) -> bool: ...
    @property
    def last_timing(self) -> tuple[float, float]: ...
    def plan(self, load: npt.NDArray[np.float32]) -> Placement: ...
    def plan_from(
        self, load: npt.NDArray[np.float32], previous: Placement, reach: _Reach
    ) -> Placement: ...
    def plan_within(
        self,
        load: npt.NDArray[np.float32],
        previous: Placement,
        reach: _Reach,
        limits: _Limits,
    ) -> Placement: ...
    def frontier(
        self, load: npt.NDArray[np.float32], previous: Placement, repeats: bool
    ) -> list[tuple[int, float]]: ...
    def plan_arrays(
        self, load: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
    def plan_into(
        self,
        load: npt.NDArray[np.float32],
        phy2log: npt.NDArray[np.int64],
        log2phy: npt.NDArray[np.int64] | None,
        logcnt: npt.NDArray[np.int64],
    ) -> None: ...

@final
class Splitter:
    """Splits tokens over replicas; see :class:`eplb_rs.shares.Splitter`."""

    def __new__(cls, placement: Placement) -> Self: ...
    @property
    def placement(self) -> Placement: ...
    def split(
        self, load: npt.NDArray[np.float32]
    ) -> tuple[
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
        npt.NDArray[np.bool_],
    ]: ...
    def split_into(
        self,
        load: npt.NDArray[np.float32],
        shares: npt.NDArray[np.float64],
        level: npt.NDArray[np.float64],
    ) -> None: ...
    def split_step(
        self, load: npt.NDArray[np.float32], layer: int, shares: npt.NDArray[np.float64]
    ) -> float: ...
    def split_tokens(
        self, tokens: npt.NDArray[np.int64], layer: int, quotas: npt.NDArray[np.int64]
    ) -> int: ...
    def uniform(self) -> npt.NDArray[np.float64]: ...
    def rank_load(
        self, load: npt.NDArray[np.float32], shares: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]: ...
    def entries(self, shares: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.int64]: ...
    def quotas(
        self, shares: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]: ...

@final
class StepPlanner:
    """Plans one layer in real time; see :class:`eplb_rs.realtime.StepPlanner`."""

    def __new__(
        cls,
        num_ranks: int,
        home_slots: int,
        spare_slots: int,
        target_imbalance: float,
        limits: tuple[int | None, int | None, int | None],
        min_tokens: int,
    ) -> Self: ...
    def plan_into(
        self,
        load: npt.NDArray[np.int32] | npt.NDArray[np.int64],
        experts: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        by_source: npt.NDArray[np.int32] | npt.NDArray[np.int64] | None = None,
    ) -> tuple[int, int, int]: ...

@final
class Forecaster:
    """Estimates the next window's load; see :class:`eplb_rs.forecast.Forecaster`."""

    def __new__(
        cls,
        num_layers: int,
        num_experts: int,
        estimator: str,
        windows: int,
        shift_threshold: float | None,
    ) -> Self: ...
    def observe(self, window: npt.NDArray[np.float32]) -> bool: ...
    def estimate_into(self, out: npt.NDArray[np.float32]) -> None: ...
    def uncertainty_into(self, out: npt.NDArray[np.float32]) -> None: ...
    @property
    def num_windows(self) -> int: ...
    @property
    def windows_since_shift(self) -> int: ...
    @property
    def distance(self) -> npt.NDArray[np.float64]: ...
    @property
    def chosen(self) -> list[tuple[str, int]]: ...

def total_variation(
    load: npt.NDArray[np.float32], other: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]: ...
def bounds(
    load: npt.NDArray[np.float32], topology: Topology, num_groups: int
) -> npt.NDArray[np.float64]: ...
def tight_lower_bound(
    load: npt.NDArray[np.float32], topology: Topology, num_groups: int, upper: Sequence[float]
) -> npt.NDArray[np.float64]: ...
def transfers(
    previous: Placement, following: Placement, by_layer: bool
) -> npt.NDArray[np.int64]: ...
def predicted_s(
    table: npt.NDArray[np.int64],
    topology: Topology,
    by_layer: bool,
    expert_bytes: npt.NDArray[np.float64],
    links: _Links,
) -> float: ...
def plan_scenarios(
    planner: Planner,
    scenarios: npt.NDArray[np.float32],
    weights: Sequence[float] | None,
    split: str,
    previous: Placement | None,
    max_moves: int | None,
    max_moves_per_layer: int | None,
) -> Placement: ...
def plan_linked(
    planner: Planner, load: npt.NDArray[np.float32], slack: float, spread: float
) -> Placement: ...
def outlook_scenarios(
    windows: npt.NDArray[np.float32],
    shift_threshold: float | None,
    most_windows: int,
    copies: int,
    spread: float,
) -> npt.NDArray[np.float32]: ...
def windows_since_shift(windows: npt.NDArray[np.float32], shift_threshold: float | None) -> int: ...
def check_groups(num_groups: int, num_experts: int) -> None: ...
def schedule_methods() -> list[str]: ...

# Moves, the cost of one, the balance that is enough, whether slots may repeat an expert.
_Reach: TypeAlias = tuple[int | None, float, float | None, bool]
# Within a node and between nodes, in GB/s; the latency in us.
_Links: TypeAlias = tuple[float, float, float]
# Bytes of an expert of each layer, bytes a rank, seconds, links, rounds by layer.
_Limits: TypeAlias = tuple[Sequence[float], float | None, float | None, _Links, bool]

_Peaks: TypeAlias = tuple[
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.uint64],
]
_Times: TypeAlias = npt.NDArray[np.float64]
_Bytes: TypeAlias = npt.NDArray[np.uint64]

@final
class Schedule:
    """The instruction stream of every rank. :class:`dualpipe.Schedule` is its face."""

    @staticmethod
    def generate(
        method: str,
        num_ranks: int,
        num_micro_batches: int,
        stages_per_rank: int | None,
        forward_only: bool,
        transfers: bool,
    ) -> Schedule: ...
    @staticmethod
    def parse(text: str) -> Schedule: ...
    @staticmethod
    def from_csv(text: str, name: str) -> Schedule: ...
    def text(self) -> str: ...
    def to_csv(self, comms: bool, older: bool, waits: bool) -> str: ...
    def compute_only(self) -> Schedule: ...
    def forward_only(self) -> Schedule: ...
    def place_transfers(self) -> Schedule: ...
    def verify(
        self,
        transports: list[str],
        activation_bytes: _Bytes | None,
        message_bytes: _Bytes | None,
        max_activations: int | None,
        max_bytes: int | None,
    ) -> tuple[_Peaks, list[str], int]: ...
    def simulate(
        self,
        times: tuple[_Times, _Times, _Times, _Times],
        rank_factor: _Times,
        overlap_factor: float,
        pair: _Times | None,
        latency: _Times,
        bandwidth: _Times,
        message_bytes: _Times,
        blocking: bool,
        early_forward: bool,
        sizes_bytes: tuple[_Bytes, _Bytes] | None,
    ) -> tuple[
        float,
        _Times,
        float,
        _Peaks,
        tuple[npt.NDArray[np.int64], _Times, _Times],
        npt.NDArray[np.int64],
    ]: ...
    @property
    def name(self) -> str: ...
    @property
    def num_ranks(self) -> int: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def num_copies(self) -> int: ...
    @property
    def micro_batches(self) -> list[int]: ...
    @property
    def placement(self) -> list[int]: ...
    @property
    def has_transfers(self) -> bool: ...
    @property
    def has_backward(self) -> bool: ...
    def arrays(
        self,
    ) -> tuple[
        npt.NDArray[np.uint8],
        npt.NDArray[np.uint8],
        npt.NDArray[np.uint16],
        npt.NDArray[np.uint32],
    ]: ...
    @property
    def starts(self) -> npt.NDArray[np.int64]: ...
    def __len__(self) -> int: ...
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...

_Layers: TypeAlias = tuple[tuple[_Times, _Times, _Times], tuple[_Bytes, _Bytes, _Bytes]]
_Machine: TypeAlias = tuple[
    tuple[_Times, _Times, _Times], tuple[float, bool, bool], tuple[int | None, int]
]
_Cut: TypeAlias = tuple[list[int], float, float, bool, _Bytes, float, int, float]

def partition_layers(
    layers: _Layers,
    method: str,
    num_ranks: int,
    num_micro_batches: int,
    stages_per_rank: int | None,
    machine: _Machine,
) -> _Cut: ...
def search_schedules(
    num_ranks: int,
    methods: list[str],
    loads: tuple[list[tuple[int, _Layers]], bool],
    stages_per_rank: list[int],
    machine: _Machine,
    progress: Callable[[int, int], object] | None,
) -> list[tuple[str, int, int | None, _Cut | None, float, float | None, str]]: ...
