"""A torch.distributed backend that carries CUDA tensors through the host, over gloo.

NCCL refuses two ranks on one GPU. With this one, what ranks do together on CUDA tensors can be seen
where there is one GPU: not how fast it is.

`init_process_group(NAME, ...)`. Works are done when the
host has waited for them; collectives are torch's, in the same order on all ranks.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

NAME = "staged"


class Landing(dist.Work):
    """What is under way on the host, and where it belongs."""

    def __init__(self, work, pairs):
        super().__init__()
        self._work, self._pairs = work, pairs

    def wait(self, timeout=timedelta(0)):
        self._work.wait(timeout)
        with torch.no_grad():
            for target, staged in self._pairs:
                if target is not staged:
                    target.copy_(staged)
        self._pairs = []
        return True

    def is_completed(self):
        return self._work.is_completed()


def _staged(tensors):
    return [tensor.detach().cpu() for tensor in tensors]  # which waits for the device


class Staged(dist.ProcessGroup):
    """One rank of a group."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def _get_backend(self, device):
        del device
        return self

    def getBackendName(self):  # noqa: N802 - torch asks for it
        return NAME

    def _set_group_name(self, name):
        self._name = name

    @property
    def group_name(self):
        return self._name

    def abort(self):
        self._gloo.abort()

    def shutdown(self):
        self._gloo.shutdown()

    def allreduce(self, tensors, opts):
        staged = _staged(tensors)
        return Landing(self._gloo.allreduce(staged, opts), zip(tensors, staged, strict=True))

    def broadcast(self, tensors, opts):
        staged = _staged(tensors)
        return Landing(self._gloo.broadcast(staged, opts), zip(tensors, staged, strict=True))

    def allgather(self, outputs, inputs, opts):
        staged = [_staged(output) for output in outputs]
        work = self._gloo.allgather(staged, _staged(inputs), opts)
        pairs = [pair for whole in zip(outputs, staged, strict=True)
                 for pair in zip(*whole, strict=True)]  # fmt: skip
        return Landing(work, pairs)

    def alltoall_base(self, output, given, output_sizes, input_sizes, opts):
        staged = torch.empty_like(output, device="cpu")
        work = self._gloo.alltoall_base(
            staged, given.detach().cpu(), output_sizes, input_sizes, opts
        )
        return Landing(work, [(output, staged)])

    def send(self, tensors, peer, tag):
        return Landing(self._gloo.send(_staged(tensors), peer, tag), [])

    def recv(self, tensors, peer, tag):
        staged = [torch.empty_like(tensor, device="cpu") for tensor in tensors]
        return Landing(self._gloo.recv(staged, peer, tag), zip(tensors, staged, strict=True))

    def barrier(self, opts):
        return Landing(self._gloo.barrier(opts), [])


dist.Backend.register_backend(NAME, Staged, devices=["cpu", "cuda"])
