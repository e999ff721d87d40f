"""Recorded expert loads, read from the files that engines and benchmarks write.

Letters: T windows, L layers, E logical experts.

=============  ====================================================================
``.npy``       An array `[L, E]` or `[T, L, E]`.
``.npz``       The same, chosen by ``key`` where the archive holds several.
``.json``      SGLang's recorder (``logical_count``, `[L, E]` or `[T, L, E]`), the
               public EPLB benchmark (``load_history``), a field chosen by ``key``,
               or a bare nested list.
``.pt, .pth``  SGLang's recorder, a dictionary with ``key``, or a tensor. Needs torch.
=============  ====================================================================

No file is trusted: none is unpickled into anything but numbers, and what a file claims to hold
is compared with its size before memory is asked for.
"""

from eplb_rs.loads.trace import LoadTrace, read_loads
from eplb_rs.loads.windows import WindowChoice

__all__ = ["LoadTrace", "WindowChoice", "read_loads"]
