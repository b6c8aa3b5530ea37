"""Which of several servers gets the next request, and how long to leave one alone that cannot take any."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
_LONGEST_RETRY_AFTER = 600.0


@dataclass
class Server:
    """One base URL and what is known about its state."""

    url: str
    under_way: int = 0
    rests_until: float = 0.0
    _rests: int = field(default=0, repr=False)
    _last_rest: float = field(default=-1.0, repr=False)

    def answered(self) -> None:
        """It works: the next rest begins short again."""
        self._rests = 0

    def rest(self, asked_at: float, now: float, seconds: float | None = None) -> bool:
        """Leave it alone, for longer each time in a row, or for as many `seconds` as it says; returns whether a rest began.

        Many requests fail together when a server goes down: those asked before the last rest began tell nothing new.
        """
        begins = asked_at >= self._last_rest
        if begins:
            self._rests, self._last_rest = self._rests + 1, now
            self.rests_until = max(self.rests_until, now + pause(self._rests))
        if seconds is not None:
            self.rests_until = max(self.rests_until, now + min(seconds, _LONGEST_RETRY_AFTER))
        return begins


class Balancer:
    """Hands out the server with the fewest requests under way among those that do not rest.

    A server that fails fast has few under way and would draw them all: so whatever fails, rests.
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = time.monotonic):
        self.servers = [Server(url) for url in urls]
        self.clock = clock

    def take(self, last: Server | None = None) -> tuple[Server, float]:
        """The next server, and the seconds to wait before it is asked (0 unless all rest).

        Args:
            last: the one that failed on this request, asked again only if the others rest.
        """
        now = self.clock()
        server = min(self.servers, key=lambda s: (max(s.rests_until - now, 0.0), s is last, s.under_way))
        return server, max(server.rests_until - now, 0.0)


def pause(tries: int) -> float:
    """Seconds to wait after `tries` failures in a row: doubling up to a minute, spread so that requests do not march."""
    longest = min(FIRST_PAUSE * 2.0 ** (tries - 1), LONGEST_PAUSE)
    return longest * random.uniform(0.5, 1.0)


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which may be a number or a date; None without one that makes sense."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
