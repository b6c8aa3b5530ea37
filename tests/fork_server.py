"""The fork server of the kill tests. There is one per process that runs tests, so all of them name
what it imports at once."""

from multiprocessing import get_context
from multiprocessing.context import ForkServerContext


def fork_server() -> ForkServerContext:
    """A server that has imported what the children need, in a process without threads: a child is a
    quick and safe fork of it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(
        [
            "tests.preloaded",
            "rac_modifier.traces.collect",
            "tests.traces.killed_collection",
        ]
    )
    return context
