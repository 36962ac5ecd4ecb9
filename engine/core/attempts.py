"""Failed attempts to get in, by client address: the more of them, the longer an address has to wait."""

from __future__ import annotations

import math
from collections import OrderedDict

FREE_TRIES = 5  # failed attempts of one address before it has to wait
MAX_WAIT_SECONDS = 60  # bounded, because a whole office may come from one address
FORGET_AFTER_SECONDS = 3600  # then an address starts afresh
MAX_ADDRESSES = 10_000  # number of remembered addresses; the oldest is forgotten first


class Attempts:
    """Failed attempts by client address: after FREE_TRIES each doubles the wait. Times are seconds of one clock."""

    def __init__(self) -> None:
        self.known: OrderedDict[str, tuple[int, float]] = OrderedDict()  # address → how many, when the last

    def wait(self, address: str, now: float) -> int:
        """Whole seconds until the address may try again; 0 = now."""
        count, last = self.known.get(address, (0, now))
        if count < FREE_TRIES:
            return 0
        return max(0, math.ceil(last + min(2.0 ** min(count - FREE_TRIES, 16), MAX_WAIT_SECONDS) - now))

    def failed(self, address: str, now: float) -> None:
        count, last = self.known.pop(address, (0, now))
        self.known[address] = (1 if now - last > FORGET_AFTER_SECONDS else count + 1, now)
        if len(self.known) > MAX_ADDRESSES:
            self.known.popitem(last=False)

    def forget(self, address: str) -> None:
        self.known.pop(address, None)
