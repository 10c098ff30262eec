"""Tables of hostile input, by class: what a careless download, an editor or an attacker may put before CASP.

The tables stand in the modules beside this one; `case.py` says what a case is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from case import COMMANDS, Case, nothing
from config_cases import code_cases, config_cases, json_cases
from data_cases import data_cases, hessian_cases
from figure_cases import figure_cases
from flag_cases import flag_cases, path_cases
from output_cases import output_cases, switch_cases
from plan_cases import budget_cases, plan_cases, report_cases
from random_cases import random_cases
from stored_cases import compressed_cases, header_cases, number_cases

__all__ = ["COMMANDS", "Case", "nothing", "random_cases", "table"]

FACTORIES = (
    config_cases,
    json_cases,
    header_cases,
    number_cases,
    compressed_cases,
    code_cases,
    flag_cases,
    path_cases,
    data_cases,
    hessian_cases,
    plan_cases,
    report_cases,
    budget_cases,
    output_cases,
    switch_cases,
    figure_cases,
)


def table() -> list[Case]:
    """Every case of the tables."""
    return [case for factory in FACTORIES for case in factory()]
