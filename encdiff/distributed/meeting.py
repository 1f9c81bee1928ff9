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
        raise InputError(
            f"process {rank} of {size} found no store at {where} within {seconds:g} s ({reason}); torchrun makes one, "
            "on a port that nothing else uses and that the other machines can reach"
        ) from None
    store = dist.PrefixStore("encdiff", store)
    word, end = os.urandom(8).hex(), time.monotonic() + seconds
    store.set(f"word/{rank}", word)
    words: list[str] = []
    while time.monotonic() < end:
        words = _words(store, rank, size, words)
        if word in words and _all_here(store, "".join(words), rank, size):
            return dist.PrefixStore("".join(words), store)
        time.sleep(PAUSE)
    missing = _missing(store, rank, size, "".join(words) if word in words else None)
    who = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
    first = store.add(f"missed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    said = f"of {size} processes {who} did not come to {where} within {seconds:g} s; start all of them"
    raise (InputError if first else Told)(said)  # one of them says what all meet


def _words(store: dist.Store, rank: int, size: int, before: list[str]) -> list[str]:
    """The words of all, none while one is missing: the first publishes them as they are now, the others read that."""
    if rank != 0:
        return json.loads(store.get("words")) if store.check(["words"]) else []
    keys = [f"word/{other}" for other in range(size)]
    words = [store.get(key).decode() for key in keys] if store.check(keys) else []
    if words and words != before:
        store.set("words", json.dumps(words))
    return words


def _all_here(store: dist.Store, name: str, rank: int, size: int) -> bool:
    """Say that this one is here, and hear whether all are, which the first tells."""
    store.set(f"{name}/{rank}", "here")
    if rank == 0 and store.check([f"{name}/{other}" for other in range(size)]):
        store.set(f"{name}/all", "here")
    return store.check([f"{name}/all"])


def _missing(store: dist.Store, rank: int, size: int, name: str | None) -> list[int]:
    """Who did not come: where words were published with this one's, who did not answer them."""
    if name is None and rank != 0:
        return [0]
    return [other for other in range(size) if not store.check([f"{name or 'word'}/{other}"])]
