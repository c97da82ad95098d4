"""What the studies of this folder share: train variants of a recipe, and evaluate them on its test tasks."""
import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from agft import __version__
from agft.bench import describe, evaluate_all, records_of, test_tasks
from agft.config import EvalConfig, FinetuneConfig, Recipe, as_dict, override
from agft.core import NotFinite, on_cluster, parallel_map, pick_device
from agft.diagnostics import Trained
from agft.report import machine
from agft.results import Results, table
from agft.search import run_dir, training_seconds
from agft.threats import threats_of
from agft.train import finetune

class Variant(NamedTuple):
    "A run of a study."
    name:str                  # row of the tables
    config:FinetuneConfig
    folder:Path|None = None   # of the run; None: one of the study's own
    make:Callable|None = None # makes the source task; None: that of the configuration


def train(variant, folder, device):
    "One run, trained or found trained: its weights, or why it diverged. A process of its own can do it."
    try:
        finetune(variant.config, folder, device, task=variant.make and variant.make())
    except NotFinite as e:
        return None, str(e)
    return str(folder/'model.safetensors'), ''


def runs_of(recipe:Recipe, method:str, seeds:int, bench:Path|None, name='', **changes):
    "The runs of a method; without changes they are those of the benchmark in `bench`, if there is one."
    for seed in range(recipe.seed, recipe.seed + seeds):
        config = override(recipe.finetune(method, seed), **changes)
        folder = run_dir(bench, config.method, seed) if bench and not changes else None
        yield Variant(name or method, config, folder)


def study(a, recipe:Recipe, variants:list[Variant], began:float):
    "Train, evaluate and write: the source task and the zero-shot mean, and the runs that diverged."
    with on_cluster(a.scheduler):
        records, diverged = compare(recipe, variants, a.runs, a.images, a.device)
    save(a, recipe, records, began, a.seeds, a.images, diverged=diverged)


def compare(recipe:Recipe, variants:list[Variant], out:Path, images:int, device:str):
    "Train and evaluate: records of the source task and the zero-shot mean, and the runs that diverged."
    jobs = []
    for variant in variants:
        own = out/'runs'/f'{variant.name}-{variant.config.seed}'.replace(' ', '_').replace('/', '_')
        jobs.append((variant, variant.folder or own, device))
    models, diverged = [Trained('CLIP', recipe.seed, recipe.model.name)], []
    for variant, (source, why) in zip(variants, parallel_map(train, jobs, device, 'training'), strict=True):
        if source:
            models.append(Trained(variant.name, variant.config.seed, source))
        else:
            diverged.append(dict(method=variant.name, seed=variant.config.seed, why=why))
    eval = EvalConfig(recipe.eval.attacks[:1], recipe.eval.eps[:1], recipe.eval.norm, images)
    runs = evaluate_all(recipe, models, test_tasks(recipe, images), eval, out/'flags', device)
    return records_of(runs, eval, recipe.data.source, only='brief', first_seed=recipe.seed), diverged


def arguments(doc:str|None, out:str):
    "The command line of a study."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--preset', default='tiny')
    p.add_argument('--runs', type=Path, default=Path('runs')/Path(out).stem, help='directory of the runs')
    p.add_argument('--out', default=out)
    p.add_argument('--device', default='cpu')
    p.add_argument('--scheduler', default='', help='tcp://HOST:PORT of a Dask cluster that does the work')
    return p


def add_sizes(p:argparse.ArgumentParser):
    "The options of a study that trains several seeds and evaluates them."
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--images', type=int, default=50, help='test images a task')


def save(a, recipe:Recipe, records, began:float, seeds:int, images:int, **tables):
    "Write the results with what must stand beside them."
    tasks = test_tasks(recipe, images)
    about = dict(
        command=shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]]),
        version=__version__,
        machine=machine(pick_device(a.device)),
        seeds=seeds,
        threats=describe(threats_of(recipe.eval)[:1], tasks),
        training_seconds=training_seconds(a.runs),
        seconds=round(time.time() - began, 1))
    found = {name: table(rows) for name, rows in tables.items() if rows}
    Results.from_records(records, about=about, config=as_dict(recipe), tables=found).save(a.out)
    print(a.out)
