"""Tables of hostile plans, reports, budgets and schemes: what stands between the moments and the checkpoint.

`case.py` says what a case is; this is the part about plans and about backends' own words.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from case import BAD_VALUES, NUMBERS, OFTEN_FINE, OTHER_JSON, Case, edited, nothing, put, written

PLANNED = "model.layers.0.self_attn.q_proj"
BUDGETS = ("nan", "inf", "-inf", "0", "-1", "1e308", "1e-300", "0.001", "x", "", str(2**70), "16.01")
SIZES = ("nan", "0", "-1", "0MB", "1e308", "9" * 400, "9" * 400 + "GB", "1XB", "MB", "", "12 34", "0.0000001KB", "٣MB")
SCHEMES = ("0x0g0", "99x99g99", "text", "", "2x8", "2x8g8x", "-1x8g8", "1x8g0", "1x17g8", "9" * 5000 + "x8g8", "２x8g8")
WORDS = ("codebook=thesis", "codebook", "=", "states=9", "states=10**12", "group_size=0", "bits=2", "x=" + "9" * 5000)


def plan_cases() -> Iterator[Case]:
    """Plans that were edited badly, or are none."""

    def plan(change: Callable[[dict], Any]) -> Callable[[Path], None]:
        return edited("plan.json", lambda found: change(found) or found)

    def changed(key: str, value: Any) -> Callable[[Path], None]:
        return plan(lambda found: put(key, value)(found) and None)

    def linear(change: Callable[[dict], Any]) -> Callable[[Path], None]:
        return plan(lambda found: change(found["linears"][PLANNED]) and None)

    for label, data in OTHER_JSON.items():
        yield Case("plans", f"plan: {label}", "obey", "plan", written("plan.json", data))
    yield Case("plans", "plan: cut", "obey", "plan", lambda folder: cut(folder / "plan.json"))
    for label, value in BAD_VALUES.items():
        for key in ("version", "model", "backend", "linears"):
            # version 1 is right, and so is nothing else
            yield Case("plans", f"{key}={label}", "obey", "plan", changed(key, value))
        yield Case("plans", f"record={label}", "obey", "plan", changed("record", value), refuse=False)
        bad = linear(lambda found, value=value: found.update(rank=value, formats=found["formats"][:1]))
        yield Case("plans", f"rank={label}", "obey", "plan", bad, refuse=label != "null")
        for key in ("formats", "bytes", "predicted"):
            bad = linear(lambda found, key=key, value=value: found.update({key: value}))
            yield Case("plans", f"{key}={label}", "obey", "plan", bad, refuse=key == "formats")
        for key in ("bits", "group_size", "thesis"):
            bad = linear(lambda found, key=key, value=value: found["formats"][0].update({key: value}))
            # Groups of more columns than there are, and of -1, are whole rows.
            fine = key == "group_size" and label in ("10**12", "beyond int64", "negative")
            yield Case("plans", f"{key} of a format={label}", "obey", "plan", bad, refuse=not fine)
        bad = linear(lambda found, value=value: found.update(rank=2, formats=[value, value]))
        yield Case("plans", f"formats of factors={label}", "obey", "plan", bad)
        yield Case(
            "plans",
            f"a linear is {label}",
            "obey",
            "plan",
            plan(lambda found, value=value: found["linears"].update({PLANNED: value})),
        )
    for rank in (10**12, 2**70, 65, 0, -3):
        pair = linear(lambda found, rank=rank: found.update(rank=rank, formats=[found["formats"][0]] * 2))
        yield Case("plans", f"rank {rank}", "obey", "plan", pair)
    yield Case("plans", "a linear too many", "obey", "plan", plan(lambda f: f["linears"].update({"x" * 5000: {}})))
    yield Case("plans", "a linear missing", "obey", "plan", plan(lambda f: f["linears"].pop(PLANNED) and None))
    yield Case("plans", "many linears", "obey", "plan", plan(lambda f: f["linears"].update(numbered(10**5))))
    for path in ("/dev/zero", "/", "", "x" * 300, "{model}/nowhere.json", "a\0b", "{text}"):
        yield Case("plans", f"--plan {path[:20]!r}", "obey", "plan", nothing, ("--plan", path))
        yield Case("plans", f"compress --plan {path[:20]!r}", "compress", "llama", nothing, ("--plan", path))
    yield Case("plans", "of another backend", "obey quip", "plan", nothing)
    yield Case("plans", "without moments", "obey", "plan", nothing, ("--moments", "none"))
    yield Case("plans", "and a budget", "obey", "plan", nothing, ("--bits-budget", "3"))


def budget_cases() -> Iterator[Case]:
    """Budgets that nothing fits, words that no backend knows, schemes that are none."""
    for command in ("plan", "compress"):
        for value in BUDGETS:
            yield Case("budgets", f"{command} --bits={value}", command, "llama", nothing, (f"--bits={value}",))
        for value in SIZES:
            flags = (f"--size={value}",)
            yield Case("budgets", f"{command} --size={value[:20]}", command, "llama", nothing, flags)
        for flags in (("--size", "1B", "--whole-checkpoint"), ("--size", "1MB", "--bits", "2")):
            yield Case("budgets", f"{command} {' '.join(flags)}", command, "llama", nothing, flags)
        for backend in ("", "thesis", "../x", "x" * 300):
            yield Case("budgets", f"{command} {backend[:9]!r}", command, "llama", nothing, ("--backend", backend))
        for value in NUMBERS:
            fine = value in OFTEN_FINE or value.isdecimal()
            flags = (f"--seed={value}",)
            yield Case("budgets", f"{command} --seed={value}", command, "llama", nothing, flags, not fine)
    for value in ("16", "15.9", "12"):
        flags = (f"--bits={value}",)
        yield Case("budgets", f"beyond the widest format: {value}", "plan", "llama", nothing, flags, False)
    yield Case("budgets", "1e14 bytes", "plan", "llama", nothing, ("--size", "100000GB"), False)
    for word in WORDS:
        yield Case("budgets", f"--format {word[:20]}", "plan", "llama", nothing, ("--format", word))
    for value in NUMBERS:
        fine = value in OFTEN_FINE
        flags = (f"--ft-epochs={value}",)
        yield Case("budgets", f"compress --ft-epochs={value}", "compress", "llama", nothing, flags, not fine)
        flags = (f"--trellis-states={value}", "--codebook", "trellis")
        refused = value != "1_0"  # Python's way to write 10, which there is a table for
        yield Case("budgets", f"--trellis-states={value}", "quip", "llama", nothing, flags, refused)
        for flag in ("--damping", "--tolerance", "--max-rounds"):
            flags = (f"{flag}={value}",)
            yield Case("budgets", f"aqlm {flag}={value}", "aqlm", "llama", nothing, flags, not fine)
    for value in ("7", "9", "99", "-8"):
        flags = ("--trellis-states", value, "--codebook", "trellis")
        yield Case("budgets", f"--trellis-states {value}", "quip", "llama", nothing, flags)
    for value in ("thesis", "", "e8p,trellis", "x" * 300):
        yield Case("budgets", f"--codebook {value[:9]!r}", "quip", "llama", nothing, ("--codebook", value))
    for value in SCHEMES:
        yield Case("budgets", f"--scheme={value[:20]}", "aqlm", "llama", nothing, (f"--scheme={value}",))
    for value in ("thesis", "", "float64"):
        yield Case("budgets", f"--entries {value!r}", "aqlm", "llama", nothing, ("--entries", value))
    for value in ("thesis", "", "none+", "+".join(["none"] * 5000), "none none"):
        flags = ("--token-weights", value)
        yield Case("budgets", f"moments {value[:20]!r}", "moments", "llama", nothing, flags)
        yield Case("budgets", f"plan's moments {value[:20]!r}", "plan", "llama", nothing, flags)


def report_cases() -> Iterator[Case]:
    """The report of an earlier stage, which quantizing and comparing go on from."""
    commands = ("gptq", "compare")
    number = 0
    for label, data in OTHER_JSON.items():
        change = written("casp_report.json", data)
        yield Case("reports", label, commands[number % 2], "svd", change)
        number += 1
    for label, value in BAD_VALUES.items():
        for key in ("base_model", "stages", "blocks"):
            change = edited("casp_report.json", put(key, value))
            fine = (key == "base_model" and label == "text") or (key != "base_model" and label == "list")
            yield Case("reports", f"{key}={label}", commands[number % 2], "svd", change, refuse=not fine)
            number += 1
        curve = put("end_to_end", [{"training": 0.1, "validation": value}])
        for key, other in {"a loss": curve, "keep_ratio": kept(value)}.items():
            change = edited("casp_report.json", other)
            yield Case("reports", f"{key}={label}", commands[number % 2], "svd", change, refuse=False)
            number += 1
        for key in ("block_influence", "attention_density", "linears", "tuning"):

            def block(found: dict, key: str = key, value: Any = value) -> dict:
                found["blocks"][0][key] = value
                return found

            change = edited("casp_report.json", block)
            yield Case("reports", f"{key} of a block={label}", commands[number % 2], "svd", change, refuse=False)
            number += 1

    def fewer(found: dict) -> dict:
        del found["blocks"][0]
        return found

    yield Case("reports", "a block fewer", "gptq", "svd", edited("casp_report.json", fewer))


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
