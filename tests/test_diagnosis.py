"""The rules find what was planted, name it rightly, and say nothing of healthy runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fundamentals
import linear_regression
import real_data
import synthetic_regression
import training_loop
import workflow
from faults_corpus import FAULTS, HEALTHY, SEEDS, Case, inspect
from loopwright import Every, Trainer
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


def inspected(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = 12, every: int = 50
) -> GradientInspector:
    inspector = GradientInspector(every=Every(steps=every))
    batch = torch.randn(16, 8), torch.rand(16, 1)
    Trainer(model, optimizer, nn.MSELoss(), callbacks=[inspector], device="cpu").fit([batch], steps=steps)
    return inspector


def test_a_gradient_too_small_for_the_first_weights_to_change_is_said_to_vanish_and_nothing_else() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(8, 16), nn.Sigmoid()]
    for _ in range(8):
        layers += [nn.Linear(16, 16), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(16, 1))
    inspector = inspected(model, torch.optim.SGD(model.parameters(), lr=0.01))
    assert [finding.rule for finding in inspector.findings] == ["vanishing"]


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, 8))
        self.up = nn.Parameter(torch.zeros(1, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.down.T @ self.up.T


def test_the_gradient_of_what_no_optimizer_holds_does_not_make_the_rest_of_its_layer_one_that_should_move() -> None:
    model = Adapted()
    inspector = inspected(model, torch.optim.Adam([model.down]))
    assert [finding.rule for finding in inspector.findings] == ["not in the optimizer"]


def test_a_part_of_a_layer_whose_group_has_a_rate_of_zero_is_not_moving() -> None:
    model = nn.Linear(8, 1)
    groups: list[dict[str, Any]] = [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias]}]
    (finding,) = inspected(model, torch.optim.Adam(groups, lr=1e-2)).findings
    assert (finding.rule, finding.evidence["rate"]) == ("not moving", 0.0)


def test_gradients_that_are_all_zero_from_the_start_are_no_healthy_run() -> None:
    model = nn.Sequential(nn.Linear(8, 1), nn.ReLU())
    nn.init.constant_(model[0].get_parameter("bias"), -30.0)
    (finding,) = inspected(model, torch.optim.SGD(model.parameters(), lr=0.1)).findings
    assert (finding.rule, finding.layer) == ("dead units", "the model")
    assert "every gradient was exactly zero in each of 6 inspections" in finding.seen


def test_of_gradients_that_come_to_be_all_zero_the_line_says_since_when() -> None:
    model = nn.Sequential(nn.Linear(8, 1), nn.ReLU())
    nn.init.constant_(model[0].get_parameter("weight").requires_grad_(False), 0.0)
    bias = nn.init.constant_(model[0].get_parameter("bias"), 2.0)
    inspector = inspected(model, torch.optim.SGD([bias], lr=2.0))  # its first step turns the unit off
    assert inspector.findings == ()
    assert inspector.report().endswith("; every gradient is exactly zero from step 3 on, as where a loss reaches 0")


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.gate = nn.Linear(8, 1), nn.Linear(8, 8), nn.Parameter(torch.zeros(8))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(inputs + self.gate * self.body(inputs).relu())
        return out


@pytest.mark.parametrize("steps", [10, 11, 12])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_weights_that_begin_at_zero_are_not_said_to_get_updates_too_large(optimizer: str, steps: int) -> None:
    torch.manual_seed(0)
    model = Gated()
    made: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if optimizer == "SGD":
        made = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    inspector = inspected(model, made, steps=steps, every=1)
    assert inspector.findings == (), inspector.report()


def rules_of(inspector: GradientInspector) -> list[str]:
    return [finding.rule for finding in inspector.findings]


class Heads(nn.Module):
    """As many heads, of which a batch names one."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(8, 16), nn.ModuleList(nn.Linear(16, 1) for _ in range(count))

    def forward(self, inputs: Tensor, head: int) -> Tensor:
        out: Tensor = self.heads[head](self.body(inputs).relu())
        return out


def in_turn(model: nn.Module, batch: tuple[Tensor, Tensor, int]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0], batch[2]), batch[1])


def masked(model: nn.Module, batch: tuple[Tensor, Tensor, int]) -> Tensor:
    losses = [nn.functional.mse_loss(model(batch[0], head), batch[1]) for head in (0, 1)]
    return sum((loss * (head == batch[2]) for head, loss in enumerate(losses)), torch.zeros(()))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("step", [in_turn, masked])
def test_a_head_that_is_trained_between_the_inspections_gets_no_finding(step: Any, optimizer: Any) -> None:
    torch.manual_seed(0)
    model, inspector = Heads(), GradientInspector(every=Every(steps=20))
    data = [(x := torch.randn(16, 8), x[:, :1].sin(), number % 2) for number in range(30)]
    made = optimizer(model.parameters(), lr=1e-2)
    Trainer(model, made, step=step, callbacks=[inspector], device="cpu").fit(data, steps=240)
    assert inspector.findings == (), inspector.report()


def test_of_a_layer_that_is_never_trained_it_is_said_whether_it_was_called_and_what_is_used_of_it() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.spare, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)
            self.used, self.unused = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.head(inputs * self.used + (self.cut(inputs).detach() if self.mode else 0.0))
            return out

        mode = True

    causes = {}
    for mode, kept in [(True, "cut"), (False, "spare"), (False, "unused")]:
        torch.manual_seed(0)
        model = Partly()
        model.mode = mode
        held = [p for name, p in model.named_parameters() if name.startswith((kept, "used", "head"))]
        (finding,) = (f for f in inspected(model, torch.optim.Adam(held)).findings if f.rule == "no gradient")
        causes[kept] = finding.cause
    assert causes["cut"].startswith("in step 1 it was called, and its output did not reach the loss")
    assert causes["spare"] == "in step 1 the forward pass did not call it"
    assert causes["unused"].startswith("the layer's others do")


@pytest.mark.parametrize(("units", "size"), [(50, 8), (500, 8)])
@pytest.mark.parametrize(("steps", "every"), [(300, 50), (40, 1)])
def test_units_that_the_batch_chooses_are_not_said_to_be_dead(units: int, size: int, steps: int, every: int) -> None:
    torch.manual_seed(0)
    model, inspector = (
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, units)),
        GradientInspector(Every(steps=every)),
    )
    data = [(torch.randn(size, 8), torch.randint(units, (size, 1)), torch.randn(size, 1)) for _ in range(40)]

    def step(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]).gather(1, batch[1]), batch[2])

    made = torch.optim.Adam(model.parameters())
    Trainer(model, made, step=step, callbacks=[inspector], device="cpu").fit(data, steps=steps)
    assert inspector.findings == (), inspector.report()


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.table = nn.Parameter(torch.zeros(1)), nn.Embedding(500, 8)
        nn.init.normal_(self.table.weight, std=0.3)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = self.table(inputs)
        out: Tensor = self.bias + 0.5 * (rows.sum(1) ** 2 - (rows**2).sum(1)).sum(1, keepdim=True)
        return out


@pytest.mark.parametrize("lr", [0.02, 0.05])
def test_a_scalar_that_belongs_near_zero_is_not_said_to_get_updates_too_large(lr: float) -> None:
    torch.manual_seed(9)
    true = Factors()
    torch.manual_seed(0)
    with torch.no_grad():
        data = [(x := torch.randint(500, (32, 4)), true(x) + 0.3 * torch.randn(32, 1)) for _ in range(60)]
    model, inspector = Factors(), GradientInspector()
    made = torch.optim.SGD(model.parameters(), lr=lr)
    Trainer(model, made, nn.MSELoss(), callbacks=[inspector], device="cpu").fit(data, steps=400)
    assert inspector.findings == (), inspector.report()


def test_units_before_a_saturated_activation_are_not_called_dead_and_those_behind_it_are() -> None:
    for act, bias, rules in ((nn.Tanh, 0.0, ["saturated"]), (nn.ReLU, -30.0, ["saturated", "dead units"])):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), act(), nn.Linear(20, 1))
        nn.init.constant_(model[2].get_parameter("bias")[:15], bias)
        inspector = GradientInspector()
        data = [(x := 3000 * torch.rand(32, 1) + 500, torch.sin(x / 900)) for _ in range(8)]
        made = torch.optim.Adam(model.parameters())
        Trainer(model, made, nn.MSELoss(), callbacks=[inspector], device="cpu").fit(data, steps=60)
        assert rules_of(inspector) == rules, inspector.report()
