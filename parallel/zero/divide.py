"""How a model is divided: the submodules whose parameters are gathered together in stage 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

SMALL = 64  # a module with less than the 64th part of all parameters, such as a last norm, is not worth a message

Division = list[tuple[nn.Module, dict[str, nn.Parameter]]]


def divide(root: nn.Module, units: Sequence[nn.Module] | None = None) -> Division:
    """Modules with the parameters that come and go with them, by their names in ``root``; the root's own come first.

    The others are in the order of registration, which mostly is that of execution. Without ``units``: the entries of
    the outermost containers, and modules beside these unless they are small. A parameter of several units, as tied
    ones are, or of none, is the root's.

    Raises ValueError for a unit that is not in the model.
    """
    modules = list(root.modules())
    for unit in units or ():
        if not any(unit is module for module in modules):
            raise ValueError(f"units: {type(unit).__name__} is not a module of {type(root).__name__}")
    if units is None:
        least = sum(p.numel() for p in root.parameters()) / SMALL
        chosen = [m for m, entry in _natural(root) if entry or sum(p.numel() for p in m.parameters()) >= least]
    else:
        chosen = [module for module in modules if module is not root and any(module is unit for unit in units)]
    # Inner units come after those around them, and take their parameters over.
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in chosen:
        around = {outer for outer in chosen if outer is not module and module in outer.modules()}
        for p in module.parameters():
            owners[p] = (owners.get(p, set()) - around) | {module}
    found: dict[nn.Module, dict[str, nn.Parameter]] = {module: {} for module in (root, *chosen)}
    for name, p in root.named_parameters():
        having = owners.get(p, {root})
        found[next(iter(having)) if len(having) == 1 else root][name] = p
    return [(module, params) for module, params in found.items() if params]


def _natural(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The modules, and whether they are entries of a container."""
    for child in module.children():
        if not any(True for _ in child.parameters()):
            continue
        if isinstance(module, CONTAINERS):
            yield child, True
        elif any(isinstance(inner, CONTAINERS) and any(True for _ in inner.parameters()) for inner in child.modules()):
            yield from _natural(child)
        else:
            yield child, False
