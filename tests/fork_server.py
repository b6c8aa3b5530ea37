"""The fork server of the kill tests."""

from multiprocessing import get_context
from multiprocessing.context import ForkServerContext


def fork_server() -> ForkServerContext:
    """A server that has imported what the children need, in a process without threads."""
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.preloaded", "rac_modifier.traces.collect", "tests.traces.killed_collection"]
    )
    return context
