"""Cases that are drawn: one random change to one file of a good input."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from case import BAD_VALUES, Case


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """`count` cases more, drawn: a byte, a stretch or a JSON value of a random file changed."""
    rng = random.Random(seed)
    bases = ("llama", "llava", "gptq", "quip", "aqlm", "svd", "hessians", "plan")
    for number in range(count):
        base = rng.choice(bases)
        commands = {
            "llama": ("gptq", "perplexity", "moments", "svd"),
            "llava": ("pictures", "questions"),
            "hessians": ("given",),
            "plan": ("obey",),
        }
        command = rng.choice(commands.get(base, ("perplexity", "compare", "load")))
        key = rng.randrange(2**31)
        name = f"{base} {seed}-{number}"
        yield Case("random", name, command, base, lambda f, key=key: scramble(f, key), refuse=False)


def scramble(folder: Path, seed: int) -> None:
    """One random change to one file of `folder`."""
    rng = random.Random(seed)
    file = rng.choice([path for path in sorted(folder.iterdir()) if path.suffix not in (".md", ".log")])
    data = bytearray(file.read_bytes())
    kind = rng.choice(("bytes", "cut", "grow", "json", "json"))
    if kind == "json" and file.suffix == ".json":
        value = json.loads(data)
        place, key = value, None
        for _ in range(rng.randrange(1, 5)):
            inner = place[key] if key is not None else place
            keys = (
                list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
            )
            if not keys:
                break
            place, key = inner, rng.choice(keys)
        if key is not None:
            place[key] = rng.choice(list(BAD_VALUES.values()))
        file.write_text(json.dumps(value))
        return
    # Headers and small files are where a changed byte means something; data is most of a large one.
    reach = min(len(data), 2000)
    if kind == "cut":
        del data[rng.randrange(reach) :]
    elif kind == "grow":
        data[rng.randrange(reach) : 0] = rng.randbytes(rng.randrange(1, 100))
    else:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(reach)] = rng.randrange(256)
    file.write_bytes(data)
