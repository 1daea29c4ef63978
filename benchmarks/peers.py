"""How long other trainers take for the same training, beside the loop written by hand and loopwright.

Each trainer is used in two ways. "Lean" is the least work that its documentation offers for this training: nothing is
drawn, logged or saved. "As used" is with a bar, a log of every epoch and a checkpoint every ten epochs, by the means of
the trainer itself and with everything else as it comes; loopwright has early stopping as well, and is the only one
whose checkpoints are on the disk when the clock stops. The function of each trainer below is all of its code.

Each trainer has a process of its own, in which the loop by hand is timed too, round by round, and a ratio compares the
two of one round in one process. The processes take turns, in an order that is reversed every round. The weights that
a trainer comes to are compared with those of the loop by hand, bit for bit.

The trainers are best installed into an environment of their own, such as `make .venv-peers/.made` makes from
requirements-peers.txt, and --python names it. Those that are not installed there are left out, and the report says so.

$ python benchmarks/peers.py --python .venv-peers/bin/python --json peers.json --markdown peers.md --plot peers.png
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset, TensorDataset

from loopwright import Callback, Every, Trainer
from loopwright.callbacks import Checkpoint, CSVLogger, EarlyStopping, ProgressBar
from measuring import Spread, Table, add_outputs, freeze, machine, plain_axes, put_out, seconds
from overhead import (
    Case,
    Clocked,
    Problem,
    Terminal,
    document_000,
    document_001,
    document_002,
    larger_network,
    ready_made,
    small_network,
)

REQUIREMENTS = Path(__file__).with_name("requirements-peers.txt")


def medium_network(samples: int) -> Problem:
    model = larger_network()
    optimizer, criterion = optim.Adam(model.parameters(), lr=0.001), nn.MSELoss()
    dataset = TensorDataset(torch.randn(samples, 64), torch.randn(samples, 1))
    dataloader = DataLoader(dataset, batch_size=256, shuffle=True)

    def by_hand(epochs: int) -> None:
        for _ in range(epochs):
            running_loss = 0.0
            for inputs, targets in dataloader:
                optimizer.zero_grad()
                loss = criterion(model(inputs), targets)
                loss.backward()
                optimizer.step()
                running_loss += loss.item()

    return Problem(model, optimizer, criterion, dataloader, by_hand)


CASES = (
    Case("document 000", document_000, epochs=20, steps=200),
    Case("document 001", document_001, epochs=100, steps=100),
    Case("document 002", document_002, epochs=10, steps=40),
    Case("ready-made batches", partial(ready_made, small_network, 100, (10, 10), clocked=True), epochs=3, steps=300),
    Case("medium network", partial(medium_network, 100_000), epochs=2, steps=782),
)
LONG = "medium network"  # a round of it takes as long as ten of another


def shortened(case: Case) -> Case:
    """The same for one epoch, and the medium network on less data."""
    if case.name == LONG:
        return replace(case, problem=partial(medium_network, 2_560), epochs=1, steps=10)
    return case.shortened()


def on_one_batch(make: Callable[[], Problem]) -> Problem:
    """The same with one batch as all of its data, so that nobody's order of samples matters."""
    problem = make()
    model, optimizer, criterion = problem.model, problem.optimizer, problem.loss
    data = [next(iter(problem.data))]

    def by_hand(epochs: int) -> None:
        for _ in range(epochs):
            for inputs, targets in data:
                optimizer.zero_grad()
                criterion(model(inputs), targets).backward()
                optimizer.step()

    return replace(problem, data=data, by_hand=by_hand)


class Indexed(Dataset[Any]):
    """Ready-made batches for those who ask for them by number, which Clocked notes too."""

    def __init__(self, clocked: Clocked) -> None:
        self.clocked = clocked

    def __len__(self) -> int:
        return len(self.clocked)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.clocked.asked.append(perf_counter())
        return self.clocked.batches[index]


@dataclass(frozen=True)
class Prepared:
    """A training that is ready to run, and where its weights are found afterwards."""

    run: Callable[[], object]  # what is timed
    weights: Callable[[], Iterable[Tensor]]  # in the order and the shapes of the model trained by hand


Way = Callable[[Problem, Case, Path], Prepared]
"""Prepares a training; the folder is for what it writes."""


def by_hand(problem: Problem, case: Case, folder: Path) -> Prepared:
    del folder
    return Prepared(partial(problem.by_hand, case.epochs), problem.model.parameters)


def loopwright_trainer(problem: Problem, case: Case, folder: Path, *, lean: bool) -> Prepared:
    callbacks: list[Callback] = []
    if not lean:
        stopping = EarlyStopping("train/loss", mode="min", patience=case.epochs)  # too patient to stop anything
        checkpoint = Checkpoint(folder / "checkpoints", every=Every(epochs=10))
        callbacks = [ProgressBar(), CSVLogger(folder / "metrics.csv"), stopping, checkpoint]
    trainer = Trainer(problem.model, problem.optimizer, problem.loss, callbacks=callbacks, device="cpu")
    return Prepared(partial(trainer.fit, problem.data, epochs=case.epochs), problem.model.parameters)


def ignite(problem: Problem, case: Case, folder: Path, *, lean: bool) -> Prepared:
    from ignite.engine import Events, create_supervised_trainer  # type: ignore[import-not-found]
    from ignite.handlers import Checkpoint as Saver  # type: ignore[import-not-found]
    from ignite.handlers import DiskSaver, TensorboardLogger
    from ignite.handlers import ProgressBar as Bar

    trainer = create_supervised_trainer(problem.model, problem.optimizer, problem.loss)
    fit = partial(trainer.run, problem.data, max_epochs=case.epochs)

    def fit_as_used() -> None:
        with TensorboardLogger(log_dir=folder / "log") as logger:
            each = Events.EPOCH_COMPLETED
            logger.attach_output_handler(trainer, each, tag="train", output_transform=lambda loss: {"loss": loss})
            Bar().attach(trainer, output_transform=lambda loss: {"loss": loss})
            state = {"model": problem.model, "optimizer": problem.optimizer, "trainer": trainer}
            trainer.add_event_handler(each(every=10), Saver(state, DiskSaver(folder / "checkpoints"), n_saved=3))
            fit()

    return Prepared(fit if lean else fit_as_used, problem.model.parameters)


def accelerate(problem: Problem, case: Case, folder: Path, *, lean: bool) -> Prepared:
    from accelerate import Accelerator  # type: ignore[import-not-found]
    from tqdm import tqdm

    accelerator = Accelerator(cpu=True, **({} if lean else {"log_with": "tensorboard", "project_dir": folder}))
    model, optimizer, data = accelerator.prepare(problem.model, problem.optimizer, problem.data)
    criterion = problem.loss

    def fit() -> None:
        for _ in range(case.epochs):
            running_loss = 0.0
            for inputs, targets in data:
                optimizer.zero_grad()
                loss = criterion(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                running_loss += loss.item()

    def fit_as_used() -> None:
        accelerator.init_trackers("run")
        bar = tqdm(total=case.steps)
        for epoch in range(case.epochs):
            running_loss = 0.0
            for inputs, targets in data:
                optimizer.zero_grad()
                loss = criterion(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                running_loss += loss.item()
                bar.update(1)
            accelerator.log({"train_loss": running_loss / len(data)}, step=epoch)
            if epoch % 10 == 9:
                accelerator.save_state(folder / f"checkpoint-{epoch}")
        bar.close()
        accelerator.end_training()

    return Prepared(fit if lean else fit_as_used, problem.model.parameters)


def lightning(problem: Problem, case: Case, folder: Path, *, lean: bool) -> Prepared:
    import lightning as L  # type: ignore[import-not-found]  # noqa: N812  # as its documentation has it
    from lightning.pytorch.callbacks import ModelCheckpoint  # type: ignore[import-not-found]

    class Lit(L.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = problem.model, problem.loss

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            loss: Tensor = self.loss(self.model(inputs), targets)
            if not lean:
                self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> optim.Optimizer:
            return problem.optimizer

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary") if lean else ()
    added = {} if lean else {"callbacks": [ModelCheckpoint(every_n_epochs=10, save_top_k=-1)]}
    trainer = L.Trainer(
        max_epochs=case.epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        **dict.fromkeys(off, False),
        **added,
    )
    # A list of batches would be one of loaders.
    ready: Any = problem.data
    data = ready if isinstance(ready, (DataLoader, Clocked)) else DataLoader(ready, batch_size=None)
    return Prepared(partial(trainer.fit, Lit(), data), problem.model.parameters)


def transformers(problem: Problem, case: Case, folder: Path, *, lean: bool) -> Prepared:
    import transformers as hf  # type: ignore[import-not-found]

    class WithLoss(nn.Module):  # as its own models are: they return the loss
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = problem.model, problem.loss

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(inputs)
            return {"loss": self.loss(logits, labels), "logits": logits}

    class Named(Dataset[dict[str, Tensor]]):
        def __init__(self, dataset: Any) -> None:
            self.dataset = dataset

        def __len__(self) -> int:
            return len(self.dataset)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            inputs, labels = self.dataset[index]
            return {"inputs": inputs, "labels": labels}

    class OnBatches(hf.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return batches

    switched_off: dict[str, Any] = {
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
    }
    every: dict[str, Any] = {
        "logging_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": 10 * case.steps // case.epochs,
        "save_total_limit": 3,
    }
    # Its defaults would clip the gradients, lower the rate, and draw the samples in an order of its own.
    same_training: dict[str, Any] = {
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "accelerator_config": {"use_seedable_sampler": False},
    }
    loader = problem.data if isinstance(problem.data, DataLoader) else None
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        num_train_epochs=case.epochs,
        per_device_train_batch_size=1 if loader is None else loader.batch_size,
        dataloader_pin_memory=False,  # it would warn that there is no accelerator
        **same_training,
        **(switched_off if lean else every),
    )
    optimizers = problem.optimizer, None
    if loader is not None:
        trainer = hf.Trainer(WithLoss(), arguments, train_dataset=Named(loader.dataset), optimizers=optimizers)
    else:
        clocked = problem.data if isinstance(problem.data, Clocked) else None
        ready = problem.data if clocked is None else clocked.batches
        named: Any = [{"inputs": inputs, "labels": labels} for inputs, labels in ready]
        if clocked is not None:
            clocked.batches = named
        batches = named if clocked is None else clocked
        trainer = OnBatches(WithLoss(), arguments, train_dataset=batches, optimizers=optimizers)
    return Prepared(trainer.train, problem.model.parameters)


def skorch(problem: Problem, case: Case, folder: Path, *, lean: bool) -> Prepared:
    import skorch.callbacks as own  # type: ignore[import-not-found]
    from skorch import NeuralNet

    if isinstance(problem.data, DataLoader):
        dataset: Any = problem.data.dataset
        loading: dict[str, Any] = {"batch_size": problem.data.batch_size, "iterator_train__shuffle": True}
    else:
        dataset = TensorDataset(*next(iter(problem.data)))
        loading = {"iterator_train": lambda *_, **__: problem.data}
    saver = own.Checkpoint(monitor=lambda net: len(net.history) % 10 == 0, dirname=str(folder))
    net = NeuralNet(
        problem.model,
        criterion=problem.loss,
        optimizer=type(problem.optimizer),
        lr=problem.optimizer.defaults["lr"],
        max_epochs=case.epochs,
        train_split=None,
        **loading,
        callbacks="disable" if lean else [own.ProgressBar(), saver],
    ).initialize()
    # It makes a data set of tensors itself, which is slower than torch's.
    data = (dataset, None) if lean else dataset.tensors
    return Prepared(partial(net.partial_fit, *data), problem.model.parameters)


def keras(problem: Problem, case: Case, folder: Path, *, lean: bool) -> Prepared:
    import keras as k  # type: ignore[import-not-found]

    modules = list(problem.model.modules())
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    hidden = "relu" if any(isinstance(module, nn.ReLU) for module in modules) else None
    layers = [k.layers.Dense(layer.out_features, activation=hidden) for layer in linear[:-1]]
    model = k.Sequential([k.Input((linear[0].in_features,)), *layers, k.layers.Dense(linear[-1].out_features)])
    model.set_weights([weights.detach().numpy().T for layer in linear for weights in (layer.weight, layer.bias)])
    settings = problem.optimizer.defaults
    if isinstance(problem.optimizer, optim.Adam):
        optimizer = k.optimizers.Adam(settings["lr"], epsilon=settings["eps"])
    else:
        optimizer = k.optimizers.SGD(settings["lr"])
    model.compile(optimizer=optimizer, loss="mse")

    saver = k.callbacks.ModelCheckpoint(folder / "{epoch}.keras", save_freq=10 * case.steps // case.epochs)
    added = [] if lean else [k.callbacks.CSVLogger(folder / "log.csv"), saver]
    fit = partial(model.fit, epochs=case.epochs, verbose=0 if lean else "auto", callbacks=added)
    if isinstance(problem.data, DataLoader):
        # Its fit makes iterators that it does not use, each of which draws, so that the samples come in other orders.
        dataset: Any = problem.data.dataset
        inputs, targets = dataset.tensors
        fit = partial(fit, inputs, targets, batch_size=problem.data.batch_size)
    elif isinstance(problem.data, Clocked):
        fit = partial(fit, DataLoader(Indexed(problem.data), batch_size=None))
    else:
        inputs, targets = next(iter(problem.data))
        fit = partial(fit, inputs, targets, batch_size=len(inputs), shuffle=False)
    return Prepared(fit, lambda: [variable.value.T for variable in model.trainable_variables])


@dataclass(frozen=True)
class Peer:
    """A trainer: its distribution, the module that it is imported as, and its function above."""

    distribution: str
    module: str
    way: Callable[..., Prepared]

    def ways(self) -> dict[str, Way]:
        """The loop by hand, and the two ways to use the trainer."""
        return {"by hand": by_hand, "lean": partial(self.way, lean=True), "as used": partial(self.way, lean=False)}

    def version(self) -> str | None:
        """The one that is installed, if any."""
        if importlib.util.find_spec(self.module) is None:
            return None
        return importlib.metadata.version(self.distribution)


PEERS = {
    "loopwright": Peer("loopwright", "loopwright", loopwright_trainer),
    "Ignite": Peer("pytorch-ignite", "ignite", ignite),
    "skorch": Peer("skorch", "skorch", skorch),
    "Accelerate": Peer("accelerate", "accelerate", accelerate),
    "Lightning": Peer("lightning", "lightning", lightning),
    "HF Trainer": Peer("transformers", "transformers", transformers),
    "Keras": Peer("keras", "keras", keras),
}
FIRST, *_ = PEERS


class WrongTrainingError(Exception):
    """Somebody came to weights that this training does not lead to, so that its time says nothing."""


# In a trainer's own process


def turn(peer: Peer, case: Case, seed: int, folder: Path, *, backwards: bool) -> dict[str, Any]:
    """Train once in each way: the seconds a step, and how far the weights are from those by hand."""
    times: dict[str, float] = {}
    ends: dict[str, Tensor] = {}
    ways = peer.ways()
    for way in reversed(list(ways)) if backwards else ways:
        own = folder / way
        own.mkdir()
        torch.manual_seed(seed)
        problem = case.problem()
        start = flat(problem.model.parameters())
        prepared = ways[way](problem, case, own)
        torch.manual_seed(seed)  # whoever prepares may draw
        took = seconds(prepared.run)
        times[way] = problem.data.step() if isinstance(problem.data, Clocked) else took / case.steps
        ends[way] = flat(prepared.weights())
        shutil.rmtree(own)
    hand = ends.pop("by hand")
    return {
        "seconds": times,
        "deviations": {way: deviation(start, hand, end) for way, end in ends.items()},
        "by_hand": hashlib.sha256(hand.numpy().tobytes()).hexdigest(),
    }


def flat(weights: Iterable[Tensor]) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in weights])


def deviation(start: Tensor, hand: Tensor, end: Tensor) -> float:
    """How far apart the two ends are, as a share of the way from the start; 0.0 only where they are equal."""
    if torch.equal(hand, end):
        return 0.0
    return float((end - hand).norm() / (hand - start).norm()) or sys.float_info.min


def serve(name: str) -> None:
    """Say which version there is; then take the turns that standard input asks for, a line of JSON each."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever else is printed
    peer = PEERS[name]
    version = peer.version()
    print(json.dumps({"version": version, "machine": machine()}), file=answers)
    if version is None:
        return
    torch.set_num_threads(1)
    # Before the imports: a log or a bar may keep the stream that it finds then.
    with Terminal() as screen, contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        warnings.simplefilter("ignore")
        importlib.import_module(peer.module)
        for order in map(json.loads, sys.stdin):
            case = next(case for case in CASES if case.name == order["case"])
            if order["quick"]:
                case = shortened(case)
            if order["one_batch"]:
                case = replace(case, problem=partial(on_one_batch, case.problem), epochs=10, steps=10)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    answer: dict[str, Any] = turn(peer, case, order["seed"], Path(folder), backwards=order["backwards"])
            except Exception:
                answer = {"error": traceback.format_exc()}
            freeze()  # what it imported late
            print(json.dumps(answer), file=answers)


# In the process that reports


class FailedError(Exception):
    """A trainer raised an error, or its process ended."""


class Process:
    """The process of one trainer, which sleeps until its turn."""

    def __init__(self, python: str, name: str) -> None:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        drawn = {"TERM": "xterm", "COLUMNS": "100", "LINES": "30", "TQDM_DISABLE": "0"}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.name = name
        self._process = subprocess.Popen(
            [python, __file__, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | one_thread | drawn | offline | {"KERAS_BACKEND": "torch"},
        )
        try:
            hello = self._answer()
        except FailedError:
            self.__exit__()
            raise
        self.version: str | None = hello["version"]
        self.machine: dict[str, str] = hello["machine"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # so that it ends
        self._process.stdout.close()
        self._process.wait()

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """One turn.

        Raises:
            FailedError: The trainer has raised an error, or the process has ended.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # there is no answer then either
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise FailedError(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FailedError(f"the process of {self.name} has ended, with the exit status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Measured:
    """What the turns of one trainer in one case have come to."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    deviations: dict[str, list[float]] = field(default_factory=dict)
    on_one_batch: dict[str, float] = field(default_factory=dict)

    def add(self, answer: Mapping[str, Any]) -> None:
        for way, value in answer["seconds"].items():
            self.seconds.setdefault(way, []).append(value)
        for way, value in answer["deviations"].items():
            self.deviations.setdefault(way, []).append(value)


ROUNDING = 1e-3
"""A deviation that the order in which a sum is taken can explain."""
SAME_TRAINING = 0.05
"""A deviation on one batch that still is the same training: Keras takes Adam's epsilon for another term."""


def measure(case: str, processes: dict[str, Process], rounds: int, *, quick: bool) -> dict[str, Measured]:
    """What the turns came to, of all who took them without an error.

    Raises:
        WrongTrainingError: loopwright, or the loop by hand in another process, came to other bits.
    """
    found = {name: Measured() for name in processes}
    for number in range(-1, rounds + 1):  # at first on one batch; then a round in which everything gets warm
        backwards = number % 2 == 0
        by_hand: dict[str, str] = {}
        for name in reversed(list(found)) if backwards else list(found):
            order = {"case": case, "seed": number, "quick": quick, "backwards": backwards, "one_batch": number < 0}
            try:
                answer = processes[name].ask(order)
                if number < 0:
                    found[name].on_one_batch = answer["deviations"]
                    check_training(answer["deviations"])
            except FailedError as error:
                print(f"{case}, {name}: {error}", file=sys.stderr)
                del processes[name], found[name]
                continue
            by_hand[name] = answer["by_hand"]
            if name == FIRST and any(answer["deviations"].values()):
                raise WrongTrainingError(f"{case}, {name}, round {number}: other bits than by hand")
            if number > 0:
                found[name].add(answer)
        if len(set(by_hand.values())) > 1:
            raise WrongTrainingError(f"{case}, round {number}: the loop by hand differs among processes: {by_hand}")
    return found


def check_training(deviations: Mapping[str, float]) -> None:
    """That what was trained on one batch is what the loop by hand trains."""
    if not all(value <= SAME_TRAINING for value in deviations.values()):
        raise FailedError(f"it has trained something else: {deviations}")


def report(case: Case, rounds: int, found: Mapping[str, Measured]) -> dict[str, Any]:
    """What the measurements say; a ratio compares two runs of one round and one process."""
    return {
        "case": case.name,
        "epochs": case.epochs,
        "steps": case.steps,
        "rounds": rounds,
        "trainers": {
            name: {
                "by_hand_us_per_step": asdict(Spread.of([1e6 * a for a in measured.seconds["by hand"]])),
                **{way: figures(measured, way) for way in measured.deviations},
            }
            for name, measured in found.items()
        },
    }


def figures(measured: Measured, way: str) -> dict[str, Any]:
    pairs = list(zip(measured.seconds["by hand"], measured.seconds[way], strict=True))
    return {
        "us_per_step": asdict(Spread.of([1e6 * b for _, b in pairs])),
        "ratio": asdict(Spread.of([b / a for a, b in pairs])),
        "added_us_per_step": asdict(Spread.of([1e6 * (b - a) for a, b in pairs])),
        "rounds_with_equal_bits": measured.deviations[way].count(0.0),
        "largest_deviation": max(measured.deviations[way]),
        "deviation_on_one_batch": measured.on_one_batch[way],
    }


def bits(found: Mapping[str, Any]) -> str:
    """In words, how the weights compare with those by hand."""
    if found["largest_deviation"] == 0.0:
        return "equal"
    if found["largest_deviation"] <= ROUNDING:
        return f"within {found['largest_deviation']:.0e}"
    return f"other order of samples; on one batch within {found['deviation_on_one_batch']:.0e}"


def as_table(reports: Iterable[Mapping[str, Any]]) -> Table:
    """The reports as rows of cells, the fastest trainer first."""
    rows = [["case", "used", "trainer", "ratio to by hand", "us a step", "by hand, us a step", "weights"]]
    for found in reports:
        for way in ("lean", "as used"):
            ranked = sorted(found["trainers"].items(), key=lambda item: item[1][way]["ratio"]["median"])
            for name, each in ranked:
                ratio, step = Spread(**each[way]["ratio"]).text(2), Spread(**each[way]["us_per_step"]).text(1)
                hand = f"{each['by_hand_us_per_step']['median']:.1f}"
                rows.append([found["case"], way, name, ratio, step, hand, bits(each[way])])
    return rows


def other_bits(each: Mapping[str, Any]) -> str:
    """The mark of a trainer whose weights are not those of the loop by hand, bit for bit."""
    return "" if each["lean"]["largest_deviation"] == each["as used"]["largest_deviation"] == 0.0 else " *"


def draw(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel a case: the ratios with their quartiles, lean as full dots and as used as open ones."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    height = 0.6 + 0.34 * max(len(found["trainers"]) for found in reports)
    figure = Figure(figsize=(8.4, 0.5 + height * ((len(reports) + 1) // 2)), dpi=150, layout="constrained")
    axes = list(figure.subplots((len(reports) + 1) // 2, 2, squeeze=False).flat)
    for ax, found in zip(axes, reports, strict=False):
        trainers = sorted(found["trainers"].items(), key=lambda item: -item[1]["lean"]["ratio"]["median"])
        for y, (name, each) in enumerate(trainers):
            color = "#2f6db3" if name == FIRST else "0.4"
            for way, face in (("lean", color), ("as used", "white")):
                ratio = Spread(**each[way]["ratio"])
                ax.plot([ratio.quartile1, ratio.quartile3], [y, y], color=color, linewidth=1.6)
                ax.plot(ratio.median, y, "o", color=color, markerfacecolor=face, markersize=5)
        ax.axvline(1, color="0.35", linestyle=":", linewidth=1.4)
        ax.set_yticks(range(len(trainers)), [name + other_bits(each) for name, each in trainers])
        ax.set_xscale("log")
        least, most = ax.get_xlim()
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most > 4 * least else (1, 1.2, 1.5, 2, 3, 5, 7, 8, 9)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_title(found["case"], fontsize=11)
        plain_axes(ax)
    for ax in axes[len(reports) :]:
        ax.remove()
    words = "time of the loop by hand = 1; full dots: lean, open dots: as used; *: weights with other bits"
    figure.supxlabel(words, fontsize=9)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="the one with the trainers (default: this)"
    )
    parser.add_argument("--only", nargs="+", choices=list(PEERS), metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=20, help="how often each case is timed (default: 20)")
    parser.add_argument("--quick", action="store_true", help="two rounds of an epoch: they show bits, not times")
    add_outputs(parser, plot=True)
    parser.add_argument("--serve", choices=list(PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve is not None:
        serve(options.serve)
        return
    if options.rounds < 2:
        parser.error("--rounds must be at least 2: a spread needs two values")

    wanted = [name for name in PEERS if name == FIRST or options.only is None or name in options.only]
    with contextlib.ExitStack() as stack:
        try:
            started = {name: stack.enter_context(Process(options.python, name)) for name in wanted}
        except FailedError as error:
            sys.exit(f"{options.python}: {error}")
        missing = [name for name, process in started.items() if process.version is None]
        processes = {name: process for name, process in started.items() if name not in missing}
        reports = []
        try:
            for case in CASES:
                rounds = 2 if options.quick else max(2, options.rounds // 5 if case.name == LONG else options.rounds)
                case = shortened(case) if options.quick else case
                reports.append(report(case, rounds, measure(case.name, processes, rounds, quick=options.quick)))
        except WrongTrainingError as error:
            sys.exit(str(error))

    facts = started[FIRST].machine | {
        **{name: str(process.version) for name, process in processes.items()},
        "not installed": ", ".join(missing) or "none",
    }
    failed = [name for name in wanted if name not in missing and name not in processes]
    table = as_table(reports)
    found = {"machine": facts, "not_installed": missing, "failed": failed, "cases": reports}
    put_out(options, found, table, draw=partial(draw, reports))
    if failed:
        sys.exit(f"an error ended the turns of {', '.join(failed)}")


if __name__ == "__main__":
    main()
