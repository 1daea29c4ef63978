"""Why an operation gives what is not finite, and what to do about it, in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CONSTANTS = frozenset(
    [
        "full",
        "full_like",
        "new_full",
        "fill",
        "fill_",
        "masked_fill",
        "masked_fill_",
        "index_fill",
        "index_fill_",
        "constant_",
        "tensor",
        "as_tensor",
        "new_tensor",
        "scalar_tensor",
        "triu",
        "tril",
        "triu_",
        "tril_",
        "where",
        "pad",
        "__setitem__",
    ]
)
"""Where an infinity is what somebody wrote down, as masks are made."""

UNSET = frozenset(
    ["empty", "empty_like", "new_empty", "empty_strided", "empty_permuted", "new_empty_strided", "resize_"]
)
"""What gives memory as it is, to be written to."""

_LOGARITHMS = frozenset(["log", "log2", "log10", "log_", "logit", "log1p"])
_ROOTS = frozenset(["sqrt", "sqrt_", "rsqrt", "rsqrt_"])
_POWERS = frozenset(["pow", "pow_", "__pow__", "__ipow__", "__rpow__", "float_power"])
_DIVISIONS = frozenset(
    [
        "div",
        "div_",
        "divide",
        "true_divide",
        "__truediv__",
        "__itruediv__",
        "__rdiv__",
        "__rtruediv__",
        "__div__",
        "reciprocal",
        "reciprocal_",
    ]
)
_EXPONENTIALS = frozenset(["exp", "exp_", "exp2", "expm1", "sinh", "cosh"])
SOFTMAXES = frozenset(
    [
        "softmax",
        "log_softmax",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "softmin",
        "gumbel_softmax",
    ]
)
_SPREADS = frozenset(["std", "var", "std_mean", "var_mean"])
_DOMAINS = frozenset(["acos", "acos_", "asin", "asin_", "atanh", "acosh"])
_MEANS = frozenset(["mean", "nanmean", "cross_entropy", "nll_loss"])
_NORMS = frozenset(
    ["norm", "vector_norm", "linalg_norm", "linalg_vector_norm", "normalize", "dist", "cdist", "pairwise_distance"]
)
_NORMALISATIONS = frozenset(["layer_norm", "batch_norm", "instance_norm", "group_norm", "rms_norm"])
_BY_NORM = frozenset(["_weight_norm", "weight_norm", "normalize", "cosine_similarity", "cosine_embedding_loss"])
_DECOMPOSITIONS = frozenset(["linalg_eigh", "linalg_eig", "linalg_svd", "svd", "svd_lowrank", "pca_lowrank"])
_DERIVATIVES = frozenset(["grad", "backward", "vjp", "jacrev", "jacfwd", "jacobian", "hessian"])
_SQUARED = 1e-2  # of the root of the largest number: the squares of so many are added up
_MARGIN = "smaller learning rate, inputs and targets scaled to about 1, or a normalisation layer before it"


@dataclass(frozen=True)
class Facts:
    """What is known of one operation.

    Attributes:
        operation: Its name, as torch has it.
        nan: Whether it gave NaN, and not an infinity alone.
        dtype: The number format of what it gave.
        low: The smallest finite number that went in, or None.
        high: The largest.
        infinite: Whether an infinity went in, such as that of a mask.
    """

    operation: str
    nan: bool
    dtype: torch.dtype
    low: float | None = None
    high: float | None = None
    infinite: bool = False


def forward_reason(facts: Facts) -> tuple[str, str]:
    """Why the operation gave it, and the fix."""
    name, low = facts.operation, facts.low
    if facts.dtype == torch.float16 and _largest(facts) > torch.finfo(torch.float16).max:
        return _overflow(facts)  # it was infinite as soon as it was brought into that format
    if not name:
        return (
            "what it does inside could not be seen: scripted code, another thread, or none of torch's functions",
            f"a look at what it does there; the largest number that it was given is {_largest(facts):.4g}",
        )
    if name in _LOGARITHMS and low is not None:
        return (
            f"it has no finite value at or below {-1 if name == 'log1p' else 0}, and was asked for that of {low:.4g}",
            "clamp its argument (x.clamp(min=1e-8).log()), or use a function that is safe there: log_softmax, "
            "logsigmoid, binary_cross_entropy_with_logits",
        )
    if name in _ROOTS | _POWERS and low is not None and facts.nan and low < 0:
        return f"it has no value for {low:.4g}", "clamp its argument: x.clamp(min=0)"
    if name in _ROOTS | _DIVISIONS or (name in _POWERS and low is not None and low == 0):
        return (
            "it divides by zero" + (", and zero by zero is NaN" if facts.nan else ""),
            "add a small number to the divisor, or clamp it: a / b.clamp(min=1e-8)",
        )
    if name in _NORMALISATIONS and facts.nan and not facts.infinite:
        if (largest := _largest(facts)) > _SQUARED * torch.finfo(facts.dtype).max ** 0.5:
            return (
                f"it squares what went in, and {_limit(facts)}; the largest that went in is {largest:.4g}",
                "a smaller learning rate, or inputs and targets scaled to about 1",
            )
        return (
            "it divides by the root of a variance, which is 0 with an eps too small for it, or cannot be computed; "
            "running statistics may hold one below 0",
            "eps=1e-5 or larger, or a look at what is given to it there and at its running_var, if it has one",
        )
    if name in _BY_NORM and facts.nan and not facts.infinite:
        return (
            "it divides by a norm, and that of a row of zeros is 0",
            "give no row that is all 0; begin with other weights than 0",
        )
    if name in _DERIVATIVES:
        return (
            "a derivative that it computes is not finite, though what it is the derivative of may be",
            "keep the arguments of sqrt, norm and pow in there away from 0: (x + 1e-8).sqrt()",
        )
    if name == "ctc_loss" and not facts.nan:
        return (
            "a target that is longer than its input has no alignment, and the loss of none is infinite",
            "zero_infinity=True, or leave such samples out: repeated labels need a place more each",
        )
    if name in SOFTMAXES and facts.infinite:
        return (
            "a row of -inf alone, such as a mask that leaves nothing, has no softmax",
            "leave at least one place of every row unmasked, or mask with a large negative number in place of -inf",
        )
    if name in _SPREADS and facts.nan:
        return (
            "the spread of a single number is 0/0, by default",
            "correction=0, or no batch that is so small (drop_last=True)",
        )
    if name in _DOMAINS:
        return "its argument is outside of where it has a value", "clamp its argument: x.clamp(-1 + 1e-6, 1 - 1e-6)"
    if name in _MEANS and facts.nan:
        return (
            "it is a mean over nothing: no element, or no target that is not ignored",
            "leave out such batches, or divide a sum by max(count, 1)",
        )
    return _overflow(facts)


def _largest(facts: Facts) -> float:
    return max((abs(x) for x in (facts.low, facts.high) if x is not None), default=0.0)


def _limit(facts: Facts) -> str:
    return f"{facts.dtype}".removeprefix("torch.") + f" holds numbers up to {torch.finfo(facts.dtype).max:.4g}"


def _overflow(facts: Facts) -> tuple[str, str]:
    limit = _limit(facts)
    reached = "" if facts.low is None else f"; the largest that went in is {_largest(facts):.4g}"
    if facts.dtype == torch.float16 and (not facts.nan or _largest(facts) > torch.finfo(torch.float16).max):
        return f"{limit}{reached}", 'precision="bf16", whose range is that of fp32, or that part in fp32'
    if facts.nan and not facts.infinite:
        return f"it has no value for some of what went in{reached}", "a look at what is given to it there"
    if facts.infinite and facts.nan:
        return (
            f"an infinity went in, and inf - inf, 0 * inf and inf / inf are NaN{reached}",
            "a look at where the infinity comes from",
        )
    if facts.operation in _EXPONENTIALS:
        return f"{limit}{reached}", "subtract the maximum first (torch.logsumexp, torch.softmax do), or clamp"
    return f"{limit}{reached}", f"a {_MARGIN}"


def backward_reason(operation: str, maker: str = "operation") -> tuple[str, str]:
    """Why a gradient is not finite where those that it was made of are, and the fix.

    Args:
        operation: What it is the derivative of.
        maker: What made it, as ``Backward.maker`` has it.
    """
    if maker == "own":
        return (
            f"what {operation}.backward returns is not finite, though what it was given is",
            f"a look at {operation}.backward: a division by 0, or an overflow",
        )
    if maker.endswith("hook"):
        return "the hook was given finite gradients, and has put others in their place", "a look at that hook"
    if maker == "sum":
        return "each of them is finite, and their sum is too large for the number format", f"a {_MARGIN}"
    if operation in _ROOTS | _POWERS | _NORMS | _SPREADS:
        return (
            "its value is finite, but its derivative at 0 is infinite, and 0 times infinity is NaN",
            "keep its argument away from 0: (x + 1e-8).sqrt(), x.clamp(min=1e-8); torch.where after it does not help",
        )
    if operation in _DIVISIONS | _LOGARITHMS:
        return (
            "its derivative divides by something that is 0, or close to it",
            "clamp its argument before it; torch.where after it does not help, since 0 times infinity is NaN",
        )
    if operation in _DECOMPOSITIONS:
        return (
            "its derivative divides by differences of eigenvalues or singular values, and so by 0 where two are equal",
            "eigvalsh or svdvals where the values alone are needed; else a small diagonal of unlike numbers added to "
            "the matrix",
        )
    if operation in _DOMAINS:
        return "its derivative at the end of its range is infinite", "clamp its argument: x.clamp(-1 + 1e-6, 1 - 1e-6)"
    return "its derivative is too large for the number format, or has no value", f"a {_MARGIN}"
