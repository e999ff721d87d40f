"""Runs the instruction streams of a :class:`~dualpipe.Schedule` on ``torch.distributed``."""
