"""The two errors users see: one for what a mask says, one for what an executor can run."""


class MaskError(ValueError):
    """A mask, or an argument given with it, does not make sense; the text says what to write."""


class ExecutorError(ValueError):
    """The executor that was asked for cannot run this call; the text says why and what can."""
