"""Places for messages that are pushed: shared, and never by two that are there together."""

from __future__ import annotations

import itertools

import torch
from dualpipe.executor.transport.base import Envelope, Message, TensorSpec
from dualpipe.executor.transport.slots import lay_out, tensor_offsets
from dualpipe.instruction import Kind
from hypothesis import given
from hypothesis import strategies as st

spans = st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda s: (s[0], s[0] + s[1]))
arriving = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 100, 600]), spans), max_size=30
)


@given(arriving)
def test_messages_that_are_there_together_lie_apart(wanted: list) -> None:
    wanted.sort(key=lambda one: one[2][0])
    envelopes = [
        Envelope(
            Message(Kind.F, 0, m, 0),
            peer,
            (TensorSpec((size,), torch.float32), TensorSpec((3,), torch.int64)),
            False,
            *span,
        )
        for m, (peer, size, span) in enumerate(wanted)
    ]
    places, num_bytes = lay_out(envelopes)
    used = []
    for envelope, place in zip(envelopes, places, strict=True):
        size = tensor_offsets(envelope.specs)[-1]
        assert 0 <= place.offset <= place.offset + size <= num_bytes
        used.append((envelope, place, place.offset, place.offset + size))
    for (one, here, a, b), (other, there, c, d) in itertools.combinations(used, 2):
        together = one.posted <= other.released and other.posted <= one.released
        if together or one.peer != other.peer:
            assert b <= c or d <= a
        if one.peer == other.peer:
            assert (here.number == there.number) == (here.offset == there.offset)


def test_a_message_in_order_needs_one_place() -> None:
    spec = (TensorSpec((4,), torch.float32),)
    envelopes = [
        Envelope(Message(Kind.F, 0, m, 0), 1, spec, False, 2 * m, 2 * m + 1) for m in range(9)
    ]
    places, num_bytes = lay_out(envelopes)
    assert {place.number for place in places} == {0}
    assert num_bytes == tensor_offsets(spec)[-1]
