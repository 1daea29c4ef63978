"""What a checkpoint can hold comes back exactly as it was, and nothing else can be put in."""

from __future__ import annotations

import collections
import enum
import json
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from loopwright import CheckpointError
from loopwright.forms import Count, _check, _fitting
from loopwright.monitor import Judged
from loopwright.plain import MAX_DEPTH, MAX_VALUES, decode, encode, fits_safetensors, from_json, to_json

keys = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
plain = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(keys, inner), st.dictionaries(st.text(), inner)
    ),
    max_leaves=30,
)


def through(value: Any) -> Any:
    """The value as a checkpoint would return it: by way of JSON text, and tensors by name."""
    tree, tensors = encode(value)
    return decode(from_json(to_json(tree)), tensors)


def exactly(value: Any) -> Any:
    """The value in a form in which only the very same one is equal: by type, order and bits."""
    if isinstance(value, Tensor):
        return bits(value)
    if type(value) is float:
        return "float", struct.pack("<d", value) if not math.isnan(value) else "nan"
    if type(value) in (list, tuple):
        return type(value).__name__, [exactly(item) for item in value]
    if type(value) is dict:
        return "dict", [(exactly(key), exactly(item)) for key, item in value.items()]
    return type(value).__name__, value


def bits(tensor: Tensor) -> Any:
    if tensor.layout is torch.sparse_coo:
        return "sparse", tensor.shape, tensor.is_coalesced(), bits(tensor._indices()), bits(tensor._values())
    if tensor.is_complex():
        return tensor.dtype, bits(torch.view_as_real(tensor.resolve_conj()))
    whole = tensor.resolve_neg().contiguous()
    return (
        tensor.dtype,
        tensor.shape,
        whole.view(torch.uint8).tolist() if whole.dim() else whole.reshape(1).view(torch.uint8).tolist(),
    )


@given(plain)
def test_plain_data_comes_back_by_exact_type_order_and_bits(value: Any) -> None:
    assert exactly(through(value)) == exactly(value)


@given(plain)
def test_the_same_data_gives_the_same_bytes(value: Any) -> None:
    assert to_json(encode(value)[0]) == to_json(encode(through(value))[0])


@given(plain)
def test_what_is_written_is_json_that_any_reader_takes(value: Any) -> None:
    json.loads(to_json(encode(value)[0]), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "value",
    [-0.0, 5e-324, math.nan, math.inf, -math.inf, 2**64, -(2**4000), "", "\0", "$tensor", "a.b", "\u2028", "\U0001f600",
     {"$tensor": "a"}, {"$tuple": [1]}, {"$": 1}, {1: "a", "1": "b"}, {True: 1, "True": 2}, {None: 1, "None": 2},
     {-0.0: 1}, {math.inf: 1}, {math.nan: 1}, (), ((),), [], {}, {"": {"": ()}}, (1, [2, (3, {4: (5,)})])],
    ids=repr,
)  # fmt: skip
def test_an_odd_value_comes_back_as_it_was(value: Any) -> None:
    assert exactly(through(value)) == exactly(value)


DTYPES = sorted({dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}, key=str)
UNSAVED = {"qint8", "qint32", "quint8", "quint4x2", "quint2x4", "bits1x8", "bits2x4", "bits4x2"}
UNSAVED |= {f"{sign}int{n}" for sign in ("", "u") for n in range(1, 8)}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_type_that_torch_can_copy_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    if str(dtype).removeprefix("torch.") in UNSAVED:
        unsaved = torch.empty(2, dtype=dtype) if not str(dtype).startswith("torch.q") else quantized()
        with pytest.raises(CheckpointError, match=r"^\[checkpoint\] \$\.a\[0\]: torch\.Tensor cannot be saved"):
            encode({"a": [unsaved]})
        return
    raw = torch.arange(48, dtype=torch.uint8)
    tensor = (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)
    for shaped in (tensor, tensor[:3], tensor.reshape(-1, 3), tensor[0], tensor[:0], tensor.reshape(-1, 3).t()):
        assert exactly(through([shaped])) == exactly([shaped])


def quantized() -> Tensor:
    return torch.ops.aten.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)  # type: ignore[no-any-return]  # torch's operators have no types


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::3],
        torch.ones(1).expand(5),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex128).conj().imag,
        torch.randn(2, 2, dtype=torch.complex128).t(),
        torch.eye(3).to_sparse(),
        torch.sparse_coo_tensor(torch.tensor([[1, 1, 0]]), torch.tensor([1.0, 2.0, 3.0]), (4,), check_invariants=True),
        torch.sparse_coo_tensor(torch.zeros(2, 0).long(), torch.zeros(0, 3), (2, 2, 3), check_invariants=True),
        torch.eye(2, dtype=torch.complex64).to_sparse(),
        nn.Parameter(torch.ones(2)),
        torch.ones(2, requires_grad=True) * 2,
        torch.tensor([math.nan, -0.0, math.inf]),
        torch.empty(0, 3),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tensor.layout} {tuple(tensor.shape)}",
)
def test_a_tensor_of_any_make_comes_back_bit_for_bit(tensor: Tensor) -> None:
    back = through(tensor)
    assert exactly(back) == exactly(tensor.detach())
    assert type(back) is Tensor
    assert not back.requires_grad


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc], ids=str)
def test_a_compressed_sparse_tensor_comes_back_bit_for_bit(layout: torch.layout, dtype: torch.dtype) -> None:
    blocks = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    tensor = torch.eye(4, dtype=dtype).to_sparse(layout=layout, blocksize=blocks)
    back = through(tensor)
    assert (back.layout, back.dtype, back.shape) == (layout, dtype, tensor.shape)
    assert exactly(back.values().clone()) == exactly(tensor.values().clone())
    assert torch.equal(back.to_dense(), tensor.to_dense())


def test_tied_tensors_come_back_as_equal_ones() -> None:
    tied = torch.arange(4.0)
    assert exactly(through([tied, tied, tied[1:]])) == exactly([tied, tied, tied[1:]])


def test_the_keys_1_and_the_text_1_keep_tensors_apart() -> None:
    value = {1: torch.ones(1), "1": torch.zeros(1), "1'": torch.full((1,), 2.0)}
    assert exactly(through(value)) == exactly(value)


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Level(enum.IntEnum):
    LOW = 1


class Pair(tuple[int, int]):
    __slots__ = ()


Point = collections.namedtuple("Point", "x y")  # the plain one is what is refused


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.int64(1), "numpy.int64"),
        (np.zeros(2), "numpy.ndarray"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        (collections.Counter("a"), "collections.Counter"),
        (collections.defaultdict(int), "collections.defaultdict"),
        (Text("a"), "test_plain.Text"),
        (Number(1), "test_plain.Number"),
        (Level.LOW, "test_plain.Level"),
        (Pair((1, 2)), "test_plain.Pair"),
        (Point(1, 2), "test_plain.Point"),
        ({1}, "set"),
        (b"a", "bytes"),
        (1j, "complex"),
        (range(2), "range"),
        (print, "builtin_function_or_method"),
        (int, "type"),
        (torch.float32, "torch.dtype"),
        (torch.device("cpu"), "torch.device"),
        (torch.Size([1]), "torch.Size"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_refused_with_its_path_and_its_type(value: Any, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        encode({"callbacks": {"MyCallback": {"best": value}}})
    assert caught.value.what == f"$.callbacks.MyCallback.best: {name} is not plain data"
    assert "exactly None, bool, int, float, str, list, tuple, dict and tensors" in caught.value.why


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ([1, (2, {"a": {1}})], "$[1][1].a"),
        ({3: {"b": [None, b""]}}, "$.3.b[1]"),
        ({(1, 2): 1}, "$.(1, 2)"),
        ({b"a": 1}, "$.b'a'"),
        ({Text("a"): 1}, "$.a"),
        ({np.int64(3): 1}, "$.3"),
    ],
)
def test_the_path_says_where_it_is(value: Any, path: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        encode(value)
    assert caught.value.what.startswith(f"{path}: ")


class Labelled(Tensor):
    """A tensor of a user's own class, which would come back without what the class adds."""


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.empty(2, device="meta"),
        lambda: Labelled(torch.ones(1)),
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        quantized,
        lambda: "\ud800",
        lambda: {"\udfff": 1},
        lambda: "\ud83d\ude00",  # as two halves, which JSON would join
        lambda: 2**5000,
    ],
    ids=[
        "meta",
        "of a class of its own",
        "nested",
        "quantized",
        "half a pair",
        "half a pair as key",
        "two halves",
        "huge",
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested.*:UserWarning")
def test_what_has_no_exact_form_is_refused_with_the_reason(made: Callable[[], Any]) -> None:
    value = made()
    with pytest.raises(CheckpointError, match=r"\$\.a") as caught:
        encode({"a": value})
    assert caught.value.why


def test_data_that_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(CheckpointError, match="contains itself"):
        encode(value)


@pytest.mark.parametrize(
    "wrap",
    [lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: {1: v}],
    ids=["list", "tuple", "dict", "int key"],
)
def test_what_is_as_deep_as_can_be_saved_can_be_read(wrap: Any) -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = wrap(value)
    assert exactly(through(value)) == exactly(value)
    with pytest.raises(CheckpointError, match=f"more than {MAX_DEPTH} deep"):
        encode(wrap(value))


@pytest.mark.parametrize("row", [[0] * (MAX_VALUES + 1), ["a"] * (MAX_VALUES + 1), [[]] * MAX_VALUES])
def test_what_is_too_much_to_be_read_is_refused_when_it_is_saved(row: list[Any]) -> None:
    with pytest.raises(CheckpointError, match="more than") as caught:
        to_json(row)
    assert caught.value.fix == "keep long rows of numbers in tensors"


def test_as_much_as_is_written_is_read() -> None:
    assert len(from_json(to_json([0] * (MAX_VALUES - 1)))) == MAX_VALUES - 1


def test_brackets_and_quotes_in_text_count_for_nothing() -> None:
    value = ["[" * 500, "\\", '"' + "[" * 500, '\\"' + "{" * 500, "a\\\\" * 300, ',"' * 10]
    assert from_json(to_json(value)) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_with_the_librarys_own_error(data: bytes) -> None:
    try:
        from_json(data)
    except CheckpointError:
        hypothesis.target(0)


json_trees = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(
            st.sampled_from(["$tuple", "$dict", "$float", "$tensor", "$complex", "$sparse", "$bits", "$other", "a"]),
            st.one_of(inner, st.just("t"), st.lists(st.lists(inner, max_size=2), max_size=3)),
            max_size=2,
        ),
    ),
    max_leaves=20,
)


@given(json_trees)
def test_any_tree_is_decoded_to_plain_data_or_refused_with_the_librarys_own_error(tree: Any) -> None:
    try:
        found = decode(tree, {"t": torch.ones(2, 2)})
    except CheckpointError:
        return
    assert set(kinds(found)) <= {"NoneType", "bool", "int", "float", "str", "list", "tuple", "dict", "Tensor"}


def kinds(value: Any) -> Iterator[str]:
    yield type(value).__name__
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from kinds(item)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from kinds(key)
            yield from kinds(item)


def test_safetensors_holds_what_is_said_to_fit_it() -> None:
    import safetensors.torch

    fitting = []
    for dtype in DTYPES:
        if str(dtype).removeprefix("torch.") not in UNSAVED | {"complex32"}:
            raw = torch.arange(16, dtype=torch.uint8)
            tensor = (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)
            if fits_safetensors("a", tensor):
                fitting.append(dtype)
                assert exactly(safetensors.torch.load(safetensors.torch.save({"a": tensor}))["a"]) == exactly(tensor)
    assert {torch.float32, torch.bfloat16, torch.int64, torch.bool} < set(fitting)
    assert not fits_safetensors("__metadata__", torch.ones(1))
    assert not fits_safetensors("\ud800", torch.ones(1))
    assert not fits_safetensors("a", torch.eye(2).to_sparse())
    assert not fits_safetensors("a", 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_whole_numbers_of_up_to_4096_bits_are_saved(sign: int) -> None:
    number = sign * (2**4096 - 1)
    assert from_json(to_json(encode(number)[0])) == number
    with pytest.raises(CheckpointError, match="more than 4096 bits"):
        encode(number + sign)


_FORMS: list[Any] = [
    Any, None, Count, int, float, bool, str, Tensor, int | None, float | Tensor, list[int], list[float | None],
    tuple[int, str], tuple[int, ...], dict[str, float], dict[str, Any], dict[int, list[str]], Judged, Judged | None,
    dict[str, float | Tensor], tuple[int, Tensor, float | None] | None,
]  # fmt: skip
_JUDGED = {"name": "val/loss", "mode": "min", "best": 0.5, "judged": 3}
_VALUES: list[Any] = [
    None, True, 0, 1, -1, 2**63 - 1, 2**63, 0.5, math.nan, "", "a", torch.ones(2), [], [1], [1, None], [True], ["a"],
    (), (1,), (1, "a"), (1, 2, 3), {}, {"a": 1.0}, {"a": 1}, {"a": torch.ones(1)}, {1: ["a"]}, {1: [1]}, {"a": "b"},
    (3, torch.ones(1), None), (3, torch.ones(1), "a"), _JUDGED, {**_JUDGED, "best": None}, {**_JUDGED, "judged": -1},
    {**_JUDGED, "more": 1}, {"name": "a"},
]  # fmt: skip


@pytest.mark.parametrize("form", _FORMS, ids=str)
def test_the_quick_look_at_a_form_says_what_the_thorough_one_does(form: Any) -> None:
    def thorough(value: Any) -> bool:
        try:
            return _check(value, form, "$")
        except CheckpointError:
            return False

    assert [_fitting(form)(value) for value in _VALUES] == [thorough(value) for value in _VALUES]
    assert any(thorough(value) for value in _VALUES)
    assert form is Any or not all(thorough(value) for value in _VALUES)
