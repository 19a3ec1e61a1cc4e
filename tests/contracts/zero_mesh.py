"""ZeRO around the models, on meshes of every kind: training is that of one process."""

from functools import cache

import torch

import commlayer
from commlayer import Mesh, balanced_sizes
from models.moe import LanguageModel, LanguageModelConfig
from models.vit import ViT, ViTConfig
from parallel import clip_grad_norm_
from parallel.router import Routing
from tests.contracts.tensor import drawn, rand
from tests.contracts.zero import Trace, compare, pieces, whole, wrap

# Nothing divides evenly: on dp=4 a rank has no sample.
SAMPLES, TOKENS, STEPS = 3, 7, 3
ROUTING = Routing(5, 2, normalise=True, balance_loss=0.3, z_loss=0.2)
LANGUAGE = LanguageModelConfig(
    13, 16, 2, 8, 4, hidden=11, every=2, expert_hidden=5, routing=ROUTING, shared=1, tied=True
)
FIELDS = ViTConfig((5, 7), 2, 2, patch=2, embed=16, depth=2, heads=4)
OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, eps=1e-3),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),  # Adam hides a wrong scale
}
LIMITS = {"language": 0.5, "fields": 0.5}


def larger(model):
    """Than they are drawn, so that everything matters."""
    with torch.no_grad():
        for p in model.double().parameters():
            p *= 5
    return model


def make(kind, mesh=None, experts=None, **options):
    if kind == "language":
        return larger(LanguageModel(LANGUAGE, mesh, experts, **options))
    model = ViT(FIELDS, mesh, **options)
    with torch.no_grad():
        model.position.copy_(rand(*model.position.shape, seed=3) / 5)
    return larger(model)


def data(kind, step):
    draw = torch.Generator().manual_seed(step)
    if kind == "language":
        ids, targets = (torch.randint(13, (SAMPLES, TOKENS), generator=draw) for _ in range(2))
        targets[0, 2:5] = -100
        return ids, targets
    return tuple(torch.randn(SAMPLES, 2, 5, 7, generator=draw, dtype=torch.float64) for _ in range(2))


def losses(kind, model, x, y, step):
    """A term of the sum over dp; and what else is to be added up over all ranks."""
    if kind == "fields":
        return (model(x) - y).square().sum() / 100, torch.zeros((), dtype=torch.float64, device=x.device)
    output = model(x, y)
    return output.loss / (data(kind, step)[1] >= 0).sum(), sum(load.loss for load in output.loads)


def total(kind, parts, mesh):
    """The loss of the whole batch, on all ranks. Fields are whole on every rank of cp, text is not; of tp both are."""
    parts = torch.stack([part.detach() for part in parts])
    if mesh is None:
        return parts.sum()
    main, other = commlayer.all_reduce(parts, group=mesh["-".join(mesh.axes)]).cpu()
    copies = (mesh.size("tp") if "tp" in mesh.axes else 1) * (mesh.size("cp") if kind == "fields" else 1)
    return main / copies + other


def train(kind, model, optimizer, share, gain, mesh):
    trace = Trace([], [], [], {})
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = (share(t) for t in data(kind, step))
        parts = losses(kind, model, x, y, step)
        (sum(parts) * gain).backward()
        trace.losses.append(total(kind, parts, mesh))
        trace.grads.append({name: whole(p.grad, p) for name, p in pieces(model)})
        if mesh is None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), LIMITS[kind])
            assert norm > LIMITS[kind]
        else:
            norm = clip_grad_norm_(model, LIMITS[kind], mesh=mesh)
        trace.norms.append(norm)
        optimizer.step()
    trace.params.update({name: whole(p, p) for name, p in pieces(model)})
    return trace


@cache
def serial(kind, optimizer):
    model = drawn(lambda: make(kind))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trace = train(kind, model, OPTIMIZERS[optimizer](model.parameters()), lambda t: t, 1, None)
    for name, p in trace.params.items():
        assert (p - start[name]).abs().max() > 1e-4, f"{name} was not trained"
    return trace


def grid(mesh, fold=None):
    """Sizes of all axes, and how experts are folded; with all groups made, since ranks draw their models one by one."""
    mesh = Mesh(mesh)
    experts = mesh.fold(fold) if fold else None
    for axes in ("ep", "etp-ep", "etp-ep-edp", "edp") if experts else ():
        assert experts[axes]
    for axes in ("-".join(mesh.axes), *mesh.axes):
        assert mesh[axes]
    return mesh, experts


def check(kind, optimizer, stage, mesh, experts=None, model=None, **options):
    """On every rank; ``model``: options of the model. ``serial(kind, optimizer)`` has to be there before."""
    expected = serial(kind, optimizer)
    world = mesh["-".join(mesh.axes)]
    places = (mesh, experts) if kind == "language" else (mesh,)
    inner = drawn(lambda: make(kind, *places, **(model or {}))).to(world.device)
    chosen = OPTIMIZERS[optimizer](inner.parameters())
    wrapped = wrap(inner, chosen, stage, mesh=mesh, experts=experts, **options)

    def share(t):
        return t.split(balanced_sizes(SAMPLES, mesh.size("dp")))[mesh.rank("dp")].to(world.device)

    compare(train(kind, wrapped, chosen, share, mesh.size("dp"), mesh), expected)
