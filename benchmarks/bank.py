"""The same images, other sentences: narrow prompts against a bank, and banks of several sizes.

    python benchmarks/bank.py [--preset tiny] [--out results/bank_tiny.json]

The images are those of `source-narrow`, whose prompts name colour and shape. Every method that reads
prompts and no labels is trained with these prompts and with a bank of 1,000 captions, for 1, 4 and 8 times
100 steps; FARE reads no prompts. AGFT is also trained with banks of 30 to 10,000 sentences for 400 steps,
seed 0. The runs of 800 steps have one seed. Settings are those of the preset. Interrupted, the same command
goes on.
"""
import time
from dataclasses import replace

from study import add_sizes, arguments, compare, runs_of, save

from agft.config import load_preset

STEPS = 100, 400, 800
SIZES = 30, 100, 300, 1000, 3000, 10000
METHODS = 'FARE', 'Soft', 'AGFT', 'TRADES-AGFT'


def main():
    p = arguments(__doc__, 'results/bank_tiny.json')
    add_sizes(p)
    a, began = p.parse_args(), time.time()
    recipe = load_preset(a.preset)
    narrow = replace(recipe, data=replace(recipe.data, source='source-narrow'))
    variants = []
    for steps in STEPS:
        seeds = 1 if steps == STEPS[-1] else a.seeds
        for method in METHODS:
            for bank in (None,) if method == 'FARE' else (None, 'world'):
                name = f'{method}, {"bank" if bank else "prompts"}, {steps} steps'
                changes = {'train.steps': steps, 'data.bank': bank}
                variants += runs_of(narrow, method, seeds, None, name, **changes)
    for size in SIZES:
        changes = {'train.steps': 400, 'data.bank': 'world', 'data.bank_size': size}
        variants += runs_of(narrow, 'AGFT', 1, None, f'AGFT, {size} sentences', **changes)
    records = compare(narrow, variants, a.runs, a.images)
    save(a, narrow, records, began, a.seeds, a.images)


if __name__ == '__main__':
    main()
