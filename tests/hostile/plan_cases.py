"""Tables of hostile plans, reports, budgets and schemes: what stands between the moments and the checkpoint.

`tests/hostile/cases.py` says what a case is; this is its part about plans and about backends' own words.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PLANNED = "model.layers.0.self_attn.q_proj"
BUDGETS = ("nan", "inf", "-inf", "0", "-1", "1e308", "1e-300", "0.001", "x", "", str(2**70), "16.01")
SIZES = ("nan", "0", "-1", "0MB", "1e308", "9" * 400, "9" * 400 + "GB", "1XB", "MB", "", "12 34", "0.0000001KB", "٣MB")
SCHEMES = ("0x0g0", "99x99g99", "text", "", "2x8", "2x8g8x", "-1x8g8", "1x8g0", "1x17g8", "9" * 5000 + "x8g8", "２x8g8")
WORDS = ("codebook=thesis", "codebook", "=", "states=9", "states=10**12", "group_size=0", "bits=2", "x=" + "9" * 5000)


def plan_cases(make: Callable[..., Any], tables: Any) -> Iterator[Any]:
    """Plans that were edited badly, or are none; make: `cases.Case`, tables: the module of the other tables."""

    def plan(change: Callable[[dict], Any]) -> Callable[[Path], None]:
        return tables.edited("plan.json", lambda found: change(found) or found)

    def changed(key: str, value: Any) -> Callable[[Path], None]:
        return plan(lambda found: tables.put(key, value)(found) and None)

    def linear(change: Callable[[dict], Any]) -> Callable[[Path], None]:
        return plan(lambda found: change(found["linears"][PLANNED]) and None)

    for label, data in tables.OTHER_JSON.items():
        yield make("plans", f"plan: {label}", "obey", "plan", tables.written("plan.json", data))
    yield make("plans", "plan: cut", "obey", "plan", lambda folder: cut(folder / "plan.json"))
    for label, value in tables.BAD_VALUES.items():
        for key in ("version", "model", "backend", "linears"):
            # version 1 is right, and so is nothing else
            yield make("plans", f"{key}={label}", "obey", "plan", changed(key, value))
        yield make("plans", f"record={label}", "obey", "plan", changed("record", value), refuse=False)
        bad = linear(lambda found, value=value: found.update(rank=value, formats=found["formats"][:1]))
        yield make("plans", f"rank={label}", "obey", "plan", bad, refuse=label != "null")
        for key in ("formats", "bytes", "predicted"):
            bad = linear(lambda found, key=key, value=value: found.update({key: value}))
            yield make("plans", f"{key}={label}", "obey", "plan", bad, refuse=key == "formats")
        for key in ("bits", "group_size", "thesis"):
            bad = linear(lambda found, key=key, value=value: found["formats"][0].update({key: value}))
            # Groups of more columns than there are, and of -1, are whole rows.
            fine = key == "group_size" and label in ("10**12", "beyond int64", "negative")
            yield make("plans", f"{key} of a format={label}", "obey", "plan", bad, refuse=not fine)
        bad = linear(lambda found, value=value: found.update(rank=2, formats=[value, value]))
        yield make("plans", f"formats of factors={label}", "obey", "plan", bad)
        yield make(
            "plans",
            f"a linear is {label}",
            "obey",
            "plan",
            plan(lambda found, value=value: found["linears"].update({PLANNED: value})),
        )
    for rank in (10**12, 2**70, 65, 0, -3):
        pair = linear(lambda found, rank=rank: found.update(rank=rank, formats=[found["formats"][0]] * 2))
        yield make("plans", f"rank {rank}", "obey", "plan", pair)
    yield make("plans", "a linear too many", "obey", "plan", plan(lambda f: f["linears"].update({"x" * 5000: {}})))
    yield make("plans", "a linear missing", "obey", "plan", plan(lambda f: f["linears"].pop(PLANNED) and None))
    yield make("plans", "many linears", "obey", "plan", plan(lambda f: f["linears"].update(numbered(10**5))))
    for path in ("/dev/zero", "/", "", "x" * 300, "{model}/nowhere.json", "a\0b", "{text}"):
        yield make("plans", f"--plan {path[:20]!r}", "obey", "plan", tables.nothing, ("--plan", path))
        yield make("plans", f"compress --plan {path[:20]!r}", "compress", "llama", tables.nothing, ("--plan", path))
    yield make("plans", "of another backend", "obey quip", "plan", tables.nothing)
    yield make("plans", "without moments", "obey", "plan", tables.nothing, ("--moments", "none"))
    yield make("plans", "and a budget", "obey", "plan", tables.nothing, ("--bits-budget", "3"))


def budget_cases(make: Callable[..., Any], tables: Any) -> Iterator[Any]:
    """Budgets that nothing fits, words that no backend knows, schemes that are none."""
    for command in ("plan", "compress"):
        for value in BUDGETS:
            # A command that only announces has not asked what the smallest plan takes.
            fine = command == "compress" and value in ("0.001", "1e-300")
            yield make(
                "budgets", f"{command} --bits={value}", command, "llama", tables.nothing, (f"--bits={value}",), not fine
            )
        for value in SIZES:
            flags = (f"--size={value}",)
            yield make("budgets", f"{command} --size={value[:20]}", command, "llama", tables.nothing, flags)
        for flags in (("--size", "1B", "--whole-checkpoint"), ("--size", "1MB", "--bits", "2")):
            yield make("budgets", f"{command} {' '.join(flags)}", command, "llama", tables.nothing, flags)
        for backend in ("", "thesis", "../x", "x" * 300):
            yield make(
                "budgets", f"{command} {backend[:9]!r}", command, "llama", tables.nothing, ("--backend", backend)
            )
        for value in tables.NUMBERS:
            fine = value in tables.OFTEN_FINE or value.isdecimal()
            flags = (f"--seed={value}",)
            yield make("budgets", f"{command} --seed={value}", command, "llama", tables.nothing, flags, not fine)
    for value in ("16", "15.9", "12"):
        flags = (f"--bits={value}",)
        yield make("budgets", f"beyond the widest format: {value}", "plan", "llama", tables.nothing, flags, False)
    yield make("budgets", "1e14 bytes", "plan", "llama", tables.nothing, ("--size", "100000GB"), False)
    for word in WORDS:
        yield make("budgets", f"--format {word[:20]}", "plan", "llama", tables.nothing, ("--format", word))
    for value in tables.NUMBERS:
        fine = value in tables.OFTEN_FINE
        flags = (f"--ft-epochs={value}",)
        yield make("budgets", f"compress --ft-epochs={value}", "compress", "llama", tables.nothing, flags, not fine)
        flags = (f"--trellis-states={value}", "--codebook", "trellis")
        refused = value != "1_0"  # Python's way to write 10, which there is a table for
        yield make("budgets", f"--trellis-states={value}", "quip", "llama", tables.nothing, flags, refused)
        for flag in ("--damping", "--tolerance", "--max-rounds"):
            flags = (f"{flag}={value}",)
            yield make("budgets", f"aqlm {flag}={value}", "aqlm", "llama", tables.nothing, flags, not fine)
    for value in ("7", "9", "99", "-8"):
        flags = ("--trellis-states", value, "--codebook", "trellis")
        yield make("budgets", f"--trellis-states {value}", "quip", "llama", tables.nothing, flags)
    for value in ("thesis", "", "e8p,trellis", "x" * 300):
        yield make("budgets", f"--codebook {value[:9]!r}", "quip", "llama", tables.nothing, ("--codebook", value))
    for value in SCHEMES:
        yield make("budgets", f"--scheme={value[:20]}", "aqlm", "llama", tables.nothing, (f"--scheme={value}",))
    for value in ("thesis", "", "float64"):
        yield make("budgets", f"--entries {value!r}", "aqlm", "llama", tables.nothing, ("--entries", value))
    for value in ("thesis", "", "none+", "+".join(["none"] * 5000), "none none"):
        flags = ("--token-weights", value)
        yield make("budgets", f"moments {value[:20]!r}", "moments", "llama", tables.nothing, flags)
        yield make("budgets", f"plan's moments {value[:20]!r}", "plan", "llama", tables.nothing, flags)


def report_cases(make: Callable[..., Any], tables: Any) -> Iterator[Any]:
    """The report of an earlier stage, which quantizing and comparing go on from."""
    commands = ("gptq", "compare")
    number = 0
    for label, data in tables.OTHER_JSON.items():
        change = tables.written("casp_report.json", data)
        yield make("reports", label, commands[number % 2], "svd", change)
        number += 1
    for label, value in tables.BAD_VALUES.items():
        for key in ("base_model", "stages", "blocks"):
            change = tables.edited("casp_report.json", tables.put(key, value))
            fine = (key == "base_model" and label == "text") or (key != "base_model" and label == "list")
            yield make("reports", f"{key}={label}", commands[number % 2], "svd", change, refuse=not fine)
            number += 1
        curve = tables.put("end_to_end", [{"training": 0.1, "validation": value}])
        for key, other in {"a loss": curve, "keep_ratio": kept(value)}.items():
            change = tables.edited("casp_report.json", other)
            yield make("reports", f"{key}={label}", commands[number % 2], "svd", change, refuse=False)
            number += 1
        for key in ("block_influence", "attention_density", "linears", "tuning"):

            def block(found: dict, key: str = key, value: Any = value) -> dict:
                found["blocks"][0][key] = value
                return found

            change = tables.edited("casp_report.json", block)
            yield make("reports", f"{key} of a block={label}", commands[number % 2], "svd", change, refuse=False)
            number += 1

    def fewer(found: dict) -> dict:
        del found["blocks"][0]
        return found

    yield make("reports", "a block fewer", "gptq", "svd", tables.edited("casp_report.json", fewer))


def kept(value: Any) -> Callable[[dict], dict]:
    """Puts `value` in the place of what the first stage's settings say of the share kept."""

    def change(found: dict) -> dict:
        found["stages"][0]["settings"]["keep_ratio"] = value
        return found

    return change


def cut(file: Path) -> None:
    """Leaves half of `file`."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def numbered(count: int) -> dict[str, dict]:
    """So many linears that no model has."""
    return {f"x{number}": {} for number in range(count)}
