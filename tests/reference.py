"""DeepSeek's EPLB in plain NumPy: what the native planner is held to and compared with.

All layers and nodes are computed side by side, a row each; there is no further cleverness. Sums
are float32, one term after another in the stated order, and sorts are stable, so the answer is
the same as the native planner's to the last slot.

Letters: L layers, E logical experts, R slots, G expert groups, N nodes, D ranks (GPUs), X the
most replicas of an expert; B rows, I items, P packs, S slots of one row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["rebalance_experts"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def rebalance_experts(
    weight: npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Ints, Ints, Ints]:
    """The same as :func:`eplb_rs.rebalance_experts`, for arguments that are valid.

    Args:
        weight: `[L, E]`, the load of each expert; read as float32.
        num_replicas: R.
        num_groups: G.
        num_nodes: N.
        num_gpus: D.

    Returns:
        ``phy2log`` `[L, R]`, ``log2phy`` `[L, E, X]` and ``logcnt`` `[L, E]`, int64.
    """
    load_LE = np.asarray(weight, dtype=np.float32)
    num_layers, num_experts = load_LE.shape
    if num_groups % num_nodes != 0:  # no way to keep groups on nodes: one group on one node
        num_groups = num_nodes = 1

    # A row for each node of each layer, with the experts whose groups are on it.
    experts = _experts_of_nodes(load_LE, num_groups, num_nodes)
    experts = experts.reshape(num_layers * num_nodes, num_experts // num_nodes)
    layer = np.repeat(np.arange(num_layers), num_nodes)[:, None]
    load = load_LE[layer, experts]

    # The node's replicas, as places in its list of experts, and the rank and slot of each.
    place, number, share = _replicate(load, num_replicas // num_nodes)
    rank, slot_of_rank = _pack(share, num_gpus // num_nodes)
    node = np.tile(np.arange(num_nodes), num_layers)[:, None]
    rank += node * (num_gpus // num_nodes)
    slot = rank * (num_replicas // num_gpus) + slot_of_rank

    expert = np.take_along_axis(experts, place, axis=1)
    phy2log = np.empty((num_layers, num_replicas), dtype=np.int64)
    phy2log[layer, slot] = expert
    log2phy = np.full((num_layers, num_experts, int(number.max()) + 1), -1, dtype=np.int64)
    log2phy[layer, expert, number] = slot
    return phy2log, log2phy, (log2phy >= 0).sum(axis=2)


def _experts_of_nodes(load_LE: Floats, num_groups: int, num_nodes: int) -> Ints:
    """The experts of each node, `[L, N, E / N]`: group by group, in the order of packing."""
    num_layers, num_experts = load_LE.shape
    by_group = load_LE.reshape(num_layers, num_groups, num_experts // num_groups)
    group_load = np.zeros((num_layers, num_groups), dtype=np.float32)
    for expert in range(by_group.shape[2]):  # one after another: np.sum would add in pairs
        group_load += by_group[:, :, expert]

    node, place = _pack(group_load, num_nodes)
    groups = np.empty((num_layers, num_nodes, num_groups // num_nodes), dtype=np.int64)
    groups[np.arange(num_layers)[:, None], node, place] = np.arange(num_groups)
    return np.arange(num_experts).reshape(num_groups, -1)[groups]


def _replicate(load_BE: Floats, num_slots: int) -> tuple[Ints, Ints, Floats]:
    """Gives each spare slot to the expert with the largest load per replica, ties to the first.

    Returns:
        Of each replica, in the order in which they were made, `[B, S]`: its expert, its number
        among that expert's replicas, and its share of that expert's load.
    """
    num_rows, num_experts = load_BE.shape
    rows = np.arange(num_rows)
    expert = np.empty((num_rows, num_slots), dtype=np.int64)
    number = np.zeros((num_rows, num_slots), dtype=np.int64)
    expert[:, :num_experts] = np.arange(num_experts)
    count = np.ones((num_rows, num_experts), dtype=np.int64)
    share = load_BE.copy()
    for replica in range(num_experts, num_slots):
        hottest = share.argmax(axis=1)
        expert[:, replica] = hottest
        number[:, replica] = count[rows, hottest]
        count[rows, hottest] += 1
        share[rows, hottest] = load_BE[rows, hottest] / count[rows, hottest].astype(np.float32)
    return expert, number, np.take_along_axis(share, expert, axis=1)


def _pack(load_BI: Floats, num_packs: int) -> tuple[Ints, Ints]:
    """Packs items into packs of equal size: heaviest first, each to the lightest pack with room.

    Returns:
        The pack of each item and its place in that pack, both `[B, I]`.
    """
    num_rows, num_items = load_BI.shape
    capacity = num_items // num_packs
    place = np.zeros((num_rows, num_items), dtype=np.int64)
    if capacity == 1:
        return np.tile(np.arange(num_items), (num_rows, 1)), place
    pack = np.empty((num_rows, num_items), dtype=np.int64)
    rows = np.arange(num_rows)
    pack_load = np.zeros((num_rows, num_packs), dtype=np.float32)
    pack_size = np.zeros((num_rows, num_packs), dtype=np.int64)
    for item in np.argsort(-load_BI, axis=1, kind="stable").T:  # the next item of every row
        lightest = np.where(pack_size < capacity, pack_load, np.inf).argmin(axis=1)
        pack[rows, item] = lightest
        place[rows, item] = pack_size[rows, lightest]
        pack_load[rows, lightest] += load_BI[rows, item]
        pack_size[rows, lightest] += 1
    return pack, place
