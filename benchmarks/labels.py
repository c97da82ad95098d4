"""Where labels fail: broad images with wrong labels, a long tail of classes, or a tenth of the images.

    python benchmarks/labels.py [--preset tiny] [--bench runs/bench] [--out results/labels_tiny.json]

TeCoA and PMG-AFT read the labels. AGFT, Soft and FARE do not: wrong labels, or none, leave their runs as
they are with clean ones, so these runs are not repeated. With a long tail the largest class has 50 times as
many images as the smallest one, and there are as many images as before. Settings are those that the
benchmark chose with clean labels; with --bench its runs are used again. Interrupted, the same command goes
on.
"""
import time
from functools import partial

import torch
from study import Variant, arguments, compare, runs_of, save

from agft.config import load_preset
from agft.core import seeded
from agft.data import Task, load_task

READ_LABELS, NO_LABELS = ('TeCoA', 'PMG-AFT'), ('AGFT', 'Soft', 'FARE')
IMBALANCE = 50


def training_images(source:str, n:int)->Task: return load_task(source, n, split='train')


def wrong_labels(source:str, n:int, share:float)->Task:
    "A share of the images has the label of another class, drawn at random."
    task = training_images(source, n)
    labels, classes = task.require_labels().clone(), len(task.classes)
    generator = seeded('wrong labels', f'{share}')
    wrong = torch.randperm(len(labels), generator=generator)[:round(share*len(labels))]
    labels[wrong] = (labels[wrong] + torch.randint(1, classes, (len(wrong),), generator=generator)) % classes
    return Task(f'{source}, {share:.0%} wrong', task.images, labels, task.classes, task.templates)


def long_tail(source:str, n:int)->Task:
    "Class sizes fall geometrically; the numbers of the classes are in random order already."
    classes = len(load_task(source, 2).classes)
    share = IMBALANCE**-(torch.arange(classes)/(classes - 1))
    sizes = (n*share/share.sum()).round().long().clamp_min(1)
    task = training_images(source, int(sizes.max())*classes)
    labels = task.require_labels()
    rank = torch.zeros_like(labels)  # how many images of its class come before an image
    for c in range(classes):
        rows = (labels == c).nonzero()[:, 0]
        rank[rows] = torch.arange(len(rows))
    kept = task.choose((rank < sizes[labels]).nonzero()[:, 0])
    return Task(f'{source}, long tail', kept.images, kept.labels, kept.classes, kept.templates)


def main():
    a, began = arguments(__doc__, 'results/labels_tiny.json').parse_args(), time.time()
    recipe = load_preset(a.preset)
    source, n = recipe.data.source, recipe.train.images or 8000
    makers = {'20 % wrong': partial(wrong_labels, source, n, .2),
              '40 % wrong': partial(wrong_labels, source, n, .4),
              'long tail': partial(long_tail, source, n)}
    variants = []
    for method in READ_LABELS + NO_LABELS:
        variants += runs_of(recipe, method, a.seeds, a.bench, f'{method}, clean labels')
        variants += runs_of(recipe, method, a.seeds, None, f'{method}, a tenth', **{'train.images': n//10})
        for condition, make in makers.items():
            if method in READ_LABELS or condition == 'long tail':
                name, whole = f'{method}, {condition}', {'train.images': None}
                runs = runs_of(recipe, method, a.seeds, None, name, **whole)
                variants += [Variant(run.name, run.config, None, make) for run in runs]
    records = compare(recipe, variants, a.runs, a.images)
    save(a, recipe, records, began, f'python benchmarks/labels.py --seeds {a.seeds} --images {a.images}')


if __name__ == '__main__':
    main()
