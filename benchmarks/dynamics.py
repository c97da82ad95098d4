"""How long is long enough: cosine margins, robust and zero-shot accuracy while AGFT, Soft and TeCoA train.

    python benchmarks/dynamics.py [--preset tiny] [--every 10] [--out results/dynamics_tiny.json]

Each run is that of the preset, seed 0, measured every few steps: the factor between the student's cosine
margins and the teacher's on 100 validation images of the source, accuracy of the batch under the attack of
training, and zero-shot accuracy, clean and under PGD-20, on 20 validation images of each test task. AGFT is
also trained with a warm-up of the student's logit scale. Interrupted, the same command goes on.
"""
import time
from pathlib import Path

from study import arguments, save

from agft.config import load_preset, override
from agft.core import on_cluster, open_run, parallel_map
from agft.data import tasks_of
from agft.loop import Validation, fit, read_log
from agft.train import prepare_run, validation_of

RUNS = {'TeCoA': ('TeCoA', {}), 'Soft': ('Soft', {}), 'AGFT': ('AGFT', {}),
        'AGFT, warm-up of the scale': ('AGFT', {'method.scale_warmup': .3})}
SOURCE_IMAGES, TASK_IMAGES = 100, 20


def ignore(steps, found): pass


def follow(recipe, name, folder:Path, every, device):
    "Train one run and measure it; the lines of its log."
    method, changes = RUNS[name]
    config = override(recipe.finetune(method), **changes, **{'train.validate_every': every,
                                                             'train.validate_images': SOURCE_IMAGES})
    run = prepare_run(config, device)
    student, teacher, _ = run.models
    watched = [run.validation, *tasks_of(config.data, recipe.data.zero_shot, TASK_IMAGES, 'val')]
    source, *others = [validation_of(student, teacher, task, config.attack, 128) for task in watched]
    def measure():
        found = [other() for other in others]
        means = {f'zero_shot_{kind}': sum(f[kind] for f in found)/len(found) for kind in ('clean', 'robust')}
        return source() | means
    with open_run(folder, run.about):
        fit(student, run.loss_fn(folder), folder, config.train, config.method.lr, name, run.about,
            validation=Validation(every, measure, ignore))
    return [dict(method=name, **line) for line in read_log(folder)]


def main():
    p = arguments(__doc__, 'results/dynamics_tiny.json')
    p.add_argument('--every', type=int, default=10, help='steps between two measurements')
    a, began = p.parse_args(), time.time()
    recipe = load_preset(a.preset)
    jobs = [(recipe, name, a.runs/'runs'/name.replace(' ', '_'), a.every, a.device) for name in RUNS]
    with on_cluster(a.scheduler):
        lines = [line for found in parallel_map(follow, jobs, a.device, 'training') for line in found]
    keep = 'method', 'step', 'loss', 'grad_norm', 'robust', *(f'validation_{k}' for k in (
        'clean', 'robust', 'margins', 'zero_shot_clean', 'zero_shot_robust'))
    rows = [{key: line.get(key) for key in keep} for line in lines]
    save(a, recipe, [], began, 1, TASK_IMAGES, dynamics=rows)


if __name__ == '__main__':
    main()
