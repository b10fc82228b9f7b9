"""Engines (filter, smooth, forecast, log_prob, sample, impute) and learners (fit).

An engine is a module with one function for each verb, ``verb(model, batch, ...)``; a learner is
a function ``(model, batch, *, method, generator, progress, **options) -> FitReport``. Which ones a
model admits, it says itself (`SequenceModel.engines`, `SequenceModel.learners`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqdgm.model import SequenceModel
    from seqdgm.results import FitReport

ENGINES = {
    "kalman": "seqdgm.inference.kalman",
    "ekf": "seqdgm.inference.ekf",
    "ukf": "seqdgm.inference.ukf",
    "particle": "seqdgm.inference.particle",
    "rao-blackwell": "seqdgm.inference.rao_blackwell",
    "abc": "seqdgm.inference.abc",
    "variational": "seqdgm.inference.variational",
}
APPROXIMATE = frozenset({"ekf", "ukf", "abc"})
# What the verbs themselves pass to an engine.
_GIVEN = frozenset(
    {"model", "batch", "n_particles", "generator", "horizon", "start", "panel", "transform"}
)
LEARNERS = {
    "quasi-newton": ("seqdgm.inference.mle", "fit"),
    "order-search": ("seqdgm.inference.order_search", "fit"),
    "em": ("seqdgm.inference.em", "fit"),
    "gradient": ("seqdgm.inference.training", "fit"),
    "given": ("seqdgm.inference.given", "fit"),
    "quasi-likelihood": ("seqdgm.inference.quasi_likelihood", "fit"),
    "particle-score": ("seqdgm.inference.particle_score", "fit"),
    "particle-em": ("seqdgm.inference.particle_em", "fit"),
    "regime-em": ("seqdgm.inference.regime_em", "fit"),
    "particle-em-networks": ("seqdgm.inference.particle_em", "fit_networks"),
}


def find_verb(
    model: SequenceModel, method: str, verb: str, options: Collection[str]
) -> Callable[..., Any]:
    """Return the function of a verb, from the engine named or the most exact one that has it.

    Raises
    ------
    ValueError
        If the model does not admit the engine named, the engine lacks the verb, or the verb has no
        option of a name.
    """
    if method == "auto":
        offers = [name for name in model.engines if _verb(name, verb)]
        if not offers:
            raise ValueError(
                f"{type(model).__name__} has no {verb}: none of its engines {list(model.engines)} "
                "offers it"
            )
        # The most exact engine that knows what was asked for; an approximation only by its name.
        trusted = [name for name in offers if name not in APPROXIMATE] or offers
        method = next((name for name in trusted if _takes(_verb(name, verb), options)), trusted[0])
    run = _verb(method, verb) if method in model.engines else None
    if run is None:
        able = [name for name in model.engines if _verb(name, verb)]
        raise ValueError(
            f"{type(model).__name__}.{verb} has no method {method!r}; choose 'auto' or one of "
            f"{able}"
        )
    if not _takes(run, options):
        known = sorted(option_names(run) - _GIVEN)
        raise ValueError(
            f"{verb} by {method!r} has no options {sorted(set(options) - set(known))}; it takes "
            f"{known}"
        )
    return run


def offers(model: SequenceModel, verb: str) -> bool:
    """Whether one of the model's engines has a verb."""
    return any(_verb(name, verb) is not None for name in model.engines)


def _verb(engine: str, verb: str) -> Callable[..., Any] | None:
    found: Callable[..., Any] | None = getattr(import_module(ENGINES[engine]), verb, None)
    return found


def _takes(function: Callable[..., Any] | None, options: Collection[str]) -> bool:
    if not options:
        return True
    return function is not None and set(options) <= option_names(function) - _GIVEN


@cache
def option_names(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's parameters, those of an unpacked TypedDict included."""
    names: set[str] = set()
    for name, parameter in signature(function).parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            unpacked = str(parameter.annotation).removeprefix("Unpack[").removesuffix("]")
            names |= function.__globals__[unpacked].__optional_keys__
        else:
            names.add(name)
    return frozenset(names)


def find_learner(model: SequenceModel, method: str | None) -> tuple[str, Callable[..., FitReport]]:
    """Return the name and function of a learning method; None takes the model's default."""
    if method is None:
        method = next(iter(model.learners))
    if method not in model.learners:
        raise ValueError(
            f"{type(model).__name__}.fit has no method {method!r}; choose one of "
            f"{list(model.learners)}"
        )
    module, function = LEARNERS[model.learners[method]]
    learner: Any = getattr(import_module(module), function)
    return method, learner


def check_options(learner: Callable[..., FitReport], options: dict[str, Any], name: str) -> None:
    """Raise a ValueError for an option of `fit` that the learner does not have."""
    parameters = signature(learner).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return  # the learner checks them itself
    known = set(parameters) - {"model", "batch", "method", "generator", "progress"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"{name}.fit has no options {unknown}; this learning method takes {sorted(known)}"
        )


def warm_up(model: SequenceModel) -> None:
    """Import and compile, once a process, what the model's verbs will need.

    Nothing changes but the time of the first call: timings that should not contain it call this
    first.
    """
    modules = [import_module(ENGINES[name]) for name in model.engines]
    modules += [import_module(LEARNERS[name][0]) for name in model.learners.values()]
    for module in modules:
        if hasattr(module, "warm_up"):
            module.warm_up()
    compile_search: Any = getattr(model, "compile_search", None)
    if compile_search:  # the model has a search with its likelihood compiled in
        compile_search()
