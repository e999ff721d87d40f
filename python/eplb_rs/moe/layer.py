"""A mixture-of-experts layer whose experts live where a plan says.

Letters: T tokens of this rank, K experts of a token, E logical experts, N rows at this rank's
experts, S slots of this rank, H hidden size, I intermediate size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from eplb_rs._inputs import as_count
from eplb_rs.errors import InvalidInputError
from eplb_rs.moe import rows as plain
from eplb_rs.moe.exchange import CapacityExchange, Exchange, Flight, UnevenExchange
from eplb_rs.moe.experts import ExpertsBackward, experts_backward, experts_forward
from eplb_rs.moe.fit import can_fuse, check_fused, check_plan, check_routed, check_weights
from eplb_rs.moe.routing import RoutingTable, routing_rows
from eplb_rs.moe.rows import Activation
from eplb_rs.moe.sites import Sites

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import distributed

    from eplb_rs.moe.routing import RoutingRule
    from eplb_rs.moe.rows import RowFunctions
    from eplb_rs.plan import Plan

__all__ = ["ExpertParallelMoE", "Pass", "Recorded", "TopK", "TopKRouter"]


class Recorded(NamedTuple):
    """The load of some passes, as one rank has routed it."""

    expert_E: Tensor
    """`[E]` int64 on the device, its tokens for each logical expert."""
    slot_R: Tensor | None
    """`[R]` int64 on the device, its tokens for each slot of all ranks, where they are counted."""


class TopK(NamedTuple):
    """What a router chose."""

    gate_TK: Tensor
    """`[T, K]`, by how much each expert's output counts."""
    expert_TK: Tensor
    """`[T, K]` int64, logical experts; -1 for none."""


class TopKRouter(nn.Module):
    """Softmax over all experts, the K best, their gates scaled to add up to 1.

    Any module that takes `[T, H]` and returns a :class:`TopK` can stand in its place.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        device: Where its weight lives.
        dtype: Of its weight.

    Raises:
        InvalidInputError: ``not_integer``, ``not_positive`` or ``out_of_range`` for K.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        top_k = as_count(top_k, "top_k")
        if top_k > num_experts:
            raise InvalidInputError(
                code="out_of_range",
                argument="top_k",
                got=str(top_k),
                expected=f"1 to {num_experts}, the number of experts",
            )
        self.top_k = top_k
        self.score = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)

    def forward(self, x_TH: Tensor) -> TopK:
        """Chooses each token's experts."""
        best = self.score(x_TH).float().softmax(dim=-1).topk(self.top_k, dim=-1)
        gates = best.values / best.values.sum(dim=-1, keepdim=True)
        return TopK(gates.to(x_TH.dtype), best.indices)


class ExpertParallelMoE(nn.Module):
    """Experts spread over ranks as a plan says, replicas included.

    A forward is a collective call of all ranks of the group; so is its backward.

    Args:
        router: Chooses experts: a :class:`TopKRouter`, or what returns the like.
        weights: This rank's experts of this layer, from
            :class:`~eplb_rs.moe.weights.ExpertWeights`: ``gate_up.weight`` `[S, 2I, H]` and
            ``down.weight`` `[S, H, I]`, of one floating dtype. They become parameters and share
            memory.
        plan: Where experts live.
        layer: Which layer of the plan this is, counted from 0.
        group: The ranks, or those of the plan that are not dead; by default all of
            torch.distributed's.
        routing: How tokens are split over replicas; see
            :func:`~eplb_rs.moe.routing.routing_rows`.
        activation: Of the gate.
        shared: Experts that every token passes, a module from H to H, added.
        capacity: ``None`` exchanges as many rows as there are, and waits for the device once, to
            learn how many. A number makes room for so many rows from each rank to each other and
            waits for nothing: for CUDA graphs.
        fused: Gathers, activates and adds in one triton kernel each, on CUDA GPUs; on Hopper and
            for widths that are multiples of 128, multiplies so too, with each expert's rows filled
            up to a multiple of 64. ``None`` where that can be; ``False`` does the same in plain
            torch.
        row_multiple: Fills each expert's rows up with zeros to a multiple of this at least: a
            product of few rows may differ in its last bits from the same rows in a larger one.
        max_replicas: The most replicas of an expert that later plans may have; by default as many
            as slots allow. 16 places of a routing row are kept at least.

    Raises:
        InvalidInputError: ``wrong_type`` for what is no layer's weights or no plan;
            ``wrong_shape`` for weights or a group that do not fit the plan;
            ``unknown`` for further tensors, scales say, or an activation; ``wrong_dtype`` or
            ``inconsistent`` for weights, or kernels that are not for them; ``out_of_range`` for a
            layer; ``not_positive`` or ``not_integer`` for a count; as
            :func:`~eplb_rs.moe.routing.routing_rows` for the routing.

    Attributes:
        load_E: `[E]` int64 on the device, tokens that this rank has routed to each logical expert
            since it was last set to zero.
        slot_load_R: `[R]` int64, the same for each slot, as :class:`~eplb_rs.moe.Sites` counts them.
    """

    load_E: Tensor
    slot_load_R: Tensor
    overflow: Tensor

    def __init__(
        self,
        router: nn.Module,
        weights: Mapping[str, Tensor],
        plan: Plan,
        *,
        layer: int = 0,
        group: distributed.ProcessGroup | None = None,
        routing: RoutingRule = "uniform",
        activation: Activation = "silu",
        shared: nn.Module | None = None,
        capacity: int | None = None,
        fused: bool | None = None,
        row_multiple: int = 1,
        max_replicas: int | None = None,
    ) -> None:
        super().__init__()
        check_plan(plan, layer)
        sites = Sites.of(plan, group)
        gate_up, down = check_weights(weights, sites.num_slots)
        device = gate_up.device
        self.sites = replace(sites, device=device)
        if activation not in get_args(Activation):
            raise InvalidInputError(
                code="unknown",
                argument="activation",
                got=repr(activation),
                expected=" or ".join(map(repr, get_args(Activation))),
            )
        if capacity is not None:
            capacity = as_count(capacity, "capacity")
        row_multiple = as_count(row_multiple, "row_multiple")
        self.rows: RowFunctions = plain
        if can_fuse(gate_up) if fused is None else fused:
            check_fused(gate_up)
            from eplb_rs.moe import kernels

            self.rows = kernels
        self.router = router
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)
        self.shared = shared
        self.layer = layer
        self.activation: Activation = activation
        self.capacity = capacity
        self.row_multiple = math.lcm(row_multiple, self.rows.step(gate_up))
        num_slots = plan.topology.num_slots
        most = num_slots - plan.num_experts + 1 if max_replicas is None else max_replicas
        width = max(16, most, plan.log2phy.shape[2])
        self.table = RoutingTable(plan.num_experts, width, device=device)
        for name, size in (("load_E", plan.num_experts), ("slot_load_R", num_slots)):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64, device=device), False)
        self.register_buffer("overflow", torch.zeros((), dtype=torch.int64, device=device), False)
        self.follow(plan, routing)

    def follow(self, plan: Plan, routing: RoutingRule = "uniform") -> None:
        """Routes by another plan from the next forward on; its weights must be in place by then.

        Raises:
            InvalidInputError: As :func:`~eplb_rs.moe.routing.routing_rows`; ``wrong_shape`` for a
                plan of other experts or slots; ``too_large`` for an expert with more replicas than
                ``max_replicas``. Routing stays as it was.
        """
        check_plan(plan, self.layer, like=(len(self.load_E), self.sites.plan_slots))
        if Sites.of(plan, self.sites.group).ranks != self.sites.ranks:
            raise InvalidInputError(
                code="wrong_shape",
                argument="plan",
                got=f"a plan with ranks {plan.topology.dead} dead",
                expected=f"one that ranks {list(self.sites.ranks)} serve",
                hint="`regroup` goes on with other ranks",
            )
        rows, lengths = routing_rows(plan, self.sites.rank, routing, layer=self.layer)
        self.table.update(self.sites.numbers[rows[0]], lengths[0])

    def regroup(
        self,
        plan: Plan,
        group: distributed.ProcessGroup | None = None,
        routing: RoutingRule = "uniform",
    ) -> None:
        """Goes on with other ranks: those that are left when some are lost, or have come back.

        Ranks keep their numbers and slots; those of the plan that are dead have no process in the
        group. What was recorded is forgotten, and CUDA graphs are to be captured anew.

        Args:
            plan: Where experts live now; its weights must be in place.
            group: The processes, in order of rank.
            routing: As for :meth:`follow`.

        Raises:
            InvalidInputError: As :meth:`follow`; ``wrong_shape`` for a group that does not fit.
        """
        check_plan(plan, self.layer, like=(len(self.load_E), self.sites.plan_slots))
        before = self.sites
        self.sites = Sites.of(plan, group, before.device)
        try:
            self.follow(plan, routing)
        except InvalidInputError:
            self.sites = before
            raise
        self.load_E.zero_()
        self.slot_load_R.zero_()

    @property
    def max_replicas(self) -> int:
        """The most replicas of an expert that a plan to follow may have."""
        return self.table.row_EW.shape[1]

    def record(self) -> Recorded:
        """The load since it was last asked for, which begins anew. Waits for nothing."""
        present = self.sites.present
        slot_R = torch.zeros_like(self.slot_load_R)
        slot_R[present] = self.slot_load_R[: len(present)]
        recorded = Recorded(self.load_E.clone(), slot_R)
        self.load_E.zero_()
        self.slot_load_R.zero_()
        return recorded

    def forward(self, x: Tensor) -> Tensor:
        """Tokens through their experts.

        Args:
            x: `[..., H]`, this rank's tokens; none is fine.

        Returns:
            The same shape.

        Raises:
            InvalidInputError: ``wrong_shape``, ``wrong_dtype`` or ``inconsistent`` for tokens or
                choices that do not fit; on a CPU ``out_of_range`` for an expert. On this rank
                alone, before it sends anything: the others wait.
            OverflowError: With a capacity, on all ranks alike, where more rows came than fit; but
                not while a CUDA graph is captured: then :meth:`raise_on_overflow` tells.
        """
        x_TH = x.reshape(-1, x.shape[-1])
        gate_TK, expert_TK = self.router(x_TH)
        gate_TK = gate_TK.to(x_TH.dtype)
        made = self.begin(x_TH, gate_TK, expert_TK)
        out: Tensor = _Whole.apply(x_TH, gate_TK, self.gate_up, self.down, made)
        if self.shared is not None:
            out = out + self.shared(x_TH)
        return out.view_as(x)

    def begin(self, x_TH: Tensor, gate_TK: Tensor, expert_TK: Tensor) -> Pass:
        """One pass through the experts, for those who run its phases by hand.

        Records the load and settles where rows go, a collective call.
        """
        check_routed(x_TH, gate_TK, expert_TK, self.gate_up, len(self.load_E))
        slot_TK, count_E = self.table.route(expert_TK.long())
        self.load_E += count_E
        exchange: Exchange
        if self.capacity is None:
            exchange = UnevenExchange(slot_TK, self.sites, self.rows, multiple=self.row_multiple)
        else:
            exchange = CapacityExchange(
                slot_TK,
                self.sites,
                self.rows,
                self.capacity,
                self.overflow,
                multiple=self.row_multiple,
            )
            if not (x_TH.is_cuda and torch.cuda.is_current_stream_capturing()):
                self.raise_on_overflow()
        self.slot_load_R[: len(exchange.sent_R)] += exchange.sent_R
        return Pass(self, exchange, x_TH.detach(), gate_TK.detach())

    def raise_on_overflow(self) -> None:
        """Looks whether rows of any rank did not fit since the last look; waits for the device.

        Raises:
            OverflowError: Some did not. Results since the last look are wrong.
        """
        missed = int(self.overflow)
        if missed:
            self.overflow.zero_()
            raise OverflowError(
                f"{missed} rows of layer {self.layer} did not fit: `capacity` ({self.capacity}) is "
                f"the room from each rank to each other; raise it, or pass None"
            )


class Pass:
    """One micro-batch's pass through the experts of one layer, phase by phase.

    Forward: :meth:`dispatch`, :meth:`experts`, :meth:`combine`, :meth:`output`. Backward:
    :meth:`combine_backward`, :meth:`experts_backward`, :meth:`dispatch_backward`,
    :meth:`input_grad`, and :meth:`weight_grads` at any time after :meth:`experts_backward`.
    Exchanges begin where a phase ends and are waited for where the next begins, so that other
    work, another micro-batch's, can be put in between. No autograd graph is made.
    """

    def __init__(
        self, layer: ExpertParallelMoE, exchange: Exchange, x_TH: Tensor, gate_TK: Tensor
    ) -> None:
        self._layer, self._exchange = layer, exchange
        self._x, self._gates = x_TH, gate_TK
        self._flight: Flight | None = None
        self._rows: Tensor | None = None
        self._inner: Tensor | None = None
        self._back: Tensor | None = None
        self._half: ExpertsBackward | None = None
        self._gate_grad: Tensor | None = None

    @property
    def rows_by_slot(self) -> Tensor:
        """`[S]` int64 on the device, how many rows each slot of this rank gets in this pass. Known
        once the layer's ``begin`` has returned; waits for nothing."""
        return self._exchange.got_S

    @torch.no_grad()
    def dispatch(self) -> None:
        """Starts the tokens to their experts."""
        self._flight = self._exchange.to_experts(self._x)

    @torch.no_grad()
    def experts(self) -> None:
        """Waits for the rows and computes."""
        layer = self._layer
        self._rows = self._exchange.experts_landed(self._landing())
        self._out, self._inner = experts_forward(
            self._rows,
            layer.gate_up,
            layer.down,
            self._exchange.groups,
            layer.rows,
            layer.activation,
        )

    @torch.no_grad()
    def combine(self) -> None:
        """Starts the results back to their tokens."""
        self._flight = self._exchange.to_tokens(self._out)
        del self._out

    @torch.no_grad()
    def output(self) -> Tensor:
        """Waits for the results and adds each token's, in order of k: `[T, H]`."""
        self._back = self._landing().land()
        return self._exchange.tokens_landed(self._back, self._gates)

    @torch.no_grad()
    def combine_backward(self, grad_TH: Tensor) -> None:
        """Starts the gradients of the results to the experts."""
        _check_order(self._back is not None, "combine_backward", "output(), once")
        assert self._back is not None
        self._flight, self._gate_grad = self._exchange.spread_to_experts(
            grad_TH, self._gates, self._back
        )
        self._back = None

    @torch.no_grad()
    def experts_backward(self) -> None:
        """Waits for them and computes the gradients of the rows."""
        _check_order(self._rows is not None, "experts_backward", "experts(), once")
        assert self._rows is not None
        assert self._inner is not None
        layer = self._layer
        self._half = experts_backward(
            self._exchange.experts_landed(self._landing()),
            self._rows,
            self._inner,
            layer.gate_up,
            layer.down,
            self._exchange.groups,
            layer.rows,
            layer.activation,
        )
        self._rows = self._inner = None

    @torch.no_grad()
    def dispatch_backward(self) -> None:
        """Starts the gradients of the rows back to their tokens."""
        _check_order(self._half is not None, "dispatch_backward", "experts_backward()")
        assert self._half is not None
        self._flight = self._exchange.to_tokens(self._half.grad_rows_NH)

    @torch.no_grad()
    def input_grad(self) -> tuple[Tensor, Tensor]:
        """Waits for them: the gradients of tokens, `[T, H]`, and gates, `[T, K]`."""
        _check_order(self._gate_grad is not None, "input_grad", "combine_backward()")
        assert self._gate_grad is not None
        grads = self._landing().land()
        return self._exchange.tokens_landed(grads, None), self._gate_grad

    @torch.no_grad()
    def weight_grads(self) -> tuple[Tensor, Tensor]:
        """The gradients of the layer's `gate_up` and `down`; frees what they need."""
        _check_order(self._half is not None, "weight_grads", "experts_backward(), once")
        assert self._half is not None
        grads = self._half.weights()
        self._half = None
        return grads

    def _landing(self) -> Flight:
        _check_order(self._flight is not None, "a phase that waits", "the one that sends, once")
        assert self._flight is not None
        flight, self._flight = self._flight, None
        return flight


def _check_order(good: bool, phase: str, after: str) -> None:
    if not good:
        raise InvalidInputError(
            code="wrong_order",
            argument="phase",
            got=phase,
            expected=f"called after {after}",
            hint="a pass goes forward once and backward once",
        )


class _Whole(torch.autograd.Function):
    """A pass from end to end, for autograd."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, gate_TK: Tensor, gate_up: Tensor, down: Tensor, made: Pass
    ) -> Tensor:
        del x_TH, gate_TK, gate_up, down  # the pass has them
        ctx.made = made
        made.dispatch()
        made.experts()
        made.combine()
        return made.output()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made: Pass = ctx.made
        made.combine_backward(grads[0])
        made.experts_backward()
        made.dispatch_backward()
        weights = made.weight_grads()
        return (*made.input_grad(), *weights, None)
