"""The same images, other sentences: narrow prompts against a bank, and banks of several sizes.

    python benchmarks/bank.py [--preset tiny] [--out results/bank_tiny.json]
    python benchmarks/bank.py --preset photo --source tinyimagenet --bank clip-names --steps 400 --sizes 0 \\
           --out results/bank_photo.json --runs runs/bank_photo

The images are those of `source-narrow`, whose prompts name colour and shape. AGFT and Soft are trained with
these prompts and with a bank of 1,000 captions, for 1, 4 and 8 times 50 steps; FARE reads no prompts. AGFT is
also trained with banks of 30 to 10,000 sentences for 200 steps, seed 0. Settings are those of the preset.
Interrupted, the same command goes on.
"""
import time
from dataclasses import replace

from study import add_sizes, arguments, runs_of, study

from agft.config import load_preset

METHODS = 'FARE', 'Soft', 'AGFT'


def numbers(text): return [int(word) for word in text.split(',')]


def main():
    p = arguments(__doc__, 'results/bank_tiny.json')
    add_sizes(p)
    p.add_argument('--source', default='source-narrow', help='task of the images')
    p.add_argument('--bank', default='world')
    p.add_argument('--steps', type=numbers, default=[50, 200, 400])
    p.add_argument('--sizes', type=numbers, default=[30, 100, 300, 1000, 3000, 10000],
                   help='sentences of the banks that AGFT is trained with; 0: none')
    a, began = p.parse_args(), time.time()
    recipe = load_preset(a.preset)
    recipe = replace(recipe, data=replace(recipe.data, source=a.source))
    variants = []
    for steps in a.steps:
        for method in METHODS:
            for bank in (None,) if method == 'FARE' else (None, a.bank):
                name = f'{method}, {"bank" if bank else "prompts"}, {steps} steps'
                changes = {'train.steps': steps, 'data.bank': bank}
                variants += runs_of(recipe, method, a.seeds, None, name, **changes)
    for size in filter(None, a.sizes):
        changes = {'train.steps': 200, 'data.bank': a.bank, 'data.bank_size': size}
        variants += runs_of(recipe, 'AGFT', 1, None, f'AGFT, {size} sentences', **changes)
    study(a, recipe, variants, began)


if __name__ == '__main__':
    main()
