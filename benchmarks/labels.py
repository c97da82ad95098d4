"""Wrong, rare and few labels: images with wrong labels, a long tail of classes, or a tenth of the images.

    python benchmarks/labels.py [--preset tiny] [--bench runs/bench] [--out results/labels_tiny.json]

TeCoA and PMG-AFT-mean read the labels. AGFT, Soft and FARE do not: wrong labels, or none, leave their runs
as they are with clean ones, so these runs are not repeated. With a long tail the sizes of the classes fall
geometrically, by a factor of 50 before they are rounded, to at least one image. Settings are those that the
benchmark chose with clean labels; with --bench its runs are used again. With --lr only TeCoA is trained, on
wrong labels, at this learning rate. Interrupted, the same command goes on.
"""
import time
from functools import partial
from pathlib import Path

from label_faults import long_tail, wrong_labels
from study import Variant, add_sizes, arguments, runs_of, study

from agft.config import load_preset

READ_LABELS, NO_LABELS = ('TeCoA', 'PMG-AFT-mean'), ('AGFT', 'Soft', 'FARE')


def main():
    p = arguments(__doc__, 'results/labels_tiny.json')
    add_sizes(p)
    p.add_argument('--bench', type=Path, help='directory of `agft bench`, whose runs are used again')
    p.add_argument('--lr', type=float, help='learning rate of TeCoA on wrong labels; nothing else is trained')
    a, began = p.parse_args(), time.time()
    recipe = load_preset(a.preset)
    source, n = recipe.data.source, recipe.train.images or 8000
    makers = {'20 % wrong': partial(wrong_labels, source, n, .2),
              '40 % wrong': partial(wrong_labels, source, n, .4),
              'long tail': partial(long_tail, source, n)}
    whole = {'train.images': None}
    if a.lr:
        del makers['long tail']
        whole |= {'method.lr': a.lr}
    variants = []
    for method in ('TeCoA',) if a.lr else READ_LABELS + NO_LABELS:
        if not a.lr:
            few = {'train.images': n//10}
            variants += runs_of(recipe, method, a.seeds, a.bench, f'{method}, clean labels')
            variants += runs_of(recipe, method, a.seeds, None, f'{method}, a tenth', **few)
        for condition, make in makers.items():
            if method in READ_LABELS or condition == 'long tail':
                runs = runs_of(recipe, method, a.seeds, None, f'{method}, {condition}', **whole)
                variants += [Variant(run.name, run.config, None, make) for run in runs]
    study(a, recipe, variants, began)


if __name__ == '__main__':
    main()
