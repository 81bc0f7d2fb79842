"""The `moefx` command. Every command takes `--json`; errors go to standard error with exit status 2."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import moefx

from .errors import InputError, MoefxError
from .files import json_text
from .grouter.cli import app as grouter_app
from .passes import get_pass, pass_names
from .precision.recipe import get_recipe
from .view.casts import cast_table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a MoefxError is a message, not a traceback
    help="A compiler for Mixture-of-Experts training.",
)
app.add_typer(grouter_app, name="grouter")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
MODEL_HELP = "'default', a transformers config.json or its folder, or module:factory."
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]


@app.command()
def train(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "default",
    data: Annotated[list[Path] | None, typer.Option(help="Text files, or one .bin file of tokens.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, metrics and report.json.")] = Path("runs/default"),
    steps: Annotated[int, typer.Option(help="Training steps.")] = 200,
    batch: Annotated[int, typer.Option(help="Sequences per microbatch.")] = 8,
    seq: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    grad_accum: Annotated[int, typer.Option(help="Microbatches per step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of data.")] = 0,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 (autocast).")] = "fp32",
    optim: Annotated[str, typer.Option(help="adamw, muon, muon-lite, soap or soap-lite.")] = "adamw",
    recipe: Annotated[str, typer.Option(help="Precision recipe (moefx recipes).")] = "bf16",
    router: Annotated[
        str, typer.Option(help="learned, distilled (docs/grouter.md), or a Grouter's folder.")
    ] = "learned",
    losses: Annotated[
        str, typer.Option(help="Losses of routing, and metrics: sp=1e-3,cp,metrics. With --router: lb,z unless given.")
    ] = "",
    codegen: Annotated[str, typer.Option(help="inductor or eager.")] = "inductor",
    compare: Annotated[
        str | None, typer.Option(help="Train the original too: all (unless given), none, or a number of steps.")
    ] = None,
    precision_every: Annotated[int, typer.Option(help="Log what casts lose every so many steps; 0: never.")] = 0,
    places: Annotated[int | None, typer.Option(help="With metrics: traffic of experts on N places.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a model through moefx on real text, and the original beside it; ends with a table and report.json.

    Without --data the text is the documentation and the sources of the Python standard library, as bytes. With
    --router distilled, a teacher is trained first, and the model is trained with learned routers and routed by a
    Grouter that imitates the teacher's.
    """
    from .train import story
    from .train.config import TrainConfig
    from .train.console import LastingConsole
    from .train.interrupt import stoppable

    if router != "learned" and compare is not None:
        todo = "leave --compare out: with --router the model is compared with itself, by learned routers"
        raise InputError("--compare is given with --router", todo=todo)
    cfg = TrainConfig(
        steps=steps, batch=batch, seq=seq, grad_accum=grad_accum, lr=lr, seed=seed, dtype=dtype, optim=optim, out=out,
        threads=threads, precision_every=precision_every, places=places,
    )  # fmt: skip
    console = LastingConsole(stderr=as_json)
    common: dict[str, Any] = {"model": model, "data": data or (), "cfg": cfg, "recipe": recipe, "resume": resume}
    with stoppable(cfg.out, resume):
        if router != "learned":
            from .train.routing_story import run_routing

            options: dict[str, Any] = {"codegen": codegen}
            result = run_routing(**common, router=router, losses=losses or "lb,z", options=options, console=console)
        else:
            options = {"codegen": codegen, "losses": losses}
            compare = "all" if compare is None else compare
            result = story.run_training(**common, compare=compare, options=options, console=console)
    if as_json:
        print(json_text(result, default=str))


@app.command()
def inspect(
    model: Model = "default",
    batch: Annotated[int, typer.Option(help="Sequences in the example input.")] = 2,
    seq: Annotated[int, typer.Option(help="Tokens per sequence in the example input.")] = 32,
    recipe: Annotated[str, typer.Option(help="Precision recipe (moefx recipes).")] = "bf16",
    codegen: Annotated[str, typer.Option(help="inductor or eager.")] = "eager",
    verify: Annotated[bool, typer.Option(help="Compare outputs and gradients around every pass.")] = False,
    router: Annotated[Path | None, typer.Option(help="A Grouter's folder: route the model by it.")] = None,
    stage: Annotated[str | None, typer.Option(help="Print the graph after this stage or pass.")] = None,
    diff: Annotated[tuple[str, str] | None, typer.Option(help="Print what changed between two stages.")] = None,
    routing: Annotated[bool, typer.Option("--routing", help="Measure routing instead: load, entropy, paths.")] = False,
    out: Annotated[Path | None, typer.Option(help="With --routing: draw PNG files and routing.html there.")] = None,
    batches: Annotated[
        int | None, typer.Option(help="With --routing: example inputs to measure; 16 unless given.")
    ] = None,
    data: Annotated[list[Path] | None, typer.Option(help="With --routing: text files, or one .bin file.")] = None,
    weights: Annotated[Path | None, typer.Option(help="With --routing: .safetensors file, checkpoint or run.")] = None,
    places: Annotated[int | None, typer.Option(help="With --routing: traffic of experts on N places.")] = None,
    as_json: AsJson = False,
) -> None:
    """Optimize a model and show the report, the graph of a stage, or the difference between two.

    With --routing, run text (random ids where the vocabulary is not that of bytes) through it, and show its routing.
    With --router, both are those of the model routed by a Grouter.
    """
    from .models.grouter import Grouter
    from .train.models import load_model

    of_routing = {"out": out, "data": data or None, "weights": weights, "places": places, "batches": batches}
    of_graphs = {"stage": stage, "diff": diff, "verify": verify or None}
    if lone := next((n for n, v in (of_graphs if routing else of_routing).items() if v is not None), None):
        if routing:
            raise InputError(f"--{lone} is given with --routing", todo="give one of both: --routing shows no graphs")
        raise InputError(f"--{lone} is given without --routing", todo="add --routing")
    batches = 16 if batches is None else batches
    if low := next((n for n, v in {"batch": batch, "seq": seq, "batches": batches}.items() if v < 1), None):
        raise InputError(f"--{low} is out of range", todo="choose at least 1")
    grouter = None if router is None else Grouter.from_pretrained(router)
    if routing:
        from .train.inspect_routing import inspect_routing

        found, said = inspect_routing(
            model, batch=batch, seq=seq, batches=batches, data=data or (), weights=weights, places=places, out=out,
            options={"recipe": recipe, "codegen": codegen, "router": grouter}, router=str(router or ""),
        )  # fmt: skip
        print(json_text(found) if as_json else said)
        return
    module = load_model(model, 0).train()
    vocab = int(getattr(getattr(module, "config", None), "vocab_size", 256))
    ids = torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "labels": ids}
    opt = moefx.optimize(module, example, recipe=recipe, codegen=codegen, verify=verify, router=grouter)
    wanted = [s for s in (stage, *(diff or ())) if s is not None]
    for name in wanted:
        if name not in opt.graphs:
            raise InputError(f"no stage named {name!r}", todo=f"stages of this run: {', '.join(opt.graphs)}")
    graphs: dict[str, Any] = {}
    if stage is not None:
        graphs["stage"] = moefx.render(opt.graphs[stage])
    if diff is not None:
        graphs["diff"] = moefx.diff(opt.graphs[diff[0]], opt.graphs[diff[1]])
    if as_json:
        print(json_text({**opt.report.to_dict(), "graphs": list(opt.graphs), **graphs}))
    else:
        text = str(opt.report)
        if opt.report.casts["rows"]:
            text += "\n\n" + cast_table(opt.report.casts)
        print("\n".join(graphs.values()) if graphs else text + f"\n\ngraphs: {', '.join(opt.graphs)}")


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the precision recipes."""
    rows = {name: get_recipe(name) for name in moefx.recipes}
    if as_json:
        every = {name: dataclasses.asdict(r) for name, r in rows.items()}
        print(json_text({name: {f: v for f, v in r.items() if f != "name"} for name, r in every.items()}))
    else:
        for name, r in rows.items():
            print(f"{name}: {r.about}")
            for spec in dict.fromkeys(r.specs.values()):
                print(f"  {spec:<32} {', '.join(k for k, s in r.specs.items() if s == spec)}")


@app.command()
def passes(as_json: AsJson = False) -> None:
    """List the registered passes with their contracts."""
    rows = []
    for name in pass_names():
        p = get_pass(name)
        about = (type(p).__doc__ or "").strip().splitlines()
        rows.append(
            {
                "name": name,
                "level": p.level,
                "numerics": p.numerics,
                "requires": sorted(p.requires),
                "provides": sorted(p.provides),
                "about": about[0] if about else "",
            }
        )
    if as_json:
        print(json_text(rows))
    else:
        width = max(len(r["name"]) for r in rows) + 2
        for r in rows:
            print(f"{r['name']:<{width}}{r['level']:<10}{r['numerics']:<10}{r['about']}")


def main() -> None:
    """Entry point: run the command; a MoefxError becomes a message and exit status 2."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    try:
        app()
    except MoefxError as e:
        if "--json" in sys.argv:
            print(
                json_text(
                    {
                        "error": {
                            "type": type(e).__name__,
                            "what": e.what,
                            "where": e.where,
                            "why": e.why,
                            "todo": e.todo,
                        }
                    }
                )
            )
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
