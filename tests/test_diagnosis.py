"""The rules find what was planted, name it rightly, and say nothing of healthy runs."""

from __future__ import annotations

import logging

import pytest
import torch

import fundamentals
import linear_regression
import real_data
import synthetic_regression
import training_loop
import workflow
from faults_corpus import FAULTS, HEALTHY, SEEDS, Case, inspect
from loopwright.callbacks import GradientInspector
from loopwright.inspecting.rules import RULES

pytestmark = pytest.mark.filterwarnings("ignore:invalid value")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_corpus_is_large_and_plants_each_rule_in_both_halves() -> None:
    assert len(FAULTS) >= 30
    assert len(HEALTHY) >= 20
    assert len({case.name for case in (*FAULTS, *HEALTHY)}) == len(FAULTS) + len(HEALTHY)
    for half in ("fixed", "shown"):
        assert {case.rule for case in FAULTS if case.half == half} == {rule.name for rule in RULES}


def check(case: Case, seed: int) -> None:
    outcome = inspect(case, seed)
    if case.rule is None:
        assert not outcome.found, outcome.report
    else:
        assert outcome.named, f"planted: {case.rule} in {case.layer}\n{outcome.report}"


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.name)
def test_a_planted_fault_is_the_first_finding_and_names_its_layer(case: Case) -> None:
    check(case, SEEDS[0])


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
def test_a_healthy_run_gets_no_finding(case: Case) -> None:
    check(case, SEEDS[0])


@pytest.mark.faults
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", [*FAULTS, *HEALTHY], ids=lambda case: case.name)
def test_with_every_seed_the_diagnosis_is_right(case: Case, seed: int) -> None:
    check(case, seed)


def test_the_documents_are_healthy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loopwright")
    watching = {name: GradientInspector() for name in ("000", "001", "002", "003", "004", "diabetes")}
    synthetic_regression.train(watching["000"])
    linear_regression.train(watching["001"])
    training_loop.train(watching["002"])
    fundamentals.train(0.02, watching["003"])
    workflow.train(watching["004"])
    real_data.compare(0, watching["diabetes"])
    reports = {name: inspector.report() for name, inspector in watching.items()}
    assert all(": healthy, " in report and "\n" not in report for report in reports.values()), reports
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO and "gradients, " in r.getMessage()]
    assert said == list(reports.values())


def test_a_document_with_a_rate_too_high_is_found_to_have_updates_too_large() -> None:
    inspector = GradientInspector()
    with pytest.raises(FloatingPointError):
        fundamentals.train(2.0, inspector)
    assert inspector.findings[0].rule == "updates too large"


def test_every_rule_names_its_source_and_explanations_that_exist() -> None:
    names = {rule.name for rule in RULES}
    for rule in RULES:
        assert rule.source
        assert set(rule.unless) <= names - {rule.name}
