"""How the processes of one attempt of a launch find each other in a store that earlier attempts have written to."""

import json
import os
import time
from datetime import timedelta

import torch.distributed as dist

from encdiff.errors import InputError, Told

PAUSE = 0.02  # seconds between two looks at the store


def meet(rank: int, size: int, seconds: float) -> dist.Store:
    """A store that is these processes' alone; InputError, naming who is missing, unless all come within the time.

    torchrun keeps its store when it restarts processes, and what those before had written in it, such as where they
    could be reached. So each writes a word of its own; the first publishes all words; each answers once its own is
    among them; and when all have answered the first lets them go on. The words name the part of the store.
    """
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise _error(os.environ["LOCAL_RANK"] == "0")(
            f"process {rank} of {size} found no store at {where} within {seconds:g} s ({reason}); torchrun makes one, "
            "on a port that nothing else uses and that the other machines can reach"
        ) from None
    store = dist.PrefixStore("encdiff", store)
    word, end = os.urandom(8).hex(), time.monotonic() + seconds
    store.set(f"word/{rank}", word)
    missing = list(range(size))
    while time.monotonic() < end:
        words = _published(store, size) if rank == 0 else _read(store, "words")
        if words is not None and words[rank] == word:
            name = "".join(words)
            store.set(f"{name}/{rank}", "here")
            missing = [other for other in range(size) if not store.check([f"{name}/{other}"])]
            if rank == 0 and not missing:
                store.set(f"{name}/go", "all")
            if store.check([f"{name}/go"]):
                return dist.PrefixStore(name, store)
        elif words is None:
            missing = [other for other in range(size) if not store.check([f"word/{other}"])] or missing
        time.sleep(PAUSE)
    who = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
    there = [other for other in range(size) if other not in missing]
    said = f"of {size} processes {who} did not come to {where} within {seconds:g} s; start all of them"
    raise _error(there[:1] == [rank])(said)


def _error(says: bool) -> type[InputError]:
    """Of what all meet, by one of them."""
    return InputError if says else Told


def _published(store: dist.Store, size: int) -> list[str] | None:
    """The words of all as they are now, published; None while one is missing."""
    if not all(store.check([f"word/{rank}"]) for rank in range(size)):
        return None
    words = [store.get(f"word/{rank}").decode() for rank in range(size)]
    store.set("words", json.dumps(words))
    return words


def _read(store: dist.Store, key: str) -> list[str] | None:
    return json.loads(store.get(key)) if store.check([key]) else None
